"""Tables of a trade-off, for the terminal and for Markdown, and its points as rows of a CSV file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lte.records import ResultRecord
from lte.report.envelope import Standing
from lte.report.paper import paper_rows
from lte.report.points import Point, Statistic, Tradeoff, cheapest_within

MISSING = "-"
"""What stands in place of a number that is not known."""
# Where a latency was timed within so much of the measured sparsity, nothing is said.
SAME_SPARSITY = 0.05
# Characters that a column of text wants at least.
_TEXT_WIDTH = 28


@dataclass(frozen=True)
class TextTable:
    """A table of texts: the first `left` columns are words, the others numbers; a narrow terminal goes without `spare`.

    The title is for the terminal; Markdown has headings of its own.
    """

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    left: int
    title: str
    spare: tuple[str, ...] = ()

    def rich(self, width: int | None = None) -> Table:
        """For a terminal of so many characters, `None` for a wide one."""
        places = self._fitting(width)
        caption = None if len(places) == len(self.header) else "a wider terminal shows more columns"
        table = Table(title=Text(self.title), caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.title_justify = table.caption_justify = "left"
        for place in places:
            words = place < self.left
            table.add_column(Text(self.header[place]), min_width=14 if words else 5, overflow="fold")
            table.columns[-1].justify = "left" if words else "right"
        for row in self.rows:
            table.add_row(*(Text(row[place]) for place in places))
        return table

    def markdown(self) -> str:
        """For a Markdown file."""
        return markdown_table(self.header, self.rows, numbers=self.header[self.left :])

    def _fitting(self, width: int | None) -> list[int]:
        """The columns that leave enough width to the text."""
        # Headings are broken between words, numbers are not.
        sizes = [max(map(len, name.split()), default=0) for name in self.header]
        for row in self.rows:
            sizes = [max(size, len(cell)) for size, cell in zip(sizes, row, strict=True)]
        sizes[: self.left] = [_TEXT_WIDTH] * self.left
        places, spare = list(range(len(self.header))), list(self.spare)
        while width and spare and sum(sizes[place] + 1 for place in places) > width:
            places.remove(self.header.index(spare.pop(0)))
        return places


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] | None = None) -> str:
    """A GitHub-flavoured Markdown table.

    Args:
        header: names of the columns.
        rows: cells; a `|` or line break in one is escaped.
        numbers: names of the columns that stand on the right; `None` takes all but the first.

    Raises:
        ValueError: if a row has another number of cells than the header.
    """
    right = set(header[1:] if numbers is None else numbers)
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows must have {len(header)} cells, as the header has, got row={tuple(row)}")
    rule = ["---:" if name in right else "---" for name in header]
    lines = [[_escaped(cell) for cell in line] for line in (header, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def _escaped(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").split())


def results_table(tradeoff: Tradeoff) -> TextTable:
    """A row for each point: its metric, its drop, and what it costs, as shares of the dense model's cost."""
    of_costs = ("FFN sparsity", "weights not read", "FLOPs", "bytes", "latency", "tokens")
    header = ("method", "target", tradeoff.metric.name, "seeds", "drop", *of_costs)
    rows = []
    for point in tradeoff.points():
        name = point_name(point) + (" (reference)" if point is tradeoff.reference else "")
        value, drop = _spread_text(point.value, tradeoff.metric.format), tradeoff.drop(point)
        quality = (value, str(point.value.n), MISSING if drop is None else tradeoff.metric.format(drop))
        shares = [tradeoff.share(point, name) for name in ("gflops", "megabytes")]
        costs = (point.mean("sparsity"), point.mean("weight_sparsity"), *shares, point.mean("latency_ratio"))
        rows.append((name, _target(point.target), *quality, *map(percent, costs), _tokens_text(point.tokens_trained)))
    return TextTable(header, rows, 1, tradeoff.title, spare=("weights not read", "FLOPs", "tokens", "seeds", "latency"))


