"""Greedy tokens of vLLM beside those of transformers for one LTE folder, and where the two part ways in 16 bits.

Run it with the Python of vLLM's environment; the folder must be one of a Llama, or of a model with the same parts:

    .vllm-env/bin/python benchmarks/vllm_tokens.py FOLDER --output results/vllm/tokens.json

First, how many answers are the same tokens: vLLM against transformers, and as controls transformers against itself,
with kernels against without and in a batch against alone. The dense model of the same weights stands beside the sparse
one. Second, all engines read the same tokens, and their hidden states and decisions are compared layer by layer,
with transformers in fp32 on the same rounded weights as the arbiter; once each engine routes by itself, once all take
the arbiter's decisions. vLLM reads whole rows, by masked products, and token by token, by the kernel of few tokens.

Shapes: N rows of S tokens, T of them written; L layers, D hidden size, E experts.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lte
from lte.bench.text import read_text, text_ids, text_name
from lte.eval.answers import first_difference, generate_greedily
from lte.files import write_json_atomic
from lte.hf.dense import load_tokenizer
from lte.nn.hooks import before_each_call
from lte.records import environment

NEAR = 0.01
FORCED = 1e4
"""Distance from the threshold of a logit that decides in another's place."""


@dataclass
class Reading:
    """What an engine computed for rows of tokens.

    Attributes:
        inputs: of the FFNs, [N, L, S, D].
        final: hidden states before the head, [N, S, D].
        decisions: vLLM's own for these inputs, bool [N, L, S, E], where it routes by itself.
        path: which path of vLLM's computed the FFNs of the first tokens.
    """

    inputs: Tensor
    final: Tensor
    decisions: Tensor | None = None
    path: str | None = None


def reading_of(model: nn.Module, rows: Tensor, read: Callable[[Tensor], object]) -> Reading:
    """What `model` computes while `read` has it read each row, at once or token by token."""
    inner: Any = model.model
    inputs: dict[int, list[Tensor]] = {index: [] for index in range(len(inner.layers))}
    final: list[Tensor] = []

    def keep_final(module: nn.Module, args: Any, output: Any) -> None:
        final.append((output[0] if isinstance(output, tuple) else output).detach().float().clone())

    handle = inner.norm.register_forward_hook(keep_final)
    mlps = {index: layer.mlp for index, layer in enumerate(inner.layers)}
    try:
        with before_each_call(mlps, lambda index, args: inputs[index].append(args[0].detach().float().clone())):
            for row in rows:
                read(row)
    finally:
        handle.remove()
    joined = [torch.cat([piece.flatten(0, -2) for piece in pieces]).view(*rows.shape, -1) for pieces in inputs.values()]
    return Reading(torch.stack(joined, 1), torch.cat([each.flatten(0, -2) for each in final]).view(*rows.shape, -1))


def forced_logits(decisions: Tensor, threshold: float) -> Iterable[Tensor]:
    """Logits [S, E] of each row that decide as `decisions` [N, S, E]."""
    return threshold + FORCED * (decisions.float() * 2 - 1)


# transformers


def load(folder: str, dtype: torch.dtype, dense: bool = False) -> Any:
    """A model of weights rounded to bf16 where `dtype` is not fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return lte.densify_(model) if dense else model


@torch.no_grad()
def read_by_transformers(model: Any, rows: Tensor, decisions: Tensor | None = None) -> Reading:
    """The reading of plain PyTorch, all tokens of a row at once; `decisions` [N, L, S, E] take the routers' place."""
    ffns = list(lte.sparse_ffns(model).values()) if decisions is not None else []
    row_numbers = itertools.count()

    def read(row: Tensor) -> None:
        number = next(row_numbers)
        for index, ffn in enumerate(ffns):
            logits = forced_logits(decisions[number, index], ffn.threshold_logit)[None]
            ffn._route = lambda x, logits=logits: logits
        model(row[None], use_cache=False)

    try:
        return reading_of(model, rows, read)
    finally:
        for ffn in ffns:
            del ffn._route


