"""The end of longer trainings with rarer statistics, inverses and reviews from step 100 on.

Each training has 400 steps, with a learning rate that falls to 0 over the second half. The tasks are those that choose
constants, as in :mod:`benchmarks.accuracy.damping_unit`. Run it by ``python -m benchmarks.accuracy.later_periods``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from statistics import median
from unittest import mock

import torch

from benchmarks.away.tasks import AWAY
from benchmarks.contest.contestants import SHIPPED
from benchmarks.contest.optimizers import BatchLoss, KFCStepper
from benchmarks.contest.tasks import TASKS, Task
from benchmarks.paths import RESULTS
from lightning_kfc import KFC, RefreshTiming
from lightning_kfc.trust_region import region

STEPS = 400
#: By title: the factor on the periods, and the steps between reviews, from step 100 on.
VARIANTS = {
    "the same": (1, 10),
    "reviews every 50": (1, 50),
    "periods x 2, reviews every 50": (2, 50),
    "periods x 5, reviews every 50": (5, 50),
}
NETWORKS = (TASKS["resnet"].at(128), *(AWAY[name] for name in ("separable", "vae", "table_classification", "picture")))


@dataclass
class Training:
    """One training.

    Args:
        task: The task.
        seed: Of the weights, the batches and the samples of the Fisher.
        later_periods: The factor on the periods.

    Attributes:
        seconds: CPU seconds of the steps so far.
    """

    task: Task
    seed: int
    later_periods: int
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Build model, optimizer and KFC."""
        torch.manual_seed(self.seed)
        self.model = self.task.make_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.5)
        timing = RefreshTiming(later_periods=self.later_periods)
        self.stepper = KFCStepper(KFC(self.model, seed=self.seed, **{**SHIPPED, "timing": timing}), self.optimizer)

    def step(self, number: int, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Make one step on a batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.5 * min(1.0, 2 * (1 - number / STEPS))
        started = time.process_time()
        self.stepper.step(BatchLoss(self.model, self.task.loss, *batch))
        self.seconds += time.process_time() - started


def measure(task: Task, seed: int) -> dict[str, tuple[float, float]]:
    """By variant: the training loss at the end, and the CPU seconds in those of the first variant; all in turns."""
    runs = {title: Training(task, seed, periods) for title, (periods, _) in VARIANTS.items()}
    for number, batch in zip(range(STEPS), task.batches(seed), strict=False):
        for title, (_, every) in VARIANTS.items():
            with mock.patch.object(region, "LATER_REVIEWS", every):
                runs[title].step(number, batch)
    first = next(iter(runs.values())).seconds
    return {title: (task.training_loss(run.model), run.seconds / first) for title, run in runs.items()}


def table(found: dict[str, list[dict[str, tuple[float, float]]]]) -> str:
    """The medians over seeds as a markdown table."""
    seeds = max(len(runs) for runs in found.values())
    lines = [
        f"Training loss after {STEPS} steps, and CPU time in that of the first column; medians of {seeds} seeds.",
        "",
        "| from step 100 on | " + " | ".join(VARIANTS) + " |",
        "|" + "---|" * (len(VARIANTS) + 1),
    ]
    for label, runs in found.items():
        cells = (f"{median(r[t][0] for r in runs):.4g} / {median(r[t][1] for r in runs):.2f}" for t in VARIANTS)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the table after each task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, tuple[float, float]]]] = {}
    for task in NETWORKS:
        found[task.label] = [measure(task, seed) for seed in range(options.seeds)]
        (RESULTS / "later_periods.md").write_text(table(found))
        print(table(found), flush=True)


if __name__ == "__main__":
    main()
