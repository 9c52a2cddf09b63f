"""rollout.py against Hugging Face's generate and padded batches: `python rollout.py --bench`.

For each length of the common prefix, interleaved: sampling, with prefill and decoding apart, and
the training step, which computes in the type that train.py computes in. Then sampling of answers of
mixed lengths, and the training step's memory for two sizes of the vocabulary. Tokens per second,
ratio, peak memory, and the share of what this machine's matrix products and memory allow: all of
them at once, and in phases that follow each other (products, then reading the cache), as they do.
About fifteen minutes on two CPU cores.

generate and padded rows run as many rows as --peer_tokens hold, one group or one row at least:
whole batches would not fit into memory.
"""

import argparse
import contextlib
import ctypes
import gc
import re
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for triton_decode
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout
from parallel import chosen_bf16
from rollout import Policy, Tree, sample, use_tree_attention

# Measuring ----------------------------------------------------------------------------------------


def memory(device):
    """Bytes that this process holds, and the most since the last call; resets that peak.

    None where they cannot be told.
    """
    if device.type == "cuda":
        values = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return values
    if sys.platform != "linux":
        return None
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return [int(re.search(rf"{key}:\s+(\d+)", status)[1]) * 1024 for key in ("VmRSS", "VmHWM")]


def peak_memory(run, device):
    """Peak memory of a call above what was held before it, in bytes; None if it cannot be told."""
    gc.collect()
    if sys.platform == "linux":
        # Else memory that was freed before hides what is taken now.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = memory(device)
    run()
    after = memory(device)
    return None if before is None else after[1] - before[0]


def time_of(run, device):
    """Seconds of a call."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def hardware(device, dtype):
    """Measured rates of this device: a large matrix product in flop/s, a large copy in bytes/s."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.zeros(2**26, device=device)
    target = source.clone()
    best = lambda run: min(time_of(run, device) for _ in range(10))
    return 2 * size**3 / best(lambda: a @ a), 2 * source.nbytes / best(lambda: target.copy_(source))


def numbers_of(model):
    """Weights in the layers' matrix products, those of the head, cached numbers of a token, and the
    flop of attention, forward, for a query and a key it sees.
    """
    linear = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    body = sum(m.weight.numel() for m in linear)
    config = model.config
    heads = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * size
    seen = 4 * config.num_hidden_layers * config.num_attention_heads * size
    return body, model.get_output_embeddings().weight.numel(), cached, seen


def show(title, name, seconds, tokens=None, ratio=None, peak=None, limit=None):
    """One line: tokens per second, ratio to the last, peak memory, shares of the limits."""
    line = f"{title:<18}{name:<22}{seconds:9.3f} s"
    line += "" if tokens is None else f"{tokens / seconds:10.0f} tok/s"
    line += "" if ratio is None else f"{ratio:7.1f}x"
    line += "" if peak is None else f"{peak / 2**20:9.0f} MiB"
    if limit is not None:
        at_once, in_phases = (x / seconds for x in limit)
        line += f"{at_once:8.0%} of the limit at once, {in_phases:.0%} in phases"
    print(line, flush=True)


def compare(title, runs, repeats, device):
    """Run each in turn; returns the best time of each by name.

    runs: name -> (call, its tokens or None, the two limits in seconds or None).
    """
    peaks = {name: peak_memory(run, device) for name, (run, *_) in runs.items()}  # warms up, too
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, (run, *_) in runs.items():
            best[name] = min(best[name], time_of(run, device))
    rates = {name: (tokens or 0) / best[name] for name, (_, tokens, _) in runs.items()}
    *_, last = rates.values()
    for name, (_, tokens, limit) in runs.items():
        ratio = None if tokens is None else rates[name] / last
        show(title, name, best[name], tokens, ratio, peaks[name], limit)
    return best


# What is measured ---------------------------------------------------------------------------------


def bench_sampling(model, shape, prefix, peer_tokens, repeats, rates):
    """Answers of exactly T tokens: `sample` against model.generate; returns decoding's tok/s."""
    P, G, own, T = shape
    device = model.device
    prompts = draw_prompts(model.config.vocab_size, P, prefix, own)
    peers = max(1, peer_tokens // (prefix + own + T) // G)
    rows = [prompt for prompt in prompts[:peers] for _ in range(G)]
    rows = torch.tensor(rows, device=device)

    def tree(tokens=T):
        use_tree_attention(model)
        sample(model, prompts, group_size=G, max_new_tokens=tokens, eos_id=-1)

    def generate():
        model.set_attn_implementation("sdpa")
        model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=T,
            min_new_tokens=T,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
        )

    body, head, cached, seen = numbers_of(model)
    size = model.dtype.itemsize
    N = P * G
    # Each token passes the layers, each drawn one the head; a step reads weights and cache once.
    prefill = 2 * body * (prefix + P * own) + seen * pairs_seen(P, 0, prefix, own, T)
    products = 2 * (body + head) * N * T
    attention = seen * N * T * (prefix + own + T / 2)
    weights = size * (body + head) * T
    cache = size * cached * (prefix + P * own + N * T / 2) * T
    flops = prefill + products + attention
    read = weights + cache
    phases = [(prefill, 0), (products, weights), (attention, cache)]
    in_phases = sum(max(x / rates[0], y / rates[1]) for x, y in phases)
    limit = (max(flops / rates[0], read / rates[1]), in_phases)
    runs = {
        "tree": (tree, P * G * T, limit),
        "its prefill": (lambda: tree(1), None, None),
        "model.generate": (generate, len(rows) * T, None),
    }
    best = compare(f"sampling {prefix}", runs, repeats, device)
    decoding = best["tree"] - best["its prefill"]
    tokens = P * G * (T - 1)
    show(f"sampling {prefix}", "its decoding", decoding, tokens)
    print(f"{'':<18}{read / decoding / 1e9:.1f} GB/s, {flops / decoding / 1e9:.0f} Gflop/s")
    return tokens / decoding


