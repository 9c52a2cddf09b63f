"""When does credit by step pay? Rules of credit x number of steps x size of the groups x seeds.

    python docs/credit.py --out runs/credit            # all of it: about seven hours on 2 cores
    python docs/credit.py --out runs/credit --groups 8 --seeds 0 1 2     # a piece; others add to it

For each number of steps a task is made (`data/notes/make.py --steps`), for each seed one model
fine-tuned on it, and from that model one RL run for each rule and size of the groups, all with the
same number of steps and of answers. Runs that are done are not done again, so a stopped sweep goes
on. Writes OUT/credit.md and OUT/credit.png from all runs that are there.

A task of one step is left out: there every rule gives plain GRPO's credit, to the last bit.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from results import ROOT, run

STEPS = [3, 5, 8]
GROUPS = [8, 4]
ANSWERS = 128  # sampled in a step, whatever the size of the groups
RULES = {  # the first is the one that the others are compared with
    "plain GRPO": ["--rule", "none"],
    "symmetric, labels": ["--rule", "symmetric", "--step_targets", "labels"],
    "symmetric, change": ["--rule", "symmetric", "--step_targets", "change"],
    "tree": ["--rule", "tree"],
    "symmetric, final": ["--rule", "symmetric", "--step_targets", "final"],
    "positive, labels": ["--rule", "positive", "--step_targets", "labels"],
}


def make_task(out, steps):
    """The folder of the task of so many steps, made if it is not there."""
    task = out / f"task-{steps}"
    if not (task / "unlabelled.jsonl").exists():
        maker = [sys.executable, ROOT / "data/notes/make.py", "--steps", steps, "--out", task]
        subprocess.run(list(map(str, maker)), check=True)
    return task


def folder_of(out, steps, seed, group, rule):
    """The folder of one RL run."""
    return out / f"{steps}-steps" / f"seed{seed}" / f"{rule.replace(', ', '-')} x{group}"


def train(out, task, steps, seed, groups, rl_steps, threads):
    """SFT, then RL under each rule and size of the groups from the same fine-tuned model."""
    tuned = out / f"{steps}-steps" / f"seed{seed}" / "sft"
    tuned.parent.mkdir(parents=True, exist_ok=True)
    run(tuned, threads, "--task", task, "--seed", seed, "--rl_steps", 0)
    start = ["--task", task, "--seed", seed, "--model", tuned / "sft", "--sft_steps", 0]
    length = ["--rl_steps", rl_steps, "--eval_every", 0]
    for group in groups:
        samples = ["--group_size", group, "--prompts_per_step", ANSWERS // group]
        for rule, flags in RULES.items():
            folder = folder_of(out, steps, seed, group, rule)
            run(folder, threads, *start, *length, *samples, *flags)


def main():
    """Run what is missing, then write the table and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rl_steps", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = []
        for seed in args.seeds:
            for steps in args.steps:
                task = make_task(args.out, steps)
                settings = (args.out, task, steps, seed, args.groups, args.rl_steps, threads)
                jobs.append(pool.submit(train, *settings))
        for job in jobs:
            job.result()


if __name__ == "__main__":
    main()
