"""A real model on real pairs: SmolLM2 (135 M) and MiniLM (22.7 M) on the chorus pairs, in a table.

    python data/pretrained.py models
    python docs/real.py PATH_TO_CHORUS --models models --out runs/real --jobs 9    # on one GPU
    python docs/real.py PATH_TO_CHORUS --models models --out runs/real     # a day on 2 CPU cores
    python docs/real.py PATH_TO_CHORUS --models models --out runs/real --choose    # the settings
    python docs/real.py PATH_TO_CHORUS --models models --out runs/real --seeds     # only the tables

For each seed and each of the two forms of the task (`data/chorus.py make`) the model is fine-tuned,
and from there reinforced under each rule of credit; MiniLM learns from the gold labels alone and
from a teacher. Runs that are done are not done again, so a stopped one goes on. Writes OUT/real.md,
the table, and OUT/samples.md, what a reasoning model says of three test pairs. The model is so
small that one run leaves a GPU idle most of the time: hence --jobs.

`--choose` is what the settings below were chosen by: runs of the first form with a fifth of the
training queries held out in place of the test queries, which no choice has seen.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from credit import ROOT, explain, run, run_all
from sentence_transformers import CrossEncoder
from transformers.utils import logging as hf_logging

# Python puts only this script's own folder on the path.
sys.path.extend([str(ROOT), str(ROOT / "data")])
import chorus

import grm

FORMS = ("label", "reason")
# Of a CPU with 16 GB, or of nine runs on a GPU with 80.
TOKENS = (16384, 65536) if torch.cuda.is_available() else (4096, 49152)
BUDGETS = ["--max_tokens", TOKENS[0], "--cache_tokens", TOKENS[1]]
RULES = {
    "label": {"plain GRPO": ["--rule", "none"]},
    "reason": {
        "plain GRPO": ["--rule", "none"],
        "symmetric, labels": ["--rule", "symmetric", "--step_targets", "labels"],
        "sam": ["--rule", "sam"],
    },
}
TEACHER = ("label", "SFT")  # better than RL from there on the held-out queries
EXPLAINED = "symmetric, labels"  # the rule of the samples
STUDENTS = {
    "MiniLM, gold labels": ["--loss", "gold", "--pairs", "train.jsonl"],
    "MiniLM, teacher": ["--pairs", "train.jsonl"],
    "MiniLM, teacher, unlabelled pairs too": ["--pairs", "train.jsonl,unlabelled.jsonl"],
}

# What `--choose` tries, with seed 0 on held-out training queries, and what was chosen by kappa; of
# RL's rates neither gained more there than seeds differ, so the table has the one tried first.
SFT_CHOICES = {
    f"lr {lr:g}, {steps} steps": ["--sft_lr", lr, "--sft_steps", steps]
    for lr, steps in ((2e-5, 78), (5e-5, 39), (1e-4, 78))
}
RL_CHOICES = {f"lr {lr:g}": ["--lr", lr] for lr in (5e-6, 2e-5)}
STUDENT_CHOICES = {
    f"lr {lr:g}, {steps} steps": ["--lr", lr, "--steps", steps]
    for lr, steps in ((5e-5, 78), (5e-5, 156), (1e-4, 156))
}
CHOSEN = {"sft": "lr 0.0001, 78 steps", "rl": "lr 5e-06", "student": "lr 5e-05, 156 steps"}

COLUMNS = {
    "accuracy": "accuracy",
    "macro-F1": "macro_f1",
    "kappa": "kappa",
    "nDCG@10": "ndcg@10",
    "calibration error": "ece",
    "malformed": "malformed",
}
HEAD = f"| | seeds | {' | '.join(COLUMNS)} | ms |\n{'|---' * (len(COLUMNS) + 3)}|"


# The runs -----------------------------------------------------------------------------------------


def make_tasks(source, out, smollm2):
    """{form: folder} of the task in both forms, made if it is not there."""
    tasks = {form: out / f"task-{form}" for form in FORMS}
    for form, task in tasks.items():
        if not (task / "train.json").exists():  # is written last
            chorus.make(source, task, str(smollm2), form)
    return tasks


def hold_out(source, folder):
    """A source whose test queries are every fifth of the training queries."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (source / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    queries = [json.loads(line)["query_id"] for line in lines]
    held_out = set(list(dict.fromkeys(queries))[::5])
    for name, wanted in (("train.jsonl", False), ("test.jsonl", True)):
        part = [x for x, query in zip(lines, queries, strict=True) if (query in held_out) == wanted]
        (folder / name).write_text("".join(part), encoding="utf-8")
    for name in ("README.md", "LICENSE"):
        shutil.copyfile(source / name, folder / name)
    return folder


