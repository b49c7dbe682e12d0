"""The form of a layer's factors, chosen from shapes by their cost relative to the layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_kfc import KFC
from lightning_kfc.curvature.find_layers import find_layers
from lightning_kfc.factors.cost import MOST_IN_A_STEP, cost_in_a_step
from lightning_kfc.layers import Adapter, Forward
from lightning_kfc.settings import Settings
from tests.helpers import oracles
from tests.helpers.nets import classes, data, observe, train_step

ORDINARY: dict[str, Callable[[], nn.Module]] = {
    "first layer of a ResNet": lambda: nn.Conv2d(3, 64, 7, 2, 3, bias=False),
    "widest layer of a ResNet-50": lambda: nn.Conv2d(512, 512, 3, padding=1, bias=False),
    "bottleneck": lambda: nn.Conv2d(2048, 512, 1, bias=False),
    "ResNeXt": lambda: nn.Conv2d(128, 128, 3, padding=1, groups=32, bias=False),
    "MobileNet": lambda: nn.Conv2d(96, 96, 3, padding=1, groups=96, bias=False),
    "EfficientNet": lambda: nn.Conv2d(240, 240, 5, padding=2, groups=240, bias=False),
    "ConvNeXt": lambda: nn.Conv2d(96, 96, 7, padding=3, groups=96),
    "denoiser's last layer": lambda: nn.Conv2d(64, 1, 3),
    "depthwise over time": lambda: nn.Conv1d(64, 64, 31, padding=15, groups=64),
    "autoencoder": lambda: nn.Linear(784, 1000),
    "autoencoder's code": lambda: nn.Linear(250, 30),
    "classifier on a flat image": lambda: nn.Linear(4096, 10),
    "classifier of AlexNet": lambda: nn.Linear(9216, 4096),
    "feed-forward layer of a large transformer": lambda: nn.Linear(2048, 8192),
    "last up-convolution of a large U-Net": lambda: nn.Conv2d(1024, 512, 3, padding=1),
    "value head": lambda: nn.Linear(512, 1),
    "decoder": lambda: nn.ConvTranspose2d(64, 32, 4, 2, 1),
}


def adapter(module: nn.Module, max_factor_dim: int | None = Settings().max_factor_dim) -> Adapter:
    return find_layers(nn.Sequential(module), Settings(max_factor_dim=max_factor_dim)).layers["0"].adapter


@pytest.mark.parametrize("make", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_layers_keep_their_dense_factors(make: Callable[[], nn.Module]) -> None:
    chosen = adapter(make())
    assert chosen.diagonal_sides() == {}
    assert all(len(shape) == 3 for shape in chosen.factor_shapes().values())
    assert chosen.approximation() == ""


@pytest.mark.parametrize("attention", [nn.MultiheadAttention(64, 4), nn.TransformerEncoderLayer(64, 4, 256)])
def test_transformers_keep_their_dense_factors(attention: nn.Module) -> None:
    found = find_layers(attention, Settings())
    assert not any(layer.adapter.diagonal_sides() for layer in found.layers.values())


@pytest.mark.parametrize("kernel", [3, 7, 11, 13, 15, 21, 31])
def test_statistics_of_a_depthwise_convolution_take_no_more_than_the_stated_multiple(kernel: int) -> None:
    """Counted by torch: the multiply-adds of the products, without those of the inverse."""
    module = nn.Conv2d(4, 4, kernel, padding=kernel // 2, groups=4)
    x = data(4, 4, 32, 32).float().requires_grad_()
    with FlopCounterMode(display=False) as own:
        output = module(x)
        output.backward(torch.ones_like(output))
    chosen = adapter(module)
    with torch.no_grad(), FlopCounterMode(display=False) as taken:
        record = chosen.record(Forward((x.detach(),), {}, output.detach()))
        chosen.statistics(record, torch.ones_like(output))
    ratio = taken.get_total_flops() / own.get_total_flops()
    assert ratio <= MOST_IN_A_STEP, f"statistics take {ratio:.1f} x the layer's own"


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "kernel"), [(2, 17), (8, 31), (3, 21)])
def test_a_large_depthwise_kernel_has_the_diagonal_of_its_dense_factor(channels: int, kernel: int) -> None:
    module = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels).double()
    x = data(2, channels, 9, 8)

    def loss() -> torch.Tensor:
        return F.mse_loss(module(x), torch.zeros_like(x))

    dense = observe(module, loss, max_factor_dim=None).layers[""]
    found = observe(module, loss).layers[""]
    oracles.assert_equal(found.factors["A"], dense.factors["A"].diagonal(dim1=-2, dim2=-1), what="A")
    oracles.assert_equal(found.factors["G"], dense.factors["G"], what="G")


def test_the_coverage_states_what_was_chosen_and_why() -> None:
    kfc = KFC(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 31, padding=15, groups=8)))
    row = next(row for row in kfc.coverage() if row.parameter == "1.weight")
    assert row.factor_shapes == {"A": (8, 962), "G": (8, 1, 1)}
    cost = cost_in_a_step(962, 1)
    assert row.reason.startswith(f"A diagonal: 8 dense ones would cost {cost:,.0f} x the layer's forward and backward")
    assert "8 x (A 962 diag, G 1)" in str(kfc.coverage())


def test_no_bound_on_the_size_is_none_on_the_cost() -> None:
    chosen = adapter(nn.Conv2d(8, 8, 31, padding=15, groups=8), max_factor_dim=None)
    assert chosen.factor_shapes() == {"A": (8, 962, 962), "G": (8, 1, 1)}


def test_a_layer_whose_weight_is_frozen_has_nothing_to_be_made_cheaper() -> None:
    module = nn.Conv2d(8, 8, 31, padding=15, groups=8)
    module.weight.requires_grad_(False)
    assert adapter(module).diagonal_sides() == {}


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "ekfac"])
def test_a_large_depthwise_kernel_trains(inverse: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 4, 4),
        nn.Conv2d(4, 4, 31, padding=15, groups=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    kfc = KFC(net, inverse=inverse)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = data(8, 3, 16, 16).float(), classes(8, count=3)
    losses = [float(train_step(kfc, optimizer, lambda: F.cross_entropy(net(x), y))) for _ in range(12)]
    assert losses[-1] < losses[0]
    assert not any(kfc.events.state_dict().values())
