"""train.py with faults, for the tests: `FAULTS='[...]' torchrun --max-restarts N tests/faulty.py ...`

FAULTS is a JSON list; each start of the job takes the next one (by torchrun's restart count), and none when they are used up.

    {"do": "kill", "in": "sample", "call": 3, "after": 0.02, "rank": 1}
        SIGKILL 0.02 seconds into rank 1's third sampling; "in" is one of PLACES
    do: kill, term, stop (a rank that hangs), raise, nan (in the gradient, at this call and, with "times", the following)

Each restart appends to OUT.resumed how many finished lines of metrics.jsonl it does again.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grm
import parallel
import rollout
import train

torch.set_num_threads(1)
PLACES = {
    "sample": (rollout, "sample"),
    "forward": (rollout.Policy, "forward"),  # the backward pass and the update follow
    "update": (parallel.Progress, "optimizer_step"),
    "save": (parallel, "save_tensors"),
    "complete": (parallel.Checkpoints, "_complete"),
    "export": (train, "export"),
}
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
                grad = next(args[1].parameters()).grad
                (grad.to_local() if parallel.is_sharded(grad) else grad).fill_(float("nan"))
            elif "after" in fault:
                threading.Timer(fault["after"], os.kill, [os.getpid(), SIGNALS[fault["do"]]]).start()
            else:
                os.kill(os.getpid(), SIGNALS[fault["do"]])
        return original(*args, **kwargs)

    setattr(owner, name, faulty)


def count_lost():
    """Let each restart note how many lines of metrics.jsonl it forgets."""
    original = parallel.Progress._truncate_logs

    def truncate_logs(self, sizes):
        log = self.out / "metrics.jsonl"
        before = log.read_bytes() if log.exists() else None
        original(self, sizes)
        if before is not None:
            with open(f"{self.out}.resumed", "a") as file:
                file.write(f"{len(before.splitlines()) - len(log.read_bytes().splitlines())}\n")

    parallel.Progress._truncate_logs = truncate_logs


if __name__ == "__main__":
    faults, attempt = json.loads(os.environ.get("FAULTS", "[]")), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if attempt < len(faults) and faults[attempt].get("rank", 0) == int(os.environ.get("RANK", 0)):
        inject(faults[attempt])
    count_lost()
    parallel.launch(train.main, errors=(grm.TaskError,))
