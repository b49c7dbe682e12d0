"""Complex parameters keep their plain gradient, and all that is measured of a step is that of their real twin."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_kfc import KFC, KFCCallback
from lightning_kfc.trust_region.snapshot import _dot
from tests.helpers.harness import QUIET

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

STEPS = 40


class Filter(nn.Module):
    """Multiplies the spectrum of a signal by complex weights, or by real pairs that are viewed as such."""

    def __init__(self, weight: Tensor, *, pairs: bool) -> None:
        super().__init__()
        self.pairs = pairs
        self.weight = nn.Parameter(torch.view_as_real(weight).clone() if pairs else weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.weight) if self.pairs else self.weight
        return torch.fft.irfft(torch.fft.rfft(x) * weight, n=x.shape[-1])


class Spectral(pl.LightningModule):
    """A filter between two linear layers, trained on a regression, in float64."""

    def __init__(self, *, pairs: bool, lr: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(5, dtype=torch.complex128, generator=generator)
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), Filter(weight, pairs=pairs), nn.Tanh(), nn.Linear(8, 2)
        ).double()
        self.lr = lr
        self.losses: list[float] = []

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)


def train(*, pairs: bool, lr: float, **options: Any) -> tuple[Spectral, KFCCallback]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 6, dtype=torch.float64, generator=generator)
    y = torch.stack([x[:, :3].prod(1), x[:, 3:].sum(1).sin()], 1)
    task, callback = Spectral(pairs=pairs, lr=lr), KFCCallback(**options)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader([(x, y)] * STEPS, batch_size=None))
    return task, callback


@pytest.mark.slow
@pytest.mark.parametrize("lr", [0.5, 4.0])
def test_a_complex_parameter_trains_as_its_real_twin_whose_gradient_is_plain(lr: float) -> None:
    task, callback = train(pairs=False, lr=lr)
    twin, reference = train(pairs=True, lr=lr, exclude=["net.2"])
    assert task.losses == pytest.approx(twin.losses, rel=1e-6)
    assert torch.view_as_real(task.net[2].weight.detach()).numpy() == pytest.approx(
        twin.net[2].weight.detach().numpy(), rel=1e-6
    )
    assert callback.kfc.events.state_dict() == reference.kfc.events.state_dict()
    assert callback.kfc.damping == pytest.approx(reference.kfc.damping, rel=1e-6)
    if lr > 1:
        events = callback.kfc.events.state_dict()
        assert events["undone_steps"] + events["shortened_steps"] > 0, "no step was shortened: the case shows nothing"


def test_coverage_states_that_a_complex_parameter_keeps_its_plain_gradient() -> None:
    kfc = KFC(Spectral(pairs=False, lr=1.0).net)
    row = next(row for row in kfc.coverage() if row.parameter == "2.weight")
    assert (row.treatment, row.reason) == ("plain", "complex: there is no curvature for complex values")


def test_the_report_at_the_start_has_one_line_on_complex_parameters(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        train(pairs=False, lr=0.5)
    lines = [line for message in caplog.messages for line in message.splitlines() if "complex" in line]
    assert lines == ["Plain gradient (complex: there is no curvature for complex values): net.2.weight"]


def test_a_linear_layer_of_complex_weights_is_plain_beside_layers_that_are_not() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wave, self.head = nn.Linear(3, 4, dtype=torch.cfloat), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.wave(x.to(torch.cfloat)).abs())

    net = Net()
    kfc = KFC(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with kfc.capture():
        loss = F.cross_entropy(net(torch.randn(8, 3)), torch.arange(8) % 2)
    kfc.update(loss)
    loss.backward()
    plain = net.wave.weight.grad.clone()
    assert kfc.precondition(optimizer=optimizer)
    assert torch.equal(net.wave.weight.grad, plain)
    assert {row.parameter: row.treatment for row in kfc.coverage()} == {
        "wave.weight": "plain",
        "wave.bias": "plain",
        "head.weight": "kfc",
        "head.bias": "kfc",
    }


@pytest.mark.parametrize("value", [complex("nan"), complex(0, float("inf"))])
def test_a_complex_gradient_that_is_not_finite_ends_the_step(value: complex) -> None:
    net = Spectral(pairs=False, lr=1.0).net
    kfc = KFC(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with kfc.capture():
        loss = F.mse_loss(net(torch.randn(8, 6, dtype=torch.float64)), torch.zeros(8, 2, dtype=torch.float64))
    kfc.update(loss)
    loss.backward()
    net[2].weight.grad[0] = value
    assert not kfc.precondition(optimizer=optimizer)


def test_the_slope_along_a_complex_step_is_the_derivative_of_the_loss() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, dtype=torch.complex128, requires_grad=True)
    step, x = torch.randn(2, 4, dtype=torch.complex128)

    def loss(w: Tensor) -> Tensor:
        return (w * x).sum().abs().square()

    (gradient,) = torch.autograd.grad(loss(weight), weight)
    with torch.no_grad():
        numerical = (loss(weight + 1e-6 * step) - loss(weight - 1e-6 * step)) / 2e-6
    assert _dot(gradient, step) == pytest.approx(float(numerical), rel=1e-6)
