"""The tasks away from home: they build, one step on each is finite, and their halves are disjoint and complete."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.away import data
from benchmarks.away.tasks import AWAY, CHOOSING, HELD_BACK, MEASURED, belonging, evidence_bound
from benchmarks.contest.contestants import CONTESTANTS
from benchmarks.contest.harness import Run


def test_the_halves_are_disjoint_and_complete() -> None:
    assert not set(CHOOSING) & set(HELD_BACK)
    assert sorted(CHOOSING + HELD_BACK) == sorted(AWAY)
    assert len(AWAY) >= 10
    assert abs(len(CHOOSING) - len(HELD_BACK)) <= 1


@pytest.mark.parametrize("half", [CHOOSING, HELD_BACK])
def test_each_half_has_batch_norm_a_table_and_a_model_of_sequences(half: tuple[str, ...]) -> None:
    networks = {name: list(AWAY[name].make_model().modules()) for name in half}
    kinds = {type(module) for modules in networks.values() for module in modules}
    assert nn.BatchNorm2d in kinds
    assert kinds & {nn.GRU} or any(type(module).__name__ == "Attention" for m in networks.values() for module in m)
    assert any(name.startswith("table") for name in half)


# SGD, so that nothing of what the benchmark compares is run on the half that is held back.
@pytest.mark.parametrize("name", AWAY)
def test_one_step_is_finite_and_changes_the_loss(name: str) -> None:
    task = AWAY[name]
    assert 32 <= task.batch_size <= 1024
    assert len(task.data().train_inputs) >= max(MEASURED, task.batch_size)
    run = Run(task, CONTESTANTS["sgd"], 1e-3, seed=0)
    run.advance(1)
    first, second = run.curve.losses
    assert torch.isfinite(torch.tensor([first, second])).all()
    assert first != second


def test_evidence_bound_is_the_divergence_of_two_normals_plus_the_misfit() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, pixels = torch.randn(3, 5, generator=generator), torch.rand(3, 5, generator=generator)
    mean, log_variance = torch.randn(2, 3, 4, generator=generator)
    codes = torch.distributions.Normal(mean, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(codes, torch.distributions.Normal(0.0, 1.0)).sum(1)
    shares = torch.sigmoid(logits)
    misfit = -(pixels * shares.log() + (1 - pixels) * (1 - shares).log()).sum(1)
    assert torch.allclose(evidence_bound((logits, mean, log_variance), pixels), (misfit + divergence).mean())


def test_info_nce_is_small_where_pairs_belong_together_and_that_of_chance_where_all_codes_are_equal() -> None:
    together = torch.eye(6)[:, None].expand(-1, 2, -1)
    assert float(belonging(together, torch.arange(6), temperature=0.01)) < 1e-6
    assert float(belonging(torch.ones(6, 2, 3), torch.arange(6))) == pytest.approx(torch.tensor(6.0).log().item())


def test_patches_are_cut_from_the_photograph() -> None:
    photo = torch.arange(3 * 7 * 9).float().reshape(3, 7, 9)
    cut = data.patches(photo, 20, 4, torch.Generator().manual_seed(0))
    whole = photo.unfold(1, 4, 1).unfold(2, 4, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 4, 4)
    assert cut.shape == (20, 3, 4, 4)
    assert all((whole == patch).flatten(1).all(1).any() for patch in cut)
