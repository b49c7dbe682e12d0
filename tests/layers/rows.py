"""Rows, gradients and dense Fisher blocks of any layer, taken in the same way for every kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kfc import KFC
from lightning_kfc.estimation.recording import output_edge
from lightning_kfc.layers import Forward
from tests.helpers import oracles

#: Picks one layer's matrix ``(d_out, d_in)`` out of tensors shaped as the model's parameters, by name.
Matrix = Callable[[Mapping[str, Tensor]], Tensor]


def rebuilt_gradient(kfc: KFC, name: str, loss: Callable[[], Tensor]) -> Tensor:
    """Σ g_r ā_rᵀ over all products of a layer, read at the time of each."""
    seen: list[tuple[Any, Tensor, Any, torch.Size]] = []

    def hook_of(adapter: Any) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            with torch.no_grad():
                rows = adapter.input_rows(Forward(args, kwargs, output)).clone()
            seen.append((adapter, rows, output_edge(output), output.shape))

        return hook

    handles = [adapter.attach(hook_of(adapter)) for adapter in kfc.layers[name].adapters]
    value = loss()
    for handle in handles:
        handle.remove()
    assert seen, "nothing was recorded"
    found = torch.autograd.grad(value, [edge for _, _, edge, _ in seen])
    products = [
        torch.einsum("ntgo,ntgi->goi", adapter.output_rows(derivative.reshape(shape)), rows)
        for (adapter, rows, _, shape), derivative in zip(seen, found, strict=True)
    ]
    return torch.stack(products).sum(0)[0]


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Autograd's own, by parameter name; zeros where a parameter is not used."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(p) if g is None else g.to_dense() for (name, p), g in pairs}


def dense_fisher(
    model: nn.Module, forward: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], matrix: Matrix
) -> Tensor:
    """JᵀHJ of ``loss(forward())`` for the elements of one layer's matrix, row by row of the Jacobian."""
    logits = forward()
    rows = [
        matrix(gradients(model, lambda index=index: forward().reshape(-1)[index])).reshape(-1)
        for index in range(logits.numel())
    ]
    J = torch.stack(rows)
    return J.T @ oracles.logits_hessian(loss, logits) @ J


def curved(output: Tensor) -> Tensor:
    """A scalar whose derivative differs at every entry of the output."""
    return (output * torch.linspace(0.3, 1.7, output.numel(), dtype=output.dtype).reshape(output.shape)).sin().sum()
