"""Mode balance: the SFT loss beside RL, weights x seeds, as a table and a picture.

    python docs/balance.py --out runs/balance
    python docs/balance.py --out runs/long --rl_steps 360     # further flags are those of RL runs

For each seed one SFT run, then from the same fine-tuned model one RL run for each weight. Runs that
are done are not done again, so a stopped sweep goes on. Writes OUT/balance.md and OUT/balance.png.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
from credit import ROOT, run, run_all

# The first setting is the one that the others are compared with.
SETTINGS = {f"sft_coef {value}": ["--sft_coef", value] for value in (0, 0.01, 0.1, 1)}
COLUMNS = {
    "random": "test_random",
    "longtail": "test_longtail",
    "recall": "lowest recall of a label",
    "entropy": "entropy, last tenth",
    "no_signal": "groups without a signal",
}


def folder_of(name):
    """The folder of a setting."""
    return name.replace(" ", "-")


def one_seed(out, seed, threads, flags):
    """SFT, then RL under each setting from the same fine-tuned model."""
    base = out / f"seed{seed}"
    task = ["--task", ROOT / "data/notes", "--seed", seed]
    run(base / "sft", threads, *task, "--rl_steps", 0)
    start = ["--model", base / "sft" / "sft", "--sft_steps", 0, "--eval_every", 0]
    for name, setting in SETTINGS.items():
        run(base / folder_of(name), threads, *task, *start, *setting, *flags)


def lowest_recall(confusion):
    """Of the labels that occur. Rows: gold; columns: predicted, malformed last."""
    return min(row[i] / sum(row) for i, row in enumerate(confusion["counts"]) if sum(row))


def read(out, seeds):
    """{setting: {column: [a value, or for reward a list over steps, for each seed]}}."""
    results = {}
    for name in ("SFT alone", *SETTINGS):
        rows = {column: [] for column in (*COLUMNS, "reward")}
        for seed in seeds:
            base = out / f"seed{seed}" / ("sft" if name == "SFT alone" else folder_of(name))
            last = list(json.loads((base / "summary.json").read_text()).values())[-1]
            rows["random"].append(last["test_random"]["accuracy"])
            rows["longtail"].append(last["test_longtail"]["accuracy"])
            rows["recall"].append(min(lowest_recall(test["confusion"]) for test in last.values()))
            lines = (base / "metrics.jsonl").read_text().splitlines()
            records = [record for record in map(json.loads, lines) if record["stage"] == "rl"]
            if records:
                last_tenth = records[-len(records) // 10 :]
                rows["reward"].append([r["reward"] for r in records])
                rows["entropy"].append(np.mean([r["entropy"] for r in last_tenth]))
                rows["no_signal"].append(np.mean([r["frac_zero_std"] for r in records]))
        results[name] = rows
    return results


def cell(values, sign=""):
    """Mean and standard deviation over seeds, for a table."""
    if not len(values):
        return "-"
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0
    return f"{np.mean(values):{sign}.3f} ± {deviation:.3f}"


def table(results, first):
    """The results as a Markdown table, mean ± standard deviation over seeds.

    All settings start from the same fine-tuned models, so the last column is paired: the difference
    to the first setting in mean accuracy over training, by seed.
    """
    head = ["", *COLUMNS.values(), "mean over training", f"its difference to {first}"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    of_first = np.array([np.mean(rewards) for rewards in results[first]["reward"]])
    for name, rows in results.items():
        over = np.array([np.mean(rewards) for rewards in rows["reward"]])
        difference = cell(over - of_first, "+") if len(over) and name != first else "-"
        cells = [name, *(cell(rows[column]) for column in COLUMNS), cell(over), difference]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results, path):
    """Sampled accuracy over training: mean over seeds in a moving window, and the band of one
    standard deviation.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, rows in results.items():
        if not rows["reward"]:
            continue
        rewards = np.array(rows["reward"])
        window = max(1, rewards.shape[1] // 15)
        kernel = np.ones(window) / window
        smooth = np.array([np.convolve(row, kernel, "valid") for row in rewards])
        steps = np.arange(smooth.shape[1]) + window
        mean = smooth.mean(0)
        band = smooth.std(0)
        axis.plot(steps, mean, label=name)
        axis.fill_between(steps, mean - band, mean + band, alpha=0.2)
    axis.set(xlabel="RL step", ylabel=f"accuracy of sampled answers (mean of {window} steps)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def main():
    """Run what is missing, then print and write the table and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="seeds trained at a time")
    args, flags = parser.parse_known_args()
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    run_all(args.jobs, [(one_seed, args.out, seed, threads, flags) for seed in args.seeds])
    results = read(args.out, args.seeds)
    lines = table(results, next(iter(SETTINGS)))
    (args.out / "balance.md").write_text(lines)
    draw(results, args.out / "balance.png")
    print(lines)


if __name__ == "__main__":
    main()
