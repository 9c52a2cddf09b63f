"""rollout.py against Hugging Face's own generate and padded batches, interleaved, in one run: `python rollout.py --bench`.

Sampling, refilling with answers of mixed lengths, the training step, and its memory for two sizes of the vocabulary: time,
ratio, peak memory, and the share of what this machine's matrix products and memory allow. About twelve minutes on two CPU
cores, of which model.generate takes six.
"""

import argparse
import copy
import ctypes
import gc
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rollout import (
    Tree,
    _Sampler,
    answer_hidden,
    choose_tokens,
    common_prefix_length,
    sample,
    token_logprobs,
    uniforms,
    use_tree_attention,
)


def memory(device):
    """(bytes held now, highest since the last call) of this process, None where that cannot be told; resets the peak."""
    if device.type == "cuda":
        values = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return values
    if sys.platform != "linux":
        return None
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return tuple(int(re.search(rf"{key}:\s+(\d+)", status)[1]) * 1024 for key in ("VmRSS", "VmHWM"))


def peak_memory(run, device):
    """Peak memory of a call above what was held before it, in bytes, None where that cannot be told."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory that was freed before hides what is taken now
    before, _, after = memory(device), run(), memory(device)
    return None if before is None else after[1] - before[0]


def time_of(run, device):
    """Time of a call."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def hardware(device, dtype):
    """Measured rates of this device: multiply-adds of a large matrix product, flop/s, and of a large copy, bytes/s."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    source = torch.zeros(2**26, device=device)
    target = source.clone()
    best = lambda run: min(time_of(run, device) for _ in range(10))
    return 2 * 2048**3 / best(lambda: a @ a), 2 * 4 * 2**26 / best(lambda: target.copy_(source))


def time_limit(model, prefilled, drawn, steps, passes, rates):
    """Seconds that the matrix products and the reading of the weights alone take at the measured rates."""
    head = model.get_output_embeddings().weight
    body = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, torch.nn.Linear))
    flops = 2 * passes * (body * (prefilled + drawn) + head.numel() * drawn)
    return max(flops / rates[0], (body + head.numel()) * head.element_size() * steps / rates[1])


def bench_sampling(model, prompts, group_size, T, repeats, rates):
    """Answers of exactly T tokens: `sample` against model.generate."""
    device, N = model.device, len(prompts) * group_size
    rows = torch.tensor([prompt for prompt in prompts for _ in range(group_size)], device=device)
    sampled = []

    def tree():
        use_tree_attention(model)
        sampled.append(sample(model, prompts, group_size=group_size, max_new_tokens=T, eos_id=-1, seed=len(sampled)))

    def generate():
        model.set_attn_implementation("sdpa")
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
        model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=T, min_new_tokens=T, **settings)

    limit = time_limit(
        model, len(prompts[0]) + sum(len(p) - common_prefix_length(prompts) for p in prompts), N * T, T, 1, rates
    )
    compare("sampling", {"tree": tree, "model.generate": generate}, repeats, N * T, limit, device)


def compare(title, runs, repeats, tokens, limit, device):
    """Run each in turn; print the best time of each, the ratio, peak memory (of a run before), and the share of the limit."""
    peaks = {name: peak_memory(run, device) for name, run in runs.items()}
    rounds = [{name: time_of(run, device) for name, run in runs.items()} for _ in range(repeats)]
    best = {name: min(times[name] for times in rounds) for name in runs}
    for name, seconds in best.items():
        memory = "" if peaks[name] is None else f"{peaks[name] / 2**20:9.0f} MiB"
        print(
            f"{title:<10}{name:<22}{seconds:9.3f} s{tokens / seconds:10.0f} tok/s{max(best.values()) / seconds:7.1f}x"
            f"{memory}{limit / seconds:8.0%} of the limit",
            flush=True,
        )


def training_step(model, tree):
    """Forward and backward over the packed tree."""
    logprobs_A, _ = token_logprobs(answer_hidden(model, tree), model.get_output_embeddings(), tree.targets_A)
    (-logprobs_A.mean()).backward()


def bench_training(model, prompts, group_size, T, repeats, rates):
    """Gradients of answers of T tokens: the tree against one padded row an answer."""
    device = model.device
    draw = np.random.default_rng(0)
    answers = [draw.integers(3, model.config.vocab_size, (group_size, T)).tolist() for _ in prompts]
    rows = [prompt + answer for prompt, group in zip(prompts, answers, strict=True) for answer in group]

    def packed():
        model.zero_grad()
        use_tree_attention(model)
        training_step(model, Tree(prompts, answers, device))

    def padded(positions):
        model.zero_grad()
        model.set_attn_implementation("sdpa")
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        logits = model(ids, attention_mask=mask, logits_to_keep=positions).logits[:, -T - 1 : -1].float()
        logps = torch.log_softmax(logits, -1).gather(-1, ids[:, -T:, None])  # all rows have the same length
        (-logps.mean()).backward()

    tree, drawn = Tree(prompts, answers), len(rows) * T
    limit = time_limit(model, tree.input_ids.shape[1] - drawn, drawn, 3, 3, rates)
    runs = {"tree": packed, "padded batch": lambda: padded(0), "padded, answer logits": lambda: padded(T + 1)}
    compare("training", runs, repeats, drawn, limit, device)


def bench_lengths(model, prompts, group_size, T, repeats, rates):
    """Refilling: four times the prompts in the same cache, answers of uniform length T/8..T against all of the mean."""
    use_tree_attention(model)
    prompts = prompts * 4
    N, own = len(prompts) * group_size, max(map(len, prompts)) - common_prefix_length(prompts)
    budget = common_prefix_length(prompts) + len(prompts) // 2 * own + N // 4 * T
    mixed_N = np.random.default_rng(0).integers(T // 8, T + 1, N)
    mean = round(mixed_N.mean())

    def choose(logits_RV, ends_R):
        ids_R, logps_R = choose_tokens(logits_RV, ends_R % 1, 1.0)
        return torch.where(ends_R >= 1, 2, ids_R.clamp(min=3)), logps_R

    def run(lengths_N):
        draws_NT = torch.from_numpy(uniforms(0, 0, range(N), T))
        draws_NT[torch.arange(N), torch.as_tensor(lengths_N) - 1] += 1  # ends the row there
        settings = (model, prompts, group_size, T, 2, choose, draws_NT.to(model.device), budget, True)
        sampler = _Sampler(*settings)
        with torch.no_grad():
            while sampler.step() is not None:
                pass
        assert torch.equal(sampler.lengths_N[:N].cpu(), torch.as_tensor(lengths_N))

    runs = {f"all of {mean}": lambda: run(np.full(N, mean)), f"{T // 8}..{T}, mean {mean}": lambda: run(mixed_N)}
    limit = time_limit(model, 0, N * mean, 4 * mean, 1, rates)
    compare("lengths", runs, repeats, int(mixed_N.sum()), limit, model.device)


def bench_memory(config, prompts, group_size, T, device):
    """The training step's peak above weights and gradients, for two sizes of the vocabulary."""
    answers = [[[5] * T] * group_size for _ in prompts]
    prompts = [[token % 1000 for token in prompt] for prompt in prompts]
    for vocabulary in (32_000, 152_000):
        config = type(config).from_dict(config.to_dict() | {"vocab_size": vocabulary})
        model = use_tree_attention(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).to(device)
        embedding, tree = model.get_input_embeddings().weight, Tree(prompts, answers, device)
        for trained in (False, True):
            embedding.requires_grad_(trained)
            training_step(model, tree)  # from here on the gradients are held
            peak = peak_memory(lambda model=model, tree=tree: training_step(model, tree), device)
            if peak is not None:
                print(
                    f"memory    vocabulary {vocabulary:<8,}embedding {'trained' if trained else 'frozen ':<9}"
                    f"{peak / 2**20:6.0f} MiB   (embedding {embedding.numel() / 2**18:.0f} MiB, "
                    f"logits of all answers {len(tree.targets_A) * vocabulary / 2**18:.0f} MiB)"
                )


