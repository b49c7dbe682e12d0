"""Training steps that leave something behind, each in another way; the simplest forms of what people write."""

from __future__ import annotations

import collections
import contextlib
import copy
import csv
import functools
import heapq
import io
import itertools
import logging
import queue
import random
import types
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import CatMetric, MeanMetric, MeanSquaredError, MetricCollection, SumMetric, wrappers
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

ROWS, FEATURES, HIDDEN, CLASSES = 8, 6, 8, 3

Output = Tensor | dict[str, Any] | None


class Impure(pl.LightningModule):
    """A classifier whose :meth:`step` does more than compute a loss.

    Args:
        folder: Where it may write files.
        note: What ``training_step`` calls first, with the index of its batch.
        manual: Whether it optimizes manually.
    """

    kinds: ClassVar[dict[str, type[Impure]]] = {}
    #: By how much numbers may differ: by nothing.
    rounding: ClassVar[float] = 0.0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Impure.kinds[cls.__name__] = cls

    def __init__(self, folder: Path, note: Callable[[int], None], *, manual: bool = False) -> None:
        super().__init__()
        self.folder, self.note = folder, note
        self.automatic_optimization = not manual
        self.net = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))
        self.start()

    def start(self) -> None:
        """Set up what the step will change."""

    def step(self, x: Tensor, y: Tensor) -> Output:
        """The loss, by impure means."""
        return F.cross_entropy(self.net(x), y)

    def elsewhere(self) -> Any:
        """The changes by the step outside of the module and its folder."""

    def pack(self, x: Tensor, y: Tensor) -> Any:
        """The batch."""
        return x, y

    def step_on(self, batch: Any, batch_idx: int) -> Output:
        return self.step(*batch)

    def training_step(self, batch: Any, batch_idx: int) -> Output:
        self.note(batch_idx)
        output = self.step_on(batch, batch_idx)
        if not self.automatic_optimization and output is not None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(output["loss"] if isinstance(output, dict) else output)
            optimizer.step()
        return output

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5, momentum=0.5)


class Batches:
    """Batches that are drawn from the global random stream on demand."""

    def __init__(self, module: Impure, count: int, rows: int = ROWS) -> None:
        self.module, self.count, self.rows = module, count, rows

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            yield self.module.pack(torch.randn(self.rows, FEATURES), torch.randint(CLASSES, (self.rows,)))


# Counters and containers.


class CountsInPublicAttributes(Impure):
    def start(self) -> None:
        self.steps, self.rows, self.share, self.text = 0, 0, 0.5, ""

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.steps += 1
        self.rows += len(x)
        self.share *= 0.9
        self.text += "."
        return super().step(x, y)


class CountsInPrivateAttributes(Impure):
    def start(self) -> None:
        self._steps = self.__rows = self.net[0]._calls = 0

    def step(self, x: Tensor, y: Tensor) -> Output:
        self._steps += 1
        self.net[0]._calls += 1
        self.__rows += len(x)
        return super().step(x, y)


class CountsInItsClass(Impure):
    steps = 0

    def start(self) -> None:
        type(self).steps = 0

    def step(self, x: Tensor, y: Tensor) -> Output:
        type(self).steps += 1
        return super().step(x, y)

    def elsewhere(self) -> Any:
        return self.steps


calls_of_all_modules = 0


class CountsInAGlobal(Impure):
    def start(self) -> None:
        global calls_of_all_modules
        calls_of_all_modules = 0

    def step(self, x: Tensor, y: Tensor) -> Output:
        global calls_of_all_modules
        calls_of_all_modules += 1
        return super().step(x, y)

    def elsewhere(self) -> Any:
        return calls_of_all_modules


class CountsInAClosure(Impure):
    def start(self) -> None:
        steps = 0

        def count() -> int:
            nonlocal steps
            steps += 1
            return steps

        self.count = count

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.count()
        return super().step(x, y)


class CountsInAProperty(Impure):
    def start(self) -> None:
        self._asked = 0

    @property
    def temperature(self) -> float:
        self._asked += 1
        return 1.0 + 1.0 / self._asked

    def step(self, x: Tensor, y: Tensor) -> Output:
        return F.cross_entropy(self.net(x) / self.temperature, y)


class CountsInItsHyperparameters(Impure):
    def start(self) -> None:
        self.save_hyperparameters({"steps": 0})

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.hparams.steps += 1
        return super().step(x, y)


class CountsInAMeter(Impure):
    class Meter:
        __slots__ = ("mean", "rows")

        def __init__(self) -> None:
            self.rows, self.mean = 0, 0.0

        def update(self, value: float, rows: int) -> None:
            self.rows += rows
            self.mean += (value - self.mean) * rows / self.rows

    def start(self) -> None:
        self.meter = self.Meter()

    def step(self, x: Tensor, y: Tensor) -> Output:
        loss = super().step(x, y)
        self.meter.update(loss.item(), len(x))
        return loss


