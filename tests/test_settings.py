"""Every setting arrives: runs of a few steps, each setting changed in turn, against a plain loop over a Hugging Face model."""

import copy
import itertools
import json
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
import sam
import train

# Of each setting: what the runs have, and what it is changed to.
REINFORCED = {
    "sft_steps": (2, 1), "sft_lr": (1e-3, 1e-2), "sft_batch": (3, 4), "rl_steps": (3, 2), "prompts_per_step": (2, 3),
    "group_size": (4, 3), "max_new_tokens": (20, 18), "temperature": (1.3, 0.8), "lr": (1e-2, 3e-3), "seed": (3, 5),
    "updates_per_batch": (2, 1), "clip_low": (0.05, 0.3), "clip_high": (0.1, 0.01), "advantage_clamp": (1.2, 0.0),
    "normalize_std": (True, False), "sft_coef": (0.2, 0.0), "kl_coef": (0.5, 0.0), "is_cap": (1.3, 1.02),
    "weight_decay": (0.3, 0.0), "max_grad_norm": (0.5, 2.0), "rule": ("symmetric", "sam"), "step_targets": ("change", "labels"),
}  # fmt: skip
DISTILLED = {
    "steps": (3, 2), "batch": (3, 2), "lr": (1e-2, 3e-3), "weight_decay": (0.3, 0.0), "temperature": (2.0, 0.7),
    "gold_weight": (0.3, 0.0), "labelled": (20, 3), "seed": (0, 5), "loss": ("label", "gold"),
    "pairs": ("train.jsonl,sft.jsonl", "train.jsonl"),
}  # fmt: skip


