"""The story, top to bottom: SFT warm-up -> reinforcement learning -> the table.

    torchrun train.py                              # the embedded task, minutes on 2 CPU cores
    torchrun train.py --task FOLDER --model Qwen/Qwen3-0.6B     # your criteria, pairs and model
    torchrun --nproc-per-node 8 train.py           # eight GPUs; the same command goes on
    python train.py --help                         # every setting, with its default

1. Fine-tune on demonstrations (TASK/sft.jsonl), so that the model reasons in the criteria's format.
   Skipped if there are none.
2. Reinforce on labels (TASK/train.jsonl): sample groups of answers, reward exact matches, give each
   step the credit that it earned (sam.py), update.
3. Evaluate on every TASK/test*.jsonl after each stage, by metrics that are not the reward.

OUT gets config.json, metrics.jsonl, tests.jsonl, timing.jsonl, samples.jsonl, summary.json,
curves.png, and the Hugging Face folders sft/ and model/. Settings come from the command line, then
TASK/train.json, then the defaults below (which fit real models).

Several processes compute what one would (parallel.py). All randomness is drawn from (seed, step,
row), so there is no state of random generators to save, and a resumed run writes the metrics.jsonl
of one that was never stopped.

Left out on purpose: reward models, critics, LoRA, trainer classes.
Shapes: P prompts, G answers a prompt, N = P * G answers, A tokens of all answers, packed one behind
the other, K steps of an answer.
"""

import copy
import json
import os
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig
from transformers.utils import logging as hf_logging

import grm
import parallel
import rollout
import sam
from grm import setting


