"""Running the model so that every shared prefix is computed once.             (how is it run fast?)

Relevance prompts share a long criteria text, and the G answers of a group share their whole prompt.
A batch is a tree:

    common prefix  ->  P prompts  ->  N answers

Sampling prefills the prefix and each prompt once and decodes all answers against the cached keys;
training packs the tree into one row of tokens without padding. In both, a query's keys lie in up
to three segments (prefix, prompt, own), and `attend` is all there is to attention: for each segment
one fused kernel gives an output and a log-sum-exp, by which the outputs are merged. transformers'
AttentionInterface knows it as "tree"; decoder-only Hugging Face models run unchanged.

    use_tree_attention(model)                     # once; refuses models that it cannot run
    sampled = sample(model, prompts, group_size=8, max_new_tokens=64, eos_id=2, seed=0, step=7)
    tree = Tree(prompts, sampled.answers, device)  # the same answers, packed for training
    logprobs_A, entropy_A = Policy(model)(tree, temperature=1.0)   # of every answer token

This file needs torch, numpy and transformers only; copy it alone.

Shapes: P prompts, G answers a prompt, N = P * G answers, T answer positions, S packed tokens,
A answer tokens (in decoding: running sequences), Y labels, H attention heads, K key-value heads,
n sequences of at most L queries and C keys, W width of a cache slot, D head size (for hidden
states: model width), V vocabulary.
"""

import os
import runpy
import sys
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.attention
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Attention: one kernel a segment, merged by log-sum-exp -------------------------------------------


class Sequences:
    """Where n sequences lie in one tensor: packed behind each other, or each in a slot of a cache.

    lengths: ints. order: the rows of the packed tensor [S, ...], sequence by sequence; without it
    they stand there in this order. width: of the slots of a cache [n, W, ...]. most: a bound of the
    lengths, where a CUDA graph is to hold for others too.
    cu: int32 [n + 1], where each begins, as the fused CUDA kernels take it. used: int32 [n], the
    lengths of sequences in slots.
    """

    def __init__(self, lengths, device, *, order=None, width=None, most=None):
        self.lengths = lengths
        self.longest = max(lengths)
        self.is_even = min(lengths) == self.longest
        # The CUDA kernels take a bound of 1 to mean just one query in each sequence.
        self.most = max(most or width or self.longest, 1 if self.is_even else 2)
        self.width = width
        self.order = self.used = None
        self.in_order = order is None or order == sorted(order)
        if order is not None:
            self.order = torch.tensor(order, device=device)
        if width is None:
            starts = [0, *accumulate(lengths)]
            self.cu = torch.tensor(starts, dtype=torch.int32, device=device)
        else:
            self.used = torch.tensor(lengths, dtype=torch.int32, device=device)
            self.cu = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device) * width

    @cached_property
    def cells_S(self):
        """Of each packed row, its cell in the padded table of n * longest; None for a mere view."""
        if self.is_even and self.in_order:
            return None
        starts = range(0, len(self.lengths) * self.longest, self.longest)
        cells = [range(start, start + n) for start, n in zip(starts, self.lengths, strict=True)]
        cells_S = torch.tensor([*chain(*cells)], device=self.cu.device)
        if self.order is None:
            return cells_S
        return torch.empty_like(cells_S).index_copy_(0, self.order, cells_S)

    @cached_property
    def mask(self):
        """Additive [n, 1, 1, longest], float32, -inf behind each sequence's end; None if even."""
        if self.is_even:
            return None
        lengths_n1 = torch.tensor(self.lengths, device=self.cu.device)[:, None]
        is_behind = torch.arange(self.longest, device=self.cu.device) >= lengths_n1
        mask = torch.zeros(is_behind.shape, device=self.cu.device)
        return mask.masked_fill_(is_behind, float("-inf"))[:, None, None]

    def pad(self, x):
        """[n, longest, ...] of packed rows [S, ...], zeros behind each; or of slots [n, W, ...]."""
        if self.width is not None:
            return x[: len(self.lengths), : self.longest]
        shape = (len(self.lengths), self.longest, *x.shape[1:])
        if self.cells_S is None:
            return x.reshape(shape)
        return x.new_zeros(shape).flatten(0, 1).index_copy(0, self.cells_S, x).view(shape)

    def unpad(self, x):
        """Packed rows [S, ...] of [n, longest, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.cells_S is None else flat.index_select(0, self.cells_S)


@dataclass
class Segment:
    """Which queries see which keys, for one kernel: query sequence i sees key sequence i.

    rows, columns: slices of the packed queries and keys; all, where not given. causal: a token sees
    its own sequence up to itself; else every query sees all keys of its sequence. own: the
    first segment of its rows, with which the merge begins.
    """

    queries: Sequences
    keys: Sequences
    rows: object = ...
    columns: object = ...
    causal: bool = False
    own: bool = False


def attend(q_SHD, parts, scale):
    """Attention of packed queries over segments of keys, with one softmax over all of them.

    parts: triples (segment, keys, values); keys and values are packed, [C, K, D], or in the slots
    of a cache, [n, W, K, D]. Every row's own segment comes before its others.
    Returns the output [S, H, D] and the log-sum-exp [S, H] of the scores, both in float32.
    """
    out_SHD = torch.empty(q_SHD.shape, device=q_SHD.device)
    lse_SH = torch.empty(q_SHD.shape[:2], device=q_SHD.device)
    for segment, k, v in parts:
        rows = segment.rows
        part, part_lse = flash(q_SHD[rows], k, v, segment, scale)
        if segment.own:
            out_SHD[rows] = part
            lse_SH[rows] = part_lse
        else:
            # exp(log-sum-exp) is a segment's weight in the softmax over both.
            share = torch.sigmoid(part_lse - lse_SH[rows])
            out_SHD[rows].lerp_(part.float(), share[..., None])
            lse_SH[rows] = torch.logaddexp(lse_SH[rows], part_lse)
    return out_SHD, lse_SH


class PackedAttention(torch.autograd.Function):
    """`attend` with exact gradients, where queries and keys are the same packed tokens.

    With the log-sum-exp over all segments, a segment's part of the probabilities is
    exp(score - lse). So its kernel's own backward, given the merged output and log-sum-exp, returns
    exactly this segment's gradients (as in ring attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx, q_SHD, k_SKD, v_SKD, segments, scale):
        """Output [S, H, D] in q's dtype."""
        parts = [(s, k_SKD[s.columns], v_SKD[s.columns]) for s in segments]
        out_SHD, lse_SH = attend(q_SHD, parts, scale)
        out_SHD = out_SHD.to(q_SHD.dtype)
        ctx.save_for_backward(q_SHD, k_SKD, v_SKD, out_SHD, lse_SH)
        ctx.segments = segments
        ctx.scale = scale
        return out_SHD

    @staticmethod
    def backward(ctx, grad_SHD):
        """Gradients of queries, keys and values, summed over the segments in float32."""
        q, k, v, out, lse = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.zeros(x.shape, device=x.device) for x in (q, k, v))
        for segment in ctx.segments:
            rows = segment.rows
            columns = segment.columns
            of_queries = (grad_SHD[rows], q[rows], out[rows], lse[rows])
            of_keys = (k[columns], v[columns])
            dq, dk, dv = flash_backward(*of_queries, *of_keys, segment, ctx.scale)
            grad_q[rows] += dq
            grad_k[columns] += dk
            grad_v[columns] += dv
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


