"""The comparison with recorded trainings finds what has changed."""

from __future__ import annotations

import torch

from benchmarks.same_numbers import difference


def test_one_bit_is_a_difference_and_is_named() -> None:
    before = {"/losses/0": torch.tensor(1.0, dtype=torch.float64), "/step": 3}
    assert difference(before, dict(before)) is None
    moved = {**before, "/losses/0": torch.nextafter(before["/losses/0"], torch.tensor(2.0, dtype=torch.float64))}
    assert str(difference(before, moved)).startswith("/losses/0 differs by up to 2.22e-16")
    assert difference(before, {**before, "/step": 4}) == "/step was 3 and is 4"
    assert str(difference(before, {"/step": 3})).startswith("/losses/0 was tensor(1")
