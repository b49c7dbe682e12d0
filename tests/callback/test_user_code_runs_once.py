"""With the callback, every line of the user's Python runs as often as without it, at the same time, on the same values.

A module is trained with the callback, and then without it, with the weights that it had with the callback after each
batch; so nothing may differ, though both learn. At a learning rate of 0 no step would be reviewed.
"""

from __future__ import annotations

import array
import collections
import copy
import functools
import io
import itertools
import random
import types
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_kfc import KFCCallback
from tests.helpers.impure_steps import Batches, Impure
from tests.helpers.lightning_nets import QUIET, trainer
from tests.helpers.visible import Seen, first_difference, picture, train

pytestmark = [
    *QUIET,
    # Lightning's, where a step skips its batch.
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.slow,
]

BATCHES = 25
MODES: dict[str, dict[str, Any]] = {"automatic": {}, "manual": {}, "accumulated": {"accumulate_grad_batches": 3}}


@pytest.fixture(autouse=True)
def _streams_put_back() -> Iterator[None]:
    kept, numpy_kept = random.getstate(), np.random.get_state()
    yield
    random.setstate(kept)
    np.random.set_state(numpy_kept)


def seen(kind: str, mode: str, folder: Path, *callbacks: pl.Callback, lead: Seen | None = None) -> Seen:
    make = partial(Impure.kinds[kind], manual=mode == "manual")
    return train(make, lambda module: Batches(module, BATCHES), folder, callbacks, lead=lead, **MODES[mode])


def differences(kind: str, mode: str, folder: Path, *callbacks: pl.Callback) -> list[str]:
    """The differences between trainings with and without callbacks."""
    found = seen(kind, mode, folder / "with", *callbacks)
    expected = seen(kind, mode, folder / "without", lead=found)
    assert expected.steps.calls == list(range(BATCHES))
    return found.differences(expected, Impure.kinds[kind].rounding)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", Impure.kinds)
def test_every_step_leaves_behind_what_it_leaves_without_the_callback(kind: str, mode: str, tmp_path: Path) -> None:
    found = differences(kind, mode, tmp_path, KFCCallback(average_weights=None))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("kind", ["DrawsFromTheGlobalStreams", "UpdatesBootStrapper", "KeepsAContrastiveQueue"])
def test_two_trainings_without_the_callback_leave_the_same_behind(kind: str, tmp_path: Path) -> None:
    assert differences(kind, "automatic", tmp_path) == []


class Dampings(pl.Callback):
    """Notes the damping after each batch."""

    def __init__(self, callback: KFCCallback) -> None:
        self.callback = callback
        self.seen: set[float] = set()

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.seen.add(self.callback.kfc.damping)


@pytest.mark.parametrize("mode", ["automatic", "accumulated"])
def test_the_steps_of_these_trainings_are_reviewed(mode: str, tmp_path: Path) -> None:
    callback = KFCCallback()
    dampings = Dampings(callback)
    seen("CountsInPublicAttributes", mode, tmp_path, callback, dampings)
    assert len(dampings.seen) > 2


class StepsAgain(pl.Callback):
    """Runs a training step twice, and puts back all that it has changed, and even the count of its calls."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 7:
            kept = dict(pl_module.__dict__)
            with torch.no_grad():
                pl_module.training_step(batch, batch_idx)
            pl_module.__dict__.update(kept)
            pl_module.note.__self__.calls.pop()


def test_a_step_that_runs_again_is_noticed_although_all_is_put_back(tmp_path: Path) -> None:
    (found,) = differences("CountsInPublicAttributes", "automatic", tmp_path, StepsAgain())
    assert found.endswith("runs 26 times, not 25")


# What is learned.


class Learner(pl.LightningModule):
    """Keeps the losses of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5, momentum=0.5)


