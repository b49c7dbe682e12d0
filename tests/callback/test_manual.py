"""Manual optimization: closures, several optimizers, adversarial networks, and what goes past Lightning's hooks."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from lightning_kfc import KFCCallback
from lightning_kfc.curvature.coverage import NO_STATISTICS
from tests.helpers.lightning_nets import (
    QUIET,
    Regression,
    damped_solve,
    head_gradient,
    homogeneous,
    loader,
    regression_factors,
    relative_error,
    trainer,
    vectors,
)

pytestmark = QUIET
INPUTS, TARGETS = vectors().tensors


class Manual(Regression):
    """Softmax regression with a training step of its own; notes plain and preconditioned gradients."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False
        self.plain, self.logits, self.stepped = [], [], []

    def on_after_backward(self):
        self.plain.append(head_gradient(self))

    def on_before_optimizer_step(self, optimizer):
        self.stepped.append(head_gradient(self))

    def loss(self, batch):
        logits = self(batch[0])
        self.logits.append(logits.detach())
        return F.cross_entropy(logits, batch[1])

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class WithClosure(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class Toggled(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        with self.toggled_optimizer(optimizer):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


class OwnGradients(Manual):
    """Overwrites its gradients after the backward, as gradient surgery between several losses does."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        parameters = list(self.head.parameters())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        self.manual_backward(loss)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.flip(0)
        self.plain[-1] = head_gradient(self)
        optimizer.step()


@pytest.mark.parametrize("module_class", [Manual, WithClosure, Toggled, OwnGradients])
def test_every_form_of_a_manual_step_gets_the_dense_solve(module_class):
    module = module_class()
    trainer(KFCCallback(damping=0.01, fisher="exact", ema_decay=0.0, kl_clip=None)).fit(module, loader(vectors(), 4))
    assert len(module.stepped) == 2
    for step, inputs in enumerate((INPUTS[:4], INPUTS[4:])):
        A, G = regression_factors(module.logits[step], inputs, torch.full((4,), 1 / 4, dtype=torch.float64))
        assert relative_error(module.stepped[step], damped_solve(A, G, module.plain[step], 0.01)) < 1e-9


class Surgery(Manual):
    """Takes the gradient of each loss by a backward, and sets their sum."""

    def __init__(self):
        super().__init__()
        self.side = nn.Linear(3, 2, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        logits = self(batch[0])
        gradients = []
        for loss in (F.mse_loss(self.side(logits), batch[0][:, :2]), F.cross_entropy(logits, batch[1])):
            optimizer.zero_grad()
            self.manual_backward(loss, retain_graph=True)
            gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()])
        for parameter, *both in zip(self.parameters(), *gradients, strict=True):
            parameter.grad = sum(both)
        optimizer.step()


def test_statistics_that_were_zeroed_away_are_the_cause_of_no_curvature():
    with pytest.warns(UserWarning, match="KFC has no curvature for 'side'") as seen:
        trainer(KFCCallback()).fit(Surgery(), loader(vectors(), 4))
    (message,) = (str(w.message) for w in seen if "no curvature" in str(w.message))
    assert "were set to zero before the step. Back-propagate the sum of the losses" in message
    assert "a penalty" not in message


class Accumulating(Manual):
    """Steps after every second batch."""

    def __init__(self, zero_first):
        super().__init__()
        self.zero_first = zero_first

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        if self.zero_first and batch_idx % 2 == 0:
            optimizer.zero_grad(set_to_none=False)
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2 == 1:
            optimizer.step()
            if not self.zero_first:
                optimizer.zero_grad()


@pytest.mark.parametrize("zero_first", [True, False])
def test_manually_accumulated_batches_have_the_factors_of_all_of_them(zero_first):
    module = Accumulating(zero_first)
    callback = KFCCallback(damping=0.01, fisher="exact", kl_clip=None)
    trainer(callback).fit(module, loader(vectors(), 4))
    A, G = regression_factors(torch.cat(module.logits), INPUTS, torch.full((8,), 1 / 8, dtype=torch.float64))
    assert relative_error(callback.kfc.layers["head"].A, A) < 1e-12
    assert relative_error(callback.kfc.layers["head"].G, G) < 1e-12
    assert relative_error(module.stepped[0], damped_solve(A, G, module.plain[1], 0.01)) < 1e-9


class Adversarial(LightningModule):
    """A linear generator against logistic regression; the generator learns at every ``every``-th batch."""

    def __init__(self, order="gd", toggled=False, detached=True, set_to_none=True, every=1, phase=0):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Linear(3, 5, dtype=torch.float64)
        self.discriminator = nn.Linear(5, 1, dtype=torch.float64)
        self.order, self.toggled, self.detached, self.set_to_none = order, toggled, detached, set_to_none
        self.every, self.phase = every, phase
        self.seen = {}

    def generator_loss(self, noise):
        weight, bias = self.discriminator.weight.detach().clone(), self.discriminator.bias.detach().clone()
        fake = self.generator(noise)
        logits = self.discriminator(fake)
        self.seen["g"] = (noise, weight, (fake @ weight.T + bias).detach())
        return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))

    def discriminator_loss(self, real, noise):
        fake = self.generator(noise)
        fake = fake.detach() if self.detached else fake
        found = []
        for inputs, label in ((real, 1.0), (fake, 0.0)):
            logits = self.discriminator(inputs)
            found.append(F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label)))
        both = torch.cat([real, fake.detach()])
        self.seen["d"] = (both, self.discriminator(both.clone()).detach())
        return sum(found) / 2

    def training_step(self, batch, batch_idx):
        optimizers = dict(zip("gd", self.optimizers(), strict=True))
        real, noise = batch[0], batch[0][:, :3] ** 2
        for which in self.order:
            if which == "g" and batch_idx % self.every != self.phase:
                continue
            optimizer = optimizers[which]
            if self.toggled:
                self.toggle_optimizer(optimizer)
            loss = self.generator_loss(noise) if which == "g" else self.discriminator_loss(real, noise)
            optimizer.zero_grad(set_to_none=self.set_to_none)
            self.manual_backward(loss)
            optimizer.step()
            if self.toggled:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.generator.parameters(), lr=0.1),
            torch.optim.SGD(self.discriminator.parameters(), lr=0.2),
        ]


def expected_factors(seen):
    """The exact factors of both networks, each from its own optimizer's loss alone."""
    noise, weight, logits = seen["g"]
    p = logits.sigmoid()
    per_example = p * (1 - p) / len(p)
    generator = homogeneous(noise).T @ homogeneous(noise) / len(noise), float(per_example.sum()) * weight.T @ weight
    both, logits = seen["d"]
    p = logits.sigmoid()
    discriminator = homogeneous(both).T @ homogeneous(both) / len(both), (p * (1 - p) / len(p)).sum().reshape(1, 1)
    return {"generator": generator, "discriminator": discriminator}


@pytest.mark.slow
@pytest.mark.parametrize("order", ["gd", "dg"])
@pytest.mark.parametrize("toggled", [True, False])
@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("include", [None, "generator", "discriminator"])
def test_each_network_has_the_statistics_of_its_own_optimizers_loss_alone(
    order, toggled, detached, set_to_none, include
):
    module = Adversarial(order, toggled, detached, set_to_none)
    callback = KFCCallback(damping=0.01, kl_clip=0.03, fisher="exact", ema_decay=0.0, include=include)
    trainer(callback).fit(module, loader(vectors(16), 4))
    names = ["generator", "discriminator"] if include is None else [include]
    assert list(callback.kfc.layers) == names
    assert callback.kfc.step == 3  # the fourth of four steps is not over before a fifth begins
    for name in names:
        A, G = expected_factors(module.seen)[name]
        assert relative_error(callback.kfc.layers[name].A, A) < 1e-12, name
        assert relative_error(callback.kfc.layers[name].G, G) < 1e-12, name


@pytest.mark.parametrize("include", ["generator", "discriminator"])
def test_the_network_that_is_not_included_is_trained_with_its_plain_gradient(include):
    plain = "discriminator" if include == "generator" else "generator"
    runs = []
    for callbacks in ([KFCCallback(include=include, kl_clip=None, average_weights=None)], []):
        torch.manual_seed(3)
        module = Adversarial()
        start = {name: p.detach().clone() for name, p in module.named_parameters()}
        trainer(*callbacks).fit(module, loader(vectors(4), 4))
        runs.append({name: p.detach() - start[name] for name, p in module.named_parameters()})
    ours, theirs = runs
    assert not torch.allclose(ours[f"{include}.weight"], theirs[f"{include}.weight"])
    if plain == "generator":
        # It steps first, before the callback has changed anything.
        assert torch.equal(ours[f"{plain}.weight"], theirs[f"{plain}.weight"])


@pytest.mark.parametrize(("every", "phase"), [(4, 1), (3, 2), (5, 4)])
def test_a_network_that_learns_at_other_steps_than_the_dates_still_gets_fresh_factors(every, phase):
    module = Adversarial(every=every, phase=phase)
    periods = {"warmup_steps": 0, "factor_every_n_steps": 6, "inverse_every_n_steps": 6}
    callback = KFCCallback(damping=0.01, kl_clip=0.03, fisher="exact", ema_decay=0, **periods)
    trainer(callback).fit(module, loader(vectors(240), 4))
    folded = callback.kfc.state_dict()["due"]["folded"]
    inverses = callback.kfc.state_dict()["due"]["factorised"]
    # 60 steps: it waits at most for its own next turn after the turn that showed it had missed a date.
    assert folded["generator"] >= 60 - 6 - 2 * every
    assert inverses["generator"][0] >= 60 - 12 - 2 * every
    assert folded["discriminator"] == 54


def test_between_its_turns_nothing_is_recorded_for_long():
    counts = []

    class Counting(Adversarial):
        def training_step(self, batch, batch_idx):
            counts.append(len(self.generator._forward_hooks) + len(self.discriminator._forward_hooks))
            super().training_step(batch, batch_idx)

    # The generator learns once and never again.
    module = Counting(every=1000, phase=3)
    callback = KFCCallback(damping=0.01, kl_clip=0.03, warmup_steps=0, factor_every_n_steps=5, inverse_every_n_steps=5)
    trainer(callback).fit(module, loader(vectors(160), 4))
    dates = [i for i, count in enumerate(counts) if count == 2]
    waiting = [i for i, count in enumerate(counts) if count == 1]
    assert dates == list(range(0, 40, 5))
    assert waiting == [4, 6, 7, 8]


class TwoHeads(LightningModule):
    """Two regressions with an optimizer each, stepped after one backward of both losses."""

    def __init__(self, rates=(0.3, 0.9)):
        super().__init__()
        self.automatic_optimization = False
        self.heads = nn.ModuleList(nn.Linear(5, 3, dtype=torch.float64) for _ in range(2))
        self.rates = rates
        self.moved = []

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(sum(F.cross_entropy(head(batch[0]), batch[1]) for head in self.heads))
        plain = [torch.cat([head.weight.grad, head.bias.grad[:, None]], 1) for head in self.heads]
        before = [torch.cat([head.weight, head.bias[:, None]], 1).detach() for head in self.heads]
        logits = [head(batch[0]).detach() for head in self.heads]
        first.step()
        second.step()
        after = [torch.cat([head.weight, head.bias[:, None]], 1).detach() for head in self.heads]
        self.moved.append([(p, z, b - a) for p, z, a, b in zip(plain, logits, after, before, strict=True)])

    def configure_optimizers(self):
        return [torch.optim.SGD(head.parameters(), lr=lr) for head, lr in zip(self.heads, self.rates, strict=True)]


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_each_optimizers_step_is_clipped_by_its_own_learning_rate(clip):
    module = TwoHeads()
    trainer(KFCCallback(damping=0.01, fisher="exact", kl_clip=clip)).fit(module, loader(vectors(), 8))
    for rate, (plain, logits, moved) in zip(module.rates, module.moved[0], strict=True):
        A, G = regression_factors(logits, INPUTS, torch.full((8,), 1 / 8, dtype=torch.float64))
        update = damped_solve(A, G, plain, 0.01)
        quadratic = rate**2 * float((update * plain).sum())
        nu = 1.0 if clip is None else min(1.0, (clip / quadratic) ** 0.5)
        assert clip is None or nu < 1
        assert relative_error(moved, rate * nu * update) < 1e-9


# What goes past Lightning's hooks.


class AroundTheWrapper(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Unwrapping(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.optimizer.step()


class OwnStep(Regression):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        optimizer.optimizer.step()


@pytest.mark.parametrize("module_class", [AroundTheWrapper, Unwrapping, OwnStep])
def test_a_step_around_the_wrapped_optimizer_is_reported_once_and_trains_plainly(module_class):
    runs = []
    for callbacks in ([KFCCallback(average_weights=None)], []):
        torch.manual_seed(2)
        module = module_class()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(*callbacks).fit(module, loader(vectors(12), 4))
        runs.append((module.head.weight.detach(), [str(w.message) for w in caught if "KFC" in str(w.message)]))
    (ours, said), (theirs, _) = runs
    assert len(said) == 1, said
    assert "could not precondition a step of SGD" in said[0]
    assert "super().optimizer_step" in said[0]
    assert torch.equal(ours, theirs)


class BareBackward(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


class GradientsAlone(Manual):
    """Sets gradients that no backward has accumulated."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        parameters = list(self.head.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(self.loss(batch), parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()


class BareForOne(Adversarial):
    """The discriminator's loss goes past Lightning."""

    own = None

    def manual_backward(self, loss, *args, **kwargs):
        if loss is self.own:
            loss.backward()
        else:
            super().manual_backward(loss, *args, **kwargs)

    def discriminator_loss(self, real, noise):
        self.own = super().discriminator_loss(real, noise)
        return self.own


@pytest.mark.parametrize("module_class", [BareBackward, GradientsAlone])
def test_a_bare_backward_is_reported_once_and_trains_plainly(module_class):
    runs = []
    for callbacks in ([KFCCallback(average_weights=None)], []):
        torch.manual_seed(2)
        module = module_class()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(*callbacks).fit(module, loader(vectors(12), 4))
        runs.append((module.head.weight.detach(), [str(w.message) for w in caught if "KFC" in str(w.message)]))
    (ours, said), (theirs, _) = runs
    assert len(said) == 1, said
    assert "self.manual_backward(loss)" in said[0]
    assert "gradients of your own" in said[0]
    assert torch.equal(ours, theirs)


def test_a_bare_backward_of_one_of_two_losses_gives_its_network_no_statistics():
    module, callback = BareForOne(), KFCCallback(fisher="exact", ema_decay=0.0)
    with pytest.warns(UserWarning, match="self.manual_backward") as said:
        trainer(callback).fit(module, loader(vectors(16), 4))
    assert len([w for w in said if "KFC" in str(w.message)]) == 1
    assert callback.kfc.layers["discriminator"].averages == {}
    A, G = expected_factors(module.seen)["generator"]
    assert relative_error(callback.kfc.layers["generator"].A, A) < 1e-12
    assert relative_error(callback.kfc.layers["generator"].G, G) < 1e-12


class Wasserstein(Adversarial):
    """The generator's loss is no likelihood."""

    def generator_loss(self, noise):
        return -self.discriminator(self.generator(noise)).mean()


def test_a_loss_that_trains_only_what_is_not_preconditioned_need_not_be_recognised():
    callback = KFCCallback(include="discriminator")
    trainer(callback).fit(Wasserstein(toggled=True), loader(vectors(), 4))
    assert callback.kfc.layers["discriminator"].inverse is not None


def test_an_unrecognised_loss_gives_the_layers_that_it_trains_their_curvature_by_its_own_gradient(caplog):
    callback = KFCCallback()
    trainer(callback).fit(Wasserstein(toggled=True), loader(vectors(), 4))
    assert len([r for r in caplog.records if "the gradient of the loss itself" in r.getMessage()]) == 1
    assert callback.kfc.layers["generator"].inverse is not None
    assert callback.kfc.layers["discriminator"].inverse is not None


class Split(Manual):
    """Weight and bias belong to different optimizers."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD([p], lr=0.1) for p in (self.head.weight, self.head.bias)]


def test_a_layer_split_between_optimizers_is_named_and_trained_plainly():
    runs = []
    for callbacks in ([KFCCallback(average_weights=None)], []):
        torch.manual_seed(2)
        module = Split()
        if callbacks:
            with pytest.warns(UserWarning, match="'head': no optimizer has all parameters of the layer"):
                trainer(*callbacks).fit(module, loader(vectors(), 4))
        else:
            trainer().fit(module, loader(vectors(), 4))
        runs.append(module.head.weight.detach())
    assert torch.equal(*runs)


class WeightAlone(Manual):
    """Its bias is in no optimizer, and its first step has no gradient."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))

    def on_before_optimizer_step(self, optimizer):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([self.head.weight], lr=0.1)


def test_what_has_no_whole_optimizer_and_what_has_no_gradient_is_called_by_its_name(caplog):
    callback = KFCCallback()
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("INFO", "lightning_kfc"):
        warnings.simplefilter("always")
        trainer(callback, max_epochs=8).fit(WeightAlone(), loader(vectors(12), 4))
    said = [str(w.message) for w in caught if "KFC" in str(w.message)]
    assert len(said) == 1
    assert "'head': no optimizer has all parameters of the layer" in said[0]
    assert {row.reason for row in callback.kfc.coverage()} == {NO_STATISTICS}
    assert "parameters have Kronecker factors" not in caplog.text


def test_the_draws_of_two_losses_in_one_step_differ():
    class Twice(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
                found.append(callback.kfc.layers["head"].G.clone())

    found: list[torch.Tensor] = []
    callback = KFCCallback(ema_decay=0.0)
    trainer(callback).fit(Twice(lr=0.0), loader(vectors(), 8))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))
