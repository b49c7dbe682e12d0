"""Averaged weights: what is validated and saved is the average by hand, and what trains is as it is without."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_kfc import KFCCallback
from tests.helpers.lightning_nets import QUIET, ConvNet, Regression, images, loader, trainer, vectors

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:KFCCallback. a momentum of 0.9"),
    pytest.mark.filterwarnings("ignore:KFCCallback. a warm-up of"),
]


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def averaged_by_hand(steps, decay):
    """The exponential average of weights that were recorded after each step."""
    average = steps[0]
    for k, step in enumerate(steps, 1):
        share = min((k - 1) / (k + 9), decay)
        average = {name: share * average[name] + (1 - share) * value for name, value in step.items()}
    return average


def whose_statistics_are_known(steps):
    """The weights with a later forward, which are averaged in a module with batch norm; without any the first."""
    return steps[:-1] or steps


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=lambda text, n=name: f"{n}: {text}")


class Noted:
    """Notes losses, weights after each step, and weights as validation sees them."""

    def note(self):
        self.steps, self.losses, self.validated = [], [], []
        return self

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.steps.append(weights(self))

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking and batch_idx == 0:
            self.validated.append((len(self.steps), weights(self)))
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss)
        return loss


class Line(Noted, Regression):
    pass


class Conv(Noted, ConvNet):
    pass


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.5)


def fit(module, *callbacks, data=None, valid=None, ckpt_path=None, **options):
    torch.manual_seed(7)
    data = data or (images(40) if isinstance(module, ConvNet) else vectors(40))
    fitted = trainer(*callbacks, **{"val_check_interval": 1, **options})
    fitted.fit(module, loader(data), loader(valid or data), ckpt_path=ckpt_path)
    return fitted


def line(**options):
    torch.manual_seed(3)
    return Line(**options).note()


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("make_optimizer", [sgd, torch.optim.AdamW])
def test_validation_uses_the_average_of_all_steps_with_the_start_forgotten(decay, make_optimizer):
    module = line(lr=0.3, make_optimizer=make_optimizer)
    # Without reviews, which would undo a step of AdamW.
    fit(module, KFCCallback(average_weights=decay, kl_clip=0.01), max_epochs=2)
    assert len(module.validated) == len(module.steps) == 20
    for count, seen in module.validated:
        assert_close(seen, averaged_by_hand(module.steps[:count], decay))
    assert_close(weights(module), averaged_by_hand(module.steps, decay))


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 3])
def test_training_is_bit_for_bit_what_it_is_without_averages(accumulated):
    """Also where validation comes between the micro-batches of a step, and steps are reviewed."""
    runs = []
    for decay in (None, 0.9):
        torch.manual_seed(3)
        module = Conv(lr=0.5, make_optimizer=sgd).note()
        callback = KFCCallback(average_weights=decay)
        fit(module, callback, max_epochs=2, accumulate_grad_batches=accumulated)
        runs.append((module, callback.kfc))
    (plain, engine), (averaged, other) = runs
    assert averaged.losses == plain.losses
    assert all(same(a, b) for a, b in zip(plain.steps, averaged.steps, strict=True))
    assert engine.reviewer.last == other.reviewer.last is not None
    assert not same(weights(plain), weights(averaged))
    for count, seen in averaged.validated:
        assert count == 0 or same(seen, plain.steps[0]) or not same(seen, plain.steps[count - 1])


def test_micro_batches_do_not_count():
    module = line(make_optimizer=sgd)
    fit(module, KFCCallback(), accumulate_grad_batches=4)
    assert len(module.steps) == 3 + 0 * len(module.losses)
    assert_close(weights(module), averaged_by_hand(module.steps, 0.9))


class Twofold(Noted, Regression):
    """Manual optimization: weight and bias have an optimizer each, and the bias makes two steps in a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.biases = []

    def configure_optimizers(self):
        return sgd([self.head.weight], 0.1), sgd([self.head.bias], 0.1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second, second):
            self.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            (self.steps if optimizer is first else self.biases).append(weights(self))


@pytest.mark.filterwarnings("ignore:KFCCallback does not precondition 'head'")
def test_in_manual_optimization_each_optimizer_counts_its_own_steps():
    module = Twofold().note()
    fit(module, KFCCallback())
    weight = averaged_by_hand(module.steps, 0.9)["head.weight"]
    bias = averaged_by_hand(module.biases, 0.9)["head.bias"]
    assert_close(weights(module), {"head.weight": weight, "head.bias": bias})


