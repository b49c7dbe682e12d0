"""Compiled, checkpointed, in-place, scripted, hooked, channels-last and late-built models."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_kfc import KFC, KFCCallback
from lightning_kfc.estimation.recording import ForwardRecorder
from lightning_kfc.trust_region import region
from tests.helpers.harness import QUIET, Classifier, Watch, conv_net, dense_net, fit, images, loader, trainer, weights
from tests.helpers.made import made

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in QUIET),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    # The compiler itself looks at attributes of what it traces.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

#: Due steps, and steps in between.
SCHEDULE: dict[str, Any] = {"warmup_steps": 2, "factor_every_n_steps": 3, "inverse_every_n_steps": 3}
DUE = [0, 1, 3, 6]
#: No step is reviewed.
FIXED: dict[str, Any] = {"damping": 0.003, "kl_clip": 0.1}
STEPS = 8


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    ratio = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert ratio <= tolerance, f"relative difference {ratio:.2e}"


def factors(kfc: KFC) -> Tensor:
    """All factors in one vector."""
    return torch.cat([f.double().reshape(-1) for layer in kfc.layers.values() for f in layer.factors.values()])


# torch.compile.


class Backend:
    """A compiler that compiles nothing, but counts the graphs it was given and the calls of what it made."""

    def __init__(self) -> None:
        self.graphs = 0
        self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.calls += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def backend() -> Iterator[Backend]:
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


class UserNet(nn.Module):
    """A net with a forward of its own: the compiler traces no frames of torch's own files."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = dense_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Compilable(Classifier):
    """A classifier that keeps no record of its steps, which would be a reason to compile each of them anew."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])


def compiled(what: str, backend: Any) -> tuple[Classifier, Any]:
    """A classifier, and the thing to hand to the Trainer."""
    torch.manual_seed(3)
    module = Compilable(UserNet())
    if what == "loss":
        module.loss = torch.compile(lambda logits, y: F.cross_entropy(logits, y), backend=backend)
    elif what == "submodule":
        module.net.layers[1] = torch.compile(module.net.layers[1], backend=backend)
    elif what == "net":
        module.net = torch.compile(module.net, backend=backend)
    elif what == "net in place":
        module.net.compile(backend=backend)
    elif what == "LightningModule":
        return module, torch.compile(module, backend=backend)
    return module, module


def fit_compiled(what: str, backend: Any, kfc: KFCCallback | None) -> tuple[Classifier, list[int], list[int]]:
    """Train; graphs and calls so far after each step."""
    module, handed_over = compiled(what, backend)
    graphs: list[int] = []
    calls: list[int] = []

    def look(*args: Any) -> None:
        graphs.append(backend.graphs if backend is not None else 0)
        calls.append(backend.calls if backend is not None else 0)

    used = trainer([*([kfc] if kfc else []), Watch("on_train_batch_end", look)], max_steps=STEPS)
    used.fit(handed_over, loader(images(24)))
    return module, graphs, calls


@pytest.mark.slow
@pytest.mark.parametrize("what", ["submodule", "net", "net in place", "LightningModule", "loss"])
def test_compiled_code_runs_eagerly_on_due_steps_and_is_compiled_once_for_those_between(
    what: str, backend: Backend
) -> None:
    _, graphs_alone, calls_alone = fit_compiled(what, backend, None)
    per_step = calls_alone[-1] // STEPS
    assert per_step >= 1
    torch._dynamo.reset()
    counted = Backend()
    kfc = KFCCallback(**SCHEDULE, **FIXED)
    module, graphs, calls = fit_compiled(what, counted, kfc)
    ran_compiled = [after - before for before, after in zip([0, *calls], calls, strict=False)]
    assert ran_compiled == [0 if step in DUE else per_step for step in range(STEPS)]
    # All graphs are made in the first step that is not due, and as many as without the callback.
    first = next(step for step in range(STEPS) if step not in DUE)
    assert graphs[first:] == [graphs_alone[-1]] * (STEPS - first)
    eager_kfc = KFCCallback(**SCHEDULE, **FIXED)
    eager, _, _ = fit_compiled("nothing", None, eager_kfc)
    assert_same(factors(kfc.kfc), factors(eager_kfc.kfc), 1e-5)
    assert_same(weights(module), weights(eager), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["submodule", "net", "LightningModule", "loss"])
def test_compiled_code_runs_eagerly_where_it_is_recorded_for_a_review_and_nothing_is_compiled_again(
    what: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, graphs_alone, calls_alone = fit_compiled(what, backend, None)
    per_step = calls_alone[-1] // STEPS
    torch._dynamo.reset()
    counted = Backend()
    # Statistics at the first step alone, and reviews of every second step.
    monkeypatch.setattr(region, "REVIEWED_AT_FIRST", 0)
    monkeypatch.setattr(region, "REVIEW_EVERY_N_STEPS", 2)
    kfc = KFCCallback(factor_every_n_steps=99, inverse_every_n_steps=99, warmup_steps=1, damping=0.1)
    _, graphs, calls = fit_compiled(what, counted, kfc)
    assert kfc.kfc.reviewer.active
    assert kfc.kfc.last_step is not None
    assert math.isfinite(kfc.kfc.last_step.reduction_ratio)
    ran_compiled = [after - before for before, after in zip([0, *calls], calls, strict=False)]
    assert ran_compiled == [0 if step % 2 == 0 else per_step for step in range(STEPS)]
    assert graphs[1:] == [graphs_alone[-1]] * (STEPS - 1)


@pytest.mark.slow
def test_the_compiler_is_left_as_it_was_when_a_due_backward_raises(backend: Backend) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    module, _ = compiled("net", backend)
    with pytest.raises(ZeroDivisionError):
        fit(module, kfc=KFCCallback(), callbacks=[Watch("on_before_backward", fail)])
    module.net(images(8).tensors[0])
    assert backend.calls == 1


@pytest.mark.slow
def test_a_checkpointed_compiled_block_is_recomputed_as_it_was_computed(backend: Backend) -> None:
    def run(wrap: Callable[[nn.Module], Any]) -> tuple[KFC, Tensor]:
        torch.manual_seed(3)
        # Its compiled form saves other tensors than its eager one.
        block = nn.Sequential(nn.Linear(36, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.Softplus())
        net = nn.Sequential(nn.Flatten(), Checkpointed(wrap(block)), nn.Linear(8, 3))
        kfc, module = KFCCallback(**SCHEDULE), Classifier(net)
        fit(module, kfc=kfc, max_steps=STEPS)
        return kfc.kfc, weights(module)

    plain_kfc, plain = run(lambda block: block)
    found_kfc, found = run(lambda block: torch.compile(block, backend="aot_eager"))
    assert_same(factors(found_kfc), factors(plain_kfc), 1e-5)
    assert_same(found, plain, 1e-5)


# Activation checkpointing.


class Checkpointed(nn.Module):
    """A block that keeps no activations."""

    def __init__(self, block: nn.Module, *, reentrant: bool = False) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def norm_net(wrap: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    torch.manual_seed(3)
    block = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.ReLU())
    return nn.Sequential(wrap(block), nn.Flatten(), nn.Linear(64, 3)).double()


def fit_double(net: nn.Module, kfc: KFCCallback | None, lr: float = 0.1) -> Classifier:
    torch.manual_seed(4)
    module = Classifier(net, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr))
    fit(module, kfc=kfc, max_steps=5, precision="64-true")
    return module


def test_checkpointing_changes_neither_factors_nor_weights() -> None:
    plain_kfc, found_kfc = KFCCallback(), KFCCallback()
    plain = fit_double(norm_net(lambda block: block), plain_kfc)
    found = fit_double(norm_net(Checkpointed), found_kfc)
    assert_same(factors(found_kfc.kfc), factors(plain_kfc.kfc))
    assert_same(weights(found), weights(plain))


@pytest.mark.parametrize("wrap", [Checkpointed, nn.Sequential])
def test_batch_norm_statistics_are_those_of_the_run_without_us(wrap: Callable[[nn.Module], nn.Module]) -> None:
    # With no learning rate both runs see the same activations.
    alone, ours = (
        fit_double(norm_net(wrap), kfc, lr=0.0) for kfc in (None, KFCCallback(fisher="exact", average_weights=None))
    )
    buffers = list(zip(alone.net.buffers(), ours.net.buffers(), strict=True))
    assert len(buffers) == 3
    assert all(torch.equal(a, b) for a, b in buffers)
    assert float(alone.net[0].block[1].num_batches_tracked if wrap is Checkpointed else 10) == 10


@pytest.mark.parametrize("position", [0, 2])
def test_reentrant_checkpointing_is_refused_before_the_first_step(position: int) -> None:
    layers = [nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
    block = Checkpointed(nn.Sequential(*layers[position : position + 3]), reentrant=True)
    module = Classifier(nn.Sequential(*layers[:position], block, *layers[position + 3 :]))
    # The input of a reentrant region must require a gradient, or nothing in the region gets one.
    module.net.register_forward_pre_hook(lambda net, args: (args[0].requires_grad_(),))
    before = weights(module)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        fit(module, kfc=KFCCallback(), max_steps=1)
    assert torch.equal(weights(module), before)


# In-place operations and views.


class InPlace(nn.Module):
    """A net over sequences that overwrites, views and slices what its layers gave it."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(12, 3)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.squeeze(1))
        h = F.relu_(h) if self.in_place else F.relu(h)
        h = self.second(h)
        if self.in_place:
            h.mul_(2).tanh_()
            h = h.view(len(x), -1)[:, :12]
            return self.last(h).add_(1)
        return self.last((2 * h).tanh().flatten(1).narrow(1, 0, 12)) + 1


