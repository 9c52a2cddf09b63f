"""The story, top to bottom: SFT warm-up -> reinforcement learning -> the table.

    torchrun train.py                                                    # the embedded task, a few minutes on 2 CPU cores
    torchrun train.py --task FOLDER --model Qwen/Qwen3-0.6B              # your criteria, your pairs, your model
    torchrun --nproc-per-node 8 train.py --save_every 20                 # eight GPUs; the same command again goes on
    python train.py --help                                               # every setting, with its default

1. Fine-tune on demonstrations (TASK/sft.jsonl), so that the model reasons in the criteria's format. Skipped if there are none.
2. Reinforce on labels (TASK/train.jsonl): sample groups of answers, reward exact matches, give each step the credit that it
   earned (sam.py), update.
3. Evaluate on every TASK/test*.jsonl before and after, by metrics that are not the reward.

OUT gets config.json, metrics.jsonl, timing.jsonl, samples.jsonl, curves.png, summary.json, and the Hugging Face folders sft/
and model/. Settings come from the command line, then TASK/train.json, then the defaults below (which fit real models).

Several processes compute what one would (parallel.py). All randomness is drawn from (seed, step, row), so there is no state of
random generators to save, and a resumed run writes the metrics.jsonl of one that was never stopped.

Left out on purpose: reward models, critics, LoRA, trainer classes.
Shapes: P prompts, G answers a prompt, N = P * G answers, T token positions, A answer tokens, K steps, D model width.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as hf_logging

import grm
import parallel
import rollout
import sam
from grm import setting


@dataclass
class Config:
    """All settings of a run. The defaults are for models of 0.6 B to 8 B parameters; TASK/train.json may hold others."""

    task: str = setting("data/notes", "task folder: criteria.md, train.jsonl, test*.jsonl, optionally sft.jsonl and train.json")
    model: str = setting("", "model folder or hub name; a folder without weights starts fresh (default: TASK/model)")
    out: str = setting("", "folder for everything that the run writes (default: runs/NAME_OF_TASK)")
    seed: int = setting(0, "seeds fresh weights, the order of the data, and sampling")
    max_new_tokens: int = setting(512, "longest answer, in tokens, EOS included")
    max_tokens: int = setting(32768, "token budget of one forward and backward pass (micro-batch)")
    cache_tokens: int = setting(131072, "token budget of the key-value cache when sampling")
    eval_every: int = setting(50, "evaluate on the test sets every so many RL steps (0: only before and after)")
    save_every: int = setting(0, "save a checkpoint every so many steps (0: after SFT, and when stopped)")
    keep: int = setting(2, "checkpoints to keep, the newest")
    resume: str = setting("auto", "auto: from the newest checkpoint in OUT; off: never; or a checkpoint's folder")
    max_bad_steps: int = setting(3, "stop after so many steps in a row with a loss or gradient that is not finite")
    timeout: int = setting(1800, "seconds that a rank waits for another before the job ends")
    shard_size: int = setting(0, "ranks that share one copy of the weights (0: all); groups of them hold copies")
    activation_checkpointing: bool = setting(False, "keep the inputs of layers only and compute the rest again: less memory")
    plan: bool = setting(False, "print what each GPU will hold for --model, and stop; reads its config alone")
    gpus: int = setting(8, "of --plan: number of GPUs")
    gpu_gb: float = setting(80, "of --plan: memory of a GPU, in GB (10^9 bytes)")
    # SFT
    sft_steps: int = setting(400, "steps of supervised fine-tuning on TASK/sft.jsonl (0: none)")
    sft_batch: int = setting(64, "demonstrations a step")
    sft_lr: float = setting(1e-5, "peak learning rate of SFT: warm-up over 5 % of the steps, then cosine to a tenth")
    # RL
    rl_steps: int = setting(300, "steps of reinforcement learning on TASK/train.jsonl (0: none)")
    prompts_per_step: int = setting(32, "prompts a step")
    group_size: int = setting(16, "answers sampled for each prompt")
    temperature: float = setting(1.0, "sampling temperature; the trainer scores under the same")
    rule: Literal["symmetric", "positive", "none"] = setting("symmetric", "stepwise masking rule; none is plain GRPO")
    step_targets: Literal["labels", "final"] = setting("labels", "a step's target: its step_labels, or the final label")
    lr: float = setting(1e-6, "peak learning rate of RL, same schedule")
    updates_per_batch: int = setting(1, "optimizer steps on each batch of answers")
    clip_low: float = setting(0.2, "the probability ratio is clipped at 1 - clip_low")
    clip_high: float = setting(0.2, "the probability ratio is clipped at 1 + clip_high")
    normalize_std: bool = setting(True, "divide advantages by their group's standard deviation")
    advantage_clamp: float = setting(0.0, "limit advantages to +- this (0: no limit)")
    sft_coef: float = setting(0.0, "mode balance: weight of the SFT loss on a batch of demonstrations in each RL step")
    curriculum: Literal["off", "passrate"] = setting("off", "passrate: prefer pairs that the model gets right sometimes")
    kl_coef: float = setting(0.0, "weight of the KL to the model at the start of RL (k2 estimator); keeps a frozen copy")
    is_cap: float = setting(2.0, "cap of the importance weight between sampler and trainer")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this global norm")


def parse_config(argv=None):
    """Command line over TASK/train.json over defaults. Raises grm.TaskError for settings that are unknown or impossible."""
    config, task = grm.parse_settings(Config, "train.json", __doc__.split("\n")[0], argv)
    config.model = config.model or str(task / "model")
    config.out = config.out or str(Path("runs") / task.resolve().name)
    at_least = dict.fromkeys(("max_new_tokens", "max_tokens", "cache_tokens", "sft_batch", "prompts_per_step"), 1)
    at_least |= dict.fromkeys(
        ("seed", "sft_steps", "rl_steps", "eval_every", "save_every", "kl_coef", "sft_coef", "weight_decay"), 0
    )
    at_least |= dict.fromkeys(("gpus", "keep", "max_bad_steps", "timeout", "updates_per_batch"), 1) | {"shard_size": 0}
    at_least |= {"group_size": 2, "advantage_clamp": 0, "clip_low": 0, "clip_high": 0}
    for name, least in at_least.items():
        if not getattr(config, name) >= least:
            raise grm.TaskError(f"--{name} {getattr(config, name)}: must be at least {least}")
    for name in ("sft_lr", "lr", "temperature", "max_grad_norm", "is_cap", "gpu_gb"):
        if not 0 < getattr(config, name) < math.inf:
            raise grm.TaskError(f"--{name} {getattr(config, name)}: must be positive and finite")
    if not config.sft_steps and not config.rl_steps:
        raise grm.TaskError("--sft_steps and --rl_steps are both 0: nothing to do; grm.py score evaluates a model")
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    sharing = config.gpus if config.plan else ranks
    if config.shard_size and sharing % config.shard_size:
        raise grm.TaskError(f"--shard_size {config.shard_size}: does not divide the {sharing} ranks")
    for name in ("prompts_per_step", "sft_batch"):
        if getattr(config, name) < ranks:
            raise grm.TaskError(f"--{name} {getattr(config, name)}: is less than one for each of the {ranks} ranks")
    return config


# Data -----------------------------------------------------------------------------------------------------------------


def load_data(config, task, tokens, say=tqdm.write):
    """Read, check and tokenise all files of the task: {"sft": [...], "train": [...], "test_x": [...]}, with prompt ids."""
    folder, data = Path(config.task), {}
    if config.sft_coef and not (folder / "sft.jsonl").is_file():
        raise grm.TaskError(f"--sft_coef {config.sft_coef}: needs demonstrations, {folder / 'sft.jsonl'}")
    if (config.sft_steps or config.sft_coef) and (folder / "sft.jsonl").is_file():
        data["sft"] = task.read(folder / "sft.jsonl", ("response",))
        for record in data["sft"]:
            record["answer_ids"] = tokens.response(record["response"])
            if problem := tokens.parse(record["answer_ids"]).problem:
                raise grm.TaskError(f"{record['where']}: the response does not parse: {problem}")
            if len(record["answer_ids"]) > config.max_new_tokens:
                raise grm.TaskError(
                    f"{record['where']}: the response has {len(record['answer_ids'])} tokens, more than --max_new_tokens"
                )
    if config.rl_steps:
        data["train"] = task.read(folder / "train.jsonl")
        for record in data["train"]:
            if config.step_targets == "final" or len(task.boxes) == 1:
                record["targets"] = [record["label"]] * len(task.boxes)
            elif "step_labels" in record:
                record["targets"] = record["step_labels"]
            elif config.rule != "none":
                raise grm.TaskError(f"{record['where']}: no step_labels; use --step_targets final or --rule none")
    for path in sorted(folder.glob("test*.jsonl")):
        data[path.stem] = task.read(path)
    if not any(name.startswith("test") for name in data):
        raise grm.TaskError(f"{folder}: holds no test*.jsonl to evaluate on")
    for name, records in data.items():
        before = tokens.truncated
        for record, prompt in zip(records, tokens.prompts(records), strict=True):
            record["prompt_ids"] = prompt
        if tokens.truncated > before:
            say(f"{name}: {tokens.truncated - before} of {len(records)} documents cut to fit the model's context")
    for name, records in data.items():
        if name != "sft":  # these are sampled
            try:
                group_size = config.group_size if name == "train" else 1
                rollout.fit_rows([r["prompt_ids"] for r in records], group_size, config.max_new_tokens, config.cache_tokens)
            except ValueError as error:
                raise grm.TaskError(f"{name}: {error}") from None
    longest = max((len(r["prompt_ids"]) for r in data.get("train", ())), default=0)
    if longest and (need := longest + config.group_size * config.max_new_tokens) > config.max_tokens:
        say(f"--max_tokens {config.max_tokens}: a group of answers may need {need}; it will be a micro-batch all the same")
    return data


def batch_at(records, size, step, *key):
    """The batch of a step (from 0): epochs of a shuffled order that depends on `key` alone, so no state has to be saved."""
    orders, out = {}, []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, len(records))
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([*key, epoch]).permutation(len(records))
        out.append(records[orders[epoch][place]])
    return out


class Curriculum:
    """Which training pairs each RL step samples.

    Pairs with a `stage` (integers; without: 0) come stage by stage, each for its share of the steps. Within a stage, "off"
    draws them in shuffled epochs. "passrate" (ours; AFRL and DyKnow-RAG choose pairs by pass rate too) draws each with
    a weight of 1 - p^G - (1 - p)^G, the chance that a group of G answers is neither all right nor all wrong, where p is
    the pair's running pass rate; pairs that are mastered or out of reach keep a little weight, so that they are seen again.
    """

    LEAST, MEMORY = 0.02, 0.5  # weight that every pair keeps; what earlier visits count at each new one

    def __init__(self, records, config):
        self.records, self.config = records, config
        self.right, self.seen = np.zeros(len(records)), np.zeros(len(records))
        stages = sorted({r.get("stage", 0) for r in records})
        self.members = [[i for i, r in enumerate(records) if r.get("stage", 0) == stage] for stage in stages]
        ends = np.cumsum([len(members) for members in self.members]) / len(records) * config.rl_steps
        self.ends = [round(end) for end in ends]  # the step at which each stage ends

    def batch(self, step):
        """Indices of the pairs of a step."""
        stage = next(i for i, end in enumerate(self.ends) if step < end)
        members, size = self.members[stage], self.config.prompts_per_step
        if self.config.curriculum == "off":
            return batch_at(members, size, step - (self.ends[stage - 1] if stage else 0), self.config.seed, 1)
        pass_rate = (self.right[members] + 0.5) / (self.seen[members] + 1)
        weights = 1 - pass_rate**self.config.group_size - (1 - pass_rate) ** self.config.group_size + self.LEAST
        draw = np.random.default_rng([self.config.seed, 1, step])
        repeat = size > len(members)
        return [members[i] for i in draw.choice(len(members), size, replace=repeat, p=weights / weights.sum())]

    def update(self, indices, rewards_PG):
        """Take in what a step's groups were rewarded."""
        for i, rewards_G in zip(indices, rewards_PG.tolist(), strict=True):
            self.right[i] = self.MEMORY * self.right[i] + sum(rewards_G)
            self.seen[i] = self.MEMORY * self.seen[i] + len(rewards_G)


