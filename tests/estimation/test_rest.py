"""Recognised terms keep their curvature; the rest of the gradient adds an empirical Fisher matrix.

Every matrix is held against one that is built here: JᵀHJ of the recognised terms, H by autograd, and the second moment
of the rest's derivatives by each example, in the unit of the loss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import oracles
from tests.helpers.nets import classes, data, engine, kronecker_layers, observe, train_step

N = 6
TARGET, RETURNS = classes(N, count=3), data(N, seed=4)


class TwoHeads(nn.Module):
    """Policy and value heads on one body."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.body(x)
        h = s.tanh()
        return s, self.policy(h), self.value(h)[:, 0]


def by_example(gradient: Tensor, loss: Tensor, terms: int = 1) -> Tensor:
    """N Σ u uᵀ over the examples of the derivative of a mean, over the loss, times the terms of each example."""
    return terms * len(gradient) * gradient.T @ gradient / loss.detach().abs()


Parts = tuple[Callable[[Tensor, Tensor, Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]

#: Each as a function of the body's output, the policy's logits and the values: what is recognised, and the rest.
LOSSES: dict[str, Parts] = {
    "a value head by hand": (
        lambda s, z, v: F.cross_entropy(z, TARGET),
        lambda s, z, v: 0.5 * (v - RETURNS).square().mean(),
    ),
    "a regulariser on features": (
        lambda s, z, v: F.cross_entropy(z, TARGET),
        lambda s, z, v: 0.1 * s.abs().mean() + 0.3 * v.cosh().mean(),
    ),
    "entropy of the same logits": (
        lambda s, z, v: F.cross_entropy(z, TARGET, reduction="sum"),
        lambda s, z, v: 0.1 * v.cosh().mean() - 0.2 * (z.softmax(1) * z.log_softmax(1)).sum(1).mean(),
    ),
    "little of it recognised": (
        lambda s, z, v: 1e-4 * F.mse_loss(v, RETURNS),
        lambda s, z, v: (v - RETURNS).abs().mean() + z.cosh().mean(),
    ),
    "two recognised terms": (
        lambda s, z, v: F.cross_entropy(z, TARGET) + 0.5 * F.mse_loss(v, RETURNS),
        lambda s, z, v: 0.1 * s.square().mean(),
    ),
}


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("penalty", [0.0, 0.5])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_every_layer_has_the_sum_of_what_reaches_it(case: str, penalty: float, scale: float) -> None:
    recognised, rest = LOSSES[case]
    torch.manual_seed(0)
    model, x = TwoHeads().double(), data(N, 4)
    kfc = engine(model)
    with kfc.capture():
        s, z, v = model(x)
        loss = recognised(s, z, v) + rest(s, z, v)
        loss = loss + penalty * sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
    kfc.update(loss * scale, loss_scale=scale)

    # The Hessian of the recognised part by policy and value, whose terms' Fisher information has no other part.
    s, z, v = (output.detach() for output in model(x))
    both = torch.cat([z, v[:, None]], 1)
    H = oracles.logits_hessian(lambda both: recognised(s, both[:, :3], both[:, 3]), both).reshape(N, 4, N, 4)
    H = torch.einsum("ninj->nij", H)
    heads = torch.cat([model.policy.weight, model.value.weight]).detach()
    J = heads.unsqueeze(0) * (1 - s.tanh().square()).unsqueeze(1)
    expected = {
        "policy": H[:, :3, :3].sum(0),
        "value": H[:, 3:, 3:].sum(0),
        "body": torch.einsum("nia,nij,njb->ab", J, H, J),
    }
    leaf = s.requires_grad_()
    h = leaf.tanh()
    z, v = model.policy(h), model.value(h)[:, 0]
    found = torch.autograd.grad(rest(leaf, z, v), [z, v, leaf], materialize_grads=True, allow_unused=True)
    terms = 2 if case == "two recognised terms" else 1
    expected["policy"] = expected["policy"] + by_example(found[0], loss, terms)
    expected["value"] = expected["value"] + by_example(found[1][:, None], loss, terms)
    expected["body"] = expected["body"] + by_example(found[2], loss, terms)
    for name, matrix in expected.items():
        oracles.assert_equal(kfc.layers[name].G, matrix, rtol=1e-8, what=f"G of {name}")
    assert kronecker_layers(kfc) == ["body", "policy", "value"]


def test_a_loss_without_a_rest_makes_no_further_back_propagation(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_kfc.estimation import loss_statistics

    def unexpected(*args: object, **kwargs: object) -> None:
        raise AssertionError("the rest was asked for")

    monkeypatch.setattr(loss_statistics.LossStatistics, "_empirical", unexpected)
    model, x = TwoHeads().double(), data(N, 4)

    def loss() -> Tensor:
        _, z, v = model(x)
        return (F.cross_entropy(z, TARGET) + 0.5 * F.mse_loss(v, RETURNS)) / 3 + model.body.weight.square().sum()

    assert observe(model, loss).layers["body"].averages


def test_shares_of_the_gradient_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_kfc")
    model, x = TwoHeads().double(), data(N, 4)
    kfc, optimizer = engine(model), torch.optim.SGD(model.parameters(), lr=0.0)

    def mixed() -> Tensor:
        _, z, v = model(x)
        return F.cross_entropy(z, TARGET) + 0.5 * (v - RETURNS).square().mean()

    for _ in range(3):
        train_step(kfc, optimizer, mixed)
    (line,) = [r.getMessage() for r in caplog.records if "curvature from" in r.getMessage()]
    s, z, v = model(x)
    norms = []
    for part in (F.cross_entropy(z, TARGET), 0.5 * (v - RETURNS).square().mean()):
        found = torch.autograd.grad(part, [s, z, v], retain_graph=True, allow_unused=True)
        norms.append(torch.cat([g.flatten() for g in found if g is not None]).norm())
    percent = [float(100 * norm / sum(norms)) for norm in norms]
    assert f"cross_entropy ({percent[0]:.2g} % of the gradient)" in line
    assert f"the gradient of the rest ({percent[1]:.2g} %; its empirical Fisher)" in line
    assert kfc.batches.sources == "cross_entropy, the gradient of the rest"
    assert kfc.events.unrecognised_losses == 0
    train_step(kfc, optimizer, lambda: F.cross_entropy(model(x)[1], TARGET))
    assert kfc.batches.sources == "cross_entropy"


def test_a_named_likelihood_has_no_rest() -> None:
    model, x = TwoHeads().double(), data(N, 4)

    def loss(extra: float) -> Callable[[], Tensor]:
        def value() -> Tensor:
            s, z, _ = model(x)
            return F.cross_entropy(z, TARGET) + extra * s.square().mean()

        return value

    named, plain = observe(model, loss(1.0), likelihood="categorical"), observe(model, loss(0.0))
    oracles.assert_equal(named.layers["body"].G, plain.layers["body"].G, what="G of the body")


def test_a_recognised_term_inside_another_one_counts_once() -> None:
    model, x = TwoHeads().double(), data(N, 4)

    def nested() -> Tensor:
        return F.mse_loss(F.cross_entropy(model(x)[1], TARGET, reduction="none"), RETURNS)

    kfc = observe(model, nested)
    assert kfc.batches.sources == "mse_loss"
    z = model(x)[1].detach().requires_grad_()
    J = torch.autograd.grad(F.cross_entropy(z, TARGET, reduction="sum"), z)[0]
    oracles.assert_equal(kfc.layers["policy"].G, 2 / N * J.T @ J, what="G of the policy")


def test_a_target_with_a_gradient_of_its_own_is_a_part_of_the_rest() -> None:
    model, x = TwoHeads().double(), data(N, 4)

    def loss(s: Tensor, z: Tensor) -> Tensor:
        return F.cross_entropy(z, s[:, :3].softmax(1))

    kfc = observe(model, lambda: loss(*model(x)[:2]))
    s, z, _ = (output.detach() for output in model(x))
    own = s.requires_grad_()
    (u,) = torch.autograd.grad(loss(own, z), own)
    H = oracles.logits_hessian(lambda z: loss(s.detach(), z), z).reshape(N, 3, N, 3)
    J = model.policy.weight.detach().unsqueeze(0) * (1 - s.detach().tanh().square()).unsqueeze(1)
    expected = torch.einsum("nia,ninj,njb->ab", J, H, J) + by_example(u, loss(s, z))
    oracles.assert_equal(kfc.layers["body"].G, expected, rtol=1e-8, what="G of the body")


@pytest.mark.parametrize(
    ("fisher", "inverse"), [("mc", "cholesky"), ("exact", "ekfac"), ("empirical", "eigh"), ("mc", "ekfac")]
)
def test_a_mixed_loss_trains(fisher: str, inverse: str) -> None:
    torch.manual_seed(0)
    model, x = TwoHeads().double(), data(N, 4)
    kfc = engine(model, fisher=fisher, inverse=inverse, kl_clip=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

    def mixed() -> Tensor:
        s, z, v = model(x)
        return F.cross_entropy(z, TARGET) + 0.5 * (v - RETURNS).square().mean() + 1e-3 * s.abs().mean()

    losses = [float(train_step(kfc, optimizer, mixed)) for _ in range(15)]
    assert losses[-1] < 0.9 * losses[0]
    assert not any(kfc.events.state_dict().values())


class WeightedHeads(TwoHeads):
    """Two losses with learnt weights (Kendall et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.tensor([0.3, -0.2]))

    def loss(self, x: Tensor) -> Tensor:
        _, z, v = self(x)
        losses = torch.stack([F.cross_entropy(z, TARGET), F.mse_loss(v, RETURNS)])
        loss: Tensor = (torch.exp(-self.log_variances) * losses + self.log_variances).sum()
        return loss


def test_learnt_weights_of_losses_have_a_curvature_of_their_own_and_are_no_rest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "lightning_kfc")
    torch.manual_seed(0)
    model, x = WeightedHeads().double(), data(N, 4)
    arrived: list[Tensor] = []
    hook = model.body.register_forward_hook(lambda module, args, output: output.register_hook(arrived.append) and None)
    kfc = observe(model, lambda: model.loss(x), fisher="mc")
    hook.remove()
    assert len(arrived) == 1, f"{len(arrived)} back-propagations through the heads"
    (line,) = [r.getMessage() for r in caplog.records if "curvature from" in r.getMessage()]
    assert "curvature from cross_entropy, mse_loss." in line
    (gradient,) = torch.autograd.grad(model.loss(x), model.log_variances)
    expected = 2 * N * gradient.square()[None] / model.loss(x).detach().abs()
    oracles.assert_equal(kfc.layers["log_variances"].averages["F"].value, expected, what="F of the weights")


def test_shares_are_those_at_the_outputs_of_layers_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_kfc")

    def shares(model: TwoHeads, loss: Callable[[], Tensor]) -> str:
        caplog.clear()
        observe(model, loss)
        (line,) = [r.getMessage() for r in caplog.records if "curvature from" in r.getMessage()]
        return line

    model, x = WeightedHeads().double(), data(N, 4)

    def mixed(weights: Tensor) -> Tensor:
        s, z, _ = model(x)
        return weights.exp()[0] * F.cross_entropy(z, TARGET) + 0.1 * s.square().mean() + 100 * weights.sum()

    assert shares(model, lambda: mixed(model.log_variances)) == shares(
        model, lambda: mixed(model.log_variances.detach())
    )
