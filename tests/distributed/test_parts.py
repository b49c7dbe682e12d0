"""Statistics from parts of batches on two ranks: each has examples of its own, and all decide alike."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from lightning_kfc import KFC, KFCCallback
from tests.distributed.nets import EXACT, Net, images, loader, trainer
from tests.distributed.pool import Ranks
from tests.nets import classes, data, double, engine, observe, small_conv_net

N, PART = 12, 4
X, Y = data(2 * N, 2, 6, 6), classes(2 * N, count=3)


def _factors(kfc: KFC) -> dict[str, Tensor]:
    return {f"{name}.{side}": f.clone() for name, layer in kfc.layers.items() for side, f in layer.factors.items()}


def _looped(model: nn.Module, kinds: tuple[str, str], examples: tuple[int, int] = (N, N)) -> dict[str, Any]:
    """Two steps that move nothing, with each rank's own kind of loss and number of examples."""
    rank = dist.get_rank()
    kfc = engine(model, factor_examples=PART, ema_decay=0.0)
    own = slice(N * rank, N * rank + examples[rank])
    x, y = X[own], Y[own]
    parts: list[list[int]] = []

    def loss(part: Any = slice(None)) -> Tensor:
        if isinstance(part, Tensor):
            parts.append(part.tolist())
        z = model(x[part])
        if kinds[rank] == "contrastive":
            return F.cross_entropy(z @ z.T, torch.arange(len(z)))
        return F.cross_entropy(z, y[part], reduction=kinds[rank])

    factors = []
    for _ in range(2):
        model.zero_grad()
        with kfc.capture(loss, examples=len(x)):
            value = loss()
        kfc.update(value)
        value.backward()
        kfc.precondition(lr=0.0)
        factors.append(_factors(kfc))
    return {"factors": factors, "parts": parts, "source": kfc.statistics_source}


def _under_lightning(module: Any, steps: int = 3) -> tuple[list[str], str]:
    callback = KFCCallback(**{**EXACT, "factor_examples": 2})
    strategy = DDPStrategy(process_group_backend="gloo", static_graph=True)
    fit = trainer(callback, strategy=strategy, devices=2, max_steps=steps)
    fit.fit(module, loader(images(24), 4))
    return [f"{p.detach().double().sum():.17g}" for p in module.parameters()], callback.kfc.statistics_source


class _Synchronised(nn.SyncBatchNorm):
    """One that DDP lets pass on the CPU, in evaluation mode, since it synchronises nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


def on_a_rank() -> dict[str, Any]:
    """All cases in one go."""
    torch.manual_seed(0)
    model = small_conv_net()
    found: dict[str, Any] = {
        "means": _looped(model, ("mean", "mean")),
        "sums": _looped(model, ("sum", "sum")),
        "one refuses": _looped(model, ("mean", "contrastive")),
        "no agreement": _looped(model, ("mean", "sum")),
        "one has few": _looped(model, ("sum", "sum"), (N, PART)),
    }
    norm = double(nn.Conv2d(2, 3, 3), _Synchronised(3), nn.Flatten(), nn.Linear(48, 3))
    found["synchronised"] = _looped(norm, ("mean", "mean"))
    torch.manual_seed(0)
    found["lightning"] = _under_lightning(Net())
    return found


def test_ranks_choose_their_own_examples_and_decide_alike(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(on_a_rank)
    torch.manual_seed(0)
    model = small_conv_net()
    for name in first:
        if name != "lightning":
            for one, other in zip(first[name]["factors"], second[name]["factors"], strict=True):
                assert all(torch.equal(one[factor], other[factor]) for factor in one), name
    for name, reduction in (("means", "mean"), ("sums", "sum")):
        parts = [rank[name]["parts"][-1] for rank in (first, second)]
        assert [len(part) for part in parts] == [PART, PART]
        assert parts[0] != parts[1]
        chosen = torch.tensor(parts[0] + [N + index for index in parts[1]])
        # The mean over ranks is the objective; a sum over a third of the examples counts threefold.
        scale = {"mean": 1.0, "sum": N / PART / 2}[reduction]

        def loss(chosen: Tensor = chosen, reduction: str = reduction, scale: float = scale) -> Tensor:
            return scale * F.cross_entropy(model(X[chosen]), Y[chosen], reduction=reduction)

        for factor, value in _factors(observe(model, loss)).items():
            torch.testing.assert_close(first[name]["factors"][1][factor], value, rtol=1e-9, atol=1e-12)
    reasons = {
        "one refuses": ("another rank cannot do with parts", "144 logits on 12 examples but 9 on 3"),
        "no agreement": ("a mean on some ranks and a sum on others",) * 2,
        "synchronised": ("'1' is a SyncBatchNorm",) * 2,
    }
    for name, expected in reasons.items():
        for rank, reason in zip((first, second), expected, strict=True):
            assert reason in rank[name]["source"], name
    # The law that one rank has found is that of all, though the other one's batches are too small for parts.
    assert [len(part) for part in first["one has few"]["parts"]] == [3, PART]
    assert second["one has few"]["parts"] == []
    assert first["lightning"] == second["lightning"]
    assert first["lightning"][1] == "2 examples of each batch"