@dataclass
class Config:
    """Settings of a run. The defaults are for models of 0.6 B to 8 B parameters."""

    task: str = setting(
        "data/notes", "task folder: criteria.md, train.jsonl, test*.jsonl; sft.jsonl, train.json"
    )
    model: str = setting(
        "", "model folder or hub name; without weights it starts fresh (TASK/model)"
    )
    out: str = setting("", "folder for all that the run writes (runs/NAME_OF_TASK)")
    seed: int = setting(0, "seeds fresh weights, the order of the data, and sampling", min=0)
    max_new_tokens: int = setting(512, "longest answer, in tokens, EOS included", min=1)
    max_tokens: int = setting(0, "tokens of a micro-batch (0: by memory, at most 32768)", min=0)
    cache_tokens: int = setting(
        0, "tokens of the key-value cache in sampling (0: by memory, at most 131072)", min=0
    )
    bf16: Literal["auto", "0", "1"] = setting(
        "auto", "compute and sample in bfloat16; auto: on CUDA, and CPUs with AMX where it pays"
    )
    eval_every: int = setting(50, "evaluate every so many RL steps (0: after SFT and RL)", min=0)
    save_every: int = setting(0, "save every so many steps (0: every ten minutes)", min=0)
    keep: int = setting(2, "checkpoints to keep, the newest", min=1)
    max_bad_steps: int = setting(3, "end after so many steps in a row that are not finite", min=1)
    timeout: int = setting(1800, "seconds that a rank waits for another before the job ends", min=1)
    sampling_shards: int = setting(
        1, "ranks that sample together, each with a part of the weights (1: each has a copy)", min=1
    )
    activation_checkpointing: Literal["auto", "0", "1"] = setting(
        "auto", "keep only the inputs of layers for backward: less memory; auto: on CUDA"
    )
    # SFT
    sft_steps: int = setting(400, "steps of fine-tuning on TASK/sft.jsonl (0: none)", min=0)
    sft_batch: int = setting(64, "demonstrations a step", min=1)
    sft_lr: float = setting(1e-5, "peak learning rate; 5 % warm-up, cosine to a tenth", above=0)
    # RL
    rl_steps: int = setting(300, "steps of RL on TASK/train.jsonl (0: none)", min=0)
    prompts_per_step: int = setting(32, "prompts a step", min=1)
    group_size: int = setting(16, "answers sampled for each prompt", min=2)
    temperature: float = setting(1.0, "sampling temperature; the trainer's is the same", above=0)
    rule: Literal["symmetric", "positive", "none", "tree"] = setting(
        "symmetric",
        "symmetric, positive: credit masked by step; none: plain GRPO; tree: without step_labels",
    )
    step_targets: Literal["change", "labels", "final"] = setting(
        "change",
        "a step is right if: change: it moves the grade as its step_label does; labels: it says "
        "its step_label; final: it says the pair's label",
    )
    lr: float = setting(1e-6, "peak learning rate of RL; same schedule", above=0)
    updates_per_batch: int = setting(1, "optimizer steps on each batch of answers", min=1)
    clip_low: float = setting(0.2, "the probability ratio is clipped at 1 - clip_low", min=0)
    clip_high: float = setting(0.2, "the probability ratio is clipped at 1 + clip_high", min=0)
    normalize_std: bool = setting(True, "divide advantages by their group's standard deviation")
    advantage_clamp: float = setting(0.0, "limit advantages to +- this (0: no limit)", min=0)
    sft_coef: float = setting(0.0, "mode balance: weight of the SFT loss in RL steps", min=0)
    kl_coef: float = setting(0.0, "weight of the KL to the model before RL (k2 estimator)", min=0)
    is_cap: float = setting(2.0, "cap of the weight between sampler and trainer", above=0)
    weight_decay: float = setting(0.0, "AdamW's weight decay", min=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this global norm", above=0)


# What may change when a run is taken up again: results do not depend on it beyond rounding.
FREE = (
    "out",
    "max_tokens",
    "cache_tokens",
    "save_every",
    "keep",
    "max_bad_steps",
    "timeout",
    "sampling_shards",
    "activation_checkpointing",
)


def parse_config(argv=None):
    """Command line over TASK/train.json over defaults. Raises grm.TaskError for impossible ones."""
    config = grm.parse_settings(Config, "train.json", __doc__.partition("\n")[0], argv)
    config.model = config.model or str(Path(config.task) / "model")
    config.out = config.out or str(Path("runs") / Path(config.task).resolve().name)
    if not config.sft_steps and not config.rl_steps:
        raise grm.TaskError(
            "--sft_steps and --rl_steps are both 0: nothing to do; grm.py score evaluates a model"
        )
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("prompts_per_step", "sft_batch"):
        if getattr(config, name) < world:
            raise grm.TaskError(
                f"--{name} {getattr(config, name)}: is less than one for each of the {world} ranks"
            )
    return config


# Data ---------------------------------------------------------------------------------------------


def load_data(config, task, renderer):
    """Read, check and tokenise the task's files: {"sft": records, "train": ..., "test_x": ...}.

    Adds to each record prompt_ids, to demonstrations answer_ids, to training pairs targets: the
    right label of each step. Raises grm.TaskError that names file and line.
    """
    folder = Path(config.task)
    data = {}
    if config.sft_steps or config.sft_coef:
        if (folder / "sft.jsonl").is_file():
            data["sft"] = load_demonstrations(folder / "sft.jsonl", config, task, renderer)
        elif config.sft_coef:
            raise grm.TaskError(
                f"--sft_coef {config.sft_coef}: needs demonstrations, {folder / 'sft.jsonl'}"
            )
    if config.rl_steps:
        data["train"] = task.read(folder / "train.jsonl")
        for record in data["train"]:
            record["targets"] = targets_of(record, config, task)
        by_stage(data["train"], config.rl_steps)  # refuses stages that would get no step
    if not config.rl_steps and not data:
        raise grm.TaskError(f"--rl_steps 0: nothing to do without {folder / 'sft.jsonl'}")
    for path in sorted(folder.glob("test*.jsonl")):
        data[path.stem] = task.read(path)
    if not tests_of(data):
        raise grm.TaskError(f"{folder}: holds no test*.jsonl to evaluate on")
    for name, records in data.items():
        before = renderer.truncated
        bar = parallel.Bar(records, desc=f"{name}: prompts", delay=parallel.LINE_SECONDS)
        for record, prompt in zip(records, renderer.prompts(bar), strict=True):
            record["prompt_ids"] = prompt
        if cut := renderer.truncated - before:
            parallel.print0(f"{name}: {cut} of {len(records)} documents cut to fit the context")
        if name != "sft":
            check_budgets(name, records, config)
    return data


def load_demonstrations(path, config, task, renderer):
    """The records of sft.jsonl with answer_ids; each must parse, and fit max_new_tokens."""
    records = task.read(path, required=("response",))
    for record in records:
        record["answer_ids"] = renderer.response(record["response"])
        length = len(record["answer_ids"])
        problem = renderer.parse(record["answer_ids"]).problem
        if problem:
            raise grm.TaskError(f"{record.where}: the response does not parse: {problem}")
        if length > config.max_new_tokens:
            raise grm.TaskError(
                f"{record.where}: the response has {length} tokens, more than --max_new_tokens"
            )
    return records


def targets_of(record, config, task):
    """The label that each step of an answer should give; [] if none is known and none is needed."""
    if config.step_targets == "final" or len(task.boxes) == 1:
        return [record["label"]] * len(task.boxes)
    if "step_labels" not in record and config.rule not in ("none", "tree"):
        raise grm.TaskError(
            f"{record.where}: no step_labels; use --rule tree, --rule none or --step_targets final"
        )
    return record.get("step_labels", [])


def check_budgets(name, records, config):
    """Raise grm.TaskError if a group of answers to the longest prompt does not fit the cache."""
    group_size = config.group_size if name == "train" else 1
    prompts = [record["prompt_ids"] for record in records]
    try:
        rollout.fit_rows(prompts, group_size, config.max_new_tokens, config.cache_tokens)
    except ValueError as error:
        raise grm.TaskError(f"{name}: {error}") from None
    need = max(map(len, prompts)) + group_size * config.max_new_tokens
    if need > config.max_tokens:
        parallel.print0(
            f"{name}: a group of answers may need {need} tokens, more than --max_tokens "
            f"{config.max_tokens}; it will be a micro-batch all the same"
        )


def tests_of(data):
    """The test sets among the task's files."""
    return {name: records for name, records in data.items() if name.startswith("test")}


def by_stage(records, steps):
    """[(first step, end, records)]: pairs by `stage` (none: 0), each for its share of steps."""
    stages = []
    first = used = 0
    for stage in sorted({record.get("stage", 0) for record in records}):
        members = [record for record in records if record.get("stage", 0) == stage]
        used += len(members)
        end = round(used / len(records) * steps)
        if end == first and steps:
            raise grm.TaskError(
                f"{members[0].where}: stage {stage} has {len(members)} of {len(records)} pairs, "
                f"whose share of {steps} RL steps is less than one"
            )
        stages.append((first, end, members))
        first = end
    return stages


# Models -------------------------------------------------------------------------------------------


def set_budgets(config, skeleton, bf16, ranks):
    """Put what the memory has room for in the place of budgets that are 0."""
    size = 2 if bf16 else 4
    held = (20 if config.kl_coef else 16) / ranks.world  # weights, gradients, moments
    if bf16 or ranks.world > 1:
        held += size / ranks.shards  # the sampling model
    device = ranks.device
    keep_inputs = checkpointing(config, device)
    budgets = rollout.token_budgets(skeleton, device, held, size, keep_inputs, ranks.shards)
    config.max_tokens = config.max_tokens or budgets[0]
    config.cache_tokens = config.cache_tokens or budgets[1]


def make_policy(source, seed, device):
    """A policy from a model folder or hub name, on a device, in float32."""
    model, _ = grm.load_model(source, device, seed=seed)
    return rollout.Policy(rollout.use_tree_attention(model))


def make_sampling_policy(source, ranks, device):
    """The same to sample from: cut, where ranks sample together."""
    return parallel.cut(make_policy(source, None, device), ranks)


def checkpointing(config, device):
    """The setting `activation_checkpointing` as a bool."""
    choice = config.activation_checkpointing
    return device.type == "cuda" if choice == "auto" else choice == "1"


def checkpoint_layers(model):
    """Keep only the inputs of a model's layers for backward; the rest is computed again."""
    settings = {"use_reentrant": False}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    for layer in model.base_model.layers:
        # Of the layer alone: transformers checkpoints in train mode, while dropout stays off.
        layer.training = True


def export(model, renderer, folder, max_new_tokens, dtype, ranks):
    """Write a Hugging Face folder that from_pretrained and serving engines load, with criteria.md.

    Every rank must call it. dtype: of the weights.
    """
    unfinished = parallel.unfinished_path(folder)
    try:
        ranks.on_rank_0(describe_model, model, renderer, unfinished, max_new_tokens, dtype)
        parallel.save_model(model, unfinished, ranks, dtype)
        ranks.on_rank_0(parallel.put_in_place, unfinished, folder)
    except parallel.RunError:
        ranks.on_rank_0(shutil.rmtree, unfinished, True)  # True: whatever its errors
        raise


def describe_model(model, renderer, folder, max_new_tokens, dtype):
    """Write all of a model's folder but its weights, into a new one."""
    shutil.rmtree(folder, ignore_errors=True)
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    generation = {"eos_token_id": renderer.eos_id, "pad_token_id": renderer.tokenizer.pad_token_id}
    generation |= {"do_sample": False, "max_new_tokens": max_new_tokens}
    GenerationConfig(**generation).save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)
    renderer.task.save(folder)


