"""Grade pairs with a model that train.py or distill.py wrote.

    python grm.py score --model DIR --pairs IN.jsonl --out OUT.jsonl [--task DIR] [--explain]
    python grm.py judge --model DIR "query" "document"

A stopped `score` goes on by the same command.
"""

import argparse
import fcntl
import json
import os
import sys
from pathlib import Path

from transformers.utils import logging as hf_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grm
import parallel
import rollout


def check_records(renderer, engine, records, most_unknown=grm.MOST_UNKNOWN):
    """Raise before any work what a judge could not do: grm.TaskError for a pair that does not fit,
    or words that the tokenizer does not know; rollout.UnsupportedModelError. Says what is cut.
    """
    grm.check_words(renderer.tokenizer, records, most_unknown)
    longest = max(map(len, renderer.prompts(records))) + engine.max_new_tokens
    rollout.check_model(engine.model, longest)
    if renderer.truncated:
        print(f"{renderer.truncated} of {len(records)} documents cut to fit the model's context")


def score_file(args):
    """`grm.py score`: grade a JSON Lines file. Results go to OUT.partial, settings to
    OUT.partial.json; a stopped run goes on from there, and OUT appears when all is done, with
    OUT.metrics.json if the pairs have labels.
    """
    out = Path(args.out)
    partial = Path(f"{out}.partial")
    settings = Path(f"{out}.partial.json")
    if out.exists():
        raise grm.TaskError(f"--out {out}: exists; delete it or choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    renderer, engine = grm.load_judge(args.model, args.task, args.max_new_tokens)
    records = renderer.task.read(args.pairs, required=())
    check_records(renderer, engine, records)
    text = json.dumps({name: str(value) for name, value in vars(args).items()})
    with open(partial, "a+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise grm.TaskError(f"{partial}: another run writes here; wait for its end") from None
        file.seek(0)
        lines = [line for line in file if line.endswith(b"\n")]
        if not lines:
            settings.write_text(text)
        former = json.loads(settings.read_text())
        other = [f"--{name} {x}" for name, x in former.items() if x != json.loads(text)[name]]
        if other or not are_of(records, lines):
            what = " ".join(other) or "other pairs"
            raise grm.TaskError(f"{partial}: was begun with {what}; delete it or change --out")
        grade_file(renderer, engine, records, file, lines, args)
    os.replace(partial, out)
    settings.unlink()
    results = [json.loads(line) for line in out.read_bytes().splitlines()]
    malformed = sum(not result["well_formed"] for result in results)
    print(f"{out}: {len(results)} pairs, {malformed} malformed")
    if all(result.get("gold") in renderer.task.labels for result in results):
        gold = [result | {"label": result["gold"]} for result in results]
        scores = grm.metrics(renderer.task, gold, results)
        Path(f"{out}.metrics.json").write_text(json.dumps(scores, indent=1) + "\n")
        grm.print_table({"model": {Path(args.pairs).stem: scores}})


def are_of(records, lines):
    """Whether lines of a scored file are of the first of these records."""
    try:
        texts = [(r["query"], r["document"], r.get("criteria")) for r in map(json.loads, lines)]
    except (ValueError, TypeError, KeyError):
        return False
    return texts == [(r["query"], r["document"], r.get("criteria")) for r in records[: len(texts)]]


def grade_file(renderer, engine, records, file, lines, args):
    """Write a line for each record to a file, which holds the first `lines` already."""
    kept = len(lines)
    if kept < len(records):
        kept -= kept % args.batch_size  # in another batch a pair's last digits may differ
    file.truncate(sum(map(len, lines[:kept])))
    with parallel.progress_bar(len(records), "score", kept) as bar:
        for start in range(kept, len(records), args.batch_size):
            batch = records[start : start + args.batch_size]
            results = grm.judge(renderer, engine, batch, args.explain)
            for record, result in zip(batch, results, strict=True):
                # `label` is the model's; one that the input had is kept as `gold`.
                gold = {"gold": record.pop("label")} if "label" in record else {}
                line = json.dumps(gold | record | result, ensure_ascii=False)
                file.write(line.encode(errors="backslashreplace") + b"\n")
            file.flush()
            bar.update(len(batch))


def judge_pair(args):
    """`grm.py judge`: one reasoned judgement, printed."""
    renderer, engine = grm.load_judge(args.model, args.task, args.max_new_tokens)
    record = renderer.task.check({"query": args.query, "document": args.document})
    check_records(renderer, engine, [record], most_unknown=0.25)
    (result,) = grm.judge(renderer, engine, [record])
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
    parser = argparse.ArgumentParser(prog="grm.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    score = commands.add_parser("score", help="grade a file")
    single = commands.add_parser("judge", help="grade one pair")
    commands.add_parser("check", help="look at a task's files")  # which data/check.py does
    for command in (score, single):
        command.add_argument("--model", required=True, help="model folder or hub name")
        command.add_argument("--task", help="folder with criteria.md (default: the model's own)")
        command.add_argument("--max_new_tokens", type=int, help="longest answer (default: trained)")
    score.add_argument("--pairs", required=True, help="JSON Lines with query, document")
    score.add_argument("--out", required=True, help="JSON Lines to write")
    score.add_argument("--explain", action="store_true", help="write the reasoning steps too")
    score.add_argument("--batch_size", type=int, default=256, help="pairs a batch (default 256)")
    single.add_argument("query")
    single.add_argument("document")
    args = parser.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    sizes = (args.max_new_tokens, getattr(args, "batch_size", None))
    if any(size is not None and size < 1 for size in sizes):
        raise grm.TaskError("--max_new_tokens and --batch_size must be at least 1")
    command = {"score": score_file, "judge": judge_pair}[args.command]
    command(args)


if __name__ == "__main__":
    parallel.launch(main, errors=(grm.TaskError, rollout.UnsupportedModelError))
