"""CUDA's part on a CPU: torch's flash kernels for packed sequences by their contract, one sequence at a time, and a graph
that records a step's operations and runs them again on the same tensors. `install` puts them in place."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rollout


def sequences(q, k, cu_q, cu_k, max_q, max_k, used, causal):
    """Slices of queries and keys of each sequence, after the checks that the kernels make, or leave to the caller."""
    assert q.is_contiguous() or q.stride(-1) == 1
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    assert cu_q[0] == cu_k[0] == 0 and cu_q[-1] == len(q) and cu_k[-1] <= len(k)
    assert (cu_q.diff() >= 0).all() and (cu_k.diff() >= 0).all() and cu_q.diff().max() <= max_q
    assert max_q > 1 or (cu_q.diff() == 1).all()  # then query heads that share keys are computed as one sequence
    lengths = cu_k.diff() if used is None else used
    assert lengths.dtype == torch.int32 and (lengths <= cu_k.diff()).all() and lengths.max() <= max_k
    for start, end, key, length in zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), lengths.tolist(), strict=False):
        assert not causal or end - start == length
        yield slice(start, end), slice(key, key + length)


def scores_of(q, k, causal, scale):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("ihd,jhd->hij", q.float(), k.float()) * scale
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, float("-inf")) if causal else scores


@torch.library.custom_op("standin::forward", mutates_args=())
def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int,
    causal: bool, scale: float, used: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output [S, H, D] and log-sum-exp [H, S]."""
    out, lse = torch.full_like(q, float("nan")), q.new_full((q.shape[1], len(q)), float("nan"), dtype=torch.float32)
    for rows, columns in sequences(q, k, cu_q, cu_k, max_q, max_k, used, causal):
        scores = scores_of(q[rows], k[columns], causal, scale)
        values = v[columns].repeat_interleave(q.shape[1] // k.shape[1], 1)
        lse[:, rows] = torch.logsumexp(scores, -1)
        out[rows] = torch.einsum("hij,jhd->ihd", torch.softmax(scores, -1), values.float()).to(q.dtype)
    return out, lse


def flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, seqused_k):
    """As torch.ops.aten._flash_attention_forward."""
    assert not dropout and not debug
    return *forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, seqused_k), None, None, None


def flash_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng_state, unused, *, scale):
    """As torch.ops.aten._flash_attention_backward."""
    assert lse.shape == (q.shape[1], len(q)) and lse.is_contiguous() and lse.dtype == torch.float32 and not dropout
    assert grad.dtype == q.dtype == out.dtype and rng_state.dtype == torch.uint64 and rng_state.shape == (2,)
    dtype, (grad, q, k, v, out) = q.dtype, (x.float() for x in (grad, q, k, v, out))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for rows, columns in sequences(q, k, cu_q, cu_k, max_q, max_k, None, causal):
        E = q.shape[1] // k.shape[1]
        probs = (scores_of(q[rows], k[columns], causal, scale) - lse[:, rows, None]).exp()
        of_probs = torch.einsum("ihd,jhd->hij", grad[rows], v[columns].repeat_interleave(E, 1))
        delta = (grad[rows] * out[rows]).sum(-1).T
        of_scores = probs * (of_probs - delta[..., None]) * scale
        dq[rows] = torch.einsum("hij,jhd->ihd", of_scores, k[columns].repeat_interleave(E, 1))
        dk[columns] = torch.einsum("hij,ihd->jhd", of_scores, q[rows]).unflatten(1, (-1, E)).sum(2)
        dv[columns] = torch.einsum("hij,ihd->jhd", probs, grad[rows]).unflatten(1, (-1, E)).sum(2)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


class Graph(TorchDispatchMode):
    """Records operations while active; `replay` runs each again on the same tensors, results into the same places."""

    made = 0

    def __init__(self):
        super().__init__()
        Graph.made += 1
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def capture(graph):
    """As torch.cuda.graph."""
    with graph:
        yield


def install(monkeypatch):
    """From here on rollout.py takes the path of CUDA."""
    monkeypatch.setattr(rollout, "on_cuda", lambda x: True)
    monkeypatch.setattr(rollout, "_cuda_flash", flash)
    monkeypatch.setattr(rollout, "_cuda_flash_backward", flash_backward)
    monkeypatch.setattr(rollout, "SMALLEST_GRAPH", 1)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
