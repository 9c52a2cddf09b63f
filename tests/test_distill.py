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

import pytest
import torch
import torch.nn.functional as F
from conftest import NOTES, ROOT, make_model
from naive import label_probs, script
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from test_grm import byte_level_bpe
from test_rollout import LargestTensor
from torch.autograd import grad
from transformers import AutoTokenizer, BertConfig, BertModel, RobertaConfig, pipeline

import distill
import grm
import parallel
import rollout
from distill import label_kd_loss, token_kd_loss

KINDS = ["forward", "reverse", "js"]


def labels(N=6, Y=5):
    """Student logits and teacher probabilities, both with gradient, and gold labels of which every second one is missing."""
    draw = torch.Generator().manual_seed(0)
    logits_NY, others_NY = (2 * torch.randn(N, Y, generator=draw, dtype=torch.float64) for _ in range(2))
    gold_N = torch.randint(Y, (N,), generator=draw)
    gold_N[1::2] = -100
    others_NY[:1, 1:3] = -math.inf  # of a teacher so sure that a label's probability underflows
    return logits_NY.requires_grad_(), torch.softmax(others_NY, -1).requires_grad_(), gold_N


def tokens(A=11, D=4, E=6, student_vocabulary=13, teacher_vocabulary=13):
    """Hidden states and linear heads of a student and a wider teacher, all with gradient."""
    draw, parts = torch.Generator().manual_seed(0), []
    for width, vocabulary in ((D, student_vocabulary), (E, teacher_vocabulary)):
        head = torch.nn.Linear(width, vocabulary, bias=False, dtype=torch.float64)
        torch.nn.init.normal_(head.weight, generator=draw)
        parts += [torch.randn(A, width, generator=draw, dtype=torch.float64).requires_grad_(), head]
    return parts


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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_label_kd_is_kl_at_temperature_plus_gold(temperature):
    """Direction of KL swapped, teacher not re-tempered, T**2 missing or on the gold term, unlabelled pairs scaled by the gold
    weight, 0 / 0 from a mean over no labelled pairs, NaN from 0 * log(0), or a mean over pairs and labels, as torch's."""
    logits_NY, probs_NY, given_N = labels()
    for gold_N in (given_N, torch.full_like(given_N, -100)):
        expected = 0.0
        for logits, probs, gold in zip(logits_NY, probs_NY, gold_N.tolist(), strict=True):
            p = probs ** (1 / temperature) / (probs ** (1 / temperature)).sum()
            kd = temperature**2 * kl(p, torch.softmax(logits / temperature, -1))
            expected += kd if gold == -100 else 0.7 * kd - 0.3 * torch.softmax(logits, -1)[gold].log()
        loss = label_kd_loss(logits_NY, probs_NY, gold_N, temperature, gold_weight=0.3)
        assert_same(loss, expected / len(gold_N), [logits_NY])
        loss.backward()
        assert probs_NY.grad is None


