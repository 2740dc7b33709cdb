"""Compiles every kernel variant that the launcher can ask for, without a GPU, and prints one JSON line for each.

Run by `test_compilation.py` in a process of its own with Triton's interpreter off. The launcher runs on meta
tensors; its launches are taken up by `Recorder`, which compiles the kernel for exactly those arguments.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lte.ops import decode, launch
from lte.ops.arguments import FfnWeights, Routing

HIDDEN, EXPERTS, SIZE = 4096, 344, 32
# So many that a thread reads 1, 4, or 8 routing words at once; it reads 2 of `EXPERTS`.
FEW, MORE, MANY = 16, 1000, 2000
NAMES = ("decode_one_kernel", "decode_many_kernel")
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, local memory (spills) and shared memory of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text))
    return {key.lower(): int(value) for key, value in found.items()}


class Recorder:
    """Stands in for a kernel: compiles it for the arguments of each launch, once per distinct variant."""

    def __init__(self, kernel: Any, rows: list[dict[str, Any]]):
        self.kernel, self.rows, self.seen = kernel, rows, set[str]()
        self.arch, self.label = 80, ""

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        signature, constants, attrs = {}, {}, {}
        for index, name in enumerate(self.kernel.arg_names):
            value = args[index] if index < len(args) else kwargs.pop(name)
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                attrs[(index,)] = [["tt.divisibility", 16]]
            elif value is None or index >= len(args):
                signature[name] = "constexpr"
                constants[name] = value
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
        key = str((self.arch, signature, constants, kwargs))
        if key in self.seen:
            return
        self.seen.add(key)
        source = ASTSource(self.kernel, signature, constants, attrs)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=kwargs)
        ptx = compiled.asm["ptx"]
        row = {"kernel": self.kernel.__name__, "arch": self.arch, "variant": self.label}
        row |= resources(compiled.asm["cubin"])
        row["wide_loads"] = len(re.findall(r"ld\.global[\w.:]*\.v4\.b32", ptx))
        row["wide_copies"] = len(re.findall(r"cp\.async\.cg\.shared\.global[^,]*, 0x10|cp\.async\.cg", ptx))
        row["tensor_core"] = "mma" in ptx
        row["warp_group"] = "wgmma.mma" in ptx
        row["barriers"] = len(re.findall(r"ld\.acquire\.gpu", ptx))
        row["waits"] = len(re.findall(r"ld\.relaxed\.gpu", ptx))
        row["prefetches"] = ptx.count("prefetch.global.L2")
        row["dependent"] = "griddepcontrol.wait" in ptx
        row["ptx_bytes"] = len(ptx)
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def variants(full: bool) -> Any:
    """(arch, dtype, int8, gated, biases, activation, tokens, router, S, tiles): all axes, not all combinations."""
    base = {"dtype": torch.bfloat16, "int8": False, "gated": True, "bias": False, "activation": "silu"}
    base |= {"tokens": 1, "router": "own", "size": SIZE, "hidden": HIDDEN, "experts": EXPERTS}
    for arch, tokens in itertools.product((80, 90), (1, 16)):
        changes: list[dict[str, Any]] = [{}, {"gated": False, "bias": True, "activation": "gelu"}, {"int8": True}]
        changes += [
            {"router": "given"},
            {"router": "wide"},
            {"router": "rounded"},
            {"dtype": torch.float32, "activation": "gelu_tanh"},
        ]
        changes += [{"dtype": torch.float16, "activation": "relu2"}]
        if full or (arch, tokens) == (80, 1):
            changes += [{"size": 8, "activation": "relu"}, {"size": 64}, {"size": 16}, {"hidden": 100}]
        if tokens == 16:
            changes += [{"tiles": {"span": True, "share": 1, "prefetch": 16}}]
        if (arch, tokens) == (90, 1):
            changes += [{"experts": experts} for experts in (FEW, MORE, MANY)]
        for change in changes:
            yield {**base, "arch": arch, "tokens": tokens, **change}


def launch_variant(v: dict[str, Any]) -> None:
    """Runs the launcher on meta tensors."""
    hidden, experts, neurons = v["hidden"], v["experts"], v["experts"] * v["size"]

    def empty(*shape: int, dtype: torch.dtype = v["dtype"]) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    dtype = torch.int8 if v["int8"] else v["dtype"]
    named = {name: empty(neurons, hidden, dtype=dtype) for name in ("up", "down", *(["gate"] * v["gated"]))}
    if v["int8"]:
        sizes = {"gate": neurons, "up": neurons, "down": hidden}
        named |= {f"{name}_scale": empty(sizes[name], dtype=torch.float32) for name in list(named)}
    if v["bias"]:
        named |= {"up_bias": empty(neurons), "down_bias": empty(hidden)}
    router_dtype = v["dtype"] if v["router"] == "own" else torch.float32
    routing = Routing(weight=empty(experts, hidden, dtype=router_dtype), bias=empty(experts, dtype=torch.float32))
    if v["router"] == "rounded":
        routing = replace(routing, rounded=empty(experts, hidden))
    if v["router"] == "given":
        routing = Routing(logits=empty(v["tokens"], experts, dtype=torch.float32))
    weights = FfnWeights(**named)
    tiles = None
    if "tiles" in v:
        tiles = replace(launch.many_token_tiles(weights.up, v["tokens"], v["size"]), **v["tiles"])
    decode.run_decode(empty(v["tokens"], hidden), weights, routing, v["activation"], tiles)


def compile_variants(
    names: Iterable[str],
    all_variants: Iterable[dict[str, Any]],
    run: Callable[[dict[str, Any]], None],
    *,
    kernels: Any,
    entry: Any,
    tiles: Any,
) -> None:
    """Compiles what `run` launches for each variant.

    Args:
        names: of the kernels.
        all_variants: what `run` takes; `arch` is the architecture.
        run: launches kernels on meta tensors.
        kernels: the module in which they are looked up.
        entry: the module that asks for the number of multiprocessors.
        tiles: the module that asks for the architecture.
    """
    rows: list[dict[str, Any]] = []
    recorders = [Recorder(getattr(kernels, name), rows) for name in names]
    for name, recorder in zip(names, recorders, strict=True):
        setattr(kernels, name, recorder)
    entry.multiprocessors = lambda device: 132
    for v in all_variants:
        tiles.architecture = lambda device, arch=v["arch"]: arch
        for recorder in recorders:
            recorder.arch = v["arch"]
            recorder.label = " ".join(f"{key}={value}" for key, value in v.items() if key != "arch")
        run(v)


if __name__ == "__main__":
    compile_variants(NAMES, variants("--full" in sys.argv), launch_variant, kernels=decode, entry=decode, tiles=launch)
