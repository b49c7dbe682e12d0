"""The cost of a later step at the defaults, by phase: ``python -m benchmarks.cost.later_steps``.

SGD and KFC at its defaults train the same network on the same batches, in turns of one step. The first ten steps of KFC
are not counted. The cost is the CPU time of all counted steps, including reviews and refreshes, relative to SGD; the
shares of the phases are those of KFC's own clock. ``--profile TASK`` prints the profile of a run by Python function.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
from statistics import median

import torch

from benchmarks.contest.contestants import CONTESTANTS
from benchmarks.contest.optimizers import BatchLoss, KFCStepper, Stepper, TimedStepper
from benchmarks.contest.tasks import TASKS, Task
from benchmarks.paths import RESULTS
from lightning_kfc.monitoring.timing import PHASES, REST

#: The networks, each with its batch size.
NETWORKS = {"resnet": 128, "conv": 128, "vit": 128, "autoencoder": 128}
#: KFC's steps that are not counted: those of the default ``warmup_steps``.
FIRST = 10


def _contestant(name: str, task: Task, lr: float) -> tuple[torch.nn.Module, Stepper]:
    torch.manual_seed(0)
    model = task.make_model()
    return model, CONTESTANTS[name].make(model, lr, 0)


def _timed(model: torch.nn.Module, stepper: Stepper) -> tuple[torch.nn.Module, Stepper]:
    assert isinstance(stepper, KFCStepper)
    return model, TimedStepper(stepper.kfc, stepper.optimizer)


def measure(task: Task, steps: int, repetitions: int) -> dict[str, float]:
    """The cost of a counted step in SGD's, and the share of each of KFC's phases in SGD's time."""
    found: dict[str, list[float]] = {"cost": [], **{phase: [] for phase in PHASES}}
    for repetition in range(repetitions):
        pair = {name: _contestant(name, task, lr) for name, lr in (("sgd", 0.01), ("kfc", 0.5))}
        taken = dict.fromkeys(pair, 0.0)
        batches = task.batches(repetition)
        for number in range(FIRST + steps):
            inputs, targets = next(batches)
            if number == FIRST:
                pair["kfc"] = _timed(*pair["kfc"])
            for name in list(pair)[:: 1 if number % 2 else -1]:
                model, stepper = pair[name]
                started = time.process_time()
                stepper.step(BatchLoss(model, task.loss, inputs, targets))
                taken[name] += (time.process_time() - started) if number >= FIRST else 0.0
        cost = taken["kfc"] / taken["sgd"]
        stepper = pair["kfc"][1]
        assert isinstance(stepper, TimedStepper)
        seconds = stepper.kfc.times.seconds()
        found["cost"].append(cost)
        for phase in PHASES:
            found[phase].append(cost * seconds[phase] / sum(seconds.values()))
    return {name: median(values) for name, values in found.items()}


def table(numbers: dict[str, dict[str, float]]) -> str:
    """The cost of each network's later steps as a markdown table."""
    names = {**{phase: phase for phase in PHASES}, REST: "forward, backward, recording"}
    lines = ["| a later step, SGD's = 1 | all | " + " | ".join(names.values()) + " |", "|---" * (len(PHASES) + 2) + "|"]
    for label, own in numbers.items():
        parts = " | ".join(f"{own[phase]:.2f}" for phase in PHASES)
        lines.append(f"| {label} | {own['cost']:.2f} | {parts} |")
    return "\n".join(lines) + "\n"


def profile(task: Task, steps: int) -> None:
    """Print the functions that take the most time of their own in KFC's later steps."""
    model, stepper = _contestant("kfc", task, 0.5)
    batches = task.batches(0)
    for _ in range(FIRST):
        stepper.step(BatchLoss(model, task.loss, *next(batches)))
    profiler = cProfile.Profile()
    for _ in range(steps):
        batch = next(batches)
        profiler.enable()
        stepper.step(BatchLoss(model, task.loss, *batch))
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(60)


def main() -> None:
    """Measure the networks, one thread each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="some of " + ", ".join(NETWORKS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--dry", action="store_true", help="print the table without keeping it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "later_steps.json"
    numbers = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.networks:
        task = TASKS[name].at(NETWORKS[name])
        if arguments.profile:
            profile(task, arguments.steps)
            continue
        numbers[task.title] = measure(task, arguments.steps, arguments.repetitions)
        print(table({task.title: numbers[task.title]}), flush=True)
    if not (arguments.profile or arguments.dry):
        path.write_text(json.dumps(numbers, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(numbers))


if __name__ == "__main__":
    main()
