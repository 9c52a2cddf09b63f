"""Many processes that compute what one would; runs that outlive them.    (how does one run go on?)

`torchrun` starts one process (rank) for each GPU. Each takes its share of a batch; what is global
(losses, norms, metrics, the decision to stop) is summed or gathered, so results do not depend on
the number of ranks beyond rounding. A training loop reads:

    ranks = Ranks()                                       # one process without torchrun
    policy = shard(make, ranks, bf16=True)                # FSDP2: float32 weights, bf16 compute
    optimizer = torch.optim.AdamW(policy.parameters())
    progress = Progress("runs/x", settings, ranks, stage="train", save_every=100)
    progress.start(policy, optimizer)                     # goes on where a former run was stopped
    for step in progress.steps(1000):
        batch = epoch_batch(records, 64, step, seed)
        mine = batch[ranks.share(len(batch))]
        for part in ranks.equalize(cut(mine), empty=[]):  # every rank has equally many
            policy(part).backward()                       # gradients are summed over ranks
        progress.optimizer_step(policy, optimizer, loss, learning_rate(1e-4, step, 1000))
        progress.log("metrics", {"step": step + 1, "loss": loss})

Whatever travels between ranks is a tensor or JSON. This file needs torch, numpy, safetensors and
tqdm only; copy it alone.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from tqdm import tqdm

SAVE_SECONDS = 600  # between checkpoints, where no number of steps is given
FILE_BYTES = 2**28  # of a file of weights, unless one tensor is larger
LINE_SECONDS = 30  # between lines of progress, where the output is no terminal
# Files that a run reads and writes; what else lies in a folder is not looked at.
SUFFIXES = (".json", ".jsonl", ".jinja", ".md", ".model", ".safetensors", ".txt")


class RunError(Exception):
    """A run that cannot begin or go on. The message says why, and what to do."""


class Stopped(Exception):  # noqa: N818 (it is no error)
    """The run was asked to stop, and has saved."""


def is_rank_0():
    """Whether this process speaks and writes for all."""
    return os.environ.get("RANK", "0") == "0"


def print0(text):
    """Print a line on rank 0 alone, above a progress bar."""
    if is_rank_0():
        tqdm.write(str(text))


class Bar(tqdm):
    """tqdm on rank 0; where the output is no terminal, a plain line about every half minute."""

    def __init__(self, *args, **settings):
        self.is_plain = not sys.stderr.isatty()
        self.shown = ""
        if self.is_plain:
            settings |= {
                "bar_format": "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}",
                "mininterval": LINE_SECONDS,
                "maxinterval": 2 * LINE_SECONDS,  # where no step ends in time
                "file": io.StringIO(),  # takes tqdm's carriage returns
            }
        super().__init__(*args, dynamic_ncols=True, disable=not is_rank_0(), **settings)

    def display(self, msg=None, pos=None):
        """What tqdm calls to show the bar."""
        if not self.is_plain:
            super().display(msg, pos)
        elif msg is None and str(self) != self.shown:
            self.shown = str(self)
            print(self.shown, file=sys.stderr, flush=True)


# Files: whole or not there ------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path):
    """Give a path beside `path` to write a file or a folder to; it becomes `path` when it is whole.

    What was at `path` is replaced then, and a folder gets checksums.json (`put_in_place`). Raises
    RunError if it cannot be written; `path` is as it was.
    """
    unfinished = unfinished_path(path)
    with clear_errors(f"{path}: cannot be written"):
        try:
            _remove(unfinished)
            yield unfinished
            put_in_place(unfinished, path)
        finally:
            _remove(unfinished)


def unfinished_path(path):
    """Where a file or folder is while it is written."""
    path = Path(path)
    return path.with_name(f"{path.name}.unfinished")


def put_in_place(unfinished, path, hashes=None):
    """Rename what has been written, once all of it is on the disk.

    A folder gets checksums.json, the SHA-256 of its files: `hashes`, where they are known.
    """
    written = [unfinished]
    if unfinished.is_dir():
        hashes = hashes or hash_folder(unfinished)
        (unfinished / "checksums.json").write_text(json.dumps(hashes, indent=1) + "\n")
        written = [*unfinished.iterdir(), unfinished]
        shutil.rmtree(path, ignore_errors=True)
    for file in written:
        _flush(file)
    os.replace(unfinished, path)
    _flush(Path(path).absolute().parent)


def _flush(path):
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path):
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def hash_folder(folder, part=slice(None)):
    """{name: SHA-256} of a folder's files (SUFFIXES), or of `part` of them, by name."""
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in SUFFIXES)
    files = [path for path in files if path.name != "checksums.json"]
    return {path.name: _sha256(path) for path in files[part]}


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(folder, hint, hashes=None):
    """Raise RunError if a folder's files are not as they were written; hint: what to do then.

    hashes: of its files, where they are known. A folder without checksums.json is not checked.
    """
    if not (Path(folder) / "checksums.json").exists():
        return
    written = read_json(Path(folder) / "checksums.json", hint)
    found = hashes or hash_folder(folder)
    for name, value in written.items():
        if name not in found:
            raise RunError(f"{folder}: {name} is missing; {hint}")
        if found[name] != value:
            raise RunError(f"{folder}: {name} is not as it was written; {hint}")


