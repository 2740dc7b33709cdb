"""A checkpoint on the disk with its model on the meta device, and a folder that is written a layer at a time.

No weight is loaded to know what a model is: transformers loads it onto the meta device, with all of its own rules for
names, dtypes and tied weights, and what it says of missing tensors holds. The tensors are then read one by one.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from lte.files import checksums, explained_write_errors, free_bytes, is_gguf, write_json_atomic
from lte.hf.card import CARD_FILE
from lte.hf.checkpoints import CHECKSUM_FILE, UnreadableModelError, is_finite, load_whole, reading
from lte.hf.dense import model_location
from lte.hf.families import block_name, saved_head
from lte.hf.gguf import gguf_tokenizer, has_tokenizer
from lte.hf.gguf_source import gguf_skeleton
from lte.hf.tensor_files import NewTensor, SafetensorsSource, TensorSource, write_tensors

WORK_FOLDER = ".conversion"
"""Holds what a folder that is being written needs to know of itself, until it is complete."""

_TEXT_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("*.model", "additional_chat_templates/*", "LICENSE*"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A saved model that is not loaded.

    Attributes:
        location: hub name, folder or GGUF file, as it was given.
        folder: that holds its files.
        model: on the meta device, in the dtypes that its tensors shall have.
        source: of its tensors.
        names: in the source, by the model's names.
    """

    location: str
    folder: Path
    model: Any
    source: TensorSource
    names: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """A parameter or buffer by the model's name for it, on the CPU."""
        return self._checked(name, self.source.read(self.names[name]))

    def pieces(self, name: str) -> Iterator[Tensor]:
        """As `read`, in parts one after the other."""
        for piece in self.source.pieces(self.names[name]):
            yield self._checked(name, piece)

    def _checked(self, name: str, piece: Tensor) -> Tensor:
        """Numbers in the model's dtype, which must hold them."""
        dtype = self.model.get_parameter_or_buffer(name).dtype
        found = piece.to(dtype)
        if not is_finite(found):
            other = "take dtype float32 or bfloat16" if dtype == torch.float16 else "copy, download or save it again"
            raise UnreadableModelError(
                f"{self.location} must hold finite weights, got NaN or infinity in {name}; {other}, or train it again"
            )
        return found

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Copies the files of its tokenizer, if it has one, and returns their names."""
        if is_gguf(self.location):
            if not has_tokenizer(self.location):
                return []
            files = [Path(name) for name in gguf_tokenizer(self.location).save_pretrained(folder)]
            return [file.relative_to(folder).as_posix() for file in files if file.is_file()]
        found = sorted({path for kind in _TEXT_FILES for path in self.folder.glob(kind) if path.is_file()})
        for path in found:
            place = folder / path.relative_to(self.folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        return [path.relative_to(self.folder).as_posix() for path in found]


def open_checkpoint(name_or_path: str | Path, dtype: torch.dtype | None = None) -> Checkpoint:
    """A model of which the names, shapes and dtypes are read, and no weight.

    Args:
        name_or_path: hub name, folder with safetensors, or GGUF file, the first of those of a model in parts.
        dtype: of the model; `None` keeps that of the files, and takes float32 for a GGUF file in blocks.

    Raises:
        UnreadableModelError: if the files do not hold the whole model.
        ValueError: if the weights are no safetensors, quantised, or must be put together from several tensors.
    """
    if is_gguf(name_or_path):
        model, gguf_source, names = gguf_skeleton(name_or_path, dtype)
        if has_tokenizer(name_or_path):  # One that cannot be built is refused before the work, and not after it.
            gguf_tokenizer(name_or_path)
        return Checkpoint(str(name_or_path), gguf_source.files[0].parent, model, gguf_source, names)
    location = model_location(name_or_path)
    folder = _folder_of(location["pretrained_model_name_or_path"])
    with reading(name_or_path):
        source = SafetensorsSource(folder)
        config = AutoConfig.from_pretrained(**location)
        head = saved_head(config)
    if head is None:
        raise ValueError(
            f"model must be of a class of transformers to be read layer by layer, got {name_or_path}, which was saved "
            "from a class of its own; load it and use lte.sparsify_ or lte.densify_"
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"model must hold plain numbers to be read layer by layer, got {name_or_path}, whose config.json says "
            "quantization_config; take the model that it was made from"
        )
    model = load_whole(getattr(transformers, head), location, dtype=dtype or "auto", device_map="meta")
    return Checkpoint(str(name_or_path), folder, model, source, _names_in_files(model, source.shapes, name_or_path))


def _folder_of(name_or_path: str) -> Path:
    """The folder of a model, downloaded if it is on the hub."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # A ValueError for what cannot be a name.
        raise OSError(f"model {name_or_path} is no folder here and was not found on the hub: {error}") from error


def _names_in_files(model: Any, files: Iterable[str], source: object) -> dict[str, str]:
    """The names of a model's tensors in its files, found as `from_pretrained` finds them."""
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, found = model.base_model_prefix, {}
    for name in files:
        own, converted = rename_source_key(name, renamings, converters, prefix, state)
        if own not in state and name in state:
            own, converted = rename_source_key(name, [], [], prefix, state)
        if own in state and converted is not None:
            raise ValueError(
                f"{source} must hold the tensors of its model as they are to be read layer by layer, got {name}, which "
                "transformers makes others of; load it with transformers and save it again"
            )
        if own in state:
            found[own] = name
    # Of tied tensors some writers, `safetensors.torch.save_model` say, keep the one that comes first by its name.
    for name, other in model.all_tied_weights_keys.items():
        if name in found:
            found.setdefault(other, found[name])
    return found


