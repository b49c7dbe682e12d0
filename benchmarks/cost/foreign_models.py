"""The cost of a later step of models that others have built: ``python -m benchmarks.cost.foreign_models``.

SGD and KFC at its defaults train each model on one batch, in turns of one step. After the warm-up follow whole periods
of the default schedule, with their statistics, inverses, reviews and averages of weights. The cost is the median over
periods of the CPU time of a period, relative to the same steps of SGD. ``--profile`` prints profiles.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import time
import warnings
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.contest.contestants import SHIPPED
from benchmarks.foreign_models import MODELS, ForeignModel
from benchmarks.paths import RESULTS
from lightning_kfc import KFC
from lightning_kfc.callback.averaged_weights import AveragedWeights

#: Steps of the warm-up and of a period of inverses, and the decay of averaged weights, of the default settings.
FIRST, PERIOD, AVERAGED = 10, 20, 0.9
#: The goal for a later step.
ALLOWED = 3.0


class Training:
    """A model and its optimizer, with or without KFC.

    Args:
        model: The model.
        with_kfc: Whether KFC at its defaults preconditions the gradients.
    """

    def __init__(self, model: ForeignModel, *, with_kfc: bool) -> None:
        torch.manual_seed(0)
        self._model = model
        self._network: nn.Module = model.make()
        self._batch: Any = model.batch()
        # Without KFC, its rate makes some of the models diverge, and numbers that are not finite cost another time.
        self._optimizer = torch.optim.SGD(self._network.parameters(), lr=0.5 if with_kfc else 1e-3, momentum=0.5)
        self._kfc = KFC(self._network, **SHIPPED) if with_kfc else None
        self._averages = AveragedWeights(self._network, AVERAGED)

    def step(self) -> None:
        """One step."""
        self._optimizer.zero_grad()
        if self._kfc is None:
            self._model.loss(self._network, self._batch).backward()
            self._optimizer.step()
            return
        with self._kfc.capture():
            loss = self._model.loss(self._network, self._batch)
        self._kfc.back_propagate(loss)
        loss.backward()
        self._kfc.precondition(optimizer=self._optimizer)
        self._optimizer.step()
        self._kfc.review(optimizer=self._optimizer)
        self._averages.update(self._optimizer)


def measure(model: ForeignModel, periods: int) -> dict[str, float]:
    """The milliseconds of SGD's step, and the cost of KFC's first and later steps relative to it."""
    pair = [Training(model, with_kfc=with_kfc) for with_kfc in (False, True)]
    taken: list[list[float]] = [[], []]
    for number in range(FIRST + periods * PERIOD):
        for i in (0, 1) if number % 2 else (1, 0):
            started = time.process_time()
            pair[i].step()
            taken[i].append(time.process_time() - started)
    later = [[sum(t[at : at + PERIOD]) for at in range(FIRST, len(t), PERIOD)] for t in taken]
    return {
        "milliseconds": 1000 * median(later[0]) / PERIOD,
        "first": sum(taken[1][:FIRST]) / sum(taken[0][:FIRST]),
        "later": median(kfc / sgd for sgd, kfc in zip(*later, strict=True)),
    }


def table(numbers: dict[str, dict[str, float]]) -> str:
    """The costs as a markdown table."""
    lines = ["| model | SGD's step, ms | a step of the first ten | a later step |", "|---|---|---|---|"]
    for name, own in numbers.items():
        lines.append(f"| {name} | {own['milliseconds']:.1f} | {own['first']:.1f} | {own['later']:.2f} |")
    above = [name for name, own in numbers.items() if own["later"] > ALLOWED]
    lines += ["", f"{len(numbers) - len(above)} of {len(numbers)} models are below {ALLOWED:g} at later steps."]
    return "\n".join(lines) + "\n"


def profile(model: ForeignModel, periods: int) -> None:
    """Print the functions that take the most time in KFC's later steps."""
    training = Training(model, with_kfc=True)
    for _ in range(FIRST):
        training.step()
    # CPU time: other processes do not enter.
    profiler = cProfile.Profile(time.process_time)
    for _ in range(periods * PERIOD):
        profiler.runcall(training.step)
    for order in ("tottime", "cumulative"):
        pstats.Stats(profiler).sort_stats(order).print_stats(50)


def main() -> None:
    """Measure the models, one thread each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="parts of the names of models; all by default")
    parser.add_argument("--periods", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # The other packages' own.
    warnings.simplefilter("ignore")
    path = RESULTS / "foreign_models.json"
    numbers = json.loads(path.read_text()) if path.exists() else {}
    for name, model in MODELS.items():
        if arguments.models and not any(part in name for part in arguments.models):
            continue
        if arguments.profile:
            profile(model, arguments.periods)
            continue
        numbers[name] = measure(model, arguments.periods)
        print(table({name: numbers[name]}), flush=True)
        found = {name: numbers[name] for name in MODELS if name in numbers}
        path.write_text(json.dumps(found, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
