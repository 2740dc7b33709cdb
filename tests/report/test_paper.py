"""Numbers between measured points, the envelope, and the paper's numbers beside ours."""

from __future__ import annotations

import re
from dataclasses import astuple
from typing import Any

import pytest

from lte.records import ResultRecord
from lte.report.envelope import lte_standings
from lte.report.paper import paper_numbers, paper_points, paper_rows
from lte.report.points import Cheapest, Tradeoff, cheapest_within, interpolate
from tests.report.sample_records import record
from tests.report.test_points import compared

GFLOP = 2.0**30


def point(method: str, sparsity: float, value: float | None, gflops: float | None, **changes: Any) -> ResultRecord:
    """Dense has 10 GFLOPs and a perplexity of 20; a GFLOP is read as 10 MB."""
    costs = {"flops_per_token": None, "bytes_per_token": None}
    if gflops is not None:
        costs = {"flops_per_token": gflops * GFLOP, "bytes_per_token": gflops * 10e6}
    return record(method, **{"target_sparsity": sparsity, "sparsity": sparsity, "value": value, **costs, **changes})


DENSE = point("dense", 0.0, 20.0, 10.0)


def found(tradeoff: Tradeoff, limit: float) -> Cheapest | None:
    return cheapest_within(tradeoff, tradeoff.curves["lte"], limit)


def close_to(*expected: Any) -> Any:
    return pytest.approx(expected, abs=1e-9)


def numbers(cheapest: Cheapest | None) -> tuple[Any, ...]:
    assert cheapest is not None
    return astuple(cheapest)


def test_the_fewest_flops_lie_between_the_neighbouring_points() -> None:
    tradeoff = compared(DENSE, point("lte", 0.5, 20.2, 6.0), point("lte", 0.8, 21.0, 4.0), point("lte", 0.9, 25.0, 3.0))
    # 0.3 of the 0.8 from 20.2 to 21.0: three eighths of the way from 6 to 4, and from 50% to 80%.
    assert numbers(found(tradeoff, 0.5)) == close_to(5.25, 0.6125, 0.525, False)
    assert numbers(found(tradeoff, 1.0)) == close_to(4.0, 0.8, 0.4, False)


def test_nothing_is_extrapolated() -> None:
    tradeoff = compared(DENSE, point("lte", 0.5, 20.2, 6.0), point("lte", 0.8, 21.0, 4.0))
    assert found(tradeoff, 0.1) is None
    assert found(tradeoff, 9.0) == Cheapest(4.0, 0.8, 0.4, True)
    assert interpolate(tradeoff.curves["lte"], "gflops", 6.1, "value") is None
    assert interpolate(tradeoff.curves["lte"], "gflops", 3.9, "value") is None
    assert interpolate(tradeoff.curves["lte"], "gflops", 4.5, "value") == pytest.approx(20.8)
    assert interpolate(tradeoff.curves["lte"], "gflops", 6.0, "value") == 20.2


def test_a_curve_that_comes_back_counts_where_it_is_cheapest() -> None:
    tradeoff = compared(DENSE, point("lte", 0.5, 22.0, 6.0), point("lte", 0.8, 20.0, 4.0), point("lte", 0.9, 21.0, 3.0))
    assert numbers(found(tradeoff, 0.5)) == close_to(3.5, 0.85, 0.35, False)


def test_higher_metrics_drop_downwards() -> None:
    changes = {"metric": "rougeL"}
    values = [point(name, s, v, g, **changes) for name, s, v, g in (("lte", 0.5, 0.39, 6.0), ("lte", 0.8, 0.29, 4.0))]
    tradeoff = compared(point("dense", 0.0, 0.4, 10.0, **changes), *values)
    cheapest = found(tradeoff, 0.05)
    assert cheapest is not None
    assert cheapest.gflops == pytest.approx(5.2)


def test_points_without_flops_or_a_reference_give_none() -> None:
    assert found(compared(DENSE, point("lte", 0.5, 20.0, None)), 0.5) is None
    assert found(compared(point("lte", 0.5, 20.0, 5.0)), 0.5) is None
    bare = compared(DENSE, {**point("lte", 0.5, 20.0, 5.0), "sparsity": None})
    assert found(bare, 0.5) == Cheapest(5.0, None, 0.5, True)


