"""What one of several training processes is: `torchrun` starts one per GPU."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.utils.hooks import RemovableHandle

from lte.train.config import TrainConfig

END_S = 15.0
"""A process that failed alone is gone after so many seconds; launchers kill the others at most 30 seconds later."""


def training_device() -> torch.device:
    """Where Trainer puts the model of this process: each process of a node has its own GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def is_main_process() -> bool:
    """Whether this process writes the files and talks to the user."""
    return int(os.environ.get("RANK", "0")) == 0


def num_processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wants_fsdp() -> bool:
    """Whether accelerate's config asks for FSDP, which it then does on GPUs alone."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def reads_weights_once() -> bool:
    """Whether the first process alone is to read weights: `fsdp_cpu_ram_efficient_loading` in accelerate's config."""
    return num_processes() > 1 and wants_fsdp() and parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")


def keeps_weights_on_cpu() -> bool:
    """Whether weights, gradients and moments are to lie on the CPU: `fsdp_offload_params` in accelerate's config."""
    return wants_fsdp() and parse_flag_from_env("FSDP_OFFLOAD_PARAMS")


def launched(arguments: str) -> str:
    """The `lte` command with these arguments, behind the launcher that started this process with others, if one did."""
    processes = num_processes()
    if processes == 1:
        return f"lte {arguments}"
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return f"accelerate launch --config_file CONFIG --num_processes {processes} -m lte {arguments}"
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    several = f"--nnodes {nodes} " if nodes > 1 else ""
    return f"torchrun {several}--nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', processes)} -m lte {arguments}"


def autocast(config: TrainConfig) -> torch.autocast:
    """bf16 autocast where the config asks for it. Around single passes: it keeps its copies of weights until it ends,
    so that weights which an optimiser changes inside would be used as they were."""
    return torch.autocast(training_device().type, torch.bfloat16, enabled=config.bf16)


def end_for_all(error: BaseException) -> None:
    """Has an error of this process end a launch of several, with its reason on the launcher's screen.

    The others wait for this process in sums that it takes no part in any more. Their launcher ends them once it is
    gone, which clean-up that waits for them in turn, a script's or NCCL's, must not hinder: it has `END_S` seconds.
    Nothing happens where there is one process.
    """
    if num_processes() == 1:
        return
    reason = f"process {os.environ.get('RANK', '?')} failed: {' '.join(str(error).split()) or type(error).__name__}"
    # What torchrun, which starts the processes of accelerate, too, shows of the first one that failed.
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if place:
        found = {"message": {"message": reason, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError):
            Path(place).write_text(json.dumps(found), encoding="utf-8")

    def end() -> None:
        print(f"Error: {reason}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(END_S, end)
    timer.daemon = True
    timer.start()


def float32_products(config: TrainConfig, *models: nn.Module | None) -> AbstractContextManager[None]:
    """TF32 products on the GPU where the config takes them; what follows is as it was.

    Args:
        config: the settings.
        models: all that run meanwhile.
    """
    return products_in_tf32(*models) if config.trains_in_tf32 else nullcontext()


@contextmanager
def products_in_tf32(*models: nn.Module | None) -> Iterator[None]:
    """TF32 products on the GPU inside the block.

    The angles of rotary embeddings stay exact. transformers computes them as a product of frequencies and positions, of
    which TF32 keeps 11 bits where a GPU computes it in that: positions above 2048 are no longer told apart
    (https://github.com/huggingface/transformers/issues/48428).

    Args:
        models: all that run meanwhile.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    called = [model for model in models if model is not None]
    hooks = [hook for model in called for module in model.modules() for hook in _exact_angles(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        torch.set_float32_matmul_precision(before)


def _exact_angles(module: nn.Module) -> tuple[RemovableHandle, ...]:
    """Hooks around what computes a rotary embedding's angles; none for other modules."""
    if not any("inv_freq" in name for name, _ in module.named_buffers(recurse=False)):
        return ()
    return (
        module.register_forward_pre_hook(lambda *_: torch.set_float32_matmul_precision("highest")),
        module.register_forward_hook(lambda *_: torch.set_float32_matmul_precision("high"), always_call=True),
    )