def read_json(path, hint):
    """A JSON object that a run has written. Raises RunError that names the file, with the hint."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    except (ValueError, RecursionError):
        pass
    raise RunError(f"{path}: damaged; {hint}")


def hash_inputs(paths):
    """SHA-256 of files, and of those in folders; what does not exist counts as nothing.

    A run that goes on must find the inputs that it began with. Raises RunError for a folder that
    does not fit its checksums.json.
    """
    digest = hashlib.sha256()
    for path in map(Path, paths):
        hashes = {}
        if path.is_dir():
            hashes = hash_folder(path)
            check_folder(path, "if that is meant, delete its checksums.json", hashes)
        elif path.exists():
            hashes = _sha256(path)  # whatever its name
        digest.update(json.dumps(hashes).encode())
    return digest.hexdigest()


def lock(path):
    """Keep a file for this process, until it ends in whatever way; returns it, open: keep it so.

    Raises RunError if another process has it.
    """
    file = open(path, "ab")  # noqa: SIM115 (closing it would release the lock)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise RunError(f"{path}: locked; another run writes here, wait for its end") from None
    return file


@contextlib.contextmanager
def clear_errors(what):
    """Whatever fails inside raises RunError, one line that begins with `what`."""
    try:
        with warnings.catch_warnings():
            # With one process, that is meant.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except RunError:
        raise
    except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
        failures = getattr(error, "failures", None)  # of several ranks
        cause = next(iter(failures.values()))[0] if failures else error
        first_line = str(cause).partition("\n")[0]
        raise RunError(f"{what}: {type(cause).__name__}: {first_line}") from error


# Ranks --------------------------------------------------------------------------------------------


class Ranks:
    """This process among those that torchrun started: rank, world (their number), device.

    timeout_s: a collective that waits longer for another rank raises, which ends the job.
    sampling_shards: so many neighbouring ranks are a group, which samples together from one copy of
        the weights, cut into parts (`cut`). Raises RunError if that does not divide the ranks.
    """

    def __init__(self, timeout_s=1800, sampling_shards=1):
        self.timeout = timedelta(seconds=timeout_s)
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device("cpu")
        self.mesh = None
        self.shards = sampling_shards
        self.group = None
        self.asked_to_stop = False
        self.interruptible = False  # whether a signal may break off what is being done
        self.backend = "gloo"
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            # gloo beside nccl: small sums and gathers of CPU tensors do not wait for the GPU.
            self.backend = "cpu:gloo,cuda:nccl"
        elif Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            raise RunError(
                f"there is an NVIDIA GPU, which torch {torch.__version__} cannot use: install a "
                "torch for its driver, or set CUDA_VISIBLE_DEVICES= (empty) to compute on the CPU"
            )
        if self.world % sampling_shards:
            raise RunError(
                f"--sampling_shards {sampling_shards}: does not divide the number of ranks, "
                f"{self.world} (torchrun --nproc-per-node)"
            )
        if self.world > 1:
            self.form_mesh()
        if sampling_shards > 1:
            shape = (self.world // sampling_shards, sampling_shards)
            meshes = init_device_mesh(self.device.type, shape, mesh_dim_names=("groups", "group"))
            self.group = meshes["group"]

    def form_mesh(self):
        """Let the processes find each other, if they have not: what FSDP needs, of one rank too."""
        if not dist.is_initialized():
            options = {"timeout": self.timeout, "rank": self.rank, "world_size": self.world}
            store = self._store() if self.world > 1 else dist.HashStore()
            dist.init_process_group(self.backend, store=store, **options)
        self.mesh = self.mesh or init_device_mesh(self.device.type, (self.world,))

    def _store(self):
        """Where the processes find each other's addresses."""
        store, *_ = next(dist.rendezvous("env://", timeout=self.timeout))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun keeps one store over restarts, in which a rank would find the addresses of
            # the dead. (Of several nodes, each counts its own restarts: there, torchrun wants
            # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment, a fresh store.)
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        return store

    def share(self, count):
        """The slice of `count` things that this rank takes; sizes differ by at most one."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def group_share(self, count):
        """The slice that this rank samples for, with the others of its group: all their shares."""
        first = self.rank - self.rank % self.shards
        last = first + self.shards
        return slice(first * count // self.world, last * count // self.world)

    def own_part(self, count):
        """Of what the group has of its slice of `count` things, the slice that is this rank's."""
        start = self.group_share(count).start
        share = self.share(count)
        return slice(share.start - start, share.stop - start)

    def equalize(self, micro_batches, empty):
        """This rank's micro-batches, and `empty` ones until it has as many as the rank with most.

        FSDP gathers weights in each forward and backward pass, so all ranks must run equally many.
        A module called with an empty one runs a dummy whose loss is 0: rollout.Tree of no prompts.
        """
        missing = self.max(len(micro_batches)) - len(micro_batches)
        return [*micro_batches, *[empty] * missing]

    def sum(self, value):
        """Sum over the ranks of a number, or of each number in a dict.

        Added as Python floats in the order of the ranks, so every rank has the same digits.
        """
        values = self.gather_json(value)
        if isinstance(value, dict):
            return {name: sum(other[name] for other in values) for name in value}
        return sum(values)

    def max(self, value):
        """The largest of the ranks' numbers."""
        return max(self.gather_json(value))

    def gather(self, x):
        """Rows of every rank's tensor [rows, ...], rank by rank, on every rank."""
        if self.world == 1:
            return x
        sizes = [torch.zeros((), dtype=torch.long) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor(len(x)))
        padded = x.new_zeros(max(map(int, sizes)), *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def gather_json(self, value):
        """The list of every rank's value (anything that JSON holds)."""
        if self.world == 1:
            return [value]
        line = json.dumps(value).encode() + b"\n"
        lines = self.gather(torch.frombuffer(bytearray(line), dtype=torch.uint8))
        return [json.loads(text) for text in lines.numpy().tobytes().splitlines()]

    def gather_groups(self, values, count):
        """All ranks' values (JSON) of `count` things, from each group's values of its slice."""
        parts = self.gather_json(values[self.own_part(count)])
        return [value for part in parts for value in part]

    def barrier(self):
        """Wait until every rank is here."""
        self.gather_json(None)

    def on_rank_0(self, work, *args):
        """Call work(*args) on rank 0; every rank gets its result (JSON) or a RunError."""
        result = error = None
        if self.rank == 0:
            try:
                result = work(*args)
            except RunError as failure:
                error = str(failure)
            except OSError as failure:
                error = f"{failure.filename or ''}: {failure.strerror or failure}"
        result, error = self.gather_json([result, error])[0]
        if error is not None:
            raise RunError(error)
        return result

    def stop_on_signals(self):
        """From now on SIGTERM and SIGINT, to any rank, make `stopping` true; a second one kills."""
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number, frame):
        self.asked_to_stop = True
        signal.signal(number, signal.SIG_DFL)
        print0("stopping; once more to stop at once, unsaved")
        if self.interruptible:
            self.interruptible = False
            raise KeyboardInterrupt

    def stopping(self):
        """Whether any rank has been asked to stop; all ranks get the same answer."""
        return self.max(self.asked_to_stop)


