"""When does credit by step pay? Rules of credit x tasks x seeds, from the same fine-tuned models.

    python docs/credit.py --out runs/credit                       # what is missing: hours, in order
    python docs/credit.py --out runs/credit --tasks 8 --seeds 0 1     # a piece of it
    python docs/credit.py                                         # only the tables and the picture

For each task (`data/notes/make.py`: so many business rules, each its own step, or three scores as
SAM was published for) and each seed one model is fine-tuned, and from it one RL run goes for each
rule, with the same pairs, steps and number of answers. A run that ends adds a line to
docs/credit.jsonl, and is not made again; a stopped one goes on. Differences to plain GRPO are
paired by seed. Writes docs/credit.png, and prints what docs/results.md shows.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

# Python puts only this script's own folder on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))
import grm
import sam

ROOT = Path(__file__).resolve().parent.parent
LINES = ROOT / "docs" / "credit.jsonl"
RL_STEPS = 100
PLAIN = "plain GRPO"
RULES = {  # the first is the one that the others are compared with
    PLAIN: ["--rule", "none"],
    "sam": ["--rule", "sam"],
    "symmetric, labels": ["--rule", "symmetric", "--step_targets", "labels"],
    "symmetric, change": ["--rule", "symmetric", "--step_targets", "change"],
}
# Of which normalisation could be the cause: the first and the last with sam's, the mean over
# answers of the mean over kept tokens (`train_normalised`).
CONTROLS = {
    f"{PLAIN}, mean over answers": ["--normalised", "none"],
    "symmetric, change, mean over answers": ["--normalised", "symmetric"],
}
TASKS = {  # in the order in which they are run
    "8": ["--steps", 8],
    "5": ["--steps", 5],
    "3": ["--steps", 3],
    "published": ["--steps", 8, "--form", "initial-calibrated-final"],
}
COLORS = dict(zip(RULES, ("black", "C2", "C0", "C1"), strict=True))
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
    with open(f"{out}.log", "a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    if code or not (out / "summary.json").exists():
        sys.exit(f"{out}: failed or stopped, see {out}.log")


def run_all(jobs, calls):
    """Make calls, (function, argument, ...), so many at a time; after a failure none begins, but
    for one that the free worker may have taken up already.
    """
    pool = ThreadPoolExecutor(jobs)
    futures = [pool.submit(*call) for call in calls]
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    pool.shutdown(cancel_futures=True)
    for future in done:
        future.result()  # raises what it raised


def train_normalised(rule, argv):
    """train.py under rule none or symmetric, with the denominator of rule sam."""
    import train

    stepwise_credit = sam.stepwise_credit
    judge_steps = train.judge_steps
    sam.stepwise_credit = lambda *batch: stepwise_credit(*batch[:-1], rule)
    train.judge_steps = lambda batch, traces, task, config, device: judge_steps(
        batch, traces, task, replace(config, rule=rule), device
    )
    sys.argv = ["train.py", *argv, "--rule", "sam"]
    train.main()


def make_task(out, name):
    """The folder of a task, made if it is not there."""
    folder = out / f"task-{name}"
    if not (folder / "student").exists():  # is written last
        maker = [sys.executable, ROOT / "data/notes/make.py", *TASKS[name], "--out", folder]
        subprocess.run(list(map(str, maker)), check=True)
    return folder


def train_all(out, name, seed, rules, threads):
    """SFT, then RL under each of the rules that has no line yet, from the same fine-tuned model."""
    done = {line["rule"] for line in read_lines() if (line["task"], line["seed"]) == (name, seed)}
    missing = [rule for rule in rules if rule not in done]
    if not missing:
        return
    folder = out / name / f"seed{seed}"
    task = out / f"task-{name}"
    common = ["--task", task, "--seed", seed]
    run(folder / "sft", threads, *common, "--rl_steps", 0)
    common += ["--model", folder / "sft" / "sft", "--sft_steps", 0]
    common += ["--rl_steps", RL_STEPS, "--eval_every", 0]
    for rule in missing:
        flags = (RULES | CONTROLS)[rule]
        script = "docs/credit.py" if rule in CONTROLS else "train.py"
        path = folder / rule.replace(", ", "-")
        run(path, threads, *common, *flags, script=script)
        with open(LINES, "a") as file:
            file.write(
                json.dumps({"task": name, "seed": seed, "rule": rule} | figures(path)) + "\n"
            )


def figures(folder):
    """What a finished run's line keeps: tests, and over training the course or its means."""
    summary = json.loads((folder / "summary.json").read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record["stage"] == "rl"]
    means = {}
    for name in ("steps_right", "credit_right", "masked"):
        known = [record[name] for record in records if record[name] is not None]
        means[name] = round(float(np.mean(known)), 4) if known else None
    tests = summary["rl"]
    by_step = [np.mean(list(test["step_accuracy"].values())) for test in tests.values()]
    return {
        **{name: test["accuracy"] for name, test in tests.items()},
        "steps, tests": round(float(np.mean(by_step)), 4),
        "before_rl": {name: round(x, 4) for name, x in summary["before_rl"].items()},
        "reward": [round(record["reward"], 4) for record in records],
        **means,
    }


