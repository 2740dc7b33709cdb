"""What `sparsify_` and `densify_` refuse, and that a refused model is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM

import lte
from lte.hf import convert
from lte.hf.families import FAMILIES, block_name
from tests.tiny_models import EXPERT_SIZE, row_of, tiny_config, tiny_dense_model, tiny_sparse_model

CONFIG = lte.LteConfig(expert_size=EXPERT_SIZE, grouping="random")


@contextmanager
def refused_unchanged(model: nn.Module, message: str) -> Iterator[None]:
    """Expects a `ValueError` and a model of the same class, config, modules and weights after it."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    config = copy.deepcopy(getattr(model, "config", None))
    with pytest.raises(ValueError, match=message):
        yield
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert type(getattr(model, "config", None)) is type(config)
    if config is not None:
        assert model.config.to_dict() == config.to_dict()  # type: ignore[union-attr,operator]
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in state.items() if not value.is_meta)


def test_unknown_family_names_the_known_ones() -> None:
    model = AlbertForMaskedLM(
        AlbertConfig(vocab_size=9, embedding_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2)
    )
    with refused_unchanged(model, r"must be one of llama, mistral, .*phi3, .*got model_type='albert'.*FAMILIES"):
        lte.sparsify_(model, CONFIG)


def test_model_without_config() -> None:
    with pytest.raises(ValueError, match="model_type must be one of llama"):
        lte.sparsify_(nn.Linear(2, 2), CONFIG)


def test_nothing_to_convert(model_type: str) -> None:
    model = tiny_dense_model(model_type)
    for name in {block_name(name).rpartition(".")[0] for name in convert.dense_ffns(model, row_of(model_type))}:
        model.set_submodule(name, nn.ModuleList())
    with refused_unchanged(model, f"must contain {row_of(model_type).ffn_class} modules, got none"):
        lte.sparsify_(model, CONFIG)


def test_already_sparse(model_type: str) -> None:
    model = tiny_sparse_model(model_type)
    with refused_unchanged(model, "model must be dense, got an LTE model"):
        lte.sparsify_(model, CONFIG)


def test_expert_size_must_divide_the_neurons(model_type: str) -> None:
    model = tiny_dense_model(model_type)
    with refused_unchanged(model, r"expert_size must divide .* expert_size=7"):
        lte.sparsify_(model, lte.LteConfig(expert_size=7, grouping="random"))


