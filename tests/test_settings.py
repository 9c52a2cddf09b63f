"""Every setting arrives: runs of three steps, each setting changed in turn, against plain loops over a Hugging Face model."""

import copy
import itertools
import json
import math
import re
import shutil

import kill
import numpy as np
import pytest
import torch
from conftest import NOTES

import distill
import grm
import parallel
import rollout
import train

REINFORCED = {
    "sft_steps": 2, "sft_lr": 1e-3, "sft_batch": 3, "rl_steps": 3, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 20,
    "temperature": 1.3, "lr": 1e-2, "updates_per_batch": 2, "clip_low": 0.05, "clip_high": 0.1, "advantage_clamp": 1.2,
    "seed": 3, "sft_coef": 0.2, "kl_coef": 0.5, "is_cap": 1.3, "weight_decay": 0.3, "max_grad_norm": 0.5,
}  # fmt: skip
REINFORCED_OTHERWISE = {
    "rl_steps": 2, "prompts_per_step": 3, "group_size": 3, "max_new_tokens": 18, "temperature": 0.8, "lr": 3e-3, "seed": 5,
    "updates_per_batch": 1, "clip_low": 0.3, "clip_high": 0.01, "advantage_clamp": 0.0, "sft_coef": 0.0, "sft_batch": 4,
    "kl_coef": 0.0, "is_cap": 1.02, "weight_decay": 0.0, "max_grad_norm": 2.0, "normalize_std": False, "rule": "sam",
    "step_targets": "labels",
}  # fmt: skip
TUNED = {
    "rl_steps": 0, "sft_steps": 3, "max_new_tokens": 20, "sft_batch": 3, "sft_lr": 1e-2, "weight_decay": 0.3,
    "max_grad_norm": 0.5,
}  # fmt: skip
TUNED_OTHERWISE = {"sft_steps": 2, "sft_batch": 2, "sft_lr": 3e-3, "weight_decay": 0.0, "max_grad_norm": 2.0, "seed": 5}
DISTILLED = {
    "steps": 3, "max_new_tokens": 8, "batch": 3, "lr": 1e-2, "weight_decay": 0.3, "temperature": 2.0, "gold_weight": 0.3,
    "labelled": 20,
}  # fmt: skip
DISTILLED_OTHERWISE = {
    "steps": 2, "batch": 2, "lr": 3e-3, "weight_decay": 0.0, "temperature": 0.7, "gold_weight": 0.0, "labelled": 3, "seed": 5,
    "loss": "gold", "pairs": "test_random.jsonl",
}  # fmt: skip
# What rule sam keeps of three steps that say the pair's label (R) or another (W).
SAM = {"RRR": "111", "WRR": "111", "RWR": "101", "WWR": "001", "RRW": "001", "RWW": "011", "WRW": "101", "WWW": "111"}
EOS = 2
GRADES = ["-1", "0", "1", "2", "3"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The notes task with 24 records a file, criteria and demonstrations cut short, and its settings the defaults; the same
    with the label alone, and a teacher."""
    folder = tmp_path_factory.mktemp("settings")
    shutil.copytree(NOTES, folder / "steps", ignore=shutil.ignore_patterns("*.py", "train.json", "__pycache__"))
    for path in (folder / "steps").glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()[:24]]
        for record in records:
            if "response" in record:
                record["response"] = " ".join(re.findall(r"\\boxed{ ?-?\d ?}", record["response"]))
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    kill.make_task(folder / "label")
    for path in folder.glob("*/criteria.md"):
        _, front, _ = path.read_text().split("---")
        path.write_text(f"---{front}---\nClose with \\boxed{{grade}}.\n")  # short prompts
    (folder / "label" / "distill.json").unlink()
    return {"rl": folder / "steps", "sft": folder / "steps", "distill": folder / "label"}


def parse(renderer, ids):
    """An untrained model's answer as if it had reasoned: three steps, whose labels are those of their first ids."""
    ends = [0, len(ids) // 3, 2 * len(ids) // 3, len(ids)]
    steps = [grm.Step(a, b, GRADES[ids[a] % 2], None) for a, b in itertools.pairwise(ends)]
    is_malformed = ids[0] % 6 == 0 and ids[-1] != EOS
    return grm.Trace(problem="missing boxes") if is_malformed else grm.Trace(steps, steps[-1].label)


def noisy(sample, *args, **settings):
    """Answers whose sampler differs from the trainer, as one in bfloat16 does."""
    sampled = sample(*args, **settings)
    draw = torch.Generator().manual_seed(settings["step"])
    sampled.logprobs_A += 0.3 * torch.randn(sampled.logprobs_A.shape, generator=draw)
    return sampled


def run(monkeypatch, module, task, out, settings):
    """main() of train.py or distill.py; the rollouts that it sampled, what it logged of its steps, and its model's folder."""
    rollouts, sample = [], rollout.sample
    with monkeypatch.context() as patched:
        patched.setattr(grm.Renderer, "parse", parse)
        patched.setattr(train, "draw_curves", lambda out: None)
        patched.setattr(module, "evaluate", lambda *args: {})
        patched.setattr(grm, "print_table", lambda *args: None)
        if module is train:
            patched.setattr(rollout, "sample", lambda *a, **k: rollouts.append(noisy(sample, *a, **k)) or rollouts[-1])
        flags = [f"--{name}={value}" for name, value in {"task": task, "out": out, **settings}.items()]
        patched.setattr("sys.argv", ["x.py", *map(str, flags)])
        module.main()
    return rollouts, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], out / "model"


def drawn(records, size, step, *key):
    """The records of a step: the first epoch is a shuffle."""
    order = np.random.default_rng([*key, 0]).permutation(len(records))
    return [records[i] for i in order[step * size : (step + 1) * size]]


def schedule(peak, step, steps, final):
    """Of so few steps the first is the whole warm-up; then a cosine."""
    return peak * (final + (1 - final) * (0.5 + 0.5 * math.cos(math.pi * step / (steps - 1))))


def logits_of(model, rows, temperature=1.0):
    """Logits [T, V] of each row's answer; padding behind the rows is seen by none."""
    width = max(len(prompt + answer) for prompt, answer in rows)
    logits = model(torch.tensor([[*p, *a, *[0] * (width - len(p + a))] for p, a in rows])).logits / temperature
    return [logits[n, len(p) - 1 : len(p + a) - 1] for n, (p, a) in enumerate(rows)]


def logprobs(model, rows, temperature=1.0):
    """Of the answers' tokens, end to end."""
    logits, ids = torch.cat(logits_of(model, rows, temperature)), [i for _, answer in rows for i in answer]
    return logits.log_softmax(-1)[range(len(ids)), ids]


def update(model, optimizer, loss, lr, max_norm):
    """An optimizer step; the gradient's norm."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return norm


def sft_loss(model, renderer, records):
    """Mean over the demonstrations' tokens."""
    rows = [(renderer.prompt(r["query"], r["document"]), renderer.encode_response(r["response"])) for r in records]
    return -logprobs(model, rows).mean()


def credits(config, record, group):
    """Of each token of a group's answers: its credit, and its weight in the loss."""
    traces = [parse(None, answer) for answer in group]
    rewards = torch.tensor([float(trace.label == record["label"]) for trace in traces])
    advantages = rewards - rewards.mean()
    if config.normalize_std:
        advantages = advantages / (rewards.std() + 1e-6)
    if config.advantage_clamp:
        advantages = advantages.clamp(-config.advantage_clamp, config.advantage_clamp)
    targets = record["step_labels"]
    for answer, trace, A in zip(group, traces, advantages.tolist(), strict=True):
        labels = [step.label for step in trace.steps]
        sam = SAM["".join("R" if label == record["label"] else "W" for label in labels)] if labels else ""
        kept = []
        for i in range(len(answer)):
            inside = [k for k, step in enumerate(trace.steps) if step.start <= i < step.end]
            if config.rule == "none" or not inside:
                kept.append(True)
                continue
            (k,) = inside
            right = labels[k] == targets[k]
            if config.step_targets == "change" and k > 0:
                places, gold = ([GRADES.index(label) for label in of] for of in (labels, targets))
                right = places[k] - places[k - 1] == gold[k] - gold[k - 1]
            kept.append(sam[k] == "1" if config.rule == "sam" else right == (A > 0))
        for keep in kept:
            yield keep * A, 1 / sum(kept) if config.rule == "sam" else 1.0


def plain_rl(config, task, rollouts):
    """train.sft and train.rl in plain loops, from the answers that were sampled. Yields losses, norms and rates; the model
    comes last."""
    loaded, (_, tokenizer) = grm.Task.load(task), grm.load_model(config.model, meta=True)
    *tuned, model = plain_sft(config, task, rollouts)
    yield from tuned
    renderer, reference = grm.Renderer(loaded, tokenizer, 512, config.max_new_tokens), copy.deepcopy(model)
    pairs, demonstrations = loaded.read(task / "train.jsonl"), loaded.read(task / "sft.jsonl", ("response",))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    signals = []
    for step, sampled in enumerate(rollouts):
        batch = drawn(pairs, config.prompts_per_step, step, config.seed, 1)
        groups = list(zip(batch, sampled.answers, strict=True))
        rows = [(renderer.prompt(r["query"], r["document"]), answer) for r, group in groups for answer in group]
        for n, logits_TV in enumerate(logits_of(model, rows, config.temperature)):
            uniforms = np.random.default_rng([config.seed, step, n]).random(config.max_new_tokens)[: len(logits_TV)]
            cdf_TV = logits_TV.detach().double().softmax(-1).cumsum(-1)
            ends = cdf_TV[range(len(uniforms)), rows[n][1]]
            starts = ends - cdf_TV.diff(prepend=torch.zeros(len(uniforms), 1))[range(len(uniforms)), rows[n][1]]
            assert (starts.numpy() - 1e-3 < uniforms).all() and (uniforms < ends.numpy() + 1e-3).all()
        credit, share = torch.tensor([c for r, group in groups for c in credits(config, r, group)]).T
        share = share / (len(rows) if config.rule == "sam" else len(credit))
        signals.append(credit.any())
        old, ref = (logprobs(of, rows, config.temperature).detach() for of in (model, reference))
        weights = (old - sampled.logprobs_A).exp().clamp(max=config.is_cap)
        for _ in range(config.updates_per_batch):
            now = logprobs(model, rows, config.temperature)
            ratio = (now - old).exp()
            clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            gain = share * weights * torch.minimum(ratio * credit, clipped * credit)
            loss = config.kl_coef * 0.5 * ((now - ref) ** 2).mean() - gain.sum()
            if config.sft_coef:
                chosen = drawn(demonstrations, config.sft_batch, step, config.seed, 2)
                loss = loss + config.sft_coef * sft_loss(model, renderer, chosen)
            lr = schedule(config.lr, step, config.rl_steps, 0.1)
            norm = update(model, optimizer, loss, lr, config.max_grad_norm)
        yield loss.item(), norm, lr
    assert any(signals)
    yield model


def plain_sft(config, task, rollouts):
    """train.sft in plain loops."""
    loaded = grm.Task.load(task)
    model, tokenizer = grm.load_model(config.model, seed=config.seed)
    renderer, records = grm.Renderer(loaded, tokenizer), loaded.read(task / "sft.jsonl", ("response",))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    for step in range(config.sft_steps):
        loss = sft_loss(model, renderer, drawn(records, config.sft_batch, step, config.seed, 0))
        lr = schedule(config.sft_lr, step, config.sft_steps, 0.1)
        yield loss.item(), update(model, optimizer, loss, lr, config.max_grad_norm), lr
    yield model


def plain_distillation(config, task, rollouts):
    """distill.train of a causal student on label distributions, in plain loops."""
    loaded = grm.Task.load(task)
    teacher, student = grm.load_model(config.teacher)[0], grm.load_model(config.student, seed=config.seed)[0]
    renderer = grm.Renderer(loaded, grm.load_model(config.student, meta=True)[1])
    records = [record for name in config.pairs.split(",") for record in loaded.read(task / name, ())]
    golds = ["label" in r and i < config.labelled for i, r in enumerate(records)]
    pairs = [(r, gold) for r, gold in zip(records, golds, strict=True) if gold or config.loss != "gold"]
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=config.weight_decay)
    for step in range(config.steps):
        total = 0.0
        for record, is_labelled in drawn(pairs, config.batch, step, config.seed):
            ids = torch.tensor([renderer.prompt(record["query"], record["document"]) + renderer.opening])
            p, q = (model(ids).logits[0, -1, renderer.label_ids] for model in (teacher, student))
            cross_entropy = -q.log_softmax(-1)[GRADES.index(record["label"])] if is_labelled else 0.0
            T = config.temperature
            p_T, log_q_T = (p.detach() / T).softmax(-1), (q / T).log_softmax(-1)
            share = config.gold_weight if is_labelled else 0.0
            kd = (1 - share) * T * T * (p_T * (p_T.log() - log_q_T)).sum() + share * cross_entropy
            total = total + (cross_entropy if config.loss == "gold" else kd) / config.batch
        lr = schedule(config.lr, step, config.steps, 0.0)
        yield total.item(), update(student, optimizer, total, lr, 1.0), lr
    yield student