def saved_names(model: Any) -> dict[str, str]:
    """The model's names of all tensors that `save_pretrained` writes, by the names that it gives them."""
    state = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    names = {id(tensor): name for name, tensor in state.items()}
    written = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    return {saved: names[id(tensor)] for saved, tensor in written.items()}


def by_block(names: Iterable[str], blocks: Iterable[str]) -> list[list[str]]:
    """Names of tensors in groups: those of each block, then all others.

    Args:
        names: the model's.
        blocks: names of modules, in the order of their groups.
    """
    order = {block: index for index, block in enumerate(dict.fromkeys(blocks))}
    groups: list[list[str]] = [[] for _ in range(len(order) + 1)]
    for name in names:
        block = block_name(name) if "." in name else name
        groups[order.get(block, len(order))].append(name)
    return groups


class StreamedFolder:
    """A model's folder that is written shard by shard, and goes on where a process that was killed has stopped.

    Shards get their place when they are complete. What is there is kept in `.conversion`, which goes at the end;
    `config.json`, without which nothing loads, comes last.

    Args:
        output: the folder.
        plan: what it is made from and how, JSON-ready; a folder that was begun goes on with the same alone.
        num_shards: how many there are.

    Raises:
        ValueError: if the folder holds another model, or was begun with another plan.
    """

    def __init__(self, output: str | Path, plan: Mapping[str, Any], num_shards: int):
        self.output, self.num_shards = Path(output).expanduser(), num_shards
        self.work = self.output / WORK_FOLDER
        self.plan = json.loads(json.dumps({**plan, "shards": num_shards}))
        self._check()

    def _check(self) -> None:
        begun = self.work / "plan.json"
        if not begun.is_file():
            self._require_empty()
            return
        before = json.loads(begun.read_text(encoding="utf-8"))
        if before != self.plan:
            other = [name for name in self.plan if before.get(name) != self.plan[name]] or ["version"]
            raise ValueError(
                f"output must be new or of the same conversion, got {self.output}, which was begun with another "
                f"{' and '.join(other)}; delete it, or name another folder"
            )

    def _require_empty(self) -> None:
        there = list(self.output.glob("*.json")) + list(self.output.glob("*.safetensors"))
        if there:
            raise ValueError(
                f"output must be a folder without a model, got {self.output} with {there[0].name}; delete it, or name "
                "another folder"
            )

    def begin(self) -> None:
        """Makes the folder, and removes what a process that was killed has left half written.

        Raises:
            ValueError: as on creation, if another process has written into it since then.
        """
        self._check()
        self.work.mkdir(parents=True, exist_ok=True)
        for partial in self.output.glob(".model-*.partial"):
            partial.unlink()
        write_json_atomic(self.work / "plan.json", self.plan)

    def shard_name(self, index: int) -> str:
        """The file's name, counted from 0."""
        return f"model-{index + 1:05d}-of-{self.num_shards:05d}.safetensors"

    def is_written(self, index: int) -> bool:
        """Whether a shard is there as a whole."""
        record, path = self._record(index), self.output / self.shard_name(index)
        return record is not None and path.is_file() and path.stat().st_size == record["bytes"]

    def require_room(self, num_bytes: int) -> None:
        """Refuses to begin what the disk has no room for.

        Raises:
            OSError: says how much there is.
        """
        free = free_bytes(self.output)
        if free < num_bytes:
            raise OSError(
                errno.ENOSPC,
                f"{self.output} needs {num_bytes / 1e9:.1f} GB for what is still to be written, got {free / 1e9:.1f} "
                "GB free there; make room, or name a folder on another disk",
            )

    def write_shard(self, index: int, tensors: Iterable[NewTensor]) -> None:
        """Writes a shard, and what is known of it after that."""
        tensors = list(tensors)
        name = self.shard_name(index)
        with explained_write_errors(self.output / name, lambda: "make room, and give the same command again"):
            record = write_tensors(self.output / name, tensors)
            numbers = {"tensors": {tensor.name: tensor.num_bytes for tensor in tensors}}
            numbers["parameters"] = sum(tensor.num_bytes // tensor.dtype.itemsize for tensor in tensors)  # type: ignore[assignment]
            write_json_atomic(self.work / f"shard-{index + 1:05d}.json", {**record, **numbers})

    def _record(self, index: int) -> Any:
        path = self.work / f"shard-{index + 1:05d}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def finish(self, save: Callable[[Path], Iterable[str]]) -> None:
        """Writes the index, all small files and the checksums, `config.json` last.

        Args:
            save: writes the model's config and all else that is no weight into a folder, and returns their names.
        """
        records = {self.shard_name(index): self._record(index) for index in range(self.num_shards)}
        index = {
            "metadata": {
                "total_parameters": sum(record["parameters"] for record in records.values()),
                "total_size": sum(sum(record["tensors"].values()) for record in records.values()),
            },
            "weight_map": {tensor: shard for shard, record in records.items() for tensor in record["tensors"]},
        }
        # Of the folder's name, which a model card takes as its title.
        small = self.work / self.output.resolve().name
        shutil.rmtree(small, ignore_errors=True)
        small.mkdir(parents=True)
        with explained_write_errors(self.output, lambda: "make room, and give the same command again"):
            names = sorted({*save(small), "model.safetensors.index.json"})
            write_json_atomic(small / "model.safetensors.index.json", index)
            shards = {name: {key: record[key] for key in ("bytes", "sha256")} for name, record in records.items()}
            known = checksums(small, [name for name in names if name not in (CARD_FILE, CHECKSUM_FILE)])
            write_json_atomic(small / CHECKSUM_FILE, {"files": {**shards, **known}})
            for name in sorted({*names, CHECKSUM_FILE}, key=lambda name: name == "config.json"):
                (self.output / name).parent.mkdir(parents=True, exist_ok=True)
                (small / name).replace(self.output / name)
            shutil.rmtree(self.work)
