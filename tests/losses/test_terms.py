"""Discovery: seeds at the logits reproduce the Hessian of the loss by its logits, for every supported loss and option.

For these likelihoods the Hessian by the logits is the Fisher information weighted by the c of every term, so it
checks the recognition, the options, the weights and the seeds at once, without knowing any of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC, Bernoulli, Categorical, Gaussian, LossNotRecognisedError
from lightning_kfc.estimation.seeds import seed_passes, weighted_terms
from lightning_kfc.losses.recorder import LossRecorder
from lightning_kfc.losses.selection import THE_REST, curvature_line
from tests.helpers import oracles
from tests.helpers.examples import examples
from tests.helpers.nets import classes, data, double, engine, observe

Loss = Callable[[Tensor], Tensor]


def fisher_at_logits(loss: Loss, at: Tensor, *, vector_is_a_batch: bool = False) -> Tensor:
    """Σ v vᵀ of the exact seeds, back-propagated to the tensor that the logits are made from.

    Seeds of different examples (first axis) travel together and never meet in a layer; their products are left out.
    """
    leaf = at.detach().requires_grad_()
    recorder = LossRecorder()
    with recorder:
        value = loss(leaf * 1)
    terms = weighted_terms(value, recorder.terms)
    total = torch.zeros(leaf.numel(), leaf.numel(), dtype=leaf.dtype)
    for seeds in seed_passes(terms, "exact", torch.Generator().manual_seed(0)):
        (v,) = torch.autograd.grad(
            [edge for edge, _ in seeds], [leaf], [seed for _, seed in seeds], retain_graph=True, materialize_grads=True
        )
        total += torch.outer(v.reshape(-1), v.reshape(-1))
    return total * same_example(leaf, vector_is_a_batch=vector_is_a_batch)


def same_example(logits: Tensor, *, vector_is_a_batch: bool = False) -> Tensor:
    """1 where two entries belong to one example; a vector is one example of several classes, else a batch."""
    examples = logits.shape[0] if logits.ndim > 1 or (logits.ndim == 1 and vector_is_a_batch) else 1
    owner = torch.arange(examples).repeat_interleave(logits.numel() // examples)
    return (owner.unsqueeze(0) == owner.unsqueeze(1)).to(logits.dtype)


def assert_is_the_hessian(loss: Loss, at: Tensor, *, vector_is_a_batch: bool = False) -> None:
    expected = oracles.logits_hessian(loss, at)
    mask = same_example(at, vector_is_a_batch=vector_is_a_batch)
    assert not bool((expected * (1 - mask)).any()), "the oracle couples what should be different examples"
    found = fisher_at_logits(loss, at, vector_is_a_batch=vector_is_a_batch)
    oracles.assert_equal(found, expected, what="Fisher at the logits")


def combined(terms: Tensor, how: str) -> Tensor:
    """Uses of reduction='none'."""
    if how == "mean":
        return terms.mean()
    if how == "sum":
        return terms.sum()
    weights = torch.linspace(0.1, 1.3, terms.numel(), dtype=terms.dtype).reshape(terms.shape)
    return (weights * terms).sum() / 3


REDUCTIONS = st.sampled_from(["mean", "sum", "none, then mean", "none, then sum", "none, then weighted"])


def finish(result: Tensor, reduction: str) -> Tensor:
    return combined(result, reduction.removeprefix("none, then ")) if reduction.startswith("none") else result


def torch_name(reduction: str) -> str:
    return "none" if reduction.startswith("none") else reduction


#: Logits of rank 1 (unbatched), 2, 3 (sequences) and 4 (segmentation).
CLASS_SHAPES = [(3,), (4, 3), (2, 3, 2), (2, 3, 2, 2)]


def target_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return () if len(shape) == 1 else (shape[0], *shape[2:])


@examples(80)
@given(
    shape=st.sampled_from(CLASS_SHAPES),
    reduction=REDUCTIONS,
    weighted=st.booleans(),
    ignore_index=st.sampled_from([None, -100, 1]),
    smoothing=st.sampled_from([0.0, 0.3]),
    as_module=st.booleans(),
)
def test_cross_entropy_of_class_indices(
    shape: tuple[int, ...],
    reduction: str,
    weighted: bool,
    ignore_index: int | None,
    smoothing: float,
    as_module: bool,
) -> None:
    target = classes(*target_shape(shape), count=3)
    if ignore_index is not None and target.ndim:
        target.view(-1)[0] = ignore_index
        target.view(-1)[1] = 2
    options = {
        "weight": torch.tensor([0.5, 1.0, 3.0]).double() if weighted else None,
        "ignore_index": -100 if ignore_index is None or not target.ndim else ignore_index,
        "label_smoothing": smoothing,
        "reduction": torch_name(reduction),
    }

    def loss(z: Tensor) -> Tensor:
        value = nn.CrossEntropyLoss(**options)(z, target) if as_module else F.cross_entropy(z, target, **options)
        return finish(value, reduction)

    assert_is_the_hessian(loss, data(*shape))


@given(
    shape=st.sampled_from(CLASS_SHAPES),
    reduction=REDUCTIONS,
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.3]),
    as_module=st.booleans(),
)
def test_cross_entropy_of_soft_targets(
    shape: tuple[int, ...], reduction: str, weighted: bool, smoothing: float, as_module: bool
) -> None:
    soft = data(*shape, seed=4).softmax(0 if len(shape) == 1 else 1)
    options = {
        "weight": torch.tensor([0.5, 1.0, 3.0]).double() if weighted else None,
        "label_smoothing": smoothing,
        "reduction": torch_name(reduction),
    }

    def loss(z: Tensor) -> Tensor:
        value = nn.CrossEntropyLoss(**options)(z, soft) if as_module else F.cross_entropy(z, soft, **options)
        return finish(value, reduction)

    assert_is_the_hessian(loss, data(*shape))


@given(shape=st.sampled_from(CLASS_SHAPES), reduction=REDUCTIONS, weighted=st.booleans(), as_module=st.booleans())
def test_nll_loss_of_log_softmax(shape: tuple[int, ...], reduction: str, weighted: bool, as_module: bool) -> None:
    target = classes(*target_shape(shape), count=3)
    if target.ndim:
        target.view(-1)[0] = -100
    weight = torch.tensor([0.5, 1.0, 3.0]).double() if weighted else None

    def loss(z: Tensor) -> Tensor:
        log_p = F.log_softmax(z, 0 if z.ndim == 1 else 1)
        options = {"weight": weight, "reduction": torch_name(reduction)}
        value = nn.NLLLoss(**options)(log_p, target) if as_module else F.nll_loss(log_p, target, **options)
        return finish(value, reduction)

    assert_is_the_hessian(loss, data(*shape))


@examples(50)
@given(
    shape=st.sampled_from([(4,), (3, 2), (2, 3, 2), (2, 2, 2, 2)]),
    reduction=REDUCTIONS,
    weight=st.sampled_from([None, "one an output", "one in all", "one an example"]),
    positive=st.booleans(),
    soft=st.booleans(),
    as_module=st.booleans(),
)
def test_binary_cross_entropy_with_logits(
    shape: tuple[int, ...], reduction: str, weight: str | None, positive: bool, soft: bool, as_module: bool
) -> None:
    target = data(*shape, seed=6).sigmoid() if soft else classes(*shape, count=2).double()
    own = {
        None: None,
        "one an output": data(shape[-1], seed=8).abs(),
        "one in all": torch.tensor(0.7).double(),
        "one an example": data(shape[0], *[1] * (len(shape) - 1), seed=8).abs(),
    }[weight]
    options = {
        "weight": own,
        "pos_weight": data(shape[-1], seed=9).abs() if positive else None,
        "reduction": torch_name(reduction),
    }

    def loss(z: Tensor) -> Tensor:
        if as_module:
            return finish(nn.BCEWithLogitsLoss(**options)(z, target), reduction)
        return finish(F.binary_cross_entropy_with_logits(z, target, **options), reduction)

    assert_is_the_hessian(loss, data(*shape), vector_is_a_batch=True)


@examples(50)
@given(
    shape=st.sampled_from([(), (4,), (3, 2), (2, 3, 2), (2, 2, 2, 2)]),
    reduction=REDUCTIONS,
    weighted=st.booleans(),
    swapped=st.booleans(),
    as_module=st.booleans(),
)
def test_mse_loss(shape: tuple[int, ...], reduction: str, weighted: bool, swapped: bool, as_module: bool) -> None:
    target = data(*shape, seed=5)
    weight = data(*shape, seed=8).abs() if weighted and not as_module else None
    options = {"reduction": torch_name(reduction)}

    def loss(z: Tensor) -> Tensor:
        pair = (target, z) if swapped else (z, target)
        value = nn.MSELoss(**options)(*pair) if as_module else F.mse_loss(*pair, weight=weight, **options)
        return finish(value, reduction)

    assert_is_the_hessian(loss, data(*shape), vector_is_a_batch=True)


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none, then weighted"])
@pytest.mark.parametrize(
    ("prediction", "target"), [((3, 1), (3, 4)), ((3, 2), (1, 2)), ((3, 2), (2,)), ((3, 2), ()), ((3, 2), (4, 3, 2))]
)
def test_mse_loss_that_broadcasts_adds_up_the_terms_on_one_prediction(
    prediction: tuple[int, ...], target: tuple[int, ...], reduction: str
) -> None:
    y = data(*target, seed=5)
    assert_is_the_hessian(
        lambda z: finish(F.mse_loss(z, y, reduction=torch_name(reduction)), reduction), data(*prediction)
    )


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_mse_loss_that_broadcasts_from_the_given_weights() -> None:
    y, weight = data(4, 3, 2, seed=5), data(3, 2, seed=8).abs()
    assert_is_the_hessian(lambda z: F.mse_loss(z, y, weight=weight), data(3, 2))


def test_mse_loss_between_two_predictions_uses_both() -> None:
    assert_is_the_hessian(lambda z: F.mse_loss(z[:, :2], z[:, 2:]), data(3, 4))


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning")
@pytest.mark.parametrize(
    ("size_average", "reduce"), [(True, None), (False, None), (None, True), (False, True), (None, False)]
)
def test_the_two_deprecated_reduction_arguments(size_average: bool | None, reduce: bool | None) -> None:
    target, soft = classes(4, count=3), data(4, 3, seed=5).sigmoid()
    options = {"size_average": size_average, "reduce": reduce}
    for loss in (
        lambda z: F.cross_entropy(z, target, **options),
        lambda z: F.nll_loss(z.log_softmax(1), target, **options),
        lambda z: F.binary_cross_entropy_with_logits(z, soft, **options),
        lambda z: F.mse_loss(z, soft, **options),
        lambda z: nn.CrossEntropyLoss(**options)(z, target),
    ):
        assert_is_the_hessian(lambda z, loss=loss: loss(z).sum(), data(4, 3))


TARGET = classes(4, count=3)
LABELS = classes(4, 3, count=2).double()
Y = data(4, 3, seed=5)


def in_place_sum(z: Tensor) -> Tensor:
    value = F.cross_entropy(z[:, :3], TARGET)
    value /= 4
    value += 0.4 * F.mse_loss(z[:, 3:], Y)
    return value


COMPOSITIONS: dict[str, tuple[Loss, int]] = {
    "divided, as accumulation does": (lambda z: F.cross_entropy(z, TARGET) / 4, 3),
    "deep supervision": (lambda z: F.cross_entropy(z[:, :3], TARGET) + 0.4 * F.cross_entropy(z[:, 3:], TARGET), 6),
    "the same logits in two terms": (lambda z: F.cross_entropy(z, TARGET) + 0.1 * F.mse_loss(z, Y), 3),
    "terms of three kinds": (
        lambda z: (
            F.cross_entropy(z[:, :3], TARGET)
            + 2 * F.binary_cross_entropy_with_logits(z[:, 3:6], LABELS)
            + 0.5 * F.mse_loss(z[:, 6:], Y)
        ),
        9,
    ),
    "changed in place": (in_place_sum, 6),
    "arguments by keyword": (lambda z: F.cross_entropy(target=TARGET, input=z, reduction="sum"), 3),
    "focal loss, whose factor depends on the logits but is held fixed": (
        lambda z: (F.cross_entropy(z, TARGET, reduction="none") * (1 - z.softmax(1)[:, 0]).detach() ** 2).mean(),
        3,
    ),
    "one loss per example": (
        lambda z: torch.stack([F.cross_entropy(row, t) for row, t in zip(z, TARGET, strict=True)]).mean(),
        3,
    ),
    "weights of the user's own on unreduced terms": (
        lambda z: (F.cross_entropy(z, TARGET, reduction="none") * torch.linspace(0, 1, 4).double()).mean(),
        3,
    ),
    "a metric beside it": (lambda z: F.cross_entropy(z, TARGET) + 0 * F.mse_loss(z, Y).detach(), 3),
    "a metric under no_grad": (lambda z: F.cross_entropy(z, TARGET) + no_grad(F.mse_loss, z), 3),
    "a metric with a gradient that nobody takes": (lambda z: (F.mse_loss(z, Y), F.cross_entropy(z, TARGET))[1], 3),
    "the same loss again, as a metric": (lambda z: (F.cross_entropy(z, TARGET), F.cross_entropy(z, TARGET))[0], 3),
    "classes selected from logits": (lambda z: F.cross_entropy(z[:, [0, 2, 4]], TARGET), 5),
    "transposed sequence logits": (
        lambda z: F.cross_entropy(z.reshape(4, 2, 3).transpose(1, 2), classes(4, 2, count=3)),
        6,
    ),
}


def no_grad(function: Callable[..., Tensor], z: Tensor) -> Tensor:
    with torch.no_grad():
        return function(z, Y)


@pytest.mark.parametrize("case", COMPOSITIONS)
def test_loss_terms_count_with_the_factor_that_the_loss_gives_them(case: str) -> None:
    loss, width = COMPOSITIONS[case]
    assert_is_the_hessian(loss, data(4, width))


def test_logits_changed_in_place_after_the_loss_still_give_the_fisher_of_the_loss() -> None:
    # Of the loss as it was computed, at the edge where the logits were then.
    z = data(4, 3)
    expected = oracles.logits_hessian(lambda z: F.cross_entropy(z, TARGET), z)

    def loss(leaf: Tensor) -> Tensor:
        logits = leaf.clone()
        value = F.cross_entropy(logits, TARGET)
        logits.mul_(5).softmax(1)  # for a metric; cross_entropy keeps log-probabilities, so that this is allowed
        return value

    oracles.assert_equal(fisher_at_logits(loss, z), expected, what="Fisher at the logits")


def test_a_subtracted_term_curves_as_much_as_an_added_one() -> None:
    z = data(4, 6)
    added = oracles.logits_hessian(lambda z: F.mse_loss(z[:, :3], Y) + F.mse_loss(z[:, 3:], Y), z)
    found = fisher_at_logits(lambda z: F.mse_loss(z[:, :3], Y) - F.mse_loss(z[:, 3:], Y), z)
    oracles.assert_equal(found, added, what="Fisher at the logits")


def test_logits_of_a_loss_under_autocast_give_the_fisher_at_their_rounded_values() -> None:
    model = nn.Linear(5, 3, bias=True)
    x = data(4, 5).float()
    recorder = LossRecorder()
    with recorder, torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        loss = F.cross_entropy(logits, TARGET)
    assert logits.dtype == torch.bfloat16
    (term,) = weighted_terms(loss, recorder.terms)
    expected = oracles.logits_hessian(lambda z: F.cross_entropy(z, TARGET), logits.double())
    total = torch.zeros(12, 12).double()
    for seeds in seed_passes([term], "exact", torch.Generator().manual_seed(0)):
        v = seeds[0][1].reshape(-1).double()
        total += torch.outer(v, v)
    oracles.assert_equal(total * same_example(logits.double()), expected, rtol=1e-5, what="Fisher at the logits")


def test_statistics_under_autocast_agree_with_float64_as_far_as_bfloat16_carries() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    x = data(64, 5)
    target = classes(64, count=3)

    def half() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.cross_entropy(model(x.float()), target)

    kfc = observe(model, half)
    found = {name: (layer.A.double(), layer.G.double()) for name, layer in kfc.layers.items()}
    assert kfc.layers["0"].G.dtype == torch.float32
    model.double()
    exact = observe(model, lambda: F.cross_entropy(model(x), target)).layers
    for name, (A, G) in found.items():
        # bfloat16 has 8 bits: 0.4% a rounding, a few of which add up here.
        oracles.assert_equal(A, exact[name].A, rtol=2e-2, what=f"A of {name}")
        oracles.assert_equal(G, exact[name].G, rtol=3e-2, what=f"G of {name}")


# What is not recognised, filters, and logits named by the user.


def head(outputs: int = 3) -> nn.Sequential:
    return double(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


UNKNOWN: dict[str, Loss] = {
    "multi-margin": lambda z: F.multi_margin_loss(z, TARGET),
    "by hand": lambda z: (z - Y).square().mean(),
    "by hand, with log_softmax": lambda z: -z.log_softmax(1).gather(1, TARGET[:, None]).mean(),
}


def sources(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines that name the sources of curvature."""
    return [record.getMessage() for record in caplog.records if "curvature from" in record.getMessage()]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "lightning_kfc")
    return caplog


