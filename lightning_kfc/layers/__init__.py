"""Adapters: what each kind of layer needs to take part, one file a kind."""

from lightning_kfc.layers import conv as _conv
from lightning_kfc.layers import linear as _linear
from lightning_kfc.layers.adapter import Adapter, Forward
from lightning_kfc.layers.parameter import ParameterAdapter
from lightning_kfc.layers.registry import adapter_for, register_adapter

__all__ = ["Adapter", "Forward", "ParameterAdapter", "adapter_for", "register_adapter"]

del _conv, _linear  # imported for their registrations
