"""Write the embedded task, bit for bit: criteria, demonstrations, labelled pairs, tiny models.

    python data/notes/make.py                         # rewrites the files beside this one
    python data/notes/make.py --format answer-first --out data/notes-answer-first  # grade first
    python data/notes/make.py --steps 8 --out data/notes-8    # five more rules, each its own step

The world: a query names a topic and up to three constraints; a note is about one topic, may give
values for constraints, may be promotion, and with `--steps` may have traits (`TRAITS`). `grades`
below is the whole business logic, the same that criteria.md tells the model in words.

The demonstrations come from a *generic annotator*: it reads facts well and writes fluently, but
knows this business's rules only now and then (`ANNOTATOR`). A model fine-tuned on them reasons in
the right form and grades wrongly; what is left to learn, when a rule applies, is in the labels
alone. That is the gap that reinforcement learning has to close. The more rules there are, the more
often its errors cancel, and a right grade hides wrong steps; `--error` sets how often it errs.

LONGTAIL: topics, promotion words and combinations of rules that are rare in the demonstrations
(`is_longtail`).
"""

import argparse
import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ModernBertConfig, PreTrainedTokenizerFast, Qwen3Config

SEED = 20260
SIZES = {"sft": 7500, "train": 4500, "test_random": 500, "test_longtail": 500, "unlabelled": 5000}

CATEGORIES = {
    "sport": ["skiing", "skating", "hiking", "surfing"],
    "food": ["ramen", "sushi", "coffee", "baking"],
    "beauty": ["skincare", "makeup", "perfume", "nails"],
    "home": ["sofas", "curtains", "plants", "lamps"],
    "travel": ["hotels", "hostels", "flights", "trains"],
    "craft": ["knitting", "sewing", "pottery", "painting"],
}
RARE_TOPICS = {"surfing", "baking", "nails", "lamps", "trains", "painting"}
CONSTRAINTS = {
    "place": ["paris", "tokyo", "rome", "berlin", "lima", "oslo"],
    "season": ["spring", "summer", "autumn", "winter"],
    "audience": ["kids", "couples", "students", "parents", "seniors"],
}
PROMOTION = ["sponsored", "gifted", "affiliate"]
RARE_PROMOTION = "affiliate"
FILLER = (
    "i we my our love loved tried today finally really so very best new favorite tips guide diary "
    "photos part two this that with and for in the a week trip shop day little big happy"
).split()

# Of the fourth step and those behind it: the words that give a note the trait, and how far that
# moves the grade, between 0 and 3.
TRAITS = {
    "language": (["dutch", "finnish"], -1),
    "price": (["cheap", "bargain"], 1),
    "freshness": (["outdated", "old"], -1),
    "length": (["detailed", "thorough"], 1),
    "safety": (["unsafe", "scam"], -3),
}

# How often the generic annotator applies each rule. Facts (same, silent, ...) it states correctly.
ANNOTATOR = {"topic": 0.95, "silent": 0.30, "contradicted": 0.25, "promotion": 0.15}
ANNOTATOR |= dict.fromkeys(TRAITS, 0.25)

RULES = {  # a step each
    "topic": (
        "Topic: the same topic gets 3, a related topic of the same category gets 1, "
        "any other topic gets -1."
    ),
    "constraints": (
        "Constraints: a query can ask for a place, a season and an audience. "
        "Every constraint that the note is silent about costs\n"
        "one grade, but never below 0. A contradicted constraint caps the grade at 0. "
        "A grade of -1 stays."
    ),
    "promotion": "Promotion: a note that is sponsored, gifted or affiliate is capped at 1.",
    "language": "Language: a note in dutch or finnish costs one grade, but never below 0.",
    "price": "Price: a note about something cheap or a bargain gains one grade, but never above 3.",
    "freshness": "Freshness: a note that is outdated or old costs one grade, but never below 0.",
    "length": "Length: a note that is detailed or thorough gains one grade, but never above 3.",
    "safety": "Safety: a note about something unsafe or a scam is capped at 0.",
}
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]

