"""Write the embedded task, bit for bit: criteria, demonstrations, labelled pairs, tiny models.

    python data/notes/make.py                         # rewrites the files beside this one
    python data/notes/make.py --format answer-first --out data/notes-answer-first  # grade first
    python data/notes/make.py --steps 8 --out data/notes-8    # five more rules, each its own step
    python data/notes/make.py --form initial-calibrated-final --out data/notes-icf  # three scores
    python data/notes/make.py --varied --out data/notes-varied  # every pair has its own criteria

The world: a query names a topic and up to three constraints; a note is about one topic, may give
values for constraints, may be promotion, and with `--steps` may have traits (`TRAITS`). `grades`
below is the whole business logic, the same that criteria.md tells the model in words. Queries and
notes are worded as people word them (`ASIDES`, `SENTENCES`, `FILLER`); a value is a word that
stands nowhere else, so a text says what its labels say.

Steps: one for each rule, or with `--form`, as published for SAM, three scores however many rules
there are: initial, by topic and constraints; calibrated, after the special cases (promotion and
traits); final, which here repeats the calibrated one. There most steps have the pair's label.

The demonstrations come from a *generic annotator*: it reads facts well and writes fluently, but
knows this business's rules only now and then (`ANNOTATOR`). A model fine-tuned on them reasons in
the right form and grades wrongly; what is left to learn, when a rule applies, is in the labels
alone. That is the gap that reinforcement learning has to close. The more rules there are, the more
often its errors cancel, and a right grade hides wrong steps; `--error` sets how often it errs.

The test sets have ten notes to a query, of at least three grades; what their queries ask for is
asked in no other file, in whatever words. LONGTAIL: topics, promotion words and combinations of
rules that are rare in the demonstrations (`is_longtail`).

`--varied`: each pair names its own criteria, with each rule on or off, and is labelled by them; in
criteria-101.md the second of `EFFECTS` is off. A third of them are in test_unseen.jsonl alone.
"""

import argparse
import itertools
import json
import random
import re
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ModernBertConfig, PreTrainedTokenizerFast

# Python puts only this script's own folder on the path, or that of a script that imports it.
sys.path.extend(map(str, Path(__file__).resolve().parents[1:3]))
from fresh import CHAT_TEMPLATE, make_config

SEED = 20260
SIZES = {"sft": 7500, "train": 4500, "test_random": 500, "test_longtail": 500, "unlabelled": 4000}
SIZES |= {"test_seen": 500, "test_unseen": 500}
NOTES_A_QUERY = 10  # in the test sets
FORMS = ["rule-by-rule", "initial-calibrated-final"]

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

# Of the fourth step and those behind it: the words that give a note the trait, and how far that
# moves the grade, between 0 and 3.
TRAITS = {
    "language": (["dutch", "finnish"], -1),
    "price": (["cheap", "bargain"], 1),
    "freshness": (["outdated", "old"], -1),
    "length": (["detailed", "thorough"], 1),
    "safety": (["unsafe", "scam"], -3),
}

# How notes and queries say it. An aside stands behind the topic, in its sentence.
ASIDES = {"place": "in {}|around {}", "season": "in {}|this {}", "audience": "for {}|with {}"}
QUERIES = "{}|{}|best {}|{} tips"
SENTENCES = {
    "topic": "A whole day of {}.|All about {}.|I dream of {}.|My notes on {}.|{}, finally!",
    "place": "Greetings from {}!|Just back from {}.|We were in {}.|{} is the place for it.",
    "season": "It was {}.|Wait for {}!|We do it every {}.|{} is the time for it.",
    "audience": "I went with {}.|Made for {}, I think.|Perfect for {}.|{} will love it.",
    "promotion": "A {} note, to be clear.|Marked as {}.|My first {} post!|This is a {} post.",
    "language": "All of it in {}.|I wrote it in {}.|Only in {} this time.|The text is in {}.",
    "price": "All at a {} price.|My {} buy of the week.|We got a {} deal.|{} prices all over.",
    "freshness": "A {} post, sorry.|Some of it is {}.|The photos are {}.|This is {} by now.",
    "length": "A {} report.|Here is the {} version.|I kept it {}.|Read my {} diary.",
    "safety": "I can only say: {}!|My verdict: {}.|One word: {}.|{}, if you ask me.",
}
FILLER = (
    "Ask me anything below.|I forgot my umbrella.|I still talk about it.|I took too many photos."
    "|I was nervous at first.|I would do it again.|It rained all afternoon.|It took me three tries."
    "|More of this soon.|My diary is full of it.|My sister told me to go.|Nobody had warned me."
    "|Our friends joined us later.|Part two follows next week.|Save this for later.|So much fun!"
    "|Thank you for reading.|The music was a bit loud.|The queue was long.|This made my week."
    "|We came home late and happy.|We got lost on the way.|We laughed a lot.|What do you think?"
)

