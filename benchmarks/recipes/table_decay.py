"""Why KFC ends above SOAP on the table: ``python -m benchmarks.recipes.table_decay``.

The recipe ``table`` is trained at half of its longest schedule, by KFC at several weight decays and by SOAP at its own.
The loss on the training examples and on the held-out ones tells a worse fit from a worse generalisation.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import torch

from benchmarks.paths import RESULTS
from benchmarks.recipes.contest import load
from benchmarks.recipes.recipes import RECIPES, Recipe
from benchmarks.recipes.runs import KFC_NAME, PLAIN, TRAINEES, Training

LENGTH = 0.5
SEEDS = (0, 1, 2)
#: The multiples of KFC's weight decay in the contest.
MULTIPLES = (1, 10, 100, 1000)


@torch.no_grad()
def final_losses(recipe: Recipe, name: str, lr: float, seed: int) -> tuple[float, float]:
    """The loss on all training examples, without noise on their columns, and on the held-out ones, after a run."""
    training = Training(recipe, name, lr, LENGTH, seed, validations=1)
    with torch.enable_grad():
        training.advance(training.total)
    split = recipe.data()
    training.model.eval()
    return float(recipe.loss(training.model(split.train_inputs), split.train_targets)), training.losses[PLAIN][-1]


def row(title: str, recipe: Recipe, name: str, lr: float) -> str:
    """A row: medians over the seeds."""
    fitted, held_out = zip(*(final_losses(recipe, name, lr, seed) for seed in SEEDS), strict=True)
    return f"| {title} | {median(fitted):.4f} | {median(held_out):.4f} |"


def main() -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    recipe = RECIPES["table"]
    lines = [f"Medians of {len(SEEDS)} seeds, half of the longest schedule, weights without an average.", ""]
    lines += ["| optimizer | training loss | held-out loss |", "|---|---|---|"]
    for multiple in MULTIPLES:
        stronger = replace(recipe, decay=recipe.decay * multiple)
        title = f"KFC, its decay{f' x {multiple}' if multiple > 1 else ''}"
        lines.append(row(title, stronger, KFC_NAME, TRAINEES[KFC_NAME].grid[0]))
        print(lines[-1], flush=True)
    lines.append(row("SOAP", recipe, "soap", load(RESULTS, recipe)["rates"]["soap"]))
    print(lines[-1])
    (RESULTS / "recipes_table_decay.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
