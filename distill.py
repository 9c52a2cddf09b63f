"""Teacher -> student on logits.                                                                     (how is it served?)

    torchrun distill.py --teacher runs/notes/model --task data/notes --student FOLDER --out runs/student
    torchrun --nproc-per-node 8 distill.py ...                   # the teacher's pairs and the batches are shared out, and
                                                                 # the student's weights; the same command again goes on

The large model that reinforcement learning made is too slow to judge every pair; a light student answers in its place.
1. The teacher reasons about every pair, M times; its distribution over the labels, read at the answer position behind each
   reasoning, is averaged and stored (--cache), with the reasonings. No gold label is needed for that.
2. A student learns from it: a causal model that gives the label first, or a classifier over (query, document).
3. Teacher and student side by side: quality, calibration, time per pair.

The losses compare distributions, not sampled text:

    loss = label_kd_loss(student_logits_NY, teacher_probs_NY, gold_N, temperature=2.0, gold_weight=0.1)
    loss = token_kd_loss(student_hidden_AD, student.lm_head, teacher_hidden_AE, teacher.lm_head, kind="forward")

Prefer the first: it needs one distribution over the labels for each pair and leaves the student's reasoning text alone.
R3A (arXiv 2508.02506) reports a 1.5B student trained only on the teacher's score-label logits that beats a 7B model
after SFT, and LORE (arXiv 2512.03025) warns that distilling the reasoning text lowers pass@1. The second is for
students that must also write the explanation.

Where the parts come from:
- temperature on both sides, the factor temperature**2 and the average with the gold label: Hinton et al. 2015
  (arXiv 1503.02531);
- forward, reverse and generalised Jensen-Shannon divergence for each token, on the teacher's reasonings or on the student's
  own (on-policy): GKD (arXiv 2306.13649);
- ours: the gold label is mixed in only where a pair has one; the Jensen-Shannon divergence is rescaled so that it does
  not vanish at its ends; the factor temperature**2 also for tokens.

Shapes: N pairs, Y labels, M reasonings of a pair, A answer positions (those that predict an answer token, over all answers
of a batch), D width of the student, E width of the teacher, V vocabulary that student and teacher have in common.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.utils import logging as hf_logging

import grm
import parallel
import rollout
from grm import setting

UNLABELLED = -100  # what torch's cross-entropy ignores
FREE = {"out", "max_tokens", "cache_tokens", "save_every"}  # may change when a run is taken up again


def _at_least_float32(x):
    """bfloat16 and float16 become float32; float64 stays, so that gradients can be checked exactly."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_temperature(temperature):
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; give a finite number above 0")


# Labels: one distribution for each pair -------------------------------------------------------------------------------


def _check_labels(student_logits_NY, teacher_probs_NY, gold_N, temperature, gold_weight):
    shape, teacher_shape, gold_shape = (tuple(x.shape) for x in (student_logits_NY, teacher_probs_NY, gold_N))
    if len(shape) != 2 or shape[1] < 2:
        raise ValueError(f"student_logits_NY has shape {shape}; give [pairs, labels] with at least two labels")
    if teacher_shape != shape:
        raise ValueError(f"teacher_probs_NY has shape {teacher_shape}; give the student's shape {shape}")
    if gold_shape != shape[:1] or gold_N.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"gold_N is {gold_N.dtype} of shape {gold_shape}; give int64 of shape {shape[:1]}")
    if not (((gold_N >= 0) & (gold_N < shape[1])) | (gold_N == UNLABELLED)).all():
        raise ValueError(f"gold_N must hold label indices 0..{shape[1] - 1}, or {UNLABELLED} for an unlabelled pair")
    if not student_logits_NY.isfinite().all():
        raise ValueError("student_logits_NY holds NaN or infinity; give the logits of the labels only, unmasked")
    # The tolerance lets probabilities in bfloat16 pass and stops logits, log-probabilities and unnormalised slices.
    sums_N = _at_least_float32(teacher_probs_NY).sum(-1)
    if not ((teacher_probs_NY >= 0).all() and ((sums_N - 1).abs() < 1e-2).all()):
        raise ValueError("teacher_probs_NY must be probabilities; softmax the teacher's logits over the labels")
    _check_temperature(temperature)
    if not 0 <= gold_weight <= 1:
        raise ValueError(f"gold_weight is {gold_weight}; give a number from 0 (teacher) to 1 (gold, where known)")


def label_kd_loss(student_logits_NY, teacher_probs_NY, gold_N, temperature=1.0, gold_weight=0.0):
    """KL(teacher || student) over the labels, mixed with the cross-entropy on the gold label where there is one.

    student_logits_NY [N, Y] float: the student's logits of the Y labels, finite. teacher_probs_NY [N, Y] float:
    probabilities at temperature 1; zeros are allowed; no gradient flows into them. gold_N [N] int64: index of the gold
    label, or -100. Computed in float32 (float64 if either input is).

    The KL term is taken at `temperature` on both sides: the teacher becomes p**(1/T), normalised. It is multiplied by
    temperature**2, so that its gradient keeps its size as the temperature rises (Hinton et al. 2015). A labelled pair
    counts (1 - gold_weight) * KL + gold_weight * cross-entropy, the latter at temperature 1; an unlabelled pair counts
    its whole KL. Returns the mean over the N pairs, a scalar; 0, with zero gradient, for no pairs. For several
    micro-batches or ranks, weight each by its share of the pairs.

    Raises ValueError on shapes that differ, gold labels out of range, logits that are not finite, rows of
    teacher_probs_NY that are not probabilities, temperature <= 0 and gold_weight outside [0, 1].
    """
    _check_labels(student_logits_NY, teacher_probs_NY, gold_N, temperature, gold_weight)
    dtype = torch.promote_types(student_logits_NY.dtype, teacher_probs_NY.dtype)
    logits_NY = _at_least_float32(student_logits_NY.to(dtype))
    # log(0) = -inf becomes 0 again in the softmax, and kl_div reads 0 * log(0) as 0.
    teacher_NY = torch.softmax(teacher_probs_NY.detach().to(logits_NY.dtype).log() / temperature, -1)
    kd_NY = F.kl_div(torch.log_softmax(logits_NY / temperature, -1), teacher_NY, reduction="none")
    kd_N = temperature**2 * kd_NY.sum(-1)
    # An unlabelled pair has cross-entropy 0 here and weight 0 below: no mean over labelled pairs, so no 0 / 0.
    gold_loss_N = F.cross_entropy(logits_NY, gold_N.long(), ignore_index=UNLABELLED, reduction="none")
    gold_weight_N = gold_weight * (gold_N != UNLABELLED).to(kd_N.dtype)
    return ((1 - gold_weight_N) * kd_N + gold_weight_N * gold_loss_N).sum() / max(len(gold_N), 1)


