"""Many processes that compute what one would, and checkpoints that outlive them.     (how does it run for hours on many GPUs?)

`torchrun` starts one process (rank) for each GPU. Each takes its share of a batch; what is global (losses, norms, metrics,
the decision to stop) is summed or gathered, so results do not depend on the number of ranks beyond rounding:

    ranks = Ranks(timeout_s=1800)                                # one process without torchrun
    model, call = ranks.shard(load, half=True)                   # FSDP2: float32 master weights, bf16 compute
    mine = batch[ranks.share(len(batch))]
    loss = ranks.backward(call, loss_of, micro_batches(mine), nothing)    # gradients are summed over ranks, not averaged
    norm = clip_gradients(model, 1.0); optimizer.step()
    checkpoints = Checkpoints("runs/x/checkpoints", ranks)       # safetensors and JSON; any number of ranks may go on
    checkpoints.save(step, model, optimizer, lambda: {"step": step})

Whatever travels between ranks is a tensor or JSON. This file needs torch and safetensors only; copy it alone.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


class Ranks:
    """This process among those that torchrun started: rank, world (their number), device, and how they talk.

    timeout_s: a collective that waits longer for another rank raises, which ends the job. shard_size: ranks that share one
    copy of the weights (0: all); with fewer than all, groups of ranks hold copies of each other (HSDP).
    Raises ValueError where shard_size does not divide the number of ranks.
    """

    def __init__(self, timeout_s=1800, shard_size=0):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if shard_size and self.world % shard_size:
            raise ValueError(f"shard_size {shard_size}: does not divide the {self.world} ranks")
        cuda, self.mesh, self._asked_to_stop = torch.cuda.is_available(), None, False
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            if not dist.is_initialized():
                self._join("cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=timeout_s))
            if shard_size in (0, self.world):
                self.mesh = init_device_mesh(self.device.type, (self.world,))
            else:
                names = ("replicate", "shard")
                self.mesh = init_device_mesh(self.device.type, (self.world // shard_size, shard_size), mesh_dim_names=names)

    def _join(self, backend, timeout):
        """Form the group of processes. gloo beside nccl: small sums and gathers of CPU tensors do not wait for the GPU."""
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun keeps one store over restarts, in which a rank would find the addresses of the dead. (Of several
            # nodes, each counts its own restarts: there, torchrun wants TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, a fresh store.)
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)

    # Shares, sums, gathers

    def share(self, count):
        """The slice of `count` things that this rank takes; sizes differ by at most one."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def sum(self, values):
        """Sums over the ranks of a list of numbers, as floats (added in float64, in the same order on every rank)."""
        return torch.tensor(self.gather_json(list(map(float, values))), dtype=torch.float64).sum(0).tolist()

    def max(self, value):
        """The largest of the ranks' integers."""
        return max(self.gather_json(int(value)))

    def gather(self, x):
        """Rows of every rank's tensor [rows, ...], in the order of the ranks, on every rank. Numbers of rows may differ."""
        if self.world == 1:
            return x
        sizes = [torch.zeros((), dtype=torch.long) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor(len(x)))
        padded = x.new_zeros(max(map(int, sizes)), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, map(int, sizes), strict=True)])

    def gather_json(self, value):
        """The list of every rank's value (anything that JSON holds)."""
        if self.world == 1:
            return [value]
        line = torch.frombuffer(bytearray(json.dumps(value).encode() + b"\n"), dtype=torch.uint8)
        return [json.loads(text) for text in bytes(self.gather(line).tolist()).splitlines()]

    def wait(self):
        """Until every rank is here."""
        self.gather_json(None)

    def first(self, work):
        """Rank 0 calls `work`; an OSError there is raised on every rank."""
        error = None
        if self.rank == 0:
            try:
                work()
            except OSError as failure:
                error = f"{failure.filename or ''}: {failure.strerror or failure}"
        if error := self.gather_json(error)[0]:
            raise OSError(error)

    # The end of it

    def stop_on_signals(self, say):
        """From now on, SIGTERM and SIGINT to any rank make `stopping` true; a second one ends the process as ever.
        say: called, without arguments, when the first one comes."""

        def on_signal(number, frame):
            self._asked_to_stop = True
            signal.signal(number, signal.SIG_DFL)
            say()

        signal.signal(signal.SIGINT, on_signal)
        signal.signal(signal.SIGTERM, on_signal)

    def stopping(self):
        """Whether any rank has been asked to stop; all ranks get the same answer."""
        return bool(self.max(self._asked_to_stop))

    def leave(self):
        """End this process, one of several, with exit code 0; without others, do nothing.

        Not by way of the interpreter: now and then threads of the process group abort it on its way out.
        """
        if self.world > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    # Models

    def shard(self, load, half=False):
        """(model, call): a Hugging Face model to train, in float32 master weights; with several ranks, FSDP2 shards it.

        load: gives the model in float32 on a device; of several ranks only the first loads its weights (on "cpu"), all
        load "meta", the architecture alone. half: compute in bfloat16, reduce gradients in float32. Compute losses as
        call(function): FSDP gathers the weights of head and embedding around it, and those of each layer around the layer.
        """
        if self.world == 1:
            return load(self.device), partial(_call, self.device, half)
        weights, model = None if self.rank else load("cpu"), load("meta")
        policy, dtype = _Policy(model), torch.bfloat16 if half else None
        settings = {"mesh": self.mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
        for module in (*transformer_layers(model), policy):
            fully_shard(module, **settings)
        for module in policy.modules():
            if isinstance(module, FSDPModule):  # losses are divided by global counts, so gradients are summed
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self._fill(model, weights)
        return model, policy

    def whole(self, load, model, half=False):
        """The model as each rank needs it to sample from or to save: a whole copy, in bfloat16 if `half`;
        itself, where it is whole and in the right precision already. Every rank must call it."""
        return whole_copy(load("meta"), model, half) if half or self.world > 1 else model

    def passes(self, parts):
        """This rank's micro-batches, and None until it has as many as the rank with most: FSDP's gathers need all ranks."""
        return [*parts, *[None] * (self.max(len(parts)) - len(parts))]

    def backward(self, call, loss_of, parts, nothing):
        """Add up the gradients of loss_of(part) over this rank's micro-batches and all ranks; returns the sum of the losses.

        call: from `shard`. nothing: a function that gives a loss of 0 through all weights, for ranks with fewer parts.
        """
        total = 0.0
        for part in self.passes(parts):
            loss = call(nothing if part is None else partial(loss_of, part))
            loss.backward()
            total += float(loss.detach())
        return self.sum([total])[0]

    @torch.no_grad()
    def _fill(self, model, weights):
        """Give a model on the meta device memory, and rank 0's weights and buffers, one tensor at a time."""
        model.to_empty(device=self.device)
        model.tie_weights()  # to_empty forgets which are the same
        source = dict([*weights.named_parameters(), *weights.named_buffers()]) if weights is not None else {}
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            empty = torch.empty(x.shape, dtype=x.dtype, device=self.device)  # x.shape is the whole's, sharded or not
            whole = empty.copy_(source[name]) if source else empty
            dist.broadcast(whole, 0)
            # every rank has it now: cutting out the own part needs no further communication
            x.copy_(distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None) if is_sharded(x) else whole)

    def __repr__(self):
        return f"rank {self.rank} of {self.world}"


