"""Normalisation layers and other scales: the rows, and the Fisher block of each unit's scale and shift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import register_adapter
from lightning_kfc.layers import Forward, ScaleShiftAdapter, adapter_for
from lightning_kfc.layers.norm import SyncBatchNormAdapter
from tests.helpers import oracles
from tests.helpers.nets import classes, data, double, engine, observe
from tests.layers.laws import assert_rows_rebuild_the_gradient, curved, logits_jacobians

UNITS = 6


@st.composite
def norms(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A normalisation layer of any kind and options, scale and shift drawn, and a batch of at least two examples."""
    dims = draw(st.integers(0, 3))
    examples = draw(st.integers(2, 4))
    space = [draw(st.integers(1, 3)) for _ in range(dims)]
    wide = [draw(st.integers(2, 3)) for _ in range(max(dims, 1))]
    channels = (examples, UNITS, *space)
    in_channels: list[tuple[nn.Module, tuple[int, ...]]] = [
        (nn.GroupNorm(draw(st.sampled_from([1, 2, 3])), UNITS), (examples, UNITS, *space, 2)),
        ([nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dims](UNITS), channels),
        (
            [nn.InstanceNorm1d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d][dims](UNITS, affine=True),
            draw(st.sampled_from([(examples, UNITS, *wide), (UNITS, *wide)])),
        ),
        (nn.SyncBatchNorm(UNITS, track_running_stats=draw(st.booleans())), channels),
        (nn.PReLU(draw(st.sampled_from([1, UNITS]))), channels),
    ]
    trailing = draw(st.sampled_from([(2,), (3, 2), (2, 1, 3)]))
    leading = draw(st.sampled_from([(), (examples,), (examples, *wide)]))
    over_last: list[tuple[nn.Module, tuple[int, ...]]] = [
        (nn.LayerNorm(trailing, bias=draw(st.booleans())), (*leading, *trailing)),
        (nn.RMSNorm(trailing, eps=draw(st.sampled_from([None, 1e-3]))), (*leading, *trailing)),
    ]
    module, shape = draw(st.sampled_from([*in_channels, *over_last]))
    module = module.double()
    for number, parameter in enumerate(module.parameters()):
        parameter.data = data(*parameter.shape, seed=11 + number)
    return module, data(*shape)


@given(case=norms(), frozen=st.sampled_from([None, "weight", "bias"]), training=st.booleans())
def test_rows_of_a_norm_layer_rebuild_its_gradient(
    case: tuple[nn.Module, Tensor], frozen: str | None, training: bool
) -> None:
    module, x = case
    adapter = adapter_for(module)(module)
    if len(adapter.parameters()) == 2 and frozen is not None:
        getattr(module, frozen).requires_grad_(False)
    module(x)  # running averages other than at the start
    module.train(training)
    assert_rows_rebuild_the_gradient(adapter, lambda: curved(module(x)), f"{module}, training={training}")


class MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4)], ids=["input", "x"])
def test_an_input_given_by_keyword_is_found_under_any_name(norm: nn.Module) -> None:
    norm, x = norm.double(), data(3, 4)
    name = "x" if isinstance(norm, nn.RMSNorm) else "input"
    assert_rows_rebuild_the_gradient(adapter_for(norm)(norm), lambda: curved(norm(**{name: x})), str(norm))


LANGUAGE_MODEL_NORMS = {"llama": "LlamaRMSNorm", "gemma": "GemmaRMSNorm", "qwen3": "Qwen3RMSNorm", "t5": "T5LayerNorm"}


@pytest.mark.parametrize("package", LANGUAGE_MODEL_NORMS)
def test_each_unit_of_a_language_model_s_norm_has_the_dense_fisher(package: str) -> None:
    module = pytest.importorskip(f"transformers.models.{package}.modeling_{package}")
    norm = getattr(module, LANGUAGE_MODEL_NORMS[package])(6, eps=1e-2)
    model = nn.Sequential(nn.Linear(6, 6), norm, nn.Tanh(), MeanOverPositions(), nn.Linear(6, 3)).double()
    x, target = data(4, 5, 6), classes(4, count=3)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, target)

    kfc = observe(model, lambda: loss(model(x)))
    # Some of these norms compute in float32 for any input.
    oracles.assert_equal(kfc.layers["1"].factors["F"], dense_blocks(model, x, loss, "1"), rtol=1e-5, what=package)


