"""The time of a CUDA decoding step by phase: of a kernel whose blocks note when each phase ends.

Shapes: P blocks, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lte.ops.step.cuda import CudaStep

STAMPS = 600
"""Of a traced launch, at most: the value of the macro `TRACE` of `lte.ops.step.cuda.CudaEngine.bind`."""
# What a layer's stamps end, in order. There is one stamp before the layers, and after them one of the last norm and one
# of the head.
PHASES = ("norm", "qkv", "wait", "attention", "wait", "output", "wait", "norm 2", "route", "neurons", "wait")


def phase_us(step: CudaStep, inputs: Sequence[Tensor], layers: int) -> dict[str, tuple[float, float]]:
    """Microseconds of each phase of a layer: the mean over blocks, and the slowest block, both means over layers.

    The first layer is left out where there are others: blocks do not begin together.

    Args:
        step: bound with `TRACE=STAMPS`.
        inputs: of a call.
        layers: L.

    Raises:
        ValueError: if a layer has other phases than are known here.
    """
    for _ in range(3):
        step(*inputs)
    stamps = step.trace.cpu().double()
    noted, expected = (stamps > 0).sum(1), 1 + len(PHASES) * layers + 2
    if not bool((noted == expected).all()):
        raise ValueError(f"step must note {expected} times in each block, got {noted.min()} to {noted.max()}")
    spans = stamps[:, : expected - 2].diff(dim=1).unflatten(1, (layers, len(PHASES)))[:, min(1, layers - 1) :] / 1e3
    pairs = zip(spans.mean((0, 1)).tolist(), spans.amax(0).mean(0).tolist(), strict=True)
    return {f"{index} {name}": pair for index, (name, pair) in enumerate(zip(PHASES, pairs, strict=True))}