# Tokens: one distribution over the vocabulary for each answer position ------------------------------------------------


def _divergence(log_q_AV, log_p_AV, kind, beta):
    """[A] divergences between student q and teacher p, given log-probabilities. See token_kd_loss."""
    log_ratio_AV = log_p_AV - log_q_AV
    if kind == "forward":
        return (log_p_AV.exp() * log_ratio_AV).sum(-1)
    if kind == "reverse":
        return -(log_q_AV.exp() * log_ratio_AV).sum(-1)
    # m = beta p + (1 - beta) q. log(m / q) is of size beta: taken as log((1 - beta) + beta p / q) it keeps its digits
    # in float32, where log m - log q would lose them to the division by beta below. Likewise log(m / p) near beta 1.
    log_beta, log_rest = log_ratio_AV.new_full((), math.log(beta)), log_ratio_AV.new_full((), math.log1p(-beta))
    log_m_over_q_AV = torch.logaddexp(log_rest, log_beta + log_ratio_AV)
    log_m_over_p_AV = torch.logaddexp(log_beta, log_rest - log_ratio_AV)
    # [beta KL(p || m) + (1 - beta) KL(q || m)] / (beta (1 - beta))
    terms_AV = log_p_AV.exp() * log_m_over_p_AV / (1 - beta) + log_q_AV.exp() * log_m_over_q_AV / beta
    return -terms_AV.sum(-1)


def _check_tokens(student_hidden_AD, teacher_hidden_AE, weights_A, kind, beta, temperature, denominator, chunk):
    student, teacher = tuple(student_hidden_AD.shape), tuple(teacher_hidden_AE.shape)
    if len(student) != 2 or len(teacher) != 2 or student[0] != teacher[0]:
        raise ValueError(f"hidden states have shapes {student} and {teacher}; give [A, D] and [A, E] with the same A")
    if weights_A is not None and tuple(weights_A.shape) != student[:1]:
        raise ValueError(f"weights_A has shape {tuple(weights_A.shape)}; give one weight a position, {student[:1]}")
    if weights_A is not None and not ((weights_A >= 0) & weights_A.isfinite()).all():
        raise ValueError("weights_A must be finite and not negative; give 0 to leave a position out")
    if kind not in ("forward", "reverse", "js"):
        raise ValueError(f'kind is {kind!r}; give "forward", "reverse" or "js"')
    if kind == "js" and not 0 < beta < 1:
        raise ValueError(f'beta is {beta}; give 0 < beta < 1, or kind="forward" for 0 and kind="reverse" for 1')
    _check_temperature(temperature)
    if denominator is not None and not 0 < denominator < math.inf:
        raise ValueError(f"denominator is {denominator}; give the global sum of weights, finite and above 0")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; give a number of positions, at least 1")


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
    """Divergence between student q and teacher p over the whole vocabulary, averaged over answer positions.

    student_hidden_AD [A, D], teacher_hidden_AE [A, E] float: finite hidden states that predict the same A tokens.
    The heads are callables from hidden states [rows, width] to logits [rows, vocabulary], such as model.lm_head; logits
    are taken to float32 (float64 stays). Nothing of the teacher gets a gradient. weights_A [A] float or bool: weight of
    each position, default 1; 0 leaves it out. The weighted sum is divided by the sum of weights, or by `denominator`,
    that sum over all ranks and micro-batches. Returns a scalar; 0, with zero gradient, if all weights are 0.

    kind "forward": KL(p || q). "reverse": KL(q || p). "js": with m = beta p + (1 - beta) q, GKD's divergence
        JSD_beta(p, q) = beta KL(p || m) + (1 - beta) KL(q || m)
    divided by beta (1 - beta), which is ours. The plain one vanishes at both ends, so a loss that reads beta 0 as
    forward KL jumps there; this one tends to KL(p || q) as beta -> 0 and to KL(q || p) as beta -> 1. At beta 0.5 it is
    four times the usual Jensen-Shannon divergence. As for labels, logits are divided by `temperature` and the loss is
    multiplied by its square.

    If one vocabulary is longer, its end is cut off (models of one family pad differently; invented logits would take
    probability from real tokens). The ids of the common part must mean the same tokens in both.

    [A, vocabulary] never exists: `chunk` positions at a time, and again in the backward pass. A = 0 is one chunk with
    no rows. If a head communicates between ranks, every rank needs the same number of chunks.

    Raises ValueError on shapes that differ, weights that are negative or not finite, an unknown kind, beta outside
    (0, 1) with "js", and temperature, denominator or chunk not above 0.
    """
    _check_tokens(student_hidden_AD, teacher_hidden_AE, weights_A, kind, beta, temperature, denominator, chunk)
    weights_A = student_hidden_AD.new_ones(len(student_hidden_AD)) if weights_A is None else weights_A

    def one_chunk(student_hidden, teacher_hidden, weights):
        with torch.no_grad():
            teacher_logits = _at_least_float32(teacher_head(teacher_hidden))
        student_logits = _at_least_float32(student_head(student_hidden))
        V = min(student_logits.shape[-1], teacher_logits.shape[-1])
        log_p = torch.log_softmax(teacher_logits[:, :V] / temperature, -1)
        log_q = torch.log_softmax(student_logits[:, :V] / temperature, -1)
        return (_divergence(log_q, log_p, kind, beta) * weights.to(log_q.dtype)).sum()

    chunks = zip(student_hidden_AD.split(chunk), teacher_hidden_AE.split(chunk), weights_A.split(chunk), strict=True)
    total = sum(checkpoint(one_chunk, *tensors, use_reentrant=False) for tensors in chunks)
    # All weights 0: the total is 0 too, and so is the loss.
    denominator = float(_at_least_float32(weights_A).sum() if denominator is None else denominator) or 1.0
    return temperature**2 * total / denominator


