"""train.py end to end on a cut-down notes task: files, repeatability, resumption, refusals, and that RL raises the reward."""

import copy
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, NOTES, ROOT, make_model
from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import grm
import parallel
import rollout
import sam
import train

SMALL = ["--sft_steps=4", "--sft_batch=4", "--rl_steps=4", "--prompts_per_step=3", "--group_size=2", "--eval_every=2"]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def task(tmp_path):
    """The notes task with 24 records a file."""
    folder = tmp_path / "task"
    shutil.copytree(NOTES, folder, ignore=shutil.ignore_patterns("make.py", "train.json", "__pycache__"))
    for path in folder.glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:24]))
    (folder / "train.json").write_text('{"max_new_tokens": 56}')
    return folder


def answer_first(task):
    """The task in its other form, one label and no steps."""
    front = 'labels: ["0", "1"]\nrelevant: ["1"]\nsteps: []\nformat: answer-first'
    (task / "criteria.md").write_text(f"---\n{front}\n---\nAnswer with \\boxed{{grade}}.\n")
    pairs = [{"query": "ramen", "document": f"{word} tips"} for word in ("sushi", "coffee", "paris", "tokyo")]
    write(task / "sft.jsonl", [{**p, "response": f"\\boxed{{{label}}}"} for p in pairs for label in (0, 1)])
    for name in ("train", "test_random", "test_longtail"):
        write(task / f"{name}.jsonl", [{**p, "label": 1} for p in pairs])


def second_line(task, name, **changes):
    """Change the second line of one of a task's files; None takes a field away."""
    first, second, *rest = lines(task / name)
    write(task / name, [first, {key: x for key, x in (second | changes).items() if x is not None}, *rest])


unchanged = lambda task: None
unlink = lambda pattern: lambda task: [path.unlink() for path in task.glob(pattern)]
one_unlabelled = lambda task: second_line(task, "train.jsonl", step_labels=None)