# The fused kernels that torch brings. FLASH_ATTENTION=FA4 (or FA3) in the environment puts the CUDA
# kernels of an installed flash-attn package in their place.
if implementation := os.environ.get("FLASH_ATTENTION"):
    torch.nn.attention.activate_flash_attention_impl(implementation)
_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda_flash = torch.ops.aten._flash_attention_forward
_cuda_flash_backward = torch.ops.aten._flash_attention_backward


def on_cuda_kernels(x):
    """Whether the CUDA kernels, which take packed sequences, run on queries like these."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and half and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256


def flash(q_SHD, k, v, segment, scale):
    """One segment's output [S, H, D] and log-sum-exp [S, H], by one call of a fused kernel."""
    queries = segment.queries
    keys = segment.keys
    if on_cuda_kernels(q_SHD):
        if keys.used is not None:
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        sizes = (queries.cu, keys.cu, queries.most, keys.most)
        options = {"scale": scale, "seqused_k": keys.used}
        q = q_SHD if queries.order is None else q_SHD[queries.order]
        out, lse, *_ = _cuda_flash(q, k, v, *sizes, 0.0, segment.causal, False, **options)
        if queries.order is None:
            return out, lse.T
        of_rows = (out, lse.T.contiguous())
        return [torch.empty_like(x).index_copy_(0, queries.order, x) for x in of_rows]
    q, k, v = (x.transpose(1, 2) for x in (queries.pad(q_SHD), keys.pad(k), keys.pad(v)))
    kernel = _cpu_flash if q.device.type == "cpu" else formula
    mask = None if segment.causal else keys.mask
    out, lse = kernel(q, k, v, 0.0, segment.causal, attn_mask=mask, scale=scale)
    return queries.unpad(out.transpose(1, 2)), queries.unpad(lse.transpose(1, 2))


def flash_backward(grad_SHD, q_SHD, out_SHD, lse_SH, k_CKD, v_CKD, segment, scale):
    """One segment's gradients of queries, keys and values, from the output and log-sum-exp of all
    segments together.
    """
    queries = segment.queries
    keys = segment.keys
    if on_cuda_kernels(q_SHD):
        tensors = (grad_SHD, q_SHD, k_CKD, v_CKD, out_SHD, lse_SH.T.contiguous())
        sizes = (queries.cu, keys.cu, queries.most, keys.most)
        # The state of dropout's random generator, which nothing uses.
        state = (torch.zeros(2, dtype=torch.uint64, device=q_SHD.device), q_SHD.new_empty(0))
        return _cuda_flash_backward(*tensors, *sizes, 0.0, segment.causal, *state, scale=scale)
    grad, q, out, lse = (queries.pad(x).transpose(1, 2) for x in (grad_SHD, q_SHD, out_SHD, lse_SH))
    k, v = (keys.pad(x).transpose(1, 2) for x in (k_CKD, v_CKD))
    kernel = _cpu_flash_backward if q.device.type == "cpu" else formula_backward
    mask = None if segment.causal else keys.mask
    tensors = (grad, q, k, v, out, lse)
    dq, dk, dv = kernel(*tensors, 0.0, segment.causal, attn_mask=mask, scale=scale)
    dk, dv = (keys.unpad(x.transpose(1, 2)) for x in (dk, dv))
    return queries.unpad(dq.transpose(1, 2)), dk, dv


def formula(q_nHLD, k_nKCD, v_nKCD, dropout_p, is_causal, *, attn_mask, scale):
    """Output and log-sum-exp by the formula, scores stored, in the signature of the fused CPU
    kernel: for dtypes, head sizes and devices that have none.
    """
    scores_nHLC = _scores(q_nHLD, k_nKCD, is_causal, attn_mask, scale)
    lse_nHL = torch.logsumexp(scores_nHLC, -1)
    probs_nHLC = (scores_nHLC - lse_nHL[..., None]).exp().to(v_nKCD.dtype)
    return probs_nHLC @ _for_queries(v_nKCD, q_nHLD), lse_nHL


def formula_backward(grad, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask, scale):
    """The backward of `formula`, in the signature of the fused CPU kernel's."""
    probs = (_scores(q, k, is_causal, attn_mask, scale) - lse[..., None]).exp()
    of_probs = (grad @ _for_queries(v, q).mT).float() - (grad * out).sum(-1, keepdim=True)
    of_scores = (probs * of_probs * scale).to(q.dtype)
    # Query heads that share a key head add up.
    dk = (of_scores.mT @ q).unflatten(1, (k.shape[1], -1)).sum(2)
    dv = (probs.to(q.dtype).mT @ grad).unflatten(1, (k.shape[1], -1)).sum(2)
    return of_scores @ _for_queries(k, q), dk, dv


def _scores(q_nHLD, k_nKCD, is_causal, attn_mask, scale):
    scores_nHLC = (q_nHLD @ _for_queries(k_nKCD, q_nHLD).mT).float() * scale
    if is_causal:
        hidden_LC = torch.ones(scores_nHLC.shape[2:], dtype=torch.bool, device=q_nHLD.device)
        return scores_nHLC.masked_fill(hidden_LC.triu(1), float("-inf"))
    return scores_nHLC if attn_mask is None else scores_nHLC + attn_mask


