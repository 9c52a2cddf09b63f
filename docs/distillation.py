"""The README's table of distillation losses on the embedded task.

    python docs/distillation.py --teacher runs/notes/model --out runs/losses        # about an hour on 2 CPU cores

Two students: the classifier of data/notes/student, and a causal Qwen3 of a quarter of the teacher's size (made here), which
gives the label first or reasons like the teacher. Runs that are done are not done again. Writes OUT/table.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CAUSAL = ["--student", "CAUSAL", "--steps", 3000, "--lr", 2e-3]
FURTHER = ["--student", "OUT/forward/model", "--steps", 500, "--lr", 3e-4]  # from the student of forward KL
RUNS = {  # name: (what it is, flags)
    "gold": ("classifier, gold labels alone (4,500 pairs)", ["--loss", "gold"]),
    "label": ("classifier, label KL + 0.1 gold (the default)", []),
    "label-only": ("classifier, label KL alone", ["--gold_weight", 0]),
    "label-half": ("classifier, label KL + 0.5 gold", ["--gold_weight", 0.5]),
    "label-t2": ("classifier, label KL at temperature 2 + 0.1 gold", ["--temperature", 2]),
    "causal-gold": ("causal, label first, gold labels alone", [*CAUSAL, "--loss", "gold"]),
    "causal-label": ("causal, label first, label KL + 0.1 gold", CAUSAL),
    "forward": ("causal, reasons, forward KL", [*CAUSAL, "--loss", "forward"]),
    "reverse": ("causal, reasons, reverse KL", [*CAUSAL, "--loss", "reverse"]),
    "js": ("causal, reasons, Jensen-Shannon", [*CAUSAL, "--loss", "js"]),
    "on-js": ("forward KL, then on-policy Jensen-Shannon", [*FURTHER, "--loss", "js", "--on_policy", 1]),
    "on-reverse": ("forward KL, then on-policy reverse KL", [*FURTHER, "--loss", "reverse", "--on_policy", 1]),
    "off-js": ("forward KL, then as long off-policy Jensen-Shannon", [*FURTHER, "--loss", "js"]),
}


def make_causal(out):
    """A folder with the teacher's tokenizer and a Qwen3 of 3 layers of 64, without weights."""
    folder = out / "causal"
    if not folder.exists():
        shutil.copytree(ROOT / "data" / "notes" / "model", folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
        (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def main():
    """Run what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    causal = make_causal(args.out)
    lines = ["| student and loss | test_random | test_longtail | calibration error | ms a pair (64) |", "|---|---|---|---|---|"]
    for name, (what, flags) in RUNS.items():
        out = args.out / name
        if not (out / "summary.json").exists():
            shutil.rmtree(out, ignore_errors=True)
            flags = [str(flag).replace("CAUSAL", str(causal)).replace("OUT", str(args.out)) for flag in flags]
            command = [sys.executable, ROOT / "distill.py", "--teacher", args.teacher, "--task", ROOT / "data" / "notes"]
            with open(f"{out}.log", "w") as log:
                code = subprocess.run([*map(str, command), "--out", str(out), *flags], stdout=log, stderr=log).returncode
            if code:
                sys.exit(f"{out}: failed, see {out}.log")
        summary = json.loads((out / "summary.json").read_text())
        tests, ms = summary["student"]["tests"], summary["student"]["ms_per_pair_batch_64"]
        cells = [f"{tests[test]['accuracy']:.3f}" for test in ("test_random", "test_longtail")]
        lines.append(f"| {what} | {' | '.join(cells)} | {tests['test_random']['ece']:.3f} | {ms:.3f} |")
        print(lines[-1], flush=True)
    (args.out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