def dense_blocks(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], layer: str) -> Tensor:
    """The dense Fisher's block of each unit's scale and shift, ``(units, d, d)``."""
    jacobians = logits_jacobians(model, x, layer)
    hessian = oracles.logits_hessian(loss, model(x))
    columns = torch.stack([J.flatten(1) for J in jacobians.values()], -1)
    return torch.einsum("aui,ab,buj->uij", columns, hessian, columns)


# One loss term an example, all but the norm under test acting on each example by itself.
EXACT: dict[str, Callable[[], tuple[list[nn.Module], tuple[int, ...]]]] = {
    "LayerNorm": lambda: ([nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)], (4, 6)),
    "LayerNorm on positions": lambda: ([nn.LayerNorm(6), nn.Linear(6, 3), nn.Tanh(), MeanOverPositions()], (4, 5, 6)),
    "LayerNorm over two axes": lambda: ([nn.LayerNorm((2, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)], (4, 2, 3)),
    "LayerNorm without shift": lambda: ([nn.LayerNorm(6, bias=False), nn.Linear(6, 3)], (4, 6)),
    "RMSNorm": lambda: ([nn.RMSNorm(6), nn.Tanh(), nn.Linear(6, 3)], (4, 6)),
    "GroupNorm": lambda: ([nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)], (4, 4, 3, 3)),
    "InstanceNorm": lambda: (
        [nn.InstanceNorm2d(2, affine=True), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)],
        (4, 2, 3, 3),
    ),
    "BatchNorm": lambda: ([nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)], (4, 2, 3, 3)),
    "BatchNorm of vectors": lambda: ([nn.BatchNorm1d(6), nn.Linear(6, 3)], (4, 6)),
    "PReLU": lambda: ([nn.PReLU(2), nn.Flatten(), nn.Linear(18, 3)], (4, 2, 3, 3)),
    "PReLU, one slope": lambda: ([nn.PReLU(), nn.Flatten(), nn.Linear(18, 3)], (4, 2, 3, 3)),
}


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", EXACT)
def test_each_unit_s_block_is_that_of_the_dense_fisher(case: str, training: bool, likelihood: str) -> None:
    modules, shape = EXACT[case]()
    # The norm comes after a layer that mixes, so that its input has a history, and in BatchNorm's case a coupling.
    model = double(nn.Linear(shape[-1], shape[-1]), *modules)
    for number, parameter in enumerate(model[1].parameters()):
        parameter.data = data(*parameter.shape, seed=11 + number)
    x = data(*shape)
    model(x)
    model.train(training)
    target = classes(shape[0], count=3) if likelihood == "categorical" else data(shape[0], 3, seed=5)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, target) if likelihood == "categorical" else F.mse_loss(z, target)

    kfc = observe(model, lambda: loss(model(x)))
    expected = dense_blocks(model, x, loss, "1")
    assert float(expected.diagonal(dim1=1, dim2=2).min()) > 0
    oracles.assert_equal(kfc.layers["1"].factors["F"], expected, what=f"F of {case}")


def test_positions_of_one_example_add_up_wherever_the_batch_axis_is() -> None:
    class SequenceFirst(nn.Module):
        batch_first = False

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x).tanh()).mean(0)

    model = SequenceFirst().double()
    x, target = data(5, 3, 4), classes(3, count=3)  # 5 positions of 3 examples

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, target)

    kfc = observe(model, lambda: loss(model(x)))
    oracles.assert_equal(kfc.layers["norm"].factors["F"], dense_blocks(model, x, loss, "norm"), what="F")


def test_the_update_of_each_unit_solves_its_damped_block() -> None:
    model = double(nn.LayerNorm(4), nn.Linear(4, 3))
    x, target = data(5, 4), classes(5, count=3)
    kfc = observe(model, lambda: F.cross_entropy(model(x), target), damping=0.05, kl_clip=None)
    F.cross_entropy(model(x), target).backward()
    before = torch.stack([p.grad.clone() for p in model[0].parameters()], -1)
    block = kfc.layers["0"].factors["F"] + 0.05 * torch.eye(2).double()
    kfc.precondition(lr=1.0)
    after = torch.stack([p.grad for p in model[0].parameters()], -1)
    oracles.assert_equal(after, torch.linalg.solve(block, before), what="update")


