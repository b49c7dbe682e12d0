"""An error on one rank ends all ranks with an error that names the way out; no rank waits forever."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from lightning_kfc import KFC, ExponentialSchedule, KFCCallback
from lightning_kfc.distributed.agreement import RanksDisagreeError
from tests.distributed.nets import EXACT, Net, images, loader, trainer
from tests.distributed.pool import Ranks, context, free_port, prepare_rank
from tests.helpers.harness import QUIET

pytestmark = [*(pytest.mark.filterwarnings(line) for line in QUIET), pytest.mark.slow]
TIMEOUT = 3


def disagreement(first: dict[str, Any], second: dict[str, Any], width: int) -> str:
    """The error of a training that gives its ranks these settings, and the second one a layer of another width."""
    rank = dist.get_rank()
    hidden = width if rank == 1 else 8
    module = Net(lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, hidden), nn.Tanh(), nn.Linear(hidden, 3)))
    kfc = KFC(module, **(second if rank == 1 else first))
    try:
        with kfc.capture():
            return "no error"
    except RanksDisagreeError as error:
        return str(error)


@pytest.mark.parametrize(
    ("first", "second", "width", "said"),
    [
        ({}, {"damping": 0.1}, 8, "damping: 0.01 on rank 0, 0.1 on rank 1"),
        (
            {"damping": ExponentialSchedule(1.0, 0.1, 10)},
            {"damping": ExponentialSchedule(1.0, 0.2, 10)},
            8,
            "damping: ExponentialSchedule(start=1.0, end=0.1, steps=10) on rank 0, ExponentialSchedule(start=1.0, "
            "end=0.2, steps=10) on rank 1",
        ),
        ({}, {"placement": "mem-opt", "seed": 3}, 8, "placement: 'auto' on rank 0, 'mem-opt' on rank 1"),
        ({}, {"exclude": ["net.3"]}, 8, "exclude: None on rank 0, ('net.3',) on rank 1"),
        ({}, {}, 9, "layers: net.1 (Linear, A (1, 37, 37), G (1, 8, 8))"),
        ({}, {}, 8, "no error"),
    ],
)
def test_ranks_that_disagree_get_an_error_that_names_it_before_the_first_step(
    two_ranks: Ranks, first: dict[str, Any], second: dict[str, Any], width: int, said: str
) -> None:
    told = two_ranks.run(disagreement, first, second, width)
    assert told[0] == told[1]
    assert said in told[0]


def meanwhile(train: Callable[[], None], rank: int, size: int, port: int, answer: Any) -> None:
    """Train on one rank of a group with a short timeout, and return the outcome."""
    prepare_rank(rank, size, port)
    address, timeout = f"tcp://127.0.0.1:{port}", timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=timeout)
    started = time.monotonic()
    try:
        train()
        ended = "no error"
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
    answer.send_bytes(pickle.dumps((ended, time.monotonic() - started)))
    # The process group's own end would wait for the other rank.
    os._exit(0)


def on_the_first_of_two(train: Callable[[], None]) -> tuple[str, float]:
    server, port = context(), free_port()
    ours, theirs = server.Pipe()
    ranks = [server.Process(target=meanwhile, args=(train, rank, 2, port, theirs)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        assert ours.poll(60), "the first rank waits forever"
        return pickle.loads(ours.recv_bytes())
    finally:
        for process in ranks:
            process.kill()
            process.join()


def leave(how: str) -> None:
    if dist.get_rank() == 1:
        os._exit(1) if how == "dies" else time.sleep(60)


def plain_loop(how: str, placement: str) -> None:
    """Two steps without DDP, so that the engine's own messages are the only ones; then a rank is gone."""
    x, y = images(16).tensors
    net = Net().net
    kfc = KFC(net, **EXACT, placement=placement)
    for step in range(3):
        if step == 2:
            leave(how)
        net.zero_grad()
        with kfc.capture():
            loss = F.cross_entropy(net(x), y)
        kfc.update(loss)
        loss.backward()
        kfc.precondition(lr=0.1)


def plain_loop_dies() -> None:
    plain_loop("dies", "comm-opt")


def plain_loop_hangs() -> None:
    plain_loop("hangs", "mem-opt")


class Leaving(Net):
    def training_step(self, batch: Any, index: int) -> Any:
        if index == 1:
            leave("dies")
        return super().training_step(batch, index)


