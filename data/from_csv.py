"""A task folder from a table of queries, documents and labels, as spreadsheets write it.

    python data/from_csv.py FILE.csv --query COL --document COL --label COL --out TASK --fresh
    python grm.py check TASK       # what is in it, and what looks wrong
    python train.py --task TASK    # without --fresh: and --model FOLDER_OR_HUB_NAME

Writes criteria.md, to be filled in, and train.jsonl and test.jsonl, which have no query in common
(or --test FILE.csv is the test).
The encoding (UTF-8, UTF-16, Windows-1252) and the delimiter are found out, 2.0 and 2,0 are read as
2; what was read how, and what was skipped, is printed. A folder that holds files is left alone.

--fresh adds a model that starts from nothing: a byte-level BPE tokenizer of the training pairs, a
small Qwen3 without weights, and settings. RL alone would find nothing to reward there, so sft.jsonl
has demonstrations, written by rule from training pairs: step `match` says how many of the query's
words the document has, and the label that these alone would give (a noisy reader: see overlap.py);
step `verdict` is the row's label. They teach the form of an answer and not how an expert reasons,
which a table does not say.
"""

import argparse
import csv
import io
import json
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

# Python puts only this script's own folder on the path, or that of a script that imports it.
sys.path.extend(map(str, Path(__file__).resolve().parents[:2]))
import check
import fresh

import grm
import parallel

STEPS = ["match", "verdict"]
BODY = """You grade how well a document answers a query. (FILL IN: what these are, who searches and what for)
{meanings}
Work in two steps and close every step with a grade as \\boxed{{grade}}.
Match: whether the document has all, some or none of the query's words; the grade that these alone would give.
Verdict: the grade by the rules above, which is the answer."""  # noqa: E501 (a line of the criteria is a line of the file)
MOST_LABELS = 20


def decode(path):
    """(text, encoding) of a file. Raises grm.TaskError for what is no text."""
    data = path.read_bytes()
    if data.startswith(b"PK\x03\x04"):
        raise grm.TaskError(f"{path}: is a workbook (.xlsx); save it as CSV UTF-8 from there")
    if data.startswith(b"{"):
        raise grm.TaskError(f"{path}: seems to be JSON Lines, which a task takes as they are")
    encodings = {"utf-8-sig": "UTF-8", "cp1252": "Windows-1252 (it is no UTF-8)"}
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = {"utf-16": "UTF-16"}
    for encoding, name in encodings.items():
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return re.sub(r"\Asep=.", "", text), name  # Excel's own first line
    raise grm.TaskError(f"{path}: is neither UTF-8, UTF-16 nor Windows-1252; save it as CSV UTF-8")


def read_rows(path, text, delimiter, strict=True):
    """The line at which each row begins, and its cells without stray space."""
    csv.field_size_limit(len(text) + 1)
    lines = io.StringIO(text, newline="")
    rows = csv.reader(lines, delimiter=delimiter, strict=strict, skipinitialspace=True)
    line = 1
    try:
        for cells in rows:
            yield line, [cell.strip() for cell in cells]
            line = rows.line_num + 1
    except csv.Error as error:
        what = f"{error}; close each quoted cell, and double the quotes within"
        raise grm.TaskError(f"{path}:{line}: {what}") from None


def next_row(rows):
    """The cells of the next row that holds any."""
    return next((cells for _, cells in rows if any(cells)), [])


def read_table(path, columns):
    """The complete rows of a table, as grm.Records; prints how it was read and what was skipped.

    columns: {field: its column's name}. Raises grm.TaskError that names the file or the line.
    """
    text, encoding = decode(path)
    headers = {mark: next_row(read_rows(path, text, mark, strict=False)) for mark in ",;\t|"}
    wanted = set(columns.values())
    mark = max(headers, key=lambda mark: (len(wanted & {*headers[mark]}), len(headers[mark])))
    header = headers[mark]
    for name in columns.values():
        if header.count(name) != 1:
            raise grm.TaskError(f"{path}: needs one column {name!r}; its columns: {header}")
    rows = read_rows(path, text, mark)
    next_row(rows)  # the header
    records = []
    skipped = defaultdict(list)
    for line, cells in rows:
        if any(cells[len(header) :]):
            counts = f"{len(cells)} cells for {len(header)} columns"
            raise grm.TaskError(f"{path}:{line}: {counts}; quote cells that hold {mark!r}")
        row = dict(zip(header, cells, strict=False))
        record = grm.Record({field: row.get(name, "") for field, name in columns.items()})
        missing = [columns[field] for field, cell in record.items() if not cell]
        if missing:
            skipped[f"without {missing[0]!r}" if any(cells) else "empty"].append(line)
        else:
            records.append(record)
    print(f"{path}: {len(records)} pairs; read as {encoding}, delimiter {mark!r}")
    for reason, at in skipped.items():
        lines = ", ".join(map(str, at[:10]))
        print(f"  skipped {reason}, rows: {len(at)}; line {lines}{', ...' * (len(at) > 10)}")
    if not records:
        raise grm.TaskError(f"{path}: no row has all of {', '.join(columns.values())}")
    return records


def tidy_number(text):
    """A text; 2.0 and 2,0, which a spreadsheet makes of 2, are 2, and 0,5 is 0.5."""
    number = re.fullmatch(r"([-+]?\d+)[.,](\d+)", text)
    return f"{number[1]}.{number[2].rstrip('0')}".rstrip(".") if number else text


