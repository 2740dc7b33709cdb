"""What a resumed run must have in common with the run that it goes on with: settings, data, and the model's shapes."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from lte.data.rows import TokenRows
from lte.files import json_ready
from lte.train.config import RecipeSettings

# Of the trainer's own arguments, those that change the weights; steps between logs, checkpoints and evaluations, the
# number of workers and the kind of machine do not.
_ARGUMENTS = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "max_grad_norm"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "seed", "data_seed", "bf16", "fp16"),
    *("label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy", "group_by_length"),
    *("dataloader_drop_last", "average_tokens_across_devices"),
)
# Settings that act after the last step, or change where it is computed alone.
_FREE = {"calibration_tokens", "compile_layers", "distillation_weight", "loss_chunk_tokens"}
# What other trainers say of their logs and workers.
_FREE_WORDS = ("num_proc", "num_workers", "log", "report", "hub", "vllm")
# Of data that is only made when it is asked for, this many rows are looked at.
SAMPLED_ROWS, STREAMED_ROWS = 1024, 64
# Of larger Arrow files about so much is read, in pieces spread over them: 5 s for tokens, at 1 GB/s.
READ_BYTES = 5e9
_CHUNK = 1024
_PLAIN = str | int | float | bool | list | tuple | dict | None
# Which a resumed run may have otherwise, at the price of other numbers.
DEVICES = ("processes", "rows_per_pass", "passes_per_step")


def run_fingerprint(trainer: Any) -> dict[str, Any]:
    """All that decides the result of a training, by name and JSON-ready.

    Args:
        trainer: a `lte.train.trainer.RoutingMixin` that has not begun.
    """
    args = trainer.args
    found = {name: getattr(args, name) for name in _ARGUMENTS if hasattr(args, name)}
    found["optim"] = str(getattr(args.optim, "value", args.optim)).replace("_fused", "")
    found["steps"] = {"max_steps": args.max_steps} if args.max_steps > 0 else {"epochs": args.num_train_epochs}
    own = {field.name for field in dataclasses.fields(trainer.routing)} - set(TrainingArguments.__dataclass_fields__)
    recipe = {name for name in own if name in RecipeSettings.__dataclass_fields__ or name == "stage1_ratio"}
    others = {name for name in own - recipe if not any(word in name for word in _FREE_WORDS)}
    kinds = [each for each in type(trainer.routing).__mro__ if each.__module__.partition(".")[0] == "trl"]
    of_trl = {name for each in kinds for name in getattr(each, "__dataclass_fields__", ())}
    values = {name: getattr(trainer.routing, name) for name in (recipe | others) - _FREE}
    values = {name: value for name, value in values.items() if isinstance(value, _PLAIN)}
    found |= {name: value for name, value in values.items() if name in recipe | of_trl}
    # Which may be a name or a time as well as a weight of a loss.
    found["own_settings"] = {name: value for name, value in values.items() if name not in recipe | of_trl}
    method = dict(getattr(trainer.model.config, "lte", None) or {})
    method.pop("version", None)
    has_adapters = hasattr(trainer.model, "peft_config")
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad] if has_adapters else []
    found |= {
        "distillation_weight": trainer.distillation_weight,
        "target_sparsity": trainer.target_sparsity,
        "method": method or None,
        "model": {"class": type(trainer.model).__name__, "shapes": _shapes(trainer.model)},
        # Adapters are saved without the weights that they are for.
        "frozen_weights": _weights(frozen) if frozen else None,
        "teacher": _weights(trainer.teacher.parameters()) if trainer._distills else None,
        "training_data": data_fingerprint(trainer.train_dataset),
        "processes": args.world_size,
        "rows_per_pass": args.per_device_train_batch_size,
        "passes_per_step": args.gradient_accumulation_steps,
    }
    text = json.dumps(found, default=lambda value: str(getattr(value, "value", value)), sort_keys=True)
    return json_ready(json.loads(text))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What two runs do not have in common, a phrase for each: what changes the result, and what may change it, the
    devices and fields that users added to the arguments.

    What one of them does not say, since another version made its fingerprint, is not compared.
    """
    other = {name: now[name] for name in before if name in now and before[name] != now[name]}
    devices = {name: other.pop(name) for name in DEVICES if name in other}
    if devices and "processes" not in devices and _rows_per_step(before) != _rows_per_step(now):
        other |= devices
        devices = {}
    if "own_settings" in other:
        devices["own_settings"] = other.pop("own_settings")
    return [_phrase(name, before[name], other[name]) for name in other], [
        _phrase(name, before[name], devices[name]) for name in devices
    ]


def _rows_per_step(fingerprint: Mapping[str, Any]) -> int:
    return fingerprint["rows_per_pass"] * fingerprint["passes_per_step"]


def _phrase(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        # Of a method's settings, say, those that differ.
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        before, now = ({key: each.get(key) for key in keys} for each in (before, now))
    return f"{name}={_short(now)} where it began with {name}={_short(before)}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {each}" for key, each in value.items()) + ")"
    return str(value)


