"""Which parameters are preconditioned, how, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_kfc.find_layers import Found
from lightning_kfc.layer import Layer


@dataclass(frozen=True)
class CoverageRow:
    """How one parameter is treated.

    Attributes:
        parameter: Its name in the model.
        module: The name of the module that owns it.
        kind: The kind of layer.
        treatment: ``"kfc"`` (Kronecker factors), another form of curvature (``"diagonal"``), ``"plain"`` (its own
            gradient) or ``"frozen"``.
        reason: Why it has no Kronecker factors; empty where it has.
        factor_shapes: The shapes of its layer's factors, by name.
        bytes: The memory of its layer's factors and inverse, on the layer's first parameter only.
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
class Coverage:
    """All parameters of a model, a row each; prints as a table."""

    rows: tuple[CoverageRow, ...]

    def __getitem__(self, index: int) -> CoverageRow:
        """One row."""
        return self.rows[index]

    def __len__(self) -> int:
        """The number of parameters."""
        return len(self.rows)

    def __iter__(self) -> Iterator[CoverageRow]:
        """Over the rows."""
        return iter(self.rows)

    def __str__(self) -> str:
        """A table of layers, then the parameters that are not preconditioned with the reasons."""
        trainable = [row for row in self.rows if row.treatment != "frozen"]
        covered = [row for row in trainable if row.treatment != "plain"]
        layers: dict[str, list[CoverageRow]] = {}
        for row in covered:
            layers.setdefault(row.parameter if row.treatment == "diagonal" else row.module, []).append(row)
        lines = []
        if layers:
            header = ("Layer", "Kind", "Treatment", "Parameters", "Factors", "Memory")
            lines += _table(header, [_layer_line(name, rows) for name, rows in layers.items()])
        done, total = (sum(row.numel for row in part) for part in (covered, trainable))
        share = f" ({100 * done / total:.1f}%)" if total else ""
        lines.append(
            f"Preconditioned: {done:,} of {total:,} trainable parameters{share}, "
            f"{_size(sum(row.bytes for row in covered))} of factors and inverses."
        )
        for treatment, label in (("diagonal", "Diagonal"), ("plain", "Plain gradient"), ("frozen", "Frozen")):
            reasons: dict[str, list[str]] = {}
            for row in self.rows:
                if row.treatment == treatment:
                    reasons.setdefault(row.reason, []).append(row.parameter)
            lines += [f"{label} ({reason}): {_shorten(names)}" for reason, names in reasons.items()]
        return "\n".join(lines)


def _layer_line(name: str, rows: Sequence[CoverageRow]) -> tuple[str, ...]:
    shapes = ", ".join(f"{k} {'x'.join(map(str, s))}" for k, s in rows[0].factor_shapes.items())
    numel, held = sum(row.numel for row in rows), sum(row.bytes for row in rows)
    return name, rows[0].kind, rows[0].treatment, f"{numel:,}", shapes, _size(held)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    rule = "-" * max(map(len, lines))
    return [rule, lines[0], rule, *lines[1:], rule]


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _shorten(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def coverage_of(model: nn.Module, found: Found) -> Coverage:
    """Make the coverage of a model from what was found in it.

    Args:
        model: The model.
        found: What :func:`~lightning_kfc.find_layers.find_layers` returned.
    """
    owners: dict[int, list[Layer]] = {}
    for layer in found.layers.values():
        for parameter in layer.parameters():
            owners.setdefault(id(parameter), []).append(layer)
    rows = []
    counted: set[str] = set()
    for name, parameter in model.named_parameters():
        module, _, _ = name.rpartition(".")
        layers = owners.get(id(parameter), [])
        if not parameter.requires_grad:
            row = CoverageRow(name, module, "", "frozen", "requires_grad is False", {}, 0, parameter.numel())
        elif layers:
            adapter = layers[0].adapter
            shapes = {
                _label(layer, layers, key): shape[1:] if shape[0] == 1 else shape
                for layer in layers
                for key, shape in layer.adapter.factor_shapes().items()
            }
            held = sum(layer.nbytes() for layer in layers if layer.name not in counted)
            counted |= {layer.name for layer in layers}
            why = layers[0].reason
            row = CoverageRow(name, module, adapter.kind, adapter.treatment, why, shapes, held, parameter.numel())
        else:
            kind, reason = found.plain[id(parameter)]
            row = CoverageRow(name, module, kind, "plain", reason, {}, 0, parameter.numel())
        rows.append(row)
    return Coverage(tuple(rows))


def _label(layer: Layer, layers: Sequence[Layer], factor: str) -> str:
    """A factor's name, with the part it belongs to where a parameter serves several."""
    return factor if len(layers) == 1 else f"{layer.name.rpartition('.')[2]}.{factor}"
