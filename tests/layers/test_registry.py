"""Adapters for users' own layers."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import SelfTestError, register_adapter
from lightning_kfc.layers import Adapter, Forward, adapter_for, registry
from lightning_kfc.layers.linear import LinearAdapter
from tests.helpers import oracles
from tests.helpers.nets import classes, data, double, engine, observe


@pytest.fixture(autouse=True)
def _registrations_end_with_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))


class Doubled(nn.Linear):
    """A Linear with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledAdapter(LinearAdapter):
    def output_rows(self, output_gradient: Tensor) -> Tensor:
        return 2 * super().output_rows(output_gradient)


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(data(4, 3)), classes(4, count=2))


def test_the_example_in_the_documentation_gives_exact_factors() -> None:
    documented = inspect.getdoc(register_adapter)
    assert documented is not None
    example = documented.split("For example::")[1].split("A layer that scales")[0]
    names: dict[str, Any] = {"nn": nn, "F": F, "Adapter": Adapter, "register_adapter": register_adapter}
    exec(textwrap.dedent(example), names)
    model = double(names["EqualizedLinear"](3, 2))
    x, target = data(1, 3), classes(1, count=2)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, target)

    layer = observe(model, lambda: loss(model(x))).layers["0"]
    assert type(layer.adapter) is names["EqualizedLinearAdapter"]
    assert layer.adapter.kind == "EqualizedLinear"
    oracles.assert_equal(oracles.kron(layer.A, layer.G), oracles.dense_fisher(model, x, loss, "0"), what="A⊗G")


def test_a_subclass_with_its_own_forward_is_served_only_by_its_own_registration() -> None:
    assert adapter_for(Doubled(3, 2)) is None
    register_adapter(Doubled)(DoubledAdapter)
    assert adapter_for(Doubled(3, 2)) is DoubledAdapter
    assert adapter_for(nn.Linear(3, 2)) is LinearAdapter
    model = double(Doubled(3, 2))
    observe(model, lambda: loss_of(model))  # its self-test passes


def test_a_later_registration_replaces_a_built_in_one() -> None:
    @register_adapter(nn.Linear)
    class Own(LinearAdapter):
        kind = "Mine"

    model = double(nn.Linear(3, 2))
    assert observe(model, lambda: loss_of(model)).coverage()[0].kind == "Mine"


def test_an_adapter_serves_all_the_types_it_is_registered_for() -> None:
    class A(nn.Linear):
        forward = Doubled.forward

    class B(nn.Linear):
        forward = Doubled.forward

    register_adapter(A, B)(DoubledAdapter)
    assert adapter_for(A(3, 2)) is DoubledAdapter is adapter_for(B(3, 2))


def test_an_adapter_whose_rows_do_not_rebuild_the_gradient_is_caught_at_the_first_step() -> None:
    register_adapter(Doubled)(LinearAdapter)
    model = double(Doubled(3, 2))
    with pytest.raises(SelfTestError, match="'0'"):
        observe(model, lambda: loss_of(model))


def test_rows_of_a_wrong_shape_are_named_with_the_shape_that_is_required() -> None:
    class Inputs(LinearAdapter):
        def weight_input_rows(self, forward: Forward) -> Tensor:
            return super().weight_input_rows(forward)[..., :2]

    class Outputs(LinearAdapter):
        def output_rows(self, output_gradient: Tensor) -> Tensor:
            return super().output_rows(output_gradient).transpose(0, 1)

    model = double(nn.Linear(3, 2))
    register_adapter(nn.Linear)(Inputs)
    with pytest.raises(ValueError, match=r"Inputs.weight_input_rows\(\) made .*\(4, 1, 1, 3\).*positions, 1, 4\)"):
        observe(model, lambda: loss_of(model))
    register_adapter(nn.Linear)(Outputs)
    with pytest.raises(
        SelfTestError, match=r"Outputs.output_rows\(\) returned .*\(1, 4, 1, 2\) for '0'.*\(4, 1, 1, 2\)"
    ):
        observe(model, lambda: loss_of(model))


def test_what_is_no_module_class_or_no_adapter_is_refused_with_the_way_out() -> None:
    class Half(Adapter):
        def output_rows(self, output_gradient: Tensor) -> Tensor:
            return output_gradient

    with pytest.raises(TypeError, match="as in @register_adapter"):
        register_adapter()
    with pytest.raises(TypeError, match="as in @register_adapter"):
        register_adapter(nn.Linear(3, 2))  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(TypeError, match="as in @register_adapter"):
        register_adapter(DoubledAdapter)  # type: ignore[type-var]  # wrong on purpose
    with pytest.raises(TypeError, match=r"subclass of lightning_kfc\.layers\.Adapter"):
        register_adapter(Doubled)(Doubled)  # type: ignore[type-var]  # wrong on purpose
    with pytest.raises(TypeError, match=r"Half must define weight_input_rows\(\)"):
        register_adapter(Doubled)(Half)


def test_a_module_that_no_adapter_serves_is_trained_and_listed_with_the_reason() -> None:
    model = double(Doubled(3, 3), nn.Linear(3, 2))
    kfc = engine(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with kfc.capture():
        loss = loss_of(model)
    kfc.update(loss)
    loss.backward()
    kfc.precondition(optimizer=optimizer)
    reasons = {row.parameter: row.reason for row in kfc.coverage()}
    assert reasons["0.weight"] == "no adapter for Doubled"
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())
