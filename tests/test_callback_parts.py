"""Statistics from a part of each batch under Lightning: what is divided, what is not noticed, what is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_kfc import KFCCallback
from tests.harness import hooks_of
from tests.lightning_nets import CLASSES, QUIET, ConvNet, Manual, Regression, images, loader, trainer, vectors

pytestmark = QUIET

PART = 4


class Recorded(ConvNet):
    """Notes all that a second call of its training_step could leave behind, and what each call was of."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(lr=0.05)
        self.reduction = reduction
        self.dropout = nn.Dropout(0.5)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.outputs: list[Tensor] = []
        self.seen: dict[str, int] = {"batches": 0}
        #: The size of the batch of each call, whether hooks were attached, and whether loss functions were watched.
        self.calls: tuple[tuple[int, bool, bool], ...] = ()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch["inputs"], batch["more"][0]
        watched = torch._C._len_torch_function_stack() > 0
        # Set past the attributes that are put back.
        CALLS.append((len(inputs), bool(hooks_of(self)), watched))
        logits = self.head(self.dropout(self.body(inputs)))
        loss = F.cross_entropy(logits, targets, reduction=self.reduction)
        self.accuracy(logits, targets)
        self.outputs.append(loss.detach())
        self.seen["batches"] += 1
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(inputs))
        self.log_dict({"accuracy": self.accuracy}, on_step=False, on_epoch=True, batch_size=len(inputs))
        return {"loss": loss, "logits": logits.detach()}


CALLS: list[tuple[int, bool, bool]] = []


def nested(batch_size: int = 12, count: int = 48) -> DataLoader[Any]:
    def collate(examples: list[Any]) -> Any:
        inputs, targets = (torch.stack(column) for column in zip(*examples, strict=True))
        return {"inputs": inputs, "more": (targets, "of the training"), "weight": 1.0}

    return DataLoader(images(count), batch_size=batch_size, collate_fn=collate)


def run(path: Any, module: Any = None, data: Any = None, epochs: int = 2, **settings: Any) -> Any:
    CALLS.clear()
    options = {k: settings.pop(k) for k in ("accumulate_grad_batches", "precision", "plugins") if k in settings}
    torch.manual_seed(1)
    # At a damping like this the step is the gradient's, whatever the curvature, scaled alike in all runs.
    defaults = {"damping": 1e12, "kl_clip": None, "warmup_steps": 0, "factor_every_n_steps": 2}
    callback = KFCCallback(**{**defaults, **settings})
    module = Recorded() if module is None else module
    logger = CSVLogger(str(path), flush_logs_every_n_steps=1)
    fit = trainer(callback, max_epochs=epochs, logger=logger, log_every_n_steps=1, **options)
    fit.fit(module, nested() if data is None else data)
    rows = (path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    return module, rows, torch.rand(3), callback


def own_columns(rows: str) -> list[list[str]]:
    """What the module logged, empty rows left out."""
    lines = [line.split(",") for line in rows.splitlines()]
    places = [lines[0].index(name) for name in ("loss_step", "loss_epoch", "accuracy")]
    found = [[line[place] for place in places] for line in lines]
    return [line for line in found if any(line)]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_does_not_notice_that_a_part_is_evaluated_besides(tmp_path, accumulated):
    options = {"accumulate_grad_batches": accumulated}
    whole = run(tmp_path / "whole", **options)
    calls = len(CALLS)
    part = run(tmp_path / "part", factor_examples=PART, **options)
    # Statistics at every second step; the first time, the trial.
    assert len(CALLS) - calls == (4 if accumulated == 1 else 1 + 2)
    assert part[0].seen["batches"] == len(part[0].outputs) == 8
    assert torch.equal(whole[2], part[2])  # the random stream that follows
    assert own_columns(whole[1]) == own_columns(part[1])
    for name, value in whole[0].state_dict().items():
        torch.testing.assert_close(part[0].state_dict()[name], value, rtol=1e-9, atol=1e-12)
    # The buffers, which no curvature has a part in, are the same bit for bit.
    for name, value in whole[0].named_buffers():
        assert torch.equal(dict(part[0].named_buffers())[name], value), name


def test_nothing_of_ours_runs_in_the_forward_of_the_batch_whose_part_is_looked_at(tmp_path):
    run(tmp_path, factor_examples=PART, epochs=1)
    assert CALLS == [
        (12, True, True),
        (3, False, True),  # the trial looks for the loss alone
        (12, False, False),
        (12, False, False),
        (PART, True, True),
        (12, False, False),
    ]


class Noted(Callback):
    """Keeps the factors after each step."""

    def __init__(self) -> None:
        self.factors: list[dict[str, Tensor]] = []
        #: Steps since each layer's statistics were folded.
        self.ages: list[dict[str, int | None]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        kfc = trainer.callbacks[0].kfc
        layers = kfc.layers.items()
        self.ages.append({name: kfc.ages(name)[0] for name in kfc.layers})
        self.factors.append({f"{n}.{k}": v.clone() for n, layer in layers for k, v in layer.factors.items()})


def factors(module: Any, data: Any, options: dict[str, Any] | None = None, **settings: Any) -> list[dict[str, Tensor]]:
    """The factors of each step of a training whose steps move nothing."""
    noted = Noted()
    defaults = {"ema_decay": 0.0, "factor_every_n_steps": 1, "fisher": "exact", "kl_clip": 1e-30, "rows_per_dim": None}
    callback = KFCCallback(**{**defaults, **settings})
    trainer(callback, noted, max_epochs=4, **(options or {})).fit(module, data)
    # Alike factors may just have been kept: they were taken at every step.
    accumulated = (options or {}).get("accumulate_grad_batches", 1)
    assert {ages["head"] for ages in noted.ages[accumulated - 1 :: accumulated]} == {0}
    return noted.factors


class Summed(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")


class Checkpointed(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(checkpoint(self.head, batch[0], use_reentrant=False), batch[1])


def alike(copies: int = 6, batches: int = 1) -> Any:
    """Batches of copies of one example: every part has the statistics of the whole, if their scale is right."""
    inputs, targets = vectors(1).tensors
    examples = TensorDataset(inputs.repeat(batches * copies, 1), targets.repeat(batches * copies))
    return loader(examples, batch_size=copies)


def scaler() -> Any:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**6))]}


