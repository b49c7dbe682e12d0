"""coverage(): every parameter once, what is held, and a table that can be read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC
from lightning_kfc.curvature.coverage import NO_STATISTICS
from tests.helpers.nets import classes, engine, observe, train_step


class Everything(nn.Module):
    """Most kinds of layers, a raw parameter, a frozen one and one that is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.gate = nn.Parameter(torch.ones(()))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=4)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.left_out = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.gate * self.attention(x, x, x, need_weights=False)[0])
        x, _ = self.recurrent(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return self.head(self.left_out(x).mean(1))


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(classes(4, 5, count=7)), classes(4, count=3))


def everything() -> tuple[nn.Module, KFC]:
    model = Everything()
    return model, observe(model, lambda: loss_of(model), fisher="mc", exclude="left_out")


def test_rows_are_all_parameters_in_the_model_s_order_and_add_up() -> None:
    model, kfc = everything()
    rows = kfc.coverage()
    assert [(row.parameter, row.numel) for row in rows] == [(n, p.numel()) for n, p in model.named_parameters()]
    assert [row.treatment != "frozen" for row in rows] == [p.requires_grad for p in model.parameters()]
    assert len(rows) == len(list(rows)) == len(list(model.parameters()))
    covered = sum(row.numel for row in rows if row.treatment not in ("plain", "frozen"))
    served = sum(torch.Size(layer.adapter.matrix_shape()).numel() for layer in kfc.layers.values())
    assert covered == served


def test_every_row_names_its_kind_treatment_and_factor_shapes() -> None:
    _, kfc = everything()
    rows = {row.parameter: row for row in kfc.coverage()}
    found = {name: (row.module, row.kind, row.treatment, row.factor_shapes) for name, row in rows.items()}
    assert found["embed.weight"] == ("embed", "Embedding", "kfc", {"A": (7,), "G": (8, 8)})
    assert found["conv.bias"] == ("conv", "Conv", "kfc", {"A": (4, 7, 7), "G": (4, 2, 2)})
    assert found["norm.weight"] == ("norm", "LayerNorm", "block", {"F": (8, 2, 2)})
    assert found["gate"] == ("", "Parameter", "diagonal", {"F": (1,)})
    assert found["head.weight"] == ("head", "Linear", "kfc", {"A": (8, 8), "G": (3, 3)})
    assert found["head.bias"][2] == "frozen"
    assert found["left_out.bias"][1:] == ("Linear", "plain", {})
    assert found["attention.in_proj_bias"][3]["k.A"] == (9, 9)
    reasons = {name: rows[name].reason for name in ("gate", "left_out.weight", "head.bias")}
    assert reasons == {
        "gate": "no adapter for Everything",
        "left_out.weight": "in exclude",
        "head.bias": "requires_grad is False",
    }
    assert all(row.reason == "" for row in rows.values() if row.treatment in ("kfc", "block"))


def test_bytes_are_those_that_factors_and_inverses_hold_before_and_after_they_exist() -> None:
    model, kfc = everything()
    held = sum(
        tensor.nbytes
        for layer in kfc.layers.values()
        for tensor in (*layer.factors.values(), *layer.inverse.state().values())
    )
    before = engine(model, exclude="left_out").coverage()
    assert sum(row.bytes for row in kfc.coverage()) == held == sum(row.bytes for row in before)


def test_a_tied_weight_and_a_dropped_layer_are_counted_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "raw": nn.Linear(4, 2)})
    model["b"].weight, model["b"].bias = model["a"].weight, model["a"].bias

    def loss() -> Tensor:
        h = model["b"](model["a"](torch.randn(3, 4)).tanh())
        return F.cross_entropy(F.linear(h, model["raw"].weight, model["raw"].bias), classes(3, count=2))

    with pytest.warns(UserWarning, match="without calling the module"):
        kfc = observe(model, loss, fisher="mc")
    rows = kfc.coverage()
    assert [(row.parameter, row.treatment) for row in rows] == [
        ("a.weight", "kfc"),
        ("a.bias", "kfc"),
        ("raw.weight", "diagonal"),
        ("raw.bias", "diagonal"),
    ]
    assert sum(row.numel for row in rows) == sum(p.numel() for p in model.parameters())


def test_the_table_names_every_layer_and_reason_and_the_share_that_is_preconditioned() -> None:
    model, kfc = everything()
    table = str(kfc.coverage())
    lines = table.splitlines()
    assert any(line.split() == ["conv", "Conv", "56", "4", "x", "(A", "7,", "G", "2)", "1.7", "kB"] for line in lines)
    assert any(line.startswith("norm ") and "8 x F 2" in line for line in lines)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trainable - 72:,} of {trainable:,} trainable parameters" in table
    assert "Diagonal (no adapter for Everything): gate" in lines
    assert "Plain gradient (in exclude): left_out.weight, left_out.bias" in lines
    assert "Frozen (requires_grad is False): head.bias" in lines


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)


def test_the_table_of_a_deep_residual_net_fits_a_terminal() -> None:
    model = nn.ModuleDict({f"layer{i}": nn.Sequential(*[Block(2**i) for _ in range(12)]) for i in range(1, 4)})
    model["fc"] = nn.Linear(16, 10)
    lines = str(engine(model).coverage()).splitlines()
    assert len(lines) < 15
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("layer2.[0-11].conv[1-2]  Conv ") for line in lines)


def test_layers_share_a_line_only_where_their_numbers_make_up_a_grid_and_nothing_else_differs() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a0_b0", "a1_b1", "c0", "c2", "d0", "d1")})
    model["d1"] = nn.Linear(4, 5)
    names = [line.split()[0] for line in str(engine(model).coverage()).splitlines()[3:]]
    assert names[:5] == ["a0_b0", "a1_b1", "c[0,2]", "d0", "d1"]


class TwoHeads(nn.Module):
    """A trunk and two heads, of which a loss uses one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, head: str) -> Tensor:
        return self.get_submodule(head)(self.trunk(x).tanh())


def treatments(kfc: KFC) -> dict[str, tuple[str, str]]:
    return {row.module: (row.treatment, row.reason) for row in kfc.coverage()}


def test_the_coverage_is_that_of_the_present_moment() -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    kfc = KFC(model, warmup_steps=1, factor_every_n_steps=2, inverse_every_n_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(6, 4), torch.arange(6) % 3

    def step(head: str) -> None:
        train_step(kfc, optimizer, lambda: F.cross_entropy(model(x, head), y))

    plain = ("plain", NO_STATISTICS)
    assert treatments(kfc) == dict.fromkeys(("trunk", "first", "second"), ("kfc", ""))
    step("first")
    assert treatments(kfc) == {"trunk": ("kfc", ""), "first": ("kfc", ""), "second": plain}
    assert "Preconditioned: 43 of 61 trainable parameters (70.5%)" in str(kfc.coverage())
    for _ in range(3):
        step("second")
    assert treatments(kfc) == dict.fromkeys(("trunk", "first", "second"), ("kfc", ""))
    model.trunk.bias.requires_grad_(False)
    assert treatments(kfc)["trunk"][0] == "frozen"  # that of its bias, the last of its parameters
    row = next(row for row in kfc.coverage() if row.parameter == "trunk.weight")
    assert (row.treatment, row.reason) == (
        "plain",
        "frozen or unfrozen since its last statistics: taken anew at the next step that takes statistics",
    )
    step("second")
    step("second")
    assert next(row for row in kfc.coverage() if row.parameter == "trunk.weight").treatment == "kfc"
