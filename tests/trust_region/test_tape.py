"""The tape: a replay equals a fresh run from the state before the recording, and leaves no trace."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_kfc.trust_region.replay import RecordedLoss
from lightning_kfc.trust_region.tape import Tape
from tests.helpers.examples import examples

SIDE = 4


class World:
    """All that a random program can read and write."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw() -> Tensor:
            return torch.randn(SIDE, SIDE, generator=generator, dtype=torch.float64)

        self.parameters = [draw().requires_grad_() for _ in range(2)]
        self.teacher = draw()
        self.buffer = draw()
        self.batch = draw()
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.writes_trained_alone = False

    def state(self) -> list[Tensor]:
        return [*self.parameters, self.teacher, self.buffer, self.batch]


Instruction = Callable[[World, list[Tensor], int, int], Tensor | None]


def _inplace(change: Callable[[Tensor, Tensor], Any]) -> Instruction:
    def run(world: World, live: list[Tensor], i: int, j: int) -> None:
        if world.writes_trained_alone and not live[i].requires_grad:
            return
        # Without gradients, so that leaves may be written, too.
        with torch.no_grad():
            change(live[i], live[j].clone())

    return run


def _exchange_data(world: World, live: list[Tensor], i: int, j: int) -> None:
    world.teacher.data = world.teacher.data * 0.9 + live[j].detach() * 0.1


def _teacher(world: World, live: list[Tensor], i: int, j: int) -> Tensor:
    world.teacher.data.mul_(0.9).add_(live[j].data, alpha=0.1)
    return world.teacher * live[i]


def no_gradient(world: World, live: list[Tensor], i: int, j: int) -> Tensor:
    with torch.no_grad():
        return live[i].sin() * live[j]


#: Instructions after which no gradient flows through a tensor that depends on parameters.
STOPPING: list[Instruction] = [
    lambda w, live, i, j: live[i].detach(),
    lambda w, live, i, j: live[i].data,
    lambda w, live, i, j: live[i].detach().t() * live[j],
    lambda w, live, i, j: torch.where(live[i].detach() > 0, live[i], live[j]),
    lambda w, live, i, j: live[i] + (live[j] - live[i]).detach(),
    lambda w, live, i, j: live[i] / live[j].detach().square().mean(),
    lambda w, live, i, j: (live[i] - live[i].detach()).exp() * live[j],
    lambda w, live, i, j: copy.deepcopy(live[i].detach()),
    lambda w, live, i, j: torch.mul(live[i].detach(), live[j].detach(), out=torch.empty(0, dtype=torch.float64)),
    no_gradient,
]
#: Instructions that write such a tensor.
WRITING: list[Instruction] = [_teacher, _exchange_data]
OTHERS: list[Instruction] = [
    lambda w, live, i, j: live[i] + live[j],
    lambda w, live, i, j: live[i] * live[j].sin(),
    lambda w, live, i, j: live[i] @ live[j] / SIDE,
    lambda w, live, i, j: live[i].t(),
    lambda w, live, i, j: live[i].reshape(-1).view(SIDE, SIDE),
    lambda w, live, i, j: torch.cat([live[i][:2], live[j][2:]]),
    lambda w, live, i, j: torch.stack(live[i].unbind(1)),
    lambda w, live, i, j: torch.where(live[i] > 0, live[i], live[j]),
    lambda w, live, i, j: live[i][torch.arange(SIDE - 1, -1, -1)],
    lambda w, live, i, j: F.dropout(live[i], 0.5),
    lambda w, live, i, j: live[i] + 0.1 * torch.randn_like(live[j]),
    lambda w, live, i, j: live[i] * torch.rand(SIDE, SIDE, dtype=torch.float64, generator=w.generator),
    lambda w, live, i, j: live[i] + torch.normal(0.0, 0.1, (SIDE, SIDE), dtype=torch.float64),
    lambda w, live, i, j: live[i][:, torch.randperm(SIDE)],
    lambda w, live, i, j: torch.func.vmap(lambda row: row * row.sum())(live[i]),
    lambda w, live, i, j: checkpoint(torch.tanh, live[i], use_reentrant=False),
]
INPLACE: list[Instruction] = [
    _inplace(lambda a, b: a.add_(b, alpha=0.1)),
    _inplace(lambda a, b: a.data.clamp_(-1, 1)),
    _inplace(lambda a, b: a.t().mul_(b)),
    _inplace(lambda a, b: a[1:3].copy_(b[:2])),
    _inplace(lambda a, b: a.detach().reshape(-1)[::2].mul_(0.5)),
    _inplace(lambda a, b: a.lerp_(b, 0.1)),
    _inplace(lambda a, b: a.bernoulli_(0.5)),
    _inplace(lambda a, b: torch._foreach_add_([a], [b], alpha=0.1)),
    _inplace(lambda a, b: a.index_copy_(0, torch.tensor([2, 0]), b[:2])),
]


