"""A task folder from real, human-labelled product search pairs (English, electronics), and the
baselines to beat.

    python data/chorus.py make PATH_TO_CHORUS --out data/chorus # then: train.py --task data/chorus
    python data/chorus.py baselines --task data/chorus  # to hold against train.py's table; --json

PATH_TO_CHORUS holds train.jsonl and test.jsonl (query, document, label 0..3, query_id; no query is
in both) and the data's README.md and LICENSE, which are copied along. The data are not part of this
project: do not commit the folder.

There are labels but no demonstrations of reasoning, so the task is answer-first without steps: SFT
on the labels of the training pairs, then RL on the same pairs. The model is a tiny Qwen3 that
starts without weights. It knows no word that the training pairs do not teach it; `--model
Qwen/Qwen3-0.6B` is the same task for a model that does.
"""

import argparse
import json
import math
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

# grm.py lies in the repository root, and Python puts only this script's own folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grm

LABELS = ["0", "1", "2", "3"]  # from worst to best
RELEVANT = ["2", "3"]
VOCABULARY = 4096
CONTEXT = 1024

CRITERIA = rf"""---
labels: {json.dumps(LABELS)}  # from worst to best
relevant: {json.dumps(RELEVANT)}
steps: []
format: answer-first
---
You grade how well a product of an electronics shop answers a search query.
3: what was searched for: a product of that kind, and of the brand, model or property that the query names.
2: close: the right kind of product with one detail that differs, or one that many who search for this would buy as well.
1: loosely related: an accessory or a part of the product searched for, or something for the same use.
0: unrelated: a different kind of product, even if it shares words with the query.
Judge what the product is, not which words it mentions. Answer with \boxed{{grade}} only.
"""  # noqa: E501 (a line of it is a line of the file)

# About one epoch of SFT: more steps learn the training queries by heart.
SETTINGS = {
    "max_new_tokens": 16,
    "eval_every": 10,
    "sft_steps": 80,
    "sft_batch": 32,
    "sft_lr": 1.5e-3,
    "rl_steps": 30,
    "prompts_per_step": 32,
    "group_size": 8,
    "lr": 5e-5,
}

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_source(source):
    """The training and test pairs of the folder `source`, checked. Raises grm.TaskError."""
    task = grm.Task(source, CRITERIA, LABELS, RELEVANT, [], "answer-first")
    files = ("train.jsonl", "test.jsonl", "README.md", "LICENSE")
    for name in files:
        if not (source / name).is_file():
            raise grm.TaskError(
                f"{source / name}: not found; PATH_TO_CHORUS holds {', '.join(files)}"
            )
    train, test = (task.read(source / name, ("label", "query_id")) for name in files[:2])
    known = {record["query_id"] for record in train}
    leaks = [record for record in test if record["query_id"] in known]
    if leaks:
        raise grm.TaskError(
            f"{leaks[0]['where']}: query_id {leaks[0]['query_id']!r} is in train.jsonl too; "
            f"the test set must hold other queries ({len(leaks)} such lines)"
        )
    return train, test


def make_tokenizer(texts):
    """A byte-level BPE tokenizer trained on `texts`, with Qwen's chat markers as special tokens.

    Lower case on top of Qwen's NFC: a model that starts from nothing would have to learn that "USB
    Hub" is "usb hub".
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config(tokenizer):
    """A Qwen3 of 0.9 M parameters, 0.5 M of them embeddings."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        initializer_range=0.06,  # at this width, Qwen's 0.02 learns several times slower
        tie_word_embeddings=True,
        architectures=["Qwen3ForCausalLM"],
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make(source, out):
    """Write the task folder `out` from the folder `source`: the same bytes every time."""
    if out.resolve() == source.resolve():
        raise grm.TaskError(f"--out {out}: is PATH_TO_CHORUS, whose files would be overwritten")
    train, test = read_source(source)
    out.mkdir(parents=True, exist_ok=True)
    (out / "criteria.md").write_text(CRITERIA, encoding="utf-8")
    (out / "train.json").write_text(json.dumps(SETTINGS, indent=2) + "\n", encoding="utf-8")
    demonstrations = [{**r, "response": f"\\boxed{{{r['label']}}}"} for r in train]
    write_lines(out / "sft.jsonl", demonstrations, ("query", "document", "response"))
    for name, records in (("train", train), ("test", test)):
        write_lines(out / f"{name}.jsonl", records, ("query", "document", "label", "query_id"))
    for name in ("README.md", "LICENSE"):
        shutil.copyfile(source / name, out / name)
    task = grm.Task.load(out)
    # Every prompt holds the criteria, so their words are frequent words.
    texts = [
        f"system\n{task.criteria}\nuser\nQuery: {r['query']}\nDocument: {r['document']}\n"
        f"assistant\n{r['response']}"
        for r in demonstrations
    ]
    tokenizer = make_tokenizer(texts)
    tokenizer.save_pretrained(out / "model")
    make_config(tokenizer).save_pretrained(out / "model")


