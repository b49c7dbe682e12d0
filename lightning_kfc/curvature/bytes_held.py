"""The bytes that a layer's factors, inverse and moments hold."""

from __future__ import annotations

import math

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.factors.inverses import CholeskyInverse, Inverse
from lightning_kfc.factors.running_average import stored_nbytes
from lightning_kfc.factors.statistics import factor_dtype


def layer_bytes(layer: Layer, inverse: type[Inverse], moments: int = 0) -> int:
    """Bytes that a layer holds, or will hold once it has factors and an inverse.

    Args:
        layer: The layer.
        inverse: The user's kind of inverse.
        moments: The rule's numbers per parameter.
    """
    if layer.averages and layer.inverse is not None:
        kept = layer.moments.nbytes() if layer.moments is not None else 0
        return sum(average.nbytes for average in layer.averages.values()) + layer.inverse.nbytes() + kept
    dtype = factor_dtype(layer.parameters()[0].dtype)
    shapes, kind = layer.adapter.factor_shapes(), layer.inverse_type(inverse)
    kept = sum(stored_nbytes(shape, dtype) for shape in shapes.values())
    kept += kind.numel(shapes) * (layer.inverse_dtype if kind is CholeskyInverse else dtype).itemsize
    return kept + moments * math.prod(layer.adapter.matrix_shape()) * dtype.itemsize
