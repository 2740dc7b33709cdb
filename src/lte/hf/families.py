"""The model families that lte converts: one row per `model_type`.

To add a family, add a row: the names of its stock classes, and an `FfnLayout` that says which projection of
its FFN does what. `tests/hf/test_families.py` then converts, trains, saves and reloads it on a tiny random
config. A family whose FFN is no module of its own (OPT) or spans two (BERT) names its block instead, and a layout
with `spread=True`, whose names are paths in the block.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import ModuleType
from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto

from lte.nn.sparse_ffn import FfnLayout

GATED = FfnLayout()
FUSED_GATED = FfnLayout(up="gate_up_proj", gate=None, fused=True, activation="activation_fn")
_T5 = FfnLayout(up="wi", gate=None, down="wo", activation="act", inner_dropout="dropout", casts_to_down=True)


@dataclass(frozen=True)
class BlockLayout:
    """Which submodules of a decoder's block do what around its FFN, by the family's names; see `lte.hf.decoder`.

    Attributes:
        queries_keys_values: of the attention: the three projections, or one that stacks them.
        out: of the attention: its output projection.
        norm1: of the block: the norm before attention.
        norm2: the norm before the FFN.
        post1, post2: the norms of what attention and the FFN add to the residual, if the family has them.
        norm_plus_one: whether norms multiply by 1 + weight.
        caps_scores: whether attention takes `config.attn_logit_softcapping`.
    """

    queries_keys_values: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    norm1: str = "input_layernorm"
    norm2: str = "post_attention_layernorm"
    post1: str | None = None
    post2: str | None = None
    norm_plus_one: bool = False
    caps_scores: bool = False


@dataclass(frozen=True)
class Family:
    """What lte must know of one `model_type` of transformers.

    Attributes:
        model_type: the stock `config.model_type`.
        module: the family's package in `transformers.models`.
        config_class: name of the stock config class.
        ffn_class: name of the stock FFN class that is replaced, or of the block that holds a spread FFN.
        layout: roles of the FFN's projections.
        activation_field: config field that names the activation function.
        neurons_field: config field that holds the number of neurons.
        models: which stock model class each Auto class loads, the one with the family's own head first.
        separates_packed: whether `position_ids` that start anew keep attention within each document of a packed row.
        takes_neurons: whether the FFN class takes the number of neurons before the config.
        gated: the row for configs whose `is_gated_act` is true, for a family that has both kinds of FFN.
        block: what whole decoding steps must know of the family's blocks; `None` if no engine has such steps.
    """

    model_type: str
    module: str
    config_class: str
    ffn_class: str
    layout: FfnLayout = GATED
    activation_field: str = "hidden_act"
    neurons_field: str = "intermediate_size"
    models: dict[str, str] = field(default_factory=dict)
    separates_packed: bool = True
    takes_neurons: bool = False
    gated: Family | None = None
    block: BlockLayout | None = None

    @property
    def sparse_model_type(self) -> str:
        """The `model_type` of the saved sparse folder, unknown to transformers without lte."""
        return f"lte_{self.model_type}"

    @cached_property
    def heads(self) -> dict[str, str]:
        """As `models`, with every further head that an Auto class of transformers has for the family."""
        found = dict(self.models)
        for name, auto_class in vars(modeling_auto).items():
            mapping = getattr(auto_class, "_model_mapping", None)
            if name.startswith("AutoModel") and mapping is not None:
                with suppress(KeyError):
                    stock = mapping[self.stock_class(self.config_class)]
                    if stock.__module__ == self.module_of_models().__name__:
                        found.setdefault(name, stock.__name__)
        return found

    def module_of_models(self) -> ModuleType:
        """The module of transformers with the family's model classes."""
        return importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")

    def stock_class(self, name: str) -> type[Any]:
        """A class of the family from transformers, by name."""
        if name != self.config_class:
            return getattr(self.module_of_models(), name)
        return getattr(importlib.import_module(f"transformers.models.{self.module}.configuration_{self.module}"), name)

    def new_ffn(self, config: Any, neurons: int) -> nn.Module:
        """A stock FFN with random weights."""
        return self.stock_class(self.ffn_class)(*((neurons,) if self.takes_neurons else ()), config)


