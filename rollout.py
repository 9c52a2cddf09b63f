"""Running the model so that every shared prefix is computed once.             (how is it run fast?)

Relevance prompts share a long criteria text, and the G answers of a group share their whole prompt.
A batch is a tree:

    common prefix  ->  P prompts  ->  N answers

Sampling prefills the prefix and each prompt once and decodes all answers against the shared keys;
training packs the tree into one row of tokens without padding, so the linear layers see every token
once. Attention is a single softmax over the scores against ancestors and own tokens: training and
prefill compute it with `attend`, decoding over its cache (`_Decode.attend`), and training on CUDA
is one FlexAttention call (`Tree.block_mask`). It is registered with transformers'
AttentionInterface under the name "tree" and runs decoder-only Hugging Face models unchanged.

    use_tree_attention(model)                     # once; refuses models that it cannot run
    sampled = sample(model, prompts, group_size=8, max_new_tokens=64, eos_id=2, seed=0, step=7)
    tree = Tree(prompts, sampled.answers, device)  # the same answers, packed for training
    logprobs_A, entropy_A = Policy(model)(tree, temperature=1.0)   # of every answer token

This file needs torch, numpy and transformers only; copy it alone.

Shapes: P prompts, G answers a prompt, N = P * G rows (answers), T answer positions, S packed
tokens, A answer tokens, Y labels, H attention heads, K key-value heads, R rows of one level,
L positions of a row, E = H / K query heads for each key-value head, B blocks and C keys of a
segment, D head size (for hidden states: model width), V vocabulary.
"""

import runpy
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Attention over a tree ----------------------------------------------------------------------------

# Devices with a fused kernel for `attend`. Elsewhere its scores are stored, so many at a time.
FUSED = {"cpu"}
SCORES = 2**28
# Devices where the packed tree is trained by torch's FlexAttention, one kernel over all levels.
FLEX = {"cuda"}


