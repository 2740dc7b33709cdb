"""The curve of an LTE model over its threshold: what quality, sparsity and bytes each threshold gave on which text.

One threshold holds for all layers, tokens and texts of a deployment. `lte.calibrate_curve_` measures some of them and
`lte calibrate` writes the result into the folder's config; from there a threshold for another sparsity is picked
without training, by `set_sparsity_` or `from_pretrained(folder, target_sparsity=0.6)`. This module loads no torch.

Shapes: L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal, get_args

from lte.config import LteConfig, check_choice, check_fraction

Hold = Literal["mean", "each"]
"""Over several texts: whether their mean meets a target, or each of them does."""

CURVE_VERSION = 1
TOLERANCE = 5e-4
"""Of the sparsity: a measured point so near to a target meets it."""
# sigmoid(30) is the last that differs from 1 by many float64 steps.
LARGEST_LOGIT = 30.0
# A config asks for less than all: a quality may be met with every expert off.
MOST = 1 - 1e-4


@dataclass(frozen=True, kw_only=True)
class SparsityGoal:
    """What a threshold is chosen by: one of the first two, or none.

    `mean` keeps the average over a mix of texts and is what sparsities of models are usually about; kinds of text on
    which the model skips less are then below the target. `each` promises it on every kind, and so skips more, and loses
    more quality, on all the others.

    Attributes:
        target_sparsity: share of FFN neurons to skip, in [0, 1).
        max_perplexity_ratio: perplexity over that of the dense model; the sparsest threshold within it is chosen.
        hold: whether the `mean` over texts meets it, or `each` text does.

    Raises:
        ValueError: if both are given, or a value is out of range.
    """

    target_sparsity: float | None = None
    max_perplexity_ratio: float | None = None
    hold: Hold = "mean"

    def __post_init__(self) -> None:
        _checked_hold(self.hold)
        if self.target_sparsity is not None and self.max_perplexity_ratio is not None:
            raise ValueError(
                "target_sparsity and max_perplexity_ratio must not both be given, got "
                f"target_sparsity={self.target_sparsity} and max_perplexity_ratio={self.max_perplexity_ratio}; leave "
                "one out"
            )
        if self.target_sparsity is not None:
            check_fraction("target_sparsity", self.target_sparsity)
        if self.max_perplexity_ratio is not None:
            check_ratio(self.max_perplexity_ratio)

    @property
    def is_set(self) -> bool:
        """Whether there is anything to choose by."""
        return self.target_sparsity is not None or self.max_perplexity_ratio is not None


@dataclass(frozen=True, kw_only=True)
class TextPoint:
    """What one text gave at one threshold, in hard mode.

    Attributes:
        sparsity: share of FFN neurons not computed, mean over tokens and layers.
        nll_per_token: mean negative log likelihood of the predicted tokens, in nats.
        bytes_per_token: of weights that one token reads at batch size 1, see `lte.eval.cost.Cost`.
    """

    sparsity: float
    nll_per_token: float
    bytes_per_token: float

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood per token."""
        return _exp(self.nll_per_token)


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One threshold, measured on every text or, between two that were, interpolated.

    Attributes:
        threshold: tau, of all layers.
        texts: what each text gave, by its name.
        layer_sparsity: share of FFN neurons not computed by layer, mean over texts, [L].
        ms_per_token: time of a decoded token by `generate` at batch size 1; `None` if it was not measured.
    """

    threshold: float
    texts: dict[str, TextPoint]
    layer_sparsity: list[float]
    ms_per_token: float | None = None

    @property
    def logit(self) -> float:
        """The threshold of the routers' logits."""
        return logit(self.threshold)

    @property
    def sparsity(self) -> float:
        """Mean over texts, which count the same however long they are."""
        return fmean(text.sparsity for text in self.texts.values())

    @property
    def nll_per_token(self) -> float:
        """Mean over texts."""
        return fmean(text.nll_per_token for text in self.texts.values())

    @property
    def perplexity(self) -> float:
        """Geometric mean over texts."""
        return _exp(self.nll_per_token)

    @property
    def bytes_per_token(self) -> float:
        """Mean over texts."""
        return fmean(text.bytes_per_token for text in self.texts.values())

    def held_sparsity(self, hold: Hold) -> float:
        """What must meet a target: the mean over texts, or the lowest sparsity of any text."""
        return self.sparsity if hold == "mean" else min(text.sparsity for text in self.texts.values())


