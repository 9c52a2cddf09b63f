"""Fixtures that several files share: the embedded task, and tiny random models of every supported architecture."""

import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import rollout

torch.set_num_threads(1)  # the models here are so small that more threads only wait for each other

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT / "data" / "notes"

# The smallest shapes that still have grouped key-value heads; anything special to an architecture stays at its default.
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # so that attention matters: with tiny weights a wrong mask would pass unseen
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
ARCHITECTURES = ["qwen3", "qwen2", "llama", "mistral", "olmo2", "phi3", "gemma", "smollm3"]


def make_model(architecture, tree=True, **changes):
    """A fresh random model of an architecture; the same weights each time, with or without tree attention."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    return rollout.use_tree_attention(model) if tree else model


@pytest.fixture(scope="session")
def notes():
    """The folder of the embedded task."""
    return NOTES


@pytest.fixture(autouse=True)
def handlers():
    """A script that a test runs in this process must not leave its signal handlers to the next test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
