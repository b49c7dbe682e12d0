"""Modules that shard themselves in ``configure_model``, for ModelParallelStrategy."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.distributed.nets import Net


class Sharded(Net):
    """FSDP2: every layer that has parameters is a unit, then the whole."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for module in self.net:
            if any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class InOnePiece(Net):
    """FSDP2: the whole is one unit, whose parameters stay whole from the forward to the backward."""

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class InTwoPieces(Net):
    """FSDP2: one layer is a unit, the others belong to the whole."""

    def configure_model(self) -> None:
        fully_shard(self.net[2], mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Hybrid(Net):
    """HSDP: two replicas of a model that two ranks share."""

    def configure_model(self) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for module in self.net:
            if any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def tensor_parallel_net() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


class TensorParallel(Net):
    """A column-wise and a row-wise Linear, then a plain one; sharded further where there is data parallelism."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_net)

    def configure_model(self) -> None:
        plan: dict[str, Any] = {"1": ColwiseParallel(), "3": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        if self.device_mesh["data_parallel"].size() > 1:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
