"""Records with files, and their points over seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lte.records import ResultRecord
from lte.report.curves import curve_name, curve_name_by
from lte.report.metrics import metric_named
from lte.report.points import Statistic, Tradeoff, find_tradeoffs, statistic
from tests.report.sample_records import record


def runs_of(*records: ResultRecord) -> list[ResultRecord]:
    return [ResultRecord.from_dict(each, f"{place}.json") for place, each in enumerate(records)]


def compared(*records: ResultRecord, **options: Any) -> Tradeoff:
    (tradeoff,) = find_tradeoffs(runs_of(*records), **options)
    return tradeoff


def test_a_point_is_the_mean_and_the_sample_deviation_of_its_seeds() -> None:
    seeds = [record(seed=seed, value=24.0 + seed, latency_ms=1.0, latency_dense_ms=2.0) for seed in range(3)]
    (point,) = compared(record("dense"), *seeds).curves["lte"]
    assert point.value == Statistic(25.0, 1.0, 3)
    assert point.sparsity == Statistic(0.5, 0.0, 3)
    assert point.gflops == Statistic(1.0, 0.0, 3)
    assert point.megabytes == Statistic(3.0, 0.0, 3)
    assert point.latency_ratio == Statistic(0.5, 0.0, 3)
    assert [run.seed for run in point.records] == [0, 1, 2]


def test_a_single_run_has_no_deviation() -> None:
    point = compared(record()).curves["lte"][0]
    assert point.value == Statistic(25.0, None, 1)
    assert point.value.spread == 0.0


def test_missing_numbers_stay_missing_and_known_ones_count_alone() -> None:
    known = {"latency_ms": 3.0, "latency_dense_ms": 4.0}
    point = compared(record(seed=0), record(seed=1, **known)).curves["lte"][0]
    assert point.latency_ms == Statistic(3.0, None, 1)
    assert point.latency_ratio == Statistic(0.75, None, 1)
    assert compared(record(flops_per_token=None)).curves["lte"][0].gflops is None
    assert compared(record(latency_ms=3.0)).curves["lte"][0].latency_ratio is None
    assert statistic([None, float("nan"), float("inf")]) is None
    assert statistic([1.0, float("nan")]) == Statistic(1.0, None, 1)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_run_without_a_finite_value_failed(value: float | None) -> None:
    tradeoff = compared(record(seed=0), record(seed=1, value=value))
    assert [run.source for run in tradeoff.failed] == ["1.json"]
    assert tradeoff.curves["lte"][0].value == Statistic(25.0, None, 1)
    assert compared(record(value=value)).points() == []


def test_the_reference_is_the_best_dense_model_by_the_direction_of_the_metric() -> None:
    dense = [record("dense", label=name, value=value) for name, value in (("start", 0.8), ("dense", 0.9))]
    assert compared(*dense).reference.curve == "start"  # type: ignore[union-attr]
    tradeoff = compared(*[{**each, "metric": "accuracy"} for each in dense], record(metric="accuracy", value=0.85))
    assert tradeoff.reference is not None
    assert tradeoff.reference.curve == "dense"
    point = tradeoff.curves["lte"][0]
    assert tradeoff.drop(point) == pytest.approx(0.05)
    assert tradeoff.share(point, "gflops") == 0.5
    assert tradeoff.share(point, "megabytes") == 0.75
    assert tradeoff.share(point, "latency_ms") is None


def test_without_a_dense_model_there_is_no_drop() -> None:
    tradeoff = compared(record())
    point = tradeoff.curves["lte"][0]
    assert tradeoff.reference is None
    assert tradeoff.drop(point) is None
    assert tradeoff.share(point, "gflops") is None
    assert point.weight_sparsity is None


def test_weight_sparsity_is_the_recorded_one_or_that_of_the_flops() -> None:
    tradeoff = compared(record("dense"), record(weight_sparsity=0.4), record("cats", flops_per_token=2.0**29))
    assert tradeoff.curves["lte"][0].weight_sparsity == Statistic(0.4, None, 1)
    assert tradeoff.curves["cats"][0].weight_sparsity == Statistic(0.75, None, 1)
    assert tradeoff.reference is not None
    assert tradeoff.reference.weight_sparsity == Statistic(0.0, None, 1)


def test_what_is_not_comparable_is_compared_apart() -> None:
    others = [record(**{name: "other"}) for name in ("task", "split", "model")]
    tradeoffs = find_tradeoffs(runs_of(record(), *others, record(metric="accuracy")))
    keys = [(each.task, each.split, each.model, each.metric.name) for each in tradeoffs]
    assert len(set(keys)) == 5
    assert all(len(each.points()) == 1 for each in tradeoffs)


def test_the_same_seed_twice_is_refused_where_nothing_tells_it_apart() -> None:
    twice = [replace(record(), source="0.json")] * 2
    with pytest.raises(ValueError, match=r"got seeds \[0, 0\] for 'lte' at 0.5 in 0.json, 0.json, which nothing tells"):
        find_tradeoffs(twice)
    assert len(compared(record(value=None), record()).points()) == 1


def test_another_metric_comes_from_the_metrics() -> None:
    records = [record(metrics={"accuracy": 0.9}), record("cats", metrics={"accuracy": None}), record("teal")]
    tradeoff = compared(*records, metric="accuracy")
    assert tradeoff.metric.higher_is_better
    assert tradeoff.curves["lte"][0].value.mean == 0.9
    assert [run.source for run in tradeoff.failed] == ["1.json"]
    assert "teal" not in tradeoff.curves
    with pytest.raises(
        ValueError, match="metric must be one that a record has, got metric='f1'; they have accuracy, perp"
    ):
        compared(*records, metric="f1")


def test_curves_go_by_group_then_label_then_method() -> None:
    records = [record(), record(label="lte-random"), record(label="a", group="eta"), record(label="b", group="eta")]
    assert [curve_name(each) for each in records] == ["lte", "lte-random", "eta", "eta"]
    assert [point.label for point in compared(*records).curves["eta"]] == ["a", "b"]


def test_a_group_keeps_methods_apart_at_the_same_target() -> None:
    records = [record(group="both"), record("cats", group="both", seed=1, value=30.0)]
    assert [(point.method, point.value.n) for point in compared(*records).curves["both"]] == [("cats", 1), ("lte", 1)]


def test_fields_name_curves_where_they_differ() -> None:
    records = [record(config={"lte": {"expert_size": size, "tau": 0.5}}) for size in (8, 16)]
    runs = runs_of(*records, record("cats"))
    name = curve_name_by(["config.lte.expert_size", "config.lte.tau"], runs)
    assert [name(run) for run in runs] == ["lte, expert_size=8", "lte, expert_size=16", "cats"]
    with pytest.raises(ValueError, match=r"by must be one of .*did you mean config.lte.expert_size"):
        curve_name_by(["config.lte.expert_sise"], runs)


@pytest.mark.parametrize(
    ("name", "higher", "drop"),
    [
        ("perplexity", False, 0.5),
        ("perplexity_per_word", False, 0.5),
        ("bits_per_byte", False, 0.01),
        ("accuracy", True, 0.01),
        ("accuracy_mismatched", True, 0.01),
        ("acc_norm", True, 0.01),
        ("exact_match,strict-match", True, 0.01),
        ("matthews", True, 0.01),
        ("pearson", True, 0.01),
        ("rougeL", True, 0.05),
        ("bleu", True, 1.0),
    ],
)
def test_a_metrics_name_says_which_way_is_better(name: str, higher: bool, drop: float) -> None:
    metric = metric_named(name)
    assert (metric.name, metric.higher_is_better, metric.small_drop) == (name, higher, drop)
    assert metric.drop(1.0, 3.0) == (2.0 if higher else -2.0)


def test_an_unknown_metric_can_be_declared() -> None:
    with pytest.raises(ValueError, match="got metric=speed; declare it with --higher speed or --lower speed"):
        metric_named("speed")
    with pytest.raises(ValueError, match="got metric=accurracy; did you mean accuracy"):
        metric_named("accurracy")
    with pytest.raises(ValueError, match="got metric=acc_stderr"):
        metric_named("acc_stderr")
    assert metric_named("speed", higher=["speed"]).higher_is_better
    assert not metric_named("speed", lower=["speed"]).higher_is_better
    assert compared(record(metric="speed"), higher=["speed"]).metric.higher_is_better
    with pytest.raises(ValueError, match="metric must be better one way, got metric=speed as both"):
        metric_named("speed", higher=["speed"], lower=["speed"])
