"""A task from product titles and a table of rules: queries, edited titles, exact step labels.

    python docs/synthesize.py TITLES.jsonl data/shop        # then: train.py --task data/shop

TITLES.jsonl: lines with "document", a title. AFRL (arXiv 2602.10006) names the synthesis of data
from criteria; its procedure is not public, and this one is ours. docs/synthesize.yaml (of
electronics: write your own) says which kinds of things there are, how people ask for them, and what
each rule costs. A query is made from a title; its documents are that title, as it is and with
minimal edits, and titles of the same and of other kinds. The demonstrations are of an annotator who
states the facts and overlooks each rule half of the time. No title is in two of the three files.
"""

import json
import random
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import yaml

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in ("", "data"))
import fresh
from from_csv import write_lines

import grm
import parallel

FILE = Path(__file__).with_suffix(".yaml")
TABLE = yaml.safe_load(FILE.read_text(encoding="utf-8"))
KINDS, PARTS, RULES = TABLE["kinds"], TABLE["parts"], TABLE["rules"]
ASKED = {word for kind in KINDS.values() for name in kind["asked"] for word in name.split()}


@cache
def kind_of(title):
    """What a title offers; its first sentence counts before the rest. None: not in the table."""
    title = title.lower()
    if (part := title.split(" for ")[0]) in PARTS:
        return part
    texts = (title.split(". ")[0], title)
    found = (kind for text in texts for kind in KINDS if re.search(KINDS[kind]["title"], text))
    return next(found, None)


def offered(title, kind):
    """What a title offers to who asks for a kind, or for a name that the table does not have."""
    title = title.lower()
    is_part = title.split(" for ")[0] in PARTS
    is_named = kind not in KINDS and kind in title.split()
    return kind if is_named and not is_part else kind_of(title)


def values_of(title):
    """{rule: what a title says of it, in lower case}, of the rules on which it is not silent."""
    found = {rule: re.findall(RULES[rule]["pattern"], title.lower()) for rule in RULES}
    return {rule: values for rule, values in found.items() if values}


def judge(asked, title, annotator=None):
    """Steps, (text, grade so far), of a title for what is asked, {"kind": kind, rule: value}.

    annotator: a random generator, that of one who overlooks each rule half of the time.
    """
    thing = offered(title, asked["kind"])
    is_same = thing == asked["kind"]
    overlooked = not is_same and annotator and annotator.random() >= 0.5
    grade = 3 if is_same or overlooked else 0
    steps = [(f"kind: {asked['kind']}, {thing}, {'same' if is_same else 'another'}", grade)]
    for rule in RULES:
        text = "any"
        if value := asked.get(rule):
            said = values_of(title).get(rule, [])
            if rule == "size":  # centimetres do not contradict gigabytes
                unit = value.lstrip("0123456789. ")
                said = [x for x in said if x.lstrip("0123456789. ") == unit]
            found = value if value in said else [*said, "none"][0]
            fact = {value: "same", "none": "silent"}.get(found, "other")
            text = f"{value}, {found}, {fact}"
            if fact == "other" and not (annotator and annotator.random() >= 0.5):
                grade = max(0, grade + RULES[rule]["effect"])
        steps.append((f"{rule}: {text}", grade))
    return steps


def edit(title, rule, value, rng):
    """The title with another value in the place of this one, or with none."""
    others = RULES[rule].get("values")
    if not others:
        number = re.search(r"\d+(\.\d+)?", value)[0]
        others = [value.replace(number, f"{x * float(number):g}", 1) for x in (0.5, 2, 3)]
    others = [other for other in others if other != value] + [""] * (rule != "brand")
    return re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", rng.choice(others), title, flags=re.I)


def ask(title, rng):
    """(what is asked, the query) of a title: its kind or a name, and up to three of its values."""
    said = {rule: values[0] for rule, values in values_of(title).items()}
    rules = rng.sample([*said], min(len(said), rng.choice((0, 0, 1, 1, 2, 2, 3))))
    said = {rule: value for rule, value in said.items() if rule in rules}
    kind = kind_of(title)
    name = rng.choice(KINDS[kind]["asked"])
    others = re.findall(r"(?<!\S)[a-z]{4,}(?!\S)", title.lower())
    if rng.random() < 0.25 and (names := sorted({*others} - {*said.values(), "with", *ASKED})):
        kind = name = rng.choice(names)
    words = [*said.values()]
    words.insert(rng.randint(0, len(words)), name)
    return {"kind": kind} | said, " ".join(words)