@torch.no_grad()
def logits_of(model: Any, inputs: Tensor) -> Tensor:
    """The router logits [N, L, S, E] of transformers for the inputs [N, L, S, D] of the FFNs of any engine."""
    ffns = lte.sparse_ffns(model).values()
    return torch.stack([ffn.router(inputs[:, index]) for index, ffn in enumerate(ffns)], 1)


# vLLM


def vllm_job(file: str, folder: str, dtype: str, jobs: list[dict[str, Any]], by_token: bool) -> None:
    """Answers and readings of one engine, saved as `file`; runs in a process of its own."""
    from vllm import LLM, SamplingParams

    longest = max(job["rows"].shape[1] + job["tokens"] for job in jobs)
    piece = 1 if by_token else max(longest + 1, 256)
    llm = LLM(
        folder,
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=longest + 1,
        max_num_batched_tokens=piece,
        max_num_seqs=1 if by_token else 16,
        enable_chunked_prefill=by_token,
        enable_prefix_caching=False,
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,
    )
    found = []

    def ask(rows: Tensor, tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        prompts: list[Any] = [{"prompt_token_ids": row.tolist()} for row in rows]
        return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, params, use_tqdm=False)]

    for job in jobs:
        if job["kind"] == "answers":
            found.append(torch.tensor([ask(row[None], job["tokens"])[0] for row in job["rows"]]))
        else:
            read = functools.partial(read_by_vllm, rows=job["rows"], decisions=job["decisions"], ask=ask, piece=piece)
            found += llm.apply_model(read)
    torch.save(found, file)


def read_by_vllm(
    model: Any, rows: Tensor, decisions: Tensor | None, ask: Callable[[Tensor, int], object], piece: int
) -> Reading:
    """As `read_by_transformers`, through vLLM's scheduler and caches, `piece` tokens at a time."""
    ffns = model.sparse_ffns if decisions is not None else []
    for index, ffn in enumerate(ffns):
        logits = forced_logits(decisions[:, index].flatten(0, 1), ffn.settings.threshold_logit)
        taken = [0]

        # Not `logits`, which the meter asks for as well.
        def run(x: Tensor, ffn: Any = ffn, logits: Tensor = logits, taken: list[int] = taken) -> Tensor:
            taken[0] += len(x)
            return ffn.runner(x, logits[taken[0] - len(x) : taken[0]].contiguous())

        ffn.run = run
    try:
        # A token is written after the last one, and it is never read.
        found = reading_of(model, rows, lambda row: ask(row[None], 1))
        if hasattr(model, "sparse_ffns") and decisions is None:
            dtype = next(model.parameters()).dtype
            own = [ffn.active(found.inputs[:, i].flatten(0, 1).to(dtype)) for i, ffn in enumerate(model.sparse_ffns)]
            found.decisions = torch.stack([each.view(*rows.shape, -1) for each in own], 1)
            found.path = model.sparse_ffns[0].path_of(min(piece, rows.shape[1]), dtype)
        return found
    finally:
        for ffn in ffns:
            del ffn.run


def by_vllm(folder: str, dtype: str, jobs: list[dict[str, Any]], by_token: bool = False) -> list[Any]:
    """What `vllm_job` gives."""
    defaults = {"tokens": 1, "decisions": None}
    with tempfile.TemporaryDirectory() as place:
        file = str(Path(place, "found.pt"))
        process = multiprocessing.get_context("spawn").Process(
            target=vllm_job,
            args=(file, folder, dtype, [{**defaults, **job} for job in jobs], by_token),
        )
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"vLLM ended with {process.exitcode} for {folder} in {dtype}")
        return torch.load(file, weights_only=False)


# Comparison


