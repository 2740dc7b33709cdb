"""Decoding of a model whose experts transformers spreads over GPUs, beside the dense model over the same GPUs.

    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --output results/tensor_parallel.json

Models of random weights are written to a folder, dense and with routers that switch a share of the experts off for each
token, and loaded by transformers' own plan. Sparse models compute their FFNs in two ways: `masked`, all experts by
plain PyTorch, those that are off multiplied with 0, and by the `kernels` of `lte.accelerate_`. A gate comes first: of a
few layers in fp32, logits and greedy answers of the parts must be those of the whole model in each process, but for
texts with a router score next to the threshold. Then decoding steps of all models are timed in turns, with a static
cache, as plain PyTorch launches them and replayed from a CUDA graph; times are those of the slowest process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from vllm_bench import SHAPES, write_shape

import lte
from lte.bench.decode import Decoder
from lte.bench.gate import GateError, relative_rms, require
from lte.bench.routing import measure_use
from lte.bench.timing import Call, Times, captured
from lte.eval.answers import first_difference
from lte.eval.speculation import closest_call
from lte.files import write_json_atomic
from lte.nn.shards import local, whole
from lte.records import environment
from lte.train.processes import is_main_process, num_processes, training_device

PROMPT, ANSWER, LOGITS_BOUND = 16, 32, 1e-4
# Of a score from the threshold: what the order of sums in fp32 may move it by.
NEAR_TAU = 1e-5


def folders(args: argparse.Namespace, shape: str, dtype: torch.dtype, sparsities: list[float]) -> list[dict[str, Any]]:
    """The folders of a shape, the dense one first, which the first process writes unless they are there."""
    kind = str(dtype).removeprefix("torch.")
    own = argparse.Namespace(work=args.work, sparsities=sparsities, dtype=kind, tokenizer=None)
    if is_main_process():
        args.work.mkdir(parents=True, exist_ok=True)
        write_shape(shape, own, dtype)
    dist.barrier()
    return write_shape(shape, own, dtype)


def load(folder: str, dtype: torch.dtype) -> Any:
    """A whole model in eval mode on the GPU of this process."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(training_device()).eval()


def load_part(folder: str, dtype: torch.dtype, ffn: str | None) -> Any:
    """This process's part of a model; its FFNs are computed in the way that is named."""
    config = DistributedConfig(tp_plan="auto")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=config)
    model = model.to(training_device()).eval()
    return lte.accelerate_(model) if ffn == "kernels" else model


