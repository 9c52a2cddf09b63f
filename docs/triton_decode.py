"""Faster decoding on CUDA: a Triton kernel for each answer's own keys, in the place of torch's.

In a decoding step every answer has one query and some tens of keys of its own. torch's flash kernel
computes a tile of many queries for it; this one reads keys and values once and does little else. On
an H200, 512 answers of 64 tokens, 8 key-value heads of 128: 37 us a layer instead of 111. It is not
in rollout.py, whose reader would have to know Triton; to use it:

    import triton_decode

    triton_decode.install()     # before sampling; rollout.sample then calls it

TRITON_INTERPRET=1 python docs/triton_decode.py compares it with torch's formula, also on a CPU.
Shapes: A answers, W width of a slot, H heads, K key-value heads, D head size.
"""

import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout

TILE = 64  # keys at a time


@triton.jit
def own_kernel(
    q, k, v, out, lse, used, scale, slot, column,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One answer and key-value head: softmax over its used columns, online, in tiles."""
    answer, head = tl.program_id(0), tl.program_id(1)
    m, d, n = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, TILE)
    row = (answer * tl.num_programs(1) + head) * GROUP + m
    queries = tl.load(q + row[:, None] * D + d[None, :], mask=m[:, None] < GROUP, other=0.0)
    count = tl.load(used + answer)
    first = answer.to(tl.int64) * slot + head * D
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, count, TILE):
        is_key = start + n < count
        at = first + (start + n)[:, None] * column + d[None, :]
        keys = tl.load(k + at, mask=is_key[:, None], other=0.0)
        scores = tl.dot(queries, tl.trans(keys)) * scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp(top - new_top)
        weights = tl.exp(scores - new_top[:, None])
        values = tl.load(v + at, mask=is_key[:, None], other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
        total = total * shrink + tl.sum(weights, 1)
        top = new_top
    mixed = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * D + d[None, :], mixed, mask=m[:, None] < GROUP)
    tl.store(lse + row, top + tl.log(total), mask=m < GROUP)


def own_attention(q_AHD, k_AWKD, v_AWKD, used_A, scale):
    """Output [A, H, D] and log-sum-exp [A, H] of each answer's query over its used columns."""
    q_AHD = q_AHD.contiguous()
    A, H, D = q_AHD.shape
    K = k_AWKD.shape[2]
    out_AHD = torch.empty_like(q_AHD)
    lse_AH = torch.empty(A, H, device=q_AHD.device)
    tensors = (q_AHD, k_AWKD, v_AWKD, out_AHD, lse_AH, used_A)
    sizes = {"GROUP": H // K, "D": D, "ROWS": max(16, triton.next_power_of_2(H // K)), "TILE": TILE}
    own_kernel[(A, K)](*tensors, scale, k_AWKD.stride(0), k_AWKD.stride(1), **sizes, num_warps=4)
    return out_AHD, lse_AH


torch_flash = rollout.flash


def flash(q_SHD, k, v, segment, scale):
    """rollout.flash, with the kernel above where each query has a slot of its own."""
    is_own = segment.keys.used is not None and segment.queries.longest == 1
    D = q_SHD.shape[-1]
    if is_own and rollout.on_cuda(q_SHD) and D >= 16 and triton.next_power_of_2(D) == D:
        return own_attention(q_SHD, k, v, segment.keys.used, scale)
    return torch_flash(q_SHD, k, v, segment, scale)


def install():
    """Put the kernel into rollout.py, for head sizes that are powers of two."""
    rollout.flash = flash


def main():
    """Compare with the formula in float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for A, W, H, K, D in ((6, 80, 8, 4, 32), (3, 200, 16, 8, 128), (2, 16, 6, 1, 16)):
        shapes = ((A, H, D), (A, W, K, D), (A, W, K, D))
        q, k, v = (torch.randn(shape, device=device).half() for shape in shapes)
        used = torch.randint(1, W + 1, (A,), dtype=torch.int32, device=device)
        out, lse = own_attention(q, k, v, used, D**-0.5)
        for a, n in enumerate(used.tolist()):
            keys, values = (x[a, :n].double().repeat_interleave(H // K, 1) for x in (k, v))
            scores = torch.einsum("hd,nhd->hn", q[a].double(), keys) * D**-0.5
            expected = torch.einsum("hn,nhd->hd", scores.softmax(-1), values)
            apart = (expected - out[a]).abs().max().item()
            lse_apart = (scores.logsumexp(-1) - lse[a]).abs().max().item()
            print(f"{n:4} of {W} keys, {H} heads: {apart:.1e}, log-sum-exp {lse_apart:.1e}")
            assert apart < 5e-3 and lse_apart < 5e-3


if __name__ == "__main__":
    main()
