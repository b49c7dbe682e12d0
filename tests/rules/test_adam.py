"""The rule "adam": Adam in the layers' eigenbasis, held against a slow version that keeps dense matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC
from lightning_kfc.curvature.gradients import gradients_of
from lightning_kfc.factors.inverses import BlockInverse, DiagonalInverse, EighInverse, Inverse
from lightning_kfc.rules.adam import LEARNING_RATE, Moments, adam_step, curvature_weights
from lightning_kfc.trust_region.outcome import Verdict
from lightning_kfc.trust_region.region import TrustRegion
from tests.curvature.test_state import Run
from tests.helpers.nets import classes, data, double, engine, small_conv_net, train_step

BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-5


class SlowAdam:
    """Adam with Nesterov's momentum, element by element, from the formulas."""

    def __init__(self) -> None:
        self.m: dict[tuple[int, int], float] = {}
        self.s: dict[tuple[int, int], float] = {}
        self.t = 0

    def step(self, gradient: Tensor) -> Tensor:
        self.t += 1
        ahead, size = torch.empty_like(gradient), torch.empty_like(gradient)
        for i in range(gradient.shape[0]):
            for j in range(gradient.shape[1]):
                g = float(gradient[i, j])
                m = self.m[i, j] = BETA1 * self.m.get((i, j), 0.0) + (1 - BETA1) * g
                s = self.s[i, j] = BETA2 * self.s.get((i, j), 0.0) + (1 - BETA2) * g * g
                ahead[i, j] = BETA1 * m / (1 - BETA1 ** (self.t + 1)) + (1 - BETA1) * g / (1 - BETA1**self.t)
                size[i, j] = math.sqrt(s / (1 - BETA2**self.t))
        return ahead / (size + EPSILON * float(size.mean()))


def slow_weights(A: Tensor, G: Tensor) -> Tensor:
    """w by two loops over eigenvalues."""
    pairs = [[float(g * a) for a in torch.linalg.eigvalsh(A)] for g in torch.linalg.eigvalsh(G)]
    values = torch.tensor(pairs, dtype=torch.float64)
    weights = (values + 0.01 * values.mean()) ** -0.25
    return weights / (weights**2).mean().sqrt()


def spd(d: int, seed: int) -> Tensor:
    root = data(d, d + 2, seed=seed)
    return root @ root.T


def inverse_of(A: Tensor, G: Tensor) -> EighInverse:
    return EighInverse.factorise({"A": A.unsqueeze(0), "G": G.unsqueeze(0)}, 0.1)


def run(gradients: list[Tensor], A: Tensor, G: Tensor, kl_clip: float | None = None, lr: float = 0.02) -> list[Any]:
    """Steps of one layer, with all that they bring."""
    inverse, moments, steps = inverse_of(A, G), None, []
    for gradient in gradients:
        step = adam_step([gradient.unsqueeze(0)], [moments], [inverse], [{"A": A[None], "G": G[None]}], [lr], kl_clip)
        moments = step.moments[0]
        steps.append(step)
    return steps


@given(d_out=st.integers(1, 4), d_in=st.integers(1, 5), count=st.integers(1, 4), seed=st.integers(0, 50))
def test_updates_are_those_of_the_slow_adam_in_the_eigenbasis(d_out: int, d_in: int, count: int, seed: int) -> None:
    A, G = spd(d_in, seed), spd(d_out, seed + 1)
    gradients = [data(d_out, d_in, seed=seed + 10 + i) for i in range(count)]
    Q_A, Q_G = torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1]
    slow = SlowAdam()
    for gradient, step in zip(gradients, run(gradients, A, G), strict=True):
        moved = slow.step(Q_G.T @ gradient @ Q_A) * slow_weights(A, G) * math.sqrt(200 / (d_in + d_out))
        expected = Q_G @ moved @ Q_A.T
        torch.testing.assert_close(step.tensors[0][0], expected, rtol=1e-8, atol=1e-8)
        length = 0.02**2 * float((expected * (G @ expected @ A)).sum())
        assert step.quadratic == pytest.approx(length, rel=1e-8)


@pytest.fixture
def without_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_kfc.factors.moments.EPSILON", 0.0)


@pytest.mark.usefixtures("without_epsilon")
def test_with_factors_that_are_multiples_of_the_identity_it_is_adam_up_to_the_width() -> None:
    d_out, d_in = 3, 4
    gradients = [data(d_out, d_in, seed=i) for i in range(5)]
    steps = run(gradients, 7 * torch.eye(d_in).double(), 0.3 * torch.eye(d_out).double())
    for step, expected in zip(steps, nadam(gradients), strict=True):
        torch.testing.assert_close(step.tensors[0][0], math.sqrt(200 / (d_out + d_in)) * expected, rtol=1e-9, atol=1e-9)


