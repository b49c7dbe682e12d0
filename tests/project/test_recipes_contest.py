"""The contest of whole recipes: recipes as torch has them, averages, records that go on, tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from benchmarks.contest.data import Split
from benchmarks.paths import RESULTS
from benchmarks.recipes import contest, recipes, shares, tables
from benchmarks.recipes.recipes import RECIPES, Recipe
from benchmarks.recipes.runs import AVERAGED, KFC_NAME, PLAIN, TRAINEES, Training


def line() -> Recipe:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(40, 3, generator=generator)
    outputs = inputs @ torch.randn(3, 1, generator=generator)
    split = Split(inputs[:32], outputs[:32], inputs[32:], outputs[32:])
    return replace(
        RECIPES["table"],
        name="line",
        make_model=lambda: nn.Linear(3, 1),
        data=lambda: split,
        augment=recipes.unchanged,
        batch_size=4,
        epochs=4,
    )


def test_one_cycle_is_torch_s() -> None:
    steps = 1001
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = OneCycleLR(optimizer, 1.0, total_steps=steps, cycle_momentum=False)
    for step in range(1, steps):
        optimizer.step()
        schedule.step()
        assert recipes.one_cycle(step / (steps - 1)) == pytest.approx(optimizer.param_groups[0]["lr"], abs=3e-3)


def test_cosine_warms_up_and_ends_at_zero() -> None:
    rates = [recipes.cosine(k / 200) for k in range(201)]
    assert 0 < rates[0] < 0.2
    assert rates.index(max(rates)) == 10
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_images_and_their_maps_are_mirrored_together() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(30, 1, 4, 6, generator=generator)
    mirrored, maps = recipes.flipped(images, (images[:, 0] > 0).long(), generator)
    assert torch.equal(maps, (mirrored[:, 0] > 0).long())
    changed = (mirrored != images).flatten(1).any(1)
    assert 5 < int(changed.sum()) < 25
    assert torch.equal(mirrored[changed], images[changed].flip(-1))


def test_metrics_on_known_outputs() -> None:
    labels = torch.tensor([0, 1, 2, 2])
    assert recipes.error(nn.functional.one_hot(torch.tensor([0, 1, 2, 0])).float(), labels) == 25.0
    # Kind 0: one pixel right of three; kind 1: one of three.
    kinds = torch.tensor([[[0, 0], [1, 1]]])
    logits = nn.functional.one_hot(torch.tensor([[[0, 1], [1, 0]]])).permute(0, 3, 1, 2).float()
    assert recipes.missed_overlap(logits, kinds) == pytest.approx(100 * 2 / 3)
    targets = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    assert recipes.unexplained(targets.mean().expand(50, 1), targets) == pytest.approx(100.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["segmentation", "table"])
def test_a_smoke_run_searches_competes_and_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "EXTENSIONS", 0)
    arguments = ["--smoke", "--only", name, "--seeds", "0", "--results", str(tmp_path)]
    assert contest.main(arguments) == 0
    record = json.loads((tmp_path / f"recipes_contest_{name}.json").read_text())
    assert set(record["runs"]["0"]) == set(TRAINEES)
    assert record["runs"]["0"]["sgd"]["1"]["epochs"][-1] == 1.0
    assert record["runs"]["0"]["sgd"]["0.25"]["epochs"][-1] == 0.25
    assert len(record["search"]["muon"]) == 3
    assert contest.main([*arguments, "--again", KFC_NAME]) == 0
    again = json.loads((tmp_path / f"recipes_contest_{name}.json").read_text())["runs"]["0"]
    assert [trainee for trainee in TRAINEES if again[trainee] != record["runs"]["0"][trainee]] == [KFC_NAME]
    monkeypatch.setattr(contest, "Training", None)
    assert contest.main(arguments) == 0


def test_smoke_does_not_write_over_what_is_published() -> None:
    with pytest.raises(SystemExit):
        contest.main(["--smoke"])


def test_a_run_validates_its_weights_and_their_average() -> None:
    recipe = line()
    run = Training(recipe, "sgd", 0.05, 0.5, seed=1)
    model = nn.Linear(3, 1)
    model.load_state_dict(run.model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    average: dict[str, torch.Tensor] = {}
    batches = recipe.batches(1)
    for step in range(16):
        optimizer.param_groups[0]["lr"] = 0.05 * recipe.schedule(step / 16)
        inputs, targets = next(batches)
        optimizer.zero_grad()
        recipe.loss(model(inputs), targets).backward()
        optimizer.step()
        for key, value in model.state_dict().items():
            average[key] = torch.lerp(average.get(key, value), value, max(10 / (step + 10), 1 - 0.9))
    run.advance(100)
    assert run.over()
    assert run.epochs[-1] == 2.0
    assert run.values[PLAIN][-1] == pytest.approx(recipe.validate(model)[0], rel=1e-4)
    model.load_state_dict(average)
    assert run.values[AVERAGED][-1] == pytest.approx(recipe.validate(model)[0], rel=1e-4)


def test_the_decay_of_kfc_shrinks_weights_as_adamw_s_default_rate_does() -> None:
    recipe = replace(line(), decay=0.1)
    model = nn.Linear(3, 1)
    _, optimizer = TRAINEES[KFC_NAME].make(model, recipe, 0.5, 0)
    group = optimizer.param_groups[0]
    assert group["lr"] * group["weight_decay"] / (1 - group["momentum"]) == pytest.approx(1e-3 * 0.1)


def made_up(kfc_at_half: float | None) -> dict[str, Any]:
    """A record in which AdamW is best, at the whole length, and KFC's values are known."""

    def run(values: list[float | None], seconds: float) -> dict[str, Any]:
        one = {"seconds": [seconds * (i + 1) for i in range(len(values))], "values": values, "losses": values}
        worse = {**one, "values": [None] * len(values), "losses": [None] * len(values)}
        return {"epochs": [float(i + 1) for i in range(len(values))], "none": worse, "0.9": one}

    def seed(shift: float) -> dict[str, Any]:
        others = {name: run([9.0 + shift], 1.0) for name in ("0.25", "0.5", "1")}
        return {
            "kfc": {"0.25": run([8.0], 2.0), "0.5": run([6.0, kfc_at_half], 2.0), "1": run([7.0, 6.0, 5.0, 4.0], 2.0)},
            "sgd": others,
            "adamw": {"0.25": others["0.25"], "0.5": others["0.5"], "1": run([8.0, 7.0, 6.0, 5.0 + shift], 2.0)},
            "muon": others,
            "soap": others,
        }

    return {
        "recipe": "line",
        "title": "a line",
        "metric": "error, %",
        "batch_size": 4,
        "epochs": 4,
        "search": {},
        "rates": dict.fromkeys(TRAINEES, 0.1),
        "runs": {str(k): seed(0.1 * k) for k in range(3)},
    }


