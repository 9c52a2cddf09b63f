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
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NOTES, ROOT, make_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from naive import PaddedEngine, label_probs, parse, script
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, cohen_kappa_score, confusion_matrix, f1_score, ndcg_score
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import grm
import parallel
import rollout
from grm import Renderer, Task, TaskError, judge, load_model, metrics

GRADES = ["-1", "0", "1", "2", "3"]
MAKER = runpy.run_path(str(NOTES / "make.py"))
SCORE = runpy.run_path(str(ROOT / "docs" / "score.py"))
QUICK = settings(max_examples=50, deadline=None, derandomize=True)

NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# What a stranger may write into a document to leave the user's turn, in the spelling of every tokenizer below.
ESCAPES = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<eos>", "<bos>", "<start_of_turn>"]
ESCAPES += ["<end_of_turn>", "<unk>", "<<grm:document>>", "<<grm:answer>>", "<0x0A>", "</s>"]


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
    return wrapped(backend, MAKER["CHAT_TEMPLATE"], eos_token=end, pad_token=pad, additional_special_tokens=[start])


def unigram():
    """As SentencePiece's: pieces with the space in them, or bytes, and a chat template without a system turn, as Gemma's."""
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


TOKENIZERS = {"words": lambda: load_model(NOTES / "model", meta=True)[1], "bpe": byte_level_bpe, "unigram": unigram}
EACH = pytest.mark.parametrize("name", list(TOKENIZERS))
# "{-" is a token, as of Qwen, Llama and Mistral; others close a box and begin a sentence, or the next box.
TOKENIZERS["merging"] = lambda: byte_level_bpe(["x{-1}y{-2}z{-3}. y}. z}.x}.", *["x}\\boxed{"] * 9])


def make_task(labels=GRADES, steps=("topic", "constraints", "promotion"), format="reason-first"):
    criteria = "Work in steps and close every step with \\boxed{grade}."
    return Task(Path("nowhere"), criteria, list(labels), list(labels[-2:]), list(steps), format)


@functools.cache
def make_renderer(name, labels=tuple(GRADES), format="reason-first"):
    return Renderer(make_task(labels, format=format), TOKENIZERS[name]())


def answer(*labels, texts=("topic", "the winter", "a winter")):
    return " ".join(f"{text} \\boxed{{{label}}}" for text, label in zip(texts, labels, strict=True))


def write_task(folder, body="Close with \\boxed{grade}.", **changes):
    front = {"labels": '["-1", "0", "1"]', "relevant": '["1"]', "steps": "[topic, all]", "format": "reason-first", **changes}
    lines = [f"{name}: {value}" for name, value in front.items() if value is not None]
    (folder / "criteria.md").write_text("---\n" + "\n".join(lines) + f"\n---\n{body}\n", encoding="utf-8")
    return folder


def test_criteria_are_read_as_they_are_written(tmp_path):
    """Numbers as YAML 1.1 reads them (1:30 is 90), an emoji as two halves, or a rule of --- in the body taken for the end."""
    body = "Use \\boxed{grade}.\n\n---\n\nBe strict."
    task = Task.load(write_task(tmp_path, body, labels="[-1, 1:30, yes, ~, 1_000, 0x1F, null, 1.50, 010]", relevant="[010]"))
    assert task.labels == ["-1", "1:30", "yes", "~", "1_000", "0x1F", "null", "1.50", "010"] and task.relevant == ["010"]
    assert task.criteria == body and task.steps == task.boxes == ["topic", "all"]
    assert Task.load(write_task(tmp_path, format="answer-first")).boxes == ["label", "topic", "all"]
    labels = ["😀", *task.labels, "a\u2028b", "'\"\x7f\\", "é: #x, [y]"]
    written = make_task(labels, steps=["πρώτο 👍🏽", "- two", "word " * 40 + "."])
    written.save(tmp_path)
    assert replace(Task.load(tmp_path), folder=written.folder) == written


BAD_TASKS = [
    ({"labels": "[a, b"}, "must begin with labels, relevant, steps and format"),
    (lambda text: text.replace(b"relevant:", b"lables:"), "and format, YAML.*: it has labels, lables, steps, format$"),
    (lambda text: b"criteria", "and format, YAML.*: it begins otherwise$"),
    ({"labels": "[" * 3000 + "]" * 3000}, "must begin with labels, relevant, steps and format"),
    (lambda text: b"Title\n" + text, "must begin with labels, relevant, steps and format"),
    (lambda text: text + b"\xff", "must begin with labels, relevant, steps and format"),
    ({"colour": "red"}, "colour"),
    ({"labels": "[1]", "relevant": "[1]"}, "labels needs two or more values$"),
    ({"steps": ""}, "steps must be a list"),
    ({"labels": '["0", "1", " 1"]'}, "labels must not repeat"),
    ({"labels": '["0", "{1}"]', "relevant": '["0"]'}, "labels must not repeat a value nor contain braces"),
    ({"relevant": '[""]'}, "relevant must not repeat a value nor contain braces, nor an empty value"),
    ({"relevant": '["2"]'}, r"relevant must be the last of labels, .* not \['2'\]$"),
    ({"relevant": '["0"]'}, "relevant must be the last of labels, which go from worst to best"),
    ({"labels": '["1", "0", "-1"]'}, "relevant must be the last of labels"),  # from best to worst
    ({"relevant": "[]"}, "relevant must be the last of labels"),
    ({"steps": "[]"}, "needs at least one step"),
    ({"format": "backwards"}, "format must be one of reason-first, answer-first, not 'backwards'"),
    ({"body": "Close every step with a box."}, "must tell the model to close each step"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TASKS)
def test_load_refuses(tmp_path, change, message):
    """A front matter that loads with another meaning, such as two labels that are one in a box; prose that is dropped."""
    path = write_task(tmp_path, **(change if isinstance(change, dict) else {})) / "criteria.md"
    if callable(change):
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(TaskError, match=f"{path}: .*{message}"):
        Task.load(tmp_path)


GOOD = {"query": "q", "document": "d", "label": "1"}


def read_lines(folder, *lines, required=("label",), **changes):
    data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "x.jsonl").write_bytes(b"\n".join(data) + b"\n")
    return Task.load(write_task(folder, **changes)).read(folder / "x.jsonl", required)


def test_read_returns_records_with_their_place(tmp_path):
    """Integer labels unequal to parsed ones, blank lines counted out of the line numbers, Unicode line ends as line ends."""
    strange = {"query": "a\u2028b\u0085c", "document": "\x0b咖啡 😀", "label": 1, "step_labels": [0, "1"], "query_id": 7}
    floats = {**GOOD, "label": 1.0, "query_id": "7"}  # as spreadsheets write it
    lines = [json.dumps(strange, ensure_ascii=False).encode(), b"", b"  ", json.dumps(floats).encode() + b"\r"]
    first, second = read_lines(tmp_path, *lines)
    assert first == {**strange, "label": "1", "step_labels": ["0", "1"]} and first.where == f"{tmp_path / 'x.jsonl'}:1"
    assert second == {**GOOD, "query_id": "7"} and second.where == f"{tmp_path / 'x.jsonl'}:4"
    assert read_lines(tmp_path, {**GOOD, "label": None}, required=())[0].keys() == {"query", "document"}
    assert read_lines(tmp_path, {**GOOD, "label": 2.0}, labels="[1.0, 2.0]", relevant="[2.0]")[0]["label"] == "2.0"


