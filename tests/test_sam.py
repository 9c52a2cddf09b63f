"""sam.py against naive versions kept here: advantages, the credit of every token, the loss and its gradient."""

import itertools
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sam import RULES, group_advantages, mean_over_answers, policy_loss, rollout_stats, step_stats, stepwise_credit

QUICK = settings(max_examples=100, deadline=None, derandomize=True)


# Advantages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize_std", [True, False])
def test_advantages_are_relative_to_the_group(normalize_std):
    """A mean or deviation over the batch in place of the group, the biased deviation, advantages of the wrong sign."""
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 2.0, 5.0, -1.0]])
    got_PG = group_advantages(rewards_PG, normalize_std)
    for rewards, got in zip(rewards_PG.tolist(), got_PG.tolist(), strict=True):
        mean = sum(rewards) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3) if normalize_std else 1.0
        assert got == pytest.approx([(r - mean) / std for r in rewards], rel=1e-4)


@pytest.mark.parametrize("normalize_std", [True, False])
def test_a_group_without_variance_gets_exactly_zero(normalize_std):
    """The mean of equal floats differs from them by rounding; divided by a deviation of rounding it looks like a signal."""
    rounded = 0
    for value, G in itertools.product([0.0, 1.0, 0.1, 1 / 3, 0.7, 1e-8, 12345.678], [2, 3, 7, 16]):
        rewards_PG = torch.full((3, G), value)
        rounded += int((rewards_PG != rewards_PG.mean(1, keepdim=True)).any())
        rewards_PG[1, 0] += 1.0
        advantages_PG = group_advantages(rewards_PG, normalize_std)
        assert (advantages_PG[[0, 2]] == 0).all() and (advantages_PG[1] != 0).all()
    assert rounded, "some of the means must really round, or this tells nothing"
    almost_P3 = group_advantages(torch.tensor([[1.0, 1.0, 1.0 + 1e-5]]))  # no variance by a tolerance: a signal thrown away
    assert almost_P3[0, 2] > 0.5 and (almost_P3[0, :2] < 0).all()


def test_clamp_and_integer_rewards():
    """A clamp on one side only, integer or boolean rewards whose mean is refused or rounds."""
    rewards_PG = torch.tensor([[1] + [0] * 15, [0] + [1] * 15])
    advantages_PG = group_advantages(rewards_PG, clamp=2)
    assert advantages_PG[:, 0].tolist() == [2.0, -2.0]
    assert group_advantages(rewards_PG)[0, 0] == pytest.approx(3.75, rel=1e-4)
    assert torch.equal(group_advantages(rewards_PG.bool(), clamp=2), advantages_PG)


# Credit ---------------------------------------------------------------------------------------------------------------


def naive_kept(advantage, right, rule):
    """The steps of a well-formed answer that keep its advantage."""
    K, alone = len(right), right[0] is False and all(right[1:])  # the first step alone is wrong
    if rule == "none":
        return [True] * K
    if rule == "symmetric":
        return [(advantage > 0 and c) or (advantage < 0 and not c) for c in right]
    return [alone or c if right[-1] else not c for c in right[:-1]] + [True]


def naive_keeps(advantage, step_ends, right, length, rule):
    """Whether each token of an answer keeps its advantage; a malformed answer keeps all."""
    kept = naive_kept(advantage, right, rule) if step_ends[-1] else [True] * len(right)
    steps = [min(sum(t >= end for end in step_ends), len(step_ends) - 1) for t in range(length)]
    return [kept[step] for step in steps]


@st.composite
def batches(draw):
    """advantages, ends, right and lengths of P groups of G well-formed and malformed answers, some of those empty; and G."""
    K, P, G, longest = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(5, 14))
    ends, lengths = [], []
    for _ in range(P * G):
        steps = sorted(draw(st.sets(st.integers(1, longest), min_size=K, max_size=K)))
        malformed = draw(st.integers(0, 3)) == 0
        ends.append([0] * K if malformed else steps)
        lengths.append(draw(st.integers(0 if malformed else steps[-1], longest)))
    rewards = [draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=G, max_size=G)) for _ in range(P)]
    right = [draw(st.lists(st.booleans(), min_size=K, max_size=K)) for _ in range(P * G)]
    return group_advantages(torch.tensor(rewards)).flatten().tolist(), ends, right, lengths, G


