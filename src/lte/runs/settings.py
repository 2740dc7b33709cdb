"""The YAML file of a comparison."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from lte.config import DTYPE_NAMES, WEIGHTS, LteConfig, check_choice, check_fraction, check_whole_number
from lte.data.config import BUILTIN_TEXTS, DataConfig, check_sources
from lte.data.tasks.registry import TaskConfig
from lte.runs.question_sets import KEYS as HARNESS_KEYS
from lte.runs.question_sets import HarnessSettings, read_harness, weight_formats
from lte.settings import build, parse_settings, read_mapping, settings_of
from lte.train.config import TrainConfig

Base = Literal["start", "dense"]
Stages = Literal["both", "1", "2"]
PHASES = ("both", "train", "measure")
KEYS = (
    *("task", "model", "data_dir", "seeds", "defaults", "start", "train", "sparsities", "methods"),
    *("dtype", "eval_batch_size", "latency", "weights", *HARNESS_KEYS),
)
# What `start` says in place of settings, if nothing is fine-tuned first.
ORIGINAL = "original"
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

    @property
    def name(self) -> str:
        """The label, or what stands in for it."""
        return self.label or self.method + "-relu" * self.relu

    @property
    def trains(self) -> bool:
        """Whether its runs train after the start."""
        if self.fine_tune is not None:
            return self.fine_tune
        from lte.methods import METHODS  # with torch, which reading the file does not need

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
        start: settings of the fine-tuning that everything starts from, over the defaults; `None` if everything starts
            from the model as it is.
        train: settings of the budget after it, over the defaults.
        dtype: of the weights while a model is measured.
        eval_batch_size: rows per forward pass while it is measured, `None` for as many as in training.
        latency: whether decoding is timed, on GPUs alone.
        weights: what torchao rounds the weights of every model to (see `lte.config.WEIGHTS`), each measured in a record
            of its own beside that of the model as it is.
        harness: question sets that every run answers.
        flags: in place of keys of the file, for the command that repeats a run.
    """

    file: str
    model: str
    entries: tuple[Entry, ...]
    defaults: dict[str, Any]
    start: dict[str, Any] | None
    train: dict[str, Any]
    dtype: str = "float32"
    eval_batch_size: int | None = None
    latency: bool = False
    weights: tuple[str, ...] = ()
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
    from lte.methods import METHODS

    return _read(path, overrides, METHODS)


def check_comparison(path: Path, **overrides: Any) -> str:
    """Refuses what can be seen to be wrong in the file of a comparison without loading the methods, and torch.

    `read_comparison` sees the rest: values of the methods' own settings, and what does not go together. The arguments
    and errors are the same.

    Returns:
        The name of the model.
    """
    found = _read(path, overrides, None)
    task, data = build(TaskConfig, found.defaults), build(DataConfig, found.defaults)
    if task.task is None:
        check_sources(data)
    elif task.data_dir is not None and not Path(task.data_dir).expanduser().is_dir():
        raise ValueError(f"data_dir must be an existing folder, got data_dir={task.data_dir}; give --data-dir")
    return found.model


@cache
def _declared_methods() -> tuple[frozenset[str], frozenset[str]]:
    """The names of the methods in this package, and those of all their settings, by the text of their files."""
    names, settings = set(), set()
    for file in Path(__file__).parents[1].joinpath("methods").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
                continue
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    settings.add(line.target.id)
                elif isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant):
                    names.add(str(line.value.value))
    return frozenset(names | {LteConfig.name}), frozenset(settings)


def _read(path: Path, overrides: Mapping[str, Any], methods: Mapping[str, Any] | None) -> ComparisonSettings:
    """Reads a file; without `methods` their settings are known by name alone, and left out."""
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
    check_choice("dtype", content.get("dtype", "float32"), DTYPE_NAMES)
    batch_size = content.get("eval_batch_size")
    if batch_size is not None:
        check_whole_number("eval_batch_size", batch_size, 1)
    original = content.get("start") == ORIGINAL
    if original:
        content = {name: value for name, value in content.items() if name != "start"}
    blocks: dict[str, Any] = {name: _block(content, name, path) for name in ("defaults", "start", "train")}
    blocks["defaults"] = _with_data(blocks["defaults"], content)
    if original:
        blocks["start"] = None
    return ComparisonSettings(
        file=str(path),
        model=str(content["model"]),
        entries=_entries(content, path, "seeds" in given, methods),
        dtype=content.get("dtype", "float32"),
        eval_batch_size=batch_size,
        latency=bool(content.get("latency", False)),
        weights=_weights(content.get("weights") or [], path),
        harness=read_harness(content, str(path)),
        flags=_flags(given),
        **blocks,
    )