@pytest.mark.filterwarnings("ignore:KFCCallback skips this optimizer step")
def test_steps_that_are_skipped_do_not_count():
    class Broken(Line):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if batch_idx in (2, 5) else loss

    torch.manual_seed(3)
    module = Broken().note()
    fit(module, KFCCallback())
    moved = [step for step, before in zip(module.steps[1:], module.steps, strict=False) if not same(step, before)]
    assert len(moved) == 7
    assert_close(weights(module), averaged_by_hand([module.steps[0], *moved], 0.9))


@pytest.mark.slow
def test_shortened_steps_count_as_they_were_kept_and_undone_ones_not_at_all():
    torch.manual_seed(3)
    module, callback = Conv(lr=60.0, make_optimizer=sgd).note(), KFCCallback()
    start = weights(module)
    fit(module, callback, max_epochs=3)
    events = callback.kfc.events
    assert events.shortened_steps + events.undone_steps > 0, str(events)
    moved = [step for step, before in zip(module.steps, [start, *module.steps], strict=False) if not same(step, before)]
    # The last step is kept here, and waits.
    assert same(moved[-1], module.steps[-1])
    assert_close(weights(module), averaged_by_hand(whose_statistics_are_known(moved), 0.9))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_validation_leaves_the_weights_that_train(error):
    class Failing(Line):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if len(self.steps) == 6:
                assert not same(weights(self), self.steps[-1])
                raise error("in validation")

    torch.manual_seed(3)
    module = Failing().note()
    with pytest.raises((error, SystemExit)):
        fit(module, KFCCallback())
    assert same(weights(module), module.steps[-1])


def test_outside_of_fit_nothing_is_exchanged():
    module, callback = line(), KFCCallback()
    fitted = fit(module, callback)
    after = weights(module)
    fitted.validate(module, loader(vectors(40)), verbose=False)
    assert same(weights(module), after)
    assert same(module.validated[-1][1], after)
    module.validation_step = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fitted.validate(module, loader(vectors(40)), verbose=False)
    assert same(weights(module), after)


def test_a_test_sees_the_weights_that_fit_leaves():
    class Tested(Line):
        def test_step(self, batch, batch_idx):
            seen.append(weights(self))

    torch.manual_seed(3)
    module, seen = Tested().note(), []
    fit(module, KFCCallback()).test(module, loader(vectors(8)), verbose=False)
    assert_close(seen[-1], averaged_by_hand(module.steps, 0.9))
    assert same(seen[-1], weights(module))


def validation_loss(module, data):
    with torch.no_grad():
        return F.cross_entropy(module(data.tensors[0]), data.tensors[1]).item()


@pytest.mark.slow
@pytest.mark.parametrize("weights_only", [False, True])
def test_what_is_saved_by_a_monitored_loss_has_that_loss_without_the_callback(tmp_path, weights_only):
    data = images(4, seed=1)
    torch.manual_seed(3)
    module = Conv(lr=0.5, make_optimizer=sgd).note()
    saving = ModelCheckpoint(
        dirpath=tmp_path,
        monitor="val_loss",
        filename="{val_loss:.17g}",
        save_top_k=-1,
        save_weights_only=weights_only,
        save_on_train_epoch_end=False,
    )
    stopping = EarlyStopping("val_loss", patience=100, check_on_train_epoch_end=False)
    fit(module, saving, KFCCallback(), stopping, valid=data, max_epochs=2, enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) >= 10
    for path in tmp_path.glob("*.ckpt"):
        loaded = ConvNet()
        loaded.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        loss = float(path.stem.removeprefix("val_loss=").split("-v")[0])
        assert validation_loss(loaded.eval(), data) == pytest.approx(loss, rel=1e-12)
    assert stopping.best_score.item() == pytest.approx(saving.best_model_score.item(), rel=1e-12)


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoints_between_validations_hold_the_average_and_leave_training_alone(tmp_path, weights_only):
    module = line(make_optimizer=sgd)
    saving = ModelCheckpoint(
        dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}", save_weights_only=weights_only
    )
    fit(module, KFCCallback(), saving, enable_checkpointing=True, limit_val_batches=0)
    for number in range(1, 11):
        saved = torch.load(tmp_path / f"step={number}.ckpt", weights_only=True)
        assert_close(saved["state_dict"], averaged_by_hand(module.steps[:number], 0.9))
        if not weights_only:
            training = saved["callbacks"]["KFCCallback"]["averaged_weights"]["training"]
            assert same(training, module.steps[number - 1])
    alone = line(make_optimizer=sgd)
    fit(alone, KFCCallback(average_weights=None), limit_val_batches=0)
    assert alone.losses == module.losses


