"""The task: criteria, prompt, answer format, parsing, reward, metrics, loading and scoring.        (what is relevance?)

A task is a folder with a `criteria.md` (front matter: labels, steps, format; body: the system prompt) and JSON Lines.
The model reads criteria, query and document, reasons in steps, closes each with \\boxed{label}, and one box is its answer.
All that is trained or parsed is token ids: text is tokenised once, and ids are never decoded and encoded again.

    python grm.py score --model DIR --pairs IN.jsonl --out OUT.jsonl [--task DIR] [--explain]
    python grm.py judge --model DIR "query" "document"

This file needs torch, transformers (with jinja2), numpy, pyyaml and tqdm only; copy it alone.
Shapes: N answers, Y labels.
"""

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from jinja2.exceptions import TemplateError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.utils import logging as hf_logging

BOX = re.compile(r"\\boxed\{([^{}]*)\}")
FORMATS = ("reason-first", "answer-first")


class TaskError(ValueError):
    """Input that cannot be used. The message holds one line per problem, `file:line: what is wrong` where there is one."""


# The task folder ------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A task folder: `criteria` (the system prompt), `labels` from worst to best, `relevant` (the labels that count as
    relevant), `steps` (names of the reasoning steps) and `format` ("reason-first" or "answer-first")."""

    folder: Path
    criteria: str
    labels: list[str]
    relevant: list[str]
    steps: list[str]
    format: str

    @classmethod
    def load(cls, folder):
        """Read and check `folder`/criteria.md. Raises TaskError that names the file and the field."""
        path = Path(folder) / "criteria.md"
        if not path.is_file():
            raise TaskError(f"{path}: not found; --task names a folder with a criteria.md")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise TaskError(f"{path}: not UTF-8: {error}") from None
        parts = re.split(r"^---[ \t]*$", text, maxsplit=2, flags=re.MULTILINE)
        if len(parts) != 3 or parts[0].strip():
            raise TaskError(f"{path}:1: must begin with a front matter between two lines of ---")
        try:
            head = yaml.safe_load(parts[1])
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line, problem = mark.line + 1 if mark else 1, getattr(error, "problem", None) or error
            raise TaskError(f"{path}:{line}: the front matter is not YAML: {problem}") from None
        keys = re.findall(r"^(\w+)\s*:", parts[1], flags=re.MULTILINE)
        if len(set(keys)) < len(keys):
            raise TaskError(f"{path}: the front matter names {max(keys, key=keys.count)} twice")
        if not isinstance(head, dict) or set(head) - {"labels", "relevant", "steps", "format"}:
            raise TaskError(f"{path}: the front matter holds labels, relevant, steps and format, and nothing else")

        def strings(name):
            values = head.get(name, [])
            if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, str | int) for v in values):
                raise TaskError(f"{path}: {name} must be a list of strings or integers; quote words such as yes and no")
            values = [str(v).strip() for v in values]
            if len(set(values)) < len(values) or any(not v or set("{}") & set(v) for v in values):
                raise TaskError(f"{path}: {name} must not repeat a value nor contain braces, nor an empty value")
            return values

        task = cls(Path(folder), parts[2].strip(), *map(strings, ("labels", "relevant", "steps")), head.get("format"))
        if len(task.labels) < 2 or not set(task.relevant) <= set(task.labels):
            raise TaskError(f"{path}: labels needs two or more values, and relevant must be some of them")
        if task.format not in FORMATS:
            raise TaskError(f"{path}: format must be one of {', '.join(FORMATS)}, not {task.format!r}")
        if task.format == "reason-first" and not task.steps:
            raise TaskError(f"{path}: a reason-first task needs at least one step, the last of which gives the label")
        if "\\boxed{" not in task.criteria:
            raise TaskError(f"{path}: the criteria must tell the model to close each step with \\boxed{{label}}")
        return task

    def save(self, folder):
        """Write criteria.md into a folder: beside a model's weights, it says what the model was trained for."""
        head = {name: getattr(self, name) for name in ("labels", "relevant", "steps", "format")}
        front = "".join(f"{name}: {json.dumps(value)}\n" for name, value in head.items())
        (Path(folder) / "criteria.md").write_text(f"---\n{front}---\n{self.criteria}\n", encoding="utf-8")

    def check_model(self, folder):
        """Raise TaskError if a model's folder says that it was trained for other labels or steps, or in another format."""
        if (Path(folder) / "criteria.md").is_file():
            theirs = Task.load(folder)
            for name in ("format", "steps", "labels"):
                ours, other = getattr(self, name), getattr(theirs, name)
                if ours != other:
                    raise TaskError(f"{folder}: was trained for {name} {other}, and {self.folder} has {ours}")

    @property
    def boxes(self):
        """The names of the boxes of an answer in their order; an answer-first answer begins with the label's own box."""
        return self.steps if self.format == "reason-first" else ["label", *self.steps]

    def read(self, path, fields=("label",)):
        """Read a JSON Lines file, checked: query, document, and `fields` of label and response.

        Returns dicts with `where` = "file:line" added. Raises TaskError with all bad lines, at most 20 of them named.
        """
        path = Path(path)
        if not path.is_file():
            raise TaskError(f"{path}: not found")
        records, problems = [], []
        for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            if line.strip():
                try:
                    records.append({**self._check(json.loads(line.decode("utf-8")), fields), "where": f"{path}:{number}"})
                except json.JSONDecodeError as error:
                    problems.append(f"{path}:{number}: not JSON: {error.msg}, column {error.colno}")
                except (ValueError, RecursionError) as error:
                    problems.append(f"{path}:{number}: {error}")
        if not records and not problems:
            problems = [f"{path}: holds no pairs"]
        if problems:
            more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
            raise TaskError("\n".join(problems[:20] + more))
        return records

    def _check(self, record, fields):
        if not isinstance(record, dict):
            raise ValueError("must be a JSON object")
        for name in ("query", "document", *(f for f in fields if f != "label")):
            if not isinstance(record.get(name), str) or not record[name].strip():
                raise ValueError(f"{name!r} is missing, empty or not a string")
            record[name].encode("utf-8")  # lone surrogates cannot be tokenised: UnicodeEncodeError is a ValueError
        if "label" in record and record["label"] is None and "label" not in fields:
            del record["label"]
        if "label" in fields and "label" not in record:
            raise ValueError("'label' is missing")
        if "label" in record:
            record["label"] = self._label(record.get("label"))
        if not self.steps:
            record.pop("step_labels", None)  # of the task's other form: there is nothing to compare them with
        if "step_labels" in record:
            steps = record["step_labels"]
            if not isinstance(steps, list) or len(steps) != len(self.boxes):
                raise ValueError(f"'step_labels' must be a list of {len(self.boxes)} labels, for {', '.join(self.boxes)}")
            record["step_labels"] = [self._label(label) for label in steps]
        if not isinstance(record.get("query_id", ""), str | int):
            raise ValueError("'query_id' must be a string or an integer")
        if type(record.get("stage", 0)) is not int:
            raise ValueError("'stage' must be an integer")
        return record

    def _label(self, value):
        if isinstance(value, bool) or not isinstance(value, str | int) or str(value) not in self.labels:
            raise ValueError(f"unknown label {value!r}; the labels are {', '.join(self.labels)}")
        return str(value)

    def grade(self, label_probs):
        """Expected grade of probabilities over the labels [..., Y]: the labels' numbers, or their ranks from 0 if words."""
        try:
            values = [float(label) for label in self.labels]
        except ValueError:
            values = range(len(self.labels))
        return np.asarray(label_probs) @ np.asarray(values, dtype=np.float64)


