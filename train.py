"""The story, top to bottom: SFT warm-up -> reinforcement learning -> the table.

    python train.py                                # the embedded task, minutes on 2 CPU cores
    python train.py --task FOLDER --model Qwen/Qwen3-0.6B       # your criteria, pairs and model
    torchrun --nproc-per-node 8 train.py           # eight GPUs; the same command goes on
    python train.py --help                         # every setting, with its default

1. Fine-tune on demonstrations (TASK/sft.jsonl, optional): the form of the reasoning.
2. Reinforce on labels (TASK/train.jsonl): sample groups of answers, reward exact matches, give each
   step the credit that it earned (sam.py), update.
3. Evaluate on every TASK/test*.jsonl after each stage, by metrics that are not the reward.

OUT gets config.json, metrics.jsonl, tests.jsonl, timing.jsonl, samples.jsonl, summary.json,
curves.png, and the Hugging Face folders sft/ and model/. Settings come from the command line, then
TASK/train.json, then the defaults below (which fit real models).

Several processes compute what one would (parallel.py). All randomness is drawn from (seed, step,
row), so that a resumed run writes the metrics.jsonl of one that was never stopped.
Left out on purpose: reward models, critics, LoRA, trainer classes.
Shapes: P prompts, G answers a prompt, N = P * G answers, A tokens of all answers, packed one behind
the other, K steps of an answer.
"""

import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import chain
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

    task: str = setting("data/notes", "folder: criteria.md, train.jsonl, test*.jsonl; sft.jsonl")
    model: str = setting("", "folder or hub name; without weights it starts fresh (TASK/model)")
    out: str = setting("", "folder for all that the run writes (runs/NAME_OF_TASK)")
    seed: int = setting(0, "seeds fresh weights, the order of the data, and sampling")
    max_new_tokens: int = setting(512, "longest answer, in tokens, EOS included")
    max_tokens: int = setting(2**15, "tokens of a micro-batch; lower it where memory runs out")
    cache_tokens: int = setting(2**17, "tokens of the key-value cache in sampling; likewise")
    bf16: Literal["auto", "0", "1"] = setting(
        "auto", "compute in bfloat16; auto: on CUDA, and on CPUs that have it where it pays"
    )
    compile: Literal["auto", "0", "1"] = setting(
        "auto", "fewer kernels, after a minute of compiling; auto: on CUDA, models 512 wide or more"
    )
    activation_checkpointing: Literal["auto", "0", "1"] = setting(
        "auto", "keep only the inputs of layers for backward: less memory; auto: on CUDA"
    )
    eval_every: int = setting(50, "evaluate every so many RL steps (0: after SFT and RL)")
    save_every: int = setting(0, "save every so many steps (0: every ten minutes)")
    keep: int = setting(2, "checkpoints to keep, the newest")
    timeout: int = setting(1800, "seconds that a rank waits for another before the job ends")
    # SFT
    sft_steps: int = setting(400, "steps of fine-tuning on TASK/sft.jsonl (0: none)")
    sft_batch: int = setting(64, "demonstrations a step")
    sft_lr: float = setting(1e-5, "peak learning rate; 5 % warm-up, cosine to a tenth")
    # RL
    rl_steps: int = setting(300, "steps of RL on TASK/train.jsonl (0: none)")
    prompts_per_step: int = setting(40, "prompts a step")
    group_size: int = setting(8, "answers sampled for each prompt")
    temperature: float = setting(1.0, "sampling temperature; the trainer's is the same")
    rule: Literal["auto", "none", "sam", "symmetric"] = setting(
        "auto", "of credit (sam.py); auto: symmetric where all pairs have step_labels, else none"
    )
    step_targets: Literal["change", "labels"] = setting(
        "change", "of symmetric: a right step moves the grade as, or says, its step_label"
    )
    lr: float = setting(1e-6, "peak learning rate of RL; same schedule")
    updates_per_batch: int = setting(1, "optimizer steps on each batch of answers")
    clip_low: float = setting(0.2, "the probability ratio is clipped at 1 - clip_low")
    clip_high: float = setting(0.28, "the probability ratio is clipped at 1 + clip_high")
    normalize_std: bool = setting(True, "divide advantages by their group's standard deviation")
    advantage_clamp: float = setting(3.0, "limit advantages to +- this (0: no limit)")
    sft_coef: float = setting(0.0, "mode balance: weight of the SFT loss in RL steps")
    kl_coef: float = setting(0.0, "weight of the KL to the model before RL (k2 estimator)")
    is_cap: float = setting(2.0, "cap of the weight between sampler and trainer")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this global norm")

    def __post_init__(self):
        self.model = self.model or str(Path(self.task) / "model")
        self.out = self.out or str(Path("runs") / Path(self.task).resolve().name)
        world = int(os.environ.get("WORLD_SIZE", 1))
        least = {"group_size": 2, "prompts_per_step": world, "sft_batch": world}  # one a rank
        least |= dict.fromkeys(("updates_per_batch", "max_new_tokens", "keep", "timeout"), 1)
        least |= dict.fromkeys(("lr", "sft_lr", "is_cap", "max_grad_norm"), 1e-12)
        grm.check_numbers(self, least | {"temperature": 1e-3})


