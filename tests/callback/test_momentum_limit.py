"""With ``kl_clip="auto"`` the momentum of SGD is limited: a recipe with 0.9 trains as the recommended one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_kfc import KFCCallback
from tests.helpers.harness import QUIET, Classifier, fit, images, loader, weights

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def trained(momentum: float, lr: float, *, trainer: dict[str, Any] | None = None, **options: Any) -> Tensor:
    """The weights after eight steps of SGD with the same weight decay."""
    torch.manual_seed(0)
    module = Classifier(optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=momentum, weight_decay=1e-3)).double()
    x, y = images(128).tensors
    kfc = KFCCallback(average_weights=None, seed=0, **options)
    fit(module, kfc=kfc, data=loader(TensorDataset(x.double(), y)), max_steps=8, max_epochs=-1, **(trainer or {}))
    return weights(module)


@pytest.mark.parametrize("trainer", [{}, {"accumulate_grad_batches": 2}], ids=["each batch", "accumulated"])
def test_training_with_a_high_momentum_is_that_of_the_limit_and_a_longer_rate(trainer: dict[str, Any]) -> None:
    limited, recommended = (trained(*recipe, trainer=trainer) for recipe in ((0.9, 0.1), (0.5, 0.5)))
    torch.testing.assert_close(limited, recommended, rtol=1e-9, atol=1e-12)


def test_a_number_for_the_bound_leaves_the_momentum_as_it_is() -> None:
    kept = trained(0.9, 0.1, kl_clip=0.03)
    other = trained(0.5, 0.5, kl_clip=0.03)
    assert float((kept - other).norm() / other.norm()) > 1e-3