def write_lines(path, records, fields):
    """Write these fields of records as JSON Lines."""
    lines = (json.dumps({name: r[name] for name in fields}, ensure_ascii=False) for r in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def words(text):
    """The set of lower-case words of a text."""
    return set(re.findall(r"\w+", text.lower()))


def overlap_scores(records, documents):
    """Each record's share of its query's words that its document holds, 0 to 1.

    Words are weighted by their idf in `documents`.
    """
    counts = Counter(word for text in documents for word in words(text))

    def idf(some):
        return sum(math.log((len(documents) + 1) / (counts[word] + 1)) for word in sorted(some))

    scores = []
    for record in records:
        query = words(record["query"])
        scores.append(idf(query & words(record["document"])) / (idf(query) or 1.0))
    return scores


def fit_thresholds(scores, gold, classes):
    """classes - 1 ascending thresholds that turn scores into class indices with the highest
    accuracy: the exact optimum.

    Moving threshold g up to cut c turns what lies below it from class g + 1 into class g;
    `gains[c, g]` is what that wins.
    """
    values, places = np.unique(scores, return_inverse=True)
    counts = np.zeros((len(values) + 1, classes), dtype=int)
    np.add.at(counts, (places + 1, gold), 1)
    below = counts.cumsum(0)
    gains = below[:, :-1] - below[:, 1:]
    best = gains[:, 0]
    paths = [(c,) for c in range(len(gains))]
    for g in range(1, classes - 1):
        # Where threshold g - 1 lies best, at or below c.
        firsts = [int(best[: c + 1].argmax()) for c in range(len(gains))]
        paths = [(*paths[first], c) for c, first in enumerate(firsts)]
        best = best[firsts] + gains[:, g]
    edges = np.append(values, np.inf)  # cut c: the c lowest values lie below
    return edges[list(paths[int(best.argmax())])]


def baselines(task):
    """Metrics on TASK/test.jsonl of three that need no model: {"majority": ...}, by grm.metrics.

    majority: the most frequent label of train.jsonl for every pair. always 0: the test set's own
    most frequent label, which nobody can know; it shows how far the two sets' labels differ. idf
    overlap: the score itself orders the documents; thresholds with the highest accuracy on
    train.jsonl turn it into labels.
    """
    train, test = (task.read(task.folder / name) for name in ("train.jsonl", "test.jsonl"))
    gold = [task.labels.index(record["label"]) for record in train]
    common = task.labels[int(np.bincount(gold).argmax())]
    documents = sorted({record["document"] for record in train})
    thresholds = fit_thresholds(overlap_scores(train, documents), gold, len(task.labels))
    scores = overlap_scores(test, documents)
    overlap = []
    for score, g in zip(scores, np.searchsorted(thresholds, scores, side="right"), strict=True):
        overlap.append({"label": task.labels[g], "grade": score})
    predictions = {
        "majority": [{"label": common, "grade": 0.0}] * len(test),
        "always 0": [{"label": "0", "grade": 0.0}] * len(test),
        "idf overlap": overlap,
    }
    return {name: grm.metrics(task, test, rows) for name, rows in predictions.items()}


def count_new_queries(task):
    """(test queries with a word that no training query has, test queries)."""
    files = (task.read(task.folder / name) for name in ("train.jsonl", "test.jsonl"))
    train, test = ({record["query"].lower() for record in records} for records in files)
    known = {word for query in train for word in query.split()}
    return sum(not known.issuperset(query.split()) for query in test), len(test)


def print_table(results):
    """One line per baseline, in the columns of train.py's table."""
    print(f"{'':<22}{'accuracy':>9}{'binary':>8}{'macro-F1':>10}{'kappa':>7}{'nDCG@10':>9}")
    for name, m in results.items():
        ndcg = f"{m['ndcg@10']:.3f}" if "ndcg@10" in m else "-"
        first = f"{name:<22}{m['accuracy']:>9.3f}{m['binary_accuracy']:>8.3f}"
        print(f"{first}{m['macro_f1']:>10.3f}{m['kappa']:>7.3f}{ndcg:>9}")


def main():
    """Command line: `make` the task folder, or measure the `baselines`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="write the task folder")
    measure = commands.add_parser("baselines", help="measure the baselines on its test set")
    maker.add_argument(
        "source", type=Path, metavar="PATH_TO_CHORUS", help="folder with train.jsonl and test.jsonl"
    )
    folder = Path("data/chorus")
    maker.add_argument("--out", type=Path, default=folder, help=f"to write (default: {folder})")
    measure.add_argument("--task", type=Path, default=folder, help=f"(default: {folder})")
    measure.add_argument("--json", action="store_true", help="print JSON, not a table")
    args = parser.parse_args()
    try:
        if args.command == "make":
            make(args.source, args.out)
        else:
            results = baselines(grm.Task.load(args.task))
            print(json.dumps(results, indent=1)) if args.json else print_table(results)
            if not args.json:
                new, queries = count_new_queries(grm.Task.load(args.task))
                print(f"{new} of {queries} test queries have a word that no training query has")
    except grm.TaskError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
