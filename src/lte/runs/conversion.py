"""From a dense checkpoint to an LTE folder and back, a layer at a time.

Memory holds one matrix of a layer, a copy of it, and what the grouping of its neurons needs, whatever the size of the
model and of its files. A process that was killed goes on with the layer that it was at.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lte.config import LteConfig, check_expert_size
from lte.files import folder_lock, sampled_sha256, write_json_atomic
from lte.hf.card import CARD_FILE
from lte.hf.convert import neuron_order, permuted, require_dense
from lte.hf.families import Family, block_name, dense_ffns
from lte.hf.install import StockFfn, check_reachable, install_sparse_ffns_, new_router, num_neurons, wrapped_ffns
from lte.hf.loading import become_sparse_, is_ours
from lte.hf.rope_fields import rope_fields
from lte.hf.streamed_activity import StreamedActivity
from lte.hf.streaming import WORK_FOLDER, Checkpoint, StreamedFolder, by_block, open_checkpoint, saved_names
from lte.hf.tensor_files import NewTensor
from lte.methods import densify_
from lte.nn.router import ROUTER_PARTS
from lte.progress import tracked

TOGETHER_BYTES = 2**30
"""Layers that are smaller share a shard of about this size where nothing takes long, as on the way back to dense."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        output: the folder.
        layers: how many were written by this call.
        kept: how many were there already.
        seconds: that it took.
        has_tokenizer: whether the model brought one.
    """

    output: Path
    layers: int
    kept: int
    seconds: float
    has_tokenizer: bool


def convert_folder(
    model: str | Path,
    output: str | Path,
    config: LteConfig | None = None,
    *,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Conversion:
    """Writes the LTE model of a dense checkpoint, with untrained routers, layer by layer.

    The folder holds the same weights, bit for bit, as `lte.sparsify_` and `save_pretrained` write with the same config
    and dtype. If it was begun before, with the same settings and files, the layers that are there stay.

    Args:
        model: hub name, folder with safetensors, or GGUF file, the first of those of a model in parts.
        output: a new folder, or one that was begun.
        config: of the model; `None` takes `LteConfig()`.
        calibration: batches of text as for `lte.sparsify_`, for configs that group by activations. One batch at a time
            goes through a block; hidden states of all of them are in memory, and on the disk until the end.
        dtype: of the weights; `None` keeps that of the checkpoint. Routers are in float32.
        device: that groups the neurons, and runs the blocks for groupings by activations.

    Raises:
        ValueError: for settings that do not fit the model, groupings that need text without any, or another model in
            `output`.
        UnreadableModelError: if the checkpoint does not hold the whole model, or numbers that are not finite.
        OSError: if writing fails; the same call goes on from there.
    """
    start, config = time.monotonic(), config or LteConfig()
    batches = _check_text(config, calibration)
    checkpoint = open_checkpoint(model, dtype)
    family = require_dense(checkpoint.model, weightless=True)
    device, work = torch.device(device), Path(output).expanduser() / WORK_FOLDER
    activity = StreamedActivity(checkpoint, family, config, batches, device, work) if batches else None
    layers = _Layers(checkpoint, family, config, device, activity)
    sparse = copy.deepcopy(checkpoint.model)
    install_sparse_ffns_(sparse, family, config)
    become_sparse_(sparse, family, config)
    written = {own: saved for saved, own in saved_names(sparse).items()}
    groups = by_block(written, map(block_name, layers.ffns))
    settings = {**config.to_dict(), **({"text": _hash_of(batches)} if batches else {})}
    folder = StreamedFolder(output, _plan("convert", checkpoint, sparse, settings), len(groups))

    def tensors(index: int) -> list[NewTensor]:
        layers.orders.clear()
        return _new_tensors(groups[index], written, sparse, layers.pieces)

    return _written(folder, checkpoint, sparse, tensors, "Converting layers", start)


def _check_text(config: LteConfig, calibration: Iterable[Mapping[str, Tensor]] | None) -> list[Mapping[str, Tensor]]:
    """The batches of text that a config needs, none for one that goes by weights."""
    config.check_new()
    if not config.needs_text:
        return []
    batches = list(calibration or ())
    if not batches:
        what = f"always_on={config.always_on}" if config.always_on else f"grouping={config.grouping}"
        raise ValueError(
            f"calibration must hold batches of text for {what}, which goes by activations, got none; give text (lte "
            "convert --texts FILE), or group by weights (kmeans, random, contiguous)"
        )
    return batches


def _hash_of(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """SHA-256 of the numbers of all batches."""
    found = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            found.update(f"{name}{tuple(tensor.shape)}".encode())
            found.update(tensor.cpu().long().numpy().tobytes())
    return found.hexdigest()


class _Layers:
    """The tensors of an LTE model, made from those of a dense checkpoint.

    Args:
        checkpoint: of the dense model.
        family: its row.
        config: of the LTE model.
        device: that groups neurons.
        activity: of the FFNs on text, for a config that needs it.

    Attributes:
        ffns: the stock FFNs by name.
        orders: of the neurons of the FFNs that were looked at, to be cleared.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        config: LteConfig,
        device: torch.device,
        activity: StreamedActivity | None = None,
    ):
        self.checkpoint, self.family, self.config, self.device = checkpoint, family, config, device
        self.activity = activity
        self.ffns = dense_ffns(checkpoint.model, family)
        self.orders: dict[str, Tensor] = {}
        self._stock = {name: StockFfn(i, ffn, family.layout) for i, (name, ffn) in enumerate(self.ffns.items())}
        for ffn in self.ffns.values():
            check_reachable(config, check_expert_size(num_neurons(ffn, family.layout), config.expert_size))
        layout = family.layout
        self._places: dict[str, tuple[str, str]] = {}
        for name in self.ffns:
            router = f"{name}.{layout.activation}.router" if layout.spread else f"{name}.router"
            self._places |= {f"{router}.{part}": (name, part) for part in ROUTER_PARTS}
            for projection in layout.projections:
                self._places |= {f"{name}.{projection}.{part}": (name, projection) for part in ("weight", "bias")}

    def pieces(self, name: str) -> Iterable[Tensor]:
        """The numbers of a tensor, by the sparse model's name for it."""
        ffn, part = self._places.get(name, ("", ""))
        if not ffn:
            return self.checkpoint.pieces(name) if name in self.checkpoint.names else [self._buffer(name)]
        if part not in self.family.layout.projections:
            return [getattr(new_router(self._stock[ffn], self.config, torch.device("cpu")), part)]
        if name not in self.checkpoint.names:  # The bias for what is dropped, of families that have none.
            return [torch.zeros(self._stock[ffn].hidden_size)]
        return [self._permuted(name, ffn, part)]

    def _permuted(self, name: str, ffn: str, projection: str) -> Tensor:
        if ffn not in self.orders:
            self.orders[ffn] = self._order(ffn)
        tensor, layout = self.checkpoint.read(name), self.family.layout
        flipped = layout.transposed and tensor.ndim == 2
        found = permuted(tensor.T if flipped else tensor, layout, projection, self.orders[ffn])
        return found.T if flipped else found

    def _order(self, ffn: str) -> Tensor:
        stock, layout = self._stock[ffn], self.family.layout
        # First: the block that it runs is gone then.
        seen = None if self.activity is None else self.activity.of(ffn)
        if seen is not None and seen.features is not None:
            features = seen.features.gram
        else:
            features = self.checkpoint.read(f"{ffn}.{layout.gate or layout.up}.weight")
            features = (features.T if layout.transposed else features)[: stock.num_neurons].to(self.device)
        return neuron_order(features, self.config, self.config.seed + stock.index, seen)

    def _buffer(self, name: str) -> Tensor:
        """What the model's class makes itself, and its file may leave out."""
        found = self.checkpoint.model.get_parameter_or_buffer(name)
        if found.is_meta:
            raise ValueError(f"{self.checkpoint.location} must hold {name}, got none; copy or download it again")
        return found


