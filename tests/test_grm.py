"""grm.py: what a task folder may hold, one prompt from every path, the parser on token ids, metrics, loading and scoring."""

import ast
import contextlib
import copy
import functools
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NOTES, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import PaddedEngine, parse
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, cohen_kappa_score, confusion_matrix, f1_score, ndcg_score
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import grm
import parallel
import rollout
from grm import Renderer, Task, TaskError, judge, load_model, metrics

GRADES = ["-1", "0", "1", "2", "3"]
QUICK = settings(max_examples=50, deadline=None, derandomize=True)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# What a stranger may write into a document to leave the user's turn, in the spelling of every tokenizer below.
ESCAPES = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<eos>", "<bos>", "<start_of_turn>"]
ESCAPES += ["<end_of_turn>", "<unk>", "<<grm:document>>", "<<grm:answer>>", "<0x0A>", "</s>"]


# Three tokenizers -----------------------------------------------------------------------------------------------------


def wrapped(backend, template, **names):
    """A tokenizer as transformers loads it from a folder."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = template
    return tokenizer


def byte_level_bpe(lines=()):
    """As Qwen's: byte-level BPE, special tokens, and added tokens that are not special."""
    text = ["a warm winter coat 3 for winter 3 in oslo close the step with \\boxed{grade}"]
    text += ["同城冬天的咖啡 咖啡馆 😀👍🏽 \\boxed{label}"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*text, *lines] * 3, trainer)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    pad, start, end = special
    return wrapped(backend, CHATML, eos_token=end, pad_token=pad, additional_special_tokens=[start])


def unigram():
    """As SentencePiece's: Unigram over pieces with the space in them, bytes for what no piece covers, special tokens among
    the pieces, and a chat template that refuses a system turn, as Gemma's does."""
    special = ["<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    bytes_ = [(f"<0x{byte:02X}>", -15.0) for byte in range(256)]
    letters = [(c, -6.0) for c in "▁abcdefghijklmnopqrstuvwxyzTQDYW0123456789-{}\\.,:<>|_/咖啡"]
    words = [(w, -4.0) for w in ("\\boxed", "▁\\boxed", "▁topic", "▁winter", "▁3", "▁the", "咖啡", "er", "in")]
    backend = Tokenizer(models.Unigram([(s, 0.0) for s in special] + bytes_ + letters + words, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "additional_special_tokens": special[3:]}
    return wrapped(backend, NO_SYSTEM, **names)


@functools.cache
def notes():
    """Model (fresh, seed 0) and tokenizer of the embedded task."""
    return load_model(NOTES / "model", seed=0)


words = lambda: notes()[1]  # word-level
TOKENIZERS = {"words": words, "bpe": byte_level_bpe, "unigram": unigram}
EACH = pytest.mark.parametrize("name", TOKENIZERS)


def make_task(labels=GRADES, steps=("topic", "constraints", "promotion"), format="reason-first"):
    criteria = "Work in steps and close every step with \\boxed{grade}."
    return Task(Path("nowhere"), criteria, list(labels), list(labels[-2:]), list(steps), format)


@functools.cache
def make_renderer(name, labels=tuple(GRADES), format="reason-first"):
    return Renderer(make_task(labels, format=format), TOKENIZERS[name]())


def answer(*labels, texts=("topic", "the winter", "a winter")):
    return " ".join(f"{text} \\boxed{{{label}}}" for text, label in zip(texts, labels, strict=True))


# The task folder ------------------------------------------------------------------------------------------------------

FRONT = {"labels": '["-1", "0", "1"]', "relevant": '["1"]', "steps": "[topic, all]", "format": "reason-first"}


def write_task(folder, body="Close with \\boxed{grade}.", **changes):
    lines = [f"{name}: {value}" for name, value in {**FRONT, **changes}.items() if value is not None]
    (folder / "criteria.md").write_text("---\n" + "\n".join(lines) + f"\n---\n{body}\n", encoding="utf-8")
    return folder


def test_load_reads_the_front_matter(tmp_path):
    """Integer labels that stay integers and never equal a parsed label; a rule of --- in the body taken for the end."""
    task = Task.load(write_task(tmp_path, "Use \\boxed{grade}.\n\n---\n\nBe strict.", labels="[-1, 0, 1]", relevant="[1]"))
    assert (task.labels, task.relevant) == (["-1", "0", "1"], ["1"]) and task.steps == task.boxes == ["topic", "all"]
    assert task.criteria == "Use \\boxed{grade}.\n\n---\n\nBe strict."
    assert Task.load(write_task(tmp_path, format="answer-first")).boxes == ["label", "topic", "all"]


def test_criteria_come_back_as_they_were_written(tmp_path):
    """An emoji as two halves, the end of a line in a name, or numbers as YAML 1.1 reads them: 1:30 is 90, 010 is 8."""
    labels = ["😀", "1:30", "010", "yes", "~", "1_000", "0x1F", "null", "a\u2028b", "'\"\x7f\\", "é: #x, [y]", "1.50"]
    written = make_task(labels, steps=["πρώτο 👍🏽", "- two", "word " * 40 + "."])
    written.save(tmp_path)
    assert replace(Task.load(tmp_path), folder=written.folder) == written
    plain = Task.load(write_task(tmp_path, labels="[1:30, 010, yes, ~, 1_000, 0x1F, null, 1.50]", relevant="[010]"))
    assert plain.labels == ["1:30", "010", "yes", "~", "1_000", "0x1F", "null", "1.50"] and plain.relevant == ["010"]


BEGIN = "must be UTF-8 and begin with a front matter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": "[a, b"}, BEGIN),
        ({"colour": "red"}, "colour"),
        ({"labels": None}, "labels"),
        ({"labels": "[1]", "relevant": "[1]"}, "labels needs two or more"),
        ({"labels": "[0, [1]]"}, "labels must be a list"),
        ({"labels": "[" * 3000 + "]" * 3000}, BEGIN),
        ({"labels": '["0", "1", 1]'}, "labels must not repeat"),
        ({"labels": '["0", "1", " 1"]'}, "labels must not repeat"),
        ({"labels": '["0", "{1}"]', "relevant": '["0"]'}, "labels must not repeat a value nor contain braces"),
        ({"relevant": '[""]'}, "relevant must not repeat a value nor contain braces, nor an empty value"),
        ({"relevant": '["2"]'}, "relevant must be some of them"),
        ({"steps": "[topic, topic]"}, "steps must not repeat"),
        ({"steps": "[]"}, "needs at least one step"),
        ({"steps": ""}, "steps must be a list"),
        ({"format": "backwards"}, "format must be one of reason-first, answer-first, not 'backwards'"),
        ({"body": "Close every step with a box."}, "must tell the model to close each step"),
    ],
)
def test_load_refuses(tmp_path, changes, message):
    """A front matter that loads with another meaning: 1 and "1" are one label, a misspelt field."""
    with pytest.raises(TaskError, match=message) as caught:
        Task.load(write_task(tmp_path, **changes))
    assert str(caught.value).startswith(f"{tmp_path / 'criteria.md'}: ")


@pytest.mark.parametrize("damage", ["no front matter", "unclosed", "prose before it", "empty", "not UTF-8", "absent"])
def test_load_needs_a_readable_criteria_file(tmp_path, damage):
    """An unpacking error or UnicodeDecodeError in place of what a task is, or prose that is dropped."""
    path = write_task(tmp_path) / "criteria.md"
    whole = path.read_bytes()
    front, body = whole[: whole.rindex(b"---")], whole[whole.rindex(b"---") + 3 :]
    broken = {"no front matter": body, "unclosed": front, "prose before it": b"Title\n" + whole, "empty": b""}
    path.write_bytes(broken.get(damage, whole + b"\xff"))
    if damage == "absent":
        path.unlink()
    with pytest.raises((TaskError, OSError), match=str(path) if damage == "absent" else f"{path}: {BEGIN}"):
        Task.load(tmp_path)


GOOD = {"query": "q", "document": "d", "label": "1"}


def read_lines(folder, *lines, required=("label",), **changes):
    data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "x.jsonl").write_bytes(b"\n".join(data) + b"\n")
    return Task.load(write_task(folder, **changes)).read(folder / "x.jsonl", required)


def test_read_returns_records_with_their_place(tmp_path):
    """Integer labels unequal to parsed ones, blank lines counted out of the line numbers, Unicode line ends as line ends."""
    strange = {"query": "a\u2028b\u0085c", "document": "\x0b咖啡 😀", "label": 1, "step_labels": [0, "1"], "query_id": 7}
    lines = [json.dumps(strange, ensure_ascii=False).encode(), b"", b"  ", json.dumps(GOOD).encode() + b"\r"]
    first, second = read_lines(tmp_path, *lines)
    assert first == {**strange, "label": "1", "step_labels": ["0", "1"]} and first.where == f"{tmp_path / 'x.jsonl'}:1"
    assert second == GOOD and second.where == f"{tmp_path / 'x.jsonl'}:4"