def data_fingerprint(dataset: Any) -> dict[str, Any] | None:
    """Number and SHA-256 of the rows of a data set: of all that lie in memory or in Arrow files of up to `READ_BYTES`,
    of `SAMPLED_ROWS` spread ones where rows are made when asked for, and of the first `STREAMED_ROWS` of a stream.

    Returns:
        `rows` (`None` of a stream) and `sha256`; `None` without a data set, and for one with other rows each time it is
        read, of random augmentations say.
    """
    if dataset is None:
        return None
    digest = hashlib.sha256()
    if isinstance(dataset, datasets.Dataset):
        table = dataset.with_format("arrow")
        every = math.ceil(max(1, dataset.data.nbytes) / READ_BYTES)
        for start in range(0, len(dataset), every * _CHUNK):
            _add_table(digest, table[start : start + _CHUNK])
        return {"rows": len(dataset), "sha256": digest.hexdigest()[:16]}
    streams = isinstance(dataset, IterableDataset) or not (
        hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    )
    with _generators_kept():
        if streams and (iter(dataset) is dataset or iter(dataset) is iter(dataset)):
            return None  # Rows that are read here would be lost to the training.
        digests = [_row_digest(row) for row in _rows(dataset, streams)]
        # Some rows may be made with random numbers, and others not.
        if not _lies_in_memory(dataset) and [_row_digest(row) for row in _rows(dataset, streams)] != digests:
            return None
    for each in digests:
        digest.update(each)
    return {"rows": None if streams else len(dataset), "sha256": digest.hexdigest()[:16]}


def _lies_in_memory(dataset: Any) -> bool:
    return isinstance(dataset, list | tuple | TokenRows)


def _rows(dataset: Any, streams: bool) -> Iterator[Any]:
    if streams:
        yield from itertools.islice(dataset, STREAMED_ROWS)
        return
    total = len(dataset)
    wanted = total if _lies_in_memory(dataset) else min(total, SAMPLED_ROWS)
    for index in range(wanted):
        yield dataset[index * total // wanted]


def _row_digest(row: Any) -> bytes:
    digest = hashlib.sha256()
    items = sorted(row.items(), key=lambda item: str(item[0])) if isinstance(row, Mapping) else [("", row)]
    for name, value in items:
        if isinstance(value, Tensor) and value.layout == torch.strided:
            value = value.detach().cpu()
            value = (value.float() if value.is_floating_point() else value).numpy()
        # An array of objects holds where they lie.
        as_bytes = isinstance(value, np.ndarray) and value.dtype != object
        content = value.tobytes() if as_bytes else _text(value).encode(errors="backslashreplace")
        digest.update(f"{name} {np.shape(value) if as_bytes else ''}".encode(errors="backslashreplace") + content)
    return digest.digest()


def _text(value: Any) -> str:
    """A value as text; of objects that say where they lie in memory, which is new each time, their kind alone."""
    if isinstance(value, set | frozenset):
        # Their order is another one in each process.
        value = sorted(value, key=repr)
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return type(value).__name__ if " at 0x" in text else text


def _add_table(digest: Any, table: Any) -> None:
    """Adds the columns of an Arrow table."""
    for name in sorted(table.column_names):
        digest.update(name.encode())
        _add_column(digest, table.column(name).combine_chunks())


def _add_column(digest: Any, column: Any) -> None:
    """Adds an Arrow array: numbers, texts and bytes, also in lists and structs, as they lie there, all else as text."""
    import pyarrow as pa

    kind = column.type
    is_bytes = str(kind).removeprefix("large_") in ("string", "binary")
    if isinstance(column, pa.ListArray | pa.LargeListArray):
        digest.update(np.ascontiguousarray(column.value_lengths().to_numpy(zero_copy_only=False)).tobytes())
        _add_column(digest, column.flatten())
    elif isinstance(column, pa.StructArray):
        for child in column.flatten():
            _add_column(digest, child)
    elif column.null_count == 0 and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        digest.update(np.ascontiguousarray(column.to_numpy(zero_copy_only=False)).tobytes())
    elif column.null_count == 0 and is_bytes:
        contents = column.cast(pa.large_binary()).to_pylist()
        digest.update(repr([len(each) for each in contents]).encode() + b"".join(contents))
    else:
        digest.update(repr(column.to_pylist()).encode())


def _shapes(model: nn.Module) -> str:
    shapes = sorted(f"{name}{list(p.shape)}{p.requires_grad}" for name, p in model.named_parameters())
    return f"{len(shapes)} parameters, {hashlib.sha256(' '.join(shapes).encode()).hexdigest()[:16]}"


@torch.no_grad()
def _weights(parameters: Iterable[nn.Parameter]) -> str:
    """A checksum of 64 numbers of each parameter, spread over it."""
    digest = hashlib.sha256()
    for parameter in parameters:
        flat = parameter.detach().reshape(-1)
        if flat.numel():
            picked = torch.arange(0, flat.numel(), max(1, flat.numel() // 64), device=flat.device)
            digest.update(flat[picked].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Leaves the random numbers to the training: rows may be made with them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
