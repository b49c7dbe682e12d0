"""Layers too large for a dense factor: its diagonal stands in, exactly, and no matrix of that size is ever made."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cost import large_layers
from lightning_kfc import KFC, KFCCallback
from lightning_kfc.curvature.bytes_held import layer_bytes
from tests.helpers import oracles
from tests.helpers.nets import classes, data, double, engine, observe, train_step

KINDS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 2, 5)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (4, 5)),
    "conv": (lambda: nn.Conv2d(2, 3, 3, padding=1, stride=2), (3, 2, 5, 4)),
    "reflecting conv": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False), (3, 2, 5, 4)),
    "grouped conv": (lambda: nn.Conv2d(4, 6, (2, 1), groups=2), (3, 4, 4, 3)),
    "transposed conv": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2, output_padding=1), (2, 2, 3, 3)),
}


@pytest.mark.slow
@given(
    kind=st.sampled_from(list(KINDS)),
    weight_sharing=st.sampled_from(["expand", "reduce"]),
    max_factor_dim=st.sampled_from([1, 3, 4, 18]),
    frozen=st.sampled_from([(), ("weight",), ("bias",)]),
)
def test_a_factor_above_the_bound_is_the_diagonal_of_the_dense_one(
    kind: str, weight_sharing: str, max_factor_dim: int, frozen: tuple[str, ...]
) -> None:
    make, shape = KINDS[kind]
    layer, x = make().double(), data(*shape)
    for name in frozen:
        if layer.bias is not None:
            getattr(layer, name).requires_grad_(False)

    def loss() -> Tensor:
        return F.mse_loss(layer(x), torch.zeros_like(layer(x)))

    dense = observe(layer, loss, weight_sharing=weight_sharing, max_factor_dim=None).layers[""]
    found = observe(layer, loss, weight_sharing=weight_sharing, max_factor_dim=max_factor_dim).layers[""]
    for name in ("A", "G"):
        expected, factor = dense.factors[name], found.factors[name]
        if expected.shape[-1] > max_factor_dim:
            expected = expected.diagonal(dim1=-2, dim2=-1)
        oracles.assert_equal(factor, expected, what=name)
        assert tuple(factor.shape) == found.adapter.factor_shapes()[name]


@pytest.mark.parametrize("inverse", ["cholesky", "eigh"])
@pytest.mark.parametrize("max_factor_dim", [3, 4])
def test_the_step_with_a_diagonal_factor_is_the_dense_solve(inverse: str, max_factor_dim: int) -> None:
    layer, x, damping = nn.Linear(4, 4, bias=max_factor_dim == 4).double(), data(5, 4), 0.03
    kfc = engine(layer, inverse=inverse, max_factor_dim=max_factor_dim, damping=damping)
    with kfc.capture():
        loss = F.cross_entropy(layer(x), classes(5, count=4))
    kfc.update(loss)
    loss.backward()
    gradient = oracles.joint_matrix(layer.weight.grad, None if layer.bias is None else layer.bias.grad)
    A, G = (f if f.ndim == 2 else torch.diag(f) for f in (kfc.layers[""].A, kfc.layers[""].G))
    assert (kfc.layers[""].A.ndim, kfc.layers[""].G.ndim) == ((1, 1) if max_factor_dim == 3 else (1, 2))
    if inverse == "cholesky":
        expected = oracles.dense_solve(*oracles.pi_damped(A, G, damping), gradient)
    else:
        F_damped = oracles.kron(A, G) + damping * torch.eye(gradient.numel()).double()
        expected = torch.linalg.solve(F_damped, gradient.reshape(-1)).reshape(gradient.shape)
    kfc.precondition(lr=0.1)
    found = oracles.joint_matrix(layer.weight.grad, None if layer.bias is None else layer.bias.grad)
    oracles.assert_equal(found, expected, what="V")


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.device.type != "meta":
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "ekfac"])
def test_a_vocabulary_head_and_a_wide_input_never_make_a_matrix_of_their_size(inverse: str) -> None:
    words, wide, hidden, examples = 30_000, 12_000, 4, 6
    model = nn.Sequential(nn.Linear(wide, hidden), nn.Linear(hidden, words))
    x, y = data(examples, wide).float(), classes(examples, count=words)
    kfc = KFC(model, inverse=inverse)
    with _Largest() as largest:
        train_step(kfc, torch.optim.SGD(model.parameters(), lr=0.1), lambda: F.cross_entropy(model(x), y))
    # The rows at the logits, and the head's own [W b].
    assert words * (hidden + 1) <= largest.numel <= words * max(examples, hidden + 1), f"{largest.numel:,} elements"
    assert kfc.last_step is not None
    assert kfc.last_step.kl > 0
    assert tuple(kfc.layers["1"].G.shape) == (words,)
    assert tuple(kfc.layers["0"].A.shape) == (wide + 1,)
    assert layer_bytes(kfc.layers["1"], type(kfc.layers["1"].inverse)) < 3e6


def test_the_coverage_states_the_side_the_bound_and_the_memory_saved() -> None:
    model = nn.Sequential(nn.Embedding(40_000, 8), nn.Linear(8, 8), nn.Linear(8, 30_000), nn.LayerNorm(30_000))
    rows = {row.parameter: row for row in KFC(model).coverage()}
    # The factor and its inverse: 2 * 4 bytes * 30,000 * (30,000 - 1).
    assert rows["2.weight"].reason == "G diagonal: 30,000 > max_factor_dim (saves 7.20 GB)"
    assert rows["2.weight"].treatment == "kfc"
    assert rows["2.weight"].factor_shapes == {"A": (9, 9), "G": (30_000,)}
    assert rows["2.weight"].bytes == 2 * 4 * (81 + 30_000)
    assert {rows[name].reason for name in ("0.weight", "1.weight", "3.weight")} == {""}
    table = " ".join(str(KFC(model).coverage()).split())
    assert "Other factors (G diagonal: 30,000 > max_factor_dim (saves 7.20 GB)): 2.weight, 2.bias" in table
    assert "Cheaper" not in str(KFC(double(nn.Linear(3, 2))).coverage())


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "ekfac"])
def test_the_bytes_that_coverage_foretells_are_those_held_in_the_end(inverse: str) -> None:
    model = double(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 9))
    kfc = engine(model, inverse=inverse, max_factor_dim=8)
    foretold = [row.bytes for row in kfc.coverage()]
    with kfc.capture():
        loss = F.cross_entropy(model(data(3, 6)), classes(3, count=9))
    kfc.update(loss)
    assert [row.bytes for row in kfc.coverage()] == foretold


def test_a_resnet_50_has_both_its_factors_in_full_by_default() -> None:
    # Its widest layers: 3x3 on 512 channels (with a bias, for good measure), and 1x1 from 512 to 2,048.
    model = nn.Sequential(nn.Conv2d(512, 512, 3), nn.Conv2d(512, 2048, 1), nn.Flatten(), nn.Linear(2048, 1000))
    assert {row.reason for row in KFC(model).coverage()} == {""}
    assert KFC(model).coverage()[0].factor_shapes["A"] == (4609, 4609)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)])
def test_a_bound_that_is_no_positive_whole_number_is_an_error(value: Any, error: type[Exception]) -> None:
    for make in (lambda: KFC(nn.Linear(2, 2), max_factor_dim=value), lambda: KFCCallback(max_factor_dim=value)):
        with pytest.raises(error, match="max_factor_dim"):
            make()


def test_the_measurement_behind_the_default_runs_in_small(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--dims", "8", "--rows", "4", "--words", "50", "--hidden", "4", "--repeats", "1"]
    large_layers.main(small)
    printed = capsys.readouterr().out
    # A factor of 10,000 dimensions and its inverse: 2 * 4 bytes * 10,000 squared.
    assert re.search(r"10,000 +0\.800 GB", printed)
    assert re.search(r"A head of 50 words .* would hold 0\.0 GB", printed)
