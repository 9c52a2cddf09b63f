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

import numpy as np
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


@pytest.fixture
def task(tmp_path):
    """The notes task with 24 records a file."""
    folder = tmp_path / "task"
    shutil.copytree(NOTES, folder, ignore=shutil.ignore_patterns("make.py", "train.json", "__pycache__"))
    for path in folder.glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:24]))
    (folder / "train.json").write_text('{"max_new_tokens": 56}')
    return folder


def run(monkeypatch, task, out, *flags):
    """train.py in this process, as a script."""
    monkeypatch.setattr(sys, "argv", ["train.py", f"--task={task}", f"--out={out}", *SMALL, *flags])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def call_in(monkeypatch, owner, name, number, event):
    """From now on something happens before a call of a function, by its number."""
    calls, original = itertools.count(1), getattr(owner, name)

    def instead(*args, **settings):
        if next(calls) == number:
            event()
        return original(*args, **settings)

    monkeypatch.setattr(owner, name, instead)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_torchrun_writes_everything(task, tmp_path):
    """`torchrun train.py` as a user starts it; every file that the README promises is there and can be read."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", ROOT / "train.py", "--task", task, "--out", out, *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "test_longtail" in done.stdout
    assert not (out / "checkpoints").exists()
    assert json.loads((out / "config.json").read_text())["group_size"] == 2
    metrics = lines(out / "metrics.jsonl")
    assert [(r["stage"], r["step"]) for r in metrics] == [(s, i) for s in ("sft", "rl") for i in range(1, 5)]
    tests = lines(out / "tests.jsonl")
    assert [(r["stage"], r["step"]) for r in tests] == [("sft", 4), ("rl", 2), ("rl", 4)]
    figures = {f"{name}/{metric}" for name in ("test_random", "test_longtail") for metric in ("accuracy", "macro_f1")}
    assert all(set(r) == {"stage", "step"} | figures for r in tests)
    watched = {"steps_right", "wrong_in_right", "right_in_wrong", "right_throughout", "credit_right"}
    watched |= {"reward", "frac_zero_std", "truncated", "masked", "entropy", "mismatch", "clipped", "grad_norm", "approx_kl"}
    assert watched <= set(metrics[-1])
    assert not any(key.endswith("_s") for r in metrics for key in r), "what a clock decides belongs into timing.jsonl"
    assert {"sampling_s", "update_s", "evaluation_s"} <= {key for r in lines(out / "timing.jsonl") for key in r}
    assert len(lines(out / "samples.jsonl")) == 2
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"sft", "rl"} and set(summary["rl"]) == {"test_random", "test_longtail"}
    assert {"accuracy", "macro_f1", "kappa", "step_accuracy", "confusion"} <= set(summary["sft"]["test_random"])
    for name in ("sft", "model"):
        model = AutoModelForCausalLM.from_pretrained(out / name)
        assert (model.generation_config.eos_token_id, model.generation_config.max_new_tokens) == (2, 56)
        assert "assistant" in AutoTokenizer.from_pretrained(out / name).chat_template
        assert "tree" not in (out / name / "config.json").read_text(), "the export must not ask for our attention"
        assert grm.Task.load(out / name).criteria == grm.Task.load(task).criteria


def test_a_stopped_run_goes_on_to_the_same_bytes(task, tmp_path, monkeypatch, capsys):
    """SIGTERM in an update, in sampling or in an evaluation, and a kill in the last one: the same command goes on to the files
    of a run that was left alone, byte for byte. With mode balance, a KL and two updates a step."""
    flags = ["--sft_coef=0.1", "--updates_per_batch=2", "--kl_coef=0.1"]
    updates, update = [], parallel.Run.optimizer_step
    monkeypatch.setattr(parallel.Run, "optimizer_step", lambda *args: updates.append(1) or update(*args))
    run(monkeypatch, task, tmp_path / "calm", *flags)
    out = tmp_path / "out"
    stops = [
        (parallel.Run, "optimizer_step", 2, "sft step 2"),
        (grm, "judge", 2, "rl step 1"),  # evaluating what SFT gave
        (rollout, "uniforms", 1, "rl step 2"),  # sampling
        (grm, "judge", 1, "rl step 3"),  # evaluating on the way
        (grm, "judge", 2, ""),  # evaluating what RL gave
    ]
    for *place, reached in stops:
        with monkeypatch.context() as patched:
            if reached:
                call_in(patched, *place, lambda: signal.raise_signal(signal.SIGTERM))
                run(patched, task, out, *flags)
                assert re.search(f"saved.*{reached}|{reached}.*saved", capsys.readouterr().out)
            else:
                call_in(patched, *place, lambda: 1 / 0)  # no handler may see it, as none sees SIGKILL
                with pytest.raises(ZeroDivisionError):
                    run(patched, task, out, *flags)
        assert not (out / "model").exists()
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"stage": "rl", "step": 99}\n')  # as if killed later: what came after the checkpoint is redone
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
    figures = train.step_figures(batch, traces, rewards_PG, credit_A, lengths_N, ends_NK, ranks)
    shares = {"steps_right": 3 / 4, "wrong_in_right": 0, "right_in_wrong": 1 / 2, "right_throughout": 1}
    assert figures == shares | {"credit_right": 1.0}
    nothing = dict.fromkeys(figures)
    credit_A[6] *= -1  # the right first step of the wrong answer is punished
    assert train.step_figures(batch, traces, rewards_PG, credit_A, lengths_N, ends_NK, ranks)["credit_right"] == 11 / 15
    assert train.step_figures(batch[1:], traces[1:], rewards_PG[1:], credit_A[8:], lengths_N[3:], ends_NK[3:], ranks) == nothing


def answer_first(task):
    """The task in its other form, one label and no steps."""
    front = 'labels: ["0", "1"]\nrelevant: ["1"]\nsteps: []\nformat: answer-first'
    (task / "criteria.md").write_text(f"---\n{front}\n---\nAnswer with \\boxed{{grade}}.\n")
    pairs = [{"query": "ramen", "document": f"{word} tips"} for word in ("sushi", "coffee", "paris", "tokyo")]
    write(task / "sft.jsonl", [{**p, "response": f"\\boxed{{{label}}}"} for p in pairs for label in (0, 1)])
    for name in ("train", "test_random", "test_longtail"):
        write(task / f"{name}.jsonl", [{**p, "label": 1} for p in pairs])


@pytest.mark.parametrize(
    ("form", "rule", "came_to"),
    [
        ("labelled", "auto", "symmetric"),
        ("one unlabelled", "auto", "sam"),
        ("answer-first", "auto", "none"),
        ("one unlabelled", "none", "none"),
        ("one unlabelled", "sam", "sam"),
    ],
)
def test_rule_auto_and_rules_that_need_no_step_labels(task, tmp_path, monkeypatch, form, rule, came_to):
    """Another rule than what the data allow, "auto" in config.json, labels asked for that the rule never reads; or SAM's mean
    over fewer answers than all of the step."""
    if form == "answer-first":
        answer_first(task)
    if form == "one unlabelled":
        records = lines(task / "train.jsonl")
        del records[-1]["step_labels"]
        write(task / "train.jsonl", records)
    counted, mean = [], sam.mean_over_answers
    monkeypatch.setattr(sam, "mean_over_answers", lambda *args: counted.append(args[3]) or mean(*args))
    used, credit = [], sam.stepwise_credit
    monkeypatch.setattr(sam, "stepwise_credit", lambda *args: used.append(args[4]) or credit(*args))
    run(monkeypatch, task, tmp_path / "out", "--sft_steps=0", "--rl_steps=1", f"--rule={rule}", "--eval_every=0")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rule"] == came_to and used == [came_to]
    assert counted == ([3 * 2] if came_to == "sam" else [])


def test_pictures_that_fail_lose_nothing(task, tmp_path, monkeypatch):
    """A broken matplotlib at the end of a run of days: the same command draws again, and trains no more."""
    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(Figure, "savefig", lambda *args, **settings: 1 / 0)
        run(patched, task, out, "--rl_steps=1")
    metrics = (out / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(parallel.Run, "optimizer_step", None)
    run(monkeypatch, task, out, "--rl_steps=1")
    assert (out / "metrics.jsonl").read_bytes() == metrics
    assert (out / "summary.json").exists() and (out / "curves.png").exists()


def test_checkpoints_come_every_ten_minutes(task, tmp_path, monkeypatch):
    """--save_every 0 that never saves: at the end of a stage, and where the clock says so."""
    saved, save = [], parallel.Run.save
    monkeypatch.setattr(parallel.Run, "save", lambda self: saved.append((self.stage, self.step)) or save(self))
    clock = itertools.count(0, 250)  # seconds; asked once a step and once a checkpoint
    monkeypatch.setattr(parallel, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run(monkeypatch, task, tmp_path / "out", "--sft_steps=8", "--rl_steps=1")
    assert saved == [("sft", 3), ("sft", 6), ("sft", 8), ("rl", 1)]


def test_master_weights_move_at_the_default_learning_rate(task, tmp_path, monkeypatch):
    """At 1e-6 a step is below bfloat16's resolution; in float32 nearly all weights must have moved."""
    run(monkeypatch, task, tmp_path / "a", "--sft_steps=1", "--rl_steps=0", "--sft_lr=1e-6")
    fresh, _ = grm.load_model(task / "model", seed=0)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "sft")
    moved, total = 0, 0
    for (name, a), b in zip(trained.named_parameters(), fresh.parameters(), strict=True):
        if "embed" not in name:  # words that do not occur in the batch have no gradient
            moved, total = moved + (a != b).sum().item(), total + a.numel()
    assert moved > 0.99 * total


