"""Many processes that compute what one would; runs that outlive them.    (how does one run go on?)

`torchrun` starts one process (rank) for each GPU. Each takes its share of a batch; what is global
(losses, norms, metrics, the decision to stop) is summed or gathered: results do not depend on the
number of ranks beyond rounding. A training loop reads:

    ranks = Ranks()                                       # one process without torchrun
    policy = shard(policy, ranks, bf16=True)              # FSDP2: float32 weights, bf16 compute
    optimizer = torch.optim.AdamW(policy.parameters())
    run = Run("runs/x", settings, ranks)
    run.resume(policy, optimizer)                         # goes on where a former run was stopped
    for step in run.steps("train", 1000):
        batch = epoch_batch(records, 64, step, seed)
        mine = batch[ranks.share(len(batch))]
        for part in ranks.equalize(cut(mine), empty=[]):  # every rank has equally many
            policy(part).backward()                       # gradients are summed over ranks
        run.optimizer_step(loss, learning_rate(1e-4, step, 1000))
        run.log("metrics", {"step": step + 1, "loss": loss})

This file needs torch, numpy, safetensors and tqdm only; copy it alone.
"""

import fcntl
import json
import math
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

MAX_BAD_STEPS = 3  # in a row, not finite: they end the run
SAVE_SECONDS = 600  # between checkpoints, where no number of steps is given


class RunError(Exception):
    """A run that cannot begin or go on. The message says why, and what to do."""


class Stopped(Exception):  # noqa: N818 (it is no error)
    """The run was asked to stop, and has saved; or it is finished."""


def is_rank_0():
    """Whether this process speaks and writes for all."""
    return os.environ.get("RANK", "0") == "0"


def print0(text):
    """Print a line on rank 0 alone, above a progress bar."""
    if is_rank_0():
        tqdm.write(str(text))


def progress_bar(total, title, initial=0):
    """tqdm on rank 0; where the output is no terminal, a plain line every half minute."""
    plain = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}\n"
    settings = {} if sys.stderr.isatty() else {"bar_format": plain, "mininterval": 30}
    return tqdm(total=total, desc=title, initial=initial, disable=not is_rank_0(), **settings)


def launch(main, errors=()):
    """Call main() as the whole of a script; RunError, OSError and `errors` end it with one line."""
    try:
        main()
    except Stopped as stopped:
        print0(stopped)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from what is saved, if anything is")
    except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
        if not is_rank_0():
            time.sleep(5)  # rank 0 speaks first: torchrun ends the others as soon as one has left
        failures = getattr(error, "failures", {0: [error]})  # a checkpoint's, by rank
        cause = next(iter(failures.values()))[0]
        if not isinstance(cause, (RunError, OSError, FloatingPointError, SafetensorError, *errors)):
            raise
        sys.exit(str(cause))
    if dist.is_initialized():
        dist.destroy_process_group()


# Ranks --------------------------------------------------------------------------------------------


class Ranks:
    """This process among those that torchrun started: rank, world (their number), device.

    timeout_s: a collective that waits longer raises, which ends the job.
    """

    def __init__(self, timeout_s=1800):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        backend = "gloo"
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            # gloo beside nccl: small sums and gathers of CPU values do not wait for the GPU.
            backend = "cpu:gloo,cuda:nccl"
        options = {"timeout": timedelta(seconds=timeout_s)}
        if self.world == 1:  # FSDP wants a group, of one rank too
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        if not dist.is_initialized():
            dist.init_process_group(backend, **options)
        self.mesh = init_device_mesh(self.device.type, (self.world,))

    def share(self, count):
        """The slice of `count` things that this rank takes; sizes differ by at most one."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def equalize(self, micro_batches, empty):
        """This rank's micro-batches, and `empty` ones, whose loss is 0, until it has as many as the
        rank with most: FSDP gathers weights in each pass, so all must run equally many.
        """
        missing = max(self.gather(len(micro_batches))) - len(micro_batches)
        return [*micro_batches, *[empty] * missing]

    def gather(self, value):
        """The list of every rank's value."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def gather_rows(self, x):
        """Rows of every rank's tensor, rank by rank, on every rank."""
        return torch.cat(self.gather(x.cpu()))

    def barrier(self):
        """Wait until every rank is here."""
        self.gather(None)

    def sum(self, value):
        """Sum over the ranks of a number or a tensor, in the order of the ranks."""
        return sum(self.gather(value))


# Models -------------------------------------------------------------------------------------------


def chosen_bf16(choice, device, hidden_size):
    """The setting `bf16` as a bool. "auto": on CUDA, and CPUs that have it, for large products."""
    pays = device.type == "cuda" or (torch.cpu._is_avx512_bf16_supported() and hidden_size >= 512)
    return pays if choice == "auto" else choice == "1"


