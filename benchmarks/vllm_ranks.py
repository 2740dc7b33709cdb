"""Greedy tokens of an LTE folder in vLLM over several ranks (tensor parallelism) beside those over one.

Run it with the Python of vLLM's environment:

    python benchmarks/vllm_ranks.py FOLDER --ranks 1 2 --dtypes float32 bfloat16 --output results/vllm/ranks.json
    python benchmarks/vllm_ranks.py --shape small --output results/vllm/ranks.json

A shape is a model of random weights whose routers switch a fifth of the experts on; it is given random tokens, a folder
is given text. Ranks add in another order than one, so that answers may part by rounding: the dense model of the same
weights stands beside the sparse one. `--ranks 1 1 2` shows what an engine does from run to run.

Each first difference in fp32 is traced by transformers on the same tokens. It is explained where two logits lie within
1e-4 of each other, or a router score before it within 1e-5 of tau; if one is not, the run ends with an error. In a long
text some score nearly always lies as near. So the decisions next to tau are also flipped, one at a time, and a
difference is `reproduced` where that, or equal logits, makes transformers write both tokens.

The plug-in counts steps by path and samples the routing every 64 steps, so that a row may hold the last of the row
before.

Shapes: N prompts, P tokens of a prompt, T tokens of an answer, S tokens of a text, E experts, V tokens that there are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm_bench import (
    RANDOM,
    SHAPES,
    engine_options,
    sampled,
    saving,
    since,
    vllm_version,
    write_densified,
    write_shape,
)
from vllm_tokens import load

import lte
from lte.bench.text import random_ids, read_text, text_ids, text_name
from lte.eval.answers import agreement
from lte.eval.speculation import closest_call
from lte.eval.token_routing import recorded_logits
from lte.files import write_json_atomic
from lte.hf.dense import load_tokenizer
from lte.records import environment
from lte.runs.memory import free_memory

# What the order of sums in fp32 may move a router score and a logit by.
NEAR_TAU, NEAR_LOGITS = 1e-5, 1e-4
SPARSITY = 0.8
MOST_FLIPS = 16
"""Decisions that are tried for a difference, those next to tau first."""


class Decision(NamedTuple):
    """Whether a token switches an expert on."""

    layer: int
    token: int
    expert: int


# vLLM


def serve() -> None:
    """Waits for a job as JSON, then writes the answers of one engine to all prompts, for each batch size.

    It runs in a process of its own, and the engine in another one, as when it serves.
    """
    from vllm import LLM, SamplingParams

    job = json.loads(sys.stdin.read())
    llm: Any = LLM(job["folder"], **{**engine_options(job), **small_memory(job)})
    second = getattr(llm.llm_engine.vllm_config, "use_v2_model_runner", False)
    params = SamplingParams(temperature=0, max_tokens=job["output_len"], ignore_eos=True, detokenize=False)
    found = []
    for batch in job["batches"]:
        before, answers = sampled(), list[list[int]]()
        for start in range(0, len(job["prompts"]), batch):
            given = [{"prompt_token_ids": row} for row in job["prompts"][start : start + batch]]
            answers += [list(out.outputs[0].token_ids) for out in llm.generate(given, params, use_tqdm=False)]
        found.append({"answers": answers, **saving([since(before)]), "model_runner": 2 if second else 1})
    write_json_atomic(job["file"], found)


def served(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What `serve` writes, by a process that gives all its memory back.

    Raises:
        subprocess.CalledProcessError: if the process failed.
    """
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "answers.json")
        # Not by multiprocessing, whose processes wait for the engine's before they end it.
        given = json.dumps({**job, "file": str(file)})
        subprocess.run([sys.executable, __file__, "--worker"], input=given, text=True, check=True)
        return json.loads(file.read_text(encoding="utf-8"))


def small_memory(job: dict[str, Any]) -> dict[str, Any]:
    """Of `vllm.LLM`: little, so that engines find it on a GPU that others use, too."""
    return {"kv_cache_memory_bytes": (2 << 30) if job["cuda"] else (256 << 20), "gpu_memory_utilization": 0.1}