# What may change when a run is taken up again: results do not depend on it beyond rounding.
FREE = ("out", "max_tokens", "cache_tokens", "activation_checkpointing", "save_every", "keep")
FREE += ("timeout", "compile")


# Data ---------------------------------------------------------------------------------------------


def load_data(config, task, renderer):
    """The task's files, checked: {"sft": records, "train": ..., "test_x": ...}, each record with
    prompt_ids, demonstrations with answer_ids. Puts what --rule auto comes to into config.
    """
    folder = Path(config.task)
    data = {path.stem: task.read(path) for path in sorted(folder.glob("test*.jsonl"))}
    if not data:
        raise grm.TaskError(f"{folder}: holds no test*.jsonl to evaluate on")
    if config.rl_steps:
        data["train"] = task.read(folder / "train.jsonl")
        config.rule = chosen_rule(config.rule, data["train"], task)
    if (config.sft_steps or config.sft_coef) and (folder / "sft.jsonl").is_file():
        data["sft"] = task.read(folder / "sft.jsonl", required=("response",))
        for record in data["sft"]:
            record["answer_ids"] = renderer.encode_response(record["response"])
            problem = renderer.parse(record["answer_ids"]).problem
            if unknown := grm.unknown_words(renderer.tokenizer, record["response"]):
                problem = f"the tokenizer does not know {unknown[:5]}"
            if len(record["answer_ids"]) > config.max_new_tokens:
                problem = f"{len(record['answer_ids'])} tokens, more than --max_new_tokens"
            if problem:
                raise grm.TaskError(f"{record.where}: the response cannot be used: {problem}")
    if config.sft_coef and "sft" not in data:
        raise grm.TaskError(f"--sft_coef: needs demonstrations, {folder / 'sft.jsonl'}")
    if not data.keys() & {"train", "sft"}:
        raise grm.TaskError("nothing to do: no RL steps, and no SFT steps with demonstrations")
    grm.check_words(renderer.tokenizer, [*chain(*data.values())])
    for name, records in data.items():
        prompts = renderer.prompts(records)
        for record, prompt in zip(records, prompts, strict=True):
            record["prompt_ids"] = prompt
        size = config.group_size if name == "train" else 1
        # Raises BudgetError now rather than hours later.
        rollout.prompts_at_once(prompts, size, config.max_new_tokens, config.cache_tokens)
    if renderer.truncated:
        parallel.print0(f"{renderer.truncated} documents cut to fit the model's context")
    return data


