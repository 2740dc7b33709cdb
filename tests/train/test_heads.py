"""Two-stage training of models whose head predicts no next token, on the loss that they return."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

import lte
from lte.eval.sparsity import measure_sparsity
from lte.train.config import TrainConfig
from lte.train.objective import head_divergence
from lte.train.two_stage import train_two_stage
from tests.tiny_models import EXPERT_SIZE, PAD, VOCAB, row_of, tiny_config, zero_dropout_

CASES = [
    (model_type, head)
    for model_type in ("distilbert", "t5", "bert", "opt")
    for head in row_of(model_type).models
    if head.endswith(("MaskedLM", "Seq2SeqLM", "SequenceClassification"))
]
FEW = {
    "stage1_steps": 3,
    "stage2_steps": 2,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "router_fit_tokens": 64,
    "calibration_tokens": 256,
}


class Rows(Dataset[dict[str, Tensor]]):
    """Random rows of 9 tokens, some of them padding, with labels as the head wants them."""

    def __init__(self, head: str):
        generator = torch.Generator().manual_seed(5)
        self.rows = []
        for index in range(16):
            ids = torch.randint(3, VOCAB, (9,), generator=generator)
            # T5's classifier reads the last end-of-text token, of which all rows have one.
            ids[5 + index % 3], ids[6 + index % 3 :] = 2, PAD
            labels = ids.masked_fill(ids == PAD, -100)
            if head.endswith("MaskedLM"):
                labels[::2] = -100
            label = torch.tensor(index % 2) if head.endswith("Classification") else labels
            self.rows.append({"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": label})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def model_of(model_type: str, head: str) -> Any:
    torch.manual_seed(0)
    row = row_of(model_type)
    config = tiny_config(model_type, eos_token_id=2)
    return row.stock_class(row.models[head])(config)


@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_both_stages_train_what_they_should_and_meet_the_target(model_type: str, head: str, tmp_path: Path) -> None:
    model = zero_dropout_(model_of(model_type, head))
    lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, target_sparsity=0.4))
    teacher = model_of(model_type, head)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = TrainConfig(**FEW, distillation_weight=0.5)
    rows = Rows(head)
    summary = train_two_stage(model, rows, settings, tmp_path, teacher=teacher, data_collator=stack)
    assert {entry["stage"] for entry in summary.log_history} == {1, 2}
    same = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not same
    batch = stack(rows.rows)
    measured = measure_sparsity(model, [batch])
    assert measured.tokens == batch["attention_mask"].sum() * (2 if "Seq2Seq" in head else 1)
    assert measured.sparsity == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_routers_alone_train_when_all_else_is_frozen(model_type: str, head: str, tmp_path: Path) -> None:
    model = model_of(model_type, head)
    lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, target_sparsity=0.4))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = TrainConfig(**FEW, trainable="routers")
    train_two_stage(model, Rows(head), settings, tmp_path, stages=(1,), data_collator=stack)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".router." in name}


def test_a_batch_without_labels_is_refused(tmp_path: Path) -> None:
    model = model_of("distilbert", "AutoModelForMaskedLM")
    lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE))
    rows = Rows("AutoModelForMaskedLM")
    for row in rows.rows:
        del row["labels"]
    with pytest.raises(ValueError, match="batches must hold labels for LteDistilBertForMaskedLM, got input_ids"):
        train_two_stage(model, rows, TrainConfig(**FEW), tmp_path, data_collator=stack)


def test_the_divergence_of_heads_is_over_what_is_labelled() -> None:
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    logs = [functional.log_softmax(each, -1) for each in (student, teacher)]
    every = functional.kl_div(*logs, log_target=True, reduction="none").sum(-1)
    labels = torch.tensor([[1, 2, -100, -100, 3], [-100] * 5])
    torch.testing.assert_close(head_divergence(student, labels, teacher), every[labels != -100].mean())
    torch.testing.assert_close(head_divergence(student, torch.tensor([0, 1]), teacher), every.mean())
    torch.testing.assert_close(head_divergence(student[:, 0], torch.tensor([0, 1]), teacher[:, 0]), every[:, 0].mean())


def test_the_divergence_of_regressions_is_the_squared_difference() -> None:
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [2.5]])
    assert head_divergence(student, torch.tensor([3.0, 2.0]), teacher).item() == pytest.approx((4 + 0.25) / 2)
