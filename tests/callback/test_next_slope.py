"""The radius follows the slope of the last step on the next batch in every way of making a step."""

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_kfc import KFCCallback
from lightning_kfc.trust_region.region import TrustRegion
from tests.helpers.lightning_nets import QUIET, Manual, Regression, loader, trainer, vectors

pytestmark = QUIET

STEPS = 6


@pytest.fixture(autouse=True)
def no_step_is_reviewed(monkeypatch):
    """The radius is moved by the slope alone."""
    monkeypatch.setattr(TrustRegion, "review_planned", lambda self, step: False)


@pytest.fixture
def shares(monkeypatch):
    """All slopes that the radius has followed."""
    found, follow = [], TrustRegion.follow_next_slope

    def noting(region, share):
        found.append(share)
        follow(region, share)

    monkeypatch.setattr(TrustRegion, "follow_next_slope", noting)
    return found


def fit(module, data, batch_size, **options):
    torch.manual_seed(0)
    callback = KFCCallback(fisher="exact", damping=0.01, average_weights=None)
    trainer(callback, **options).fit(module, loader(data, batch_size))
    return callback.kfc.reviewer.region.radius


def seeded(kind, **options):
    torch.manual_seed(3)
    return kind(**options)


@pytest.mark.parametrize(
    ("kind", "batch_size", "options"),
    [(Regression, 2, {"accumulate_grad_batches": 4}), (Manual, 8, {}), (Regression, 8, {"gradient_clip_val": 1e6})],
)
def test_it_does_so_with_accumulation_manual_steps_and_clipping_as_with_whole_batches(
    kind, batch_size, options, shares
):
    data = vectors(8 * STEPS)
    radius = fit(seeded(Regression), data, 8)
    expected = list(shares)
    shares.clear()
    assert len(expected) == STEPS - 1
    assert fit(seeded(kind), data, batch_size, **options) == pytest.approx(radius, rel=1e-9)
    assert shares == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_steps_that_clipping_makes_tiny_keep_their_slope_and_lengthen_the_radius(algorithm, shares):
    # The same batch again and again, whose slope falls by the step alone.
    x, y = vectors(8).tensors
    data = TensorDataset(x.repeat(STEPS, 1), y.repeat(STEPS))
    plain = fit(seeded(Regression, lr=0.5), data, 8)
    assert max(shares) < 0.99
    shares.clear()
    clipped = fit(seeded(Regression, lr=0.5), data, 8, gradient_clip_val=1e-6, gradient_clip_algorithm=algorithm)
    assert shares == pytest.approx([1.0] * (STEPS - 1), abs=1e-4)
    assert clipped > plain
