"""The sparse FFN with the routing of a trained model: tokens in a row of a text, a few of them and prompts.

    python benchmarks/recorded_routing.py MODEL --text articles.txt --output recorded.json
    python benchmarks/recorded_routing.py MODEL --text articles.txt --apart --tokens 2 4 8 16 --output batches.json

The model reads the text once, in hard mode, and what its routers decide is kept. Then FFNs of given widths, by default
LLaMA2-7B's, are timed whose routers decide the same, beside the best dense FFN: every path, with weights of its own for
each layer and other tokens in each, so that a time is the mean over all layers of the model. Weights are random, which
times do not depend on. Where the widths have more experts than the model some columns of its masks are taken twice.
With `--apart` the tokens of a batch come from places all over the text, as those of different requests do.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from ffn_rows import command_of, row, write_rows
from prefill import TOLERANCE, count_work, dense_rows, effort, paths
from prefill_layers import Layers, Widths
from torch import Tensor

from lte.bench.gate import relative_rms, require
from lte.bench.routing import Use, recorded_masks, use_of
from lte.bench.shapes import SHAPES
from lte.bench.text import read_text, text_ids
from lte.bench.timing import graph_times
from lte.eval.models import load_any_model
from lte.hf.dense import load_tokenizer
from lte.hf.install import require_sparse_ffns
from lte.ops.launch import architecture
from lte.ops.paths import FfnKind, choose_path
from lte.ops.reference import sparse_ffn_reference

TOKENS = (1, 2, 4, 8, 16, 512, 2048, 8192)


@torch.no_grad()
def masks_of(folder: str, text: Path | None, length: int) -> tuple[list[Tensor], int]:
    """What each layer of a trained model decides for the first T tokens of a text, read at once.

    Returns:
        The decisions [T, E] of each layer, and how many experts, the first ones, are always on.
    """
    model = load_any_model(folder, "bfloat16" if torch.cuda.is_available() else "float32")
    ids = text_ids(load_tokenizer(folder), read_text(text), 1, length).to(model.device)
    ffns = list(require_sparse_ffns(model).values())
    with recorded_masks(ffns) as calls:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return [torch.cat(layer) for layer in calls], ffns[0].router.always_on


def draws(
    masks: Sequence[Tensor], tokens: int, layers: int, seed: int = 0, apart: bool = False
) -> Iterator[list[Tensor]]:
    """Masks [T, E] of so many layers of the model at a time, all layers in turn, each of T tokens from a random place.

    With `apart` each token has a place of its own. The last draw begins again with the first layers where the number of
    layers is no multiple.
    """
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, len(masks), layers):
        chosen = [masks[(first + index) % len(masks)] for index in range(layers)]
        if apart:
            yield [mask[torch.randperm(len(mask), generator=generator)[:tokens].to(mask.device)] for mask in chosen]
            continue
        starts = [int(torch.randint(len(mask) - tokens + 1, (), generator=generator)) for mask in chosen]
        yield [mask[start : start + tokens] for mask, start in zip(chosen, starts, strict=True)]


def measure(
    layers: Layers, masks: Sequence[Tensor], core: int, tokens: int, places: int, apart: bool = False
) -> list[dict[str, Any]]:
    """Rows of the dense FFNs and of every path for T tokens; a `RuntimeError` where an output is wrong.

    The first `core` experts of the masks are always on; `apart` is that of `draws`.
    """
    count, repeats = effort(layers.widths, tokens)
    layers.take(tokens)
    rows = dense_rows(layers, tokens)
    best = min(each["median_ms"] for each in rows)
    samples: dict[str, list[list[float]]] = {}
    errors: dict[str, float] = {}
    used: list[Tensor] = []
    for seed in range(places if tokens <= 256 else 1):
        for drawn in draws(masks, tokens, count, seed, apart):
            layers.follow(drawn, core)
            used += drawn
            wanted = sparse_ffn_reference(layers.x, layers.ffns[0], layers.routings[0], "silu")
            for name, run in paths(layers, tokens).items():
                error = require(relative_rms(run(0), wanted), TOLERANCE, f"the output by {name}")
                errors[name] = max(error, errors.get(name, 0.0))
                samples.setdefault(name, []).append(graph_times(run, repeats, count))
    use = use_of(used)
    for name, runs in samples.items():
        times = [statistics.fmean(repeat) for repeat in zip(*runs, strict=True)]
        entry = path_row(layers.widths, name, tokens, use, times, layers.routings[0].core / layers.widths.experts)
        checked = {"relative_rms": errors[name], "draws": len(runs)}
        rows.append(entry | checked | {"ratio_to_dense": entry["median_ms"] / best})
    return rows


def path_row(widths: Widths, name: str, tokens: int, use: Use, times: list[float], core: float) -> dict[str, Any]:
    """A path's row; `chosen` says whether `lte.ops` takes it for a model of which just this was measured."""
    size, flops = count_work(widths, name, tokens, use.active, use.union)
    kind = FfnKind(architecture(torch.device("cuda")), 2, True, widths.weight_bytes)
    entry = row("prefill", f"lte {name}", tokens, use.sparsity, times, size) | {"flops": flops}
    entry |= {"routing": "recorded", "active_fraction": use.active, "union": use.union, "core": core}
    return entry | {"chosen": choose_path(kind, tokens, use.active, union=use.union, core=core) == name}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained LTE model")
    parser.add_argument("--text", type=Path, help="unset: Python's own help")
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=["llama2-7b"], help="whose widths")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument(
        "--places", type=int, default=3, help="of 256 tokens or fewer, from how many places of each layer"
    )
    parser.add_argument("--apart", action="store_true", help="tokens from places all over the text, not in a row")
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    args = parser.parse_args(arguments)
    # Tokens apart need a text to lie apart in.
    length = max(*TOKENS, *args.tokens) if args.apart else max(args.tokens)
    (masks, core), rows = masks_of(args.model, args.text, length), []
    command = command_of("recorded_routing", arguments)
    for shape in args.shapes:
        layers = Layers(Widths.of(shape))
        for tokens in args.tokens:
            measured = measure(layers, masks, core, tokens, args.places, args.apart)
            found = [each | {"shape": shape} for each in measured]
            rows += found
            sparse = [each for each in found if "union" in each]
            cells = (
                f"{each['provider']}{'*' if each['chosen'] else ''} {each['ratio_to_dense']:.3f}" for each in sparse
            )
            shares = f"{sparse[0]['sparsity']:.1%} off, {1 - sparse[0]['union']:.1%} together"
            print(f"{shape}, {tokens} tokens: {shares}; {', '.join(cells)}", flush=True)
            write_rows(
                args.output, rows, model=Path(args.model).name, command=command, places=args.places, apart=args.apart
            )
        del layers


if __name__ == "__main__":
    main()
