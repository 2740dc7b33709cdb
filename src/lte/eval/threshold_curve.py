"""Quality, sparsity, bytes and time of a trained LTE model over its one threshold, and the threshold that meets a goal.

The first thresholds come from one pass that looks at all logits of the routers; each is then measured in hard mode, as
a moved threshold changes what later layers see. Towards a goal further ones are tried between those around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from lte.config import check_fraction
from lte.data.batches import Batch, as_batches
from lte.eval.cost import measured_cost, method_name
from lte.eval.generation import GREEDY
from lte.eval.inference import hard_inference, model_device
from lte.eval.perplexity import evaluate_model
from lte.eval.speed import TokenClock, interleaved_token_s
from lte.hf.inputs import check_tokens, unwrapped
from lte.hf.install import sparse_ffns
from lte.hf.sparsity_curve import (
    LARGEST_LOGIT,
    TOLERANCE,
    Choice,
    CurvePoint,
    DenseReference,
    SparsityCurve,
    SparsityGoal,
    TextPoint,
    logit,
    threshold_of,
)
from lte.hf.threshold import set_threshold_, take_choice_
from lte.methods.lte import logit_quantile, logit_shares, lowest_logit

SPARSITIES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Where a curve is measured, about: closer where few scores lie, as what is between is interpolated."""
MAX_TOKENS = 16384
# On a CPU a model of a billion parameters writes some ten tokens a second: a dozen thresholds in turn take minutes.
TIMED_TEXTS, PROMPT_TOKENS, NEW_TOKENS = 3, 64, 16
# Of a sparsity where to measure: a point so near does for it.
NEAR = 0.005
# A sparsity may miss its target by this where a threshold moves many scores at once.
MISS = 0.02
# Further thresholds that a goal may take.
TRIES = 8

Texts = Mapping[str, Any]


def calibrate_curve_(
    model: nn.Module,
    texts: Texts,
    *,
    tokenizer: Any = None,
    goal: SparsityGoal | None = None,
    dense: nn.Module | None = None,
    sparsities: Iterable[float] = SPARSITIES,
    max_tokens: int | None = MAX_TOKENS,
    batch_size: int = 8,
) -> SparsityCurve:
    """Measures a trained LTE model over its threshold, has its config remember that, and meets a goal by the threshold.

    Weights, routers and their biases stay as they are: one threshold for all layers moves, unlike in `lte.calibrate_`.
    `save_pretrained` saves the curve, and `from_pretrained(folder, target_sparsity=0.6)` or `lte.set_sparsity_` pick
    other points of it later, without data.

    Args:
        model: an LTE model that predicts the next token.
        texts: of each kind of text, by a name for it, what `lte.measure_sparsity` takes: a list of texts, rows, or
            batches with `labels`. Each kind counts the same, however long it is.
        tokenizer: for texts.
        goal: what the threshold shall meet; `None` leaves it where it is.
        dense: the model that this one was made from, for the ratio of perplexities.
        sparsities: where to measure, about; where the model is now is measured in any case.
        max_tokens: of each kind, about; `None` takes all.
        batch_size: rows per pass.

    Returns:
        The curve. Its `chosen` is what the goal gave.

    Raises:
        ValueError: for a model of another kind, no texts, sparsities outside of [0, 1), or a ratio that no threshold
            meets, or without `dense`; the curve is remembered all the same if it was measured.
    """
    goal = goal or SparsityGoal()
    check_calibrated(model, goal, dense)
    rows = {
        name: list(as_batches(data, unwrapped(model), batch_size, tokenizer=tokenizer, max_tokens=max_tokens))
        for name, data in texts.items()
    }
    return remember_(model, measure_curve(model, rows, goal=goal, dense=dense, sparsities=sparsities), goal)


def check_calibrated(model: nn.Module, goal: SparsityGoal, dense: nn.Module | None) -> None:
    """Refuses what has no curve, before anything runs.

    Raises:
        ValueError: for a dense model, one of another method, or a goal that lacks the dense model.
    """
    if not sparse_ffns(model):
        name = method_name(unwrapped(model))
        got = "a dense one" if name == "dense" else f"one of the method {name}"
        raise ValueError(f"model must be an LTE model, whose threshold can be moved, got {got}")
    if goal.max_perplexity_ratio is not None and dense is None:
        raise ValueError(
            "max_perplexity_ratio must have a dense model to compare with, got dense=None; give the model that this "
            "one was made from"
        )


