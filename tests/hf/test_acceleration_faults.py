"""What cannot be accelerated is refused before anything is changed; what int8 weights cannot do is said."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

import lte
from lte.hf import acceleration
from lte.hf.activations import activation_name
from lte.ops.activations import ACTIVATIONS
from lte.ops.quantize import dequantize_rows, quantize_rows
from tests.hf.accelerated_models import first_ffn, weight_bytes
from tests.processes import run_processes
from tests.tiny_models import logits_of, num_ffns, num_inputs, tiny_dense_model, tiny_sparse_model

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def last_ffn(model: Any) -> Any:
    return list(lte.sparse_ffns(model).values())[-1]


def first_sparse(model: Any) -> Any:
    return next(iter(lte.sparse_ffns(model).values()))


def refuse(model: Any, message: str, weights: Any = "native") -> None:
    """Checks the message, and that no FFN was touched: the fault is in the last one."""
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        lte.accelerate_(model, weights)
    assert not lte.is_accelerated(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers


class Quantized(nn.Linear):
    """Stands for a quantiser's own class."""


class TestRefused:
    def test_a_dense_model(self) -> None:
        with pytest.raises(ValueError, match="model must be an LTE model, got one without sparse FFNs"):
            lte.accelerate_(tiny_dense_model())
        with pytest.raises(ValueError, match="model must be an LTE model, got one without sparse FFNs"):
            lte.decelerate_(tiny_dense_model())
        assert not lte.is_accelerated(tiny_dense_model())

    def test_a_name_of_no_format(self) -> None:
        refuse(tiny_sparse_model(), "weights must be one of native, int8, got weights='int9'", "int9")

    def test_another_format_than_that_of_now(self) -> None:
        model = lte.accelerate_(tiny_sparse_model(), "int8")
        with pytest.raises(ValueError, match=r"weights must be int8, as .*mlp is accelerated already, got weights=nat"):
            lte.accelerate_(model)
        lte.accelerate_(lte.decelerate_(model))

    @pytest.mark.parametrize("projection", PROJECTIONS)
    def test_a_class_of_its_own(self, projection: str) -> None:
        model = tiny_sparse_model()
        linear = getattr(last_ffn(model), projection)
        setattr(last_ffn(model), projection, Quantized(linear.in_features, linear.out_features, bias=False))
        message = rf"layers.1.mlp.{projection} must be a plain floating-point nn.Linear, got Quantized; .*merge_and_unl"
        refuse(model, message)

    def test_lora(self) -> None:
        model = tiny_sparse_model()
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=[1]))
        refuse(
            model, r"layers.1.mlp.down_proj must be a plain floating-point nn.Linear, got Linear; .*merge_and_unload"
        )

    def test_weights_of_whole_numbers(self) -> None:
        model = tiny_sparse_model()
        last_ffn(model).up_proj.weight = nn.Parameter(torch.ones(64, 32, dtype=torch.int8), requires_grad=False)
        refuse(model, "up_proj must be a plain floating-point nn.Linear")

    def test_dtypes_without_kernels(self) -> None:
        refuse(
            tiny_sparse_model().double(), r"gate_proj must hold float32, float16 or bfloat16 weights, got torch.floa"
        )

    def test_two_dtypes_in_one_ffn(self) -> None:
        model = tiny_sparse_model()
        last_ffn(model).up_proj.half()
        refuse(model, r"layers.1.mlp must hold weights of one dtype, got torch.float32, torch.float16, torch.float32")

    def test_an_expert_size_without_kernels(self) -> None:
        model = lte.sparsify_(tiny_dense_model(), lte.LteConfig(expert_size=4))
        refuse(model, "expert_size must be one of 8, 16, 32, 64 for the kernels, got expert_size=4")

    def test_an_activation_without_a_kernel(self) -> None:
        model = tiny_sparse_model()
        last_ffn(model).act_fn = nn.Tanh()
        refuse(model, r"the activation of .*layers.1.mlp must be one of silu, gelu, gelu_tanh, relu, relu2, got Tanh")

    def test_weights_that_are_not_there(self) -> None:
        refuse(tiny_sparse_model().to("meta"), "gate_proj must hold its weights, got a meta tensor")

    def test_a_layer_on_two_devices(self) -> None:
        model = tiny_sparse_model()
        last_ffn(model).router.to("meta")
        refuse(model, "layers.1.mlp must lie on one device")


@pytest.mark.parametrize("name", sorted(set(ACT2FN) - {"xielu", "prelu"}))
def test_names_of_activations_are_true(name: str, relative_rms: Callable[[Tensor, Tensor], float]) -> None:
    """A name stands for the same function; a function without a name is none of those that have one."""
    activation, x = ACT2FN[name], torch.linspace(-14, 14, 1401)
    found = activation_name(activation)
    near = {known for known, function in ACTIVATIONS.items() if relative_rms(function(x), activation(x)) < 1e-6}
    assert (found in near) if found else not near


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.functional.silu, "silu"),
        (nn.functional.gelu, "gelu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (torch.relu, "relu"),
        *((function, name) for name, function in ACTIVATIONS.items()),
        (torch.tanh, None),
        (lambda x: x, None),
    ],
)
def test_functions_and_modules_of_pytorch(activation: Any, name: str | None) -> None:
    assert activation_name(activation) == name


