"""The automatic loop: what is preconditioned when, with accumulation, clipping, schedulers and skipped steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

from lightning_kfc import KFCCallback
from tests.helpers.examples import examples
from tests.helpers.lightning_nets import (
    QUIET,
    ConvNet,
    Regression,
    damped_solve,
    head_gradient,
    head_values,
    images,
    loader,
    regression_factors,
    relative_error,
    trainer,
    vectors,
)

pytestmark = QUIET


class Spy(Callback):
    """Notes the plain gradient of each backward, and the logits of given inputs at each step's weights."""

    def __init__(self, inputs=None):
        self.inputs = vectors().tensors[0] if inputs is None else inputs
        self.plain, self.logits = [], []

    def on_after_backward(self, trainer, pl_module):
        self.plain.append(head_gradient(pl_module))

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.logits.append(pl_module.head(self.inputs).detach())


class Recording(Regression):
    """Notes the gradient that its optimizer gets, after clipping."""

    def __init__(self, **options):
        super().__init__(**options)
        self.stepped = []

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.stepped.append(head_gradient(self))


@given(damping=st.floats(1e-3, 1.0), seed=st.integers(0, 99))
@examples(10)
def test_the_optimizer_gets_the_dense_solve_of_the_plain_gradient(damping, seed):
    torch.manual_seed(seed)
    module, spy = Recording(), Spy()
    trainer(KFCCallback(damping=damping, fisher="exact", kl_clip=None), spy).fit(module, loader(vectors(), 8))
    A, G = regression_factors(spy.logits[0], vectors().tensors[0], torch.full((8,), 1 / 8, dtype=torch.float64))
    expected = damped_solve(A, G, spy.plain[0], damping)
    assert relative_error(module.stepped[0], expected) < 1e-9


@pytest.mark.parametrize(("batch_size", "accumulated"), [(2, 4), (4, 2), (1, 8)])
def test_factors_and_update_of_accumulated_micro_batches_are_those_of_the_whole_batch(batch_size, accumulated):
    module, spy = Recording(), Spy()
    callback = KFCCallback(damping=0.003, fisher="exact", kl_clip=None)
    fitted = trainer(callback, spy, accumulate_grad_batches=accumulated)
    fitted.fit(module, loader(vectors(), batch_size))
    inputs, targets = vectors().tensors
    A, G = regression_factors(spy.logits[0], inputs, torch.full((8,), 1 / 8, dtype=torch.float64))
    head = callback.kfc.layers["head"]
    assert relative_error(head.A, A) < 1e-12
    assert relative_error(head.G, G) < 1e-12
    whole = spy.logits[0].requires_grad_()
    F.cross_entropy(whole, targets).backward()
    gradient = whole.grad.T @ torch.cat([inputs, torch.ones(8, 1, dtype=torch.float64)], 1)
    assert relative_error(module.stepped[-1], damped_solve(A, G, gradient, 0.003)) < 1e-9


def test_the_short_tail_of_an_epoch_has_the_factors_of_its_own_weights():
    # Three micro-batches, accumulated by two: the third is a step of its own, with half the weight.
    inputs = vectors(6).tensors[0][4:]
    module, spy = Recording(), Spy(inputs)
    callback = KFCCallback(fisher="exact", ema_decay=0.0, damping=0.01, kl_clip=None)
    trainer(callback, spy, accumulate_grad_batches=2).fit(module, loader(vectors(6), 2))
    A, G = regression_factors(spy.logits[1], inputs, torch.full((2,), 1 / 4, dtype=torch.float64))
    head = callback.kfc.layers["head"]
    assert relative_error(head.A, A) < 1e-12
    assert relative_error(head.G, G) < 1e-12
    assert relative_error(module.stepped[-1], damped_solve(A, G, spy.plain[-1], 0.01)) < 1e-9


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_acts_on_the_preconditioned_gradient(algorithm):
    module, spy = Recording(), Spy()
    bound = 0.05
    callback = KFCCallback(damping=0.003, fisher="exact", kl_clip=None)
    options = {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm}
    trainer(callback, spy, **options).fit(module, loader(vectors(), 8))
    A, G = regression_factors(spy.logits[0], vectors().tensors[0], torch.full((8,), 1 / 8, dtype=torch.float64))
    update = damped_solve(A, G, spy.plain[0], 0.003)
    assert float(update.norm()) > 2 * bound
    expected = update.clamp(-bound, bound) if algorithm == "value" else update * bound / (update.norm() + 1e-6)
    assert relative_error(module.stepped[0], expected) < 1e-9


class TwoRates(ConvNet):
    """The body and the head have learning rates of their own, which a warm-up raises at every step."""

    def configure_optimizers(self):
        groups = [{"params": self.body.parameters(), "lr": 0.3}, {"params": self.head.parameters(), "lr": 0.7}]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


