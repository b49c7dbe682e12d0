"""The error of updates by inverses in bfloat16: ``python -m benchmarks.accuracy.precision``.

ResNet-20 and the deep autoencoder are trained for some steps on real digits by KFC. Then two updates of one more
gradient are computed from the same factors, with full and with bfloat16 inverses (``precision.inverses``). Measured are
the relative error and the cosine of the second update over all layers, and the largest error of a layer.

Written to ``results/precision.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.contest.contestants import kfc
from benchmarks.contest.optimizers import BatchLoss, KFCStepper
from benchmarks.contest.tasks import TASKS, Task
from benchmarks.paths import RESULTS
from lightning_kfc.curvature.gradients import gradients_of
from lightning_kfc.factors.inverses import CholeskyInverse

CASES = {"resnet": 128, "autoencoder": 512}


def updates(
    factors: Mapping[str, Mapping[str, Tensor]],
    gradients: Mapping[str, Tensor],
    damping: float,
    *,
    rounded: bool,
) -> dict[str, Tensor]:
    """The update of each layer."""
    found = {}
    for name, kept in factors.items():
        inverse = CholeskyInverse.factorise(kept, damping)
        chosen = inverse.in_precision(torch.bfloat16) if rounded else inverse
        found[name] = chosen.solve(gradients[name]).double().flatten()
    return found


def measure(task: Task, steps: int) -> str:
    """The table's row of one network."""
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
        own = gradients_of(layers[name].trained_parameters())
        assert own is not None
        gradients[name] = layers[name].matrix(own)
    damping = stepper.kfc.damping
    exact, found = (updates(pairs, gradients, damping, rounded=rounded) for rounded in (False, True))
    whole, joint = (torch.cat(list(part.values())) for part in (exact, found))
    error = float((joint - whole).norm() / whole.norm())
    cosine = float(joint @ whole / (joint.norm() * whole.norm()))
    worst = max(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact)
    return f"| {task.title}, {steps} steps | {error:.2%} | {cosine:.5f} | {worst:.2%} |"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| network | relative error of the update | cosine | largest error of a layer |",
        "|---|---|---|---|",
    ]
    for name, batch_size in CASES.items():
        lines.append(measure(TASKS[name].at(batch_size), options.steps))
    (RESULTS / "precision.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
