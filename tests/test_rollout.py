"""rollout.py: the tree against the naive forward, row by row, and the sampler against naive draws."""

import copy
import gc
import importlib
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import conftest
import cuda_standin
import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, NOTES, ROOT, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grm
import rollout

LABELS = [3, 60, 2]
PREFIX = [7, 8, 9, 10, 11, 12]
PROMPTS = {
    "unequal": [[*PREFIX, 20, 21, 22], [*PREFIX, 23], [*PREFIX, 24, 25, 26, 27, 28]],
    "no common prefix": [[20, 21, 22], [23, 24], [25]],
    "identical": [[*PREFIX, 20], [*PREFIX, 20]],
    "one is the prefix of another": [[*PREFIX, 20], [*PREFIX, 20, 21, 22]],
    "one prompt": [[*PREFIX, 20, 21]],
    "one token": [[5], [6]],
}
UNEQUAL = PROMPTS["unequal"]
draw = np.random.default_rng(0)
UNEVEN = [[*PREFIX, *draw.integers(3, 60, n).tolist()] for n in (1, 4, 2, 6, 3, 2, 5)]


def some_answers(prompts, group):
    """Answers of 1 to 6 tokens; the first of each group has one token."""
    draw = np.random.default_rng(0)
    sizes = [[1 if g == 0 else int(draw.integers(1, 7)) for g in range(group)] for _ in prompts]
    return [[draw.integers(3, 60, n).tolist() for n in row] for row in sizes]


def naive(model, prompts, answers, temperature=1.0):
    """Logits and log-probabilities of the answers' tokens, each row alone through the plain forward."""
    parts = []
    for prompt, group in zip(prompts, answers, strict=True):
        for answer in group:
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
            logps = torch.log_softmax(logits / temperature, -1)
            parts.append((logits, logps.gather(1, torch.tensor(answer)[:, None])[:, 0]))
    return [torch.cat(values) for values in zip(*parts, strict=True)]


def through_tree(model, prompts, answers, temperature=1.0):
    return rollout.Policy(model)(rollout.Tree(prompts, answers), temperature)[0]


def relative(a, b, least=1e-12):
    """Largest difference over the largest value of b, or over `least` where b is zero but for rounding."""
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=least))


def compare_gradients(architecture, prompts, answers, checkpointing=False, **changes):
    """Logits, log-probabilities and the gradient of every parameter."""
    plain, packed = (make_model(architecture, tree, **changes) for tree in (False, True))
    if checkpointing:
        packed.train().activation_checkpointing_enable()
    logits, expected = naive(plain, prompts, answers)
    hidden = rollout.answer_hidden(packed, rollout.Tree(prompts, answers))
    assert relative(packed.get_output_embeddings()(hidden), logits) < 1e-5
    got = through_tree(packed, prompts, answers)
    assert relative(got, expected) < 1e-5
    weights = torch.linspace(-1, 2, len(expected))
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    largest = max(float(p.grad.abs().max()) for p in plain.parameters())
    for (name, a), b in zip(packed.named_parameters(), plain.parameters(), strict=True):
        assert relative(a.grad, b.grad, 1e-2 * largest) < 1e-5, name


def sample(model, prompts, **settings):
    return rollout.sample(model, prompts, **{"max_new_tokens": 9, "eos_id": 2, "seed": 3, "label_ids": LABELS, **settings})


