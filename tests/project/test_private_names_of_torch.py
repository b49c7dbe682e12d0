"""The private names of torch are in one file, and have the assumed meaning."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributions, nn, optim
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.nn.parallel import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_kfc.utilities import torch_internals as internals

PACKAGE = Path(__file__).resolve().parents[2] / "lightning_kfc"
FILE = Path(internals.__file__)
#: A test beside it requires that Lightning has what this file names.
OF_LIGHTNING = PACKAGE / "callback" / "lightning_internals.py"
#: Of our own classes.
OURS = {"_fit", "_rows"}
#: The ends of names, not names.
ENDS = {"_min", "_max", "_median", "_reverse", "_proj_weight"}


def private(name: object) -> bool:
    return isinstance(name, str) and re.match(r"_[A-Za-z]\w*$", name) is not None


def of_others(path: Path) -> Iterator[str]:
    """The private names of other packages and objects that a file imports, reads or writes, in any spelling."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_kfc"):
            yield from filter(private, [*(node.module or "").split("."), *(alias.name for alias in node.names)])
        elif isinstance(node, ast.Import):
            yield from filter(private, (part for alias in node.names for part in alias.name.split(".")))
        elif isinstance(node, ast.Constant) and private(node.value):
            yield str(node.value)


def test_every_private_name_of_torch_and_lightning_stands_in_one_file_for_each() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path not in (FILE, OF_LIGHTNING)]
    found = {str(path.relative_to(PACKAGE)): set(of_others(path)) - OURS - ENDS for path in files}
    assert {name: names for name, names in found.items() if names} == {}
    assert len(set(of_others(FILE))) > 30


@pytest.mark.parametrize(
    "line", ["import torch._C", "from torch._C import x", "from torch import _VF", "x._base", "getattr(x, '_base')"]
)
def test_a_private_name_is_found_in_any_spelling(line: str, tmp_path: Path) -> None:
    (tmp_path / "used.py").write_text(f"self._own, cls._own, x.public\n{line}\n", "utf-8")
    assert set(of_others(tmp_path / "used.py")) in ({"_C"}, {"_VF"}, {"_base"})


def test_modules_have_parameters_and_buffers() -> None:
    norm = nn.BatchNorm1d(3, affine=False)
    assert internals.parameters_of(norm) == {"weight": None, "bias": None}
    internals.buffers_of(norm)["running_mean"] = torch.ones(3)
    assert norm.running_mean is not None
    assert norm.running_mean.sum() == 3
    assert isinstance(norm, internals.AnyBatchNorm)
    assert not isinstance(nn.LayerNorm(3), internals.AnyBatchNorm)
    packed, apart = nn.MultiheadAttention(4, 1), nn.MultiheadAttention(4, 1, kdim=2)
    assert internals.has_packed_projections(packed)
    assert not internals.has_packed_projections(apart)
    assert internals.dimensions_of_one_example(nn.InstanceNorm2d(3)) == 3
    attention: Any = F.multi_head_attention_forward
    assert set(internals.ATTENTION_PROJECTIONS) <= set(attention.__globals__)
    compiled: Any = torch.compile(norm, backend="eager")
    assert {internals.plain_name(name) for name, _ in compiled.named_buffers()} == dict(norm.named_buffers()).keys()


def test_a_recurrent_module_calls_these_functions() -> None:
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        nn.GRU(2, 3)(torch.ones(1, 4, 2))
        nn.LSTMCell(2, 3)(torch.ones(1, 2))
    assert internals.fused_recurrence.gru in seen
    assert internals.fused_recurrence.lstm_cell in seen


def test_tensors_have_versions_bases_and_hooks() -> None:
    x = torch.ones(3, 4)
    with internals.version_kept(x):
        x += 1
    assert internals.version_of(x) == 0
    x += 1
    assert internals.version_of(x) == 1
    with torch.inference_mode():
        assert internals.version_of(torch.ones(1)) == 0
    assert internals.base_of(x.view(12)) is x
    assert internals.base_of(x) is None
    assert internals.values_of(torch.eye(3).to_sparse()).tolist() == [1, 1, 1]
    assert internals.values_of(x) is x
    assert torch.equal(internals.negated_view(x), -x)
    assert not internals.is_wrapped(x)
    assert torch.func.vmap(lambda row: row + float(internals.is_wrapped(row)))(torch.zeros(2, 1)).sum() == 2
    w = torch.ones(2, requires_grad=True)
    assert not internals.hooks_of(w)
    w.register_hook(lambda gradient: 2 * gradient)
    hooks = internals.hooks_of(w)
    internals.set_hooks(w, None)
    assert torch.autograd.grad(w.sum(), w)[0].tolist() == [1, 1]
    internals.set_hooks(w, hooks)
    assert torch.autograd.grad(w.sum(), w)[0].tolist() == [2, 2]
    moved = [torch.zeros(2), torch.ones(1)]
    internals.interpolate(moved, [torch.ones(2), torch.full((1,), 3.0)], 0.25)
    assert [tensor.tolist() for tensor in moved] == [[0.25, 0.25], [1.5]]


