"""Inverses of layers that have hardly moved are not refreshed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_kfc.factors.inverse import INVERSES
from lightning_kfc.factors.sketch import COLUMNS
from lightning_kfc.origin import Origin
from tests.factors.test_inverse import psd
from tests.test_staggering import Training

OFTEN = {"factor_every_n_steps": 2, "inverse_every_n_steps": 4}


def inverse_of(training: Training, name: str) -> dict[str, Tensor]:
    return {part: value for part, value in training.kfc.layers[name].inverse.state().items() if torch.is_tensor(value)}


def same(one: Training, two: Training) -> bool:
    pairs = zip(one.model.parameters(), two.model.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("options", [{}, {"inverse": "eigh"}, {"inverse": "ekfac"}, {"rule": "adam"}])
def test_a_tolerance_that_nothing_stays_within_changes_nothing(options: dict[str, Any]) -> None:
    plain, tolerant = (Training(**OFTEN, **options, inverse_tolerance=t).run(25) for t in (0.0, 1e-12))
    assert same(plain, tolerant)
    assert plain.inverted == tolerant.inverted
    assert plain.kfc.inverses_skipped == tolerant.kfc.inverses_skipped == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stagger_inverses": False},
        {"inverse": "eigh"},
        {"inverse": "ekfac"},
        {"rule": "adam"},
        {"factor_storage": "bfloat16"},
        {"factor_storage": "cpu"},
        {"max_factor_dim": 8},
    ],
)
def test_a_tolerance_that_all_stay_within_leaves_the_first_inverses_in_use(options: dict[str, Any]) -> None:
    tolerant, plain = (Training(**OFTEN, **options, inverse_tolerance=t).run(1) for t in (1e9, 0.0))
    names = list(tolerant.kfc.layers)
    assert tolerant.inverted[0] == names
    first = {name: inverse_of(tolerant, name) for name in names}
    tolerant.run(24)
    plain.run(24)
    assert tolerant.inverted[1:] == [[]] * 24
    # As many dates were passed over as there would have been inverses, and no more.
    assert tolerant.kfc.inverses_skipped == sum(map(len, plain.inverted[1:])) > len(names)
    for name in names:
        for part, value in inverse_of(tolerant, name).items():
            if part != "values" or options.get("inverse") != "ekfac":
                assert torch.equal(value, first[name][part]), (name, part)
    if options.get("inverse") == "ekfac":
        # The eigenvalues go on being corrected in the basis that stays.
        assert any(not torch.equal(inverse_of(tolerant, n)["values"], first[n]["values"]) for n in names)


def test_what_is_skipped_is_what_has_moved_less_than_the_tolerance() -> None:
    training = Training(factor_every_n_steps=1, inverse_every_n_steps=2, stagger_inverses=False, inverse_tolerance=0.08)
    kfc, origins, seen = training.kfc, {}, {True: 0, False: 0}
    for step in range(40):
        training.run(1)
        for name, layer in kfc.layers.items():
            now = {key: value.clone() for key, value in layer.curvature().items()}
            made, due = name in training.inverted[step], kfc._due.refreshed_at(name)[1] == step
            if due and name in origins:
                # All factors have at most COLUMNS dimensions: the sketch is exact.
                assert all(value.shape[-1] <= COLUMNS for value in now.values())
                changes = [
                    float(torch.linalg.norm(now[key] - old) / torch.linalg.norm(old))
                    for key, old in origins[name].items()
                ]
                assert made == (max(changes) > 0.08), (name, step, changes)
                seen[made] += 1
            if made:
                origins[name] = now
    assert min(seen.values()) > 20
    assert kfc.inverses_skipped == seen[False]


@pytest.mark.parametrize(("inverse", "asked"), [("cholesky", True), ("eigh", False)])
def test_a_change_of_damping_counts_where_it_is_part_of_the_inverse(inverse: str, asked: bool) -> None:
    # Factors stay what they are: the same batch, and weights that do not move.
    training = Training(
        inverse=inverse,
        inverse_tolerance=0.1,
        damping=lambda step: 0.1 if step < 12 else 0.2,
        factor_every_n_steps=1,
        inverse_every_n_steps=2,
        stagger_inverses=False,
    )
    training.optimizer.param_groups[0]["lr"] = 1e-9
    loss = training.loss
    training.loss = lambda step: loss(0)
    training.run(20)
    made = [step for step, names in enumerate(training.inverted) if names]
    assert made == ([0, 12] if asked else [0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_at_rest(bad: float) -> None:
    training = Training(**OFTEN, inverse_tolerance=1e9).run(4)
    layer = training.kfc.layers["2"]
    layer.origin.sketches["G"][0, 0, 0] = bad
    training.run(8)
    made = {name for names in training.inverted[4:] for name in names}
    assert made == {"2"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_damping_that_is_not_finite_is_a_change(bad: float) -> None:
    before, after = (Origin.of({"A": psd(1, 3, 1)}, damping) for damping in (0.1, bad))
    assert not before.change_to(after, of_damping=True) <= 1e300
    assert before.change_to(after, of_damping=False) == 0


def test_after_a_bad_step_all_are_refreshed_whatever_they_moved() -> None:
    training = Training(**OFTEN, inverse_tolerance=1e9).run(9)
    training.kfc._due.hasten(training.kfc.layers, 9)
    training.run(4)
    assert training.inverted[9] == list(training.kfc.layers)
    assert training.inverted[10:] == [[]] * 3


def test_a_layer_that_goes_back_to_its_last_inverse_gets_a_new_one() -> None:
    training = Training(**OFTEN, inverse_tolerance=1e9).run(6)
    layer = training.kfc.layers["3"]
    layer.previous_inverse = layer.inverse
    layer.inverse = type(layer.inverse)(layer.inverse.A_inverse * math.nan, layer.inverse.G_inverse)
    with pytest.warns(UserWarning, match="the last one is kept"):
        training.run(1)
    training.run(6)
    assert ["3"] in training.inverted[7:]


@pytest.mark.parametrize("inverse", list(INVERSES))
@pytest.mark.parametrize("at", [2, 7, 16])
def test_a_resumed_run_skips_the_same_bit_for_bit(inverse: str, at: int) -> None:
    options = {**OFTEN, "inverse": inverse, "inverse_tolerance": 0.15}
    whole, part = Training(**options).run(30), Training(**options).run(at)
    resumed = Training(copy.deepcopy(part.model), **options)
    resumed.inverted = list(part.inverted)
    assert resumed.kfc.load_state_dict(copy.deepcopy(part.kfc.state_dict())) == []
    resumed.run(30 - at)
    assert same(whole, resumed)
    assert resumed.inverted == whole.inverted
    assert 0 < whole.kfc.inverses_skipped == resumed.kfc.inverses_skipped


def test_a_state_without_origins_is_taken_over_and_refreshed_at_the_next_date() -> None:
    part, other = Training(**OFTEN).run(9), Training(**OFTEN, inverse_tolerance=1e9)
    assert other.kfc.load_state_dict(part.kfc.state_dict()) == []
    other.inverted = [[]] * 9
    other.run(10)
    assert sorted(name for names in other.inverted for name in names) == sorted(other.kfc.layers)


def test_the_memory_of_sketches_is_told_before_and_is_what_is_held() -> None:
    plain, tolerant = Training(**OFTEN), Training(**OFTEN, inverse_tolerance=0.1)
    before = sum(row.bytes for row in tolerant.kfc.coverage())
    sketches = sum(
        8 * math.prod(shape[:2]) * min(shape[-1], COLUMNS)
        for layer in tolerant.kfc.layers.values()
        for shape in layer.adapter.factor_shapes().values()
    )
    assert before - sum(row.bytes for row in plain.kfc.coverage()) == sketches
    assert sum(row.bytes for row in tolerant.run(3).kfc.coverage()) == before
    assert sum(layer.origin.nbytes for layer in tolerant.kfc.layers.values()) == sketches
