from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lte
from lte.data.rows import routing_masks
from lte.eval.models import measurement_summary
from lte.eval.sparsity import (
    HISTOGRAM_BINS,
    Measurement,
    SparsityCounter,
    measure_sparsity,
)
from lte.hf.inputs import model_inputs
from tests.tiny_models import EXPERT_SIZE, LAYERS, NEURONS, PAD, VOCAB, num_ffns, tiny_dense_model, tiny_sparse_model

EXPERTS = NEURONS // EXPERT_SIZE


def batches_of(*lengths: int, rows: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, VOCAB, (rows, length), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


def hard_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits [L, N, E] of a plain forward pass, by hooks on the routers."""
    seen: list[Tensor] = []
    hooks = [
        ffn.router.register_forward_hook(lambda module, args, output: seen.append(output.flatten(0, -2)))
        for ffn in lte.sparse_ffns(model).values()
    ]
    with torch.no_grad():
        model(**model_inputs(model, batch))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def test_counting_makes_the_logits_of_one_token_alone() -> None:
    model = tiny_sparse_model("llama")
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    measure_sparsity(model, batches_of(7, 12))
    assert seen == [1, 1]


def test_a_folder_remembers_how_many_experts_several_tokens_need(tmp_path: Path) -> None:
    model = tiny_sparse_model("llama")
    batches = batches_of(16, 33)
    active = [(hard_logits(model, batch) > 0).unflatten(1, batch["input_ids"].shape) for batch in batches]
    measured = measure_sparsity(model, batches)
    summary = measurement_summary(measured, {"train_source": "x", "validation": {}})
    for name, most in (("2", 2), ("4", 4), ("16", 16)):
        chunks = [mask[:, :, : mask.shape[2] // most * most].unflatten(2, (-1, most)).any(3) for mask in active]
        row = torch.cat([chunk.flatten(1, 2) for chunk in chunks], dim=1).double().mean((1, 2))
        use = torch.cat([mask.flatten(1, 2) for mask in active], dim=1).double().mean(1)
        texts = (1 - (1 - use) ** most).mean(1)
        for kind, wanted in (("row", row), ("texts", texts)):
            assert summary["union_fraction"][kind][name] == pytest.approx(wanted.tolist(), abs=1e-4)
    model.config.lte_measurement = summary
    model.save_pretrained(tmp_path)
    loaded = lte.accelerate_(AutoModelForCausalLM.from_pretrained(tmp_path))
    uses = [ffn.acceleration.use for ffn in lte.sparse_ffns(loaded).values()]  # type: ignore[attr-defined]
    assert [use.union(16, in_a_row=True) for use in uses] == summary["union_fraction"]["row"]["16"]
    assert [use.union(3) for use in uses] == summary["union_fraction"]["texts"]["4"]


def test_every_statistic_matches_a_plain_count(model_type: str) -> None:
    model = tiny_sparse_model(model_type)
    batches = batches_of(7, 1, 12)
    logits = torch.cat([hard_logits(model, batch) for batch in batches], dim=1)
    measured = measure_sparsity(model, batches)
    active = (logits > 0).double()
    scores = torch.sigmoid(logits)
    assert measured.tokens == 40 * (num_ffns(model_type) // LAYERS)
    assert measured.sparsity == pytest.approx(1 - active.mean().item())
    torch.testing.assert_close(torch.tensor(measured.active_fraction).double(), active.mean((1, 2)))
    torch.testing.assert_close(torch.tensor(measured.expert_use).double(), active.mean(1))
    near = ((scores - 0.5).abs() < 0.1).double().mean((1, 2))
    torch.testing.assert_close(torch.tensor(measured.near_threshold).double(), near)
    for layer, histogram in enumerate(measured.score_histogram):
        expected = torch.histc(scores[layer], HISTOGRAM_BINS, 0, 1) / scores[layer].numel()
        torch.testing.assert_close(torch.tensor(histogram), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_ignored_labels_are_left_out(side: str) -> None:
    model = tiny_sparse_model()
    ids = batches_of(6, rows=1)[0]["input_ids"]
    pad = torch.full((1, 3), PAD)
    parts = [pad, ids] if side == "left" else [ids, pad]
    padded = {"input_ids": torch.cat(parts, 1), "attention_mask": (torch.cat(parts, 1) != PAD).long()}
    padded["labels"] = padded["input_ids"].masked_fill(padded["input_ids"] == PAD, -100)
    alone = measure_sparsity(model, [{"input_ids": ids, "labels": ids}])
    both = measure_sparsity(model, [padded])
    assert both.tokens == 6
    assert both.expert_use == alone.expert_use
    prompt = {"input_ids": ids, "labels": ids.clone()}
    prompt["labels"][:, :4] = -100
    assert measure_sparsity(model, [prompt]).tokens == 2
    assert measure_sparsity(model, [prompt], skip_ignored_labels=False).to_dict() == alone.to_dict()
    assert measure_sparsity(model, [{"input_ids": ids}]).to_dict() == alone.to_dict()


def test_dead_and_always_on_experts_are_counted() -> None:
    model = tiny_sparse_model(routed=False)
    with torch.no_grad():
        first, second = (ffn.router for ffn in lte.sparse_ffns(model).values())
        first.bias[:3] = -5
        second.bias[:] = -5
    measured = measure_sparsity(model, batches_of(5))
    assert measured.dead_experts == [3, EXPERTS]
    assert measured.always_on_experts == [EXPERTS - 3, 0]
    assert measured.active_fraction == [1 - 3 / EXPERTS, 0]
    assert measured.layer_sparsity == [3 / EXPERTS, 1]
    assert measured.sparsity == pytest.approx((3 / EXPERTS + 1) / 2)


def test_scores_of_zero_and_one_are_in_the_histogram() -> None:
    model = tiny_sparse_model(routed=False)
    with torch.no_grad():
        for ffn in lte.sparse_ffns(model).values():
            ffn.router.bias.copy_(torch.tensor([200.0, -200.0] * (EXPERTS // 2)))
    measured = measure_sparsity(model, batches_of(5))
    for layer in measured.score_histogram:
        assert (layer[0], layer[-1]) == (0.5, 0.5)
    assert measured.near_threshold == [0, 0]


def test_the_threshold_is_the_models_own() -> None:
    model = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=8, grouping="random", threshold=0.9))
    with torch.no_grad():
        for ffn in lte.sparse_ffns(model).values():
            ffn.router.bias.fill_(2.0)  # a score of 0.88: above 0.5, below 0.9, within 0.1 of it
    measured = measure_sparsity(model, batches_of(5))
    assert measured.threshold == pytest.approx(0.9)
    assert measured.sparsity == 1
    assert measured.near_threshold == [1, 1]


def test_the_hard_path_is_measured_and_every_mode_is_restored() -> None:
    model = tiny_sparse_model().train()
    ffns = list(lte.sparse_ffns(model).values())
    expected = measure_sparsity(model, batches_of(9)).to_dict()
    ffns[0].set_mode("soft")
    ffns[0].record_logits = True
    ffns[1].set_mode("dense")
    model.model.norm.eval()
    assert measure_sparsity(model, batches_of(9)).to_dict() == expected
    assert [ffn.mode for ffn in ffns] == ["soft", "dense"]
    assert [ffn.record_logits for ffn in ffns] == [True, False]
    assert [ffn.logits for ffn in ffns] == [None, None]
    assert (model.training, ffns[0].training, model.model.norm.training) == (True, True, False)


def test_modes_are_restored_after_an_error() -> None:
    model = tiny_sparse_model().train()
    ffns = list(lte.sparse_ffns(model).values())
    ffns[0].set_mode("soft")
    with pytest.raises(ValueError, match=rf"input_ids must lie in 0 to {VOCAB - 1}, .* got {VOCAB};"):
        measure_sparsity(model, [{"input_ids": torch.full((1, 3), VOCAB)}])
    assert (ffns[0].mode, ffns[0].record_logits, model.training) == ("soft", False, True)


def test_bfloat16_and_one_token_and_a_generator_of_batches() -> None:
    model = tiny_sparse_model().to(torch.bfloat16)

    def stream() -> Iterator[dict[str, Tensor]]:
        yield from batches_of(1, 3)

    measured = measure_sparsity(model, stream())
    assert measured.tokens == 8
    assert 0 < measured.sparsity < 1
    assert sum(measured.score_histogram[0]) == pytest.approx(1)


def test_the_measurement_survives_json() -> None:
    measured = measure_sparsity(tiny_sparse_model(), batches_of(5))
    assert Measurement.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


@pytest.mark.parametrize("change", [{"surprise": 1}, {"tokens": None}])
def test_a_dict_with_other_fields_is_refused(change: dict[str, Any]) -> None:
    data = {**measure_sparsity(tiny_sparse_model(), batches_of(5)).to_dict(), **change}
    data = {key: value for key, value in data.items() if value is not None}
    with pytest.raises(ValueError, match="a sparsity measurement must hold the fields"):
        Measurement.from_dict(data)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model must be an LTE model"):
        measure_sparsity(tiny_dense_model(), batches_of(5))


@pytest.mark.parametrize("batches", [[], [{"input_ids": torch.ones(1, 3).long(), "labels": -100 * torch.ones(1, 3)}]])
def test_nothing_to_count_is_refused(batches: Any) -> None:
    with pytest.raises(ValueError, match="batches must hold at least one counted token, got none"):
        measure_sparsity(tiny_sparse_model(), batches)


def test_batches_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"input_ids must be in every batch as \[B, T\], got \(1, 1, 3\)"):
        measure_sparsity(tiny_sparse_model(), [{"input_ids": torch.ones(1, 1, 3).long()}])


def test_a_mask_of_another_shape_is_refused() -> None:
    batch = {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 1, 3, 3)}
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\] as input_ids is"):
        measure_sparsity(tiny_sparse_model(), [batch])


def test_router_scores_of_nan_are_refused() -> None:
    model = tiny_sparse_model()
    with torch.no_grad():
        next(iter(lte.sparse_ffns(model).values())).router.bias[0] = float("nan")
    with pytest.raises(ValueError, match="router scores must be numbers, got NaN"):
        measure_sparsity(model, batches_of(5))


def test_an_update_without_a_forward_pass_is_refused() -> None:
    with (
        SparsityCounter(tiny_sparse_model()) as counter,
        pytest.raises(ValueError, match="model must run in hard mode before each update"),
    ):
        counter.update(torch.ones(1, 3, dtype=torch.bool))


def test_counted_tokens_are_what_a_batch_says() -> None:
    model, names = tiny_sparse_model(), ["ffn"]
    ids = torch.tensor([[5, 6, 0]])
    labels, mask = torch.tensor([[-100, 6, -100]]), torch.tensor([[1, 1, 0]])
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    assert routing_masks(model, names, batch)["ffn"].tolist() == [[False, True, False]]
    every = routing_masks(model, names, batch, skip_ignored_labels=False)["ffn"]
    assert every.tolist() == [[True, True, False]]
    assert routing_masks(model, names, {"input_ids": ids})["ffn"].all()
    # A masked language model has labels where tokens were masked; all others route too.
    other = tiny_sparse_model("distilbert")
    assert torch.equal(routing_masks(other, names, batch)["ffn"], every)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_update_never_waits_for_the_gpu() -> None:
    model = tiny_sparse_model().cuda()
    ids = batches_of(9)[0]["input_ids"].cuda()
    mask = torch.ones_like(ids, dtype=torch.bool)
    with SparsityCounter(model) as counter, torch.no_grad():
        for warm in (False, True):
            model(input_ids=ids, use_cache=False)
            torch.cuda.set_sync_debug_mode("error" if warm else "default")
            counter.update(mask)
            torch.cuda.set_sync_debug_mode("default")
        assert counter.result().tokens == 2 * ids.numel()
