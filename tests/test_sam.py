"""sam.py against naive versions kept here: advantages, the credit of every token, the loss and its gradient."""

import ast
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sam
from sam import RULES, group_advantages, policy_loss, rollout_stats, spread, step_stats, stepwise_credit, tree_credit

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


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 0.7, 1e-8, 12345.678])
@pytest.mark.parametrize("G", [2, 3, 7, 16])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_a_group_without_variance_gets_exactly_zero(value, G, normalize_std):
    """The mean of equal floats differs from them by rounding; divided by a deviation of rounding it looks like a signal."""
    rewards_PG = torch.full((3, G), value)
    rewards_PG[1, 0] += 1.0
    advantages_PG = group_advantages(rewards_PG, normalize_std)
    assert (advantages_PG[[0, 2]] == 0).all()
    assert (advantages_PG[1] != 0).all() and advantages_PG[1, 0] > 0


def test_rounding_of_the_mean_is_real():
    """The test above telling nothing: for some of its groups the mean must really differ from the values."""
    rounded = [torch.full((1, G), value) for value in (0.1, 1 / 3, 0.7) for G in (3, 7, 16)]
    assert any((x != x.mean(1, keepdim=True)).any() for x in rounded)


def test_almost_equal_rewards_are_not_equal():
    """Zero variance judged by a tolerance: small but real differences would be thrown away."""
    advantages_PG = group_advantages(torch.tensor([[1.0, 1.0, 1.0 + 1e-5]]), normalize_std=True)
    assert advantages_PG[0, 2] > 0.5 and (advantages_PG[0, :2] < 0).all()


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
    with pytest.raises(ValueError, match=r"groups of at least 2 answers, got \["):
        group_advantages(torch.zeros(shape))


# Credit ---------------------------------------------------------------------------------------------------------------


def naive_credit(advantages, ends, right, lengths, rule):
    """The docstring's rules, one token after the other."""
    credit = []
    for advantage, step_ends, step_right, length in zip(advantages, ends, right, lengths, strict=True):
        for t in range(length):
            if step_ends[-1] == 0:  # malformed
                credit.append(advantage)
                continue
            step = 0
            while step < len(step_ends) - 1 and t >= step_ends[step]:
                step += 1
            keep = True
            if rule == "symmetric":
                keep = (advantage > 0 and step_right[step]) or (advantage < 0 and not step_right[step])
            if rule == "positive":
                keep = not (advantage > 0 and not step_right[step])
            credit.append(advantage if keep else 0.0)
    return credit


@st.composite
def answers(draw):
    """advantages, ends, right and lengths of a batch with well-formed and malformed answers, some of those empty."""
    K, N, longest = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(4, 14))
    ends, lengths = [], []
    for _ in range(N):
        steps = sorted(draw(st.sets(st.integers(1, longest), min_size=K, max_size=K)))
        malformed = draw(st.booleans()) and draw(st.booleans())
        ends.append([0] * K if malformed else steps)
        lengths.append(draw(st.integers(0 if malformed else steps[-1], longest)))
    value = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.5])
    advantages = draw(st.lists(value, min_size=N, max_size=N))
    right = [draw(st.lists(st.booleans(), min_size=K, max_size=K)) for _ in range(N)]
    return advantages, ends, right, lengths


@pytest.mark.parametrize("rule", RULES)
@given(answers())
@QUICK
def test_credit_equals_the_naive_version(rule, batch):
    """Spans off by one, right steps punished or wrong ones rewarded, credit that slips into the next answer."""
    credit_A = stepwise_credit(*map(torch.tensor, batch), rule)
    assert credit_A.shape == (sum(batch[3]),) and credit_A.dtype == torch.float32
    assert credit_A.tolist() == naive_credit(*batch, rule)


def test_credit_by_hand():
    """The naive version being wrong in the same way: one winning and one losing answer, three steps, EOS."""
    ends_NK, right_NK = torch.tensor([[2, 4, 5]] * 2), torch.tensor([[True, False, True]] * 2)
    rows = torch.tensor([2.0, -2.0]), ends_NK, right_NK, torch.tensor([6, 7])
    expected = {
        "symmetric": [2, 2, 0, 0, 2, 2, 0, 0, -2, -2, 0, 0, 0],
        "positive": [2, 2, 0, 0, 2, 2] + [-2] * 7,
        "none": [2] * 6 + [-2] * 7,
    }
    for rule, credit in expected.items():
        assert stepwise_credit(*rows, rule).tolist() == credit
    assert torch.equal(stepwise_credit(*rows), stepwise_credit(*rows, "symmetric"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("right", [True, False])
def test_malformed_answers_keep_their_advantage(rule, right):
    """An answer without steps masked as a whole: nothing would ever teach the model the form."""
    ends_NK, right_NK = torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), right)
    credit_A = stepwise_credit(torch.tensor([-1.5, 0.5]), ends_NK, right_NK, torch.tensor([4, 2]), rule)
    assert credit_A.tolist() == [-1.5] * 4 + [0.5] * 2


