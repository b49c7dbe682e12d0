"""Models and steps that few tests of a library think of: each trains with the defaults, and is fully accounted for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import KFCCallback
from tests.helpers.harness import QUIET, Classifier, fit

pytestmark = [*map(pytest.mark.filterwarnings, QUIET), pytest.mark.filterwarnings("ignore:Initializing zero-element")]


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


class Net(nn.Module):
    """Two linear layers that a function of the network uses."""

    def __init__(self, use: Callable[[nn.Sequential, Tensor], Tensor], **more: nn.Module) -> None:
        super().__init__()
        self.net, self.more, self.use = dense(), nn.ModuleDict(more), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.net, x)


def scaled_weights(net: nn.Sequential, x: Tensor) -> Tensor:
    scaled = {name: 0.9 * value for name, value in net.named_parameters()}
    return net(x) + torch.func.functional_call(net, scaled, (x,))


def adapted(net: nn.Sequential, x: Tensor) -> Tensor:
    """A step of gradient descent inside of the forward, as meta-learning takes it."""
    own = dict(net.named_parameters())
    inner = torch.func.functional_call(net, own, (x,)).square().mean()
    gradients = torch.autograd.grad(inner, list(own.values()), create_graph=True)
    moved = {name: value - 0.1 * g for (name, value), g in zip(own.items(), gradients, strict=True)}
    return torch.func.functional_call(net, moved, (x,))


def with_slopes(net: nn.Sequential, x: Tensor) -> Tensor:
    slopes = torch.func.vmap(torch.func.jacrev(lambda one: net(one).sum()))(x)
    return net(x) + 1e-3 * slopes.square().mean()


def one_by_one(net: nn.Sequential, x: Tensor) -> Tensor:
    return torch.vmap(net)(x)


def of_two_lengths(net: nn.Sequential, x: Tensor) -> Tensor:
    return net(torch.nested.nested_tensor([x[:3], x[3:]], layout=torch.jagged)).values()


def straight_through(net: nn.Sequential, x: Tensor) -> Tensor:
    first = net[0]
    return net[2](F.linear(x, first.weight + (first.weight.round() - first.weight).detach(), first.bias).tanh())


def tied(net: nn.Sequential, x: Tensor) -> Tensor:
    hidden = net[0](x).tanh()
    return net[2](net[0](F.linear(hidden, net[0].weight.T)).tanh())


class LowRank(nn.Module):
    """A frozen layer with a trained correction of low rank, whose weights no other module holds."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.zeros(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def pruned(net: nn.Sequential) -> nn.Sequential:
    for layer in (net[0], net[2]):
        prune.random_unstructured(layer, "weight", 0.2)
    return net


MODELS: dict[str, Callable[[], nn.Module]] = {
    "its weights times a number, through functional_call": lambda: Net(scaled_weights),
    "a step of descent inside of the forward": lambda: Net(adapted),
    "derivatives by torch.func": lambda: Net(with_slopes),
    "vmap over the examples": lambda: Net(one_by_one),
    "nested tensors": lambda: Net(of_two_lengths),
    "a weight that is rounded straight through": lambda: Net(straight_through),
    "a decoder with the transposed weight of its encoder": lambda: Net(tied),
    "layers without elements": lambda: Net(lambda net, x: net(x), none=nn.Linear(8, 0), back=nn.Linear(0, 3)),
    "a traced layer": lambda: nn.Sequential(torch.jit.trace(nn.Linear(8, 6), torch.zeros(2, 8)), nn.Linear(6, 3)),
    "names with the signs of patterns": lambda: NamedLikePatterns(),
    "DataParallel on a CPU": lambda: nn.DataParallel(dense()),
    "one layer under several names": lambda: Net(lambda net, x: net(x), again=Shared(dense())),
    "weights that are parts of one buffer": lambda: in_one_buffer(dense()),
    "a weight that is a transposed view": lambda: with_view(dense()),
    "a sparse input": lambda: Net(lambda net, x: net((x * (x > -1)).to_sparse())),
    "nothing but corrections of low rank": lambda: nn.Sequential(LowRank(8, 6), nn.Tanh(), LowRank(6, 3)),
    "nothing but linear layers with a forward of their own": lambda: nn.Sequential(OwnForward(8, 6), OwnForward(6, 3)),
    "nothing but pruned layers": lambda: pruned(dense()),
}


class NamedLikePatterns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a[b]": nn.Linear(8, 6), "*": nn.Linear(6, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.layers["*"](self.layers["a[b]"](x).tanh())


class Shared(nn.Module):
    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.first, self.second = net, net


def in_one_buffer(net: nn.Sequential) -> nn.Sequential:
    buffer, start = torch.cat([p.detach().flatten() for p in net.parameters()]), 0
    for p in net.parameters():
        p.data = buffer[start : start + p.numel()].view_as(p)
        start += p.numel()
    return net


def with_view(net: nn.Sequential) -> nn.Sequential:
    net[0].weight = nn.Parameter(0.3 * torch.randn(8, 6).T)
    return net


def batches(steps: int = 30) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(32, 8, generator=generator)
    y = x[:, :3].argmax(1)
    return DataLoader(TensorDataset(x.repeat(steps, 1), y.repeat(steps)), batch_size=32)


@pytest.mark.filterwarnings("ignore:KFC has no Kronecker factors")
@pytest.mark.filterwarnings("ignore:.*cannot review steps.*NestedTensor")
@pytest.mark.filterwarnings("ignore:.*torch.jit|.*nested tensors is in prototype")
@pytest.mark.slow
@pytest.mark.parametrize("case", MODELS)
def test_it_trains_with_the_defaults_and_every_parameter_is_accounted_for(case: str) -> None:
    torch.manual_seed(0)
    module, callback = Classifier(MODELS[case]()), KFCCallback()
    fit(module, kfc=callback, data=batches(), max_steps=30)
    assert module.losses[-1] < 0.8 * module.losses[0]
    allowed = {"undone_steps", "shortened_steps", "unrecognised_losses"}
    assert {name for name, count in callback.kfc.events.state_dict().items() if count} <= allowed
    rows = {row.parameter: row for row in callback.kfc.coverage()}
    assert set(rows) == {name for name, _ in module.named_parameters()}
    assert all(row.reason for row in rows.values() if row.treatment != "kfc")


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("skipped", ["nan", "none"])
def test_the_first_step_may_be_one_that_is_skipped(skipped: str) -> None:
    class Skips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if batch_idx:
                return loss
            return loss * torch.nan if skipped == "nan" else None

    torch.manual_seed(0)
    module, callback = Skips(dense()), KFCCallback()
    catch = pytest.warns(UserWarning, match="not finite") if skipped == "nan" else contextlib.nullcontext()
    with catch:
        fit(module, kfc=callback, data=batches(), max_steps=29)
    assert module.losses[-1] < 0.8 * module.losses[0]
    assert all(layer.inverse is not None for layer in callback.kfc.layers.values())
