"""The two laws that every adapter is held to, from autograd alone: its rows' gradient, and its dense Fisher block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_kfc.estimation.recording import output_edge
from lightning_kfc.layers import Adapter, Forward
from tests.helpers import oracles


def curved(output: Tensor) -> Tensor:
    """A scalar whose derivative differs at every entry of the output."""
    return ((output * torch.linspace(0.3, 1.7, output.numel(), dtype=output.dtype).reshape(output.shape)).sin()).sum()


def rebuilt_gradient(adapter: Adapter, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Σ g_r ā_rᵀ over all calls of the module, written into tensors shaped as its parameters."""
    calls = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        with torch.no_grad():
            rows = adapter.input_rows(Forward(args, kwargs, output)).clone()
        calls.append((rows, output_edge(output), output.shape))

    handle = adapter.module.register_forward_hook(hook, with_kwargs=True)
    value = loss()
    handle.remove()
    assert calls, "nothing was recorded"
    derivatives = torch.autograd.grad(value, [edge for _, edge, _ in calls])
    matrix = sum(
        torch.einsum("ntgo,ntgi->goi", adapter.output_rows(derivative.reshape(shape)), rows)
        for (rows, _, shape), derivative in zip(calls, derivatives, strict=True)
    )
    result = {role: torch.empty_like(p.detach()) for role, p in adapter.own_parameters().items()}
    adapter.write(matrix, result)
    return result


def assert_rows_rebuild_the_gradient(adapter: Adapter, loss: Callable[[], Tensor], what: str) -> None:
    """The geometry law (KFC.md sec. 5), and that matrix() and write() are inverse to each other."""
    own = adapter.own_parameters()
    expected = dict(zip(own, torch.autograd.grad(loss(), list(own.values())), strict=True))
    for role, found in rebuilt_gradient(adapter, loss).items():
        oracles.assert_equal(found, expected[role], what=f"{role} of {what}")
    again = {role: torch.empty_like(gradient) for role, gradient in expected.items()}
    adapter.write(adapter.matrix(expected), again)
    assert all(torch.equal(again[role], expected[role]) for role in expected), f"matrix() and write() of {what}"


def logits_jacobians(model: nn.Module, x: Tensor, layer: str) -> dict[str, Tensor]:
    """The derivative of all logits by each parameter of a layer, ``(logits, *parameter)``."""
    module = model.get_submodule(layer)
    result = {}
    for role, parameter in module.named_parameters():

        def logits(value: Tensor, role: str = role) -> Tensor:
            return torch.func.functional_call(model, {f"{layer}.{role}": value}, (x,))

        result[role] = oracles.jacobian(logits, parameter).reshape(-1, *parameter.shape)
    return result
