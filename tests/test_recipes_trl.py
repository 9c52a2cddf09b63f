"""docs/trl_sam.py: each token's credit is that of its own step, and with TRL its loss is sam.py's."""

import runpy
from types import SimpleNamespace

import pytest
import torch
from conftest import NOTES, ROOT

import grm
import sam

StepwiseCredit = runpy.run_path(str(ROOT / "docs" / "trl_sam.py"))["StepwiseCredit"]
TASK = grm.Task.load(NOTES)
PAIR = {"label": "1", "step_labels": ["3", "1", "1"]}  # the README's
OTHER = {"label": "3", "step_labels": ["3", "3", "3"]}  # of the last case
# What the steps say (two: malformed), which of them keep credit by the rule and its targets, the answer's advantage.
CASES = [
    ((3, 1, 1), {"none": "111", "sam": "111", "labels": "111", "change": "111"}, 0.9),
    ((3, 3, 1), {"none": "111", "sam": "001", "labels": "101", "change": "100"}, 0.7),
    ((3, 3, 3), {"none": "111", "sam": "111", "labels": "011", "change": "010"}, -0.5),
    ((1, 1, 0), {"none": "111", "sam": "001", "labels": "101", "change": "111"}, -0.6),
    ((1, 1), {"none": "111", "sam": "111", "labels": "111", "change": "111"}, -0.5),
    ((3, 1, 1), {"none": "000", "sam": "000", "labels": "000", "change": "000"}, 0.0),
    ((3, 1, 3), {"none": "111", "sam": "101", "labels": "101", "change": "100"}, 0.8),
]
RULES = {
    "none": ("none", "change"),
    "sam": ("sam", "change"),
    "labels": ("symmetric", "labels"),
    "change": ("symmetric", "change"),
}


@pytest.fixture(scope="module")
def renderer():
    return grm.Renderer(TASK, grm.load_model(NOTES / "model", meta=True)[1])


def encode(renderer, labels, filler):
    """Ids of an answer whose steps are of different lengths, which `filler` changes."""
    steps = [
        f"{name} {'none ' * (k + filler)}\\boxed{{{label}}}"
        for k, (name, label) in enumerate(zip(TASK.steps, labels, strict=False))
    ]
    return renderer.encode_response(" ".join(steps))


def expected(renderer, ids, kept, advantage):
    """Credit of each token: of the step that its number of boxes before it says; the end belongs to the last."""
    (closer,) = renderer._closers
    boxes = [ids[:at].count(closer) for at in range(len(ids))]
    return [advantage * int(kept[min(k, 2)]) for k in boxes]


def weigh(credits, num_tokens, num_answers):
    """Rule sam: a mean over answers of means over their kept tokens, times the loss's denominator."""
    return [[c / max(1, sum(x != 0 for x in row)) * num_tokens / num_answers for c in row] for row in credits]


class Padded:
    """In TRL's place: a batch of given answers, padded on one side."""

    loss_type = "dapo"
    accelerator = SimpleNamespace(num_processes=2)

    def __init__(self, answers, left, pad):
        longest = max(map(len, answers)) + 3
        rows = [[pad] * (longest - len(ids)) for ids in answers]
        ids = [row + x if left else x + row for row, x in zip(rows, answers, strict=True)]
        mask = [
            [0] * len(row) + [1] * len(x) if left else [1] * len(x) + [0] * len(row)
            for row, x in zip(rows, answers, strict=True)
        ]
        advantages = torch.tensor([advantage for _, _, advantage in CASES])
        self.batch = {"completion_ids": torch.tensor(ids), "completion_mask": torch.tensor(mask), "advantages": advantages}
        self.batch["num_items_in_batch"] = torch.tensor(1000)  # of both processes

    def _generate_and_score_completions(self, inputs):
        return self.batch


