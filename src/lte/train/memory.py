"""What a training needs of a GPU's memory, estimated before it begins: bytes per parameter, and per token.

Shapes: D hidden size, F neurons, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from lte.hf.families import dense_ffns, family_of
from lte.hf.inputs import predicts_next_token, unwrapped
from lte.hf.install import sparse_ffns, wrapped_ffns
from lte.hf.language_head import language_head
from lte.hf.loading import FP32_NAMES
from lte.train.chunked_loss import chunk_tokens
from lte.train.config import TrainConfig
from lte.train.optimisers import LEAST_NARROW, OPTIMISERS, optimiser_name
from lte.train.processes import end_for_all

# Numbers of width D, by byte, that a block keeps for its backward pass beside those of its FFN: measured in Qwen2 and
# Llama. Norms and the sums of their residuals are in fp32, where autocast does not reach and in bf16 itself in part.
_OF_BLOCK = {"fp32": 38.0, "autocast": 33.0, "bf16": 23.0}
# fp32 tensors of a chunk's logits at once: probabilities of both, their logarithms, a gradient.
_OF_CHUNK = 4
# Of 4-bit weights, with the scales of blocks of 64.
_NF4_BYTES = 0.5 + 4 / 64


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on each GPU, without what CUDA takes for itself, about 1 GB.

    Attributes:
        weights: of the model, with autocast's copies in bf16.
        gradients: of what trains.
        moments: of the optimiser.
        teacher: its weights.
        activations: that the backward pass of one forward pass needs.
        loss: logits and what is made of them.
    """

    weights: float
    gradients: float
    moments: float
    teacher: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        """The sum; not all of it is there at the same time."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def not_offloaded(self) -> float:
        """What stays on the GPU where weights, gradients and moments lie on the CPU, without the layer at hand."""
        return self.teacher + self.activations + self.loss

    def sentence(self) -> str:
        """All parts in GB, for the start of a run."""
        parts = [f"{field.name} {getattr(self, field.name) / 1e9:.2g}" for field in fields(self)]
        return f"about {self.total / 1e9:.2g} GB ({', '.join(parts)})"


@dataclass(frozen=True)
class _Parameter:
    """A parameter as it will be in training."""

    numel: int
    bytes_each: float
    trains: bool
    is_router: bool = False
    is_embedding: bool = False
    is_matrix: bool = False


def estimate_memory(
    model: Any, config: TrainConfig, sequence_length: int, teacher: nn.Module | None = None
) -> MemoryEstimate:
    """What a training needs, from the shapes of its model and its settings; rough where activations are meant.

    Args:
        model: with its method, before adapters and other dtypes; its weights may be on the meta device.
        config: of the training.
        sequence_length: tokens of a row.
        teacher: as it will be used, or `None`.
    """
    parameters = list(_parameters(model, config))
    trained = [each for each in parameters if each.trains]
    name = optimiser_name(config, cuda=True)
    in_bf16 = config.bf16 and config.weights_dtype == "float32"
    copies = 2.0 * sum(each.numel for each in parameters if each.is_matrix and each.bytes_each == 4 and in_bf16)
    tokens = config.batch_size * sequence_length
    return MemoryEstimate(
        weights=sum(each.numel * each.bytes_each for each in parameters) + copies,
        gradients=sum(each.numel * each.bytes_each for each in trained),
        moments=sum(each.numel * _moment_bytes(each, name) for each in trained),
        teacher=0.0 if teacher is None else float(sum(p.nbytes for p in teacher.parameters())),
        activations=_activations(model, config, tokens),
        loss=_loss(model, config, tokens, teacher is not None),
    )


def _parameters(model: Any, config: TrainConfig) -> Iterator[_Parameter]:
    """Those of the model, then those of adapters that it will get."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = unwrapped(model).get_output_embeddings()
    kept = embeddings | ({id(head.weight)} if head is not None else set())
    own = {id(p) for ffn in wrapped_ffns(model).values() for p in ffn.own_parameters()}
    narrow = 2.0 if config.weights_dtype == "bfloat16" or (config.lora_4bit and config.bf16) else 4.0
    for name, p in model.named_parameters():
        is_router = not FP32_NAMES.isdisjoint(name.split("."))
        trains = p.requires_grad and (config.trainable == "all" or (id(p) in own and config.trainable == "ffn"))
        trains = is_router if config.lora_rank or config.trainable == "routers" else trains
        is_linear = p.ndim == 2 and id(p) not in kept and not is_router
        each = 4.0 if is_router else _NF4_BYTES if config.lora_4bit and is_linear else narrow
        is_matrix = is_linear or (head is not None and p is head.weight)
        yield _Parameter(p.numel(), each, trains, is_router, id(p) in embeddings, is_matrix)
        if config.lora_rank and is_linear:
            yield _Parameter(config.lora_rank * sum(p.shape), 4.0, True, is_matrix=True)


