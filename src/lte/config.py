"""Configurations of methods: what `sparsify_` builds, and what the saved folder remembers of it."""

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

Grouping = Literal["kmeans", "coactivation", "contribution", "chunks", "random", "contiguous"]
CALIBRATED_GROUPINGS = ("coactivation", "contribution", "chunks")
FfnMode = Literal["dense", "soft", "straight_through", "hard"]

CONFIG_VERSION = 2
"""Of the settings in `config.lte`. Version 1 kept LTE's there without a name, and others' in `config.lte_method`."""

IGNORED = -100
"""The label of a token that no loss counts, as in PyTorch and transformers."""

DTYPE_NAMES = ("float32", "bfloat16", "float16")
"""Of the weights, while a model is measured or used."""

KERNELS = ("auto", "off", "int8")
"""What computes an LTE model's FFNs, see `lte.eval.kernels.use_kernels_`."""

WEIGHT_GROUPS = {"int4": 128, "int4-64": 64, "int4-32": 32}
"""Inputs that share a scale, of weights in 4 bits."""

WEIGHTS = ("native", "int8", *WEIGHT_GROUPS)
"""What torchao rounds weights to before a model is measured, see `lte.eval.rounding.round_weights_`."""

# Added to the squared distance in the separability loss: bounds it by 1 / POLE_GUARD at G = tau, where Eq. 6
# is infinite. The steepest slope, 0.65 / POLE_GUARD**1.5, is 650 at 0.01; see docs/method.md for what that
# means.
POLE_GUARD = 1e-2

GFLOP = 2**30
"""The paper's unit of FLOPs."""


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises a `ValueError` that names the nearest valid choices when `value` is not one of `choices`."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=2)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(choices)}, got {name}={value!r}{hint}")


