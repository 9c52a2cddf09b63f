"""Credit: group-relative advantages, Stepwise Advantage Masking (SAM), and the policy loss.            (who earned it?)

An answer that reasons in steps gets one reward, for its last word. Plain GRPO spreads it over all of its tokens: right
steps of a wrong answer are punished, wrong steps of a lucky one rewarded. SAM compares each step's own verdict with what
it should have been and withholds the credit that the step did not earn:

    rewards_PG --group_advantages--> advantages_PG --stepwise_credit--> credit_NT --policy_loss--> loss

Published (arXiv 2512.00968): group-relative advantages masked step by step by light process supervision, no reward model.
Our reading: the exact rules below. This file is pure tensor code and needs torch only; copy it alone.

    python sam.py       # shows one group of answers with the credit of each step

Shapes: P prompts, G answers a prompt, N = P * G answers, T token positions, K steps.
"""

from dataclasses import dataclass

import torch

RULES = ("symmetric", "positive", "none")


def group_advantages(rewards_PG, normalize_std=True, clamp=None):
    """Group-relative advantages [P, G], float32: reward minus the group's mean, over the group's standard deviation.

    A group whose rewards are all equal, by exact comparison, gets exactly 0. It still counts in the loss denominator, and
    a KL or SFT term still acts on it. normalize_std: as in GRPO (arXiv 2402.03300); False: as in Dr. GRPO (2503.20783).
    clamp: limit to +-clamp (DyKnow-RAG, 2510.11122, uses 2). Raises ValueError unless [P, G] with G >= 2.
    """
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(f"rewards must be [P, G] with groups of at least 2 answers, got {list(rewards_PG.shape)}")
    rewards_PG = rewards_PG.float()
    advantages_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if normalize_std:
        advantages_PG = advantages_PG / (rewards_PG.std(1, keepdim=True) + 1e-6)
    # The mean of equal floats can differ from them by rounding, and the division would blow that up.
    constant_P1 = (rewards_PG == rewards_PG[:, :1]).all(1, keepdim=True)
    advantages_PG = advantages_PG.masked_fill(constant_P1, 0.0)
    return advantages_PG if clamp is None else advantages_PG.clamp(-clamp, clamp)


def stepwise_credit(advantages_N, step_ends_NK, step_right_NK, lengths_N, width, rule="symmetric"):
    """Credit of each token [N, width], float32: the answer's advantage where its step earned it, else 0.

    step_ends_NK: int64, the position behind each step's last token, so step k is the tokens [ends[k - 1], ends[k]); a row
    of zeros marks a malformed answer. Tokens behind the last step (the end-of-sequence token) share its credit.
    step_right_NK: bool, whether the step's verdict is its target. lengths_N: tokens of each answer.
    With A_i the advantage, s_ik the step's verdict and t_ik its target, our reading of SAM keeps A_i on step k
      rule "symmetric": if (A_i > 0 and s_ik == t_ik) or (A_i < 0 and s_ik != t_ik): a right step is never punished, a
                        wrong one never rewarded;
      rule "positive":  unless A_i > 0 and s_ik != t_ik: only undeserved reward is withheld;
      rule "none":      always, which is plain GRPO.
    A malformed answer has no steps: its advantage is kept whole. Raises ValueError for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    at_T = torch.arange(width, device=advantages_N.device)
    step_NT = (at_T >= step_ends_NK[:, :, None]).sum(1).clamp(max=step_ends_NK.shape[1] - 1)
    right_NT = step_right_NK.gather(1, step_NT)
    advantages_NT = advantages_N.float()[:, None].expand(-1, width)
    if rule == "symmetric":
        keep_NT = torch.where(advantages_NT > 0, right_NT, ~right_NT)
    else:
        keep_NT = right_NT | (advantages_NT < 0) if rule == "positive" else torch.ones_like(right_NT)
    keep_NT = keep_NT | (step_ends_NK[:, -1:] == 0)
    return advantages_NT * keep_NT * (at_T < lengths_N[:, None])


@dataclass
class LossStats:
    """Sums over this call's response tokens, so that they add up over micro-batches and ranks; divide by `tokens`."""

    tokens: float
    approx_kl: float  # 0.5 (log ratio)^2 between this policy and the one at the start of the step
    clipped: float  # tokens whose gradient the clip stopped
    mismatch: float  # |log-probability of the trainer minus that of the sampler| at the start of the step
    is_weight: float  # truncated importance weights
    ref_kl: float


