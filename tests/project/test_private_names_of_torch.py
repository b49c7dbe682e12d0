"""The private names of torch that the package relies on: all of them stand here, and the installed torch has them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributions, nn, optim
from torch.autograd import Function
from torch.nn.parallel import distributed

PACKAGE = Path(__file__).resolve().parents[2] / "lightning_kfc"
#: Names of modules, and of what modules hold.
IN_MODULES = {
    "torch._C": "DisableTorchFunction _functorch _len_torch_dispatch_stack",
    "torch._C._functorch": "is_functorch_wrapped_tensor",
    "torch._C._autograd": "_top_saved_tensors_default_hooks",
    "torch._ops": "OpOverload",
    "torch": "_VF _foreach_lerp_ _neg_view",
    "torch.autograd": "_unsafe_preserve_version_counter",
    "torch.nn": "_reduction",
    "torch.nn.modules.batchnorm": "_BatchNorm",
    "torch.nn.parallel.distributed": "_DDPSink",
    "torch.utils._python_dispatch": "TorchDispatchMode _disable_current_modes",
    "torch.utils._pytree": "tree_map",
}


class Twice(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 2 * gradient


def made() -> Iterator[tuple[object, str]]:
    """Objects with their private attributes that are read."""
    x = torch.ones(3, 4, requires_grad=True)
    yield x, "_version _base _backward_hooks"
    yield x.untyped_storage(), "_cdata _weak_ref _free_weak_ref"
    yield torch.eye(2).to_sparse(), "_values"
    yield nn.Linear(2, 2), "_parameters _buffers"
    yield nn.MultiheadAttention(4, 1), "_qkv_same_embed_dim"
    yield nn.InstanceNorm1d(3), "_get_no_batch_dim"
    yield x.sum().grad_fn, "_input_metadata"
    yield type(Twice.apply(x).grad_fn), "_forward_cls"
    yield nn.LayerNorm(4)(x).grad_fn, "_saved_result1 _saved_result2"
    yield torch.ops.aten.add.Tensor, "_schema"
    yield distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)), "_unbroadcasted_scale_tril"
    yield distributions.Beta(torch.ones(2), torch.ones(2)), "_dirichlet"
    optimizer = optim.SGD([x], lr=0.1)
    plain = optim.lr_scheduler.StepLR(optimizer, 1)
    yield optim.lr_scheduler.SequentialLR(optimizer, [plain, plain], [1]), "_schedulers"
    yield optimizer.step, "_wrapped_by_lr_sched"
    yield optim.lr_scheduler.CyclicLR(optim.SGD([x], lr=0.1, momentum=0.5), 0.1, 0.2), "_scale_fn_custom"


#: Of our own classes.
OURS = {"_fit", "_rows"}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def read_of_others(path: Path) -> Iterator[str]:
    """The private names of other objects that a file imports or reads."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (alias.name for alias in node.names if private(alias.name) or "._" in (node.module or ""))


def test_every_private_name_of_torch_is_listed() -> None:
    # Lightning's own stand in a file of the package, with a test beside it.
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "lightning_internals.py"]
    used = {name for path in files for name in read_of_others(path)}
    listed = {name for names in IN_MODULES.values() for name in names.split()}
    listed |= {name for _, names in made() for name in names.split()}
    listed |= {part for module in IN_MODULES for part in module.split(".") if private(part)}
    assert used - OURS <= listed


@pytest.mark.parametrize("module", IN_MODULES)
def test_the_modules_of_torch_have_them(module: str) -> None:
    found: Any = torch
    for part in module.split(".")[1:]:
        found = getattr(found, part)
    assert [name for name in IN_MODULES[module].split() if not hasattr(found, name)] == []


def test_the_objects_of_torch_have_them() -> None:
    missing = [(type(owner), name) for owner, names in made() for name in names.split() if not hasattr(owner, name)]
    assert missing == []


def test_the_wrapper_of_several_processes_has_the_flag_that_is_put_back() -> None:
    # It is set in a constructor that needs a group of processes.
    source = Path(str(distributed.__file__)).read_text("utf-8")
    assert "_static_graph_delay_allreduce_enqueued" in source
