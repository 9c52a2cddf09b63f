"""Will it fit, and how long will a step take? What each GPU holds and does, from a config alone.

    python docs/plan.py --model Qwen/Qwen3-8B --gpus 8 --gpu_gb 80

It says "fits", or which flags of train.py would make it fit. Weights, moments, gradients and caches
follow from shapes; activations are counted on torch's meta device, which computes nothing; what a
step holds only for a moment is estimated. tests/peak.py sets measured peaks beside it. The seconds
of an RL step follow from the rates below, of which those of one GPU were measured on an H100 with
`rollout.py --bench`; the products of attention are left out.
Shapes: H attention heads, K key-value heads, S tokens, D head size.
"""

import argparse
import math
import sys
from functools import cache
from itertools import product
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import parallel
import rollout

CUDA_CONTEXT = 2.5e9  # bytes that CUDA, its libraries and nccl take of each GPU; an estimate
# Of an H100 (SXM). Measured: a matrix product of 8192 in bfloat16 reaches 785e12 flop/s, a copy
# 2.85e12 bytes/s. The rest are small kernels, which move data between the products: those of a
# layer take 0.49 ms of a decoding step (0.6 B, 512 rows) to 0.60 ms (8 B), and in a training pass
# 1.15 ns a token, layer and channel (0.6 B).
FLOPS = 0.9 * 785e12  # a second, bfloat16; 0.9 is an estimate, for smaller products
MEMORY = 2.85e12  # bytes a second
LAYER = 540e-6  # seconds
CHANNEL = 1.15e-9  # seconds, without checkpointing
# Estimates:
NVLINK = 0.8 * 450e9  # bytes a second through a GPU in a collective in a node of 8
NETWORK = 0.8 * 8 * 50e9  # the same over nodes, whose 8 links of 400 Gbit/s carry a part each
ALL_REDUCE = 20e-6  # seconds of a small sum over a node
# Tokens that an RL step is planned with; answers have max_new_tokens.
CRITERIA = 2000
PROMPT = 256  # query and document


class _KeptByAttention(torch.autograd.Function):
    """Attention as far as memory goes: a fused kernel keeps queries, keys, values, its output."""

    @staticmethod
    def forward(ctx, q_SHD, k_SKD, v_SKD):
        out_SHD = torch.empty_like(q_SHD)
        ctx.save_for_backward(q_SHD, k_SKD, v_SKD, out_SHD)
        return out_SHD


class _PlannedTree:
    """Stands for a rollout.Tree on the meta device."""

    max_position = 0

    def attend(self, layer, q_SHD, k_SKD, v_SKD, scale):
        return _KeptByAttention.apply(q_SHD, k_SKD, v_SKD)


