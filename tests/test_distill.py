"""distill.py against naive versions kept here: the losses, their gradients, their ends and their memory."""

import copy
import itertools
import json
import math
import os
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
    return logits_NY.requires_grad_(), probs_NY, gold_N


def tokens(A=11, D=4, E=6, student_vocabulary=13, teacher_vocabulary=13, dtype=torch.float64, seed=0):
    """Hidden states and linear heads of a student and a wider teacher; weights with zeros among them."""
    draw = torch.Generator().manual_seed(seed)
    student_AD, teacher_AE = (torch.randn(A, width, generator=draw, dtype=dtype) for width in (D, E))
    student_head = torch.nn.Linear(D, student_vocabulary, bias=False, dtype=dtype)
    teacher_head = torch.nn.Linear(E, teacher_vocabulary, bias=False, dtype=dtype)
    for head in (student_head, teacher_head):
        torch.nn.init.normal_(head.weight, generator=draw)
    weights_A = torch.rand(A, generator=draw, dtype=dtype)
    weights_A[::4] = 0
    return student_AD.requires_grad_(), student_head, teacher_AE, teacher_head, weights_A


def kl(p, q):
    """KL(p || q) over the last dimension, from probabilities."""
    return (p * (p.log() - q.log())).sum(-1)


def naive_token_loss(student_AD, student_head, teacher_AE, teacher_head, weights_A, kind, beta=0.5, temperature=1.0):
    """All positions at once, straight from the definitions, with [A, vocabulary] in memory."""
    p = torch.softmax(teacher_head(teacher_AE).detach() / temperature, -1)
    q = torch.softmax(student_head(student_AD) / temperature, -1)
    m = beta * p + (1 - beta) * q
    js = (beta * kl(p, m) + (1 - beta) * kl(q, m)) / (beta * (1 - beta))
    divergence_A = {"forward": kl(p, q), "reverse": kl(q, p), "js": js}[kind]
    return temperature**2 * (divergence_A * weights_A).sum() / weights_A.sum()