def nadam(gradients: list[Tensor]) -> list[Tensor]:
    """The steps of torch's Adam with Nesterov's momentum, at a learning rate of 1."""
    weight = nn.Parameter(torch.zeros_like(gradients[0]))
    # A large momentum_decay switches NAdam's own schedule of the momentum off.
    optimizer = torch.optim.NAdam([weight], lr=1.0, betas=(BETA1, BETA2), eps=1e-200, momentum_decay=1e6)
    moved = []
    # It keeps the product of its momenta in the default precision.
    torch.set_default_dtype(torch.float64)
    for gradient in gradients:
        before, weight.grad = weight.detach().clone(), gradient.clone()
        optimizer.step()
        moved.append(before - weight.detach())
    torch.set_default_dtype(torch.float32)
    return moved


@pytest.mark.usefixtures("without_epsilon")
def test_a_layer_with_a_diagonal_curvature_takes_adams_own_step_and_its_curvature_counts() -> None:
    gradients = [data(1, 4, seed=i) for i in range(4)]
    F_diagonal = data(1, 4, seed=9).square()
    inverse, moments = DiagonalInverse.factorise({"F": F_diagonal}, 0.1), None
    for gradient, expected in zip(gradients, nadam(gradients), strict=True):
        step = adam_step([gradient[None]], [moments], [inverse], [{"F": F_diagonal}], [0.1], None)
        moments = step.moments[0]
        torch.testing.assert_close(step.tensors[0][0], expected, rtol=1e-9, atol=1e-9)
        assert step.quadratic == pytest.approx(0.01 * float((F_diagonal * expected**2).sum()))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 50))
def test_updates_do_not_depend_on_the_coordinates_of_inputs_and_outputs(d_out: int, d_in: int, seed: int) -> None:
    A, G = spd(d_in, seed), spd(d_out, seed + 1)
    R, S = torch.linalg.qr(data(d_in, d_in, seed=seed + 2))[0], torch.linalg.qr(data(d_out, d_out, seed=seed + 3))[0]
    gradients = [data(d_out, d_in, seed=seed + 10 + i) for i in range(3)]
    turned = run([S @ g @ R.T for g in gradients], R @ A @ R.T, S @ G @ S.T)
    for one, other in zip(run(gradients, A, G), turned, strict=True):
        torch.testing.assert_close(S @ one.tensors[0][0] @ R.T, other.tensors[0][0], rtol=1e-6, atol=1e-8)


def test_a_basis_that_comes_back_with_other_signs_changes_nothing() -> None:
    A, G = spd(4, 1), spd(3, 2)
    plain = inverse_of(A, G)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    mixed = EighInverse(plain.A_vectors * signs, -plain.G_vectors, plain.values, 0.1)
    gradients = [data(3, 4, seed=20 + i) for i in range(4)]
    expected = run(gradients, A, G)[-1].tensors[0]
    moments: Moments | None = None
    for i, gradient in enumerate(gradients):
        old, new = (plain, mixed) if i % 2 else (mixed, plain)
        moments = moments.in_basis(old, new) if moments is not None else None
        step = adam_step([gradient[None]], [moments], [new], [{}], [0.02], None)
        moments = step.moments[0]
    torch.testing.assert_close(step.tensors[0], expected, rtol=1e-9, atol=1e-9)


def test_the_momentum_is_the_same_matrix_in_a_new_basis_and_second_moments_stay() -> None:
    old, new = inverse_of(spd(4, 1), spd(3, 2)), inverse_of(spd(4, 3), spd(3, 4))
    before = Moments.none(data(1, 3, 4)).updated(data(1, 3, 4, seed=5)).updated(data(1, 3, 4, seed=6))
    after = before.in_basis(old, new)
    torch.testing.assert_close(new.basis.back(after.momentum), old.basis.back(before.momentum))
    assert torch.equal(after.second_moment, before.second_moment)
    assert after.count == before.count == 2


def test_the_engine_rotates_the_momentum_where_it_refreshes_a_basis() -> None:
    model = small_conv_net()
    kfc, optimizer = engine(model, rule="adam", warmup_steps=0), torch.optim.SGD(model.parameters(), lr=0.02)
    train_step(kfc, optimizer, lambda: loss_of(model))
    layer = kfc.layers["0"]
    momentum, basis = layer.inverse.basis.back(layer.moments.momentum), layer.inverse.basis
    with kfc.capture():
        loss = loss_of(model, seed=5)
    kfc.update(loss)
    assert not basis.same_as(layer.inverse.basis)
    torch.testing.assert_close(layer.inverse.basis.back(layer.moments.momentum), momentum)


