"""Many processes that compute what one would; runs that outlive them.    (how does one run go on?)

`torchrun` starts one process (rank) for each GPU. Each takes its share of a batch; what is global
(losses, norms, metrics, the decision to stop) is summed or gathered, so results do not depend on
the number of ranks beyond rounding. A training loop reads:

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

This file needs torch, numpy and tqdm only; copy it alone.
"""

import contextlib
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
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from tqdm import tqdm

SAVE_SECONDS = 600  # between checkpoints, where no number of steps is given


class RunError(Exception):
    """A run that cannot begin or go on. The message says why, and what to do."""


class Stopped(Exception):  # noqa: N818 (it is no error)
    """The run was asked to stop, and has saved."""


IS_RANK_0 = os.environ.get("RANK", "0") == "0"  # which speaks and writes for all


def print0(text):
    """Print a line on rank 0 alone, above a progress bar."""
    if IS_RANK_0:
        tqdm.write(str(text))


def progress_bar(total, title, done=0):
    """tqdm on rank 0; where the output is no terminal, a plain line every half minute."""
    plain = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}\n"
    settings = {} if sys.stderr.isatty() else {"bar_format": plain, "mininterval": 30}
    return tqdm(total=total, desc=title, initial=done, disable=not IS_RANK_0, **settings)


def launch(main, errors=()):
    """Call main() as the whole of a script; what a user can mend ends it with one line.

    errors: further exceptions, beside RunError and OSError, of which the message says it all.
    """
    try:
        main()
    except Stopped as stopped:
        print0(stopped)
    except (RunError, OSError, dcp.CheckpointException, *errors) as error:
        for cause, _ in getattr(error, "failures", {}).values():  # of a checkpoint, by rank
            error = cause
        if not IS_RANK_0:
            time.sleep(5)  # rank 0 speaks first: torchrun ends the others as soon as one has left
        sys.exit(str(error))
    if dist.is_initialized():
        dist.destroy_process_group()


# Ranks --------------------------------------------------------------------------------------------


class Ranks:
    """This process among those that torchrun started: rank, world (their number), device.

    timeout_s: a collective that waits longer for another rank raises, which ends the job.
    sampling_shards: 1, each rank samples for itself; or all ranks, which then sample together, each
        with a part of the weights. Raises RunError for another number.
    """

    def __init__(self, timeout_s=1800, sampling_shards=1):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.sampling_shards = sampling_shards
        if sampling_shards not in (1, self.world):
            raise RunError(f"--sampling_shards: 1, or all {self.world} ranks")
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

    def sampling_share(self, count):
        """The slice of `count` things that this rank samples for: its share, or all together."""
        return self.share(count) if self.sampling_shards == 1 else slice(0, count)

    def equalize(self, micro_batches, empty):
        """This rank's micro-batches, and `empty` ones until it has as many as the rank with most.

        FSDP gathers weights in each forward and backward pass, so all ranks must run equally many.
        A module called with an empty one runs a dummy whose loss is 0: rollout.Tree of no prompts.
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
        """Rows of every rank's tensor or list, rank by rank, on every rank."""
        if isinstance(x, list):
            return [row for rows in self.gather(x) for row in rows]
        return torch.cat(self.gather(x.cpu()))

    def barrier(self):
        """Wait until every rank is here."""
        self.gather(None)

    def sum(self, value):
        """Sum over the ranks, in their order, of a number, or of each number in a dict."""
        values = self.gather(value)
        if isinstance(value, dict):
            return {name: sum(other[name] for other in values) for name in value}
        return sum(values)


# Models -------------------------------------------------------------------------------------------


def chosen_bf16(choice, device, hidden_size):
    """The setting `bf16` as a bool: "1", "0", or "auto" for where it pays: on CUDA, and on CPUs
    that multiply bfloat16 matrices (AMX) where the products are large enough.
    """
    if choice != "auto":
        return choice == "1"
    has_amx = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" or (has_amx and hidden_size >= 512)


