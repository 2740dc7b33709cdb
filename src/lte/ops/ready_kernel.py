"""Launching a compiled kernel without Triton's search for it, which takes several times as long as the launch."""

from __future__ import annotations

from typing import Any


class ReadyKernel:
    """A kernel with settled constants, which Triton looks for at the first launch alone.

    What Triton compiles depends, beyond the constants, on dtypes, on which arguments are `None` and on which tensors
    are aligned to 16 bytes. All launches must agree in that, except for one tensor that may be aligned or not.

    Args:
        kernel: of `triton.jit`.
        constants: by name, those of the kernel that follow its arguments, and options of the launch.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any]):
        self._kernel, self._constants = kernel, constants
        self._settled: list[Any] = []
        self._compiled: dict[bool, Any] = {}

    def __call__(self, programs: int, aligned: bool, *arguments: Any) -> None:
        """Launches so many programs on the arguments; `aligned` is whether the one tensor that may not be is."""
        compiled = self._compiled.get(aligned)
        if compiled is not None:
            compiled[(programs, 1, 1)](*arguments, *self._settled)
            return
        compiled = self._kernel[(programs,)](*arguments, **self._constants)
        if compiled is not None:  # as it is in the interpreter
            # By position, as a compiled kernel takes them.
            self._settled = [self._constants[name] for name in self._kernel.arg_names[len(arguments) :]]
            self._compiled[aligned] = compiled
