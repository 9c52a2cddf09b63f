"""A table of distillation losses on the embedded task.

    python docs/distillation.py --teacher runs/notes/model --out runs/losses

Two students: the classifier of data/notes/student, and a causal Qwen3 of a quarter of the teacher's
size (made here), which gives the label first or reasons like the teacher. Runs that are done are
not done again. Writes OUT/table.md; about an hour on 2 CPU cores.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CAUSAL = ["--student", "OUT/causal", "--steps", 3000, "--lr", 2e-3]
# From the student of forward KL.
AFTER = ["--student", "OUT/forward/model", "--steps", 500, "--lr", 3e-4]
RUNS = {  # name: (what it is, flags)
    "gold": ("classifier, gold labels alone (4,500 pairs)", ["--loss", "gold"]),
    "label": ("classifier, label KL + 0.1 gold (the default)", []),
    "label-only": ("classifier, label KL alone", ["--gold_weight", 0]),
    "label-t2": ("classifier, label KL at temperature 2 + 0.1 gold", ["--temperature", 2]),
    "causal-gold": ("causal, label first, gold labels alone", [*CAUSAL, "--loss", "gold"]),
    "causal-label": ("causal, label first, label KL + 0.1 gold", CAUSAL),
    "forward": ("causal, reasons, forward KL", [*CAUSAL, "--loss", "forward"]),
    "reverse": ("causal, reasons, reverse KL", [*CAUSAL, "--loss", "reverse"]),
    "js": ("causal, reasons, Jensen-Shannon", [*CAUSAL, "--loss", "js"]),
    "on-js": ("forward KL, then on-policy Jensen-Shannon", [*AFTER, "--loss", "js", "--on_policy"]),
}


def make_causal(folder):
    """A folder with the teacher's tokenizer and a Qwen3 of 3 layers of 64, without weights."""
    shutil.copytree(ROOT / "data/notes/model", folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
    path.write_text(json.dumps(config, indent=1))


def distil(args, name, flags):
    """One run into OUT/name, unless it is done; returns its student's metrics."""
    out = args.out / name
    if not (out / "summary.json").exists():
        command = [sys.executable, ROOT / "distill.py", "--task", ROOT / "data/notes"]
        command += ["--teacher", args.teacher, "--out", out]
        command += [str(flag).replace("OUT", str(args.out)) for flag in flags]
        with open(f"{out}.log", "w") as log:
            if subprocess.run(list(map(str, command)), stdout=log, stderr=log).returncode:
                sys.exit(f"{out}: failed, see {out}.log")
    return json.loads((out / "summary.json").read_text())["student"]


def main():
    """Run what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "causal").exists():
        make_causal(args.out / "causal")
    lines = ["| student and loss | test_random | test_longtail | calibration error |"]
    lines.append("|---" * 4 + "|")
    for name, (what, flags) in RUNS.items():
        scores = distil(args, name, flags)
        test = scores["test_random"]
        ece = test.get("ece", np.nan)  # of well-formed answers, if there is one
        numbers = [test["accuracy"], scores["test_longtail"]["accuracy"], ece]
        cells = " | ".join(f"{x:.3f}" for x in numbers)
        lines.append(f"| {what} | {cells} |")
        print(lines[-1], flush=True)
    (args.out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