@pytest.mark.parametrize("rule", RULES)
@given(batches())
@QUICK
def test_credit_equals_the_naive_version(rule, batch):
    """Spans off by one, right steps punished or wrong ones rewarded, credit that slips into the next answer."""
    *batch, _ = batch
    expected = [keep * answer[0] for answer in zip(*batch, strict=True) for keep in naive_keeps(*answer, rule)]
    assert stepwise_credit(*map(torch.tensor, batch), rule).tolist() == expected


KEPT = {"RRR": "111", "WRR": "111", "RWR": "101", "WWR": "001", "RRW": "001", "RWW": "011", "WRW": "101", "WWW": "111"}


def test_the_eight_cases_of_sam_by_hand():
    """A rule that is not the first author's: three verdicts, right or wrong beside the pair's label, and the steps kept,
    whatever the sign of the advantage."""
    right_NK = torch.tensor([[c == "R" for c in case] for case in KEPT]).repeat(2, 1)
    kept_NK = torch.tensor([[float(kept) for kept in steps] for steps in KEPT.values()]).repeat(2, 1)
    advantages_N = torch.cat([torch.arange(1.0, 9), -torch.arange(1.0, 9)])
    credit_A = stepwise_credit(advantages_N, torch.tensor([[1, 2, 3]] * 16), right_NK, torch.full((16,), 3))
    assert torch.equal(credit_A.view(16, 3), advantages_N[:, None] * kept_NK)


def test_credit_by_hand():
    """The naive version being wrong in the same way. Two answers of three steps, with EOS, and text behind the last box, in
    the last step; two malformed ones, which masked as a whole would never teach the model the form."""
    ends_NK = torch.tensor([[2, 4, 5]] * 2 + [[0] * 3] * 2)
    right_NK = torch.tensor([[True, False, True]] * 2 + [[True] * 3, [False] * 3])
    rows = torch.tensor([2.0, -2.0, -1.5, 0.5]), ends_NK, right_NK, torch.tensor([6, 7, 1, 2])
    expected = {
        "none": [2] * 6 + [-2] * 7,
        "sam": [2, 2, 0, 0, 2, 2, -2, -2, 0, 0, -2, -2, -2],
        "symmetric": [2, 2, 0, 0, 2, 2, 0, 0, -2, -2, 0, 0, 0],
    }
    assert tuple(expected) == RULES
    for rule, credit in expected.items():
        assert stepwise_credit(*rows, rule).tolist() == [*credit, -1.5, 0.5, 0.5]


# The loss -------------------------------------------------------------------------------------------------------------


