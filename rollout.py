"""Running the model so that every shared prefix is computed once.             (how is it run fast?)

Relevance prompts share a long criteria text, and the G answers of a group share their whole prompt.
A batch is a tree:

    common prefix  ->  P prompts  ->  N answers

Sampling prefills prefix and prompts once and decodes all answers against their keys; training packs
the tree into one row of tokens without padding. In both, a query's keys lie in up to three segments
(prefix, prompt, own), and `attend` is all there is to attention: for each one fused kernel gives an
output and a log-sum-exp, by which they are merged. Decoder-only Hugging Face models run unchanged.

    check_model(model, max_position=4096)         # once; refuses models that it computes wrongly
    sampled = sample(model, prompts, group_size=8, max_new_tokens=64, eos_id=2, seed=0, step=7)
    tree = Tree(prompts, sampled.answers, device)  # the same answers, packed for training
    logprobs_A, entropy_A = Policy(model)(tree, temperature=1.0)   # of every answer token

This file needs torch, numpy and transformers only; copy it alone.

Shapes: P prompts, G answers a prompt, N = P * G answers, T answer positions, S packed tokens,
A answer tokens (in decoding: running answers), R rows of logits, Y labels, H attention heads, K
key-value heads, n sequences, C keys (in chunks: positions), W width of a cache slot, D head size
(for hidden states: model width), V vocabulary.
"""

import os
import runpy
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.attention
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# On CUDA, compile what stands between products and attention into fewer kernels; it takes a minute.
COMPILE = False
torch._dynamo.config.recompile_limit = 64  # for kinds of batches
compiled = cache(torch.compile)


def fused(function, x, *args):
    """function(x, *args), on CUDA compiled."""
    if COMPILE and x.is_cuda:
        function = compiled(function, dynamic=True)
    return function(x, *args)


# Attention: one kernel a segment, merged by log-sum-exp -------------------------------------------

# The fused kernels that torch brings. FLASH_ATTENTION=FA4 (or FA3) in the environment puts the CUDA
# kernels of an installed flash-attn package in their place.
if implementation := os.environ.get("FLASH_ATTENTION"):
    torch.nn.attention.activate_flash_attention_impl(implementation)
_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_cuda_flash = torch.ops.aten._flash_attention_forward
_cuda_flash_backward = torch.ops.aten._flash_attention_backward


def on_cuda(x):
    """Whether CUDA's kernels, which take packed sequences, run on this tensor."""
    return x.is_cuda


def put(numbers, dtype, device):
    """A tensor on a device. The host does not wait for work there that was begun before."""
    is_pinned = torch.device(device).type == "cuda"
    return torch.tensor(numbers, dtype=dtype, pin_memory=is_pinned).to(device, non_blocking=True)


class Sequences:
    """n sequences packed behind each other in one tensor [S, ...], as the kernels want to know it.

    cu: int32 [n + 1], where each begins, and max_length, a bound, for CUDA's kernels, which take
    packed sequences. CPU's take padded ones: `pad` and `unpad`, and the `mask` of what is padding.
    """

    used = None  # Slots have it

    def __init__(self, lengths, device):
        self.lengths = lengths
        self.longest = max(lengths)
        self.is_even = min(lengths) == self.longest
        self.cu = put([0, *accumulate(lengths)], torch.int32, device)
        # CUDA's kernels take a bound of 1 to mean exactly one query in each sequence.
        self.max_length = max(self.longest, 1 if self.is_even else 2)

    @cached_property
    def is_token(self):
        """bool [n, longest], False on padding."""
        lengths_n1 = torch.tensor(self.lengths, device=self.cu.device)[:, None]
        return torch.arange(self.longest, device=self.cu.device) < lengths_n1

    @cached_property
    def mask(self):
        """Additive [n, 1, 1, longest], float32, -inf on padding; None if there is none."""
        if self.is_even:
            return None
        mask = torch.zeros(self.is_token.shape).masked_fill(~self.is_token, -torch.inf)
        return mask[:, None, None]

    def pad(self, x):
        """[n, H, longest, ...] of packed rows [S, H, ...], zeros behind each."""
        shape = (len(self.lengths), self.longest, *x.shape[1:])
        if self.is_even:
            return x.reshape(shape).transpose(1, 2)
        padded = x.new_zeros(shape)
        padded[self.is_token] = x
        return padded.transpose(1, 2)

    def unpad(self, x):
        """Packed rows [S, H, ...] of [n, H, longest, ...]."""
        x = x.transpose(1, 2)
        return x.flatten(0, 1) if self.is_even else x[self.is_token]


class Slots(Sequences):
    """n sequences each in its slot of a cache [n, W, ...], of which `lengths` tokens are there
    (used: int32 [n], the same on the device).
    """

    def __init__(self, lengths, width, device):
        super().__init__(lengths, device)
        self.used = self.cu.diff()
        self.newest = self.used[:1].long() - 1
        self.cu = torch.arange(len(lengths) + 1, dtype=torch.int32, device=device) * width
        self.max_length = width

    def grow(self):
        """One more token in each."""
        self.used += 1
        self.newest += 1
        self.longest += 1

    def pad(self, x):
        """[n, K, longest, D] of slots [n, W, K, D]."""
        return x[:, : self.longest].transpose(1, 2)


