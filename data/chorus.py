"""A task folder from real, human-labelled product search pairs (English, electronics), and the
baselines to beat.

    python data/chorus.py make PATH_TO_CHORUS                  # then: train.py --task data/chorus
    python data/chorus.py make PATH_TO_CHORUS --model models/smollm2 --reason --out data/chorus-r
    python data/chorus.py baselines --task data/chorus --encoder models/minilm  # to be beaten

PATH_TO_CHORUS holds train.jsonl and test.jsonl (query, document, label 0..3, query_id; no query is
in both) and the data's README.md and LICENSE, which are copied along. The data are not part of this
project: do not commit the folder.

There are labels but no demonstrations of reasoning. In the first form the task is answer-first
without steps: SFT on the labels of the training pairs, then RL on the same pairs. With `--reason`
the answer has three steps, demonstrated by rule: which words of the query the title has, and the
grade that these alone would give; what is searched for and what is offered, and whether that is the
same kind, which the human grade tells; the human grade. Nothing is taken from test pairs.

Without `--model` the folder gets a tiny Qwen3 that starts without weights and knows no word that
the training pairs do not teach it. With it, the task is for that model (`train.py --model`), whose
tokenizer says how long answers are.
"""

import argparse
import json
import math
import random
import re
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

# grm.py lies in the repository root, and Python puts only this script's own folder on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grm

LABELS = ["0", "1", "2", "3"]  # from worst to best
RELEVANT = ["2", "3"]
VOCABULARY = 4096
CONTEXT = 1024
NO_KINDS = {"for", "and", "with", "the", "ppm", "replaces", "for select"}

FORMS = {  # steps, format, and how the criteria end
    "label": ([], "answer-first", " Answer with \\boxed{grade} only."),
    "reason": (
        ["words", "kind", "grade"],
        "reason-first",
        "\nWork in three steps and close every step with a grade as \\boxed{grade}."
        "\nWords: the words of the query that the product's text has and those that it lacks; "
        "the grade that these alone would give."
        "\nKind: what is searched for and what is offered; "
        "3 if that is the same kind of thing or close to it, 0 if it is another."
        "\nGrade: the grade by the rules above, which is the answer.",
    ),
}
MEANINGS = {
    "3": "what was searched for",
    "2": "close",
    "1": "loosely related",
    "0": "unrelated",
}
RULES = """You grade how well a product of an electronics shop answers a search query.
3: what was searched for: a product of that kind, and of the brand, model or property that the query names.
2: close: the right kind of product with one detail that differs, or one that many who search for this would buy as well.
1: loosely related: an accessory or a part of the product searched for, or something for the same use.
0: unrelated: a different kind of product, even if it shares words with the query.
Judge what the product is, not which words it mentions."""  # noqa: E501 (a line of the criteria is a line of the file)

# About one epoch of SFT: more steps learn the training queries by heart.
SETTINGS = {
    "eval_every": 10,
    "sft_steps": 80,
    "sft_batch": 32,
    "sft_lr": 1.5e-3,
    "rl_steps": 30,
    "prompts_per_step": 32,
    "group_size": 8,
    "lr": 5e-5,
}

PRETRAINED = {"sft_steps": 78, "sft_lr": 5e-5, "lr": 5e-6}  # what differs for a pretrained model

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_source(source):
    """The training and test pairs of the folder `source`, checked. Raises grm.TaskError."""
    task = grm.Task(source, RULES, LABELS, RELEVANT, [], "answer-first")
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
            f"{leaks[0].where}: query_id {leaks[0]['query_id']!r} is in train.jsonl too; "
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


def write_criteria(form):
    """The text of criteria.md, front matter and body."""
    steps, answer_format, closing = FORMS[form]
    front = [
        f"labels: {json.dumps(LABELS)}  # from worst to best",
        f"relevant: {json.dumps(RELEVANT)}",
        f"steps: [{', '.join(steps)}]",
        f"format: {answer_format}",
    ]
    return "\n".join(["---", *front, "---", RULES + closing, ""])


def find_kinds(documents):
    """{document: what its title calls the thing}; "unnamed" where it does not.

    Titles here read "BRAND MODEL kind of thing Property": the kind is the longest run of words in
    lower case in the first sentence that three titles share.
    """
    runs = {}
    for text in documents:
        first = re.split(r"[.!?] ", text)[0]
        found = re.findall(r"(?<!\S)[a-z][a-z/-]{2,}(?: [a-z][a-z/-]{2,})*(?=[\s.,]|$)", first)
        runs[text] = [run for run in found if run not in NO_KINDS]
    counts = Counter(run for found in runs.values() for run in set(found))
    kinds = {}
    for text, found in runs.items():
        shared = [run for run in found if counts[run] >= 3]
        kinds[text] = max(shared, key=lambda run: len(run.split()), default="unnamed")
    return kinds


