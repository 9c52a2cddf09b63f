"""parallel.py, and train.py on several processes: the same figures on any number of ranks, and what happens in an accident."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill
import peak
import pytest
import torch
from conftest import NOTES, ROOT
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, Qwen3Config, Qwen3ForCausalLM

import parallel
import train

HERE = Path(__file__).resolve().parent
FLAGS = ["--sft_steps=10", "--sft_lr=1e-4", "--sft_batch=7", "--rl_steps=10", "--prompts_per_step=5", "--group_size=4"]
FLAGS += ["--lr=3e-4", "--eval_every=5"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The notes task cut to 24 records a file and to its label, with a model that answers in form after 40 steps of SFT."""
    folder = tmp_path_factory.mktemp("ranks") / "task"
    folder.mkdir()
    shutil.copytree(NOTES / "model", folder / "model")
    criteria = (NOTES / "criteria.md").read_text().split("---")
    front = [line for line in criteria[1].splitlines() if not line.startswith(("steps", "format"))]
    criteria[1] = "\n".join([*front, "steps: []", "format: answer-first", ""])
    (folder / "criteria.md").write_text("---".join(criteria))
    for name in ("sft", "train", "test_random"):
        records = [json.loads(line) for line in (NOTES / f"{name}.jsonl").read_text().splitlines()[:24]]
        for record in records:
            record.pop("step_labels", None)
            if name == "sft":
                record["response"] = record["response"][record["response"].rindex("\\boxed") :]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "train.json").write_text('{"max_new_tokens": 8}')
    code, text = run(folder.parent / "first", 1, f"--task={folder}", "--sft_steps=40", "--sft_lr=3e-3", "--rl_steps=0")
    assert code == 0, text
    shutil.rmtree(folder / "model")
    shutil.copytree(folder.parent / "first" / "model", folder / "model")
    return folder


def start(out, ranks, *flags, faults=(), **settings):
    """torchrun with tests/faulty.py, not waited for."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--monitor-interval=0.1"]
    command += [HERE / "faulty.py", f"--out={out}", *FLAGS, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULTS": json.dumps(faults)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), env=environment, **output, **settings)


def run(out, ranks, *flags, **settings):
    """(exit code, output) of torchrun with tests/faulty.py."""
    process = start(out, ranks, *flags, **settings)
    text, _ = process.communicate(timeout=240)
    return process.returncode, text


def lines(out, name="metrics"):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(task, tmp_path_factory):
    """The folder of an undisturbed run on one process."""
    out = tmp_path_factory.mktemp("straight") / "out"
    code, text = run(out, 1, f"--task={task}")
    assert code == 0, text
    return out


def assert_same(a, b):
    """Runs whose figures agree to rounding: 1e-5 relative; RL's loss is near 0 by construction, so 1e-6 absolute."""
    assert any(r.get("grad_norm") and r["frac_zero_std"] < 1 for r in lines(a) if r["stage"] == "rl")  # there was a signal
    for one, other in zip(lines(a), lines(b), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"mismatch"}:  # of sampler and trainer: itself rounding
            assert one[name] == (pytest.approx(other[name], rel=1e-5, abs=1e-6) if name != "stage" else other[name]), name
    assert json.loads((a / "summary.json").read_text()) == json.loads((b / "summary.json").read_text())


@pytest.mark.parametrize("ranks,flags", [
    (2, ["--max_tokens=700"]),  # 3 prompts and 2: ranks have micro-batches of different numbers
    (4, ["--shard_size=2", "--activation_checkpointing=1"]),
])  # fmt: skip
def test_ranks_change_nothing_but_rounding(straight, task, tmp_path, ranks, flags):
    """LESSONS 7, 12: the same batches, answers, losses, norms and metrics, whatever shares of them a rank has."""
    code, text = run(tmp_path / "out", ranks, f"--task={task}", *flags)
    assert code == 0, text
    assert_same(straight, tmp_path / "out")


def test_extras_on_two_ranks(task, tmp_path):
    """A KL reference, mode balance and several updates, with budgets that give the ranks different numbers of passes."""
    extras = ["--kl_coef=0.1", "--sft_coef=0.1", "--updates_per_batch=2", "--max_tokens=400", "--curriculum=passrate"]
    for ranks in (1, 2):
        code, text = run(tmp_path / str(ranks), ranks, f"--task={task}", *extras, "--rl_steps=4")
        assert code == 0, text
    assert_same(tmp_path / "1", tmp_path / "2")