@dataclass
class Segment:
    """Which queries see which keys, for one kernel: query sequence i sees key sequence i.

    rows, columns: slices of the packed queries and keys. causal: a token sees its own sequence up
    to itself; else every query sees all keys of its sequence.
    """

    queries: Sequences
    keys: Sequences
    rows: slice
    columns: slice
    causal: bool = False


def attend(q_SHD, parts, scale):
    """Attention of packed queries over segments of keys, with one softmax over all of them.

    parts: triples (segment, keys, values); keys and values are packed, [C, K, D], or in the
    slots of a cache, [n, W, K, D].
    Returns the output [S, H, D] and, in float32, the log-sum-exp [S, H] of the scores.
    """
    results = [(s.rows, *flash(q_SHD[s.rows], k, v, s, scale)) for s, k, v in parts]
    return fused(merge, q_SHD, results)


def merge(q_SHD, results):
    """Of all segments, from each one's (rows, output, log-sum-exp): exp(lse) is its weight."""
    out_SHD = torch.zeros(q_SHD.shape, device=q_SHD.device)
    lse_SH = torch.full(q_SHD.shape[:2], -torch.inf, device=q_SHD.device)
    for rows, part, part_lse in results:
        share = torch.sigmoid(part_lse - lse_SH[rows])  # of the segments until here
        out_SHD[rows].lerp_(part.float(), share[..., None])
        lse_SH[rows] = torch.logaddexp(lse_SH[rows], part_lse)
    return out_SHD.to(q_SHD.dtype), lse_SH


def add_up(x, parts):
    """The gradient of x, summed in float32, from each segment's (rows, gradient)."""
    total = torch.zeros(x.shape, device=x.device)
    for rows, part in parts:
        total[rows].add_(part)  # += would copy the rows onto themselves, too
    return total.to(x.dtype)


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
        ctx.save_for_backward(q_SHD, k_SKD, v_SKD, out_SHD, lse_SH)
        ctx.segments = segments
        ctx.scale = scale
        return out_SHD

    @staticmethod
    def backward(ctx, grad_SHD):
        """Gradients of queries, keys and values, summed over the segments in float32."""
        q, k, v, out, lse = ctx.saved_tensors
        parts = []
        for segment in ctx.segments:
            rows = segment.rows
            columns = segment.columns
            of_queries = (grad_SHD[rows], q[rows], out[rows], lse[rows])
            dq, dk, dv = flash_backward(*of_queries, k[columns], v[columns], segment, ctx.scale)
            parts.append(((rows, dq), (columns, dk), (columns, dv)))
        of_q, of_k, of_v = zip(*parts, strict=True)
        return fused(add_up, q, of_q), fused(add_up, k, of_k), fused(add_up, v, of_v), None, None


def flash(q_SHD, k, v, segment, scale):
    """One segment's output [S, H, D] and log-sum-exp [S, H], by one call of a fused kernel."""
    queries = segment.queries
    keys = segment.keys
    if on_cuda(q_SHD):
        if keys.used is not None:
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        sizes = (queries.cu, keys.cu, queries.max_length, keys.max_length)
        options = {"scale": scale, "seqused_k": keys.used}
        out, lse, *_ = _cuda_flash(q_SHD, k, v, *sizes, 0.0, segment.causal, False, **options)
        return out, lse.T
    mask = None if segment.causal else keys.mask
    tensors = (queries.pad(q_SHD), keys.pad(k), keys.pad(v))
    out, lse = _cpu_flash(*tensors, 0.0, segment.causal, attn_mask=mask, scale=scale)
    return queries.unpad(out), queries.unpad(lse)


def flash_backward(grad_SHD, q_SHD, out_SHD, lse_SH, k_CKD, v_CKD, segment, scale):
    """One segment's gradients of queries, keys and values, from the output and log-sum-exp of all
    segments together.
    """
    queries = segment.queries
    keys = segment.keys
    if on_cuda(q_SHD):
        tensors = (grad_SHD, q_SHD, k_CKD, v_CKD, out_SHD, lse_SH.T.contiguous())
        sizes = (queries.cu, keys.cu, queries.max_length, keys.max_length)
        state = (q_SHD.new_empty(2, dtype=torch.uint64), q_SHD.new_empty(0))  # of dropout: unused
        return _cuda_flash_backward(*tensors, *sizes, 0.0, segment.causal, *state, scale=scale)
    grad, q, out, lse = (queries.pad(x) for x in (grad_SHD, q_SHD, out_SHD, lse_SH))
    tensors = (grad, q, keys.pad(k_CKD), keys.pad(v_CKD), out, lse)
    mask = None if segment.causal else keys.mask
    dq, dk, dv = _cpu_flash_backward(*tensors, 0.0, segment.causal, attn_mask=mask, scale=scale)
    return queries.unpad(dq), keys.unpad(dk), keys.unpad(dv)