class Trainer(StepwiseCredit, Padded):
    pass


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_placement(renderer, name, left):
    """A step's credit on its neighbour's tokens, on padding or by another pair's labels; a malformed answer that loses its own;
    a denominator that is not of all processes."""
    answers = [encode(renderer, labels, i) for i, (labels, _, _) in enumerate(CASES)]
    rule, targets = RULES[name]
    # Padding is told by the mask alone: its id is one that answers have too.
    trainer = Trainer(answers, left, answers[0][0], renderer=renderer, rule=rule, step_targets=targets)
    batch = trainer._generate_and_score_completions([PAIR] * 6 + [OTHER])
    wanted = [expected(renderer, ids, kept[name], a) for ids, (_, kept, a) in zip(answers, CASES, strict=True)]
    wanted = weigh(wanted, 1000, 2 * len(CASES)) if rule == "sam" else wanted
    mask_BT = batch["completion_mask"].bool()
    for credit_T, mask_T, row in zip(batch["advantages"], mask_BT, wanted, strict=True):
        torch.testing.assert_close(credit_T[mask_T], torch.tensor(row))
    assert not batch["advantages"][~mask_BT].any()


def test_other_losses(renderer):
    """Rule sam under a loss that divides by each answer's length once more."""
    settings = {"renderer": renderer, "rule": "sam"}
    with pytest.raises(ValueError, match="rule sam needs loss_type='dapo', not 'grpo'"):
        type("Other", (StepwiseCredit, Padded), {"loss_type": "grpo"})([[1]], False, 0, **settings)


@pytest.mark.parametrize("name", RULES)
def test_in_trl(renderer, tmp_path, name):
    """Credit that stays behind when TRL shuffles and splits its batch; a gradient that is not sam.policy_loss's."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rule, targets = RULES[name]
    model, tokenizer = grm.load_model(NOTES / "model", seed=0)
    answers = [encode(renderer, CASES[i % 4][0], i) for i in range(8)]
    answers[5] = answers[5][:-1]  # has no end

    class Given(StepwiseCredit, trl.GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            return answers, None

    def reward(completion_ids, label, **columns):
        return [grm.reward(renderer.parse(ids), gold) for ids, gold in zip(completion_ids, label, strict=True)]

    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4}
    config = trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, epsilon_high=0.28, **batches)
    prompt = [{"role": "user", "content": "winter ramen"}]
    data = datasets.Dataset.from_list([{"prompt": prompt, **PAIR}] * 8)
    settings = {"processing_class": tokenizer, "renderer": renderer, "rule": rule, "step_targets": targets}
    trainer = Given(model.train(), reward, config, data, **settings)
    trainer.current_gradient_accumulation_steps = 2
    trainer._prepare_inputs(list(data))

    # The same by sam.py alone, the answers packed in the order of TRL's shuffled batches.
    given = {}
    for batch in trainer._buffered_inputs:
        trainer._compute_loss(model, batch).backward()
        for ids_T, mask_T, credit_T in zip(
            batch["completion_ids"], batch["completion_mask"] > 0, batch["advantages"], strict=True
        ):
            given[tuple(ids_T[mask_T].tolist())] = credit_T[mask_T]
    theirs = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    ends_NK, right_NK = (torch.tensor(x) for x in zip(*[trainer.judge_steps(ids, PAIR) for ids in answers], strict=True))
    assert (ends_NK[:, 0] == 0).nonzero().tolist() == [[5]]
    lengths_N = torch.tensor([len(ids) for ids in answers])
    advantages_N = sam.group_advantages(torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])).flatten()
    credit_A = sam.stepwise_credit(advantages_N, ends_NK, right_NK, lengths_N, rule)
    num_tokens = int(lengths_N.sum())
    credit_A = sam.mean_over_answers(credit_A, lengths_N, num_tokens, 8) if rule == "sam" else credit_A
    torch.testing.assert_close(torch.cat([given[tuple(ids)] for ids in answers]), credit_A, rtol=1e-3, atol=0)
    head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    logprobs = []
    for ids in answers:
        logits_TV = model(torch.tensor([[*head, *ids]])).logits[0, len(head) - 1 : -1]
        logprobs.append(logits_TV.log_softmax(-1)[range(len(ids)), ids])
    sam.policy_loss(torch.cat(logprobs), credit_A, num_tokens)[0].backward()
    ours = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5)
    assert max(grad.abs().max() for grad in ours) > 1e-2