def label_steps(records, train):
    """The step labels of labelled records: the grade by words alone, the kind, the label.

    The grade by words: idf overlap, with the thresholds that suit the training pairs best.
    """
    weights = word_weights({record["document"] for record in train})
    of_train = overlap_scores(train, weights)
    by_words = by_thresholds(LABELS, of_train, train, overlap_scores(records, weights))
    kinds = ["3" if record["label"] in RELEVANT else "0" for record in records]
    triples = zip(by_words, kinds, records, strict=True)
    return [[guess["label"], kind, record["label"]] for guess, kind, record in triples]


def demonstrate(train):
    """The training records with `response` and `step_labels`: reasoning in three steps, by rule."""
    kinds = find_kinds(sorted({record["document"] for record in train}))
    demonstrations = []
    for record, labels in zip(train, label_steps(train, train), strict=True):
        query = list(dict.fromkeys(re.findall(r"\w+", record["query"].lower())))
        there = words(record["document"])
        has = [word for word in query if word in there]
        lacks = [word for word in query if word not in has]
        kind = kinds[record["document"]]
        same = record["label"] in RELEVANT
        texts = [
            f"words: has {' '.join(has) or 'none'}, lacks {' '.join(lacks) or 'none'}",
            f"kind: {record['query']}, {kind}, {'same' if same else 'another'}",
            f"grade: {MEANINGS[record['label']]}",
        ]
        steps = [f"{text} \\boxed{{{label}}}" for text, label in zip(texts, labels, strict=True)]
        demonstrations.append(record | {"response": " ".join(steps), "step_labels": labels})
    return demonstrations