class CountsCallsInContexts(Impure):
    def start(self) -> None:
        self.entered = self.left = 0

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        self.entered += 1
        yield
        self.left += 1

    def step(self, x: Tensor, y: Tensor) -> Output:
        with self.timed():
            return super().step(x, y)


class AppendsToLists(Impure):
    def start(self) -> None:
        self.outputs: list[Tensor] = []
        self._losses: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> Output:
        loss = super().step(x, y)
        self.outputs.append(loss.detach())
        self._losses.append(loss.item())
        return loss


class FillsNestedContainers(Impure):
    def start(self) -> None:
        self.history: dict[str, Any] = {"train": {"loss": []}, "classes": ([], [], [])}

    def step(self, x: Tensor, y: Tensor) -> Output:
        loss = super().step(x, y)
        self.history["train"]["loss"].append(loss.item())
        for label in y.tolist():
            self.history["classes"][label].append(len(self.history["train"]["loss"]))
        return loss


class FillsADeque(Impure):
    def start(self) -> None:
        self.recent: collections.deque[float] = collections.deque(maxlen=7)

    def step(self, x: Tensor, y: Tensor) -> Output:
        loss = super().step(x, y)
        self.recent.append(loss.item())
        return loss


class FillsCounters(Impure):
    def start(self) -> None:
        self.seen: collections.Counter[int] = collections.Counter()
        self.rows: dict[str, int] = collections.defaultdict(int)

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.seen.update(y.tolist())
        self.rows["train"] += len(x)
        return super().step(x, y)


class FillsSetsAndOrderedDicts(Impure):
    def start(self) -> None:
        self.ids: set[int] = set()
        self.last_seen = collections.OrderedDict.fromkeys(range(CLASSES))

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.ids.add(len(self.ids))
        self.last_seen.move_to_end(int(y[0]))
        return super().step(x, y)


class FillsAHeap(Impure):
    def start(self) -> None:
        self.hardest: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> Output:
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        for value in losses.tolist():
            (heapq.heappush if len(self.hardest) < 20 else heapq.heappushpop)(self.hardest, value)
        return losses.mean()


class FillsAQueue(Impure):
    def start(self) -> None:
        self.waiting: queue.Queue[int] = queue.Queue()

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.waiting.put(int(y[0]))
        return super().step(x, y)


class FillsBytes(Impure):
    def start(self) -> None:
        self.labels, self.stream = bytearray(), io.StringIO()

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.labels += bytes(y.tolist())
        self.stream.write(f"{int(y.sum())},")
        return super().step(x, y)


class FillsACacheOfTensors(Impure):
    def start(self) -> None:
        self.cache: dict[str, Tensor] = {}

    def step(self, x: Tensor, y: Tensor) -> Output:
        logits = self.net(x)
        self.cache["last"] = logits.detach()
        self.cache[f"step {len(self.cache)}"] = logits.detach().softmax(1).mean(0)
        return F.cross_entropy(logits, y)


class FillsALookupTable(Impure):
    def start(self) -> None:
        self.table: dict[int, Tensor] = {}
        self.misses = 0

    def row(self, label: int) -> Tensor:
        if label not in self.table or len(self.table) > 2:
            self.misses += 1
            self.table.pop(next(iter(self.table), label), None)
            self.table[label] = torch.randn(FEATURES)
        return self.table[label]

    def step(self, x: Tensor, y: Tensor) -> Output:
        return super().step(x + 0.1 * torch.stack([self.row(label) for label in y.tolist()]), y)


@functools.lru_cache(maxsize=2)
def position(kind: int) -> Tensor:
    return torch.randn(FEATURES)


class UsesAnLruCache(Impure):
    def start(self) -> None:
        position.cache_clear()

    def step(self, x: Tensor, y: Tensor) -> Output:
        return super().step(x + 0.1 * torch.stack([position(label) for label in y.tolist()]), y)

    def elsewhere(self) -> Any:
        return position


class KeepsWeakReferences(Impure):
    @dataclass(eq=False)
    class Example:
        number: int

    def start(self) -> None:
        self.held: collections.deque[Any] = collections.deque(maxlen=3)
        self.living: weakref.WeakSet[Any] = weakref.WeakSet()
        self.by_number: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.made, self.lived = 0, []

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.made += 1
        self.held.append(self.Example(self.made))
        self.living.add(self.held[-1])
        self.by_number[self.made] = self.held[-1]
        self.lived.append(len(self.living))
        return super().step(x, y)


