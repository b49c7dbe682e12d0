"""Everything that a user can see of a training, and the first difference between two trainings."""

from __future__ import annotations

import array
import collections
import enum
import functools
import io
import itertools
import linecache
import operator
import pathlib
import queue
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.hooks import RemovableHandle

from tests.helpers.lightning_nets import trainer


class Steps:
    """The training steps that run, and of each one the lines of its file, in their order.

    Those within a back-propagation are left out: statistics may send another one through the graph, so that the
    backward of a function, and the second forward of a checkpointed block, run once more.

    Attributes:
        calls: The batch of each step.
        lines: Those that ran.
    """

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.lines: list[int] = []
        self._file = ""

    def note(self, batch_idx: int) -> None:
        """A ``training_step`` begins: it calls this first. Only until it ends is Python slowed down by a trace."""
        frame, before = sys._getframe(1), sys.gettrace()

        def until_its_end(frame: types.FrameType, event: str, argument: Any) -> Any:
            if event == "return":
                sys.settrace(before)
            self._line(frame, event, argument)
            return until_its_end

        self.calls.append(batch_idx)
        self.lines.append(frame.f_lineno)
        self._file = frame.f_code.co_filename
        frame.f_trace = until_its_end
        sys.settrace(self._call)

    def _call(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != self._file or torch._C._current_graph_task_id() != -1:
            return None
        self.lines.append(frame.f_lineno)
        return self._line

    def _line(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines.append(frame.f_lineno)
        return self._line

    def differences(self, expected: Steps) -> list[str]:
        """Whether steps run more or less often than expected, and the first line that does, or at another time."""
        found = []
        if self.calls != expected.calls:
            found.append(f"training_step runs {len(self.calls)} times, not {len(expected.calls)}")
        if self.lines != expected.lines:
            ours, theirs = collections.Counter(self.lines), collections.Counter(expected.lines)
            pairs = itertools.zip_longest(self.lines, expected.lines)
            first = next(line or other or 0 for line, other in pairs if line != other)
            odd = next((line for line in [*ours, *theirs] if ours[line] != theirs[line]), first)
            often = f"{ours[odd]} times, not {theirs[odd]}" if ours[odd] != theirs[odd] else "at another time"
            found.append(f"`{linecache.getline(self._file, odd).strip()}` (line {odd}) runs {often}")
        return found


#: What its ``repr`` shows as a whole.
PLAIN = (
    *(bool, int, float, complex, str, bytes, bytearray, type(None), type(Ellipsis), type(NotImplemented)),
    *(range, slice, type, enum.Enum, np.generic, np.dtype, array.array),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    *(types.GenericAlias, type(int | None)),
)
#: Irrelevant state: Lightning's objects, the numbers that torch gives to hooks, and locks.
OPAQUE = (
    *(pl.Trainer, LightningOptimizer, RemovableHandle, dist.ProcessGroup, Steps),
    *(types.ModuleType, type(threading.Lock()), type(threading.RLock()), threading.Condition),
)
OWN = "lightning_kfc"
#: How often all is looked at; the batch and what the step returns are looked at each time.
LOOK_EVERY_N_BATCHES = 4
MISSING = "nothing"


@dataclass(frozen=True)
class Array:
    """The numbers of a tensor or of an array."""

    kind: str
    values: np.ndarray

    @classmethod
    def of_tensor(cls, tensor: Tensor) -> Array:
        value = tensor.detach()
        value = value.to_dense() if value.layout != torch.strided else value
        numbers = (value.float() if value.dtype == torch.bfloat16 else value).cpu().resolve_conj().numpy().copy()
        gradient = " with gradient" if tensor.requires_grad else ""
        return cls(f"{tensor.dtype} {tensor.layout} {tuple(tensor.shape)}{gradient}", numbers)

    def difference(self, other: Array, rounding: float) -> str | None:
        """Where another array has something else, and what."""
        if self.kind != other.kind:
            return f": {self.kind} != {other.kind}"
        if self.values.tobytes() == other.values.tobytes():
            return None
        if rounding and np.allclose(self.values, other.values, rtol=rounding, atol=rounding):
            return None
        size = self.values.dtype.itemsize
        bits = [np.frombuffer(a.values.tobytes(), np.uint8).reshape(-1, size) for a in (self, other)]
        where = np.unravel_index(int((bits[0] != bits[1]).any(1).argmax()), self.values.shape)
        index = f"[{', '.join(map(str, where))}]" if where else ""
        return f"{index}: {self.values[where]} != {other.values[where]}"


#: The content of an object: for each path into it, what is found there, as text or as numbers.
Picture = dict[str, "str | Array"]


def picture(**named: Any) -> Picture:
    """All that some objects hold, however deep.

    The project's own hooks on modules are left out, which are there while training runs, and in copies that were made
    then. What cannot be looked into raises TypeError, so that nothing is passed over.
    """
    walk = _Walk()
    for name, value in named.items():
        walk.visit(value, name)
    return walk.picture


def first_difference(found: Picture, expected: Picture, rounding: float = 0.0) -> str | None:
    """The first path at which two pictures differ, with what each one has there.

    Args:
        found: One picture.
        expected: The other one.
        rounding: By how much the numbers in arrays may differ; by nothing, not a bit, where it is 0.
    """
    for path in [*found, *(path for path in expected if path not in found)]:
        a, b = found.get(path, MISSING), expected.get(path, MISSING)
        if isinstance(a, Array) and isinstance(b, Array):
            if (difference := a.difference(b, rounding)) is not None:
                return path + difference
        elif not (isinstance(a, str) and isinstance(b, str) and a == b):
            return f"{path}: {getattr(a, 'kind', a)} != {getattr(b, 'kind', b)}"
    return None


class _Walk:
    def __init__(self) -> None:
        self.picture: Picture = {}
        self._paths: dict[int, str] = {}
        self._alive: list[Any] = []

    def visit(self, value: Any, path: str) -> None:
        if isinstance(value, PLAIN):
            kind = f"{type(value).__name__} " if isinstance(value, np.generic) else ""
            self.picture[path] = kind + repr(value)
            return
        if not isinstance(value, tuple):
            if id(value) in self._paths:
                self.picture[path] = f"the same as {self._paths[id(value)]}"
                return
            self._paths[id(value)] = path
            # No other object may get this one's id while the walk goes on.
            self._alive.append(value)
        self.picture[path] = f"{type(value).__module__}.{type(value).__qualname__}"
        if not isinstance(value, OPAQUE):
            self._look_into(value, path)

    def _look_into(self, value: Any, path: str) -> None:
        for types_, look in _LOOKS:
            if isinstance(value, types_):
                look(self, value, path)
                break
        else:
            if not self._attributes(value, path):
                raise TypeError(f"{path}: cannot look into a {type(value).__qualname__}")
            return
        if not isinstance(value, _WHOLE):
            self._attributes(value, path)

    def _attributes(self, value: Any, path: str) -> bool:
        """Look at what an object keeps under names; False if it cannot keep anything so."""
        slots = [name for cls in type(value).__mro__ for name in _names(cls.__dict__.get("__slots__", ()))]
        for name in slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                self.visit(getattr(value, name), f"{path}.{name}")
        own = getattr(value, "__dict__", None)
        for name, attribute in (own or {}).items():
            self.visit(attribute, f"{path}.{name}")
        return bool(slots) or own is not None

    def items(self, pairs: Iterable[tuple[Any, Any]], path: str) -> None:
        """Keys in their order, and their values."""
        pairs = list(pairs)
        self.picture[path] = f"{self.picture.get(path, 'items')} of {len(pairs)}"
        for position, (key, value) in enumerate(pairs):
            if isinstance(key, PLAIN):
                self.picture[f"{path}, key {position}"] = repr(key)
                self.visit(value, f"{path}[{key!r}]")
            else:
                self.visit(key, f"{path}, key {position}")
                self.visit(value, f"{path}[key {position}]")

    def sequence(self, values: Iterable[Any], path: str) -> None:
        self.items(enumerate(values), path)

    def tensor(self, value: Tensor, path: str) -> None:
        self.picture[path] = Array.of_tensor(value)
        # The gradient of what is trained is the callback's to replace.
        if not isinstance(value, nn.Parameter) and value.is_leaf and value.grad is not None:
            self.visit(value.grad, f"{path}.grad")

    def array(self, value: np.ndarray, path: str) -> None:
        if value.dtype == object:
            self.sequence(value.reshape(-1).tolist(), path)
        self.picture[path] = Array(f"{value.dtype} {value.shape}", np.array(value if value.dtype != object else 0))

    def module(self, value: nn.Module, path: str) -> None:
        for name, attribute in value.__dict__.items():
            where = f"{path}.{name}"
            if name in ("_parameters", "_buffers", "_modules"):
                self.picture[where] = ", ".join(attribute)
                for key, child in attribute.items():
                    self.visit(child, f"{path}.{key}")
            elif name.endswith("_hooks") and isinstance(attribute, dict):
                # By position: the keys are numbers that torch counts up over all that runs.
                self.picture[where] = "hooks"
                self.sequence([hook for hook in attribute.values() if not _is_ours(hook)], where)
            elif name == "_metric_attributes":
                # Lightning's, by the addresses of the metrics.
                self.sequence((attribute or {}).values(), where)
            elif "_hooks_" not in name:
                self.visit(attribute, where)

    def function(self, value: types.FunctionType, path: str) -> None:
        self.picture[path] = f"{value.__module__}.{value.__qualname__}"
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            # The cell is empty while the name is not bound.
            if (content := _content(cell)) is not cell:
                self.visit(content, f"{path}<{name}>")
        self.visit((value.__defaults__, value.__kwdefaults__, dict(value.__dict__)), f"{path}()")

    def generator(self, value: types.GeneratorType[Any, Any, Any], path: str) -> None:
        frame = value.gi_frame
        self.picture[path] = f"{value.__qualname__} at {frame.f_lasti if frame is not None else 'its end'}"
        self.items(dict(frame.f_locals).items() if frame is not None else (), path)

    def iterator(self, value: Any, path: str) -> None:
        if isinstance(value, itertools.count):
            self.picture[path] = repr(value)
        elif hasattr(value, "__length_hint__"):
            self.picture[path] += f" with {operator.length_hint(value)} left"
        else:
            raise TypeError(f"{path}: cannot look into a {type(value).__qualname__}")

    def file(self, value: Any, path: str) -> None:
        self.picture[path] += " closed" if value.closed else f" at {value.tell()}"
        if isinstance(value, (io.StringIO, io.BytesIO)) and not value.closed:
            self.visit(value.getvalue(), f"{path}.getvalue()")

    def builtin(self, value: types.BuiltinFunctionType, path: str) -> None:
        self.picture[path] = value.__qualname__
        self.visit(value.__self__, f"{path}.__self__")


def _names(slots: str | Iterable[str]) -> Sequence[str]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def _is_ours(value: Any) -> bool:
    while isinstance(value, (functools.partial, types.MethodType)):
        value = value.func if isinstance(value, functools.partial) else value.__func__
    return str(getattr(value, "__module__", "")).startswith(OWN)


def _set(walk: _Walk, value: set[Any] | frozenset[Any], path: str) -> None:
    walk.sequence(sorted(value, key=repr), path)


def _weak(walk: _Walk, value: weakref.ref[Any], path: str) -> None:
    walk.visit(value(), f"{path}()")


def _cache(walk: _Walk, value: Any, path: str) -> None:
    walk.picture[path] = f"{value.__qualname__} {value.cache_info()}"


def _visits(*parts: str | Callable[[Any], Any]) -> Callable[[_Walk, Any, str], None]:
    """Look at some attributes, or at what functions give."""

    def look(walk: _Walk, value: Any, path: str) -> None:
        for part in parts:
            if isinstance(part, str):
                walk.visit(getattr(value, part), f"{path}.{part}")
            else:
                walk.visit(part(value), f"{path}()")

    return look


def _mapping(walk: _Walk, value: Mapping[Any, Any], path: str) -> None:
    walk.items(value.items(), path)
    if isinstance(value, collections.defaultdict):
        walk.visit(value.default_factory, f"{path}.default_factory")


def _sequence(walk: _Walk, value: Any, path: str) -> None:
    walk.sequence(value, path)
    if isinstance(value, collections.deque):
        walk.picture[path] = f"{walk.picture[path]}, at most {value.maxlen}"


#: How to look into objects of each type; into all others by their attributes.
_LOOKS: list[tuple[Any, Callable[..., None]]] = [
    (Tensor, _Walk.tensor),
    (np.ndarray, _Walk.array),
    (nn.Module, _Walk.module),
    (torch.Generator, _visits(torch.Generator.get_state)),
    (np.random.Generator, _visits("bit_generator")),
    (np.random.BitGenerator, _visits("state")),
    (np.random.RandomState, _visits(lambda state: state.get_state())),
    (random.Random, _visits(lambda stream: repr(stream.getstate()))),
    ((dict, types.MappingProxyType), _mapping),
    ((list, tuple, collections.deque), _sequence),
    ((set, frozenset, weakref.WeakSet), _set),
    (weakref.WeakValueDictionary, lambda walk, value, path: walk.items(sorted(value.items(), key=repr), path)),
    (weakref.ref, _weak),
    (types.FunctionType, _Walk.function),
    (types.MethodType, _visits("__func__", "__self__")),
    (types.BuiltinFunctionType, _Walk.builtin),
    (functools.partial, _visits("func", "args", "keywords")),
    (functools._lru_cache_wrapper, _cache),
    (types.GeneratorType, _Walk.generator),
    (io.IOBase, _Walk.file),
    (pathlib.PurePath, _visits("name")),
    (queue.SimpleQueue, _visits(lambda waiting: waiting.qsize())),
    (collections.abc.Iterator, _Walk.iterator),
]
#: Those of them whose attributes are irrelevant.
_WHOLE = (nn.Module, types.FunctionType, pathlib.PurePath, weakref.WeakSet, weakref.WeakValueDictionary)


@dataclass(frozen=True)
class Seen:
    """The visible results of a training.

    Attributes:
        pictures: Of the module, the batch, what was logged, files and random streams, by the time of each.
        steps: The training steps, and their lines.
        weights: The trained parameters after each batch.
        left: The project's hooks that are on the module when training has ended.
    """

    pictures: dict[str, Picture]
    steps: Steps
    weights: list[list[Tensor]]
    left: list[str]

    def differences(self, expected: Seen, rounding: float = 0.0) -> list[str]:
        """The differences to another training; empty if there are none."""
        found = [f"left on the module: {hook}" for hook in self.left]
        for time, seen in self.pictures.items():
            if (difference := first_difference(seen, expected.pictures[time], rounding)) is not None:
                found.append(f"{time}: {difference}")
                break
        return found + self.steps.differences(expected.steps)


class Witness(pl.Callback):
    """Takes the pictures of a training; makes its weights those of another one, if there is one to follow."""

    def __init__(self, folder: pathlib.Path, lead: Seen | None) -> None:
        self._folder, self._lead = folder, lead
        self.pictures: dict[str, Picture] = {}
        self.weights: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trained = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        if self._lead is not None:
            for parameter, value in zip(trained, self._lead.weights[batch_idx], strict=True):
                parameter.data.copy_(value)
        self.weights.append([parameter.detach().clone() for parameter in trained])
        more = self.everything(trainer, pl_module) if batch_idx % LOOK_EVERY_N_BATCHES == 0 else {}
        self.pictures[f"after batch {batch_idx}"] = picture(**more, outputs=outputs, batch=batch)

    def everything(self, trainer: Any, module: Any) -> dict[str, Any]:
        logged = {"callback": trainer.callback_metrics, "bar": trainer.progress_bar_metrics}
        return {
            "module": module,
            "elsewhere": module.elsewhere(),
            "files": {file.name: file.read_bytes() for file in sorted(self._folder.iterdir())},
            "logged": {k: {n: v for n, v in d.items() if not n.startswith("kfc/")} for k, d in logged.items()},
            "streams": {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random._inst},
        }


def train(
    make: Callable[[pathlib.Path, Callable[[int], None]], Any],
    batches: Callable[[Any], Any],
    folder: pathlib.Path,
    callbacks: Sequence[pl.Callback] = (),
    *,
    lead: Seen | None = None,
    seed: int = 3,
    **options: Any,
) -> Seen:
    """Train a module, and keep all that can be seen of it.

    Args:
        make: Makes the module, given an empty folder and a function that its ``training_step`` calls first.
        batches: Gives, for the module, what it is trained on.
        folder: Where a folder is made for its files.
        callbacks: Others beside the one that looks.
        lead: A training whose weights this one has after each batch, whatever its own optimizer does.
        seed: Of the global random streams.
        **options: Of the Trainer.
    """
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    files = folder / "files"
    files.mkdir(parents=True)
    steps, witness = Steps(), Witness(files, lead)
    module = make(files, steps.note)
    used = trainer(*callbacks, witness, **options)
    used.fit(module, batches(module))
    witness.pictures["at the end"] = picture(**witness.everything(used, module))
    dicts = [(f"{name}.{key}", value) for name, part in module.named_modules() for key, value in vars(part).items()]
    hooks = [(key, hook) for key, value in dicts if key.endswith("_hooks") for hook in value.values()]
    left = [key for key, value in [*dicts, *hooks] if _is_ours(value)]
    return Seen(witness.pictures, steps, witness.weights, left)
