"""What needs a CUDA GPU: its flash kernels against their stand-in, CUDA graphs, bfloat16 there beside float32 on the CPU, a
whole run. Skipped, and saying so, elsewhere."""

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


def test_tree_on_cuda_equals_tree_on_cpu():
    """Log-probabilities and gradients in bfloat16 through CUDA's kernels, and in float32 through the CPU's."""
    prompts, answers = long_batch()
    settings = {"head_dim": 16, "max_position_embeddings": 2048, "initializer_range": 0.1}
    results = []
    for device in ("cpu", "cuda"):
        model = make_model("qwen3", **settings).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logprobs_A, _ = rollout.Policy(model)(rollout.Tree(prompts, answers, device))
        logprobs_A.sum().backward()
        results.append([logprobs_A.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 0.05 * a.norm()


def test_one_query_among_two_prompts():
    """A batch in which one answer alone has a token to feed: FlashAttention reads a bound of 1 as "one each"."""
    results = []
    for device in ("cpu", "cuda"):
        model = make_model("qwen3", head_dim=16).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logprobs_A, _ = rollout.Policy(model)(rollout.Tree(PROMPTS[:2], [[[11, 12]], [[13]]], device))
        results.append(logprobs_A.detach().cpu())
    assert (results[0] - results[1]).abs().max() < 0.05


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16])
def test_a_tree_without_prompts_on_cuda(master):
    """The one token of a rank without work: a missing gradient or a NaN would reach every rank."""
    model = make_model("qwen3", head_dim=16).to("cuda", master)
    with torch.autocast("cuda", torch.bfloat16, enabled=master == torch.float32):
        rollout.Policy(model)(rollout.Tree([], [], "cuda"))[0].sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_float32_is_refused_by_name():
    """The kernels' own message in the middle of a run, which names no way out."""
    model = make_model("qwen3", head_dim=16).to("cuda")
    for run in (
        lambda: rollout.sample(model, PROMPTS, max_new_tokens=4, eos_id=2),
        lambda: rollout.Policy(model)(rollout.Tree(PROMPTS, [[[3, 4]]] * 3, "cuda")),
    ):
        with pytest.raises(rollout.UnsupportedModelError, match=r"not torch\.float32 and 16; use --bf16 1"):
            run()


def eager_step(decode, model, ids_A):
    """Decode.step without a graph."""
    decode.input_ids.copy_(ids_A[None])
    decode.position_ids += 1
    decode.answer_keys.grow()
    return rollout.forward(model, decode)


@pytest.mark.parametrize("cache_tokens", [280, 2**17])
@pytest.mark.parametrize("smallest", [1, 32])
def test_cuda_graphs_give_the_same_tokens(monkeypatch, smallest, cache_tokens):
    """Captured steps against eager ones of the same shapes, in a small cache part after part; at most one graph is captured
    for each halving of the running answers."""
    made, graph = [], torch.cuda.CUDAGraph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(graph()) or made[-1])
    monkeypatch.setattr(rollout, "SMALLEST_GRAPH", smallest)
    model = make_model("qwen3", head_dim=16).to("cuda", torch.bfloat16)
    settings = {"group_size": 6, "max_new_tokens": 40, "eos_id": 2, "seed": 5, "label_ids": [3, 60, 2]}
    graphs = rollout.sample(model, PROMPTS * 2, cache_tokens=cache_tokens, **settings)
    at_once = min(6, rollout.prompts_at_once(PROMPTS * 2, 6, 40, cache_tokens))
    parts, answers = 6 // at_once, 6 * at_once
    assert parts <= len(made) <= parts * (answers.bit_length() if smallest == 1 else 1 + (answers > 32))
    monkeypatch.setattr(rollout.Decode, "step", eager_step)
    eager = rollout.sample(model, PROMPTS * 2, cache_tokens=cache_tokens, **settings)
    assert graphs.answers == eager.answers and torch.equal(graphs.ended_N, eager.ended_N)
    torch.testing.assert_close((graphs.logprobs_A, graphs.label_logits_AY), (eager.logprobs_A, eager.label_logits_AY))


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
    """bfloat16 sampling on the GPU, after prompts of hundreds of tokens: its trainer, and float32 on the CPU, say the same."""
    settings = {"initializer_range": 0.08, "head_dim": 16, "max_position_embeddings": 2048}
    half = make_model("qwen3", **settings).to("cuda", torch.bfloat16)
    prompts, _ = long_batch()
    out = rollout.sample(half, prompts, group_size=4, max_new_tokens=40, eos_id=2)
    for device in ("cpu", "cuda"):
        model = make_model("qwen3", **settings).to(device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            scored_A, _ = rollout.Policy(model)(rollout.Tree(prompts, out.answers, device))
        assert (scored_A.cpu() - out.logprobs_A.cpu()).abs().max() < 0.15


def test_a_model_agrees_with_itself_on_cuda():
    """check_model in bfloat16, which `grm.py score` runs there: graphs and kernels against eager attention."""
    for kind, changes in {"qwen3": {}, "granite": {"logits_scaling": 8.0}}.items():
        model = make_model(kind, head_dim=16, **changes).to("cuda", torch.bfloat16)
        assert rollout.check_model(model, 64) < 0.05 and model.config._attn_implementation == "tree"


def test_compiled_is_as_exact_as_eager(monkeypatch):
    """Fused kernels: gradients as near to those of float32 on the CPU as without them."""
    settings = {"head_dim": 16, "max_position_embeddings": 2048, "initializer_range": 0.1}
    prompts, answers = long_batch()
    gradients = []
    for device, compiled in (("cpu", False), ("cuda", False), ("cuda", True)):
        monkeypatch.setattr(rollout, "COMPILE", compiled)
        model = make_model("qwen3", **settings).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logprobs_A, _ = rollout.Policy(model)(rollout.Tree(prompts, answers, device))
        logprobs_A.sum().backward()
        assert any(m._compiled_call_impl for m in model.modules()) == compiled
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters()]))
    exact, eager, fused = gradients
    assert (fused - exact).norm() < 1.5 * (eager - exact).norm()


def test_a_run_on_cuda(tmp_path, monkeypatch):
    """SFT and RL with bf16 compute over float32 master weights, and a bf16 export."""
    flags = [f"--task={NOTES}", f"--out={tmp_path / 'run'}", "--sft_steps=20", "--rl_steps=3", "--eval_every=0"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 23 and records[19]["loss"] < records[0]["loss"]
    assert all(abs(r["is_weight"] - 1) < 0.1 for r in records[20:])