class SeesWhetherItsLogitsLive(Impure):
    def start(self) -> None:
        self.last: Any = None
        self.lived: list[bool] = []

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.lived.append(self.last is not None and self.last() is not None)
        logits = self.net(x)
        self.last = weakref.ref(logits)
        return F.cross_entropy(logits, y)


class ConsumesAGenerator(Impure):
    def start(self) -> None:
        self.weights = self.falling()

    def on_train_end(self) -> None:
        self.weights.close()

    @staticmethod
    def falling() -> Iterator[float]:
        weight = 2.0
        while True:
            yield weight
            weight = max(0.9 * weight, 0.5)

    def step(self, x: Tensor, y: Tensor) -> Output:
        return next(self.weights) * super().step(x, y)


class ConsumesIterators(Impure):
    def start(self) -> None:
        self.numbers, self.names = itertools.count(), iter([f"run-{i}" for i in range(1000)])
        self.used: list[str] = []

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.used.append(f"{next(self.names)}/{next(self.numbers)}")
        return super().step(x, y)


# The world outside.


class WritesFiles(Impure):
    def start(self) -> None:
        self.written = 0

    def step(self, x: Tensor, y: Tensor) -> Output:
        loss = super().step(x, y)
        with (self.folder / "losses.txt").open("a") as file:
            file.write(f"{loss.item()!r}\n")
        if self.written % 8 == 0:
            np.save(self.folder / f"batch-{self.written}.npy", x.numpy())
        self.written += 1
        return loss


class WritesToAnOpenFile(Impure):
    def on_train_start(self) -> None:
        self.file = (self.folder / "losses.csv").open("w", newline="")

    def on_train_end(self) -> None:
        self.file.close()

    def step(self, x: Tensor, y: Tensor) -> Output:
        loss = super().step(x, y)
        csv.writer(self.file).writerow([loss.item(), *y.tolist()])
        self.file.flush()
        return loss


class SendsBytes(Impure):
    class Wire:
        """Stands in for a socket."""

        def __init__(self) -> None:
            self.sent = b""

        def sendall(self, data: bytes) -> None:
            self.sent += data

    def start(self) -> None:
        self.wire = self.Wire()

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.wire.sendall(x[0].numpy().tobytes())
        return super().step(x, y)


class TellsPythonsLogging(Impure):
    class Kept(logging.Handler):
        lines: ClassVar[list[str]] = []

        def emit(self, record: logging.LogRecord) -> None:
            self.lines.append(record.getMessage())

    def start(self) -> None:
        self.Kept.lines = []
        logger = logging.Logger("losses")
        logger.addHandler(self.Kept())
        self.tell = logger.info

    def step(self, x: Tensor, y: Tensor) -> Output:
        loss = super().step(x, y)
        self.tell("loss %.9g", loss.item())
        return loss

    def elsewhere(self) -> Any:
        return self.Kept.lines


class LogsValues(Impure):
    def start(self) -> None:
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.logged = 0

    def step(self, x: Tensor, y: Tensor) -> Output:
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.logged += 1
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(x))
        self.log("logged", float(self.logged), on_step=False, on_epoch=True, reduce_fx="sum", batch_size=len(x))
        self.accuracy(logits, y)
        self.log_dict({"accuracy": self.accuracy}, on_step=False, on_epoch=True, batch_size=len(x))
        return loss


class ReadsTheTrainer(Impure):
    def start(self) -> None:
        self.read: list[Any] = []

    def step(self, x: Tensor, y: Tensor) -> Output:
        modes = (self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled())
        self.read.append((self.global_step, self.trainer.is_last_batch, self.trainer.fit_loop.batch_idx, *modes))
        return super().step(x, y)


class SetsTheLearningRate(Impure):
    def step(self, x: Tensor, y: Tensor) -> Output:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] *= 0.99
        return super().step(x, y)

    def elsewhere(self) -> Any:
        return [group["lr"] for group in self.trainer.optimizers[0].param_groups]


# Random numbers.


class DrawsFromTheGlobalStreams(Impure):
    def start(self) -> None:
        self.drawn: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.drawn += [torch.rand(()).item(), float(np.random.rand()), random.random()]
        return super().step(x + 0.1 * torch.randn_like(x) + 0.1 * np.random.randn() + 0.1 * random.random(), y)


