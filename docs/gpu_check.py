"""On one GPU: `python docs/gpu_check.py` runs what tests on a CPU cannot show, in minutes.

tests/gpu; greedy answers against model.generate, sampler against trainer, and gradients against
float32 on the CPU (in bfloat16, since CUDA's flash kernels have no float32); the benchmark for a
0.6 B and an 8 B model of random weights, with and without docs/triton_decode.py; the default task
from start to end. Prints one table.

    python docs/gpu_check.py                                     everything, on one GPU
    python docs/gpu_check.py --only numbers --model FOLDER       a real model, also on a CPU
    python docs/gpu_check.py --tiny                              whether it runs, on a CPU
"""

import argparse
import copy
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench

import grm
from rollout import Policy, Tree, sample, use_tree_attention

ROOT = Path(__file__).resolve().parent.parent
# Qwen3's shapes.
SHAPES = {
    "0.6 B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "8 B": {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
COMMON = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 8192,
}
# Enough work to fill a GPU, and peers as large as its memory holds.
SAMPLING = "--only sampling --sampling 64 8 64 128 --peer_tokens 131072 --repeats 1"
BENCHES = {
    "0.6 B": [
        f"{SAMPLING} --prefixes 512 2048",
        f"{SAMPLING} --prefixes 512 2048 --triton",
        "--only training --training 8 8 128 256 --peer_tokens 16384 --repeats 1 --prefixes 512",
    ],
    "8 B": [f"{SAMPLING} --prefixes 512"],
}
TINY = {  # of all the above, with `--tiny`
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 16,
    "vocab_size": 300,
}
TINY_BENCHES = [
    "--only sampling --sampling 2 2 8 4 --peer_tokens 512 --repeats 1 --prefixes 64",
    "--only training --training 1 2 8 8 --peer_tokens 512 --repeats 1 --prefixes 64",
]


def run(name, command):
    """Run a command with its output shown; returns (output, seconds). Raises if it fails."""
    print(f"\n== {name}: {' '.join(map(str, command))}", flush=True)
    start = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([*map(str, command)], cwd=ROOT, **pipes) as process:
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}")
    return "".join(lines), time.perf_counter() - start


def check_tests(args):
    """pytest tests/gpu."""
    output, seconds = run("tests", [sys.executable, "-m", "pytest", "tests/gpu", "-v"])
    counts = re.findall(r"(\d+) (passed|failed|skipped)", output)
    return [("pytest tests/gpu", ", ".join(" ".join(c) for c in counts) + f"; {seconds:.0f} s")]


# Numbers ------------------------------------------------------------------------------------------


def model_and_prompts(args):
    """A float32 model on the CPU, prompts of token ids, and the id that ends an answer."""
    if args.model is None:
        torch.manual_seed(0)
        shape = COMMON | SHAPES["0.6 B"] | {"num_hidden_layers": 4}
        config = AutoConfig.for_model("qwen3", **shape)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        return model, bench.draw_prompts(config.vocab_size, args.prompts, 300, 20), 2
    model, tokenizer = grm.load_model(args.model)
    task = grm.Task.load(ROOT / "data" / "notes")
    context = model.config.max_position_embeddings
    renderer = grm.Renderer(task, tokenizer, context, args.answer)
    path = ROOT / "data" / "notes" / "test_random.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()[: args.prompts]]
    return model, renderer.prompts(records), renderer.eos_id


def generated(model, prompts, eos_id, tokens):
    """Greedy answers of model.generate, prompt by prompt."""
    model.set_attn_implementation("sdpa")
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        settings = {"do_sample": False, "eos_token_id": eos_id, "pad_token_id": eos_id}
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **settings)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def gradients(model, tree, autocast):
    """Gradients of the sum of log-probabilities, by name, float32 on the CPU."""
    model.zero_grad()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
        logprobs_A, _ = Policy(model)(tree)
    logprobs_A.mean().backward()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters()}


