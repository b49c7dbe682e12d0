"""Which parameters are preconditioned, how, and why the others are not."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_kfc.layer import Layer
from lightning_kfc.layers import Adapter, adapter_for


@dataclass(frozen=True)
class CoverageRow:
    """How one parameter is treated.

    Attributes:
        parameter: Its name in the model.
        module: The name of the module that owns it.
        kind: The kind of layer.
        treatment: ``"kfc"`` (preconditioned), ``"plain"`` (its own gradient) or ``"frozen"``.
        reason: Why it is not preconditioned; empty where it is.
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
        covered = [row for row in self.rows if row.treatment == "kfc"]
        plain = [row for row in self.rows if row.treatment == "plain"]
        layers: dict[str, list[CoverageRow]] = {}
        for row in covered:
            layers.setdefault(row.module, []).append(row)
        lines = []
        if layers:
            lines += _table(
                ("Layer", "Kind", "Parameters", "Factors", "Memory"),
                [
                    (
                        name,
                        rows[0].kind,
                        f"{sum(row.numel for row in rows):,}",
                        ", ".join(f"{k} {'x'.join(map(str, s))}" for k, s in rows[0].factor_shapes.items()),
                        _size(sum(row.bytes for row in rows)),
                    )
                    for name, rows in layers.items()
                ],
            )
        done, total = (sum(row.numel for row in part) for part in (covered, [*covered, *plain]))
        share = f" ({100 * done / total:.1f}%)" if total else ""
        lines.append(
            f"Preconditioned: {done:,} of {total:,} trainable parameters{share}, "
            f"{_size(sum(row.bytes for row in covered))} of factors and inverses."
        )
        reasons: dict[str, list[str]] = {}
        for row in plain:
            reasons.setdefault(row.reason, []).append(row.parameter)
        lines += [f"Plain gradient ({reason}): {_shorten(names)}" for reason, names in reasons.items()]
        return "\n".join(lines)


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


@dataclass
class Discovered:
    """What was found in a model.

    Attributes:
        layers: The layers to precondition, by name.
        reasons: For each parameter that no layer owns, by ``id``: its module's kind, and why.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    reasons: dict[int, tuple[str, str]] = field(default_factory=dict)


def discover(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    weight_sharing: str = "expand",
) -> Discovered:
    """Find the layers of a model.

    Modules that share all their parameters form one layer; a parameter shared in any other way is left out,
    since no module alone sees all of its rows.

    Args:
        model: The model.
        include: Glob patterns over module names: only these are preconditioned.
        exclude: Glob patterns over module names: these are not.
        weight_sharing: ``"expand"`` or ``"reduce"``.

    Raises:
        ValueError: If a pattern matches no module that has parameters of its own, or no layer is left.
    """
    owners = {name: module for name, module in model.named_modules() if module._parameters}
    _check_patterns_match("include", include, owners)
    _check_patterns_match("exclude", exclude, owners)
    unseen = _modules_never_called(model)
    found = Discovered()
    groups: dict[tuple[type[Adapter], tuple[int, ...]], list[tuple[str, Adapter]]] = {}
    uses: dict[int, set[object]] = {}
    for name, module in owners.items():
        parameters = tuple(id(p) for p in module._parameters.values() if p is not None)
        reason = _refusal(name, module, include, exclude, unseen)
        use: object = name
        if reason is None:
            adapter_type = adapter_for(module)
            assert adapter_type is not None
            use = (adapter_type, parameters)
            groups.setdefault(use, []).append((name, adapter_type(module, weight_sharing)))
        for parameter in parameters:
            uses.setdefault(parameter, set()).add(use)
            if reason is not None:
                found.reasons[parameter] = (type(module).__name__, reason)
    for use, members in groups.items():
        name, adapter = members[0]
        if all(uses[parameter] == {use} for parameter in use[1]):
            found.layers[name] = Layer(name, [adapter for _, adapter in members])
            continue
        for parameter in use[1]:
            tied = "shared" if len(uses[parameter]) > 1 else "beside a parameter that is shared"
            found.reasons[parameter] = (adapter.kind, f"{tied} with a module that uses it otherwise")
    if not any(adapter.own_parameters() for layer in found.layers.values() for adapter in layer.adapters):
        listed = "\n".join(
            f"  {name}: {_refusal(name, m, include, exclude, unseen) or 'frozen'}" for name, m in owners.items()
        )
        raise ValueError(
            "KFC found no layer to precondition: there must be at least one trainable module with an adapter "
            f"(Linear, Conv2d, ...), not excluded.\n{listed or '  the model has no parameters'}"
        )
    return found


def _refusal(
    name: str,
    module: nn.Module,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    unseen: dict[str, str],
) -> str | None:
    adapter_type = adapter_for(module)
    if adapter_type is None:
        return f"no adapter for {type(module).__name__}"
    if include is not None and not _matches(name, include):
        return "not in include"
    if exclude is not None and _matches(name, exclude):
        return "in exclude"
    if name in unseen:
        return unseen[name]
    if "weight" not in module._parameters:
        return "its weight is re-parametrised"
    return adapter_type.refusal(module)


def _modules_never_called(model: nn.Module) -> dict[str, str]:
    """Modules that serve only as holders of weights, with the reason."""
    return {
        f"{name}.out_proj".lstrip("."): "MultiheadAttention uses the weight without calling the module"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns_match(option: str, patterns: Sequence[str] | None, owners: dict[str, nn.Module]) -> None:
    for pattern in patterns or ():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in owners):
            raise ValueError(
                f"{option} pattern {pattern!r} matches no module that has parameters. "
                f"The modules are: {', '.join(owners) or 'none'}."
            )


def coverage_of(model: nn.Module, found: Discovered, dropped: dict[str, str], inverse_bytes: float) -> Coverage:
    """Make the coverage of a model from what was found in it.

    Args:
        model: The model.
        found: What :func:`discover` returned.
        dropped: Layers found but not preconditioned after all, with the reason.
        inverse_bytes: Bytes of an inverse per byte of the factors, for the layers that have none yet.
    """
    owner: dict[int, Layer] = {}
    for layer in found.layers.values():
        for adapter in layer.adapters:
            for own in adapter.module._parameters.values():
                if own is not None:
                    owner[id(own)] = layer
    rows = []
    seen: set[str] = set()
    for name, parameter in model.named_parameters():
        module, _, _ = name.rpartition(".")
        layer_of = owner.get(id(parameter))
        if not parameter.requires_grad:
            rows.append(CoverageRow(name, module, "", "frozen", "frozen", {}, 0, parameter.numel()))
        elif layer_of is not None and layer_of.name not in dropped:
            groups, d_out, d_in = layer_of.adapter.matrix_shape()
            leading = (groups,) if groups > 1 else ()
            shapes = {"A": (*leading, d_in, d_in), "G": (*leading, d_out, d_out)}
            width = max(4, parameter.element_size())
            estimate = int(groups * (d_in**2 + d_out**2) * width * (1 + inverse_bytes))
            held = 0 if layer_of.name in seen else (layer_of.nbytes() if layer_of.inverse is not None else estimate)
            seen.add(layer_of.name)
            rows.append(
                CoverageRow(name, layer_of.name, layer_of.adapter.kind, "kfc", "", shapes, held, parameter.numel())
            )
        else:
            if layer_of is not None:
                kind, reason = layer_of.adapter.kind, dropped[layer_of.name]
            else:
                kind, reason = found.reasons[id(parameter)]
            rows.append(CoverageRow(name, module, kind, "plain", reason, {}, 0, parameter.numel()))
    return Coverage(tuple(rows))