@pytest.mark.parametrize(("sizes", "temperature"), [((13, 17), 1.0), ((17, 13), 2.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_token_kd_equals_the_naive_version(kind, sizes, temperature):
    """Teacher and student swapped in a KL or in the mixture, T**2 missing, a gradient lost; the shorter logits padded, or
    probabilities sliced and not normalised; a mean of the means of chunks, which weighs short ones more; a gradient of the
    teacher; in-place work on the caller's tensors, after which a second loss would differ from the first."""
    inputs = tokens(student_vocabulary=sizes[0], teacher_vocabulary=sizes[1])
    student_AD, student_head, teacher_AE, teacher_head = inputs
    sliced = (student_AD, lambda x: student_head(x)[:, :13], teacher_AE, lambda x: teacher_head(x)[:, :13])
    expected = naive_token_loss(*sliced, kind, beta=0.3, temperature=temperature)
    for chunk in (1, 4, 11):
        loss = token_kd_loss(*inputs, kind=kind, beta=0.3, temperature=temperature, chunk=chunk)
        assert_same(loss, expected, [student_AD, student_head.weight])
    loss.backward()
    assert teacher_AE.grad is teacher_head.weight.grad is None


@pytest.mark.parametrize(("beta", "end", "other"), [(1e-5, "forward", "reverse"), (1 - 1e-5, "reverse", "forward")])
def test_js_tends_to_both_kl_divergences_in_float32(beta, end, other):
    """log m - log q rounded to 1e-7 and divided by beta: noise of 1e-2 in the loss near the ends; the jump of the plain
    divergence, which vanishes there, and the two ends taken for each other."""
    inputs = tokens(A=64, student_vocabulary=500, teacher_vocabulary=500)
    loss = token_kd_loss(*inputs, kind="js", beta=beta)
    torch.testing.assert_close(loss.double(), naive_token_loss(*inputs, "js", beta=beta), rtol=1e-4, atol=0)
    near, of_end, of_other = (token_kd_loss(*tokens(), kind=kind, beta=beta) for kind in ("js", end, other))
    assert abs(near - of_end) < 0.01 * abs(of_other - of_end)


def test_bfloat16_is_taken_to_float32():
    """Probabilities that sum to 1 only within bfloat16 refused, or losses computed in bfloat16, which keeps two to three
    digits of each logit."""
    logits_NY, probs_NY, gold_N = (x.bfloat16() if x.is_floating_point() else x for x in labels(N=64))
    loss = label_kd_loss(logits_NY, probs_NY, gold_N, temperature=2.0, gold_weight=0.3)
    exact = label_kd_loss(logits_NY.double(), probs_NY.double(), gold_N, temperature=2.0, gold_weight=0.3)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)
    inputs = tokens(A=32, student_vocabulary=2000, teacher_vocabulary=2000)
    student_AD, student_head, teacher_AE, teacher_head = (x.bfloat16() for x in inputs)
    exact = naive_token_loss(student_AD, lambda x: student_head(x).double(), teacher_AE, lambda x: teacher_head(x).double())
    loss = token_kd_loss(student_AD, student_head, teacher_AE, teacher_head)
    torch.testing.assert_close(loss, exact.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_all_logits_never_exist_at_once(kind):
    """The [A, vocabulary] tensor created whole, or its chunks all kept for the backward pass."""
    A, V, chunk = 50, 300, 4
    inputs, saved = tokens(A=A, E=chunk, student_vocabulary=V, teacher_vocabulary=V + 20), []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x)
    with LargestTensor() as largest:
        with keep:
            loss = token_kd_loss(*inputs, kind=kind, chunk=chunk)
        loss.backward()
    assert largest.numel == chunk * (V + 20)  # a chunk's logits, or the weight of a head
    assert sum(saved) < A * V / 2, "the backward pass must recompute the chunks, not keep them"


def test_losses_refuse():
    """A wrong input that broadcasts, becomes NaN, or silently means another loss (ends of beta)."""
    logits_NY, probs_NY, gold_N = labels()
    for logits, probs in ((logits_NY[0], probs_NY), (logits_NY, 1.1 * probs_NY), (logits_NY, math.nan * probs_NY)):
        with pytest.raises(ValueError, match="must be probabilities"):
            label_kd_loss(logits, probs, gold_N)
    for wrong in ({"kind": "kl"}, {"kind": "js", "beta": 0.0}):
        with pytest.raises(ValueError, match="0 < beta < 1"):
            token_kd_loss(*tokens(), **wrong)


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


def metrics(task, out="out"):
    return [json.loads(line) for line in (task.parent / out / "metrics.jsonl").read_text().splitlines()]


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


def merging(task, folder=None):
    """A teacher whose tokenizer has "{-" as one token, and knows every word; short criteria, since it spells."""
    front = (task / "criteria.md").read_text().split("---")[1]
    (task / "criteria.md").write_text(f"---{front}---\nClose with \\boxed{{grade}}.\n")
    tokenizer = byte_level_bpe(["x{-1}y{-2}z{-3}"] * 5)
    model = make_model("qwen3", tree=False, vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.1)
    for model_or_tokenizer in (model, tokenizer):
        model_or_tokenizer.save_pretrained(folder or task.parent / "teacher")


def scripted_teacher(task, monkeypatch, *flags, broken=()):
    """A teacher whose samples are the demonstration and another one's, (pair, sample) in `broken` cut short. Its sampler
    takes the scripted ids where it would draw: they stand in the place of the uniforms."""
    config, loaded = configure(task, "--pairs=sft.jsonl", *flags), grm.Task.load(task)
    teacher, pairs = distill.Teacher(config, loaded, parallel.Ranks()), loaded.read(task / "sft.jsonl", ("response",))
    encode = teacher.renderer.encode_response
    if teacher.renderer.merged:  # as it is spelled naturally
        encode = lambda text: [*teacher.renderer._encode(text), teacher.renderer.eos_id]
    ids = [encode(pair["response"]) for pair in pairs]
    answers, calls = [[ids[i], ids[i - 1]] for i in range(len(ids))], []
    for pair, sample in broken:
        answers[pair][sample] = answers[pair][sample][:-9]

    script(monkeypatch, lambda row: calls.append(row) or answers[row // 2][row % 2])
    return teacher, pairs, answers, calls


@pytest.mark.parametrize(("form", "loss", "tokenizer"), [
    ("reason-first", "label", None),
    ("answer-first", "js", None),
    ("answer-first", "label", None),
    ("reason-first", "label", merging),
    ("answer-first", "js", merging),
])  # fmt: skip
def test_teacher_distributions_equal_the_naive_ones(task, monkeypatch, form, loss, tokenizer):
    """The mean over the well-formed reasonings of the softmax over labels, at the answer's box in each; malformed ones count
    nothing, and a pair of which all are malformed is left out. Without reasoning before the label, nothing is sampled. Labels
    that merge with the brace, which were dropped."""
    if form == "reason-first":
        reason_first(task)
    if tokenizer:
        tokenizer(task)
    sampled = (form, loss) != ("answer-first", "label")
    broken = [(2, 0), (5, 0), (5, 1)] if sampled else []
    flags = [f"--loss={loss}", "--max_new_tokens=400"] if tokenizer else [f"--loss={loss}"]
    teacher, pairs, answers, calls = scripted_teacher(task, monkeypatch, *flags, broken=broken)
    assert [*teacher.renderer.merged] == ["-1"] * bool(tokenizer)
    taught = teach(teacher, pairs)
    assert taught == [pair for i, pair in enumerate(pairs) if i != 5 or not sampled] and bool(calls) == sampled
    plain, renderer = grm.load_model(task.parent / "teacher")[0], teacher.renderer
    for pair in taught:
        kept = [answer for answer in answers[pairs.index(pair)] if renderer.parse(answer).problem is None]
        assert not sampled or pair["reasonings"] == kept
        mean = torch.zeros(5)
        for answer in kept:
            at = renderer.parse(answer).steps[-1 if form == "reason-first" else 0].label_at
            mean += label_probs(plain, renderer, renderer.prompt(pair["query"], pair["document"]), answer, at) / len(kept)
        torch.testing.assert_close(torch.tensor(pair["probs"]), mean, rtol=1e-5, atol=1e-6)


def test_cache_is_reused_resumed_or_refused(task, monkeypatch):
    """Only what is missing is sampled, as the settings say, with other draws for each shard. Distributions of another teacher,
    task or sampling, or of other pairs, taken for those that were asked for."""
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
    for change in (
        lambda teacher, pairs: setattr(teacher.config, "sampling_temperature", 0.5),
        lambda teacher, pairs: setattr(teacher.renderer.task, "criteria", "Others."),
        lambda teacher, pairs: teacher.renderer.task.labels.reverse(),
        lambda teacher, pairs: pairs[-1].update(document="another"),
        lambda teacher, pairs: pairs[-1].update(criteria="criteria.md"),
        lambda teacher, pairs: teacher.renderer.task.others.update(x="Others."),
        lambda teacher, pairs: pairs.pop(),
        lambda teacher, pairs: os.utime(Path(teacher.config.teacher) / "model.safetensors", (0, 0)),
    ):
        changed = copy.deepcopy((teacher, pairs))
        change(*changed)
        with pytest.raises(grm.TaskError, match=f"{teacher.config.cache}.*delete"):
            teach(*changed)


def encoder(task, positions=40, length=512):
    """A student of RoBERTa's kind, whose positions begin behind its pad token's: there is one less than configured."""
    shutil.copytree(task / "student", task / "encoder")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vocabulary = json.loads((task / "student" / "config.json").read_text())["vocab_size"]
    sizes |= {"max_position_embeddings": positions, "vocab_size": vocabulary, "pad_token_id": 0, "architectures": None}
    RobertaConfig(**sizes).save_pretrained(task / "encoder")
    path = task / "encoder" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))
    return task / "encoder"


def decoder(task, separator="<|im_end|>"):
    """A decoder with a classifier's head to be, which has no pad token, as Llama's; behind each text a separator."""
    folder = shutil.copytree(task / "model", task / "decoder")
    changes = {"config.json": {"architectures": None, "pad_token_id": None}, "tokenizer_config.json": {"pad_token": None}}
    pair = [{"Sequence": {"id": id, "type_id": 0}} for id in "AB"]
    if separator:
        pair[1:1] = pair[2:2] = [{"SpecialToken": {"id": separator, "type_id": 0}}]
    names = {separator: {"id": separator, "ids": [2], "tokens": [separator]}} if separator else {}
    changes["tokenizer.json"] = {"post_processor": {"type": "TemplateProcessing", "single": pair[:1], "pair": pair}}
    changes["tokenizer.json"]["post_processor"]["special_tokens"] = names
    for name, change in changes.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    return folder


@pytest.mark.parametrize("loss", ["label", "gold"])
@pytest.mark.parametrize("kind", ["classifier", "decoder", "causal"])
def test_loss_of_a_label_student_is_that_of_its_logits(task, kind, loss):
    """Padding that is read, or that a decoder has no token for; another position than behind "\\boxed{", settings that are
    not passed on, or a mean over the pairs of a micro-batch instead of all ranks'."""
    folder = decoder(task) if kind == "decoder" else task.parent / "teacher" if kind == "causal" else task / "student"
    plain, _ = grm.load_model(folder, seed=0, labels=grm.Task.load(task).labels)
    student, _, pairs = make_student(task, f"--loss={loss}", "--temperature=2", "--gold_weight=0.3", f"--student={folder}")
    pairs, rows = pairs[: 3 if loss == "gold" else 5], []
    for pair in pairs:
        if kind != "causal":
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
    expected = 30 / 47 * naive_token_loss(student_AD, models[0].lm_head, teacher_AE, models[1].lm_head, "js", 0.3, 2.0)
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
    assert expected <= summary["teacher"]["test_random"].keys() & summary["student"]["test_longtail"].keys()
    records = grm.Task.load(task).read(task / "test_random.jsonl")[:5]
    records[0]["document"] += " [SEP] ramen [PAD] [CLS]"
    student, *_ = make_student(task, f"--student={folder}")
    pairs = [(r["query"], r["document"]) for r in records]
    assert student.tokenizer(*pairs[0])["input_ids"].count(student.tokenizer.sep_token_id) == 2  # not the one in the text
    scores = CrossEncoder(folder, device="cpu").predict(pairs, apply_softmax=True)
    texts = [{"text": query, "text_pair": document} for query, document in pairs]
    piped = pipeline("text-classification", model=folder, top_k=None, device="cpu")(texts)
    for prediction, row, found in zip(student.predict(records), scores, piped, strict=True):
        assert list(prediction["probs"].values()) == pytest.approx(row.tolist(), abs=1e-5)
        assert {x["label"]: x["score"] for x in found} == pytest.approx(prediction["probs"], abs=1e-5)


def test_inputs_are_cut_as_they_will_be_served(task, monkeypatch):
    """RoBERTa's 514 positions for 512 tokens, of which the last two end a run; a length that the served folder forgets."""
    (task / "test_random.jsonl").write_text(LONG)
    run(monkeypatch, task, f"--student={encoder(task, positions=34, length=33)}", "--steps=1", "--loss=gold")
    saved = AutoTokenizer.from_pretrained(task.parent / "out" / "model")
    assert saved.model_max_length == 33 and len(saved("winter " * 99, "kids", truncation=True).input_ids) == 33
    assert len({path.stat().st_mode for path in (task.parent / "out" / "model").iterdir()}) == 1  # weights for all to read
    student, *_ = make_student(task, f"--student={task / 'encoder'}", "--max_length=20")
    assert student.tokenizer.model_max_length == student.max_length == 20


def test_pairs_are_distinct(task):
    """A pair of two files that the teacher grades twice, or whose label, in the second alone, is lost; one by two criteria that
    is graded once."""
    pairs = [{"query": "winter", "document": text, **label} for text, label in (("kids", {}), ("ramen", {"label": "3"}))]
    for name, records in (("train", [*pairs, pairs[0]]), ("sft", [pairs[0] | {"label": "-1"}, pairs[1] | {"label": "0"}])):
        (task / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found, _ = distill.read_pairs(configure(task), grm.Task.load(task))
    assert [(pair["document"], pair["label"], pair["gold"]) for pair in found] == [("kids", "-1", 0), ("ramen", "3", 4)]
    (task / "train.jsonl").write_text("".join(json.dumps(pairs[1] | more) + "\n" for more in ({}, {"criteria": "criteria.md"})))
    assert len(distill.read_pairs(configure(task, "--pairs=train.jsonl"), grm.Task.load(task))[0]) == 2


@pytest.mark.parametrize(("student", "call", "behind_prompt"), [("student", 1, 64), ("model", 1, 5), ("model", 2, 64)])
def test_models_are_checked_before_work(task, monkeypatch, student, call, behind_prompt):
    """The teacher, and before it a student under tree attention, to the end of their longest answers: what is computed
    wrongly is refused before the teacher is asked."""
    checked = []

    def check(model, position):
        checked.append(position)
        if len(checked) == call:
            raise rollout.UnsupportedModelError("apart by 0.5")

    monkeypatch.setattr(rollout, "check_model", check)
    with pytest.raises(SystemExit, match=r"^apart by 0\.5$"):
        run(monkeypatch, task, f"--student={task / student}")
    loaded = grm.Task.load(task)
    renderer = grm.Renderer(loaded, AutoTokenizer.from_pretrained(task / "model"))
    longest = max(len(prompt) for path in task.glob("*t*n*.jsonl") for prompt in renderer.prompts(loaded.read(path, ())))
    assert checked[-1] == longest + behind_prompt and not (task.parent / "out").exists()


def test_causal_student_scores_with_grm(task, monkeypatch):
    """OUT/model is all that `grm.py score` needs; it reads the same labels from one prefill. A teacher that gold waits for."""
    assert "teacher" not in run(monkeypatch, task, f"--student={task / 'model'}", "--loss=gold", "--teacher=nowhere")
    folder, scored = task.parent / "out" / "model", task.parent / "scored.jsonl"
    flags = ["score", "--model", folder, "--pairs", task / "test_random.jsonl", "--out", scored]
    monkeypatch.setattr(sys, "argv", ["grm.py", *map(str, flags)])
    runpy.run_path(str(ROOT / "grm.py"), run_name="__main__")
    student, *_ = make_student(task, f"--student={folder}")
    expected = student.predict(grm.Task.load(task).read(task / "test_random.jsonl"))
    for line, prediction in zip(scored.read_text().splitlines(), expected, strict=True):
        assert json.loads(line)["probs"] == pytest.approx(prediction["probs"], abs=1e-5)


def test_on_policy_uses_the_students_own_samples(task, monkeypatch):
    """GKD: prompts are answered by the student, anew at each step, and the loss is that of these answers."""
    flags = ["--loss=reverse", f"--student={task / 'model'}", "--on_policy", "--steps=2", "--cache_tokens=10000"]
    fresh, _, pairs = make_student(task, *flags)
    seen, sample = [], rollout.sample
    monkeypatch.setattr(rollout, "sample", lambda *a, **k: seen.append((a[0], k["step"], sample(*a, **k))) or seen[-1][2])
    student, config, ranks = copy.deepcopy(fresh), configure(task, *flags), parallel.Ranks()
    steps = parallel.Run(config.out, {}, ranks)
    steps.resume(student, torch.optim.AdamW(student.parameters()))
    distill.train(student, student.model, pairs, config, ranks, steps)
    assert [step for _, step, _ in seen] == [0, 1] and all(model is student.model for model, *_ in seen)
    batch = zip(parallel.epoch_batch(pairs, 4, 0, 0), seen[0][2].answers, strict=True)
    answered = [pair | {"reasonings": answers} for pair, answers in batch]
    assert metrics(task)[0]["loss"] == pytest.approx(fresh(answered, fresh.weight(answered)).item(), rel=1e-5)


@pytest.mark.parametrize("student", ["student", "model"])
def test_bf16_on_a_cpu(task, monkeypatch, student):
    """Teacher and student compute in bfloat16: float32's losses but for rounding."""
    losses = []
    for name in "01":
        run(monkeypatch, task, f"--student={task / student}", f"--bf16={name}", f"--cache={task.parent / name}", out=name)
        losses.append([record["loss"] for record in metrics(task, name)])
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("kind", ["classifier with dropout", "causal"])
def test_a_stopped_run_goes_on_to_the_same_bytes(task, monkeypatch, kind):
    """Killed while the teacher is asked, stopped in step 3 of 6, killed in the comparison, and each time started again: metrics
    and weights are those of a run that was left alone. Dropout of the same units at each step."""
    flags = ["--steps=6", "--save_every=4", f"--cache={task.parent / 'cache'}"]
    flags += [f"--student={task / 'model'}"] if kind == "causal" else []
    path = task / "student" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp_dropout": 0.3, "embedding_dropout": 0.3}))
    calm, out, files = task.parent / "calm", task.parent / "out", ("metrics.jsonl", "model/model.safetensors")
    is_calm = lambda: all((out / name).read_bytes() == (calm / name).read_bytes() for name in files)
    seeds, batch = set(), parallel.epoch_batch
    monkeypatch.setattr(parallel, "epoch_batch", lambda *args: seeds.add(torch.initial_seed()) or batch(*args))
    run(monkeypatch, task, *flags, f"--cache={task.parent / 'other'}", out="calm")
    assert len(seeds) == 6

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
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4}\n')  # done after the checkpoint, lost with a crash: done again
    assert interrupted(grm, "metrics", 3, killed, ZeroDivisionError) == ["000006"] and is_calm()  # the teacher has two
    (out / "model" / "model.safetensors").write_bytes(b"half a file")
    run(monkeypatch, task, *flags)
    assert is_calm() and not (out / "checkpoints").exists()


def test_calibration_error():
    """Bins that overlap, end at their middles, are weighed alike however full, or lose what is certain."""
    predicted = [("a", 1.0), ("a", 0.97), ("b", 0.95), ("a", 0.48), ("b", 0.53)]  # of 15 bins the last has three, another two
    pairs = [({"label": "a"}, {"label": label, "probs": {label: p}}) for label, p in predicted]
    assert grm.calibration_error(pairs) == pytest.approx((abs(2.92 - 2) + abs(1.01 - 1)) / 5)


def lost_tensor(task):
    """A BERT of a few weights whose file lacks a layer's: not its head, which is new in any case."""
    config = BertConfig(vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertModel(config).save_pretrained(task / "student")
    tensors = load_file(task / "student" / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, task / "student" / "model.safetensors", metadata={"format": "pt"})


def other_words(task):
    """A student whose tokenizer numbers the words differently."""
    shutil.copytree(task / "model", task / "other")
    path = task / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"topic"', '"-"').replace('"place"', '"topic"').replace('"-"', '"place"'))


def other_ends(task):
    """A teacher whose answers end with another token, too."""
    (task.parent / "teacher" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')


def only_spelled(task):
    """Pairs of words that only a byte-level tokenizer, as that of task/speller, can write."""
    merging(task, task / "speller")
    (task / "train.jsonl").write_text(json.dumps({"query": "bluse", "document": "hose " * 400}))


LONG = json.dumps({"query": "winter " * 400, "document": "d", "label": "1"})
REFUSALS = {
    "lost tensor": (lost_tensor, "", "missing .*encoder.layer.0.output.dense.w"),
    "teacher that writes no boxes": (reason_first, "", "most answers are malformed"),
    "query too long": (lambda task: (task / "test_random.jsonl").write_text(LONG), "", r"test_random\.jsonl:1: criteria"),
    "tokenizers differ": (other_words, "--loss=js --student={task}/other", "different tokenizers; use --loss label"),
    "output exists": (lambda task: shutil.copytree(task, task.parent / "out"), "", "--out .*other files"),
    "token loss of a classifier": (None, "--loss=forward", "a classifier has none"),
    "on-policy without samples": (None, "--on_policy", "the label loss has no samples"),
    "no teacher": (None, "--teacher=runs/nothing/model", "^runs/nothing/model: there is no such model; .* use --model$"),
    "other ends": (other_ends, "--loss=js --student={task}/model", r"end with the ids \[1, 2\], .* \[2\]; use --loss label"),
    "student's words": (only_spelled, "--teacher={task}/speller", "task/student: .* does not know .*'bluse', 'hose'"),
    "teacher's words": (only_spelled, "--student={task}/speller", "/teacher: .* does not know .*'bluse', 'hose'"),
    "positions": (encoder, "--student={task}/encoder --max_length=40", "fails at --max_length 40: index 40 is out"),
    "no separator": (lambda task: decoder(task, ""), "--student={task}/decoder", "puts nothing between query and document"),
    "cache too small": (None, "--cache_tokens=10 --loss=js --student={task}/model", "cache_tokens is 10, and a group"),
    "no labels for gold": (None, "--loss=gold --labelled=0", "no pair has a label"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused(task, monkeypatch, name):
    """Each names what to change, before any work: the teacher was not asked, or what it said does not pass later. OUT with the
    settings of a mistyped command would refuse the mended one as another run's."""
    prepare, flags, message = REFUSALS[name]
    if prepare:
        prepare(task)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, task, *flags.format(task=task).split())
    assert not list(task.parent.rglob("0*.json"))
    assert (task.parent / "out" / "config.json").exists() == (name == "teacher that writes no boxes")
