"""Which code computes a sparse FFN in hard mode: the one place that knows all of them.

| device | 1 to 16 tokens | more tokens |
|---|---|---|
| CUDA | `lte.ops.decode` or `lte.ops.prefill`, by the table of `lte.ops.paths` | `lte.ops.prefill`, by the same table |
| CPU | `lte.ops.cpu` where it wins by its table, always for int8 weights | `masked_ffn` |

Shapes: T tokens, D hidden size, F neurons, E experts of S = F / E neurons each.
"""

from __future__ import annotations

import bisect
import importlib.util
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from lte.ops.activations import ACTIVATIONS
from lte.ops.arguments import MAX_TOKENS, FfnWeights, Routing
from lte.ops.cpu import cpu_kernel_wins, sparse_ffn_cpu
from lte.ops.paths import ExpectedUse, FfnKind, Path, choose_path
from lte.ops.quantize import floating_weight
from lte.ops.reference import active_experts

if TYPE_CHECKING:  # these need triton, which is not everywhere
    from lte.ops.decode import DecodeLaunch
    from lte.ops.prefill import PrefillLaunch


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # there is None in its place in sys.modules
        return False


# On macOS and Windows there is no Triton; numba is optional.
HAS_TRITON, HAS_NUMBA = _is_installed("triton"), _is_installed("numba")


# Not frozen: torch 2.11 cannot compile code that makes frozen dataclasses and calls them.
@dataclass(eq=False)
class FfnRunner:
    """Runs one FFN.

    Attributes:
        weights: laid out by `lte.ops.layout`.
        routing: what decides which experts are active, unless logits are given with a call.
        activation: a key of `ACTIVATIONS`.
        use: what measurements let expect of its experts, `None` if nothing.
        arch: of the GPU, see `prepare`.
    """

    weights: FfnWeights
    routing: Routing
    activation: str
    use: ExpectedUse | None = None
    arch: int = 0
    _launches: dict[Hashable, DecodeLaunch | PrefillLaunch] = field(default_factory=dict, init=False, repr=False)
    _paths: dict[tuple[int, bool], Path] = field(default_factory=dict, init=False, repr=False)
    _lasts: list[int] = field(default_factory=list, init=False, repr=False)

    def __call__(self, x: Tensor, logits: Tensor | None = None, in_a_row: bool = False) -> Tensor:
        """The output [T, D] for x [T, D]; logits [T, E] take the place of the routing's.

        Tokens that follow each other in one text may take another path (`in_a_row`), which computes the same.
        """
        routing = self.routing if logits is None else self._given(logits)
        if x.is_cuda:
            return self.run_on_gpu(x, routing, in_a_row)
        if self._cpu_kernel_takes(len(x), x.dtype):
            return sparse_ffn_cpu(x, self.weights, routing, self.activation)
        return masked_ffn(x, self.weights, routing, self.activation)

    def run_on_gpu(self, x: Tensor, routing: Routing, in_a_row: bool = False) -> Tensor:
        """By the path that the table of measurements names."""
        if torch.compiler.is_compiling() or x.get_device() != _current_device(x):
            from lte.ops import decode, prefill  # these need triton, which is not everywhere

            path = self._path(len(x), in_a_row)
            if path == "decode":
                return decode.sparse_ffn_decode(x, self.weights, routing, self.activation)
            return prefill.sparse_ffn_prefill(x, self.weights, routing, self.activation, path)
        # The operations check what is true here by construction, and cost several times more per call.
        x, logits = x.contiguous(), None if routing is self.routing else routing.logits
        in_a_row = in_a_row and 1 < x.size(0) <= MAX_TOKENS  # only there may it make a difference
        key: Hashable = (self._first_alike(x.size(0)), in_a_row, x.dtype)
        if logits is not None:
            # They are those of one call alone, and what is compiled and settled depends on how they lie.
            key = (key, logits.dtype, logits.stride(0), logits.data_ptr() % 16 == 0)
        launch = self._launches.get(key)
        if launch is None or not self._is_of(launch, routing, logits):
            if logits is not None:  # nothing of a call may be kept alive
                routing = replace(routing, logits=logits.new_empty((0, routing.num_experts)))
            launch = self._launches[key] = self._launch(x, routing, in_a_row)
        return launch(x, logits)

    def _is_of(self, launch: DecodeLaunch | PrefillLaunch, routing: Routing, logits: Tensor | None) -> bool:
        """Whether a launch was made for the weights and the routing that count now."""
        if launch.weights is not self.weights or launch.activation != self.activation:
            return False
        return launch.routing is routing if logits is None else launch.routing.threshold == routing.threshold

    def warm_up(self, x: Tensor, logits: Tensor | None = None, done: set[Hashable] | None = None) -> None:
        """Computes once what of the kernels the first rows of x take, however many, so that no later call compiles.

        Args:
            x: hidden states [T, D] on a GPU, the last of `warm_up_tokens` for the most that a call may have.
            logits: [T, E], as for a call.
            done: kernels that FFNs of the same shapes and dtypes were warmed up with; those of this one are added.
        """
        from lte.ops import prefill

        done = set() if done is None else done
        for tokens in warm_up_tokens(len(x)):
            part, path = x[:tokens], self._path(tokens)
            routing = self.routing if logits is None else self._given(logits[:tokens])
            # Of few tokens each number is a kernel of its own.
            variant = tokens if path == "decode" else prefill.variant(part, self.weights, routing, path)
            if (path, variant) not in done:
                done.add((path, variant))
                self.run_on_gpu(part, routing)

    def _given(self, logits: Tensor) -> Routing:
        return Routing(logits=logits, threshold=self.routing.threshold, core=self.routing.core)

    def _path(self, tokens: int, in_a_row: bool = False) -> Path:
        kind = ffn_kind(self.weights.up, self.weights.gate, self.arch)
        active, union = (None, None) if self.use is None else (self.use.active, self.use.union(tokens, in_a_row))
        core = self.routing.core / self.routing.num_experts if self.routing.core else 0.0
        path = choose_path(kind, tokens, active, union=union, core=core)
        return "masked" if path == "decode" and tokens > MAX_TOKENS else path

    def _first_alike(self, tokens: int) -> int:
        """The least number of tokens that is computed just as T: T itself for few, and for more one of a short list."""
        if tokens <= MAX_TOKENS:
            return tokens
        if not self._lasts:
            self._lasts = _last_tokens()
        return self._lasts[bisect.bisect_left(self._lasts, tokens) - 1] + 1

    def _launch(self, x: Tensor, routing: Routing, in_a_row: bool) -> DecodeLaunch | PrefillLaunch:
        """What computes as many tokens as x has."""
        from lte.ops import decode, prefill

        path = self._settled_path(x.size(0), in_a_row)
        if path == "decode":
            return decode.DecodeLaunch(x, self.weights, routing, self.activation)
        kind = prefill.GroupedLaunch if path == "grouped" else prefill.MaskedLaunch
        return kind(x, self.weights, routing, self.activation)

    def _settled_path(self, tokens: int, in_a_row: bool = False) -> Path:
        key = self._first_alike(tokens), in_a_row
        path = self._paths.get(key)
        if path is None:
            path = self._paths[key] = self._path(*key)
        return path

    def path_of(self, tokens: int, dtype: torch.dtype, in_a_row: bool = False) -> Path:
        """How a call for T tokens of a dtype is computed, on the device of the weights."""
        if self.weights.up.is_cuda:
            return self._settled_path(tokens, in_a_row)
        return "decode" if self._cpu_kernel_takes(tokens, dtype) else "masked"

    def _cpu_kernel_takes(self, tokens: int, dtype: torch.dtype) -> bool:
        if tokens > MAX_TOKENS or not HAS_NUMBA:
            return False
        # Without the kernel int8 weights are expanded at every call.
        expected = 1.0 if self.use is None else self.use.active
        return cpu_kernel_wins(dtype, tokens, 0.0 if self.weights.up_scale is not None else expected)


