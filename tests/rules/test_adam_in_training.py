"""The rule "adam" under Lightning: accumulation, a gradient scaler, YAML, and a run with the recommended optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_kfc import KFCCallback
from tests.engine.test_precision import precision_options
from tests.helpers.harness import QUIET, Classifier, dense_net, fit, images, loader

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(dense_net(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.5))


def momentum(kfc: KFCCallback, layer: str) -> Tensor:
    """A layer's momentum as its gradient is laid out: the eigenbasis itself may have either sign."""
    found = kfc.kfc.layers[layer]
    return found.inverse.basis.back(found.moments.momentum).double()


def same_steps(one: tuple[KFCCallback, Classifier], other: tuple[KFCCallback, Classifier], *, within: float) -> None:
    """Momenta and logits agree; weights need not, where no gradient but rounding is scaled to a step of its own."""
    for layer in ("net.1", "net.3"):
        difference = momentum(one[0], layer) - momentum(other[0], layer)
        assert float(difference.norm() / momentum(one[0], layer).norm()) < within
    x = images(24).tensors[0].to(next(one[1].parameters()).dtype)
    first, second = (module(x).log_softmax(1).detach() for _, module in (one, other))
    assert float((first - second).norm() / first.norm()) < within


def test_accumulated_micro_batches_make_the_momentum_of_the_whole_batch() -> None:
    data = [(x.double(), y) for x, y in images(480)]
    runs = []
    for size, accumulated in ((160, 1), (80, 2)):
        kfc, module = (
            KFCCallback(rule="adam", fisher="exact", kl_clip=0.01),
            classifier().double(),
        )
        options = {"accumulate_grad_batches": accumulated, "precision": "64-true"}
        fit(module, kfc=kfc, data=loader(data, batch_size=size), max_steps=3, **options)
        runs.append((kfc, module))
    assert runs[1][0].kfc.layers["net.1"].moments.count == 3
    same_steps(*runs, within=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_leaves_the_moments_in_the_units_of_the_loss(fused: bool) -> None:
    runs = []
    for scale in (1.0, 2.0**13):
        torch.manual_seed(0)
        module = Classifier(dense_net(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.5, fused=fused))
        kfc = KFCCallback(rule="adam", kl_clip=1e-3)
        options = precision_options("16-mixed", init_scale=scale)
        fit(module, kfc=kfc, data=loader(images(480), batch_size=160), max_steps=3, **options)
        runs.append((kfc, module))
    same_steps(*runs, within=2e-2)  # float16 rounds the two differently


def test_it_trains_with_its_defaults_and_reports_nothing_of_the_recommended_optimizer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kfc, module = KFCCallback(rule="adam"), classifier()
    with caplog.at_level("INFO"):
        fit(module, kfc=kfc, data=loader(images(24), batch_size=24), max_steps=30, max_epochs=30)
    assert module.losses[-1] < 0.3 * module.losses[0]
    assert [line for line in caplog.messages if "SGD(" in line] == []