def sample_naively(model, prompts, *, group_size, max_new_tokens, eos_id=2):
    """The same draws, each answer by itself from the plain forward over all its tokens so far."""
    answers, logprobs, label_logits = [], [], []
    draws = rollout.uniforms(3, 0, range(len(prompts) * group_size), max_new_tokens)
    for row, us in enumerate(draws):
        prompt, answer = prompts[row // group_size], []
        while len(answer) < max_new_tokens and answer[-1:] != [eos_id]:
            logits = model(torch.tensor([prompt + answer])).logits[0, -1].detach()
            cdf = torch.softmax(logits.double(), -1).cumsum(-1)
            answer.append(int(torch.searchsorted(cdf, us[len(answer)] * cdf[-1], right=True)))
            logprobs.append(torch.log_softmax(logits, -1)[answer[-1]])
            label_logits.append(logits[LABELS])
        answers.append(answer)
    lengths_N = torch.tensor([len(answer) for answer in answers])
    ended_N = torch.tensor([answer[-1] == eos_id for answer in answers])
    groups = [answers[i : i + group_size] for i in range(0, len(answers), group_size)]
    return rollout.Rollout(groups, lengths_N, ended_N, torch.stack(logprobs).float(), torch.stack(label_logits).float())


def assert_same(a, b):
    """Two rollouts of the same tokens, and the same numbers but for rounding."""
    assert a.answers == b.answers
    assert torch.equal(a.lengths_N, b.lengths_N) and torch.equal(a.ended_N, b.ended_N)
    torch.testing.assert_close(a.logprobs_A, b.logprobs_A)
    torch.testing.assert_close(a.label_logits_AY, b.label_logits_AY, atol=2e-5, rtol=1e-5)


# Factors on logits and elsewhere: Granite divides by its own, Cohere multiplies.
GRANITE = {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
FACTORS = {"granite": GRANITE, "granitemoe": GRANITE, "cohere": {"logit_scale": 0.25}}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt2", *FACTORS])
def test_every_architecture_trains_and_samples_as_the_plain_forward(architecture):
    """A keyword that a model does not hand down, a position that it counts itself or a factor behind its head would change the
    result; a temperature that sampler and trainer do not share would move the ratio between them from 1."""
    changes = FACTORS.get(architecture, {})
    compare_gradients(architecture, UNEQUAL, some_answers(UNEQUAL, 3), **changes)
    model = make_model(architecture, **changes)
    assert rollout.check_model(model, 128) < 1e-5
    out = sample(model, UNEQUAL, group_size=3, temperature=0.8)
    logits, logprobs = naive(make_model(architecture, tree=False, **changes), UNEQUAL, out.answers, 0.8)
    torch.testing.assert_close(out.logprobs_A, logprobs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(through_tree(model, UNEQUAL, out.answers, 0.8), logprobs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out.label_logits_AY, logits[:, LABELS], atol=5e-5, rtol=1e-5)


@pytest.fixture(params=["cpu", "cuda"])
def kernel(request, monkeypatch):
    """The kernels of a CPU, which take padded sequences, or the path of CUDA, whose take packed ones. There models are in
    float64: float32 is refused, and of bfloat16 the numbers could not be compared closely."""
    if request.param == "cuda":
        cuda_standin.install(monkeypatch)
        monkeypatch.setitem(globals(), "make_model", lambda *args, **changes: conftest.make_model(*args, **changes).double())
    return request.param


@pytest.mark.parametrize(("sharing", "prefix"), [(1, 0), (3, 7), (8, 7)])
def test_attention_equals_one_softmax(kernel, sharing, prefix):
    """Segments merged by their log-sum-exps, and their kernels' gradients, against one softmax over all a token sees."""
    torch.manual_seed(1)
    prompts, groups = [3, 1, 4], [[2, 1], [0, 5], [1, 1]]
    rows = [[9] * prefix + [p] + [8] * (n - 1) for p, n in enumerate(prompts)]
    tree = rollout.Tree(rows, [[[7] * (n + 1) for n in group] for group in groups])
    S, K, D = tree.input_ids.shape[1], 2, 8
    owners = [(0, 0)] * prefix + [(p + 1, 0) for p, n in enumerate(prompts) for _ in range(n)]
    owners += [(p + 1, 2 * p + a + 1) for p, group in enumerate(groups) for a, n in enumerate(group) for _ in range(n)]
    shared = lambda a, b: b[0] in (0, a[0]) and b[1] in (0, a[1])
    sees = [[j <= i and shared(owners[i], owners[j]) for j in range(S)] for i in range(S)]
    shapes = [(S, K * sharing, D), (S, K, D), (S, K, D)]
    q, k, v = leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(sharing, 1)) * 0.3
    probs = torch.softmax(scores.masked_fill(~torch.tensor(sees), float("-inf")), -1)
    expected = torch.einsum("hij,jhd->ihd", probs, v.repeat_interleave(sharing, 1))
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
    wanted = [expected, *torch.autograd.grad((expected * weights).sum(), leaves)]
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        copies = [x.detach().to(dtype).requires_grad_() for x in leaves]
        out = tree.attend(0, *copies, 0.3)
        got = [out, *torch.autograd.grad((out * weights.to(dtype)).sum(), copies)]
        assert out.dtype == dtype and all(relative(*pair) < bound for pair in zip(got, wanted, strict=True))


@pytest.mark.parametrize("kind", PROMPTS)
def test_every_shape_trains_and_samples_alike(kernel, kind):
    """Gradients of every parameter, and answers beside the naive draw, whichever kernel runs; on CUDA's path from graphs.
    Duplicated prompts must not be merged."""
    for group in (1, 3, 8):
        compare_gradients("qwen3", PROMPTS[kind], some_answers(PROMPTS[kind], group))
    settings = {"group_size": 3, "max_new_tokens": 20}
    expected = sample_naively(make_model("qwen3", tree=False), PROMPTS[kind], **settings)
    for cache_tokens in (2**17, 150):  # all at once; at most two prompts at a time
        assert_same(sample(make_model("qwen3"), PROMPTS[kind], cache_tokens=cache_tokens, **settings), expected)


def test_groups_of_unequal_size(kernel):
    """Padding that reaches outputs or gradients; layers that see another tree when they are recomputed. And one query among two
    prompts: CUDA's kernels take "at most one query a sequence" to mean "one", so an idle sequence beside it must say two."""
    answers = [group[: i + 1] for i, group in enumerate(some_answers(UNEQUAL, 3))]
    compare_gradients("llama", UNEQUAL, answers, checkpointing=True)
    prompts = [[7, 8, 9], [7, 8, 10]]
    compare_gradients("qwen3", prompts, [[[11, 12]], [[13]]])
    settings = {"group_size": 1, "max_new_tokens": 40}
    out = sample(make_model("qwen3"), prompts, **settings)
    assert len({len(answer) for (answer,) in out.answers}) == 2  # so one of them decodes alone
    assert_same(out, sample_naively(make_model("qwen3", tree=False), prompts, **settings))


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that is made, forward and backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)])
        return out


