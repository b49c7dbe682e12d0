"""Where KFC's time goes in the recipes: ``python -m benchmarks.recipes.shares``.

Each recipe is trained for half of its longest schedule by KFC and by SGD, by turns. The table has KFC's first ten steps
and its later ones, in CPU time of SGD's steps, and the shares of the later ones by phase.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.contest.harness import BLOCK
from benchmarks.contest.optimizers import KFCStepper, TimedStepper
from benchmarks.contest.pieces import parser_of_pieces
from benchmarks.recipes.recipes import RECIPES, Recipe
from benchmarks.recipes.runs import KFC_NAME, PLAIN, TRAINEES, Training
from lightning_kfc.monitoring.timing import PHASES

LENGTH = 0.5
FIRST = 10
NAME = "recipes_contest_shares"


def measure(recipe: Recipe, seed: int = 0) -> dict[str, float]:
    """Costs of a step beside SGD's, and the shares of the later steps."""
    ours = Training(recipe, KFC_NAME, TRAINEES[KFC_NAME].grid[0], LENGTH, seed, validations=1)
    sgd = Training(recipe, "sgd", TRAINEES["sgd"].grid[0], LENGTH, seed, validations=1)
    stepper = ours.stepper
    assert isinstance(stepper, KFCStepper)
    ours.stepper = timed = TimedStepper(stepper.kfc, stepper.optimizer)
    ours.advance(FIRST)
    sgd.advance(FIRST)
    first, before = ours.step_seconds, timed.kfc.times.seconds()
    while not ours.over():
        ours.advance(BLOCK)
        sgd.advance(BLOCK)
    plain = sgd.seconds[PLAIN][-1] / sgd.total
    later = {phase: seconds - before[phase] for phase, seconds in timed.kfc.times.seconds().items()}
    found = {
        "steps": ours.total,
        "first": first / FIRST / plain,
        "later": (ours.step_seconds - first) / (ours.total - FIRST) / plain,
        **{phase: later[phase] / sum(later.values()) for phase in PHASES},
    }
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each recipe."""
    lines = [
        f"| recipe | steps | first {FIRST} steps, SGD = 1 | later ones | of these: {' | '.join(PHASES)} |",
        "|---" * (4 + len(PHASES)) + "|",
    ]
    for name, found in results.items():
        shares = " | ".join(f"{100 * found[phase]:.0f} %" for phase in PHASES)
        costs = f"{found['steps']:.0f} | {found['first']:.1f} | {found['later']:.2f}"
        lines.append(f"| {name.replace('_', ' ')} | {costs} | {shares} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, and write the table."""
    options = parser_of_pieces(__doc__, plots=False).parse_args(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(1)
    path: Path = options.results / f"{NAME}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in [name for name in RECIPES if name not in results][: options.pieces]:
        results[name] = measure(RECIPES[name])
        path.write_text(json.dumps(results, indent=1) + "\n")
    (options.results / f"{NAME}.md").write_text(table(results))
    print(table(results))
    return 0 if len(results) == len(RECIPES) else 3


if __name__ == "__main__":
    raise SystemExit(main())