@dataclass(frozen=True, kw_only=True)
class DenseReference:
    """The dense model on the same texts.

    Attributes:
        model: its name.
        nll_per_token: by text, in nats.
        bytes_per_token: of weights that one token reads.
        ms_per_token: as in `CurvePoint`.
    """

    model: str
    nll_per_token: dict[str, float]
    bytes_per_token: float
    ms_per_token: float | None = None

    @property
    def perplexity(self) -> float:
        """Geometric mean over texts."""
        return _exp(fmean(self.nll_per_token.values()))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The point that a model runs at, and what was asked for.

    Attributes:
        asked: `{"target_sparsity": 0.6}` or `{"max_perplexity_ratio": 1.05}`.
        hold: whether the mean over texts or each text meets that.
        point: what results from it.
        interpolated: whether the point lies between two that were measured, and was not itself.
    """

    asked: dict[str, float]
    hold: Hold
    point: CurvePoint
    interpolated: bool

    @property
    def target_sparsity(self) -> float:
        """The sparsity that was asked for, or that the best point within the asked quality has."""
        return self.asked.get("target_sparsity", self.point.held_sparsity(self.hold))

    @property
    def misses(self) -> dict[str, float]:
        """By how much the sparsity of each text is above (or, negative, below) the target."""
        return {name: text.sparsity - self.target_sparsity for name, text in self.point.texts.items()}


@dataclass(frozen=True, kw_only=True)
class SparsityCurve:
    """What was measured over the threshold of a model.

    Attributes:
        points: by rising threshold.
        tokens: how many tokens of each text were counted, by its name.
        hold: how a target that is picked later is met, unless said otherwise.
        dense: the dense model on these texts; `None` if there was none to measure.
        settings: what the numbers depend on: dtype, kernels, device, versions.
        chosen: where the model runs now; `None` where it was left as trained.
    """

    points: list[CurvePoint]
    tokens: dict[str, int]
    hold: Hold = "mean"
    dense: DenseReference | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    chosen: Choice | None = None

    def perplexity_ratio(self, point: CurvePoint, hold: Hold = "mean") -> float | None:
        """Perplexity over that of the dense model, geometric mean over texts or the largest; `None` without one."""
        if self.dense is None:
            return None
        differences = [text.nll_per_token - self.dense.nll_per_token[name] for name, text in point.texts.items()]
        return _exp(fmean(differences) if hold == "mean" else max(differences))

    def at_target(self, target_sparsity: float, hold: Hold | None = None) -> Choice:
        """The point with a sparsity, between two measured ones if it is none of them.

        Args:
            target_sparsity: of the mean over texts, or that each text shall have at least.
            hold: which of the two; `None` takes the curve's own.

        Raises:
            ValueError: if the curve does not reach it.
        """
        if isinstance(target_sparsity, bool) or not isinstance(target_sparsity, int | float):
            raise ValueError(f"target_sparsity must be a number, got target_sparsity={target_sparsity!r}")
        check_fraction("target_sparsity", target_sparsity)
        hold = _checked_hold(self.hold if hold is None else hold)
        reached = [point.held_sparsity(hold) for point in self.points]
        asked = {"target_sparsity": float(target_sparsity)}
        nearest = min(self.points, key=lambda point: abs(point.held_sparsity(hold) - target_sparsity))
        if abs(nearest.held_sparsity(hold) - target_sparsity) <= TOLERANCE:
            return Choice(asked=asked, hold=hold, point=nearest, interpolated=False)
        for (low, high), (before, after) in zip(pairwise(self.points), pairwise(reached), strict=True):
            if min(before, after) < target_sparsity < max(before, after):
                share = (target_sparsity - before) / (after - before)
                return Choice(asked=asked, hold=hold, point=_between(low, high, share), interpolated=True)
        text = "" if hold == "mean" else " on the text with the least"
        raise ValueError(
            f"target_sparsity must lie on the curve that the model remembers, from {min(reached):.3f} to "
            f"{max(reached):.3f}{text}, got target_sparsity={target_sparsity}; `lte calibrate` measures it further"
        )

    def within_ratio(self, max_perplexity_ratio: float, hold: Hold | None = None) -> Choice:
        """The sparsest measured point whose perplexity is at most so many times that of the dense model.

        Args:
            max_perplexity_ratio: of the geometric mean over texts, or of each text.
            hold: which of the two; `None` takes the curve's own.

        Raises:
            ValueError: if there is no dense model to compare with, or no point within.
        """
        hold = _checked_hold(self.hold if hold is None else hold)
        check_ratio(max_perplexity_ratio)
        found = [(self.perplexity_ratio(point, hold), point) for point in self.points]
        within = [point for ratio, point in found if ratio is not None and ratio <= max_perplexity_ratio]
        if self.dense is None:
            raise ValueError(
                "max_perplexity_ratio must have a dense model to compare with, got a curve without one; give the model "
                "that this one was made from (--dense MODEL, dense=)"
            )
        if not within:
            least = min(ratio for ratio, _ in found if ratio is not None)
            raise ValueError(
                f"max_perplexity_ratio must be at least {least:.4f}, the best of the curve, got "
                f"max_perplexity_ratio={max_perplexity_ratio}; train the model further, or allow more"
            )
        asked = {"max_perplexity_ratio": float(max_perplexity_ratio)}
        best = max(within, key=lambda point: point.held_sparsity(hold))
        return Choice(asked=asked, hold=hold, point=best, interpolated=False)

    def with_settings(self, **settings: Any) -> SparsityCurve:
        """The curve with `settings`."""
        return replace(self, settings=settings)

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready, with the format's version: what `config.lte_curve` holds."""
        return {"version": CURVE_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Any) -> SparsityCurve:
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: if a newer lte wrote it, or fields are missing or wrong.
        """
        version = data.get("version") if isinstance(data, Mapping) else None
        if isinstance(version, int) and version > CURVE_VERSION:
            raise ValueError(
                f"lte_curve was written by a newer lte: it has version={version}, this lte reads up to "
                f"{CURVE_VERSION}; install that newer lte, or measure the curve again with `lte calibrate`"
            )
        values = _read(cls, "lte_curve", data)
        points = _list("lte_curve.points", values["points"], _point)
        dense, chosen = values.get("dense"), values.get("chosen")
        curve = cls(
            points=points,
            tokens={name: int(_number("lte_curve.tokens", n)) for name, n in _map("tokens", values["tokens"]).items()},
            hold=_checked_hold(values.get("hold", "mean")),
            dense=None if dense is None else _dense(dense),
            settings=dict(_map("settings", values.get("settings", {}))),
            chosen=None if chosen is None else _choice(chosen),
        )
        names = [set(point.texts) for point in points]
        names += [] if curve.dense is None else [set(curve.dense.nll_per_token)]
        rising = all(low.threshold < high.threshold for low, high in pairwise(points))
        if not points or not rising or not curve.tokens or any(each != set(curve.tokens) for each in names):
            raise ValueError(
                "lte_curve must hold points of rising thresholds, each with all texts, got others; measure it again "
                "with `lte calibrate`"
            )
        return curve


def curve_of(config: Any, *, why: str = "target_sparsity") -> SparsityCurve:
    """The curve that a model's config remembers.

    Args:
        config: of a model, or what its `config.json` holds.
        why: what needs it, for the message.

    Raises:
        ValueError: for a dense model, one of another method, or one without a curve.
    """
    read = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    settings = read("lte")
    if not isinstance(settings, Mapping) or settings.get("name", LteConfig.name) != LteConfig.name:
        name = settings.get("name") if isinstance(settings, Mapping) else None
        kind = "a dense one" if name is None else f"one of the method {name}"
        raise ValueError(f"{why} must be given with an LTE model, whose threshold it moves, got {kind}; leave it out")
    found = read("lte_curve")
    if found is None:
        raise ValueError(
            f"{why} must be given with a model that remembers its curve over the threshold, got one without; measure "
            "it once: `lte calibrate FOLDER --texts FILE`"
        )
    return SparsityCurve.from_dict(found)


def chosen_settings(config: Any, curve: SparsityCurve, choice: Choice) -> dict[str, Any]:
    """What the config of a model holds once it runs at a choice: `lte`, `lte_curve` and `lte_measurement`.

    Args:
        config: as for `curve_of`.
        curve: the model's.
        choice: from `curve.at_target` or `curve.within_ratio`.
    """
    read = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    point, names = choice.point, list(curve.tokens)
    before = (read("lte_measurement") or {}).get("model")
    measured = {
        "sparsity": point.sparsity,
        "tokens": sum(curve.tokens.values()),
        "split": "calibration",
        "data": {"source": names},
        "active_fraction": [1 - share for share in point.layer_sparsity],
        "interpolated": choice.interpolated,
        "metric": "perplexity",
        "value": point.perplexity,
        **({} if before is None else {"model": before}),
    }
    own = {**(read("lte") or {}), "threshold": point.threshold, "target_sparsity": min(choice.target_sparsity, MOST)}
    return {"lte": own, "lte_curve": replace(curve, chosen=choice).to_dict(), "lte_measurement": measured}


def readable_curve(found: Any) -> SparsityCurve | None:
    """What `lte_curve` holds, for reports: `None` where there is nothing, or nothing that this lte can read."""
    try:
        return None if found is None else SparsityCurve.from_dict(found)
    except ValueError:
        return None


def choice_record(config: Any) -> dict[str, Any] | None:
    """What reports say of the point that was picked from a model's curve; `None` where none was.

    Args:
        config: as for `curve_of`.
    """
    curve = readable_curve(getattr(config, "lte_curve", None))
    if curve is None or curve.chosen is None:
        return None
    chosen, point = curve.chosen, curve.chosen.point
    return {
        "asked": chosen.asked,
        "hold": chosen.hold,
        "threshold": point.threshold,
        "interpolated": chosen.interpolated,
        "sparsity": point.sparsity,
        "text_sparsity": {name: text.sparsity for name, text in point.texts.items()},
        "perplexity_ratio": curve.perplexity_ratio(point),
    }


def describe_choice(config: Any) -> str | None:
    """A sentence on the point that was picked from a model's curve; `None` where none was."""
    found = choice_record(config)
    if found is None:
        return None
    ((what, value),) = found["asked"].items()
    how = "interpolated on" if found["interpolated"] else "a measured point of"
    quality = found["perplexity_ratio"]
    ratio = "" if quality is None else f", {quality:.4f} of the dense model's perplexity"
    texts = "each text" if found["hold"] == "each" else "the mean of the texts"
    return (
        f"Threshold {found['threshold']:.4g} for {what.replace('_', '-')} {value:g} on {texts}, {how} the model's "
        f"curve: {100 * found['sparsity']:.1f}% sparsity{ratio} on its calibration texts."
    )