# Settings and data ----------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """All settings of a distillation. TASK/distill.json may hold others; the command line wins over both."""

    teacher: str = setting("runs/notes/model", "the teacher's model folder, as train.py writes it")
    task: str = setting("data/notes", "task folder: criteria.md, train.jsonl, test*.jsonl")
    student: str = setting("", "student's model folder, with or without weights (default: TASK/student)")
    out: str = setting("runs/student", "folder for everything that the run writes")
    cache: str = setting("", "folder of the teacher's label distributions, for all students (default: TEACHER-labels)")
    pairs: str = setting("train.jsonl,sft.jsonl", "files of TASK to learn from; a pair needs no label")
    labelled: int = setting(-1, "use the gold labels of the first so many pairs only (-1: all)")
    seed: int = setting(0, "seeds fresh weights, the order of the pairs and on-policy samples")
    # teacher
    samples: int = setting(4, "reasonings of the teacher for each pair")
    sampling_temperature: float = setting(1.0, "temperature of these reasonings")
    max_new_tokens: int = setting(512, "longest reasoning, in tokens")
    cache_tokens: int = setting(131072, "token budget of the key-value cache when sampling")
    max_tokens: int = setting(32768, "token budget of one forward pass, of teacher and student")
    # student
    loss: Literal["label", "gold", "forward", "reverse", "js"] = setting(
        "label", "label: KL on label logits; gold: labelled pairs alone, no teacher; forward, reverse, js: on every token"
    )
    on_policy: bool = setting(False, "token losses on the student's own samples instead of the teacher's reasonings")
    temperature: float = setting(1.0, "temperature of teacher and student in the loss")
    gold_weight: float = setting(0.1, "share of the gold label's cross-entropy where a pair has a label")
    beta: float = setting(0.5, "of js: between forward (0) and reverse (1)")
    input: Literal["pair", "prompt"] = setting("pair", "what a classifier reads: query and document, or the task's prompt")
    max_length: int = setting(512, "a classifier's longest input, in tokens")
    steps: int = setting(2000, "optimizer steps")
    batch: int = setting(64, "pairs a step")
    lr: float = setting(5e-5, "peak learning rate: warm-up over 5 % of the steps, then cosine to 0")
    weight_decay: float = setting(0.01, "AdamW's weight decay")
    save_every: int = setting(500, "save a checkpoint every so many steps (0: only when stopped)")


def parse_config(argv=None):
    """Command line over TASK/distill.json over defaults. Raises grm.TaskError for what is unknown or impossible."""
    config, task = grm.parse_settings(Config, "distill.json", __doc__.split("\n")[0], argv)
    config.student = config.student or str(task / "student")
    config.cache = config.cache or config.teacher.rstrip("/") + "-labels"
    for name in ("samples", "max_new_tokens", "cache_tokens", "max_tokens", "max_length", "steps", "batch"):
        if getattr(config, name) < 1:
            raise grm.TaskError(f"--{name} {getattr(config, name)}: must be at least 1")
    for name in ("lr", "temperature", "sampling_temperature"):
        if not 0 < getattr(config, name) < math.inf:
            raise grm.TaskError(f"--{name} {getattr(config, name)}: must be positive and finite")
    if not 0 <= config.gold_weight <= 1:
        raise grm.TaskError(f"--gold_weight {config.gold_weight}: must be from 0 to 1")
    if not 0 < config.beta < 1:
        raise grm.TaskError(f"--beta {config.beta}: must be between 0 and 1; --loss forward is 0, reverse is 1")
    if config.on_policy and config.loss in ("label", "gold"):
        raise grm.TaskError(f"--on_policy: the {config.loss} loss has no samples; choose --loss forward, reverse or js")
    for name in ("seed", "save_every"):
        if getattr(config, name) < 0:
            raise grm.TaskError(f"--{name} {getattr(config, name)}: must be at least 0")
    if config.labelled < -1:
        raise grm.TaskError(f"--labelled {config.labelled}: must be at least 0, or -1 for all")
    for name in ("teacher", "student") if config.loss != "gold" else ("student",):
        value = getattr(config, name)
        if not Path(value).is_dir() and (value.startswith((".", "/")) or value.count("/") != 1):
            raise grm.TaskError(f"--{name} {value}: no such folder; train.py writes the teacher's (OUT/model)")
    for name in ("out", "cache"):
        if Path(getattr(config, name)).exists() and not Path(getattr(config, name)).is_dir():
            raise grm.TaskError(f"--{name} {getattr(config, name)}: not a folder")
    # what a run that was stopped has written
    if Path(config.out).is_dir() and {path.name for path in Path(config.out).iterdir()} - {"metrics.jsonl", "checkpoints"}:
        raise grm.TaskError(f"--out {config.out}: exists; choose another folder, or delete it")
    return config


