"""What a step costs: ``python -m benchmarks.step_cost`` for time, ``--memory`` for memory.

Time: each round makes one step of every kind, the order reversed every other round, so that all meet the same state
of the machine; a kind's cost is the median over rounds of its time divided by that round's plain SGD step.

Kinds of KFC step: *between* refreshes (gradients are only preconditioned), *factors* (statistics are taken), *refresh*
(statistics and inverses). A schedule's amortised cost follows from them:
between + (factors - between) / T_cov + (refresh - factors) / T_inv.

Spread (``--spread``): the shipped schedule, step after step, with inverses refreshed in turns and all at one step. The
median, the 99th percentile and the longest step, the median SGD step being 1: what a mean does not tell.

Memory: each kind runs in a process of its own; its growth is the peak of the resident memory over the whole run,
less what was resident before the first step, and is divided by SGD's. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contestants import CONTESTANTS
from benchmarks.networks import deep_autoencoder, resnet20
from benchmarks.optimizers import KFCStepper, Stepper
from benchmarks.tasks import summed_cross_entropy
from lightning_kfc import KFC

NEVER = 10**9
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class Workload:
    """A network and a batch to step on."""

    title: str
    make_model: Callable[[], nn.Module]
    make_batch: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch_size: int


def _images(size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 32, 32), torch.randint(0, 10, (size,))


def _pixels(size: int) -> tuple[Tensor, Tensor]:
    pixels = torch.rand(size, 784)
    return pixels, pixels


WORKLOADS = {
    "resnet20": Workload("ResNet-20, 3x32x32", resnet20, _images, F.cross_entropy, 128),
    "autoencoder": Workload("deep autoencoder", deep_autoencoder, _pixels, summed_cross_entropy, 512),
}


def _sgd(model: nn.Module) -> Stepper:
    return CONTESTANTS["sgd"].make(model, 0.01, 0)


def _kfc(factors: int, inverses: int, **settings: Any) -> Callable[[nn.Module], Stepper]:
    def make(model: nn.Module) -> Stepper:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
        kfc = KFC(model, factor_every_n_steps=factors, inverse_every_n_steps=inverses, warmup_steps=1, **settings)
        return KFCStepper(kfc, optimizer)

    return make


#: The kinds of step; each is steady after its second step.
KINDS: dict[str, Callable[[nn.Module], Stepper]] = {
    "sgd": _sgd,
    "between": _kfc(NEVER, NEVER),
    "factors": _kfc(1, NEVER),
    "refresh": _kfc(1, 1),
}
#: T_cov and T_inv of the schedules whose amortised cost is reported.
SCHEDULES = {"T_cov 10, T_inv 100": (10, 100), "defaults": (10, 20)}

#: Runs of the schedule "defaults" whose steps are looked at one by one.
RUNS: dict[str, Callable[[nn.Module], Stepper]] = {
    "sgd": _sgd,
    "in turns": _kfc(*SCHEDULES["defaults"]),
    "at one step": _kfc(*SCHEDULES["defaults"], stagger_inverses=False),
}


class Steps:
    """Repeats one kind of step on one batch."""

    def __init__(self, workload: Workload, make: Callable[[nn.Module], Stepper], batch_size: int) -> None:
        torch.manual_seed(0)
        self._workload = workload
        self._model = workload.make_model()
        self._batch = workload.make_batch(batch_size)
        self._stepper = make(self._model)

    def step(self) -> None:
        """One step."""
        inputs, targets = self._batch
        self._stepper.step(lambda: self._workload.loss(self._model(inputs), targets))


def amortised(between: float, factors: float, refresh: float, t_cov: int, t_inv: int) -> float:
    """The mean cost of a step under a schedule, T_inv a multiple of T_cov."""
    return between + (factors - between) / t_cov + (refresh - factors) / t_inv


def measure_time(workload: Workload, rounds: int, batch_size: int, clock: Callable[[], float]) -> dict[str, float]:
    """The cost of each kind of step, a plain SGD step being 1."""
    steps = {kind: Steps(workload, make, batch_size) for kind, make in KINDS.items()}
    for kind in steps.values():
        for _ in range(2):
            kind.step()
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        taken = {}
        for kind in list(steps)[:: 1 if number % 2 else -1]:
            started = clock()
            steps[kind].step()
            taken[kind] = clock() - started
        for kind, seconds in taken.items():
            ratios[kind].append(seconds / taken["sgd"])
    return {kind: median(values) for kind, values in ratios.items()}


def measure_spread(
    workload: Workload, steps: int, batch_size: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """The median, 99th percentile and maximum over steps of each run, the median plain SGD step being 1."""
    runs = {name: Steps(workload, make, batch_size) for name, make in RUNS.items()}
    for run in runs.values():
        # The first period has the warm-up in it.
        for _ in range(SCHEDULES["defaults"][1]):
            run.step()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            started = clock()
            run.step()
            taken[name].append(clock() - started)
    one = median(taken["sgd"])
    return {
        name: {"p50": median(t) / one, "p99": quantiles(t, n=100, method="inclusive")[98] / one, "max": max(t) / one}
        for name, t in taken.items()
    }


def spread_table(numbers: dict[str, dict[str, float]]) -> str:
    """As a markdown table."""
    titles = {"sgd": "plain SGD", "in turns": "KFC, inverses in turns", "at one step": "KFC, all inverses at one step"}
    rows = [f"| {titles[name]} | {n['p50']:.2f} | {n['p99']:.2f} | {n['max']:.2f} |" for name, n in numbers.items()]
    return "\n".join(["| run | p50 | p99 | longest step |", "|---|---|---|---|", *rows])


def resident(field: str) -> int:
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (the peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only.")


def memory_growth(workload: Workload, kind: str, batch_size: int, steps: int = 3) -> int:
    """Bytes by which this process grows at its peak while it makes some steps of one kind."""
    repeated = Steps(workload, KINDS[kind], batch_size)
    # Importing torch has its own peak, which is not a step's.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for _ in range(steps):
        repeated.step()
    return resident("VmHWM") - before


def measure_memory(name: str, batch_size: int, threads: int) -> dict[str, float]:
    """The growth of each kind's own process, SGD's being 1; ``sgd_bytes`` has that."""
    grown = {}
    for kind in ("sgd", "refresh"):
        command = [sys.executable, "-m", "benchmarks.step_cost", name, "--memory-of", kind]
        command += ["--batch-size", str(batch_size), "--threads", str(threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        grown[kind] = int(done.stdout)
    return {"sgd_bytes": grown["sgd"], "kfc": grown["refresh"] / grown["sgd"]}


def time_table(costs: dict[str, float]) -> str:
    """The kinds of step and the schedules as a markdown table."""
    rows = [("plain SGD step", costs["sgd"]), ("KFC, step between refreshes", costs["between"])]
    rows += [("KFC, step that takes statistics", costs["factors"]), ("KFC, refreshing step", costs["refresh"])]
    rows += [
        (f"KFC, amortised, {title}", amortised(costs["between"], costs["factors"], costs["refresh"], *periods))
        for title, periods in SCHEDULES.items()
    ]
    return "\n".join(["| step | cost |", "|---|---|", *(f"| {title} | {cost:.2f} |" for title, cost in rows)])


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS, nargs="?", default="resnet20")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, help="the workload's own by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--spread", type=int, metavar="STEPS", help="the spread over so many steps of a run instead")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    workload = WORKLOADS[options.workload]
    batch_size = options.batch_size or workload.batch_size
    if options.memory_of:
        print(memory_growth(workload, options.memory_of, batch_size))
        return
    print(f"{workload.title}, batch {batch_size}, {options.threads} thread(s)")
    if options.spread:
        numbers: Any = measure_spread(workload, options.spread, batch_size, CLOCKS[options.clock])
        print(f"{options.clock} time of {options.spread} steps, median plain SGD step = 1\n")
        print(spread_table(numbers))
    elif options.memory:
        numbers = measure_memory(options.workload, batch_size, options.threads)
        print(
            f"SGD grows the process by {numbers['sgd_bytes'] / 2**20:.0f} MiB, KFC by {numbers['kfc']:.2f} times that."
        )
    else:
        numbers = measure_time(workload, options.rounds, batch_size, CLOCKS[options.clock])
        print(f"{options.clock} time, medians of {options.rounds} rounds, plain SGD step = 1\n")
        print(time_table(numbers))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
