"""Teacher -> student on logits.                                                                     (how is it served?)

The large model that reinforcement learning made is too slow to judge every pair; a light student answers in its place.
Two losses teach it, and both compare distributions, not sampled text:

    loss = label_kd_loss(student_logits_NY, teacher_probs_NY, gold_N, temperature=2.0, gold_weight=0.1)
    loss = token_kd_loss(student_hidden_AD, student.lm_head, teacher_hidden_AE, teacher.lm_head, kind="forward")

Prefer the first: it needs one distribution over the labels for each pair and leaves the student's reasoning text alone.
R3A (arXiv 2508.02506) reports a 1.5B student trained only on the teacher's score-label logits that beats a 7B model
after SFT, and LORE (arXiv 2512.03025) warns that distilling the reasoning text lowers pass@1. The second is for
students that must also write the explanation.

Where the parts come from:
- temperature on both sides, the factor temperature**2 and the average with the gold label: Hinton et al. 2015
  (arXiv 1503.02531);
- forward, reverse and generalised Jensen-Shannon divergence for each token: GKD (arXiv 2306.13649);
- ours: the gold label is mixed in only where a pair has one; the Jensen-Shannon divergence is rescaled so that it does
  not vanish at its ends; the factor temperature**2 also for tokens.

This file needs torch only; copy it alone.

Shapes: N pairs, Y labels, A answer positions (those that predict an answer token, over all answers of a batch), D width
of the student, E width of the teacher, V vocabulary that student and teacher have in common.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

UNLABELLED = -100  # what torch's cross-entropy ignores


def _at_least_float32(x):
    """bfloat16 and float16 become float32; float64 stays, so that gradients can be checked exactly."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_temperature(temperature):
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; give a finite number above 0")


# Labels: one distribution for each pair -------------------------------------------------------------------------------


def _check_labels(student_logits_NY, teacher_probs_NY, gold_N, temperature, gold_weight):
    shape, teacher_shape, gold_shape = (tuple(x.shape) for x in (student_logits_NY, teacher_probs_NY, gold_N))
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"student_logits_NY has shape {shape}; give [pairs, labels] with at least two labels")
    if teacher_shape != shape:
        raise ValueError(f"teacher_probs_NY has shape {teacher_shape}; give the student's shape {shape}")
    if gold_shape != shape[:1] or gold_N.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"gold_N is {gold_N.dtype} of shape {gold_shape}; give int64 of shape {shape[:1]}")
    if not (((gold_N >= 0) & (gold_N < shape[1])) | (gold_N == UNLABELLED)).all():
        raise ValueError(f"gold_N must hold label indices 0..{shape[1] - 1}, or {UNLABELLED} for an unlabelled pair")
    if not student_logits_NY.isfinite().all():
        raise ValueError("student_logits_NY holds NaN or infinity; give the logits of the labels only, unmasked")
    # The tolerance lets probabilities in bfloat16 pass and stops logits, log-probabilities and unnormalised slices.
    sums_N = _at_least_float32(teacher_probs_NY).sum(-1)
    if not ((teacher_probs_NY >= 0).all() and ((sums_N - 1).abs() < 1e-2).all()):
        raise ValueError("teacher_probs_NY must be probabilities; softmax the teacher's logits over the labels")
    _check_temperature(temperature)
    if not 0 <= gold_weight <= 1:
        raise ValueError(f"gold_weight is {gold_weight}; give a number from 0 (teacher) to 1 (gold, where known)")


