"""torchrun in the tests: its ranks are forked from a process that has imported everything, 50 ms instead of 5 s each."""

import json
import multiprocessing
import os
import resource
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
context = multiprocessing.get_context("forkserver")


def rank(argv, environment, output, file_limit):
    """One rank: a script from its first line, with what it prints in a file."""
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        setattr(sys, ("stdout", "stderr")[stream - 1], os.fdopen(stream, "w", buffering=1, closefd=False))
    sys.argv = list(map(str, argv))
    runpy.run_path(sys.argv[0], run_name="__main__")


def run(argv, ranks=1, faults=(), restarts=0, file_limit=None):
    """`torchrun --nproc-per-node RANKS --max-restarts RESTARTS ARGV`, with faults (tests/faulty.py): its exit code, what it
    printed, and how often it started again."""
    os.environ |= {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    context.set_forkserver_preload(["train", "distill", "matplotlib.pyplot"])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        for attempt in range(restarts + 1):
            environment = {"FAULTS": json.dumps(faults), "TORCHELASTIC_RESTART_COUNT": str(attempt), "OMP_NUM_THREADS": "1"}
            code = _start(argv, ranks, environment, output, file_limit)
            if not code:
                break
        return code, output.read_text() if output.exists() else "", attempt


def _start(argv, ranks, environment, output, file_limit):
    """One start of all ranks; 0, or the code of the first that failed: the others are killed then."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    processes = []
    for number in range(ranks):
        own = environment | {"RANK": str(number), "LOCAL_RANK": str(number)}
        processes.append(context.Process(target=rank, args=(argv, own, output, file_limit)))
        processes[-1].start()
    deadline = time.monotonic() + 240
    while any(process.exitcode is None for process in processes):
        time.sleep(0.02)
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            break
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    for process in processes:
        if process.exitcode is None:
            code = code or "timeout"
            process.kill()
        process.join()
    return code