def changes(table):
    """The runs' settings, as they are and with each of them changed."""
    base = {name: value for name, (value, _) in table.items()}
    return [base, *(base | {name: other} for name, (_, other) in table.items())]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The notes task with 24 records a file; prompts and demonstrations are short."""
    folder = tmp_path_factory.mktemp("settings") / "task"
    shutil.copytree(NOTES, folder, ignore=shutil.ignore_patterns("*.py", "train.json", "__pycache__"))
    for path in folder.glob("*.jsonl"):
        text = "".join(path.read_text().splitlines(keepends=True)[:24])
        path.write_text(re.sub(r'[^"]*?(\\\\boxed{-?\d})', r"\1", text))  # of a demonstration, the boxes alone
    front = (folder / "criteria.md").read_text().split("---")[1]
    (folder / "criteria.md").write_text(f"---{front}---\nClose with \\boxed{{grade}}.\n")
    return folder


def parse(renderer, ids):
    """An untrained model's answer as if it had reasoned: three steps, whose labels are those of their first ids."""
    ends = [0, len(ids) // 3, 2 * len(ids) // 3, len(ids)]
    steps = [grm.Step(a, b, ["-1", "0"][ids[a] % 2], None) for a, b in itertools.pairwise(ends)]
    return grm.Trace(steps, steps[-1].label)


def run(monkeypatch, module, out, settings):
    """main() with a sampler that differs from the trainer, as one in bfloat16 does: what it sampled and how, and logged."""
    rollouts, sample = [], rollout.sample

    def noisy(*args, **how):
        sampled = sample(*args, **how)
        rollouts.append((sampled, how))
        sampled.logprobs_A += 0.3 * torch.randn(sampled.logprobs_A.shape, generator=torch.Generator().manual_seed(how["step"]))
        return sampled

    monkeypatch.setattr(grm.Renderer, "parse", parse)
    monkeypatch.setattr(rollout, "sample", noisy)
    monkeypatch.setattr(train, "draw_curves", lambda out: None)
    monkeypatch.setattr(train, "chances", lambda *args: {})
    monkeypatch.setattr(module, "evaluate", lambda *args: {})
    monkeypatch.setattr(rollout, "check_model", lambda *args: None)
    monkeypatch.setattr("sys.argv", ["x.py", f"--out={out}", *(f"--{name}={value}" for name, value in settings.items())])
    module.main()
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return rollouts, [(r["loss"], r["grad_norm"], r["lr"]) for r in logged]


def logprobs(model, rows, temperature=1.0):
    """Of the answers' tokens, end to end, from rows of a prompt and an answer."""
    found = []
    for prompt, answer in rows:
        logits_TV = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
        found.append(logits_TV.log_softmax(-1)[range(len(answer)), answer])
    return torch.cat(found)


def credits(config, task, batch, sampled):
    """The credit of each token."""
    judged = [(record, parse(None, ids)) for record, group in zip(batch, sampled.answers, strict=True) for ids in group]
    rewards_PG = torch.tensor([grm.reward(trace, record["label"]) for record, trace in judged]).view(len(batch), -1)
    advantages_PG = sam.group_advantages(rewards_PG, config.normalize_std, config.advantage_clamp or None)
    lengths_N, right = sampled.lengths_N, []
    for record, trace in judged:
        if config.rule == "sam":
            right.append(grm.step_verdicts(trace, [record["label"]] * 3))
        elif config.step_targets == "labels":
            right.append(grm.step_verdicts(trace, record["step_labels"]))
        else:
            right.append(grm.step_changes(trace, record["step_labels"], task))
    ends_NK = torch.tensor([[step.end for step in trace.steps] for _, trace in judged])
    credit_A = sam.stepwise_credit(advantages_PG.flatten(), ends_NK, torch.tensor(right), lengths_N, config.rule)
    return sam.mean_over_answers(credit_A, lengths_N, len(credit_A), len(judged)) if config.rule == "sam" else credit_A


def plain(config, rollouts):
    """train.sft and train.rl, given the answers that were sampled. Yields losses, norms and rates."""
    task, (model, tokenizer) = grm.Task.load(config.task), grm.load_model(config.model, seed=config.seed)
    renderer = grm.Renderer(task, tokenizer)
    pairs, demonstrations = (task.read(task.folder / f"{name}.jsonl", ()) for name in ("train", "sft"))
    adamw = {"lr": 0.0, "betas": (0.9, 0.95), "weight_decay": config.weight_decay}

    def sft_loss(step, key):
        batch = parallel.epoch_batch(demonstrations, config.sft_batch, step, config.seed, key)
        answers = [renderer.encode_response(record["response"]) for record in batch]
        return -logprobs(model, zip(renderer.prompts(batch), answers, strict=True)).mean()

    def update(loss, lr):
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        return loss.item(), norm, lr

    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    for step in range(config.sft_steps):
        yield update(sft_loss(step, 0), parallel.learning_rate(config.sft_lr, step, config.sft_steps))
    reference, optimizer = copy.deepcopy(model), torch.optim.AdamW(model.parameters(), **adamw)
    for step, (sampled, how) in enumerate(rollouts):
        batch = parallel.epoch_batch(pairs, config.prompts_per_step, step, config.seed, 1)
        rows = [(prompt, ids) for prompt, group in zip(renderer.prompts(batch), sampled.answers, strict=True) for ids in group]
        old, ref = (logprobs(of, rows, config.temperature).detach() for of in (model, reference))
        arrived = ("group_size", "max_new_tokens", "temperature", "seed")
        assert all(how[name] == getattr(config, name) for name in arrived) and how["step"] == step
        credit, weights = credits(config, task, batch, sampled), (old - sampled.logprobs_A).exp().clamp(max=config.is_cap)
        for _ in range(config.updates_per_batch):
            now = logprobs(model, rows, config.temperature)
            ratio = (now - old).exp()
            clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            gain = weights * torch.minimum(ratio * credit, clipped * credit)
            loss = config.kl_coef * 0.5 * ((now - ref) ** 2).mean() - gain.mean() + config.sft_coef * sft_loss(step, 2)
            figures = update(loss, parallel.learning_rate(config.lr, step, config.rl_steps))
        yield figures


BASE, *CHANGED = changes(REINFORCED)


@pytest.mark.parametrize("settings", [BASE, BASE | {"rule": "none", "max_tokens": 300, "cache_tokens": 300}, *CHANGED])
def test_a_setting_arrives(task, tmp_path, monkeypatch, settings):
    """A setting that is parsed, bounded and documented, and never reaches the loss: the run must be that of the plain loop."""
    rollouts, logged = run(monkeypatch, train, tmp_path / "out", settings | {"task": task})
    expected = list(plain(train.Config(**settings, task=str(task)), rollouts))
    np.testing.assert_allclose(logged, expected, rtol=2e-3, atol=1e-5)
    metrics, samples = ((tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("metrics", "samples"))
    best, worst = (json.loads(line)["advantage"] for line in samples)  # of a group with a signal, if there is one
    assert (best > 0 > worst) == (json.loads(metrics[settings["sft_steps"]])["frac_zero_std"] < 1)


def test_a_setting_of_distillation_changes_the_run(tmp_path, monkeypatch):
    """The same for distill.py, whose losses are compared with plain ones elsewhere: a setting must have an effect."""
    task, runs = kill.make_task(tmp_path / "task"), []
    folders = {"task": task, "teacher": task / "trained", "student": task / "model"}
    for i, settings in enumerate(changes(DISTILLED)):
        _, logged = run(monkeypatch, distill, tmp_path / f"{i}", settings | folders | {"cache": tmp_path / f"{i}-labels"})
        assert logged not in runs, settings
        runs.append(logged)


@pytest.mark.parametrize("stage", [{"rl_steps": 0}, {"sft_steps": 0, "rl_steps": 1}], ids=["sft", "rl"])
def test_the_sampling_model_follows_the_master_weights(task, tmp_path, monkeypatch, stage):
    """On CUDA it is a bfloat16 copy; here it is made on CPU, and must follow every update of both stages."""
    made, copied = [], parallel.sampling_copy
    bf16_copy = lambda model, ranks, bf16: made.extend([model, copied(model, ranks, bf16=True)]) or made[1]
    monkeypatch.setattr(parallel, "sampling_copy", bf16_copy)
    run(monkeypatch, train, tmp_path / "out", BASE | {"task": task, "sft_lr": 1e-2} | stage)
    model, sampler = made
    assert {x.dtype for x in sampler.buffers()} == {torch.float32}  # rotary frequencies in bfloat16 would move far positions
    for ours, theirs in zip(sampler.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16))


def test_settings_of_the_file(tmp_path, capsys, monkeypatch):
    """A setting of TASK/train.json that beats the command line's, or has no effect, or fails hours later, without its place."""
    (tmp_path / "train.json").write_text('{"lr": 0.1, "rl_steps": 7, "normalize_std": false}')
    parse = lambda *flags: grm.parse_settings(train.Config, "train.json", [f"--task={tmp_path}", *flags])
    config = parse("--lr=0.5", "--keep=2")
    assert config == train.Config(task=str(tmp_path), lr=0.5, rl_steps=7, normalize_std=False)
    # A run's first lines: what is not the default, and who says so.
    said = f"--rl_steps 7 --normalize_std False  ({tmp_path}/train.json)\n--task {tmp_path} --lr 0.5  (the command line)\n"
    assert capsys.readouterr().out == said
    with monkeypatch.context() as patched:
        patched.setenv("RANK", "1")
        parse()
    assert capsys.readouterr().out == ""
    (tmp_path / "train.json").write_text('{"lr": [1]}')
    with pytest.raises(SystemExit):
        parse()
    assert f"{tmp_path}/train.json: error: argument --lr: invalid float" in capsys.readouterr().err
    for text, message in (
        ("[1]", "must be a JSON object, {setting: value}"),
        ('{"lr": 1', "is no JSON: "),
        ('{"lrr": 1}', "there is no setting lrr$"),
        ('{"rl_steps": "3"}', "rl_steps must be without quotes, not '3'"),
    ):
        (tmp_path / "train.json").write_text(text)
        with pytest.raises(grm.TaskError, match=f"^{tmp_path}/train.json: {message}"):
            parse()


def test_limits_of_settings(tmp_path):
    """A run of nothing, a division by zero, a gradient upwards, or a message that leaves open which of two it was."""
    least = {"group_size": 2, "temperature": 0.001} | dict.fromkeys(("prompts_per_step", "sft_batch", "updates_per_batch"), 1)
    least |= dict.fromkeys(("lr", "sft_lr", "max_grad_norm", "is_cap"), 1e-12)
    limits = {f"--{name}=0": x for name, x in least.items()} | {"--lr=nan": 1e-12, "--lr=inf": 1e-12}
    for flag, x in (limits | {"--rl_steps=-1": 0, "--kl_coef=-1": 0}).items():
        name, _, value = flag.partition("=")
        message = rf"^{name}: must be a number of at least {x}, not {value}(\.0)?$"
        with pytest.raises(grm.TaskError, match=message):
            grm.parse_settings(train.Config, "train.json", [f"--task={tmp_path}", flag])
    for flag in ("--steps=0", "--batch=0", "--samples=0", "--temperature=0", "--lr=0", "--labelled=-2"):
        with pytest.raises(grm.TaskError, match=rf"^{flag.partition('=')[0]}: must be a number of at least "):
            grm.parse_settings(distill.Config, "distill.json", [f"--task={tmp_path}", flag])
