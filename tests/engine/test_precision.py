"""Training in every precision: what is accumulated in float32, what is scaled, what an overflow may touch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_kfc import KFC, KFCCallback
from lightning_kfc.factors.inverses import INVERSES, CholeskyInverse, Factors
from lightning_kfc.trust_region.outcome import Outcome, Verdict
from lightning_kfc.trust_region.region import TrustRegion
from lightning_kfc.trust_region.snapshot import StepSnapshot
from tests.helpers.harness import QUIET, Classifier, Watch, conv_net, dense_net, fit, images, loader, trainer, weights
from tests.helpers.nets import classes, data, kronecker_layers

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

#: How far bfloat16's 8 bits may move a factor; the other precisions' bits follow.
RELATIVE_ERROR = {"64-true": 1e-10, "32-true": 1e-4, "16-mixed": 1e-2, "bf16-mixed": 5e-2, "bf16-true": 5e-2}


def precision_options(precision: str, **scaler: Any) -> dict[str, Any]:
    if precision == "16-mixed":
        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **scaler))]}
    return {"precision": precision}


def fisher_of_logits(logits: Tensor) -> Tensor:
    """The mean over examples of diag(p) - p p^T."""
    p = logits.double().softmax(-1)
    return (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)).mean(0)


def ratio(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("precision", RELATIVE_ERROR)
def test_factors_and_inverses_are_float32_or_better_and_right_in_every_precision(precision: str) -> None:
    module = Classifier(dense_net())
    x, _ = images(8).tensors
    flat = torch.cat([x.flatten(1).double(), torch.ones(8, 1, dtype=torch.float64)], 1)
    logits = module.net.double()(x.double()).detach()
    module.net.float()
    expected_A, expected_G = flat.T @ flat / 8, fisher_of_logits(logits)
    found = {}

    def look(trainer: Any, pl_module: Any, *rest: Any) -> None:
        first, last = kfc.kfc.layers["net.1"], kfc.kfc.layers["net.3"]
        if not found:
            found.update(A=first.A.clone(), G=last.G.clone())
        wanted = torch.float64 if precision == "64-true" else torch.float32
        for layer in (first, last):
            held = [layer.A, layer.G, *(v for v in layer.inverse.state().values() if isinstance(v, Tensor))]
            assert {tensor.dtype for tensor in held} == {wanted}

    kfc = KFCCallback(fisher="exact", damping=0.1)
    data = loader(images(8))
    fit(module, kfc=kfc, data=data, callbacks=[Watch("on_train_batch_end", look)], **precision_options(precision))
    assert ratio(found["A"], expected_A) < RELATIVE_ERROR[precision]
    assert ratio(found["G"], expected_G) < RELATIVE_ERROR[precision]
    assert module.losses[-1] < 0.7 * module.losses[0]
    assert not str(kfc.kfc.events)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("c", [1e-12, 1e-6, 1e6, 1e12])
def test_seeds_survive_half_precision_at_any_weight_of_the_loss(precision: torch.dtype, c: float) -> None:
    net = dense_net()
    kfc = KFC(net, fisher="exact", damping=c)
    x, y = images(16).tensors
    with kfc.capture(), torch.autocast("cpu", precision):
        logits = net(x)
        loss = c * F.cross_entropy(logits, y)
    kfc.update(loss)
    inner = fisher_of_logits(net(x).detach())
    weight = net[3].weight.detach().double()
    slope = 1 - net[:3](x).detach().double().square()
    p = net(x).detach().double().softmax(-1)
    per_example = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    hidden = torch.einsum("nj,kj,nkl,li,ni->ji", slope, weight, per_example, weight, slope) / len(x)
    tolerance = 1e-2 if precision == torch.float16 else 5e-2
    assert ratio(kfc.layers["3"].G / c, inner) < tolerance
    assert ratio(kfc.layers["1"].G / c, hidden) < tolerance


@dataclass
class ScaledRun:
    """One step with a gradient scaler: the move of the weights, and the gradient by plain autograd."""

    move: Tensor
    gradient: Tensor
    kfc: KFC


def one_scaled_step(*, fused: bool, scale: float, kl_clip: float | None, lr: float = 0.3) -> ScaledRun:
    torch.manual_seed(0)
    module = Classifier(conv_net(), optimizer=lambda p: torch.optim.SGD(p, lr=lr, fused=fused))
    before = weights(module)
    x, y = images(8).tensors
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(module.net(x), y)
    gradient = torch.cat([g.double().reshape(-1) for g in torch.autograd.grad(loss, list(module.parameters()))])
    kfc = KFCCallback(kl_clip=kl_clip)
    options = precision_options("16-mixed", init_scale=scale)
    fit(module, kfc=kfc, data=loader(images(8)), max_steps=1, **options)
    return ScaledRun(before - weights(module), gradient, kfc.kfc)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0**13])
def test_the_clip_bounds_the_step_in_unscaled_units_whoever_unscales(fused: bool, scale: float) -> None:
    kappa, lr = 1e-4, 0.3
    run = one_scaled_step(fused=fused, scale=scale, kl_clip=kappa, lr=lr)
    numbers = run.kfc.last_step
    assert numbers is not None
    assert numbers.kl_clip_factor < 1
    # The move is lr nu V, so that nu lr <move, gradient> = nu^2 lr^2 <V, gradient>, which E7 makes kappa.
    reached = numbers.kl_clip_factor * lr * float(run.move @ run.gradient)
    assert reached / kappa == pytest.approx(1, rel=1e-2)


def test_a_fused_optimizer_moves_the_weights_as_the_plain_one_does() -> None:
    plain, fused = (one_scaled_step(fused=f, scale=2.0**13, kl_clip=None).move for f in (False, True))
    assert ratio(fused, plain) < 1e-4


class Steps(pl.Callback):
    """Notes for each step whether the scaler lets it through, the weights after it and the first layer's A."""

    def __init__(self, kfc: KFCCallback) -> None:
        self.kfc = kfc
        self.applied: list[bool] = []
        self.weights: list[Tensor] = []
        self.factors: list[Tensor | None] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.scale = trainer.precision_plugin.scaler.get_scale()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.applied.append(trainer.precision_plugin.scaler.get_scale() >= self.scale)
        self.weights.append(weights(pl_module))
        layer = self.kfc.kfc.layers["net.1"]
        self.factors.append(layer.A.clone() if layer.averages else None)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_overflow_enter_no_average_and_move_no_weight(fused: bool) -> None:
    decay = 0.5
    kfc = KFCCallback(ema_decay=decay)
    steps = Steps(kfc)
    # No momentum: torch's fused SGD leaves the buffer uninitialised when its first step is skipped.
    module = Classifier(dense_net(), optimizer=lambda p: torch.optim.SGD(p, lr=0.05, fused=fused))
    # Overflows at the start, and again whenever the scale has been raised.
    options = precision_options(
        "16-mixed", init_scale=2.0**40, growth_factor=2.0**24, backoff_factor=2.0**-12, growth_interval=2
    )
    start = weights(module)
    fit(module, kfc=kfc, data=loader(images(64)), callbacks=[steps], max_steps=14, max_epochs=8, **options)
    applied = steps.applied
    assert not applied[0]
    assert any(applied[i] and not applied[i + 1] for i in range(len(applied) - 1))
    assert kfc.kfc.events.nonfinite_gradients == applied.count(False)
    assert kfc.kfc.state_dict()["step"] == applied.count(True)
    mean: Tensor | None = None
    mass = 0.0
    batches = images(64).tensors[0].flatten(1).half().double().split(8)
    for number, finite in enumerate(applied):
        after = steps.weights[number]
        before = start if number == 0 else steps.weights[number - 1]
        assert bool((after == before).all()) != finite
        if finite:
            rows = torch.cat([batches[number % 8], torch.ones(8, 1, dtype=torch.float64)], 1)
            fresh = rows.T @ rows / 8
            mean = (1 - decay) * fresh if mean is None else decay * mean + (1 - decay) * fresh
            mass = decay * mass + (1 - decay)
        factor = steps.factors[number]
        assert (factor is None) == (mean is None)
        if mean is not None and factor is not None:
            assert ratio(factor, mean / mass) < 1e-3


