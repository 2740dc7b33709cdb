"""Curves that would hold a seed twice are split by what differs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lte.records import ResultRecord
from lte.report.points import find_tradeoffs
from tests.report.sample_records import record


def run(source: str, method: str = "lte", **changes: Any) -> ResultRecord:
    settings = {name: changes.pop(name) for name in ("size", "rate", "recipe", "name", "notes") if name in changes}
    return replace(record(method, **changes, config={"run": settings}), source=f"results/{source}.json")


def points_of(*runs: ResultRecord) -> dict[str, list[int]]:
    """How many seeds each point of each curve has, dense models among them."""
    (tradeoff,) = find_tradeoffs(runs)
    found: dict[str, list[int]] = {}
    for point in tradeoff.points():
        found.setdefault(point.curve, []).append(point.value.n)
    return found


def test_what_does_not_clash_keeps_its_name() -> None:
    runs = [run(f"folder{seed}/x", seed=seed, size=seed) for seed in range(3)]
    assert points_of(*runs, run("x", target_sparsity=0.7)) == {"lte": [3, 1]}


def test_several_dense_models_of_a_folder_are_told_apart_by_their_names() -> None:
    runs = [run(name, "dense", name=name, rate=1 / place) for place, name in enumerate(("a", "b", "c"), 1)]
    assert points_of(*runs) == {f"dense, name={name}": [1] for name in "abc"}


def test_a_setting_with_few_values_keeps_seeds_together() -> None:
    runs = [
        run(f"{recipe}-{seed}", recipe=recipe, seed=seed, name=f"{recipe}-{seed}")
        for recipe in ("paper", "annealed")
        for seed in range(3)
    ]
    assert points_of(*runs) == {"lte, recipe=annealed": [3], "lte, recipe=paper": [3]}


def test_two_settings_are_taken_where_one_is_not_enough() -> None:
    runs = [
        run(f"{size}-{rate}-{seed}", size=size, rate=rate, seed=seed, name=f"{size}-{rate}-{seed}")
        for size in (8, 16)
        for rate in (0.1, 0.2)
        for seed in range(2)
    ]
    expected = [f"lte, size={size}, rate={rate}" for size in (8, 16) for rate in (0.1, 0.2)]
    assert points_of(*runs) == {name: [2] for name in expected}


def test_folders_come_first_and_the_upper_one_has_no_name() -> None:
    runs = [run("a", name="a"), run("old/a", name="a"), run("old/b", name="b"), run("older/a", name="a", seed=1)]
    assert points_of(*runs) == {
        "lte": [1],
        "lte, folder=old, name=a": [1],
        "lte, folder=old, name=b": [1],
        "lte, folder=older": [1],
    }


def test_a_folder_for_each_seed_does_not_split_seeds() -> None:
    runs = [run(f"seed{seed}/{size}", size=size, seed=seed) for seed in range(2) for size in (8, 16)]
    assert points_of(*runs) == {"lte, size=8": [2], "lte, size=16": [2]}
    deeper = [run(f"{size}/seed{seed}/x", size=size, seed=seed) for seed in range(2) for size in (8, 16)]
    assert points_of(*deeper) == {"lte, size=8": [2], "lte, size=16": [2]}


def test_the_file_is_the_last_resort_and_long_texts_are_none() -> None:
    assert points_of(run("a", notes="x" * 40), run("b", notes="y" * 40)) == {"lte, file=a": [1], "lte, file=b": [1]}


def test_the_order_of_runs_changes_no_name() -> None:
    runs = [
        replace(record(config={"recipe": "paper", "grouping": "kmeans"}), source="a.json"),
        replace(record(config={"grouping": "random", "recipe": "annealed"}), source="b.json"),
    ]
    assert points_of(*runs) == points_of(*reversed(runs)) == {"lte, recipe=annealed": [1], "lte, recipe=paper": [1]}


def test_splits_of_a_task_have_the_same_names() -> None:
    clashing = [run(recipe, recipe=recipe) for recipe in ("paper", "annealed")]
    alone = run("c", recipe="paper", split="other")
    other, test = find_tradeoffs([*clashing, alone])
    assert list(other.curves) == ["lte, recipe=paper"]
    assert list(test.curves) == ["lte, recipe=annealed", "lte, recipe=paper"]


def test_failed_runs_split_nothing() -> None:
    (tradeoff,) = find_tradeoffs([run("a", value=None), run("b")])
    assert list(tradeoff.curves) == ["lte"]
    assert len(tradeoff.failed) == 1


@pytest.mark.parametrize("source", ["records[0]", "a.json"])
def test_what_is_the_same_throughout_keeps_one_name_and_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match="which nothing tells apart"):
        find_tradeoffs([replace(record(), source=source)] * 2)