def chosen_rule(rule, pairs, task):
    """The setting `rule`, or what auto comes to. Raises grm.TaskError for one that lacks labels."""
    unlabelled = [pair for pair in pairs if "step_labels" not in pair]
    if rule == "auto":
        return "none" if unlabelled else "symmetric"
    if rule == "sam" and task.format == "answer-first":
        raise grm.TaskError("--rule sam: is for answers whose last box is the label; use none")
    if rule == "symmetric" and unlabelled:
        raise grm.TaskError(f"{unlabelled[0].where}: no step_labels; use --rule sam, or none")
    return rule


def export(policy, renderer, folder, max_new_tokens, dtype, ranks):
    """Write a Hugging Face folder, weights in a dtype, with criteria.md. For all ranks to call."""
    model = parallel.gather_model(policy.model, ranks, dtype)
    if ranks.rank == 0:
        model.generation_config = GenerationConfig(
            eos_token_id=renderer.end_ids,
            pad_token_id=renderer.tokenizer.pad_token_id,
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
        grm.save_model(model, renderer.tokenizer, folder)
        renderer.task.save(folder)
    ranks.barrier()


# Stage 1: learn the form of the reasoning from demonstrations -------------------------------------


def sft(policy, engine, data, config, ranks, run):
    """Supervised fine-tuning on the demonstrations' tokens."""
    for step in run.steps("sft", config.sft_steps):
        started = time.perf_counter()
        batch = parallel.epoch_batch(data["sft"], config.sft_batch, step, config.seed, 0)
        loss = sft_backward(policy, batch, config, ranks)
        lr = parallel.learning_rate(config.sft_lr, step, config.sft_steps)
        grad_norm = run.optimizer_step(loss, lr, config.max_grad_norm)
        figures = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "skipped": run.skipped}
        run.log("metrics", {"stage": "sft", "step": step + 1, **figures})
        seconds = time.perf_counter() - started
        run.log("timing", {"stage": "sft", "step": step + 1, "update_s": seconds})
        run.status = f"loss {loss:.3f}"
    parallel.copy_weights(engine.model, policy.model)


def sft_backward(policy, batch, config, ranks, coef=1.0):
    """Gradients of coef * the mean negative log-likelihood of a batch's answer tokens, with EOS;
    each rank takes its share of the batch. Returns the mean, of all ranks.
    """
    num_tokens = sum(len(record["answer_ids"]) for record in batch)
    mine = batch[ranks.share(len(batch))]
    prompts = [record["prompt_ids"] for record in mine]
    answers = [[record["answer_ids"]] for record in mine]
    micro_batches = rollout.micro_batches(prompts, answers, config.max_tokens)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for part, _ in ranks.equalize(micro_batches, rollout.EMPTY):
        logprobs_A, _ = policy(rollout.Tree(prompts[part], answers[part], ranks.device))
        loss = -logprobs_A.sum() / num_tokens
        (coef * loss).backward()
        total += loss.detach()
    return ranks.sum(total.item())


# Stage 2: learn the rules from labels -------------------------------------------------------------