def assert_same(loss, expected, inputs, theirs=None, **tolerance):
    """The same loss, with the same gradients for its inputs (and for those of the other, if it has its own)."""
    torch.testing.assert_close(loss, expected, **tolerance)
    torch.testing.assert_close(grad(loss, [*inputs]), grad(expected, [*(theirs or inputs)]), **tolerance)


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [slice(0, None, 2), slice(0)], ids=["half", "none"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_label_kd_is_kl_at_temperature_plus_gold(temperature, labelled):
    """Direction of KL swapped, teacher not re-tempered, T**2 missing or on the gold term, unlabelled pairs scaled by the gold
    weight, 0 / 0 from a mean over no labelled pairs, or a mean that also divides by the number of labels, as torch's does."""
    logits_NY, probs_NY, given_N = labels()
    gold_N = torch.full_like(given_N, -100)
    gold_N[labelled] = given_N[labelled]
    pure = F.kl_div(torch.log_softmax(logits_NY, -1), probs_NY, reduction="batchmean")
    torch.testing.assert_close(label_kd_loss(logits_NY, probs_NY, gold_N), pure)
    expected = 0.0
    for logits, probs, gold in zip(logits_NY, probs_NY, gold_N.tolist(), strict=True):
        p = probs ** (1 / temperature) / (probs ** (1 / temperature)).sum()
        kd = temperature**2 * kl(p, torch.softmax(logits / temperature, -1))
        expected += kd if gold == -100 else 0.7 * kd - 0.3 * torch.softmax(logits, -1)[gold].log()
    expected = expected / len(gold_N)
    loss = label_kd_loss(logits_NY, probs_NY, gold_N, temperature, gold_weight=0.3)
    assert_same(loss, expected, [logits_NY])


def test_label_kd_with_zero_probabilities():
    """NaN from 0 * log(0) when a teacher is so sure that a label's probability underflows."""
    logits_NY, _, _ = labels(N=1)
    probs_NY = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    log_q = torch.log_softmax(logits_NY, -1)[0]
    expected = 0.25 * (math.log(0.25) - log_q[1]) + 0.75 * (math.log(0.75) - log_q[3])
    loss = label_kd_loss(logits_NY, probs_NY, torch.tensor([-100]))
    assert_same(loss, expected, [logits_NY])
    assert label_kd_loss(logits_NY, probs_NY, torch.tensor([-100]), temperature=3.0).isfinite()


# Tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_token_kd_equals_the_naive_version(kind, temperature):
    """Teacher and student swapped in a KL or in the mixture, T**2 missing, weights dropped, a gradient lost."""
    inputs = tokens()
    loss = token_kd_loss(*inputs, kind=kind, beta=0.3, temperature=temperature, chunk=4)
    expected = naive_token_loss(*inputs, kind, beta=0.3, temperature=temperature)
    assert_same(loss, expected, [inputs[0], inputs[1].weight])


@pytest.mark.parametrize("chunk", [1, 3, 10, 12, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_token_kd_does_not_depend_on_the_chunk(kind, chunk):
    """A mean of chunk means, which weighs the positions of a short last chunk (or of one with zero weights) more."""
    inputs = tokens()
    whole, chunked = (token_kd_loss(*inputs, kind=kind, chunk=size) for size in (11, chunk))
    assert_same(chunked, whole, [inputs[0], inputs[1].weight])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_vanish_at_the_teacher(kind, temperature):
    """Both at different temperatures, which pushes a perfect copy of the teacher away from it; or a divergence that is none:
    the rescaled Jensen-Shannon must also be 0, with zero gradient, at q = p."""
    logits_NY, _, gold_N = labels()
    loss = label_kd_loss(logits_NY, torch.softmax(logits_NY, -1), gold_N, temperature)
    assert_same(loss, 0 * logits_NY.sum(), [logits_NY], rtol=0, atol=1e-12)
    student_AD, head, _, _, weights_A = tokens()
    loss = token_kd_loss(student_AD, head, student_AD.detach(), head, weights_A, kind=kind, beta=0.2, temperature=temperature)
    assert_same(loss, 0 * (student_AD.sum() + head.weight.sum()), [student_AD, head.weight], rtol=0, atol=1e-12)


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
    exact = token_kd_loss(*inputs, kind="js", beta=beta)
    single = token_kd_loss(*(x.float() for x in inputs), kind="js", beta=beta)
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("sizes", [(13, 17), (17, 13)])
@pytest.mark.parametrize("kind", KINDS)
def test_token_kd_slices_to_the_common_vocabulary(kind, sizes):
    """Padding the shorter logits with zeros, or slicing probabilities after the softmax without normalising them."""
    inputs = tokens(student_vocabulary=sizes[0], teacher_vocabulary=sizes[1])
    student_AD, student_head, teacher_AE, teacher_head, weights_A = inputs
    sliced = (student_AD, lambda x: student_head(x)[:, :13], teacher_AE, lambda x: teacher_head(x)[:, :13], weights_A)
    loss = token_kd_loss(*inputs, kind=kind, chunk=5)
    assert_same(loss, naive_token_loss(*sliced, kind), [student_AD, student_head.weight])


@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_weight_zero_change_nothing(kind):
    """Padding counted in the normaliser, or leaking into the gradient."""
    inputs, more = tokens(), tokens(A=7, seed=1)
    padded_AD, padded_AE = (torch.cat([inputs[i], more[i].detach()]) for i in (0, 2))
    padded_A = torch.cat([inputs[4], 0 * more[4]])
    plain = token_kd_loss(*inputs, kind=kind, chunk=4)
    padded = token_kd_loss(padded_AD, inputs[1], padded_AE, inputs[3], padded_A, kind=kind, chunk=4)
    assert_same(padded, plain, [inputs[0], inputs[1].weight])


def test_global_denominator_adds_up_over_micro_batches():
    """A local normaliser: micro-batches of different length would weigh their tokens differently."""
    inputs = tokens()
    first, rest = ([x[part] if torch.is_tensor(x) else x for x in inputs] for part in (slice(3), slice(3, None)))
    total = inputs[4].sum()
    parts = token_kd_loss(*first, denominator=total) + token_kd_loss(*rest, denominator=total)
    torch.testing.assert_close(parts, token_kd_loss(*inputs))


def test_no_weights_and_boolean_weights():
    """The default weight not being 1, or a boolean mask that is summed or multiplied as anything but 0 and 1."""
    student_AD, student_head, teacher_AE, teacher_head, weights_A = tokens()
    keep_A, inputs = weights_A > 0, (student_AD, student_head, teacher_AE, teacher_head)
    kept = token_kd_loss(student_AD[keep_A], student_head, teacher_AE[keep_A], teacher_head)
    torch.testing.assert_close(token_kd_loss(*inputs, keep_A), kept)
    torch.testing.assert_close(token_kd_loss(*inputs), naive_token_loss(*inputs, torch.ones_like(weights_A), "forward"))


@pytest.mark.parametrize("A", [0, 5])
def test_nothing_that_counts_is_zero_with_gradient(A):
    """NaN from 0 / 0, or a rank without pairs or answers that cannot run backward (and leaves the others waiting)."""
    logits_NY, probs_NY, gold_N = labels(N=0)
    *inputs, weights_A = tokens(A=A)
    pairs_loss = label_kd_loss(logits_NY, probs_NY, gold_N, gold_weight=0.5)
    tokens_loss = token_kd_loss(*inputs, 0 * weights_A, chunk=2)
    assert pairs_loss.item() == tokens_loss.item() == 0
    assert grad(pairs_loss, logits_NY)[0].shape == (0, 5)
    assert not any(x.count_nonzero() for x in grad(tokens_loss, [inputs[0], inputs[1].weight]))


def test_teacher_gets_no_gradient():
    """A teacher that is trained toward its student when their parameters share an optimizer or a graph."""
    student_AD, student_head, teacher_AE, teacher_head, weights_A = tokens()
    teacher_AE.requires_grad_()
    token_kd_loss(student_AD, student_head, teacher_AE, teacher_head, weights_A, kind="js").backward()
    logits_NY, probs_NY, gold_N = labels()
    probs_NY.requires_grad_()
    label_kd_loss(logits_NY, probs_NY, gold_N).backward()
    assert student_head.weight.grad is not None and logits_NY.grad is not None
    assert teacher_AE.grad is None and teacher_head.weight.grad is None and probs_NY.grad is None


def test_bfloat16_is_taken_to_float32():
    """Probabilities that sum to 1 only within bfloat16 refused, or losses computed in bfloat16, which keeps two to three
    digits of each logit."""
    logits_NY, probs_NY, gold_N = (x.bfloat16() if x.is_floating_point() else x for x in labels(N=64))
    loss = label_kd_loss(logits_NY, probs_NY, gold_N, temperature=2.0, gold_weight=0.3)
    exact_NY = probs_NY.double() / probs_NY.double().sum(-1, keepdim=True)
    exact = label_kd_loss(logits_NY.double(), exact_NY, gold_N, temperature=2.0, gold_weight=0.3)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)
    *inputs, weights_A = tokens(A=32, student_vocabulary=2000, teacher_vocabulary=2000)
    student_AD, student_head, teacher_AE, teacher_head = (x.bfloat16() for x in inputs)
    heads = [lambda x: student_head(x).double(), lambda x: teacher_head(x).double()]
    exact = naive_token_loss(student_AD, heads[0], teacher_AE, heads[1], weights_A, "forward")
    loss = token_kd_loss(student_AD, student_head, teacher_AE, teacher_head, weights_A.float())
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_not_mutated(kind):
    """In-place work on the caller's tensors: a second loss on the same batch would differ from the first."""
    logits_NY, probs_NY, gold_N = labels()
    student_AD, student_head, teacher_AE, teacher_head, weights_A = tokens(teacher_vocabulary=17)
    tensors = [logits_NY, probs_NY, gold_N, student_AD, teacher_AE, weights_A, student_head.weight, teacher_head.weight]
    before = [x.detach().clone() for x in tensors]
    label_kd_loss(logits_NY, probs_NY, gold_N, temperature=2.0, gold_weight=0.5).backward()
    # Heads that return stored logits: in-place work on logits would show here.
    stored = [torch.randn(11, V, dtype=torch.float64) for V in (13, 17)]
    copies = [x.clone() for x in stored]
    token_kd_loss(student_AD, lambda x: stored[0], teacher_AE, lambda x: stored[1], weights_A, kind=kind, temperature=2.0)
    token_kd_loss(student_AD, student_head, teacher_AE, teacher_head, weights_A, kind=kind, chunk=4).backward()
    for x, original in zip(tensors + stored, before + copies, strict=True):
        assert torch.equal(x, original)


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


ARGUMENTS = {
    label_kd_loss: (("student_logits_NY", "teacher_probs_NY", "gold_N"), labels(N=4, Y=3)),
    token_kd_loss: (("student_hidden_AD", "student_head", "teacher_hidden_AE", "teacher_head", "weights_A"), tokens(A=5)),
}


@pytest.mark.parametrize(
    ("loss", "change", "message"),
    [
        (label_kd_loss, {"student_logits_NY": torch.zeros(4)}, "have shapes"),
        (label_kd_loss, {"teacher_probs_NY": torch.full((4, 2), 0.5)}, "have shapes"),
        (label_kd_loss, {"teacher_probs_NY": torch.tensor([[2.0, -1.0, 0.0]] * 4)}, "must be probabilities"),
        (label_kd_loss, {"teacher_probs_NY": torch.full((4, 3), 0.2)}, "must be probabilities"),
        (label_kd_loss, {"teacher_probs_NY": torch.full((4, 3), math.nan)}, "must be probabilities"),
        (label_kd_loss, {"gold_N": torch.zeros(3, dtype=torch.long)}, "have shapes"),
        (label_kd_loss, {"gold_N": torch.tensor([0, 1, 2, 3])}, "label indices 0..2"),
        (label_kd_loss, {"gold_N": torch.tensor([0, 1, 2, -1])}, "label indices 0..2"),
        (token_kd_loss, {"student_hidden_AD": torch.zeros(1, 5, 4)}, "hidden states have shapes"),
        (token_kd_loss, {"teacher_hidden_AE": torch.zeros(1, 6)}, "with the same A"),
        (token_kd_loss, {"weights_A": torch.ones(5, 1)}, "weights_A has shape"),
        (token_kd_loss, {"kind": "kl"}, "kind is 'kl'"),
        (token_kd_loss, {"kind": "js", "beta": 0.0}, "beta is 0.0"),
        (token_kd_loss, {"kind": "js", "beta": 1.0}, "beta is 1.0"),
        (token_kd_loss, {"kind": "js", "beta": math.nan}, "beta is nan"),
    ],
)
def test_losses_refuse(loss, change, message):
    """A wrong input that broadcasts, counts from the end, becomes NaN, or silently means another loss (ends of beta)."""
    arguments = dict(zip(*ARGUMENTS[loss], strict=True))
    loss(**arguments)
    with pytest.raises(ValueError, match=message):
        loss(**{**arguments, **change})


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


def run(monkeypatch, task, *flags, out="out"):
    """distill.py as a script, in this process; returns its summary."""
    monkeypatch.setattr(sys, "argv", ["distill.py", *arguments(task, f"--out={task.parent / out}", *flags)])
    runpy.run_path(distill.__file__, run_name="__main__")
    return json.loads((task.parent / out / "summary.json").read_text())


def make_student(task, *flags):
    """A student, its teacher, and five pairs encoded for it, the last two without a label."""
    config, loaded = distill.parse_config(arguments(task, *flags)), grm.Task.load(task)
    pairs = distill.read_pairs(config, loaded)[0][17:22]
    for i, pair in enumerate(pairs):
        pair["probs"] = torch.rand(5, generator=torch.Generator().manual_seed(i)).softmax(-1).tolist()
        pair["reasonings"] = [[7, 8, 9 + i], [10 + i] * (i + 1)]
    teacher = distill.Teacher(config, loaded, parallel.Ranks())
    student = distill.student_maker(config, loaded, teacher)("cpu")
    student.encode(pairs)
    return student, teacher, pairs


def teach(teacher, pairs, teacher_hash="hash"):
    ranks = parallel.Ranks()
    teacher.encode(pairs, teacher.config.samples)
    progress = parallel.Progress(Path(teacher.config.cache).parent / "new", {}, ranks, stage="student")
    return distill.teach(teacher, pairs, teacher_hash, ranks, progress)


def reason_first(task):
    """The same task with the reasoning first, and demonstrations as what a trained teacher would write."""
    for name in ("criteria.md", "sft.jsonl", "train.jsonl", "test_random.jsonl", "test_longtail.jsonl"):
        (task / name).write_text("".join((NOTES / name).read_text().splitlines(keepends=True)[:20]))


def scripted_teacher(task, monkeypatch, *flags, broken=()):
    """A teacher whose samples are the demonstration and another one's, (pair, sample) in `broken` cut short. Its sampler
    takes the scripted ids where it would draw: they stand in the place of the uniforms."""
    config, loaded = distill.parse_config(arguments(task, "--pairs=sft.jsonl", *flags)), grm.Task.load(task)
    teacher, pairs = distill.Teacher(config, loaded, parallel.Ranks()), loaded.read(task / "sft.jsonl", ("response",))
    ids = [teacher.renderer.response(pair["response"]) for pair in pairs]
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
        kept = [answer for answer in group if renderer.parse(answer).problem is None]
        assert not sampled or pair["reasonings"] == kept
        mean = torch.zeros(5)
        for answer in kept:
            at = renderer.parse(answer).steps[-1 if form == "reason-first" else 0].label_at
            ids = renderer.prompt(pair["query"], pair["document"]) + answer[:at]
            mean += plain(torch.tensor([ids])).logits[0, -1, renderer.label_ids].softmax(-1) / len(kept)
        torch.testing.assert_close(torch.tensor(pair["probs"]), mean, rtol=1e-5, atol=1e-6)


def test_cache_is_reused_resumed_and_refused_when_stale(task, monkeypatch):
    """Only what is missing is sampled; another setting, teacher, document or order of labels makes it stale."""
    monkeypatch.setattr(distill.Cache, "SHARD", 8)
    reason_first(task)
    teacher, pairs, _, calls = scripted_teacher(task, monkeypatch)
    first = copy.deepcopy(teach(teacher, pairs))
    assert calls == [8, 8, 4]
    folder = Path(teacher.config.cache)
    os.rename(folder / "labels-00001", folder / "labels-00001.unfinished")  # as if stopped there
    assert teach(teacher, pairs) == first and calls == [8, 8, 4, 8]
    for name in ("index.json", "labels-00002/labels.safetensors", "labels-00002/checksums.json"):
        whole = (folder / name).read_bytes()
        for damaged in (whole[:-9], whole[:-3] + b"x" + whole[-2:]):
            (folder / name).write_bytes(damaged)
            with pytest.raises(parallel.RunError, match=rf"{folder}.*(damaged|not as it was written); .*delete it"):
                teach(teacher, pairs)
        (folder / name).write_bytes(whole)
    for changed in (([{**pairs[0], "document": "another"}, *pairs[1:]],), (pairs, "another")):
        with pytest.raises(grm.TaskError, match=r"stale.*delete"):
            teach(teacher, *changed)
    labels = teacher.renderer.task.labels[::-1]
    for owner, name, value in ((teacher.config, "sampling_temperature", 0.5), (teacher.renderer.task, "labels", labels)):
        with monkeypatch.context() as patched, pytest.raises(grm.TaskError, match="stale"):
            patched.setattr(owner, name, value)
            teach(teacher, pairs)


def test_each_shard_is_sampled_as_the_settings_say(task, monkeypatch):
    """Another temperature or number of reasonings than asked for, or the same draws for the pairs of every shard."""
    monkeypatch.setattr(distill.Cache, "SHARD", 8)
    reason_first(task)
    teacher, pairs, _, _ = scripted_teacher(task, monkeypatch, "--sampling_temperature=0.6")
    asked, sample = [], rollout.sample
    monkeypatch.setattr(rollout, "sample", lambda *args, **settings: asked.append(settings) or sample(*args, **settings))
    teach(teacher, pairs)
    assert [(s["group_size"], s["temperature"], s["first_row"]) for s in asked] == [(2, 0.6, 0), (2, 0.6, 16), (2, 0.6, 32)]


def test_teacher_that_does_not_follow_the_format_stops_the_run(task, monkeypatch):
    """An untrained model writes no boxes; its label distributions would be noise. Nor does the cache let them pass later."""
    reason_first(task)
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"100% of 80 answers are malformed"):
            run(monkeypatch, task)


@pytest.mark.parametrize("loss", ["label", "gold"])
@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_loss_of_a_label_student_is_that_of_its_logits(task, kind, loss):
    """Padding that is read, logits in the order of the classifier's labels instead of the task's, another position than
    behind "\\boxed{", settings that are not passed on, or a mean over the pairs of a micro-batch instead of all ranks'."""
    folder = task.parent / "teacher" if kind == "causal" else task / "student"
    if kind == "classifier":
        fresh, *_ = make_student(task)
        fresh.model.config.id2label = dict(enumerate(fresh.task.labels[::-1]))
        fresh.save(folder)
        plain = AutoModelForSequenceClassification.from_pretrained(folder)
    else:
        plain, _ = grm.load_model(folder)
    student, _, pairs = make_student(task, f"--loss={loss}", "--temperature=2", "--gold_weight=0.3", f"--student={folder}")
    pairs, rows = pairs[: 3 if loss == "gold" else 5], []
    for pair in pairs:
        if kind == "classifier":
            rows.append(plain(**student.tokenizer(pair["query"], pair["document"], return_tensors="pt")).logits[0].flip(0))
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
    inputs = (student_AD, models[0].lm_head, teacher_AE, models[1].lm_head, torch.ones(30))
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
    student.encode(records)
    assert all(r["encoded"]["input_ids"].count(student.tokenizer.sep_token_id) == 2 for r in records)  # but in the text
    pairs = [(r["query"], r["document"]) for r in records]
    scores = CrossEncoder(folder, device="cpu").predict(pairs, apply_softmax=True)
    texts = [{"text": query, "text_pair": document} for query, document in pairs]
    piped = pipeline("text-classification", model=folder, top_k=None, device="cpu")(texts)
    for prediction, row, found in zip(student.eval().predict(records), scores, piped, strict=True):
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
    config = distill.parse_config(arguments(task.folder, f"--student={task.folder / 'model'}", *flags))
    student = distill.student_maker(config, task, teacher)("cpu")
    student.encode(pairs)
    optimizer = torch.optim.AdamW(student.parameters())
    progress = parallel.Progress(config.out, {}, ranks, stage="student")
    progress.start(student, optimizer)
    distill.train(student, student, optimizer, pairs, config, ranks, progress)
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
    records, _ = distill.read_pairs(distill.parse_config([*arguments(task), "--labelled=6"]), grm.Task.load(task))
    assert [r["gold"] != distill.UNLABELLED for r in records] == [True] * 6 + [False] * 34


@pytest.mark.parametrize("kind", ["classifier with dropout", "causal"])
def test_a_stopped_run_goes_on_to_the_same_bytes(task, monkeypatch, capsys, kind):
    """Stopped while the teacher is asked and after step 3 of 6, then killed in the comparison, and each time started again:
    metrics and weights are those of a run that was left alone."""
    flags = ["--steps=6", "--save_every=4", f"--cache={task.parent / 'cache'}"]
    flags += [f"--student={task / 'model'}"] if kind == "causal" else []
    path = task / "student" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp_dropout": 0.3, "embedding_dropout": 0.3}))
    calm, out, files = task.parent / "calm", task.parent / "out", ("metrics.jsonl", "model/model.safetensors")
    is_calm = lambda: all((out / name).read_bytes() == (calm / name).read_bytes() for name in files)
    run(monkeypatch, task, *flags, f"--cache={task.parent / 'other'}", out="calm")

    def interrupted(owner, name, number, instead, error):
        """A run in which the call of a function, by its number, does something else."""
        calls, original = itertools.count(1), getattr(owner, name)
        with monkeypatch.context() as patched, pytest.raises(error):
            patched.setattr(owner, name, lambda *args: instead() if next(calls) == number else original(*args))
            run(patched, task, *flags)
        assert not (out / "summary.json").exists()
        return [path.name for path in (out / "checkpoints").iterdir()]

    stop = lambda: signal.raise_signal(signal.SIGTERM)  # while the teacher is asked
    assert interrupted(rollout.Engine, "label_logits", 1, stop, FileNotFoundError) == ["000000"]
    # The teacher's stage asks twice whether to stop, then each step.
    assert interrupted(parallel.Ranks, "stopping", 5, lambda: True, FileNotFoundError) == ["000003"]
    with pytest.raises(SystemExit, match="another run"):
        run(monkeypatch, task, *flags, "--lr=1")
    teacher = task.parent / "teacher" / "config.json"
    whole = teacher.read_text()
    teacher.write_text(whole + " ")
    with pytest.raises(SystemExit, match="other contents"):
        run(monkeypatch, task, *flags)
    teacher.write_text(whole)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4}\n')  # done after the checkpoint, lost with a crash: done again
    # In the student's first test set: the teacher has two. No handler may see it, as none sees SIGKILL.
    assert interrupted(grm, "metrics", 3, lambda: 1 / 0, ZeroDivisionError) == ["000006"] and is_calm()
    (out / "model" / "model.safetensors").write_bytes(b"half a file")
    run(monkeypatch, task, *flags)
    assert is_calm() and not (out / "checkpoints").exists()
    run(monkeypatch, task, *flags)
    assert "finished; to repeat it" in capsys.readouterr().out


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