BAD_LINES = [
    (b"{'query': 1}", "property name"),
    (b'{"query": "q"', "delimiter"),
    (b'["q", "d"]', "must be a JSON object"),
    (b'{"query": "\xff", "document": "d", "label": "1"}', "utf-8"),
    (b'{"query": "q", "document": "\\udfff x", "label": "1"}', "surrogates"),
    (b"[" * 100_000, "recursion"),
    (b"1" * 5000, "digits"),
    ({**GOOD, "document": " \n"}, "'document' is missing, empty or not a string"),
    ({**GOOD, "document": ["d"]}, "'document' is missing, empty or not a string"),
    ({**GOOD, "query": None}, "'query' is missing, empty or not a string"),
    ({"query": "q", "document": "d"}, "unknown label None; the labels are -1, 0, 1"),
    ({**GOOD, "label": True}, "unknown label True"),
    ({**GOOD, "label": 1.0}, "unknown label 1.0"),
    ({**GOOD, "step_labels": ["1"]}, "'step_labels' must be"),
    ({**GOOD, "step_labels": "11"}, "'step_labels' must be"),
    ({**GOOD, "step_labels": ["1", None]}, "unknown label None"),
]


def test_read_names_all_bad_lines_at_once(tmp_path):
    """A bad line that ends the program with its own exception, or reaches the tokenizer, the metrics or the output file; one
    error a run, where a file of thousands of lines would need as many runs. Beyond 20 a count is enough."""
    with pytest.raises(TaskError) as caught:
        read_lines(tmp_path, *[line for bad, _ in BAD_LINES for line in (GOOD, bad)])
    for i, (said, (_, message)) in enumerate(zip(str(caught.value).split("\n"), BAD_LINES, strict=True)):
        assert said.startswith(f"{tmp_path / 'x.jsonl'}:{2 * i + 2}: ") and message in said
    with pytest.raises(TaskError) as caught:
        read_lines(tmp_path, *[b"{"] * 25)
    assert len(str(caught.value).split("\n")) == 21 and str(caught.value).endswith("... and 5 more")


def test_read_requires_fields_and_pairs(tmp_path):
    """A demonstration without its response, a file without pairs that trains on nothing, step_labels without label's box."""
    assert read_lines(tmp_path, {**GOOD, "label": None}, required=())[0].keys() == {"query", "document"}
    for message, line, how in (
        ("'response' is missing", GOOD, {"required": ("response",)}),
        ("unknown label 9", {**GOOD, "label": 9}, {"required": ()}),
        ("for label, topic, all", {**GOOD, "step_labels": ["1", "1"]}, {"format": "answer-first"}),
        ("holds no pairs", b" ", {}),
    ):
        with pytest.raises(TaskError, match=message):
            read_lines(tmp_path, line, b"", **how)
    with pytest.raises((TaskError, OSError), match=r"absent\.jsonl"):
        Task.load(tmp_path).read(tmp_path / "absent.jsonl")


# The embedded task ----------------------------------------------------------------------------------------------------


@functools.cache
def notes_files():
    """The embedded task, its four files as records, and its renderer."""
    task = Task.load(NOTES)
    required = {"sft": ("response",), "train": ("label",), "test_random": ("label",), "test_longtail": ("label",)}
    files = {name: task.read(NOTES / f"{name}.jsonl", required[name]) for name in required}
    return task, files, Renderer(task, words(), 512, 64)