class Continues(Learner):
    """Foretells long waves, piece by piece; its hidden state goes on from one piece to the next."""

    def __init__(self, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.memory, self.head = make(4, 16, batch_first=True), nn.Linear(16, 4)
        self.hidden: Any = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        outputs, hidden = self.memory(batch[:, :-1], self.hidden)
        self.hidden = hidden.detach() if isinstance(hidden, Tensor) else tuple(part.detach() for part in hidden)
        return F.mse_loss(self.head(outputs), batch[:, 1:])


class Contrasts(Learner):
    """Contrasts two noisy views of an example with a queue of others, by a net and its slow average."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 8))
        self.slow = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(128, 8), dim=1))
        self.place = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            for old, new in zip(self.slow.parameters(), self.net.parameters(), strict=True):
                old.lerp_(new, 0.1)
            keys = F.normalize(self.slow(batch + 0.3 * torch.randn_like(batch)), dim=1)
        queries = F.normalize(self.net(batch + 0.3 * torch.randn_like(batch)), dim=1)
        logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ self.queue.clone().T], 1)
        self.queue[self.place : self.place + len(batch)] = keys
        self.place = (self.place + len(batch)) % len(self.queue)
        return F.cross_entropy(logits / 0.2, torch.zeros(len(batch), dtype=torch.long))


def waves(steps: int, streams: int = 8, piece: int = 8) -> list[Tensor]:
    times = torch.arange(steps * piece + 1.0)[:, None]
    wave = torch.sin(times * (0.3 * torch.rand(streams, 1, 4) + 0.05) + 6 * torch.rand(streams, 1, 4))
    return [wave[:, start : start + piece + 1] for start in range(0, steps * piece, piece)]


def clouds(steps: int) -> list[Tensor]:
    return [torch.randn(32, 20) * torch.linspace(2, 0.1, 20) for _ in range(steps)]


def final_loss(make: Callable[[], Learner], data: Callable[[int], list[Tensor]], callback: KFCCallback) -> float:
    """The mean of the last ten of a hundred losses."""
    torch.manual_seed(1)
    module = make()
    trainer(callback).fit(module, DataLoader(data(100), batch_size=None))
    return sum(module.losses[-10:]) / 10


@pytest.mark.parametrize(
    ("make", "data"),
    [(partial(Continues, nn.GRU), waves), (partial(Continues, nn.LSTM), waves), (Contrasts, clouds)],
    ids=["GRU", "LSTM", "queue"],
)
def test_a_step_that_advances_its_own_state_learns_as_well_as_at_fixed_settings(
    make: Callable[[], Learner], data: Callable[[int], list[Tensor]]
) -> None:
    fixed = final_loss(make, data, KFCCallback(damping=0.01, kl_clip=0.03))
    # The losses of the waves begin near 0.5, and end near 0.003.
    assert final_loss(make, data, KFCCallback()) <= 1.05 * fixed + 0.002


# What the comparison notices.


class Slotted:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 1


class Thing:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def method(self) -> None:
        pass


def counting() -> Callable[[], None]:
    n = 0

    def count(step: int = 1) -> None:
        nonlocal n
        n += step

    return count


def numbers() -> Iterator[int]:
    yield from range(9)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def with_gradient() -> Tensor:
    value = torch.ones(2, requires_grad=True)
    value.sum().backward()
    return value


class Referring:
    def __init__(self) -> None:
        self.target: Any = Thing(n=1)
        self.reference = weakref.ref(self.target)
        self.all = weakref.WeakSet([self.target])


#: The maker of an object, its change, and the begin of the reported difference.
CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "attribute": (lambda: Thing(n=1), lambda it: setattr(it, "n", 2), "it.n: 2 != 1"),
    "private attribute": (lambda: Thing(_n=1), lambda it: setattr(it, "_n", 2), "it._n: 2 != 1"),
    "new attribute": (Thing, lambda it: setattr(it, "n", 2), "it.n: 2 != nothing"),
    "lost attribute": (lambda: Thing(n=1), lambda it: delattr(it, "n"), "it.n: nothing != 1"),
    "slot": (Slotted, lambda it: setattr(it, "n", 2), "it.n: 2 != 1"),
    "bytes": (lambda: bytearray(b"a"), lambda it: it.extend(b"b"), "it: bytearray(b'ab') != bytearray(b'a')"),
    "small array": (lambda: array.array("i", [1]), lambda it: it.append(2), "it: array('i', [1, 2]) != "),
    "list": (lambda: [1], lambda it: it.append(1), "it: builtins.list of 2 != builtins.list of 1"),
    "deep in containers": (
        lambda: {"a": [1, ({2: 3},)]},
        lambda it: it["a"][1][0].update({2: 4}),
        "it['a'][1][0][2]: ",
    ),
    "order of keys": (lambda: {"a": 1, "b": 2}, lambda it: it.update(a=it.pop("a")), "it, key 0: 'b' != 'a'"),
    "default of a dict": (
        lambda: collections.defaultdict(int),
        lambda it: setattr(it, "default_factory", float),
        "it.default_factory: <class 'float'> != ",
    ),
    "read-only mapping": (lambda: types.MappingProxyType({"n": [1]}), lambda it: it["n"].append(2), "it['n']: "),
    "deque": (lambda: collections.deque([1]), lambda it: it.append(2), "it: collections.deque of 2, at most None"),
    "counter": (lambda: collections.Counter("a"), lambda it: it.update("a"), "it['a']: 2 != 1"),
    "set": (lambda: {1}, lambda it: it.add(2), "it: builtins.set of 2 != builtins.set of 1"),
    "element": (lambda: torch.arange(4.0), lambda it: it[3].add_(1), "it[3]: 4.0 != 3.0"),
    "element of a matrix": (lambda: torch.zeros(2, 2), lambda it: it[1, 0].add_(1), "it[1, 0]: 1.0 != 0.0"),
    "last bit of an element": (lambda: torch.ones(2), lambda it: it[1].add_(2**-23), "it[1]: 1.0000001"),
    "half precision": (lambda: torch.ones(2).bfloat16(), lambda it: it[1].mul_(1.01), "it[1]: 1.0078125 != 1.0"),
    "sparse tensor": (lambda: torch.eye(2).to_sparse(), lambda it: it.mul_(2), "it[0, 0]: 2.0 != 1.0"),
    "need of a gradient": (
        lambda: torch.ones(2),
        lambda it: it.requires_grad_(),
        "it: torch.float32 torch.strided (2,) w",
    ),
    "gradient of an input": (with_gradient, lambda it: it.grad.add_(1), "it.grad[0]: 2.0 != 1.0"),
    "attribute of a tensor": (lambda: torch.ones(2), lambda it: setattr(it, "n", 1), "it.n: 1 != nothing"),
    "array": (lambda: np.zeros((2, 2)), lambda it: it.__setitem__((0, 1), 5), "it[0, 1]: 5.0 != 0.0"),
    "array of objects": (lambda: np.array([{}, None]), lambda it: it[0].update(n=1), "it[0]: builtins.dict of 1"),
    "stream of torch": (torch.Generator, lambda it: torch.rand(1, generator=it), "it()["),
    "stream of numpy": (lambda: np.random.default_rng(0), lambda it: it.random(), "it.bit_generator.state"),
    "old stream of numpy": (lambda: np.random.RandomState(0), lambda it: it.rand(), "it()["),
    "stream of python": (lambda: random.Random(0), lambda it: it.random(), "it(): "),
    "closure": (counting, lambda it: it(), "it<n>: 1 != 0"),
    "default argument": (counting, lambda it: setattr(it, "__defaults__", (2,)), "it()[0][0]: 2 != 1"),
    "attribute of a function": (counting, lambda it: setattr(it, "calls", 1), "it()[2]: builtins.dict of 1 != "),
    "object of a method": (lambda: Thing(n=1).method, lambda it: setattr(it.__self__, "n", 2), "it.__self__.n: 2 != 1"),
    "object of a builtin": (lambda: [].append, lambda it: it(1), "it.__self__: builtins.list of 1 != "),
    "cache": (lambda: functools.lru_cache(len), lambda it: it("a"), "it: len CacheInfo(hits=0, misses=1"),
    "generator": (numbers, lambda it: next(it), "it: numbers at"),
    "iterator": (lambda: iter([1, 2]), lambda it: next(it), "it: builtins.list_iterator with 1 left"),
    "count": (itertools.count, lambda it: next(it), "it: count(1) != count(0)"),
    "dead reference": (Referring, lambda it: setattr(it, "target", None), "it.target: None != "),
    "target of a reference": (Referring, lambda it: setattr(it.reference(), "n", 2), "it.target.n: 2 != 1"),
    "text stream": (io.StringIO, lambda it: it.write("a"), "it: _io.StringIO at 1 != _io.StringIO at 0"),
    "closed stream": (io.BytesIO, lambda it: it.close(), "it: _io.BytesIO closed != _io.BytesIO at 0"),
    "parameter": (net, lambda it: it[0].bias.data.fill_(5), "it.0.bias[0]: 5.0 != "),
    "frozen parameter": (
        net,
        lambda it: it[0].requires_grad_(False),
        "it.0.weight: torch.float32 torch.strided (2, 2) ",
    ),
    "buffer": (net, lambda it: it[1].num_batches_tracked.add_(1), "it.1.num_batches_tracked: 1 != 0"),
    "mode of a module": (net, lambda it: it[1].eval(), "it.1.training: False != True"),
    "one module more": (net, lambda it: it.append(nn.ReLU()), "it._modules: 0, 1, 2 != 0, 1"),
    "other module": (net, lambda it: it.__setitem__(0, nn.Identity()), "it.0: torch.nn.modules.linear.Identity != "),
    "hook": (net, lambda it: it.register_forward_hook(print), "it._forward_hooks: hooks of 1 != hooks of 0"),
}
ONE = [1]
#: Two objects that are almost the same, and the begin of the reported difference.
NEIGHBOURS: dict[str, tuple[Any, Any, str]] = {
    "class": (
        Slotted(),
        Thing(n=1),
        "it: tests.callback.test_user_code_runs_once.Slotted != tests.callback.test_user_code_runs_once.Thing",
    ),
    "type of a number": ([True], [1], "it[0]: True != 1"),
    "type of a key": ({1: 0}, {"1": 0}, "it, key 0: 1 != '1'"),
    "sign of zero": ([-0.0], [0.0], "it[0]: -0.0 != 0.0"),
    "sign of zero in a tensor": (torch.tensor([-0.0]), torch.tensor([0.0]), "it[0]: -0.0 != 0.0"),
    "last bit": ([0.1 + 0.2], [0.3], "it[0]: 0.30000000000000004 != 0.3"),
    "NaN": (torch.tensor([torch.nan]), torch.tensor([0.0]), "it[0]: nan != 0.0"),
    "text": (["b"], ["a"], "it[0]: 'b' != 'a'"),
    "list for tuple": ([[1]], [(1,)], "it[0]: builtins.list of 1 != builtins.tuple of 1"),
    "bound of a deque": (
        collections.deque([1], 5),
        collections.deque([1]),
        "it: collections.deque of 1, at most 5 != ",
    ),
    "one thing for two": ([ONE, ONE], [[1], [1]], "it[1]: the same as it[0] != builtins.list of 1"),
    "dtype": (torch.ones(2).double(), torch.ones(2), "it: torch.float64 torch.strided (2,) != torch.float32"),
    "shape": (torch.ones(1, 2), torch.ones(2), "it: torch.float32 torch.strided (1, 2) != "),
    "number of numpy": (np.float32(1), np.float64(1), "it: float32 "),
    "argument of a partial": (partial(str, 2), partial(str, 1), "it.args[0]: 2 != 1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_comparison_finds_a_change_of(change: str) -> None:
    make, change_it, expected = CHANGES[change]
    changed, unchanged = make(), make()
    assert first_difference(picture(it=changed), picture(it=unchanged)) is None
    with torch.no_grad():
        change_it(changed)
    assert (first_difference(picture(it=changed), picture(it=unchanged)) or "").startswith(expected)


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_the_comparison_distinguishes_by(neighbour: str) -> None:
    one, other, expected = NEIGHBOURS[neighbour]
    assert first_difference(picture(it=one), picture(it=one)) is None
    assert (first_difference(picture(it=one), picture(it=other)) or "").startswith(expected)


def test_what_cannot_be_looked_into_is_not_passed_over() -> None:
    with pytest.raises(TypeError, match=r"^it\.pairs: cannot look into a zip$"):
        picture(it=Thing(pairs=zip("a", "b", strict=True)))
