"""Models of known shapes with random weights, made on the device at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lte.config import check_choice

# Loaded where they are used: the names of the shapes are among the flags.
if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import LlamaConfig

SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 4096,
    },
    "llama2-13b": {
        "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40, "max_position_embeddings": 4096,
    },
    "llama2-70b": {
        "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 4096,
    },
    "llama3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "smollm2-1.7b": {
        "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "num_attention_heads": 32, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    },
}  # fmt: skip


def shape_config(name: str, layers: int | None = None) -> LlamaConfig:
    """The config of a shape, with its first `layers` layers only if given.

    Raises:
        ValueError: for an unknown shape or more layers than it has.
    """
    from transformers import LlamaConfig

    return LlamaConfig(**shape_settings(name, layers))


def shape_settings(name: str, layers: int | None = None) -> dict[str, Any]:
    """What the config of a shape holds; the arguments and errors are those of `shape_config`."""
    check_choice("shape", name, SHAPES)
    settings = dict(SHAPES[name])
    if layers is not None:
        if not 1 <= layers <= settings["num_hidden_layers"]:
            raise ValueError(f"layers must lie in [1, {settings['num_hidden_layers']}] for {name}, got layers={layers}")
        settings["num_hidden_layers"] = layers
    return settings


def random_model(config: Any, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A stock causal LM whose matrices are normal with std fan_in**-0.5; norms are 1, biases 0.

    Raises:
        ValueError: for a model with buffers other than those of rotary embeddings, whose values are not known here.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                # Embeddings have unit entries, as a hidden state has.
                std = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
                parameter.normal_(std=std, generator=generator)
    model.tie_weights()
    for module in model.modules():
        _compute_buffers_(module)
    return model.eval()


def _compute_buffers_(module: nn.Module) -> None:
    buffers = dict(module.named_buffers(recurse=False))
    if not buffers:
        return
    if "inv_freq" not in buffers:
        raise ValueError(f"model must have no buffers but rotary ones, got {', '.join(buffers)} of {type(module)}")
    computed: Any = type(module)(module.config)
    for name, buffer in buffers.items():
        value = getattr(computed, name)
        # In the precision of a loaded model: fp32 whatever the weights' dtype.
        setattr(module, name, value.to(buffer.device))