@pytest.mark.filterwarnings(r"ignore:`.fit\(ckpt_path=None\)` was called without a model")
@pytest.mark.filterwarnings(r"ignore:.fit\(ckpt_path=.last.\) is set, but there is no last checkpoint available")
def test_a_checkpoint_saved_on_an_exception_goes_on_from_the_weights_that_train(tmp_path):
    class Failing(Line):
        def training_step(self, batch, batch_idx):
            if len(self.losses) == 6 and fail:
                raise RuntimeError("in training")
            return super().training_step(batch, batch_idx)

    fail = True
    torch.manual_seed(3)
    module, callback = Failing().note(), KFCCallback()
    with pytest.raises(RuntimeError, match="in training"):
        fit(module, callback, OnExceptionCheckpoint(tmp_path, "broken"), enable_checkpointing=True)
    assert same(weights(module), module.steps[-1])
    saved = torch.load(tmp_path / "broken.ckpt", weights_only=True)
    assert_close(saved["state_dict"], averaged_by_hand(module.steps, 0.9))
    assert same(saved["callbacks"]["KFCCallback"]["averaged_weights"]["training"], module.steps[-1])


def resumed(path, decay, data):
    callback, module = KFCCallback(average_weights=decay), line(make_optimizer=sgd)
    fitted = trainer(callback, max_epochs=2, limit_val_batches=0)
    fitted.fit(module, loader(data), loader(data), ckpt_path=path)
    return module, callback


@pytest.mark.slow
@pytest.mark.parametrize("saved_with", [None, 0.9])
@pytest.mark.parametrize("resumed_with", [None, 0.9])
def test_training_goes_on_bit_for_bit_whether_averages_were_on_or_are(tmp_path, saved_with, resumed_with):
    data = vectors(40)
    whole, half = line(make_optimizer=sgd), line(make_optimizer=sgd)
    fit(whole, KFCCallback(average_weights=None), data=data, max_epochs=2, limit_val_batches=0)
    fitted = fit(half, KFCCallback(average_weights=saved_with), data=data, limit_val_batches=0)
    fitted.save_checkpoint(tmp_path / "half.ckpt")
    module, _ = resumed(tmp_path / "half.ckpt", resumed_with, data)
    assert module.losses == whole.losses[10:]
    assert all(same(a, b) for a, b in zip(module.steps, whole.steps[10:], strict=True))
    steps = whole.steps if saved_with else whole.steps[10:]
    expected = averaged_by_hand(steps, 0.9) if resumed_with else whole.steps[-1]
    assert_close(weights(module), expected)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.filterwarnings("ignore:KFCCallback. layer 'body.[01]' of the checkpoint is not preconditioned now")