def setting(default, text):
    """A field of a settings dataclass, with its help text."""
    return field(default=default, metadata={"help": text.replace("%", "%%")})  # argparse formats help texts


def parse_settings(config_class, name, description, argv=None):
    """Settings from the command line, then the JSON file TASK/`name`, then the defaults of the dataclass `config_class`.

    Returns (config, task folder as a Path). Raises TaskError for a file whose settings are unknown or of a wrong type;
    an unknown flag ends the program with a usage message.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task", default=config_class.task)
    task = Path(first.parse_known_args(argv)[0].task)
    parser = HfArgumentParser(config_class, description=description, allow_abbrev=False)
    argv, defaults, path = sys.argv[1:] if argv is None else list(argv), [], task / name
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise TaskError(f"{path}: {error}") from None
        if not isinstance(values, dict):
            raise TaskError(f"{path}: must be a JSON object of settings")
        if unknown := set(values) - set(config_class.__dataclass_fields__):
            raise TaskError(f"{path}: unknown settings {', '.join(sorted(unknown))}")
        defaults = [f"--{key}={value}" for key, value in values.items()]
        parser.exit_on_error = False  # its own message would blame the command line
        try:
            parser.parse_known_args(defaults)
        except argparse.ArgumentError as error:
            raise TaskError(f"{path}: {error}") from None
        parser.exit_on_error = True
    config, unknown = parser.parse_args_into_dataclasses(defaults + argv, return_remaining_strings=True)  # the later wins
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}")
    return config, task


# Prompts and answers as token ids -------------------------------------------------------------------------------------


@dataclass
class Step:
    """One step of an answer: its tokens are ids[start:end], box included; label_at is the index of the label's first
    token (None if the answer spells the label with unusual tokens)."""

    start: int
    end: int
    label: str
    label_at: int | None


@dataclass
class Trace:
    """A parsed answer. problem is None for a well-formed answer; a malformed one has no steps and no label."""

    steps: list[Step] = field(default_factory=list)
    label: str | None = None
    problem: str | None = None


class TokenTask:
    """A task in the token ids of one tokenizer: the one prompt builder and the one parser of everything in the project.

    max_prompt_tokens: prompts are cut to it, in the document alone (`truncated` counts how many were); None: no limit.
    eos_id: the token that ends an answer, as the chat template ends the assistant's turn.
    opening: the ids of "\\boxed{"; label_ids: the id with which each label begins behind it, all different.
    Raises TaskError if the tokenizer has no chat template or the labels' first tokens coincide.
    """

    QUERY, DOCUMENT, ANSWER, CRITERIA = ("<<grm:query>>", "<<grm:document>>", "<<grm:answer>>", "<<grm:criteria>>")

    def __init__(self, task, tokenizer, max_prompt_tokens=None):
        self.task, self.tokenizer, self.max_prompt_tokens, self.truncated = task, tokenizer, max_prompt_tokens, 0
        vocabulary = tokenizer.get_vocab()
        self._added = set(tokenizer.added_tokens_encoder.values()) | set(tokenizer.all_special_ids)
        self._closers = {i for token, i in vocabulary.items() if "}" in token or token == "<0x7D>"}
        self._size = len(tokenizer)
        self._read_template()
        self._read_labels()

    def _read_template(self):
        """Cut the rendered chat template at the places of criteria, query and document, and find the end of the turn."""
        if not self.tokenizer.chat_template:
            raise TaskError("the tokenizer has no chat template; put a chat_template.jinja into the model folder")
        user = f"Query: {self.QUERY}\nDocument: {self.DOCUMENT}"
        try:
            messages = [{"role": "system", "content": self.CRITERIA}, {"role": "user", "content": user}]
            text, ending = self._render(messages)
        except TemplateError:  # some templates (Gemma's) know no system turn: then the criteria lead the user's
            text, ending = self._render([{"role": "user", "content": f"{self.CRITERIA}\n\n{user}"}])
        marks = (self.CRITERIA, self.QUERY, self.DOCUMENT)
        pieces = re.split("|".join(map(re.escape, marks)), text)
        if len(pieces) != 4 or self.ANSWER not in ending:
            raise TaskError("the chat template drops or repeats the system or user message; use another template")
        # The space before query and document belongs to their first word, as in running text.
        pieces = [piece.rstrip(" ") if i in (1, 2) else piece for i, piece in enumerate(pieces)]
        head, query, document, tail = (self._encode(piece, special=True) for piece in pieces)
        self._pieces = (head + self._encode(self.task.criteria) + query, document, tail)
        after = self._encode(ending.split(self.ANSWER, 1)[1], special=True)
        self.eos_id = after[0] if after and after[0] in self._added else self.tokenizer.eos_token_id
        if self.eos_id is None:
            raise TaskError("the tokenizer has no end-of-sequence token, and its chat template ends a turn with none")

    def _render(self, messages):
        # enable_thinking=False (Qwen3 and relatives): the task's own steps are the reasoning; others ignore it.
        render = self.tokenizer.apply_chat_template
        prompt = render(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        answer = [*messages, {"role": "assistant", "content": self.ANSWER}]
        return prompt, render(answer, tokenize=False, enable_thinking=False)

    def _encode(self, text, special=False):
        """Ids of a text. Unless `special`, nothing in it can become an added token: what looks like one is spelled out."""
        # verbose=False: no warning about length; what is too long is cut or refused, and reported, in `prompt`
        settings = {"add_special_tokens": False, "split_special_tokens": not special, "verbose": False}
        ids = self.tokenizer(text, **settings).input_ids
        if special or self._added.isdisjoint(ids):
            return ids
        plain = []
        for i in ids:
            # `split_special_tokens` splits the special ones alone; added ones (<think>) are spelled letter by letter here.
            letters = self.tokenizer.convert_ids_to_tokens(i) if i in self._added and i != self.tokenizer.unk_token_id else ""
            spelled = [self.tokenizer(c, add_special_tokens=False, split_special_tokens=True).input_ids for c in letters]
            plain += [j for part in spelled for j in part if j not in self._added] if letters else [i]
        return plain

    def _read_labels(self):
        """Find the ids of "\\boxed{" and of every label behind it, tokenised by itself: merged with its brace ("{-" is one
        token of many vocabularies), -1 would begin at another position than the other labels."""
        self.opening = self._encode("\\boxed{")
        self._labels = {label: self._behind_brace(label) for label in self.task.labels}
        self.label_ids = [ids[0] if ids else None for ids in self._labels.values()]
        if len(set(self.label_ids)) < len(self._labels) or any(
            self.tokenizer.unk_token_id in ids for ids in self._labels.values()
        ):
            named = ", ".join(f"{label!r} = {ids}" for label, ids in self._labels.items())
            raise TaskError(f"criteria.md: labels whose first tokens coincide, or are unknown ({named}); rename them")
        # Labels as this tokenizer writes them: a word-level one may lower-case them or put spaces around a hyphen.
        self._known = {self._boxed(self.answer(f"\\boxed{{{label}}}"))[-1]: label for label in self.task.labels}

    def _behind_brace(self, text):
        """Ids of a text behind "\\boxed{": no token spans the brace, and none brings a space (SentencePiece) with it."""
        ids, start = self._encode("\\boxed{" + text), len(self.opening)
        return ids[start:] if ids[:start] == self.opening else self._encode(text)

    def answer(self, text):
        """Ids of an answer's text, every label in a box tokenised by itself."""
        pieces = re.split(r"(?<=\\boxed\{)([^{}]*)(?=\})", text)  # text, label, text, label, ..., text
        out = self._encode(pieces[0])
        for i, piece in enumerate(pieces[1:]):
            out += self._labels.get(piece.strip() if i % 2 == 0 else None) or self._behind_brace(piece)
        return out

    def _boxed(self, ids):
        """What stands in the complete boxes of some ids, without white space."""
        return ["".join(text.split()) for text in BOX.findall(self.decode(ids))]

    def decode(self, ids):
        """Text of ids, special tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def prompt(self, query, document):
        """Prompt ids of one pair. Raises TaskError if they do not fit max_prompt_tokens without any document."""
        head, middle, tail = self._pieces
        query_ids, document_ids = self._encode(" " + query), self._encode(" " + document)
        before = [*head, *query_ids, *middle]
        if self.max_prompt_tokens is not None:
            room = self.max_prompt_tokens - len(before) - len(tail)
            if room < 1:
                raise TaskError(
                    f"the criteria and the query alone fill {len(before) + len(tail)} tokens; the model's context leaves "
                    f"{self.max_prompt_tokens} for the prompt: shorten them, or lower --max_new_tokens"
                )
            self.truncated += len(document_ids) > room
            document_ids = document_ids[:room]
        return [*before, *document_ids, *tail]

    def response(self, text):
        """Ids of a demonstration's answer, closed by eos_id."""
        return [*self.answer(text), self.eos_id]

    def prompts(self, records):
        """Prompt ids of records as `Task.read` returns them; TaskError names the record that does not fit."""
        out = []
        for record in records:
            try:
                out.append(self.prompt(record["query"], record["document"]))
            except TaskError as error:
                raise TaskError(f"{record.get('where', 'pair')}: {error}") from None
        return out

    def parse(self, ids):
        """Parse an answer's ids into a Trace. Any list of integers gives a trace or a named problem, never an exception.

        Well-formed: exactly the expected boxes with known labels, closed by eos_id and by nothing else.
        """
        if not ids or ids[-1] != self.eos_id:
            return Trace(problem="not ended")
        body = ids[:-1]
        if self.eos_id in body or any(not 0 <= i < self._size for i in body):
            return Trace(problem="a token that does not belong into an answer")
        steps, boxes = [], self.task.boxes
        for end in (i + 1 for i, token in enumerate(body) if token in self._closers):
            found = self._boxed(body[:end])
            if len(found) > min(len(steps) + 1, len(boxes)):
                return Trace(problem="too many boxes")
            if len(found) > len(steps):
                label = self._known.get(found[-1])
                if label is None:
                    return Trace(problem="unknown label")
                start = steps[-1].end if steps else 0
                steps.append(Step(start, end, label, self._find_label(body, start, end, label)))
        if len(steps) < len(boxes):
            return Trace(problem="missing boxes")
        return Trace(steps, steps[-1 if self.task.format == "reason-first" else 0].label)

    def _find_label(self, ids, start, end, label):
        first = self._labels[label][0]
        for at in range(end - 1, start, -1):
            if ids[at] == first and "".join(self.decode(ids[start:at]).split()).endswith("\\boxed{"):
                return None if "\\boxed" in self.decode(ids[at:end]) else at
        return None