def policy_loss(
    logprobs_NT,
    credit_NT,
    mask_NT,
    denominator,
    old_logprobs_NT=None,
    sampler_logprobs_NT=None,
    ref_logprobs_NT=None,
    clip_low=0.2,
    clip_high=0.2,
    is_cap=2.0,
    kl_coef=0.0,
):
    """Clipped policy-gradient loss (scalar) and LossStats.

    logprobs_NT: float32, of the current policy, with gradient. mask_NT: response tokens, EOS included, made from lengths.
    denominator: the global number of response tokens, over all micro-batches and ranks, masked by SAM or not: so masking
    takes weight from a step and gives none to others. old_logprobs_NT: the trainer's at the start of the step (None: the
    current ones, which makes the ratio 1 and its gradient that of REINFORCE). sampler_logprobs_NT: as sampled;
    each token is weighted by min(exp(old - sampler), is_cap), truncated importance sampling (None: 1). ref_logprobs_NT:
    with kl_coef, adds kl_coef * 0.5 (logprob - ref)^2: the k2 estimator, whose gradient is that of the KL.

        loss = - sum_it w_it min(r_it C_it, clip(r_it, 1 - clip_low, 1 + clip_high) C_it) / denominator + KL term

    The value starts near 0 by construction, since advantages are centred: watch the reward, not the loss.
    No input is changed. Raises ValueError for mismatched shapes.
    """
    old = logprobs_NT.detach() if old_logprobs_NT is None else old_logprobs_NT
    sampler = old if sampler_logprobs_NT is None else sampler_logprobs_NT
    ref = logprobs_NT.detach() if ref_logprobs_NT is None else ref_logprobs_NT
    for name, x in (("credit", credit_NT), ("mask", mask_NT), ("old", old), ("sampler", sampler), ("reference", ref)):
        if x.shape != logprobs_NT.shape:
            raise ValueError(f"{name} has shape {list(x.shape)}, log-probabilities {list(logprobs_NT.shape)}")
    mask_NT = mask_NT.bool()
    # Whatever stands in the padding (even inf) is replaced, not multiplied by 0, so it can reach neither loss nor gradient.
    log_ratio_NT = torch.where(mask_NT, logprobs_NT - old, 0.0)
    mismatch_NT = torch.where(mask_NT, old - sampler, 0.0)
    log_ref_NT = torch.where(mask_NT, logprobs_NT - ref, 0.0)
    credit_NT = torch.where(mask_NT, credit_NT, 0.0)
    ratio_NT = log_ratio_NT.exp()
    weights_NT = mismatch_NT.exp().clamp(max=is_cap)
    clipped_NT = ratio_NT.clamp(1 - clip_low, 1 + clip_high)
    gain_NT = torch.minimum(ratio_NT * credit_NT, clipped_NT * credit_NT)
    ref_kl_NT = 0.5 * log_ref_NT.square()
    loss = (kl_coef * ref_kl_NT - weights_NT * gain_NT).sum() / denominator
    with torch.no_grad():
        stopped_NT = clipped_NT * credit_NT < ratio_NT * credit_NT
        sums = (mask_NT, 0.5 * log_ratio_NT.square(), stopped_NT, mismatch_NT.abs(), weights_NT * mask_NT, ref_kl_NT)
        sums = torch.stack([x.double().sum() for x in sums]).tolist()  # one transfer from the device
    return loss, LossStats(*sums)


def rollout_stats(rewards_PG, advantages_N, credit_NT, lengths_N, ended_N):
    """What to watch at each step, as floats: reward, frac_zero_std (groups without a signal), truncated (answers cut at the
    length limit), masked (response tokens whose non-zero advantage SAM took away), length (mean tokens an answer)."""
    mask_NT = torch.arange(credit_NT.shape[1], device=credit_NT.device) < lengths_N[:, None]
    signal_NT = mask_NT & (advantages_N != 0)[:, None]
    return {
        "reward": float(rewards_PG.float().mean()),
        "frac_zero_std": float((rewards_PG == rewards_PG[:, :1]).all(1).float().mean()),
        "truncated": float((~ended_N).float().mean()),
        "masked": float((signal_NT & (credit_NT == 0)).sum() / signal_NT.sum().clamp(min=1)),
        "length": float(lengths_N.float().mean()),
    }


# python sam.py --------------------------------------------------------------------------------------------------------


def paint(pieces, credits, color):
    """One line of text: each piece in green, red or grey by its credit's sign; without color, +, - or 0 before it."""
    code = {1: ("\033[32m", "+"), -1: ("\033[31m", "-"), 0: ("\033[90m", "0")}
    signs = [(credit > 0) - (credit < 0) for credit in credits]
    if color:
        return " ".join(f"{code[s][0]}{piece}\033[0m" for s, piece in zip(signs, pieces, strict=True))
    return " ".join(f"[{code[s][1]} {piece}]" for s, piece in zip(signs, pieces, strict=True))


def demo():
    """Print one group of four answers under the three rules."""
    import sys

    targets = ["3", "1", "1"]
    group = [["3", "1", "1"], ["3", "3", "1"], ["3", "3", "3"], ["1", "1", "0"]]
    print("query: winter ramen tokyo     note: sponsored, ramen, silent about season and place")
    print(f"targets: topic {targets[0]}, constraints {targets[1]}, promotion {targets[2]}, which is the gold label\n")
    rewards_PG = torch.tensor([[float(answer[-1] == targets[-1]) for answer in group]])
    advantages_N = group_advantages(rewards_PG).flatten()
    ends_NK = torch.tensor([[1, 2, 3]] * 4)  # one token a step
    right_NK = torch.tensor([[a == t for a, t in zip(answer, targets, strict=True)] for answer in group])
    for rule in RULES:
        credit_NT = stepwise_credit(advantages_N, ends_NK, right_NK, torch.full((4,), 3), 3, rule)
        print(f"rule {rule}" + (" (plain GRPO)" if rule == "none" else ""))
        for answer, advantage, credit_T in zip(group, advantages_N, credit_NT, strict=True):
            pieces = [f"{n} \\boxed{{{a}}}" for n, a in zip(("topic", "constraints", "promotion"), answer, strict=True)]
            print(f"  A = {advantage:+.2f}  {paint(pieces, credit_T.tolist(), sys.stdout.isatty())}")
    print("\n+ green: made more probable; - red: less probable; 0 grey: no credit")


if __name__ == "__main__":
    demo()
