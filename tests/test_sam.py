"""sam.py against naive versions kept here: advantages, the credit of every token, the loss and its gradient."""

import ast
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sam
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
        assert (advantages_PG[[0, 2]] == 0).all()
        assert (advantages_PG[1] != 0).all() and advantages_PG[1, 0] > 0
    assert rounded, "some of the means must really round, or this tells nothing"
    almost_P3 = group_advantages(torch.tensor([[1.0, 1.0, 1.0 + 1e-5]]))  # no variance by a tolerance: a signal thrown away
    assert almost_P3[0, 2] > 0.5 and (almost_P3[0, :2] < 0).all()


def test_clamp_and_integer_rewards():
    """A clamp on one side only, integer or boolean rewards whose mean is refused or rounds."""
    rewards_PG = torch.tensor([[1] + [0] * 15, [0] + [1] * 15])
    advantages_PG = group_advantages(rewards_PG, clamp=2)
    assert advantages_PG.dtype == torch.float32
    assert advantages_PG[0, 0] == 2.0 and advantages_PG[1, 0] == -2.0
    assert group_advantages(rewards_PG)[0, 0] == pytest.approx(3.75, rel=1e-4)
    assert torch.equal(group_advantages(rewards_PG.bool(), clamp=2), advantages_PG)


@pytest.mark.parametrize("shape", [(4, 1), (4, 0), (8,), (2, 2, 2), ()])
def test_wrong_group_sizes_are_refused(shape):
    """A group of one, whose advantage is 0 or NaN, or flat rewards taken for one group."""
    with pytest.raises(ValueError, match=r"with G >= 2, got \["):
        group_advantages(torch.zeros(shape))


# Credit ---------------------------------------------------------------------------------------------------------------


def naive_kept(advantage, right, rule):
    """The steps of a well-formed answer that keep its advantage."""
    K, alone = len(right), right[0] is False and all(right[1:])  # the first step alone is wrong
    if rule == "none":
        return [True] * K
    if rule == "symmetric":
        return [(advantage > 0 and c) or (advantage < 0 and not c) for c in right]
    return [alone or c if right[-1] else not c for c in right[:-1]] + [True]


def naive_steps(step_ends, length):
    """The number of the step that each token of an answer belongs to."""
    return [min(sum(t >= end for end in step_ends), len(step_ends) - 1) for t in range(length)]


def naive_credit(advantages, ends, right, lengths, rule):
    """The docstring's rules, one token after the other."""
    credit = []
    for advantage, step_ends, step_right, length in zip(advantages, ends, right, lengths, strict=True):
        kept = naive_kept(advantage, step_right, rule) if step_ends[-1] else [True] * len(step_ends)  # else malformed
        credit += [advantage if kept[step] else 0.0 for step in naive_steps(step_ends, length)]
    return credit


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
    credit_A = stepwise_credit(*map(torch.tensor, batch), rule)
    assert credit_A.shape == (sum(batch[3]),) and credit_A.dtype == torch.float32
    assert credit_A.tolist() == naive_credit(*batch, rule)


KEPT = {"RRR": "111", "WRR": "111", "RWR": "101", "WWR": "001", "RRW": "001", "RWW": "011", "WRW": "101", "WWW": "111"}


@pytest.mark.parametrize("sign", [1, -1])
def test_the_eight_cases_of_sam_by_hand(sign):
    """A rule that is not the first author's: three verdicts, right or wrong beside the pair's label, and the steps kept."""
    right_NK = torch.tensor([[c == "R" for c in case] for case in KEPT])
    advantages_N = sign * torch.arange(1.0, 9)
    credit_A = stepwise_credit(advantages_N, torch.tensor([[1, 2, 3]] * 8), right_NK, torch.full((8,), 3))
    kept_NK = torch.tensor([[float(kept) for kept in steps] for steps in KEPT.values()])
    assert torch.equal(credit_A.view(8, 3), advantages_N[:, None] * kept_NK)
    naive = ["".join(str(int(kept)) for kept in naive_kept(sign, right, "sam")) for right in right_NK.tolist()]
    assert naive == [*KEPT.values()]


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
    assert torch.equal(stepwise_credit(*rows), stepwise_credit(*rows, "sam"))


def test_unknown_rules_are_refused():
    """A misspelt rule that silently is plain GRPO."""
    with pytest.raises(ValueError, match="rule must be one of none, sam, symmetric, got 'sym'"):
        stepwise_credit(torch.ones(1), torch.ones(1, 1).long(), torch.ones(1, 1).bool(), torch.ones(1).long(), "sym")


def test_rules_agree_on_one_step():
    """Rules that differ where there is nothing to tell apart: with one step, whose verdict is the answer, all are the same."""
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0]])
    advantages_N = group_advantages(rewards_PG).flatten()
    ends_NK = torch.tensor([[2]] * 9 + [[0]])
    for rule in RULES:
        credit_A = stepwise_credit(advantages_N, ends_NK, rewards_PG.view(10, 1) > 0, torch.full((10,), 3), rule)
        assert torch.equal(credit_A, advantages_N.repeat_interleave(3))