def batch(A=40):
    """Inputs of policy_loss in which ratios go beyond both clips."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda scale: scale * torch.randn(A, generator=draw, dtype=torch.float64)
    old_A = -normal(1).abs() - 0.1
    return {
        "logprobs_A": (old_A + normal(0.3)).requires_grad_(),
        "credit_A": normal(1) * (torch.rand(A, generator=draw) < 0.7),
        "denominator": 20,
        "old_logprobs_A": old_A,
        "sampler_logprobs_A": old_A + normal(0.6),
        "ref_logprobs_A": old_A + normal(0.5),
    }


STATISTICS = ["tokens", "approx_kl", "clipped", "mismatch", "is_weight", "ref_kl"]


def naive_loss(denominator, clip_low=0.2, clip_high=0.28, is_cap=2.0, kl_coef=0.0, **rows):
    """Value, gradient and statistics, one token after the other, the gradient by hand."""
    total, gradient, stats = 0.0, torch.zeros_like(rows["logprobs_A"]), [0.0] * 6
    at = lambda name, t, default: default if rows[f"{name}_A"] is None else rows[f"{name}_A"][t].item()
    for t in range(len(gradient)):
        now, credit = at("logprobs", t, None), at("credit", t, None)
        old, ref = at("old_logprobs", t, now), at("ref_logprobs", t, now)
        sampler = at("sampler_logprobs", t, old)
        ratio, weight = math.exp(now - old), min(math.exp(old - sampler), is_cap)
        clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
        stopped = (credit > 0 and ratio > 1 + clip_high) or (credit < 0 and ratio < 1 - clip_low)
        total += (kl_coef * 0.5 * (now - ref) ** 2 - weight * credit * (clipped if stopped else ratio)) / denominator
        gradient[t] = (kl_coef * (now - ref) - (0 if stopped else weight * credit * ratio)) / denominator
        values = (1, 0.5 * (now - old) ** 2, stopped, abs(old - sampler), weight, 0.5 * (now - ref) ** 2)
        stats = [a + b for a, b in zip(stats, values, strict=True)]
    return total, gradient, dict(zip(STATISTICS, stats, strict=True))


SETTINGS = [
    {},
    {"clip_low": 0.1, "clip_high": 0.4, "is_cap": 1.0, "kl_coef": 0.3},
    {"old_logprobs_A": None},
    {"sampler_logprobs_A": None},
    {"ref_logprobs_A": None, "kl_coef": 0.3},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: "-".join(changes) or "all")
def test_loss_equals_the_naive_version(changes):
    """Any wrong sign, side of the clip, weight, default or sum, in the value, the gradient or the statistics; a normaliser per
    micro-batch, or an empty one that is NaN or cannot run backward, while other ranks wait."""
    inputs = {**batch(), **changes}
    loss, gradient, sums = naive_loss(**inputs)
    assert changes or 0 < sums["clipped"] < sums["tokens"], "the batch must hold clipped tokens for this test to tell"
    for cuts in ([0, 40], [0, 9, 9, 10, 40]):
        got = [0.0, torch.zeros(40, dtype=torch.float64), dict.fromkeys(STATISTICS, 0.0)]
        for start, stop in itertools.pairwise(cuts):
            part = {name: x[start:stop] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
            part_loss, stats = policy_loss(**part)
            got[0] += part_loss.item()
            got[1] += torch.autograd.grad(part_loss, inputs["logprobs_A"])[0]
            got[2] = {name: got[2][name] + x.item() for name, x in stats.items()}
        torch.testing.assert_close(got[1], gradient)
        assert (got[0], got[2]) == (pytest.approx(loss), pytest.approx(sums))


def test_kl_term_has_the_gradient_of_the_kl():
    """k1 (log p - log ref) averages to no gradient at all, k3 to that of the other KL."""
    draw = torch.Generator().manual_seed(0)
    logits_V, ref_V = (torch.randn(7, generator=draw, dtype=torch.float64) for _ in range(2))
    logits_V.requires_grad_()
    log_p, log_ref = torch.log_softmax(logits_V, -1), torch.log_softmax(ref_V, -1)
    exact = torch.autograd.grad((log_p.exp() * (log_p - log_ref)).sum(), logits_V, retain_graph=True)[0]
    expected = torch.zeros_like(exact)
    for token in range(7):  # every token that can be sampled, weighted by its probability
        loss, _ = policy_loss(log_p[[token]], torch.zeros(1), 1, ref_logprobs_A=log_ref[[token]], kl_coef=0.5)
        expected += log_p[token].exp().detach() * torch.autograd.grad(loss, logits_V, retain_graph=True)[0] / 0.5
    torch.testing.assert_close(expected, exact)


def naive_sam_loss(batch, logps, old, sampler, ref, kl_coef):
    """-(1/N) sum over answers of (1/T_i) sum over kept tokens of w min(rho A_i, clip(rho) A_i), plus a KL that is a mean over
    all tokens; one token after the other, with autograd."""
    total, first, num_tokens = 0.0, 0, len(logps)
    for advantage, step_ends, right, length in zip(*batch, strict=True):
        keeps = naive_keeps(advantage, step_ends, right, length, "sam")
        tokens = [first + t for t, keep in enumerate(keeps) if keep]
        for t in tokens:
            rho, w = (logps[t] - old[t]).exp(), min((old[t] - sampler[t]).exp().item(), 2.0)
            gain = w * torch.minimum(rho * advantage, rho.clamp(0.8, 1.28) * advantage)
            total = total - gain / len(tokens) / len(batch[0])
        first += length
    return total + kl_coef * sum(0.5 * (logps[t] - ref[t]) ** 2 / num_tokens for t in range(num_tokens))


@given(batches(), st.data())
@QUICK
def test_sam_s_loss_equals_a_plain_loop(batch, data):
    """Another T_i, N or KL mean, or either taken over a micro-batch or a rank: its loss and gradient would change with the cut.
    Two ranks hold some of the groups each, and cut their packed tokens anywhere; the parts must add up."""
    *batch, G = batch
    lengths, N = batch[3], len(batch[3])
    A, kl_coef = sum(lengths), data.draw(st.sampled_from([0.0, 0.3]))
    assume(A)
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    normal = lambda scale: scale * torch.randn(A, generator=draw, dtype=torch.float64)
    old_A = -normal(1).abs() - 0.1
    logprobs_A, sampler_A, ref_A = (old_A + normal(0.4)).requires_grad_(), old_A + normal(0.6), old_A + normal(0.5)
    expected = naive_sam_loss(batch, logprobs_A, old_A, sampler_A, ref_A, kl_coef)

    total, middle = 0.0, G * data.draw(st.integers(0, N // G))
    for of_rank in (slice(0, middle), slice(middle, N)):
        rows = [torch.tensor(x)[of_rank] for x in batch]
        credit_A = mean_over_answers(stepwise_credit(*rows, "sam"), rows[3], A, N)
        first = sum(lengths[: of_rank.start])
        cuts = data.draw(st.lists(st.integers(0, len(credit_A)), max_size=3).map(sorted))
        for start, stop in itertools.pairwise([0, *cuts, len(credit_A)]):
            of_all = slice(first + start, first + stop)
            inputs = logprobs_A[of_all], credit_A[start:stop], A, old_A[of_all], sampler_A[of_all], ref_A[of_all]
            total = total + policy_loss(*inputs, kl_coef=kl_coef)[0]
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(loss, logprobs_A)[0] for loss in (total, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_inputs_are_not_mutated():
    """In-place work on the caller's tensors: 7 response tokens became 18 in a well-known normaliser. Nor is a result a view."""
    inputs, rewards_PG = {**batch(), "kl_coef": 0.1}, torch.tensor([[1.0, 0, 0], [1, 1, 1]])
    rows = (torch.randn(6), torch.tensor([[1, 2]] * 6), torch.ones(6, 2).bool(), torch.full((6,), 3))
    tensors = [x for x in (*inputs.values(), *rows, rewards_PG) if isinstance(x, torch.Tensor)]
    before = [x.detach().clone() for x in tensors]
    policy_loss(**inputs)[0].backward()
    for rule in RULES:
        credit_A = stepwise_credit(*rows, rule)
        rollout_stats(rewards_PG, rows[0], credit_A, rows[3], torch.ones(6).bool(), rows[1])
        mean_over_answers(credit_A, rows[3], 18, 6).zero_()
        assert torch.equal(credit_A, stepwise_credit(*rows, rule))
        credit_A.zero_()
    group_advantages(rewards_PG, normalize_std=False, clamp=1.0).zero_()
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, before, strict=True))


