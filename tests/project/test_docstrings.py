"""The examples in public docstrings run."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lightning_kfc
from lightning_kfc import KFC
from lightning_kfc.layers import Adapter, register_adapter


def examples(name: str) -> list[str]:
    """The literal blocks of a public name's docstring."""
    documentation = inspect.getdoc(getattr(lightning_kfc, name)) or ""
    return [textwrap.dedent(block) for block in re.findall(r"::\n\n((?: {4}.*\n|\n)+)", documentation)]


def test_two_public_docstrings_have_examples() -> None:
    assert [name for name in lightning_kfc.__all__ if examples(name)] == ["KFC", "register_adapter"]


def test_the_loop_in_the_engine_s_docstring_preconditions_and_reviews_a_step() -> None:
    model = nn.Linear(3, 2)
    loop, review = examples("KFC")
    namespace: dict[str, Any] = {
        "KFC": lambda model: KFC(model, kl_clip="auto"),
        "model": model,
        "x": torch.randn(8, 3),
        "y": torch.randint(2, (8,)),
        "loss_fn": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    plain = torch.autograd.grad(namespace["loss_fn"](model(namespace["x"]), namespace["y"]), model.weight)[0]
    exec(loop, namespace)
    assert not torch.allclose(plain, model.weight.grad)
    for _ in range(5):
        exec(review, namespace)
        exec(loop.partition("\n")[2], namespace)
    assert namespace["kfc"].reviewer.last is not None


def test_the_adapter_in_the_docstring_of_register_adapter_rebuilds_the_gradient() -> None:
    namespace: dict[str, Any] = {"nn": nn, "F": F, "Adapter": Adapter, "register_adapter": register_adapter}
    (code,) = examples("register_adapter")
    exec(code, namespace)
    model = namespace["EqualizedLinear"](3, 2)
    kfc = KFC(model)
    assert [row.treatment for row in kfc.coverage()] == ["kfc", "kfc"]
    with kfc.capture():
        loss = F.cross_entropy(model(torch.randn(8, 3)), torch.randint(2, (8,)))
    kfc.update(loss)  # raises a SelfTestError where the rows do not rebuild the gradient