# Tracing


@torch.no_grad()
def last_logits(model: Any, text: Tensor) -> Tensor:
    """Of the token after a text [S], fp64 [V]."""
    return model(text[None], use_cache=False).logits[0, -1].double()


def decisions_near_tau(model: Any, text: Tensor) -> list[Decision]:
    """Those of a text [S] whose score lies within `NEAR_TAU` of tau, the nearest first."""
    ffns, found = list(lte.sparse_ffns(model).values()), list[tuple[float, Decision]]()
    with recorded_logits(ffns):
        last_logits(model, text)
        for layer, ffn in enumerate(ffns):
            assert ffn.logits is not None
            tau = torch.tensor(ffn.threshold_logit, dtype=torch.float64).sigmoid()
            distances = (ffn.logits.view(len(text), -1).double().cpu().sigmoid() - tau).abs()
            for token, expert in (distances <= NEAR_TAU).nonzero().tolist():
                found.append((distances[token, expert].item(), Decision(layer, token, expert)))
    return [decision for _, decision in sorted(found)]


@contextmanager
def flipped(model: Any, decision: Decision) -> Iterator[None]:
    """Has one decision of a text be the other one in a block."""
    ffn = list(lte.sparse_ffns(model).values())[decision.layer]

    def flip(router: Any, args: Any, logits: Tensor) -> Tensor:
        logits = logits.clone()
        row = logits.view(-1, logits.shape[-1])[decision.token]
        row[decision.expert] = ffn.threshold_logit + (-1 if row[decision.expert] > ffn.threshold_logit else 1)
        return logits

    handle = ffn.router.register_forward_hook(flip)
    try:
        yield
    finally:
        handle.remove()


def trace(model: Any, text: Tensor, tokens: list[int]) -> dict[str, Any]:
    """Why two engines may write different tokens after a text that both have written.

    Args:
        model: dense or sparse, in fp32.
        text: [S].
        tokens: what they write.

    Returns:
        `logit_gap`, from the likeliest token down to the less likely of the two; of a sparse model `score_distance`,
        the smallest |G - tau|, how many `decisions_near_tau` there are, and those that must be `flipped` to write these
        tokens; whether that is `explained` and `reproduced`.
    """
    text = text.to(model.device)
    logits = last_logits(model, text)
    gap = (logits.max() - logits[tokens].min()).item()
    explained = reproduced = gap <= NEAR_LOGITS
    found: dict[str, Any] = {"tokens": tokens, "logit_gap": gap}
    if lte.sparse_ffns(model):
        distance = closest_call(model, text)["score_distance"]
        explained |= distance <= NEAR_TAU
        near = decisions_near_tau(model, text)
        written: dict[int, Decision | None] = {int(logits.argmax()): None}
        for decision in near[:MOST_FLIPS]:
            with flipped(model, decision):
                written.setdefault(int(last_logits(model, text).argmax()), decision)
        reproduced |= set(tokens) <= set(written)
        flips = [way._asdict() for token in tokens if (way := written.get(token))]
        found |= {"score_distance": distance, "decisions_near_tau": len(near), "flipped": flips}
    return {**found, "explained": explained, "reproduced": reproduced}


def traces(folder: str, prompts: list[list[int]], one: Tensor, other: Tensor, places: list[int | None]) -> list[Any]:
    """The first differences of answers [N, T], traced.

    Args:
        folder: of the model.
        prompts: N.
        one: answers.
        other: answers.
        places: of the first differences, `None` for equal answers.
    """
    if places.count(None) == len(places):
        return []
    model, found = load(folder, torch.float32).to("cuda" if torch.cuda.is_available() else "cpu"), []
    for index, place in enumerate(places):
        if place is not None:
            text = torch.cat([torch.tensor(prompts[index]), one[index, :place]])
            tokens = [int(answers[index, place]) for answers in (one, other)]
            found.append({"prompt": index, "place": place, **trace(model, text, tokens)})
    del model
    free_memory(False)
    return found


# The run


