"""Train networks with approximate natural gradient: KFC as a Lightning callback."""

from lightning_kfc.callback import KFCCallback
from lightning_kfc.estimation.self_test import SelfTestError
from lightning_kfc.kfc import KFC
from lightning_kfc.layers import register_adapter
from lightning_kfc.losses.likelihoods import Bernoulli, Categorical, Gaussian
from lightning_kfc.losses.selection import LossNotRecognisedError
from lightning_kfc.reporting.options import Logging
from lightning_kfc.scheduling.refresh_schedule import ExponentialSchedule, LinearSchedule
from lightning_kfc.settings import Precision, RefreshTiming
from lightning_kfc.version import __version__

__all__ = [
    "KFC",
    "Bernoulli",
    "Categorical",
    "ExponentialSchedule",
    "Gaussian",
    "KFCCallback",
    "LinearSchedule",
    "Logging",
    "LossNotRecognisedError",
    "Precision",
    "RefreshTiming",
    "SelfTestError",
    "__version__",
    "register_adapter",
]