@pytest.mark.filterwarnings("ignore:KFCCallback. layer '.*' is not in the checkpoint and starts anew")
@pytest.mark.parametrize(
    ("saved_with", "resumed_with"),
    [
        ([None], ["*"]),
        ([None], ["head"]),
        (["head"], [None]),
        (["body.*", "head"], ["body.*"]),
        (["body.*", "head"], [None]),
        ([None], ["body.*", "head"]),
    ],
)
@pytest.mark.parametrize("decay", [0.9, None])
def test_training_goes_on_from_the_weights_that_train_with_other_layers(saved_with, resumed_with, decay, tmp_path):
    data = images(40)
    module = Conv(make_optimizer=sgd).note()
    before = [KFCCallback(include=include) for include in saved_with]
    fit(module, *before, data=data).save_checkpoint(tmp_path / "a.ckpt")
    again, started, known = Conv(make_optimizer=sgd).note(), [], []
    callbacks = [KFCCallback(include=include, average_weights=decay) for include in resumed_with]

    def starts():
        started.append(weights(again))
        known.append({name for name, layer in callbacks[-1].kfc.layers.items() if layer.inverse is not None})

    again.on_train_epoch_start = starts
    fit(again, *callbacks, data=data, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert same(started[0], module.steps[-1])
    # The last callback has the factors of all of its layers that any callback had.
    assert known[0] == set(callbacks[-1].kfc.layers) & {name for callback in before for name in callback.kfc.layers}
    expected = (
        averaged_by_hand(whose_statistics_are_known([*module.steps, *again.steps]), decay) if decay else again.steps[-1]
    )
    assert_close(weights(again), expected)


@pytest.mark.parametrize("other", [EMAWeightAveraging(decay=0.9), StochasticWeightAveraging(swa_lrs=0.1)])
def test_other_averages_of_weights_win_and_this_is_reported(other, caplog):
    module, callback = line(), KFCCallback()
    with caplog.at_level(logging.INFO):
        fit(module, callback, copy.deepcopy(other), limit_val_batches=0)
    assert caplog.text.count(f"KFCCallback does not average the weights: {type(other).__name__} averages them.") == 1
    assert "averaged over the last" not in caplog.text
    assert "averaged_weights" not in callback.state_dict()


class ScheduleFree(torch.optim.SGD):
    """Has the two modes of a schedule-free optimizer."""

    def eval(self):
        """Would put its average in."""

    def train(self):
        """Would take it out."""


def test_an_optimizer_with_modes_averages_itself_and_this_is_reported(caplog):
    module, callback = line(make_optimizer=ScheduleFree), KFCCallback()
    with caplog.at_level(logging.INFO):
        fit(module, callback)
    reason = "ScheduleFree averages them, between its eval() and train()."
    assert caplog.text.count(f"KFCCallback does not average the weights: {reason}") == 1
    assert "averaged_weights" not in callback.state_dict()
    assert same(module.validated[-1][1], module.steps[-1])


def test_of_several_callbacks_one_averages():
    module = Conv(make_optimizer=sgd).note()
    first, second = KFCCallback(include="body.*"), KFCCallback(include="head")
    fit(module, first, second)
    assert_close(weights(module), averaged_by_hand(whose_statistics_are_known(module.steps), 0.9))
    assert "averaged_weights" not in first.state_dict()
    assert "averaged_weights" in second.state_dict()


def test_the_report_states_the_window_the_bytes_and_the_way_out(caplog):
    callback, module = KFCCallback(save_factors=False), Conv().note()
    with caplog.at_level(logging.INFO):
        fitted = fit(module, callback)
    text = " ".join(caplog.text.split())
    assert "Validation and checkpoints use weights averaged over the last ~10 steps (average_weights=None: off)" in text
    assert f"{callback.checkpoint_bytes() / 1e6:.3g} MB more in memory and checkpoints" in text
    state = fitted.callbacks[0].state_dict()["averaged_weights"]
    tensors = [
        *state["training"].values(),
        *(v for s in state["statistics"].values() for v in (s["mean"], s["deviation"], *s["before"])),
    ]
    assert callback.checkpoint_bytes() == sum(t.nbytes for t in tensors)


class WithTeacher(Noted, Regression):
    """A frozen teacher follows the student; a tied weight, and a frozen one that an optimizer has."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)
        self.tied = nn.Linear(5, 3, bias=False, dtype=torch.float64)
        self.twin = nn.Linear(5, 3, bias=False, dtype=torch.float64)
        self.twin.weight = self.tied.weight
        self.frozen = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)
        self.count = nn.Parameter(torch.tensor(0), requires_grad=False)

    def forward(self, inputs):
        return self.head(inputs) + self.tied(inputs) * self.twin(inputs)

    def on_train_batch_end(self, *args):
        self.count += 1
        for own, other in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
            own.data.lerp_(other.data, 0.5)


def test_teachers_frozen_and_whole_numbered_parameters_are_as_they_are_and_tied_ones_stay_tied():
    module = WithTeacher().note()
    fit(module, KFCCallback(), limit_val_batches=0)
    steps = [{name: s[name] for name in ("head.weight", "head.bias", "tied.weight")} for s in module.steps]
    found = weights(module)
    assert_close({name: found[name] for name in steps[0]}, averaged_by_hand(steps, 0.9))
    assert module.twin.weight is module.tied.weight
    teacher = module.steps[-1]["teacher.weight"].lerp(steps[-1]["head.weight"], 0.5)
    assert torch.equal(found["teacher.weight"], teacher)
    assert found["count"].item() == 10
    assert found["frozen"].tolist() == [1, 1]


class Growing(Noted, Regression):
    """Begins with a lazy layer; from the fourth batch on another parameter trains, from the sixth on instead of it."""

    def __init__(self):
        super().__init__()
        self.lazy = nn.LazyLinear(3, dtype=torch.float64)
        self.late = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)

    def forward(self, inputs):
        return self.head(inputs) + self.lazy(inputs) + self.late

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 3:
            self.late.requires_grad_()
            self.trainer.optimizers[0].add_param_group({"params": [self.late]})
        if batch_idx == 6:
            self.late = nn.Parameter(5 * torch.ones(3, dtype=torch.float64))
            self.trainer.optimizers[0].param_groups[1]["params"] = [self.late]

    def configure_optimizers(self):
        return torch.optim.SGD([*self.head.parameters(), *self.lazy.parameters()], lr=0.1)


@pytest.mark.filterwarnings("ignore:.*lazy", "ignore:Lazy modules", "ignore:KFCCallback. .*late")
def test_lazy_late_and_replaced_parameters_start_at_their_value():
    module = Growing().note()
    fit(module, KFCCallback(), limit_val_batches=0)
    expected = averaged_by_hand([{n: v for n, v in s.items() if n != "late"} for s in module.steps], 0.9)
    late = averaged_by_hand([{"late": s["late"]} for s in module.steps[6:]], 0.9)
    assert_close(weights(module), {**expected, **late})


class Statistics(Callback):
    """Notes means and unbiased variances of the batches that each batch norm has seen before each step."""

    def setup(self, trainer, pl_module, stage):
        self.batches, self.steps = [], []
        layer = pl_module.body[1]
        layer.register_forward_pre_hook(lambda m, args: m.training and self.batches.append(args[0].detach().clone()))

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.batches.clear()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append([x.transpose(0, 1).flatten(1) for x in self.batches])
        self.batches = []


@pytest.mark.parametrize("momentum", [0.1, 0.4, None])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_batch_norm_has_the_averaged_means_and_deviations_of_the_batches(momentum, accumulated):
    class Wide(Conv):
        def on_before_zero_grad(self, optimizer):
            pass

    torch.manual_seed(3)
    module, seen = Wide(make_optimizer=sgd).note(), Statistics()
    module.body[1].momentum = momentum
    module.body[1].running_mean += 100
    seen.on_before_zero_grad = lambda *args: None
    fit(module, seen, KFCCallback(), limit_val_batches=0, accumulate_grad_batches=accumulated)
    mean = deviation = None
    batches = 0
    # The first step's batches are those of the initial weights.
    for k, step in enumerate(seen.steps):
        values = torch.ones(len(step), dtype=torch.float64)
        if momentum is not None:
            powers = torch.arange(len(step), dtype=torch.float64).flip(0)
            values = (1 - momentum) ** powers
        batches += len(step)
        shares = (values / values.sum()).tolist()
        own_mean = sum(s * x.mean(1) for s, x in zip(shares, step, strict=True))
        own_deviation = sum(s * x.var(1) for s, x in zip(shares, step, strict=True)).sqrt()
        kept = min((k - 1) / (k + 9), 0.9) if k > 1 else 0.0
        mean = own_mean if mean is None else kept * mean + (1 - kept) * own_mean
        deviation = own_deviation if deviation is None else kept * deviation + (1 - kept) * own_deviation
    assert batches == 10
    torch.testing.assert_close(module.body[1].running_mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(module.body[1].running_var, deviation**2, rtol=1e-9, atol=1e-9)
    assert module.body[1].num_batches_tracked == 10


class Measured(Conv):
    """Notes how far the validated statistics of batch norm are from those of the only batch with the same weights."""

    def __init__(self, **options):
        super().__init__(**options)
        self.x, self.found = images(32).tensors[0], []

    def on_validation_epoch_start(self):
        layer, outputs = self.body[1], self.body[0](self.x)
        mean, variance = outputs.mean((0, 2, 3)), outputs.transpose(0, 1).flatten(1).var(1)
        means, variances = (layer.running_mean - mean) / variance.sqrt(), (layer.running_var / variance).log()
        self.found.append(max(float(means.abs().max()), float(variances.abs().max())))


class Skipping(Measured):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if self.current_epoch in (3, 6) and batch_idx == 0 else loss


class TwoOptimizers(Measured):
    """The head makes two steps after each of the body, with forwards of their own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return sgd(self.body.parameters(), 0.5), sgd(self.head.parameters(), 0.5)

    def training_step(self, batch, batch_idx):
        body, head = self.optimizers()
        for optimizer in (body, head, head):
            self.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


@pytest.mark.filterwarnings("ignore:KFCCallback does not precondition")
@pytest.mark.filterwarnings("ignore:.*training_step. returned .None")
@pytest.mark.parametrize("kind", [Measured, Skipping, TwoOptimizers])
def test_the_statistics_of_batch_norm_are_those_of_the_averaged_weights(kind):
    """Of one batch at every step: exactly those, up to the nonlinearity between weights and deviations."""
    torch.manual_seed(3)
    module = kind(lr=0.5, make_optimizer=sgd).note()
    torch.manual_seed(7)
    data = images(32)
    trainer(KFCCallback(), max_epochs=12, num_sanity_val_steps=0).fit(module, loader(data, batch_size=32), loader(data))
    assert len(module.found) == 12
    # After two steps the average holds one step's weights, whose batch was the last one.
    assert module.found[1] < 1e-9
    assert max(module.found[1:]) < 0.05


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_teacher_keeps_its_own_statistics_of_batch_norm():
    class Student(Conv):
        def __init__(self, **options):
            super().__init__(**options)
            self.teacher, self.seen = copy.deepcopy(self.body).eval().requires_grad_(False), []

        def on_train_batch_start(self, *args):
            self.teacher.eval()

        def on_train_batch_end(self, *args):
            for own, other in zip(self.teacher.state_dict().values(), self.body.state_dict().values(), strict=True):
                own.copy_(other)
            self.kept = copy.deepcopy(self.teacher.state_dict())

        def on_validation_epoch_start(self):
            found = self.teacher.state_dict()
            self.seen.append(all(torch.equal(found[name], value) for name, value in self.kept.items()))

    torch.manual_seed(3)
    module = Student(lr=0.5, make_optimizer=sgd).note()
    data = images(32)
    trainer(KFCCallback(), max_epochs=4, num_sanity_val_steps=0).fit(module, loader(data), loader(data))
    assert module.seen == [True] * 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*training_step. returned .None")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_averages_go_on_bit_for_bit_after_a_skipped_step(tmp_path):
    x, y = images(32).tensors
    # Two equal batches an epoch, since a resumed loader begins its epoch again.
    data = TensorDataset(x.repeat(2, 1, 1, 1), y.repeat(2))

    class OtherBatch(Skipping):
        def on_train_batch_start(self, batch, batch_idx):
            # Its statistics belong to the weights of the next step, too.
            batch[0].mul_(2 if self.current_epoch in (3, 6) and batch_idx == 0 else 1)

    def run(*callbacks, path=None):
        torch.manual_seed(3)
        module = OtherBatch(lr=0.5, make_optimizer=sgd).note()
        fitted = trainer(KFCCallback(), *callbacks, max_epochs=8, enable_checkpointing=True, num_sanity_val_steps=0)
        fitted.fit(module, loader(data, batch_size=32), loader(data), ckpt_path=path)
        return module

    whole = run(ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}"))
    for step in range(5, 15):
        again = run(path=tmp_path / f"step={step}.ckpt")
        assert again.found == whole.found[step // 2 :]
        torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_frozen_batch_norm_keeps_its_statistics():
    class Frozen(Conv):
        def on_train_batch_start(self, *args):
            self.body[1].eval()

    module = Frozen().note()
    module.body[1].running_mean += 0.3
    fit(module, KFCCallback())
    assert module.body[1].running_mean.tolist() == [0.3, 0.3]
    assert module.body[1].running_var.tolist() == [1, 1]


class Complex(Noted, Regression):
    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.ones(3, dtype=torch.complex128))

    def forward(self, inputs):
        return (self.head(inputs) * self.turn).real + (self.head(inputs) * self.turn).imag


@pytest.mark.filterwarnings("ignore:KFCCallback")
def test_complex_parameters_are_averaged():
    module = Complex().note()
    fit(module, KFCCallback())
    assert_close(weights(module), averaged_by_hand(module.steps, 0.9))


@pytest.mark.slow
def test_a_compiled_module_is_validated_with_its_averages():
    module = Conv(make_optimizer=sgd).note()
    module.body = torch.compile(module.body, backend="eager")
    fit(module, KFCCallback())
    assert len(module.validated) == 10
    for count, seen in module.validated:
        assert_close(seen, averaged_by_hand(whose_statistics_are_known(module.steps[:count]), 0.9))


@pytest.mark.parametrize("value", [1.0, -0.1, math.nan])
def test_a_decay_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=f"average_weights must be at least 0 and below 1, got {value}"):
        KFCCallback(average_weights=value)