def shard(module, ranks, bf16=False):
    """Shard a module's float32 master weights over the ranks (FSDP2); returns it.

    module.model is a Hugging Face transformer, on rank 0 with its weights, on the others on meta.
    Gradients are summed over ranks. bf16: compute in bfloat16, reduce gradients in float32; one
    rank is a mesh of one, to compute what several do. In float32 it has the plain module.
    """
    if ranks.world == 1 and not bf16:
        return module.to(ranks.device)
    weights = module.state_dict() if ranks.rank == 0 else {}
    buffers = dict(module.named_buffers())
    module.to("meta")
    module.model.tie_weights()  # moving forgets which are the same
    dtype = torch.bfloat16 if bf16 else None
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in (*transformer_layers(module.model), module):
        fully_shard(block, mesh=ranks.mesh, mp_policy=precision)
        block.set_gradient_divide_factor(1.0)  # losses are divided by global counts
        block.set_force_sum_reduction_for_comms(True)
    module.to_empty(device=ranks.device)
    module.model.tie_weights()
    # Rank 0 sends one tensor after the other, of which each rank keeps its part.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(module, weights, options=options)
    for name, buffer in module.named_buffers():  # some, as rotary frequencies, no state dict holds
        if ranks.rank == 0:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
    return module


def transformer_layers(model):
    """The layers of a Hugging Face transformer: its longest list of modules."""
    return max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)


@torch.no_grad()
def sampling_copy(model, ranks, bf16=False):
    """A model as a rank needs it to sample, whole; one rank in float32 has the model itself. For
    all ranks to call.
    """
    if ranks.world == 1 and not bf16:
        return model
    with torch.device("meta"):
        copy = type(model)(model.config).eval().requires_grad_(False)
    if bf16:  # of parameters alone: rotary frequencies, buffers, would give other positions
        for p in copy.parameters():
            p.data = p.data.to(torch.bfloat16)
    copy.to_empty(device=ranks.device)
    copy.tie_weights()
    for ours, theirs in zip(copy.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)
    copy_weights(copy, model)
    return copy


@torch.no_grad()
def copy_weights(target, model):
    """Copy a model's weights into its sampling copy, tensor by tensor. Every rank must call it."""
    if target is model:
        return
    for ours, theirs in zip(target.parameters(), model.parameters(), strict=True):
        theirs = theirs.detach().to(ours.dtype)  # before the gathering: half the bytes
        ours.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)


@torch.no_grad()
def gather_model(model, ranks, dtype):
    """A whole copy of a model to save, in a dtype, on rank 0's host. Every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)  # empty but on rank 0
    with torch.device("meta"):
        whole = type(model)(model.config)
    if ranks.rank == 0:
        whole.load_state_dict(weights, assign=True)
        whole.tie_weights()
        for p in whole.parameters():
            p.data = p.data.to(dtype)
    return whole


# Training: batches, learning rate, the step loop --------------------------------------------------


def write_json(path, value, indent=1):
    """Write a file of JSON that is whole or not there."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def epoch_batch(records, size, step, *key):
    """The batch of a step (from 0): epochs of shuffles that depend on `key` alone."""
    batch = []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, len(records))
        if place == 0 or not batch:
            order = np.random.default_rng([*key, epoch]).permutation(len(records))
        batch.append(records[order[place]])
    return batch


def learning_rate(peak, step, steps, final=0.1):
    """Warm-up over the first 5 % of the steps, then a cosine from the peak to `final` of it."""
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step + 1 - warmup) / max(1, steps - warmup)
    cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
    return peak * (final + (1 - final) * cosine)