def test_overflow_found_in_parameters_that_are_not_preconditioned_counts_too() -> None:
    module = Classifier(dense_net(batch_norm=True))
    seen: list[bool] = []

    def spoil(trainer: Any, pl_module: Any) -> None:
        pl_module.net[2].weight.grad.fill_(math.inf)

    def look(trainer: Any, pl_module: Any, *rest: Any) -> None:
        seen.append(bool(kfc.kfc.layers["net.1"].averages))

    kfc = KFCCallback()
    # Ahead of us, as a backward that overflows is.
    callbacks = [Watch("on_after_backward", spoil), kfc, Watch("on_train_batch_end", look)]
    fit(module, callbacks=callbacks, max_steps=2, **precision_options("16-mixed", init_scale=2.0))
    assert seen == [False, False]
    assert kfc.kfc.events.nonfinite_gradients == 2


def broken_inverse(is_broken: Callable[[int], bool]) -> type[CholeskyInverse]:
    """Cholesky inverses some of whose factorisations hold an infinity, as a sick solver might give."""

    class Sometimes(CholeskyInverse):
        made = 0

        @classmethod
        def factorise(cls, factors: Factors, damping: float) -> CholeskyInverse:
            good = CholeskyInverse.factorise(factors, damping)
            number, cls.made = cls.made, cls.made + 1
            return CholeskyInverse(good.A_inverse * math.inf, good.G_inverse) if is_broken(number) else good

    return Sometimes


class GradientsSeen(pl.Callback):
    """The gradient of the only layer before and after preconditioning, and its factors."""

    def __init__(self, kfc: KFCCallback) -> None:
        self.kfc = kfc
        self.plain: list[Tensor] = []
        self.written: list[Tensor] = []
        self.factors: list[tuple[Tensor, Tensor]] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        layer = pl_module.net[1]
        self.plain.append(torch.cat([layer.weight.grad, layer.bias.grad.unsqueeze(1)], 1).double())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        layer, found = pl_module.net[1], self.kfc.kfc.layers["net.1"]
        self.written.append(torch.cat([layer.weight.grad, layer.bias.grad.unsqueeze(1)], 1).double())
        self.factors.append((found.A.double(), found.G.double()))


