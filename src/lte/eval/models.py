"""Loading a dense or sparse model to measure it, held-out batches, records, and saving a finished folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lte.config import DTYPE_NAMES, KERNELS, check_choice
from lte.data.rows import LmCollator, TokenRows
from lte.eval.cost import record_fields
from lte.eval.kernels import use_kernels_
from lte.eval.sparsity import UNION_TOKENS, Measurement
from lte.eval.tasks import TaskResult
from lte.files import explained_write_errors, is_gguf
from lte.hf.checkpoints import load_whole, reading, record_checksums
from lte.hf.dense import load_dense_model, model_location
from lte.hf.families import family_of
from lte.hf.gguf import gguf_config
from lte.hf.loading import FP32_NAMES, is_ours, method_settings
from lte.methods import METHODS
from lte.records import ResultRecord, result_record
from lte.train.processes import training_device

Place = Literal["device", "cpu", "nowhere"]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


def load_config(name_or_path: str) -> Any:
    """The config of a hub name, folder or GGUF file, without its weights.

    Raises:
        ValueError: if a path does not exist, or holds no config that can be read, or for a GGUF file that `lte.hf.gguf`
            refuses.
        OSError: if the hub has no config.
    """
    path = Path(name_or_path).expanduser()
    if is_gguf(path) and path.is_file():
        return gguf_config(path)
    local = path.exists() or name_or_path.startswith((".", "/", "~")) or is_gguf(path)
    if local and not path.exists():
        raise ValueError(f"model must be a hub name, folder or GGUF file, got {name_or_path}, which does not exist")
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"model must be a folder with a config.json, got {name_or_path}, which has none")
    if path.exists():
        with reading(name_or_path):
            return AutoConfig.from_pretrained(**model_location(name_or_path))
    try:
        return AutoConfig.from_pretrained(name_or_path)
    except OSError as error:
        raise OSError(f"model {name_or_path} is no folder here and was not found on the hub: {error}") from error


def is_lte(config: Any) -> bool:
    """Whether a config is that of an LTE model, and not of a dense one or another method's."""
    name = (method_settings(config) or {}).get("name")
    return name in METHODS and METHODS[name].sparse_ffns


def load_any_model(name_or_path: str, dtype: str = "float32", kernels: str = "off", *, to: Place = "device") -> Any:
    """A dense or LTE model on the GPU if there is one.

    Args:
        name_or_path: hub name, folder, or GGUF file.
        dtype: a key of `DTYPES`.
        kernels: one of `lte.eval.kernels.KERNELS`, what computes the FFNs of an LTE model.
        to: `cpu` leaves it there, for what puts it in shards on GPUs; `nowhere`, for the other processes of that, reads
            no weight of an LTE model, which then hold anything.

    Raises:
        ValueError: for an unknown dtype, kernels or family, or a path that does not exist.
    """
    check_choice("dtype", dtype, DTYPE_NAMES)
    check_choice("kernels", kernels, KERNELS)
    config = load_config(name_or_path)
    family_of(config)
    model: Any
    if to == "nowhere":
        return _unread(config, DTYPES[dtype]).eval()
    if is_lte(config):
        model = load_whole(AutoModelForCausalLM, model_location(name_or_path), dtype=DTYPES[dtype])
    else:
        model = load_dense_model(name_or_path, DTYPES[dtype])
    return use_kernels_((model.to(training_device()) if to == "device" else model).eval(), kernels)


def _unread(config: Any, dtype: torch.dtype) -> Any:
    """A model with the buffers that it makes itself, and parameters whose memory is reserved and never touched.

    accelerate knows parameters by where they lie, so they must lie somewhere.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in list(model.named_parameters()):
        own = torch.float32 if not FP32_NAMES.isdisjoint(name.split(".")) else dtype
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Parameter(torch.empty(parameter.shape, dtype=own)))
    model.tie_weights()
    return model


def max_positions(model: Any) -> int | None:
    """The longest sequence that a model takes, if its config says so."""
    return getattr(model.config, "max_position_embeddings", None)


def held_out_batches(rows: TokenRows, batch_size: int, pad_token_id: int) -> list[dict[str, Tensor]]:
    """All rows in order, as batches."""
    collator = LmCollator(pad_token_id)
    starts = range(0, len(rows), batch_size)
    return [collator([rows[i] for i in range(s, min(s + batch_size, len(rows)))]) for s in starts]


def task_record(network: Any, result: TaskResult, **fields: Any) -> ResultRecord:
    """A result record of one evaluation; `fields` are those that neither the network nor the result tells."""
    return result_record(
        **{
            **record_fields(network, result.measurement),
            "metric": result.metric,
            "value": result.value,
            "metrics": result.metrics,
            "split": "validation",
            "tokens_evaluated": result.tokens,
            **fields,
        },
    )


def measurement_summary(
    measurement: Measurement, data: Mapping[str, Any], record: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the folder's config remembers of a measurement: enough for `lte inspect` and the model card.

    Args:
        measurement: of the model.
        data: the record's `data_info`.
        record: of the same evaluation, whose base model and quality are kept too.
    """
    record = record or {}
    quality = {
        "model": record.get("model"),
        "metric": record.get("metric"),
        "value_before": record.get(f"{record.get('metric')}_before"),
        "value": record.get("value"),
    }
    experts = {"dead_experts": measurement.dead_experts, "always_on_experts": measurement.always_on_experts}
    return {
        **{name: value for name, value in quality.items() if value is not None},
        "sparsity": measurement.sparsity,
        "tokens": measurement.tokens,
        "split": data.get("split", "validation"),
        "data": {"source": data["train_source"], **data["validation"]},
        "active_fraction": measurement.active_fraction or [1 - share for share in measurement.layer_sparsity],
        **({**experts, "union_fraction": _union_fractions(measurement)} if measurement.has_routing else {}),
    }


def _union_fractions(measurement: Measurement) -> dict[str, dict[str, list[float]]]:
    """The shares of experts that any of n tokens needs, by n and layer: of different texts, and in a row of one.

    Tokens of different texts choose independently of each other, each expert as often as it is used at all.
    """
    texts = {
        str(tokens): [round(1 - fmean((1 - use) ** tokens for use in layer), 4) for layer in measurement.expert_use]
        for tokens in UNION_TOKENS
    }
    row = {name: [round(1 - off, 4) for off in layers] for name, layers in measurement.union_sparsity.items()}
    return {"texts": texts, "row": row}


def save_folder(
    model: Any, tokenizer: Any, output: Path, remedy: Callable[[], str] = lambda: "make room there"
) -> None:
    """Saves tokenizer and model; the model's `config.json` comes last, so a folder with one is complete.

    The checksums that `lte inspect --verify` compares are of all these files.

    Args:
        model: on any device.
        tokenizer: of the model.
        output: the folder.
        remedy: says what to do when it cannot be written.

    Raises:
        OSError: if it cannot, on a full disk say.
    """
    output.mkdir(parents=True, exist_ok=True)
    with explained_write_errors(output, remedy):
        try:
            files = [Path(file) for file in tokenizer.save_pretrained(output)]
            record_checksums(output, [file.relative_to(output).as_posix() for file in files if file.is_file()])
        finally:
            # Tokenizers can be had again; trained weights cannot.
            model.save_pretrained(output)
        if not is_ours(model):
            names = [path.name for pattern in ("*config.json", "model*") for path in output.glob(pattern)]
            record_checksums(output, names)