def logit(threshold: float) -> float:
    """The threshold of logits that is tau of scores."""
    return math.log(threshold / (1 - threshold))


def threshold_of(value: float) -> float:
    """tau for a threshold of logits, within what float64 can tell from 0 and 1."""
    return 1 / (1 + math.exp(-max(-LARGEST_LOGIT, min(LARGEST_LOGIT, value))))


def check_ratio(max_perplexity_ratio: float) -> None:
    """Raises a `ValueError` for a ratio of perplexities that no curve is about."""
    if not (math.isfinite(max_perplexity_ratio) and max_perplexity_ratio > 0):
        raise ValueError(
            f"max_perplexity_ratio must be a positive number, 1.05 for 5% more than dense, got "
            f"max_perplexity_ratio={max_perplexity_ratio}"
        )


def _between(low: CurvePoint, high: CurvePoint, share: float) -> CurvePoint:
    """The point that lies so far on the way from one to the next; thresholds are interpolated as logits."""

    def mix(one: float, other: float) -> float:
        return one + share * (other - one)

    names = [each.name for each in fields(TextPoint)]
    texts = {
        name: TextPoint(**{each: mix(getattr(text, each), getattr(high.texts[name], each)) for each in names})
        for name, text in low.texts.items()
    }
    timed = low.ms_per_token is not None and high.ms_per_token is not None
    return CurvePoint(
        threshold=threshold_of(mix(low.logit, high.logit)),
        texts=texts,
        layer_sparsity=[mix(*pair) for pair in zip(low.layer_sparsity, high.layer_sparsity, strict=True)],
        ms_per_token=mix(low.ms_per_token, high.ms_per_token) if timed else None,  # type: ignore[arg-type]
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _checked_hold(hold: Any) -> Hold:
    check_choice("hold", hold, get_args(Hold))
    return hold


def _read(cls: type, where: str, data: Any) -> dict[str, Any]:
    """The fields of a dataclass in `data`, at least those without a default; what a later version added is left out."""
    known = {each.name for each in fields(cls)}
    needed = {each.name for each in fields(cls) if each.default is MISSING and each.default_factory is MISSING}
    if not isinstance(data, Mapping) or not needed <= set(data):
        got = ", ".join(sorted(map(str, data))) if isinstance(data, Mapping) else repr(data)[:40]
        raise ValueError(
            f"{where} must hold the fields {', '.join(sorted(needed))}, got {got}; measure it again with "
            "`lte calibrate`"
        )
    return {name: value for name, value in data.items() if name in known}


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value!r}; measure it again with `lte calibrate`")
    return value


