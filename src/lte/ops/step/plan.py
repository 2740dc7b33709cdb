"""What one decoding step of a whole decoder computes: all weights by their role, as every engine takes them.

An engine computes, for B sequences that each read one token: embedding, and in each layer norm, queries, keys and
values, rotary embedding, cache write, attention over the cache, output product, residual, norm, router, sparse FFN,
residual; then the final norm and the head.

Shapes: B sequences, D hidden size, HQ heads of queries, HKV of keys and values, HD their size, F neurons, E experts of
S = F / E neurons, V vocabulary, C tokens that a cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A matrix W of whole numbers: W[n, k] = values[n, k] scales[.] + zeros[.].

    Scales are shared by groups of the input of the product: [N, 1] (8 bits) or [N, K / g] (4 bits), and [1, K] or
    [N / g, K] for the transposed down projection, whose rows are inputs.

    Attributes:
        values: int8 [N, K]; from -8 to 7 if they have 4 bits.
        scales: fp32 for 8 bits; the dtype of the other weights for 4 bits.
        zeros: as the scales; `None` for none. Only of 4 bits.
        bits: 8 or 4.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    bits: int = 8

    def __post_init__(self) -> None:
        shape, few = tuple(self.values.shape), tuple(self.scales.shape)
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got bits={self.bits}")
        fits = len(shape) == len(few) == 2 and all(m > 0 and n % m == 0 for n, m in zip(shape, few, strict=True))
        if not fits or (shape[0] != few[0] and shape[1] != few[1]):
            raise ValueError(f"scales must be [N, K / g] or [N / g, K] of values {shape}, got scales={few}")
        if self.zeros is not None and (self.bits == 8 or self.zeros.shape != self.scales.shape):
            raise ValueError(f"zeros must be of 4 bits and as scales {few}, got zeros={tuple(self.zeros.shape)}")

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    @property
    def group(self) -> int:
        """g: how many numbers along the input share a scale."""
        (rows, columns), (few_rows, few_columns) = self.shape, self.scales.shape
        return max(rows // few_rows, columns // few_columns)

    def split(self, sizes: Sequence[int]) -> list[Quantized]:
        """So many rows each, as `Tensor.split`; scales must be of rows."""
        zeros = [None] * len(sizes) if self.zeros is None else self.zeros.split(list(sizes))
        parts = zip(self.values.split(list(sizes)), self.scales.split(list(sizes)), zeros, strict=True)
        return [replace(self, values=values, scales=scales, zeros=zero) for values, scales, zero in parts]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [N, K], computed in fp32 and rounded once."""

        def spread(some: Tensor) -> Tensor:
            rows, columns = (whole // part for whole, part in zip(self.shape, some.shape, strict=True))
            return some.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)

        weight = self.values * spread(self.scales)
        return (weight if self.zeros is None else weight + spread(self.zeros)).to(dtype)


Matrix = Tensor | Quantized


def dense(weight: Matrix, dtype: torch.dtype) -> Tensor:
    """A matrix as it is, or if it is quantised in `dtype`."""
    return weight.dense(dtype) if isinstance(weight, Quantized) else weight


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """The weights of one layer; all but the router have one dtype, and the rows of all matrices are contiguous.

    Matrices may be `Quantized`, all of attention alike and all of the FFN alike.

    Attributes:
        norm1: weight of the norm before attention, [D].
        q: [HQ HD, D].
        k: [HKV HD, D].
        v: [HKV HD, D].
        out: [D, HQ HD].
        norm2: weight of the norm before the FFN, [D].
        up: [F, D].
        down: the down projection transposed, [F, D], so that an expert is S contiguous rows.
        gate: [F, D]; `None` for a plain FFN act(x W_up) W_down.
        router: [E, D], in any floating dtype: as in `lte.ops.arguments.Routing`, W and its product with x are rounded
            to the dtype of the other weights, and the bias is added in fp32. `None` for a dense FFN.
        router_bias: [E], any floating dtype.
        threshold: of the router's logits: greater ones are on.
        q_bias, k_bias, v_bias, out_bias, up_bias, gate_bias, down_bias: of the products; `None` for none.
        q_norm, k_norm: weights [HD] of a norm of each head of queries and keys, before the rotary embedding.
        post1, post2: weights [D] of a norm of what attention and the FFN add to the residual.
        window: how many of the last tokens, itself included, a token sees; 0 for all.
        rope: which of `DecoderPlan.ropes` turns its queries and keys.
    """

    norm1: Tensor
    q: Matrix
    k: Matrix
    v: Matrix
    out: Matrix
    norm2: Tensor
    up: Matrix
    down: Matrix
    gate: Matrix | None = None
    router: Tensor | None = None
    router_bias: Tensor | None = None
    threshold: float = 0.0
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    out_bias: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    post1: Tensor | None = None
    post2: Tensor | None = None
    window: int = 0
    rope: int = 0


@dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary embedding of the first 2 len(frequencies) numbers of a head, halves as in GPT-NeoX and Llama.

    Attributes:
        frequencies: fp32, angle per position; only those that do not change with the length of the text.
        factor: of cosines and sines (the "attention scaling" of YaRN).
    """

    frequencies: Tensor
    factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DecoderPlan:
    """A whole decoder.

    Attributes:
        layers: in depth order.
        embedding: [V, D].
        final_norm: [D].
        head: [V, D]; the embedding itself where they are tied. It may be `Quantized`.
        head_bias: [V] or `None`.
        ropes: see `DecoderLayer.rope`.
        heads: HQ.
        kv_heads: HKV.
        head_size: HD.
        activation: a key of `lte.ops.activations.ACTIVATIONS`.
        eps: of all norms.
        norm_plus_one: whether norms multiply by 1 + weight, as Gemma's do; else by the weight.
        embedding_scale: of embeddings, rounded to their dtype as the family rounds it; the product is rounded too.
        score_scale: of attention scores.
        score_cap: c, if scores s become c tanh(s / c); 0 for none.
        logit_cap: the same for the head's logits.
    """

    layers: Sequence[DecoderLayer]
    embedding: Tensor
    final_norm: Tensor
    head: Matrix
    ropes: Sequence[Rope]
    heads: int
    kv_heads: int
    head_size: int
    activation: str
    eps: float
    head_bias: Tensor | None = None
    norm_plus_one: bool = False
    embedding_scale: float = 1.0
    score_scale: float = 1.0
    score_cap: float = 0.0
    logit_cap: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LayerCache:
    """Keys and values of one layer, which an engine reads and writes in place.

    The token at position p lies in slot (p + shift) % C; a layer whose window is shorter than the text holds its last
    C tokens alone, C >= window.

    Attributes:
        keys: [B, HKV, C, HD], of the weights' dtype, each sequence's [HKV, C, HD] contiguous.
        values: [B, HKV, C, HD].
        shift: where position 0 lies or would lie.
    """

    keys: Tensor
    values: Tensor
    shift: int = 0


def rows_of(caches: Sequence[LayerCache], tokens: int, most: int) -> int:
    """How many tokens a step on these caches reads, see `Engine.bind`; `most` is what the engine takes.

    Raises:
        ValueError: for several tokens of several sequences, or too many of one.
    """
    batch = len(caches[0].keys)
    if tokens < 1 or (tokens > 1 and (batch > 1 or tokens > most)):
        raise ValueError(
            f"tokens must be 1, or up to {most} of a single sequence, got tokens={tokens} of {batch} sequences; read "
            "more of them in several steps"
        )
    return batch * tokens


class DecodeStep(Protocol):
    """An engine that is bound to a plan and the caches of B sequences, or of one of which it reads B tokens at once."""

    def __call__(self, tokens: Tensor, positions: Tensor, starts: Tensor) -> Tensor:
        """Reads one token of each sequence: writes its keys and values into the caches, and returns its logits.

        Of several tokens of one sequence each sees those before it, and their positions follow each other. The last of
        them may begin after their positions: they are none. Their logits, their places in the caches and what `active`
        says of them are of any content then, and an engine may leave out what they alone would need.

        Args:
            tokens: int64 [B].
            positions: int64 [B]: where each token stands, counted from slot 0 with padding included.
            starts: int64 [B]: the first position of each sequence that is no padding, 0 without padding on the left.
                The rotary embedding counts from here, and earlier positions are not seen.

        Returns:
            fp32 [B, V], in memory that the next call may write anew.
        """
        ...

    def active(self) -> Tensor:
        """Which experts of the plan's last layer the last call switched on, bool [B, E]; it waits for the device.

        For measurements: a plan of the first layers alone tells what the engine decided in any of them.
        """
        ...


class Engine(Protocol):
    """What computes the steps of one plan; making it may take long, so that it is kept as long as the plan holds.

    A module of engines, `lte.ops.step.cpu` and `lte.ops.step.cuda`, has the class (`CpuEngine`, `CudaEngine`) and a
    function `unfit(plan, caches) -> str | None`: quickly, what in the plan, the caches or the machine the engine
    cannot compute, in words that go on from "as ..."; `lte.ops.step.engines` asks it first, and only then for the
    class. These caches may lie on the meta device: their shapes and dtype count alone.

    The engine reads the plan's tensors where they lie: numbers may be written into them between steps. It holds no
    reference to a model, and nothing of one `bind` is needed by another.
    """

    def __init__(self, plan: DecoderPlan) -> None: ...

    def bind(self, caches: Sequence[LayerCache], tokens: int = 1, *, fewer: bool = False) -> DecodeStep:
        """A step on these caches, one for each layer; quick, as each generation has caches of its own.

        With `tokens` above 1 the caches are of one sequence, and a step reads so many tokens of it that follow each
        other, as a batch of so many: `unfit` says of caches of that batch whether the engine can. Where a text outgrows
        the cache of a layer with a window, that cache holds C >= window + tokens - 1. With `fewer` the last tokens are
        none in many passes, for which it may pay to look first how many there are.

        Called anew at the start of each generation: what an engine copied from the weights, tables or a rounded router
        say, it copies anew here. Scratch belongs to the step, not to the engine: steps of one engine may run at the
        same time, each in a thread and a stream of its own, and a step that an exception interrupted leaves nothing
        behind for the next.
        """
        ...
