"""Models and losses that change in a fit of several ranks: they stay together, and none waits for another."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from lightning_kfc import KFC, KFCCallback
from lightning_kfc.distributed.agreement import RanksDisagreeError
from lightning_kfc.estimation import loss_statistics
from tests.distributed.nets import EXACT, Net, difference, images, loader, outcome, trainer
from tests.distributed.pool import Ranks
from tests.helpers.harness import QUIET

pytestmark = [*(pytest.mark.filterwarnings(line) for line in QUIET), pytest.mark.slow]
ROUNDING = 1e-9


class Swapped(Net):
    """Another head takes part from the second epoch on; DDP, which ignores later parameters, has it from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(16, 3).double()
        self.later = nn.ParameterList(self.spare.parameters())
        del self.spare

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            head = nn.Linear(16, 3).double()
            head.weight, head.bias = self.later
            self.later = nn.ParameterList()
            self.net[-1] = head


def swapped_fit(placement: str, ranks: int) -> dict[str, Tensor]:
    strategy: Any = "auto"
    if ranks > 1:
        strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    module, callback = Swapped(), KFCCallback(**{**EXACT, "placement": placement})
    used = trainer(callback, strategy=strategy, devices=ranks, max_epochs=2)
    used.fit(module, loader(images(24), 8 // ranks))
    return outcome(module, callback)


@pytest.mark.parametrize("placement", ["comm-opt", "mem-opt"])
def test_two_ranks_find_a_new_layer_and_end_where_one_rank_ends(two_ranks: Ranks, placement: str) -> None:
    first, second = two_ranks.run(swapped_fit, placement, 2)
    expected = swapped_fit("comm-opt", 1)
    if placement == "comm-opt":
        assert difference(first, second) == 0
        assert difference(first, expected) < ROUNDING
    else:
        # Each rank holds a part of the factors and inverses, and together they hold all.
        assert set(first) | set(second) == set(expected)
        for mine in (first, second):
            assert difference(mine, {name: expected[name] for name in mine}) < ROUNDING


def plain_steps(broken: str, bad_rank: int) -> tuple[list[dict[str, Tensor]], dict[str, int], list[str]]:
    """The factors after each of 4 steps, the third of which fails on one rank; counts and messages."""
    rank = dist.get_rank()
    net = Net().net
    x, y = images(16, seed=rank).tensors
    kfc, factors = KFC(net, **EXACT), []
    original = loss_statistics.back_propagate

    def raising(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("on one rank")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            bad = step == 2 and rank == bad_rank
            net.zero_grad()
            with kfc.capture():
                if bad and broken == "unrecognised":
                    loss = net(x).cosh().log().mean()
                elif bad and broken == "zero":
                    loss = net(x).sum() * 0
                elif bad and broken == "no gradient":
                    loss = F.cross_entropy(net(x), y).detach()
                else:
                    loss = F.cross_entropy(net(x), y)
            if bad and broken == "error":
                loss_statistics.back_propagate = raising
            try:
                kfc.update(loss)
            finally:
                loss_statistics.back_propagate = original
            if loss.requires_grad:
                loss.backward()
            for parameter in net.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(parameter.grad)
            kfc.precondition(lr=0.1)
            factors.append({f"{n}.{f}": v.clone() for n, e in kfc.layers.items() for f, v in e.factors.items()})
    counts = {name: count for name, count in kfc.events.state_dict().items() if count}
    return factors, counts, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("broken", ["error", "unrecognised", "zero", "no gradient"])
def test_what_goes_wrong_with_the_statistics_of_one_rank_leaves_the_ranks_together(
    two_ranks: Ranks, broken: str, bad_rank: int
) -> None:
    told = two_ranks.run(plain_steps, broken, bad_rank)
    (first, *_), (second, *_) = told
    for step, (mine, theirs) in enumerate(zip(first, second, strict=True)):
        assert difference(mine, theirs) == 0, step
    unchanged = all(torch.equal(first[2][name], first[1][name]) for name in first[1])
    assert unchanged == (broken == "error"), "a step that fails on one rank is dropped by all"
    (_, counts, said), (_, others, also) = told[bad_rank], told[1 - bad_rank]
    expected = {"error": "failed_statistics", "unrecognised": "unrecognised_losses"}
    assert counts[expected.get(broken, "losses_without_gradient")] == 1
    if broken == "error":
        assert counts.pop("failed_statistics") == 1
        assert counts == others == {"nonfinite_statistics": 1}
    else:
        assert others == {}
    assert (said if bad_rank == 1 else also) == [], "the first rank speaks for all"


def changed_on_one_rank() -> str:
    net = Net().net
    kfc = KFC(net, **EXACT)
    x, y = images(8).tensors
    for step in range(2):
        if step == 1:
            net[-1] = nn.Linear(16, 3 + dist.get_rank()).double()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with kfc.capture():
                    loss = F.cross_entropy(net(x), y)
        except RanksDisagreeError as error:
            return str(error)
        kfc.update(loss)
        loss.backward()
        kfc.precondition(lr=0.1)
    return "no error"


def test_ranks_whose_models_have_changed_otherwise_get_an_error(two_ranks: Ranks) -> None:
    for said in two_ranks.run(changed_on_one_rank):
        assert "layers: " in said