def launch(main, errors=()):
    """Call main() as the whole of a script; what a user can mend ends it with one line.

    errors: further exceptions, beside RunError and OSError, of which the message says it all.
    """
    try:
        main()
    except Stopped as stopped:
        print0(stopped)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from what is saved")
    except (RunError, OSError, *errors) as error:
        if not is_rank_0():
            # Rank 0 speaks first: torchrun ends the others as soon as one has left.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        sys.exit(str(error))
    if dist.is_initialized() and dist.get_world_size() == 1:
        dist.destroy_process_group()
    elif dist.is_initialized():
        # Not by way of the interpreter: now and then, threads of the process group abort it there.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# Models -------------------------------------------------------------------------------------------


def bf16_pays(device, hidden_size):
    """Whether a model of this width computes faster in bfloat16: on CUDA, and on CPUs whose
    processor multiplies bfloat16 matrices (AMX) where the products are large enough.
    """
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() and hidden_size >= 512
    return device.type == "cuda"


def chosen_bf16(choice, device, hidden_size):
    """The setting `bf16` as a bool: "1", "0", or "auto" for where it pays."""
    return bf16_pays(device, hidden_size) if choice == "auto" else choice == "1"


def shard(make, ranks, bf16=False, source=None):
    """A module to train, in float32 master weights, which FSDP2 shards over the ranks.

    make(device) gives the module, with a Hugging Face transformer as its `.model`; source: the
    folder that it has its weights from, if any. Call the module as usual: FSDP gathers the weights
    of head and embedding around its forward and backward, and those of each layer around the layer.
    Gradients are summed over ranks, not averaged.
    bf16: compute in bfloat16, reduce gradients in float32. For that a single rank is a mesh of one,
    so that it computes what several do; in float32 it has the plain module.
    """
    if ranks.world == 1 and not bf16:
        return make(ranks.device)
    ranks.form_mesh()
    module = make("meta")
    compute_dtype = torch.bfloat16 if bf16 else None
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for block in (*transformer_layers(module.model), module):
        fully_shard(block, mesh=ranks.mesh, mp_policy=precision)
    for block in module.modules():
        if isinstance(block, FSDPModule):
            # Losses are divided by global counts, so gradients are summed.
            block.set_gradient_divide_factor(1.0)
            block.set_force_sum_reduction_for_comms(True)
    fill(module, make, ranks, source)
    return module