@pytest.fixture(scope="module")
def unchanged():
    """What the runs with nothing changed logged, to see that a change has an effect."""
    return {}


CASES = [
    *(("rl", REINFORCED, change) for change in [{}, *({name: value} for name, value in REINFORCED_OTHERWISE.items())]),
    ("rl", REINFORCED, {"rule": "none", "max_tokens": 300, "cache_tokens": 300}),
    *(("sft", TUNED, change) for change in [{}, *({name: value} for name, value in TUNED_OTHERWISE.items())]),
    *(("distill", DISTILLED, change) for change in [{}, *({name: value} for name, value in DISTILLED_OTHERWISE.items())]),
]


@pytest.mark.parametrize(("stage", "base", "change"), CASES, ids=[f"{stage} {change}" for stage, _, change in CASES])
def test_a_setting_arrives(tasks, tmp_path, monkeypatch, unchanged, stage, base, change):
    """A setting that is parsed, bounded and documented, and never reaches the loss: it must change the run, and the run must
    be that of the plain loop with this setting. The losses, norms and rates of three steps, and the weights they lead to."""
    module, task, settings = distill if stage == "distill" else train, tasks[stage], {**base, **change}
    if stage == "distill":
        settings |= {"teacher": task / "trained", "student": task / "model", "cache": tmp_path / "cache"}
    rollouts, logged, folder = run(monkeypatch, module, task, tmp_path / "out", settings)
    argv = [f"--{name}={value}" for name, value in {"task": task, **settings}.items()]
    config = grm.parse_settings(module.Config, "none.json", argv)
    plain = {"rl": plain_rl, "sft": plain_sft, "distill": plain_distillation}[stage]
    *expected, model = plain(config, task, rollouts)
    got = [(r["loss"], r["grad_norm"], r["lr"]) for r in logged]
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-5)
    trained, _ = grm.load_model(folder)
    ours, theirs = (torch.nn.utils.parameters_to_vector(of.parameters()) for of in (trained, model))
    assert ((ours - theirs).abs() > 1e-4).float().mean() < 2e-3  # Adam turns rounding at a gradient of 0 into a step
    if not change:
        unchanged[stage] = got
    elif stage in unchanged:
        assert got != unchanged[stage]