def test_logprobs_in_chunks_equal_those_at_once(monkeypatch):
    """Values and gradients of hidden states and weight, entropies of the same distribution; and never the logits of all
    tokens: [tokens, vocabulary] of a batch is what runs out of memory, forward or backward."""
    torch.manual_seed(0)
    hidden, head = torch.randn(50, 16, requires_grad=True), torch.nn.Linear(16, 97, bias=False)
    leaves, targets, weights = [hidden, head.weight], torch.randint(0, 97, (50,)), torch.linspace(-1, 2, 50)
    expected = torch.distributions.Categorical(logits=head(hidden) / 0.7)
    expected_grads = torch.autograd.grad((expected.log_prob(targets) * weights).sum(), leaves, retain_graph=True)
    for chunk in (1, 20, 50):
        monkeypatch.setitem(rollout.LOGITS, "cpu", 97 * chunk)
        with LargestTensor() as largest:
            logps, entropy = rollout.token_logprobs(hidden, head, targets, 0.7)
            grads = torch.autograd.grad((logps * weights).sum(), leaves)
        assert largest.numel == 97 * max(16, chunk)  # the weight's own gradient, or a chunk's logits
        torch.testing.assert_close((logps, entropy), (expected.log_prob(targets), expected.entropy()))
        assert not entropy.requires_grad and all(relative(*pair) < 1e-5 for pair in zip(grads, expected_grads, strict=True))


