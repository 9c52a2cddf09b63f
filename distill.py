"""Teacher -> student on logits.                                                (how is it served?)

    torchrun distill.py --teacher runs/notes/model --task data/notes --student FOLDER --out OUT
    torchrun --nproc-per-node 8 distill.py ...      # pairs, batches and the student's weights are
                                                    # shared out; the same command again goes on

The large model that reinforcement learning made is too slow to judge every pair; a light student
answers in its place.
1. The teacher reasons about every pair, M times; its distribution over the labels, read where each
   answer gives its label, is averaged and stored (--cache), with the reasonings. No gold label is
   needed for that.
2. A student learns from it: a causal model that gives the label first, or a classifier over (query,
   document).
3. Teacher and student side by side: quality, calibration, time per pair.

The losses compare distributions, not sampled text:

    loss = label_kd_loss(student_logits_NY, teacher_probs_NY, gold_N, temperature=2.0)
    loss = token_kd_loss(student_hidden_AD, student.lm_head, teacher_hidden_AE, teacher.lm_head)

Prefer the first: it needs one distribution over the labels for each pair and leaves the student's
reasoning text alone. R3A (arXiv 2508.02506) reports a 1.5B student trained only on the teacher's
score-label logits that beats a 7B model after SFT, and LORE (arXiv 2512.03025) warns that
distilling the reasoning text lowers pass@1. The second is for students that must also write the
explanation.

Where the parts come from:
- temperature on both sides, the factor temperature**2 and the average with the gold label: Hinton
  et al. 2015 (arXiv 1503.02531);
- forward, reverse and generalised Jensen-Shannon divergence for each token, on the teacher's
  reasonings or on the student's own (on-policy): GKD (arXiv 2306.13649);
- ours: the gold label is mixed in only where a pair has one; the Jensen-Shannon divergence is
  rescaled so that it does not vanish at its ends; the factor temperature**2 also for tokens.

Shapes: N pairs, Y labels, M reasonings of a pair, A answer positions (those that predict an answer
token, over all answers of a batch), D width of the student, E width of the teacher, V vocabulary
that student and teacher have in common.
"""

import hashlib
import itertools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import logging as hf_logging

import grm
import parallel
import rollout
from grm import setting

UNLABELLED = -100  # what torch's cross-entropy ignores
TOKEN_LOSSES = ("forward", "reverse", "js")


# Losses -------------------------------------------------------------------------------------------


