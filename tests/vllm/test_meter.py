"""What is sampled of the routing, and how it gets from one process to the other; no vLLM needed."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lte.vllm.meter import MOST_TOKENS, SAMPLE_EVERY, Meter, SavingCollector, counter_file, group_of


@pytest.fixture
def engine() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield name
    counter_file(name).unlink(missing_ok=True)


def meter_with(engine: str, layers: int, capturing: bool, masks: dict[int, Tensor]) -> Meter:
    """A meter whose layers decide by fixed masks [T, E]."""
    made = Meter(engine, layers, capturing)
    for layer in range(layers):
        made.add(layer, torch.zeros(MOST_TOKENS, 4), lambda x, layer=layer: masks[layer][: len(x)])
    return made


def sums(engine: str) -> list[float]:
    return np.frombuffer(counter_file(engine).read_bytes()).tolist()


def test_the_layers_are_in_thirds() -> None:
    assert [group_of(layer, 7) for layer in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert [group_of(layer, 2) for layer in range(2)] == [0, 1]


def test_active_fraction_and_union_of_a_sample(engine: str) -> None:
    SavingCollector().add(engine)
    half = torch.tensor([[True, True, False, False], [False, True, True, False]])
    made = meter_with(engine, 3, False, {0: half, 1: torch.ones(2, 4, dtype=torch.bool), 2: torch.zeros(2, 4) > 0})
    for _ in range(SAMPLE_EVERY):
        made.took("decode")
        made.step(2, lambda tokens: "masked")
    assert sums(engine)[:9] == [1, 0.5, 0.75, 1, 1, 1, 1, 0, 0]
    assert sums(engine)[9:] == [SAMPLE_EVERY, 0, 0]


def test_hidden_states_are_kept_for_the_step_of_a_sample_alone(engine: str) -> None:
    made = meter_with(engine, 3, False, {layer: torch.zeros(2, 4) > 0 for layer in range(3)})
    due = []
    for _ in range(2 * SAMPLE_EVERY):
        due.append(made.due)
        made.step(1, lambda tokens: "decode")
    assert [index for index, value in enumerate(due) if value] == [SAMPLE_EVERY - 1, 2 * SAMPLE_EVERY - 1]


def test_what_is_kept_is_this_steps_input(engine: str) -> None:
    seen: list[Tensor] = []
    made = Meter(engine, 1, False)
    made.add(0, torch.zeros(MOST_TOKENS, 4), lambda x: seen.append(x.clone()) or torch.ones(len(x), 2) > 0)
    for step in range(SAMPLE_EVERY):
        made.keep(0, torch.full((3, 4), float(step)))
        made.step(2, lambda tokens: "decode")
    (x,) = seen
    assert x.shape == (2, 4)
    assert x.eq(SAMPLE_EVERY - 1).all()


def test_with_graphs_one_layer_of_each_third_is_kept_at_every_step(engine: str) -> None:
    made = Meter(engine, 9, True)
    assert [layer for layer in range(9) if made.watches(layer)] == [1, 4, 7]
    assert made.due
    made.step(1, lambda tokens: "decode")
    assert made.due


def test_a_replayed_step_counts_by_the_path_of_its_requests(engine: str) -> None:
    SavingCollector().add(engine)
    made = Meter(engine, 3, True)
    asked: list[int] = []
    made.step(5, lambda tokens: asked.append(tokens) or "grouped")
    assert asked == [5]
    assert sums(engine)[9:] == [0, 0, 1]


def test_without_a_server_nothing_is_written(engine: str) -> None:
    made = Meter(engine, 3, False)
    made.step(1, lambda tokens: "decode")
    assert not counter_file(engine).exists()


def test_the_file_of_an_engine_is_nobody_elses(engine: str) -> None:
    counter_file(engine).write_text("somebody's", encoding="utf-8")
    with pytest.raises(FileExistsError):
        SavingCollector().add(engine)


def test_the_collector_adds_up_engines(engine: str) -> None:
    other = uuid.uuid4().hex
    collector = SavingCollector()
    for name in (engine, other, other):
        collector.add(name)
    for name in (engine, other):
        counter_file(name).write_bytes(np.arange(12.0).tobytes())
    assert collector._sums() == [2.0 * number for number in range(12)]
    collector._remove()
    assert not counter_file(engine).exists()
    assert not counter_file(other).exists()
