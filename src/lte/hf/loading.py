"""Saving and loading LTE models through `save_pretrained` and `from_pretrained`.

Every row of the family table gets a config and a model class of its own, made here from the row and
registered with the Auto classes when lte is imported. A saved folder is guarded twice against running dense
without lte:

1. its `model_type` (`lte_llama`) is unknown to stock transformers, so the Auto classes refuse it;
2. its activation field holds a sentence instead of a function's name, so naming a stock class outright
   (`LlamaForCausalLM.from_pretrained(folder)`), which only warns about a foreign `model_type`, fails too.

The models of all methods are saved in the same classes: `config.lte` holds the method's name and settings, and
`INSTALLERS` what builds its modules. A method that leaves a stock model keeps them in the stock config.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from lte.config import LteConfig, MethodConfig, current_settings
from lte.hf.card import CARD_FILE, MARKER, write_card
from lte.hf.checkpoints import reading, record_checksums, require_whole
from lte.hf.dense import forget_gguf_
from lte.hf.families import FAMILIES, Family, family_of
from lte.hf.install import sparse_ffns
from lte.hf.sparsity_curve import curve_of
from lte.hf.stepping import SteppingMixin
from lte.hf.threshold import set_sparsity_

INSTALLERS: dict[str, Callable[[Any, Family, dict[str, Any]], None]] = {}
"""What builds the modules of each method around a model's FFNs, by the method's name.