def pairs_seen(P, G, prefix, own, T):
    """Pairs of a query and a key that it sees in a packed tree."""
    of_prompts = prefix**2 / 2 + P * own * (prefix + own / 2)
    return of_prompts + P * G * T * (prefix + own + T / 2)


@contextlib.contextmanager
def answers_of(lengths_N, eos_id):
    """While active, answer n of `sample` ends at its length and nowhere else."""
    uniforms, choose_tokens = rollout.uniforms, rollout.choose_tokens

    def marked(seed, step, rows, width):
        draws_NT = uniforms(seed, step, rows, width)
        draws_NT[np.arange(len(rows)), lengths_N[rows] - 1] += 1
        return draws_NT

    def choose(logits_AV, draws_A, temperature):
        ids_A, logprobs_A = choose_tokens(logits_AV, draws_A % 1, temperature)
        return torch.where(draws_A >= 1, eos_id, ids_A.clamp(min=eos_id + 1)), logprobs_A

    with mock.patch.multiple(rollout, uniforms=marked, choose_tokens=choose):
        yield


def bench_lengths(model, shape, prefix, repeats):
    """Answers of uniform length T/8..T against as many that all have the mean length.

    In lockstep, a part of the batch ends with its longest answer. Four times the prompts, with a
    cache that has room for a quarter of them: four parts.
    """
    use_tree_attention(model)
    P, G, own, T = shape
    prompts = draw_prompts(model.config.vocab_size, 4 * P, prefix, own)
    N = len(prompts) * G
    budget = prefix + P * (own + G * T)
    mixed_N = np.random.default_rng(0).integers(T // 8, T + 1, N)
    mean = round(mixed_N.mean())

    def run(lengths_N):
        settings = {"group_size": G, "max_new_tokens": T, "eos_id": 2, "cache_tokens": budget}
        with answers_of(lengths_N, eos_id=2):
            sampled = sample(model, prompts, **settings)
        assert sampled.lengths_N.tolist() == lengths_N.tolist()

    runs = {
        f"{T // 8}..{T}, mean {mean}": (lambda: run(mixed_N), int(mixed_N.sum()), None),
        f"all of {mean}": (lambda: run(np.full(N, mean)), N * mean, None),
    }
    compare("lengths", runs, repeats, model.device)


def training_step(model, tree):
    """Forward and backward over the packed tree."""
    logprobs_A, _ = Policy(model)(tree)
    (-logprobs_A.mean()).backward()


def bench_training(model, shape, prefix, peer_tokens, repeats, rates):
    """Gradients of answers of T tokens: the tree against one padded row an answer."""
    P, G, own, T = shape
    device = model.device
    prompts = draw_prompts(model.config.vocab_size, P, prefix, own)
    draw = np.random.default_rng(0)
    answers = [draw.integers(3, model.config.vocab_size, (G, T)).tolist() for _ in prompts]
    rows = [p + answer for p, group in zip(prompts, answers, strict=True) for answer in group]
    rows = rows[: max(1, peer_tokens // (prefix + own + T))]
    tree = Tree(prompts, answers, device)

    def packed():
        model.zero_grad()
        use_tree_attention(model)
        training_step(model, tree)

    def padded(positions):
        model.zero_grad()
        model.set_attn_implementation("sdpa")
        ids = torch.tensor(rows, device=device)  # all rows have the same length
        mask = torch.ones_like(ids)
        logits = model(ids, attention_mask=mask, logits_to_keep=positions).logits
        logps = torch.log_softmax(logits[:, -T - 1 : -1].float(), -1)
        (-logps.gather(-1, ids[:, -T:, None]).mean()).backward()

    body, head, _, seen = numbers_of(model)
    drawn = P * G * T
    flops = 6 * (body * tree.input_ids.numel() + head * drawn)
    flops += 3 * seen * pairs_seen(P, G, prefix, own, T)
    runs = {
        "tree": (packed, drawn, [flops / rates[0]] * 2),
        "padded rows": (lambda: padded(0), len(rows) * T, None),
        "padded, answer logits": (lambda: padded(T + 1), len(rows) * T, None),
    }
    compare(f"training {prefix}", runs, repeats, device)


def bench_memory(config, shape, prefix, device, dtype):
    """The training step's peak above weights and gradients, for two sizes of the vocabulary."""
    P, G, own, T = shape
    answers = [[[5] * T] * G for _ in range(P)]
    tree = Tree(draw_prompts(1000, P, prefix, own), answers, device)
    for vocabulary in (32_000, 152_000):
        config = type(config).from_dict(config.to_dict() | {"vocab_size": vocabulary})
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
        use_tree_attention(model)
        embedding = model.get_input_embeddings().weight
        for trained in (False, True):
            embedding.requires_grad_(trained)
            training_step(model, tree)  # from here on the gradients are held
            peak = peak_memory(lambda model=model: training_step(model, tree), device)
            if peak is not None:
                print(
                    f"memory    vocabulary {vocabulary:<8,}"
                    f"embedding {'trained' if trained else 'frozen ':<9}{peak / 2**20:6.0f} MiB   "
                    f"(embedding {embedding.nbytes / 2**20:.0f} MiB, "
                    f"logits of all answers {len(tree.targets_A) * vocabulary / 2**18:.0f} MiB)"
                )


# The command --------------------------------------------------------------------------------------

QWEN3_110M = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def bench_model(folder, device, dtype):
    """The model of a folder, with random weights where it has none; without a folder, a Qwen3."""
    if folder and any(Path(folder).glob("*.safetensors")):
        settings = {"use_safetensors": True, "dtype": dtype}
        return AutoModelForCausalLM.from_pretrained(folder, **settings).to(device)
    if folder:
        config = AutoConfig.from_pretrained(folder)
    else:
        config = AutoConfig.for_model("qwen3", **QWEN3_110M)
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def draw_prompts(vocabulary, count, prefix, own):
    """Random prompts with a common prefix."""
    draw = np.random.default_rng(0)
    tokens = lambda n: draw.integers(3, vocabulary, n).tolist()
    common = tokens(prefix)
    return [common + tokens(own) for _ in range(count)]


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="rollout.py",
        usage="rollout.py (--bench ... | --check MODEL ...) [-h]",
        description=f"{main.__doc__} (`rollout.py --check MODEL` has a --help of its own.)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    parts = ["sampling", "lengths", "training", "memory"]
    shape = {"type": int, "nargs": 4, "metavar": ("PROMPTS", "GROUP", "OWN", "ANSWER")}
    add("--bench", action="store_true", required=True, help="measure")
    add("--model", help="model folder, also without weights (None: a random 110 M Qwen3)")
    add("--repeats", type=int, default=2, help="runs of each; the best counts")
    add("--only", nargs="+", default=parts, choices=parts, help="parts to run")
    add("--prefixes", type=int, nargs="+", default=[512, 2048, 4096], help="common tokens")
    add("--sampling", **shape, default=[16, 8, 64, 64], help="prompts, answers of each, tokens")
    add("--training", **shape, default=[2, 8, 128, 64], help="the same for the training step")
    add("--peer_tokens", type=int, default=2048, help="of the rows of generate and padded batches")
    add("--bf16", default="auto", choices=["auto", "0", "1"], help="compute in bfloat16")
    add("--compile", type=int, choices=[0, 1], default=1, help="compile, as train.py, on CUDA")
    add("--triton", action="store_true", help="with docs/triton_decode.py, on CUDA")
    return parser.parse_args()


def main():
    """Measure rollout.py against Hugging Face's generate and padded batches, interleaved."""
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = AutoConfig.from_pretrained(args.model) if args.model else None
    width = config.hidden_size if config else QWEN3_110M["hidden_size"]
    bf16 = chosen_bf16(args.bf16, device, width)
    dtype = torch.bfloat16 if bf16 else torch.float32
    rollout.COMPILE = bool(args.compile) and width >= 512
    if args.triton:
        import triton_decode

        triton_decode.install()
    model = bench_model(args.model, device, dtype).eval()
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    rates = hardware(device, dtype)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {name}, {dtype}: "
        f"matrix products {rates[0] / 1e9:.0f} Gflop/s, memory {rates[1] / 1e9:.1f} GB/s"
    )
    peers = args.peer_tokens
    decoding = []
    for prefix in args.prefixes:
        if "sampling" in args.only:
            shape = args.sampling
            decoding.append(bench_sampling(model, shape, prefix, peers, args.repeats, rates))
        if "training" in args.only:
            bench_training(model, args.training, prefix, peers, args.repeats, rates)
            model.zero_grad()
    if decoding:
        lengths = f"{args.prefixes[-1]} against {args.prefixes[0]}"
        flatness = decoding[-1] / decoding[0]
        print(f"flatness          decoding after a prefix of {lengths} tokens: {flatness:.2f}")
    if "lengths" in args.only:
        bench_lengths(model, args.sampling, args.prefixes[0], args.repeats)
    if "memory" in args.only:
        bench_memory(model.config, args.training, args.prefixes[0], device, dtype)


if __name__ == "__main__":
    main()
