"""What a task folder holds and what looks wrong there, before any training.

    python grm.py check TASK [--model FOLDER_OR_HUB_NAME]    # default: TASK/model, if it is there

Prints labels and lengths of each file; what makes a test unfair or labels doubtful, in lines that
begin with "warning:"; one prompt and one demonstration as the model gets them; and what a trained
model has to beat: the most frequent label of train.jsonl, and word overlap with thresholds fitted
there. What train.py would refuse ends the program, with exit code 1.
"""

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from transformers.utils import logging as hf_logging

# Python puts only this script's own folder on the path, or that of a script that imports it.
sys.path.extend(map(str, Path(__file__).resolve().parents[:2]))
import overlap

import grm
import parallel
import rollout
import train


def read_files(task):
    """{name: records} of a task's JSON Lines. Raises grm.TaskError."""
    tests = sorted(path.stem for path in task.folder.glob("test*.jsonl"))
    if not tests:
        raise grm.TaskError(f"{task.folder}: holds no test*.jsonl to evaluate on")
    files = {name: task.read(task.folder / f"{name}.jsonl") for name in ("train", *tests)}
    for name, required in {"sft": ("response",), "unlabelled": ()}.items():
        path = task.folder / f"{name}.jsonl"
        if path.is_file():
            files[name] = task.read(path, required)
    return files


def query_of(record):
    """What makes a record's query one query."""
    return str(record.get("query_id", record["query"]))


def pair_of(record):
    """Query and document, without regard to case and white space, and the criteria's file."""
    texts = [" ".join(record[name].split()).casefold() for name in ("query", "document")]
    return (*texts, record.get("criteria"))


def label_of(task, record):
    """A record's label; a demonstration's is what it answers; None if there is neither."""
    boxes = grm.BOX.findall(record.get("response", "")) or [record.get("label")]
    return boxes[-1] if task.format == "reason-first" else boxes[0]


def spread(values):
    """Median and, in brackets, maximum: a cell."""
    return f"{np.median(values):,.0f} ({max(values):,})"


def print_rows(rows):
    """Print rows of cells, each column as wide as its longest cell."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))


def print_files(task, files):
    """Print a line for each of {name: records}; a demonstration's label is what it answers."""
    rows = [["", "pairs", "queries", *task.labels, "query", "document"]]
    for name, records in files.items():
        labels = Counter(label_of(task, record) for record in records)
        counts = [labels[label] for label in task.labels]
        lengths = [spread([len(r[field]) for r in records]) for field in ("query", "document")]
        rows.append([name, len(records), len({*map(query_of, records)}), *counts, *lengths])
    print_rows(rows)
    print("query, document: characters, the median (and the most)")


def warn(records, what):
    """A line about records that look wrong, if there are any."""
    if records:
        print(f"warning: {len(records)} pairs {what}; the first: {records[0].where}")


def check_labels(task, files):
    """Warn of labels that are missing, contradict each other, or differ from their step's."""
    missing = set(task.labels) - {record["label"] for record in files["train"]}
    if missing:
        print(f"warning: no pair of train.jsonl has the label {', '.join(sorted(missing))}")
    labelled = [record for records in files.values() for record in records if "label" in record]
    labels = defaultdict(set)
    for record in labelled:
        labels[pair_of(record)].add(record["label"])
    warn([r for r in labelled if len(labels[pair_of(r)]) > 1], "have another label elsewhere")
    at = -1 if task.format == "reason-first" else 0
    stepped = [record for record in labelled if "step_labels" in record]
    differing = [record for record in stepped if record["step_labels"][at] != record["label"]]
    warn(differing, f"have a label that is not the one of their step {task.boxes[at]}")