class DrawsFromItsOwnTorchGenerator(Impure):
    def start(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def step(self, x: Tensor, y: Tensor) -> Output:
        noise = torch.empty_like(x).normal_(generator=self.generator)
        order = torch.randperm(len(x), generator=self.generator)
        return super().step(x + 0.1 * noise + 0.1 * x[order], y)


class DrawsFromItsOwnNumpyGenerator(Impure):
    def start(self) -> None:
        self.generator = np.random.default_rng(7)

    def step(self, x: Tensor, y: Tensor) -> Output:
        return super().step(x + 0.1 * torch.from_numpy(self.generator.normal(size=x.shape)).float(), y)


class DrawsFromItsOwnRandomState(Impure):
    def start(self) -> None:
        self.state = np.random.RandomState(7)

    def step(self, x: Tensor, y: Tensor) -> Output:
        order = torch.from_numpy(self.state.permutation(len(x)))
        return super().step(0.7 * x + 0.3 * x[order], y)


class DrawsFromItsOwnPythonRandom(Impure):
    def start(self) -> None:
        self._random = random.Random(7)

    def step(self, x: Tensor, y: Tensor) -> Output:
        return super().step(x * self._random.uniform(0.5, 1.5), y)


class DropsOutAndAddsNoise(Impure):
    def start(self) -> None:
        self.net.insert(2, nn.Dropout(0.3))

    def step(self, x: Tensor, y: Tensor) -> Output:
        return super().step(F.dropout(x, 0.2) + 0.1 * torch.randn_like(x), y)


class SeedsTheGlobalStream(Impure):
    def step_on(self, batch: Any, batch_idx: int) -> Output:
        torch.manual_seed(batch_idx // 2)
        x, y = batch
        return self.step(x + 0.1 * torch.randn_like(x), y)


class ForksTheGlobalStream(Impure):
    def start(self) -> None:
        self.drawn: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> Output:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            noise = torch.randn_like(x)
        self.drawn.append(torch.rand(()).item())
        return super().step(x + 0.1 * noise, y)


# Meters.


class UpdatesMetrics(Impure):
    def start(self) -> None:
        self.mean, self.rows, self.all = MeanMetric(), SumMetric(), CatMetric()

    def step(self, x: Tensor, y: Tensor) -> Output:
        loss = super().step(x, y)
        self.mean(loss)
        self.rows.update(len(x))
        self.all.update(y)
        return loss


class UpdatesMetricsInAPlainDict(Impure):
    def start(self) -> None:
        self.metrics = {"train": [MeanMetric(), SumMetric()]}

    def step(self, x: Tensor, y: Tensor) -> Output:
        loss = super().step(x, y)
        for metric in self.metrics["train"]:
            metric.update(loss.detach())
        return loss


class UpdatesAWrapper(Impure):
    """Its wrapper takes logits and classes."""

    kinds_of_metric: ClassVar[dict[str, Callable[[], nn.Module]]] = {
        "Collection": lambda: MetricCollection(
            [MulticlassPrecision(CLASSES), MulticlassRecall(CLASSES), MulticlassAccuracy(CLASSES)]
        ),
        "MinMaxMetric": lambda: wrappers.MinMaxMetric(MulticlassAccuracy(CLASSES)),
        "Running": lambda: wrappers.Running(MulticlassAccuracy(CLASSES), window=4),
        "BootStrapper": lambda: wrappers.BootStrapper(MulticlassAccuracy(CLASSES), num_bootstraps=3),
        "ClasswiseWrapper": lambda: wrappers.ClasswiseWrapper(MulticlassAccuracy(CLASSES, average=None)),
    }
    metric: ClassVar[str] = "Collection"

    def start(self) -> None:
        self.meter = self.kinds_of_metric[self.metric]()

    def step(self, x: Tensor, y: Tensor) -> Output:
        logits = self.net(x)
        self.meter(logits.detach(), y)
        return F.cross_entropy(logits, y)


for _name in list(UpdatesAWrapper.kinds_of_metric)[1:]:
    type(f"Updates{_name}", (UpdatesAWrapper,), {"metric": _name})


class UpdatesATracker(Impure):
    def start(self) -> None:
        self.tracker = wrappers.MetricTracker(MulticlassAccuracy(CLASSES))

    def step_on(self, batch: Any, batch_idx: int) -> Output:
        if batch_idx % 5 == 0:
            self.tracker.increment()
        x, y = batch
        logits = self.net(x)
        self.tracker(logits.detach(), y)
        return F.cross_entropy(logits, y)


class UpdatesWrappersOfSeveral(Impure):
    def start(self) -> None:
        self.outputs = wrappers.MultioutputWrapper(MeanSquaredError(), CLASSES)
        self.tasks = wrappers.MultitaskWrapper({"a": MeanSquaredError(), "b": MulticlassAccuracy(CLASSES)})

    def step(self, x: Tensor, y: Tensor) -> Output:
        logits = self.net(x)
        found, expected = logits.detach(), F.one_hot(y, CLASSES).float()
        self.outputs.update(found, expected)
        self.tasks.update({"a": found[:, 0], "b": found}, {"a": expected[:, 0], "b": y})
        return F.cross_entropy(logits, y)


# Tensors, buffers and teachers.


class AddsToPlainTensors(Impure):
    def start(self) -> None:
        self.total, self._sums, self.replaced = torch.zeros(()), [torch.zeros(CLASSES)], torch.zeros(())

    def step(self, x: Tensor, y: Tensor) -> Output:
        logits = self.net(x)
        self.total += len(x)
        self._sums[0] += logits.detach().sum(0)
        self.replaced = self.replaced + 1
        return F.cross_entropy(logits, y)


class AddsToArrays(Impure):
    def start(self) -> None:
        self.confusion = np.zeros((CLASSES, CLASSES), dtype=np.int64)
        self.sums = np.zeros(CLASSES, dtype=np.float32)

    def step(self, x: Tensor, y: Tensor) -> Output:
        logits = self.net(x)
        np.add.at(self.confusion, (y.numpy(), logits.detach().argmax(1).numpy()), 1)
        torch.from_numpy(self.sums).add_(logits.detach().sum(0))
        return F.cross_entropy(logits, y)


class AddsToBuffers(Impure):
    def start(self) -> None:
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.bank = nn.Module()
        self.bank.register_buffer("mean", torch.zeros(FEATURES), persistent=False)

    def on_train_epoch_start(self) -> None:
        self.bank.eval()

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.steps += 1
        self.bank.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return super().step(x - self.bank.mean, y)


class NormalisesByBatches(Impure):
    def start(self) -> None:
        self.net.insert(1, nn.BatchNorm1d(HIDDEN))
        self.net.insert(3, nn.BatchNorm1d(HIDDEN, momentum=None))


class NormalisesByItsOwnMean(Impure):
    def start(self) -> None:
        self.scale: float | None = None

    def step(self, x: Tensor, y: Tensor) -> Output:
        loss = super().step(x, y)
        self.scale = loss.item() if self.scale is None else 0.9 * self.scale + 0.1 * loss.item()
        return loss / self.scale


class IteratesThePowerMethod(Impure):
    def start(self) -> None:
        first = parametrizations.spectral_norm(nn.Linear(FEATURES, FEATURES))
        self.net = nn.Sequential(first, nn.utils.spectral_norm(nn.Linear(FEATURES, FEATURES)), *self.net)


class RenormsItsEmbedding(Impure):
    def start(self) -> None:
        self.signs = nn.Embedding(2, FEATURES, max_norm=0.5)

    def step(self, x: Tensor, y: Tensor) -> Output:
        return super().step(x + self.signs((x[:, 0] > 0).long()), y)


class WritesIntoItsBuffers(Impure):
    def start(self) -> None:
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("best", torch.full((CLASSES,), -torch.inf))

    def step(self, x: Tensor, y: Tensor) -> Output:
        torch.mean(x, 0, out=self.mean)
        logits = self.net(x - self.mean)
        self.best[y] = torch.maximum(self.best[y], logits.detach().gather(1, y[:, None])[:, 0])
        return F.cross_entropy(logits, y)


class PerturbsItsWeights(Impure):
    """Reads its loss and its weights."""

    def step(self, x: Tensor, y: Tensor) -> Output:
        noise = [0.01 * torch.randn_like(parameter) for parameter in self.net.parameters()]
        for parameter, by in zip(self.net.parameters(), noise, strict=True):
            parameter.data.add_(by)
        with torch.no_grad():
            weight = 1.0 / (1.0 + super().step(x, y))
        for parameter, by in zip(self.net.parameters(), noise, strict=True):
            parameter.data.sub_(by)
        return weight * super().step(x, y)


class ClampsItsWeights(Impure):
    def step(self, x: Tensor, y: Tensor) -> Output:
        for parameter in self.net.parameters():
            parameter.data.clamp_(-0.3, 0.3)
        return super().step(x, y)


class SnapshotsItsWeights(Impure):
    def start(self) -> None:
        self.snapshots: list[Any] = []

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.snapshots.append(copy.deepcopy(self.net.state_dict()))
        return super().step(x, y)


class QuantisesByACodebook(Impure):
    def start(self) -> None:
        self.register_buffer("codes", torch.randn(5, HIDDEN))
        self.register_buffer("counts", torch.ones(5))
        self.register_buffer("sums", self.codes.clone())

    def step(self, x: Tensor, y: Tensor) -> Output:
        hidden = self.net[:2](x)
        nearest = torch.cdist(hidden, self.codes).argmin(1)
        with torch.no_grad():
            chosen = F.one_hot(nearest, len(self.codes)).float()
            self.counts.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
            self.sums.mul_(0.9).add_(chosen.T @ hidden, alpha=0.1)
            self.codes.copy_(self.sums / self.counts[:, None])
        quantised = hidden + (self.codes[nearest] - hidden).detach()
        commitment = (hidden - self.codes[nearest].detach()).square().mean()
        return F.cross_entropy(self.net[2](quantised), y) + 0.1 * commitment


class Teaching(Impure):
    """A teacher follows the weights, and its predictions are a part of the loss."""

    def start(self) -> None:
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def teach(self) -> None:
        for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            old.data.mul_(0.9).add_(new.data, alpha=0.1)

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.teach()
        logits = self.net(x)
        with torch.no_grad():
            target = self.teacher(x).softmax(1)
        return F.cross_entropy(logits, y) + F.cross_entropy(logits, target)


class TeachesByReplacingData(Teaching):
    def teach(self) -> None:
        for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            old.data = old.data * 0.9 + new.data * 0.1


class TeachesByLerp(Teaching):
    @torch.no_grad()
    def teach(self) -> None:
        for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            old.lerp_(new, 0.1)


class TeachesByForeach(Teaching):
    @torch.no_grad()
    def teach(self) -> None:
        old, new = list(self.teacher.parameters()), list(self.net.parameters())
        torch._foreach_mul_(old, 0.9)
        torch._foreach_add_(old, new, alpha=0.1)


class TeachesByStateDict(Teaching):
    def start(self) -> None:
        super().start()
        self.taught = 0

    def teach(self) -> None:
        self.taught += 1
        mine = self.net.state_dict()
        theirs = {name: 0.9 * value + 0.1 * mine[name] for name, value in self.teacher.state_dict().items()}
        self.teacher.load_state_dict(theirs)


class TeachesByAveragedModel(Teaching):
    def start(self) -> None:
        self.teacher = AveragedModel(self.net).requires_grad_(False)

    def teach(self) -> None:
        self.teacher.update_parameters(self.net)


class TeachesByCopies(Teaching):
    """The teacher is the net of the step before, in a list outside of all modules."""

    def start(self) -> None:
        self._copies: list[Any] = [None, copy.deepcopy(self.net).requires_grad_(False)]

    def teach(self) -> None:
        self._copies = [
            self._copies[0] or self._copies[1],
            self._copies[-1],
            copy.deepcopy(self.net).requires_grad_(False),
        ]
        self.__dict__["teacher"] = self._copies[1]


# State that is carried from batch to batch.


class CarriesAHiddenState(Impure):
    """A GRU, which is computed step by step where it is recorded, and so rounds otherwise."""

    rounding = 1e-10
    make: ClassVar[Callable[..., nn.Module]] = nn.GRU

    def start(self) -> None:
        self.net = nn.Sequential(nn.Linear(5, CLASSES)).double()
        self.memory = self.make(FEATURES // 2, 5, batch_first=True).double()
        self.hidden: Any = None

    def step(self, x: Tensor, y: Tensor) -> Output:
        outputs, hidden = self.memory(x.double().view(len(x), 2, -1), self.hidden)
        self.hidden = hidden.detach() if isinstance(hidden, Tensor) else tuple(part.detach() for part in hidden)
        return F.cross_entropy(self.net(outputs[:, -1]), y)


class CarriesAnLstmsState(CarriesAHiddenState):
    make = nn.LSTM


class KeepsAContrastiveQueue(Impure):
    def start(self) -> None:
        self.key = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(4 * ROWS, CLASSES), dim=1))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def step(self, x: Tensor, y: Tensor) -> Output:
        with torch.no_grad():
            for old, new in zip(self.key.parameters(), self.net.parameters(), strict=True):
                old.mul_(0.9).add_(new, alpha=0.1)
            keys = F.normalize(self.key(x + 0.1 * torch.randn_like(x)), dim=1)
        queries = F.normalize(self.net(x + 0.1 * torch.randn_like(x)), dim=1)
        positive, negative = (queries * keys).sum(1, keepdim=True), queries @ self.queue.clone().T
        loss = F.cross_entropy(torch.cat([positive, negative], 1) / 0.2, torch.zeros(len(x), dtype=torch.long))
        place = int(self.place)
        self.queue[place : place + len(x)] = keys
        self.place[0] = (place + len(x)) % len(self.queue)
        return loss


class ChoosesItsPathByACounter(Impure):
    def start(self) -> None:
        self.other, self._turn = nn.Linear(HIDDEN, CLASSES), 0

    def step(self, x: Tensor, y: Tensor) -> Output:
        self._turn += 1
        hidden = self.net[:2](x)
        logits = self.net[2](hidden) + self.other(hidden) * (self._turn % 3 > 0)
        return F.cross_entropy(logits if self._turn % 2 else logits * 1.5, y)


class ChoosesItsPathByTheLastLoss(Impure):
    def start(self) -> None:
        self._last = float("inf")
        self.easy = 0

    def step(self, x: Tensor, y: Tensor) -> Output:
        if self._last < 1.0:
            self.easy += 1
            x = x + 0.5 * torch.randn_like(x)
        loss = super().step(x, y)
        self._last = loss.item()
        return loss


# What a step returns, and when it steps.


class ReturnsMoreThanTheLoss(Impure):
    def start(self) -> None:
        self.kept: list[Any] = []

    def step(self, x: Tensor, y: Tensor) -> Output:
        logits = self.net(x)
        self.kept.append({"logits": logits.detach(), "rows": len(x)})
        return {"loss": F.cross_entropy(logits, y), **self.kept[-1], "text": f"batch {len(self.kept)}"}


class ReturnsNothingAtTimes(Impure):
    def start(self) -> None:
        self._skipped = 0

    def step_on(self, batch: Any, batch_idx: int) -> Output:
        if batch_idx % 4 == 1:
            self._skipped += 1
            return None
        return self.step(*batch)


class StepsEverySecondBatch(Impure):
    def start(self) -> None:
        self._steps = 0

    def step(self, x: Tensor, y: Tensor) -> Output:
        self._steps += 1
        return super().step(x, y)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2 == 1:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class NotesItsHooks(Impure):
    def start(self) -> None:
        self.told: list[Any] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.told.append(("batch", batch_idx))

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.told.append("zero")

    def on_before_backward(self, loss: Tensor) -> None:
        self.told.append(("backward", loss.item()))

    def on_after_backward(self) -> None:
        self.told.append([p.grad.norm().item() for p in self.net.parameters()])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.told.append("step")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.told.append(("end", batch_idx))


# Hooks, functions and modes of torch.


class CountsInHooksOfModules(Impure):
    def start(self) -> None:
        self.passed: collections.Counter[str] = collections.Counter()
        self.net[0].register_forward_pre_hook(self.before)
        self.net.register_forward_hook(self.after)

    def before(self, module: nn.Module, inputs: Any) -> Any:
        self.passed["before"] += 1
        return (inputs[0] + 0.01 * self.passed["before"],)

    def after(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        self.passed["after"] += 1
        return output * 1.1


class CountsInHooksOfParameters(Impure):
    def start(self) -> None:
        self.arrived: collections.Counter[int] = collections.Counter()
        for number, parameter in enumerate(self.net.parameters()):
            parameter.register_hook(lambda gradient, number=number: self.count(number))
            parameter.register_post_accumulate_grad_hook(lambda p, number=number: self.count(-1 - number))

    def count(self, number: int) -> None:
        self.arrived[number] += 1


class CountsOutsideACheckpoint(Impure):
    def start(self) -> None:
        self.forwards = 0

    def step(self, x: Tensor, y: Tensor) -> Output:
        self.forwards += 1
        hidden = checkpoint(self.net[:2], x, use_reentrant=False)
        return F.cross_entropy(self.net[2](hidden), y)


class Doubled(torch.autograd.Function):
    forwards = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Doubled.forwards += 1
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class CountsInItsOwnFunction(Impure):
    def start(self) -> None:
        Doubled.forwards = 0

    def step(self, x: Tensor, y: Tensor) -> Output:
        return F.cross_entropy(self.net[2](Doubled.apply(self.net[:2](x))), y)

    def elsewhere(self) -> Any:
        return Doubled.forwards


class CountsOperations(Impure):
    def start(self) -> None:
        self.flops: list[int] = []

    def step(self, x: Tensor, y: Tensor) -> Output:
        with FlopCounterMode(display=False) as counter:
            loss = super().step(x, y)
        self.flops.append(counter.get_total_flops())
        return loss


class CountsWhatTheGraphSaves(Impure):
    def start(self) -> None:
        self._saved = 0

    def save(self, tensor: Tensor) -> Tensor:
        self._saved += 1
        return tensor

    def step(self, x: Tensor, y: Tensor) -> Output:
        with torch.autograd.graph.saved_tensors_hooks(self.save, lambda tensor: tensor):
            return super().step(x, y)


class AsksForTheGradientOfItsInput(Impure):
    def start(self) -> None:
        self.last: Tensor | None = None
        self.sizes: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> Output:
        if self.last is not None:
            self.sizes.append(self.last.grad.norm().item())
        self.last = x.requires_grad_()
        return super().step(x, y)


# Batches that the step changes, in containers of all kinds.


class Pair(NamedTuple):
    x: Tensor
    y: Tensor
    name: str | None = None


@dataclass
class Record:
    x: Tensor
    y: Tensor
    unset: Tensor = field(init=False)


@dataclass(frozen=True)
class FrozenRecord:
    x: Tensor
    y: Tensor
    name: str = "a"


class Loose:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class TwoArguments(tuple):
    __slots__ = ()

    def __new__(cls, x: Tensor, y: Tensor) -> TwoArguments:
        return super().__new__(cls, (x, y))


class ReadOnly(dict):
    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("read only")


class Bag(MutableMapping):
    def __init__(self, **entries: Any) -> None:
        self._inner = entries

    def __getitem__(self, key: str) -> Any:
        return self._inner[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._inner[key] = value

    def __delitem__(self, key: str) -> None:
        del self._inner[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)


def in_items(batch: Any) -> Any:
    return batch["x"], batch["y"]


def in_attributes(batch: Any) -> Any:
    return batch.x, batch.y


def in_order(batch: Any) -> Any:
    return batch


#: How a batch is packed, and how the step finds its tensors.
CONTAINERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Any]]] = {
    "Tuple": (lambda x, y: (x, y), in_order),
    "List": (lambda x, y: [x, y], in_order),
    "Dict": (lambda x, y: {"x": x, "y": y}, in_items),
    "NestedDict": (lambda x, y: {"in": {"x": x}, "out": ({"y": y},)}, lambda b: (b["in"]["x"], b["out"][0]["y"])),
    "DictOfLists": (lambda x, y: {"x": [x], "y": [y]}, lambda b: (b["x"][0], b["y"][0])),
    "NamedTuple": (Pair, lambda b: b[:2]),
    "Dataclass": (Record, in_attributes),
    "FrozenDataclass": (FrozenRecord, in_attributes),
    "Object": (Loose, in_attributes),
    "TupleSubclass": (TwoArguments, in_order),
    "ReadOnlyDict": (lambda x, y: ReadOnly(x=x, y=y), in_items),
    "MappingProxy": (lambda x, y: types.MappingProxyType({"x": x, "y": y}), in_items),
    "UserDict": (lambda x, y: collections.UserDict({"x": x, "y": y}), in_items),
    "OwnMapping": (lambda x, y: Bag(x=x, y=y), in_items),
    "DictOfManyThings": (
        lambda x, y: {
            "x": x,
            "y": y,
            "names": ["n"] * len(x),
            "ids": {1, 2},
            "one": torch.tensor(0.5),
            "sparse": torch.eye(4).to_sparse(),
            "array": y.numpy(),
            "none": None,
        },
        in_items,
    ),
}