# What came out ------------------------------------------------------------------------------------


def read_lines():
    """All finished runs."""
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def runs_of(lines, task):
    """{rule: {seed: line}} of a task."""
    runs = {rule: {} for rule in RULES | CONTROLS}
    for line in lines:
        if line["task"] == task:
            runs[line["rule"]][line["seed"]] = line
    return runs


def value(line, name):
    """A figure of a run: the mean over training, or over both test sets."""
    if name == "tests":
        return (line["test_random"] + line["test_longtail"]) / 2
    return float(np.mean(line[name]))


def differences(runs, rule, other, name):
    """A figure less that under another rule, for each seed that has both."""
    seeds = sorted(runs[rule].keys() & runs[other].keys())
    return [value(runs[rule][s], name) - value(runs[other][s], name) for s in seeds]


def interval(values):
    """Half of the 95 % interval of a mean (Student's t); nan of fewer than two values."""
    if len(values) < 2:
        return np.nan
    return STUDENT_T[len(values) - 2] * np.std(values, ddof=1) / np.sqrt(len(values))


def gain(runs, rule, other, name):
    """A difference, mean and 95 % interval over seeds, for a table."""
    values = differences(runs, rule, other, name)
    if rule == other or not values:
        return "-"
    return f"{np.mean(values):+.3f} ± {interval(values):.3f}"


def print_table(lines):
    """A row for each rule of each task; then the three statements for each task."""
    titles = ["task", "rule", "n", "reward over training", "less plain GRPO's", "tests"]
    titles += ["less plain GRPO's", "right steps over training", "less plain GRPO's"]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for task in TASKS:
        runs = runs_of(lines, task)
        for rule, of_seeds in runs.items():
            if not of_seeds:
                continue
            cells = [task, rule, str(len(of_seeds))]
            for name in ("reward", "tests", "steps_right"):
                mean = np.mean([value(line, name) for line in of_seeds.values()])
                cells += [f"{mean:.3f}", gain(runs, rule, PLAIN, name)]
            print(f"| {' | '.join(cells)} |")
    print()
    pairs = (("sam", PLAIN), ("symmetric, change", PLAIN), ("symmetric, change", "sam"))
    for task in TASKS:
        runs = runs_of(lines, task)
        for rule, other in pairs:
            n = len(differences(runs, rule, other, "reward"))
            if n:
                of_both = (gain(runs, rule, other, name) for name in ("reward", "tests"))
                print(
                    "{}: {} less {}: reward {}, tests {}; n {}".format(
                        task, rule, other, *of_both, n
                    )
                )


