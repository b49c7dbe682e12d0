"""Writes ``layers.md``: every kind of layer that has an adapter, and how it is treated with each of its options.

    python docs/generate_layer_table.py

The layers are those of the registry, so that a new adapter shows at once; ``layer_cases.py`` holds what it says.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_kfc.layers import Adapter, ParameterAdapter
from lightning_kfc.layers.registry import registered_adapters

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from layer_cases import CASES  # noqa: E402 (it lies beside this file)

HEAD = """\
<!-- Made by generate_layer_table.py; do not edit. -->
# Layers

How the parameters of each kind of layer are treated. `kfc.coverage()` says the same of your model, parameter by
parameter.

- **exact**: the recorded rows rebuild the gradient exactly, and the curvature equals the layer's block of the Fisher
  matrix in the case that is named; elsewhere it is the approximation that the paper makes.
- **approximate**: the curvature is a rougher one, as said. *Diagonal*: the Fisher's diagonal alone.
- **plain**: no curvature; the gradient stays as it is.

The numbers in the last column are those of the tests that show it, which are listed below the table.

| Layer | Options | | How | Tests |
|---|---|---|---|---|
"""

TAIL = '''
## Layers of your own

A layer that no adapter serves trains all the same: each of its parameters gets a diagonal curvature, and the coverage
says why. With an adapter it gets its own factors. Two methods are enough for a layer with a weight and a bias:

```python
from torch import nn
from torch.nn import functional as F

from lightning_kfc import register_adapter
from lightning_kfc.layers import Adapter


class EqualizedLinear(nn.Linear):
    """Its weight has a constant factor, as in StyleGAN."""

    def forward(self, x):
        return F.linear(x * self.in_features**-0.5, self.weight, self.bias)


@register_adapter(EqualizedLinear)
class EqualizedLinearAdapter(Adapter):
    def weight_input_rows(self, forward):
        x = forward.first("x") * self.module.in_features**-0.5
        return x.reshape(len(x), -1, 1, x.shape[-1])  # (examples, positions, groups, d_in)

    def output_rows(self, output_gradient):
        g = output_gradient
        return g.reshape(len(g), -1, 1, g.shape[-1])  # (examples, positions, groups, d_out)
```

A layer that scales and shifts units one by one, such as a norm layer, takes one method:

```python
import torch

from lightning_kfc.layers import ScaleShiftAdapter


class UnitNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * F.normalize(x, dim=-1)


@register_adapter(UnitNorm)
class UnitNormAdapter(ScaleShiftAdapter):
    def normalised(self, input, context):
        return F.normalize(input, dim=-1)
```

The first step compares what the rows rebuild with autograd's gradient, and stops with an error where they differ. A
subclass with a `forward` of its own is not served by its base class's adapter, since it computes something
else; where its rows are the same after all, register that adapter for it too. A later registration for a class replaces
the earlier one, also of the built-in ones.
'''


class Table:
    """The lines of the table, and the tests that they name, numbered in the order in which they come up."""

    def __init__(self) -> None:
        self.tests: dict[str, int] = {}
        self.lines: list[str] = []
        for adapter, classes in sorted(registered_adapters().items(), key=lambda item: _short(item[1][0])):
            if adapter.__module__.startswith("lightning_kfc."):
                self._add(adapter, ", ".join(f"`{name}`" for name in sorted(map(_short, classes))))
        self._add(ParameterAdapter, "anything else")

    def _add(self, adapter: type[Adapter], layer: str) -> None:
        if adapter.__name__ not in CASES:
            raise SystemExit(f"docs/layer_cases.py says nothing of {adapter.__name__}.")
        for case in CASES[adapter.__name__]:
            numbers = sorted({self.tests.setdefault(test, len(self.tests) + 1) for test in case.tests})
            cells = (layer, case.options, case.verdict, case.how, ", ".join(map(str, numbers)))
            self.lines.append(f"| {' | '.join(cells)} |\n")
            layer = ""


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def page() -> str:
    """The whole page."""
    table = Table()
    tests = "".join(f"{number}. `{test}`\n" for test, number in table.tests.items())
    return f"{HEAD}{''.join(table.lines)}{TAIL}\n## The tests of the table\n\nAll are in `tests/`.\n\n{tests}"


if __name__ == "__main__":
    (HERE / "layers.md").write_text(page(), encoding="utf-8")