def _for_queries(x_nKCD, q_nHLD):
    """Keys or values of each query head."""
    return x_nKCD.repeat_interleave(q_nHLD.shape[1] // x_nKCD.shape[1], 1)


def tree_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, tree=None, **kwargs
):
    """What transformers' attention layers call: query [1, H, S, D], key and value [1, K, S, D].

    `tree` is the layout: a Tree, or in sampling a Prefill or a Decode. It travels through the
    model's forward as a keyword argument.
    """
    if tree is None:
        raise ValueError(
            "tree attention needs tree=...: call the model through rollout.sample or rollout.Policy"
        )
    window = kwargs.get("sliding_window")
    is_short = window and window < tree.max_position
    if dropout or is_short or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__}: dropout, soft-capping, sinks and a sliding window "
            "are not supported"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # Under autocast, rotary embeddings leave queries and keys in float32, values in bfloat16.
    q_SHD, k_SKD, v_SKD = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    out_SHD = tree.attend(module.layer_idx, q_SHD, k_SKD, v_SKD, scale)
    return out_SHD.to(value.dtype)[None], None


ALL_ATTENTION_FUNCTIONS.register("tree", tree_attention)


class UnsupportedModelError(ValueError):
    """An architecture whose attention the tree does not compute."""


def use_tree_attention(model):
    """Switch a decoder-only Hugging Face model to tree attention; returns the model.

    Raises UnsupportedModelError, before any work, for architectures whose attention the tree does
    not compute.
    """
    config = model.config
    name = type(model).__name__
    for field in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, field, None):
            raise UnsupportedModelError(
                f"{name}: config.{field} is set; soft-capping is not supported"
            )
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise UnsupportedModelError(
            f"{name}: sliding-window attention is not supported; use a model with full attention"
        )
    if not getattr(model, "_supports_attention_backend", False) or not hasattr(
        model.base_model, "layers"
    ):
        raise UnsupportedModelError(
            f"{name}: its attention cannot be replaced through transformers' AttentionInterface"
        )
    model.set_attn_implementation("tree")
    return model


def common_prefix_length(prompts):
    """Length of the longest common token prefix that leaves every prompt a token of its own."""
    first, last = min(prompts), max(prompts)  # the two that differ earliest in lexicographic order
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _check_prompts(prompts):
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("every prompt needs at least one token; got an empty prompt or no prompts")


# Training: the packed tree ------------------------------------------------------------------------


class Tree:
    """The packed layout of one batch for training: common prefix, all prompts, all answers.

    prompts: P lists of token ids. answers: for each prompt the list of its answers, each a list of
    at least one id. Without any prompt it is a dummy of one token, which runs forward and backward
    with A = 0 answer tokens: for a rank that has no work while others have.

    Attributes: input_ids and position_ids [1, S]; targets_A, the answer tokens answer by answer;
    predict_A, for each the packed position whose hidden state predicts it.
    """

    def __init__(self, prompts, answers, device="cpu"):
        if len(answers) != len(prompts) or not all(g and all(map(len, g)) for g in answers):
            raise ValueError("every prompt needs a list of answers, each with at least one token")
        if prompts:
            _check_prompts(prompts)
        else:
            prompts, answers = [[0]], [[]]
        C = common_prefix_length(prompts)
        # The packed rows: their tokens, and the position of the first.
        rows = [(prompts[0][:C], 0)]
        rows += [(prompt[C:], C) for prompt in prompts]
        for prompt, group in zip(prompts, answers, strict=True):
            # The last token is only predicted, never fed.
            rows += [(answer[:-1], len(prompt)) for answer in group]
        lengths = [len(tokens) for tokens, _ in rows]
        ends = [*accumulate(lengths)]
        predict = []
        row = len(prompts)
        for number, group in enumerate(answers, 1):
            for _ in group:
                row += 1
                # The first token is predicted by the prompt's last token.
                predict += [ends[number] - 1, *range(ends[row] - lengths[row], ends[row])]
        positions = [range(first, first + len(tokens)) for tokens, first in rows]
        targets = [answer for group in answers for answer in group]
        as_tensor = lambda values: torch.tensor([*values], dtype=torch.long, device=device)
        self.input_ids = as_tensor(chain(*(tokens for tokens, _ in rows)))[None]
        self.position_ids = as_tensor(chain(*positions))[None]
        self.predict_A = as_tensor(predict)
        self.targets_A = as_tensor(chain(*targets))
        self.max_position = 1 + max(chain(*positions))
        self.segments = self._segments(lengths, [len(group) for group in answers], device)

    def _segments(self, lengths, group_sizes, device):
        """Each row sees itself up to each token; prompts and answers the prefix; answers their
        prompt.
        """
        P = len(group_sizes)
        prefix, prompts, answers = lengths[:1], lengths[1 : P + 1], lengths[P + 1 :]
        sizes = iter(answers)
        groups = [sum(islice(sizes, size)) for size in group_sizes]
        C = sum(prefix)
        A0 = C + sum(prompts)
        S = sum(lengths)
        segments = []
        levels = [(0, C, prefix), (C, A0, prompts), (A0, S, [n for n in answers if n])]
        for start, end, level in levels:
            if start < end:
                own = Sequences(level, device)
                tokens = slice(start, end)
                segments.append(Segment(own, own, tokens, tokens, causal=True, own=True))
        if C:
            below = Sequences([S - C], device)
            segments.append(Segment(below, Sequences(prefix, device), slice(C, S), slice(0, C)))
        if A0 < S:
            own = Sequences(prompts, device)
            segments.append(Segment(Sequences(groups, device), own, slice(A0, S), slice(C, A0)))
        return segments

    def attend(self, layer, q_SHD, k_SKD, v_SKD, scale):
        """Attention of all packed tokens at once; returns [S, H, D]."""
        return PackedAttention.apply(q_SHD, k_SKD, v_SKD, self.segments, scale)


def forward(model, layout):
    """Last hidden states [S, D] of a layout: a Tree, a Prefill or a Decode."""
    out = model.base_model(
        input_ids=layout.input_ids,
        position_ids=layout.position_ids,
        tree=layout,
        use_cache=False,
    )
    return out.last_hidden_state[0]


