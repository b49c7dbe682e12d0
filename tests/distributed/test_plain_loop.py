"""The engine without Lightning: plain loops in which every rank has a part of the batch."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from lightning_kfc.factors.inverses import INVERSES
from lightning_kfc.scheduling.tracker import RefreshTracker
from tests.distributed.pool import Ranks
from tests.helpers import oracles
from tests.helpers.nets import classes, data, engine, small_conv_net, train_step

pytestmark = pytest.mark.slow


def _values(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The corrected eigenvalues after two steps of which only the first refreshes the basis.

    There are enough examples for factors of full rank: in a null space the basis would be arbitrary.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = small_conv_net()
    kfc = engine(model, inverse="ekfac", inverse_every_n_steps=4, warmup_steps=0, max_factor_dim=20)
    for step in range(2):
        with kfc.capture():
            loss = F.cross_entropy(model((1 + step) * x), y)
        kfc.update(loss)
        loss.backward()
        kfc.precondition(lr=0.1)
    assert all(isinstance(layer.inverse, INVERSES["ekfac"]) for layer in kfc.layers.values())
    return {name: layer.inverse.state()["values"] for name, layer in kfc.layers.items()}  # type: ignore[misc, union-attr]  # EKFAC has an inverse, with values


def values_of_a_rank() -> dict[str, Tensor]:
    half = slice(20 * dist.get_rank(), 20 * dist.get_rank() + 20)
    return _values(data(40, 2, 6, 6)[half], classes(40, count=3)[half])


def test_two_ranks_with_half_a_batch_each_have_the_eigenvalues_of_one_with_the_whole(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(values_of_a_rank)
    for name, expected in _values(data(40, 2, 6, 6), classes(40, count=3)).items():
        assert torch.equal(first[name], second[name]), "ranks must step alike"
        oracles.assert_equal(first[name], expected, rtol=1e-8, what=f"eigenvalues of {name}")


def dates_asked() -> list[int]:
    """How often each of some steps, with and without statistics, asks for the date of a layer's inverse."""
    model, asked = small_conv_net(), []
    kfc = engine(model, factor_every_n_steps=4, inverse_every_n_steps=4, warmup_steps=0, kl_clip=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(9):
        with mock.patch.object(
            RefreshTracker, "new_inverse", autospec=True, side_effect=RefreshTracker.new_inverse
        ) as at:
            train_step(kfc, optimizer, lambda: F.cross_entropy(model(data(8, 2, 6, 6)), classes(8, count=3)))
        asked.append(at.call_count)
    return asked


def test_the_two_halves_of_a_step_request_once_each_the_date_of_each_inverse(two_ranks: Ranks) -> None:
    layers = len(engine(small_conv_net()).layers)
    # In update() and in precondition(), with several ranks as with one.
    assert [*two_ranks.run(dates_asked), dates_asked()] == [[2 * layers] * 9] * 3
