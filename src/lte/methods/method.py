"""What a method is, and the verbs that work on the models of all of them.

To add a method, add a file to this package (or import one of your own): a config with a `name`, and
`register(Method(...))`. Saving, loading, measured costs, calibration, training, and the tests of all methods need no
more; docs/methods.md follows an example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lte.config import LteConfig, MethodConfig, check_choice, check_fraction
from lte.data.batches import as_batches
from lte.hf.convert import require_dense, unwrap_ffns_
from lte.hf.families import Family, dense_ffns, family_of
from lte.hf.inputs import unwrapped
from lte.hf.install import StockFfn, install_wrapped_ffns_, num_neurons
from lte.hf.loading import (
    FP32_NAMES,
    INSTALLERS,
    NO_KERNELS,
    become_dense_,
    become_sparse_,
    is_ours,
    method_settings,
    own_config_,
)
from lte.nn.all_or_nothing import all_or_nothing, keep_numbers, on_failure
from lte.nn.laid_out import BUFFERS, LaidOutFfn
from lte.nn.metering import metered_modules
from lte.nn.wrapped_ffn import WrappedFfn

__all__ = [
    "METHODS",
    "Batches",
    "Method",
    "MethodConfig",
    "calibrate_",
    "config_of",
    "densify_",
    "method_of",
    "register",
    "sparsify_",
    "wraps_ffns",
]

Batches = list[dict[str, Tensor]]
Install = Callable[[Any, Family, Any], None]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method, by what it does to a dense model. All functions work in place and take the method's config.

    Attributes:
        config: its config class.
        about: what it skips for each token, or removes, in a few words for the reader.
        prepare: changes the dense model before, on calibration batches where it needs some: groups experts, or prunes.
        install: puts the modules of the method around the model's FFNs, on any device; called again when a saved
            folder is loaded, whose weights then fill their parameters and buffers. `None`: it leaves a stock model.
        remove: takes the modules off again and leaves the stock ones, called with the model, its family and the stock
            config.
        fit: sets parameters and buffers of the installed modules on calibration batches, when a model is made and each
            time that it is calibrated.
        calibrate: what `calibrate_` does instead of `fit`, where a new model needs no fit.
        needs_calibration: whether `sparsify_` must get calibration batches, by the config.
        fp32_names: of its submodules and buffers that stay in fp32 when a folder is loaded in another dtype.
        trained: whether it is meant to be trained afterwards.
        sparse_ffns: whether its modules are `SparseFfn`s. Their routers are trained by the recipes of
            `lte.train.config.TrainConfig` ("method" is for all others), the inspector's page shows them, and the
            kernels run them.
        no_kernels: why no kernel runs its models; of no account with `sparse_ffns`.
        removes_neurons: whether it leaves a stock model of fewer neurons, which is faster as it is.
        zeroes_weights: whether what it saves is weights that are 0; dense models have some by chance, to no avail.
    """

    config: type[MethodConfig]
    about: str = "neurons, by its own rule"
    prepare: Callable[[Any, Any, Batches], object] | None = None
    install: Install | None = None
    remove: Callable[[Any, Family, Any], object] = unwrap_ffns_
    fit: Callable[[Any, Any, Batches], object] | None = None
    calibrate: Callable[[Any, Any, Batches], object] | None = None
    needs_calibration: Callable[[Any], bool] = lambda config: False
    fp32_names: tuple[str, ...] = ()
    trained: bool = False
    sparse_ffns: bool = False
    no_kernels: str = "its products are computed densely and masked"
    removes_neurons: bool = False
    zeroes_weights: bool = False

    @property
    def leaves_stock(self) -> bool:
        """Whether its models are stock ones, in which no module of the method is left to measure or take off."""
        return self.install is None

    @property
    def is_timed(self) -> bool:
        """Whether the time of its models says what the method is worth: on the kernels, or as a smaller model."""
        return self.sparse_ffns or self.removes_neurons

    def abilities(self) -> list[str]:
        """What the library can do with its models, a sentence each, for `lte inspect`."""
        name = self.config.name
        kernels = "`lte.accelerate_` and `lte bench` run it on the kernels" if self.sparse_ffns else ""
        kernels = kernels or f"`lte.accelerate_` has no kernels for {name}: {self.no_kernels}"
        if self.leaves_stock:
            kernels += "; `lte bench` times it as the dense model that it is"
        page = "shows which experts a text switches on" if self.sparse_ffns else "shows routers of LTE alone"
        dense = "`lte.densify_` makes it dense again"
        if self.leaves_stock:
            dense = "`lte.densify_` cannot make it dense again: what it took from the weights is gone"
        calibration = "`lte.calibrate_` sets it anew on other text"
        if self.fit is None and self.calibrate is None:
            calibration = "`lte.calibrate_` has nothing to set"
        if self.sparse_ffns:
            calibration += "; `lte calibrate` measures other thresholds, among which you choose when you load it"
        return [
            "`lte eval` measures its quality, sparsity and cost.",
            f"{kernels}.",
            f"`lte inspect --text` {page}.",
            f"{dense}.",
            f"{calibration}.",
        ]


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
    if not method.sparse_ffns:
        NO_KERNELS[name] = method.no_kernels
    return method