def test_a_clipped_step_has_the_squared_length_of_the_bound() -> None:
    A, G = spd(4, 1), spd(3, 2)
    (step,) = run([data(3, 4, seed=3)], A, G, kl_clip=1e-4, lr=0.5)
    assert step.clip < 1
    moved = 0.5 * step.tensors[0][0]
    assert float((moved * (G @ moved @ A)).sum()) == pytest.approx(1e-4)


@pytest.mark.parametrize("values", [torch.zeros(1, 3, 2), torch.full((1, 3, 2), 1e-38), torch.rand(2, 3, 2) * 1e30])
def test_weights_are_finite_and_of_mean_square_one_whatever_the_eigenvalues(values: Tensor) -> None:
    weights = curvature_weights(values)
    torch.testing.assert_close(weights.square().mean((-1, -2)), torch.ones(len(values)))


@pytest.mark.parametrize("size", [1e18, 1e25, 1e38])
def test_gradients_whose_squares_overflow_neither_freeze_a_layer_nor_blow_it_up(size: float) -> None:
    A, G = torch.eye(4)[None], torch.eye(3)[None]
    inverse, moments = EighInverse.factorise({"A": A, "G": G}, 0.1), None
    for scale in (1.0, size, *[1.0] * 400):
        step = adam_step([data(1, 3, 4, seed=1).float() * scale], [moments], [inverse], [{}], [0.02], None)
        moments = step.moments[0]
        assert not step.failed
        assert float(step.tensors[0].abs().max()) < 100
    # The memory of the one large square fades.
    assert float(moments.second_moment.max()) < 1e-8 * min(size, 1e18) ** 2
    assert bool(torch.isfinite(moments.second_moment).all())


def test_an_update_that_is_not_finite_moves_nothing_and_is_not_remembered() -> None:
    good, bad = inverse_of(spd(4, 1), spd(3, 2)), inverse_of(spd(4, 1), spd(3, 2))
    bad = EighInverse(bad.A_vectors, bad.G_vectors * math.nan, bad.values, 0.1)
    first = adam_step([data(1, 3, 4)] * 2, [None, None], [good, good], [{}, {}], [0.1] * 2, None)
    step = adam_step([data(1, 3, 4)] * 2, first.moments, [good, bad], [{}, {}], [0.1] * 2, None)
    assert step.failed == (1,)
    assert not step.tensors[1].any()
    assert step.moments[1] is first.moments[1]
    assert math.isfinite(step.quadratic)
    assert step.tensors[0].any()


