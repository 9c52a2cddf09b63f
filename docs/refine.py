"""Refine the criteria: which revision of criteria.md mends new cases, and breaks nothing else?

    python docs/refine.py --task TASK --model MODEL --candidates FOLDER \\
        --cases new.jsonl --replay old.jsonl --out accepted.md       [--writer CHAT_MODEL]

FOLDER holds revised criteria, NAME.md, by any writer; with --writer a chat model adds drafts, told
which errors recur: three or more pairs of the same gold label, answer and wrong step. Cases are
pairs that the present criteria get wrong, replayed pairs those that must stay right; criteria that
they name themselves are put aside. Printed is what flips, by grade and step, with examples.
The queries of the cases are dealt into two halves. Of the candidates that lose at most --tolerance
of the replayed pairs' accuracy, the one with the most right in the first half is chosen; accepted
if it gets more right in each half than the present criteria. Neither choice nor writer has seen the
second half. The last line is JSON; exit code 0: accepted, and copied to --out; 3: none is.
AFRL (arXiv 2602.10006) names instruction refinement; its procedure is not public: this is ours,
with SEEK's gate and GEPA's held-out acceptance. A model heeds its criteria if it learnt to.
"""

import argparse
import json
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import score
from transformers.utils import logging as hf_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grm
import parallel
import rollout

ASK = """These criteria tell a model how to grade how relevant documents are to queries:
{criteria}
With them it makes these errors again and again:
{errors}
Answer with the new criteria alone, whole. Keep the grades, the steps and every \\boxed{{grade}}."""


def list_changes(task, pairs, answers, others, least=1):
    """A text: in what two answers to a pair differ, by grade and first step, with examples; kinds
    of fewer than `least` pairs are left out. answers, others: a pair of label and boxes for each.
    """
    kinds = defaultdict(list)
    for pair, (old, boxes), (new, new_boxes) in zip(pairs, answers, others, strict=True):
        if old != new:
            steps = zip(task.boxes, boxes, new_boxes, strict=False)  # no boxes: malformed
            step = next((name for name, one, other in steps if one != other), "unknown")
            gold = pair["label"]
            what = {new: "mended", old: "broken"}.get(gold, "still wrong")
            kinds[f"{what}, {old} -> {new} where {gold} is right, step {step}"].append(pair)
    lines = []
    for kind, changed in sorted(kinds.items(), key=lambda item: -len(item[1])):
        if len(changed) >= least:
            lines.append(f"{len(changed):6} {kind}")
            lines += [f"       {x['query']} | {x['document']}" for x in changed[:least]]
    return "\n".join(lines)


def write_drafts(writer, like, task, errors, folder, count=4):
    """Ask a chat model, run as the model `like`, for new criteria; writes FOLDER/writer-N.md."""
    model, tokenizer = grm.load_model(writer, like.dtype)
    ask = [{"role": "user", "content": ASK.format(criteria=task.criteria, errors=errors)}]
    settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    text = tokenizer.apply_chat_template(ask, **settings)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    room = 256 + 2 * len(tokenizer(task.criteria).input_ids)
    rollout.check_model(model.to(like.device), len(ids) + room)
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    engine = rollout.Engine(model, ends, [], room)
    (answers,) = engine.sample([ids], group_size=count, temperature=0.7).answers
    for number, answer in enumerate(answers, 1):
        draft = tokenizer.decode(answer, skip_special_tokens=True).strip()
        replace(task, criteria=draft).save(folder, f"writer-{number}.md")


def grade(renderer, engine, parts, name):
    """{part: answers, of label and boxes} and {part: accuracy}, by a file of criteria or None."""
    answers = {}
    scores = {}
    for part, pairs in parts.items():
        named = [pair | {"criteria": name} for pair in pairs]
        score.check_records(renderer, engine, named)
        results = grm.judge(renderer, engine, named)
        answers[part] = [(r["label"], [step["label"] for step in r["steps"]]) for r in results]
        right = [r["label"] == pair["label"] for r, pair in zip(results, pairs, strict=True)]
        scores[part] = sum(right) / len(pairs)
    print(f"\n{name or 'present'}: " + ", ".join(f"{x} {y:.3f}" for x, y in scores.items()))
    return answers, scores


def main():
    """Judge by the present criteria and by each candidate; choose, then accept or refuse."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", type=Path, required=True, help="folder with criteria.md")
    parser.add_argument("--model", required=True, help="the model that grades")
    parser.add_argument("--candidates", type=Path, required=True, help="folder of NAME.md")
    parser.add_argument("--cases", type=Path, required=True, help="new pairs, graded wrongly")
    parser.add_argument("--replay", type=Path, required=True, help="pairs that must stay right")
    parser.add_argument("--out", type=Path, required=True, help="file for accepted criteria")
    parser.add_argument("--tolerance", type=float, default=0.002, help="(default 0.002)")
    parser.add_argument("--writer", help="chat model that drafts four more candidates")
    args = parser.parse_args()
    if not (args.candidates.is_dir() and args.out.resolve().parent.is_dir()):
        raise grm.TaskError(f"{args.candidates} and the folder of {args.out} must be there")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    renderer, engine = grm.load_judge(args.model, args.task)
    task = renderer.task
    parts = {"first half": [], "second half": [], "replay": task.read(args.replay)}
    halves = {}  # {query: name of its part}
    for case in task.read(args.cases):
        half = ("first half", "second half")[len(halves) % 2]
        parts[halves.setdefault(case.get("query_id", case["query"]), half)].append(case)
    if len(halves) < 2:
        raise grm.TaskError(f"{args.cases}: needs two queries: to choose by, and to accept by")
    task.others.clear()  # of the pairs' own criteria
    before, present = grade(renderer, engine, parts, None)
    gold = [(case["label"], case.get("step_labels", [])) for case in parts["first half"]]
    errors = list_changes(task, parts["first half"], before["first half"], gold, least=3)
    if args.writer and errors:
        write_drafts(args.writer, engine.model, task, errors, args.candidates)
    scores = {}
    for path in sorted(args.candidates.glob("*.md")):
        try:
            # What this reads, the renderer's task has too: they share `others`.
            replace(task, folder=args.candidates).criteria_of(path.name)
            after, scores[path.name] = grade(renderer, engine, parts, path.name)
        except grm.TaskError as error:
            print(f"left out: {error}")
            continue
        for part, pairs in parts.items():
            text = list_changes(task, pairs, before[part], after[part])
            print(f"  {part}\n{text or '     0 flips'}")
    least = present["replay"] - args.tolerance - 1e-9
    fitting = [name for name in scores if scores[name]["replay"] >= least]
    chosen = max(fitting, key=lambda name: scores[name]["first half"], default=None)
    accepted = bool(chosen) and all(scores[chosen][x] > present[x] for x in halves.values())
    if accepted:
        shutil.copyfile(args.candidates / chosen, args.out)
    figures = {"accepted": accepted, "chosen": chosen, "present": present, "candidates": scores}
    print(json.dumps(figures))
    sys.exit(0 if accepted else 3)


if __name__ == "__main__":
    parallel.launch(main, (grm.TaskError, rollout.UnsupportedModelError, rollout.BudgetError))