def wraps_ffns(build: Callable[[StockFfn, Any], WrappedFfn]) -> Install:
    """The `install` of a method that is one class of FFN, built from a stock FFN and the config."""
    return lambda model, family, config: install_wrapped_ffns_(model, family, lambda stock: build(stock, config))


def config_of(model: nn.Module) -> MethodConfig | None:
    """The config of the method that made a model, saved and loaded or not; `None` for a dense model."""
    data = method_settings(getattr(model, "config", None))
    if data is None:
        return None
    check_choice("config.lte name", data["name"], tuple(METHODS))
    return METHODS[data["name"]].config.from_dict({key: data[key] for key in data if key != "dense_neurons"})


def method_of(model: nn.Module) -> Method | None:
    """The method that made a model; `None` for a dense one."""
    config = config_of(model)
    return None if config is None else METHODS[config.name]


def sparsify_(
    model: nn.Module,
    config: MethodConfig | None = None,
    *,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
) -> nn.Module:
    """Turns a dense Hugging Face model into one of a method in place and returns it.

    With an `LteConfig` neurons are grouped into experts and permuted so that each expert is contiguous, and every FFN
    gets a router whose experts all start active: in hard mode the model still computes what it computed before. Other
    configs are of other methods (`lte.methods.METHODS`).

    `save_pretrained` then saves the model. The folder loads after `import lte` and nowhere else, unless the method
    leaves a stock model, as static pruning and Wanda do.

    Args:
        model: a transformers model of a family in `lte.hf.families.FAMILIES`, with floating-point weights; LoRA
            adapters of peft may be around it.
        config: which method, and its settings; `None` takes `LteConfig()`.
        calibration: batches (keyword arguments of the model, [B, T]) for methods and groupings that take some. Tokens
            of padding do not count.

    Raises:
        ValueError: for an unknown method or family, a model with nothing to convert or already converted, quantised
            weights, missing calibration, or settings that do not fit the model, which is then unchanged; and if what
            is fitted does not come out finite.
    """
    wrapper, model = model, unwrapped(model)
    config = config or LteConfig()
    check_choice("method", getattr(config, "name", type(config).__name__), tuple(METHODS))
    method = METHODS[config.name]
    family = require_dense(model)
    batches = _on_device(model, calibration)
    if method.needs_calibration(config) and not batches:
        raise ValueError(f"{config.name} must get calibration batches, got none; pass calibration")
    with all_or_nothing(wrapper):
        _make_(model, method, family, config, batches)
        # The model inside has a config of its own now.
        for outer in (wrapper, getattr(wrapper, "base_model", wrapper)):
            if hasattr(outer, "peft_config"):
                outer.config = model.config
        if method.fit is not None and method.install is not None:
            method.fit(model, config, batches)
    return wrapper


def _make_(model: Any, method: Method, family: Family, config: Any, batches: Batches) -> None:
    """Makes a dense model one of a method, but for what is fitted."""
    neurons = num_neurons(next(iter(dense_ffns(model, family).values())), family.layout)
    if method.prepare is not None:
        method.prepare(model, config, batches)
    if method.install is None:
        own: Any = own_config_(model)
        vars(own).pop("lte_method", None)
        own.lte = {**config.to_dict(), "dense_neurons": neurons}
    else:
        method.install(model, family, config)
        become_sparse_(model, family, config)