def reward(trace, gold):
    """1.0 for a well-formed answer with the gold label, else 0.0: 1(f(o) = l) of arXiv 2512.00968, nothing in between.

    Answer-first, the first box alone is the label. An explanation that contradicts it is well-formed: each of its steps is
    judged by its own target, so stepwise credit goes to whichever of score and explanation is right (our rule).
    """
    return float(trace.problem is None and trace.label == gold)


def step_verdicts(trace, targets):
    """Whether each step's label is its target; targets: a label per box. A malformed answer has no steps: []."""
    return [step.label == target for step, target in zip(trace.steps, targets, strict=False)]


# Metrics --------------------------------------------------------------------------------------------------------------


def ndcg(gains, scores, k=10):
    """nDCG@k of one query: linear gains, 1 / log2(rank + 1) discounts, ties in the scores averaged over their orders.
    None where no document has a gain, which says nothing about the order."""
    gains, scores = np.asarray(gains, float), np.asarray(scores, float)
    discounts = np.where(np.arange(len(gains)) < k, 1 / np.log2(np.arange(len(gains)) + 2), 0.0)
    ideal = np.sort(gains)[::-1] @ discounts
    if ideal == 0:
        return None
    _, tie, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    mean_gains = np.bincount(tie, weights=gains) / counts
    ends = np.cumsum(counts)
    sums = np.concatenate([[0], np.cumsum(discounts)])
    return float(mean_gains @ (sums[ends] - sums[ends - counts]) / ideal)


