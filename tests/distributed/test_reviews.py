"""Reviews where the loss of a rank depends on what the others have computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from lightning_kfc import KFCCallback
from lightning_kfc.trust_region.outcome import Outcome, Verdict
from lightning_kfc.trust_region.region import TrustRegion
from lightning_kfc.trust_region.snapshot import StepSnapshot
from tests.distributed.nets import EXACT, Net, dense_net, images, loader, trainer
from tests.distributed.pool import Ranks
from tests.helpers.harness import QUIET

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


class Contrastive(Net):
    """Contrasts its own examples with those of all ranks, whose features are gathered."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss_of(batch[0])

    def loss_of(self, x: Tensor) -> Tensor:
        features = F.normalize(self.net(x), dim=1)
        gathered = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, features.detach())
        gathered[dist.get_rank()] = features
        own = torch.arange(len(x)) + len(x) * dist.get_rank()
        loss: Tensor = F.cross_entropy(features @ torch.cat(gathered).T / 0.2, own)
        return loss


def review_contrastive() -> tuple[list[float], list[float], int, bool]:
    """Losses after the steps as reviews have them, and as a fresh evaluation has them."""
    reviewed: list[float] = []
    fresh: list[float] = []
    judge, outcome_of = TrustRegion.judge, StepSnapshot.outcome

    def noting(region: TrustRegion, outcome: Outcome, size: float) -> Verdict:
        reviewed.append(outcome.loss_after)
        return judge(region, outcome, size)

    def evaluate(before: StepSnapshot, *arguments: Any) -> Outcome | None:
        with torch.no_grad():
            loss = module.loss_of(batches[-1])
        dist.all_reduce(loss)
        fresh.append(float(loss) / dist.get_world_size())
        return outcome_of(before, *arguments)

    class Keeping(Contrastive):
        def training_step(self, batch: Any, index: int) -> Tensor:
            batches.append(batch[0])
            return super().training_step(batch, index)

    batches: list[Tensor] = []
    module, callback = Keeping(dense_net), KFCCallback(**EXACT)
    TrustRegion.judge, StepSnapshot.outcome = noting, evaluate  # type: ignore[method-assign]  # in this process alone
    try:
        strategy = DDPStrategy(process_group_backend="gloo")
        trainer(callback, strategy=strategy, devices=2).fit(module, loader(images(32), 4))
    finally:
        TrustRegion.judge, StepSnapshot.outcome = judge, outcome_of  # type: ignore[method-assign]  # put back
    return reviewed, fresh, callback.kfc.events.missed_reviews, callback.kfc.reviewer.active


@pytest.mark.slow
def test_a_loss_of_what_all_ranks_have_gathered_is_replayed_by_all_of_them(two_ranks: Ranks) -> None:
    for reviewed, fresh, missed, reviews in two_ranks.run(review_contrastive):
        assert len(reviewed) == len(fresh) >= 4
        assert reviewed == pytest.approx(fresh, rel=1e-9)
        assert missed == 0
        assert reviews


def train_with_a_rank_without_a_loss() -> tuple[int, bool]:
    class Weighted(Net):
        """The second rank gives its examples no weight, in every second batch."""

        def training_step(self, batch: Any, index: int) -> Tensor:
            return super().training_step(batch, index) * float(dist.get_rank() == 0 or index % 2)

    callback = KFCCallback(**EXACT)
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer(callback, strategy=strategy, devices=2).fit(Weighted(dense_net), loader(images(32), 4))
    return callback.kfc.events.missed_reviews, callback.kfc.reviewer.active


@pytest.mark.slow
def test_steps_in_which_the_loss_of_a_rank_is_0_are_reviewed(two_ranks: Ranks) -> None:
    assert two_ranks.run(train_with_a_rank_without_a_loss) == [(0, True)] * 2
