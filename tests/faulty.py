"""A program of this project with faults, for the tests: `FAULTS='[...]' torchrun --max-restarts N tests/faulty.py train ...`

FAULTS is a JSON list; each start of the job takes the next one (by torchrun's restart count), and none when they are used up.

    {"do": "kill", "in": "sample", "call": 3, "after": 0.02, "rank": 1}
        SIGKILL 0.02 seconds into rank 1's third sampling; "in" is one of PLACES
    do: kill, term, stop (a rank that hangs), raise, nan (in the gradient, at this call and, with "times", the following)

Each finished call of what takes a program long (UNITS) appends its name to OUT.units.
"""

import json
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import distill
import grm
import parallel
import rollout
import train

torch.set_num_threads(1)
distill.SHARD = 2  # so that a small task has many
score = runpy.run_path(str(Path(grm.__file__).parent / "docs" / "score.py"))
PROGRAMS = {"train": train.main, "distill": distill.main, "score": score["main"]}
PLACES = {
    "sample": (rollout, "sample"),
    "forward": (rollout.Policy, "forward"),  # the backward pass and the update follow
    "update": (parallel.Run, "optimizer_step"),
    "save": (parallel.Run, "save"),
    "evaluate": (grm, "judge"),
    "export": (train, "export"),
    "teacher": (distill.Teacher, "grade"),
    "shard": (parallel, "write_json"),
    "student": (distill.LabelStudent, "forward"),
    "compare": (distill.LabelStudent, "predict"),
    "student export": (distill.LabelStudent, "save"),
    "judge": (grm, "judge"),
    "put": (os, "replace"),
    "summary": (parallel.Run, "finish"),
}
UNITS = ("update", "teacher", "judge")
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}


def inject(fault):
    """Let the fault happen in this process."""
    owner, name = PLACES[fault["in"]]
    original, calls = getattr(owner, name), []

    def faulty(*args, **kwargs):
        calls.append(1)
        if fault["call"] <= len(calls) < fault["call"] + fault.get("times", 1):
            if fault["do"] == "raise":
                raise RuntimeError("injected")
            if fault["do"] == "nan":
                grad = next(args[0].module.parameters()).grad
                getattr(grad, "_local_tensor", grad).fill_(float("nan"))
            elif "after" in fault:
                threading.Timer(fault["after"], os.kill, [os.getpid(), SIGNALS[fault["do"]]]).start()
            else:
                os.kill(os.getpid(), SIGNALS[fault["do"]])
        return original(*args, **kwargs)

    setattr(owner, name, faulty)


def count(unit, path):
    """Let each call note that it is done."""
    owner, name = PLACES[unit]
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        result = original(*args, **kwargs)
        with open(path, "a") as file:
            file.write(f"{unit}\n")
        return result

    setattr(owner, name, counted)


if __name__ == "__main__":
    program = PROGRAMS[sys.argv.pop(1)]
    faults, attempt = json.loads(os.environ.get("FAULTS", "[]")), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    out = next(flag for flag in sys.argv if flag.startswith("--out=")).removeprefix("--out=")
    if os.environ.get("RANK", "0") == "0":
        for unit in UNITS:
            count(unit, f"{out}.units")
    if attempt < len(faults) and faults[attempt].get("rank", 0) == int(os.environ.get("RANK", 0)):
        inject(faults[attempt])
    parallel.launch(program, errors=(grm.TaskError,))
