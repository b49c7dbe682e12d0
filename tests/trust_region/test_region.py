"""The trust region's decisions, and the model that a step is held against."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lightning_kfc import KFC
from lightning_kfc.factors.quadratic_form import quadratic_form
from lightning_kfc.trust_region import region as region_module
from lightning_kfc.trust_region.outcome import Outcome
from lightning_kfc.trust_region.region import TrustRegion
from tests.helpers.oracles import dense_fisher, kron


def region(**changed):
    return TrustRegion(**{"adapts_radius": True, "radius": 0.1, "loss": 1.0, **changed})


def outcome(ratio, expected=-1.0, before=5.0):
    """A step that was to change the loss by ``expected`` and changed it by ``ratio`` times that."""
    return Outcome(before, before + ratio * expected, slope=expected, curvature=0.0, penalty=0.0)


def test_a_ratio_compares_the_change_of_the_loss_with_the_damped_quadratic_model():
    found = Outcome(3.0, 2.0, slope=-4.0, curvature=1.5, penalty=0.5)
    assert found.expected == pytest.approx(-4 + 1.5 + 0.5)
    assert found.ratio == pytest.approx(0.5)


@pytest.mark.parametrize("ratio", [0.2, -3.0, math.nan])
def test_a_poor_step_halves_the_radius_that_it_used_and_refreshes(ratio):
    bound = region(radius=0.4, stepped_at=1002)
    verdict = bound.judge(outcome(ratio), size=0.1)
    assert bound.radius == pytest.approx(0.05)
    assert verdict.refresh
    assert bound.review_planned(step=1003)


def test_a_second_poor_step_that_lowers_the_loss_waits_for_its_date_and_one_that_raises_it_does_not():
    bound = region(stepped_at=1002)
    found = []
    for ratio in (0.2, 0.2, 0.9, 0.2, -3.0, 0.2):
        bound.note_size(1.0)
        verdict = bound.judge(outcome(ratio), size=1.0)
        found.append((verdict.refresh, bound.review_planned(step=1003)))
    hurries, waits = (True, True), (False, False)
    assert found == [hurries, waits, waits, hurries, hurries, waits]
    resumed = region()
    resumed.load_state_dict(bound.state_dict())
    assert not resumed.judge(outcome(0.2), size=1.0).refresh


def test_a_good_step_doubles_the_radius_only_where_it_came_near_to_it():
    used, unused = region(radius=0.4), region(radius=0.4)
    used.judge(outcome(0.9), size=5.0)
    unused.judge(outcome(0.9), size=0.01)
    assert used.radius == pytest.approx(0.8)
    assert unused.radius == pytest.approx(0.08)


def test_a_step_that_was_neither_leaves_the_radius():
    bound = region(radius=0.4)
    verdict = bound.judge(outcome(0.4), size=1.0)
    assert (bound.radius, verdict.undo, verdict.refresh) == (0.4, False, False)


def test_radius_and_damping_begin_at_shares_of_the_loss():
    bound = TrustRegion(adapts_radius=True)
    assert math.isnan(bound.radius)
    assert math.isnan(bound.damping)
    bound.note_loss(50.0, never_negative=True)
    assert bound.radius == pytest.approx(50 * region_module.START_RADIUS)
    assert bound.damping == pytest.approx(50 * region_module.DAMPING)
    bound.note_loss(5.0, never_negative=True)
    assert bound.radius == pytest.approx(50 * region_module.START_RADIUS)
    assert bound.damping == pytest.approx(5 * region_module.DAMPING)


def test_the_damping_against_noise_falls_with_the_root_of_the_loss_from_the_first_one() -> None:
    bound = TrustRegion(adapts_radius=True)
    assert math.isnan(bound.noise_damping)
    for loss in (-50.0, 2.0):
        bound.note_loss(loss, never_negative=True)
        assert bound.noise_damping == pytest.approx(region_module.DAMPING * (50 * abs(loss)) ** 0.5)
    again = TrustRegion(adapts_radius=True)
    again.load_state_dict(bound.state_dict())
    again.note_loss(3.0, never_negative=True)
    assert again.noise_damping == pytest.approx(region_module.DAMPING * 150**0.5)


def test_a_loss_that_crosses_zero_halves_its_magnitude_at_most():
    bound, found = TrustRegion(adapts_radius=True), []
    for loss in (2.0, 1.5, 0.0, math.nan, 0.01, -0.4, -3.0):
        bound.note_loss(loss, never_negative=False)
        found.append(bound.loss)
    assert found == [2.0, 1.5, 1.5, 1.5, 0.75, 0.4, 3.0]


@pytest.mark.parametrize("fixed", [False, True])
def test_without_reviews_the_radius_is_a_share_of_the_loss_and_is_fixed_or_follows_the_next_batch(fixed):
    late, early = TrustRegion(adapts_radius=True), TrustRegion(adapts_radius=True)
    early.note_loss(2.0, never_negative=True)
    assert early.end_reviews(fixed=fixed)
    assert late.end_reviews(fixed=fixed)
    assert not late.end_reviews(fixed=fixed)
    late.note_loss(2.0, never_negative=True)
    assert early.radius == late.radius == pytest.approx(2 * region_module.UNREVIEWED_RADIUS)
    assert not any(late.review_planned(step) for step in range(100))
    late.note_size(1.0)
    late.follow_next_slope(1.0)
    assert (late.radius == early.radius) == fixed


def test_a_resumed_region_goes_on_with_its_means_and_without_reviews():
    bound = region(log_size=0.0)
    for number in range(5):
        bound.note_step_loss(3.0 + number)
        bound.follow_next_slope(0.3)
    bound.judge(outcome(-3.0), size=1.0)
    bound.end_reviews(fixed=False)
    resumed = TrustRegion(adapts_radius=True)
    resumed.load_state_dict(bound.state_dict())
    assert resumed == bound


@pytest.mark.parametrize(
    ("after", "undone"), [(4.0, False), (5.05, False), (5.2, True), (math.nan, True), (math.inf, True)]
)
def test_only_a_loss_that_grew_beyond_a_tenth_of_the_foretold_decrease_is_undone(after, undone):
    found = Outcome(5.0, after, slope=-1.0, curvature=0.2, penalty=0.0)
    assert region().judge(found, size=1.0).undo == undone


@given(st.lists(st.tuples(st.floats(-5, 5) | st.just(math.nan), st.floats(1e-12, 1e12)), max_size=80))
def test_whatever_happens_the_radius_stays_within_its_bounds(steps):
    bound = region(loss=7.0)
    for ratio, size in steps:
        bound.judge(outcome(ratio), size)
        assert 7 * region_module.SMALLEST_RADIUS <= bound.radius <= 7 * region_module.LARGEST_RADIUS


def test_a_loss_that_grew_as_an_uphill_model_foretold_makes_the_step_no_good_one():
    bound = region(radius=0.4)
    uphill = Outcome(5.0, 7.0, slope=-1.0, curvature=3.0, penalty=0.0)
    assert uphill.ratio == 1
    verdict = bound.judge(uphill, size=1.0)
    assert (verdict.undo, verdict.refresh) == (True, True)
    assert bound.radius == pytest.approx(0.2)


def test_fixed_settings_stay_but_steps_are_still_undone():
    bound = region(adapts_radius=False, automatic_radius=False, radius=0.7)
    assert bound.judge(outcome(-3.0), size=1.0).undo
    assert bound.radius == 0.7


def test_steps_are_reviewed_at_first_then_now_and_then_and_after_one_that_surprises():
    bound, due = region(), []
    for step in range(220):
        if bound.review_planned(step):
            due.append(step)
        bound.stepped_at = step
        bound.note_size(1.0 if step != 32 else 50.0)
    assert due == [*range(5), 10, 20, 30, 33, 40, 50, 60, 70, 80, 90, 100, 150, 200]


def test_a_review_for_which_an_optimizer_waits_too_long_is_left_out():
    bound = region(review_next=True, stepped_at=101)
    assert [step for step in range(102, 150) if bound.review_planned(step)] == list(range(102, 112))


def test_a_resumed_region_goes_on_as_the_first_one():
    first, second = region(), region()
    for step, ratio in enumerate([0.1, 0.9, 0.5, -1.0]):
        first.note_size(0.3 + step)
        first.judge(outcome(ratio), 0.3)
    second.load_state_dict(first.state_dict())
    assert second == first
    fixed = region(adapts_radius=False, automatic_radius=False, radius=0.5)
    fixed.load_state_dict(first.state_dict())
    assert (fixed.radius, fixed.loss) == (0.5, first.loss)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_quadratic_form_is_that_of_the_dense_matrix(groups, d_out, d_in, A_diagonal, G_diagonal, seed):
    generator = torch.Generator().manual_seed(seed)

    def factor(d, diagonal):
        root = torch.randn(groups, d, d + 1, generator=generator, dtype=torch.float64)
        dense = root @ root.mT
        return dense.diagonal(dim1=-2, dim2=-1).clone() if diagonal else dense

    A, G = factor(d_in, A_diagonal), factor(d_out, G_diagonal)
    delta = torch.randn(groups, d_out, d_in, generator=generator, dtype=torch.float64)
    expected = 0.0
    for group in range(groups):
        dense_A = torch.diag(A[group]) if A_diagonal else A[group]
        dense_G = torch.diag(G[group]) if G_diagonal else G[group]
        vector = delta[group].reshape(-1)
        expected += float(vector @ kron(dense_A, dense_G) @ vector)
    assert float(quadratic_form({"A": A, "G": G}, delta)) == pytest.approx(expected, rel=1e-10)


@given(st.integers(1, 3), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_the_quadratic_form_of_blocks_and_diagonals(groups, d, diagonal, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(groups, d, d, generator=generator, dtype=torch.float64)
    block = root @ root.mT
    block = torch.diag_embed(block.diagonal(dim1=-2, dim2=-1)) if diagonal else block
    delta = torch.randn(groups, 1, d, generator=generator, dtype=torch.float64)
    expected = sum(float(delta[g, 0] @ block[g] @ delta[g, 0]) for g in range(groups))
    F_factor = block.diagonal(dim1=-2, dim2=-1) if diagonal else block
    assert float(quadratic_form({"F": F_factor}, delta)) == pytest.approx(expected, rel=1e-10)


def step(model, kfc, optimizer, inputs, targets, loss=F.cross_entropy):
    """One step of a plain loop, with its review."""
    optimizer.zero_grad()
    with kfc.capture():
        value = loss(model(inputs), targets)
    kfc.update(value)
    value.backward()
    kfc.precondition(optimizer=optimizer)
    optimizer.step()
    return kfc.review(optimizer=optimizer)


def test_the_model_of_a_step_is_slope_plus_dense_fisher_of_the_true_change(monkeypatch):
    torch.manual_seed(0)
    # One example and one layer: the Kronecker factors with exact targets are the Fisher block itself.
    model = nn.Sequential(nn.Linear(4, 3)).double()
    inputs, targets = torch.randn(1, 4, dtype=torch.float64), torch.tensor([1])
    kfc = KFC(model, fisher="exact", damping="auto", kl_clip="auto", ema_decay=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5, weight_decay=0.1)
    seen = []
    judge = TrustRegion.judge

    def noting(self, found, size):
        seen.append(found)
        return judge(self, found, size)

    monkeypatch.setattr(TrustRegion, "judge", noting)
    for _ in range(3):
        before = copy.deepcopy(model)
        gradient = torch.autograd.grad(F.cross_entropy(before(inputs), targets), list(before.parameters()))
        fisher = dense_fisher(before, inputs, lambda logits: F.cross_entropy(logits, targets), "0")
        step(model, kfc, optimizer, inputs, targets)
        after = list(model.parameters())
        delta = [new.detach() - old.detach() for new, old in zip(after, before.parameters(), strict=True)]
        joint = torch.cat([delta[0], delta[1].unsqueeze(1)], dim=1).reshape(-1)
        found = seen[-1]
        assert found.slope == pytest.approx(sum(float((g * d).sum()) for g, d in zip(gradient, delta, strict=True)))
        assert found.curvature == pytest.approx(0.5 * float(joint @ fisher @ joint), rel=1e-9)
        damping = kfc.damping / kfc.layers["0"].own_damping.mean_square
        assert found.penalty == pytest.approx(0.5 * damping * float(joint @ joint))
        assert found.loss_before == pytest.approx(float(F.cross_entropy(before(inputs), targets).detach()))
        assert found.loss_after == pytest.approx(float(F.cross_entropy(model(inputs), targets).detach()))


@pytest.mark.parametrize("damping", [0.5, lambda step: 0.5 + step])
def test_a_step_with_a_fixed_damping_is_held_against_that_damping(damping):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    inputs, targets = torch.randn(8, 4, dtype=torch.float64), torch.randint(0, 3, (8,))
    kfc = KFC(model, fisher="exact", damping=damping, kl_clip="auto")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for number in range(3):
        before = copy.deepcopy(model)
        loss = F.cross_entropy(before(inputs), targets)
        gradient = torch.autograd.grad(loss, list(before.parameters()))
        verdict = step(model, kfc, optimizer, inputs, targets)
        value = damping if isinstance(damping, float) else damping(number)
        delta = [new.detach() - old.detach() for new, old in zip(model.parameters(), before.parameters(), strict=True)]
        slope = sum(float((g * d).sum()) for g, d in zip(gradient, delta, strict=True))
        joint = torch.cat([delta[0], delta[1].unsqueeze(1)], dim=1)
        bend = float((kfc.layers["0"].G @ joint @ kfc.layers["0"].A * joint).sum())
        assert verdict.predicted_decrease == pytest.approx(-slope - bend / 2 - value / 2 * float(joint.square().sum()))


def begin(make):
    """A model after one step with momentum, and what its next step needs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    inputs, targets = torch.randn(16, 4, dtype=torch.float64), torch.randint(0, 3, (16,))
    kfc = KFC(model, damping=0.003, kl_clip="auto")
    options = {"momentum": 0.9} if make is not torch.optim.Adam else {}
    optimizer = make(model.parameters(), lr=0.01, **options)
    verdict = step(model, kfc, optimizer, inputs, targets)
    assert not verdict.undo
    assert verdict.kept_share == 1
    return model, kfc, optimizer, inputs, targets