@pytest.mark.parametrize("right", [True, False])
def test_the_end_of_sequence_shares_the_last_step_s_credit(right):
    """EOS without credit: an answer is never taught to stop. And text behind the last box counted as a step of its own."""
    right_NK = torch.tensor([[not right, right]])
    for length in (5, 8):
        credit_A = stepwise_credit(torch.tensor([1.0]), torch.tensor([[2, 4]]), right_NK, torch.tensor([length]))
        assert credit_A.tolist() == [float(not right)] * 2 + [float(right)] * (length - 2)


def test_unknown_rules_are_refused():
    """A misspelt rule that silently is plain GRPO."""
    with pytest.raises(ValueError, match="rule must be one of symmetric, positive, none, got 'sym'"):
        stepwise_credit(torch.ones(1), torch.ones(1, 1).long(), torch.ones(1, 1).bool(), torch.ones(1).long(), "sym")


def naive_tree(advantages, ends, verdicts, lengths, G):
    """The docstring of tree_credit, one token after the other, in float64."""
    credit = []
    for n, length in enumerate(lengths):
        group = range(n // G * G, n // G * G + G)
        for t in range(length):
            if ends[n][-1] == 0:  # malformed
                credit.append(advantages[n])
                continue
            step = min(sum(t >= end for end in ends[n]), len(ends[n]) - 1)
            values = []
            for k in (step, step + 1):
                branch = [m for m in group if k == 0 or (ends[m][-1] and verdicts[m][:k] == verdicts[n][:k])]
                values.append(sum(advantages[m] for m in branch) / len(branch))
            credit.append(values[1] - values[0])
    return credit


@st.composite
def groups(draw):
    """advantages [P, G], ends, verdicts and lengths of groups with well-formed and malformed answers."""
    K, P, G = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 5))
    ends, lengths = [], []
    for _ in range(P * G):
        steps = sorted(draw(st.sets(st.integers(1, 9), min_size=K, max_size=K)))
        malformed = draw(st.integers(0, 3)) == 0
        ends.append([0] * K if malformed else steps)
        lengths.append(draw(st.integers(0 if malformed else steps[-1], 9)))
    rewards = [draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=G, max_size=G)) for _ in range(P)]
    verdicts = [draw(st.lists(st.integers(0, 2), min_size=K, max_size=K)) for _ in range(P * G)]
    clamp = draw(st.sampled_from([None, 1.0]))
    return group_advantages(torch.tensor(rewards), draw(st.booleans()), clamp), ends, verdicts, lengths


@given(groups())
@QUICK
def test_tree_credit_equals_the_naive_version(batch):
    """Branches shared between groups, with malformed answers, or by a later verdict after the first ones differed."""
    advantages_PG, ends, verdicts, lengths = batch
    credit_A = tree_credit(advantages_PG, *map(torch.tensor, (ends, verdicts, lengths)))
    expected = naive_tree(advantages_PG.flatten().tolist(), ends, verdicts, lengths, advantages_PG.shape[1])
    assert credit_A.shape == (sum(lengths),) and credit_A.dtype == torch.float32
    assert credit_A.tolist() == pytest.approx(expected, abs=1e-6)


def test_tree_credit_by_hand():
    """The naive version being wrong in the same way. Two groups of four, three steps of one token and EOS, advantages without
    deviation; the last answer of the second group is malformed."""
    rewards_PG = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    verdicts_NK = torch.tensor([[3, 1, 1], [3, 3, 1], [3, 3, 3], [1, 1, 0], [2, 2, 2], [2, 2, 1], [2, 0, 1], [0, 0, 0]])
    ends_NK = torch.tensor([[1, 2, 3]] * 7 + [[0, 0, 0]])
    credit_A = tree_credit(group_advantages(rewards_PG, normalize_std=False), ends_NK, verdicts_NK, torch.full((8,), 4))
    # Values of the first group (chance of a reward): root 1/2; 3: 2/3, 1: 0; 3 1: 1, 3 3: 1/2; 3 3 1: 1, 3 3 3: 0.
    # Of the second: root 1/4; 2: 1/3; 2 2: 1/2, 2 0: 0; 2 2 2: 1, 2 2 1: 0.
    expected = [[1 / 6, 1 / 3, 0], [1 / 6, -1 / 6, 1 / 2], [1 / 6, -1 / 6, -1 / 2], [-1 / 2, 0, 0]]
    expected += [[1 / 12, 1 / 6, 1 / 2], [1 / 12, 1 / 6, -1 / 2], [1 / 12, -1 / 3, 0], [-1 / 4, -1 / 4, -1 / 4]]
    expected_N4 = torch.tensor([[*steps, steps[-1]] for steps in expected])  # EOS shares the last step's
    torch.testing.assert_close(credit_A.view(8, 4), expected_N4)
    assert credit_A[2] == 0 and credit_A[13] == 0, "a step behind which nothing was open any more"


