"""Which law a loss's weights follow when it is evaluated on a part of a batch, and when none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_kfc.part_law import NotDivisibleError, TermOutline, law_of

BATCH, PART, CLASSES = 64, 16, 10


def outline(
    weight: float, examples: int = BATCH, function: str = "cross_entropy", logits: int = CLASSES
) -> TermOutline:
    return TermOutline(function, examples * logits, weight)


@given(st.floats(1e-3, 1e3), st.floats(0.55, 1.8))
def test_a_total_near_the_whole_s_is_a_mean_s_and_one_near_its_share_a_sum_s(weight: float, masked: float) -> None:
    whole, share = [outline(weight)], PART / BATCH
    assert law_of(whole, [outline(weight * masked, PART)], PART, BATCH) == "mean"
    assert law_of(whole, [outline(weight * share * masked, PART)], PART, BATCH) == "sum"


@given(st.floats(1.01, 1.9), st.booleans())
def test_a_part_of_more_than_a_quarter_is_told_by_the_nearer_law(nearness: float, of_mean: bool) -> None:
    # Shares of a half to all but one: nothing further than the middle between both laws is taken for either.
    part = BATCH // 2
    middle = (part / BATCH) ** 0.5
    ratio = middle * nearness**0.3 if of_mean else middle / nearness**0.3
    assert law_of([outline(1.0)], [outline(ratio, part)], part, BATCH) == ("mean" if of_mean else "sum")


def test_without_any_weight_nothing_can_be_said() -> None:
    for nothing in (0.0, float("nan"), float("inf")):
        assert law_of([outline(nothing)], [outline(1.0, PART)], PART, BATCH) is None
        assert law_of([outline(1.0)], [outline(nothing, PART)], PART, BATCH) is None
    # A term whose targets are all ignored leaves the law to the others.
    both = law_of([outline(0.0), outline(2.0)], [outline(0.0, PART), outline(0.5, PART)], PART, BATCH)
    assert both == "sum"


@pytest.mark.parametrize(
    ("whole", "part", "message"),
    [
        ([], [], "no term of the loss is recognised"),
        ([outline(1.0)], [], "other loss terms"),
        ([outline(1.0)], [outline(1.0, PART, "mse_loss")], r"\(mse_loss\) than the whole \(cross_entropy\)"),
        ([outline(1.0)], [outline(0.5, PART)] * 2, "other loss terms"),
        # Every example against every other one.
        ([outline(1.0, logits=BATCH)], [outline(1.0, PART, logits=PART)], "4096 logits on 64 examples but 256 on 16"),
        # A sum over pairs of examples, by rows of proportional size.
        ([outline(64.0**2)], [outline(16.0**2, PART)], "0.0625 times as much on a part of 0.25"),
        ([outline(1.0)], [outline(2.1, PART)], "neither"),
        ([outline(1.0), outline(64.0)], [outline(1.0, PART), outline(16.0, PART)], "some loss terms are means"),
    ],
)
def test_what_follows_no_law_is_refused_with_the_reason(
    whole: list[TermOutline], part: list[TermOutline], message: str
) -> None:
    with pytest.raises(NotDivisibleError, match=message):
        law_of(whole, part, PART, BATCH)
