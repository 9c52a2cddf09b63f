"""parallel.py, and train.py on several processes: the same figures on any number of ranks, and what happens in an accident."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import kill
import pytest
import torch
from conftest import NOTES, ROOT
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, Qwen3Config, Qwen3ForCausalLM

import parallel

HERE = Path(__file__).resolve().parent
FLAGS = ["--sft_steps=10", "--sft_lr=1e-4", "--sft_batch=7", "--rl_steps=10", "--prompts_per_step=5", "--group_size=4"]
FLAGS += ["--lr=1e-4", "--eval_every=5"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The notes task cut to 24 records a file and to its label, with a model that answers in form after 40 steps of SFT, and
    whose key-value heads four ranks can share out."""
    folder = kill.make_task(tmp_path_factory.mktemp("ranks") / "task")
    config = folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_key_value_heads": 4}))
    run(folder.parent / "first", 1, f"--task={folder}", "--sft_steps=40", "--sft_lr=3e-3", "--rl_steps=0")
    shutil.rmtree(folder / "model")
    shutil.copytree(folder.parent / "first" / "model", folder / "model")
    return folder


def start(out, *flags, faults=()):
    """torchrun with two ranks, not waited for."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--monitor-interval=0.1"]
    command += [HERE / "faulty.py", "train", *FLAGS, f"--out={out}", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULTS": json.dumps(faults)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), env=environment, **output)


def run(out, ranks, *flags, program=("train", *FLAGS), script="faulty.py", code=0, **settings):
    """What a program printed, which must end with the exit code."""
    got, text, _ = forked.run([HERE / script, *program, f"--out={out}", *flags], ranks, **settings)
    assert got == code, text
    return text


def lines(out, name="metrics"):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(task, tmp_path_factory):
    """The folder of an undisturbed run on one process."""
    out = tmp_path_factory.mktemp("straight") / "out"
    run(out, 1, f"--task={task}")
    return out


def assert_same(a, b):
    """Runs whose figures agree to rounding: 1e-5 relative; RL's loss is near 0 by construction, so 1e-6 absolute."""
    assert any(r.get("grad_norm") and r["frac_zero_std"] < 1 for r in lines(a) if r["stage"] == "rl")  # there was a signal
    for one, other in zip(lines(a), lines(b), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"mismatch"}:  # of sampler and trainer: itself rounding
            is_number = isinstance(other[name], int | float)  # and neither a stage nor a share of nothing
            assert one[name] == (pytest.approx(other[name], rel=1e-5, abs=1e-6) if is_number else other[name]), name
    approximate = lambda text: pytest.approx(float(text), abs=1e-5)  # counts are compared as they are
    theirs = json.loads((b / "summary.json").read_text(), parse_float=approximate)
    assert json.loads((a / "summary.json").read_text()) == theirs


@pytest.mark.parametrize("ranks,flags", [
    (2, ["--max_tokens=700"]),  # 3 prompts and 2: ranks have micro-batches of different numbers
    (4, ["--activation_checkpointing=1"]),
])  # fmt: skip
def test_ranks_change_nothing_but_rounding(straight, task, tmp_path, ranks, flags):
    """LESSONS 7, 12: the same batches, answers, losses, norms and metrics, whatever shares of them a rank has."""
    run(tmp_path / "out", ranks, f"--task={task}", *flags)
    assert_same(straight, tmp_path / "out")


def test_the_denominator_of_rule_sam_is_of_all_ranks(tmp_path):
    """A mean over a rank's own answers, or over those of a micro-batch, weighs answers by who else is there."""
    task = tmp_path / "task"
    shutil.copytree(NOTES, task, ignore=shutil.ignore_patterns("make.py", "__pycache__", "unlabelled.jsonl"))
    for path in task.glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:24]))
    sft = ["--sft_steps=80", "--sft_lr=3e-3", "--sft_batch=16", "--rl_steps=0"]
    run(tmp_path / "sft", 1, f"--task={task}", *sft)
    flags = [f"--task={task}", f"--model={tmp_path / 'sft' / 'model'}", "--sft_steps=0", "--rule=sam", "--rl_steps=4"]
    run(tmp_path / "one", 1, *flags)
    run(tmp_path / "two", 2, *flags, "--max_tokens=900")
    assert any(0 < step["masked"] < 1 for step in lines(tmp_path / "one"))
    assert_same(tmp_path / "one", tmp_path / "two")