def rl(policy, engine, reference, renderer, data, config, ranks, run):
    """Group-relative RL: sample, reward, give each step its credit, update."""
    for step in run.steps("rl", config.rl_steps):
        if config.eval_every and step and step % config.eval_every == 0:
            evaluate(engine, renderer, data, ranks, run)
        started = time.perf_counter()

        # 1. Draw pairs and sample a group of answers to each; each rank goes on with its share.
        batch = parallel.epoch_batch(data["train"], config.prompts_per_step, step, config.seed, 1)
        share = ranks.share(len(batch))
        mine = batch[share]
        prompts = [record["prompt_ids"] for record in mine]
        sampled = engine.sample(
            prompts,
            group_size=config.group_size,
            temperature=config.temperature,
            seed=config.seed,
            step=step,
            first_row=share.start * config.group_size,
        )
        answers = sampled.answers
        lengths_N = sampled.lengths_N
        sampled_at = time.perf_counter()

        # 2. Parse, reward, and give each token the credit that its step earned.
        traces = [[renderer.parse(answer) for answer in group] for group in answers]
        rewards_PG = [
            [grm.reward(trace, record["label"]) for trace in group]
            for record, group in zip(mine, traces, strict=True)
        ]
        rewards_PG = torch.tensor(rewards_PG, device=ranks.device)
        clamp = config.advantage_clamp or None
        advantages_PG = sam.group_advantages(rewards_PG, config.normalize_std, clamp)
        advantages_N = advantages_PG.flatten()
        step_ends_NK, step_right_NK = judge_steps(mine, traces, renderer.task, config, ranks.device)
        credit_A = sam.stepwise_credit(
            advantages_N, step_ends_NK, step_right_NK, lengths_N, config.rule
        )
        num_tokens = ranks.sum(len(credit_A))
        weighted_A = credit_A
        if config.rule == "sam":
            num_answers = config.prompts_per_step * config.group_size
            weighted_A = sam.mean_over_answers(credit_A, lengths_N, num_tokens, num_answers)

        # 3. Update. All ranks run equally many micro-batches; one without work runs empty ones.
        micro_batches = rollout.micro_batches(prompts, answers, config.max_tokens)
        micro_batches = ranks.equalize(micro_batches, rollout.EMPTY)
        old_logprobs_A = torch.zeros_like(credit_A)  # the policy's at the start of the step
        totals = Counter()
        for update in range(config.updates_per_batch):
            loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
            for prompt_slice, token_slice in micro_batches:
                tree = rollout.Tree(prompts[prompt_slice], answers[prompt_slice], ranks.device)
                logprobs_A, entropy_A = policy(tree, config.temperature)
                ref_logprobs_A = reference(tree, config.temperature)[0] if reference else None
                if update == 0:
                    old_logprobs_A[token_slice] = logprobs_A.detach()
                part_loss, stats = sam.policy_loss(
                    logprobs_A,
                    weighted_A[token_slice],
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
            grad_norm = run.optimizer_step(loss, lr, config.max_grad_norm)
        parallel.copy_weights(engine.model, policy.model)
        updated_at = time.perf_counter()

        # 4. Log.
        figures = {"loss": loss, "grad_norm": grad_norm, "lr": lr, "skipped": run.skipped}
        if config.sft_coef:
            figures["sft_loss"] = sft_loss
        figures |= token_means(totals, ranks)
        of_answers = (rewards_PG, advantages_N, credit_A, lengths_N, sampled.ended_N, step_ends_NK)
        figures |= sam.rollout_stats(*(ranks.gather_rows(x) for x in of_answers))
        figures |= step_figures(mine, traces, rewards_PG, credit_A, lengths_N, step_ends_NK, ranks)
        run.log("metrics", {"stage": "rl", "step": step + 1, **figures})
        times = {"sampling_s": sampled_at - started, "update_s": updated_at - sampled_at}
        run.log("timing", {"stage": "rl", "step": step + 1, "tokens": num_tokens, **times})
        if step % 10 == 0:
            credits = credit_A.split(lengths_N.tolist())
            log_samples(run, mine, answers, traces, advantages_PG, credits, renderer)
        speed = num_tokens / (updated_at - started)
        run.status = f"reward {figures['reward']:.2f}, {speed:.0f} tok/s"


def judge_steps(batch, traces, task, config, device):
    """Where each answer's steps end, int64 [N, K], and which are right by the rule, bool [N, K];
    zeros for a malformed answer.
    """
    K = len(task.boxes)
    ends = []
    right = []
    for record, group in zip(batch, traces, strict=True):
        for trace in group:
            judged = grm.right_steps(trace, record, task, config.rule, config.step_targets)
            ends.append([step.end for step in trace.steps] or [0] * K)
            right.append(judged or [False] * K)
    return torch.tensor(ends, device=device), torch.tensor(right, device=device)


def token_means(totals, ranks):
    """Means over the tokens of all ranks of sums over micro-batches, which are scalar tensors."""
    sums = ranks.sum(torch.stack([*totals.values()]).cpu())  # one transfer from the device
    sums = dict(zip(totals, sums.tolist(), strict=True))
    return {name: x / sums["tokens"] for name, x in sums.items() if name != "tokens"}


def step_figures(batch, traces, rewards_PG, credit_A, lengths_N, step_ends_NK, ranks):
    """What to log of the steps of well-formed answers, of all ranks; whatever the rule, a right
    step is one at its step_label.
    """
    right = []
    for record, group in zip(batch, traces, strict=True):
        right += [grm.step_verdicts(trace, record.get("step_labels", [])) for trace in group]
    K = step_ends_NK.shape[1]
    known_N = torch.tensor([bool(steps) for steps in right], device=credit_A.device)
    right_NK = torch.tensor([steps or [False] * K for steps in right], device=credit_A.device)
    first_N = lengths_N.cumsum(0) - lengths_N
    credit_NK = credit_A[first_N[:, None] + step_ends_NK - 1]
    of_steps = (rewards_PG.flatten() > 0, right_NK, credit_NK)
    return sam.step_stats(*(ranks.gather_rows(x[known_N]) for x in of_steps))


PROBED = 128  # pairs


def chances(engine, renderer, pairs, config, ranks):
    """What the model's answers to some pairs say of RL's chances, {figure: share}; printed, with a
    warning. RL makes the best of sampled answers the usual ones: what it may gain is pass@G (the
    share of groups with a right answer) less greedy.
    """
    G = config.group_size
    share = ranks.share(len(pairs))
    mine = pairs[share]
    judged = []  # of each pair, the sampled answers and behind them the greedy one
    if mine:
        prompts = [record["prompt_ids"] for record in mine]
        sampling = {"group_size": G, "temperature": config.temperature, "seed": config.seed}
        groups = engine.sample(prompts, first_row=share.start * G, **sampling).answers
        greedy, _ = engine.generate(prompts)
        for record, group, answer in zip(mine, groups, greedy, strict=True):
            traces = [renderer.parse(ids) for ids in (*group, answer)]
            judged.append([(grm.reward(trace, record["label"]), trace.problem) for trace in traces])
    judged = [*chain(*ranks.gather(judged))]
    rewards_PG = torch.tensor([[reward for reward, _ in answers[:G]] for answers in judged])
    problems = Counter(problem for answers in judged for _, problem in answers[:G] if problem)
    before = {
        "greedy": sum(answers[G][0] for answers in judged) / len(judged),
        "reward": float(rewards_PG.mean()),
        f"pass@{G}": float(rewards_PG.amax(1).mean()),
        "frac_zero_std": float((rewards_PG.amax(1) == rewards_PG.amin(1)).float().mean()),
        "malformed": problems.total() / rewards_PG.numel(),
    }
    shares = ", ".join(f"{name} {value:.2f}" for name, value in before.items())
    parallel.print0(f"before RL, {len(judged)} pairs: {shares}")
    if before["malformed"] > 0.5:
        reasons = ", ".join(f"{count} {problem}" for problem, count in problems.most_common(2))
        parallel.print0(f"warning: of {rewards_PG.numel()} answers most are malformed: {reasons}")
        parallel.print0("  more --sft_steps, a higher --sft_lr, longer --max_new_tokens may help")
    elif before["frac_zero_std"] > 0.95:
        parallel.print0("warning: nearly no group has right and wrong answers: there is no signal")
        parallel.print0("  a higher --temperature or other pairs may help")
    return before


def log_samples(run, batch, answers, traces, advantages_PG, credits, renderer):
    """Log the best and the worst answer of the group with most signal, with their steps' credit."""
    p = int(advantages_PG.abs().sum(1).argmax())
    names = ("query", "document", "label", "step_labels")
    pair = {name: batch[p][name] for name in names if name in batch[p]}
    for g in (int(advantages_PG[p].argmax()), int(advantages_PG[p].argmin())):
        answer, trace = answers[p][g], traces[p][g]
        credit_T = credits[p * len(answers[p]) + g]
        steps = []
        for step in trace.steps:
            text = renderer.decode(answer[step.start : step.end])
            steps.append({"text": text, "credit": float(credit_T[step.end - 1])})
        figures = {"reward": grm.reward(trace, pair["label"])}
        figures["advantage"] = float(advantages_PG[p, g])
        outcome = {"answer": renderer.decode(answer), "problem": trace.problem, "steps": steps}
        run.log("samples", {"step": run.step + 1, **pair, **figures, **outcome})


# Stage 3: what came out ---------------------------------------------------------------------------


def evaluate(engine, renderer, data, ranks, run):
    """Metrics of greedy answers, {test set: metrics}; each rank judges its share."""
    started = time.perf_counter()
    scores = {}
    figures = {}
    for name in [name for name in data if name.startswith("test")]:
        mine = data[name][ranks.share(len(data[name]))]
        predictions = grm.judge(renderer, engine, mine) if mine else []
        predictions = [*chain(*ranks.gather(predictions))]
        scores[name] = grm.metrics(renderer.task, data[name], predictions)
        figures |= {f"{name}/{key}": scores[name][key] for key in ("accuracy", "macro_f1")}
    at = {"stage": run.stage, "step": run.step}
    run.log("tests", at | figures)
    run.log("timing", at | {"evaluation_s": time.perf_counter() - started})
    return scores


def draw_curves(out):
    """Draw OUT/curves.png from the logs: SFT's loss; RL's accuracy, credit and entropy."""
    from matplotlib.figure import Figure

    logs = [(out / f"{name}.jsonl").read_text().splitlines() for name in ("metrics", "tests")]
    steps, tests = ([json.loads(line) for line in lines] for lines in logs)
    accuracies = [key for key in tests[0] if key.endswith("/accuracy")]
    panels = {
        "SFT: loss": ["loss"],
        "RL: accuracy": ["reward", "steps_right", *accuracies],
        "RL: credit": ["frac_zero_std", "masked", "right_in_wrong", "wrong_in_right"],
        "RL: entropy per token": ["entropy"],
    }
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axis, (title, keys) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        stage = title[:3].strip(":").lower()
        for key in keys:
            records = tests if key in accuracies else [r for r in steps if r["stage"] == stage]
            known = [r for r in records if r.get(key) is not None]  # steps need step_labels
            x = [r["step"] if r["stage"] == stage else 0 for r in known]
            axis.plot(x, [r[key] for r in known], "o-" if key in accuracies else "-", label=key)
        axis.set(title=title, xlabel="step", yscale="log" if stage == "sft" else "linear")
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize="small")
    figure.savefig(out / "curves.png", dpi=110)


