"""The benchmark of evaluation mode is correct on a network with known statistics."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks.accuracy import evaluation_mode
from benchmarks.away.tasks import AWAY
from benchmarks.paths import RESULTS


def test_fresh_statistics_are_those_of_a_pass_without_dropout() -> None:
    net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(4))
    net[1].running_mean += 7
    inputs = 3 + torch.randn(1024, 4)
    fresh = evaluation_mode.with_fresh_statistics(net, inputs)[1]
    torch.testing.assert_close(fresh.running_mean, inputs.mean(0))
    torch.testing.assert_close(fresh.running_var, inputs.var(0), rtol=0.01, atol=0)
    assert net[1].running_mean.tolist() == [7, 7, 7, 7]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_measures_the_weights_that_train_and_their_average() -> None:
    losses = evaluation_mode.measure(AWAY["separable"], 0, steps=evaluation_mode.EVERY)
    assert list(losses) == [1, 2, 3, 4, evaluation_mode.EVERY]
    row = losses[evaluation_mode.EVERY]
    assert row["averaged"] == pytest.approx(row["averaged, fresh"], rel=0.1)
    assert row["averaged"] != row["training"]


def test_the_results_hold_what_the_page_states_and_averages_are_within_a_tenth() -> None:
    results = json.loads((RESULTS / f"{evaluation_mode.NAME}.json").read_text())
    assert results.keys() == evaluation_mode.NETWORKS.keys()
    assert (RESULTS / f"{evaluation_mode.NAME}.md").read_text() == evaluation_mode.table(results)
    for runs in results.values():
        assert sorted(runs) == [str(seed) for seed in evaluation_mode.SEEDS]
        for run in runs.values():
            misses = {step: abs(row["averaged"] / row["averaged, fresh"] - 1) for step, row in run.items()}
            # After the first step the only statistics known are those of the initial weights.
            assert misses.pop("1") < 0.12
            assert all(miss < 0.1 for miss in misses.values())
