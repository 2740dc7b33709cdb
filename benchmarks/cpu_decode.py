"""Decoding on the CPU: the FFNs alone and a whole step of the model, sparse kernel against dense PyTorch.

Random weights in the shape of SmolLM2-135M; routers are set so that exactly the wanted number of experts, drawn anew
for each repetition, is active in each layer for all tokens. One process; providers are interleaved, with a sweep over
256 MB before each so that nobody finds its weights in the cache; medians with 20/80 percentiles.

- dense: the stock FFN in eager PyTorch; dense_compiled: under torch.compile.
- hard: the hard mode of `lte.nn.sparse_ffn`, which computes all neurons and masks.
- sparse: `lte.ops.cpu`.

    python benchmarks/cpu_decode.py --threads 2 --output results/cpu_decode.json
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import lte
from lte.eval.results import environment
from lte.ops.cpu import DecodeWeights, kernel_available, sparse_ffn_decode, store_by_neuron_

HIDDEN, NEURONS, VOCAB = 576, 1536, 49152
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Errors of the layers add up on the way to the logits.
LOGITS_OVER_LAYER = 10


def build(layers: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=NEURONS, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


class Models:
    """The dense model, a sparse copy of it, and the ways to run their FFNs."""

    def __init__(self, layers: int, dtype: torch.dtype, compile_dense: bool):
        self.dtype = dtype
        self.dense = build(layers, dtype)
        self.dense_ffns = [layer.mlp for layer in self.dense.model.layers]
        self.sparse = lte.sparsify_(copy.deepcopy(self.dense), lte.LteConfig(grouping="contiguous"))
        self.ffns = list(lte.sparse_ffns(self.sparse).values())
        for ffn in self.ffns:
            ffn.set_mode("hard")
            ffn.router.float()
        self.hard_forwards = [ffn.forward for ffn in self.ffns]
        self.compiled = [torch.compile(ffn.forward) for ffn in self.dense_ffns] if compile_dense else []
        self.num_experts = self.ffns[0].num_experts

    def sparse_forwards(self) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """Lays the down projections out for the kernel; hard mode runs on the same memory."""
        for ffn in self.ffns:
            store_by_neuron_(ffn.down_proj)

        def forward_of(ffn: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
            router = (ffn.router.weight, ffn.router.bias)
            weights = DecodeWeights(
                ffn.up_proj.weight, ffn.down_proj.weight, ffn.num_experts, gate=ffn.gate_proj.weight, router=router
            )
            return lambda x: sparse_ffn_decode(x, weights, ffn.threshold_logit)

        return [forward_of(ffn) for ffn in self.ffns]

    def route(self, active: int) -> None:
        """Makes `active` random experts of every layer the active ones."""
        for ffn in self.ffns:
            ffn.router.bias.fill_(-3.0)
            ffn.router.bias[torch.randperm(self.num_experts)[:active]] = 3.0

    def ffn_bytes(self, provider: str, active: int) -> int:
        """Bytes of the weights that one FFN reads; hard mode reads all of them."""
        neurons = NEURONS * active // self.num_experts if provider == "sparse" else NEURONS
        router = 0 if provider.startswith("dense") else 4 * self.num_experts * (HIDDEN + 1)
        return 3 * neurons * HIDDEN * self.dtype.itemsize + router

    def step_bytes(self, provider: str, active: int) -> int:
        """Bytes of the weights that one step of the model reads."""
        ffns = sum(p.numel() for ffn in self.dense_ffns for p in ffn.parameters())
        others = sum(p.numel() for p in self.dense.parameters()) - ffns
        return others * self.dtype.itemsize + len(self.ffns) * self.ffn_bytes(provider, active)


class Step:
    """One decoding step after a prompt; the cache is cut back each time."""

    def __init__(self, model: nn.Module, batch: int, prompt: int):
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.token = torch.full((batch, 1), 17)
        model(input_ids=torch.arange(prompt).repeat(batch, 1), past_key_values=self.cache)

    def __call__(self) -> torch.Tensor:
        logits = self.model(input_ids=self.token, past_key_values=self.cache).logits
        self.cache.crop(-1)
        return logits


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    error = (actual.double() - expected.double()).square().mean().sqrt()
    return (error / expected.double().square().mean().sqrt()).item()


def check(models: Models, forwards: list[Callable], tokens: int) -> None:
    """The kernel against hard mode in fp32, before anything is timed."""
    x = torch.randn(tokens, HIDDEN).to(models.dtype)
    for active in (models.num_experts, models.num_experts // 2, 1):
        models.route(active)
        for ffn, forward in zip(models.ffns, forwards, strict=True):
            reference = copy.deepcopy(ffn).float()
            # Past any forward set on the object.
            error = relative_rms(forward(x), type(ffn).forward(reference, x.float()))
            if not error <= TOLERANCE[models.dtype]:
                raise SystemExit(f"the kernel is wrong: relative RMS {error:.1e} with {active} active experts")


def measure(providers: dict[tuple[str, int], Callable[[], object]], models: Models, repeats: int) -> dict:
    """Seconds of every provider, by (name, active experts)."""
    sweep = torch.ones(1 << 26)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in providers}
    for repeat, (key, run) in itertools.product(range(-3, repeats), providers.items()):
        models.route(key[1])
        sweep.sum()
        start = time.perf_counter()
        run()
        if repeat >= 0:
            times[key].append(time.perf_counter() - start)
    return times


def rows_of(times: dict, size_of: Callable[[str, int], int], calls: int, **fields: object) -> list[dict]:
    """One row per provider; `calls` units of work lie in each time."""
    rows = []
    for (provider, active), seconds in times.items():
        cuts = [1e3 * value / calls for value in statistics.quantiles(seconds, n=5)]
        median, size = 1e3 * statistics.median(seconds) / calls, size_of(provider, active)
        sparsity = None if provider.startswith("dense") else 1 - active / (NEURONS // 32)
        row = {**fields, "provider": provider, "sparsity": sparsity, "median_ms": median, "p20_ms": cuts[0]}
        row |= {"p80_ms": cuts[3], "bytes": size, "gb_per_s": size / median / 1e6}
        rows.append(row)
        shown = "    " if sparsity is None else f"{sparsity:4.0%}"
        print(
            f"{fields['benchmark']:>7} {fields['dtype']:>9} tokens={fields['tokens']:<3} {provider:>14} {shown}"
            f" {median:8.4f} ms [{cuts[0]:8.4f}, {cuts[3]:8.4f}] {row['gb_per_s']:6.1f} GB/s"
        )
    return rows


def benchmark_ffns(models: Models, tokens: int, args: argparse.Namespace) -> list[dict]:
    """All FFNs of the model one after another, so that no weights stay in the cache; times are per FFN."""
    sparse = models.sparse_forwards()
    check(models, sparse, tokens)
    x = torch.randn(tokens, HIDDEN).to(models.dtype)

    def run_all(forwards: list[Callable]) -> Callable[[], object]:
        return lambda: [forward(x) for forward in forwards]

    full = models.num_experts
    providers = {("dense", full): run_all([ffn.forward for ffn in models.dense_ffns])}
    if models.compiled:
        providers["dense_compiled", full] = run_all(models.compiled)
    providers["hard", full // 2] = run_all(models.hard_forwards)
    providers |= {("sparse", active): run_all(sparse) for active in active_counts(models, args)}
    times = measure(providers, models, args.repeats)
    fields = {"benchmark": "ffn", "dtype": str(models.dtype)[6:], "batch": tokens, "tokens": tokens}
    return rows_of(times, models.ffn_bytes, len(models.ffns), **fields)


def benchmark_steps(models: Models, batch: int, args: argparse.Namespace) -> list[dict]:
    sparse = models.sparse_forwards()
    full = models.num_experts
    for ffn, forward in zip(models.ffns, models.hard_forwards, strict=True):
        ffn.forward = forward  # The prompt is longer than what the kernel takes.
    dense_step, sparse_step = Step(models.dense, batch, args.prompt), Step(models.sparse, batch, args.prompt)

    def run(step: Step, ffns: list[nn.Module], forwards: list[Callable]) -> Callable[[], torch.Tensor]:
        def run_step() -> torch.Tensor:
            for ffn, forward in zip(ffns, forwards, strict=True):
                ffn.forward = forward  # type: ignore[method-assign]
            return step()

        return run_step

    providers = {("dense", full): run(dense_step, models.dense_ffns, [ffn.forward for ffn in models.dense_ffns])}
    if models.compiled:
        providers["dense_compiled", full] = run(dense_step, models.dense_ffns, models.compiled)
    providers["hard", full // 2] = hard = run(sparse_step, models.ffns, models.hard_forwards)
    providers |= {("sparse", active): run(sparse_step, models.ffns, sparse) for active in active_counts(models, args)}
    models.route(full // 2)
    error, limit = relative_rms(providers["sparse", full // 2](), hard()), LOGITS_OVER_LAYER * TOLERANCE[models.dtype]
    if not error <= limit:
        raise SystemExit(f"the decode step is wrong: relative RMS of the logits {error:.1e}, limit {limit:.0e}")
    times = measure(providers, models, args.repeats)
    fields = {"benchmark": "decode", "dtype": str(models.dtype)[6:], "batch": batch, "tokens": batch}
    return rows_of(times, models.step_bytes, 1, **fields)


def active_counts(models: Models, args: argparse.Namespace) -> list[int]:
    """How many experts are active at each sparsity, half of them among the rest."""
    counts = {round(models.num_experts * (1 - sparsity)) for sparsity in args.sparsity}
    return sorted(counts | {models.num_experts // 2}, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.9])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--compile", action="store_true", help="also the dense FFNs under torch.compile")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not kernel_available():
        raise SystemExit("the kernel needs numba: pip install 'lte[cpu]'")
    made_with = environment()
    rows = []
    with torch.no_grad():
        for name in args.dtypes:
            models = Models(args.layers, getattr(torch, name), args.compile)
            for batch in args.batches:
                rows += benchmark_ffns(models, batch, args) + benchmark_steps(models, batch, args)
    rows = [{**row, **made_with} for row in rows]
    if args.output:
        config = {key: value for key, value in vars(args).items() if key != "output"}
        args.output.write_text(json.dumps({"benchmark": "cpu_decode", "config": config, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