BAD_LINES = [
    (b"{'query': 1}", "is no JSON: Expecting property name"),
    (b'["q", "d"]', "must be a JSON object"),
    (b'{"query": "q", "document": "\\udfff x", "label": "1"}', "surrogates"),
    (b"[" * 100_000, "recursion"),
    ({**GOOD, "document": " \n"}, "'document' is missing, empty or not a string"),
    ({**GOOD, "query": None}, "'query' is missing, empty or not a string"),
    ({"query": "q", "document": "d"}, "unknown label None; the labels are -1, 0, 1"),
    ({**GOOD, "step_labels": ["1"]}, "'step_labels' must be a label each for topic, all"),
    ({**GOOD, "step_labels": ["1", 1.5]}, "unknown label 1.5"),
    ({**GOOD, "query_id": 1}, ""),
]


def test_read_names_each_fault_once(tmp_path):
    """A bad line that ends the program with its own exception, or reaches the tokenizer or the output; twenty lines of one
    fault that hide another."""
    with pytest.raises(TaskError) as caught:
        read_lines(tmp_path, *[line for bad, _ in BAD_LINES * 2 for line in (GOOD, bad)])
    *faults, of_id = str(caught.value).split("\n")
    for i, (said, (_, message)) in enumerate(zip(faults, BAD_LINES[:-1], strict=True)):
        assert said.startswith(f"{tmp_path / 'x.jsonl'}:{2 * i + 2}: ") and message in said
    assert of_id == f"{tmp_path / 'x.jsonl'}:1: no query_id, which other pairs have: give it to all or none"
    for message, line, required in (("'response' is missing", GOOD, ("response",)), ("holds no pairs", b" ", ())):
        with pytest.raises(TaskError, match=message):
            read_lines(tmp_path, line, required=required)


def test_a_record_names_its_criteria(tmp_path, monkeypatch):
    """Another file's criteria, or none, in a pair's prompt; a file read for each line; a path out of the folder followed; other
    labels, steps or format that make a pair's answer unreadable."""
    renderer, other = make_renderer("words"), "Be strict.\n\nClose with \\boxed{grade}."
    task = replace(make_task(), folder=tmp_path)
    replace(task, criteria=other).save(tmp_path, "other.md")
    renderer, alone = (Renderer(t, renderer.tokenizer) for t in (task, replace(task, criteria=other)))
    pair = {"query": "winter", "document": "the kids", "label": "1"}
    named = [pair, pair | {"criteria": "other.md"}, pair | {"criteria": None}, pair | {"criteria": "other.md"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in named))
    reads, load = [], Task.load
    monkeypatch.setattr(Task, "load", lambda *args: reads.append(args) or load(*args))
    records = task.read(tmp_path / "x.jsonl")
    (tmp_path / "other.md").unlink()
    own, others = (x.prompt("winter", "the kids") for x in (renderer, alone))
    assert renderer.prompts(records) == [own, others, own, others] and own != others
    assert reads == [(tmp_path, "other.md")] and [record.get("criteria") for record in records][1::2] == ["other.md"] * 2
    faults = {"none.md": f"{tmp_path / 'none.md'}: No such file"}
    for name, field in (("format", "answer-first"), ("steps", ["topic", "promotion"]), ("labels", ["-2", *GRADES])):
        replace(task, **{name: field}).save(tmp_path, f"{name}.md")
        faults[f"{name}.md"] = f"{tmp_path / name}.md: has other labels, steps or format"
    (tmp_path / "folder").mkdir()
    task.save(tmp_path / "folder", "x.md")
    elsewhere = ["folder/x.md", "../x.md", "..", "folder\\x.md", str(tmp_path / "folder" / "x.md"), "", 7, ["x.md"]]
    faults = [
        *faults.items(),
        *((name, f"'criteria' must be NAME.md, in the task's folder, not {name!r}") for name in elsewhere),
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(pair | {"criteria": name}) + "\n" for name, _ in faults))
    with pytest.raises(TaskError) as caught:
        task.read(tmp_path / "x.jsonl")
    for line, (said, (_, message)) in enumerate(zip(str(caught.value).split("\n"), faults, strict=True), 1):
        assert said.startswith(f"{tmp_path / 'x.jsonl'}:{line}: {message}")


OTHER_FILES = [
    ("\ufeffFrage;Größe;label\nq;d;1\n".encode(), ": begins with 'Frage;Größe;label'; JSON Lines are an object a line"),
    ("Frage;Größe\n".encode("cp1252"), ": begins with 'Frage;Gr.{2}e'; JSON Lines are an object a line; data/from_csv.py"),
    (
        b'[\n{"query": "q"},\n{"query": "q"}]',
        r": begins with '\['; JSON Lines are an object a line; data/from_csv.py reads tables",
    ),
    (json.dumps(GOOD).encode("utf-16"), ": is UTF-16; save the file as UTF-8"),
    ('{"query": "q"}\n{"query": "café"}'.encode("cp1252"), ":2: is not UTF-8; save the file as UTF-8"),
]


