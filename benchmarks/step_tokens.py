"""Greedy tokens and logits of whole decoding steps beside those of the plain model, for one trained folder on a GPU.

    python benchmarks/step_tokens.py out --text held_out.txt --output tokens.json

`generate` writes the same answers by whole steps and in plain PyTorch, in fp32 and in bf16. Where an answer in fp32
differs, the file says how close the first differing token was: the gap of the first two logits, and the least distance
of a score from its threshold up to there. In bf16 the share of equal tokens stands beside that of the dense model of
the same weights, compiled against eager.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lte
from lte.bench.gate import relative_rms
from lte.bench.text import read_text, text_ids
from lte.eval.answers import agreement, generate_greedily
from lte.eval.models import load_any_model
from lte.files import write_json_atomic
from lte.hf.dense import load_tokenizer
from lte.hf.stepping import has_engine
from lte.nn.hooks import before_each_call
from lte.records import environment
from lte.runs.memory import free_memory

# What the two ways may differ by without a fault: a score this close to its threshold, logits this close to each other.
NEAR_THRESHOLD, NEAR_LOGITS = 1e-5, 1e-4


def answers(model: Any, prompts: Tensor, batch: int, tokens: int, **settings: Any) -> tuple[Tensor, list[Tensor]]:
    """Greedy tokens [N, T], and the logits [T, V] of each prompt."""
    found, logits = [], []
    for ids in prompts.split(batch):
        out = generate_greedily(model, ids, tokens, return_dict_in_generate=True, output_logits=True, **settings)
        found.append(out.sequences[:, ids.shape[1] :].cpu())
        logits += torch.stack(out.logits, dim=1).float().cpu()
    return torch.cat(found), logits


def compare(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> dict[str, Any]:
    """How far answers agree; logits are compared as long as the tokens before them are the same."""
    agreed, length = agreement(one[0], other[0]), one[0].shape[1]
    same = [length if place is None else place for place in agreed["first_differences"]]
    errors = [
        relative_rms(logits[: place + 1], expected[: place + 1])
        for logits, expected, place in zip(one[1], other[1], same, strict=True)
    ]
    return {
        **agreed,
        "tokens_of_each": length,
        "logits_relative_rms_median": sorted(errors)[len(errors) // 2],
        "logits_relative_rms_max": max(errors),
    }


@torch.no_grad()
def causes(model: Any, prompts: Tensor, answer: tuple[Tensor, list[Tensor]], places: list[int | None]) -> list[Any]:
    """How close each first difference was, by the plain model on the same tokens."""
    ffns, found = list(lte.sparse_ffns(model).values()), list[Any]()
    for prompt, tokens, logits, place in zip(prompts, *answer, places, strict=True):
        if place is None:
            continue
        margins: list[float] = []

        def note(ffn: Any, args: tuple[Tensor, ...]) -> None:
            scores = ffn.router(args[0]).sigmoid() - torch.sigmoid(torch.tensor(ffn.threshold_logit))
            margins.append(scores.abs().min().item())  # noqa: B023

        with before_each_call({ffn: ffn.reader for ffn in ffns}, note):
            model(torch.cat([prompt, tokens[:place].to(prompt.device)])[None], use_cache=False)
        first, second = logits[place].topk(2).values.tolist()
        gap, margin = first - second, min(margins)
        traced = gap <= NEAR_LOGITS or margin <= NEAR_THRESHOLD
        found.append({"token": place, "logits_gap": gap, "least_distance_from_tau": margin, "traced": traced})
    return found


def sparse_rows(folder: str, prompts: Tensor, batch: int, tokens: int) -> dict[str, Any]:
    """Whole steps against plain PyTorch, by number format."""
    rows: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        model = load_any_model(folder, dtype)
        prompts = prompts.to(model.device)
        plain = answers(model, prompts, batch, tokens)
        by_steps = answers(lte.accelerate_(model), prompts, batch, tokens)
        if not has_engine(model):
            raise SystemExit(f"{folder} does not decode by whole steps in {dtype}")
        lte.decelerate_(model)
        rows[dtype] = compare(by_steps, plain)
        if dtype == "float32":
            rows[dtype]["causes"] = causes(model, prompts, plain, rows[dtype]["first_differences"])
        del model
        free_memory(False)
        print(dtype, {name: value for name, value in rows[dtype].items() if name != "first_differences"}, flush=True)
    return rows


def dense_row(folder: str, prompts: Tensor, batch: int, tokens: int) -> dict[str, Any]:
    """The dense model of the same weights in bf16, compiled against eager, both with a static cache."""
    model = lte.densify_(load_any_model(folder, "bfloat16"))
    prompts = prompts.to(model.device)
    eager = answers(model, prompts, batch, tokens, cache_implementation="static", disable_compile=True)
    row = compare(answers(model, prompts, batch, tokens, cache_implementation="static"), eager)
    print("dense", {name: value for name, value in row.items() if name != "first_differences"}, flush=True)
    return row


def main(arguments: list[str] | None = None) -> None:
    """Compares what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a saved LTE model")
    parser.add_argument("--text", type=Path, help="by default Python's help topics")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1, help="prompts that are answered together")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    ids = text_ids(load_tokenizer(args.folder), read_text(args.text), args.prompts, args.prompt_length)
    found: dict[str, Any] = {**environment(), "prompt_length": args.prompt_length, "batch": args.batch}
    found |= sparse_rows(args.folder, ids, args.batch, args.tokens)
    write_json_atomic(args.output, found)
    found["dense_bfloat16_compiled"] = dense_row(args.folder, ids, args.batch, args.tokens)
    write_json_atomic(args.output, found)


if __name__ == "__main__":
    main()