def test_a_decay_of_the_wrong_type_is_refused():
    with pytest.raises(TypeError, match=r"average_weights must be a number, or None for no average, got '0.9'"):
        KFCCallback(average_weights="0.9")


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_after_a_fit_and_at_the_next_entry_after_an_exception_the_trainer_is_as_it_was(error):
    class Failing(Line):
        def training_step(self, batch, batch_idx):
            if error is not None and len(self.losses) == 4:
                raise error("in training")
            return super().training_step(batch, batch_idx)

    torch.manual_seed(3)
    module = Failing().note()
    fitted = trainer(KFCCallback())
    if error is None:
        fitted.fit(module, loader(vectors(40)), loader(vectors()))
    else:
        with pytest.raises(error):
            fitted.fit(module, loader(vectors(40)), loader(vectors()))
        fitted.validate(module, loader(vectors()), verbose=False)
    for owner, name in (
        (fitted, "save_checkpoint"),
        (fitted.fit_loop, "on_run_end"),
        (fitted.fit_loop.epoch_loop.val_loop, "run"),
    ):
        assert name not in vars(owner)


class Probing(Conv):
    """Trains a probe in each validation."""

    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            with torch.inference_mode(False), torch.enable_grad():
                probe = nn.Linear(4, 2)
                optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
                for _ in range(3):
                    optimizer.zero_grad()
                    probe(torch.ones(3, 4)).sum().backward()
                    optimizer.step()