@pytest.mark.parametrize(("content", "message"), OTHER_FILES)
def test_a_file_of_another_kind_is_told_in_a_line(tmp_path, content, message):
    """Twenty lines of what JSON expects, for a table, an array or another encoding; a table that lies beside unnoticed."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(TaskError, match=rf"^{path}{message}[^\n]*$"):
        make_task().read(path)
    path.rename(tmp_path / "train.csv")
    with pytest.raises(TaskError, match=rf"^{path}: is not there; data/from_csv.py makes a task of {tmp_path / 'train.csv'}$"):
        make_task().read(path)


def test_words_that_a_tokenizer_does_not_know(capsys, monkeypatch):
    """Grades of <unk> <unk> <unk>, without a word; a tokenizer without <unk>, or whose <unk> is the end token, taken for one
    that knows nothing."""
    records = [{"query": "winter", "document": "kids " * 95 + "zebras are bold"}]  # 3 of 99
    words, letters, gpt2 = TOKENIZERS["words"](), byte_level_bpe(), byte_level_bpe()
    gpt2.unk_token = gpt2.eos_token
    words.name_or_path = "its/folder"
    assert gpt2.unk_token_id == gpt2.eos_token_id and letters.unk_token_id is None
    for tokenizer in (letters, gpt2):
        grm.check_words(tokenizer, [{"query": "<unk> <|im_end|>", "document": "咖啡 zebras"}])
    assert capsys.readouterr().out == ""
    said = "its/folder: its tokenizer does not know {} of the words, such as ['zebras', 'are', 'bold'{}]"
    grm.check_words(words, [*records, {"query": "winter", "document": "kids"}])
    assert capsys.readouterr().out == f"warning: {said.format('3.0%', '')}\n"
    with pytest.raises(TaskError, match=re.escape(said.format("3.0%", "") + "; choose a model made for such text")):
        grm.check_words(words, records)
    monkeypatch.setenv("RANK", "1")
    grm.check_words(words, records, most=0.5)
    assert capsys.readouterr().out == ""


@functools.cache
def notes_files():
    """The embedded task, its files as records, and its renderer."""
    task = Task.load(NOTES)
    names = ("sft", "train", "test_random", "test_longtail", "unlabelled")
    files = {name: task.read(NOTES / f"{name}.jsonl", ()) for name in names}
    return task, files, Renderer(task, TOKENIZERS["words"](), 512, 64)


def test_notes_is_made_byte_for_byte(tmp_path):
    """Files edited by hand or left behind, or made in the order of a set, which differs; a test query that is trained on, in
    whatever words; fewer than ten notes to a query, or notes of one grade."""
    MAKER["make"](tmp_path)
    made, kept = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*") if path.suffix not in (".py", ".pyc")}
        for folder in (tmp_path, NOTES)
    )
    assert made == kept
    files = notes_files()[1]
    pairs = [(r["query"], r["document"]) for records in files.values() for r in records]
    assert len(set(pairs)) == len(pairs) == 17000
    topics, names = MAKER["CATEGORIES"].values(), [*MAKER["CONSTRAINTS"].values()]
    values = {value for group in (*topics, *names) for value in group}
    asked = {name: {frozenset(values & {*r["query"].split()}) for r in records} for name, records in files.items()}
    for name in ("test_random", "test_longtail"):
        assert len(asked[name]) == 50 and not any(asked[name] & asked[other] for other in asked if other != name)
        for i in range(50):
            records = files[name][10 * i : 10 * i + 10]
            assert {(r["query_id"], r["query"]) for r in records} == {(i, records[0]["query"])}
            assert len({r["label"] for r in records}) >= 3


TRAITS = [("dutch finnish", -1), ("cheap bargain", 1), ("outdated old", -1), ("detailed thorough", 1), ("unsafe scam", -3)]


def naive_grades(query, document, criteria=""):
    """The grades after the eight steps, of the texts alone, as criteria.md words the rules; criteria: says which are off."""
    is_off = lambda words: re.search(rf"{words}[^.]* leaves the grade as it is", criteria)
    query, note = (set(re.findall(r"\w+", text.lower())) for text in (query, document))
    categories = list(map(set, MAKER["CATEGORIES"].values()))
    (asked,), (told,) = (words & set().union(*categories) for words in (query, note))
    (category,) = (names for names in categories if asked in names)
    grades = [3 if asked == told else 1 if told in category else -1]
    wanted = [values for values in map(set, MAKER["CONSTRAINTS"].values()) if values & query]
    silent = sum(not values & note for values in wanted)
    contradicted = any(values & note and not values & note & query for values in wanted)
    assert all(len(values & note) <= 1 for values in map(set, MAKER["CONSTRAINTS"].values()))
    contradicted &= not is_off("contradicted constraint")
    grade = grades[0] if grades[0] < 0 else 0 if contradicted else max(0, grades[0] - silent * (not is_off("silent about")))
    grades.append(grade)
    if note & {"sponsored", "gifted", "affiliate"} and not is_off("affiliate"):
        grade = min(grade, 1)
    grades.append(grade)
    for trait, change in TRAITS:
        if grade >= 0 and note & set(trait.split()) and not is_off(trait.split()[1]):
            grade = min(3, max(0, grade + change))
        grades.append(grade)
    return list(map(str, grades))


@pytest.mark.parametrize("steps, form", [(3, 0), (8, 0), (3, 1), (8, 1)])
def test_notes_of_any_number_of_steps(tmp_path, monkeypatch, steps, form):
    """Labels that do not follow the criteria, words outside the vocabulary; demonstrations that teach what RL never rewards."""
    monkeypatch.setitem(MAKER["make"].__globals__, "SIZES", {name: size // 10 for name, size in MAKER["SIZES"].items()})
    MAKER["make"](tmp_path, num_steps=steps, form=MAKER["FORMS"][form])
    task, (_, tokenizer) = Task.load(tmp_path), load_model(tmp_path / "model", meta=True)
    longest, unknown = json.loads((tmp_path / "train.json").read_text())["max_new_tokens"], tokenizer.unk_token_id
    renderer, criteria = Renderer(task, tokenizer, 512, longest), tokenizer(task.criteria, add_special_tokens=False).input_ids
    for name in ("train", "test_random", "test_longtail"):
        records = task.read(tmp_path / f"{name}.jsonl")
        assert name != "train" or {record["label"] for record in records} == set(task.labels)
        for record, prompt in zip(records, renderer.prompts(records), strict=True):
            grades = naive_grades(record["query"], record["document"])[:steps]
            assert record["step_labels"] == ([grades[1], grades[-1], grades[-1]] if form else grades)
            assert record["label"] == record["step_labels"][-1]
            assert prompt[2 : 2 + len(criteria)] == criteria and unknown not in prompt and len(prompt) < 400
    wrong = []
    for record in task.read(tmp_path / "sft.jsonl", ("response",)):
        ids = renderer.encode_response(record["response"])
        trace = renderer.parse(ids)
        assert trace.problem is None and len(ids) <= longest and unknown not in ids
        wrong.append(trace.label != naive_grades(record["query"], record["document"])[steps - 1])
    assert 0.2 < np.mean(wrong) < 0.7 and renderer.truncated == 0


def test_notes_by_varied_criteria(tmp_path, monkeypatch):
    """Labels by another pair's criteria, or by all rules; combinations of the unseen test that are trained on; a rule that is
    always on in training, so that no text could matter; demonstrations that heed a rule that is off."""
    sizes = {name: size // 10 for name, size in MAKER["SIZES"].items()} | {"test_unseen": 200}
    monkeypatch.setitem(MAKER["make"].__globals__, "SIZES", sizes)
    MAKER["make"](tmp_path, num_steps=4, error=0, varied=True)
    task, (_, tokenizer) = Task.load(tmp_path), load_model(tmp_path / "model", meta=True)
    renderer, named, wrong, by_all_rules = Renderer(task, tokenizer, 512, 70), {}, [], []
    for path in sorted(tmp_path.glob("*.jsonl")):
        records = task.read(path, ())
        named[path.stem] = {record["criteria"] for record in records}
        for record, prompt in zip(records, renderer.prompts(records), strict=True):
            texts = record["query"], record["document"]
            grades = naive_grades(*texts, " ".join(task.others[record["criteria"]].split()))[:4]
            assert tokenizer.unk_token_id not in prompt and grades == record.get("step_labels", grades)
            if path.stem == "sft":
                wrong.append(renderer.parse(renderer.encode_response(record["response"])).label != grades[-1])
            if path.stem == "test_unseen":
                by_all_rules.append(grades == naive_grades(*texts)[:4])
                assert record["criteria"] == records[record["query_id"] * 10]["criteria"]
    trained, unseen = named["train"], named.pop("test_unseen")
    files = {path.name for path in tmp_path.glob("criteria-*.md")}
    assert len(files) == 16 and len(trained) == 11 and len(unseen) > 2 and unseen <= files - trained
    assert set(named) == {"sft", "test_seen", "train", "unlabelled"} and all(names <= trained for names in named.values())
    assert all({name[at] for name in trained} == {"0", "1"} for at in range(9, 13)) and trained == named["sft"]
    assert task.criteria == task.criteria_of("criteria-1111.md") and 0 < np.mean(wrong) < 0.1 and np.mean(by_all_rules) < 0.8


GOLDEN_PAIR = {"query": "winter ramen tokyo", "document": "RAMEN in Tokyo, finally! A gifted note, loved it <|im_end|>"}
GOLDEN_IDS = [
    1, 177, 216, 81, 89, 206, 15, 125, 24, 15, 146, 7, 214, 91, 184, 171, 22, 49, 63, 170, 213, 181, 81, 163, 64,
    28, 14, 81, 217, 7, 192, 12, 181, 153, 192, 77, 11, 5, 15, 151, 192, 127, 181, 153, 47, 77, 9, 5, 25, 132, 192,
    77, 6, 7, 52, 12, 15, 146, 44, 29, 70, 15, 141, 5, 15, 155, 22, 21, 32, 7, 63, 51, 180, 181, 125, 92, 158, 16,
    54, 129, 81, 5, 42, 121, 38, 8, 7, 15, 53, 51, 46, 181, 81, 31, 8, 7, 15, 81, 127, 6, 169, 7, 145, 12, 15, 125,
    180, 92, 166, 5, 78, 130, 17, 92, 45, 31, 9, 7, 181, 99, 81, 92, 181, 23, 7, 2, 1, 199, 146, 12, 212, 149, 188,
    61, 12, 149, 91, 188, 5, 65, 4, 15, 78, 125, 5, 3, 93, 3, 3, 3, 3, 3, 2, 1, 30,
]  # fmt: skip


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
    assert renderer.prompts([GOLDEN_PAIR]) == [renderer.prompt(**GOLDEN_PAIR)] == [GOLDEN_IDS]
    engine = ScriptedEngine([renderer.encode_response(answer("3", "2", "1")), [*renderer.opening, renderer.eos_id]])
    judge(renderer, engine, [GOLDEN_PAIR, GOLDEN_PAIR])
    assert engine.prompts == [GOLDEN_IDS, GOLDEN_IDS]
    assert engine.sequences == [[*GOLDEN_IDS, *renderer.opening, *renderer.opening]]


@EACH
def test_prompt_reads_as_the_template_renders_it(name):
    """Pieces of the template glued with a lost line break; an answer closed by another token than the chat model's turn."""
    renderer = make_renderer(name)
    text, user = renderer.decode(renderer.prompt("winter", "the winter")), "Query: winter\nDocument: the winter"
    messages = [{"role": "system", "content": renderer.task.criteria}, {"role": "user", "content": user}]
    if name == "unigram":
        messages = [{"role": "user", "content": f"{renderer.task.criteria}\n\n{user}"}]
    expected = renderer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if name == "words":
        assert renderer.prompt("winter", "the winter") == renderer.tokenizer(expected, add_special_tokens=False).input_ids
    else:
        assert text == expected if name == "bpe" else "".join(text.split()) == "".join(expected.split())
    end = "<end_of_turn>" if name == "unigram" else "<|im_end|>"
    assert renderer.encode_response("winter")[-1] == renderer.eos_id == renderer.tokenizer.convert_tokens_to_ids(end)


