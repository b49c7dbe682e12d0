"""The self-test: rows that do not explain a layer's gradient stop the first step, and no later one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC, SelfTestError, register_adapter
from lightning_kfc.layers import Adapter, Forward
from tests.helpers import oracles
from tests.helpers.nets import classes, data, double, engine, kronecker_layers, observe, train_step

TARGET = classes(4, count=3)


class Twice(nn.Module):
    """Uses its layer's weight once as a module and once as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh() + F.linear(x, self.first.weight)
        return self.head(h)


class TwiceLater(nn.Module):
    """Uses its layer's weight in a functional call too, on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)
        self.twice = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.head(h + F.linear(x, self.first.weight) if self.twice else h)


class Unseen(nn.Module):
    """Uses a layer's weight without ever calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.first.weight, self.first.bias).tanh())


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_weight_also_used_outside_its_module_gets_a_diagonal_which_is_reported_once(fisher: str) -> None:
    model = Twice().double()
    kfc, optimizer = engine(model, fisher=fisher), torch.optim.SGD(model.parameters(), lr=0.1)

    def loss() -> Tensor:
        return F.cross_entropy(model(data(4, 3)), TARGET)

    with pytest.warns(UserWarning, match=r"'first': its rows do not rebuild.*also used otherwise.*`exclude`") as said:
        first = float(train_step(kfc, optimizer, loss))
    assert len(said) == 1
    assert kronecker_layers(kfc) == ["head"]
    last = [float(train_step(kfc, optimizer, loss)) for _ in range(8)][-1]
    assert last < first
    assert {row.treatment for row in kfc.coverage()} == {"kfc", "diagonal"}


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_use_outside_its_module_that_begins_later_is_noticed_then(fisher: str) -> None:
    model = TwiceLater().double()
    kfc, optimizer = engine(model, fisher=fisher), torch.optim.SGD(model.parameters(), lr=0.1)

    def steps(number: int) -> None:
        for _ in range(number):
            train_step(kfc, optimizer, lambda: F.cross_entropy(model(data(4, 3)), TARGET))

    steps(3)
    assert kronecker_layers(kfc) == ["first", "head"]
    model.twice = True
    with pytest.warns(UserWarning, match=r"'first': its rows do not rebuild.*also used otherwise.*`exclude`") as said:
        steps(3)
    assert len(said) == 1
    assert kronecker_layers(kfc) == ["head"]
    assert kfc.layers["first.weight"].inverse is not None


def penalised(model: TwiceLater) -> Tensor:
    out = model(data(4, 3))
    return F.cross_entropy(out, TARGET) + 0.1 * model.first.weight.square().sum() * out.detach().square().mean()


def scaled_by_its_norm(model: TwiceLater) -> Tensor:
    return F.cross_entropy(model(data(4, 3)) / model.head.weight.detach().norm(), TARGET)


