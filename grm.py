"""The task: criteria, prompt, answers, parsing, reward, metrics, scoring.      (what is relevance?)

A task is a folder with a `criteria.md` (front matter: labels, steps, format; body: the system
prompt) and JSON Lines. The model reads criteria, query and document, reasons in steps, closes each
with \\boxed{label}, and one box is its answer. All that is trained or parsed is token ids: text is
tokenised once, and ids are never decoded and encoded again.

    python grm.py score --model DIR --pairs IN.jsonl --out OUT.jsonl    # docs/score.py
    python grm.py judge --model DIR "query" "document"                 # likewise
    python grm.py check TASK [--model DIR]                             # data/check.py

This file needs torch, transformers (with jinja2), numpy and pyyaml only; copy it alone.
Shapes: N answers, T positions of an answer, Y labels.
"""

import argparse
import codecs
import contextlib
import json
import math
import os
import re
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from jinja2.exceptions import TemplateError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
)

BOX = re.compile(r"\\boxed\{([^{}]*)\}")
FORMATS = ("reason-first", "answer-first")
FRONT_MATTER = {"labels", "relevant", "steps", "format"}
MOST_UNKNOWN = 0.03  # share of words that a tokenizer may not know
DATE = "01 Jan 2026"  # today's, for chat templates that name it


class TaskError(ValueError):
    """Input that cannot be used. One line a problem, `file:line: what is wrong` where it can."""


# The task folder ----------------------------------------------------------------------------------


class Record(dict):
    """A line of a JSON Lines file, with whatever fields it has. where: "file:line"."""

    where = "pair"


