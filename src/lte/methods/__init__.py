"""The methods that LTE is compared with, one file each; importing this package registers all of them."""

from importlib import import_module
from pkgutil import iter_modules

from lte.methods.contract import METHODS, Method, MethodConfig, apply_method_, config_of, refit_, register

__all__ = ["METHODS", "Method", "MethodConfig", "apply_method_", "config_of", "refit_", "register"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