def check_whole_number(name: str, value: object, least: int) -> None:
    """Raises a `ValueError` unless `value` is a whole number from `least` on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number from {least}, got {name}={value!r}")


def check_fraction(name: str, value: float, *, upper_closed: bool = False) -> None:
    """Raises a `ValueError` unless `value` lies in [0, 1), or in [0, 1] if `upper_closed`."""
    inside = 0 <= value <= 1 if upper_closed else 0 <= value < 1
    if not inside or math.isnan(value):
        interval = "[0, 1]" if upper_closed else "[0, 1)"
        raise ValueError(f"{name} must lie in {interval}, got {name}={value}")


def check_expert_size(num_neurons: int, expert_size: int) -> int:
    """The number of experts E.

    Raises:
        ValueError: if `expert_size` does not divide `num_neurons`, naming the nearest sizes that do.
    """
    if expert_size < 1 or num_neurons % expert_size:
        divisors = [size for size in range(1, num_neurons + 1) if num_neurons % size == 0]
        nearest = sorted(sorted(divisors, key=lambda size: abs(size - expert_size))[:6])
        raise ValueError(
            f"expert_size must divide the number of FFN neurons, got expert_size={expert_size} for {num_neurons} "
            f"neurons; sizes that fit: {', '.join(map(str, nearest))}"
        )
    return num_neurons // expert_size


def _check_type(name: str, value: object, hint: Any) -> None:
    """Raises a `ValueError` unless `value` is what the field's type says; types other than those of JSON pass."""
    optional = type(None) in get_args(hint)
    if optional and value is None:
        return
    kind = next((part for part in get_args(hint) if part is not type(None)), hint) if optional else hint
    no_number = isinstance(value, bool) or not isinstance(value, Real)
    if kind is int and (no_number or not isinstance(value, Integral) or abs(int(value)) >= 2**62):
        rule = "be a whole number of less than 63 bits"
    elif kind is float and (no_number or not abs(value) < 2.0**1023):  # type: ignore[arg-type]
        rule = "be a finite number"
    elif kind is bool and not isinstance(value, bool):
        rule = "be true or false"
    elif get_origin(kind) is Literal and not isinstance(value, str):
        rule = f"be one of {', '.join(get_args(kind))}"
    else:
        return
    raise ValueError(f"{name} must {rule}{' or None' * optional}, got {name}={value!r}")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Settings of a method; a subclass adds its own and sets `name`.

    Attributes:
        target_sparsity: share that shall be skipped, in [0, 1): of FFN neurons where the method does not say otherwise.
    """

    name: ClassVar[str]
    target_sparsity: float = 0.5

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is not ClassVar:
                _check_type(name, getattr(self, name), hint)
        check_fraction("target_sparsity", self.target_sparsity)

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready, with the method's name and the format's version: what `config.lte` holds."""
        return {"name": self.name, "version": CONFIG_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` wrote, now or in an earlier version.

        Raises:
            ValueError: if another method or a newer lte wrote it, a field is unknown, or a value is wrong.
        """
        values = current_settings(data)
        name, _ = values.pop("name"), values.pop("version")
        if name != cls.name:
            raise ValueError(f"name must be {cls.name}, got name={name!r}; read it with the config of that method")
        unknown = sorted(map(str, set(values) - {f.name for f in fields(cls)}))
        if unknown:
            raise ValueError(f"a config of {cls.name} must hold known fields only, got {', '.join(unknown)}")
        return cls(**values)


def current_settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a method as this version writes them, from what any version up to it wrote.

    Raises:
        ValueError: if a newer lte wrote them, or they are no settings of a method.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"config.lte must hold the settings of a method, got {data!r}")
    version: Any = data.get("version")
    check_whole_number("lte config version", version, 1)
    if version > CONFIG_VERSION:
        raise ValueError(
            f"this model was saved by a newer lte: its config has version={version}, this lte reads up "
            f"to {CONFIG_VERSION}. Install that newer lte to load it."
        )
    named = {"name": LteConfig.name, **data} if version == 1 else dict(data)
    if not isinstance(named.get("name"), str):
        raise ValueError(f"name must be that of a method in config.lte, got name={named.get('name')!r}")
    return {**named, "version": CONFIG_VERSION}


@dataclass(frozen=True, kw_only=True)
class LteConfig(MethodConfig):
    """What an LTE model is made of (the paper's section 3).

    Attributes:
        target_sparsity: share of FFN neurons that a token shall skip, mean over tokens and layers, in [0, 1).
        expert_size: neurons per expert; it must divide the number of FFN neurons.
        grouping: how neurons are put into experts: balanced `kmeans` on their (gate) input weights as in the
            paper, `coactivation` or `contribution` on calibration text, `chunks`, which is `contribution` to 8 tokens
            in a row, `random`, or `contiguous` (the order of the checkpoint).
        router_rank: rank of a low-rank router D -> rank -> E; `None` is the paper's single linear layer,
            D -> E.
        threshold: tau; an expert is active where its router score exceeds it. At most 0.9 where routers are new,
            because every score starts at 0.95 and a converted model must start with all experts active; the
            threshold of a trained model may be moved anywhere in (0, 1), which is what `lte calibrate` does.
        always_on: share of experts that every token computes, in [0, 1), at least one if it is not 0: they hold the
            neurons that are most often among a token's tenth of largest contributions on calibration text, and the
            router decides on the others. They count as active.
        router_context: of how many tokens before its own, in the same document, a router reads the mean besides its
            own; 0 for none. Learned summaries of them are kept in the cache. No kernel and no engine computes such
            routers: plain PyTorch runs the model.
        dropped_bias: whether training adds to every FFN's output a vector that starts as the mean of what is dropped
            (SPON, arXiv 2512.12744). It is the bias of the down projection, which gets one where the family has none.
        seed: seed of the grouping and of the router's initialisation.
    """

    name = "lte"
    expert_size: int = 32
    grouping: Grouping = "kmeans"
    router_rank: int | None = None
    threshold: float = 0.5
    always_on: float = 0.0
    router_context: int = 0
    dropped_bias: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole_number("router_context", self.router_context, 0)
        check_fraction("always_on", self.always_on)
        check_choice("grouping", self.grouping, get_args(Grouping))
        if self.expert_size < 1:
            raise ValueError(f"expert_size must be at least 1, got expert_size={self.expert_size}")
        if self.router_rank is not None and self.router_rank < 1:
            raise ValueError(f"router_rank must be at least 1 or None, got router_rank={self.router_rank}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1), got threshold={self.threshold}")

    def check_new(self) -> None:
        """Raises a `ValueError` for what a model with new routers cannot start with, or not reach."""
        if self.always_on and self.target_sparsity + self.always_on >= 1:
            raise ValueError(
                f"target_sparsity must be below 1 - always_on = {1 - self.always_on:g}, got "
                f"target_sparsity={self.target_sparsity}; the router has no say about experts that are always on"
            )
        if self.threshold > 0.9:
            raise ValueError(
                f"threshold must lie in (0, 0.9] for new routers, got threshold={self.threshold}; lower it"
            )

    def num_always_on(self, num_experts: int) -> int:
        """How many of the experts of an FFN are always on."""
        return max(1, round(self.always_on * num_experts)) if self.always_on else 0

    @property
    def needs_text(self) -> bool:
        """Whether neurons are put into experts by what they do on calibration text."""
        return self.grouping in CALIBRATED_GROUPINGS or self.always_on > 0