@dataclass
class Task:
    """A task folder.

    criteria: the system prompt. labels: from worst to best. relevant: those that count as relevant.
    steps: names of the reasoning steps. format: "reason-first" or "answer-first".
    """

    folder: Path
    criteria: str
    labels: list[str]
    relevant: list[str]
    steps: list[str]
    format: str
    others: dict = field(default_factory=dict, compare=False)  # {file name: criteria}, once read

    @classmethod
    def load(cls, folder, name="criteria.md"):
        """Read and check `folder`/`name`. Raises TaskError that names file and field."""
        path = Path(folder) / name
        try:
            text = path.read_text(encoding="utf-8-sig")
            parts = re.split(r"^---[ \t]*$", text, maxsplit=2, flags=re.MULTILINE)
            if len(parts) != 3 or parts[0].strip():
                raise ValueError("it begins otherwise")
            # The base loader keeps values as they are written: elsewhere in YAML 1.1, no is False.
            head = yaml.load(parts[1], Loader=yaml.BaseLoader)
            if not isinstance(head, dict) or head.keys() != FRONT_MATTER:
                raise ValueError(f"it has {', '.join(head or ['nothing'])}")
        except OSError as error:
            what = "--task names a folder that has it, --model one that train.py wrote"
            raise TaskError(f"{path}: {error.strerror}; {what}") from None
        except (TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
            what = "must begin with labels, relevant, steps and format, YAML between lines of ---"
            raise TaskError(f"{path}: {what}: {' '.join(str(error).split())}") from None
        task = cls(folder=Path(folder), criteria=parts[2].strip(), **head)
        if problem := task._problem():
            raise TaskError(f"{path}: {problem}")
        return task

    def _problem(self):
        """What is wrong with the front matter or the criteria, or None."""
        for name in ("labels", "relevant", "steps"):
            values = getattr(self, name)
            if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
                return f"{name} must be a list, such as [no, yes]"
            values = ["".join(value.split()) for value in values]  # as boxes are compared
            if len(set(values)) < len(values) or any(not v or set("{}") & set(v) for v in values):
                return f"{name} must not repeat a value nor contain braces, nor an empty value"
        if len(self.labels) < 2:
            return "labels needs two or more values"
        best = self.labels[len(self.labels) - len(self.relevant) :]
        if not self.relevant or set(self.relevant) != set(best):
            what = "relevant must be the last of labels, which go from worst to best"
            return f"{what}, not {self.relevant}"
        if self.format not in FORMATS:
            return f"format must be one of {', '.join(FORMATS)}, not {self.format!r}"
        if self.format == "reason-first" and not self.steps:
            return "a reason-first task needs at least one step, the last of which gives the label"
        if "\\boxed{" not in self.criteria:
            return "the criteria must tell the model to close each step with \\boxed{label}"
        return None

    def save(self, folder, name="criteria.md"):
        """Write criteria.md into a folder: beside a model, it says what that was trained for."""
        head = {name: getattr(self, name) for name in ("labels", "relevant", "steps", "format")}
        front = yaml.safe_dump(head, sort_keys=False, width=math.inf, allow_unicode=True)
        text = f"---\n{front}---\n{self.criteria}\n"
        (Path(folder) / name).write_text(text, encoding="utf-8")

    def check_model(self, folder):
        """Raise TaskError if a model's folder was trained for other labels, steps or format."""
        if not (Path(folder) / "criteria.md").is_file():
            return
        trained_for = Task.load(folder)
        for name in ("format", "steps", "labels"):
            theirs = getattr(trained_for, name)
            if theirs != getattr(self, name):
                raise TaskError(f"{folder}: was trained for other {name}, {theirs}")

    def criteria_of(self, name):
        """The criteria in NAME.md of the folder, None: the task's own. Raises TaskError."""
        if name is None:
            return self.criteria
        if not re.fullmatch(r"[^/\\]+\.md", str(name)):
            raise TaskError(f"'criteria' must be NAME.md, in the task's folder, not {name!r}")
        if name not in self.others:
            task = Task.load(self.folder, name)
            if (task.labels, task.steps, task.format) != (self.labels, self.steps, self.format):
                raise TaskError(f"{self.folder / name}: has other labels, steps or format")
            self.others[name] = task.criteria
        return self.others[name]

    @property
    def boxes(self):
        """Names of an answer's boxes; an answer-first answer begins with the label's own."""
        return self.steps if self.format == "reason-first" else ["label", *self.steps]

    def moves(self, labels):
        """How far each box moves the grade, in places of `labels`, from 0; answer-first, the steps
        begin again from 0 behind the label's own box.
        """
        places = [self.labels.index(label) for label in labels]
        before = [0, *places]
        if self.format == "answer-first":
            before[1:2] = [0]
        return [place - start for place, start in zip(places, before, strict=False)]

    def read(self, path, required=("label",)):
        """Read a JSON Lines file of pairs, checked: query, document, and what is `required` of
        label and response. Returns Records. Raises TaskError: for each fault the first bad line.
        """
        records = []
        problems = {}  # {what is wrong: where first}
        for number, line in enumerate(read_lines(path), 1):
            where = f"{path}:{number}"
            try:
                if line.strip():
                    records.append(Record(self.check(json.loads(line), required)))
                    records[-1].where = where
            except json.JSONDecodeError as error:
                problems.setdefault(f"is no JSON: {error.msg}", where)
            except (ValueError, RecursionError) as error:
                problems.setdefault(str(error), where)
        with_id = [record for record in records if "query_id" in record]
        without = [record for record in records if "query_id" not in record]
        if with_id and without:
            missing = "no query_id, which other pairs have: give it to all or none"
            problems[missing] = without[0].where
        if not records and not problems:
            problems["holds no pairs"] = path
        if problems:
            lines = [f"{where}: {problem}" for problem, where in problems.items()]
            raise TaskError("\n".join(lines))
        return records

    def check(self, record, required=()):
        """A record with its labels as strings. Raises ValueError that says what is wrong."""
        if not isinstance(record, dict):
            raise TaskError("must be a JSON object")
        self.criteria_of(record.get("criteria"))
        texts = {"query", "document", *required} - {"label"}
        for name in sorted(texts):
            if not isinstance(record.get(name), str) or not record[name].strip():
                raise TaskError(f"{name!r} is missing, empty or not a string")
            record[name].encode("utf-8")  # raises for lone surrogates, which cannot be tokenised
        if record.get("label") is None and "label" not in required:
            record.pop("label", None)
        else:
            record["label"] = self._label(record.get("label"))
        if not self.steps:  # of the task's other form: there is nothing to compare them with
            record.pop("step_labels", None)
        if "step_labels" in record:
            steps = record["step_labels"]
            if not isinstance(steps, list) or len(steps) != len(self.boxes):
                raise TaskError(f"'step_labels' must be a label each for {', '.join(self.boxes)}")
            record["step_labels"] = [self._label(label) for label in steps]
        return record

    def _label(self, value):
        if isinstance(value, float) and str(value) not in self.labels and value.is_integer():
            value = int(value)  # spreadsheets write 2.0
        if str(value) not in self.labels:
            raise TaskError(f"unknown label {value!r}; the labels are {', '.join(self.labels)}")
        return str(value)

    def grade(self, probs_NY):
        """Expected grades [N] of label probabilities: the labels' numbers, or ranks if words."""
        try:
            values_Y = [float(label) for label in self.labels]
        except ValueError:
            values_Y = range(len(self.labels))
        return np.asarray(probs_NY) @ np.asarray(values_Y, dtype=np.float64)


def read_lines(path):
    """Lines of a JSON Lines file. Raises TaskError that says what the file is instead."""
    path = Path(path)
    table = path.with_suffix(".csv")
    if table.is_file() and not path.is_file():
        raise TaskError(f"{path}: is not there; data/from_csv.py makes a task of {table}")
    content = path.read_bytes()
    if b"\0" in content[:100]:
        raise TaskError(f"{path}: is UTF-16; save the file as UTF-8")
    start = content.removeprefix(codecs.BOM_UTF8).lstrip()[:40].partition(b"\n")[0]
    if start and not start.startswith(b"{"):
        start = start.decode(errors="replace").strip()
        what = "JSON Lines are an object a line; data/from_csv.py reads tables"
        raise TaskError(f"{path}: begins with {start!r}; {what}")
    try:
        return content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].count(b"\n")
        raise TaskError(f"{path}:{line}: is not UTF-8; save the file as UTF-8") from None


