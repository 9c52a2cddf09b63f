"""What needs a CUDA GPU: the unfused attention there, bf16 sampling, and a whole run. Skipped, and saying so, elsewhere."""

import json
import shutil
import sys

import pytest
import torch
from conftest import NOTES, make_model

import rollout
import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PROMPTS = [[7, 8, 9, 20, 21, 22], [7, 8, 9, 23], [7, 8, 9, 24, 25]]


def test_tree_on_cuda_equals_tree_on_cpu():
    """The GPU takes the plain concatenated softmax, the CPU the fused kernels: same log-probabilities and gradients."""
    answers = [[[30, 31], [32]], [[33], [34, 35, 2]], [[36, 2], [37, 38]]]
    results = []
    for device in ("cpu", "cuda"):
        model = make_model("qwen3").to(device)
        tree = rollout.Tree(PROMPTS, answers, device)
        hidden = rollout.answer_hidden(model, tree)
        logprobs_A, _ = rollout.token_logprobs(hidden, model.lm_head, tree.targets_A)
        logprobs_A.sum().backward()
        results.append([logprobs_A.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_bf16_samples_are_scored_alike():
    """bfloat16 sampling on the GPU against float32 scoring there."""
    half = make_model("qwen3", initializer_range=0.08).to("cuda", torch.bfloat16)
    out = rollout.sample(half, PROMPTS, group_size=4, max_new_tokens=9, eos_id=2)
    model, tree = make_model("qwen3", initializer_range=0.08).to("cuda"), rollout.Tree(PROMPTS, out.answers(), "cuda")
    scored_A, _ = rollout.token_logprobs(rollout.answer_hidden(model, tree), model.lm_head, tree.targets_A)
    assert float((scored_A - tree.pack(out.logprobs_NT[:, : int(out.lengths_N.max())])).abs().max()) < 0.15


def test_a_run_on_cuda(tmp_path, monkeypatch):
    """SFT and RL with bf16 compute over float32 master weights, and a bf16 export."""
    shutil.copytree(NOTES, tmp_path / "task")
    flags = ["--sft_steps=20", "--rl_steps=3", "--eval_every=0"]
    monkeypatch.setattr(sys, "argv", ["train.py", f"--task={tmp_path / 'task'}", f"--out={tmp_path / 'run'}", *flags])
    train.main()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[19]["loss"] < records[0]["loss"]
    assert all(abs(r["is_weight"] - 1) < 0.1 for r in records if r["stage"] == "rl")
