"""The YAML file of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lte.config import LteConfig, check_choice, check_fraction, check_whole_number
from lte.data.config import BUILTIN_TEXTS, DataConfig
from lte.data.tasks.registry import TaskConfig
from lte.eval.models import DTYPES
from lte.methods import METHODS
from lte.runs.question_sets import KEYS as HARNESS_KEYS
from lte.runs.question_sets import HarnessSettings, read_harness
from lte.settings import build, parse_settings, read_mapping
from lte.train.config import TrainConfig

Base = Literal["start", "dense"]
Stages = Literal["both", "1", "2"]
KEYS = (
    *("task", "model", "data_dir", "seeds", "defaults", "start", "train", "sparsities", "methods"),
    *("dtype", "eval_batch_size", "latency", *HARNESS_KEYS),
)
# Settings with a place of their own in the file.
ELSEWHERE = {
    "seed": "seeds",
    "target_sparsity": "sparsities",
    "task": "task at the top of the file",
    "data_dir": "data_dir at the top of the file",
}


@dataclass(frozen=True, kw_only=True)
class TeachingOptions:
    """How a run trains, beyond `TrainConfig`.

    Attributes:
        distill_from: teacher: `start`, the dense model of the same seed that everything starts from, or a dense model
            by name. Sets distillation_weight to 1 unless that is set.
        stages: which stages of the training budget run.
    """

    distill_from: str | None = None
    stages: Stages = "both"

    def __post_init__(self) -> None:
        check_choice("stages", self.stages, get_args(Stages))


@dataclass(frozen=True, kw_only=True)
class EntryOptions:
    """Keys of an entry of `methods` that are no settings of training, data or the method.

    Attributes:
        method: `dense` or one of `lte.methods.METHODS`.
        label: name of its runs and of its curve; unset: the method's name.
        group: name of a curve that several labels make up, a sweep of a setting say.
        base: what it is applied to; unset: `start` for methods that train, `dense`, the control, for others.
        fine_tune: whether it trains; unset: as the method is meant to be.
        relu: whether the FFNs use ReLU, with which the model first trains.
        keep: whether the models stay in the work folder.
    """

    method: str
    label: str | None = None
    group: str | None = None
    base: Base | None = None
    fine_tune: bool | None = None
    relu: bool = False
    keep: bool = False

    def __post_init__(self) -> None:
        if self.base is not None:
            check_choice("base", self.base, get_args(Base))
        if self.label is not None and (not self.label or set(self.label) & set("/\\ ")):
            raise ValueError(f"label must be part of a file name, got label={self.label!r}; leave out / and spaces")
        if self.fine_tune and self.method in METHODS and METHODS[self.method].zeroes_weights:
            raise ValueError(
                f"fine_tune must be false for method={self.method}, got fine_tune=True; training would fill its zeros"
            )

    @property
    def name(self) -> str:
        """The label, or what stands in for it."""
        return self.label or self.method + "-relu" * self.relu

    @property
    def trains(self) -> bool:
        """Whether its runs train after the start."""
        if self.fine_tune is not None:
            return self.fine_tune
        return self.method not in METHODS or METHODS[self.method].trained


@dataclass(frozen=True)
class Entry:
    """One entry of `methods`.

    Attributes:
        options: what it is.
        values: settings that it overrides.
        seeds: of its runs.
        sparsities: targets of its runs.
    """

    options: EntryOptions
    values: dict[str, Any]
    seeds: tuple[int, ...]
    sparsities: tuple[float, ...]


@dataclass(frozen=True)
class ComparisonSettings:
    """What to compare.

    Attributes:
        file: where it was read.
        model: dense model that every start is trained from: hub name, folder, or GGUF file.
        entries: the methods.
        defaults: settings of all training.
        start: settings of the fine-tuning that everything starts from, over the defaults.
        train: settings of the budget after it, over the defaults.
        dtype: of the weights while a model is measured.
        eval_batch_size: rows per forward pass while it is measured, `None` for as many as in training.
        latency: whether decoding is timed, on GPUs alone.
        harness: question sets that every run answers.
        flags: in place of keys of the file, for the command that repeats a run.
    """

    file: str
    model: str
    entries: tuple[Entry, ...]
    defaults: dict[str, Any]
    start: dict[str, Any]
    train: dict[str, Any]
    dtype: str = "float32"
    eval_batch_size: int | None = None
    latency: bool = False
    harness: HarnessSettings | None = None
    flags: tuple[str, ...] = ()


SETTINGS: dict[type, str] = dict.fromkeys((LteConfig, TaskConfig, DataConfig, TrainConfig, TeachingOptions), "")


def read_comparison(path: Path, **overrides: Any) -> ComparisonSettings:
    """Reads the file of a comparison.

    Args:
        path: a YAML file, see docs/compare.md.
        overrides: keys of the file that are set from elsewhere, `None` for those that are not.

    Raises:
        ValueError: for a missing file, an unknown key or method, or a value that does not fit, saying which.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    content = {**read_mapping(path, "file"), **given}
    for key in content:
        check_choice("key", key, KEYS)
    if not isinstance(content.get("train", {}), dict):
        raise ValueError(
            f"train must be a mapping with the budget, got train={content['train']!r} in {path}; text files go to "
            "defaults: {train: FILE}"
        )
    if not content.get("model"):
        raise ValueError(f"model must be given: --model, or model: in {path}")
    check_choice("dtype", content.get("dtype", "float32"), tuple(DTYPES))
    batch_size = content.get("eval_batch_size")
    if batch_size is not None:
        check_whole_number("eval_batch_size", batch_size, 1)
    blocks = {name: _block(content, name, path) for name in ("defaults", "start", "train")}
    blocks["defaults"] = _with_data(blocks["defaults"], content)
    return ComparisonSettings(
        file=str(path),
        model=str(content["model"]),
        entries=_entries(content, path, "seeds" in given),
        dtype=content.get("dtype", "float32"),
        eval_batch_size=batch_size,
        latency=bool(content.get("latency", False)),
        harness=read_harness(content, str(path)),
        flags=_flags(given),
        **blocks,
    )