def tree_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, tree=None, **kwargs
):
    """What transformers' attention layers call: query [1, H, S, D], key and value [1, K, S, D].

    `tree` is the layout, a Tree or in sampling a Decode. It travels through the model's forward as
    a keyword argument.
    """
    if tree is None:
        what = "call the model by rollout.sample or rollout.Policy; or it hands no keywords down"
        raise ValueError(f"tree attention: {what}")
    window = kwargs.get("sliding_window") or 0
    asked = {**kwargs, "attention_mask": attention_mask, "dropout": dropout}
    asked["sliding_window"] = 0 < window < tree.max_position
    # Soft-capping, sinks, a mask of the layer's own: whatever else it asks for would be left out.
    left_out = {name for name, value in asked.items() if isinstance(value, torch.Tensor) or value}
    if left_out := sorted(left_out - {"position_ids", "is_causal"}):
        what = f"tree attention has no {' and no '.join(left_out)}"
        raise UnsupportedModelError(f"{type(module).__name__}: {what}")
    head_size = value.shape[-1]
    if on_cuda(value) and (value.dtype == torch.float32 or head_size not in range(8, 257, 8)):
        raise UnsupportedModelError(
            f"{type(module).__name__}: CUDA's flash kernels take bfloat16 and head sizes of 8, 16, "
            f"..., 256, not {value.dtype} and {head_size}; use --bf16 1, or a CPU"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # Under autocast, rotary embeddings leave queries and keys in float32, values in bfloat16.
    packed = (x.squeeze(0).transpose(0, 1).to(value.dtype) for x in (query, key, value))
    return tree.attend(module.layer_idx, *packed, scale)[None], None


ALL_ATTENTION_FUNCTIONS.register("tree", torch.compiler.disable(tree_attention))


class UnsupportedModelError(ValueError):
    """A model that the tree does not compute, or not rightly."""


class BudgetError(ValueError):
    """A cache that has no room for a single group of answers."""


def use_tree_attention(model):
    """Switch a decoder-only Hugging Face model to tree attention; returns the model. Raises
    UnsupportedModelError where that cannot be; `check_model` says whether it computes the same.
    """
    head = model.get_output_embeddings()
    problem = None
    if hasattr(model, "get_base_model"):
        problem = "use get_base_model() of it, which has the adapters in its layers"
    elif not getattr(model, "_supports_attention_backend", False):
        problem = "its attention cannot be replaced through transformers' AttentionInterface"
    elif type(head) is not torch.nn.Linear or head.bias is not None:
        problem = "an output head other than a torch.nn.Linear without bias is not supported"
    if problem:
        raise UnsupportedModelError(f"{type(model).__name__}: {problem}")
    model.set_attn_implementation("tree")
    return model


# How far two computations of a token's logits may be apart: the norm of their difference, as a
# share of the logits' own. Rounding gives 1e-6 in float32 and 0.02 in bfloat16.
MOST_APART = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}


@torch.no_grad()
def check_model(model, max_position):
    """Run a model, in eval mode, with and without the tree: the logits of some sampled tokens must
    agree, in sampling and in training. Leaves it under tree attention.

    max_position: of the run's longest sequence; what depends on length must not show until there.
    Returns the largest difference of a token (in half precision the median token's). Raises
    UnsupportedModelError, with the figure, if it is more than rounding.
    """
    name = type(use_tree_attention(model)).__name__
    config = model.config.get_text_config()
    reach = [getattr(config, x, None) for x in ("sliding_window", "attention_chunk_size")]
    rope = getattr(config, "rope_parameters", None) or {}  # one, or one for each kind of layer
    for part in [rope, *(x for x in rope.values() if isinstance(x, dict))]:
        if part.get("rope_type") in ("dynamic", "longrope"):  # which depends on the whole batch
            original = part.get("original_max_position_embeddings")
            reach.append(original or config.max_position_embeddings)
    if (least := min(filter(None, reach), default=max_position)) < max_position:
        raise UnsupportedModelError(
            f"{name}: its attention changes behind {least} tokens; the longest sequence has "
            f"{max_position}"
        )
    # Two prompts with a common prefix, and two answers each, of four tokens (no id is -1).
    draw = np.random.default_rng(0)
    prefix, *ends = (draw.integers(config.vocab_size, size=n).tolist() for n in (5, 3, 6))
    prompts = [prefix + end for end in ends]
    settings = {"group_size": 2, "max_new_tokens": 4, "eos_id": -1}
    head = model.get_output_embeddings()
    # Large logits, as of a trained model, so that soft-capping behind the head shows.
    hook = head.register_forward_hook(lambda module, inputs, output: 100 * output)
    try:
        sampled = sample(model, prompts, **settings, label_ids=range(head.out_features))
        trained_AV = head(answer_hidden(model, Tree(prompts, sampled.answers, model.device)))
        model.set_attn_implementation("eager")
        plain = []
        for prompt, group in zip(prompts, sampled.answers, strict=True):
            for answer in group:
                ids = torch.tensor([prompt + answer[:-1]], device=model.device)
                plain.append(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :])
    except (UnsupportedModelError, FloatingPointError):
        raise
    except Exception as error:  # whatever a model's own code makes of the packed tree
        raise UnsupportedModelError(f"{name}: fails under tree attention: {error}") from error
    finally:
        hook.remove()
        use_tree_attention(model)
    # Centred: probabilities do not depend on a row's mean.
    logits = (torch.cat(plain), sampled.label_logits_AY, trained_AV)
    plain_AV, *ours = (x.float() - x.float().mean(-1, keepdim=True) for x in logits)
    apart = [((x - plain_AV).norm(dim=-1) / plain_AV.norm(dim=-1)).nan_to_num(9.0) for x in ours]
    # In half precision trained models answer chaotically at single tokens.
    largest = torch.max if model.dtype == torch.float32 else torch.median
    sampling, training = (largest(apart_A).item() for apart_A in apart)
    if max(sampling, training) > MOST_APART[model.dtype]:
        raise UnsupportedModelError(
            f"{name}: under tree attention its logits are others: apart by {sampling:.1e} in "
            f"sampling and {training:.1e} in training, of their norm"
        )
    return max(sampling, training)


