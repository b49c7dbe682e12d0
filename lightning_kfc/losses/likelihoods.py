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
    """What a loss is the negative logarithm of.

    Attributes:
        output_of: Name of the module whose output is the logits, where the loss is computed by functions
            that are not recognised; None where the loss is recognised.
        reduction: With ``output_of``: how the loss combines its terms, ``"mean"`` or ``"sum"``.
    """

    output_of: str | None = None
    reduction: Literal["mean", "sum"] = "mean"

    name: ClassVar[str]
    #: Whether one term owns a whole vector of outputs (categorical), or each output is a term of its own.
    vector_valued: ClassVar[bool] = False

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

        Positions of one example share layers, so their seeds must not travel together: the products of
        different terms would be counted. Examples do travel together, each with a random sign, so that where
        the first axis mixes terms of one example the products cancel in expectation.
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

    def exact_passes(self, shape: torch.Size) -> int:
        """How many back-propagations :meth:`exact_seeds` asks for."""
        return shape[1:].numel()


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


class _ElementwiseLikelihood(Likelihood):
    """Every output is a term of its own, with a scalar Fisher information."""

    @abstractmethod
    def standard_deviations(self, logits: Tensor, weights: Tensor) -> Tensor:
        """The root of each output's weighted Fisher information."""

    def exact_seed_columns(self, logits: Tensor, weights: Tensor) -> Iterator[Tensor]:
        """See :class:`Likelihood`."""
        deviations = self.standard_deviations(logits, weights)
        for k in range(logits.shape[-1]):
            column = torch.zeros_like(logits)
            column[..., k] = deviations[..., k]
            yield column


@dataclass(frozen=True)
class Bernoulli(_ElementwiseLikelihood):
    r"""Independent yes/no outputs: ``binary_cross_entropy_with_logits``.

    Seeds :math:`\sqrt{c}\,(\sigma(z) - \hat y)` with :math:`\hat y \sim \mathrm{Bernoulli}(\sigma(z))`.
    """

    name: ClassVar[str] = "bernoulli"

    def sampled_seed(self, logits: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`Likelihood`."""
        p = logits.sigmoid()
        return weights.sqrt() * (p - torch.bernoulli(p, generator=generator))

    def standard_deviations(self, logits: Tensor, weights: Tensor) -> Tensor:
        r"""The root of :math:`c\,\sigma(z)\,\sigma(-z)`."""
        return (weights * logits.sigmoid() * (-logits).sigmoid()).sqrt()


@dataclass(frozen=True)
class Gaussian(_ElementwiseLikelihood):
    r"""Unit-variance regression: ``mse_loss``, whose terms :math:`(z - y)^2` carry no one half.

    Seeds :math:`\sqrt{2c}\,\varepsilon` with :math:`\varepsilon \sim N(0, 1)`.
    """

    name: ClassVar[str] = "gaussian"

    def sampled_seed(self, logits: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`Likelihood`."""
        noise = torch.randn(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
        return (2 * weights).sqrt() * noise

    def standard_deviations(self, logits: Tensor, weights: Tensor) -> Tensor:
        r"""The root of :math:`2c`."""
        return (2 * weights).sqrt().expand(logits.shape)


#: The likelihoods a user can name.
LIKELIHOODS: dict[str, type[Likelihood]] = {
    likelihood.name: likelihood for likelihood in (Categorical, Bernoulli, Gaussian)
}
