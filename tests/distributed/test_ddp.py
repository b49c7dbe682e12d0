"""DDP: ranks with a part of the batch each end where one rank with the whole ends, whatever the strategy's options."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lightning_kfc import KFC, KFCCallback, Logging
from lightning_kfc.distributed import factor_reduction as reduction
from lightning_kfc.factors.packing import packed_numel
from lightning_kfc.layers import registry
from tests.distributed.nets import (
    EXACT,
    Net,
    branched_net,
    conv_net,
    difference,
    fit,
    images,
    loader,
    outcome,
    synchronised_net,
    trainer,
)
from tests.distributed.pool import Ranks
from tests.helpers.harness import QUIET

pytestmark = [*(pytest.mark.filterwarnings(line) for line in QUIET), pytest.mark.slow]
ROUNDING = 1e-9


def on_a_rank(
    make: Callable[[], nn.Module],
    examples: int,
    batch_size: int,
    kfc: dict[str, Any],
    ddp: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Tensor]:
    strategy = DDPStrategy(process_group_backend="gloo", **ddp)
    return fit(
        Net(make), data=images(examples), batch_size=batch_size, kfc=kfc, strategy=strategy, devices=2, **options
    )


def arguments(
    make: Callable[[], nn.Module] = conv_net,
    examples: int = 24,
    batch_size: int = 4,
    kfc: dict[str, Any] | None = None,
    ddp: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """The arguments of :func:`on_a_rank`, with defaults."""
    return make, examples, batch_size, kfc or {}, ddp or {}, options or {}


def on_one_rank(**case: Any) -> dict[str, Tensor]:
    make, examples, batch_size, kfc, _, options = arguments(**case)
    return fit(Net(make), data=images(examples), batch_size=2 * batch_size, kfc=kfc, **options)


def compare(ranks: Ranks, **case: Any) -> float:
    """The largest relative difference between two ranks and one; the two ranks must be alike."""
    first, second = ranks.run(on_a_rank, *arguments(**case))
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between the ranks"
    found = difference(first, on_one_rank(**case))
    print(f"largest relative difference: {found:.2g}")
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "find_unused_parameters": {"ddp": {"find_unused_parameters": True}},
    "static_graph": {"ddp": {"static_graph": True}},
    "gradient_as_bucket_view": {"ddp": {"gradient_as_bucket_view": True}},
    "accumulation": {"options": {"accumulate_grad_batches": 3}},
    "accumulation with a shorter tail": {"options": {"accumulate_grad_batches": 2}},
    "eigh": {"kfc": {"inverse": "eigh"}},
    "ekfac": {"kfc": {"inverse": "ekfac"}},
    # With factors of full rank: in a null space the basis is arbitrary, and with it the eigenvalues.
    "ekfac between refreshes": {
        "kfc": {"inverse": "ekfac", "inverse_every_n_steps": 3, "warmup_steps": 0},
        "examples": 120,
        "batch_size": 20,
    },
    "rare refreshes": {"kfc": {"factor_every_n_steps": 2, "inverse_every_n_steps": 3, "warmup_steps": 1}},
    "diagonal factors": {"kfc": {"max_factor_dim": 8}},
    "reduce": {"kfc": {"weight_sharing": "reduce"}},
}


@pytest.mark.parametrize("option", list(OPTIONS))
def test_two_ranks_with_half_a_batch_each_equal_one_with_the_whole(two_ranks: Ranks, option: str) -> None:
    assert compare(two_ranks, **OPTIONS[option]) < ROUNDING


def test_a_synchronised_batch_norm_normalises_two_halves_as_one_batch(
    two_ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    one_step = {"options": {"max_steps": 1}}
    (first, second), whole = (
        two_ranks.run(on_a_rank, *arguments(make=synchronised_net, **one_step)),
        on_one_rank(make=synchronised_net, **one_step),
    )
    assert difference(first, second) == 0
    behind = [name for name in whole if name.endswith(".A")]
    found = difference({n: first[n] for n in behind}, {n: whole[n] for n in behind})
    print(f"largest relative difference of A: {found:.2g}")
    assert found < ROUNDING
    # Its backward couples the examples, whose seeds have random signs, another set on each rank: G agrees in
    # expectation only.
    assert difference(first, whole) < 0.1


def test_layers_that_only_some_ranks_or_none_use_have_the_statistics_of_those_that_do(two_ranks: Ranks) -> None:
    used = two_ranks.run(branches_taken)
    assert used[0] != used[1], "the ranks must differ for this to show anything"
    found = compare(two_ranks, make=branched_net, ddp={"find_unused_parameters": True})
    assert found < ROUNDING


def branches_taken() -> list[int]:
    net, taken, seen = Net(branched_net), [], []
    net.net[3].sometimes.register_forward_hook(lambda *_: taken.append(len(seen)))
    for step, batch in enumerate(loader(images(24), 4)):
        net.training_step(batch, step)
        seen.append(step)
    return taken


def with_small_buffers(largest: int, *arguments: Any) -> dict[str, Tensor]:
    usual, reduction.BUCKET_BYTES = reduction.BUCKET_BYTES, largest
    try:
        return on_a_rank(*arguments)
    finally:
        reduction.BUCKET_BYTES = usual


def test_many_small_buffers_bring_the_same_sums_as_one(two_ranks: Ranks) -> None:
    case = (conv_net, 24, 4, {}, {}, {})
    one = two_ranks.run(on_a_rank, *case)
    many = two_ranks.run(with_small_buffers, 256, *case)
    assert difference(many[0], one[0]) == difference(many[1], one[1]) == 0


def test_compressed_gradients_leave_the_ranks_alike_and_the_factors_exact(two_ranks: Ranks) -> None:
    case = {"ddp": {"ddp_comm_hook": bf16_compress_hook}, "options": {"max_steps": 1}}
    first, second = two_ranks.run(on_a_rank, *arguments(**case))
    whole = on_one_rank(options=case["options"])
    assert difference(first, second) == 0
    factors = [name for name in whole if name.endswith((".A", ".G"))]
    assert difference({n: first[n] for n in factors}, {n: whole[n] for n in factors}) < ROUNDING
    assert 0 < difference(first, whole) < 0.05


def uneven(parts: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Train on a batch of its own on each rank; a single rank has all of them, each with the same weight."""
    x, y = images(16).tensors
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = [list(part) for part in parts] if size == 1 else [list(parts[rank])]
    model = DistributedDataParallel(Net().net) if size > 1 else Net().net
    kfc = KFC(model, **EXACT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(2):
        optimizer.zero_grad()
        with kfc.capture():
            # A sum over no examples is 0, where a mean would be no number.
            losses = [F.cross_entropy(model(x[p]), y[p], reduction="sum") / max(len(p), 1) for p in own]
            loss = torch.stack(losses).mean()
        kfc.update(loss)
        loss.backward()
        kfc.precondition(optimizer=optimizer)
        optimizer.step()
    found = {name.removeprefix("module."): value.detach() for name, value in model.named_parameters()}
    for name, layer in kfc.layers.items():
        found |= {f"{name.removeprefix('module.')}.{factor}": value for factor, value in layer.factors.items()}
    return found, kfc.events.state_dict()


@pytest.mark.parametrize("parts", [((0, 1, 2, 3, 4), (5, 6, 7)), ((0, 1, 2, 3), ())], ids=["uneven", "one empty"])
def test_batches_of_different_size_count_by_their_rows_in_a_and_by_their_rank_in_g(
    two_ranks: Ranks, parts: Sequence[Sequence[int]]
) -> None:
    (first, _), (second, _) = two_ranks.run(uneven, parts)
    assert difference(first, second) == 0
    found = difference(first, uneven(parts)[0])
    print(f"largest relative difference: {found:.2g}")
    assert found < ROUNDING


def spoilt(fisher: str, make: Callable[[], nn.Module]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Train on data that hold a NaN in the second step's batch of the second rank."""
    data = images(24)
    data.tensors[0][9] = math.nan
    callback = KFCCallback(**{**EXACT, "fisher": fisher})
    module = Net(make)
    several = dist.is_initialized()
    options = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2} if several else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(callback, **options).fit(module, loader(data, 4 if several else 8))
    return outcome(module, callback), callback.kfc.events.state_dict()


def test_a_nan_on_one_rank_skips_the_step_on_all_and_nothing_hangs(two_ranks: Ranks) -> None:
    # A synchronised batch norm talks in every back-propagation, so that their number must be the same.
    for case in (("mc", conv_net), ("exact", synchronised_net), ("exact", conv_net)):
        (first, events), (second, others) = two_ranks.run(spoilt, *case)
        assert events["nonfinite_gradients"] == 1
        assert events == others
        assert difference(first, second) == 0
    whole, alone = spoilt("exact", conv_net)
    assert alone == events
    assert difference(first, whole) < ROUNDING


def bytes_sent() -> tuple[int, int, int]:
    callback = KFCCallback(**EXACT)
    options = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2, "max_steps": 2}
    trainer(callback, **options).fit(Net(), loader(images(24), 4))
    sent = callback.kfc.communication
    return sent.factors, sent.inverses, sent.total