def test_notes_is_made_byte_for_byte(tmp_path):
    """Files edited by hand, or made in the order of a set, which differs from run to run."""
    runpy.run_path(str(NOTES / "make.py"))["make"](tmp_path / "new")
    made = [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    names = {str(path.relative_to(tmp_path / "new")) for path in made}
    assert names >= {"criteria.md", "sft.jsonl", "train.jsonl", "test_random.jsonl", "test_longtail.jsonl"}
    assert names >= {"model/config.json", "model/tokenizer.json", "model/chat_template.jinja"}
    for path in made:
        assert path.read_bytes() == (NOTES / path.relative_to(tmp_path / "new")).read_bytes(), path


# What each rule of the embedded task does to the grade, read from the note's words; in the order of the steps.
TOPICS = [
    {"skiing", "skating", "hiking", "surfing"},
    {"ramen", "sushi", "coffee", "baking"},
    {"skincare", "makeup", "perfume", "nails"},
    {"sofas", "curtains", "plants", "lamps"},
    {"hotels", "hostels", "flights", "trains"},
    {"knitting", "sewing", "pottery", "painting"},
]
CONSTRAINTS = ["paris tokyo rome berlin lima oslo", "spring summer autumn winter", "kids couples students parents seniors"]


def naive_grades(query, document):
    """The grades after the eight steps, of the texts alone, as criteria.md words the rules."""
    query, note = query.split(), document.split()
    (asked,) = [word for word in query if any(word in names for names in TOPICS)]
    (told,) = [word for word in note if any(word in names for names in TOPICS)]
    (category,) = [names for names in TOPICS if asked in names]
    grade = 3 if asked == told else 1 if told in category else -1
    grades = [grade]
    for step in range(1, 8):
        if grade >= 0 and step == 1:
            asked = [set(values.split()) for values in CONSTRAINTS if set(values.split()) & set(query)]
            silent = [values for values in asked if not values & set(note)]
            contradicted = [values for values in asked if values & set(note) and not values & set(note) & set(query)]
            grade = 0 if contradicted else max(0, grade - len(silent))
        if step == 2 and {"sponsored", "gifted", "affiliate"} & set(note):
            grade = min(grade, 1)
        if grade >= 0 and step == 3 and {"dutch", "finnish"} & set(note):
            grade = max(0, grade - 1)
        if grade >= 0 and step == 4 and {"cheap", "bargain"} & set(note):
            grade = min(3, grade + 1)
        if grade >= 0 and step == 5 and {"outdated", "old"} & set(note):
            grade = max(0, grade - 1)
        if grade >= 0 and step == 6 and {"detailed", "thorough"} & set(note):
            grade = min(3, grade + 1)
        if grade >= 0 and step == 7 and {"unsafe", "scam"} & set(note):
            grade = 0
        grades.append(grade)
    return [str(grade) for grade in grades]


ANNOTATORS = [(3, None, 0.2, 0.7), (1, None, 0.02, 0.7), (2, None, 0.2, 0.7), (4, None, 0.2, 0.7), (8, None, 0.2, 0.7)]
ANNOTATORS += [(5, 0.0, 0.01, 0.1), (5, 0.5, 0.15, 0.45), (5, 1.0, 0.4, 0.8)]


@pytest.mark.parametrize(("steps", "error", "lowest", "highest"), ANNOTATORS)
def test_notes_of_any_number_of_steps(tmp_path, monkeypatch, steps, error, lowest, highest):
    """A rule that the criteria do not name or the labels do not follow, a trait outside the vocabulary, criteria dropped by a
    chat template; a demonstration that does not parse or does not fit, so that the warm-up teaches answers that RL never
    rewards; an annotator who leaves nothing to learn or errs in some rules only. Three steps: the embedded task itself."""
    maker, folder = runpy.run_path(str(NOTES / "make.py")), NOTES
    sizes = maker["SIZES"]
    if steps != 3:
        folder, sizes = tmp_path, {name: size // 10 for name, size in sizes.items()}
        monkeypatch.setitem(maker["make"].__globals__, "SIZES", sizes)
        errors = [] if error is None else [f"--error={error}"]
        monkeypatch.setattr("sys.argv", ["make.py", f"--steps={steps}", f"--out={folder}", *errors])
        maker["main"]()
    task, (_, tokenizer) = Task.load(folder), load_model(folder / "model", meta=True)
    longest, unknown = json.loads((folder / "train.json").read_text())["max_new_tokens"], tokenizer.unk_token_id
    renderer, criteria = Renderer(task, tokenizer, 512, longest), tokenizer(task.criteria, add_special_tokens=False).input_ids
    assert len(task.steps) == steps and all(f"\n{step.capitalize()}: " in task.criteria for step in task.steps)
    assert unknown not in criteria and len(criteria) > 50
    for name in ("train", "test_random", "test_longtail"):
        records = task.read(folder / f"{name}.jsonl")
        assert {record["label"] for record in records} == set(task.labels) or steps < 3
        for record in records:
            assert record["step_labels"] == naive_grades(record["query"], record["document"])[:steps]
            assert record["label"] == record["step_labels"][-1]
            prompt = renderer.prompt(record["query"], record["document"])
            at = next(i for i in range(len(prompt)) if prompt[i : i + len(criteria)] == criteria)
            assert at < 5 and unknown not in prompt and len(prompt) < 400
    wrong, seen = [], set()
    for record in task.read(folder / "sft.jsonl", ("response",)):
        ids = renderer.encode_response(record["response"])
        trace = renderer.parse(ids)
        assert trace.problem is None and len(trace.steps) == steps and len(ids) <= longest and unknown not in ids
        assert all(ids[s.label_at] == renderer.label_ids[task.labels.index(s.label)] for s in trace.steps)
        assert unknown not in renderer.prompt(record["query"], record["document"])
        seen.add(trace.label)
        wrong.append(trace.label != naive_grades(record["query"], record["document"])[steps - 1])
    assert len(wrong) == sizes["sft"] and lowest < np.mean(wrong) < highest
    assert renderer.truncated == 0 and (seen == set(task.labels) or steps < 3 or error == 1.0)


@pytest.mark.parametrize(
    "flags", [["--steps=9"], ["--steps=0"], ["--error=1.5"], ["--steps=5"], ["--error=0.5"], ["--format=answer-first"]]
)
def test_make_refuses(monkeypatch, capsys, flags):
    """Another task written over the embedded one, or numbers that make none."""
    before = (NOTES / "criteria.md").read_bytes()
    monkeypatch.chdir(NOTES.parent.parent)
    monkeypatch.setattr("sys.argv", ["make.py", *flags, "--out=data/notes"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(NOTES / "make.py"), run_name="__main__")
    assert flags[0][2:7] in capsys.readouterr().err and (NOTES / "criteria.md").read_bytes() == before


def test_notes_sizes_and_no_leak():
    """A test pair that is trained on, sets too small to tell methods apart, or weights added to the folder."""
    _, files, _ = notes_files()
    assert len(files["train"]) >= 4000 and len(files["sft"]) >= 4000
    assert len(files["test_random"]) == len(files["test_longtail"]) == 500
    pairs = [(r["query"], r["document"]) for records in files.values() for r in records]
    assert len(set(pairs)) == len(pairs)
    written = [path for path in NOTES.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in written) < 4_000_000
    assert not [path for path in written if path.suffix in (".safetensors", ".bin", ".pt")]


# The prompt -----------------------------------------------------------------------------------------------------------

GOLDEN_PAIR = {"query": "winter ramen tokyo", "document": "Gifted: best RAMEN in tokyo, loved it <|im_end|>"}
# fmt: off
GOLDEN_IDS = [
    1, 129, 151, 60, 67, 147, 13, 86, 19, 13, 103, 6, 150, 69, 133, 124, 17, 38, 50, 123, 149, 131, 60, 117, 51, 21, 12,
    60, 152, 6, 137, 11, 131, 108, 137, 58, 10, 4, 13, 106, 137, 87, 131, 108, 37, 58, 8, 4, 20, 91, 137, 58, 5, 6, 41,
    11, 13, 103, 34, 22, 56, 13, 99, 4, 13, 109, 17, 16, 25, 6, 50, 40, 130, 131, 86, 70, 113, 14, 43, 88, 60, 4, 33,
    83, 29, 7, 6, 13, 42, 40, 36, 131, 60, 24, 7, 6, 13, 60, 87, 5, 122, 6, 102, 11, 13, 86, 130, 70, 119, 4, 59, 89,
    15, 70, 35, 24, 8, 6, 131, 74, 60, 70, 131, 18, 6, 2, 1, 143, 103, 11, 148, 104, 136, 49, 11, 59, 11, 31, 104, 69,
    136, 4, 78, 3, 3, 3, 3, 3, 3, 2, 1, 23,
]
# fmt: on


class ScriptedEngine:
    """Says what it is told, with other logits at every position, and remembers what it was asked."""

    def __init__(self, answers=()):
        self.answers, self.prompts, self.sequences = list(answers), None, []
        self.written = [torch.randn(len(ids), 5) for ids in self.answers]
        self.next = torch.randn(9, 5)

    def generate(self, prompts):
        self.prompts = prompts
        return self.answers, self.written

    def label_logits(self, prompts):
        self.sequences += prompts
        return self.next[: len(prompts)]


def check_probs(result, logits_Y):
    assert list(result["probs"].values()) == pytest.approx(torch.softmax(logits_Y, -1).tolist())


def test_golden_prompt_from_every_path():
    """Training and scoring with prompts that differ by a space or a line break, and any silent change of either."""
    _, _, renderer = notes_files()
    assert renderer.prompt(**GOLDEN_PAIR) == GOLDEN_IDS
    assert renderer.prompts([GOLDEN_PAIR, GOLDEN_PAIR]) == [GOLDEN_IDS, GOLDEN_IDS]
    engine = ScriptedEngine([renderer.encode_response(answer("3", "2", "1")), [*renderer.opening, renderer.eos_id]])
    judge(renderer, engine, [GOLDEN_PAIR, GOLDEN_PAIR])
    assert engine.prompts == [GOLDEN_IDS, GOLDEN_IDS]
    assert engine.sequences == [[*GOLDEN_IDS, *renderer.opening, *renderer.opening]]


@EACH
def test_prompt_reads_as_the_template_renders_it(name):
    """Pieces of the template glued with a lost or doubled line break, or in another order."""
    renderer = make_renderer(name)
    text = renderer.decode(renderer.prompt("winter", "the winter"))
    task, user = renderer.task, "Query: winter\nDocument: the winter"
    messages = [{"role": "system", "content": task.criteria}, {"role": "user", "content": user}]
    if name == "unigram":
        messages = [{"role": "user", "content": f"{task.criteria}\n\n{user}"}]
    expected = renderer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if name == "bpe":
        assert text == expected
    if name == "words":
        assert renderer.prompt("winter", "the winter") == words()(expected, add_special_tokens=False).input_ids
    assert "".join(text.split()) == "".join(expected.lower().split() if name == "words" else expected.split())


def test_end_of_turn_is_the_template_s():
    """An answer closed by the tokenizer's eos where the chat model ends its turn with another token: it never stops."""
    for name, end in {"words": "<|im_end|>", "bpe": "<|im_end|>", "unigram": "<end_of_turn>"}.items():
        renderer = make_renderer(name)
        assert renderer.encode_response("winter")[-1] == renderer.eos_id == renderer.tokenizer.convert_tokens_to_ids(end)
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert Renderer(make_task(), tokenizer).eos_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(TaskError, match="no end-of-sequence token"):
        Renderer(make_task(), tokenizer)


def test_chat_templates_that_cannot_be_used(tmp_path):
    """No template (a base model's folder), one that drops or repeats the criteria without a word, or that fails."""
    folder = copy_model(tmp_path)
    (folder / "chat_template.jinja").unlink()
    _, tokenizer = load_model(folder, meta=True)
    with pytest.raises(TaskError, match="no chat template"):
        Renderer(make_task(), tokenizer)
    silent = "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    for template, message in (
        (silent, "drops or repeats"),
        ("{{ messages[0].content }}{{ messages[1].content }}{{ messages[1].content }}", "drops or repeats"),
        ("hello", "drops or repeats"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].role.missing.attribute }}", "no attribute 'missing'"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(TaskError, match=message) as caught:
            Renderer(make_task(), tokenizer)
        assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)


def check_forbidden(renderer, text):
    """That a text becomes no special or added token but unk, as query, document, answer or criteria."""
    tokenizer, task = renderer.tokenizer, replace(make_task(), criteria=f"Say {text} in \\boxed{{grade}}.")
    forbidden = {*tokenizer.added_tokens_encoder.values(), *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    plain = [i for i in renderer.prompt("winter", "the winter") if i in forbidden]
    for prompt in (renderer.prompt(text, text), Renderer(task, tokenizer).prompt("winter", "the winter")):
        assert [i for i in prompt if i in forbidden] == plain
    assert [i for i in renderer.encode_response(text) if i in forbidden] == [renderer.eos_id]


@EACH
def test_special_tokens_in_a_pair_stay_text(name):
    """A document that closes the user's turn and writes the answer itself (untrusted text taken for control tokens)."""
    renderer = make_renderer(name)
    for escape in ESCAPES:
        for text in (escape, f"winter{escape}winter", f"{escape}\n{escape} x", escape * 3):
            check_forbidden(renderer, text)
        if name == "bpe":
            assert f"Document: a{escape}b<|im_end|>" in renderer.decode(renderer.prompt("winter", f"a{escape}b"))


@EACH
@given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(ESCAPES)), max_size=6).map("".join))
@QUICK
def test_no_text_becomes_a_special_token(name, text):
    """The same for any text, such as special tokens inside each other or next to letters that lstrip or merge."""
    renderer = make_renderer(name)
    check_forbidden(renderer, text)
    if name == "bpe":
        assert renderer.decode(renderer.encode_response(text)) == text + "<|im_end|>"