def _at_least_float32(x):
    """bfloat16 and float16 become float32; float64 stays, so that gradients can be checked."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_labels(student_logits_NY, teacher_probs_NY, gold_N):
    shape = tuple(student_logits_NY.shape)
    if len(shape) != 2 or teacher_probs_NY.shape != shape or gold_N.shape != shape[:1]:
        raise ValueError(
            f"student_logits_NY, teacher_probs_NY, gold_N have shapes {shape}, "
            f"{tuple(teacher_probs_NY.shape)}, {tuple(gold_N.shape)}; give [N, Y], [N, Y], [N]"
        )
    in_range_N = (gold_N >= 0) & (gold_N < shape[1])
    if not (in_range_N | (gold_N == UNLABELLED)).all():
        raise ValueError(
            f"gold_N must hold label indices 0..{shape[1] - 1}, or {UNLABELLED} for no label"
        )
    # The tolerance lets probabilities in bfloat16 pass, and stops logits and log-probabilities.
    sums_N = _at_least_float32(teacher_probs_NY).sum(-1)
    if not ((teacher_probs_NY >= 0).all() and ((sums_N - 1).abs() < 1e-2).all()):
        raise ValueError("teacher_probs_NY must be probabilities; softmax the teacher's logits")


def label_kd_loss(student_logits_NY, teacher_probs_NY, gold_N, temperature=1.0, gold_weight=0.0):
    """KL(teacher || student) over the labels, mixed with the cross-entropy on the gold label.

    student_logits_NY [N, Y] float: the student's logits of the Y labels. teacher_probs_NY [N, Y]
    float: probabilities at temperature 1; zeros are allowed; no gradient flows into them. gold_N
    [N] int64: index of the gold label, or -100. Computed in float32 (float64 if an input is).

    The KL term is taken at `temperature` on both sides: the teacher becomes p**(1/T), normalised.
    It is multiplied by temperature**2, so that its gradient keeps its size as the temperature rises
    (Hinton et al. 2015). A labelled pair counts (1 - gold_weight) * KL + gold_weight *
    cross-entropy, the latter at temperature 1; an unlabelled pair counts its whole KL. Returns the
    mean over the N pairs, a scalar; 0, with zero gradient, for no pairs. For several micro-batches
    or ranks, weight each by its share of the pairs.

    Raises ValueError on shapes that differ, gold labels out of range, and rows of teacher_probs_NY
    that are not probabilities.
    """
    _check_labels(student_logits_NY, teacher_probs_NY, gold_N)
    dtype = torch.promote_types(student_logits_NY.dtype, teacher_probs_NY.dtype)
    logits_NY = _at_least_float32(student_logits_NY.to(dtype))
    # log(0) = -inf becomes 0 again in the softmax, and kl_div reads 0 * log(0) as 0.
    teacher_logps_NY = teacher_probs_NY.detach().to(logits_NY.dtype).log()
    teacher_NY = torch.softmax(teacher_logps_NY / temperature, -1)
    student_logps_NY = torch.log_softmax(logits_NY / temperature, -1)
    kd_N = temperature**2 * F.kl_div(student_logps_NY, teacher_NY, reduction="none").sum(-1)
    # An unlabelled pair has cross-entropy 0 here and weight 0 below: no 0 / 0.
    gold_N = gold_N.long()
    gold_loss_N = F.cross_entropy(logits_NY, gold_N, ignore_index=UNLABELLED, reduction="none")
    weight_N = gold_weight * (gold_N != UNLABELLED).to(kd_N.dtype)
    return ((1 - weight_N) * kd_N + weight_N * gold_loss_N).sum() / max(len(gold_N), 1)


def _divergence(log_q_CV, log_p_CV, kind, beta):
    """[C] divergences between student q and teacher p, from log-probabilities: token_kd_loss."""
    log_ratio_CV = log_p_CV - log_q_CV
    if kind == "forward":
        return (log_p_CV.exp() * log_ratio_CV).sum(-1)
    if kind == "reverse":
        return -(log_q_CV.exp() * log_ratio_CV).sum(-1)
    # m = beta p + (1 - beta) q. log(m / q) is of size beta: taken as log((1 - beta) + beta p / q)
    # it keeps its digits in float32, where log m - log q would lose them to the division by beta
    # below. Likewise log(m / p) near beta 1.
    log_beta, log_rest = (
        log_ratio_CV.new_full((), math.log(beta)),
        log_ratio_CV.new_full((), math.log1p(-beta)),
    )
    log_m_over_q_CV = torch.logaddexp(log_rest, log_beta + log_ratio_CV)
    log_m_over_p_CV = torch.logaddexp(log_beta, log_rest - log_ratio_CV)
    # [beta KL(p || m) + (1 - beta) KL(q || m)] / (beta (1 - beta))
    terms_CV = (
        log_p_CV.exp() * log_m_over_p_CV / (1 - beta) + log_q_CV.exp() * log_m_over_q_CV / beta
    )
    return -terms_CV.sum(-1)


def token_kd_loss(
    student_hidden_AD,
    student_head,
    teacher_hidden_AE,
    teacher_head,
    weights_A=None,
    *,
    kind="forward",
    beta=0.5,
    temperature=1.0,
    denominator=None,
    chunk=256,
):
    """Divergence between student q and teacher p over the whole vocabulary, averaged over answer
    positions.

    student_hidden_AD [A, D], teacher_hidden_AE [A, E] float: finite hidden states that predict the
    same A tokens. The heads are callables from hidden states [rows, width] to logits [rows,
    vocabulary], such as model.lm_head; logits are taken to float32 (float64 stays). Nothing of the
    teacher gets a gradient. weights_A [A] float or bool: weight of each position, default 1; 0
    leaves it out. The weighted sum is divided by the sum of weights, or by `denominator`, that sum
    over all ranks and micro-batches. Returns a scalar; 0, with zero gradient, if all weights are 0.

    kind "forward": KL(p || q). "reverse": KL(q || p). "js": with m = beta p + (1 - beta) q, GKD's
        JSD_beta(p, q) = beta KL(p || m) + (1 - beta) KL(q || m)
    divided by beta (1 - beta), which is ours. The plain one vanishes at both ends, so a loss that
    reads beta 0 as forward KL jumps there; this one tends to KL(p || q) as beta -> 0 and to
    KL(q || p) as beta -> 1. At beta 0.5 it is four times the usual Jensen-Shannon divergence. As
    for labels, logits are divided by `temperature` and the loss is multiplied by its square.

    If one vocabulary is longer, its end is cut off (models of one family pad differently; invented
    logits would take probability from real tokens). The ids of the common part must mean the same
    tokens in both.

    [A, vocabulary] never exists: `chunk` positions at a time, and again in the backward pass. A = 0
    is one chunk with no rows. If a head communicates between ranks, every rank needs the same
    number of chunks.

    Raises ValueError on shapes that differ, an unknown kind, and beta outside (0, 1) with "js".
    """
    if len(student_hidden_AD) != len(teacher_hidden_AE):
        raise ValueError(
            f"hidden states have shapes {tuple(student_hidden_AD.shape)} and "
            f"{tuple(teacher_hidden_AE.shape)}; give [A, D] and [A, E] with the same A"
        )
    if kind not in TOKEN_LOSSES:
        raise ValueError(f'kind is {kind!r}; give "forward", "reverse" or "js"')
    if kind == "js" and not 0 < beta < 1:
        raise ValueError(f'beta is {beta}; give 0 < beta < 1, or "forward" for 0, "reverse" for 1')
    if weights_A is None:
        weights_A = student_hidden_AD.new_ones(len(student_hidden_AD))
    if weights_A.shape != student_hidden_AD.shape[:1]:
        raise ValueError(
            f"weights_A has shape {tuple(weights_A.shape)}; give one weight a position"
        )
    if denominator is None:
        denominator = float(_at_least_float32(weights_A).sum())
    total = 0.0
    chunks = (x.split(chunk) for x in (student_hidden_AD, teacher_hidden_AE, weights_A))
    for student_hidden, teacher_hidden, weights in zip(*chunks, strict=True):
        total = total + checkpoint(
            _chunk_divergence,
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            weights,
            kind,
            beta,
            temperature,
            use_reentrant=False,
        )
    # All weights 0: the total is 0 too, and so is the loss.
    return temperature**2 * total / (denominator or 1.0)


def _chunk_divergence(
    student_hidden_CD,
    student_head,
    teacher_hidden_CE,
    teacher_head,
    weights_C,
    kind,
    beta,
    temperature,
):
    """Weighted sum of the divergences at some positions."""
    with torch.no_grad():
        teacher_logits_CV = _at_least_float32(teacher_head(teacher_hidden_CE))
    student_logits_CV = _at_least_float32(student_head(student_hidden_CD))
    V = min(student_logits_CV.shape[-1], teacher_logits_CV.shape[-1])
    log_p_CV = torch.log_softmax(teacher_logits_CV[:, :V] / temperature, -1)
    log_q_CV = torch.log_softmax(student_logits_CV[:, :V] / temperature, -1)
    divergence_C = _divergence(log_q_CV, log_p_CV, kind, beta)
    return (divergence_C * weights_C.to(log_q_CV.dtype)).sum()


# Settings and data --------------------------------------------------------------------------------


@dataclass
class Config:
    """Settings of a distillation. TASK/distill.json may hold others; the command line wins."""

    teacher: str = setting("runs/notes/model", "the teacher's folder, as train.py writes it")
    task: str = setting("data/notes", "task folder: criteria.md, train.jsonl, test*.jsonl")
    student: str = setting("", "student's model folder, with or without weights (TASK/student)")
    out: str = setting("runs/student", "folder for everything that the run writes")
    cache: str = setting(
        "", "folder of the teacher's distributions, for all students (TEACHER-labels)"
    )
    pairs: str = setting("train.jsonl,sft.jsonl", "files of TASK to learn from, labelled or not")
    labelled: int = setting(-1, "use the gold labels of the first so many pairs (-1: all)", min=-1)
    seed: int = setting(0, "seeds fresh weights, the order of pairs, on-policy samples", min=0)
    bf16: Literal["auto", "0", "1"] = setting(
        "auto", "compute in bfloat16; auto: on CUDA, and CPUs with AMX where it pays"
    )
    # teacher
    samples: int = setting(4, "reasonings of the teacher for each pair", min=1)
    sampling_temperature: float = setting(1.0, "temperature of these reasonings", above=0)
    max_new_tokens: int = setting(512, "longest reasoning, in tokens", min=1)
    cache_tokens: int = setting(
        0, "tokens of the key-value cache in sampling (0: by memory, at most 131072)", min=0
    )
    sampling_shards: int = setting(
        1, "ranks that hold the teacher together, each a part of it (1: each has a copy)", min=1
    )
    max_tokens: int = setting(0, "tokens of a forward pass (0: by memory, at most 32768)", min=0)
    # student
    loss: Literal["label", "gold", "forward", "reverse", "js"] = setting(
        "label", "label: KL on label logits; gold: labels, no teacher; the others: on every token"
    )
    on_policy: bool = setting(False, "token losses on the student's own samples")
    temperature: float = setting(1.0, "temperature of teacher and student in the loss", above=0)
    gold_weight: float = setting(0.1, "weight of the gold label, where there is one", min=0, max=1)
    beta: float = setting(0.5, "of js: between forward (0) and reverse (1)", above=0, below=1)
    input: Literal["pair", "prompt"] = setting(
        "pair", "what a classifier reads: query and document, or the task's prompt"
    )
    max_length: int = setting(512, "a classifier's longest input, in tokens", min=1)
    steps: int = setting(2000, "optimizer steps", min=1)
    batch: int = setting(64, "pairs a step", min=1)
    lr: float = setting(5e-5, "peak learning rate: 5 % warm-up, then cosine to 0", above=0)
    weight_decay: float = setting(0.01, "AdamW's weight decay", min=0)
    save_every: int = setting(0, "save every so many steps (0: every ten minutes)", min=0)


# What may change when a run is taken up again: results do not depend on it beyond rounding.
FREE = ("out", "cache", "max_tokens", "cache_tokens", "sampling_shards", "save_every")


def parse_config(argv=None):
    """Command line over TASK/distill.json over defaults. Raises grm.TaskError."""
    config = grm.parse_settings(Config, "distill.json", __doc__.partition("\n")[0], argv)
    config.student = config.student or str(Path(config.task) / "student")
    config.cache = config.cache or config.teacher.rstrip("/") + "-labels"
    if config.on_policy and config.loss not in TOKEN_LOSSES:
        raise grm.TaskError(
            f"--on_policy: the {config.loss} loss has no samples; "
            "choose --loss forward, reverse or js"
        )
    folders = {"student": config.student}
    if config.loss != "gold":
        folders["teacher"] = config.teacher
    for name, folder in folders.items():
        is_path = folder.startswith((".", "/")) or folder.count("/") != 1
        if not Path(folder).is_dir() and is_path:
            hint = "; train.py writes it (OUT/model)" if name == "teacher" else ""
            raise grm.TaskError(f"--{name} {folder}: no such folder{hint}")
    if Path(config.cache).exists() and not Path(config.cache).is_dir():
        raise grm.TaskError(f"--cache {config.cache}: not a folder")
    return config


def read_pairs(config, task):
    """(pairs to learn from, {name: test set}). A pair's `gold`: the label's index or UNLABELLED."""
    folder = Path(config.task)
    pairs = []
    for name in config.pairs.split(","):
        pairs += task.read(folder / name.strip(), required=())
    for i, pair in enumerate(pairs):
        pair["gold"] = UNLABELLED
        if "label" in pair and (config.labelled < 0 or i < config.labelled):
            pair["gold"] = task.labels.index(pair["label"])
    tests = {path.stem: task.read(path) for path in sorted(folder.glob("test*.jsonl"))}
    if not tests:
        raise grm.TaskError(f"{folder}: holds no test*.jsonl to evaluate on")
    if config.loss == "gold":
        pairs = [pair for pair in pairs if pair["gold"] != UNLABELLED]
        if not pairs:
            raise grm.TaskError("--loss gold: no pair has a label")
    return pairs, tests


def encode(teacher, student, pairs, tests):
    """Encode all that teacher and student will read: what does not fit is named before any work."""
    if teacher:
        teacher.encode(pairs, teacher.config.samples)
        for records in tests.values():
            teacher.encode(records, samples=1)
    for name, records in {"pairs": pairs, **tests}.items():
        starts = range(0, len(records), 1000)
        bar = parallel.Bar(starts, desc=f"{name}: x 1,000", delay=parallel.LINE_SECONDS)
        for start in bar:
            student.encode(records[start : start + 1000])


# Stage 1: what the teacher thinks -----------------------------------------------------------------


def make_teacher(source, dtype, ranks, device):
    """A teacher from a model folder or hub name; on meta cut, where ranks sample together."""
    model, _ = grm.load_model(source, device, dtype)
    policy = rollout.Policy(rollout.use_tree_attention(model))
    return parallel.cut(policy, ranks) if device == "meta" else policy


class Teacher:
    """The teacher's model, which each rank has whole or a group in parts, and what it says."""

    def __init__(self, config, task, ranks):
        self.config = config
        task.check_model(config.teacher)
        skeleton, tokenizer = grm.load_model(config.teacher, "meta")
        bf16 = parallel.chosen_bf16(config.bf16, ranks.device, skeleton.config.hidden_size)
        dtype = torch.bfloat16 if bf16 else torch.float32
        parallel.check_cut(skeleton, ranks.shards)
        # Nothing is held but its weights.
        set_budgets(config, skeleton, ranks.device, dtype, numbers=1, shards=ranks.shards)
        make = partial(make_teacher, config.teacher, dtype, ranks)
        policy = make("meta")
        parallel.fill(policy, make, ranks, config.teacher)
        self.model = policy.model
        context = self.model.config.max_position_embeddings
        self.renderer = grm.Renderer(task, tokenizer, context, config.max_new_tokens)
        self.engine = make_engine(self.model, self.renderer, config)

    def encode(self, pairs, samples):
        """Give each pair `teacher_prompt`, its ids. Raises grm.TaskError for one that does not fit.

        samples: reasonings of each pair, at the same time in the cache.
        """
        bar = parallel.Bar(pairs, desc="teacher's prompts", delay=parallel.LINE_SECONDS)
        prompts = self.renderer.prompts(bar)
        config = self.config
        try:
            rollout.fit_rows(prompts, samples, config.max_new_tokens, config.cache_tokens)
        except ValueError as error:
            raise grm.TaskError(f"--{error}") from None
        for pair, prompt in zip(pairs, prompts, strict=True):
            pair["teacher_prompt"] = prompt

    def predict(self, pairs):
        """Its predictions, as grm.metrics takes them: greedy, after its own reasoning."""
        return grm.judge(self.renderer, self.engine, pairs, explain=False)

    @torch.no_grad()
    def grade(self, prompts, first_row):
        """Label distributions of prompts, each averaged over its well-formed reasonings.

        Returns tensors: probs_NY, zeros where all reasonings are malformed; lengths_NM, tokens of
        each reasoning, 0 if malformed; ids, the well-formed ones end to end.
        """
        config = self.config
        renderer = self.renderer
        answer_first = renderer.task.format == "answer-first"
        if answer_first and config.loss == "label":
            # No reasoning before the label: one forward pass, no samples.
            logits_NY = self.engine.label_logits([p + renderer.opening for p in prompts])
            one = torch.ones(len(prompts), dtype=torch.int32)  # stands for a reasoning
            return {
                "probs_NY": logits_NY.softmax(-1),
                "ids": one,
                "lengths_NM": one[:, None].clone(),
            }
        sampled = rollout.sample(
            self.model,
            prompts,
            group_size=config.samples,
            max_new_tokens=config.max_new_tokens,
            eos_id=renderer.eos_id,
            temperature=config.sampling_temperature,
            first_row=first_row,  # of seed 0: all students share them
            label_ids=renderer.label_ids,
            cache_tokens=config.cache_tokens,
        )
        probs_AY = sampled.label_logits_AY.softmax(-1).cpu()
        probs_NY = torch.zeros(len(prompts), len(renderer.label_ids))
        lengths_NM = torch.zeros(len(prompts), config.samples, dtype=torch.int32)
        ids = []
        first = 0  # of the answer: its first packed token
        for n, group in enumerate(sampled.answers):
            for m, answer in enumerate(group):
                steps = renderer.parse(answer).steps
                label_at = steps[0 if answer_first else -1].label_at if steps else None
                if label_at is not None:
                    probs_NY[n] += probs_AY[first + label_at]
                    lengths_NM[n, m] = len(answer)
                    ids += answer
                first += len(answer)
        well_formed_N1 = (lengths_NM > 0).sum(1, keepdim=True)
        probs_NY /= well_formed_N1.clamp(min=1)
        return {
            "probs_NY": probs_NY,
            "ids": torch.tensor(ids, dtype=torch.int32),
            "lengths_NM": lengths_NM,
        }