def _map(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"lte_curve.{where} must hold fields, got {str(value)[:40]}")
    return value


def _list(where: str, value: Any, read: Callable[[Any], Any]) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list, got {str(value)[:40]}; measure it again with `lte calibrate`")
    return [read(each) for each in value]


def _time(where: str, values: Mapping[str, Any]) -> float | None:
    found = values.get("ms_per_token")
    return None if found is None else _number(f"{where}.ms_per_token", found)


def _point(data: Any) -> CurvePoint:
    where = "lte_curve.points"
    values = _read(CurvePoint, where, data)
    threshold = _number(f"{where}.threshold", values["threshold"])
    if not 0 < threshold < 1:
        raise ValueError(f"{where}.threshold must lie in (0, 1), got threshold={threshold}")
    texts = {
        name: TextPoint(**{key: _number(f"{where}.{key}", v) for key, v in _read(TextPoint, where, text).items()})
        for name, text in _map("points.texts", values["texts"]).items()
    }
    if not texts:
        raise ValueError(f"{where}.texts must hold a text, got none; measure it again with `lte calibrate`")
    layers = _list(f"{where}.layer_sparsity", values["layer_sparsity"], lambda v: _number(f"{where}.layer_sparsity", v))
    return CurvePoint(threshold=threshold, texts=texts, layer_sparsity=layers, ms_per_token=_time(where, values))


def _dense(data: Any) -> DenseReference:
    where = "lte_curve.dense"
    values = _read(DenseReference, where, data)
    return DenseReference(
        model=str(values["model"]),
        nll_per_token={
            name: _number(f"{where}.nll_per_token", value)
            for name, value in _map("dense.nll_per_token", values["nll_per_token"]).items()
        },
        bytes_per_token=_number(f"{where}.bytes_per_token", values["bytes_per_token"]),
        ms_per_token=_time(where, values),
    )


def _choice(data: Any) -> Choice:
    where = "lte_curve.chosen"
    values = _read(Choice, where, data)
    asked = {name: _number(f"{where}.asked", value) for name, value in _map("chosen.asked", values["asked"]).items()}
    if len(asked) != 1 or not set(asked) <= {"target_sparsity", "max_perplexity_ratio"}:
        raise ValueError(f"{where}.asked must be target_sparsity or max_perplexity_ratio, got {asked}")
    return Choice(
        asked=asked,
        hold=_checked_hold(values["hold"]),
        point=_point(values["point"]),
        interpolated=bool(values["interpolated"]),
    )