def densify_(model: nn.Module) -> nn.Module:
    """Turns a model of a method into a stock dense model in place, drops routers and thresholds, and returns it.

    All neurons run for every token afterwards, and biases that stood for dropped ones where the family has none
    (`LteConfig.dropped_bias`) go. Those that were grouped into experts stay in their permuted order, which
    leaves the function as it is. An accelerated model is first decelerated.

    Raises:
        ValueError: if `model` is dense, or of a method that took something from its weights for good.
    """
    method = method_of(model)
    if method is not None and method.install is None:
        raise ValueError(
            f"model must hold its dense weights to become dense again, got one of the method {method.config.name}, "
            f"which changed them for good ({method.about}); load the dense model again"
        )
    if method is None or not is_ours(model):
        raise ValueError(
            f"model must be an LTE model or one of another method, got {type(model).__name__}, a dense one"
        )
    family = family_of(model.config)
    for module in model.modules():
        if isinstance(module, LaidOutFfn):
            # What is kept for a failure would hold the copies.
            module.release_()
    with all_or_nothing(model):
        stock_config = become_dense_(model, family)
        method.remove(model, family, stock_config)
    return model


def calibrate_(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    target_sparsity: float | None = None,
    max_tokens: int | None = 131072,
    batch_size: int = 8,
) -> nn.Module:
    """Sets what a model decides by, thresholds or predictors, so that it meets its target on a text; returns the model.

    A later fine-tuning moves the hidden states, and with them the sparsity. This puts the target back, in place: the
    thresholds of LTE are shifted, other methods fit what they fitted when the model was made.

    Args:
        model: of a method that has something to set; adapters of peft may be around it.
        data: a list of texts, rows with `input_ids` (a `datasets.Dataset`, or any iterable), or batches of tensors
            [B, T]. Tokens of padding, and in models that predict the next token those with a label of -100, do not
            count for LTE; for other methods those of padding alone.
        tokenizer: for texts.
        target_sparsity: the new target; `None` keeps that of the model's config.
        max_tokens: about how many tokens to look at, spread evenly over a data set that has a length, else the first
            ones; `None` takes all.
        batch_size: rows per pass, for texts and rows.

    Raises:
        ValueError: for a dense model, a method that has nothing to set, a target outside [0, 1), texts without a
            tokenizer, or data without a token.
    """
    config, method = config_of(model), method_of(model)
    action = None if method is None else method.calibrate or method.fit
    if config is None or action is None:
        name = "a dense one" if config is None else f"one of the method {config.name}"
        raise ValueError(f"model must be of a method that has thresholds or predictors to set, got {name}")
    if target_sparsity is not None:
        check_fraction("target_sparsity", target_sparsity)
        config = replace(config, target_sparsity=target_sparsity)
    rows = as_batches(data, model, batch_size, tokenizer=tokenizer, max_tokens=max_tokens)
    batches = _on_device(model, rows)
    if not batches:
        raise ValueError(f"{config.name} must get calibration data, got none; pass texts, rows or batches")
    with all_or_nothing(model):
        keep_numbers(tensor for module in metered_modules(model).values() for tensor in _own_tensors(module))
        for module in metered_modules(model).values():
            module.target_sparsity = config.target_sparsity
        action(model, config, batches)
        own: Any = model.config
        kept = {name: getattr(own, name, None) for name in ("lte", "lte_measurement", "lte_curve")}
        on_failure(lambda: vars(own).update(kept))
        # The routers' biases were others when its curve over the threshold was measured.
        own.lte, own.lte_measurement, own.lte_curve = config.to_dict(), None, None
    return model


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and saved buffers that a method has added to a model's own projections."""
    stock = module.layout.parts if isinstance(module, WrappedFfn) else ("weight", "bias")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not name.startswith(tuple(f"{part}." for part in stock)) and name not in (*stock, *BUFFERS):
            yield tensor


def _on_device(model: nn.Module, batches: Iterable[Mapping[str, Tensor]] | None) -> Batches:
    device: torch.device = next(model.parameters()).device
    return [
        {key: value.to(device) for key, value in batch.items() if torch.is_tensor(value)} for batch in batches or ()
    ]
