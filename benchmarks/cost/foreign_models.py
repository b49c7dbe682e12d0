"""The cost of a later step of models that others have built: ``python -m benchmarks.cost.foreign_models``.

SGD and KFC at its defaults train each model on the same batches, a new one at each step, in turns: once in two
Trainers, with and without the callback, and once in bare loops, in turns of one step. On one batch the loss would fall
to its rounding error, which reviews then judge. After the warm-up follow whole periods of the default schedule,
with their statistics, inverses, reviews and averages of weights. The cost is the median over periods of the CPU time of
a period, relative to the same steps of SGD. ``--profile`` prints profiles of the bare loop.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import logging
import pstats
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from benchmarks.contest.contestants import SHIPPED
from benchmarks.devices import quiet_trainer
from benchmarks.foreign_models import MODELS, ForeignModel
from benchmarks.paths import RESULTS
from lightning_kfc import KFC, KFCCallback
from lightning_kfc.callback.averaged_weights import AveragedWeights

#: Steps of the warm-up and of a period of inverses, and the decay of averaged weights, of the default settings.
FIRST, PERIOD, AVERAGED = 10, 20, 0.9
#: Steps of a Trainer in its turn: each turn begins with the other's data in the caches.
TURN = 10
#: The goal for a later step.
ALLOWED = 3.0


def make_optimizer(network: nn.Module, *, with_kfc: bool) -> Optimizer:
    """SGD, with KFC's usual rate, or one with which all models train."""
    # Without KFC, its rate makes some of the models diverge, and numbers that are not finite cost another time.
    return torch.optim.SGD(network.parameters(), lr=0.5 if with_kfc else 1e-3, momentum=0.5)


def make_batches(model: ForeignModel, number: int) -> Any:
    """Batches of a model, always the same."""
    torch.manual_seed(1)
    return [model.batch() for _ in range(number)]


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
        self._optimizer = make_optimizer(self._network, with_kfc=with_kfc)
        self._kfc = KFC(self._network, **SHIPPED) if with_kfc else None
        self._averages = AveragedWeights(self._network, AVERAGED)

    def step(self, batch: Any) -> None:
        """One step."""
        self._optimizer.zero_grad()
        if self._kfc is None:
            self._model.loss(self._network, batch).backward()
            self._optimizer.step()
            return
        with self._kfc.capture():
            loss = self._model.loss(self._network, batch)
        self._kfc.back_propagate(loss)
        loss.backward()
        self._kfc.precondition(optimizer=self._optimizer)
        self._averages.step_begins(self._optimizer)
        self._optimizer.step()
        self._kfc.review(optimizer=self._optimizer)
        self._averages.update(self._optimizer)


class UserModule(LightningModule):
    """A model as a user trains it.

    Args:
        model: The model.
        with_kfc: Whether KFC preconditions the gradients.
    """

    def __init__(self, model: ForeignModel, *, with_kfc: bool) -> None:
        super().__init__()
        self._model, self._with_kfc = model, with_kfc
        self.network = model.make()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self._model.loss(self.network, batch)

    def configure_optimizers(self) -> Optimizer:
        """SGD."""
        return make_optimizer(self.network, with_kfc=self._with_kfc)


class Turn(Callback):
    """Lets two Trainers, each in its thread, make some steps in turns, and takes the CPU time of each step.

    Args:
        own: Set while it is this Trainer's turn.
        other: Set while it is the other's.
    """

    def __init__(self, own: threading.Event, other: threading.Event) -> None:
        self._own, self._other = own, other
        self._began = 0.0
        self.seconds: list[float] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for the first turn."""
        self._own.wait()
        self._began = time.thread_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """At the end of a turn, wait for the next one."""
        self.seconds.append(time.thread_time() - self._began)
        if len(self.seconds) % TURN == 0:
            self._own.clear()
            self._other.set()
            self._own.wait()
        self._began = time.thread_time()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make no step any more."""
        self._other.set()


def in_trainers(model: ForeignModel, steps: int) -> list[list[float]]:
    """The CPU seconds of each step without and with the callback."""
    events = threading.Event(), threading.Event()
    events[0].set()
    turns = [Turn(*events), Turn(*reversed(events))]
    torch.manual_seed(0)
    modules = [UserModule(model, with_kfc=with_kfc) for with_kfc in (False, True)]
    batches = make_batches(model, steps)

    def fit(number: int) -> None:
        # A new thread has torch's default again.
        torch.set_num_threads(1)
        callbacks: list[Callback] = [KFCCallback(), turns[number]] if number else [turns[number]]
        trainer = quiet_trainer("cpu", max_steps=steps, callbacks=callbacks)
        trainer.fit(modules[number], DataLoader(batches, batch_size=None))

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(fit, number) for number in (0, 1)]:
            done.result()
    return [turn.seconds for turn in turns]


def in_bare_loops(model: ForeignModel, steps: int) -> list[list[float]]:
    """The CPU seconds of each step without and with KFC."""
    pair = [Training(model, with_kfc=with_kfc) for with_kfc in (False, True)]
    taken: list[list[float]] = [[], []]
    for number, batch in enumerate(make_batches(model, steps)):
        for i in (0, 1) if number % 2 else (1, 0):
            started = time.process_time()
            pair[i].step(batch)
            taken[i].append(time.process_time() - started)
    return taken


def measure(model: ForeignModel, periods: int) -> dict[str, dict[str, float]]:
    """The milliseconds of SGD's step, and the cost of KFC's first and later steps relative to it, by kind of loop."""
    found = {}
    for name, loop in (("trainer", in_trainers), ("bare", in_bare_loops)):
        taken = loop(model, FIRST + periods * PERIOD)
        later = [[sum(t[at : at + PERIOD]) for at in range(FIRST, len(t), PERIOD)] for t in taken]
        found[name] = {
            "milliseconds": 1000 * median(later[0]) / PERIOD,
            "first": sum(taken[1][:FIRST]) / sum(taken[0][:FIRST]),
            "later": median(kfc / sgd for sgd, kfc in zip(*later, strict=True)),
        }
    return found


def table(numbers: dict[str, dict[str, dict[str, float]]]) -> str:
    """The costs as a markdown table."""
    lines = [
        "| model | in a Trainer: SGD's step, ms | later step | bare loop: SGD's step, ms | first ten | later step |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in numbers.items():
        trainer, bare = own["trainer"], own["bare"]
        cells = f"{trainer['milliseconds']:.1f} | {trainer['later']:.2f} | {bare['milliseconds']:.1f}"
        lines.append(f"| {name} | {cells} | {bare['first']:.1f} | {bare['later']:.2f} |")
    counts = [sum(own[loop]["later"] <= ALLOWED for own in numbers.values()) for loop in ("trainer", "bare")]
    lines += [
        "",
        f"Of {len(numbers)} models, later steps are at most {ALLOWED:g} times SGD's for {counts[0]} in a Trainer, "
        f"and for {counts[1]} in a bare loop.",
    ]
    return "\n".join(lines) + "\n"


def profile(model: ForeignModel, periods: int) -> None:
    """Print the functions that take the most time in KFC's later steps."""
    training = Training(model, with_kfc=True)
    # CPU time: other processes do not enter.
    profiler = cProfile.Profile(time.process_time)
    for number, batch in enumerate(make_batches(model, FIRST + periods * PERIOD)):
        if number < FIRST:
            training.step(batch)
        else:
            profiler.runcall(training.step, batch)
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
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
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
