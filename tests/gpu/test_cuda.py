"""What needs a CUDA GPU: its flash kernels against their stand-in, CUDA graphs, bf16 sampling, a whole run. Skipped, and
saying so, elsewhere."""

import gc
import json
import sys

import cuda_standin
import numpy as np
import pytest
import torch
from conftest import NOTES, make_model

import rollout
import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PROMPTS = [[7, 8, 9, 20, 21, 22], [7, 8, 9, 23], [7, 8, 9, 24, 25]]


def long_batch(prefix=700):
    """Prompts and answers of hundreds of tokens, so that kernels run over several blocks; one answer has one token."""
    draw = np.random.default_rng(0)
    tokens = lambda n: draw.integers(3, 60, n).tolist()
    common = tokens(prefix)
    prompts = [common + tokens(n) for n in (200, 1, 331)]
    return prompts, [[tokens(140), tokens(1)], [tokens(1)], [tokens(129), tokens(300), tokens(64)]]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_kernels_keep_the_stand_ins_contract(monkeypatch, heads, size):
    """Outputs and gradients of the packed tree through torch's kernels and through what the CPU's tests put in their place."""
    (H, K), tree = heads, rollout.Tree(*long_batch(), "cuda")
    S = tree.input_ids.shape[1]
    torch.manual_seed(0)
    leaves = [torch.randn(S, n, size, device="cuda").bfloat16().requires_grad_() for n in (H, K, K)]
    weights = torch.randn(S, H, size, device="cuda").bfloat16()
    results = []
    for standin in (False, True):
        if standin:
            monkeypatch.setattr(rollout, "_cuda_flash", cuda_standin.flash)
            monkeypatch.setattr(rollout, "_cuda_flash_backward", cuda_standin.flash_backward)
        out = tree.attend(0, *leaves, size**-0.5)
        results.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 0.02 * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tree_on_cuda_equals_tree_on_cpu(dtype):
    """In bfloat16 the GPU's flash kernels, in float32 the formula: log-probabilities and gradients of the CPU's kernel."""
    prompts, answers = long_batch()
    settings = {"head_dim": 16, "max_position_embeddings": 2048, "initializer_range": 0.1}
    results = []
    for device in ("cpu", "cuda"):
        model = make_model("qwen3", **settings).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and dtype == torch.bfloat16):
            logprobs_A, _ = rollout.Policy(model)(rollout.Tree(prompts, answers, device))
        logprobs_A.sum().backward()
        results.append([logprobs_A.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    bound = 1e-3 if dtype == torch.float32 else 0.05
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < bound * a.norm()


def test_one_query_among_two_prompts():
    """A batch in which one answer alone has a token to feed: FlashAttention reads a bound of 1 as "one each"."""
    results = []
    for device in ("cpu", "cuda"):
        model = make_model("qwen3", head_dim=16).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logprobs_A, _ = rollout.Policy(model)(rollout.Tree(PROMPTS[:2], [[[11, 12]], [[13]]], device))
        results.append(logprobs_A.detach().cpu())
    assert (results[0] - results[1]).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tree_without_prompts_on_cuda(dtype):
    """The one token of a rank without work: a missing gradient or a NaN would reach every rank."""
    model = make_model("qwen3", head_dim=16).to("cuda", dtype)
    rollout.Policy(model)(rollout.Tree([], [], "cuda"))[0].sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


@pytest.mark.parametrize("cache_tokens", [240, 2**17])
def test_cuda_graphs_give_the_same_tokens(monkeypatch, cache_tokens):
    """Captured steps against eager ones of the same shapes; with refills, idle rows and shrinking batches."""
    monkeypatch.setattr(rollout, "SMALLEST_GRAPH", 1)
    model = make_model("qwen3", head_dim=16).to("cuda", torch.bfloat16)
    settings = {"group_size": 3, "max_new_tokens": 40, "eos_id": 2, "cache_tokens": cache_tokens, "label_ids": [3, 60, 2]}
    graphs, eager = (rollout.sample(model, PROMPTS * 2, seed=5, cuda_graphs=on, **settings) for on in (True, False))
    assert graphs.answers == eager.answers and torch.equal(graphs.ended_N, eager.ended_N)
    torch.testing.assert_close((graphs.logprobs_A, graphs.label_logits_AY), (eager.logprobs_A, eager.label_logits_AY))


def test_float32_samples_equal_those_of_the_cpu():
    """The formula's answers on the GPU are the CPU kernel's."""
    settings = {"group_size": 3, "max_new_tokens": 20, "eos_id": 2, "seed": 5}
    answers = [rollout.sample(make_model("qwen3").to(device), PROMPTS, **settings).answers for device in ("cpu", "cuda")]
    assert answers[0] == answers[1]


def test_memory_is_returned_after_a_call():
    """Captured graphs and their cache go when the call ends."""
    model = make_model("qwen3", head_dim=16).to("cuda", torch.bfloat16)
    held = []
    for _ in range(3):
        rollout.sample(model, PROMPTS, group_size=4, max_new_tokens=40, eos_id=2)
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[2] <= held[1]


def test_bf16_samples_are_scored_alike():
    """bfloat16 sampling on the GPU against float32 scoring there, after prompts of hundreds of tokens."""
    settings = {"initializer_range": 0.08, "head_dim": 16, "max_position_embeddings": 2048}
    half = make_model("qwen3", **settings).to("cuda", torch.bfloat16)
    prompts, _ = long_batch()
    out = rollout.sample(half, prompts, group_size=4, max_new_tokens=40, eos_id=2)
    model = make_model("qwen3", **settings).to("cuda")
    scored_A, _ = rollout.Policy(model)(rollout.Tree(prompts, out.answers, "cuda"))
    assert (scored_A - out.logprobs_A).abs().max() < 0.15


def test_a_run_on_cuda(tmp_path, monkeypatch):
    """SFT and RL with bf16 compute over float32 master weights, and a bf16 export."""
    flags = [f"--task={NOTES}", f"--out={tmp_path / 'run'}", "--sft_steps=20", "--rl_steps=3", "--eval_every=0"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 23 and records[19]["loss"] < records[0]["loss"]
    assert all(abs(r["is_weight"] - 1) < 0.1 for r in records[20:])
