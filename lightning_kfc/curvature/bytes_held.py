"""The bytes that a layer's factors, its inverse, its moments and its last update hold."""

from __future__ import annotations

import math

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.factors.inverses import CholeskyInverse, Inverse
from lightning_kfc.factors.running_average import stored_nbytes


def layer_bytes(layer: Layer, inverse: type[Inverse], kept: int = 0) -> int:
    """Bytes that a layer holds, or will hold with factors and an inverse.

    Args:
        layer: The layer.
        inverse: The user's kind of inverse.
        kept: The number of values per parameter that are held from step to step.
    """
    dtype = layer.dtype
    held = kept * math.prod(layer.adapter.matrix_shape()) * dtype.itemsize
    if layer.averages and layer.inverse is not None:
        return held + sum(average.nbytes for average in layer.averages.values()) + layer.inverse.nbytes()
    shapes, kind = layer.adapter.factor_shapes(), layer.inverse_type(inverse)
    held += sum(stored_nbytes(shape, dtype) for shape in shapes.values())
    return held + kind.numel(shapes) * (layer.inverse_dtype if kind is CholeskyInverse else dtype).itemsize
