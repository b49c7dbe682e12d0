"""The gradients of single examples, projected on a layer's eigenbasis, or kept until the layer has one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.estimation.recording import Call, KeptInputs
from lightning_kfc.factors.eigenbasis import Eigenbasis, moments_of_gradients, moments_of_rows
from lightning_kfc.factors.inverses import EkfacInverse
from lightning_kfc.factors.statistics import factor_dtype, per_example_gradients
from lightning_kfc.layers import Adapter
from lightning_kfc.scheduling.tracker import RefreshTracker

#: At most this many bytes of rows and of examples' gradients are materialised at once.
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Rows:
    """The rows of one back-propagation, in calls with the same examples.

    Attributes:
        inputs: The input of each call.
        outputs: Each call's output rows, ``(examples, positions, groups, d_out)``.
        factor: Undoes the scale of the seeds, in the squares.
    """

    inputs: tuple[tuple[Adapter, KeptInputs], ...]
    outputs: tuple[Tensor, ...]
    factor: float

    def chunks(self, d_in: int) -> Iterator[tuple[Tensor, Tensor]] | None:
        """Input and output rows of some examples at a time, the calls' positions joined; None if inputs changed."""
        forwards = [kept.read() for _, kept in self.inputs]
        if any(forward is None for forward in forwards):
            return None
        positions = sum(rows.shape[1] for rows in self.outputs)
        _, _, groups, d_out = self.outputs[0].shape
        gradient = d_in * d_out if positions > 1 else 0
        size = max(1, CHUNK_BYTES // (self.outputs[0].itemsize * groups * (positions * (d_in + d_out) + gradient)))
        a = [
            adapter.input_row_chunks(forward, size)
            for (adapter, _), forward in zip(self.inputs, forwards, strict=True)
            if forward is not None
        ]
        g = [torch.split(rows, size) for rows in self.outputs]
        return (
            (torch.cat(inputs, 1), torch.cat(outputs, 1))
            for inputs, outputs in zip(zip(*a, strict=True), zip(*g, strict=True), strict=True)
        )

    def smaller_as_gradients(self, d_in: int) -> bool:
        """Whether the examples' gradients take less memory than these rows and the calls' inputs."""
        examples, _, groups, d_out = self.outputs[0].shape
        held = sum(rows.numel() for rows in self.outputs) + sum(kept.numel() for _, kept in self.inputs)
        return examples * groups * d_out * d_in < held


class ExampleGradients:
    r"""Collects :math:`\sum_n \nabla_n \nabla_n^\top` of one step, for the diagonal in a basis.

    An example's gradient is the sum over a module's calls with the same batch size, as in a Siamese or a recurrent
    net. Calls with different batch sizes are treated as different examples.

    Args:
        basis: The basis to project on; None where it follows from this step's statistics.
        shape: ``(groups, d_out, d_in)``.
    """

    def __init__(self, basis: Eigenbasis | None, shape: tuple[int, int, int]) -> None:
        self._basis = basis
        self._shape = shape
        self._total: Tensor | None = None
        self._rows: list[_Rows] = []
        self._gradients: list[tuple[Tensor, float]] = []
        self._incomplete = False
        #: Whether any derivative has arrived.
        self.reached = False

    def add(self, arrived: Sequence[tuple[Call, Tensor]], factor: float) -> None:
        """Add the derivatives of one back-propagation at the outputs of the layer's calls.

        Args:
            arrived: The calls, each with the derivative at its output.
            factor: The factor on the squares.
        """
        self.reached = True
        by_size: dict[int, list[tuple[Call, Tensor]]] = {}
        for call, gradient in arrived:
            rows = call.adapter.output_rows(gradient.to(factor_dtype(gradient.dtype)))
            by_size.setdefault(rows.shape[0], []).append((call, rows))
        for calls in by_size.values():
            inputs = tuple((call.adapter, call.inputs) for call, _ in calls if call.inputs is not None)
            if len(inputs) < len(calls):
                self._incomplete = True
                return
            self._take(_Rows(inputs, tuple(rows for _, rows in calls), factor))

    def spoil(self) -> None:
        """Make the second moment NaN: a part of the step's examples is missing."""
        self.reached = self._incomplete = True

    def second_moment(self, basis: Eigenbasis) -> Tensor:
        """The sum over examples of the squared projections, ``(groups, d_out, d_in)``; NaN where rows are missing."""
        if self._basis is not None and not self._basis.same_as(basis):
            self._incomplete = True
        total = self._zeros(basis) if self._total is None else self._total
        for rows in self._rows:
            total = total + self._project(rows, basis)
        for gradients, factor in self._gradients:
            for chunk in torch.split(gradients, max(1, CHUNK_BYTES // max(1, gradients[:1].nbytes))):
                total = total + moments_of_gradients(chunk, basis) * factor
        return torch.full_like(total, torch.nan) if self._incomplete else total

    def _take(self, rows: _Rows) -> None:
        if self._basis is not None:
            part = self._project(rows, self._basis)
            self._total = part if self._total is None else self._total + part
        elif not rows.smaller_as_gradients(self._shape[2]):
            self._rows.append(rows)
        else:
            chunks = rows.chunks(self._shape[2])
            if chunks is None:
                self._incomplete = True
                return
            gradients = torch.cat([per_example_gradients(a, g) for a, g in chunks])
            self._gradients.append((gradients, rows.factor))

    def _project(self, rows: _Rows, basis: Eigenbasis) -> Tensor:
        total = self._zeros(basis)
        chunks = rows.chunks(self._shape[2])
        if chunks is None:
            self._incomplete = True
            return total
        for a, g in chunks:
            total += moments_of_rows(a, g, basis)
        return total * rows.factor

    def _zeros(self, basis: Eigenbasis) -> Tensor:
        return basis.A_vectors.new_zeros(self._shape)


class StepExamples:
    """The gradients of a step's single examples, by layer.

    Args:
        layers: The model's layers, which may change.
        tracker: The dates of each layer.
    """

    def __init__(self, layers: Mapping[str, Layer], tracker: RefreshTracker) -> None:
        self._layers = layers
        self._tracker = tracker
        self._by_layer: dict[str, ExampleGradients] = {}

    def of(self, names: Iterable[str], step: int) -> dict[str, ExampleGradients]:
        """The collectors of the named layers, made at the step's first call; dropped layers have none."""
        for name in names:
            if name in self._layers and name not in self._by_layer:
                layer = self._layers[name]
                # A basis that the step's end brings needs the gradients themselves.
                basis = None if self._tracker.new_inverse(name, step) else layer.basis_of_examples()
                self._by_layer[name] = ExampleGradients(basis, layer.adapter.matrix_shape())
        return {name: self._by_layer[name] for name in names if name in self._by_layer}

    def follow(self, kept: Mapping[str, str]) -> None:
        """Follow a model whose layers have changed; ``kept`` has their present names by the former ones."""
        self._by_layer = {kept[name]: examples for name, examples in self._by_layer.items() if name in kept}

    def forget(self, layer: str) -> None:
        """Forget the gradients of a layer's examples."""
        self._by_layer.pop(layer, None)

    def spoil(self, layer: str) -> None:
        """Make a layer's second moment of this step NaN, so that all ranks drop it."""
        if layer in self._by_layer:
            self._by_layer[layer].spoil()

    def second_moments(self, layers: Iterable[Layer]) -> dict[str, Tensor]:
        """Remove and return the second moments, by layer, in the layers' present bases.

        A second moment that could not be formed is NaN.
        """
        found = {}
        for layer in layers:
            examples, inverse = self._by_layer.pop(layer.name, None), layer.inverse
            if examples is not None and examples.reached and isinstance(inverse, EkfacInverse):
                found[layer.name] = examples.second_moment(inverse.basis)
        return found
