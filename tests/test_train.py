"""train.py end to end on a cut-down notes task: files, repeatability, resumption, refusals, and that RL raises the reward."""

import itertools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NOTES, ROOT
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

import grm
import parallel
import rollout
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


def stop_in(monkeypatch, owner, name, call):
    """From now on a run gets SIGTERM in a call, by its number, of what may be broken off."""
    calls, original = itertools.count(1), getattr(owner, name)

    def stopping(*args, **settings):
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
            assert name == "optimizer_step", "the signal must break off what runs"
        return original(*args, **settings)

    monkeypatch.setattr(owner, name, stopping)


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
    assert {"accuracy", "macro_f1", "kappa", "step_accuracy", "recall", "confusion"} <= set(summary["sft"]["test_random"])
    for name in ("sft", "model"):
        model = AutoModelForCausalLM.from_pretrained(out / name)
        assert (model.generation_config.eos_token_id, model.generation_config.max_new_tokens) == (2, 56)
        assert "assistant" in AutoTokenizer.from_pretrained(out / name).chat_template
        assert "tree" not in (out / name / "config.json").read_text(), "the export must not ask for our attention"
        assert grm.Task.load(out / name).criteria == grm.Task.load(task).criteria


def test_a_stopped_run_goes_on_to_the_same_bytes(task, tmp_path, monkeypatch, capsys):
    """SIGTERM within a step, in sampling or in an evaluation, which are not waited for: the same command goes on, with what is
    saved, to the files of a run that was left alone, byte for byte. With stages, mode balance, a KL and two updates a step."""
    write(task / "train.jsonl", [{**r, "stage": i % 2} for i, r in enumerate(lines(task / "train.jsonl"))])
    flags = ["--sft_coef=0.1", "--updates_per_batch=2", "--kl_coef=0.1"]
    updates, update = [], parallel.Progress.optimizer_step
    monkeypatch.setattr(parallel.Progress, "optimizer_step", lambda *args: updates.append(1) or update(*args))
    run(monkeypatch, task, tmp_path / "calm", *flags)
    stops = [
        (parallel.Progress, "optimizer_step", 2, "sft step 2"),
        (grm, "judge", 2, "sft step 4"),  # evaluating what SFT gave: its second test set
        (rollout, "uniforms", 2, "rl step 1"),  # sampling
        (grm, "judge", 1, "rl step 2"),  # evaluating on the way
        (grm, "judge", 3, "rl step 4"),  # evaluating what RL gave, after that
    ]
    for *place, reached in stops:
        with monkeypatch.context() as patched:
            stop_in(patched, *place)
            run(patched, task, tmp_path / "out", *flags)
        assert f"stopped after {reached}; saved" in capsys.readouterr().out
        assert not (tmp_path / "out" / "model").exists()
        with open(tmp_path / "out" / "metrics.jsonl", "a") as file:
            file.write('{"stage": "rl", "step": 99}\n')  # as if killed later: what came after the checkpoint is redone
    run(monkeypatch, task, tmp_path / "out", *flags)
    assert len(updates) == 2 * (4 + 2 * 4)  # none is done again
    for name in ("metrics.jsonl", "tests.jsonl", "samples.jsonl", "summary.json", "model/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()


def test_what_is_logged_of_steps():
    """Credit read in another answer or beside the step's end, malformed answers or pairs without step_labels counted."""
    trace = lambda labels, ends: grm.Trace([grm.Step(0, *step, None) for step in zip(ends, labels, strict=True)], labels[-1])
    malformed = grm.Trace(problem="not ended")
    ends_NK = torch.tensor([[2, 3], [0, 0], [1, 2], [1, 2], [0, 0], [1, 2]])
    lengths_N = torch.tensor([4, 2, 2, 3, 1, 2])
    traces = [trace("31", [2, 3]), malformed, trace("33", [1, 2])], [trace("31", [1, 2]), malformed, trace("00", [1, 2])]
    batch = [{"label": "1", "step_labels": ["3", "1"], "targets": ["1", "1"]}, {"label": "1", "targets": ["1", "1"]}]
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    credit_A = torch.tensor([9, 1, 2, 9, 9, 9, 4, -8, *[9] * 6]).float()
    ranks = SimpleNamespace(device="cpu", gather=lambda x: x)
    figures = train.step_figures(batch, traces, rewards_PG, credit_A, lengths_N, ends_NK, ranks)
    shares = {"steps_right": 3 / 4, "wrong_in_right": 0, "right_in_wrong": 1 / 2, "right_throughout": 1}
    assert figures == shares | {"credit_right": 1.0}
    nothing = dict.fromkeys(figures)
    credit_A[6] *= -1  # the right first step of the wrong answer is punished
    assert train.step_figures(batch, traces, rewards_PG, credit_A, lengths_N, ends_NK, ranks)["credit_right"] == 11 / 15
    assert train.step_figures(batch[1:], traces[1:], rewards_PG[1:], credit_A[8:], lengths_N[3:], ends_NK[3:], ranks) == nothing


def test_budgets_come_from_the_memory(task, tmp_path, monkeypatch, capsys):
    """Budgets that do not look at the machine, or that a flag no longer sets."""
    monkeypatch.setattr(rollout, "device_memory", lambda device: 80e6)
    flags = ["--rl_steps=0", "--sft_steps=1"]
    run(monkeypatch, task, tmp_path / "a", *flags, "--cache_tokens=3000")
    assert "budgets     1,024 tokens a micro-batch, 3,000 in the cache" in capsys.readouterr().out
    run(monkeypatch, task, tmp_path / "b", *flags, "--max_tokens=3000", "--activation_checkpointing=1")
    assert "budgets     3,000 tokens a micro-batch, 7,168 in the cache" in capsys.readouterr().out
    monkeypatch.undo()
    run(monkeypatch, task, tmp_path / "c", *flags)
    assert "budgets     32,768 tokens a micro-batch, 131,072 in the cache" in capsys.readouterr().out


@pytest.mark.parametrize("rule", ["none", "tree"])
def test_rules_that_need_no_step_labels(task, tmp_path, monkeypatch, rule):
    """Labels asked for that the rule never reads."""
    write(task / "train.jsonl", [{k: v for k, v in r.items() if k != "step_labels"} for r in lines(task / "train.jsonl")])
    run(monkeypatch, task, tmp_path / "out", "--sft_steps=0", "--rl_steps=1", f"--rule={rule}")
    last = lines(tmp_path / "out" / "metrics.jsonl")[-1]
    assert last["steps_right"] is None and last["credit_right"] is None


def test_pictures_that_fail_lose_nothing(task, tmp_path, monkeypatch, capsys):
    """A broken matplotlib at the end of a run of days: the summary is there, and the same command draws again, no more."""
    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(Figure, "savefig", lambda *args, **settings: 1 / 0)
        run(patched, task, out, "--rl_steps=1")
    summary = (out / "summary.json").read_bytes()
    monkeypatch.setattr(parallel.Progress, "optimizer_step", None)
    run(monkeypatch, task, out, "--rl_steps=1")
    assert (out / "summary.json").read_bytes() == summary and (out / "curves.png").exists()


def test_checkpoints_come_every_ten_minutes(task, tmp_path, monkeypatch):
    """--save_every 0 that never saves: at the end of a stage, and where the clock says so."""
    saved, save = [], parallel.Progress.save
    monkeypatch.setattr(parallel.Progress, "save", lambda self: saved.append((self.stage, self.step)) or save(self))
    clock = itertools.count(0, 250)  # seconds; asked once a step and once a checkpoint
    monkeypatch.setattr(parallel.time, "monotonic", lambda: next(clock))
    run(monkeypatch, task, tmp_path / "out", "--sft_steps=8", "--rl_steps=1")
    assert saved == [("sft", 3), ("sft", 6), ("sft", 8), ("rl", 0), ("rl", 1)]


def test_master_weights_move_at_the_default_learning_rate(task, tmp_path, monkeypatch):
    """LESSONS 2: at 1e-6 a step is below bfloat16's resolution; in float32 nearly all weights must have moved."""
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
    criteria = '---\nlabels: ["0", "1"]\nrelevant: ["1"]\nsteps: []\nformat: answer-first\n---\nAnswer with \\boxed{grade}.\n'
    (task / "criteria.md").write_text(criteria)
    pairs = [{"query": "ramen", "document": f"{word} tips"} for word in ("sushi", "coffee", "paris", "tokyo")]
    demonstrations = [{**p, "response": f"\\boxed{{{label}}}"} for p in pairs for label in (0, 1)]
    write(task / "sft.jsonl", demonstrations)
    write(task / "train.jsonl", [{**p, "label": 1} for p in pairs])
    write(task / "test.jsonl", [{**p, "label": 1} for p in pairs])
    for name in ("test_random", "test_longtail"):
        (task / f"{name}.jsonl").unlink()
    flags = ["--sft_steps=60", "--sft_lr=2e-3", "--rl_steps=30", "--lr=1e-3", "--group_size=8", "--prompts_per_step=4"]
    run(monkeypatch, task, tmp_path / "a", *flags, "--sft_batch=8", "--eval_every=0")
    rewards = [r["reward"] for r in lines(tmp_path / "a" / "metrics.jsonl") if r["stage"] == "rl"]
    assert rewards[0] < 0.8 and rewards[-1] > 0.95
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["rl"]["test"]["accuracy"] == 1.0


def break_file(name, change):
    """A function that changes one file of a task."""
    return lambda task: (task / name).write_text(change((task / name).read_text()))


def second_line(text):
    return lambda old: "\n".join([old.splitlines()[0], text, *old.splitlines()[2:]])


PAIR = '"query": "ramen", "document": "sushi tips"'
LONG = f'{{"query": "{"ramen " * 500}", "document": "a", "label": 1, "step_labels": [1, 1, 1]}}'
REFUSED = {
    "malformed JSON": (break_file("train.jsonl", second_line("{oops")), [], r"train\.jsonl:2: "),
    "unknown label": (break_file("train.jsonl", second_line(f'{{{PAIR}, "label": 7}}')), [], r"train\.jsonl:2: unknown"),
    "empty document": (
        break_file("test_random.jsonl", second_line('{"query": "a", "document": " ", "label": 1}')), [],
        r"test_random\.jsonl:2: 'document'",
    ),
    "unparsable response": (
        break_file("sft.jsonl", second_line(f'{{{PAIR}, "response": "topic: \\\\boxed{{1}}"}}')), [],
        r"sft\.jsonl:2: the response does not parse: missing boxes",
    ),
    "no step labels": (
        break_file("train.jsonl", second_line(f'{{{PAIR}, "label": 1}}')), [], r"train\.jsonl:2: no step_labels; use --rule tr",
    ),
    "labels that cannot be written": (
        break_file("criteria.md", lambda old: old.replace('"3"]  #', '"3", "3 stars"]  #')), [], r"cannot write \(3 stars\)",
    ),
    "no tokenizer": (lambda task: (task / "model" / "tokenizer.json").unlink(), [], "no tokenizer"),
    "no chat template": (lambda task: (task / "model" / "chat_template.jinja").unlink(), [], "no chat template"),
    "no model": (lambda task: None, ["--model=./nowhere"], "nowhere: not a model folder"),
    "no such run": (lambda task: None, ["--model=tests/sft"], "tests/sft: not a model folder"),
    "context": (
        break_file("train.jsonl", second_line(LONG)), [], r"train\.jsonl:2: the criteria and the query alone",
    ),
    "no room for a prompt": (lambda task: None, ["--max_new_tokens=511"], "--max_new_tokens 511: leaves no room"),
    "response too long": (lambda task: None, ["--max_new_tokens=20"], "more than --max_new_tokens"),
    "group of one": (lambda task: None, ["--group_size=1"], "--group_size 1"),
    "negative rate": (lambda task: None, ["--lr=-1"], "--lr -1.0"),
    "nan": (lambda task: None, ["--temperature=nan"], "--temperature nan"),
    "nothing to do": (lambda task: None, ["--sft_steps=0", "--rl_steps=0"], "nothing to do"),
    "unknown setting": (break_file("train.json", lambda old: '{"learning_rate": 1}'), [], "unknown settings learning_rate"),
    "setting of a wrong type": (break_file("train.json", lambda old: '{"lr": "fast"}'), [], r"train\.json: .*--lr"),
    "the task in its own file": (break_file("train.json", lambda old: '{"task": "other"}'), [], "cannot say --task"),
    "a setting twice": (break_file("train.json", lambda old: '{"lr": 1, "lr": 2}'), [], r"train\.json: 'lr' is given twice"),
    "a setting that is no number": (break_file("train.json", lambda old: '{"lr": NaN}'), [], r"train\.json: NaN: is no"),
    "deep settings": (break_file("train.json", lambda old: '{"lr": ' + "[" * 9999), [], r"train\.json: nested too deeply"),
    "settings in a list": (break_file("train.json", lambda old: "[1]"), [], r"train\.json: must be a JSON object"),
    "no label": (break_file("test_random.jsonl", second_line(f"{{{PAIR}}}")), [], r"test_random\.jsonl:2: 'label' is missing"),
    "nothing to learn from": (lambda task: (task / "sft.jsonl").unlink(), ["--rl_steps=0"], "nothing to do without .*sft"),
    "a stage without a step": (
        break_file("train.jsonl", second_line(f'{{{PAIR}, "label": 1, "step_labels": [1, 1, 1], "stage": 7}}')), [],
        r"train\.jsonl:2: stage 7 has 1 of 24 pairs, whose share of 4 RL steps",
    ),
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
    """argparse must neither guess an abbreviation nor pass a flag by."""
    for flags in (["--ruel=none"], ["--rule=all"], ["--group=4"], ["--lr=fast"]):
        with pytest.raises(SystemExit):
            run(monkeypatch, task, tmp_path / "out", *flags)
        assert flags[0].split("=")[0] in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, task, tmp_path / "out", "--help")
    assert caught.value.code == 0 and "5 % warm-up" in " ".join(capsys.readouterr().out.split())


def test_byte_order_marks_and_line_ends_of_windows(task):
    """A file saved by an editor on Windows is as good as another; a front matter that says a thing twice is not."""
    for name in ("criteria.md", "train.jsonl"):
        text = (task / name).read_text()
        (task / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    loaded = grm.Task.load(task)
    assert loaded.steps == ["topic", "constraints", "promotion"] and len(loaded.read(task / "train.jsonl")) == 24
    break_file("criteria.md", lambda old: old.replace("format:", "format: answer-first\nformat:"))(task)
    with pytest.raises(grm.TaskError, match="format twice"):
        grm.Task.load(task)


def test_an_output_folder_of_another_run_is_refused(task, tmp_path, monkeypatch, capsys):
    """Neither overwritten nor mixed: another run, a finished run, or any other files."""
    out = tmp_path / "out"
    out.write_text("a file")
    with pytest.raises(SystemExit, match="not a folder"):
        run(monkeypatch, task, out)
    with pytest.raises(SystemExit, match="--out"):
        run(monkeypatch, task, out / "below")
    out.unlink()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="other files"):
        run(monkeypatch, task, out)
    (out / "notes.txt").unlink()
    run(monkeypatch, task, out, "--sft_steps=1", "--rl_steps=0")
    run(monkeypatch, task, out, "--sft_steps=1", "--rl_steps=0")
    assert "finished; to repeat it" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--seed 0"):
        run(monkeypatch, task, out, "--sft_steps=1", "--rl_steps=0", "--seed=5")


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


def test_stages_come_in_order():
    """Pairs of stage 1 before those of stage 2, each for its share of the steps, and within a stage each once an epoch."""
    records = [{"stage": 2, "i": i} for i in range(7)] + [{"stage": 1, "i": i} for i in range(7, 19)]
    stages = train.by_stage(records, 10)
    drawn = [r["i"] for step in range(10) for r in train.draw_pairs(stages, step, train.Config(prompts_per_step=4))]
    for start, end, first, last in ((0, 12, 7, 19), (12, 24, 7, 19), (24, 31, 0, 7), (31, 38, 0, 7)):
        assert sorted(drawn[start:end]) == [*range(first, last)]


def test_answer_first_notes_train(tmp_path, monkeypatch):
    """The embedded task in its other form, from make.py: demonstrations parse, steps are credited, contradictions counted."""
    make = runpy.run_path(str(NOTES / "make.py"))
    make["make"](tmp_path / "task", "answer-first")
    for path in (tmp_path / "task").glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:24]))
    run(monkeypatch, tmp_path / "task", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["rl"]["test_random"]["step_accuracy"]) == ["label", "topic", "constraints", "promotion"]
    assert "contradicted" in summary["rl"]["test_random"]
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
            reward = 0.5 + 0.1 * seed + (0.01 * (seed + 1) if rule == "tree" else 0)
            figures = {"stage": "rl", "steps_right": 0.5, "wrong_in_right": 0.25, "right_in_wrong": 0.75, "credit_right": 0.6}
            records = [figures | {"reward": min(reward, 0.1 * (step + 1))} for step in range(20)]
            records[0] = records[0] | dict.fromkeys(("wrong_in_right", "credit_right"))
            write(folder / "metrics.jsonl", [{"stage": "sft"}, *records])
            test = {"accuracy": 0.5 + 0.01 * r, "step_accuracy": {"a": 0.2, "b": 0.4}, "right_throughout": 0.9}
            tests = {"test_random": test, "test_longtail": test}
            (folder / "summary.json").write_text(json.dumps({"start": {}, "rl": tests}))
    monkeypatch.setattr(sys, "argv", ["credit.py", f"--out={tmp_path}", "--seeds"])
    monkeypatch.setattr(credit.subprocess, "run", lambda *args, **settings: pytest.fail("nothing is left to run"))
    credit.main()
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.setdefault(cells[2] if len(cells) > 2 else "", []).append(cells)
    answers, steps = rows["tree"]
    # 0.01, 0.02 and 0.03, less what the ramp at the start takes of them.
    means = [np.mean([min(0.5 + 0.1 * s + d, 0.1 * (i + 1)) for i in range(20)]) for s in range(3) for d in (0, 0.01 * (s + 1))]
    gained = np.subtract(means[1::2], means[::2])
    half = 4.303 * gained.std(ddof=1) / 3**0.5
    assert answers[:3] == ["5", "8", "tree"] and answers[5] == f"{gained.mean():+.3f} ± {half:.3f}"
    assert answers[6:9] == ["0.530", "0.530", "+0.030 ± 0.000"]
    assert steps[3:6] == ["0.500", "+0.000 ± 0.000", "0.300"] and steps[7:] == ["0.60", "0.250 → 0.250", "0.75 → 0.75"]
    assert rows["plain GRPO"][0][5] == "-"
    assert all((tmp_path / name).stat().st_size > 10000 for name in ("credit.png", "course.png"))
    folder = credit.folder_of(tmp_path, 5, 0, 8, "tree")
    credit.run(folder, 1)
    assert not (folder.parent / f"{folder.name}.log").exists()
