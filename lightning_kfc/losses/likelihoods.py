r"""Likelihoods of loss terms, and the seeds whose back-propagation gives the Fisher matrix.

A seed v of a term with weight c and Fisher information H at the logits satisfies
:math:`E[v v^\top] = c H` (sampled seeds, one of them) or :math:`\sum_k v_k v_k^\top = c H` (exact seeds, all
of them). The targets in the seeds are drawn from the model, never taken from the data.

Logits have shape ``(examples, *positions, outputs)`` here, with the classes last for the categorical.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_kfc.utilities.checks import check_choice, check_integer, check_module_name


@dataclass(frozen=True)
class Likelihood(ABC):
    """The likelihood whose negative logarithm is the loss.

    Attributes:
        output_of: Name of the module whose output is the logits, for a loss of functions
            that are not recognised; None for a recognised loss.
        reduction: With ``output_of``: the loss's reduction of its terms, ``"mean"`` or ``"sum"``.
    """

    output_of: str | None = None
    reduction: Literal["mean", "sum"] = "mean"

    name: ClassVar[str]
    #: Whether a term has a vector of outputs (categorical) or a single one.
    vector_valued: ClassVar[bool] = False
    #: Whether the curvature of a term falls to 0 with the term itself, as that of sure and right labels.
    saturates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options."""
        if self.output_of is not None:
            check_module_name("output_of", self.output_of)
        check_choice("reduction", self.reduction, ("mean", "sum"))

    @abstractmethod
    def sampled_seed(self, logits: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """One Monte-Carlo seed for every term.

        Args:
            logits: Shape ``(examples, *positions, outputs)``.
            weights: The weights c, not negative; ``(examples, *positions)`` for the categorical, else as ``logits``.
            generator: The source of randomness.

        Returns:
            Seeds shaped as ``logits``.
        """

    @abstractmethod
    def exact_seed_columns(self, logits: Tensor, weights: Tensor) -> Iterator[Tensor]:
        """Seeds that reproduce the Fisher exactly, each for all positions at once, shaped as ``logits``.

        Column k is the seed of outcome k (categorical) or of output k.
        """

    def exact_seeds(self, logits: Tensor, weights: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Seeds that reproduce the Fisher exactly, one position of every example at a time.

        Positions of one example share layers, so that a common back-propagation would add the products of
        different terms. Examples have a common one, each with a random sign: if the first axis mixes terms of one
        example, their products cancel in expectation.
        """
        examples = logits.shape[0]
        signs = torch.randint(0, 2, (examples,), generator=generator, device=logits.device) * 2 - 1
        signs = signs.to(logits.dtype).reshape(-1, *[1] * (logits.ndim - 1))
        positions = logits.shape[1:-1].numel()
        for column in self.exact_seed_columns(logits, weights):
            signed = (column * signs).reshape(examples, positions, logits.shape[-1])
            for position in range(positions):
                seed = torch.zeros_like(signed)
                seed[:, position] = signed[:, position]
                yield seed.reshape(logits.shape)


@dataclass(frozen=True)
class Categorical(Likelihood):
    r"""Softmax over classes: ``cross_entropy``, and ``nll_loss`` of a ``log_softmax``.

    Seeds :math:`\sqrt{c}\,(p - e_{\hat y})` with :math:`\hat y \sim p`, or :math:`\sqrt{c\,p_k}\,(p - e_k)` for
    every class k.

    Attributes:
        class_dim: With ``output_of``: the axis of the classes in the module's output.
    """

    class_dim: int = 1

    name: ClassVar[str] = "categorical"
    vector_valued: ClassVar[bool] = True
    saturates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_integer("class_dim", self.class_dim)

    def sampled_seed(self, logits: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`Likelihood`."""
        seed = logits.softmax(-1)
        drawn = torch.multinomial(seed.reshape(-1, seed.shape[-1]), 1, generator=generator)
        drawn = drawn.reshape(*seed.shape[:-1], 1)
        seed.scatter_add_(-1, drawn, seed.new_full((), -1.0).expand(drawn.shape))
        return seed.mul_(weights.sqrt().unsqueeze(-1))

    def exact_seed_columns(self, logits: Tensor, weights: Tensor) -> Iterator[Tensor]:
        """See :class:`Likelihood`."""
        p = logits.softmax(-1)
        for k in range(p.shape[-1]):
            column = p.clone()
            column[..., k] -= 1
            yield column * (weights * p[..., k]).sqrt().unsqueeze(-1)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent +1 and -1."""
    signs = torch.randint(0, 2, like.shape, generator=generator, device=like.device) * 2 - 1
    return signs.to(like.dtype)


class _ElementwiseLikelihood(Likelihood):
    """A likelihood in which every output is one term, with a scalar Fisher information."""

    @abstractmethod
    def standard_deviations(self, logits: Tensor, weights: Tensor) -> Tensor:
        """The root of each output's weighted Fisher information."""

    def sampled_seed(self, logits: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """Standard deviations with random signs: the second moment of drawn targets, at the least variance."""
        return self.standard_deviations(logits, weights) * _signs(logits, generator)

    def exact_seed_columns(self, logits: Tensor, weights: Tensor) -> Iterator[Tensor]:
        """See :class:`Likelihood`."""
        deviations = self.standard_deviations(logits, weights)
        for k in range(logits.shape[-1]):
            column = torch.zeros_like(logits)
            column[..., k] = deviations[..., k]
            yield column


@dataclass(frozen=True)
class Bernoulli(_ElementwiseLikelihood):
    r"""Independent yes/no outputs: ``binary_cross_entropy_with_logits``, and the soft margin losses.

    Seeds :math:`\sqrt{c}\,(\sigma(z) - \hat y)` with :math:`\hat y \sim \mathrm{Bernoulli}(\sigma(z))`.
    """

    name: ClassVar[str] = "bernoulli"
    saturates: ClassVar[bool] = True

    def sampled_seed(self, logits: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`Likelihood`."""
        p = logits.sigmoid()
        return weights.sqrt() * (p - torch.bernoulli(p, generator=generator))

    def standard_deviations(self, logits: Tensor, weights: Tensor) -> Tensor:
        r"""The root of :math:`c\,\sigma(z)\,\sigma(-z)`."""
        return (weights * logits.sigmoid() * (-logits).sigmoid()).sqrt()


@dataclass(frozen=True)
class BernoulliProbability(Bernoulli):
    r"""Independent yes/no outputs given as probabilities p: ``binary_cross_entropy``.

    Seeds :math:`\pm\sqrt{c/(p(1-p))}`, which the derivative of a sigmoid turns into those of its logit. The
    information is at most :math:`10^{12}c`, and 0 where p is 0 or 1: nothing is random there.
    """

    #: Where torch bounds p(1-p) in the derivative of the loss.
    smallest: ClassVar[float] = 1e-12

    def sampled_seed(self, logits: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`Likelihood`."""
        return _ElementwiseLikelihood.sampled_seed(self, logits, weights, generator)

    def standard_deviations(self, logits: Tensor, weights: Tensor) -> Tensor:
        r"""The root of :math:`c/(p(1-p))`."""
        variances = logits * (1 - logits)
        return (weights * variances).sqrt() / variances.clamp_min(self.smallest)


@dataclass(frozen=True)
class Gaussian(_ElementwiseLikelihood):
    r"""Unit-variance regression: ``mse_loss``, whose terms :math:`(z - y)^2` carry no one half.

    Seeds :math:`\sqrt{2c}\,\varepsilon` with :math:`\varepsilon \sim N(0, 1)`; with one output in each term
    :math:`\pm\sqrt{2c}`, whose squares are exact.

    Losses that are quadratic with another curvature I at each term (``huber_loss``, ``gaussian_nll_loss``) have
    weights of :math:`c\,I/2`.
    """

    name: ClassVar[str] = "gaussian"

    def sampled_seed(self, logits: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`Likelihood`."""
        if logits.shape[-1] == 1:
            return self.standard_deviations(logits, weights) * _signs(logits, generator)
        noise = torch.randn(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
        return (2 * weights).sqrt() * noise

    def standard_deviations(self, logits: Tensor, weights: Tensor) -> Tensor:
        r"""The root of :math:`2c`."""
        return (2 * weights).sqrt().expand(logits.shape)


@dataclass(frozen=True)
class Poisson(_ElementwiseLikelihood):
    r"""Independent counts whose outputs z are logarithms of rates: ``poisson_nll_loss``.

    Seeds :math:`\pm\sqrt{c\,e^z}`.
    """

    name: ClassVar[str] = "poisson"

    def standard_deviations(self, logits: Tensor, weights: Tensor) -> Tensor:
        r"""The root of :math:`c\,e^z`."""
        return weights.sqrt() * (logits / 2).exp()


@dataclass(frozen=True)
class PoissonRate(Poisson):
    r"""Independent counts whose outputs are the rates: ``poisson_nll_loss(log_input=False)``.

    Seeds :math:`\pm\sqrt{c/z}`.
    """

    def standard_deviations(self, logits: Tensor, weights: Tensor) -> Tensor:
        r"""The root of :math:`c/z`."""
        return (weights / logits.clamp_min(torch.finfo(logits.dtype).tiny)).sqrt()


#: The names for the option ``likelihood``.
LIKELIHOODS: dict[str, type[Likelihood]] = {
    likelihood.name: likelihood for likelihood in (Categorical, Bernoulli, Gaussian)
}
