"""Invariance (paper sec. 4): undamped, the function's change by a step does not depend on the input channels' basis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.nets import classes, data, double, engine


def net() -> nn.Sequential:
    """No zero padding, under which a shifted channel could not be compensated."""
    return double(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 3, stride=2), nn.Flatten(), nn.Linear(8, 2))


def channel_transform(kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix B and a shift b over channels: x' = B x + b."""
    if kind == "random":
        return torch.tensor([[2.0, -1.0], [0.5, 3.0]]).double(), torch.tensor([5.0, -3.0]).double()
    values = x.transpose(0, 1).reshape(2, -1)
    mean = values.mean(1)
    if kind == "centred":
        return torch.eye(2).double(), -mean
    inverse_root = torch.linalg.inv(torch.linalg.cholesky(torch.cov(values)))
    return inverse_root, -inverse_root @ mean


def compensated(model: nn.Sequential, B: Tensor, b: Tensor) -> nn.Sequential:
    """A copy whose first layer undoes the transform, so that it computes the same function of x."""
    twin = net()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        twin[0].weight.copy_(torch.einsum("oihw,ij->ojhw", model[0].weight, torch.linalg.inv(B)))
        twin[0].bias.sub_(torch.einsum("oihw,i->o", twin[0].weight, b))
    return twin


def change_of_function(
    model: nn.Sequential, x: Tensor, target: Tensor, damping: float | None, kl_clip: float | None = None
) -> Tensor:
    """The outputs' change by one step with this damping, or of plain gradient descent for None."""
    kfc = engine(model, damping=damping or 1.0, kl_clip=kl_clip)
    with kfc.capture():
        out = model(x)
        loss = F.binary_cross_entropy_with_logits(out, target)
    kfc.update(loss)
    loss.backward()
    if damping is not None:
        kfc.precondition(lr=0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1 * p.grad)
        return model(x) - out


def relative_difference(kind: str, damping: float | None, kl_clip: float | None = None) -> float:
    torch.manual_seed(0)
    model = net()
    x = 1 + data(40, 2, 6, 6)
    x[:, 1] += 0.7 * x[:, 0]
    target = classes(40, 2, count=2).double()
    B, b = channel_transform(kind, x)
    twin = compensated(model, B, b)
    transformed = torch.einsum("ij,njhw->nihw", B, x) + b[:, None, None]
    with torch.no_grad():
        assert torch.allclose(twin(transformed), model(x), rtol=1e-10, atol=1e-12)
    one = change_of_function(model, x, target, damping, kl_clip)
    two = change_of_function(twin, transformed, target, damping, kl_clip)
    return float((one - two).norm() / one.norm())


@pytest.mark.parametrize("kl_clip", [None, 1e-3])
@pytest.mark.parametrize("kind", ["whitened", "centred", "random"])
def test_an_undamped_step_does_not_depend_on_an_affine_change_of_the_input_channels(
    kind: str, kl_clip: float | None
) -> None:
    differences = [relative_difference(kind, damping, kl_clip) for damping in (1e-12, 1e-14, 1e-16)]
    assert differences[-1] < 1e-4, f"differences {differences}"
    # What is left is the damping's and vanishes with it: a tenth of √λ, a tenth of it.
    assert differences[1] < differences[0] / 9, f"differences {differences}"
    assert differences[2] < differences[1] / 9, f"differences {differences}"


@pytest.mark.parametrize("kind", ["whitened", "centred", "random"])
def test_gradient_descent_does_depend_on_it(kind: str) -> None:
    # The control: the change of basis is a large one for a method that is not invariant.
    assert relative_difference(kind, None) > 0.1