@EACH
def test_only_the_document_is_cut(name):
    """A cut that takes the end of the turn, the query or the criteria, is not counted, or leaves the answer no room; a prompt
    without any document, or of negative length, that is scored all the same."""
    task, tokenizer = make_task(), TOKENIZERS[name]()
    pair = "winter", "the winter " + "winter " * 50
    free = Renderer(task, tokenizer)
    short, long = free.prompt("winter", "the winter"), free.prompt(*pair)
    for room, truncated in ((len(short) + 10, 1), (len(long), 0)):
        renderer = Renderer(task, tokenizer, room + 7 + len(free.opening), max_new_tokens=7)
        cut = renderer.prompt(*pair)
        tail = renderer._tail
        assert len(cut) == room and renderer.truncated == truncated and free.truncated == 0
        assert cut[-len(tail) :] == tail == short[-len(tail) :]
        assert cut[: -len(tail)] == long[: room - len(tail)]
    record = grm.Record({"query": "winter", "document": "winter"})
    record.where = "x.jsonl:7"
    least = len(short) - len(free._encode(" the winter")) + 1
    Renderer(task, tokenizer, least + len(free.opening)).prompts([record])
    for context, missing in ((least - 1, 1), (5, least - 5)):
        with pytest.raises(TaskError, match=rf"x\.jsonl:7: .* no room for a document .*\({missing} tokens"):
            Renderer(task, tokenizer, context + 50 + len(free.opening), 50).prompts([record])


# The parser -----------------------------------------------------------------------------------------------------------


def check_trace(renderer, ids, labels):
    """Spans that tile the answer from 0 through the last box, each closed by its own box, with the label where it stands."""
    trace = renderer.parse(ids)
    assert trace.problem is None, trace.problem
    assert [step.label for step in trace.steps] == list(labels)
    start = 0
    for step in trace.steps:
        assert step.start == start < step.end
        span = "".join(renderer.decode(ids[step.start : step.end]).split())
        label = "".join(step.label.split())
        assert span.endswith(f"\\boxed{{{label}}}") and span.count("\\boxed") == 1
        assert ids[step.label_at] == renderer.label_ids[renderer.task.labels.index(step.label)]
        assert "".join(renderer.decode(ids[step.label_at : step.end]).split()) == label + "}"
        start = step.end
    assert "}" not in renderer.decode(ids[start:])
    return trace


@EACH
def test_parse_spans_and_labels(name):
    """Spans off by a token (credit on the wrong step), a minus sign lost, the label of another step; positions counted in
    characters, where one is several tokens or a token half of one; the last verdict taken where the answer comes first."""
    renderer, gold = make_renderer(name), ("3", "2", "-1")
    for labels in (gold, ("-1", "-1", "-1"), ("0", "1", "3")):
        trace = check_trace(renderer, renderer.encode_response(answer(*labels)), labels)
        assert trace.label == labels[-1] and grm.reward(trace, labels[-1]) == 1.0 and grm.reward(trace, "9") == 0.0
        assert grm.step_verdicts(trace, gold) == [a == b for a, b in zip(labels, gold, strict=True)]
    ids = renderer.encode_response(answer("3", "-1", "3", texts=("咖啡😀3", "3 👍🏽\n冬 3 -1 {é", "}} 3 ñ\u0301 😀")) + " 😀")
    assert check_trace(renderer, ids, ("3", "-1", "3")).steps[-1].end < len(ids) - 1
    renderer = make_renderer(name, format="answer-first")
    trace = check_trace(renderer, renderer.encode_response("\\boxed{2} " + answer("3", "1", "0")), ("2", "3", "1", "0"))
    assert trace.label == "2" and grm.reward(trace, "2") == 1.0 and grm.reward(trace, "0") == 0.0
    assert renderer.parse(renderer.encode_response(answer("3", "1", "0"))).problem == "missing boxes"


def test_step_changes():
    """A step judged by where it ends, not by what it does; the first one by its change from another answer's end, or that of
    an explanation by its change from the answer's own box."""
    renderer = make_renderer("words")
    task = renderer.task
    for labels, targets, right in [
        ("331", "311", [True, False, False]),  # the slip, and a cap that took away more than it should have
        ("220", "311", [False, False, False]),
        ("100", "311", [False, False, True]),  # nothing is left to take, and nothing was to be
        ("322", "311", [True, False, True]),  # the slip alone
    ]:
        trace = check_trace(renderer, renderer.encode_response(answer(*labels)), labels)
        assert grm.step_changes(trace, list(targets), task) == right
    assert grm.step_changes(renderer.parse([]), list("311"), task) == []
    assert task.moves(["3", "1", "-1"]) == [4, -2, -2], "-1 is one place below 0"
    renderer = make_renderer("words", format="answer-first")
    trace = renderer.parse(renderer.encode_response("\\boxed{1} " + answer("3", "2", "2")))
    assert grm.step_changes(trace, ["2", "3", "2", "1"], renderer.task) == [False, True, True, False]
    assert grm.Task(**{**vars(renderer.task), "steps": []}).moves(["1"]) == [2]


@EACH
def test_parse_malformed(name):
    """Credit for an answer that is cut off, boxes too little or too much, or goes on behind its end."""
    renderer = make_renderer(name)
    good = renderer.encode_response(answer("3", "2", "1"))
    box, end = renderer.encode_response("\\boxed{1}")[:-1], renderer.eos_id
    foreign = [[i, *good] for i in (len(renderer.tokenizer), 10**12, -1, -len(renderer.tokenizer))]
    malformed = {
        "not ended": [[], good[:-1], [*good, good[0]], [end, *good[:-1]]],
        "missing boxes": [[end], [*good[good.index(good[-2]) + 1 : -1], end], renderer.encode_response("the winter")],
        "too many boxes": [[*good[:-1], *box, end], [*box, *good]],
        "unknown label": [renderer.encode_response(answer("3", label, "1")) for label in ("7", "", "2 2")],
        "a token that does not belong into an answer": [[*good, end], [*good[:3], end, *good[3:]], *foreign],
    }
    for problem, rows in malformed.items():
        for ids in rows:
            trace = renderer.parse(ids)
            assert (trace.problem, trace.steps, trace.label) == (problem, [], None), ids
            assert grm.reward(trace, "1") == 0.0 and grm.step_verdicts(trace, ["1"] * 3) == []
    for broken in ("\\boxed{3", "\\boxed 3}", "boxed{3}", "\\boxed{{3}}"):
        text = answer("3", "2", "1").replace("\\boxed{3}", broken)
        # The word-level tokenizer knows no "{" by itself and reads <unk> inside the last one's box.
        assert renderer.parse(renderer.encode_response(text)).problem in ("missing boxes", "unknown label")


@EACH
@given(st.data())
@settings(QUICK, max_examples=100)
def test_parse_equals_the_naive_one(name, data):
    """A box that is missed or counted twice where the text is looked at piece by piece, or an exception out of the decoder for
    ids that a model with a padded vocabulary can really sample."""
    renderer = make_renderer(name)
    boxed = [renderer.encode_answer(f"\\boxed{{{text}}}") for text in (*GRADES, " 3 ", "", "4")]
    texts = ("}", "}}", "\\boxed{", "{", "\\boxed{ 3", "3}", " a ", "\\", "boxed", "咖啡}", answer("3", "-1", "1"))
    known = [*boxed, *map(renderer._encode, texts), [renderer.eos_id]]
    known = st.one_of(st.sampled_from(known), st.integers(0, len(renderer.tokenizer) - 1).map(lambda i: [i]))
    ids = [i for part in data.draw(st.lists(known, max_size=14)) for i in part] + [renderer.eos_id]
    assert renderer.parse(ids) == parse(renderer, ids)
    foreign = data.draw(st.one_of(st.integers(-(2**70), -1), st.integers(len(renderer.tokenizer), 2**70)))
    ids.insert(data.draw(st.integers(0, len(ids) - 1)), foreign)
    assert renderer.parse(ids) == grm.Trace(problem="a token that does not belong into an answer")