def test_optimizers_of_other_weights_leave_the_averages_alone():
    found = []
    for module_class in (Probing, Conv):
        torch.manual_seed(0)
        module, callback = module_class().note(), KFCCallback()
        fit(module, callback, max_epochs=2)
        found.append((callback.state_dict()["averaged_weights"], weights(module)))
    (probing, first), (alone, second) = found
    assert same(first, second)
    assert probing["updates"] == alone["updates"]
    assert same(probing["training"], alone["training"])
    torch.testing.assert_close(probing["statistics"], alone["statistics"], rtol=0, atol=0)


class OwnAverage:
    """Swaps an average of its own in for each validation, as a callback or as the module itself."""

    def __init__(self, **options):
        super().__init__(**options)
        self.own = {}

    def on_train_batch_end(self, *args):
        for name, value in weights(self.model(*args)).items():
            self.own[name] = self.own[name].lerp(value, 0.3) if name in self.own else value

    def on_validation_start(self, *args):
        self.kept = copy.deepcopy(self.model(*args).state_dict())
        self.model(*args).load_state_dict(self.own, strict=False)

    def on_validation_end(self, *args):
        self.model(*args).load_state_dict(self.kept)


class Swapping(OwnAverage, Callback):
    def model(self, trainer, pl_module, *args):
        return pl_module


