"""A model that is cut for sampling over all ranks against the whole, for several architectures (run by test_parallel.py).

torchrun --nproc-per-node 4 tests/shards.py --out=FOLDER
"""

import copy
import os
import sys
from functools import partial
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

import parallel
import rollout

SMALL = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0, "head_dim": 8}  # fmt: skip
ARCHITECTURES = {
    "qwen3": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},  # biases of queries, keys and values
    "llama": {"attention_bias": True, "mlp_bias": True},  # biases of all, of which the sums have one
    "gemma": {},
    "smollm3": {"no_rope_layers": [1, 0]},
}
SHARDS = int(os.environ["WORLD_SIZE"])
PROMPTS = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 8], [1, 2, 3, 7]]


def make(name, device):
    """A model of an architecture with weights that nobody initialises to 0."""
    config = AutoConfig.for_model(name, **SMALL | ARCHITECTURES[name])
    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if device != "meta":
            for p in model.parameters():
                p.data += 0.1 * torch.randn_like(p)
    return rollout.Policy(rollout.use_tree_attention(model))


def make_cut(name, ranks, device):
    """The same, cut."""
    return parallel.cut(make(name, device), ranks)


def compare(whole, part):
    """Answers, log-probabilities and label logits of both."""
    settings = {"group_size": 4, "max_new_tokens": 12, "eos_id": 59, "seed": 3, "label_ids": [5, 6]}
    ours, theirs = (rollout.sample(policy.model, PROMPTS, **settings) for policy in (part, whole))
    assert ours.answers == theirs.answers
    torch.testing.assert_close(ours.logprobs_A, theirs.logprobs_A, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.label_logits_AY, theirs.label_logits_AY, atol=1e-4, rtol=1e-5)
    count = lambda policy: sum(p.numel() for p in policy.model.base_model.layers.parameters())
    assert count(part) < (1 / SHARDS + 0.02) * count(whole)


def main():
    out = Path(sys.argv[1].removeprefix("--out="))
    ranks = parallel.Ranks(sampling_shards=SHARDS)
    alone = copy.copy(ranks)  # each rank as the only one of a run
    alone.rank, alone.world = 0, 1
    alone.mesh = init_device_mesh("cpu", (SHARDS, 1), mesh_dim_names=("runs", "ranks"))["ranks"]
    for name in ARCHITECTURES:
        folder = out / name
        whole = make(name, "cpu")
        ranks.on_rank_0(lambda folder=folder: folder.mkdir(parents=True))
        parallel.save_model(whole.model, folder, ranks, torch.float32)
        with torch.no_grad():
            read = make_cut(name, ranks, "meta")
            parallel.fill(read, partial(sys.exit, "it was to be read"), ranks, folder)
            compare(whole, read)
            sent = make_cut(name, ranks, "meta")
            parallel.fill(sent, partial(make, name), ranks)
            compare(whole, sent)
            policy = parallel.shard(partial(make, name), ranks, source=folder)
            for p, sharded in zip(whole.parameters(), policy.parameters(), strict=True):
                p.mul_(1.1)
                sharded.mul_(1.1)
            compare(whole, parallel.sampling_copy(partial(make_cut, name, ranks), policy, ranks))
            # In bfloat16 one rank computes what several do, to the last bit.
            tree = rollout.Tree(PROMPTS, [[[4, 5, 6]]] * len(PROMPTS))
            policies = (parallel.shard(partial(make, name), some, bf16=True, source=folder) for some in (alone, ranks))
            one, all_of_them = (policy(tree)[0] for policy in policies)
            assert torch.equal(one, all_of_them) and not torch.allclose(one, whole(tree)[0], atol=1e-3)
        print(f"{name}: the same")


if __name__ == "__main__":
    parallel.launch(main)
