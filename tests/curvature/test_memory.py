"""The memory of an engine: every reachable tensor."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC, Precision
from lightning_kfc.factors.inverses import CholeskyInverse
from lightning_kfc.factors.running_average import RunningAverage, StoredAverage, stored_nbytes
from tests.helpers.nets import classes, data, train_step

DTYPES = {"full": torch.float32, "bfloat16": torch.bfloat16}


def reachable_tensors(*roots: object, stop: Iterable[object] = ()) -> list[Tensor]:
    """All tensors that objects hold, directly or through others; modules' parameters are not theirs."""
    seen = {id(entry) for entry in stop}
    pending, found = list(roots), []
    while pending:
        entry = pending.pop()
        if id(entry) in seen or isinstance(entry, (type, ModuleType, nn.Module)):
            continue
        seen.add(id(entry))
        if isinstance(entry, Tensor):
            if not isinstance(entry, nn.Parameter):
                found.append(entry)
        elif isinstance(entry, FunctionType):
            pending += [cell.cell_contents for cell in entry.__closure__ or ()]
        else:
            pending += gc.get_referents(entry)
    return found


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory that tensors keep alive; those that share memory count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def net() -> nn.Sequential:
    """Large and small layers with and without bias; a norm; factors on both sides of what is packed."""
    return nn.Sequential(
        nn.Conv2d(17, 40, 3, bias=False),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(40 * 4, 200),
        nn.Tanh(),
        nn.Linear(200, 3),
    )


def trained(steps: int, **settings: Any) -> tuple[KFC, nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    model = net()
    options = {"factor_every_n_steps": 1, "inverse_every_n_steps": 1, "kl_clip": None, "damping": 0.1, **settings}
    kfc = KFC(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = data(24, 17, 4, 4).float(), classes(24, count=3)
    updates: list[Tensor] = []
    for step in range(steps):
        train_step(kfc, optimizer, lambda: F.cross_entropy(model(x), y))
        if step == steps - 1:
            updates = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    kfc.batches.release()
    return kfc, model, updates


@pytest.mark.parametrize(
    "form", [{"inverse": "cholesky"}, {"inverse": "eigh"}, {"inverse": "ekfac"}, {"rule": "adam", "inverse": "eigh"}]
)
def test_the_memory_that_coverage_states_is_what_an_engine_holds(form: dict[str, str]) -> None:
    foretold = sum(row.bytes for row in KFC(net(), **form).coverage())
    kfc, model, _ = trained(3, **form)
    told = sum(row.bytes for row in kfc.coverage())
    measured = held_bytes(reachable_tensors(kfc, stop=[model, *model.parameters(), *model.buffers()]))
    assert told == foretold
    assert measured / told == pytest.approx(1, abs=0.1)


def test_a_factor_takes_little_more_than_half_of_its_square() -> None:
    d = 1000
    foretold = stored_nbytes((1, d, d), torch.float32)
    assert 0.5 < foretold / (4 * d * d) < 0.54
    assert StoredAverage.start(torch.eye(d).unsqueeze(0), 0.9).nbytes == foretold


@pytest.mark.parametrize("shape", [(1, 300, 300), (2, 130, 130), (1, 5, 5), (3, 7)])
def test_a_kept_average_is_that_of_whole_factors_to_the_last_bit(shape: tuple[int, ...]) -> None:
    values = [data(*shape, seed=seed) for seed in range(3)]
    values = [value + value.mT for value in values] if len(shape) == 3 else values
    kept, whole = StoredAverage.start(values[0], 0.9), RunningAverage.start(values[0], 0.9)
    for value in values[1:]:
        kept, whole = kept.updated(value, 0.9), whole.updated(value, 0.9)
    assert torch.equal(kept.value, whole.value)
    assert (kept.average.weight, kept.average.squares) == (whole.weight, whole.squares)


def test_between_forward_and_backward_only_the_inputs_of_norms_are_kept_and_nothing_after_release() -> None:
    torch.manual_seed(0)
    model = net()
    kfc = KFC(model, factor_every_n_steps=1)
    # The inputs themselves are held as well: memory that is freed may be given to another tensor at the same address.
    activations: dict[int, tuple[str, Tensor]] = {}
    for name, module in model.named_children():

        def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            activations[args[0].untyped_storage().data_ptr()] = name, args[0].detach()

        module.register_forward_hook(note)
    x, y = data(24, 17, 4, 4).float(), classes(24, count=3)

    def kept() -> tuple[set[str], list[Tensor]]:
        tensors = reachable_tensors(kfc, stop=[model, *model.parameters(), *model.buffers()])
        addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return {activations[address][0] for address in addresses & activations.keys()}, tensors

    with kfc.capture():
        loss = F.cross_entropy(model(x), y)
    # The batch norm's own input, which autograd keeps as well.
    names, tensors = kept()
    assert names == {"1"}
    rows = 24 * 4
    probes = 4 * rows + 2 * 4 * 24  # of the self-test, one number for each row of the convolution and the linear layers
    statistics = 4 * (153**2 + 161**2 + 201**2)
    norm_input = 4 * rows * 40
    assert held_bytes(tensors) < 1.1 * (probes + statistics + norm_input) + 10_000
    kfc.update(loss)
    loss.backward()
    kfc.precondition(lr=0.1)
    kfc.batches.release()
    assert kept()[0] == set()


def test_inverses_in_bfloat16_take_half_and_give_nearly_the_same_update() -> None:
    def update(precision: str) -> tuple[Tensor, int]:
        kfc, model, updates = trained(6, precision=Precision(inverses=precision))
        foretold = sum(row.bytes for row in KFC(net(), precision=Precision(inverses=precision)).coverage())
        held = held_bytes(reachable_tensors(kfc, stop=[model, *model.parameters(), *model.buffers()]))
        assert held / foretold == pytest.approx(1, abs=0.1)
        inverses = [layer.inverse for layer in kfc.layers.values() if isinstance(layer.inverse, CholeskyInverse)]
        assert {inverse.A_inverse.dtype for inverse in inverses} == {DTYPES[precision]}
        return torch.cat([u.flatten() for u in updates]), sum(inverse.nbytes() for inverse in inverses)

    (full, whole), (rounded, half) = update("full"), update("bfloat16")
    assert whole == 2 * half
    assert rounded.dtype == torch.float32
    assert 0 < float((full - rounded).norm() / full.norm()) < 0.02
    assert float(F.cosine_similarity(full, rounded, dim=0)) > 0.9999


@pytest.mark.parametrize(("saved", "resumed"), [("full", "bfloat16"), ("bfloat16", "full"), ("bfloat16", "bfloat16")])
def test_an_inverse_is_resumed_in_the_precision_that_is_required(saved: str, resumed: str) -> None:
    kfc, _, _ = trained(2, precision=Precision(inverses=saved))
    other = KFC(net(), precision=Precision(inverses=resumed))
    assert other.load_state_dict(kfc.state_dict()) == []
    for name, layer in other.layers.items():
        if isinstance(layer.inverse, CholeskyInverse):
            before = kfc.layers[name].inverse
            assert isinstance(before, CholeskyInverse)
            assert layer.inverse.A_inverse.dtype == DTYPES[resumed]
            assert torch.equal(layer.inverse.A_inverse.bfloat16(), before.A_inverse.bfloat16())


def test_an_eigenbasis_in_bfloat16_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="Use inverse='cholesky'"):
        KFC(net(), inverse="eigh", precision=Precision(inverses="bfloat16"))
