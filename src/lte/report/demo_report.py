"""The report of a demo run: Markdown, JSON, and pictures in one folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lte.config import GFLOP
from lte.eval.sparsity import Measurement
from lte.files import write_json_atomic, write_text_atomic
from lte.records import ResultRecord
from lte.report.router_health import router_health_markdown
from lte.report.tables import markdown_table, percent

HEALTH_FILE, TRAINING_FILE = "router_health.png", "training.png"


def write_demo_report(
    folder: str | Path,
    records: Mapping[str, ResultRecord],
    measurement: Measurement,
    log_history: Sequence[dict[str, Any]],
    *,
    samples: Mapping[str, str],
    notes: Sequence[str],
) -> Path:
    """Writes `report.md`, `report.json`, `router_health.png`, and, if losses were logged, `training.png`.

    Args:
        folder: where to; made if missing.
        records: by name, as `report.json` holds them; `dense` and `sparse` first, more (a control) may follow.
        measurement: the sparse model's routing.
        log_history: of the training.
        samples: generated text by model name.
        notes: paragraphs for the reader: what was checked, what a real run needs.

    Returns:
        The path of `report.md`, which is written last.

    Raises:
        ValueError: if `records` lack `dense` or `sparse`.
    """
    from lte.report.figures import save_figure  # matplotlib is slow to load
    from lte.report.model_figures import router_health_figure, training_curves_figure

    missing = [name for name in ("dense", "sparse") if name not in records]
    if missing:
        raise ValueError(f"records must hold dense and sparse, got none for {', '.join(missing)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# LTE demo report", _headline(records), _comparison(records), *notes, "## What the models write"]
    parts += [f"**{name}**\n\n{_fenced(text)}" for name, text in samples.items()]
    if any("task_loss" in entry for entry in log_history):
        save_figure(training_curves_figure(log_history), folder / TRAINING_FILE)
        parts += ["## Training", f"![losses, eta and active experts over the steps of both stages]({TRAINING_FILE})"]
    save_figure(router_health_figure(measurement), folder / HEALTH_FILE)
    parts += [*_routing(measurement), *_provenance(records["sparse"])]
    write_json_atomic(folder / "report.json", dict(records))
    report = folder / "report.md"
    write_text_atomic(report, "\n\n".join(parts) + "\n")
    return report


def _headline(records: Mapping[str, ResultRecord]) -> str:
    """The outcome in a sentence, whichever way it went."""
    dense, sparse = records["dense"], records["sparse"]
    metric = sparse.metric
    change = f" ({sparse.value / dense.value - 1:+.1%})" if dense.value and sparse.value else ""
    flops = _ratio(sparse.flops_per_token, dense.flops_per_token)
    weights = _ratio(sparse.bytes_per_token, dense.bytes_per_token)
    return (
        f"The sparse model skips {percent(sparse.sparsity)} of its FFN neurons per token (target "
        f"{percent(sparse.target_sparsity)}), measured on held-out text in hard mode, with a {metric} of "
        f"{_number(sparse.value)} against {_number(dense.value)} for the dense model{change}. Per token it needs "
        f"{percent(flops)} of the dense model's FLOPs and reads {percent(weights)} of its weight bytes, routers "
        "included."
    )


def _comparison(records: Mapping[str, ResultRecord]) -> str:
    metric = records["sparse"].metric
    header = ("model", metric, "FFN sparsity", "GFLOPs per token", "MB read per token", "tokens trained", "time")
    rows = []
    for name, record in records.items():
        flops, size = (record.flops_per_token or 0.0) / GFLOP, (record.bytes_per_token or 0.0) / 1e6
        quality, training = (_number(record.value), percent(record.sparsity)), f"{record.wall_time_s:.0f} s"
        rows.append((name, *quality, f"{flops:.4f}", f"{size:.1f}", f"{record.tokens_trained:,}", training))
    unit = (
        "GFLOPs are 2 x the weights of the block linears that a token uses (1 G = 2^30; no LM head, no attention "
        "scores); bytes are those weights at batch size 1. Time is that of the training."
    )
    return f"{markdown_table(header, rows)}\n\n{unit}"


def _routing(measurement: Measurement) -> list[str]:
    legend = (
        f"On {measurement.tokens:,} held-out tokens. Active: mean share of experts per token. Dead, always on: experts "
        "that no token or every token activates. Near tau: scores within 0.1 of the threshold "
        f"{measurement.threshold:g}, where a small change of the input switches an expert."
    )
    return [
        "## Router health",
        f"![experts in use and router scores by layer]({HEALTH_FILE})",
        legend,
        router_health_markdown(measurement),
    ]


def _provenance(record: ResultRecord) -> list[str]:
    facts = {
        "model": record.model,
        "task and split": f"{record.task}, {record.split}",
        "seed": record.seed,
        "hardware": record.hardware,
        "versions": ", ".join(f"{name} {number}" for name, number in record.versions.items()),
        "commit": record.git_commit or "not a git checkout",
    }
    return [
        "## Where this was made",
        markdown_table(("", "value"), [(name, str(value)) for name, value in facts.items()], numbers=()),
        "All settings and numbers are in `report.json`.",
    ]


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _fenced(text: str) -> str:
    """A code block that shows the text as it is, whatever backticks it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text.strip()}\n{fence}"