def setting(default, text):
    """A field of a settings dataclass: its default and its help text."""
    return field(default=default, metadata={"help": text.replace("%", "%%")})


def check_numbers(config, least):
    """Raise TaskError for a setting that is not finite, or below `least` of its name, or else 0."""
    for name, value in vars(config).items():
        bound = least.get(name, 0)
        if not isinstance(value, str) and not bound <= value < math.inf:  # NaN compares to nothing
            raise TaskError(f"--{name}: must be a number of at least {bound}, not {value}")


def parse_settings(config_class, file_name, argv=None):
    """Settings from the command line, then TASK/`file_name` (JSON), then the dataclass's defaults;
    unknown names and wrong types end the program with a usage message, which names the file. Rank 0
    prints those that are not the default, with where they come from.
    """
    parser = HfArgumentParser(config_class, allow_abbrev=False)
    path = Path(parser.parse_known_args(argv)[0].task) / file_name
    text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
    try:
        values = json.loads(text)
    except ValueError as error:
        raise TaskError(f"{path}: is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise TaskError(f"{path}: must be a JSON object, {{setting: value}}")
    for name, value in values.items():
        if not hasattr(config_class, name):
            raise TaskError(f"{path}: there is no setting {name}")
        if isinstance(value, str) and not isinstance(getattr(config_class, name), str):
            raise TaskError(f"{path}: {name} must be without quotes, not {value!r}")
    flags = [f"--{name}={value}" for name, value in values.items()]
    usage = "{setting: value, ...}"  # instead of every flag
    in_file = HfArgumentParser(config_class, prog=path, usage=usage).parse_args(flags)
    given = parser.parse_args(argv, argparse.Namespace(**vars(in_file)))
    sources = {path: [], "the command line": []}
    for name, value in vars(given).items():
        if value != getattr(config_class, name):
            source = path if value == getattr(in_file, name) else "the command line"
            sources[source].append(f"--{name} {value}")
    for source, settings in sources.items():
        if settings and os.environ.get("RANK", "0") == "0":
            print(f"{' '.join(settings)}  ({source})")
    return config_class(**vars(given))


# Prompts and answers as token ids -----------------------------------------------------------------


@dataclass
class Step:
    """One step of an answer: its tokens are ids[start:end], box included. label_at: where its label
    begins; None if the answer spells it with unusual tokens.
    """

    start: int
    end: int
    label: str
    label_at: int | None


@dataclass
class Trace:
    """A parsed answer. problem is None if it is well-formed; else it has no steps and no label."""

    steps: list[Step] = field(default_factory=list)
    label: str | None = None
    problem: str | None = None


class Renderer:
    """A task in one tokenizer's ids: the one prompt builder, and the one parser, of the project.

    context: tokens of the model's context; prompts are cut, in the document alone, so that an
        answer of max_new_tokens and a forced "\\boxed{" fit behind them. None: no limit.
    end_ids: None, or what else ends the model's answers, an id or a list (its generation_config's).
    Attributes: truncated counts the documents that were cut; eos_id ends an answer, as the chat
    template ends the assistant's turn; end_ids are it and the others; opening holds the ids of
    "\\boxed{"; label_ids the id with which each label begins behind it, all different; read_ids are
    these and, where text usually merges a label with the brace ("{-" is a token of many
    vocabularies), the brace and the merged ids, of `merged`: {label: id}.
    Raises TaskError without a usable chat template, or if the labels' first tokens coincide.
    """

    CRITERIA = "<<grm:criteria>>"
    QUERY = "<<grm:query>>"
    DOCUMENT = "<<grm:document>>"
    ANSWER = "<<grm:answer>>"

    def __init__(self, task, tokenizer, context=None, max_new_tokens=0, end_ids=None):
        self.task = task
        self.tokenizer = tokenizer
        self.truncated = 0
        self._size = len(tokenizer)
        self._added = set(tokenizer.added_tokens_encoder.values()) | set(tokenizer.all_special_ids)
        self._closers = {
            i for token, i in tokenizer.get_vocab().items() if "}" in token or token == "<0x7D>"
        }
        self._read_template()
        ends = end_ids if isinstance(end_ids, list) else [end_ids]
        self.end_ids = sorted({self.eos_id, *ends} - {None})
        self._read_labels()
        self.max_prompt_tokens = None
        if context is not None:
            self.max_prompt_tokens = context - max_new_tokens - len(self.opening)

    def _read_template(self):
        """Cut the rendered chat template at criteria, query and document; find the turn's end."""
        source = self.tokenizer.name_or_path
        template = self.tokenizer.chat_template
        if not template:
            raise TaskError(f"{source}: has no chat template; data/notes/model shows one")
        if isinstance(template, str):  # today's date would change prompts overnight
            frozen = re.sub(r"strftime_now\([^()]*\)", repr(DATE), template)
            self.tokenizer.chat_template = frozen
        user = f"Query: {self.QUERY}\nDocument: {self.DOCUMENT}"
        system = {"role": "system", "content": self.CRITERIA}
        # Some templates (Gemma's) know no system turn: the criteria lead the user's.
        led = {"role": "user", "content": f"{self.CRITERIA}\n\n{user}"}
        try:
            try:
                prompt, turn = self._render([system, {"role": "user", "content": user}])
            except TemplateError:
                prompt, turn = self._render([led])
        except Exception as error:  # whatever a foreign template makes the libraries raise
            raise TaskError(f"{source}: no chat template that works: {error}") from error
        pieces = re.split(f"{self.CRITERIA}|{self.QUERY}|{self.DOCUMENT}", prompt)
        if len(pieces) != 4 or self.ANSWER not in turn:
            raise TaskError(f"{source}: its chat template drops or repeats a message")
        # The space before query and document belongs to their first word, as in running text.
        head, query, document, tail = pieces
        self._around = [self._encode(x, special=True) for x in (head, query.rstrip(" "))]
        self._heads = {}  # ids before the query, by what a record names as its criteria
        self._middle = self._encode(document.rstrip(" "), special=True)
        self._tail = self._encode(tail, special=True)
        behind_answer = self._encode(turn.split(self.ANSWER, 1)[1], special=True)
        self.eos_id = self.tokenizer.eos_token_id
        if behind_answer and behind_answer[0] in self._added:
            self.eos_id = behind_answer[0]
        if self.eos_id is None:
            raise TaskError(f"{source}: has no end-of-sequence token")

    def _render(self, messages):
        """The chat template's text: up to the assistant's turn, and with a whole turn."""
        # enable_thinking=False (Qwen3 and relatives): the task's own steps are the reasoning.
        settings = {"tokenize": False, "enable_thinking": False}
        render = self.tokenizer.apply_chat_template
        answer = {"role": "assistant", "content": self.ANSWER}
        prompt = render(messages, add_generation_prompt=True, **settings)
        return prompt, render([*messages, answer], **settings)

    def _encode(self, text, special=False):
        """Ids of a text. Unless `special`, nothing in it becomes an added token: it is spelled."""
        # verbose=False: no warning about length; what is too long is reported in `prompt`.
        settings = {"add_special_tokens": False, "verbose": False}
        ids = self.tokenizer(text, split_special_tokens=not special, **settings).input_ids
        if special or self._added.isdisjoint(ids):
            return ids
        # split_special_tokens splits special tokens alone; other added ones (<think>) are here.
        plain = []
        for i in ids:
            if i not in self._added or i == self.tokenizer.unk_token_id:
                plain.append(i)
                continue
            for letter in self.tokenizer.convert_ids_to_tokens(i):
                spelled = self.tokenizer(letter, split_special_tokens=True, **settings).input_ids
                plain += [j for j in spelled if j not in self._added]
        return plain

    def _read_labels(self):
        """Find the ids of "\\boxed{" and of every label behind it, tokenised by itself: merged with
        its brace ("{-" is a token of many vocabularies), -1 would begin elsewhere than others.
        """
        self.opening = self._encode("\\boxed{")
        self._labels = {label: self._behind_brace(label) for label in self.task.labels}
        self.label_ids = [ids[0] if ids else None for ids in self._labels.values()]
        path = self.task.folder / "criteria.md"
        unknown = self.tokenizer.unk_token_id
        unwritten = [label for label, ids in self._labels.items() if not ids or unknown in ids]
        if unwritten:
            source = self.tokenizer.name_or_path
            raise TaskError(f"{source}: its tokenizer cannot write the labels {unwritten}")
        stem = len(self.opening) - 1
        usual = {label: self._encode("\\boxed{" + label)[stem] for label in self._labels}
        self.merged = {label: i for label, i in usual.items() if i != self.opening[-1]}
        for first_ids in (self.label_ids, self.merged.values()):
            if len(set(first_ids)) < len(first_ids):
                raise TaskError(f"{path}: labels whose first tokens coincide: {self._labels}")
        self.read_ids = self.label_ids
        if self.merged:
            self.read_ids = [*self.label_ids, self.opening[-1], *self.merged.values()]
        # Labels as this tokenizer writes them: a word-level one may lower-case or space them.
        self._known = {}
        for label in self.task.labels:
            self._known[self._boxed(self.encode_answer(f"\\boxed{{{label}}}"))[-1]] = label

    def _behind_brace(self, text):
        """Ids of a text behind "\\boxed{": no token spans the brace or brings a space with it."""
        ids = self._encode("\\boxed{" + text)
        start = len(self.opening)
        return ids[start:] if ids[:start] == self.opening else self._encode(text)

    def encode_answer(self, text):
        """Ids of an answer's text, every label in a box tokenised by itself."""
        # text, what a box holds, text, what a box holds, ..., text
        pieces = re.split(r"(?<=\\boxed\{)([^{}]*)(?=\})", text)
        ids = self._encode(pieces[0])
        for i, piece in enumerate(pieces[1:], 1):
            label = self._labels.get(piece.strip()) if i % 2 else None
            ids += label or self._behind_brace(piece)
        return ids

    def encode_response(self, text):
        """Ids of a demonstration's answer, closed by eos_id."""
        return [*self.encode_answer(text), self.eos_id]

    def decode(self, ids):
        """Text of ids, special tokens included."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _boxed(self, ids):
        """What stands in the complete boxes of some ids, without white space."""
        return ["".join(text.split()) for text in BOX.findall(self.decode(ids))]

    def prompt(self, query, document, criteria=None):
        """Prompt ids of one pair. Raises TaskError if it does not fit even without a document."""
        if criteria not in self._heads:
            text = self._encode(self.task.criteria_of(criteria))
            self._heads[criteria] = [*self._around[0], *text, *self._around[1]]
        before = [*self._heads[criteria], *self._encode(" " + query), *self._middle]
        document_ids = self._encode(" " + document)
        if self.max_prompt_tokens is not None:
            room = self.max_prompt_tokens - len(before) - len(self._tail)
            if room < 1:
                raise TaskError(
                    f"criteria, query and answer leave the document no room in the model's context "
                    f"({1 - room} tokens too many); lower --max_new_tokens"
                )
            self.truncated += len(document_ids) > room
            document_ids = document_ids[:room]
        return [*before, *document_ids, *self._tail]

    def prompts(self, records):
        """Prompt ids of records from `Task.read`; TaskError names the record that does not fit."""
        prompts = []
        for pair in records:
            try:
                prompts.append(self.prompt(pair["query"], pair["document"], pair.get("criteria")))
            except TaskError as error:
                raise TaskError(f"{getattr(pair, 'where', 'pair')}: {error}") from None
        return prompts

    def parse(self, ids):
        """Parse any ids into a Trace. Well-formed: the expected boxes with known labels, an end."""
        if not ids or ids[-1] not in self.end_ids:
            return Trace(problem="not ended")
        body = ids[:-1]
        if any(i in self.end_ids or not 0 <= i < self._size for i in body):
            return Trace(problem="a token that does not belong into an answer")
        steps = []
        boxes = self.task.boxes
        # No box reaches over a closing brace, so what may complete one begins at the last of these.
        last_closer = None
        for at, token in enumerate(body):
            if token not in self._closers:
                continue
            found = self._boxed(body[last_closer or 0 : at + 1])
            if last_closer is not None:  # which may hold a whole box, counted before
                found = found[len(self._boxed([body[last_closer]])) :]
            last_closer = at
            if len(found) > 1 or (found and len(steps) == len(boxes)):
                return Trace(problem="too many boxes")
            if found:
                if found[0] not in self._known:
                    return Trace(problem="unknown label")
                label = self._known[found[0]]
                start = steps[-1].end if steps else 0
                label_at = self._find_label(body, start, at + 1, label)
                steps.append(Step(start, at + 1, label, label_at))
        if len(steps) < len(boxes):
            return Trace(problem="missing boxes")
        final = steps[-1] if self.task.format == "reason-first" else steps[0]
        return Trace(steps, final.label)

    def _find_label(self, ids, start, end, label):
        """Where the label's first token stands in ids[start:end], directly behind the opening, or
        merged with its brace.
        """
        starts = {self._labels[label][0]: "\\boxed{", self.merged.get(label): "\\boxed"}
        for at in range(end - 1, start, -1):
            if ids[at] not in starts:
                continue
            before = "".join(self.decode(ids[start:at]).split())
            if before.endswith(starts[ids[at]]):
                # Behind an earlier box's opening it would not be this one's label.
                return None if "\\boxed" in self.decode(ids[at:end]) else at
        return None


def reward(trace, gold):
    """1.0 for a well-formed answer with the gold label, else 0.0: 1(f(o) = l), arXiv 2512.00968."""
    return float(trace.problem is None and trace.label == gold)


def step_verdicts(trace, targets):
    """Whether each step's label is its target, a label per box; [] for a malformed answer."""
    return [step.label == target for step, target in zip(trace.steps, targets, strict=False)]


def step_changes(trace, targets, task):
    """Whether each step moves the grade as its target does (our rule): a grade so far carries a
    slip into all that follows, though the decisions there may be right. [] if malformed.
    """
    moves = task.moves([step.label for step in trace.steps])
    return [move == target for move, target in zip(moves, task.moves(targets), strict=False)]


def right_steps(trace, record, task, rule, step_targets):
    """Which steps of an answer to a record are right by a rule of sam.py, and for "symmetric" by
    its targets, "change" or "labels"; [] if malformed.
    """
    if rule != "symmetric":
        return step_verdicts(trace, [record["label"]] * len(task.boxes))
    if step_targets == "labels":
        return step_verdicts(trace, record["step_labels"])
    return step_changes(trace, record["step_labels"], task)


# Metrics ------------------------------------------------------------------------------------------


def metrics(task, records, predictions):
    """Metrics of predictions against records with labels.

    predictions: dicts with `label` (None for a malformed answer, which is wrong everywhere),
    `grade` (float) and, optionally, `probs` and `steps`.
    binary_accuracy: relevant or not; macro_f1: over the labels that occur in the gold data;
    confusion: counts in the labels' order, malformed last; ece, of the well-formed answers, needs
    probs; ndcg@10 needs query_id; step_accuracy needs step_labels and steps.
    """
    Y = len(task.labels)
    index = {label: i for i, label in enumerate(task.labels)} | {None: Y}
    gold_N = np.array([index[record["label"]] for record in records])
    predicted_N = np.array([index[prediction["label"]] for prediction in predictions])
    table = np.zeros((Y, Y + 1), dtype=int)
    np.add.at(table, (gold_N, predicted_N), 1)
    right_Y = table.diagonal()
    gold_Y = table.sum(1)
    relevant_Y = np.array([label in task.relevant for label in task.labels])
    same_side = table[:, :Y] * (relevant_Y[:, None] == relevant_Y)
    f1_Y = 2 * right_Y / np.maximum(gold_Y + table.sum(0)[:Y], 1)
    out = {
        "accuracy": float(right_Y.sum() / len(records)),
        "malformed": float(table[:, Y].sum() / len(records)),
        "binary_accuracy": float(same_side.sum() / len(records)),
        "macro_f1": float(f1_Y[gold_Y > 0].mean()),
        "kappa": quadratic_kappa(table),
        "confusion": {"rows": "gold", "columns": "predicted", "counts": table.tolist()},
    }
    graded = [(r, p) for r, p in zip(records, predictions, strict=True) if p["label"] is not None]
    if graded and all("probs" in p for _, p in graded):
        out["ece"] = calibration_error(graded)
    if all("query_id" in record for record in records):
        queries = {}
        for record, prediction, gain in zip(records, predictions, gold_N, strict=True):
            queries.setdefault(str(record["query_id"]), []).append((gain, prediction["grade"]))
        values = [ndcg(*zip(*pairs, strict=True)) for pairs in queries.values()]
        out["ndcg@10"] = float(np.nanmean(values)) if not np.all(np.isnan(values)) else 0.0
    if all("step_labels" in r for r in records) and all("steps" in p for p in predictions):
        right = []
        for record, prediction in zip(records, predictions, strict=True):
            labels = [step["label"] for step in prediction["steps"]] or [None] * len(task.boxes)
            right.append(np.array(labels) == np.array(record["step_labels"]))
        out["step_accuracy"] = dict(zip(task.boxes, np.mean(right, 0).tolist(), strict=True))
    return out


def quadratic_kappa(table):
    """Cohen's kappa with quadratic weights of a confusion table [Y, Y + 1], whose last column,
    malformed, counts as the label farthest from the gold one; 0.0 if undefined.
    """
    classes = np.arange(len(table))
    counts = table[:, :-1].astype(float)
    farthest_Y = np.where(classes >= len(table) / 2, 0, len(table) - 1)
    counts[classes, farthest_Y] += table[:, -1]
    weights = np.subtract.outer(classes, classes) ** 2
    chance = (weights * np.outer(counts.sum(1), counts.sum(0))).sum() / counts.sum()
    return float(1 - (weights * counts).sum() / chance) if chance else 0.0


def calibration_error(pairs, bins=15):
    """Mean gap between the predicted label's probability and how often it is right, over bins."""
    confidence_N = np.array([p["probs"][p["label"]] for _, p in pairs])
    right_N = np.array([record["label"] == p["label"] for record, p in pairs])
    bin_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    gap_B = np.bincount(bin_N, confidence_N - right_N, bins)
    return float(np.abs(gap_B).sum() / len(pairs))


def ndcg(gains, scores, k=10):
    """nDCG@k of one query: linear gains, 1 / log2(rank + 1) discounts, ties averaged; nan where no
    document has a gain.
    """
    gains, scores = np.asarray(gains, float), np.asarray(scores, float)
    discounts = np.where(np.arange(len(gains)) < k, 1 / np.log2(np.arange(len(gains)) + 2), 0.0)
    ideal = np.sort(gains)[::-1] @ discounts
    # Documents of equal score share the mean gain of their tie, in whichever order they come.
    mean_gains = [gains[scores == score].mean() for score in np.sort(scores)[::-1]]
    return float(mean_gains @ discounts / ideal) if ideal else math.nan


def print_table(results, extra=()):
    """Print {who: {test set: metrics}}, a line each; extra: columns (title, key, format)."""
    columns = [
        ("accuracy", "accuracy", ".3f"),
        ("binary", "binary_accuracy", ".3f"),
        ("macro-F1", "macro_f1", ".3f"),
        ("kappa", "kappa", ".3f"),
        ("nDCG@10", "ndcg@10", ".3f"),
        ("ECE", "ece", ".3f"),
        ("malformed", "malformed", ".3f"),
        *extra,
    ]
    print(f"\n{'':9}{'test set':<16}" + "".join(f" {title:>10}" for title, _, _ in columns))
    for who, tests in results.items():
        for name, values in tests.items():
            cells = [
                format(values[key], spec) if key in values else "-" for _, key, spec in columns
            ]
            print(f"{who:<9}{name:<16}" + "".join(f" {cell:>10}" for cell in cells))


# Models -------------------------------------------------------------------------------------------


def has_weights(source):
    """Whether a folder has weights (pickled ones will be refused); a hub name is taken to have."""
    suffixes = {path.suffix for path in Path(source).glob("*")}
    return not Path(source).is_dir() or not suffixes.isdisjoint({".safetensors", ".bin"})


def is_hub_name(source):
    """Whether it can be USER/MODEL or MODEL on the hub, and no path, whose first folder is here."""
    is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)
    return bool(is_name) and not ("/" in source and Path(source).parent.is_dir())


