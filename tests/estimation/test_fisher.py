"""Monte-Carlo factors converge to the exact ones; empirical factors are another matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import Categorical
from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.loss_magnitude import SLOWEST_FALL
from tests.helpers import oracles
from tests.helpers.nets import classes, data, double, engine, observe, small_conv_net, train_step


def per_call_output_gradients(model: nn.Module, layer: str, x: Tensor, target: Tensor) -> Tensor:
    """∇ℓ of every example at a layer's output, one backward an example, ``(N, *output)``."""
    rows = []
    for example, own in zip(x.split(1), target.split(1), strict=True):
        kept: list[Tensor] = []
        handle = model.get_submodule(layer).register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
        loss = F.cross_entropy(model(example), own)
        handle.remove()
        rows += torch.autograd.grad(loss, kept)
    return torch.cat(rows)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_monte_carlo_factors_converge_to_the_exact_ones_at_the_root_rate() -> None:
    model, x, target = small_conv_net(), data(2, 2, 6, 6), classes(2, count=3)
    exact = {name: layer.G for name, layer in observe(model, lambda: F.cross_entropy(model(x), target)).layers.items()}
    counts = [16, 64, 256]
    errors: dict[str, list[float]] = {name: [] for name in exact}
    for n in counts:
        # A batch of n copies is n independent samples of the same factor.
        many, targets = x.repeat(n, 1, 1, 1), target.repeat(n)
        squares = dict.fromkeys(exact, 0.0)
        for seed in range(10):
            kfc = observe(model, lambda m=many, t=targets: F.cross_entropy(model(m), t), fisher="mc", seed=seed)
            for name, layer in kfc.layers.items():
                squares[name] += relative(layer.G, exact[name]) ** 2 / 10
        for name in exact:
            errors[name].append(math.sqrt(squares[name]))
    for name, found in errors.items():
        slope = oracles.slope([math.log(n) for n in counts], [math.log(e) for e in found])
        assert -0.7 < slope < -0.3, f"{name}: slope {slope:.3f}, errors {found}"
        assert found[-1] < 0.1, f"{name}: errors {found}"


@pytest.mark.slow
def test_monte_carlo_factors_averaged_over_steps_converge_to_the_exact_ones() -> None:
    model, x, target = double(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), data(4, 3), classes(4, count=3)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), target)

    exact = {name: layer.G for name, layer in observe(model, loss).layers.items()}
    kfc = engine(model, fisher="mc", ema_decay=0.0)
    sums = {name: torch.zeros_like(G) for name, G in exact.items()}
    single = []
    steps = 400
    for _ in range(steps):
        with kfc.capture():
            value = loss()
        kfc.update(value)
        kfc.precondition(lr=0.1)
        for name in sums:
            sums[name] += kfc.layers[name].G / steps
        single.append(relative(kfc.layers["2"].G, exact["2"]))
    # Independent draws at every step: 400 of them are 20 times closer than one; a repeated draw would not come closer.
    for name in exact:
        assert relative(sums[name], exact[name]) < 3 / math.sqrt(steps) * sum(single) / steps


def test_empirical_factors_equal_the_second_moment_of_the_data_s_own_gradients() -> None:
    model, x, target = small_conv_net(), data(5, 2, 6, 6), classes(5, count=3)
    kfc = observe(model, lambda: F.cross_entropy(model(x), target), fisher="empirical")
    for name in ("0", "2", "5"):
        g = per_call_output_gradients(model, name, x, target)
        rows = g if g.ndim == 2 else g.flatten(2).transpose(1, 2).reshape(-1, g.shape[1])
        oracles.assert_equal(kfc.layers[name].G, rows.T @ rows / len(x), what=f"G of {name}")


def test_empirical_factors_do_not_converge_to_the_exact_ones_on_a_model_that_does_not_fit() -> None:
    model, x = small_conv_net(), data(2, 2, 6, 6)
    target = torch.tensor([1, 1])
    exact = observe(model, lambda: F.cross_entropy(model(x), target)).layers["5"].G
    distances = []
    for n in (1, 16, 256):
        many, targets = x.repeat(n, 1, 1, 1), target.repeat(n)
        kfc = observe(model, lambda m=many, t=targets: F.cross_entropy(model(m), t), fisher="empirical")
        distances.append(relative(kfc.layers["5"].G, exact))
    assert min(distances) > 0.3, f"distances {distances}"
    assert max(distances) - min(distances) < 1e-9, f"distances {distances}"


