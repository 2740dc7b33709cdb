"""What a training step costs in each mode of the sparse FFN: time and peak memory, dense against soft against hard.

Random weights in the shape of SmolLM2-135M (or a smaller one on the CPU), one process, modes interleaved, medians.

    python benchmarks/training_step.py --batch 32 --length 1024 --compile --output results/training_step.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import lte
from lte.bench.shapes import SHAPES, shape_config
from lte.files import write_json_atomic
from lte.records import environment
from lte.train.objective import language_terms, routing_terms, stack_layers

VOCAB = SHAPES["smollm2-135m"]["vocab_size"]
MODES = ("dense", "soft", "straight_through", "hard")


class Step:
    """One optimiser step on random tokens, in the given mode."""

    def __init__(self, model: torch.nn.Module, args: argparse.Namespace, device: torch.device):
        self.model, self.device = model.to(device), device
        self.ffns = list(lte.sparse_ffns(model).values())
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=device.type == "cuda")
        self.tokens = torch.randint(0, VOCAB, (args.batch, args.length), device=device)
        self.language, self.routing = language_terms, routing_terms
        if args.compile:
            self.language, self.routing = torch.compile(language_terms), torch.compile(routing_terms)
            for layer in model.model.layers:
                layer.compile()

    def __call__(self, mode: str) -> None:
        for ffn in self.ffns:
            ffn.mode, ffn.record_logits = mode, mode != "dense"
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(input_ids=self.tokens, use_cache=False).logits
            loss, _ = self.language(logits, self.tokens)
            if mode != "dense":
                stacked = stack_layers([ffn.logits for ffn in self.ffns], [None] * len(self.ffns))
                routing = self.routing(*stacked, 0.0, 0.01)
                loss = loss + 0.1 * routing["efficiency"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(step: Step, repeats: int) -> list[dict[str, object]]:
    cuda = step.device.type == "cuda"
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    peak: dict[str, int | None] = dict.fromkeys(MODES)
    for mode in MODES:
        for _ in range(3):
            step(mode)
    for _ in range(repeats):
        for mode in MODES:
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            step(mode)
            if cuda:
                torch.cuda.synchronize()
                peak[mode] = torch.cuda.max_memory_allocated()
            times[mode].append(time.perf_counter() - start)
    tokens = step.tokens.numel()
    rows = []
    for mode in MODES:
        median = statistics.median(times[mode])
        quantiles = statistics.quantiles(times[mode], n=5)
        rows.append(
            {
                "mode": mode,
                "median_ms": 1e3 * median,
                "p20_ms": 1e3 * quantiles[0],
                "p80_ms": 1e3 * quantiles[3],
                "tokens_per_s": tokens / median,
                "peak_memory_bytes": peak[mode],
                "time_over_dense": median / statistics.median(times["dense"]),
                "memory_over_dense": None if peak[mode] is None else peak[mode] / peak["dense"],  # type: ignore[operator]
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape_config("smollm2-135m", args.layers))
    sparse = lte.sparsify_(model, lte.LteConfig(grouping="contiguous"))
    rows = measure(Step(sparse, args, device), args.repeats)
    for row in rows:
        memory = row["peak_memory_bytes"]
        print(
            f"{row['mode']:>16}  {row['median_ms']:8.1f} ms  {row['tokens_per_s']:9.0f} tokens/s  "
            f"x{row['time_over_dense']:.3f} time"
            + (f"  {memory / 2**30:.1f} GiB  x{row['memory_over_dense']:.3f} memory" if memory else "")
        )
    if args.output:
        config = {key: value for key, value in vars(args).items() if key != "output"}
        record = {"benchmark": "training_step", "config": config, "rows": rows, **environment()}
        write_json_atomic(args.output, record)


if __name__ == "__main__":
    main()
