"""Files of tensors, read and written a piece at a time, so that memory does not grow with the size of a file."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lte.files import replaced_atomically

PIECE_BYTES = 2**26
"""Of tensors that are copied as they are, so much is in memory at once."""

_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorSource(ABC):
    """Tensors by name that lie in files.

    Attributes:
        shapes: of all tensors.
        files: which hold them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    files: Sequence[Path]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU and in the dtype of its file."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor as rows one after the other, of `PIECE_BYTES` at most or a row."""
        yield self.read(name)


def safetensors_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: `model.safetensors`, or else those of its index; none where it has neither."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


class SafetensorsSource(TensorSource):
    """The tensors of the safetensors files of a folder: one file, or those that an index names.

    Args:
        folder: with `model.safetensors` or `model.safetensors.index.json`, the first of which counts if both are there,
            as for transformers.

    Raises:
        ValueError: if it has neither.
    """

    def __init__(self, folder: Path):
        self.files: Sequence[Path] = safetensors_files(folder)
        if not self.files:
            raise ValueError(
                f"model must hold its weights as safetensors to be converted layer by layer, got {folder} without "
                "model.safetensors and model.safetensors.index.json; load it with transformers and save it again"
            )
        self._places: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    self._places[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """As for `TensorSource`: a view of the mapped file, whose pages are read when they are needed."""
        # Opened anew each time: what was read leaves the memory with the tensor.
        with safe_open(self._places[name], framework="pt") as file:
            return file.get_tensor(name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """As for `TensorSource`."""
        shape = self.shapes[name]
        if not shape:
            yield self.read(name)
            return
        # Eight bytes a number at most.
        rows = max(1, PIECE_BYTES // max(1, 8 * math.prod(shape[1:])))
        for start in range(0, shape[0], rows):
            with safe_open(self._places[name], framework="pt") as file:
                yield file.get_slice(name)[start : start + rows]


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is to be written.

    Attributes:
        name: in the file.
        dtype: in the file.
        shape: of all of it.
        pieces: makes its rows, one part after the other, on any device and in any dtype.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: str | Path, tensors: Iterable[NewTensor]) -> dict[str, Any]:
    """Writes a safetensors file a piece at a time; it is there whole or not at all.

    Returns:
        Its `bytes` and `sha256`.

    Raises:
        RuntimeError: if pieces do not make up their tensor.
        OSError: if it cannot be written.
    """
    # As safetensors does: wide numbers first keeps all of them aligned.
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in ordered:
        start, end = end, end + tensor.num_bytes
        place = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[tensor.name] = place  # type: ignore[assignment]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    with replaced_atomically(path) as partial, partial.open("wb") as stream:
        for block in _blocks(len(text).to_bytes(8, "little") + text, ordered):
            digest.update(block)
            stream.write(block)
            written += len(block)
    return {"bytes": written, "sha256": digest.hexdigest()}


def _blocks(header: bytes, tensors: Iterable[NewTensor]) -> Iterator[Any]:
    yield header
    for tensor in tensors:
        written = 0
        for piece in tensor.pieces():
            numbers = piece.detach().to("cpu", tensor.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
            written += numbers.nbytes
            yield memoryview(numbers)
        if written != tensor.num_bytes:
            raise RuntimeError(f"{tensor.name} has {written} bytes of {tensor.num_bytes}")
