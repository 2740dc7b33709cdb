"""Metrics of classifications and generated texts, each computed by the library that the field takes for it.

They are imported where they are used: `check_metrics` names the packages that are missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from lte.config import check_choice

Numbers = Sequence[float]
References = Sequence[Sequence[str]]

# What each package is called where it is installed from.
PACKAGES = {
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "rouge_score": "rouge-score",
    "sacrebleu": "sacrebleu",
    "nltk": "nltk",
}


def _sklearn(name: str, **options: Any) -> Callable[[Numbers, Numbers], float]:
    """A score of scikit-learn, of predictions and labels."""

    def score(predictions: Numbers, labels: Numbers) -> float:
        from sklearn import metrics

        return float(getattr(metrics, name)(labels, predictions, **options))

    return score


def _correlation(name: str) -> Callable[[Numbers, Numbers], float]:
    """A correlation of scipy in [-1, 1]; NaN where predictions are all the same."""

    def score(predictions: Numbers, labels: Numbers) -> float:
        from scipy import stats

        return float(getattr(stats, name)(predictions, labels).statistic)

    return score


def rouge(kind: str) -> Callable[[Sequence[str], References], float]:
    """Mean F-measure in [0, 1] of a kind of ROUGE with Porter's stemmer, each text against its best reference."""

    def score(predictions: Sequence[str], references: References) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=True)
        pairs = zip(references, predictions, strict=True)
        scores = [scorer.score_multi(list(texts), text)[kind].fmeasure for texts, text in pairs]
        return float(sum(scores) / len(scores))

    return score


def bleu(predictions: Sequence[str], references: References) -> float:
    """BLEU of the whole set in [0, 100] with all references, as sacrebleu's defaults have it (13a, cased)."""
    import sacrebleu

    # One stream per place in the lists of references, `None` where a list is shorter.
    streams = [list(stream) for stream in zip_longest(*references)]
    return float(sacrebleu.corpus_bleu(list(predictions), streams).score)


def nist(predictions: Sequence[str], references: References) -> float:
    """NIST of n-grams up to 5 of the whole set with all references, on sacrebleu's 13a tokens; at least 0."""
    from nltk.translate.nist_score import corpus_nist
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    answers = [tokenize(text).split() for text in predictions]
    wanted = [[tokenize(text).split() for text in texts] for texts in references]
    # nltk divides by the number of n-grams of all answers.
    longest = max(map(len, answers))
    return float(corpus_nist(wanted, answers, n=min(5, longest))) if longest else 0.0


METRICS: dict[str, tuple[Callable[[Any, Any], float], tuple[str, ...]]] = {
    "accuracy": (_sklearn("accuracy_score"), ("sklearn",)),
    # Of the label 1; 0 where neither precision nor recall is defined.
    "f1": (_sklearn("f1_score", zero_division=0.0), ("sklearn",)),
    # In [-1, 1]; 0 where predictions are all the same.
    "matthews": (_sklearn("matthews_corrcoef"), ("sklearn",)),
    "pearson": (_correlation("pearsonr"), ("scipy",)),
    "spearman": (_correlation("spearmanr"), ("scipy",)),
    "rougeL": (rouge("rougeL"), ("rouge_score",)),
    "rouge1": (rouge("rouge1"), ("rouge_score",)),
    "rouge2": (rouge("rouge2"), ("rouge_score",)),
    "bleu": (bleu, ("sacrebleu",)),
    "nist": (nist, ("nltk", "sacrebleu")),
}
"""Each metric, and the modules that it needs."""


def check_metrics(names: Sequence[str]) -> None:
    """Refuses metrics whose libraries are not installed, before anything is computed.

    Raises:
        ValueError: for an unknown metric, or one that lacks its library.
    """
    for name in names:
        check_choice("metric", name, METRICS)
        missing = [PACKAGES[module] for module in METRICS[name][1] if importlib.util.find_spec(module) is None]
        if missing:
            raise ValueError(
                f"{', '.join(missing)} must be installed for the metric {name}, got none; "
                f"pip install {' '.join(missing)}"
            )


def compute_metrics(names: Sequence[str], predictions: Sequence[Any], wanted: Sequence[Any]) -> dict[str, float]:
    """Metrics by name.

    Args:
        names: keys of `METRICS`.
        predictions: labels, numbers, or texts.
        wanted: the true labels or numbers, or the references of each text.

    Raises:
        ValueError: as `check_metrics`, and for lists of different lengths or empty ones.
    """
    check_metrics(names)
    if not predictions or len(predictions) != len(wanted):
        raise ValueError(
            f"predictions must be as many as what is wanted, and at least 1, got {len(predictions)} predictions for "
            f"{len(wanted)}"
        )
    return {name: METRICS[name][0](predictions, wanted) for name in names}
