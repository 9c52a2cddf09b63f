"""train.py with faults, for the tests: `FAULTS='[...]' torchrun --max-restarts N tests/faulty.py ...`

FAULTS is a JSON list; each start of the job takes the next one (by torchrun's restart count), and none when they are used up.

    {"do": "kill", "in": "sample", "call": 3, "after": 0.02, "rank": 1}
        SIGKILL 0.02 seconds into rank 1's third sampling; "in" is sample, backward, save (tensors), complete or export
    do: kill, term, stop (a rank that hangs), raise, nan (in the gradient, at this call and, with "times", the following)

Each resumption appends to OUT.resumed how many finished lines of metrics.jsonl it does again.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import parallel
import rollout
import train

torch.set_num_threads(1)
PLACES = {
    "sample": (rollout, "sample"),
    "backward": (train.Run, "backward"),
    "save": (parallel, "save_tensors"),
    "complete": (parallel.Checkpoints, "_complete"),
    "export": (train.Run, "export"),
}


def inject(fault):
    """Let the fault happen in this process."""
    owner, name = PLACES[fault["in"]]
    original, calls = getattr(owner, name), []

    def signal_later(number):
        time.sleep(fault.get("after", 0))
        os.kill(os.getpid(), number)

    def faulty(*args, **kwargs):
        calls.append(1)
        hit = fault["call"] <= len(calls) < fault["call"] + fault.get("times", 1)
        signals = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
        if hit and fault["do"] in signals:
            threading.Thread(target=signal_later, args=[signals[fault["do"]]], daemon=True).start()
        if hit and fault["do"] == "raise":
            raise RuntimeError("injected")
        out = original(*args, **kwargs)
        if hit and fault["do"] == "nan":
            grad = next(args[0].model.parameters()).grad
            (grad.to_local() if parallel.is_sharded(grad) else grad).fill_(float("nan"))
        return out

    setattr(owner, name, faulty)


def count_lost():
    """Let each resumption note how many lines of metrics.jsonl it forgets."""
    original = train.Run.go_back

    def go_back(self, path, sizes):
        log = self.out / "metrics.jsonl"
        before = len(log.read_bytes().splitlines())
        original(self, path, sizes)
        with open(f"{self.out}.resumed", "a") as file:
            file.write(f"{before - len(log.read_bytes().splitlines())}\n")

    train.Run.go_back = go_back


if __name__ == "__main__":
    faults, attempt = json.loads(os.environ.get("FAULTS", "[]")), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if attempt < len(faults) and faults[attempt].get("rank", 0) == int(os.environ.get("RANK", 0)):
        inject(faults[attempt])
    count_lost()
    train.main()