_LLAMA_BLOCK = BlockLayout()
_PHI3_BLOCK = BlockLayout(queries_keys_values=("qkv_proj",))
_GEMMA_BLOCK = BlockLayout(
    norm2="pre_feedforward_layernorm",
    post1="post_attention_layernorm",
    post2="post_feedforward_layernorm",
    norm_plus_one=True,
)


def _decoder(model_type: str, prefix: str, module: str | None = None, **row: Any) -> Family:
    defaults = {
        "config_class": f"{prefix}Config",
        "ffn_class": f"{prefix}MLP",
        "models": _heads(prefix, "CausalLM", "SequenceClassification"),
    }
    return Family(model_type=model_type, module=module or model_type, **{**defaults, **row})


def _heads(prefix: str, *heads: str, **classes: str) -> dict[str, str]:
    """The Auto classes of the heads, whose stock classes have regular names but for `classes`, and of none."""
    named = {head: classes.get(head, f"{prefix}For{head}") for head in heads}
    return {**{f"AutoModelFor{head}": name for head, name in named.items()}, "AutoModel": f"{prefix}Model"}


def _t5() -> Family:
    models = _heads(
        "T5",
        *("Seq2SeqLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"),
        Seq2SeqLM="T5ForConditionalGeneration",
    )
    # The config derives dense_act_fn from feed_forward_proj, and then takes what the file holds for it.
    plain = Family(
        model_type="t5",
        module="t5",
        config_class="T5Config",
        ffn_class="T5DenseActDense",
        layout=_T5,
        activation_field="dense_act_fn",
        neurons_field="d_ff",
        models={**models, "AutoModelForTextEncoding": "T5EncoderModel"},
    )
    gated = replace(plain, ffn_class="T5DenseGatedActDense", layout=replace(_T5, gate="wi_0", up="wi_1"))
    return replace(plain, gated=gated)


_ON_TEXT = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


def _bert(model_type: str, prefix: str, *heads: str, **classes: str) -> Family:
    """A family whose blocks have the two modules `intermediate` and `output` of BERT."""
    return Family(
        model_type=model_type,
        module=model_type,
        config_class=f"{prefix}Config",
        ffn_class=f"{prefix}Layer",
        layout=FfnLayout(
            up="intermediate.dense",
            gate=None,
            down="output.dense",
            activation="intermediate.intermediate_act_fn",
            spread=True,
        ),
        models=_heads(prefix, "MaskedLM", *_ON_TEXT, "MultipleChoice", "CausalLM", *heads, **classes),
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _decoder("llama", "Llama", block=_LLAMA_BLOCK),
        _decoder("mistral", "Mistral", block=_LLAMA_BLOCK),
        _decoder("qwen2", "Qwen2", block=_LLAMA_BLOCK),
        _decoder("qwen3", "Qwen3", block=_LLAMA_BLOCK),
        _decoder(
            "gemma2",
            "Gemma2",
            activation_field="hidden_activation",
            block=replace(_GEMMA_BLOCK, caps_scores=True),
        ),
        _decoder(
            "gemma3_text",
            "Gemma3",
            module="gemma3",
            config_class="Gemma3TextConfig",
            activation_field="hidden_activation",
            models=_heads("Gemma3Text", "CausalLM", "SequenceClassification", CausalLM="Gemma3ForCausalLM"),
            block=_GEMMA_BLOCK,
        ),
        _decoder("phi3", "Phi3", layout=FUSED_GATED, block=_PHI3_BLOCK),
        _decoder(
            "phi",
            "Phi",
            layout=FfnLayout(up="fc1", gate=None, down="fc2", activation="activation_fn"),
            models=_heads("Phi", "CausalLM", "SequenceClassification", "TokenClassification"),
        ),
        _decoder(
            "gpt_neox",
            "GPTNeoX",
            layout=FfnLayout(up="dense_h_to_4h", gate=None, down="dense_4h_to_h", activation="act"),
            models=_heads("GPTNeoX", "CausalLM", *_ON_TEXT),
        ),
        Family(
            model_type="distilbert",
            module="distilbert",
            config_class="DistilBertConfig",
            ffn_class="FFN",
            layout=FfnLayout(up="lin1", gate=None, down="lin2", activation="activation", outer_dropout="dropout"),
            activation_field="activation",
            neurons_field="hidden_dim",
            models=_heads("DistilBert", "MaskedLM", *_ON_TEXT, "MultipleChoice"),
        ),
        Family(
            model_type="gpt2",
            module="gpt2",
            config_class="GPT2Config",
            ffn_class="GPT2MLP",
            layout=FfnLayout(
                up="c_fc", gate=None, down="c_proj", activation="act", outer_dropout="dropout", transposed=True
            ),
            activation_field="activation_function",
            neurons_field="n_inner",
            models=_heads("GPT2", "CausalLM", *_ON_TEXT, CausalLM="GPT2LMHeadModel"),
            takes_neurons=True,
        ),
        _t5(),
        Family(
            model_type="opt",
            module="opt",
            config_class="OPTConfig",
            ffn_class="OPTDecoderLayer",
            layout=FfnLayout(up="fc1", gate=None, down="fc2", activation="activation_fn", spread=True),
            activation_field="activation_function",
            neurons_field="ffn_dim",
            models=_heads("OPT", "CausalLM", "SequenceClassification", "QuestionAnswering"),
            separates_packed=False,
        ),
        _bert("bert", "Bert", "NextSentencePrediction", CausalLM="BertLMHeadModel"),
        _bert("roberta", "Roberta"),
        _bert("electra", "Electra"),
    )
}


