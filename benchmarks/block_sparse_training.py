"""What skipping experts could gain in training: an FFN's forward and backward pass, masked against gathered experts.

Where routers are frozen (stage 2 in hard mode), experts that a token switches off need neither a forward nor a backward
pass. Training computes them and multiplies with 0 (`masked`, as `lte.nn.sparse_ffn` does). `grouped` gathers for each
block of experts the tokens that want it, and takes six of the nine products of the size T D F on those alone: gate, up,
the gradient of what goes down, and those of the three weights. Down, and the gradients of x through gate and up, add up
over experts: they stay dense, on zeros.

Besides it is counted what skipping whole tiles of (tokens, experts) could gain at most, if the tiles that are left ran
at the speed of dense products: tokens as they come, and in tiles of tokens that choose alike, which nobody is charged
for finding.

    python benchmarks/block_sparse_training.py --output results/block_sparse_training.json
    python benchmarks/block_sparse_training.py --model trained --text articles.txt --output OUT

Random masks are those of tokens that choose independently, the worst case; with --model they are a trained model's own.

Shapes: T tokens, D hidden size, F neurons, E experts of S neurons, B blocks of experts, N pairs of a token and a block.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ffn_rows import write_rows
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import grouped_mm

from lte.bench.gate import relative_rms, require
from lte.bench.routing import forced_mask, recorded_masks
from lte.bench.shapes import SHAPES
from lte.bench.text import read_text, text_ids
from lte.bench.timing import Times, interleaved_times
from lte.eval.models import load_any_model
from lte.hf.dense import load_tokenizer
from lte.hf.install import sparse_ffns
from lte.nn.balanced_kmeans import integer_gram, partition
from lte.nn.sparse_ffn import scale_experts

TOLERANCE = 2e-2  # relative RMS of two results that are both rounded to bf16
TOKENS = (2048, 4096, 8192, 16384)
BLOCKS = (1, 4)
# Tokens and neurons of a tile of a product.
TILES = ((64, 128), (128, 128), (128, 32))
# Of so many tokens those that choose alike are looked for.
SORTED_TOKENS = 4096


def dense_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The FFN without switching; gate and up [F, D], down [D, F]."""
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)


