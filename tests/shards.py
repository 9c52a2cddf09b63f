"""A model that all ranks sample from together against the whole, for several architectures (run by test_parallel.py).

torchrun --nproc-per-node 4 tests/shards.py --out=FOLDER
"""

import copy
import os

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
}
SHARDS = int(os.environ["WORLD_SIZE"])
PROMPTS = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 8], [1, 2, 3, 7]]


def make(name, meta=False, **changes):
    """A policy of an architecture with weights that nobody initialises to 0."""
    config = AutoConfig.for_model(name, **SMALL | ARCHITECTURES.get(name, {}) | changes)
    with torch.device("meta" if meta else "cpu"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if not meta:
            for p in model.parameters():
                p.data += 0.1 * torch.randn_like(p)
    return rollout.Policy(rollout.use_tree_attention(model))


def compare(whole, part):
    """Answers, log-probabilities and label logits of both."""
    settings = {"group_size": 4, "max_new_tokens": 12, "eos_id": 59, "seed": 3, "label_ids": [5, 6]}
    ours, theirs = (rollout.sample(model, PROMPTS, **settings) for model in (part, whole))
    assert ours.answers == theirs.answers
    torch.testing.assert_close(ours.logprobs_A, theirs.logprobs_A, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.label_logits_AY, theirs.label_logits_AY, atol=1e-4, rtol=1e-5)
    local = lambda p: getattr(p, "_local_tensor", p)
    count = lambda model: sum(local(p).numel() for p in model.base_model.layers.parameters())
    assert count(part) < (1 / SHARDS + 0.02) * count(whole)


def refused(ranks, name, **changes):
    """What sampling_copy says of a model that it does not cut."""
    try:
        parallel.sampling_copy(make(name, **changes).model, ranks)
    except parallel.RunError as error:
        return str(error)


def main():
    ranks = parallel.Ranks(sampling_shards=SHARDS)
    alone = copy.copy(ranks)  # each rank as the only one of a run
    alone.world = 1
    alone.mesh = init_device_mesh("cpu", (SHARDS, 1), mesh_dim_names=("runs", "ranks"))["ranks"]
    for name in ARCHITECTURES:
        whole = make(name)
        with torch.no_grad():
            policy = parallel.shard(make(name, meta=ranks.rank > 0), ranks)
            part = parallel.sampling_copy(policy.model, ranks)
            compare(whole.model, part)
            for p, sharded in zip(whole.parameters(), policy.parameters(), strict=True):
                p.mul_(1.1)
                sharded.mul_(1.1)
            parallel.copy_weights(part, policy.model)
            compare(whole.model, part)
            saved = parallel.gather_model(policy.model, ranks, torch.float32)
            for key, x in whole.model.state_dict().items():
                assert ranks.rank or torch.equal(saved.state_dict()[key], x), key
            # In bfloat16 one rank computes what several do, to the last bit.
            tree = rollout.Tree(PROMPTS, [[[4, 5, 6]]] * len(PROMPTS))
            one, all_of_them = (parallel.shard(make(name), some, bf16=True)(tree)[0] for some in (alone, ranks))
            assert torch.equal(one, all_of_them) and not torch.allclose(one, make(name)(tree)[0], atol=1e-3)
        print(f"{name}: the same")
    assert "gemma with 4" in refused(ranks, "gemma")
    assert "qwen3 with 1" in refused(ranks, "qwen3", num_key_value_heads=1)


if __name__ == "__main__":
    parallel.launch(main)
