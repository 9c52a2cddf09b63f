"""rollout.py against Hugging Face's generate and padded batches: `python rollout.py --bench`.

Interleaved, in one run: sampling, refilling with answers of mixed lengths, the training step, and
its memory for two sizes of the vocabulary. Time, ratio, peak memory, and the share of what this
machine's matrix products and memory allow. About twelve minutes on two CPU cores, of which
model.generate takes six.
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
    Policy,
    Tree,
    _Sampler,
    common_prefix_length,
    sample,
    uniforms,
    use_tree_attention,
)

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
    a = torch.randn(2048, 2048, device=device, dtype=dtype)
    source = torch.zeros(2**26, device=device)
    target = source.clone()
    best = lambda run: min(time_of(run, device) for _ in range(10))
    return 2 * 2048**3 / best(lambda: a @ a), 2 * source.nbytes / best(lambda: target.copy_(source))


def time_limit(model, prefilled, drawn, steps, passes, rates):
    """Seconds that the matrix products and the reading of the weights alone take at these rates."""
    head = model.get_output_embeddings().weight
    linear = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    body = sum(m.weight.numel() for m in linear)
    flops = 2 * passes * (body * (prefilled + drawn) + head.numel() * drawn)
    read = (body + head.numel()) * head.element_size() * steps
    return max(flops / rates[0], read / rates[1])


def compare(title, runs, repeats, tokens, limit, device):
    """Run each in turn; print the best time of each, the ratio, peak memory, share of the limit."""
    peaks = {name: peak_memory(run, device) for name, run in runs.items()}  # warms up, too
    rounds = [{name: time_of(run, device) for name, run in runs.items()} for _ in range(repeats)]
    best = {name: min(times[name] for times in rounds) for name in runs}
    for name, seconds in best.items():
        peak = "" if peaks[name] is None else f"{peaks[name] / 2**20:9.0f} MiB"
        print(
            f"{title:<10}{name:<22}{seconds:9.3f} s{tokens / seconds:10.0f} tok/s"
            f"{max(best.values()) / seconds:7.1f}x{peak}{limit / seconds:8.0%} of the limit",
            flush=True,
        )


# What is measured ---------------------------------------------------------------------------------


def bench_sampling(model, prompts, group_size, T, repeats, rates):
    """Answers of exactly T tokens: `sample` against model.generate."""
    N = len(prompts) * group_size
    rows = [prompt for prompt in prompts for _ in range(group_size)]
    rows = torch.tensor(rows, device=model.device)

    def tree():
        use_tree_attention(model)
        sample(model, prompts, group_size=group_size, max_new_tokens=T, eos_id=-1)

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

    prefix = common_prefix_length(prompts)
    prefilled = prefix + sum(len(prompt) - prefix for prompt in prompts)
    limit = time_limit(model, prefilled, N * T, T, 1, rates)
    runs = {"tree": tree, "model.generate": generate}
    compare("sampling", runs, repeats, N * T, limit, model.device)


class _LengthSampler(_Sampler):
    """Its answers end where the draw is 1 or more, and nowhere else."""

    def choose(self, logits_AV, draws_A):
        ids_A, logps_A = super().choose(logits_AV, draws_A % 1)
        return torch.where(draws_A >= 1, self.eos_id, ids_A.clamp(min=self.eos_id + 1)), logps_A


def bench_lengths(model, prompts, group_size, T, repeats, rates):
    """Refilling: answers of uniform length T/8..T against as many that all have the mean length.

    Of four times the prompts, with a cache for a quarter of the answers.
    """
    use_tree_attention(model)
    prompts = prompts * 4
    N = len(prompts) * group_size
    prefix = common_prefix_length(prompts)
    own = max(map(len, prompts)) - prefix
    budget = prefix + len(prompts) // 2 * own + N // 4 * T
    mixed_N = torch.from_numpy(np.random.default_rng(0).integers(T // 8, T + 1, N))
    mean = round(mixed_N.double().mean().item())

    @torch.no_grad()
    def run(lengths_N):
        draws_NT = torch.from_numpy(uniforms(0, 0, range(N), T))
        draws_NT[torch.arange(N), lengths_N - 1] += 1
        draws_NT = draws_NT.to(model.device)
        sampler = _LengthSampler(model, prompts, group_size, T, 2, 1.0, draws_NT, budget, True)
        sampler.run()
        assert torch.equal(sampler.lengths_N[:N].cpu(), lengths_N)

    runs = {
        f"all of {mean}": lambda: run(torch.full((N,), mean)),
        f"{T // 8}..{T}, mean {mean}": lambda: run(mixed_N),
    }
    limit = time_limit(model, 0, N * mean, 4 * mean, 1, rates)
    compare("lengths", runs, repeats, int(mixed_N.sum()), limit, model.device)


def training_step(model, tree):
    """Forward and backward over the packed tree."""
    logprobs_A, _ = Policy(model)(tree)
    (-logprobs_A.mean()).backward()


def bench_training(model, prompts, group_size, T, repeats, rates):
    """Gradients of answers of T tokens: the tree against one padded row an answer."""
    device = model.device
    draw = np.random.default_rng(0)
    answers = [draw.integers(3, model.config.vocab_size, (group_size, T)).tolist() for _ in prompts]
    rows = [p + answer for p, group in zip(prompts, answers, strict=True) for answer in group]

    def packed():
        model.zero_grad()
        use_tree_attention(model)
        training_step(model, Tree(prompts, answers, device))

    def padded(positions):
        model.zero_grad()
        model.set_attn_implementation("sdpa")
        ids = torch.tensor(rows, device=device)  # all rows have the same length
        mask = torch.ones_like(ids)
        logits = model(ids, attention_mask=mask, logits_to_keep=positions).logits
        logps = torch.log_softmax(logits[:, -T - 1 : -1].float(), -1)
        (-logps.gather(-1, ids[:, -T:, None]).mean()).backward()

    tokens = Tree(prompts, answers).input_ids.numel()
    drawn = len(rows) * T
    limit = time_limit(model, tokens - drawn, drawn, 3, 3, rates)
    runs = {
        "tree": packed,
        "padded batch": lambda: padded(0),
        "padded, answer logits": lambda: padded(T + 1),
    }
    compare("training", runs, repeats, drawn, limit, device)


def bench_memory(config, prompts, group_size, T, device):
    """The training step's peak above weights and gradients, for two sizes of the vocabulary."""
    answers = [[[5] * T] * group_size for _ in prompts]
    prompts = [[token % 1000 for token in prompt] for prompt in prompts]
    tree = Tree(prompts, answers, device)
    for vocabulary in (32_000, 152_000):
        config = type(config).from_dict(config.to_dict() | {"vocab_size": vocabulary})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
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
                    f"(embedding {embedding.numel() / 2**18:.0f} MiB, "
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
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def bench_model(folder):
    """The model of a folder, with random weights where it has none; without a folder, a Qwen3."""
    if folder and any(Path(folder).glob("*.safetensors")):
        settings = {"use_safetensors": True, "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(folder, **settings)
    if folder:
        config = AutoConfig.from_pretrained(folder)
    else:
        config = AutoConfig.for_model("qwen3", **QWEN3_110M)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def draw_prompts(vocabulary, shape):
    """Random prompts with a common prefix."""
    P, _, prefix, own, _ = shape
    draw = np.random.default_rng(0)
    tokens = lambda n: draw.integers(3, vocabulary, n).tolist()
    common = tokens(prefix)
    return [common + tokens(own) for _ in range(P)]


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="rollout.py",
        description=main.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    parts = ["sampling", "lengths", "training", "memory"]
    shape = {"type": int, "nargs": 5, "metavar": ("PROMPTS", "GROUP", "PREFIX", "OWN", "ANSWER")}
    add("--bench", action="store_true", required=True, help="measure")
    add("--model", help="model folder, also without weights (None: a random 110 M Qwen3)")
    add("--repeats", type=int, default=2, help="runs of each; the best counts")
    add("--only", nargs="+", default=parts, choices=parts, help="parts to run")
    add(
        "--sampling", **shape, default=[16, 8, 512, 64, 64], help="prompts, answers of each, tokens"
    )
    add("--training", **shape, default=[2, 8, 256, 128, 64], help="the same for the training step")
    add(
        "--sampling_dtype",
        choices=["bfloat16", "float32"],
        default="bfloat16",
        help="training is in float32",
    )
    return parser.parse_args()


def main():
    """Measure rollout.py against Hugging Face's generate and padded batches, interleaved."""
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = bench_model(args.model).to(device).eval()
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {name}")

    sampling = {"sampling": bench_sampling, "lengths": bench_lengths}
    training = {"training": bench_training}
    for dtype, parts, shape in (
        (getattr(torch, args.sampling_dtype), sampling, args.sampling),
        (torch.float32, training, args.training),
    ):
        rates = hardware(device, dtype)
        print(
            f"{dtype}: matrix products {rates[0] / 1e9:.0f} Gflop/s, memory {rates[1] / 1e9:.1f} "
            f"GB/s; prompts, group, common prefix, own tokens, answer: {shape}"
        )
        copied = copy.deepcopy(model).to(dtype)
        prompts = draw_prompts(model.config.vocab_size, shape)
        for part, bench in parts.items():
            if part in args.only:
                bench(copied, prompts, shape[1], shape[4], args.repeats, rates)
    if "memory" in args.only:
        shape = args.training
        prompts = draw_prompts(model.config.vocab_size, shape)
        bench_memory(model.config, prompts, shape[1], shape[4], device)


if __name__ == "__main__":
    main()
