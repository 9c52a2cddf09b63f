"""Many processes that compute what one would, and checkpoints that outlive them.     (how does it run for hours on many GPUs?)

`torchrun` starts one process (rank) for each GPU. Each takes its share of a batch; what is global (losses, norms, metrics,
the decision to stop) is summed or gathered, so results do not depend on the number of ranks beyond rounding:

    ranks = Ranks(timeout_s=1800)                                # one process without torchrun
    policy = ranks.shard(skeleton, weights, half=True)           # FSDP2: float32 master weights, bf16 compute
    mine = batch[ranks.share(len(batch))]
    loss = policy(lambda: loss_of(mine)); loss.backward()        # gradients are summed over the ranks, not averaged
    total = ranks.sum([float(loss)])[0]
    save_tensors(folder, named_tensors)                          # whatever is sharded, in safetensors; any number of ranks
    load_tensors(folder, named_tensors)                          # may read it

Whatever travels between ranks is a tensor or JSON. This file needs torch, numpy and safetensors only; copy it alone.
"""

import contextlib
import json
import os
import sys
import warnings
from datetime import timedelta

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
        cuda, self.mesh = torch.cuda.is_available(), None
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

    def leave(self):
        """End this process, one of several, with exit code 0; without others, do nothing.

        Not by way of the interpreter: now and then threads of the process group abort it on its way out.
        """
        if self.world > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

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

    def sum_gradients(self, model):
        """Add up the ranks' gradients of a model that each of them holds whole; a missing gradient counts as zeros."""
        if self.world > 1:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            for p, part in zip(model.parameters(), flat.split([grad.numel() for grad in grads]), strict=True):
                p.grad = part.view_as(p)

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

    # Models

    def shard(self, skeleton, weights, half=False):
        """Shard a Hugging Face model over the ranks with FSDP2; returns the module through which losses are computed.

        skeleton: the model on the meta device, on every rank; it becomes the sharded one, with float32 master weights.
        weights: the loaded model on rank 0's CPU, None elsewhere: no other rank ever holds it whole. half: compute in
        bfloat16, reduce gradients in float32. Call the result with a function: FSDP gathers the weights of the head and
        the embedding around it, and those of each layer around the layer.
        """
        policy, dtype = _Policy(skeleton), torch.bfloat16 if half else None
        settings = {"mesh": self.mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
        for module in (*skeleton.base_model.layers, policy):
            fully_shard(module, **settings)
        for module in policy.modules():
            if isinstance(module, FSDPModule):  # losses are divided by global counts, so gradients are summed
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        self._fill(skeleton, weights)
        return policy

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


class CheckpointError(OSError):
    """A checkpoint that cannot be written or read."""


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
