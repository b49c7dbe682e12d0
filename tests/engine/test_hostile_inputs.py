"""Bad batches, degenerate layers and absurd scales: no crash, no NaN in a weight, and a count of what happened."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import Categorical, KFCCallback
from lightning_kfc.monitoring.events import Events
from tests.helpers.harness import QUIET, Classifier, Watch, conv_net, dense_net, fit, images, loader, weights

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

#: In so few steps a momentum of 0.9 is too long; here it is a state to keep.
LONG = pytest.mark.filterwarnings("ignore:KFCCallback. a momentum of 0.9")
SKIPS = pytest.mark.filterwarnings("ignore:KFCCallback skips this optimizer step")
DROPS = pytest.mark.filterwarnings("ignore:KFC at step .* Later ones are only counted:UserWarning")

#: All that is hostile here shows on due steps and on the steps between.
#: Every step is made as it is: none is evaluated a second time, nor taken back.
FIXED: dict[str, Any] = {"damping": 0.01, "kl_clip": 0.03}
OPTIONS: dict[str, Any] = {"warmup_steps": 2, "factor_every_n_steps": 2, "inverse_every_n_steps": 2, **FIXED}


class Hostile(Classifier):
    """A classifier one of whose steps is spoiled."""

    def __init__(self, spoil: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]], **options: Any) -> None:
        super().__init__(conv_net(), **options)
        self.spoil = spoil

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(self.spoil(self.global_step, *batch), batch_idx)


def at_step(bad: int, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    seen: list[int] = []

    def spoil(step: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(step)
        return change(x, y) if len(seen) == bad + 1 else (x, y)

    return spoil


def put(value: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def change(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone()
        x[0, 0, 2, 2] = value
        return x, y

    return change


class History:
    """The weights after each step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.watch = Watch("on_train_batch_end", lambda trainer, module, *args: self.weights.append(weights(module)))

    def assert_finite(self) -> None:
        assert all(bool(torch.isfinite(w).all()) for w in self.weights)

    def moved(self) -> list[bool]:
        """Whether each step but the first moved the weights."""
        return [not torch.equal(a, b) for a, b in itertools.pairwise(self.weights)]


def run(module: Classifier, *, steps: int = 6, data: Any = None, **options: Any) -> tuple[History, KFCCallback]:
    history, kfc = History(), KFCCallback(**{**OPTIONS, **options})
    used = data if data is not None else loader(images(48))
    fit(module, kfc=kfc, data=used, callbacks=[history.watch], max_steps=steps, max_epochs=steps)
    history.assert_finite()
    for layer in kfc.kfc.layers.values():
        assert all(bool(torch.isfinite(factor).all()) for factor in layer.factors.values())
    return history, kfc


def events(kfc: KFCCallback) -> dict[str, int]:
    """The counts that are not zero."""
    return {name: count for name, count in kfc.kfc.events.state_dict().items() if count}


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "fused SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam": lambda p: Adam(p, lr=0.01),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@SKIPS
@pytest.mark.parametrize("value", [math.nan, math.inf])
@LONG
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", [2, 3])
def test_a_step_on_data_that_is_not_finite_is_skipped_and_counted(value: float, optimizer: str, bad: int) -> None:
    module = Hostile(at_step(bad, put(value)), optimizer=OPTIMIZERS[optimizer])
    history, kfc = run(module)
    assert history.moved() == [step != bad for step in range(1, 6)]
    assert events(kfc) == {"nonfinite_gradients": 1}


@SKIPS
@pytest.mark.parametrize("bad", [0, 3])
def test_a_step_on_a_loss_that_is_not_finite_is_skipped_and_counted(bad: int) -> None:
    calls: list[int] = []

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return F.cross_entropy(logits, y) * (math.nan if len(calls) == bad + 1 else 1.0)

    history, kfc = run(Classifier(loss=loss))
    assert history.moved() == [step != bad for step in range(1, 6)]
    assert events(kfc) == {"nonfinite_gradients": 1}


def test_the_first_skipped_step_is_reported_to_the_user() -> None:
    with pytest.warns(UserWarning, match="skips this optimizer step: its gradients are not finite"):
        run(Hostile(at_step(1, put(math.nan))))


@SKIPS
@pytest.mark.parametrize("where", ["net.0.weight", "net.1.weight", "net.4.bias"])
def test_a_gradient_that_is_not_finite_anywhere_skips_the_step(where: str) -> None:
    module = Classifier(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)))
    kfc = KFCCallback(**OPTIONS)
    before: list[Tensor] = []

    def spoil(*args: Any) -> None:
        before.append(weights(module))
        module.get_parameter(where).grad.view(-1)[0] = math.nan

    history = History()
    # Ahead of us, as a backward that brings such a gradient is.
    fit(module, callbacks=[Watch("on_after_backward", spoil), kfc, history.watch])
    assert all(torch.equal(a, b) for a, b in zip(before, history.weights, strict=True))
    assert events(kfc) == {"nonfinite_gradients": 4}
    assert not any(layer.averages for layer in kfc.kfc.layers.values())


