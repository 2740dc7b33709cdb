"""What a page shows of one run: where it comes from, its routers, its layers over training. JSON-ready.

Shapes: L layers, E experts, B bins of a histogram, S logged steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lte.report.records import Record, Run, field_value

# Histograms are whole numbers of this part of all scores: most of a page is histograms.
HISTOGRAM_UNIT = 1e-4
# A picture shows no more steps than this, and a page has one such map for each run.
MOST_STEPS = 60
_DETAILS = ("command", "hardware", "git_commit", "versions", "wall_time_s", "tokens_trained", "method_config", "config")


def run_data(run: Run, value: float | None) -> dict[str, Any]:
    """One run.

    Args:
        run: the record and its file.
        value: its metric.
    """
    record = run.record
    return {
        "source": run.source,
        "seed": record["seed"],
        "value": value,
        **{name: record.get(name) for name in _DETAILS},
        "eta": final_eta(record),
        "routing": routing_data(record),
        "history": history_data(record),
    }


def final_eta(record: Record) -> float | None:
    """The weight of the efficiency loss at the end of a run; `None` where the record does not say it.

    The record's own `eta`, else the one that its settings fix, else the last in its training log that is not 0: entries
    of frozen routers, and of a training without this loss, have 0.
    """
    logged = [entry.get("eta") for entry in _list(record.get("log")) if isinstance(entry, Mapping)]
    for eta in (record.get("eta"), field_value(record, "config.train.eta"), *filter(None, reversed(logged))):
        if _is_number(eta):
            return float(eta)
    return None


def routing_data(record: Record) -> dict[str, Any] | None:
    """What was measured of the routers; `None` where the record has no active fractions.

    Returns:
        `active_fraction` [L]; `threshold`; where they were measured `histogram` [L, B] in units of `HISTOGRAM_UNIT`,
        and `experts`, `dead` (no token uses them) and `always_on` (every token does), [L] each, else `None`.
    """
    measurement = record.get("measurement")
    if not isinstance(measurement, Mapping) or not _list(measurement.get("active_fraction")):
        return None
    histogram, use = (_layers(measurement.get(name)) for name in ("score_histogram", "expert_use"))
    return {
        "active_fraction": [_rounded(share) for share in measurement["active_fraction"]],
        "threshold": measurement.get("threshold"),
        "tokens": measurement.get("tokens"),
        "histogram": [[_units(share) for share in layer] for layer in histogram] if histogram else None,
        "experts": [len(layer) for layer in use] if use else None,
        "dead": [sum(share == 0 for share in layer) for layer in use] if use else None,
        "always_on": [sum(share == 1 for share in layer) for layer in use] if use else None,
    }


def history_data(record: Record) -> dict[str, Any] | None:
    """Active fractions over training, at `MOST_STEPS` evenly spaced steps at most; `None` where there are none.

    Returns:
        `step` [S], `stage` [S], `active_fraction` [S, L].
    """
    history = record.get("layer_history")
    if not isinstance(history, Mapping):
        return None
    steps, shares = _list(history.get("step")), _layers(history.get("active_fraction"))
    if not steps or len(steps) != len(shares):
        return None
    kept = _evenly(len(steps))
    stages = _list(history.get("stage"))
    stages = stages if len(stages) == len(steps) else [None] * len(steps)
    return {
        "step": [steps[place] for place in kept],
        "stage": [stages[place] for place in kept],
        "active_fraction": [[_rounded(share, 3) for share in shares[place]] for place in kept],
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _layers(value: Any) -> list[list[Any]]:
    """A list of lists; empty where it is another thing."""
    rows = _list(value)
    return rows if all(isinstance(row, list) and row for row in rows) else []


def _evenly(count: int) -> Sequence[int]:
    """Places of the first, the last, and evenly spaced ones between."""
    if count <= MOST_STEPS:
        return range(count)
    return [round(place * (count - 1) / (MOST_STEPS - 1)) for place in range(MOST_STEPS)]


def _units(share: Any) -> int | None:
    return round(share / HISTOGRAM_UNIT) if _is_number(share) else None


def _rounded(share: Any, digits: int = 4) -> float | None:
    return round(share, digits) if _is_number(share) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
