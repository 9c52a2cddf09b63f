"""When does credit by step pay? Rules of credit x number of steps x size of the groups x seeds.

    python docs/credit.py --out runs/credit            # all of it: some three hours on 2 cores
    python docs/credit.py --out runs/credit --groups 8 --seeds 0 1 2     # a piece; others add to it
    python docs/credit.py --out runs/credit --seeds                 # only the table and pictures

For each number of steps a task is made (`data/notes/make.py --steps`), for each seed one model
fine-tuned on it, and from that model one RL run for each rule and size of the groups, all with the
same number of steps and of answers. Runs that are done are not done again, so a stopped sweep goes
on. Of all runs that are there it writes OUT/credit.md, two tables, OUT/credit.png, the differences
to plain GRPO, and, of the seeds that all rules have, OUT/course.png, how steps and outcomes go
together over training.

A task of one step is left out: there every rule gives plain GRPO's credit, up to rounding.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
STEPS = [3, 5, 8]
GROUPS = [8, 4]
RL_STEPS = 100
ANSWERS = 128  # sampled in a step, whatever the size of the groups
RULES = {  # the first is the one that the others are compared with
    "plain GRPO": ["--rule", "none"],
    "symmetric, labels": ["--rule", "symmetric", "--step_targets", "labels"],
    "symmetric, change": ["--rule", "symmetric", "--step_targets", "change"],
    "sam": ["--rule", "sam"],
}
PLAIN = "plain GRPO"
COLORS = dict(zip(RULES, ("black", "C0", "C1", "C2"), strict=True))
WINDOW = 10  # steps of a moving mean
# Of Student's t, for the 95 % intervals of means of 2 to 10 values.
STUDENT_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


# The runs -----------------------------------------------------------------------------------------


def run(out, threads, *flags, script="train.py"):
    """One training run into `out`, unless it is done; its output goes to out.log."""
    if (out / "summary.json").exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    command = list(map(str, [sys.executable, ROOT / script, "--out", out, *flags]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(f"{out}.log", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    if code or not (out / "summary.json").exists():
        sys.exit(f"{out}: failed or stopped, see {out}.log")


def run_all(jobs, calls):
    """Make calls, (function, argument, ...), so many at a time; after a failure none begins."""
    pool = ThreadPoolExecutor(jobs)
    futures = [pool.submit(*call) for call in calls]
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    pool.shutdown(cancel_futures=True)
    for future in done:
        future.result()  # raises what it raised


def make_task(out, steps):
    """The folder of the task of so many steps, made if it is not there."""
    task = out / f"task-{steps}"
    if not (task / "student").exists():  # is written last
        maker = [sys.executable, ROOT / "data/notes/make.py", "--steps", steps, "--out", task]
        subprocess.run(list(map(str, maker)), check=True)
    return task


def folder_of(out, steps, seed, group, rule):
    """The folder of one RL run."""
    return out / f"{steps}-steps" / f"seed{seed}" / f"{rule.replace(', ', '-')} x{group}"


def train(out, task, steps, seed, groups, threads):
    """SFT, then RL under each rule and size of the groups from the same fine-tuned model."""
    tuned = out / f"{steps}-steps" / f"seed{seed}" / "sft"
    run(tuned, threads, "--task", task, "--seed", seed, "--rl_steps", 0)
    start = ["--task", task, "--seed", seed, "--model", tuned / "sft", "--sft_steps", 0]
    length = ["--rl_steps", RL_STEPS, "--eval_every", 0]
    for group in groups:
        samples = ["--group_size", group, "--prompts_per_step", ANSWERS // group]
        for rule, flags in RULES.items():
            folder = folder_of(out, steps, seed, group, rule)
            run(folder, threads, *start, *length, *samples, *flags)


# What came out ------------------------------------------------------------------------------------


def read(folder):
    """The figures of a run that is done, else None; those of training are arrays over its steps."""
    if not (folder / "summary.json").exists():
        return None
    tests = json.loads((folder / "summary.json").read_text())["rl"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["stage"] == "rl"]
    course = ("reward", "steps_right", "wrong_in_right", "right_in_wrong", "credit_right")
    course += ("right_throughout",)
    figures = {name: np.array([record[name] for record in records], float) for name in course}
    for name, test in tests.items():
        figures[name] = test["accuracy"]
    figures["tests"] = np.mean([test["accuracy"] for test in tests.values()])
    by_step = [np.mean(list(test["step_accuracy"].values())) for test in tests.values()]
    figures["steps, tests"] = np.mean(by_step)
    return figures


def read_all(out, steps, group):
    """{rule: {seed: figures}} of the runs that are done."""
    seeds = range(10)
    runs = {}
    for rule in RULES:
        read_runs = {seed: read(folder_of(out, steps, seed, group, rule)) for seed in seeds}
        runs[rule] = {seed: figures for seed, figures in read_runs.items() if figures}
    return runs


def smooth(values):
    """Moving means over WINDOW steps, of the values that are there."""
    sums = np.convolve(np.nan_to_num(values), np.ones(WINDOW), "valid")
    return sums / np.convolve(~np.isnan(values), np.ones(WINDOW), "valid")


def steps_to_best(runs, rule, seed):
    """RL steps until sampled accuracy reaches 90 % of the best of all rules; nan if it does not."""
    best = max(smooth(of[seed]["reward"]).max() for of in runs.values() if seed in of)
    reached = smooth(runs[rule][seed]["reward"]) >= 0.9 * best
    return float(np.argmax(reached)) + WINDOW if reached.any() else np.nan


def differences(runs, rule, name):
    """A figure, or its mean over training, less plain GRPO's, for each seed that has both."""
    seeds = [seed for seed in runs[rule] if seed in runs[PLAIN]]
    return [np.mean(runs[rule][s][name]) - np.mean(runs[PLAIN][s][name]) for s in seeds]


