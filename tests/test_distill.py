"""distill.py against naive versions kept here: the losses, their gradients, their ends and their memory."""

import copy
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NOTES
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertModel, pipeline

import distill
import grm
import parallel
import rollout
from distill import label_kd_loss, token_kd_loss

KINDS = ["forward", "reverse", "js"]


def labels(N=6, Y=5, dtype=torch.float64, seed=0):
    """Student logits with gradient, teacher probabilities, and gold labels of which every second one is missing."""
    draw = torch.Generator().manual_seed(seed)
    logits_NY = 2 * torch.randn(N, Y, generator=draw, dtype=dtype)
    probs_NY = torch.softmax(2 * torch.randn(N, Y, generator=draw, dtype=dtype), -1)
    gold_N = torch.randint(Y, (N,), generator=draw)
    gold_N[1::2] = -100
    probs_NY[:1, 1:3] = 0  # of a teacher so sure that a label's probability underflows
    probs_NY /= probs_NY.sum(-1, keepdim=True)
    return logits_NY.requires_grad_(), probs_NY, gold_N


def tokens(A=11, D=4, E=6, student_vocabulary=13, teacher_vocabulary=13, dtype=torch.float64, seed=0):
    """Hidden states and linear heads of a student and a wider teacher."""
    draw = torch.Generator().manual_seed(seed)
    student_AD, teacher_AE = (torch.randn(A, width, generator=draw, dtype=dtype) for width in (D, E))
    student_head = torch.nn.Linear(D, student_vocabulary, bias=False, dtype=dtype)
    teacher_head = torch.nn.Linear(E, teacher_vocabulary, bias=False, dtype=dtype)
    for head in (student_head, teacher_head):
        torch.nn.init.normal_(head.weight, generator=draw)
    return student_AD.requires_grad_(), student_head, teacher_AE, teacher_head


def kl(p, q):
    """KL(p || q) over the last dimension, from probabilities."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def naive_token_loss(student_AD, student_head, teacher_AE, teacher_head, kind="forward", beta=0.5, temperature=1.0):
    """All positions at once, straight from the definitions, with [A, vocabulary] in memory."""
    p = torch.softmax(teacher_head(teacher_AE).detach() / temperature, -1)
    q = torch.softmax(student_head(student_AD) / temperature, -1)
    m = beta * p + (1 - beta) * q
    js = (beta * kl(p, m) + (1 - beta) * kl(q, m)) / (beta * (1 - beta))
    return temperature**2 * {"forward": kl(p, q), "reverse": kl(q, p), "js": js}[kind].mean()


def assert_same(loss, expected, inputs, theirs=None, rtol=1e-5, atol=1e-6):
    """The same loss, in float32, with the same gradients for its inputs (and for those of the other, if it has its own)."""
    gradients = grad(loss, [*inputs], retain_graph=True), grad(expected, [*(theirs or inputs)], retain_graph=True)
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol, check_dtype=False)
    torch.testing.assert_close(*gradients, rtol=rtol, atol=atol)


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [slice(0, None, 2), slice(0)], ids=["half", "none"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_label_kd_is_kl_at_temperature_plus_gold(temperature, labelled):
    """Direction of KL swapped, teacher not re-tempered, T**2 missing or on the gold term, unlabelled pairs scaled by the gold
    weight, 0 / 0 from a mean over no labelled pairs, NaN from 0 * log(0), or a mean over pairs and labels, as torch's."""
    logits_NY, probs_NY, given_N = labels()
    gold_N = torch.full_like(given_N, -100)
    gold_N[labelled] = given_N[labelled]
    pure = F.kl_div(torch.log_softmax(logits_NY, -1), probs_NY, reduction="batchmean")
    assert_same(label_kd_loss(logits_NY, probs_NY, gold_N), pure, [logits_NY])
    expected = 0.0
    for logits, probs, gold in zip(logits_NY, probs_NY, gold_N.tolist(), strict=True):
        p = probs ** (1 / temperature) / (probs ** (1 / temperature)).sum()
        kd = temperature**2 * kl(p, torch.softmax(logits / temperature, -1))
        expected += kd if gold == -100 else 0.7 * kd - 0.3 * torch.softmax(logits, -1)[gold].log()
    expected = expected / len(gold_N)
    loss = label_kd_loss(logits_NY, probs_NY, gold_N, temperature, gold_weight=0.3)
    assert_same(loss, expected, [logits_NY])


# Tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("sizes", [(13, 13), (13, 17), (17, 13)])
@pytest.mark.parametrize("kind", KINDS)
def test_token_kd_equals_the_naive_version(kind, sizes, temperature):
    """Teacher and student swapped in a KL or in the mixture, T**2 missing, a gradient lost; the shorter logits padded, or
    probabilities sliced and not normalised; a mean of means, of chunks or of micro-batches, which weighs short ones more."""
    inputs = tokens(student_vocabulary=sizes[0], teacher_vocabulary=sizes[1])
    student_AD, student_head, teacher_AE, teacher_head = inputs
    sliced = (student_AD, lambda x: student_head(x)[:, :13], teacher_AE, lambda x: teacher_head(x)[:, :13])
    expected = naive_token_loss(*sliced, kind, beta=0.3, temperature=temperature)
    for chunk in (1, 4, 10, 11, 1000):
        loss = token_kd_loss(*inputs, kind=kind, beta=0.3, temperature=temperature, chunk=chunk)
        assert_same(loss, expected, [student_AD, student_head.weight])
    parts = [(student_AD[part], student_head, teacher_AE[part], teacher_head) for part in (slice(3), slice(3, None))]
    loss = sum(token_kd_loss(*part, 11, kind=kind, beta=0.3, temperature=temperature) for part in parts)
    assert_same(loss, expected, [student_AD, student_head.weight])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_vanish_at_the_teacher(kind, temperature):
    """Both at different temperatures, which pushes a perfect copy of the teacher away from it; or a divergence that is none:
    the rescaled Jensen-Shannon must also be 0, with zero gradient, at q = p."""
    logits_NY, _, gold_N = labels()
    loss = label_kd_loss(logits_NY, torch.softmax(logits_NY, -1), gold_N, temperature)
    assert_same(loss, 0 * logits_NY.sum(), [logits_NY], rtol=0)
    student_AD, head, *_ = tokens()
    loss = token_kd_loss(student_AD, head, student_AD.detach(), head, kind=kind, beta=0.2, temperature=temperature)
    assert_same(loss, 0 * (student_AD.sum() + head.weight.sum()), [student_AD, head.weight], rtol=0)