def test_what_is_refused():
    """A group of one, whose advantage is 0 or NaN, or flat rewards taken for one group; a misspelt rule that silently is plain
    GRPO; one token that broadcasts over the whole batch, or padded rows among packed ones."""
    for shape in ((4, 1), (8,), (2, 2, 2)):
        with pytest.raises(ValueError, match=r"with G >= 2, got \["):
            group_advantages(torch.zeros(shape))
    with pytest.raises(ValueError, match="rule must be one of none, sam, symmetric, got 'sym'"):
        stepwise_credit(torch.ones(1), torch.ones(1, 1).long(), torch.ones(1, 1).bool(), torch.ones(1).long(), "sym")
    inputs = batch()
    for name in ("credit_A", "old_logprobs_A", "sampler_logprobs_A", "ref_logprobs_A"):
        for other in (inputs[name][:1], inputs[name][None]):
            with pytest.raises(ValueError, match=rf"{name.split('_')[0]}.*: shape \[.*, not \[40\]"):
                policy_loss(**{**inputs, name: other})


# What to watch --------------------------------------------------------------------------------------------------------


def test_rollout_stats():
    """Tokens of another answer counted, groups without variance judged by rounding, 0 / 0 where no group has a signal."""
    rewards_PG = torch.tensor([[1.0, 0.0], [0.1, 0.1], [1.0, 1.0]])
    advantages_N = group_advantages(rewards_PG).flatten()
    lengths_N = torch.tensor([3, 4, 2, 2, 5, 1])
    ends_NK = torch.tensor([[1, 2], [1, 3], [1, 2], [0, 0], [1, 2], [0, 0]])
    right_NK = torch.tensor([[True, False], [True, False]] + [[False, False]] * 4)
    credit_A = stepwise_credit(advantages_N, ends_NK, right_NK, lengths_N, "symmetric")
    ended_N = torch.tensor([True, True, True, True, True, False])
    stats = rollout_stats(rewards_PG, advantages_N, credit_A, lengths_N, ended_N, ends_NK)
    # Of the first answer (won) tokens 1 and 2 are masked, of the second (lost) token 0: 3 of 7.
    expected = {"reward": (1 + 0 + 0.1 + 0.1 + 1 + 1) / 6, "frac_zero_std": 2 / 3, "truncated": 1 / 6, "masked": 3 / 7}
    assert stats == pytest.approx({**expected, "malformed": 2 / 6, "length": 17 / 6})
    silent = rollout_stats(torch.zeros(3, 2), torch.zeros(6), torch.zeros(17), lengths_N, ended_N, ends_NK)
    assert silent["masked"] == 0.0 and silent["frac_zero_std"] == 1.0


