"""A model of transformers as the plan of a whole decoding step: all weights by their role, read where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from lte.hf.activations import activation_name
from lte.hf.families import BlockLayout, Family, family_of
from lte.nn.accelerated import AcceleratedFfn
from lte.nn.ffn_parts import ROLES, bias_of, weight_of
from lte.nn.quantized_ffn import QuantizedFfn
from lte.nn.router import Router
from lte.nn.shards import is_sharded
from lte.nn.torchao_weights import is_torchao, quantized_matrix
from lte.nn.wrapped_ffn import FfnLayout
from lte.ops.arguments import DTYPES
from lte.ops.layout import by_neuron
from lte.ops.step.plan import DecoderLayer, DecoderPlan, Matrix, Quantized, Rope

# Those whose frequencies do not depend on how long the text is.
_ROPES = ("default", "linear", "llama3", "yarn")
_ATTENTIONS = ("eager", "sdpa")
# These compute the same in training mode, in which a head is that `resize_token_embeddings` made.
_SAME_IN_TRAINING = (nn.Linear, nn.Embedding, nn.ModuleList, nn.Identity)
_PLAIN = (*_SAME_IN_TRAINING, nn.Dropout, QuantizedFfn, Router)


class NoPlanError(ValueError):
    """Why a model has no plan, in words that go on from "as ..."."""


class NotNowError(NoPlanError):
    """Why a model has no plan in the state that it is in, training say, or of which its FFNs have told already."""


@torch.inference_mode(False)
@torch.no_grad()
def decoder_plan(model: nn.Module, *, lay_out_dense: bool = False) -> DecoderPlan:
    """The plan of an accelerated LTE model, or of a dense one, as its modules and config are now.

    Its tensors are views of the parameters: what is written into these later counts, but for a router in fp32 of a
    model in 16 bits, which is rounded here (see `lte.ops.arguments.Routing`), and for frequencies that are not in fp32.
    What is moved or replaced later does not count: make the plan anew, which takes some milliseconds.

    Args:
        model: with the head that predicts the next token.
        lay_out_dense: whether the down projections of a dense model may be laid out by neuron, each in its own
            parameter, which keeps its shape and its values; else it has no plan unless they lie so already.

    Raises:
        NoPlanError: for a family or a setting that no engine knows, modules with hooks, adapters, weights that others
            quantised, weights of several dtypes or on several devices, and FFNs that are not accelerated or not in
            hard mode.
    """
    config: Any = getattr(model, "config", None)
    try:
        family = family_of(config)
    except ValueError as error:
        raise NoPlanError(f"its family is unknown: {error}") from None
    if family.block is None:
        raise NoPlanError(f"{family.model_type} models have no such step yet")
    _check_modules(model, family)
    return _PlanMaker(model, family, family.block, lay_out_dense).plan()


def same_memory(one: DecoderPlan, other: DecoderPlan) -> bool:
    """Whether an engine of the one plan computes the other, too: the same settings, and weights in the same places."""
    return _signature(one) == _signature(other)


@torch.inference_mode(False)
@torch.no_grad()
def take_frequencies_(kept: DecoderPlan, now: DecoderPlan) -> None:
    """Writes the frequencies of a plan, which may be copies, into those of another with the `same_memory`."""
    for old, new in zip(kept.ropes, now.ropes, strict=True):
        if old.frequencies.data_ptr() != new.frequencies.data_ptr():
            old.frequencies.copy_(new.frequencies)


def _signature(plan: DecoderPlan) -> list[Any]:
    places: list[Any] = [(len(rope.frequencies), rope.factor) for rope in plan.ropes]
    parts: list[Any] = [plan, *plan.layers]
    for part in parts:
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, Quantized):
                parts.append(value)
            elif isinstance(value, Tensor):
                places.append((value.data_ptr(), value.shape, value.stride(), value.dtype, value.device))
            elif not isinstance(value, Sequence) or isinstance(value, str):
                places.append(value)
    return places


def _check_modules(model: nn.Module, family: Family) -> None:
    """Refuses a model that would compute something else than the family's own modules do."""
    own, stock = family.module_of_models().__name__, family.stock_class(family.models["AutoModelForCausalLM"])
    if not isinstance(model, stock) or type(model).forward is not stock.forward:
        raise NoPlanError(f"it is a {type(model).__name__}, no plain {stock.__name__}")
    if _global_forward_hooks or _global_forward_pre_hooks:
        raise NoPlanError("there are hooks on all modules")
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise NoPlanError("its weights are spread over processes")
    inside: tuple[nn.Module, ...] = ()
    for name, module in model.named_modules():
        kind, place = type(module), name or "the model"
        if module in inside:
            continue
        if module._forward_hooks or module._forward_pre_hooks:
            raise NoPlanError(f"{place} has hooks")
        if "forward" in module.__dict__ or module._compiled_call_impl is not None:
            raise NoPlanError(f"the forward method of {place} was replaced or compiled")
        if isinstance(module, AcceleratedFfn):
            # It looks after its parts itself.
            inside = tuple(module.modules())
            continue
        plain = module is model or kind in _PLAIN or activation_name(module) is not None
        if not plain and (kind.__module__ != own or kind.forward.__module__ != own):
            raise NoPlanError(f"{place} is a {kind.__module__}.{kind.__qualname__}")
        if module.training and kind not in _SAME_IN_TRAINING:
            raise NotNowError(f"{place} is in training mode")