class Cache:
    """What a teacher says of pairs: SHARD pairs a folder with safetensors, and an index.

    key: JSON, of all that the distributions depend on. Raises grm.TaskError for a cache of another
    key, parallel.RunError for one that is damaged or that another run fills.
    """

    SHARD = 512  # what a stopped run loses at most

    def __init__(self, folder, key):
        self.folder = Path(folder)
        self.locked = None
        index = self.folder / "index.json"
        hint = f"--cache {folder}: delete it, or choose another"
        if not index.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with parallel.writing(index) as unfinished:
                unfinished.write_text(json.dumps(key) + "\n", encoding="utf-8")
        elif parallel.read_json(index, hint) != key:
            raise grm.TaskError(
                f"--cache {folder}: is stale (another teacher, task, list of pairs or sampling); "
                "delete it, or choose another"
            )

    def lock(self):
        """Let no other run fill it meanwhile."""
        self.locked = parallel.lock(self.folder / "lock")

    def unlock(self):
        """Let others fill it again."""
        if self.locked:
            self.locked.close()

    def path(self, shard):
        """The folder of a shard, by its number."""
        return self.folder / f"labels-{shard:05d}"

    def known(self, count):
        """Which of the first `count` shards are there."""
        return [shard for shard in range(count) if self.path(shard).exists()]

    def save(self, shard, tensors):
        """Write a shard: whole, or not at all."""
        with parallel.writing(self.path(shard)) as unfinished:
            unfinished.mkdir()
            save_file(tensors, unfinished / "labels.safetensors")

    def load(self, shard):
        """The tensors of a shard, as Teacher.grade gave them."""
        path = self.path(shard)
        parallel.check_folder(path, "delete it: it is made again")
        return load_file(path / "labels.safetensors")

    def reasonings(self, tensors):
        """By pair, the ids of a shard's well-formed reasonings."""
        ids = iter(tensors["ids"].tolist())
        reasonings = []
        for lengths_M in tensors["lengths_NM"].tolist():
            reasonings.append([list(itertools.islice(ids, n)) for n in lengths_M if n])
        return reasonings