def bench_model(folder):
    """The model of a folder, with random weights if it has none; if there is no folder, a Qwen3 of 110 M parameters."""
    shape = {"vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12}
    shape |= {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 64, "max_position_embeddings": 4096}
    config = AutoConfig.from_pretrained(folder) if folder else AutoConfig.for_model("qwen3", **shape, tie_word_embeddings=True)
    if folder and any(Path(folder).glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def main():
    """Measure rollout.py against Hugging Face's generate and padded batches, interleaved, in one run."""
    parser = argparse.ArgumentParser(
        description=main.__doc__, prog="rollout.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--bench", action="store_true", required=True, help="measure")
    parser.add_argument("--model", help="model folder, also without weights (None: a random 110 M Qwen3)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each; the best counts")
    parts = ["sampling", "lengths", "training", "memory"]
    parser.add_argument("--only", nargs="+", default=parts, choices=parts, help="parts to run")
    shape = {"type": int, "nargs": 5, "metavar": ("PROMPTS", "GROUP", "PREFIX", "OWN", "ANSWER")}
    parser.add_argument("--sampling", **shape, default=[16, 8, 512, 64, 64], help="prompts, answers of each, tokens")
    parser.add_argument("--training", **shape, default=[2, 8, 256, 128, 64], help="the same for the training step")
    parser.add_argument("--sampling_dtype", choices=["bfloat16", "float32"], default="bfloat16", help="training is in float32")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = bench_model(args.model).to(device).eval()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {name}")

    def prompts_of(P, _, prefix, own, __):
        draw = np.random.default_rng(0)
        tokens = lambda n: draw.integers(3, model.config.vocab_size, n).tolist()
        common = tokens(prefix)
        return [common + tokens(own) for _ in range(P)]

    for dtype, parts, shape in (
        (getattr(torch, args.sampling_dtype), {"sampling": bench_sampling, "lengths": bench_lengths}, args.sampling),
        (torch.float32, {"training": bench_training}, args.training),
    ):
        rates = hardware(device, dtype)
        print(f"{dtype}: matrix products {rates[0] / 1e9:.0f} Gflop/s, memory {rates[1] / 1e9:.1f} GB/s; prompts, group, "
              f"common prefix, own tokens, answer: {shape}")  # fmt: skip
        copied = copy.deepcopy(model).to(dtype)
        for part, bench in parts.items():
            if part in args.only:
                bench(copied, prompts_of(*shape), shape[1], shape[4], args.repeats, rates)
    if "memory" in args.only:
        bench_memory(model.config, prompts_of(*args.training), args.training[1], args.training[4], device)


if __name__ == "__main__":
    main()