MOMENTA = ("momentum_buffer", "exp_avg")


def lengthen(optimizer, rate):
    """Set a rate at which the momentum is far too long; SGD's, which does not grow with the rate, is multiplied."""
    for group in optimizer.param_groups:
        share, group["lr"] = rate / group["lr"], rate
        if isinstance(optimizer, torch.optim.SGD):
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"].mul_(share)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adam])
def test_a_step_into_nowhere_is_taken_back_and_leaves_no_momentum(make):
    model, kfc, optimizer, inputs, targets = begin(make)
    before = [parameter.clone() for parameter in model.parameters()]
    lengthen(optimizer, 1e150)
    verdict = step(model, kfc, optimizer, inputs, targets, lambda y, t: F.cross_entropy(y * y * y, t))
    assert (verdict.undo, verdict.kept_share) == (True, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for state in optimizer.state.values():
        assert not any(state[name].any() for name in MOMENTA if name in state)
    assert (kfc.events.undone_steps, kfc.events.shortened_steps) == (1, 0)


@pytest.mark.parametrize(
    ("make", "rate", "undone"),
    [
        (torch.optim.SGD, 300.0, True),
        (torch.optim.SGD, 0.15, False),
        (torch.optim.RMSprop, 300.0, True),
        (torch.optim.RMSprop, 0.045, False),
        (torch.optim.Adam, 300.0, True),
        (torch.optim.Adam, 0.8, False),
    ],
)
def test_a_step_that_went_too_far_ends_where_a_parabola_has_its_minimum(make, rate, undone, monkeypatch):
    model, kfc, optimizer, inputs, targets = begin(make)
    before = [parameter.clone() for parameter in model.parameters()]
    seen = []

    def step_and_note(step=optimizer.step):
        seen.append([p.detach().clone() for p in model.parameters()])
        step()
        seen.append([p.detach().clone() for p in model.parameters()])
        seen.append([state[name].clone() for state in optimizer.state.values() for name in MOMENTA if name in state])

    monkeypatch.setattr(optimizer, "step", step_and_note)
    loss = F.cross_entropy(model(inputs), targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    lengthen(optimizer, rate)
    verdict = step(model, kfc, optimizer, inputs, targets)
    start, end, momenta = seen
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, value in zip(oracle.parameters(), end, strict=True):
            parameter.copy_(value)
        after = float(F.cross_entropy(oracle(inputs), targets))
    slope = sum(float((g * (b - a)).sum()) for g, a, b in zip(gradients, start, end, strict=True))
    assert slope < 0
    # The minimum of the parabola through h(0), h'(0) and h(1).
    share = -slope / (2 * (after - float(loss.detach()) - slope))
    assert 0 < share < 1
    assert verdict.undo == undone
    assert verdict.kept_share == pytest.approx(share)
    assert share > 0
    expected = [a + share * (b - a) for a, b in zip(before, end, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(expected, model.parameters(), strict=True))
    left = [state[name] for state in optimizer.state.values() for name in MOMENTA if name in state]
    assert all(torch.allclose(share * a, b) for a, b in zip(momenta, left, strict=True))
    assert (kfc.events.undone_steps, kfc.events.shortened_steps) == (int(undone), 1 - int(undone))


@given(st.floats(-5, -0.1), st.floats(0.01, 20))
def test_the_best_share_of_a_step_on_a_parabola_is_its_minimum(slope, bend):
    found = Outcome(1.0, 1.0 + slope + bend, slope, 0.0, 0.0).best_share()
    assert slope + 2 * bend * found == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("after", "slope", "share"), [(math.nan, -1.0, 0.0), (math.inf, -1.0, 0.0), (2.0, 0.5, 0.0), (-0.5, -1.0, math.inf)]
)
def test_where_no_parabola_has_a_minimum_ahead_the_best_share_is_nothing_or_without_end(after, slope, share):
    assert Outcome(1.0, after, slope, 0.0, 0.0).best_share() == share


def test_a_poor_step_that_leads_uphill_is_left_alone_unless_the_loss_grew():
    uphill = Outcome(5.0, 5.01, slope=0.2, curvature=0.1, penalty=0.0)
    verdict = region().judge(uphill, size=1.0)
    assert (verdict.undo, verdict.refresh, verdict.kept_share) == (False, True, 1.0)
    grown = Outcome(5.0, 6.0, slope=0.2, curvature=0.1, penalty=0.0)
    assert region().judge(grown, size=1.0).kept_share == 0


def test_a_review_leaves_random_streams_and_batch_norm_as_they_were_and_repeats_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    inputs, targets = torch.randn(16, 4, dtype=torch.float64), torch.randint(0, 3, (16,))
    kfc = KFC(model, damping="auto", kl_clip="auto")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.zero_grad()
    with kfc.capture():
        loss = F.cross_entropy(model(inputs), targets)
    kfc.update(loss)
    loss.backward()
    stream, buffers = torch.get_rng_state(), {name: buffer.clone() for name, buffer in model.named_buffers()}
    kfc.precondition(lr=0.1)
    assert kfc.reviewer.recording
    # The first review replays the loss, which would not be had again with other masks or statistics.
    assert kfc.review(optimizer=optimizer) is None  # nothing has changed
    assert kfc.reviewer.active
    assert kfc.events.missed_reviews == 0
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_a_loop_without_reviews_is_warned_once_and_its_radius_follows_the_next_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    inputs, targets = torch.randn(16, 4), torch.randint(0, 3, (16,))
    kfc = KFC(model, damping="auto", kl_clip="auto")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def unreviewed():
        optimizer.zero_grad()
        with kfc.capture():
            loss = F.cross_entropy(model(inputs), targets)
        kfc.update(loss)
        loss.backward()
        kfc.precondition(optimizer=optimizer)
        optimizer.step()

    unreviewed()
    with pytest.warns(UserWarning, match=r"kfc\.review\(optimizer=optimizer\) was not called.*the next batch alone"):
        unreviewed()
    radius = kfc.kl_clip
    unreviewed()
    assert not kfc.reviewer.active
    assert kfc.kl_clip != radius


@pytest.mark.usefixtures("ten_steps_reviewed")
def test_micro_batches_are_reviewed_as_the_batch_that_they_make():
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    parts = copy.deepcopy(whole)
    inputs, targets = torch.randn(16, 4, dtype=torch.float64), torch.randint(0, 3, (16,))
    options = {"fisher": "exact", "damping": "auto", "kl_clip": "auto"}
    kfc, kfc_parts = KFC(whole, **options), KFC(parts, **options)
    optimizer, optimizer_parts = (torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.5) for m in (whole, parts))
    for _ in range(6):
        verdict = step(whole, kfc, optimizer, inputs, targets)
        optimizer_parts.zero_grad()
        for number, (x, y) in enumerate(zip(inputs.split(8), targets.split(8), strict=True)):
            with kfc_parts.capture():
                loss = F.cross_entropy(parts(x), y) / 2
            kfc_parts.update(loss, accumulate=number == 0)
            loss.backward()
        kfc_parts.precondition(optimizer=optimizer_parts)
        optimizer_parts.step()
        found = kfc_parts.review(optimizer=optimizer_parts)
        assert found.ratio == pytest.approx(verdict.ratio, rel=1e-6)
        assert (found.undo, found.refresh) == (verdict.undo, verdict.refresh)
    assert kfc_parts.kl_clip == pytest.approx(kfc.kl_clip)