def cross(train, of_each=30):
    """Unlabelled pairs: each training query with titles that nobody judged for it.

    Half of them are those that have most of its words, half are drawn.
    """
    rng = random.Random(0)
    documents = sorted({record["document"] for record in train})
    weights = word_weights(documents)
    judged = {}
    for record in train:
        judged.setdefault(record["query"], set()).add(record["document"])
    pairs = []
    for query, known in judged.items():
        candidates = [{"query": query, "document": text} for text in documents if text not in known]
        scores = overlap_scores(candidates, weights)
        order = sorted(range(len(candidates)), key=lambda i: -scores[i])
        nearest = order[: of_each // 2]
        others = order[of_each // 2 :]
        drawn = rng.sample(others, min(len(others), of_each - len(nearest)))
        pairs += [candidates[i] for i in (*nearest, *drawn)]
    return pairs


def make(source, out, model=None, form="label"):
    """Write the task folder `out` from the folder `source`: the same bytes every time.

    model: a folder or hub name, whose tokenizer says how long the demonstrated answers are; None:
    the task gets a tiny model of its own.
    """
    if out.resolve() == source.resolve():
        raise grm.TaskError(f"--out {out}: is PATH_TO_CHORUS, whose files would be overwritten")
    train, test = read_source(source)
    out.mkdir(parents=True, exist_ok=True)
    (out / "criteria.md").write_text(write_criteria(form), encoding="utf-8")
    fields = ["query", "document", "label", "query_id"]
    if form == "reason":
        train = demonstrate(train)
        write_lines(out / "train.jsonl", train, (*fields, "step_labels"))
    else:
        train = [{**r, "response": f"\\boxed{{{r['label']}}}"} for r in train]
        write_lines(out / "train.jsonl", train, fields)
    write_lines(out / "sft.jsonl", train, ("query", "document", "response"))
    write_lines(out / "test.jsonl", test, fields)
    write_lines(out / "unlabelled.jsonl", cross(train), ("query", "document"))
    for name in ("README.md", "LICENSE"):
        shutil.copyfile(source / name, out / name)
    task = grm.Task.load(out)
    if model is None:
        # Every prompt holds the criteria, so their words are frequent words.
        texts = [
            f"system\n{task.criteria}\nuser\nQuery: {r['query']}\nDocument: {r['document']}\n"
            f"assistant\n{r['response']}"
            for r in train
        ]
        tokenizer = make_tokenizer(texts)
        tokenizer.save_pretrained(out / "model")
        make_config(tokenizer).save_pretrained(out / "model")
    else:
        tokenizer = grm.load_model(model, meta=True)[1]
    renderer = grm.Renderer(task, tokenizer)
    longest = max(len(renderer.encode_response(record["response"])) for record in train)
    settings = {"max_new_tokens": max(16, longest + 8), **SETTINGS, **(PRETRAINED if model else {})}
    (out / "train.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_lines(path, records, fields):
    """Write these fields of records as JSON Lines."""
    lines = (json.dumps({name: r[name] for name in fields}, ensure_ascii=False) for r in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def words(text):
    """The set of lower-case words of a text."""
    return set(re.findall(r"\w+", text.lower()))


def word_weights(documents):
    """{word: its idf in the documents}; one that none of them has weighs most."""
    counts = Counter(word for text in documents for word in words(text))
    most = math.log(len(documents) + 1)
    weights = {word: most - math.log(count + 1) for word, count in counts.items()}
    return defaultdict(lambda: most, weights)


def overlap_scores(records, weights):
    """Each record's share of its query's words, by weight, that its document holds, 0 to 1."""
    scores = []
    for record in records:
        query = words(record["query"])
        held = query & words(record["document"])
        total = sum(weights[word] for word in sorted(query))
        scores.append(sum(weights[word] for word in sorted(held)) / (total or 1.0))
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


def load_encoder(source):
    """(tokenizer, model) of a folder or hub name, as of the sentence-transformers."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        return tokenizer, AutoModel.from_pretrained(source, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise grm.TaskError(f"--encoder {source}: cannot be loaded: {error}") from error


def cosine_scores(records, tokenizer, model):
    """Each record's cosine between query and document, by an encoder's mean token states."""
    texts = sorted({record[name] for record in records for name in ("query", "document")})
    vectors = {}
    for start in range(0, len(texts), 64):
        part = texts[start : start + 64]
        inputs = tokenizer(part, padding=True, truncation=True, return_tensors="pt")
        inputs = inputs.to(model.device)
        with torch.inference_mode():
            states_NTD = model(**inputs).last_hidden_state
        mask_NT1 = inputs.attention_mask[..., None]
        means_ND = (states_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)
        vectors |= zip(part, torch.nn.functional.normalize(means_ND), strict=True)
    return [float(vectors[r["query"]] @ vectors[r["document"]]) for r in records]


def by_thresholds(labels, train_scores, train, test_scores):
    """Predictions of scores alone: they order the documents, and thresholds make them labels.

    The thresholds are those with the highest accuracy on the training pairs.
    """
    gold = [labels.index(record["label"]) for record in train]
    thresholds = fit_thresholds(train_scores, gold, len(labels))
    places = np.searchsorted(thresholds, test_scores, side="right")
    pairs = zip(places, test_scores, strict=True)
    return [{"label": labels[place], "grade": score} for place, score in pairs]


def baselines(task, encoder=None):
    """Metrics on TASK/test.jsonl of what trains no model: {"majority": ...}, by grm.metrics.

    majority: the most frequent label of train.jsonl for every pair. always 0: the test set's own
    most frequent label, which nobody can know; it shows how far the two sets' labels differ. idf
    overlap, and with an encoder its cosine: see `by_thresholds`.
    """
    train, test = (task.read(task.folder / name) for name in ("train.jsonl", "test.jsonl"))
    gold = [task.labels.index(record["label"]) for record in train]
    common = task.labels[int(np.bincount(gold).argmax())]
    weights = word_weights({record["document"] for record in train})
    predictions = {
        "majority": [{"label": common, "grade": 0.0}] * len(test),
        "always 0": [{"label": "0", "grade": 0.0}] * len(test),
        "idf overlap": by_thresholds(
            task.labels, overlap_scores(train, weights), train, overlap_scores(test, weights)
        ),
    }
    if encoder:
        scores = cosine_scores([*train, *test], *load_encoder(encoder))
        of_train, of_test = scores[: len(train)], scores[len(train) :]
        predictions["cosine"] = by_thresholds(task.labels, of_train, train, of_test)
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
    maker.add_argument("--model", help="a pretrained model: its folder, or its name on the hub")
    maker.add_argument("--reason", action="store_true", help="answers of three steps")
    maker.add_argument("--out", type=Path, default=folder, help=f"to write (default: {folder})")
    measure.add_argument("--task", type=Path, default=folder, help=f"(default: {folder})")
    measure.add_argument("--encoder", help="an encoder's folder or hub name, for its cosine")
    measure.add_argument("--json", action="store_true", help="print JSON, not a table")
    args = parser.parse_args()
    try:
        if args.command == "make":
            make(args.source, args.out, args.model, "reason" if args.reason else "label")
        else:
            results = baselines(grm.Task.load(args.task), args.encoder)
            print(json.dumps(results, indent=1)) if args.json else print_table(results)
            if not args.json:
                new, queries = count_new_queries(grm.Task.load(args.task))
                print(f"{new} of {queries} test queries have a word that no training query has")
    except grm.TaskError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
