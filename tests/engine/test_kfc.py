"""The engine in a plain loop: its updates, accumulation, what it attaches, and which parameters it touches."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_kfc import KFC, Categorical
from tests.helpers import oracles
from tests.helpers.examples import examples
from tests.helpers.nets import classes, data, double, engine, observe, small_conv_net, train_step


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def modes_active() -> int:
    return int(torch._C._len_torch_function_stack())


# The update.


def two_linear_layers() -> tuple[nn.Sequential, Tensor, Tensor]:
    return double(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)), data(5, 3), data(5, 2, seed=4)


def expected_updates(
    model: nn.Sequential, x: Tensor, y: Tensor, damping: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Updates by E4 and E5 and gradients of a linear net with squared error, from dense oracles alone."""
    updates, gradients = {}, {}
    inputs = {"0": x, "1": model[0](x).detach()}
    hessian = oracles.logits_hessian(lambda z: F.mse_loss(z, y), model(x))
    after = {"0": model[1].weight.detach(), "1": torch.eye(2).double()}
    for name in ("0", "1"):
        rows = oracles.linear_rows(inputs[name], bias=name == "0")
        A = rows.T @ rows / len(rows)
        blocks = hessian.reshape(5, 2, 5, 2)
        G = sum(after[name].T @ blocks[n, :, n] @ after[name] for n in range(5))
        layer = model.get_submodule(name)
        found = torch.autograd.grad(F.mse_loss(model(x), y), list(layer.parameters()))
        gradients[name] = oracles.joint_matrix(*(*found, None)[:2])
        updates[name] = oracles.dense_solve(*oracles.pi_damped(A, G, damping), gradients[name])
    return updates, gradients


@pytest.mark.parametrize("kappa", [None, 1e-3, 1e6])
def test_gradients_become_the_dense_solve_clipped_with_each_group_s_own_rate(kappa: float | None) -> None:
    model, x, y = two_linear_layers()
    damping, rates = 0.03, {"0": 0.5, "1": 2.0}
    updates, gradients = expected_updates(model, x, y, damping)
    clip = (
        1.0
        if kappa is None
        else oracles.clip_factor(list(updates.values()), list(gradients.values()), list(rates.values()), kappa)
    )
    assert (clip < 1) == (kappa == 1e-3)
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": rates["0"]}, {"params": model[1].parameters(), "lr": rates["1"]}]
    )
    kfc = engine(model, damping=damping, kl_clip=kappa)
    with kfc.capture():
        loss = F.mse_loss(model(x), y)
    kfc.update(loss)
    loss.backward()
    kfc.precondition(optimizer=optimizer)
    for name in ("0", "1"):
        layer = model.get_submodule(name)
        found = oracles.joint_matrix(layer.weight.grad, None if layer.bias is None else layer.bias.grad)
        oracles.assert_equal(found, clip * updates[name], what=f"update of {name}")
    assert kfc.last_step is not None
    assert math.isclose(kfc.last_step.kl_clip_factor, clip, rel_tol=1e-9)


def test_the_clip_reads_the_learning_rate_at_each_step() -> None:
    model, x, y = two_linear_layers()
    updates, gradients = expected_updates(model, x, y, 0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    kfc = engine(model, kl_clip=1e-3)
    for rate in (1.0, 1e-4, 3.0):
        optimizer.param_groups[0]["lr"] = rate
        model.zero_grad()
        with kfc.capture():
            loss = F.mse_loss(model(x), y)
        kfc.update(loss)
        loss.backward()
        kfc.precondition(optimizer=optimizer)
        clip = oracles.clip_factor(list(updates.values()), list(gradients.values()), [rate, rate], 1e-3)
        oracles.assert_equal(model[1].weight.grad, clip * updates["1"], what=f"update at lr={rate}")


def test_a_single_rate_can_be_given_instead_of_the_optimizer_but_one_of_the_two_must_be() -> None:
    model, x, y = two_linear_layers()
    kfc = observe(model, lambda: F.mse_loss(model(x), y))
    for arguments in ({}, {"lr": 0.1, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}):
        with pytest.raises(ValueError, match=r"either lr=\.\.\. or optimizer=\.\.\."):
            kfc.precondition(**arguments)


def test_only_the_given_optimizer_s_parameters_are_touched() -> None:
    model, x, y = two_linear_layers()
    kfc = observe(model, lambda: F.mse_loss(model(x), y))
    F.mse_loss(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    kfc.precondition(optimizer=torch.optim.SGD(model[1].parameters(), lr=0.1))
    after = [p.grad for p in model.parameters()]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False]


def test_a_parameter_without_gradient_keeps_none_and_the_others_are_preconditioned() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)}).double()
    x, y = data(5, 3), data(5, 2, seed=4)
    kfc = observe(model, lambda: F.mse_loss(model["used"](x), y))
    F.mse_loss(model["used"](x), y).backward()
    before = model["used"].weight.grad.clone()
    kfc.precondition(lr=0.1)
    assert not torch.allclose(model["used"].weight.grad, before)
    assert model["unused"].weight.grad is None