def test_failure_in_a_later_layer_leaves_the_first_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    group, calls = convert.group_neurons, []

    def fail_second(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(None)
        if len(calls) == 2:
            raise ValueError("no grouping today")
        return group(*args, **kwargs)

    monkeypatch.setattr(convert, "group_neurons", fail_second)
    with refused_unchanged(model := tiny_dense_model(), "no grouping today"):
        lte.sparsify_(model, CONFIG)


class QuantisedLinear(nn.Linear):
    """Stands for the linear of a quantisation library."""


class QuantisedTensor(torch.Tensor):
    """Stands for a weight that is quantised inside and pretends to be floating point."""


def last_ffn(model: Any, model_type: str) -> tuple[str, nn.Module]:
    return list(convert.dense_ffns(model, row_of(model_type)).items())[-1]


def test_quantised_module_is_refused(model_type: str) -> None:
    model = tiny_dense_model(model_type)
    name, ffn = last_ffn(model, model_type)
    down = row_of(model_type).layout.down
    ffn.set_submodule(down, QuantisedLinear(64, 32, bias=False))
    with refused_unchanged(model, f"{name}.{down} must be a plain .*QuantisedLinear.*without quantisation"):
        lte.sparsify_(model, CONFIG)


def test_quantised_tensor_is_refused() -> None:
    model = tiny_dense_model()
    _, ffn = last_ffn(model, "llama")
    weight = ffn.get_submodule("down_proj").weight.detach()  # type: ignore[union-attr,operator]
    ffn.down_proj.weight = nn.Parameter(weight.as_subclass(QuantisedTensor))  # type: ignore[union-attr]
    with refused_unchanged(model, "down_proj must be a plain floating-point nn.Linear"):
        lte.sparsify_(model, CONFIG)


def test_integer_weights_are_refused() -> None:
    model = tiny_dense_model()
    _, ffn = last_ffn(model, "llama")
    ffn.up_proj.weight = nn.Parameter(  # type: ignore[union-attr]
        torch.zeros(64, 32, dtype=torch.int8), requires_grad=False
    )
    with refused_unchanged(model, "up_proj must be a plain floating-point nn.Linear"):
        lte.sparsify_(model, CONFIG)


def test_meta_weights_are_refused() -> None:
    with torch.device("meta"):
        model = FAMILIES["llama"].stock_class("LlamaForCausalLM")(tiny_config("llama"))
    with refused_unchanged(model, "gate_proj must hold its weights, got a meta tensor"):
        lte.sparsify_(model, CONFIG)


@pytest.mark.parametrize("wrapped", [True, False])
def test_other_adapters_than_lora_are_refused(wrapped: bool) -> None:
    model = tiny_dense_model()
    adapted = peft.get_peft_model(model, peft.IA3Config(target_modules=["down_proj"], feedforward_modules=[]))
    with refused_unchanged(model, r"down_proj must be a plain .*merge adapters that are not LoRA first"):
        lte.sparsify_(adapted if wrapped else model, CONFIG)


def test_models_that_share_a_config_object_stay_apart(model_type: str, tokens: Tensor) -> None:
    """`from_config` does not copy its argument: a dense teacher made from it must stay a stock model."""
    config = tiny_config(model_type)
    model_class = type(tiny_dense_model(model_type))
    student, teacher = model_class(config), model_class(config)
    assert student.config is teacher.config
    lte.sparsify_(student, CONFIG)
    stock_type = row_of(model_type).model_type
    assert teacher.config.model_type == config.model_type == stock_type
    assert student.base_model.config is student.config
    twin = type(student)(student.config)
    lte.densify_(student)
    assert twin.config.model_type == f"lte_{stock_type}"
    assert student.config.model_type == stock_type


def test_densify_needs_an_lte_model(model_type: str) -> None:
    model = tiny_dense_model(model_type)
    with refused_unchanged(model, f"model must be an LTE model or one of another method, got {type(model).__name__}"):
        lte.densify_(model)


def test_coactivation_needs_calibration() -> None:
    with refused_unchanged(model := tiny_dense_model(), "lte must get calibration batches, got none; pass calibration"):
        lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="coactivation"))


class RecordingCounts:
    """Takes the place of the counter and keeps what it is given."""

    seen: list[Tensor]

    def __init__(self, num_neurons: int):
        self.gram = torch.rand(num_neurons, num_neurons)
        self.seen = []
        instances.append(self)

    def update(self, hidden: Tensor) -> None:
        self.seen.append(hidden.clone())


instances: list[RecordingCounts] = []


def test_groups_by_chunks_need_a_whole_one() -> None:
    config = lte.LteConfig(expert_size=EXPERT_SIZE, grouping="chunks")
    rows, padded = torch.arange(3, 17).view(2, 7), torch.arange(3, 27).view(2, 12)
    mask = torch.ones_like(padded)
    mask[:, 7:] = 0
    for batch in ({"input_ids": rows}, {"input_ids": padded, "attention_mask": mask}):
        with refused_unchanged(
            model := tiny_dense_model(), "calibration must hold rows of at least 8 tokens for grouping=chunks, got none"
        ):
            lte.sparsify_(model, config, calibration=[batch])
    lte.sparsify_(tiny_dense_model(), config, calibration=[{"input_ids": rows}, {"input_ids": padded}])