def test_resume_on_another_number_of_ranks(straight, task, tmp_path):
    """SIGTERM to one rank of two: the step is finished and saved, all leave with 0; one process then goes on."""
    out, flags = tmp_path / "out", [f"--task={task}", "--save_every=4"]
    code, text = run(out, 2, *flags, faults=[{"do": "term", "in": "backward", "call": 15, "rank": 1}])
    assert code == 0 and "stopped after rl step 5; saved" in text, text
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["000014", "000015"]  # --keep 2
    for file in (out / "checkpoints" / "000015").iterdir():
        assert file.suffix in (".safetensors", ".json")  # nothing is pickled
    code, text = run(out, 1, *flags)
    assert code == 0 and "resumed" in text, text
    assert_same(straight, out)


def test_kills_lose_nothing(task):
    """SIGKILL in sampling, update and both halves of saving; torchrun picks the run up (tests/kill.py: more of it)."""
    folder = task.parent / "kills"
    assert kill.compare(folder, 4, 2, 0, [*FLAGS, f"--task={task}"], save_every=2) == []


def test_a_rank_that_raises_ends_the_job(task, tmp_path):
    """No rank waits for ever for one that is gone."""
    code, text = run(tmp_path / "out", 2, f"--task={task}", faults=[{"do": "raise", "in": "sample", "call": 3, "rank": 1}])
    assert code != 0 and "injected" in text


def test_a_hung_rank_ends_the_job(task, tmp_path):
    """A stopped process: the other one gives up after --timeout, and torchrun ends both."""
    begin = time.monotonic()
    fault = {"do": "stop", "in": "backward", "call": 3, "rank": 1}
    code, text = run(tmp_path / "out", 2, f"--task={task}", "--timeout=8", faults=[fault])  # torchrun waits 30 s
    assert code != 0 and "imed out" in text, text
    assert time.monotonic() - begin < 100
    assert len(lines(tmp_path / "out")) == 2


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(task, tmp_path):
    """NaN in one rank's gradient: no rank takes the step; training goes on, and the log says so."""
    out, fault = tmp_path / "out", {"do": "nan", "in": "backward", "call": 4, "times": 2, "rank": 1}
    code, text = run(out, 2, f"--task={task}", "--rl_steps=0", faults=[fault])
    assert code == 0, text
    metrics = lines(out)
    assert [r["skipped"] for r in metrics] == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert [r["grad_norm"] is None for r in metrics] == [False] * 3 + [True] * 2 + [False] * 5
    assert all(0 < r["loss"] < 10 for r in metrics)


def test_gradients_that_stay_bad_stop_the_run(task, tmp_path):
    """After --max_bad_steps in a row, with the name of the last good checkpoint."""
    out, fault = tmp_path / "out", {"do": "nan", "in": "backward", "call": 6, "times": 99, "rank": 1}
    code, text = run(out, 2, f"--task={task}", "--save_every=5", faults=[fault])
    assert code == 1 and "3 times in a row" in text, text
    assert f"The last checkpoint is {out / 'checkpoints' / '000005'}" in text and 'train.py", line' not in text


def limited():
    """Files cannot grow beyond 1 MB: what a full disk does to a checkpoint, without one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def test_a_checkpoint_that_cannot_be_written_leaves_the_former(task, tmp_path):
    """A clear line, exit code 1, the former checkpoint whole: the run goes on from it once there is room."""
    out, flags = tmp_path / "out", [f"--task={task}", "--save_every=5", "--rl_steps=0", "--sft_steps=8"]
    code, _ = run(out, 1, *flags, faults=[{"do": "term", "in": "backward", "call": 4}])
    assert code == 0
    before = {path: path.read_bytes() for path in (out / "checkpoints").rglob("*.*")}
    code, text = run(out, 1, *flags, preexec_fn=limited)
    assert code == 1 and "cannot be written" in text and "File too large" in text and "000004" in text, text
    assert 'train.py", line' not in text
    assert {path: path.read_bytes() for path in (out / "checkpoints").rglob("*.*")} == before
    code, text = run(out, 1, *flags)
    assert code == 0, text


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk(task, tmp_path):
    """The same on a file system of 16 MB, on two ranks."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        flags = [f"--task={task}", "--save_every=2", "--keep=9", "--rl_steps=0"]
        code, text = run(disk / "out", 2, *flags)
        assert code == 1 and "cannot be written" in text and "No space left" in text, text
        saved = sorted(path.name for path in (disk / "out" / "checkpoints").iterdir())
        assert saved == ["000002", "000004"] and f"The last checkpoint is {disk / 'out' / 'checkpoints' / saved[-1]}" in text
    finally:
        subprocess.run(["umount", disk], check=True)


