"""Together with Lightning's own callbacks and tuners, each with an assertion on the result."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_kfc import KFCCallback
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

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:The `lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:To get the last learning rate computed by the scheduler"),
]


class Weights(Callback):
    """Notes the weights of the head at the start of every epoch and after every step."""

    def __init__(self):
        self.epochs, self.steps = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append(head_values(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(head_values(pl_module))


class Stepped(ConvNet):
    """Notes the gradients that its optimizer gets, and the last learning rate."""

    def __init__(self):
        super().__init__()
        self.stepped, self.rate = [], None

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.stepped.append(head_gradient(self))
        self.rate = optimizer.param_groups[0]["lr"]


def test_stochastic_weight_averaging_averages_the_preconditioned_run():
    module, weights, callback = Regression(), Weights(), KFCCallback()
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
    trainer(weights, averaging, callback, max_epochs=4).fit(module, loader(vectors()))
    assert callback.kfc.step == 7
    # Averages are taken of the weights with which epochs 1, 2 and 3 start.
    assert relative_error(head_values(module), torch.stack(weights.epochs[1:]).mean(0)) < 1e-12


def test_the_epoch_that_averages_batch_norm_preconditions_nothing_a_second_time():
    module, weights, callback = Stepped(), Weights(), KFCCallback()
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
    trainer(weights, averaging, callback, max_epochs=3).fit(module, loader(images()))
    # Three epochs of two steps; the fourth only updates batch norm, yet Lightning steps once with the last gradient.
    assert len(module.stepped) == 7
    assert torch.equal(module.stepped[6], module.stepped[5])
    assert callback.kfc.last_step.step == 5
    averaged = torch.stack(weights.epochs[1:3]).mean(0)
    assert relative_error(head_values(module), averaged - module.rate * module.stepped[6]) < 1e-12


@pytest.mark.parametrize("decay", [None, 0.5])
def test_weight_averaging_averages_the_preconditioned_run(decay):
    module, weights, callback = Regression(), Weights(), KFCCallback()
    averaging = WeightAveraging() if decay is None else EMAWeightAveraging(decay=decay)
    trainer(weights, averaging, callback).fit(module, loader(vectors(16)))
    assert callback.kfc.step == 3
    expected = weights.steps[0]
    for number, values in enumerate(weights.steps[1:], start=1):
        share = 1 / (number + 1) if decay is None else 1 - decay
        expected = expected + share * (values - expected)
    assert relative_error(head_values(module), expected) < 1e-12
    assert not any(part._forward_hooks for part in averaging._average_model.modules())


class Backbone(Regression):
    """A Linear backbone that is frozen at first."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(5, 5, dtype=torch.float64)
        self.inputs = []

    def forward(self, inputs):
        self.inputs.append(inputs)
        return self.head(self.backbone(inputs))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_a_backbone_that_is_unfrozen_gets_its_own_factors_and_learning_rate():
    module, callback = Backbone(), KFCCallback(ema_decay=0.0, fisher="exact")
    start = module.backbone.weight.detach().clone()
    seen = []

    class Seen(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            layer = callback.kfc.layers["backbone"]
            rates = callback.kfc.layers.learning_rates(trainer.optimizers[0])
            seen.append((dict(layer.averages), layer.inverse, pl_module.backbone.weight.detach().clone(), rates))

    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.03, verbose=False)
    trainer(finetuning, callback, Seen(), max_epochs=2).fit(module, loader(vectors()))
    averages, inverse, weight, rates = seen[0]
    assert (averages, inverse) == ({}, None)
    assert torch.equal(weight, start)
    assert rates == {"head": 0.1}
    averages, inverse, weight, rates = seen[1]
    rows = torch.cat([module.inputs[-1], torch.ones(4, 1, dtype=torch.float64)], 1)
    assert relative_error(averages["A"].value[0], rows.T @ rows / 4) < 1e-12
    assert inverse is not None
    assert not torch.equal(weight, start)
    assert rates == {"head": 0.1, "backbone": 0.03}
    assert callback.kfc.events.restarted_layers == 0