def test_calibration_counts_no_padding(monkeypatch: pytest.MonkeyPatch, tokens: Tensor) -> None:
    monkeypatch.setattr(convert, "CoactivationCounts", RecordingCounts)
    monkeypatch.setattr(convert, "group_neurons", lambda features, num_neurons, **_: torch.arange(num_neurons))
    instances.clear()
    model = tiny_dense_model()
    expected: list[Tensor] = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: expected.append(args[0].clone())
    )
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    batches = [{"input_ids": tokens, "attention_mask": mask, "labels": tokens}, {"input_ids": tokens}]
    config = lte.LteConfig(expert_size=EXPERT_SIZE, grouping="coactivation")
    lte.sparsify_(model, config, calibration=batches)
    handle.remove()
    assert len(instances) == 2
    assert torch.equal(instances[0].seen[0], expected[0][mask.bool()])
    assert torch.equal(instances[0].seen[1], expected[1].flatten(0, 1))
    assert len(instances[0].seen) == 2, "the hooks must be gone"


def test_failing_calibration_leaves_the_model_unchanged(monkeypatch: pytest.MonkeyPatch, tokens: Tensor) -> None:
    monkeypatch.setattr(convert, "CoactivationCounts", RecordingCounts)

    def batches() -> Iterator[dict[str, Tensor]]:
        yield {"input_ids": tokens}
        raise ValueError("the text ran out")

    model = tiny_dense_model()
    with refused_unchanged(model, "the text ran out"):
        lte.sparsify_(model, lte.LteConfig(expert_size=EXPERT_SIZE, grouping="coactivation"), calibration=batches())
    assert not any(module._forward_pre_hooks for module in model.modules())


class TestShared:
    """One FFN, or one weight, in two places."""

    @pytest.mark.parametrize("kind", ["llama", "opt"])
    def test_one_ffn_in_two_layers(self, kind: str) -> None:
        model = tiny_dense_model(kind)
        first, second = list(convert.dense_ffns(model, row_of(kind)))
        model.set_submodule(second, model.get_submodule(first))
        with refused_unchanged(model, f"{second} must be an FFN of its own, got that of {first} in both places"):
            lte.sparsify_(model, CONFIG)

    @pytest.mark.parametrize("part", ["intermediate", "output"])
    def test_one_half_of_a_block_in_two(self, part: str) -> None:
        model = tiny_dense_model("bert")
        layers = model.bert.encoder.layer
        setattr(layers[1], part, getattr(layers[0], part))
        message = rf"bert.encoder.layer.1.{part}.dense must hold weights of its own, got those of bert.encoder.layer.0"
        with refused_unchanged(model, message):
            lte.sparsify_(model, CONFIG)

    def test_one_weight_in_two_layers(self) -> None:
        model = tiny_dense_model()
        layers = model.model.layers
        layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
        message = r"layers.1.mlp.up_proj must hold weights of its own, got those of model.layers.0.mlp.up_proj"
        with refused_unchanged(model, message):
            lte.sparsify_(model, CONFIG)

    def test_a_weight_that_is_read_elsewhere(self) -> None:
        model = tiny_dense_model()
        model.probe = nn.Linear(32, 64, bias=False)
        model.probe.weight = model.model.layers[1].mlp.up_proj.weight
        with refused_unchanged(model, r"layers.1.mlp.up_proj must hold weights of its own, got those of probe"):
            lte.sparsify_(model, CONFIG)

    def test_ffns_that_are_shared_later_become_dense_in_all_places(self, tokens: Tensor) -> None:
        model = tiny_sparse_model(routed=False)
        layers = model.model.layers
        layers[1].mlp = layers[0].mlp
        expected = model(tokens).logits
        lte.densify_(model)
        assert layers[1].mlp is layers[0].mlp
        assert type(layers[0].mlp).__name__ == "LlamaMLP"
        assert torch.allclose(model(tokens).logits, expected, atol=1e-5)