@pytest.mark.parametrize("fisher", ["mc", "exact"])
@pytest.mark.parametrize("case", UNKNOWN)
def test_a_loss_that_is_not_recognised_has_the_empirical_fisher_and_one_line_reports_it(
    case: str, fisher: str, log: pytest.LogCaptureFixture
) -> None:
    model, x = head(), data(4, 4)
    kfc = engine(model, fisher=fisher)
    for _ in range(2):
        with kfc.capture():
            loss = UNKNOWN[case](model(x))
        kfc.update(loss)
        kfc.precondition(lr=0.1)
    (line,) = sources(log)
    assert "the gradient of the loss itself (its empirical Fisher)" in line
    assert "(seen: none)" in line
    assert "output_of=" in line
    assert kfc.events.unrecognised_losses == 2
    chosen = observe(model, lambda: UNKNOWN[case](model(x)), fisher="empirical")
    assert chosen.events.unrecognised_losses == 0
    for name, layer in kfc.layers.items():
        oracles.assert_equal(layer.G, chosen.layers[name].G, what=f"G of {name}")


@pytest.mark.parametrize(
    ("rest", "said"), [(1.0, "50 % of the gradient"), (1e-6, "100 % of the gradient"), (1e-6, "(less than 0.1 %;")]
)
def test_shares_of_the_gradient_are_percents_without_exponents(rest: float, said: str) -> None:
    assert said in curvature_line({"cross_entropy": 1.0, THE_REST: rest}, [])