def test_a_refresh_sends_one_triangle_of_each_factor_and_reports_it(two_ranks: Ranks) -> None:
    factors = [(1, 10), (1, 4), (2, 19), (2, 2), (1, 17), (1, 3)]
    triangles = sum(packed_numel((groups, d, d)) for groups, d in factors)
    header = 3 * 3 * 8
    for statistics, inverses, total in two_ranks.run(bytes_sent):
        assert statistics == triangles * 8 + header
        # As they are, with whether there is one, its automatic damping, and whether that was lowered.
        assert inverses == triangles * 8 + 3 * 3 * 8
        assert total == 2 * (statistics + inverses)


class Adversaries(pl.LightningModule):
    """Two networks, each stepped by its own optimizer in manual optimization, the second one every other time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first, self.second = conv_net().double(), conv_net().double()

    def training_step(self, batch: Any, index: int) -> None:
        x, y = batch
        for network, optimizer in zip((self.first, self.second), self.optimizers(), strict=True):
            if network is self.second and index % 2:
                continue
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(network(x), y))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(net.parameters(), lr=0.2) for net in (self.first, self.second)]


def by_hand() -> dict[str, Tensor]:
    several = dist.is_initialized()
    ddp = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    callback, module = KFCCallback(**EXACT), Adversaries()
    trainer(callback, **({"strategy": ddp, "devices": 2} if several else {})).fit(
        module, loader(images(32), 4 if several else 8)
    )
    return outcome(module, callback)


def test_optimizers_stepped_by_hand_each_have_the_statistics_of_all_ranks(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(by_hand)
    assert difference(first, second) == 0
    found = difference(first, by_hand())
    print(f"largest relative difference: {found:.2g}")
    assert found < ROUNDING


def split_use() -> tuple[list[str], dict[str, str], dict[str, Tensor]]:
    x, y = images(16).tensors
    rank = dist.get_rank()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    kfc = KFC(net, **EXACT)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    for _ in range(3):
        own = slice(8 * rank, 8 * rank + 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with kfc.capture():
                hidden = net[:3](x[own])
                logits = F.linear(hidden, net[3].weight, net[3].bias) if rank == 1 else net[3](hidden)
                loss = F.cross_entropy(logits, y[own])
            kfc.update(loss)
        optimizer.zero_grad()
        loss.backward()
        for parameter in net.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        kfc.precondition(optimizer=optimizer)
        optimizer.step()
    treatments = {row.parameter: row.treatment for row in kfc.coverage()}
    return list(kfc.layers), treatments, {name: p.detach() for name, p in net.named_parameters()}


def test_a_layer_that_one_rank_cannot_explain_is_given_up_by_all(two_ranks: Ranks) -> None:
    (layers, treatments, weights), (others, _, other_weights) = two_ranks.run(split_use)
    assert layers == others == ["1", "3.weight", "3.bias"]
    assert treatments["3.weight"] == "diagonal"
    assert difference(weights, other_weights) == 0


class Kept(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "kept"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))


def logged() -> tuple[list[dict[str, float]], dict[str, float]]:
    callback, logger = KFCCallback(**EXACT, logging=Logging(layers=True)), Kept()
    options = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2, "log_every_n_steps": 1}
    trainer(callback, **options, logger=logger).fit(Net(), loader(images(24), 4))
    return logger.rows, callback.kfc.communication.as_metrics()


def test_the_bytes_that_ranks_send_are_logged(two_ranks: Ranks) -> None:
    rows, last = two_ranks.run(logged)[0]
    assert last["kfc/bytes_factors"] > 0
    assert [{name: row[name] for name in last} for row in rows if "kfc/kl" in row][-1] == last