TRAIN = """{
  "max_new_tokens": %d,
  "eval_every": 40,
  "sft_steps": 1400,
  "sft_batch": 16,
  "sft_lr": 1.5e-3,
  "rl_steps": 120,
  "prompts_per_step": 16,
  "group_size": 8,
  "lr": 2e-4
}
"""

DISTILL = """{
  "pairs": "train.jsonl,sft.jsonl,unlabelled.jsonl",
  "samples": 1,
  "max_new_tokens": %d,
  "steps": 6500,
  "batch": 32,
  "lr": 2e-3
}
"""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_criteria(num_steps, answer_format):
    """The text of criteria.md, front matter and body."""
    steps = list(RULES)[:num_steps]
    in_steps = f"{NUMBERS[num_steps - 1]} step{'s' if num_steps > 1 else ''}"
    closing = "close every step with the grade so far as \\boxed{grade}."
    if answer_format == "reason-first":
        task = f"Work in {in_steps} and {closing}"
        last = "The last grade is the answer."
    else:
        begin = "Begin with the grade as \\boxed{grade}."
        task = f"{begin}\nThen explain it in {in_steps} and {closing}"
        last = "The first grade is the answer, the last one repeats it."
    front = [
        'labels: ["-1", "0", "1", "2", "3"]  # from worst to best',
        'relevant: ["2", "3"]',
        f"steps: [{', '.join(steps)}]",
        f"format: {answer_format}",
    ]
    body = [f"You grade how well a note answers a query. {task}", *(RULES[step] for step in steps)]
    return "\n".join(["---", *front, "---", *body, last, ""])


def draw_pair(rng, topic_weights, traits):
    """One query and one note as facts (topics, statuses of the constraints, promotion word, words
    of the traits) and as texts.
    """
    topics = [t for group in CATEGORIES.values() for t in group]
    topic = rng.choices(topics, [topic_weights.get(t, 1.0) for t in topics])[0]
    siblings = [t for t in CATEGORIES[category_of(topic)] if t != topic]
    relation = rng.choices(["same", "related", "other"], [0.46, 0.27, 0.27])[0]
    others = [t for t in topics if t != topic and t not in siblings]
    candidates = {"same": topic, "related": rng.choice(siblings), "other": rng.choice(others)}
    note_topic = candidates[relation]

    facts = {}
    asked = [topic]
    told = [note_topic]
    for name, values in CONSTRAINTS.items():
        if rng.random() < 0.6:  # the query asks for it
            want = rng.choice(values)
            status = rng.choices(["match", "silent", "contradicted"], [0.45, 0.30, 0.25])[0]
            if status == "match":
                have = want
            elif status == "silent":
                have = "none"
            else:
                have = rng.choice([v for v in values if v != want])
            facts[name] = (want, have, status)
            asked.append(want)
        else:
            facts[name] = ("any", rng.choice(values) if rng.random() < 0.3 else "none", "any")
        if facts[name][1] != "none":
            told.append(facts[name][1])
    promotion = rng.choices(PROMOTION, [0.45, 0.45, 0.10])[0] if rng.random() < 0.45 else "none"
    if promotion != "none":
        told.append(promotion)
    words = {}
    for name in traits:
        words[name] = rng.choice(TRAITS[name][0]) if rng.random() < 0.35 else "none"
        if words[name] != "none":
            told.append(words[name])
    note = told + rng.choices(FILLER, k=rng.randint(8, 16))
    rng.shuffle(asked)
    rng.shuffle(note)
    return {
        "query": " ".join(asked),
        "document": " ".join(note),
        "topics": (topic, note_topic, relation),
        "constraints": facts,
        "promotion": promotion,
        "traits": words,
    }


def category_of(topic):
    """The category of a topic."""
    return next(name for name, topics in CATEGORIES.items() if topic in topics)