def _block(content: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    block = content.get(name) or {}
    if not isinstance(block, dict):
        raise ValueError(f"{name} must be a mapping of settings, got {name}={block!r} in {path}")
    return _parsed(block, {}, f"{name} of {path}")


def _parsed(block: Mapping[str, Any], more: Mapping[type, str], source: str) -> dict[str, Any]:
    for key, place in ELSEWHERE.items():
        if key in block:
            raise ValueError(f"{key} must be left out of {source}, got {key}={block[key]!r}; it is set by {place}")
    return parse_settings(block, {**more, **SETTINGS}, source)


def _with_data(defaults: dict[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with the task, or with text files below `data_dir`."""
    task, folder = content.get("task"), content.get("data_dir")
    if task is not None:
        return {**defaults, "task": task, "data_dir": folder}
    if "train" not in defaults:
        raise ValueError("task must be given, or text: defaults: {train: FILE}, got neither")
    if folder is None:
        return defaults

    def below(source: str) -> str:
        return source if source in BUILTIN_TEXTS else str(Path(folder).expanduser() / source)

    found = dict(defaults)
    for name in ("train", "validation", "calibration"):
        value = defaults.get(name)
        if value is not None:
            found[name] = [below(one) for one in value] if isinstance(value, list) else below(value)
    return found


def _flags(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Overrides as the command line has them."""
    found: list[str] = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return tuple(found)


def _entries(content: Mapping[str, Any], path: Path, seeds_given: bool) -> tuple[Entry, ...]:
    methods = content.get("methods")
    if not isinstance(methods, list) or not methods:
        raise ValueError(f"methods must be a list of methods, got methods={methods!r} in {path}")
    seeds, sparsities = content.get("seeds", [0]), content.get("sparsities", [0.5])
    if seeds_given:
        # Those of the command go before those of single methods, too.
        methods = [{**e, "seeds": seeds} if isinstance(e, dict) else e for e in methods]
    return tuple(_entry(entry, seeds, sparsities, f"methods of {path}") for entry in methods)


def _entry(entry: Any, seeds: Any, sparsities: Any, source: str) -> Entry:
    values = {"method": entry} if isinstance(entry, str) else entry
    if not isinstance(values, dict) or "method" not in values:
        raise ValueError(f"methods must hold names, or mappings with a method, got {entry!r} in {source}")
    values = dict(values)
    seeds, sparsities = values.pop("seeds", seeds), values.pop("sparsities", sparsities)
    method = str(values["method"])
    check_choice("method", method, ("dense", *METHODS))
    more: dict[type, str] = {EntryOptions: ""}
    if method in METHODS:
        more[METHODS[method].config] = ""
    parsed = _parsed(values, more, source)
    options = build(EntryOptions, parsed)
    if "recipe" in parsed and not (method in METHODS and METHODS[method].sparse_ffns):
        raise ValueError(f"recipe must be left out for method={method}, got recipe={parsed['recipe']}")
    own = {name: value for name, value in parsed.items() if name not in EntryOptions.__dataclass_fields__}
    targets = _numbers("sparsities", sparsities, source, float)
    for target in targets:
        check_fraction("sparsities", target)
    return Entry(options, own, _numbers("seeds", seeds, source, int), (0.0,) if method == "dense" else targets)


def _numbers(name: str, values: Any, source: str, kind: type) -> tuple[Any, ...]:
    accepted = (int,) if kind is int else (int, float)
    fits = isinstance(values, list) and all(isinstance(v, accepted) and not isinstance(v, bool) for v in values)
    if not fits or not values:
        raise ValueError(f"{name} must be a list of numbers, got {name}={values!r} in {source}")
    return tuple(kind(value) for value in values)