@SKIPS
def test_training_on_nothing_but_nan_leaves_the_weights_where_they_were() -> None:
    module = Hostile(lambda step, x, y: (x * math.nan, y))
    start = weights(module)
    history, kfc = run(module)
    assert all(torch.equal(w, start) for w in history.weights)
    assert events(kfc) == {"nonfinite_gradients": 6}


class Padded(nn.Module):
    """Marks the logits of padding, here the first example of one batch, by a value that the loss never reads."""

    def __init__(self, value: float, bad: int) -> None:
        super().__init__()
        self.value, self.bad, self.calls = value, bad, 0

    def forward(self, logits: Tensor) -> Tensor:
        self.calls += 1
        padding = torch.zeros(len(logits), 1, dtype=torch.bool)
        padding[0] = self.calls == self.bad + 1
        return logits.masked_fill(padding, self.value)


@DROPS
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_logits_that_are_not_finite_enter_no_average_even_where_the_gradient_is_finite(fisher: Any) -> None:
    module = Classifier(conv_net(), loss=lambda logits, y: F.cross_entropy(logits[1:], y[1:]))
    module.net.append(Padded(math.nan, bad=2))
    kfc = KFCCallback(fisher=fisher, likelihood=Categorical(output_of="net.4"), **OPTIONS)
    factors, history = [], History()
    watch = Watch("on_train_batch_end", lambda *args: factors.append(kfc.kfc.layers["net.3"].G.clone()))
    fit(module, kfc=kfc, data=loader(images(48)), callbacks=[watch, history.watch], max_steps=6)
    history.assert_finite()
    assert all(history.moved())
    assert events(kfc) == {"nonfinite_statistics": 1}
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(factors)]
    assert changed == [True, False, False, True, False]


def test_classes_ruled_out_by_an_infinite_logit_have_no_probability_and_are_no_event() -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        ruled_out = torch.zeros_like(logits, dtype=torch.bool)
        ruled_out[:, 2] = True
        seen.append(logits.detach().double()[:, :2].softmax(-1))
        return F.cross_entropy(logits.masked_fill(ruled_out, -math.inf), y % 2)

    seen: list[Tensor] = []
    _, kfc = run(Classifier(conv_net(), loss=loss), steps=1, fisher="exact")
    p = seen[0]
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[:2, :2] = (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)).mean(0)
    assert torch.allclose(kfc.kfc.layers["net.3"].G.double(), expected, atol=1e-6)
    assert not events(kfc)


# Degenerate layers.


def test_a_layer_whose_units_are_all_dead_does_no_harm() -> None:
    module = Classifier(conv_net())
    with torch.no_grad():
        module.net[0].bias.fill_(-1e3)
    dead = weights(module.net[0])
    history, kfc = run(module, damping=0.1)
    assert float(kfc.kfc.layers["net.0"].G.abs().max()) == 0
    assert torch.equal(weights(module.net[0]), dead)
    assert all(history.moved())
    assert not events(kfc)


@pytest.mark.parametrize("constant", [0.0, 1.0, 1e4])
def test_a_constant_input_channel_does_no_harm(constant: float) -> None:
    x, y = images(48).tensors
    data = TensorDataset(torch.cat([x, torch.full_like(x, constant)], 1), y)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    module = Classifier(net)
    history, kfc = run(module, data=loader(data))
    assert all(history.moved())
    assert not events(kfc)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_smaller_than_any_factor_train(batch_size: int) -> None:
    """Every factor has less rank than rows."""
    module = Classifier(dense_net())
    _, kfc = run(module, data=loader(images(8), batch_size=batch_size), steps=40, damping=0.1, ema_decay=0.0)
    assert torch.linalg.matrix_rank(kfc.kfc.layers["net.1"].A) <= batch_size
    assert sum(module.losses[-8:]) < 0.5 * sum(module.losses[:8])
    assert not events(kfc)


def test_factors_of_one_by_one_train() -> None:
    x = torch.linspace(-1, 1, 16).reshape(-1, 1)
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    module = Classifier(net, loss=F.mse_loss, optimizer=lambda p: SGD(p, lr=0.5))
    _, kfc = run(module, data=loader(TensorDataset(x, 2 * x), batch_size=16), steps=30, damping=1e-3)
    assert kfc.kfc.layers["net.0"].A.shape == (1, 1)
    assert module.losses[-1] < 1e-3 * module.losses[0]