def explain(model, pairs, targets, rule, group_size=8):
    """Three answers with the credit of their steps under a rule, the last a wrong one, as text.

    model: a folder. targets: what the steps of each pair are compared with. The pairs are drawn. An
    answer is the first of its group, whose rewards must differ: else there is no credit to show.
    """
    renderer, engine = grm.load_judge(model)
    drawn = [*zip(pairs, targets, strict=True)]
    random.Random(0).shuffle(drawn)
    none = [0] * len(renderer.task.boxes)  # what a malformed answer has
    texts = []
    wanted = [1.0, 1.0, 0.0]  # rewards
    for pair, labels in drawn:
        if not wanted:
            break
        sampled = engine.sample(renderer.prompts([pair]), group_size=group_size)
        answers = sampled.answers[0]
        traces = [renderer.parse(answer) for answer in answers]
        rewards_PG = torch.tensor([[grm.reward(trace, pair["label"]) for trace in traces]])
        advantages_PG = sam.group_advantages(rewards_PG)
        if rewards_PG[0, 0] != wanted[0] or not advantages_PG.any() or not traces[0].steps:
            continue
        wanted.pop(0)
        ends = [[step.end for step in trace.steps] or none for trace in traces]
        right = [grm.step_verdicts(trace, labels) or none for trace in traces]
        credit_A = sam.stepwise_credit(
            advantages_PG.flatten(),
            torch.tensor(ends),
            torch.tensor(right).bool(),
            sampled.lengths_N.cpu(),
            rule,
        )
        texts.append(f"{pair['query']} | {pair['document']} | human label {pair['label']}")
        for step, label in zip(traces[0].steps, labels, strict=True):
            text = renderer.decode(answers[0][step.start : step.end]).strip()
            credit = float(credit_A[step.end - 1]) + 0.0  # no "-0.00"
            texts.append(f"{credit:+8.2f}  {text}  (beside {label})")
        texts.append("")
    return "\n".join(texts)


def draw(lines, path):
    """Difference to plain GRPO in reward over training, against the number of steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color=COLORS[PLAIN], linewidth=1.5)
    axis.text(8.4, 0, PLAIN, va="bottom", color=COLORS[PLAIN])
    for i, rule in enumerate(list(RULES)[1:]):
        of_tasks = {
            int(task): differences(runs_of(lines, task), rule, PLAIN, "reward")
            for task in TASKS
            if task.isdigit()
        }
        of_tasks = {steps: x for steps, x in sorted(of_tasks.items()) if x}
        if not of_tasks:
            continue
        x = np.array(list(of_tasks)) + 0.1 * (i - 1)
        means = [np.mean(values) for values in of_tasks.values()]
        errors = [interval(values) for values in of_tasks.values()]
        color = COLORS[rule]
        axis.errorbar(x, means, errors, fmt="o-", markersize=5, capsize=4, color=color)
        axis.text(8.4, means[-1], rule, va="center", color=color)
    axis.set(xlabel="business rules, each its own step of an answer", xticks=[3, 5, 8])
    axis.set(ylabel="share of right answers, over training", xlim=(2.5, 11))
    axis.set_title("What credit by step adds to plain GRPO (95 % intervals)", loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main():
    """Run what is missing, then print the tables and draw the picture."""
    if "--normalised" in sys.argv:  # one run of a control, begun by `train_all`
        at = sys.argv.index("--normalised")
        return train_normalised(sys.argv[at + 1], sys.argv[1:at] + sys.argv[at + 2 :])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the runs (none: nothing is run)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--seeds", type=int, nargs="+", choices=range(10), default=range(10))
    parser.add_argument("--controls", action="store_true", help="only these, of five seeds")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    args = parser.parse_args()
    if args.out:
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        rules = CONTROLS if args.controls else RULES
        calls = []
        for task in args.tasks:
            make_task(args.out, task)
            calls += [(train_all, args.out, task, seed, rules, threads) for seed in args.seeds]
        run_all(args.jobs, calls)
    lines = read_lines()
    print_table(lines)
    if lines:
        draw(lines, ROOT / "docs" / "credit.png")


if __name__ == "__main__":
    main()