def engines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What to serve: for each dtype the dense model and the sparse one over all numbers of ranks."""
    args.work.mkdir(parents=True, exist_ok=True)
    if args.shape:
        own = argparse.Namespace(work=args.work, sparsities=[SPARSITY], dtype="float32", tokenizer=None)
        models = write_shape(args.shape, own, torch.float32)
        ids = random_ids(SHAPES[args.shape]["vocab_size"], args.prompts, max(args.prompt_lengths), 0)
    else:
        text = read_text(args.text)
        models = write_densified([args.folder], args.work)
        ids = text_ids(load_tokenizer(str(args.folder)), text, args.prompts, max(args.prompt_lengths))
    free_memory(False)
    lengths = args.prompt_lengths
    common = {
        "prompts": [row[: lengths[index % len(lengths)]].tolist() for index, row in enumerate(ids)],
        "batches": args.batches, "input_len": max(lengths), "output_len": args.tokens, "prompt_lens": [],
        "eager": args.eager, "gpu_time": False, "tool": "latency", "engines": 1, "most_captured": 512,
        "cuda": torch.cuda.is_available(),
    }  # fmt: skip
    for dtype in args.dtypes:
        for model in models:
            yield {**common, **model, "dtype": dtype}


def rows_of(job: dict[str, Any], numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each number of ranks and batch size; those of the first number have nothing to be compared with."""
    first = None
    for ranks in numbers:
        found = served({**job, "tensor_parallel": ranks})
        first = first or found
        for batch, before, measured in zip(job["batches"], first, found, strict=True):
            row = {key: job[key] for key in ("model", "sparsity", "dtype")} | {"ranks": ranks, "batch": batch}
            row |= {key: value for key, value in measured.items() if key != "answers"}
            if found is not first:
                one, other = (torch.tensor(each["answers"]) for each in (before, measured))
                row |= agreement(one, other)
                if job["dtype"] == "float32":
                    traced = traces(job["folder"], job["prompts"], one, other, row["first_differences"])
                    row |= {key: sum(each[key] for each in traced) for key in ("explained", "reproduced")}
                    row["differences"] = traced
            yield row


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a saved LTE model with its tokenizer")
    parser.add_argument("--shape", choices=SHAPES, help="a model of random weights in place of a folder")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="each is compared with the first")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="prompts answered together")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[16, 64, 256], help="of prompts in turn")
    parser.add_argument("--tokens", type=int, default=80, help="of an answer")
    parser.add_argument("--text", type=Path, help="for prompts of a folder; unset: Python's own help")
    parser.add_argument("--eager", action="store_true", help="no graphs and no compilation")
    parser.add_argument("--work", type=Path, default=Path("vllm_ranks"), help="folder for the models that it writes")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if not args.worker and (args.folder is None) == (args.shape is None):
        parser.error("give a folder or --shape, and not both")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares what the command line asks for, and writes the record after each row."""
    args = parse(arguments)
    if args.worker:
        serve()
        return
    made, rows = environment(), list[dict[str, Any]]()
    record = {
        **made,
        "versions": {**made["versions"], "vllm": vllm_version()},
        "benchmark": "vllm_ranks",
        "model": args.shape or args.folder.name,
        "text": RANDOM if args.shape else text_name(args.text),
        **{key: getattr(args, key) for key in ("prompts", "prompt_lengths", "tokens", "eager")},
        "near": {"tau": NEAR_TAU, "logits": NEAR_LOGITS},
        "rows": rows,
    }
    for job in engines(args):
        for row in rows_of(job, args.ranks):
            rows.append(row)
            print({key: value for key, value in row.items() if key != "differences"}, flush=True)
            if args.output:
                write_json_atomic(args.output, record)
    keys = ("model", "ranks", "batch")
    found = [{**{key: row[key] for key in keys}, **each} for row in rows for each in row.get("differences", ())]
    unexplained = [each for each in found if not each["explained"]]
    if unexplained:
        raise SystemExit(f"{len(unexplained)} of {len(found)} differences in fp32 are not explained: {unexplained}")


if __name__ == "__main__":
    main()