@torch.no_grad()
def fill(module, make, ranks, source=None):
    """Give a module on meta memory and weights, whether FSDP shards it, `cut` cuts it, or none.

    If the folder `source` has safetensors of just these names and shapes, each rank reads its own
    parts, and no host ever holds a whole copy. Else rank 0 makes the whole, make("cpu"), and
    broadcasts one tensor after the other. Raises RunError for weights that are not finite.
    """
    model = module.model
    module.to_empty(device=ranks.device)
    model.tie_weights()  # to_empty forgets which are the same
    if source and ranks.on_rank_0(_has_weights_of, source, model) and _init_buffers(model):
        load_tensors(source, dict(_named_tensors(model)))
        bad = [name for name, p in model.named_parameters() if not _local(p).isfinite().all()]
        for names in ranks.gather_json(bad):
            if names:
                raise RunError(f"{source}: weights that are not finite: {names[0]}")
        return
    weights = make("cpu") if ranks.rank == 0 else None
    tensors = {}
    if weights is not None:
        tensors = dict([*weights.named_parameters(), *weights.named_buffers()])
    for name, x in [*_named_tensors(module), *module.named_buffers()]:
        whole = torch.empty(x.shape, dtype=x.dtype, device=ranks.device)  # x.shape is the whole's
        if tensors:
            whole.copy_(tensors[name])
        if dist.is_initialized():
            dist.broadcast(whole, 0)
        _copy_part(x, whole)


def _init_buffers(model):
    """Whether transformers could compute all buffers, as rotary frequencies, which no file holds.

    Parameters of the same modules are initialised too: read the weights afterwards.
    """
    for part in model.modules():
        buffers = [*part.buffers(recurse=False)]
        if not all(x.is_floating_point() for x in buffers):
            return False
        for x in buffers:
            x.fill_(math.nan)
        if buffers:
            model._init_weights(part)
    return not any(x.isnan().any() for x in model.buffers())


def _has_weights_of(folder, model):
    """Whether a folder's safetensors are the parameters of a model, by name and shape."""
    shapes = {name: list(x.shape) for name, x in _named_tensors(model)}
    found = {}
    for path in Path(folder).glob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                found |= {name: file.get_slice(name).get_shape() for name in names}
        except SafetensorError:
            return False  # transformers will say what is wrong
    return found == shapes


def _named_tensors(module):
    """(name, parameter) of a module; the parts of layers that are cut as DTensors of the whole."""
    for name, p in module.named_parameters():
        layer, _, kind = name.rpartition(".")
        mesh, placements = getattr(module.get_submodule(layer), "parts", (None, {}))
        if kind in placements:
            p = DTensor.from_local(p.detach(), mesh, [placements[kind]], run_check=False)
        yield name, p


def _copy_part(x, whole):
    """Copy a whole tensor into x, or x's part of it. No communication: every rank has the whole."""
    if is_sharded(x):
        whole = distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None)
    x.copy_(whole)


def _local(x):
    """What of a tensor is on this rank."""
    return x.to_local() if is_sharded(x) else x


@torch.no_grad()
def sampling_copy(make, module, ranks, bf16=False):
    """The module as a rank needs it to sample from or to save: not sharded, in bfloat16 if `bf16`.

    That is the module itself where it is so already, else a copy: whole, or cut where what
    make("meta") gives is cut. Every rank must call it.
    """
    if not bf16 and not any(map(is_sharded, module.parameters())):
        return module
    copy = make("meta")
    if bf16:
        # Of parameters alone: rotary frequencies, which are buffers, would give other positions.
        for p in copy.parameters():
            p.data = p.data.to(torch.bfloat16)
    copy.to_empty(device=ranks.device)
    copy.model.tie_weights()
    for ours, theirs in zip(copy.buffers(), module.buffers(), strict=True):
        ours.copy_(theirs)
    copy_weights(copy, module)
    return copy


@torch.no_grad()
def copy_weights(target, module):
    """Copy a module's weights, sharded or not, into a whole or a cut one. Every rank must call it.

    One tensor after the other is gathered; no rank ever holds more than one whole beside its part.
    """
    if target is module:
        return
    for (_, ours), theirs in zip(_named_tensors(target), module.parameters(), strict=True):
        theirs = theirs.detach().to(ours.dtype)  # before the gathering: half the bytes
        _copy_part(ours, theirs.full_tensor() if is_sharded(theirs) else theirs)


# How the ranks of a group share out linear layers (tensor parallelism, as in Megatron-LM, arXiv
# 1909.08053). By rows: each rank has some of the heads, and some of the MLP's neurons.
ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
# By columns: the ranks' outputs are summed.
COLUMNS = ("o_proj", "down_proj")