def test_a_tree_without_prompts_gives_zero_gradients():
    """A rank without work takes part in the others' gathers and reductions: a missing gradient or a NaN would reach all."""
    model = make_model("qwen3").train()
    logprobs_A, entropy_A = rollout.Policy(model)(rollout.Tree([], []), 0.7)
    logits_NY = rollout.next_token_logits(model, [], LABELS)
    assert (logprobs_A.shape, entropy_A.shape, logits_NY.shape) == ((0,), (0,), (0, 3))
    for out in (logprobs_A, logits_NY):
        model.zero_grad()
        out.sum().backward()
        assert all(p.grad is not None and not p.grad.count_nonzero() for p in model.parameters())


def test_micro_batches_take_every_token_once():
    """A token skipped or taken twice trains on another batch; a budget that is just met must not cut, one token more must."""
    prompts, ids = UNEQUAL * 2, iter(range(1000))  # no id twice, so that a shifted slice differs
    answers = [[[next(ids) for _ in answer] for answer in group] for group in some_answers(prompts, 3)]
    prefix = len(PREFIX)  # stands in each micro-batch once
    needs = [len(prompt) - prefix + sum(map(len, group)) for prompt, group in zip(prompts, answers, strict=True)]
    packed = rollout.Tree(prompts, answers).targets_A
    for budget in range(1, prefix + sum(needs) + 2):
        pairs = rollout.micro_batches(prompts, answers, budget)
        assert [prompt for part, _ in pairs for prompt in prompts[part]] == prompts
        assert [token for _, tokens in pairs for token in packed[tokens].tolist()] == packed.tolist()
        for part, tokens in pairs:
            assert torch.equal(packed[tokens], rollout.Tree(prompts[part], answers[part]).targets_A)
            used, following = prefix + sum(needs[part]), needs[part.stop : part.stop + 1]
            assert (used <= budget or len(needs[part]) == 1) and all(used + need > budget for need in following)
    assert rollout.micro_batches([], [], 1) == [] and [prompts[rollout.EMPTY[0]], packed[rollout.EMPTY[1]].tolist()] == [[], []]


@pytest.mark.parametrize("budgets", [(1, 29), (40, 60), (2**15, 2**17)])
def test_engine_equals_naive_forward(budgets):
    """Logits cut at another answer's length, or micro-batches that lose a prompt's place, would judge another record."""
    prompts = [*UNEQUAL, *PROMPTS["no common prefix"]]
    engine = rollout.Engine(make_model("qwen3"), 9, LABELS, 9, *budgets)
    answers, label_logits = engine.generate(prompts)
    assert_same(engine.sample(prompts, group_size=2, seed=3), sample(engine.model, prompts, group_size=2, eos_id=9))
    logits, _ = naive(make_model("qwen3", tree=False), prompts, [[answer] for answer in answers])
    expected = logits[:, LABELS].split([len(answer) for answer in answers])
    assert len({*map(len, answers)}) > 1, "lengths must differ, or nothing is cut wrong"
    assert logits.argmax(-1).tolist() == [token for answer in answers for token in answer]
    for got, want in zip([*label_logits, *engine.label_logits(prompts)], [*expected, *(x[0] for x in expected)], strict=True):
        torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("cache_tokens", [52, 100, 200])
