"""Geometry (KFC.md sec. 5): the recorded rows rebuild the gradient, and A is their second moment."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC
from lightning_kfc.estimation.recording import ForwardRecorder
from lightning_kfc.factors.convolution import patches
from lightning_kfc.layers import Forward
from tests.helpers import oracles
from tests.helpers.examples import examples
from tests.helpers.nets import data, engine, observe


def rebuilt_gradient(kfc: KFC, name: str, loss: Callable[[], Tensor]) -> Tensor:
    """Σ g_r ā_rᵀ over all calls of a layer, its rows read at the time of each call."""
    adapters = kfc.layers[name].adapters
    rows: list[Tensor] = []
    recorder = ForwardRecorder()
    recorder.attach(name, adapters, None)
    handles = [
        adapter.module.register_forward_hook(
            lambda _, args, kwargs, __, adapter=adapter: rows.append(adapter.input_rows(Forward(args, kwargs)).clone()),
            with_kwargs=True,
        )
        for adapter in adapters
    ]
    value = loss()
    recorder.detach()
    for handle in handles:
        handle.remove()
    derivatives = torch.autograd.grad(value, [call.edge for call in recorder.calls], retain_graph=True)
    products = [
        torch.einsum("ntgo,ntgi->goi", call.adapter.output_rows(call.output_gradient(derivative)), a)
        for call, derivative, a in zip(recorder.calls, derivatives, rows, strict=True)
    ]
    assert products, "nothing was recorded"
    return torch.stack(products).sum(0)[0]


def gradient(module: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """Autograd's own, as [W b]."""
    parameters = dict(module.named_parameters())
    grads = dict(zip(parameters, torch.autograd.grad(loss(), list(parameters.values())), strict=True))
    return oracles.joint_matrix(grads.get("weight"), grads.get("bias"))


def curved(output: Tensor) -> Tensor:
    """A scalar whose derivative differs at every entry of the output."""
    return ((output * torch.linspace(0.3, 1.7, output.numel(), dtype=output.dtype).reshape(output.shape)).sin()).sum()


@given(
    leading=st.lists(st.integers(1, 4), max_size=4), d_in=st.integers(1, 5), d_out=st.integers(1, 5), bias=st.booleans()
)
def test_rows_of_a_linear_rebuild_its_gradient_on_any_leading_dimensions(
    leading: list[int], d_in: int, d_out: int, bias: bool
) -> None:
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=bias)).double()
    x = data(*leading, d_in)

    def loss() -> Tensor:
        return curved(model(x))

    oracles.assert_equal(rebuilt_gradient(engine(model), "0", loss), gradient(model[0], loss), what="gradient")


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv2d, Tensor]:
    """A Conv2d with any options, and an input that fits it."""
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(
        st.one_of(
            st.integers(0, 2), st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])
        )
    )
    if padding == "same":
        stride = (1, 1)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    channels, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = draw(st.tuples(st.integers(3, 6), st.integers(3, 6)))
    pads = (padding, padding) if isinstance(padding, int) else padding
    if not isinstance(pads, str):
        reach = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(size, pads, dilation, kernel, strict=True)]
        assume(min(reach) >= 1)
    elif pads == "valid":
        assume(min(n - d * (k - 1) for n, d, k in zip(size, dilation, kernel, strict=True)) >= 1)
    conv = nn.Conv2d(
        channels,
        outputs,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=mode,
        bias=draw(st.booleans()),
    ).double()
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    return conv, data(*batch, channels, *size)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@examples(60)
@given(case=convolutions())
def test_patches_and_output_rows_rebuild_the_weight_gradient(case: tuple[nn.Conv2d, Tensor]) -> None:
    conv, x = case
    model = nn.Sequential(conv)

    def loss() -> Tensor:
        return curved(model(x))

    oracles.assert_equal(rebuilt_gradient(engine(model), "0", loss), gradient(conv, loss), what=str(conv))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@given(case=convolutions(), at_once=st.sampled_from([1, 1000, 10**8]))
def test_input_factor_of_a_convolution_is_the_mean_outer_product_of_unfolded_patches(
    case: tuple[nn.Conv2d, Tensor], at_once: int
) -> None:
    conv, x = case
    model = nn.Sequential(conv)
    with pytest.MonkeyPatch.context() as patch:
        # Patches are formed some examples at a time; the result must not depend on how many.
        patch.setattr(patches, "PATCH_BYTES", at_once)
        kfc = observe(model, lambda: F.mse_loss(model(x), torch.zeros_like(model(x))), fisher="mc")
    rows = oracles.conv_rows(x, conv)
    oracles.assert_equal(kfc.layers["0"].A, rows.T @ rows / len(rows), what=f"A of {conv}")


@given(leading=st.lists(st.integers(1, 4), max_size=3), bias=st.booleans())
def test_input_factor_of_a_linear_is_the_mean_outer_product_of_its_input_vectors(
    leading: list[int], bias: bool
) -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=bias)).double()
    x = data(*leading, 3)
    kfc = observe(model, lambda: F.mse_loss(model(x), torch.zeros(2).double().expand(*leading, 2)))
    rows = oracles.linear_rows(x, bias=bias)
    oracles.assert_equal(kfc.layers["0"].A, rows.T @ rows / len(rows), what="A")


def test_rows_of_all_calls_of_a_module_together_rebuild_its_gradient() -> None:
    model = nn.ModuleDict({"shared": nn.Linear(3, 3), "conv": nn.Conv2d(1, 1, 2, padding="same", bias=False)}).double()
    x, images = data(4, 3), data(2, 1, 4, 4)

    def loss() -> Tensor:
        h = model["shared"](model["shared"](x).tanh())
        image = model["conv"](model["conv"](images).tanh())
        return curved(h) + curved(image)

    kfc = engine(model)
    for name, module in model.items():
        oracles.assert_equal(rebuilt_gradient(kfc, name, loss), gradient(module, loss), what=name)


class ReluInPlaceAfter(nn.Module):
    """A layer whose output an in-place operation overwrites at once."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.layer(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 4), (5, 3)),
        (nn.Linear(3, 4), (2, 5, 3)),
        (nn.Linear(3, 4), (3,)),
        (nn.Linear(3, 4, bias=False), (2, 5, 3)),
        (nn.Conv2d(2, 3, 2), (2, 2, 4, 4)),
        (nn.Conv2d(2, 3, 2), (2, 4, 4)),
    ],
    ids=["linear", "linear on 3-D input", "linear on 1-D input", "linear without bias", "conv", "unbatched conv"],
)
def test_an_in_place_relu_on_the_output_leaves_the_rows_exact(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = ReluInPlaceAfter(layer.double())
    x = data(*shape)

    def loss() -> Tensor:
        return curved(model(x))

    oracles.assert_equal(rebuilt_gradient(engine(model), "layer", loss), gradient(layer, loss), what="gradient")


def test_an_input_overwritten_after_the_loss_does_not_change_the_input_factor() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    x, y = data(4, 3), torch.zeros(4, 2).double()
    before = x.clone()
    kfc = engine(model, ema_decay=0.0)
    for overwrite in (False, True):
        with kfc.capture():
            loss = F.mse_loss(model(x), y)
        if overwrite:
            x.data.zero_()  # as a data loader that reuses its buffer does, behind autograd's back
        kfc.update(loss)
        kfc.precondition(lr=0.1) if not overwrite else None
    oracles.assert_equal(kfc.layers["0"].A, before.T @ before / 4, what="A")