# Stage 1: learn the form of the reasoning from demonstrations -------------------------------------


def sft(policy, sampling_model, optimizer, data, config, ranks, progress):
    """Supervised fine-tuning on the demonstrations' tokens."""
    for step in progress.steps(config.sft_steps):
        started = time.perf_counter()
        batch = parallel.epoch_batch(data["sft"], config.sft_batch, step, config.seed, 0)
        num_tokens = sum(len(record["answer_ids"]) for record in batch)

        loss = sft_backward(policy, batch, config, ranks)
        lr = parallel.learning_rate(config.sft_lr, step, config.sft_steps)
        grad_norm = progress.optimizer_step(policy, optimizer, loss, lr, config.max_grad_norm)
        parallel.copy_weights(sampling_model, policy.model)

        seconds = time.perf_counter() - started
        figures = {"stage": "sft", "step": step + 1, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        progress.log("metrics", figures | {"skipped": progress.skipped})
        times = {"update_s": seconds, "tok_s": num_tokens / seconds}
        progress.log("timing", {"stage": "sft", "step": step + 1, **times})
        progress.status = f"loss {loss:.3f}, {times['tok_s']:.0f} tok/s"


def sft_backward(policy, batch, config, ranks, coef=1.0):
    """Gradients of coef * the mean negative log-likelihood of the demonstrations' tokens, with EOS.

    batch: of all ranks, each of which takes its share. Returns the mean, of all ranks.
    """
    num_tokens = sum(len(record["answer_ids"]) for record in batch)
    mine = batch[ranks.share(len(batch))]
    prompts = [record["prompt_ids"] for record in mine]
    answers = [[record["answer_ids"]] for record in mine]
    micro_batches = rollout.micro_batches(prompts, answers, config.max_tokens)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for part, _ in ranks.equalize(micro_batches, rollout.EMPTY):
        tree = rollout.Tree(prompts[part], answers[part], ranks.device)
        logprobs_A, _ = policy(tree)
        loss = -logprobs_A.sum() / num_tokens
        (coef * loss).backward()
        total += loss.detach()
    return ranks.sum(total.item())


# Stage 2: learn the rules from labels -------------------------------------------------------------


def rl(policy, sampling_model, optimizer, renderer, data, config, ranks, progress):
    """Group-relative RL: sample, reward, give each step its credit, update."""
    stages = by_stage(data["train"], config.rl_steps)
    reference = make_reference(policy, config, ranks) if config.kl_coef else None
    for step in progress.steps(config.rl_steps):
        if config.eval_every and step and step % config.eval_every == 0:
            evaluate(sampling_model, renderer, data, config, ranks, progress)
        started = time.perf_counter()

        # 1. Draw pairs, of which each rank takes its share; sample a group of answers to each.
        batch = draw_pairs(stages, step, config)
        mine = batch[ranks.share(len(batch))]
        prompts = [record["prompt_ids"] for record in mine]
        with progress.interruptible():
            sampled = sample_share(sampling_model, renderer, batch, step, config, ranks)
        answers = sampled.answers
        sampled_at = time.perf_counter()

        # 2. Parse, reward, and give each token the credit that its step earned.
        traces = [[renderer.parse(answer) for answer in group] for group in answers]
        rewards_PG = reward_groups(mine, traces, ranks.device)
        clamp = config.advantage_clamp or None
        advantages_PG = sam.group_advantages(rewards_PG, config.normalize_std, clamp)
        advantages_N = advantages_PG.flatten()
        step_ends_NK, verdicts_NK, right_NK = judge_steps(
            mine, traces, renderer.task, config.step_targets, ranks.device
        )
        if config.rule == "tree":
            credit_A = sam.tree_credit(advantages_PG, step_ends_NK, verdicts_NK, sampled.lengths_N)
        else:
            credit_A = sam.stepwise_credit(
                advantages_N, step_ends_NK, right_NK, sampled.lengths_N, config.rule
            )

        # 3. Update. All ranks run equally many micro-batches; one without work runs empty ones.
        micro_batches = rollout.micro_batches(prompts, answers, config.max_tokens)
        micro_batches = ranks.equalize(micro_batches, rollout.EMPTY)
        num_tokens = ranks.sum(len(credit_A))
        old_logprobs_A = torch.zeros_like(credit_A)  # the policy's at the start of the step
        totals = Counter()
        for update in range(config.updates_per_batch):
            loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
            for prompt_slice, token_slice in micro_batches:
                tree = rollout.Tree(prompts[prompt_slice], answers[prompt_slice], ranks.device)
                logprobs_A, entropy_A = policy(tree, config.temperature)
                ref_logprobs_A = None
                if reference:
                    ref_logprobs_A, _ = reference(tree, config.temperature)
                if update == 0:
                    old_logprobs_A[token_slice] = logprobs_A.detach()
                part_loss, stats = sam.policy_loss(
                    logprobs_A,
                    credit_A[token_slice],
                    num_tokens,
                    old_logprobs_A=old_logprobs_A[token_slice],
                    sampler_logprobs_A=sampled.logprobs_A[token_slice],
                    ref_logprobs_A=ref_logprobs_A,
                    clip_low=config.clip_low,
                    clip_high=config.clip_high,
                    is_cap=config.is_cap,
                    kl_coef=config.kl_coef,
                )
                part_loss.backward()
                loss += part_loss.detach()
                totals.update(stats, entropy=entropy_A.sum().double())  # a Counter adds up
            loss = ranks.sum(loss.item())
            if config.sft_coef:  # mode balance: the SFT loss beside RL's
                demonstrations = parallel.epoch_batch(
                    data["sft"], config.sft_batch, step, config.seed, 2
                )
                sft_loss = sft_backward(policy, demonstrations, config, ranks, config.sft_coef)
                loss += config.sft_coef * sft_loss
            lr = parallel.learning_rate(config.lr, step, config.rl_steps)
            grad_norm = progress.optimizer_step(policy, optimizer, loss, lr, config.max_grad_norm)
            parallel.copy_weights(sampling_model, policy.model)
        updated_at = time.perf_counter()

        # 4. Log.
        figures = {"stage": "rl", "step": step + 1, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        figures |= {"skipped": progress.skipped} | token_means(totals, ranks)
        figures |= rollout_figures(sampled, traces, rewards_PG, advantages_N, credit_A, ranks)
        figures |= step_figures(
            mine, traces, rewards_PG, credit_A, sampled.lengths_N, step_ends_NK, ranks
        )
        if config.sft_coef:
            figures["sft_loss"] = sft_loss
        progress.log("metrics", figures)
        times = {"sampling_s": sampled_at - started, "update_s": updated_at - sampled_at}
        progress.log("timing", {"stage": "rl", "step": step + 1, "tokens": num_tokens, **times})
        if step % 10 == 0:
            log_samples(progress, mine, sampled, traces, credit_A, renderer)
        speed = num_tokens / (updated_at - started)
        progress.status = f"reward {figures['reward']:.2f}, {speed:.0f} tok/s"


def draw_pairs(stages, step, config):
    """The training pairs of a step, for all ranks: within a stage, epochs of shuffles."""
    first, _, members = next(stage for stage in stages if step < stage[1])
    return parallel.epoch_batch(members, config.prompts_per_step, step - first, config.seed, 1)


def sample_share(sampling_model, renderer, batch, step, config, ranks):
    """The rollout.Rollout of this rank's share of a batch; the ranks of a group sample together."""
    joint = ranks.group_share(len(batch))
    sampled = rollout.sample(
        sampling_model,
        [record["prompt_ids"] for record in batch[joint]],
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        eos_id=renderer.eos_id,
        temperature=config.temperature,
        seed=config.seed,
        step=step,
        first_row=joint.start * config.group_size,
        cache_tokens=config.cache_tokens,
    )
    return sampled.part(ranks.own_part(len(batch)))


def reward_groups(batch, traces, device):
    """Rewards [P, G], float32: 1.0 where the label is right, else 0.0."""
    rewards = []
    for record, group in zip(batch, traces, strict=True):
        rewards.append([grm.reward(trace, record["label"]) for trace in group])
    return torch.tensor(rewards, device=device)


def judge_steps(batch, traces, task, step_targets, device):
    """Where each answer's steps end and what they say, int64 [N, K]; which are right, bool [N, K].

    What they say: a label's place among the task's. A malformed answer, which has no steps, gets
    zeros.
    """
    nothing = [0] * len(task.boxes)
    ends = []
    verdicts = []
    right = []
    for record, group in zip(batch, traces, strict=True):
        for trace in group:
            ends.append([step.end for step in trace.steps] or nothing)
            verdicts.append([task.labels.index(step.label) for step in trace.steps] or nothing)
            if step_targets == "change":
                judged = grm.step_changes(trace, record["targets"], task)
            else:
                judged = grm.step_verdicts(trace, record["targets"])
            right.append(judged or [False] * len(task.boxes))
    return [torch.tensor(x, device=device) for x in (ends, verdicts, right)]


def make_reference(policy, config, ranks):
    """The policy as it is before RL, frozen, for the KL."""
    fine_tuned = Path(config.out) / "sft"
    source = fine_tuned if fine_tuned.exists() else config.model
    bf16 = parallel.chosen_bf16(config.bf16, ranks.device, policy.model.config.hidden_size)
    make = partial(make_policy, source, config.seed)
    reference = parallel.shard(make, ranks, bf16, source)
    return reference.requires_grad_(False)


def token_means(totals, ranks):
    """Means over the tokens of all ranks of sums over micro-batches, which are scalar tensors."""
    values = torch.stack([*totals.values()]).tolist()  # one transfer from the device
    totals = ranks.sum(dict(zip(totals, values, strict=True)))
    return {name: x / totals["tokens"] for name, x in totals.items() if name != "tokens"}


def rollout_figures(sampled, traces, rewards_PG, advantages_N, credit_A, ranks):
    """What to log of a step's answers, of all ranks."""
    malformed = [trace.problem is not None for group in traces for trace in group]
    mine = (rewards_PG, advantages_N, credit_A, sampled.lengths_N, sampled.ended_N)
    stats = sam.rollout_stats(*(ranks.gather(x) for x in mine))
    return stats | {"malformed": ranks.sum(sum(malformed)) / ranks.sum(len(malformed))}


def step_figures(batch, traces, rewards_PG, credit_A, lengths_N, step_ends_NK, ranks):
    """What to log of the steps of well-formed answers to pairs with step_labels, of all ranks.

    Whatever --step_targets says, a right step is one at its step_label.
    """
    right = []
    for record, group in zip(batch, traces, strict=True):
        gold = record.get("step_labels", [])
        right += [grm.step_verdicts(trace, gold) for trace in group]
    known_N = torch.tensor([bool(steps) for steps in right], device=ranks.device)
    right_NK = torch.tensor([steps for steps in right if steps], device=ranks.device).bool()
    right_NK = right_NK.view(-1, step_ends_NK.shape[1])
    first_N = lengths_N.cumsum(0) - lengths_N
    credit_NK = credit_A[first_N[:, None] + step_ends_NK - 1]
    won_N = rewards_PG.flatten() > 0
    mine = (won_N[known_N], right_NK, credit_NK[known_N])
    return sam.step_stats(*(ranks.gather(x) for x in mine))


def log_samples(progress, batch, sampled, traces, credit_A, renderer):
    """Log the first and the last answer to the first prompt with the credit of their steps."""
    record = {name: batch[0][name] for name in ("query", "document", "label")}
    lengths = [len(answer) for answer in sampled.answers[0]]
    for g in (0, len(lengths) - 1):
        answer = sampled.answers[0][g]
        trace = traces[0][g]
        credits = credit_A[sum(lengths[:g]) :].tolist()
        steps = []
        start = 0
        for end in [step.end for step in trace.steps] or [len(answer)]:
            text = renderer.decode(answer[start:end])
            steps.append({"text": text, "credit": credits[end - 1]})
            start = end
        outcome = {"reward": grm.reward(trace, record["label"]), "problem": trace.problem}
        progress.log("samples", {"step": progress.step + 1, **record, **outcome, "steps": steps})


# Stage 3: what came out ---------------------------------------------------------------------------


def evaluate(sampling_model, renderer, data, config, ranks, progress):
    """Metrics of greedy answers, {test set: metrics}; each group of ranks judges its share."""
    started = time.perf_counter()
    engine = rollout.Engine(
        sampling_model,
        renderer.eos_id,
        renderer.label_ids,
        config.max_new_tokens,
        config.max_tokens,
        config.cache_tokens,
    )
    scores = {}
    figures = {}
    for name, records in tests_of(data).items():
        mine = records[ranks.group_share(len(records))]
        with progress.interruptible():
            judged = grm.judge(renderer, engine, mine) if mine else []
        predictions = ranks.gather_groups(judged, len(records))
        scores[name] = grm.metrics(renderer.task, records, predictions)
        figures |= {f"{name}/{key}": scores[name][key] for key in ("accuracy", "macro_f1")}
    seconds = time.perf_counter() - started
    at = {"stage": progress.stage, "step": progress.step}
    progress.log("tests", at | figures)
    progress.log("timing", at | {"evaluation_s": seconds})
    return scores


def draw_curves(out):
    """Draw OUT/curves.png: loss of SFT; reward and accuracy, credit, entropy of RL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = read_log(out / "metrics.jsonl")
    tests = read_log(out / "tests.jsonl")
    for test in tests:
        if test["stage"] == "sft":  # is where RL begins
            test |= {"stage": "rl", "step": 0}
    accuracies = [name for name in tests[0] if name.endswith("/accuracy")]
    accuracies = {name: name.replace("/accuracy", ", greedy") for name in accuracies}
    sampled = {"reward": "sampled answers (reward)", "steps_right": "their steps"}
    credit = {
        "frac_zero_std": "groups without a signal",
        "masked": "masked tokens",
        "right_in_wrong": "right steps in wrong answers",
        "wrong_in_right": "wrong steps in right answers",
    }
    panels = [
        ("SFT: loss", "sft", {"loss": "loss"}),
        ("RL: accuracy", "rl", sampled | accuracies),
        ("RL: credit", "rl", credit),
        ("RL: entropy per token", "rl", {"entropy": "entropy"}),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), layout="constrained")
    for axis, (title, stage, lines) in zip(axes.flat, panels, strict=True):
        for key, name in lines.items():
            records = tests if key in accuracies else steps
            chosen = [r for r in records if r["stage"] == stage and r.get(key) is not None]
            if not chosen:
                continue  # steps cannot be judged without step_labels
            x = [record["step"] for record in chosen]
            y = [record[key] for record in chosen]
            marker = "o" if key in accuracies else None
            axis.plot(x, y, label=name, marker=marker, linewidth=1.3)
        axis.set(title=title, xlabel="step", yscale="log" if stage == "sft" else "linear")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(out / "curves.png", dpi=110)
    plt.close(figure)


def read_log(path):
    """The records of a log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main():
    """Check everything, then the story."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    config = parse_config()
    out = Path(config.out)
    ranks = parallel.Ranks(config.timeout, config.sampling_shards)
    settings = asdict(config)
    settings["inputs"] = ranks.on_rank_0(parallel.hash_inputs, [config.task, config.model])
    progress = parallel.Progress(
        out,
        settings,
        ranks,
        stage="sft",
        free=FREE,
        logs=("metrics", "tests", "timing", "samples"),
        save_every=config.save_every,
        keep=config.keep,
        max_bad_steps=config.max_bad_steps,
    )
    task = grm.Task.load(config.task)
    skeleton, tokenizer = grm.load_model(config.model, "meta")
    # Of computing and sampling; master weights are float32.
    bf16 = parallel.chosen_bf16(config.bf16, ranks.device, skeleton.config.hidden_size)
    context = skeleton.config.max_position_embeddings
    renderer = grm.Renderer(task, tokenizer, context, config.max_new_tokens)
    dtype = torch.bfloat16 if bf16 else torch.float32
    parallel.check_cut(skeleton, ranks.shards)
    set_budgets(config, skeleton, bf16, ranks)
    data = load_data(config, task, renderer)
    parallel.announce(ranks, bf16, skeleton, data, out)
    budgets = f"{config.max_tokens:,} tokens a micro-batch, {config.cache_tokens:,} in the cache"
    parallel.print0(f"budgets     {budgets}")

    make = partial(make_policy, config.model, config.seed)
    policy = parallel.shard(make, ranks, bf16, config.model)
    if checkpointing(config, ranks.device):
        checkpoint_layers(policy.model)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    progress.start(policy, optimizer)
    if progress.saved is None and not grm.has_weights(config.model):
        parallel.print0(f"{config.model}: holds no weights; fresh ones, of seed {config.seed}")
    make_sampling = partial(make_sampling_policy, config.model, ranks)
    sampling_model = parallel.sampling_copy(make_sampling, policy, ranks, bf16).model
    ranks.stop_on_signals()

    if progress.stage == "sft":
        if "sft" in data and config.sft_steps:
            sft(policy, sampling_model, optimizer, data, config, ranks, progress)
            export(policy.model, renderer, out / "sft", config.max_new_tokens, dtype, ranks)
            scores = evaluate(sampling_model, renderer, data, config, ranks, progress)
            progress.summary["sft"] = scores
        else:
            parallel.print0("no SFT: reinforcing the model as it is")
            if config.eval_every:
                scores = evaluate(sampling_model, renderer, data, config, ranks, progress)
                progress.summary["start"] = scores
        progress.next_stage("rl")
    if config.rl_steps:
        rl(policy, sampling_model, optimizer, renderer, data, config, ranks, progress)
        scores = evaluate(sampling_model, renderer, data, config, ranks, progress)
        progress.summary["rl"] = scores
    export(policy.model, renderer, out / "model", config.max_new_tokens, dtype, ranks)

    if ranks.rank == 0:
        progress.save_summary()
        draw_curves(out)
        progress.finish()
        grm.print_table(progress.summary)
        print(f"\n{out}/model: the model; curves.png: the picture; samples.jsonl: credited answers")


if __name__ == "__main__":
    parallel.launch(main, errors=(grm.TaskError, rollout.UnsupportedModelError))
