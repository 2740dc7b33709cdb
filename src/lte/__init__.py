"""Learn-To-be-Efficient: train a transformer to activate few of its FFN neurons, in blocks that hardware can skip.

Importing lte registers the sparse model classes and all methods with transformers, so that
`AutoModelForCausalLM.from_pretrained` loads a folder that lte saved.
"""

from lte import methods
from lte.config import LteConfig
from lte.eval.sparsity import measure_sparsity
from lte.hf.acceleration import accelerate_, decelerate_, is_accelerated
from lte.hf.install import sparse_ffns
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

__version__ = "0.1.0"

__all__ = [
    "CatsConfig",
    "DejaVuConfig",
    "KlaConfig",
    "LteConfig",
    "MoeficationConfig",
    "NoisyTopkConfig",
    "RandomRouterConfig",
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
    "sparse_ffns",
    "sparsify_",
]
