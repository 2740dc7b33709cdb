"""All methods, LTE among them, one file each; importing this package registers them."""

from importlib import import_module
from pkgutil import iter_modules

from lte.config import MethodConfig
from lte.methods.method import METHODS, Method, calibrate_, config_of, densify_, method_of, register, sparsify_

__all__ = [
    "METHODS",
    "Method",
    "MethodConfig",
    "calibrate_",
    "config_of",
    "densify_",
    "method_of",
    "register",
    "sparsify_",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