def cheapest_table(tradeoff: Tradeoff, limit: float) -> TextTable:
    """The form of the paper's Table 1: the fewest GFLOPs of each curve at a drop of at most `limit`."""
    title = f"Fewest GFLOPs per token at a drop of at most {limit:g} {tradeoff.metric.name}"
    rows = []
    for name, points in tradeoff.curves.items():
        found = cheapest_within(tradeoff, points, limit)
        if found is None:
            rows.append((name, "no measured point is that good", MISSING, MISSING, MISSING))
            continue
        how = "lowest measured, fewer may do" if found.lowest_measured else "between measured points"
        rows.append((name, how, f"{found.gflops:.4g}", percent(found.share), percent(found.sparsity)))
    return TextTable(("method", "where", "GFLOPs", "of dense", "FFN sparsity there"), rows, 2, title)


def envelope_table(tradeoff: Tradeoff, standings: Sequence[Standing]) -> TextTable:
    """Each point of LTE beside the best other method that reads at most as many bytes."""
    metric = tradeoff.metric
    methods, savings = ("LTE", "on the envelope", "best other method"), ("bytes saved", "FFN bytes saved")
    header = (*methods, *savings, metric.name, "the other's", "the other better by")
    rows = []
    for each in standings:
        place, rival, theirs, behind = MISSING, "none with as few bytes", MISSING, MISSING
        if each.rival is not None and each.rival_value is not None and each.behind is not None:
            place, rival, theirs = "yes" if each.on_envelope else "no", each.rival, metric.format(each.rival_value)
            behind = metric.format(each.behind) + (f" ± {metric.format(each.sd)}" if each.sd else "")
        name, own = each.point.curve, _spread_text(each.point.value, metric.format)
        rows.append((name, place, rival, percent(each.saving), percent(each.ffn_saving), own, theirs, behind))
    return TextTable(header, rows, 3, "LTE and the upper envelope, by bytes saved")


def paper_table(tradeoff: Tradeoff, limit: float | None = None) -> TextTable | None:
    """The paper's numbers and ours, `None` where the paper has none for this task."""
    rows = paper_rows(tradeoff, limit)
    title = "The paper and ours: other models and settings"
    return TextTable(("", "what", "paper", "ours"), rows, 4, title) if rows else None


def failed_table(tradeoff: Tradeoff) -> TextTable | None:
    """The runs without a finite value, `None` if there are none."""
    rows = [
        (each.label or each.method, str(each.seed), failure_text(each), each.source, _target(each.target_sparsity))
        for each in tradeoff.failed
    ]
    return TextTable(("method", "seed", "failure", "file", "target"), rows, 4, "Failed runs") if rows else None


def failure_text(record: ResultRecord) -> str:
    """Why a run has no finite value."""
    return record.failure or "the value is not finite"


def commands_table(tradeoff: Tradeoff) -> TextTable | None:
    """The command behind the first seed of each point, `None` if no record says one."""
    rows = []
    for point in tradeoff.points():
        if command := point.records[0].command:
            seeds = ", ".join(str(record.seed) for record in point.records)
            rows.append((point_name(point), f"`{command}`", seeds, _target(point.target)))
    return TextTable(("method", "command of the first seed", "seeds", "target"), rows, 3, "Commands") if rows else None


def csv_rows(tradeoff: Tradeoff) -> list[dict[str, Any]]:
    """A row for each point with unrounded numbers; `None` for what is not known."""
    return [_csv_row(tradeoff, point) for point in tradeoff.points()]


# The numbers of a point that are shown in full.
_QUANTITIES = ("value", "sparsity", "weight_sparsity", "gflops", "megabytes", "latency_ms", "latency_ratio")


