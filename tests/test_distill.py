"""distill.py against naive versions kept here: the losses, their gradients, their ends and their memory."""

import json
import math
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import NOTES
from sentence_transformers import CrossEncoder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForSequenceClassification, pipeline

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
    with torch.no_grad():
        for head in (student_head, teacher_head):
            head.weight.copy_(torch.randn(head.weight.shape, generator=draw, dtype=dtype))
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


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_label_kd_is_kl_at_temperature_plus_gold(temperature):
    """Direction of KL swapped, teacher not re-tempered, T**2 missing or on the gold term, unlabelled pairs scaled."""
    logits_NY, probs_NY, gold_N = labels()
    expected = 0.0
    for logits, probs, gold in zip(logits_NY, probs_NY, gold_N.tolist(), strict=True):
        p = probs ** (1 / temperature) / (probs ** (1 / temperature)).sum()
        kd = temperature**2 * kl(p, torch.softmax(logits / temperature, -1))
        expected += kd if gold == -100 else 0.7 * kd - 0.3 * torch.softmax(logits, -1)[gold].log()
    expected = expected / len(gold_N)
    loss = label_kd_loss(logits_NY, probs_NY, gold_N, temperature, gold_weight=0.3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, logits_NY), gradients(expected, logits_NY))


def test_label_kd_equals_torch_kl_div():
    """A wrong normaliser: "batchmean" is the mean over pairs, torch's "mean" also divides by the number of labels."""
    logits_NY, probs_NY, gold_N = labels()
    expected = F.kl_div(torch.log_softmax(logits_NY, -1), probs_NY, reduction="batchmean")
    torch.testing.assert_close(label_kd_loss(logits_NY, probs_NY, gold_N), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_label_kd_vanishes_at_the_teacher(temperature):
    """Student and teacher at different temperatures: then a perfect copy of the teacher is pushed away from it."""
    logits_NY, _, gold_N = labels()
    loss = label_kd_loss(logits_NY, torch.softmax(logits_NY, -1), gold_N, temperature)
    zero = torch.zeros_like(logits_NY)
    torch.testing.assert_close(loss, zero.sum(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(loss, logits_NY)[0], zero, rtol=0, atol=1e-12)


def test_label_kd_without_any_label_is_pure_kd():
    """0 / 0 from a mean over no labelled pairs, or the KD term of unlabelled pairs scaled down by the gold weight."""
    logits_NY, probs_NY, gold_N = labels()
    nothing_N = torch.full_like(gold_N, -100)
    mixed = label_kd_loss(logits_NY, probs_NY, nothing_N, gold_weight=0.9)
    pure = label_kd_loss(logits_NY, probs_NY, nothing_N)
    assert pure > 0
    torch.testing.assert_close(mixed, pure)
    torch.testing.assert_close(gradients(mixed, logits_NY), gradients(pure, logits_NY))


def test_label_kd_of_no_pairs_is_zero_with_gradient():
    """NaN from the mean of nothing, or a rank without pairs that has no graph to run backward through."""
    logits_NY, probs_NY, gold_N = labels(N=0)
    loss = label_kd_loss(logits_NY, probs_NY, gold_N, gold_weight=0.5)
    assert loss.item() == 0
    assert gradients(loss, logits_NY)[0].shape == (0, 5)


def test_label_kd_with_zero_probabilities():
    """NaN from 0 * log(0) when a teacher is so sure that a label's probability underflows."""
    logits_NY, _, _ = labels(N=1)
    probs_NY = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]], dtype=torch.float64)
    log_q = torch.log_softmax(logits_NY, -1)[0]
    expected = 0.25 * (math.log(0.25) - log_q[1]) + 0.75 * (math.log(0.75) - log_q[3])
    loss = label_kd_loss(logits_NY, probs_NY, torch.tensor([-100]))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, logits_NY), gradients(expected, logits_NY))
    assert label_kd_loss(logits_NY, probs_NY, torch.tensor([-100]), temperature=3.0).isfinite()


