"""Statistics from a part of a batch: in expectation those of the whole, and nobody notices how they were taken."""

from __future__ import annotations

import functools
import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC, Categorical, Gaussian
from lightning_kfc.part import Parts
from tests.harness import hooks_of
from tests.nets import classes, data, double, engine, observe, small_conv_net

N, PART, CLASSES = 24, 6, 3
X, Y, TARGETS = data(N, 2, 6, 6), classes(N, count=CLASSES), data(N, CLASSES, seed=3)
PIXELS = (data(N, CLASSES, seed=4) > 0).double()
Loss = Callable[[Tensor, Any], Tensor]


def mean_of_kept(logits: Tensor, part: Any) -> Tensor:
    """A third of the targets is ignored, so that parts have more or less of them."""
    return F.cross_entropy(logits, torch.where(torch.arange(N) % 3 == 0, -100, Y)[part])


#: Losses of some examples' logits: of both laws, of all likelihoods.
LOSSES: dict[str, tuple[str, Loss]] = {
    "mean": ("mean", lambda z, part: F.cross_entropy(z, Y[part])),
    "sum": ("sum", lambda z, part: F.cross_entropy(z, Y[part], reduction="sum")),
    "constant share": ("sum", lambda z, part: F.mse_loss(z, TARGETS[part], reduction="sum") / N),
    "mean of rows": ("mean", lambda z, part: F.mse_loss(z, TARGETS[part], reduction="none").sum(1).mean()),
    "two terms": (
        "mean",
        lambda z, part: F.cross_entropy(z, Y[part]) + 0.4 * F.binary_cross_entropy_with_logits(z, PIXELS[part]),
    ),
}


class Setting:
    """A model that stands still, and its engine, which looks at a part at each step after the first."""

    def __init__(self, loss: Loss, model: nn.Module | None = None, inputs: Tensor = X, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = small_conv_net() if model is None else model
        self.inputs = inputs
        self._loss = loss
        self.parts: list[Tensor] = []
        self.kfc = engine(self.model, **{"ema_decay": 0.0, "factor_examples": PART, **settings})

    def loss(self, part: Any = slice(None)) -> Tensor:
        if isinstance(part, Tensor):
            self.parts.append(part)
        of_these = torch.arange(N)[: len(self.inputs)][part]
        return self._loss(self.model(self.inputs[part]), of_these)

    def step(self, loss_scale: float = 1.0) -> None:
        """One step that moves nothing."""
        self.model.zero_grad()
        with self.kfc.capture(self.loss, examples=len(self.inputs)):
            loss = self.loss() * loss_scale
        self.kfc.update(loss, loss_scale=loss_scale)
        loss.backward()
        self.kfc.precondition(lr=0.0, loss_scale=loss_scale)

    def factors(self) -> dict[str, Tensor]:
        return {name: factor.clone() for name, factor in factors_of(self.kfc).items()}


def factors_of(kfc: KFC) -> dict[str, Tensor]:
    return {f"{name}.{side}": factor for name, layer in kfc.layers.items() for side, factor in layer.factors.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name] - value).norm() / value.norm())
        assert error < rtol, f"{name}: relative error {error:.2g}, ratio {float(found[name].norm() / value.norm()):.6g}"


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_part_s_factors_are_those_of_its_examples_at_the_scale_of_the_whole(name: str, fisher: str) -> None:
    law, loss = LOSSES[name]
    setting = Setting(loss, fisher=fisher)
    setting.step()
    assert setting.kfc.statistics_source == f"{PART} examples of each batch"
    assert_close(setting.factors(), factors_of(observe(setting.model, setting.loss, fisher=fisher)))
    setting.step()
    part = setting.parts[-1]
    assert len(set(part.tolist())) == PART
    scale = N / PART if law == "sum" else 1.0
    alone = observe(setting.model, lambda: scale * setting.loss(part), fisher=fisher)
    names = [n for n in setting.factors() if fisher == "exact" or n.endswith(".A")]
    # The empirical Fisher's signs are drawn anew at each step; its scale is tested by what is expected of it below.
    assert_close({n: setting.factors()[n] for n in names}, {n: factors_of(alone)[n] for n in names})


