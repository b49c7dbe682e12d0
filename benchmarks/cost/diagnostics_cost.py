"""The cost of the numbers in the log: ``python -m benchmarks.cost.diagnostics_cost``.

A run of the default schedule takes its numbers every 50 steps, the Trainer's default. The time for the numbers is
divided by the time of the run. The clocks of a step's phases are measured separately.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import mean

import torch

from benchmarks.cost.step_cost import WORKLOADS
from lightning_kfc import KFC
from lightning_kfc.monitoring.timing import StepTimes
from lightning_kfc.reporting.diagnostics import Diagnostics

LOG_EVERY_N_STEPS = 50


class Timed:
    """Adds up the CPU seconds of calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[..., object], *args: object, **kwargs: object) -> None:
        """Call a function."""
        started = time.process_time()
        function(*args, **kwargs)
        self.seconds += time.process_time() - started


def run(name: str, steps: int, batch_size: int | None) -> dict[str, float]:
    """Seconds of a mean step and of one inspection of the layers, and the share of the numbers in the run's time."""
    torch.manual_seed(0)
    workload = WORKLOADS[name]
    model = workload.make_model()
    x, y = workload.make_batch(batch_size or workload.batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    kfc = KFC(model)
    timed, diagnostics, looks, taken = Timed(), Diagnostics(kfc), [], []
    for number in range(steps + 1):
        look = number % LOG_EVERY_N_STEPS == 0
        spent, started = timed.seconds, time.process_time()
        kfc.times.begin_step(x.device)
        optimizer.zero_grad()
        with kfc.capture():
            loss = workload.loss(model(x), y)
        kfc.update(loss)
        loss.backward()
        timed(diagnostics.begin_step, look=look)
        if look:
            inspect = diagnostics._inspect
            kfc.inspect = lambda ready, updates, inspect=inspect: timed(inspect, ready, updates)
        kfc.precondition(optimizer=optimizer)
        timed(diagnostics.end_step)
        if look:
            timed(diagnostics.numbers)
        optimizer.step()
        kfc.times.end_step()
        # The first step includes the setup.
        if number > 0:
            taken.append(time.process_time() - started)
            looks += [timed.seconds - spent] if look else []
        else:
            timed.seconds = 0.0
    return {"step": mean(taken), "look": mean(looks), "share": timed.seconds / sum(taken)}


def clocks(cycles: int = 2000) -> float:
    """Seconds of the clocks in one step with all phases."""
    times = StepTimes()
    started = time.process_time()
    for _ in range(cycles):
        times.begin_step(torch.device("cpu"))
        for part in ("statistics", "statistics", "inverses", "statistics", "preconditioning", "reviews"):
            with times.phase(part):
                pass
        times.end_step()
    return (time.process_time() - started) / cycles


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS, nargs="?", default="resnet20")
    parser.add_argument("--steps", type=int, default=2 * LOG_EVERY_N_STEPS)
    parser.add_argument("--batch-size", type=int, help="the workload's own by default")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found, clock = run(options.workload, options.steps, options.batch_size), clocks()
    print(f"{WORKLOADS[options.workload].title}, {options.steps} steps, numbers every {LOG_EVERY_N_STEPS}, CPU time")
    print(f"mean step {1e3 * found['step']:.1f} ms, one look {1e3 * found['look']:.1f} ms")
    print(f"numbers take {100 * found['share']:.2f}% of the time; clocks {1e6 * clock:.0f} us a step", end="")
    print(f" ({100 * clock / found['step']:.3f}%)")


if __name__ == "__main__":
    main()