def load_model(source, dtype=torch.float32, seed=None, meta=False, labels=None):
    """Load (model, tokenizer) on the CPU: safetensors, no remote code.

    source: a folder or hub name of a decoder-only model or, with labels, of a classifier's base.
    seed: of one to train: what it lacks starts fresh. meta: without memory, for a rank that will
    receive the weights. Raises TaskError for what cannot be loaded whole.
    """
    if not Path(source).is_dir() and not is_hub_name(str(source)):
        raise TaskError(f"{source}: there is no such model; train.py writes one, or use --model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        kind = AutoModelForCausalLM
        if not labels and "ForSequenceClassification" in str(config.architectures):
            raise ValueError("it is a classifier; the README shows how one is served")
        if labels and not str(config.architectures).endswith("ForCausalLM']"):
            kind = AutoModelForSequenceClassification
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in config.id2label.items()}
        torch.manual_seed(seed or 0)
        generation = GenerationConfig.from_model_config(config)
        with contextlib.suppress(OSError):
            generation = GenerationConfig.from_pretrained(source)
        differing = []
        if meta or (seed is not None and not has_weights(source)):
            with torch.device("meta" if meta else "cpu"):
                model = kind.from_config(config, dtype=dtype)
        else:
            settings = {"use_safetensors": True, "trust_remote_code": False, "dtype": dtype}
            settings["output_loading_info"] = True
            model, report = kind.from_pretrained(source, config=config, **settings)
            differing = sorted(report["missing_keys"] | report["unexpected_keys"])
    except Exception as error:  # whatever a broken or foreign file makes the libraries raise
        first_line = str(error).partition("\n")[0]
        raise TaskError(f"{source}: cannot be loaded: {first_line}") from error
    if kind is not AutoModelForCausalLM:  # a classifier's head, and pooler, may be new
        body = f"{model.base_model_prefix}."
        differing = [x for x in differing if x.startswith(body) and "pooler" not in x]
    if differing:
        what = "tensors are missing or left over, or it is of another kind"
        raise TaskError(f"{source}: {what}: {differing[:5]}")
    kept = {name: getattr(generation, name) for name in ("eos_token_id", "max_new_tokens")}
    model.generation_config = GenerationConfig(**kept)  # no temperature, top-k, ...
    return model.eval(), tokenizer