class _Policy(torch.nn.Module):
    """The root of a sharded model: its forward is whatever uses the weights, so that FSDP's hooks surround it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, work):
        return work()


def _call(device, half, work):
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        return work()


def transformer_layers(model):
    """The layers of a Hugging Face transformer: `layers`, or (BERT and its kind) its longest list of modules."""
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    return getattr(model.base_model, "layers", None) or max(lists, key=len)


def clip_gradients(model, max_norm):
    """Clip the gradients of a model, sharded or not, to a global norm; returns the norm before, a float."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if is_sharded(norm) else norm)


def is_sharded(x):
    """Whether a tensor is spread over ranks."""
    return isinstance(x, DTensor)


def whole_copy(skeleton, model, half=False):
    """A whole copy of a model, sharded or not, on each rank; bf16 if `half`. skeleton: the same model on the meta device.

    Buffers keep their precision: rotary frequencies in bf16 would give other positions. Every rank must call it.
    """
    device = next(model.parameters()).device
    if half:
        for p in skeleton.parameters():
            p.data = p.data.to(torch.bfloat16)
    skeleton.to_empty(device=device)
    skeleton.tie_weights()  # to_empty forgets which are the same
    for ours, theirs in zip(skeleton.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)
    copy_weights(skeleton, model)
    return skeleton