def name_labels(path, records, asked):
    """The labels from worst to best; writes them into the records, in one spelling each.

    asked: all labels in this order, or None for numbers. Raises grm.TaskError.
    """
    found = Counter(tidy_number(record["label"]) for record in records)
    listed = ", ".join(f"{label} ({count})" for label, count in found.most_common(MOST_LABELS))
    labels = [tidy_number(label) for label in asked or found]
    if not asked:
        what = "labels that are no numbers need --labels, all of them, worst first"
        if not all(re.fullmatch(r"[-+]?\d+(\.\d+)?", label) for label in labels):
            raise grm.TaskError(f"{path}: {what} (case does not matter); found: {listed}")
        labels.sort(key=float)
    if len(labels) > MOST_LABELS:
        raise grm.TaskError(f"{path}: {len(labels)} different labels, such as {listed}; at most 20")
    names = {label.casefold(): label for label in labels} | {label: label for label in labels}
    for label, count in found.items():
        name = names.get(label, names.get(label.casefold()))
        if name is None:
            raise grm.TaskError(f"{path}: --labels lacks {label!r}; found: {listed}")
        if name != label:
            print(f"  label {label!r} is read as {name!r}: {count} times")
        names[label] = name
    for record in records:
        record["label"] = names[tidy_number(record["label"])]
    return labels


def split(path, records, share, seed):
    """(train, test): a share of the queries, drawn, is the test's. Raises grm.TaskError."""
    queries = sorted({record["query_id"] for record in records})
    if len(queries) < 2 or not 0 < share < 1:
        what = "a test needs two or more queries, and a --test_share of them between 0 and 1"
        raise grm.TaskError(f"{path}: {what}; found: {len(queries)} queries")
    drawn = min(max(1, round(share * len(queries))), len(queries) - 1)
    held_out = set(random.Random(seed).sample(queries, drawn))
    train = [record for record in records if record["query_id"] not in held_out]
    return train, [record for record in records if record["query_id"] in held_out]


def write_lines(path, records, fields):
    """Write these fields of records as JSON Lines."""
    lines = (json.dumps({name: r[name] for name in fields}, ensure_ascii=False) for r in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def convert(args):
    """Write the task folder; nothing before all of it can be."""
    out = args.out
    if out.exists() and any(out.iterdir()):
        raise grm.TaskError(f"--out {out}: holds files; delete it or choose another name")
    columns = {name: getattr(args, name) for name in ("query", "document", "label", "query_id")}
    columns = {field: name for field, name in columns.items() if name}
    records = read_table(args.file, columns)
    given = read_table(args.test, columns) if args.test else []
    labels = name_labels(args.file, records + given, args.labels)
    for record in records + given:
        query = " ".join(record["query"].split()).lower()
        record["query_id"] = tidy_number(record.get("query_id", query))
    relevant = args.relevant or labels[(len(labels) + 1) // 2 :]
    meanings = "\n".join(f"{label}: (FILL IN: when a pair gets this)" for label in labels[::-1])
    task = grm.Task(out, BODY.format(meanings=meanings), labels, relevant, STEPS, "reason-first")
    if problem := task._problem():
        raise grm.TaskError(f"{args.file}: {problem}")
    train, test = records, given
    if not given:
        train, test = split(args.file, records, args.test_share, args.seed)
    for label in sorted({record["label"] for record in test}.difference(r["label"] for r in train)):
        print(f"warning: no pair to train on has the label {label}")
    if args.fresh:
        demonstrations = fresh.demonstrate(task, train)
        tokenizer = fresh.make_tokenizer(task, demonstrations)
        try:
            settings = fresh.fit_settings(task, tokenizer, demonstrations)
        except grm.TaskError as error:  # of labels that begin alike
            raise grm.TaskError(f"{error}; rename labels in {args.file}") from None

    out.mkdir(parents=True, exist_ok=True)
    task.save(out)
    fields = ["query", "document", "label"]
    if args.query_id or len({r["query_id"] for r in train}) < len(train):
        fields.append("query_id")  # for nDCG; not where each query has one document
    write_lines(out / "train.jsonl", train, fields)
    write_lines(out / "test.jsonl", test, fields)
    if args.fresh:
        write_lines(out / "sft.jsonl", demonstrations, ("query", "document", "response"))
        fresh.write(out, tokenizer, settings)

    print(f"{out}: labels {' < '.join(labels)}; relevant: {', '.join(relevant)}")
    check.print_files(task, {"train": train, "test": test})
    if args.fresh:
        print("sft.jsonl: demonstrations by word overlap and label, for the form of answers alone")
    print(f"\nFill in {out / 'criteria.md'}, then:\n  python grm.py check {out}")
    print(f"  python train.py --task {out}{'' if args.fresh else ' --model MODEL'}")


def main():
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.csv")
    parser.add_argument("--query", required=True, metavar="COL", help="column of the queries")
    parser.add_argument("--document", required=True, metavar="COL", help="of the documents")
    parser.add_argument("--label", required=True, metavar="COL", help="of the labels")
    parser.add_argument("--query_id", metavar="COL", help="what is one query (default: its text)")
    parser.add_argument("--labels", nargs="+", help="worst to best (default: numbers ascending)")
    parser.add_argument("--relevant", nargs="+", help="labels (default: the upper half)")
    parser.add_argument("--test", type=Path, metavar="FILE.csv", help="the test's pairs, if apart")
    parser.add_argument("--test_share", type=float, default=0.2, help="of the queries (0.2)")
    parser.add_argument("--seed", type=int, default=0, help="draws the test's queries")
    parser.add_argument(
        "--fresh", action="store_true", help="with a model that starts from nothing"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="TASK", help="folder to write")
    convert(parser.parse_args())


if __name__ == "__main__":
    parallel.launch(main, errors=(grm.TaskError,))
