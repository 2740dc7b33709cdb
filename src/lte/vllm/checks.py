"""What a folder and a deployment must be before vLLM starts an engine for them: clear errors, early.

vLLM calls these in the process that was asked to serve, through its table of hooks by architecture. `lte.vllm.models`
checks again, in the engine, what must hold there.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import model as vllm_model_config
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from lte.hf.checkpoints import damaged_files
from lte.hf.families import family_of
from lte.ops.arguments import DTYPES
from lte.ops.dispatch import HAS_TRITON
from lte.vllm.architectures import served_names
from lte.vllm.graphs import capture_prompts
from lte.vllm.meter import publish
from lte.vllm.settings import ServeSettings, serve_settings

OLDEST_GPU = 80
STORED_DTYPES = ("F64", "F32", "F16", "BF16")


def refuse_architecture(model_config: Any) -> None:
    """Raises the `ValueError` for an architecture that is not served."""
    names = ", ".join(name.removeprefix("Lte") for name in model_config.hf_config.architectures or ("none",))
    raise ValueError(
        f"architectures must be one of {served_names()} for vLLM, got {names}; transformers runs the folder sparse, "
        "and `lte.densify_(model)` makes a dense model of it"
    )


class RefusedArchitecture(VerifyAndUpdateConfig):
    """Hook of every architecture of lte that is not served."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Refuses the model."""
        refuse_architecture(model_config)


class LteChecks(VerifyAndUpdateConfig):
    """Hook of every architecture that is served."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Checks the folder and what it shall run in.

        Raises:
            ValueError: names what does not fit, and what to do.
        """
        settings = serve_settings(model_config.hf_config)
        check_dtype(model_config)
        if model_config.quantization is not None:
            raise ValueError(
                f"quantization must be left out for an LTE folder, got quantization={model_config.quantization}; "
                '--hf-overrides \'{"lte_weights": "int8"}\' rounds the FFNs'
            )
        folder = Path(model_config.model)
        if folder.is_dir():
            check_folder(folder, model_config.hf_config, settings)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Checks what the engine shall do with it, begins its metrics, and has it capture graphs of prompts.

        Raises:
            ValueError: names what does not fit, and what to do.
        """
        settings = serve_settings(vllm_config.model_config.hf_config)
        check_ranks(settings, vllm_config.parallel_config.tensor_parallel_size)
        if vllm_config.lora_config is not None:
            raise ValueError(
                "enable_lora must be off for an LTE folder, got enable_lora=True; merge the adapters first "
                "(merge_and_unload of peft) and save the folder"
            )
        offload = getattr(getattr(vllm_config, "offload_config", None), "uva", None)
        amount = getattr(offload, "cpu_offload_gb", 0) or getattr(vllm_config.cache_config, "cpu_offload_gb", 0)
        if amount:
            raise ValueError(
                f"cpu_offload_gb must be 0 for an LTE folder, whose kernels read weights where they lie, got "
                f"cpu_offload_gb={amount}"
            )
        check_device()
        if not vllm_config.instance_id:
            vllm_config.instance_id = uuid.uuid4().hex
        publish(vllm_config.instance_id)
        if on_gpu():
            ranks = vllm_config.parallel_config.tensor_parallel_size
            capture_prompts(vllm_config, vllm_config.model_config.hf_config.hidden_size, settings.num_neurons // ranks)


def check_ranks(settings: ServeSettings, ranks: int) -> None:
    """Raises a `ValueError` unless each rank of tensor parallelism gets whole experts."""
    if settings.num_experts % ranks:
        fit = [number for number in range(1, settings.num_experts + 1) if settings.num_experts % number == 0]
        raise ValueError(
            f"tensor_parallel_size must divide the {settings.num_experts} experts of an FFN, got "
            f"tensor_parallel_size={ranks}; sizes that fit: {', '.join(map(str, fit[:8]))}"
        )


def check_dtype(model_config: Any) -> None:
    """Raises a `ValueError` for a dtype without kernels, or one that vLLM refuses for the stock family."""
    if model_config.dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16 for the kernels, got dtype={model_config.dtype}")
    # vLLM knows by the model type which families overflow in fp16, and ours has another.
    vllm_model_config._check_valid_dtype(family_of(model_config.hf_config).model_type, model_config.dtype)


def on_gpu() -> bool:
    """Whether vLLM runs on an NVIDIA GPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def check_device() -> None:
    """Raises a `ValueError` for a device without kernels."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return
    if not on_gpu():
        raise ValueError(
            f"device must be an NVIDIA GPU or a CPU to serve LTE folders, got {current_platform.device_name}; there "
            "are no kernels for others. `lte.densify_(model)` makes a dense model"
        )
    if not HAS_TRITON:
        raise ValueError("triton must be installed to serve LTE folders on a GPU, got none: pip install triton")
    capability = current_platform.get_device_capability()
    if capability is not None and capability.to_int() < OLDEST_GPU:
        raise ValueError(
            f"compute capability must be {OLDEST_GPU / 10} or more for the kernels, got {capability.as_version_str()}"
        )


def check_folder(folder: Path, hf_config: Any, settings: ServeSettings) -> None:
    """Raises a `ValueError` unless the weight files are whole and hold every layer's router; it reads headers alone."""
    damaged = damaged_files(folder)
    if damaged:
        raise ValueError(f"{folder} must hold a whole model, got: {'; '.join(damaged)}")
    shapes = {}
    for name, shape, dtype in _tensors(sorted(folder.glob("model*.safetensors"))):
        # vLLM would take integers as the weights' values.
        if dtype not in STORED_DTYPES:
            raise ValueError(
                f"{folder} must hold weights in {', '.join(STORED_DTYPES)}, got {name} in {dtype}; take the model that "
                "they were made from"
            )
        if ".router." in name:
            shapes[name] = shape
    rank, hidden = settings.config.router_rank, hf_config.hidden_size
    expected = {"weight": [settings.num_experts, rank or hidden], "bias": [settings.num_experts]}
    if rank:
        expected["down"] = [rank, hidden]
    for part, shape in expected.items():
        found = {name: own for name, own in shapes.items() if name.endswith(f".router.{part}")}
        wrong = next((f"{name}={own}" for name, own in found.items() if own != shape), None)
        if wrong is not None:
            raise ValueError(f"router.{part} must have shape {shape} by the config of {folder}, got {wrong}")
        if len(found) != hf_config.num_hidden_layers:
            raise ValueError(
                f"{folder} must hold a router.{part} for each of its {hf_config.num_hidden_layers} layers, got "
                f"{len(found)}; save or copy the folder again"
            )


def _tensors(files: Iterable[Path]) -> Iterable[tuple[str, list[int], str]]:
    """Name, shape and dtype of all that files hold."""
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                header = tensors.get_slice(name)
                yield name, list(header.get_shape()), header.get_dtype()


def keep_dtype_of_folders() -> None:
    """Has vLLM's dtype `auto` take an LTE folder's own dtype; it takes half precision for every folder in fp32.

    vLLM has no hook there, so its function is wrapped. One that is gone is an error, not another dtype.
    """
    stock: Callable[..., torch.dtype] = vllm_model_config._resolve_auto_dtype
    if getattr(stock, "keeps_lte", False):
        return

    @functools.wraps(stock)
    def resolve(model_type: str, config_dtype: torch.dtype, **kwargs: Any) -> torch.dtype:
        if str(model_type).startswith("lte_") and config_dtype == torch.float32:
            return config_dtype
        return stock(model_type, config_dtype, **kwargs)

    resolve.keeps_lte = True  # type: ignore[attr-defined]
    vllm_model_config._resolve_auto_dtype = resolve