def densify_folder(model: str | Path, output: str | Path, *, dtype: torch.dtype | None = None) -> Conversion:
    """Writes the stock dense model of a folder of LTE or another method, without its routers, layer by layer.

    The folder is one that transformers loads without lte, and that other engines and llama.cpp's converter read. Its
    neurons stay in their permuted order, which leaves the function as it is.

    Args:
        model: hub name or folder of the sparse model.
        output: a new folder, or one that was begun.
        dtype: of the weights; `None` keeps that of the folder.

    Raises:
        ValueError: for a dense model, a method that changed the weights for good, or another model in `output`.
        UnreadableModelError: if the folder does not hold the whole model.
        OSError: if writing fails; the same call goes on from there.
    """
    start = time.monotonic()
    checkpoint = open_checkpoint(model, dtype)
    dense = densify_(copy.deepcopy(checkpoint.model))
    written = {own: saved for saved, own in saved_names(dense).items()}
    groups = _joined(by_block(written, map(block_name, wrapped_ffns(checkpoint.model))), dense)
    folder = StreamedFolder(output, _plan("densify", checkpoint, dense, {}), len(groups))

    def tensors(index: int) -> list[NewTensor]:
        return _new_tensors(groups[index], written, dense, checkpoint.pieces)

    return _written(folder, checkpoint, dense, tensors, "Writing layers", start)