def make_folder(name, folder):
    """Create a folder that a setting names; grm.TaskError where that cannot be."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise grm.TaskError(f"--{name} {folder}: {error.strerror}") from None


def read_pairs(config, task):
    """The pairs to learn from, each with `gold`: the index of its label, or UNLABELLED; and the test sets, by name."""
    folder, records = Path(config.task), []
    for name in config.pairs.split(","):
        records += task.read(folder / name.strip(), fields=())
    for i, record in enumerate(records):
        known = "label" in record and (config.labelled < 0 or i < config.labelled)
        record["gold"] = task.labels.index(record["label"]) if known else UNLABELLED
    tests = {path.stem: task.read(path) for path in sorted(folder.glob("test*.jsonl"))}
    if not tests:
        raise grm.TaskError(f"{folder}: holds no test*.jsonl to evaluate on")
    if config.loss == "gold":
        records = [record for record in records if record["gold"] != UNLABELLED]
        if not records:
            raise grm.TaskError("--loss gold: no pair has a label")
    return records, tests


# Stage 1: what the teacher thinks -------------------------------------------------------------------------------------

SHARD = 512  # pairs in a file of the cache: what a stopped run loses at most


class Teacher:
    """The teacher's model (whole on each rank; bf16 on CUDA), its tokens, and its cache of label distributions."""

    def __init__(self, config, task, ranks):
        self.config, self.ranks = config, ranks
        task.check_model(config.teacher)
        dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        self.model, self.tokenizer = grm.load_model(config.teacher, dtype=dtype)
        rollout.use_tree_attention(self.model)
        room = self.model.config.max_position_embeddings - config.max_new_tokens - 16
        self.tokens = grm.TokenTask(task, self.tokenizer, room)
        budgets = (config.max_new_tokens, config.max_tokens, config.cache_tokens)
        self.engine = rollout.TreeEngine(self.model, self.tokens.eos_id, *budgets)

    def labels(self, records):
        """(probs_NY float32, traces) of all records, from the cache as far as it goes. traces: for each record the list of
        its well-formed reasonings (ids). A pair without any has probabilities 0. Raises grm.TaskError for a stale cache,
        and if more than half of the reasonings are malformed."""
        folder, count, ranks = Path(self.config.cache), len(records), self.ranks
        if ranks.rank == 0:
            self._check_cache(folder, records)
        ranks.wait()
        prompts = self.tokens.prompts(records)
        try:
            rollout.fit_rows(prompts, self.config.samples, self.config.max_new_tokens, self.config.cache_tokens)
        except ValueError as error:
            raise grm.TaskError(f"--{error}") from None
        file_of = lambda start: folder / f"labels-{start // SHARD:05d}.safetensors"
        quiet, mine = True if ranks.rank else None, range(ranks.rank * SHARD, count, ranks.world * SHARD)
        kept = asked = 0
        for start in tqdm(mine, desc="teacher", unit=f" x {SHARD} pairs", disable=quiet, dynamic_ncols=True):
            file = file_of(start)
            if not file.exists():
                save_file(self._judge(prompts[start : start + SHARD], start), f"{file}.tmp")
                os.replace(f"{file}.tmp", file)
            lengths_NM = load_file(file)["lengths_NM"]
            kept, asked = kept + int((lengths_NM > 0).sum()), asked + lengths_NM.numel()
            if kept < 0.5 * asked:
                raise grm.TaskError(
                    f"{self.config.teacher}: {1 - kept / asked:.0%} of {asked} answers are malformed; is it trained for this "
                    "task's format, and --max_new_tokens long enough?"
                )
        ranks.wait()
        probs, traces = [], []
        for start in range(0, count, SHARD):
            shard = load_file(file_of(start))
            probs.append(shard["probs_NY"])
            flat, at = shard["ids"].tolist(), 0
            for lengths_M in shard["lengths_NM"].tolist():
                ends = np.cumsum([at, *lengths_M]).tolist()
                traces.append([flat[a:b] for a, b in itertools.pairwise(ends) if b > a])
                at = ends[-1]
        return torch.cat(probs), traces

    def _check_cache(self, folder, records):
        """A new cache gets its index; one of anything else is refused."""
        index = {"hash": self._hash(records), "pairs": len(records), "shard": SHARD, "labels": self.tokens.task.labels}
        path = folder / "index.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != index:
            raise grm.TaskError(
                f"--cache {folder}: is stale (another teacher, task, list of pairs or sampling); delete it, or choose another"
            )
        if not path.exists():
            make_folder("cache", folder)
            path.write_text(json.dumps(index) + "\n", encoding="utf-8")

    def _hash(self, records):
        """Of all that the distributions depend on."""
        c, digest = self.config, hashlib.sha256()
        reasons = self.tokens.task.format == "reason-first" or c.loss != "label"
        settings = (c.samples, c.sampling_temperature, c.max_new_tokens) if reasons else ()
        digest.update(json.dumps([self.tokens.task.criteria, self.tokens.task.format, settings]).encode())
        for path in sorted(p for p in Path(c.teacher).glob("*") if p.suffix in (".safetensors", ".json", ".jinja")):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        for record in records:
            digest.update(json.dumps([record["query"], record["document"]]).encode())
        return digest.hexdigest()

    @torch.no_grad()
    def _judge(self, prompts, first):
        """A shard: {"probs_NY": mean distributions, "ids": all well-formed reasonings end to end, "lengths_NM": 0 where
        malformed}. An answer-first teacher does not reason before its label: one prefill, no samples."""
        tokens, M = self.tokens, self.config.samples
        if tokens.task.format == "answer-first" and self.config.loss == "label":
            logits_NY = self.engine.label_logits([prompt + tokens.opening for prompt in prompts], tokens.label_ids)
            one = torch.ones(len(prompts), dtype=torch.int32)  # stands for a reasoning that was not needed
            return {"probs_NY": logits_NY.softmax(-1), "ids": one, "lengths_NM": one[:, None].clone()}
        sampled = rollout.sample(
            self.model, prompts, group_size=M, max_new_tokens=self.config.max_new_tokens, eos_id=tokens.eos_id,
            temperature=self.config.sampling_temperature, first_row=first * M,  # seed 0: all students share them
            cache_tokens=self.config.cache_tokens,
        )  # fmt: skip
        kept, cut, lengths = [], [], []
        for group in sampled.answers():
            traces = [tokens.parse(answer) for answer in group]
            at = 0 if tokens.task.format == "answer-first" else -1
            good = [t.problem is None and t.steps[at].label_at is not None for t in traces]
            lengths.append([len(a) * ok for a, ok in zip(group, good, strict=True)])
            kept += [token for a, ok in zip(group, good, strict=True) if ok for token in a]
            cut.append([a[: t.steps[at].label_at + 1] for a, t, ok in zip(group, traces, good, strict=True) if ok])
        probs_NY = torch.zeros(len(prompts), len(tokens.label_ids))
        usable = [i for i, group in enumerate(cut) if group]
        chosen, answers = [prompts[i] for i in usable], [cut[i] for i in usable]
        for part in rollout.micro_batches(chosen, answers, self.config.max_tokens) if usable else ():
            tree = rollout.Tree(chosen[part], answers[part], self.model.device)
            last_N = tree.lengths_N.cumsum(0) - 1  # the position that predicts each answer's label
            hidden_ND = rollout.answer_hidden(self.model, tree)[last_N]
            logits_NY = rollout.logits_of(self.model.get_output_embeddings(), hidden_ND, tokens.label_ids)
            rows = logits_NY.softmax(-1).cpu().split([len(group) for group in answers[part]])
            for i, probs_MY in zip(usable[part], rows, strict=True):
                probs_NY[i] = probs_MY.mean(0)
        as_tensor = lambda values: torch.tensor(values, dtype=torch.int32)
        return {"probs_NY": probs_NY, "ids": as_tensor(kept), "lengths_NM": as_tensor(lengths)}

    def predict(self, records):
        """Its judgements, as grm.metrics takes them: greedy, after its own reasoning."""
        return grm.judge(self.tokens, self.engine, records, explain=False)