# How often the generic annotator applies each rule. Facts (same, silent, ...) it states correctly.
ANNOTATOR = {"topic": 0.95, "silent": 0.30, "contradicted": 0.25, "promotion": 0.15}
ANNOTATOR |= dict.fromkeys(TRAITS, 0.25)

RULES = {
    "topic": "Topic: the same topic gets 3, a related topic of the same category gets 1, any other "
    "topic gets -1.",
    "constraints": "Constraints: a query can ask for a place, a season and an audience. Every "
    "constraint that the note is silent about costs\none grade, but never below 0. A contradicted "
    "constraint caps the grade at 0. A grade of -1 stays.",
    "promotion": "Promotion: a note that is sponsored, gifted or affiliate is capped at 1.",
    "language": "Language: a note in dutch or finnish costs one grade, but never below 0.",
    "price": "Price: a note about something cheap or a bargain gains one grade, but never above 3.",
    "freshness": "Freshness: a note that is outdated or old costs one grade, but never below 0.",
    "length": "Length: a note that is detailed or thorough gains one grade, but never above 3.",
    "safety": "Safety: a note about something unsafe or a scam is capped at 0.",
}
# What each rule does, in the words above, and what criteria say in which it is off.
EFFECTS = {
    "silent": "costs\none grade, but never below 0",
    "contradicted": "caps the grade at 0",
    "promotion": "is capped at 1",
    "language": "costs one grade, but never below 0",
    "price": "gains one grade, but never above 3",
    "freshness": "costs one grade, but never below 0",
    "length": "gains one grade, but never above 3",
    "safety": "is capped at 0",
}
NO_EFFECT = "leaves the grade as it is"
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]

TRAIN = {"eval_every": 40, "sft_steps": 1400, "sft_batch": 16, "sft_lr": 1.5e-3}
TRAIN |= {"rl_steps": 120, "prompts_per_step": 16, "group_size": 8, "lr": 2e-4}
DISTILL = {"pairs": "train.jsonl,sft.jsonl,unlabelled.jsonl", "samples": 1}
DISTILL |= {"steps": 6500, "batch": 32, "lr": 1.4e-3}
# The policy: a Qwen3 of about 0.6 M parameters.
SHAPE = {"num_hidden_layers": 3, "intermediate_size": 384, "max_position_embeddings": 512}


def combinations(num_steps):
    """All combinations of rules, pairs: the name of their criteria's file, and the rules on."""
    for bits in itertools.product("01", repeat=num_steps):
        on = [rule for rule, bit in zip(EFFECTS, bits, strict=False) if bit == "1"]
        yield f"criteria-{''.join(bits)}.md", {"topic", *on}


def write_criteria(num_steps, answer_format, form, on=EFFECTS):
    """The text of criteria.md, front matter and body. on: the rules that are."""
    steps = list(RULES)[:num_steps]
    texts = dict(RULES)
    for rule in EFFECTS.keys() - set(on):
        step = rule if rule in RULES else "constraints"
        texts[step] = texts[step].replace(EFFECTS[rule], NO_EFFECT)
    rules = [texts[step] for step in steps]
    if form != FORMS[0]:
        steps = form.split("-")
        initial = "Initial: the grade by topic and constraints, without the special cases."
        calibrated = "Calibrated: the grade after the special cases."
        rules = [initial, *rules[:2], calibrated, *rules[2:], "Final: the grade that stands."]
    in_steps = f"{NUMBERS[len(steps) - 1]} step{'s' if len(steps) > 1 else ''}"
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
    body = [f"You grade how well a note answers a query. {task}", *rules]
    return "\n".join(["---", *front, "---", *body, last, ""])


def draw_query(rng, rare_weight):
    """What a query asks for, by name, and its text."""
    topics = [t for group in CATEGORIES.values() for t in group]
    weights = [rare_weight if t in RARE_TOPICS else 1.0 for t in topics]
    asked = {"topic": rng.choices(topics, weights)[0]}
    asked |= {name: rng.choice(x) for name, x in CONSTRAINTS.items() if rng.random() < 0.6}
    topic, *words = asked.values()
    if rng.random() < 0.5:
        words = [say(rng, ASIDES[name], asked[name]) for name in asked if name != "topic"]
        rng.shuffle(words)
        return asked, " ".join([say(rng, QUERIES, topic), *words])
    words.insert(0, topic)
    rng.shuffle(words)
    return asked, " ".join(words)