def test_checkpoints_that_do_not_fit_are_refused(task, tmp_path, monkeypatch):
    """Of another task, of another model, damaged, or none at all: one line each, and nothing is changed."""
    out = tmp_path / "out"

    def refused(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, "--sft_steps=5", "--rl_steps=0", *flags])
        with pytest.raises(SystemExit) as caught:
            train.main()
        return str(caught.value.code)

    flags = [f"--task={task}", "--save_every=3", "--rl_steps=0", "--sft_steps=5"]
    assert run(out, 1, *flags, faults=[{"do": "term", "in": "backward", "call": 3}])[0] == 0
    checkpoint = out / "checkpoints" / "000003"
    other = tmp_path / "other"
    shutil.copytree(task, other)
    with open(other / "train.jsonl", "a") as file:
        file.write((task / "test_random.jsonl").read_text())
    assert "another task" in refused(f"--task={other}", f"--out={tmp_path / 'a'}", f"--resume={checkpoint}")
    wide = tmp_path / "wide"
    shutil.copytree(task / "model", wide, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))
    message = refused(f"--task={task}", f"--out={tmp_path / 'b'}", f"--resume={checkpoint}", f"--model={wide}")
    assert "other settings (--model" in message
    assert "other settings (--lr 0.0003)" in refused(
        f"--task={task}", f"--out={tmp_path / 'd'}", f"--resume={checkpoint}", "--lr=1"
    )
    assert "not a checkpoint" in refused(f"--task={task}", f"--out={tmp_path / 'c'}", f"--resume={tmp_path}")
    assert "--resume off" in refused(f"--task={task}", f"--out={out}", "--resume=off")
    (shard,) = checkpoint.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert f"{shard.name} is missing, or not whole" in refused(f"--task={task}", f"--out={out}")
    (checkpoint / "state.json").write_text("{}")
    assert "state.json is damaged" in refused(f"--task={task}", f"--out={out}")


def test_tensors_survive_the_round_trip(tmp_path):
    """save_tensors, load_tensors and plain safetensors agree; scalars, bf16 and empty tensors included."""
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(4).bfloat16(), "c": torch.tensor([7])}
    parallel.save_tensors(tmp_path, tensors)
    (file,) = tmp_path.iterdir()
    assert all(torch.equal(load_file(file)[name], x) for name, x in tensors.items())
    loaded = {name: torch.zeros_like(x) for name, x in tensors.items()}
    parallel.load_tensors(tmp_path, loaded)
    assert all(torch.equal(loaded[name], x) for name, x in tensors.items())
    with pytest.raises(parallel.CheckpointError, match="cannot be read"):
        parallel.load_tensors(tmp_path, {"d": torch.zeros(1)})


def test_one_process_needs_no_group():
    """Without torchrun, shares are the whole and gathers the identity."""
    ranks = parallel.Ranks()
    assert (ranks.rank, ranks.world) == (0, 1) and [*range(7)][ranks.share(7)] == [*range(7)]
    assert ranks.sum([1, 2.5]) == [1, 2.5] and ranks.max(3) == 3 and ranks.gather_json({"a": None}) == [{"a": None}]
    with pytest.raises(OSError, match="No space"):
        ranks.first(lambda: (_ for _ in ()).throw(OSError(28, "No space left on device", "x")))


