"""A layer's fields are assigned in its own file alone."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning_kfc

PACKAGE = Path(lightning_kfc.__file__).parent
#: Fields of ``Layer`` with a name that no other class has a field of.
FIELDS = ("pending", "rows", "moments", "inverse", "previous_inverse", "factorised_at", "averages", "reason", "roles")
OWN = PACKAGE / "curvature" / "layer.py"


def assigned(path: Path) -> list[str]:
    """The attributes of other objects than ``self`` that a file assigns."""
    stores = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
    ]
    return [f"{path.name}:{node.lineno}: {ast.unparse(node)}" for node in stores if ast.unparse(node.value) != "self"]


def test_nobody_else_assigns_a_field_of_a_layer() -> None:
    found = [line for path in PACKAGE.rglob("*.py") if path != OWN for line in assigned(path)]
    assert [line for line in found if line.endswith(tuple(f".{name}" for name in FIELDS))] == []
    # Of a name that others have as well, only where the object is called a layer.
    assert [line for line in found if line.endswith((".layer.name", " layer.name", "].name"))] == []