def test_bf16_on_a_cpu(task, tmp_path, monkeypatch):
    """bfloat16 computes and samples, float32 holds the weights: the losses of float32 but for rounding, a bfloat16 export."""
    for path in task.glob("test*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    for name in "01":
        flags = [f"--bf16={name}", "--kl_coef=0.1", "--sft_steps=2", "--rl_steps=2", "--eval_every=0"]
        run(monkeypatch, task, tmp_path / name, *flags)
    exact, rounded = (lines(tmp_path / name / "metrics.jsonl") for name in "01")
    assert exact[1]["loss"] != rounded[1]["loss"] == pytest.approx(exact[1]["loss"], rel=0.01)
    assert all(0 < record["mismatch"] < 0.05 for record in rounded[2:])
    for name, dtype in (("0", "float32"), ("1", "bfloat16")):
        assert json.loads((tmp_path / name / "model" / "config.json").read_text())["dtype"] == dtype


def test_rl_alone_from_a_model_and_without_demonstrations(task, tmp_path, monkeypatch):
    """A folder without sft.jsonl goes straight to RL; the summary then says what the model could before, unless only the end is
    asked for."""
    (task / "sft.jsonl").unlink()
    for out, flags, stages in (("a", [], {"start", "rl"}), ("b", ["--eval_every=0"], {"rl"})):
        run(monkeypatch, task, tmp_path / out, "--rl_steps=1", *flags)
        assert set(json.loads((tmp_path / out / "summary.json").read_text())) == stages


def test_rl_raises_the_reward(task, tmp_path, monkeypatch):
    """The sign of everything: demonstrations flip a coin between two labels, the labels do not, and RL finds out."""
    answer_first(task)
    flags = ["--sft_steps=60", "--sft_lr=2e-3", "--rl_steps=30", "--lr=1e-3", "--group_size=8", "--prompts_per_step=4"]
    run(monkeypatch, task, tmp_path / "a", *flags, "--sft_batch=8", "--eval_every=0")
    rewards = [r["reward"] for r in lines(tmp_path / "a" / "metrics.jsonl") if r["stage"] == "rl"]
    assert rewards[0] < 0.8 and rewards[-1] > 0.95
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["rl"]["test_random"]["accuracy"] == 1.0


def break_file(name, change):
    """A function that changes one file of a task."""
    return lambda task: (task / name).write_text(change((task / name).read_text()))


def second_line(text):
    return lambda old: "\n".join([old.splitlines()[0], text, *old.splitlines()[2:]])


PAIR = '"query": "ramen", "document": "sushi tips"'
LONG = f'{{"query": "{"ramen " * 500}", "document": "a", "label": 1, "step_labels": [1, 1, 1]}}'
REFUSED = {
    "malformed JSON": (break_file("train.jsonl", second_line("{oops")), [], r"train\.jsonl:2: "),
    "no label": (break_file("test_random.jsonl", second_line(f"{{{PAIR}}}")), [], r"test_random\.jsonl:2: .*label"),
    "unparsable response": (
        break_file("sft.jsonl", second_line(f'{{{PAIR}, "response": "topic: \\\\boxed{{1}}"}}')), [],
        r"sft\.jsonl:2: .*missing boxes",
    ),
    "no step labels": (
        break_file("train.jsonl", second_line(f'{{{PAIR}, "label": 1}}')), ["--rule=symmetric"],
        r"train\.jsonl:2: no step_labels; use --rule sam",
    ),
    "sam of answer-first": (answer_first, ["--rule=sam"], "--rule sam: .*none"),
    "labels that cannot be written": (
        break_file("criteria.md", lambda old: old.replace('"3"]  #', '"3", "3 stars"]  #')), [], r"cannot write .*3 stars",
    ),
    "no tokenizer": (lambda task: (task / "model" / "tokenizer.json").unlink(), [], "task/model: cannot be .*tokenizer"),
    "no chat template": (lambda task: (task / "model" / "chat_template.jinja").unlink(), [], "no chat template"),
    "no such run": (lambda task: None, ["--model=/no/such/run"], "/no/such/run: "),
    "context": (break_file("train.jsonl", second_line(LONG)), [], r"train\.jsonl:2: criteria, query and answer leave no room"),
    "no room for a prompt": (lambda task: None, ["--max_new_tokens=511"], "lower --max_new_tokens"),
    "response too long": (lambda task: None, ["--max_new_tokens=20"], r"sft\.jsonl:\d+: .*more than --max_new_tokens"),
    "cache too small": (lambda task: None, ["--cache_tokens=99"], r"cache_tokens \(99\): a group of"),
    "group of one": (lambda task: None, ["--group_size=1"], "--group_size: at least 2"),
    "negative rate": (lambda task: None, ["--lr=-1"], "--lr, .*above 0"),
    "nothing to do": (lambda task: None, ["--sft_steps=0", "--rl_steps=0"], "nothing to do"),
    "nothing to learn from": (lambda task: (task / "sft.jsonl").unlink(), ["--rl_steps=0"], "nothing to do.*demonstrations"),
    "no demonstrations": (lambda task: (task / "sft.jsonl").unlink(), ["--sft_coef=1"], r"--sft_coef: .*sft\.jsonl"),
    "settings in a list": (break_file("train.json", lambda old: "[1]"), [], r"train\.json: must be a JSON object"),
    "no tests": (lambda task: [path.unlink() for path in task.glob("test*.jsonl")], [], "no test"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_work(case, task, tmp_path, monkeypatch):
    """One clear message that names file and line or the flag; nothing half-written."""
    change, flags, message = REFUSED[case]
    change(task)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, task, tmp_path / "out", *flags)
    caught.match(message)
    assert not (tmp_path / "out").exists()


def test_unknown_flags_and_values_are_refused(task, tmp_path, monkeypatch, capsys):
    """argparse must neither guess an abbreviation nor pass a setting by, and name the file that holds it."""
    for flags in (["--ruel=none"], ["--rule=all"], ["--group=4"], ["--lr=fast"]):
        with pytest.raises(SystemExit):
            run(monkeypatch, task, tmp_path / "out", *flags)
        assert flags[0].split("=")[0] in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, task, tmp_path / "out", "--help")
    assert caught.value.code == 0 and "5 % warm-up" in " ".join(capsys.readouterr().out.split())
    for settings in ('{"learning_rate": 1}', '{"lr": "fast"}'):
        (task / "train.json").write_text(settings)
        with pytest.raises(SystemExit) as caught:
            run(monkeypatch, task, tmp_path / "out")
        assert caught.value.code == 2 and re.search(r"train\.json: error: .*--l", capsys.readouterr().err)


def test_byte_order_marks_and_line_ends_of_windows(task):
    """A file saved by an editor on Windows is as good as another."""
    for name in ("criteria.md", "train.jsonl"):
        text = (task / name).read_text()
        (task / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    loaded = grm.Task.load(task)
    assert loaded.steps == ["topic", "constraints", "promotion"] and len(loaded.read(task / "train.jsonl")) == 24


def test_an_output_folder_of_another_run_is_refused(task, tmp_path, monkeypatch, capsys):
    """Neither overwritten nor mixed: another run, a finished run, or somebody's own files."""
    out, flags = tmp_path / "out", ["--sft_steps=1", "--rl_steps=0"]
    out.write_text("a file")
    for place in (out, out / "below"):
        with pytest.raises(SystemExit, match=str(out)):
            run(monkeypatch, task, place)
    out.unlink()
    out.mkdir()
    write(out / "pairs.jsonl", [{"query": "mine"}])
    with pytest.raises(SystemExit, match=r"--out .*other files"):
        run(monkeypatch, task, out)
    assert [path.name for path in out.iterdir()] == ["pairs.jsonl"] and lines(out / "pairs.jsonl") == [{"query": "mine"}]
    (out / "pairs.jsonl").unlink()
    run(monkeypatch, task, out, *flags)
    written = {path: path.read_bytes() for path in out.rglob("*.json*")}
    capsys.readouterr()
    run(monkeypatch, task, out, *flags)
    assert "holds this run, finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--seed 0"):
        run(monkeypatch, task, out, *flags, "--seed=5")
    assert all(path.read_bytes() == text for path, text in written.items())


def test_the_learning_rate_warms_up_and_falls():
    """A schedule that begins at 0 or at the peak, warms up for another share of the steps, or ends elsewhere."""
    rates = [parallel.learning_rate(2.0, step, 80, final) for final in (0.1, 0.0) for step in range(80)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and max(rates) == 2.0 and rates[4] < 2.0
    middle = 3 + 76 // 2
    assert rates[middle] == pytest.approx(1.1) and rates[79] == pytest.approx(0.2)
    assert rates[80 + middle] == pytest.approx(1.0) and rates[159] == pytest.approx(0.0)
    assert parallel.learning_rate(2.0, 0, 1) == 2.0


def test_batches_are_epochs_of_shuffles():
    """Every record once an epoch, also across the seam of a batch, in an order that depends on the seed."""
    records = list(range(10))
    drawn = [r for step in range(5) for r in parallel.epoch_batch(records, 4, step, 0, 1)]
    assert sorted(drawn[:10]) == records and sorted(drawn[10:]) == records and drawn[:10] != drawn[10:]
    assert parallel.epoch_batch(records, 4, 0, 0, 1) != parallel.epoch_batch(records, 4, 0, 7, 1)


EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
EXPORTED = {name: {} for name in ARCHITECTURES} | {
    "qwen3_moe": EXPERTS | {"num_experts": 4},
    "glm4_moe": EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1},
    "apertus": {},
}
NAMES = {  # a tensor of the file, as the hub has it
    "qwen3_moe": "model.layers.0.mlp.experts.3.gate_proj.weight",
    "glm4_moe": "model.layers.1.mlp.gate.e_score_correction_bias",
    "apertus": "model.layers.1.mlp.act_fn.beta",
}


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", EXPORTED)
def test_an_exported_model_reloads(task, tmp_path, architecture, bf16):
    """A tensor lost or left fresh, a buffer (a router's bias) forgotten or rounded to bfloat16, experts under the names of
    transformers' own layout, which serving engines do not know."""
    model = make_model(architecture, **EXPORTED[architecture])
    buffers = [name for name, _ in model.named_buffers() if name in model.state_dict()]
    assert bool(buffers) == (architecture in ("glm4_moe", "apertus"))
    for name in buffers:
        model.get_buffer(name).uniform_()
    expected = copy.deepcopy(model)
    dtype = torch.bfloat16 if bf16 else torch.float32
    for p in expected.parameters():
        p.data = p.data.to(dtype).float()
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    renderer = SimpleNamespace(tokenizer=tokenizer, eos_id=2, task=grm.Task.load(task))
    ranks = parallel.Ranks()
    policy = parallel.shard(rollout.Policy(model), ranks, bf16)
    train.export(policy, renderer, tmp_path / "model", 56, dtype, ranks)
    (path,) = (tmp_path / "model").glob("*.safetensors")
    assert NAMES.get(architecture, "model.embed_tokens.weight") in load_file(path)
    again, report = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"] and not again.training
    assert all(torch.equal(again.get_buffer(name), expected.get_buffer(name)) for name in buffers)
    ids = torch.arange(3, 33)[None]
    expected.set_attn_implementation("sdpa")
    torch.testing.assert_close(again(ids).logits, expected(ids).logits)


def test_answer_first_notes_train(tmp_path, monkeypatch):
    """The embedded task in its other form, from make.py: demonstrations parse, steps are credited."""
    make = runpy.run_path(str(NOTES / "make.py"))
    make["make"](tmp_path / "task", "answer-first")
    for path in (tmp_path / "task").glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:24]))
    run(monkeypatch, tmp_path / "task", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["rl"]["test_random"]["step_accuracy"]) == ["label", "topic", "constraints", "promotion"]
    record = grm.Task.load(tmp_path / "task").read(tmp_path / "task" / "train.jsonl")[0]
    assert record["step_labels"][0] == record["step_labels"][-1] == record["label"]