def test_an_accumulation_schedule_gives_each_epoch_the_factors_of_its_own_batches():
    module, callback = Regression(), KFCCallback(ema_decay=0.0, fisher="exact")
    inputs = vectors().tensors[0]
    found = []

    class Seen(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.logits = pl_module.head(inputs).detach()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if not trainer.fit_loop._should_accumulate():
                layer = callback.kfc.layers["head"]
                found.append((trainer.current_epoch, batch_idx, self.logits, layer.A, layer.G))

    scheduler = GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
    trainer(scheduler, callback, Seen(), max_epochs=3).fit(module, loader(vectors(), 2))
    assert [entry[:2] for entry in found] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 3), (2, 3)]
    for epoch, batch_idx, logits, A, G in found:
        size = 2 * 2**epoch
        part = slice(2 * batch_idx + 2 - size, 2 * batch_idx + 2)
        expected = regression_factors(logits[part], inputs[part], torch.full((size,), 1 / size, dtype=torch.float64))
        assert relative_error(A, expected[0]) < 1e-12
        assert relative_error(G, expected[1]) < 1e-12


class Tuned(Regression):
    """Has a learning rate and a batch size to find, and notes the hooks within its training step."""

    def __init__(self):
        super().__init__()
        self.learning_rate, self.batch_size, self.hooks = 0.1, 2, []

    def training_step(self, batch, batch_idx):
        self.hooks.append(len(self.head._forward_hooks))
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader(vectors(64), self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


@pytest.mark.parametrize("place", ["before", "after", "none"])
def test_the_learning_rate_finder_records_nothing_and_finds_what_it_finds_without_us(tmp_path, place):
    curves = []
    for present in (place, "none"):
        torch.manual_seed(4)
        module = Tuned()
        finder = LearningRateFinder(num_training_steps=20, update_attr=False)
        callback = KFCCallback()
        callbacks = {"before": [callback, finder], "after": [finder, callback], "none": [finder]}[present]
        fitted = trainer(*callbacks, default_root_dir=tmp_path, max_epochs=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted.fit(module)
        assert not [w for w in caught if "KFC" in str(w.message)]
        curves.append(finder.optimal_lr.results)
        assert module.hooks[:20] == [0] * 20
        if present != "none":
            assert module.hooks[20] == 1
            assert callback.kfc.step == 31
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_the_tuner_finds_what_it_finds_without_us(tmp_path):
    found = []
    for callbacks in ([KFCCallback()], []):
        torch.manual_seed(4)
        module = Tuned()
        fitted = trainer(*callbacks, default_root_dir=tmp_path, max_epochs=1)
        tuner = Tuner(fitted)
        rate = tuner.lr_find(module, num_training=20).suggestion()
        size = tuner.scale_batch_size(module, max_trials=3, steps_per_trial=1, init_val=2)
        found.append((rate, size, module.learning_rate, module.batch_size))
        assert not any(module.hooks)
        assert not fitted.optimizers or not fitted.optimizers[0]._optimizer_step_post_hooks
        if callbacks:
            fitted.fit(module)
            assert callbacks[0].kfc.layers["head"].inverse is not None
    assert found[0] == found[1]
    assert found[0][1] == 8


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before", "after"])
def test_the_batch_size_finder_records_nothing(tmp_path, place):
    module, callback = Tuned(), KFCCallback()
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=4)
    callbacks = [callback, finder] if place == "before" else [finder, callback]
    trainer(*callbacks, default_root_dir=tmp_path, max_epochs=1).fit(module)
    assert finder.optimal_batch_size == 8
    assert module.hooks[:2] == [0, 0]
    assert callback.kfc.step == sum(hook >= 0 for hook in module.hooks[2:]) - 1
    assert callback.kfc.layers["head"].inverse is not None


class ScaledManual(Regression):
    """Manual optimization in half precision under a gradient scaler."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.head.float()
        self.plain, self.stepped = [], []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        logits = self(batch[0].float())
        self.logits = logits.detach().double()
        self.manual_backward(F.cross_entropy(logits, batch[1]))
        self.plain.append(head_gradient(self).double() / self.trainer.precision_plugin.scaler.get_scale())
        optimizer.step()

    def on_before_optimizer_step(self, optimizer):
        self.stepped.append(head_gradient(self).double())


def test_a_manual_step_under_a_gradient_scaler_gets_the_dense_solve():
    module, callback = ScaledManual(), KFCCallback(damping=0.01, fisher="exact", kl_clip=None)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    trainer(callback, plugins=[plugin]).fit(module, loader(vectors(), 8))
    A, G = regression_factors(module.logits, vectors().tensors[0], torch.full((8,), 1 / 8, dtype=torch.float64))
    expected = damped_solve(A, G, module.plain[0], 0.01)
    # Half precision has 11 bits.
    assert relative_error(module.stepped[0], expected) < 1e-2