def test_a_recognised_function_that_is_no_part_of_the_loss_is_named(log: pytest.LogCaptureFixture) -> None:
    model = head()
    kfc = engine(model)
    with kfc.capture():
        z = model(data(4, 4))
        F.cross_entropy(z, TARGET)
        loss = F.multi_margin_loss(z, TARGET)
    kfc.update(loss)
    (line,) = sources(log)
    assert "(seen: cross_entropy)" in line


def penalty(model: nn.Module) -> Tensor:
    return 100 * sum((p.square().sum() for p in model.parameters()), torch.zeros(()))


PENALTIES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a sum": lambda model, loss: loss + penalty(model),
    "norms in a stack": lambda model, loss: loss + 3 * torch.stack([p.norm() for p in model.parameters()]).mean(),
    "divided, as accumulation does": lambda model, loss: (loss + penalty(model)) / 4,
    "halves": lambda model, loss: 0.25 * loss - -penalty(model) * 2,
}


@pytest.mark.parametrize("case", PENALTIES)
@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("recognised", [False, True])
def test_a_penalty_on_the_weights_by_hand_has_no_curvature(case: str, unused: bool, recognised: bool) -> None:
    model, x = head(), data(4, 4)
    if unused:
        model.append(double(nn.Linear(3, 2)))
    function = F.cross_entropy if recognised else F.multi_margin_loss
    share = {"divided, as accumulation does": 0.25, "halves": 0.25}.get(case, 1.0)

    def loss() -> Tensor:
        z = model[:3](x)
        if unused:
            model[3](z)
        return share * function(z, TARGET)

    kfc = observe(model, lambda: PENALTIES[case](model, loss() / share))
    plain = observe(model, loss)
    assert {row.treatment for row in kfc.coverage()} == {"kfc"}
    # An empirical Fisher is in the unit of the whole loss.
    unit = 1.0 if recognised else float((loss() / PENALTIES[case](model, loss() / share)).detach())
    for name in ("0", "2"):
        oracles.assert_equal(kfc.layers[name].G, abs(unit) * plain.layers[name].G, what=f"G of {name}")
        assert float(plain.layers[name].G.abs().max()) > 0
    if unused:
        assert not kfc.layers["3.0"].averages


