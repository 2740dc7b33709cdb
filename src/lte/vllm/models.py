"""vLLM's model classes with sparse FFNs, made from whatever class vLLM has for the stock architecture.

`LteLlamaForCausalLM` and the others of `lte.vllm.architectures.SERVED` are attributes of this module, made when vLLM
asks for them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from vllm.logger import init_logger
from vllm.model_executor.models.registry import ModelRegistry

from lte.config import LteConfig
from lte.hf.activations import activation_name
from lte.hf.families import family_of
from lte.ops.arguments import MAX_TOKENS
from lte.ops.dispatch import kernel_names
from lte.vllm.architectures import SERVED, ServedFfn, stock_name
from lte.vllm.checks import check_dtype, check_ranks
from lte.vllm.ffn import Place, SparseMlp
from lte.vllm.graphs import largest_graph
from lte.vllm.meter import Meter
from lte.vllm.settings import ServeSettings, serve_settings

# A name below vllm's, whose loggers are the ones that its settings show.
logger = init_logger("vllm.lte")


class LteServing:
    """Mixin over a model class of vLLM: its MLPs become sparse, and what was not loaded is an error."""

    supports_lora = False
    served: ServedFfn

    def __init__(self, *, vllm_config: Any, prefix: str = "", **kwargs: Any):
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
        settings = serve_settings(model_config.hf_config)
        check_ranks(settings, parallel.tensor_parallel_size)
        check_dtype(model_config)
        capturing = torch.empty(0).is_cuda and not model_config.enforce_eager
        self.meter = Meter(vllm_config.instance_id, model_config.hf_config.num_hidden_layers, capturing)
        self.sparse_ffns = install_(self, self.served, settings, model_config.hf_config, self.meter)  # type: ignore[arg-type]
        if torch.empty(0).is_cuda:
            # Layers have the same shapes, but a path is chosen by the sparsity of each.
            warmed_up = set[Hashable]()
            for ffn in self.sparse_ffns:
                ffn.most_tokens, ffn.warmed_up = vllm_config.scheduler_config.max_num_batched_tokens, warmed_up
        self._settings, self._told = settings, False
        self._compilation = vllm_config.compilation_config

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As the stock method.

        Raises:
            ValueError: if parameters of a sparse FFN were not in the files.
        """
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        ours = {f"{ffn.place.name}.{name}" for ffn in self.sparse_ffns for name, _ in ffn.named_parameters()}
        missing = sorted(ours - set(loaded or ()))
        if missing:
            raise ValueError(
                f"the folder must hold all sparse FFNs with their routers, got {len(missing)} parameters missing, "
                f"{missing[0]} first; `lte inspect --verify FOLDER` says what is wrong"
            )
        return loaded

    def _metered_ffn(self) -> SparseMlp | None:
        """The FFN whose paths count as those of a step: the first one, on the rank that has the meter."""
        ffn = self.sparse_ffns[0] if self.sparse_ffns else None
        return ffn if ffn is not None and ffn.runner is not None and ffn.tp_rank == 0 else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock method; it notes by which path, also of steps whose FFNs are parts of graphs.

        Not in `forward`, which vLLM may have compiled.
        """
        if (ffn := self._metered_ffn()) is not None:
            positions = args[1] if len(args) > 1 else kwargs["positions"]
            self.meter.took(ffn.path_of(positions.shape[-1], ffn.dtype))
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def compute_logits(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock method; it ends every step, also of graphs, and so drives the meter."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if (ffn := self._metered_ffn()) is not None:
            if not self._told:
                self._told = True
                captured = largest_graph(self._compilation)
                logger.info(start_line(type(self).__name__, self._settings, ffn, hidden.dtype, captured))
            self.meter.step(len(hidden), lambda tokens: ffn.path_of(tokens, hidden.dtype))
        return super().compute_logits(*args, **kwargs)  # type: ignore[misc]


def install_(
    model: nn.Module, served: ServedFfn, settings: ServeSettings, hf_config: Any, meter: Meter
) -> list[SparseMlp]:
    """Replaces the MLP of each layer that this process has; returns them in order.

    Raises:
        ValueError: for a layer without an MLP of known parts, so that none is left dense, or an unknown activation.
    """
    function = ACT2FN[getattr(hf_config, family_of(hf_config).activation_field)]
    activation = activation_name(function)
    if activation is None:
        raise ValueError(f"the activation must be one that the kernels know, got {function!r}")
    found = []
    layers: Any = model.get_submodule(served.layers)
    for index, layer in enumerate(layers):
        if type(layer).__name__ in ("PPMissingLayer", "StageMissingLayer"):
            continue
        stock: Any = getattr(layer, "mlp", None)
        name = f"{served.layers}.{index}.mlp"
        if not all(isinstance(getattr(stock, part, None), nn.Module) for part in (served.up, served.down)):
            raise ValueError(
                f"{name} must hold {served.up} and {served.down}, got {type(stock).__name__}; this version of vLLM is "
                "not one that lte knows"
            )
        layer.mlp = SparseMlp(stock, served, settings, Place(layer=index, name=name, activation=activation), meter)
        found.append(layer.mlp)
    return found


def start_line(name: str, settings: ServeSettings, ffn: SparseMlp, dtype: torch.dtype, captured: int) -> str:
    """What a deployment runs, in one line: method, sparsity, kernels, break-even batch, tokens of the largest graph."""
    kernels = kernel_names(ffn.router.bias.device, dtype)
    expected = f"{settings.sparsity:.0%} expected" if settings.sparsity is not None else "not measured"
    batch = max((t for t in range(1, MAX_TOKENS + 1) if ffn.path_of(t, dtype) == "decode"), default=0)
    pays = f"skips experts for up to {batch} tokens a step" if batch else "skips no expert at any batch size"
    graphs = f"; CUDA graphs of steps of up to {captured} tokens" if captured else ""
    return (
        f"{name}: method {LteConfig.name}, sparsity {settings.config.target_sparsity:.0%} asked for and {expected}, "
        f"threshold {settings.threshold:g}, {settings.num_experts} experts of {settings.config.expert_size} neurons a "
        f"layer, {settings.weights} weights; kernels {kernels['decode']} (few tokens) and {kernels['prefill']} "
        f"(more); {pays}{graphs}"
    )


def _sparse_class(name: str) -> type[nn.Module]:
    stock = ModelRegistry.models[stock_name(name)].load_model_cls()
    body = {"served": SERVED[name], "__module__": __name__, "__doc__": stock.__doc__}
    return type(name, (LteServing, stock), body)


def __getattr__(name: str) -> Any:
    if name not in SERVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = _sparse_class(name)
    return found