def label_kd_loss(student_logits_NY, teacher_probs_NY, gold_N, temperature=1.0, gold_weight=0.0):
    """KL(teacher || student) over the labels, mixed with the cross-entropy on the gold label where there is one.

    student_logits_NY [N, Y] float: the student's logits of the Y labels, finite. teacher_probs_NY [N, Y] float:
    probabilities at temperature 1; zeros are allowed; no gradient flows into them. gold_N [N] int64: index of the gold
    label, or -100. Computed in float32 (float64 if either input is).

    The KL term is taken at `temperature` on both sides: the teacher becomes p**(1/T), normalised. It is multiplied by
    temperature**2, so that its gradient keeps its size as the temperature rises (Hinton et al. 2015). A labelled pair
    counts (1 - gold_weight) * KL + gold_weight * cross-entropy, the latter at temperature 1; an unlabelled pair counts
    its whole KL. Returns the mean over the N pairs, a scalar; 0, with zero gradient, for no pairs. For several
    micro-batches or ranks, weight each by its share of the pairs.

    Raises ValueError on shapes that differ, gold labels out of range, logits that are not finite, rows of
    teacher_probs_NY that are not probabilities, temperature <= 0 and gold_weight outside [0, 1].
    """
    _check_labels(student_logits_NY, teacher_probs_NY, gold_N, temperature, gold_weight)
    dtype = torch.promote_types(student_logits_NY.dtype, teacher_probs_NY.dtype)
    logits_NY = _at_least_float32(student_logits_NY.to(dtype))
    # log(0) = -inf becomes 0 again in the softmax, and kl_div reads 0 * log(0) as 0.
    teacher_NY = torch.softmax(teacher_probs_NY.detach().to(logits_NY.dtype).log() / temperature, -1)
    kd_NY = F.kl_div(torch.log_softmax(logits_NY / temperature, -1), teacher_NY, reduction="none")
    kd_N = temperature**2 * kd_NY.sum(-1)
    # An unlabelled pair has cross-entropy 0 here and weight 0 below: no mean over labelled pairs, so no 0 / 0.
    gold_loss_N = F.cross_entropy(logits_NY, gold_N.long(), ignore_index=UNLABELLED, reduction="none")
    gold_weight_N = gold_weight * (gold_N != UNLABELLED).to(kd_N.dtype)
    return ((1 - gold_weight_N) * kd_N + gold_weight_N * gold_loss_N).sum() / max(len(gold_N), 1)


# Tokens: one distribution over the vocabulary for each answer position ------------------------------------------------


def _divergence(log_q_AV, log_p_AV, kind, beta):
    """[A] divergences between student q and teacher p, given log-probabilities. See token_kd_loss."""
    log_ratio_AV = log_p_AV - log_q_AV
    if kind == "forward":
        return (log_p_AV.exp() * log_ratio_AV).sum(-1)
    if kind == "reverse":
        return -(log_q_AV.exp() * log_ratio_AV).sum(-1)
    # m = beta p + (1 - beta) q. log(m / q) is of size beta: taken as log((1 - beta) + beta p / q) it keeps its digits
    # in float32, where log m - log q would lose them to the division by beta below. Likewise log(m / p) near beta 1.
    log_beta, log_rest = log_ratio_AV.new_full((), math.log(beta)), log_ratio_AV.new_full((), math.log1p(-beta))
    log_m_over_q_AV = torch.logaddexp(log_rest, log_beta + log_ratio_AV)
    log_m_over_p_AV = torch.logaddexp(log_beta, log_rest - log_ratio_AV)
    # [beta KL(p || m) + (1 - beta) KL(q || m)] / (beta (1 - beta))
    terms_AV = log_p_AV.exp() * log_m_over_p_AV / (1 - beta) + log_q_AV.exp() * log_m_over_q_AV / beta
    return -terms_AV.sum(-1)


def _check_tokens(student_hidden_AD, teacher_hidden_AE, weights_A, kind, beta, temperature, denominator, chunk):
    student, teacher = tuple(student_hidden_AD.shape), tuple(teacher_hidden_AE.shape)
    if len(student) != 2 or len(teacher) != 2 or student[0] != teacher[0]:
        raise ValueError(f"hidden states have shapes {student} and {teacher}; give [A, D] and [A, E] with the same A")
    if weights_A is not None and tuple(weights_A.shape) != student[:1]:
        raise ValueError(f"weights_A has shape {tuple(weights_A.shape)}; give one weight a position, {student[:1]}")
    if weights_A is not None and not ((weights_A >= 0) & weights_A.isfinite()).all():
        raise ValueError("weights_A must be finite and not negative; give 0 to leave a position out")
    if kind not in ("forward", "reverse", "js"):
        raise ValueError(f'kind is {kind!r}; give "forward", "reverse" or "js"')
    if kind == "js" and not 0 < beta < 1:
        raise ValueError(f'beta is {beta}; give 0 < beta < 1, or kind="forward" for 0 and kind="reverse" for 1')
    _check_temperature(temperature)
    if denominator is not None and not 0 < denominator < math.inf:
        raise ValueError(f"denominator is {denominator}; give the global sum of weights, finite and above 0")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; give a number of positions, at least 1")


