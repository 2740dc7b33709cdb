"""Which engine computes the decoding steps of a plan: the one place that knows all of them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from lte.ops.step.plan import DecoderPlan, Engine, LayerCache

# By the type of the device: see `lte.ops.step.plan.Engine`.
_ENGINES = {"cpu": ("lte.ops.step.cpu", "CpuEngine"), "cuda": ("lte.ops.step.cuda", "CudaEngine")}


def unfit(plan: DecoderPlan, caches: Sequence[LayerCache]) -> str | None:
    """Why no engine computes steps of this plan on these caches, in words that go on from "as ..."; `None` if one does.

    Quick: nothing is compiled for it.
    """
    device = plan.embedding.device.type
    if device not in _ENGINES or importlib.util.find_spec(_ENGINES[device][0]) is None:
        return f"there is none for {device} devices"
    return _module(device).unfit(plan, caches)


def make_engine(plan: DecoderPlan) -> Engine:
    """The engine of a plan that is not `unfit`; this may compile for a minute where it was never made before."""
    device = plan.embedding.device.type
    return getattr(_module(device), _ENGINES[device][1])(plan)


def _module(device: str) -> Any:
    # CPUs need numba and GPUs NVRTC, which not everybody has.
    return importlib.import_module(_ENGINES[device][0])