def test_a_weak_reference_keeps_the_address_of_a_storage_and_not_its_memory() -> None:
    x = torch.ones(1000)
    first = internals.address_of(x.untyped_storage())
    assert internals.address_of(x[5:].untyped_storage()) == first
    reference = internals.weak_reference(x.untyped_storage())
    del x
    others = [torch.ones(1000) for _ in range(20)]
    assert first not in {internals.address_of(other.untyped_storage()) for other in others}
    internals.free(reference)


class Twice(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_the_graph_has_what_is_read_of_it() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    y: Tensor = Twice.apply(x)
    assert internals.custom_function(y.grad_fn) is Twice
    assert internals.custom_function(x.sum().grad_fn) is None
    assert internals.gradient_shape_and_type(get_gradient_edge(y.double())) == (torch.Size([6, 4]), torch.float64)
    mean, inverse_deviation = internals.saved_moments(nn.BatchNorm1d(4)(x).grad_fn)
    torch.testing.assert_close(mean, x.detach().mean(0))
    torch.testing.assert_close(inverse_deviation, (x.detach().var(0, correction=0) + 1e-5).rsqrt())
    assert internals.saved_tensor_hooks() is None
    with torch.autograd.graph.saved_tensors_hooks(torch.neg, torch.sum):
        assert internals.saved_tensor_hooks() == (torch.neg, torch.sum)


def test_dispatch_modes_do_not_see_what_is_kept_from_them() -> None:
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((internals.schema_of(func).name, func))
            return func(*args, **(kwargs or {}))

    assert issubclass(Mode, internals.TorchDispatchMode)
    x = torch.ones(2)
    with Mode(), internals.unseen_by_dispatch_modes():
        torch.neg(x)
    assert seen == []
    with Mode():
        torch.neg(x)
    assert [name for name, _ in seen] == ["aten::neg"]
    assert internals.schema_of(torch.neg) is None

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.clear()
            return func(*args, **(kwargs or {}))

    with Seen(), internals.DisableTorchFunction():
        torch.neg(x)
    assert len(seen) == 1


def test_the_wrapper_of_several_processes_has_the_flag_that_is_put_back() -> None:
    # It is set in a constructor that needs a group of processes.
    source = Path(str(distributed.__file__)).read_text("utf-8")
    assert "self._static_graph_delay_allreduce_enqueued" in source

    class Wrapper:
        pass

    wrapper = Wrapper()
    assert internals.sink_waits(wrapper)
    internals.set_sink_waits(wrapper, False)
    assert not internals.sink_waits(wrapper)
    assert issubclass(distributed._DDPSink, Function)
    assert not internals.is_sink(torch.ones(1, requires_grad=True).sum().grad_fn)


def test_losses_and_distributions_have_them() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert internals.legacy_reduction(False, None) == "sum"
        assert internals.legacy_reduction(True, False) == "none"
    factor = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    normal = distributions.MultivariateNormal(torch.zeros(5, 2), scale_tril=factor)
    assert torch.equal(internals.scale_tril_of(normal), factor)
    beta = distributions.Beta(torch.tensor([2.0]), torch.tensor([3.0]))
    assert internals.concentrations_of(beta).tolist() == [[2.0, 3.0]]


def test_optimizers_and_schedulers_have_them() -> None:
    x = torch.ones(2, requires_grad=True)
    optimizer, fused = optim.SGD([x], lr=0.1, momentum=0.5), optim.SGD([x], lr=0.1, fused=True)
    assert (internals.unscales_in_step(optimizer), internals.unscales_in_step(fused)) == (False, True)
    inner = [optim.lr_scheduler.StepLR(optimizer, 1), optim.lr_scheduler.StepLR(optimizer, 1)]
    assert list(internals.inner_schedulers(optim.lr_scheduler.SequentialLR(optimizer, inner, [1]))) == inner
    assert internals.inner_schedulers(inner[0]) == ()
    cyclic = optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.2, scale_fn=abs)
    assert internals.custom_scale(cyclic) is abs
    assert internals.custom_scale(inner[0]) is None
    with pytest.warns(UserWarning, match="before"):
        optim.lr_scheduler.StepLR(optim.SGD([x], lr=0.1), 1).step()
    unwarned = optim.SGD([x], lr=0.1)
    scheduler = optim.lr_scheduler.StepLR(unwarned, 1)
    # A bound method takes no attributes; a stand-in has a function.
    unwarned.step = lambda: None  # type: ignore[method-assign]
    internals.mark_as_stepped(unwarned)
    scheduler.step()
