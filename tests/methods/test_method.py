"""The contract of all methods: a new one in one place, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lte
from lte.eval.sparsity import measure_sparsity
from lte.hf.loading import INSTALLERS, NO_KERNELS
from lte.methods import METHODS, Method, MethodConfig, config_of, register
from lte.methods.cats import CatsConfig
from lte.methods.method import wraps_ffns
from lte.methods.neuron_ffn import NeuronFfn
from lte.methods.random_router import RandomRouterConfig
from tests.methods.methods import EVERY_METHOD, calibration_batches, config_for, made
from tests.tiny_models import logits_of, tiny_dense_model, tiny_sparse_model

STOCK_LOADING = """
import sys, transformers
for load in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM):
    try:
        load.from_pretrained(sys.argv[1])
    except Exception as error:
        print(type(error).__name__, str(error)[:2000].replace("\\n", " "))
    else:
        print("loaded")
"""


@dataclass(frozen=True, kw_only=True)
class EveryOtherConfig(MethodConfig):
    name = "every_other"
    offset: int = 0


class EveryOtherFfn(NeuronFfn):
    """Keeps every other neuron: as much of a method as a file must hold."""

    def __init__(self, stock: Any, config: EveryOtherConfig):
        super().__init__(stock, config)
        self.offset = config.offset

    def multipliers(self, x: Tensor, activated: Tensor, hidden: Tensor) -> Tensor:
        kept = torch.zeros_like(hidden)
        kept[..., self.offset :: 2] = 1
        return kept


@pytest.fixture
def every_other() -> Iterator[Method]:
    yield register(Method(config=EveryOtherConfig, install=wraps_ffns(EveryOtherFfn)))
    del METHODS["every_other"], INSTALLERS["every_other"], NO_KERNELS["every_other"]


def test_a_new_method_is_one_class_and_one_line(every_other: Method, tokens: Tensor, tmp_path: Path) -> None:
    model: Any = lte.sparsify_(tiny_dense_model(), EveryOtherConfig(offset=1))
    assert measure_sparsity(model, calibration_batches()).sparsity == 0.5
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, tokens), logits_of(model, tokens))
    assert config_of(loaded) == EveryOtherConfig(offset=1)
    assert config_of(tiny_dense_model()) is None


def test_a_folder_of_a_method_that_is_not_registered_is_refused(every_other: Method, tmp_path: Path) -> None:
    model: Any = lte.sparsify_(tiny_dense_model(), EveryOtherConfig())
    model.save_pretrained(tmp_path)
    install = INSTALLERS.pop("every_other")
    with pytest.raises(ValueError, match=r"must name one of cats, .*, got name=every_other; import the module"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    INSTALLERS["every_other"] = install


def test_the_package_exports_the_config_of_every_method() -> None:
    for method in METHODS.values():
        assert getattr(lte, method.config.__name__) is method.config
        assert method.config.__name__ in lte.__all__


def test_names_are_taken_once() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(MethodConfig):
        name = "cats"

    with pytest.raises(ValueError, match="name must be new, got name=cats, which CatsConfig has; take another"):
        register(Method(config=Other))
    assert METHODS["cats"].config is CatsConfig
    with pytest.raises(ValueError, match=r"method must be one of .* got method='no method'"):
        lte.sparsify_(tiny_dense_model(), type("Unknown", (MethodConfig,), {"name": "no method"})())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "teal"}, "name must be cats, got name='teal'"),
        ({"version": 99}, "saved by a newer lte: its config has version=99"),
        ({"size": 1}, "a config of cats must hold known fields only, got size"),
    ],
)
def test_a_config_of_another_kind_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CatsConfig.from_dict({**CatsConfig().to_dict(), **change})


def test_models_that_are_not_dense_are_refused() -> None:
    with pytest.raises(ValueError, match="model must be dense, got an LTE model"):
        lte.sparsify_(tiny_sparse_model(), CatsConfig(), calibration=calibration_batches())
    for name in ("cats", "teal"):
        for model_type in ("llama", "bert"):
            model = made(name, model_type)
            with pytest.raises(ValueError, match=r"model must be dense, got Lte.*, which a method changed"):
                lte.sparsify_(model, CatsConfig(), calibration=calibration_batches())
            with pytest.raises(ValueError, match="model must be dense, got Lte"):
                lte.sparsify_(model, lte.LteConfig(expert_size=8))


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_what_keeps_its_dense_weights_becomes_dense_again(
    method: str, model_type: str, tokens: Tensor, tmp_path: Path, relative_rms: Any
) -> None:
    dense, model = tiny_dense_model(model_type), made(method, model_type)
    if METHODS[config_for(method).name].leaves_stock:
        with pytest.raises(
            ValueError, match=r"must hold its dense weights .* changed them for good .*; load the dense"
        ):
            lte.densify_(model)
        return
    back: Any = lte.densify_(model)
    assert type(back) is type(dense)
    assert {name: type(module) for name, module in back.named_modules()} == {
        name: type(module) for name, module in dense.named_modules()
    }
    assert back.state_dict().keys() == dense.state_dict().keys()
    # Neurons that were grouped stay in their new order.
    assert relative_rms(logits_of(back, tokens), logits_of(dense, tokens)) <= 1e-5
    assert config_of(back) is None
    back.save_pretrained(tmp_path)
    assert "lte" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="model must be an LTE model or one of another method, got"):
        lte.densify_(back)


def test_a_model_says_why_no_kernel_runs_it() -> None:
    for name, why in (("teal", "computed densely and masked"), ("static_pruning", "fewer neurons"), ("wanda", "zeros")):
        with pytest.raises(ValueError, match=f"got one of the method {name}, for which there are none: .*{why}"):
            lte.accelerate_(made(name))


def test_thresholds_are_fitted_anew_after_training() -> None:
    model: Any = made("cats")
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight *= 0.1
    assert measure_sparsity(model, calibration_batches()).layer_sparsity[0] > 0.7
    assert lte.calibrate_(model, calibration_batches()) is model
    assert measure_sparsity(model, calibration_batches()).layer_sparsity[0] == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="cats must get calibration data, got none"):
        lte.calibrate_(model, [])
    for other, name in ((tiny_dense_model(), "a dense one"), (made("kla"), "one of the method kla")):
        with pytest.raises(ValueError, match=f"model must be of a method that has thresholds .* to set, got {name}"):
            lte.calibrate_(other, calibration_batches())


@pytest.mark.parametrize("method", ["cats", "teal", "wanda", "deja_vu", "moefication", "static_pruning"])
def test_missing_calibration_is_told_before_anything_changes(method: str) -> None:
    model, config = tiny_dense_model(), config_for(method)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{method} must get calibration batches, got none; pass calibration"):
        lte.sparsify_(model, config)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert type(model).__name__ == "LlamaForCausalLM"


def test_experts_that_do_not_fit_change_nothing() -> None:
    model = tiny_dense_model()
    with pytest.raises(ValueError, match="expert_size must divide the number of FFN neurons"):
        lte.sparsify_(model, RandomRouterConfig(expert_size=48))
    assert type(model).__name__ == "LlamaForCausalLM"


def test_a_pruned_model_becomes_an_lte_model_that_loads_as_one(tokens: Tensor, tmp_path: Path) -> None:
    model = lte.sparsify_(tiny_dense_model(), config_for("static_pruning"), calibration=calibration_batches())
    sparse: Any = lte.sparsify_(model, lte.LteConfig(expert_size=8, grouping="random"))
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert lte.sparse_ffns(loaded)
    assert torch.equal(logits_of(loaded, tokens), logits_of(sparse, tokens))


def test_models_do_not_share_what_is_written_into_a_config() -> None:
    dense = tiny_dense_model()
    twin = type(dense)(dense.config)
    lte.sparsify_(dense, CatsConfig(), calibration=calibration_batches())
    assert type(twin.config).__name__ == "LlamaConfig"
    assert not hasattr(twin.config, "lte")


def test_stock_transformers_refuses_a_folder_of_a_method(tmp_path: Path) -> None:
    model: Any = lte.sparsify_(tiny_dense_model(), CatsConfig(), calibration=calibration_batches())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["lte"]["name"] == "cats"
    command = [sys.executable, "-c", STOCK_LOADING, str(tmp_path)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "loaded" not in line.split(), line
        assert "lte_llama" in line or "import lte" in line, line
