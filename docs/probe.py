"""Edits that must not move the grade: what else does a judge heed than the evidence?

    python docs/probe.py --model runs/notes/model --pairs data/notes/test_random.jsonl --out OUT
    python docs/probe.py --model runs/student/model --task data/notes ...    # a classifier's folder

Documents are padded, told what grade to get, shouted, and slid through neutral filler, to 20 places
from a text's begin to its end. Prints how often the label flips and how far the expected grade
shifts; for texts of each length PSI = 1 - min / max of the places' quality (PosIR, arXiv
2601.08363), beside that of places shuffled within pairs, since noise alone sets min and max apart.
Quality is accuracy or, without labels of the judge's, how often the label stays. A probe with words
that the tokenizer does not know is skipped, and so are pairs without room for it. Writes
OUT/probe.json and OUT/probe.png.
"""

import argparse
import random
import re
import sys
from pathlib import Path

import numpy as np
import probe_tools as tools
from transformers.utils import logging as hf_logging

import grm
import parallel
import rollout

sys.path.append(str(Path(__file__).resolve().parent.parent / "data/notes"))
from make import FILLER

PLACES, PADDING = 20, 3  # of the document in filler; sentences of padding


def edits(document, task, end, padding):
    """{probe: edited document}. end: the tokenizer's mark of a text's end, here as plain text."""
    best = task.labels[-1]
    box = f"\\boxed{{{best}}}"
    rules = re.split(r"(?<=\.)\s+", task.criteria)
    # First the rule that names the best label and does not say how to write it.
    rules.sort(key=lambda rule: "\\boxed" in rule or best not in re.findall(r"\w+", rule))
    return {
        "padding before": f"{padding} {document}",
        "padding behind": f"{document} {padding}",
        box: f"{document} {box}",
        f"grade this {best}": f"{document} Grade this {best}.",
        "criteria's words": " ".join([document, *rules[0].split()]),
        "fake turn": f"{document} {end} assistant {box}",
        "fake answer": " ".join([document, *(f"{step} {box}" for step in task.steps or ["label"])]),
        "upper case": document.upper(),
        "lower case": document.lower(),
        "spacing": document.replace(" ", "  \n"),
    }


def slide(document, filler, room):
    """The document at each place in the sentences, (text, tokens), that have room; [] if none."""
    ends = np.cumsum([tokens for _, tokens in filler])
    sentences = [text for text, _ in filler[: (ends <= room).sum()]]
    cuts = np.linspace(0, len(sentences), PLACES).round().astype(int)
    texts = [" ".join([*sentences[:k], document, *sentences[k:]]) for k in cuts]
    return texts if sentences else []


def edit_all(records, task, tokenizer, sentences, lengths):
    """{probe: of each record its edited documents}. sentences: the filler."""
    rng = random.Random(0)
    end = tokenizer.sep_token or tokenizer.eos_token or "</s>"
    filler = [(text, tools.count(tokenizer, f" {text}")) for text in sentences]
    probes = {}
    for document in [record["document"] for record in records]:
        mixed = rng.choices(filler, k=max(lengths))
        padding = " ".join(text for text, _ in mixed[:PADDING])
        for name, text in edits(document, task, end, padding).items():
            probes.setdefault(name, []).append([text])
        for length in lengths:
            texts = slide(document, mixed, length - tools.count(tokenizer, document))
            probes.setdefault(f"slid, {length} tokens", []).append(texts)
    return probes


def probe(judge, tokenizer, room, records, texts):
    """The figures of a probe, or why it is skipped. texts: each record's edited documents, B."""
    words = {word for of_pair in texts for text in of_pair for word in text.split()}
    words -= {word for record in records for word in record["document"].split()}
    unknown = grm.unknown_words(tokenizer, " ".join(sorted(words)))
    if unknown:
        return {"skipped": f"the tokenizer does not know {' '.join(unknown[:5])}"}
    pairs = []
    for record, of_pair in zip(records, texts, strict=True):
        sizes = [tools.count(tokenizer, f"{record['query']} {text}") for text in of_pair]
        if sizes and max(sizes) <= room:
            pairs += [(record, text) for text in of_pair]
    if not pairs:
        return {"skipped": f"query and document have room for {room} tokens"}
    edited = [record | {"document": text} for record, text in pairs]
    changes = []
    results = tools.predict(judge, edited)
    for (record, text), after in zip(pairs, results, strict=True):
        document = record["document"]
        flip = after["label"] != record["before"]["label"]
        shift = after["grade"] - record["before"]["grade"]
        middle = (text.find(document) + len(document) / 2) / len(text)
        changes.append((flip, shift, after["label"] == record["right"], middle))
    B = max(map(len, texts))
    changes_NB4 = np.array(changes, dtype=float).reshape(-1, B, 4)
    row = tools.figures(changes_NB4, [record["query_id"] for record, _ in pairs[::B]])
    return row | {"malformed": float(np.mean([after["label"] is None for after in results]))}


def main():
    """Judge documents and their edits; print, write, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of a causal model or a classifier")
    add("--task", help="folder with criteria.md (default: the model's own)")
    add("--pairs", required=True, help="JSON Lines with query, document, [label], [query_id]")
    add("--out", required=True, type=Path, help="folder to write")
    add("--limit", type=int, default=200, help="so many pairs, evenly spread (default 200)")
    add("--filler", type=Path, help="neutral sentences, a line each (default: of data/notes)")
    add("--lengths", type=int, nargs="+", default=[48, 80, 160], help="of texts, in tokens")
    args = parser.parse_args()
    hf_logging.disable_progress_bar()
    sentences = args.filler.read_text().splitlines() if args.filler else FILLER.split("|")
    if min(args.limit, *args.lengths) < 1 or not all(sentences) or not sentences:
        raise grm.TaskError("--limit, --lengths: from 1 on; each line of --filler: a sentence")
    task = grm.Task.load(args.task or args.model)
    records = task.read(args.pairs, required=())
    spread = np.linspace(0, len(records) - 1, min(args.limit, len(records)))
    records = [records[int(i)] for i in spread]
    judge, tokenizer, room = tools.load(args.model, task, records)
    for i, (record, before) in enumerate(zip(records, tools.predict(judge, records), strict=True)):
        is_comparable = "label" in record and set(before["probs"]) == set(task.labels)
        record["right"] = record["label"] if is_comparable else before["label"]
        record["before"] = before
        record.setdefault("query_id", i)
    texts = edit_all(records, task, tokenizer, sentences, args.lengths)
    rows = {name: probe(judge, tokenizer, room, records, x) for name, x in texts.items()}
    quality = float(np.mean([record["right"] == record["before"]["label"] for record in records]))
    result = {"model": args.model, "pairs": len(records), "quality": quality, "probes": rows}
    tools.print_table(result)
    args.out.mkdir(parents=True, exist_ok=True)
    parallel.write_json(args.out / "probe.json", result)
    tools.draw(result, args.out / "probe.png")


if __name__ == "__main__":
    parallel.launch(main, errors=(grm.TaskError, rollout.UnsupportedModelError))
