"""Draws what trained models share: union sparsity by number of tokens, and what it costs.

    python experiments/company_figure.py results/recipe/company results/recipe/ideas docs/images/company.png

The first folder has the records of `experiments/recipe/company.yaml`; the second one that of the model as it was, with
the label `original`, measured on the same text.
"""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from lte.records import ResultRecord, load_records
from lte.report.figures import new_figure, save_figure
from lte.report.palette import colour_names, light

TOKENS = (1, 2, 4, 8, 16)
MARKERS = "osD^vPX*<h"
Groups = dict[str, list[ResultRecord]]


def shared(record: ResultRecord, tokens: int) -> float:
    """What so many tokens in a row leave off together, the mean over the kinds of text."""
    name = r"sparsity_[a-z]\w*" if tokens == 1 else rf"union_sparsity_{tokens}_\w+"
    found = [value for key, value in (record.metrics or {}).items() if re.fullmatch(name, key) and value is not None]
    if not found:
        raise SystemExit(f"{record.source} must have metrics named {name}")
    return statistics.mean(found)


def number(record: ResultRecord) -> float:
    """Its perplexity, which a run that failed has not."""
    if record.value is None:
        raise SystemExit(f"{record.source} must have a perplexity")
    return record.value


def draw_tokens(axis: Axes, groups: Groups, colours: dict[str, str]) -> None:
    """Union sparsity over tokens, a line for each run."""
    for (label, found), marker in zip(groups.items(), itertools.cycle(MARKERS), strict=False):
        for record in found:
            shares = [shared(record, tokens) for tokens in TOKENS]
            name = label if record is found[0] else None
            axis.plot(TOKENS, shares, color=light(colours[label]), marker=marker, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(TOKENS, [str(tokens) for tokens in TOKENS])
    axis.set_xlabel("tokens in a row")
    axis.set_ylabel("share of experts that none of them switches on")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def draw_costs(axis: Axes, groups: Groups, colours: dict[str, str], original: float) -> None:
    """Perplexity over that of the original against the union sparsity of 8 tokens, a point for each run."""
    for (label, found), marker in zip(groups.items(), itertools.cycle(MARKERS), strict=False):
        points = [(shared(record, 8), number(record) / original) for record in found]
        axis.scatter(*zip(*points, strict=True), color=light(colours[label]), marker=marker, s=60)
    runs = [record for found in groups.values() for record in found]
    for target in sorted({record.target_sparsity for record in runs if record.target_sparsity is not None}):
        level = statistics.mean(number(record) / original for record in runs if record.target_sparsity == target)
        axis.annotate(f"{target:.0%} off for a token", (0.02, level), xycoords=("axes fraction", "data"), fontsize=9)
    axis.set_xlabel("share of experts that none of 8 tokens in a row switches on")
    axis.set_ylabel("perplexity over the original's, lower is better")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("company", type=Path, help="folder of records")
    parser.add_argument("original", type=Path, help="folder with the record of the original")
    parser.add_argument("figure", type=Path, help="PNG file")
    args = parser.parse_args()
    original = next((number(each) for each in load_records(args.original) if each.label == "original"), None)
    if original is None:
        raise SystemExit(f"{args.original} must have a record with the label original")
    groups: Groups = defaultdict(list)
    for record in load_records(args.company):
        groups[record.label or record.method].append(record)
    colours = colour_names(groups)
    figure, (left, right) = new_figure(12, 4.8, columns=2)
    draw_tokens(left, groups, colours)
    draw_costs(right, groups, colours, original)
    left.legend(fontsize=8, frameon=False)
    save_figure(figure, args.figure)


if __name__ == "__main__":
    main()