def attend(q_KRELD, segments, scale):
    """Attention of R rows of L queries over segments of keys, with one softmax over all of them.

    segments: triples (k_KBCD, v_KBCD, mask). B divides R, and each of the B blocks is shared by
    R / B consecutive rows, without a copy.
    mask: None (all visible); an additive mask [1, B, 1, C]; or "causal" (own tokens: B = R, C = L).
    Every query must see at least one key.
    Returns [K, R, E, L, D] in q's dtype; the softmax is in float32.
    """
    K, R, E, L, D = q_KRELD.shape
    if L > 1 and q_KRELD.device.type in FUSED:
        masks = [mask for *_, mask in segments]
        keys_values = [x for k, v, _ in segments for x in (k, v)]
        return _FusedAttend.apply(q_KRELD, scale, masks, *keys_values)
    sizes = [k.shape[2] for k, _, _ in segments]
    # Rows that share a block stay together.
    sharing = max(R // k.shape[1] if k.shape[1] > 1 else 1 for k, _, _ in segments)
    rows = max(1, SCORES // (K * E * L * sum(sizes)) // sharing) * sharing
    if rows < R:
        return _attend_in_parts(q_KRELD, segments, scale, rows)
    q_KRELD = q_KRELD * scale
    scores = []
    for k, _, mask in segments:
        B, C = k.shape[1], k.shape[2]
        segment = q_KRELD.reshape(K, B, -1, D) @ k.transpose(-1, -2)
        if isinstance(mask, torch.Tensor):
            segment = segment + mask
        segment = segment.view(K, R, E, L, C)
        if mask == "causal":
            segment = segment + torch.full((L, L), float("-inf"), device=k.device).triu(1)
        scores.append(segment)
    probs = torch.softmax(torch.cat(scores, -1), -1, dtype=torch.float32).to(q_KRELD.dtype)
    out = 0
    for (_, v, _), weights in zip(segments, probs.split(sizes, -1), strict=True):
        out = out + (weights.reshape(K, v.shape[1], -1, v.shape[2]) @ v).view(K, R, E, L, D)
    return out


@cache
def _compiled_flex_attention():
    return torch.compile(flex_attention)


def _attend_in_parts(q_KRELD, segments, scale, rows):
    """`attend` for `rows` rows at a time; the backward pass computes their scores again."""
    R = q_KRELD.shape[1]
    outs = []
    for start in range(0, R, rows):
        end = min(R, start + rows)
        part = []
        for k, v, mask in segments:
            B = k.shape[1]
            blocks = slice(None) if B == 1 else slice(start * B // R, end * B // R)
            if isinstance(mask, torch.Tensor):
                mask = mask[:, blocks]
            part.append((k[:, blocks], v[:, blocks], mask))
        outs.append(checkpoint(attend, q_KRELD[:, start:end], part, scale, use_reentrant=False))
    return torch.cat(outs, 1)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _FusedAttend(torch.autograd.Function):
    """`attend` on CPU for rows of several queries: a fused kernel a segment, and their merge.

    Scores are never stored. With lse over all segments, a segment's part of the probabilities is
    exp(score - lse), so the kernel's backward, given the merged output and lse, returns exactly
    this segment's gradients (as in ring attention).
    """

    @staticmethod
    def _views(mask, k, v, queries):
        """A segment as the kernel takes it: queries, k, v as [batch, heads, ...], causal, mask."""
        K, R, E, L = queries[0].shape[:4]
        B, C = k.shape[1:3]
        if isinstance(
            mask, str
        ):  # "causal", own keys: every query head of a row is a head for itself
            queries = [x.reshape(K, R * E, L, *x.shape[4:]) for x in queries]
            return queries, k.repeat_interleave(E, 1), v.repeat_interleave(E, 1), True, None
        if mask is not None:
            mask = mask.to(k.dtype).expand(K, B, R // B * E * L, C)
        queries = [x.reshape(K, B, R // B * E * L, *x.shape[4:]) for x in queries]
        return queries, k, v, False, mask

    @classmethod
    def forward(cls, ctx, q, scale, masks, *keys_values):
        """Attention to each segment, and their merge; keys_values: k and v, segment by segment."""
        outs = []
        lses = []
        for mask, k, v in zip(masks, keys_values[::2], keys_values[1::2], strict=True):
            (queries,), k, v, causal, mask = cls._views(mask, k, v, [q])
            out, lse = _flash(queries, k, v, 0.0, causal, attn_mask=mask, scale=scale)
            outs.append(out.reshape(q.shape))
            lses.append(lse.reshape(q.shape[:-1]))
        lse = torch.logsumexp(torch.stack(lses), 0)
        merged = 0
        for out, own_lse in zip(outs, lses, strict=True):
            merged = merged + out * (own_lse - lse).exp()[..., None].to(q.dtype)
        ctx.save_for_backward(q, merged, lse, *keys_values)
        ctx.scale = scale
        ctx.masks = masks
        return merged

    @classmethod
    def backward(cls, ctx, grad):
        """Exact gradients: each segment's kernel gets the merged output and log-sum-exp."""
        q, merged, lse, *keys_values = ctx.saved_tensors
        grad_q = 0
        grads = []
        for mask, k, v in zip(ctx.masks, keys_values[::2], keys_values[1::2], strict=True):
            views = cls._views(mask, k, v, [grad, q, merged, lse])
            (own_grad, own_q, out, total), keys, values, causal, mask = views
            arguments = (own_grad, own_q, keys, values, out, total, 0.0, causal)
            dq, dk, dv = _flash_backward(*arguments, attn_mask=mask, scale=ctx.scale)
            grad_q = grad_q + dq.reshape(q.shape)
            for d in (dk, dv):
                grads.append(d.unflatten(1, (k.shape[1], -1)).sum(2))  # over heads that share a key
        return grad_q, None, None, *grads


def tree_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, tree=None, **kwargs
):
    """What transformers' attention layers call: query [1, H, S, D], key and value [1, K, S, D].

    `tree` holds the layout (and, when sampling, the cache); it travels through the model's forward
    as a keyword argument.
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
    out_SHD = tree.attend(module.layer_idx, query[0], key[0], value[0], scale)
    return out_SHD[None], None


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


def _padding_mask(lengths_B, width):
    """Additive mask [1, B, 1, width]: 0 for the first lengths_B[b] keys of block b, -inf behind."""
    hidden = torch.arange(width, device=lengths_B.device) >= lengths_B[:, None]
    mask = torch.zeros(hidden.shape, device=hidden.device)
    return mask.masked_fill(hidden, float("-inf"))[None, :, None]


def _check_prompts(prompts):
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("every prompt needs at least one token; got an empty prompt or no prompts")


# Training: the packed tree ------------------------------------------------------------------------


class Tree:
    """The packed layout of one batch for training: common prefix, prompts, answers in a row [1, S].

    prompts: P lists of token ids. answers: for each prompt the list of its answers, each a list of
    at least one id. A prompt with a single answer is packed with it as one row of the prompt level.
    Without any prompt it is a dummy of one token, which runs forward and backward with A = 0 answer
    tokens: for a rank that has no work while others have.

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
        ids = list(prompts[0][:C])
        positions = list(range(C))
        # Of each packed token: its prompt and answer, from 1; 0 where it belongs to all.
        owners = [(0, 0)] * C
        prompt_rows, shared_rows, answer_rows = [], [], []
        predict, targets = [], []

        def add(tokens, position, prompt, answer):
            start = len(ids)
            ids.extend(tokens)
            owners.extend([(prompt, answer)] * len(tokens))
            positions.extend(range(position, position + len(tokens)))
            return range(start, len(ids))

        group = max(map(len, answers))  # 0 for the dummy
        for number, (prompt, prompt_answers) in enumerate(zip(prompts, answers, strict=True), 1):
            single = len(prompt_answers) == 1
            own = list(prompt[C:])
            if single:
                own += prompt_answers[0][:-1]
            row = add(own, C, number, 0)
            prompt_rows.append(row)
            last = row[len(prompt) - C - 1]
            if not single:
                shared_rows.append(row)
                # Empty rows, so that all groups have the same size.
                answer_rows += [range(0)] * (group - len(prompt_answers))
            for answer in prompt_answers:
                # The last token is only predicted, never fed; the first is predicted by the
                # prompt's last token.
                if single:
                    own = range(last + 1, last + len(answer))
                else:
                    own = add(answer[:-1], len(prompt), number, len(answer_rows) + 1)
                    answer_rows.append(own)
                predict += [last, *own]
                targets += answer
        self.prefix = C
        self.max_position = max(positions) + 1
        as_tensor = lambda values: torch.tensor(values, dtype=torch.long, device=device)
        self.input_ids = as_tensor(ids)[None]
        self.position_ids = as_tensor(positions)[None]
        self.predict_A = as_tensor(predict)
        self.targets_A = as_tensor(targets)
        self.prompt_S, self.answer_S = as_tensor(owners).T.contiguous()
        self._index_levels(prompt_rows, shared_rows, answer_rows, len(ids), as_tensor)

    def _index_levels(self, prompt_rows, shared_rows, answer_rows, size, as_tensor):
        """Padded index tables of the lower levels, and where each packed token's output stands."""

        def padded(rows):
            width = max(map(len, rows), default=0)
            return as_tensor([[*row] + [0] * (width - len(row)) for row in rows]) if width else None

        self.prompts_RL = padded(prompt_rows)
        self.shared_RL = padded(shared_rows)
        self.answers_RL = padded(answer_rows)
        offset = self.prefix
        place = [*range(self.prefix)] + [0] * (size - self.prefix)
        for rows, table in ((prompt_rows, self.prompts_RL), (answer_rows, self.answers_RL)):
            if table is not None:
                for r, row in enumerate(rows):
                    at = offset + r * table.shape[1]
                    place[row.start : row.stop] = range(at, at + len(row))
                offset += table.numel()
        self.unpack_S = as_tensor(place)
        if shared_rows:
            lengths_R = as_tensor([len(row) for row in shared_rows])
            self.shared_mask = _padding_mask(lengths_R, self.shared_RL.shape[1])

    @cached_property
    def block_mask(self):
        """FlexAttention's mask: a token sees prefix, own prompt, own answer, up to itself."""
        prompt_S = self.prompt_S
        answer_S = self.answer_S
        S = len(prompt_S)

        def visible(batch, head, query, key):
            its_prompt = (prompt_S[key] == 0) | (prompt_S[key] == prompt_S[query])
            its_answer = (answer_S[key] == 0) | (answer_S[key] == answer_S[query])
            return (key <= query) & its_prompt & its_answer

        return create_block_mask(visible, None, None, S, S, device=prompt_S.device)

    def attend(self, layer, q_HSD, k_KSD, v_KSD, scale):
        """Attention of all packed tokens at once; returns [S, H, D]."""
        if q_HSD.device.type in FLEX:
            kernel = _compiled_flex_attention() if q_HSD.device.type == "cuda" else flex_attention
            # Under autocast, norms leave queries and keys in float32 and values in bfloat16.
            q, k, v = (x[None].to(v_KSD.dtype) for x in (q_HSD, k_KSD, v_KSD))
            out = kernel(q, k, v, block_mask=self.block_mask, scale=scale, enable_gqa=True)
            return out[0].transpose(0, 1)
        H, _, D = q_HSD.shape
        K = len(k_KSD)
        C = self.prefix
        prefix = [(k_KSD[:, None, :C], v_KSD[:, None, :C], None)] if C else []

        def rows(x_KSD, table):
            return x_KSD.index_select(1, table.flatten()).view(K, *table.shape, D)

        def level(table, ancestors):
            R, L = table.shape
            q_HRL = q_HSD.index_select(1, table.flatten())
            q_KRELD = q_HRL.view(K, H // K, R, L, D).transpose(1, 2)
            own = (rows(k_KSD, table), rows(v_KSD, table), "causal")
            out = attend(q_KRELD, [*ancestors, own], scale)
            return out.permute(1, 3, 0, 2, 4).reshape(R * L, H, D)

        outs = []
        if C:
            first = F.scaled_dot_product_attention(
                q_HSD[None, :, :C],
                k_KSD[None, :, :C],
                v_KSD[None, :, :C],
                is_causal=True,
                scale=scale,
                enable_gqa=True,
            )
            outs.append(first[0].transpose(0, 1))
        outs.append(level(self.prompts_RL, prefix))
        if self.answers_RL is not None:
            shared = (rows(k_KSD, self.shared_RL), rows(v_KSD, self.shared_RL), self.shared_mask)
            outs.append(level(self.answers_RL, [*prefix, shared]))
        return torch.cat(outs).index_select(0, self.unpack_S)


def answer_hidden(model, tree):
    """Hidden states [A, D] that predict the answer tokens, from one forward over the packed tree,
    with exact gradients.
    """
    out = model.base_model(
        input_ids=tree.input_ids, position_ids=tree.position_ids, tree=tree, use_cache=False
    )
    return out.last_hidden_state[0].index_select(0, tree.predict_A)


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


def token_logprobs(hidden_AD, head, targets_A, temperature=1.0, chunk=None):
    """Log-probabilities and entropies under softmax(head(hidden) / temperature), float32 [A].

    head: the model's output layer, a torch.nn.Linear. Runs in chunks of `chunk` positions (by
    default so many that a chunk has 2**24 logits) that are computed again in the backward pass, so
    [A, vocabulary] never exists. The entropies carry no gradient; they are a statistic.
    """
    chunk = chunk or max(1, 2**24 // head.weight.shape[0])
    device = hidden_AD.device.type
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
    pairs = []
    start = used = 0  # of the micro-batch that is being filled: its first prompt, its tokens
    first_token = token = 0  # its first answer token; the answer tokens so far
    for i, (prompt, group) in enumerate(zip(prompts, answers, strict=True)):
        new = sum(map(len, group))
        need = len(prompt) + new
        if used and used + need > max_tokens:
            pairs.append((slice(start, i), slice(first_token, token)))
            start, first_token, used = i, token, 0
        used += need
        token += new
    if used:
        pairs.append((slice(start, len(prompts)), slice(first_token, token)))
    return pairs


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
    # On the CPU some rows at a time, so that the scratch stays in the cache: several times faster.
    rows = len(logits_RV)
    if logits_RV.device.type == "cpu":
        rows = max(1, 2**18 // logits_RV.shape[1])
    ids, logprobs = [], []
    for logits_CV, uniforms_C in zip(logits_RV.split(rows), uniforms_R.split(rows), strict=True):
        logits_CV = logits_CV.float()
        if temperature not in (0, 1):
            logits_CV = logits_CV / temperature
        logps_CV = torch.log_softmax(logits_CV, -1)
        if temperature == 0:
            ids_C = logps_CV.argmax(-1)
        else:
            cdf_CV = logps_CV.exp().double().cumsum(-1)
            # Scaling by the last value instead of 1 keeps the draw inside, whatever the rounding.
            ends_C1 = (uniforms_C * cdf_CV[:, -1])[:, None]
            ids_C = torch.searchsorted(cdf_CV, ends_C1, right=True)[:, 0]
            ids_C = ids_C.clamp(max=logits_CV.shape[-1] - 1)
        ids.append(ids_C)
        logprobs.append(logps_CV.gather(-1, ids_C[:, None])[:, 0])
    return torch.cat(ids), torch.cat(logprobs)


class _Prefill:
    """Layout of a prefill: R rows packed in one [1, S], each seeing `ancestors` and, causally,
    itself; keeps their keys.
    """

    def __init__(self, rows, start, ancestors, device):
        as_tensor = lambda values: torch.tensor(values, dtype=torch.long, device=device)
        lengths = [len(row) for row in rows]
        width = max(lengths)
        starts = np.cumsum([0, *lengths])[:-1].tolist()
        positions = [start + i for length in lengths for i in range(length)]
        self.ancestors = ancestors
        self.keys_values = []
        self.input_ids = as_tensor([token for row in rows for token in row])[None]
        self.position_ids = as_tensor(positions)[None]
        self.max_position = start + width
        self.lengths_R = as_tensor(lengths)
        self.last_R = as_tensor(starts) + self.lengths_R - 1
        self.table_RL = as_tensor(
            [[*range(s, s + n)] + [s] * (width - n) for s, n in zip(starts, lengths, strict=True)]
        )
        self.cells_S = as_tensor(
            [r * width + i for r, length in enumerate(lengths) for i in range(length)]
        )

    def attend(self, layer, q_HSD, k_KSD, v_KSD, scale):
        """Attention of all prefilled rows; keeps their keys and values. Returns [S, H, D]."""
        H, _, D = q_HSD.shape
        R, L = self.table_RL.shape
        K = len(k_KSD)
        index = self.table_RL.flatten()
        keys = k_KSD.index_select(1, index).view(K, R, L, D)
        values = v_KSD.index_select(1, index).view(K, R, L, D)
        self.keys_values.append((keys, values))
        q_KRELD = q_HSD.index_select(1, index).view(K, H // K, R, L, D).transpose(1, 2)
        segments = [(*pair, None) for pair in self.ancestors[layer : layer + 1]]
        segments.append((keys, values, "causal"))
        out = attend(q_KRELD, segments, scale)
        return out.permute(1, 3, 0, 2, 4).reshape(R * L, H, D).index_select(0, self.cells_S)


class _Decode:
    """Layout and cache of decoding, for A active rows that each add one token.

    A row's own keys are in its place. Its prompt's keys are in a slot, shared by the G rows that
    sit there: seat slot * G + g. Places are free again when a row ends, slots when the last of its
    rows does.
    """

    def __init__(self, prefix_cache, slots, places, group_size, prompt_width, max_position, device):
        self.prefix_cache = prefix_cache
        self.slots = slots
        self.places = places
        self.group_size = group_size
        self.prompt_width = prompt_width
        self.max_position = max_position
        self.width = 0  # of the cache of own keys
        self.buffers = []  # of each layer: prompts' keys and values, own keys and values
        self.prompt_mask_SC = torch.full((slots, prompt_width), float("-inf"), device=device)

    def store_prompts(self, slots_P, prefill):
        """Write the prefilled prompts' keys and values into the given slots."""
        if not self.buffers:
            for keys, _ in prefill.keys_values:
                K, _, _, D = keys.shape
                of_prompts = keys.new_zeros(2, K, self.slots, self.prompt_width, D)
                own = keys.new_zeros(2, K, self.places, 0, D)
                self.buffers.append([*of_prompts, *own])
        width = prefill.table_RL.shape[1]
        for (keys, values), buffers in zip(prefill.keys_values, self.buffers, strict=True):
            prompt_k, prompt_v, _, _ = buffers
            prompt_k[:, slots_P, :width] = keys
            prompt_v[:, slots_P, :width] = values
        self.prompt_mask_SC[slots_P] = _padding_mask(prefill.lengths_R, self.prompt_width)[0, :, 0]

    def grow(self, tokens, limit):
        """Make room for answers of `tokens` tokens. Widths double, so that a step has few shapes
        and no slice of a buffer: matrix products copy their operands unless these are whole.
        """
        if tokens > self.width:
            self.width = min(limit, max(16, 2 * self.width))
            for buffers in self.buffers:
                buffers[2:] = [F.pad(x, (0, 0, 0, self.width - x.shape[2])) for x in buffers[2:]]

    def prepare(self, places_A, seats_A, written_A):
        """Set who takes part in the next step: places, seats, and tokens already in the cache."""
        self.places_A = places_A
        self.seats_A = seats_A
        self.written_A = written_A
        own_AC = _padding_mask(written_A + 1, self.width)[0, :, 0]
        self.mask_AC = torch.cat([self.prompt_mask_SC[seats_A // self.group_size], own_AC], 1)

    def attend(self, layer, q_HAD, k_KAD, v_KAD, scale):
        """Keys and values enter the cache; queries see prefix, prompt and answer: [A, H, D]."""
        H, A, D = q_HAD.shape
        K = len(k_KAD)
        seats = self.slots * self.group_size
        places = self.places
        prompt_k, prompt_v, own_k, own_v = self.buffers[layer]
        own_k[:, self.places_A, self.written_A] = k_KAD
        own_v[:, self.places_A, self.written_A] = v_KAD
        q_KAED = (q_HAD * scale).view(K, H // K, A, D).transpose(1, 2)

        def spread(x_KAEC, index_A, rows):  # active rows to where their keys are
            return x_KAEC.new_zeros(K, rows, *x_KAEC.shape[2:]).index_copy_(1, index_A, x_KAEC)

        def product(x_KREC, y_KBCD):  # B blocks of keys or values, each for R / B rows
            blocks = x_KREC.reshape(K, y_KBCD.shape[1], -1, x_KREC.shape[3])
            return (blocks @ y_KBCD).view(K, -1, H // K, y_KBCD.shape[3])

        by_prompt = product(spread(q_KAED, self.seats_A, seats), prompt_k.mT)
        by_prompt = by_prompt.index_select(1, self.seats_A)
        by_place = product(spread(q_KAED, self.places_A, places), own_k.mT)
        by_place = by_place.index_select(1, self.places_A)
        scores = torch.cat([by_prompt, by_place], -1).add_(self.mask_AC[:, None].to(q_HAD.dtype))
        for prefix_k, _ in self.prefix_cache[layer : layer + 1]:
            scores = torch.cat([scores, product(q_KAED, prefix_k.mT)], -1)
        probs = torch.softmax(scores, -1)  # computed in float32 whatever the dtype
        sizes = [self.prompt_width, self.width]
        prompt_p, own_p, prefix_p = probs.split([*sizes, probs.shape[3] - sum(sizes)], -1)
        out = product(spread(prompt_p, self.seats_A, seats), prompt_v).index_select(1, self.seats_A)
        out += product(spread(own_p, self.places_A, places), own_v).index_select(1, self.places_A)
        for _, prefix_v in self.prefix_cache[layer : layer + 1]:
            out += product(prefix_p, prefix_v)
        return out.permute(1, 0, 2, 3).reshape(A, H, D)


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


def fit_rows(prompts, group_size, max_new_tokens, cache_tokens):
    """How many rows decode at a time, in how many prompts' slots, within cache_tokens.

    Groups end row by row; slots for twice as many groups as there is room for keep the places full
    meanwhile.
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


# Prefilled at a time, padding of the attention counted: bounds the memory of a prefill.
PREFILL_TOKENS = 8192


class _Sampler:
    """The state of one call of `sample`: what is drawn (by row), who decodes (by place), cache."""

    def __init__(
        self,
        model,
        prompts,
        group_size,
        max_new_tokens,
        eos_id,
        temperature,
        draws_NT,
        cache_tokens,
        graphs,
        label_ids=None,
    ):
        device = model.device
        N, T, G = len(draws_NT), max_new_tokens, group_size
        self.model = model
        self.prompts = prompts
        self.eos_id = eos_id
        self.temperature = temperature
        self.group_size = G
        self.graphs = {} if graphs and device.type == "cuda" else None
        places, slots = fit_rows(prompts, G, T, cache_tokens)
        # One row, place and slot more than there are: the idle rows of a padded step write there,
        # nobody reads it.
        self.ids_NT = torch.zeros(N + 1, T, dtype=torch.long, device=device)
        self.logprobs_NT = torch.zeros(N + 1, T, device=device)
        self.label_ids_Y = self.label_logits_NTY = None
        if label_ids is not None:
            self.label_ids_Y = torch.tensor(label_ids, device=device)
            self.label_logits_NTY = torch.zeros(N + 1, T, len(label_ids), device=device)
        self.lengths_N = torch.zeros(N + 1, dtype=torch.long, device=device)
        self.ended_N = torch.zeros(N + 1, dtype=torch.bool, device=device)
        self.draws_NT = torch.cat([draws_NT, draws_NT[:1]])
        self.waiting = 0  # the next prompt to be admitted
        self.active = {}  # places at work, the oldest first: the time at which each began
        self.time = 0  # decoding steps so far
        self.free_places = [*range(places)]
        self.free_slots = [*range(slots)]
        self.slot_of = [0] * places
        self.left = [0] * slots  # rows at work in each slot
        # Of each place: its output row, its seat, its prompt's length.
        self.row = torch.full((places + 1,), N, device=device)
        self.seat = torch.full((places + 1,), slots * G, device=device)
        self.prompt_length = torch.zeros(places + 1, dtype=torch.long, device=device)
        self.prefix = common_prefix_length(prompts)
        prefix_cache = []  # of each layer: keys and values
        for start in range(0, self.prefix, PREFILL_TOKENS):
            chunk = prompts[0][start : min(self.prefix, start + PREFILL_TOKENS)]
            new = self.prefill([chunk], start, prefix_cache).keys_values
            if prefix_cache:
                # [2, K, 1, C, D] of each layer, behind what is there already.
                layers = zip(prefix_cache, new, strict=True)
                new = [torch.cat([torch.stack(a), torch.stack(b)], 3).unbind() for a, b in layers]
            prefix_cache = new
        own = max(map(len, prompts)) - self.prefix
        longest = self.prefix + own + T
        self.decode = _Decode(prefix_cache, slots + 1, places + 1, G, own, longest, device)
        self.quantum = max(1, places // G // 8)

    def forward(self, input_ids, position_ids, layout):
        out = self.model.base_model(
            input_ids=input_ids, position_ids=position_ids, tree=layout, use_cache=False
        )
        return out.last_hidden_state[0]

    def prefill(self, rows, start, ancestors):
        layout = _Prefill(rows, start, ancestors, self.model.device)
        layout.hidden_SD = self.forward(layout.input_ids, layout.position_ids, layout)
        return layout

    def room(self):
        """How many waiting prompts are to be admitted now."""
        left = len(self.prompts) - self.waiting
        groups = min(len(self.free_places) // self.group_size, len(self.free_slots), left)
        # A prefill for few prompts is nearly as slow as one for many: wait until an eighth of the
        # places are free.
        if self.active and groups < min(self.quantum, left):
            return 0
        return min(groups, max(1, PREFILL_TOKENS // self.decode.prompt_width))

    def admit(self, groups):
        """Prefill waiting prompts into free slots and draw their answers' first tokens."""
        G = self.group_size
        device = self.model.device
        as_tensor = lambda values: torch.tensor(values, dtype=torch.long, device=device)
        chosen = range(self.waiting, self.waiting + groups)
        slots, self.free_slots = self.free_slots[:groups], self.free_slots[groups:]
        places, self.free_places = self.free_places[: groups * G], self.free_places[groups * G :]
        rows = [self.prompts[p][self.prefix :] for p in chosen]
        prefill = self.prefill(rows, self.prefix, self.decode.prefix_cache)
        self.decode.store_prompts(as_tensor(slots), prefill)
        for i, place in enumerate(places):
            self.active[place] = self.time
            self.slot_of[place] = slots[i // G]
            self.left[slots[i // G]] += 1
        places_A = as_tensor(places)
        self.row[places_A] = torch.arange(chosen.start * G, chosen.stop * G, device=device)
        self.seat[places_A] = as_tensor([slot * G + g for slot in slots for g in range(G)])
        self.prompt_length[places_A] = (self.prefix + prefill.lengths_R).repeat_interleave(G)
        self.waiting = chosen.stop
        hidden_AD = prefill.hidden_SD[prefill.last_R].repeat_interleave(G, 0)
        self.leave(places, self.draw(places_A, hidden_AD))

    def choose(self, logits_AV, draws_A):
        return choose_tokens(logits_AV, draws_A, self.temperature)

    def draw(self, places_A, hidden_AD):
        """Draw the next token of each place; returns which rows are done, [A] booleans."""
        rows = self.row[places_A]
        T = self.ids_NT.shape[1]
        at = self.lengths_N[rows].clamp(max=T - 1)  # the clamp is for idle rows
        logits_AV = self.model.get_output_embeddings()(hidden_AD)
        ids, logps = self.choose(logits_AV, self.draws_NT[rows, at])
        if self.label_ids_Y is not None:
            self.label_logits_NTY[rows, at] = logits_AV[:, self.label_ids_Y].float()
        self.ids_NT[rows, at] = ids
        self.logprobs_NT[rows, at] = logps
        self.lengths_N[rows] = at + 1
        self.ended_N[rows] = ids == self.eos_id
        return (ids == self.eos_id) | (at + 1 == T)

    def leave(self, places, done_A):
        """Free the places of the rows that are done, and the slots of groups without rows."""
        for place, done in zip(places, done_A.tolist(), strict=False):
            if done:
                slot = self.slot_of[place]
                self.left[slot] -= 1
                self.free_places.append(place)
                if not self.left[slot]:
                    self.free_slots.append(slot)
                del self.active[place]

    def decode_one(self, places_A):
        """One token a place; of fixed shape, without a look at values: for CUDA graphs."""
        rows = self.row[places_A]
        written = self.lengths_N[rows] - 1
        written = written.clamp(min=0, max=self.decode.width - 1)  # for idle rows
        self.decode.prepare(places_A, self.seat[places_A], written)
        position_ids = (self.prompt_length[places_A] + written)[None]
        input_ids = self.ids_NT[rows, written][None]
        return self.draw(places_A, self.forward(input_ids, position_ids, self.decode))

    def decode_in_graph(self, places):
        """`decode_one` from a CUDA graph: one for each power of two of rows and cache width."""
        size = 1 << (len(places) - 1).bit_length()
        idle = self.decode.places - 1
        if size not in self.graphs:
            places_A = torch.full((size,), idle, device=self.model.device)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                # Of idle rows: it allocates and tunes what a capture must not.
                self.decode_one(places_A)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                done_A = self.decode_one(places_A)
            self.graphs[size] = graph, places_A, done_A
        graph, places_A, done_A = self.graphs[size]
        places_A.copy_(torch.tensor(places + [idle] * (size - len(places))))
        graph.replay()
        return done_A

    def step(self):
        """Admit prompts where there is room, else decode one token of every active row."""
        if groups := self.room():
            self.admit(groups)
            return
        places, self.time = [*self.active], self.time + 1
        longest = self.time - self.active[places[0]]  # tokens in the cache after this step
        if longest > self.decode.width:
            self.decode.grow(longest, self.ids_NT.shape[1])
            if self.graphs:
                self.graphs.clear()
        if self.graphs is None:
            done_A = self.decode_one(torch.tensor(places, device=self.model.device))
        else:
            done_A = self.decode_in_graph(places)
        self.leave(places, done_A)

    def run(self):
        """Answer all prompts."""
        while self.waiting < len(self.prompts) or self.active:
            self.step()


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
    cache_tokens=2**17,
    cuda_graphs=True,
):
    """Sample `group_size` answers to each prompt (lists of token ids); returns a Rollout.

    temperature 0 is greedy. Row n draws from uniforms of (seed, step, first_row + n), so its answer
    does not depend on who shares its batch, beyond rounding. label_ids: ids whose logits are kept
    at every position. The key-value cache holds at most `cache_tokens` tokens, from which follows
    how many rows decode at a time; waiting prompts take the places of finished rows. On a GPU the
    decoding step runs from CUDA graphs unless cuda_graphs is False.
    Raises ValueError for empty prompts, budgets that fit nothing, a missing eos_id, dropout, or too
    long a prompt.
    """
    _check_sample(model, prompts, group_size, max_new_tokens, eos_id)
    N = len(prompts) * group_size
    if temperature:
        draws_NT = uniforms(seed, step, range(first_row, first_row + N), max_new_tokens)
    else:
        draws_NT = np.zeros((N, 1))  # nothing is drawn
    draws_NT = torch.from_numpy(draws_NT).to(model.device).expand(N, max_new_tokens)
    sampler = _Sampler(
        model,
        prompts,
        group_size,
        max_new_tokens,
        eos_id,
        temperature,
        draws_NT,
        cache_tokens,
        cuda_graphs,
        label_ids,
    )
    sampler.run()
    lengths_N = sampler.lengths_N[:N]
    lengths = lengths_N.tolist()
    rows = [row[:n] for row, n in zip(sampler.ids_NT[:N].tolist(), lengths, strict=True)]
    answers = [rows[i : i + group_size] for i in range(0, N, group_size)]
    is_token_NT = torch.arange(max_new_tokens, device=model.device) < lengths_N[:, None]
    label_logits_AY = None
    if label_ids is not None:
        label_logits_AY = sampler.label_logits_NTY[:N][is_token_NT]
    logprobs_A = sampler.logprobs_NT[:N][is_token_NT]
    return Rollout(answers, lengths_N, sampler.ended_N[:N], logprobs_A, label_logits_AY)


class Engine:
    """Greedy answers and label logits for many prompts, with shared prefixes computed once.

    model: under tree attention. max_tokens: token budget of one forward pass; cache_tokens: as in
    `sample`.
    """

    def __init__(
        self, model, eos_id, label_ids, max_new_tokens, max_tokens=2**15, cache_tokens=2**17
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
