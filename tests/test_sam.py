"""sam.py against naive versions kept here: advantages, the credit of every token, the loss and its gradient."""

import copy
import itertools
import math
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sam import RULES, group_advantages, mean_over_answers, policy_loss, rollout_stats, step_stats, stepwise_credit

QUICK = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("clamp", [None, 0.9])
def test_advantages_are_relative_to_the_group(normalize_std, clamp):
    """A mean or deviation over the batch in place of the group, the biased deviation, the wrong sign, a clamp on one side only,
    integer rewards that are refused or rounded."""
    rewards_PG = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 2, 5, -1]])
    for rewards, got in zip(rewards_PG.tolist(), group_advantages(rewards_PG, normalize_std, clamp).tolist(), strict=True):
        mean, limit = sum(rewards) / 4, clamp or math.inf
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3) if normalize_std else 1.0
        assert got == pytest.approx([min(max((r - mean) / std, -limit), limit) for r in rewards], rel=1e-4)


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


def naive_keeps(advantage, step_ends, right, length, rule):
    """Whether each token of an answer keeps its advantage, one after the other."""
    first_alone = right[0] is False and all(right[1:])  # is wrong
    kept = {
        "none": [True] * len(right),
        "sam": [first_alone or c == right[-1] for c in right[:-1]] + [True],
        "symmetric": [c == (advantage > 0) for c in right],
    }[rule if step_ends[-1] else "none"]  # a malformed answer keeps all
    return [kept[min(sum(t >= end for end in step_ends), len(kept) - 1)] for t in range(length)]


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


def test_the_eight_cases_of_sam_by_hand():
    """A rule that is not the first author's: three verdicts, right or wrong beside the pair's label, and the steps kept,
    whatever the sign of the advantage; what follows the last box in a step of its own."""
    cases, kept = "RRR WRR RWR WWR RRW RWW WRW WWW".split(), "111 111 101 001 001 011 101 111".split()
    right_NK = torch.tensor([[c == "R" for c in case] for case in cases]).repeat(2, 1)
    kept_NT = torch.tensor([[float(keep) for keep in steps + steps[-1]] for steps in kept]).repeat(2, 1)
    advantages_N = torch.cat([torch.arange(1.0, 9), -torch.arange(1.0, 9)])
    credit_A = stepwise_credit(advantages_N, torch.tensor([[1, 2, 3]] * 16), right_NK, torch.full((16,), 4))
    assert torch.equal(credit_A.view(16, 4), advantages_N[:, None] * kept_NT)


