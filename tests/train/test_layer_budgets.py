"""Targets of single layers: what is measured, how the target is spread, and that training holds each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lte
from lte.data.rows import LmCollator
from lte.eval.sparsity import measure_sparsity
from lte.train.checkpoints import control_state_of
from lte.train.layer_budgets import SHARES, budgets, loss_rises
from lte.train.layer_prices import LayerPrices
from lte.train.objective import NonFiniteLossError, head_divergence
from lte.train.router_init import fit_routers_
from lte.train.trainer import LteTrainer
from tests.tiny_models import PAD, randomise_routers_, tiny_dense_model
from tests.train.test_trainer import arguments
from tests.train.toy import toy_rows

BATCHES = [LmCollator(PAD)([toy_rows(16)[i] for i in range(8)])]


def uneven_model(**options: Any) -> Any:
    """A model whose first layer's FFN matters far more than its second one's."""
    dense = tiny_dense_model()
    with torch.no_grad():
        dense.model.layers[0].mlp.down_proj.weight.mul_(3)
        dense.model.layers[1].mlp.down_proj.weight.mul_(0.1)
    return lte.sparsify_(dense, lte.LteConfig(expert_size=4, **{"grouping": "random", **options}), calibration=BATCHES)


def test_rises_are_divergences_with_one_layer_sparse() -> None:
    model = randomise_routers_(uneven_model())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = loss_rises(model, BATCHES, (0.25, 0.5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ffns = list(lte.sparse_ffns(model).values())
    ids = BATCHES[0]["input_ids"]
    for ffn in ffns:
        ffn.set_mode("dense")
    with torch.no_grad():
        dense = model(ids).logits
        for layer, ffn in enumerate(ffns):
            seen: list[torch.Tensor] = []
            handle = ffn.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
            model(ids)
            handle.remove()
            logits = ffn.router(seen[0])
            for place, share in enumerate((0.25, 0.5)):
                threshold = torch.stack([row.quantile(share) for row in logits]).mean()
                ffn.set_mode("hard")
                ffn.router.bias.sub_(threshold)
                wanted = head_divergence(model(ids).logits, ids, dense)
                ffn.router.bias.add_(threshold)
                ffn.set_mode("dense")
                assert found[layer, place].item() == pytest.approx(wanted.item(), rel=1e-3)


def test_the_target_goes_where_it_costs_least() -> None:
    quadratic = torch.tensor([[a * share**2 for share in SHARES] for a in (1.0, 1.0, 4.0)], dtype=torch.float64)
    found = budgets(quadratic, 0.4)
    assert sum(found) / 3 == pytest.approx(0.4)
    # Equal slopes, 2 a s: a quarter of the sparsity for four times the curvature, up to the grid.
    assert found[0] == pytest.approx(found[1], abs=0.011)
    assert found[2] < 0.5 * found[0]
    assert budgets(torch.zeros(2, len(SHARES)), 0.97) == pytest.approx([0.97, 0.97], abs=0.02)
    flat = torch.tensor([[0.0] * len(SHARES), [1.0] * len(SHARES)])
    # The first layer takes all that it may, 95% of its routed experts.
    assert budgets(flat, 0.4, routed=0.8) == pytest.approx([0.76, 0.04], abs=0.011)


def trained(folder: Path, model: Any, **options: Any) -> LteTrainer:
    settings = {"layer_budgets": "sensitivity", "router_learning_rate": 1e-2, **options}
    trainer = LteTrainer(
        model, arguments(folder, **settings), train_dataset=toy_rows(64), data_collator=LmCollator(PAD)
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("stage2", ["trained", "frozen"])
def test_each_layer_meets_its_target(tmp_path: Path, stage2: str) -> None:
    model = uneven_model()
    trainer = trained(tmp_path, model, max_steps=160, stage2_routers=stage2)
    assert isinstance(trainer.prices, LayerPrices)
    targets = trainer.prices.targets
    assert sum(targets) / 2 == pytest.approx(0.5)
    assert targets[1] > targets[0] + 0.2
    measured = measure_sparsity(model, [LmCollator(PAD)([toy_rows(64)[i] for i in range(64)])])
    assert measured.sparsity == pytest.approx(0.5, abs=0.02)
    assert measured.layer_sparsity == pytest.approx(targets, abs=0.06)
    last = trainer.state.log_history[-2]
    assert last["layers/target_00"] == targets[0]
    assert "layers/eta_01" in last
    assert not any("efficiency_by_layer" in name for name in last)


def test_targets_are_found_beside_biases_that_zero3_has_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomise_routers_(uneven_model())
    trainer = LteTrainer(model, arguments(tmp_path, layer_budgets="sensitivity"), train_dataset=toy_rows(8))
    monkeypatch.setattr("lte.train.trainer.loss_rises", lambda *args: torch.rand(2, len(SHARES)).cumsum(1))
    for ffn in trainer.ffns:
        ffn.router.bias.ds_shape = ffn.router.bias.shape
        ffn.router.bias.data = torch.empty(0)
    trainer._set_budgets()
    assert trainer.prices is not None
    assert sum(trainer.prices.targets) == pytest.approx(2 * model.target_sparsity)


def test_the_loss_prices_layers_one_by_one(tmp_path: Path) -> None:
    """The first step's loss is the task's and the mean of each layer's efficiency loss times its own price."""
    model = uneven_model()
    trainer = trained(tmp_path, model, max_steps=1, learning_rate=0.0, router_learning_rate=0.0)
    assert trainer.prices is not None
    entry = trainer.state.log_history[0]
    assert entry["loss_total"] == pytest.approx(entry["task_loss"] + 0.03 * entry["efficiency_loss"], rel=1e-5)
    trainer.prices.controllers[0].eta = 5.0
    trainer.eta = 1e6
    for ffn in trainer.ffns:
        ffn.set_mode("straight_through")
        ffn.record_logits = True
    model.train()
    batch = dict(BATCHES[0])
    trainer.current_gradient_accumulation_steps = 1
    trainer.stage = trainer.stages[0]
    loss = trainer.compute_loss(model, batch)
    scores = []
    with torch.no_grad():
        for ffn in trainer.ffns:
            ffn.record_logits = True
        with torch.enable_grad():
            task = model(**batch).loss
        scores = [ffn.logits.sigmoid() for ffn in trainer.ffns]
    second = trainer.prices.controllers[1].eta
    priced = (5.0 * scores[0].square().mean() + second * scores[1].square().mean()) / 2
    assert loss.item() == pytest.approx((task + priced).item(), rel=1e-4)
    # Outside of a training no later step would say that a loss is not finite.
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match="the loss became nan"):
        trainer.compute_loss(model, batch)