@pytest.mark.slow
def test_empirical_terms_of_one_example_add_up_without_their_products() -> None:
    # Random signs cancel the products of different pixels in expectation.
    model, x, target = (
        double(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 2)),
        data(1, 1, 3, 3),
        classes(1, 2, 2, count=2),
    )

    def loss() -> Tensor:
        return F.cross_entropy(model(x), target)

    terms = F.cross_entropy(model(x), target, reduction="none").reshape(-1) / 4
    hidden = model[0](x).detach().requires_grad_()
    expected = torch.zeros(2, 2).double()
    for pixel in range(4):
        term = F.cross_entropy(model[2](model[1](hidden)), target, reduction="none").reshape(-1)[pixel]
        (g,) = torch.autograd.grad(term, hidden)
        rows = g[0].flatten(1)
        expected += rows @ rows.T / len(terms)
    draws = torch.stack([observe(model, loss, fisher="empirical", seed=seed).layers["0"].G for seed in range(300)])
    spread = float((draws - expected).square().sum((1, 2)).mean().sqrt())
    error = float((draws.mean(0) - expected).norm())
    assert error < 3 * spread / math.sqrt(300), f"error {error:.3g}, spread {spread:.3g}"
    assert spread < 3 * float(expected.norm())


@pytest.mark.slow
def test_exact_terms_that_share_an_example_along_the_first_axis_add_up_without_their_products() -> None:
    # Language models flatten (N, S, K) logits to (N * S, K): random signs cancel the products in expectation.
    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(3, 4), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.trunk(x).tanh()).reshape(2 * len(x), 3)

    model, x, target = Flattened().double(), data(2, 3), classes(4, count=3)
    hessian = oracles.logits_hessian(lambda z: F.cross_entropy(z, target), model(x))
    hidden = model.trunk(x).detach()
    J = oracles.jacobian(lambda h: model.head(h.tanh()), hidden)
    # The Hessian is block diagonal over terms; each example's own block of the product is its rows' second moment.
    expected = torch.einsum("ncnd->cd", (J.T @ hessian @ J).reshape(2, 4, 2, 4))

    def loss() -> Tensor:
        return F.cross_entropy(model(x), target)

    draws = torch.stack([observe(model, loss, seed=seed).layers["trunk"].G for seed in range(200)])
    spread = float((draws - expected).square().sum((1, 2)).mean().sqrt())
    error = float((draws.mean(0) - expected).norm())
    assert 0 < spread < 3 * float(expected.norm())
    assert error < 3 * spread / math.sqrt(200), f"error {error:.3g}, spread {spread:.3g}"


def by_hand(z: Tensor, y: Tensor) -> Tensor:
    """A loss that is not recognised."""
    return (1 + (z - y).square()).sqrt().mean()


@pytest.mark.parametrize("unbatched", [False, True])
def test_an_unrecognised_loss_has_an_empirical_fisher_as_a_mean_over_examples(unbatched: bool) -> None:
    model = double(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(0 if unbatched else 1), nn.Linear(12, 2))
    x = data(2, 3, 3) if unbatched else data(4, 2, 3, 3)
    y = torch.zeros(2).double() if unbatched else torch.zeros(4, 2).double()
    kfc = observe(model, lambda: by_hand(model(x), y), fisher="empirical")
    g = []
    batch = x.unsqueeze(0) if unbatched else x
    for example in batch:
        hidden = model[0](example).detach().requires_grad_()
        out = model[3](model[1](hidden).reshape(-1))
        g.append(torch.autograd.grad(by_hand(out, torch.zeros(2).double()), hidden)[0].flatten(1))
    expected = sum(rows @ rows.T for rows in g) / len(batch)
    loss = float(by_hand(model(x), y).detach())
    oracles.assert_equal(kfc.layers["0"].G, expected / (2 * loss), what="G")


def test_an_unrecognised_loss_accumulated_in_parts_has_the_empirical_fisher_of_the_whole() -> None:
    model, x, y = double(nn.Linear(3, 2)), data(6, 3), data(6, 2, seed=5)

    def observed(parts: int) -> Layer:
        """After a step with the whole batch, which begins the unit."""
        kfc, size = engine(model, fisher="empirical"), 6 // parts
        train_step(kfc, torch.optim.SGD(model.parameters(), lr=0.0), lambda: by_hand(model(x), y))
        for rows in range(0, 6, size):
            with kfc.capture():
                loss = by_hand(model(x[rows : rows + size]), y[rows : rows + size]) / parts
            kfc.update(loss, accumulate=rows + size < 6, loss_fraction=1 / parts)
            loss.backward()
        return kfc.layers["0"]

    whole, in_parts = observed(1), observed(3)
    oracles.assert_equal(in_parts.A, whole.A, what="A")
    oracles.assert_equal(in_parts.G, whole.G, what="G")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_squares_by_hand_with_residuals_of_one_size_have_the_curvature_of_the_mean_squared_error(scale: float) -> None:
    model, x = double(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), data(6, 3)
    y = model(x).detach() + 0.3 * torch.tensor([[1.0], [-1.0]]).double().repeat(3, 1)
    by_hand = observe(model, lambda: scale * (model(x) - y).square().mean())
    recognised = observe(model, lambda: scale * F.mse_loss(model(x), y))
    for name in ("0", "2"):
        oracles.assert_equal(by_hand.layers[name].G, recognised.layers[name].G, what=f"G of {name}")


