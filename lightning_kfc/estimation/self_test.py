r"""The first-step self-test: the recorded rows must rebuild the weight gradient of every covered layer.

For one random direction u, :math:`\sum_r g_r (\bar a_r^\top u) = \nabla\bar W u` holds exactly for a layer whose rows
are right, and with probability 1 for no other. The products with u are formed in the forward, so that no activation is
kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.distributed.sharded_tensors import whole
from lightning_kfc.estimation.recording import Call
from lightning_kfc.factors.statistics import factor_dtype
from lightning_kfc.layers import Adapter

#: The relative error that rounding may leave, by the precision of the derivatives.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}

#: Most bytes of derivatives that are squared at a time.
CHUNK_BYTES = 2**20


#: Packages whose modules have built-in adapters.
SERVED = ("torch", "transformers")


class SelfTestError(RuntimeError):
    """The rows of an adapter that the user registered do not rebuild the gradient of its parameters."""


@dataclass(frozen=True)
class _Place:
    """The edge of a parameter's derivative, with its shape, precision and device."""

    edge: GradientEdge
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, parameter: nn.Parameter) -> _Place:
        return cls(get_gradient_edge(parameter), parameter.shape, parameter.dtype, parameter.device)

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class _Sums:
    """The gradient times the direction, rebuilt from a layer's rows, ``(groups, d_out)``.

    Attributes:
        rebuilt: The sum over rows.
        spread: The sum of the squares of its terms.
        tolerance: The relative tolerance for the derivatives' precision.
    """

    rebuilt: Tensor
    spread: Tensor
    tolerance: float

    def __add__(self, other: _Sums) -> _Sums:
        rebuilt, spread = self.rebuilt + other.rebuilt, self.spread + other.spread
        return _Sums(rebuilt, spread, max(self.tolerance, other.tolerance))


