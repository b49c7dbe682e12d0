"""EKFAC: the Fisher's own diagonal in KFC's eigenbasis, hence never further from the Fisher than KFC is."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC
from lightning_kfc.estimation import example_gradients as per_example
from lightning_kfc.factors.inverses import EighInverse, EkfacInverse
from tests.helpers import oracles
from tests.helpers.nets import classes, data, double, engine, observe, small_conv_net, train_step

Loss = Callable[[Tensor], Tensor]


def ekfac(model: nn.Module, loss: Callable[[], Tensor], **settings: Any) -> KFC:
    return observe(model, loss, inverse="ekfac", **settings)


def inverse_of(kfc: KFC, layer: str) -> EkfacInverse:
    inverse = kfc.layers[layer].inverse
    assert isinstance(inverse, EkfacInverse)
    return inverse


def basis_matrix(inverse: EkfacInverse) -> Tensor:
    """Q on row-major vectors, for one group."""
    sides = [side[0] if side.ndim == 3 else torch.diag(side[0]) for side in (inverse.A_vectors, inverse.G_vectors)]
    # torch.kron takes no matrix in column order.
    return oracles.kron(*(side.contiguous() for side in sides))


def diagonal_in(inverse: EkfacInverse, fisher: Tensor) -> Tensor:
    Q = basis_matrix(inverse)
    return (Q.T @ fisher @ Q).diagonal().reshape(inverse.values.shape)


def gradients_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    return torch.autograd.grad(function(at), at)[0]


class Attention(nn.Module):
    """Mixes the positions of (N, S, 3) inputs, so that an example's rows depend on each other; 2 logits an example."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x))
        return self.head((torch.softmax(h @ h.mT, -1) @ h).mean(1))