def remember_(model: nn.Module, curve: SparsityCurve, goal: SparsityGoal) -> SparsityCurve:
    """Has a model's config remember its curve, and runs the model at what was chosen by the goal, in place.

    Returns:
        The curve.

    Raises:
        ValueError: if no threshold meets the goal; the curve is remembered.
    """
    if curve.chosen is not None:
        take_choice_(model, curve, curve.chosen)
    else:
        unwrapped(model).config.lte_curve = curve.to_dict()
        raise_missed(curve, goal)
    return curve


def raise_missed(curve: SparsityCurve, goal: SparsityGoal) -> None:
    """Says what can be had where a goal was set and no threshold met it.

    Raises:
        ValueError: if so.
    """
    if curve.chosen is not None or not goal.is_set:
        return
    if goal.max_perplexity_ratio is not None:
        curve.within_ratio(goal.max_perplexity_ratio)
        return
    reached = [point.held_sparsity(goal.hold) for point in curve.points]
    raise ValueError(
        f"target_sparsity must be what some threshold of the model gives, from {min(reached):.3f} to "
        f"{max(reached):.3f} on these texts, got target_sparsity={goal.target_sparsity}"
    )


def measure_curve(
    model: nn.Module,
    batches: Mapping[str, list[Batch]],
    *,
    goal: SparsityGoal | None = None,
    dense: nn.Module | None = None,
    sparsities: Iterable[float] = SPARSITIES,
    say: Callable[[str], None] = lambda line: None,
) -> SparsityCurve:
    """Measures what `calibrate_curve_` does, and leaves the model as it was.

    Args:
        model: an LTE model that predicts the next token.
        batches: of each kind of text, by its name: `input_ids`, `labels` and optionally `attention_mask`, [B, T].
        goal: for which further thresholds are tried.
        dense: the dense model.
        sparsities: where to measure, about.
        say: gets a line for each threshold.

    Returns:
        The curve, without times; `chosen` is `None` if no threshold met the goal.

    Raises:
        ValueError: for no texts, texts without tokens, or sparsities outside of [0, 1).
    """
    levels, goal = sorted(set(sparsities)), goal or SparsityGoal()
    for level in levels:
        check_fraction("sparsities", level)
    if not batches or not all(batches.values()):
        empty = ", ".join(name for name, rows in batches.items() if not rows)
        raise ValueError(
            f"texts must hold at least one text with tokens, got {f'none in {empty}' if empty else 'none'}"
        )
    reference = None if dense is None else _dense_reference(dense, batches)
    before = _threshold(model)
    sweep = _Sweep(model, batches, say)
    try:
        sweep.run(levels, before)
        points = sweep.points()
        curve = SparsityCurve(points=points, tokens=sweep.tokens, hold=goal.hold, dense=reference)
        best = sweep.seek(curve, goal)
    finally:
        set_threshold_(model, before)
    if best is None:
        return curve
    name = "max_perplexity_ratio" if goal.target_sparsity is None else "target_sparsity"
    asked = {name: float(getattr(goal, name))}
    points = sorted({point.threshold: point for point in [*points, best]}.values(), key=lambda p: p.threshold)
    choice = Choice(asked=asked, hold=goal.hold, point=best, interpolated=False)
    return replace(curve, points=points, chosen=choice)


def _threshold(model: Any) -> float:
    """Where the model is: by its config, or where it was moved by hand, by the logit, whose last bit may differ."""
    written = float(unwrapped(model).config.lte["threshold"])
    now = next(iter(sparse_ffns(model).values())).threshold_logit
    return written if abs(now - logit(written)) < 1e-5 else threshold_of(now)


def _dense_reference(dense: Any, batches: Mapping[str, list[Batch]]) -> DenseReference:
    losses = {}
    for name, rows in batches.items():
        for batch in rows:
            check_tokens(dense, batch["input_ids"])
        losses[name] = evaluate_model(dense, rows, progress=False)[0].nll_per_token
    name = getattr(dense.config, "_name_or_path", "") or type(dense).__name__
    return DenseReference(
        model=str(name), nll_per_token=losses, bytes_per_token=measured_cost(dense, None).bytes_per_token
    )


