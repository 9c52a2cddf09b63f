"""Credit: group-relative advantages, Stepwise Advantage Masking, policy loss.     (who earned it?)

An answer that reasons in steps gets one reward, for its last word. Plain GRPO spreads it over all
of its tokens: right steps of a wrong answer are punished, wrong steps of a lucky one rewarded. SAM
compares each step's own verdict with what it should have been, and withholds the credit that the
step did not earn. Where nobody has said what a step should be, the group itself tells which steps
led to better answers:

    rewards_PG -- group_advantages -> advantages_PG -- stepwise_credit or tree_credit -> credit_A
    logprobs_A, credit_A -- policy_loss -> loss

Published (arXiv 2512.00968): group-relative advantages masked step by step by light process
supervision, no reward model. Our reading: the exact rules below.

    python sam.py       # shows one group of answers with the credit of each step

This file is pure tensor code and needs torch only; copy it alone.
Shapes: P prompts, G answers a prompt, N = P * G answers, K steps, A tokens of all answers, packed
one answer behind the other without padding.
"""

import sys

import torch

RULES = ("symmetric", "positive", "none")


def group_advantages(rewards_PG, normalize_std=True, clamp=None):
    """Group-relative advantages [P, G], float32: reward minus its group's mean, over its deviation.

    A group whose rewards are all equal, by exact comparison, gets exactly 0. It still counts in the
    loss denominator, and a KL or SFT term still acts on it.
    normalize_std: as in GRPO (arXiv 2402.03300), by the deviation with G - 1 in its denominator;
        False: as in Dr. GRPO (arXiv 2503.20783).
    clamp: limit to +-clamp (DyKnow-RAG, arXiv 2510.11122, uses 2).
    Raises ValueError unless the rewards are [P, G] with G >= 2.
    """
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(
            "rewards must be [P, G] with groups of at least 2 answers, "
            f"got {list(rewards_PG.shape)}"
        )
    rewards_PG = rewards_PG.float()
    advantages_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if normalize_std:
        advantages_PG = advantages_PG / (rewards_PG.std(1, keepdim=True) + 1e-6)
    # The mean of equal floats can differ from them by rounding; the division would blow that up.
    constant_P1 = (rewards_PG == rewards_PG[:, :1]).all(1, keepdim=True)
    advantages_PG = advantages_PG.masked_fill(constant_P1, 0.0)
    if clamp is not None:
        advantages_PG = advantages_PG.clamp(-clamp, clamp)
    return advantages_PG


