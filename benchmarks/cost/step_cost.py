"""The cost of a step: ``python -m benchmarks.cost.step_cost`` measures time and memory of two networks.

The numbers are added to ``results/step_cost.json`` by network, threads and clock; ``results/step_cost.md`` has all
tables.

Time: each round makes one step of every kind, the order reversed every other round, so that all run in the same state
of the machine. A kind's cost is the median over rounds of its time divided by that round's plain SGD step.

Kinds of KFC step: *between* refreshes (gradients are only preconditioned), *factors* (with statistics), *refresh*
(with statistics and inverses). The amortised cost of a schedule is
between + (factors - between) / T_cov + (refresh - factors) / T_inv.

Spread (``--spread``): the default schedule, step after step, with inverses refreshed in turns and all at one step. The
median, the 99th percentile and the longest step, the median SGD step = 1.

Memory: each kind runs in separate processes. The growth of a process is the peak of its resident memory minus the
resident memory before the first step. The median over processes, which the allocator makes differ, is divided by SGD's.
Linux only.
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

from benchmarks.contest.contestants import CONTESTANTS
from benchmarks.contest.networks import deep_autoencoder, resnet20
from benchmarks.contest.optimizers import BatchLoss, KFCStepper, Stepper
from benchmarks.contest.tasks import summed_cross_entropy
from benchmarks.paths import RESULTS, ROOT
from lightning_kfc import KFC, Precision, RefreshTiming

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
    "exact": _kfc(1, NEVER, rows_per_dim=None),
    "between_bfloat16": _kfc(NEVER, NEVER, precision=Precision(inverses="bfloat16")),
}
#: T_cov and T_inv of the reported schedules.
SCHEDULES = {"T_cov 10, T_inv 100": (10, 100), "defaults": (10, 20)}

#: Runs of the schedule "defaults" with single steps measured.
RUNS: dict[str, Callable[[nn.Module], Stepper]] = {
    "sgd": _sgd,
    "in turns": _kfc(*SCHEDULES["defaults"]),
    "at one step": _kfc(*SCHEDULES["defaults"], timing=RefreshTiming(stagger_inverses=False)),
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
        self._stepper.step(BatchLoss(self._model, self._workload.loss, *self._batch))


def amortised(between: float, factors: float, refresh: float, t_cov: int, t_inv: int) -> float:
    """The mean cost of a step under a schedule, T_inv a multiple of T_cov."""
    return between + (factors - between) / t_cov + (refresh - factors) / t_inv


def measure_time(workload: Workload, rounds: int, batch_size: int, clock: Callable[[], float]) -> dict[str, float]:
    """The cost of each kind of step, plain SGD step = 1."""
    steps = {kind: Steps(workload, make, batch_size) for kind, make in KINDS.items()}
    for kind in steps:
        for _ in range(2):
            steps[kind].step()
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
    """The median, 99th percentile and maximum over steps of each run, median plain SGD step = 1."""
    runs = {name: Steps(workload, make, batch_size) for name, make in RUNS.items()}
    for run in runs.values():
        # The first period includes the warm-up.
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
    """The spread of steps as a markdown table."""
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
    """The growth of this process in bytes, at its peak, in some steps of one kind."""
    repeated = Steps(workload, KINDS[kind], batch_size)
    # The import of torch has its own peak.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for _ in range(steps):
        repeated.step()
    return resident("VmHWM") - before


def measure_memory(name: str, batch_size: int, threads: int, processes: int) -> dict[str, float]:
    """The growth of processes with steps of one kind, SGD = 1; ``sgd_bytes`` is the growth with SGD."""
    grown = {}
    for kind in ("sgd", "between", "refresh"):
        command = [sys.executable, "-m", "benchmarks.cost.step_cost", name, "--memory-of", kind]
        command += ["--batch-size", str(batch_size), "--threads", str(threads)]
        done = [subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT) for _ in range(processes)]
        grown[kind] = median(int(process.stdout) for process in done)
    ratios = {kind: bytes_grown / grown["sgd"] for kind, bytes_grown in grown.items() if kind != "sgd"}
    return {"sgd_bytes": grown["sgd"], **ratios}


def time_rows(costs: dict[str, float]) -> dict[str, float]:
    """The kinds of step and the schedules by their titles."""
    between, factors, refresh, exact = (costs[kind] for kind in ("between", "factors", "refresh", "exact"))
    rows = {
        "plain SGD step": costs["sgd"],
        "KFC, step between refreshes": between,
        "KFC, step that takes statistics": factors,
        "KFC, step that takes statistics of all rows": exact,
        "KFC, refreshing step": refresh,
        "KFC, step between refreshes, inverses in bfloat16": costs["between_bfloat16"],
    }
    for title, periods in SCHEDULES.items():
        rows[f"KFC, amortised, {title}"] = amortised(between, factors, refresh, *periods)
    title, periods = next(iter(SCHEDULES.items()))
    rows[f"KFC, amortised, {title}, statistics of all rows"] = amortised(
        between, exact, exact + refresh - factors, *periods
    )
    return rows


def table(found: dict[str, Any]) -> str:
    """Markdown: a column for each measurement of one network, a row for each kind of step and schedule, then memory.

    Args:
        found: Results of :func:`measure_time`, by threads and clock; of :func:`measure_memory`, by ``"memory"``.
    """
    times = {key: time_rows(costs) for key, costs in found.items() if key not in ("memory", "spread")}
    lines = [f"| step | {' | '.join(times)} |", f"|---|{'---|' * len(times)}"] if times else []
    titles = next(iter(times.values()), {})
    lines += [f"| {title} | {' | '.join(f'{rows[title]:.2f}' for rows in times.values())} |" for title in titles]
    if "memory" in found:
        memory = found["memory"]
        lines += [
            "",
            f"Peak memory: SGD grows the process by {memory['sgd_bytes'] / 2**20:.0f} MiB; KFC by "
            f"{memory['between']:.2f} times that where only the first steps refresh, by {memory['refresh']:.2f} times "
            "that where every step does.",
        ]
    for title, numbers in found.get("spread", {}).items():
        lines += ["", f"Spread over the steps of the default schedule ({title}):", "", spread_table(numbers)]
    return "\n".join(lines)


def report(results: dict[str, dict[str, Any]]) -> str:
    """Markdown of all results."""
    parts = []
    for name, found in results.items():
        workload = WORKLOADS[name]
        parts.append(f"**{workload.title}, batch {workload.batch_size}** (plain SGD step = 1)\n\n{table(found)}\n")
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS, nargs="?", help="one network; both by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, help="another than the network's own; then nothing is written")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--spread", type=int, metavar="STEPS", help="measure the spread over so many steps alone")
    parser.add_argument("--memory", action="store_true", help="measure peak memory alone")
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    parser.add_argument("--processes", type=int, default=5, help="for each kind of step whose memory is measured")
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=RESULTS / "step_cost.json")
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    if options.memory_of:
        workload = WORKLOADS[options.workload]
        print(memory_growth(workload, options.memory_of, options.batch_size or workload.batch_size))
        return
    results: dict[str, dict[str, Any]] = json.loads(options.json.read_text()) if options.json.exists() else {}
    for name in [options.workload] if options.workload else WORKLOADS:
        workload = WORKLOADS[name]
        batch_size = options.batch_size or workload.batch_size
        found: dict[str, Any] = {}
        if options.spread:
            spread = measure_spread(workload, options.spread, batch_size, CLOCKS[options.clock])
            found["spread"] = {f"{options.clock} time, {options.spread} steps": spread}
        elif not options.memory:
            key = f"{options.clock} time, {options.threads} thread{'s' if options.threads > 1 else ''}"
            found[key] = measure_time(workload, options.rounds, batch_size, CLOCKS[options.clock])
        if not options.no_memory and not options.spread:
            found["memory"] = measure_memory(name, batch_size, options.threads, options.processes)
        print(f"{workload.title}, batch {batch_size}\n\n{table(found)}\n", flush=True)
        results.setdefault(name, {}).update(found)
    if options.batch_size is None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(report(results))


if __name__ == "__main__":
    main()
