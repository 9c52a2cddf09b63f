"""The plain ways: to run a model, Hugging Face's forward on padded rows, nothing shared; to parse an answer, from its start
again at each closing brace. rollout.Engine and grm.Renderer.parse must agree with them."""

import torch
from transformers import GenerationConfig

from grm import Step, Trace


def parse(renderer, ids):
    """Renderer.parse of ids below the vocabulary's size, which decodes the whole answer up to each closing brace."""
    if not ids or ids[-1] != renderer.eos_id:
        return Trace(problem="not ended")
    body, boxes, steps = ids[:-1], renderer.task.boxes, []
    if renderer.eos_id in body:
        return Trace(problem="a token that does not belong into an answer")
    for end in [i + 1 for i, token in enumerate(body) if token in renderer._closers]:
        found = renderer._boxed(body[:end])
        if len(found) > min(len(steps) + 1, len(boxes)):
            return Trace(problem="too many boxes")
        if len(found) > len(steps):
            label = renderer._known.get(found[-1])
            if label is None:
                return Trace(problem="unknown label")
            start = steps[-1].end if steps else 0
            at = find_label(renderer, body, start, end, label)
            steps.append(Step(start, end, label, at))
    if len(steps) < len(boxes):
        return Trace(problem="missing boxes")
    return Trace(steps, (steps[-1] if renderer.task.format == "reason-first" else steps[0]).label)


def find_label(renderer, ids, start, end, label):
    """Where the label's first token stands directly behind the opening of a box; None if it is another token there."""
    for at in range(end - 1, start, -1):
        before = "".join(renderer.decode(ids[start:at]).split())
        if ids[at] == renderer._labels[label][0] and before.endswith("\\boxed{"):
            return None if "\\boxed" in renderer.decode(ids[at:end]) else at
    return None


class PaddedEngine:
    """Greedy answers and label logits of left-padded batches, through the model's own attention."""

    def __init__(self, model, eos_id, label_ids, max_new_tokens):
        self.model, self.eos_id, self.label_ids = model, eos_id, label_ids
        ends = {"eos_token_id": eos_id, "pad_token_id": eos_id, "max_new_tokens": max_new_tokens}
        self.settings = GenerationConfig(**ends, do_sample=False, output_logits=True, return_dict_in_generate=True)

    def pad(self, rows):
        width = max(map(len, rows))
        ids = torch.tensor([[self.eos_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])  # from lengths, not from pad ids
        return {"input_ids": ids, "attention_mask": mask}

    @torch.no_grad()
    def generate(self, prompts):
        """Greedy answers (lists of ids, eos included where the model ended), and the label logits [T, Y] of each."""
        batch = self.pad(prompts)
        out = self.model.generate(**batch, generation_config=self.settings)
        rows = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
        answers = [row[: row.index(self.eos_id) + 1] if self.eos_id in row else row for row in rows]
        logits_NTY = torch.stack(out.logits, 1)[..., self.label_ids].float()
        return answers, [logits_TY[: len(answer)] for answer, logits_TY in zip(answers, logits_NTY, strict=True)]

    @torch.no_grad()
    def label_logits(self, prompts):
        """float32 logits [N, Y] of the labels as the next token of each prompt."""
        batch = self.pad(prompts)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return self.model(**batch, position_ids=positions).logits[:, -1, self.label_ids].float()
