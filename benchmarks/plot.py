"""Draws the figure of a result file of `lte bench`, as the command itself does at its end.

python benchmarks/plot.py results/bench/llama2_7b_ffn_h100.json docs/images/llama2_7b_ffn.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lte.report.figures import save_figure
from lte.report.model_figures import latency_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file of lte bench")
    parser.add_argument("figure", type=Path, help="PNG file")
    args = parser.parse_args()
    save_figure(latency_figure(json.loads(args.results.read_text(encoding="utf-8"))["rows"]), args.figure)


if __name__ == "__main__":
    main()
