"""Record loss terms from calls of torch's loss functions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_kfc.losses.likelihoods import Categorical, Likelihood
from lightning_kfc.losses.readers import LOSS_FUNCTIONS
from lightning_kfc.losses.readers.distributions import DISTRIBUTIONS
from lightning_kfc.losses.terms import LossTerm, values_of, with_outputs
from lightning_kfc.utilities.torch_internals import DisableTorchFunction, legacy_reduction, unseen_by_dispatch_modes


def _with_the_weight_that_torch_drops(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``l1_loss`` with its ``weight``, which torch does not pass to a function mode.

    Without the weight the recorded call would compute another loss. The weight comes from the frame of the call.
    """
    code, frame = getattr(F.l1_loss, "__code__", None), inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    weight = None if frame is None else frame.f_locals.get("weight")
    return kwargs if weight is None or len(args) > 5 else {**kwargs, "weight": weight}


def _arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a loss function by name; ``reduction`` in the place of torch's two deprecated ones."""
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    deprecated = given.pop("size_average", None), given.pop("reduce", None)
    return given if deprecated == (None, None) else {**given, "reduction": legacy_reduction(*deprecated)}


#: Functions that take derivatives.
DIFFERENTIATE = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


class LossRecorder(TorchFunctionMode):
    """A context that records calls of loss functions and of ``log_prob`` as :class:`LossTerm` in ``terms``."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[LossTerm] = []
        self.paused = False
        #: The first error while a call was read; the user's training step continues.
        self.failure: Exception | None = None
        #: Whether a derivative was taken with ``create_graph``, so that the loss may contain it.
        self.differentiated = False
        self._originals: list[tuple[type, Any]] = []

    def __enter__(self) -> LossRecorder:
        """Record calls, also of ``log_prob``: a method, which no function mode intercepts."""
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's own
        for kind, read in DISTRIBUTIONS.items():
            original = kind.__dict__["log_prob"]
            self._originals.append((kind, original))
            kind.log_prob = self._watched(original, read)  # type: ignore[attr-defined]  # some torch distribution
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop recording."""
        while self._originals:
            kind, original = self._originals.pop()
            kind.log_prob = original  # type: ignore[attr-defined]  # some torch distribution
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch's own

    def _watched(self, original: Callable[..., Any], read: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def log_prob(distribution: Any, value: Any) -> Any:
            paused, self.paused = self.paused, True
            try:
                # Some distributions call a loss function, which would be a second term.
                result = original(distribution, value)
            finally:
                self.paused = paused
            self._read(lambda: read(result, distribution, value), result)
            return result

        return log_prob

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and record the call of a loss function."""
        kwargs = kwargs or {}
        if func is F.l1_loss and "weight" not in kwargs:
            kwargs = _with_the_weight_that_torch_drops(args, kwargs)
        if func in DIFFERENTIATE and kwargs.get("create_graph") and not self.paused:
            self.differentiated = True
        result = func(*args, **kwargs)
        reader = LOSS_FUNCTIONS.get(func)
        if reader is not None:
            self._read(lambda: reader(result, **_arguments(func, args, kwargs)), result)
        return result

    def _read(self, read: Callable[[], LossTerm | list[LossTerm] | None], result: Any) -> None:
        """Record the terms of one call."""
        if self.paused or not isinstance(result, Tensor) or not result.requires_grad:
            return
        off = torch.autocast(result.device.type, enabled=False)
        try:
            with torch.no_grad(), off, DisableTorchFunction(), unseen_by_dispatch_modes():
                found = read()
        except Exception as error:
            self.failure = self.failure or error
            return
        self.terms += [found] if isinstance(found, LossTerm) else found or []


class NamedOutputHook:
    """A forward hook that records a module's output as the logits of the user's likelihood.

    In a copied or pickled module it does nothing.

    Args:
        likelihood: The likelihood.
        losses: Receives the term; None for no recording.
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
        logits = values_of(output.movedim(class_dim, -1))
        logits = logits.unsqueeze(0) if logits.ndim == 1 else logits
        weights = torch.ones_like(logits[..., 0])
    else:
        class_dim = -1
        logits = with_outputs(values_of(output))
        weights = torch.ones_like(logits)
    if likelihood.reduction == "mean":
        weights = weights / max(weights.numel(), 1)

    def layout(seed: Tensor) -> Tensor:
        return seed.reshape(shape) if len(shape) < 2 else seed.movedim(-1, class_dim)

    edges = ((get_gradient_edge(output), 1.0),)
    name = f"output of {likelihood.output_of!r}"
    return LossTerm(likelihood, name, logits, edges, layout, None, None, lambda derivative: weights * derivative)