def check_pairs(files):
    """Warn of pairs that stand twice, and of what a test has in common with what is trained on."""
    for name, records in files.items():
        pairs = Counter(map(pair_of, records))
        warn(
            [r for r in records if pairs[pair_of(r)] > 1],
            f"of {name}.jsonl stand there more than once",
        )
    known = {key for record in files["train"] for key in (query_of(record), pair_of(record)[0])}
    for name in (name for name in files if name.startswith("test")):
        for other in (other for other in ("train", "sft") if other in files):
            pairs = {pair_of(record) for record in files[other]}
            shared = [record for record in files[name] if pair_of(record) in pairs]
            warn(shared, f"of {name}.jsonl are in {other}.jsonl too")
        shared = [r for r in files[name] if query_of(r) in known or pair_of(r)[0] in known]
        warn(shared, f"of {name}.jsonl have a query that train.jsonl has")


def check_with_model(task, config):
    """Print tokens, a prompt and a demonstration. Raises for what train.py refuses."""
    model, tokenizer = grm.load_model(config.model, meta=True)
    rollout.use_tree_attention(model)
    context = model.config.get_text_config().max_position_embeddings
    print(f"\n{config.model}: context {context:,}, of which {config.max_new_tokens} for the answer")
    renderer = grm.Renderer(task, tokenizer, context, config.max_new_tokens)
    data = train.load_data(config, task, renderer)
    rows = [["", "prompt: tokens", "unknown words"]]
    for name, records in data.items():
        text = " ".join(f"{record['query']} {record['document']}" for record in records)
        unknown = len(grm.unknown_words(tokenizer, text)) / len(text.split())
        rows.append([name, spread([len(r["prompt_ids"]) for r in records]), f"{unknown:.1%}"])
    print_rows(rows)
    record = (data.get("sft") or next(iter(data.values())))[0]
    print(f"\n{renderer.decode(record['prompt_ids'])}")
    if "answer_ids" in record:
        answer = record["answer_ids"]
        print(renderer.decode(answer))
        for name, step in zip(task.boxes, renderer.parse(answer).steps, strict=True):
            text = renderer.decode(answer[step.start : step.end]).strip()
            print(f"{name:>14} | {step.label:>6} | {text}")


def check_order(task, files):
    """Warn of labels that seem to stand from best to worst."""
    weights = overlap.word_weights({record["document"] for record in files["train"]})
    scores = overlap.overlap_scores(files["train"], weights)
    places = [task.labels.index(record["label"]) for record in files["train"]]
    if np.std(scores) and np.std(places) and np.corrcoef(scores, places)[0, 1] < -0.1:
        print(
            "warning: the more words a pair shares, the worse its label: is worst first in labels?"
        )


def print_baselines(task, files):
    """Print what trains no model, in the columns of train.py's table."""
    results = defaultdict(dict)
    for name in (name for name in files if name.startswith("test")):
        rows = overlap.baselines(task.labels, files["train"], files[name])
        for who, predictions in rows.items():
            results[who][name] = grm.metrics(task, files[name], predictions)
    grm.print_table(results)


def check(folder, model):
    """The whole command. Raises grm.TaskError."""
    task = grm.Task.load(folder)
    boxes = f"{task.format}, boxes: {', '.join(task.boxes)}"
    print(f"{folder}: {' < '.join(task.labels)}; relevant: {', '.join(task.relevant)}; {boxes}")
    files = read_files(task)
    print_files(task, files)
    if "FILL IN" in task.criteria:
        print(f"warning: {folder / 'criteria.md'}: has places that are still to FILL IN")
    check_labels(task, files)
    check_pairs(files)
    check_order(task, files)
    flags = ["--task", str(folder), *(["--model", model] if model else [])]
    if model or (folder / "model").is_dir():
        check_with_model(task, grm.parse_settings(train.Config, "train.json", flags))
    else:
        print("no model, so no tokens, prompt and demonstrations are looked at; --model names one")
    print_baselines(task, files)


def main():
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="grm.py check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", type=Path, metavar="TASK", help="the folder")
    parser.add_argument("--model", help="the model to be trained (default: TASK/model)")
    args = parser.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    check(args.task, args.model)


if __name__ == "__main__":
    errors = (grm.TaskError, rollout.UnsupportedModelError, rollout.BudgetError)
    parallel.launch(main, errors)