def test_what_changes_between_forward_and_backward_does_not_change_the_block() -> None:
    # Running averages and the mode: those of the forward count.
    instance, batch = nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.BatchNorm1d(3)
    instance.running_mean.copy_(torch.arange(3.0))
    batch.running_mean.copy_(torch.arange(3.0))
    x, target = data(4, 3, 2), classes(4, count=2)
    for norm, between in ((instance, lambda: instance.running_mean.add_(5)), (batch, lambda: batch.train())):
        model = double(norm, nn.Flatten(), nn.Linear(6, 2)).eval()
        expected = dense_blocks(model, x, lambda z: F.cross_entropy(z, target), "0")
        kfc = engine(model)
        with kfc.capture():
            loss = F.cross_entropy(model(x), target)
        between()
        kfc.update(loss)
        oracles.assert_equal(kfc.layers["0"].factors["F"], expected, what=f"F of {norm}")


def test_an_input_changed_in_place_leaves_the_layer_without_statistics_and_the_refusal_to_autograd() -> None:
    model = double(nn.LayerNorm(3), nn.Linear(3, 2))
    x, target = data(4, 3), classes(4, count=2)
    kfc = engine(model)
    with kfc.capture():
        loss = F.cross_entropy(model(x), target)
    kfc.update(loss)
    kfc.precondition(lr=0.1)
    before = kfc.layers["0"].factors["F"].clone()
    with kfc.capture():
        loss = F.cross_entropy(model(x), target)
    x.add_(1)
    with pytest.warns(UserWarning, match="statistics of '0' are left out of this step: RuntimeError: .*in place"):
        kfc.update(loss)
    assert torch.equal(kfc.layers["0"].factors["F"], before)
    assert kfc.layers["1"].averages["A"].draws > 1
    assert kfc.events.failed_statistics == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_batch_norm_above_another_leaves_out_the_products_between_examples() -> None:
    below = nn.BatchNorm1d(3).double()
    above = double(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    x, normal = data(5, 3), F.batch_norm(data(5, 3), None, None, training=True)
    adapter = adapter_for(below)(below)
    recorded = adapter.record(Forward((x,), {}))
    J = oracles.jacobian(above, below(x)).reshape(10, 5, 3)
    found = sum(adapter.statistics(recorded, row).sums["F"] for row in J)  # one seed a logit
    rows = torch.stack([J * normal, J], -1)
    oracles.assert_equal(found, torch.einsum("knui,knuj->uij", rows, rows), what="F")
    dense = torch.einsum("kui,kuj->uij", rows.sum(1), rows.sum(1))
    assert float((found - dense).norm() / dense.norm()) > 0.1


class SyncBatchNorm(torch.autograd.Function):
    """The tensors that torch's synchronised batch norm, which needs accelerators, saves on two simulated ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, other: Tensor, eps: float) -> Tensor:
        whole = torch.cat([x, other])
        mean, inverse_deviation = whole.mean(0), (whole.var(0, correction=0) + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse_deviation, torch.tensor([len(x), len(other)]))
        return (x - mean) * inverse_deviation * weight + bias

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_deviation, _ = ctx.saved_tensors
        return g * weight * inverse_deviation, (g * (x - mean) * inverse_deviation).sum(0), g.sum(0), None, None


def test_a_synchronised_batch_norm_is_normalised_by_the_moments_of_all_ranks() -> None:
    class Norm(nn.SyncBatchNorm):
        def forward(self, x: Tensor) -> Tensor:
            return SyncBatchNorm.apply(x, self.weight, self.bias, other, self.eps)

    module, x, other = Norm(3).double(), data(4, 3).requires_grad_(), data(6, 3, seed=9) * 3
    assert_rows_rebuild_the_gradient(SyncBatchNormAdapter(module), lambda: curved(module(x)), "SyncBatchNorm")


def test_a_user_s_own_norm_takes_one_method() -> None:
    class Norm(nn.Module):
        """As transformers' LlamaRMSNorm."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt())

    @register_adapter(Norm)
    class NormAdapter(ScaleShiftAdapter):
        def normalised(self, input: Tensor, context: Any) -> Tensor:
            return F.rms_norm(input, input.shape[-1:], eps=1e-6)

    model = double(Norm(), nn.Linear(4, 3))
    x, target = data(5, 4), classes(5, count=3)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, target)

    kfc = observe(model, lambda: loss(model(x)))
    oracles.assert_equal(kfc.layers["0"].factors["F"], dense_blocks(model, x, loss, "0"), what="F")