def activation_bytes(model, tokens):
    """Bytes that a forward pass over `tokens` tokens keeps for the backward pass.

    model: on meta, under rollout.use_tree_attention, in the dtype of the computation.
    """
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if x.is_floating_point() and storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other gets its address
        return x

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.base_model(input_ids=ids, position_ids=ids, tree=_PlannedTree(), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@cache
def bytes_per_token(model, bf16):
    """Activations of one more token in a micro-batch, without what does not grow with it."""
    if bf16:
        model.to(torch.bfloat16)
    growth = activation_bytes(model, 128) - activation_bytes(model, 64)
    model.to(torch.float32)
    return growth / 64


def memory_plan(
    model,
    *,
    ranks=1,
    max_tokens=rollout.MAX_TOKENS,
    cache_tokens=rollout.CACHE_TOKENS,
    max_new_tokens=512,
    sampling_shards=1,
    activation_checkpointing=True,
    kl=False,
    bf16=True,
):
    """What each rank will hold, {what: bytes}, with "peak".

    model: on meta, in float32, under tree attention. max_tokens, cache_tokens: taken as used up, by
    answers of max_new_tokens. kl: with a frozen reference model. bf16: as on GPUs, which compute
    and sample in bfloat16 under FSDP, one alone too; False: as on the CPU.
    """
    config = model.config
    size = 2 if bf16 else 4  # bytes of a number in the computation
    layers = [count(layer) for layer in model.base_model.layers]
    total = count(model)
    layer = max(layers)
    root = total - sum(layers)  # embedding, head and norm, which FSDP gathers together
    token = bytes_per_token(model, bf16)
    layer_token = token / len(layers)

    is_sharded = bf16 or ranks > 1
    # Of the reference, FSDP gathers the root once: without a backward pass it is never freed.
    reference = 4 * total / ranks + (size * root if is_sharded else 0)
    copy = size * (root + sum(layers) / sampling_shards)
    always = {
        "master weights (float32)": 4 * total / ranks,
        "optimizer (two moments, float32)": 8 * total / ranks,
        "sampling copy": copy if is_sharded else 0,
        "reference model": reference if kl else 0,
        "CUDA": CUDA_CONTEXT if bf16 else 0,
    }
    if activation_checkpointing:
        activations = size * config.hidden_size * len(layers) * max_tokens  # inputs of layers
    else:
        activations = token * max_tokens
    # Root, this layer and the next; of one layer, gradients before and after their reduction, and
    # those that another layer's reduction still reads.
    gathered = size * (root + 2 * layer) + (8 + size) * layer if is_sharded else 0
    logits = rollout.LOGITS["cuda" if bf16 else "cpu"]
    chunk = 3 * 4 * min(logits, max_tokens * config.vocab_size)
    backward = 1.3 * layer_token * max_tokens  # of one layer; 1.3 is fitted to tests/peak.py
    update = {
        "gradients (float32)": 4 * total / ranks,
        "activations": activations,
        "gathered weights": gathered,
        "logits, gradients on their way": max(chunk, backward) + 2 * size * root,
    }
    rows = cache_tokens / max_new_tokens
    sampling = {
        "key-value cache": kv_bytes(config, size) * cache_tokens / sampling_shards,
        "prefill": layer_token * rollout.PREFILL_TOKENS,
        "logits of a decoding step": (size + 8) * rows * config.vocab_size,
    }
    moments = [
        sum(update.values()),
        # Without gradients: an optimizer step ends with clearing them.
        sum(sampling.values()),
        2 * update["gradients (float32)"] if bf16 else 0,  # AdamW's temporaries on CUDA
    ]
    peak = sum(always.values()) + max(moments)
    return always | update | sampling | {"peak": peak}


def time_plan(
    model,
    *,
    ranks=1,
    prompts_per_step=32,
    group_size=16,
    max_tokens=rollout.MAX_TOKENS,
    cache_tokens=rollout.CACHE_TOKENS,
    max_new_tokens=512,
    sampling_shards=1,
    activation_checkpointing=True,
):
    """Seconds of the parts of an RL step in bfloat16 on H100s, {what: seconds}, with "step".

    Every answer is as long as it may be: an upper bound for sampling and update.
    """
    config = model.config
    total = count(model)
    layers = len(model.base_model.layers)
    in_layers = sum(count(layer) for layer in model.base_model.layers)
    part = in_layers / sampling_shards + (total - in_layers)  # that a rank samples with
    link = NVLINK if ranks <= 8 else NETWORK
    sent = (ranks - 1) / ranks  # of a gathered tensor, what comes from other ranks

    # Sampling: each group of ranks has the prompts of all its ranks.
    prompts = prompts_per_step / ranks * sampling_shards
    rows = min(prompts * group_size, cache_tokens / max_new_tokens)
    waves = math.ceil(prompts * group_size / rows)
    prompt_tokens = CRITERIA + prompts * PROMPT
    read = CRITERIA + rows / group_size * PROMPT + rows * max_new_tokens / 2  # of the cache
    read_bytes = 2 * part + kv_bytes(config, 2) * read / sampling_shards
    latency = layers * (LAYER + (2 * ALL_REDUCE if sampling_shards > 1 else 0))
    decoding_step = latency + max(read_bytes / MEMORY, 2 * part * rows / FLOPS)

    # Update: each rank has its own.
    group = PROMPT + group_size * max_new_tokens
    tokens = prompts_per_step / ranks * group
    micro_batches = math.ceil(tokens / max(group, max_tokens - CRITERIA))  # of whole groups
    passes = 8 if activation_checkpointing else 6  # flop a parameter and token
    tokens += micro_batches * CRITERIA
    products = passes * total / FLOPS  # seconds a token, like the next
    small_kernels = passes / 6 * layers * config.hidden_size * CHANNEL
    compute = tokens * (products + small_kernels)
    # In each, weights are gathered in bfloat16, forward and backward; gradients summed in float32.
    traffic = micro_batches * (2 * 2 + 4) * total * sent / link

    times = {
        "prefill": 2 * part * prompt_tokens / FLOPS,
        "decoding": waves * max_new_tokens * decoding_step,
        "update: computing": compute,
        "update: FSDP's traffic": traffic,  # goes on beside computing
        "optimizer": 28 * total / ranks / MEMORY,  # reads 4 numbers a parameter, writes 3
        "refresh of the sampling copy": 2 * total * sent / link,
    }
    hidden = min(compute, traffic)
    return times | {"step": sum(times.values()) - hidden}


def kv_bytes(config, size):
    """Bytes of the keys and values of a token, in numbers of so many bytes."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * size


def count(module):
    """Number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())