def test_extras_on_two_ranks(task, tmp_path):
    """A KL reference, mode balance and several updates, with budgets that give the ranks different numbers of passes."""
    extras = ["--kl_coef=0.1", "--sft_coef=0.1", "--updates_per_batch=2", "--max_tokens=400", "--lr=1e-4"]
    for ranks in (1, 2):
        run(tmp_path / str(ranks), ranks, f"--task={task}", *extras, "--rl_steps=4")
    assert_same(tmp_path / "1", tmp_path / "2")


def test_resume_on_another_number_of_ranks(straight, task, tmp_path):
    """SIGTERM to one rank of two: the step is finished and saved, all leave with 0; one process goes on, and after another
    signal four."""
    out, flags = tmp_path / "out", [f"--task={task}", "--save_every=4"]
    text = run(out, 2, *flags, faults=[{"do": "term", "in": "update", "call": 15, "rank": 1}])
    assert "saved rl step 5; the same command goes on" in text, text
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["000014", "000015"]  # --keep 2
    assert {file.suffix for file in (out / "checkpoints" / "000015").iterdir()} == {".safetensors", ".json"}  # nothing pickled
    text = run(out, 1, *flags, faults=[{"do": "term", "in": "update", "call": 3}])
    assert "resumed" in text and "saved rl step 8" in text, text
    assert "resumed" in run(out, 4, *flags)
    assert_same(straight, out)


def test_kills_lose_nothing(task):
    """SIGKILL in sampling, update, saving, and export; torchrun picks the run up (tests/kill.py: more of it)."""
    folder = task.parent / "kills"
    folder.mkdir()
    assert kill.compare("train", folder, 7, 2, 0, [*FLAGS, f"--task={task}"], save_every=2) == []


def test_a_rank_that_raises_ends_the_job(task, tmp_path):
    """No rank waits for ever for one that is gone."""
    fault = {"do": "raise", "in": "sample", "call": 3, "rank": 1}
    assert "injected" in run(tmp_path / "out", 2, f"--task={task}", faults=[fault], code=1)


def test_a_hung_rank_ends_the_job(task, tmp_path):
    """A stopped process: the other one gives up after --timeout, upon which torchrun ends both."""
    begin = time.monotonic()
    fault = {"do": "stop", "in": "forward", "call": 3, "rank": 1}
    text = run(tmp_path / "out", 2, f"--task={task}", "--timeout=8", faults=[fault], code=1)
    assert "imed out" in text, text
    assert time.monotonic() - begin < 60
    assert len(lines(tmp_path / "out")) == 2


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(task, tmp_path):
    """NaN in one rank's gradient: no rank takes the step; training goes on, and the log says so."""
    out, fault = tmp_path / "out", {"do": "nan", "in": "update", "call": 4, "times": 2, "rank": 1}
    run(out, 2, f"--task={task}", "--rl_steps=0", faults=[fault])
    metrics = lines(out)
    assert [r["skipped"] for r in metrics] == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert [r["grad_norm"] is None for r in metrics] == [False] * 3 + [True] * 2 + [False] * 5
    assert all(0 < r["loss"] < 10 for r in metrics)


def test_gradients_that_stay_bad_stop_the_run(task, tmp_path):
    """After parallel.MAX_BAD_STEPS in a row, in one line; the last good checkpoint is there."""
    out, fault = tmp_path / "out", {"do": "nan", "in": "update", "call": 6, "times": 99, "rank": 1}
    text = run(out, 2, f"--task={task}", "--save_every=5", faults=[fault], code=1)
    assert "3 times in a row" in text, text
    assert (out / "checkpoints" / "000005").is_dir() and "Traceback" not in text


LOCK = """import fcntl, sys
file = open(sys.argv[1], "a+b")
fcntl.lockf(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()"""