class TestInt8:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_weights_take_their_share_of_the_bytes(self, dtype: torch.dtype, model_type: str) -> None:
        model = tiny_sparse_model(model_type).to(dtype)
        before = weight_bytes(model)
        lte.accelerate_(model, "int8")
        layers, inputs = num_ffns(model_type), num_inputs(model_type)
        count = layers * (inputs + 1) * 64 * 32
        # The router is rounded to the dtype of the hidden states, if that is not its own.
        scales, router_rows = layers * (inputs * 64 + 32) * 4, 0
        assert weight_bytes(model) == before - count * (dtype.itemsize - 1) + scales + router_rows

    def test_it_computes_what_its_rounded_weights_say(
        self, model_type: str, tokens: Tensor, relative_rms: Callable[[Tensor, Tensor], float]
    ) -> None:
        model = tiny_sparse_model(model_type)
        fast = lte.accelerate_(copy.deepcopy(model), "int8")
        actual = logits_of(fast, tokens)
        back = lte.decelerate_(copy.deepcopy(fast))
        assert relative_rms(actual, logits_of(back, tokens)) <= 1e-5
        assert 1e-4 < relative_rms(actual, logits_of(model, tokens)) < 0.1

    def test_decelerated_weights_are_the_rounded_ones(self) -> None:
        plain = tiny_sparse_model()
        last_ffn(plain).gate_proj.weight.requires_grad_(False)
        model = lte.decelerate_(lte.accelerate_(copy.deepcopy(plain), "int8"))
        for ffn, original in zip(lte.sparse_ffns(model).values(), lte.sparse_ffns(plain).values(), strict=True):
            for name in PROJECTIONS:
                weight, start = getattr(ffn, name).weight, getattr(original, name).weight
                assert torch.equal(weight, dequantize_rows(*quantize_rows(start)))
                assert weight.is_contiguous()
                assert weight.requires_grad == start.requires_grad
        model(torch.tensor([[5, 6]])).logits.sum().backward()
        assert first_sparse(model).up_proj.weight.grad.any()

    def test_saving_and_loading_are_refused(self, tmp_path: Path) -> None:
        model = lte.accelerate_(tiny_sparse_model(), "int8")
        for save in (model.state_dict, lambda: model.save_pretrained(tmp_path / "model")):
            with pytest.raises(
                ValueError, match=r"weights must be floating-point to be saved, got int8; .*decelerate_"
            ):
                save()
        assert not list(tmp_path.iterdir())
        with pytest.raises(ValueError, match=r"weights must be floating-point to load others into them, got int8"):
            model.load_state_dict(tiny_sparse_model().state_dict())
        lte.decelerate_(model).save_pretrained(tmp_path / "model")

    def test_only_hard_mode_without_gradients_runs(self, tokens: Tensor) -> None:
        model = lte.accelerate_(tiny_sparse_model(), "int8")
        with pytest.raises(ValueError, match=r"int8 weights must run in hard mode, in torch.no_grad.* got mode=hard"):
            model(tokens)
        for ffn in lte.sparse_ffns(model).values():
            ffn.set_mode("soft")
        with pytest.raises(ValueError, match=r"got mode=soft, x=torch.float32, grad_enabled=False"):
            logits_of(model, tokens)

    def test_casts_keep_the_scales(self, tokens: Tensor, relative_rms: Callable[[Tensor, Tensor], float]) -> None:
        model = lte.accelerate_(tiny_sparse_model(), "int8")
        scales, expected = first_ffn(model).up_scale.clone(), logits_of(model, tokens)
        model.to(torch.bfloat16)
        assert torch.equal(first_ffn(model).up_scale, scales)
        assert first_ffn(model).router_rows.dtype == torch.bfloat16
        assert relative_rms(logits_of(model, tokens), expected) < 0.1
        weight = first_ffn(lte.decelerate_(model) and lte.accelerate_(model)).up_proj.weight
        assert weight.dtype == torch.bfloat16


def test_all_but_the_kernels_works_without_triton_and_numba() -> None:
    assert "all is well" in run_processes(1, "tests.hf.without_kernels")


def test_an_amd_gpu_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(acceleration, "HAS_TRITON", True)
    with pytest.raises(ValueError, match="must be on an NVIDIA GPU or the CPU for kernels, got an AMD GPU"):
        acceleration._check_device("mlp", torch.device("cuda"))
    with pytest.raises(ValueError, match="must be on a CUDA device or the CPU, got mps"):
        acceleration._check_device("mlp", torch.device("mps"))
