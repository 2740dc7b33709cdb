"""Draws docs/images/perplexity.png from the result files.

python experiments/wikipedia/plot.py
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lte.records import load_records
from lte.report.figures import perplexity_vs_sparsity_figure, save_figure

ROOT = Path(__file__).resolve().parents[2]


def budget(record: Mapping[str, Any]) -> str:
    """Names a curve by its method, tokens, and learning rate."""
    run = record["config"]["run"]
    method = record["method"]
    if method == "lte" and run["recipe"] == "paper":
        method = "lte, the paper's recipe"
    elif method == "dense" and run["distillation_weight"]:
        method = "dense, distilled"
    start = "" if run["start"] is None else " more"
    return f"{method}, {run['tokens'] / 1e6:.0f}M tokens{start}, lr {run['learning_rate']:g}"


def main() -> None:
    records = load_records(ROOT / "results" / "wikipedia", "*-wikipedia_valid.json")
    figure = perplexity_vs_sparsity_figure(records, label=budget)
    save_figure(figure, ROOT / "docs" / "images" / "perplexity.png")


if __name__ == "__main__":
    main()