# The packed tree ----------------------------------------------------------------------------------


def common_prefix_length(prompts):
    """Length of the longest common token prefix that leaves every prompt a token of its own."""
    first, last = min(prompts), max(prompts)  # what these share in lexicographic order, all share
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


class Tree:
    """The packed layout of one batch: common prefix, all prompts, all answers.

    prompts: P lists of token ids. answers: for each prompt the list of its answers, each a list of
    at least one id; none for a prefill. Without any prompt it is a dummy of one token, which runs
    forward and backward with A = 0 answer tokens: for a rank without work while others have some.

    Attributes: input_ids and position_ids [1, S]; targets_A, the answer tokens answer by answer;
    predict_A, for each the packed position whose hidden state predicts it; last_P, the position of
    each prompt's last token; keys, where it is a dict: gets each layer's keys and values [S, K, D].
    """

    def __init__(self, prompts, answers, device="cpu"):
        if not prompts:
            prompts, answers = [[0]], [[]]
        if not all(map(len, prompts)) or not all(map(len, chain(*answers))):
            raise ValueError("every prompt and every answer needs at least one token")
        C = self.prefix = common_prefix_length(prompts)
        # The packed rows: their tokens, and the position of the first.
        rows = [(prompts[0][:C], 0)]
        rows += [(prompt[C:], C) for prompt in prompts]
        predict = []
        last = []
        prompt_end = C
        token = C + sum(len(prompt) - C for prompt in prompts)  # the next packed one
        for prompt, group in zip(prompts, answers, strict=True):
            prompt_end += len(prompt) - C
            last.append(prompt_end - 1)
            for answer in group:
                # The last token is only predicted, never fed; the first by the prompt's last.
                rows.append((answer[:-1], len(prompt)))
                predict += [last[-1], *range(token, token + len(answer) - 1)]
                token += len(answer) - 1
        lengths = [len(tokens) for tokens, _ in rows]
        positions = [range(first, first + len(tokens)) for tokens, first in rows]
        as_tensor = lambda values: put([*values], torch.long, device)
        self.input_ids = as_tensor(chain(*(tokens for tokens, _ in rows)))[None]
        self.position_ids = as_tensor(chain(*positions))[None]
        self.predict_A = as_tensor(predict)
        self.targets_A = as_tensor(chain(*chain(*answers)))
        self.last_P = as_tensor(last)
        self.max_position = 1 + max(chain(*positions))
        self.keys = None
        groups = [sum(len(answer) - 1 for answer in group) for group in answers]
        self.segments = self._segments(lengths, groups, device)

    def _segments(self, lengths, groups, device):
        """Each row sees itself up to each token; prompts and answers see the prefix; answers their
        prompt. groups: packed answer tokens of each prompt.
        """
        P = len(groups)
        C = self.prefix
        S = sum(lengths)
        A0 = S - sum(groups)  # the first answer token
        pack = lambda values: Sequences(values or [0], device)
        prefix = pack([C])
        prompts = pack(lengths[1 : P + 1])
        answers = pack([n for n in lengths[P + 1 :] if n])
        prefix_rows = slice(0, C)
        prompt_rows = slice(C, A0)
        answer_rows = slice(A0, S)
        segments = [
            Segment(prefix, prefix, prefix_rows, prefix_rows, causal=True),
            Segment(prompts, prompts, prompt_rows, prompt_rows, causal=True),
            Segment(answers, answers, answer_rows, answer_rows, causal=True),
            Segment(pack([S - C]), prefix, slice(C, S), prefix_rows),
            Segment(pack(groups), prompts, answer_rows, prompt_rows),
        ]
        is_empty = lambda part: part.start == part.stop
        return [s for s in segments if not is_empty(s.rows) and not is_empty(s.columns)]

    def attend(self, layer, q_SHD, k_SKD, v_SKD, scale):
        """Attention of all packed tokens at once; returns [S, H, D]."""
        if self.keys is not None:
            self.keys[layer] = (k_SKD, v_SKD)
        return PackedAttention.apply(q_SHD, k_SKD, v_SKD, self.segments, scale)