def test_in_place_operations_and_views_change_nothing() -> None:
    results = []
    for in_place in (False, True):
        torch.manual_seed(3)
        kfc = KFCCallback(fisher="exact")
        module = fit_double(InPlace(in_place=in_place).double(), kfc)
        results.append((factors(kfc.kfc), weights(module)))
    (plain_factors, plain_weights), (found_factors, found_weights) = results
    assert_same(found_factors, plain_factors)
    assert_same(found_weights, plain_weights)


# Hooks of other tools.


class Scale(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return self.by * x


def test_hooks_that_change_inputs_and_outputs_count_as_part_of_the_net() -> None:
    torch.manual_seed(3)
    hooked = dense_net().double()
    explicit = copy.deepcopy(hooked)
    explicit = nn.Sequential(*explicit[:1], Scale(3.0), explicit[1], Scale(0.5), *explicit[2:])
    handles = [
        hooked[1].register_forward_pre_hook(lambda module, args: (3.0 * args[0],)),
        hooked[1].register_forward_hook(lambda module, args, output: 0.5 * output),
    ]
    hooked_kfc, explicit_kfc = KFCCallback(), KFCCallback()
    found, expected = fit_double(hooked, hooked_kfc), fit_double(explicit, explicit_kfc)
    assert_same(factors(hooked_kfc.kfc), factors(explicit_kfc.kfc))
    assert_same(weights(found), weights(expected))
    for handle in handles:
        handle.remove()
    assert not hooked[1]._forward_hooks
    assert not hooked[1]._forward_pre_hooks


def test_full_backward_hooks_of_other_tools_leave_the_result_as_it_is() -> None:
    results = []
    seen: list[int] = []
    for hooked in (False, True):
        torch.manual_seed(3)
        net = dense_net().double()
        calls_before = len(seen)
        for layer in net[2:] if hooked else ():
            layer.register_full_backward_hook(lambda *args: seen.append(1))
            layer.register_full_backward_pre_hook(lambda *args: seen.append(1))
        kfc = KFCCallback(fisher="exact")
        results.append((weights(fit_double(net, kfc)), factors(kfc.kfc)))
        assert (len(seen) > calls_before) == hooked
    assert_same(results[1][0], results[0][0])
    assert_same(results[1][1], results[0][1])


def test_hooks_on_parameters_see_the_gradient_of_the_loss_and_nothing_else() -> None:
    """A common recipe clips in such a hook; the self-test must not take it for a wrong layer."""
    seen: list[Tensor] = []

    def clamp(gradient: Tensor) -> Tensor:
        seen.append(gradient.clone())
        return gradient.clamp(-0.01, 0.01)

    module = Classifier(dense_net())
    handle = module.net[1].weight.register_hook(clamp)
    arrived: list[Tensor] = []
    look = Watch("on_after_backward", lambda *args: arrived.append(module.net[1].weight.grad.clone()))
    fit(module, kfc=KFCCallback(), callbacks=[look], max_steps=5)
    assert len(seen) == 5
    assert all(torch.equal(a, s.clamp(-0.01, 0.01)) for a, s in zip(arrived, seen, strict=True))
    handle.remove()
    assert not module.net[1].weight._backward_hooks


# Scripted modules, memory formats, late construction.


# Deprecated from torch 2.14 on, and still in use.
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
def test_scripted_submodules_train_and_are_listed_with_the_reason() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(36, 8), scripted, nn.Linear(8, 3)))
    kfc = KFCCallback(kl_clip=None, damping=0.1)
    fit(module, kfc=kfc, max_steps=12, data=loader(images(8)))
    rows = {row.parameter: row for row in kfc.kfc.coverage()}
    assert rows["net.1.weight"].treatment == "kfc"
    assert rows["net.2.0.weight"].treatment != "kfc"
    assert "RecursiveScriptModule" in rows["net.2.0.weight"].reason
    assert module.losses[-1] < 0.5 * module.losses[0]


