"""Loading dense models and tokenizers from a hub name, a local folder, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lte.files import is_gguf
from lte.hf.checkpoints import load_whole, reading, warn_of_shortened_texts
from lte.hf.gguf import check_gguf_model, gguf_config, gguf_tokenizer, read_gguf

# One of them is in every folder that a model or a tokenizer is loaded from.
_KNOWN_FILES = ("config.json", "adapter_config.json", "*token*", "vocab*")


def load_dense_model(name_or_path: str | Path, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """A dense causal LM; a GGUF file is de-quantised to `dtype`.

    Args:
        name_or_path: hub name, folder, or `.gguf` file.
        dtype: of the weights; `None` keeps the checkpoint's.

    Raises:
        ValueError: if a local path does not exist, if the files do not hold the whole model, or for a GGUF file that
            `lte.hf.gguf` refuses.
    """
    location = model_location(name_or_path)
    own = {"config": gguf_config(name_or_path)} if "gguf_file" in location else {}
    model = load_whole(AutoModelForCausalLM, location, **own, dtype=dtype or "auto")
    forget_gguf_(model)
    if own:
        check_gguf_model(model, name_or_path)
    return model


def forget_gguf_(model: Any) -> None:
    """Drops what transformers remembers of a GGUF file: the weights are plain numbers, but training and saving refuse.

    Models quantised in another way keep their marks, and are refused later for what they are.
    """
    quantization = getattr(model.config, "quantization_config", None)
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, dict)
        else getattr(quantization, "quant_method", "")
    )
    if "gguf" not in str(getattr(method, "value", method)).lower():
        return
    del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name, folder, or `.gguf` file; a missing pad token becomes the end-of-text token.

    Raises:
        ValueError: if there is none, its files are damaged, or for a GGUF file whose tokenizer `lte.hf.gguf` refuses.
    """
    location = model_location(name_or_path)
    if "gguf_file" in location:
        tokenizer = gguf_tokenizer(name_or_path)
    else:
        warn_of_shortened_texts(Path(location["pretrained_model_name_or_path"]))
        with reading(name_or_path, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(**location)
            longest = tokenizer.model_max_length
            if not isinstance(longest, int | float):
                raise ValueError(
                    f"tokenizer_config.json: model_max_length must be a number, got model_max_length={longest!r}"
                )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_location(name_or_path: str | Path) -> dict[str, Any]:
    """The arguments by which `from_pretrained` finds a hub name, folder, or `.gguf` file.

    Raises:
        ValueError: if a local path does not exist, holds nothing of a model, or for a GGUF file that
            `lte.hf.gguf.read_gguf` refuses.
    """
    path = Path(name_or_path)
    if not is_gguf(path):
        looks_local = str(name_or_path).startswith((".", "/", "~")) or str(name_or_path).count("/") > 1
        if looks_local and not path.expanduser().exists():
            raise ValueError(f"model must be a hub name, folder or GGUF file, got {name_or_path}, which does not exist")
        local = path.expanduser().exists()
        if path.expanduser().is_file():
            raise ValueError(
                f"model must be a hub name, folder or GGUF file, got {name_or_path}, a file of another kind; give the "
                "folder that it lies in"
            )
        if local and not any(file for kind in _KNOWN_FILES for file in path.expanduser().glob(kind)):
            raise ValueError(f"model must be a folder with a config.json, got {name_or_path}, which has none")
        return {"pretrained_model_name_or_path": str(path.expanduser()) if local else str(name_or_path)}
    path = read_gguf(path).path
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
