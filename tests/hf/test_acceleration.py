"""An accelerated model computes, trains and saves as the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lte
from lte.eval.sparsity import measure_sparsity
from lte.hf.acceleration import describe_kernels
from lte.hf.threshold import set_threshold_
from lte.nn.sparse_ffn import SparseFfn
from lte.ops import dispatch
from lte.ops.dispatch import FfnRunner
from lte.ops.paths import ExpectedUse
from tests.hf.accelerated_models import TOLERANCE, first_ffn, weight_bytes
from tests.tiny_models import (
    EXPERT_SIZE,
    NEURONS,
    auto_class,
    logits_of,
    num_ffns,
    num_inputs,
    randomise_routers_,
    tiny_dense_model,
    tiny_sparse_model,
)

Measure = Callable[[Tensor, Tensor], float]


def low_rank_model() -> Any:
    model = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=EXPERT_SIZE, router_rank=4))
    return randomise_routers_(model)


@pytest.mark.parametrize("length", [1, 7, 20])
def test_logits_of_every_family(model_type: str, length: int, calls: list[int], relative_rms: Measure) -> None:
    model = tiny_sparse_model(model_type)
    tokens = torch.randint(3, 99, (2, length))
    expected = logits_of(model, tokens)
    assert lte.accelerate_(model) is model
    assert lte.is_accelerated(model)
    assert relative_rms(logits_of(model, tokens), expected) <= TOLERANCE
    assert calls == [2 * length] * num_ffns(model_type)


@pytest.mark.parametrize("length", [1, 20])
def test_low_rank_routers(length: int, relative_rms: Measure) -> None:
    model, tokens = low_rank_model(), torch.randint(3, 99, (1, length))
    expected = logits_of(model, tokens)
    lte.accelerate_(model)
    assert first_ffn(model).router_rows is None
    assert relative_rms(logits_of(model, tokens), expected) <= TOLERANCE


def test_parameters_are_views_of_one_tensor(model_type: str) -> None:
    model = tiny_sparse_model(model_type)
    before, names = weight_bytes(model), [name for name, _ in model.named_parameters()]
    lte.accelerate_(model)
    assert [name for name, _ in model.named_parameters()] == names
    ffn = first_ffn(model)
    assert ffn.stacked is not None
    inputs = [name for name in ffn.layout.projections if name != ffn.layout.down]
    for name in inputs:
        weight = ffn.part(name).weight
        assert weight.untyped_storage().data_ptr() == ffn.stacked.untyped_storage().data_ptr()
        assert weight.requires_grad
    assert ffn.layout.matrix(ffn.part(ffn.layout.down)).stride() == (1, 32)
    shares = ffn.router.weight.untyped_storage().data_ptr() == ffn.stacked.untyped_storage().data_ptr()
    assert shares == (model_type != "gpt2"), "which stores its weights transposed"
    # What is new is the rows that fill the stacked tensor up.
    filling = ffn.stacked.shape[0] - num_inputs(model_type) * NEURONS - shares * ffn.num_experts
    extra = len(lte.sparse_ffns(model)) * filling * 32 * 4
    assert weight_bytes(model) == before + extra


def test_back_again_is_bit_equal(model_type: str, tokens: Tensor) -> None:
    model = tiny_sparse_model(model_type)
    expected, state = logits_of(model, tokens), copy.deepcopy(model.state_dict())
    before = weight_bytes(model)
    assert lte.decelerate_(lte.accelerate_(model)) is model
    assert not lte.is_accelerated(model)
    assert all(type(ffn) is SparseFfn for ffn in lte.sparse_ffns(model).values())
    assert torch.equal(logits_of(model, tokens), expected)
    assert weight_bytes(model) == before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert tensor.is_contiguous()
    assert not any(ffn._load_state_dict_post_hooks for ffn in lte.sparse_ffns(model).values())


def test_twice_changes_nothing(tokens: Tensor) -> None:
    model = lte.accelerate_(tiny_sparse_model())
    pointer = first_ffn(model).stacked.data_ptr()
    lte.accelerate_(model)
    assert first_ffn(model).stacked.data_ptr() == pointer
    lte.decelerate_(lte.decelerate_(model))
    assert not lte.is_accelerated(model)


def test_a_saved_folder_is_that_of_the_plain_model(model_type: str, tmp_path: Path, tokens: Tensor) -> None:
    model = tiny_sparse_model(model_type)
    model.save_pretrained(tmp_path / "plain")
    lte.accelerate_(model).save_pretrained(tmp_path / "accelerated")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "accelerated" / file).read_bytes()
    loaded = auto_class(model_type).from_pretrained(tmp_path / "accelerated").eval()
    assert torch.equal(logits_of(lte.accelerate_(loaded), tokens), logits_of(model, tokens))


def test_a_folder_in_shards(tmp_path: Path) -> None:
    model = tiny_sparse_model()
    model.save_pretrained(tmp_path / "plain", max_shard_size="20KB")
    lte.accelerate_(model).save_pretrained(tmp_path / "accelerated", max_shard_size="20KB")
    files = sorted((tmp_path / "plain").glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        other = load_file(tmp_path / "accelerated" / file.name)
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor, other[name])


@pytest.mark.parametrize("mode", ["dense", "soft", "straight_through"])
def test_other_modes_are_those_of_the_plain_model(
    mode: str, tokens: Tensor, calls: list[int], relative_rms: Measure
) -> None:
    model = tiny_sparse_model()
    fast = lte.accelerate_(copy.deepcopy(model))
    for network in (model, fast):
        for ffn in lte.sparse_ffns(network).values():
            ffn.set_mode(mode)  # type: ignore[arg-type]
    assert relative_rms(logits_of(fast, tokens), logits_of(model, tokens)) <= TOLERANCE
    assert not calls


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_training_steps_are_those_of_the_plain_model(mode: str, tokens: Tensor, relative_rms: Measure) -> None:
    plain, fast = tiny_sparse_model(), lte.accelerate_(tiny_sparse_model())
    for model in (plain, fast):
        for ffn in lte.sparse_ffns(model).values():
            ffn.set_mode(mode)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
        for ffn in lte.sparse_ffns(model).values():
            ffn.set_mode("hard")
    start = tiny_sparse_model().state_dict()
    for name, parameter in fast.state_dict().items():
        assert relative_rms(parameter, plain.state_dict()[name]) <= 1e-4, name
        assert ("router" in name and mode == "hard") or not torch.equal(parameter, start[name]), name
    # The kernels see what training changed, the routers' rows included.
    assert relative_rms(logits_of(fast, tokens), logits_of(plain, tokens)) <= 1e-4


def test_gradients_are_wanted_or_not(tokens: Tensor, calls: list[int]) -> None:
    model = lte.accelerate_(tiny_sparse_model())
    model(tokens)
    assert not calls
    model.requires_grad_(False)
    model(tokens)
    assert len(calls) == 2
    with torch.inference_mode():
        model(tokens)
    assert len(calls) == 4


@pytest.mark.parametrize("length", [3, 20])
def test_measured_sparsity_is_that_of_the_kernels(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lte.accelerate_(tiny_sparse_model().to(torch.bfloat16))
    given: list[Tensor] = []
    call = dispatch.FfnRunner.__call__

    def record(self: Any, x: Tensor, logits: Tensor | None, in_a_row: bool) -> Tensor:
        assert logits is not None
        given.append((logits > self.routing.threshold).float().mean(1))
        return call(self, x, logits, in_a_row)

    monkeypatch.setattr(dispatch.FfnRunner, "__call__", record)
    batch = {"input_ids": torch.randint(3, 99, (1, length))}
    measured = measure_sparsity(model, [batch])
    assert measured.sparsity == pytest.approx(1 - torch.stack(given).mean().item())
    assert 0.2 < measured.sparsity < 0.8


def test_densified_models_are_stock(tokens: Tensor) -> None:
    plain = lte.densify_(tiny_sparse_model())
    model = lte.densify_(lte.accelerate_(tiny_sparse_model()))
    assert torch.equal(logits_of(model, tokens), logits_of(plain, tokens))
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_the_measured_share_reaches_the_kernels() -> None:
    model = tiny_sparse_model()
    unions = {"texts": {"2": [0.4, 0.9], "16": [0.9, 1.0]}, "row": {"2": [0.3, 0.8]}}
    model.config.lte_measurement = {"active_fraction": [0.25, 0.75], "union_fraction": unions}
    lte.accelerate_(model)
    uses = [ffn._runner.use for ffn in lte.sparse_ffns(model).values()]  # type: ignore[attr-defined]
    assert uses == [
        ExpectedUse(0.25, ((2, 0.4), (16, 0.9)), ((2, 0.3),)),
        ExpectedUse(0.75, ((2, 0.9), (16, 1.0)), ((2, 0.8),)),
    ]
    other = tiny_sparse_model()
    assert first_ffn(lte.accelerate_(other))._runner.use is None
    # Unions are those of one threshold.
    set_threshold_(model, 0.5)
    assert first_ffn(model)._runner.use == uses[0]
    set_threshold_(model, 0.6)
    assert first_ffn(model)._runner.use == ExpectedUse(0.25)


@pytest.mark.parametrize(("model_type", "heard"), [("llama", True), ("gpt2", True), ("opt", False)])
def test_the_kernels_hear_whether_tokens_follow_each_other(
    model_type: str, heard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, told = lte.accelerate_(tiny_sparse_model(model_type)), []
    original = FfnRunner.__call__

    def noting(self: FfnRunner, x: Tensor, logits: Tensor | None = None, in_a_row: bool = False) -> Tensor:
        told.append((len(x), in_a_row))
        return original(self, x, logits, in_a_row)

    monkeypatch.setattr(FfnRunner, "__call__", noting)
    with torch.no_grad():
        for shape in ((1, 3), (3, 1), (2, 3)):
            model(input_ids=torch.ones(shape, dtype=torch.long))
    assert told[:: len(lte.sparse_ffns(model))] == [(3, heard), (3, False), (6, False)]


def test_what_runs_is_told() -> None:
    model = tiny_sparse_model()
    assert describe_kernels(model) is None
    assert describe_kernels(lte.accelerate_(model)) == {"weights": "native", "decode": "numba", "prefill": "pytorch"}
    assert "kernels=native" in repr(model)
    lte.accelerate_(lte.decelerate_(model), "int8")
    assert describe_kernels(model)["weights"] == "int8"  # type: ignore[index]
