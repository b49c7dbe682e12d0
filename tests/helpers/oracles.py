"""Slow, dense and independent versions of what the package computes; nothing here imports lightning_kfc.

A layer's parameters are one matrix ``[W b]`` of shape ``(d_out, d_in)``, the weight flattened behind its first axis
and the bias as last column. Dense matrices act on that matrix's row-major vector, in which the Kronecker product
of the equations, A ⊗ G on column-major vectors, is ``kron(G, A)``.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: The largest relative error to what was expected, and what the curvature came from, by test: ``pytest --errors``.
ERRORS: dict[str, float] = defaultdict(float)
SOURCES: dict[str, set[str]] = defaultdict(set)


def running_test() -> str:
    """The id of the test that runs."""
    return os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]


def note_error(error: float) -> None:
    """Keep a relative error for the table of errors."""
    ERRORS[running_test()] = max(ERRORS[running_test()], error)


def joint_matrix(weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``[W b]`` of one layer's tensors, ``(d_out, d_in)``."""
    parts = []
    if weight is not None:
        parts.append(weight.reshape(weight.shape[0], -1))
    if bias is not None:
        parts.append(bias.reshape(-1, 1))
    return torch.cat(parts, 1)


def jacobian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The derivative of all outputs by all inputs, flattened to a matrix ``(outputs, inputs)``."""
    at = at.detach()
    dense = torch.autograd.functional.jacobian(lambda value: function(value).reshape(-1), at)
    return dense.reshape(dense.shape[0], at.numel())


def jacobian_by_column(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The derivative of many outputs, of one axis, by few inputs, ``(outputs, inputs)``: by differentiating twice.

    The derivative of vᵀJ by v is J, and linear in v, so that one pass an input is enough.
    """
    at = at.detach().requires_grad_()
    outputs = function(at)
    v = torch.zeros_like(outputs, requires_grad=True)
    (product,) = torch.autograd.grad(outputs, at, v, create_graph=True)
    columns = [torch.autograd.grad(entry, v, retain_graph=True)[0] for entry in product.reshape(-1)]
    return torch.stack(columns, -1)


def logits_jacobian(model: nn.Module, inputs: Tensor, layer: str) -> Tensor:
    """The derivative of all logits by ``[W b]`` of a layer, ``(logits, d_out * d_in)``."""
    module = model.get_submodule(layer)
    weight, bias = module.weight.detach(), module.bias
    joint = joint_matrix(weight, None if bias is None else bias.detach())
    prefix = f"{layer}." if layer else ""

    def logits(value: Tensor) -> Tensor:
        own = {f"{prefix}weight": (value if bias is None else value[:, :-1]).reshape(weight.shape)}
        if bias is not None:
            own[f"{prefix}bias"] = value[:, -1]
        return torch.func.functional_call(model, own, (inputs,))

    return jacobian(logits, joint)


def logits_hessian(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """The Hessian of a loss by its logits, flattened to a square matrix.

    For a softmax, a sigmoid and a squared difference it does not depend on the targets in any other way than by
    the terms' weights, and equals the weighted Fisher information of those likelihoods.
    """
    return torch.autograd.functional.hessian(loss, logits.detach()).reshape(logits.numel(), logits.numel())


def dense_fisher(model: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor], layer: str) -> Tensor:
    """The layer's block of the Fisher matrix of ``loss(model(inputs))``: JᵀHJ, ``(d_out * d_in,) * 2``."""
    J = logits_jacobian(model, inputs, layer)
    return J.T @ logits_hessian(loss, model(inputs)) @ J


def categorical_information(logits: Tensor) -> Tensor:
    """diag(p) - ppᵀ for logits ``(K,)``."""
    p = torch.exp(logits - torch.logsumexp(logits, 0))
    return torch.diag(p) - torch.outer(p, p)


def bernoulli_information(logits: Tensor) -> Tensor:
    """diag(p(1-p)) for logits ``(K,)``."""
    p = 1 / (1 + torch.exp(-logits))
    return torch.diag(p * (1 - p))


