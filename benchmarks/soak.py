"""Long trainings with the callback: ``python -m benchmarks.soak --steps 10000``.

Memory must not grow, and no hook may stay attached. Resident memory (Linux only), live tensors and hooks are sampled
while each net trains, after a warm-up of a tenth of the steps. The exit status is 1 if they grew. A net is a piece;
after an interruption, the command continues with the missing pieces.
"""

from __future__ import annotations

import gc
import json
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.contest.pieces import parser_of_pieces
from benchmarks.contest.report import lists_on_one_line, measured_with
from benchmarks.devices import quiet_trainer
from lightning_kfc import KFCCallback

#: Growth of the resident memory that is attributed to the allocator, in MiB.
SLACK_MIB = 16.0
STEPS = 10_000

#: A sample: the step, resident MiB, live tensors, attached hooks, CPU seconds of the training so far.
Sample = tuple[int, float, int, int, float]


def mlp() -> nn.Module:
    """Three linear layers with layer norm."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(100, 64), nn.LayerNorm(64), nn.Tanh()),
        *(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
    )


def conv() -> nn.Module:
    """Two convolutions with batch norm and dropout, and a linear head."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.1)),
        *(nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(72, 10)),
    )


class Transformer(nn.Module):
    """An encoder of one layer over the ten rows of an image, with a position embedding and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(10, 32)
        self.position = nn.Parameter(torch.zeros(10, 32))
        self.encoder = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits, shape ``(N, 10)``."""
        logits: Tensor = self.head(self.encoder(self.rows(x[:, 0]) + self.position).mean(1))
        return logits


NETS: Mapping[str, Any] = {"mlp": mlp, "conv": conv, "transformer": Transformer}
TITLES = {
    "mlp": "linear layers, layer norm",
    "conv": "convolutions, batch norm, dropout",
    "transformer": "attention, layer norm, dropout, position embedding",
}


class Trained(pl.LightningModule):
    """A net in training on random labels, at a small learning rate."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The cross entropy of a batch."""
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The paper's optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.5)


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * 4096 / 2**20


def live_tensors() -> int:
    """Tensors that Python can reach."""
    gc.collect()
    # By type: the attribute ``__class__`` of lazy objects would load them.
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def attached_hooks(module: nn.Module) -> int:
    """Forward and backward hooks on all modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)


class Sampler(pl.Callback):
    """Samples and prints the numbers about twenty times, first after the warm-up."""

    def __init__(self, steps: int) -> None:
        self.every = max(1, steps // 20)
        self.start = steps // 10
        self.samples: list[Sample] = []
        self._started = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Take a sample if due."""
        step = trainer.global_step
        if step >= self.start and step % self.every == 0:
            reached = time.process_time()
            memory, seconds = round(resident_mib(), 1), round(reached - self._started, 1)
            self.samples.append((step, memory, live_tensors(), attached_hooks(pl_module), seconds))
            line = "step {:7d}   resident {:8.1f} MiB   tensors {:5d}   hooks {}   {:7.1f} CPU seconds"
            print(line.format(*self.samples[-1]), flush=True)
            # The count of tensors takes longer than many steps.
            self._started += time.process_time() - reached


def soak(net: str, steps: int, *more: pl.Callback, **options: Any) -> tuple[list[Sample], list[str]]:
    """Train a net.

    Args:
        net: A name of :data:`NETS`.
        steps: The number of optimizer steps.
        more: Further callbacks.
        options: The options of ``KFCCallback``.

    Returns:
        The samples, and the problems.
    """
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 1, 10, 10), torch.randint(0, 10, (64,)))
    module, kfc, sampler = Trained(NETS[net]()), KFCCallback(**options), Sampler(steps)
    trainer = quiet_trainer("cpu", max_steps=steps, callbacks=[kfc, *more, sampler])
    trainer.fit(module, DataLoader(data, batch_size=16, shuffle=True))
    first, last = sampler.samples[0], sampler.samples[-1]
    events = str(kfc.kfc.events) or "none"
    print(f"growth: {last[1] - first[1]:+.1f} MiB, {last[2] - first[2]:+d} tensors; events: {events}")
    wrong = []
    if last[1] - first[1] > SLACK_MIB:
        wrong.append(f"resident memory grew by {last[1] - first[1]:.1f} MiB")
    if last[2] > first[2]:
        wrong.append(f"the number of live tensors grew from {first[2]} to {last[2]}")
    if any(sample[3] for sample in sampler.samples) or attached_hooks(module):
        wrong.append("hooks were left attached between steps")
    if "train_step_context" in vars(trainer.precision_plugin):
        wrong.append("the precision plugin was left patched")
    if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
        wrong.append("a weight is not finite")
    return sampler.samples, wrong


def markdown(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each net: its memory after a tenth of the steps and at the end, and its time."""
    lines = [
        "*Tensors* are those that Python can reach, *hooks* those on the model's modules between steps. The first "
        "numbers follow a tenth of the steps. CPU seconds are those of the whole training on one thread.",
        "",
        "| net | steps | resident MiB, first | last | most | tensors, first | last | hooks | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in found.items():
        samples = entry["samples"]
        first, last = samples[0], samples[-1]
        most, hooks = max(sample[1] for sample in samples), max(sample[3] for sample in samples)
        cells = [f"{first[1]:.1f}", f"{last[1]:.1f}", f"{most:.1f}", first[2], last[2], hooks, f"{last[4]:.0f}"]
        lines.append(f"| {name}: {TITLES[name]} | {last[0]} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the missing nets, and write the table.

    Returns:
        The exit status: 0 without problems, 1 if something grew, 3 when pieces are left.
    """
    parser = parser_of_pieces(__doc__, plots=False)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default: {STEPS})")
    parser.add_argument("--inverse", default="cholesky", help="the callback's option (default: cholesky)")
    parser.add_argument("--every-step", action="store_true", help="make every step a due step")
    parser.add_argument("--again", nargs="+", choices=NETS, default=(), help="forget these nets")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    every: dict[str, Any] = {"factor_every_n_steps": 1, "inverse_every_n_steps": 1} if options.every_step else {}
    given = {"steps": options.steps, "inverse": options.inverse, **every}
    saved = options.results / "soak.json"
    found: dict[str, Any] = json.loads(saved.read_text("utf-8"))["found"] if saved.exists() else {}
    kept = {n: entry for n, entry in found.items() if n not in options.again and entry["options"] == given}
    missing = [name for name in NETS if name not in kept]
    now = missing[: options.pieces]
    for name in now:
        print(f"==> {name}", flush=True)
        samples, wrong = soak(name, options.steps, inverse=options.inverse, **every)
        print("\n".join(f"FAILED: {what}" for what in wrong) or "memory flat, no hook left", flush=True)
        kept[name] = {"options": given, "samples": samples, "wrong": wrong}
        ordered = {name: kept[name] for name in NETS if name in kept}
        text = json.dumps({"measured_with": measured_with(), "found": ordered}, indent=1)
        saved.write_text(lists_on_one_line(text) + "\n")
        (options.results / "soak.md").write_text(markdown(ordered) + "\n")
    if any(entry["wrong"] for entry in kept.values()):
        return 1
    return 0 if len(now) == len(missing) else 3


if __name__ == "__main__":
    raise SystemExit(main())
