"""Modules, parameters and optimizers that change during a fit: new ones are preconditioned, with one message.

What is known of all other layers stays, and nothing raises, at the end of the fit neither.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from lightning_kfc import KFC, KFCCallback
from tests.helpers.harness import QUIET, Classifier, Watch, dense_net, fit, images, loader, trainer, weights
from tests.helpers.nets import classes, data, double, engine, observe, train_step

pytestmark = [*(pytest.mark.filterwarnings(line) for line in QUIET)]

#: Statistics at steps 0, 1, 4, 8, ...; an epoch is 6 steps long, so that its first one is no such date.
DATES: dict[str, Any] = {
    "warmup_steps": 2,
    "factor_every_n_steps": 4,
    "inverse_every_n_steps": 4,
    "damping": 0.1,
    "kl_clip": 0.03,
}
EPOCH = 6


class Spy:
    """Looks at the gradients on both sides of a callback.

    Attributes:
        replaced: For each parameter, by name, the steps at which its gradient was replaced.
        plain: Likewise, those at which it was left alone.
    """

    def __init__(self) -> None:
        self.replaced: dict[str, list[int]] = {}
        self.plain: dict[str, list[int]] = {}
        self._before: dict[str, Tensor] = {}

    def before(self, used: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        self._before = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}

    def after(self, used: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                same = torch.allclose(parameter.grad, self._before[name], rtol=1e-3, atol=1e-9)
                (self.plain if same else self.replaced).setdefault(name, []).append(used.global_step)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The lines about changes."""
    with caplog.at_level(logging.INFO):
        yield lambda: [r.getMessage() for r in caplog.records if "have changed" in r.getMessage()]


def watched_fit(module: Classifier, *others: pl.Callback, epochs: int = 3, **settings: Any) -> tuple[Spy, KFCCallback]:
    """Train for some epochs of 6 steps; warnings are errors."""
    spy, kfc = Spy(), KFCCallback(**{**DATES, **settings})
    hook = "on_before_optimizer_step"
    callbacks = [Watch(hook, spy.before), *others, kfc, Watch(hook, spy.after)]
    trainer(callbacks, max_steps=-1, max_epochs=epochs).fit(module, loader(images(8 * EPOCH)))
    assert kfc.kfc.step == epochs * EPOCH - 1
    assert kfc.kfc.state_dict()["step"] == epochs * EPOCH
    return spy, kfc


def treatments(kfc: KFC) -> dict[str, tuple[str, str]]:
    return {row.parameter: (row.treatment, row.reason) for row in kfc.coverage()}


# What is added.


class Adapted(Classifier):
    """Another layer of the net, from some hook on."""

    def __init__(self, hook: str, epoch: int = 0) -> None:
        super().__init__(dense_net())
        setattr(self, hook, lambda: self.adapt() if self.current_epoch == epoch else None)

    def adapt(self) -> None:
        self.extra = nn.Linear(36, 3)
        self.trainer.optimizers[0].add_param_group({"params": self.extra.parameters(), "lr": 0.2})

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + (self.extra(x.flatten(1)) if hasattr(self, "extra") else 0)


@pytest.mark.parametrize(
    ("hook", "epoch", "found"),
    [("on_fit_start", 0, 0), ("on_train_start", 0, 0), ("on_train_epoch_start", 0, 0), ("on_train_epoch_start", 1, 8)],
)
def test_a_layer_that_is_added_is_preconditioned_from_the_next_statistics_on(
    hook: str, epoch: int, found: int, said: Callable[[], list[str]]
) -> None:
    spy, kfc = watched_fit(Adapted(hook, epoch))
    steps = list(range(3 * EPOCH))
    for name in ("net.1.weight", "net.1.bias", "net.3.weight", "net.3.bias"):
        assert spy.replaced[name] == steps, name
    for name in ("extra.weight", "extra.bias"):
        assert spy.replaced[name] == steps[found:], name
        assert spy.plain.get(name, []) == steps[epoch * EPOCH : found], name
        assert treatments(kfc.kfc)[name] == ("kfc", "")
    # In on_fit_start the table reports the change.
    line = f"KFC at step {found}: the layers of the model have changed; new: 'extra' (Linear)."
    assert said() == ([] if hook == "on_fit_start" else [line])