def test_a_checkpoint_remembers_targets_and_prices(tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = uneven_model()
    first = trained(tmp_path, whole, **options)
    assert first.prices is not None
    assert control_state_of(tmp_path / "checkpoint-2")["prices"]["targets"] == first.prices.targets
    for folder in tmp_path.glob("checkpoint-[46]"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    again = uneven_model()
    settings = {"layer_budgets": "sensitivity", "router_learning_rate": 1e-2, **options}
    trainer = LteTrainer(
        again, arguments(tmp_path, **settings), train_dataset=toy_rows(64), data_collator=LmCollator(PAD)
    )
    trainer.train(resume_from_checkpoint=True)
    for (name, one), other in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_budgets_need_routers_that_say_something_and_a_controller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="router_fit_tokens must be positive with layer_budgets=sensitivity"):
        trained(tmp_path, uneven_model(), router_fit_tokens=0)
    with pytest.raises(ValueError, match="layer_budgets must be free where no controller holds the target"):
        arguments(tmp_path, layer_budgets="sensitivity", eta=0.1)
    with pytest.raises(ValueError, match="layer_budgets must be free where no controller holds the target"):
        arguments(tmp_path, layer_budgets="sensitivity", recipe="paper")


def test_measuring_works_with_always_on_experts() -> None:
    model = uneven_model(always_on=0.25)
    fit_routers_(model, BATCHES)
    rises = loss_rises(model, BATCHES)
    assert rises.isfinite().all()
    assert (rises[:, 1:] >= 0.9 * rises[:, :-1]).all()
    assert max(budgets(rises, 0.5, routed=0.75)) <= 0.95 * 0.75 + 1e-9
