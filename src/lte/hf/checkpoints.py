"""Whether files hold a whole model, and sentences that name the file and the way out for what stops them from loading.

Stock transformers fills what a checkpoint lacks with random numbers and goes on; here that is an error. Whatever a
library raises while it reads a model goes through `reading`, the one place that turns it into a sentence.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lte.files import Checksums, checksums, damage, write_json_atomic
from lte.hf.tensor_files import safetensors_files

CHECKSUM_FILE = "lte_checksums.json"
"""Holds size and SHA-256 of a saved folder's files, by name; stock tools pass it by."""

_JSON_FILES = (
    *("config.json", "generation_config.json", "*.safetensors.index*.json", "adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
)
_WEIGHT_FILES = ("model*.safetensors", "adapter_model*.safetensors")
_REAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_AGAIN = "copy, download or save the folder again"


class UnreadableModelError(ValueError, OSError):
    """Files that hold no whole model; the message names the file and the way out."""


@contextmanager
def reading(source: Any, what: str = "model") -> Iterator[None]:
    """Turns what a library raises while the block reads a model into an `UnreadableModelError`.

    Args:
        source: the folder, file or hub name that is read.
        what: is read: a model or a tokenizer.

    Raises:
        UnreadableModelError: in place of any error but a missing package or memory. That a hub name is not found stays
            what it is.
    """
    try:
        yield
    except (UnreadableModelError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        path = Path(str(source)).expanduser()
        if isinstance(error, OSError) and not path.exists():
            raise
        found = "; ".join(damaged_files(path)) or _fault(path, error, what)
        raise UnreadableModelError(f"{what} must load, got {source}: {found}") from error


def damaged_files(folder: Path) -> list[str]:
    """What is wrong with the files of a folder that a model is loaded from, a phrase with a way out for each.

    Weight files are opened, and only their headers are read.
    """
    found = _damaged_json(folder, _JSON_FILES)
    for path in [path for pattern in _WEIGHT_FILES for path in sorted(folder.glob(pattern))]:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            found.append(f"the weight file {path.name} is corrupt or cut short ({error}); {_AGAIN}")
    return found


def _damaged_json(folder: Path, patterns: Iterable[str]) -> list[str]:
    found = []
    for path in [path for pattern in patterns for path in sorted(folder.glob(pattern))]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            found.append(f"{path.name} is no JSON file or is cut short ({error}); {_AGAIN}")
            continue
        if not isinstance(content, dict):
            found.append(f"{path.name} must hold fields, got {json.dumps(content)[:40]}; {_AGAIN}")
        elif ".index" in path.name:
            found += _faults_of_index(path, content)
    return found


def _faults_of_index(path: Path, content: Mapping[str, Any]) -> list[str]:
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        return [f"{path.name} must map tensors to files in weight_map, got {str(names)[:40]}; {_AGAIN}"]
    missing = sorted({name for name in names.values() if not (path.parent / name).is_file()})
    return [f"the weight file {name}, which {path.name} names, is missing; {_AGAIN}" for name in missing]


def _fault(path: Path, error: Exception, what: str) -> str:
    """What an error says about a folder whose files can be read each for itself."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(str(error).split())).partition(" Exception raised from ")[0]
    if isinstance(error, pickle.UnpicklingError):
        return (
            "its weights are a pickle that is damaged or holds more than tensors, and to read that could run foreign "
            "code; save the model as safetensors where it was made"
        )
    if isinstance(error, ValueError) and _is_ours(error):
        return text if ".json" in text else f"config.json: {text}"
    if what == "tokenizer" and any(path.glob("*token*")):
        return f"a file of its tokenizer, or config.json, does not load ({text[:200]}); {_AGAIN}"
    if what == "tokenizer":
        return (
            f"it holds no tokenizer that loads ({text[:200]}); save that of the model that it was made from into it: "
            f'AutoTokenizer.from_pretrained(...).save_pretrained("{path}")'
        )
    if path.is_file():
        return f"the file is cut short or holds no model ({text}); copy or download it again"
    if isinstance(error, OSError):
        return f"{text}; {_AGAIN}"
    if not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}"
    files = "config.json or generation_config.json" if (path / "generation_config.json").exists() else "config.json"
    return f"{files} does not describe a model that can be built: {text[:400]}{_suspects(path, error)}; {_AGAIN}"


def _is_ours(error: Exception) -> bool:
    """Whether lte itself raised an error, which then says what to do."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__")).startswith("lte.")


