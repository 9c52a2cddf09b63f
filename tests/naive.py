"""The plain way to run a model, which rollout.Engine must agree with: Hugging Face's forward on padded rows, nothing shared."""

import torch
from transformers import GenerationConfig


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