ALL = [*OTHERS, *INPLACE, *STOPPING, *WRITING]


def run(world: World, program: list[tuple[int, int, int]]) -> Tensor:
    """Run a program; the loss depends on all tensors that it has made or written."""
    live = world.state()
    for which, i, j in program:
        made = ALL[which](world, live, i % len(live), j % len(live))
        if made is not None:
            live.append(made)
    return torch.stack([tensor.tanh().mean() for tensor in live]).sum()


def recorded(loss_of: Callable[[], Tensor]) -> tuple[Tape, Tensor, RecordedLoss]:
    tape = Tape()
    with tape:
        loss = loss_of()
    tape.finish()
    assert tape.refusal is None, tape.refusal
    found = tape.locate(loss)
    assert found is not None
    return tape, loss, found


def programs_of(instructions: list[Instruction]) -> st.SearchStrategy[list[tuple[int, int, int]]]:
    numbers = [which for which, each in enumerate(ALL) if any(each is one for one in instructions)]
    return st.lists(st.tuples(st.sampled_from(numbers), st.integers(0, 30), st.integers(0, 30)), max_size=12)


@examples(150)
@given(programs_of(ALL), st.integers(0, 99))
def test_a_replay_of_any_program_equals_its_run_and_leaves_no_trace(
    program: list[tuple[int, int, int]], seed: int
) -> None:
    world = World(seed)
    torch.manual_seed(seed)
    _, loss, found = recorded(lambda: run(world, program))
    after, stream = [t.detach().clone() for t in world.state()], torch.get_rng_state()
    own_stream = world.generator.get_state()
    assert found.replay({}, with_collectives=False) == pytest.approx(float(loss.detach()), rel=1e-12, abs=1e-15)
    found.replay({id(p): 2 * p.detach() for p in world.parameters}, with_collectives=False)
    assert all(torch.equal(a, b.detach()) for a, b in zip(after, world.state(), strict=True))
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(world.generator.get_state(), own_stream)


@examples(150)
@given(programs_of([*OTHERS, *INPLACE]), st.integers(0, 99))
def test_a_replay_equals_a_fresh_run_of_any_program_from_the_state_before(
    program: list[tuple[int, int, int]], seed: int
) -> None:
    world, fresh = World(seed), World(seed)
    world.writes_trained_alone = fresh.writes_trained_alone = True
    torch.manual_seed(seed)
    _, _, found = recorded(lambda: run(world, program))
    moved = {id(p): p.detach() + 0.3 * torch.randn(SIDE, SIDE, dtype=torch.float64) for p in world.parameters}
    again = found.replay(moved, with_collectives=False)
    with torch.no_grad():
        for own, parameter in zip(fresh.parameters, world.parameters, strict=True):
            own.copy_(moved[id(parameter)])
    torch.manual_seed(seed)
    assert again == pytest.approx(float(run(fresh, program).detach()), rel=1e-12, abs=1e-15)