class SwappingItself(OwnAverage, Line):
    def model(self, *args):
        return self


class SwappingInEvaluationMode(SwappingItself):
    """Swaps where a schedule-free optimizer changes its mode."""

    def on_validation_model_eval(self):
        super().on_validation_model_eval()
        OwnAverage.on_validation_start(self)

    def on_validation_model_train(self):
        super().on_validation_model_train()
        OwnAverage.on_validation_end(self)

    def on_validation_start(self):
        pass

    on_validation_end = on_validation_start


@pytest.mark.parametrize(
    ("module_class", "before", "after"),
    [
        (Line, [Swapping], []),
        (Line, [], [Swapping]),
        (SwappingItself, [], []),
        (SwappingInEvaluationMode, [], []),
    ],
)
def test_a_swap_of_other_code_is_validated_and_leaves_the_weights_that_train(module_class, before, after, caplog):
    alone = line(make_optimizer=sgd)
    fit(alone, KFCCallback(average_weights=None), max_epochs=2)
    torch.manual_seed(3)
    module = module_class(make_optimizer=sgd).note()
    callback = KFCCallback()
    with caplog.at_level(logging.INFO):
        fit(module, *(c() for c in before), callback, *(c() for c in after), max_epochs=2)
    assert "other code wrote" not in caplog.text
    assert module.losses == alone.losses
    assert_close(weights(module), averaged_by_hand(module.steps, 0.9))
    own = {}
    for (count, seen), step in zip(module.validated, module.steps, strict=True):
        own = {name: own[name].lerp(value, 0.3) if own else value for name, value in step.items()}
        assert count == 1 or same(seen, own)