def test_parts_that_follow_each_other_change_no_sample(monkeypatch, cache_tokens):
    """Rows draw from their own uniforms, whoever shares their batch; no part holds more tokens than the cache may; a part of a
    rollout has the rows and tokens of its own prompts."""
    settings, held, begin = {"group_size": 2, "max_new_tokens": 20}, [], rollout.Decode.__init__
    whole = sample(make_model("qwen3"), UNEVEN, **settings)
    assert len({*whole.lengths_N.tolist()}) > 3 and 0 < whole.ended_N.sum() < 14, "or the parts do not differ"

    def counted(decode, *args):
        begin(decode, *args)
        held.append(sum(keys.shape[0] * keys.shape[1] for keys, _ in decode.cache[0]))

    monkeypatch.setattr(rollout.Decode, "__init__", counted)
    assert_same(sample(make_model("qwen3"), UNEVEN, cache_tokens=cache_tokens, **settings), whole)
    assert len(held) == -(-len(UNEVEN) // ((cache_tokens - 6) // 46)) and max(held) <= cache_tokens
    lengths = whole.lengths_N.tolist()
    first, last = sum(lengths[:4]), sum(lengths[:10])  # of the tokens of prompts 2, 3 and 4
    tensors = (whole.lengths_N[4:10], whole.ended_N[4:10], whole.logprobs_A[first:last], whole.label_logits_AY[first:last])
    part = rollout.Rollout(whole.answers[2:5], *tensors)
    assert_same(sample(make_model("qwen3"), UNEVEN[2:5], first_row=4, **settings), part)


def test_prompts_at_once_fill_the_cache():
    """A budget that is just met must not cost a prompt, one token less must; and one that fits no group is refused."""
    for budget in range(52, 400):  # the common prefix; of each prompt 6 tokens at most, and two answers
        count = rollout.prompts_at_once(UNEVEN, 2, 20, budget)
        assert 6 + count * (6 + 2 * 20) <= budget < 6 + (count + 1) * (6 + 2 * 20)
    with pytest.raises(ValueError, match="cache_tokens is 51, and a group of 2 answers needs 52"):
        rollout.prompts_at_once(UNEVEN, 2, 20, 51)


@pytest.mark.parametrize("smallest", [1, 32])
def test_ended_answers_leave(kernel, monkeypatch, smallest):
    """Ended answers that are run on, one under another's keys after the move, or on CUDA a graph for every number of them:
    at most one is captured for each halving of the running answers, and for the last few together."""
    fed, step, settings = [], rollout.Decode.step, {"group_size": 6, "max_new_tokens": 40, "eos_id": 9}

    def counted(decode, model, ids_A):
        _, (prompts, _), (answers, _) = decode.cache[0]
        assert len(answers) == len(ids_A)
        fed.append((len(ids_A), len(prompts)))
        return step(decode, model, ids_A)

    monkeypatch.setattr(rollout.Decode, "step", counted)
    monkeypatch.setattr(rollout, "SMALLEST_GRAPH", smallest)
    monkeypatch.setattr(cuda_standin.Graph, "made", 0)
    expected = sample_naively(make_model("qwen3", tree=False), UNEVEN, **settings)
    assert_same(sample(make_model("qwen3"), UNEVEN, **settings), expected)
    assert len(fed) == expected.lengths_N.max() - 1
    least = 0.5 if kernel == "cuda" else 0.75
    for t, (answers, _) in enumerate(fed, 1):
        running = int((expected.lengths_N > t).sum())
        assert least * answers < running <= answers or (kernel == "cuda" and answers <= smallest)
    sizes, prompts = ({*x} for x in zip(*fed, strict=True))
    assert len(sizes) > 1 and (smallest == 32 or min(prompts) < len(UNEVEN))
    assert cuda_standin.Graph.made == (len(sizes) if kernel == "cuda" else 0)
    if kernel == "cuda":
        assert len(sizes) <= (42 // min(sizes)).bit_length() and sum(size <= smallest for size in sizes) <= 1


def test_seeds_and_steps_change_samples_and_repeat():
    """The table of uniforms depends on (seed, step, row) and on nothing else."""
    table = rollout.uniforms(1, 2, range(3), 4)
    assert np.array_equal(table[2:], rollout.uniforms(1, 2, [2], 4)) and len(np.unique(table)) == 12
    assert not any(np.array_equal(table, rollout.uniforms(*key, range(3), 4)) for key in ((1, 3), (2, 2)))


@pytest.mark.parametrize("vocabulary", [61, 49_152])
@pytest.mark.parametrize("temperature", [0, 0.7])
def test_choose_tokens_is_the_inverse_cdf(vocabulary, temperature):
    """Rows drawn some at a time with another's uniform, a token of probability 0, at the ends of the uniforms too, or not the
    draw of a float64 CDF where float32 can tell."""
    torch.manual_seed(0)
    logits, uniforms = 4 * torch.randn(400, vocabulary), torch.rand(400, dtype=torch.float64)
    logits[:, ::3] = float("-inf")
    uniforms[:2] = torch.tensor([0, 1 - 2**-53], dtype=torch.float64)
    ids, logps = rollout.choose_tokens(logits, uniforms, temperature)
    probs = torch.softmax(logits.double() / (temperature or 1), -1)
    picked = probs.gather(1, ids[:, None])[:, 0]
    assert picked.min() > 0
    torch.testing.assert_close(logps, picked.log().float(), atol=1e-5, rtol=1e-5)
    above = probs.cumsum(-1).gather(1, ids[:, None])[:, 0]
    is_drawn = (above > uniforms - 1e-6) & (above - picked < uniforms + 1e-6)
    assert (is_drawn if temperature else ids == logits.argmax(-1)).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_training(kernel, architecture):
    """Under autocast, rotary embedding leaves queries and keys in float32 and values in bfloat16: one dtype must reach the
    kernels. The gradient stays within bfloat16's rounding of float32's, the log-probabilities are float32."""
    answers = some_answers(UNEQUAL, 3)
    plain, packed = (make_model(architecture, tree, initializer_range=0.08).float() for tree in (False, True))
    naive(plain, UNEQUAL, answers)[1].mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs_A = through_tree(packed, UNEQUAL, answers)
    logprobs_A.mean().backward()
    expected, got = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (plain, packed))
    assert logprobs_A.dtype == torch.float32 and not torch.equal(logprobs_A, logprobs_A.bfloat16().float())
    assert 1e-6 < (got - expected).norm() / expected.norm() < 0.03  # it must have rounded


def test_bf16_sampling_and_its_memory(kernel):
    """Log-probabilities of its own tokens within 0.15 of float32's for these small random weights, in float32; no cache and no
    graph that survives a call, on the model or in a module variable."""
    model = make_model("qwen3", initializer_range=0.08)
    half = make_model("qwen3", initializer_range=0.08).to(torch.bfloat16)
    counts = []
    for _ in range(2):
        out = sample(half, UNEQUAL, group_size=4)
        gc.collect()
        counts.append(sum(isinstance(x, torch.Tensor) for x in gc.get_objects()))
    assert out.logprobs_A.dtype == out.label_logits_AY.dtype == torch.float32
    assert (through_tree(model, UNEQUAL, out.answers) - out.logprobs_A).abs().max() < 0.15
    assert counts[1] <= counts[0]


@pytest.mark.parametrize(("call", "message"), [
    (lambda: sample(make_model("qwen3"), [[5], []]), "every prompt .* needs at least one token"),
    (lambda: sample(make_model("qwen3"), [[5, 6]], eos_id=None), "eos_id"),
    (lambda: sample(make_model("qwen3"), [[5, 6]], max_new_tokens=127), "need 129 tokens, the context has 128"),
    (lambda: sample(make_model("qwen3").train(), [[5, 6]]), "eval mode"),
    (lambda: sample(make_model("mistral", sliding_window=4), [[5, 6]]), "MistralAttention: .*no sliding_window$"),
    (lambda: through_tree(make_model("qwen3", attention_dropout=0.1).train(), [[5, 6]], [[[7, 8]]]), "no dropout$"),
    (lambda: make_model("qwen3")(torch.tensor([[5, 6]])), r"call the model by rollout\.sample or rollout\.Policy"),
])  # fmt: skip
def test_what_cannot_be_computed_is_refused(call, message):
    """Before any work, each with what to change. In train mode dropout would sample from another model than the one trained;
    without a tree a model would have no causal mask."""
    with pytest.raises(ValueError, match=message):
        call()


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
LONGROPE["original_max_position_embeddings"] = 64
BY_LAYER = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
CAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": 30.0, "initializer_range": 0.02}


@pytest.mark.parametrize(("architecture", "changes", "longest", "reason"), [
    # Its own layers mix what lies side by side in the packed row, or call attention twice.
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, 15, r"logits are others: apart by \d\.\de[+-]\d+ in"),
    ("diffllama", {}, 15, "logits are others: apart by"),
    ("gemma2", CAPPED, 15, "logits are others: apart by"),  # small logits, which the cap would not touch
    # What attention is asked for; Doge's own mask changes nothing in a fresh model.
    ("gemma2", {}, 15, "Gemma2Attention: tree attention has no softcap$"),
    ("gpt_oss", {}, 15, "has no s_aux$"),
    ("doge", {}, 15, "has no attention_mask$"),
    ("nemotron", {}, 15, "fails under tree attention: .*it hands no keywords down"),
    ("gptj", {}, 15, "GPTJForCausalLM: its attention cannot be replaced"),
    ("phi", {}, 15, "PhiForCausalLM: an output head other than"),
    # What depends on length.
    ("mistral", {"sliding_window": 20}, 20, None),
    ("mistral", {"sliding_window": 20}, 21, "behind 20 tokens"),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}, 64, None),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}, 65, "behind 64 tokens"),
    ("gemma3_text", {"rope_parameters": BY_LAYER, "sliding_window": 100}, 64, None),
    ("gemma3_text", {"rope_parameters": BY_LAYER, "sliding_window": 100}, 65, "behind 64 tokens"),
    ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 129, "behind 128 tokens"),
])  # fmt: skip
def test_check_model_refuses_what_differs(architecture, changes, longest, reason):
    """A model that is sampled or trained as another one than it is, of which nothing would be seen."""
    model = make_model(architecture, tree=False, **copy.deepcopy(changes))  # a configuration changes its dictionaries
    if reason is None:
        assert rollout.check_model(model, longest) < 1e-5 and sample(model, UNEQUAL).answers
    else:
        with pytest.raises(rollout.UnsupportedModelError, match=reason):
            rollout.check_model(model, longest)