@pytest.mark.parametrize("name", ["categorical", "gaussian", "bernoulli"])
@pytest.mark.parametrize("as_object", [False, True])
def test_a_likelihood_keeps_only_terms_of_its_kind(name: str, as_object: bool) -> None:
    model = head(9)
    x = data(4, 4)
    losses: dict[str, Loss] = {
        "categorical": lambda z: F.cross_entropy(z[:, :3], TARGET),
        "bernoulli": lambda z: 2 * F.binary_cross_entropy_with_logits(z[:, 3:6], LABELS),
        "gaussian": lambda z: F.mse_loss(z[:, 6:], Y),
    }
    chosen = (
        {"categorical": Categorical(), "bernoulli": Bernoulli(), "gaussian": Gaussian()}[name] if as_object else name
    )
    kfc = observe(model, lambda: sum(loss(model(x)) for loss in losses.values()), likelihood=chosen)
    expected = oracles.logits_hessian(losses[name], model(x)).reshape(4, 9, 4, 9)
    oracles.assert_equal(kfc.layers["2"].G, torch.einsum("ninj->ij", expected), what="G of the last layer")


def test_a_likelihood_that_no_term_has_is_an_error_naming_it_and_what_was_seen() -> None:
    model = head()
    kfc = engine(model, likelihood="bernoulli")
    with kfc.capture():
        loss = F.cross_entropy(model(data(4, 4)), TARGET)
    with pytest.raises(LossNotRecognisedError, match=r"likelihood='bernoulli'.*cross_entropy"):
        kfc.update(loss)