class Siamese(nn.Module):
    """One encoder on both halves of the input; 2 logits an example."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encoder(x[:, 0])) * torch.sigmoid(self.encoder(x[:, 1])))


def model_and_inputs(kind: str, examples: int) -> tuple[nn.Module, Tensor, Sequence[str], int]:
    """A model, its inputs, the layers to look at and the number of classes."""
    if kind == "conv":
        return small_conv_net(), data(examples, 2, 6, 6), ("0", "2", "5"), 3
    if kind == "attention":
        return Attention().double(), data(examples, 4, 3), ("embed", "head"), 2
    if kind == "siamese":
        return Siamese().double(), data(examples, 2, 3), ("encoder", "head"), 2
    return double(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3, bias=False)), data(examples, 3), ("0", "2"), 3


KINDS = st.sampled_from(["mlp", "conv", "attention", "siamese"])


@given(
    kind=KINDS,
    examples=st.integers(1, 4),
    weight_sharing=st.sampled_from(["expand", "reduce"]),
    loss=st.sampled_from(["categorical", "gaussian"]),
    max_factor_dim=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 10**6),
)
def test_ekfac_is_never_further_from_the_dense_fisher_than_kfc_and_has_its_diagonal_in_the_basis(
    kind: str, examples: int, weight_sharing: str, loss: str, max_factor_dim: int | None, seed: int
) -> None:
    torch.manual_seed(seed)
    model, x, layers, outputs = model_and_inputs(kind, examples)
    targets: Tensor = classes(examples, count=outputs) if loss == "categorical" else data(examples, outputs, seed=3)

    def loss_of(z: Tensor) -> Tensor:
        return F.cross_entropy(z, targets) if loss == "categorical" else F.mse_loss(z, targets)

    kfc = ekfac(model, lambda: loss_of(model(x)), weight_sharing=weight_sharing, max_factor_dim=max_factor_dim)
    for name in layers:
        fisher, inverse = oracles.dense_fisher(model, x, loss_of, name), inverse_of(kfc, name)
        oracles.assert_equal(inverse.values, diagonal_in(inverse, fisher), what=f"eigenvalues of {name}")
        sides = [f if f.ndim == 2 else torch.diag(f) for f in (kfc.layers[name].A, kfc.layers[name].G)]
        Q = basis_matrix(inverse)
        corrected = Q @ torch.diag(inverse.values.reshape(-1)) @ Q.T
        kfc_error, ekfac_error = (float((m - fisher).norm()) for m in (oracles.kron(*sides), corrected))
        assert ekfac_error <= kfc_error + 1e-9 * float(fisher.norm()), f"EKFAC / KFC error = {ekfac_error / kfc_error}"


def test_the_correction_is_a_real_one_on_a_conv_net() -> None:
    model, x, _, _ = model_and_inputs("conv", 4)

    def loss_of(z: Tensor) -> Tensor:
        return F.cross_entropy(z, classes(4, count=3))

    kfc = ekfac(model, lambda: loss_of(model(x)))
    fisher, inverse = oracles.dense_fisher(model, x, loss_of, "2"), inverse_of(kfc, "2")
    Q = basis_matrix(inverse)
    error = float((Q @ torch.diag(inverse.values.reshape(-1)) @ Q.T - fisher).norm())
    product = float((oracles.kron(kfc.layers["2"].A, kfc.layers["2"].G) - fisher).norm())
    assert error < 0.95 * product, f"EKFAC / KFC error = {error / product}"


def test_the_step_is_the_dense_solve_with_the_corrected_eigenvalues_and_the_damping_of_its_own_step() -> None:
    model, x, layers, _ = model_and_inputs("conv", 3)
    kfc = engine(model, inverse="ekfac", damping=lambda step: 0.1 / (1 + step), inverse_every_n_steps=5, warmup_steps=0)
    for step in range(3):
        model.zero_grad()
        with kfc.capture():
            loss = F.cross_entropy(model(x), classes(3, count=3))
        kfc.update(loss)
        loss.backward()
        expected = {}
        for name in layers:
            inverse, module = inverse_of(kfc, name), model.get_submodule(name)
            Q, gradient = basis_matrix(inverse), oracles.joint_matrix(module.weight.grad, module.bias.grad)
            curvature = Q @ torch.diag(inverse.values.reshape(-1)) @ Q.T
            damped = curvature + 0.1 / (1 + step) * torch.eye(len(Q)).double()
            expected[name] = torch.linalg.solve(damped, gradient.reshape(-1)).reshape(gradient.shape)
        kfc.precondition(lr=0.1)
        for name in layers:
            module = model.get_submodule(name)
            found = oracles.joint_matrix(module.weight.grad, module.bias.grad)
            oracles.assert_equal(found, expected[name], rtol=1e-8, what=f"V of {name} at step {step}")


def test_second_moments_average_in_one_basis_and_move_with_it_to_the_next() -> None:
    model, _, _, _ = model_and_inputs("conv", 2)
    kfc = engine(model, inverse="ekfac", inverse_every_n_steps=2, warmup_steps=0, ema_decay=0.7)
    batches = [data(2, 2, 6, 6, seed=seed) for seed in range(4)]

    def loss_of(z: Tensor) -> Tensor:
        return F.cross_entropy(z, classes(2, count=3))

    averages: list[Tensor] = []
    mass, dense = 0.0, torch.zeros(1)
    for step, x in enumerate(batches):
        with kfc.capture():
            loss = loss_of(model(x))
        kfc.update(loss)
        loss.backward()
        kfc.precondition(lr=0.1)
        inverse = inverse_of(kfc, "2")
        Q = basis_matrix(inverse)
        fisher = oracles.dense_fisher(model, x, loss_of, "2")
        # What stood before, as a matrix, then the debiased average of its diagonal with the new batch's.
        before = torch.zeros_like(Q.diagonal()) if step == 0 else (Q.T @ dense @ Q).diagonal()
        total = 0.7 * mass * before + 0.3 * (Q.T @ fisher @ Q).diagonal()
        mass = 0.7 * mass + 0.3
        averages.append(inverse.values)
        oracles.assert_equal(inverse.values.reshape(-1), total / mass, what=f"eigenvalues at step {step}")
        dense = Q @ torch.diag(total / mass) @ Q.T
        model.zero_grad()
        # Another weight changes the basis of the next refresh.
        with torch.no_grad():
            model[2].weight.add_(0.1 * data(*model[2].weight.shape, seed=step))
    assert kfc.step == 3


def test_micro_batches_together_give_the_second_moments_of_the_whole_batch() -> None:
    model, x, layers, _ = model_and_inputs("conv", 4)
    y = classes(4, count=3)
    whole = ekfac(model, lambda: F.cross_entropy(model(x), y))
    parts = engine(model, inverse="ekfac")
    for last, rows in ((False, slice(0, 1)), (False, slice(1, 2)), (True, slice(2, 4))):
        with parts.capture():
            loss = F.cross_entropy(model(x[rows]), y[rows], reduction="sum") / 4
        parts.update(loss, accumulate=not last)
        loss.backward()
    for name in layers:
        found, expected = inverse_of(parts, name), inverse_of(whole, name)
        # Eigenvectors are known up to their sign, which squares do not see.
        oracles.assert_equal(found.values, expected.values, rtol=1e-8, what=f"eigenvalues of {name}")


@pytest.mark.parametrize("recognised", [True, False])
def test_the_empirical_fisher_has_its_own_diagonal(recognised: bool) -> None:
    model, x, layers, _ = model_and_inputs("conv", 4)
    y = classes(4, count=3)

    def terms(z: Tensor) -> Tensor:
        return F.cross_entropy(z, y, reduction="none") if recognised else -(z.log_softmax(-1)[range(4), y])

    kfc = ekfac(model, lambda: terms(model(x)).mean(), fisher="empirical")
    for name in layers:
        module = model.get_submodule(name)
        rows = []
        for n in range(4):
            model.zero_grad()
            terms(model(x))[n].backward()
            rows.append(oracles.joint_matrix(module.weight.grad, module.bias.grad).reshape(-1))
        fisher = torch.stack(rows).T @ torch.stack(rows) / 4
        if not recognised:
            fisher = fisher / (2 * terms(model(x)).mean().detach())
        oracles.assert_equal(inverse_of(kfc, name).values, diagonal_in(inverse_of(kfc, name), fisher), what=name)


def test_sampled_targets_give_the_exact_second_moments_in_the_limit() -> None:
    model, x, layers, _ = model_and_inputs("conv", 1)
    many = 4000
    repeated = x.expand(many, *x.shape[1:])

    def loss_of(z: Tensor) -> Tensor:
        return F.cross_entropy(z, torch.zeros(len(z), dtype=torch.long))

    kfc = ekfac(model, lambda: loss_of(model(repeated)), fisher="mc")
    for name in layers:
        expected = diagonal_in(inverse_of(kfc, name), oracles.dense_fisher(model, x, loss_of, name))
        error = float((inverse_of(kfc, name).values - expected).norm() / expected.norm())
        assert error < 5 / many**0.5, f"relative error {error:.3g} of {name}"


def test_calls_on_batches_of_other_sizes_see_other_examples() -> None:
    layer = nn.Linear(3, 2).double()
    x, y = data(4, 3), data(2, 3, seed=5)

    def loss() -> Tensor:
        return F.mse_loss(layer(x), torch.zeros(4, 2).double()) + F.mse_loss(layer(y), torch.zeros(2, 2).double())

    kfc = ekfac(layer, loss)
    # Independent outputs: the Fisher of the sum is the sum of the Fishers.
    fisher = sum(
        oracles.dense_fisher(layer, inputs, lambda z: F.mse_loss(z, torch.zeros_like(z)), "") for inputs in (x, y)
    )
    inverse = inverse_of(kfc, "")
    oracles.assert_equal(inverse.values, diagonal_in(inverse, fisher), what="eigenvalues")


def test_the_size_of_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("conv", "siamese"):
        model, x, layers, outputs = model_and_inputs(kind, 3)
        y = classes(3, count=outputs)
        whole = ekfac(model, lambda m=model, x=x, y=y: F.cross_entropy(m(x), y))
        monkeypatch.setattr(per_example, "CHUNK_BYTES", 1)
        pieces = ekfac(model, lambda m=model, x=x, y=y: F.cross_entropy(m(x), y))
        monkeypatch.undo()
        for name in layers:
            oracles.assert_equal(inverse_of(pieces, name).values, inverse_of(whole, name).values, what=name)


class InPlace(nn.Module):
    """Changes the input of its second layer after that layer has read it."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).to(x.dtype)
        z = self.second(h)
        if self.after:
            h.add_(1.0)
        return z