def test_an_adapter_is_refused_with_the_way_out():
    """PEFT's wrapper has a base_model of its own, without the last hidden state."""
    model = make_model("qwen3", tree=False)
    model.get_base_model = lambda: model
    with pytest.raises(rollout.UnsupportedModelError, match=r"use get_base_model\(\)"):
        rollout.check_model(model, 15)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 8), (torch.bfloat16, 12), (torch.float16, 264)])
def test_what_cuda_has_no_kernel_for_is_refused_by_name(monkeypatch, dtype, size):
    """A kernel's own message, or another function's answer, in the middle of a run: the refusal names module and way out."""
    monkeypatch.setattr(rollout, "on_cuda", lambda x: True)
    model = make_model("qwen3", head_dim=size).to(dtype)
    with pytest.raises(rollout.UnsupportedModelError, match=f"Qwen3Attention: .*not {dtype} and {size}; use --bf16 1"):
        sample(model, [[5, 6]])


def script(name, *flags):
    """The output of a script, on one thread."""
    command = [sys.executable, ROOT / name, *flags]
    out = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout


def test_file_works_alone(tmp_path):
    """rollout.py is copied into other code bases: it needs no file of this project. A prompt without a token of its own, which
    predicts the answer's first."""
    shutil.copy(ROOT / "rollout.py", tmp_path)
    cases = [[[1, 2, 3], [1, 2, 4]], [[1, 2], [1, 2]], [[1], [1, 2]], [[1, 2, 3], [1, 2], [1, 2, 5]]]
    code = f"import rollout; print(*map(rollout.common_prefix_length, {cases}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout == "2 1 0 1\n", out.stderr
    imported = re.findall(r"^(?:import|from) (\w+)", (ROOT / "rollout.py").read_text(), re.MULTILINE)
    assert {*imported} <= {*sys.stdlib_module_names, "numpy", "torch", "transformers"}