DRAWS = 60


def draws(setting: Setting) -> dict[str, Tensor]:
    """Each factor at so many steps after the first, ``(DRAWS, numel)``."""
    setting.step()
    found: dict[str, list[Tensor]] = {}
    for _ in range(DRAWS):
        setting.step()
        for name, value in setting.factors().items():
            found.setdefault(name, []).append(value.flatten())
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.parametrize(("name", "fisher"), [("mean", "exact"), ("sum", "empirical"), ("two terms", "mc")])
def test_in_expectation_a_part_s_factors_are_the_whole_batch_s(name: str, fisher: str) -> None:
    parts = draws(Setting(LOSSES[name][1], fisher=fisher))
    # Signs and targets are drawn, so that the whole batch's factors have a mean, too.
    wholes = draws(Setting(LOSSES[name][1], fisher=fisher, factor_examples=None))
    for factor, drawn in parts.items():
        expected = wholes[factor].mean(0)
        ratios, own = ((v * expected).sum(-1) / expected.square().sum() for v in (drawn, wholes[factor]))
        error = float(((ratios.var() + own.var()) / DRAWS).sqrt())
        # Any power of N / PART too many would be off by a factor of 4. Some factors do not vary at all.
        assert abs(float(ratios.mean()) - 1) < 4.5 * error + 1e-12, (
            f"{factor}: {float(ratios.mean()):.3f} +- {error:.3f}"
        )
        assert error < 0.15


@pytest.mark.parametrize("name", LOSSES)
def test_all_examples_in_any_order_give_the_whole_batch_s_factors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(LOSSES[name][1])
    setting.step()
    whole = setting.factors()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(Parts, "_chosen", lambda self, examples, count, step, micro_batch: order)
    setting.step()
    assert torch.equal(setting.parts[-1], order)
    assert_close(setting.factors(), whole)


def test_masked_means_are_means_though_parts_have_more_or_fewer_targets() -> None:
    setting = Setting(mean_of_kept)
    setting.step()
    setting.step()
    part = setting.parts[-1]
    assert_close(setting.factors(), factors_of(observe(setting.model, lambda: setting.loss(part))))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_logits_that_are_named_by_a_module_follow_the_likelihood_s_reduction(reduction: str) -> None:
    def own_loss(logits: Tensor, part: Any) -> Tensor:
        picked = logits.log_softmax(1).gather(1, Y[part][:, None])
        return -picked.mean() if reduction == "mean" else -picked.sum()

    likelihood = Categorical(output_of="5", reduction=reduction)
    setting = Setting(own_loss, likelihood=likelihood)
    setting.step()
    setting.step()
    part = setting.parts[-1]
    scale = N / PART if reduction == "sum" else 1.0
    expected = observe(setting.model, lambda: scale * LOSSES[reduction][1](setting.model(X[part]), part))
    assert_close(setting.factors(), factors_of(expected))


def test_a_gradient_scaler_s_factor_is_not_in_what_a_part_gives() -> None:
    plain, scaled = Setting(LOSSES["sum"][1]), Setting(LOSSES["sum"][1])
    for _ in range(2):
        plain.step()
        scaled.step(loss_scale=2.0**12)
    assert torch.equal(plain.parts[-1], scaled.parts[-1])
    assert_close(scaled.factors(), plain.factors())


@pytest.mark.parametrize("name", ["mean", "sum"])
def test_ekfac_s_second_moments_are_in_expectation_the_whole_batch_s(name: str) -> None:
    # The basis of the first step stays, so that the eigenvalues alone come from parts.
    settings = {"inverse": "ekfac", "inverse_every_n_steps": 10**6, "warmup_steps": 0, "include": "5"}
    setting = Setting(LOSSES[name][1], **settings)
    setting.step()

    def values() -> Tensor:
        return setting.kfc.layers["5"].inverse.state()["values"].clone()  # type: ignore[union-attr, return-value]  # EKFAC has an inverse, with values

    whole, draws = values(), []
    for _ in range(100):
        setting.step()
        draws.append(float(values().sum() / whole.sum()))
    shares = torch.tensor(draws, dtype=torch.float64)
    assert abs(float(shares.mean()) - 1) < 4.5 * float(shares.std()) / len(draws) ** 0.5
    assert 0 < float(shares.std()) < 0.5


