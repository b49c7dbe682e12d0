"""Convolutions, plain and transposed, in one to three dimensions, with every option."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc.factors.convolution import patches
from lightning_kfc.layers import Adapter, adapter_for
from tests.helpers import oracles
from tests.helpers.examples import examples
from tests.helpers.nets import classes, data, double, observe
from tests.layers.laws import assert_rows_rebuild_the_gradient, curved, logits_jacobians

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def adapter_of(module: nn.Module) -> Adapter:
    kind = adapter_for(module)
    assert kind is not None
    return kind(module)


@st.composite
def channels(draw: st.DrawFn) -> tuple[int, int, int]:
    """Channels in, channels out and groups; depthwise as often as not where there are groups."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs = groups * draw(st.sampled_from([1, 1, 2]))
    return inputs, groups * draw(st.integers(1, 2)), groups


@st.composite
def convolutions(draw: st.DrawFn, most_dims: int = 3) -> tuple[nn.Module, Tensor]:
    """A convolution with any options, and an input that fits it."""
    dims = draw(st.integers(1, most_dims))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation, stride = each(1, 3), each(1, 2), each(1, 3)
    padding = draw(st.sampled_from(["same", "valid", 0, 1])) if draw(st.booleans()) else each(0, 2)
    if padding == "same":
        stride = (1,) * dims
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    # The smallest size that the kernel and a padding by 2 (reflected) allow, and a little more.
    size = tuple(max(3, d * (k - 1) + 1) + draw(st.integers(0, 2)) for k, d in zip(kernel, dilation, strict=True))
    inputs, outputs, groups = draw(channels())
    conv = CONVS[dims](
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        bias=draw(st.booleans()),
    ).double()
    return conv, data(*draw(st.sampled_from([(), (1,), (3,)])), inputs, *size)


@st.composite
def transposed_convolutions(draw: st.DrawFn, most_dims: int = 3) -> tuple[nn.Module, Tensor]:
    """A transposed convolution with any options, and an input that it makes something of."""
    dims = draw(st.integers(1, most_dims))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation, stride, padding = each(1, 3), each(1, 2), each(1, 3), each(0, 2)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    # (n - 1) s - 2 p + d (k - 1) + e + 1 >= 1
    least = [
        math.ceil(max(0, 2 * p - d * (k - 1) - e) / s) + 1
        for k, d, s, p, e in zip(kernel, dilation, stride, padding, extra, strict=True)
    ]
    size = tuple(n + draw(st.integers(0, 2)) for n in least)
    inputs, outputs, groups = draw(channels())
    conv = TRANSPOSED[dims](
        inputs,
        outputs,
        kernel,
        stride=stride,
        padding=padding,
        output_padding=extra,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    ).double()
    return conv, data(*draw(st.sampled_from([(), (1,), (3,)])), inputs, *size)


@examples(100)
@given(case=convolutions())
def test_rows_of_a_convolution_rebuild_its_gradient_with_every_option(case: tuple[nn.Module, Tensor]) -> None:
    conv, x = case
    assert_rows_rebuild_the_gradient(adapter_of(conv), lambda: curved(conv(x)), str(conv))


@examples(100)
@given(case=transposed_convolutions())
def test_rows_of_a_transposed_convolution_rebuild_its_gradient_with_every_option(
    case: tuple[nn.Module, Tensor],
) -> None:
    conv, x = case
    assert_rows_rebuild_the_gradient(adapter_of(conv), lambda: curved(conv(x)), str(conv))


def test_rows_of_a_transposed_convolution_follow_the_output_size_requested() -> None:
    conv = nn.ConvTranspose2d(2, 3, 3, stride=3, padding=1).double()
    x = data(2, 2, 3, 3)
    sizes = set()
    for size in ([7, 7], [8, 9]):
        assert_rows_rebuild_the_gradient(adapter_of(conv), lambda size=size: curved(conv(x, size)), f"to {size}")
        sizes.add(tuple(conv(x, size).shape[2:]))
    assert len(sizes) == 2


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_frozen_weight_or_bias_leaves_the_other_s_rows(kind: type[nn.Module], frozen: str) -> None:
    conv = kind(2, 4, 3, stride=2, groups=2).double()
    getattr(conv, frozen).requires_grad_(False)
    x = data(2, 2, 5, 5)
    assert_rows_rebuild_the_gradient(adapter_of(conv), lambda: curved(conv(x)), f"{conv}, {frozen} frozen")
    kfc = observe(nn.Sequential(conv), lambda: F.mse_loss(conv(x), torch.zeros_like(conv(x))), fisher="mc")
    shapes = {name: tuple(factor.shape) for name, factor in kfc.layers["0"].factors.items()}
    assert shapes == kfc.layers["0"].adapter.factor_shapes()


# Scale.


def group_jacobians(conv: nn.Module, jacobians: dict[str, Tensor]) -> list[Tensor]:
    """The derivative of all logits by ``[W b]`` of each group, ``(logits, d_out, d_in)``; written out anew."""
    weight, found = jacobians["weight"], []
    for group in range(conv.groups):
        c_out, c_in = conv.out_channels // conv.groups, conv.in_channels // conv.groups
        outputs = slice(group * c_out, (group + 1) * c_out)
        if conv.transposed:
            own = weight[:, group * c_in : (group + 1) * c_in].transpose(1, 2)
            joint = own.flip(list(range(3, own.ndim))).flatten(2)
        else:
            joint = weight[:, outputs].flatten(2)
        if "bias" in jacobians:
            joint = torch.cat([joint, jacobians["bias"][:, outputs].unsqueeze(-1)], -1)
        found.append(joint)
    return found


