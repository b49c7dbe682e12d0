"""Models that nobody here wrote, 30 steps each with the defaults: the loss falls, every parameter is accounted for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.foreign_models import MODELS
from lightning_kfc import KFCCallback
from tests.engine.test_zoo import Task
from tests.helpers.lightning_nets import QUIET, trainer

pytestmark = [*QUIET, pytest.mark.slow]

STEPS = 30


# The warnings of other packages; those of the callback are errors.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.filterwarnings("error:.*KFC")
@pytest.mark.parametrize("name", MODELS)
def test_a_foreign_model_trains_with_the_defaults_and_is_accounted_for(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]
    task, callback = Task(model.make(), model.loss, lr=0.5), KFCCallback()
    trainer(callback, max_steps=STEPS).fit(task, DataLoader([model.batch()] * STEPS, batch_size=None))
    start, end = sum(task.losses[:3]) / 3, sum(task.losses[-3:]) / 3
    treatments: Counter[str] = Counter()
    for row in callback.kfc.coverage():
        treatments[row.treatment] += row.numel
    print(f"{name}: loss {start:.3g} to {end:.3g}, {dict(treatments)}, {callback.kfc.events}")
    assert end < 0.8 * start
    # No parameter has its plain gradient.
    assert set(treatments) <= {"kfc", "block", "diagonal", "frozen"}
    assert sum(treatments.values()) - treatments["frozen"] == sum(
        p.numel() for p in task.parameters() if p.requires_grad
    )
    assert callback.kfc.reviewer.active
    allowed = {"undone_steps", "shortened_steps", "unrecognised_losses"}
    assert {event for event, count in callback.kfc.events.state_dict().items() if count} <= allowed