def cut(module, ranks):
    """Cut the layers of a transformer on meta, module.model, for this rank's group; returns module.

    Embedding and head stay whole. Transformers' code runs unchanged: it takes the number of heads
    from the shapes. Raises RunError for a model that cannot be cut (`check_cut`).
    """
    if ranks.group is None:
        return module
    check_cut(module.model, ranks.shards)
    for name, layer in transformer_layers(module.model).named_modules():
        name = name.rpartition(".")[2]
        if name in ROWS:
            placements = {"weight": Shard(0), "bias": Shard(0)}
        elif name in COLUMNS:
            placements = {"weight": Shard(1)}
            layer.register_forward_hook(partial(_sum_over, ranks.group.get_group()))
        else:
            continue
        layer.parts = (ranks.group, placements)
        for kind, placement in placements.items():
            if (p := getattr(layer, kind)) is not None:
                part = p.chunk(ranks.shards, placement.dim)[0]
                setattr(layer, kind, torch.nn.Parameter(torch.empty_like(part)))
    return module


def _sum_over(group, layer, inputs, output):
    """The hook of a layer whose columns are cut: sum the outputs, of which each has the bias."""
    if layer.bias is not None:
        output -= layer.bias
    dist.all_reduce(output, group=group)
    return output if layer.bias is None else output + layer.bias


def check_cut(model, shards):
    """Raise RunError if a model's layers cannot be cut into so many parts."""
    config = model.config
    hint = f"--sampling_shards {shards}"
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (size := getattr(config, name, None)) is None or size % shards:
            raise RunError(f"{hint}: does not divide the model's {name} ({size})")
    for name, p in transformer_layers(model)[0].named_parameters():
        layer = name.split(".")[-2]
        is_norm = p.dim() == 1 and layer not in ("q_norm", "k_norm")
        of_a_head = len(p) == getattr(config, "head_dim", None)
        if layer not in ROWS + COLUMNS and not is_norm and not of_a_head:
            raise RunError(f"{hint}: {type(model).__name__} has {name}, which cannot be cut")


def transformer_layers(model):
    """The layers of a Hugging Face transformer: `layers`, or else its longest list of modules."""
    layers = getattr(model.base_model, "layers", None)
    if layers is None:  # BERT and its kind
        lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
        layers = max(lists, key=len)
    return layers


@torch.no_grad()
def save_model(model, folder, ranks, dtype):
    """Write a transformer's weights, sharded or not, as Hugging Face folders hold them.

    So many tensors at a time as fit a file of FILE_BYTES are gathered and written by rank 0: no
    host holds more. Every rank must call it. Raises RunError, on each, if they cannot be written.
    """
    parameters = dict(model.named_parameters())
    sizes = {name: p.numel() * dtype.itemsize for name, p in parameters.items()}
    numbers = _file_numbers(sizes)
    count = max(numbers.values())
    names = {}
    for number in range(1, count + 1):
        tensors = {}
        of_all = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
        path = Path(folder) / f"model{of_all}.safetensors"
        for name in [name for name in parameters if numbers[name] == number]:
            names[name] = path.name
            p = parameters[name].to(dtype)
            whole = p.full_tensor() if is_sharded(p) else p
            if ranks.rank == 0:
                tensors[name] = whole.cpu().contiguous()
        ranks.on_rank_0(_save_file, tensors, path)
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": names}
        text = json.dumps(index, indent=1) + "\n"
        ranks.on_rank_0(Path(folder, "model.safetensors.index.json").write_text, text)


def _file_numbers(sizes):
    """{name: number of its file, from 1} of {name: bytes}: in order, each file full in its turn."""
    numbers = {}
    number = 1
    used = 0
    for name, size in sizes.items():
        if used and used + size > FILE_BYTES:
            number += 1
            used = 0
        used += size
        numbers[name] = number
    return numbers


def _save_file(tensors, path):
    with clear_errors(f"{path}: cannot be written"):
        save_file(tensors, path, {"format": "pt"})


def clip_gradients(module, max_norm):
    """Clip a module's gradients, sharded or not, to a global norm; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)
    return float(norm.full_tensor() if is_sharded(norm) else norm)


def is_sharded(x):
    """Whether a tensor is spread over ranks."""
    return isinstance(x, DTensor)


def announce(ranks, bf16, model, pairs, out):
    """A run's first lines: device, dtype, parameters, pairs ({name: list}), and where it writes."""
    device = f"CPU ({torch.get_num_threads()} threads)"
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name()
    count = sum(p.numel() for p in model.parameters())
    print0(f"device      {ranks.world} x {device}, {'bfloat16' if bf16 else 'float32'}")
    print0(f"parameters  {count:,}")
    sizes = [f"{name} {len(records):,}" for name, records in pairs.items()]
    print0(f"pairs       {', '.join(sizes)}")
    print0(f"output      {out}")


