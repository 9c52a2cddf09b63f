"""Which models rollout.py computes as they compute themselves: `python rollout.py --check MODEL`.

Without MODEL: the table of docs/models.md, of every family in transformers that generates text,
each built tiny from its default configuration, a minute and a half on a CPU core.
"""

import argparse
import re
import signal
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers import logging as hf_logging
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grm
import rollout

# A whole number in a configuration becomes at most that; the first name that fits counts.
SIZES = {
    "position": 2**17,
    "vocab": 300,
    "dense_(replace|layers)|topk_group": 1,
    "per_tok|moe_topk": 2,
    "(value|kv|key)_heads|groups?$": 2,
    "heads$|n_head$": 4,
    "experts$": 8,
    "mamba_d_head|mamba_d_ssm|qk_head_dim": 32,
    "head_dim|head_size|d_head|channels$|rotary_dim|rank$|state": 16,
    "hidden_size|intermediate|d_model|emb|width|ffn|dim$": 64,
    "token_i(d|ndex)$": 3,
}
OPEN = {"num_key_value_heads": 2, "head_dim": 16}  # what it may leave open
OPEN |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}


def shrink(old):
    """Settings of a tiny model, with two layers of each kind that the old ones have."""
    layers = "(num_hidden_|num_|n_|decoder_|encoder_)layers?"
    depth = next((v for k, v in old.items() if re.fullmatch(layers, k) and v), 1)
    lists = {k: v for k, v in old.items() if isinstance(v, list | tuple) and len(v) == depth}
    listed = {k for k, v in lists.items() if depth < 3 or v != sorted(set(v))}  # no layer numbers
    kinds = [tuple(old[name][i] for name in listed) for i in range(depth)]
    kept = [i for i in range(depth) if kinds[i] not in kinds[:i]] * 2
    sizes = {"kv_shared_layers": len(kept) // 2, **SIZES}
    if "kv_lora_rank" in old:  # heads that share a compressed key are in no groups
        sizes = {"value_heads": SIZES["heads$|n_head$"], **sizes}
    new = {}
    for name, value in old.items():
        if name == "per_layer_config" and value:
            value = {int(i): shrink(changes) for i, changes in value.items()}
            value = {at: value[i] for at, i in enumerate(kept) if i in value}
        elif isinstance(value, dict) and name.endswith("_config"):
            value = shrink(value)
        elif name in listed:
            value = [value[i] for i in kept]
        elif re.fullmatch(layers, name) and value:
            value = len(kept)
        elif type(value) is int:
            most = (size for pattern, size in sizes.items() if re.search(pattern, name))
            value = min(value, next(most, value))
        new[name] = OPEN.get(name) if value is None else value
    return new


def build(kind, settings):
    """Two models in eval mode that have run once: as they are initialised, and with large random
    weights, as a trained model's: small ones hide what differs.
    """
    models = []
    for large in (False, True):
        torch.manual_seed(0)
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        model = AutoModelForCausalLM.from_config(kind.from_dict(settings), **options).eval()
        with torch.no_grad():
            for weight in model.parameters() if large else ():
                noise = torch.randn_like(weight)
                weight.copy_(0.3 * noise if weight.ndim > 1 else weight + 0.2 * noise)
            model(input_ids=torch.arange(8)[None], use_cache=False)
        models.append(model)
    return models


def load(source):
    """The model of a folder or hub name; of a configuration alone, tiny ones of its kind."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if not grm.has_weights(source):
        return build(type(config), shrink(config.to_dict()))
    options = {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
    return [AutoModelForCausalLM.from_pretrained(source, config=config, **options).eval()]


def verdict(models, max_position=None):
    """(whether they agree, the largest difference and up to which length, or why not)."""
    config = models[0].config.get_text_config()
    length = max_position or getattr(config, "max_position_embeddings", None) or 1
    up_to = ""
    while True:
        try:
            largest = max(rollout.check_model(model, length) for model in models)
        except rollout.UnsupportedModelError as error:
            shorter = re.search(r"behind (\d+) tokens", str(error))
            if shorter is None or max_position:
                return False, str(error)
            length = int(shorter[1])
            up_to = f", up to {length} tokens"
        else:
            return True, f"{largest:.1e}{up_to}"


def variants(settings):
    """(name, settings): as they are; with all layers of one kind; a switch or factor turned on."""
    yield "", settings
    for name, value in settings.items():
        if name == "layer_types":
            for kind in ALLOWED_LAYER_TYPES:
                kinds = [kind] * settings["num_hidden_layers"]
                yield f" with {kind} layers", settings | {name: kinds}
        elif value is False and not re.match("is_|output_|return_", name):
            yield f" with {name}", settings | {name: True}
        elif value == 1 and re.search("multiplier|scal", name):
            yield f" with {name}", settings | {name: 8.0}


def check_family(name):
    """{variant: verdict}, and the first error of a variant that could not be built."""
    verdicts, problem = {}, None
    try:
        kind = CONFIG_MAPPING[name]
        for variant, settings in variants(shrink(kind().to_dict())):
            try:
                verdicts[variant] = verdict(build(kind, settings))
            except Exception as error:
                problem = problem or error
    except Exception as error:
        problem = error
    return verdicts, problem


def table():
    """Print the table, in Markdown: a row for each verdict; a variant only where it differs."""
    rows = defaultdict(list)
    largest = 0
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        signal.alarm(60)
        verdicts, problem = check_family(name)
        signal.alarm(0)
        for variant, (agrees, what) in verdicts.items():
            figures = [*map(float, re.findall(r"\d\.\de[+-]\d+", what))]
            if agrees:
                largest = max(largest, figures[0])
                length = re.search(r"up to (\d+)", what)
                title, note = "agree", f" ({length[1]})" if length else ""
            elif figures:
                title, note = "refused: the logits are others", f" ({max(figures[:2]):.0e})"
            else:
                title, note = f"refused: {what.partition(': ')[2]}", ""
            if not variant or agrees is not verdicts.get("", [None])[0]:
                rows[title].append(name + variant + note)
        if not verdicts:
            rows["cannot be built"].append(f"{name} ({str(problem).splitlines()[-1].strip()})")
    print(f"| verdict | families: {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} |\n|---|---|")
    for title in sorted(rows):
        print(f"| {title} | {len(rows[title])}: {', '.join(rows[title])} |")
    print(f"\nThe largest difference of those that agree: {largest:.1e}.")


def give_up(*_):
    """A family that hangs shall not hold up the others."""
    raise TimeoutError("it takes more than a minute")


def main():
    """Check models by running them, with and without the tree."""
    parser = argparse.ArgumentParser(prog="rollout.py", description=main.__doc__)
    add = parser.add_argument
    add("--check", nargs="*", required=True, metavar="MODEL", help="folders or hub names")
    add("--max_position", type=int, help="of the longest sequence (default: as far as it agrees)")
    args = parser.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, give_up)
    if not args.check:
        table()
    failed = False
    for source in args.check:
        try:
            agrees, what = verdict(load(source), args.max_position)
            word = "agrees" if agrees else "refused"
        except Exception as error:  # whatever a broken or foreign file makes the libraries raise
            agrees, word, what = False, "cannot be loaded", " ".join(str(error).split())[:300]
        print(f"{source}: {word}: {what}")
        failed |= not agrees
    sys.exit(failed)


if __name__ == "__main__":
    main()
