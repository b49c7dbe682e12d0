"""The user's own random draws are those of the run without the callback."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from lightning_kfc import KFCCallback
from tests.helpers.harness import QUIET, Classifier, fit, images

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


class Augmented(Dataset):
    """Images that each of the three random streams changes a little, with the draws noted."""

    def __init__(self, draws: list[Any]) -> None:
        self.data, self.draws = images(24), draws

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[index]
        noise = (float(torch.rand(())), float(np.random.rand()), random.random())
        self.draws.append((index, *noise))
        return x + sum(noise) / 100, y


class NotedDropout(nn.Module):
    """Dropout whose masks are noted, and which draws from the streams of Python and NumPy as well."""

    def __init__(self, draws: list[Any], *, used: bool) -> None:
        super().__init__()
        self.draws, self.used = draws, used

    def forward(self, x: Tensor) -> Tensor:
        mask = F.dropout(torch.ones_like(x), 0.5)
        self.draws.append((mask.sum(1).tolist(), random.random(), np.random.rand()))
        return x * mask if self.used else x


class Checkpointed(nn.Module):
    """Runs its net again in every backward, without keeping the random state."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False, preserve_rng_state=False)


class Streams(pl.Callback):
    """Notes the states of the three streams at the end of each step."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_batch_end(self, *args: Any) -> None:
        _, key, position, *_ = np.random.get_state()
        self.states.append((torch.get_rng_state().numpy().tobytes(), random.getstate(), (key.tobytes(), position)))


@pytest.fixture(autouse=True)
def _streams_put_back() -> Iterator[None]:
    kept, numpy_kept = random.getstate(), np.random.get_state()
    yield
    random.setstate(kept)
    np.random.set_state(numpy_kept)


def run(kfc: KFCCallback | None, *, checkpointed: bool) -> tuple[list[Any], list[Any]]:
    pl.seed_everything(5, verbose=False)
    draws: list[Any] = []
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), NotedDropout(draws, used=not checkpointed), nn.Linear(8, 3))
    streams = Streams()
    data = DataLoader(Augmented(draws), batch_size=8, shuffle=True)
    module = Classifier(Checkpointed(net) if checkpointed else net)
    fit(module, kfc=kfc, data=data, callbacks=[streams], max_steps=7)
    return draws, streams.states


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_masks_shuffles_and_streams_are_those_of_the_run_without_the_callback(fisher: str) -> None:
    plain = run(None, checkpointed=False)
    ours = run(KFCCallback(damping=1e12, fisher=fisher), checkpointed=False)
    assert len(plain[0]) > 7 * 8
    assert ours[0] == plain[0]
    assert ours[1] == plain[1]


def test_what_a_checkpointed_forward_draws_again_for_us_is_given_back() -> None:
    plain = run(None, checkpointed=True)
    ours = run(KFCCallback(damping=1e12), checkpointed=True)
    # Our back-propagation ran the net once more on due steps, which all of these are: those draws come extra.
    assert len(ours[0]) == len(plain[0]) + 7
    assert ours[1] == plain[1]