@given(
    shapes=st.lists(st.tuples(st.integers(1, 2), st.integers(2, 3), st.integers(2, 3)), min_size=1, max_size=6),
    kinds=st.lists(st.sampled_from(["eigenbasis", "block", "embedding"]), min_size=6, max_size=6),
    steps=st.lists(st.integers(0, 1), min_size=6, max_size=6),
    largest=st.sampled_from([0, 9, 100]),
)
def test_layers_together_step_as_each_alone_whichever_are_stacked(
    shapes: list[tuple[int, int, int]], kinds: list[str], steps: list[int], largest: int
) -> None:
    gradients = [data(*shape, seed=i) for i, shape in enumerate(shapes)]
    curvatures = [curvature_of(kind, shape) for kind, shape in zip(kinds, shapes, strict=False)]
    inverses = [inverse_type(curvature).factorise(curvature, 0.1) for curvature in curvatures]
    moments = [
        Moments.none(gradient).updated(2 * gradient) if made else None
        for gradient, made in zip(gradients, steps, strict=False)
    ]
    rates = [0.1 * (i + 1) for i in range(len(shapes))]
    with mock.patch("lightning_kfc.rules.adam.LARGEST_STACKED", largest):
        together = adam_step(gradients, moments, inverses, curvatures, rates, None)
    columns = zip(gradients, moments, inverses, curvatures, rates, strict=True)
    alone = [adam_step(*([value] for value in column), None) for column in columns]
    for update, own, step in zip(together.tensors, together.moments, alone, strict=True):
        torch.testing.assert_close(update, step.tensors[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(own.momentum, step.moments[0].momentum, rtol=0, atol=1e-14)
        torch.testing.assert_close(own.second_moment, step.moments[0].second_moment, rtol=0, atol=1e-14)
        assert own.count == step.moments[0].count
    assert together.quadratic == pytest.approx(sum(step.quadratic for step in alone), rel=1e-10)
    slope = sum(rate * float((u * g).sum()) for rate, u, g in zip(rates, together.tensors, gradients, strict=True))
    assert together.slope == pytest.approx(slope, rel=1e-9, abs=1e-12)


def curvature_of(kind: str, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """The factors of a layer of a kind."""
    groups, d_out, d_in = shape
    if kind == "block":
        return {"F": torch.stack([spd(d_out * d_in, seed) for seed in range(groups)])}
    A = torch.stack([spd(d_in, seed) for seed in range(groups)])
    diagonal = kind == "embedding"
    return {
        "A": A.diagonal(dim1=-2, dim2=-1) if diagonal else A,
        "G": torch.stack([spd(d_out, seed + 9) for seed in range(groups)]),
    }


def inverse_type(curvature: Mapping[str, Tensor]) -> type[Inverse]:
    return BlockInverse if "F" in curvature else EighInverse


# In the engine.


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    return F.cross_entropy(model(data(6, 2, 6, 6, seed=seed)), classes(6, count=3, seed=seed))


def test_the_engine_s_step_has_the_length_of_the_bound_by_its_own_factors() -> None:
    model = double(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(48, 3))
    kfc = engine(model, rule="adam", kl_clip=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    train_step(kfc, torch.optim.SGD(model.parameters(), lr=0.5), lambda: loss_of(model))
    for parameter, value in zip(model.parameters(), before, strict=True):
        parameter.grad = parameter.detach() - value
    length = sum(
        layer.quadratic(layer.adapter.matrix(gradients_of(layer.trained_parameters()))) for layer in kfc.layers.values()
    )
    assert length == pytest.approx(1e-3)
    assert {name for name, layer in kfc.layers.items() if isinstance(layer.inverse, EighInverse)} == {"0", "3"}
    assert all(layer.moments is not None for layer in kfc.layers.values())


def test_a_loss_scale_changes_neither_moments_nor_the_unscaled_update() -> None:
    found = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = small_conv_net()
        kfc = engine(model, rule="adam")
        with kfc.capture():
            loss = loss_of(model)
        kfc.update(loss * scale, loss_scale=scale)
        (loss * scale).backward()
        kfc.precondition(lr=0.02, loss_scale=scale)
        layer = kfc.layers["0"]
        found.append((layer.moments.momentum, layer.moments.second_moment, model[0].weight.grad / scale))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_that_are_not_finite_leave_the_moments() -> None:
    model = small_conv_net()
    kfc, optimizer = engine(model, rule="adam"), torch.optim.SGD(model.parameters(), lr=0.02)
    train_step(kfc, optimizer, lambda: loss_of(model))
    moments = {name: layer.moments for name, layer in kfc.layers.items()}
    optimizer.zero_grad()
    with kfc.capture():
        loss = loss_of(model)
    kfc.update(loss, accumulate=True)
    loss.backward()
    model[0].weight.grad[0] = math.nan
    assert not kfc.precondition(optimizer=optimizer)
    assert all(layer.moments is moments[name] for name, layer in kfc.layers.items())


@pytest.mark.usefixtures("without_epsilon")
@pytest.mark.parametrize("sparse", [False, True])
def test_an_embedding_takes_adams_own_step(sparse: bool) -> None:
    torch.manual_seed(0)
    model = double(nn.Embedding(7, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))
    tokens = torch.tensor([[0, 1], [2, 3], [3, 5]])
    kfc, optimizer = engine(model, rule="adam"), torch.optim.SGD(model.parameters(), lr=0.02)
    gradients, updates = [], []
    for _ in range(3):
        optimizer.zero_grad()
        with kfc.capture():
            loss = F.cross_entropy(model(tokens), torch.tensor([0, 1, 2]))
        kfc.update(loss)
        loss.backward()
        gradients.append(model[0].weight.grad.to_dense().clone())
        kfc.precondition(optimizer=optimizer)
        updates.append(model[0].weight.grad.to_dense().clone())
        optimizer.step()
    for found, expected in zip(updates, nadam(gradients), strict=True):
        torch.testing.assert_close(found, LEARNING_RATE * expected, rtol=1e-9, atol=1e-9)


def test_moments_start_anew_where_a_parameter_is_frozen() -> None:
    model = small_conv_net()
    kfc, optimizer = engine(model, rule="adam"), torch.optim.SGD(model.parameters(), lr=0.02)
    train_step(kfc, optimizer, lambda: loss_of(model))
    model[0].bias.requires_grad_(False)
    for _ in range(2):
        train_step(kfc, optimizer, lambda: loss_of(model))
    assert (kfc.layers["0"].moments.count, kfc.layers["2"].moments.count) == (2, 3)
    assert kfc.layers["0"].moments.momentum.shape == (1, 3, 18)


def test_it_descends_with_the_recommended_partner() -> None:
    torch.manual_seed(0)
    model = small_conv_net().float()
    kfc = KFC(model, rule="adam", damping="auto", kl_clip="auto")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    x, target = data(32, 2, 6, 6, seed=1).float(), classes(32, count=3)
    losses = []
    for _ in range(40):
        losses.append(float(train_step(kfc, optimizer, lambda: F.cross_entropy(model(x), target))))
        kfc.review(optimizer=optimizer)
    assert losses[-1] < 0.05 * losses[0]


def test_a_step_that_is_taken_back_takes_the_momentum_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_conv_net()
    kfc, optimizer = engine(model, rule="adam", kl_clip="auto"), torch.optim.SGD(model.parameters(), lr=0.02)
    for undo in (False, True):
        monkeypatch.setattr(
            TrustRegion,
            "judge",
            lambda self, found, size, undo=undo: Verdict(1.0, undo, False, kept_share=float(not undo)),
        )
        before = [p.detach().clone() for p in model.parameters()]
        train_step(kfc, optimizer, lambda: loss_of(model))
        kfc.review(optimizer=optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for layer in kfc.layers.values():
        assert not layer.moments.momentum.any()
        assert layer.moments.second_moment.any()
        assert layer.moments.count == 2


def test_the_model_that_a_review_holds_a_step_against_has_no_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    judge = TrustRegion.judge
    monkeypatch.setattr(TrustRegion, "judge", lambda self, o, size: (seen.append(o), judge(self, o, size))[1])
    for rule in ("natural", "adam"):
        model = small_conv_net()
        kfc, optimizer = engine(model, rule=rule, kl_clip="auto"), torch.optim.SGD(model.parameters(), lr=0.02)
        train_step(kfc, optimizer, lambda model=model: loss_of(model))
        kfc.review(optimizer=optimizer)
    assert seen[0].penalty > 0
    assert seen[1].penalty == 0
    assert seen[1].curvature > 0


# State.


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 1, 4, 7, 9, 10])
def test_a_run_resumed_at_any_step_ends_with_the_same_bits(at: int) -> None:
    whole, first, second = (Run(seed=seed, rule="adam") for seed in (0, 0, 1))
    whole.train(14)
    first.train(at)
    assert second.load(first.save()) == []
    second.train(14)
    for one, two in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)
    for name, layer in whole.kfc.layers.items():
        assert layer.moments.count == second.kfc.layers[name].moments.count == 14
        assert torch.equal(layer.moments.second_moment, second.kfc.layers[name].moments.second_moment)


@pytest.mark.parametrize(("one", "other"), [("natural", "adam"), ("adam", "natural")])
def test_a_run_goes_on_by_the_other_rule_with_the_factors_it_has(one: str, other: str) -> None:
    first, second = Run(rule=one, inverse="eigh"), Run(seed=1, rule=other, inverse="eigh")
    first.train(6)
    assert second.load(first.save()) == []
    assert all(torch.equal(layer.A, second.kfc.layers[name].A) for name, layer in first.kfc.layers.items())
    assert all(layer.moments is None for layer in second.kfc.layers.values())
    second.train(8)
    assert all((layer.moments is not None) == (other == "adam") for layer in second.kfc.layers.values())


def test_the_stated_memory_is_that_of_the_state() -> None:
    model = small_conv_net()
    kfc = engine(model, rule="adam")
    stated = sum(row.bytes for row in kfc.coverage())
    train_step(kfc, torch.optim.SGD(model.parameters(), lr=0.02), lambda: loss_of(model))
    held = [
        value
        for layer in kfc.state_dict()["layers"].values()
        for value in (
            *layer["inverse"].values(),
            *layer["moments"].values(),
            *(f["triangle"] for f in layer["factors"].values()),
        )
    ]
    assert stated == sum(row.bytes for row in kfc.coverage())
    assert stated == sum(value.nbytes for value in held if isinstance(value, Tensor))


# Settings.


def test_it_implies_the_eigenbasis_and_refuses_what_it_cannot_use() -> None:
    model = nn.Linear(2, 2)
    assert KFC(model, rule="adam").settings.inverse == "eigh"
    assert KFC(model, rule="adam").settings.placement == "comm-opt"
    with pytest.raises(ValueError, match="does not work with inverse='ekfac'"):
        KFC(model, rule="adam", inverse="ekfac")
    with pytest.raises(ValueError, match=r"rule='adam' needs the eigenbases .* placement='mem-opt'"):
        KFC(model, rule="adam", placement="mem-opt")
