"""What bfloat16 does to the update: ``python -m benchmarks.precision``.

ResNet-20 and the deep autoencoder are trained for some steps on real digits by KFC. Then the update of one more
gradient is made from the same factors in four ways: as they are, with the inverses rounded to bfloat16
(``inverse_precision``), with the factors rounded (``factor_storage``), and with both. The relative error and the cosine
to the first, over all layers together, and the largest error of a layer.

Written to ``results/precision.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contestants import kfc
from benchmarks.optimizers import BatchLoss, KFCStepper
from benchmarks.tasks import TASKS, Task
from lightning_kfc.factors.inverse import CholeskyInverse

RESULT = Path(__file__).parent / "results" / "precision.md"
CASES = {"resnet": 128, "autoencoder": 512}
WAYS = {
    "`inverse_precision`": (False, True),
    '`factor_storage="bfloat16"`': (True, False),
    "both": (True, True),
}


def rounded(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors as they come out of bfloat16."""
    return {name: factor.bfloat16().to(factor.dtype) for name, factor in factors.items()}


def updates(
    factors: Mapping[str, Mapping[str, Tensor]],
    gradients: Mapping[str, Tensor],
    damping: float,
    round_factors: bool,
    round_inverses: bool,
) -> dict[str, Tensor]:
    """The update of each layer."""
    found = {}
    for name, kept in factors.items():
        inverse = CholeskyInverse.factorise(rounded(kept) if round_factors else kept, damping)
        chosen = inverse.in_precision(torch.bfloat16) if round_inverses else inverse
        found[name] = chosen.solve(gradients[name]).double().flatten()
    return found


def measure(task: Task, steps: int) -> list[str]:
    """The table's rows of one network."""
    torch.manual_seed(0)
    model = task.make_model()
    stepper = kfc("kfc", "KFC").make(model, 0.5, 0)
    assert isinstance(stepper, KFCStepper)
    batches = task.batches(0)
    for _ in range(steps):
        stepper.step(BatchLoss(model, task.loss, *next(batches)))
    model.zero_grad()
    BatchLoss(model, task.loss, *next(batches))().backward()
    layers = stepper.kfc.layers
    pairs = {name: layer.curvature() for name, layer in layers.items() if set(layer.factors) == {"A", "G"}}
    gradients = {}
    for name in pairs:
        own = layers[name].gradients()
        assert own is not None
        gradients[name] = layers[name].matrix(own)
    damping = stepper.kfc.damping
    exact = updates(pairs, gradients, damping, False, False)
    whole = torch.cat(list(exact.values()))
    rows = []
    for title, (factors, inverses) in WAYS.items():
        found = updates(pairs, gradients, damping, factors, inverses)
        joint = torch.cat(list(found.values()))
        error = float((joint - whole).norm() / whole.norm())
        cosine = float(joint @ whole / (joint.norm() * whole.norm()))
        worst = max(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact)
        rows.append(f"| {task.title}, {steps} steps | {title} | {error:.2%} | {cosine:.5f} | {worst:.2%} |")
    return rows


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| network | in bfloat16 | relative error of the update | cosine | largest error of a layer |",
        "|---|---|---|---|---|",
    ]
    for name, batch_size in CASES.items():
        lines += measure(TASKS[name].at(batch_size), options.steps)
    RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