class _Sweep:
    """Measures a model at one threshold after another, and keeps what it found.

    Attributes:
        tokens: how many tokens of each text were counted.
    """

    def __init__(self, model: nn.Module, batches: Mapping[str, list[Batch]], say: Callable[[str], None]):
        self.model, self.batches, self.say = model, batches, say
        self.tokens: dict[str, int] = {}
        self._found: dict[float, CurvePoint] = {}

    def points(self) -> list[CurvePoint]:
        """All so far, by rising threshold."""
        return [self._found[threshold] for threshold in sorted(self._found)]

    def at(self, threshold: float) -> CurvePoint:
        """The point of a threshold."""
        if threshold not in self._found:
            self._found[threshold] = self._measure(threshold)
            point = self._found[threshold]
            self.say(
                f"threshold {threshold:.6g}: sparsity {100 * point.sparsity:.2f}%, perplexity {point.perplexity:.4g}"
            )
        return self._found[threshold]

    def _measure(self, threshold: float) -> CurvePoint:
        set_threshold_(self.model, threshold)
        texts, layers = {}, []
        for name, rows in self.batches.items():
            quality, measured = evaluate_model(self.model, rows, progress=False)
            assert measured is not None
            self.tokens[name] = measured.tokens
            layers.append(measured.layer_sparsity)
            texts[name] = TextPoint(
                sparsity=measured.sparsity,
                nll_per_token=quality.nll_per_token,
                bytes_per_token=measured_cost(self.model, measured).bytes_per_token,
            )
        mean = [round(fmean(shares), 4) for shares in zip(*layers, strict=True)]
        return CurvePoint(threshold=threshold, texts=texts, layer_sparsity=mean)

    def run(self, levels: list[float], current: float) -> None:
        """Measures the `current` threshold, and others that give about the sparsities `levels`."""
        here = self.at(current).sparsity
        ffns = sparse_ffns(self.model)
        device = model_device(self.model)
        found = [
            logit_shares(self.model, ffns, [{k: v.to(device) for k, v in batch.items()} for batch in rows])[0]
            for rows in self.batches.values()
        ]
        shares = torch.stack(found).mean(0)
        # Of a routed share of the experts, so that no threshold lies far above all of their scores.
        routed = 1 - fmean(ffn.router.always_on / ffn.num_experts for ffn in ffns.values()) - 1e-6
        above, below = [s for s in levels if s >= here], [s for s in reversed(levels) if s < here]
        for side in (above, below):
            missed = 0.0
            for level in side:
                if level == 0:
                    self._all_on(logit(current) + lowest_logit(shares))
                    continue
                if any(abs(point.sparsity - level) < NEAR for point in self._found.values()):
                    continue
                # What later layers made of the threshold before this one holds about for this one, too.
                share = min(max(level + missed, 0.0), routed)
                moved = logit(current) + logit_quantile(shares, share)
                missed += level - self.at(threshold_of(moved)).sparsity

    def _all_on(self, lowest: float) -> None:
        """Measures a threshold below all scores and near them: what lies between two points is interpolated.

        With all experts on, later layers may score lower than the `lowest` did before.
        """
        for logit_of_all in (lowest, lowest - 0.5, lowest - 2, -LARGEST_LOGIT):
            threshold = threshold_of(logit_of_all)
            if self.at(threshold).sparsity == 0:
                return
            del self._found[threshold]

    def seek(self, curve: SparsityCurve, goal: SparsityGoal) -> CurvePoint | None:
        """The measured point that meets a goal, after further tries; `None` without a goal, or if none does."""
        if goal.target_sparsity is not None:
            target = goal.target_sparsity
            found = self._near(lambda point: point.held_sparsity(goal.hold), target, (-TOLERANCE, TOLERANCE))
            best = min(found, key=lambda point: abs(point.held_sparsity(goal.hold) - target))
            return best if abs(best.held_sparsity(goal.hold) - target) <= MISS else None
        if goal.max_perplexity_ratio is None:
            return None

        def loss(point: CurvePoint) -> float:
            ratio = curve.perplexity_ratio(point, goal.hold)
            assert ratio is not None
            return math.log(ratio) if ratio < math.inf else math.inf

        wanted = math.log(goal.max_perplexity_ratio)
        found = [point for point in self._near(loss, wanted, (-TOLERANCE, 0.0)) if loss(point) <= wanted]
        return max(found, key=lambda point: point.held_sparsity(goal.hold), default=None)

    def _near(
        self, value: Callable[[CurvePoint], float], wanted: float, within: tuple[float, float]
    ) -> list[CurvePoint]:
        """All points, after up to `TRIES` further ones where a value that rises with the threshold is near `wanted`."""
        for number in range(TRIES):
            points = self.points()
            if any(within[0] <= value(point) - wanted <= within[1] for point in points):
                break
            if all(value(point) < wanted for point in points):
                ahead = points[-1].logit + 1
            elif all(value(point) > wanted for point in points):
                ahead = points[0].logit - 1
            else:
                # The sparsest, where noise makes several.
                around = [pair for pair in pairwise(points) if value(pair[0]) < wanted < value(pair[1])]
                if not around or around[-1][1].sparsity - around[-1][0].sparsity < TOLERANCE:
                    break
                low, high = around[-1]
                part = (wanted - value(low)) / (value(high) - value(low))
                # In turns with halves: what bends strongly would otherwise be approached from one side, slowly.
                part = 0.5 if number % 2 else min(max(part, 0.02), 0.98)
                ahead = low.logit + part * (high.logit - low.logit)
            if not abs(ahead) <= LARGEST_LOGIT or threshold_of(ahead) in self._found:
                break
            self.at(threshold_of(ahead))
        return self.points()