def natural(gradient: Tensor, A: Tensor, G: Tensor, damping: float) -> Tensor:
    """E4 and E5 by dense linear algebra in float64."""
    pi = math.sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
    A = A + pi * math.sqrt(damping) * torch.eye(len(A), dtype=torch.float64)
    G = G + math.sqrt(damping) / pi * torch.eye(len(G), dtype=torch.float64)
    return torch.linalg.solve(G, gradient) @ torch.linalg.inv(A)


def test_an_unusable_update_falls_back_to_the_last_good_inverse_then_to_the_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Warm-up refreshes at steps 0, 1, 2, 3: the first two inverses are broken, then a good one, then a broken one.
    monkeypatch.setitem(INVERSES, "cholesky", broken_inverse(lambda number: number in (0, 1, 3)))
    kfc = KFCCallback(damping=0.1, kl_clip=None, warmup_steps=4)
    seen = GradientsSeen(kfc)
    module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))
    data = loader(images(48))
    with pytest.warns(UserWarning, match=r"no inverse gives 'net\.1' a usable update|new inverse of 'net\.1'"):
        fit(module, kfc=kfc, data=data, callbacks=[seen], max_steps=4)
    assert torch.equal(seen.written[0], seen.plain[0])
    assert torch.equal(seen.written[1], seen.plain[1])
    good = natural(seen.plain[2], *seen.factors[2], 0.1)
    assert ratio(seen.written[2], good) < 1e-4
    assert ratio(seen.written[3], natural(seen.plain[3], *seen.factors[2], 0.1)) < 1e-4
    assert kfc.kfc.events.nonfinite_updates == 2
    assert kfc.kfc.events.restored_inverses == 1


def test_an_update_that_float16_cannot_hold_leaves_the_gradient() -> None:
    net = nn.Linear(4, 2).half()
    kfc = KFC(net, damping=1e-9, kl_clip=None)
    x = torch.randn(8, 4).half() * 0.01
    with kfc.capture():
        loss = F.mse_loss(net(x), torch.full((8, 2), 3e4).half(), reduction="mean") / 2**16
    kfc.update(loss)
    (net(x).sum() * 100).backward()
    kept = [p.grad.clone() for p in net.parameters()]
    with pytest.warns(UserWarning, match="usable update"):
        assert kfc.precondition(lr=0.1)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), kept, strict=True))
    assert kfc.events.nonfinite_updates == 1


@pytest.mark.usefixtures("ten_steps_reviewed")
@pytest.mark.parametrize("precision", ["32-true", "64-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_reviews_replay_the_loss_in_every_precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Outcome] = []
    judge = TrustRegion.judge

    def noting(region: TrustRegion, outcome: Outcome, size: float) -> Verdict:
        outcomes.append(outcome)
        return judge(region, outcome, size)

    monkeypatch.setattr(TrustRegion, "judge", noting)
    fresh: list[float] = []
    outcome_of = StepSnapshot.outcome

    def evaluate(before: StepSnapshot, *arguments: Any) -> Outcome | None:
        plugin = used.precision_plugin
        with torch.no_grad(), plugin.forward_context():
            fresh.append(float(module.loss(module(plugin.convert_input(data)), targets)))
        return outcome_of(before, *arguments)

    monkeypatch.setattr(StepSnapshot, "outcome", evaluate)
    data, targets = images(32).tensors
    data = data if precision == "64-true" else data.float()
    torch.manual_seed(0)
    module, kfc = Classifier(dense_net()), KFCCallback()
    module = module.double() if precision == "64-true" else module.float()
    used = trainer([kfc], max_steps=6, **precision_options(precision))
    used.fit(module, loader(TensorDataset(data, targets), batch_size=32))
    assert len(outcomes) == len(fresh) == 6
    assert kfc.kfc.events.missed_reviews == 0
    for outcome, expected in zip(outcomes, fresh, strict=True):
        assert outcome.loss_after == pytest.approx(expected, rel=RELATIVE_ERROR[precision])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fabric_trains_in_every_precision_and_its_hooks_still_refuse_a_plain_backward(precision: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    wrapped, stepped = fabric.setup(model, optimizer)
    kfc, losses = KFC(model, damping="auto", kl_clip="auto"), []
    x, y = data(64, 6).float(), classes(64, count=3)
    for _ in range(20):
        stepped.zero_grad()
        with kfc.capture():
            loss = F.cross_entropy(wrapped(x), y)
        kfc.back_propagate(loss)
        if precision == "bf16-mixed":
            with pytest.raises(RuntimeError, match=r"fabric\.backward"):
                loss.backward(retain_graph=True)
        fabric.backward(loss)
        kfc.precondition(optimizer=optimizer)
        stepped.step()
        kfc.review(optimizer=optimizer)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert len(kronecker_layers(kfc)) == 2
    assert kfc.reviewer.active