def test_parsing_takes_linear_time(monkeypatch):
    """Decoding from the start at each brace: seconds for an answer of 4,096 of them."""
    renderer = make_renderer("bpe")
    decode, decoded = renderer.decode, []
    monkeypatch.setattr(renderer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    brace, three, (space,) = renderer._encode("}"), renderer._encode("3"), renderer._encode(" ")
    boxes = [*renderer.opening, *[space] * 2000, *three, *brace] * 2 + renderer.encode_answer("\\boxed{2}")
    for body in (brace * 4096, [*three * 2000, *boxes], [*renderer.opening, *three * 4096, *brace]):
        decoded.clear()
        renderer.parse([*body, renderer.eos_id])
        assert sum(decoded) < 6 * len(body)


FILLER = st.lists(st.one_of(st.text(max_size=6), st.sampled_from([*ESCAPES, " 3", "-1 ", "{", "}", "咖啡", "😀"])), max_size=4)


@EACH
@given(st.lists(FILLER.map("".join), min_size=4, max_size=4), st.lists(st.sampled_from(GRADES), min_size=3, max_size=3))
@QUICK
def test_parse_finds_the_boxes_in_any_text(name, texts, labels):
    """Text around the boxes (braces, digits, half characters, spelled-out special tokens) that moves or hides a box."""
    renderer = make_renderer(name)
    *texts, rest = (text.replace("\\", "/") for text in texts)
    check_trace(renderer, renderer.encode_response(answer(*labels, texts=texts) + " " + rest.replace("}", ")")), labels)


def test_merged_tokens():
    """A box whose brace is one token with the full stop behind it: missed, or found at a later step's brace. Where "{-" is one
    token, -1 would begin one position before the other labels, whose first token would be "{"."""
    renderer = Renderer(make_task(), byte_level_bpe(["x{3}. y{2}. z{1}."] * 5))
    ids = renderer.encode_response("a \\boxed{3}. b \\boxed{-1}. c \\boxed{1}.")
    trace = renderer.parse(ids)
    assert [step.label for step in trace.steps] == ["3", "-1", "1"]
    spans = [renderer.decode(ids[s.start : s.end]) for s in trace.steps]
    assert spans == ["a \\boxed{3}.", " b \\boxed{-1}.", " c \\boxed{1}."]
    assert [renderer.decode(ids[s.label_at : s.end]) for s in trace.steps] == ["3}.", "-1}.", "1}."]
    renderer = Renderer(make_task(), byte_level_bpe(["x}\\boxed{"] * 50))  # one token closes a box and begins the next
    ids = renderer.encode_response("\\boxed{3}\\boxed{-1}\\boxed{1}")
    assert ids.count(*renderer._encode("}\\")) == 2
    assert [step.label for step in renderer.parse(ids).steps] == ["3", "-1", "1"]
    tokenizer = byte_level_bpe(["x{-1}y{-2}z{-3}"] * 5)
    assert tokenizer.tokenize("{-1}")[0] == "{-"
    renderer = Renderer(make_task(), tokenizer)
    assert [renderer.decode([i]) for i in renderer.label_ids] == ["-", "0", "1", "2", "3"]
    check_trace(renderer, renderer.encode_response(answer("3", "2", "-1")), ("3", "2", "-1"))


def test_label_at_is_never_another_token():
    """A label spelled with unusual tokens (" 3" for "3") whose usual token stands earlier in the same step: the label's
    probabilities, and what the student learns, would be read in the middle of a word."""
    renderer = make_renderer("bpe")
    assert len(renderer.tokenizer(" 3").input_ids) == 1, "the tokenizer must know ' 3' as one token for this test to tell"
    for text in ("x3 \\boxed{ 3}", "{3} \\boxed{ 3}", "\\boxed {3 \\boxed{ 3}"):
        ids = [*renderer.tokenizer(f"{text} b \\boxed{{2}} c \\boxed{{1}}").input_ids, renderer.eos_id]
        trace = renderer.parse(ids)
        assert [step.label for step in trace.steps] == ["3", "2", "1"]
        assert trace.steps[0].label_at in (None, ids.index(renderer.tokenizer(" 3").input_ids[0]))
        assert all(step.label_at is not None for step in trace.steps[1:])
    ids = renderer.tokenizer("\\boxed{1} \\boxed{2} \\boxed{ 3}").input_ids
    engine = ScriptedEngine([[*ids, renderer.eos_id]])
    assert judge(renderer, engine, [GOLDEN_PAIR])[0]["label"] == "3"
    assert engine.sequences == [[*renderer.prompt(**GOLDEN_PAIR), *ids, *renderer.opening]]


@pytest.mark.parametrize("name", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "labels", [("Irrelevant", "Complement", "Substitute", "Exact"), ("no", "a bit", "fully"), ("poor", "11", "22", "-3")]
)
def test_word_labels(name, labels):
    """Labels of several tokens, also repeated ones, of which only a middle token or nothing is found."""
    renderer = make_renderer(name, labels)
    assert len(set(renderer.label_ids)) == len(labels)
    for label in labels:
        chosen = (labels[-1], label, labels[0])
        check_trace(renderer, renderer.encode_response(answer(*chosen)), chosen)
    unknown = renderer.encode_response(answer(labels[0], labels[0].upper() + "!", labels[0]))
    assert renderer.parse(unknown).problem == "unknown label"


ALIKE = "bpe 1 10, bpe good gum bad, unigram 11 12, words apple pear, words -1 0 apple, words A a"


@pytest.mark.parametrize("case", ALIKE.split(", "))
def test_labels_that_cannot_be_told_apart_are_refused(case):
    """Labels that share the position they are read from, or come back as <unk>: every answer would be malformed, silently."""
    name, *labels = case.split()
    with pytest.raises(TaskError, match=r"first tokens coincide|cannot write"):
        make_renderer(name, tuple(labels))


# Metrics --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_metrics_against_scikit_learn(seed):
    """A macro F1 over absent classes, linear kappa weights, ties ordered by luck, queries without gain counted as 0."""
    rng = np.random.default_rng(seed)
    task, n = make_task(), 150
    gold = rng.choice(5 if seed % 2 else 4, n, p=[0.5, 0.2, 0.1, 0.1, 0.1] if seed % 2 else [0.4, 0.3, 0.2, 0.1])
    got = np.where(rng.random(n) < 0.5, gold, rng.integers(0, 5, n))
    score = np.round(rng.normal(size=n) + gold, 0 if seed < 3 else 3)  # with ties, and with next to none
    query = np.minimum(rng.integers(0, 12, n), 9)
    gold[query == 3] = 0
    records = [{"label": GRADES[g], "query_id": int(q)} for g, q in zip(gold, query, strict=True)]
    out = metrics(task, records, [{"label": GRADES[g], "grade": s} for g, s in zip(got, score, strict=True)])
    assert out["accuracy"] == pytest.approx(accuracy_score(gold, got))
    assert out["macro_f1"] == pytest.approx(f1_score(gold, got, labels=np.unique(gold), average="macro", zero_division=0))
    assert out["kappa"] == pytest.approx(cohen_kappa_score(gold, got, weights="quadratic", labels=range(5)))
    assert out["binary_accuracy"] == pytest.approx(accuracy_score(gold >= 3, got >= 3))
    gains = [ndcg_score([gold[query == q]], [score[query == q]], k=10) for q in range(10) if q != 3]
    assert max(np.bincount(query)) > 10, "some query must have more documents than k"
    assert out["ndcg@10"] == pytest.approx(np.mean(gains))
    assert out["malformed"] == 0.0 and {"step_accuracy", "ece"}.isdisjoint(out)
    assert [row[:5] for row in out["confusion"]] == confusion_matrix(gold, got, labels=range(5)).tolist()


def test_metrics_of_malformed_answers():
    """A malformed answer counted as the last label (index -1), left out of the mean, or as irrelevant and so right."""
    gold = ["-1", "0", "1", "2", "3", "3"]
    records = [{"label": label, "step_labels": ["3", "1", label], "query_id": "q"} for label in gold]
    got = [{"label": None, "steps": []}] * 5 + [{"label": "3", "steps": [{"label": step} for step in ("3", "0", "3")]}]
    out = metrics(make_task(), records, [{**p, "grade": 0.0} for p in got])
    assert out["accuracy"] == out["binary_accuracy"] == pytest.approx(1 / 6)
    assert out["malformed"] == pytest.approx(5 / 6)
    assert out["macro_f1"] == pytest.approx((2 / 3) / 5)
    farthest = [4, 4, 4, 0, 0, 4]
    assert out["kappa"] == pytest.approx(cohen_kappa_score([0, 1, 2, 3, 4, 4], farthest, weights="quadratic"))
    assert out["step_accuracy"] == pytest.approx({"topic": 1 / 6, "constraints": 0.0, "promotion": 1 / 6})
    assert out["confusion"] == [[0] * 5 + [1]] * 4 + [[0, 0, 0, 0, 1, 1]]
    assert 0 < out["ndcg@10"] < 1 and "ece" not in out
    sure = [{**p, "grade": 0.0, "probs": {"3": 0.8}} for p in got]
    assert metrics(make_task(), records, sure)["ece"] == pytest.approx(0.2), "of the one answer that has a grade"
    assert "ece" not in metrics(make_task(), records[:5], sure[:5])
    for Y in (2, 3, 4):  # the farthest label of an even number of them
        gold, labels = [*range(Y), *range(Y)], [str(i) for i in range(Y)]
        said = [*range(Y), *[None] * Y]
        farthest = [max(range(Y), key=lambda j: abs(i - j)) if j is None else j for i, j in zip(gold, said, strict=True)]
        records = [{"label": str(i)} for i in gold]
        got = [{"label": None if j is None else str(j), "grade": 0.0} for j in said]
        kappa = metrics(make_task(labels), records, got)["kappa"]
        assert kappa == pytest.approx(cohen_kappa_score(gold, farthest, weights="quadratic"))


def test_metrics_without_signal_are_numbers():
    """NaN in a results file: one class only, no gain in any query, a query of one document. Ranks in place of the labels' own
    numbers (or numbers in place of ranks where labels are words)."""
    records = [{"label": "-1", "query_id": 1}, {"label": "-1", "query_id": 2}]
    out = metrics(make_task(), records, [{"label": "-1", "grade": 0.5}] * 2)
    assert out["kappa"] == 0.0 and out["ndcg@10"] == 0.0 and out["accuracy"] == 1.0
    assert math.isnan(grm.ndcg([0, 0], [1, 2])) and grm.ndcg([2], [0.1]) == 1.0
    assert make_task().grade([0.5, 0, 0, 0, 0.5]) == pytest.approx(1.0)
    assert make_task(("no", "some", "all")).grade([0.5, 0, 0.5]) == pytest.approx(1.0)
    np.testing.assert_allclose(make_task(("0", "10")).grade([[0.9, 0.1], [0, 1]]), [1.0, 10.0])


# Models and judging ---------------------------------------------------------------------------------------------------


def copy_model(folder):
    """The embedded model's folder, to be broken."""
    return Path(shutil.copytree(NOTES / "model", folder / "model"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The embedded model's folder with weights."""
    folder = copy_model(tmp_path_factory.mktemp("trained"))
    notes()[0].save_pretrained(folder)
    return folder


def test_a_folder_without_weights_gives_a_fresh_model():
    """A start that cannot be repeated, or one seed for all; memory for a rank that will receive the weights."""
    same, other = (load_model(NOTES / "model", seed=seed)[0].state_dict() for seed in (0, 1))
    first = notes()[0].state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert not notes()[0].training and notes()[0].dtype == torch.float32
    assert {p.device.type for p in load_model(NOTES / "model", meta=True)[0].parameters()} == {"meta"}


def edit_tensors(folder, **changes):
    """Other tensors in a file; None for none."""
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.norm.weight"].shape == (128,)
    tensors = {name: x for name, x in (tensors | changes).items() if x is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_weights(folder):
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "cannot be loaded: .*config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded: .*config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded: .*tokenizer"),
        (lambda folder: edit_tensors(folder, **{NORM: None}), rf"missing or left over: \['{NORM}'\]"),
        (lambda folder: edit_tensors(folder, extra=torch.ones(2)), r"missing or left over: \['extra'\]"),
        (lambda folder: edit_tensors(folder, **{NORM: torch.ones(127)}), "cannot be loaded"),
        (cut_weights, "cannot be loaded: .*incomplete"),
        (pickle_weights, "cannot be loaded: .*model.safetensors"),
        (shutil.rmtree, "cannot be loaded"),
    ],
)
def test_load_model_refuses(tmp_path, trained, damage, message):
    """A traceback from inside the libraries, unpickled weights, grades from random numbers where a tensor or a file is lost or
    of another architecture, and fresh weights where trained ones were meant."""
    folder = Path(shutil.copytree(trained, tmp_path / "model"))
    damage(folder)
    for seed in (None, 0):
        with pytest.raises(TaskError, match=message) as caught:
            load_model(folder, seed=seed)
        assert str(caught.value).startswith(f"{folder}: ") and "\n" not in str(caught.value)


def test_a_mistyped_folder_is_named():
    """The hub's error about somebody else's repository, without the name that was given, or fresh weights."""
    for seed in (None, 0):
        with pytest.raises(TaskError, match=r"^runs/nots/model: cannot be loaded"):
            load_model("runs/nots/model", seed=seed)
    with pytest.raises(TaskError, match=r"cannot be loaded: .*model\.safetensors"):
        load_model(NOTES / "model")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_not_run(tmp_path, trained, monkeypatch, file):
    """A folder from anywhere that brings its own classes."""
    folder, proof = Path(shutil.copytree(trained, tmp_path / "model")), tmp_path / "proof"
    (folder / "own.py").write_text(f"open({str(proof)!r}, 'w')\nclass Own: pass\n")
    names = {"config.json": "AutoConfig", "tokenizer_config.json": "AutoTokenizer"}
    value = "own.Own" if file == "config.json" else ["own.Own", None]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    edit_json(folder / file, auto_map={names[file]: value}, model_type="own", tokenizer_class="Own")
    with contextlib.suppress(TaskError):
        load_model(folder)
    assert not proof.exists()


def test_nothing_is_taken_from_generation_config(tmp_path):
    """Sampling settings shipped with a model (temperature, penalties, another eos) that change its answers silently."""
    _, files, renderer = notes_files()
    prompts = renderer.prompts(files["test_random"][:3])
    arguments = renderer.eos_id, renderer.label_ids, 6
    plain, _ = PaddedEngine(notes()[0], *arguments).generate(prompts)
    folder = copy_model(tmp_path)
    notes()[0].save_pretrained(folder)
    shipped = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "max_length": 3, "min_new_tokens": 2}
    shipped |= {"eos_token_id": plain[0][1], "suppress_tokens": [plain[0][0]], "bad_words_ids": [[plain[1][0]]]}
    (folder / "generation_config.json").write_text(json.dumps(shipped))
    loaded, _ = load_model(folder)
    assert torch.equal(loaded.state_dict()["model.norm.weight"], notes()[0].state_dict()["model.norm.weight"])
    assert PaddedEngine(loaded, *arguments).generate(prompts)[0] == plain


