"""The contest of whole recipes.

``python -m benchmarks.recipes.contest`` searches each peer's learning rate at half of the longest schedule, on a seed
that is not reported, then runs all optimizers with schedules of a quarter, a half and the whole length, in turns. KFC
has no search. Results are saved after each run, and the same command continues after an interruption. ``--again``
replaces the runs of the named optimizers. ``--smoke`` tests all runs with a few steps.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest.curves import at_edge
from benchmarks.contest.harness import interleave
from benchmarks.contest.report import lists_on_one_line, measured_with
from benchmarks.contest.tuning import beyond
from benchmarks.paths import RESULTS
from benchmarks.recipes.recipes import RECIPES, Recipe
from benchmarks.recipes.runs import AVERAGES, KFC_NAME, TRAINEES, Training
from benchmarks.recipes.tables import LENGTHS, write_tables

SEEDS = (0, 1, 2)
SEARCH_SEED = 100
SEARCH_LENGTH = 0.5
#: The largest number of extensions of a grid.
EXTENSIONS = 2


def record_file(folder: Path, recipe: Recipe) -> Path:
    """The file of a recipe's record."""
    return folder / f"recipes_contest_{recipe.name}.json"


def load(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """A recipe's record: ``search`` by peer and rate, ``rates`` by optimizer, ``runs`` by seed."""
    path = record_file(folder, recipe)
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return {
        "recipe": recipe.name,
        "title": recipe.title,
        "metric": recipe.metric_title,
        "batch_size": recipe.batch_size,
        "epochs": recipe.epochs,
        "search": {},
        "rates": {},
        "runs": {},
    }


def save(folder: Path, recipe: Recipe, record: dict[str, Any]) -> None:
    """Write JSON, completely or not at all."""
    path = record_file(folder, recipe)
    partial = path.with_suffix(".partial")
    content = {**record, "measured_with": measured_with()}
    partial.write_text(lists_on_one_line(json.dumps(content, indent=1)) + "\n")
    partial.replace(path)


def search(recipe: Recipe, record: dict[str, Any]) -> None:
    """Choose the peers' learning rates by the better value at the end, with or without the average."""
    record["rates"][KFC_NAME] = TRAINEES[KFC_NAME].grid[0]
    tried: dict[str, dict[float, Training]] = {name: {} for name in TRAINEES if name != KFC_NAME}
    missing = {name: list(TRAINEES[name].grid) for name in tried}
    for _ in range(EXTENSIONS + 1):
        runs = [
            Training(recipe, name, lr, SEARCH_LENGTH, SEARCH_SEED, validations=4)
            for name, lrs in missing.items()
            for lr in lrs
        ]
        interleave(runs)
        for run in runs:
            tried[run.name][run.lr] = run
        missing = {}
        for name, at in tried.items():
            best = min(at, key=lambda lr: (at[lr].values[at[lr].best_average()][-1], at[lr].losses[AVERAGES[1]][-1]))
            record["rates"][name] = best
            if at_edge(best, list(at)):
                missing[name] = [beyond(list(at), best)]
    for name, at in tried.items():
        record["search"][name] = {
            f"{lr:.3g}": {average: _rounded(at[lr].values[average][-1]) for average in AVERAGES} for lr in sorted(at)
        }


def compete(recipe: Recipe, record: dict[str, Any], seed: int, names: Iterable[str] = TRAINEES) -> None:
    """Run optimizers at all lengths in turns on one seed."""
    runs = [Training(recipe, name, record["rates"][name], length, seed) for length in LENGTHS for name in names]
    interleave(runs)
    results: dict[str, Any] = {name: {} for name in names}
    for run in runs:
        results[run.name][f"{run.length:g}"] = {
            "epochs": [round(epoch, 3) for epoch in run.epochs],
            **{
                average: {
                    "seconds": [round(seconds, 3) for seconds in run.seconds[average]],
                    "values": [_rounded(value) for value in run.values[average]],
                    "losses": [_rounded(loss) for loss in run.losses[average]],
                }
                for average in AVERAGES
            },
        }
    record["runs"].setdefault(str(seed), {}).update(results)


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def run_missing(recipes: Sequence[Recipe], seeds: Sequence[int], folder: Path, again: Sequence[str] = ()) -> None:
    """Search missing rates and make missing runs, or those of optimizers again, seed by seed over all recipes."""
    for seed in seeds:
        for recipe in recipes:
            record = load(folder, recipe)
            started = time.process_time()
            if len(record["rates"]) < len(TRAINEES):
                search(recipe, record)
                save(folder, recipe, record)
                print(f"{recipe.name}: {record['rates']}, {time.process_time() - started:.0f} s", flush=True)
            if again or str(seed) not in record["runs"]:
                compete(recipe, record, seed, again or TRAINEES)
                save(folder, recipe, record)
                print(f"{recipe.name}, seed {seed}: {time.process_time() - started:.0f} s", flush=True)


def smoke(recipe: Recipe, steps: int = 8) -> Recipe:
    """The recipe with few examples, so that the longest run makes so many steps."""
    split = recipe.data()
    count, held_out = steps * recipe.batch_size, 16
    few = replace(
        split,
        train_inputs=split.train_inputs[:count],
        train_targets=split.train_targets[:count],
        test_inputs=split.test_inputs[:held_out],
        test_targets=split.test_targets[:held_out],
    )
    return replace(recipe, epochs=1, data=lambda: few)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--again", nargs="+", choices=TRAINEES, default=(), help="run these again, and no others")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="eight steps of each; name another folder for the results")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(1)
    recipes = [RECIPES[name] for name in options.only]
    if options.smoke:
        if options.results == RESULTS:
            parser.error("--smoke needs --results with a folder of its own: the published results are not for it.")
        recipes = [smoke(recipe) for recipe in recipes]
    run_missing(recipes, options.seeds, options.results, options.again)
    measured = [recipe for recipe in RECIPES.values() if record_file(options.results, recipe).exists()]
    print(write_tables(options.results, [load(options.results, recipe) for recipe in measured]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
