"""The scaling model adds up: known sizes of known networks, and what must not depend on the placement does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cost.shapes import NETWORKS
from benchmarks.scale import scaling
from benchmarks.scale.model import Schedule, gpu_nodes, held_bytes, predict
from benchmarks.scale.scaling import PLACEMENTS

pytestmark = pytest.mark.slow


def test_the_networks_have_the_parameters_that_they_are_known_for() -> None:
    # torchvision's ResNet-50 has 25,557,032 with those of batch norm, 53,120; its ViT-L/16 304,326,632 with the class
    # token, position embeddings and norms.
    assert NETWORKS["resnet50"].parameters() == 25_557_032 - 53_120
    assert 304_326_632 - NETWORKS["vit_large"].parameters() == 1024 + 197 * 1024 + 49 * 2 * 1024
    assert 1.1e9 < NETWORKS["transformer_1b"].parameters() < 1.2e9
    # A multiply-add is two operations, a forward and a backward three forwards: ResNet-50 makes 4.1 G multiply-adds.
    assert NETWORKS["resnet50"].step_flops() / 32 / 6 == pytest.approx(4.09e9, rel=0.01)


@pytest.mark.parametrize("network", list(NETWORKS))
def test_placements_differ_in_nothing_on_one_rank_and_in_memory_as_documented_on_many(network: str) -> None:
    known, machine = NETWORKS[network], gpu_nodes()
    alone = [predict(known, machine, 1, placement) for placement in PLACEMENTS.values()]
    assert all(cost == alone[0] for cost in alone)
    whole = 2 * sum(map(held_bytes, known.layers))
    assert alone[0].memory == whole
    for ranks in (8, 64, 1024):
        all_hold, some_hold, one_holds = (predict(known, machine, ranks, p) for p in PLACEMENTS.values())
        assert all_hold.memory == whole
        assert one_holds.memory <= some_hold.memory < whole
        # Each factor and inverse is held at least once.
        assert one_holds.memory * ranks >= whole
        assert all_hold.updates == 0 < one_holds.updates
        assert one_holds.preconditioning < all_hold.preconditioning
        assert one_holds.reduction < all_hold.reduction
        assert all_hold.factorisation == one_holds.factorisation <= alone[0].factorisation


def test_rarer_refreshes_cost_less_of_a_step() -> None:
    cost = predict(NETWORKS["resnet50"], gpu_nodes(), 64, "comm-opt")
    overheads = [cost.overhead(Schedule(every, 2 * every)) for every in (10, 100, 1000)]
    assert overheads == sorted(overheads, reverse=True)
    assert overheads[-1] > (cost.preconditioning + cost.updates) / cost.step


def test_the_command_keeps_its_numbers_and_plots_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["--largest", "8", "--results", str(tmp_path), "--figures", str(tmp_path), "--between", "1e9"])
    kept = json.loads((tmp_path / "scaling.json").read_text())
    assert kept["machine"]["between"] == 1e9
    assert set(kept["costs"]) == set(NETWORKS)
    assert (tmp_path / "scaling.md").read_text().strip() in capsys.readouterr().out
    assert (tmp_path / "scaling.svg").read_text().startswith("<?xml")
