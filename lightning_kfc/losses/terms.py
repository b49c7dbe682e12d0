"""Finds the loss terms of a step by watching the calls of torch's loss functions.

The loss is discovered, not declared: while the loss is computed, a torch function mode sees the calls of
``cross_entropy`` and its like, as functions or modules, with their logits and options. Whether a call is
part of the loss at all, and with which factor, is asked of autograd afterwards: the weight of a term is the
derivative of the loss with respect to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import _reduction as _Reduction
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_kfc.factors.statistics import factor_dtype
from lightning_kfc.losses.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from lightning_kfc.utilities.isolation import unseen_by_dispatch_modes


@dataclass(frozen=True)
class LossTerm:
    """One call of a loss function: many terms of one likelihood, weighted by the call's own options.

    Attributes:
        likelihood: What the terms are negative log-likelihoods of.
        function: The loss function's name, for messages.
        logits: The logits' values, shape ``(examples, *positions, outputs)``.
        edges: Where seeds enter the graph, each with a sign.
        layout: Turns a seed shaped as ``logits`` into the shape of the tensor at the edges.
        value: The loss function's result, or None where there is none.
        value_edge: Where that result is in the graph, or None where the weights are known.
        weigh: Gives the weights of the terms from the derivative of the loss with respect to that result.
    """

    likelihood: Likelihood
    function: str
    logits: Tensor
    edges: tuple[tuple[GradientEdge, float], ...]
    layout: Callable[[Tensor], Tensor]
    value: Tensor | None
    value_edge: GradientEdge | None
    weigh: Callable[[Tensor], Tensor]

    def term_weights(self, derivative: Tensor) -> Tensor:
        """The weights c, shape ``(examples, *positions)`` (categorical) or as ``logits``.

        The absolute value is taken: a term that the loss subtracts curves it as much as one that it adds, and
        a Fisher matrix has no negative part.
        """
        return self.weigh(derivative.detach().to(self.logits)).abs()


def _classes_last(tensor: Tensor) -> Tensor:
    """Logits ``(N, C, *positions)`` or ``(C,)`` as ``(N, *positions, C)``."""
    return tensor.unsqueeze(0) if tensor.ndim == 1 else tensor.movedim(1, -1)


def _classes_second(shape: torch.Size) -> Callable[[Tensor], Tensor]:
    """The inverse of :func:`_classes_last` for logits of a given shape."""
    return lambda seed: seed.reshape(shape) if len(shape) == 1 else seed.movedim(-1, 1)


def _values(tensor: Tensor) -> Tensor:
    # A copy: the model may change its logits in place once the loss has been computed.
    return tensor.detach().to(factor_dtype(tensor.dtype), copy=True)


def _categorical_weights(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> Tensor:
    """The weight of each term of a cross entropy, from its class weights, ignored targets and reduction."""
    classes = logits.shape[-1]
    per_class = logits.new_ones(classes) if weight is None else weight.detach().to(logits.dtype)
    if target.is_floating_point():
        soft = _classes_last(target.detach()).to(logits.dtype)
        soft = soft * (1 - smoothing) + smoothing / classes
        weights = soft @ per_class
        return weights / max(weights.numel(), 1) if reduction == "mean" else weights
    target = target.detach().reshape(logits.shape[:-1])
    kept = target != ignore_index
    own = per_class[target.where(kept, 0)] * kept
    weights = (1 - smoothing) * own + smoothing / classes * per_class.sum() * kept
    if reduction == "mean":
        total = own.sum()
        weights = torch.where(total > 0, weights / total, torch.zeros_like(weights))
    return weights


def _cross_entropy(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> LossTerm | None:
    if not input.requires_grad:
        return None
    reduction = _reduction(size_average, reduce, reduction)
    logits = _values(_classes_last(input))
    weights = _categorical_weights(logits, target, weight, ignore_index, reduction, label_smoothing)

    def weigh(derivative: Tensor) -> Tensor:
        return weights * (derivative.reshape(weights.shape) if reduction == "none" else derivative)

    edges = ((get_gradient_edge(input), 1.0),)
    layout = _classes_second(input.shape)
    # A copy: the loss may be made of it in place.
    result = value.detach().clone()
    return LossTerm(Categorical(), "cross_entropy", logits, edges, layout, result, get_gradient_edge(value), weigh)


def _nll_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> LossTerm | None:
    # Log-probabilities are logits of themselves, and a seed that sums to 0 passes log_softmax unchanged.
    term = _cross_entropy(value, input, target, weight, size_average, ignore_index, reduce, reduction)
    return None if term is None else replace(term, function="nll_loss")


def _elementwise_term(
    likelihood: Likelihood,
    function: str,
    value: Tensor,
    logits: Tensor,
    edges: tuple[tuple[GradientEdge, float], ...],
    weight: Tensor,
    result_shape: torch.Size,
    reduction: str,
) -> LossTerm:
    """A term whose every output stands alone; ``weight`` broadcasts to the unreduced result."""
    shape = logits.shape
    weight = weight.to(logits.dtype).expand(result_shape)
    if reduction == "mean":
        weight = weight / max(result_shape.numel(), 1)

    def weigh(derivative: Tensor) -> Tensor:
        # The result may be broadcast from the input: the terms on one output add up.
        return _with_outputs((weight * derivative).sum_to_size(shape))

    def layout(seed: Tensor) -> Tensor:
        return seed.reshape(shape)

    outputs, found = _with_outputs(logits), value.detach().clone()
    return LossTerm(likelihood, function, outputs, edges, layout, found, get_gradient_edge(value), weigh)


def _with_outputs(tensor: Tensor) -> Tensor:
    """A tensor with an examples axis and an outputs axis: a vector or a number is a column of single outputs."""
    return tensor.reshape(-1, 1) if tensor.ndim < 2 else tensor


def _binary_cross_entropy_with_logits(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> LossTerm | None:
    if not input.requires_grad:
        return None
    logits = _values(input)
    own = torch.ones_like(logits) if weight is None else weight.detach().to(logits.dtype).expand(logits.shape)
    if pos_weight is not None:
        own = own * (1 + (pos_weight.detach().to(logits.dtype) - 1) * target.detach().to(logits.dtype))
    edges = ((get_gradient_edge(input), 1.0),)
    reduction = _reduction(size_average, reduce, reduction)
    name = "binary_cross_entropy_with_logits"
    return _elementwise_term(Bernoulli(), name, value, logits, edges, own, input.shape, reduction)


def _mse_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossTerm | None:
    return _squared_difference("mse_loss", value, input, target, weight, _reduction(size_average, reduce, reduction))


def _squared_difference(
    function: str, value: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> LossTerm | None:
    # The loss is symmetric: a prediction given as the target, or on both sides, is one all the same.
    sides = [(side, sign) for side, sign in ((input, 1.0), (target, -1.0)) if side.requires_grad]
    if not sides:
        return None
    result = (input.detach() - target.detach()).shape
    if len(sides) == 2 and input.shape != target.shape:
        return None
    prediction = sides[0][0]
    logits = _values(prediction)
    own = logits.new_ones(()) if weight is None else weight.detach().to(logits.dtype)
    if weight is not None and reduction == "mean":
        # torch divides a weighted mean by the weights' sum, not by their number.
        own, reduction = own / own.sum(), "sum"
    edges = tuple((get_gradient_edge(side), sign) for side, sign in sides)
    return _elementwise_term(Gaussian(), function, value, logits, edges, own, result, reduction)


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction, with torch's two deprecated arguments honoured."""
    if size_average is None and reduce is None:
        return reduction
    return str(_Reduction.legacy_get_string(size_average, reduce, emit_warning=False))


