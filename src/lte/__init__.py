"""Learn-To-be-Efficient: train a transformer to activate few of its FFN neurons, in blocks that hardware can skip.

Importing lte registers the sparse model classes and all methods with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads a folder that lte saved.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lte import methods
    from lte.config import LteConfig
    from lte.eval.sparsity import measure_sparsity
    from lte.eval.threshold_curve import calibrate_curve_
    from lte.hf.acceleration import accelerate_, decelerate_, is_accelerated
    from lte.hf.install import sparse_ffns
    from lte.hf.loading import sparse_class
    from lte.hf.sparsity_curve import SparsityCurve, SparsityGoal
    from lte.hf.threshold import set_sparsity_
    from lte.hf.verify import verify
    from lte.methods import calibrate_, densify_, sparsify_
    from lte.methods.cats import CatsConfig
    from lte.methods.deja_vu import DejaVuConfig
    from lte.methods.kla import KlaConfig
    from lte.methods.moefication import MoeficationConfig
    from lte.methods.noisy_topk import NoisyTopkConfig
    from lte.methods.random_router import RandomRouterConfig
    from lte.methods.sigma_moe import SigmaMoeConfig
    from lte.methods.static_pruning import StaticPruningConfig
    from lte.methods.teal import TealConfig
    from lte.methods.wanda import WandaConfig
    from lte.methods.wina import WinaConfig
    from lte.train.arguments import LteTrainingArguments, RoutingArguments
    from lte.train.trainer import LteTrainer, RoutingMixin

__version__ = "0.2.0.dev0"

_EXPORTS = {
    "lte.config": ["LteConfig"],
    "lte.eval.sparsity": ["measure_sparsity"],
    "lte.eval.threshold_curve": ["calibrate_curve_"],
    "lte.hf.acceleration": ["accelerate_", "decelerate_", "is_accelerated"],
    "lte.hf.install": ["sparse_ffns"],
    "lte.hf.loading": ["sparse_class"],
    "lte.hf.sparsity_curve": ["SparsityCurve", "SparsityGoal"],
    "lte.hf.threshold": ["set_sparsity_"],
    "lte.hf.verify": ["verify"],
    "lte.methods": ["calibrate_", "densify_", "sparsify_"],
    "lte.methods.cats": ["CatsConfig"],
    "lte.methods.deja_vu": ["DejaVuConfig"],
    "lte.methods.kla": ["KlaConfig"],
    "lte.methods.moefication": ["MoeficationConfig"],
    "lte.methods.noisy_topk": ["NoisyTopkConfig"],
    "lte.methods.random_router": ["RandomRouterConfig"],
    "lte.methods.sigma_moe": ["SigmaMoeConfig"],
    "lte.methods.static_pruning": ["StaticPruningConfig"],
    "lte.methods.teal": ["TealConfig"],
    "lte.methods.wanda": ["WandaConfig"],
    "lte.methods.wina": ["WinaConfig"],
}
# Loaded when they are asked for: what loads a saved model needs no trainer.
_ON_DEMAND = {
    "lte.train.arguments": ["LteTrainingArguments", "RoutingArguments"],
    "lte.train.trainer": ["LteTrainer", "RoutingMixin"],
}
_HOME = {name: module for group in (_EXPORTS, _ON_DEMAND) for module, names in group.items() for name in names}

__all__ = [
    "CatsConfig",
    "DejaVuConfig",
    "KlaConfig",
    "LteConfig",
    "LteTrainer",
    "LteTrainingArguments",
    "MoeficationConfig",
    "NoisyTopkConfig",
    "RandomRouterConfig",
    "RoutingArguments",
    "RoutingMixin",
    "SigmaMoeConfig",
    "SparsityCurve",
    "SparsityGoal",
    "StaticPruningConfig",
    "TealConfig",
    "WandaConfig",
    "WinaConfig",
    "accelerate_",
    "calibrate_",
    "calibrate_curve_",
    "decelerate_",
    "densify_",
    "is_accelerated",
    "measure_sparsity",
    "methods",
    "set_sparsity_",
    "sparse_class",
    "sparse_ffns",
    "sparsify_",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module("lte.methods")
    if name in _HOME:
        # Kept, so that it is found at once from then on, and by what reads the module's own names.
        globals()[name] = getattr(import_module(_HOME[name]), name)
        return globals()[name]
    raise AttributeError(f"module 'lte' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command() -> bool:
    """Whether this process is the `lte` command, which checks its arguments before it loads torch and transformers."""
    if getattr(sys.modules.get("lte_cli"), "is_running", False):
        return True
    # What Python puts there while it looks for the module of `python -m lte`.
    return sys.argv[:1] == ["-m"] and ("-m", __name__) in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)


if not _is_command():
    for _module, _names in _EXPORTS.items():
        for _name in _names:
            __getattr__(_name)
