"""Decoding on the CPU: the FFNs alone and a whole step of the model, sparse kernel against dense PyTorch.

Random weights in the shape of SmolLM2-135M, routers included in every time. Routing is `same`: router biases make one
random choice of experts, drawn anew for each repetition, active for all tokens; or `different`: a random router with
its threshold at the quantile that meets the sparsity, so that each token has its own experts. One process; providers
are interleaved, with a sweep over 256 MB before each so that nobody finds its weights in the cache; medians with 20/80
percentiles. Bytes are those of the weights of all experts that some token needs.

- dense: the stock FFN in eager PyTorch; dense_compiled: under torch.compile.
- hard: the hard mode of `lte.nn.sparse_ffn`, which computes all neurons and masks.
- sparse: `lte.ops.cpu`.

    python benchmarks/cpu_decode.py --threads 2 --output results/cpu_decode.json
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

import lte
from lte.bench import timing
from lte.bench.acceleration import TOLERANCES
from lte.bench.gate import check_logits, relative_rms, require
from lte.bench.shapes import SHAPES, shape_config
from lte.files import write_json_atomic
from lte.ops.arguments import FfnWeights, Routing
from lte.ops.cpu import cpu_kernel_available, sparse_ffn_cpu
from lte.ops.layout import by_neuron
from lte.ops.reference import active_experts, sparse_ffn_reference
from lte.records import environment

HIDDEN, NEURONS = (SHAPES["smollm2-135m"][name] for name in ("hidden_size", "intermediate_size"))


# (provider, active experts, routing)
Key = tuple[str, int, str]


class Models:
    """The dense model, a sparse copy of it, and the ways to run their FFNs."""

    def __init__(self, layers: int, dtype: torch.dtype, compile_dense: bool):
        self.dtype = dtype
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape_config("smollm2-135m", layers))
        self.dense = model.to(dtype).eval()
        self.dense_ffns = [layer.mlp for layer in self.dense.model.layers]
        self.dense_forwards = [ffn.forward for ffn in self.dense_ffns]
        self.sparse = lte.sparsify_(copy.deepcopy(self.dense), lte.LteConfig(grouping="contiguous"))
        self.ffns = list(lte.sparse_ffns(self.sparse).values())
        self.num_experts = self.ffns[0].num_experts
        self.weights, self.routings = [], []
        for ffn in self.ffns:
            ffn.set_mode("hard")
            ffn.router.to(dtype)
            ffn.down_proj.weight.data = by_neuron(ffn.down_proj.weight.data)
            gate, up, down = ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight.T
            self.weights.append(FfnWeights(gate=gate, up=up, down=down))
            self.routings.append(Routing(weight=ffn.router.weight, bias=ffn.router.bias))
        self.hard_forwards = [ffn.forward for ffn in self.ffns]
        self.compiled = [torch.compile(ffn.forward) for ffn in self.dense_ffns] if compile_dense else []

    def sparse_forwards(self, routings: list[Routing]) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        def forward_of(weights: FfnWeights, routing: Routing) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda x: sparse_ffn_cpu(x.view(-1, HIDDEN), weights, routing, "silu").view(x.shape)

        return [forward_of(*pair) for pair in zip(self.weights, routings, strict=True)]

    def route(self, active: int) -> None:
        """Makes `active` random experts of every layer the active ones, by the biases."""
        for ffn in self.ffns:
            ffn.router.bias.fill_(-3.0)
            ffn.router.bias[torch.randperm(self.num_experts)[:active]] = 3.0

    def routings_by_token(self, x: torch.Tensor, active: int) -> list[Routing]:
        """Random routers under which the tokens x [T, D] have `active` experts on average."""
        found = []
        for _ in self.ffns:
            weight = (torch.randn(self.num_experts, HIDDEN) * HIDDEN**-0.5).to(self.dtype)
            logits = (x.float() @ weight.float().T).to(self.dtype).float().flatten().sort(descending=True).values
            last = active * len(x)
            found.append(Routing(weight=weight, threshold=((logits[last - 1] + logits[last]) / 2).item()))
        return found

    def ffn_bytes(self, provider: str, needed: float) -> float:
        """Bytes of the weights that one FFN reads for `needed` experts; hard mode reads all of them."""
        neurons = NEURONS * needed / self.num_experts if provider == "sparse" else NEURONS
        router = 0 if provider.startswith("dense") else self.num_experts * (HIDDEN + 1)
        return (3 * neurons * HIDDEN + router) * self.dtype.itemsize

    def step_bytes(self, provider: str, needed: float) -> float:
        """Bytes of the weights that one step of the model reads."""
        ffns = sum(p.numel() for ffn in self.dense_ffns for p in ffn.parameters())
        others = sum(p.numel() for p in self.dense.parameters()) - ffns
        return others * self.dtype.itemsize + len(self.ffns) * self.ffn_bytes(provider, needed)


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


def check(models: Models, x: torch.Tensor, routings: list[Routing]) -> None:
    """The kernel against the reference, before anything is timed."""
    forwards = models.sparse_forwards(routings)
    for weights, routing, forward in zip(models.weights, routings, forwards, strict=True):
        error = relative_rms(forward(x), sparse_ffn_reference(x, weights, routing, "silu"))
        require(error, TOLERANCES[models.dtype], "the kernel")


def measure(providers: dict[Key, Callable[[], object]], models: Models, repeats: int) -> dict[Key, list[float]]:
    """Milliseconds of every provider, each with its own share of active experts."""
    return timing.interleaved_times(providers, torch.device("cpu"), repeats, lambda key: models.route(key[1]))


def rows_of(times: dict[Key, list[float]], size_of: Callable[[Key], float], calls: int, **fields: object) -> list[dict]:
    """One row per provider; `calls` units of work lie in each time."""
    rows = []
    for key, samples_ms in times.items():
        provider, active, routing = key
        cuts = [value / calls for value in statistics.quantiles(samples_ms, n=5)]
        median, size = statistics.median(samples_ms) / calls, size_of(key)
        dense = provider.startswith("dense")
        sparsity = None if dense else 1 - active / (NEURONS // 32)
        row = {**fields, "provider": provider, "sparsity": sparsity, "routing": None if dense else routing}
        row |= {"median_ms": median, "p20_ms": cuts[0], "p80_ms": cuts[3]}
        row |= {"bytes": round(size), "gb_per_s": size / median / 1e6}
        rows.append(row)
        shown = "" if sparsity is None else f"{sparsity:.0%} {routing}"
        print(
            f"{fields['benchmark']:>7} {fields['dtype']:>9} tokens={fields['tokens']:<3} {provider:>14} {shown:14}"
            f" {median:8.4f} ms [{cuts[0]:8.4f}, {cuts[3]:8.4f}] {row['gb_per_s']:6.1f} GB/s",
            flush=True,
        )
    return rows


def benchmark_ffns(models: Models, tokens: int, args: argparse.Namespace) -> list[dict]:
    """All FFNs of the model one after another, so that no weights stay in the cache; times are per FFN."""
    x = torch.randn(tokens, HIDDEN).to(models.dtype)

    def run_all(forwards: list[Callable]) -> Callable[[], object]:
        return lambda: [forward(x) for forward in forwards]

    full = models.num_experts
    providers: dict[Key, Callable[[], object]] = {("dense", full, "same"): run_all(models.dense_forwards)}
    if models.compiled:
        providers["dense_compiled", full, "same"] = run_all(models.compiled)
    providers["hard", full // 2, "same"] = run_all(models.hard_forwards)
    needed: dict[Key, float] = {}
    for active in active_counts(models, args):
        models.route(active)
        check(models, x, models.routings)
        providers["sparse", active, "same"] = run_all(models.sparse_forwards(models.routings))
        if tokens > 1 and active < full:
            routings = models.routings_by_token(x, active)
            check(models, x, routings)
            key = "sparse", active, "different"
            providers[key] = run_all(models.sparse_forwards(routings))
            needed[key] = statistics.mean(active_experts(x, routing).any(0).sum().item() for routing in routings)
    times = measure(providers, models, args.repeats)
    fields = {"benchmark": "ffn", "dtype": str(models.dtype)[6:], "batch": tokens, "tokens": tokens}
    return rows_of(times, lambda key: models.ffn_bytes(key[0], needed.get(key, key[1])), len(models.ffns), **fields)


def benchmark_steps(models: Models, args: argparse.Namespace) -> list[dict]:
    """A step at batch 1."""
    full = models.num_experts
    sparse = models.sparse_forwards(models.routings)
    dense_step, sparse_step = Step(models.dense, 1, args.prompt), Step(models.sparse, 1, args.prompt)

    def run(step: Step, ffns: list[nn.Module], forwards: list[Callable]) -> Callable[[], torch.Tensor]:
        def run_step() -> torch.Tensor:
            for ffn, forward in zip(ffns, forwards, strict=True):
                ffn.forward = forward  # type: ignore[method-assign]
            return step()

        return run_step

    providers: dict[Key, Callable[[], torch.Tensor]] = {}
    providers["dense", full, "same"] = run(dense_step, models.dense_ffns, models.dense_forwards)
    if models.compiled:
        providers["dense_compiled", full, "same"] = run(dense_step, models.dense_ffns, models.compiled)
    providers["hard", full // 2, "same"] = hard = run(sparse_step, models.ffns, models.hard_forwards)
    for active in active_counts(models, args):
        providers["sparse", active, "same"] = run(sparse_step, models.ffns, sparse)
    models.route(full // 2)
    check_logits(providers["sparse", full // 2, "same"](), hard(), "the logits of the decoding step")
    times = measure(providers, models, args.repeats)
    fields = {"benchmark": "decode", "dtype": str(models.dtype)[6:], "batch": 1, "tokens": 1}
    return rows_of(times, lambda key: models.step_bytes(key[0], key[1]), 1, **fields)


def active_counts(models: Models, args: argparse.Namespace) -> list[int]:
    """How many experts are active at each sparsity, half of them among the rest."""
    counts = {round(models.num_experts * (1 - sparsity)) for sparsity in args.sparsity}
    return sorted(counts | {models.num_experts // 2}, reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16], help="of the FFNs; steps are of batch 1")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.9])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--compile", action="store_true", help="also the dense FFNs under torch.compile")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    timing.SECONDS = math.inf  # all repeats, however long they take
    if not cpu_kernel_available():
        raise SystemExit("the kernel needs numba: pip install 'lte[cpu]'")
    made_with = environment()
    rows = []
    with torch.no_grad():
        for name in args.dtypes:
            models = Models(args.layers, getattr(torch, name), args.compile)
            rows += benchmark_steps(models, args)
            for tokens in args.tokens:
                rows += benchmark_ffns(models, tokens, args)
    rows = [{**row, **made_with} for row in rows]
    if args.output:
        config = {key: value for key, value in vars(args).items() if key != "output"}
        write_json_atomic(args.output, {"benchmark": "cpu_decode", "config": config, **made_with, "rows": rows})


if __name__ == "__main__":
    main()
