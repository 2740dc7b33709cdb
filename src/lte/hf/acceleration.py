"""Switching a model to the kernels in place, and back."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lte.config import check_choice
from lte.hf.activations import activation_name
from lte.hf.install import require_sparse_ffns, sparse_ffns
from lte.hf.loading import NO_KERNELS, method_settings
from lte.hf.projections import is_plain_projection, projection_name
from lte.hf.stepping import forget_engine
from lte.nn.accelerated import AcceleratedFfn, Acceleration, WeightFormat
from lte.nn.all_or_nothing import all_or_nothing, keep_data, on_failure
from lte.nn.expert_mesh import expert_mesh
from lte.nn.quantized_ffn import QuantizedFfn
from lte.nn.shards import local, place_
from lte.nn.sparse_ffn import FfnLayout, SparseFfn
from lte.ops.activations import ACTIVATIONS
from lte.ops.arguments import DTYPES, EXPERT_SIZES
from lte.ops.dispatch import HAS_TRITON, kernel_names
from lte.ops.paths import expected_uses


def accelerate_(model: nn.Module, weights: WeightFormat = "native") -> nn.Module:
    """Switches the FFNs of an LTE model to the kernels in place and returns it.

    The kernels then compute hard mode wherever no gradient is wanted, reading the weights of the active experts alone
    for 1 to 16 tokens at a time; all else is computed as before. Layer by layer the weights are laid out as the
    kernels read them, in the same parameters, never all of them twice: training, `state_dict`, `save_pretrained`,
    `.to()` and LoRA go on working. An accelerated model is left as it is.

    Of a model that a tensor parallel plan of transformers spread over processes, each process runs its own experts, and
    the outputs are added up as the plan adds up those of the down projection. All processes must call this.

    Args:
        model: an LTE model in float32, float16 or bfloat16 on CUDA devices or the CPU; or one whose linear layers
            torchao quantised to 8 or 4 bits (`torchao.quantization.quantize_`), which then decodes by whole steps where
            an engine computes them, and otherwise as before.
        weights: `native` keeps them; `int8` rounds them to 8 bits with a scale per row. The model then
            does nothing but hard mode without gradients, and cannot be saved.

    Raises:
        ValueError: for a dense model, a method without kernels, an FFN that the kernels cannot compute, or whose
            experts a plan splits, a device without kernels, or a model that is accelerated with other `weights`. The
            model is then unchanged, as after any other failure on the way.
    """
    check_choice("weights", weights, get_args(WeightFormat))
    reason = no_kernels(model)
    if reason is not None:
        raise ValueError(f"model must be an LTE model to run on the kernels, got one of the method {reason}")
    ffns = require_sparse_ffns(model)
    uses = expected_uses(getattr(model.config, "lte_measurement", None), len(ffns))
    plans, told = {}, list[str]()
    for (name, ffn), use in zip(ffns.items(), uses, strict=True):
        if isinstance(ffn, AcceleratedFfn | QuantizedFfn):
            _check_same(name, ffn, weights)
        else:
            plans[name] = Acceleration(_check_ffn(name, ffn, weights), weights, use, name, told)
    rounded = {name for name in plans if QuantizedFfn.fits(ffns[name])}
    moved = [weight for name in plans if name not in rounded for weight in _weights(ffns[name])]
    if not plans:
        return model
    with all_or_nothing(model):
        if weights == "int8":
            keep_data(moved)
        else:
            _lay_back_on_failure(moved)
        for name, plan in plans.items():
            (QuantizedFfn if name in rounded else AcceleratedFfn).install_(ffns[name], plan)
    return model


def _weights(ffn: SparseFfn) -> list[nn.Parameter]:
    """The parameters that acceleration puts elsewhere."""
    found = [getattr(ffn.part(name), "weight", None) for name in ffn.layout.projections]
    return [weight for weight in (*found, ffn.router.weight) if isinstance(weight, nn.Parameter)]


def _lay_back_on_failure(weights: list[nn.Parameter]) -> None:
    before = {weight: local(weight).data_ptr() for weight in weights}

    def lay_back() -> None:
        # Without the memory for it they stay where they are, with the same numbers.
        with suppress(RuntimeError, MemoryError):
            for weight, pointer in before.items():
                held = local(weight).detach()
                if held.data_ptr() != pointer:
                    place_(weight, held.clone(memory_format=torch.contiguous_format))

    on_failure(lay_back)


def decelerate_(model: nn.Module) -> nn.Module:
    """Switches an accelerated model back to plain PyTorch in place and returns it; others are left as they are.

    Weights are contiguous again, and bit for bit what they were. After `weights="int8"` they are the rounded ones:
    what was rounded off does not come back.

    Raises:
        ValueError: for a dense model.
    """
    ffns = list(require_sparse_ffns(model).values())
    accelerated = [ffn for ffn in ffns if isinstance(ffn, AcceleratedFfn)]
    rounded = [ffn for ffn in ffns if isinstance(ffn, QuantizedFfn)]
    for ffn in accelerated:
        # What is kept for a failure would hold the copies.
        ffn.release_()
    forget_engine(model)
    with all_or_nothing(model):
        keep_data(weight for ffn in accelerated for weight in _weights(ffn) if not local(weight).is_floating_point())
        for ffn in accelerated:
            ffn.remove_()
        for quantized in rounded:
            quantized.remove_()
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether the model's FFNs run on the kernels."""
    return any(isinstance(ffn, AcceleratedFfn | QuantizedFfn) for ffn in sparse_ffns(model).values())


