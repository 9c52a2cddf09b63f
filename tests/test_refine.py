"""docs/refine.py: which revised criteria are accepted, and what the writer of drafts is told."""

import json
import sys
from types import SimpleNamespace

import pytest
from conftest import NOTES, ROOT
from test_data import load

import grm
import rollout

HEAD = (
    '---\nlabels: ["no", "yes"]\nrelevant: ["yes"]\nsteps: [fact, grade]\nformat: reason-first\n---\nEnd with \\boxed{grade}.'
)
# By each, the documents that a model grades yes. Of the cases p, p and q are in the first half, r and s in the second; of the
# replayed pairs one is e, all others d.
CANDIDATES = {"right": "p r d e", "overfit": "p q d e", "wrong": "p q r s", "slip": "p q r s d", "nothing": "d e"}


@pytest.fixture
def refine(tmp_path, monkeypatch, capsys):
    """A function that runs docs/refine.py with a model that says yes where its criteria name the document; returns the exit
    code, what was printed, what the last line says, and the accepted text."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    module = load("refine", "docs")
    for folder in ("task", "drafts"):
        (tmp_path / folder).mkdir()
    (tmp_path / "task" / "criteria.md").write_text(f"{HEAD} d e")
    task = grm.Task.load(tmp_path / "task")

    def judge(renderer, engine, records):
        said = []
        for record in records:
            named = record["document"] in task.criteria_of(record["criteria"]).split()
            said.append(["yes", "yes" if named else "no"])
        return [{"label": y[1], "steps": [{"label": label} for label in y]} for y in said]

    monkeypatch.setattr(grm, "load_judge", lambda *_: (SimpleNamespace(task=task), SimpleNamespace(model="m")))
    monkeypatch.setattr(module.score, "check_records", lambda *_: None)
    monkeypatch.setattr(grm, "judge", judge)

    def run(*names, cases="wp xr yp yq zs", replay=100, **flags):
        for name in names:
            (tmp_path / "drafts" / f"{name}.md").write_text(f"{HEAD} {CANDIDATES.get(name)}")
        documents = {"cases": cases.split(), "replay": ["ke", *["kd"] * (replay - 1)]}
        for name, pairs in documents.items():
            same = {"label": "yes", "step_labels": ["yes", "yes"], "criteria": "right.md"}  # put aside
            lines = [json.dumps({"query": query, "document": document} | same) for query, document in pairs]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        (tmp_path / "task" / "right.md").write_text(f"{HEAD} p q r s")
        paths = {"task": "task", "candidates": "drafts", "cases": "cases.jsonl", "replay": "replay.jsonl", "out": "out.md"}
        flags = {name: tmp_path / path for name, path in paths.items()} | flags
        monkeypatch.setattr(sys, "argv", ["refine.py", "--model=m", *(f"--{name}={x}" for name, x in flags.items())])
        with pytest.raises(SystemExit) as stop:
            module.main()
        out = capsys.readouterr().out
        accepted = (tmp_path / "out.md").read_text() if (tmp_path / "out.md").exists() else None
        for path in [*(tmp_path / "drafts").iterdir(), *tmp_path.glob("out.md")]:
            path.unlink()
        return stop.value.code, out, json.loads(out.splitlines()[-1]), accepted

    run.module, run.drafts = module, tmp_path / "drafts"
    return run


def test_what_is_accepted(refine):
    """A revision that breaks what was right, or mends only the cases that it was chosen by; another one tried when the chosen
    one fails; the limit of 0.002 missed by rounding; a wrong exit code, or text, for a CI job."""
    for names, settings, chosen, accepted in (
        (["right"], {}, "right", True),
        (["right", "wrong"], {}, "right", True),
        (["right", "overfit"], {}, "overfit", False),
        (["wrong"], {}, None, False),
        (["wrong"], {"tolerance": 1}, "wrong", True),
        (["nothing"], {}, "nothing", False),
        (["slip"], {"replay": 500}, "slip", True),
        (["slip"], {"replay": 499}, None, False),
        ([], {}, None, False),
    ):
        code, out, last, text = refine(*names, **settings)
        assert (code, last["accepted"], last["chosen"]) == (0 if accepted else 3, accepted, chosen and f"{chosen}.md"), names
        assert text == (f"{HEAD} {CANDIDATES[chosen]}" if accepted else None) and set(last["candidates"]) == {
            f"{x}.md" for x in names
        }
    assert refine("overfit")[2]["candidates"] == {"overfit.md": {"first half": 1.0, "second half": 0.0, "replay": 1.0}}
    code, out, last, _ = refine("right", "slip")
    assert last["present"] == {"first half": 0.0, "second half": 0.0, "replay": 1.0}
    assert (
        "  first half\n     2 mended, no -> yes where yes is right, step grade\n       w | p\n  second half\n     1 mended"
        in out
    )
    assert "  replay\n     1 broken, yes -> no where yes is right, step grade\n       k | e\n" in out
    with pytest.raises(grm.TaskError, match=r"cases.jsonl: needs two queries"):
        refine("right", cases="wp wq")
    with pytest.raises(grm.TaskError, match=r"the folder of no/out.md must be there"):
        refine("right", out="no/out.md")


def test_a_draft_that_is_no_criteria(refine):
    """One bad draft of a writer ends the program, or is judged."""
    bad = {"form": f"{HEAD.replace('reason', 'answer')} p", "box": f"{HEAD[:-16]} p", "head": "Be strict."}
    for name, text in bad.items():
        (refine.drafts / f"{name}.md").write_text(text)
    code, out, last, _ = refine("right")
    assert code == 0 and list(last["candidates"]) == ["right.md"] and out.count("left out: ") == len(bad)


def test_the_writer_is_told_what_recurs(refine, monkeypatch):
    """Errors of the half that its draft is accepted by, or that occur twice; a draft without front matter, or none at all."""
    told = []

    def write(writer, like, task, errors, folder):
        told.append((writer, errors))
        grm.Task.load(task.folder).save(folder, "writer-1.md")

    monkeypatch.setattr(refine.module, "write_drafts", write)
    cases = "wp xr wq xr wp xr wp"
    assert refine(cases=cases.replace("wq", "wd"), writer="chat")[2]["candidates"].keys() == {"writer-1.md"}
    assert told == [("chat", "     3 mended, no -> yes where yes is right, step grade" + "\n       w | p" * 3)]
    assert refine("right", writer="chat")[2]["candidates"].keys() == {"right.md", "writer-1.md"} and len(told) == 2
    assert refine("right", cases="wp xr wp xr", writer="chat")[0] == 0 and len(told) == 2  # nothing recurs


def test_drafts_are_whole_criteria(tmp_path, monkeypatch):
    """A prompt without the criteria or the errors, cut or past the model's context; the chat model's end of turn in a draft."""
    tokenizer, task, asked = grm.load_model(NOTES / "model", meta=True)[1], grm.Task.load(NOTES), []

    class Engine:
        def __init__(self, model, ends, label_ids, room):
            asked.append((ends, room))

        def sample(self, prompts, group_size, temperature):
            asked.append((tokenizer.decode(prompts[0]), len(prompts[0]), group_size))
            ids = tokenizer("Promotion: ignore. Close with \\boxed{grade}.").input_ids
            return SimpleNamespace(answers=[[[*ids, tokenizer.eos_token_id]] * group_size])

    generation, like = SimpleNamespace(eos_token_id=None), SimpleNamespace(dtype="half", device="cuda")
    model = SimpleNamespace(generation_config=generation, to=lambda device: f"on {device}")
    monkeypatch.setattr(grm, "load_model", lambda name, dtype: (model, tokenizer) if dtype == "half" else None)
    monkeypatch.setattr(rollout, "check_model", lambda model, longest: asked.append((model, longest)))
    monkeypatch.setattr(rollout, "Engine", Engine)
    load("refine", "docs").write_drafts("chat", like, task, "winter ramen", tmp_path, count=2)
    (where, longest), (ends, room), (prompt, length, group_size) = asked
    spoken = lambda text: tokenizer.decode(tokenizer(text).input_ids)
    assert spoken(task.criteria) in prompt and "winter ramen" in prompt and prompt.endswith("<|im_start|> assistant")
    assert (where, group_size, ends) == ("on cuda", 2, tokenizer.eos_token_id)
    assert longest == length + room and room > len(tokenizer(task.criteria).input_ids)
    drafts = [grm.Task.load(tmp_path, f"writer-{i}.md") for i in (1, 2)]
    for draft in drafts:
        assert (draft.labels, draft.steps) == (task.labels, task.steps) and draft.criteria.endswith("\\boxed{ grade } .")