@given(groups())
@QUICK
def test_tree_credit_shares_out_the_advantage(batch):
    """Credit made or lost on the way: where the verdicts decide the reward, an answer's steps add up to its advantage; in a
    group without a signal to nothing, exactly."""
    advantages_PG, ends, verdicts, _ = batch
    K = len(ends[0])
    well_N = torch.tensor(ends)[:, -1] > 0
    verdicts_NK = torch.tensor(verdicts)
    advantages_PG = group_advantages(((verdicts_NK[:, -1] == 1) & well_N).view(advantages_PG.shape))
    ends_NK = torch.arange(1, K + 1) * well_N[:, None]  # one token a step
    credit_NK = tree_credit(advantages_PG, ends_NK, verdicts_NK, torch.full((len(ends),), K)).view(-1, K)
    torch.testing.assert_close(credit_NK.sum(1)[well_N], advantages_PG.flatten()[well_N], rtol=0, atol=1e-6)
    silent_N = (advantages_PG == 0).all(1).repeat_interleave(advantages_PG.shape[1])
    assert not credit_NK[silent_N].any()


def test_one_step_of_tree_credit_is_plain_grpo():
    """Rules that differ where there is nothing to tell apart: with one step, whose verdict is the answer, all are the same."""
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0]])
    advantages_PG = group_advantages(rewards_PG)
    ends_NK = torch.tensor([[2]] * 9 + [[0]])
    verdicts_NK = torch.tensor([[1], [0], [2], [1], [0], [0], [2], [0], [3], [0]])
    right_NK = rewards_PG.view(10, 1) > 0
    lengths_N = torch.full((10,), 3)
    plain_A = stepwise_credit(advantages_PG.flatten(), ends_NK, right_NK, lengths_N, "none")
    assert plain_A.any()
    for rule in RULES:
        assert torch.equal(stepwise_credit(advantages_PG.flatten(), ends_NK, right_NK, lengths_N, rule), plain_A)
    torch.testing.assert_close(tree_credit(advantages_PG, ends_NK, verdicts_NK, lengths_N), plain_A)


def test_spread():
    """A step's credit beyond its box, or the end-of-sequence token with none."""
    credit_NK = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    got_A = spread(credit_NK, torch.tensor([[2, 3], [1, 2], [0, 0]]), torch.tensor([4, 2, 2]))
    assert got_A.tolist() == [1, 1, 2, 2, 3, 4, 6, 6]


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