def test_an_input_that_autocast_casts_may_be_changed_in_place_afterwards() -> None:
    x, y, found = data(6, 3).float(), classes(6, count=2), []
    for after in (False, True):
        torch.manual_seed(0)
        model = InPlace(after)

        def loss(model: nn.Module = model) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return F.cross_entropy(model(x).float(), y)

        found.append(inverse_of(ekfac(model, loss), "second"))
    assert found[0].weight > 0
    assert torch.equal(found[0].values, found[1].values)


def test_an_input_changed_in_place_costs_its_layer_the_correction_and_is_reported() -> None:
    model = InPlace(after=True).double()
    # Autograd lets the input go where the weight is frozen, and only then allows the change.
    model.second.weight.requires_grad_(False)
    x = data(6, 3)
    with pytest.warns(UserWarning, match=r"'second'.* changed in place .*inverse='eigh'"):
        kfc = ekfac(model, lambda: F.cross_entropy(model(x), classes(6, count=2)))
    assert inverse_of(kfc, "second").weight == 0
    assert inverse_of(kfc, "first").weight > 0
    layer = kfc.layers["second"]
    product = torch.linalg.eigvalsh(layer.G).unsqueeze(1) * layer.A
    oracles.assert_equal(inverse_of(kfc, "second").values[0], product, what="eigenvalues")


