"""What a checkpoint and an export add to each rank's memory, for a model of 494 M parameters.

torchrun --nproc-per-node 2 tests/peak_saving.py FOLDER       # 10 GB of memory, 8 GB of disk
"""

import ctypes
import sys
from pathlib import Path

import torch
from peak import resident
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import parallel
import rollout

SIZES = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
}
SIZES |= {"num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 512}


def make(device):
    with torch.device(device):
        return rollout.Policy(rollout.use_tree_attention(Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()))


def report(what, work, *args):
    """Print how far memory rises above what it is before the work."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    before = resident("VmRSS")
    work(*args)
    print(f"{what}: {(resident('VmHWM') - before) / 1e6:.0f} MB above {before / 1e6:.0f}", flush=True)


def main():
    torch.set_num_threads(1)
    ranks = parallel.Ranks()
    policy = parallel.shard(make, ranks)
    optimizer = torch.optim.AdamW(policy.parameters())
    parallel._training_tensors(policy, optimizer)  # makes the moments
    out = Path(sys.argv[1])
    checkpoints = parallel.Checkpoints(out / "checkpoints", ranks)
    report("checkpoint", checkpoints.save, 1, policy, optimizer, {})
    ranks.on_rank_0((out / "model").mkdir)
    report("export", parallel.save_model, policy.model, out / "model", ranks, torch.float32)


if __name__ == "__main__":
    parallel.launch(main)
