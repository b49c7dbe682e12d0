"""Ablation of KFC: ``python -m benchmarks.contest.ablation``.

KFC with one change at a time, interleaved with its defaults, on three of the contest's tasks, to each task's hardest
loss. A seed of a task is a piece; after an interruption, the command continues with the missing pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import nn

from benchmarks.contest.contestants import ABLATION, CONTESTANTS
from benchmarks.contest.convergence import SEEDS, compete_missing
from benchmarks.contest.curves import median_ratio
from benchmarks.contest.optimizers import Contestant, KFCStepper, Stepper
from benchmarks.contest.pieces import parser_of_pieces
from benchmarks.contest.report import Results
from benchmarks.contest.tasks import TASKS
from lightning_kfc import KFC
from lightning_kfc.trust_region.outcome import Outcome, Verdict

#: Two losses, with and without batch norm and noise; those whose runs are short.
ON = (("conv", 512), ("conv_autoencoder", 512), ("resnet", 128))
DEFAULT = CONTESTANTS["kfc"]


def changed(name: str, title: str, change: Callable[[KFC], None]) -> Contestant:
    """The defaults with a part of the engine switched off, for which there is no setting.

    Args:
        name: The name in files.
        title: The name in tables.
        change: Changes an engine.
    """

    def make(model: nn.Module, lr: float, seed: int) -> Stepper:
        stepper = DEFAULT.make(model, lr, seed)
        assert isinstance(stepper, KFCStepper)
        change(stepper.kfc)
        return stepper

    return Contestant(name, title, make, DEFAULT.grid)


def promise_anything(kfc: KFC) -> None:
    """Do not bound the slope of a step."""
    # Assigned to the one object: the engine has no such setting, and is to have none.
    kfc.reviewer.region.most_decrease = lambda loss: None  # type: ignore[method-assign]  # the part is taken out


def keep_or_take_back(kfc: KFC) -> None:
    """Never shorten a step: keep it, or undo it if the loss has grown."""
    review = kfc.reviewer.region.judge

    def judge(outcome: Outcome, size: float) -> Verdict:
        verdict = review(outcome, size)
        return replace(verdict, kept_share=float(not verdict.undo))

    kfc.reviewer.region.judge = judge  # type: ignore[method-assign]  # the part is taken out


VARIANTS = (
    *ABLATION,
    changed("kfc_promising", "KFC, steps may promise more than the loss", promise_anything),
    changed("kfc_unshortened", "KFC, steps kept or taken back, never shortened", keep_or_take_back),
)


def table(all_results: Sequence[Results]) -> str:
    """Iterations and seconds of each variant over those of the defaults, medians of the ratios of each seed."""
    heads = [
        f"{results.title}, batch {results.batch_size}, to {results.targets[-1]:g}; seeds: {len(results.seeds())}"
        for results in all_results
    ]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    cells = []
    for results in all_results:
        reached = [curve.reach(results.targets[-1]) for curve in results.of(DEFAULT.name)]
        cells.append(f"{median(r.iterations for r in reached):.0f} / {median(r.seconds for r in reached):.1f} s")
    lines.append(f"| {DEFAULT.title} | " + " | ".join(cells) + " |")
    for variant in VARIANTS:
        cells = [_ratios(results, variant.name) for results in all_results]
        lines.append(f"| {variant.title.removeprefix('KFC, ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratios(results: Results, name: str) -> str:
    if name not in results.curves:
        return "-"
    target = results.targets[-1]
    found = []
    for unit in ("iterations", "seconds"):
        ours, theirs = ([getattr(c.reach(target), unit) for c in results.of(n)] for n in (DEFAULT.name, name))
        ratio = median_ratio(ours, theirs)
        found.append("not reached" if math.isinf(ratio) else f"{ratio:.2f}")
    return found[0] if len(set(found)) == 1 else " / ".join(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the missing pieces, and write the table.

    Returns:
        The exit status: 0 when all is done, 3 when pieces are left.
    """
    parser = parser_of_pieces(__doc__, plots=False)
    parser.add_argument("--tasks", nargs="+", choices=[name for name, _ in ON], default=[name for name, _ in ON])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = options.results / "ablation"
    done = True
    for name, batch_size in ON:
        if name in options.tasks and done:
            task = TASKS[name].at(batch_size)
            done = compete_missing(task, (DEFAULT, *VARIANTS), options.seeds, folder, options.pieces)
    order = [f"contest_{name}_b{batch_size}.json" for name, batch_size in ON]
    measured = [Results.load(folder / name) for name in order if (folder / name).exists()]
    text = table([results for results in measured if results.seeds()])
    (options.results / "ablation.md").write_text(text + "\n")
    print(text)
    return 0 if done else 3


if __name__ == "__main__":
    raise SystemExit(main())
