"""Select the recorded loss terms of the user's likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_kfc.losses.likelihoods import Likelihood
from lightning_kfc.losses.readers import LOSS_FUNCTIONS
from lightning_kfc.losses.recorder import LossRecorder, NamedOutputHook
from lightning_kfc.losses.terms import LossTerm


class LossNotRecognisedError(RuntimeError):
    """No term of the loss has the likelihood that the user named."""


def attach_named_output(model: nn.Module, likelihood: str | Likelihood, losses: LossRecorder) -> list[RemovableHandle]:
    """Record the output of the module that the likelihood names, if it names one.

    Raises:
        ValueError: If the model has no such module.
    """
    if not isinstance(likelihood, Likelihood) or likelihood.output_of is None:
        return []
    modules = dict(model.named_modules())
    if likelihood.output_of not in modules:
        raise ValueError(
            f"likelihood takes the logits from the output of {likelihood.output_of!r}, but the model has no such "
            f"module. Its modules are: {', '.join(name for name in modules if name)}."
        )
    hook = NamedOutputHook(likelihood, losses)
    return [modules[likelihood.output_of].register_forward_hook(hook)]


def wanted_terms(terms: Sequence[LossTerm], likelihood: str | Likelihood) -> list[LossTerm]:
    """The terms of the user's likelihood; all for ``"auto"``."""
    if likelihood == "auto":
        return list(terms)
    if isinstance(likelihood, Likelihood):
        if likelihood.output_of is not None:
            return [term for term in terms if term.value_edge is None]
        return [term for term in terms if isinstance(term.likelihood, type(likelihood))]
    return [term for term in terms if term.likelihood.name == likelihood]


def unrecognised(terms: Sequence[LossTerm], likelihood: str | Likelihood) -> str:
    """The message for a loss without a term of the likelihood."""
    if isinstance(likelihood, Likelihood) and likelihood.output_of is not None:
        return (
            f"KFC found no logits for likelihood={likelihood!r}: the module {likelihood.output_of!r} was not called "
            "while this loss was computed, or its output has no gradient. Set output_of to the module whose output "
            "enters the loss."
        )
    return (
        "KFC recognised no term of the loss "
        f"(likelihood={likelihood!r}; loss functions seen in this step: {_seen(terms)}). "
        f"Recognised are {', '.join(function.__name__ for function in LOSS_FUNCTIONS)}, as functions or modules. "
        "For another loss, give the likelihood and the module whose output is its logits, for example "
        "likelihood=Categorical(output_of='head'), or choose fisher='empirical'."
    )


#: Sources of curvature other than recognised loss functions.
THE_REST = "the gradient of the rest"
THE_LOSS_ITSELF = "the gradient of the loss itself"


def curvature_line(norms: Mapping[str, float], terms: Sequence[LossTerm]) -> str:
    """The line that names the sources of curvature.

    Args:
        norms: The norm of the gradient by loss function, :data:`THE_REST` or :data:`THE_LOSS_ITSELF`.
        terms: The recorded terms, part of the loss or not.
    """
    if THE_LOSS_ITSELF in norms:
        return (
            f"curvature from {THE_LOSS_ITSELF} (its empirical Fisher), since no function of it is recognised (seen: "
            f"{_seen(terms)}). Functions such as F.cross_entropy and F.mse_loss give a better curvature. So does the "
            "module with the logits: likelihood=Categorical(output_of='head'), or Bernoulli or Gaussian."
        )
    if len(norms) == 1 or THE_REST not in norms:
        return f"curvature from {', '.join(norms)}."
    total = sum(norms.values()) or 1.0
    shares = {name: _percent(norm / total) for name, norm in norms.items()}
    known = ", ".join(f"{name} ({share} of the gradient)" for name, share in shares.items() if name != THE_REST)
    return f"curvature from {known}, and from {THE_REST} ({shares[THE_REST]}; its empirical Fisher)."


def _percent(share: float) -> str:
    """A share in percent with two digits, and without an exponent."""
    return "less than 0.1 %" if 0 < share < 0.001 else f"{float(f'{100 * share:.2g}'):g} %"


def _seen(terms: Sequence[LossTerm]) -> str:
    return ", ".join(sorted({term.function for term in terms})) or "none"