class Run:
    """The step loop of a run, its logs and checkpoints in a folder OUT. Stopped, it goes on.

    settings: kept as OUT/config.json; those in `free` may change when the run is taken up again.
    save_every: steps between checkpoints (0: ten minutes), beside the end of a stage, SIGTERM and
        SIGINT; keep: how many stay.
    Raises RunError for a folder of another run, or in use; Stopped for a finished run's.
    """

    STATE = ("stage", "step", "total_steps", "skipped", "bad_steps", "summary")  # of a checkpoint
    stage = ""
    step = 0  # of this stage, finished
    total_steps = 0  # of all stages, finished
    skipped = 0  # steps without an update
    bad_steps = 0  # of these, the last ones in a row
    status = ""  # shown behind the progress bar
    asked_to_stop = False

    def __init__(self, out, settings, ranks, free=(), save_every=0, keep=2):
        self.out = Path(out)
        self.ranks = ranks
        self.save_every = save_every
        self.keep = keep
        self.summary = {}  # anything that JSON holds
        self.saved_at = time.monotonic()
        if any(ranks.gather(ranks.rank == 0 and self._take_folder(settings, free))):
            (self.out / "lock").unlink(missing_ok=True)
            raise Stopped(f"--out {out}: holds this run, finished; to repeat it, choose another")

    def _take_folder(self, settings, free):
        """Lock OUT and write config.json; returns whether the run is finished."""
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "config.json"
        if not path.exists() and any(self.out.glob("*.jsonl")):
            raise RunError(f"--out {self.out}: holds other files; choose a new folder")
        self.lock = open(self.out / "lock", "w")  # noqa: SIM115 (kept until the process ends)
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"--out {self.out}: another run writes here; wait for its end") from None
        former = json.loads(path.read_text()) if path.exists() else settings
        for name in settings.keys() - set(free):
            if former.get(name) != settings[name]:
                what = f"holds a run with --{name} {former.get(name, '(none: of another program)')}"
                raise RunError(f"--out {self.out}: {what}; choose another folder")
        write_json(path, settings)
        return (self.out / "summary.json").exists()  # which is written last

    def resume(self, module, optimizer):
        """Take up the newest checkpoint, if there is one; from here on signals stop the run."""
        self.module = module
        self.optimizer = optimizer
        sizes = {}
        if checkpoints := self._checkpoints():
            newest = checkpoints[-1]
            dcp.load(self._tensors(), storage_reader=dcp.HuggingFaceStorageReader(str(newest)))
            state = json.loads((newest / "state.json").read_text())
            for name in self.STATE:
                setattr(self, name, state[name])
            sizes = state["logs"]
            print0(f"resumed {newest} at {self.stage} step {self.step}")
        if self.ranks.rank == 0:  # what came after the checkpoint is done again
            for path in self.out.glob("*.jsonl"):
                os.truncate(path, sizes.get(path.name, 0))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _checkpoints(self):
        return sorted((self.out / "checkpoints").glob("[0-9]*[0-9]"))

    def _tensors(self):
        """Weights and AdamW's moments by name. Missing moments are made."""
        tensors = {}
        for name, p in self.module.named_parameters():
            moments = self.optimizer.state[p]
            if not moments:
                zeros = torch.zeros_like(p)
                moments |= {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            for key, x in {"model": p.detach(), **moments}.items():
                tensors[f"{key}.{name}"] = x
        return tensors

    def save(self):
        """Write a checkpoint, each rank its parts; renamed when all of it is there."""
        folder = self.out / "checkpoints" / f"{self.total_steps:06d}"
        unfinished = folder.with_suffix(".unfinished")
        if self.ranks.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self.ranks.barrier()
        # Hugging Face's storage, safetensors: the default one keeps its index as a pickle.
        writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
        dcp.save(self._tensors(), storage_writer=writer)
        if self.ranks.rank == 0:
            state = {name: getattr(self, name) for name in self.STATE}
            state["logs"] = {path.name: path.stat().st_size for path in self.out.glob("*.jsonl")}
            write_json(unfinished / "state.json", state)
            os.replace(unfinished, folder)
            for old in self._checkpoints()[: -self.keep]:
                shutil.rmtree(old)
        self.ranks.barrier()
        self.saved_at = time.monotonic()

    def _on_signal(self, number, frame):
        self.asked_to_stop = True
        signal.signal(number, signal.SIG_DFL)
        print0("stopping after this step; the same signal again: at once, unsaved")

    def steps(self, stage, count):
        """Yield the steps of a stage that are still to do. Asked to stop, it raises Stopped."""
        if self.stage != stage:
            self.stage = stage
            self.step = 0
            self.optimizer.state.clear()  # a new stage has a fresh one
        with progress_bar(count, stage, self.step) as bar:
            while self.step < count:
                yield self.step
                self.step += 1
                self.total_steps += 1
                bar.set_postfix_str(self.status, refresh=False)
                bar.update()
                is_late = time.monotonic() - self.saved_at > SAVE_SECONDS
                if self.save_every:
                    is_late = self.step % self.save_every == 0
                # One rank's signal or clock decides for all: they save and leave together.
                stops, lates = zip(*self.ranks.gather((self.asked_to_stop, is_late)), strict=True)
                if any(stops) or any(lates) or self.step == count:
                    self.save()
                if any(stops):
                    raise Stopped(f"saved {stage} step {self.step}; the same command goes on")

    def optimizer_step(self, loss, lr, max_norm=1.0):
        """Clip the gradients and take an optimizer step; if the norm or the loss (of all ranks) is
        not finite, all ranks skip it. Returns the norm before clipping.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), max_norm)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if math.isfinite(loss) and math.isfinite(norm):
            self.bad_steps = 0
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        else:
            self.skipped += 1
            self.bad_steps += 1
        self.optimizer.zero_grad()
        if self.bad_steps >= MAX_BAD_STEPS:
            at = f"{self.stage} step {self.step + 1}: loss {loss}, gradient norm {norm}"
            raise RunError(f"{at}, {self.bad_steps} times in a row; lower the learning rate")
        return norm

    def log(self, name, record):
        """Append a record to OUT/NAME.jsonl."""
        if self.ranks.rank == 0:
            for key, x in record.items():
                if isinstance(x, float) and not math.isfinite(x):
                    record[key] = None  # JSON has no NaN
            with open(self.out / f"{name}.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def finish(self):
        """Write OUT/summary.json, and remove what only a run that goes on needs. On rank 0."""
        write_json(self.out / "summary.json", self.summary)
        shutil.rmtree(self.out / "checkpoints")
        (self.out / "lock").unlink()