class SometimesUnused(nn.Module):
    """Leaves one of its layers out in every second call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.extra, self.last = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.first(x.flatten(1)).tanh()
        return self.last(self.extra(h).tanh() if self.calls % 2 == 0 else h)


def test_a_layer_unused_in_some_steps_moves_in_the_others_only() -> None:
    module = Classifier(SometimesUnused(), optimizer=lambda p: SGD(p, lr=0.1))
    kfc = KFCCallback(**OPTIONS)
    extra: list[Tensor] = [weights(module.net.extra)]
    fit(module, kfc=kfc, callbacks=[Watch("on_train_batch_end", lambda *a: extra.append(weights(module.net.extra)))])
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(extra)]
    assert moved == [False, True, False, True]
    assert kfc.kfc.layers["extra" if "extra" in kfc.kfc.layers else "net.extra"].averages["A"].average.weight > 0
    assert not events(kfc)


# Batches and losses with nothing in them.


@DROPS
def test_a_loss_of_zero_does_no_harm() -> None:
    module = Classifier(conv_net(), loss=lambda logits, y: 0 * F.cross_entropy(logits, y))
    start = weights(module)
    history, kfc = run(module)
    assert all(torch.equal(w, start) for w in history.weights)
    assert events(kfc) == {"losses_without_gradient": 4}


@DROPS
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("bad", [0, 2])
def test_a_batch_whose_labels_are_all_ignored_does_no_harm(reduction: str, bad: int) -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, ignore_index=-1, reduction=reduction)

    module = Hostile(at_step(bad, lambda x, y: (x, torch.full_like(y, -1))), loss=loss)
    module.make_optimizer = lambda p: SGD(p, lr=0.01)
    history, kfc = run(module)
    assert history.moved() == [step != bad for step in range(1, 6)]
    assert events(kfc) == {"losses_without_gradient": 1}


class EmptyNow(DataLoader):
    """Gives a batch without examples at one position."""

    def __init__(self, at: int) -> None:
        super().__init__(images(40), batch_size=8)
        self.at = at

    def __iter__(self) -> Any:
        for number, (x, y) in enumerate(super().__iter__()):
            yield (x[:0], y[:0]) if number == self.at else (x, y)


@DROPS
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_batch_without_examples_leaves_every_average_as_it_was(fisher: str, reduction: str, at: int) -> None:
    factors: list[Tensor | None] = []

    def look(*args: Any) -> None:
        layer = kfc.kfc.layers["net.3"]
        factors.append(layer.A.clone() if layer.averages else None)

    module = Classifier(conv_net(), loss=lambda logits, y: F.cross_entropy(logits, y, reduction=reduction))
    module.make_optimizer = lambda p: SGD(p, lr=0.01)
    kfc = KFCCallback(fisher=fisher, factor_every_n_steps=1, inverse_every_n_steps=1, **FIXED)
    fit(module, kfc=kfc, data=EmptyNow(at), callbacks=[Watch("on_train_batch_end", look)], max_steps=5)
    if at == 0:
        assert factors[0] is None
    else:
        assert torch.equal(factors[at], factors[at - 1])
    assert bool(torch.isfinite(weights(module)).all())
    assert events(kfc) == {"empty_statistics": 1}


# Absurd scales.


@pytest.mark.parametrize("inverse", ["cholesky"])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
def test_the_step_does_not_depend_on_the_scale_of_the_loss_when_the_damping_has_the_same(
    inverse: Any, scale: float
) -> None:
    """The Fisher matrix and the gradient scale alike, so that V of E5 stays."""
    moves = []
    for factor in (1.0, scale):
        torch.manual_seed(3)
        module = Classifier(
            dense_net(),
            loss=lambda logits, y, by=factor: by * F.cross_entropy(logits, y),
            optimizer=lambda p: SGD(p, lr=0.01),
        )
        start = weights(module)
        history, kfc = run(module, damping=0.1 * factor, kl_clip=None, inverse=inverse)
        moves.append(history.weights[-1] - start)
        assert not events(kfc)
    ratio = float((moves[1] - moves[0]).norm() / moves[0].norm())
    assert ratio < 1e-3, f"relative difference {ratio:.1e}"


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_an_absurd_scale_at_the_default_damping_breaks_nothing(scale: float) -> None:
    module = Classifier(conv_net(), loss=lambda logits, y: scale * F.cross_entropy(logits, y))
    history, kfc = run(module, steps=20)
    assert not events(kfc)
    assert max(module.losses) <= 1.5 * module.losses[0]
    assert all(history.moved()) == (scale > 1)


@pytest.mark.filterwarnings("ignore:KFC at step .* no Cholesky factorisation")
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_an_absurd_scale_of_the_inputs_breaks_nothing(scale: float) -> None:
    x, y = images(48).tensors
    module = Classifier(conv_net(), optimizer=lambda p: SGD(p, lr=0.1))
    _, kfc = run(module, data=loader(TensorDataset(scale * x, y)), steps=12)
    # A factor that is singular to the last bit of float64 may have no inverse.
    assert set(events(kfc)) <= ({"failed_factorisations"} if scale > 1 else set())


def test_events_print_what_happened_and_survive_a_checkpoint() -> None:
    counted = Events()
    assert str(counted) == ""
    counted.count("nonfinite_gradients")
    counted.count("nonfinite_gradients")
    assert str(counted) == "nonfinite gradients: 2"
    again = Events()
    again.load_state_dict({**counted.state_dict(), "unknown": 5})
    assert again == counted