def test_gradients_are_changed_in_place_and_parameters_not_at_all() -> None:
    # Optimizers and flat buffers may hold the gradient tensors themselves.
    model, x, y = two_linear_layers()
    kfc = observe(model, lambda: F.mse_loss(model(x), y))
    F.mse_loss(model(x), y).backward()
    held = [p.grad for p in model.parameters()]
    values = [p.detach().clone() for p in model.parameters()]
    kfc.precondition(lr=0.1)
    assert all(p.grad is h for p, h in zip(model.parameters(), held, strict=True))
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), values, strict=True))


# Accumulation.


@examples(10)
@given(parts=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_accumulated_micro_batches_of_any_sizes_equal_the_whole_batch(parts: list[int]) -> None:
    total = sum(parts)
    model = small_conv_net()
    x, target = data(total, 2, 6, 6), classes(total, count=3)
    whole = observe(model, lambda: F.cross_entropy(model(x), target)).layers
    kfc = engine(model)
    start = 0
    for i, size in enumerate(parts):
        part = slice(start, start + size)
        start += size
        with kfc.capture():
            loss = F.cross_entropy(model(x[part]), target[part], reduction="sum") / total
        kfc.update(loss, accumulate=i < len(parts) - 1)
        loss.backward()
        if i < len(parts) - 1:
            assert not kfc.layers["0"].averages, "factors must wait for the last micro-batch"
    for name in ("0", "2", "5"):
        oracles.assert_equal(kfc.layers[name].A, whole[name].A, what=f"A of {name}")
        oracles.assert_equal(kfc.layers[name].G, whole[name].G, what=f"G of {name}")


def test_accumulated_parts_with_logits_named_by_the_user_equal_the_whole_batch() -> None:
    model, x, target = double(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), data(6, 3), classes(6, count=3)

    def by_hand(part: slice) -> Tensor:
        return -model(x[part]).log_softmax(1).gather(1, target[part, None]).mean()

    whole = observe(model, lambda: F.cross_entropy(model(x), target)).layers
    kfc = engine(model, likelihood=Categorical(output_of="2"))
    for i in range(3):
        with kfc.capture():
            loss = by_hand(slice(2 * i, 2 * i + 2)) / 3
        kfc.update(loss, accumulate=i < 2, loss_fraction=1 / 3)
        loss.backward()
    for name in ("0", "2"):
        oracles.assert_equal(kfc.layers[name].G, whole[name].G, what=f"G of {name}")


def test_micro_batches_of_one_step_draw_different_targets() -> None:
    model, x, target = double(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), data(2, 3), classes(2, count=3)

    def G(parts: int) -> Tensor:
        kfc = engine(model, fisher="mc")
        for i in range(parts):
            with kfc.capture():
                loss = F.cross_entropy(model(x), target) / parts
            kfc.update(loss, accumulate=i < parts - 1)
            loss.backward()
        return kfc.layers["0"].G

    # The same draws twice, halved, would give the same matrix again.
    assert not torch.allclose(G(1), G(2))


def test_losses_with_a_backward_each_in_one_forward_add_up_on_the_layers_that_they_share() -> None:
    model = nn.ModuleDict({"trunk": nn.Linear(3, 4), "left": nn.Linear(4, 3), "right": nn.Linear(4, 2)}).double()
    x, target, y = data(5, 3), classes(5, count=3), data(5, 2, seed=4)

    def heads() -> tuple[Tensor, Tensor]:
        h = model["trunk"](x).tanh()
        return F.cross_entropy(model["left"](h), target), 0.3 * F.mse_loss(model["right"](h), y)

    together = observe(model, lambda: sum(heads())).layers
    kfc = engine(model)
    with kfc.capture():
        first, second = heads()
    kfc.update(first, accumulate=True)
    first.backward(retain_graph=True)
    kfc.update(second)
    for name in ("trunk", "left", "right"):
        oracles.assert_equal(kfc.layers[name].A, together[name].A, what=f"A of {name}")
        oracles.assert_equal(kfc.layers[name].G, together[name].G, what=f"G of {name}")


def test_a_call_that_two_losses_reach_counts_once_in_the_input_factor() -> None:
    model, x, other, y = double(nn.Linear(3, 2)), data(4, 3), data(2, 3, seed=6), data(6, 2, seed=4)
    kfc = engine(model)
    with kfc.capture():
        one, two = model(x), model(other)
        first = F.mse_loss(one, y[:4])
        second = F.mse_loss(torch.cat([one, two]), y)
    kfc.update(first, accumulate=True)
    first.backward(retain_graph=True)
    kfc.update(second)
    rows = oracles.linear_rows(torch.cat([x, other]), bias=True)
    oracles.assert_equal(kfc.layers["0"].A, rows.T @ rows / 6, what="A")
    # 4 rows with c = 1/8, and 6 with c = 1/12, at 2c each.
    oracles.assert_equal(kfc.layers["0"].G, torch.eye(2).double() * (4 * 2 / 8 + 6 * 2 / 12), what="G")


# What is attached, and when.


def test_between_due_steps_nothing_is_attached_and_nothing_changes() -> None:
    model, x, target = small_conv_net(), data(2, 2, 6, 6), classes(2, count=3)
    kfc = engine(model, factor_every_n_steps=3, inverse_every_n_steps=3, warmup_steps=0)
    for step in range(7):
        due = step % 3 == 0
        with kfc.capture():
            assert (hooks_on(model) > 0) == due
            assert (modes_active() > 0) == due
            loss = F.cross_entropy(model(x), target)
        assert hooks_on(model) == modes_active() == 0
        before = {name: layer.averages.get("A") for name, layer in kfc.layers.items()}
        kfc.update(loss)
        changed = [layer.averages.get("A") is not before[name] for name, layer in kfc.layers.items()]
        assert changed == [due] * 3
        kfc.precondition(lr=0.1)


def test_an_exception_inside_the_capture_detaches_everything() -> None:
    model = small_conv_net()
    kfc = engine(model)

    def broken() -> None:
        with kfc.capture():
            model(data(2, 2, 6, 6))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    assert hooks_on(model) == modes_active() == 0
    # The next step is as if nothing had happened.
    x, target = data(2, 2, 6, 6), classes(2, count=3)
    with kfc.capture():
        loss = F.cross_entropy(model(x), target)
    kfc.update(loss)
    expected = observe(model, lambda: F.cross_entropy(model(x), target)).layers
    oracles.assert_equal(kfc.layers["0"].A, expected["0"].A, what="A")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_made_while_recording_records_nothing(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x, target = small_conv_net(), data(2, 2, 6, 6), classes(2, count=3)
    kfc = engine(model)
    with kfc.capture():
        twin = copied(model)
        loss = F.cross_entropy(model(x), target) + F.cross_entropy(twin(3 * data(2, 2, 6, 6, seed=8)), target)
    kfc.update(loss)
    expected = observe(model, lambda: F.cross_entropy(model(x), target)).layers
    for name in expected:
        oracles.assert_equal(kfc.layers[name].A, expected[name].A, what=f"A of {name}")
        oracles.assert_equal(kfc.layers[name].G, expected[name].G, what=f"G of {name}")
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("named", [False, True], ids=["recognised loss", "named logits"])
def test_activation_checkpointing_records_the_forward_once_and_keeps_batch_norm_s_statistics(named: bool) -> None:
    class Net(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            self.body = double(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
            self.head = double(nn.Linear(4, 3))
            self.checkpointed = checkpointed

        def forward(self, x: Tensor) -> Tensor:
            if self.checkpointed:
                return checkpoint(lambda x: self.head(self.body(x)).log_softmax(1), x, use_reentrant=False)
            return self.head(self.body(x)).log_softmax(1)

    x, target = data(6, 3), classes(6, count=3)
    torch.manual_seed(0)
    model = Net(True)
    plain = Net(False)
    plain.load_state_dict(model.state_dict())
    likelihood = Categorical(output_of="head.0") if named else "auto"

    def run(net: Net) -> KFC:
        kfc = engine(net, likelihood=likelihood, fisher="mc", include=["*"])
        # The capture is still open when the backward runs, as in Lightning's manual optimization.
        with kfc.capture():
            for _ in range(2):
                loss = F.nll_loss(net(x), target)
                kfc.update(loss, accumulate=True)
                kfc.batches.pause()
                loss.backward()
                kfc.batches.resume()
        kfc.refresh()
        return kfc

    found, expected = run(model), run(plain)
    for name in ("body.0", "body.3", "head.0"):
        oracles.assert_equal(found.layers[name].A, expected.layers[name].A, what=f"A of {name}")
        oracles.assert_equal(found.layers[name].G, expected.layers[name].G, what=f"G of {name}")


def test_update_puts_back_the_statistics_that_a_recomputed_batch_norm_would_change() -> None:
    body = double(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    x, target = data(6, 3), classes(6, count=3)
    kfc = engine(body)
    with kfc.capture():
        loss = F.cross_entropy(checkpoint(body, x, use_reentrant=False), target)
    before = {name: value.clone() for name, value in body[1].named_buffers()}
    kfc.update(loss)
    for name, value in body[1].named_buffers():
        assert torch.equal(value, before[name]), name


def test_an_update_without_a_capture_is_an_error_where_statistics_are_due() -> None:
    model, x, y = two_linear_layers()
    kfc = KFC(model, factor_every_n_steps=2, warmup_steps=0)
    with pytest.raises(RuntimeError, match=r"recorded nothing at step 0.*with kfc\.capture\(\)"):
        kfc.update(F.mse_loss(model(x), y))
    with kfc.capture():
        loss = F.mse_loss(model(x), y)
    kfc.update(loss)
    kfc.precondition(lr=0.1)
    with kfc.capture():
        loss = F.mse_loss(model(x), y)
    kfc.update(loss)


def test_an_update_after_the_backward_is_an_error_that_names_the_order() -> None:
    model, x, y = two_linear_layers()
    for loss_of in (lambda: F.mse_loss(model(x), y), lambda: F.mse_loss(model(x), y) * torch.tensor(0.5).double()):
        kfc = engine(model)
        with kfc.capture():
            loss = loss_of()
        loss.backward()
        with pytest.raises(RuntimeError, match=r"Call update\(loss\) before loss\.backward\(\)"):
            kfc.update(loss)


@pytest.mark.parametrize("first", [0, 1])
def test_reentrant_checkpointing_of_any_layer_is_an_error_that_names_the_way_out(first: int) -> None:
    model, x, y = two_linear_layers()
    kfc = engine(model)

    def run(layer: int, value: Tensor) -> Tensor:
        # Torch requires an input with a gradient.
        value = value if value.requires_grad else value.clone().requires_grad_()
        return checkpoint(model[layer], value, use_reentrant=True) if layer == first else model[layer](value)

    with kfc.capture():
        loss = F.mse_loss(run(1, run(0, x)), y)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        kfc.update(loss)


def test_reentrant_checkpointing_above_the_first_layer_is_an_error_too() -> None:
    # Torch requires an input with a gradient; else the estimator's derivatives would not pass through the region.
    model, x, y = two_linear_layers()
    kfc = engine(model)
    with kfc.capture():
        loss = F.mse_loss(model[1](checkpoint(model[0], x.requires_grad_(), use_reentrant=True)), y)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        kfc.update(loss)


def penalty_alone(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model[1](model[0](x).detach()), y) + model[0].weight.square().mean() + model[0].bias.mean()


def test_a_layer_whose_gradient_comes_from_elsewhere_keeps_it_and_is_named_once() -> None:
    model, x, y = two_linear_layers()
    kfc = engine(model)
    for step in range(2):
        model.zero_grad()
        with kfc.capture():
            loss = penalty_alone(model, x, y)
        kfc.update(loss)
        loss.backward()
        plain = model[0].weight.grad.clone()
        if step == 0:
            with pytest.warns(UserWarning, match="no curvature for '0'.*a penalty on their weights"):
                kfc.precondition(lr=0.1)
        else:
            kfc.precondition(lr=0.1)
        assert torch.equal(model[0].weight.grad, plain)


# Which calls and parameters count.


def test_inputs_by_keyword_are_read() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 2)
            self.linear = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(input=self.conv(input=x).flatten(1))

    model, x, target = Keyword().double(), data(4, 2, 3, 3), classes(4, count=3)
    kfc = observe(model, lambda: F.cross_entropy(model(x), target))
    rows = oracles.conv_rows(x, model.conv)
    oracles.assert_equal(kfc.layers["conv"].A, rows.T @ rows / len(rows), what="A")
    with torch.no_grad():
        hidden = oracles.linear_rows(model.conv(x).flatten(1), bias=True)
    oracles.assert_equal(kfc.layers["linear"].A, hidden.T @ hidden / 4, what="A")


class TwoUses(nn.Module):
    """One Linear used twice, as one module or as two that share their parameters."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3) if tied else self.first
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("tied", [False, True], ids=["one module", "two tied modules"])
def test_all_uses_of_shared_parameters_are_one_layer_with_all_their_rows(tied: bool) -> None:
    model, x, y = TwoUses(tied).double(), data(5, 3), data(5, 3, seed=4)
    kfc = observe(model, lambda: F.mse_loss(model(x), y))
    assert list(kfc.layers) == ["first"]
    hidden = model.first(x).tanh().detach()
    rows = oracles.linear_rows(torch.cat([x, hidden]), bias=True)
    oracles.assert_equal(kfc.layers["first"].A, rows.T @ rows / 10, what="A")
    # Rows of both uses: the second's derivative is the loss's own, the first's passes tanh and the weight.
    H = 2 / 15 * torch.eye(3).double()
    W = model.first.weight.detach()
    through = [W @ torch.diag(1 - h.square()) for h in hidden]
    expected = 5 * H + sum(J.T @ H @ J for J in through)
    oracles.assert_equal(kfc.layers["first"].G, expected, what="G")
    F.mse_loss(model(x), y).backward()
    before = oracles.joint_matrix(model.first.weight.grad, model.first.bias.grad).clone()
    kfc.precondition(lr=0.1)
    update = oracles.dense_solve(*oracles.pi_damped(rows.T @ rows / 10, expected, 1e-2), before)
    oracles.assert_equal(oracles.joint_matrix(model.first.weight.grad, model.first.bias.grad), update, what="update")


def test_a_weight_tied_to_another_kind_of_use_gets_no_kronecker_factors() -> None:
    model = nn.ModuleDict({"in": nn.Linear(3, 3), "out": nn.Linear(3, 3, bias=False), "head": nn.Linear(3, 3)}).double()
    model["out"].weight = model["in"].weight
    kfc = engine(model)
    treated = {row.parameter: (row.treatment, row.reason) for row in kfc.coverage()}
    assert treated["head.weight"] == ("kfc", "")
    assert treated["in.weight"][0] != "kfc"
    assert "shared" in treated["in.weight"][1]


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_of_a_partly_frozen_layer_only_the_trainable_part_has_factors_and_is_changed(frozen: str) -> None:
    model, x, y = double(nn.Linear(3, 2)), data(5, 3), data(5, 2, seed=4)
    getattr(model[0], frozen).requires_grad_(False)
    kfc = observe(model, lambda: F.mse_loss(model(x), y), damping=0.03)
    rows = torch.ones(5, 1).double() if frozen == "weight" else x
    A, G = rows.T @ rows / 5, torch.eye(2).double() * 2 / 10 * 5
    oracles.assert_equal(kfc.layers["0"].A, A, what="A")
    oracles.assert_equal(kfc.layers["0"].G, G, what="G")
    F.mse_loss(model(x), y).backward()
    other = "bias" if frozen == "weight" else "weight"
    gradient = getattr(model[0], other).grad.clone()
    kfc.precondition(lr=0.1)
    update = oracles.dense_solve(*oracles.pi_damped(A, G, 0.03), gradient.reshape(2, -1)).reshape(gradient.shape)
    oracles.assert_equal(getattr(model[0], other).grad, update, what="update")
    assert getattr(model[0], frozen).grad is None


def test_a_frozen_layer_records_nothing_until_it_is_unfrozen() -> None:
    model, x, y = two_linear_layers()
    model[0].requires_grad_(False)
    kfc = engine(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train_step(kfc, optimizer, lambda: F.mse_loss(model(x), y))
    assert not kfc.layers["0"].averages
    model[0].requires_grad_(True)
    train_step(kfc, optimizer, lambda: F.mse_loss(model(x), y))
    rows = oracles.linear_rows(x, bias=True)
    oracles.assert_equal(kfc.layers["0"].A, rows.T @ rows / 5, what="A")
    assert kfc.events.restarted_layers == 0


@pytest.mark.parametrize("at_due_step", [True, False])
def test_averages_restart_where_a_parameter_is_unfrozen_midway(at_due_step: bool) -> None:
    model, x, y = double(nn.Linear(3, 2)), data(5, 3), data(5, 2, seed=4)
    model[0].bias.requires_grad_(False)
    kfc = engine(model, factor_every_n_steps=2, inverse_every_n_steps=2, warmup_steps=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    steps = 2 if at_due_step else 1
    for _ in range(steps):
        train_step(kfc, optimizer, lambda: F.mse_loss(model(x), y))
    model[0].bias.requires_grad_(True)
    if not at_due_step:
        # The inverse does not fit the gradient any more: until the next refresh, the plain one is used.
        train_step(kfc, optimizer, lambda: F.mse_loss(model(x), y))
        plain = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
        assert all(torch.allclose(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
    train_step(kfc, optimizer, lambda: F.mse_loss(model(x), y))
    rows = oracles.linear_rows(x, bias=True)
    oracles.assert_equal(kfc.layers["0"].A, rows.T @ rows / 5, what="A")
    assert kfc.events.restarted_layers == 1


def test_a_network_frozen_for_a_while_inside_the_step_keeps_its_averages() -> None:
    # What a GAN's generator step does to the discriminator.
    model = nn.ModuleDict({"generator": nn.Linear(3, 3), "critic": nn.Linear(3, 1)}).double()
    x, ones = data(5, 3), torch.ones(5, 1).double()
    kfc = engine(model)
    with kfc.capture():
        loss = F.binary_cross_entropy_with_logits(model["critic"](x), ones)
        kfc.update(loss, accumulate=True)
        loss.backward()
        model["critic"].requires_grad_(False)
        loss = F.binary_cross_entropy_with_logits(model["critic"](model["generator"](x)), ones)
        kfc.update(loss)
        model["critic"].requires_grad_(True)
    rows = oracles.linear_rows(x, bias=True)
    for name in ("generator", "critic"):
        oracles.assert_equal(kfc.layers[name].A, rows.T @ rows / 5, what=f"A of {name}")
    assert kfc.events.restarted_layers == 0


# Numbers that are not finite.


@pytest.mark.parametrize("where", ["logits", "input"])
def test_statistics_that_are_not_finite_enter_no_average(where: str) -> None:
    model, x, y = two_linear_layers()
    kfc = observe(model, lambda: F.mse_loss(model(x), y))
    kfc.precondition(lr=0.1)
    before = {name: (layer.A.clone(), layer.G.clone()) for name, layer in kfc.layers.items()}
    bad = x.clone()
    bad[0, 0] = float("nan") if where == "logits" else 1e200
    with kfc.capture():
        loss = F.mse_loss(model(bad), y)
    with pytest.warns(UserWarning, match=r"step 1: the statistics of '0'.* are not finite and are dropped"):
        kfc.update(loss)
    for name, layer in kfc.layers.items():
        assert bool(torch.isfinite(layer.A).all())
        if where == "logits" or name == "0":
            assert torch.equal(layer.A, before[name][0])
            assert torch.equal(layer.G, before[name][1])
    assert kfc.events.nonfinite_statistics > 0


def test_an_empty_batch_changes_no_average() -> None:
    model, x, y = two_linear_layers()
    kfc = observe(model, lambda: F.mse_loss(model(x), y))
    kfc.precondition(lr=0.1)
    before = {name: (layer.A.clone(), layer.G.clone()) for name, layer in kfc.layers.items()}
    with kfc.capture():
        loss = F.mse_loss(model(x[:0]), y[:0], reduction="sum")
    with pytest.warns(UserWarning, match="a batch without examples is left out"):
        kfc.update(loss)
    for name, layer in kfc.layers.items():
        assert torch.equal(layer.A, before[name][0])
        assert torch.equal(layer.G, before[name][1])


def test_a_gradient_that_is_not_finite_is_left_as_it_is_for_the_scaler_to_see() -> None:
    model, x, y = two_linear_layers()
    kfc = observe(model, lambda: F.mse_loss(model(x), y))
    F.mse_loss(model(x), y).backward()
    model[0].weight.grad[0, 0] = float("inf")
    before = [p.grad.clone() for p in model.parameters()]
    kfc.precondition(lr=0.1)
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
    assert kfc.events.nonfinite_gradients == 1


def test_an_engine_that_restarts_goes_on_like_a_new_one_and_keeps_who_looks() -> None:
    model = small_conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"damping": "auto", "kl_clip": "auto", "fisher": "mc", "warmup_steps": 2}

    def loss(step: int) -> Callable[[], Tensor]:
        x, y = data(8, 2, 6, 6, seed=step), classes(8, count=3, seed=step)
        return lambda: F.cross_entropy(model(x), y)

    kfc, looked = engine(model, **settings), []
    kfc.inspect = lambda ready, updates: looked.append(len(updates))
    for step in range(5):
        train_step(kfc, optimizer, loss(step))
        kfc.review(optimizer=optimizer)
    kfc.restart()
    assert kfc.step == 0
    assert kfc.ages("0") == (None, None)
    twin, weights = engine(model, **settings), copy.deepcopy(model.state_dict())
    ends = []
    for one in (kfc, twin):
        model.load_state_dict(weights)
        for step in range(5, 9):
            train_step(one, optimizer, loss(step))
            one.review(optimizer=optimizer)
        ends.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in weights)
    assert kfc.state_dict()["trust_region"] == twin.state_dict()["trust_region"]
    assert kfc.events == twin.events
    assert len(looked) == 9


def test_a_factor_without_an_inverse_keeps_the_last_good_one_and_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = two_linear_layers()
    kfc = observe(model, lambda: F.mse_loss(model(x), y))
    kfc.precondition(lr=0.1)
    good = kfc.layers["0"].inverse
    average = kfc.layers["0"].averages["A"]
    average.value.sub_(1e9 * torch.eye(4).double())
    with kfc.capture():
        loss = F.mse_loss(model(x), y)
    with pytest.warns(UserWarning, match=r"step 1, layer '0': no Cholesky.*the last good inverse is kept"):
        kfc.update(loss)
    assert kfc.layers["0"].inverse is good
    assert kfc.events.failed_factorisations == 1