def check_settings(config, model_config):
    """Warn of learning rates that teach nothing, or break a model; of what is not trained."""
    is_fresh = not grm.has_weights(config.model)
    for name in ("sft_lr", "lr"):
        rate = getattr(config, name)
        if is_fresh and rate < 3e-5:
            parallel.print0(f"warning: --{name} {rate}: fresh weights hardly learn at that rate")
        if not is_fresh and rate > 1e-4:
            parallel.print0(f"warning: --{name} {rate} may break pretrained weights in a step")
    if getattr(model_config, "router_aux_loss_coef", 0):
        parallel.print0("mixture of experts: its router's balancing loss is not trained")


def make_policy(source, config, ranks):
    """(policy, tokenizer) of a model folder or hub name: on rank 0's host, elsewhere on meta."""
    model, tokenizer = grm.load_model(source, seed=config.seed, meta=ranks.rank > 0)
    rollout.use_tree_attention(model)
    choice = config.activation_checkpointing
    if choice == "1" or (choice == "auto" and ranks.device.type == "cuda"):
        settings = {"use_reentrant": False}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        for layer in parallel.transformer_layers(model):
            layer.training = True  # transformers checkpoints in train mode; dropout stays off
    return rollout.Policy(model), tokenizer


def main():
    """Check everything, then the story."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    config = grm.parse_settings(Config, "train.json")
    out = Path(config.out)
    ranks = parallel.Ranks(config.timeout)
    task = grm.Task.load(config.task)
    policy, tokenizer = make_policy(config.model, config, ranks)
    model_config = policy.model.config.get_text_config()
    context = model_config.max_position_embeddings
    ends = policy.model.generation_config.eos_token_id
    renderer = grm.Renderer(task, tokenizer, context, config.max_new_tokens, ends)
    data = load_data(config, task, renderer)
    check_settings(config, model_config)
    if ranks.rank == 0:  # which has the weights
        longest = max(len(record["prompt_ids"]) for record in chain(*data.values()))
        rollout.check_model(policy.model, longest + config.max_new_tokens)
    run = parallel.Run(out, asdict(config), ranks, FREE, config.save_every, config.keep)
    is_wide = model_config.hidden_size >= 512
    rollout.COMPILE = is_wide if config.compile == "auto" else config.compile == "1"
    # Of computing and sampling; master weights are float32.
    bf16 = parallel.chosen_bf16(config.bf16, ranks.device, model_config.hidden_size)
    dtype = torch.bfloat16 if bf16 else torch.float32
    sizes = {name: len(records) for name, records in data.items()}
    parallel.print0(f"{ranks.world} x {ranks.device.type}, {dtype}, rule {config.rule}, to {out}")
    parallel.print0(f"pairs: {sizes}")

    policy = parallel.shard(policy, ranks, bf16)
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    run.resume(policy, optimizer)
    engine = rollout.Engine(
        parallel.sampling_copy(policy.model, ranks, bf16),
        renderer.end_ids,
        renderer.read_ids,
        config.max_new_tokens,
        config.max_tokens,
        config.cache_tokens,
    )

    if run.stage in ("", "sft"):
        if "sft" in data and config.sft_steps:
            sft(policy, engine, data, config, ranks, run)
            export(policy, renderer, out / "sft", config.max_new_tokens, dtype, ranks)
            run.summary["sft"] = evaluate(engine, renderer, data, ranks, run)
        elif config.eval_every:
            run.summary["start"] = evaluate(engine, renderer, data, ranks, run)
    if config.rl_steps:
        reference = None
        if config.kl_coef:  # the policy as it is before RL, frozen
            source = out / "sft" if (out / "sft").exists() else config.model
            reference, _ = make_policy(source, config, ranks)
            reference = parallel.shard(reference, ranks, bf16).requires_grad_(False)
        if "before_rl" not in run.summary:
            count = min(PROBED, len(data["train"]))
            first = parallel.epoch_batch(data["train"], count, 0, config.seed, 1)
            run.summary["before_rl"] = chances(engine, renderer, first, config, ranks)
        rl(policy, engine, reference, renderer, data, config, ranks, run)
        run.summary["rl"] = evaluate(engine, renderer, data, ranks, run)
    export(policy, renderer, out / "model", config.max_new_tokens, dtype, ranks)
    if ranks.rank == 0:
        draw_curves(out)
        run.finish()
        grm.print_table({x: y for x, y in run.summary.items() if x != "before_rl"})
        print(f"\n{out}/model: the model; curves.png: the picture; samples.jsonl: credited answers")


if __name__ == "__main__":
    errors = (grm.TaskError, rollout.UnsupportedModelError, rollout.BudgetError)
    parallel.launch(main, errors)