@torch.no_grad()
def copy_weights(target, model):
    """Copy the weights of a model, sharded or not, into a whole one, in the target's dtype. Every rank must call it."""
    for ours, theirs in zip(target.parameters(), model.parameters(), strict=True):
        theirs = theirs.detach().to(ours.dtype)  # before the gathering: half the bytes
        ours.copy_(theirs.full_tensor() if is_sharded(theirs) else theirs)


# Memory ---------------------------------------------------------------------------------------------------------------


class _KeptByAttention(torch.autograd.Function):
    """Attention as far as memory goes: a fused kernel keeps queries, keys, values and its output."""

    @staticmethod
    def forward(ctx, q_HSD, k_KSD, v_KSD):
        out_SHD = q_HSD.transpose(0, 1).contiguous()
        ctx.save_for_backward(q_HSD, k_KSD, v_KSD, out_SHD)
        return out_SHD


class _PlannedTree:
    """Stands for a rollout.Tree on the meta device."""

    max_position = 0

    def attend(self, layer, q_HSD, k_KSD, v_KSD, scale):
        return _KeptByAttention.apply(q_HSD, k_KSD, v_KSD)


def activation_bytes(model, tokens):
    """Bytes that a forward pass over `tokens` tokens keeps for the backward pass: counted on the meta device, not computed.
    model: on meta, under rollout.use_tree_attention, in the dtype of the computation."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(x):
        if x.is_floating_point() and x.untyped_storage()._cdata not in weights:
            kept[x.untyped_storage()._cdata] = x.untyped_storage()  # held, so that no other gets its address
        return x

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.base_model(input_ids=ids, position_ids=ids, tree=_PlannedTree(), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def memory_plan(
    model, *, ranks=1, shard_size=0, half=True, max_tokens=2**15, cache_tokens=2**17, checkpointing=False, reference=False,
    logits=2**24, prefill=2**13,
):  # fmt: skip
    """What each rank will hold when training `model` (on meta, float32, under tree attention): {what: bytes}, with "peak".

    half: on GPUs (bf16 compute and sampling copy); else as on CPU. max_tokens, cache_tokens: the budgets of a micro-batch and
    of the key-value cache, taken as used up. checkpointing: of activations. reference: a frozen model for the KL. logits,
    prefill: rollout.py's chunks, in numbers and tokens. Weights, moments, gradients and caches follow from shapes;
    activations are counted by `activation_bytes`; what a step holds only for a moment is estimated (the last lines).
    """
    config, size, shards = model.config, 2 if half else 4, shard_size or ranks
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.base_model.layers]
    total, layer = sum(p.numel() for p in model.parameters()), max(layers)
    root, width = total - sum(layers), config.hidden_size
    if half:
        model.to(torch.bfloat16)
    # the difference of two lengths leaves out what does not grow
    token = (activation_bytes(model, 128) - activation_bytes(model, 64)) / 64
    model.to(torch.float32)
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    plan = {
        "master weights (float32)": 4 * total / shards,
        "optimizer (two moments, float32)": 8 * total / shards,
        "gradients (float32)": 4 * total / shards,
        "sampling copy": size * total * (half or ranks > 1),
        "reference model": 4 * total / shards * reference,
    }
    always = sum(plan.values())
    one = token / len(layers) * max_tokens  # a layer's activations
    plan["activations"] = size * width * len(layers) * max_tokens if checkpointing else token * max_tokens
    plan["key-value cache"] = cache_tokens * len(layers) * 2 * config.num_key_value_heads * head_dim * size
    chunk = 3 * 4 * min(logits, max_tokens * config.vocab_size)
    gathered = size * (root + 2 * layer) + (4 + size) * layer if shards > 1 else size * total * half
    plan["gathered weights"] = gathered
    plan["logits, gradients on their way"] = max(chunk, 1.3 * one) + 2 * size * root  # 1.3: fitted to tests/peak.py
    training = plan["activations"] + gathered + plan["logits, gradients on their way"]
    sampling = plan["key-value cache"] + token / len(layers) * prefill
    plan["peak"] = always + max(training, sampling, 4 * total / shards * half)  # the last: AdamW's temporaries on CUDA
    return plan


# Checkpoints ----------------------------------------------------------------------------------------------------------


class Stopped(Exception):  # noqa: N818 (it is no error)
    """The run was asked to stop, and has saved."""


def differing(config, former, free=()):
    """The settings of another run (dicts) that are not this one's, as flags; those named in `free` do not count."""
    names = (name for name in config if name not in free and former.get(name) != config[name])
    return ", ".join(f"--{name} {former.get(name)}" for name in names)


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read."""


class Checkpoints:
    """The checkpoints of a run, FOLDER/NNNNNN: each whole or not there at all, the newest `keep` of them.

    Weights and moments (of AdamW) are safetensors, each rank's parts a file, which any number of ranks may read; the rest
    is state.json, written last, with the sizes of the other files.
    """

    def __init__(self, folder, ranks, keep=2):
        self.folder, self.ranks, self.keep = Path(folder), ranks, keep

    def newest(self):
        """The folder of the newest checkpoint, or None."""
        return max(self._all(), default=None)

    def _all(self):
        return sorted(path.parent for path in self.folder.glob("[0-9]*/state.json"))

    def save(self, number, model, optimizer, state):
        """Write a checkpoint: beside its place, and renamed when it is complete. Every rank must call it.

        state: gives, on rank 0, once the tensors are written, what else to keep, as JSON.
        Raises CheckpointError, on every rank, if it cannot be written; the former ones are untouched.
        """
        unfinished = self.folder / "unfinished"
        try:
            self.ranks.first(lambda: (shutil.rmtree(unfinished, ignore_errors=True), unfinished.mkdir(parents=True)))
            save_tensors(unfinished, _training_tensors(model, optimizer))
            updates = max((float(moments["step"]) for moments in optimizer.state.values()), default=0.0)
            self.ranks.first(lambda: self._complete(number, state() | {"updates": updates}))
        except OSError as error:
            self.ranks.first(lambda: shutil.rmtree(unfinished, ignore_errors=True))
            raise CheckpointError(str(error)) from error

    def _complete(self, number, state):
        unfinished, path = self.folder / "unfinished", self.folder / f"{number:06d}"
        state["files"] = {file.name: file.stat().st_size for file in unfinished.iterdir()}
        with open(unfinished / "state.json", "w", encoding="utf-8") as file:
            file.write(json.dumps(state) + "\n")
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(path, ignore_errors=True)
        os.replace(unfinished, path)
        for old in self._all()[: -self.keep]:
            self._discard(old)

    def _discard(self, path):
        os.replace(path, self.folder / "unfinished")  # so that none is ever there in part
        shutil.rmtree(self.folder / "unfinished")

    def read(self, path):
        """The state that `save` was given. Raises CheckpointError if it, or a file that belongs to it, is damaged."""
        try:
            state = json.loads((Path(path) / "state.json").read_text(encoding="utf-8"))
            for name, size in state["files"].items():
                if not (Path(path) / name).is_file() or (Path(path) / name).stat().st_size != size:
                    raise CheckpointError(f"{path}: {name} is missing, or not whole")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path}: its state.json is damaged") from None
        return state

    def load(self, path, model, optimizer):
        """Fill a model and its optimizer from a checkpoint. Raises CheckpointError, on every rank, where they do not fit."""
        updates = self.read(path)["updates"]
        load_tensors(path, _training_tensors(model, optimizer))
        for moments in optimizer.state.values():
            moments["step"].fill_(updates)

    def forget_after(self, path):
        """Remove the checkpoints newer than `path` (on rank 0), which a run that goes on from there makes again."""
        for other in self._all():
            if other.name > Path(path).name:
                self._discard(other)


def _training_tensors(model, optimizer):
    """Weights and AdamW's moments by name. Missing moments are made."""
    out = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if "exp_avg" not in state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        out |= {f"model.{name}": p.detach(), f"exp_avg.{name}": state["exp_avg"], f"exp_avg_sq.{name}": state["exp_avg_sq"]}
    return out


def save_tensors(folder, tensors):
    """Write {name: tensor, sharded or not} to a folder of safetensors files; each rank writes its own parts.

    torch.distributed.checkpoint with its Hugging Face storage: the default storage keeps its index as a pickle.
    Raises CheckpointError, on every rank, if any cannot write.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _clear_errors(f"{folder}: cannot be written"):
        dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())


def load_tensors(folder, tensors):
    """Fill {name: tensor} in place from a folder that save_tensors wrote, with any number of ranks.

    Raises CheckpointError, on every rank, for a folder that is damaged or holds other tensors.
    """
    with _clear_errors(f"{folder}: cannot be read"):
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())


@contextlib.contextmanager
def _clear_errors(what):
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
            yield
    except (Exception, dcp.CheckpointException) as error:  # the latter, of any rank, is no Exception
        failures = getattr(error, "failures", None)
        cause = next(iter(failures.values()))[0] if failures else error
        raise CheckpointError(f"{what}: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}") from error
