"""Learn-To-be-Efficient: train a transformer to activate few of its FFN neurons, in blocks that hardware can skip.

Importing lte registers the sparse model classes with transformers, and the methods that LTE is compared with, so that
`AutoModelForCausalLM.from_pretrained` loads a folder that lte saved.
"""

from lte import methods
from lte.config import LteConfig
from lte.hf.acceleration import accelerate_, decelerate_, is_accelerated
from lte.hf.convert import densify_, sparsify_
from lte.hf.install import sparse_ffns

__version__ = "0.2.0.dev0"

__all__ = [
    "LteConfig",
    "accelerate_",
    "decelerate_",
    "densify_",
    "is_accelerated",
    "methods",
    "sparse_ffns",
    "sparsify_",
]
