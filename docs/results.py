"""The README's results: seeds x credit rules on the embedded task, as a table and a picture.

    python docs/results.py --out runs/results                       # the default setting, five seeds
    python docs/results.py --out runs/results-lr --group_size 4 --lr 4e-4     # further flags go to train.py's RL stage

For each seed one SFT run, then from the same fine-tuned model one RL run for each rule. Runs that are done are not done
again, so a stopped sweep goes on. Writes OUT/table.md and OUT/curves.png.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RULES = {
    "plain GRPO": ["--rule", "none"],
    "SAM, step labels": ["--step_targets", "labels"],
    "SAM, final label": ["--step_targets", "final"],
}


def run(out, threads, *flags):
    """One training run into `out`, unless it is done; its output goes to out.log."""
    if (out / "summary.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, ROOT / "train.py", "--task", ROOT / "data" / "notes", "--out", out, *flags]
    with open(f"{out}.log", "w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(list(map(str, command)), stdout=log, stderr=log, env=environment).returncode
    if code:
        sys.exit(f"{out}: failed, see {out}.log")


def one_seed(out, seed, threads, flags):
    """SFT, then RL under each rule from the same fine-tuned model."""
    base = out / f"seed{seed}"
    base.mkdir(parents=True, exist_ok=True)
    run(base / "sft", threads, "--seed", seed, "--rl_steps", 0)
    for name, rule in RULES.items():
        start = ["--model", base / "sft" / "sft", "--sft_steps", 0, "--eval_every", 0]
        run(base / name.replace(", ", "-").replace(" ", "-"), threads, "--seed", seed, *start, *rule, *flags)


def read(out, seeds):
    """{setting: {"test_random": [...], "test_longtail": [...], "reward": [[...] per seed]}}, accuracies by seed."""
    results = {}
    for name in ("SFT alone", *RULES):
        folder = "sft" if name == "SFT alone" else name.replace(", ", "-").replace(" ", "-")
        rows = {"test_random": [], "test_longtail": [], "reward": []}
        for seed in seeds:
            base = out / f"seed{seed}" / folder
            last = list(json.loads((base / "summary.json").read_text()).values())[-1]
            for test in ("test_random", "test_longtail"):
                rows[test].append(last[test]["accuracy"])
            records = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
            rows["reward"].append([r["reward"] for r in records if r["stage"] == "rl"])
        results[name] = rows
    return results


def table(results):
    """The results as a Markdown table, mean ± standard deviation over seeds. All rules start from the same fine-tuned
    models, so the last column is paired: the difference to plain GRPO in mean accuracy over training, seed by seed."""

    def cell(values, sign=""):
        return f"{np.mean(values):{sign}.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"

    lines = ["| | test_random | test_longtail | mean over training | its difference to plain GRPO |", "|---|---|---|---|---|"]
    grpo = np.array([np.mean(r) for r in results["plain GRPO"]["reward"]])
    for name, rows in results.items():
        over = difference = "-"
        if rows["reward"][0]:
            mean = np.array([np.mean(r) for r in rows["reward"]])
            over, difference = cell(mean), cell(mean - grpo, "+") if name != "plain GRPO" else "-"
        lines.append(f"| {name} | {cell(rows['test_random'])} | {cell(rows['test_longtail'])} | {over} | {difference} |")
    return "\n".join(lines) + "\n"


def draw(results, path):
    """Sampled accuracy over training: mean over seeds in a moving window, and the band of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in RULES:
        rewards = np.array(results[name]["reward"])
        window = max(1, rewards.shape[1] // 15)
        smooth = np.array([np.convolve(row, np.ones(window) / window, "valid") for row in rewards])
        steps = np.arange(smooth.shape[1]) + window
        axis.plot(steps, smooth.mean(0), label=name)
        axis.fill_between(steps, smooth.mean(0) - smooth.std(0), smooth.mean(0) + smooth.std(0), alpha=0.2)
    axis.set(xlabel="RL step", ylabel=f"accuracy of sampled answers (mean of {window} steps)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def main():
    """Run what is missing, then print and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="seeds trained at a time; they share the cores")
    args, flags = parser.parse_known_args()
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: one_seed(args.out, seed, threads, flags), args.seeds))
    results = read(args.out, args.seeds)
    (args.out / "table.md").write_text(table(results))
    draw(results, args.out / "curves.png")
    print(table(results))


if __name__ == "__main__":
    main()
