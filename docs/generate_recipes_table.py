"""Writes the table of parts of a recipe that work against KFC into ``recipes.md``.

    python docs/generate_recipes_table.py

The conditions have the constants of the code, and each message is the one that the code gives in an example.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from generated_tables import page_with
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

from lightning_kfc.callback import optimizer_advice as at_start
from lightning_kfc.callback.schedule_preview import Schedule
from lightning_kfc.monitoring import advice as in_course
from lightning_kfc.settings import Settings

PAGE = Path(__file__).parent / "recipes.md"


def of_optimizer(optimizer: Optimizer, *schedules: Any, rule: str = "natural", **options: Any) -> str:
    """The one warning about an optimizer and its schedules."""
    settings = Settings(rule=rule, damping="auto", kl_clip="auto")
    (found,) = at_start.warnings_for(optimizer, settings, schedules=list(map(Schedule, schedules)), **options)
    return found.text


def of_numbers(rule: Any, **facts: Any) -> str:
    """The advice of a rule in the course of a training."""
    found = rule(in_course.Facts(**facts))
    if found is None:
        raise ValueError(f"{rule.__name__} has no advice on {facts}")
    return str(found)


def rows() -> list[tuple[str, str, str]]:
    """Each part of a recipe, the condition of its message, and the message in an example."""

    def sgd(**options: float) -> Optimizer:
        return SGD(weights.parameters(), **{"lr": at_start.RATE, "momentum": at_start.MOMENTUM, **options})

    weights, steps = nn.Linear(2, 2), 200
    cycled, vanishing = sgd(), sgd()
    of_run = at_start.warning_for_run(Settings(), 20)
    assert of_run is not None
    (fixed,) = at_start.warnings_for(sgd(), Settings(rule="adam", damping=0.1))
    low, high = at_start.LOW_RATE, at_start.HIGH_RATE
    return [
        (
            f"{', '.join(f'`{name}`' for name in sorted(at_start.RESCALING))}, and optimizers with `betas`",
            "always",
            of_optimizer(AdamW(weights.parameters(), lr=1e-3)),
        ),
        (
            "`OneCycleLR`, `CyclicLR`",
            "they raise the momentum above the optimizer's own",
            of_optimizer(cycled, OneCycleLR(cycled, at_start.RATE, steps), steps=steps),
        ),
        (
            "momentum",
            f'above {at_start.HIGHEST_MOMENTUM:g}, with `kl_clip="auto"`; not with "adam"',
            of_optimizer(sgd(lr=0.1, momentum=0.9)),
        ),
        (
            "learning rate",
            f"the highest is below {low['natural']:g}",
            of_optimizer(sgd(lr=1e-3)),
        ),
        (
            "learning rate, with the rule 'adam'",
            f"the highest is below {low['adam']:g} or above {high['adam']:g}, at a momentum of {at_start.MOMENTUM:g}",
            of_optimizer(sgd(lr=3.0), rule="adam"),
        ),
        (
            "weight decay of SGD",
            f"shrinks weights by more than {at_start.MOST_SHRUNK:g} of their size in each step, with "
            "`lr * weight_decay / (1 - momentum)`, in a run of more steps than one over this share",
            of_optimizer(sgd(weight_decay=0.01)),
        ),
        (
            "schedule",
            f"below {at_start.VANISHED:g} of its highest in more than {at_start.VANISHED_FOR:.0%} of the steps",
            of_optimizer(vanishing, ExponentialLR(vanishing, 0.9), steps=steps),
        ),
        ("`damping`, with the rule 'adam'", "always", fixed.text),
        ("`warmup_steps`", "the run ends within one period of inverses after the warm-up", of_run.text),
        (
            "batches of one or two examples",
            f"after {in_course.FIRST_STEPS} steps: a layer with Kronecker factors had at most {in_course.FEW_ROWS} "
            "rows in each",
            of_numbers(in_course.few_rows, steps=in_course.FIRST_STEPS, fewest_rows=1, layer_of_fewest_rows="head"),
        ),
        (
            "gradient clipping",
            f"half of the last {in_course.CLIPPED_STEPS} updates were shortened to less than {in_course.CLIPPED_TO:g} "
            f"of their length, at a momentum below {in_course.LONG_MOMENTUM:g}",
            of_numbers(
                in_course.gradient_clipping_sets_the_step, gradient_clip_factors=[0.02] * in_course.CLIPPED_STEPS
            ),
        ),
    ]


def table() -> str:
    """The table."""
    lines = ["| my recipe has | condition | message, in an example |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows())]) + "\n"


def page() -> str:
    """The page with the table of today."""
    return page_with(table(), PAGE, __file__)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