def test_channels_last_trains_as_contiguous_memory_does() -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(36, 3))
        net = net.to(memory_format=memory_format)
        kfc = KFCCallback()
        module = Classifier(net)
        module.net.register_forward_pre_hook(
            lambda net, args, layout=memory_format: torch.cat([args[0], args[0] ** 2], 1).to(memory_format=layout)
        )
        fit(module, kfc=kfc, max_steps=4)
        assert net[2].weight.is_contiguous(memory_format=memory_format)
        results.append((factors(kfc.kfc), weights(module)))
    assert_same(results[1][0], results[0][0], 1e-5)
    assert_same(results[1][1], results[0][1], 1e-5)


class BuiltLate(Classifier):
    """Builds its net, or gives memory to one on the meta device, in configure_model."""

    def __init__(self, *, meta: bool) -> None:
        super().__init__(nn.Identity())
        if meta:
            with torch.device("meta"):
                self.net = conv_net()
        self.meta = meta

    def configure_model(self) -> None:
        torch.manual_seed(3)
        if self.meta:
            self.net.to_empty(device="cpu")
            self.net[0].reset_parameters()
            self.net[3].reset_parameters()
        else:
            self.net = conv_net()


@pytest.mark.parametrize("meta", [False, True])
def test_a_model_built_in_configure_model_trains_as_one_built_before(meta: bool) -> None:
    torch.manual_seed(3)
    early, late = Classifier(conv_net()), BuiltLate(meta=meta)
    kfcs = [KFCCallback(), KFCCallback()]
    for module, kfc in zip((early, late), kfcs, strict=True):
        fit(module, kfc=kfc)
    assert set(kfcs[1].kfc.layers) == {"net.0", "net.3"}
    assert_same(weights(late), weights(early))


def test_a_copy_made_during_training_carries_no_working_hook() -> None:
    copies: list[pl.LightningModule] = []

    def take(*args: Any) -> None:
        copies.append(copy.deepcopy(module.net))

    module = Classifier(dense_net())
    module.net[2].register_forward_hook(take)
    kfc = KFCCallback()
    fit(module, kfc=kfc, max_steps=2)
    before = factors(kfc.kfc)
    with made(ForwardRecorder) as recorders, kfc.kfc.capture():
        copies[0](images(8).tensors[0])
    assert [recorder.calls for recorder in recorders] == [[]]
    assert torch.equal(factors(kfc.kfc), before)