def test_bench_prints_every_part():
    """`python rollout.py --bench` on a small shape: a line for each contestant and prefix, with its ratio."""
    flags = "--bench --repeats 1 --prefixes 8 16 --sampling 2 2 4 16 --training 2 2 4 16".split()
    out = script("rollout.py", *flags, "--model", NOTES / "model")
    for name in ("sampling 8 ", "sampling 16 ", "model.generate", "its decoding", "all of", "training 16 ", "padded rows"):
        assert name in out
    assert "padded, answer logits" in out and "vocabulary 152,000" in out and "1.0x" in out and "against 8 tokens: " in out


def test_check_says_it_of_any_folder(tmp_path):
    """`python rollout.py --check`: from a configuration alone, each in a line, and the exit code."""
    for name, changes in {"gemma2": {}, "gemma3_text": {"sliding_window": 77}}.items():
        make_model(name, tree=False, **changes).config.save_pretrained(tmp_path / name)
    folders = [NOTES / "model", tmp_path / "gemma3_text", tmp_path / "gemma2", tmp_path]
    command = [sys.executable, ROOT / "rollout.py", "--check", *folders]
    out = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    verdicts = [
        r"agrees: \d\.\de-0\d",
        r"agrees: \d\.\de-0\d, up to 77 tokens",
        "refused: .* no softcap",
        "cannot be loaded: .*",
    ]
    expected = "".join(f"{folder}: {verdict}\n" for folder, verdict in zip(folders, verdicts, strict=True))
    assert re.fullmatch(expected, out.stdout) and out.returncode == 1, out.stdout + out.stderr


