"""The task: criteria, prompt, answers, parsing, reward, metrics, scoring.      (what is relevance?)

A task is a folder with a `criteria.md` (front matter: labels, steps, format; body: the system
prompt) and JSON Lines. The model reads criteria, query and document, reasons in steps, closes each
with \\boxed{label}, and one box is its answer. All that is trained or parsed is token ids: text is
tokenised once, and ids are never decoded and encoded again.

    python grm.py score --model DIR --pairs IN.jsonl --out OUT.jsonl [--task DIR] [--explain]
    python grm.py judge --model DIR "query" "document"

This file needs torch, transformers (with jinja2), numpy and pyyaml only, and for the two commands
above rollout.py and parallel.py beside it; copy it alone.
Shapes: N answers, T positions of an answer, Y labels.
"""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import yaml
from jinja2.exceptions import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.hf_argparser import string_to_bool
from transformers.utils import logging as hf_logging

BOX = re.compile(r"\\boxed\{([^{}]*)\}")
FORMATS = ("reason-first", "answer-first")
MOST_PROBLEMS = 20  # bad lines that are named; of the rest, the number
TEMPLATE_SECONDS = 10  # for a chat template, which is a program and may loop for ever
TEMPLATE_LENGTH = 10**6  # characters that it may add
MAX_NEW_TOKENS = 128  # where a model's folder does not say how long its answers are


class TaskError(ValueError):
    """Input that cannot be used. One line a problem, `file:line: what is wrong` where it can."""


@contextlib.contextmanager
def blaming(source):
    """Whatever a broken or foreign file makes the libraries raise is a TaskError that names it."""
    try:
        yield
    except TaskError:
        raise
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise TaskError(f"{source}: {type(error).__name__}: {first_line}") from error


def parse_json(text):
    """A JSON value. Raises ValueError also for a key that is given twice, and for NaN."""
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(items):
    """An object's items as a dict."""
    keys = [key for key, _ in items]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{max(keys, key=keys.count)!r} is given twice")
    return dict(items)


def _finite(text):
    """A number, of its text."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text}: is no number of JSON")
    return value


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

    @classmethod
    def load(cls, folder):
        """Read and check `folder`/criteria.md. Raises TaskError that names file and field."""
        path = Path(folder) / "criteria.md"
        head, criteria = _read_criteria(path)
        task = cls(
            folder=Path(folder),
            criteria=criteria,
            labels=_strings(path, head, "labels"),
            relevant=_strings(path, head, "relevant"),
            steps=_strings(path, head, "steps"),
            format=head.get("format"),
        )
        problem = None
        if len(task.labels) < 2 or not set(task.relevant) <= set(task.labels):
            problem = "labels needs two or more values, and relevant must be some of them"
        elif task.format not in FORMATS:
            problem = f"format must be one of {', '.join(FORMATS)}, not {task.format!r}"
        elif task.format == "reason-first" and not task.steps:
            problem = (
                "a reason-first task needs at least one step, the last of which gives the label"
            )
        elif "\\boxed{" not in task.criteria:
            problem = "the criteria must tell the model to close each step with \\boxed{label}"
        if problem:
            raise TaskError(f"{path}: {problem}")
        return task

    def save(self, folder):
        """Write criteria.md into a folder: beside a model, it says what that was trained for."""
        head = {name: getattr(self, name) for name in ("labels", "relevant", "steps", "format")}
        # Lists on one line, however long, and characters as they are.
        settings = {"default_flow_style": None, "width": math.inf, "allow_unicode": True}
        front = yaml.safe_dump(head, sort_keys=False, **settings)
        text = f"---\n{front}---\n{self.criteria}\n"
        (Path(folder) / "criteria.md").write_text(text, encoding="utf-8")

    def check_model(self, folder):
        """Raise TaskError if a model's folder was trained for other labels, steps or format."""
        if not (Path(folder) / "criteria.md").is_file():
            return
        trained_for = Task.load(folder)
        for name in ("format", "steps", "labels"):
            theirs = getattr(trained_for, name)
            ours = getattr(self, name)
            if ours != theirs:
                raise TaskError(
                    f"{folder}: was trained for {name} {theirs}, and {self.folder} has {ours}"
                )

    @property
    def boxes(self):
        """Names of an answer's boxes; an answer-first answer begins with the label's own."""
        return self.steps if self.format == "reason-first" else ["label", *self.steps]

    def moves(self, labels):
        """How far each box of an answer moves the grade, in places of `labels`; the first from 0.

        Answer-first, the steps begin again from 0 behind the answer's own box.
        """
        places = [self.labels.index(label) for label in labels]
        before = [0, *places]
        if self.format == "answer-first":
            before[1:2] = [0]
        return [place - start for place, start in zip(places, before, strict=False)]

    def read(self, path, required=("label",)):
        """Read a JSON Lines file of pairs, checked: query, document, and what is `required` of
        label and response.

        Returns Records. Raises TaskError that names the bad lines.
        """
        path = Path(path)
        if not path.is_file():
            raise TaskError(f"{path}: not found")
        records = []
        problems = []
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = Record(self.check(parse_json(line.decode("utf-8")), required))
                record.where = where
                records.append(record)
            except json.JSONDecodeError as error:
                problems.append(f"{where}: not JSON: {error.msg}, column {error.colno}")
            except ValueError as error:
                problems.append(f"{where}: {error}")
        if not records and not problems:
            problems = [f"{path}: holds no pairs"]
        if len(problems) > MOST_PROBLEMS:
            more = len(problems) - MOST_PROBLEMS
            problems = [*problems[:MOST_PROBLEMS], f"... and {more} more"]
        if problems:
            raise TaskError("\n".join(problems))
        return records

    def check(self, record, required=()):
        """A record with its labels as strings. Raises ValueError that says what is wrong."""
        if not isinstance(record, dict):
            raise ValueError("must be a JSON object")
        texts = ["query", "document", *(name for name in required if name != "label")]
        for name in texts:
            if not isinstance(record.get(name), str) or not record[name].strip():
                raise ValueError(f"{name!r} is missing, empty or not a string")
            record[name].encode("utf-8")  # raises for lone surrogates, which cannot be tokenised
        if "label" in required and "label" not in record:
            raise ValueError("'label' is missing")
        if "label" not in required and record.get("label", ...) is None:
            del record["label"]
        if "label" in record:
            record["label"] = self._label(record["label"])
        if not self.steps:
            # Of the task's other form: there is nothing to compare them with.
            record.pop("step_labels", None)
        if "step_labels" in record:
            steps = record["step_labels"]
            if not isinstance(steps, list) or len(steps) != len(self.boxes):
                raise ValueError(
                    f"'step_labels' must be a list of {len(self.boxes)} labels, "
                    f"for {', '.join(self.boxes)}"
                )
            record["step_labels"] = [self._label(label, "step label") for label in steps]
        if not isinstance(record.get("query_id", ""), str | int):
            raise ValueError("'query_id' must be a string or an integer")
        if type(record.get("stage", 0)) is not int:
            raise ValueError("'stage' must be an integer")
        return record

    def _label(self, value, what="label"):
        is_text = isinstance(value, str | int) and not isinstance(value, bool)
        if not is_text or str(value) not in self.labels:
            raise ValueError(f"unknown {what} {value!r}; the labels are {', '.join(self.labels)}")
        return str(value)

    def grade(self, probs_NY):
        """Expected grades [N] of label probabilities: the labels' numbers, or ranks if words."""
        try:
            values_Y = [float(label) for label in self.labels]
        except ValueError:
            values_Y = range(len(self.labels))
        return np.asarray(probs_NY) @ np.asarray(values_Y, dtype=np.float64)


