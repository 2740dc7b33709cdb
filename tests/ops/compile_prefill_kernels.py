"""Compiles the kernels for many tokens as `compile_kernels` does those for few; run by `test_prefill_compilation`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from lte.ops import prefill, prefill_kernels, prefill_launch
from lte.ops.arguments import FfnWeights, Routing
from lte.ops.layout import stack_inputs
from lte.ops.prefill_launch import SkinnyTiles
from tests.ops.compile_kernels import compile_variants

NAMES = ("skinny_product_kernel", "masked_activation_kernel", "list_tokens_kernel", "grouped_kernel")
HIDDEN, EXPERTS = 4096, 344
# Of a product of few tokens, with what decides on its form: the token count, which factor is first, warps.
SKINNY: tuple[dict[str, Any], ...] = (
    {"tokens": 33, "tiles": SkinnyTiles(block_n=128, stages=4, per_sm=2)},
    {"tokens": 48, "tiles": SkinnyTiles(block_n=256, stages=5, warps=8, per_sm=1)},
    {"tokens": 128, "tiles": SkinnyTiles(block_n=128, stages=3, warps=8)},
    {"tokens": 64, "tiles": SkinnyTiles(block_n=128, stages=4, x_first=True)},
    {"tokens": 17, "tiles": SkinnyTiles(warps=2)},
    {"tokens": 17, "tiles": SkinnyTiles(x_first=True), "dtype": torch.float16},
    {"tokens": 17, "tiles": SkinnyTiles(block_k=128, stages=3), "gated": False},
)


def variants() -> Iterator[dict[str, Any]]:
    """All axes, not all combinations."""
    base = {"dtype": torch.bfloat16, "gated": True, "bias": False, "activation": "silu", "size": 32, "stacked": True}
    base |= {"hidden": HIDDEN, "tokens": 2048, "given": False, "core": 0}
    for arch in (80, 90):
        changes: list[dict[str, Any]] = [{}, {"gated": False, "bias": True, "activation": "gelu"}, {"tokens": 300}]
        changes += [{"stacked": False}, {"dtype": torch.float16, "activation": "relu2"}, {"size": 8, "gated": False}]
        changes += [{"dtype": torch.float32, "activation": "gelu_tanh"}, {"given": True, "tokens": 1}]
        changes += [{"hidden": 100, "activation": "relu"}, {"core": 34}]
        for change, path in itertools.product(changes, ("masked", "grouped")):
            yield {**base, "arch": arch, "path": path, **change}
        for change in (*SKINNY, {"tokens": 32, "tiles": SkinnyTiles(), "hidden": 1000}):
            yield {**base, "arch": arch, "path": "skinny", **change}
        for tokens in (17, 33):  # what the launcher takes
            yield {**base, "arch": arch, "path": "masked", "tokens": tokens}


def launch_variant(v: dict[str, Any]) -> None:
    """Runs the launcher on meta tensors."""
    neurons = EXPERTS * v["size"]

    def empty(*shape: int, dtype: torch.dtype = v["dtype"]) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    inputs = stack_inputs(
        empty(neurons, v["hidden"]),
        empty(neurons, v["hidden"]) if v["gated"] else None,
        empty(EXPERTS, v["hidden"]) if v["stacked"] else None,
    )
    named = {"up": inputs.up, "gate": inputs.gate, "down": empty(neurons, v["hidden"])}
    if v["path"] == "skinny":
        x = empty(v["tokens"], v["hidden"])
        prefill.SkinnyProduct(x, inputs.stacked, v["tiles"])(x, inputs.stacked)
        return
    if v["stacked"]:
        named["stacked"] = inputs.stacked
    if v["bias"]:
        named |= {"up_bias": empty(neurons), "down_bias": empty(v["hidden"])}
    weight = inputs.router if v["stacked"] else empty(EXPERTS, v["hidden"])
    routing = Routing(weight=weight, bias=empty(EXPERTS, dtype=torch.float32))
    if v["given"]:
        routing = Routing(logits=empty(v["tokens"], EXPERTS, dtype=torch.float32))
    routing = replace(routing, core=v["core"])
    run = prefill.run_grouped if v["path"] == "grouped" else prefill.run_masked
    run(empty(v["tokens"], v["hidden"]), FfnWeights(**named), routing, v["activation"])


if __name__ == "__main__":
    compile_variants(NAMES, variants(), launch_variant, kernels=prefill_kernels, entry=prefill, tiles=prefill_launch)