class SelfTest:
    """Checks every layer once, at its first derivative that is not zero.

    Args:
        layers: The layers by name.
        generator: The source of randomness for the directions, on the CPU.
    """

    def __init__(self, layers: Mapping[str, Layer], generator: torch.Generator) -> None:
        self._layers = layers
        self._generator = generator
        self._directions: dict[str, Tensor] = {}
        self._owners: list[tuple[str, str, _Place]] = []
        self._used: dict[str, dict[str, _Place]] = {}
        self._arrived: dict[str, _Sums] = {}
        #: The layers that have not been checked yet.
        self.waiting: list[str] = list(layers)
        #: The layers that are recorded in this step; other layers cannot be checked.
        self.recorded: set[str] = set(layers)
        #: Layers whose parameters get a derivative although their modules were never called.
        self.never_called: list[str] = []
        #: Whether a failed layer raises if the user registered its adapter; else it is added to :attr:`unexplained`.
        self.strict = True
        #: The reasons of failed layers.
        self.unexplained: dict[str, str] = {}

    def parameters(self) -> list[GradientEdge]:
        """Begin a check; return the edges of the parameters whose derivatives :meth:`check` takes."""
        self._arrived.clear()
        self._owners = [
            (layer, role, place)
            for layer in self.waiting
            if layer in self.recorded
            for role, place in (self._used.get(layer) or self._places(layer)).items()
        ]
        return [place.edge for _, _, place in self._owners]

    def _places(self, layer: str) -> dict[str, _Place]:
        return {role: _Place.of(p) for role, p in self._layers[layer].adapter.own_parameters().items()}

    def direction(self, layer: str) -> Tensor:
        """The layer's direction u, shape ``(groups, d_in)`` for the parameters that are trainable now."""
        # Called in the forward, in which a sharded module has the whole parameter of the graph.
        self._used[layer] = self._places(layer)
        groups, _, d_in = self._layers[layer].adapter.matrix_shape()
        if layer not in self._directions or self._directions[layer].shape != (groups, d_in):
            self._directions[layer] = torch.randn((groups, d_in), generator=self._generator, dtype=torch.float64)
        return self._directions[layer]

    def take(self, call: Call, gradient: Tensor) -> None:
        """Add the derivative at a call's output to the next check."""
        if call.probe is None or call.layer in self.unexplained:
            return
        dtype = factor_dtype(gradient.dtype)
        rows = call.adapter.output_rows(call.output_gradient(gradient).to(dtype))
        probe = call.probe().to(dtype)
        d_out = self._layers[call.layer].adapter.matrix_shape()[1]
        if rows.shape != (*probe.shape, d_out):
            made = f"{type(call.adapter).__name__}.output_rows() returned rows of shape {tuple(rows.shape)}"
            needed = f"its input rows and its gradient need {(*probe.shape, d_out)}"
            self._fail(call.layer, f"{made} for {call.layer!r}; {needed}.", f"{made}; {needed}")
            return
        sums = _Sums(
            *_products(rows, probe),
            TOLERANCE.get(gradient.dtype, 0.1),
        )
        earlier = self._arrived.get(call.layer)
        self._arrived[call.layer] = sums if earlier is None else earlier + sums

    def check(self, calls: Sequence[Call], of_parameters: Sequence[Tensor | None]) -> None:
        """Compare the gradients rebuilt from the rows with autograd's own.

        Args:
            calls: The recorded calls.
            of_parameters: The derivatives at :meth:`parameters`; None where no derivative arrived.

        Raises:
            SelfTestError: If the gradients of a layer differ.
        """
        own: dict[str, dict[str, Tensor]] = {}
        reached: set[str] = set()
        for (layer, role, place), gradient in zip(self._owners, of_parameters, strict=True):
            own.setdefault(layer, {})[role] = place.zeros() if gradient is None else whole(gradient)
            if gradient is not None and bool(own[layer][role].any()):
                reached.add(layer)
        self._used.clear()
        for layer in own:
            if layer in self.unexplained:
                continue
            if layer in self._arrived:
                if self._check_layer(layer, self._arrived[layer], own[layer]):
                    self.waiting.remove(layer)
            elif layer in reached:
                if any(call.layer == layer for call in calls):
                    self._fail_by(layer, float("inf"))
                else:
                    self.never_called.append(layer)
                self.waiting.remove(layer)

    @torch.no_grad()
    def _check_layer(self, layer: str, sums: _Sums, own: Mapping[str, Tensor]) -> bool:
        """Check a layer; return False if all derivatives are 0 (dead units, ignored targets)."""
        expected_matrix = self._layers[layer].adapter.matrix(own)
        expected_matrix = expected_matrix.to(factor_dtype(expected_matrix.dtype))
        expected = torch.einsum("goi,gi->go", expected_matrix, self.direction(layer).to(expected_matrix))
        # The terms of the sum may nearly cancel, and rounding grows with the terms.
        size = float(expected.norm()) + float(sums.spread.sum().sqrt())
        error = float((sums.rebuilt - expected).norm())
        if error > sums.tolerance * size:
            self._fail_by(layer, error / size)
        return size > 0

    def _fail_by(self, layer: str, error: float) -> None:
        kind = self._layers[layer].adapter.kind
        message = (
            f"The rows that KFC recorded for {layer!r} ({kind}) do not rebuild the gradient of its parameters "
            f"(relative error {error:.2g}). Likely causes: its weight is also used outside the module's forward "
            "(as a functional call, a tied weight, or in a compiled or scripted region); its weight is "
            "re-parametrised; another hook changes its input or output. "
            f"Add {layer!r} to `exclude` to train it with its plain gradient."
        )
        self._fail(layer, message, "its rows do not rebuild its gradient (its weight is also used otherwise)")

    def _fail(self, layer: str, message: str, reason: str) -> None:
        if self.strict and _by_user(self._layers[layer].adapter):
            raise SelfTestError(message)
        self.unexplained[layer] = reason


def _by_user(adapter: Adapter) -> bool:
    """Whether the user has registered the adapter or the module, and so can correct the rows."""
    own = type(adapter).__module__.partition(".")[0] == __name__.partition(".")[0]
    return not own or type(adapter.module).__module__.partition(".")[0] not in SERVED


def _products(rows: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over rows of derivative times probe, and of its square, ``(groups, d_out)``.

    Computed in chunks: the squares of all examples would be as large as the activation, and fragment the memory.
    """
    _, positions, groups, d_out = rows.shape
    size = max(1, CHUNK_BYTES // max(1, positions * groups * d_out * rows.itemsize))
    rebuilt = spread = rows.new_zeros((groups, d_out))
    for some, along in zip(torch.split(rows, size), torch.split(probe, size), strict=True):
        rebuilt = rebuilt + torch.einsum("ntgo,ntg->go", some, along)
        spread = spread + torch.einsum("ntgo,ntg->go", some.square(), along.square())
    return rebuilt, spread
