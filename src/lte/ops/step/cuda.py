"""The whole decoding step on a GPU: one persistent launch of step.cu, which NVRTC compiles for the plan's shapes.

Every multiprocessor runs one block, which takes all of its shared memory. A launch is cooperative: the driver starts
all blocks together or refuses, so blocks that wait for each other all run, also beside other work, and a launch that is
too large for the device (one that shares it, say) is an error before anything ran. If a block still waits for another
for some ten seconds, the kernel ends with an error.

Shapes: B sequences, or tokens of one sequence (T in the kernel), D hidden size, HQ heads of queries, HKV of keys and
values, HD their size, F neurons, E experts of S = F / E neurons, V vocabulary, C tokens that a cache holds, P blocks.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lte.ops.activations import ACTIVATIONS
from lte.ops.step.compile import cached_cubin, missing, structures
from lte.ops.step.plan import DecoderLayer, DecoderPlan, LayerCache, Matrix, Quantized, rows_of
from lte.ops.step.quantized import output_scales, packed, packed_layer

MAX_BATCH = 8
MAX_EXPERTS = 65535
HEAD_SIZES = (16, 32, 64, 96, 128, 256)
ELEMENTS = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 0}
OLDEST = 80  # compute capability
THREADS = 256  # that compute
FETCHERS = 4  # warps that fetch weights and keys
MANY_FETCHERS = 8  # where most of it are keys, which come in smaller pieces
SPLIT_KEYS = 128  # of a part of the cache that one block takes, at least
GROUPS = (32, 64, 128)  # of weights in 4 bits

Launch = Callable[[ctypes.Structure], None]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the kernel runs on.

    Attributes:
        blocks: P, that run at once.
        threads: of a block that compute, a multiple of 32 and at least 16 B.
        shared_bytes: shared memory of a block.
    """

    blocks: int
    threads: int = THREADS
    shared_bytes: int

    def load(self, macros: Mapping[str, int]) -> Launch:
        """Compiles the kernel; the function launches it, on a GPU on the current stream."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Gpu(Machine):
    """A GPU, or the part of it that this process sees.

    Attributes:
        index: of the device.
        arch: compute capability as one number.
    """

    index: int
    arch: int

    @staticmethod
    def of(device: torch.device) -> Gpu:
        """The GPU of a tensor."""
        found: Any = torch.cuda.get_device_properties(device)
        return Gpu(
            blocks=found.multi_processor_count,
            shared_bytes=found.shared_memory_per_block_optin,
            index=torch.cuda.current_device() if device.index is None else device.index,
            arch=10 * found.major + found.minor,
        )

    def load(self, macros: Mapping[str, int]) -> Launch:
        """See `Machine`; what was loaded once is kept until the process ends."""
        return _load(self, tuple(sorted(macros.items())))


@functools.cache
def _load(gpu: Gpu, macros: tuple[tuple[str, int], ...]) -> Launch:
    constants = dict(macros)
    cubin = cached_cubin(constants, gpu.arch)
    with torch.cuda.device(gpu.index):
        return _Kernel(gpu, cubin, constants["THREADS"] + 32 * constants["FETCHERS"])


class _Kernel:
    """A loaded kernel."""

    def __init__(self, gpu: Gpu, cubin: bytes, threads: int):
        from cuda.bindings import driver

        self.driver, self.index = driver, gpu.index
        device = self._checked(driver.cuDeviceGet(gpu.index))
        self.context = self._checked(driver.cuDevicePrimaryCtxRetain(device))
        self._checked(driver.cuCtxSetCurrent(self.context))
        module = self._checked(driver.cuModuleLoadData(cubin))
        self.function = self._checked(driver.cuModuleGetFunction(module, b"decode_step"))
        kind = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._checked(driver.cuFuncSetAttribute(self.function, kind, gpu.shared_bytes))
        self.shape = gpu.blocks, 1, 1, threads, 1, 1, gpu.shared_bytes
        fitting = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self.function, threads, gpu.shared_bytes)
        cooperative = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH
        if self._checked(fitting) < 1 or not self._checked(driver.cuDeviceGetAttribute(cooperative, device)):
            raise RuntimeError(f"cuda:{gpu.index} cannot run a block of the kernel on each multiprocessor at once")

    def _checked(self, result: tuple[Any, ...]) -> Any:
        if result[0] != self.driver.CUresult.CUDA_SUCCESS:
            name = self.driver.cuGetErrorName(result[0])[1].decode()
            text = self.driver.cuGetErrorString(result[0])[1].decode()
            raise RuntimeError(f"the kernel of a decoding step cannot run on cuda:{self.index}: {text} ({name})")
        return result[1] if len(result) == 2 else None

    def __call__(self, args: ctypes.Structure) -> None:
        if torch.cuda.current_device() != self.index:
            with torch.cuda.device(self.index):
                return self(args)
        pointers = ctypes.c_void_p(ctypes.addressof(args))
        arguments = *self.shape, torch._C._cuda_getCurrentRawStream(self.index), ctypes.addressof(pointers)
        result = self.driver.cuLaunchCooperativeKernel(self.function, *arguments)
        if result[0] == self.driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread's first call
            self._checked(self.driver.cuCtxSetCurrent(self.context))
            result = self.driver.cuLaunchCooperativeKernel(self.function, *arguments)
        self._checked(result)


def macros(plan: DecoderPlan, batch: int, machine: Machine, several: bool = False) -> dict[str, int]:
    """The constants of step.cu, without their prefix; `several`: the batch is one of tokens of one sequence."""
    layer = plan.layers[0]
    neurons, hidden = layer.up.shape
    experts = 0 if layer.router is None else len(layer.router)
    return {
        "T": batch,
        "SEVERAL": int(several),
        "D": hidden,
        "HQ": plan.heads,
        "HKV": plan.kv_heads,
        "HD": plan.head_size,
        "F": neurons,
        "E": experts,
        "S": neurons // max(experts, 1),
        "V": len(plan.head),
        "ROTARY": 2 * len(plan.ropes[0].frequencies) if plan.ropes else 0,
        "ACTIVATION": list(ACTIVATIONS).index(plan.activation),
        "GATED": int(layer.gate is not None),
        "NORM_PLUS_ONE": int(plan.norm_plus_one),
        "HEAD_NORMS": int(any(each.q_norm is not None or each.k_norm is not None for each in plan.layers)),
        "POST_NORMS": int(any(each.post1 is not None or each.post2 is not None for each in plan.layers)),
        "DOWN_BIAS": int(any(each.down_bias is not None for each in plan.layers)),
        "CAPPED": int(plan.score_cap > 0),
        "RINGS": int(any(each.window > 0 for each in plan.layers)),
        "ELEM": ELEMENTS[plan.embedding.dtype],
        "ATTENTION_BITS": _bits(layer.q),
        "FFN_BITS": _bits(layer.up),
        "HEAD_BITS": _bits(plan.head),
        "GROUP": next((matrix.group for _, matrix in _quantized(plan) if matrix.bits == 4), GROUPS[0]),
        "THREADS": machine.threads,
        "FETCHERS": FETCHERS,
        "SPLIT_KEYS": SPLIT_KEYS,
        "MAX_SHARE": -(-neurons // machine.blocks),
        "SHARED_BYTES": machine.shared_bytes,
        "BLOCKS": machine.blocks,
    }


def unfit(plan: DecoderPlan, caches: Sequence[LayerCache]) -> str | None:
    """What in the plan, the caches or the machine the engine cannot compute; see `lte.ops.step.plan.Engine`."""
    device = plan.embedding.device
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the weights lie on {device}, not on an NVIDIA GPU"
    machine = Gpu.of(device)
    if machine.arch < OLDEST:
        return f"the GPU's compute capability is {machine.arch / 10}, below {OLDEST / 10}"
    return missing() or unfit_shapes(plan, caches, machine)


def unfit_shapes(plan: DecoderPlan, caches: Sequence[LayerCache], machine: Machine) -> str | None:
    """As `unfit`, on any machine."""
    first, dtype, device = plan.layers[0], plan.embedding.dtype, plan.embedding.device
    hidden, batch = plan.embedding.shape[1], len(caches[0].keys)
    heads, size, neurons = plan.heads, plan.head_size, len(first.up)
    experts = 1 if first.router is None else len(first.router)
    turned = {len(rope.frequencies) for rope in plan.ropes}
    checks = {
        f"the dtype of the weights is {dtype}": dtype in ELEMENTS,
        f"the activation is {plan.activation}": plan.activation in ACTIVATIONS,
        f"the batch is {batch}, above {MAX_BATCH}": batch <= MAX_BATCH,
        f"the head size is {size}": size in HEAD_SIZES,
        f"{heads} heads of queries share {plan.kv_heads} of keys": heads in (plan.kv_heads * n for n in range(1, 9)),
        f"the hidden size {hidden} is no multiple of 32": hidden % 32 == 0,
        f"the heads' size in all, {heads * size}, is no multiple of 32": heads * size % 32 == 0,
        "the rotary embeddings turn different shares of a head": len(turned) <= 1,
        "the layers differ in shape or kind": all(_kind(layer) == _kind(first) for layer in plan.layers),
        "not all layers have a cache": len(caches) == len(plan.layers),
        f"{experts} experts do not divide {neurons} neurons": neurons % experts == 0,
        f"there are {experts} experts, above {MAX_EXPERTS}": experts <= MAX_EXPERTS,
    }
    reason = next((reason for reason, holds in checks.items() if not holds), None) or _unfit_quantized(plan)
    if reason is not None:
        return reason
    needed = _needed_bytes(macros(plan, batch, machine), dtype.itemsize)
    if needed > machine.shared_bytes:
        return f"a batch of {batch} needs {needed} bytes of shared memory, above {machine.shared_bytes}"
    for name, tensor in _weights(plan):
        if tensor.device != device:
            return f"{name} lies on {tensor.device}, not on {device}"
        if tensor.dtype != dtype:
            return f"{name} is {tensor.dtype}, not {dtype}"
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            return f"{name} does not lie in one piece that begins at 16 bytes"
    found = {tensor.dtype for cache in caches for tensor in (cache.keys, cache.values)}
    return None if found == {dtype} else f"the cache is {', '.join(map(str, found))}, not {dtype}"


def _needed_bytes(m: Mapping[str, int], itemsize: int) -> int:
    """Shared memory with the two stages that the kernel needs at least, some kilobytes more than it is."""
    warps, group = m["THREADS"] // 32, m["HQ"] // m["HKV"]
    inputs = m["T"] * itemsize * (max(m["D"], m["HQ"] * m["HD"]) + m["MAX_SHARE"] + 32)
    sums = 4 * warps * (34 * max(m["T"], 2) + (group + 1) * (m["HD"] + 2) + 128)
    heads = (group + 32) * (m["HD"] + 16) * itemsize
    return inputs + sums + heads + 4 * m["E"] + 2 * 16 * (1024 + 16) + 4096


def _kind(layer: DecoderLayer) -> list[Any]:
    matrices = layer.q, layer.k, layer.v, layer.out, layer.up, layer.down, layer.gate, layer.router
    return [None if matrix is None else (matrix.shape, _bits(matrix)) for matrix in matrices]


def _bits(matrix: Matrix | None) -> int:
    """Of a quantised matrix; 0 of others."""
    return matrix.bits if isinstance(matrix, Quantized) else 0


def _quantized(plan: DecoderPlan) -> Iterator[tuple[str, Quantized]]:
    """All quantised matrices and their names."""
    if isinstance(plan.head, Quantized):
        yield "head", plan.head
    for layer in plan.layers:
        yield from ((name, value) for name, value in vars(layer).items() if isinstance(value, Quantized))


def _unfit_quantized(plan: DecoderPlan) -> str | None:
    """What the kernel does not take of quantised matrices."""
    first, groups = plan.layers[0], set()
    attention, ffn = (
        (first.q, first.k, first.v, first.out),
        (first.up, first.down, first.up if first.gate is None else first.gate),
    )
    if any(len({_bits(matrix) for matrix in matrices}) > 1 for matrices in (attention, ffn)):
        return "some matrices of attention or of the FFN are quantised and others are not"
    for name, matrix in _quantized(plan):
        outputs, inputs = reversed(matrix.shape) if name == "down" else matrix.shape
        if matrix.bits == 4:
            groups.add(matrix.group)
            if matrix.scales.dtype != plan.embedding.dtype:
                return f"the scales of {name} are {matrix.scales.dtype}, not {plan.embedding.dtype}"
        along = 0 if name == "down" else 1
        if matrix.scales.shape[1 - along] != outputs or (matrix.bits == 8 and matrix.group != inputs):
            return f"the scales of {name} are {list(matrix.scales.shape)} for {list(matrix.shape)}"
        if matrix.values.dtype != torch.int8 or matrix.values.device != plan.embedding.device:
            return f"{name} is {matrix.values.dtype} on {matrix.values.device}"
    if len(groups) > 1 or not groups <= set(GROUPS):
        return f"groups of 4-bit weights have {sorted(groups)} numbers"
    if _bits(first.up) == 4 and first.router is not None and len(first.up) // len(first.router) % 2:
        return "experts of 4-bit weights have an odd number of neurons"
    return None


def _weights(plan: DecoderPlan) -> Iterator[tuple[str, Tensor]]:
    """All that the kernel reads as they are."""
    for name in ("embedding", "final_norm", "head", "head_bias"):
        if isinstance(getattr(plan, name), Tensor):
            yield name, getattr(plan, name)
    for i, layer in enumerate(plan.layers):
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and not name.startswith("router"):
                yield f"{name} of layer {i}", value


def _fetchers(plan: DecoderPlan, caches: Sequence[LayerCache]) -> int:
    """Warps that fetch. On an H200 eight read caches larger than the weights 4 to 8% faster, and weights 6% slower."""
    weights = sum(tensor.nbytes for _, tensor in _weights(plan))
    weights += sum(matrix.values.numel() * matrix.bits // 8 for _, matrix in _quantized(plan))
    keys = sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
    return MANY_FETCHERS if keys > weights else FETCHERS


class CudaEngine:
    """The steps of one plan; see `lte.ops.step.plan.Engine`.

    Args:
        plan: one that `unfit` finds nothing in.
        machine: the GPU on which the weights lie unless given.
    """

    def __init__(self, plan: DecoderPlan, machine: Machine | None = None):
        self.plan, self.machine = plan, Gpu.of(plan.embedding.device) if machine is None else machine
        # Weights in 4 bits are copied, once, into the kernel's own order.
        self.packed = [packed_layer(layer) for layer in plan.layers]
        self.head = packed(plan.head)[0] if isinstance(plan.head, Quantized) else plan.head

    def bind(
        self, caches: Sequence[LayerCache], tokens: int = 1, *, fewer: bool = False, **extra: int
    ) -> CudaStep | FittingStep:
        """A step on these caches; quick once a kernel for their batch, or for so many tokens, is compiled.

        Args:
            caches: of all layers.
            tokens: see `lte.ops.step.plan.Engine`.
            fewer: likewise.
            extra: macros for checks: `TRACE` times that each block notes, `DELAY` ns at most of random delays,
                `EVERY_LANE` 1 where all threads arrive at barriers of shared memory, not one for its warp.
        """
        step = FittingStep if fewer and tokens > 1 else CudaStep
        return step(self, caches, tokens, extra)


class CudaStep:
    """One token of each sequence, or several of one; see `lte.ops.step.plan.DecodeStep`.

    A call costs the host one launch; it does not wait for the device and can be captured in a CUDA graph. Calls on
    different streams follow each other, as the later one waits for the earlier stream; replays of a graph do not know
    of other streams, so whoever replays one while a step may run elsewhere must order them.

    The kernel counts barriers and launches in memory of this step, and writes the counts back as its last act. A launch
    that was refused changed nothing, and one that ended with an error took the device's context with it, this memory
    and the caches included, so no step meets counts that do not fit.
    """

    def __init__(
        self,
        engine: CudaEngine,
        caches: Sequence[LayerCache],
        tokens: int,
        extra: Mapping[str, int],
        larger: CudaStep | None = None,
        least: int = 1,
    ):
        plan, machine = engine.plan, engine.machine
        self.batch, self.device = rows_of(caches, tokens, MAX_BATCH), plan.embedding.device
        constants = {**macros(plan, self.batch, machine, tokens > 1), "FETCHERS": _fetchers(plan, caches)}
        constants |= {"RINGS": int(constants["RINGS"] or any(cache.shift for cache in caches)), **extra}
        self._launch: Launch = machine.load(constants)
        self._engine, self._caches, self._inputs = engine, caches, list[Tensor]()
        scratch = self._scratch(constants, machine.blocks)
        if larger is not None:
            scratch["logits"] = larger.logits[: self.batch]
        self.logits: Tensor = scratch["logits"]
        self.trace, self._masks = scratch["trace"], scratch["masks"]
        # Of one plan and its caches alone.
        self._copied: list[Tensor] = [] if larger is None else larger._copied
        self._tables: dict[str, Tensor | None] = self._tables_of(plan, caches) if larger is None else larger._tables
        self._owned = [*scratch.values(), *self._copied]
        read = {name: getattr(plan, name) for name in ("embedding", "final_norm", "head_bias")}
        read |= {"head": engine.head, **self._tables}
        self._args = structures()["Args"]()
        _fill(
            self._args,
            {name: _pointer(tensor) for name, tensor in {**read, **scratch}.items()}
            | dict.fromkeys(("token", "position", "start"))  # set by each call
            | {"num_layers": len(plan.layers), "num_ropes": len(plan.ropes), "eps": plan.eps}
            | {"least": least, "larger": int(larger is not None)}
            | {"scaling": plan.score_scale, "attention_cap": plan.score_cap, "logit_cap": plan.logit_cap}
            | {"embedding_scale": plan.embedding_scale},
        )
        if self.device.type == "cuda":
            self._stream = torch.cuda.current_stream(self.device)

    def _scratch(self, m: Mapping[str, int], blocks: int) -> dict[str, Tensor]:
        """What the kernel writes, by the names of its arguments."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=self.device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        batch = m["T"]
        return {
            "logits": empty(batch, m["V"]),
            "turns": empty(max(len(self._engine.plan.ropes), 1), batch, 2, max(m["ROTARY"] // 2, 1)),
            "residual": empty(2, batch, m["D"]),
            "qkv": empty(batch, (m["HQ"] + 2 * m["HKV"]) * m["HD"]),
            "attended": empty(batch, m["HQ"] * m["HD"]),
            "sums": zeros(3, batch, m["D"], dtype=torch.int64),
            "splits": empty(batch * m["HKV"], blocks, m["HQ"] // m["HKV"], m["HD"] + 2),
            "masks": zeros(max(m["E"], 1)),
            "flags": zeros(blocks),
            "counters": zeros(3),
            "trace": zeros(blocks, m.get("TRACE", 1), dtype=torch.int64),
        }

    def _tables_of(self, plan: DecoderPlan, caches: Sequence[LayerCache]) -> dict[str, Tensor | None]:
        """What is copied for the kernel, by the names of its arguments."""
        head_scales = None
        if isinstance(plan.head, Quantized) and plan.head.bits == 8:
            head_scales = plan.head.scales.float().flatten()
            self._copied.append(head_scales)
        return {"layers": self._layers(plan, caches), "ropes": self._ropes(plan), "head_scales": head_scales}

    def _ropes(self, plan: DecoderPlan) -> Tensor:
        """The factor and the frequencies of each rotary embedding."""
        ropes = [torch.cat((rope.frequencies.new_tensor([rope.factor]), rope.frequencies)) for rope in plan.ropes]
        found = torch.stack(ropes) if ropes else torch.zeros(1, 2, device=self.device)
        self._copied.append(found.to(self.device, torch.float32))
        return self._copied[-1]

    def _layers(self, plan: DecoderPlan, caches: Sequence[LayerCache]) -> Tensor:
        """The array of `Layer` in the device's memory."""
        array = (structures()["Layer"] * len(plan.layers))()
        for to, layer, halves, cache in zip(array, plan.layers, self._engine.packed, caches, strict=True):
            scales = output_scales(layer)
            self._copied += [] if scales is None else [scales]
            values = {name: _pointer(value) for name, value in {**vars(layer), **halves, "scales": scales}.items()}
            # The router counts as rounded to the other weights' dtype; its bias does not.
            for name, dtype in (("router", plan.embedding.dtype), ("router_bias", torch.float32)):
                if values[name] is not None:
                    self._copied.append(getattr(layer, name).detach().to(dtype).contiguous())
                    values[name] = _pointer(self._copied[-1])
            for name in ("keys", "values"):
                tensor = getattr(cache, name)
                if tensor.device != self.device or not tensor.is_contiguous() or tensor.data_ptr() % 16:
                    raise ValueError(
                        f"{name} must lie in one piece on {self.device} and begin at 16 bytes, got {name} on "
                        f"{tensor.device} with strides {tensor.stride()} at {tensor.data_ptr()}"
                    )
                values[name] = _pointer(tensor)
            _fill(to, values | {"slots": cache.keys.shape[2], "shift": cache.shift})
        self._copied.append(torch.frombuffer(bytearray(array), dtype=torch.uint8).to(self.device))
        return self._copied[-1]

    def __call__(self, tokens: Tensor, positions: Tensor, starts: Tensor) -> Tensor:
        """See `lte.ops.step.plan.DecodeStep`.

        Raises:
            ValueError: an argument is no int64 [B] on the device of the weights.
            RuntimeError: the launch was refused; the caches are as they were.
        """
        self.take(tokens, positions, starts)
        self.launch()
        return self.logits

    def take(self, tokens: Tensor, positions: Tensor, starts: Tensor) -> None:
        """The first half of a call: checks what the next launch reads."""
        args, self._inputs = self._args, []
        for name, tensor in (("token", tokens), ("position", positions), ("start", starts)):
            if tensor.dtype != torch.int64 or tensor.shape != (self.batch,) or tensor.device != self.device:
                raise ValueError(
                    f"{name}s must be int64 [{self.batch}] on {self.device}, "
                    f"got {name}s={tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )
            self._inputs.append(tensor.contiguous())
            setattr(args, name, self._inputs[-1].data_ptr())

    def launch(self) -> None:
        """The second half."""
        if self.device.type == "cuda":
            self._follow()
        self._launch(self._args)

    def active(self) -> Tensor:
        """See `lte.ops.step.plan.DecodeStep`."""
        bits = torch.arange(self.batch, device=self.device)
        return (self._masks >> bits[:, None] & 1).bool()

    def _follow(self) -> None:
        """Lets the current stream wait for the last one, as both would write the same memory."""
        if torch._C._cuda_getCurrentRawStream(self.device.index) == self._stream.cuda_stream:
            return
        if not torch.cuda.is_current_stream_capturing():
            last, self._stream = self._stream, torch.cuda.current_stream(self.device)
            self._stream.wait_stream(last)
            for tensor in self._owned:
                tensor.record_stream(self._stream)


class FittingStep:
    """Passes over several tokens of one sequence, whose last tokens are none in many; see `lte.ops.step.plan.Engine`.

    All are launched as kernels of 1, 2, 4 and all tokens, of which one computes and the others end at once.
    """

    def __init__(self, engine: CudaEngine, caches: Sequence[LayerCache], tokens: int, extra: Mapping[str, int]):
        sizes = [size for size in (1, 2, 4) if 2 * size <= tokens] + [tokens]
        least = [1, *(size + 1 for size in sizes[:-1])]
        self._steps = list[CudaStep]()
        for size, fewest in reversed(list(zip(sizes, least, strict=True))):
            larger = self._steps[0] if self._steps else None
            self._steps.insert(0, CudaStep(engine, caches, size, extra, larger, fewest))
        self.logits = self._steps[-1].logits

    def __call__(self, tokens: Tensor, positions: Tensor, starts: Tensor) -> Tensor:
        """As that of `CudaStep`, but for a launch that is refused after a smaller kernel's: what that wrote stays."""
        # A kernel also looks at the token after its own.
        self._starts, self._positions = starts.contiguous(), positions.contiguous()
        for step in self._steps:
            # The last one takes all, and refuses what are not as many.
            most = step.batch if step is not self._steps[-1] else None
            step.take(tokens[:most], self._positions[:most], self._starts[:most])
        for step in self._steps:
            step.launch()
        return self.logits

    def active(self) -> Tensor:
        """See `lte.ops.step.plan.DecodeStep`; the last call's starts and positions must be as they were."""
        some = int((self._starts <= self._positions).sum())
        found = next(step for step in self._steps if step.batch >= some).active()
        return torch.cat((found, found.new_zeros(len(self.logits) - len(found), found.shape[1])))


def _pointer(value: Any) -> Any:
    """Where a tensor lies; other things as they are."""
    return value.data_ptr() if isinstance(value, Tensor) else value


def _fill(to: ctypes.Structure, values: Mapping[str, Any]) -> None:
    """Sets all fields of a structure, no more and no less."""
    names = [field[0] for field in to._fields_]
    if set(names) != set(values):
        raise TypeError(f"{type(to).__name__} has other fields: {sorted(set(names) ^ set(values))}")
    for name in names:
        setattr(to, name, values[name])
