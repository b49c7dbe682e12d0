"""Finds the loss terms of a step by watching the calls of torch's loss functions.

The loss is discovered, not declared: while the loss is computed, a torch function mode sees the calls of
``cross_entropy`` and its like, as functions or modules, with their logits and options. Whether a call is
part of the loss at all, and with which factor, is asked of autograd afterwards: the weight of a term is the
derivative of the loss with respect to it.
"""

from __future__ import annotations

import inspect
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
from lightning_kfc.losses.likelihoods import (
    Bernoulli,
    BernoulliProbability,
    Categorical,
    Gaussian,
    Likelihood,
    Poisson,
    PoissonRate,
)
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
        value: The loss function's result, or None where there is none, or none that is bounded by 0.
        value_edge: Where that result is in the graph, or None where the weights are known.
        weigh: Gives the weights of the terms from the derivative of the loss with respect to that result.
        weigh_in_loss: The same without the curvature of the terms, where ``weigh`` has it in the weights; None
            where it has not.
    """

    likelihood: Likelihood
    function: str
    logits: Tensor
    edges: tuple[tuple[GradientEdge, float], ...]
    layout: Callable[[Tensor], Tensor]
    value: Tensor | None
    value_edge: GradientEdge | None
    weigh: Callable[[Tensor], Tensor]
    weigh_in_loss: Callable[[Tensor], Tensor] | None = None

    def term_weights(self, derivative: Tensor) -> Tensor:
        """The weights c, shape ``(examples, *positions)`` (categorical) or as ``logits``.

        The absolute value is taken: a term that the loss subtracts curves it as much as one that it adds, and
        a Fisher matrix has no negative part.
        """
        return self.weigh(derivative.detach().to(self.logits)).abs()

    def weights_in_loss(self, derivative: Tensor) -> Tensor:
        """The factors of the terms in the loss, which are the weights but for the terms' own curvature."""
        weigh = self.weigh if self.weigh_in_loss is None else self.weigh_in_loss
        return weigh(derivative.detach().to(self.logits)).abs()


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
    *,
    curvature: Tensor | None = None,
    bounded: bool = True,
) -> LossTerm:
    """A term whose every output stands alone; ``weight`` and ``curvature`` broadcast to the unreduced result.

    Args:
        likelihood: What the terms are negative log-likelihoods of.
        function: The loss function's name.
        value: Its result.
        logits: The logits' values, as they broadcast to the result.
        edges: Where seeds enter the graph.
        weight: The call's own weights.
        result_shape: The shape of the result with the reduction ``"none"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        curvature: How much each term is curved, as a multiple of the likelihood's; 1 where None.
        bounded: Whether the loss function is never negative.
    """
    shape = logits.shape
    weight = weight.to(logits.dtype).expand(result_shape)
    if reduction == "mean":
        weight = weight / max(result_shape.numel(), 1)
    curved = weight if curvature is None else weight * curvature

    def weigh_by(weight: Tensor) -> Callable[[Tensor], Tensor]:
        # The result may be broadcast from the input: the terms on one output add up.
        return lambda derivative: _with_outputs((weight * derivative).sum_to_size(shape))

    def layout(seed: Tensor) -> Tensor:
        return seed.reshape(shape)

    outputs, found = _with_outputs(logits), value.detach().clone() if bounded else None
    edge, in_loss = get_gradient_edge(value), None if curvature is None else weigh_by(weight)
    return LossTerm(likelihood, function, outputs, edges, layout, found, edge, weigh_by(curved), in_loss)


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