# The loss -------------------------------------------------------------------------------------------------------------


def batch(A=40, seed=0):
    """Inputs of policy_loss in which ratios go beyond both clips."""
    draw = torch.Generator().manual_seed(seed)
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


def part_of(inputs, tokens):
    """The same inputs for some of their tokens."""
    return {name: x[tokens] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


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


STATISTICS = ["tokens", "approx_kl", "clipped", "mismatch", "is_weight", "ref_kl"]
SETTINGS = [
    {},
    {"clip_low": 0.1, "clip_high": 0.4},
    {"is_cap": 1.0},
    {"kl_coef": 0.3},
    {"old_logprobs_A": None},
    {"sampler_logprobs_A": None},
    {"ref_logprobs_A": None, "kl_coef": 0.3},
    {"old_logprobs_A": None, "sampler_logprobs_A": None, "ref_logprobs_A": None},
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: "-".join(changes) or "all")
def test_loss_equals_the_naive_version(changes, seed):
    """Any wrong sign, side of the clip, weight, default or sum, in the value, the gradient or the statistics."""
    inputs = {**batch(seed=seed), **changes}
    loss, stats = policy_loss(**inputs)
    expected, gradient, sums = naive_loss(**inputs)
    assert loss.item() == pytest.approx(expected)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs["logprobs_A"])[0], gradient)
    assert {name: x.item() for name, x in stats.items()} == pytest.approx(sums)
    assert all(x.dtype == torch.float64 and not x.requires_grad for x in stats.values())
    if not changes:
        assert 0 < stats["clipped"] < stats["tokens"], "the batch must hold clipped tokens for this test to tell"


def test_kl_term_has_the_gradient_of_the_kl():
    """k1 (log p - log ref) averages to no gradient at all, k3 to that of the other KL."""
    draw = torch.Generator().manual_seed(0)
    logits_V, ref_V = (torch.randn(7, generator=draw, dtype=torch.float64) for _ in range(2))
    logits_V.requires_grad_()
    log_p, log_ref = torch.log_softmax(logits_V, -1), torch.log_softmax(ref_V, -1)
    exact = torch.autograd.grad((log_p.exp() * (log_p - log_ref)).sum(), logits_V)[0]
    assert exact.abs().max() > 0.05
    expected = torch.zeros_like(exact)
    for token in range(7):  # every token that can be sampled, weighted by its probability
        logprobs_A = torch.log_softmax(logits_V, -1)[[token]]
        loss, stats = policy_loss(logprobs_A, torch.zeros(1), 1, ref_logprobs_A=log_ref[[token]], kl_coef=0.5)
        expected += log_p[token].exp().detach() * torch.autograd.grad(loss, logits_V)[0] / 0.5
        assert stats["ref_kl"].item() == pytest.approx(0.5 * (log_p[token] - log_ref[token]).item() ** 2)
    torch.testing.assert_close(expected, exact)


def test_mean_over_answers_by_hand():
    """Kept tokens counted over the batch in place of the answer, or a malformed or silent answer that falls out of N."""
    credit_A = torch.tensor([1.0, 1, 0, 0, -2, 0, 0, 0, 0, 3, 3])
    got_A = mean_over_answers(credit_A, torch.tensor([4, 2, 3, 2]), 22, 11)
    assert got_A.tolist() == [1, 1, 0, 0, -4, 0, 0, 0, 0, 3, 3]


def naive_sam_loss(batch, logps, old, sampler, ref, kl_coef):
    """-(1/N) sum over answers of (1/T_i) sum over kept tokens of w min(rho A_i, clip(rho) A_i), plus a KL that is a mean over
    all tokens; one token after the other, with autograd."""
    total, first, num_tokens = 0.0, 0, len(logps)
    for advantage, step_ends, right, length in zip(*batch, strict=True):
        kept = naive_kept(advantage, right, "sam") if step_ends[-1] else [True] * len(right)
        tokens = [first + t for t, step in enumerate(naive_steps(step_ends, length)) if kept[step]]
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
    if expected.requires_grad:
        grads = [torch.autograd.grad(loss, logprobs_A)[0] for loss in (total, expected)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_inputs_are_not_mutated():
    """In-place work on the caller's tensors: 7 response tokens became 18 in a well-known normaliser."""
    inputs = {**batch(), "kl_coef": 0.1}
    rewards_PG = torch.tensor([[1, 0, 0], [1, 1, 1]])
    rows = (torch.randn(6), torch.tensor([[1, 2]] * 6), torch.ones(6, 2).bool(), torch.full((6,), 3))
    tensors = [x for x in (*inputs.values(), *rows, rewards_PG) if isinstance(x, torch.Tensor)]
    before = [x.detach().clone() for x in tensors]
    policy_loss(**inputs)[0].backward()
    for rule in RULES:
        credit_A = stepwise_credit(*rows, rule)
        rollout_stats(rewards_PG, rows[0], credit_A, rows[3], torch.ones(6).bool(), rows[1])
        mean_over_answers(credit_A, rows[3], 18, 6).zero_()
        assert torch.equal(credit_A, stepwise_credit(*rows, rule))
        credit_A.zero_()  # the result must not be a view of an input either
    group_advantages(rewards_PG, clamp=1.0).zero_()
    group_advantages(rewards_PG.float(), normalize_std=False).zero_()
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, before, strict=True))