def zero_shot(out, task, smollm2, threads):
    """Grade the test pairs with the model as it was published, by `grm.py score`."""
    graded = out / f"zero-shot-{task.name}.jsonl"
    if not graded.exists():
        length = json.loads((task / "train.json").read_text())["max_new_tokens"]
        command = [sys.executable, ROOT / "grm.py", "score", "--model", smollm2, "--task", task]
        command += ["--pairs", task / "test.jsonl", "--out", graded, "--max_new_tokens", length]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if subprocess.run(list(map(str, command)), env=environment).returncode:
            sys.exit(f"{graded}: failed")


def folder_of(out, form, seed, name):
    """The folder of one run."""
    return out / form / f"seed{seed}" / name.replace(", ", "-").replace(" ", "-")


def fine_tune(out, tasks, smollm2, form, seed, threads):
    """SFT on a form of the task."""
    flags = ["--task", tasks[form], "--seed", seed, *BUDGETS, *SFT_CHOICES[CHOSEN["sft"]]]
    folder = folder_of(out, form, seed, "SFT")
    run(folder, threads, "--model", smollm2, "--rl_steps", 0, *flags)


def reinforce(out, tasks, form, seed, rule, threads):
    """RL under a rule, from the fine-tuned model of the same seed."""
    flags = ["--task", tasks[form], "--seed", seed, *BUDGETS, *RL_CHOICES[CHOSEN["rl"]]]
    start = ["--model", folder_of(out, form, seed, "SFT") / "sft", "--sft_steps", 0]
    folder = folder_of(out, form, seed, rule)
    run(folder, threads, *start, *flags, *RULES[form][rule], "--eval_every", 0)


def distil(out, tasks, minilm, seed, name, threads):
    """A student of a seed, from the teacher of the same seed or from the gold labels."""
    form, rule = TEACHER
    flags = ["--task", tasks[form], "--student", minilm, "--seed", seed, *BUDGETS]
    flags += [*STUDENT_CHOICES[CHOSEN["student"]], *STUDENTS[name]]
    folder = folder_of(out, "student", seed, name)
    if "gold" not in flags:
        flags += ["--teacher", folder_of(out, form, seed, rule) / "model", "--samples", 1]
        flags += ["--cache", f"{folder}-labels"]  # each with its own: the pairs differ
    run(folder, threads, *flags, script="distill.py")


def run_seeds(out, tasks, models, seeds, jobs, threads):
    """All runs of the table: first what needs no other run, then what starts from SFT."""
    calls = [(zero_shot, out, tasks[form], models / "smollm2", threads) for form in FORMS]
    every = [(form, seed) for seed in seeds for form in FORMS]
    calls += [(fine_tune, out, tasks, models / "smollm2", *which, threads) for which in every]
    run_all(jobs, calls)
    calls = []
    for form, seed in every:
        calls += [(reinforce, out, tasks, form, seed, rule, threads) for rule in RULES[form]]
    for seed in seeds:
        calls += [(distil, out, tasks, models / "minilm", seed, name, threads) for name in STUDENTS]
    run_all(jobs, calls)


def choose(out, tasks, models, jobs, threads):
    """Run all that the settings are chosen from, with seed 0."""
    base = ["--task", tasks["label"], *BUDGETS]
    calls = []
    for name, flags in SFT_CHOICES.items():
        folder = folder_of(out, "label", 0, f"SFT, {name}")
        start = ["--model", models / "smollm2", "--rl_steps", 0]
        calls.append((run, folder, threads, *base, *start, *flags))
    for name, flags in STUDENT_CHOICES.items():
        folder = folder_of(out, "student", 0, name)
        start = ["--student", models / "minilm", *STUDENTS["MiniLM, gold labels"]]
        calls.append((partial(run, script="distill.py"), folder, threads, *base, *start, *flags))
    run_all(jobs, calls)
    tuned = folder_of(out, "label", 0, f"SFT, {CHOSEN['sft']}") / "sft"
    start = ["--model", tuned, "--sft_steps", 0, "--rule", "none"]
    calls = []
    for name, flags in RL_CHOICES.items():
        folder = folder_of(out, "label", 0, f"RL, {name}")
        calls.append((run, folder, threads, *base, *start, *flags))
    run_all(jobs, calls)


# What came out ------------------------------------------------------------------------------------