def check_numbers(args):
    """Greedy equality, sampler against trainer, gradients: in bfloat16, and on a CPU in float32."""
    cpu_model, prompts, eos_id = model_and_prompts(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    float_model = copy.deepcopy(cpu_model).to(device)
    half_model = copy.deepcopy(float_model).to(torch.bfloat16)
    rows = []
    models = {"float32": float_model, "bfloat16": half_model}
    if device.type == "cuda":
        del models["float32"]
    for name, model in models.items():
        expected = generated(model, prompts, eos_id, args.answer)
        use_tree_attention(model)
        settings = {"max_new_tokens": args.answer, "eos_id": eos_id}
        greedy = [answer for (answer,) in sample(model, prompts, temperature=0, **settings).answers]
        equal = sum(a == b for a, b in zip(greedy, expected, strict=True))
        rows.append((f"greedy answers equal to generate's, {name}", f"{equal} of {len(prompts)}"))
        sampled = sample(model, prompts, group_size=2, **settings)
        tree = Tree(prompts, sampled.answers, device)
        use_tree_attention(float_model)
        autocast = name == "bfloat16"
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            scored_A, _ = Policy(float_model)(tree)
        apart_A = (scored_A - sampled.logprobs_A).abs()
        figure = f"largest {apart_A.max():.1e}, mean {apart_A.mean():.1e}"
        rows.append((f"log-probabilities, sampler - trainer, {name}", figure))
    use_tree_attention(cpu_model)
    few = [group[:1] for group in sampled.answers[:2]]
    truth = gradients(cpu_model, Tree(prompts[:2], few), False)
    for name in models:
        found = gradients(float_model, Tree(prompts[:2], few, device), name == "bfloat16")
        squares = sum(float((found[key] - truth[key]).square().sum()) for key in truth)
        norm = sum(float(truth[key].square().sum()) for key in truth) ** 0.5
        figure = f"{squares**0.5 / norm:.1e} of its norm"
        rows.append((f"gradient, {name} on {device.type} - float32 on CPU", figure))
    return rows


# Speed, and a whole run ---------------------------------------------------------------------------


def check_bench(args):
    """The benchmark's figures of tree, peer and decoding, for each shape and prefix."""
    rows = []
    for name, shape in SHAPES.items():
        lines = []
        with tempfile.TemporaryDirectory() as folder:
            AutoConfig.for_model("qwen3", **COMMON | shape).save_pretrained(folder)
            command = [sys.executable, "rollout.py", "--bench", "--model", folder]
            for flags in BENCHES[name]:
                output, _ = run(f"bench {name}", [*command, *flags.split()])
                lines += output.splitlines()
        for line in lines:
            if line.startswith(("sampling", "training", "flatness")) or "GB/s" in line:
                title, _, figures = line.partition("  ")
                rows.append((f"{name}: {title}", " ".join(figures.split())))
    return rows


def check_task(args):
    """The default task, and its accuracy at the end."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        steps = ["--sft_steps", 2, "--rl_steps", 1] if args.tiny else []
        _, seconds = run("task", [sys.executable, "train.py", "--out", out, *steps])
        scores = json.loads((out / "summary.json").read_text())["rl"]
    accuracies = [f"{test} {values['accuracy']:.3f}" for test, values in scores.items()]
    return [("python train.py", f"{seconds:.0f} s; accuracy {', '.join(accuracies)}")]


def main():
    """Run the checks, and print their table."""
    checks = {
        "tests": check_tests,
        "numbers": check_numbers,
        "bench": check_bench,
        "task": check_task,
    }
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=checks, default=[*checks], help="checks")
    parser.add_argument("--model", help="folder of a model for `numbers` (None: random weights)")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of `numbers`")
    parser.add_argument("--answer", type=int, default=32, help="tokens of their answers")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    args = parser.parse_args()
    if args.tiny:
        SHAPES.update(dict.fromkeys(SHAPES, TINY))
        BENCHES.update(dict.fromkeys(BENCHES, TINY_BENCHES))
    elif not torch.cuda.is_available() and args.only != ["numbers"]:
        sys.exit("no CUDA GPU here; `--only numbers` and `--tiny` run on a CPU, too")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows = []
    for check in args.only:
        try:
            rows += checks[check](args)
        except Exception as error:  # the other checks are worth their time all the same
            rows.append((check, f"FAILED: {type(error).__name__}: {error}"))
    print(f"\n| {name}, torch {torch.__version__} | |\n|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.exit(any("FAILED" in figure for _, figure in rows))


if __name__ == "__main__":
    main()