# Training: batches, learning rate, progress -------------------------------------------------------


def epoch_batch(records, size, step, *key):
    """The batch of a step (from 0): epochs of shuffles that depend on `key` alone.

    A function of the step, so no state has to be saved.
    """
    orders = {}
    batch = []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, len(records))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([*key, epoch]).permutation(len(records))
        batch.append(records[orders[epoch][place]])
    return batch


def learning_rate(peak, step, steps, final=0.1):
    """Warm-up over the first 5 % of the steps, then a cosine from the peak to `final` of it."""
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step + 1 - warmup) / max(1, steps - warmup)
    cosine = 0.5 + 0.5 * math.cos(math.pi * done)
    return peak * (final + (1 - final) * cosine)


class Progress:
    """How far a run is: its stage and step, its logs, its checkpoints. Stopped, it goes on.

    out: the run's folder, which gets config.json (the settings), the logs NAME.jsonl, checkpoints/
        and a lock. A folder of another run is refused, and so is one at work: a RunError says so,
        before anything is written. A finished one, which holds summary.json, raises Stopped.
    settings: a dict; those named in `free` may change when the run is taken up again. "inputs" is a
        hash of the files that go in.
    save_every: steps between checkpoints (0: ten minutes), beside the one at the end of each stage;
        keep: how many stay.
    max_bad_steps: so many steps in a row whose loss or gradient is not finite end the run.

    `status` is shown behind the progress bar, `summary` (JSON) is kept in checkpoints.
    """

    def __init__(
        self,
        out,
        settings,
        ranks,
        *,
        stage,
        free=(),
        logs=("metrics",),
        save_every=0,
        keep=2,
        max_bad_steps=3,
    ):
        self.out = Path(out)
        self.settings = settings
        self.ranks = ranks
        self.stage = stage
        self.free = free
        self.logs = logs
        self.save_every = save_every
        self.max_bad_steps = max_bad_steps
        self.step = 0  # steps of this stage that are finished
        self.done = 0  # of all stages, and changes of stage
        self.skipped = 0  # steps without an update
        self.bad_steps = 0  # of these, the last ones in a row
        self.summary = {}
        self.status = ""
        self.saved = None  # stage and step of the newest checkpoint
        self.saved_at = time.monotonic()
        self.checkpoints = Checkpoints(self.out / "checkpoints", ranks, keep)
        self._stop_if_finished(ranks.on_rank_0(self._check_out))

    def _stop_if_finished(self, message):
        if message:
            raise Stopped(message)

    def _check_out(self):
        """Raise RunError if OUT is of no use; returns what there is to say if it is finished."""
        path = self.out / "config.json"
        if self.out.exists() and not self.out.is_dir():
            raise RunError(f"--out {self.out}: not a folder")
        if not path.exists():
            names = {file.name for file in self.out.iterdir()} if self.out.exists() else set()
            if names - {"lock", "config.json.unfinished"}:
                raise RunError(f"--out {self.out}: holds other files; choose a new folder")
            return
        former = read_json(path, "choose another --out")
        differing = []
        for name, value in self.settings.items():
            if name == "inputs" and former.get(name) != value:
                differing.append("other contents of its task's or model's files")
            elif name not in self.free and former.get(name) != value:
                differing.append(f"--{name} {former.get(name)}")
        if differing:
            raise RunError(
                f"--out {self.out}: holds another run ({', '.join(differing)}); "
                "choose another folder, or delete it"
            )
        if (self.out / "summary.json").exists() and not self.checkpoints.folder.exists():
            return f"--out {self.out}: holds this run, finished; to repeat it, choose another"

    def start(self, module, optimizer):
        """Make the folder, or take up its newest checkpoint, of however many ranks."""
        self.module = module
        self.optimizer = optimizer
        self._stop_if_finished(self.ranks.on_rank_0(self._make_out))
        newest = self.checkpoints.newest()
        logs = {name: [0, hashlib.sha256().hexdigest()] for name in self.logs}
        if newest is not None:
            state = self.checkpoints.load(newest, module, optimizer)
            for name in ("stage", "step", "done", "skipped", "bad_steps", "summary"):
                setattr(self, name, state[name])
            logs = state["logs"]
            self.saved = (self.stage, self.step)
        self.ranks.on_rank_0(self._truncate_logs, logs)
        if newest is not None:
            print0(f"resumed {newest} at {self.stage} step {self.step}")
        self.board = None
        if self.ranks.rank == 0:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.out / "tensorboard")

    def _make_out(self):
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.out / "lock")
        except OSError as error:
            raise RunError(f"--out {self.out}: {error.strerror}") from None
        finished = self._check_out()  # once more: nobody else can write to it now
        if not finished:
            with writing(self.out / "config.json") as unfinished:
                unfinished.write_text(json.dumps(self.settings, indent=1) + "\n")
        return finished

    def _truncate_logs(self, logs):
        """Forget what came after the checkpoint: it is done again. Before that, nothing differs."""
        for name, (size, sha256) in logs.items():
            path = self.out / f"{name}.jsonl"
            with open(path, "a+b") as file:
                file.seek(0)
                if hashlib.sha256(file.read(size)).hexdigest() != sha256:
                    raise RunError(
                        f"{path}: shorter than at the newest checkpoint, or changed; "
                        f"put it back, or delete {self.out} to begin again"
                    )
                file.truncate(size)

    def steps(self, count):
        """Yield the steps of this stage that are still to do.

        After each: the progress bar, a checkpoint where one is due, and Stopped if asked to stop.
        """
        bar = Bar(total=count, initial=self.step, desc=self.stage, unit="step")
        with bar:
            while self.step < count:
                yield self.step
                self.step += 1
                self.done += 1
                bar.set_postfix_str(self.status, refresh=False)
                bar.update()
                if self._save_is_due(count):
                    self.save()
                self.stop_if_asked()

    def _save_is_due(self, count):
        if self.save_every:
            return self.step % self.save_every == 0 or self.step == count
        elapsed = self.ranks.max(time.monotonic() - self.saved_at)
        return elapsed > SAVE_SECONDS or self.step == count

    def stop_if_asked(self):
        """If any rank was asked to stop, save what is not saved yet, and raise Stopped."""
        if not self.ranks.stopping():
            return
        if self.saved != (self.stage, self.step):
            self.save()
        raise Stopped(
            f"stopped after {self.stage} step {self.step}; saved. "
            "The same command goes on from there"
        )

    @contextlib.contextmanager
    def interruptible(self):
        """Work that leaves the run as it is, so that it can be broken off anywhere: sampling, say.

        Asked to stop, the run saves and raises Stopped, here. Inside, no rank may wait for others;
        where the ranks of a group do, sampling together, it is finished first.
        """
        self.stop_if_asked()
        try:
            self.ranks.interruptible = self.ranks.group is None
            yield
            self.ranks.interruptible = False  # here, where a last signal is still caught below
        except KeyboardInterrupt:
            if not self.ranks.asked_to_stop:
                raise
        finally:
            self.ranks.interruptible = False
        self.stop_if_asked()

    def next_stage(self, stage):
        """Go on to another stage, with a fresh optimizer, from a checkpoint of this moment."""
        self.stage = stage
        self.step = 0
        self.done += 1  # so that this checkpoint does not replace the one of the former stage's end
        self.optimizer.state.clear()
        self.save()

    def optimizer_step(self, module, optimizer, loss, lr, max_norm=1.0):
        """Clip the gradients, take an optimizer step, clear them; returns the norm before clipping.

        loss: of all ranks. If it or the norm is not finite, all ranks skip the step alike; after
        max_bad_steps in a row this raises RunError.
        """
        norm = clip_gradients(module, max_norm)
        if math.isfinite(loss) and math.isfinite(norm):
            self.bad_steps = 0
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        else:
            self.skipped += 1
            self.bad_steps += 1
        optimizer.zero_grad()
        if self.bad_steps >= self.max_bad_steps:
            raise RunError(
                f"{self.stage} step {self.step + 1}: loss {loss}, gradient norm {norm}, "
                f"{self.bad_steps} times in a row; lower the learning rate. {self._last_saved()}"
            )
        return norm

    def log(self, name, record):
        """Append a record to OUT/NAME.jsonl, numbers that are not finite as null."""
        if self.ranks.rank:
            return
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        path = self.out / f"{name}.jsonl"
        with clear_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite, ensure_ascii=False) + "\n")
        if self.board and name in ("metrics", "tests"):
            for key, value in record.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{self.stage}/{key}", value, record["step"])

    def save(self):
        """Write a checkpoint. Raises RunError if that cannot be; the former ones are untouched."""
        try:
            state = self.ranks.on_rank_0(self._state)
            self.checkpoints.save(self.done, self.module, self.optimizer, state)
        except RunError as error:
            raise RunError(f"{error}. {self._last_saved()}") from error
        self.saved = (self.stage, self.step)
        self.saved_at = time.monotonic()

    def _state(self):
        names = ("stage", "step", "done", "skipped", "bad_steps", "summary")
        state = {name: getattr(self, name) for name in names}
        state["logs"] = {}
        for name in self.logs:
            path = self.out / f"{name}.jsonl"
            path.touch()
            _flush(path)
            state["logs"][name] = [path.stat().st_size, _sha256(path)]
        return state

    def _last_saved(self):
        newest = self.checkpoints.newest()
        return f"The last checkpoint is {newest}" if newest else "No checkpoint was saved yet"

    def save_summary(self):
        """Write OUT/summary.json. On rank 0."""
        with writing(self.out / "summary.json") as unfinished:
            unfinished.write_text(json.dumps(self.summary, indent=1) + "\n", encoding="utf-8")

    def finish(self):
        """The run is over, and all that it should leave is written: remove the rest. On rank 0."""
        if self.board:
            self.board.close()
        removed = unfinished_path(self.checkpoints.folder)
        os.replace(self.checkpoints.folder, removed)  # at once: a part of them would be damaged
        shutil.rmtree(removed)
        (self.out / "lock").unlink()