def _binary_cross_entropy(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> LossTerm | None:
    if not input.requires_grad:
        return None
    own = torch.ones(()) if weight is None else weight.detach()
    edges = ((get_gradient_edge(input), 1.0),)
    reduction = _reduction(size_average, reduce, reduction)
    probabilities, name = _values(input), "binary_cross_entropy"
    own = own.to(probabilities)
    return _elementwise_term(BernoulliProbability(), name, value, probabilities, edges, own, input.shape, reduction)


def _soft_margin_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> LossTerm | None:
    # log(1 + exp(-y z)) is the cross entropy of the logit y z, whose sign the Fisher information forgets.
    result = _broadcast(input.shape, target.shape)
    if not input.requires_grad or result != input.shape:
        return None
    size = target.detach().to(factor_dtype(input.dtype)).abs()
    logits = _values(input) * size
    edges = ((get_gradient_edge(input), 1.0),)
    reduction, own = _reduction(size_average, reduce, reduction), torch.ones_like(logits)
    return _elementwise_term(
        Bernoulli(), "soft_margin_loss", value, logits, edges, own, result, reduction, curvature=size.square()
    )


def _multilabel_soft_margin_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> LossTerm | None:
    if not input.requires_grad or _broadcast(input.shape, target.shape) != input.shape:
        return None
    logits, reduction = _values(input), _reduction(size_average, reduce, reduction)
    own = torch.ones_like(logits) if weight is None else weight.detach().to(logits).expand(logits.shape)
    # A mean over the classes, and its reduction over what is left.
    own = own / max(logits.shape[-1], 1)
    if reduction == "mean":
        own = own / max(logits.shape[:-1].numel(), 1)
    edges = ((get_gradient_edge(input), 1.0),)
    name = "multilabel_soft_margin_loss"
    term = _elementwise_term(Bernoulli(), name, value, logits, edges, own, logits.shape, "sum")
    if reduction != "none":
        return term
    return replace(term, weigh=lambda derivative: term.weigh(derivative.unsqueeze(-1)))


def _poisson_nll_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    log_input: bool = True,
    full: bool = False,
    size_average: bool | None = None,
    eps: float = 1e-8,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> LossTerm | None:
    if not input.requires_grad:
        return None
    outputs = _values(input)
    likelihood = Poisson() if log_input else PoissonRate()
    logits = outputs if log_input else outputs.clamp_min(0) + eps
    result = _broadcast(input.shape, target.shape)
    edges = ((get_gradient_edge(input), 1.0),)
    reduction, own = _reduction(size_average, reduce, reduction), logits.new_ones(())
    return _elementwise_term(
        likelihood, "poisson_nll_loss", value, logits, edges, own, result, reduction, bounded=False
    )


def _gaussian_nll_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> list[LossTerm]:
    name, terms = "gaussian_nll_loss", []
    variance = _values(var) if isinstance(var, Tensor) else _values(input.new_tensor(var))
    variance = variance.clamp_min(eps)
    if variance.ndim and variance.shape == input.shape[:-1] and variance.shape != input.shape:
        variance = variance.unsqueeze(-1)
    result = _broadcast(input.shape, target.shape, variance.shape)
    one = torch.ones_like(variance)
    sides = _sides(input, target)
    if sides:
        prediction = _values(sides[0][0])
        edges = tuple((get_gradient_edge(side), sign) for side, sign in sides)
        information = 1 / variance
        terms.append(
            _elementwise_term(
                Gaussian(), name, value, prediction, edges, one, result, reduction,
                curvature=information / 2, bounded=False,
            )
        )  # fmt: skip
    if isinstance(var, Tensor) and var.requires_grad:
        # The clamp passes derivatives on as they are. Mean and variance have no Fisher information in common.
        edges, shape = ((get_gradient_edge(var), 1.0),), var.shape
        information = 1 / (2 * variance.square())
        term = _elementwise_term(
            Gaussian(), name, value, variance, edges, one, result, reduction, curvature=information / 2, bounded=False
        )
        terms.append(replace(term, layout=lambda seed: seed.reshape(shape)))
    return terms


def _mse_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossTerm | None:
    reduction = _reduction(size_average, reduce, reduction)
    return _difference("mse_loss", value, input, target, reduction, weight)


def _l1_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> LossTerm | None:
    reduction = _reduction(size_average, reduce, reduction)
    return _difference("l1_loss", value, input, target, reduction, weight, curvature=_absolute)


def _smooth_l1_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> LossTerm | None:
    reduction = _reduction(size_average, reduce, reduction)
    curvature = _absolute if beta == 0 else lambda residuals: 1 / (2 * residuals.clamp_min(beta))
    return _difference("smooth_l1_loss", value, input, target, reduction, curvature=curvature)


def _huber_loss(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> LossTerm | None:
    return _difference(
        "huber_loss",
        value,
        input,
        target,
        reduction,
        weight,
        weighted_mean=False,
        curvature=lambda residuals: delta / (2 * residuals.clamp_min(delta)),
    )


def _absolute(residuals: Tensor) -> Tensor:
    """The curvature of absolute residuals r in multiples of a square's: 1/(2r), but no more than at their mean.

    The floor makes the sum of curvatures finite, and is in the units of the residuals whatever these are. Near it is
    the curvature of the expected loss, 2 p(0) for residuals of density p: 1 over the mean, where they are Laplace's.
    Where all are 0 there is no scale, and no gradient either: the curvature is 0.
    """
    bounds = torch.maximum(residuals, residuals.mean()) if residuals.numel() else residuals
    return torch.where(bounds > 0, 1 / (2 * bounds), torch.where(bounds == 0, 0.0, bounds))


def _sides(input: Tensor, target: Tensor) -> list[tuple[Tensor, float]]:
    """The arguments of a symmetric loss that are predictions, with signs; none where two do not agree in shape."""
    sides = [(side, sign) for side, sign in ((input, 1.0), (target, -1.0)) if side.requires_grad]
    return [] if len(sides) == 2 and input.shape != target.shape else sides


def _difference(
    function: str,
    value: Tensor,
    input: Tensor,
    target: Tensor,
    reduction: str,
    weight: Tensor | None = None,
    *,
    weighted_mean: bool = True,
    curvature: Callable[[Tensor], Tensor] | None = None,
) -> LossTerm | None:
    r"""A term of a loss :math:`\rho(z - y)`.

    Where it is not a square, its curvature is that of iteratively reweighted least squares, :math:`\rho'(r)/r`:
    of the parabola that touches :math:`\rho` at the residuals r and -r, and lies nowhere below it. In a quadratic zone
    that is the second derivative; in a linear one, which has none, it is positive and falls with the residual.

    Args:
        function: The loss function's name.
        value: Its result.
        input: Its first argument.
        target: Its second. The loss is symmetric: a prediction given as the target, or on both sides, is one all the
            same.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: The weights of the terms.
        weighted_mean: Whether a mean is divided by the weights' sum instead of their number.
        curvature: Gives :math:`\rho'(r)/(2r)`, a multiple of the square's, from the absolute residuals.
    """
    sides = _sides(input, target)
    if not sides or input.is_complex() or target.is_complex():
        return None
    logits = _values(sides[0][0])
    residuals = input.detach().to(logits.dtype) - target.detach().to(logits.dtype)
    own = logits.new_ones(()) if weight is None else weight.detach().to(logits.dtype)
    if weight is not None and weighted_mean and reduction == "mean":
        own, reduction = own / own.sum(), "sum"
    edges = tuple((get_gradient_edge(side), sign) for side, sign in sides)
    curved = None if curvature is None else curvature(residuals.abs())
    return _elementwise_term(
        Gaussian(), function, value, logits, edges, own, residuals.shape, reduction, curvature=curved
    )


def _kl_div(
    value: Tensor,
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> LossTerm | None:
    if not input.requires_grad:
        return None
    class_dim = _axis_of_probabilities(input)
    if class_dim is None:
        return None
    reduction = _reduction(size_average, reduce, reduction)
    logits = _values(input)
    masses = target.detach().to(logits.dtype)
    masses = masses.exp() if log_target else masses
    result, shape = _broadcast(input.shape, target.shape), input.shape
    masses = masses.expand(result)
    if reduction == "mean":
        masses = masses / max(result.numel(), 1)
    elif reduction == "batchmean":
        masses = masses / max(len(input), 1)

    def weigh(derivative: Tensor) -> Tensor:
        # A cross entropy but for the entropy of the target: the weight is the mass that the target has.
        weights = (masses * derivative).sum_to_size(shape).sum(class_dim)
        return weights.unsqueeze(0) if len(shape) == 1 else weights

    def layout(seed: Tensor) -> Tensor:
        return seed.reshape(shape) if len(shape) == 1 else seed.movedim(-1, class_dim)

    logits = logits.unsqueeze(0) if len(shape) == 1 else logits.movedim(class_dim, -1)
    edges = ((get_gradient_edge(input), 1.0),)
    result_edge, found = get_gradient_edge(value), value.detach().clone()
    return LossTerm(Categorical(), "kl_div", logits, edges, layout, found, result_edge, weigh)


def _axis_of_probabilities(log_probabilities: Tensor) -> int | None:
    """The axis over which log-probabilities are those of one distribution; None if there is none."""
    if not log_probabilities.numel():
        return None
    probabilities = _values(log_probabilities).exp()
    tolerance = max(1e-3, 8 * torch.finfo(log_probabilities.dtype).eps)
    axes = range(log_probabilities.ndim)
    faults = [float((probabilities.sum(axis) - 1).abs().max()) for axis in axes]
    best = min(axes, key=lambda axis: (not faults[axis] <= tolerance, faults[axis]), default=None)
    return best if best is not None and faults[best] <= tolerance else None


def _broadcast(*shapes: torch.Size) -> torch.Size:
    return torch.Size(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]  # torch's own


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction, with torch's two deprecated arguments honoured."""
    if size_average is None and reduce is None:
        return reduction
    return str(_Reduction.legacy_get_string(size_average, reduce, emit_warning=False))


#: The loss functions that are recognised.
LOSS_FUNCTIONS: dict[Any, Callable[..., LossTerm | list[LossTerm] | None]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll_loss,
    F.kl_div: _kl_div,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy_with_logits,
    F.binary_cross_entropy: _binary_cross_entropy,
    F.soft_margin_loss: _soft_margin_loss,
    F.multilabel_soft_margin_loss: _multilabel_soft_margin_loss,
    F.mse_loss: _mse_loss,
    F.l1_loss: _l1_loss,
    F.smooth_l1_loss: _smooth_l1_loss,
    F.huber_loss: _huber_loss,
    F.gaussian_nll_loss: _gaussian_nll_loss,
    F.poisson_nll_loss: _poisson_nll_loss,
}


def _with_the_weight_that_torch_drops(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``l1_loss``, which does not tell a torch function mode of its ``weight``.

    Without it, the loss would be another one while it is watched. It is found in the frame of the call.
    """
    code, frame = getattr(F.l1_loss, "__code__", None), inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    weight = None if frame is None else frame.f_locals.get("weight")
    return kwargs if weight is None or len(args) > 5 else {**kwargs, "weight": weight}


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
        kwargs = kwargs or {}
        if func is F.l1_loss and "weight" not in kwargs:
            kwargs = _with_the_weight_that_torch_drops(args, kwargs)
        result = func(*args, **kwargs)
        read = LOSS_FUNCTIONS.get(func)
        if read is not None and not self.paused and isinstance(result, Tensor) and result.requires_grad:
            off = torch.autocast(result.device.type, enabled=False)
            try:
                with torch.no_grad(), off, unseen_by_dispatch_modes():
                    found = read(result, *args, **kwargs)
            except Exception as error:
                self.failure = self.failure or error
                return result
            self.terms += [found] if isinstance(found, LossTerm) else found or []
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