def in_all_ways(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The jobs with the ways in which their FFNs are computed; a dense model has but one."""
    return [
        {**job, "ffn": ffn} for job in jobs for ffn in ((None,) if job["sparsity"] is None else ("masked", "kernels"))
    ]


def random_tokens(rows: int, length: int, shape: str) -> Tensor:
    """Token ids [rows, length], the same in every process."""
    ids = torch.randint(SHAPES[shape]["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))
    return ids.to(training_device())


@torch.no_grad()
def check(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compares parts with the whole model, dense and sparse; a row for each way.

    Raises:
        GateError: if logits or answers differ where no router score is next to the threshold.
    """
    name, rows = f"{args.shape}-{args.checked_layers}", []
    SHAPES[name] = {**SHAPES[args.shape], "num_hidden_layers": args.checked_layers}
    ids = random_tokens(2, PROMPT, name)
    for job in in_all_ways(folders(args, name, torch.float32, [0.5])):
        model = load(job["folder"], torch.float32)
        logits, answers = logits_and_answers(model, ids)
        of_parts, answers_of_parts = logits_and_answers(load_part(job["folder"], torch.float32, job["ffn"]), ids)
        what = " ".join(filter(None, (job["model"], "in parts", job["ffn"])))
        error = relative_rms(of_parts, logits)
        if not (error > LOGITS_BOUND and any(is_near(model, text) for text in ids)):
            require(error, LOGITS_BOUND, f"the logits of {what}")
        equal = 0
        for one, other in zip(answers, answers_of_parts, strict=True):
            place = first_difference(one, other)
            if place is not None and not is_near(model, one[:place]):
                raise GateError(f"the answers of {what} must be those of the whole model; nothing was timed")
            equal += (len(one) if place is None else place) - PROMPT
        rows.append({"model": job["model"], "sparsity": job["sparsity"], "ffn": job["ffn"],
                     "layers": args.checked_layers, "logits_relative_rms": error, "equal_tokens": equal,
                     "of_tokens": len(ids) * ANSWER})  # fmt: skip
    return rows


def logits_and_answers(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a model says of the prompts [B, L], and the prompts with its greedy answers."""
    answers = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False
    )
    return whole(model(ids).logits), answers


def is_near(model: Any, text: Tensor) -> bool:
    """Whether a router score of a text [T] lies so near the threshold that rounding may flip its expert."""
    return bool(lte.sparse_ffns(model)) and closest_call(model, text)["score_distance"] <= NEAR_TAU


def step_times(runs: list[Call], decoders: list[Decoder], args: argparse.Namespace) -> list[list[float]]:
    """Milliseconds of a step of each model, mean over each turn, of the slowest process.

    The number of turns is fixed: processes that stop at different times would wait for each other for ever.
    """
    samples: list[list[float]] = [[] for _ in runs]
    for turn in range(args.turns + 1):
        for run, decoder, found in zip(runs, decoders, samples, strict=True):
            _wait()
            start = time.perf_counter()
            for _ in range(args.steps):
                decoder.next_token()
                run()
            _wait()
            if turn:
                found.append(1e3 * (time.perf_counter() - start) / args.steps)
    of_all: list[Any] = [None] * num_processes()
    dist.all_gather_object(of_all, samples)
    return [[max(times) for times in zip(*found, strict=True)] for found in zip(*of_all, strict=True)]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def capture(decoders: list[Decoder]) -> list[Call]:
    """Steps as CUDA graphs, with the sums over processes inside."""
    found = []
    for decoder in decoders:
        decoder.restart()
        decoder.next_token()
        found.append(captured(decoder.eager, training_device()))
        decoder.restart()
    return found


@torch.no_grad()
def measure(args: argparse.Namespace, tell: Callable[[list[dict[str, Any]]], None]) -> None:
    """Times all models, one batch size after the other, and tells the rows of each way to run a step."""
    dtype = getattr(torch, args.dtype)
    jobs = in_all_ways(folders(args, args.shape, dtype, args.sparsities))
    models = [load_part(job["folder"], dtype, job["ffn"]) for job in jobs]
    for batch in args.batches:
        ids = random_tokens(batch, args.context, args.shape)
        decoders = [Decoder(model, ids, args.context // 2, args.context) for model in models]
        for way in args.ways:
            try:
                runs = capture(decoders) if way == "graph" else [decoder.eager for decoder in decoders]
                samples = step_times(runs, decoders, args)
            except RuntimeError as error:
                tell([{"batch": batch, "way": way, "note": str(error)[:400]}])
                continue
            found = [row(*each) for each in zip(jobs, decoders, samples, strict=True)]
            own = {"batch": batch, "way": way, "turns": args.turns, "steps_of_a_turn": args.steps}
            tell([{**each, **own, "over_dense": each["median_ms"] / found[0]["median_ms"]} for each in found])


def row(job: dict[str, Any], decoder: Decoder, samples_ms: list[float]) -> dict[str, Any]:
    """What was measured of a model."""
    ffns = list(lte.sparse_ffns(decoder.model).values())
    decoder.restart()
    decoder.next_token()
    return {
        "model": job["model"],
        "sparsity": job["sparsity"],
        "ffn": job["ffn"],
        **asdict(Times.of(samples_ms)),
        "active_fraction": measure_use(ffns, decoder.eager).active if ffns else None,
        "weight_bytes_per_process": sum(local(parameter).nbytes for parameter in decoder.model.parameters()),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.5, 0.8])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--ways", choices=("launched", "graph"), nargs="+", default=["launched", "graph"])
    parser.add_argument("--context", type=int, default=256, help="tokens of the cache, half of them a prompt")
    parser.add_argument("--turns", type=int, default=10, help="of each model")
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--checked-layers", type=int, default=2, help="of the gate")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", type=Path, default=Path("tensor_parallel"), help="folder for the models")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if torch.cuda.is_available():
        torch.cuda.set_device(training_device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rows: list[dict[str, Any]] = []
    config = {key: value for key, value in vars(args).items() if key not in ("output", "work")}
    plain = {"benchmark": "tensor_parallel", "config": config, "processes": num_processes(), "gate": check(args)}

    def tell(found: list[dict[str, Any]]) -> None:
        rows.extend(found)
        if is_main_process():
            print("\n".join(map(str, found)), flush=True)
            if args.output:
                write_json_atomic(args.output, {**plain, "rows": rows, **environment()})

    measure(args, tell)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