def learning_rate(peak, step, steps):
    """Warm-up over the first 5 % of a stage's steps, then a cosine down to a tenth of the peak."""
    warm = max(1, round(0.05 * steps))
    progress = max(0.0, (step + 1 - warm) / max(1, steps - warm))
    return peak * min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * progress))


# The run --------------------------------------------------------------------------------------------------------------


# What may change when a run is taken up again, since results do not depend on it beyond rounding.
FREE = {"out", "plan", "gpus", "gpu_gb", "max_tokens", "cache_tokens", "save_every", "keep", "resume", "max_bad_steps",
        "timeout", "shard_size", "activation_checkpointing"}  # fmt: skip


class Run:
    """A run's models, optimizer, logs and place in the story; `save` and `resume` carry all of it."""

    def __init__(self, config, ranks):
        self.config, self.ranks, self.out = config, ranks, Path(config.out)
        self.stage, self.step, self.summary = "sft", 0, {}
        self.skipped, self.bad_steps = 0, 0  # steps without an update: in all, and the last ones in a row
        self.task = grm.Task.load(config.task)
        self.checkpoints = parallel.Checkpoints(self.out / "checkpoints", ranks, config.keep)
        checkpoint = self.find_checkpoint()
        self.half = ranks.device.type == "cuda"  # bf16 compute and sampling over float32 master weights
        load, self.tokenizer = partial(self.load, config.model), grm.load_model(config.model, "meta")[1]
        self.model, self.call = ranks.shard(load, self.half)
        self.sampler, self.reference = ranks.whole(load, self.model, self.half), None
        # 16: room to force the box's opening behind an answer that did not end
        room = self.model.config.max_position_embeddings - config.max_new_tokens - 16
        if room < 1:
            raise grm.TaskError(f"--max_new_tokens {config.max_new_tokens}: leaves no room for a prompt in the model's context")
        self.tokens = grm.TokenTask(self.task, self.tokenizer, room)
        self.data = load_data(config, self.task, self.tokens, self.say)
        self.curriculum = Curriculum(self.data.get("train", []), config) if config.rl_steps else None
        self.new_optimizer()
        try:
            ranks.first(lambda: self.out.mkdir(parents=True, exist_ok=True))
        except OSError as error:
            raise grm.TaskError(f"--out {error}") from None
        if checkpoint:
            self.resume(checkpoint)
        elif ranks.rank == 0:
            for name in ("metrics", "timing", "samples"):
                (self.out / f"{name}.jsonl").write_text("")
        if ranks.rank == 0:
            (self.out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        self.board = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.out / "tensorboard") if ranks.rank == 0 else None

    def find_checkpoint(self):
        """The checkpoint to go on from, or None for a fresh start. TaskError if OUT holds another run or a finished one."""
        path, config, resume = self.out / "config.json", self.config, self.config.resume
        if self.out.exists() and not self.out.is_dir():
            raise grm.TaskError(f"--out {self.out}: not a folder")
        if not path.exists() and self.out.exists() and any(self.out.iterdir()):
            raise grm.TaskError(f"--out {self.out}: holds other files; choose an empty or new folder")
        if path.exists():
            try:
                former = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise grm.TaskError(f"{path}: not JSON ({error}); choose another --out") from None
            if names := parallel.differing(asdict(config), former, FREE):
                raise grm.TaskError(f"--out {self.out}: holds another run ({names}); choose another folder, or delete it")
            if (self.out / "summary.json").exists():
                raise grm.TaskError(f"--out {self.out}: holds this run, finished; choose another folder, or delete it")
            if resume == "off":
                raise grm.TaskError(f"--resume off: --out {self.out} holds a run; choose another folder, or delete it")
        if resume not in ("auto", "off"):
            if not (Path(resume) / "state.json").is_file():
                raise grm.TaskError(f"--resume {resume}: not a checkpoint (they are in OUT/checkpoints); auto takes the newest")
            return Path(resume)
        return self.checkpoints.newest()

    def load(self, source, device):
        """A model from a folder or hub name, on a device, under tree attention."""
        model = rollout.use_tree_attention(grm.load_model(source, device, seed=self.config.seed)[0])
        return checkpoint_layers(model) if self.config.activation_checkpointing else model

    def new_optimizer(self):
        """AdamW over float32 master weights; each stage starts with a fresh one."""
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=self.config.weight_decay
        )

    def backward(self, loss_of, slices):
        """Gradients of the loss, summed over micro-batches and all ranks; returns that loss."""
        eos = self.tokens.eos_id
        nothing = lambda: 0 * self.answer_logprobs(self.model, [[eos]], [[[eos]]])[0].sum()
        self.optimizer.zero_grad()
        return self.ranks.backward(self.call, loss_of, slices, nothing)

    @torch.no_grad()
    def reference_logprobs(self, prompts, answers, width):
        """Log-probabilities [N, width] of the answers under the model at the start of RL."""
        config, (model, call), G = self.config, self.reference, self.config.group_size
        out_NT, eos = torch.zeros(len(prompts) * G, width, device=model.device), self.tokens.eos_id
        for part in self.ranks.passes(rollout.micro_batches(prompts, answers, config.max_tokens)):
            texts = (prompts[part], answers[part]) if part else ([[eos]], [[[eos]]])
            logprobs_A, _, tree = call(partial(self.answer_logprobs, model, *texts, config.temperature))
            if part:
                rows_NT = tree.to_rows(logprobs_A)
                out_NT[part.start * G : part.stop * G, : rows_NT.shape[1]] = rows_NT
        return out_NT

    def update(self, loss, lr):
        """Clip, take the optimizer step, refresh the sampler's copy; returns the gradient norm before clipping.

        A step whose loss or gradient is not finite is skipped on all ranks (both are global, so all see the same);
        grm.TaskError after max_bad_steps in a row.
        """
        norm = parallel.clip_gradients(self.model, self.config.max_grad_norm)
        if not math.isfinite(loss + norm):
            self.skipped, self.bad_steps = self.skipped + 1, self.bad_steps + 1
            if self.bad_steps >= self.config.max_bad_steps:
                raise grm.TaskError(
                    f"{self.stage} step {self.step + 1}: loss {loss}, gradient norm {norm}, {self.bad_steps} times in a row; "
                    f"lower the learning rate. {self.last_checkpoint()}"
                )
            return norm
        self.bad_steps = 0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.sampler is not self.model:
            parallel.copy_weights(self.sampler, self.model)
        return norm

    def last_checkpoint(self):
        """A sentence for those whose run ends here."""
        saved = self.checkpoints.newest()
        return f"The last checkpoint is {saved}" if saved else "No checkpoint was saved yet"

    def answer_logprobs(self, model, prompts, answers, temperature=1.0):
        """Log-probabilities and entropies [A] of the answers' tokens, and their packed Tree."""
        tree = rollout.Tree(prompts, answers, model.device)
        hidden_AD = rollout.answer_hidden(model, tree)
        return (*rollout.token_logprobs(hidden_AD, model.get_output_embeddings(), tree.targets_A, temperature), tree)

    def log(self, name, record):
        """Append a record to OUT/name.jsonl; figures of metrics.jsonl go to TensorBoard too. Not-finite numbers become null."""
        if self.ranks.rank:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with open(self.out / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(finite, ensure_ascii=False) + "\n")
        if self.board and name == "metrics":
            for key, value in record.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{record['stage']}/{key}", value, record["step"])

    def fingerprint(self):
        """Of the task's criteria and training data and of the model's tokens: a checkpoint of others is refused."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        for name in ("criteria.md", "sft.jsonl", "train.jsonl"):
            if (Path(self.config.task) / name).is_file():
                digest.update((Path(self.config.task) / name).read_bytes())
        return digest.hexdigest()

    def save(self):
        """Write a checkpoint; grm.TaskError if that cannot be."""
        done = self.step + (self.config.sft_steps if self.stage != "sft" else 0)
        try:
            self.checkpoints.save(done, self.model, self.optimizer, self.state)
        except parallel.CheckpointError as error:
            raise grm.TaskError(f"{error}. {self.last_checkpoint()}") from error

    def state(self):
        """What a checkpoint holds beside tensors."""
        sizes = {}
        for name in ("metrics", "timing", "samples"):
            with open(self.out / f"{name}.jsonl", "a") as file:
                os.fsync(file)
                sizes[name] = file.tell()
        state = {name: getattr(self, name) for name in ("stage", "step", "summary", "skipped", "bad_steps")}
        state |= {"log_sizes": sizes, "fingerprint": self.fingerprint(), "config": asdict(self.config)}
        if self.curriculum:
            state["pass_rates"] = {"right": self.curriculum.right.tolist(), "seen": self.curriculum.seen.tolist()}
        return state

    def resume(self, path):
        """Take up weights, optimizer, stage, step and logs from a checkpoint, which any number of ranks may have written."""
        try:
            state = self.checkpoints.read(path)
            if state.get("fingerprint") != self.fingerprint():
                raise grm.TaskError(f"{path}: a checkpoint of another task or tokenizer; choose another --out, or delete it")
            if names := parallel.differing(asdict(self.config), state["config"], FREE):
                raise grm.TaskError(f"{path}: a checkpoint of a run with other settings ({names})")
            self.checkpoints.load(path, self.model, self.optimizer)
        except parallel.CheckpointError as error:
            hint = "if it is damaged, or of another model, name an older one: --resume FOLDER"
            raise grm.TaskError(f"{error}; {hint}") from error
        if self.sampler is not self.model:
            parallel.copy_weights(self.sampler, self.model)
        for name in ("stage", "step", "summary", "skipped", "bad_steps"):
            setattr(self, name, state[name])
        for name, values in state.get("pass_rates", {}).items():
            setattr(self.curriculum, name, np.array(values))
        self.ranks.first(lambda: self.go_back(path, state["log_sizes"]))
        self.say(f"resumed {path} at {self.stage} step {self.step}")

    def go_back(self, path, sizes):
        """Forget, in OUT, what came after the checkpoint (on rank 0): it is done again."""
        for name, size in sizes.items():
            with open(self.out / f"{name}.jsonl", "a") as file:
                file.truncate(min(size, file.tell()))
        self.checkpoints.forget_after(path)

    def say(self, text):
        """A line for the terminal, once for all ranks."""
        if not self.ranks.rank:
            tqdm.write(text)

    def export(self, name):
        """Write OUT/name as a Hugging Face folder that from_pretrained and serving engines load: bf16 on CUDA, else float32."""

        def write():
            temporary = self.out / f"{name}.unfinished"
            self.sampler.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            self.task.save(temporary)
            shutil.rmtree(self.out / name, ignore_errors=True)
            os.replace(temporary, self.out / name)

        self.sampler.generation_config = GenerationConfig(
            eos_token_id=self.tokens.eos_id, pad_token_id=self.tokenizer.pad_token_id, do_sample=False
        )
        self.ranks.first(write)

    def evaluate(self):
        """Metrics of greedy answers, {test set: metrics}, on every test set of the task; each rank judges its share."""
        budgets = (self.config.max_new_tokens, self.config.max_tokens, self.config.cache_tokens)
        engine, out, start = rollout.TreeEngine(self.sampler, self.tokens.eos_id, *budgets), {}, time.perf_counter()
        for name in (name for name in self.data if name.startswith("test")):
            records = self.data[name]
            mine = records[self.ranks.share(len(records))]
            judged = self.ranks.gather_json(grm.judge(self.tokens, engine, mine) if mine else [])
            out[name] = grm.metrics(self.task, records, [prediction for part in judged for prediction in part])
        self.log("timing", {"stage": self.stage, "step": self.step, "evaluation_s": time.perf_counter() - start})
        return out

    def finish_stage(self, name, following):
        """Evaluate on all test sets and make ready for the next stage."""
        self.summary[name] = self.evaluate()
        self.stage, self.step = following, 0
        self.new_optimizer()

    def steps(self, count, describe):
        """Yield the steps of a stage with a progress bar; saves every save_every steps, and when asked to stop."""
        quiet = True if self.ranks.rank else None
        bar = tqdm(total=count, initial=self.step, desc=self.stage, unit="step", disable=quiet, dynamic_ncols=True)
        while self.step < count:
            yield self.step
            self.step += 1
            bar.set_postfix_str(describe(), refresh=False)
            bar.update()
            stop = self.ranks.stopping()
            if stop or (self.config.save_every and self.step % self.config.save_every == 0):
                self.save()
            if stop:
                bar.close()
                raise parallel.Stopped(
                    f"stopped after {self.stage} step {self.step}; saved. The same command goes on from there"
                )
        bar.close()


def checkpoint_layers(model):
    """Keep only the inputs of a model's layers for the backward pass, and compute the rest again; returns the model."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.base_model.layers:
        layer.training = True  # of the layer alone: transformers checkpoints in train mode, while dropout stays off
    return model