def ask_teacher(teacher, cache, prompts, ranks):
    """Fill the cache where it lacks shards; each rank asks for its own, or each group of ranks.

    Raises grm.TaskError if more than half of the reasonings are malformed.
    """
    asked = well_formed = 0
    count = math.ceil(len(prompts) / cache.SHARD)
    known = ranks.on_rank_0(cache.known, count)
    shards = range(ranks.rank // ranks.shards, count, ranks.world // ranks.shards)
    for shard in parallel.Bar(shards, desc="teacher", unit=f" x {cache.SHARD} pairs"):
        if shard in known:
            tensors = cache.load(shard)
        else:
            first = shard * cache.SHARD
            mine = prompts[first : first + cache.SHARD]
            tensors = teacher.grade(mine, first * teacher.config.samples)
            if ranks.rank % ranks.shards == 0:
                cache.save(shard, tensors)
        asked += tensors["lengths_NM"].numel()
        well_formed += int((tensors["lengths_NM"] > 0).sum())
        if well_formed < 0.5 * asked:
            malformed = 1 - well_formed / asked
            raise grm.TaskError(
                f"{teacher.config.teacher}: {malformed:.0%} of {asked} answers are malformed; "
                "is it trained for this task's format, and --max_new_tokens long enough?"
            )


def open_cache(teacher, pairs, teacher_hash):
    """The Cache of the teacher's distributions of these pairs."""
    config = teacher.config
    task = teacher.renderer.task
    texts = json.dumps([[pair["query"], pair["document"]] for pair in pairs])
    key = {
        "teacher": teacher_hash,
        "task": [task.criteria, task.labels, task.steps, task.format],
        "pairs": hashlib.sha256(texts.encode()).hexdigest(),
        "shard": Cache.SHARD,
    }
    if task.format == "reason-first" or config.loss in TOKEN_LOSSES:
        key["sampling"] = [config.samples, config.sampling_temperature, config.max_new_tokens]
    return Cache(config.cache, key)


def teach(teacher, pairs, teacher_hash, ranks, progress):
    """Give each pair what the teacher thinks, from the cache as far as it goes.

    `probs`: its label distribution, a list; `reasonings`: lists of ids. Returns the pairs of which
    at least one reasoning is well-formed.
    """
    if ranks.rank == 0:
        open_cache(teacher, pairs, teacher_hash)
    ranks.barrier()
    cache = open_cache(teacher, pairs, teacher_hash)
    ranks.on_rank_0(cache.lock)
    with progress.interruptible():
        ask_teacher(teacher, cache, [pair["teacher_prompt"] for pair in pairs], ranks)
    cache.unlock()
    for first in range(0, len(pairs), cache.SHARD):
        tensors = cache.load(first // cache.SHARD)
        probs = tensors["probs_NY"].tolist()
        reasonings = cache.reasonings(tensors)
        for pair, probs_Y, own in zip(pairs[first:], probs, reasonings, strict=False):
            pair["probs"] = probs_Y
            pair["reasonings"] = own
    return [pair for pair in pairs if pair["reasonings"]]


# Stage 2: the student -----------------------------------------------------------------------------


class LabelStudent(torch.nn.Module):
    """A student that gives a distribution over the labels, and no reasoning.

    Called with pairs, it gives their loss. `label_logits` of pairs is its kinds' own.
    """

    def forward(self, pairs, num_pairs):
        """The loss of pairs, as their part of the mean over num_pairs, those of all ranks."""
        config = self.config
        logits_NY = self.label_logits(pairs)
        device = logits_NY.device
        gold_N = torch.tensor([pair["gold"] for pair in pairs], dtype=torch.long, device=device)
        if config.loss == "gold":
            return F.cross_entropy(logits_NY, gold_N, reduction="sum") / num_pairs
        probs_NY = logits_NY.new_tensor([pair["probs"] for pair in pairs]).view_as(logits_NY)
        loss = label_kd_loss(logits_NY, probs_NY, gold_N, config.temperature, config.gold_weight)
        return loss * len(pairs) / num_pairs

    def weight(self, pairs):
        """What the loss is averaged over: the pairs."""
        return len(pairs)

    @torch.no_grad()
    def predict(self, pairs):
        """Its predictions, as grm.metrics takes them."""
        self.encode(pairs)
        logits = [self.label_logits(pairs[part]) for part in self.micro_batches(pairs)]
        return grm.predictions_of(self.task, torch.cat(logits))

    def save(self, folder):
        """Write a folder that from_pretrained loads: whole, or not at all."""
        with parallel.writing(folder) as unfinished:
            self.write(unfinished)

    def write(self, folder):
        """Write model and tokenizer."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class ClassifierStudent(LabelStudent):
    """An AutoModelForSequenceClassification over query and document, or over the task's prompt.

    As a text pair, its folder is what sentence-transformers' CrossEncoder and transformers'
    pipeline load.
    """

    def __init__(self, config, task, device):
        super().__init__()
        self.config = config
        self.task = task
        with grm.blaming(f"--student {config.student}: cannot be loaded"):
            # Of a pair, "[SEP]" in a document is text: here, and for who loads the saved folder.
            self.tokenizer = AutoTokenizer.from_pretrained(
                config.student, trust_remote_code=False, split_special_tokens=config.input == "pair"
            )
            self.model = load_classifier(config, task, device)
        names = self.model.config.label2id
        self.order = [names[label] for label in task.labels]
        context = getattr(self.model.config, "max_position_embeddings", config.max_length)
        self.max_length = min(config.max_length, context)
        self.renderer = None
        if config.input == "prompt":
            try:
                self.renderer = grm.Renderer(task, self.tokenizer, self.max_length)
            except grm.TaskError as error:
                raise grm.TaskError(
                    f"--input prompt, --student {config.student}: {error}"
                ) from None

    def encode(self, pairs):
        """Give each pair `encoded`: what the tokenizer makes of it, a dict of lists."""
        if self.renderer:
            for pair, ids in zip(pairs, self.renderer.prompts(pairs), strict=True):
                pair["encoded"] = {"input_ids": ids}
            return
        batch = self.tokenizer(
            [pair["query"] for pair in pairs],
            [pair["document"] for pair in pairs],
            truncation="only_second",
            max_length=self.max_length,
        )
        for i, pair in enumerate(pairs):
            pair["encoded"] = {name: values[i] for name, values in batch.items()}

    def micro_batches(self, pairs):
        """Slices of at most max_tokens tokens, as if all pairs were as long as the longest."""
        longest = max((len(pair["encoded"]["input_ids"]) for pair in pairs), default=1)
        size = max(1, self.config.max_tokens // longest)
        return [slice(start, start + size) for start in range(0, len(pairs), size)]

    def label_logits(self, pairs):
        """float32 [N, Y], in the order of the task's labels; of no pairs, after a dummy pass."""
        encoded = [pair["encoded"] for pair in pairs] or [{"input_ids": [0]}]
        batch = self.tokenizer.pad(encoded, return_tensors="pt").to(self.model.device)
        return self.model(**batch).logits[: len(pairs), self.order].float()


def load_classifier(config, task, device):
    """The student's model, its head named by the task's labels; fresh weights if it has none."""
    model_config = AutoConfig.from_pretrained(config.student, trust_remote_code=False)
    names = dict(enumerate(task.labels))
    is_classifier = "ForSequenceClassification" in str(model_config.architectures)
    is_classifier = is_classifier and grm.has_weights(config.student)
    if is_classifier:
        names = {i: str(name) for i, name in model_config.id2label.items()}
        missing = [label for label in task.labels if label not in names.values()]
        if missing:
            raise grm.TaskError(
                f"--student {config.student}: its classifier has no label {', '.join(missing)} "
                f"(it has {', '.join(names.values())}); name the labels in its config.json, or "
                "start from the model without one"
            )
    model_config.id2label = names
    model_config.label2id = {label: i for i, label in names.items()}
    model, report = grm.build_model(
        AutoModelForSequenceClassification,
        config.student,
        model_config,
        device,
        torch.float32,
        config.seed,
    )
    differing = report["missing_keys"] | report["unexpected_keys"]
    if not is_classifier and differing:
        # A pretrained encoder gets a new head (and pooler) and loses that of its pretraining.
        body = f"{model.base_model_prefix}."
        heads = {name for name in differing if not name.startswith(body) or "pooler" in name}
        differing -= heads
        print(f"{config.student}: new, or left out: {grm.few(heads)}", file=sys.stderr)
    if differing:
        raise grm.TaskError(
            f"--student {config.student}: tensors are missing or left over: {grm.few(differing)}"
        )
    return model.to(device)


class CausalStudent(LabelStudent):
    """A decoder-only model that gives the label first: behind the prompt and "\\boxed{"."""

    answer_tokens = 0  # that it generates in serving

    def __init__(self, config, task, device):
        super().__init__()
        self.config = config
        self.task = task
        self.model, self.tokenizer = grm.load_model(config.student, device, seed=config.seed)
        rollout.use_tree_attention(self.model)
        context = self.model.config.max_position_embeddings
        self.renderer = grm.Renderer(task, self.tokenizer, context, self.answer_tokens)

    def encode(self, pairs):
        """Give each pair `prompt`: the ids behind which its label is read."""
        for pair, ids in zip(pairs, self.renderer.prompts(pairs), strict=True):
            pair["prompt"] = ids + self.renderer.opening

    def answers(self, pair):
        """What it answers to a pair, in training: one token, whichever."""
        return [[0]]

    def micro_batches(self, pairs):
        """Slices of at most max_tokens tokens."""
        prompts = [pair["prompt"] for pair in pairs]
        answers = [self.answers(pair) for pair in pairs]
        return [part for part, _ in rollout.micro_batches(prompts, answers, self.config.max_tokens)]

    def label_logits(self, pairs):
        """float32 [N, Y]."""
        prompts = [pair["prompt"] for pair in pairs]
        return rollout.next_token_logits(self.model, prompts, self.renderer.label_ids)

    def write(self, folder):
        """Write model, tokenizer, and the criteria in the student's form, for grm.py score."""
        labels = [self.renderer.response(f"\\boxed{{{label}}}") for label in self.task.labels]
        longest = max(map(len, labels))
        self.model.generation_config = GenerationConfig(max_new_tokens=longest, do_sample=False)
        super().write(folder)
        replace(self.task, steps=[], format="answer-first").save(folder)


class ReasoningStudent(CausalStudent):
    """A small copy of the teacher, which reasons in the task's own format; for token losses."""

    def __init__(self, config, task, teacher, device):
        self.answer_tokens = config.max_new_tokens
        super().__init__(config, task, device)
        self.teacher = teacher
        check_vocabularies(teacher.renderer.tokenizer, self.tokenizer, config.loss)

    def forward(self, pairs, num_tokens):
        """token_kd_loss of the pairs' answers; num_tokens: answer tokens of all ranks."""
        config = self.config
        prompts = [pair["prompt"] for pair in pairs]
        answers = [self.answers(pair) for pair in pairs]
        tree = rollout.Tree(prompts, answers, self.model.device)
        student_AD = rollout.answer_hidden(self.model, tree)
        with torch.no_grad():
            teacher_AE = rollout.answer_hidden(self.teacher.model, tree)
        return token_kd_loss(
            student_AD,
            self.model.get_output_embeddings(),
            teacher_AE,
            self.teacher.model.get_output_embeddings(),
            kind=config.loss,
            beta=config.beta,
            temperature=config.temperature,
            denominator=num_tokens,
        )

    def encode(self, pairs):
        """Give each pair `prompt`, its ids."""
        for pair, ids in zip(pairs, self.renderer.prompts(pairs), strict=True):
            pair["prompt"] = ids

    def answers(self, pair):
        """The teacher's reasonings, or its own."""
        return pair["reasonings"]

    def weight(self, pairs):
        """What the loss is averaged over: the answers' tokens."""
        return sum(len(answer) for pair in pairs for answer in pair["reasonings"])

    def answer(self, pairs, step, first_row):
        """The pairs with its own answers in place of the teacher's (on-policy)."""
        if not pairs:
            return []
        sampled = rollout.sample(
            self.model.eval(),
            [pair["prompt"] for pair in pairs],
            max_new_tokens=self.config.max_new_tokens,
            eos_id=self.renderer.eos_id,
            seed=self.config.seed,
            step=step,
            first_row=first_row,
            cache_tokens=self.config.cache_tokens,
        )
        answered = zip(pairs, sampled.answers, strict=True)
        return [pair | {"reasonings": answers} for pair, answers in answered]

    def predict(self, pairs):
        """Its predictions, as grm.metrics takes them."""
        engine = make_engine(self.model, self.renderer, self.config)
        return grm.judge(self.renderer, engine, pairs, explain=False)

    def write(self, folder):
        """Write model, tokenizer and criteria."""
        length = self.config.max_new_tokens
        self.model.generation_config = GenerationConfig(max_new_tokens=length, do_sample=False)
        LabelStudent.write(self, folder)
        self.task.save(folder)


def set_budgets(config, model, device, dtype, numbers, shards=1):
    """Put what the memory has room for beside a model in the place of budgets that are 0.

    numbers: of dtype, held for each of the model's parameters; shards: ranks that share them out.
    """
    size = dtype.itemsize
    budgets = rollout.token_budgets(model, device, numbers * size / shards, size, shards=shards)
    config.max_tokens = config.max_tokens or budgets[0]
    config.cache_tokens = config.cache_tokens or budgets[1]


def make_engine(model, renderer, config):
    """The engine of greedy answers and label logits, with the run's budgets."""
    return rollout.Engine(
        model,
        renderer.eos_id,
        renderer.label_ids,
        config.max_new_tokens,
        config.max_tokens,
        config.cache_tokens,
    )


def check_vocabularies(teacher, student, loss):
    """Token losses need ids that mean the same in both; raises grm.TaskError."""
    theirs = {i: token for token, i in teacher.get_vocab().items()}
    ours = {i: token for token, i in student.get_vocab().items()}
    common = range(min(len(theirs), len(ours)))  # the longer vocabulary is cut
    if any(theirs.get(i) != ours.get(i) for i in common):
        raise grm.TaskError(
            f"--loss {loss}: teacher and student have different tokenizers; use --loss label"
        )


def student_maker(config, task, teacher):
    """What builds the student on a device: the kind that its folder and the loss ask for."""
    grm.check_source(config.student)
    with grm.blaming(f"--student {config.student}: cannot be loaded"):
        model_config = AutoConfig.from_pretrained(config.student, trust_remote_code=False)
    is_causal = any(name.endswith("ForCausalLM") for name in model_config.architectures or [])
    if config.loss not in TOKEN_LOSSES:
        return partial(CausalStudent if is_causal else ClassifierStudent, config, task)
    if not is_causal:
        raise grm.TaskError(
            f"--loss {config.loss}: compares tokens, and {config.student} is a classifier; "
            "use --loss label"
        )
    return partial(ReasoningStudent, config, task, teacher)


def train(student, sampling_student, optimizer, pairs, config, ranks, progress):
    """The student's training. sampling_student: whole, for on-policy samples, or None."""
    for step in progress.steps(config.steps):
        # Dropout draws from torch's generator: of the step, so that a resumed run draws the same.
        seeds = np.random.SeedSequence([config.seed, step, ranks.rank]).generate_state(1)
        torch.manual_seed(seeds.item())
        batch = parallel.epoch_batch(pairs, config.batch, step, config.seed)
        share = ranks.share(len(batch))
        mine = batch[share]
        if config.on_policy:
            with progress.interruptible():
                mine = sampling_student.answer(mine, step, share.start)

        student.train()
        denominator = ranks.sum(student.weight(mine))
        loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for part in ranks.equalize(student.micro_batches(mine), slice(0, 0)):
            part_loss = student(mine[part], denominator)
            part_loss.backward()
            loss += part_loss.detach()
        loss = ranks.sum(loss.item())  # one transfer from the device
        lr = parallel.learning_rate(config.lr, step, config.steps, final=0.0)
        grad_norm = progress.optimizer_step(student, optimizer, loss, lr)
        if config.on_policy:
            parallel.copy_weights(sampling_student, student)
        record = {"step": step + 1, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        progress.log("metrics", record | {"skipped": progress.skipped})
        progress.status = f"loss {loss:.3f}"


# Stage 3: side by side ----------------------------------------------------------------------------


def milliseconds(judge, pairs, batch):
    """Milliseconds a pair in batches of `batch`: the best of three passes over up to 4 batches."""
    pairs = (pairs * batch)[: min(4 * batch, max(batch, len(pairs)))]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for i in range(0, len(pairs), batch):
            judge.predict(pairs[i : i + batch])
        times.append(time.perf_counter() - start)
    return 1000 * min(times) / len(pairs)


def evaluate(task, judge, tests, ranks, progress):
    """{test set: metrics} of a teacher or student, with size, and on rank 0 time.

    Each rank judges its share of the pairs, or each group of ranks that sample together.
    """
    cost = {"parameters": sum(p.numel() for p in judge.model.parameters())}
    with progress.interruptible():
        if ranks.rank < ranks.shards:  # while the others wait: they would disturb it
            pairs = next(iter(tests.values()))
            cost |= {f"ms_per_pair_batch_{n}": milliseconds(judge, pairs, n) for n in (1, 64)}
    scores = {}
    for name, pairs in tests.items():
        mine = pairs[ranks.group_share(len(pairs))]
        judged = []
        with progress.interruptible():
            for i in range(0, len(mine), 256):  # so that memory does not grow with the test set
                judged += judge.predict(mine[i : i + 256])
        predictions = ranks.gather_groups(judged, len(pairs))
        scores[name] = grm.metrics(task, pairs, predictions) | cost
    return scores


COLUMNS = (
    ("ms (1)", "ms_per_pair_batch_1", ".2f"),
    ("ms (64)", "ms_per_pair_batch_64", ".3f"),
    ("parameters", "parameters", ","),
)


def main():
    """Check everything, ask the teacher, train the student, compare."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    config = parse_config()
    out = Path(config.out)
    ranks = parallel.Ranks(sampling_shards=config.sampling_shards)
    task = grm.Task.load(config.task)
    pairs, tests = read_pairs(config, task)
    teacher_hash = ranks.on_rank_0(parallel.hash_inputs, [config.teacher])
    files = [config.student, *(Path(config.task) / name for name in config.pairs.split(","))]
    inputs = ranks.on_rank_0(parallel.hash_inputs, [*files, Path(config.task) / "criteria.md"])
    settings = asdict(config) | {"inputs": [teacher_hash, inputs]}
    progress = parallel.Progress(
        out, settings, ranks, stage="student", free=FREE, save_every=config.save_every, keep=1
    )
    teacher = Teacher(config, task, ranks) if config.loss != "gold" else None
    make = student_maker(config, task, teacher)
    # Of the student's computing and sampling; its master weights are float32.
    skeleton = make("meta").model
    bf16 = parallel.chosen_bf16(config.bf16, ranks.device, skeleton.config.hidden_size)
    set_budgets(config, skeleton, ranks.device, torch.float32, numbers=4)
    student = parallel.shard(make, ranks, bf16)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=config.weight_decay)
    encode(teacher, student, pairs, tests)
    parallel.announce(ranks, bf16, student, {"pairs": pairs, **tests}, out)
    progress.start(student, optimizer)
    if progress.saved is None and not grm.has_weights(config.student):
        parallel.print0(f"{config.student}: holds no weights; fresh ones, of seed {config.seed}")
    ranks.stop_on_signals()

    # Stage 1: what the teacher thinks
    start = time.perf_counter()
    if teacher:
        pairs = teach(teacher, pairs, teacher_hash, ranks, progress)
    teacher_s = time.perf_counter() - start

    # Stage 2: the student learns it
    start = time.perf_counter()
    sampling_student = None
    if config.on_policy:
        sampling_student = parallel.sampling_copy(make, student, ranks, bf16)
    train(student, sampling_student, optimizer, pairs, config, ranks, progress)
    student = parallel.sampling_copy(make, student, ranks, bf16).eval()
    training_s = time.perf_counter() - start
    ranks.on_rank_0(student.save, out / "model")

    # Stage 3: side by side
    for who, judge in (("teacher", teacher), ("student", student)):
        if judge:
            scores = evaluate(task, judge, tests, ranks, progress)
            progress.summary[who] = scores
    if ranks.rank == 0:
        table = dict(progress.summary)
        progress.summary |= {"teacher_s": teacher_s, "training_s": training_s}
        progress.save_summary()
        progress.finish()
        grm.print_table(table, COLUMNS)
        print(f"\n{out}/model: the student; teacher {teacher_s:.0f} s, training {training_s:.0f} s")


if __name__ == "__main__":
    parallel.launch(main, errors=(grm.TaskError, rollout.UnsupportedModelError))