def answer_hidden(model, tree):
    """Hidden states [A, D] that predict the answer tokens, from one forward over the packed tree,
    with exact gradients.
    """
    return forward(model, tree).index_select(0, tree.predict_A)


class _TokenLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies in chunks; backward computes each chunk's logits again.

    One buffer takes the gradient of the head from all chunks; left to autograd, each chunk would
    allocate its own.
    """

    @staticmethod
    def forward(ctx, hidden_AD, weight_VD, bias_V, targets_A, temperature, chunk, dtype):
        """Log-probabilities and entropies [A]; kept for backward: hidden states, no logits."""
        hidden_AD = hidden_AD.to(dtype)
        ctx.weight = weight_VD.detach().to(dtype)
        ctx.bias = None if bias_V is None else bias_V.detach().to(dtype)
        ctx.temperature = temperature
        ctx.chunk = chunk
        logprobs = []
        entropies = []
        chunks = zip(hidden_AD.split(chunk), targets_A.split(chunk), strict=True)
        for hidden_CD, targets_C in chunks:
            logps_CV = torch.log_softmax(_TokenLogprobs.logits(ctx, hidden_CD), -1)
            logprobs.append(logps_CV.gather(-1, targets_C[:, None])[:, 0])
            entropies.append(-logps_CV.exp().mul_(logps_CV).sum(-1))
        ctx.save_for_backward(hidden_AD, weight_VD, bias_V, targets_A)
        entropy_A = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy_A)
        return torch.cat(logprobs), entropy_A

    @staticmethod
    def logits(ctx, hidden_CD):
        """float32 logits [C, V] of one chunk."""
        return F.linear(hidden_CD, ctx.weight, ctx.bias).float().div_(ctx.temperature)

    @staticmethod
    def backward(ctx, grad_A, _):
        """Gradients of hidden states and of the head's weight and bias, chunk by chunk."""
        hidden_AD, weight_VD, bias_V, targets_A = ctx.saved_tensors
        grads = []
        grad_weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        grad_A = grad_A / ctx.temperature
        chunks = (x.split(ctx.chunk) for x in (hidden_AD, targets_A, grad_A))
        for hidden_CD, targets_C, grad_C in zip(*chunks, strict=True):
            # d logprob / d logits = one_hot(target) - softmax(logits)
            grad_CV = torch.softmax(_TokenLogprobs.logits(ctx, hidden_CD), -1).mul_(
                -grad_C[:, None]
            )
            grad_CV.scatter_add_(1, targets_C[:, None], grad_C[:, None])
            grad_CV = grad_CV.to(hidden_CD.dtype)
            grads.append(grad_CV @ ctx.weight)
            if grad_weight is not None:
                if grad_weight.dtype == grad_CV.dtype:
                    grad_weight.addmm_(grad_CV.T, hidden_CD)
                else:
                    grad_weight += grad_CV.T @ hidden_CD
            if grad_bias is not None:
                grad_bias += grad_CV.sum(0)
        return torch.cat(grads), grad_weight, grad_bias, None, None, None, None


# Of a chunk of positions: few enough for a CPU's cache, enough to keep all of a GPU busy.
LOGITS = {"cpu": 2**24, "cuda": 2**27}


