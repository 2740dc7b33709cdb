"""What a model of any kind is called with, and which of its tokens count in each FFN.

Shapes: B sequences, T tokens; an encoder-decoder has T tokens of its own on each side.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lte.config import IGNORED
from lte.hf.families import family_of

MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "decoder_input_ids",
    "decoder_attention_mask",
)
# What the families call their learned positions.
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")


def model_inputs(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a model is called with for a batch: no labels, but what an encoder-decoder's decoder reads is made of them.

    Always with `use_cache=False`: beside a cache transformers lets the documents of a packed row see each other.

    Raises:
        ValueError: if an encoder-decoder gets neither `decoder_input_ids` nor `labels`, and as `check_packing` and, for
            batches in the memory of the CPU, `check_tokens`: a GPU is not waited for.
    """
    check_packing(model, batch)
    if batch["input_ids"].device.type == "cpu":
        check_tokens(model, batch["input_ids"], batch.get("position_ids"))
    inputs: dict[str, Any] = {key: batch[key] for key in MODEL_INPUTS if key in batch}
    inputs["use_cache"] = False
    if _decodes_labels(model) and "decoder_input_ids" not in inputs:
        if "labels" not in batch:
            raise ValueError(
                f"batches for an encoder-decoder must hold labels or decoder_input_ids, got the keys {', '.join(batch)}"
            )
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    return inputs


def run_without_logits(model: Any, batch: Mapping[str, Tensor]) -> None:
    """Calls a model on a batch for what its modules see on the way.

    Where the model can leave them out, no logits but the last token's are made: [B, T, V] of them would be the largest
    tensor of all.

    Raises:
        ValueError: as `model_inputs`.
    """
    takes = inspect.signature(unwrapped(model).forward).parameters
    model(**model_inputs(model, batch), **({"logits_to_keep": 1} if "logits_to_keep" in takes else {}))


def check_packing(model: Any, batch: Mapping[str, Tensor]) -> None:
    """Refuses packed rows for a model whose attention would run over the documents' borders.

    Raises:
        ValueError: for `position_ids` in a batch for such a family.
    """
    family = family_of(model.config)
    if "position_ids" in batch and not family.separates_packed:
        raise ValueError(
            f"position_ids must not be in batches for {family.model_type}, whose attention would mix packed documents, "
            "got position_ids; set pack=False"
        )


def check_tokens(model: Any, input_ids: Tensor, position_ids: Tensor | None = None) -> None:
    """Refuses tokens and positions that the model has no embedding of, at which PyTorch stops without saying why.

    Args:
        model: of any kind; others than those of transformers are not looked at.
        input_ids: [B, T].
        position_ids: [B, T], where they do not count from the start of a row.

    Raises:
        ValueError: for an id outside of the vocabulary, or more tokens than a model with a table of positions has.
    """
    config = getattr(unwrapped(model), "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None or not input_ids.numel():
        return
    lowest, highest = (int(limit) for limit in torch.aminmax(input_ids))
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(
            f"input_ids must lie in 0 to {vocabulary - 1}, the model's vocabulary, got "
            f"{lowest if lowest < 0 else highest}; take the tokenizer that the model was made with"
        )
    longest = longest_input(model)
    length = input_ids.shape[1] if position_ids is None else int(position_ids.max()) + 1
    if longest is not None and length > longest:
        raise ValueError(
            f"input_ids must hold at most {longest} tokens in a row, the positions that the model has, got {length}; "
            "cut the text, or set a lower sequence_length"
        )


def longest_input(model: Any) -> int | None:
    """How many tokens a model with a table of positions reads; `None` for one that computes its positions."""
    inner = unwrapped(model)
    for name, module in inner.named_modules() if isinstance(inner, nn.Module) else ():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES:
            # OPT and RoBERTa leave out the first rows, RoBERTa up to that of the padding.
            unused = getattr(module, "offset", None) or (-1 if module.padding_idx is None else module.padding_idx) + 1
            return module.num_embeddings - unused
    return None


def _decodes_labels(model: Any) -> bool:
    """Whether a decoder reads tokens of its own. That of T5's classifier reads those of the encoder, shifted."""
    return model.config.is_encoder_decoder and hasattr(unwrapped(model), "prepare_decoder_input_ids_from_labels")


def predicts_next_token(model: Any) -> bool:
    """Whether the model has the head that predicts the next token of its input, and not another."""
    names = {base.__name__ for base in type(unwrapped(model)).__mro__}
    return family_of(model.config).models.get("AutoModelForCausalLM") in names


def check_next_token(config: Any) -> None:
    """Refuses an encoder as a model of the next token: it sees the tokens that it is to predict.

    Raises:
        ValueError: for the config of one, of BERT without `is_decoder`, say.
    """
    heads = family_of(config).models
    if "AutoModelForMaskedLM" in heads and not getattr(config, "is_decoder", False):
        raise ValueError(
            f"model must predict the next token from those before it, got model_type={config.model_type}, an encoder "
            "that sees all tokens; take a decoder, a task for encoders (lte train --task sst2), or the head for masked "
            "tokens"
        )


def unwrapped(model: Any) -> Any:
    """The transformers model inside adapters of peft; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _without_last_unlabelled(positions: Tensor, labels: Tensor) -> Tensor:
    """True but in the last document of a packed row of several, if it has no label; [B, T]."""
    place = torch.arange(positions.shape[1], device=positions.device)
    start = torch.where(positions == 0, place, 0).amax(1, keepdim=True)
    last = (place >= start) & (start > 0)
    return ~last | (last & (labels != IGNORED)).any(1, keepdim=True)


def padding_masks(model: Any, ffn_names: Iterable[str], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which tokens are no padding, bool [B, T], for each FFN by name: in a decoder with an encoder, its own.

    A decoder's tokens without `decoder_attention_mask` are padding where the labels are -100. Packed rows have no mask:
    their padding is a last document without a label.
    """
    ids = batch["input_ids"]
    encoder = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    if "attention_mask" not in batch and {"position_ids", "labels"} <= set(batch):
        encoder = _without_last_unlabelled(batch["position_ids"], batch["labels"])
    if not _decodes_labels(model):
        return dict.fromkeys(ffn_names, encoder)
    if "decoder_attention_mask" in batch:
        decoder = batch["decoder_attention_mask"].bool()
    elif "labels" in batch:
        decoder = batch["labels"] != IGNORED
    else:
        decoder = torch.ones_like(batch["decoder_input_ids"], dtype=torch.bool)
    return {name: decoder if "decoder" in name.split(".") else encoder for name in ffn_names}
