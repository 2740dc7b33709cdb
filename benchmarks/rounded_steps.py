"""Decoding steps of one trained folder in 16, 8 and 4 bits, sparse and dense, on the model's own answers.

    python benchmarks/rounded_steps.py out --weights native int8 int4-64 --batches 1 4 --output rounded_steps.json

torchao rounds the weights. Each format has three providers: the whole step of the sparse model with its own routing,
the same engine with all experts on, and the dense model as torchao runs it under `torch.compile` with CUDA graphs. The
logits of each are compared with those of the model run module by module before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ffn_rows import write_rows
from torch import Tensor

import lte
from lte.bench.decode import REDUCE_OVERHEAD, REDUCED, Decoder
from lte.bench.gate import GateError
from lte.bench.rows import DENSE_STEP
from lte.bench.step import WholeStep, all_on
from lte.bench.text import read_text, text_ids
from lte.bench.timing import Times, interleaved_times
from lte.config import WEIGHTS
from lte.eval.answers import generate_greedily
from lte.eval.decisions import in_one_pass
from lte.eval.models import load_any_model
from lte.eval.rounding import bytes_per_weight, memory_bytes, round_weights_
from lte.hf.decoder import NoPlanError, decoder_plan
from lte.hf.dense import load_tokenizer
from lte.runs.memory import free_memory

LTE_STEP = "lte whole step"


def dense_run(decoder: Decoder) -> Callable[[], Tensor]:
    """The dense step of PyTorch: compiled on a GPU, eager on a CPU."""
    return decoder.checked(REDUCE_OVERHEAD, f"the logits of {REDUCED}") if decoder.token.is_cuda else decoder.eager


@torch.no_grad()
def rows_of(folder: str, weights: str, prompts: Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one format and batch, and a line for each provider that cannot run."""
    models: dict[str, Any] = {
        kind: round_weights_(load_any_model(folder, args.dtype), weights) for kind in ("sparse", "dense")
    }
    ids = generate_greedily(lte.accelerate_(models["sparse"]), prompts, args.context - prompts.shape[1])
    routed = in_one_pass(models["sparse"], ids.cpu()).active[:, :, prompts.shape[1] :]
    sparsity = 1 - routed.double().mean().item()
    dense = Decoder(lte.densify_(models["dense"]), ids, prompts.shape[1], args.context)
    sparse = Decoder(models["sparse"], ids, prompts.shape[1], args.context)
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        LTE_STEP: lambda: checked_step(sparse, args.context, LTE_STEP, lambda plan: plan),
        DENSE_STEP: lambda: checked_step(dense, args.context, DENSE_STEP, all_on, models["sparse"]),
        REDUCED: lambda: dense_run(dense),
    }
    runs, notes = {}, {}
    for name, make in makers.items():
        try:
            runs[name] = make()
        except (NoPlanError, GateError, RuntimeError) as error:
            notes[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{weights}, batch {len(prompts)}, {name}: {notes[name]}", flush=True)

    def before(name: str) -> None:
        (sparse if name == LTE_STEP else dense).next_token(isinstance(runs[name], WholeStep))

    times = interleaved_times(runs, ids.device, args.repeats, before)
    common = {"benchmark": "decode", "dtype": args.dtype, "batch": len(prompts), "weights": weights}
    common |= {"context_length": args.context, "bytes_per_weight": bytes_per_weight(models["sparse"])}
    found: list[dict[str, Any]] = []
    for name in makers:
        model = models["sparse" if name == LTE_STEP else "dense"]
        row = {**common, "provider": name, "sparsity": sparsity if name == LTE_STEP else 0.0}
        took = asdict(Times.of(times[name])) if name in runs else {"note": notes[name]}
        found.append({**row, "weights_memory_bytes": memory_bytes(model), **took})
        print(found[-1], flush=True)
    return found


def checked_step(
    decoder: Decoder, context: int, name: str, change: Callable[[Any], Any], model: Any = None
) -> WholeStep:
    """A whole step whose logits are those of the decoder's model.

    Raises:
        NoPlanError: if no engine computes it.
        GateError: if its logits are others.
    """
    routed = decoder.model if model is None else model
    step = WholeStep(lambda: change(decoder_plan(routed)), decoder, context)
    step.check(f"the logits of {name}")
    decoder.restart()
    return step


def main(arguments: list[str] | None = None) -> None:
    """Times what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a saved LTE model")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["native", "int8", "int4", "int4-64"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--text", type=Path, help="by default Python's help topics")
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    prompts = text_ids(load_tokenizer(args.folder), read_text(args.text), max(args.batches), args.prompt_length)
    rows: list[dict[str, Any]] = []
    for weights in args.weights:
        for batch in args.batches:
            free_memory(True)
            rows += rows_of(args.folder, weights, prompts[:batch], args)
            write_rows(args.output, rows)


if __name__ == "__main__":
    main()