def test_a_likelihood_that_no_term_has_later_is_counted_and_reported_once() -> None:
    model, x = head(), data(4, 4)
    kfc = observe(model, lambda: F.binary_cross_entropy_with_logits(model(x), LABELS), likelihood="bernoulli")
    kfc.precondition(lr=0.1)
    before = {name: layer.G.clone() for name, layer in kfc.layers.items()}
    for step in range(2):
        with kfc.capture():
            loss = F.cross_entropy(model(x), TARGET)
        if step == 0:
            with pytest.warns(UserWarning, match=r"no statistics are taken.*likelihood='bernoulli'.*cross_entropy"):
                kfc.update(loss)
        else:
            kfc.update(loss)
        kfc.precondition(lr=0.1)
    assert kfc.events.unrecognised_losses == 2
    assert all(torch.equal(layer.G, before[name]) for name, layer in kfc.layers.items())


NAMED: dict[str, tuple[Categorical | Bernoulli | Gaussian, Loss, Loss]] = {
    "categorical, mean": (
        Categorical(output_of="2"),
        lambda z: -z.log_softmax(1).gather(1, TARGET[:, None]).mean(),
        lambda z: F.cross_entropy(z, TARGET),
    ),
    "categorical, sum": (
        Categorical(output_of="2", reduction="sum"),
        lambda z: -z.log_softmax(1).gather(1, TARGET[:, None]).sum(),
        lambda z: F.cross_entropy(z, TARGET, reduction="sum"),
    ),
    "bernoulli": (
        Bernoulli(output_of="2"),
        lambda z: F.binary_cross_entropy(z.sigmoid(), LABELS),
        lambda z: F.binary_cross_entropy_with_logits(z, LABELS),
    ),
    "gaussian": (Gaussian(output_of="2"), lambda z: (z - Y).square().mean(), lambda z: F.mse_loss(z, Y)),
}