def test_shares_cover_everything_once(monkeypatch):
    """Shares of any count are disjoint, ordered, and differ by at most one."""
    rng = random.Random(0)
    for _ in range(50):
        world, count, pieces = rng.randint(1, 9), rng.randint(0, 40), []
        for rank in range(world):
            ranks = object.__new__(parallel.Ranks)
            ranks.rank, ranks.world = rank, world
            pieces.append([*range(count)][ranks.share(count)])
        assert [i for piece in pieces for i in piece] == [*range(count)] and max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_interrupt_reaches_all_ranks(task, tmp_path):
    """Ctrl-C on torchrun: it signals its workers, which finish the step and save."""
    process = start(tmp_path / "out", 2, f"--task={task}", "--sft_steps=4000")
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
load = lambda device: torch.nn.Linear(2, 1).to(device)
model, call = ranks.shard(load)
optimizer, x = torch.optim.AdamW(model.parameters()), torch.randn(5, 2)
loss = ranks.backward(call, lambda part: model(x[part]).sum(), [slice(0, 3), slice(3, 5)], lambda: 0 * model(x).sum())
assert abs(loss - model(x).sum().item()) < 1e-5 and torch.allclose(model.weight.grad, x.sum(0))
norm = torch.cat([model.weight.grad.flatten(), model.bias.grad]).norm()
assert abs(parallel.clip_gradients(model, 1.0) - norm) < 1e-5
optimizer.step()
checkpoints = parallel.Checkpoints("checkpoints", ranks, keep=2)
for step in (1, 2, 3):
    checkpoints.save(step, model, optimizer, lambda: {"step": step})
path = checkpoints.newest()
assert checkpoints.read(path)["step"] == 3 and len(list(checkpoints.folder.iterdir())) == 2
other, _ = ranks.shard(load)
again = torch.optim.AdamW(other.parameters())
checkpoints.load(path, other, again)
assert torch.equal(other.weight, model.weight) and other.weight is not model.weight
assert all(torch.equal(again.state[a][k], optimizer.state[b][k]) for k in ("step", "exp_avg", "exp_avg_sq")
           for a, b in zip(other.parameters(), model.parameters()))
checkpoints.forget_after("000002")
assert checkpoints.newest().name == "000002"
(checkpoints.newest() / "state.json").write_text("[]")
try:
    checkpoints.read(checkpoints.newest())
except parallel.CheckpointError as error:
    assert "damaged" in str(error)
else:
    raise AssertionError
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
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", ROOT / "distill.py"]
        command += [f"--teacher={task / 'model'}", f"--task={task}", f"--out={tmp_path / str(ranks)}"]
        command += [f"--cache={tmp_path / 'cache'}{ranks}", "--max_new_tokens=8", "--steps=5", "--batch=7"]
        command += [*flags, f"--max_tokens={1000 // ranks}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    one, two = (lines(tmp_path / ranks) for ranks in "12")
    assert len(one) == 5 and any(r["loss"] > 0 for r in one)
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4, abs=1e-6)
    ours, theirs = (load_file(tmp_path / ranks / "model" / "model.safetensors") for ranks in "12")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
    shards = [{path.name: load_file(path) for path in (tmp_path / f"cache{n}").glob("*.safetensors")} for n in "12"]
    assert shards[0].keys() == shards[1].keys()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_plan_is_within_15_percent():
    """Planned against the measured peak of real steps on CPU, the smallest case (`python tests/peak.py` prints them all)."""
    sizes = peak.measure_apart(next(iter(peak.CASES.values())))
    assert sizes["planned"] == pytest.approx(sizes["measured"], rel=0.15)


def test_plan_prints_what_to_change(tmp_path, monkeypatch, capsys):
    """--plan reads a config alone, fits or says what would, and writes nothing."""
    config = json.loads((NOTES / "model" / "config.json").read_text())
    config |= {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def plan(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", "--plan=1", f"--model={tmp_path}", f"--task={NOTES}", *flags])
        train.main()
        return capsys.readouterr().out

    assert "does not fit; this does: --activation_checkpointing True" in plan(
        "--gpus=8", "--gpu_gb=80", "--cache_tokens=131072"
    )
    assert plan("--gpus=8", "--gpu_gb=80", "--activation_checkpointing=1").strip().endswith("\nfits")
    assert "does not fit on any number" in plan("--gpus=8", "--gpu_gb=15")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]
    with pytest.raises(SystemExit, match="--model"):
        plan("--model=/nowhere")