def grades(pair, applies=lambda rule: True, rng=None):
    """The grade after each step; a pair without traits has three.

    applies(rule): whether this reader applies the rule this time.
    """
    grade = {"same": 3, "related": 1, "other": -1}[pair["topics"][2]]
    if not applies("topic"):
        grade = rng.choice([g for g in (3, 1, -1) if g != grade])
    steps = [grade]
    if grade >= 0:
        statuses = [status for _, _, status in pair["constraints"].values()]
        grade = max(0, grade - sum(applies("silent") for s in statuses if s == "silent"))
        if "contradicted" in statuses and applies("contradicted"):
            grade = 0
    steps.append(grade)
    if pair["promotion"] != "none" and applies("promotion"):
        grade = min(grade, 1)
    steps.append(grade)
    for name, word in pair["traits"].items():
        if word != "none" and grade >= 0 and applies(name):
            grade = min(3, max(0, grade + TRAITS[name][1]))
        steps.append(grade)
    return steps


def write_response(pair, steps):
    """The reasoning in words: facts in the order of the steps, each step closed by its grade.

    What the query asks for is looked up in the note: "found", or what stands there in its place, or
    "none".
    """
    want, have, relation = pair["topics"]
    there = "found" if relation == "same" else f"{have} in {category_of(have)}"
    topic = f"topic: {want} in {category_of(want)}, {there}, {relation}"
    parts = []
    for name, (asked, told, status) in pair["constraints"].items():
        there = "found" if status == "match" else told
        parts.append(f"{name}: any." if status == "any" else f"{name}: {asked}, {there}, {status}.")
    traits = [f"{name}: {word}" for name, word in pair["traits"].items()]
    texts = [topic, " ".join(parts), f"promotion: {pair['promotion']}", *traits][: len(steps)]
    return " ".join(f"{text} \\boxed{{{grade}}}" for text, grade in zip(texts, steps, strict=True))


def is_longtail(pair):
    """Rare in the demonstrations: a rare topic, a rare promotion word, or two business rules that
    apply to one pair.
    """
    if pair["topics"][0] in RARE_TOPICS or pair["promotion"] == RARE_PROMOTION:
        return True
    statuses = [status for _, _, status in pair["constraints"].values()]
    promotion = pair["promotion"] != "none"
    rules = ("contradicted" in statuses) + (statuses.count("silent") >= 2) + promotion
    return pair["topics"][2] != "other" and rules >= 2


def make_records(rng, num_steps, error):
    """All files' records; no (query, document) stands in two of them."""
    traits = list(TRAITS)[: max(0, num_steps - 3)]
    annotator = ANNOTATOR
    if error is not None:
        annotator = dict.fromkeys(ANNOTATOR, 1 - error) | {"topic": ANNOTATOR["topic"]}
    seen = set()
    files = {name: [] for name in SIZES}
    rare = dict.fromkeys(RARE_TOPICS, 0.5)

    def fresh(keep, weights):
        while True:
            pair = draw_pair(rng, weights, traits)
            if keep(pair) and (pair["query"], pair["document"]) not in seen:
                seen.add((pair["query"], pair["document"]))
                return pair

    for name in ("test_random", "test_longtail", "train"):
        keep = is_longtail if name == "test_longtail" else lambda pair: True
        for _ in range(SIZES[name]):
            pair = fresh(keep, {})
            steps = [str(g) for g in grades(pair)[:num_steps]]
            texts = {"query": pair["query"], "document": pair["document"]}
            files[name].append(texts | {"label": steps[-1], "step_labels": steps})
    for _ in range(SIZES["sft"]):
        # In the demonstrations the long tail is thinned out: kept one time in three.
        pair = fresh(lambda p: not is_longtail(p) or rng.random() < 1 / 3, rare)
        steps = grades(pair, lambda rule: rng.random() < annotator[rule], rng)[:num_steps]
        texts = {"query": pair["query"], "document": pair["document"]}
        files["sft"].append(texts | {"response": write_response(pair, steps)})
    for _ in range(SIZES["unlabelled"]):  # what distillation has in plenty
        pair = fresh(lambda pair: True, {})
        files["unlabelled"].append({"query": pair["query"], "document": pair["document"]})
    return files