@pytest.mark.parametrize("case", NAMED)
def test_logits_named_by_the_user_give_the_fisher_of_the_loss_computed_by_hand(case: str) -> None:
    likelihood, by_hand, recognised = NAMED[case]
    model, x = head(), data(4, 4)
    kfc = observe(model, lambda: by_hand(model(x)), likelihood=likelihood)
    expected = oracles.logits_hessian(recognised, model(x)).reshape(4, 3, 4, 3)
    oracles.assert_equal(kfc.layers["2"].G, torch.einsum("ninj->ij", expected), what="G of the last layer")


def test_class_dim_names_the_axis_of_the_classes_in_the_named_output() -> None:
    model, x = head(), data(4, 2, 4)
    target = classes(4, 2, count=3)
    likelihood = Categorical(output_of="2", class_dim=-1)

    def by_hand() -> Tensor:
        return -model(x).log_softmax(-1).gather(-1, target[..., None]).mean()

    kfc = observe(model, by_hand, likelihood=likelihood)
    z = model(x).detach()
    blocks = torch.stack([oracles.categorical_information(row) / 8 for row in z.reshape(8, 3)])
    oracles.assert_equal(kfc.layers["2"].G, blocks.sum(0), what="G of the last layer")


def test_a_named_module_that_the_model_lacks_is_an_error_listing_those_it_has() -> None:
    model = head()
    kfc = engine(model, likelihood=Categorical(output_of="decoder"))
    with pytest.raises(ValueError, match=r"'decoder'.*no such module.*0, 1, 2"), kfc.capture():
        pass