def sft(run):
    """Supervised fine-tuning: the mean negative log-likelihood of the demonstrations' tokens, EOS included."""
    config, last = run.config, {}
    for step in run.steps(config.sft_steps, lambda: f"loss {last['loss']:.3f}, {last['tok_s']:.0f} tok/s"):
        start = time.perf_counter()
        batch = batch_at(run.data["sft"], config.sft_batch, step, config.seed, 0)
        count, mine = sum(len(r["answer_ids"]) for r in batch), batch[run.ranks.share(len(batch))]
        prompts, answers = [r["prompt_ids"] for r in mine], [[r["answer_ids"]] for r in mine]

        def loss_of(part, prompts=prompts, answers=answers, count=count):
            logprobs_A, _, _ = run.answer_logprobs(run.model, prompts[part], answers[part])
            return -logprobs_A.sum() / count

        loss = run.backward(loss_of, rollout.micro_batches(prompts, answers, config.max_tokens))
        lr = learning_rate(config.sft_lr, step, config.sft_steps)
        norm, seconds = run.update(loss, lr), time.perf_counter() - start
        last.update(loss=loss, tok_s=count / seconds)
        record = {"stage": "sft", "step": step + 1, "loss": loss, "grad_norm": norm, "lr": lr, "skipped": run.skipped}
        run.log("metrics", record)
        run.log("timing", {"stage": "sft", "step": step + 1, "update_s": seconds, "tok_s": count / seconds})