def compile_layers(model):
    """Compile norms, attention and MLPs, once; not whole layers, since FSDP and checkpointing act
    around these.
    """
    layers = getattr(model.base_model, "layers", [])
    parts = [x for layer in layers for x in layer.children() if not x._compiled_call_impl]
    if parts and os.environ.get("RANK", "0") == "0":
        print(f"{type(model).__name__}: the first passes compile", flush=True)
    for part in parts:
        part.compile(dynamic=True)


def forward(model, layout):
    """Last hidden states [S, D] of a layout, a Tree or a Decode, as the head takes them."""
    if model.config._attn_implementation != "tree":  # which would run, and attend to other tokens
        raise ValueError("call rollout.check_model or rollout.use_tree_attention first")
    if COMPILE and layout.input_ids.is_cuda:
        compile_layers(model)
    out = model.base_model(
        input_ids=layout.input_ids,
        position_ids=layout.position_ids,
        tree=layout,
        use_cache=False,
    )
    # What a model multiplies its logits by, ahead of the head, which is linear.
    scale = getattr(model.config, "logit_scale", None) or 1  # Cohere's
    scale /= getattr(model.config, "logits_scaling", None) or 1  # Granite's
    hidden_SD = out.last_hidden_state[0]
    return hidden_SD if scale == 1 else hidden_SD * scale


def answer_hidden(model, tree):
    """Hidden states [A, D] that predict the answer tokens, from one forward over the packed tree,
    with exact gradients.
    """
    return forward(model, tree).index_select(0, tree.predict_A)


def chunk_logprobs(hidden_CD, weight_VD, targets_C1, temperature):
    """Of the targets, and entropies, float32 [C]."""
    logps_CV = torch.log_softmax((hidden_CD @ weight_VD.T).float() / temperature, -1)
    return logps_CV.gather(1, targets_C1)[:, 0], -logps_CV.exp().mul_(logps_CV).sum(-1)


def chunk_gradient(hidden_CD, weight_VD, targets_C1, grad_C1, temperature):
    """Of the logits, [C, V]: d logprob / d logits = one_hot(target) - softmax(logits)."""
    probs_CV = torch.softmax((hidden_CD @ weight_VD.T).float() / temperature, -1)
    of_targets_C1 = (1 - probs_CV.gather(1, targets_C1)) * grad_C1
    grad_CV = probs_CV.mul_(-grad_C1).to(hidden_CD.dtype)
    return grad_CV.scatter_(1, targets_C1, of_targets_C1.to(grad_CV.dtype))


class _TokenLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies in chunks; backward computes each chunk's logits again, and
    one buffer takes the head's gradient from all: autograd would allocate one for each.
    """

    @staticmethod
    def forward(ctx, hidden_AD, weight_VD, targets_A1, temperature, chunk):
        """Log-probabilities and entropies [A]; kept for backward: hidden states, no logits."""
        ctx.save_for_backward(hidden_AD, weight_VD, targets_A1)
        ctx.settings = (temperature, chunk)
        chunks = zip(hidden_AD.split(chunk), targets_A1.split(chunk), strict=True)
        results = [fused(chunk_logprobs, x, weight_VD, ids, temperature) for x, ids in chunks]
        logprobs_A, entropy_A = (torch.cat(x) for x in zip(*results, strict=True))
        ctx.mark_non_differentiable(entropy_A)
        return logprobs_A, entropy_A

    @staticmethod
    def backward(ctx, grad_A, _):
        """Gradients of hidden states and of the head's weight, chunk by chunk."""
        hidden_AD, weight_VD, targets_A1 = ctx.saved_tensors
        temperature, chunk = ctx.settings
        grad_hidden = []
        grad_weight = torch.zeros_like(weight_VD)
        parts = (x.split(chunk) for x in (hidden_AD, targets_A1, grad_A[:, None] / temperature))
        for hidden_CD, *others in zip(*parts, strict=True):
            grad_CV = fused(chunk_gradient, hidden_CD, weight_VD, *others, temperature)
            grad_hidden.append(grad_CV @ weight_VD)
            grad_weight.addmm_(grad_CV.T, hidden_CD)
        return torch.cat(grad_hidden), grad_weight, None, None, None


# Logits of a chunk of positions: few enough for a CPU's cache, enough to keep a GPU busy.
LOGITS = {"cpu": 2**24, "cuda": 2**27}


