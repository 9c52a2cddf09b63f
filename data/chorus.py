"""A task folder from real, human-labelled product search pairs (English, electronics), and the
baselines to beat.

    python data/chorus.py make PATH_TO_CHORUS                  # then: train.py --task data/chorus
    python data/chorus.py make PATH_TO_CHORUS --model models/smollm2 --reason --out data/chorus-r
    python data/chorus.py baselines --task data/chorus --encoder models/minilm  # to be beaten

PATH_TO_CHORUS holds train.jsonl and test.jsonl (query, document, label 0..3, query_id; no query is
in both) and the data's README.md and LICENSE, which are copied along. The data are not part of this
project: do not commit the folder.

There are labels but no demonstrations of reasoning. In the first form the task is answer-first
without steps: SFT on the labels of the training pairs, then RL on the same pairs. With `--reason`
the answer has three steps, demonstrated by rule: which words of the query the title has, and the
grade that these alone would give; what is searched for and what is offered, and whether that is the
same kind, which the human grade tells; the human grade. Nothing is taken from test pairs.

Without `--model` the folder gets a tiny Qwen3 that starts without weights and knows no word that
the training pairs do not teach it. With it, the task is for that model (`train.py --model`), whose
tokenizer says how long answers are.
"""

import argparse
import json
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

# Python puts only this script's own folder on the path, or that of a script that imports it.
sys.path.extend(map(str, Path(__file__).resolve().parents[:2]))
import fresh
import from_csv
import overlap

import grm
import parallel

LABELS = ["0", "1", "2", "3"]  # from worst to best
RELEVANT = ["2", "3"]
NO_KINDS = {"for", "and", "with", "the", "ppm", "replaces", "for select"}

FORMS = {  # steps, format, and how the criteria end
    "label": ([], "answer-first", " Answer with \\boxed{grade} only."),
    "reason": (
        ["words", "kind", "grade"],
        "reason-first",
        "\nWork in three steps and close every step with a grade as \\boxed{grade}."
        "\nWords: the words of the query that the product's text has and those that it lacks; "
        "the grade that these alone would give."
        "\nKind: what is searched for and what is offered; "
        "3 if that is the same kind of thing or close to it, 0 if it is another."
        "\nGrade: the grade by the rules above, which is the answer.",
    ),
}
MEANINGS = {
    "3": "what was searched for",
    "2": "close",
    "1": "loosely related",
    "0": "unrelated",
}
RULES = """You grade how well a product of an electronics shop answers a search query.
3: what was searched for: a product of that kind, and of the brand, model or property that the query names.
2: close: the right kind of product with one detail that differs, or one that many who search for this would buy as well.
1: loosely related: an accessory or a part of the product searched for, or something for the same use.
0: unrelated: a different kind of product, even if it shares words with the query.
Judge what the product is, not which words it mentions."""  # noqa: E501 (a line of the criteria is a line of the file)

PRETRAINED = {"sft_steps": 78, "sft_lr": 5e-5, "lr": 5e-6}  # what differs for a pretrained model


def read_source(source):
    """The training and test pairs of the folder `source`, checked. Raises grm.TaskError."""
    task = grm.Task(source, RULES, LABELS, RELEVANT, [], "answer-first")
    files = ("train.jsonl", "test.jsonl", "README.md", "LICENSE")
    for name in files:
        if not (source / name).is_file():
            raise grm.TaskError(
                f"{source / name}: not found; PATH_TO_CHORUS holds {', '.join(files)}"
            )
    train, test = (task.read(source / name, ("label", "query_id")) for name in files[:2])
    known = {record["query_id"] for record in train}
    leaks = [record for record in test if record["query_id"] in known]
    if leaks:
        raise grm.TaskError(
            f"{leaks[0].where}: query_id {leaks[0]['query_id']!r} is in train.jsonl too; "
            f"the test set must hold other queries ({len(leaks)} such lines)"
        )
    return train, test