@pytest.mark.parametrize("make", [Regression, Summed, Checkpointed])
@pytest.mark.parametrize(
    ("options", "settings", "rtol"),
    [
        ({}, {}, 1e-12),
        ({"accumulate_grad_batches": 2}, {}, 1e-12),
        ({"precision": "bf16-mixed"}, {}, 2e-2),
        (scaler(), {}, 5e-3),
        ({}, {"inverse": "ekfac"}, 1e-12),
        ({}, {"rule": "adam"}, 1e-12),
    ],
    ids=["plain", "accumulated", "bfloat16", "gradient scaler", "ekfac", "adam"],
)
def test_the_scale_of_a_part_is_that_of_the_whole_batch(make, options, settings, rtol):
    torch.manual_seed(0)
    module = make()
    data = alike() if "accumulate_grad_batches" not in options else alike(batches=2)
    found = factors(module, data, options, factor_examples=2, **settings)
    assert len(found) >= 4
    for name, value in found[0].items():
        for later in found[1:]:
            ratio = float(later[name].norm() / value.norm())
            assert abs(ratio - 1) < rtol, f"{name}: ratio {ratio:.4f}"


def test_a_training_interrupted_at_any_step_goes_on_bit_for_bit(tmp_path):
    def train(folder, ckpt_path=None):
        torch.manual_seed(3)
        module = Summed()
        saving = ModelCheckpoint(dirpath=tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callback = KFCCallback(factor_examples=3, warmup_steps=2, factor_every_n_steps=2, inverse_every_n_steps=2)
        fit = trainer(callback, saving, enable_checkpointing=True, max_epochs=7)
        fit.fit(module, loader(vectors(8), batch_size=8), ckpt_path=ckpt_path)
        return module, callback

    module, callback = train("whole")
    for path in sorted((tmp_path / "whole").glob("*.ckpt"))[:-1]:
        assert torch.load(path, weights_only=True)["callbacks"]["KFCCallback"]["parts"]["law"] == "sum"
        again, resumed = train("resumed", path)
        assert torch.equal(again.head.weight, module.head.weight)
        for name, value in callback.kfc.layers["head"].factors.items():
            assert torch.equal(resumed.kfc.layers["head"].factors[name], value)


# What is left whole, and what is said.


class Named(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets, *_ = batch
        return F.cross_entropy(self(inputs), targets)


class InPlace(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch[0].mul_(2)
        return super().training_step(batch, batch_idx)


class Contrastive(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        z = self(batch[0])
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def with_names(examples: list[Any]) -> Any:
    inputs, targets = (torch.stack(column) for column in zip(*examples, strict=True))
    return inputs, targets, [f"{i}.png" for i in range(len(inputs))]


@pytest.mark.parametrize(
    ("module", "collate", "reason"),
    [
        (Named, with_names, "the batch holds a list with as many entries as it has examples, 8"),
        (InPlace, None, "the training step changes tensors of its batch in place"),
        (Manual, None, "with manual optimization, the loss of a step cannot be evaluated again"),
        (Contrastive, None, "cross_entropy has 64 logits on 8 examples but 4 on 2"),
    ],
)
def test_where_a_part_will_not_do_the_whole_batch_is_used_as_is_said_once(tmp_path, caplog, module, collate, reason):
    def train(factor_examples):
        torch.manual_seed(0)
        noted, net = Noted(), module()
        where = str(tmp_path / str(factor_examples))
        callback = KFCCallback(factor_examples=factor_examples, report_dir=where, damping=0.1, kl_clip=0.1)
        data = DataLoader(vectors(16), batch_size=8, collate_fn=collate)
        trainer(callback, noted, max_epochs=2).fit(net, data)
        return noted.factors, net.head.weight

    with caplog.at_level("INFO"):
        found, weight = train(3)
    said = f"KFC takes its statistics from whole batches, in spite of factor_examples=3: {reason}"
    assert sum(record.getMessage().startswith(said) for record in caplog.records) == 1
    report = (tmp_path / "3" / "report.html").read_text()
    assert f"whole batches, in spite of factor_examples=3: {reason[:30]}" in report
    expected, expected_weight = train(None)
    assert torch.equal(weight, expected_weight)
    for now, then in zip(found, expected, strict=True):
        assert all(torch.equal(now[name], then[name]) for name in then)


def test_the_start_tells_how_many_examples_are_used(caplog):
    callback = KFCCallback(factor_examples=3)
    with caplog.at_level("INFO"):
        trainer(callback).fit(Regression(lr=0.5), loader(vectors(16), batch_size=8))
    assert "Statistics come from 3 examples of each batch." in caplog.text
    assert "whole" not in caplog.text
    assert callback.kfc.takes_parts


class Sized(nn.Module):
    """A net with a forward of its own, which the compiler traces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)


def test_compiled_code_stays_compiled_where_a_part_is_looked_at():
    torch._dynamo.reset()
    ran: list[int] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        def compiled(*args: Any) -> Any:
            ran.append(1)
            return graph.forward(*args)

        return compiled

    module = Regression()
    module.head = Sized()
    module.head.compile(backend=backend)
    per_step: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            per_step.append(len(ran))

    callback = KFCCallback(factor_examples=2, factor_every_n_steps=1, damping=0.1, kl_clip=0.1)
    trainer(callback, Count()).fit(module, loader(vectors(24), batch_size=6))
    torch._dynamo.reset()
    # The first step is recorded, and runs eagerly; at the others the part alone does.
    assert per_step == [0, 1, 2, 3]
    assert callback.kfc.layers["head.layer"].factors


def test_periods_are_chosen_by_what_a_part_costs_too():
    callback = KFCCallback(
        factor_examples=2, factor_every_n_steps="auto", inverse_every_n_steps="auto", warmup_steps=5, max_overhead=1e9
    )
    trainer(callback, max_epochs=10).fit(Regression(lr=0.5), loader(vectors(24), batch_size=6))
    # With so large a budget, the shortest that there are.
    assert callback.kfc.schedule.factor_every_n_steps == 5
    assert callback.kfc.takes_parts
