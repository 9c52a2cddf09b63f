"""Peak memory of two micro-batches and an optimizer step on CPU, beside what docs/plan.py says.

    python tests/peak.py              # four models and settings, each in a process of its own

Memory is what Linux calls resident. glibc must give freed memory back at once to be told from memory in use, so each
process runs with MALLOC_MMAP_THRESHOLD_ set.
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

SMALL = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 32}  # fmt: skip
LARGE = {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "num_attention_heads": 12,
         "num_key_value_heads": 4, "head_dim": 64}  # fmt: skip
CASES = {  # name: (config, tokens, activation checkpointing)
    "9 M parameters, 4,000 tokens": (SMALL, 4000, False),
    "9 M parameters, 4,000 tokens, checkpointing": (SMALL, 4000, True),
    "132 M parameters, 2,000 tokens": (LARGE, 2000, False),
    "132 M parameters, 4,000 tokens, checkpointing": (LARGE, 4000, True),
}


def resident(key):
    """VmRSS (now) or VmHWM (the highest) of this process, in bytes."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(settings, tokens, checkpointing):
    """{"measured": bytes, "planned": bytes} of training steps, in this process."""
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root), str(root / "docs")]
    import torch
    from plan import memory_plan
    from transformers import AutoConfig, AutoModelForCausalLM

    import rollout
    import train

    torch.set_num_threads(1)

    def step(policy, optimizer, tokens):
        groups = max(1, tokens // 352)  # of 32 own prompt tokens and 8 answers of 40
        tree = rollout.Tree([[5] * 96 + [7 + i] * 32 for i in range(groups)], [[[9] * 40] * 8] * groups)
        for _ in range(2):
            logprobs_A, _ = policy(tree)
            (-logprobs_A.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return tree.input_ids.numel()

    def make(**changes):
        config = AutoConfig.for_model("qwen3", **settings | changes)
        model = rollout.use_tree_attention(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
        return rollout.Policy(model), torch.optim.AdamW(model.parameters())

    step(*make(vocab_size=200, hidden_size=32, intermediate_size=32, num_hidden_layers=1), 500)  # loads what torch loads once
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    policy, optimizer = make()
    if checkpointing:
        train.checkpoint_layers(policy.model)
    step(policy, optimizer, 300)  # makes AdamW's moments
    used = step(policy, optimizer, tokens)
    measured = resident("VmHWM") - before
    with torch.device("meta"):
        skeleton, _ = make()
    planned = memory_plan(skeleton.model, bf16=False, max_tokens=used, cache_tokens=1, activation_checkpointing=checkpointing)
    return {"measured": measured, "planned": planned["peak"]}


def measure_apart(case):
    """`measure` in a process of its own."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, __file__, json.dumps(case)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
    else:
        for name, case in CASES.items():
            measured, planned = (size / 1e6 for size in measure_apart(case).values())
            print(f"{name:<50}measured {measured:6.0f} MB, planned {planned:6.0f} MB: {planned / measured:.2f}")
