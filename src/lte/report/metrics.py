"""What a metric's name says: which way is better, and which drop is a small one."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Metric:
    """A metric as tables and figures treat it; a drop by `small_drop`, in its unit, still counts as no loss."""

    name: str
    higher_is_better: bool
    small_drop: float = 0.01
    decimals: int = 4

    def drop(self, value: float, dense: float) -> float:
        """How much worse than `dense` a value is; negative where it is better."""
        return dense - value if self.higher_is_better else value - dense

    def format(self, value: float) -> str:
        """A value with the metric's decimals."""
        return f"{value:.{self.decimals}f}"


_SHARES = ("accuracy", "acc", "f1", "matthews", "mcc", "pearson", "spearman", "exact_match", "em", "mc1", "mc2")
_METRICS = {
    **{name: Metric(name, True) for name in _SHARES},
    # 0.05 ROUGE-L and 0.5 perplexity are the drops of the paper's Table 1.
    **{name: Metric(name, True, 0.05) for name in ("rouge", "rougeL", "rougeLsum", "rouge1", "rouge2", "meteor")},
    "bleu": Metric("bleu", True, 1.0, 2),
    "chrf": Metric("chrf", True, 1.0, 2),
    "nist": Metric("nist", True, 0.1, 3),
    "cider": Metric("cider", True, 0.05, 3),
    **{name: Metric(name, False, 0.5, 2) for name in ("perplexity", "word_perplexity", "byte_perplexity")},
    **{name: Metric(name, False) for name in ("loss", "bits_per_byte")},
}


def metric_named(name: str, higher: Collection[str] = (), lower: Collection[str] = ()) -> Metric:
    """The metric of a name: declared, known, or a known one with a suffix (`acc_norm`, `exact_match,strict-match`).

    Args:
        name: as the records have it.
        higher: names that are declared here as better the higher.
        lower: names that are declared here as better the lower.

    Raises:
        ValueError: for a name that nothing is known of, or that is declared both ways.
    """
    if name in higher and name in lower:
        raise ValueError(f"metric must be better one way, got metric={name} as both; declare it once")
    stem = _known_stem(name)
    if name in higher or name in lower:
        known = _METRICS[stem] if stem is not None else Metric(name, True)
        return replace(known, name=name, higher_is_better=name in higher)
    if stem is None:
        near = difflib.get_close_matches(name, _METRICS, n=2)
        hint = f"did you mean {' or '.join(near)}? Else declare" if near else "declare"
        raise ValueError(
            f"metric must be known as better the higher or the lower, got metric={name}; {hint} it with "
            f"--higher {name} or --lower {name}"
        )
    return replace(_METRICS[stem], name=name)


def _known_stem(name: str) -> str | None:
    """The longest known metric that a name begins with; a standard error is none."""
    if name.endswith("_stderr"):
        return None
    stems = [stem for stem in _METRICS if name == stem or name.startswith((f"{stem}_", f"{stem},"))]
    return max(stems, key=len, default=None)
