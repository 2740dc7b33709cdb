"""What `lte bench` measures, as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from lte.config import check_choice, check_fraction

Benchmark = Literal["ffn", "decode", "prefill"]
Routing = Literal["same", "different"]
Scope = Literal["auto", "ffn", "model"]
OWN = "own"
# Models with more parameters than this are prefilled FFN by FFN, unless told otherwise.
FFN_SCOPE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Settings of a run.

    Attributes:
        benchmarks: what to time, in this order.
        sparsities: shares of skipped experts, forced on the routers; "own" is the model's own routing on text, and
            "own@0.8" the same after all thresholds moved together until that share is off.
        batches: sequences that decode together.
        lengths: tokens of a prompt, for prefill.
        routing: whether the tokens of a batch get the same forced experts or different ones.
        prefill_scope: whether prefill times FFNs or the whole model.
        repeats: timed calls of each provider.
        context_length: tokens that the key-value cache holds.
        prompt_length: tokens of these before the first decoding step; `None` takes a quarter.
        compile: whether to time dense baselines and the sparse model under `torch.compile`.
        autotune: whether to time the dense FFN under max-autotune, too.
        whole_step: whether to time whole decoding steps, too.
        tunings: how often decoding models are compiled and tuned, the fastest outcome being timed; 0 for no tuning.
        seed: of weights, hidden states and routing.
        budget_s: no batch or length is begun after so many seconds; `None` measures everything.
    """

    benchmarks: tuple[Benchmark, ...] = ("ffn", "decode", "prefill")
    sparsities: tuple[float | str, ...] = (0.0, 0.5, 0.8, 0.9)
    batches: tuple[int, ...] = (1, 4, 16)
    lengths: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    routing: Routing = "different"
    prefill_scope: Scope = "auto"
    repeats: int = 20
    context_length: int = 256
    prompt_length: int | None = None
    compile: bool = True
    autotune: bool = True
    whole_step: bool = True
    tunings: int = 1
    seed: int = 0
    budget_s: float | None = None

    def __post_init__(self) -> None:
        for benchmark in self.benchmarks:
            check_choice("benchmarks", benchmark, get_args(Benchmark))
        check_choice("routing", self.routing, get_args(Routing))
        check_choice("prefill_scope", self.prefill_scope, get_args(Scope))
        for sparsity in self.sparsities:
            if sparsity != OWN:
                check_fraction("sparsities", share_of(sparsity), upper_closed=True)
        for name in ("benchmarks", "sparsities", "batches", "lengths"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold at least one entry, got {name}=()")
        for name, least in (("batches", 1), ("lengths", 1)):
            if min(getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {name}={getattr(self, name)}")
        for name, least in (("repeats", 1), ("tunings", 0), ("context_length", 8)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {name}={getattr(self, name)}")
        if self.prompt_length is not None and not 0 < self.prompt_length < self.context_length:
            raise ValueError(
                f"prompt_length must be positive and less than the context of {self.context_length} tokens, got "
                f"prompt_length={self.prompt_length}"
            )

    @property
    def prompt(self) -> int:
        """Tokens before the first decoding step."""
        return self.context_length // 4 if self.prompt_length is None else self.prompt_length

    @property
    def own(self) -> bool:
        """Whether the model's own routing is measured."""
        return any(is_own(sparsity) for sparsity in self.sparsities)

    def whole_model(self, parameters: int) -> bool:
        """Whether prefill runs the whole model."""
        return self.prefill_scope == "model" or (self.prefill_scope == "auto" and parameters <= FFN_SCOPE_PARAMETERS)

    def needs_model(self, parameters: int) -> bool:
        """Whether anything runs all layers of a model of so many parameters."""
        return (
            self.own or "decode" in self.benchmarks or ("prefill" in self.benchmarks and self.whole_model(parameters))
        )


def is_own(sparsity: float | str) -> bool:
    """Whether the model's own routers decide."""
    return isinstance(sparsity, str)


def share_of(sparsity: float | str) -> float:
    """The share of experts that an entry asks to skip.

    Raises:
        ValueError: for an entry that names none.
    """
    return float(sparsity.removeprefix(f"{OWN}@") if isinstance(sparsity, str) else sparsity)


def parse_sparsities(text: str) -> tuple[float | str, ...]:
    """The entries of a list like `own,own@0.8,0,0.5`.

    Raises:
        ValueError: for an entry that is neither a number nor of one of these forms.
    """

    def parse(entry: str) -> float | str:
        if entry == OWN:
            return OWN
        try:
            share = share_of(entry)
        except ValueError:
            raise ValueError(f"sparsities must hold numbers, {OWN} or {OWN}@SHARE, got sparsities={text}") from None
        return entry if entry.startswith(OWN) else share

    return tuple(parse(entry) for entry in split(text))


def parse_counts(name: str, text: str) -> tuple[int, ...]:
    """The entries of a list like `1,4,16`.

    Raises:
        ValueError: for an entry that is no whole number.
    """
    try:
        return tuple(int(entry) for entry in split(text))
    except ValueError:
        raise ValueError(f"{name} must hold whole numbers, got {name}={text}") from None


def split(text: str) -> list[Any]:
    """The entries of a comma-separated list."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]