def assert_every_group_equals_the_dense_fisher(model: nn.Module, x: Tensor, loss, **settings_: str) -> None:
    """A ⊗ G of each group of the first layer equals that group's block of the dense Fisher."""
    conv = model[0]
    factors = observe(model, lambda: loss(model(x)), **settings_).layers["0"].factors
    hessian = oracles.logits_hessian(loss, model(x))
    for group, J in enumerate(group_jacobians(conv, logits_jacobians(model, x, "0"))):
        expected = J.flatten(1).T @ hessian @ J.flatten(1)
        found = oracles.kron(factors["A"][group], factors["G"][group])
        assert float(expected.abs().max()) > 0 or float(x.abs().max()) == 0
        oracles.assert_equal(found, expected, what=f"A⊗G of group {group} of {conv}")


class PerLocation(nn.Module):
    """A linear map of the channels at every location: a convolution with a kernel of 1, in any dimension."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(-x.ndim + 1, -1)).movedim(-1, 1)


@pytest.mark.slow
@examples(25)
@given(case=st.one_of(convolutions(most_dims=2), transposed_convolutions(most_dims=2)))
def test_every_group_before_linear_maps_per_location_has_the_dense_fisher_of_squared_error(
    case: tuple[nn.Module, Tensor],
) -> None:
    # Case (ii): the assumptions of the paper's theorem 1 hold, whatever the geometry.
    conv, x = case
    x = x if x.ndim == conv.weight.ndim else x.unsqueeze(0)
    model = double(conv, PerLocation(conv.out_channels, 2))
    y = data(*model(x).shape, seed=7)
    assert_every_group_equals_the_dense_fisher(model, x, lambda z: F.mse_loss(z, y))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_group_of_a_kernel_as_large_as_its_input_has_the_dense_fisher_of_cross_entropy(
    dims: int, groups: int
) -> None:
    # Case (i): one example, one location.
    model = double(CONVS[dims](4, 4, 2, groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))
    target = classes(1, count=3)
    assert_every_group_equals_the_dense_fisher(model, data(1, 4, *[2] * dims), lambda z: F.cross_entropy(z, target))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_to_one_location_has_the_dense_fisher_of_cross_entropy(groups: int) -> None:
    model = double(nn.ConvTranspose2d(4, 4, 3, padding=1, groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))
    target = classes(1, count=3)
    assert_every_group_equals_the_dense_fisher(model, data(1, 4, 1, 1), lambda z: F.cross_entropy(z, target))


class SumOverSpace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).sum(2)


@examples(15)
@given(
    case=st.one_of(convolutions(most_dims=2), transposed_convolutions(most_dims=2)),
    at_once=st.sampled_from([1, 1000, 10**8]),
)
def test_every_group_before_a_sum_over_space_has_the_dense_fisher_of_squared_error_with_reduce(
    case: tuple[nn.Module, Tensor], at_once: int
) -> None:
    # Case (iii).
    conv, x = case
    x = x if x.ndim == conv.weight.ndim else x.unsqueeze(0)
    model = double(conv, SumOverSpace())
    y = data(*model(x).shape, seed=7)
    with pytest.MonkeyPatch.context() as patch:
        # Patches are formed some examples at a time; the result must not depend on how many.
        patch.setattr(patches, "PATCH_BYTES", at_once)
        assert_every_group_equals_the_dense_fisher(model, x, lambda z: F.mse_loss(z, y), weight_sharing="reduce")


def test_a_depthwise_convolution_has_one_batched_pair_of_factors() -> None:
    model = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1, groups=96))
    x = torch.randn(2, 96, 5, 5)
    kfc = observe(model, lambda: F.mse_loss(model(x), torch.zeros_like(x)), fisher="mc")
    assert kfc.layers["0"].A.shape == (96, 10, 10)
    assert kfc.layers["0"].G.shape == (96, 1, 1)


@pytest.mark.parametrize("conv", [nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.ConvTranspose2d(4, 6, 3, groups=2)])
def test_the_update_of_each_group_is_that_of_its_own_dense_solve(conv: nn.Module) -> None:
    conv = conv.double()
    model = nn.Sequential(conv)
    x = data(2, conv.in_channels, 4, 4)
    kfc = observe(model, lambda: F.mse_loss(model(x), torch.ones_like(model(x))), fisher="mc", damping=0.1)
    gradients = torch.autograd.grad(curved(model(x)), [conv.weight, conv.bias])
    for parameter, gradient in zip([conv.weight, conv.bias], gradients, strict=True):
        parameter.grad = gradient.clone()
    factors = kfc.layers["0"].factors
    kfc.precondition(lr=1.0)
    before = group_jacobians(conv, {"weight": gradients[0].unsqueeze(0), "bias": gradients[1].unsqueeze(0)})
    after = group_jacobians(conv, {"weight": conv.weight.grad.unsqueeze(0), "bias": conv.bias.grad.unsqueeze(0)})
    for group in range(conv.groups):
        A, G = oracles.pi_damped(factors["A"][group], factors["G"][group], 0.1)
        oracles.assert_equal(after[group][0], oracles.dense_solve(A, G, before[group][0]), what=f"group {group}")