def load_skeleton(source):
    """A model from its config alone, on meta, under tree attention. Raises OSError, ValueError."""
    if source.startswith((".", "/")) and not Path(source).exists():
        raise OSError("no such folder")
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return rollout.use_tree_attention(model)


def remedy(model, settings, limit):
    """What makes it fit, in words, or None: checkpointing, sampling from shards, smaller budgets,
    then more GPUs.
    """
    for times, share, shards in product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8), (1, 2, 4, 8)):
        ranks = settings["ranks"] * times
        if ranks % shards or not can_be_cut(model, shards):
            continue
        changed = settings | {"activation_checkpointing": True, "ranks": ranks}
        changed["sampling_shards"] = shards
        for name in ("max_tokens", "cache_tokens"):
            changed[name] = settings[name] // share
        if memory_plan(model, **changed)["peak"] <= limit:
            differing = {name: x for name, x in changed.items() if settings[name] != x}
            differing.pop("ranks", None)
            flags = [f"--{name} {int(x)}" for name, x in differing.items()]
            return " ".join([*flags, f"on {ranks} GPUs"])
    return None


def can_be_cut(model, shards):
    """Whether ranks can sample from so many parts of a model."""
    try:
        parallel.check_cut(model, shards)
    except parallel.RunError:
        return shards == 1
    return True


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model folder or hub name")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs (default 8)")
    parser.add_argument(
        "--gpu_gb", type=float, default=80, help="memory of a GPU, in GB of 10^9 bytes (default 80)"
    )
    parser.add_argument(
        "--max_tokens", type=int, default=rollout.MAX_TOKENS, help="as of train.py, like the next"
    )
    parser.add_argument("--cache_tokens", type=int, default=rollout.CACHE_TOKENS)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--prompts_per_step", type=int, default=32)
    parser.add_argument("--group_size", type=int, default=16)
    parser.add_argument("--sampling_shards", type=int, default=1)
    parser.add_argument("--activation_checkpointing", type=int, choices=(0, 1), default=1)
    parser.add_argument("--kl", action="store_true", help="with --kl_coef: a reference model")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if name not in ("model", "activation_checkpointing", "kl") and not value > 0:
            parser.error(f"--{name} {value}: must be above 0")
    return args


def main():
    """Print the plan, whether it fits, and what would if not."""
    args = parse_args()
    try:
        model = load_skeleton(args.model)
    except (OSError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        sys.exit(f"--model {args.model}: {first_line}")
    settings = {
        "ranks": args.gpus,
        "max_tokens": args.max_tokens,
        "cache_tokens": args.cache_tokens,
        "max_new_tokens": args.max_new_tokens,
        "sampling_shards": args.sampling_shards,
        "activation_checkpointing": bool(args.activation_checkpointing),
    }
    batch = {"prompts_per_step": args.prompts_per_step, "group_size": args.group_size}
    times = time_plan(model, **settings, **batch)
    settings["kl"] = args.kl
    limit = args.gpu_gb * 1e9
    plan = memory_plan(model, **settings)
    print(f"{args.model}: {count(model):,} parameters")
    print(f"{args.gpus} GPUs of {args.gpu_gb:g} GB; each holds, in GB:")
    for name, size in plan.items():
        print(f"{name:>34}{size / 1e9:9.1f}")
    print("an RL step on H100s, in seconds, computed:")
    for name, seconds in times.items():
        print(f"{name:>34}{seconds:9.2f}")
    if plan["peak"] <= limit:
        print("fits")
    elif flags := remedy(model, settings, limit):
        print(f"does not fit; this does: {flags}")
    else:
        print("does not fit on any number of such GPUs")


if __name__ == "__main__":
    main()