def test_the_sweep_of_credit_rules_reads_its_runs(tmp_path, monkeypatch, capsys):
    """Differences between runs of different seeds, a figure missing in a step taken for 0, a run that is done made again."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import credit

    for seed in range(3):
        for r, rule in enumerate(credit.RULES):
            folder = credit.folder_of(tmp_path, 5, seed, 8, rule)
            folder.mkdir(parents=True)
            reward = 0.5 + 0.1 * seed + (0.01 * (seed + 1) if rule == "sam" else 0)
            figures = {"stage": "rl", "steps_right": 0.5, "wrong_in_right": 0.25, "right_in_wrong": 0.75, "credit_right": 0.6}
            figures["right_throughout"] = 0.9
            records = [figures | {"reward": min(reward, 0.1 * (step + 1))} for step in range(20)]
            records[0] = records[0] | dict.fromkeys(("wrong_in_right", "credit_right"))
            write(folder / "metrics.jsonl", [{"stage": "sft"}, *records])
            test = {"accuracy": 0.5 + 0.01 * r, "step_accuracy": {"a": 0.2, "b": 0.4}}
            tests = {"test_random": test, "test_longtail": test}
            (folder / "summary.json").write_text(json.dumps({"start": {}, "rl": tests}))
    monkeypatch.setattr(sys, "argv", ["credit.py", f"--out={tmp_path}", "--seeds"])
    monkeypatch.setattr(credit.subprocess, "run", lambda *args, **settings: pytest.fail("nothing is left to run"))
    credit.main()
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.setdefault(cells[2] if len(cells) > 2 else "", []).append(cells)
    answers, steps = rows["sam"]
    # 0.01, 0.02 and 0.03, less what the ramp at the start takes of them.
    means = [np.mean([min(0.5 + 0.1 * s + d, 0.1 * (i + 1)) for i in range(20)]) for s in range(3) for d in (0, 0.01 * (s + 1))]
    gained = np.subtract(means[1::2], means[::2])
    half = 4.303 * gained.std(ddof=1) / 3**0.5
    assert answers[:3] == ["5", "8", "sam"] and answers[5] == f"{gained.mean():+.3f} ± {half:.3f}"
    assert answers[6:9] == ["0.530", "0.530", "+0.030 ± 0.000"]
    assert steps[3:6] == ["0.500", "+0.000 ± 0.000", "0.300"] and steps[6:] == [
        "0.900 → 0.900",
        "0.60",
        "0.250 → 0.250",
        "0.75 → 0.75",
    ]
    assert rows["plain GRPO"][0][5] == "-"
    assert all((tmp_path / name).stat().st_size > 10000 for name in ("credit.png", "course.png"))
    folder = credit.folder_of(tmp_path, 5, 0, 8, "sam")
    credit.run(folder, 1)
    assert not (folder.parent / f"{folder.name}.log").exists()
