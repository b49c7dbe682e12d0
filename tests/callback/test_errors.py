"""Errors before the first optimizer step name the thing, the value and the way out.

From that step on a loss may look like anything: training goes on, and what cannot be used is counted and said once.
"""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F

from lightning_kfc import (
    KFC,
    Categorical,
    KFCCallback,
    LinearSchedule,
    LossNotRecognisedError,
    register_adapter,
)
from lightning_kfc.estimation import loss_statistics
from lightning_kfc.layers.linear import LinearAdapter
from lightning_kfc.refresh.factors import FactorRefresh
from tests.helpers.lightning_nets import FEATURES, QUIET, ConvNet, Regression, images, loader, trainer, vectors

pytestmark = QUIET


def refused(error, said, callback, module, data=None):
    """The message of a fit that is refused before the first step."""
    before = {name: value.clone() for name, value in module.state_dict().items() if "running" not in name}
    with pytest.raises(error) as raised:
        trainer(callback).fit(module, loader(vectors() if data is None else data))
    for name, value in before.items():
        if "num_batches" not in name:
            assert torch.equal(value, module.state_dict()[name]), name
    for part in said:
        assert part in str(raised.value), f"{part!r} is not in: {raised.value}"


class Hinge(Regression):
    def training_step(self, batch, batch_idx):
        return F.multi_margin_loss(self(batch[0]), batch[1])


def test_an_unknown_loss_trains_by_its_own_gradient_and_one_line_reports_it(caplog):
    callback = KFCCallback()
    trainer(callback).fit(Hinge(), loader(vectors()))
    (line,) = [r.getMessage() for r in caplog.records if "curvature from" in r.getMessage()]
    assert line.startswith("KFC at step 0: curvature from the gradient of the loss itself (its empirical Fisher)")
    assert callback.kfc.layers["head"].inverse is not None
    assert callback.kfc.events.unrecognised_losses == 2


def test_the_ways_out_of_an_unknown_loss_work():
    for callback in (KFCCallback(fisher="empirical"), KFCCallback(likelihood=Categorical(output_of="head"))):
        trainer(callback).fit(Hinge(), loader(vectors()))
        assert callback.kfc.layers["head"].inverse is not None


def test_a_likelihood_that_no_term_of_the_loss_has():
    said = ["likelihood='gaussian'", "loss functions seen in this step: cross_entropy"]
    refused(LossNotRecognisedError, said, KFCCallback(likelihood="gaussian"), Regression())


def test_a_model_that_is_frozen_but_for_what_is_excluded():
    module = Regression()
    module.head.requires_grad_(False)
    module.scale = nn.Parameter(torch.ones(FEATURES, dtype=torch.float64))
    module.forward = lambda inputs: module.head(inputs * module.scale)
    refused(ValueError, ["found no layer to precondition", "head (Linear): frozen"], KFCCallback(exclude=""), module)


def test_lbfgs():
    said = ["does not work with LBFGS", "Use SGD(lr=0.5, momentum=0.5)"]
    refused(ValueError, said, KFCCallback(), Regression(make_optimizer=torch.optim.LBFGS))


class WithoutRate(torch.optim.Optimizer):
    """Finds its learning rate itself, as Adafactor does."""

    def __init__(self, parameters, **defaults):
        super().__init__(parameters, defaults)

    def step(self, closure=None):
        closure()


@pytest.mark.parametrize("defaults", [{"lr": None}, {"alpha": 0.1}])
def test_an_optimizer_without_a_learning_rate_is_refused(defaults):
    said = ["needs the learning rate of WithoutRate", "lr=None", "SGD(lr=0.5, momentum=0.5)"]
    module = Regression(make_optimizer=lambda parameters, lr: WithoutRate(parameters, **defaults))
    refused(ValueError, said, KFCCallback(), module)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing(option):
    said = [f"{option} pattern 'hed*' matches no module", "body.0", "head"]
    refused(ValueError, said, KFCCallback(**{option: ["body.*", "hed*"]}), ConvNet(), images())


def test_everything_excluded():
    refused(ValueError, ["no layer to precondition", "in exclude"], KFCCallback(exclude="*"), ConvNet(), images())


def test_logits_of_a_module_that_is_not_there():
    said = ["output of 'classifier'", "no such module", "head"]
    refused(ValueError, said, KFCCallback(likelihood=Categorical(output_of="classifier")), Regression())


def test_logits_of_a_module_that_is_not_called():
    module = Regression()
    module.unused = nn.Linear(2, 2, dtype=torch.float64)
    said = ["found no logits", "'unused'", "was not called"]
    refused(LossNotRecognisedError, said, KFCCallback(likelihood=Categorical(output_of="unused")), module)


