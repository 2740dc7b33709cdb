"""Times of whole decoding steps in one launch, at forced sparsities, beside the bytes that they must read.

    python benchmarks/step.py --output step.json
    python benchmarks/step.py --trace --shapes qwen2.5-1.5b
    python benchmarks/step.py --compile 90 132 232448   # for an H200, without one: the machine code is kept

Random weights, bf16, or with `--bits 8 4` in so many bits; `dense` is the same kernel without routers.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from ffn_rows import row, write_rows
from torch import Tensor

from lte.bench.shapes import shape_config
from lte.bench.step import all_on
from lte.bench.timing import copy_gb_per_s, interleaved_times
from lte.ops.step.compile import cached_cubin
from lte.ops.step.cuda import CudaEngine, Machine, macros, unfit
from lte.ops.step.phases import STAMPS, phase_us
from lte.ops.step.plan import DecoderLayer, DecoderPlan, LayerCache, Quantized, Rope
from lte.ops.step.reference import ReferenceEngine, upcast

SHAPES = ("llama2-7b", "qwen2.5-1.5b", "smollm2-135m")
SIZE, REPEATS, ROOM, CHECKED_LAYERS = 32, 30, 16, 2


@dataclass
class Model:
    """A decoder with random weights.

    Attributes:
        plan: with routers of zeros, so that the biases alone decide.
        biases: [layers, E].
    """

    plan: DecoderPlan
    biases: Tensor


def random_model(name: str, device: str) -> Model:
    """A shape's decoder, in bf16."""
    config = shape_config(name)
    layers, hidden, heads, kv_heads = (
        getattr(config, each)
        for each in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    size, neurons, vocabulary = config.head_dim, config.intermediate_size, config.vocab_size
    tied = config.tie_word_embeddings
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int, fan_in: int | None = None) -> Tensor:
        weight = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return weight.normal_(0, (fan_in or columns) ** -0.5, generator=generator)

    def ones() -> Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16, device=device)

    biases = torch.ones(layers, neurons // SIZE, device=device)
    embedding = matrix(vocabulary, hidden)
    plan = DecoderPlan(
        layers=[
            DecoderLayer(
                norm1=ones(),
                q=matrix(heads * size, hidden),
                k=matrix(kv_heads * size, hidden),
                v=matrix(kv_heads * size, hidden),
                out=matrix(hidden, heads * size),
                norm2=ones(),
                up=matrix(neurons, hidden),
                down=matrix(neurons, hidden, neurons),
                gate=matrix(neurons, hidden),
                router=torch.zeros(neurons // SIZE, hidden, dtype=torch.bfloat16, device=device),
                router_bias=bias,
            )
            for bias in biases
        ],
        embedding=embedding,
        final_norm=ones(),
        head=embedding if tied else matrix(vocabulary, hidden),
        ropes=[Rope(frequencies=1e4 ** -(torch.arange(size // 2, device=device) / (size // 2)))],
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        activation="silu",
        eps=1e-5,
        score_scale=size**-0.5,
    )
    return Model(plan, biases)


def quantized(model: Model, bits: int) -> Model:
    """The same with random matrices of so many bits in the place of all; itself for 0 bits."""

    def matrix(weight: Any, transposed: bool = False) -> Quantized:
        (rows, columns), half = weight.shape, 2 ** (bits - 1)
        inputs = rows if transposed else columns
        groups = 1 if bits == 8 else inputs // group
        shape = (groups, columns) if transposed else (rows, groups)
        values = torch.randint(-half, half, (rows, columns), dtype=torch.int8, device=weight.device)
        dtype = torch.float32 if bits == 8 else weight.dtype
        scales = torch.full(shape, (12 / inputs) ** 0.5 / 2**bits, dtype=dtype, device=weight.device)
        return Quantized(values=values, scales=scales, zeros=None if bits == 8 else scales / 2, bits=bits)

    def layer(old: DecoderLayer) -> DecoderLayer:
        rows = {name: matrix(getattr(old, name)) for name in ("q", "k", "v", "out", "gate", "up")}
        return replace(old, **rows, down=matrix(old.down, transposed=True))

    if not bits:
        return model
    sizes = model.plan.layers[0].up.shape
    group = next(group for group in (128, 64, 32) if all(size % group == 0 for size in sizes))
    plan = replace(model.plan, layers=[layer(old) for old in model.plan.layers], head=matrix(model.plan.head))
    return Model(plan, model.biases)


def random_caches(plan: DecoderPlan, batch: int, length: int) -> list[LayerCache]:
    """Full ones."""
    shape = batch, plan.kv_heads, length, plan.head_size
    return [
        LayerCache(keys=k.normal_(), values=k.clone()) for k in (plan.embedding.new_empty(shape) for _ in plan.layers)
    ]


def step_bytes(plan: DecoderPlan, batch: int, context: int, active: float) -> int:
    """Bytes that a step must read: all weights, of FFNs the active share, and the caches."""

    def bytes_of(matrix: Any) -> float:
        if isinstance(matrix, Tensor):
            return matrix.nbytes
        per_scale = matrix.scales.itemsize * (2 if matrix.bits == 4 else 1)  # 4 bits have zeros, too
        return matrix.values.numel() * matrix.bits / 8 + matrix.scales.numel() * per_scale

    size = bytes_of(plan.head) + batch * context * 2 * 2 * plan.kv_heads * plan.head_size * len(plan.layers)
    for layer in plan.layers:
        for field in fields(layer):
            weight = getattr(layer, field.name)
            if isinstance(weight, Tensor | Quantized):
                size += bytes_of(weight) * (active if field.name in ("gate", "up", "down") else 1)
    return round(size)


def error(plan: DecoderPlan, batch: int, context: int, extra: dict[str, int]) -> float:
    """Relative RMS of the logits of a few layers to those of the reference in fp32."""
    plan = replace(plan, layers=list(plan.layers[:CHECKED_LAYERS]))
    caches = random_caches(plan, batch, context + ROOM)
    reference = ReferenceEngine(upcast(plan)).bind([upcast(cache) for cache in caches])
    inputs = inputs_at(plan, batch, context)
    expected = reference(*inputs)
    found = CudaEngine(plan).bind(caches, **extra)(*inputs)
    return ((found - expected).norm() / expected.norm()).item()


def inputs_at(plan: DecoderPlan, batch: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and starts."""
    device = plan.embedding.device
    tokens = torch.randint(0, len(plan.embedding), (batch,), device=device)
    return tokens, torch.full_like(tokens, context), torch.zeros_like(tokens)


def mask(model: Model, sparsity: float) -> None:
    """Switches a share of the experts off, others in each layer."""
    layers, experts = model.biases.shape
    off = torch.rand(layers, experts, device=model.biases.device).argsort(1) < round(sparsity * experts)
    model.biases.copy_(torch.where(off, -1.0, 1.0))


def measure(
    name: str, model: Model, bits: int, batch: int, context: int, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for the dense step and one for each sparsity."""
    caches = random_caches(model.plan, batch, context + ROOM)
    inputs = inputs_at(model.plan, batch, context)
    steps = {None: CudaEngine(all_on(model.plan)).bind(caches, **args.set)}
    steps |= dict.fromkeys(args.sparsities, CudaEngine(model.plan).bind(caches, **args.set))
    names = {"dense" if sparsity is None else f"{sparsity:.0%} off": sparsity for sparsity in steps}

    def prepare(run: str) -> None:
        mask(model, names[run] or 0.0)

    runs = {run: (lambda step=steps[sparsity]: step(*inputs)) for run, sparsity in names.items()}
    times = interleaved_times(runs, model.biases.device, REPEATS, before=prepare)
    copied = copy_gb_per_s(model.biases.device)
    dense = None
    for run, sparsity in names.items():
        plan = all_on(model.plan) if sparsity is None else model.plan
        size = step_bytes(plan, batch, context, 1 - (sparsity or 0.0))
        each = row("step", "step dense" if sparsity is None else "step", batch, sparsity or 0.0, times[run], size)
        dense = dense or each["median_ms"]
        each |= {"shape": name, "context": context, "copy_gb_per_s": copied, "ratio": each["median_ms"] / dense}
        each["dtype"] = f"int{bits}" if bits else each["dtype"]
        print(
            f"{name:<13} {each['dtype']} batch {batch} context {context:>5} {run:>8} {each['median_ms']:7.3f} ms "
            f"({each['p20_ms']:.3f}-{each['p80_ms']:.3f}), bytes alone {size / copied / 1e6:6.3f} ms "
            f"({each['gb_per_s'] / copied:4.0%}), {each['ratio']:.3f} of dense",
            flush=True,
        )
        yield each


def trace(name: str, model: Model, batch: int, context: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Prints and returns the time by phase at each sparsity."""
    step = CudaEngine(model.plan).bind(random_caches(model.plan, batch, context + ROOM), TRACE=STAMPS, **args.set)
    for sparsity in args.sparsities:
        mask(model, sparsity)
        found = phase_us(step, inputs_at(model.plan, batch, context), len(model.plan.layers))
        text = ", ".join(f"{phase} {mean:.1f} ({most:.1f})" for phase, (mean, most) in found.items())
        print(f"{name} batch {batch} context {context} {sparsity:.0%} off, us by phase (slowest block): {text}")
        yield {"shape": name, "batch": batch, "context": context, "sparsity": sparsity, "us_by_phase": found}


def compile_all(args: argparse.Namespace) -> None:
    """Keeps the machine code of everything that a run would launch."""
    arch, blocks, shared_bytes = args.compile
    for name in args.shapes:
        machine = Machine(blocks=blocks, shared_bytes=shared_bytes)
        for bits, batch in itertools.product(args.bits, args.batches):
            model = quantized(random_model(name, "meta"), bits)
            for plan, extra in (
                (model.plan, {}),
                (all_on(model.plan), {}),
                *([(model.plan, {"TRACE": STAMPS})] * args.trace),
            ):
                cubin = cached_cubin({**macros(plan, batch, machine), **extra, **args.set}, arch)
                print(f"{name} {bits} bits batch {batch} {extra}: {len(cubin)} bytes for sm_{arch}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--bits", type=int, nargs="+", default=[0], choices=[0, 4, 8], help="of weights; 0 for bf16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--contexts", type=int, nargs="+", default=[100, 4000])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.9])
    parser.add_argument("--trace", action="store_true", help="also the time by phase, with a kernel that notes it")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other constants of the kernel")
    parser.add_argument("--compile", type=int, nargs=3, metavar=("ARCH", "BLOCKS", "BYTES"), help="compile, no more")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    args.set = {name: int(value) for name, _, value in (each.partition("=") for each in args.set)}
    if args.compile:
        return compile_all(args)
    rows: list[dict[str, Any]] = []
    traces: list[dict[str, Any]] = []
    for name in args.shapes:
        for bits, batch in itertools.product(args.bits, args.batches):
            model = quantized(random_model(name, "cuda"), bits)
            reason = unfit(model.plan, random_caches(model.plan, batch, 1))
            if reason is not None:
                print(f"{name} {bits} bits batch {batch} is left out, as {reason}")
                continue
            for context in args.contexts:
                mask(model, 0.5)
                off = error(model.plan, batch, context, args.set)
                assert off <= 1e-2, f"{name} {bits} bits batch {batch} context {context}: the logits are off by {off}"
                rows += measure(name, model, bits, batch, context, args)
                if args.trace:
                    traces += trace(name, model, batch, context, args)
                write_rows(args.output, rows, traces=traces)
            del model


if __name__ == "__main__":
    main()
