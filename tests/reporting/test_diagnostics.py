"""The numbers match their definitions, reach loggers, and change nothing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC, KFCCallback, Logging, RefreshTiming
from lightning_kfc.reporting.diagnostics import LOGGED, Diagnostics, bytes_held, summary
from lightning_kfc.trust_region.outcome import Outcome
from lightning_kfc.trust_region.region import TrustRegion
from tests.helpers.harness import QUIET, Classifier, conv_net, dense_net, fit, images, loader, weights

pytestmark = [pytest.mark.filterwarnings(entry) for entry in QUIET]

PER_LAYER = (
    "cosine",
    "update_to_weight",
    "largest_curvature",
    "condition_A",
    "condition_G",
    "effective_rank_A",
    "effective_rank_G",
)
OF_ALL = {
    "kfc/damping",
    "kfc/kl_clip_factor",
    "kfc/kl",
    "kfc/kl_clip",
    "kfc/reduction_ratio",
    "kfc/predicted_decrease",
    "kfc/actual_decrease",
    "kfc/clipped_share",
    "kfc/cosine",
    "kfc/nonfinite_events",
    "kfc/undone_steps",
    "kfc/shortened_steps",
    "kfc/bytes_held",
    "kfc/factor_age",
    "kfc/inverse_age",
    "kfc/time_statistics",
    "kfc/time_inverses",
    "kfc/time_preconditioning",
    "kfc/time_reviews",
    "kfc/overhead",
}


def train(callback: KFCCallback, net: nn.Module | None = None, *, steps: int = 24, **options: Any) -> Classifier:
    torch.manual_seed(1)
    module = Classifier(net)
    fit(module, kfc=callback, data=loader(images(200)), max_steps=steps, **{"log_every_n_steps": 5, **options})
    return module


def rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_by_default_loggers_get_ten_numbers_at_each_logged_step(tmp_path: Path) -> None:
    train(KFCCallback(damping=0.01), logger=CSVLogger(tmp_path))
    found = rows(tmp_path)
    assert [int(row["step"]) for row in found] == [0, 5, 10, 15, 20]
    assert set(found[0]) - {"step", "epoch"} == set(LOGGED)
    assert len(LOGGED) <= 10
    assert all(row[name] for row in found[1:] for name in LOGGED)


def test_with_layers_loggers_get_all_numbers_at_each_logged_step(tmp_path: Path) -> None:
    # A damping with which no layer of so small a network dies: a gradient of 0 has no cosine.
    callback = KFCCallback(damping=0.01, logging=Logging(layers=True), timing=RefreshTiming(stagger_inverses=False))
    train(callback, logger=CSVLogger(tmp_path))
    found = rows(tmp_path)
    assert [int(row["step"]) for row in found] == [0, 5, 10, 15, 20]
    expected = OF_ALL | {f"kfc/{key}_{kind}" for key in PER_LAYER for kind in ("min", "median", "max")}
    expected |= {f"kfc/{layer}/{key}" for layer in ("net.0", "net.3") for key in PER_LAYER}
    assert set(found[0]) - {"step", "epoch"} == expected
    # Nothing has been reviewed, nor timed to its end, before the first step.
    assert {key for key in expected if not found[0][key]} == {
        "kfc/reduction_ratio",
        "kfc/predicted_decrease",
        "kfc/actual_decrease",
    }
    for row in found[1:]:
        assert not [key for key in expected if not row[key]]
        parts = sum(float(row[f"kfc/time_{p}"]) for p in ("statistics", "inverses", "preconditioning", "reviews"))
        assert float(row["kfc/overhead"]) == pytest.approx(parts)
        assert 0 < parts < 100
    assert [float(row["kfc/factor_age"]) for row in found] == [0, 0, 0, 5, 0]
    assert [float(row["kfc/inverse_age"]) for row in found] == [0, 0, 0, 5, 0]


def test_numbers_change_nothing() -> None:
    logged = train(KFCCallback(logging=Logging(layers=True, progress_bar=True)), steps=12, log_every_n_steps=1)
    assert torch.equal(weights(logged), weights(train(KFCCallback(), steps=12, log_every_n_steps=0)))


def test_between_logged_steps_nothing_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    precondition = KFC.precondition

    def noted(self: KFC, **options: Any) -> bool:
        if self.inspect is not None:
            looked.append(self.step)
        return precondition(self, **options)

    monkeypatch.setattr(KFC, "precondition", noted)
    train(KFCCallback(), steps=12)
    assert looked == [0, 5, 10]
    looked.clear()
    train(KFCCallback(), steps=12, log_every_n_steps=0)
    assert looked == []


def step(kfc: KFC, model: nn.Module, diagnostics: Diagnostics, lr: float = 0.1, *, look: bool = True) -> list[Tensor]:
    """One step of the engine; the gradients before it was preconditioned."""
    x, y = images(16).tensors
    for p in model.parameters():
        p.grad = None
    with kfc.capture():
        loss = F.cross_entropy(model(x.to(next(model.parameters()))), y)
    kfc.update(loss)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    diagnostics.begin_step(look=look)
    kfc.precondition(lr)
    diagnostics.end_step()
    return gradients


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kl_clip", [None, 1e-4])
@pytest.mark.parametrize("rule", ["natural", "adam"])
def test_cosine_and_update_to_weight_are_those_of_the_gradients_before_and_after(
    bias: bool, kl_clip: float | None, rule: str
) -> None:
    torch.manual_seed(0)
    # Without a bias the engine's matrix is a view of the gradient that it overwrites.
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3, bias=bias)).double()
    kfc = KFC(model, kl_clip=kl_clip, rule=rule)
    diagnostics = Diagnostics(kfc, layers=True)
    before = step(kfc, model, diagnostics)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    numbers = diagnostics.numbers()
    sizes = 2 if bias else 1
    for position, name in enumerate(("0", "3")):
        part = slice(sizes * position, sizes * (position + 1))
        raw, new, weight = (
            torch.cat([t.detach().flatten() for t in ts[part]]) for ts in (before, after, [*model.parameters()])
        )
        assert numbers[f"kfc/{name}/cosine"] == pytest.approx(float(F.cosine_similarity(raw, new, 0)), rel=1e-9)
        ratio = 0.1 * float(new.norm() / weight.norm())
        assert numbers[f"kfc/{name}/update_to_weight"] == pytest.approx(ratio, rel=1e-9)
    raw, new = (torch.cat([t.flatten() for t in ts]) for ts in (before, after))
    assert numbers["kfc/cosine"] == pytest.approx(float(F.cosine_similarity(raw, new, 0)), rel=1e-9)
    assert (numbers["kfc/clipped_share"] == 1) == (kl_clip is not None)


def test_the_clipped_share_is_that_of_the_steps_since_it_was_last_read() -> None:
    torch.manual_seed(0)
    model = conv_net()
    kfc = KFC(model, kl_clip=1e-3)
    diagnostics = Diagnostics(kfc)
    for lr in (1.0, 1.0, 1e-6, 1.0):
        step(kfc, model, diagnostics, lr, look=False)
    assert diagnostics.numbers()["kfc/clipped_share"] == 0.75
    step(kfc, model, diagnostics, 1e-6)
    assert diagnostics.numbers()["kfc/clipped_share"] == 0


# "adam" holds eigenvalues and two moments for each parameter.
@pytest.mark.parametrize(("rule", "numbers_a_parameter"), [("natural", 0), ("adam", 3)])
def test_bytes_are_those_of_the_tensors_that_are_held(rule: str, numbers_a_parameter: int) -> None:
    model = conv_net()
    kfc = KFC(model, rule=rule)
    diagnostics = Diagnostics(kfc)
    step(kfc, model, diagnostics)
    # Factors and inverses of 10 and 4, then of 65 and 3 dimensions, in float32.
    assert bytes_held(kfc) == 4 * (2 * (10**2 + 4**2 + 65**2 + 3**2) + numbers_a_parameter * (10 * 4 + 65 * 3))


def test_decreases_are_those_of_the_last_review() -> None:
    outcome = Outcome(loss_before=2.0, loss_after=1.5, slope=-1.0, curvature=0.25, penalty=0.1)
    region = TrustRegion(adapts_radius=True, radius=1.0, loss=1.0)
    verdict = region.judge(outcome, 0.1)
    assert verdict.predicted_decrease == pytest.approx(1.0 - 0.25 - 0.1)
    assert verdict.actual_decrease == 0.5
    assert verdict.ratio == pytest.approx(verdict.actual_decrease / verdict.predicted_decrease)


def test_a_factor_is_looked_at_once_for_each_refresh_of_its_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_kfc.reporting.diagnostics as module

    asked: list[tuple[int, list[str]]] = []
    original = module.spectra_of

    def noted(layers: Any, damping: float) -> Any:
        asked.append((kfc.step, list(layers)))
        return original(layers, damping)

    monkeypatch.setattr(module, "spectra_of", noted)
    model = conv_net()
    together = RefreshTiming(stagger_inverses=False)
    kfc = KFC(model, warmup_steps=0, factor_every_n_steps=2, inverse_every_n_steps=4, timing=together)
    diagnostics = Diagnostics(kfc)
    for _ in range(9):
        step(kfc, model, diagnostics)
    assert [at for at, layers in asked if layers] == [0, 4, 8]
    assert all(layers in ([], ["0", "3"]) for _, layers in asked)


def test_norm_layers_and_embeddings_have_numbers_without_factors() -> None:
    torch.manual_seed(0)
    model = dense_net(batch_norm=True)
    kfc = KFC(model)
    diagnostics = Diagnostics(kfc, layers=True)
    step(kfc, model, diagnostics)
    numbers = diagnostics.numbers()
    assert numbers["kfc/2/largest_curvature"] > 0
    assert "kfc/2/condition_A" not in numbers


def test_a_summary_is_over_the_layers_that_have_a_number() -> None:
    found = summary([{"a": 1.0, "b": 2.0}, {"a": 5.0, "b": float("nan")}, {"a": 2.0}])
    assert found == {
        **{"kfc/a_min": 1.0, "kfc/a_median": 2.0, "kfc/a_max": 5.0},
        **{"kfc/b_min": 2.0, "kfc/b_median": 2.0, "kfc/b_max": 2.0},
    }