def test_a_bias_frozen_midway_starts_the_layer_anew() -> None:
    model, x, _, _ = model_and_inputs("mlp", 4)
    kfc = engine(model, inverse="ekfac", inverse_every_n_steps=3, warmup_steps=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        model[0].bias.requires_grad_(step == 0)
        model[0].bias.grad = None
        train_step(kfc, optimizer, lambda: F.cross_entropy(model(x), classes(4, count=3)))
    assert kfc.events.restarted_layers == 1
    assert inverse_of(kfc, "0").values.shape == (1, 4, 3)
    assert inverse_of(kfc, "0").weight > 0


@pytest.mark.parametrize("kind", ["cholesky", "eigh", "ekfac"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(kind: str) -> None:
    def start() -> tuple[nn.Module, KFC, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model, _, _, _ = model_and_inputs("conv", 1)
        model = model.float()
        kfc = engine(
            model,
            inverse=kind,
            fisher="mc",
            factor_every_n_steps=2,
            inverse_every_n_steps=4,
            warmup_steps=1,
            max_factor_dim=18,
            damping=lambda step: 0.1 * 0.9**step,
        )
        return model, kfc, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)

    def run(model: nn.Module, kfc: KFC, optimizer: torch.optim.Optimizer, steps: Sequence[int]) -> None:
        for step in steps:
            x, y = data(5, 2, 6, 6, seed=step).float(), classes(5, count=3, seed=step)
            train_step(kfc, optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))

    whole = start()
    run(*whole, range(12))
    for interruption in (1, 6):
        first = start()
        run(*first, range(interruption))
        file = io.BytesIO()
        torch.save({"model": first[0].state_dict(), "kfc": first[1].state_dict(), "sgd": first[2].state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        second = start()
        second[0].load_state_dict(saved["model"])
        assert second[1].load_state_dict(saved["kfc"]) == []
        second[2].load_state_dict(saved["sgd"])
        run(*second, range(interruption, 12))
        for name, value in whole[0].state_dict().items():
            assert torch.equal(second[0].state_dict()[name], value), f"{name}, interrupted at {interruption}"


def test_a_layer_whose_rows_cannot_be_paired_gets_exact_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _, _ = model_and_inputs("mlp", 4)
    kfc = engine(model, inverse="ekfac")
    monkeypatch.setattr(type(kfc.layers["2"].adapter), "pairs_rows", False)
    with kfc.capture():
        loss = F.cross_entropy(model(x), classes(4, count=3))
    kfc.update(loss)
    assert type(kfc.layers["2"].inverse) is EighInverse


@pytest.mark.parametrize("kind", ["cholesky", "eigh", "ekfac"])
def test_nothing_of_ours_is_cast_when_a_plain_loop_calls_us_under_autocast(kind: str) -> None:
    x, y, found = data(20, 6).float(), classes(20, count=3), []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        kfc = engine(model, inverse=kind)
        with torch.autocast("cpu", torch.bfloat16), kfc.capture():
            loss = F.cross_entropy(model(x).float(), y)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            kfc.update(loss)
        loss.backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            kfc.precondition(lr=0.1)
        found.append([kfc.layers["0"].G, model[0].weight.grad])
    for inside_value, outside_value in zip(*found, strict=True):
        assert torch.equal(inside_value, outside_value)


def test_a_layer_that_a_steps_loss_does_not_reach_keeps_its_eigenvalues() -> None:
    model = double(nn.Linear(3, 2), nn.Linear(3, 2))
    kfc = engine(model, inverse="ekfac", inverse_every_n_steps=4, warmup_steps=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = data(5, 3), classes(5, count=2)

    def loss(share: float) -> Tensor:
        other = F.cross_entropy(model[1](x), y)
        return F.cross_entropy(model[0](x), y) + (share * other if share else 0)

    train_step(kfc, optimizer, lambda: loss(1.0))
    before = [inverse_of(kfc, name) for name in ("0", "1")]
    train_step(kfc, optimizer, lambda: loss(0.0))
    after = [inverse_of(kfc, name) for name in ("0", "1")]
    assert after[0].weight > before[0].weight
    assert after[1].weight == before[1].weight
    assert torch.equal(after[1].values, before[1].values)