def test_the_goal_is_the_time_to_the_best_peer_s_value_at_the_best_length() -> None:
    record = made_up(5.1)
    best = tables.best_peer(record)
    assert (best.name, best.length, best.average, best.value, best.seconds) == ("adamw", 1.0, "0.9", 5.1, 8.0)
    assert tables.reach(record, KFC_NAME, best) == tables.Reach(4.0, 2.0, 0.5, 0.5)
    (row,) = tables.goals([record]).splitlines()[2:]
    assert row.endswith("| 2 / 4.0, length 0.5 | 0.50 | met | AdamW, 8.0 |")
    # Without the half length there is the third validation of the whole one.
    (row,) = tables.goals([made_up(None)]).splitlines()[2:]
    assert row.endswith("| 3 / 6.0, length 1 | 0.75 | missed | AdamW, 8.0 |")
    assert tables.reach(record, "sgd", best).length is None


def test_the_shares_of_the_later_steps_add_up_and_steps_cost_more_than_sgd_s() -> None:
    found = shares.measure(contest.smoke(replace(RECIPES["table"], batch_size=64), steps=60))
    assert found["steps"] == 30
    assert sum(found[phase] for phase in shares.PHASES) == pytest.approx(1.0, abs=0.01)
    assert min(found["first"], found["later"]) > 1
    assert shares.table({"table": found}).splitlines()[2].startswith("| table | 30 |")


def test_the_published_tables_are_those_of_the_records() -> None:
    records = [contest.load(RESULTS, recipe) for recipe in RECIPES.values()]
    published = (RESULTS / "recipes_contest.md").read_text("utf-8")
    assert all(record["runs"] for record in records)
    for record in records:
        assert tables.recipe_table(record) in published
    assert published.startswith(tables.goals(records))
    of_shares = json.loads((RESULTS / f"{shares.NAME}.json").read_text("utf-8"))
    assert (RESULTS / f"{shares.NAME}.md").read_text("utf-8") == shares.table(of_shares)
