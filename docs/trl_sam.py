"""Stepwise credit inside TRL's GRPOTrainer: each token gets the advantage that its step earned.

    pip install trl
    python docs/trl_sam.py --model runs/notes/sft --out runs/trl      # 20 steps, a few minutes

TRL's loss takes advantages [B, T] from a subclass as well as its own [B]; StepwiseCredit stands in
front of GRPOTrainer and makes them. docs/recipes.md says what to copy, and for which losses.
Shapes: B completions, T positions of the padded batch, A tokens without padding, K steps.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grm
import sam


class StepwiseCredit:
    """For class Trainer(StepwiseCredit, GRPOTrainer). renderer, a grm.Renderer, finds the steps;
    rule and step_targets as in train.py; the dataset has the columns label and step_labels.
    """

    def __init__(self, *args, renderer, rule="symmetric", step_targets="change", **kwargs):
        super().__init__(*args, **kwargs)
        self.renderer = renderer
        self.rule = rule
        self.step_targets = step_targets
        if rule == "sam" and self.loss_type != "dapo":  # which divides by the number of tokens
            raise ValueError(f"rule sam needs loss_type='dapo', not {self.loss_type!r}")

    def judge_steps(self, ids, example):
        """Behind which token each of K steps ends, and which are right; zeros if malformed."""
        task = self.renderer.task
        K = len(task.boxes)
        trace = self.renderer.parse(ids)
        right = grm.right_steps(trace, example, task, self.rule, self.step_targets)
        return [step.end for step in trace.steps] or [0] * K, right or [False] * K

    def _generate_and_score_completions(self, inputs):
        """TRL's batch, with credit [B, T] in the place of its advantages [B]."""
        batch = super()._generate_and_score_completions(inputs)
        mask_BT = batch["completion_mask"].bool()
        lengths_B = mask_BT.sum(1)
        answers = batch["completion_ids"][mask_BT].split(lengths_B.tolist())
        judged = [self.judge_steps(a.tolist(), x) for a, x in zip(answers, inputs, strict=True)]
        ends_BK = lengths_B.new_tensor([ends for ends, _ in judged])
        right_BK = mask_BT.new_tensor([right for _, right in judged])
        advantages_B = batch["advantages"]
        credit_A = sam.stepwise_credit(advantages_B, ends_BK, right_BK, lengths_B, self.rule)
        if self.rule == "sam":
            num_tokens = batch["num_items_in_batch"]  # like the answers, of all processes
            num_answers = len(inputs) * self.accelerator.num_processes
            credit_A = sam.mean_over_answers(credit_A, lengths_B, num_tokens, num_answers)
        batch["advantages"] = credit_A.new_zeros(mask_BT.shape)
        batch["advantages"][mask_BT] = credit_A
        return batch


def main():
    """Twenty steps of RL on a task's training pairs."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder that train.py wrote")
    parser.add_argument("--task", default="data/notes", help="folder with train.jsonl")
    parser.add_argument("--out", required=True, help="folder for the trained model")
    parser.add_argument("--rule", default="symmetric", choices=sam.RULES)
    args = parser.parse_args()
    task = grm.Task.load(args.task)
    model, tokenizer = grm.load_model(args.model)
    trained = model.generation_config
    renderer = grm.Renderer(task, tokenizer, end_ids=trained.eos_token_id)
    pairs = task.read(task.folder / "train.jsonl")
    system = {"role": "system", "content": task.criteria}
    for pair in pairs:
        user = f"Query: {pair['query']}\nDocument: {pair['document']}"
        pair["prompt"] = [system, {"role": "user", "content": user}]

    class Trainer(StepwiseCredit, GRPOTrainer):
        pass

    def reward(completion_ids, label, **columns):  # not of text, which would be encoded again
        traces = map(renderer.parse, completion_ids)
        return [grm.reward(trace, gold) for trace, gold in zip(traces, label, strict=True)]

    config = GRPOConfig(
        args.out,
        max_steps=20,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        per_device_train_batch_size=128,
        num_generations=8,
        max_completion_length=trained.max_new_tokens,
        chat_template_kwargs={"enable_thinking": False},  # the task's steps are the thinking
        loss_type="dapo",
        epsilon_high=0.28,
        bf16=torch.cuda.is_available(),
        logging_steps=1,
    )
    data = Dataset.from_list(pairs)
    settings = {"processing_class": tokenizer, "renderer": renderer, "rule": args.rule}
    trainer = Trainer(model, reward, config, data, **settings)
    trainer.train()
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    print("reward of each step:", *(f"{reward:.2f}" for reward in rewards))
    grm.save_model(model, tokenizer, args.out)
    task.save(args.out)


if __name__ == "__main__":
    try:
        main()
    except grm.TaskError as error:
        sys.exit(str(error))
