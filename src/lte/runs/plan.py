"""The runs of a comparison, in an order in which each finds what it starts from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields, replace
from typing import Any

from lte.config import LteConfig
from lte.data.config import DataConfig
from lte.data.mix import read_mix
from lte.data.tasks.registry import TaskConfig, get_task
from lte.data.tasks.task import GenerationTask
from lte.methods import METHODS, MethodConfig
from lte.runs.settings import ComparisonSettings, Entry, EntryOptions, TeachingOptions
from lte.settings import build
from lte.train.combinations import check_combination
from lte.train.config import TrainConfig


def affects(field: Field[Any]) -> str:
    """What depends on a setting: `weights` of any model, `routing` alone, or `nothing` that is saved.

    A setting that says nothing, and so every new one, counts for all models.
    """
    return getattr(field.metadata.get("help"), "affects", "weights")


_TRAINING = [field for cls in (TaskConfig, DataConfig, TrainConfig, TeachingOptions) for field in fields(cls)]
_LEARNING = {field.name for field in _TRAINING if affects(field) == "weights"}


@dataclass(frozen=True)
class Run:
    """One model: what it is made from, and how.

    Attributes:
        name: of its record and its folder, `<label>-<target>-seed<seed>`.
        options: of its entry; those of a dense model for what others start from.
        target: share of FFN neurons to skip.
        seed: of data order, dropout, grouping, routers and new heads.
        values: all settings.
        base: name of the run that it starts from, `None` for the model of the comparison.
        teacher: name of the run, or of a dense model, that it is distilled from.
        trains: whether it trains after the method is applied.
        relu: whether its FFNs get ReLU before that.
        measured: whether it has a record.
        fingerprint: of everything that decides its weights.
    """

    name: str
    options: EntryOptions
    target: float
    seed: int
    values: dict[str, Any]
    base: str | None
    teacher: str | None
    trains: bool
    relu: bool
    measured: bool
    fingerprint: str = ""

    @property
    def is_start(self) -> bool:
        """Whether it is the fine-tuning of its seed that others start from."""
        return self.base is None and not self.measured and self.options.name == "start"

    @property
    def method(self) -> str:
        """`dense` or one of `lte.methods.METHODS`."""
        return self.options.method

    @property
    def recipe(self) -> str:
        """What `TrainConfig` calls its training."""
        if self.has_routers:
            return self.values.get("recipe", TrainConfig.recipe)
        return "dense" if self.leaves_stock else "method"

    @property
    def has_routers(self) -> bool:
        """Whether its method is one of trained routers, LTE that is."""
        return self.method in METHODS and METHODS[self.method].sparse_ffns

    @property
    def leaves_stock(self) -> bool:
        """Whether the model is a stock one."""
        return self.method not in METHODS or METHODS[self.method].leaves_stock

    @property
    def train_config(self) -> TrainConfig:
        """Of its training."""
        return build(TrainConfig, {**self.values, "recipe": self.recipe, "seed": self.seed})

    @property
    def stages(self) -> tuple[int, ...]:
        """Which stages run."""
        stages = build(TeachingOptions, self.values).stages
        return (1, 2) if stages == "both" else (int(stages),)

    @property
    def method_config(self) -> MethodConfig | None:
        """Of its method; `None` of a dense model."""
        if self.method not in METHODS:
            return None
        values = {**self.values, "target_sparsity": self.target, "seed": self.seed}
        config = build(METHODS[self.method].config, values)
        if isinstance(config, LteConfig):
            config.check_new()
        return config

    @property
    def data_config(self) -> DataConfig:
        """How its data becomes rows."""
        return build(DataConfig, self.values)

    @property
    def task_config(self) -> TaskConfig:
        """Its task, if it has one."""
        return build(TaskConfig, self.values)

    @property
    def calibration_answers(self) -> int:
        """Of how many of its own answers the thresholds are set on, 0 where on none."""
        config = self.train_config
        task = self.task_config.task
        writes = task is not None and isinstance(get_task(task), GenerationTask)
        return config.calibration_answers if writes and self.trains and config.sets_thresholds(self.stages) else 0

    def check(self) -> Run:
        """Raises a `ValueError` for settings that do not fit each other; returns itself."""
        config = self.train_config
        _ = self.data_config, self.task_config, self.stages, self.method_config
        if bool(config.distillation_weight) != bool(self.teacher):
            raise ValueError(
                "distillation_weight must be positive with distill_from and 0 without, got "
                f"distillation_weight={config.distillation_weight:g} and distill_from={self.teacher} for {self.name}"
            )
        if self.has_routers and self.trains:
            check_combination(
                self.method_config,  # type: ignore[arg-type]
                config,
                self.stages,
                distils=bool(self.teacher),
                sequence_length=self.data_config.sequence_length,
                new_routers=True,
            )
        return self


def plan_runs(comparison: ComparisonSettings) -> tuple[Run, ...]:
    """All runs, seed by seed, each after those that it needs.

    Raises:
        ValueError: for settings that do not fit each other, or two runs of one name.
    """
    return _Planner(comparison).plan()


def parents_of(run: Run, runs: Sequence[Run]) -> list[Run]:
    """The runs whose models a run needs: what it starts from, and its teacher."""
    return [other for other in runs if other.name in (run.base, run.teacher)]


def children_of(run: Run, runs: Sequence[Run]) -> list[Run]:
    """The runs that need a run's model."""
    return [other for other in runs if run.name in (other.base, other.teacher)]


