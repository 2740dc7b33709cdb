"""Numbers that pass between a GPU and the host without either waiting for the other.

A host that waits for a number cannot queue the kernels that come next, and the GPU then has nothing to do: at 1.5B each
wait of a step costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LateValues:
    """Values of a device that are on their way to the host, for whom reads them later.

    Args:
        values: of any shapes, dtypes and devices; they come by way of the first one's.
    """

    def __init__(self, values: Sequence[Tensor]):
        device = values[0].device
        # Other devices may have no float64.
        dtype = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
        flat = torch.cat([value.detach().reshape(-1).to(device, dtype) for value in values])
        self._event: torch.cuda.Event | None = None
        if flat.is_cuda:
            found = torch.empty(flat.shape, dtype=dtype, pin_memory=True)
            found.copy_(flat, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))
            flat = found
        self._values = flat

    def read(self) -> list[float]:
        """The values end to end; waits until the device has computed them, and for nothing that it was given later."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host [N] in fp32 on a device, which is not waited for."""
    found = torch.tensor(values, dtype=torch.float32)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)