def test_logits_named_but_never_computed_are_an_error() -> None:
    model = double(nn.Linear(4, 3), nn.Linear(3, 3))
    kfc = engine(model, likelihood=Categorical(output_of="1"))
    with kfc.capture():
        loss = F.cross_entropy(model[0](data(4, 4)), TARGET)
    with pytest.raises(LossNotRecognisedError, match="output_of='1'"):
        kfc.update(loss)


def test_a_loss_without_gradient_is_an_error() -> None:
    model = head()
    kfc = engine(model)
    with kfc.capture():
        loss = F.cross_entropy(model(data(4, 4)), TARGET).detach()
    with pytest.raises(ValueError, match="The loss has no gradient"):
        kfc.update(loss)


def test_a_loss_without_gradient_is_counted_once_a_step_has_been_made() -> None:
    model, x = head(), data(4, 4)
    kfc = observe(model, lambda: F.cross_entropy(model(x), TARGET))
    kfc.precondition(lr=0.1)
    before = {name: layer.G.clone() for name, layer in kfc.layers.items()}
    losses = [
        lambda: F.cross_entropy(model(x), TARGET).detach(),
        lambda: 0 * F.cross_entropy(model(x), TARGET),
        lambda: (model(x) * 0).sum(),
    ]
    for count, loss in enumerate(losses):
        with kfc.capture():
            value = loss()
        if count == 0:
            with pytest.warns(UserWarning, match="no statistics are taken of this loss: its gradient is zero"):
                kfc.update(value)
        else:
            kfc.update(value)
        kfc.precondition(lr=0.1)
    assert kfc.events.losses_without_gradient == 3
    assert all(torch.equal(layer.G, before[name]) for name, layer in kfc.layers.items())


def test_a_forward_without_gradient_or_outside_the_capture_counts_for_nothing() -> None:
    model, x = head(), data(4, 4)

    def loss() -> Tensor:
        with torch.no_grad():
            F.cross_entropy(model(data(7, 4, seed=11)), classes(7, count=3))
        return F.cross_entropy(model(x), TARGET)

    kfc = engine(model)
    F.cross_entropy(model(data(7, 4, seed=12)), classes(7, count=3))
    with kfc.capture():
        value = loss()
    F.cross_entropy(model(data(7, 4, seed=13)), classes(7, count=3))
    kfc.update(value)
    rows = oracles.linear_rows(x, bias=True)
    oracles.assert_equal(kfc.layers["0"].A, rows.T @ rows / 4, what="A of the first layer")
    expected = oracles.logits_hessian(lambda z: F.cross_entropy(z, TARGET), model(x)).reshape(4, 3, 4, 3)
    oracles.assert_equal(kfc.layers["2"].G, torch.einsum("ninj->ij", expected), what="G of the last layer")


def test_kfc_is_silent_about_a_loss_before_its_capture_is_due() -> None:
    model = head()
    kfc = KFC(model, factor_every_n_steps=5, inverse_every_n_steps=5, warmup_steps=0)
    x = data(4, 4)
    for step in range(5):
        with kfc.capture():
            # Recognised at the due step, unknown at the others, which look at nothing.
            loss = F.mse_loss(model(x), Y) if step == 0 else F.multi_margin_loss(model(x), TARGET)
        kfc.update(loss)
        loss.backward()
        kfc.precondition(lr=0.1)
    assert kfc.events.state_dict() == dict.fromkeys(kfc.events.state_dict(), 0)