SAID = {"winter": answer("3", "2", "-1"), "kids": answer("3", "3", "3"), "tokyo": answer("0", "0", "0") * 2, "paris": "topic"}
ASKED = [{"query": query, "document": "the" + " winter" * i} for i, query in enumerate([*SAID, "ramen"])]


@functools.cache
def speakers(format):
    """A renderer, and both engines with one model that has learnt SAID: two good answers, one cut off, one without boxes."""
    renderer = make_renderer("words", format=format)
    model, _ = load_model(NOTES / "model", seed=1)
    padded = PaddedEngine(model, renderer.eos_id, renderer.label_ids, 20)
    opening = ["", "", "", ""] if format == "reason-first" else ["\\boxed{2} ", "\\boxed{0} ", "\\boxed{1} ", ""]
    answers = [renderer.encode_response(first + text) for first, text in zip(opening, SAID.values(), strict=True)]
    batch = padded.pad([prompt + ids for prompt, ids in zip(renderer.prompts(ASKED[:4]), answers, strict=True)])
    width = batch["input_ids"].shape[1]
    labels = torch.tensor([[-100] * (width - len(ids)) + ids for ids in answers])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(14):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    tree = rollout.use_tree_attention(copy.deepcopy(model))
    return renderer, rollout.Engine(tree, renderer.eos_id, renderer.label_ids, 20, max_tokens=100, cache_tokens=100), padded


@pytest.mark.parametrize("explain", [True, False])
@pytest.mark.parametrize("format", grm.FORMATS)
def test_shared_prefixes_grade_as_padded_rows_do(format, explain, monkeypatch):
    """Label logits of another answer or position, a prefix shared too far, masks made from pad ids, a second forward pass for
    logits that were there when the label was written: rollout.Engine, batched and pair by pair, against padded rows."""
    renderer, shared, padded = speakers(format)
    expected = judge(renderer, padded, ASKED, explain)
    assert max(max(r["probs"].values()) for r in expected) > 0.5, "the model must have learnt for this test to tell"
    if explain:
        assert [r["problem"] for r in expected][:4] == [None, None, "not ended", "missing boxes"]
    for got in (judge(renderer, shared, ASKED, explain), [judge(renderer, shared, [r], explain)[0] for r in ASKED]):
        for a, b in zip(got, expected, strict=True):
            grade = sum(float(label) * p for label, p in b["probs"].items())
            assert a == {**b, "probs": pytest.approx(b["probs"], rel=1e-3, abs=1e-6), "grade": pytest.approx(grade, abs=1e-4)}
            assert list(a["probs"]) == GRADES and sum(a["probs"].values()) == pytest.approx(1.0, abs=1e-12)
    if explain or format == "reason-first":
        monkeypatch.setattr(shared, "label_logits", None)
        assert all(result["well_formed"] for result in judge(renderer, shared, ASKED[:2], explain))


