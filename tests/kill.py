"""Kill a training run at random moments, let it resume each time, and compare it with a run that was left alone.

    python tests/kill.py --kills 20 --ranks 2          # some minutes; prints what was killed when, then the comparison

The kills fall in turn into sampling, update, and the writing of a checkpoint's tensors and of its state, at a random call
and a random moment within it; the last one into the export. `torchrun --max-restarts` picks the run up. Exits with 1 if
metrics.jsonl or summary.json differ from the undisturbed run's, or if a restart lost more finished steps than --save_every.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PHASES = {"sample": 0.08, "forward": 0.08, "save": 0.03, "complete": 0.01}  # and about how many seconds each takes


def plan(kills, ranks, seed):
    """The list of faults, for tests/faulty.py."""
    rng, out = random.Random(seed), []
    for i in range(kills - 1):
        phase = list(PHASES)[i % len(PHASES)]
        rank = 0 if phase == "complete" else rng.randrange(ranks)
        call = rng.randint(1, 3) if phase in ("sample", "forward") else rng.randint(1, 2)
        out.append({"do": "kill", "in": phase, "call": call, "after": rng.uniform(0, PHASES[phase]), "rank": rank})
    return [*out, {"do": "kill", "in": "export", "call": 1, "after": 0.005, "rank": 0}]


def run(out, faults, ranks, flags):
    """One run to its end, restarted after each fault; returns torchrun's exit code and output."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--max-restarts={len(faults)}"]
    command += ["--monitor-interval=0.1", HERE / "faulty.py", "--out", out, *flags]
    environment = {**os.environ, "FAULTS": json.dumps(faults), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def compare(folder, kills, ranks, seed, flags, save_every):
    """Both runs; a list of what is wrong."""
    flags = [*flags, "--save_every", save_every]
    faults, problems = plan(kills, ranks, seed), []
    for out, its_faults in (("calm", []), ("killed", faults)):
        code, text = run(folder / out, its_faults, ranks, flags)
        if code:
            return [f"{out}: exit code {code}\n{text}"]
    for name in ("metrics.jsonl", "summary.json"):
        if (folder / "calm" / name).read_bytes() != (folder / "killed" / name).read_bytes():
            problems.append(f"{name}: differs")
    lost = [int(line) for line in (folder / "killed.resumed").read_text().split()]
    for i, fault in enumerate(faults):
        print(f"kill {i + 1}: rank {fault['rank']}, {fault['in']} call {fault['call']}, {fault['after'] * 1000:.0f} ms into it")
    print(f"started again {len(lost)} times; finished steps done again: {lost}")
    if len(lost) < kills:
        problems.append(f"only {len(lost)} of {kills} kills happened")
    return problems + [f"{steps} finished steps lost" for steps in lost if steps > save_every]


def main():
    """Kill, compare, say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"kills": 20, "ranks": 1, "seed": 0, "save_every": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args, flags = parser.parse_known_args()
    small = ["--task", HERE.parent / "data" / "notes", "--sft_steps", 30, "--rl_steps", 30, "--eval_every", 0, "--sft_batch", 8]
    small += ["--prompts_per_step", 4, "--group_size", 4]
    with tempfile.TemporaryDirectory() as folder:
        problems = compare(Path(folder), args.kills, args.ranks, args.seed, [*small, *flags], args.save_every)
    sys.exit("\n".join(problems) or print("metrics.jsonl and summary.json are those of the run that was left alone"))


if __name__ == "__main__":
    main()