def _csv_row(tradeoff: Tradeoff, point: Point) -> dict[str, Any]:
    row: dict[str, Any] = {"task": tradeoff.task, "split": tradeoff.split, "model": tradeoff.model}
    row |= {"metric": tradeoff.metric.name, "curve": point.curve, "method": point.method, "label": point.label}
    row |= {"target": point.target, "seeds": point.value.n, "drop": tradeoff.drop(point)}
    for name in _QUANTITIES:
        found: Statistic | None = getattr(point, name)
        row |= {name: found and found.mean, f"{name}_sd": found and found.sd}
    row |= {f"{name}_share": tradeoff.share(point, name) for name in ("gflops", "megabytes")}
    row |= {"tokens_trained": point.mean("tokens_trained"), "is_reference": point is tradeoff.reference}
    row |= {"command": point.records[0].command, "files": " ".join(record.source for record in point.records)}
    return row


def point_name(point: Point) -> str:
    """The curve, and the setting's label where that is another."""
    return point.curve if point.label in (None, point.curve) else f"{point.curve}: {point.label}"


def _name_at_target(point: Point) -> str:
    return f"{point_name(point)} at {_target(point.target)}"


def percent(share: float | None) -> str:
    """A share as per cent, or `MISSING`."""
    return MISSING if share is None else f"{100 * share:.1f}%"


def reference_text(tradeoff: Tradeoff) -> str:
    """Which dense model drops and shares are against."""
    point = tradeoff.reference
    if point is None:
        return "No dense model among the records: drops and shares of dense are not known."
    of = f" of {len(tradeoff.dense)} dense models" if len(tradeoff.dense) > 1 else ""
    seeds = f"{point.value.n} seeds" if point.value.n > 1 else "1 seed"
    return (
        f"Reference, the best{of}: {point_name(point)}, {tradeoff.metric.name} "
        f"{_spread_text(point.value, tradeoff.metric.format)} ({seeds}, {_tokens_text(point.tokens_trained)} tokens)."
    )


def latency_texts(tradeoff: Tradeoff) -> list[str]:
    """Why curves or points have no latency, which have that of another sparsity, and which machines, if several."""
    points = tradeoff.points()
    timed_curves = {point.curve for point in points if point.latency_ms is not None}
    timed = [(point, record) for point in points for record in point.records if record.latency_ms is not None]
    # One seed may have been timed for all.
    untimed = [(point, record.latency_note) for point in points for record in point.records if not point.latency_ms]
    named = ((note, _name_at_target(point) if point.curve in timed_curves else point.curve) for point, note in untimed)
    found = _reasons("No latency", named)
    if elsewhere := dict.fromkeys(_name_at_target(point) for point, record in timed if _timed_elsewhere(record)):
        names = ", ".join(elsewhere)
        found.append(f"Latency of {names}: timed at another FFN sparsity than measured, or at an unknown one.")
    if len(machines := sorted({record.hardware for _, record in timed})) > 1:
        found.append(f"Latencies are of several machines, so compare shares alone: {'; '.join(machines)}.")
    return found


def _reasons(what: str, pairs: Iterable[tuple[str | None, str]]) -> list[str]:
    """A sentence for each note of pairs (note, name): what is said of which names."""
    names: dict[str, dict[str, None]] = defaultdict(dict)
    for note, name in pairs:
        if note:
            names[note][name] = None
    return [f"{what} of {', '.join(found)}: {note.rstrip('.')}." for note, found in names.items()]


def _timed_elsewhere(record: ResultRecord) -> bool:
    """Whether a latency is of steps that skipped more or less than the steps that were measured."""
    measured, timed = record.sparsity, record.latency_sparsity
    return bool(measured and (timed is None or abs(timed - measured) > SAME_SPARSITY))


def question_texts(tradeoff: Tradeoff) -> list[str]:
    """Which runs have no scores of some question sets, and why."""
    points = tradeoff.points()
    notes = ((record.harness_note, _name_at_target(point)) for point in points for record in point.records)
    return _reasons("Question sets", notes)


def _target(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:g}%"


def _spread_text(found: Statistic, form: Callable[[float], str]) -> str:
    return form(found.mean) if found.sd is None else f"{form(found.mean)} ± {form(found.sd)}"


def _tokens_text(found: Statistic | None) -> str:
    if found is None:
        return MISSING
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if found.mean >= unit:
            return f"{found.mean / unit:.3g}{letter}"
    return f"{found.mean:.0f}"