def save_model(model, tokenizer, folder):
    """Write a Hugging Face folder: safetensors, with the permissions of its other files."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in Path(folder).glob("*.safetensors"):
        path.chmod(path.with_name("config.json").stat().st_mode)


def unknown_words(tokenizer, text):
    """The words of a text that a tokenizer does not know."""
    words = text.split() or [""]
    ids = tokenizer(words, add_special_tokens=False, split_special_tokens=True).input_ids
    return [x for x, of_word in zip(words, ids, strict=True) if tokenizer.unk_token_id in of_word]


def check_words(tokenizer, records, most=MOST_UNKNOWN):
    """Say on rank 0 which share of the words of up to a thousand records a tokenizer does not know.
    Raises TaskError for more than `most`.
    """
    some = records[:: 1 + len(records) // 1000]
    text = " ".join(f"{record['query']} {record['document']}" for record in some)
    unknown = unknown_words(tokenizer, text)
    share = f"{len(unknown) / len(text.split()):.1%} of the words"
    line = f"{tokenizer.name_or_path}: its tokenizer does not know {share}, such as {unknown[:5]}"
    if len(unknown) > most * len(text.split()):
        raise TaskError(f"{line}; choose a model made for such text")
    if unknown and os.environ.get("RANK", "0") == "0":
        print(f"warning: {line}")


# Scoring ------------------------------------------------------------------------------------------


def predictions_of(task, logits_NY):
    """Predictions from label logits, as `metrics` takes them: dicts of label, grade and probs."""
    probs_NY = torch.softmax(logits_NY.double(), -1).cpu().numpy()
    out = []
    for probs_Y in probs_NY:
        label = task.labels[int(probs_Y.argmax())]
        probs = dict(zip(task.labels, probs_Y.tolist(), strict=True))
        out.append({"label": label, "grade": float(task.grade(probs_Y)), "probs": probs})
    return out


def read_labels(renderer, engine, prompts, answers, label_logits, traces):
    """float32 logits [N, Y] of the labels where each answer gives its own: a softmax over the
    labels' first tokens behind "\\boxed{".

    label_logits: of each answer [T, len(read_ids)], from its generation; where the answer does not
    go through that position, another forward pass gives them. Without an answer, or if it is
    malformed, "\\boxed{" is put behind it. A label that may be merged with the brace also gets the
    probability of the merged token, of this and the brace.
    """
    Y = len(renderer.task.labels)
    final = -1 if renderer.task.format == "reason-first" else 0
    logits_NY = torch.zeros(len(prompts), Y)
    # Of the brace and the merged ids; as it stands, the brace is certain.
    braces = torch.tensor([0.0] + [-math.inf] * len(renderer.merged)).repeat(len(prompts), 1)
    unread = []
    sequences = []
    for i, (prompt, answer, trace) in enumerate(zip(prompts, answers, traces, strict=True)):
        at = trace.steps[final].label_at if trace.steps else None
        if at is not None:
            is_merged = answer[at] in renderer.merged.values()
            before_label = answer[:at] + renderer.opening[-1:] * is_merged
            brace_at = len(before_label) - 1
            if answer[brace_at] in renderer.read_ids[Y:]:
                braces[i] = label_logits[i][brace_at, Y:]
        elif final == 0:
            before_label = renderer.opening
        else:
            before_label = [t for t in answer if t not in renderer.end_ids] + renderer.opening
        behind = len(before_label)
        if answer[:behind] == before_label and len(answer) > behind:
            logits_NY[i] = label_logits[i][behind, :Y]
        else:
            unread.append(i)
            sequences.append([*prompt, *before_label])
    if unread:
        logits_NY[unread] = engine.label_logits(sequences)[:, :Y]
    if renderer.merged:
        braces = torch.log_softmax(braces, -1)
        logits_NY = torch.log_softmax(logits_NY, -1) + braces[:, :1]
        columns = [renderer.task.labels.index(label) for label in renderer.merged]
        logits_NY[:, columns] = torch.logaddexp(logits_NY[:, columns], braces[:, 1:])
    return logits_NY


def judge(renderer, engine, records, explain=True):
    """Grade records (query, document): label, grade, probs, well_formed; explained, the steps too.

    engine: rollout.Engine, or anything with its `generate` and `label_logits`.
    The label distribution is read where the answer gives its label (`read_labels`): behind the
    model's own reasoning (reason-first), or directly behind the prompt (answer-first; the answer is
    only generated if explain). A malformed answer gets label None.
    """
    task = renderer.task
    prompts = renderer.prompts(records)
    answers = label_logits = [[]] * len(prompts)
    if explain or task.format == "reason-first":
        answers, label_logits = engine.generate(prompts)
    traces = [renderer.parse(answer) for answer in answers]
    logits_NY = read_labels(renderer, engine, prompts, answers, label_logits, traces)
    results = predictions_of(task, logits_NY)
    for result, answer, trace in zip(results, answers, traces, strict=True):
        result["well_formed"] = trace.problem is None or not answer
        if answer:
            result["label"] = trace.label
        if explain:
            text = [token for token in answer if token not in renderer.end_ids]
            result["problem"] = trace.problem
            result["answer"] = renderer.decode(text).strip()
            result["steps"] = []
            for name, step in zip(task.boxes, trace.steps, strict=False):
                text = renderer.decode(answer[step.start : step.end]).strip()
                result["steps"].append({"step": name, "label": step.label, "text": text})
    return results


def load_judge(folder, task=None, max_new_tokens=None):
    """(renderer, engine) of a model's folder, for `judge`; task: a folder, or None for the model's;
    max_new_tokens: None for as many as the folder says that it was trained to give.
    """
    import rollout

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(folder, torch.bfloat16 if device == "cuda" else torch.float32)
    task = Task.load(task or folder)
    task.check_model(folder)
    trained = model.generation_config
    max_new_tokens = max_new_tokens or trained.max_new_tokens or 128
    context = model.config.get_text_config().max_position_embeddings
    renderer = Renderer(task, tokenizer, context, max_new_tokens, trained.eos_token_id)
    model = rollout.use_tree_attention(model.to(device))
    return renderer, rollout.Engine(model, renderer.end_ids, renderer.read_ids, max_new_tokens)


if __name__ == "__main__":  # python grm.py score, judge or check
    script = "docs/score.py"
    if sys.argv[1:2] == ["check"]:
        script = "data/check.py"
        del sys.argv[1]
    runpy.run_path(str(Path(__file__).resolve().parent / script), run_name="__main__")