def trainer_dies() -> None:
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer(KFCCallback(**EXACT), strategy=strategy, devices=2).fit(Leaving(), loader(images(24), 4))


@pytest.mark.parametrize("train", [plain_loop_dies, plain_loop_hangs, trainer_dies], ids=lambda f: f.__name__)
def test_a_rank_that_is_gone_ends_the_others_with_an_error(train: Callable[[], None]) -> None:
    ended, seconds = on_the_first_of_two(train)
    print(f"{ended.splitlines()[0][:90]} after {seconds:.1f} s")
    assert ended.startswith(("RuntimeError", "DistBackendError", "DistNetworkError"))
    assert seconds < TIMEOUT + 20


class PretendedAccelerator(CUDAAccelerator):
    """A machine with two devices, for Lightning before the setup of callbacks."""

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0, 1]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("cpu")] * 2

    @staticmethod
    def is_available() -> bool:
        return True

    def setup_device(self, device: torch.device) -> None:
        pass


def refused() -> str:
    strategy = FSDPStrategy(process_group_backend="gloo")
    options = {"accelerator": PretendedAccelerator(), "strategy": strategy, "devices": 2}
    try:
        trainer(KFCCallback(), **options).fit(Net(), loader(images(8), 4))
    except ValueError as error:
        return str(error)
    return "no error"


def test_fsdp1_is_refused_when_fitting_starts_with_the_alternative(two_ranks: Ranks) -> None:
    with pytest.raises(ValueError, match="requires a GPU accelerator"):
        pl.Trainer(accelerator="cpu", strategy=FSDPStrategy())
    for said in two_ranks.run(refused):
        assert said == "KFCCallback does not work with FSDPStrategy: use ModelParallelStrategy (FSDP2) instead."


def one_rank_not_finite_where_only_an_inverse_is_due() -> tuple[list[bool], list[int]]:
    """Whether each step was taken, and how many inverses it made, where the second rank gets NaN at such a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    kfc = KFC(model, warmup_steps=1, factor_every_n_steps=4, inverse_every_n_steps=4)
    taken, made = [], []
    for step in range(8):
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        model.zero_grad()
        with kfc.capture():
            loss = F.cross_entropy(model(x), torch.randint(3, (8,), generator=generator))
        # As Lightning's hooks have it: what is due waits until the gradients are there.
        kfc.update(loss, accumulate=True)
        loss.backward()
        # Without a strategy that averages gradients, NaN stays on the rank that has it.
        if step == 5 and dist.get_rank() == 1:
            model[0].weight.grad.fill_(float("nan"))
        taken.append(kfc.precondition(lr=0.1))
        made.append(sum(kfc.ages(name)[1] == 0 for name in kfc.layers) if taken[-1] else 0)
    return taken, made


def test_nan_on_one_rank_at_a_step_that_only_inverts_is_skipped_by_all(two_ranks: Ranks) -> None:
    told = two_ranks.run(one_rank_not_finite_where_only_an_inverse_is_due)
    assert told[0] == told[1]
    taken, made = told[0]
    assert taken == [True] * 5 + [False] + [True] * 2
    # Statistics are taken at step 4; the inverses follow one by one, the first a step later than it would have been.
    assert made[4:] == [0, 0, 1, 1]


def one_rank_not_finite_where_nothing_is_due() -> tuple[list[bool], list[float]]:
    """Whether each step was taken, and the weights, where the second rank gets NaN and only the loss travels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfc = KFC(model, warmup_steps=1, factor_every_n_steps=50, inverse_every_n_steps=50, damping=0.1, kl_clip="auto")
    taken = []
    for step in range(6):
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (8,), generator=generator)
        model.zero_grad()
        with kfc.capture():
            loss = F.cross_entropy(model(x), y)
        kfc.update(loss)
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        if step == 3 and dist.get_rank() == 1:
            model[0].weight.grad.fill_(float("nan"))
        taken.append(kfc.precondition(optimizer=optimizer))
        if taken[-1]:
            optimizer.step()
            kfc.review(optimizer=optimizer)
    return taken, torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def test_nan_on_one_rank_where_nothing_is_due_is_skipped_by_all(two_ranks: Ranks) -> None:
    (taken, weights), other = two_ranks.run(one_rank_not_finite_where_nothing_is_due)
    assert taken == [True] * 3 + [False] + [True] * 2
    assert other == (taken, weights)