# Stage 2: the student -------------------------------------------------------------------------------------------------


class Student:
    """What the two kinds have in common. model: in training, sharded over several ranks (compute losses through `call`, as
    Ranks.shard says); after `finish`, whole."""

    reasons, tokenizer = False, None

    def __init__(self, config, task, ranks):
        self.config, self.task, self.ranks = config, task, ranks
        self.half = ranks.device.type == "cuda"
        self.model, self.call = ranks.shard(self.load, self.half)

    def whole(self):
        """The model as each rank needs it to sample from or to save; every rank must call it."""
        return self.ranks.whole(self.load, self.model, self.half)

    def finish(self):
        """Training is over: from now on, judge with the whole model. Every rank must call it."""
        self.model = self.whole().eval()

    def predict(self, records):
        """Its judgements, as grm.metrics takes them."""
        encoded = self.encode(records)
        with torch.no_grad():
            logits = [self.label_logits(encoded[part]) for part in self.micro_batches(encoded)]
        return as_predictions(self.task, torch.cat(logits))

    def save(self, out):
        """OUT/model."""
        self.model.save_pretrained(out / "model")
        self.tokenizer.save_pretrained(out / "model")


class CausalStudent(Student):
    """A decoder-only model that gives the label first: behind the prompt and "\\boxed{", one prefill, no reasoning. With a
    token loss it is a small copy of the teacher instead, and reasons in the task's own format."""

    def __init__(self, config, task, ranks):
        super().__init__(config, task, ranks)
        self.reasons, self.tokenizer = config.loss in ("forward", "reverse", "js"), grm.load_model(config.student, "meta")[1]
        room = self.model.config.max_position_embeddings - config.max_new_tokens * self.reasons - 16
        self.tokens = grm.TokenTask(task, self.tokenizer, room)

    def load(self, device):
        """The student on a device, with fresh weights if its folder has none."""
        return rollout.use_tree_attention(grm.load_model(self.config.student, device, seed=self.config.seed)[0])

    def encode(self, records):
        """Ids that label_logits reads."""
        return [prompt + self.tokens.opening for prompt in self.tokens.prompts(records)]

    def micro_batches(self, encoded):
        """Slices of at most max_tokens tokens."""
        return rollout.micro_batches(encoded, [[[0]]] * len(encoded), self.config.max_tokens) if encoded else []

    def label_logits(self, encoded):
        """float32 [N, Y]."""
        tree = rollout.Tree(encoded, [[[self.tokens.label_ids[0]]]] * len(encoded), self.model.device)
        hidden_ND = rollout.answer_hidden(self.model, tree)
        return rollout.logits_of(self.model.get_output_embeddings(), hidden_ND, self.tokens.label_ids)

    def predict(self, records):
        """Its judgements, as grm.metrics takes them."""
        if not self.reasons:
            return super().predict(records)
        c = self.config
        engine = rollout.TreeEngine(self.model, self.tokens.eos_id, c.max_new_tokens, c.max_tokens, c.cache_tokens)
        return grm.judge(self.tokens, engine, records, explain=False)

    def save(self, out):
        """OUT/model, with the criteria in the student's form: grm.py needs nothing else."""
        super().save(out)
        form = {} if self.reasons else {"steps": [], "format": "answer-first"}
        replace(self.task, **form).save(out / "model")


