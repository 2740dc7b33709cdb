"""Whether a sparse model spends more neurons where it is surer of what comes next, or where the text surprised it.

    python experiments/certainty.py FOLDER... --output results/certainty.json

For each LTE folder and each of three texts (prose in the package, Python's help topics, Python source) it correlates
the share of the FFN neurons that a token used with the entropy of the next token and with the token's own surprise
(Spearman). Which token it is explains much of both, so there is a second number for each, *within* a token: of ranks
less their mean over all places of the same token, of tokens with at least five places. Intervals: 95%, by resampling
blocks of 50 tokens.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
from scipy.stats import rankdata

from lte.cli.inspection import load_inspected_model
from lte.eval.text_tokens import encode_text
from lte.eval.token_routing import record_text
from lte.files import write_json_atomic
from lte.hf.dense import load_tokenizer
from lte.records import environment
from lte.report.page import read_asset

PLACES, BLOCK, RESAMPLES = 5, 50, 400


def texts() -> dict[str, str]:
    """What everybody has: with this package, and with Python."""
    help_pages = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    return {"prose": read_asset("atlas.txt"), "help topics": help_pages, "source": inspect.getsource(argparse)}


def within(values: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Ranks less their mean over the places of the same kind; not a number for kinds of fewer than `PLACES` places.

    Args:
        values: [T].
        kinds: which token stands at each place, [T].
    """
    ranks = rankdata(values).astype(float)
    _, places, counts = np.unique(kinds, return_inverse=True, return_counts=True)
    means = np.bincount(places, ranks) / counts
    return np.where(counts[places] >= PLACES, ranks - means[places], np.nan)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's, of the places where both are numbers; of ranks it is Spearman's."""
    known = np.isfinite(first) & np.isfinite(second)
    return float(np.corrcoef(first[known], second[known])[0, 1])


def interval(
    first: np.ndarray, second: np.ndarray, statistic: Callable[[np.ndarray, np.ndarray], float]
) -> list[float]:
    """95% of the statistic over resampled blocks of neighbouring tokens."""
    generator = np.random.default_rng(0)
    starts = np.arange(0, len(first), BLOCK)
    found = []
    for _ in range(RESAMPLES):
        chosen = np.concatenate(
            [np.arange(start, min(start + BLOCK, len(first))) for start in generator.choice(starts, len(starts))]
        )
        found.append(statistic(first[chosen], second[chosen]))
    return [float(value) for value in np.quantile(found, [0.025, 0.975])]


def correlations(share: np.ndarray, other: np.ndarray, kinds: np.ndarray) -> dict[str, Any]:
    """Both correlations of the shares [T] with another value of each token [T], and their intervals."""
    whole, same = (rankdata(share), rankdata(other)), (within(share, kinds), within(other, kinds))
    return {
        "rho": correlation(*whole),
        "interval": interval(*whole, correlation),
        "within_token": correlation(*same),
        "within_interval": interval(*same, correlation),
        "within_places": int(np.isfinite(same[0]).sum()),
    }


def measure(folder: str, max_tokens: int) -> Iterator[dict[str, Any]]:
    """A row for each text on one model."""
    model, tokenizer = load_inspected_model(folder, "float32", "off"), load_tokenizer(folder)
    measured = getattr(model.config, "lte_measurement", None) or {}
    for name, text in texts().items():
        tokens = encode_text(tokenizer, text, max_tokens)
        routing, predictions = record_text(model, tokens.ids)
        assert predictions is not None
        # The first token, which every later one can look back on, is routed unlike all others.
        kinds, share = np.asarray(tokens.ids)[1:], routing.active.mean((0, 2))[1:]
        found = {kind: correlations(share, getattr(predictions, kind)[1:], kinds) for kind in ("entropy", "surprise")}
        yield {
            "model": Path(folder).name,
            "base": measured.get("model"),
            "target_sparsity": model.config.lte["target_sparsity"],
            "measured_sparsity": measured.get("sparsity"),
            "text": name,
            "tokens": len(tokens),
            "sparsity": routing.sparsity,
            **found,
        }
        print(f"{Path(folder).name}, {name}: {found}", flush=True)


def main() -> None:
    """Measures all folders and writes one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", help="folders of LTE models that write token by token")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=1500)
    given = parser.parse_args()
    rows = [row for folder in given.folders for row in measure(folder, given.max_tokens)]
    write_json_atomic(given.output, {"experiment": "certainty", "rows": rows, **environment()})


if __name__ == "__main__":
    main()