def token_logprobs(hidden_AD, head, targets_A, temperature=1.0):
    """Log-probabilities and entropies under softmax(head(hidden) / temperature), float32 [A].

    head: the model's output layer, a torch.nn.Linear without bias. Runs in chunks of positions, so
    [A, vocabulary] never exists. The entropies carry no gradient; they are a statistic.
    """
    device = hidden_AD.device.type
    weight_VD = head.weight
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_AD, weight_VD = hidden_AD.to(dtype), weight_VD.to(dtype)
    chunk = max(1, LOGITS[device] // len(weight_VD))
    return _TokenLogprobs.apply(hidden_AD, weight_VD, targets_A[:, None], temperature, chunk)


class Policy(torch.nn.Module):
    """A causal language model, under tree attention, as the trainer calls it, and the root that
    FSDP shards: it gathers head and embedding before `forward` and keeps them until backward.
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
    """float32 logits [N, Y] of the ids as the next token of each prompt, differentiable, from the
    head's rows for these ids.
    """
    tree = Tree(prompts, [[]] * len(prompts), model.device)
    hidden_ND = forward(model, tree)[tree.last_P][: len(prompts)]
    return F.linear(hidden_ND, model.get_output_embeddings().weight[ids]).float()


EMPTY = (slice(0, 0), slice(0, 0))  # the micro-batch of a rank that has none left


def micro_batches(prompts, answers, max_tokens):
    """Cut a batch into micro-batches of whole groups, of at most max_tokens tokens or one group.

    Returns pairs of slices: of the prompts, and of the batch's packed answer tokens [A].
    """
    if not prompts:
        return []
    prefix = common_prefix_length(prompts)  # packed once in each micro-batch
    pairs = []
    start = first_token = token = 0  # of the micro-batch that is being filled
    used = prefix
    for i, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
        new = sum(map(len, group))
        need = len(prompt) - prefix + new
        if i > start and used + need > max_tokens:
            pairs.append((slice(start, i), slice(first_token, token)))
            start, first_token, used = i, token, prefix
        used += need
        token += new
    return [*pairs, (slice(start, len(prompts)), slice(first_token, token))]


# Sampling -----------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """Sampled answers.

    answers: P lists of G answers, each a list of ids, EOS included where it ended by itself.
    lengths_N: int64, tokens of each answer. ended_N: bool, False where cut at max_new_tokens.
    logprobs_A: float32, packed answer by answer: of each token under the distribution that it was
    drawn from. label_logits_AY: float32, the logits of label_ids at each token.
    """

    answers: list
    lengths_N: torch.Tensor
    ended_N: torch.Tensor
    logprobs_A: torch.Tensor
    label_logits_AY: torch.Tensor


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
    ids = []
    logprobs = []
    # On the CPU some rows at a time, so that the scratch stays in the cache.
    chunk = len(logits_RV) if logits_RV.is_cuda else max(1, 2**18 // logits_RV.shape[1])
    for logits_CV, uniforms_C in zip(logits_RV.split(chunk), uniforms_R.split(chunk), strict=True):
        probs_CV = torch.softmax(logits_CV.float() / (temperature or 1.0), -1)
        if temperature == 0:
            ids_C1 = logits_CV.argmax(-1, keepdim=True)
        else:
            cdf_CV = probs_CV.cumsum(-1, dtype=torch.float64)
            # Scaling by the last value instead of 1 keeps the draw inside, whatever the rounding.
            ends_C1 = uniforms_C[:, None] * cdf_CV[:, -1:]
            ids_C1 = torch.searchsorted(cdf_CV, ends_C1, right=True)
            ids_C1 = ids_C1.clamp(max=logits_RV.shape[1] - 1)
        ids.append(ids_C1[:, 0])
        logprobs.append(probs_CV.gather(1, ids_C1)[:, 0].log())
    return torch.cat(ids), torch.cat(logprobs)


class Decode:
    """Layout of a decoding step: every running answer, G a prompt at first, adds one token.

    tree: of the prefill, with its keys. The cache holds keys and values of each layer at three
    levels: the prefix [1, C, K, D], prompts [P, W, K, D] and answers [A, T, K, D].
    """

    def __init__(self, tree, group_size, max_new_tokens):
        device = tree.input_ids.device
        starts = tree.last_P.new_tensor([tree.prefix - 1])
        lengths = tree.last_P.diff(prepend=starts).tolist()
        packed = Sequences(lengths, device)
        self.max_position = tree.max_position + max_new_tokens
        self.widths = (tree.prefix, max(lengths), max_new_tokens)
        self.prompt_A = torch.arange(len(lengths), device=device).repeat_interleave(group_size)
        self.position_ids = tree.position_ids[:, tree.last_P[self.prompt_A]]
        self.input_ids = torch.zeros_like(self.position_ids)
        self.cache = {}
        for layer, keys_and_values in tree.keys.items():
            levels = ([], [], [])
            for x in keys_and_values:
                levels[0].append(_by_head(x[None, : tree.prefix]))
                levels[1].append(_by_head(packed.pad(x[tree.prefix :]).transpose(1, 2)))
                empty = x.new_zeros(len(self.prompt_A), max_new_tokens, *x.shape[1:])
                levels[2].append(_by_head(empty))
            self.cache[layer] = [*levels]
        self._arrange(lengths, 0)

    def _arrange(self, prompt_lengths, drawn):
        """The segments, as long as the same answers run. drawn: of each, tokens in the cache."""
        n = len(self.prompt_A)
        device = self.prompt_A.device
        prefix, prompt_width, answer_width = self.widths
        sizes = self.prompt_A.bincount().tolist()
        every = slice(None)
        self.prompt_keys = Slots(prompt_lengths, prompt_width, device)
        self.answer_keys = Slots([drawn] * n, answer_width, device)
        self.segments = [
            Segment(Sequences([n], device), Slots([prefix], prefix, device), every, every),
            Segment(Sequences(sizes, device), self.prompt_keys, every, every),
            Segment(Sequences([1] * n, device), self.answer_keys, every, every),
        ]
        self.graph = None

    def keep(self, rows_A):
        """Go on with some of the answers, and their prompts."""
        prompt_numbers, self.prompt_A = self.prompt_A[rows_A].unique(return_inverse=True)
        self.input_ids = self.input_ids[:, rows_A]
        self.position_ids = self.position_ids[:, rows_A]
        for levels in self.cache.values():
            levels[1] = [_by_head(x[prompt_numbers]) for x in levels[1]]
            levels[2] = [_by_head(x[rows_A]) for x in levels[2]]
        lengths = [self.prompt_keys.lengths[i] for i in prompt_numbers.tolist()]
        self._arrange(lengths, self.answer_keys.longest)

    def step(self, model, ids_A):
        """Feed each answer's newest token; hidden states [A, D]. On CUDA from a graph."""
        self.input_ids.copy_(ids_A[None])
        self.position_ids += 1
        self.answer_keys.grow()
        if not on_cuda(ids_A):
            return forward(model, self)
        if self.graph is None:
            hidden_AD = forward(model, self)  # allocates and tunes what a capture must not
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.hidden_AD = forward(model, self)
            return hidden_AD
        self.graph.replay()
        return self.hidden_AD

    def attend(self, layer, q_AHD, k_AKD, v_AKD, scale):
        """Keys and values enter the cache; returns the output [A, H, D]."""
        levels = self.cache[layer]
        for cached, new in zip(levels[2], (k_AKD, v_AKD), strict=True):
            cached.index_copy_(1, self.answer_keys.newest, new[:, None])
        parts = [(s, *kv) for s, kv in zip(self.segments, levels, strict=True) if s.keys.longest]
        return attend(q_AHD, parts, scale)[0]


def _by_head(x_nWKD):
    """For CPU's kernels, which take one head at a time, its keys side by side in memory."""
    if on_cuda(x_nWKD):
        return x_nWKD
    return x_nWKD.transpose(1, 2).contiguous().transpose(1, 2)


CACHE_TOKENS = 2**17


def prompts_at_once(prompts, group_size, max_new_tokens, cache_tokens):
    """How many prompts, with their groups of answers, the key-value cache has room for."""
    prefix = common_prefix_length(prompts)
    need = max(map(len, prompts)) - prefix + group_size * max_new_tokens
    if prefix + need > cache_tokens:
        raise BudgetError(
            f"cache_tokens is {cache_tokens}, and a group of {group_size} answers needs "
            f"{prefix + need}: raise it"
        )
    return (cache_tokens - prefix) // need


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
    label_ids=(),
    cache_tokens=CACHE_TOKENS,
):
    """Sample `group_size` answers to each prompt (lists of token ids); returns a Rollout.

    eos_id: the id, or a list of ids, that ends an answer. temperature 0 is greedy. Row n draws from
    uniforms of (seed, step, first_row + n), so its answer does not depend on who shares its batch,
    beyond rounding. label_ids: ids whose logits are kept at every token. The keys and values of at
    most `cache_tokens` tokens are held, from which follows how many prompts are answered at a time.
    Raises BudgetError, or ValueError without eos_id, in train mode, or for too long a prompt.
    """
    if eos_id is None or model.training:
        raise ValueError("sampling needs an eos_id, and the model in eval mode")
    context = model.config.get_text_config().max_position_embeddings
    need = max(map(len, prompts)) + max_new_tokens
    if need > context:
        raise ValueError(f"prompt and answer need {need} tokens, the context has {context}")
    fitting = prompts_at_once(prompts, group_size, max_new_tokens, cache_tokens)
    parts = []
    for start in range(0, len(prompts), fitting):
        part = prompts[start : start + fitting]
        first = first_row + start * group_size
        rows = range(first, first + len(part) * group_size)
        draws_NT = torch.from_numpy(uniforms(seed, step, rows, max_new_tokens)).to(model.device)
        parts.append(_sample_part(model, part, draws_NT, eos_id, temperature, label_ids))
    answers, *tensors = zip(*parts, strict=True)
    sampled = Rollout([*chain(*answers)], *map(torch.cat, tensors))
    if not sampled.logprobs_A.isfinite().all():
        raise FloatingPointError("the model's logits are not finite: its weights have diverged")
    return sampled