def test_the_table_tries_every_kind_of_layer(monkeypatch):
    """A family whose tiny model has lost the layers, or the factor, in which it differs would be called right."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    families = importlib.import_module("families")
    verdicts, _ = families.check_family("lfm2")
    assert [verdicts[""][0], verdicts[" with conv layers"][0]] == [True, False]
    verdicts, _ = families.check_family("granite")
    assert {" with logits_scaling", " with mlp_bias"} <= {*verdicts} and all(agrees for agrees, _ in verdicts.values())
    assert families.check_family("gemma3")[0] == {"": (True, mock.ANY)}  # its settings lie in another's
    kind = families.CONFIG_MAPPING["gemma3_text"]
    settings = families.shrink(kind().to_dict())
    assert settings["layer_types"] == ["sliding_attention", "full_attention"] * 2
    spreads = [model.lm_head.weight.std().item() for model in families.build(kind, settings)]
    assert spreads == [pytest.approx(0.02, rel=0.1), pytest.approx(0.3, rel=0.1)]


def test_gpu_check_compares_a_real_model(tmp_path):
    """docs/gpu_check.py's numbers, on this CPU: greedy answers are generate's, the sampler is the trainer."""
    for part in grm.load_model(NOTES / "model", seed=0):
        part.save_pretrained(tmp_path)
    out = script("docs/gpu_check.py", "--only", "numbers", "--model", tmp_path, "--prompts", "3", "--answer", "8")
    figures = dict(re.findall(r"^\| (.*?) +\| (.*?) +\|", out, re.MULTILINE))
    assert figures["greedy answers equal to generate's, float32"] == "3 of 3"
    error = lambda name: float(re.search(r"\d\.\de[+-]\d+", figures[name])[0])
    assert error("log-probabilities, sampler - trainer, float32") < 1e-4
    assert error("gradient, float32 on cpu - float32 on CPU") < 1e-5
    assert 0 < error("gradient, bfloat16 on cpu - float32 on CPU") < 0.1, "bfloat16 must have rounded"
