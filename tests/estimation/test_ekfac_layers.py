"""EKFAC's eigenvalues are the dense Fisher's diagonal in the basis for every kind of layer that has rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc.factors.inverses import BlockInverse, EighInverse, EkfacInverse
from lightning_kfc.layers import Adapter
from tests.helpers import oracles
from tests.helpers.nets import classes, data, engine, observe, train_step


class Pooled(nn.Module):
    """A layer, a non-linearity and a mean over all but the first two axes; 4 logits an example."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)).flatten(2).mean(2)


class BatchSecond(nn.Module):
    """Attention and a Linear on (positions, examples, 4), as torch's own Transformers have it by default."""

    batch_first = False

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.attention(x, x, x)[0])).square().mean(0)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(3, 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.bilinear(x[..., :3], x[..., 3:])).mean(1)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "grouped conv": (lambda: Pooled(nn.Conv2d(4, 4, 3, groups=2, padding=1)), (3, 4, 4, 3)),
    "depthwise conv 1d": (lambda: Pooled(nn.Conv1d(4, 4, 3, groups=4, stride=2, bias=False)), (3, 4, 8)),
    "conv 3d": (lambda: Pooled(nn.Conv3d(2, 4, (1, 2, 2), dilation=(1, 2, 1))), (2, 2, 2, 4, 3)),
    "grouped transposed conv": (
        lambda: Pooled(nn.ConvTranspose2d(2, 4, 3, groups=2, stride=2, output_padding=1)),
        (2, 2, 3, 3),
    ),
    "attention and linear, batch second": (BatchSecond, (5, 3, 4)),
    "bilinear": (Pairs, (3, 2, 5)),
}


def fisher_roots(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], adapter: Adapter) -> Tensor:
    """Gradient matrices whose outer products add up to the dense Fisher matrix, ``(logits, groups, d_out, d_in)``."""
    z = model(x)
    values, vectors = torch.linalg.eigh(oracles.logits_hessian(loss, z))
    roles, parameters = zip(*adapter.own_parameters().items(), strict=True)
    matrices = []
    for value, vector in zip(values.clamp(min=0), vectors.T, strict=True):
        seed = (value.sqrt() * vector).reshape(z.shape)
        gradients = torch.autograd.grad(z, parameters, seed, retain_graph=True)
        matrices.append(adapter.matrix(dict(zip(roles, gradients, strict=True))))
    return torch.stack(matrices)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", list(CASES))
def test_ekfac_has_the_fishers_diagonal_in_its_basis(case: str, weight_sharing: str) -> None:
    make, shape = CASES[case]
    model, x = make().double(), data(*shape)
    targets = classes(len(model(x)), count=4)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, targets)

    kfc = observe(model, lambda: loss(model(x)), inverse="ekfac", weight_sharing=weight_sharing)
    seen = 0
    for name, layer in kfc.layers.items():
        inverse = layer.inverse
        assert isinstance(inverse, EkfacInverse)
        roots = fisher_roots(model, x, loss, layer.adapter)
        expected = torch.zeros_like(inverse.values)
        for root in roots:
            expected += (inverse.G_vectors.mT @ root @ inverse.A_vectors).square()
        assert float(expected.max()) > 0
        oracles.assert_equal(inverse.values, expected, what=f"eigenvalues of {name}")
        seen += 1
    assert seen == (5 if case.startswith("attention") else 1)


def test_tables_and_norm_layers_keep_their_own_curvature_under_ekfac() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(8, 3)).double()
    tokens, y = torch.tensor([[0, 2], [2, 2], [5, 1]]), classes(3, count=3)
    kfc = engine(model, inverse="ekfac", damping=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses = [float(train_step(kfc, optimizer, lambda: F.cross_entropy(model(tokens), y))) for _ in range(10)]
    kinds: Sequence[Any] = [type(kfc.layers[name].inverse) for name in ("0", "1", "3")]
    assert kinds == [EighInverse, BlockInverse, EkfacInverse]
    assert losses[-1] < 0.5 * losses[0]
    # The Embedding's solve: (A ⊗ G + damping)⁻¹ with A's own diagonal.
    layer, gradient = kfc.layers["0"], data(1, 4, 7)
    assert layer.inverse is not None
    curvature = oracles.kron(torch.diag(layer.A), layer.G) + 0.1 * torch.eye(28).double()
    expected = torch.linalg.solve(curvature, gradient.reshape(-1))
    oracles.assert_equal(layer.inverse.solve(gradient).reshape(-1), expected, what="V")


def test_the_gates_of_a_recurrent_layer_get_exact_damping_under_ekfac() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cells(x)[0][:, -1])

    model, x = Last().double(), data(3, 4, 3)
    kfc = observe(model, lambda: F.cross_entropy(model(x), classes(3, count=4)), inverse="ekfac")
    kinds = {name: type(layer.inverse) for name, layer in kfc.layers.items()}
    assert kinds == {"cells.ih_l0": EighInverse, "cells.hh_l0": EighInverse, "head": EkfacInverse}
