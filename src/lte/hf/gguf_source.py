"""The tensors of a GGUF file, or of a model in several, one by one: none is de-quantised before it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from lte.hf.checkpoints import UnreadableModelError, require_whole
from lte.hf.gguf import GgufFile, block_of, gguf_config, gguf_package, read_gguf
from lte.hf.tensor_files import PIECE_BYTES, TensorSource

_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
# Of which transformers changes nothing, and which may be larger than a layer.
_BY_ROWS = ("token_embd.weight", "output.weight")


class GgufSource(TensorSource):
    """De-quantised tensors, as transformers has them in the models of their architecture.

    Args:
        file: with the tables of all parts.
        processor: of transformers, which undoes what llama.cpp did to some tensors.
    """

    def __init__(self, file: GgufFile, processor: Any):
        self._file, self._processor = file, processor
        self.shapes = {name: shape for name, (shape, _) in file.tensors.items()}
        self.files = sorted({file.path, *file.places.values()})

    def read(self, name: str) -> Tensor:
        """As for `TensorSource`, in float32."""
        shape = self.shapes[name]
        numbers = np.empty((math.prod(shape[:-1]), shape[-1]), dtype=np.float32)
        for start, rows in self._rows(name):
            numbers[start : start + len(rows)] = rows
        kept: dict[str, Any] = {"tensors": {}}
        found = self._processor.process(weights=numbers.reshape(shape), name=name, parsed_parameters=kept)
        if found.name is None:  # GPT-2's head, which is put aside.
            return next(iter(kept["tensors"].values()))
        return torch.from_numpy(np.ascontiguousarray(found.weights))

    def pieces(self, name: str) -> Iterator[Tensor]:
        """As for `TensorSource`, in float32."""
        if name not in _BY_ROWS:
            yield self.read(name)
            return
        for _, rows in self._rows(name):
            yield torch.from_numpy(np.array(rows))

    def _rows(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """The rows of a tensor, some at a time, and the number of the first."""
        shape, offset = self._file.tensors[name]
        place, kind = self._file.place(name), self._file.kinds[name]
        gguf = gguf_package(place)
        block, block_bytes = block_of(place, name, kind, gguf)
        height, row_bytes = math.prod(shape[:-1]), shape[-1] // block * block_bytes
        # De-quantising takes several times the memory of its result.
        step = max(1, PIECE_BYTES // (16 * shape[-1]))
        for start in range(0, height, step):
            count = min(step, height - start)
            stored = np.memmap(place, np.uint8, "r", offset + start * row_bytes, (count, row_bytes))
            yield start, gguf.dequantize(stored, gguf.GGMLQuantizationType(kind))


def gguf_skeleton(path: str | Path, dtype: torch.dtype | None) -> tuple[Any, GgufSource, dict[str, str]]:
    """The causal language model of a GGUF file on the meta device, its tensors, and their names by the model's.

    Args:
        path: of the file, or of the first of those of a model in parts.
        dtype: of the model; `None` takes that of a file of plain numbers, and float32 for blocks.

    Raises:
        ValueError: as `lte.hf.gguf.gguf_config`, or if the file does not hold what the model has.
    """
    file, config = read_gguf(path, parts=True), gguf_config(path)
    kinds = set(file.kinds.values())
    plain = [_PLAIN[kind] for kind in (30, 1, 0) if kind in kinds] if kinds <= set(_PLAIN) else [torch.float32]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or plain[0])
    model.tie_weights()
    architecture = file.metadata["general.architecture"]
    if _reads_otherwise(architecture):
        raise ValueError(
            f"{path} must be of an architecture that can be read tensor by tensor, got {architecture}, which "
            f"transformers {transformers.__version__} reads in another way; convert it in memory with lte train"
        )
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    mapped = get_gguf_hf_weights_map(model, processor, architecture)
    names = {own: name for name, own in mapped.items() if name in file.tensors}
    _require_all(model, file, names)
    return model, GgufSource(file, processor), names


def _reads_otherwise(architecture: str) -> bool:
    """Whether this transformers reads files of an architecture by other rules than those that are used here."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:  # Older versions have no other rules.
        return False
    return is_gguf_arch_supported(architecture)


def _require_all(model: Any, file: GgufFile, names: dict[str, str]) -> None:
    """Refuses a model and a file that do not hold the same numbers."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name not in names}
    require_whole(
        model,
        {"missing_keys": set(parameters), "mismatched_keys": [], "unexpected_keys": []},
        file.path,
        new_head=False,
    )
    held = sum(math.prod(shape) for name, (shape, _) in file.tensors.items() if not name.startswith("rope_f"))
    taken = sum(parameter.numel() for parameter in model.parameters())
    if held != taken:
        raise UnreadableModelError(
            f"{file.path} must hold the numbers that a {type(model).__name__} has, got {held:,} in the file and "
            f"{taken:,} in the model; transformers does not read this file whole"
        )