class ClassifierStudent(Student):
    """An AutoModelForSequenceClassification over query and document as a text pair, or over the task's prompt. As a text
    pair, its folder is what sentence-transformers' CrossEncoder and transformers' pipeline load."""

    def __init__(self, config, task, ranks):
        folder = Path(config.student)
        self.trained = bool(list(folder.glob("*.safetensors"))) or not folder.is_dir()
        if not self.trained and (list(folder.glob("*.bin")) or list(folder.glob("*.pt"))):
            raise grm.TaskError(f"--student {folder}: only pickled weights, which are not loaded; convert to safetensors")
        try:
            self.model_config = AutoConfig.from_pretrained(config.student, trust_remote_code=False)
            self.tokenizer = AutoTokenizer.from_pretrained(config.student, trust_remote_code=False)
            names = dict(enumerate(task.labels))
            if self.trained and "ForSequenceClassification" in str(self.model_config.architectures):
                names = {i: str(name) for i, name in self.model_config.id2label.items()}
                if missing := [label for label in task.labels if label not in names.values()]:
                    raise grm.TaskError(
                        f"--student {folder}: its classifier has no label {', '.join(missing)} (it has "
                        f"{', '.join(names.values())}); name the labels in its config.json, or start from the model without one"
                    )
            self.model_config.id2label, self.model_config.label2id = names, {label: i for i, label in names.items()}
            super().__init__(config, task, ranks)
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, grm.TaskError):
                raise
            raise grm.TaskError(f"--student {folder}: cannot be loaded: {str(error).splitlines()[0]}") from error
        self.order = [self.model_config.label2id[label] for label in task.labels]
        self.length = min(config.max_length, getattr(self.model_config, "max_position_embeddings", config.max_length))
        try:
            self.tokens = grm.TokenTask(task, self.tokenizer, self.length) if config.input == "prompt" else None
        except grm.TaskError as error:
            raise grm.TaskError(f"--input prompt, --student {folder}: {error}") from None

    def load(self, device):
        """The student on a device, with fresh weights (of the classifier alone) if its folder has none."""
        torch.manual_seed(self.config.seed)
        kind, settings = AutoModelForSequenceClassification, {"trust_remote_code": False, "dtype": torch.float32}
        with torch.device(device) if str(device) == "meta" else contextlib.nullcontext():
            if self.trained and str(device) != "meta":
                folder, config = self.config.student, self.model_config
                model = kind.from_pretrained(folder, config=config, use_safetensors=True, **settings)
            else:
                model = kind.from_config(self.model_config, **settings)
        return model.to(device)

    def encode(self, records):
        """What label_logits reads: a dict of lists for each pair."""
        if self.tokens:
            return [{"input_ids": ids} for ids in self.tokens.prompts(records)]
        queries, documents = [r["query"] for r in records], [r["document"] for r in records]
        settings = {"truncation": "only_second", "max_length": self.length, "split_special_tokens": True}
        batch = self.tokenizer(queries, documents, **settings)
        return [{name: batch[name][i] for name in batch} for i in range(len(records))]

    def micro_batches(self, encoded):
        """Slices of at most max_tokens tokens, padding counted: as if all were as long as the longest."""
        longest = max((len(pair["input_ids"]) for pair in encoded), default=1)
        size = max(1, self.config.max_tokens // longest)
        return [slice(start, start + size) for start in range(0, len(encoded), size)]

    def label_logits(self, encoded):
        """float32 [N, Y], in the order of the task's labels."""
        batch = self.tokenizer.pad(encoded, return_tensors="pt").to(self.model.device)
        return self.model(**batch).logits[:, self.order].float()


def as_predictions(task, logits_NY):
    """Judgements from label logits, as grm.metrics takes them."""
    probs_NY = torch.softmax(logits_NY, -1).double().cpu().numpy()
    return [
        {
            "label": task.labels[int(row.argmax())],
            "grade": float(task.grade(row)),
            "probs": dict(zip(task.labels, row, strict=True)),
        }
        for row in probs_NY
    ]


def make_student(config, task, ranks):
    """The student of a folder: a causal model if its config says so, else a classifier."""
    folder = Path(config.student)
    if folder.exists() and not (folder / "config.json").is_file():
        raise grm.TaskError(f"--student {folder}: no config.json")
    try:
        architectures = AutoConfig.from_pretrained(config.student, trust_remote_code=False).architectures or []
    except (OSError, ValueError) as error:
        raise grm.TaskError(f"--student {config.student}: {str(error).splitlines()[0]}") from None
    causal = any(name.endswith("ForCausalLM") for name in architectures)
    if not causal and config.loss in ("forward", "reverse", "js"):
        raise grm.TaskError(f"--loss {config.loss}: compares tokens, and {config.student} is a classifier; use --loss label")
    return (CausalStudent if causal else ClassifierStudent)(config, task, ranks)


def check_vocabularies(teacher, student, loss):
    """Token losses need ids that mean the same in both; the longer vocabulary is cut to the common part."""
    ids = [{i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (teacher, student)]
    common = min(map(len, ids))
    if any(ids[0].get(i) != ids[1].get(i) for i in range(common)):
        raise grm.TaskError(f"--loss {loss}: teacher and student have different tokenizers; use --loss label")


def token_loss(config, teacher, student, prompts, answers, denominator=None):
    """token_kd_loss of answers (a list for each prompt) under both models; denominator: the tokens of all ranks' answers."""
    trees = [rollout.Tree(prompts, answers, model.device) for model in (teacher.model, student.model)]
    student_AD = rollout.answer_hidden(student.model, trees[1])
    with torch.no_grad():
        teacher_AE = rollout.answer_hidden(teacher.model, trees[0])
    heads = student.model.get_output_embeddings(), teacher.model.get_output_embeddings()
    return token_kd_loss(
        student_AD, heads[0], teacher_AE, heads[1], kind=config.loss, beta=config.beta, temperature=config.temperature,
        denominator=denominator,
    )  # fmt: skip


def label_lessons(config, student, records, probs_NY):
    """A function from a batch (indices of records) and its step to this rank's micro-batches, and the loss of one of them:
    label_kd_loss, or the gold label's cross-entropy alone, averaged over the pairs of all ranks."""
    encoded, gold_N = student.encode(records), torch.tensor([r["gold"] for r in records])

    def lessons(batch, step):
        mine = batch[student.ranks.share(len(batch))]
        pairs = [encoded[i] for i in mine]

        def loss_of(part):
            logits_NY, chosen = student.label_logits(pairs[part]), mine[part]
            gold = gold_N[chosen].to(logits_NY.device)
            if config.loss == "gold":
                loss = F.cross_entropy(logits_NY, gold)
            else:
                loss = label_kd_loss(logits_NY, probs_NY[chosen].to(gold.device), gold, config.temperature, config.gold_weight)
            return loss * (len(chosen) / len(batch))

        return student.micro_batches(pairs), loss_of

    return lessons


def token_lessons(config, teacher, student, records, traces):
    """The same for losses on tokens: of the teacher's reasonings, or of the student's own answers (on-policy)."""
    prompts, sampler = student.tokens.prompts(records), student.whole() if config.on_policy else None

    def lessons(batch, step):
        share = student.ranks.share(len(batch))
        chosen, answers = [prompts[i] for i in batch[share]], [traces[i] for i in batch[share]]
        if sampler:
            if sampler is not student.model:
                parallel.copy_weights(sampler, student.model)
            settings = {"max_new_tokens": config.max_new_tokens, "eos_id": student.tokens.eos_id, "seed": config.seed}
            settings |= {"cache_tokens": config.cache_tokens, "step": step, "first_row": share.start}
            sampler.eval()
            answers = rollout.sample(sampler, chosen, **settings).answers() if chosen else []
            student.model.train()
        tokens = student.ranks.sum([sum(len(answer) for group in answers for answer in group)])[0]
        parts = rollout.micro_batches(chosen, answers, config.max_tokens) if chosen else []
        return parts, lambda part: token_loss(config, teacher, student, chosen[part], answers[part], tokens)

    return lessons


def shuffled(indices, config):
    """Batch after batch, in epochs of shuffled orders."""
    draw, order = np.random.default_rng(config.seed), []
    while True:
        while len(order) < config.batch:
            order += draw.permutation(indices).tolist()
        yield order[: config.batch]
        order = order[config.batch :]


def train(config, ranks, teacher, student, records, probs_NY, traces):
    """The student's training, from its newest checkpoint if it was stopped; returns the seconds it took."""
    start, model, log = time.perf_counter(), student.model, Path(config.out) / "metrics.jsonl"
    usable = [i for i in range(len(records)) if config.loss == "gold" or (traces[i] and (student.reasons or probs_NY[i].sum()))]
    if student.reasons:
        lessons = token_lessons(config, teacher, student, records, traces)
    else:
        lessons = label_lessons(config, student, records, probs_NY)
    nothing = lambda: 0 * student.label_logits(student.encode(records[:1])).sum()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.05 * config.steps), config.steps).lr_lambdas[0]
    checkpoints = parallel.Checkpoints(Path(config.out) / "checkpoints", ranks, keep=1)
    done = resume(config, checkpoints, model, optimizer, log)
    quiet = True if ranks.rank else None
    bar = tqdm(initial=done, total=config.steps, desc="student", unit="step", disable=quiet, dynamic_ncols=True)
    model.train()
    for step, batch in enumerate(itertools.islice(shuffled(usable, config), done, config.steps), done):
        torch.manual_seed(np.random.SeedSequence([config.seed, step, ranks.rank]).generate_state(1).item())  # dropout
        parts, loss_of = lessons(batch, step)
        optimizer.zero_grad()
        loss = ranks.backward(student.call, loss_of, parts, nothing)
        norm = parallel.clip_gradients(model, 1.0)
        if not math.isfinite(loss + norm):
            raise grm.TaskError(f"step {step + 1}: loss {loss}, gradient norm {norm}; lower the learning rate (--lr)")
        for group in optimizer.param_groups:
            group["lr"] = config.lr * schedule(step)
        optimizer.step()
        if not ranks.rank:
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step + 1, "loss": loss, "grad_norm": norm}) + "\n")
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        bar.update()
        stop = ranks.stopping()
        if stop or (config.save_every and (step + 1) % config.save_every == 0):
            state = {"step": step + 1, "config": asdict(config)}
            checkpoints.save(step + 1, model, optimizer, lambda state=state: state | {"log_size": log.stat().st_size})
        if stop:
            raise parallel.Stopped(f"stopped after step {step + 1}; saved. The same command goes on from there")
    bar.close()
    student.finish()
    return time.perf_counter() - start