def naive_loss(
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
    """Value, gradient and statistics, one token after the other, the gradient by hand."""
    total, gradient, stats = 0.0, torch.zeros_like(logprobs_A), [0.0] * 6
    for t in range(len(logprobs_A)):
        now, credit = logprobs_A[t].item(), credit_A[t].item()
        old = now if old_logprobs_A is None else old_logprobs_A[t].item()
        sampler = old if sampler_logprobs_A is None else sampler_logprobs_A[t].item()
        ref = now if ref_logprobs_A is None else ref_logprobs_A[t].item()
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
        rollout_stats(rewards_PG, rows[0], credit_A, rows[3], torch.ones(6).bool())
        credit_A.zero_()  # the result must not be a view of an input either
    advantages_PG, verdicts_NK = torch.randn(2, 3), torch.ones(6, 2).long()
    tensors += [advantages_PG, verdicts_NK]
    before += [advantages_PG.clone(), verdicts_NK.clone()]
    tree_credit(advantages_PG, rows[1], verdicts_NK, rows[3]).zero_()
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
        with pytest.raises(ValueError, match=r"has shape \[.*, log-probabilities \[40\]"):
            policy_loss(**{**inputs, name: other})


# What to watch --------------------------------------------------------------------------------------------------------


def test_rollout_stats():
    """Tokens of another answer counted, groups without variance judged by rounding, answers without advantage as masked."""
    rewards_PG = torch.tensor([[1.0, 0.0], [0.1, 0.1], [1.0, 1.0]])
    advantages_N = group_advantages(rewards_PG).flatten()
    lengths_N = torch.tensor([3, 4, 2, 2, 5, 1])
    ends_NK = torch.tensor([[1, 2], [1, 3], [1, 2], [1, 2], [1, 2], [0, 0]])
    right_NK = torch.tensor([[True, False], [True, False]] + [[False, False]] * 4)
    credit_A = stepwise_credit(advantages_N, ends_NK, right_NK, lengths_N)
    ended_N = torch.tensor([True, True, True, True, True, False])
    stats = rollout_stats(rewards_PG, advantages_N, credit_A, lengths_N, ended_N)
    # Of the first answer (won) tokens 1 and 2 are masked, of the second (lost) token 0: 3 of 7.
    expected = {"reward": (1 + 0 + 0.1 + 0.1 + 1 + 1) / 6, "frac_zero_std": 2 / 3, "truncated": 1 / 6, "masked": 3 / 7}
    assert stats == pytest.approx({**expected, "length": 17 / 6})
    assert all(type(value) is float for value in stats.values())


def test_rollout_stats_without_signal():
    """0 / 0 where no group has a signal."""
    stats = rollout_stats(torch.zeros(1, 2), torch.zeros(2), torch.zeros(6), torch.tensor([3, 3]), torch.ones(2).bool())
    assert stats["masked"] == 0.0 and stats["frac_zero_std"] == 1.0


def test_step_stats():
    """Steps counted in the wrong place, shares of the wrong whole, credit weighed by its sign alone."""
    won_N = torch.tensor([True, True, False])
    right_NK = torch.tensor([[True, True], [False, True], [True, False]])
    credit_NK = torch.tensor([[2.0, 0.0], [1.0, 0.5], [-0.5, -4.0]])
    assert step_stats(won_N, right_NK, credit_NK) == pytest.approx({
        "steps_right": 4 / 6, "wrong_in_right": 1 / 4, "right_in_wrong": 1 / 2, "right_throughout": 1 / 2,
        "credit_right": 6.5 / 8,  # 2, 0.5 and 4 of 8
    })  # fmt: skip


def test_step_stats_of_nothing():
    """0 / 0 where no answer won, none lost, or none has credit."""
    stats = step_stats(torch.tensor([True]), torch.tensor([[True]]), torch.zeros(1, 1))
    assert stats == {"steps_right": 1, "wrong_in_right": 0, "right_in_wrong": None, "right_throughout": 1, "credit_right": None}
    stats = step_stats(torch.tensor([False]), torch.tensor([[True]]), torch.tensor([[-1.0]]))
    assert stats["wrong_in_right"] is None and stats["right_throughout"] is None and stats["credit_right"] == 0


# python sam.py --------------------------------------------------------------------------------------------------------


def test_paint():
    """Colours of the wrong sign, or no way to tell credit where there is no colour."""
    assert sam.paint(["a", "b", "c"], [0.5, -1.0, 0.0], color=False) == "[+ a] [- b] [0 c]"
    assert sam.paint(["a", "b", "c"], [0.5, -1.0, 0.0], color=True) == "\033[32ma\033[0m \033[31mb\033[0m \033[90mc\033[0m"


def test_copied_alone_it_prints_without_colour_codes(tmp_path):
    """An import of a project file or of a library but torch, and escape codes in a pipe or a log file."""
    source = Path(sam.__file__)
    shutil.copy(source, tmp_path)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "sam.py"], cwd=tmp_path, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    assert "\033" not in done.stdout and done.stderr == ""
    for rule in (*RULES, "tree"):
        assert f"rule {rule}" in done.stdout
    assert done.stdout.count("A = ") == 16
    # The winner by luck, [3, 3, 1]: its wrong second step earns nothing under SAM, everything under plain GRPO, and is punished
    # by the tree: of the answers that share it, fewer won.
    lucky = [line for line in done.stdout.splitlines() if r"topic \boxed{3}" in line and r"constraints \boxed{3}" in line]
    signs = [line.split("constraints")[0].rsplit("[", 1)[1].strip() for line in lucky if r"promotion \boxed{1}" in line]
    assert signs == ["0", "0", "+", "-"]
    nodes = list(ast.walk(ast.parse(source.read_text())))
    imported = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"torch"}
