"""What the neurons of a checkpoint's FFNs do on text, a transformer block at a time.

The model runs as it is, with one block loaded: hidden states of all texts go through it together and wait for the next.
What else a block is called with (masks, positions) does not depend on hidden states in a family whose blocks follow one
another, and is noted once, while blocks pass on what they get.

The activations of a block's neurons wait on the disk until its weights are gone: the sums [F, F] that are made of them
are as large as a block, and memory never holds both.

Shapes: B rows, T tokens, D hidden size, F neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lte.config import LteConfig
from lte.files import replaced_atomically
from lte.hf.convert import Activity, collectors, down_norms
from lte.hf.families import Family, block_name, dense_ffns
from lte.hf.inputs import model_inputs, padding_masks
from lte.hf.streaming import Checkpoint
from lte.nn.hooks import before_each_call


class _AllNotedError(Exception):
    """Ends a pass once the last block is called."""


class StreamedActivity:
    """Gives the activity of one FFN after the other, in the order of their blocks.

    Args:
        checkpoint: of the dense model.
        family: its row.
        config: of the LTE model, which says what is collected.
        batches: text, each of few rows: activations of one batch are in memory at a time.
        device: that runs the blocks.
        folder: where the hidden states between blocks are kept, so that a process goes on with the block it was at, and
            the activations of one block.

    Raises:
        ValueError: for an encoder-decoder, whose decoder's blocks see what its encoder gives.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        config: LteConfig,
        batches: Sequence[Mapping[str, Tensor]],
        device: torch.device,
        folder: Path,
    ):
        if checkpoint.model.config.is_encoder_decoder:
            raise ValueError(
                "grouping must go by weights where an encoder-decoder is converted layer by layer, got "
                f"{family.model_type}; use lte train or lte.sparsify_ for it"
            )
        self.checkpoint, self.family, self.config, self.folder = checkpoint, family, config, folder
        self.device = device
        self.batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
        self.model = _empty_copy(checkpoint.model, device)
        self.ffns = dense_ffns(self.model, family)
        self.blocks = list(dict.fromkeys(map(block_name, self.ffns)))
        self._calls: list[dict[str, tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._states: list[Tensor] = []
        self._next = 0
        # Of the FFNs whose activations lie in the folder, the norms of what their neurons are multiplied with.
        self._norms: dict[str, Tensor] = {}

    def of(self, ffn: str) -> Activity:
        """The activity of an FFN by its name; asked for in the order of blocks, each once."""
        wanted = self.blocks.index(block_name(ffn))
        if not self._calls:
            self._begin(wanted)
        while ffn not in self._norms:
            self._norms.clear()
            self._run(self.blocks[self._next])
        return self._summed(ffn)

    def _summed(self, ffn: str) -> Activity:
        """The activity of an FFN from its activations, which go."""
        found = collectors(self.config, self._norms.pop(ffn))
        for place in range(len(self.batches)):
            path = self._activations(ffn, place)
            kept = load_file(path, device=str(self.device))
            found.update(kept["hidden"], kept["mask"])
            path.unlink()
        return found

    @torch.no_grad()
    def _begin(self, wanted: int) -> None:
        """Notes what blocks are called with, and takes the hidden states that are kept, if it goes on."""
        states = self._note_calls()
        for index in range(wanted, 0, -1):
            if self._file(index).is_file():
                kept = load_file(self._file(index))
                self._next, states = index, [kept[str(place)] for place in range(len(kept))]
                break
        self._states = states

    def _note_calls(self) -> list[Tensor]:
        """Calls the model without its blocks but the first, which shows what a block returns; its inputs, [B, T, D]."""
        first, states = self.blocks[0], []
        inner = [name for name in self.model.state_dict() if not self._is_in_block(name) and not self._is_head(name)]
        modules = {block: self.model.get_submodule(block) for block in self.blocks}
        with self._loaded([*inner, *self._names_of(first)]):
            for batch in self.batches:
                calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
                with _replaced(modules, calls), suppress(_AllNotedError):
                    self.model(**model_inputs(self.model, batch))
                args, kwargs = calls[first]
                states.append((args[0] if args else kwargs["hidden_states"]).cpu())
                self._calls.append({block: _without_states(*call) for block, call in calls.items()})
        return states

    @torch.no_grad()
    def _run(self, block: str) -> None:
        """Sends all hidden states through a block, and keeps the activations of its FFNs."""
        names = [name for name in self.ffns if block_name(name) == block]
        module: Any = self.model.get_submodule(block)
        masks: dict[str, Tensor] = {}
        place = 0

        def keep(name: str, args: tuple[Any, ...]) -> None:
            held = {"hidden": args[0].contiguous(), "mask": masks[name].contiguous()}
            save_file(held, self._activations(name, place))

        self.folder.mkdir(parents=True, exist_ok=True)
        with self._loaded(self._names_of(block)):
            downs: dict[str, Any] = {name: self.ffns[name].get_submodule(self.family.layout.down) for name in names}
            self._norms = {name: down_norms(self.family.layout.matrix(down)) for name, down in downs.items()}
            with before_each_call(downs, keep):
                for place, (batch, calls) in enumerate(zip(self.batches, self._calls, strict=True)):
                    masks.update(padding_masks(self.model, names, batch))
                    args, kwargs = calls[block]
                    output = module(self._states[place].to(self.device), *args, **kwargs)
                    self._states[place] = (output if isinstance(output, Tensor) else output[0]).cpu()
        self._next += 1
        self._keep()

    def _keep(self) -> None:
        """Writes what the next block gets; what the block before got stays, as its shard is not written yet."""
        with replaced_atomically(self._file(self._next)) as path:
            save_file({str(place): states for place, states in enumerate(self._states)}, path)
        self._file(self._next - 2).unlink(missing_ok=True)

    def _file(self, index: int) -> Path:
        return self.folder / f"states-{index:05d}.safetensors"

    def _activations(self, ffn: str, place: int) -> Path:
        return self.folder / f"{ffn}-{place:05d}.safetensors"

    def _is_in_block(self, name: str) -> bool:
        return any(name.startswith(f"{block}.") for block in self.blocks)

    def _is_head(self, name: str) -> bool:
        head = self.model.get_output_embeddings()
        return head is not None and self.model.get_submodule(name.rpartition(".")[0]) is head

    def _names_of(self, block: str) -> list[str]:
        return [name for name in self.model.state_dict() if name.startswith(f"{block}.")]

    @contextmanager
    def _loaded(self, names: Iterable[str]) -> Iterator[None]:
        """Has tensors of the model in memory inside the block, those that the checkpoint holds."""
        names = [name for name in names if name in self.checkpoint.names]
        try:
            for name in names:
                value = self.checkpoint.read(name)
                set_module_tensor_to_device(self.model, name, self.device, value=value, dtype=value.dtype)
            yield
        finally:
            for name in names:
                set_module_tensor_to_device(self.model, name, "meta")


def _empty_copy(model: Any, device: torch.device) -> Any:
    """A model of the same class and config whose parameters hold nothing, with the buffers that it makes itself."""
    with init_empty_weights():
        made = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    for name, buffer in made.named_buffers():
        if not buffer.is_meta:
            set_module_tensor_to_device(made, name, device)
    return made.eval()


def _without_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a block is called with beside hidden states."""
    return args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}


@contextmanager
def _replaced(
    modules: Mapping[str, nn.Module], calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]]
) -> Iterator[None]:
    """Has blocks note their calls; the first runs, others return the hidden states that they get in its form."""
    blocks = list(modules)
    last, in_tuple = blocks[-1], False

    def forward(block: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal in_tuple
        calls[block] = (args, kwargs)
        if block == last:
            raise _AllNotedError
        if block == blocks[0]:
            output = type(modules[block]).forward(modules[block], *args, **kwargs)
            in_tuple = not isinstance(output, Tensor)
            return output
        states = args[0] if args else kwargs["hidden_states"]
        return (states,) if in_tuple else states

    try:
        for block, module in modules.items():
            vars(module)["forward"] = lambda *args, block=block, **kwargs: forward(block, *args, **kwargs)
        yield
    finally:
        for module in modules.values():
            del vars(module)["forward"]