class ChangesItsBatch(Impure):
    container: ClassVar[str] = ""

    def pack(self, x: Tensor, y: Tensor) -> Any:
        return CONTAINERS[self.container][0](x, y) if self.container else torch.cat([x, y[:, None]], 1)

    def step_on(self, batch: Any, batch_idx: int) -> Output:
        if self.container:
            x, y = CONTAINERS[self.container][1](batch)
        else:
            x, y = batch[:, :-1], batch[:, -1].long()
        x.mul_(1.5).add_(0.1)
        return self.step(x, y)


for _name in CONTAINERS:
    type(f"ChangesABatchIn{_name}", (ChangesItsBatch,), {"container": _name})


class ReassignsItsBatch(Impure):
    """As augmentation on the device does, with an entry taken out and one put in."""

    def pack(self, x: Tensor, y: Tensor) -> Any:
        return {"x": x, "y": y}

    def step_on(self, batch: Any, batch_idx: int) -> Output:
        batch["x"] = batch["x"] * 1.5 + 0.1 * torch.randn_like(batch["x"])
        batch["rows"] = len(batch["x"])
        return self.step(batch["x"], batch.pop("y"))


class KeepsItsBatch(Impure):
    def start(self) -> None:
        self.last: list[Any] = []

    def step(self, x: Tensor, y: Tensor) -> Output:
        if self.last:
            self.last[0].add_(x)
            x = x + 0.1 * self.last[0]
        self.last = [x.detach()]
        return super().step(x, y)


# Steps that speak with other ranks.


class GathersCounts(Impure):
    """Weights its loss by the rows of all ranks."""

    def start(self) -> None:
        self.rows: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> Output:
        everywhere = self.all_gather(torch.tensor(float(len(x)))).mean()
        self.rows.append(everywhere.item())
        return super().step(x, y) * len(x) / everywhere


class ReducesInItsOwnGroup(Impure):
    """Centres its batches by a mean over ranks, in a group whose collectives are counted."""

    def start(self) -> None:
        self.register_buffer("mean", torch.zeros(FEATURES))

    def on_train_start(self) -> None:
        self.__dict__["group"] = dist.new_group() if dist.is_initialized() else None

    def step(self, x: Tensor, y: Tensor) -> Output:
        mean = x.mean(0)
        if dist.is_initialized():
            dist.all_reduce(mean, group=self.__dict__["group"])
            mean /= dist.get_world_size()
        self.mean.lerp_(mean, 0.1)
        return super().step(x - self.mean, y)

    def elsewhere(self) -> Any:
        group = self.__dict__["group"]
        return None if group is None else group._get_sequence_number_for_group()