@dataclass(frozen=True)
class _DenseFfn:
    """A stock FFN as `lte.nn.ffn_parts` takes it."""

    module: nn.Module
    layout: FfnLayout

    def part(self, name: str) -> nn.Module:
        return self.module.get_submodule(name)


class _PlanMaker:
    def __init__(self, model: Any, family: Family, block: BlockLayout, lay_out_dense: bool):
        self.config, self.family, self.block, self.lay_out_dense = model.config, family, block, lay_out_dense
        self.model, self.inner = model, model.model
        weight = self.inner.embed_tokens.weight
        self.dtype, self.device = weight.dtype, weight.device
        if self.dtype not in DTYPES:
            raise NoPlanError(f"its weights are {self.dtype}")
        self.probe = torch.empty(1, weight.shape[1], dtype=self.dtype, device=self.device)
        self.activations, self.epsilons = set[str](), set[float]()
        self.ropes: dict[str | None, Rope] = {}

    def plan(self) -> DecoderPlan:
        config, inner, attention = self.config, self.inner, self.inner.layers[0].self_attn
        implementation = getattr(config, "_attn_implementation", None)
        if implementation not in _ATTENTIONS:
            raise NoPlanError(f"its attention is {implementation}, not {' or '.join(_ATTENTIONS)}")
        if getattr(config, "use_bidirectional_attention", False):
            raise NoPlanError("its attention is bidirectional")
        layers = [self._layer(index, layer) for index, layer in enumerate(inner.layers[: config.num_hidden_layers])]
        scale = getattr(inner.embed_tokens, "embed_scale", None)
        plan = DecoderPlan(
            layers=layers,
            embedding=self._plain(inner.embed_tokens, "its embedding"),
            final_norm=self._norm(inner.norm),
            head=self._weight(self.model.lm_head, "its head"),
            head_bias=self._bias(self.model.lm_head, "its head"),
            ropes=list(self.ropes.values()),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=attention.head_dim,
            activation=self._same("activation", self.activations),
            eps=self._same("epsilon", self.epsilons),
            norm_plus_one=self.block.norm_plus_one,
            embedding_scale=1.0 if scale is None else scale.to(self.dtype).item(),
            score_scale=self._same("scale", {layer.self_attn.scaling for layer in inner.layers}),
            score_cap=(getattr(config, "attn_logit_softcapping", None) or 0.0) if self.block.caps_scores else 0.0,
            logit_cap=getattr(config, "final_logit_softcapping", None) or 0.0,
        )
        self._check_shapes(plan)
        return plan

    def _same(self, name: str, found: set[Any]) -> Any:
        if len(found) != 1:
            raise NoPlanError(f"its layers differ in their {name}: {', '.join(map(str, sorted(found)))}")
        return found.pop()

    def _check_shapes(self, plan: DecoderPlan) -> None:
        queries, others = plan.heads * plan.head_size, plan.kv_heads * plan.head_size
        for layer in plan.layers:
            if (len(layer.q), len(layer.k), len(layer.v)) != (queries, others, others):
                raise NoPlanError("its layers differ in their heads")

    def _layer(self, index: int, layer: Any) -> DecoderLayer:
        block, attention, where = self.block, layer.self_attn, f"layer {index}"
        queries = self.config.num_attention_heads * attention.head_dim
        others = self.config.num_key_value_heads * attention.head_dim
        weights, biases = list[Matrix](), list[Tensor | None]()
        for name in block.queries_keys_values:
            projection = getattr(attention, name)
            weights.append(self._weight(projection, f"{name} of {where}"))
            biases.append(self._bias(projection, f"{name} of {where}"))
        if len(weights) == 1:
            stacked, sizes = biases[0], (queries, others, others)
            if len(weights[0]) != sum(sizes):
                raise NoPlanError("its layers differ in their heads")
            weights = list[Matrix](weights[0].split(sizes))
            biases = [None] * 3 if stacked is None else list(stacked.split(sizes))
        out = getattr(attention, block.out)
        norms = {name: getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)}
        names = {"norm1": block.norm1, "norm2": block.norm2, "post1": block.post1, "post2": block.post2}
        norms |= {role: getattr(layer, name) for role, name in names.items() if name is not None}
        found: dict[str, Any] = {role: self._norm(norm) for role, norm in norms.items()}
        found |= dict(zip(("q", "k", "v"), weights, strict=True))
        found |= dict(zip(("q_bias", "k_bias", "v_bias"), biases, strict=True))
        return DecoderLayer(
            **found,
            **self._ffn(layer.mlp, where),
            out=self._weight(out, f"the output projection of {where}"),
            out_bias=self._bias(out, f"the output projection of {where}"),
            window=self._window(index, attention),
            rope=self._rope(index),
        )

    def _tensor(self, tensor: Any, what: str) -> Tensor:
        if type(tensor) is not nn.Parameter:
            raise NoPlanError(f"{what} holds a {type(tensor).__name__}")
        if tensor.dtype != self.dtype or tensor.device != self.device:
            raise NoPlanError(f"{what} is {tensor.dtype} on {tensor.device}, and others {self.dtype} on {self.device}")
        if tensor.device.type == "meta":
            raise NoPlanError(f"{what} is on the meta device")
        return tensor.detach()

    def _weight(self, module: Any, what: str) -> Matrix:
        if type(module) is not nn.Linear and not isinstance(module, nn.Embedding):
            raise NoPlanError(f"{what} is a {type(module).__qualname__}")
        if type(module) is nn.Linear and is_torchao(module.weight):
            return self._quantized(module, what)
        return self._plain(module, what)

    def _plain(self, module: Any, what: str) -> Tensor:
        weight = self._tensor(module.weight, what)
        if not weight.is_contiguous():
            raise NoPlanError(f"the rows of {what} are not contiguous")
        return weight

    def _quantized(self, module: Any, what: str, transposed: bool = False) -> Quantized:
        try:
            found = quantized_matrix(module.weight, self.dtype, transposed=transposed)
        except ValueError as error:
            raise NoPlanError(f"{what} holds {error}") from None
        if found.values.device != self.device:
            raise NoPlanError(f"{what} lies on {found.values.device}, and others on {self.device}")
        return found

    def _bias(self, module: Any, what: str) -> Tensor | None:
        return None if module.bias is None else self._tensor(module.bias, what)

    def _norm(self, norm: Any) -> Tensor:
        # One class or the other of transformers.
        self.epsilons.add(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)
        return self._tensor(norm.weight, "a norm")

    def _ffn(self, ffn: Any, where: str) -> dict[str, Any]:
        if isinstance(ffn, QuantizedFfn):
            return self._quantized_ffn(ffn, where)
        if not isinstance(ffn, AcceleratedFfn):
            return self._parts(self._dense_ffn(ffn, where))
        if ffn.router.down is not None:
            raise NoPlanError("its routers are of low rank")
        if ffn.record_logits:
            raise NotNowError("its routing is recorded")
        if not ffn.takes(self.probe):
            raise NotNowError(f"the FFN of {where} is computed by plain PyTorch now")
        self.activations.add(ffn.acceleration.activation)
        routing = ffn.routing
        router, bias = (self._view(tensor) for tensor in (routing.rounded_weight(), routing.bias))
        return {**self._parts(ffn), "router": router, "router_bias": bias, "threshold": routing.threshold}

    def _quantized_ffn(self, ffn: QuantizedFfn, where: str) -> dict[str, Any]:
        if ffn.router.down is not None:
            raise NoPlanError("its routers are of low rank")
        if ffn.record_logits:
            raise NotNowError("its routing is recorded")
        if ffn.mode != "hard":
            raise NotNowError(f"the FFN of {where} is in {ffn.mode} mode")
        name = activation_name(ffn.activation_function)
        if name is None:
            raise NoPlanError(f"the activation of {where} is unknown")
        self.activations.add(name)
        matrices = ffn.matrices(lambda part, down: self._quantized(part, f"the FFN of {where}", down))
        biases = {f"{role}_bias": self._view(bias_of(ffn, role)) for role in ROLES}
        router, bias = (self._view(tensor) for tensor in (ffn.router.weight, ffn.router.bias))
        return {**matrices, **biases, "router": router, "router_bias": bias, "threshold": ffn.threshold_logit}

    def _parts(self, ffn: Any) -> dict[str, Any]:
        found: dict[str, Any] = {role: self._view(weight_of(ffn, role)) for role in ROLES}
        for role, weight in found.items():
            scale = getattr(ffn, f"{role}_scale", None)
            if weight is not None and scale is not None:
                found[role] = Quantized(values=weight, scales=scale[None] if role == "down" else scale[:, None])
        return {**found, **{f"{role}_bias": self._view(bias_of(ffn, role)) for role in ROLES}}

    @staticmethod
    def _view(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach()

    def _dense_ffn(self, ffn: Any, where: str) -> _DenseFfn:
        layout = self.family.layout
        name = activation_name(attrgetter(layout.activation)(ffn))
        if name is None:
            raise NoPlanError(f"the activation of {where} is unknown")
        self.activations.add(name)
        for part in layout.projections:
            self._bias(getattr(ffn, part), f"{part} of {where}")
            if part != layout.down:
                self._weight(getattr(ffn, part), f"{part} of {where}")
        down = getattr(ffn, layout.down)
        weight = self._tensor(down.weight, f"{layout.down} of {where}")
        if not weight.T.is_contiguous():
            if not self.lay_out_dense:
                raise NoPlanError(f"{layout.down} of {where} is not laid out by neuron")
            down.weight.data = by_neuron(weight)
        return _DenseFfn(ffn, layout)

    def _window(self, index: int, attention: Any) -> int:
        """By the module where it knows; else all layers have the config's, if the caches take it so."""
        window = getattr(self.config, "sliding_window", None)
        types = getattr(self.config, "layer_types", None)
        kind = types[index] if types else "full_attention" if window is None else "sliding_attention"
        masked = attention.sliding_window if hasattr(attention, "sliding_window") else window
        if kind != ("full_attention" if masked is None else "sliding_attention"):
            raise NoPlanError(f"layer {index} has {kind} and a window of {masked}")
        return masked or 0

    def _rope(self, index: int) -> int:
        """The place of a layer's rotary embedding, of which some families have one for each type of layer."""
        rotary = self.inner.rotary_emb
        kind = None if hasattr(rotary, "inv_freq") else self.config.layer_types[index]
        if kind not in self.ropes:
            prefix = "" if kind is None else f"{kind}_"
            rope_type = rotary.rope_type if kind is None else rotary.rope_type[kind]
            if rope_type not in _ROPES:
                raise NoPlanError(f"its rotary embedding is {rope_type}")
            frequencies = getattr(rotary, f"{prefix}inv_freq").detach().to(self.device, torch.float32)
            self.ropes[kind] = Rope(frequencies=frequencies, factor=getattr(rotary, f"{prefix}attention_scaling"))
        return list(self.ropes).index(kind)