def test_chat_templates_that_cannot_be_used():
    """No template (a base model's folder), one that drops or repeats the criteria without a word, or that fails."""
    no_template = "has no chat template; data/notes/model shows one"
    tokenizer = byte_level_bpe()
    tokenizer.name_or_path = "some/model"
    silent = "{{ messages[1:] | map(attribute='content') | join }}"
    for template, message in ((None, no_template), (silent, "drops or repeats"), ("{{ 1 / 0 }}", "division by zero")):
        tokenizer.chat_template = template
        with pytest.raises(TaskError, match=f"^some/model: .*{message}"):
            Renderer(make_task(), tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"  # without an end of turn
    assert Renderer(make_task(), tokenizer).eos_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(TaskError, match="no end-of-sequence token"):
        Renderer(make_task(), tokenizer)


def test_todays_date_is_frozen(tmp_path):
    """A template that names the day (Llama 3's, Mistral's): other prompts, and a useless cache, after midnight."""
    tokenizer = byte_level_bpe()
    day = "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}Today is {{ day }}.\n"
    tokenizer.chat_template = day + tokenizer.chat_template
    renderer = Renderer(make_task(), tokenizer)
    prompt = renderer.prompt("winter", "the winter")
    assert renderer.decode(prompt).startswith("Today is 01 Jan 2026.\n<|im_start|>")
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert "strftime_now(" not in again.chat_template and Renderer(make_task(), again).prompt("winter", "the winter") == prompt


def check_forbidden(renderer, text):
    """That a text becomes no special or added token but unk, as query, document, answer or criteria."""
    tokenizer, task = renderer.tokenizer, replace(make_task(), criteria=f"Say {text} in \\boxed{{grade}}.")
    forbidden = {*tokenizer.added_tokens_encoder.values(), *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    plain = [i for i in renderer.prompt("winter", "the winter") if i in forbidden]
    for prompt in (renderer.prompt(text, text), Renderer(task, tokenizer).prompt("winter", "the winter")):
        assert [i for i in prompt if i in forbidden] == plain
    assert [i for i in renderer.encode_response(text) if i in forbidden] == [renderer.eos_id]


@EACH
@example("winter".join(ESCAPES) + "\n ".join(ESCAPES) + "".join(ESCAPES * 2))
@given(st.lists(st.one_of(st.text(max_size=8), st.sampled_from(ESCAPES)), max_size=6).map("".join))
@QUICK
def test_no_text_becomes_a_special_token(name, text):
    """A document that closes the user's turn and writes the answer itself: untrusted text taken for control tokens."""
    renderer = make_renderer(name)
    check_forbidden(renderer, text)
    if name == "bpe":
        assert renderer.decode(renderer.encode_response(text)) == text + "<|im_end|>"


@EACH
def test_only_the_document_is_cut(name):
    """A cut that takes more than the document, is not counted or leaves no room; a prompt without any document."""
    task, tokenizer = make_task(), TOKENIZERS[name]()
    pair = "winter", "the winter " + "winter " * 50
    free = Renderer(task, tokenizer)
    short, long, tail = free.prompt("winter", "the winter"), free.prompt(*pair), free._tail
    for room, truncated in ((len(short) + 10, 1), (len(long), 0)):
        renderer = Renderer(task, tokenizer, room + 7 + len(free.opening), max_new_tokens=7)
        assert renderer.prompt(*pair) == long[: room - len(tail)] + tail and renderer.truncated == truncated
    assert short[-len(tail) :] == tail and free.truncated == 0
    record = grm.Record({"query": "winter", "document": "winter"})
    record.where = "x.jsonl:7"
    least = len(short) - len(free._encode(" the winter")) + 1
    Renderer(task, tokenizer, least + len(free.opening)).prompts([record])
    for context, missing in ((least - 1, 1), (5, least - 5)):
        with pytest.raises(TaskError, match=rf"x\.jsonl:7: .* leave the document no room .*\({missing} tokens"):
            Renderer(task, tokenizer, context + 50 + len(free.opening), 50).prompts([record])


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
    """Spans off by a token (credit on the wrong step), a minus sign lost, positions in characters, another verdict."""
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
    """A step judged by where it ends, not by what it does; an explanation's first one beside the answer's own box."""
    reasons, answers = (replace(make_task(), format=format) for format in grm.FORMATS)
    for task, labels, targets, right in [
        (reasons, "331", "311", [True, False, False]),  # the slip, and a cap that took away more than it should have
        (reasons, "100", "311", [False, False, True]),  # nothing is left to take, and nothing was to be
        (reasons, "322", "311", [True, False, True]),  # the slip alone
        (answers, "1322", "2321", [False, True, True, False]),
        (reasons, "", "311", []),  # malformed
    ]:
        assert grm.step_changes(grm.Trace([grm.Step(0, 1, label, 0) for label in labels]), list(targets), task) == right
    assert reasons.moves(["3", "1", "-1"]) == [4, -2, -2]
    assert replace(answers, steps=[]).moves(["1"]) == [2]


@EACH
def test_parse_malformed(name):
    """Credit for an answer that is cut off, boxes too little or too much, or goes on behind its end."""
    renderer = make_renderer(name)
    good = renderer.encode_response(answer("3", "2", "1"))
    box, end = renderer.encode_answer("\\boxed{1}"), renderer.eos_id
    foreign = [[i, *good] for i in (len(renderer.tokenizer), 10**12, -1, -len(renderer.tokenizer))]
    malformed = {
        "not ended": [[], good[:-1], [*good, good[0]], [end, *good[:-1]]],
        "missing boxes": [[end], renderer.encode_response("the winter")],
        "too many boxes": [[*good[:-1], *box, end], [*box, *good]],
        "unknown label": [renderer.encode_response(answer("3", label, "1")) for label in ("7", "", "2 2")],
        "a token that does not belong into an answer": [[*good, end], [*good[:3], end, *good[3:]], *foreign],
    }
    for problem, rows in malformed.items():
        for ids in rows:
            assert renderer.parse(ids) == grm.Trace(problem=problem), ids
    assert grm.reward(grm.Trace(problem="not ended"), "1") == 0.0


@pytest.mark.parametrize("name", TOKENIZERS)
@given(st.data())
@settings(QUICK, max_examples=100)
def test_parse_equals_the_naive_one(name, data):
    """A box that is missed or counted twice where the text is looked at piece by piece."""
    renderer = make_renderer(name)
    boxed = [renderer.encode_answer(f"\\boxed{{{text}}}") for text in (*GRADES, " 3 ", "", "4")]
    texts = ["}", "}}", "\\boxed{", "{", "\\boxed{ 3", "3}", " a ", "\\", "boxed", "咖啡}", answer("3", "-1", "1")]
    texts += ["\\boxed{-1}. \\boxed{1}.", "\\boxed{3}\\boxed{2}\\boxed{-1}"]
    known = [*boxed, *map(renderer._encode, texts), [renderer.eos_id]]
    known = st.one_of(st.sampled_from(known), st.integers(0, len(renderer.tokenizer) - 1).map(lambda i: [i]))
    ids = [i for part in data.draw(st.lists(known, max_size=14)) for i in part] + [renderer.eos_id]
    assert renderer.parse(ids) == parse(renderer, ids)


def test_parsing_takes_linear_time(monkeypatch):
    """Decoding from the start at each brace: seconds for an answer of 4,096 of them."""
    renderer = make_renderer("bpe")
    decode, decoded = renderer.decode, []
    monkeypatch.setattr(renderer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    renderer.parse([*renderer._encode("}") * 4096, renderer.eos_id])
    assert sum(decoded) < 6 * 4096


@pytest.mark.parametrize("format", grm.FORMATS)
def test_labels_that_merge_with_the_brace(monkeypatch, format):
    """Where "{-" is a token, -1 has two spellings, and its probability is that of both: an answer written naturally had no
    place to read it, and was read behind a second box. Of the first forward pass, where that goes through the position."""
    renderer = make_renderer("merging", format=format)
    assert [renderer.decode([i]) for i in renderer.read_ids] == ["-", "0", "1", "2", "3", "{", "{-"]
    assert all(len(renderer._encode(text)) == 1 for text in ("{-", "}.", "}\\"))
    settings = {"vocab_size": len(renderer.tokenizer), "max_position_embeddings": 512, "initializer_range": 0.1}
    plain, model = (make_model("qwen3", tree=tree, **settings) for tree in (False, True))
    texts = [answer(*labels) for labels in (("3", "2", "-1"), ("-1", "-1", "2"), ("0", "-1", "-1"))]
    texts[1] = texts[1].replace("}", "}.")  # which is one token, too
    if format == "answer-first":
        texts = ["\\boxed{-1} " + texts[0], "\\boxed{2} " + texts[1], "\\boxed{-1}" + texts[2]]
    answers = [[*renderer._encode(text), renderer.eos_id] for text in texts]
    answers[2] = renderer.encode_response(texts[2])  # each label by itself
    final = -1 if format == "reason-first" else 0
    places = [renderer.parse(ids).steps[final].label_at for ids in answers]
    found = [[renderer.decode([t]) for t in ids[at - 1 : at + 1]] for ids, at in zip(answers, places, strict=True)]
    assert found == [["boxed", "{-"], ["{", "2"], ["{", "-"]]
    engine = rollout.Engine(model, renderer.end_ids, renderer.read_ids, 200)
    script(monkeypatch, answers.__getitem__)
    asked, label_logits = [], engine.label_logits
    engine.label_logits = lambda prompts: asked.append(len(prompts)) or label_logits(prompts)
    for result, record, ids, at in zip(judge(renderer, engine, ASKED[:3]), ASKED, answers, places, strict=False):
        expected = label_probs(plain, renderer, renderer.prompt(**record), ids, at).tolist()
        assert list(result["probs"].values()) == pytest.approx(expected, rel=1e-4)
        assert result["label"] == renderer.parse(ids).label and result["well_formed"]
    assert asked == [1]  # behind the brace that the first answer does not have


def test_merged_tokens_that_coincide_are_refused():
    """Probability of "{p" given to partly and to perfectly, which are different tokens behind a brace of their own."""
    letters = [*"<>|imend_start\\boxDcuQyTW :.,{}-paelr\n"]
    merges = [("{", "p"), ("p", "a"), ("p", "e")]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *letters, *map("".join, merges)])}
    tokenizer = wrapped(Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>")), NO_SYSTEM, eos_token="<unk>")
    assert [tokenizer.tokenize(text)[0] for text in ("pa", "pe", "{pa", "{pe")] == ["pa", "pe", "{p", "{p"]
    with pytest.raises(TaskError, match="first tokens coincide"):
        Renderer(make_task(("pa", "pe")), tokenizer)


def test_label_at_is_never_another_token():
    """A label of an unusual token (" 3") whose usual one stands earlier: probabilities read in the middle of a word."""
    renderer = make_renderer("bpe")
    (unusual,) = renderer.tokenizer(" 3").input_ids
    ids = renderer.tokenizer("{3} \\boxed{ 3} x3 \\boxed{2} \\boxed {3 \\boxed{ 3}").input_ids
    first, second, last = renderer.parse([*ids, renderer.eos_id]).steps
    assert first.label_at in (None, ids.index(unusual)) and second.label_at and last.label_at is None
    engine = ScriptedEngine([[*ids, renderer.eos_id]])
    assert judge(renderer, engine, [GOLDEN_PAIR])[0]["label"] == "3"
    assert engine.sequences == [[*renderer.prompt(**GOLDEN_PAIR), *ids, *renderer.opening]]


@pytest.mark.parametrize("name", ["bpe", "unigram"])
@pytest.mark.parametrize("labels", [("no", "a bit", "fully"), ("poor", "11", "22", "-3")])
def test_word_labels(name, labels):
    """Labels of several tokens, also repeated ones, of which only a middle token or nothing is found."""
    renderer = make_renderer(name, labels)
    for label in labels:
        chosen = (labels[-1], label, labels[0])
        check_trace(renderer, renderer.encode_response(answer(*chosen)), chosen)
    assert renderer.parse(renderer.encode_response(answer(labels[0], "x", labels[0]))).problem == "unknown label"


def test_labels_that_cannot_be_told_apart_are_refused():
    """Labels that share the position they are read from, or come back as <unk>: every answer would be malformed, silently."""
    for case in ("bpe 1 10", "bpe good gum bad", "words apple pear", "words -1 0 apple", "words A a"):
        name, *labels = case.split()
        with pytest.raises(TaskError, match=r"first tokens coincide|cannot write"):
            make_renderer(name, tuple(labels))


@pytest.mark.parametrize("seed", range(4))
def test_metrics_against_scikit_learn(seed):
    """A macro F1 over absent classes, linear kappa weights, ties ordered by luck, queries without gain counted as 0."""
    rng = np.random.default_rng(seed)
    gold = rng.choice(5 if seed % 2 else 4, 150, p=[0.5, 0.2, 0.1, 0.1, 0.1] if seed % 2 else [0.4, 0.3, 0.2, 0.1])
    got = np.where(rng.random(150) < 0.5, gold, rng.integers(0, 5, 150))
    score = np.round(rng.normal(size=150) + gold, 0 if seed < 3 else 3)  # with ties, and with next to none
    query = np.minimum(rng.integers(0, 12, 150), 9)  # the last has more documents than k
    gold[query == 3] = 0
    as_written = rng.choice([int, str], 150)  # 1 and "1" are one query
    records = [{"label": GRADES[g], "query_id": kind(q)} for g, q, kind in zip(gold, query, as_written, strict=True)]
    out = metrics(make_task(), records, [{"label": GRADES[g], "grade": s} for g, s in zip(got, score, strict=True)])
    assert out["accuracy"] == pytest.approx(accuracy_score(gold, got))
    assert out["macro_f1"] == pytest.approx(f1_score(gold, got, labels=np.unique(gold), average="macro", zero_division=0))
    assert out["kappa"] == pytest.approx(cohen_kappa_score(gold, got, weights="quadratic", labels=range(5)))
    assert out["binary_accuracy"] == pytest.approx(accuracy_score(gold >= 3, got >= 3))
    gains = [ndcg_score([gold[query == q]], [score[query == q]], k=10) for q in range(10) if q != 3]
    assert out["ndcg@10"] == pytest.approx(np.mean(gains))
    assert out["malformed"] == 0.0 and {"step_accuracy", "ece"}.isdisjoint(out)
    assert [row[:5] for row in out["confusion"]["counts"]] == confusion_matrix(gold, got, labels=range(5)).tolist()


def test_metrics_of_malformed_answers():
    """A malformed answer counted as the last label (index -1), left out of the mean, or as irrelevant and so right."""
    gold, task = ["0", "1", "2", "3", "3"], make_task(("0", "1", "2", "3"))
    records = [{"label": label, "step_labels": ["3", "1", label], "query_id": "q"} for label in gold]
    well_formed = {"label": "3", "grade": 0.0, "probs": {"3": 0.8}, "steps": [{"label": step} for step in ("3", "0", "3")]}
    got = [{"label": None, "grade": 0.0, "steps": []}] * 4 + [well_formed]
    out = metrics(task, records, got)
    assert out["accuracy"] == out["binary_accuracy"] == pytest.approx(1 / 5)
    assert out["malformed"] == pytest.approx(4 / 5) and out["macro_f1"] == pytest.approx((2 / 3) / 4)
    assert out["kappa"] == pytest.approx(cohen_kappa_score([0, 1, 2, 3, 3], [3, 3, 0, 0, 3], weights="quadratic"))
    assert out["step_accuracy"] == pytest.approx({"topic": 1 / 5, "constraints": 0.0, "promotion": 1 / 5})
    counts = [[0, 0, 0, 0, 1]] * 3 + [[0, 0, 0, 1, 1]]
    assert out["confusion"] == {"rows": "gold", "columns": "predicted", "counts": counts}
    assert 0 < out["ndcg@10"] < 1 and out["ece"] == pytest.approx(0.2), "of the one answer that has a grade"
    assert "ece" not in metrics(task, records[:4], got[:4])


def test_metrics_without_signal_are_numbers():
    """NaN in a results file: one class only, no gain in any query; ranks in place of the labels' own numbers."""
    records = [{"label": "-1", "query_id": 1}, {"label": "-1", "query_id": 2}]
    out = metrics(make_task(), records, [{"label": "-1", "grade": 0.5}] * 2)
    assert out["kappa"] == 0.0 and out["ndcg@10"] == 0.0 and out["accuracy"] == 1.0
    assert math.isnan(grm.ndcg([0, 0], [1, 2])) and grm.ndcg([2], [0.1]) == 1.0
    assert make_task(("no", "some", "all")).grade([0.5, 0, 0.5]) == pytest.approx(1.0)
    np.testing.assert_allclose(make_task(("0", "10")).grade([[0.9, 0.1], [0, 1]]), [1.0, 10.0])


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


def test_criteria_mixed_in_a_batch(monkeypatch):
    """A prefix shared with a pair of other criteria, of which only the first words are the same."""
    renderer, shared, padded = speakers("reason-first")
    monkeypatch.setitem(renderer.task.others, "other.md", "Work in steps. Close with \\boxed{grade}.")
    mixed = [record | {"criteria": ("other.md", None)[i % 2]} for i, record in enumerate(ASKED)]
    plain = judge(renderer, padded, mixed)
    assert plain != judge(renderer, padded, ASKED)
    for got, expected in zip(judge(renderer, shared, mixed), plain, strict=True):
        assert got["answer"] == expected["answer"] and got["probs"] == pytest.approx(expected["probs"], rel=1e-3, abs=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The embedded model's folder with weights."""
    folder = shutil.copytree(NOTES / "model", tmp_path_factory.mktemp("trained") / "model")
    load_model(folder, seed=0)[0].save_pretrained(folder)
    return folder


def edit_tensor(folder, name, value):
    """Another tensor in a model's file; None for none."""
    tensors = load_file(folder / "model.safetensors") | {name: value}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", metadata={"format": "pt"})


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def make_classifier(folder):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("ForCausalLM", "ForSequenceClassification"))


BAD_MODELS = [
    (lambda folder: edit_tensor(folder, "model.norm.weight", None), r"left over, or .* kind: \['model.norm.weight'\]"),
    (lambda folder: edit_tensor(folder, "extra", torch.ones(2)), r"left over, or .* kind: \['extra'\]"),
    (lambda folder: edit_tensor(folder, "model.norm.weight", torch.ones(127)), "cannot be loaded"),
    (lambda folder: os.truncate(folder / "model.safetensors", 9999), "cannot be loaded"),
    (pickle_weights, "cannot be loaded: .*model.safetensors"),
    (make_classifier, "it is a classifier; the README shows how one is served"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_MODELS)
def test_load_model_refuses(tmp_path, trained, damage, message):
    """A traceback from the libraries, unpickled weights, or random numbers where a tensor is lost or another one."""
    folder = shutil.copytree(trained, tmp_path / "model")
    damage(folder)
    for seed in (None, 0):
        with pytest.raises(TaskError, match=rf"^{folder}: .*{message}.*\Z"):
            load_model(folder, seed=seed)


def test_a_path_that_is_not_there_is_no_hub_name(tmp_path, monkeypatch):
    """A minute of attempts to find runs/notes/model on the hub."""
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda source, **settings: 1 / 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in ("runs/notes/model", "runs/model", tmp_path / "model"):
        with pytest.raises(TaskError, match=f"^{path}: there is no such model; train.py writes one, or use --model$"):
            load_model(path)
    with pytest.raises(TaskError, match="division"):
        load_model("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_not_run(tmp_path, trained, monkeypatch, file):
    """A folder from anywhere that brings its own classes."""
    folder, proof = shutil.copytree(trained, tmp_path / "model"), tmp_path / "proof"
    (folder / "own.py").write_text(f"open({str(proof)!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    names = {"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", None]}
    own = {"auto_map": names, "model_type": "own", "tokenizer_class": "Own"}
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | own))
    with contextlib.suppress(TaskError):
        load_model(folder)
    assert not proof.exists()


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_every_end_of_a_model_ends_its_answers(tmp_path, trained, file):
    """Answers that run on behind <|eot|> to the limit, all malformed; sampling settings shipped with a model (temperature,
    penalties) that change its answers silently."""
    folder = shutil.copytree(trained, tmp_path / "model")
    Task.load(NOTES).save(folder)
    settings = {"do_sample": True, "repetition_penalty": 5.0}
    if file == "config.json":
        settings = json.loads((folder / file).read_text())
        (folder / "generation_config.json").unlink()
    (folder / file).write_text(json.dumps(settings | {"eos_token_id": [51, 50]}))
    assert load_model(folder)[0].generation_config == GenerationConfig(eos_token_id=[51, 50])
    renderer, engine = grm.load_judge(folder, max_new_tokens=60)
    assert renderer.eos_id == 2 and renderer.end_ids == engine.eos_id == [2, 50, 51]
    prompts, good = renderer.prompts(ASKED), renderer.encode_response(answer("3", "2", "1"))[:-1]
    for end in (2, 50, 51):
        assert renderer.parse([*good, end]).label == "1" and renderer.parse([*good, end, 2]).problem
        scripted = ScriptedEngine([[*good[:-2], end]])
        assert judge(renderer, scripted, ASKED[:1])[0]["answer"] == renderer.decode(good[:-2])
        assert scripted.sequences == [[*prompts[0], *good[:-2], *renderer.opening]]
    free = rollout.sample(engine.model, prompts, group_size=8, max_new_tokens=60, eos_id=-1)
    ended = engine.sample(prompts, group_size=8)
    last = set()
    for ids, whole in zip(chain(*ended.answers), chain(*free.answers), strict=True):
        at = next((i for i, token in enumerate(whole) if token in renderer.end_ids), 60)
        assert ids == whole[: at + 1]
        last.add(ids[-1])
    assert {2, 50, 51} <= last


@EACH
def test_judge_reads_the_label_where_the_model_wrote_it(name):
    """Probabilities read behind the label, before the opening, at an earlier step's box, or of another answer."""
    renderer = make_renderer(name)
    good, broken = renderer.encode_response(answer("3", "2", "-1")), renderer.encode_response("the winter")
    records = [{"query": "winter", "document": "the winter"}] * 3
    engine = ScriptedEngine([broken, good, broken[:-1]])
    ended, ok, cut = judge(renderer, engine, records)
    assert engine.sequences == [[*renderer.prompts(records)[0], *broken[:-1], *renderer.opening]] * 2
    traces = [renderer.parse(ids) for ids in engine.answers]
    logits_NY = grm.read_labels(renderer, engine, [[]] * 3, engine.answers, engine.written, traces)
    rows = [engine.next[0], engine.written[1][traces[1].steps[-1].label_at], engine.next[1]]
    assert torch.equal(logits_NY, torch.stack(rows)) and renderer.read_ids == renderer.label_ids
    check_probs(ended, engine.next[0])
    check_probs(ok, engine.written[1][renderer.parse(good).steps[-1].label_at])
    check_probs(cut, engine.next[1])
    assert (ok["label"], ok["well_formed"], ok["problem"]) == ("-1", True, None)
    assert {step["step"]: step["label"] for step in ok["steps"]} == {"topic": "3", "constraints": "2", "promotion": "-1"}
    assert (ended["label"], ended["well_formed"], ended["problem"], ended["steps"]) == (None, False, "missing boxes", [])
    assert (cut["label"], cut["problem"]) == (None, "not ended")


@EACH
def test_answer_first_pays_for_no_generation(name):
    """A whole answer generated for a score that one prefill gives, or the score read at another place when explained."""
    renderer = make_renderer(name, format="answer-first")
    record = {"query": "winter", "document": "the winter"}
    forced = [*renderer.prompt(**record), *renderer.opening]
    engine = ScriptedEngine()
    engine.generate = None
    result = judge(renderer, engine, [record], explain=False)[0]
    check_probs(result, engine.next[0])
    assert engine.sequences == [forced] and result["label"] == GRADES[engine.next[0].argmax()] and result["well_formed"]
    whole = renderer.encode_response("\\boxed{1} " + answer("3", "1", "0"))
    engine = ScriptedEngine([renderer.encode_response("the winter"), whole, whole[: len(renderer.opening)]])
    elsewhere, explained, cut = judge(renderer, engine, [record] * 3)
    check_probs(elsewhere, engine.next[0])
    check_probs(explained, engine.written[1][len(renderer.opening)])
    check_probs(cut, engine.next[1])
    assert engine.sequences == [forced, forced] and [step["label"] for step in explained["steps"]] == ["1", "3", "1", "0"]


def run(monkeypatch, *arguments):
    """grm.py with these arguments; returns what it exits with (None: well)."""
    monkeypatch.setattr(sys, "argv", ["grm.py", *map(str, arguments)])
    try:
        return parallel.launch(SCORE["main"], errors=(TaskError, rollout.UnsupportedModelError))
    except SystemExit as stop:
        return stop.code


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def score(tmp_path, trained, monkeypatch):
    """A function that runs `score` on in.jsonl, seven pairs, into out.jsonl, with Ctrl-C behind so many batches."""
    pairs = [
        {**pair, "id": i, "where": "own", "criteria": "criteria.md"}
        for i, pair in enumerate(notes_files()[1]["test_longtail"][:7])
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = {"model": trained, "task": NOTES, "pairs": tmp_path / "in.jsonl", "out": tmp_path / "out.jsonl"}
    settings |= {"batch_size": 2, "max_new_tokens": 3}

    def score(*flags, batches=9, **changes):
        left = iter([judge] * batches + [None])  # whose call stands for an interrupt
        monkeypatch.setattr(grm, "judge", lambda *args: (next(left) or stop)(*args))
        flags = [*flags, *(f"--{name}={value}" for name, value in (settings | changes).items() if value is not None)]
        return run(monkeypatch, "score", *flags)

    def stop(*args):
        raise KeyboardInterrupt  # not by a signal, which a shell's background job ignores

    return score


def test_score_resumes_as_if_never_stopped(score, tmp_path, capsys):
    """Lines lost, doubled or glued to half a line after a stop, or numbers that tell: another batch is rounded otherwise."""
    out, partial, its_settings = (tmp_path / f"out.jsonl{end}" for end in ("", ".partial", ".partial.json"))
    assert score() is None
    shown, scores = capsys.readouterr().out, json.loads((tmp_path / "out.jsonl.metrics.json").read_text())
    assert "7 pairs, 7 malformed" in shown and re.search(r"macro-F1.*\nmodel +in +0\.000", shown)
    assert scores["malformed"] == 1 and np.sum(scores["confusion"]["counts"]) == 7
    for pair, result in zip(lines(tmp_path / "in.jsonl"), lines(out), strict=True):
        assert result["gold"] == pair["label"] and result["label"] is None and result["well_formed"] is False
        assert all(result[name] == pair[name] for name in ("id", "query", "document", "step_labels", "where"))
        assert sum(result["probs"].values()) == pytest.approx(1.0) and "answer" not in result
    whole, made = out.read_bytes(), ["out.jsonl", "out.jsonl.metrics.json"]
    out.unlink()
    assert "stopped; the same command goes on" in score(batches=2)
    written, settings = partial.read_bytes(), its_settings.read_bytes()
    assert not out.exists() and whole.startswith(written) and len(written.splitlines()) == 4
    for kept, left in ((written, 2), (written[:-40], 3), (written[:9], 4), (whole, 0)):
        partial.write_bytes(kept)
        its_settings.write_bytes(settings)
        assert score(batches=left) is None  # what is done is not done again
        assert out.read_bytes() == whole and sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", *made]
        out.unlink()


def test_score_refuses_to_mix_or_overwrite(score, tmp_path):
    """Results of other pairs or of two settings in one file, more than there are pairs, half a line; an earlier result gone."""
    path, out, partial = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "out.jsonl.partial"))
    assert "stopped; the same command goes on" in score(batches=2)
    pairs, before = path.read_bytes(), partial.read_bytes()
    for its_pairs, results, changes, what in (
        (pairs, before, {"batch_size": 3}, "--batch_size 2"),
        (pairs, before, {"max_new_tokens": 4}, "--max_new_tokens 3"),
        (pairs.replace(b'"document": "', b'"document": "my ', 1), before, {}, "other pairs"),
        (b"".join(pairs.splitlines(keepends=True)[:3]), before, {}, "other pairs"),
        (pairs.replace(b', "criteria": "criteria.md"', b"", 1), before, {}, "other pairs"),
        (pairs, before.replace(b'"grade"', b'"grade', 1), {}, "other pairs"),
    ):
        path.write_bytes(its_pairs)
        partial.write_bytes(results)
        assert f"{partial}: was begun with {what}; delete it" in score(**changes)
        assert partial.read_bytes() == results and not out.exists()
    out.write_text("mine")
    assert "exists; delete it or choose another name" in score() and out.read_text() == "mine"


def test_answers_are_as_long_as_the_model_was_trained_to_give(score, trained, tmp_path):
    """128 tokens for a model that reasons in 500: every answer cut, none well-formed."""
    model = shutil.copytree(trained, tmp_path / "model")
    for written, length in (('{"max_new_tokens": 5}', 5), ("{}", 128)):
        (model / "generation_config.json").write_text(written)
        assert score("--explain", model=model, max_new_tokens=None, out=tmp_path / f"{length}.jsonl") is None
        answers = [result["answer"] for result in lines(tmp_path / f"{length}.jsonl")]
        assert max(map(len, make_renderer("words").tokenizer(answers).input_ids)) == length


def test_score_names_bad_input_before_any_work(score, tmp_path, monkeypatch):
    """Hours of scoring that end at a bad line; an empty result that looks complete, or a traceback out of range()."""
    path = tmp_path / "in.jsonl"
    good, too_long = path.read_text(), json.dumps({"query": "winter " * 500, "document": "d", "query_id": 1})
    strange = json.dumps({"query": "winter", "document": "zebras winter " * 20, "query_id": 1})
    no_room = "in.jsonl:8: criteria, query and answer leave the document no room"
    for bad, message in (
        ("{", "in.jsonl:8: is no JSON: Expecting property name"),
        (too_long, no_room),
        (strange, r"its tokenizer does not know .*% of the words, such as \['zebras', .*; choose a model"),
    ):
        path.write_text(good + bad)
        assert re.search(message, score(batches=0))
    path.write_text(good)
    monkeypatch.setattr(rollout, "check_model", lambda model, position: 1 / (position - 3 - longest))
    longest = max(map(len, notes_files()[2].prompts(lines(path))))
    with pytest.raises(ZeroDivisionError):  # the model is checked up to the longest answer's end
        score(batches=0)
    assert "must be at least 1" in score(batch_size=0) and "must be at least 1" in score(max_new_tokens=0)
    assert [*tmp_path.iterdir()] == [path]


def test_weights_that_are_not_finite(score, trained, tmp_path):
    """Index 2047 is out of bounds, or malformed answers: a diverged model says so, in a line."""
    model = shutil.copytree(trained, tmp_path / "model")
    edit_tensor(model, "model.norm.weight", torch.full([128], math.nan))
    assert score(model=model) == "the model's logits are not finite: its weights have diverged"
    engine = rollout.Engine(rollout.use_tree_attention(load_model(model)[0]), 2, [], 3)
    with pytest.raises(FloatingPointError, match="weights have diverged"):
        engine.sample([[1, 5, 6]])


def test_score_keeps_what_it_is_given(score, tmp_path, capsys):
    """The model's own label taken for the gold one; a lone surrogate in a field, which is no UTF-8 and ends the run midway."""
    fields = {'"label": "3", "gold": "1"': "1", '"label": "3"': "3", '"gold": 7': 7, '"label": null, "note": "\\ud800"': None}
    for i, (field, gold) in enumerate(fields.items()):
        (tmp_path / "in.jsonl").write_text(f'{{"query": "winter 咖啡", "document": "\\u2028 in{" kids" * 40}", {field}}}\n')
        assert score("--explain", out=tmp_path / f"{i}.jsonl") is None
        (result,) = lines(tmp_path / f"{i}.jsonl")
        assert result["query"] == "winter 咖啡" and result.get("gold") == gold
        assert result["problem"] == "not ended" and result["answer"] and result["steps"] == []
        shown = capsys.readouterr().out
        assert ("accuracy" in shown) == (gold in GRADES) == (tmp_path / f"{i}.jsonl.metrics.json").exists()
        assert re.search(r"warning: .* does not know 2\.\d% of the words, such as \['咖啡'\]", shown)  # few: only said
    assert result["note"] == "\ud800"


def test_a_model_knows_what_it_was_trained_for(trained, tmp_path, monkeypatch):
    """Its folder's criteria serve where --task is not given; a task of another format is refused, other criteria are not."""
    model, task = shutil.copytree(trained, tmp_path / "model"), Task.load(NOTES)
    judged = lambda *more: run(monkeypatch, "judge", "--model", model, "--max_new_tokens", 2, *more, "winter", "kids")
    assert re.search(
        r"criteria.md: No such file.*; --task names a folder that has it, --model one that train.py wrote", judged()
    )
    task.save(model)
    replace(task, criteria="Anything with \\boxed{grade}.").save(tmp_path)
    assert judged() is None and judged("--task", tmp_path) is None
    for name, other in (("format", "answer-first"), ("steps", ["topic", "promotion"]), ("labels", ["-2", *GRADES])):
        replace(task, **{name: other}).save(tmp_path)
        assert re.search(rf"model: was trained for .*{name}", judged("--task", tmp_path))


def test_judge_prints_the_steps_and_the_distribution(monkeypatch, capsys):
    """A step beside another's name, the mark at the most probable label instead of the answer, a malformed answer unseen."""
    renderer = make_renderer("words")
    ids = renderer.encode_response(answer("3", "2", "-1"))
    engine = ScriptedEngine([ids])
    engine.model, engine.max_new_tokens = "its model", 9
    checked = [("its model", len(renderer.prompt("winter", "kids")) + 9)]
    monkeypatch.setattr(rollout, "check_model", lambda *args: checked.remove(args))
    probs = torch.tensor([0.25, 0.5, 0.125, 0.125, 0.0])
    engine.written[0][renderer.parse(ids).steps[-1].label_at] = probs.log()
    monkeypatch.setattr(grm, "load_judge", lambda *args: (renderer, engine))
    assert "does not know 100.0% of the words" in run(monkeypatch, "judge", "--model", "m", "q", "d")
    assert run(monkeypatch, "judge", "--model", "m", "winter", "kids") is None and not checked
    shown = capsys.readouterr().out.splitlines()
    for line, name, text in zip(shown[:3], renderer.task.steps, ("topic", "the winter", "a winter"), strict=True):
        assert re.fullmatch(rf" *{name} \| {text} \\boxed ?{{.*}}", line), line
    bars = [f"{label:>14} | {'#' * round(40 * p):<40} {p:.3f}" for label, p in zip(GRADES, probs.tolist(), strict=True)]
    assert shown[3:] == [bars[0] + " <- answer", *bars[1:], "      expected | 0.12"]


def test_copied_alone(tmp_path, trained):
    """A project file imported where this one is copied to; its commands, and only these, need the others."""
    (tmp_path / "docs").mkdir()
    for name in ("grm.py", "rollout.py", "parallel.py", "docs/score.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "grm.py", "judge", f"--model={trained}", f"--task={NOTES}", "--max_new_tokens=2", "kids", "kids"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=clean)
    assert done.returncode == 0 and done.stdout.startswith("malformed answer (not ended)"), done.stderr
    nodes = ast.parse((tmp_path / "grm.py").read_text()).body  # not those in functions
    names = [n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in nodes if hasattr(n, "names")]
    needed = {"torch", "transformers", "numpy", "yaml", "jinja2"}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == needed