def line(name, results, ms=None):
    """A line of the table: mean of each metric over seeds, ± standard deviation if several."""
    cells = [name, str(len(results))]
    for key in COLUMNS.values():
        values = [result[key] for result in results if key in result]
        cell = f"{np.mean(values):.3f}" if values else "-"
        if len(values) > 1:
            cell += f" ± {np.std(values, ddof=1):.3f}"
        cells.append(cell)
    cells.append(f"{ms:.1f}" if ms else "-")
    return f"| {' | '.join(cells)} |"


def milliseconds(predict, pairs):
    """Milliseconds a pair in a batch of 64: the best of three."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        predict(pairs[:64])
        times.append(time.perf_counter() - started)
    return 1000 * min(times) / 64


def table(out, tasks, models):
    """The table of all that is done, as Markdown; times are of this machine, of seed 0's models."""
    lines = [HEAD]
    task = grm.Task.load(tasks["label"])
    pairs = task.read(task.folder / "test.jsonl")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, encoder = chorus.load_encoder(str(models / "minilm"))
    cosine = partial(chorus.cosine_scores, tokenizer=tokenizer, model=encoder.to(device))
    cosine_ms = milliseconds(cosine, pairs)
    for name, metrics in chorus.baselines(task, str(models / "minilm")).items():
        is_cosine = name == "cosine"
        name = "MiniLM's cosine, no training" if is_cosine else name
        lines.append(line(name, [metrics], cosine_ms if is_cosine else None))
    for form in FORMS:
        results = {name: read_all(out, form, name, "rl") for name in RULES[form]}
        results = {"SFT": read_all(out, form, "SFT", "sft")} | results
        if (graded := out / f"zero-shot-{tasks[form].name}.jsonl").exists():
            predictions = list(map(json.loads, graded.read_text(encoding="utf-8").splitlines()))
            results = {"zero-shot": [grm.metrics(task, pairs, predictions)]} | results
        ms = None
        tuned = folder_of(out, form, 0, "SFT") / "sft"
        if tuned.exists():
            renderer, engine = grm.load_judge(tuned, None)
            ms = milliseconds(partial(grm.judge, renderer, engine), pairs)
        lines += [line(f"SmolLM2, {form}: {name}", of, ms) for name, of in results.items() if of]
    for name in STUDENTS:
        if results := read_all(out, "student", name, "student"):
            ms = None
            if (model := folder_of(out, "student", 0, name) / "model").exists():
                student = CrossEncoder(str(model))  # on the GPU, if there is one
                texts = [(pair["query"], pair["document"]) for pair in pairs]
                ms = milliseconds(student.predict, texts)
            lines.append(line(name, results, ms))
    return "\n".join(lines) + "\n"


def read_all(out, form, name, stage):
    """The metrics on the test pairs of the runs of all seeds that are done."""
    results = []
    for seed in range(10):
        path = folder_of(out, form, seed, name) / "summary.json"
        if path.exists():
            results.append(json.loads(path.read_text())[stage]["test"])
    return results


def table_of_choices(out):
    """The table of what `choose` tried, as Markdown: metrics on the held-out training queries."""
    tried = [("label", f"SFT, {name}", "sft") for name in SFT_CHOICES]
    tried += [("label", f"RL, {name}", "rl") for name in RL_CHOICES]
    tried += [("student", name, "student") for name in STUDENT_CHOICES]
    lines = [HEAD]
    for form, name, stage in tried:
        if results := read_all(out, form, name, stage):
            lines.append(line(f"{form}: {name}", results))
    return "\n".join(lines) + "\n"


# The command --------------------------------------------------------------------------------------


def main():
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="PATH_TO_CHORUS")
    parser.add_argument("--models", type=Path, default=Path("models"), help="(default: models)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", choices=range(10), default=[0, 1])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--choose", action="store_true", help="what the settings are chosen by")
    args = parser.parse_args()
    hf_logging.disable_progress_bar()
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    smollm2 = args.models / "smollm2"
    if args.choose:
        out = args.out / "choose"
        tasks = make_tasks(hold_out(args.source, out / "source"), out, smollm2)
        choose(out, tasks, args.models, args.jobs, threads)
        text = table_of_choices(out)
    else:
        out = args.out
        tasks = make_tasks(args.source, out, smollm2)
        if args.seeds:
            run_seeds(out, tasks, args.models, args.seeds, args.jobs, threads)
        text = table(out, tasks, args.models)
    (out / "real.md").write_text(text, encoding="utf-8")
    print(text)
    if (model := folder_of(out, "reason", 0, EXPLAINED) / "model").exists():
        task = grm.Task.load(tasks["reason"])
        pairs = task.read(task.folder / "test.jsonl")
        targets = chorus.label_steps(pairs, task.read(task.folder / "train.jsonl"))
        text = explain(model, pairs, targets, "symmetric")
        (out / "samples.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
