"""Losses with derivatives of the network train; layers whose weights these use get a diagonal, with one message."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC
from tests.helpers.nets import data, double, engine, kronecker_layers, train_step


def derivative(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    u = model(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return x, u, du


def sobolev(model: nn.Module, x: Tensor) -> Tensor:
    x, u, du = derivative(model, x)
    return F.mse_loss(u, x.detach().sin()) + 0.1 * F.mse_loss(du, x.detach().cos())


def pinn(model: nn.Module, x: Tensor) -> Tensor:
    x, u, du = derivative(model, x)
    (d2,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    return (d2 + x.detach().sin()).square().mean() + F.mse_loss(u, x.detach().sin())


def gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    _, u, du = derivative(model, x)
    return (u - x).square().mean() + 0.5 * (du.square().sum(1).sqrt() - 1).square().mean()


LOSSES = {"sobolev": sobolev, "pinn": pinn, "gradient penalty": gradient_penalty}


def said(run: Callable[[], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught]


def net(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    torch.manual_seed(0)
    return double(nn.Linear(1, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 1))


def trained(kfc: KFC, model: nn.Module, losses: list[Callable[[nn.Module, Tensor], Tensor]]) -> list[float]:
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.3), 2 * data(32, 1)
    return [float(train_step(kfc, optimizer, lambda loss=loss: loss(model, x))) for loss in losses]


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_it_trains_with_a_diagonal_for_all_layers_and_one_line_reports_it(case: str, fisher: str) -> None:
    model = net()
    kfc, losses = engine(model, fisher=fisher, kl_clip=0.01), []
    messages = said(lambda: losses.extend(trained(kfc, model, [LOSSES[case]] * 20)))
    (message,) = messages
    assert "'0', '2', '4': the loss holds derivatives of the network" in message
    assert {row.treatment for row in kfc.coverage()} == {"diagonal"}
    assert all(layer.inverse is not None for name, layer in kfc.layers.items() if name != "4.bias")
    assert losses[-1] < 0.8 * losses[0]
    counted = {name for name, count in kfc.events.state_dict().items() if count}
    assert counted <= {"unrecognised_losses"}


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_one_that_begins_in_the_middle_of_a_run_is_noticed_then(activation: type[nn.Module]) -> None:
    model = net(activation)
    kfc = engine(model, kl_clip=0.01)

    def plain(model: nn.Module, x: Tensor) -> Tensor:
        return F.mse_loss(model(x), x.sin())

    assert said(lambda: trained(kfc, model, [plain] * 4) and None) == []
    assert kronecker_layers(kfc) == ["0", "2", "4"]
    messages = said(lambda: trained(kfc, model, [sobolev] * 4) and None)
    assert len(messages) == 1
    assert {row.treatment for row in kfc.coverage()} == {"diagonal"}
    assert kfc.layers["2.weight"].inverse is not None


def test_the_first_step_has_curvature_already() -> None:
    model = net()
    kfc = engine(model)
    said(lambda: trained(kfc, model, [sobolev]) and None)
    assert set(kfc.layers["2.weight"].averages)


def test_layers_whose_weights_are_not_used_in_a_derivative_keep_their_factors() -> None:
    model = net()
    head = double(nn.Linear(1, 2))
    both = nn.ModuleList([model, head])
    kfc, optimizer, x = engine(both), torch.optim.SGD(both.parameters(), lr=0.1), data(16, 1)

    def loss() -> Tensor:
        return sobolev(model, x) + F.cross_entropy(head(model(x)), (x[:, 0] > 0).long())

    said(lambda: [train_step(kfc, optimizer, loss) for _ in range(3)] and None)
    assert kronecker_layers(kfc) == ["1.0"]


def test_a_derivative_that_the_loss_does_not_hold_changes_nothing() -> None:
    model = net()
    kfc = engine(model)

    def beside(model: nn.Module, x: Tensor) -> Tensor:
        x, u, _ = derivative(model, x)
        return F.mse_loss(u, x.detach().sin())

    assert said(lambda: trained(kfc, model, [beside] * 3) and None) == []
    assert kronecker_layers(kfc) == ["0", "2", "4"]


def test_a_layer_alone_beside_excluded_ones_is_noticed() -> None:
    model = net()
    kfc = engine(model, exclude=["0", "2"])
    (message,) = said(lambda: trained(kfc, model, [sobolev] * 3) and None)
    assert "'4': the loss holds derivatives" in message