def test_a_schedule_that_falls_below_zero():
    said = ["damping at step 0 must be a positive number, got -0.5"]
    refused(ValueError, said, KFCCallback(damping=lambda step: -0.5), Regression())


@pytest.mark.parametrize(
    ("error", "option", "value", "said"),
    [
        (ValueError, "damping", -0.1, "damping must be a positive number, got -0.1"),
        (ValueError, "damping", 0.0, "damping must be a positive number, got 0.0"),
        (ValueError, "damping", float("nan"), "damping must be a positive number, got nan"),
        (TypeError, "damping", "small", "damping must be a number or 'auto', got 'small' of type str"),
        (TypeError, "damping", True, "damping must be a number or 'auto', got True of type bool"),
        (ValueError, "fisher", "true", "fisher must be one of 'mc', 'exact', 'empirical', got 'true'"),
        (
            ValueError,
            "likelihood",
            "poisson",
            "likelihood must be one of 'auto', 'categorical', 'bernoulli', 'gaussian'",
        ),
        (TypeError, "factor_every_n_steps", 2.5, "factor_every_n_steps must be a whole number, got 2.5"),
        (ValueError, "inverse_every_n_steps", 0, "inverse_every_n_steps must be at least 1, got 0"),
        (ValueError, "warmup_steps", -1, "warmup_steps must be at least 0, got -1"),
        (ValueError, "ema_decay", 1.0, "ema_decay must be at least 0 and below 1, got 1.0"),
        (ValueError, "kl_clip", 0, "kl_clip must be a positive number, got 0"),
        (ValueError, "inverse", "lu", "inverse must be one of"),
        (ValueError, "rule", "magic", "rule must be one of"),
        (ValueError, "weight_sharing", "both", "weight_sharing must be one of 'expand', 'reduce', got 'both'"),
        (TypeError, "include", 3, "include takes glob patterns over module names, such as 'encoder.*'; got 3"),
        (TypeError, "exclude", [None], "exclude takes glob patterns over module names, such as 'encoder.*'; got None"),
        (TypeError, "seed", 1.5, "seed must be a whole number, got 1.5"),
        (TypeError, "save_factors", "no", "save_factors must be true or false, got 'no'"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value_and_what_is_accepted(error, option, value, said):
    with pytest.raises(error) as raised:
        KFCCallback(**{option: value})
    assert said in str(raised.value)


@pytest.mark.parametrize(("start", "end", "steps"), [(-1.0, 1.0, 5), (1.0, 0.0, 5), (1.0, 1.0, 0)])
def test_a_schedule_out_of_range(start, end, steps):
    with pytest.raises(ValueError, match="must be"):
        KFCCallback(damping=LinearSchedule(start, end, steps))


def test_two_callbacks_for_the_same_layers_are_refused_by_lightning():
    with pytest.raises(RuntimeError, match="Found more than one stateful callback of type `KFCCallback`"):
        trainer(KFCCallback(), KFCCallback())


@pytest.mark.parametrize("turn", [slice(None), slice(None, None, -1)])
def test_two_callbacks_that_share_a_parameter_are_refused_by_name(turn):
    callbacks = [KFCCallback(), KFCCallback(include="head")][turn]
    first, second = (re.escape(callback.state_key) for callback in callbacks)
    said = rf"^{first} and {second} would both precondition 'head.weight'\. Leave it to one of them, by `include` or"
    with pytest.raises(ValueError, match=said):
        trainer(*callbacks).fit(ConvNet(), loader(images()))
    apart = [KFCCallback(exclude="head"), KFCCallback(include="head")][turn]
    trainer(*apart).fit(ConvNet(), loader(images()))
    assert [list(callback.kfc.layers) for callback in apart] == [["body.0", "body.1"], ["head"]][turn]


# From the first optimizer step on, no loss is an error, and the callback does not stop the training.


class Losses(Regression):
    """Computes the loss of each step by a function of its own, if there is one for it; else a cross entropy."""

    def __init__(self, **by_step):
        super().__init__()
        self.by_step = {int(name.removeprefix("at_")): loss for name, loss in by_step.items()}
        self.default = F.cross_entropy
        self.weights = []

    def training_step(self, batch, batch_idx):
        self.weights.append(self.head.weight.detach().clone())
        return self.by_step.get(batch_idx, self.default)(self(batch[0]), batch[1])


def focal(logits, targets):
    kept = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return (-((1 - kept.exp()) ** 2) * kept).mean()


def zero_of_logits(logits, targets):
    return logits.sum() * 0


def zero_of_the_loss(logits, targets):
    return 0 * F.cross_entropy(logits, targets)


def zero_from_nothing(logits, targets):
    return torch.zeros((), requires_grad=True, dtype=logits.dtype)


#: Each step takes statistics.
EACH = {"factor_every_n_steps": 1, "inverse_every_n_steps": 1, "damping": 0.1, "kl_clip": 0.03}


def counted(callback):
    return {name: count for name, count in callback.kfc.events.state_dict().items() if count}


def warned_fit(callback, module, match, **options):
    """Fit with one warning of the callback, after which events are only counted."""
    with pytest.warns(UserWarning, match=match) as said:
        trainer(callback, **options).fit(module, loader(vectors(24)))
    (ours,) = {str(w.message) for w in said if "KFC" in str(w.message)}
    assert len([w for w in said if "KFC" in str(w.message)]) == 1
    assert "only counted, in `kfc.events`" in ours
    return ours


def test_a_loss_that_is_another_one_from_some_step_on_is_counted_and_reported_once(caplog):
    module, callback = Losses(at_3=focal, at_4=focal, at_5=focal), KFCCallback(**EACH)
    trainer(callback).fit(module, loader(vectors(24)))
    lines = [r.getMessage() for r in caplog.records if "curvature from" in r.getMessage()]
    assert [line[:16] for line in lines] == ["KFC at step 0: c", "KFC at step 3: c"]
    assert "the gradient of the loss itself" in lines[1]
    assert counted(callback) == {"unrecognised_losses": 3}
    assert callback.kfc.step == 5
    assert callback.kfc.ages("head") == (0, 0)


@pytest.mark.parametrize("loss", [zero_of_logits, zero_of_the_loss], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_batch_that_is_skipped_by_a_loss_of_zero_leaves_curvature_and_weights_alone(loss, step):
    module, callback = Losses(**{f"at_{step}": loss}), KFCCallback(**EACH)
    factors = []

    class Look(Callback):
        def on_train_batch_end(self, *args):
            factors.append({name: value.clone() for name, value in callback.kfc.layers["head"].factors.items()})

    with pytest.warns(UserWarning, match=f"KFC at step {step}: no statistics are taken of this loss"):
        trainer(callback, Look()).fit(module, loader(vectors(24)))
    assert counted(callback) == {"losses_without_gradient": 1}
    assert all(torch.equal(factors[step][name], factors[step - 1][name]) for name in ("A", "G"))
    for later in range(1, 6):
        same = torch.equal(module.weights[later], module.weights[later - 1])
        assert same == (later == step + 1), later


def test_a_loss_that_depends_on_nothing_changes_nothing():
    callback = KFCCallback(**EACH)
    trainer(callback).fit(Losses(at_2=zero_from_nothing), loader(vectors(24)))
    assert counted(callback) == {}
    assert callback.kfc.layers["head"].inverse is not None


def test_a_loss_of_zero_in_one_of_several_micro_batches_leaves_the_statistics_of_the_others():
    module, callback = Losses(at_3=zero_of_logits), KFCCallback(**EACH)
    with pytest.warns(UserWarning, match="no statistics are taken of this loss: its gradient is zero"):
        trainer(callback, accumulate_grad_batches=2).fit(module, loader(vectors(24)))
    assert counted(callback) == {"losses_without_gradient": 1}
    assert callback.kfc.layers["head"].averages["A"].draws > 2


def test_a_likelihood_that_no_term_has_any_more_is_counted_and_reported_once():
    module, callback = Losses(at_2=focal, at_4=focal), KFCCallback(likelihood="categorical", **EACH)
    said = warned_fit(callback, module, "likelihood='categorical'")
    assert "no statistics are taken of this loss" in said
    assert counted(callback) == {"unrecognised_losses": 2}


def test_logits_of_a_module_that_is_taken_away_are_counted_and_reported_once():
    class Renamed(Losses):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2:
                self.tail = self.head
                del self.head

        def forward(self, inputs):
            return (self.tail if hasattr(self, "tail") else self.head)(inputs)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    callback = KFCCallback(likelihood=Categorical(output_of="head"), **EACH)
    said = warned_fit(callback, Renamed(), "found no logits for .*: the module 'head'")
    assert said.startswith("KFC at step 2: ")
    assert counted(callback) == {"unrecognised_losses": 4}
    assert list(callback.kfc.layers) == ["tail"]


class Fragile(nn.Linear):
    """A layer whose adapter raises on demand."""

    raising = ""

    def forward(self, input):
        return F.linear(input, self.weight, self.bias)


@register_adapter(Fragile)
class _FragileAdapter(LinearAdapter):
    kind = "Fragile"

    def _may_raise(self, where):
        if self.module.raising == where:
            raise ZeroDivisionError("of the adapter")

    def record(self, forward):
        self._may_raise("record")
        return super().record(forward)

    def statistics(self, record, output_gradient):
        self._may_raise("statistics")
        return super().statistics(record, output_gradient)

    def estimate(self, factors, draws):
        self._may_raise("estimate")
        return super().estimate(factors, draws)


class WithFragile(Regression):
    def __init__(self, raising, since):
        super().__init__()
        self.body = Fragile(FEATURES, FEATURES, dtype=torch.float64)
        self.raising, self.since = raising, since

    def forward(self, inputs):
        return self.head(self.body(inputs).tanh())

    def training_step(self, batch, batch_idx):
        self.body.raising = self.raising if batch_idx >= self.since else ""
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("where", ["record", "statistics"])
def test_a_layer_whose_statistics_raise_keeps_its_last_inverse_and_the_others_theirs(where):
    module, callback = WithFragile(where, since=2), KFCCallback(**EACH)
    said = warned_fit(callback, module, "the statistics of 'body' are left out of this step")
    assert "ZeroDivisionError: of the adapter" in said
    assert said.startswith("KFC at step 2: ")
    assert counted(callback) == {"failed_statistics": 4}
    assert callback.kfc.ages("body")[0] == 4
    assert callback.kfc.ages("head")[0] == 0
    assert callback.kfc.layers["body"].inverse is not None


@pytest.mark.parametrize("where", ["record", "statistics"])
def test_before_the_first_step_the_same_is_an_error(where):
    with pytest.raises(ZeroDivisionError, match="of the adapter"):
        trainer(KFCCallback(**EACH)).fit(WithFragile(where, since=0), loader(vectors()))


def test_an_inverse_that_raises_is_a_failed_factorisation():
    module, callback = WithFragile("estimate", since=5), KFCCallback(**EACH)
    with pytest.warns(UserWarning, match="'body': ZeroDivisionError: of the adapter; the last good inverse is kept"):
        trainer(callback).fit(module, loader(vectors(24)))
    assert counted(callback) == {"failed_factorisations": 1}


@pytest.mark.parametrize("part", ["statistics", "refresh"])
def test_what_else_goes_wrong_is_counted_and_gradients_are_preconditioned_by_what_there_is(part, monkeypatch):
    def broken(*args, **kwargs):
        if callback.kfc.step >= 2:
            raise ZeroDivisionError("of ours")
        return original(*args, **kwargs)

    owner, name = {"statistics": (loss_statistics, "back_propagate"), "refresh": (FactorRefresh, "__call__")}[part]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, broken)
    callback, seen = KFCCallback(**EACH), []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append(module.head.weight.grad.clone())

    said = warned_fit_with(Look, callback, "ZeroDivisionError: of ours")
    assert said.startswith("KFC at step 2: the statistics of 'head' are left out of this step")
    assert counted(callback)["failed_statistics"] >= 4
    assert callback.kfc.step == 5
    assert callback.kfc.ages("head")[0] == 4
    before, after = seen[-2:]
    assert not torch.allclose(before, after, rtol=1e-3)


def warned_fit_with(look, callback, match):
    """As :func:`warned_fit`, with a look at the gradients on both sides of the callback."""
    with pytest.warns(UserWarning, match=match) as said:
        trainer(look(), callback, look()).fit(Losses(), loader(vectors(24)))
    (ours,) = [str(w.message) for w in said if "KFC" in str(w.message)]
    return ours


def test_what_the_statistics_came_from_is_known_at_any_time() -> None:
    model = nn.Linear(3, 2)
    kfc, x, y = KFC(model), torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    assert kfc.batches.sources == "nothing so far"
    losses = [
        (lambda: F.mse_loss(model(x), x[:, :2]), "mse_loss"),
        (lambda: F.mse_loss(model(x), x[:, :2]) + F.cross_entropy(model(x), y), "mse_loss, cross_entropy"),
        (lambda: model(x).square().mean(), "the gradient of the loss itself"),
    ]
    for loss_of, source in losses:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with kfc.capture():
                loss = loss_of()
            kfc.update(loss)
        model.zero_grad()
        loss.backward()
        kfc.precondition(lr=0.1)
        assert kfc.batches.sources == source
