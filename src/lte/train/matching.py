"""Matching the output of each sparse FFN to a dense one's: the teacher's in the same layer, or its own.

The teacher's own outputs come from the pass that gives its logits: they cost memory for [B, T, D] per layer (0.7 GB at
24 layers of 16384 tokens x 896 in bf16) and no products. They stay what they are while the student changes, and undo
what earlier layers have added up to. The student's own dense output for the same input is one product with the down
projection more per layer, a third of an FFN's forward pass; it is a goal that the training itself moves.

Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lte.hf.families import dense_ffns, family_of
from lte.hf.install import wrapped_ffns
from lte.nn.matching import relative_error
from lte.nn.sparse_ffn import SparseFfn

KEPT = "_output_of_last_pass"
"""Of a projection that is watched: a dictionary with its output."""


class OutputMatch:
    """Keeps the outputs of FFNs, and the goals that they are matched to, for one training.

    Args:
        ffns: of the student, in depth order.
        teacher: whose FFNs are the goal; `None` takes each student's FFN with all its experts on.
        error: `lte.nn.matching.relative_error`, compiled or not.

    Raises:
        ValueError: if the teacher has other FFNs than the student, or if there is none and the FFNs are spread over
            their blocks, which alone know their outputs.
    """

    def __init__(
        self,
        ffns: Sequence[SparseFfn],
        teacher: nn.Module | None,
        error: Callable[[Tensor, Tensor, Tensor | None], Tensor] = relative_error,
    ):
        self.ffns, self.error = list(ffns), error
        self.teacher_downs = [] if teacher is None else _down_projections(teacher)
        self.is_own = teacher is None
        # Projections of students whose FFNs are spread over their blocks.
        self.spread_downs = {index: ffn.part(ffn.layout.down) for index, ffn in enumerate(self.ffns) if ffn.block}
        if self.is_own and any(ffn.block for ffn in self.ffns):
            raise ValueError(
                "match_to must be teacher for FFNs that are spread over their blocks, as in BERT and OPT, got "
                "match_to=own; give a teacher"
            )
        widths = [_width(down) for down in self.teacher_downs]
        if not self.is_own and widths != [ffn.hidden_size for ffn in self.ffns]:
            raise ValueError(
                "match_to must be own with a teacher of other layers than the model's, got match_to=teacher with "
                f"{len(widths)} FFNs of widths {sorted(set(widths))} in the teacher and {len(self.ffns)} in the model"
            )

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Looks at what the FFNs compute, in the block; to be entered before anything is compiled."""
        with ExitStack() as held:
            for down in self._watched:
                vars(down)[KEPT] = {}
                held.callback(vars(down).pop, KEPT)
                held.callback(down.register_forward_hook(_keep_output).remove)
            try:
                yield
            finally:
                self.forget()

    @property
    def _watched(self) -> list[Any]:
        return [*self.teacher_downs, *self.spread_downs.values()]

    def begin(self) -> None:
        """Makes the FFNs keep their outputs in the pass that follows."""
        for ffn in self.ffns:
            ffn.record_output, ffn.record_own = not ffn.block, self.is_own

    def forget(self, records: bool = False) -> None:
        """Lets all outputs go; those of layers that are computed again are not kept either, unless it still records."""
        for ffn in self.ffns:
            if not records:
                ffn.record_output = ffn.record_own = False
            ffn.forget_outputs()
        for down in self._watched:
            vars(down).get(KEPT, {}).clear()

    def take_loss(self, token_masks: Sequence[Tensor | None], records: bool = False) -> Tensor | None:
        """The mean over layers of the relative squared error in the pass that just ended; `None` if none was kept.

        Args:
            token_masks: [B, T] of each layer, true where a token counts; `None` counts all.
            records: whether the FFNs go on to keep their outputs, until `forget`.
        """
        losses = []
        for index, (ffn, mask) in enumerate(zip(self.ffns, token_masks, strict=True)):
            output = _kept_by(self.spread_downs[index]) if ffn.block else ffn.output
            target = ffn.own_output if self.is_own else _kept_by(self.teacher_downs[index])
            if output is not None and target is not None:
                mask = None if mask is None else mask.to(output.device)
                losses.append(self.error(output, target.to(output.device), mask))
        self.forget(records)
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean() if losses else None


def _keep_output(module: nn.Module, args: Any, output: Tensor) -> None:
    # One function for all, and a dictionary that it finds by the module: one compilation then serves all layers.
    vars(module)[KEPT]["output"] = output


def _kept_by(down: nn.Module) -> Tensor | None:
    return vars(down).get(KEPT, {}).get("output")


def _down_projections(model: nn.Module) -> list[Any]:
    wrapped = wrapped_ffns(model)
    if wrapped:
        return [ffn.part(ffn.layout.down) for ffn in wrapped.values()]
    family = family_of(model.config)
    return [ffn.get_submodule(family.layout.down) for ffn in dense_ffns(model, family).values()]


def _width(down: Any) -> int:
    """D, of `nn.Linear`, and of transformers' `Conv1D`."""
    return getattr(down, "out_features", None) or down.nf