@examples(150)
@given(programs_of([*OTHERS, *STOPPING]), st.integers(0, 99))
def test_the_slope_of_a_replay_is_that_of_the_loss_where_gradients_are_stopped(
    program: list[tuple[int, int, int]], seed: int
) -> None:
    world = World(seed)
    torch.manual_seed(seed)
    _, loss, found = recorded(lambda: run(world, program))
    directions = [torch.randn(SIDE, SIDE, dtype=torch.float64) for _ in world.parameters]
    gradients = torch.autograd.grad(loss, world.parameters, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)

    def at(distance: float) -> float:
        pairs = zip(world.parameters, directions, strict=True)
        return found.replay({id(p): p.detach() + distance * d for p, d in pairs}, with_collectives=False)

    assert (at(1e-6) - at(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-5)


class SineByHand(torch.autograd.Function):
    """Its forward runs without gradients, and its result has one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (2 * x).sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * gradient * (2 * x).cos()


def test_the_forward_of_a_custom_function_is_replayed_with_the_new_weights() -> None:
    weight = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    _, _, found = recorded(lambda: SineByHand.apply(weight).exp().sum())
    again = found.replay({id(weight): weight.detach() + 0.5}, with_collectives=False)
    assert again == pytest.approx(float((2 * weight.detach() + 1).sin().exp().sum()))


# Networks.


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(6, 6)
        self.teacher = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            own.data.mul_(0.9).add_(other.data, alpha=0.1)
        return self.student(x) - self.teacher(x)


class OfSequences(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(9, 6), kind(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.recurrent(self.embedding(x))[0]
        return out


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return out


def numbers() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def pixels() -> Tensor:
    return torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def symbols() -> Tensor:
    return torch.randint(9, (5, 4), generator=torch.Generator().manual_seed(1))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout2d(0.3), nn.Conv2d(4, 4, 3, groups=2)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "batch norm, dropout, ReLU in place": (conv_net, pixels),
    "synchronised statistics in one process": (lambda: nn.Sequential(nn.SyncBatchNorm(2).eval()), pixels),
    "instance norm that tracks": (lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True), pixels),
    "teacher through .data": (Teacher, numbers),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), lambda: numbers()[None]),
    "LSTM": (lambda: OfSequences(nn.LSTM), symbols),
    "GRU": (lambda: OfSequences(nn.GRU), symbols),
    "checkpoint": (Checkpointed, numbers),
    "weight norm": (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), numbers),
    "spectral norm": (lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)), numbers),
    "random ReLU": (lambda: nn.Sequential(nn.Linear(6, 6), nn.RReLU()), numbers),
    "alpha dropout": (lambda: nn.Sequential(nn.Linear(6, 6), nn.AlphaDropout(0.2)), numbers),
}
#: Those with tensors that depend on parameters and have no gradient, which a replay keeps and a fresh run does not.
STOPPED = ("teacher through .data", "spectral norm")


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 by autocast"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_replay_of_a_network_equals_its_run_with_other_weights(name: str, autocast: bool) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make(), inputs()

    def loss_of(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x).float().square().mean()

    for _ in range(2):
        fresh, before = copy.deepcopy(model), torch.get_rng_state()
        _, loss, found = recorded(lambda: loss_of(model))
        after = copy.deepcopy(model.state_dict())
        assert found.replay({}, with_collectives=False) == pytest.approx(float(loss.detach()), rel=1e-6)
        moved = {id(p): p.detach() * 1.3 + 0.1 for p in model.parameters() if p.requires_grad}
        again = found.replay(moved, with_collectives=False)
        assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())
        with torch.no_grad():
            for own, p in zip(fresh.parameters(), model.parameters(), strict=True):
                own.copy_(moved.get(id(p), own))
        now = torch.get_rng_state()
        torch.set_rng_state(before)
        if name not in STOPPED:
            assert again == pytest.approx(float(loss_of(fresh).detach()), rel=1e-5)
        torch.set_rng_state(now)


@pytest.mark.parametrize("name", STOPPED)
def test_the_slope_of_a_replay_is_that_of_the_loss_where_a_network_writes_what_it_does_not_train(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = NETWORKS[name]
    model, x = make().double(), inputs().double()
    _, loss, found = recorded(lambda: model(x).square().mean())
    trained = [p for p in model.parameters() if p.requires_grad]
    slope = sum(float(g.sum()) for g in torch.autograd.grad(loss, trained))

    def at(distance: float) -> float:
        return found.replay({id(p): p.detach() + distance for p in trained}, with_collectives=False)

    assert at(0.0) == pytest.approx(float(loss.detach()), rel=1e-12)
    assert (at(1e-6) - at(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-6)


# Where a loss is.


@pytest.mark.parametrize("after", [lambda loss: loss, lambda loss: loss / 3, lambda loss: (loss / 3) * 2.0**16])
def test_a_loss_is_found_by_what_it_was_divided_and_scaled_to(after: Callable[[Tensor], Tensor]) -> None:
    model, x = nn.Linear(6, 3), numbers()
    tape = Tape()
    with tape:
        loss = model(x).square().mean()
        F.mse_loss(model(x), torch.zeros(5, 3))  # a metric
    tape.finish()
    found = tape.locate(after(loss))
    assert found is not None
    assert found.replay({}, with_collectives=False) == pytest.approx(float(after(loss).detach()), rel=1e-6)


def test_what_comes_after_a_loss_is_no_part_of_it() -> None:
    weight = torch.ones(3, requires_grad=True)
    tape = Tape()
    with tape:
        loss = weight.sum() * 2
        found = tape.locate(loss)
        with torch.no_grad():
            loss.mul_(5)
            weight.mul_(7)
    assert found is not None
    assert found.replay({id(weight): torch.ones(3)}, with_collectives=False) == 6


@pytest.mark.parametrize("scale", [0.0, float("nan")])
def test_a_loss_of_0_or_without_a_value_is_not_found(scale: float) -> None:
    weight = torch.ones(3, requires_grad=True)
    tape = Tape()
    with tape:
        loss = weight.sum() * scale
    tape.finish()
    assert tape.locate(loss) is None


def test_a_loss_that_was_made_elsewhere_is_not_found() -> None:
    weight = torch.ones(3, requires_grad=True)
    before = weight.sum()
    tape = Tape()
    with tape:
        weight.sin().sum()
    tape.finish()
    assert tape.locate(before) is None


def test_only_what_the_loss_depends_on_is_replayed() -> None:
    model, x = nn.Linear(6, 3), numbers()

    def loss_of() -> Tensor:
        logits = model(x)
        (logits.detach().argmax(-1) == 0).float().mean()  # an accuracy
        torch.randn(100).sin().cos()
        return logits.square().mean()

    _, _, found = recorded(loss_of)
    operations = found.recording.slice(found.slot, found.length, with_collectives=False)
    names = [op.function._schema.name for op, _ in operations]
    assert not {"aten::argmax", "aten::randn", "aten::sin"} & set(names)


# What a tape holds, and what it refuses.


def test_a_tape_holds_no_intermediate_result() -> None:
    weight, made = torch.ones(1000, requires_grad=True), []
    tape = Tape()
    with tape, torch.no_grad():
        for _ in range(3):
            hidden = weight.sin()
            made.append(weakref.ref(hidden))
            del hidden
    gc.collect()
    assert [reference() for reference in made] == [None] * 3


def test_operations_of_a_pause_are_not_recorded() -> None:
    weight = torch.ones(3, requires_grad=True)
    tape = Tape()
    with tape:
        loss = weight.sum()
        tape.paused = True
        with torch.no_grad():
            weight.add_(1)
        tape.paused = False
    tape.finish()
    found = tape.locate(loss)
    assert found is not None
    assert found.replay({}, with_collectives=False) == 6


class ByNumPy(torch.autograd.Function):
    """Computes where torch does not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "memory of another size": (lambda w: torch.zeros(2).resize_(3).fill_(2) * w, r"aten\.resize_"),
    "a function that torch does not see": (lambda w: ByNumPy.apply(w) + 1, "ByNumPyBackward"),
    "a subclass": (
        lambda w: (torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged) * w[1]).values(),
        "tensor subclass NestedTensor",
    ),
    "a higher-order operator": (
        lambda w: torch.cond(w.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (w,)),
        "higher-order operator",
    ),
    "a result from before": (lambda w: EARLIER[0] * w, "SinBackward"),
}
EARLIER: list[Tensor] = []


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replayed_is_refused_by_name_and_still_runs(name: str) -> None:
    compute, said = REFUSED[name]
    weight = torch.arange(3.0, requires_grad=True)
    EARLIER[:] = [torch.ones(3, requires_grad=True).sin()]
    expected = compute(weight)
    tape = Tape()
    with tape:
        found = compute(weight)
    tape.finish()
    assert torch.equal(found, expected)
    assert tape.refusal is not None
    assert re.search(said, tape.refusal), tape.refusal


def test_a_parameter_may_be_frozen_for_a_part_of_the_recording() -> None:
    model, x = nn.Linear(6, 3), numbers()

    def loss_of() -> Tensor:
        model.requires_grad_(False)
        first = model(x).sum()
        model.requires_grad_(True)
        return first + model(x).sum()

    _, loss, found = recorded(loss_of)
    assert found.replay({}, with_collectives=False) == pytest.approx(float(loss.detach()))


def test_an_operation_that_no_longer_fits_is_named() -> None:
    weight = torch.tensor([1.0, -1.0, 2.0], requires_grad=True)
    _, _, found = recorded(lambda: weight[weight > 0].view(2).sum())
    with pytest.raises(RuntimeError, match=r"aten\.view\.default could not be run again"):
        found.replay({id(weight): torch.ones(3)}, with_collectives=False)
