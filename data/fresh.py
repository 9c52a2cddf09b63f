"""A model that starts from nothing, fitted to a task's text, for from_csv.py and chorus.py.

Tokenizer, configuration, train.py's settings; and demonstrations, where a task has none: such a
model has to learn from them to answer at all, before labels can teach it anything.
"""

import json

import overlap
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

import grm

VOCABULARY = 4096
CONTEXT = 1024
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SETTINGS = {  # about one epoch of SFT on 2,500 pairs: more steps learn the queries by heart
    "eval_every": 10,
    "sft_steps": 80,
    "sft_batch": 32,
    "sft_lr": 1.5e-3,
    "rl_steps": 30,
    "prompts_per_step": 32,
    "group_size": 8,
    "lr": 5e-5,
}


def demonstrate(task, train):
    """The records with a `response` in two steps, by rule: how many of the query's words the
    document has, with the label that word overlap would give; then the record's own label.
    """
    guesses = overlap.label_by_words(task.labels, train, train)
    demonstrations = []
    for record, guess in zip(train, guesses, strict=True):
        has, lacks = overlap.compare(record)
        share = "all" if not lacks else "some" if has else "none"
        match = f"match: has {share} of the words \\boxed{{{guess['label']}}}"
        response = f"{match} verdict: \\boxed{{{record['label']}}}"
        demonstrations.append(record | {"response": response})
    return demonstrations


def make_tokenizer(task, demonstrations):
    """A byte-level BPE tokenizer, trained on a task's prompts and answers, with Qwen's chat markers
    as special tokens: no text is unknown to it.

    Lower case on top of Qwen's NFC: a model that starts from nothing would have to learn that "USB
    Hub" is "usb hub".
    """
    # Every prompt holds the criteria, so their words are frequent words.
    texts = [
        f"system\n{task.criteria}\nuser\nQuery: {r['query']}\nDocument: {r['document']}\n"
        f"assistant\n{r['response']}"
        for r in demonstrations
    ]
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


def make_config(tokenizer, **shape):
    """A Qwen3 of 0.9 M parameters, 0.5 M of them embeddings; shape: what is to be otherwise."""
    settings = {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.06,  # at this width, Qwen's 0.02 learns several times slower
        "tie_word_embeddings": True,
    }
    return Qwen3Config(
        vocab_size=len(tokenizer),
        architectures=["Qwen3ForCausalLM"],
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(settings | shape),
    )


def fit_settings(task, tokenizer, demonstrations):
    """Settings of train.py, with answers that may be a little longer than the demonstrations."""
    renderer = grm.Renderer(task, tokenizer)
    longest = max(len(renderer.encode_response(r["response"])) for r in demonstrations)
    return {"max_new_tokens": max(16, longest + 8), **SETTINGS}


def write(folder, tokenizer, settings, **shape):
    """Write a task's model/, without weights, and its train.json; shape: as for make_config."""
    tokenizer.save_pretrained(folder / "model")
    make_config(tokenizer, **shape).save_pretrained(folder / "model")
    write_settings(folder, settings)


def write_settings(folder, settings):
    """Write a task's train.json."""
    (folder / "train.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
