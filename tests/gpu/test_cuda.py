"""What needs a CUDA GPU: attention there, CUDA graphs, bf16 sampling, a whole run. Skipped, and saying so, elsewhere."""

import gc
import json
import sys

import pytest
import torch
from conftest import NOTES, make_model

import rollout
import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PROMPTS = [[7, 8, 9, 20, 21, 22], [7, 8, 9, 23], [7, 8, 9, 24, 25]]


def test_tree_on_cuda_equals_tree_on_cpu(monkeypatch):
    """The GPU takes FlexAttention, or stored scores, the CPU the fused kernels: same log-probabilities and gradients."""
    answers = [[[30, 31], [32]], [[33], [34, 35, 2]], [[36, 2], [37, 38]]]
    results = []
    for device, flex in (("cpu", set()), ("cuda", set()), ("cuda", {"cuda"})):
        monkeypatch.setattr(rollout, "FLEX", flex)
        model = make_model("qwen3", head_dim=16).to(device)
        logprobs_A, _ = rollout.Policy(model)(rollout.Tree(PROMPTS, answers, device))
        logprobs_A.sum().backward()
        results.append([logprobs_A.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-3, rtol=1e-3)


def test_a_tree_without_prompts_on_cuda():
    """FlexAttention over the one token of a rank without work: a missing gradient or a NaN would reach every rank."""
    model = make_model("qwen3", head_dim=16).to("cuda")
    rollout.Policy(model)(rollout.Tree([], [], "cuda"))[0].sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@pytest.mark.parametrize("cache_tokens", [120, 2**17])
def test_cuda_graphs_give_the_same_tokens(cache_tokens):
    """The captured step, padded with idle rows, against the eager one; with refills, growing widths and shrinking batches."""
    model = make_model("qwen3").to("cuda")
    settings = {"group_size": 3, "max_new_tokens": 40, "eos_id": 2, "cache_tokens": cache_tokens * 2, "label_ids": [3, 60, 2]}
    graphs, eager = (rollout.sample(model, PROMPTS * 2, seed=5, cuda_graphs=on, **settings) for on in (True, False))
    assert graphs.answers == eager.answers and torch.equal(graphs.ended_N, eager.ended_N)
    torch.testing.assert_close((graphs.logprobs_A, graphs.label_logits_AY), (eager.logprobs_A, eager.label_logits_AY))


def test_memory_is_returned_after_a_call():
    """Captured graphs and their cache go when the call ends."""
    model = make_model("qwen3").to("cuda")
    held = []
    for _ in range(3):
        rollout.sample(model, PROMPTS, group_size=4, max_new_tokens=40, eos_id=2)
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[1]


def test_bf16_samples_are_scored_alike():
    """bfloat16 sampling on the GPU against float32 scoring there."""
    half = make_model("qwen3", initializer_range=0.08, head_dim=16).to("cuda", torch.bfloat16)
    out = rollout.sample(half, PROMPTS, group_size=4, max_new_tokens=9, eos_id=2)
    model = make_model("qwen3", initializer_range=0.08, head_dim=16).to("cuda")
    scored_A, _ = rollout.Policy(model)(rollout.Tree(PROMPTS, out.answers, "cuda"))
    assert (scored_A - out.logprobs_A).abs().max() < 0.15


def test_a_run_on_cuda(tmp_path, monkeypatch):
    """SFT and RL with bf16 compute over float32 master weights, and a bf16 export."""
    flags = [f"--task={NOTES}", f"--out={tmp_path / 'run'}", "--sft_steps=20", "--rl_steps=3", "--eval_every=0"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 23 and records[19]["loss"] < records[0]["loss"]
    assert all(abs(r["is_weight"] - 1) < 0.1 for r in records[20:])