@pytest.mark.parametrize("program", ["train", "distill", "score"])
def test_two_runs_do_not_write_to_one_place(task, tmp_path, program):
    """Both ended with exit code 0, and files of both: the second is refused, by one line, and changes nothing."""
    files = [f"--task={task}", f"--teacher={task / 'trained'}", "--max_new_tokens=8", f"--cache={tmp_path / 'cache'}"]
    score = ["score", "score", f"--model={task / 'trained'}", f"--task={task}", f"--pairs={task / 'train.jsonl'}"]
    out = tmp_path / "out"
    held = {"score": tmp_path / "out.partial"}.get(program, out / "lock")
    command = {"train": ["train", *FLAGS, f"--task={task}"], "distill": ["distill", *files], "score": score}[program]
    held.parent.mkdir(exist_ok=True)
    with subprocess.Popen([sys.executable, "-c", LOCK, held], stdin=-1, stdout=-1) as other:
        assert other.stdout.readline()
        text = run(out, 1, program=command, code=1)
    assert text.splitlines()[-1].endswith("another run writes here; wait for its end") and "Trace" not in text
    assert not any(path.stat().st_size for path in tmp_path.rglob("out*") if path.is_file())


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_export_that_cannot_be_written(task, tmp_path, ranks):
    """A full disk at the very end, in train.py and score: a line, no traceback; later the same command goes on."""
    out, flags = tmp_path / "out", [f"--task={task}", "--rl_steps=0"]
    run(out, ranks, *flags, faults=[{"do": "kill", "in": "export", "call": 1, "rank": 0}], code=-9)
    text = run(out, ranks, *flags, file_limit=2**20, code=1)
    assert "File too large" in text.splitlines()[-1] and "Traceback" not in text, text
    run(out, ranks, *flags)
    if ranks == 1:
        pairs = ["--model", task / "trained", "--task", task, "--pairs", task / "train.jsonl", "--max_new_tokens=8"]
        text = run(tmp_path / "x.jsonl", 1, program=["score", "score", *pairs], file_limit=500, code=1)
        assert "File too large" in text.splitlines()[-1] and "Traceback" not in text, text


def test_what_is_printed_without_a_terminal(task, tmp_path):
    """Minutes of silence in a cluster's log: who computes what, at once, and then a line now and then, no carriage returns."""
    text = run(tmp_path / "out", 2, f"--task={task}")
    assert f"2 x cpu, torch.float32, rule none, to {tmp_path / 'out'}\n" in text
    assert "'train': 24, 'sft': 24}\n" in text
    plain = r"(?:sft|rl): 10 of 10, .* left, (?:loss|reward) [\d.]+(?:, \d+ tok/s)? *\n"
    assert len(re.findall(plain, text)) == 2 and "\r\r" not in text, text


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk(task, tmp_path):
    """A checkpoint that does not fit on a file system of 16 MB, on two ranks: a line, and the former ones are whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        flags = [f"--task={task}", "--save_every=2", "--keep=9", "--rl_steps=0"]
        text = run(disk / "out", 2, *flags, code=1)
        assert "No space left" in text and "Traceback" not in text, text
        saved = sorted(path.name for path in (disk / "out" / "checkpoints").glob("*[0-9]"))
        assert saved == ["000002", "000004"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_interrupt_reaches_all_ranks(task, tmp_path):
    """Ctrl-C on torchrun: it signals its workers, which finish the step and save."""
    process = start(tmp_path / "out", f"--task={task}", "--sft_steps=4000")
    while not (tmp_path / "out" / "metrics.jsonl").exists() or len(lines(tmp_path / "out")) < 3:
        time.sleep(0.2)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert "saved" in text, text
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert int(checkpoint.name) == len(lines(tmp_path / "out"))


ALONE = """
import torch
import parallel

ranks = parallel.Ranks()
records = torch.randn(5, 2).tolist()

def start(**settings):
    policy = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(policy.parameters())
    run = parallel.Run("out", settings, ranks, free=["b"], save_every=1)
    run.resume(policy, optimizer)
    return policy, optimizer, run

def refused(message, **settings):
    try:
        raise AssertionError(start(**settings))
    except (parallel.RunError, parallel.Stopped) as error:
        assert message in str(error), error

