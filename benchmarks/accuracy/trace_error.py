"""The error of the estimated curvature of reviewed steps.

Tasks with large layers are trained by KFC's defaults. At each review, the estimate
(:func:`lightning_kfc.factors.quadratic_form.estimated_quadratic_form`) of its layers is compared with the exact form.
``python -m benchmarks.accuracy.trace_error`` writes ``results/trace_error.md``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from unittest import mock

import torch
from torch import Tensor

from benchmarks.contest.contestants import CONTESTANTS
from benchmarks.contest.optimizers import BatchLoss
from benchmarks.contest.tasks import TASKS
from benchmarks.paths import RESULTS
from lightning_kfc.curvature import layer as layers
from lightning_kfc.factors.quadratic_form import estimate_pays, estimated_quadratic_form, quadratic_form

STEPS = 60
BATCH_SIZES = (512, 128)


def errors(batch_size: int) -> list[float]:
    """The relative errors of the sums over the estimated layers, one per review, on the deep autoencoder."""
    pairs: list[tuple[float, float]] = []

    def compared(factors: Mapping[str, Tensor], delta: Tensor) -> Tensor:
        found = estimated_quadratic_form(factors, delta)
        if estimate_pays(factors, delta):
            pairs.append((float(found), float(quadratic_form(factors, delta))))
        return found

    task = TASKS["autoencoder"].at(batch_size)
    torch.manual_seed(0)
    model = task.make_model()
    stepper = CONTESTANTS["kfc"].make(model, 0.5, 0)
    batches = task.batches(0)
    found = []
    with mock.patch.object(layers, "estimated_quadratic_form", compared):
        for _ in range(STEPS):
            inputs, targets = next(batches)
            stepper.step(BatchLoss(model, task.loss, inputs, targets))
            if pairs:
                found.append(sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs) - 1)
            pairs.clear()
    return found


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    lines = ["| deep autoencoder, batch | reviews | median error | largest error |", "|---|---|---|---|"]
    for batch_size in BATCH_SIZES:
        sizes = [abs(error) for error in errors(batch_size)]
        middle, largest = 100 * statistics.median(sizes), 100 * max(sizes)
        lines.append(f"| {batch_size} | {len(sizes)} | {middle:.2f} % | {largest:.2f} % |")
    (RESULTS / "trace_error.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