def run(monkeypatch, task, out, *flags):
    """train.py in this process, as a script."""
    monkeypatch.setattr(sys, "argv", ["train.py", f"--task={task}", f"--out={out}", *SMALL, *flags])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def test_torchrun_writes_everything(task, tmp_path):
    """`torchrun train.py` as a user starts it; every file that the README promises is there and can be read. A file saved by an
    editor on Windows is as good as another."""
    out, criteria = tmp_path / "run", grm.Task.load(task).criteria
    (task / "model" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    for path in (task / "criteria.md", task / "train.jsonl"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    command = [sys.executable, "-m", "torch.distributed.run", ROOT / "train.py", "--task", task, "--out", out, *SMALL]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and "test_longtail" in done.stdout, done.stderr
    assert not (out / "checkpoints").exists() and json.loads((out / "config.json").read_text())["group_size"] == 2
    metrics, tests, timing = (lines(out / f"{name}.jsonl") for name in ("metrics", "tests", "timing"))
    assert [(r["stage"], r["step"]) for r in metrics] == [(s, i) for s in ("sft", "rl") for i in range(1, 5)]
    assert [(r["stage"], r["step"]) for r in tests] == [("sft", 4), ("rl", 2), ("rl", 4)]
    figures = {f"{name}/{metric}" for name in ("test_random", "test_longtail") for metric in ("accuracy", "macro_f1")}
    assert all(set(r) == {"stage", "step"} | figures for r in tests)
    watched = "steps_right wrong_in_right right_in_wrong right_throughout credit_right reward frac_zero_std truncated masked"
    assert {*watched.split(), "entropy", "mismatch", "clipped", "grad_norm", "approx_kl"} <= set(metrics[-1])
    assert not any(key.endswith("_s") for r in metrics for key in r), "what a clock decides belongs into timing.jsonl"
    assert {"sampling_s", "update_s", "evaluation_s"} <= {key for r in timing for key in r}
    samples, pair = lines(out / "samples.jsonl"), {"query", "document", "label", "step_labels"}
    assert [set(row) - pair for row in samples] == [{"step", "answer", "problem", "reward", "advantage", "steps"}] * 2
    assert len(samples[0]["step_labels"]) == 3 and (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"sft", "before_rl", "rl"} and set(summary["rl"]) == {"test_random", "test_longtail"}
    assert set(summary["before_rl"]) == {"greedy", "reward", "pass@2", "frac_zero_std", "malformed"}
    assert re.search(r"warning: of \d+ answers most are malformed: \d+ \w+", done.stdout) and "before_rl" not in done.stdout
    for name in ("sft", "model"):
        model = AutoModelForCausalLM.from_pretrained(out / name)
        assert (model.generation_config.eos_token_id, model.generation_config.max_new_tokens) == ([1, 2], 56)
        assert len({path.stat().st_mode for path in (out / name).iterdir()}) == 1  # weights 0600: for their owner alone
        assert "assistant" in AutoTokenizer.from_pretrained(out / name).chat_template
        assert "tree" not in (out / name / "config.json").read_text(), "the export must not ask for our attention"
        assert grm.Task.load(out / name).criteria == criteria


def test_a_stopped_run_goes_on_to_the_same_bytes(task, tmp_path, monkeypatch, capsys):
    """SIGTERM in an update, in sampling or in an evaluation, and a kill in the last one: the same command goes on to the files
    of a run that was left alone, byte for byte. With mode balance, a KL and two updates a step."""
    flags = ["--sft_coef=0.1", "--updates_per_batch=2", "--kl_coef=0.1"]
    updates, update = [], parallel.Run.optimizer_step
    monkeypatch.setattr(parallel.Run, "optimizer_step", lambda *args: updates.append(1) or update(*args))
    run(monkeypatch, task, tmp_path / "calm", *flags)
    out = tmp_path / "out"

    def stop_in(owner, name, number, event):
        """A run in which something happens before the call of a function, by its number."""
        calls, original = itertools.count(1), getattr(owner, name)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, lambda *a, **k: (next(calls) == number and event(), original(*a, **k))[1])
            run(patched, task, out, *flags)

    for owner, name, number, reached in (
        (parallel.Run, "optimizer_step", 2, "sft step 2"),
        (grm, "judge", 2, "rl step 1"),  # evaluating what SFT gave
        (rollout, "uniforms", 2, "rl step 2"),  # sampling, behind the model's check
        (grm, "judge", 1, "rl step 3"),  # evaluating on the way
    ):
        stop_in(owner, name, number, lambda: signal.raise_signal(signal.SIGTERM))
        assert re.search(f"saved.*{reached}|{reached}.*saved", capsys.readouterr().out)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"stage": "rl", "step": 99}\n')  # as if killed later: what came after the checkpoint is redone
    with pytest.raises(ZeroDivisionError):  # in the last evaluation; no handler may see it, as none sees SIGKILL
        stop_in(grm, "judge", 2, lambda: 1 / 0)
    assert not (out / "model").exists()
    run(monkeypatch, task, out, *flags)
    assert len(updates) == 2 * (4 + 2 * 4)  # none is done again
    for name in ("metrics.jsonl", "tests.jsonl", "samples.jsonl", "summary.json", "model/model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()


def test_what_is_logged_of_steps():
    """Credit read in another answer or beside the step's end, malformed answers or pairs without step_labels counted."""
    trace = lambda labels, ends: grm.Trace([grm.Step(0, *step, None) for step in zip(ends, labels, strict=True)], labels[-1])
    malformed = grm.Trace(problem="not ended")
    ends_NK = torch.tensor([[2, 3], [0, 0], [1, 2], [1, 2], [0, 0], [1, 2]])
    lengths_N = torch.tensor([4, 2, 2, 3, 1, 2])
    traces = [trace("31", [2, 3]), malformed, trace("33", [1, 2])], [trace("31", [1, 2]), malformed, trace("00", [1, 2])]
    batch = [{"label": "1", "step_labels": ["3", "1"]}, {"label": "1"}]
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    credit_A = torch.tensor([9, 1, 2, 9, 9, 9, 4, -8, *[9] * 6]).float()
    ranks = SimpleNamespace(gather_rows=lambda x: x)
    expected = {"steps_right": 3 / 4, "wrong_in_right": 0, "right_in_wrong": 1 / 2, "right_throughout": 1, "credit_right": 1.0}
    assert train.step_figures(batch, traces, rewards_PG, credit_A, lengths_N, ends_NK, ranks) == expected
    unlabelled = batch[1:], traces[1:], rewards_PG[1:], credit_A[8:], lengths_N[3:], ends_NK[3:]
    assert train.step_figures(*unlabelled, ranks) == dict.fromkeys(expected)


@pytest.mark.parametrize(("change", "rule", "came_to"), [
    (unchanged, "auto", "symmetric"),
    (one_unlabelled, "auto", "none"),
    (one_unlabelled, "sam", "sam"),
    (answer_first, "auto", "none"),
])  # fmt: skip
def test_rule_auto_and_rules_that_need_no_step_labels(task, tmp_path, monkeypatch, change, rule, came_to):
    """Another rule than the data allow, labels asked for that no rule reads; SAM's mean over fewer answers than the step's."""
    change(task)
    counted, mean, used, credit = [], sam.mean_over_answers, [], sam.stepwise_credit
    monkeypatch.setattr(sam, "mean_over_answers", lambda *args: counted.append(args[3]) or mean(*args))
    monkeypatch.setattr(sam, "stepwise_credit", lambda *args: used.append(args[4]) or credit(*args))
    run(monkeypatch, task, tmp_path / "out", "--sft_steps=0", "--rl_steps=1", f"--rule={rule}", "--eval_every=0")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rule"] == came_to and used == [came_to]
    assert counted == ([3 * 2] if came_to == "sam" else [])
    assert json.loads((tmp_path / "out" / "summary.json").read_text()).keys() == {"before_rl", "rl"}


def test_pictures_that_fail_lose_nothing(task, tmp_path, monkeypatch):
    """A broken matplotlib after days that has to train again. Without sft.jsonl RL comes first, and tests before it."""
    out = tmp_path / "out"
    (task / "sft.jsonl").unlink()
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(Figure, "savefig", lambda *args, **settings: 1 / 0)
        run(patched, task, out, "--rl_steps=1")
    metrics = (out / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(parallel.Run, "optimizer_step", None)
    run(monkeypatch, task, out, "--rl_steps=1")
    assert (out / "metrics.jsonl").read_bytes() == metrics
    assert json.loads((out / "summary.json").read_text()).keys() == {"start", "before_rl", "rl"}
    assert (out / "curves.png").exists()


def test_checkpoints_come_every_ten_minutes(task, tmp_path, monkeypatch):
    """--save_every 0 that never saves: at the end of a stage, and where the clock says so."""
    saved, save = [], parallel.Run.save
    monkeypatch.setattr(parallel.Run, "save", lambda self: saved.append((self.stage, self.step)) or save(self))
    clock = itertools.count(0, 250)  # seconds; asked once a step and once a checkpoint
    monkeypatch.setattr(parallel, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run(monkeypatch, task, tmp_path / "out", "--sft_steps=8", "--rl_steps=1")
    assert saved == [("sft", 3), ("sft", 6), ("sft", 8), ("rl", 1)]


def test_bf16_on_a_cpu(task, tmp_path, monkeypatch):
    """bfloat16 computes and samples: the losses of float32 but for rounding, a bfloat16 export. float32 holds the weights: a
    step at 1e-6 is below bfloat16's resolution, but must move nearly all."""
    for name in "01":
        flags = ["--kl_coef=0.1", "--sft_steps=2", "--rl_steps=2", "--eval_every=0"]
        run(monkeypatch, task, tmp_path / name, f"--bf16={name}", *flags)
    exact, rounded = (lines(tmp_path / name / "metrics.jsonl") for name in "01")
    assert exact[1]["loss"] != rounded[1]["loss"] == pytest.approx(exact[1]["loss"], rel=0.01)
    assert all(0 < record["mismatch"] < 0.05 for record in rounded[2:])
    exported = [json.loads((tmp_path / name / "model" / "config.json").read_text())["dtype"] for name in "01"]
    assert exported == ["float32", "bfloat16"]
    run(monkeypatch, task, tmp_path / "a", "--sft_steps=1", "--rl_steps=0", "--sft_lr=1e-6")
    fresh, trained = grm.load_model(task / "model", seed=0)[0], grm.load_model(tmp_path / "a" / "sft")[0]
    of_layers = [torch.nn.utils.parameters_to_vector(m.base_model.layers.parameters()) for m in (fresh, trained)]
    assert (of_layers[0] != of_layers[1]).float().mean() > 0.99


def test_rl_raises_the_reward(task, tmp_path, monkeypatch):
    """The sign of everything: demonstrations flip a coin between two labels, the labels do not, and RL finds out."""
    answer_first(task)
    flags = ["--sft_steps=60", "--sft_lr=2e-3", "--rl_steps=30", "--lr=1e-3", "--group_size=8", "--prompts_per_step=4"]
    run(monkeypatch, task, tmp_path / "a", *flags, "--sft_batch=8", "--eval_every=0")
    rewards = [r["reward"] for r in lines(tmp_path / "a" / "metrics.jsonl") if r["stage"] == "rl"]
    assert rewards[0] < 0.8 and rewards[-1] > 0.95
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["rl"]["test_random"]["accuracy"] == 1.0
    before = summary["before_rl"]
    assert before["greedy"] <= before["pass@8"] == 1 and before["frac_zero_std"] < 0.5
    assert abs(before["reward"] - rewards[0]) < 0.3
    samples = lines(tmp_path / "a" / "samples.jsonl")
    assert [row["step"] for row in samples] == [1, 1, 11, 11, 21, 21] and samples[0]["reward"] > samples[1]["reward"]
    assert all(step["credit"] == row["advantage"] for row in samples for step in row["steps"])


def test_chances_before_rl(capsys):
    """Hours of RL on answers that are all malformed, or all right, and exit code 0. The cause is named; the run goes on."""
    task = grm.Task.load(NOTES)
    tokenizer = AutoTokenizer.from_pretrained(NOTES / "model")
    renderer = grm.Renderer(task, tokenizer)
    config, ranks = train.Config(group_size=2), parallel.Ranks()
    text = r"topic \boxed{3} constraints \boxed{3} promotion \boxed{3}"
    right, wrong = (renderer.encode_response(text[:-2] + grade) for grade in ("3}", "1}"))
    endless, two_boxes = right[:-1], renderer.encode_response(text[:45])
    pairs = [{"prompt_ids": [7], "label": "3"}] * 4
    mixed, greedy = [[right, wrong], [wrong, wrong], [right, wrong], [right, right]], [right, wrong, wrong, wrong]
    same = [[wrong, wrong], [right, right]] * 2
    malformed = [[endless, endless], [endless, two_boxes]] * 2
    counted = r"6 not ended, 2 missing boxes"
    for groups, best, expected, message in (
        (mixed, greedy, (0.25, 0.5, 0.75, 0.5, 0.0), None),
        (same, [right] * 4, (1.0, 0.5, 0.5, 1.0, 0.0), r"warning: nearly no group has .*\n.*--temperature"),
        (malformed, greedy, (0.25, 0.0, 0.0, 1.0, 1.0), f"warning: of 8 answers most are malformed: {counted}\n.*--sft_steps"),
    ):
        engine = SimpleNamespace()
        engine.generate = lambda prompts, best=best: (best, None)
        engine.sample = lambda prompts, groups=groups, **options: SimpleNamespace(answers=groups)
        before = train.chances(engine, renderer, pairs, config, ranks)
        assert before == dict(zip(("greedy", "reward", "pass@2", "frac_zero_std", "malformed"), expected, strict=True))
        first, _, more = capsys.readouterr().out.partition("\n")
        assert first == "before RL, 4 pairs: " + ", ".join(f"{name} {share:.2f}" for name, share in before.items())
        assert re.match(message, more) if message else not more


def test_doubtful_settings_are_said(capsys):
    """Fresh weights at the rates of pretrained ones, which leave them as they are; pretrained ones at the rates of fresh ones,
    broken in a step; a router that is thought to be trained."""
    for model, rates, moe, said in (
        (NOTES / "model", (1e-5, 1e-6), {}, [r"--sft_lr 1e-05: fresh", "--lr 1e-06: fresh weights hardly learn"]),
        (NOTES / "model", (1.5e-3, 2e-4), {"router_aux_loss_coef": 0.0}, []),
        ("Qwen/Qwen3-0.6B", (1.5e-3, 2e-4), {}, ["--sft_lr 0.0015 may", "--lr 0.0002 may break pretrained weights"]),
        ("Qwen/Qwen3-0.6B", (1e-5, 1e-6), {"router_aux_loss_coef": 0.001}, ["router's balancing loss is not trained"]),
    ):
        train.check_settings(train.Config(model=str(model), sft_lr=rates[0], lr=rates[1]), SimpleNamespace(**moe))
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == len(said) and all(map(str.__contains__, shown, said)), shown


zebras = lambda task: second_line(task, "sft.jsonl", response="topic: zebras " + "\\boxed{1} " * 3)
unknown = lambda task: [second_line(task, path.name, document="zebras are bold " * 90) for path in task.glob("t*.jsonl")]
REFUSED = {
    "unknown words": (unknown, [], r"model: its tokenizer does not know \d+.\d% of the words, such as .*'zebras'"),
    "unknown word": (zebras, [], r"sft\.jsonl:2: the response cannot be used: the tokenizer does not know \['zebras'\]"),
    "response": (lambda task: second_line(task, "sft.jsonl", response="topic: \\boxed{1}"), [], r"sft\.jsonl:2: .*missing box"),
    "no step labels": (one_unlabelled, ["--rule=symmetric"], r"train\.jsonl:2: no step_labels; use --rule sam"),
    "too long": (lambda task: second_line(task, "train.jsonl", query="ramen " * 500), [], r"train\.jsonl:2: criteria, query"),
    "long response": (unchanged, ["--max_new_tokens=20"], r"sft\.jsonl:\d+: .*more than --max_new_tokens"),
    "sam of answer-first": (answer_first, ["--rule=sam"], "--rule sam: .*none"),
    "cache too small": (unchanged, ["--cache_tokens=99"], r"cache_tokens is 99, and a group of"),
    "nothing to learn from": (unlink("sft.jsonl"), ["--rl_steps=0"], "nothing to do.*demonstrations"),
    "no demonstrations": (unlink("sft.jsonl"), ["--sft_coef=1"], r"--sft_coef: .*sft\.jsonl"),
    "no tests": (unlink("test*.jsonl"), [], "no test"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_work(case, task, tmp_path, monkeypatch):
    """One clear message that names file and line or the flag; nothing half-written."""
    change, flags, message = REFUSED[case]
    change(task)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, task, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_the_model_is_checked_before_work(task, tmp_path, monkeypatch):
    """At the longest position of the run; one that the tree computes wrongly is refused in a line, before OUT is made."""
    checked = []

    def refuse(model, position):
        checked.append(position)
        raise rollout.UnsupportedModelError("apart by 0.5")

    monkeypatch.setattr(rollout, "check_model", refuse)
    second_line(task, "test_longtail.jsonl", document="winter " * 200)
    with pytest.raises(SystemExit, match=r"^apart by 0\.5$"):
        run(monkeypatch, task, tmp_path / "out")
    renderer = grm.Renderer(grm.Task.load(task), AutoTokenizer.from_pretrained(task / "model"))
    longest = max(len(prompt) for path in task.glob("*.jsonl") for prompt in renderer.prompts(lines(path)))
    assert checked == [longest + 56] and not (tmp_path / "out").exists()


def test_help_can_be_formatted(capsys):
    """A percent sign in a help text, which argparse takes for a format."""
    with pytest.raises(SystemExit) as caught:
        grm.parse_settings(train.Config, "train.json", ["--help"])
    assert caught.value.code == 0 and "5 % warm-up" in " ".join(capsys.readouterr().out.split())


def test_an_output_folder_of_another_run_is_refused(task, tmp_path, monkeypatch, capsys):
    """Neither overwritten nor mixed: another run, a finished run, or a file of that name."""
    out, flags = tmp_path / "out", ["--sft_steps=1", "--rl_steps=0"]
    with pytest.raises(SystemExit, match=r"criteria\.md"):
        run(monkeypatch, task, task / "criteria.md")
    run(monkeypatch, task, out, *flags)
    written = {path: path.read_bytes() for path in out.rglob("*.json*")}
    run(monkeypatch, task, out, *flags)
    assert "holds this run, finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--seed 0"):
        run(monkeypatch, task, out, *flags, "--seed=5")
    assert all(path.read_bytes() == text for path, text in written.items())


def test_schedules():
    """Rates that begin at 0, warm up too long or end elsewhere; records that an epoch lacks or has twice, at a seam too."""
    rates = [parallel.learning_rate(2.0, step, 80, 0.1) for step in range(80)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and max(rates) == 2.0 and rates[4] < 2.0
    assert [rates[3 + 76 // 2], rates[79]] == pytest.approx([1.1, 0.2]) and parallel.learning_rate(2.0, 0, 1) == 2.0
    records = list(range(10))
    drawn = [r for step in range(5) for r in parallel.epoch_batch(records, 4, step, 0, 1)]
    assert sorted(drawn[:10]) == records and sorted(drawn[10:]) == records and drawn[:10] != drawn[10:]
    assert parallel.epoch_batch(records, 4, 0, 0, 1) != parallel.epoch_batch(records, 4, 0, 7, 1)


EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
EXPORTED = {  # settings, and a tensor of the file as the hub has it
    **{name: ({}, "model.embed_tokens.weight") for name in ARCHITECTURES},
    "qwen3_moe": (EXPERTS | {"num_experts": 4}, "model.layers.0.mlp.experts.3.gate_proj.weight"),
    "glm4_moe": (EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1}, "model.layers.1.mlp.gate.e_score_correction_bias"),
    "apertus": ({}, "model.layers.1.mlp.act_fn.beta"),
}


@pytest.mark.parametrize("architecture", EXPORTED)
def test_an_exported_model_reloads(task, tmp_path, architecture):
    """A tensor left fresh, a buffer (a router's bias) lost or rounded, experts by names that no serving engine knows."""
    changes, tensor = EXPORTED[architecture]
    model = make_model(architecture, **changes)
    buffers = [name for name, _ in model.named_buffers() if name in model.state_dict()]
    assert bool(buffers) == (architecture in ("glm4_moe", "apertus"))
    for name in buffers:
        model.get_buffer(name).uniform_()
    expected, ranks = copy.deepcopy(model), parallel.Ranks()
    for p in expected.parameters():
        p.data = p.data.bfloat16().float()
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    renderer = SimpleNamespace(tokenizer=tokenizer, end_ids=[2], task=grm.Task.load(task))
    policy = parallel.shard(rollout.Policy(model), ranks, bf16=True)
    train.export(policy, renderer, tmp_path / "model", 56, torch.bfloat16, ranks)
    (path,) = (tmp_path / "model").glob("*.safetensors")
    assert tensor in load_file(path)
    again, report = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"] and not again.training
    assert all(torch.equal(again.get_buffer(name), expected.get_buffer(name)) for name in buffers)
    ids = torch.arange(3, 33)[None]
    expected.set_attn_implementation("sdpa")
    torch.testing.assert_close(again(ids).logits, expected(ids).logits)


def test_the_sweep_of_credit_rules_reads_its_runs(tmp_path, monkeypatch, capsys):
    """Differences between runs of different seeds, a figure missing in a step taken for 0, a run that is done made again."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import credit

    for name in ("ROOT", "LINES"):
        monkeypatch.setattr(credit, name, tmp_path / ("credit.jsonl" if name == "LINES" else ""))
    (tmp_path / "docs").mkdir()
    (tmp_path / "task-5" / "student").mkdir(parents=True)
    for seed, rule in itertools.product(range(3), ["sft", *credit.RULES]):
        folder = tmp_path / "5" / f"seed{seed}" / rule.replace(", ", "-")
        folder.mkdir(parents=True)
        record = {"stage": "rl", "reward": 0.5 + 0.1 * seed + (0.01 * (seed + 1) if rule == "sam" else 0), "masked": 0.0}
        record |= {"steps_right": 0.5, "credit_right": 0.6}
        write(folder / "metrics.jsonl", [{"stage": "sft"}, record | {"credit_right": None}, *[record] * 19])
        test = {"accuracy": 0.5 + 0.03 * (rule == "sam"), "step_accuracy": {"a": 0.2, "b": 0.4}}
        tests = {"test_random": test, "test_longtail": test}
        (folder / "summary.json").write_text(json.dumps({"rl": tests, "before_rl": {"reward": 0.5}}))
    monkeypatch.setattr(sys, "argv", ["credit.py", f"--out={tmp_path}", "--tasks=5", "--seeds", "0", "1", "2"])
    monkeypatch.setattr(credit.subprocess, "run", lambda *args, **settings: pytest.fail("nothing is left to run"))
    for _ in range(2):
        credit.main()
    assert len(credit.read_lines()) == 12 and credit.read_lines()[0]["credit_right"] == 0.6
    assert (tmp_path / "docs" / "credit.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    row = next(line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| 5 | sam"))
    assert row[2:] == ["3", "0.620", "+0.020 ± 0.025", "0.530", "+0.030 ± 0.000", "0.500", "+0.000 ± 0.000"]
    assert "5: sam less plain GRPO: reward +0.020 ± 0.025, tests +0.030 ± 0.000; n 3" in out