def draw_pair(rng, query, traits):
    """A query of `draw_query` and one note: facts (topics, statuses of the constraints, promotion
    word, words of the traits) and texts.
    """
    asked, text = query
    topic, category = asked["topic"], category_of(asked["topic"])
    siblings = [t for t in CATEGORIES[category] if t != topic]
    others = [t for name, group in CATEGORIES.items() if name != category for t in group]
    relation = rng.choices(["same", "related", "other"], [0.46, 0.27, 0.27])[0]
    candidates = {"same": topic, "related": rng.choice(siblings), "other": rng.choice(others)}
    told = {"topic": candidates[relation]}

    facts = {}
    for name, values in CONSTRAINTS.items():
        want, have, status = asked.get(name, "any"), "none", "any"
        if want == "any":
            have = rng.choice(values) if rng.random() < 0.3 else "none"
        else:
            status = rng.choices(["match", "silent", "contradicted"], [0.45, 0.30, 0.25])[0]
        if status == "match":
            have = want
        elif status == "contradicted":
            have = rng.choice([v for v in values if v != want])
        facts[name] = (want, have, status)
        told[name] = have
    promotion = rng.choices(PROMOTION, [0.45, 0.45, 0.10])[0] if rng.random() < 0.45 else "none"
    words = {t: rng.choice(TRAITS[t][0]) if rng.random() < 0.35 else "none" for t in traits}
    told |= {"promotion": promotion} | words
    return {
        "query": query,
        "texts": {"query": text, "document": write_note(rng, told)},
        "topics": (topic, told["topic"], relation),
        "constraints": facts,
        "promotion": promotion,
        "traits": words,
    }


def say(rng, phrasings, value):
    """A value in one of its phrasings."""
    return rng.choice(phrasings.split("|")).format(value)


def write_note(rng, told):
    """A note as a person writes it. told: its topic and other values by name, or "none"."""
    asides, sentences = [], rng.sample(FILLER.split("|"), rng.randint(0, 2))
    for name, value in told.items():
        value = value.title() if name in ("place", "language") else value
        if name == "topic" or value in ("none", "None"):
            continue
        if name in ASIDES and rng.random() < 0.5:
            asides.append(say(rng, ASIDES[name], value))
        else:
            sentences.append(say(rng, SENTENCES[name], value))
    rng.shuffle(asides)
    sentences.append(say(rng, SENTENCES["topic"], " ".join([told["topic"], *asides])))
    rng.shuffle(sentences)
    text = " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


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


def boxes(steps, form):
    """What the boxes hold, of the grades after each rule."""
    return steps if form == FORMS[0] else [steps[1], steps[-1], steps[-1]]


