"""Bytes that a call must move: the weights that its tokens need, and what goes in and out.

Not counted: intermediate activations, which a kernel can keep, and biases and norms of the blocks' FFNs' size D.
"""

from __future__ import annotations

from lte.bench.dense import Projections
from lte.bench.models import ModelPair
from lte.nn.sparse_ffn import SparseFfn


def ffn_bytes(p: Projections, tokens: int, union: float = 1.0, int8: bool = False) -> float:
    """Bytes of one FFN without router.

    Args:
        p: its weights.
        tokens: T; their hidden states are read and their outputs written.
        union: share of the experts that at least one token needs.
        int8: whether a weight has one byte, and each neuron of gate and up and each output an fp32 scale.
    """
    neurons, hidden = p.up.shape
    per_neuron, per_output = float(p.neuron_bytes), 0
    if int8:
        inputs = 1 if p.gate is None else 2
        per_neuron, per_output = per_neuron / p.up.element_size() + 4 * inputs, 4
    return union * neurons * per_neuron + hidden * (per_output + 2 * tokens * p.up.element_size())


def router_bytes(ffn: SparseFfn) -> int:
    """Bytes of a layer's router, whose parameters the kernels for few tokens read as they are."""
    return sum(p.nbytes for p in ffn.router.parameters())


def other_bytes(pair: ModelPair, batch: int, context: int) -> int:
    """Bytes that a decoding step reads outside the FFNs: blocks, LM head, and the whole static key-value cache."""
    model = pair.dense
    ffns = {id(p) for ffn in pair.dense_ffns for p in ffn.parameters()}
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters() if id(p) not in ffns and p is not embeddings)
    tied = embeddings.nbytes if head is embeddings else 0
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head_size * context * batch
    return weights + tied + cache * pair.dtype.itemsize