def gaussian_information(logits: Tensor) -> Tensor:
    """2I for outputs ``(K,)``: the squared difference has no one half."""
    return 2 * torch.eye(len(logits), dtype=logits.dtype)


INFORMATION = {
    "categorical": categorical_information,
    "bernoulli": bernoulli_information,
    "gaussian": gaussian_information,
}


def linear_rows(inputs: Tensor, *, bias: bool) -> Tensor:
    """Every input vector of a Linear as a row, ``(R, d_in)``."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if bias else rows


def conv_rows(inputs: Tensor, conv: nn.Conv2d) -> Tensor:
    """Every patch that a Conv2d reads as a row, by torch's own unfold, ``(R, d_in)``."""
    inputs = inputs if inputs.ndim == 4 else inputs.unsqueeze(0)
    spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "same":
        before = [span // 2 for span in spans]
        after = [span - span // 2 for span in spans]
    elif conv.padding == "valid":
        before = after = [0, 0]
    else:
        before = after = list(conv.padding)
    mode = {"zeros": "constant"}.get(conv.padding_mode, conv.padding_mode)
    padded = F.pad(inputs, [before[1], after[1], before[0], after[0]], mode=mode)
    columns = F.unfold(padded, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
    rows = columns.transpose(1, 2).reshape(-1, columns.shape[1])
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1) if conv.bias is not None else rows


def kron(A: Tensor, G: Tensor) -> Tensor:
    """A ⊗ G as a dense matrix on row-major vectors of ``(d_out, d_in)`` matrices."""
    return torch.kron(G, A)


def pi_damped(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """E4, written out for one pair of factors with positive traces."""
    pi = math.sqrt((float(torch.trace(A)) / len(A)) / (float(torch.trace(G)) / len(G)))
    root = math.sqrt(damping)
    return A + pi * root * torch.eye(len(A), dtype=A.dtype), G + root / pi * torch.eye(len(G), dtype=G.dtype)


def dense_solve(A: Tensor, G: Tensor, gradient: Tensor) -> Tensor:
    """(A ⊗ G)⁻¹ applied to a gradient ``(d_out, d_in)``, through the dense matrix."""
    return torch.linalg.solve(kron(A, G), gradient.reshape(-1)).reshape(gradient.shape)


def clip_factor(updates: Sequence[Tensor], gradients: Sequence[Tensor], rates: Sequence[float], kappa: float) -> float:
    """ν of E7."""
    total = sum(rate**2 * float((u * g).sum()) for u, g, rate in zip(updates, gradients, rates, strict=True))
    return min(1.0, math.sqrt(kappa / total)) if total > 0 else 1.0


def running_average(values: Sequence[Tensor], decays: Sequence[float]) -> Tensor:
    """The zero-debiased exponential average, by its recursion from nothing with an explicit correction."""
    total, mass = torch.zeros_like(values[0]), 0.0
    for value, decay in zip(values, decays, strict=True):
        total = decay * total + (1 - decay) * value
        mass = decay * mass + (1 - decay)
    return total / mass


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The least-squares slope of y over x."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    product = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return product / sum((a - mean_x) ** 2 for a in x)


def ratio(found: Tensor, expected: Tensor) -> str:
    """For a failure message: by which factor the found numbers are too large, so that a wrong scale shows."""
    scale = (found * expected).sum() / (expected * expected).sum()
    rest = (found - scale * expected).abs().max()
    return f"found / expected = {float(scale):.6g}, remaining difference {float(rest):.3g}"


def assert_equal(found: Tensor, expected: Tensor, *, rtol: float = 1e-9, what: str = "") -> None:
    """Equal up to rounding, relative to the largest number expected."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape, f"{what}: shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    size = float(expected.abs().max()) if expected.numel() else 0.0
    worst = float((found - expected).abs().max()) if expected.numel() else 0.0
    note_error(worst / size if size else worst)
    assert worst <= rtol * size + 1e-300, f"{what}: {ratio(found, expected)}"