def _new_tensors(
    names: Iterable[str], written: Mapping[str, str], made: Any, pieces: Callable[[str], Iterable[Tensor]]
) -> list[NewTensor]:
    """What a shard shall hold.

    Args:
        names: of its tensors, the model's.
        written: the names in the file, by those.
        made: the model, on the meta device.
        pieces: gives the numbers of each.
    """
    found = []
    for name in names:
        tensor = made.get_parameter_or_buffer(name)
        found.append(NewTensor(written[name], tensor.dtype, tuple(tensor.shape), partial(pieces, name)))
    return found


def _joined(groups: Sequence[Sequence[str]], model: Any) -> list[list[str]]:
    """Groups of tensors, the neighbours of which are joined up to `TOGETHER_BYTES`."""
    joined: list[list[str]] = []
    filled = TOGETHER_BYTES
    for group in groups:
        tensors = [model.get_parameter_or_buffer(name) for name in group]
        size = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        if not joined or filled + size > TOGETHER_BYTES:
            joined.append([])
            filled = 0
        joined[-1] += group
        filled += size
    return joined


def _plan(command: str, checkpoint: Checkpoint, made: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What a folder that was begun must agree with to go on."""
    # Not the times of the files: a copy has others, and another model may have the same.
    config = checkpoint.folder / "config.json"
    files = [*checkpoint.source.files, *([config] if config.is_file() else [])]
    return {
        "command": command,
        "checkpoint": {path.name: sampled_sha256(path) for path in files},
        "settings": settings,
        "dtype": str(made.dtype),
    }


def _add_rope_fields(file: Path) -> None:
    """For programs that read a stock `config.json` by transformers 4."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    write_json_atomic(file, {**fields, **rope_fields(fields)})


def _written(
    folder: StreamedFolder,
    checkpoint: Checkpoint,
    made: Any,
    tensors: Callable[[int], Iterable[NewTensor]],
    what: str,
    start: float,
) -> Conversion:
    """Writes all shards that are not there yet, and then the rest of the folder, which no other process may have."""
    tokenizer: list[str] = []

    def save(place: Path) -> list[str]:
        made.save_pretrained(place, state_dict={})
        (place / "model.safetensors").unlink(missing_ok=True)
        if not is_ours(made):
            _add_rope_fields(place / "config.json")
        tokenizer[:] = checkpoint.write_tokenizer(place)
        names = {path.name for path in place.iterdir() if path.is_file()} | set(tokenizer)
        own_card = (folder.output / CARD_FILE).is_file() or not is_ours(made)
        return sorted(names - ({CARD_FILE} if own_card else set()))

    with folder_lock(folder.output):
        folder.begin()
        kept = [index for index in range(folder.num_shards) if folder.is_written(index)]
        missing = [index for index in range(folder.num_shards) if index not in kept]
        folder.require_room(sum(tensor.num_bytes for index in missing for tensor in tensors(index)))
        for index in tracked(missing, what):
            folder.write_shard(index, tensors(index))
        folder.finish(save)
    return Conversion(
        folder.output, folder.num_shards - len(kept), len(kept), time.monotonic() - start, bool(tokenizer)
    )
