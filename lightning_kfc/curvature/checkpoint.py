"""The state of layers to and from plain tensors, numbers, strings, dicts and lists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.loss_magnitude import LossMagnitude
from lightning_kfc.curvature.model_layers import ModelLayers
from lightning_kfc.curvature.own_damping import OwnDamping
from lightning_kfc.curvature.ownership import LayerOwnership
from lightning_kfc.distributed.remote import RemoteInverse
from lightning_kfc.factors.inverses import Inverse
from lightning_kfc.factors.moments import Moments
from lightning_kfc.factors.running_average import average_state, averages_of, own_storage, shapes_in

#: The written version, and earlier versions that can be read; version 1 has whole factors, version 2 triangles.
STATE_VERSION, EARLIER_VERSIONS = 2, (1,)


def check_version(state: Mapping[str, Any]) -> None:
    """Require a state of a readable version.

    Raises:
        ValueError: If the state is of another version.
    """
    if state.get("version") not in (STATE_VERSION, *EARLIER_VERSIONS):
        raise ValueError(
            f"KFC cannot load a state of version {state.get('version')!r}, only {STATE_VERSION} and earlier ones. "
            "Use the version of the package that wrote it, or a newer one."
        )


def layers_state(layers: Mapping[str, Layer], ownership: LayerOwnership) -> dict[str, dict[str, Any]]:
    """The state of all layers, by name; complete on the first rank. Collective: call on every rank."""
    return ownership.collected({name: _state(layer) for name, layer in layers.items()})


@dataclass(frozen=True)
class LoadedLayers:
    """The outcome of loading the state of layers.

    Attributes:
        problems: A sentence for each layer of the state or of the model that was not loaded.
        anew: The names of the model's layers that start anew.
    """

    problems: Sequence[str]
    anew: Sequence[str]


def load_layers(
    layers: ModelLayers,
    states: Mapping[str, Mapping[str, Any]],
    kind: type[Inverse],
    ownership: LayerOwnership,
    *,
    with_moments: bool,
) -> LoadedLayers:
    """Load the state of layers; a layer whose state does not fit starts anew.

    Args:
        layers: The model's layers.
        states: From :func:`layers_state`, with tensors on any device.
        kind: The user's kind of inverse.
        ownership: The ranks that hold factors and inverses.
        with_moments: Whether the rule has moments.
    """
    problems = [
        f"layer {name!r} of the checkpoint is not {'preconditioned now' if layers.in_model(name) else 'in the model'}"
        for name in states
        if name not in layers
    ]
    anew = []
    for name, layer in layers.items():
        if name not in states:
            problems.append(f"layer {name!r} is not in the checkpoint and starts anew")
            anew.append(name)
        elif layer.adapter.own_parameters():
            reason = _load(layer, states[name], kind, ownership, with_moments=with_moments)
            if reason is not None:
                layer.restart()
                problems.append(f"layer {name!r} starts anew: {reason}")
                anew.append(name)
    return LoadedLayers(problems, anew)


def _state(layer: Layer) -> dict[str, Any]:
    state: dict[str, Any] = {"factors": average_state(layer.averages)}
    if layer.inverse is not None:
        state["inverse"] = {"kind": layer.inverse.name, **_saved(layer.inverse.state())}
    if layer.moments is not None:
        state["moments"] = _saved(layer.moments.state_dict())
    if layer.rows is not None:
        state["rows"] = layer.rows
    if layer.own_damping.mean_square is not None:
        state["own_damping"] = asdict(layer.own_damping)
    if math.isfinite(layer.loss.last):
        state["loss"] = asdict(layer.loss)
    return state


def _load(
    layer: Layer, state: Mapping[str, Any], kind: type[Inverse], ownership: LayerOwnership, *, with_moments: bool
) -> str | None:
    """Load factors, and an inverse of the same kind; return the reason if they do not fit, else None."""
    # The model may train in another precision now.
    like = torch.empty((), dtype=layer.dtype, device=layer.device)
    expected, found = layer.adapter.factor_shapes(), shapes_in(state["factors"])
    if found and found != expected:
        return f"its factors have shapes {found} in the checkpoint, {expected} now"
    saved = dict(state.get("inverse", {}))
    own_kind, saved_kind = layer.inverse_type(kind), saved.pop("kind", None)
    inverse: Inverse | None = None
    moments: Moments | None = None
    if not ownership.has_inverse(layer) and saved_kind in (own_kind.name, RemoteInverse.name):
        inverse = RemoteInverse()
    elif saved_kind == own_kind.name:
        inverse = own_kind(**_as(like, saved))
        # Moments belong to the basis of the inverse.
        moments = Moments(**_as(like, state["moments"])) if with_moments and "moments" in state else None
    averages = averages_of(state["factors"], like) if ownership.has_factors(layer) else {}
    # A state has rows and a loss where they are known, and a damping of the layer where it is automatic.
    damping, loss = OwnDamping(**state.get("own_damping", {})), LossMagnitude(**state.get("loss", {}))
    layer.restore(averages, inverse, moments, state.get("rows"), damping, loss)
    return None


def _as(like: Tensor, saved: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.to(like) if isinstance(value, Tensor) else value for name, value in saved.items()}


def _saved(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state for a checkpoint, without the storage of other layers, whose moments may be views of the same."""
    return {name: own_storage(value) if isinstance(value, Tensor) else value for name, value in state.items()}
