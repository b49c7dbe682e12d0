"""Write ``layers.md``: the treatment of every kind of layer that has an adapter, with each of its options.

    python docs/generate_layer_table.py

The layers are those of the registry, so that no adapter can be missing; ``layer_cases.py`` holds the texts.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_kfc.layers import Adapter, ParameterAdapter
from lightning_kfc.layers.registry import registered_adapters

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from layer_cases import CASES  # noqa: E402 (from this folder)

HEAD = """\
<!-- Made by generate_layer_table.py; do not edit. -->
# Layers

The treatment of the parameters of each kind of layer. `kfc.coverage()` lists it for each parameter of your model.

- **exact**: the recorded rows rebuild the gradient exactly. The curvature equals the layer's block of the Fisher matrix
  in the named case, and is the paper's approximation in other cases.
- **approximate**: a rougher curvature, as described. *Diagonal*: the Fisher's diagonal alone.
- **plain**: no curvature; the gradient stays unchanged.

The numbers in the last column are those of the tests below the table.
`python -m pytest tests/layers --errors` lists the source of the curvature and the relative error of each test to its
dense matrix or to autograd's gradient.

| Layer | Options | | How | Tests |
|---|---|---|---|---|
"""

TAIL = '''
## Layers of your own

Each parameter of a layer without an adapter gets a diagonal curvature, with the reason in the coverage. With an adapter
the layer gets its own factors. Two methods are enough for a layer with a weight and a bias:

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

The first step compares the gradient from the rows with that of autograd, and raises an error if they differ. A subclass
with its own `forward` does not get its base class's adapter, since it computes something else; if its rows are the
same, register the adapter for the subclass too. A later registration for a class replaces the earlier one, also a
built-in one.
'''


class Table:
    """The lines of the table, and their tests, numbered in the order of their occurrence."""

    def __init__(self) -> None:
        self.tests: dict[str, int] = {}
        self.lines: list[str] = []
        for adapter, classes in sorted(registered_adapters().items(), key=lambda item: _short(item[1][0])):
            if adapter.__module__.startswith("lightning_kfc."):
                self._add(adapter, ", ".join(f"`{name}`" for name in sorted(map(_short, classes))))
        self._add(ParameterAdapter, "anything else")

    def _add(self, adapter: type[Adapter], layer: str) -> None:
        if adapter.__name__ not in CASES:
            raise SystemExit(f"docs/layer_cases.py has no entry for {adapter.__name__}.")
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