def interval(values):
    """Half of the 95 % interval of a mean (Student's t); nan of fewer than two values."""
    if len(values) < 2:
        return np.nan
    return STUDENT_T[len(values) - 2] * np.std(values, ddof=1) / np.sqrt(len(values))


def start_and_end(values):
    """Means of the first and the last tenth of training, in which a figure may be missing."""
    tenth = max(1, len(values) // 10)
    return np.nanmean(values[:tenth]), np.nanmean(values[-tenth:])


def mean(runs, rule, name):
    """Mean over seeds of a figure, which may be an array over training."""
    return np.mean([np.mean(figures[name]) for figures in runs[rule].values()])


def gain(runs, rule, name):
    """Difference to plain GRPO, mean and 95 % interval over seeds, for a table."""
    values = differences(runs, rule, name)
    if rule == PLAIN or not values:
        return "-"
    return f"{np.mean(values):+.3f} ± {interval(values):.3f}"


def of_answers(runs, rule):
    """What the first table says of a rule: how right its answers are."""
    steps = [steps_to_best(runs, rule, seed) for seed in runs[rule]]
    return {
        "seeds": str(len(runs[rule])),
        "accuracy over training": f"{mean(runs, rule, 'reward'):.3f}",
        "its difference to plain GRPO": gain(runs, rule, "reward"),
        "test_random": f"{mean(runs, rule, 'test_random'):.3f}",
        "test_longtail": f"{mean(runs, rule, 'test_longtail'):.3f}",
        "difference of both": gain(runs, rule, "tests"),
        "steps to 90 %": f"{np.nanmean(steps):.0f}",
    }


def of_steps(runs, rule):
    """What the second table says of a rule: how right its answers' steps are."""
    figures = runs[rule].values()
    credit = [np.nanmean(f["credit_right"]) for f in figures]
    wrong = np.mean([start_and_end(f["wrong_in_right"]) for f in figures], 0)
    right = np.mean([start_and_end(f["right_in_wrong"]) for f in figures], 0)
    throughout = np.mean([start_and_end(f["right_throughout"]) for f in figures], 0)
    return {
        "right steps over training": f"{mean(runs, rule, 'steps_right'):.3f}",
        "its difference to plain GRPO": gain(runs, rule, "steps_right"),
        "right steps, tests": f"{mean(runs, rule, 'steps, tests'):.3f}",
        "right throughout": f"{throughout[0]:.3f} → {throughout[1]:.3f}",
        "credit of the right sign": f"{np.mean(credit):.2f}",
        "wrong steps in right answers": f"{wrong[0]:.3f} → {wrong[1]:.3f}",
        "right steps in wrong answers": f"{right[0]:.2f} → {right[1]:.2f}",
    }


def table(out, cells_of):
    """A line for each setting that has runs, as a Markdown table; means over seeds."""
    lines = []
    for steps in STEPS:
        for group in GROUPS:
            runs = read_all(out, steps, group)
            for rule in [rule for rule in RULES if runs[rule]]:
                cells = {"steps": str(steps), "group": str(group), "rule": rule}
                cells |= cells_of(runs, rule)
                if not lines:
                    lines = [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]
                lines.append(f"| {' | '.join(cells.values())} |")
    return "\n".join(lines) + "\n"


def draw_differences(out, path):
    """Difference to plain GRPO against the number of steps, a line a rule, 95 % intervals."""
    plt = pyplot()
    groups = [g for g in GROUPS if any(read_all(out, steps, g)[PLAIN] for steps in STEPS)]
    titles = {
        "reward": "right answers, over training",
        "tests": "right answers to test pairs, at the end",
        "steps_right": "right steps, over training",
    }
    figure, axes = plt.subplots(
        len(groups), 3, figsize=(14, 4.2 * len(groups)), layout="constrained", squeeze=False
    )
    for row, group in zip(axes, groups, strict=True):
        runs = {steps: read_all(out, steps, group) for steps in STEPS}
        for axis, (name, title) in zip(row, titles.items(), strict=True):
            axis.axhline(0, color=COLORS[PLAIN], linewidth=1, label=PLAIN)
            for i, rule in enumerate(list(RULES)[1:]):
                gained = {steps: differences(runs[steps], rule, name) for steps in STEPS}
                gained = {1: [0.0, 0.0]} | {steps: x for steps, x in gained.items() if x}
                x = np.array(list(gained)) + 0.12 * (i - 1)
                means = [np.mean(values) for values in gained.values()]
                errors = [interval(values) for values in gained.values()]
                style = {"marker": "o", "markersize": 4, "capsize": 3, "color": COLORS[rule]}
                axis.errorbar(x, means, errors, label=rule, **style)
            axis.set(title=f"{title}, groups of {group}", xlabel="steps of an answer")
            axis.set(ylabel="minus plain GRPO's", xticks=[1, *STEPS])
            axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=100)