def _read_criteria(path):
    """The front matter, a dict, and the body of a criteria.md."""
    if not path.is_file():
        raise TaskError(f"{path}: not found; --task names a folder with a criteria.md")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8: {error}") from None
    parts = re.split(r"^---[ \t]*$", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) != 3 or parts[0].strip():
        raise TaskError(f"{path}:1: must begin with a front matter between two lines of ---")
    _, front, body = parts
    try:
        # The base loader keeps values as they are written: elsewhere in YAML 1.1, 010 is 8.
        head = yaml.load(front, Loader=yaml.BaseLoader)
    except RecursionError:
        raise TaskError(f"{path}: the front matter is nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or error
        raise TaskError(f"{path}:{line}: the front matter is not YAML: {problem}") from None
    keys = re.findall(r"^(\w+)\s*:", front, flags=re.MULTILINE)
    if len(set(keys)) < len(keys):
        twice = max(keys, key=keys.count)
        raise TaskError(f"{path}: the front matter names {twice} twice")
    if not isinstance(head, dict) or set(head) - {"labels", "relevant", "steps", "format"}:
        raise TaskError(
            f"{path}: the front matter holds labels, relevant, steps and format, and nothing else"
        )
    return head, body.strip()


def _strings(path, head, name):
    """A list of the front matter."""
    values = head.get(name, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TaskError(f"{path}: {name} must be a list, such as [no, yes]")
    values = [value.strip() for value in values]
    if len(set(values)) < len(values) or any(not v or set("{}") & set(v) for v in values):
        raise TaskError(
            f"{path}: {name} must not repeat a value nor contain braces, nor an empty value"
        )
    if any("\ud800" <= character <= "\udfff" for character in "".join(values)):
        raise TaskError(f"{path}: {name} holds half a character (a lone surrogate)")
    return values


# Settings -----------------------------------------------------------------------------------------


def setting(default, text, *, min=None, above=None, max=None, below=None):
    """A field of a settings dataclass: its default, its help text, and the bounds of its values."""
    return field(
        default=default,
        metadata={"help": text, "min": min, "above": above, "max": max, "below": below},
    )


def parse_settings(config_class, file_name, description, argv=None):
    """Settings from the command line, then TASK/`file_name` (JSON), then the dataclass's defaults.

    Returns an object of `config_class`. Raises TaskError for values that are unknown, of another
    type or out of bounds; an unknown flag ends the program with a usage message.
    """
    epilog = f"TASK/{file_name} goes before the defaults above, a flag before both."
    parser = argparse.ArgumentParser(description=description, epilog=epilog, allow_abbrev=False)
    for item in fields(config_class):
        text = item.metadata["help"]
        if item.default != "":  # else the text names what takes its place
            text += f" (default: {item.default})"
        options = {"help": text.replace("%", "%%")}
        if item.type is bool:
            options |= {"type": string_to_bool, "nargs": "?", "const": True}
        elif get_args(item.type):
            options |= {"choices": get_args(item.type)}
        else:
            options |= {"type": item.type}
        parser.add_argument(f"--{item.name}", default=argparse.SUPPRESS, **options)
    given = vars(parser.parse_args(argv))
    path = Path(given.get("task", config_class.task)) / file_name
    in_file = _read_settings(path, config_class)
    _check_settings(config_class, in_file, f"{path}: ")
    _check_settings(config_class, given, "")
    return config_class(**in_file | given)


def _read_settings(path, config_class):
    if not path.is_file():
        return {}
    try:
        values = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise TaskError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise TaskError(f"{path}: must be a JSON object of settings")
    if "task" in values:
        raise TaskError(f"{path}: cannot say --task, since it belongs to the task")
    if unknown := set(values) - set(config_class.__dataclass_fields__):
        raise TaskError(f"{path}: unknown settings {', '.join(sorted(unknown))}")
    return values


def _check_settings(config_class, values, where):
    """Check values against the types and bounds of their settings. Raises TaskError."""
    for item in fields(config_class):
        problem = _problem(item, values[item.name]) if item.name in values else None
        if problem:
            raise TaskError(f"{where}--{item.name} {values[item.name]}: must be {problem}")


def _problem(item, value):
    """What a setting's value must be and is not, or None."""
    bounds = item.metadata
    kinds = (int, float) if item.type is float else item.type
    if choices := get_args(item.type):
        return None if value in choices else f"one of {', '.join(choices)}"
    if not isinstance(value, kinds) or isinstance(value, bool) != (item.type is bool):
        return f"of type {item.type.__name__}"
    if item.type is float and not math.isfinite(value):
        return "finite"
    if bounds["min"] is not None and value < bounds["min"]:
        return f"at least {bounds['min']}"
    if bounds["max"] is not None and value > bounds["max"]:
        return f"at most {bounds['max']}"
    if bounds["above"] is not None and value <= bounds["above"]:
        return f"above {bounds['above']}"
    if bounds["below"] is not None and value >= bounds["below"]:
        return f"below {bounds['below']}"
    return None


# Prompts and answers as token ids -----------------------------------------------------------------


@dataclass
class Step:
    """One step of an answer: its tokens are ids[start:end], box included.

    label_at: index of the label's first token; None if the answer spells it with unusual tokens.
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


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TimeoutError in what takes longer; outside the main thread there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGALRM, _time_out)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def _time_out(number, frame):
    raise TimeoutError("does not come to an end")


class Renderer:
    """A task in one tokenizer's ids: the one prompt builder, and the one parser, of the project.

    context: tokens of the model's context; prompts are cut, in the document alone, so that an
        answer of max_new_tokens and a forced "\\boxed{" fit behind them. None: no limit.
    Attributes: truncated counts the documents that were cut; eos_id ends an answer, as the chat
    template ends the assistant's turn; opening holds the ids of "\\boxed{"; label_ids the id with
    which each label begins behind it, all different.
    Raises TaskError without a usable chat template, or if the labels' first tokens coincide.
    """

    CRITERIA = "<<grm:criteria>>"
    QUERY = "<<grm:query>>"
    DOCUMENT = "<<grm:document>>"
    ANSWER = "<<grm:answer>>"

    def __init__(self, task, tokenizer, context=None, max_new_tokens=0):
        self.task = task
        self.tokenizer = tokenizer
        self.truncated = 0
        self.max_prompt_tokens = None
        with blaming(f"{tokenizer.name_or_path}: the tokenizer or its chat template"):
            self._read_tokenizer()
            self._read_template()
            self._read_labels()
        if context is not None:
            self.max_prompt_tokens = context - max_new_tokens - len(self.opening)
            if self.max_prompt_tokens < 1:
                raise TaskError(
                    f"--max_new_tokens {max_new_tokens}: leaves no room for a prompt "
                    f"in the context of {context} tokens; lower it"
                )

    def _read_tokenizer(self):
        tokenizer = self.tokenizer
        self._size = len(tokenizer)
        self._added = set(tokenizer.added_tokens_encoder.values()) | set(tokenizer.all_special_ids)
        self._closers = {
            i for token, i in tokenizer.get_vocab().items() if "}" in token or token == "<0x7D>"
        }

    def _read_template(self):
        """Cut the rendered chat template at criteria, query and document; find the turn's end."""
        if not self.tokenizer.chat_template:
            raise TaskError("the tokenizer has no chat template; put one into chat_template.jinja")
        user = f"Query: {self.QUERY}\nDocument: {self.DOCUMENT}"
        try:
            messages = [
                {"role": "system", "content": self.CRITERIA},
                {"role": "user", "content": user},
            ]
            prompt, turn = self._render(messages)
        except TemplateError:  # some (Gemma's) know no system turn: the criteria lead the user's
            prompt, turn = self._render([{"role": "user", "content": f"{self.CRITERIA}\n\n{user}"}])
        pieces = re.split(f"{self.CRITERIA}|{self.QUERY}|{self.DOCUMENT}", prompt)
        if len(pieces) != 4 or self.ANSWER not in turn:
            raise TaskError("the chat template drops or repeats a message; use another template")
        # The space before query and document belongs to their first word, as in running text.
        head, query, document, tail = pieces
        self._head = [
            *self._encode(head, special=True),
            *self._encode(self.task.criteria),
            *self._encode(query.rstrip(" "), special=True),
        ]
        self._middle = self._encode(document.rstrip(" "), special=True)
        self._tail = self._encode(tail, special=True)
        behind_answer = self._encode(turn.split(self.ANSWER, 1)[1], special=True)
        if behind_answer and behind_answer[0] in self._added:
            self.eos_id = behind_answer[0]
        else:
            self.eos_id = self.tokenizer.eos_token_id
        if self.eos_id is None:
            raise TaskError(
                "the tokenizer has no end-of-sequence token, "
                "and its chat template ends a turn with none"
            )

    def _render(self, messages):
        """The chat template's text: up to the assistant's turn, and with a whole turn."""
        # enable_thinking=False (Qwen3 and relatives): the task's own steps are the reasoning.
        settings = {"tokenize": False, "enable_thinking": False}
        render = self.tokenizer.apply_chat_template
        answer = {"role": "assistant", "content": self.ANSWER}
        with time_limit(TEMPLATE_SECONDS):
            prompt = render(messages, add_generation_prompt=True, **settings)
            turn = render([*messages, answer], **settings)
        if max(len(prompt), len(turn)) > TEMPLATE_LENGTH:
            raise TaskError("the chat template renders more than a million characters")
        return prompt, turn

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
        """Find the ids of "\\boxed{" and of every label behind it, tokenised by itself.

        Merged with its brace ("{-" is one token of many vocabularies), -1 would begin at another
        position than the other labels.
        """
        self.opening = self._encode("\\boxed{")
        self._labels = {label: self._behind_brace(label) for label in self.task.labels}
        self.label_ids = [ids[0] if ids else None for ids in self._labels.values()]
        unknown = self.tokenizer.unk_token_id
        path = self.task.folder / "criteria.md"
        unwritten = [label for label, ids in self._labels.items() if not ids or unknown in ids]
        if unwritten:
            raise TaskError(
                f"{path}: labels that the tokenizer cannot write ({', '.join(unwritten)}); "
                "rename them"
            )
        if len(set(self.label_ids)) < len(self._labels):
            named = ", ".join(f"{label!r} = {ids}" for label, ids in self._labels.items())
            raise TaskError(f"{path}: labels whose first tokens coincide ({named}); rename them")
        # Labels as this tokenizer writes them: a word-level one may lower-case or space them.
        self._known = {}
        for label in self.task.labels:
            written = self._boxed(self.answer(f"\\boxed{{{label}}}"))[-1]
            self._known[written] = label

    def _behind_brace(self, text):
        """Ids of a text behind "\\boxed{": no token spans the brace or brings a space with it."""
        ids = self._encode("\\boxed{" + text)
        start = len(self.opening)
        return ids[start:] if ids[:start] == self.opening else self._encode(text)

    def answer(self, text):
        """Ids of an answer's text, every label in a box tokenised by itself."""
        # text, what a box holds, text, what a box holds, ..., text
        pieces = re.split(r"(?<=\\boxed\{)([^{}]*)(?=\})", text)
        ids = self._encode(pieces[0])
        for i, piece in enumerate(pieces[1:], 1):
            label = self._labels.get(piece.strip()) if i % 2 else None
            ids += label or self._behind_brace(piece)
        return ids

    def response(self, text):
        """Ids of a demonstration's answer, closed by eos_id."""
        return [*self.answer(text), self.eos_id]

    def decode(self, ids):
        """Text of ids, special tokens included."""
        settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(ids, **settings)

    def _boxed(self, ids):
        """What stands in the complete boxes of some ids, without white space."""
        return ["".join(text.split()) for text in BOX.findall(self.decode(ids))]

    def prompt(self, query, document):
        """Prompt ids of one pair. Raises TaskError if it does not fit even without a document."""
        before = [*self._head, *self._encode(" " + query), *self._middle]
        document_ids = self._encode(" " + document)
        if self.max_prompt_tokens is not None:
            fixed = len(before) + len(self._tail)
            room = self.max_prompt_tokens - fixed
            if room < 1:
                raise TaskError(
                    f"the criteria and the query alone fill {fixed} tokens; the model's context "
                    f"leaves {self.max_prompt_tokens} for the prompt: shorten them, "
                    "or lower --max_new_tokens"
                )
            self.truncated += len(document_ids) > room
            document_ids = document_ids[:room]
        return [*before, *document_ids, *self._tail]

    def prompts(self, records):
        """Prompt ids of records from `Task.read`; TaskError names the record that does not fit."""
        prompts = []
        for record in records:
            try:
                prompts.append(self.prompt(record["query"], record["document"]))
            except TaskError as error:
                raise TaskError(f"{getattr(record, 'where', 'pair')}: {error}") from None
        return prompts

    def parse(self, ids):
        """Parse an answer's ids into a Trace; any integers give one, never an exception.

        Well-formed: exactly the expected boxes with known labels, closed by eos_id and nothing
        else.
        """
        if not ids or ids[-1] != self.eos_id:
            return Trace(problem="not ended")
        body = ids[:-1]
        if self.eos_id in body or any(not 0 <= i < self._size for i in body):
            return Trace(problem="a token that does not belong into an answer")
        steps = []
        boxes = self.task.boxes
        # No box reaches over a closing brace, so what may complete one begins at the last of these.
        window = 0
        for at, token in enumerate(body):
            if token not in self._closers:
                continue
            found = self._boxed(body[window : at + 1])
            if window:  # its first token may hold a whole box, which was counted before
                found = found[len(self._boxed(body[window : window + 1])) :]
            window = at
            if len(found) > min(1, len(boxes) - len(steps)):
                return Trace(problem="too many boxes")
            if found:
                label = self._known.get(found[0])
                if label is None:
                    return Trace(problem="unknown label")
                start = steps[-1].end if steps else 0
                label_at = self._find_label(body, start, at + 1, label)
                steps.append(Step(start, at + 1, label, label_at))
        if len(steps) < len(boxes):
            return Trace(problem="missing boxes")
        final = steps[-1] if self.task.format == "reason-first" else steps[0]
        return Trace(steps, final.label)

    def _find_label(self, ids, start, end, label):
        """Where the label's first token stands in ids[start:end], directly behind the opening."""
        first = self._labels[label][0]
        for at in range(end - 1, start, -1):
            if ids[at] != first:
                continue
            if "\\boxed" in self.decode(ids[at:end]):
                return None  # before the box already
            before = "".join(self.decode(ids[start:at]).split())
            if before.endswith("\\boxed{"):
                return at
        return None


def reward(trace, gold):
    """1.0 for a well-formed answer with the gold label, else 0.0: 1(f(o) = l), arXiv 2512.00968.

    Answer-first, the first box alone is the label. An explanation that contradicts it is
    well-formed: each of its steps is judged by its own target, so stepwise credit goes to whichever
    of score and explanation is right (our rule).
    """
    return float(trace.problem is None and trace.label == gold)


def step_verdicts(trace, targets):
    """Whether each step's label is its target, a label per box; [] for a malformed answer."""
    return [step.label == target for step, target in zip(trace.steps, targets, strict=False)]


def step_changes(trace, targets, task):
    """Whether each step moves the grade as its target does (our rule); [] for a malformed answer.

    A grade so far carries a slip into all that follows: behind it every label is another than its
    target, though the decisions may be right.
    """
    moves = task.moves([step.label for step in trace.steps])
    return [move == target for move, target in zip(moves, task.moves(targets), strict=False)]


# Metrics ------------------------------------------------------------------------------------------


def metrics(task, records, predictions):
    """Metrics of predictions against records with labels.

    predictions: dicts with `label` (None for a malformed answer), `grade` (float) and, optionally,
    `probs` and `steps`. A malformed answer is wrong everywhere; for the kappa it counts as the
    label farthest from the gold one.
    accuracy, binary_accuracy (relevant or not), macro_f1 (the mean over the labels that occur in
    the gold data), kappa (quadratic), recall of each label that occurs, and confusion (rows: gold;
    columns: predicted, malformed last) come from one table. ece, the calibration error of the
    well-formed answers, needs probs; ndcg@10 needs query_id. step_accuracy and right_throughout,
    the share of right answers whose steps are all right, need step_labels and steps. contradicted
    (answer-first): the share of answers whose last step ends at another label than the answer's.
    """
    Y = len(task.labels)
    index = {label: i for i, label in enumerate(task.labels)} | {None: Y}
    gold_N = np.array([index[record["label"]] for record in records])
    predicted_N = np.array([index[prediction["label"]] for prediction in predictions])
    table = np.zeros((Y, Y + 1), dtype=int)
    np.add.at(table, (gold_N, predicted_N), 1)
    right_Y = table.diagonal()
    gold_Y = table.sum(1)
    predicted_Y = table.sum(0)[:Y]
    occurs_Y = gold_Y > 0
    relevant_Y = np.array([label in task.relevant for label in task.labels])
    same_side = table[:, :Y] * (relevant_Y[:, None] == relevant_Y)
    f1_Y = 2 * right_Y / np.maximum(gold_Y + predicted_Y, 1)
    recall_Y = right_Y / np.maximum(gold_Y, 1)
    out = {
        "accuracy": float(right_Y.sum() / len(records)),
        "malformed": float(table[:, Y].sum() / len(records)),
        "binary_accuracy": float(same_side.sum() / len(records)),
        "macro_f1": float(f1_Y[occurs_Y].mean()),
        "kappa": quadratic_kappa(table),
        "recall": {task.labels[i]: float(recall_Y[i]) for i in np.flatnonzero(occurs_Y)},
        "confusion": table.tolist(),
    }
    pairs = zip(records, predictions, strict=True)
    graded = [(record, p) for record, p in pairs if p["label"] is not None]
    if graded and all("probs" in p for _, p in graded):
        out["ece"] = calibration_error(graded)
    if all("query_id" in record for record in records):
        out["ndcg@10"] = mean_ndcg(records, predictions, gold_N)
    if all("steps" in prediction for prediction in predictions):
        if all("step_labels" in record for record in records):
            right = []
            for record, prediction in zip(records, predictions, strict=True):
                labels = [step["label"] for step in prediction["steps"]]
                labels = labels or [None] * len(task.boxes)
                gold = record["step_labels"]
                right.append([a == b for a, b in zip(labels, gold, strict=True)])
            accuracies = np.mean(right, 0).tolist()
            out["step_accuracy"] = dict(zip(task.boxes, accuracies, strict=True))
            throughout = np.all(right, 1).sum() / max(right_Y.sum(), 1)
            out["right_throughout"] = float(throughout)
        if task.format == "answer-first" and task.steps:
            contradicted = [
                p["steps"] and p["steps"][-1]["label"] != p["label"] for p in predictions
            ]
            out["contradicted"] = float(np.mean([bool(x) for x in contradicted]))
    return out


def quadratic_kappa(table):
    """Cohen's kappa with quadratic weights of a confusion table [Y, Y + 1]; 0.0 if undefined.

    The last column, malformed, counts as the label farthest from the gold one.
    """
    Y = len(table)
    classes = np.arange(Y)
    farthest_Y = np.where(classes >= Y / 2, 0, Y - 1)
    counts = table[:, :Y].astype(float)
    counts[classes, farthest_Y] += table[:, Y]
    expected = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
    weights = np.subtract.outer(classes, classes) ** 2
    chance = (weights * expected).sum()
    return float(1 - (weights * counts).sum() / chance) if chance else 0.0


def calibration_error(pairs, bins=15):
    """Mean gap between the predicted label's probability and how often it is right, over bins.

    pairs: (record, prediction), of well-formed answers.
    """
    confidence_N = np.array([p["probs"][p["label"]] for _, p in pairs])
    right_N = np.array([record["label"] == p["label"] for record, p in pairs])
    bin_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    error = 0.0
    for b in np.unique(bin_N):
        in_bin = bin_N == b
        error += abs(confidence_N[in_bin].mean() - right_N[in_bin].mean()) * in_bin.mean()
    return float(error)


def mean_ndcg(records, predictions, gains_N):
    """nDCG@10 of the predicted grades, mean over the queries that have a gain; 0.0 without any."""
    queries = {}
    for record, prediction, gain in zip(records, predictions, gains_N, strict=True):
        gains, grades = queries.setdefault(record["query_id"], ([], []))
        gains.append(gain)
        grades.append(prediction["grade"])
    values = [ndcg(gains, grades) for gains, grades in queries.values()]
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else 0.0


def ndcg(gains, scores, k=10):
    """nDCG@k of one query: linear gains, 1 / log2(rank + 1) discounts, ties averaged.

    None where no document has a gain, which says nothing about the order.
    """
    gains = np.asarray(gains, float)
    ranks = np.arange(len(gains))
    discounts = np.where(ranks < k, 1 / np.log2(ranks + 2), 0.0)
    ideal = np.sort(gains)[::-1] @ discounts
    if ideal == 0:
        return None
    # Documents of equal score share the mean gain of their tie, in whichever order they come.
    _, tie, counts = np.unique(-np.asarray(scores, float), return_inverse=True, return_counts=True)
    mean_gains = np.bincount(tie, weights=gains) / counts
    ends = np.cumsum(counts)
    sums = np.concatenate([[0], np.cumsum(discounts)])
    return float(mean_gains @ (sums[ends] - sums[ends - counts]) / ideal)


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
    print(f"\n{'':9}{'test set':<16}" + "".join(f"{title:>11}" for title, _, _ in columns))
    for who, tests in results.items():
        for name, values in tests.items():
            cells = [
                format(values[key], spec) if key in values else "-" for _, key, spec in columns
            ]
            print(f"{who:<9}{name:<16}" + "".join(f"{cell:>11}" for cell in cells))


# Models -------------------------------------------------------------------------------------------


def load_model(source, device=None, dtype=torch.float32, seed=None):
    """Load (model, tokenizer) of a decoder-only model: safetensors only, no remote code.

    source: a folder or a hub name. device "meta" gives the architecture alone: nothing is read or
    initialised, whatever weights there are. seed: of a model that is to be trained; one without
    weights then starts from fresh ones.
    Raises TaskError for a folder without config, tokenizer or weights, with pickled weights, or
    with tensors that are missing, left over or not finite.
    """
    check_source(source)
    what = "cannot be loaded" if Path(source).is_dir() else "no folder, and not loaded from the hub"
    with blaming(f"{source}: {what}"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if type(getattr(config, "max_position_embeddings", None)) is not int:
            raise TaskError(f"{source}: its config.json has no max_position_embeddings")
        model, report = build_model(AutoModelForCausalLM, source, config, device, dtype, seed)
    if differing := report["missing_keys"] | report["unexpected_keys"]:
        raise TaskError(f"{source}: tensors are missing or left over: {few(differing)}")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise TaskError(
            f"{source}: the tokenizer has more tokens ({len(tokenizer)}) than the model's embedding"
        )
    model.generation_config = GenerationConfig()  # no temperature, top-k, ... is taken over
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(device), tokenizer


def build_model(model_class, source, config, device, dtype, seed):
    """(model, report) of a config, with a source's weights if it has any; see load_model.

    report: which tensors are missing_keys or unexpected_keys, sets of names. Missing ones, as of a
    new head, are initialised from the seed.
    """
    settings = {"dtype": dtype, "trust_remote_code": False}
    nothing = {"missing_keys": set(), "unexpected_keys": set()}
    if str(device) == "meta":
        with torch.device("meta"):
            return model_class.from_config(config, **settings), nothing
    torch.manual_seed(seed or 0)
    if has_weights(source):
        settings |= {"use_safetensors": True, "output_loading_info": True}
        settings["ignore_mismatched_sizes"] = True  # they are refused here, by name
        model, report = model_class.from_pretrained(source, config=config, **settings)
        if report["mismatched_keys"]:
            names = [name for name, *_ in report["mismatched_keys"]]
            raise TaskError(f"{source}: tensors of another shape: {few(names)}")
        not_finite = [name for name, p in model.named_parameters() if not p.isfinite().all()]
        if not_finite:
            raise TaskError(f"{source}: weights that are not finite: {few(not_finite)}")
        return model, report
    if seed is None:
        raise TaskError(f"{source}: holds no weights (*.safetensors); train.py trains it")
    return model_class.from_config(config, **settings), nothing


def has_weights(source):
    """Whether a model's folder has safetensors; a hub name is taken to have them."""
    return not Path(source).is_dir() or any(Path(source).glob("*.safetensors"))


def few(names):
    """Some names for a message, in order."""
    names = sorted(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def check_source(source):
    """Raise TaskError for what is no model folder and cannot be a hub name either.

    Also for a folder without config or tokenizer, or with pickled weights alone.
    """
    folder = Path(source)
    if not folder.is_dir():
        # A hub name is NAME or OWNER/NAME; runs/typo is none where there is a folder runs.
        is_path = folder.exists() or (folder.parent != Path() and folder.parent.is_dir())
        if is_path or len(folder.parts) > 2 or str(source).startswith((".", "/", "~")):
            raise TaskError(f"{source}: not a model folder; give --model one, or a hub name")
        return
    if not (folder / "config.json").is_file():
        raise TaskError(
            f"{folder}: no config.json; a model folder holds config, tokenizer, safetensors weights"
        )
    if not any((folder / x).is_file() for x in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise TaskError(
            f"{folder}: no tokenizer (tokenizer.json); save one with tokenizer.save_pretrained"
        )
    pickled = [*folder.glob("*.bin"), *folder.glob("*.pt")]
    if pickled and not any(folder.glob("*.safetensors")):
        raise TaskError(
            f"{folder}: only pickled weights, which are not loaded; convert them to safetensors"
        )


# Scoring ------------------------------------------------------------------------------------------


def predictions_of(task, logits_NY):
    """Predictions from label logits, as `metrics` takes them: dicts of label, grade and probs."""
    probs_NY = torch.softmax(logits_NY.double(), -1).cpu().numpy()
    out = []
    for probs_Y in probs_NY:
        out.append(
            {
                "label": task.labels[int(probs_Y.argmax())],
                "grade": float(task.grade(probs_Y)),
                "probs": dict(zip(task.labels, probs_Y.tolist(), strict=True)),
            }
        )
    return out


def judge(renderer, engine, records, explain=True):
    """Grade records (query, document): label, grade, probs, well_formed; explained, the steps too.

    engine: rollout.Engine, or anything with its `generate` and `label_logits`.
    The label distribution is a softmax over the labels' first tokens at one position: behind the
    model's own reasoning (reason-first), or directly behind the prompt and "\\boxed{"
    (answer-first; the answer is only generated if explain). Where the answer itself goes through
    that position, the logits of its generation are taken; else it takes another forward pass. A
    malformed answer gets label None, and is read with "\\boxed{" put behind what it wrote.
    """
    task = renderer.task
    prompts = renderer.prompts(records)
    answers = label_logits = [[]] * len(prompts)
    if explain or task.format == "reason-first":
        answers, label_logits = engine.generate(prompts)
    traces = [renderer.parse(answer) for answer in answers]

    logits_NY = torch.zeros(len(prompts), len(task.labels))
    unread = []  # answers whose label has another position than those that were generated
    sequences = []
    for i, (prompt, answer, trace) in enumerate(zip(prompts, answers, traces, strict=True)):
        if task.format == "answer-first":
            before_label = renderer.opening
        elif trace.problem is None and trace.steps[-1].label_at is not None:
            before_label = answer[: trace.steps[-1].label_at]
        else:
            before_label = [t for t in answer if t != renderer.eos_id] + renderer.opening
        at = len(before_label)
        if answer[:at] == before_label and len(answer) > at:
            logits_NY[i] = label_logits[i][at]
        else:
            unread.append(i)
            sequences.append([*prompt, *before_label])
    if unread:
        logits_NY[unread] = engine.label_logits(sequences)

    results = predictions_of(task, logits_NY)
    for result, answer, trace in zip(results, answers, traces, strict=True):
        result["well_formed"] = trace.problem is None or not answer
        if answer:
            result["label"] = trace.label
        if explain:
            text = [token for token in answer if token != renderer.eos_id]
            result["problem"] = trace.problem
            result["answer"] = renderer.decode(text).strip()
            result["steps"] = []
            for name, step in zip(task.boxes, trace.steps, strict=False):
                text = renderer.decode(answer[step.start : step.end]).strip()
                result["steps"].append({"step": name, "label": step.label, "text": text})
    return results


def load_judge(model, task, max_new_tokens=None):
    """(renderer, engine) of a model's folder, for `judge`; task: a folder, or None for the model's.

    max_new_tokens: None for as many as the model was trained to give, which its folder says.
    Raises TaskError if they do not fit each other.
    """
    import rollout

    if max_new_tokens is None:
        max_new_tokens = trained_length(model)
    if max_new_tokens < 1:
        raise TaskError(f"--max_new_tokens {max_new_tokens}: must be at least 1")
    check_source(model)
    if task is None and not (Path(model) / "criteria.md").is_file():
        raise TaskError(f"--model {model}: has no criteria.md; name the task's folder with --task")
    task = Task.load(task or model)
    task.check_model(model)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, tokenizer = load_model(model, dtype=dtype)
    context = model.config.max_position_embeddings
    renderer = Renderer(task, tokenizer, context, max_new_tokens)
    rollout.use_tree_attention(model)
    budgets = rollout.token_budgets(model, model.device, dtype.itemsize, dtype.itemsize)
    ids = (renderer.eos_id, renderer.label_ids)
    return renderer, rollout.Engine(model, *ids, max_new_tokens, *budgets)


def trained_length(folder):
    """The max_new_tokens of a folder's generation_config.json, where train.py notes its own."""
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return MAX_NEW_TOKENS
    with blaming(path):
        length = parse_json(path.read_text(encoding="utf-8")).get("max_new_tokens")
    return length if type(length) is int else MAX_NEW_TOKENS


def score_file(args):
    """`grm.py score`: grade a JSON Lines file.

    Results go to OUT.partial, whose first line holds the settings; a stopped run goes on from
    there, and OUT appears when all is done.
    """
    import parallel

    out = Path(args.out)
    partial = Path(f"{out}.partial")
    lock = Path(f"{out}.lock")
    if args.batch_size < 1:
        raise TaskError(f"--batch_size {args.batch_size}: must be at least 1")
    check_free(out, partial)
    if not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise TaskError(f"--out {out}: its folder does not exist, or cannot be written")
    inputs = [args.model, Path(args.task or args.model) / "criteria.md", args.pairs]
    inputs_hash = parallel.hash_inputs(inputs)  # before they are read: it refuses damaged ones
    renderer, engine = load_judge(args.model, args.task, args.max_new_tokens)
    records = renderer.task.read(args.pairs, required=())
    bf16 = engine.model.dtype == torch.bfloat16
    parallel.announce(parallel.Ranks(), bf16, engine.model, {args.pairs: records}, out)
    # All prompts, so that a pair that does not fit is named before any work.
    renderer.prompts(parallel.Bar(records, desc="prompts", delay=parallel.LINE_SECONDS))
    if renderer.truncated:
        cut = f"{renderer.truncated} of {len(records)} documents"
        print(f"{cut} were cut to fit the model's context", file=sys.stderr)

    settings = {"explain": args.explain, "batch_size": args.batch_size}
    settings |= {"max_new_tokens": engine.max_new_tokens, "inputs": inputs_hash}
    header = json.dumps(settings).encode()
    with parallel.lock(lock):
        check_free(out, partial)  # once more: nobody else can write it now
        grade_file(renderer, engine, records, partial, header, args)
        lines = partial.read_bytes().split(b"\n", 1)[1]
        with parallel.writing(out) as unfinished:
            unfinished.write_bytes(lines)
        partial.unlink()
        lock.unlink()
    results = [json.loads(line) for line in lines.splitlines()]
    malformed = sum(not result["well_formed"] for result in results)
    print(f"{out}: {len(results)} pairs, {malformed} malformed")
    if all(result.get("gold") in renderer.task.labels for result in results):
        gold = [result | {"label": result["gold"]} for result in results]
        figures = metrics(renderer.task, gold, results)
        rows = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in figures.items()]
        print("{\n" + ",\n".join(rows) + "\n}")


def check_free(out, partial):
    """Raise TaskError if there is a file already, but for one that was just finished."""
    if out.exists() and not (partial.exists() and partial.read_bytes().endswith(out.read_bytes())):
        raise TaskError(f"--out {out}: exists; delete it or choose another name")


def grade_file(renderer, engine, records, partial, header, args):
    """Write the header and a line for each record to a file, or what is missing of them."""
    import parallel

    lines = partial.read_bytes().split(b"\n")[:-1] if partial.exists() else []  # whole lines
    if lines and lines[0] != header:
        raise TaskError(
            f"{partial}: belongs to a run with other settings, model or pairs; "
            "delete it or change --out"
        )
    done = max(0, len(lines) - 1)
    if done < len(records):
        done -= done % args.batch_size  # in another batch a pair's last digits may differ
    for line in lines[1 : 1 + done]:
        with blaming(f"{partial}: damaged; delete it"):
            parse_json(line)
    kept = b"".join(line + b"\n" for line in lines[: 1 + done])
    with open(partial, "ab") as file:
        file.truncate(len(kept))
        if not kept:
            file.write(header + b"\n")
        with parallel.Bar(total=len(records), initial=done, desc="score", unit="pair") as bar:
            for start in range(done, len(records), args.batch_size):
                batch = records[start : start + args.batch_size]
                results = judge(renderer, engine, batch, args.explain)
                lines = []
                for record, result in zip(batch, results, strict=True):
                    line = json.dumps(scored(record, result), ensure_ascii=False)
                    lines.append(line.encode("utf-8", "backslashreplace") + b"\n")
                with parallel.clear_errors(partial):
                    file.write(b"".join(lines))
                    file.flush()
                bar.update(len(batch))


def scored(record, result):
    """A record with its result. `label` is the model's; one that the input had is kept as `gold`.

    In a file that was graded before, `label` is that grade, and `gold` is there already.
    """
    kept = {name: value for name, value in record.items() if name != "label"}
    if "label" in record:
        kept = {"gold": record["label"]} | kept
    return kept | result


def judge_pair(args):
    """`grm.py judge`: one reasoned judgement, printed."""
    import parallel

    parallel.hash_inputs([args.model])  # so that a damaged folder is refused
    renderer, engine = load_judge(args.model, args.task, args.max_new_tokens)
    try:
        record = renderer.task.check({"query": args.query, "document": args.document})
    except ValueError as error:
        raise TaskError(f"{error}") from None
    (result,) = judge(renderer, engine, [record])
    if result["problem"]:
        print(f"malformed answer ({result['problem']}): {result['answer']}")
    for step in result["steps"]:
        print(f"{step['step']:>14} | {step['text']}")
    for label, p in result["probs"].items():
        mark = "<- answer" if label == result["label"] else ""
        print(f"{label:>14} | {'#' * round(40 * p):<40} {p:.3f} {mark}".rstrip())
    print(f"{'expected':>14} | {result['grade']:.2f}")


def main():
    """Command line: `score` a file of pairs or `judge` one pair."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    score = commands.add_parser("score", help="grade a file")
    single = commands.add_parser("judge", help="grade one pair")
    for command in (score, single):
        command.add_argument("--model", required=True, help="model folder or hub name")
        command.add_argument("--task", help="folder with criteria.md (default: the model's own)")
        command.add_argument(
            "--max_new_tokens", type=int, help="longest answer in tokens (default: as trained)"
        )
    score.add_argument(
        "--pairs", required=True, help="JSON Lines with query, document; a label is kept as gold"
    )
    score.add_argument(
        "--out", required=True, help="JSON Lines to write; a stopped run goes on from OUT.partial"
    )
    score.add_argument("--explain", action="store_true", help="write the reasoning steps too")
    score.add_argument("--batch_size", type=int, default=256, help="pairs a batch (default 256)")
    single.add_argument("query")
    single.add_argument("document")
    args = parser.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if args.command == "score":
        score_file(args)
    else:
        judge_pair(args)


if __name__ == "__main__":
    try:
        import parallel
        import rollout
    except ImportError as missing:
        sys.exit(f"scoring needs rollout.py and parallel.py beside grm.py: {missing}")
    parallel.launch(main, errors=(TaskError, rollout.UnsupportedModelError))