def test_micro_batches_choose_examples_of_their_own_and_add_up() -> None:
    _, loss = LOSSES["mean"]
    setting = Setting(lambda z, part: loss(z, part) / 2)
    half = N // 2
    for step in range(2):
        for micro_batch in range(2):
            at = slice(half * micro_batch, half * (micro_batch + 1))

            def of_half(part: Any = slice(None), at: slice = at) -> Tensor:
                return setting.loss(torch.arange(N)[at][part])

            with setting.kfc.capture(of_half, examples=half):
                value = of_half()
            setting.kfc.update(value, accumulate=micro_batch == 0)
            value.backward()
        setting.kfc.precondition(lr=0.0)
        setting.model.zero_grad()
        if step == 0:
            # The first step is one of whole batches throughout, although its first loss has shown the law.
            expected = observe(setting.model, lambda: loss(setting.model(X), slice(None)))
            assert_close(setting.factors(), factors_of(expected))
    parts = [part for part in setting.parts if len(part) == PART]
    assert len(parts) == 2
    assert parts[0].max() < half <= parts[1].min()
    assert (parts[0] + half).tolist() != parts[1].tolist()
    both = torch.cat(parts)
    assert_close(setting.factors(), factors_of(observe(setting.model, lambda: loss(setting.model(X[both]), both))))


# What nobody notices.


class Noisy(nn.Module):
    """Batch norm, dropout and numbers from every stream."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = double(nn.Flatten(), nn.Linear(72, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, CLASSES))
        self.hooks_seen: list[bool] = []
        self.modes_seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.hooks_seen.append(bool(hooks_of(self)))
        self.modes_seen.append(torch._C._len_torch_function_stack())
        noise = random.random() + float(np.random.rand())
        return self.layers(x + 1e-3 * noise)


def trained(**settings: Any) -> tuple[Noisy, list[float], Tensor]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    setting = Setting(LOSSES["mean"][1], Noisy(), factor_every_n_steps=2, warmup_steps=2, **settings)
    losses = []
    optimizer = torch.optim.SGD(setting.model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        with setting.kfc.capture(setting.loss, examples=N):
            loss = setting.loss()
        setting.kfc.update(loss)
        loss.backward()
        # Whatever the curvature is: the gradients themselves must not know of the part.
        losses.append(float(loss.detach()))
        optimizer.step()
        setting.kfc.skip(optimizer)
    assert isinstance(setting.model, Noisy)
    return setting.model, losses, torch.tensor([*torch.rand(3).tolist(), random.random(), float(np.random.rand())])


def test_buffers_random_streams_and_gradients_do_not_notice_a_part() -> None:
    whole, losses, stream = trained(factor_examples=None)
    model, found, after = trained()
    assert found == losses
    assert torch.equal(after, stream)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert len(model.hooks_seen) > len(whole.hooks_seen)


def test_nothing_runs_in_the_forward_of_the_whole_batch_where_a_part_is_looked_at() -> None:
    model, _, _ = trained()
    # Step 0: the whole batch, and the trial that only looks at the loss; 1, 2 and 4: the whole, then the part.
    assert model.hooks_seen == [True, False, False, True, False, True, False, False, True]
    assert model.modes_seen == [1, 1, 0, 1, 0, 1, 0, 0, 1]


def test_the_choice_depends_on_seed_step_and_micro_batch_alone() -> None:
    def choices(seed: int, draw_before: bool) -> list[list[int]]:
        setting = Setting(LOSSES["mean"][1], seed=seed)
        for _ in range(4):
            if draw_before:
                torch.rand(5)
            setting.step()
        return [part.tolist() for part in setting.parts]

    assert choices(0, False) == choices(0, True)
    assert choices(0, False) != choices(1, False)
    assert len({tuple(part) for part in choices(0, False)[1:]}) == 3


def test_a_run_that_goes_on_from_a_state_has_the_same_factors() -> None:
    whole = Setting(LOSSES["sum"][1])
    for _ in range(2):
        whole.step()
    state = whole.kfc.state_dict()
    other = Setting(LOSSES["sum"][1])
    assert other.kfc.load_state_dict(state) == []
    for setting in (whole, other):
        setting.step()
    assert [p.tolist() for p in other.parts] == [whole.parts[-1].tolist()]
    for name, value in whole.factors().items():
        assert torch.equal(other.factors()[name], value)


def test_without_the_state_s_factors_the_first_batch_is_looked_at_as_a_whole_again() -> None:
    before = Setting(LOSSES["sum"][1])
    before.step()
    after = Setting(LOSSES["mean"][1])
    after.kfc.load_state_dict(before.kfc.state_dict(factors=False))
    after.step()
    assert_close(after.factors(), factors_of(observe(after.model, after.loss)))
    after.step()
    part = after.parts[-1]
    assert_close(after.factors(), factors_of(observe(after.model, lambda: after.loss(part))))


def test_a_batch_of_no_more_examples_is_recorded_as_it_is_and_a_larger_one_shows_the_law_later() -> None:
    setting = Setting(LOSSES["sum"][1])
    parts_used = []
    for count in (PART, 3, N, N, PART):
        setting.inputs = X[:count]
        setting.parts.clear()
        setting.step()
        parts_used.append([len(part) for part in setting.parts])
        if len(parts_used) != 4:
            assert_close(setting.factors(), factors_of(observe(setting.model, setting.loss)))
    # The third batch is the first that shows the law, by a trial with a quarter of it.
    assert parts_used == [[], [], [N // 4], [PART], []]
    assert setting.kfc.state_dict()["parts"]["law"] == "sum"


# Where whole batches are used, and what is said.


def contrastive(logits: Tensor, part: Any) -> Tensor:
    """Each example against every other one."""
    return F.cross_entropy(logits @ logits.T, torch.arange(len(logits)))


def pairs(logits: Tensor, part: Any) -> Tensor:
    return F.mse_loss(logits, TARGETS[part], reduction="sum") * len(logits)


class ForgetsNothing(nn.Module):
    """Keeps a state of the size of the batch from forward to forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = double(nn.Flatten(), nn.Linear(72, CLASSES))
        self.hidden: Tensor = torch.zeros(N, CLASSES, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x) + self.hidden
        self.hidden = output.detach()
        return output