def test_the_envelope_by_hand() -> None:
    lte = [("lte", 0.5, 21.0, 6.0), ("lte", 0.7, 22.0, 5.0), ("lte", 0.9, 24.0, 2.0)]
    cats = [("cats", 0.3, 20.5, 7.0), ("cats", 0.6, 21.5, 5.0)]
    tradeoff = compared(DENSE, *(point(*each) for each in (*lte, *cats)))
    standings = lte_standings(tradeoff)
    assert [standing.saving for standing in standings] == pytest.approx([0.4, 0.5, 0.8])
    # At 60 MB the other curve is halfway between 20.5 and 21.5, at 50 MB it is measured, below there is none.
    assert [standing.rival_value for standing in standings] == [pytest.approx(21.0), 21.5, None]
    assert [standing.behind for standing in standings] == [pytest.approx(0.0), 0.5, None]
    assert [standing.on_envelope for standing in standings] == [True, False, True]


def test_one_standard_deviation_of_the_difference_is_a_tie() -> None:
    lte = [point("lte", 0.5, 21.0 + step, 5.0, seed=seed) for seed, step in enumerate((-0.3, 0.0, 0.3))]
    cats = [point("cats", 0.5, 20.6 + step, 5.0, seed=seed) for seed, step in enumerate((-0.4, 0.0, 0.4))]
    (standing,) = lte_standings(compared(DENSE, *lte, *cats))
    assert (standing.behind, standing.sd) == (pytest.approx(0.4), pytest.approx(0.5))
    assert standing.on_envelope


def test_a_clear_rival_comes_before_an_uncertain_one() -> None:
    lte = [point("lte", 0.5, 21.0 + step, 5.0, seed=seed) for seed, step in enumerate((-0.1, 0.0, 0.1))]
    noisy = [point("cats", 0.5, 20.5 + step, 5.0, seed=seed) for seed, step in enumerate((-2.0, 0.0, 2.0))]
    clear = [point("teal", 0.5, 20.6, 5.0, seed=seed) for seed in range(3)]
    (standing,) = lte_standings(compared(DENSE, *lte, *noisy, *clear))
    assert (standing.rival, standing.behind) == ("teal", pytest.approx(0.4))
    assert not standing.on_envelope
    (alone,) = lte_standings(compared(DENSE, *lte, *noisy))
    assert alone.on_envelope


def test_a_method_that_is_better_with_fewer_bytes_counts_too() -> None:
    (standing,) = lte_standings(compared(DENSE, point("lte", 0.3, 22.0, 8.0), point("teal", 0.9, 21.0, 1.0)))
    assert (standing.rival, standing.behind) == ("teal", 1.0)
    (dense,) = lte_standings(compared(DENSE, point("lte", 0.0, 20.5, 10.1)))
    assert (dense.rival, dense.behind) == ("dense", 0.5)


@pytest.mark.parametrize(
    "records",
    [
        [DENSE, point("cats", 0.5, 21.0, 5.0)],
        [DENSE, point("lte", 0.5, 21.0, None)],
        [point("lte", 0.5, 21.0, 5.0)],
    ],
)
def test_without_bytes_or_lte_nothing_is_said(records: list[ResultRecord]) -> None:
    tradeoff = compared(*records)
    assert lte_standings(tradeoff) == []


def on_task(task: str, metric: str, *records: ResultRecord) -> Tradeoff:
    return compared(*({**each, "task": task, "metric": metric} for each in records))


def test_table_1_stands_beside_ours() -> None:
    lte = (point("lte", 0.5, 20.2, 6.0), point("lte", 0.8, 21.0, 4.0))
    rows = {row.what.split(",")[0]: row for row in paper_rows(on_task("wikitext103", "perplexity", DENSE, *lte))[:4]}
    assert (rows["LTE"].paper, rows["LTE"].ours) == ("6.59 (54.6% of dense)", "5.2500 (52.5% of dense), lte")
    assert (rows["Deja Vu"].paper, rows["Deja Vu"].ours) == ("7.92 (65.7% of dense)", "-")
    assert rows["MoEfication"].paper == "-"