def find_kinds(documents):
    """{document: what its title calls the thing}; "unnamed" where it does not.

    Titles here read "BRAND MODEL kind of thing Property": the kind is the longest run of words in
    lower case in the first sentence that three titles share.
    """
    runs = {}
    for text in documents:
        first = re.split(r"[.!?] ", text)[0]
        found = re.findall(r"(?<!\S)[a-z][a-z/-]{2,}(?: [a-z][a-z/-]{2,})*(?=[\s.,]|$)", first)
        runs[text] = [run for run in found if run not in NO_KINDS]
    counts = Counter(run for found in runs.values() for run in set(found))
    kinds = {}
    for text, found in runs.items():
        shared = [run for run in found if counts[run] >= 3]
        kinds[text] = max(shared, key=lambda run: len(run.split()), default="unnamed")
    return kinds


def label_steps(records, train):
    """The step labels of labelled records: the grade by words alone, the kind, the label.

    The grade by words: idf overlap, with the thresholds that suit the training pairs best.
    """
    by_words = overlap.label_by_words(LABELS, train, records)
    kinds = ["3" if record["label"] in RELEVANT else "0" for record in records]
    triples = zip(by_words, kinds, records, strict=True)
    return [[guess["label"], kind, record["label"]] for guess, kind, record in triples]


def demonstrate(train):
    """The training records with `response` and `step_labels`: reasoning in three steps, by rule."""
    kinds = find_kinds(sorted({record["document"] for record in train}))
    demonstrations = []
    for record, labels in zip(train, label_steps(train, train), strict=True):
        has, lacks = overlap.compare(record)
        kind = kinds[record["document"]]
        same = record["label"] in RELEVANT
        texts = [
            f"words: has {' '.join(has) or 'none'}, lacks {' '.join(lacks) or 'none'}",
            f"kind: {record['query']}, {kind}, {'same' if same else 'another'}",
            f"grade: {MEANINGS[record['label']]}",
        ]
        steps = [f"{text} \\boxed{{{label}}}" for text, label in zip(texts, labels, strict=True)]
        demonstrations.append(record | {"response": " ".join(steps), "step_labels": labels})
    return demonstrations