def _suspects(path: Path, error: Exception) -> str:
    """The fields of `config.json` that an error may be about: a name that is unknown, or a size that is none."""
    try:
        fields: Mapping[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    unknown = error.args[0] if isinstance(error, KeyError | AttributeError) and error.args else None

    def is_suspect(name: str, value: Any) -> bool:
        if unknown is not None and isinstance(value, str) and value and value in str(unknown):
            return True
        is_size = name.endswith(("_size", "_heads", "_layers")) or name.startswith(("num_", "n_"))
        return is_size and value is not None and not (isinstance(value, int) and 0 < value < 2**31)

    inner = {
        f"{name}.{key}": one for name, more in fields.items() if isinstance(more, dict) for key, one in more.items()
    }
    every = {**fields, **inner}.items()
    found = [f"{name}={json.dumps(value)[:40]}" for name, value in every if is_suspect(name, value)]
    return f" (look at {', '.join(found)})" if found else ""


def load_whole(auto_class: Any, location: Mapping[str, Any], *, new_head: bool = False, **arguments: Any) -> Any:
    """Loads a dense or sparse model that is all there; every command and run loads through here.

    Args:
        auto_class: of transformers, for the wanted head.
        location: from `lte.hf.dense.model_location`.
        new_head: whether the head may be missing and is then new and random, with transformers' warning.
        **arguments: of `from_pretrained`.

    Raises:
        UnreadableModelError: if files cannot be read, or lack tensors of the model, or hold other shapes or numbers
            that are not finite.
    """
    path = Path(location["pretrained_model_name_or_path"])
    source = path / location["gguf_file"] if "gguf_file" in location else path
    with reading(source), _in_one_piece():
        model, info = auto_class.from_pretrained(
            **location, **arguments, output_loading_info=True, ignore_mismatched_sizes=True
        )
        require_whole(model, info, source, new_head=new_head)
    return model


@contextmanager
def _in_one_piece() -> Iterator[None]:
    """Has `from_pretrained` load a model whole in this process, also where DeepSpeed trains with ZeRO-3.

    transformers would put it in shards, for which all processes had to load it together.
    """
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def require_whole(
    model: nn.Module,
    info: Mapping[str, Any],
    source: Any,
    *,
    new_head: bool = False,
    other_head: bool = False,
    fewer_layers: bool = False,
) -> None:
    """Refuses a loaded model that its checkpoint did not hold.

    Args:
        model: just loaded. Tensors on the meta device are not looked at.
        info: what `output_loading_info=True` returned, of a load that passed mismatched sizes.
        source: for the message.
        new_head: whether tensors of the head may be missing, and a pooler that only some heads have.
        other_head: whether tensors of the head may have had other shapes.
        fewer_layers: whether the model may have fewer layers than the checkpoint.

    Raises:
        UnreadableModelError: naming the first tensors.
    """
    # Stock transformers takes defaults, with which a model may write on for ever.
    damaged = _damaged_json(Path(str(source)).expanduser(), ["generation_config.json"])
    damaged += _wrong_token_ids(getattr(model, "generation_config", None))
    if damaged:
        raise UnreadableModelError(f"model must load, got {source}: {damaged[0]}")
    base = f"{getattr(model, 'base_model_prefix', '')}."
    names = model.state_dict().keys()
    has_head = any(not name.startswith(base) for name in names) and any(name.startswith(base) for name in names)

    def is_head(name: str) -> bool:
        return has_head and (not name.startswith(base) or ".pooler." in name)

    missing = sorted(name for name in info["missing_keys"] if not (new_head and is_head(name)))
    if missing:
        shown = f"must hold all weights of the model, got {len(missing)} missing: {_first(missing)}"
        raise UnreadableModelError(
            f"{source} {shown}; {_AGAIN}, correct config.json, or load the kind of model that it is"
        )
    shapes = sorted(
        f"{name} of the shape {list(saved)} where config.json asks for {list(wanted)}"
        for name, saved, wanted in info["mismatched_keys"]
        if not (other_head and is_head(name))
    )
    if shapes:
        raise UnreadableModelError(
            f"{source} must hold weights that fit its config.json, got {len(shapes)} mismatched: {_first(shapes)}; "
            f"correct config.json, or {_AGAIN}"
        )
    scaled = sorted(_scaled(Path(str(source)).expanduser(), model))
    if scaled:
        raise UnreadableModelError(
            f"{source} must hold weights that need no scale, got {len(scaled)} as integers or in fp8 beside a scale, "
            f"without the quantization_config in config.json that says what they stand for: {_first(scaled)}; take the "
            "model that they were made from, or the config.json that belongs to them"
        )
    if info.get("error_msgs"):
        raise UnreadableModelError(f"{source} must hold weights that load, got {_first(info['error_msgs'])}; {_AGAIN}")
    more = sorted(_other_layers(info["unexpected_keys"], names))
    if more and not fewer_layers:
        raise UnreadableModelError(
            f"{source} must hold as many layers as its config.json says, got weights of more: {_first(more)}; correct "
            f"the number of layers in config.json, or {_AGAIN}"
        )
    wrong = [name for name, tensor in model.state_dict().items() if not is_finite(tensor)]
    if wrong:
        other = "load it as float32 or bfloat16" if model.state_dict()[wrong[0]].dtype == torch.float16 else ""
        raise UnreadableModelError(
            f"{source} must hold finite weights, got NaN or infinity in {len(wrong)}: {_first(wrong)}; "
            f"{other or _AGAIN}, or train it again"
        )


def _scaled(folder: Path, model: nn.Module) -> list[str]:
    """Of a folder's weights that the model takes as they are, those in integers, and in fp8 beside a scale.

    transformers casts them and passes by the scales, which the model has no place for: any other tensor of the same
    module that is called a scale.
    """
    config = getattr(model, "config", None)
    if not folder.is_dir() or getattr(config, "quantization_config", None):
        return []
    base = f"{getattr(model, 'base_model_prefix', '')}."
    wanted = {name.removeprefix(base) for name, p in model.named_parameters() if p.is_floating_point()}
    dtypes: dict[str, str] = {}
    # Not those of a variant beside them.
    for path in safetensors_files(folder):
        with safe_open(path, framework="pt") as file:
            dtypes |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118

    taken = {name for name in dtypes if name.removeprefix(base) in wanted}
    scaled = {module for module, _, own in (name.rpartition(".") for name in dtypes.keys() - taken) if "scale" in own}

    def needs_scale(name: str) -> bool:
        if dtypes[name].startswith("F8"):
            return name.rpartition(".")[0] in scaled
        return dtypes[name][0] in "IUB" and dtypes[name] != "BF16"

    return [f"{name} in {dtypes[name]}" for name in taken if needs_scale(name)]


def _wrong_token_ids(config: Any) -> list[str]:
    found = []
    for name, value in vars(config).items() if config is not None else ():
        ids = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and value is not None and not all(type(one) is int for one in ids):
            found.append(f"generation_config.json: {name} must be a token or a list of some, got {name}={value!r}")
    return found


def _first(found: Iterable[str]) -> str:
    found = list(found)
    return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")


def _other_layers(unexpected: Iterable[str], names: Iterable[str]) -> list[str]:
    """Of tensors that the model has no place for, those that other layers of it have."""

    def kind(name: str) -> str:
        return re.sub(r"\.\d+\.", ".#.", name)

    kinds = {kind(name) for name in names}
    has_layers = any(".#." in found for found in kinds)
    return [name for name in unexpected if kind(name) in kinds or (not has_layers and ".#." in kind(name))]


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity; one pass over it, without a copy."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.dtype not in _REAL_DTYPES:
        return True
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def read_checksums(folder: str | Path) -> Checksums | None:
    """What `record_checksums` wrote; `None` for a folder of an earlier version, or of another tool.

    Raises:
        ValueError: if the file is damaged.
    """
    path = Path(folder) / CHECKSUM_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {name: {"bytes": int(file["bytes"]), "sha256": str(file["sha256"])} for name, file in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} must hold checksums, got a file that is damaged ({error}); {_AGAIN}") from error


def warn_of_shortened_texts(folder: Path) -> None:
    """Warns of files that any content is valid for, a chat template say, and that have another size than was saved."""
    try:
        known = read_checksums(folder) or {}
    except ValueError:
        return
    texts = {name: file for name, file in known.items() if not name.endswith((".json", ".safetensors"))}
    for found in damage(folder, texts, contents=False):
        warnings.warn(
            f"{found} in {folder}; if you did not change it, copy, download or save the folder again", stacklevel=3
        )


def record_checksums(
    folder: str | Path, names: Iterable[str], *, known_in: str | Path | None = None, gone: Collection[str] = ()
) -> None:
    """Writes the checksums of files of a folder beside them, and keeps those of its other files.

    Args:
        folder: where the files are.
        names: of the files.
        known_in: the folder whose checksums are kept; `None` for `folder`.
        gone: files that are no longer there.
    """
    try:
        known = read_checksums(folder if known_in is None else known_in) or {}
    except ValueError:
        known = {}  # Damaged: what is not written now has no checksum from here on.
    kept = {name: file for name, file in known.items() if name not in gone}
    write_json_atomic(Path(folder) / CHECKSUM_FILE, {"files": {**kept, **checksums(folder, sorted(names))}})
