"""Kill a program at random moments, let it go on each time, and compare it with a run that was left alone.

    python tests/kill.py train --kills 30 --ranks 2        # some minutes; prints what was killed when, then the comparison
    python tests/kill.py distill --kills 30                # train: sampling, update, saving, evaluation, export
    python tests/kill.py score --kills 30                  # distill: teacher, student, saving, export, comparison

The kills fall in turn into these phases, at a random call and a random moment within it. Exits with 1 if a file of the result
differs from the undisturbed run's, if a step was done again that a checkpoint held (--save_every), or a batch of the teacher
or of score that was written.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from transformers.utils import logging as hf_logging

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import forked  # noqa: E402

import grm  # noqa: E402

NOTES = HERE.parent / "data" / "notes"
# Of each program: its phases, and about how many seconds each takes. Those that end the run are killed last.
PHASES = {
    "train": {"evaluate": 0.2, "sample": 0.08, "forward": 0.08, "save": 0.04},
    "distill": {"teacher": 0.005, "shard": 0.003, "student": 0.02, "save": 0.03},
    "score": {"judge": 0.03, "put": 0.001},
}
PHASES["train"] |= {"export": 0.02, "summary": 0.01}
PHASES["distill"] |= {"student export": 0.02, "compare": 0.1, "summary": 0.01}
LAST = ("export", "summary", "student export", "compare", "put")
EARLY = ("teacher", "shard")  # they begin it, and are killed first
FILES = {
    "train": ["metrics.jsonl", "summary.json", "model/model.safetensors", "sft/model.safetensors"],
    "distill": ["metrics.jsonl", "model/model.safetensors"],
    "score": ["."],
}


def plan(program, kills, ranks, seed):
    """The list of faults, for tests/faulty.py."""
    rng = random.Random(seed)
    phases = list(PHASES[program])
    chosen = [phases[i % len(phases)] for i in range(kills)]
    chosen.sort(key=lambda phase: (phase not in EARLY, phase in LAST))
    if program == "score":  # which is over when OUT is put in its place
        chosen = ["judge"] * (kills - 1) + ["put"]
    faults = []
    for phase in chosen:
        # On one rank alone, what rank 0 does alone; a call that every start reaches.
        on_rank_0 = phase in ("summary", "export", "student export", "shard")
        call = rng.randint(1, 3) if phase in ("sample", "forward", "student") else 1
        call += phase == "sample"  # the first is of the model's check
        fault = {"do": "kill", "in": phase, "call": call, "after": rng.uniform(0, PHASES[program][phase])}
        faults.append(fault | {"rank": 0 if on_rank_0 else rng.randrange(ranks)})
    return faults


def compare(program, folder, kills, ranks, seed, flags, save_every=None):
    """Both runs; a list of what is wrong."""
    faults, problems = plan(program, kills, ranks, seed), []
    flags = [*flags, *([f"--save_every={save_every}"] if save_every else [])]
    done = {}
    for name, its_faults in (("calm", []), ("killed", faults)):
        own = [f"--cache={folder / name}-labels"] if program == "distill" else []
        argv = [HERE / "faulty.py", program, *(["score"] if program == "score" else []), f"--out={folder / name}", *own, *flags]
        code, text, restarts = forked.run(argv, ranks, its_faults, restarts=len(its_faults))
        if code and not (folder / name).is_file():  # score's OUT is there: it was killed after all was done
            return [f"{name}: exit code {code}\n{text}"]
        done[name] = Counter((folder / f"{name}.units").read_text().split())
    for file in FILES[program]:
        if (folder / "calm" / file).read_bytes() != (folder / "killed" / file).read_bytes():
            problems.append(f"{file}: differs")
    for i, fault in enumerate(faults):
        print(f"kill {i + 1}: rank {fault['rank']}, {fault['in']} call {fault['call']}, {fault['after'] * 1000:.0f} ms into it")
    print(f"started again {restarts} times")
    if restarts < kills / 2:  # the last may wait for a phase that is over
        problems.append(f"only {restarts} of {kills} kills happened")
    print(f"finished calls on rank 0, undisturbed: {dict(done['calm'])}; with {kills} kills: {dict(done['killed'])}")
    bounds = {"update": (save_every or 1), "teacher": 1, "judge": 1 if program == "score" else 99}
    for unit, bound in bounds.items():
        if done["killed"][unit] - done["calm"][unit] > kills * bound:
            problems.append(f"{unit}: more than {bound} done again for each kill")
    return problems


def make_task(folder):
    """The embedded task cut to 24 records a file and to its label, so that answers are short."""
    shutil.copytree(NOTES, folder, ignore=shutil.ignore_patterns("make.py", "__pycache__", "unlabelled.jsonl"))
    criteria = (NOTES / "criteria.md").read_text().split("---")
    front = [line for line in criteria[1].splitlines() if not line.startswith(("steps", "format"))]
    criteria[1] = "\n".join([*front, "steps: []", "format: answer-first", ""])
    (folder / "criteria.md").write_text("---".join(criteria))
    for path in folder.glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()[:24]]
        for record in records:
            record.pop("step_labels", None)
            if "response" in record:
                record["response"] = record["response"][record["response"].rindex("\\boxed") :]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "train.json").write_text('{"max_new_tokens": 8}')
    (folder / "distill.json").write_text('{"max_new_tokens": 8, "steps": 40, "batch": 8}')
    hf_logging.disable_progress_bar()
    for part in grm.load_model(str(folder / "model"), seed=1):
        part.save_pretrained(folder / "trained")
    return folder


def flags_of(program, task):
    """What each program is run with."""
    if program == "train":
        steps = ["--sft_steps=30", "--sft_batch=8", "--sft_lr=3e-3", "--rl_steps=30", "--eval_every=7"]
        return [f"--task={task}", *steps, "--prompts_per_step=4", "--group_size=4", "--lr=3e-4"]
    if program == "distill":
        return [f"--task={task}", f"--teacher={task / 'trained'}"]
    shutil.copy(task / "train.jsonl", task / "pairs.jsonl")
    files = [f"--task={task}", f"--model={task / 'trained'}", f"--pairs={task / 'pairs.jsonl'}"]
    return [*files, "--batch_size=1", "--max_new_tokens=8"]


def main():
    """Kill, compare, say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=list(PHASES))
    for name, default in {"kills": 20, "ranks": 1, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = flags_of(args.program, make_task(Path(folder) / "task"))
        save_every = None if args.program == "score" else 2
        problems = compare(args.program, Path(folder), args.kills, args.ranks, args.seed, flags, save_every)
    sys.exit("\n".join(problems) or print("the files are those of the run that was left alone"))


if __name__ == "__main__":
    main()