def cross(train, of_each=30):
    """Unlabelled pairs: each training query with titles that nobody judged for it.

    Half of them are those that have most of its words, half are drawn.
    """
    rng = random.Random(0)
    documents = sorted({record["document"] for record in train})
    weights = overlap.word_weights(documents)
    judged = {}
    for record in train:
        judged.setdefault(record["query"], set()).add(record["document"])
    pairs = []
    for query, known in judged.items():
        candidates = [{"query": query, "document": text} for text in documents if text not in known]
        scores = overlap.overlap_scores(candidates, weights)
        order = sorted(range(len(candidates)), key=lambda i: -scores[i])
        nearest = order[: of_each // 2]
        others = order[of_each // 2 :]
        drawn = rng.sample(others, min(len(others), of_each - len(nearest)))
        pairs += [candidates[i] for i in (*nearest, *drawn)]
    return pairs


def make(source, out, model=None, form="label"):
    """Write the task folder `out` from the folder `source`: the same bytes every time.

    model: a folder or hub name, whose tokenizer says how long the demonstrated answers are; None:
    the task gets a tiny model of its own.
    """
    if out.resolve() == source.resolve():
        raise grm.TaskError(f"--out {out}: is PATH_TO_CHORUS, whose files would be overwritten")
    train, test = read_source(source)
    out.mkdir(parents=True, exist_ok=True)
    steps, answer_format, closing = FORMS[form]
    front = (
        f"---\nlabels: {json.dumps(LABELS)}  # from worst to best\n"
        f"relevant: {json.dumps(RELEVANT)}\n"
        f"steps: [{', '.join(steps)}]\nformat: {answer_format}\n---\n"
    )
    (out / "criteria.md").write_text(front + RULES + closing + "\n", encoding="utf-8")
    fields = ["query", "document", "label", "query_id"]
    if form == "reason":
        train = demonstrate(train)
        from_csv.write_lines(out / "train.jsonl", train, (*fields, "step_labels"))
    else:
        train = [{**r, "response": f"\\boxed{{{r['label']}}}"} for r in train]
        from_csv.write_lines(out / "train.jsonl", train, fields)
    from_csv.write_lines(out / "sft.jsonl", train, ("query", "document", "response"))
    from_csv.write_lines(out / "test.jsonl", test, fields)
    from_csv.write_lines(out / "unlabelled.jsonl", cross(train), ("query", "document"))
    for name in ("README.md", "LICENSE"):
        shutil.copyfile(source / name, out / name)
    task = grm.Task.load(out)
    if model:
        tokenizer = grm.load_model(model, meta=True)[1]
        settings = fresh.fit_settings(task, tokenizer, train) | PRETRAINED
        fresh.write_settings(out, settings)
    else:
        tokenizer = fresh.make_tokenizer(task, train)
        fresh.write(out, tokenizer, fresh.fit_settings(task, tokenizer, train))


def load_encoder(source):
    """(tokenizer, model) of a folder or hub name, as of the sentence-transformers."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        return tokenizer, AutoModel.from_pretrained(source, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise grm.TaskError(f"--encoder {source}: cannot be loaded: {error}") from error


def cosine_scores(records, tokenizer, model):
    """Each record's cosine between query and document, by an encoder's mean token states."""
    texts = sorted({record[name] for record in records for name in ("query", "document")})
    vectors = {}
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        inputs = tokenizer(part, padding=True, truncation=True, return_tensors="pt")
        inputs = inputs.to(model.device)
        with torch.inference_mode():
            states_NTD = model(**inputs).last_hidden_state
        mask_NT1 = inputs.attention_mask[..., None]
        means_ND = (states_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)
        vectors |= zip(part, torch.nn.functional.normalize(means_ND), strict=True)
    return [float(vectors[r["query"]] @ vectors[r["document"]]) for r in records]


def baselines(task, encoder=None):
    """Metrics on TASK/test.jsonl of what trains no model: {"majority": ...}, by grm.metrics.

    majority and overlap: see overlap.py. always 0: the test set's own most frequent label, which
    nobody can know; it shows how far the two sets' labels differ. cosine: an encoder's.
    """
    train, test = (task.read(task.folder / name) for name in ("train.jsonl", "test.jsonl"))
    predictions = overlap.baselines(task.labels, train, test)
    predictions["always 0"] = [{"label": "0", "grade": 0.0}] * len(test)
    if encoder:
        scores = cosine_scores([*train, *test], *load_encoder(encoder))
        of_train, of_test = scores[: len(train)], scores[len(train) :]
        predictions["cosine"] = overlap.by_thresholds(task.labels, of_train, train, of_test)
    return {name: grm.metrics(task, test, rows) for name, rows in predictions.items()}


def count_new_queries(task):
    """(test queries with a word that no training query has, test queries)."""
    files = (task.read(task.folder / name) for name in ("train.jsonl", "test.jsonl"))
    train, test = ({record["query"].lower() for record in records} for records in files)
    known = {word for query in train for word in query.split()}
    return sum(not known.issuperset(query.split()) for query in test), len(test)


def main():
    """Command line: `make` the task folder, or measure the `baselines`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="write the task folder")
    measure = commands.add_parser("baselines", help="measure the baselines on its test set")
    maker.add_argument(
        "source", type=Path, metavar="PATH_TO_CHORUS", help="folder with train.jsonl and test.jsonl"
    )
    folder = Path("data/chorus")
    maker.add_argument("--model", help="a pretrained model: its folder, or its name on the hub")
    maker.add_argument("--reason", action="store_true", help="answers of three steps")
    maker.add_argument("--out", type=Path, default=folder, help=f"to write (default: {folder})")
    measure.add_argument("--task", type=Path, default=folder, help=f"(default: {folder})")
    measure.add_argument("--encoder", help="an encoder's folder or hub name, for its cosine")
    args = parser.parse_args()
    if args.command == "make":
        make(args.source, args.out, args.model, "reason" if args.reason else "label")
    else:
        task = grm.Task.load(args.task)
        results = baselines(task, args.encoder)
        grm.print_table({name: {"test": values} for name, values in results.items()})
        new, queries = count_new_queries(task)
        print(f"{new} of {queries} test queries have a word that no training query has")


if __name__ == "__main__":
    parallel.launch(main, errors=(grm.TaskError,))