def masked_ffn(mask: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As training computes it, for a mask [T, E]."""
    activated, factor = functional.silu(functional.linear(x, gate)), functional.linear(x, up)
    return functional.linear(scale_experts(activated, mask.to(x.dtype), factor), down)


@dataclass(frozen=True)
class Groups:
    """The tokens that want each block of experts, block after block.

    Attributes:
        tokens: int64 [N].
        blocks: int64 [N], rising.
        ends: int32 [B], where each block ends.
        kept: which neurons of the block the token wants, [N, F / B]; `None` for blocks of one expert, where it is all.
    """

    tokens: Tensor
    blocks: Tensor
    ends: Tensor
    kept: Tensor | None

    @staticmethod
    def of(mask: Tensor, experts: int, expert_size: int) -> Groups:
        """For a mask [T, E] and so many experts in a block."""
        inner = mask.unflatten(1, (-1, experts))
        wanted = inner.any(2)
        blocks, tokens = wanted.T.nonzero(as_tuple=True)
        kept = None if experts == 1 else inner[tokens, blocks].repeat_interleave(expert_size, 1)
        return Groups(tokens, blocks, wanted.sum(0).cumsum(0, dtype=torch.int32), kept)


class GroupedFfn(torch.autograd.Function):
    """The FFN on the tokens of each block, gathered; gradients of x and of all weights."""

    @staticmethod
    def forward(ctx: Any, groups: Groups, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        count, ends = len(groups.ends), groups.ends
        rows = x[groups.tokens]
        gated = grouped_mm(rows, gate.unflatten(0, (count, -1)).mT, offs=ends)
        factor = grouped_mm(rows, up.unflatten(0, (count, -1)).mT, offs=ends)
        hidden = fused(switched, x)(gated, factor, groups.kept)
        ctx.groups = groups
        ctx.save_for_backward(x, gate, up, down, gated, factor)
        return functional.linear(_spread(hidden, groups, len(x)), down)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        groups: Groups = ctx.groups
        x, gate, up, down, gated, factor = ctx.saved_tensors
        count, ends, rows, outer = len(groups.ends), groups.ends, x[groups.tokens], grad[groups.tokens]
        into = grouped_mm(outer, down.unflatten(1, (count, -1)).movedim(1, 0), offs=ends)
        hidden, d_gated, d_factor = fused(switched_gradients, x)(into, gated, factor, groups.kept)
        d_weights = [grouped_mm(each.mT, rows, offs=ends).flatten(0, 1) for each in (d_gated, d_factor)]
        d_down = grouped_mm(outer.mT, hidden, offs=ends).movedim(0, 1).flatten(1)
        d_x = _spread(d_gated, groups, len(x)) @ gate + _spread(d_factor, groups, len(x)) @ up
        return None, d_x, *d_weights, d_down


def switched(gated: Tensor, factor: Tensor, kept: Tensor | None) -> Tensor:
    """What goes into the down projection, [N, F / B]."""
    hidden = functional.silu(gated) * factor
    return hidden if kept is None else hidden * kept


def switched_gradients(into: Tensor, gated: Tensor, factor: Tensor, kept: Tensor | None) -> tuple[Tensor, ...]:
    """`switched` once more, and its gradients with respect to `gated` and `factor` for one of `into`."""
    into = into if kept is None else into * kept
    sigmoid = torch.sigmoid(gated)
    activated = gated * sigmoid
    return (
        activated * factor if kept is None else activated * factor * kept,
        into * factor * (sigmoid + activated * (1 - sigmoid)),
        into * activated,
    )


def fused(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """On a GPU compiled to one kernel, as `scale_experts` is."""
    return _compiled(function) if x.is_cuda else function


# Once for each function: asked for anew in each call it takes the CPU longer than a small FFN takes the GPU.
_compiled = functools.cache(partial(torch.compile, dynamic=True))


def _spread(values: Tensor, groups: Groups, tokens: int) -> Tensor:
    """Values [N, F / B] at their places in [T, F], 0 elsewhere."""
    whole = values.new_zeros(tokens, len(groups.ends), values.shape[1])
    whole[groups.tokens, groups.blocks] = values
    return whole.flatten(1)


def grouped_ffn(groups: Groups, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`masked_ffn` on gathered tokens."""
    return GroupedFfn.apply(groups, x, gate, up, down)


def gradients(ffn: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output of an FFN, and the gradients of x and of its weights: what a training step computes."""
    output = ffn(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def tile_share(mask: Tensor, tile: tuple[int, int], expert_size: int, sort: bool) -> float:
    """The share of tiles of a product [T, F] that at least one token and neuron needs.

    Args:
        mask: [T, E].
        tile: tokens and neurons of it.
        expert_size: S.
        sort: whether tokens that choose alike are put into the same tile first.
    """
    tokens, experts = tile[0], max(1, tile[1] // expert_size)
    mask = mask[: len(mask) // tokens * tokens]
    if sort:
        mask = mask[partition(integer_gram(mask.float()), tokens, seed=0).flatten()]
    mask = mask[:, : mask.shape[1] // experts * experts]
    return mask.unflatten(0, (-1, tokens)).any(1).unflatten(1, (-1, experts)).any(2).float().mean().item()


def tile_bounds(mask: Tensor, expert_size: int) -> list[dict[str, Any]]:
    """For each size of tiles the share that is needed, and what skipping the others could gain at most."""
    found = []
    for tile, sort in itertools.product(TILES, (False, True)):
        share = tile_share(mask[:SORTED_TOKENS], tile, expert_size, sort)
        found.append({"tile": list(tile), "sorted": sort, "tiles_needed": share, "gain_at_most": 1 / share})
    return found


def measure(
    name: str, mask: Tensor, sizes: tuple[int, int], blocks: Sequence[int], dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """Forward and backward times for a mask [T, E], each kind of blocks as a ratio to masked; gradients are checked.

    Raises:
        GateError: if the output or a gradient is another one than that of the masked FFN.
    """
    hidden, neurons = sizes
    device, expert_size = mask.device, neurons // mask.shape[1]
    shapes = [(len(mask), hidden), (neurons, hidden), (neurons, hidden), (hidden, neurons)]
    inputs = [
        torch.randn(shape, device=device, dtype=dtype).mul_(scale).requires_grad_()
        for shape, scale in zip(shapes, (1.0, hidden**-0.5, hidden**-0.5, neurons**-0.5), strict=True)
    ]
    grad = torch.randn(len(mask), hidden, device=device, dtype=dtype)
    runs: dict[str, Callable[..., Tensor]] = {"dense": dense_ffn, "masked": partial(masked_ffn, mask)}
    undivided = [experts for experts in blocks if mask.shape[1] % experts]
    for experts in [each for each in blocks if each not in undivided]:
        runs[f"grouped {experts}"] = partial(grouped_ffn, Groups.of(mask, experts, expert_size))
    notes = {f"grouped {each}": f"{mask.shape[1]} experts make no blocks of {each}" for each in undivided}
    notes |= check(runs, inputs, grad)
    calls = {each: partial(gradients, run, inputs, grad) for each, run in runs.items()}
    times = interleaved_times(calls, device, repeats)
    masked = Times.of(times["masked"]).median_ms
    rows = [
        {"provider": each, **asdict(Times.of(found)), "speed_over_masked": masked / Times.of(found).median_ms}
        for each, found in times.items()
    ]
    rows += [{"provider": each, "note": note} for each, note in notes.items()]
    sparsity = 1 - mask.float().mean().item()
    return {"routing": name, "tokens": len(mask), "hidden": hidden, "neurons": neurons, "expert_size": expert_size,
            "sparsity": sparsity, "times": rows, "tiles": tile_bounds(mask, expert_size)}  # fmt: skip


def check(runs: dict[str, Callable[..., Tensor]], inputs: Sequence[Tensor], grad: Tensor) -> dict[str, str]:
    """Compares grouped FFNs with the masked one; those that cannot run are taken out, and why is returned by name."""
    expected, notes = gradients(runs["masked"], inputs, grad), {}
    for provider in [each for each in runs if each.startswith("grouped")]:
        try:
            found = gradients(runs[provider], inputs, grad)
        except RuntimeError as error:  # not enough memory, or a product that this GPU does not have
            notes[provider] = f"{type(error).__name__}: {error}"[:300]
            del runs[provider]
            continue
        for part, values, wanted in zip(("output", "x", "gate", "up", "down"), found, expected, strict=True):
            require(relative_rms(values, wanted), TOLERANCE, f"{part} of {provider}")
    return notes


def random_cases(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Tensor, tuple[int, int]]]:
    """Masks of tokens that choose independently, of each shape, sparsity and number of tokens."""
    for shape, sparsity, tokens in itertools.product(args.shapes, args.sparsities, args.tokens):
        sizes = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
        mask = forced_mask(tokens, sizes[1] // args.expert_size, sparsity, 0).to(device)
        yield f"independent, {shape}", mask, sizes


@torch.no_grad()
def recorded_cases(args: argparse.Namespace) -> Iterator[tuple[str, Tensor, tuple[int, int]]]:
    """A trained model's own masks on a text: of its first, middle and last layer, for each number of tokens."""
    model = load_any_model(args.model, "bfloat16" if torch.cuda.is_available() else "float32")
    ffns = list(sparse_ffns(model).values())
    ids = text_ids(load_tokenizer(args.model), read_text(args.text), max(args.tokens) // args.length, args.length)
    with recorded_masks(ffns) as calls:
        for row in ids.to(model.device).split(1):
            model(input_ids=row, use_cache=False, logits_to_keep=1)
    masks = [torch.cat(layer) for layer in calls]
    sizes = [(ffn.hidden_size, ffn.num_neurons) for ffn in ffns]
    del model
    for layer, tokens in itertools.product(sorted({0, len(ffns) // 2, len(ffns) - 1}), args.tokens):
        if tokens <= len(masks[layer]):
            yield f"layer {layer} of {Path(args.model).name}", masks[layer][:tokens], sizes[layer]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=["qwen2.5-1.5b", "llama2-7b"])
    parser.add_argument("--model", help="folder of a trained LTE model, in place of random masks")
    parser.add_argument("--text", type=Path, help="of --model; unset: Python's own help")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row of the text")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS), help="experts of a block")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    rows = []
    for name, mask, sizes in recorded_cases(args) if args.model else random_cases(args, device):
        rows.append(measure(name, mask, sizes, args.blocks, dtype, args.repeats))
        print_row(rows[-1])
        config = {key: value for key, value in vars(args).items() if key not in ("output", "text")}
        write_rows(args.output, rows, benchmark="block_sparse_training", config=config)


def print_row(row: dict[str, Any]) -> None:
    """A case for reading."""
    print(f"{row['routing']}, {row['tokens']} tokens, {row['sparsity']:.1%} sparse")
    for each in row["times"]:
        shown = each.get("note") or f"{each['median_ms']:9.3f} ms  x{each['speed_over_masked']:.3f} of masked"
        print(f"  {each['provider']:>10}  {shown}")
    best = min(row["tiles"], key=lambda each: each["tiles_needed"])
    print(f"  tiles: at best {best['tiles_needed']:.1%} needed, x{best['gain_at_most']:.3f} at most", flush=True)


if __name__ == "__main__":
    main()