@pytest.mark.parametrize("later", [penalised, scaled_by_its_norm])
def test_a_penalty_that_begins_later_is_no_use_outside_a_module(later: Callable[[TwiceLater], Tensor]) -> None:
    model = TwiceLater().double()
    kfc, optimizer = engine(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for loss in [lambda model: F.cross_entropy(model(data(4, 3)), TARGET)] * 3 + [later] * 4:
        train_step(kfc, optimizer, lambda loss=loss: loss(model))
    assert kronecker_layers(kfc) == ["first", "head"]


def test_a_layer_that_is_excluded_as_the_warning_advises_is_no_warning() -> None:
    model = Twice().double()
    kfc = observe(model, lambda: F.cross_entropy(model(data(4, 3)), TARGET), exclude=["first"])
    assert kronecker_layers(kfc) == ["head"]


def test_a_weight_used_without_calling_its_module_has_no_rows_which_is_reported_once_and_listed() -> None:
    model = Unseen().double()
    kfc = engine(model)
    for step in range(2):
        with kfc.capture():
            loss = F.cross_entropy(model(data(4, 3)), TARGET)
        if step == 0:
            with pytest.warns(UserWarning, match="'first': its weight is used without calling the module") as seen:
                kfc.update(loss)
            assert len(seen) == 1
            assert "`exclude`" in str(seen[0].message)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                kfc.update(loss)
        model.zero_grad()
        loss.backward()
        kfc.precondition(lr=0.1)
    assert kronecker_layers(kfc) == ["head"]
    reasons = {row.parameter: (row.treatment == "kfc", row.reason) for row in kfc.coverage()}
    assert reasons["first.weight"] == (False, "its weight is used without calling the module")
    assert reasons["head.weight"] == (True, "")
    assert "its weight is used without calling the module" in str(kfc.coverage())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # from torch.func.jvp
@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[0]])
def test_calls_inside_a_transform_are_the_reason_and_not_uses_without_a_call(transform: Any) -> None:
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "head": nn.Linear(3, 3)}).double()
    reason = "it is called inside a torch.func transform, whose calls cannot be recorded"
    with pytest.warns(UserWarning, match=f"'first': {reason}"):
        kfc = observe(model, lambda: F.cross_entropy(model["head"](transform(model["first"])(data(4, 3))), TARGET))
    assert {row.reason for row in kfc.coverage() if row.module == "first"} == {reason}
    assert kronecker_layers(kfc) == ["head"]


