"""Damped inverses of the Kronecker-factored Fisher matrix, by name."""

from __future__ import annotations

from lightning_kfc.factors.inverses.base import FactorisationError, Factors, Inverse, StepInverse
from lightning_kfc.factors.inverses.cholesky import RETRIES, BlockInverse, CholeskyInverse
from lightning_kfc.factors.inverses.diagonal import DiagonalInverse
from lightning_kfc.factors.inverses.eigen import EighInverse, EkfacInverse
from lightning_kfc.factors.inverses.low_rank import FewRows

__all__ = [
    "INVERSES",
    "RETRIES",
    "BlockInverse",
    "CholeskyInverse",
    "DiagonalInverse",
    "EighInverse",
    "EkfacInverse",
    "FactorisationError",
    "Factors",
    "FewRows",
    "Inverse",
    "StepInverse",
]

#: The values of the option ``inverse``.
INVERSES: dict[str, type[Inverse]] = {kind.name: kind for kind in (CholeskyInverse, EighInverse, EkfacInverse)}
