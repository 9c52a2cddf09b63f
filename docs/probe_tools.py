"""What probe.py needs: any judge, the figures of a probe and their picture.

A classifier's folder is read as CrossEncoder reads it; the sigmoid of a single output is the grade.
Shapes: N pairs, B places (one, if nothing slides), Y labels, Q queries, D draws of the bootstrap.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import score
import torch
from matplotlib.figure import Figure
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
import grm

DRAWS, SHUFFLES = 1000, 200


def load(folder, task, records):
    """(judge for `predict`, tokenizer, tokens that query and document may have).

    Labels of a classifier that are not the task's are graded by their numbers, or their order.
    """
    if not Path(folder, "config.json").is_file():
        raise grm.TaskError(f"--model {folder}: is no folder with a config.json")
    config = AutoConfig.from_pretrained(folder)
    if not str(config.architectures).endswith("ForSequenceClassification']"):
        renderer, engine = grm.load_judge(folder, task.folder)
        score.check_records(renderer, engine, records)
        room = renderer.max_prompt_tokens - len(renderer.prompt("", ""))
        return (renderer, engine), renderer.tokenizer, room
    labels = [str(label) for _, label in sorted(config.id2label.items())]
    model, tokenizer = grm.load_model(folder, labels=labels)
    grm.check_words(tokenizer, records)
    order = task.labels if set(labels) == set(task.labels) else labels
    form = replace(task, labels=order if len(order) > 1 else ["0", "1"])
    judge = distill.ClassifierStudent(distill.Config(student=folder), form, model, tokenizer)
    judge.columns = [labels.index(label) for label in order]
    judge.tokenizer.split_special_tokens = tokenizer.split_special_tokens  # as it is served
    room = judge.max_length - tokenizer.num_special_tokens_to_add(pair=True)
    return judge, judge.tokenizer, room


@torch.no_grad()
def predict(judge, records):
    """Predictions, as grm.metrics takes them, of (renderer, engine) or a ClassifierStudent."""
    if isinstance(judge, tuple):
        return grm.judge(*judge, records, explain=False)
    logits = [judge.label_logits(records[part]) for part in judge.micro_batches(records)]
    logits_NY = torch.cat(logits)[:, judge.columns]
    if logits_NY.shape[1] == 1:  # beside a zero, the softmax of one output is its sigmoid
        logits_NY = torch.nn.functional.pad(logits_NY, (1, 0))
    return grm.predictions_of(judge.task, logits_NY)


def count(tokenizer, text):
    """Tokens of a text."""
    settings = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    return len(tokenizer(text, **settings).input_ids)


def psi(right_NB):
    """Position sensitivity: 1 - min / max of the places' means."""
    means_B = right_NB.mean(0)
    return 1 - means_B.min() / max(means_B.max(), 1e-9)


def shuffled(right_NB, position_NB, rng):
    """Right labels with each pair's texts at each other's places; equal texts stay together."""
    rows = []
    for right_B, position_B in zip(right_NB, position_NB, strict=True):
        _, first, text_B = np.unique(position_B, return_index=True, return_inverse=True)
        rows.append(rng.permutation(right_B[first])[text_B])
    return np.array(rows)


def figures(changes_NB4, queries):
    """What a probe changes: means of flips and shifts, each with its 95 % interval, bootstrapped
    over queries; by place the share of right labels and the mean position; PSI, and that of noise:
    places shuffled within pairs.

    changes: whether the label flips, the grade's shift, whether the label is right, the position.
    """
    rng = np.random.default_rng(0)
    query_N = np.unique(list(map(str, queries)), return_inverse=True)[1]
    Q = query_N.max() + 1
    weights_DN = rng.multinomial(Q, [1 / Q] * Q, size=DRAWS)[:, query_N]
    means_D4 = weights_DN @ changes_NB4.mean(1) / weights_DN.sum(1, keepdims=True)
    bounds_24 = np.percentile(means_D4, [2.5, 97.5], axis=0)
    flips, shift, _, _ = np.stack([changes_NB4.mean((0, 1)), *bounds_24], axis=1).tolist()
    row = {"pairs": len(changes_NB4), "flips": flips, "shift": shift}
    if changes_NB4.shape[1] == 1:
        return row
    right_NB, position_NB = changes_NB4[:, :, 2], changes_NB4[:, :, 3]
    row["quality"] = right_NB.mean(0).tolist()
    row["position"] = position_NB.mean(0).tolist()
    row["psi"] = psi(right_NB)
    noise = [psi(shuffled(right_NB, position_NB, rng)) for _ in range(SHUFFLES)]
    return row | {"psi_shuffled": float(np.mean(noise))}


def print_table(result):
    """A line a probe: mean [interval] of flips and shift, PSI."""
    print(f"{result['model']}: {result['pairs']} pairs, quality {result['quality']:.3f}")
    print(f"{'':<18}{'pairs':>5}{'flips':>21}{'malformed':>10}{'shift of the grade':>24}", end="")
    print(f"{'PSI':>6}{'shuffled':>9}")
    for name, row in result["probes"].items():
        if "skipped" in row:
            print(f"{name:<18} skipped: {row['skipped']}")
            continue
        flips, shift = ("{:.3f} [{:.3f}, {:.3f}]".format(*row[key]) for key in ("flips", "shift"))
        line = f"{name:<18}{row['pairs']:>5}{flips:>21}{row['malformed']:>10.3f}{shift:>24}"
        if "psi" in row:
            line += f"{row['psi']:>6.2f}{row['psi_shuffled']:>9.2f}"
        print(line)


def draw(result, path):
    """Left: the shift of each probe, and its flips; right: quality by position, a line a length."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = []
    for y, (name, row) in enumerate(result["probes"].items()):
        if "skipped" in row:
            names.append(name)
            left.text(0, y, " skipped", va="center", color="grey")
            continue
        names.append(f"{name} ({row['flips'][0]:.0%})")
        mean, low, high = row["shift"]
        left.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3, color="C0")
        if "psi" in row:
            label = f"{name}: PSI {row['psi']:.2f} (shuffled {row['psi_shuffled']:.2f})"
            right.plot(row["position"], row["quality"], "o-", ms=4, label=label)
    left.axvline(0, color="grey", lw=1)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_title("Edits that must not move the grade (labels that flip)")
    left.set_xlabel("shift of the expected grade, with its 95 % interval")
    right.axhline(result["quality"], color="grey", ls="--", label="without filler")
    right.set(xlim=(0, 1), ylim=(0, 1.05), ylabel="share of right labels")
    right.set_title("The document slid through neutral filler")
    right.set_xlabel("position: the document's midpoint by the text's length")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.suptitle(f"{result['model']}, {result['pairs']} pairs")
    figure.savefig(path, dpi=110)