_INPUTS = {"vision_config": "pictures", "audio_config": "sound"}
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


def _refusal(config: Any, model_type: Any) -> str:
    """Why a model without a row is refused: what it is, if that is known, in one sentence."""
    inputs = [name for field, name in _INPUTS.items() if getattr(config, field, None) is not None]
    if inputs:
        return (
            f"model must take text alone, got model_type={model_type!r}, which also takes {' and '.join(inputs)}; "
            f"lte converts text models of the families {', '.join(FAMILIES)}"
        )
    holders = (config, getattr(config, "ffn_config", None))  # DBRX keeps its counts in a config of their own
    if any(getattr(holder, field, None) for holder in holders for field in _EXPERT_COUNTS):
        return (
            f"model must have dense FFNs, got model_type={model_type!r}, a mixture of experts that routes its tokens "
            f"already; lte converts dense models of the families {', '.join(FAMILIES)}"
        )
    return (
        f"model_type must be one of {', '.join(FAMILIES)}, got model_type={model_type!r}. To "
        "support another family, add a row to FAMILIES in lte/hf/families.py (its FFN class and projection names)."
    )


def family_of(config: Any) -> Family:
    """The row of a stock or sparse config.

    Raises:
        ValueError: for a `model_type` that has no row, listing those that have one, or saying that the model is a
            mixture of experts or takes pictures or sound.
    """
    model_type = getattr(config, "model_type", None) or type(config).__name__
    row = FAMILIES.get(str(model_type).removeprefix("lte_"))
    if row is None:
        raise ValueError(_refusal(config, model_type))
    return row.gated if row.gated is not None and getattr(config, "is_gated_act", False) else row


def saved_head(config: Any) -> str | None:
    """The name of the Auto class that loads the head which a config says was saved; `None` for a class of its own."""
    family = family_of(config)
    saved = {str(name).removeprefix("Lte") for name in getattr(config, "architectures", None) or ()}
    found = [auto for auto, stock in family.heads.items() if stock in saved]
    return next(iter(found or ([] if saved else family.models)), None)


def dense_ffns(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    """The stock FFN modules of `model` by qualified name, in depth order."""
    ffn_class = family.stock_class(family.ffn_class)
    return {name: module for name, module in model.named_modules() if isinstance(module, ffn_class)}


def block_name(ffn_name: str) -> str:
    """The name of the transformer block that an FFN lies in, by the FFN's: `encoder.block.0` of T5, say.

    Blocks are elements of the outermost list of modules on the way.
    """
    parts = ffn_name.split(".")
    index = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: index + 1])