@pytest.mark.parametrize(("end", "toward"), [("forward", lambda step: step), ("reverse", lambda step: 1 - step)])
def test_js_tends_to_both_kl_divergences(end, toward):
    """The jump of the plain divergence, which vanishes near its ends, and the two ends taken for each other."""
    inputs = tokens()
    ends = {kind: token_kd_loss(*inputs, kind=kind) for kind in ("forward", "reverse")}
    assert abs(ends["forward"] - ends["reverse"]) > 0.05 * ends[end], "the ends must be far apart for this test to tell"
    errors = [abs(token_kd_loss(*inputs, kind="js", beta=toward(step)) - ends[end]) for step in (1e-2, 1e-4, 1e-6)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-4 * ends[end]
    near = grad(token_kd_loss(*inputs, kind="js", beta=toward(1e-7)), inputs[0])
    torch.testing.assert_close(near, grad(ends[end], inputs[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", [1e-5, 1 - 1e-5])
def test_js_keeps_its_digits_in_float32(beta):
    """log m - log q rounded to 1e-7 and divided by beta: noise of 1e-2 in the loss near the ends."""
    inputs = tokens(A=64, student_vocabulary=500, teacher_vocabulary=500)
    exact = naive_token_loss(*inputs, "js", beta=beta)
    torch.testing.assert_close(token_kd_loss(*inputs, kind="js", beta=beta).double(), exact, rtol=1e-4, atol=0)


def test_nothing_that_counts_is_zero_with_gradient():
    """NaN from 0 / 0, or a rank without pairs or answers that cannot run backward (and leaves the others waiting)."""
    logits_NY, probs_NY, gold_N = labels(N=0)
    inputs = tokens(A=0)
    pairs_loss = label_kd_loss(logits_NY, probs_NY, gold_N, gold_weight=0.5)
    tokens_loss = token_kd_loss(*inputs, chunk=2)
    assert pairs_loss.item() == tokens_loss.item() == 0
    assert grad(pairs_loss, logits_NY)[0].shape == (0, 5)
    assert not any(x.count_nonzero() for x in grad(tokens_loss, [inputs[0], inputs[1].weight]))


def test_bfloat16_is_taken_to_float32():
    """Probabilities that sum to 1 only within bfloat16 refused, or losses computed in bfloat16, which keeps two to three
    digits of each logit."""
    logits_NY, probs_NY, gold_N = (x.bfloat16() if x.is_floating_point() else x for x in labels(N=64))
    loss = label_kd_loss(logits_NY, probs_NY, gold_N, temperature=2.0, gold_weight=0.3)
    exact_NY = probs_NY.double() / probs_NY.double().sum(-1, keepdim=True)
    exact = label_kd_loss(logits_NY.double(), exact_NY, gold_N, temperature=2.0, gold_weight=0.3)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)
    inputs = tokens(A=32, student_vocabulary=2000, teacher_vocabulary=2000)
    student_AD, student_head, teacher_AE, teacher_head = (x.bfloat16() for x in inputs)
    heads = [lambda x: student_head(x).double(), lambda x: teacher_head(x).double()]
    exact = naive_token_loss(student_AD, heads[0], teacher_AE, heads[1])
    loss = token_kd_loss(student_AD, student_head, teacher_AE, teacher_head)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_not_mutated_and_the_teacher_gets_no_gradient(kind):
    """In-place work on the caller's tensors: a second loss on the same batch would differ from the first. A teacher that is
    trained toward its student when their parameters share an optimizer or a graph."""
    logits_NY, probs_NY, gold_N = labels()
    student_AD, student_head, teacher_AE, teacher_head = tokens(teacher_vocabulary=17)
    taught = [logits_NY, student_AD, student_head.weight]
    teachers = [probs_NY.requires_grad_(), teacher_AE.requires_grad_(), teacher_head.weight]
    # Heads that return stored logits: in-place work on logits would show here.
    stored = [torch.randn(11, V, dtype=torch.float64) for V in (13, 17)]
    tensors = [*taught, *teachers, gold_N, *stored]
    before = [x.detach().clone() for x in tensors]
    label_kd_loss(logits_NY, probs_NY, gold_N, temperature=2.0, gold_weight=0.5).backward()
    token_kd_loss(student_AD, lambda x: stored[0], teacher_AE, lambda x: stored[1], kind=kind, temperature=2.0)
    token_kd_loss(student_AD, student_head, teacher_AE, teacher_head, kind=kind, chunk=4).backward()
    assert all(map(torch.equal, tensors, before))
    assert all(x.grad is not None for x in taught) and all(x.grad is None for x in teachers)


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns, forward and backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_all_logits_never_exist_at_once(kind):
    """The [A, vocabulary] tensor created whole, or its chunks all kept for the backward pass."""
    A, V, chunk = 50, 300, 4
    inputs = tokens(A=A, student_vocabulary=V, teacher_vocabulary=V + 20)
    rows, saved = [], []
    for head in (inputs[1], inputs[3]):
        head.register_forward_hook(lambda head, hidden, logits: rows.append(len(logits)))
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x)
    with LargestTensor() as largest:
        with keep:
            loss = token_kd_loss(*inputs, kind=kind, chunk=chunk)
        loss.backward()
    assert max(rows) == chunk
    assert largest.numel <= max(chunk, 6) * (V + 20), "6 is the teacher's width: its head's weight is [V + 20, 6]"
    assert sum(saved) < A * V / 2, "the backward pass must recompute the chunks, not keep them"


@pytest.mark.parametrize(
    "change",
    [
        {"student_logits_NY": torch.zeros(4)},
        {"teacher_probs_NY": torch.full((4, 2), 0.5)},
        {"teacher_probs_NY": torch.full((4, 3), 0.2)},
        {"teacher_probs_NY": torch.full((4, 3), math.nan)},
        {"gold_N": torch.zeros(3, dtype=torch.long)},
        {"gold_N": torch.tensor([0, 1, 2, 3])},
        {"gold_N": torch.tensor([0, 1, 2, -1])},
        {"kind": "kl"},
        *({"kind": "js", "beta": beta} for beta in (0.0, 1.0, math.nan)),
    ],
)
def test_losses_refuse(change):
    """A wrong input that broadcasts, counts from the end, becomes NaN, or silently means another loss (ends of beta)."""
    good = dict(zip(("student_logits_NY", "teacher_probs_NY", "gold_N"), labels(N=4, Y=3), strict=True))
    with pytest.raises((ValueError, IndexError)):
        token_kd_loss(*tokens(A=5), **change) if "kind" in change else label_kd_loss(**{**good, **change})


# The script -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The notes task with 20 records a file, in its answer-first form: an untrained teacher is then never malformed."""
    folder = tmp_path_factory.mktemp("made")
    runpy.run_path(str(NOTES / "make.py"))["make"](folder / "task", "answer-first")
    for path in (folder / "task").glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    (folder / "task" / "distill.json").write_text('{"max_new_tokens": 64, "steps": 3, "batch": 4, "samples": 2}')
    for model_or_tokenizer in grm.load_model(folder / "task" / "model", seed=1):
        model_or_tokenizer.save_pretrained(folder / "teacher")
    return folder


@pytest.fixture
def task(made, tmp_path):
    """A copy of that task to change; its teacher lies beside it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "task"


def arguments(task, *flags):
    return [f"--task={task}", f"--teacher={task.parent / 'teacher'}", f"--out={task.parent / 'out'}", *flags]


def configure(task, *flags):
    return grm.parse_settings(distill.Config, "distill.json", arguments(task, *flags))


def run(monkeypatch, task, *flags, out="out"):
    """distill.py as a script, in this process; returns its summary."""
    monkeypatch.setattr(sys, "argv", ["distill.py", *arguments(task, f"--out={task.parent / out}", *flags)])
    runpy.run_path(distill.__file__, run_name="__main__")
    return json.loads((task.parent / out / "summary.json").read_text())


def make_student(task, *flags):
    """A student, its teacher, and five pairs encoded for it, the last two without a label."""
    config, loaded = configure(task, *flags), grm.Task.load(task)
    pairs, ranks = distill.read_pairs(config, loaded)[0][17:22], parallel.Ranks()
    for i, pair in enumerate(pairs):
        pair["probs"] = torch.rand(5, generator=torch.Generator().manual_seed(i)).softmax(-1).tolist()
        pair["reasonings"] = [[7, 8, 9 + i], [10 + i] * (i + 1)]
    teacher = distill.Teacher(config, loaded, ranks)
    student = distill.make_student(config, loaded, teacher, ranks)
    student.encode(pairs)
    return student, teacher, pairs


def teach(teacher, pairs):
    return distill.teach(teacher, pairs, teacher.renderer.task, parallel.Ranks())


def reason_first(task):
    """The same task with the reasoning first, and demonstrations as what a trained teacher would write."""
    for name in ("criteria.md", "sft.jsonl", "train.jsonl", "test_random.jsonl", "test_longtail.jsonl"):
        (task / name).write_text("".join((NOTES / name).read_text().splitlines(keepends=True)[:20]))


def scripted_teacher(task, monkeypatch, *flags, broken=()):
    """A teacher whose samples are the demonstration and another one's, (pair, sample) in `broken` cut short. Its sampler
    takes the scripted ids where it would draw: they stand in the place of the uniforms."""
    config, loaded = configure(task, "--pairs=sft.jsonl", *flags), grm.Task.load(task)
    teacher, pairs = distill.Teacher(config, loaded, parallel.Ranks()), loaded.read(task / "sft.jsonl", ("response",))
    ids = [teacher.renderer.encode_response(pair["response"]) for pair in pairs]
    answers, calls = [[ids[i], ids[i - 1]] for i in range(len(ids))], []
    for pair, sample in broken:
        answers[pair][sample] = answers[pair][sample][:-9]

    def uniforms(seed, step, rows, width):
        calls.append(len(rows) // 2)
        scripted = [answers[row // 2][row % 2] for row in rows]
        return np.array([[*answer, *answer[-1:] * width][:width] for answer in scripted], dtype=float)

    monkeypatch.setattr(rollout, "uniforms", uniforms)
    monkeypatch.setattr(rollout, "choose_tokens", lambda logits, drawn, temperature: (drawn.long(), torch.zeros(len(drawn))))
    return teacher, pairs, answers, calls


@pytest.mark.parametrize(("form", "loss"), [("reason-first", "label"), ("answer-first", "js"), ("answer-first", "label")])
def test_teacher_distributions_equal_the_naive_ones(task, monkeypatch, form, loss):
    """The mean over the well-formed reasonings of the softmax over labels, at the answer's box in each; malformed ones count
    nothing, and a pair of which all are malformed is left out. Without reasoning before the label, nothing is sampled."""
    if form == "reason-first":
        reason_first(task)
    sampled = (form, loss) != ("answer-first", "label")
    broken = [(2, 0), (5, 0), (5, 1)] if sampled else []
    teacher, pairs, answers, calls = scripted_teacher(task, monkeypatch, f"--loss={loss}", broken=broken)
    taught = teach(teacher, pairs)
    assert taught == [pair for i, pair in enumerate(pairs) if i != 5 or not sampled] and len(calls) == sampled
    plain, renderer = grm.load_model(task.parent / "teacher")[0], teacher.renderer
    for pair, group in zip(pairs, answers, strict=True):
        if pair not in taught:
            continue
        kept = [answer for answer in group if renderer.parse(answer).problem is None]
        assert not sampled or pair["reasonings"] == kept
        mean = torch.zeros(5)
        for answer in kept:
            at = renderer.parse(answer).steps[-1 if form == "reason-first" else 0].label_at
            ids = renderer.prompt(pair["query"], pair["document"]) + answer[:at]
            mean += plain(torch.tensor([ids])).logits[0, -1, renderer.label_ids].softmax(-1) / len(kept)
        torch.testing.assert_close(torch.tensor(pair["probs"]), mean, rtol=1e-5, atol=1e-6)


def test_cache_is_reused_and_resumed(task, monkeypatch):
    """Only what is missing is sampled, as the settings say, with other draws for each shard."""
    monkeypatch.setattr(distill, "SHARD", 8)
    reason_first(task)
    teacher, pairs, *_ = scripted_teacher(task, monkeypatch, "--sampling_temperature=0.6")
    asked, sample = [], rollout.sample
    monkeypatch.setattr(rollout, "sample", lambda *args, **settings: asked.append(settings) or sample(*args, **settings))
    again = lambda: teach(teacher, copy.deepcopy(pairs))
    first = again()
    assert [(s["group_size"], s["temperature"], s["first_row"]) for s in asked] == [(2, 0.6, 0), (2, 0.6, 16), (2, 0.6, 32)]
    os.remove(Path(teacher.config.cache) / "00000008.json")  # as if it was stopped there
    assert again() == first and [s["first_row"] for s in asked[3:]] == [16]
    assert again() == first and len(asked) == 4


STALE = {
    "temperature": lambda teacher, pairs: setattr(teacher.config, "sampling_temperature", 0.5),
    "samples": lambda teacher, pairs: setattr(teacher.config, "samples", 3),
    "teacher": lambda teacher, pairs: setattr(teacher.config, "teacher", str(teacher.renderer.task.folder / "model")),
    "weights": lambda teacher, pairs: os.utime(Path(teacher.config.teacher) / "model.safetensors", (0, 0)),
    "criteria": lambda teacher, pairs: setattr(teacher.renderer.task, "criteria", "Others."),
    "order of labels": lambda teacher, pairs: teacher.renderer.task.labels.reverse(),
    "a text": lambda teacher, pairs: pairs[-1].update(document="another"),
    "fewer pairs": lambda teacher, pairs: pairs.pop(),
    "more pairs": lambda teacher, pairs: pairs.append(dict(pairs[0])),
}


@pytest.mark.parametrize("change", STALE)
def test_stale_cache_is_refused(task, monkeypatch, change):
    """Distributions of another teacher, task or sampling, or of other pairs, taken for those that were asked for."""
    reason_first(task)
    shutil.copy(task.parent / "teacher" / "model.safetensors", task / "model")
    teacher, pairs, *_ = scripted_teacher(task, monkeypatch)
    teach(teacher, copy.deepcopy(pairs))
    STALE[change](teacher, pairs)
    with pytest.raises(grm.TaskError, match=f"{teacher.config.cache}.*delete"):
        teach(teacher, pairs)


@pytest.mark.parametrize("loss", ["label", "gold"])
@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_loss_of_a_label_student_is_that_of_its_logits(task, kind, loss):
    """Padding that is read, another position than behind "\\boxed{", settings that are not passed on, or a mean over the
    pairs of a micro-batch instead of all ranks'."""
    folder = task.parent / "teacher" if kind == "causal" else task / "student"
    if kind == "classifier":
        make_student(task)[0].save(folder)
        plain = AutoModelForSequenceClassification.from_pretrained(folder)
    else:
        plain, _ = grm.load_model(folder)
    student, _, pairs = make_student(task, f"--loss={loss}", "--temperature=2", "--gold_weight=0.3", f"--student={folder}")
    pairs, rows = pairs[: 3 if loss == "gold" else 5], []
    for pair in pairs:
        if kind == "classifier":
            rows.append(plain(**student.tokenizer(pair["query"], pair["document"], return_tensors="pt")).logits[0])
        else:
            prompt = student.renderer.prompt(pair["query"], pair["document"]) + student.renderer.opening
            rows.append(plain(torch.tensor([prompt])).logits[0, -1, student.renderer.label_ids])
    logits_NY, gold_N = torch.stack(rows), torch.tensor([pair["gold"] for pair in pairs])
    kd = label_kd_loss(logits_NY, torch.tensor([pair["probs"] for pair in pairs]), gold_N, 2.0, 0.3)
    expected = len(pairs) / 8 * (F.cross_entropy(logits_NY, gold_N) if loss == "gold" else kd)
    assert_same(student(pairs, 8), expected, student.parameters(), plain.parameters(), rtol=1e-3, atol=1e-5)


def test_loss_of_a_reasoning_student_is_that_of_its_tokens(task):
    """Teacher and student swapped, positions off by one, settings that are not passed on, or a mean over the tokens of a
    micro-batch instead of all ranks'."""
    student, _, pairs = make_student(task, "--loss=js", "--beta=0.3", "--temperature=2", f"--student={task / 'model'}")
    models, hidden = [grm.load_model(folder, seed=0)[0] for folder in (task / "model", task.parent / "teacher")], ([], [])
    for pair in pairs:
        prompt = student.renderer.prompt(pair["query"], pair["document"])
        for answer in pair["reasonings"]:
            for model, parts in zip(models, hidden, strict=True):
                parts.append(model.base_model(torch.tensor([prompt + answer])).last_hidden_state[0, len(prompt) - 1 : -1])
    student_AD, teacher_AE = map(torch.cat, hidden)
    inputs = (student_AD, models[0].lm_head, teacher_AE, models[1].lm_head)
    expected = 30 / 47 * naive_token_loss(*inputs, "js", beta=0.3, temperature=2.0)
    assert student.weight(pairs) == 30
    assert_same(student(pairs, 47), expected, student.parameters(), models[0].parameters(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("flags", [[], ["--loss=gold"], ["--student={}/model"], ["--student={}/model", "--loss=reverse"]])
def test_no_pairs_have_loss_zero_with_gradient(task, flags):
    """A rank without pairs that computes nothing, or leaves a parameter without a gradient, while the others wait for it."""
    student, *_ = make_student(task, *[flag.format(task) for flag in flags])
    loss = student.train()([], 7)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.count_nonzero() for p in student.parameters())


def test_classifier_loads_in_the_usual_libraries(task, monkeypatch):
    """The student's folder as it is: sentence-transformers' CrossEncoder and transformers' pipeline give its probabilities."""
    summary, folder = run(monkeypatch, task), str(task.parent / "out" / "model")
    expected = {"accuracy", "macro_f1", "kappa", "ece", "ms_per_pair_batch_1", "ms_per_pair_batch_64", "parameters"}
    for scores in (summary["teacher"]["test_random"], summary["student"]["test_longtail"]):
        assert expected <= set(scores)
    records = grm.Task.load(task).read(task / "test_random.jsonl")[:5]
    records[0]["document"] += " [SEP] ramen [PAD] [CLS]"
    student, *_ = make_student(task, f"--student={folder}")
    seen = []
    student.model.register_forward_pre_hook(lambda model, _, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
    student.eval().label_logits(records)
    assert ((seen[0] == student.tokenizer.sep_token_id).sum(1) == 2).all()  # not those in the text
    pairs = [(r["query"], r["document"]) for r in records]
    scores = CrossEncoder(folder, device="cpu").predict(pairs, apply_softmax=True)
    texts = [{"text": query, "text_pair": document} for query, document in pairs]
    piped = pipeline("text-classification", model=folder, top_k=None, device="cpu")(texts)
    for prediction, row, found in zip(student.predict(records), scores, piped, strict=True):
        assert list(prediction["probs"].values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert {x["label"]: x["score"] for x in found} == pytest.approx(prediction["probs"], abs=1e-5)


def test_causal_student_scores_with_grm(task, monkeypatch):
    """OUT/model, which holds its criteria, is all that `grm.py score` needs; it reads the same labels from one prefill."""
    run(monkeypatch, task, f"--student={task / 'model'}", "--loss=label")
    folder, scored = task.parent / "out" / "model", task.parent / "scored.jsonl"
    flags = ["score", "--model", folder, "--pairs", task / "test_random.jsonl", "--out", scored]
    monkeypatch.setattr(sys, "argv", ["grm.py", *map(str, flags)])
    grm.main()
    student, *_ = make_student(task, f"--student={folder}")
    expected = student.predict(grm.Task.load(task).read(task / "test_random.jsonl"))
    for line, prediction in zip(scored.read_text().splitlines(), expected, strict=True):
        assert json.loads(line)["probs"] == pytest.approx(prediction["probs"], abs=1e-5)


def train(teacher, pairs, *flags):
    """A student of a teacher, trained on pairs; with the losses of its steps."""
    task, ranks = teacher.renderer.task, parallel.Ranks()
    config = configure(task.folder, f"--student={task.folder / 'model'}", *flags)
    student = distill.make_student(config, task, teacher, ranks)
    student.encode(pairs)
    steps = parallel.Run(config.out, {}, ranks)
    steps.resume(student, torch.optim.AdamW(student.parameters()))
    distill.train(student, student.model, pairs, config, ranks, steps)
    return student, [json.loads(line)["loss"] for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", KINDS)
def test_token_losses_train_a_copy_towards_the_teacher(task, monkeypatch, loss):
    """A student with the teacher's own weights has loss 0; a fresh one comes closer, on the teacher's reasonings."""
    reason_first(task)
    teacher, pairs, *_ = scripted_teacher(task, monkeypatch)
    taught = teach(teacher, pairs)
    _, losses = train(teacher, taught, f"--loss={loss}", "--steps=8", "--lr=3e-3", "--seed=3")
    assert losses[-1] < 0.9 * losses[0]
    twin, _, pairs = make_student(task, f"--loss={loss}", f"--student={task.parent / 'teacher'}")
    assert twin(pairs, 1).item() == pytest.approx(0, abs=1e-6)


def test_on_policy_uses_the_students_own_samples(task, monkeypatch):
    """GKD: prompts are answered by the student, anew at each step, and the loss is that of these answers."""
    fresh, teacher, pairs = make_student(task, "--loss=reverse", f"--student={task / 'model'}")
    seen, sample = [], rollout.sample

    def recording(model, prompts, **settings):
        sampled = sample(model, prompts, **settings)
        seen.append((model, settings["step"], sampled.answers))
        return sampled

    monkeypatch.setattr(rollout, "sample", recording)
    student, losses = train(teacher, pairs, "--loss=reverse", "--on_policy", "--steps=2", "--cache_tokens=10000")
    assert [step for _, step, _ in seen] == [0, 1] and all(model is student.model for model, *_ in seen)
    batch = zip(parallel.epoch_batch(pairs, 4, 0, 0), seen[0][2], strict=True)
    answered = [pair | {"reasonings": answers} for pair, answers in batch]
    assert losses[0] == pytest.approx(fresh(answered, fresh.weight(answered)).item(), rel=1e-5)


@pytest.mark.parametrize("student", ["student", "model"])
def test_bf16_on_a_cpu(task, monkeypatch, student):
    """Teacher and student compute in bfloat16: float32's losses but for rounding."""
    losses = []
    for name in "01":
        run(monkeypatch, task, f"--student={task / student}", f"--bf16={name}", f"--cache={task.parent / name}", out=f"o{name}")
        records = (task.parent / f"o{name}" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(record)["loss"] for record in records])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)


def test_same_seed_same_bytes_and_gold_alone(task, monkeypatch):
    """Runs repeat; --loss gold asks no teacher; --labelled hides the other labels."""
    seeds, batch = [], parallel.epoch_batch
    monkeypatch.setattr(parallel, "epoch_batch", lambda *args: seeds.append(torch.initial_seed()) or batch(*args))
    for out in ("a", "b"):
        run(monkeypatch, task, out=out)
    assert len(set(seeds[:3])) == 3 and seeds[:3] == seeds[3:]  # of dropout: another at each step
    assert (task.parent / "a" / "metrics.jsonl").read_bytes() == (task.parent / "b" / "metrics.jsonl").read_bytes()
    assert "teacher" not in run(monkeypatch, task, "--loss=gold", "--labelled=6", "--teacher=nowhere", out="c")
    records, _ = distill.read_pairs(configure(task, "--labelled=6"), grm.Task.load(task))
    assert [r["gold"] != distill.UNLABELLED for r in records] == [True] * 6 + [False] * 34


@pytest.mark.parametrize("kind", ["classifier with dropout", "causal"])
def test_a_stopped_run_goes_on_to_the_same_bytes(task, monkeypatch, capsys, kind):
    """Killed while the teacher is asked, stopped in step 3 of 6, killed in the comparison, and each time started again: metrics
    and weights are those of a run that was left alone."""
    flags = ["--steps=6", "--save_every=4", f"--cache={task.parent / 'cache'}"]
    flags += [f"--student={task / 'model'}"] if kind == "causal" else []
    path = task / "student" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp_dropout": 0.3, "embedding_dropout": 0.3}))
    calm, out, files = task.parent / "calm", task.parent / "out", ("metrics.jsonl", "model/model.safetensors")
    is_calm = lambda: all((out / name).read_bytes() == (calm / name).read_bytes() for name in files)
    run(monkeypatch, task, *flags, f"--cache={task.parent / 'other'}", out="calm")

    def interrupted(owner, name, number, event, error):
        """A run in which something happens before the call of a function, by its number."""
        calls, original = itertools.count(1), getattr(owner, name)
        with monkeypatch.context() as patched, pytest.raises(error):
            patched.setattr(owner, name, lambda *args: (next(calls) == number and event(), original(*args))[1])
            run(patched, task, *flags)
        assert not (out / "summary.json").exists()
        return sorted(path.name for path in (out / "checkpoints").glob("*"))

    killed = lambda: 1 / 0  # no handler may see it, as none sees SIGKILL
    stopped = lambda: signal.raise_signal(signal.SIGTERM)
    assert interrupted(rollout.Engine, "label_logits", 1, killed, ZeroDivisionError) == []
    assert interrupted(parallel.Run, "optimizer_step", 3, stopped, FileNotFoundError) == ["000003"]  # it ended in peace
    assert re.search("saved.*student step 3|student step 3.*saved", capsys.readouterr().out)
    with pytest.raises(SystemExit, match="--lr"):
        run(monkeypatch, task, *flags, "--lr=1")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4}\n')  # done after the checkpoint, lost with a crash: done again
    # In the student's first test set: the teacher has two.
    assert interrupted(grm, "metrics", 3, killed, ZeroDivisionError) == ["000006"] and is_calm()
    (out / "model" / "model.safetensors").write_bytes(b"half a file")
    run(monkeypatch, task, *flags)
    assert is_calm() and not (out / "checkpoints").exists()
    capsys.readouterr()
    run(monkeypatch, task, *flags)
    assert "holds this run, finished" in capsys.readouterr().out and is_calm()


def test_calibration_error():
    """Bins that overlap, end at their middles, are weighed alike however full, or lose what is certain."""
    draw = np.random.default_rng(0)
    sure, labels = np.append(draw.random(99), 1.0), draw.choice(["a", "b"], 100)
    records, predictions = [{"label": "a"}] * 100, [{"label": x, "probs": {x: p}} for x, p in zip(labels, sure, strict=True)]
    gaps = 0.0
    for start in np.arange(15) / 15:
        inside = (start <= sure) & (sure < start + 1 / 15) | (start == 14 / 15) & (sure == 1)
        gaps += abs(sure[inside].sum() - (labels[inside] == "a").sum()) / 100
    assert grm.calibration_error([*zip(records, predictions, strict=True)]) == pytest.approx(gaps)


def other_bert(task, cls):
    """Another BERT of a few weights as the student."""
    config = BertConfig(vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    cls(config).save_pretrained(task / "student")


def lost_tensor(task):
    """An encoder whose file lacks a layer's weight: not its head, which is new in any case."""
    other_bert(task, BertModel)
    path = task / "student" / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def long_query(task):
    """In a test set, of which the teacher speaks last."""
    path = task / "test_random.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {"query": "winter " * 400}), *rest]))


def other_words(task):
    """A student whose tokenizer numbers the words differently."""
    shutil.copytree(task / "model", task / "other")
    path = task / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"topic"', '"-"').replace('"place"', '"topic"').replace('"-"', '"place"'))


REFUSALS = {
    "classifier of other labels": (
        lambda task: other_bert(task, BertForSequenceClassification),
        [],
        "student: cannot be loaded",
    ),
    "tensor missing from the student's weights": (lost_tensor, [], "missing .*encoder.layer.0.output.dense.w"),
    "teacher that writes no boxes": (reason_first, [], "most answers are malformed"),
    "query too long for the teacher": (long_query, [], r"test_random\.jsonl:1: criteria, query and answer"),
    "tokenizers differ": (other_words, ["--loss=js", "--student={task}/other"], "different tokenizers; use --loss label"),
    "pickled weights": (lambda task: (task / "student" / "pytorch_model.bin").write_bytes(b"x"), [], "pickle|safetensors"),
    "token loss of a classifier": (None, ["--loss=forward"], "a classifier has none"),
    "on-policy without samples": (None, ["--on_policy"], "the label loss has no samples"),
    "unknown student": (None, ["--student=/nowhere"], "/nowhere: cannot be loaded"),
    "unknown teacher": (None, ["--teacher=runs/nothing/model"], "runs/nothing/model: "),
    "cache too small": (None, ["--cache_tokens=10", "--loss=js", "--student={task}/model"], r"cache_tokens \(10\): a group"),
    "impossible weight": (None, ["--gold_weight=2"], "--gold_weight: from 0 to 1"),
    "no room for the output": (None, ["--out=/proc/x"], "/proc/x"),
    "cache is a file": (None, ["--cache={task}/criteria.md"], "criteria.md"),
    "unknown file of pairs": (None, ["--pairs=nothing.jsonl"], r"/nothing\.jsonl"),
    "no labels for gold": (None, ["--loss=gold", "--labelled=0"], "no pair has a label"),
    "no steps": (None, ["--steps=0"], "--steps, .*: at least 1"),
    "output exists": (lambda task: shutil.copytree(task, task.parent / "out"), [], "--out .*other files"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused(task, monkeypatch, name):
    """Each names what to change, before any work: the teacher was not asked, or what it said does not pass later."""
    prepare, flags, message = REFUSALS[name]
    if prepare:
        prepare(task)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, task, *[flag.format(task=task) for flag in flags])
    assert not list(task.parent.rglob("0*.json"))


@pytest.mark.parametrize("flag", ["--student=/nowhere", "--teacher=runs/nothing/model", "--loss=forward"])
def test_a_refused_command_leaves_no_run(task, monkeypatch, flag):
    """OUT with the settings of a mistyped command, so that the mended one is refused as another run's."""
    with pytest.raises(SystemExit):
        run(monkeypatch, task, flag)
    run(monkeypatch, task)