def test_label_kd_takes_bfloat16_in_float32():
    """Probabilities that sum to 1 only within bfloat16 refused, or the loss computed and returned in bfloat16."""
    logits_NY, probs_NY, gold_N = (x.bfloat16() if x.is_floating_point() else x for x in labels(N=64))
    loss = label_kd_loss(logits_NY, probs_NY, gold_N, temperature=2.0, gold_weight=0.3)
    exact_NY = probs_NY.double() / probs_NY.double().sum(-1, keepdim=True)
    exact = label_kd_loss(logits_NY.double(), exact_NY, gold_N, temperature=2.0, gold_weight=0.3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


# Tokens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_token_kd_equals_the_naive_version(kind, temperature):
    """Teacher and student swapped in a KL or in the mixture, T**2 missing, weights dropped, a gradient lost."""
    inputs = tokens()
    student_AD, student_head = inputs[:2]
    loss = token_kd_loss(*inputs, kind=kind, beta=0.3, temperature=temperature, chunk=4)
    expected = naive_token_loss(*inputs, kind, beta=0.3, temperature=temperature)
    torch.testing.assert_close(loss, expected)
    trained = (student_AD, student_head.weight)
    torch.testing.assert_close(gradients(loss, *trained), gradients(expected, *trained))


@pytest.mark.parametrize("chunk", [1, 3, 10, 12, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_token_kd_does_not_depend_on_the_chunk(kind, chunk):
    """A mean of chunk means, which weighs the positions of a short last chunk (or of one with zero weights) more."""
    inputs = tokens()
    trained = (inputs[0], inputs[1].weight)
    whole = token_kd_loss(*inputs, kind=kind, chunk=11)
    chunked = token_kd_loss(*inputs, kind=kind, chunk=chunk)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(gradients(chunked, *trained), gradients(whole, *trained))


@pytest.mark.parametrize("kind", KINDS)
def test_token_kd_vanishes_at_the_teacher(kind):
    """A divergence that is not one: the rescaled Jensen-Shannon must also be 0, with zero gradient, at q = p."""
    student_AD, head, _, _, weights_A = tokens()
    loss = token_kd_loss(student_AD, head, student_AD.detach(), head, weights_A, kind=kind, beta=0.2, temperature=2.0)
    zeros = [torch.zeros_like(x) for x in (student_AD, head.weight)]
    torch.testing.assert_close(loss, zeros[0].sum(), rtol=0, atol=1e-12)
    for gradient, zero in zip(gradients(loss, student_AD, head.weight), zeros, strict=True):
        torch.testing.assert_close(gradient, zero, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("end", "toward"), [("forward", lambda step: step), ("reverse", lambda step: 1 - step)])
def test_js_tends_to_both_kl_divergences(end, toward):
    """The jump of the plain divergence, which vanishes near its ends, and the two ends taken for each other."""
    inputs = tokens()
    ends = {kind: token_kd_loss(*inputs, kind=kind) for kind in ("forward", "reverse")}
    assert abs(ends["forward"] - ends["reverse"]) > 0.05 * ends[end], "the ends must be far apart for this test to tell"
    errors = [abs(token_kd_loss(*inputs, kind="js", beta=toward(step)) - ends[end]) for step in (1e-2, 1e-4, 1e-6)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-4 * ends[end]
    near = gradients(token_kd_loss(*inputs, kind="js", beta=toward(1e-7)), inputs[0])
    torch.testing.assert_close(near, gradients(ends[end], inputs[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", [1e-5, 1 - 1e-5])
def test_js_keeps_its_digits_in_float32(beta):
    """log m - log q rounded to 1e-7 and divided by beta: noise of 1e-2 in the loss near the ends."""
    inputs = tokens(A=64, student_vocabulary=500, teacher_vocabulary=500)
    exact = token_kd_loss(*inputs, kind="js", beta=beta)
    student_AD, student_head, teacher_AE, teacher_head, weights_A = inputs
    single = [student_AD.float(), student_head.float(), teacher_AE.float(), teacher_head.float(), weights_A.float()]
    torch.testing.assert_close(token_kd_loss(*single, kind="js", beta=beta).double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("sizes", [(13, 17), (17, 13)])
@pytest.mark.parametrize("kind", KINDS)
def test_token_kd_slices_to_the_common_vocabulary(kind, sizes):
    """Padding the shorter logits with zeros, or slicing probabilities after the softmax without normalising them."""
    inputs = tokens(student_vocabulary=sizes[0], teacher_vocabulary=sizes[1])
    student_AD, student_head, teacher_AE, teacher_head, weights_A = inputs
    sliced = (student_AD, lambda x: student_head(x)[:, :13], teacher_AE, lambda x: teacher_head(x)[:, :13], weights_A)
    expected = naive_token_loss(*sliced, kind)
    loss = token_kd_loss(*inputs, kind=kind, chunk=5)
    torch.testing.assert_close(loss, expected)
    trained = (student_AD, student_head.weight)
    torch.testing.assert_close(gradients(loss, *trained), gradients(expected, *trained))


@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_weight_zero_change_nothing(kind):
    """Padding counted in the normaliser, or leaking into the gradient."""
    student_AD, student_head, teacher_AE, teacher_head, weights_A = tokens()
    padding_student, _, padding_teacher, _, _ = tokens(A=7, seed=1)
    padded_AD = torch.cat([student_AD, padding_student.detach()])
    padded_AE = torch.cat([teacher_AE, padding_teacher])
    padded_A = torch.cat([weights_A, torch.zeros(7, dtype=torch.float64)])
    plain = token_kd_loss(student_AD, student_head, teacher_AE, teacher_head, weights_A, kind=kind, chunk=4)
    padded = token_kd_loss(padded_AD, student_head, padded_AE, teacher_head, padded_A, kind=kind, chunk=4)
    trained = (student_AD, student_head.weight)
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(gradients(padded, *trained), gradients(plain, *trained))


def test_global_denominator_adds_up_over_micro_batches():
    """A local normaliser: micro-batches of different length would weigh their tokens differently."""
    student_AD, student_head, teacher_AE, teacher_head, weights_A = tokens()
    whole = token_kd_loss(student_AD, student_head, teacher_AE, teacher_head, weights_A)
    total = weights_A.sum()

    def part(start, stop):
        student, teacher, weights = (x[start:stop] for x in (student_AD, teacher_AE, weights_A))
        return token_kd_loss(student, student_head, teacher, teacher_head, weights, denominator=total)

    torch.testing.assert_close(part(0, 3) + part(3, 11), whole)


def test_no_weights_and_boolean_weights():
    """The default weight not being 1, or a boolean mask that is summed or multiplied as anything but 0 and 1."""
    student_AD, student_head, teacher_AE, teacher_head, weights_A = tokens()
    keep_A = weights_A > 0
    heads = (student_head, teacher_head)
    masked = token_kd_loss(student_AD, heads[0], teacher_AE, heads[1], keep_A)
    kept = token_kd_loss(student_AD[keep_A], heads[0], teacher_AE[keep_A], heads[1])
    everything = naive_token_loss(student_AD, heads[0], teacher_AE, heads[1], torch.ones_like(weights_A), "forward")
    torch.testing.assert_close(masked, kept)
    torch.testing.assert_close(token_kd_loss(student_AD, heads[0], teacher_AE, heads[1]), everything)


@pytest.mark.parametrize("A", [0, 5])
def test_nothing_that_counts_is_zero_with_gradient(A):
    """NaN from 0 / 0, or a rank without answers that cannot run backward (and leaves the others waiting)."""
    student_AD, student_head, teacher_AE, teacher_head, weights_A = tokens(A=A)
    loss = token_kd_loss(student_AD, student_head, teacher_AE, teacher_head, 0 * weights_A, chunk=2)
    assert loss.item() == 0
    for gradient in gradients(loss, student_AD, student_head.weight):
        assert gradient.count_nonzero() == 0


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


def test_token_kd_takes_bfloat16_heads_in_float32():
    """Log-softmax over a vocabulary in bfloat16, which keeps two to three digits of each logit."""
    student_AD, student_head, teacher_AE, teacher_head, weights_A = tokens(
        A=32, student_vocabulary=2000, teacher_vocabulary=2000
    )
    student_AD, teacher_AE = student_AD.detach().bfloat16(), teacher_AE.bfloat16()
    student_head, teacher_head = student_head.bfloat16(), teacher_head.bfloat16()
    heads = [lambda x: student_head(x).double(), lambda x: teacher_head(x).double()]
    exact = naive_token_loss(student_AD, heads[0], teacher_AE, heads[1], weights_A, "forward")
    loss = token_kd_loss(student_AD, student_head, teacher_AE, teacher_head, weights_A.float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


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
    for x, copy in zip(tensors + stored, before + copies, strict=True):
        assert torch.equal(x, copy)


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

    def recording(head):
        def call(hidden):
            rows.append(len(hidden))
            return head(hidden)

        return call

    inputs = (inputs[0], recording(inputs[1]), inputs[2], recording(inputs[3]), inputs[4])
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x)
    with LargestTensor() as largest:
        with keep:
            loss = token_kd_loss(*inputs, kind=kind, chunk=chunk)
        loss.backward()
    assert max(rows) == chunk
    assert largest.numel <= max(chunk, 6) * (V + 20), "6 is the teacher's width: its head's weight is [V + 20, 6]"
    assert sum(saved) < A * V / 2, "the backward pass must recompute the chunks, not keep them"


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_logits_NY": torch.zeros(4)}, "student_logits_NY has shape"),
        ({"student_logits_NY": torch.zeros(4, 1)}, "at least two labels"),
        ({"student_logits_NY": torch.tensor([[0.0, -math.inf, 0.0]] * 4)}, "student_logits_NY holds NaN or infinity"),
        ({"teacher_probs_NY": torch.full((4, 2), 0.5)}, "teacher_probs_NY has shape"),
        ({"teacher_probs_NY": torch.tensor([[2.0, -1.0, 0.0]] * 4)}, "must be probabilities"),
        ({"teacher_probs_NY": torch.full((4, 3), 0.2)}, "must be probabilities"),
        ({"teacher_probs_NY": torch.full((4, 3), math.nan)}, "must be probabilities"),
        ({"gold_N": torch.zeros(3, dtype=torch.long)}, "gold_N is"),
        ({"gold_N": torch.zeros(4)}, "give int64"),
        ({"gold_N": torch.tensor([0, 1, 2, 3])}, "label indices 0..2"),
        ({"gold_N": torch.tensor([0, 1, 2, -1])}, "label indices 0..2"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"gold_weight": 1.5}, "gold_weight is 1.5"),
        ({"gold_weight": -0.1}, "gold_weight is -0.1"),
    ],
)
def test_label_kd_refuses(change, message):
    """A wrong input that broadcasts, indexes from the end or becomes NaN instead of being named."""
    arguments = {
        "student_logits_NY": torch.zeros(4, 3),
        "teacher_probs_NY": torch.full((4, 3), 1 / 3),
        "gold_N": torch.tensor([0, 1, 2, -100]),
    }
    label_kd_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        label_kd_loss(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden_AD": torch.zeros(1, 5, 4)}, "hidden states have shapes"),
        ({"teacher_hidden_AE": torch.zeros(1, 6)}, "with the same A"),
        ({"weights_A": torch.ones(5, 1)}, "weights_A has shape"),
        ({"weights_A": torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0])}, "finite and not negative"),
        ({"weights_A": torch.tensor([1.0, 1.0, 1.0, 1.0, math.nan])}, "finite and not negative"),
        ({"weights_A": torch.tensor([1.0, 1.0, 1.0, 1.0, math.inf])}, "finite and not negative"),
        ({"kind": "kl"}, "kind is 'kl'"),
        ({"kind": "js", "beta": 0.0}, "beta is 0.0"),
        ({"kind": "js", "beta": 1.0}, "beta is 1.0"),
        ({"kind": "js", "beta": math.nan}, "beta is nan"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"denominator": 0}, "denominator is 0"),
        ({"denominator": torch.tensor(math.nan)}, "denominator is nan"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_token_kd_refuses(change, message):
    """A wrong input that broadcasts, or ends of beta that silently mean another loss."""
    arguments = {
        "student_hidden_AD": torch.zeros(5, 4),
        "student_head": torch.nn.Linear(4, 7),
        "teacher_hidden_AE": torch.zeros(5, 6),
        "teacher_head": torch.nn.Linear(6, 7),
        "weights_A": torch.ones(5),
    }
    token_kd_loss(**arguments)
    with pytest.raises(ValueError, match=message):
        token_kd_loss(**{**arguments, **change})


# The script


@pytest.fixture
def task(tmp_path):
    """The notes task with 20 records a file, in its answer-first form: an untrained teacher is then never malformed."""
    runpy.run_path(str(NOTES / "make.py"))["make"](tmp_path / "task", "answer-first")
    for path in (tmp_path / "task").glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))
    (tmp_path / "task" / "distill.json").write_text('{"max_new_tokens": 64, "steps": 3, "batch": 4, "samples": 2}')
    model, tokenizer = grm.load_model(tmp_path / "task" / "model", seed=1)
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "task"


def arguments(task, *flags):
    return [f"--task={task}", f"--teacher={task.parent / 'teacher'}", f"--out={task.parent / 'out'}", *flags]


def run(monkeypatch, task, *flags):
    """distill.py in this process; returns its summary."""
    monkeypatch.setattr(sys, "argv", ["distill.py", *arguments(task, *flags)])
    distill.main()
    out = Path(next(f.split("=", 1)[1] for f in reversed(sys.argv) if f.startswith("--out=")))
    return json.loads((out / "summary.json").read_text())


def reason_first(task):
    """The same task with the reasoning first, and demonstrations as what a trained teacher would write."""
    for name in ("criteria.md", "sft.jsonl", "train.jsonl", "test_random.jsonl", "test_longtail.jsonl"):
        (task / name).write_text("".join((NOTES / name).read_text().splitlines(keepends=True)[:20]))
    loaded = grm.Task.load(task)
    return loaded, loaded.read(task / "sft.jsonl", ("response",))


def as_rollout(answers):
    """What rollout.sample would return for these answers, lists of ids for each prompt."""
    rows = [answer for group in answers for answer in group]
    ids_NT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids_NT[i, : len(row)] = torch.tensor(row)
    lengths_N = torch.tensor([len(row) for row in rows])
    return rollout.Rollout(ids_NT, lengths_N, torch.zeros(ids_NT.shape), torch.ones(len(rows)) > 0, len(answers[0]))


def scripted_teacher(task, monkeypatch, broken=()):
    """A reason-first teacher whose samples are the demonstration and another one's, (pair, sample) in `broken` cut short."""
    loaded, records = reason_first(task)
    teacher = distill.Teacher(
        distill.parse_config(arguments(task, "--pairs=sft.jsonl", "--max_tokens=700")), loaded, parallel.Ranks()
    )
    ids = [teacher.tokens.response(r["response"]) for r in records]
    answers = [[ids[i], ids[i - 1]] for i in range(len(ids))]
    for pair, sample in broken:
        answers[pair][sample] = answers[pair][sample][:-9]
    calls = []

    def sample(model, prompts, *, first_row, group_size, **_):
        calls.append(len(prompts))
        return as_rollout(answers[first_row // group_size : first_row // group_size + len(prompts)])

    monkeypatch.setattr(rollout, "sample", sample)
    return teacher, records, answers, calls


def test_teacher_distributions_equal_the_naive_ones(task, monkeypatch):
    """The mean over the well-formed reasonings of the softmax over labels, at the last box of each; malformed ones count
    nothing, and a pair of which all are malformed has no distribution."""
    teacher, records, answers, _ = scripted_teacher(task, monkeypatch, [(2, 0), (5, 0), (5, 1)])
    probs_NY, traces = teacher.labels(records)
    plain, _ = grm.load_model(task.parent / "teacher")
    for i, (record, group) in enumerate(zip(records, answers, strict=True)):
        expected = []
        for answer in group:
            trace = teacher.tokens.parse(answer)
            if trace.problem is None:
                ids = teacher.tokens.prompt(record["query"], record["document"]) + answer[: trace.steps[-1].label_at]
                expected.append(plain(torch.tensor([ids])).logits[0, -1, teacher.tokens.label_ids].softmax(-1))
        assert traces[i] == [a for a in group if teacher.tokens.parse(a).problem is None]
        torch.testing.assert_close(probs_NY[i], sum(expected) / len(expected) if expected else torch.zeros(5))


def test_cache_is_reused_resumed_and_refused_when_stale(task, monkeypatch):
    """Only what is missing is sampled; another setting, teacher or document makes it stale."""
    monkeypatch.setattr(distill, "SHARD", 8)
    teacher, records, _, calls = scripted_teacher(task, monkeypatch)
    first, _ = teacher.labels(records)
    assert calls == [8, 8, 4]
    folder = Path(teacher.config.cache)
    (folder / "labels-00001.safetensors").unlink()  # as if stopped there
    (folder / "labels-00001.safetensors.tmp").write_bytes(b"half a file")
    again, _ = teacher.labels(records)
    assert calls == [8, 8, 4, 8] and torch.equal(first, again)
    teacher.config.sampling_temperature = 0.5
    with pytest.raises(grm.TaskError, match=r"stale.*delete"):
        teacher.labels(records)
    teacher.config.sampling_temperature = 1.0
    with pytest.raises(grm.TaskError, match="stale"):
        teacher.labels([{**records[0], "document": "another"}, *records[1:]])


def test_teacher_that_does_not_follow_the_format_stops_the_run(task, monkeypatch):
    """An untrained model writes no boxes; its label distributions would be noise."""
    reason_first(task)
    with pytest.raises(SystemExit, match=r"100% of 80 answers are malformed"):
        run(monkeypatch, task)


def test_classifier_loads_in_the_usual_libraries(task, monkeypatch):
    """The student's folder as it is: sentence-transformers' CrossEncoder and transformers' pipeline give its probabilities."""
    summary = run(monkeypatch, task)
    out = task.parent / "out"
    assert {"accuracy", "macro_f1", "kappa", "ece"} <= set(summary["student"]["tests"]["test_random"])
    assert {"ms_per_pair_batch_1", "ms_per_pair_batch_64", "parameters"} <= set(summary["teacher"])
    records = grm.Task.load(task).read(task / "test_random.jsonl")[:5]
    config = distill.parse_config([*arguments(task), f"--out={out / 'none'}", f"--student={out / 'model'}"])
    expected = distill.make_student(config, grm.Task.load(task), parallel.Ranks()).predict(records)
    pairs = [(r["query"], r["document"]) for r in records]
    scores = CrossEncoder(str(out / "model"), device="cpu").predict(pairs, apply_softmax=True)
    texts = [{"text": query, "text_pair": document} for query, document in pairs]
    piped = pipeline("text-classification", model=str(out / "model"), top_k=None, device="cpu")(texts)
    for prediction, row, found in zip(expected, scores, piped, strict=True):
        assert list(prediction["probs"].values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert {x["label"]: x["score"] for x in found} == pytest.approx(prediction["probs"], abs=1e-5)


def test_causal_student_scores_with_grm(task, monkeypatch):
    """OUT/model, which holds its criteria, is all that `grm.py score` needs; it reads the same labels from one prefill."""
    run(monkeypatch, task, f"--student={task / 'model'}", "--loss=label")
    out, scored = task.parent / "out", task.parent / "scored.jsonl"
    flags = ["score", "--model", out / "model", "--pairs", task / "test_random.jsonl", "--out", scored]
    monkeypatch.setattr(sys, "argv", ["grm.py", *map(str, flags)])
    grm.main()
    config = distill.parse_config([*arguments(task), f"--out={out / 'none'}", f"--student={out / 'model'}"])
    loaded = grm.Task.load(task)
    expected = distill.make_student(config, loaded, parallel.Ranks()).predict(loaded.read(task / "test_random.jsonl"))
    for line, prediction in zip(scored.read_text().splitlines(), expected, strict=True):
        assert json.loads(line)["probs"] == pytest.approx(prediction["probs"], abs=1e-5)


@pytest.mark.parametrize("loss", ["forward", "reverse", "js"])
def test_token_losses_train_a_copy_towards_the_teacher(task, monkeypatch, loss):
    """A student with the teacher's own weights has loss 0; a fresh one comes closer, on the teacher's reasonings."""
    teacher, records, answers, _ = scripted_teacher(task, monkeypatch)
    settings = arguments(task, f"--loss={loss}", f"--student={task / 'model'}", "--steps=8", "--lr=3e-3", "--seed=3")
    config = distill.parse_config(settings)
    student = distill.make_student(config, teacher.tokens.task, parallel.Ranks())
    distill.check_vocabularies(teacher.tokenizer, student.tokenizer, loss)
    prompts = teacher.tokens.prompts(records)
    assert float(distill.token_loss(config, teacher, teacher, prompts, answers)) == pytest.approx(0, abs=1e-6)
    Path(config.out).mkdir()
    distill.train(config, parallel.Ranks(), teacher, student, records, torch.zeros(len(records), 5), answers)
    losses = [json.loads(line)["loss"] for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]


def test_on_policy_uses_the_students_own_samples(task, monkeypatch):
    """GKD: prompts are answered by the student, anew at each step."""
    teacher, records, answers, _ = scripted_teacher(task, monkeypatch)
    monkeypatch.undo()
    config = distill.parse_config(arguments(task, "--loss=reverse", "--on_policy", f"--student={task / 'model'}", "--steps=2"))
    student, seen = distill.make_student(config, teacher.tokens.task, parallel.Ranks()), []
    sample = rollout.sample
    monkeypatch.setattr(rollout, "sample", lambda model, *a, **k: (seen.append((model, k["step"])), sample(model, *a, **k))[1])
    Path(config.out).mkdir()
    distill.train(config, parallel.Ranks(), teacher, student, records, torch.zeros(len(records), 5), answers)
    assert [step for _, step in seen] == [0, 1] and all(model is student.model for model, _ in seen)


def test_same_seed_same_bytes_and_gold_alone(task, monkeypatch):
    """Runs repeat; --loss gold asks no teacher; --labelled hides the other labels."""
    for name in ("a", "b"):
        run(monkeypatch, task, f"--out={task.parent / name}")
    assert (task.parent / "a" / "metrics.jsonl").read_bytes() == (task.parent / "b" / "metrics.jsonl").read_bytes()
    summary = run(monkeypatch, task, f"--out={task.parent / 'c'}", "--loss=gold", "--labelled=6", "--teacher=nowhere")
    assert "teacher" not in summary
    config = distill.parse_config([*arguments(task), "--labelled=6"])
    records, _ = distill.read_pairs(config, grm.Task.load(task))
    assert [r["gold"] != distill.UNLABELLED for r in records] == [True] * 6 + [False] * 34


@pytest.mark.parametrize("kind", ["classifier with dropout", "causal"])
def test_a_stopped_run_goes_on_to_the_same_bytes(task, monkeypatch, kind):
    """Stopped after step 3 of 6 and started again: metrics and weights are those of a run that was left alone."""
    flags = [f"--student={task / 'model'}"] if kind == "causal" else []
    path = task / "student" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp_dropout": 0.3, "embedding_dropout": 0.3}))
    flags += ["--steps=6", "--save_every=2", f"--cache={task.parent / 'cache'}"]
    run(monkeypatch, task, *flags, f"--out={task.parent / 'calm'}")
    out, calls, stopping = task.parent / "stopped", [], parallel.Ranks.stopping
    monkeypatch.setattr(parallel.Ranks, "stopping", lambda ranks: calls.append(1) or len(calls) == 3)
    with pytest.raises(FileNotFoundError):  # no summary.json
        run(monkeypatch, task, *flags, f"--out={out}")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["000003"]
    monkeypatch.setattr(parallel.Ranks, "stopping", stopping)
    with pytest.raises(SystemExit, match="another run"):
        run(monkeypatch, task, *flags, f"--out={out}", "--lr=1")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4}\n')  # done after the checkpoint, lost with a crash: done again
    run(monkeypatch, task, *flags, f"--out={out}")
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (task.parent / "calm" / name).read_bytes()
    assert not (out / "checkpoints").exists()


def test_calibration_error():
    """Two bins: 0.9 right half of the time, 0.55 always: gaps 0.4 and 0.45."""
    records = [{"label": x} for x in "aaaa"]
    predictions = [{"label": label, "probs": {label: p}} for label, p in (("a", 0.9), ("b", 0.9), ("a", 0.55), ("a", 0.55))]
    assert distill.expected_calibration_error(records, predictions) == pytest.approx(0.5 * 0.4 + 0.5 * 0.45)


def no_label(task):
    """A trained classifier of other labels as the student."""
    config = BertConfig(vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertForSequenceClassification(config).save_pretrained(task / "student")


def other_words(task):
    """A student whose tokenizer numbers the words differently."""
    shutil.copytree(task / "model", task / "other")
    path = task / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["topic"], vocab["place"] = vocab["place"], vocab["topic"]
    path.write_text(json.dumps(tokenizer))


REFUSALS = {
    "label missing from the student's config": (no_label, [], r"no label -1, 0, 1, 2, 3 \(it has LABEL_0, LABEL_1\)"),
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
    "output exists": (lambda task: shutil.copytree(task, task.parent / "out"), [], "exists; choose another folder"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused(task, monkeypatch, name):
    """Each names what to change, before any work."""
    prepare, flags, message = REFUSALS[name]
    if prepare:
        prepare(task)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, task, *[flag.format(task=task) for flag in flags])