def stepwise_credit(advantages_N, step_ends_NK, step_right_NK, lengths_N, rule="symmetric"):
    """Credit of every token [A], float32: its answer's advantage where its step earned it, else 0.

    step_ends_NK: see `spread`; a row of zeros marks a malformed answer.
    step_right_NK: bool, whether the step is right: whether its verdict is its target, say.
    lengths_N: int64, tokens of each answer; A is their sum.

    With A_i the advantage, s_ik the step's verdict and t_ik its target, our reading of SAM keeps
    A_i on step k
      rule "symmetric": if (A_i > 0 and s_ik == t_ik) or (A_i < 0 and s_ik != t_ik): a right step is
                        never punished, a wrong one never rewarded;
      rule "positive":  unless A_i > 0 and s_ik != t_ik: only undeserved reward is withheld;
      rule "none":      always, which is plain GRPO.
    A malformed answer has no steps: its advantage is kept whole.
    Raises ValueError for an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    advantages_N1 = advantages_N.float()[:, None]
    if rule == "symmetric":
        keep_NK = torch.where(advantages_N1 > 0, step_right_NK, ~step_right_NK)
    elif rule == "positive":
        keep_NK = step_right_NK | (advantages_N1 < 0)
    else:
        keep_NK = torch.ones_like(step_right_NK)
    malformed_N1 = step_ends_NK[:, -1:] == 0
    return spread(advantages_N1 * (keep_NK | malformed_N1), step_ends_NK, lengths_N)


def tree_credit(advantages_PG, step_ends_NK, verdicts_NK, lengths_N):
    """Credit of every token [A], float32, without step labels: what its step did for the answer.

    The verdicts of a group's answers form a tree. With V_k the mean advantage of the answers that
    share an answer's first k verdicts, and V_0 the whole group's, step k gets V_k - V_(k-1):
    positive where the answers that took it did better than those that share only the steps before
    it. An answer's steps share out its advantage (unless it was clamped); a step on which all
    answers agree gets 0, up to rounding.

    Values from the group's own prefix tree are TEMPO's idea (arXiv 2509.18314); verdicts in the
    place of tokens are ours.
    verdicts_NK: int64, each step's verdict as a number from 0. For the rest see `stepwise_credit`.
    Malformed answers, which have no verdicts, share a branch and keep their advantage whole.
    """
    advantages_PG = advantages_PG.float()
    P, G = advantages_PG.shape
    malformed_N1 = step_ends_NK[:, -1:] == 0
    verdicts_PGK = verdicts_NK.masked_fill(malformed_N1, -1).view(P, G, -1)
    same_PGGK = verdicts_PGK[:, :, None] == verdicts_PGK[:, None]
    # For each two answers, whether they are in one branch: at the root, behind step 1, ..., K.
    shared = torch.cat([torch.ones_like(same_PGGK[..., :1]), same_PGGK], -1).cumprod(-1)
    values = (shared * advantages_PG[:, None, :, None]).sum(2) / shared.sum(2)
    credit_NK = values.diff().view(P * G, -1)
    credit_NK = torch.where(malformed_N1, advantages_PG.view(P * G, 1), credit_NK)
    return spread(credit_NK, step_ends_NK, lengths_N)


def spread(credit_NK, step_ends_NK, lengths_N):
    """Credit of every token [A]: that of its step.

    step_ends_NK: int64, the position behind each step's last token, so that step k is the tokens
    [ends[k - 1], ends[k]) of its answer. Tokens behind the last step (the end-of-sequence token)
    belong to it; all zeros (a malformed answer) give every token the last step's credit.
    """
    answer_A = torch.arange(len(lengths_N), device=lengths_N.device).repeat_interleave(lengths_N)
    first_N = lengths_N.cumsum(0) - lengths_N
    position_A = torch.arange(len(answer_A), device=lengths_N.device) - first_N[answer_A]
    ends_before_A = (position_A[:, None] >= step_ends_NK[answer_A]).sum(1)
    step_A = ends_before_A.clamp(max=step_ends_NK.shape[1] - 1)
    return credit_NK[answer_A, step_A]


def policy_loss(
    logprobs_A,
    credit_A,
    denominator,
    old_logprobs_A=None,
    sampler_logprobs_A=None,
    ref_logprobs_A=None,
    clip_low=0.2,
    clip_high=0.2,
    is_cap=2.0,
    kl_coef=0.0,
):
    """Clipped policy-gradient loss (a scalar) and its statistics.

    logprobs_A: float32, of the current policy, with gradient; EOS is among the tokens.
    credit_A: from stepwise_credit or tree_credit.
    denominator: the number of response tokens over all micro-batches and ranks, masked by SAM or
        not, so that masking takes weight from a step and gives none to the others.
    old_logprobs_A: the trainer's at the start of the step. None: the current ones, which makes the
        ratio 1 and the gradient that of REINFORCE.
    sampler_logprobs_A: as sampled. Each token is weighted by min(exp(old - sampler), is_cap),
        truncated importance sampling. None: 1.
    ref_logprobs_A: with kl_coef, adds kl_coef * 0.5 (logprob - ref)^2, the k2 estimator, whose
        gradient is that of the KL.

        loss = - sum_t w_t min(r_t C_t, clip(r_t, 1 - clip_low, 1 + clip_high) C_t) / denominator
               + KL term

    Statistics: a dict of sums over this call's tokens, float64 scalars on the device (reading them
    would wait for it), which add up over micro-batches and ranks: tokens; approx_kl, 0.5 (log
    ratio)^2 between this policy and the one at the start of the step; clipped, tokens whose
    gradient the clip stopped; mismatch, |trainer's minus sampler's log-probability| at the start of
    the step; is_weight, the importance weights; ref_kl.

    The value is no measure of progress: without masking it starts near 0 by construction, since
    advantages are centred. Watch the reward.
    No input is changed. Raises ValueError for mismatched shapes.
    """
    old_A = logprobs_A.detach() if old_logprobs_A is None else old_logprobs_A
    sampler_A = old_A if sampler_logprobs_A is None else sampler_logprobs_A
    ref_A = logprobs_A.detach() if ref_logprobs_A is None else ref_logprobs_A
    inputs = {"credit": credit_A, "old": old_A, "sampler": sampler_A, "reference": ref_A}
    for name, x in inputs.items():
        if x.shape != logprobs_A.shape:
            raise ValueError(
                f"{name} has shape {list(x.shape)}, log-probabilities {list(logprobs_A.shape)}"
            )
    log_ratio_A = logprobs_A - old_A
    ratio_A = log_ratio_A.exp()
    clipped_ratio_A = ratio_A.clamp(1 - clip_low, 1 + clip_high)
    gain_A = torch.minimum(ratio_A * credit_A, clipped_ratio_A * credit_A)
    weights_A = (old_A - sampler_A).exp().clamp(max=is_cap)
    ref_kl_A = 0.5 * (logprobs_A - ref_A).square()
    loss = (kl_coef * ref_kl_A - weights_A * gain_A).sum() / denominator
    with torch.no_grad():
        statistics = {
            "tokens": torch.ones_like(logprobs_A),
            "approx_kl": 0.5 * log_ratio_A.square(),
            "clipped": clipped_ratio_A * credit_A < ratio_A * credit_A,
            "mismatch": (old_A - sampler_A).abs(),
            "is_weight": weights_A,
            "ref_kl": ref_kl_A,
        }
        return loss, {name: x.double().sum() for name, x in statistics.items()}


def rollout_stats(rewards_PG, advantages_N, credit_A, lengths_N, ended_N):
    """What to watch at each step, as floats.

    reward; frac_zero_std: groups without a signal; truncated: answers cut at the length limit;
    masked: response tokens whose non-zero advantage SAM took away; length: mean tokens an answer.
    """
    constant_P = (rewards_PG == rewards_PG[:, :1]).all(1)
    signal_A = advantages_N.repeat_interleave(lengths_N) != 0
    masked_A = signal_A & (credit_A == 0)
    return {
        "reward": float(rewards_PG.float().mean()),
        "frac_zero_std": float(constant_P.float().mean()),
        "truncated": float((~ended_N).float().mean()),
        "masked": float(masked_A.sum() / signal_A.sum().clamp(min=1)),
        "length": float(lengths_N.float().mean()),
    }


def step_stats(won_N, right_NK, credit_NK):
    """How reasoning steps and outcomes go together, as floats: what credit by step has to mend.

    won_N, bool: the answer got its reward. right_NK, bool. credit_NK: of each step.
    steps_right: the share of right steps; wrong_in_right: of wrong ones among the steps of answers
    that won; right_in_wrong: of right ones in those that did not; right_throughout: of answers
    without a wrong step among those that won; credit_right: of the credit, by amount, that is
    above 0 on right steps and below 0 on wrong ones. None where there is nothing to share.
    """
    of_won_NK = right_NK[won_N]
    of_lost_NK = right_NK[~won_N]
    fitting_NK = credit_NK.abs() * ((credit_NK > 0) == right_NK)
    shares = {
        "steps_right": (right_NK.sum(), right_NK.numel()),
        "wrong_in_right": ((~of_won_NK).sum(), of_won_NK.numel()),
        "right_in_wrong": (of_lost_NK.sum(), of_lost_NK.numel()),
        "right_throughout": (of_won_NK.all(1).sum(), len(of_won_NK)),
        "credit_right": (fitting_NK.sum(), credit_NK.abs().sum()),
    }
    return {name: float(part) / float(of) if of else None for name, (part, of) in shares.items()}


# python sam.py ------------------------------------------------------------------------------------

SIGNS = {1: ("\033[32m", "+"), -1: ("\033[31m", "-"), 0: ("\033[90m", "0")}  # green, red, grey


def paint(pieces, credits, color):
    """One line of text: each piece in its credit's color, or without color behind its sign."""
    painted = []
    for piece, credit in zip(pieces, credits, strict=True):
        code, sign = SIGNS[(credit > 0) - (credit < 0)]
        painted.append(f"{code}{piece}\033[0m" if color else f"[{sign} {piece}]")
    return " ".join(painted)