def stored_bytes(model: Any, config: TrainConfig) -> tuple[int, int, int]:
    """Bytes of all weights as they train, of those that train, and of the optimiser's moments."""
    parameters, name = list(_parameters(model, config)), optimiser_name(config, cuda=True)
    trained = [each for each in parameters if each.trains]
    # Those of adapters are not among the model's.
    own = [each for each in parameters if not (config.lora_rank and each.trains and not each.is_router)]
    sums = (
        sum(each.numel * each.bytes_each for each in own),
        sum(each.numel * each.bytes_each for each in trained),
        sum(each.numel * _moment_bytes(each, name) for each in trained),
    )
    return int(sums[0]), int(sums[1]), int(sums[2])


def saved_numbers(model: nn.Module) -> tuple[int, int]:
    """How many weights a model has, and how many of its routers, which are saved in fp32."""
    counts = [0, 0]
    for name, parameter in model.named_parameters():
        counts[not FP32_NAMES.isdisjoint(name.split("."))] += parameter.numel()
    return counts[0], counts[1]


def _moment_bytes(parameter: _Parameter, name: str) -> float:
    optimiser = OPTIMISERS[name]
    wide = parameter.is_router or parameter.numel < LEAST_NARROW or parameter.numel % optimiser.block
    wide = wide or (parameter.is_embedding and optimiser.wide_embeddings)
    return 2 * parameter.bytes_each if optimiser.moment_bytes is None or wide else optimiser.moment_bytes


def _activations(model: Any, config: TrainConfig, tokens: int) -> float:
    ffns = sparse_ffns(model) or wrapped_ffns(model)
    layers = len(ffns) or len(dense_ffns(unwrapped(model), family_of(model.config)))
    layout = family_of(model.config).layout
    neurons = getattr(model.config, family_of(model.config).neurons_field, None) or 4 * model.config.hidden_size
    kind = "bf16" if config.weights_dtype == "bfloat16" else "autocast" if config.bf16 else "fp32"
    number, residual = (4 if kind == "fp32" else 2), (2 if kind == "bf16" else 4)
    gated = layout.fused or layout.gate is not None
    experts = sum(ffn.num_experts for ffn in sparse_ffns(model).values()) / max(1, layers)
    width = model.config.hidden_size
    block = (4 if gated else 3) * neurons * number + _OF_BLOCK[kind] * width + 2 * 4 * experts
    if config.gradient_checkpointing:
        return tokens * (layers * (width * residual + 4 * experts) + block)
    return tokens * layers * block


def _loss(model: Any, config: TrainConfig, tokens: int, distils: bool) -> float:
    if not predicts_next_token(model):
        return 0.0
    head, vocabulary = language_head(model), model.config.vocab_size
    if head is None or config.loss_chunk_tokens == 0:
        # In two dtypes, their log-softmax, and its gradient.
        narrow = 2 if config.bf16 or config.weights_dtype == "bfloat16" else 4
        return tokens * vocabulary * (narrow + 12 + (distils * (narrow + 8)))
    chunk = min(tokens, config.loss_chunk_tokens or chunk_tokens(vocabulary))
    trains = config.trainable == "all" and not config.lora_rank
    return chunk * vocabulary * 4 * _OF_CHUNK + (4 * head.weight.numel() if trains else 0)


class TrainingMemoryError(torch.OutOfMemoryError):
    """Too little memory for a training; the message names the settings to lower."""


@contextmanager
def explained_memory(args: Any) -> Iterator[None]:
    """Says what to lower where a GPU's memory is not enough; of several processes one that lacks it ends all.

    Args:
        args: `transformers.TrainingArguments`.

    Raises:
        TrainingMemoryError: in the place of `torch.OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows, passes = args.per_device_train_batch_size, args.gradient_accumulation_steps
        checkpoints = any(getattr(args, f"{kind}_checkpointing", False) for kind in ("gradient", "activation"))
        hints = [] if checkpoints else ["set gradient_checkpointing"]
        if rows > 1:
            less = f"lower the batch size (per_device_train_batch_size={rows}) to {rows // 2}"
            hints = [f"{less} and raise gradient_accumulation_steps={passes} to {2 * passes}", *hints]
        hints += ["shorten the rows", "take an optimiser with narrow moments, LoRA, or more GPUs (FSDP2)"]
        found = TrainingMemoryError(f"the training needs more memory than there is: {'; '.join(hints)}. {error}")
        end_for_all(found)
        raise found from error


def gpu_bytes() -> int | None:
    """The memory of this process's GPU, `None` without one."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