def shard(module, ranks, bf16=False):
    """Shard a module's float32 master weights over the ranks (FSDP2); returns it.

    module.model is a Hugging Face transformer: on rank 0 with its weights, on the others on meta.
    Call the module as usual: FSDP gathers the weights of head and embedding around its forward and
    backward, and those of each layer around the layer. Gradients are summed over ranks.
    bf16: compute in bfloat16, reduce gradients in float32. For that a single rank is a mesh of one,
    so that it computes what several do; in float32 it has the plain module.
    """
    if ranks.world == 1 and not bf16:
        return module.to(ranks.device)
    weights = module.state_dict() if ranks.rank == 0 else {}
    buffers = dict(module.named_buffers())
    module.to("meta")
    module.model.tie_weights()  # moving forgets which are the same
    compute_dtype = torch.bfloat16 if bf16 else None
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for block in (*transformer_layers(module.model), module):
        fully_shard(block, mesh=ranks.mesh, mp_policy=precision)
        # Losses are divided by global counts, so gradients are summed.
        block.set_gradient_divide_factor(1.0)
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


# Tensor parallelism (arXiv 1909.08053): a rank has some of the heads, and of the MLP's neurons.
CUT = {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
CUT |= {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
CUT |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}


@torch.no_grad()
def sampling_copy(model, ranks, bf16=False):
    """A model, sharded or not, as a rank needs it to sample: whole or, with sampling_shards, cut.

    In bfloat16 if `bf16`; embedding and head are always whole. The model itself, where it is so
    already: one rank in float32. Every rank must call it. Raises RunError for what cannot be cut.
    """
    if ranks.world == 1 and not bf16:
        return model
    copy = _skeleton(model)
    config = model.config
    if ranks.sampling_shards > 1:
        known = config.model_type in ("qwen3", "qwen2", "llama")
        if not known or config.num_key_value_heads % ranks.world:
            raise RunError(
                f"--sampling_shards {ranks.world}: cuts qwen3, qwen2 and llama models by their "
                f"key-value heads; this is {config.model_type} with {config.num_key_value_heads}"
            )
        for layer in transformer_layers(copy):
            parallelize_module(layer, ranks.mesh, CUT)
    if bf16:  # of parameters alone: rotary frequencies, buffers, would give other positions
        for p in copy.parameters():
            p.data = p.data.to(torch.bfloat16)
    copy.to_empty(device=ranks.device)
    copy.tie_weights()
    for ours, theirs in zip(copy.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)
    copy_weights(copy, model)
    return copy


def _skeleton(model):
    """The same transformer on meta, without weights."""
    with torch.device("meta"):
        return type(model)(model.config).eval().requires_grad_(False)


@torch.no_grad()
def copy_weights(target, model):
    """Copy a model's weights, sharded or not, into its sampling copy. Every rank must call it.

    One tensor after the other is gathered: no rank ever holds more than one beside its parts.
    """
    if target is model:
        return
    for ours, theirs in zip(target.parameters(), model.parameters(), strict=True):
        theirs = theirs.detach().to(ours.dtype)  # before the gathering: half the bytes
        whole = theirs.full_tensor() if isinstance(theirs, DTensor) else theirs
        if isinstance(ours, DTensor):
            whole = distribute_tensor(whole, ours.device_mesh, ours.placements, src_data_rank=None)
        ours.copy_(whole)


@torch.no_grad()
def gather_model(model, ranks, dtype):
    """A whole copy of a model on rank 0's host, to save, its parameters in a dtype; elsewhere None.

    Every rank must call it.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    weights = {}
    for name, x in model.state_dict().items():
        x = x.to(dtype) if name in parameters else x
        x = x.full_tensor() if isinstance(x, DTensor) else x
        if ranks.rank == 0:
            weights[name] = x.cpu()
    if ranks.rank:
        return None
    whole = _skeleton(model)
    whole.load_state_dict(weights, assign=True)
    whole.tie_weights()
    return whole


# Checkpoints --------------------------------------------------------------------------------------


def _training_tensors(module, optimizer):
    """Weights and AdamW's moments by name. Missing moments are made."""
    tensors = {}
    for name, p in module.named_parameters():
        moments = optimizer.state[p]
        if not moments:
            moments["step"] = torch.zeros(())
            moments["exp_avg"] = torch.zeros_like(p)
            moments["exp_avg_sq"] = torch.zeros_like(p)
        tensors[f"model.{name}"] = p.detach()
        tensors[f"exp_avg.{name}"] = moments["exp_avg"]
        tensors[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
    return tensors


def save_checkpoint(folder, module, optimizer, state, ranks):
    """Write weights and moments, each rank its parts, as safetensors, and `state` as JSON.

    Beside the folder, and renamed when all of it is there. Every rank must call it.
    """
    unfinished = folder.with_suffix(".unfinished")
    if ranks.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    ranks.barrier()
    # Hugging Face's storage: the default one keeps its index as a pickle.
    writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
    dcp.save(_training_tensors(module, optimizer), storage_writer=writer)
    if ranks.rank == 0:
        updates = max(float(moments["step"]) for moments in optimizer.state.values())
        (unfinished / "state.json").write_text(json.dumps(state | {"updates": updates}))
        os.replace(unfinished, folder)
    ranks.barrier()


def load_checkpoint(folder, module, optimizer):
    """Fill a module and its optimizer, on any number of ranks; returns the state saved with it."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    dcp.load(_training_tensors(module, optimizer), storage_reader=reader)
    state = json.loads((folder / "state.json").read_text())
    for moments in optimizer.state.values():
        moments["step"].fill_(state["updates"])
    return state


def write_json(path, value):
    """Write a file of JSON that is whole or not there."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


# Training: batches, learning rate, the step loop --------------------------------------------------


def epoch_batch(records, size, step, *key):
    """The batch of a step (from 0): epochs of shuffles that depend on `key` alone.

    A function of the step, so no state has to be saved.
    """
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

    settings: a dict, kept as OUT/config.json; those named in `free` may change when the run is
        taken up again. A folder of another run, or of a finished one, or one that another process
        writes to, is refused: RunError.
    save_every: steps between checkpoints (0: ten minutes), beside the one at the end of each stage
        and on SIGTERM or SIGINT, which end the run behind the step; keep: how many stay.
    max_bad_steps: so many steps in a row whose loss or gradient is not finite end the run.
    """

    STATE = ("stage", "step", "total_steps", "skipped", "bad_steps", "summary")

    def __init__(self, out, settings, ranks, free=(), save_every=0, keep=2, max_bad_steps=3):
        self.out = Path(out)
        self.ranks = ranks
        self.save_every = save_every
        self.keep = keep
        self.max_bad_steps = max_bad_steps
        self.stage = ""
        self.step = 0  # of this stage, finished
        self.total_steps = 0  # of all stages, finished
        self.skipped = 0  # steps without an update
        self.bad_steps = 0  # of these, the last ones in a row
        self.summary = {}  # anything that JSON holds; kept in checkpoints
        self.status = ""  # shown behind the progress bar
        self.saved_at = time.monotonic()
        self.asked_to_stop = False
        self.board = None
        if ranks.rank == 0:
            self._take_folder(settings, free)
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.out / "tensorboard")
        ranks.barrier()

    def _take_folder(self, settings, free):
        config = self.out / "config.json"
        self.out.mkdir(parents=True, exist_ok=True)
        if not config.exists() and any(path.suffix == ".jsonl" for path in self.out.iterdir()):
            raise RunError(f"--out {self.out}: holds other files; choose a new folder")
        self.lock = open(self.out / "lock", "w")  # noqa: SIM115 (kept until the process ends)
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RunError(f"--out {self.out}: another run writes here; wait for its end") from None
        former = json.loads(config.read_text()) if config.exists() else settings
        for name, value in settings.items():
            if name not in free and former.get(name) != value:
                raise RunError(
                    f"--out {self.out}: holds another run (--{name} {former.get(name)}); "
                    "choose another folder, or delete it"
                )
        if (self.out / "summary.json").exists() and not (self.out / "checkpoints").exists():
            raise RunError(f"--out {self.out}: this run is finished; to repeat it, choose another")
        write_json(config, settings)

    def _checkpoints(self):
        return sorted((self.out / "checkpoints").glob("[0-9]*[0-9]"))

    def resume(self, module, optimizer):
        """Take up the newest checkpoint, if there is one; from here on signals stop the run."""
        self.module = module
        self.optimizer = optimizer
        sizes = {}
        if checkpoints := self._checkpoints():
            state = load_checkpoint(checkpoints[-1], module, optimizer)
            for name in self.STATE:
                setattr(self, name, state[name])
            sizes = state["logs"]
            print0(f"resumed {checkpoints[-1]} at {self.stage} step {self.step}")
        if self.ranks.rank == 0:  # what came after the checkpoint is done again
            for path in self.out.glob("*.jsonl"):
                os.truncate(path, sizes.get(path.name, 0))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame):
        self.asked_to_stop = True
        signal.signal(number, signal.SIG_DFL)
        print0("stopping behind this step; once more to stop at once, unsaved")

    def steps(self, stage, count):
        """Yield the steps of a stage that are still to do. A new stage has a fresh optimizer.

        Raises Stopped behind a step in which any rank was asked to stop.
        """
        if self.stage != stage:
            self.stage = stage
            self.step = 0
            self.optimizer.state.clear()
        with progress_bar(count, stage, self.step) as bar:
            while self.step < count:
                yield self.step
                self.step += 1
                self.total_steps += 1
                bar.set_postfix_str(self.status, refresh=False)
                bar.update()
                is_late = time.monotonic() - self.saved_at > SAVE_SECONDS
                asked = self.ranks.gather((self.asked_to_stop, is_late))
                stop, save = (any(answers) for answers in zip(*asked, strict=True))
                if self.save_every:
                    save = self.step % self.save_every == 0
                if stop or save or self.step == count:
                    self.save()
                if stop:
                    at = f"{stage} step {self.step}"
                    raise Stopped(f"stopped after {at}; saved. The same command goes on from there")

    def optimizer_step(self, loss, lr, max_norm=1.0):
        """Clip the gradients, take an optimizer step, clear them; returns the norm before clipping.

        loss: of all ranks. If it or the norm is not finite, all ranks skip the step alike; after
        max_bad_steps in a row this raises RunError.
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
        if self.bad_steps >= self.max_bad_steps:
            raise RunError(
                f"{self.stage} step {self.step + 1}: loss {loss}, gradient norm {norm}, "
                f"{self.bad_steps} times in a row; lower the learning rate"
            )
        return norm

    def log(self, name, record):
        """Append a record to OUT/NAME.jsonl; its numbers go to TensorBoard, where installed."""
        if self.ranks.rank:
            return
        with open(self.out / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        for key, value in record.items():
            if self.board and isinstance(value, float):
                self.board.add_scalar(f"{self.stage}/{key}", value, record["step"])

    def save(self):
        """Write a checkpoint; when it is there, old ones go."""
        state = {name: getattr(self, name) for name in self.STATE}
        state["logs"] = {path.name: path.stat().st_size for path in self.out.glob("*.jsonl")}
        folder = self.out / "checkpoints" / f"{self.total_steps:06d}"
        save_checkpoint(folder, self.module, self.optimizer, state, self.ranks)
        if self.ranks.rank == 0:
            for old in self._checkpoints()[: -self.keep]:
                shutil.rmtree(old)
        self.saved_at = time.monotonic()

    def finish(self):
        """Write OUT/summary.json, and remove what only a run that goes on needs. On rank 0."""
        write_json(self.out / "summary.json", self.summary)
        checkpoints = self.out / "checkpoints"
        os.replace(checkpoints, checkpoints.with_suffix(".unfinished"))  # so none is there in part
        shutil.rmtree(checkpoints.with_suffix(".unfinished"))
        (self.out / "lock").unlink()