# Checkpoints --------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of a run, FOLDER/NNNNNN: each whole or not there; the newest `keep` stay.

    Weights and AdamW's moments are safetensors, each rank's parts a file, which any number of ranks
    may read. The rest is state.json. checksums.json holds the SHA-256 of all these.
    """

    def __init__(self, folder, ranks, keep=2):
        self.folder = Path(folder)
        self.ranks = ranks
        self.keep = keep

    def _all(self):
        return sorted(path for path in self.folder.glob("[0-9]*") if path.name.isdigit())

    def newest(self):
        """The folder of the newest checkpoint, or None."""
        return max(self._all(), default=None)

    def save(self, number, module, optimizer, state):
        """Write a checkpoint beside its place, and rename it when it is complete.

        state: a dict of JSON. Every rank must call it. Raises RunError, on every rank, if it cannot
        be written; the former checkpoints are untouched.
        """
        path = self.folder / f"{number:06d}"
        unfinished = unfinished_path(path)
        updates = [float(moments["step"]) for moments in optimizer.state.values()]
        state = state | {"updates": max(updates, default=0.0)}
        try:
            self.ranks.on_rank_0(self._begin, unfinished, state)
            save_tensors(unfinished, _training_tensors(module, optimizer))
            hashes = self._hash(unfinished)
            self.ranks.on_rank_0(self._complete, unfinished, path, hashes)
        except RunError:
            self.ranks.on_rank_0(shutil.rmtree, unfinished, True)  # True: whatever its errors
            raise

    def _begin(self, unfinished, state):
        for path in self.folder.glob("*.unfinished"):
            shutil.rmtree(path)
        unfinished.mkdir(parents=True)
        (unfinished / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")

    def _hash(self, folder):
        """{name: SHA-256} of a folder's files, of which each rank takes its share."""
        mine = hash_folder(folder, slice(self.ranks.rank, None, self.ranks.world))
        hashes = {}
        for part in self.ranks.gather_json(mine):
            hashes |= part
        return hashes

    def _complete(self, unfinished, path, hashes):
        put_in_place(unfinished, path, hashes)
        for old in self._all()[: -self.keep]:
            removed = unfinished_path(old)
            os.replace(old, removed)  # so that none is ever there in part
            shutil.rmtree(removed)

    def load(self, path, module, optimizer):
        """Fill a module and its optimizer from a checkpoint; returns the state saved with it.

        Raises RunError, on every rank, where it is damaged or does not fit.
        """
        hint = f"delete {path} to go on from an older checkpoint, or from the start"
        if not (path / "checksums.json").is_file():
            raise RunError(f"{path}: no checksums.json; {hint}")
        check_folder(path, hint, self._hash(path))
        state = read_json(path / "state.json", hint)
        load_tensors(path, _training_tensors(module, optimizer))
        for moments in optimizer.state.values():
            moments["step"].fill_(state["updates"])
        return state