def token_logprobs(hidden_AD, head, targets_A, temperature=1.0, chunk=None):
    """Log-probabilities and entropies under softmax(head(hidden) / temperature), float32 [A].

    head: the model's output layer, a torch.nn.Linear. Runs in chunks of `chunk` positions (by
    default so many that a chunk has LOGITS logits) that are computed again in the backward pass, so
    [A, vocabulary] never exists. The entropies carry no gradient; they are a statistic.
    """
    device = hidden_AD.device.type
    logits = LOGITS.get(device, LOGITS["cpu"])
    chunk = chunk or max(1, logits // head.weight.shape[0])
    dtype = head.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    arguments = (hidden_AD, head.weight, head.bias, targets_A, temperature, chunk, dtype)
    return _TokenLogprobs.apply(*arguments)


class Policy(torch.nn.Module):
    """A causal language model as the trainer calls it, and the root that FSDP shards.

    model: under tree attention. FSDP gathers the weights of head and embedding before `forward` and
    keeps them until the backward pass, which computes the logits again.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tree, temperature=1.0):
        """Log-probabilities and entropies of the tree's answer tokens, both float32 [A]."""
        hidden_AD = answer_hidden(self.model, tree)
        head = self.model.get_output_embeddings()
        return token_logprobs(hidden_AD, head, tree.targets_A, temperature)


def next_token_logits(model, prompts, ids):
    """float32 logits [N, Y] of the ids as the next token of each prompt. Differentiable.

    From the head's rows for these ids: [N, vocabulary] is never made.
    """
    placeholders = [[[0]]] * len(prompts)  # one token to predict, whichever
    hidden_ND = answer_hidden(model, Tree(prompts, placeholders, model.device))
    head = model.get_output_embeddings()
    bias = None if head.bias is None else head.bias[ids]
    return F.linear(hidden_ND, head.weight[ids], bias).float()


EMPTY = (slice(0, 0), slice(0, 0))  # the micro-batch of a rank that has none left


def micro_batches(prompts, answers, max_tokens):
    """Cut a batch into micro-batches of whole groups, of at most max_tokens tokens or one group.

    Returns pairs of slices: of the prompts, and of the batch's packed answer tokens [A].
    """
    if not prompts:
        return []
    pairs = []
    prefix = common_prefix_length(prompts)  # packed once in each micro-batch
    start = 0  # of the micro-batch that is being filled: its first prompt
    used = prefix  # its tokens
    first_token = token = 0  # its first answer token; the answer tokens so far
    for i, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
        new = sum(map(len, group))
        need = len(prompt) - prefix + new
        if i > start and used + need > max_tokens:
            pairs.append((slice(start, i), slice(first_token, token)))
            start, first_token, used = i, token, prefix
        used += need
        token += new
    return [*pairs, (slice(start, len(prompts)), slice(first_token, token))]


MAX_TOKENS = 2**15  # of a training pass, where the memory has room for them
CACHE_TOKENS = 2**17  # of the cache in `sample`, likewise


def token_budgets(model, device, held, size, checkpointing=False, shards=1):
    """[tokens of a training pass, tokens of the cache in `sample`] that a device has room for.

    held: bytes that this rank keeps for each parameter: weights, gradients, moments. size: bytes of
    a number in the computation. checkpointing: only the inputs of layers are kept for backward.
    shards: ranks that share out the heads in sampling; the cache is that of all of them.
    An estimate: a training token keeps in each layer 6 states, 4 of the MLP's width, and 4 times
    queries and keys (docs/plan.py counts them). A quarter of the memory stays free, and of the rest
    the cache gets a quarter. At most MAX_TOKENS and CACHE_TOKENS, and the same on each start.
    """
    config = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = head_dim * (getattr(config, "num_key_value_heads", None) or heads)
    inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
    kept = 6 * config.hidden_size + 4 * inner + 4 * (head_dim * heads + keys)
    if checkpointing:
        kept = config.hidden_size + kept / config.num_hidden_layers
    room = 0.75 * device_memory(device) - held * sum(p.numel() for p in model.parameters())
    numbers = room / size / config.num_hidden_layers
    budgets = []
    cached = numbers / 4 / (2 * keys / shards)
    for tokens, most in ((numbers / kept, MAX_TOKENS), (cached, CACHE_TOKENS * shards)):
        budgets.append(min(most, max(2**10, int(tokens) // 2**10 * 2**10)))
    return budgets


def device_memory(device):
    """Bytes of a GPU's memory, or of this machine's for each of the ranks that share it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    return memory // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# Sampling -----------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """Sampled answers.

    answers: P lists of G answers, each a list of ids, EOS included where it ended by itself.
    lengths_N: int64, tokens of each answer. ended_N: bool, False where cut at max_new_tokens.
    logprobs_A: float32, packed answer by answer: of each token under the distribution that it was
    drawn from. label_logits_AY: float32, where label_ids were given: their logits there.
    """

    answers: list
    lengths_N: torch.Tensor
    ended_N: torch.Tensor
    logprobs_A: torch.Tensor
    label_logits_AY: torch.Tensor | None

    def part(self, prompts):
        """The Rollout of some of the prompts, a slice of them."""
        sizes = [len(group) for group in self.answers]
        rows = slice(sum(sizes[: prompts.start]), sum(sizes[: prompts.stop]))
        ends = [0, *self.lengths_N.cumsum(0).tolist()]
        tokens = slice(ends[rows.start], ends[rows.stop])
        return Rollout(
            answers=self.answers[prompts],
            lengths_N=self.lengths_N[rows],
            ended_N=self.ended_N[rows],
            logprobs_A=self.logprobs_A[tokens],
            label_logits_AY=None if self.label_logits_AY is None else self.label_logits_AY[tokens],
        )


def uniforms(seed, step, rows, width):
    """The table [rows, width] of float64 uniforms from which tokens are drawn. A row depends on
    (seed, step, row) alone.
    """
    return np.stack([np.random.default_rng([seed, step, row]).random(width) for row in rows])


def choose_tokens(logits_RV, uniforms_R, temperature):
    """Draw one token a row as the inverse CDF at its uniform: ids [R], log-probabilities [R].

    The float32 log-probabilities are of the distribution drawn from. temperature 0 takes the most
    probable token; its log-probability is then that at temperature 1.
    """
    # On the CPU some rows at a time, so that the scratch stays in the cache.
    rows = len(logits_RV)
    if logits_RV.device.type == "cpu":
        rows = max(1, 2**20 // logits_RV.shape[1])
    ids = []
    logprobs = []
    for logits_CV, uniforms_C in zip(logits_RV.split(rows), uniforms_R.split(rows), strict=True):
        if temperature not in (0, 1):
            logits_CV = logits_CV.float() / temperature
        probs_CV = torch.softmax(logits_CV, -1, dtype=torch.float32)
        if temperature == 0:
            ids_C1 = logits_CV.argmax(-1, keepdim=True)
        else:
            ids_C1 = _inverse_cdf(probs_CV, uniforms_C[:, None])
        ids.append(ids_C1[:, 0])
        logprobs.append(probs_CV.gather(1, ids_C1)[:, 0].log())
    return torch.cat(ids), torch.cat(logprobs)


BLOCK = 512  # of the vocabulary


def _inverse_cdf(probs_CV, uniforms_C1):
    """Ids [C, 1]: in a large vocabulary the block first, then the token in it. The CDF over blocks
    and the one inside need float64 for few numbers only.
    """
    C, V = probs_CV.shape
    if V <= 2 * BLOCK:
        return _search(probs_CV, uniforms_C1)[0]
    if V % BLOCK:
        probs_CV = F.pad(probs_CV, (0, BLOCK - V % BLOCK))
    blocks = probs_CV.view(C, -1, BLOCK)
    block_C1, rest_C1 = _search(blocks.sum(-1), uniforms_C1)
    chosen = blocks.take_along_dim(block_C1[..., None], 1)[:, 0]
    return block_C1 * BLOCK + _search(chosen, rest_C1)[0]


def _search(weights_CV, uniforms_C1):
    """Where each uniform falls among the weights, and its place between there and the next: again a
    uniform in [0, 1).
    """
    cdf_CV = weights_CV.cumsum(-1, dtype=torch.float64)
    # Scaling by the last value instead of 1 keeps the draw inside, whatever the rounding.
    ends_C1 = uniforms_C1 * cdf_CV[:, -1:]
    ids_C1 = torch.searchsorted(cdf_CV, ends_C1, right=True).clamp(max=weights_CV.shape[1] - 1)
    above_C1 = cdf_CV.gather(1, ids_C1) - ends_C1
    rest_C1 = 1 - above_C1 / weights_CV.gather(1, ids_C1)
    return ids_C1, rest_C1.clamp(0, 1 - 2**-53)


@dataclass
class Sequence:
    """A running answer. row: of the output. num_tokens: drawn so far."""

    prompt: int
    row: int
    num_tokens: int = 0


class Scheduler:
    """Which prompts wait, which sequences run, and in which slots of the cache. Holds no tensors.

    running[i] is the sequence in answer slot i, prompts[j] the prompt in prompt slot j. There are
    no holes: where one ends, the last one moves in.
    """

    def __init__(self, num_prompts, group_size, max_running, max_prompts):
        self.group_size = group_size
        self.max_running = max_running
        self.max_prompts = max_prompts
        self.waiting = deque(range(num_prompts))
        self.running = []
        self.prompts = []

    def admit(self, most):
        """Start the groups of at most `most` waiting prompts; returns these prompts."""
        G = self.group_size
        free = min((self.max_running - len(self.running)) // G, len(self.waiting))
        free = min(free, self.max_prompts - len(self.prompts))
        # A prefill for few prompts is nearly as slow as one for many: wait until an eighth of the
        # slots is free.
        if self.running and free < min(max(1, self.max_running // G // 8), len(self.waiting)):
            return []
        admitted = [self.waiting.popleft() for _ in range(min(free, most))]
        self.prompts += admitted
        self.running += [Sequence(p, p * G + g) for p in admitted for g in range(G)]
        return admitted

    def finish(self, slots):
        """End the sequences in these answer slots, and the prompts that no other runs for.

        Returns what is to be moved in the cache: (sources, targets) of answers, then of prompts.
        """
        answers = _fill_holes(self.running, slots)
        at_work = {sequence.prompt for sequence in self.running}
        ended = [j for j, prompt in enumerate(self.prompts) if prompt not in at_work]
        return answers, _fill_holes(self.prompts, ended)

    def by_prompt(self):
        """The answer slots sorted by prompt slot, and how many each prompt slot has."""
        groups = {prompt: [] for prompt in self.prompts}
        for slot, sequence in enumerate(self.running):
            groups[sequence.prompt].append(slot)
        return [*chain(*groups.values())], [len(group) for group in groups.values()]


def _fill_holes(slots, free):
    """Take out the items in the free slots; the last ones move there. Returns sources, targets."""
    size = len(slots) - len(free)
    targets = [slot for slot in free if slot < size]
    sources = sorted({*range(size, len(slots))}.difference(free))
    for source, target in zip(sources, targets, strict=True):
        slots[target] = slots[source]
    del slots[size:]
    return sources, targets


class KVCache:
    """Keys and values of all layers, in slots of fixed width: the prefix, prompts and answers.

    levels: for each of these three, its number of slots and their width.
    """

    PREFIX, PROMPTS, ANSWERS = range(3)

    def __init__(self, *levels):
        self.levels = levels
        self.layers = []

    def layer(self, layer, like_SKD):
        """Of one layer the three levels, each [2, slots, width, K, D]: keys and values."""
        if layer == len(self.layers):
            K, D = like_SKD.shape[1:]
            tensors = []
            for n, width in self.levels:
                if like_SKD.is_cuda:
                    tensors.append(like_SKD.new_zeros(2, n, width, K, D))
                else:
                    # Kernels take one head at a time: its keys lie side by side.
                    tensors.append(like_SKD.new_zeros(2, n, K, width, D).transpose(2, 3))
            self.layers.append(tensors)
        return self.layers[layer]

    def move(self, level, sources, targets):
        """Copy slots of one level."""
        if sources:
            for layer in self.layers:
                layer[level][:, targets] = layer[level][:, sources]


class Prefill:
    """Layout of a prefill: packed rows, each seeing the cached prefix and, causally, itself.

    Their keys enter the given slots (a slice) of one level of the cache, from a column on.
    """

    def __init__(self, rows, start, cache, level, slots, device):
        lengths = [len(row) for row in rows]
        own = Sequences(lengths, device)
        self.cache = cache
        self.level = level
        self.slots = slots
        column = start if level == KVCache.PREFIX else 0
        self.columns = slice(column, column + own.longest)
        self.own = Segment(own, own, causal=True, own=True)
        self.prefix = None
        if start:
            width = cache.levels[KVCache.PREFIX][1]
            queries = Sequences([sum(lengths)], device)
            self.prefix = Segment(queries, Sequences([start], device, width=width))
        positions = [range(start, start + length) for length in lengths]
        self.max_position = start + own.longest
        self.input_ids = torch.tensor([*chain(*rows)], device=device)[None]
        self.position_ids = torch.tensor([*chain(*positions)], device=device)[None]
        self.last_R = own.cu[1:].long() - 1

    def attend(self, layer, q_SHD, k_SKD, v_SKD, scale):
        """Keys and values enter the cache; returns the output [S, H, D]."""
        levels = self.cache.layer(layer, k_SKD)
        for cached, new in zip(levels[self.level], (k_SKD, v_SKD), strict=True):
            cached[self.slots, self.columns] = self.own.keys.pad(new)
        parts = [(self.own, k_SKD, v_SKD)]
        if self.prefix:
            parts.append((self.prefix, *levels[KVCache.PREFIX]))
        return attend(q_SHD, parts, scale)[0]


SMALLEST_GRAPH = 32  # rows: fewer take a GPU as long, and to capture a graph takes many steps' time


class Decode:
    """Layout of a decoding step: every running sequence adds one token.

    fixed: of one of a few shapes, for CUDA graphs: a power of two of rows, SMALLEST_GRAPH at least,
    and all prompt slots. Idle rows run as a first token of the first prompt, in free answer slots.
    """

    def __init__(self, scheduler, prompts, cache, fixed, device):
        (_, prefix), (_, prompt_width), (_, self.answer_width) = cache.levels
        size = len(scheduler.running)
        slots = len(scheduler.prompts)
        if fixed:
            rows = max(SMALLEST_GRAPH, 1 << (size - 1).bit_length())
            size = min(scheduler.max_running, rows)
            slots = scheduler.max_prompts
        idle = [*range(len(scheduler.running), size)]
        order, counts = scheduler.by_prompt()
        counts[0] += len(idle)
        unused = [0] * (slots - len(counts))
        own = [len(prompts[number]) - prefix for number in scheduler.prompts]
        self.cache = cache
        self.max_position = prefix + prompt_width + self.answer_width
        self.single = Sequences([1] * size, device)
        self.prompts = Segment(
            Sequences(counts + unused, device, order=idle + order, most=size),
            Sequences(own + unused, device, width=prompt_width),
        )
        self.prefix = None
        if prefix:
            self.prefix = Segment(
                Sequences([size], device), Sequences([prefix], device, width=prefix)
            )
        self.sequences = scheduler.running + [Sequence(scheduler.prompts[0], 0, 1)] * len(idle)
        self.rows_A = torch.tensor([s.row for s in self.sequences], device=device)
        lengths = [len(prompts[s.prompt]) for s in self.sequences]
        self.prompt_lengths_A = torch.tensor(lengths, device=device)
        self.slots_A = torch.arange(size, device=device)

    def feed(self, ids_NT):
        """Take each sequence's last token as the input of the next step."""
        lengths = [sequence.num_tokens for sequence in self.sequences]
        keys = Sequences(lengths, ids_NT.device, width=self.answer_width)
        self.own = Segment(self.single, keys, own=True)
        self.columns_A = keys.used - 1
        self.input_ids = ids_NT[self.rows_A, self.columns_A][None]
        self.position_ids = (self.prompt_lengths_A + self.columns_A)[None]

    def attend(self, layer, q_AHD, k_AKD, v_AKD, scale):
        """Keys and values enter the cache; returns the output [A, H, D]."""
        prefix, prompts, answers = self.cache.layer(layer, k_AKD)
        answers[:, self.slots_A, self.columns_A] = torch.stack([k_AKD, v_AKD])
        parts = [(self.own, *answers), (self.prompts, *prompts)]
        if self.prefix:
            parts.append((self.prefix, *prefix))
        return attend(q_AHD, parts, scale)[0]

    def tensors(self):
        """All that the step reads beside weights and cache."""
        tensors = [self.input_ids, self.position_ids, self.slots_A, self.columns_A]
        tensors.append(self.prompts.queries.order)
        for segment in (self.own, self.prompts, self.prefix):
            if segment:
                tensors += [segment.queries.cu, segment.keys.cu, segment.keys.used]
        return tensors


class DecodeGraphs:
    """Decoding steps as CUDA graphs, one for each size of a step, in one pool of memory."""

    def __init__(self):
        self.graphs = {}
        self.pool = None

    def run(self, model, layout):
        """Hidden states [A, D] of the step."""
        size = len(layout.sequences)
        if size not in self.graphs:
            forward(model, layout)  # allocates and tunes what a capture must not
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                hidden_AD = forward(model, layout)
            self.pool = graph.pool()
            self.graphs[size] = graph, layout.tensors(), hidden_AD
        graph, inputs, hidden_AD = self.graphs[size]
        for captured, new in zip(inputs, layout.tensors(), strict=True):
            captured.copy_(new)
        graph.replay()
        return hidden_AD


def fit_rows(prompts, group_size, max_new_tokens, cache_tokens):
    """How many sequences run at a time, and of how many prompts, within cache_tokens.

    Groups end answer by answer; slots for twice as many prompts as there is room for whole groups
    keep the answer slots full meanwhile.
    """
    P = len(prompts)
    G = group_size
    prefix = common_prefix_length(prompts)
    own = max(map(len, prompts)) - prefix
    fitting = None
    for groups in range(1, P + 1):
        slots = min(P, groups if G == 1 else 2 * groups)
        tokens = prefix + slots * own + groups * G * max_new_tokens
        if tokens > cache_tokens:
            break
        fitting = (groups * G, slots)
    if fitting is None:
        raise ValueError(
            f"cache_tokens ({cache_tokens}): a group of {G} answers needs {tokens}; raise it"
        )
    return fitting


PREFILL_TOKENS = 8192  # prefilled at a time, padding counted: bounds the memory of a prefill


def _check_sample(model, prompts, group_size, max_new_tokens, eos_id):
    _check_prompts(prompts)
    if group_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"group_size ({group_size}) and max_new_tokens ({max_new_tokens}) must be at least 1"
        )
    if eos_id is None:
        raise ValueError("eos_id is missing: without an end-of-sequence token no answer can end")
    dropout = any(isinstance(m, torch.nn.Dropout) and m.p for m in model.modules())
    if model.training and (dropout or getattr(model.config, "attention_dropout", 0)):
        raise ValueError("the model is in train mode with dropout; call model.eval() first")
    longest = max(map(len, prompts)) + max_new_tokens
    context = model.config.max_position_embeddings
    if longest > context:
        raise ValueError(
            f"the longest prompt and answer need {longest} tokens, the context has {context}"
        )
    if model.config._attn_implementation != "tree":
        raise ValueError("call rollout.use_tree_attention(model) first")


class Answers:
    """The table of what was drawn, [N, T] on the device, and of the uniforms to draw from."""

    def __init__(self, draws_NT, label_ids, device):
        N, T = draws_NT.shape
        self.draws_NT = torch.from_numpy(draws_NT).to(device)
        self.ids_NT = torch.zeros(N, T, dtype=torch.long, device=device)
        self.logprobs_NT = torch.zeros(N, T, device=device)
        self.label_ids_Y = None
        if label_ids is not None:
            self.label_ids_Y = torch.tensor(label_ids, device=device)
        self.label_logits_NTY = torch.zeros(N, T, len(label_ids or []), device=device)
        self.lengths = [0] * N
        self.ended = [False] * N

    def draw(self, sequences, logits_AV, temperature, eos_id):
        """Draw the next token of each sequence; returns which of them, by number, are done."""
        device = logits_AV.device
        rows_A = torch.tensor([sequence.row for sequence in sequences], device=device)
        at_A = torch.tensor([sequence.num_tokens for sequence in sequences], device=device)
        ids_A, logprobs_A = choose_tokens(logits_AV, self.draws_NT[rows_A, at_A], temperature)
        self.ids_NT[rows_A, at_A] = ids_A
        self.logprobs_NT[rows_A, at_A] = logprobs_A
        if self.label_ids_Y is not None:
            self.label_logits_NTY[rows_A, at_A] = logits_AV[:, self.label_ids_Y].float()
        done = []
        is_eos = (ids_A == eos_id).tolist()
        for number, sequence in enumerate(sequences):
            sequence.num_tokens += 1
            if is_eos[number] or sequence.num_tokens == self.ids_NT.shape[1]:
                done.append(number)
                self.lengths[sequence.row] = sequence.num_tokens
                self.ended[sequence.row] = is_eos[number]
        return done

    def rollout(self, group_size):
        """All of it as a Rollout, once every sequence is done."""
        device = self.ids_NT.device
        lengths_N = torch.tensor(self.lengths, device=device)
        is_token_NT = torch.arange(self.ids_NT.shape[1], device=device) < lengths_N[:, None]
        rows = [row[:n] for row, n in zip(self.ids_NT.tolist(), self.lengths, strict=True)]
        logits_AY = None if self.label_ids_Y is None else self.label_logits_NTY[is_token_NT]
        return Rollout(
            answers=[rows[i : i + group_size] for i in range(0, len(rows), group_size)],
            lengths_N=lengths_N,
            ended_N=torch.tensor(self.ended, device=device),
            logprobs_A=self.logprobs_NT[is_token_NT],
            label_logits_AY=logits_AY,
        )


@torch.no_grad()
def sample(
    model,
    prompts,
    *,
    group_size=1,
    max_new_tokens,
    eos_id,
    temperature=1.0,
    seed=0,
    step=0,
    first_row=0,
    label_ids=None,
    cache_tokens=CACHE_TOKENS,
    cuda_graphs=True,
):
    """Sample `group_size` answers to each prompt (lists of token ids); returns a Rollout.

    temperature 0 is greedy. Row n draws from uniforms of (seed, step, first_row + n), so its answer
    does not depend on who shares its batch, beyond rounding. label_ids: ids whose logits are kept
    at every position. The key-value cache holds at most `cache_tokens` tokens, from which follows
    how many sequences run at a time; waiting prompts take the slots of those that end. On a GPU the
    decoding step runs from CUDA graphs unless cuda_graphs is False.
    Raises ValueError for empty prompts, budgets that fit nothing, a missing eos_id, dropout, or too
    long a prompt.
    """
    _check_sample(model, prompts, group_size, max_new_tokens, eos_id)
    device = model.device
    draws_NT = np.zeros((len(prompts) * group_size, max_new_tokens))
    if temperature:
        rows = range(first_row, first_row + len(draws_NT))
        draws_NT = uniforms(seed, step, rows, max_new_tokens)
    answers = Answers(draws_NT, label_ids, device)
    max_running, max_prompts = fit_rows(prompts, group_size, max_new_tokens, cache_tokens)
    scheduler = Scheduler(len(prompts), group_size, max_running, max_prompts)
    prefix = common_prefix_length(prompts)
    width = max(map(len, prompts)) - prefix
    cache = KVCache((1, prefix), (max_prompts, width), (max_running, max_new_tokens))
    graphs = DecodeGraphs()

    # 1. Prefill the common prefix.
    for start in range(0, prefix, PREFILL_TOKENS):
        chunk = prompts[0][start : min(prefix, start + PREFILL_TOKENS)]
        forward(model, Prefill([chunk], start, cache, KVCache.PREFIX, slice(0, 1), device))

    decode = None  # the layout of a step, as long as the same sequences run
    while scheduler.waiting or scheduler.running:
        # 2. Prefill waiting prompts if there is room, else run one step of all sequences.
        admitted = scheduler.admit(most=max(1, PREFILL_TOKENS // width))
        if admitted:
            rows = [prompts[number][prefix:] for number in admitted]
            slots = slice(len(scheduler.prompts) - len(admitted), len(scheduler.prompts))
            prefill = Prefill(rows, prefix, cache, KVCache.PROMPTS, slots, device)
            hidden_AD = forward(model, prefill)[prefill.last_R].repeat_interleave(group_size, 0)
            decode = None
        else:
            fixed = on_cuda_kernels(cache.layers[0][KVCache.ANSWERS])
            decode = decode or Decode(scheduler, prompts, cache, fixed, device)
            decode.feed(answers.ids_NT)
            run = graphs.run if fixed and cuda_graphs else forward
            hidden_AD = run(model, decode)[: len(scheduler.running)]

        # 3. Draw a token for each of these sequences: all, or the newest.
        first = len(scheduler.running) - len(hidden_AD)
        logits_AV = model.get_output_embeddings()(hidden_AD)
        done = answers.draw(scheduler.running[first:], logits_AV, temperature, eos_id)

        # 4. Those that are done leave their slots to others.
        if done:
            moved_answers, moved_prompts = scheduler.finish([first + number for number in done])
            cache.move(KVCache.ANSWERS, *moved_answers)
            cache.move(KVCache.PROMPTS, *moved_prompts)
            decode = None
    return answers.rollout(group_size)


class Engine:
    """Greedy answers and label logits for many prompts, with shared prefixes computed once.

    model: under tree attention. max_tokens: token budget of one forward pass; cache_tokens: as in
    `sample`.
    """

    def __init__(
        self,
        model,
        eos_id,
        label_ids,
        max_new_tokens,
        max_tokens=MAX_TOKENS,
        cache_tokens=CACHE_TOKENS,
    ):
        self.model = model
        self.eos_id = eos_id
        self.label_ids = label_ids
        self.max_new_tokens = max_new_tokens
        self.max_tokens = max_tokens
        self.cache_tokens = cache_tokens

    def generate(self, prompts):
        """Greedy answers, lists of ids, and the label logits [T, Y] at each of their positions."""
        sampled = sample(
            self.model,
            prompts,
            max_new_tokens=self.max_new_tokens,
            eos_id=self.eos_id,
            temperature=0,
            label_ids=self.label_ids,
            cache_tokens=self.cache_tokens,
        )
        answers = [answer for (answer,) in sampled.answers]
        return answers, sampled.label_logits_AY.cpu().split(sampled.lengths_N.tolist())

    @torch.no_grad()
    def label_logits(self, prompts):
        """float32 logits [N, Y] of the labels as the next token of each prompt, on the CPU."""
        logits = []
        for part, _ in micro_batches(prompts, [[[0]]] * len(prompts), self.max_tokens):
            logits.append(next_token_logits(self.model, prompts[part], self.label_ids).cpu())
        return torch.cat(logits)


def main():
    """`python rollout.py --bench`: measure this file (docs/bench.py says what and how)."""
    bench = Path(__file__).resolve().parent / "docs" / "bench.py"
    if not bench.is_file():
        sys.exit("the benchmark, docs/bench.py, is not beside this file")
    runpy.run_path(str(bench), run_name="__main__")


if __name__ == "__main__":
    main()
