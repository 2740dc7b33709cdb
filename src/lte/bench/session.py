"""What the benchmarks of one run share: the models, the settings, the text, the result files, and what failed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from lte.bench.models import ModelPair
from lte.bench.rows import ResultFile, Row, timed_row
from lte.bench.settings import BenchSettings
from lte.hf.activations import activation_name

T = TypeVar("T")


@dataclass
class Session:
    """One run.

    Attributes:
        name: of the model, for the rows.
        pair: the models.
        settings: what to measure.
        results: the rows so far.
        copy_gb_per_s: what the machine reaches when it copies memory.
        ids: tokens [N, L] of N texts, or random ones where the routing is forced.
        report: gets a line of progress.
        failures: what could not be measured, a sentence each.
    """

    name: str
    pair: ModelPair
    settings: BenchSettings
    results: ResultFile
    copy_gb_per_s: float
    ids: Tensor
    report: Callable[[str], None]
    failures: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.pair.device

    @property
    def activation(self) -> str:
        """Key of `lte.ops.activations.ACTIVATIONS`."""
        ffn, layout = self.pair.dense_ffns[0], self.pair.family.layout
        name = activation_name(getattr(ffn, layout.activation))
        assert name is not None  # accelerate_ has refused others
        return name

    @property
    def int8(self) -> bool:
        """Whether the sparse model's weights are int8."""
        return self.pair.weights == "int8"

    def say(self, text: str) -> None:
        """Reports a line with the seconds since the start."""
        self.report(f"[{time.monotonic() - self.started:6.1f} s] {text}")

    def attempt(self, what: str, prepare: Callable[[], T]) -> T | None:
        """`prepare()`, or `None` after a note of its error: what cannot be compiled must not cost the other rows."""
        try:
            return prepare()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.failures.append(f"{what}: {reason}")
            self.results.note(failures=self.failures)
            self.say(f"FAILED {self.failures[-1]}")
            return None

    def skip(self, what: str) -> None:
        """Notes what the time was not enough for."""
        self.results.note(skipped=[*self.results.header.get("skipped", []), what])
        self.say(f"SKIPPED {what}: the budget of {self.settings.budget_s:g} s is used up")

    def row(self, samples_ms: list[float], size: float, **fields: object) -> Row:
        """A row of this run's model and dtype."""
        common = {
            "model": self.name,
            "dtype": str(self.pair.dtype).removeprefix("torch."),
            "device": self.device.type,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
        }
        return timed_row(samples_ms, size, self.copy_gb_per_s, **common, **fields)

    def texts(self, count: int) -> Tensor:
        """Tokens [count, L], texts repeated if there are fewer."""
        return self.ids[torch.arange(count, device=self.ids.device) % len(self.ids)]


def describe(row: Row) -> str:
    """One row as a line of progress."""
    ratio, to_step = row.get("ratio_to_dense"), row.get("ratio_to_dense_step")
    return (
        f"{row['benchmark']:>7} batch {row['batch']:<3} tokens {row['tokens']:<5} {row['provider']:<36} "
        f"sparsity {row['sparsity']:.2f}  {row['median_ms']:9.4f} ms [{row['p20_ms']:.4f}, {row['p80_ms']:.4f}]  "
        f"{row['gb_per_s']:7.1f} GB/s"
        + ("" if ratio is None else f"  {ratio:.3f} of dense")
        + ("" if to_step is None else f", {to_step:.3f} of the dense whole step")
    )
