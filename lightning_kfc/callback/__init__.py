"""The callback for the package ``lightning``."""

from __future__ import annotations

from lightning.pytorch import Callback

from lightning_kfc.callback.hooks import KFCHooks


class KFCCallback(KFCHooks, Callback):  # noqa: D101 (the docstring is the hooks')
    __doc__ = KFCHooks.__doc__
