"""KLA, CATS, TEAL and WINA: what each of them keeps, and the property that its paper states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lte
from lte.eval.sparsity import measure_sparsity
from lte.methods.calibration import MagnitudeHistogram
from lte.methods.cats import CatsConfig
from lte.methods.kla import KlaConfig
from lte.methods.neuron_ffn import keep_largest, kept_count
from lte.methods.teal import TealConfig
from lte.methods.wina import WinaConfig
from lte.nn.metering import metered_modules
from tests.methods.methods import calibration_batches, config_for
from tests.tiny_models import NEURONS, VOCAB, logits_of, tiny_dense_model


def many_tokens(seed: int = 7) -> Tensor:
    return torch.randint(3, VOCAB, (16, 32), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def parts_of(mlp: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """act(x W_gate) and h of a stock LLaMA FFN."""
    activated = nn.functional.silu(mlp.gate_proj(x))
    return activated, activated * mlp.up_proj(x)


@torch.no_grad()
def errors(model: Any, dense: Any, ids: Tensor) -> Tensor:
    return (logits_of(model, ids) - logits_of(dense, ids)).square().mean()


@torch.no_grad()
def test_kla_keeps_the_largest_activations_of_each_token() -> None:
    dense = tiny_dense_model()
    model = lte.sparsify_(copy.deepcopy(dense), KlaConfig(target_sparsity=0.75))
    x = torch.randn(3, 5, 32)
    _, hidden = parts_of(dense.model.layers[0].mlp, x)
    bar = hidden.abs().sort(dim=-1, descending=True).values[..., NEURONS // 4 - 1 : NEURONS // 4]
    expected = dense.model.layers[0].mlp.down_proj(hidden * (hidden.abs() >= bar))
    torch.testing.assert_close(model.model.layers[0].mlp(x), expected)  # type: ignore[union-attr, operator]


@torch.no_grad()
def test_kla_of_experts_keeps_those_of_the_largest_output_norm() -> None:
    dense = tiny_dense_model()
    config = config_for("kla", granularity="expert", grouping="contiguous", target_sparsity=0.75)
    model: Any = lte.sparsify_(copy.deepcopy(dense), config)
    x, mlp = torch.randn(6, 32), dense.model.layers[0].mlp
    _, hidden = parts_of(mlp, x)
    outputs = torch.einsum("nes,des->ned", hidden.unflatten(1, (8, 8)), mlp.down_proj.weight.unflatten(1, (8, 8)))
    best = outputs.norm(dim=-1).topk(2).indices
    expected = torch.stack([row[index].sum(0) for row, index in zip(outputs, best, strict=True)])
    torch.testing.assert_close(model.model.layers[0].mlp(x), expected)


def test_the_oracle_of_neurons_beats_that_of_experts_and_both_beat_chance() -> None:
    dense, ids = tiny_dense_model(), many_tokens()
    neurons, experts, chance = (
        errors(lte.sparsify_(tiny_dense_model(), config_for(name)), dense, ids)
        for name in ("kla", "kla experts", "random_router")
    )
    assert neurons < experts < chance


@torch.no_grad()
def test_cats_thresholds_the_gate_at_its_quantile() -> None:
    dense = tiny_dense_model()
    model: Any = lte.sparsify_(copy.deepcopy(dense), CatsConfig(target_sparsity=0.5), calibration=calibration_batches())
    seen: list[Tensor] = []
    mlp = dense.model.layers[1].mlp
    mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in calibration_batches():
        dense(batch["input_ids"])
    activated = torch.cat([parts_of(mlp, x)[0].flatten() for x in seen])
    threshold = model.model.layers[1].mlp.threshold
    assert threshold.item() == pytest.approx(activated.abs().median().item(), rel=5e-3)
    gate, hidden = parts_of(mlp, seen[0])
    expected = mlp.down_proj(hidden * (gate.abs() > threshold))
    torch.testing.assert_close(model.model.layers[1].mlp(seen[0]), expected)


def test_cats_keeps_its_sparsity_on_other_text_and_varies_between_tokens() -> None:
    model = lte.sparsify_(
        tiny_dense_model(), CatsConfig(target_sparsity=0.7), calibration=[{"input_ids": many_tokens(3)}]
    )
    found = measure_sparsity(model, [{"input_ids": many_tokens(4)}])
    assert found.sparsity == pytest.approx(0.7, abs=0.02)
    single = [measure_sparsity(model, [{"input_ids": many_tokens(4)[:1, :1] + i}]).sparsity for i in range(4)]
    assert len(set(single)) > 1


@torch.no_grad()
def test_teal_drops_small_inputs_of_each_projection_by_itself() -> None:
    dense = tiny_dense_model()
    model: Any = lte.sparsify_(copy.deepcopy(dense), TealConfig(target_sparsity=0.5), calibration=calibration_batches())
    mlp, sparse, x = dense.model.layers[0].mlp, model.model.layers[0].mlp, torch.randn(4, 32)
    kept = x * (x.abs() > sparse.up_proj.threshold)
    assert sparse.up_proj.threshold == sparse.gate_proj.threshold != sparse.down_proj.threshold
    _, hidden = parts_of(mlp, kept)
    expected = mlp.down_proj(hidden * (hidden.abs() > sparse.down_proj.threshold))
    torch.testing.assert_close(sparse(x), expected)
    assert not hasattr(model.model.layers[0].self_attn.q_proj, "threshold")


def test_greedy_teal_is_no_worse_than_uniform_on_its_own_text() -> None:
    dense, ids = tiny_dense_model(), many_tokens(5)
    # Unequal scales of the projections, which a uniform share cannot know of.
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.mlp.up_proj.weight[:, ::2] *= 0.05
            layer.mlp.gate_proj.weight[:, ::2] *= 0.05
    results = {}
    for allocation in ("uniform", "greedy"):
        config = TealConfig(target_sparsity=0.6, allocation=allocation)  # type: ignore[arg-type]
        model = lte.sparsify_(copy.deepcopy(dense), config, calibration=[{"input_ids": ids}])
        results[allocation] = errors(model, dense, ids)
    assert results["greedy"] < results["uniform"]


def test_greedy_teal_gives_the_projections_shares_of_their_own() -> None:
    config = TealConfig(target_sparsity=0.5, allocation="greedy", greedy_step=0.1)
    model = lte.sparsify_(tiny_dense_model(), config, calibration=[{"input_ids": many_tokens()}])
    ups, gates = (
        [module.threshold.item() for name, module in metered_modules(model).items() if name.endswith(part)]  # type: ignore[union-attr, operator]
        for part in ("up_proj", "gate_proj")
    )
    assert ups != gates


@torch.no_grad()
def test_wina_weighs_inputs_by_the_norms_of_their_columns() -> None:
    dense = tiny_dense_model()
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight[:, :16] = 0
        dense.model.layers[0].mlp.gate_proj.weight[:, 16:] = 0
    model: Any = lte.sparsify_(copy.deepcopy(dense), WinaConfig(target_sparsity=0.5))
    mlp, x = model.model.layers[0].mlp, torch.randn(5, 32)
    plain = dense.model.layers[0].mlp
    # Half of the columns are 0: skipping them changes nothing, and the two projections skip different halves.
    torch.testing.assert_close(mlp.up_proj(x), plain.up_proj(x))
    torch.testing.assert_close(mlp.gate_proj(x), plain.gate_proj(x))
    hidden = torch.randn(5, NEURONS)
    scores = hidden.abs() * plain.down_proj.weight.norm(dim=0)
    kept = torch.zeros_like(hidden).scatter(1, scores.topk(NEURONS // 2).indices, 1.0)
    torch.testing.assert_close(mlp.down_proj(hidden), plain.down_proj(hidden * kept))


def test_wina_is_nearer_to_the_dense_model_than_magnitudes_alone() -> None:
    dense, ids = tiny_dense_model(), many_tokens()
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.mlp.down_proj.weight *= torch.rand(NEURONS) ** 2
    wina = lte.sparsify_(copy.deepcopy(dense), WinaConfig(target_sparsity=0.5))
    by_magnitude = copy.deepcopy(wina)
    for module in metered_modules(by_magnitude).values():
        module.input_norms.fill_(1)  # type: ignore[union-attr, operator]
    assert errors(wina, dense, ids) < errors(by_magnitude, dense, ids)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_quantiles_of_magnitudes_are_right_and_do_not_depend_on_order(share: float) -> None:
    values = torch.randn(5000)
    histogram, other = MagnitudeHistogram(), MagnitudeHistogram()
    for part in values.split(700):
        histogram.update(part)
    for part in values.flip(0).split(900):
        other.update(part)
    found = histogram.quantile(share)
    assert found == other.quantile(share)
    assert (values.abs() <= found).float().mean().item() == pytest.approx(share, abs=2e-3)
    assert found == pytest.approx(values.abs().quantile(share).item() if share else 0.0, rel=3e-3)


def test_activations_that_are_not_finite_are_told() -> None:
    dense = tiny_dense_model()
    with torch.no_grad():
        dense.model.layers[0].mlp.gate_proj.weight[0] = float("nan")
    with pytest.raises(ValueError, match="activations must be finite, got NaN or infinity; the weights are damaged"):
        lte.sparsify_(dense, CatsConfig(), calibration=calibration_batches())


def test_teal_fits_anew_from_the_dense_function() -> None:
    config = TealConfig(allocation="greedy", greedy_step=0.1)
    model = lte.sparsify_(tiny_dense_model(), config, calibration=calibration_batches())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lte.calibrate_(model, calibration_batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_fixed_count_is_kept_whatever_the_ties() -> None:
    assert keep_largest(torch.zeros(3, 8), 2).sum(-1).tolist() == [2, 2, 2]
    assert [kept_count(64, target) for target in (0.0, 0.5, 0.99)] == [64, 32, 1]


def test_projections_of_both_sides_are_refused() -> None:
    for config in (TealConfig(linears="block"), WinaConfig(linears="block")):
        with pytest.raises(ValueError, match="linears must be 'ffn' for t5, whose decoder reads tokens of both sides"):
            lte.sparsify_(tiny_dense_model("t5"), config, calibration=calibration_batches())


@pytest.mark.parametrize(
    ("config_class", "settings", "message"),
    [
        (KlaConfig, {"granularity": "layer"}, "granularity must be one of neuron, expert, got granularity='layer'"),
        (KlaConfig, {"expert_size": 0}, "expert_size must be at least 1, got expert_size=0"),
        (CatsConfig, {"target_sparsity": 1.0}, r"target_sparsity must lie in \[0, 1\), got target_sparsity=1.0"),
        (TealConfig, {"allocation": "equal"}, "allocation must be one of uniform, greedy, got allocation='equal'"),
        (TealConfig, {"linears": "all"}, "linears must be one of ffn, block, got linears='all'"),
        (TealConfig, {"greedy_step": 0}, r"greedy_step must lie in \(0, 1\], got greedy_step=0"),
        (WinaConfig, {"linears": "all"}, "linears must be one of ffn, block, got linears='all'"),
    ],
)
def test_wrong_settings_are_refused(config_class: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_class(**settings)
