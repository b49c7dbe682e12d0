"""The contestants: the peers, each with a grid for its learning rate, and KFC, which is not tuned.

Weight decay is 0 except for AdamW. Other settings than the learning rate are given here, or the library's defaults.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from benchmarks.contest.optimizers import AveragingStepper, Contestant, KFCStepper, PlainStepper, Stepper
from lightning_kfc import KFC, RefreshTiming


def powers_of_two(middle: float, below: int = 2, above: int = 2) -> tuple[float, ...]:
    """A grid of learning rates around one, each twice the one before."""
    return tuple(middle * 2.0**k for k in range(-below, above + 1))


def _sgd(model: nn.Module, lr: float, seed: int) -> Stepper:
    return PlainStepper(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9))


def _adam(model: nn.Module, lr: float, seed: int) -> Stepper:
    return PlainStepper(torch.optim.Adam(model.parameters(), lr=lr))


def _adamw(model: nn.Module, lr: float, seed: int) -> Stepper:
    return PlainStepper(torch.optim.AdamW(model.parameters(), lr=lr))


def hidden_matrices(model: nn.Module) -> tuple[list[Tensor], list[Parameter]]:
    """Weights of linear and convolutional layers, and all other parameters.

    A layer named ``head`` and embeddings are among the others, as Muon's author advises
    (kellerjordan.github.io/posts/muon).
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    layers = [module for name, module in model.named_modules() if isinstance(module, kinds) and name != "head"]
    weights = [layer.weight for layer in layers]
    known = {id(weight) for weight in weights}
    return weights, [p for p in model.parameters() if id(p) not in known]


def _muon(model: nn.Module, lr: float, seed: int) -> Stepper:
    # With the update's root mean square matched to Adam's (Liu et al. 2025, arXiv:2502.16982), one rate serves both.
    from pytorch_optimizer import Muon

    weights, others = hidden_matrices(model)
    groups = [{"params": weights, "lr": lr, "use_muon": True}, {"params": others, "lr": lr, "use_muon": False}]
    return PlainStepper(Muon(groups, use_adjusted_lr=True))


def _soap(model: nn.Module, lr: float, seed: int) -> Stepper:
    from pytorch_optimizer import SOAP

    return PlainStepper(SOAP(model.parameters(), lr=lr, weight_decay=0.0))


def _shampoo(model: nn.Module, lr: float, seed: int) -> Stepper:
    # The defaults (inverse roots every 1,000 steps) are for far longer runs. With RMSProp's step length, better than
    # SGD's on the conv net, one grid suits all tasks.
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    optimizer = ScalableShampoo(
        model.parameters(),
        lr=lr,
        start_preconditioning_step=10,
        preconditioning_compute_steps=10,
        graft_type=LayerWiseGrafting.RMSPROP,
    )
    return PlainStepper(optimizer)


def _kron(model: nn.Module, lr: float, seed: int) -> Stepper:
    from pytorch_optimizer import Kron

    return PlainStepper(Kron(model.parameters(), lr=lr))


#: The callback's defaults that differ from the engine's.
SHIPPED: dict[str, Any] = {"damping": "auto", "kl_clip": "auto", "rule": "auto"}


def kfc(
    name: str,
    title: str,
    lr: float = 0.5,
    momentum: float = 0.5,
    average: float | None = None,
    **settings: Any,
) -> Contestant:
    """KFC with SGD, by default with the recommended settings.

    Args:
        name: The name on the command line.
        title: The name in tables and plots.
        lr: The learning rate of SGD.
        momentum: The momentum of SGD.
        average: The decay of an exponential average of the weights, which is then evaluated; None for no average.
        settings: The settings of KFC; empty for the callback's defaults.
    """

    def make(model: nn.Module, rate: float, seed: int) -> Stepper:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
        stepper = KFCStepper(KFC(model, seed=seed, **{**SHIPPED, **settings}), optimizer)
        return stepper if average is None else AveragingStepper(stepper, model, average)

    return Contestant(name, title, make, (lr,))


PEERS = (
    Contestant("sgd", "SGD, momentum 0.9", _sgd, powers_of_two(0.05)),
    Contestant("adam", "Adam", _adam, powers_of_two(0.004)),
    # In so few steps, its decay of 0.01 lr per step shrinks a weight by less than 1 %, so Adam's learning rate fits.
    Contestant("adamw", "AdamW", _adamw, powers_of_two(0.004), takes_from="adam"),
    Contestant("muon", "Muon", _muon, powers_of_two(0.016)),
    Contestant("soap", "SOAP", _soap, powers_of_two(0.004)),
    Contestant("shampoo", "Shampoo", _shampoo, powers_of_two(0.001)),
    Contestant("kron", "PSGD-Kron", _kron, powers_of_two(0.002)),
)

#: KFC with one change at a time; the defaults are "kfc".
ABLATION = (
    kfc("kfc_adam", "KFC, rule adam", rule="adam"),
    kfc("kfc_natural", "KFC, rule natural", rule="natural"),
    kfc("kfc_ekfac", "KFC, inverse ekfac", rule="natural", inverse="ekfac"),
    kfc("kfc_slow", "KFC, decay 0.95", ema_decay=0.95),
    kfc("kfc_all_rows", "KFC, statistics of all rows of all examples", rows_per_dim=None),
    kfc("kfc_averaged", "KFC, averaged weights", average=0.9),
    kfc("kfc_fixed", "KFC, damping and KL clip fixed", damping=0.01, kl_clip=0.03),
    kfc("kfc_empirical", "KFC, empirical Fisher", fisher="empirical"),
    kfc("kfc_often", "KFC, T_cov 5, T_inv 10", factor_every_n_steps=5, inverse_every_n_steps=10),
    kfc("kfc_together", "KFC, all inverses at one step", timing=RefreshTiming(stagger_inverses=False)),
    kfc("kfc_rarely", "KFC, T_cov 20, T_inv 100", factor_every_n_steps=20, inverse_every_n_steps=100),
)

CONTESTANTS = {contestant.name: contestant for contestant in (*PEERS, kfc("kfc", "KFC, defaults"), *ABLATION)}
#: The default contestants.
USUAL = (*(peer.name for peer in PEERS), "kfc")