def write_response(pair, steps, form):
    """The reasoning in words: facts in the order of the rules, each step closed by its grade.

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
    if form != FORMS[0]:
        texts = [f"{texts[0]}. {texts[1]}", f"{'. '.join(texts[2:])}.", "final"]
    ends = zip(texts, boxes(steps, form), strict=True)
    return " ".join(f"{text} \\boxed{{{grade}}}" for text, grade in ends)


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


def make_records(rng, num_steps, error, form, varied):
    """All files' records; no (query, document) stands in two of them."""
    traits = list(TRAITS)[: max(0, num_steps - 3)]
    annotator = ANNOTATOR
    if error is not None:
        annotator = dict.fromkeys(ANNOTATOR, 1 - error) | {"topic": ANNOTATOR["topic"]}
    seen, tested = set(), []
    anything = lambda pair: True
    tests = {"test_random": anything, "test_longtail": is_longtail}
    trained = unseen = [(None, {"topic", *EFFECTS})]
    if varied:
        tests = dict.fromkeys(("test_seen", "test_unseen"), anything)
        trained = list(combinations(num_steps))
        unseen = trained[2::3]
        del trained[2::3]
    draws = random.Random(SEED)  # of combinations
    files = {"sft": [], "train": []} | {name: [] for name in tests}

    def fresh(keep=anything, rare_weight=1.0, like=None, rules=trained):
        """A pair to keep, of the query of the pair `like`, else of one that no test set asks."""
        while True:
            query = like["query"] if like else draw_query(rng, rare_weight)
            pair = draw_pair(rng, query, traits)
            texts = tuple(pair["texts"].values())
            if (like or query[0] not in tested) and texts not in seen and keep(pair):
                seen.add(texts)
                pair["rules"] = name, _ = like["rules"] if like else draws.choice(rules)
                if varied:
                    pair["texts"]["criteria"] = name
                return pair

    def labelled(pair):
        _, on = pair["rules"]
        steps = [str(g) for g in boxes(grades(pair, lambda rule: rule in on)[:num_steps], form)]
        return pair["texts"] | {"label": steps[-1], "step_labels": steps}

    for name, keep in tests.items():
        for query_id in range(SIZES[name] // NOTES_A_QUERY):
            labels = ()
            while len(set(labels)) < 3:
                first = fresh(keep, rules=unseen if name == "test_unseen" else trained)
                pairs = [first, *(fresh(keep, like=first) for _ in range(NOTES_A_QUERY - 1))]
                records = [labelled(pair) | {"query_id": query_id} for pair in pairs]
                labels = [record["label"] for record in records]
            files[name] += records
            tested.append(first["query"][0])
    files["train"] = [labelled(fresh()) for _ in range(SIZES["train"])]
    for _ in range(SIZES["sft"]):
        # In the demonstrations the long tail is thinned out: kept one time in three.
        pair = fresh(lambda p: not is_longtail(p) or rng.random() < 1 / 3, rare_weight=0.5)
        _, on = pair["rules"]
        knows = lambda rule, on=on: rule in on and rng.random() < annotator[rule]
        steps = grades(pair, knows, rng)[:num_steps]
        files["sft"].append(pair["texts"] | {"response": write_response(pair, steps, form)})
    # What distillation has in plenty.
    files["unlabelled"] = [fresh()["texts"] for _ in range(SIZES["unlabelled"])]
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
        model_max_length=96,
        model_input_names=["input_ids", "attention_mask"],
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
        max_position_embeddings=96,
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


def make(out, answer_format="reason-first", num_steps=3, error=None, form=FORMS[0], varied=False):
    """Write the whole task folder into `out` (a pathlib.Path).

    error: how often the annotator misses a business rule; None: as often as ANNOTATOR says.
    """
    out.mkdir(parents=True, exist_ok=True)
    criteria = write_criteria(num_steps, answer_format, form)
    (out / "criteria.md").write_text(criteria, encoding="utf-8")
    for name, on in combinations(num_steps) if varied else ():
        text = write_criteria(num_steps, answer_format, form, on)
        (out / name).write_text(text, encoding="utf-8")
    longest = {"max_new_tokens": 64 + 6 * max(0, num_steps - 3)}
    for name, settings in {"train": TRAIN, "distill": DISTILL}.items():
        text = json.dumps(longest | settings, indent=2) + "\n"
        (out / f"{name}.json").write_text(text, encoding="utf-8")
    pairs, responses = [], []
    files = make_records(random.Random(SEED), num_steps, error, form, varied)
    for name, records in files.items():
        pairs += [f"{record['query']} {record['document']}" for record in records]
        responses += [record.get("response", "") for record in records]
        if answer_format == "answer-first":
            records = map(answer_first, records)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    frame = [criteria.split("---\n", 2)[2], "system user assistant query document -1 0 1 2 3"]
    frame += [NO_EFFECT] * varied
    tokenizer = make_tokenizer([*frame, *pairs, *responses])
    tokenizer.save_pretrained(out / "model")
    make_config(tokenizer, **SHAPE).save_pretrained(out / "model")
    student_tokenizer = make_student_tokenizer(pairs)
    student_tokenizer.save_pretrained(out / "student")
    make_student_config(student_tokenizer).save_pretrained(out / "student")


def main():
    """Write a task folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = Path(__file__).parent
    formats = ["reason-first", "answer-first"]
    parser.add_argument("--out", type=Path, default=here, help="to write (default: this one)")
    parser.add_argument("--format", choices=formats, default=formats[0], help="of the answers")
    steps = {"type": int, "choices": range(1, 9), "default": 3}
    parser.add_argument("--steps", **steps, help="business rules (default: 3)")
    often = "how often the annotator misses a rule (default: by rule, 0.7 to 0.85)"
    parser.add_argument("--error", type=float, help=often)
    parser.add_argument("--form", choices=FORMS, default=FORMS[0], help="of the steps")
    parser.add_argument("--varied", action="store_true", help="each rule on or off, by pair")
    args = parser.parse_args()
    if args.error is not None and not 0 <= args.error <= 1:
        parser.error("--error is a share, from 0 to 1")
    if (args.varied or args.form != FORMS[0]) and args.steps < 3:
        parser.error("special cases, for --form and --varied, need three or more --steps")
    options = args.format, args.steps, args.error, args.form, args.varied
    if args.out.resolve() == here.resolve() and options != (formats[0], 3, None, FORMS[0], False):
        parser.error("other options make another task: name its folder with --out")
    make(args.out, *options)


if __name__ == "__main__":
    main()