def test_padding_is_seen_by_nobody():
    """Positions counted over the padding (rotary ones hide it, a model with absolute positions does not), logits a position
    off, or rows that end with the id that also pads: the reference of the test above wrong."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=32, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)
    engine = PaddedEngine(GPT2LMHeadModel(config).eval(), 0, [1, 2, 3], 4)
    rows = [[3, 4, 0], [5, 6, 7, 8, 9, 10, 11, 12], [13] * 5]
    for row, ids, logits_TY, next_Y in zip(rows, *engine.generate(rows), engine.label_logits(rows), strict=True):
        alone_TV = engine.model(torch.tensor([row + ids])).logits[0, len(row) - 1 : -1].detach()
        assert alone_TV.argmax(-1).tolist() == ids and (ids[-1] == 0 or len(ids) == 4)
        torch.testing.assert_close(logits_TY, alone_TV[:, [1, 2, 3]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(next_Y, logits_TY[0], rtol=1e-4, atol=1e-4)


@EACH
def test_judge_reads_the_label_where_the_model_wrote_it(name):
    """Probabilities read behind the label, before the opening, at an earlier step's box, or of another answer."""
    renderer = make_renderer(name)
    good, broken = renderer.encode_response(answer("3", "2", "-1")), renderer.encode_response("the winter")
    records = [{"query": "winter", "document": "the winter"}] * 3
    prompt = renderer.prompt("winter", "the winter")
    engine = ScriptedEngine([broken, good, broken[:-1]])
    ended, ok, cut = judge(renderer, engine, records)
    assert engine.sequences == [[*prompt, *broken[:-1], *renderer.opening]] * 2
    check_probs(ended, engine.next[0])
    check_probs(ok, engine.written[1][renderer.parse(good).steps[-1].label_at])
    check_probs(cut, engine.next[1])
    assert (ok["label"], ok["well_formed"], ok["problem"]) == ("-1", True, None)
    assert {step["step"]: step["label"] for step in ok["steps"]} == {"topic": "3", "constraints": "2", "promotion": "-1"}
    assert (ended["label"], ended["well_formed"], ended["problem"], ended["steps"]) == (None, False, "missing boxes", [])
    assert (cut["label"], cut["problem"]) == (None, "not ended")
    assert "steps" not in judge(renderer, ScriptedEngine([good] * 3), records, explain=False)[0]


@EACH
def test_answer_first_pays_for_no_generation(name):
    """A whole answer generated for a score that one prefill gives, or the score read at another place when explained."""
    renderer = make_renderer(name, format="answer-first")
    record = {"query": "winter", "document": "the winter"}
    engine = ScriptedEngine()
    engine.generate = None
    result = judge(renderer, engine, [record], explain=False)[0]
    forced = [*renderer.prompt(**record), *renderer.opening]
    assert engine.sequences == [forced]
    check_probs(result, engine.next[0])
    assert (result["label"], result["well_formed"]) == (GRADES[engine.next[0].argmax()], True)
    whole = renderer.encode_response("\\boxed{1} " + answer("3", "1", "0"))
    engine = ScriptedEngine([renderer.encode_response("the winter"), whole, whole[: len(renderer.opening)]])
    elsewhere, explained, cut = judge(renderer, engine, [record] * 3)
    assert engine.sequences == [forced, forced] and explained["label"] == "1"
    check_probs(elsewhere, engine.next[0])
    check_probs(explained, engine.written[1][len(renderer.opening)])
    check_probs(cut, engine.next[1])
    assert [step["label"] for step in explained["steps"]] == ["1", "3", "1", "0"]


# The command line -----------------------------------------------------------------------------------------------------


def run(monkeypatch, *arguments):
    """grm.py with these arguments; returns what it exits with (None: well)."""
    monkeypatch.setattr(sys, "argv", ["grm.py", *map(str, arguments)])
    try:
        return parallel.launch(grm.main, errors=(TaskError, rollout.UnsupportedModelError))
    except SystemExit as stop:
        return stop.code


def write_pairs(path, pairs):
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.fixture
def score(tmp_path, trained, monkeypatch):
    """A function that runs `score` on in.jsonl, seven pairs, into OUT; returns what it exits with. Its `arguments`."""
    _, files, _ = notes_files()
    write_pairs(tmp_path / "in.jsonl", [{**r, "id": i, "where": "own"} for i, r in enumerate(files["test_longtail"][:7])])
    arguments = ["score", "--model", trained, "--task", NOTES, "--pairs", tmp_path / "in.jsonl", "--batch_size", 2]
    arguments += ["--max_new_tokens", 3, "--out"]

    def score(out, *more):
        return run(monkeypatch, *arguments, out, *more)

    score.arguments = arguments
    return score


def stop_after(monkeypatch, batches):
    """Ctrl-C in the batch behind `batches` ones."""
    left = iter([grm.judge] * batches)

    def judge(*args):
        for original in left:
            return original(*args)
        raise KeyboardInterrupt  # not by a signal, which a shell's background job ignores

    monkeypatch.setattr(grm, "judge", judge)


def stopped(score, monkeypatch, out, batches):
    """Both files of a run that was stopped behind some batches."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, batches)
        score(out)
    assert not out.exists()
    return Path(f"{out}.partial"), Path(f"{out}.partial.json")


def test_score_resumes_as_if_never_stopped(score, tmp_path, monkeypatch, capsys):
    """Lines lost, doubled or glued to half a line after a stop, or numbers that tell: another batch is rounded otherwise."""
    out = tmp_path / "out.jsonl"
    assert score(out) is None
    assert "7 pairs, 7 malformed" in capsys.readouterr().out
    whole = out.read_bytes()
    for pair, line in zip((tmp_path / "in.jsonl").read_bytes().splitlines(), whole.splitlines(), strict=True):
        pair, result = json.loads(pair), json.loads(line)
        assert result["gold"] == pair["label"] and result["label"] is None and result["well_formed"] is False
        assert all(result[name] == pair[name] for name in ("id", "query", "document", "step_labels", "where"))
        assert sum(result["probs"].values()) == pytest.approx(1.0) and "answer" not in result
    out.unlink()
    partial, settings = stopped(score, monkeypatch, out, 2)
    written, its_settings = partial.read_bytes(), settings.read_bytes()
    assert whole.startswith(written) and len(written.splitlines()) == 4, "two batches of two"
    for kept, left in ((written, 2), (written[:-40], 3), (written[:9], 4), (whole, 0)):
        partial.write_bytes(kept)
        settings.write_bytes(its_settings)
        with monkeypatch.context() as patch:
            stop_after(patch, left)  # what is done is not done again
            assert score(out) is None
        assert out.read_bytes() == whole and sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
        out.unlink()


REFUSED = {
    "another query": (lambda pairs: [*pairs[:2], pairs[2] | {"query": "other"}, *pairs[3:]], bytes),
    "another document": (lambda pairs: [*pairs[:2], pairs[2] | {"document": "other"}, *pairs[3:]], bytes),
    "fewer pairs": (lambda pairs: pairs[:3], bytes),
    "a damaged line": (list, lambda lines: lines.replace(b'"grade"', b'"grade', 1)),
    "not UTF-8": (list, lambda lines: lines.replace(b"winter", b"\xff", 1)),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_score_refuses_another_s_results(score, tmp_path, monkeypatch, damage):
    """Results of other pairs, more than there are pairs, or half a line, in OUT."""
    out, path = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    partial, _ = stopped(score, monkeypatch, out, 2)
    change, spoil = REFUSED[damage]
    write_pairs(path, change([json.loads(line) for line in path.read_text().splitlines()]))
    before = spoil(partial.read_bytes())
    partial.write_bytes(before)
    assert f"{partial}: of other settings or pairs; delete it" in str(score(out))
    assert partial.read_bytes() == before and not out.exists()


def test_score_refuses_to_mix_or_overwrite(score, tmp_path, monkeypatch):
    """Results of two settings in one file, or an earlier result gone."""
    out = tmp_path / "out.jsonl"
    partial, _ = stopped(score, monkeypatch, out, 1)
    before = partial.read_bytes()
    for flags in (["--explain"], ["--batch_size", 3], ["--max_new_tokens", 4]):
        assert "other settings or pairs; delete it" in score(out, *flags)
        assert partial.read_bytes() == before and not out.exists()
    out.write_text("mine")
    assert "exists; delete it or choose another name" in score(out)
    assert out.read_text() == "mine"
    assert "No such file or directory" in score(tmp_path / "no" / "out.jsonl")


def test_two_runs_do_not_write_one_file(score, tmp_path, monkeypatch):
    """The same command given twice: two processes that write into each other's lines."""
    out, judge, second = tmp_path / "out.jsonl", grm.judge, []

    def while_it_judges(*args):
        if not second:
            command = [sys.executable, ROOT / "grm.py", *score.arguments, out]
            second.append(subprocess.run([*map(str, command)], capture_output=True, text=True))
        return judge(*args)

    monkeypatch.setattr(grm, "judge", while_it_judges)
    assert score(out) is None and len(out.read_text().splitlines()) == 7
    assert second[0].returncode == 1 and f"{out}.partial: another run writes here" in second[0].stderr


