"""The treatment of each parameter, with the reason."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_kfc.curvature.bytes_held import layer_bytes
from lightning_kfc.curvature.layer import Layer
from lightning_kfc.curvature.model_layers import ModelLayers
from lightning_kfc.factors.inverses import Inverse
from lightning_kfc.monitoring.events import shortened

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class CoverageRow:
    """The treatment of one parameter.

    Attributes:
        parameter: Its name in the model.
        module: The name of the module that owns it.
        kind: The kind of layer; the module's class if there is no layer.
        treatment: ``"kfc"`` (Kronecker factors), ``"block"`` or ``"diagonal"`` (smaller forms of curvature),
            ``"plain"`` (its own gradient) or ``"frozen"``.
        reason: The reason for another form of curvature than that of its kind of layer, for a diagonal factor, or for
            another weight sharing than the setting's; else empty.
        factor_shapes: The shapes of its layer's factors, by name; with a leading groups axis if there are several.
        bytes: The memory of its layer's factors and inverse, on the layer's first trainable parameter only.
        numel: The number of its elements.
    """

    parameter: str
    module: str
    kind: str
    treatment: str
    reason: str
    factor_shapes: dict[str, tuple[int, ...]]
    bytes: int
    numel: int


@dataclass(frozen=True)
class _Line:
    """One preconditioned layer, or several layers that differ only in the numbers of their names."""

    name: str
    kind: str
    treatment: str
    factors: str
    numel: int
    bytes: int

    def cells(self) -> tuple[str, ...]:
        return self.name, self.kind, f"{self.numel:,}", self.factors, _size(self.bytes)


@dataclass(frozen=True)
class Coverage:
    """All parameters of a model, one per row; prints as a table of layers.

    The table has the dimensions of each factor: ``A 577, G 64`` is a pair of Kronecker factors, ``96 x (A 10, G 1)``
    one pair per group, ``64 x F 2`` a dense block for each of 64 units; ``diag`` marks a diagonal. Layers that differ
    only in the numbers of their names share a line: ``layers.[0-11].fc``.
    """

    rows: tuple[CoverageRow, ...]
    _lines: tuple[_Line, ...]

    def __getitem__(self, index: int) -> CoverageRow:
        """One row."""
        return self.rows[index]

    def __len__(self) -> int:
        """The number of parameters."""
        return len(self.rows)

    def __iter__(self) -> Iterator[CoverageRow]:
        """Iterate over the rows."""
        return iter(self.rows)

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"

    @property
    def bytes(self) -> int:
        """The memory of all factors and inverses."""
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        """A table of layers, then the parameters with other treatments and the reasons."""
        trainable = [row for row in self.rows if row.treatment != "frozen"]
        covered = [row for row in trainable if row.treatment != "plain"]
        lines = []
        if self._lines:
            header = ("Layer", "Kind", "Params", "Factors", "Memory")
            lines += _table(header, [line.cells() for line in _merged(self._lines)])
        done, total = (sum(row.numel for row in part) for part in (covered, trainable))
        share = f" ({100 * done / total:.1f}%)" if total else ""
        held = _size(self.bytes)
        lines += _WRAP.wrap(
            f"Preconditioned: {done:,} of {total:,} trainable parameters{share}, {held} of factors and inverses."
        )
        for treatment, label in _LABELS.items():
            reasons: dict[str, list[str]] = {}
            for row in self.rows:
                if row.treatment == treatment and row.reason:
                    reasons.setdefault(row.reason, []).append(row.parameter)
            for reason, names in reasons.items():
                named = shortened((_cut(name, WIDTH - len("    ,")) for name in names), 8)
                lines += _WRAP.wrap(f"{label} ({reason}): {named}")
        return "\n".join(lines)


#: The width of a table, unless numbers and a name of :data:`SHORTEST_NAME` need more.
WIDTH, SHORTEST_NAME = 80, 12

_WRAP = textwrap.TextWrapper(WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def wrapped(text: str) -> list[str]:
    """Lines of at most :data:`WIDTH` columns."""
    return _WRAP.wrap(text)


_LABELS = {
    "kfc": "Other factors",
    "block": "Block",
    "diagonal": "Diagonal",
    "plain": "Plain gradient",
    "frozen": "Frozen",
}


def _merged(lines: Sequence[_Line]) -> list[_Line]:
    """Merge lines that differ only in the numbers of their names, if the numbers form a full grid."""
    alike: dict[tuple[object, ...], list[_Line]] = {}
    for line in lines:
        key = (re.sub(r"\d+", "#", line.name), line.kind, line.treatment, line.factors, line.numel)
        alike.setdefault(key, []).append(line)
    merged: list[_Line] = []
    for (pattern, *_), group in alike.items():
        values = [sorted(set(column)) for column in zip(*(_numbers(line.name) for line in group), strict=True)]
        if len(group) == 1 or prod(map(len, values)) != len(group):
            merged += group
            continue
        parts = str(pattern).split("#")
        name = parts[0] + "".join(_range(v) + part for v, part in zip(values, parts[1:], strict=True))
        numel, held = sum(line.numel for line in group), sum(line.bytes for line in group)
        merged.append(_Line(name, group[0].kind, group[0].treatment, group[0].factors, numel, held))
    return merged


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _range(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    whole = values[-1] - values[0] + 1 == len(values)
    return f"[{values[0]}-{values[-1]}]" if whole else f"[{','.join(map(str, values))}]"


def _sides(shapes: Shapes) -> str:
    """The factors in short, from their shapes with the groups axis."""
    groups = next(iter(shapes.values()))[0]
    sides = ", ".join(f"{name} {shape[1]:,}{' diag' if len(shape) == 2 else ''}" for name, shape in shapes.items())
    if groups == 1:
        return sides
    return f"{groups:,} x ({sides})" if len(shapes) > 1 else f"{groups:,} x {sides}"


def _cut(name: str, width: int) -> str:
    """A long name without its middle; beginning and end distinguish layers."""
    if len(name) <= width:
        return name
    kept = max(width - 3, 2)
    return f"{name[: kept // 2]}...{name[len(name) - (kept - kept // 2) :]}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    others = sum(max(len(row[i]) for row in [header, *rows]) + len("  ") for i in range(1, len(header)))
    rows = [(_cut(row[0], max(WIDTH - others, SHORTEST_NAME)), *row[1:]) for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    rule = "-" * max(map(len, lines))
    return [rule, lines[0], rule, *lines[1:], rule]


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


#: The reason for the plain gradient of a new parameter.
TO_BE_FOUND = "new: found at the next step that takes statistics"


#: Reasons for the plain gradient of layers without curvature at present.
NO_STATISTICS = "no statistics so far: no loss that was seen reaches it, or no optimizer has all of its parameters"
NO_INVERSE = "no inverse so far: made with the next refresh"
OTHER_PARAMETERS = "frozen or unfrozen since its last statistics: taken anew at the next step that takes statistics"
IDLE = (NO_STATISTICS, NO_INVERSE, OTHER_PARAMETERS)


def without_curvature(layers: Iterable[Layer]) -> dict[str, str]:
    """Layers whose gradients stay unchanged at present, with the reason, by name, once training has begun."""
    reasons = {}
    for layer in layers:
        own = tuple(layer.adapter.own_parameters())
        if layer.inverse is None:
            reasons[layer.name] = NO_INVERSE if layer.averages else NO_STATISTICS
        elif own != layer.roles:
            reasons[layer.name] = OTHER_PARAMETERS
    return reasons


def coverage_of(
    model: nn.Module,
    found: ModelLayers,
    inverse: type[Inverse],
    kept: int,
    idle: Mapping[str, str],
) -> Coverage:
    """Make the coverage of a model from its layers; the model may have changed since.

    Args:
        model: The model.
        found: Its layers.
        inverse: The user's kind of inverse.
        kept: The number of values per parameter that are held from step to step; counted as memory of the inverse.
        idle: Layers without curvature at present, by name, with the reason.
    """
    owners: dict[int, list[Layer]] = {}
    own = set(map(id, model.parameters()))
    # Layers whose module or parameters were replaced are idle.
    present = [e for e in found.values() if e.unchanged and own.issuperset(map(id, e.parameters()))]
    for layer in present:
        for parameter in layer.parameters():
            owners.setdefault(id(parameter), []).append(layer)
    rows = []
    counted: set[str] = set()
    for name, parameter in model.named_parameters():
        module, _, _ = name.rpartition(".")
        layers = owners.get(id(parameter), [])
        numel = 0 if is_lazy(parameter) else parameter.numel()
        if not parameter.requires_grad:
            kind = layers[0].adapter.kind if layers else type(model.get_submodule(module)).__name__
            row = CoverageRow(name, module, kind, "frozen", "requires_grad is False", {}, 0, numel)
        elif layers and all(layer.name in idle for layer in layers):
            reason = idle[layers[0].name]
            row = CoverageRow(name, module, layers[0].adapter.kind, "plain", reason, {}, 0, numel)
        elif layers:
            adapter = layers[0].adapter
            held = sum(layer_bytes(layer, inverse, kept) for layer in layers if layer.name not in counted)
            counted |= {layer.name for layer in layers}
            why = layers[0].reason or adapter.approximation()
            shapes = _shapes(layers)
            row = CoverageRow(name, module, adapter.kind, adapter.treatment, why, shapes, held, numel)
        else:
            unknown = type(model.get_submodule(module)).__name__, TO_BE_FOUND
            kind, reason = found.plain.get(found.identity(name, parameter), unknown)
            row = CoverageRow(name, module, kind, "plain", reason, {}, 0, numel)
        rows.append(row)
    covered = [layer for layer in present if layer.name not in idle]
    return Coverage(tuple(rows), tuple(_lines(covered, inverse, kept)))


def _lines(layers: Iterable[Layer], inverse: type[Inverse], kept: int) -> Iterator[_Line]:
    for layer in layers:
        adapter = layer.adapter
        if adapter.own_parameters():
            factors = _sides(adapter.factor_shapes())
            numel = sum(adapter.select(role, p).numel() for role, p in adapter.own_parameters().items())
            held = layer_bytes(layer, inverse, kept)
            yield _Line(layer.name, adapter.kind, adapter.treatment, factors, numel, held)


def _shapes(layers: Sequence[Layer]) -> dict[str, tuple[int, ...]]:
    """The shapes of a parameter's factors; with the part's name if several parts of a module use the parameter."""
    return {
        name if len(layers) == 1 else f"{layer.name.rpartition('.')[2]}.{name}": shape[1:] if shape[0] == 1 else shape
        for layer in layers
        for name, shape in layer.adapter.factor_shapes().items()
    }