def assign_credit(run, batch, sampled):
    """Parse and reward the answers to this rank's prompts, and give each token its credit: (credit_NT, advantages_N,
    rewards_PG, traces)."""
    config, K = run.config, len(run.task.boxes)
    traces = [[run.tokens.parse(answer) for answer in group] for group in sampled.answers()]
    rewards_PG = torch.tensor(
        [[grm.reward(trace, r["label"]) for trace in group] for r, group in zip(batch, traces, strict=True)]
    )
    advantages_PG = sam.group_advantages(rewards_PG, config.normalize_std, config.advantage_clamp or None)
    ends, right = [], []
    for record, group in zip(batch, traces, strict=True):
        for trace in group:
            ends.append([s.end for s in trace.steps] or [0] * K)
            right.append(grm.step_verdicts(trace, record.get("targets", ())) or [False] * K)
    device = sampled.ids_NT.device
    advantages_N, ends, right = (x.to(device) for x in (advantages_PG.flatten(), torch.tensor(ends), torch.tensor(right)))
    width = int(sampled.lengths_N.max())
    credit_NT = sam.stepwise_credit(advantages_N, ends, right, sampled.lengths_N, width, config.rule)
    return credit_NT, advantages_N, rewards_PG, traces


def rl_update(run, prompts, sampled, credit_NT, lr, demonstrations=()):
    """The optimizer steps on one batch of answers, with sft_coef * SFT loss of the demonstrations (mode balance, AFRL,
    arXiv 2602.10006) in the same forward passes; returns the figures to log."""
    config, G, P, head = run.config, run.config.group_size, len(prompts), run.model.get_output_embeddings()
    rl_answers, sampler_NT, width = sampled.answers(), sampled.logprobs_NT, credit_NT.shape[1]
    reference_NT = run.reference_logprobs(prompts, rl_answers, width) if run.reference else None
    prompts = prompts + [r["prompt_ids"] for r in demonstrations]
    answers = rl_answers + [[r["answer_ids"]] for r in demonstrations]
    slices = rollout.micro_batches(prompts, answers, config.max_tokens)
    own = [int(sampled.lengths_N.sum()), sum(len(r["answer_ids"]) for r in demonstrations)]
    (denominator, sft_tokens), old, sums = run.ranks.sum(own), {}, Counter()

    def rl_loss(mine, hidden_AD, tree):  # of the answers of prompts[mine], the first ones in the tree
        rows, lengths_N = slice(mine.start * G, mine.stop * G), tree.lengths_N[: (mine.stop - mine.start) * G]
        logprobs_A, entropy_A = rollout.token_logprobs(hidden_AD, head, tree.targets_A[: len(hidden_AD)], config.temperature)
        mask_NT = torch.arange(width, device=lengths_N.device) < lengths_N[:, None]
        logprobs_NT = torch.zeros(mask_NT.shape, device=mask_NT.device).masked_scatter(mask_NT, logprobs_A)
        old.setdefault(mine.start, logprobs_NT.detach())  # of the first update: the policy at the start of the step
        loss, stat = sam.policy_loss(
            logprobs_NT, credit_NT[rows], mask_NT, denominator, old[mine.start], sampler_NT[rows, :width],
            None if reference_NT is None else reference_NT[rows],
            config.clip_low, config.clip_high, config.is_cap, config.kl_coef,
        )  # fmt: skip
        sums.update(asdict(stat) | {"entropy": float(entropy_A.sum())})
        return loss

    def loss_of(part):
        tree = rollout.Tree(prompts[part], answers[part], run.model.device)
        hidden_AD = rollout.answer_hidden(run.model, tree)
        mine = slice(part.start, max(part.start, min(part.stop, P)))
        count = sum(len(answer) for group in answers[mine] for answer in group)
        loss = rl_loss(mine, hidden_AD[:count], tree) if count else 0.0
        if part.stop > P:  # demonstrations: always at temperature 1
            logprobs_A, _ = rollout.token_logprobs(hidden_AD[count:], head, tree.targets_A[count:])
            sums["sft_loss"] -= float(logprobs_A.detach().sum()) / sft_tokens
            loss = loss - config.sft_coef * logprobs_A.sum() / sft_tokens
        return loss

    for _ in range(config.updates_per_batch):
        loss = run.backward(loss_of, slices)
        norm = run.update(loss, lr)
    names = ["entropy", *(field.name for field in fields(sam.LossStats)), "sft_loss"]
    totals = dict(zip(names, run.ranks.sum([sums[name] for name in names]), strict=True))
    tokens, sft_loss = totals.pop("tokens"), totals.pop("sft_loss") / config.updates_per_batch
    record = {"loss": loss, "grad_norm": norm, "lr": lr, "skipped": run.skipped}
    record |= {name: total / tokens for name, total in totals.items()}
    return record | ({"sft_loss": sft_loss} if demonstrations else {})