def _training_tensors(module, optimizer):
    """Weights and AdamW's moments by name. Missing moments are made."""
    tensors = {}
    for name, p in module.named_parameters():
        moments = optimizer.state[p]
        if "exp_avg" not in moments:
            moments["step"] = torch.tensor(0.0)
            moments["exp_avg"] = torch.zeros_like(p)
            moments["exp_avg_sq"] = torch.zeros_like(p)
        tensors[f"model.{name}"] = p.detach()
        tensors[f"exp_avg.{name}"] = moments["exp_avg"]
        tensors[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
    return tensors


def save_tensors(folder, tensors):
    """Write {name: tensor, sharded or not} to a folder of safetensors; each rank its own parts.

    torch.distributed.checkpoint with its Hugging Face storage: the default storage keeps its index
    as a pickle. The writer has all of a file in memory, twice: so there are several. Raises
    RunError, on every rank, if any cannot write.
    """
    sizes = {name: _local(x).numel() * x.dtype.itemsize for name, x in tensors.items()}
    files = _file_numbers(sizes)
    writer = dcp.HuggingFaceStorageWriter(str(folder), files, save_distributed=True)
    with clear_errors(f"{folder}: cannot be written"):
        dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())


def load_tensors(folder, tensors):
    """Fill {name: tensor} in place from a folder that save_tensors wrote, with any number of ranks.

    Raises RunError, on every rank, for a folder that is damaged or holds other tensors.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with clear_errors(f"{folder}: cannot be read"):
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