def documents(asked, query, title, titles, rng):
    """(what was done, title) of the documents of a query that was made from a title."""
    kind = asked["kind"]
    yield "none", title
    yield "part for it", f"{rng.choice(PARTS).capitalize()} for {title}"
    edited = title
    for rule in [*asked][1:]:
        yield f"{rule}, asked", edit(title, rule, asked[rule], rng)
        edited = edit(edited, rule, asked[rule], rng)
    if len(asked) > 2:
        yield "all that is asked", edited
    rest = [(rule, said[0]) for rule, said in values_of(title).items() if rule not in asked]
    rest = [(rule, value) for rule, value in rest if value != kind]
    if rest:
        rule, value = rng.sample(rest, 1)[0]
        yield f"{rule}, not asked", edit(title, rule, value, rng)
    same = [other for other in titles if offered(other, kind) == kind]
    others = sorted({*titles} - {*same})
    alike = [other for other in others if set(query.split()) & set(other.lower().split())]
    yield "same kind", rng.choice(same)
    for _ in range(2 if others else 0):  # few, and the document would tell the asked kind
        yield "another kind", rng.choice(others)
        yield "another kind, same words", rng.choice(alike or others)


def make_pairs(file, titles, queries, rng):
    """A file's pairs: of so many queries, with exact labels and the annotator's response."""
    pairs = []
    for number in range(queries):
        title = titles[number % len(titles)]
        asked, query = ask(title, rng)
        for done, document in documents(asked, query, title, titles, rng):
            grades = [str(grade) for _, grade in judge(asked, document)]
            told = judge(asked, document, annotator=rng)
            response = " ".join(f"{text} \\boxed{{{grade}}}" for text, grade in told)
            pair = {"query": query, "document": document, "label": grades[-1], "done": done}
            pair |= {"step_labels": grades, "response": response, "query_id": f"{file} {number}"}
            pairs.append(pair)
    return pairs


def read_titles(source):
    """The titles of a file, sorted, whose kinds the table has. Raises grm.TaskError."""
    found = set()
    for number, line in enumerate(grm.read_lines(source), 1):
        try:
            if line.strip():
                found.add(json.loads(line)["document"] + "")  # which raises for what is no text
        except (ValueError, LookupError, TypeError):
            what = 'is no line such as {"document": "a title"}'
            raise grm.TaskError(f"{source}:{number}: {what}") from None
    titles = sorted(title for title in found if kind_of(title) in KINDS)
    kinds = len({kind_of(title) for title in titles})
    print(f"{source}: {len(titles)} of {len(found)} titles are of {kinds} kinds that {FILE} has")
    if len(titles) < 100 or kinds < 2:
        raise grm.TaskError(f"100 titles and two kinds are needed; tell {FILE} of your shop's")
    return titles


def main():
    """Write the task; print how many of RL's pairs have which grade, by what was done."""
    source, out = map(Path, sys.argv[1:])
    if out.exists() and any(out.iterdir()):
        raise grm.TaskError(f"{out}: holds files; delete it or choose another name")
    titles = read_titles(source)
    rng = random.Random(0)
    rng.shuffle(titles)
    fifth = len(titles) // 5
    sft = make_pairs("sft", titles[: 2 * fifth], 3000, rng)  # fewer: it makes facts up
    train = make_pairs("train", titles[3 * fifth :], 1200, rng)
    test = make_pairs("test", titles[2 * fifth : 3 * fifth], 60, rng)
    out.mkdir(parents=True, exist_ok=True)
    names = (TABLE["labels"], TABLE["relevant"], ["kind", *RULES])
    task = grm.Task(out, TABLE["criteria"].strip(), *names, "reason-first")
    task.save(out)
    fields = ("query", "document", "label", "step_labels", "query_id", "done")
    write_lines(out / "sft.jsonl", sft, ("query", "document", "response"))
    write_lines(out / "train.jsonl", train, fields)
    write_lines(out / "test_titles.jsonl", test, fields)
    tokenizer = fresh.make_tokenizer(task, sft)
    settings = fresh.fit_settings(task, tokenizer, sft) | TABLE["settings"]
    fresh.write(out, tokenizer, settings, **TABLE["model"])
    counts = Counter((pair["done"], pair["label"]) for pair in train)
    print(f"{out}: RL's pairs by what was edited, and grade; next: train.py --task {out}")
    print(" " * 24 + "".join(f"{label:>7}" for label in task.labels))
    for done in sorted({pair["done"] for pair in train}):
        print(f"{done:24}" + "".join(f"{counts[done, label]:7}" for label in task.labels))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    parallel.launch(main, errors=(grm.TaskError,))
