"""The CUDA kernel's source: its structures as the host fills them, and its machine code by NVRTC, kept on disk.

PyTorch's CUDA builds on Linux bring NVRTC and `cuda.bindings`; nothing here needs a GPU, `nvcc` or CUDA's headers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lte.files import replaced_atomically

SOURCE = Path(__file__).parent / "step.cu"
HEADERS = [SOURCE.with_name(name) for name in ("device.h", "tile.h")]
_DIGEST = hashlib.sha256().digest_size


@functools.cache
def structures() -> dict[str, type[ctypes.Structure]]:
    """The structures `Layer` and `Args` of step.cu, read from its text, so that there is one place for their fields."""
    text = re.sub(r"//.*", "", SOURCE.read_text(encoding="utf-8"))
    found: dict[str, type[ctypes.Structure]] = {}
    for name in ("Layer", "Args"):
        body = re.search(rf"struct {name} {{(.*?)}};", text, re.DOTALL)
        assert body is not None, name
        fields: list[tuple[str, Any]] = []
        for declaration in filter(None, map(str.strip, body[1].split(";"))):
            kind = {"int": ctypes.c_int, "float": ctypes.c_float}.get(declaration.split()[0], ctypes.c_void_p)
            for one in declaration.split(","):
                fields.append((re.findall(r"\w+", one)[-1], ctypes.c_void_p if "*" in one else kind))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


def definitions(macros: Mapping[str, int]) -> list[str]:
    """The compiler's options for macros without their prefix, and for the sizes that the structures must have."""
    sizes = {f"{name.upper()}_BYTES": ctypes.sizeof(kind) for name, kind in structures().items()}
    return [f"-DLTE_{name}={value}" for name, value in sorted({**macros, **sizes}.items())]


@functools.cache
def missing() -> str | None:
    """Why nothing can be compiled here, `None` if it can, in words that go on from "as ..."."""
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401

        nvrtc.nvrtcVersion()
    except Exception as error:  # the packages' own errors, several of them, when a library is not found
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"cuda.bindings and NVRTC, which PyTorch's CUDA builds for Linux bring, cannot be used ({reason})"
    return None


def _checked(result: tuple[Any, ...]) -> Any:
    from cuda.bindings import nvrtc

    if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(result[0])[1].decode()}")
    return result[1] if len(result) == 2 else result[1:]


def _buffer(size: int) -> bytes:
    """Memory that NVRTC writes into. One byte more than it asks for: Python shares all objects of a single byte."""
    return bytes(size + 1)


def compile_cubin(macros: Mapping[str, int], arch: int, options: tuple[str, ...] = ()) -> tuple[bytes, str]:
    """Compiles the kernel.

    Args:
        macros: see `lte.ops.step.cuda.macros`.
        arch: compute capability as one number, 90 for 9.0.
        options: more of NVRTC's.

    Returns:
        The machine code, and what the compiler said.

    Raises:
        RuntimeError: NVRTC refuses it; the message holds its log.
    """
    from cuda.bindings import nvrtc

    source, *headers = (path.read_bytes() for path in (SOURCE, *HEADERS))
    names = [path.name.encode() for path in HEADERS]
    program = _checked(nvrtc.nvrtcCreateProgram(source, SOURCE.name.encode(), len(headers), headers, names))
    try:
        texts = [f"--gpu-architecture=sm_{arch}", "--std=c++17", "-default-device", *definitions(macros), *options]
        (code,) = nvrtc.nvrtcCompileProgram(program, len(texts), [text.encode() for text in texts])
        log = _buffer(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        said = log.rstrip(b"\0").decode(errors="replace")
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"the kernel does not compile for sm_{arch}: {said}")
        size = _checked(nvrtc.nvrtcGetCUBINSize(program))
        cubin = _buffer(size)
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin[:size], said
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def cache_folder() -> Path:
    """Where machine code is kept: `lte` in the user's folder for caches."""
    home = os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME") or tempfile.gettempdir(), ".cache")
    return Path(home) / "lte" / "kernels"


def cubin_path(macros: Mapping[str, int], arch: int) -> Path:
    """Where the machine code is kept, by all that it depends on."""
    from cuda.bindings import nvrtc

    parts = [path.read_text(encoding="utf-8") for path in (SOURCE, *HEADERS)]
    parts += [*definitions(macros), str(arch), str(nvrtc.nvrtcVersion()[1:])]
    return cache_folder() / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:40]}.cubin"


def cached_cubin(macros: Mapping[str, int], arch: int) -> bytes:
    """The machine code from the disk, or compiled and kept there.

    A file that is damaged, or a folder that cannot be written, costs the seconds of compiling, no more.

    Raises:
        RuntimeError: as `compile_cubin`.
    """
    path, kept = cubin_path(macros, arch), b""
    with suppress(OSError):
        kept = path.read_bytes()
    digest, cubin = kept[:_DIGEST], kept[_DIGEST:]
    if cubin and hashlib.sha256(cubin).digest() == digest:
        return cubin
    cubin, _ = compile_cubin(macros, arch)
    with suppress(OSError), replaced_atomically(path) as partial:
        partial.write_bytes(hashlib.sha256(cubin).digest() + cubin)
    return cubin
