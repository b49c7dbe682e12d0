"""The contestants away from home: KFC at its defaults, and the peers.

Each peer has a grid of three learning rates, a factor of three apart, that grows if the best is at its edge. Other
settings than the learning rate are given here, or the library's defaults. pytorch-optimizer 4.1 has no KL-Shampoo.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.contest.contestants import CONTESTANTS, hidden_matrices
from benchmarks.contest.optimizers import Contestant, PlainStepper, Stepper

#: KFC with everything "auto", and with each of its rules, without a search.
KFC_VARIANTS = ("kfc", "kfc_adam", "kfc_natural", "kfc_ekfac")


def thirds(middle: float) -> tuple[float, ...]:
    """A grid of three learning rates around one."""
    return middle / 3, middle, 3 * middle


class ScheduleFreeStepper(PlainStepper):
    """A schedule-free optimizer, whose average is evaluated."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self._model = model
        # torch's own optimizers have no train and eval.
        self._optimizer: Any = optimizer

    @property
    def averaged(self) -> nn.Module:
        """A copy of the model with the weights that the optimizer returns."""
        self._optimizer.eval()
        kept = copy.deepcopy(self._model)
        self._optimizer.train()
        return kept


def _ademamix(model: nn.Module, lr: float, seed: int) -> Stepper:
    from pytorch_optimizer import AdEMAMix

    return PlainStepper(AdEMAMix(model.parameters(), lr=lr))


def _schedule_free(model: nn.Module, lr: float, seed: int) -> Stepper:
    from pytorch_optimizer import ScheduleFreeAdamW

    return ScheduleFreeStepper(model, ScheduleFreeAdamW(model.parameters(), lr=lr))


def _normuon(model: nn.Module, lr: float, seed: int) -> Stepper:
    # Set up as Muon is.
    from pytorch_optimizer import NorMuon

    weights, others = hidden_matrices(model)
    groups = [{"params": weights, "lr": lr, "use_muon": True}, {"params": others, "lr": lr, "use_muon": False}]
    return PlainStepper(NorMuon(groups, use_adjusted_lr=True))


def _splus(model: nn.Module, lr: float, seed: int) -> Stepper:
    # The defaults (average 0.999, eigenvectors every 100 steps) are for far longer runs; it trains matrices alone.
    from pytorch_optimizer import SPlus

    return PlainStepper(SPlus(model.parameters(), lr=lr, weight_decay=0.0, inverse_steps=10))


PEERS = (
    replace(CONTESTANTS["soap"], grid=thirds(0.004)),
    replace(CONTESTANTS["muon"], grid=thirds(0.016)),
    replace(CONTESTANTS["adam"], grid=thirds(0.004)),
    replace(CONTESTANTS["sgd"], grid=thirds(0.05)),
    replace(CONTESTANTS["shampoo"], grid=thirds(0.001)),
    Contestant("normuon", "NorMuon", _normuon, thirds(0.016)),
    Contestant("ademamix", "AdEMAMix", _ademamix, thirds(0.004)),
    Contestant("schedule_free", "schedule-free AdamW", _schedule_free, thirds(0.01)),
    Contestant("splus", "SPlus", _splus, thirds(0.1)),
)
AWAY_CONTESTANTS = {entry.name: entry for entry in (*(CONTESTANTS[name] for name in KFC_VARIANTS), *PEERS)}
