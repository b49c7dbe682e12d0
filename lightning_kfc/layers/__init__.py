"""Adapters of the kinds of layers, one file per kind."""

import importlib
import pkgutil

from lightning_kfc.layers.adapter import Adapter
from lightning_kfc.layers.forward import Forward
from lightning_kfc.layers.parameter import ParameterAdapter
from lightning_kfc.layers.registry import adapter_for, register_adapter
from lightning_kfc.layers.scale_shift import ScaleShiftAdapter

__all__ = ["Adapter", "Forward", "ParameterAdapter", "ScaleShiftAdapter", "adapter_for", "register_adapter"]

# Each file registers its adapters on import, so that a new kind of layer touches no other file.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
