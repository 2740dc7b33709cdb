"""What the modules of a model of any method did, counted in the pass that something else runs or that runs for it.

For LTE the counts are those of the logits that its own hard path used, with details of the routing.

Shapes: L layers, E experts, K histogram bins, N tokens of a batch; a token counts where the token mask is
    true.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from lte.data.batches import as_batches
from lte.data.rows import routing_masks
from lte.eval.inference import hard_inference, model_device, moved_batches
from lte.hf.inputs import run_without_logits
from lte.nn.metering import MeteredModule, Reading, metered_modules
from lte.nn.unions import count_unions

HISTOGRAM_BINS = 40
NEAR_THRESHOLD = 0.1
UNION_TOKENS = (2, 4, 8, 16)
# Scores that one histogram call takes: it counts in fp32, which is exact up to here.
HISTOGRAM_CHUNK = 1 << 24


@dataclass(frozen=True)
class Measurement:
    """What the modules of a method did for the counted tokens; for LTE, in hard mode, with details of the routing.

    Attributes:
        sparsity: share of FFN neurons not computed or not used per token, mean over tokens and layers.
        layer_sparsity: the same by layer, mean over tokens, [L].
        tokens: how many tokens were counted, on both sides of an encoder-decoder.
        weights_read: weights that these modules read per token, without routers and predictors; like the next two
            `None` in records of LTE from before version 2, which lack them.
        dense_weights: how many they would read densely.
        selector_weights: weights of routers and predictors read per token, in fp32.
        active_fraction: share of active experts by layer, mean over tokens, [L]; this and all that follows is empty
            for other methods than LTE.
        expert_use: share of tokens that activate each expert, [L][E].
        score_histogram: share of the scores in each of K equal bins on [0, 1], [L][K].
        near_threshold: share of scores within 0.1 of tau, by layer, [L].
        threshold: tau.
        union_sparsity: share of the experts that 2, 4, 8 and 16 consecutive counted tokens of a row leave off together,
            also across the ends of documents, by the number and by layer, [L]; without numbers for which there are no
            such tokens.
    """

    sparsity: float
    layer_sparsity: list[float]
    tokens: int
    weights_read: float | None = None
    dense_weights: int | None = None
    selector_weights: int | None = None
    active_fraction: list[float] = field(default_factory=list)
    expert_use: list[list[float]] = field(default_factory=list)
    score_histogram: list[list[float]] = field(default_factory=list)
    near_threshold: list[float] = field(default_factory=list)
    threshold: float = 0.5
    union_sparsity: dict[str, list[float]] = field(default_factory=dict)

    @property
    def has_routing(self) -> bool:
        """Whether it holds the details of LTE's routing."""
        return bool(self.active_fraction)

    @property
    def dead_experts(self) -> list[int]:
        """How many experts no counted token activates, by layer, [L]."""
        return [sum(use == 0 for use in layer) for layer in self.expert_use]

    @property
    def always_on_experts(self) -> list[int]:
        """How many experts every counted token activates, by layer, [L]."""
        return [sum(use == 1 for use in layer) for layer in self.expert_use]

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready; the details of the routing are left out where there are none."""
        return {name: value for name, value in asdict(self).items() if self.has_routing or name not in _ROUTING}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """Reads what `to_dict` wrote, in this version or an earlier one.

        Raises:
            ValueError: if a field is missing or unknown.
        """
        values = dict(data)
        if "active_fraction" in values:
            # Version 1 of LTE's measurements had no other field for it.
            values.setdefault("layer_sparsity", [1 - active for active in values["active_fraction"]])
        known = {f.name for f in fields(cls)}
        required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        required |= _ROUTING - {"threshold", "union_sparsity"} if _ROUTING & set(values) else set()
        missing, unknown = sorted(required - set(values)), sorted(set(values) - known)
        if missing or unknown:
            raise ValueError(
                f"a sparsity measurement must hold the fields {', '.join(sorted(known))}, got one "
                f"without {missing} and with unknown {unknown}; measure it again with this version of lte"
            )
        return cls(**values)


_ROUTING = {"active_fraction", "expert_use", "score_histogram", "near_threshold", "threshold", "union_sparsity"}


class _ModuleCounts:
    """Running sums of one module, on its device; nothing here waits for the device."""

    def __init__(self, module: MeteredModule):
        self.module = module
        self.sums: dict[str, Tensor] = {}
        self.selector = 0
        self.threshold: float | None = None

    def update(self, mask: Tensor) -> None:
        reading, self.module.reading = self.module.reading, None
        if reading is None:
            raise ValueError("model must run in hard mode before each update, got no reading of its modules")
        shape = reading.weights.shape
        # Some blocks flatten [B, T] before their FFN.
        if shape not in (mask.shape, mask.flatten().shape):
            raise ValueError(
                f"mask must be [B, T] of the last forward pass, {tuple(shape)}, got mask={tuple(mask.shape)}"
            )
        keep = mask.to(reading.weights.device, non_blocking=True).flatten()
        counts = {"tokens": keep.sum(), "weights": (reading.weights.flatten() * keep).sum()}
        self.selector = reading.selector
        if reading.logits is not None:
            counts |= self._routing(reading, keep) | self._unions(reading, keep.view(mask.shape))
        elif reading.neurons is not None:
            counts["neurons"] = (reading.neurons.flatten() * keep).sum()
        for name, count in counts.items():
            before = self.sums.get(name)
            # A module that a device map moves in between would find its sums elsewhere.
            self.sums[name] = count if before is None else count + before.to(count.device, non_blocking=True)

    def _routing(self, reading: Reading, keep: Tensor) -> dict[str, Tensor]:
        assert reading.logits is not None
        if self.threshold is None:
            self.threshold = float(torch.sigmoid(torch.tensor(reading.threshold_logit, dtype=torch.float64)))
        logits, keep = reading.logits.flatten(0, -2), keep.unsqueeze(-1)
        scores = torch.sigmoid(logits)
        near = (scores - self.threshold).abs() < NEAR_THRESHOLD
        return {
            "active": ((logits > reading.threshold_logit) & keep).sum(0),
            "near": (near & keep).sum(),
            "bins": _histogram(scores, keep),
        }

    def _unions(self, reading: Reading, keep: Tensor) -> dict[str, Tensor]:
        assert reading.logits is not None
        active = (reading.logits > reading.threshold_logit).reshape(*keep.shape, -1)
        found = {}
        for tokens in UNION_TOKENS:
            found[f"union {tokens}"], found[f"chunks {tokens}"] = count_unions(active, keep, tokens)
        return found

    @property
    def tokens(self) -> int:
        return int(self.sums.get("tokens", 0))

    def union_sparsity(self, tokens: int) -> float | None:
        """Share of experts that so many consecutive tokens leave off; `None` where there were no such tokens."""
        chunks = int(self.sums[f"chunks {tokens}"])
        return 1 - int(self.sums[f"union {tokens}"]) / chunks / len(self.sums["active"]) if chunks else None

    @property
    def expert_use(self) -> Tensor:
        """Share of tokens that activate each expert, [E]."""
        return self.sums["active"].cpu().double() / self.tokens

    @property
    def kept(self) -> float | None:
        """Share of neurons that are computed and used; `None` where the module does not decide that."""
        if "active" in self.sums:
            return float(self.expert_use.mean())
        if "neurons" not in self.sums:
            return None
        return int(self.sums["neurons"]) / self.tokens / self.module.dense_neurons


def _histogram(scores: Tensor, keep: Tensor) -> Tensor:
    """Counts [K] of the kept scores, int64. `histc` leaves out what lies outside [0, 1], and NaN."""
    kept = torch.where(keep, scores, -1.0)
    rows = max(1, HISTOGRAM_CHUNK // scores.shape[-1])
    chunks = [torch.histc(chunk, HISTOGRAM_BINS, 0.0, 1.0) for chunk in kept.split(rows)]
    return torch.stack(chunks).long().sum(0)


class SparsityCounter:
    """Collects what a method's modules read while something else runs the model, an LTE model in hard mode.

    Used as a context: inside it, call the model, then `update` with the token mask of that call.

    Args:
        model: a model of a method that installs modules.
    """

    def __init__(self, model: nn.Module):
        self.layers = {name: _ModuleCounts(module) for name, module in metered_modules(model).items()}
        if not self.layers:
            raise ValueError(
                f"model must be an LTE model or hold modules of another method, got {type(model).__name__}; a stock "
                "model uses all of its neurons: lte.eval.cost.measured_cost says what it costs"
            )
        self.tokens: list[Tensor] = []
        self._metering: list[bool] = []

    def __enter__(self) -> SparsityCounter:
        self._metering = [layer.module.metering for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.module.metering, layer.module.reading = True, None
        return self

    def __exit__(self, *error: object) -> None:
        for layer, metering in zip(self.layers.values(), self._metering, strict=True):
            layer.module.metering, layer.module.reading = metering, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Lets the model run without being watched, inside the context."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    @torch.no_grad()
    def update(self, mask: Tensor | Mapping[str, Tensor]) -> None:
        """Counts the forward pass that just ended over the tokens of `mask` (bool, [B, T]), one for all or by module.

        Raises:
            ValueError: if no forward pass (of LTE: in a routed mode) came before, or a mask is not of its shape.
        """
        masks = dict.fromkeys(self.layers, mask) if isinstance(mask, Tensor) else mask
        for name, layer in self.layers.items():
            layer.update(masks[name])
        self.tokens.append(torch.stack([each.sum() for each in {id(m): m for m in masks.values()}.values()]).sum())

    def result(self) -> Measurement:
        """The counts so far.

        Raises:
            ValueError: if no token was counted, or a router score is NaN.
        """
        layers = list(self.layers.values())
        if not all(layer.tokens for layer in layers):
            raise ValueError("batches must hold at least one counted token, got none")
        kept = [share for layer in layers if (share := layer.kept) is not None]
        return Measurement(
            sparsity=1 - sum(kept) / len(kept),
            layer_sparsity=[1 - share for share in kept],
            tokens=int(torch.stack(self.tokens).sum()),
            weights_read=sum(int(layer.sums["weights"]) / layer.tokens for layer in layers),
            dense_weights=sum(layer.module.dense_weights for layer in layers),
            selector_weights=sum(layer.selector for layer in layers),
            **_routing_details([layer for layer in layers if layer.threshold is not None]),
        )


def _routing_details(layers: list[_ModuleCounts]) -> dict[str, Any]:
    """The fields of a `Measurement` that tell of routers; none for a method without."""
    if not layers:
        return {}
    use = [layer.expert_use for layer in layers]
    bins = [layer.sums["bins"].cpu().double() for layer in layers]
    totals = [layer.tokens * len(shares) for layer, shares in zip(layers, use, strict=True)]
    if any(int(count.sum()) != total for count, total in zip(bins, totals, strict=True)):
        raise ValueError("router scores must be numbers, got NaN; the model's weights are damaged")
    unions = {str(tokens): [layer.union_sparsity(tokens) for layer in layers] for tokens in UNION_TOKENS}
    return {
        "active_fraction": [float(shares.mean()) for shares in use],
        "expert_use": [shares.tolist() for shares in use],
        "score_histogram": [(count / total).tolist() for count, total in zip(bins, totals, strict=True)],
        "near_threshold": [int(layer.sums["near"]) / total for layer, total in zip(layers, totals, strict=True)],
        "threshold": layers[0].threshold,
        "union_sparsity": {name: found for name, found in unions.items() if None not in found},
    }


def counter_for(model: nn.Module) -> AbstractContextManager[SparsityCounter | None]:
    """What counts while a model of any kind runs, as a context; `None` for a stock one, which has nothing to count."""
    return SparsityCounter(model) if metered_modules(model) else nullcontext()


def measure_sparsity(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    skip_ignored_labels: bool = True,
    progress: bool = False,
) -> Measurement:
    """Runs a model of any method and head over `data` and counts, LTE in hard mode; modes are restored afterwards.

    Args:
        model: a model of a method that installs modules.
        data: a list of texts, rows with `input_ids` (a `datasets.Dataset`, or any iterable), or batches: `input_ids`
            and optionally `attention_mask` and `labels`, [B, T], on any device and of any length.
        tokenizer: for texts.
        max_tokens: about how many tokens to run; `None` takes all.
        batch_size: rows per pass, for texts and rows.
        skip_ignored_labels: whether tokens with the label -100 are left out, if the model predicts the next token.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for a stock model, texts without a tokenizer, or data without a counted token.
    """
    with SparsityCounter(model) as counter:
        batches: Iterable[Any] = as_batches(data, model, batch_size, tokenizer=tokenizer, max_tokens=max_tokens)
        with hard_inference(model):
            for batch in moved_batches(batches, model_device(model), progress=progress):
                run_without_logits(model, batch)
                masks = routing_masks(model, counter.layers, batch, skip_ignored_labels=skip_ignored_labels)
                counter.update(masks)
        return counter.result()