def no_kernels(model: nn.Module) -> str | None:
    """Which method made a model that no kernel can run, and why none can; `None` for a dense or LTE model."""
    name = (method_settings(getattr(model, "config", None)) or {}).get("name")
    return f"{name}, for which there are none: {NO_KERNELS[name]}" if name in NO_KERNELS else None


def describe_kernels(model: nn.Module) -> dict[str, str] | None:
    """What computes the FFNs of an accelerated model, JSON-ready; `None` for another.

    Returns:
        `weights` (native, int8, or torchao for what that quantised), and what runs 1 to 16 tokens (`decode`) and more
        (`prefill`), module by module.
    """
    ffn = next((ffn for ffn in sparse_ffns(model).values() if isinstance(ffn, AcceleratedFfn | QuantizedFfn)), None)
    if ffn is None:
        return None
    if isinstance(ffn, QuantizedFfn):
        return dict.fromkeys(("weights", "decode", "prefill"), "torchao")
    return {"weights": ffn.acceleration.weights, **kernel_names(ffn.router.weight.device, ffn.dtype)}


def _check_same(name: str, ffn: AcceleratedFfn | QuantizedFfn, weights: WeightFormat) -> None:
    if ffn.acceleration.weights != weights:
        raise ValueError(
            f"weights must be {ffn.acceleration.weights}, as {name} is accelerated already, got weights={weights}; "
            "call lte.decelerate_(model) first"
        )


def _check_ffn(name: str, ffn: SparseFfn, weights: WeightFormat) -> str:
    """The kernels' name for the FFN's activation, if they can compute it."""
    if ffn.router.context:
        raise ValueError(
            f"router_context must be 0 for the kernels, which route each token by itself, got {ffn.router.context} in "
            f"{name}; run the model without accelerate_"
        )
    try:
        expert_mesh(ffn)
    except ValueError as error:
        raise ValueError(f"{name} must fit the kernels: {error}") from None
    if QuantizedFfn.fits(ffn):
        if weights != "native":
            raise ValueError(f"weights must be native, as torchao quantised those of {name}, got weights={weights}")
        return _activation(name, ffn)
    for part in ffn.layout.projections:
        _check_projection(f"{name}.{part}", ffn.part(part), ffn.layout)
    first = ffn.part(ffn.layout.up)
    tensors = [ffn.part(part).weight for part in ffn.layout.projections]
    if {weight.dtype for weight in tensors} != {first.weight.dtype}:
        raise ValueError(f"{name} must hold weights of one dtype, got {', '.join(str(w.dtype) for w in tensors)}")
    device = first.weight.device
    if {weight.device for weight in (*tensors, *ffn.router.parameters())} != {device}:
        raise ValueError(f"{name} must lie on one device, got its projections and router on several")
    _check_device(name, device)
    hidden_size = ffn.layout.matrix(first).shape[1]
    if ffn.block and ffn.num_neurons == hidden_size:
        raise ValueError(
            f"{name} must not have as many neurons as hidden states are wide for the kernels, got {hidden_size} of both"
        )
    size = ffn.num_neurons // ffn.num_experts
    if size not in EXPERT_SIZES:
        known = ", ".join(map(str, EXPERT_SIZES))
        raise ValueError(f"expert_size must be one of {known} for the kernels, got expert_size={size} in {name}")
    return _activation(name, ffn)


def _activation(name: str, ffn: SparseFfn) -> str:
    found = activation_name(ffn.activation_function)
    if found is None:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"the activation of {name} must be one of {known}, got {ffn.activation_function!r}")
    return found


def _check_projection(name: str, linear: Any, layout: FfnLayout) -> None:
    in_parts = type(linear) is nn.Linear and type(local(linear.weight)) is Tensor
    if not (in_parts or is_plain_projection(linear, layout)):
        raise ValueError(
            f"{name} must be a plain floating-point {projection_name(layout)}, got {type(linear).__name__}; merge "
            "adapters first (merge_and_unload of peft), and load the model without quantisation"
        )
    if linear.weight.is_meta:
        raise ValueError(f"{name} must hold its weights, got a meta tensor; load the model first")
    if linear.weight.dtype not in DTYPES:
        known = "float32, float16 or bfloat16"
        raise ValueError(f"{name} must hold {known} weights, got {linear.weight.dtype}; call model.to(torch.bfloat16)")


def _check_device(name: str, device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be on a CUDA device or the CPU, got {device}; there are no kernels for others")
    if device.type == "cuda" and torch.version.hip is not None:
        raise ValueError(
            f"{name} must be on an NVIDIA GPU or the CPU for kernels, got an AMD GPU, where they were never measured; "
            "run the model without accelerate_"
        )
    if device.type == "cuda" and not HAS_TRITON:
        raise ValueError(f"triton must be installed for kernels on {device}, got none: pip install triton")
