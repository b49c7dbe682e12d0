"""The callback for the package ``pytorch_lightning``, whose Trainer does not take callbacks of ``lightning``."""

from __future__ import annotations

from pytorch_lightning import Callback

from lightning_kfc.callback.hooks import KFCHooks


class KFCCallback(KFCHooks, Callback):  # noqa: D101 (the docstring is the hooks')
    __doc__ = KFCHooks.__doc__
