"""Real titles, human labels: a model reinforced on synthesised pairs, and its students.

    python docs/shop.py PATH_TO_CHORUS --out runs/shop --encoder models/minilm   # hours, two cores
    python docs/shop.py PATH_TO_CHORUS --out runs/smollm2 --seeds 0 --jobs 1 \\
        --encoder models/minilm --model models/smollm2 --sft_steps 60 --sft_lr 1e-4 --rl_steps 24 \\
        --prompts_per_step 16 --lr 1e-5 --max_new_tokens 96      # some two hours with AVX512_BF16
    python docs/shop.py PATH_TO_CHORUS --out runs/shop --seeds      # only the tables

docs/synthesize.py makes the task: queries, edited titles and exact step labels from real product
titles and a table of rules. For each seed a model is fine-tuned, and from it one RL run goes for
each rule of credit, with the same pairs. They are tested on titles that neither has seen, and on
706 pairs that people labelled, of which nothing is trained. With an encoder also students, tested
on the same: of the reinforced model, which grades 2,482 real pairs without a label for it; of the
synthesised labels themselves; and of the human labels of those 2,482 pairs. Further settings go to
train.py. Runs that are done are not made again, so a stopped one goes on. Writes OUT/samples.md,
what the model of one seed says of three human-labelled pairs, each step with its credit.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from credit import PLAIN, ROOT, RULES, explain, interval, run, run_all

sys.path.extend([str(ROOT), str(ROOT / "data")])
import chorus
from from_csv import write_lines

import grm

CREDITED = "symmetric, change"
STUDENTS = {  # what it learns from, two epochs of it: distill.py's settings
    "the reinforced model": ["--pairs", "human.jsonl", "--labelled", 0, "--steps", 156],
    "synthesised labels": ["--pairs", "train.jsonl", "--loss", "gold", "--steps", 666],
    "human labels": ["--pairs", "human.jsonl", "--loss", "gold", "--steps", 156],
}
STUDENT = ["--batch", 32, "--lr", 5e-5, "--max_length", 128]  # as docs/real.py's
STUDENT += ["--max_new_tokens", 96]  # the teacher's
COLUMNS = {
    "unseen titles": ("test_titles", "accuracy"),
    "human: accuracy": ("test_human", "accuracy"),
    "macro-F1": ("test_human", "macro_f1"),
    "kappa": ("test_human", "kappa"),
    "nDCG@10": ("test_human", "ndcg@10"),
}


def train_all(args, settings, seed, threads):
    """SFT, RL under each rule from there, students of one rule's model: what is not done yet."""
    folder = args.out / f"seed{seed}"
    task = args.out / "task"
    common = ["--task", task, "--seed", seed]
    model = ["--model", args.model] if args.model else []
    run(folder / "SFT", threads, *common, *model, *settings, "--rl_steps", 0)
    for rule in (PLAIN, "sam", CREDITED):
        flags = ["--model", folder / "SFT" / "sft", *settings, "--sft_steps", 0, *RULES[rule]]
        run(folder / rule, threads, *common, *flags)
    for name, flags in STUDENTS.items() if args.encoder else ():
        flags = ["--teacher", folder / CREDITED / "model", "--student", args.encoder, *flags]
        run(folder / name, threads, *common, *STUDENT, *flags, script="distill.py")


def figures(out, name):
    """{seed: {column: value}} of the runs that are done, by what ran: a rule, SFT or a student."""
    found = {}
    for path in sorted(out.glob(f"seed*/{name}/summary.json")):
        summary = json.loads(path.read_text())
        tests = summary.get("rl") or summary.get("sft") or summary["student"]
        values = {title: tests[test][key] for title, (test, key) in COLUMNS.items()}
        if "step_accuracy" in tests["test_titles"]:
            values["steps"] = np.mean([*tests["test_titles"]["step_accuracy"].values()])
        seed = int(path.parts[-3].removeprefix("seed"))
        found[seed] = values | {"before_rl": summary.get("before_rl")}
    return found


def print_table(out):
    """A line for each kind of run; then RL's paired differences to SFT and to plain GRPO."""
    titles = ["unseen titles", "steps", *list(COLUMNS)[1:]]
    print(f"| | n | {' | '.join(titles)} |\n{'|---' * (len(titles) + 2)}|")
    runs = {name: figures(out, name) for name in ("SFT", PLAIN, "sam", CREDITED, *STUDENTS)}
    rows = {name: [*of_seeds.values()] for name, of_seeds in runs.items()}
    pairs = [(rule, "SFT") for rule in (PLAIN, "sam", CREDITED)]
    for rule, other in [*pairs, ("sam", PLAIN), (CREDITED, PLAIN), (CREDITED, "sam")]:
        both = sorted(runs[rule].keys() & runs[other].keys())
        rows[f"{rule} less {other}"] = [
            {title: runs[rule][seed][title] - runs[other][seed][title] for title in titles}
            for seed in both
        ]
    for name, values in rows.items():
        if not values:
            continue
        sign = "+" if " less " in name else ""
        cells = []
        for title in titles:
            column = [x[title] for x in values if title in x]
            cells.append(f"{np.mean(column):{sign}.3f} ± {interval(column):.3f}" if column else "-")
        print(f"| {name} | {len(values)} | {' | '.join(cells)} |")
    for seed, values in runs[PLAIN].items():
        shares = ", ".join(f"{name} {x:.2f}" for name, x in values["before_rl"].items())
        print(f"before RL, seed {seed}: {shares}")


def main():
    """Make the task, run what is missing, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="PATH_TO_CHORUS", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=range(5))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--model", help="a pretrained one (none: 2.3 M parameters from nothing)")
    parser.add_argument("--encoder", help="the students' (none: no students)")
    args, settings = parser.parse_known_args()
    if not (args.out / "task" / "test_human.jsonl").exists():  # is written last
        human, test_human = chorus.read_source(args.source)
        maker = [sys.executable, ROOT / "docs/synthesize.py", args.source / "train.jsonl"]
        subprocess.run([*maker, args.out / "task"], check=True)
        fields = ("query", "document", "label", "query_id")
        write_lines(args.out / "task" / "human.jsonl", human, fields)
        write_lines(args.out / "task" / "test_human.jsonl", test_human, fields)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    run_all(args.jobs, [(train_all, args, settings, seed, threads) for seed in args.seeds])
    print_table(args.out)
    done = sorted(args.out.glob(f"seed*/{CREDITED}/summary.json"))
    if done:
        task = grm.Task.load(args.out / "task")
        pairs = task.read(task.folder / "test_human.jsonl")
        targets = [[pair["label"]] * len(task.boxes) for pair in pairs]
        text = explain(done[0].parent / "model", pairs, targets, "sam")
        (args.out / "samples.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
