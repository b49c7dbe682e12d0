"""What cannot work is refused before the first optimizer step, naming the thing, the value and the way out.

From that step on a loss may look like anything: training goes on, and what cannot be used is counted and said once.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_kfc import Categorical, KFCCallback, LinearSchedule, LossNotRecognisedError
from tests.lightning_nets import FEATURES, QUIET, ConvNet, Regression, images, loader, trainer, vectors

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


def test_an_unknown_loss_trains_by_its_own_gradient_which_one_line_says():
    callback = KFCCallback()
    with pytest.warns(UserWarning, match="no term of the loss is recognised .*the loss's own gradient") as said:
        trainer(callback).fit(Hinge(), loader(vectors()))
    assert len([w for w in said if "KFC" in str(w.message)]) == 1
    assert callback.kfc.layers["head"].inverse is not None
    assert callback.kfc.events.unrecognised_losses == 2


def test_the_ways_out_of_an_unknown_loss_work():
    for callback in (KFCCallback(fisher="empirical"), KFCCallback(likelihood=Categorical(output_of="head"))):
        trainer(callback).fit(Hinge(), loader(vectors()))
        assert callback.kfc.layers["head"].inverse is not None


def test_a_likelihood_that_no_term_of_the_loss_has():
    said = ["likelihood='gaussian'", "loss functions seen in this step: cross_entropy"]
    refused(LossNotRecognisedError, said, KFCCallback(likelihood="gaussian"), Regression())


def test_a_model_all_of_whose_layers_are_frozen():
    module = Regression()
    module.head.requires_grad_(False)
    module.scale = nn.Parameter(torch.ones(FEATURES, dtype=torch.float64))
    module.forward = lambda inputs: module.head(inputs * module.scale)
    refused(ValueError, ["found no layer to precondition", "head (Linear): frozen"], KFCCallback(), module)


def test_lbfgs():
    said = ["does not work with LBFGS", "Use SGD(lr=0.5, momentum=0.5)"]
    refused(ValueError, said, KFCCallback(), Regression(make_optimizer=torch.optim.LBFGS))


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
        (TypeError, "damping", True, "damping must be a number, got True of type bool"),
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
