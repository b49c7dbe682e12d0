"""No constant has the user's units: a loss times c, or inputs and outputs in other units, give the same training."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC

STEPS = 25


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 8),
        nn.LayerNorm(8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )
    return layers.double()


def trained(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    **options: object,
) -> list[float]:
    """The losses of a training with everything automatic."""
    kfc = KFC(model, damping="auto", kl_clip="auto", **options)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5), []
    for batch in batches:
        optimizer.zero_grad()
        with kfc.capture():
            loss = loss_of(*batch)
        kfc.back_propagate(loss)
        loss.backward()
        kfc.precondition(optimizer=optimizer)
        optimizer.step()
        kfc.review(optimizer=optimizer)
        found.append(float(loss.detach()))
    return found


def patterns() -> Iterator[tuple[Tensor, Tensor]]:
    """Small images, with three classes of mean brightness."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(32, 1, 6, 6, generator=generator, dtype=torch.float64)
        yield x, (x.mean((1, 2, 3)) * 20).long().clamp(-1, 1) + 1


def losses(
    model: nn.Module,
    loss_scale: float = 1.0,
    input_scale: float = 1.0,
    output_scale: float = 1.0,
    loss_of: str = "cross_entropy",
    **options: object,
) -> list[float]:
    """The losses of a training on patterns, divided by their scale."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return loss_scale * _loss(model(x * input_scale) / output_scale, y, loss_of)

    found = [value / loss_scale for value in trained(model, patterns(), loss, **options)]
    assert found[-1] < found[0]
    return found


@functools.cache
def usual_losses(*, bias: bool = True) -> list[float]:
    """The losses of a training in the usual units."""
    return losses(net(bias))


def _loss(outputs: Tensor, targets: Tensor, name: str) -> Tensor:
    if name == "cross_entropy":
        return F.cross_entropy(outputs, targets)
    hinges = (1 + outputs - outputs.gather(1, targets[:, None])).relu().mean()
    if name == "hinges by hand":
        return hinges
    if name == "mixed":
        return F.cross_entropy(outputs, targets) + hinges
    # It crosses zero, as a density above 1 does.
    return F.gaussian_nll_loss(outputs[:, 0], targets.double(), F.softplus(outputs[:, 1]) + 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("loss_of", ["cross_entropy", "gaussian_nll", "hinges by hand", "mixed"])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_a_loss_times_c_gives_the_same_training(scale: float, loss_of: str) -> None:
    plain, scaled = losses(net(), loss_of=loss_of), losses(net(), loss_scale=scale, loss_of=loss_of)
    assert scaled == pytest.approx(plain, rel=1e-6)


def test_a_loss_times_c_gives_the_same_training_with_exact_damping() -> None:
    assert losses(net(), loss_scale=1e4, inverse="eigh") == pytest.approx(losses(net(), inverse="eigh"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"inverse": "ekfac"}, {"rule": "adam"}])
@pytest.mark.parametrize("exponent", [-20, 20])
def test_a_loss_times_c_gives_the_same_training_by_numbers_kept_in_an_eigenbasis(
    exponent: int, options: dict[str, str]
) -> None:
    # A power of two, which rounds nothing. Eigenvectors of nearly equal eigenvalues turn with each rounding, and these
    # rules divide by what they keep for each of them.
    assert losses(net(), loss_scale=2.0**exponent, **options) == losses(net(), **options)


@pytest.mark.parametrize("scale", [1e-2, 30.0])
def test_inputs_in_other_units_give_the_same_training(scale: float) -> None:
    model = net(bias=False)
    with torch.no_grad():
        model[0].weight /= scale
    assert losses(model, input_scale=scale) == pytest.approx(usual_losses(bias=False), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-2, 30.0])
def test_outputs_in_other_units_give_the_same_training(scale: float) -> None:
    model = net()
    with torch.no_grad():
        model[-1].weight *= scale
        model[-1].bias *= scale
    assert losses(model, output_scale=scale) == pytest.approx(usual_losses(), rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-5, 1e-4, 1e-3])
def test_weights_that_begin_at_or_near_zero_can_move_and_those_before_them_stay_of_their_size(scale: float) -> None:
    model = net()
    with torch.no_grad():
        model[-1].weight *= scale
        model[-1].bias.zero_()
    # Before the last layer has grown, the curvature of the others is nearly 0, and their damping must not be.
    assert losses(model)[-1] < 0.9 * math.log(3)
    assert max(float(parameter.detach().norm()) for parameter in model.parameters()) < 100


def test_inverses_wait_for_the_first_loss_that_is_not_0() -> None:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    kfc = KFC(model, damping="auto", kl_clip="auto", factor_every_n_steps=1, inverse_every_n_steps=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    found = []
    for target in (torch.zeros(16, 3), torch.zeros(16, 3), torch.ones(16, 3), torch.ones(16, 3)):
        optimizer.zero_grad()
        with kfc.capture():
            loss = F.mse_loss(model(x), target)
        kfc.update(loss)
        loss.backward()
        assert kfc.precondition(optimizer=optimizer)
        optimizer.step()
        kfc.review(optimizer=optimizer)
        found.append((loss.item(), kfc.layers[""].inverse is not None))
    assert [inverse for _, inverse in found] == [False, False, True, True]
    assert [loss for loss, _ in found][:2] == [0.0, 0.0]
    assert found[3][0] < found[2][0]
    assert kfc.events.failed_factorisations == 0


def codes_of_four() -> Iterator[tuple[Tensor, Tensor]]:
    """Binary vectors of 64 pixels that depend on four numbers, as their own targets."""
    generator = torch.Generator().manual_seed(1)
    basis = 2 * torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
    for _ in range(40):
        x = torch.sigmoid(torch.randn(128, 4, generator=generator) @ basis).round()
        yield x, x


def test_a_deep_network_without_normalisation_leaves_the_plateau_of_its_first_steps() -> None:
    # The curvature of the first layers begins at 1e-7, and grows by a factor of 1,000 within ten steps.
    torch.manual_seed(0)
    widths = [64, 48, 32, 16, 4, 16, 32, 48, 64]
    layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(x), y, reduction="sum") / len(x)

    # 44.3 is the loss of a constant output, on which the training stays if the damping is a share of the loss alone.
    assert min(trained(model, codes_of_four(), loss)[-5:]) < 35


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("first", ["actor", "critic"])
def test_a_loss_by_hand_has_its_own_unit_beside_that_of_another_optimizer(first: str, scale: float) -> None:
    def actor_losses(scale: float) -> list[float]:
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(6, 3) for name in ("actor", "critic")}).double()
        kfc = KFC(model, damping=0.1, kl_clip=None)
        optimizers = {name: torch.optim.SGD(part.parameters(), lr=0.5) for name, part in model.items()}
        found = []
        for x, y in itertools.islice(patterns(), 12):
            x = x.flatten(1)[:, :6]
            for name in sorted(model, key=lambda name: name != first):
                optimizers[name].zero_grad()
                with kfc.capture():
                    log_p = model[name](x).log_softmax(1)
                    loss = -(F.one_hot(y, 3) * log_p).sum(1).mean() * (scale if name == "critic" else 1.0)
                kfc.back_propagate(loss)
                loss.backward()
                kfc.refresh(optimizers[name])
                kfc.precondition(optimizer=optimizers[name])
                optimizers[name].step()
                if name == "actor":
                    found.append(float(loss.detach()))
        return found

    assert actor_losses(scale) == actor_losses(1.0)