#: The loss functions that are recognised.
LOSS_FUNCTIONS: dict[Any, Callable[..., LossTerm | None]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll_loss,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy_with_logits,
    F.mse_loss: _mse_loss,
}


class LossRecorder(TorchFunctionMode):
    """While it is entered, the loss functions that are called become :class:`LossTerm` in ``terms``."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[LossTerm] = []
        self.paused = False
        #: What was raised while a call was read. The training step is the user's, and goes on.
        self.failure: Exception | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call through, and record what a loss function was called with."""
        result = func(*args, **(kwargs or {}))
        read = LOSS_FUNCTIONS.get(func)
        if read is not None and not self.paused and isinstance(result, Tensor) and result.requires_grad:
            off = torch.autocast(result.device.type, enabled=False)
            try:
                with torch.no_grad(), off, unseen_by_dispatch_modes():
                    term = read(result, *args, **(kwargs or {}))
            except Exception as error:
                self.failure = self.failure or error
                return result
            if term is not None:
                self.terms.append(term)
        return result


class NamedOutputHook:
    """A forward hook that makes a module's output the logits of a likelihood that the user named.

    A copied or pickled module carries it as one that does nothing.

    Args:
        likelihood: The likelihood.
        losses: Where the term goes; None for nowhere.
    """

    def __init__(self, likelihood: Likelihood, losses: LossRecorder | None) -> None:
        self._likelihood = likelihood
        self._losses = losses

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Record one call of the module."""
        if self._losses is None or self._losses.paused or not torch.is_grad_enabled():
            return
        if isinstance(output, Tensor) and output.requires_grad:
            with unseen_by_dispatch_modes():
                self._losses.terms.append(_named_output_term(self._likelihood, output))

    def __deepcopy__(self, memo: dict[int, Any]) -> NamedOutputHook:
        return NamedOutputHook(self._likelihood, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return NamedOutputHook, (self._likelihood, None)


def _named_output_term(likelihood: Likelihood, output: Tensor) -> LossTerm:
    shape = output.shape
    if isinstance(likelihood, Categorical):
        class_dim = likelihood.class_dim if output.ndim > 1 else 0
        logits = _values(output.movedim(class_dim, -1))
        logits = logits.unsqueeze(0) if logits.ndim == 1 else logits
        weights = torch.ones_like(logits[..., 0])
    else:
        class_dim = -1
        logits = _with_outputs(_values(output))
        weights = torch.ones_like(logits)
    if likelihood.reduction == "mean":
        weights = weights / max(weights.numel(), 1)

    def layout(seed: Tensor) -> Tensor:
        return seed.reshape(shape) if len(shape) < 2 else seed.movedim(-1, class_dim)

    edges = ((get_gradient_edge(output), 1.0),)
    name = f"output of {likelihood.output_of!r}"
    return LossTerm(likelihood, name, logits, edges, layout, None, None, lambda derivative: weights * derivative)