def draw_course(out, path):
    """How steps and outcomes go together over training, in groups of the first size."""
    plt = pyplot()
    panels = {
        "reward": "right answers",
        "steps_right": "right steps",
        "right_in_wrong": "right steps in wrong answers",
        "wrong_in_right": "wrong steps in right answers",
    }
    figure, axes = plt.subplots(
        len(STEPS), len(panels), figsize=(15, 3.6 * len(STEPS)), layout="constrained"
    )
    for row, steps in zip(axes, STEPS, strict=True):
        runs = read_all(out, steps, GROUPS[0])
        seeds = set.intersection(*(set(by_seed) for by_seed in runs.values()))
        for axis, (name, title) in zip(row, panels.items(), strict=True):
            for rule, by_seed in runs.items() if seeds else ():
                means = np.mean([smooth(by_seed[seed][name]) for seed in seeds], 0)
                x = np.arange(len(means)) + WINDOW
                axis.plot(x, means, label=rule, color=COLORS[rule], linewidth=1.3)
            axis.set(title=f"{steps} steps: {title}", xlabel="RL step")
            axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=80)


def pyplot():
    """matplotlib's, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def main():
    """Run what is missing, then write the table and the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--groups", type=int, nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--seeds", type=int, nargs="*", choices=range(10), default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    calls = []
    for seed in args.seeds:
        for steps in args.steps:
            task = make_task(args.out, steps)
            calls.append((train, args.out, task, steps, seed, args.groups, threads))
    run_all(args.jobs, calls)
    text = f"{table(args.out, of_answers)}\n{table(args.out, of_steps)}"
    (args.out / "credit.md").write_text(text)
    draw_differences(args.out, args.out / "credit.png")
    draw_course(args.out, args.out / "course.png")
    print(text)


if __name__ == "__main__":
    main()