policy, optimizer, run = start(a=1, b=1)
for step in run.steps("train", 3):
    batch = parallel.epoch_batch(records, 4, step, 0)
    mine, loss = batch[ranks.share(len(batch))], 0.0
    for part in ranks.equalize([mine[:3], mine[3:]], empty=[]):
        part_loss = policy(torch.tensor(part)).sum() / len(batch)
        part_loss.backward()
        loss += part_loss.item()
    norm = run.optimizer_step(loss, parallel.learning_rate(0.1, step, 3))
    gradient = torch.cat([torch.tensor(batch).mean(0), torch.ones(1)])  # of the mean of w x + b
    assert abs(norm - gradient.norm()) < 1e-5
    run.log("metrics", {"step": step + 1, "loss": loss, "nothing": float("nan")})
assert [path.name for path in sorted((run.out / "checkpoints").iterdir())] == ["000002", "000003"]
assert '"nothing": null}' in open("out/metrics.jsonl").readline()  # NaN is no JSON
refused("holds a run with --a 1", a=2, b=1)
again, moments, run = start(a=1, b=2)
assert list(run.steps("train", 3)) == [] and torch.equal(again.weight, policy.weight) and again.weight is not policy.weight
assert all(torch.equal(moments.state[a][k], optimizer.state[b][k]) for k in ("step", "exp_avg", "exp_avg_sq")
           for a, b in zip(again.parameters(), policy.parameters()))
run.finish()
assert not (run.out / "checkpoints").exists() and len(open("out/metrics.jsonl").readlines()) == 3
refused("finished", a=1, b=1)
"""


def test_file_works_alone(tmp_path):
    """Copied into an empty folder: the loop of its first lines, and a model that comes back from its checkpoint."""
    shutil.copy(ROOT / "parallel.py", tmp_path)
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layers_of_other_architectures():
    """FSDP shards layer by layer, wherever a model keeps them."""
    small = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 1}
    bert = BertForSequenceClassification(BertConfig(**small))
    assert parallel.transformer_layers(bert) is bert.bert.encoder.layer
    qwen = Qwen3ForCausalLM(Qwen3Config(**small, num_key_value_heads=1, head_dim=8))
    assert parallel.transformer_layers(qwen) is qwen.model.layers


@pytest.mark.parametrize("flags", [
    [f"--student={NOTES / 'student'}", "--loss=label"],
    [f"--student={NOTES / 'model'}", "--loss=js", "--on_policy=1", "--lr=1e-4"],
])  # fmt: skip
def test_distillation_on_two_ranks(task, tmp_path, flags):
    """The same student from shared pairs, batches of a size that does not divide, sharded weights and other micro-batches."""
    flags = [*flags, f"--teacher={task / 'model'}", f"--task={task}", "--max_new_tokens=8", "--steps=5", "--batch=7"]
    for ranks in (1, 2):
        budget = f"--max_tokens={1000 // ranks}"
        run(tmp_path / str(ranks), ranks, *flags, budget, f"--cache={tmp_path / 'cache'}{ranks}", program=["distill"])
    one, two = (lines(tmp_path / ranks) for ranks in "12")
    assert len(one) == 5 and any(r["loss"] > 0 for r in one)
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4, abs=1e-6)
    ours, theirs = (load_file(tmp_path / ranks / "model" / "model.safetensors") for ranks in "12")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
    shards = [{path.name for path in (tmp_path / f"cache{n}").iterdir()} for n in "12"]
    assert shards[0] == shards[1] and len(shards[0]) == 25


def test_bf16_is_chosen_where_it_pays(monkeypatch):
    """On CUDA; on a CPU if its processor multiplies bfloat16 matrices and the model is not tiny; else by request alone."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for has_it in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        assert [parallel.chosen_bf16("auto", cpu, width) for width in (128, 512)] == [False, has_it]
        assert [parallel.chosen_bf16(choice, cpu, 512) for choice in ("0", "1")] == [False, True]
    assert parallel.chosen_bf16("auto", cuda, 128) and not parallel.chosen_bf16("0", cuda, 4096)
