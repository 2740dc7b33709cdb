"""Safetensors files that are written and read a piece at a time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lte.hf import tensor_files
from lte.hf.tensor_files import NewTensor, SafetensorsSource, write_tensors


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    numbers = {
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "one": torch.tensor(2.5),
        "flipped": torch.randn(4, 3).T,
        "whole": torch.arange(7),
        "none": torch.empty(0, 4),
    }
    tensors = [NewTensor(n, t.dtype, tuple(t.shape), lambda t=t: [t]) for n, t in numbers.items()]
    tensors.append(NewTensor("cast", torch.float16, (4, 2), lambda: iter(torch.ones(4, 2).split(3))))
    record = write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == {*numbers, "cast"}
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in numbers.items()
    )
    assert torch.equal(found["cast"], torch.ones(4, 2, dtype=torch.float16))
    content = (tmp_path / "x.safetensors").read_bytes()
    assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_pieces_that_do_not_make_up_a_tensor_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="x has 8 bytes of 16"):
        write_tensors(tmp_path / "x.safetensors", [NewTensor("x", torch.float32, (4,), lambda: [torch.ones(2)])])
    assert not list(tmp_path.iterdir())


def test_pieces_are_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"wide": torch.randn(10, 6), "one": torch.tensor(1.0)}
    save_file(numbers, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    monkeypatch.setattr(tensor_files, "PIECE_BYTES", 3 * 8 * 6)
    assert [len(piece) for piece in source.pieces("wide")] == [3, 3, 3, 1]
    assert torch.equal(torch.cat(list(source.pieces("wide"))), numbers["wide"])
    assert torch.equal(next(source.pieces("one")), numbers["one"])
    assert source.shapes == {"wide": (10, 6), "one": ()}


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model must hold its weights as safetensors"):
        SafetensorsSource(tmp_path)
