"""The saving in bytes of the FFNs, and what rounded weights count for."""

from __future__ import annotations

from typing import Any

import pytest

from lte.eval.flops import count_linear_weights, flops_per_token
from lte.records import ResultRecord
from lte.report.envelope import dense_ffn_share, lte_standings
from lte.report.tables import envelope_table
from tests.report.sample_records import record
from tests.report.test_points import compared
from tests.tiny_models import tiny_dense_model, tiny_sparse_model

# Millions of weights.
ATTENTION, FFN, ROUTER = 40, 60, 1


def point(method: str, sparsity: float, value: float, router: int = 0, **changes: Any) -> ResultRecord:
    read = ATTENTION + (1 - sparsity) * FFN
    costs = {"flops_per_token": 2e6 * (read + router), "bytes_per_token": 2e6 * read + 4e6 * router}
    return record(method, **{"target_sparsity": sparsity, "sparsity": sparsity, "value": value, **costs, **changes})


def lte(sparsity: float, value: float, **changes: Any) -> ResultRecord:
    return point("lte", sparsity, value, ROUTER, **changes)


DENSE = point("dense", 0.0, 20.0)


def test_the_saving_is_a_share_of_the_dense_ffns_with_routers_against_it() -> None:
    tradeoff = compared(DENSE, lte(0.5, 21.0), lte(0.7, 22.0), lte(0.0, 20.0, seed=1, label="never"))
    assert dense_ffn_share(tradeoff) == pytest.approx(0.6)
    standings = lte_standings(tradeoff)
    # 4 bytes of a router's weight are 2 of the FFN's.
    expected = [-2 / 60, 0.5 - 2 / 60, 0.7 - 2 / 60]
    assert sorted(standing.ffn_saving or 0.0 for standing in standings) == pytest.approx(expected)
    table = envelope_table(tradeoff, standings)
    place = table.header.index("FFN bytes saved")
    assert sorted(row[place] for row in table.rows) == ["-3.3%", "46.7%", "66.7%"]


def test_the_share_is_that_of_a_models_layers() -> None:
    dense, sparse = tiny_dense_model(), tiny_sparse_model()
    costs = [
        {
            "flops_per_token": flops_per_token(model, share),
            # Routers have 4 bytes per weight, all others 2.
            "bytes_per_token": flops_per_token(model, share) + 2 * sum(count_linear_weights(model).router),
        }
        for model, share in ((dense, 0.0), (sparse, 0.25))
    ]
    tradeoff = compared(record("dense", **costs[0]), record(sparsity=0.25, **costs[1]))
    without = flops_per_token(dense, 1.0)
    assert dense_ffn_share(tradeoff) == pytest.approx(1 - without / flops_per_token(dense))


@pytest.mark.parametrize(
    "records",
    [
        [lte(0.5, 21.0)],
        [DENSE, lte(0.0, 21.0)],
        [DENSE, lte(0.5, 21.0, flops_per_token=None)],
        [DENSE, lte(0.5, 21.0, flops_per_token=1e9)],
    ],
)
def test_what_records_do_not_tell_is_not_said(records: list[ResultRecord]) -> None:
    tradeoff = compared(*records)
    assert dense_ffn_share(tradeoff) is None
    standings = lte_standings(tradeoff)
    assert all(standing.ffn_saving is None for standing in standings)


def test_rounded_weights_stand_beside_all_others_but_are_no_reference() -> None:
    rounded = [
        point("dense", 0.0, 19.9, label="dense-int8", weights="int8", bytes_per_token=101e6),
        lte(0.5, 21.1, label="lte-int8", weights="int8", bytes_per_token=72e6),
    ]
    tradeoff = compared(DENSE, lte(0.5, 21.0), lte(0.7, 22.0), *rounded)
    assert tradeoff.reference is not None
    assert tradeoff.reference.label is None
    assert not tradeoff.reference.is_rounded
    assert len(tradeoff.dense) == 2
    # Of the FFNs' share and saving the points in 16 bits alone tell.
    assert dense_ffn_share(tradeoff) == pytest.approx(0.6)
    standings = {standing.point.label or standing.point.target: standing for standing in lte_standings(tradeoff)}
    assert standings["lte-int8"].ffn_saving is None
    assert standings["lte-int8"].saving == pytest.approx(1 - 72 / 200)
    assert standings[0.5].ffn_saving == pytest.approx(0.5 - 2 / 60)
    # The dense model in int8 reads fewer bytes than LTE at 50%, and is better.
    assert standings[0.5].rival_value == 19.9
    assert not standings[0.5].on_envelope
