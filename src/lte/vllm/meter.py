"""What the routing of a served model saves, as Prometheus metrics beside vLLM's own.

The model runs in a process of vLLM's engine and `/metrics` is answered by another, the API server: the engine writes a
few sums into a small file that both know by the engine's id, and a collector in the API server reads them when it is
asked. With several API servers vLLM collects the metrics in another way, and these are not there.

Every `SAMPLE_EVERY`-th step the routing of some layers is computed anew from their inputs, which costs the other steps
nothing but the copy of these inputs. A CUDA graph has that copy inside, so on a GPU one layer of each group is sampled.

Shapes: T tokens, B requests of a step, D hidden size, E experts.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GROUPS = ("first", "middle", "last")
PATHS = ("decode", "masked", "grouped")
SAMPLE_EVERY = 64
MOST_TOKENS = 64
# By group: samples, sum of active fractions, sum of unions; then the steps of each path.
_SUMS = 3
_NUMBERS = len(GROUPS) * _SUMS + len(PATHS)


def counter_file(engine_id: str) -> Path:
    """Where the engine of an id leaves its sums."""
    return Path(tempfile.gettempdir()) / f"lte-vllm-{engine_id}"


def group_of(layer: int, layers: int) -> int:
    """The third of the model that a layer lies in, an index of `GROUPS`."""
    return layer * len(GROUPS) // layers


class Meter:
    """Takes samples of the routing in the process that runs the model.

    Args:
        engine_id: of vLLM's config.
        layers: L, of the whole model.
        capturing: whether steps may be replayed from CUDA graphs.

    Attributes:
        due: whether the step that runs now is a sample.
    """

    def __init__(self, engine_id: str, layers: int, capturing: bool):
        self.layers, self.capturing = layers, capturing
        self.due = capturing
        self._file = counter_file(engine_id)
        self._sums = np.zeros(_NUMBERS)
        self._steps = 0
        self._path: str | None = None
        self._kept: dict[int, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}
        self._pending: tuple[list[int], Tensor] | None = None

    def watches(self, layer: int) -> bool:
        """Whether a layer is sampled: all of them, or the one in the middle of each group."""
        if not self.capturing:
            return True
        group = group_of(layer, self.layers)
        members = [index for index in range(self.layers) if group_of(index, self.layers) == group]
        return layer == members[len(members) // 2]

    def add(self, layer: int, kept: Tensor, active: Callable[[Tensor], Tensor]) -> None:
        """Registers a layer.

        Args:
            layer: its index.
            kept: memory for hidden states, [`MOST_TOKENS`, D].
            active: maps hidden states [T, D] to decisions [T, E].
        """
        if self.watches(layer):
            self._kept[layer] = kept, active

    def keep(self, layer: int, x: Tensor) -> None:
        """Keeps the first hidden states of x [T, D] where the step is a sample."""
        if self.due and layer in self._kept:
            tokens = min(len(x), MOST_TOKENS)
            self._kept[layer][0][:tokens].copy_(x[:tokens])

    def took(self, path: str) -> None:
        """Notes the path of a step that Python runs; one that a graph replays is told to `step` alone."""
        self._path = path

    def step(self, requests: int, replayed_path: Callable[[int], str]) -> None:
        """Ends a step of B requests.

        Args:
            requests: B.
            replayed_path: which path so many tokens take, for steps that Python did not see.
        """
        path = self._path or replayed_path(max(requests, 1))
        self._path = None
        self._sums[len(GROUPS) * _SUMS + PATHS.index(path)] += 1
        self._steps += 1
        if self._steps % SAMPLE_EVERY == 0 and requests and self.due:
            self._sample(min(requests, MOST_TOKENS))
        # The step before a sample; graphs copy always.
        self.due = self.capturing or (self._steps + 1) % SAMPLE_EVERY == 0
        if self._steps % SAMPLE_EVERY == 0 or self._steps == 1:
            self._write()

    def _sample(self, tokens: int) -> None:
        shares = []
        for kept, active in self._kept.values():
            mask = active(kept[:tokens])
            shares.append(torch.stack([mask.float().mean(), mask.any(0).float().mean()]))
        # Read at the next sample, when it has long arrived: the GPU is not waited for.
        self._collect()
        self._pending = list(self._kept), torch.stack(shares).to("cpu", non_blocking=True)
        if not self.capturing:
            self._collect()

    def _collect(self) -> None:
        if self._pending is None:
            return
        layers, shares = self._pending
        self._pending = None
        for layer, pair in zip(layers, shares.tolist(), strict=True):
            start = group_of(layer, self.layers) * _SUMS
            self._sums[start : start + _SUMS] += (1, *pair)

    def _write(self) -> None:
        # The API server makes the file; there is none when no server runs.
        with contextlib.suppress(OSError), self._file.open("r+b") as file:
            file.write(self._sums.tobytes())


class SavingCollector:
    """Gives Prometheus what the `Meter`s of this process' engines have written, summed."""

    def __init__(self) -> None:
        self._files: list[Path] = []
        self._owner = os.getpid()
        atexit.register(self._remove)

    def add(self, engine_id: str) -> None:
        """Makes the file of an engine, whose id is that of vLLM's config."""
        file = counter_file(engine_id)
        if file in self._files:
            return
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.write(descriptor, np.zeros(_NUMBERS).tobytes())
        os.close(descriptor)
        self._files.append(file)

    def _remove(self) -> None:
        if os.getpid() == self._owner:  # forked processes have this object, too
            for file in self._files:
                file.unlink(missing_ok=True)

    def _sums(self) -> list[float]:
        sums = np.zeros(_NUMBERS)
        for file in self._files:
            with contextlib.suppress(OSError):
                sums += np.frombuffer(file.read_bytes())
        return sums.tolist()

    def collect(self) -> Iterator[Any]:
        """The metric families, as `prometheus_client` asks for them."""
        from prometheus_client.core import CounterMetricFamily, SummaryMetricFamily

        sums = self._sums()
        active = SummaryMetricFamily(
            "lte:active_fraction", "Share of experts that a token uses, by sampled step.", labels=["layers"]
        )
        union = SummaryMetricFamily(
            "lte:union_fraction", "Share of experts that any token of a sampled step uses.", labels=["layers"]
        )
        for index, group in enumerate(GROUPS):
            count, active_sum, union_sum = sums[index * _SUMS : (index + 1) * _SUMS]
            active.add_metric([group], count_value=count, sum_value=active_sum)
            union.add_metric([group], count_value=count, sum_value=union_sum)
        steps = CounterMetricFamily("lte:steps", "Steps by the path that computed their FFNs.", labels=["path"])
        for path, number in zip(PATHS, sums[len(GROUPS) * _SUMS :], strict=True):
            steps.add_metric([path], number)
        yield from (active, union, steps)


@functools.cache
def _collector() -> SavingCollector:
    from prometheus_client import REGISTRY

    made = SavingCollector()
    REGISTRY.register(made)
    return made


def publish(engine_id: str) -> None:
    """Adds the metrics of an engine to those of this process."""
    _collector().add(engine_id)
