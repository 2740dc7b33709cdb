"""What computes an LTE model's FFNs when it is measured or used, and what is said of it."""

from __future__ import annotations

import sys
from typing import Any

from lte.config import KERNELS, check_choice
from lte.hf.acceleration import accelerate_, decelerate_, describe_kernels
from lte.hf.install import sparse_ffns


def use_kernels_(model: Any, kernels: str = "auto", *, tell: bool = True) -> Any:
    """Accelerates an LTE model as `--kernels` says, in place, and returns it.

    Args:
        model: dense or LTE; `auto` and `off` leave a dense one as it is.
        kernels: one of `KERNELS`.
        tell: whether a line on stderr says what computes the FFNs now.

    Raises:
        ValueError: for another name, or `int8` and a model that cannot have it.
    """
    check_choice("kernels", kernels, KERNELS)
    if kernels == "int8":
        accelerate_(model, "int8")
    elif kernels == "off" or not sparse_ffns(model):
        return model
    else:
        reason = ""
        try:
            accelerate_(model)
        except ValueError as error:
            reason = str(error)
        found = describe_kernels(model)
        if not reason and found is not None and set(found.values()) == {"native", "pytorch"}:
            decelerate_(model)
            reason = f"no kernel for {model.dtype} on {model.device}; on a CPU `pip install numba` brings one"
        if reason and tell:
            print(f"Kernels off: {reason}", file=sys.stderr)
    found = describe_kernels(model)
    if found is not None and tell:
        text = f"Kernels: {found['decode']} for 1 to 16 tokens at a time, {found['prefill']} for more"
        print(f"{text}, {found['weights']} weights.", file=sys.stderr)
    return model
