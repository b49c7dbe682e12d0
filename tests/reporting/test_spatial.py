"""Autocorrelation and homogeneity of maps, and how they are collected from a step."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC
from lightning_kfc.analysis import spatial_statistics
from lightning_kfc.monitoring.spatial import autocorrelation, inhomogeneity
from lightning_kfc.reporting.map_watcher import MapWatcher
from tests.helpers import oracles
from tests.helpers.nets import classes, data, double, small_conv_net


class Total(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3))


@pytest.mark.parametrize("centred", [True, False])
def test_autocorrelation_is_the_mean_of_each_channel_s_correlation_between_two_locations(centred: bool) -> None:
    maps = data(3, 2, 4, 5) + 0.5
    found = autocorrelation(maps, 2, centred=centred)
    assert found.shape == (5, 5)
    x = maps - maps.mean((0, 2, 3), keepdim=True) if centred else maps
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            channels = []
            for c in range(2):
                pairs = [
                    (float(x[n, c, i, j]), float(x[n, c, i + dy, j + dx]))
                    for n in range(3)
                    for i in range(4)
                    for j in range(5)
                    if 0 <= i + dy < 4 and 0 <= j + dx < 5
                ]
                size = math.sqrt(sum(a * a for a, _ in pairs) * sum(b * b for _, b in pairs))
                channels.append(sum(a * b for a, b in pairs) / size)
            assert float(found[2 + dy, 2 + dx]) == pytest.approx(sum(channels) / 2), (dy, dx)
    assert float(found[2, 2]) == 1


def test_white_noise_smoothed_by_a_box_has_a_triangle_as_autocorrelation() -> None:
    noise = data(200, 1, 22, 22)
    smooth = F.avg_pool2d(noise, 3, stride=1)
    found = autocorrelation(smooth, 3, centred=True)
    triangle = torch.tensor([0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0]).double()
    # The spread of a mean over 200 * 400 dependent locations is a few thousandths.
    assert float((found - torch.outer(triangle, triangle)).abs().max()) < 0.02
    assert float(autocorrelation(noise, 3, centred=True).fill_diagonal_(0).abs().max()) < 0.02


def test_dead_channels_are_left_out_and_a_dead_layer_has_no_correlation() -> None:
    maps = data(3, 2, 4, 4)
    with_dead = torch.cat([maps, torch.zeros(3, 1, 4, 4).double()], 1)
    oracles.assert_equal(autocorrelation(with_dead, 1, centred=True), autocorrelation(maps, 1, centred=True))
    assert inhomogeneity(with_dead, centred=True) == pytest.approx(inhomogeneity(maps, centred=True))
    assert bool(autocorrelation(torch.ones(2, 1, 3, 3), 1, centred=True).isnan().all())
    assert inhomogeneity(torch.ones(2, 1, 3, 3), centred=True) == 0


def test_inhomogeneity_is_the_spread_of_the_second_moment_over_locations() -> None:
    signs = torch.randint(0, 2, (7, 2, 3, 3), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    assert inhomogeneity(signs, centred=False) == 0
    # Second moments 1 and 9 at half of the locations each: mean 5, deviation 4.
    halves = signs[..., :2].clone()
    halves[..., 1] *= 3
    assert inhomogeneity(halves, centred=False) == pytest.approx(4 / 5)
    # Noise alone: the variance of a mean of N squares of normal numbers is 2 / N.
    assert inhomogeneity(data(200, 4, 16, 16), centred=False) == pytest.approx(math.sqrt(2 / 200), rel=0.1)


def test_derivatives_of_terms_at_single_locations_are_uncorrelated() -> None:
    # The paper's assumption holds exactly: each term is a pixel of its own, and the layers above are pointwise.
    model, x = double(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 1)), data(4, 2, 6, 6)
    report = spatial_statistics(model, lambda: F.mse_loss(model(x), torch.zeros(4, 2, 4, 4).double()))
    for layer in report.layers:
        derivatives = report.of(layer, "derivatives")
        assert derivatives.largest == 0
        assert float(derivatives.autocorrelation[3, 3]) == 1
        assert derivatives.inhomogeneity < 1e-12
        # 16 locations and 2 outputs: so many back-propagations of 4 examples.
        assert derivatives.examples == 4 * 32
    assert report.of("0", "activations").examples == 4


def test_derivatives_of_a_sum_over_space_are_perfectly_correlated() -> None:
    model, x = double(nn.Conv2d(2, 3, 3), Total()), data(4, 2, 6, 6)
    report = spatial_statistics(model, lambda: F.mse_loss(model(x), torch.zeros(4, 3).double()), radius=2)
    derivatives = report.of("0", "derivatives")
    oracles.assert_equal(derivatives.autocorrelation, torch.ones(5, 5).double())
    assert derivatives.nearest == pytest.approx(1)
    oracles.assert_equal(
        report.of("0", "activations").autocorrelation, autocorrelation(x, 2, centred=True), what="activations"
    )


def test_the_report_prints_a_line_for_each_quantity_and_names_what_it_has() -> None:
    model, x, y = small_conv_net(), data(4, 2, 6, 6), classes(4, count=3)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    report = spatial_statistics(model, loss, fisher="mc")
    lines = str(report).splitlines()
    assert [line.split()[:2] for line in lines[3:-1]] == [
        [layer, quantity] for layer in ("0", "2") for quantity in ("activations", "derivatives")
    ]
    assert report.of("2", "derivatives").examples == 4
    with pytest.raises(KeyError, match="layer '5'"):
        report.of("5", "derivatives")
    with pytest.raises(ValueError, match="need a Conv2d"):
        spatial_statistics(model, loss, layers="5")


def test_a_watcher_keeps_the_seeds_derivatives_below_an_in_place_activation_and_not_the_loss_s() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 3)).double()
    x, y = data(5, 2, 6, 6), classes(5, count=3)
    kfc = KFC(model, fisher="exact")
    watcher = MapWatcher({"0": model[0]}, radius=1, max_channels=None)
    watcher.attach()
    with kfc.capture():
        loss = F.cross_entropy(model(x), y)
    watcher.detach()
    assert not model[0]._forward_hooks
    watcher.listening = True
    kfc.update(loss)
    watcher.listening = False
    loss.backward()
    activations, derivatives = watcher.statistics()
    # What G was made of: the sum over maps and locations of the outer products, up to the seeds' scale.
    g = torch.cat(watcher._derivatives["0"]).flatten(2)
    assert derivatives.examples == len(g) == 15
    ratio = torch.einsum("nct,ndt->cd", g, g) / kfc.layers["0"].G
    assert float(ratio.std() / ratio.mean()) < 1e-12
    assert activations.examples == 5


def test_a_watcher_keeps_few_examples_channels_and_passes_and_takes_unbatched_maps() -> None:
    model, x = double(nn.Conv2d(1, 8, 3)), data(6, 1, 5, 5)
    watcher = MapWatcher({"0": model[0]}, max_examples=2, max_channels=3, max_passes=1)
    watcher.attach()
    watcher.listening = True
    for _ in range(2):
        model(x).sum().backward()
    watcher.detach()
    activations, derivatives = watcher.statistics()
    assert (activations.examples, derivatives.examples) == (4, 2)
    assert watcher._derivatives["0"][0].shape == (2, 3, 3, 3)
    single = MapWatcher({"0": model[0]})
    single.attach()
    model(x[0])
    with torch.no_grad():
        model(x)
    single.detach()
    assert [entry.examples for entry in single.statistics()] == [1]


def test_a_copied_model_carries_hooks_that_do_nothing() -> None:
    model, x = double(nn.Conv2d(1, 2, 3)), data(3, 1, 5, 5)
    watcher = MapWatcher({"0": model[0]})
    watcher.attach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(x)
        assert watcher.statistics() == ()
    model(x)
    watcher.detach()
    assert len(watcher.statistics()) == 1


def test_maps_that_are_not_finite_are_not_summed_up() -> None:
    model = double(nn.Conv2d(1, 2, 3))
    watcher = MapWatcher({"0": model[0]})
    watcher.attach()
    model(data(2, 1, 5, 5) * math.inf)
    watcher.detach()
    assert watcher.statistics() == ()