def rl(run):
    """Group-relative RL: sample, reward, assign credit, update."""
    config, before = run.config, next(iter(run.summary.values()))
    last = {"accuracy": np.mean([m["accuracy"] for m in before.values()])}
    if config.kl_coef:
        start = run.out / "sft" if (run.out / "sft").exists() else config.model
        run.reference = run.ranks.shard(partial(run.load, start), run.half)
    describe = lambda: f"reward {last['reward']:.2f}, accuracy {last['accuracy']:.3f}, {last['tok_s']:.0f} tok/s"
    for step in run.steps(config.rl_steps, describe):
        started = time.perf_counter()
        indices = run.curriculum.batch(step)
        mine = run.ranks.share(len(indices))
        batch = [run.data["train"][i] for i in indices[mine]]
        demonstrations = batch_at(run.data["sft"], config.sft_batch, step, config.seed, 2) if config.sft_coef else []
        demonstrations = demonstrations[run.ranks.share(len(demonstrations))]
        prompts = [r["prompt_ids"] for r in batch]
        sampled = rollout.sample(
            run.sampler, prompts, group_size=config.group_size, max_new_tokens=config.max_new_tokens,
            eos_id=run.tokens.eos_id, temperature=config.temperature, seed=config.seed, step=step,
            first_row=mine.start * config.group_size, cache_tokens=config.cache_tokens,
        )  # fmt: skip
        sampled_at = time.perf_counter()
        credit_NT, advantages_N, rewards_PG, traces = assign_credit(run, batch, sampled)
        record, all_rewards_PG, tokens = rollout_record(run, step, sampled, credit_NT, advantages_N, rewards_PG, traces)
        run.curriculum.update(indices, all_rewards_PG)
        lr = learning_rate(config.lr, step, config.rl_steps)
        record |= rl_update(run, prompts, sampled, credit_NT, lr, demonstrations)
        updated_at = time.perf_counter()
        if config.eval_every and (step + 1) % config.eval_every == 0:
            scores = run.evaluate()
            record |= {f"{test}/{name}": m[name] for test, m in scores.items() for name in ("accuracy", "macro_f1")}
            last["accuracy"] = np.mean([m["accuracy"] for m in scores.values()])
        run.log("metrics", record)
        if step % 10 == 0:
            log_samples(run, step + 1, batch, sampled, traces, rewards_PG, credit_NT)
        times = {"sampling_s": sampled_at - started, "update_s": updated_at - sampled_at}
        times |= {"sampling_tok_s": tokens / times["sampling_s"], "update_tok_s": tokens / times["update_s"]}
        run.log("timing", {"stage": "rl", "step": step + 1, **times})
        last.update(reward=record["reward"], tok_s=tokens / (updated_at - started))