def token_kd_loss(
    student_hidden_AD,
    student_head,
    teacher_hidden_AE,
    teacher_head,
    weights_A=None,
    *,
    kind="forward",
    beta=0.5,
    temperature=1.0,
    denominator=None,
    chunk=256,
):
    """Divergence between student q and teacher p over the whole vocabulary, averaged over answer positions.

    student_hidden_AD [A, D], teacher_hidden_AE [A, E] float: finite hidden states that predict the same A tokens.
    The heads are callables from hidden states [rows, width] to logits [rows, vocabulary], such as model.lm_head; logits
    are taken to float32 (float64 stays). Nothing of the teacher gets a gradient. weights_A [A] float or bool: weight of
    each position, default 1; 0 leaves it out. The weighted sum is divided by the sum of weights, or by `denominator`,
    that sum over all ranks and micro-batches. Returns a scalar; 0, with zero gradient, if all weights are 0.

    kind "forward": KL(p || q). "reverse": KL(q || p). "js": with m = beta p + (1 - beta) q, GKD's divergence
        JSD_beta(p, q) = beta KL(p || m) + (1 - beta) KL(q || m)
    divided by beta (1 - beta), which is ours. The plain one vanishes at both ends, so a loss that reads beta 0 as
    forward KL jumps there; this one tends to KL(p || q) as beta -> 0 and to KL(q || p) as beta -> 1. At beta 0.5 it is
    four times the usual Jensen-Shannon divergence. As for labels, logits are divided by `temperature` and the loss is
    multiplied by its square.

    If one vocabulary is longer, its end is cut off (models of one family pad differently; invented logits would take
    probability from real tokens). The ids of the common part must mean the same tokens in both.

    [A, vocabulary] never exists: `chunk` positions at a time, and again in the backward pass. A = 0 is one chunk with
    no rows. If a head communicates between ranks, every rank needs the same number of chunks.

    Raises ValueError on shapes that differ, weights that are negative or not finite, an unknown kind, beta outside
    (0, 1) with "js", and temperature, denominator or chunk not above 0.
    """
    _check_tokens(student_hidden_AD, teacher_hidden_AE, weights_A, kind, beta, temperature, denominator, chunk)
    weights_A = student_hidden_AD.new_ones(len(student_hidden_AD)) if weights_A is None else weights_A

    def one_chunk(student_hidden, teacher_hidden, weights):
        with torch.no_grad():
            teacher_logits = _at_least_float32(teacher_head(teacher_hidden))
        student_logits = _at_least_float32(student_head(student_hidden))
        V = min(student_logits.shape[-1], teacher_logits.shape[-1])
        log_p = torch.log_softmax(teacher_logits[:, :V] / temperature, -1)
        log_q = torch.log_softmax(student_logits[:, :V] / temperature, -1)
        return (_divergence(log_q, log_p, kind, beta) * weights.to(log_q.dtype)).sum()

    chunks = zip(student_hidden_AD.split(chunk), teacher_hidden_AE.split(chunk), weights_A.split(chunk), strict=True)
    total = sum(checkpoint(one_chunk, *tensors, use_reentrant=False) for tensors in chunks)
    # All weights 0: the total is 0 too, and so is the loss.
    denominator = float(_at_least_float32(weights_A).sum() if denominator is None else denominator) or 1.0
    return temperature**2 * total / denominator