class Scaled(nn.Linear):
    """A Linear whose forward is not a Linear's."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_its_base() -> None:
    model = double(Scaled(3, 3), nn.Linear(3, 3))
    kfc = observe(model, lambda: F.cross_entropy(model(data(4, 3)), TARGET))
    assert kronecker_layers(kfc) == ["1"]
    assert kfc.coverage()[0].reason == "no adapter for Scaled"


class WronglyAdapted(Scaled):
    """Served by an adapter that forgets the factor 3."""


@register_adapter(WronglyAdapted)
class _ForgetsTheFactor(Adapter):
    kind = "Wrong"

    def weight_input_rows(self, forward: Forward) -> Tensor:
        return forward.first().reshape(-1, 1, 1, 3)

    def output_rows(self, output_gradient: Tensor) -> Tensor:
        return output_gradient.reshape(-1, 1, 1, 3)


class RightlyAdapted(Scaled):
    """A layer whose adapter includes the factor 3."""


@register_adapter(RightlyAdapted)
class _KnowsTheFactor(_ForgetsTheFactor):
    kind = "Right"

    def output_rows(self, output_gradient: Tensor) -> Tensor:
        return 3 * super().output_rows(output_gradient)


def test_an_adapter_with_wrong_rows_is_an_error_naming_the_layer_and_its_kind() -> None:
    model = double(nn.Linear(3, 3), nn.Tanh(), WronglyAdapted(3, 3))
    with pytest.raises(SelfTestError, match=r"'2' \(Wrong\).*relative error"):
        observe(model, lambda: F.cross_entropy(model(data(4, 3)), TARGET))


def test_an_adapter_with_right_rows_is_none() -> None:
    model = double(nn.Linear(3, 3), nn.Tanh(), RightlyAdapted(3, 3))
    kfc = observe(model, lambda: F.cross_entropy(model(data(1, 3)), TARGET[:1]))
    expected = oracles.dense_fisher(model, data(1, 3), lambda z: F.cross_entropy(z, TARGET[:1]), "2")
    layer = kfc.layers["2"]
    oracles.assert_equal(oracles.kron(layer.A, layer.G), expected, what="A⊗G")


# Where a test of zeros, or of a part, would let an error through.


def test_an_ignored_first_position_does_not_hide_an_error() -> None:
    class PerPosition(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrong = WronglyAdaptedSequence(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.wrong(x).transpose(1, 2)

    model = PerPosition().double()
    target = classes(4, 2, count=3)
    target[:, 0] = -100
    with pytest.raises(SelfTestError, match="'wrong'"):
        observe(model, lambda: F.cross_entropy(model(data(4, 2, 3)), target), fisher="exact")


class WronglyAdaptedSequence(Scaled):
    """As :class:`WronglyAdapted`, on (N, S, d)."""


@register_adapter(WronglyAdaptedSequence)
class _ForgetsTheFactorOfSequences(Adapter):
    kind = "Wrong"

    def weight_input_rows(self, forward: Forward) -> Tensor:
        return forward.first().unsqueeze(2)

    def output_rows(self, output_gradient: Tensor) -> Tensor:
        return output_gradient.unsqueeze(2)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_layer_that_only_a_second_loss_term_reaches_is_tested_too(fisher: str) -> None:
    model = nn.ModuleDict({"main": nn.Linear(3, 3), "auxiliary": WronglyAdapted(3, 3)}).double()
    x = data(4, 3)

    def loss() -> Tensor:
        return F.cross_entropy(model["main"](x), TARGET) + 0.4 * F.cross_entropy(model["auxiliary"](x), TARGET)

    with pytest.raises(SelfTestError, match="'auxiliary'"):
        observe(model, loss, fisher=fisher)


def test_a_layer_that_only_a_later_loss_of_the_step_reaches_is_tested_too() -> None:
    # Two losses with a backward each, as a GAN's.
    model = nn.ModuleDict({"main": nn.Linear(3, 3), "other": WronglyAdapted(3, 3)}).double()
    x = data(4, 3)
    kfc = engine(model)
    with kfc.capture():
        first = F.cross_entropy(model["main"](x), TARGET)
        second = F.cross_entropy(model["other"](x), TARGET)
    kfc.update(first, accumulate=True)
    first.backward()
    with pytest.raises(SelfTestError, match="'other'"):
        kfc.update(second)


def test_a_layer_that_first_takes_part_at_a_later_step_is_tested_then_and_gets_a_diagonal() -> None:
    model = nn.ModuleDict({"main": nn.Linear(3, 3), "other": WronglyAdapted(3, 3)}).double()
    x = data(4, 3)
    kfc = engine(model)
    with kfc.capture():
        loss = F.cross_entropy(model["main"](x), TARGET)
    kfc.update(loss)
    kfc.precondition(lr=0.1)
    with kfc.capture():
        loss = F.cross_entropy(model["other"](x), TARGET)
    with pytest.warns(UserWarning, match=r"for 'other': its rows do not rebuild its gradient") as said:
        kfc.update(loss)
    assert len(said) == 1
    assert kronecker_layers(kfc) == ["main"]
    # The diagonal has statistics from the next step on.
    kfc.precondition(lr=0.1)
    with kfc.capture():
        loss = F.cross_entropy(model["other"](x), TARGET)
    kfc.update(loss)
    assert {row.parameter: row.treatment for row in kfc.coverage()}["other.weight"] == "diagonal"


# What must not fail it.


def fine(model: nn.Module, loss: Callable[[], Tensor]) -> KFC:
    """Two steps without a warning."""
    kfc = engine(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with kfc.capture():
                value = loss()
            kfc.update(value)
            kfc.precondition(lr=0.1)
    return kfc


def test_a_user_s_hook_that_changes_the_output_and_came_first_leaves_the_rows_exact() -> None:
    plain = double(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    x = data(1, 3)
    # The same function, written without a hook, is the oracle.
    expected = oracles.dense_fisher(plain, x, lambda z: F.cross_entropy(5 * z, TARGET[:1]), "2")
    plain[2].register_forward_hook(lambda module, args, output: 5 * output)
    kfc = fine(plain, lambda: F.cross_entropy(plain(x), TARGET[:1]))
    layer = kfc.layers["2"]
    oracles.assert_equal(oracles.kron(layer.A, layer.G), expected, what="A⊗G")


def test_a_user_s_hook_that_changes_the_input_is_seen() -> None:
    model = double(nn.Linear(3, 3))
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    x = data(4, 3)
    kfc = fine(model, lambda: F.cross_entropy(model(x), TARGET))
    rows = oracles.linear_rows(2 * x, bias=True)
    oracles.assert_equal(kfc.layers["0"].A, rows.T @ rows / 4, what="A")


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)], ids=["matrix", "view"])
def test_in_place_operations_on_a_layer_s_output_are_none(shape: tuple[int, ...]) -> None:
    model = double(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    x = data(*shape)
    kfc = fine(model, lambda: F.mse_loss(model(x), torch.zeros(*shape).double()))
    hidden = model[0](x).detach()
    # Exactly: each output's derivative passes where the unit is on.
    rows = hidden.reshape(-1, 5)
    count = shape[0] if len(shape) == 2 else shape[0] * shape[1]
    H = 2 / (3 * count) * model[2].weight.detach().T @ model[2].weight.detach()
    expected = sum(torch.outer(on, on) * H for on in (rows > 0).double())
    oracles.assert_equal(kfc.layers["0"].G, expected, what="G")


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast", "float16 autocast", "bfloat16"])
def test_rounding_is_none_in_any_precision(precision: str) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(54, 3),
        )
        x, target = data(8, 3, 5, 5, seed=seed).float(), classes(8, count=3, seed=seed)
        if precision == "bfloat16":
            model, x = model.bfloat16(), x.bfloat16()
        kind, _, autocast = precision.partition(" ")
        kfc = engine(model, fisher="mc", seed=seed)
        with kfc.capture(), torch.autocast("cpu", getattr(torch, kind), enabled=bool(autocast)):
            loss = F.cross_entropy(model(x), target)
        kfc.update(loss)
        assert set(kronecker_layers(kfc)) >= {"0", "3", "6"}
        assert kfc.layers["0"].A.dtype == torch.float32


def test_a_penalty_on_the_weights_in_the_loss_is_none() -> None:
    model = double(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    x = data(4, 3)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), TARGET) + 0.1 * sum(p.square().sum() for p in model.parameters())

    kfc = fine(model, loss)
    without = fine(model, lambda: F.cross_entropy(model(x), TARGET))
    for name in kfc.layers:
        oracles.assert_equal(kfc.layers[name].G, without.layers[name].G, what=f"G of {name}")


def test_dead_units_unused_layers_and_detached_branches_are_none() -> None:
    model = nn.ModuleDict(
        {"dead": nn.Linear(3, 3), "unused": nn.Linear(3, 3), "detached": nn.Linear(3, 3), "head": nn.Linear(3, 3)}
    ).double()
    nn.init.constant_(model["dead"].bias, -1e3)
    x = data(4, 3)

    def loss() -> Tensor:
        h = model["dead"](x).relu() + model["detached"](x).detach()
        return F.cross_entropy(model["head"](h), TARGET)

    kfc = fine(model, loss)
    assert set(kronecker_layers(kfc)) == {"dead", "unused", "detached", "head"}
    assert not bool(kfc.layers["dead"].G.any())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "reparametrise",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
    ],
    ids=["weight_norm", "spectral_norm", "parametrized weight_norm", "parametrized spectral_norm", "orthogonal"],
)
def test_a_reparametrised_weight_is_listed_with_its_reason(reparametrise: Callable[[nn.Module], nn.Module]) -> None:
    model = double(reparametrise(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 3))
    kfc = fine(model, lambda: F.cross_entropy(model(data(4, 3)), TARGET))
    assert kronecker_layers(kfc) == ["2"]
    listed = [row for row in kfc.coverage() if row.parameter.startswith("0.")]
    assert len(listed) >= 2
    assert all(row.treatment != "kfc" and row.reason for row in listed)
    assert next(row for row in listed if row.parameter == "0.bias").reason == "its weight is re-parametrised"


def test_a_layer_is_tested_once() -> None:
    # A misuse that begins later passes: testing every step would cost each of them the weights' derivatives.
    model = double(nn.Linear(3, 3))
    kfc = fine(model, lambda: F.cross_entropy(model(data(4, 3)), TARGET))
    with kfc.capture():
        loss = F.cross_entropy(model(data(4, 3)) + F.linear(data(4, 3), model[0].weight), TARGET)
    kfc.update(loss)