SMALLEST_GRAPH = 32  # answers: fewer take a GPU as long, and to capture a graph takes many steps


def _sample_part(model, prompts, draws_NT, eos_id, temperature, label_ids):
    """As many prompts as the cache has room for; returns the fields of a Rollout."""
    N, T = draws_NT.shape
    group_size = N // len(prompts)
    device = model.device
    head = model.get_output_embeddings()
    label_ids_Y = torch.tensor(label_ids, dtype=torch.long, device=device)
    eos_ids = torch.tensor(eos_id, device=device)
    # 1. Prefill the common prefix and the prompts: a tree without answers.
    tree = Tree(prompts, [[]] * len(prompts), device)
    tree.keys = {}
    hidden_AD = forward(model, tree)[tree.last_P].repeat_interleave(group_size, 0)
    decode = Decode(tree, group_size, T)
    tree.keys = None

    ids_NT = torch.zeros(N, T, dtype=torch.long, device=device)
    logprobs_NT = torch.zeros(N, T, device=device)
    label_logits_NTY = torch.zeros(N, T, len(label_ids), device=device)
    lengths_N = torch.full((N,), T, device=device)
    ended_N = torch.zeros(N, dtype=torch.bool, device=device)
    rows_A = torch.arange(N, device=device)  # the running answers
    for t in range(T):
        # 2. Draw a token for each.
        logits_AV = head(hidden_AD)
        ids_A, logprobs_A = fused(choose_tokens, logits_AV, draws_NT[rows_A, t], temperature)
        ids_NT[rows_A, t] = ids_A
        logprobs_NT[rows_A, t] = logprobs_A
        label_logits_NTY[rows_A, t] = logits_AV[:, label_ids_Y].float()
        had_ended_A = ended_N[rows_A]
        lengths_N[rows_A] = torch.where(had_ended_A, lengths_N[rows_A], t + 1)
        goes_on_A = ~had_ended_A & ~torch.isin(ids_A, eos_ids)
        ended_N[rows_A] = ~goes_on_A
        # 3. Run one step of all: to leave out those that ended, the cache is copied, so only where
        # enough have.
        count = int(goes_on_A.sum())
        if count == 0 or t + 1 == T:
            break
        limit = 0.75 * len(rows_A)
        if on_cuda(ids_A):  # where each size is a graph to capture
            limit = 0.5 * len(rows_A) if len(rows_A) > SMALLEST_GRAPH else 0
        if count <= limit:
            ids_A = ids_A[goes_on_A]
            rows_A = rows_A[goes_on_A]
            decode.keep(goes_on_A.nonzero()[:, 0])
        hidden_AD = decode.step(model, ids_A)

    is_token_NT = torch.arange(T, device=device) < lengths_N[:, None]
    rows = [row[:n] for row, n in zip(ids_NT.tolist(), lengths_N.tolist(), strict=True)]
    answers = [rows[i : i + group_size] for i in range(0, N, group_size)]
    return answers, lengths_N, ended_N, logprobs_NT[is_token_NT], label_logits_NTY[is_token_NT]