@pytest.mark.parametrize("ratio", [0.01, 4.0])
def test_an_empirical_fisher_is_in_units_of_the_mean_of_the_first_and_the_last_known_loss(ratio: float) -> None:
    model, x = double(nn.Linear(3, 2)), data(6, 3)
    kfc, optimizer = engine(model, ema_decay=0.5), torch.optim.SGD(model.parameters(), lr=0.0)
    found = []
    for factor in (1.0, ratio, ratio):
        train_step(kfc, optimizer, lambda factor=factor: factor * model(x).cosh().mean())
        found.append(kfc.layers["0"].G.clone())
    # Debiased averages with a decay of 1/2: the second step has two thirds, the third one four sevenths.
    second, third = (3 * found[1] - found[0]) / 2, (7 * found[2] - 3 * found[1]) / 4
    # The unit is that before the step: at the second step the first loss, at the third the mean of both.
    fall = max(ratio, SLOWEST_FALL)
    oracles.assert_equal(second, ratio**2 * found[0], what="the second step's")
    oracles.assert_equal(third, ratio**2 / fall**0.5 * found[0], what="the third step's")


def test_empirical_needs_a_recognised_loss_or_none() -> None:
    model, x = double(nn.Linear(3, 2)), data(4, 3)
    kfc = engine(model, fisher="empirical", likelihood=Categorical(output_of="0"))
    with kfc.capture():
        loss = model(x).logsumexp(1).mean()
    with pytest.raises(ValueError, match=r"output of '0' has none.*likelihood='auto'"):
        kfc.update(loss)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_the_user_s_random_stream_and_gradients_are_untouched(fisher: str) -> None:
    def run(with_kfc: bool) -> tuple[list[float], Tensor]:
        torch.manual_seed(3)
        model = double(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        kfc = engine(model, fisher=fisher) if with_kfc else None
        losses = []
        for _ in range(4):
            if kfc is None:
                loss = F.cross_entropy(model(data(4, 3)), classes(4, count=3))
            else:
                with kfc.capture():
                    loss = F.cross_entropy(model(data(4, 3)), classes(4, count=3))
                kfc.update(loss)
            loss.backward()
            losses.append(float(loss.detach()))
        return losses, torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])

    with_losses, with_gradients = run(True)
    with_state = torch.random.get_rng_state()
    losses, gradients = run(False)
    assert with_losses == losses
    assert torch.equal(with_gradients, gradients)
    assert torch.equal(with_state, torch.random.get_rng_state())


def test_the_same_seed_draws_the_same_targets_and_another_seed_others() -> None:
    model, x, target = double(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), data(4, 3), classes(4, count=3)
    one, same, other = (
        observe(model, lambda: F.cross_entropy(model(x), target), fisher="mc", seed=seed).layers["0"].G
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_gradient_scaler_s_factor_on_the_loss_is_undone(fisher: str, loss_scale: float) -> None:
    model, x, target = double(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), data(4, 3), classes(4, count=3)
    plain = observe(model, lambda: F.cross_entropy(model(x), target), fisher=fisher).layers["0"].G
    kfc = engine(model, fisher=fisher)
    with kfc.capture():
        loss = F.cross_entropy(model(x), target) * loss_scale
    kfc.update(loss, loss_scale=loss_scale)
    oracles.assert_equal(kfc.layers["0"].G, plain, what="G")


def test_tiny_weights_do_not_flush_seeds_to_zero_in_half_precision() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x, target = data(8, 3).float(), classes(8, count=3)

    def loss(factor: float) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return F.cross_entropy(model(x), target) * factor

    usual, tiny = (observe(model, lambda f=f: loss(f), fisher="mc").layers["0"].G / f for f in (1.0, 2.0**-20))
    # Both draw the same targets; float16 has 11 bits.
    oracles.assert_equal(tiny, usual, rtol=5e-3, what="G")