def quadratic_kappa(gold, predicted, classes):
    """Cohen's kappa with quadratic weights over class indices 0 .. classes - 1; 0.0 where it is undefined."""
    table = np.zeros((classes, classes))
    np.add.at(table, (gold, predicted), 1)
    expected = np.outer(table.sum(1), table.sum(0)) / max(table.sum(), 1)
    weights = np.subtract.outer(np.arange(classes), np.arange(classes)) ** 2
    return float(1 - (weights * table).sum() / (weights * expected).sum()) if (weights * expected).any() else 0.0


def metrics(task, records, predictions):
    """Metrics of predictions against records with labels.

    predictions: dicts with `label` (None for a malformed answer), `grade` (float) and, optionally, `steps`.
    A malformed answer is wrong everywhere; for the kappa it counts as the label farthest from the gold one. macro_f1 is the
    mean over the labels that occur in the gold data. ndcg@10 needs query_id, step_accuracy needs step_labels. contradicted
    (answer-first): the share of answers whose last step ends at another label than the answer's.
    """
    labels, Y = task.labels, len(task.labels)
    gold = np.array([labels.index(r["label"]) for r in records])
    got = np.array([labels.index(p["label"]) if p["label"] is not None else -1 for p in predictions])
    relevant = np.array([label in task.relevant for label in labels] + [False])  # index -1: malformed
    out = {"accuracy": float((gold == got).mean()), "malformed": float((got < 0).mean())}
    out["binary_accuracy"] = float(((relevant[gold] == relevant[got]) & (got >= 0)).mean())
    hits, golds, gots = ([int(x) for x in np.bincount(v[v >= 0], minlength=Y)] for v in (gold[gold == got], gold, got))
    f1 = [2 * h / (a + b) for h, a, b in zip(hits, golds, gots, strict=True) if a]
    out["macro_f1"] = float(np.mean(f1))
    farthest = np.where(gold >= Y / 2, 0, Y - 1)
    out["kappa"] = quadratic_kappa(gold, np.where(got < 0, farthest, got), Y)
    if all("step_labels" in r for r in records) and all("steps" in p for p in predictions):
        right = [
            [step["label"] == gold for step, gold in zip(p["steps"], r["step_labels"], strict=True)]
            if p["steps"]
            else [False] * len(task.boxes)
            for r, p in zip(records, predictions, strict=True)
        ]
        out["step_accuracy"] = dict(zip(task.boxes, np.mean(right, 0).tolist(), strict=True))
    if task.format == "answer-first" and task.steps and all("steps" in p for p in predictions):
        out["contradicted"] = float(np.mean([bool(p["steps"]) and p["steps"][-1]["label"] != p["label"] for p in predictions]))
    if all("query_id" in r for r in records):
        queries = {}
        for record, prediction, gain in zip(records, predictions, gold, strict=True):
            queries.setdefault(record["query_id"], []).append((gain, prediction["grade"]))
        values = [v for pairs in queries.values() if (v := ndcg(*zip(*pairs, strict=True))) is not None]
        out["ndcg@10"] = float(np.mean(values)) if values else 0.0
    out["classes"] = {
        name: {"gold": a, "predicted": b, "right": h} for name, a, b, h in zip(labels, golds, gots, hits, strict=True)
    }
    return out