@pytest.mark.parametrize("stage", [{"rl_steps": 0}, {"sft_steps": 0, "rl_steps": 1}], ids=["sft", "rl"])
def test_the_sampling_model_follows_the_master_weights(tasks, tmp_path, monkeypatch, stage):
    """On CUDA it is a bfloat16 copy; here it is made on CPU, and must follow every update of both stages."""
    made, sampling_copy = [], parallel.sampling_copy

    def bf16_copy(model, ranks, bf16):
        made.append((model, sampling_copy(model, ranks, bf16=True)))
        return made[0][1]

    monkeypatch.setattr(parallel, "sampling_copy", bf16_copy)
    run(monkeypatch, train, tasks["rl"], tmp_path / "out", REINFORCED | {"sft_lr": 1e-2} | stage)
    (model, copied), fresh = made[0], grm.load_model(NOTES / "model", seed=REINFORCED["seed"])[0]
    buffers = [x.dtype for x in copied.buffers()]
    assert buffers and set(buffers) == {torch.float32}  # rotary frequencies in bfloat16 would move far positions
    for ours, theirs, before in zip(copied.parameters(), model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16)) and not torch.equal(ours, before.to(torch.bfloat16))


def test_the_command_line_wins_over_the_file_over_the_defaults(tmp_path):
    """A setting of TASK/train.json that beats the one given by hand, or is lost, as true and numbers among strings are."""
    flags = [f"--task={tmp_path}", "--lr=0.5"]
    assert grm.parse_settings(train.Config, "train.json", flags) == train.Config(task=str(tmp_path), lr=0.5)
    in_file = {"lr": 0.1, "sft_lr": 1e-7, "rl_steps": 7, "normalize_std": False, "rule": "none", "model": "a b", "bf16": "1"}
    (tmp_path / "train.json").write_text(json.dumps(in_file))
    expected = train.Config(**{"task": str(tmp_path), **in_file, "lr": 0.5})
    assert grm.parse_settings(train.Config, "train.json", flags) == expected
    expected = train.Config(**{"task": str(tmp_path), **in_file, "normalize_std": True})
    assert grm.parse_settings(train.Config, "train.json", [flags[0], "--normalize_std=True"]) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lrr": 1}, "unrecognized arguments: --lrr=1"),
        ({"sft": 1}, "unrecognized arguments: --sft=1"),  # the beginning of several names
        ({"lr": "fast"}, "argument --lr: invalid float value: 'fast'"),
        ({"lr": [1]}, "argument --lr: invalid float value"),
        ({"rl_steps": 1.5}, "argument --rl_steps.*: invalid int value: '1.5'"),
        ({"normalize_std": "perhaps"}, "argument --normalize_std.*perhaps"),
        ({"rule": "positive"}, "argument --rule: invalid choice: 'positive'"),
    ],
)
def test_settings_that_are_none_are_refused(tmp_path, capsys, setting, message):
    """A misspelt setting without effect, or a value of another type that fails hours later; which file it stands in."""
    ((name, value),) = setting.items()
    with pytest.raises(SystemExit) as stop:
        grm.parse_settings(train.Config, "train.json", [f"--task={tmp_path}", f"--{name}={value}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error) and "train.json" not in error.splitlines()[-1]
    (tmp_path / "train.json").write_text(json.dumps(setting))
    with pytest.raises(SystemExit) as stop:
        grm.parse_settings(train.Config, "train.json", [f"--task={tmp_path}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(rf"{tmp_path}/train\.json: error: {message}", error)


@pytest.mark.parametrize("text", ["{", "[1]", "3", "\xff"])
def test_a_settings_file_must_be_an_object(tmp_path, text):
    """A traceback out of json, without the file's name."""
    (tmp_path / "train.json").write_text(text, encoding="latin-1")
    with pytest.raises(grm.TaskError, match=f"{tmp_path}/train.json: "):
        grm.parse_settings(train.Config, "train.json", [f"--task={tmp_path}"])