class Rates(Callback):
    """Checks E7 at every step from the plain gradients, the inverses and the learning rates in force."""

    def __init__(self, clip):
        self.clip, self.found, self.expected = clip, [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.plain = {name: p.grad.clone() for name, p in pl_module.named_parameters()}

    def check(self, trainer, pl_module, optimizer):
        kfc = trainer.callbacks[1].kfc
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        total = 0.0
        for layer in kfc.layers.values():
            own = layer.adapter.own_parameters()
            names = {id(p): name for name, p in pl_module.named_parameters()}
            gradient = layer.adapter.matrix({key: self.plain[names[id(p)]] for key, p in own.items()})
            rate = rates[id(next(iter(own.values())))]
            total += rate**2 * float((layer.inverse.solve(gradient) * gradient).sum())
        self.expected.append(min(1.0, (self.clip / total) ** 0.5))
        self.found.append(kfc.last_step.kl_clip_factor)


def test_the_kl_clip_reads_each_groups_learning_rate_at_every_step():
    spy = Rates(clip=1e-3)

    class After(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            spy.check(trainer, pl_module, optimizer)

    trainer(spy, KFCCallback(kl_clip=1e-3), After(), max_epochs=2).fit(TwoRates(), loader(images(16)))
    assert len(spy.found) == 8
    assert len(set(spy.found)) > 4
    assert torch.allclose(torch.tensor(spy.found), torch.tensor(spy.expected), rtol=1e-6)


def test_each_step_is_an_optimizer_step_of_the_schedule():
    seen = []

    class Steps(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            last = trainer.callbacks[0].kfc.last_step
            seen.append((trainer.global_step, None if last is None else last.step))

    fitted = trainer(KFCCallback(), Steps(), accumulate_grad_batches=2)
    fitted.fit(Regression(), loader(vectors(10), 2))
    assert seen == [(0, None), (1, 0), (1, 0), (2, 1), (3, 2)]


class Skipping(Regression):
    """Gives no loss for some batches."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx in (1, 2) else super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss_changes_nothing_and_counts_no_step():
    module, callback = Skipping(), KFCCallback(damping=0.003, fisher="exact", kl_clip=None)
    values = []

    class Values(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            values.append(head_values(pl_module))

    trainer(callback, Values()).fit(module, loader(vectors(16)))
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[1], values[2])
    assert not torch.equal(values[2], values[3])
    assert callback.kfc.last_step.step == 1


class Stale(Recording):
    """Steps without a backward in its second batch, as SWA's extra epoch does: the gradient is the one before."""

    def on_train_batch_start(self, batch, batch_idx):
        self.trainer.fit_loop._skip_backward = batch_idx == 1


def test_a_gradient_is_preconditioned_once():
    module = Stale(lr=1e-6)
    trainer(KFCCallback(kl_clip=None)).fit(module, loader(vectors(12)))
    assert torch.equal(module.stepped[0], module.stepped[1])
    assert not torch.equal(module.stepped[1], module.stepped[2])


@pytest.mark.parametrize("options", [{"fast_dev_run": 3}, {"overfit_batches": 1, "max_epochs": 3}])
@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.filterwarnings("ignore:.*overfit_batches")
def test_short_runs_train_with_the_callback(options):
    module, callback = Recording(), KFCCallback(damping=0.003, fisher="exact", kl_clip=None)
    inputs = vectors(12).tensors[0][:4]
    spy = Spy(inputs)
    trainer(callback, spy, **options).fit(module, loader(vectors(12)))
    assert len(module.stepped) == 3
    A, G = regression_factors(spy.logits[0], inputs, torch.full((4,), 1 / 4, dtype=torch.float64))
    assert relative_error(module.stepped[0], damped_solve(A, G, spy.plain[0], 0.003)) < 1e-9


class Partly(Regression):
    """Uses an auxiliary layer in some steps only."""

    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Linear(5, 3, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + F.cross_entropy(self.auxiliary(batch[0]), batch[1]) if batch_idx % 3 == 2 else loss


def test_a_layer_used_in_other_steps_than_the_dates_has_its_statistics_taken_when_it_is_used():
    callback = KFCCallback(
        damping=0.003, warmup_steps=0, factor_every_n_steps=4, inverse_every_n_steps=4, fisher="exact"
    )
    seen = {}

    class Seen(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            layer = callback.kfc.layers["auxiliary"]
            seen[batch_idx] = layer.averages["A"].value.clone() if layer.averages else None

    trainer(callback, Seen()).fit(Partly(), loader(vectors(72), 4))
    # Dates are 0, 4, 8, 12, 16; it is used at 2, 5, 8, 11, 14, 17: at 2 and at 14 it is seen to have missed one.
    assert seen[4] is None
    assert seen[5] is not None
    assert [i for i in range(6, 18) if not torch.equal(seen[i], seen[i - 1])] == [8, 17]