def time_curve(
    model: Any,
    curve: SparsityCurve,
    prompts: Mapping[str, Tensor],
    *,
    dense: Any = None,
    new_tokens: int = NEW_TOKENS,
) -> SparsityCurve:
    """Adds the time of a decoded token by `generate`, at batch size 1, to every point of a curve; they take turns.

    Args:
        model: an LTE model as it is to be used, accelerated say; its threshold is restored afterwards.
        curve: of the model.
        prompts: token ids [1, T] of each text, by its name; every threshold continues all of them.
        dense: the dense model, which is timed beside.
        new_tokens: of each answer, at least 3.

    Returns:
        The curve with the median over all tokens and rounds, in ms.
    """
    before = _threshold(model)
    networks: list[tuple[str, Any, CurvePoint | None]] = [(str(i), model, p) for i, p in enumerate(curve.points)]
    networks += [] if dense is None else [("dense", dense, None)]
    runs = {
        f"{number}/{name}": _answering(network, ids, point, new_tokens)
        for number, network, point in networks
        for name, ids in prompts.items()
    }
    try:
        with hard_inference(model):
            found = interleaved_token_s(runs)
    finally:
        set_threshold_(model, before)
    times = {
        number: 1e3 * median(second for name in prompts for second in found[f"{number}/{name}"])
        for number, _, _ in networks
    }
    points = [replace(point, ms_per_token=times[str(number)]) for number, point in enumerate(curve.points)]
    chosen = curve.chosen
    if chosen is not None:
        same = [point for point in points if point.threshold == chosen.point.threshold]
        chosen = replace(chosen, point=same[0] if same else chosen.point)
    reference = curve.dense
    if reference is not None and dense is not None:
        reference = replace(reference, ms_per_token=times["dense"])
    return replace(curve, points=points, chosen=chosen, dense=reference)


def _answering(model: Any, ids: Tensor, point: CurvePoint | None, new_tokens: int) -> Callable[[TokenClock], object]:
    """A function that has a model continue a prompt, an LTE model at a point of its curve."""
    settings = {**GREEDY, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    def answer(clock: TokenClock) -> object:
        if point is not None:
            set_threshold_(model, point.threshold, point.layer_sparsity)
        moved, pad = ids.to(model.device), model.config.pad_token_id or 0
        return model.generate(
            moved, attention_mask=torch.ones_like(moved), pad_token_id=pad, streamer=clock, **settings
        )

    return answer


def prompts_of(batches: Mapping[str, list[Batch]], model: Any, new_tokens: int = NEW_TOKENS) -> dict[str, Tensor]:
    """The first tokens of the first row of up to `TIMED_TEXTS` texts, as prompts [1, T] for `time_curve`.

    Raises:
        ValueError: if the model has no room for an answer.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    length = PROMPT_TOKENS if positions is None else min(PROMPT_TOKENS, positions - new_tokens)
    if length < 1:
        raise ValueError(
            f"model must have room for a prompt and {new_tokens} tokens to be timed, got max_position_embeddings="
            f"{positions}; measure the curve without times"
        )
    return {name: rows[0]["input_ids"][:1, :length] for name, rows in list(batches.items())[:TIMED_TEXTS]}