def warm_up_tokens(most: int) -> list[int]:
    """Numbers of tokens, of 1 to `most`, that take all the kernels which any of these numbers takes; in order."""
    firsts = {last + 1 for last in _last_tokens()}
    return sorted(tokens for tokens in firsts.union(range(1, MAX_TOKENS + 1)) if tokens <= most)


def _last_tokens() -> list[int]:
    """Numbers of tokens of `MAX_TOKENS` or more, in order, after which the next may take another path or kernel."""
    from lte.ops import paths, prefill_launch

    lasts = paths.last_tokens() | prefill_launch.last_tokens() | {MAX_TOKENS}
    return sorted(last for last in lasts if last >= MAX_TOKENS)


def ffn_kind(up: Tensor, gate: Tensor | None, arch: int) -> FfnKind:
    """The kind of an FFN by its matrices up and gate [F, D], for `choose_path`."""
    matrices = 2 if gate is None else 3
    return FfnKind(arch, up.element_size(), gate is not None, matrices * up.numel() * up.element_size())


def _current_device(x: Tensor) -> int:
    """The GPU that Triton would launch on, -1 for tensors elsewhere."""
    return torch.cuda.current_device() if x.is_cuda else -1


def masked_ffn(x: Tensor, weights: FfnWeights, routing: Routing, activation: str) -> Tensor:
    """All experts for all tokens in plain PyTorch, those that a token does not want set to zero; as `FfnRunner`.

    Products are in the dtype of x; int8 weights are brought there first, one layer's copy at a time.
    """
    mask = active_experts(x, routing)
    hidden = functional.linear(x, floating_weight(weights, "up", x.dtype), weights.up_bias)
    if weights.gate is None:
        hidden = ACTIVATIONS[activation](hidden)
    else:
        gate = floating_weight(weights, "gate", x.dtype)
        hidden = ACTIVATIONS[activation](functional.linear(x, gate, weights.gate_bias)) * hidden
    # Not a product: what an inactive expert would compute must not matter, even if it is not finite.
    hidden = torch.where(mask.unsqueeze(-1), hidden.unflatten(1, (mask.shape[1], -1)), 0).flatten(1)
    output = hidden @ floating_weight(weights, "down", x.dtype)
    return output if weights.down_bias is None else output + weights.down_bias


def prepare(device: torch.device) -> int:
    """Allocates what the kernels of a GPU keep between calls, which must not happen inside a CUDA graph's capture.

    Returns:
        Its compute capability as one number, 90 for an H100; 0 for other devices.
    """
    if device.type != "cuda":
        return 0
    from lte.ops.launch import architecture
    from lte.ops.workspace import workspace

    workspace(device)
    return architecture(device)


def kernel_names(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What runs 1 to 16 tokens (`decode`) and more (`prefill`) on a device, for hidden states of a dtype."""
    if device.type == "cuda":
        return {"decode": "triton", "prefill": "triton"}
    numba = HAS_NUMBA and cpu_kernel_wins(dtype, 1, 0.0)
    return {"decode": "numba" if numba else "pytorch", "prefill": "pytorch"}