class Restoring(Callback):
    """Returns to the weights of a former validation in one hook, once, and notes what it has written."""

    def __init__(self, hook, at=5):
        def restore(trainer, pl_module):
            if trainer.sanity_checking:
                return
            self.calls += 1
            if self.best is None:
                self.best = {name: value + 1 for name, value in copy.deepcopy(pl_module.state_dict()).items()}
            if self.calls == at:
                pl_module.load_state_dict(self.best)

        self.best, self.calls = None, 0
        setattr(self, hook, restore)


@pytest.mark.parametrize("hook", ["on_validation_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_return_to_the_best_weights_trains_from_there_with_a_new_average(hook, place, tmp_path, caplog):
    module, restoring = Conv(make_optimizer=sgd).note(), Restoring(hook)
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    callbacks = [KFCCallback(kl_clip=0.01)]
    callbacks.insert(place, restoring)
    started = []
    module.on_train_batch_start = lambda *args: started.append(copy.deepcopy(module.state_dict()))
    with caplog.at_level(logging.INFO):
        fit(module, *callbacks, saving, max_epochs=2, enable_checkpointing=True)
    assert caplog.text.count("KFCCallback: other code wrote 'head.weight', 'head.bias', 'body.0.weight'") == 1
    assert same(started[5], restoring.best)
    assert_close(weights(module), averaged_by_hand(whose_statistics_are_known(module.steps[5:]), 0.9))


@pytest.mark.parametrize("place", [0, 1])
def test_a_return_to_the_best_weights_at_the_end_of_training_lasts(place, tmp_path):
    module, restoring, callback = line(make_optimizer=sgd), Restoring("on_train_end", at=1), KFCCallback()
    callbacks = [callback]
    callbacks.insert(place, restoring)
    fitted = fit(module, *callbacks)
    assert same(weights(module), restoring.best)
    fitted.save_checkpoint(tmp_path / "best.ckpt")
    resumed_module, _ = resumed(tmp_path / "best.ckpt", 0.9, vectors(40))
    again = line(make_optimizer=sgd)
    again.load_state_dict(module.state_dict())
    loss = F.cross_entropy(again(vectors(40).tensors[0][:4]), vectors(40).tensors[1][:4])
    assert resumed_module.losses[0] == loss.item()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_a_checkpoint_of_what_a_validation_has_written_goes_on_from_there(tmp_path):
    data = vectors(40)
    module, restoring = line(make_optimizer=sgd), Restoring("on_validation_epoch_end", at=2)
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    options = {"data": data, "val_check_interval": None, "max_epochs": 3, "enable_checkpointing": True}
    fit(module, KFCCallback(), restoring, saving, **options)
    again = line(make_optimizer=sgd)
    fitted = trainer(KFCCallback(), max_epochs=3)
    fitted.fit(again, loader(data), loader(data), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert again.losses == module.losses[20:]
    assert same(weights(again), weights(module))


def test_running_statistics_that_a_validation_moves_are_restored(caplog):
    class Moving(Conv):
        def validation_step(self, batch, batch_idx):
            self.body[1].train()
            super().validation_step(batch, batch_idx)

    found = []
    for module_class in (Conv, Moving):
        torch.manual_seed(3)
        module, started = module_class(make_optimizer=sgd).note(), []
        module.on_train_batch_start = lambda *args, m=module, s=started: s.append(m.body[1].running_mean.clone())
        with caplog.at_level(logging.INFO):
            fit(module, KFCCallback(), num_sanity_val_steps=0)
        found.append(started)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert "other code wrote" not in caplog.text


class SavingItself(Line):
    """Writes the weights of a checkpoint itself, as one does to leave out frozen ones."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {name: value.clone() for name, value in self.state_dict().items()}


def test_a_checkpoint_whose_weights_are_written_by_the_module_holds_the_average(tmp_path):
    torch.manual_seed(3)
    module = SavingItself(make_optimizer=sgd).note()
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit(module, KFCCallback(), saving, enable_checkpointing=True, limit_val_batches=0)
    for number in range(1, 11):
        saved = torch.load(tmp_path / f"step={number}.ckpt", weights_only=True)
        assert_close(saved["state_dict"], averaged_by_hand(module.steps[:number], 0.9))
        assert same(saved["callbacks"]["KFCCallback"]["averaged_weights"]["training"], module.steps[number - 1])