def test_micro_batches_add_up():
    """A normaliser per micro-batch, which weighs the tokens of short ones more, or statistics that are means."""
    inputs = {**batch(), "kl_coef": 0.2}
    whole, stats = policy_loss(**inputs)
    gradient = torch.autograd.grad(whole, inputs["logprobs_A"])[0]
    parts = [policy_loss(**part_of(inputs, tokens)) for tokens in (slice(0, 9), slice(9, 9), slice(9, 10), slice(10, 40))]
    total = sum(loss for loss, _ in parts)
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, inputs["logprobs_A"])[0], gradient)
    for name, x in stats.items():
        torch.testing.assert_close(sum(part[name] for _, part in parts), x)


def test_an_empty_micro_batch_is_zero_with_gradient():
    """A rank without answers that cannot run backward, or adds NaN."""
    inputs = {**batch(), "kl_coef": 0.5}
    loss, stats = policy_loss(**part_of(inputs, slice(0, 0)))
    assert loss.item() == 0 and stats == dict.fromkeys(STATISTICS, 0.0)
    assert not torch.autograd.grad(loss, inputs["logprobs_A"])[0].any()


@pytest.mark.parametrize("name", ["credit_A", "old_logprobs_A", "sampler_logprobs_A", "ref_logprobs_A"])
def test_mismatched_shapes_are_refused(name):
    """One token that broadcasts over the whole batch, or padded rows among packed ones."""
    inputs = batch()
    for other in (inputs[name][:1], inputs[name][0], inputs[name][None]):
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
    assert all(type(value) is float for value in stats.values())
    silent = rollout_stats(torch.zeros(3, 2), torch.zeros(6), torch.zeros(17), lengths_N, ended_N, ends_NK)
    assert silent["masked"] == 0.0 and silent["frac_zero_std"] == 1.0


def test_step_stats():
    """Steps counted in the wrong place, shares of the wrong whole, credit weighed by its sign alone; 0 / 0 where no answer won,
    none lost, or none has credit."""
    won_N = torch.tensor([True, True, False])
    right_NK = torch.tensor([[True, True], [False, True], [True, False]])
    credit_NK = torch.tensor([[2.0, 0.0], [1.0, 0.5], [-0.5, -4.0]])
    assert step_stats(won_N, right_NK, credit_NK) == pytest.approx({
        "steps_right": 4 / 6, "wrong_in_right": 1 / 4, "right_in_wrong": 1 / 2, "right_throughout": 1 / 2,
        "credit_right": 6.5 / 8,  # 2, 0.5 and 4 of 8
    })  # fmt: skip
    stats = step_stats(torch.tensor([True]), torch.tensor([[True]]), torch.zeros(1, 1))
    assert stats == {"steps_right": 1, "wrong_in_right": 0, "right_in_wrong": None, "right_throughout": 1, "credit_right": None}
    stats = step_stats(torch.tensor([False]), torch.tensor([[True]]), torch.tensor([[-1.0]]))
    assert stats["wrong_in_right"] is None and stats["right_throughout"] is None and stats["credit_right"] == 0


# python sam.py --------------------------------------------------------------------------------------------------------


def test_copied_alone_it_prints_without_colour_codes(tmp_path):
    """An import of a project file or of a library but torch, escape codes in a log file, or a picture of other rules."""
    source = Path(sam.__file__)
    shutil.copy(source, tmp_path)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "sam.py"], cwd=tmp_path, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    assert "\033" not in done.stdout and done.stderr == ""
    shown = re.findall(r"rule (\w+):|A = \S+  (.*)", done.stdout)
    signs = ["".join(re.findall(r"\[([-+0]) ", line)) if line else rule for rule, line in shown]
    # Of the four answers [3, 1, 1], [3, 3, 1], [3, 3, 3] and [1, 1, 0], the first two won; the label is 1.
    assert signs == [
        *("none", "+++", "+++", "---", "---"),
        *("sam", "+++", "00+", "---", "00-"),
        *("symmetric", "+++", "+0+", "0--", "-0-"),
    ]
    nodes = list(ast.walk(ast.parse(source.read_text())))
    imported = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"torch"}