def demo():
    """Print one group of four answers under each rule."""
    steps = ["topic", "constraints", "promotion"]
    targets = ["3", "1", "1"]  # the last is the gold label
    group = [["3", "1", "1"], ["3", "3", "1"], ["3", "3", "3"], ["1", "1", "0"]]
    print("query: winter ramen tokyo     note: sponsored, ramen, silent about season and place")
    print("targets: topic 3, constraints 1, promotion 1, which is the gold label\n")

    rewards_PG = torch.tensor([[float(answer[-1] == targets[-1]) for answer in group]])
    advantages_PG = group_advantages(rewards_PG)
    advantages_N = advantages_PG.flatten()
    lengths_N = torch.full((4,), 3)
    step_ends_NK = torch.tensor([[1, 2, 3]] * 4)  # one token a step
    verdicts_NK = torch.tensor([[int(box) for box in answer] for answer in group])
    right_NK = verdicts_NK == torch.tensor([int(target) for target in targets])
    notes = {"none": " (plain GRPO)", "tree": " (without the targets)"}
    for rule in (*RULES, "tree"):
        print(f"rule {rule}{notes.get(rule, '')}")
        if rule == "tree":
            credit_A = tree_credit(advantages_PG, step_ends_NK, verdicts_NK, lengths_N)
        else:
            credit_A = stepwise_credit(advantages_N, step_ends_NK, right_NK, lengths_N, rule)
        for answer, advantage, credit in zip(group, advantages_N, credit_A.view(4, 3), strict=True):
            pieces = [f"{name} \\boxed{{{box}}}" for name, box in zip(steps, answer, strict=True)]
            line = paint(pieces, credit.tolist(), sys.stdout.isatty())
            print(f"  A = {advantage:+.2f}  {line}")
    print("\n+ green: made more probable; - red: less probable; 0 grey: no credit")


if __name__ == "__main__":
    demo()