def no_label(task):
    """A trained classifier of other labels as the student."""
    config = BertConfig(vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertForSequenceClassification(config).save_pretrained(task / "student")


def lost_tensor(task):
    """An encoder whose file lacks a layer's weight: not its head, which is new in any case."""
    config = BertConfig(vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.architectures = ["BertModel"]
    BertModel(config).save_pretrained(task / "student")
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
    "label missing from the student's config": (no_label, [], r"no label -1, 0, 1, 2, 3 \(it has LABEL_0, LABEL_1\)"),
    "tensor missing from the student's weights": (lost_tensor, [], "missing or left over: bert.encoder.layer.0.output.dense.w"),
    "query too long for the teacher": (long_query, [], r"test_random\.jsonl:1: the criteria and the query"),
    "tokenizers differ": (other_words, ["--loss=js", "--student={task}/other"], "different tokenizers; use --loss label"),
    "pickled weights": (lambda task: (task / "student" / "pytorch_model.bin").write_bytes(b"x"), [], "only pickled weights"),
    "token loss of a classifier": (None, ["--loss=forward"], "is a classifier; use --loss label"),
    "on-policy without samples": (None, ["--on_policy"], "choose --loss forward"),
    "unknown student": (None, ["--student=/nowhere"], "--student /nowhere: no such folder"),
    "unknown teacher": (None, ["--teacher=runs/nothing/model"], "--teacher runs/nothing/model: no such folder; train"),
    "cache too small": (None, ["--cache_tokens=10", "--loss=js", "--student={task}/model"], r"--cache_tokens \(10\): a group"),
    "impossible number of labels": (None, ["--labelled=-7"], "--labelled -7: must be"),
    "impossible weight": (None, ["--gold_weight=2"], r"--gold_weight 2\.0: must be"),
    "no room for the output": (None, ["--out=/proc/x"], "--out /proc/x: "),
    "cache is a file": (None, ["--cache={task}/criteria.md"], "not a folder"),
    "prompt without a template": (None, ["--input=prompt"], "--student .*: the tokenizer has no chat template"),
    "unknown file of pairs": (None, ["--pairs=nothing.jsonl"], r"nothing\.jsonl: not found"),
    "no labels for gold": (None, ["--loss=gold", "--labelled=0"], "no pair has a label"),
    "seed below 0": (None, ["--seed=-1"], "--seed -1: must be at least 0"),
    "no steps": (None, ["--steps=0"], "--steps 0: must be at least 1"),
    "output exists": (lambda task: shutil.copytree(task, task.parent / "out"), [], "holds other files; choose a new folder"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused(task, monkeypatch, name):
    """Each names what to change, before any work: the teacher was not asked."""
    prepare, flags, message = REFUSALS[name]
    if prepare:
        prepare(task)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, task, *[flag.format(task=task) for flag in flags])
    assert not list(task.parent.rglob("labels-*"))
