"""The plain ways: to run a model, Hugging Face's forward on padded rows, nothing shared; to parse an answer, from its start
again at each closing brace; to read a label's probability, a forward pass for each of its spellings. rollout.Engine,
grm.Renderer.parse and grm.read_labels must agree with them. And a model that writes what it is told."""

import numpy as np
import torch
from transformers import GenerationConfig

import rollout
from grm import Step, Trace


def script(monkeypatch, answer_of_row):
    """Let rollout.sample write the ids answer_of_row(row) where it would draw: they stand in the place of the uniforms."""
    scripted = lambda rows, width: [[*answer_of_row(row), *answer_of_row(row)[-1:] * width][:width] for row in rows]
    monkeypatch.setattr(rollout, "uniforms", lambda seed, step, rows, width: np.array(scripted(rows, width), dtype=float))
    monkeypatch.setattr(rollout, "choose_tokens", lambda logits, drawn, temperature: (drawn.long(), torch.zeros(len(drawn))))


@torch.no_grad()
def label_probs(model, renderer, prompt, answer, at):
    """Probabilities [Y] of the labels where an answer has one, at ids[at]: behind the brace or, of some, merged with it."""
    stem = [*prompt, *answer[:at]]  # up to "\\boxed"
    if answer[at] not in renderer.merged.values():
        stem.pop()
    brace = renderer.opening[-1]
    behind_stem, behind_brace = (model(torch.tensor([ids])).logits[0, -1].softmax(-1) for ids in (stem, [*stem, brace]))
    probs_Y = behind_stem[brace] * behind_brace[renderer.label_ids] / behind_brace[renderer.label_ids].sum()
    for label, i in renderer.merged.items():
        probs_Y[renderer.task.labels.index(label)] += behind_stem[i]
    return probs_Y / probs_Y.sum()


def parse(renderer, ids):
    """Renderer.parse of ids below the vocabulary's size, which decodes the whole answer up to each closing brace."""
    if not ids or ids[-1] not in renderer.end_ids:
        return Trace(problem="not ended")
    body, boxes, steps = ids[:-1], renderer.task.boxes, []
    if set(renderer.end_ids) & set(body):
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
    """Where the label's first token stands directly behind the opening of a box, or merged with its brace; else None."""
    for at in range(end - 1, start, -1):
        before = "".join(renderer.decode(ids[start:at]).split())
        is_behind = ids[at] == renderer._labels[label][0] and before.endswith("\\boxed{")
        if is_behind or (ids[at] == renderer.merged.get(label) and before.endswith("\\boxed")):
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