def resume(config, checkpoints, model, optimizer, log):
    """Take up the newest checkpoint of OUT, if there is one; returns the number of steps that are done."""
    path = checkpoints.newest()
    if path is None:
        checkpoints.ranks.first(lambda: log.write_text(""))
        return 0
    try:
        state = checkpoints.read(path)
        if names := parallel.differing(asdict(config), state.get("config", {}), FREE):
            raise grm.TaskError(f"--out {config.out}: holds another run ({names}); choose another folder, or delete it")
        checkpoints.load(path, model, optimizer)
    except parallel.CheckpointError as error:
        raise grm.TaskError(f"{error}; delete {config.out} to begin again") from None
    checkpoints.ranks.first(lambda: os.truncate(log, min(state["log_size"], log.stat().st_size)))
    if not checkpoints.ranks.rank:
        tqdm.write(f"resumed {path}")
    return state["step"]


# Stage 3: side by side ------------------------------------------------------------------------------------------------


def expected_calibration_error(records, predictions, bins=15):
    """Mean gap between the probability of the predicted label and how often it is right, over equal-width bins."""
    confidence_N = np.array([p["probs"].get(p["label"], 0.0) for p in predictions])
    right_N = np.array([p["label"] == r["label"] for p, r in zip(predictions, records, strict=True)])
    bin_N = np.minimum((confidence_N * bins).astype(int), bins - 1)
    gaps = [abs(confidence_N[bin_N == b].mean() - right_N[bin_N == b].mean()) * (bin_N == b).mean() for b in set(bin_N)]
    return float(sum(gaps))


