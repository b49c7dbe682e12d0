"""Modules called several times, parameters shared or re-parametrised, frozen or unfrozen: exact, or listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from lightning_kfc import KFC, RefreshTiming
from tests.helpers import oracles
from tests.helpers.nets import classes, data, engine, observe, train_step
from tests.layers.rows import curved, dense_fisher, rebuilt_gradient


def treatments(kfc: KFC) -> dict[str, str]:
    return {row.parameter: row.treatment for row in kfc.coverage()}


def reasons(kfc: KFC) -> dict[str, str]:
    return {row.parameter: row.reason for row in kfc.coverage()}


# A module called several times.


def test_a_siamese_module_has_the_factors_of_one_call_on_both_sides_together() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    left, right, y = data(5, 3), data(4, 3, seed=2), data(9, 2, seed=3)

    def both() -> Tensor:
        return F.mse_loss(model(left), y[:5], reduction="sum") + F.mse_loss(model(right), y[5:], reduction="sum")

    def together() -> Tensor:
        return F.mse_loss(model(torch.cat([left, right])), y, reduction="sum")

    twice, once = observe(model, both), observe(model, together)
    for name in ("0", "2"):
        oracles.assert_equal(twice.layers[name].A, once.layers[name].A, what=f"A of {name}")
        oracles.assert_equal(twice.layers[name].G, once.layers[name].G, what=f"G of {name}")


class Recurrent(nn.Module):
    """A Linear applied to its own output, again and again."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.step, self.steps = nn.Linear(3, 3), steps

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = self.step(x).tanh()
        return x


@pytest.mark.parametrize("steps", [1, 4])
def test_rows_of_every_call_of_a_recurrent_loop_rebuild_the_gradient(steps: int) -> None:
    model = Recurrent(steps).double()
    x = data(2, 3)
    parameters = list(model.parameters())
    expected = oracles.joint_matrix(*torch.autograd.grad(curved(model(x)), parameters))
    found = rebuilt_gradient(engine(model), "step", lambda: curved(model(x)))
    oracles.assert_equal(found, expected, what="gradient")


# A parameter of several modules.


class TiedModel(nn.Module):
    """An embedding and an output head with one weight."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(5, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=bias)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.words(x)).tanh())


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_embedding_and_head_have_the_exact_diagonal_of_both_uses(bias: bool) -> None:
    model = TiedModel(bias=bias).double()
    x, y = classes(1, count=5), classes(1, count=5, seed=3)
    kfc = observe(model, lambda: F.cross_entropy(model(x), y))
    assert treatments(kfc)["words.weight"] == "diagonal"
    assert reasons(kfc)["words.weight"] == "shared with a module that uses it otherwise"
    assert treatments(kfc)["body.weight"] == "kfc"
    expected = dense_fisher(
        model, lambda: model(x), lambda z: F.cross_entropy(z, y), lambda tensors: tensors["words.weight"].reshape(1, -1)
    )
    oracles.assert_equal(kfc.layers["words.weight"].factor("F"), expected.diagonal(), what="diagonal")


def test_modules_that_share_a_weight_but_not_their_biases_are_listed_and_train() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    model[2].weight = model[0].weight
    kfc = engine(model, fisher="mc", kl_clip=0.03)
    found = reasons(kfc)
    assert found["0.weight"] == "shared with a module that uses it otherwise"
    assert found["0.bias"] == found["2.bias"] == "its module's other parameters are shared"
    x, y = torch.randn(16, 3), classes(16, count=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = [train_step(kfc, optimizer, lambda: F.cross_entropy(model(x), y)) for _ in range(20)]
    assert losses[-1] < 0.95 * losses[0]


def test_modules_that_share_all_their_parameters_are_one_layer_with_the_rows_of_both() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    x = data(4, 3)
    kfc = engine(model)
    assert list(kfc.layers) == ["0"]
    expected = oracles.joint_matrix(*torch.autograd.grad(curved(model(x)), list(model.parameters())))
    oracles.assert_equal(rebuilt_gradient(kfc, "0", lambda: curved(model(x))), expected, what="gradient")


# A weight computed from other parameters.


class Symmetric(nn.Module):
    """A user's own parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


REPARAMETRISATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of old": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm of old": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda module: parametrize.register_parametrization(module, "weight", Symmetric()),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("which", REPARAMETRISATIONS)
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.Conv2d(4, 4, 2)], ids=["linear", "conv"])
def test_a_re_parametrised_weight_is_listed_with_the_exact_diagonal_and_trains(make: Any, which: str) -> None:
    layer = make()
    if which in ("own", "orthogonal") and isinstance(layer, nn.Conv2d):
        layer = nn.Linear(4, 4, bias=False)
    REPARAMETRISATIONS[which](layer)
    shape = (4, 2, 2) if isinstance(layer, nn.Conv2d) else (4,)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)).double()
    x, y = data(8, *shape), classes(8, count=3)
    model.eval()  # spectral norm's power iteration changes its weight at every forward otherwise
    kfc = observe(model, lambda: F.cross_entropy(model(x[:1]), y[:1]))
    own = [name for name, _ in model.named_parameters() if name.startswith("0.")]
    assert own
    for name in own:
        assert treatments(kfc)[name] == "diagonal"
        assert "re-parametrised" in reasons(kfc)[name]
        expected = dense_fisher(
            model,
            lambda: model(x[:1]),
            lambda z: F.cross_entropy(z, y[:1]),
            lambda tensors, name=name: tensors[name].reshape(1, -1),
        )
        oracles.assert_equal(kfc.layers[name].factor("F"), expected.diagonal(), rtol=1e-8, what=name)
    model.train()
    kfc = engine(model, fisher="mc", kl_clip=0.03)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = [train_step(kfc, optimizer, lambda: F.cross_entropy(model(x), y)) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


# Frozen and unfrozen.


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 2), (4, 3)),
        (nn.Conv2d(1, 2, 2), (2, 1, 3, 3)),
        (nn.Bilinear(3, 3, 2), (4, 3)),
    ],
    ids=["linear", "conv", "bilinear"],
)
def test_rows_of_a_half_frozen_layer_rebuild_the_gradient_of_the_rest(
    layer: nn.Module, shape: tuple[int, ...], frozen: str
) -> None:
    layer = layer.double().requires_grad_(True)
    layer.get_parameter(frozen).requires_grad_(False)
    model = nn.ModuleDict({"layer": layer})
    x = data(*shape)
    inputs = (x, x.flip(0)) if isinstance(layer, nn.Bilinear) else (x,)

    def loss() -> Tensor:
        return curved(layer(*inputs))

    (gradient,) = torch.autograd.grad(loss(), [p for p in layer.parameters() if p.requires_grad])
    expected = oracles.joint_matrix(*((None, gradient) if frozen == "weight" else (gradient, None)))
    kfc = engine(model)
    oracles.assert_equal(rebuilt_gradient(kfc, "layer", loss), expected, what="gradient")
    assert sorted(treatments(kfc).values()) == ["frozen", "kfc"]


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"])
def test_a_half_frozen_attention_passes_the_self_test_and_keeps_what_is_frozen(frozen: str) -> None:
    model = nn.MultiheadAttention(4, 2)
    model.get_parameter(frozen).requires_grad_(False)
    before = model.get_parameter(frozen).clone()
    x, y = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    kfc = engine(model, fisher="mc", kl_clip=0.03)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = [train_step(kfc, optimizer, lambda: F.mse_loss(model(x, x, x)[0], y)) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert torch.equal(model.get_parameter(frozen), before)
    assert treatments(kfc)[frozen] == "frozen"


def test_a_bias_unfrozen_midway_restarts_its_layer_with_the_factors_of_both() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].bias.requires_grad_(False)
    x, y = data(6, 3), classes(6, count=2)
    kfc = engine(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    for _ in range(2):
        train_step(kfc, optimizer, loss)
    assert kfc.layers["0"].A.shape == (3, 3)
    model[0].bias.requires_grad_(True)
    before = kfc.layers["2"].A
    train_step(kfc, optimizer, loss)
    assert kfc.events.restarted_layers == 1
    rows = oracles.linear_rows(x, bias=True)
    oracles.assert_equal(kfc.layers["0"].A, rows.T @ rows / 6, what="A")
    assert kfc.layers["2"].A.shape == before.shape
    assert model[0].bias.grad is not None


@pytest.mark.parametrize("whole", [False, True], ids=["its bias", "all of it"])
def test_parameters_unfrozen_between_due_steps_train_and_are_covered_from_the_next_one(whole: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    frozen = model[0] if whole else model[0].bias
    frozen.requires_grad_(False)
    x, y = torch.randn(16, 3), classes(16, count=2)
    rarely = {
        "factor_every_n_steps": 5,
        "inverse_every_n_steps": 10,
        "warmup_steps": 2,
        "timing": RefreshTiming(stagger_inverses=False),
    }
    kfc = engine(model, fisher="mc", kl_clip=0.03, **rarely)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model[0].weight.clone()
    for step in range(21):
        if step == 7:
            frozen.requires_grad_(True)
        train_step(kfc, optimizer, lambda: F.cross_entropy(model(x), y))
        if step == 6:
            assert torch.equal(model[0].weight, weight) == whole
    assert kfc.layers["0"].A.shape == (4, 4)
    assert kfc.layers["0"].inverse is not None
    assert kfc.events.restarted_layers == (0 if whole else 1)
    assert kfc.last_step is not None
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    gradient = oracles.joint_matrix(model[0].weight.grad, model[0].bias.grad).clone()
    kfc.precondition(lr=1e-6)
    update = oracles.joint_matrix(model[0].weight.grad, model[0].bias.grad)
    A, G = oracles.pi_damped(kfc.layers["0"].A, kfc.layers["0"].G, 1e-2)
    oracles.assert_equal(update, oracles.dense_solve(A, G, gradient), rtol=1e-3, what="update")
