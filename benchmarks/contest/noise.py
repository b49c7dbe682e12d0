"""Radius and damping on noisy objectives: ``python -m benchmarks.contest.noise``.

With small batches, dropout, augmentation and batch norm, the loss of a batch differs from that of all examples. A trust
region could follow this noise, and shrink to 0 or grow without bound. The benchmark measures radius, damping and
training loss over several hundred steps at the defaults. A setting is a piece; after an interruption, the command
continues with the missing pieces.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import nn

from benchmarks.contest.contestants import CONTESTANTS
from benchmarks.contest.networks import conv_net
from benchmarks.contest.optimizers import BatchLoss, KFCStepper
from benchmarks.contest.pieces import parser_of_pieces
from benchmarks.contest.plots import STYLE
from benchmarks.contest.report import lists_on_one_line, measured_with
from benchmarks.contest.tasks import TASKS, Goal, Task
from lightning_kfc.trust_region.region import LARGEST_RADIUS, SMALLEST_RADIUS

STEPS = 600
#: The period of measurements, in steps.
EVERY = 5
SEED = 0


def with_dropout(make: Callable[[], nn.Sequential], p: float = 0.5) -> nn.Sequential:
    """A network with dropout before its last layer."""
    *first, last = make()
    return nn.Sequential(*first, nn.Dropout(p), last)


@dataclass(frozen=True)
class Setting:
    """A noisy training.

    Attributes:
        name: The name in files.
        title: The name in the table and the plot.
        task: The task, at its batch size.
    """

    name: str
    title: str
    task: Task


def _sized(task: Task, batch_size: int, **changed: Any) -> Task:
    return replace(task, batch_size=batch_size, goals={batch_size: Goal((0.0,), STEPS, math.inf)}, **changed)


SETTINGS = (
    Setting("conv_b32", "conv net, batch 32", _sized(TASKS["conv"], 32)),
    Setting(
        "conv_dropout_b32",
        "conv net with dropout 0.5, batch 32",
        _sized(TASKS["conv"], 32, make_model=functools.partial(with_dropout, conv_net)),
    ),
    Setting(
        "conv_dropout_b128",
        "conv net with dropout 0.5, batch 128",
        _sized(TASKS["conv"], 128, make_model=functools.partial(with_dropout, conv_net)),
    ),
    Setting("resnet_b32", "ResNet-20, batch norm, shifted images, batch 32", _sized(TASKS["resnet"], 32)),
    Setting("resnet_b128", "ResNet-20, batch norm, shifted images, batch 128", _sized(TASKS["resnet"], 128)),
)

#: By setting: the steps, and at each the radius, the damping and the training loss.
Found = dict[str, dict[str, list[float]]]


def follow(task: Task, steps: int) -> dict[str, list[float]]:
    """Train at the defaults, and record radius, damping and the loss on training examples in evaluation mode."""
    torch.manual_seed(SEED)
    model = task.make_model()
    contestant = CONTESTANTS["kfc"]
    stepper = contestant.make(model, contestant.grid[0], SEED)
    assert isinstance(stepper, KFCStepper)
    batches = task.batches(SEED)
    found: dict[str, list[float]] = {"step": [], "radius": [], "damping": [], "loss": []}
    for step in range(1, steps + 1):
        inputs, targets = next(batches)
        stepper.step(BatchLoss(model, task.loss, inputs, targets))
        if step % EVERY == 0:
            radius = stepper.kfc.kl_clip
            assert radius is not None
            numbers = (step, radius, stepper.kfc.damping, task.training_loss(model))
            for values, number in zip(found.values(), numbers, strict=True):
                values.append(number)
    return found


def markdown(found: Found) -> str:
    """The table: lowest, late median and highest radius and damping, and the losses of both halves."""
    lines = [
        f"Over {STEPS} steps; lowest, median of the second half, highest. The radius may be {SMALLEST_RADIUS:g} to "
        f"{LARGEST_RADIUS:g} times the loss.",
        "",
        "| training | radius | damping | training loss: median of the first half, of the second half |",
        "|---|---|---|---|",
    ]
    for setting in SETTINGS:
        if setting.name not in found:
            continue
        values = found[setting.name]
        half = len(values["step"]) // 2
        cells = [setting.title]
        for name in ("radius", "damping"):
            own = values[name]
            cells.append(f"{min(own):.2g}, {median(own[half:]):.2g}, {max(own):.2g}")
        cells.append(f"{median(values['loss'][:half]):.3g}, {median(values['loss'][half:]):.3g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: Found, path: Path) -> None:
    """Radius, damping and loss against steps, one line per training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
        for setting in SETTINGS:
            if setting.name in found:
                for axis, name in zip(axes, ("radius", "damping", "loss"), strict=True):
                    axis.plot(found[setting.name]["step"], found[setting.name][name], label=setting.title, linewidth=1)
        for axis, title in zip(axes, ("radius", "damping", "training loss"), strict=True):
            axis.set(yscale="log", xlabel="step", title=title)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the missing pieces, and write table and plot.

    Returns:
        The exit status: 0 when all is done, 3 when pieces are left.
    """
    parser = parser_of_pieces(__doc__)
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    saved = options.results / "noise.json"
    found: Found = json.loads(saved.read_text())["found"] if saved.exists() and not options.again else {}
    missing = [setting for setting in SETTINGS if setting.name not in found]
    for setting in missing[: options.pieces]:
        found[setting.name] = follow(setting.task, options.steps)
        saved.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"found": found, "measured_with": measured_with()}, indent=1)
        saved.write_text(lists_on_one_line(text) + "\n")
        print(setting.title, flush=True)
    table = markdown(found)
    (options.results / "noise.md").write_text(table + "\n")
    plot(found, options.plots / "noise.svg")
    print(table)
    return 0 if options.pieces is None or len(missing) <= options.pieces else 3


if __name__ == "__main__":
    raise SystemExit(main())
