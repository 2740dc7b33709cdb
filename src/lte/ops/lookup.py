"""The text of prompt lookup on the device: what to propose, and what stays of it.

Shapes: L tokens of a prompt, K tokens proposed at most.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lte.ops import lookup_kernels as kernels
from lte.ops.ready_kernel import ReadyKernel

BLOCK = 1024
# At the beginning of an answer, by `lte.ops.lookup_kernels`: a guess of 15, 33, 60 and 80 of 100. What they are for a
# model and some prompts is counted by `benchmarks/speculation.py` (`matches`).
TRUST = (614, 1352, 2458, 3277)


class LookupText:
    """A text, and the passes that continue it; nothing here waits for the device.

    Args:
        ids: the prompt [L] and the first token after it, int64.
        start: where the text begins in the cache, int64 [1].
        proposed: K.
        gram: tokens of the longest match that is looked for.
        longest: tokens of the text at most.
        ends: tokens that end it, int64 [any number].
    """

    def __init__(self, ids: Tensor, start: Tensor, proposed: int, gram: int, longest: int, ends: Tensor):
        self._gram, self._longest, self._start = gram, longest, start
        self._ends = ends if ends.numel() else ids.new_full((1,), -1)  # which is no token
        # Before the text stand tokens that are none, so that all places have others before them.
        self._text = ids.new_full((gram + longest,), -1)
        self._text[gram : gram + len(ids)] = ids
        self._state = ids.new_full((2,), len(ids))
        self._state[1] = 0
        self._inputs = [ids.new_empty(proposed + 1) for _ in range(3)]
        self._offered, self._message = ids.new_zeros(1), ids.new_zeros(proposed + 3)
        self._trust = ids.new_full((len(TRUST) + 2,), -1)
        for kind, share in enumerate(TRUST):
            self._trust[kind] = share
        shared = {"GRAM": gram, "K": proposed, "R": triton.next_power_of_2(proposed + 1)}
        self._propose = ReadyKernel(kernels.propose_kernel, {**shared, "BLOCK": BLOCK, "num_warps": 4})
        # It writes what it has read: one warp, all of whose lanes have read by then.
        self._keep = ReadyKernel(kernels.keep_kernel, {**shared, "num_warps": 1})

    def propose(self) -> list[Tensor]:
        """Tokens, positions and starts [K + 1] of a pass over the last token and those proposed, in the same memory.

        Those that there are none of begin after their positions.
        """
        with torch.cuda.device_of(self._text):  # Triton launches on the current GPU
            self._propose(1, True, self._text, self._state, self._start, *self._inputs, self._offered, self._trust)
        return self._inputs

    def keep(self, chosen: Tensor) -> Tensor:
        """Continues the text by what stays of the pass that `propose` has begun.

        Args:
            chosen: the token that the model writes after each of its tokens, int64 [K + 1].

        Returns:
            The chosen tokens, how many of them stay, and whether the text has ended: [K + 3], which the next call
            writes anew. Nothing stays after the end.
        """
        tensors = chosen, self._inputs[0], self._offered, self._text, self._state, self._ends, self._message
        with torch.cuda.device_of(self._text):
            self._keep(1, True, *tensors, self._trust, self._longest, self._ends.numel())
        return self._message

    def known(self, length: int) -> Tensor:
        """A copy of the first tokens [length]."""
        return self._text[self._gram : self._gram + length].clone()