def agreement(one: Tensor, other: Tensor) -> dict[str, Any]:
    """How many answers [N, T] are the same, and the median place of the first difference, T where there is none."""
    places = [first_difference(*pair) for pair in zip(one, other, strict=True)]
    ends = sorted(one.shape[1] if place is None else place for place in places)
    return {"same_answers": places.count(None), "answers": len(places), "median_same_tokens": ends[len(ends) // 2]}


def relative_rms(one: Tensor, other: Tensor) -> float:
    """The RMS of the difference over that of `other`."""
    return ((one - other).norm() / other.norm()).item()


def compare_readings(one: Reading, other: Reading, head: Tensor, tokens: int) -> dict[str, Any]:
    """How far two engines agree on the same tokens: hidden states by layer, and the likeliest next tokens.

    The last T positions of each row are those that wrote its tokens.
    """
    errors = [relative_rms(one.inputs[:, index], other.inputs[:, index]) for index in range(one.inputs.shape[1])]
    best = [(reading.final[:, -tokens:] @ head.T).argmax(-1) for reading in (one, other)]
    same = best[0] == best[1]
    return {
        "ffn_input_relative_rms": [round(error, 6) for error in errors],
        "final_relative_rms": round(relative_rms(one.final, other.final), 6),
        "same_next_tokens": round(same.float().mean().item(), 4),
        "rows_with_the_same_next_tokens": int(same.all(1).sum()),
    }


def compare_choices(chosen: Tensor, logits: Tensor, threshold: float) -> dict[str, Any]:
    """How many decisions [N, L, S, E] are not those of the logits, and how near to tau the scores of these were."""
    flipped = chosen != (logits > threshold)
    near = (logits.sigmoid() - 1 / (1 + math.exp(-threshold))).abs()
    found = {"share_that_differ": flipped.float().mean().item()}
    if flipped.any():
        found |= {
            "distance_from_tau_of_those_median": near[flipped].median().item(),
            "distance_from_tau_of_those_largest": near[flipped].max().item(),
        }
    return found


def compare_decisions(one: Tensor, other: Tensor, threshold: float) -> dict[str, Any]:
    """How far two engines' logits [N, L, S, E] decide differently, in all and by layer."""
    chosen = one > threshold
    by_layer = (chosen != (other > threshold)).float().mean((0, 2, 3))
    near = (other.sigmoid() - 1 / (1 + math.exp(-threshold))).abs() < NEAR
    return {
        **compare_choices(chosen, other, threshold),
        "share_by_layer": [round(share, 6) for share in by_layer.tolist()],
        "relative_rms_of_logits": relative_rms(one, other),
        f"share_of_scores_within_{NEAR}_of_tau": near.float().mean().item(),
    }


def answers_section(folder: str, dense: str, prompts: Tensor, tokens: int, dtype: str) -> tuple[dict[str, Any], Any]:
    """Whether greedy answers are the same, and those of plain transformers, sparse and dense."""
    job = [{"kind": "answers", "rows": prompts, "tokens": tokens}]

    def written(model: Any, rows: Tensor) -> Tensor:
        return generate_greedily(model, rows, tokens)[:, rows.shape[1] :]

    def alone(model: Any) -> Tensor:
        return torch.cat([written(model, row[None]) for row in prompts])

    model = load(folder, getattr(torch, dtype))
    plain, batched = alone(model), written(model, prompts)
    kernels = alone(lte.accelerate_(model))
    model = load(folder, getattr(torch, dtype), dense=True)
    dense_plain, dense_batched = alone(model), written(model, prompts)
    (served,) = by_vllm(folder, dtype, job)
    (dense_served,) = by_vllm(dense, dtype, job)
    section = {
        "sparse": {
            "vllm, transformers": agreement(served, plain),
            "vllm, transformers with kernels": agreement(served, kernels),
            "transformers with kernels, transformers": agreement(kernels, plain),
            "transformers in a batch, transformers": agreement(batched, plain),
        },
        "dense": {
            "vllm, transformers": agreement(dense_served, dense_plain),
            "transformers in a batch, transformers": agreement(dense_batched, dense_plain),
        },
    }
    for name, rows in section.items():
        for pair, row in rows.items():
            print(dtype, name, pair, row, flush=True)
    return section, {"sparse": torch.cat([prompts, plain], 1), "dense": torch.cat([prompts, dense_plain], 1)}


def readings_section(folder: str, dense: str, rows: dict[str, Tensor], tokens: int) -> dict[str, Any]:
    """The engines layer by layer in bf16, on rows [N, S + 1] whose last token is not read."""
    found: dict[str, Any] = {}
    # Weights rounded as in bf16, and computed with in fp32.
    arbiter = load(folder, torch.bfloat16).float()
    head = arbiter.get_output_embeddings().weight.detach()
    threshold = next(iter(lte.sparse_ffns(arbiter).values())).threshold_logit
    for name, place in (("sparse", folder), ("dense", dense)):
        read = rows[name][:, :-1]
        sparse = name == "sparse"
        exact_model = arbiter if sparse else load(folder, torch.bfloat16, dense=True).float()
        half_model = load(folder, torch.bfloat16, dense=not sparse)
        exact = read_by_transformers(exact_model, read)
        decisions = logits_of(arbiter, exact.inputs) > threshold if sparse else None
        for routing in ("its own", "the arbiter's") if sparse else ("none",):
            forced = decisions if routing == "the arbiter's" else None
            job = [{"kind": "reading", "rows": read, "decisions": forced}]
            readings = {
                "transformers": read_by_transformers(half_model, read, forced),
                "vllm, whole rows": by_vllm(place, "bfloat16", job)[0],
                "vllm, by token": by_vllm(place, "bfloat16", job, by_token=True)[0],
            }
            pairs = [(each, readings[each], "the arbiter", exact) for each in readings]
            pairs += [(each, readings[each], "transformers", readings["transformers"]) for each in list(readings)[1:]]
            for one, one_reading, other, other_reading in pairs:
                row = compare_readings(one_reading, other_reading, head, tokens)
                if one_reading.decisions is not None and other_reading is exact:
                    row["path"] = one_reading.path
                    logits = logits_of(arbiter, one_reading.inputs)
                    row["for_the_same_inputs"] = compare_choices(one_reading.decisions, logits, threshold)
                if routing == "its own":
                    logits = [logits_of(arbiter, reading.inputs) for reading in (one_reading, other_reading)]
                    row["decisions"] = compare_decisions(*logits, threshold)
                found[f"{name}, routing {routing}: {one} against {other}"] = row
                short = {key: value for key, value in row.items() if key != "ffn_input_relative_rms"}
                first, *_, last = row["ffn_input_relative_rms"]
                print(name, routing, one, other, f"layers {first} to {last}", short, flush=True)
    return found


def main() -> None:
    """Compares what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a saved LTE model")
    parser.add_argument("--text", type=Path, help="by default Python's help topics")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt-length", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    prompts = text_ids(load_tokenizer(args.folder), read_text(args.text), args.prompts, args.prompt_length)
    import vllm

    made = environment()
    record: dict[str, Any] = {
        **made,
        "versions": {**made["versions"], "vllm": vllm.__version__},
        "folder": Path(args.folder).name,
        "text": text_name(args.text),
        "prompt_tokens": args.prompt_length,
        "tokens": args.tokens,
    }
    with tempfile.TemporaryDirectory() as dense:
        lte.densify_(load(args.folder, torch.float32)).save_pretrained(dense)
        record["answers"], rows = {}, {}
        for dtype in ("float32", "bfloat16"):
            record["answers"][dtype], rows = answers_section(args.folder, dense, prompts, args.tokens, dtype)
        write_json_atomic(args.output, record)
        record["same_tokens_bfloat16"] = readings_section(args.folder, dense, rows, args.tokens)
    write_json_atomic(args.output, record)


if __name__ == "__main__":
    # An engine in the same process is one that hooks can look into.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main()