def milliseconds(predict, records, batch):
    """Milliseconds a pair in batches of `batch`: the best of three passes over up to four batches."""
    records = (records * batch)[: min(4 * batch, max(batch, len(records)))]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for i in range(0, len(records), batch):
            predict(records[i : i + batch])
        times.append(time.perf_counter() - start)
    return 1000 * min(times) / len(records)


def evaluate(task, judge, tests):
    """{test set: metrics} of a teacher or student, with calibration, time and size."""
    out = {}
    for name, records in tests.items():
        predictions = [p for i in range(0, len(records), 256) for p in judge.predict(records[i : i + 256])]
        out[name] = grm.metrics(task, records, predictions) | {"ece": expected_calibration_error(records, predictions)}
    records = next(iter(tests.values()))
    times = {f"ms_per_pair_batch_{batch}": milliseconds(judge.predict, records, batch) for batch in (1, 64)}
    return {"tests": out, **times, "parameters": sum(p.numel() for p in judge.model.parameters())}


def print_table(summary):
    """One line for each model and test set."""
    print(f"\n{'':9}{'test set':<16}{'accuracy':>9}{'macro-F1':>10}{'kappa':>7}{'nDCG@10':>9}{'ECE':>7}{'malformed':>11}"
          f"{'ms, batch 1':>13}{'ms, batch 64':>14}{'parameters':>13}")  # fmt: skip
    for who in ("teacher", "student"):
        if who in summary:
            for name, m in summary[who]["tests"].items():
                ndcg = f"{m['ndcg@10']:.3f}" if "ndcg@10" in m else "-"
                times = [summary[who][f"ms_per_pair_batch_{batch}"] for batch in (1, 64)]
                print(f"{who:<9}{name:<16}{m['accuracy']:>9.3f}{m['macro_f1']:>10.3f}{m['kappa']:>7.3f}{ndcg:>9}{m['ece']:>7.3f}{m['malformed']:>11.3f}"
                      f"{times[0]:>13.2f}{times[1]:>14.3f}{summary[who]['parameters']:>13,}")  # fmt: skip


def main():
    """Check everything, ask the teacher, train the student, compare."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        config = parse_config()
        task = grm.Task.load(config.task)
        records, tests = read_pairs(config, task)
        ranks = parallel.Ranks()
        make_folder("out", config.out)
        student = make_student(config, task, ranks)
        teacher = None if config.loss == "gold" else Teacher(config, task, ranks)
        if student.reasons:
            check_vocabularies(teacher.tokenizer, student.tokenizer, config.loss)
        ranks.wait()  # no rank writes before every rank has checked
        start = time.perf_counter()
        # Stage 1: what the teacher thinks
        probs_NY, traces = teacher.labels(records) if teacher else (None, None)
        summary = {"config": asdict(config), "teacher_s": time.perf_counter() - start}
        # Stage 2: the student learns it
        ranks.stop_on_signals(lambda: ranks.rank or tqdm.write("stopping after this step; once more to stop at once, unsaved"))
        summary["training_s"] = train(config, ranks, teacher, student, records, probs_NY, traces)
        # Stage 3: side by side
        if ranks.rank == 0:
            finish(config, task, teacher, student, tests, summary)
        ranks.leave()
    except parallel.Stopped as stopped:
        if ranks.rank == 0:
            tqdm.write(f"{stopped}")
        ranks.leave()
    except (grm.TaskError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # rank 0 speaks first: torchrun ends the others as soon as one has left
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit(
            f"stopped; what the teacher has said is in --cache ({SHARD} pairs a file), and the same command goes on from there"
        )


def finish(config, task, teacher, student, tests, summary):
    """Save the student, compare it with the teacher, and say so."""
    student.save(Path(config.out))
    start = time.perf_counter()
    if teacher:
        summary["teacher"] = evaluate(task, teacher, tests)
    summary["student"] = evaluate(task, student, tests)
    summary["evaluation_s"] = time.perf_counter() - start
    (Path(config.out) / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(Path(config.out) / "checkpoints", ignore_errors=True)
    print_table(summary)
    asked = f"teacher {summary['teacher_s']:.0f} s, " if teacher else ""
    print(f"\n{config.out}/model: the student; {asked}training {summary['training_s']:.0f} s")


if __name__ == "__main__":
    main()