Called with the model, its family, and the settings in `config.lte`; `lte.methods` fills it.
"""

NO_KERNELS: dict[str, str] = {}
"""Why `lte.accelerate_` refuses a method's models, in words, by the method's name; `lte.methods` fills it."""

FP32_NAMES = {"router"}
"""Submodules and buffers that stay in fp32 whatever dtype a model is loaded in: they decide about neurons."""

# Models of which was said what a training without their routers does.
_warned: weakref.WeakSet[Any] = weakref.WeakSet()

# Folders of lte 0.1 go on differently after the colon, so only the start tells a guard.
_GUARD_START = " (an LTE model: "
_GUARD = (
    f"{_GUARD_START}install Learn-To-be-Efficient from its source, `import lte`, and load it with an Auto class or "
    "lte.sparse_class(YourClass))"
)
_PREFIX = "Lte"
# Engines that choose a model's class by the architecture's name, which in a folder is the stock one. Where lte is
# imported they know the `model_type`, too, and would take the folder for a dense one: there a config names the sparse
# class.
_ENGINES = ("vllm",)
_PLACE_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
_HUB_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr")


def method_settings(config: Any) -> dict[str, Any] | None:
    """The name and the settings of the method that made a model, as its config has them; `None` for a dense model.

    Args:
        config: stock or of a sparse class, of a folder that any version up to this one saved.

    Raises:
        ValueError: if a newer lte saved it.
    """
    found = getattr(config, "lte", None)
    found = getattr(config, "lte_method", None) if found is None else found
    return None if found is None else current_settings(found)


def _checked_measurement(found: Any) -> dict[str, Any] | None:
    """What `lte_measurement` holds, if it is what `lte.eval.models.measurement_summary` makes."""
    if not isinstance(found, dict | None):
        raise ValueError(f"lte_measurement must hold fields or be null, got lte_measurement={found!r}")
    for name in ("sparsity", "tokens", "active_fraction", "dead_experts", "always_on_experts"):
        value = (found or {}).get(name)
        several = name not in ("sparsity", "tokens")
        numbers = value if several and isinstance(value, list) else [value]
        if value is not None and (several != isinstance(value, list) or not all(map(_is_number, numbers))):
            rule = "a list of numbers" if several else "a number"
            raise ValueError(f"lte_measurement.{name} must be {rule} or null, got {name}={value!r}")
    unions = (found or {}).get("union_fraction")
    if unions is not None and not _are_unions(unions):
        raise ValueError(
            "lte_measurement.union_fraction must be null or hold texts and row, in each of them lists of shares by "
            f"numbers of tokens, got union_fraction={unions!r}"
        )
    return found


def _are_unions(found: Any) -> bool:
    """Whether it is the field `union_fraction` of a measurement: shares in [0, 1] of each layer, by tokens, by kind."""
    if not isinstance(found, dict) or not set(found) <= {"texts", "row"}:
        return False
    if not all(isinstance(kind, dict) for kind in found.values()):
        return False
    by_tokens = [pair for kind in found.values() for pair in kind.items()]
    return all(
        tokens.isdecimal()
        and int(tokens) > 1
        and isinstance(shares, list)
        and all(_is_number(share) and 0 <= share <= 1 for share in shares)
        for tokens, shares in by_tokens
    )


def _checked_curve(found: Any) -> dict[str, Any] | None:
    """What `lte_curve` holds. Its fields are read where they are needed: a model runs and is measured anew without."""
    if not isinstance(found, dict | None):
        raise ValueError(f"lte_curve must hold fields or be null, got lte_curve={found!r}")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class LteConfigMixin:
    """What a family's config gains.

    `lte` holds the name, the version and the settings of the method, or is None. `lte_measurement` is what was
    measured, or None. `lte_curve` is what was measured over the threshold, or None, with the point that was chosen.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        field = family_of(self).activation_field
        # What is no field of the config class itself, but kept in its file, comes with the other arguments.
        holder = kwargs if field in kwargs else vars(self)
        if field in holder:
            holder[field] = str(holder[field]).partition(_GUARD_START)[0]
        # Version 1 had a second place for the settings of other methods than LTE.
        settings, others = kwargs.pop("lte", None), kwargs.pop("lte_method", None)
        settings = others if settings is None else settings
        self.lte: dict[str, Any] | None = None if settings is None else current_settings(settings)
        self.lte_measurement: dict[str, Any] | None = _checked_measurement(kwargs.pop("lte_measurement", None))
        self.lte_curve: dict[str, Any] | None = _checked_curve(kwargs.pop("lte_curve", None))
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if any(engine in sys.modules for engine in _ENGINES):
            self.architectures = [
                f"{_PREFIX}{name.removeprefix(_PREFIX)}" for name in getattr(self, "architectures", None) or ()
            ]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the stock method, but what is wrong with a field is a sentence that names the folder.

        Raises:
            ValueError: if the fields are not those of a model.
        """
        with reading(kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "config.json"):
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """As the stock method, with the guard in the activation field and the stock `architectures`."""
        out = super().to_dict()  # type: ignore[misc]
        field = family_of(self).activation_field
        if field in out:
            out[field] = f"{out[field]}{_GUARD}"
        if out.get("architectures"):
            out["architectures"] = [name.removeprefix(_PREFIX) for name in out["architectures"]]
        return out


class LteModelMixin(SteppingMixin):
    """What a family's model class gains: wrapped FFNs made from the config, checked loading, atomic saving."""

    stock_class: type[Any]
    _keep_in_fp32_modules_strict = FP32_NAMES

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        install = _installer(config)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install(self, family_of(config))

    def train(self, mode: bool = True) -> Any:
        """As the stock method; in hard mode, outside of `lte.LteTrainer`, it says once what such a training moves."""
        if mode and not getattr(self, "_trains_routing", False) and self not in _warned:
            ffns = sparse_ffns(self)  # type: ignore[arg-type]
            if ffns and all(ffn.mode == "hard" for ffn in ffns.values()):
                _warned.add(self)
                warnings.warn(
                    "training this LTE model without lte.LteTrainer: its routers get no gradient and nothing holds its "
                    "sparsity, which drifts as the hidden states change. Call lte.calibrate_(model, texts) afterwards "
                    "to put the target back, or train with lte.LteTrainer (lte.RoutingMixin over another trainer)",
                    stacklevel=2,
                )
        return super().train(mode)  # type: ignore[misc]

    @property
    def target_sparsity(self) -> float:
        """Share of FFN neurons that a token shall skip, or what the method's own config says that it is."""
        return self.config.lte["target_sparsity"]  # type: ignore[attr-defined]

    @property
    def lte_config(self) -> LteConfig:
        """The model's `LteConfig`."""
        return LteConfig.from_dict(self.config.lte)  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        output_loading_info: bool = False,
        target_sparsity: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock method, but a folder that does not hold the whole model is an error.

        With `target_sparsity` the model runs at that point of the curve that its folder remembers, see
        `lte.set_sparsity_`.

        Raises:
            ValueError: if weights are missing (stock transformers warns and takes random ones), do not fit the config,
                are not finite, or a file is corrupt. With `ignore_mismatched_sizes=True` the head alone may not fit.
                For a `target_sparsity` that is not on the curve, or without a curve. For tensor parallelism over
                processes whose number does not divide that of the experts, or by transformers before 5.16.
        """
        name_or_path = pretrained_model_name_or_path
        if target_sparsity is not None:
            # Before gigabytes are read.
            given = kwargs.get("config")
            known = given if isinstance(given, LteConfigMixin) else cls._saved_config(name_or_path, kwargs)
            curve_of(known).at_target(target_sparsity)
        other_head = kwargs.pop("ignore_mismatched_sizes", False)
        # Of adapters `name_or_path` may be their base, and `info` is of the adapters alone.
        source = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path") or name_or_path
        with reading(source):
            model, info = super().from_pretrained(  # type: ignore[misc]
                name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
            fewer_layers = bool(info["unexpected_keys"]) and cls._has_other_depth(model, name_or_path, kwargs)
            require_whole(model, info, source, other_head=other_head, fewer_layers=fewer_layers)
            if getattr(model, "_hf_peft_config_loaded", False):
                cls.from_pretrained(next(iter(model.peft_config.values())).base_model_name_or_path, device_map="meta")
        for ffn in sparse_ffns(model).values():
            ffn.check_shares()
        cls._warn_of_other_class(model, name_or_path)
        if target_sparsity is not None:
            set_sparsity_(model, target_sparsity)
        return (model, info) if output_loading_info else model

    @classmethod
    def _has_other_depth(cls, model: Any, name_or_path: Any, arguments: Mapping[str, Any]) -> bool:
        """Whether the caller asked for another number of layers than the folder has."""
        try:
            saved = cls._saved_config(name_or_path, arguments)
        except OSError:  # A folder of adapters has none.
            return False
        return saved.num_hidden_layers != model.config.num_hidden_layers

    @classmethod
    def _saved_config(cls, name_or_path: Any, arguments: Mapping[str, Any]) -> Any:
        where = {name: arguments[name] for name in _PLACE_ARGUMENTS if name in arguments}
        config_class: Any = cls.config_class  # type: ignore[attr-defined]
        return config_class.from_pretrained(name_or_path, **where)

    @classmethod
    def _warn_of_other_class(cls, model: Any, name_or_path: Any) -> None:
        """Says that a folder was saved from a class of the user's own, which an Auto class does not know."""
        own = [name.removeprefix(_PREFIX) for name in model.config.architectures or ()]
        family = family_of(model.config)
        if own and cls.stock_class.__name__ not in own and not hasattr(family.module_of_models(), own[0]):
            warnings.warn(
                f"{name_or_path} was saved from the class {own[0]} and is loaded as {cls.stock_class.__name__}, "
                f"without what {own[0]} adds; lte.sparse_class({own[0]}).from_pretrained loads all of it",
                stacklevel=3,
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the stock class in place of the sparse one, which another process makes from it."""
        made: Any = super().__reduce_ex__(protocol)
        return (_new_sparse, (self.stock_class,), *made[2:])

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As the stock method, but a process that dies on the way leaves no folder that loads.

        Files are written to a hidden folder, in `save_directory` if that exists and beside it if not, and
        moved when complete, `config.json` last. A folder that was there is replaced when all files are
        written, not before. With `push_to_hub=True` the folder's new files are uploaded after that, to `repo_id`
        or a repository of the folder's name; the folder is there even if the upload fails.

        Raises:
            ValueError: if `save_directory` is a file.
            OSError: if writing fails, on a full disk say; what was there before is then still there.
        """
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"save_directory must be a folder, got save_directory={target}, which is a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        pushes = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        before = self._get_files_timestamps(target) if target.is_dir() else {}  # type: ignore[attr-defined]
        # In the folder itself if possible: it may be a mount point, and files move on one file system only.
        place = target if target.is_dir() else target.parent
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.partial-", dir=place) as partial:
            try:
                result = super().save_pretrained(partial, *args, **kwargs)  # type: ignore[misc]
            except (OSError, SafetensorError) as error:
                raise OSError(f"could not save to {target}, which is left as it was: {error}") from error
            if (Path(partial) / "config.json").exists():
                self._write_card(Path(partial), target)
            _add_checksums(Path(partial), target)
            publish_folder(Path(partial), target)
        if pushes and kwargs.get("is_main_process", True):
            repository = {name: hub.pop(name) for name in ("private",) if name in hub}
            repo_id = hub.pop("repo_id", target.resolve().name)
            repo_id = HfApi().create_repo(repo_id, exist_ok=True, token=kwargs.get("token"), **repository).repo_id
            self._upload_modified_files(target, repo_id, before, token=kwargs.get("token"), **hub)
        return result

    def _write_card(self, partial: Path, target: Path) -> None:
        """Writes the model card of `target` among the files that will replace its own."""
        own = target / CARD_FILE
        if not (own.exists() and MARKER not in own.read_text(encoding="utf-8", errors="replace")):
            write_card(partial, self.config, target.resolve().name)  # type: ignore[attr-defined]

    def _upload_modified_files(
        self, working_dir: Any, repo_id: str, files_timestamps: Any, *args: Any, token: Any = None, **kwargs: Any
    ) -> Any:
        """As the stock method, with our card in place of the empty one that `push_to_hub` makes."""
        card = Path(working_dir) / CARD_FILE
        ours = not card.exists() or MARKER in card.read_text(encoding="utf-8", errors="replace")
        if ours or not HfApi().file_exists(repo_id, CARD_FILE, token=token):
            card.unlink(missing_ok=True)
            write_card(working_dir, self.config, repo_id.rpartition("/")[2])  # type: ignore[attr-defined]
        return super()._upload_modified_files(  # type: ignore[misc]
            working_dir, repo_id, files_timestamps, *args, token=token, **kwargs
        )


def _installer(config: Any) -> Callable[[Any, Family], None]:
    """What builds the wrapped FFNs that a config asks for."""
    settings = method_settings(config)
    if settings is None:
        raise ValueError(
            "config.lte must hold the settings of a method, got None; start from a dense model with sparsify_"
        )
    if settings["name"] not in INSTALLERS:
        raise ValueError(
            f"config.lte must name one of {', '.join(INSTALLERS)}, got name={settings['name']}; import the module that "
            "registers it"
        )
    return lambda model, family: INSTALLERS[settings["name"]](model, family, settings)


def _variant(name: str) -> str | None:
    """Which variant's weights a file holds or lists, "" for the main ones; `None` for other files."""
    found = re.fullmatch(r"model(?:\.(.+?))??(?:-\d{5}-of-\d{5})?\.safetensors", name)
    found = found or re.fullmatch(r"model\.safetensors\.index(?:\.(.+))?\.json", name)
    return None if found is None else found[1] or ""


def _stale_weights(names: Iterable[str], target: Path) -> list[str]:
    """The weight files of `target` that new ones of the same variant replace; other variants stay."""
    replaced = {_variant(name) for name in names} - {None}
    there = [path.name for path in target.glob("model*") if path.name not in names]
    return [name for name in there if _variant(name) in replaced]


def _add_checksums(partial: Path, target: Path) -> None:
    """Writes the checksums of what `target` will hold when the files of `partial` are in it, the card left out."""
    names = {path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()} - {CARD_FILE}
    if not names:
        return
    record_checksums(partial, names, known_in=target, gone=_stale_weights(names, target))


def publish_folder(partial: Path, target: Path) -> None:
    """Moves the files of `partial` into `target` on the same file system so that `config.json` appears last.

    Without a `config.json` in `partial` (adapters alone, or no main process) the model in `target` stays.
    """
    names = {path.name for path in partial.iterdir()}
    if not names:
        return
    target.mkdir(exist_ok=True)
    if "config.json" in names:
        (target / "config.json").unlink(missing_ok=True)
        for name in _stale_weights(names, target):
            (target / name).unlink()
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            path.replace(target / path.name)


def is_ours(model: Any) -> bool:
    """Whether LTE or another method that is no stock model made it."""
    return isinstance(model, LteModelMixin)


def become_sparse_(model: Any, family: Family, config: MethodConfig) -> None:
    """Gives a stock model with the modules of a method installed the family's sparse model and config classes."""
    own_config_(model)
    model.config.__class__ = _CONFIG_CLASSES[family.model_type]
    model.config.lte = config.to_dict()
    model.config.lte_measurement = model.config.lte_curve = None
    vars(model.config).pop("lte_method", None)
    forget_gguf_(model)
    model.__class__ = _sparse_model_class(type(model), family)
    model._keep_in_fp32_modules_strict = set(FP32_NAMES)


def become_dense_(model: Any, family: Family) -> Any:
    """Gives a sparse model its stock classes back and returns the stock config; the caller replaces the modules."""
    # A loaded classifier of a decoder holds a sparse model of its own.
    for module in [module for module in model.modules() if isinstance(module, LteModelMixin)]:
        module.__class__ = module.stock_class
    own_config_(model)
    model.config.__class__ = family.stock_class(family.config_class)
    for name in ("lte", "lte_measurement", "lte_curve"):
        vars(model.config).pop(name, None)
    if names := getattr(model.config, "architectures", None):
        model.config.architectures = [name.removeprefix(_PREFIX) for name in names]
    return model.config


def own_config_(model: Any) -> Any:
    """Replaces the config by a copy: models made by `from_config` share the object, a dense teacher's say."""
    shared = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    return own


_CONFIG_CLASSES: dict[str, type] = {}
_MODEL_CLASSES: dict[type, type] = {}


def _sparse_model_class(stock: type[nn.Module], family: Family) -> type:
    """The sparse subclass of a stock model class or of a user's own, made on first use."""
    if stock not in _MODEL_CLASSES:
        name = f"{_PREFIX}{stock.__name__}"
        body = {
            "config_class": _CONFIG_CLASSES[family.model_type],
            "stock_class": stock,
            "__module__": __name__,
            "__doc__": stock.__doc__,
        }
        _MODEL_CLASSES[stock] = type(name, (LteModelMixin, stock), body)
        _keep_renamings(stock.__name__, name)
    return _MODEL_CLASSES[stock]


def sparse_class(stock: type[nn.Module]) -> type:
    """The sparse class of a model class of transformers, or of your own subclass of one.

    The Auto classes load every head that they know. `lte.sparse_class(MyModel).from_pretrained(folder)` loads what was
    saved from a class of your own, with all that it adds.

    Raises:
        ValueError: for a class of no family that lte converts.
    """
    if issubclass(stock, LteModelMixin):
        return stock
    config_class = getattr(stock, "config_class", None)
    model_type = getattr(config_class, "model_type", None)
    if model_type not in FAMILIES:
        raise ValueError(
            f"stock must be a model class of the families {', '.join(FAMILIES)}, got stock={stock.__name__}"
        )
    return _sparse_model_class(stock, FAMILIES[model_type])


def _new_sparse(stock: type[nn.Module]) -> Any:
    """An empty object of the sparse class, which `pickle` fills."""
    made: Any = sparse_class(stock)
    return made.__new__(made)


def _keep_renamings(stock: str, sparse: str) -> None:
    """Gives a sparse class or `model_type` the stock one's own names for files, GPT-NeoX's `embed_out` say."""
    renamings = get_checkpoint_conversion_mapping(stock)
    if renamings is not None:
        register_checkpoint_conversion_mapping(sparse, renamings, overwrite=True)


def register_families() -> None:
    """Registers a config and a model class for every row of the family table with the Auto classes."""
    for family in FAMILIES.values():
        stock_config = family.stock_class(family.config_class)
        name = f"{_PREFIX}{family.config_class}"
        body = {
            "model_type": family.sparse_model_type,
            "__module__": __name__,
            "__doc__": stock_config.__doc__,
        }
        config_class = type(name, (LteConfigMixin, stock_config), body)
        _CONFIG_CLASSES[family.model_type] = globals()[name] = config_class
        transformers.AutoConfig.register(family.sparse_model_type, config_class, exist_ok=True)
        _keep_renamings(family.model_type, family.sparse_model_type)
        for auto_name, stock_name in family.heads.items():
            model_class = _sparse_model_class(family.stock_class(stock_name), family)
            # Importable by its name, as models that earlier versions pickled need it.
            globals()[model_class.__name__] = model_class
            getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)


register_families()