def test_answers_are_as_long_as_the_model_was_trained_to_give(score, trained, tmp_path):
    """128 tokens for a model that reasons in 500: every answer cut, none well-formed."""
    model = shutil.copytree(trained, tmp_path / "model")
    at = score.arguments.index("--max_new_tokens")
    del score.arguments[at : at + 2]
    for written, length in (('{"max_new_tokens": 5}', 5), ("{}", 128)):
        (model / "generation_config.json").write_text(written)
        out = tmp_path / f"{length}.jsonl"
        assert score(out, "--model", model, "--explain") is None
        results = [json.loads(line) for line in out.read_text().splitlines()]
        assert max(len(words()(result["answer"]).input_ids) for result in results) == length


def test_score_names_bad_pairs_before_any_work(score, tmp_path, monkeypatch):
    """Hours of scoring that end at a bad line; an empty result that looks complete, or a traceback out of range()."""
    monkeypatch.setattr(grm, "judge", None)
    good, too_long = (tmp_path / "in.jsonl").read_text(), json.dumps({"query": "winter " * 500, "document": "d"})
    for bad, message in (("{", "Expecting property name"), (too_long, "criteria, query and answer leave no room")):
        (tmp_path / "in.jsonl").write_text(good + bad)
        assert f"in.jsonl:8: {message}" in score(tmp_path / "out.jsonl")
    (tmp_path / "in.jsonl").write_text(good)
    for flags in (["--batch_size", 0], ["--batch_size", -1], ["--max_new_tokens", 0]):
        assert "must be at least 1" in score(tmp_path / "out.jsonl", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_score_explains(score, tmp_path, capsys):
    """The reasoning asked for and not written, a metric printed for pairs without labels, or a lone surrogate in a field that
    is only passed through: it cannot be written as UTF-8, which ends the run midway."""
    pair = '{"query": "winter 咖啡", "document": "kids \\u2028 in tokyo", "label": null, "note": "\\ud800"}\n'
    (tmp_path / "in.jsonl").write_text(pair)
    assert score(tmp_path / "out.jsonl", "--explain") is None
    assert "accuracy" not in capsys.readouterr().out
    (result,) = map(json.loads, (tmp_path / "out.jsonl").read_text().split("\n")[:-1])
    assert result["query"] == "winter 咖啡" and "gold" not in result and result["note"] == "\ud800"
    assert result["problem"] == "not ended" and result["answer"] and result["steps"] == []


def test_scoring_a_graded_file_keeps_its_gold(score, tmp_path, capsys):
    """The model's own label would become the gold one, and everything right; a gold that is no label gives no metrics."""
    for line, expected in (('"label": "3", "gold": "1"', "1"), ('"label": "3"', "3"), ('"gold": 7', 7)):
        (tmp_path / "in.jsonl").write_text(f'{{"query": "winter", "document": "kids", {line}}}\n')
        out = tmp_path / f"{expected}.jsonl"
        assert score(out) is None
        assert json.loads(out.read_text())["gold"] == expected
        assert ("accuracy" in capsys.readouterr().out) == (expected != 7)


def test_a_model_knows_what_it_was_trained_for(trained, tmp_path, monkeypatch, capsys):
    """Its folder's criteria serve where --task is not given; a task of another format is refused, other criteria are not."""
    shutil.copytree(trained, tmp_path / "model")
    task = Task.load(NOTES)

    def judged(*more):
        return run(monkeypatch, "judge", "--model", tmp_path / "model", "--max_new_tokens", 2, *more, "winter", "kids")

    assert re.search("criteria.md.* --task", judged())
    task.save(tmp_path / "model")
    replace(task, criteria="Anything with \\boxed{grade}.").save(tmp_path)
    assert judged() is None and judged("--task", tmp_path) is None
    for name, other in (("format", "answer-first"), ("steps", ["topic", "promotion"]), ("labels", [*GRADES, "4"])):
        replace(task, **{name: other}).save(tmp_path)
        assert re.search(rf"model: was trained for .*{name}", judged("--task", tmp_path))


def test_judge_prints_the_steps_and_the_distribution(monkeypatch, capsys):
    """A step beside another's name, the mark at the most probable label instead of the answer, a malformed answer unseen."""
    renderer = make_renderer("words")
    ids = renderer.encode_response(answer("3", "2", "-1"))
    engine = ScriptedEngine([ids])
    probs = torch.tensor([0.25, 0.5, 0.125, 0.125, 0.0])
    engine.written[0][renderer.parse(ids).steps[-1].label_at] = probs.log()
    monkeypatch.setattr(grm, "load_judge", lambda *args: (renderer, engine))
    assert run(monkeypatch, "judge", "--model", "m", "winter", "kids") is None
    shown = capsys.readouterr().out.splitlines()
    for line, name, text in zip(shown[:3], renderer.task.steps, ("topic", "the winter", "a winter"), strict=True):
        assert re.fullmatch(rf" *{name} \| {text} \\boxed ?{{.*}}", line), line
    bars = [f"{label:>14} | {'#' * round(40 * p):<40} {p:.3f}" for label, p in zip(GRADES, probs.tolist(), strict=True)]
    assert shown[3:] == [bars[0] + " <- answer", *bars[1:], "      expected | 0.12"]
    engine.answers = [ids[:-1]]
    assert run(monkeypatch, "judge", "--model", "m", "winter", "kids") is None
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("malformed answer (not ended): topic") and "<- answer" not in "".join(shown) and len(shown) == 7


def test_judge_refuses_what_it_cannot_use(trained, tmp_path, monkeypatch):
    """A traceback where one line says what is wrong."""
    edit_json(Path(shutil.copytree(trained, tmp_path / "model")) / "config.json", layer_types=["sliding_attention"] * 3)
    for model, query, message in (
        (trained, " ", "'query' is missing, empty"),
        (NOTES, "q", f"{NOTES}: cannot be loaded"),
        (NOTES / "model", "q", f"{NOTES / 'model'}: cannot be loaded: Error no file named model.safetensors"),
        (tmp_path / "model", "q", "sliding_attention"),
    ):
        assert message in run(monkeypatch, "judge", "--model", model, "--task", NOTES, "--max_new_tokens", 2, query, "kids")


ALONE = """
import importlib, runpy, shutil, sys, grm
_, tokenizer = grm.load_model({model!r}, meta=True)
renderer = grm.Renderer(grm.Task.load({notes!r}), tokenizer)
assert renderer.prompt(**{pair}) == {ids}
assert renderer.parse(renderer.encode_response({answer!r})).label == "1"
for name in ("rollout.py", "parallel.py"):
    shutil.copy(f"{root}/{{name}}", ".")
importlib.invalidate_caches()
sys.argv = ["grm.py", "judge", "--model", {model!r}, "--task", {notes!r}, "--max_new_tokens=2", "q", "d"]
runpy.run_path("grm.py", run_name="__main__")
"""


def test_copied_alone(tmp_path, trained):
    """A project file imported where this one is copied to; scoring, and only that, needs rollout.py and parallel.py."""
    shutil.copy(ROOT / "grm.py", tmp_path)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    names = {"model": str(trained), "notes": str(NOTES), "root": str(ROOT), "pair": GOLDEN_PAIR, "ids": GOLDEN_IDS}
    script = ALONE.format(**names, answer=answer("3", "2", "1"))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    malformed, *shown = done.stdout.splitlines()
    assert malformed.startswith("malformed answer (not ended)")
    assert [line.split("|")[0].strip() for line in shown] == [*GRADES, "expected"]
    tree = ast.parse((tmp_path / "grm.py").read_text())
    froms = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    plain = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    needed = {"torch", "transformers", "numpy", "yaml", "jinja2", "rollout", "parallel"}
    assert (froms | plain) - sys.stdlib_module_names == needed
