"""What a baseline is, and how one is applied to a model.

To add a method, add a file to this package (or import one of your own): a config with a `name`, and
`register(Method(...))`. Saving, loading, measured costs, training, and the tests of all methods need no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lte.config import check_choice, check_fraction
from lte.hf.convert import require_dense
from lte.hf.families import Family, dense_ffns
from lte.hf.install import StockFfn, install_wrapped_ffns_, num_neurons
from lte.hf.loading import FP32_NAMES, INSTALLERS, become_method_, own_config_
from lte.nn.wrapped_ffn import WrappedFfn

CONFIG_VERSION = 1

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Settings of a method; a subclass adds its own and sets `name`.

    Attributes:
        target_sparsity: share that shall be skipped, in [0, 1): of FFN neurons where the method does not say otherwise.
    """

    name: ClassVar[str]
    target_sparsity: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("target_sparsity", self.target_sparsity)

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready, with the method's name and the format's version."""
        return {"name": self.name, "version": CONFIG_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: if another method or a newer lte wrote it, or a field is unknown.
        """
        values = dict(data)
        name, version = values.pop("name", None), values.pop("version", None)
        if name != cls.name:
            raise ValueError(f"name must be {cls.name}, got name={name!r}; read it with the config of that method")
        if version != CONFIG_VERSION:
            raise ValueError(f"version must be {CONFIG_VERSION}, got version={version!r}; upgrade lte")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"a config of {cls.name} must hold its own fields, got {', '.join(unknown)}")
        return cls(**values)


Install = Callable[[Any, Family, Any], None]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method, by what it does to a dense model. All functions work in place and take the method's config.

    Attributes:
        config: its config class.
        install: puts the modules of the method around the model's FFNs, on any device; called again when a saved
            folder is loaded, whose weights then fill their parameters and buffers. `None`: it leaves a stock model.
        prepare: changes the dense model before, on calibration batches where it needs some: groups experts, or prunes.
        fit: sets parameters and buffers of the installed modules on calibration batches.
        needs_calibration: whether it takes calibration batches, by the config.
        fp32_names: of its submodules and buffers that stay in fp32 when a folder is loaded in another dtype.
        zeroes_weights: whether what it saves is weights that are 0; dense models have some by chance, to no avail.
        trained: whether it is meant to train with `lte.train.two_stage`, `recipe="method"`, afterwards.
    """

    config: type[MethodConfig]
    install: Install | None = None
    prepare: Callable[[Any, Any, Batches], object] | None = None
    fit: Callable[[Any, Any, Batches], object] | None = None
    needs_calibration: Callable[[Any], bool] = lambda config: False
    trained: bool = False
    zeroes_weights: bool = False
    fp32_names: tuple[str, ...] = ()


METHODS: dict[str, Method] = {}
"""All methods by name."""


def register(method: Method) -> Method:
    """Adds a method to `METHODS`, and what loads its folders.

    Raises:
        ValueError: if another method has its name.
    """
    name, install = method.config.name, method.install
    if name in METHODS and METHODS[name].config is not method.config:
        raise ValueError(f"name must be new, got name={name}, which {METHODS[name].config.__name__} has; take another")
    METHODS[name] = method
    FP32_NAMES.update(method.fp32_names)
    if install is not None:
        INSTALLERS[name] = lambda model, family, data: install(model, family, method.config.from_dict(data))
    return method


def wraps_ffns(build: Callable[[StockFfn, Any], WrappedFfn]) -> Install:
    """The `install` of a method that is one class of FFN, built from a stock FFN and the config."""
    return lambda model, family, config: install_wrapped_ffns_(model, family, lambda stock: build(stock, config))


def config_of(model: nn.Module) -> MethodConfig | None:
    """The config of the method that made a model, saved and loaded or not; `None` for a dense or LTE model."""
    data = getattr(getattr(model, "config", None), "lte_method", None)
    if data is None:
        return None
    check_choice("config.lte_method name", data.get("name"), tuple(METHODS))
    return METHODS[data["name"]].config.from_dict({key: data[key] for key in data if key != "dense_neurons"})


def apply_method_(
    model: nn.Module, config: MethodConfig, calibration: Iterable[Mapping[str, Tensor]] | None = None
) -> nn.Module:
    """Turns a dense Hugging Face model into one of a method in place and returns it.

    `save_pretrained` then saves it. The folder loads after `import lte` and nowhere else, but where the method leaves a
    stock model (static pruning, Wanda).

    Args:
        model: a dense model of a family in `lte.hf.families.FAMILIES`.
        config: which method, and its settings.
        calibration: batches (keyword arguments of the model, [B, T]) for methods that take some. Tokens of padding do
            not count.

    Raises:
        ValueError: for an unknown method, a model that is not dense, missing calibration, or settings that do not fit
            the model, which is then unchanged; and if what is fitted does not come out finite.
    """
    check_choice("method", getattr(config, "name", type(config).__name__), tuple(METHODS))
    method = METHODS[config.name]
    family = require_dense(model)
    batches = _on_device(model, calibration)
    if method.needs_calibration(config) and not batches:
        raise ValueError(f"{config.name} must get calibration batches, got none; pass calibration")
    neurons = num_neurons(next(iter(dense_ffns(model, family).values())), family.layout)
    if method.prepare is not None:
        method.prepare(model, config, batches)
    if method.install is None:
        own_config_(model).lte_method = {**config.to_dict(), "dense_neurons": neurons}
        return model
    method.install(model, family, config)
    become_method_(model, family, config.to_dict())
    if method.fit is not None:
        method.fit(model, config, batches)
    return model


def refit_(model: nn.Module, calibration: Iterable[Mapping[str, Tensor]]) -> nn.Module:
    """Fits thresholds or predictors of a model anew in place, after its weights were trained, and returns it.

    Args:
        model: of a method that fits something.
        calibration: as for `apply_method_`.

    Raises:
        ValueError: for a model of which nothing was fitted, or no calibration batch.
    """
    config = config_of(model)
    fit = None if config is None else METHODS[config.name].fit
    if config is None or fit is None:
        name = "none" if config is None else config.name
        raise ValueError(f"model must be of a method that fits something, got {name}")
    batches = _on_device(model, calibration)
    if not batches:
        raise ValueError(f"{config.name} must get calibration batches, got none; pass calibration")
    fit(model, config, batches)
    return model


def _on_device(model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | None) -> Batches:
    device: torch.device = next(model.parameters()).device
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches or ()]