def test_a_new_layer_has_a_warm_up_of_its_own_and_the_others_keep_their_dates(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "lightning_kfc")
    model = double(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = data(6, 4), classes(6, count=3)
    kfc = KFC(model, warmup_steps=3, factor_every_n_steps=5, inverse_every_n_steps=10)
    recorded, inverted = {}, {}
    for step in range(20):
        if step == 6:
            model[2] = nn.Linear(5, 3).double()
        caplog.clear()
        train_step(kfc, torch.optim.SGD(model.parameters(), lr=0.1), lambda: F.cross_entropy(model(x), y))
        recorded[step] = kfc.batches.recorded
        inverted[step] = [name for name in kfc.layers if kfc.ages(name)[1] == 0]
        changes = [record for record in caplog.records if "have changed" in record.message]
        assert len(changes) == (step == 10), caplog.text
    dates = {0: ("0", "2"), 1: ("0", "2"), 2: ("0", "2"), 5: ("0", "2"), 10: ("0", "2"), 15: ("0", "2")}
    assert {step: names for step, names in recorded.items() if names} == {**dates, 11: ("2",), 12: ("2",)}
    assert [step for step, names in inverted.items() if "2" in names and step >= 10][:3] == [10, 11, 12]
    assert kfc.layers["0"].averages["A"].draws > kfc.layers["2"].averages["A"].draws


def test_layers_that_stay_are_the_same_objects_with_what_they_have_learnt() -> None:
    model = double(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = data(6, 4), classes(6, count=3)
    kfc = observe(model, lambda: F.cross_entropy(model(x), y))
    kfc.precondition(lr=0.1)
    stays, goes, A = kfc.layers["0"], kfc.layers["2"], kfc.layers["0"].A.clone()
    model[2] = nn.Linear(5, 3).double()
    assert kfc.follow_structure() is not None
    assert kfc.layers["0"] is stays
    assert torch.equal(stays.A, A)
    assert kfc.layers["2"] is not goes
    assert kfc.layers["2"].inverse is None
    assert kfc.ages("2") == (None, None)
    assert kfc.ages("0")[0] is not None
    assert kfc.follow_structure() is None


def test_a_layer_that_gets_another_precision_is_a_new_one(said: Callable[[], list[str]]) -> None:
    class Doubled(Classifier):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.net[3].double()

        def forward(self, x: Tensor) -> Tensor:
            return self.net[3](self.net[:3](x).to(self.net[3].weight.dtype))

    spy, kfc = watched_fit(Doubled(dense_net()))
    assert said() == ["KFC at step 8: the layers of the model have changed; new: 'net.3' (Linear); gone: 'net.3'."]
    assert spy.plain["net.3.weight"] == [6, 7]
    assert kfc.kfc.layers["net.3"].A.dtype == torch.float64


def test_a_module_that_gets_another_name_keeps_its_factors() -> None:
    model = nn.ModuleDict({"net": double(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))})
    x, y = data(6, 4), classes(6, count=3)
    kfc = observe(model, lambda: F.cross_entropy(model["net"](x), y))
    kfc.precondition(lr=0.1)
    before = {name: (layer, layer.A.clone()) for name, layer in kfc.layers.items()}
    model["net"] = nn.Sequential(model["net"])
    assert kfc.follow_structure() is None, "there is nothing to say"
    assert list(kfc.layers) == ["net.0.0", "net.0.2"]
    for (layer, A), (name, now) in zip(before.values(), kfc.layers.items(), strict=True):
        assert layer is now
        assert layer.name == name
        assert torch.equal(layer.A, A)
        assert kfc.ages(name) == (0, 0)


# What is replaced.


class Replaced(Classifier):
    """A head, an optimizer, or both, of another one from epoch 1 on."""

    def __init__(self, change: Callable[[Classifier], None]) -> None:
        super().__init__(dense_net())
        self.change = change

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.change(self)


def new_head(module: Classifier) -> None:
    module.net[3] = nn.Linear(8, 3)


def new_optimizer(module: Classifier) -> None:
    module.trainer.optimizers = [module.configure_optimizers()]


def both(module: Classifier) -> None:
    new_head(module)
    new_optimizer(module)


def test_a_head_that_is_replaced_with_its_optimizer_is_preconditioned(said: Callable[[], list[str]]) -> None:
    spy, kfc = watched_fit(Replaced(both))
    steps = list(range(3 * EPOCH))
    assert spy.replaced["net.1.weight"] == steps
    assert spy.replaced["net.3.weight"] == steps[:EPOCH] + steps[8:]
    assert spy.plain["net.3.weight"] == [6, 7]
    line = "KFC at step 8: the layers of the model have changed; new: 'net.3' (Linear); gone: 'net.3'."
    assert said() == [line]
    assert {row.treatment for row in kfc.kfc.coverage()} == {"kfc"}


def test_an_optimizer_that_is_replaced_steps_by_preconditioned_gradients(said: Callable[[], list[str]]) -> None:
    spy, _ = watched_fit(Replaced(new_optimizer))
    assert spy.plain == {}
    assert said() == []


class RawSteps(Classifier):
    """Manual optimization; from epoch 1 on the steps of another optimizer go past Lightning."""

    def __init__(self) -> None:
        super().__init__(dense_net())
        self.automatic_optimization = False

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            new_optimizer(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers(use_pl_optimizer=self.current_epoch == 0)
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        return loss


def test_the_steps_of_an_optimizer_that_is_replaced_are_followed() -> None:
    module, kfc = RawSteps(), KFCCallback(**DATES)
    with pytest.warns(UserWarning, match="could not precondition a step of SGD") as warned:
        fit(module, kfc=kfc, data=loader(images(48)), max_steps=-1, max_epochs=2)
    assert len([w for w in warned if "KFC" in str(w.message)]) == 1
    assert [o._optimizer_step_post_hooks for o in module.trainer.optimizers] == [{}]


# What is re-parametrised, pruned, frozen and unfrozen.


def test_weight_norm_from_an_epoch_on_gives_what_it_makes_a_diagonal_which_is_reported(
    said: Callable[[], list[str]],
) -> None:
    def normed(module: Classifier) -> None:
        parametrizations.weight_norm(module.net[1])
        new_optimizer(module)

    spy, kfc = watched_fit(Replaced(normed))
    steps = list(range(3 * EPOCH))
    assert spy.replaced["net.3.weight"] == steps
    for own in ("original0", "original1"):
        assert spy.replaced[f"net.1.parametrizations.weight.{own}"] == steps[8:]
    assert spy.replaced["net.1.bias"] == steps[:EPOCH] + steps[8:]
    (line,) = said()
    assert "new: 'net.1.bias' (diagonal, since its weight is re-parametrised), 'net.1.parametrizations" in line
    assert line.endswith("gone: 'net.1'.")
    assert treatments(kfc.kfc)["net.1.bias"] == ("diagonal", "its weight is re-parametrised")


@pytest.mark.filterwarnings("ignore:.*ModelPruning.*")
@pytest.mark.parametrize("permanent", [False, True])
def test_pruning_by_a_callback_trains_to_the_end(permanent: bool, said: Callable[[], list[str]]) -> None:
    pruning = ModelPruning("l1_unstructured", amount=0.3, make_pruning_permanent=permanent)
    module = Classifier(dense_net())
    spy, kfc = watched_fit(module, pruning)
    steps = list(range(3 * EPOCH))
    assert spy.replaced["net.1.weight"] == steps[:EPOCH]
    assert spy.replaced["net.1.weight_orig"] == steps[8:]
    assert len(said()) == 1
    found = treatments(kfc.kfc)
    assert set(found) == {name for name, _ in module.named_parameters()}
    if permanent:
        # The fit was over when the weights became plain ones again; another fit finds them.
        assert found["net.1.weight"] == ("plain", "new: found at the next step that takes statistics")
    else:
        assert found["net.1.weight_orig"] == ("diagonal", "its weight is re-parametrised")


def test_pruning_that_is_undone_brings_kronecker_factors_back() -> None:
    model = double(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    kfc = engine(model)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    kfc.follow_structure()
    assert "0.weight_orig" in kfc.layers
    prune.remove(model[0], "weight")
    kfc.follow_structure()
    assert treatments(kfc)["0.weight"] == ("kfc", "")


class Backbone(Classifier):
    """A backbone that a callback freezes, and unfreezes at an epoch."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_a_backbone_that_is_unfrozen_with_a_parameter_group_of_its_own_is_preconditioned() -> None:
    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, train_bn=False, backbone_initial_lr=0.05)
    spy, _ = watched_fit(Backbone(), unfreeze)
    steps = list(range(3 * EPOCH))
    assert spy.replaced["head.weight"] == steps
    # Its own warm-up begins at its first step, which would be long by the plain gradient.
    assert spy.replaced["backbone.1.weight"] == steps[6:]


# What was dropped, and what raises nothing.


class Twice(nn.Module):
    """Uses a weight without calling its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.first.weight, self.first.bias).tanh())


def test_a_layer_that_was_dropped_stays_dropped_until_it_is_another() -> None:
    model, x, y = Twice().double(), data(4, 3), classes(4, count=3)
    reason = "its weight is used without calling the module"
    with pytest.warns(UserWarning, match=reason):
        kfc = observe(model, lambda: F.cross_entropy(model(x), y))
    kfc.precondition(lr=0.1)
    diagonal = kfc.layers["first.weight"]
    model.head = nn.Linear(3, 3).double()
    kfc.follow_structure()
    assert kfc.layers["first.weight"] is diagonal
    assert kfc.state_dict()["dropped"] == {"first": reason}
    model.first = nn.Linear(3, 3).double()
    kfc.follow_structure()
    assert kfc.state_dict()["dropped"] == {}
    with kfc.capture():
        loss = F.cross_entropy(model(x), y)
    with pytest.warns(UserWarning, match=f"'first': {reason}") as warned:
        kfc.update(loss)
    assert len(warned) == 1


def test_a_parameter_of_another_shape_trains_plainly_until_the_next_statistics(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "lightning_kfc")
    model = double(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = data(6, 4), classes(6, count=3)
    kfc = KFC(model, warmup_steps=0, factor_every_n_steps=3, inverse_every_n_steps=3)
    for step in range(5):
        if step == 1:
            model[2].weight = nn.Parameter(data(7, 5, seed=7))
            model[2].bias = nn.Parameter(data(7, seed=8))
        if step in (1, 2):
            assert treatments(kfc)["2.weight"] == ("plain", "new: found at the next step that takes statistics")
            assert "2 " not in str(kfc.coverage()).splitlines()[4]
        model.zero_grad()
        caplog.clear()
        with kfc.capture():
            loss = F.cross_entropy(model(x), y)
        assert len(caplog.records) == (step == 3)
        kfc.update(loss)
        loss.backward()
        plain = [p.grad.clone() for p in model.parameters()]
        kfc.precondition(lr=0.1)
        replaced = [not torch.equal(p.grad, before) for p, before in zip(model.parameters(), plain, strict=True)]
        assert replaced == [True, True, step in (0, 3, 4), step in (0, 3, 4)], step


def test_a_model_that_loses_all_of_its_layers_trains_on(said: Callable[[], list[str]]) -> None:
    def bare(module: Classifier) -> None:
        module.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).requires_grad_(False)
        module.scale = nn.Parameter(torch.ones(()))
        module.forward = lambda x: module.scale * module.net(x)
        new_optimizer(module)

    spy, kfc = watched_fit(Replaced(bare), include="net.*")
    assert spy.replaced.keys() == {"net.1.weight", "net.1.bias", "net.3.weight", "net.3.bias"}
    assert spy.plain["scale"] == list(range(EPOCH, 3 * EPOCH))
    assert treatments(kfc.kfc)["scale"] == ("plain", "not in include")
    assert "with their plain gradient: 'scale' (not in include)" in said()[0]


# Lazy modules, and modules without parameters.


def lazy_net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(3))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("automatic", [False, True], ids=["fixed", "auto"])
def test_lazy_modules_are_covered_after_the_first_forward(automatic: bool, said: Callable[[], list[str]]) -> None:
    module = Classifier(lazy_net())
    start = KFC(module.net).coverage()
    assert {row.reason for row in start} == {"not initialised before the first forward"}
    spy, kfc = watched_fit(module, epochs=1, **({"damping": "auto", "kl_clip": "auto"} if automatic else {}))
    for name, _ in module.named_parameters():
        assert spy.plain[name] == [0]
        assert spy.replaced[name] == [1, 2, 3, 4, 5]
    assert said() == [
        "KFC at step 1: the layers of the model have changed; new: 'net.1' (Linear), 'net.2' (BatchNorm), "
        "'net.4' (Linear)."
    ]
    assert {row.treatment for row in kfc.kfc.coverage()} == {"kfc", "block"}
    assert kfc.kfc.reviewer.active == automatic


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_that_is_made_in_a_training_step_ends_reviews_which_is_reported() -> None:
    class Lazily(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 3:
                self.net[3] = nn.LazyLinear(3)
                new_optimizer(self)
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="not initialised yet, as those of lazy modules"):
        spy, _ = watched_fit(Lazily(dense_net()), epochs=2, damping="auto", kl_clip="auto")
    assert spy.replaced["net.1.weight"] == list(range(2 * EPOCH))