def test_table_2_finds_the_pattern_and_the_share_of_weights() -> None:
    wanda = point("wanda", 0.5, 30.0, 5.0, weight_sparsity=0.5, method_config={"pattern": "2:4"})
    lte = (point("lte", 0.5, 20.0, 6.0, weight_sparsity=0.4), point("lte", 0.8, 24.0, 4.0, weight_sparsity=0.6))
    rows = paper_rows(on_task("wikitext103", "perplexity", DENSE, wanda, *lte))
    ours = {row.what.split(",")[0]: row.ours for row in rows if row.where == "Table 2"}
    assert ours == {"Wanda 2:4": "30.00, wanda", "Wanda 4:8": "-", "Wanda unstructured": "-", "LTE": "22.40, lte"}


def test_relu_tells_two_rows_of_moefication_apart() -> None:
    moe = [
        point("moefication", 0.5, 20.0, gflops, label=label)
        for label, gflops in (("moefication", 6.0), ("moe-relu", 5.0))
    ]
    rows = paper_rows(on_task("wikitext103", "perplexity", DENSE, *moe))
    assert [row.ours.split(", ")[-1] for row in rows[1:3]] == ["moefication", "moe-relu"]


def test_glue_and_latency() -> None:
    timed = {"latency_ms": 3.0, "latency_dense_ms": 4.0}
    lte = [point("lte", share, 0.9, 10 - 8 * share, **timed, latency_sparsity=share) for share in (0.4, 0.6)]
    dense = point("dense", 0.0, 0.9, 10.0)
    *glue, latency = paper_rows(on_task("mrpc", "accuracy", dense, *lte))
    assert glue[0].ours == "60% at a drop of at most 0.01, lte"
    assert (latency.paper, latency.ours) == ("about 75%", "75%, lte")
    # Timed where less was off.
    elsewhere = [point("lte", share, 0.9, 5.0, **timed, latency_sparsity=share / 2) for share in (0.4, 0.6)]
    assert paper_rows(on_task("mrpc", "accuracy", dense, *elsewhere))[-1].ours == "-"
    unknown = point("lte", 0.5, 0.9, 5.0, **timed)
    assert all("latency" not in row.what for row in paper_rows(on_task("mrpc", "accuracy", dense, unknown)))
    assert paper_rows(compared(DENSE, point("lte", 0.5, 20.0, 5.0))) == []


def test_the_papers_points_are_shares_of_its_dense_model() -> None:
    points = paper_points(on_task("xsum", "rougeL", point("dense", 0.0, 0.4, 10.0)))
    lte = next(each for each in points if each["label"] == "LTE (paper)")
    assert lte["costs"] == {"flops": pytest.approx(5.38 / 12.06), "sparsity": 0.84}
    assert lte["lost"] == pytest.approx(0.05)
    assert len(points) == 4
    assert paper_points(on_task("xsum", "rougeL", point("lte", 0.5, 0.4, 10.0))) == []
    assert paper_points(on_task("xsum", "bleu", point("dense", 0.0, 0.4, 10.0))) == []


def test_the_papers_flops_are_those_of_its_sparsity() -> None:
    # 2 x the block linears of LLaMA-7B in units of 2^30: 32 layers of 4 D^2 and 3 D F, routers 1.04% of the FFN.
    attention, ffn = 2 * 32 * 4 * 4096**2 / GFLOP, 2 * 32 * 3 * 4096 * 11008 / GFLOP
    table = paper_numbers()["table1"]
    assert attention + ffn == pytest.approx(table["dense_gflops"], abs=0.005)
    (lte,) = [row for row in table["rows"] if row["method"] == "lte"]
    for task, sparsity in lte["sparsity"].items():
        assert attention + (1 - sparsity + 0.0104) * ffn == pytest.approx(lte["gflops"][task], abs=0.02)


def test_every_row_of_the_paper_has_a_name_for_legends() -> None:
    paper = paper_numbers()
    rows = [row for table in ("table1", "table2", "glue") for row in paper[table]["rows"]]
    assert {row["method"] for row in rows} == set(paper["names"])
    assert re.fullmatch(r"arXiv \d{4}\.\d{5}", paper["source"])