def _weights(given: Any, path: Path) -> tuple[str, ...]:
    found = weight_formats("weights", given, str(path))
    for name in found:
        check_choice("weights", name, WEIGHTS)
        if name != "native" and importlib.util.find_spec("torchao") is None:
            raise ValueError(f"torchao must be installed for weights={name}, got none: pip install torchao")
    return tuple(name for name in dict.fromkeys(found) if name != "native")


def _block(content: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    block = content.get(name) or {}
    if not isinstance(block, dict):
        raise ValueError(f"{name} must be a mapping of settings, got {name}={block!r} in {path}")
    return _parsed(block, {}, f"{name} of {path}")


def _parsed(
    block: Mapping[str, Any], more: Mapping[type, str], source: str, others: Collection[str] = ()
) -> dict[str, Any]:
    for key, place in ELSEWHERE.items():
        if key in block:
            raise ValueError(f"{key} must be left out of {source}, got {key}={block[key]!r}; it is set by {place}")
    return parse_settings(block, {**more, **SETTINGS}, source, others)


def _with_data(defaults: dict[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with the task, or with text files below `data_dir`."""
    task, folder = content.get("task"), content.get("data_dir")
    if task is not None:
        return {**defaults, "task": task, "data_dir": folder}
    if "train" not in defaults and "mix" not in defaults:
        raise ValueError("task must be given, or text: defaults: {train: FILE} or {mix: FILE}, got neither")
    if folder is None:
        return defaults
    if "mix" in defaults:
        # The mix itself belongs to the configs, its files to the data.
        defaults = {**defaults, "mix_folder": folder}

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


def _entries(
    content: Mapping[str, Any], path: Path, seeds_given: bool, methods: Mapping[str, Any] | None
) -> tuple[Entry, ...]:
    listed = content.get("methods")
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"methods must be a list of methods, got methods={listed!r} in {path}")
    seeds, sparsities = content.get("seeds", [0]), content.get("sparsities", [0.5])
    if seeds_given:
        # Those of the command go before those of single methods, too.
        listed = [{**e, "seeds": seeds} if isinstance(e, dict) else e for e in listed]
    return tuple(_entry(entry, seeds, sparsities, f"methods of {path}", methods) for entry in listed)


def _entry(entry: Any, seeds: Any, sparsities: Any, source: str, methods: Mapping[str, Any] | None) -> Entry:
    values = {"method": entry} if isinstance(entry, str) else entry
    if not isinstance(values, dict) or "method" not in values:
        raise ValueError(f"methods must hold names, or mappings with a method, got {entry!r} in {source}")
    values = dict(values)
    seeds, sparsities = values.pop("seeds", seeds), values.pop("sparsities", sparsities)
    method = str(values["method"])
    names = sorted(_declared_methods()[0]) if methods is None else methods
    check_choice("method", method, ("dense", *names))
    found = None if methods is None else methods.get(method)
    more: dict[type, str] = {EntryOptions: ""}
    own: frozenset[str] = frozenset()
    if found is not None:
        more[found.config] = ""
    elif methods is None:
        known = settings_of(SETTINGS | more)
        own = _declared_methods()[1] - set(known)
        values = {key: value for key, value in values.items() if str(key).replace("-", "_") not in own}
    parsed = _parsed(values, more, source, own)
    options = build(EntryOptions, parsed)
    if options.fine_tune and found is not None and found.zeroes_weights:
        raise ValueError(
            f"fine_tune must be false for method={method}, got fine_tune=True; training would fill its zeros"
        )
    if "recipe" in parsed and methods is not None and not (found is not None and found.sparse_ffns):
        raise ValueError(f"recipe must be left out for method={method}, got recipe={parsed['recipe']}")
    rest = {name: value for name, value in parsed.items() if name not in EntryOptions.__dataclass_fields__}
    targets = _numbers("sparsities", sparsities, source, float)
    for target in targets:
        check_fraction("sparsities", target)
    return Entry(options, rest, _numbers("seeds", seeds, source, int), (0.0,) if method == "dense" else targets)


def _numbers(name: str, values: Any, source: str, kind: type) -> tuple[Any, ...]:
    accepted = (int,) if kind is int else (int, float)
    fits = isinstance(values, list) and all(isinstance(v, accepted) and not isinstance(v, bool) for v in values)
    if not fits or not values:
        raise ValueError(f"{name} must be a list of numbers, got {name}={values!r} in {source}")
    return tuple(kind(value) for value in values)