class Teacher(nn.Module):
    """Moves a frozen copy in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = double(nn.Flatten(), nn.Linear(72, CLASSES))
        self.teacher = double(nn.Flatten(), nn.Linear(72, CLASSES)).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher[1].weight.lerp_(self.layer[1].weight, 0.1)
        return self.layer(x)


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.TransformerEncoderLayer(72, 2, 8, batch_first=False, dtype=torch.float64, dropout=0.0)
        self.head = nn.Linear(72, CLASSES, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x.flatten(1).unsqueeze(0))[0])


UNSAFE: dict[str, tuple[Callable[[], nn.Module], Loss, str]] = {
    "contrastive": (small_conv_net, contrastive, "cross_entropy has 576 logits on 24 examples but 36 on 6"),
    "pairs": (small_conv_net, pairs, "neither a mean's 1 nor a sum's share"),
    "mixed": (
        small_conv_net,
        lambda z, part: LOSSES["mean"][1](z, part) + LOSSES["constant share"][1](z, part),
        "some loss terms are means over the batch, others are sums",
    ),
    "stateful": (ForgetsNothing, LOSSES["mean"][1], r"could not be evaluated \(RuntimeError: The size of tensor"),
    "teacher": (Teacher, LOSSES["mean"][1], "changes parameters itself"),
    "time first": (Sequences, LOSSES["mean"][1], "batch_first=False"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_where_a_part_will_not_do_whole_batches_are_used_and_the_reason_is_said_once(
    name: str, informed: list[str]
) -> None:
    make, loss, reason = UNSAFE[name]
    setting = Setting(loss, make())
    for _ in range(3):
        setting.step()
        hidden = getattr(setting.model, "hidden", None)
        if isinstance(hidden, Tensor):
            setting.model.hidden = torch.zeros(N, CLASSES, dtype=torch.float64)
    assert len(informed) == 1
    found = informed[0].removeprefix("KFC takes its statistics from ").removesuffix(".")
    assert found == setting.kfc.statistics_source
    assert found.startswith(f"whole batches, in spite of factor_examples={PART}: ")
    assert re.search(reason, found), found
    expected = factors_of(observe(setting.model, setting.loss))
    # Where examples meet in the loss, the signs of exact seeds are drawn; input factors tell as well what was read.
    names = [n for n in expected if n.endswith(".A")] if name == "contrastive" else list(expected)
    assert_close({n: setting.factors()[n] for n in names}, {n: expected[n] for n in names})


def test_an_empirical_loss_that_is_not_recognised_is_looked_at_as_a_whole(informed: list[str]) -> None:
    setting = Setting(lambda z, part: (z - TARGETS[part]).abs().mean(), fisher="empirical")
    setting.step()
    setting.step()
    assert "no term of the loss is recognised" in informed[0]
    assert len(informed) == 1


def test_a_part_that_fails_later_on_costs_one_step_s_statistics_and_is_not_tried_again(informed: list[str]) -> None:
    setting = Setting(LOSSES["mean"][1])
    setting.step()
    setting.step()
    kept, original = setting.factors(), setting._loss

    def broken(logits: Tensor, part: Any) -> Tensor:
        if len(logits) == PART:
            raise MemoryError("no room")
        return original(logits, part)

    setting._loss = broken
    setting.step()
    assert "(MemoryError: no room)" in informed[0]
    assert_close(setting.factors(), kept, rtol=1e-15)
    setting.step()
    assert_close(setting.factors(), factors_of(observe(setting.model, setting.loss)))
    # A resumed run does the same.
    resumed = Setting(LOSSES["mean"][1])
    resumed.kfc.load_state_dict(setting.kfc.state_dict())
    assert not resumed.kfc.takes_parts


def test_single_batches_can_be_taken_as_a_whole_which_is_said_once(informed: list[str]) -> None:
    setting = Setting(LOSSES["mean"][1])
    setting.step()
    for _ in range(2):
        with setting.kfc.capture(whole="its graphs are of unequal sizes"):
            loss = setting.loss()
        setting.kfc.update(loss)
        loss.backward()
        setting.kfc.precondition(lr=0.0)
        assert_close(setting.factors(), factors_of(observe(setting.model, setting.loss)))
    assert informed == [
        "KFC takes the statistics of such batches as a whole, in spite of factor_examples: its graphs are of unequal "
        "sizes."
    ]
    assert setting.kfc.takes_parts


def test_a_capture_that_says_nothing_of_the_batch_is_an_error_with_the_way_out() -> None:
    kfc = engine(small_conv_net(), factor_examples=PART)
    with (
        pytest.raises(ValueError, match=r"factor_examples=6 needs the loss of a part.*examples=len\(x\)"),
        kfc.capture(),
    ):
        pass


def test_a_part_of_a_training_with_adam_s_rule_and_sampled_targets_trains_as_well() -> None:
    def loss_of(model: nn.Module, part: Any) -> Tensor:
        return LOSSES["mean"][1](model(X[part]), part)

    reached = {}
    for wanted in (None, PART):
        torch.manual_seed(0)
        model = small_conv_net()
        kfc = KFC(model, rule="adam", factor_examples=wanted, factor_every_n_steps=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
        for _ in range(40):
            optimizer.zero_grad()
            of_these = functools.partial(loss_of, model)
            with kfc.capture(of_these, examples=N):
                value = of_these(slice(None))
            kfc.update(value)
            value.backward()
            kfc.precondition(optimizer=optimizer)
            optimizer.step()
        reached[wanted] = float(value.detach())
    # From 1.1 at the start; of the curvature of six examples little more is asked than that it leads there.
    assert reached[PART] < 2 * reached[None] < 0.01


def test_gaussian_outputs_by_name_are_divided_too() -> None:
    setting = Setting(lambda z, part: (z - TARGETS[part]).square().mean(), likelihood=Gaussian(output_of="5"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setting.step()
        setting.step()
    part = setting.parts[-1]
    expected = observe(setting.model, lambda: F.mse_loss(setting.model(X[part]), TARGETS[part]))
    assert_close(setting.factors(), factors_of(expected))
