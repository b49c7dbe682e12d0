"""What making inverses beside the training does to the time of steps: ``python -m benchmarks.background_inverses``.

The deep autoencoder with the shipped schedule, after its warm-up; wall time. Runs take turns by periods of the
inverses, not by steps, since what one of them does beside its own steps must not fall into those of another: each ends
its part with :meth:`~lightning_kfc.KFC.join`. The order is reversed every other round.

Written to ``results/background_inverses.md``: the median, the 99th percentile and the longest step, and the mean, in
milliseconds and with the median plain SGD step as 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, quantiles

import torch
from torch import nn

from benchmarks.optimizers import KFCStepper, Stepper
from benchmarks.step_cost import SCHEDULES, WORKLOADS, Steps, Workload, _kfc, _sgd

PERIODS = SCHEDULES["defaults"]
RUNS: dict[str, Callable[[nn.Module], Stepper]] = {
    "plain SGD": _sgd,
    "all at one step": _kfc(*PERIODS, stagger_inverses=False),
    "in turns (default)": _kfc(*PERIODS),
    "all at one step, in the background": _kfc(*PERIODS, stagger_inverses=False, background_inverses=True),
    "in turns, in the background": _kfc(*PERIODS, background_inverses=True),
}
RESULTS = Path(__file__).parent / "results" / "background_inverses.md"


def measure(
    workload: Workload, rounds: int, batch_size: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """The seconds of each step of each run, a period of the inverses a round."""
    period = PERIODS[1]
    steppers: dict[str, Stepper] = {}

    def keeping(name: str, make: Callable[[nn.Module], Stepper]) -> Callable[[nn.Module], Stepper]:
        def made(model: nn.Module) -> Stepper:
            steppers[name] = make(model)
            return steppers[name]

        return made

    runs = {name: Steps(workload, keeping(name, make), batch_size) for name, make in RUNS.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    # The first period has the warm-up in it, and is not counted.
    for number in range(rounds + 1):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            for _ in range(period):
                started = clock()
                runs[name].step()
                if number:
                    taken[name].append(clock() - started)
            stepper = steppers[name]
            if isinstance(stepper, KFCStepper):
                stepper.kfc.join()
    return taken


def table(taken: dict[str, list[float]]) -> str:
    """A markdown table of the runs."""
    one = median(taken["plain SGD"])
    rows = []
    for name, seconds in taken.items():
        p99 = quantiles(seconds, n=100, method="inclusive")[98]
        cells = [f"{1e3 * s:.1f} ({s / one:.2f})" for s in (median(seconds), p99, max(seconds), mean(seconds))]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(["| inverses | p50, ms | p99 | longest step | mean |", "|---|---|---|---|---|", *rows])


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, help="another than the network's own; then nothing is written")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    workload = WORKLOADS["autoencoder"]
    taken = measure(workload, options.rounds, options.batch_size or workload.batch_size)
    steps = len(taken["plain SGD"])
    title = (
        f"**{workload.title}, batch {workload.batch_size}**, wall time, {options.threads} threads, {steps} steps a run"
    )
    text = f"{title} (median plain SGD step = 1)\n\n{table(taken)}\n"
    print(text)
    if options.batch_size is None:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