class _Planner:
    def __init__(self, comparison: ComparisonSettings):
        self.comparison = comparison
        self.runs: dict[str, Run] = {}
        # Dense controls by what they learn.
        self.controls: dict[str, str] = {}

    def plan(self) -> tuple[Run, ...]:
        entries = self.comparison.entries
        for seed in sorted({seed for entry in entries for seed in entry.seeds}):
            listed = [entry for entry in entries if seed in entry.seeds]
            # Controls that have a record serve as base, so they come before what starts from them.
            for entry in sorted(listed, key=lambda entry: not self._is_control(entry)):
                for target in entry.sparsities:
                    self._add_entry(entry, seed, target)
        return tuple(self.runs.values())

    @staticmethod
    def _is_control(entry: Entry) -> bool:
        return entry.options.method == "dense" and entry.options.trains and entry.options.base != "dense"

    def _add_entry(self, entry: Entry, seed: int, target: float) -> None:
        options = entry.options
        values = {**self.comparison.defaults, **self.comparison.train, **entry.values}
        if values.get("distill_from"):
            values.setdefault("distillation_weight", 1.0)
        wanted = options.base or ("start" if options.trains else "dense")
        start = self._start(seed)
        base = start if wanted == "start" else self._control(entry, seed, values)
        name = f"{options.name}-{target:g}-seed{seed}"
        if name in self.runs:
            raise ValueError(f"label must differ from that of other methods, got two runs {name}; give one a label")
        teacher = self._teacher(values, start) if options.trains else None
        if not options.trains:
            values = {**values, "distill_from": None, "distillation_weight": 0.0}
        # A control that is the base has it already.
        relu = options.relu and wanted == "start"
        self._add(Run(name, options, target, seed, values, base, teacher, options.trains, relu, True))
        if self._is_control(entry):
            self.controls.setdefault(_learning_key(values, options.relu, seed), name)

    def _teacher(self, values: dict[str, Any], start: str | None) -> str | None:
        teacher = values.get("distill_from")
        return (start or self.comparison.model) if teacher == "start" else teacher

    def _start(self, seed: int) -> str | None:
        """The dense model of a seed that everything starts from; `None` for that of the comparison as it is."""
        if self.comparison.start is None:
            return None
        name = f"start-seed{seed}"
        if name not in self.runs:
            values = {**self.comparison.defaults, **self.comparison.start}
            values |= {"distill_from": None, "distillation_weight": 0.0}
            options = EntryOptions(method="dense", label="start")
            self._add(Run(name, options, 0.0, seed, values, None, None, True, False, False))
        return name

    def _control(self, entry: Entry, seed: int, values: dict[str, Any]) -> str:
        """The dense model that trained as long as the methods that train."""
        key = _learning_key(values, entry.options.relu, seed)
        if key not in self.controls:
            name = f"control{'-relu' * entry.options.relu}-seed{seed}"
            if name in self.runs:
                name = f"control-{entry.options.name}-seed{seed}"
            options = EntryOptions(method="dense", label="control", relu=entry.options.relu)
            start = self._start(seed)
            teacher = self._teacher(values, start)
            known = {field.name: values[field.name] for field in _TRAINING if field.name in values}
            self._add(Run(name, options, 0.0, seed, known, start, teacher, True, options.relu, False))
            self.controls[key] = name
        return self.controls[key]

    def _add(self, run: Run) -> None:
        run.check()
        self.runs[run.name] = replace(run, fingerprint=self._fingerprint(run))

    def _fingerprint(self, run: Run) -> str:
        settings = {}
        for config in (run.task_config, run.data_config, run.train_config, run.method_config):
            for field in fields(config) if config is not None else ():
                if affects(field) != "nothing":
                    settings[f"{type(config).__name__}.{field.name}"] = getattr(config, field.name)
        settings["TrainConfig.calibration_answers"] = run.calibration_answers
        settings["stages"] = run.stages
        if run.data_config.mix is not None:
            settings["mix"] = [part.described() for part in read_mix(run.data_config)]
        parts = {
            "model": self.comparison.model,
            "method": [run.method, run.target, run.seed, run.trains, run.relu],
            "parents": [self.runs[name].fingerprint if name in self.runs else name for name in (run.base, run.teacher)],
            "settings": settings,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _learning_key(values: dict[str, Any], relu: bool, seed: int) -> str:
    """What decides how a dense model trains on."""
    learning = {name: value for name, value in sorted(values.items()) if name in _LEARNING and value is not None}
    return json.dumps([learning, relu, seed])