def rollout_record(run, step, sampled, credit_NT, advantages_N, rewards_PG, traces):
    """What to log of a step's answers, of all ranks: (record, rewards_PG of all prompts, number of tokens)."""
    gather, width = run.ranks.gather, run.ranks.max(credit_NT.shape[1])
    rewards_PG, lengths_N = gather(rewards_PG), gather(sampled.lengths_N)
    credit_NT = gather(torch.nn.functional.pad(credit_NT, (0, width - credit_NT.shape[1])))
    malformed = gather(torch.tensor([trace.problem is not None for group in traces for trace in group]))
    record = {"stage": "rl", "step": step + 1}
    record |= sam.rollout_stats(rewards_PG, gather(advantages_N), credit_NT, lengths_N, gather(sampled.ended_N))
    record["malformed"] = float(malformed.float().mean())
    return record, rewards_PG, int(lengths_N.sum())


def log_samples(run, step, batch, sampled, traces, rewards_PG, credit_NT):
    """Write the first and the last answer to the first prompt with the credit of each of their steps."""
    for row in (0, rewards_PG.shape[1] - 1):
        p, g = divmod(row, rewards_PG.shape[1])
        record, trace, answer = batch[p], traces[p][g], sampled.answers()[p][g]
        ends = [s.end for s in trace.steps] or [len(answer)]
        parts = [
            {"text": run.tokens.decode(answer[start:end]), "credit": float(credit_NT[row, end - 1])}
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        shown = {name: record[name] for name in ("query", "document", "label")}
        run.log(
            "samples",
            {"step": step, **shown, "reward": float(rewards_PG[p, g]), "problem": trace.problem, "steps": parts},
        )


def draw_curves(out):
    """Draw OUT/curves.png from OUT/metrics.jsonl: loss of SFT; reward and accuracy; credit; entropy and length of RL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    panels = [
        ("SFT", "sft", [("loss", "loss")]),
        ("RL: reward of sampled answers, accuracy of greedy ones", "rl", [("reward", "reward")]),
        ("RL: credit", "rl", [("frac_zero_std", "groups without a signal"), ("masked", "tokens masked by SAM")]),
        ("RL: entropy per token", "rl", [("entropy", "entropy")]),
    ]  # fmt: skip
    panels[1][2].extend((key, key) for key in sorted({k for r in records for k in r if k.endswith("/accuracy")}))
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), layout="constrained")
    for axis, (title, stage, lines) in zip(axes.flat, panels, strict=True):
        for key, name in lines:
            points = [(r["step"], r[key]) for r in records if r["stage"] == stage and r.get(key) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="o" if "/" in key else None, linewidth=1.3)
        axis.set(title=title, xlabel="step", yscale="log" if stage == "sft" else "linear")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(out / "curves.png", dpi=110)
    plt.close(figure)


def print_table(summary):
    """The table at the end: one line per stage and test set."""
    print(f"\n{'':6}{'test set':<16}{'accuracy':>9}{'binary':>8}{'macro-F1':>10}{'kappa':>7}{'nDCG@10':>9}{'malformed':>11}")
    for stage, tests in summary.items():
        for name, m in tests.items():
            ndcg = f"{m['ndcg@10']:.3f}" if "ndcg@10" in m else "-"
            print(
                f"{stage:<6}{name:<16}{m['accuracy']:>9.3f}{m['binary_accuracy']:>8.3f}{m['macro_f1']:>10.3f}"
                f"{m['kappa']:>7.3f}{ndcg:>9}{m['malformed']:>11.3f}"
            )


def print_plan(config):
    """What each of --gpus GPUs will hold, whether it fits, and which flag to change if not."""
    if config.model.startswith((".", "/")) and not Path(config.model).exists():
        raise grm.TaskError(f"--model {config.model}: no such folder")
    try:
        with torch.device("meta"):
            model_config = AutoConfig.from_pretrained(config.model, trust_remote_code=False)
            model = rollout.use_tree_attention(AutoModelForCausalLM.from_config(model_config, dtype=torch.float32))
    except (OSError, ValueError) as error:
        raise grm.TaskError(f"--model {config.model}: {str(error).splitlines()[0]}") from None

    def plan(**changes):
        c = SimpleNamespace(**asdict(config) | changes)
        return parallel.memory_plan(
            model, ranks=c.gpus, shard_size=c.shard_size, max_tokens=c.max_tokens, cache_tokens=c.cache_tokens,
            checkpointing=c.activation_checkpointing, reference=c.kl_coef > 0,
        )  # fmt: skip

    parts = plan()
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{config.model}: {parameters / 1e9:.2f} B parameters, {config.gpus} GPUs of {config.gpu_gb:g} GB; each holds, in GB:"
    )
    for name, size in parts.items():
        print(f"{name:>34}{size / 1e9:9.1f}")
    if parts["peak"] <= config.gpu_gb * 1e9:
        print("fits")
        return
    for gpus, share in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8)):
        changes = {"activation_checkpointing": True}
        if share > 1:
            changes |= {"max_tokens": config.max_tokens // share, "cache_tokens": config.cache_tokens // share}
        if gpus > 1:
            changes |= {"gpus": config.gpus * gpus, "shard_size": 0}
        if plan(**changes)["peak"] <= config.gpu_gb * 1e9:
            print("does not fit; this does: " + " ".join(f"--{name} {value}" for name, value in changes.items()))
            return
    copy = parts["sampling copy"] / 1e9
    print(f"does not fit on any number of such GPUs: each samples from a whole copy of {copy:.1f} GB")


def story(run):
    """SFT -> RL -> table."""
    config = run.config

    # Stage 1: learn the form of the reasoning from demonstrations
    if run.stage == "sft":
        if "sft" in run.data and config.sft_steps:
            sft(run)
            run.finish_stage("sft", "rl")
            run.export("sft")
        else:
            run.say("no SFT: reinforcing the model as it is")
            run.finish_stage("start", "rl")
        run.save()

    # Stage 2: learn from labels when each rule applies
    if config.rl_steps:
        rl(run)
        run.finish_stage("rl", "done")
    run.export("model")

    # Stage 3: what came out
    if not run.ranks.rank:
        draw_curves(run.out)
        (run.out / "summary.json").write_text(json.dumps(run.summary, indent=1) + "\n")
        shutil.rmtree(run.out / "checkpoints", ignore_errors=True)
        print_table(run.summary)
        print(f"\n{run.out}/model: the model; curves.png: the picture; samples.jsonl: answers with the credit of each step")


def main():
    """Parse, check everything, then the story; errors of the user's making end it with one line."""
    hf_logging.disable_progress_bar()
    try:
        config = parse_config()
        if config.plan:
            return None if int(os.environ.get("RANK", 0)) else print_plan(config)
        ranks = parallel.Ranks(config.timeout, config.shard_size)
        run = Run(config, ranks)
        ranks.stop_on_signals(lambda: run.say("stopping after this step; once more to stop at once, unsaved"))
        try:
            story(run)
        except parallel.Stopped as stopped:
            run.say(f"{stopped}")
        if run.board:
            run.board.close()
        ranks.leave()
    except (grm.TaskError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # rank 0 speaks first: torchrun ends the others as soon as one has left
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
