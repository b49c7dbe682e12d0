"""Parts of batches: the same examples from every tensor in any nest of containers, or a reason why not."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_kfc.batches import Examples
from lightning_kfc.part_law import NotDivisibleError


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Record:
    image: Any
    label: Any
    name: str = "train"


CONTAINERS = (
    lambda values: list(values),
    lambda values: tuple(values),
    lambda values: Pair(values, "of both"),
    lambda values: Record(values[0], values[1:]),
    lambda values: {str(i): value for i, value in enumerate(values)},
    lambda values: OrderedDict((i, value) for i, value in enumerate(values)),
    lambda values: UserDict({str(i): value for i, value in enumerate(values)}),
)


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (dict, UserDict)):
        return [t for child in value.values() for t in tensors_of(child)]
    if isinstance(value, Record):
        return tensors_of([value.image, value.label])
    return [t for child in value for t in tensors_of(child)] if isinstance(value, (list, tuple)) else []


@st.composite
def batches(draw: st.DrawFn, count: int) -> Any:
    """Containers in containers; each tensor's rows are the examples' numbers."""

    def tensor(axes: int) -> Tensor:
        return torch.arange(count).reshape(count, *[1] * axes).expand(count, *[2] * axes)

    leaves = st.integers(0, 3).map(tensor) | st.sampled_from([None, 3, 0.5, "words", True])
    nests = st.recursive(
        leaves,
        lambda inner: st.tuples(st.sampled_from(CONTAINERS), st.lists(inner, min_size=1, max_size=4)).map(
            lambda pair: pair[0](pair[1])
        ),
        max_leaves=6,
    )
    return [draw(nests), tensor(1)]


@given(batches(count=11), st.lists(st.integers(0, 10), min_size=1, max_size=6))
def test_a_part_has_the_same_examples_in_every_tensor_and_the_batch_s_containers(
    batch: Any, indices: list[int]
) -> None:
    part = Examples(batch).part(torch.tensor(indices))
    found, whole = tensors_of(part), tensors_of(batch)
    assert [t.shape[1:] for t in found] == [t.shape[1:] for t in whole]
    for tensor in found:
        assert tensor.reshape(len(indices), -1)[:, 0].tolist() == indices
    assert repr(_kinds(part)) == repr(_kinds(batch))


def _kinds(value: Any) -> Any:
    """What a batch is made of, tensors aside."""
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, (dict, UserDict)):
        return type(value), [(key, _kinds(child)) for key, child in value.items()]
    if isinstance(value, Record):
        return Record, _kinds(value.image), _kinds(value.label), value.name
    return (type(value), [_kinds(child) for child in value]) if isinstance(value, (list, tuple)) else value


X, Y = torch.zeros(6, 3), torch.zeros(6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((), "holds no tensors"),
        ((3, None), "holds no tensors"),
        ((X, torch.zeros(5)), "different sizes along their first axis: 5, 6"),
        ((X, torch.tensor(1.0)), "a tensor without axes"),
        ((X, X.to_sparse()), "a sparse or a nested tensor"),
        ((X, ["a", "b", "c", "d", "e", "f"]), "holds a list with as many entries as it has examples, 6"),
        ((X, {"names": tuple("abcdef")}), "holds a tuple with as many entries"),
        ((X, "abcdef"), "holds a str with as many entries"),
        ((X, [Y] * 6), "holds a list with as many entries"),
        ((X, object()), "holds a object, of which it is not known"),
        ((X, {1, 2}), "holds a set, of which"),
        ((X, X.numpy()), "holds a ndarray, of which"),
        ([{"boxes": torch.zeros(2, 4)}, {"boxes": torch.zeros(3, 4)}], "different sizes"),
    ],
)
def test_what_may_hold_something_for_each_example_is_left_whole_with_the_reason(batch: Any, message: str) -> None:
    with pytest.raises(NotDivisibleError, match=message):
        Examples(batch)


def test_the_batch_itself_may_have_as_many_entries_as_examples() -> None:
    assert Examples([torch.zeros(2, 3), torch.zeros(2)]).count == 2


def test_entries_that_a_training_step_takes_out_are_in_its_parts_all_the_same() -> None:
    batch = {"x": X.clone(), "labels": Y.clone()}
    examples = Examples(batch)
    batch.pop("labels")
    assert sorted(examples.part(torch.tensor([0, 2]))) == ["labels", "x"]


def test_a_batch_that_was_changed_in_place_has_no_parts() -> None:
    batch = (X.clone(), Y.clone())
    examples = Examples(batch)
    part = examples.part(torch.tensor([1]))
    part[0].add_(1)  # of its own
    assert examples.part(torch.tensor([1]))[0].sum() == 0
    batch[0].div_(255)
    with pytest.raises(NotDivisibleError, match="changes tensors of its batch in place"):
        examples.part(torch.tensor([1]))


def test_tensors_made_in_inference_mode_can_be_divided() -> None:
    with torch.inference_mode():
        x = torch.ones(4, 2)
    assert Examples((x,)).part(torch.tensor([0, 3]))[0].shape == (2, 2)
