"""Small GGUF files of random models, written as llama.cpp writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

TEXT = """
once upon a time there was a little girl who lived in a small house near the forest. the girl would walk into the
forest every morning, and every evening she would come back to the house with flowers, berries and little stories.
her mother baked bread, her father mended shoes, and their neighbour counted the birds above the river and the hill.
The sun rises in the east and sets in the west. Die Hauptstadt von Italien ist Rom; El sol sale por el este.
"""
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE with a few dozen whole words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


def train_sentencepiece() -> tuple[Tokenizer, dict[str, Any]]:
    """BPE on text with its spaces marked and bytes to fall back on, and the metadata that tells of it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    count = tokenizer.get_vocab_size() - len(special)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [0.0] * len(special) + [-float(rank) for rank in range(count)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * count,
        "tokenizer.ggml.merges": None,
    }
    return tokenizer, metadata


def tiny_llama(vocab_size: int, **fields: Any) -> LlamaForCausalLM:
    """A random model of two layers."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    defaults = {"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **{**defaults, **fields})).eval()


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes a Llama with a byte-level tokenizer.

    Args:
        path: of the file.
        model: whose weights it holds, in float32.
        tokenizer: a byte-level BPE whose first tokens are `SPECIAL`.
        metadata: what to say besides or otherwise; `None` leaves a key out.
        tensors: other tensors to hold, by name.

    Returns:
        `path`.
    """
    config = model.config
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    fields: dict[str, Any] = {
        "general.type": "model",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.float().numpy()
        for part, count in heads.items():
            if part in name:  # llama.cpp has the halves of a head's rotary pairs interleaved.
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, np.ascontiguousarray(array))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def copy_gguf(path: Path, parts: int = 1, kind: gguf.GGMLQuantizationType | None = None) -> list[Path]:
    """Copies of a file in parts, as `llama-gguf-split` makes them, and with its matrices in another type."""
    reader = gguf.GGUFReader(path)
    per_part, copies = -(-len(reader.tensors) // parts), []
    for part in range(parts):
        ending = f"-{part + 1:05d}-of-{parts:05d}" if parts > 1 else f"-{kind.name if kind else 'copy'}"
        copies.append(path.with_name(f"{path.stem}{ending}.gguf"))
        writer = gguf.GGUFWriter(copies[-1], "llama")
        if part:
            writer.kv_data[0].clear()
        for key, found in reader.fields.items() if not part else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                writer.add_key_value(key, found.contents(), found.types[0], found.types[-1])
        if parts > 1:
            writer.add_uint16("split.no", part)
            writer.add_uint16("split.count", parts)
        for tensor in reader.tensors[part * per_part : (part + 1) * per_part]:
            if kind is None or tensor.data.ndim < 2:
                writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
            else:
                writer.add_tensor(tensor.name, gguf.quantize(np.array(tensor.data), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return copies


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """A model's predictions without gradients."""
    with torch.no_grad():
        return model(input_ids=tokens).logits
