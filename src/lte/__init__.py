"""Learn-To-be-Efficient: train a transformer to activate few of its FFN neurons, in blocks that hardware can skip.

Importing lte registers the sparse model classes and all methods with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads a folder that lte saved.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lte import methods
from lte.config import LteConfig
from lte.eval.sparsity import measure_sparsity
from lte.hf.acceleration import accelerate_, decelerate_, is_accelerated
from lte.hf.install import sparse_ffns
from lte.hf.loading import sparse_class
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

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from lte.train.arguments import LteTrainingArguments, RoutingArguments
    from lte.train.trainer import LteTrainer, RoutingMixin

# Loaded when they are asked for: what loads a saved model needs no trainer.
_ON_DEMAND = {
    "LteTrainer": "lte.train.trainer",
    "LteTrainingArguments": "lte.train.arguments",
    "RoutingArguments": "lte.train.arguments",
    "RoutingMixin": "lte.train.trainer",
}

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
    "StaticPruningConfig",
    "TealConfig",
    "WandaConfig",
    "WinaConfig",
    "accelerate_",
    "calibrate_",
    "decelerate_",
    "densify_",
    "is_accelerated",
    "measure_sparsity",
    "methods",
    "sparse_class",
    "sparse_ffns",
    "sparsify_",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        # Kept, so that it is found at once from then on, and by what reads the module's own names.
        globals()[name] = getattr(import_module(_ON_DEMAND[name]), name)
        return globals()[name]
    raise AttributeError(f"module 'lte' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
