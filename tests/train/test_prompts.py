"""Tokens of prompts: left out of the routers' losses and thresholds, or counted."""

import pytest
import torch

import lte
from lte.config import IGNORED
from lte.data.rows import LmCollator, PromptsCounted, TokenRows, routing_masks
from lte.eval.sparsity import measure_sparsity
from lte.train.config import TrainConfig
from lte.train.processes import training_device
from lte.train.trainer import LteTrainer
from lte.train.two_stage import train_two_stage
from tests.tiny_models import PAD, VOCAB, tiny_dense_model, tiny_sparse_model
from tests.train.toy import toy_rows

PROMPT = 12


def rows_with_prompts(count, seed=0, *, labels_of_prompts=False):
    """Rows of 32 tokens of which the first 12, the prompt, are of one token repeated."""
    ids = torch.stack([torch.as_tensor(row["input_ids"]) for row in toy_rows(count, seed=seed)])
    ids[:, :PROMPT] = 3 + torch.arange(count).unsqueeze(1) % (VOCAB - 3)
    labels = ids.clone()
    if not labels_of_prompts:
        labels[:, :PROMPT] = IGNORED
    return TokenRows(list(ids.numpy()), list(labels.numpy()))


def sparsity(model, *, prompts):
    rows = rows_with_prompts(256, seed=9, labels_of_prompts=prompts)
    return measure_sparsity(model, [LmCollator(PAD)([rows[i] for i in range(len(rows))])]).sparsity


@pytest.mark.parametrize("prompts", [False, True])
def test_losses_and_target_are_of_what_counts(tmp_path, monkeypatch, prompts):
    seen = []
    routing = LteTrainer._routing
    monkeypatch.setattr(
        LteTrainer, "_routing", lambda self, masks, *rest: (seen.append(masks), routing(self, masks, *rest))[1]
    )
    model = tiny_dense_model().to(training_device())
    lte.sparsify_(model, lte.LteConfig(expert_size=8, grouping="random", target_sparsity=0.5))
    config = TrainConfig(
        count_prompts=prompts, stage1_steps=20, stage2_steps=10, batch_size=8, learning_rate=3e-3,
        router_fit_tokens=512, calibration_tokens=8192, dataloader_num_workers=1,
    )  # fmt: skip
    train_two_stage(model, rows_with_prompts(256), config, tmp_path)
    assert len(seen) == 30
    for mask in seen[0]:
        assert (mask[:, :PROMPT] == prompts).all()
        assert mask[:, PROMPT:].all()
    assert sparsity(model, prompts=prompts) == pytest.approx(0.5, abs=0.01)
    assert sparsity(model, prompts=not prompts) != pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("packed", [False, True])
def test_padding_does_not_count(packed):
    rows = [{"input_ids": [5] * n, "labels": [IGNORED] * (n - 1) + [5]} for n in (5, 3)]
    if packed:
        rows = [{**row, "position_ids": [0, 1, 0, 1, 2][: len(row["labels"])]} for row in rows]
    batch = PromptsCounted(LmCollator(PAD))(rows)
    assert batch["token_mask"].tolist() == [[True] * 5 + [False] * 3, [True] * 3 + [False] * 5]
    assert all(mask is batch["token_mask"] for mask in routing_masks(tiny_sparse_model(), "ab", batch).values())


def test_models_that_read_no_prompts_are_refused(tmp_path):
    model = lte.sparsify_(tiny_dense_model("bert"), lte.LteConfig(expert_size=8))
    with pytest.raises(ValueError, match="count_prompts must be false for models that read no prompts, got LteBert"):
        train_two_stage(model, toy_rows(), TrainConfig(count_prompts=True), tmp_path)


class TestWhichTokensArePadding:
    rows = ([5, 6, 7, 8], [9, 3], [4, 4, 4])

    def features(self):
        return [{"input_ids": list(ids), "labels": [IGNORED] * (len(ids) - 1) + [ids[-1]]} for ids in self.rows]

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("masked", [True, False])
    def test_on_either_side_with_a_mask_or_without(self, side, masked):
        def collate(rows):
            width = 6
            gaps = [width - len(row["input_ids"]) for row in rows]

            def fill(values, gap, value):
                return [value] * gap + values if side == "left" else values + [value] * gap

            pairs = list(zip(rows, gaps, strict=True))
            batch = {
                "input_ids": torch.tensor([fill(row["input_ids"], gap, PAD) for row, gap in pairs]),
                "labels": torch.tensor([fill(row["labels"], gap, IGNORED) for row, gap in pairs]),
            }
            mask = torch.tensor([fill([1] * len(row["input_ids"]), gap, 0) for row, gap in pairs])
            return {**batch, "attention_mask": mask} if masked else batch

        found = PromptsCounted(collate)(self.features())["token_mask"].int().tolist()
        counted = {
            "left": [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]],
            "right": [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]],
        }
        assert found == counted[side]

    def test_rows_that_are_joined_to_one(self):
        def flatten(rows):
            return {name: torch.tensor([[i for row in rows for i in row[name]]]) for name in ("input_ids", "labels")}

        assert PromptsCounted(flatten)(self.features())["token_mask"].tolist() == [[True] * 9]

    def test_batches_that_do_not_tell_are_refused(self):
        def cut(rows):
            return {"input_ids": torch.tensor([row["input_ids"][:2] for row in rows])}

        with pytest.raises(ValueError, match="count_prompts must get batches that tell which tokens are padding"):
            PromptsCounted(cut)(self.features())


def test_padding_of_packed_rows_does_not_count():
    rows = [
        {"input_ids": [5] * 5, "labels": [IGNORED, 5, IGNORED, 5, 5], "position_ids": [0, 1, 0, 1, 2]},
        {"input_ids": [6] * 9, "labels": [IGNORED] + [6] * 8, "position_ids": list(range(9))},
    ]
    batch = LmCollator(PAD)(rows)
    masks = routing_masks(tiny_sparse_model(), "ab", batch, skip_ignored_labels=False)
    # 16 wide: 11 and 7 of padding, the last document of each row.
    assert [mask.sum(1).tolist() for mask in masks.values()] == [[5, 9]] * 2
    assert masks["a"][0].tolist() == [True] * 5 + [False] * 11
