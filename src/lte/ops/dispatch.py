"""Which code computes a sparse FFN in hard mode: the one place that knows all of them.

| device | 1 to 16 tokens | more tokens |
|---|---|---|
| CUDA | `lte.ops.decode` | `masked_ffn` |
| CPU | `lte.ops.cpu`, in fp32 and bf16, if numba is there | `masked_ffn` |

Shapes: T tokens, D hidden size, F neurons, E experts of S = F / E neurons each.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lte.ops import cpu
from lte.ops.activations import ACTIVATIONS
from lte.ops.arguments import MAX_TOKENS, FfnWeights, Routing
from lte.ops.quantize import dequantize_rows
from lte.ops.reference import active_experts, router_logits

CPU_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # there is None in its place in sys.modules
        return False


# On macOS and Windows there is no Triton; numba is the extra lte[cpu].
HAS_TRITON, HAS_NUMBA = _is_installed("triton"), _is_installed("numba")


@dataclass(frozen=True)
class FfnRunner:
    """Runs one FFN.

    Attributes:
        weights: laid out by `lte.ops.layout`.
        routing: what decides which experts are active, unless logits are given with a call.
        activation: a key of `ACTIVATIONS`.
        active_fraction: share of active experts that measurements let expect, `None` if unknown.
    """

    weights: FfnWeights
    routing: Routing
    activation: str
    active_fraction: float | None = None

    def __call__(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """The output [T, D] for x [T, D]; logits [T, E] take the place of the routing's."""
        routing = self.routing if logits is None else Routing(logits=logits, threshold=self.routing.threshold)
        if x.shape[0] <= MAX_TOKENS and x.is_cuda:
            from lte.ops.decode import sparse_ffn_decode  # needs triton, which is not everywhere

            return sparse_ffn_decode(x, self.weights, routing, self.activation)
        if x.shape[0] <= MAX_TOKENS and self._fits_cpu_kernel(x):
            return self._decode_on_cpu(x, routing)
        return masked_ffn(x, self.weights, routing, self.activation)

    def _fits_cpu_kernel(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and x.dtype in CPU_KERNEL_DTYPES and self.weights.up_scale is None and HAS_NUMBA

    def _decode_on_cpu(self, x: Tensor, routing: Routing) -> Tensor:
        w = self.weights
        logits = routing.logits
        if logits is None:
            logits = router_logits(x, routing)
        found = cpu.DecodeWeights(
            up=w.up,
            down=w.down.T,
            num_experts=routing.num_experts,
            activation=self.activation,
            gate=w.gate,
            biases=(w.gate_bias, w.up_bias, w.down_bias),
        )
        return cpu.sparse_ffn_decode(x, found, routing.threshold, logits)


def masked_ffn(x: Tensor, weights: FfnWeights, routing: Routing, activation: str) -> Tensor:
    """All experts for all tokens in plain PyTorch, those that a token does not want set to zero; as `FfnRunner`.

    Products are in the dtype of x; int8 weights are brought there first, one layer's copy at a time.
    """
    mask = active_experts(x, routing)

    def rows(name: str) -> Tensor:
        weight, scale = getattr(weights, name), getattr(weights, f"{name}_scale")
        return weight if scale is None else dequantize_rows(weight, scale, x.dtype)

    hidden = functional.linear(x, rows("up"), weights.up_bias)
    if weights.gate is None:
        hidden = ACTIVATIONS[activation](hidden)
    else:
        hidden = ACTIVATIONS[activation](functional.linear(x, rows("gate"), weights.gate_bias)) * hidden
    # Not a product: what an inactive expert would compute must not matter, even if it is not finite.
    hidden = torch.where(mask.unsqueeze(-1), hidden.unflatten(1, (mask.shape[1], -1)), 0).flatten(1)
    output = hidden @ rows("down")
    return output if weights.down_bias is None else output + weights.down_bias


def kernel_names(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What runs 1 to 16 tokens (`decode`) and more (`prefill`) on a device, for weights of a dtype."""
    if device.type == "cuda":
        return {"decode": "triton", "prefill": "pytorch"}
    numba = HAS_NUMBA and dtype in CPU_KERNEL_DTYPES
    return {"decode": "numba" if numba else "pytorch", "prefill": "pytorch"}
