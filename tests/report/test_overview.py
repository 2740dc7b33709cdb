"""The heat map of tasks and methods, and the sentence above it."""

from __future__ import annotations

from typing import Any

import pytest

from lte.records import ResultRecord
from lte.report.overview import SHARES, labels, main_curves, overview, pareto_front, rivals
from lte.report.points import Tradeoff, find_tradeoffs
from tests.report.sample_records import record
from tests.report.test_points import runs_of

DENSE_BYTES = 4e6


def at(method: str, share: float, value: float, **changes: Any) -> ResultRecord:
    """A run at a share of the dense model's bytes."""
    target = 0.0 if method == "dense" else 1 - share
    cost = {"bytes_per_token": share * DENSE_BYTES, "target_sparsity": target, "sparsity": target}
    return record(method, value=value, **cost, **changes)


def compared(*records: ResultRecord) -> list[Tradeoff]:
    return find_tradeoffs(runs_of(*records))


def cell(found: dict[str, Any], method: str, share: float, row: int = 0) -> Any:
    return found["rows"][row]["cells"][method][SHARES.index(share)]


def test_a_cell_is_the_least_loss_with_at_most_so_many_bytes() -> None:
    lte = [at("lte", 0.7, 20.25), at("lte", 0.4, 21.0, seed=0), at("lte", 0.4, 22.0, seed=1)]
    found = overview(compared(at("dense", 1.0, 20.0), *lte, at("teal", 0.6, 20.5)))
    assert found["methods"] == ["lte", "teal"]
    # Between 0.4, where it loses 1.5, and 0.7; below 0.4 nothing was measured.
    half = cell(found, "lte", 0.5)
    assert half["lost"] == pytest.approx(0.25 + 1.25 * 2 / 3)
    assert (half["met"], half["seeds"], half["sd"]) == (False, 2, pytest.approx(2**-0.5))
    assert cell(found, "lte", 0.7) == {"lost": 0.25, "met": True, "sd": None, "seeds": 1, "point": 1}
    assert [cell(found, "teal", share) is None for share in SHARES] == [True, True, False, False, False, False, False]
    assert cell(found, "teal", 1.0)["met"], "a loss of exactly the goal is within it"
    assert not cell(overview(compared(*lte, at("dense", 1.0, 20.0)), limit=0.2), "lte", 0.7)["met"]


def test_the_curve_named_as_its_method_stands_for_it() -> None:
    others = [at("lte", 0.5, 20.0, label="lte-frozen", seed=seed) for seed in range(3)]
    runs = [at("dense", 1.0, 20.0), at("lte", 0.5, 21.0, label="lte"), *others, at("kla", 0.5, 22.0, label="kla-a")]
    (tradeoff,) = compared(*runs)
    assert main_curves(tradeoff) == {"lte": "lte", "kla": "kla-a"}
    assert cell(overview([tradeoff]), "lte", 0.5)["lost"] == 1.0


def test_rivals_lose_least_and_the_front_is_beaten_by_none() -> None:
    runs = [at("dense", 1.0, 20.0), at("lte", 0.5, 20.1), at("lte", 0.4, 30.0)]
    runs += [at(name, 0.5, 21.0 + place) for place, name in enumerate(("teal", "wina", "cats", "kla"))]
    runs += [at("wanda", 0.9, 20.0)]
    (tradeoff,) = compared(*runs)
    assert rivals(tradeoff) == ["teal", "wina", "cats"]
    front = [(point.curve, point.mean("megabytes")) for point in pareto_front(tradeoff, "megabytes")]
    assert front == [("wanda", 3.6), ("lte", 2.0), ("lte", 1.6)]


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([record()], "No method can be compared here: no result with known bytes stands beside a dense model's."),
        (
            [at("dense", 1.0, 20.0), at("lte", 0.5, 20.25)],
            "Reading at most half of the dense model's weight bytes, LTE loses 0.25 perplexity on lm (1 seed), which "
            "meets the goal of at most 0.5; no other method was measured with that few.",
        ),
        (
            [at("dense", 1.0, 20.0), at("lte", 0.8, 22, seed=0), at("lte", 0.8, 22, seed=1), at("kla", 0.7, 21.0)],
            "Reading at most 80% of the dense model's weight bytes, LTE loses 2 ± 0 perplexity on lm (2 seeds), which "
            "misses the goal of at most 0.5; kla, the best other method, loses 1.",
        ),
        (
            [at("dense", 1.0, 20.0), at("static_pruning", 0.5, 20.0), at("kla", 0.5, 20.1)],
            "Reading at most half of the dense model's weight bytes, where LTE was not measured, static pruning does "
            "best: it stays within the goal on 1 of 1 tasks.",
        ),
        (
            [
                *(at(name, 1.0 if name == "dense" else 0.5, 20.0, task="a") for name in ("dense", "lte", "teal")),
                *(at(name, 1.0 if name == "dense" else 0.5, 20.0 + place, task="b", seed=place)
                  for place, name in enumerate(("dense", "teal", "lte"))),
            ],
            "Reading at most half of the dense model's weight bytes, LTE loses no more quality than the goal allows on "
            "1 of 2 tasks (1 seed), and on 1 no other method loses less; of the others teal does best, within the goal "
            "on 1 of 2.",
        ),
    ],
    ids=["no dense model", "LTE alone", "another share", "without LTE", "two tasks"],
)  # fmt: skip
def test_the_sentence(records: list[ResultRecord], sentence: str) -> None:
    assert overview(compared(*records))["sentence"] == sentence


def test_tasks_are_told_apart_without_absolute_paths() -> None:
    names = {
        "a": {"task": "a"},
        "b": {"task": "/home/me/b.txt", "model": "m.Q4_K_M.gguf"},
        "c": {"task": "/srv/b.txt", "model": "n"},
    }
    found = labels(compared(*(record(**changes) for changes in names.values())))
    assert found == ["…/b.txt: m", "…/b.txt: n", "a"]
    same = compared(record(task="/x/b", model="/y/m"), record(task="/z/b", model="/w/m"))
    assert labels(same) == ["…/b: …/m, perplexity (1)", "…/b: …/m, perplexity (2)"]