def test_step_stats():
    """Steps counted in the wrong place, shares of the wrong whole, credit weighed by its sign alone; 0 / 0 where no answer won,
    none lost, or none has credit."""
    won_N = torch.tensor([True, True, False])
    right_NK = torch.tensor([[True, True], [False, True], [True, False]])
    credit_NK = torch.tensor([[2.0, 0.0], [1.0, 0.5], [-0.5, -4.0]])  # fitting are 2, 0.5 and 4 of 8
    expected = {"steps_right": 4 / 6, "wrong_in_right": 1 / 4, "right_in_wrong": 1 / 2, "right_throughout": 1 / 2}
    assert step_stats(won_N, right_NK, credit_NK) == pytest.approx(expected | {"credit_right": 6.5 / 8})
    stats = step_stats(torch.tensor([True]), torch.tensor([[True]]), torch.zeros(1, 1))
    assert stats == {"steps_right": 1, "wrong_in_right": 0, "right_in_wrong": None, "right_throughout": 1, "credit_right": None}
    stats = step_stats(torch.tensor([False]), torch.tensor([[True]]), torch.tensor([[-1.0]]))
    assert stats["wrong_in_right"] is None and stats["right_throughout"] is None and stats["credit_right"] == 0


# python sam.py --------------------------------------------------------------------------------------------------------


def test_copied_alone_it_prints_without_colour_codes(tmp_path):
    """An import of a project file or of a library but torch, escape codes in a log file, or a picture of other rules."""
    shutil.copy(ROOT / "sam.py", tmp_path)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "sam.py"], cwd=tmp_path, capture_output=True, text=True, env=clean)
    assert (done.returncode, done.stderr) == (0, "") and "\033" not in done.stdout
    shown = re.findall(r"rule (\w+):|A = \S+  (.*)", done.stdout)
    signs = ["".join(re.findall(r"\[([-+0]) ", line)) if line else rule for rule, line in shown]
    # Of the four answers [3, 1, 1], [3, 3, 1], [3, 3, 3] and [1, 1, 0], the first two won; the label is 1.
    assert signs == [
        *("none", "+++", "+++", "---", "---"),
        *("sam", "+++", "00+", "---", "00-"),
        *("symmetric", "+++", "+0+", "0--", "-0-"),
    ]
    assert re.findall(r"^ *(?:import|from) (\w+)", (ROOT / "sam.py").read_text(), re.MULTILINE) == ["torch"]