@dataclass
class Engine:
    """A model with what all its sampling has in common."""

    model: torch.nn.Module  # under tree attention
    eos_id: int | list
    label_ids: list
    max_new_tokens: int
    max_tokens: int = 2**15  # of one forward pass
    cache_tokens: int = CACHE_TOKENS

    def sample(self, prompts, **settings):
        """`sample`, with its other settings."""
        return sample(
            self.model,
            prompts,
            max_new_tokens=self.max_new_tokens,
            eos_id=self.eos_id,
            label_ids=self.label_ids,
            cache_tokens=self.cache_tokens,
            **settings,
        )

    def generate(self, prompts):
        """Greedy answers, lists of ids, and the label logits [T, Y] at each of their positions."""
        sampled = self.sample(prompts, temperature=0)
        answers = [answer for (answer,) in sampled.answers]
        return answers, sampled.label_logits_AY.cpu().split(sampled.lengths_N.tolist())

    @torch.no_grad()
    def label_logits(self, prompts):
        """float32 logits [N, Y] of the labels as the next token of each prompt, on the CPU."""
        logits = []
        for part, _ in micro_batches(prompts, [[]] * len(prompts), self.max_tokens):
            logits.append(next_token_logits(self.model, prompts[part], self.label_ids).cpu())
        return torch.cat(logits)


if __name__ == "__main__":  # python rollout.py --bench, or --check MODEL
    script = "families.py" if "--check" in sys.argv else "bench.py"
    runpy.run_path(str(Path(__file__).resolve().parent / "docs" / script), run_name="__main__")