def batch():
    """Inputs of policy_loss in which ratios go beyond both clips."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda scale: scale * torch.randn(40, generator=draw, dtype=torch.float64)
    old_A = -normal(1).abs() - 0.1
    return {
        "logprobs_A": (old_A + normal(0.3)).requires_grad_(),
        "credit_A": normal(1) * (torch.rand(40, generator=draw) < 0.7),
        "denominator": 20,
        "old_logprobs_A": old_A,
        "sampler_logprobs_A": old_A + normal(0.6),
        "ref_logprobs_A": old_A + normal(0.5),
    }


def naive_loss(denominator, clip_low=0.2, clip_high=0.28, is_cap=2.0, kl_coef=0.0, **rows):
    """Value, gradient and statistics, one token after the other, the gradient by hand."""
    total, gradient, stats = 0.0, torch.zeros_like(rows["logprobs_A"]), Counter()
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
        stats.update(tokens=1, clipped=stopped, mismatch=abs(old - sampler), is_weight=weight)
        stats.update(approx_kl=0.5 * (now - old) ** 2, ref_kl=0.5 * (now - ref) ** 2)
    return total, gradient, stats


@pytest.mark.parametrize("changes", [
    {},
    {"clip_low": 0.1, "clip_high": 0.4, "is_cap": 1.0, "kl_coef": 0.3},
    {"old_logprobs_A": None},
    {"sampler_logprobs_A": None},
    {"ref_logprobs_A": None, "kl_coef": 0.3},
], ids="-".join)  # fmt: skip
def test_loss_equals_the_naive_version(changes):
    """Any wrong sign, side of the clip, weight, default or sum, in the value, the gradient or the statistics; a normaliser per
    micro-batch, or an empty one that is NaN or cannot run backward, while other ranks wait."""
    inputs = {**batch(), **changes}
    loss, gradient, sums = naive_loss(**inputs)
    assert changes or 0 < sums["clipped"] < sums["tokens"], "the batch must hold clipped tokens for this test to tell"
    for cuts in ([0, 40], [0, 9, 9, 10, 40]):
        parts = []
        for start, stop in itertools.pairwise(cuts):
            parts.append({name: x[start:stop] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()})
        losses, stats = zip(*(policy_loss(**part) for part in parts), strict=True)
        gradients = [torch.autograd.grad(part_loss, inputs["logprobs_A"])[0] for part_loss in losses]
        assert sum(losses).item() == pytest.approx(loss)
        torch.testing.assert_close(sum(gradients), gradient)
        assert {name: sum(part[name].item() for part in stats) for name in stats[0]} == pytest.approx(sums)


def naive_sam_loss(batch, logps, old, sampler, ref, kl_coef):
    """-(1/N) sum over answers of (1/T_i) sum over kept tokens of w min(rho A_i, clip(rho) A_i), plus a KL that is a mean over
    all tokens; one token after the other, with autograd."""
    total, first, num_tokens = 0.0, 0, len(logps)
    for advantage, step_ends, right, length in zip(*batch, strict=True):
        keeps = naive_keeps(advantage, step_ends, right, length, "sam")
        tokens = [first + t for t in range(length) if keeps[t]]
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
    rewards_PG = torch.tensor([[1.0, 0, 0], [1, 1, 1]])
    rows = (torch.randn(6), torch.tensor([[1, 2]] * 6), torch.ones(6, 2).bool(), torch.full((6,), 3))
    before = copy.deepcopy((rewards_PG, *rows))
    group_advantages(rewards_PG, normalize_std=False, clamp=1.0).zero_()
    for rule in RULES:
        credit_A = stepwise_credit(*rows, rule)
        mean_over_answers(credit_A, rows[3], 18, 6).zero_()
        assert torch.equal(credit_A, stepwise_credit(*rows, rule))
        credit_A.zero_()
    assert all(map(torch.equal, (rewards_PG, *rows), before))


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


def test_rollout_stats():
    """Tokens of another answer counted, groups without variance judged by rounding, 0 / 0 where no group has a signal."""
    rewards_PG = torch.tensor([[1.0, 0.0], [0.1, 0.1], [1.0, 1.0]])
    advantages_N = group_advantages(rewards_PG).flatten()
    lengths_N, ended_N = torch.tensor([3, 4, 2, 2, 5, 1]), torch.tensor([True] * 5 + [False])
    ends_NK = torch.tensor([[1, 2], [1, 3], [1, 2], [0, 0], [1, 2], [0, 0]])
    right_NK = torch.tensor([[True, False], [True, False]] + [[False, False]] * 4)
    credit_A = stepwise_credit(advantages_N, ends_NK, right_NK, lengths_N, "symmetric")
    stats = rollout_stats(rewards_PG, advantages_N, credit_A, lengths_N, ended_N, ends_NK)
    # Of the first answer (won) tokens 1 and 2 are masked, of the second (lost) token 0: 3 of 7.
    expected = {"reward": (1 + 0 + 0.1 + 0.1 + 1 + 1) / 6, "frac_zero_std": 2 / 3, "truncated": 1 / 6, "masked": 3 / 7}
    assert stats == pytest.approx({**expected, "malformed": 2 / 6, "length": 17 / 6})
    assert rollout_stats(torch.zeros(3, 2), torch.zeros(6), torch.zeros(17), lengths_N, ended_N, ends_NK)["masked"] == 0


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


def test_copied_alone_it_prints_without_colour_codes(tmp_path):
    """An import of a project file or of a library but torch, escape codes in a log file, or a picture of other rules."""
    shutil.copy(ROOT / "sam.py", tmp_path)
    env = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "sam.py"], cwd=tmp_path, capture_output=True, text=True, env=env)
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
