"""Every parameter is listed with how it is treated and why; include and exclude choose among them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.nets import classes, data, engine, kronecker_layers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3, bias=False))
        self.head = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.head(self.encoder(x).flatten(1))


@pytest.mark.parametrize(
    ("include", "exclude", "covered"),
    [
        (None, None, ["encoder.0", "encoder.2", "head"]),
        (["encoder.*"], None, ["encoder.0", "encoder.2"]),
        ("head", None, ["head"]),
        (None, ["encoder.2", "head"], ["encoder.0"]),
        (["encoder.*"], ["*.0"], ["encoder.2"]),
        (["encoder.[02]", "h?ad"], None, ["encoder.0", "encoder.2", "head"]),
    ],
)
def test_patterns_choose_modules_by_name(
    include: list[str] | None, exclude: list[str] | None, covered: list[str]
) -> None:
    kfc = engine(Net().double(), include=include, exclude=exclude)
    assert kronecker_layers(kfc) == covered


def test_gradients_of_what_is_left_out_stay_as_they_are_bit_for_bit() -> None:
    model = Net().double()
    x, target = data(4, 2, 6, 6), classes(4, count=3)
    kfc = engine(model, include=["head"])
    with kfc.capture():
        loss = F.cross_entropy(model(x), target)
    kfc.update(loss)
    loss.backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    kfc.precondition(lr=0.1)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p.grad, before[name])]
    assert changed == ["head.weight", "head.bias"]


def test_every_parameter_is_listed_once_with_treatment_reason_and_factor_shapes() -> None:
    model = Net()
    model.head.bias.requires_grad_(False)
    coverage = engine(model, exclude=["encoder.2"]).coverage()
    rows = {row.parameter: row for row in coverage}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    assert len(coverage) == len(rows)
    assert rows["encoder.0.weight"].treatment == rows["encoder.0.bias"].treatment == "kfc"
    assert rows["encoder.0.weight"].factor_shapes == {"A": (19, 19), "G": (3, 3)}
    assert rows["head.weight"].factor_shapes == {"A": (8, 8), "G": (3, 3)}
    assert rows["head.bias"].treatment == "frozen"
    assert (rows["encoder.2.weight"].treatment, rows["encoder.2.weight"].reason) == ("plain", "in exclude")
    assert rows["scale"].treatment != "kfc"
    assert rows["scale"].reason
    assert sum(row.numel for row in coverage) == sum(p.numel() for p in model.parameters())
    # Two factors and two inverses of 19x19 and 3x3, four bytes a number.
    assert rows["encoder.0.weight"].bytes == 2 * (19**2 + 3**2) * 4
    table = str(coverage)
    for text in ("encoder.0", "A 19, G 3", "in exclude", "encoder.2.weight", "trainable parameters"):
        assert text in table


def test_the_memory_listed_is_what_factors_and_inverses_then_hold() -> None:
    model = Net()
    kfc = engine(model)
    before = sum(row.bytes for row in kfc.coverage())
    with kfc.capture():
        loss = F.cross_entropy(model(data(4, 2, 6, 6).float()), classes(4, count=3))
    kfc.update(loss)
    held = 0
    for layer in kfc.layers.values():
        held += sum(value.nbytes for value in layer.factors.values())
        assert layer.inverse is not None
        held += sum(value.nbytes for value in layer.inverse.state().values() if isinstance(value, torch.Tensor))
    assert sum(row.bytes for row in kfc.coverage()) == held
    assert before == held


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_no_module_is_an_error_listing_the_modules(option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option} pattern 'decoder\.\*' matches no module.*encoder\.0.*head"):
        engine(Net(), **{option: ["head", "decoder.*"]})


@pytest.mark.parametrize("settings", [{"exclude": ["encoder.*", "head", ""]}, {"exclude": ["*"]}])
def test_a_model_with_all_layers_left_out_is_an_error_with_the_reason_for_each(settings: dict[str, list[str]]) -> None:
    with pytest.raises(
        ValueError, match=r"no layer to precondition(.|\n)*encoder\.0.*in exclude(.|\n)*head.*in exclude"
    ):
        engine(Net(), **settings)


def test_a_model_that_is_all_frozen_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no layer to precondition(.|\n)*frozen"):
        engine(Net().requires_grad_(False))


def test_a_model_without_parameters_is_an_error() -> None:
    with pytest.raises(ValueError, match="no layer to precondition"):
        engine(nn.Sequential(nn.ReLU()))