@pytest.mark.parametrize(
    "norm",
    [nn.InstanceNorm2d(4), nn.GroupNorm(2, 4, affine=False), nn.BatchNorm2d(4, affine=False)],
    ids=lambda norm: type(norm).__name__,
)
def test_norm_layers_without_parameters_are_no_layers(norm: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.PReLU(), nn.Flatten(), nn.Linear(64, 3))
    _, kfc = watched_fit(Classifier(net))
    assert list(kfc.kfc.layers) == ["net.0", "net.2", "net.4"]
    assert all(layer.inverse is not None for layer in kfc.kfc.layers.values())


# How steps are made.


class Switches(Classifier):
    """Manual optimization in some epochs, automatic in the others."""

    def __init__(self, manual: set[int]) -> None:
        super().__init__(dense_net())
        self.manual = manual
        self.made = 0

    def on_train_epoch_start(self) -> None:
        self.automatic_optimization = self.current_epoch not in self.manual

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.made += 1
        return loss


@pytest.mark.parametrize("batch_size", [8, 160])
@pytest.mark.parametrize("manual", [{1, 2}, {1}], ids=["from an epoch on", "for an epoch"])
def test_automatic_and_manual_optimization_take_turns(manual: set[int], batch_size: int) -> None:
    module, spy, kfc = Switches(manual), Spy(), KFCCallback()
    hook = "on_before_optimizer_step"
    callbacks = [Watch(hook, spy.before), kfc, Watch(hook, spy.after)]
    batches = loader(images(EPOCH * batch_size), batch_size=batch_size)
    trainer(callbacks, max_steps=-1, max_epochs=3).fit(module, batches)
    assert module.made == EPOCH * len(manual)
    assert kfc.kfc.step == 3 * EPOCH - 1
    assert spy.plain == {}


# State.


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_fit_whose_structure_has_changed_is_resumed_bit_for_bit(tmp_path: Any) -> None:
    def run(folder: str, *, epochs: int, resume: str | None = None) -> tuple[Tensor, KFCCallback]:
        torch.manual_seed(3)
        # Whoever resumes builds the model as it was.
        module, kfc = Replaced(both), KFCCallback(**DATES)
        keep = ModelCheckpoint(tmp_path / folder, save_last=True)
        used = trainer([kfc, keep], max_steps=-1, max_epochs=epochs, enable_checkpointing=True)
        used.fit(module, loader(images(8 * EPOCH)), ckpt_path=resume)
        return weights(module), kfc

    expected, whole = run("whole", epochs=4)
    run("first", epochs=2)
    found, resumed = run("second", epochs=4, resume=str(tmp_path / "first" / "last.ckpt"))
    assert torch.equal(found, expected)
    assert torch.equal(resumed.kfc.layers["net.3"].A, whole.kfc.layers["net.3"].A)
    assert resumed.kfc.state_dict()["due"] == whole.kfc.state_dict()["due"]
