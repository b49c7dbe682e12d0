"""Writes the table of losses, and where the curvature of each comes from, into ``loss.md``.

    python docs/generate_loss_table.py

Each loss makes one step of a small network, and the table has the line that the package then logs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from generated_tables import page_with
from torch import Tensor, nn
from torch import distributions as D
from torch.nn import functional as F

from lightning_kfc import KFC

PAGE = Path(__file__).parent / "loss.md"
#: Outputs of the network, and rows of the batch.
OUTPUTS, ROWS = 4, 12

Loss = Callable[[Tensor, nn.Module, Tensor], Tensor]


def _dice(z: Tensor) -> Tensor:
    overlap = 2 * (z.sigmoid() * MASK).sum()
    return 1 - (overlap + 1) / (z.sigmoid().sum() + MASK.sum() + 1)


def _contrastive(z: Tensor) -> Tensor:
    """NT-Xent of two views, by :func:`torch.logsumexp`."""
    unit = F.normalize(z, dim=1)
    alike = (unit @ unit.T / 0.5).masked_fill(torch.eye(ROWS, dtype=torch.bool), -torch.inf)
    other = torch.arange(ROWS).roll(ROWS // 2)
    return (alike.logsumexp(1) - alike[torch.arange(ROWS), other]).mean()


def _gradient_penalty(z: Tensor, net: nn.Module, x: Tensor) -> Tensor:
    inputs = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(inputs).sum(), inputs, create_graph=True)
    return F.mse_loss(z, REAL) + (slope.norm(dim=1) - 1).square().mean()


CLASSES = torch.arange(ROWS) % OUTPUTS
MASK = F.one_hot(CLASSES, OUTPUTS).float()
REAL = torch.linspace(-1, 1, ROWS * OUTPUTS).reshape(ROWS, OUTPUTS)
LENGTHS = torch.tensor([2, 2])
ADVANTAGES = torch.linspace(-1, 2, ROWS)

#: By title: the loss of the outputs; the network and its inputs are those of losses that call the network again.
LOSSES: dict[str, Loss] = {
    "`cross_entropy`": lambda z, net, x: F.cross_entropy(z, CLASSES),
    "a cross entropy by hand": lambda z, net, x: (z.logsumexp(1) - z[torch.arange(ROWS), CLASSES]).mean(),
    "a focal loss made of `cross_entropy`": lambda z, net, x: (
        (1 - (losses := F.cross_entropy(z, CLASSES, reduction="none")).neg().exp()) ** 2 * losses
    ).mean(),
    "an auxiliary `cross_entropy`, weighted by 0.4": lambda z, net, x: (
        F.mse_loss(z, REAL) + 0.4 * F.cross_entropy(z, CLASSES)
    ),
    "distillation: `kl_div` of two `log_softmax`": lambda z, net, x: F.kl_div(
        (z / 2).log_softmax(1), (REAL / 2).log_softmax(1), log_target=True, reduction="batchmean"
    ),
    "a squared error by hand": lambda z, net, x: (z - REAL).square().mean(),
    "`l1_loss` + 1e-4 `mse_loss`": lambda z, net, x: F.l1_loss(z, REAL) + 1e-4 * F.mse_loss(z, REAL),
    "a Dice loss": lambda z, net, x: _dice(z),
    "a Dice loss + `binary_cross_entropy_with_logits`": lambda z, net, x: (
        _dice(z) + F.binary_cross_entropy_with_logits(z, MASK)
    ),
    "`ctc_loss`": lambda z, net, x: F.ctc_loss(
        z.unflatten(0, (6, 2)).log_softmax(2),
        torch.tensor([[1, 2], [3, 1]]),
        torch.tensor([6, 6]),
        torch.tensor([2, 2]),
    ),
    "`triplet_margin_loss`": lambda z, net, x: F.triplet_margin_loss(z[:4], z[4:8], z[8:]),
    "`cosine_embedding_loss`": lambda z, net, x: F.cosine_embedding_loss(z[:6], z[6:], torch.tensor([1, -1] * 3)),
    "InfoNCE, by `cross_entropy` of similarities": lambda z, net, x: F.cross_entropy(z[:6] @ z[6:].T, torch.arange(6)),
    "NT-Xent by hand": lambda z, net, x: _contrastive(z),
    "a variational autoencoder: `binary_cross_entropy_with_logits` + a divergence by hand": lambda z, net, x: (
        F.binary_cross_entropy_with_logits(z[:, :2], MASK[:, :2])
        - 0.5 * (1 + z[:, 2:3] - z[:, 3:].square() - z[:, 2:3].exp()).mean()
    ),
    "a policy gradient, by `Categorical.log_prob`": lambda z, net, x: (
        -(ADVANTAGES * D.Categorical(logits=z).log_prob(CLASSES)).mean()
    ),
    "`-Normal(mean, scale).log_prob(y).mean()`": lambda z, net, x: (
        -D.Normal(z[:, :2], F.softplus(z[:, 2:])).log_prob(REAL[:, :2]).mean()
    ),
    "a margin loss: `multi_margin_loss`": lambda z, net, x: F.multi_margin_loss(z, CLASSES),
    "a gradient penalty": _gradient_penalty,
}


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def what_happens(loss: Loss) -> str:
    """The line that one step with a loss logs, without the advice on other ways, and its warnings."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, OUTPUTS)), torch.randn(ROWS, 3)
    kfc, handler = KFC(net), _Lines()
    logger = logging.getLogger("lightning_kfc")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            with kfc.capture():
                value = loss(net(x), net, x)
            kfc.update(value)
            value.backward()
            kfc.precondition(lr=0.1)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    (line,) = handler.lines
    _, _, line = line.partition("step 0: ")
    source, _, _ = line.partition(", since no function of it is recognised")
    return " ".join([source.rstrip(".") + ".", *(str(warning.message) for warning in found)])


def table() -> str:
    """The table."""
    rows = [f"| {title} | {what_happens(loss)} |" for title, loss in LOSSES.items()]
    return "\n".join(["| my loss is | what happens |", "|---|---|", *rows]) + "\n"


def page() -> str:
    """The page with the table of today."""
    return page_with(table(), PAGE, __file__)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