# Models ---------------------------------------------------------------------------------------------------------------


def load_model(source, device=None, dtype=torch.float32, seed=0):
    """Load (model, tokenizer) of a decoder-only model from a folder or a hub name: safetensors only, no remote code.

    A folder that holds a config and a tokenizer but no weights gives a fresh model, initialised from `seed`. device "meta"
    gives the architecture alone: nothing is read or initialised, whatever weights there are.
    Raises TaskError for a folder without config or tokenizer, or with pickled weights.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise TaskError(f"{source}: no config.json; a model folder holds config, tokenizer and safetensors weights")
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise TaskError(f"{source}: no tokenizer (tokenizer.json); save one with tokenizer.save_pretrained")
    elif folder.exists() or str(source).startswith((".", "/")) or str(source).count("/") > 1:
        raise TaskError(f"{source}: not a model folder; name one, or a hub model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if device == "meta":
            with torch.device("meta"):
                config = AutoConfig.from_pretrained(source, trust_remote_code=False)
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        elif not folder.is_dir() or list(folder.glob("*.safetensors")):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, trust_remote_code=False)
        elif list(folder.glob("*.bin")) + list(folder.glob("*.pt")):
            raise TaskError(f"{source}: only pickled weights, which are not loaded; convert them to safetensors")
        else:
            torch.manual_seed(seed)
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except TaskError:
        raise
    except Exception as error:  # whatever a broken or foreign folder makes the libraries raise
        raise TaskError(f"{source}: cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise TaskError(f"{source}: the tokenizer has more tokens ({len(tokenizer)}) than the model's embedding")
    model.generation_config = GenerationConfig()  # nothing (temperature, top-k, ...) is taken over silently
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(device), tokenizer


class PaddedEngine:
    """Greedy answers and next-token logits through Hugging Face's own forward, for left-padded batches. The plain way:
    train.py brings an engine with the same two methods that shares prefixes (rollout.py)."""

    def __init__(self, model, eos_id, max_new_tokens):
        self.model, self.eos_id, self.max_new_tokens = model, eos_id, max_new_tokens

    def _pad(self, rows):
        width = max(map(len, rows))
        ids = torch.tensor([[self.eos_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])  # from lengths, not from pad ids
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    @torch.no_grad()
    def generate(self, prompts):
        """Greedy answers (lists of ids, eos included where the model ended) to prompts (lists of ids)."""
        batch = self._pad(prompts)
        settings = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, eos_token_id=self.eos_id, pad_token_id=self.eos_id
        )
        rows = self.model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :].tolist()
        return [row[: row.index(self.eos_id) + 1] if self.eos_id in row else row for row in rows]

    @torch.no_grad()
    def label_logits(self, sequences, label_ids):
        """float32 logits [N, Y] of the label ids as the next token of each sequence."""
        batch = self._pad(sequences)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = self.model(**batch, position_ids=positions, logits_to_keep=1).logits[:, -1]
        return logits[:, label_ids].float().cpu()


# Scoring --------------------------------------------------------------------------------------------------------------


def judge(tokens, engine, records, explain=True):
    """Grade records (query, document); returns a dict each: label, grade, probs, well_formed and, explained, the steps.

    The label distribution is a softmax over the labels' first tokens at one position: behind the model's own reasoning
    (reason-first), or directly behind the prompt and "\\boxed{" (answer-first, one prefill; the answer is only generated
    if explain). A malformed answer gets label None; its probabilities are read with "\\boxed{" put behind what it wrote.
    """
    task, prompts = tokens.task, tokens.prompts(records)
    answers = engine.generate(prompts) if explain or task.format == "reason-first" else [[]] * len(prompts)
    traces = [tokens.parse(answer) for answer in answers]
    sequences = []
    for prompt, answer, trace in zip(prompts, answers, traces, strict=True):
        if task.format == "answer-first":
            cut = tokens.opening
        elif trace.problem is None and trace.steps[-1].label_at is not None:
            cut = answer[: trace.steps[-1].label_at]
        else:
            cut = [token for token in answer if token != tokens.eos_id] + tokens.opening
        sequences.append([*prompt, *cut])
    probs = torch.softmax(engine.label_logits(sequences, tokens.label_ids), -1).double().numpy()
    probs /= probs.sum(-1, keepdims=True)
    out = []
    for answer, trace, row in zip(answers, traces, probs, strict=True):
        label, well_formed = trace.label, trace.problem is None
        if not answer:  # answer-first without explanation: the most probable label
            label, well_formed = task.labels[int(row.argmax())], True
        result = {
            "label": label,
            "grade": float(task.grade(row)),
            "probs": dict(zip(task.labels, row.tolist(), strict=True)),
        }
        result["well_formed"] = well_formed
        if explain:
            result["problem"] = trace.problem
            result["answer"] = tokens.decode([token for token in answer if token != tokens.eos_id]).strip()
            result["steps"] = [
                {"step": name, "label": step.label, "text": tokens.decode(answer[step.start : step.end]).strip()}
                for name, step in zip(task.boxes, trace.steps, strict=False)
            ]
        out.append(result)
    return out


def _load_for_scoring(args):
    if args.max_new_tokens < 1:
        raise TaskError(f"--max_new_tokens {args.max_new_tokens}: must be at least 1")
    task = Task.load(args.task or args.model)
    task.check_model(args.model)
    model, tokenizer = load_model(args.model)
    context = model.config.max_position_embeddings
    # 16: room to force the box's opening behind an answer that did not end
    tokens = TokenTask(task, tokenizer, context - args.max_new_tokens - 16)
    return tokens, PaddedEngine(model, tokens.eos_id, args.max_new_tokens)


def score_file(args):
    """`grm.py score`: grade a JSON Lines file. Results go to OUT.partial, whose first line holds the settings; a stopped
    run goes on from there, and OUT appears when all is done."""
    out, partial = Path(args.out), Path(args.out + ".partial")
    settings = {
        name: str(getattr(args, name)) for name in ("model", "task", "pairs", "explain", "max_new_tokens", "batch_size")
    }
    if args.batch_size < 1:
        raise TaskError(f"--batch_size {args.batch_size}: must be at least 1")
    if out.exists():
        raise TaskError(f"--out {out}: exists; delete it or choose another name")
    if not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise TaskError(f"--out {out}: its folder does not exist, or cannot be written")
    tokens, engine = _load_for_scoring(args)
    records = tokens.task.read(args.pairs, fields=())
    tokens.prompts(records)  # so that a pair that does not fit is named before any work
    if tokens.truncated:
        print(f"{tokens.truncated} of {len(records)} documents were cut to fit the model's context", file=sys.stderr)
    done = partial.read_bytes().split(b"\n")[:-1] if partial.exists() else []  # an unfinished last line is dropped
    header = json.dumps(settings).encode()
    if done and done[0] != header:
        raise TaskError(f"{partial}: belongs to a run with other settings (its first line); delete it or change --out")
    # Whole batches only: another batch means other padding, and other last digits.
    done = done[: 1 + (len(done) - 1) // args.batch_size * args.batch_size] or [header]
    with open(partial, "wb") as file:
        file.write(b"".join(line + b"\n" for line in done))
        bar = tqdm(total=len(records), initial=len(done) - 1, unit="pair", disable=None)
        for start in range(len(done) - 1, len(records), args.batch_size):
            batch = records[start : start + args.batch_size]
            for record, result in zip(batch, judge(tokens, engine, batch, args.explain), strict=True):
                kept = {name: value for name, value in record.items() if name != "where"}
                # `label` is the model's; a label that the input had is kept as `gold`
                # (in a file that was graded before, `label` is that grade, and `gold` there already)
                kept = ({"gold": kept.pop("label")} if "label" in kept else {}) | kept
                file.write(json.dumps(kept | result, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            file.flush()
            bar.update(len(batch))
        bar.close()
    lines, temporary = partial.read_bytes().split(b"\n", 1)[1], Path(f"{out}.tmp")
    temporary.write_bytes(lines)
    os.replace(temporary, out)
    partial.unlink()
    results = [json.loads(line) for line in lines.splitlines()]
    print(f"{out}: {len(results)} pairs, {sum(not r['well_formed'] for r in results)} malformed")
    gold = [{**r, "label": r["gold"]} for r in results if r.get("gold") in tokens.task.labels]
    if gold and len(gold) == len(results):
        print(json.dumps(metrics(tokens.task, gold, results), indent=1))


def judge_pair(args):
    """`grm.py judge`: one reasoned judgement, printed."""
    tokens, engine = _load_for_scoring(args)
    try:
        record = tokens.task._check({"query": args.query, "document": args.document}, fields=())
    except ValueError as error:
        raise TaskError(f"{error}") from None
    result = judge(tokens, engine, [record])[0]
    if result["problem"]:
        print(f"malformed answer ({result['problem']}): {result['answer']}")
    for step in result["steps"]:
        print(f"{step['step']:>14} | {step['text']}")
    for label, p in result["probs"].items():
        mark = "<- answer" if label == result["label"] else ""
        print(f"{label:>14} | {'#' * round(40 * p):<40} {p:.3f} {mark}")
    print(f"{'expected':>14} | {result['grade']:.2f}")


def main():
    """Command line: `score` a file of pairs or `judge` one pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    score, single = (
        commands.add_parser("score", help="grade a file"),
        commands.add_parser("judge", help="grade one pair"),
    )
    for sub in (score, single):
        sub.add_argument("--model", required=True, help="model folder or hub name")
        sub.add_argument("--task", help="folder with criteria.md (default: the model's, which train.py puts beside it)")
        sub.add_argument("--max_new_tokens", type=int, default=128, help="longest answer, in tokens (default 128)")
    score.add_argument("--pairs", required=True, help="JSON Lines with query and document; a label is kept as gold")
    score.add_argument(
        "--out", required=True, help="JSON Lines to write; a stopped run is kept in OUT.partial, and goes on there"
    )
    score.add_argument("--explain", action="store_true", help="write the reasoning steps too")
    score.add_argument("--batch_size", type=int, default=32, help="pairs a batch (default 32)")
    single.add_argument("query")
    single.add_argument("document")
    args = parser.parse_args()
    hf_logging.disable_progress_bar()
    try:
        {"score": score_file, "judge": judge_pair}[args.command](args)
    except TaskError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


if __name__ == "__main__":
    main()
