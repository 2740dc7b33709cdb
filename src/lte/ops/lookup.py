"""The text of prompt lookup on the device: what to propose, and what stays of it.

Shapes: L tokens of a prompt, K tokens proposed at most, n of a pass.
"""

from __future__ import annotations

import triton
from torch import Tensor

from lte.ops import lookup_kernels as kernels
from lte.ops.ready_kernel import ReadyKernel

BLOCK = 1024


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
        self._width = proposed + 1
        # Before the text stand tokens that are none, so that all places have others before them.
        self._text = ids.new_full((gram + longest,), -1)
        self._text[gram : gram + len(ids)] = ids
        self._state = ids.new_full((2,), len(ids))
        self._state[1] = 0
        self._offered = ids.new_zeros(1)
        self._message = ids.new_zeros(self._width + 3)
        self._passes: dict[int, tuple[list[Tensor], ReadyKernel, ReadyKernel]] = {}

    def _pass(self, proposed: int) -> tuple[list[Tensor], ReadyKernel, ReadyKernel]:
        """Memory for the tokens, positions and starts of a pass, and the kernels before and after it."""
        if proposed in self._passes:
            return self._passes[proposed]
        shared = {"GRAM": self._gram, "K": proposed, "R": triton.next_power_of_2(proposed + 1)}
        inputs = [self._text.new_empty(proposed + 1) for _ in range(3)]
        before = ReadyKernel(kernels.propose_kernel, {**shared, "BLOCK": BLOCK, "num_warps": 4})
        # It writes what it has read: one warp, all of whose lanes have read by then.
        after = ReadyKernel(kernels.keep_kernel, {**shared, "WIDTH": self._width, "num_warps": 1})
        self._passes[proposed] = inputs, before, after
        return self._passes[proposed]

    def propose(self, proposed: int) -> list[Tensor]:
        """Tokens, positions and starts [n + 1] of a pass over the last token and n proposed ones.

        Those that there are none of begin after their positions. The next call with the same n writes them anew.
        """
        inputs, kernel, _ = self._pass(proposed)
        kernel(1, True, self._text, self._state, self._start, *inputs, self._offered)
        return inputs

    def keep(self, chosen: Tensor, proposed: int) -> Tensor:
        """Continues the text by what stays of a pass, the one that `propose` began last.

        Args:
            chosen: the token that the model writes after each of them, int64 [n + 1].
            proposed: n.

        Returns:
            The chosen tokens in the first of K + 1 places, how many of them stay, how many were proposed, and whether
            the text has ended: [K + 4], which the next call writes anew. Nothing stays after the end.
        """
        (tokens, *_), _, kernel = self._pass(proposed)
        numbers = self._longest, self._ends.numel()
        kernel(
            1, True, chosen, tokens, self._offered, self._text, self._state, self._ends, self._message, *numbers
        )  # fmt: skip
        return self._message

    def known(self, length: int) -> Tensor:
        """A copy of the first tokens [length]."""
        return self._text[self._gram : self._gram + length].clone()