def word_level(texts, special):
    """A word-level tokenizer over exactly the words of `texts`, behind the `special` tokens."""
    normalizer = normalizers.Lowercase()
    pattern = Regex(r"\\boxed\{|-?\d+|\w+|[^\w\s]")
    splitter = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    words = set()
    for text in texts:
        pieces = splitter.pre_tokenize_str(normalizer.normalize_str(text))
        words.update(word for word, _ in pieces)
    vocab = {word: i for i, word in enumerate(special + sorted(words))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.normalizer = normalizer
    backend.pre_tokenizer = splitter
    return backend


def make_tokenizer(texts):
    """The policy's tokenizer, with Qwen's chat markers as its special tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level(texts, special),
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_student_tokenizer(texts):
    """The student's tokenizer, which reads a pair as [CLS] query [SEP] document [SEP]."""
    backend = word_level(texts, ["[PAD]", "[CLS]", "[SEP]", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="<unk>",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_config(tokenizer):
    """A Qwen3 of about 0.6 M parameters."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.06,  # at this width, Qwen's 0.02 learns several times slower
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["Qwen3ForCausalLM"],
    )


def make_student_config(tokenizer):
    """A ModernBERT of about 0.12 M parameters, a fifth of the policy's.

    All of its layers see the whole pair.
    """
    return ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        global_attn_every_n_layers=1,
        max_position_embeddings=64,
        initializer_range=0.15,  # at this width, the usual 0.02 learns several times slower
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )


def answer_first(record):
    """The same record with the grade in a box of its own before the steps.

    A response's first grade is its last one: the annotator decides as before, and says the outcome
    first.
    """
    if "response" in record:
        last = record["response"].rindex("\\boxed{")
        return record | {"response": f"{record['response'][last:]} {record['response']}"}
    if "label" in record:
        return record | {"step_labels": [record["label"], *record["step_labels"]]}
    return record


def make(out, answer_format="reason-first", num_steps=3, error=None):
    """Write the whole task folder into `out` (a pathlib.Path).

    error: how often the annotator misses a business rule; None: as often as ANNOTATOR says.
    """
    out.mkdir(parents=True, exist_ok=True)
    criteria = write_criteria(num_steps, answer_format)
    (out / "criteria.md").write_text(criteria, encoding="utf-8")
    longest = 64 + 6 * max(0, num_steps - 3)
    for name, text in {"train.json": TRAIN, "distill.json": DISTILL}.items():
        (out / name).write_text(text % longest, encoding="utf-8")
    for name, records in make_records(random.Random(SEED), num_steps, error).items():
        if answer_format == "answer-first":
            records = map(answer_first, records)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    body = criteria.split("---\n", 2)[2]
    frame = (
        "found match silent contradicted any none same related other system user assistant query "
        "document note place season audience topic promotion : , . -1 0 1 2 3"
    )
    groups = [CATEGORIES, *CATEGORIES.values(), *CONSTRAINTS.values(), PROMOTION, FILLER]
    groups += [words for words, _ in list(TRAITS.values())[: max(0, num_steps - 3)]]
    words = " ".join(word for group in groups for word in group)
    tokenizer = make_tokenizer([body, frame, words])
    tokenizer.save_pretrained(out / "model")
    make_config(tokenizer).save_pretrained(out / "model")
    student_tokenizer = make_student_tokenizer([words])
    student_tokenizer.save_pretrained(out / "student")
    make_student_config(student_tokenizer).save_pretrained(out / "student")


def main():
    """Write a task folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = Path(__file__).parent
    formats = ["reason-first", "answer-first"]
    parser.add_argument("--out", type=Path, default=here, help="to write (default: this one)")
    parser.add_argument("--format", choices=formats, default=formats[0], help="of the answers")
    parser.add_argument(
        "--steps", type=int, choices=range(1, 9), default=3, help="business rules (default: 3)"
    )
    parser.add_argument(
        "--error",
        type=float,
        help="how often the annotator misses a rule (default: by rule, 0.7 to 0.85)",
    )
    args = parser.parse_args()
    if args.error is not None and not 0 <= args.error <= 1:
        parser.error("--error is a share, from 0 to 1")
    is_embedded = args.format == formats[0] and args.steps == 3 and args.error is None
    if args.out.resolve() == here.resolve() and not is_embedded:
        parser.error("--format, --steps and --error make another task: name its folder with --out")
    make(args.out, args.format, args.steps, args.error)


if __name__ == "__main__":
    main()
