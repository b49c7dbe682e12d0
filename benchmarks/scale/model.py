"""A model of KFC's cost with many ranks: computation, communication and placement.

The cost of one refresh is the sum of products of rows (A and G), the sum over ranks, the factorisations of the busiest
rank (by the package's own assignment), and the messages of inverses to their group. The cost of each step is the sum of
the preconditioning products and, if not every rank holds every inverse, the messages of updates. A collective costs a
latency, and the bytes that a ring moves over the slowest link. Without any overlap, the costs are upper bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.cost.shapes import LayerShape, Network
from lightning_kfc.distributed.placement import Grid, Placement, gradient_workers
from lightning_kfc.factors.packing import packed_numel


@dataclass(frozen=True)
class Machine:
    """The speed of ranks and links.

    Attributes:
        title: The machine's name.
        step_rate: Operations per second of a plain forward and backward.
        product_rate: Operations per second of products in float32.
        factorise: Seconds to invert one factor of d dimensions.
        bandwidth: Bytes per second that a rank sends and receives, by the number of ranks.
        latency: The latency of a collective in seconds, by the number of ranks.
    """

    title: str
    step_rate: float
    product_rate: float
    factorise: Callable[[int], float]
    bandwidth: Callable[[int], float]
    latency: Callable[[int], float]


def gpu_nodes(
    step_rate: float = 1.2e14,
    product_rate: float = 6e13,
    factorise_rate: float = 2e12,
    factorise_latency: float = 1e-6,
    inside: float = 2e11,
    between: float = 2.5e10,
    per_node: int = 8,
) -> Machine:
    """Nodes of eight GPUs. The numbers are assumed, not measured; each is an argument of the command line.

    Args:
        step_rate: Half-precision training, about 40% of an A100's peak.
        product_rate: TF32 products, about 40% of the peak.
        factorise_rate: Operations per second of a large Cholesky factorisation and inversion.
        factorise_latency: Sequential seconds of a factorisation per dimension.
        inside: Bytes per second and GPU within a node.
        between: Bytes per second and GPU between nodes (200 Gb/s).
        per_node: GPUs of a node.
    """
    return Machine(
        f"nodes of {per_node} GPUs",
        step_rate,
        product_rate,
        lambda d: d**3 / factorise_rate + d * factorise_latency,
        lambda ranks: inside if ranks <= per_node else between,
        lambda ranks: 1e-5 * math.ceil(math.log2(ranks)) if ranks > 1 else 0.0,
    )


@dataclass(frozen=True)
class Schedule:
    """The periods of statistics and inverses late in a run, ten times the defaults."""

    factor_every: int = 100
    inverse_every: int = 200


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes of the busiest rank.

    Attributes:
        step: A plain step with the sum of gradients over ranks.
        statistics: Products of rows, and the seeds' back-propagation, of one refresh.
        reduction: The sum of statistics over ranks, of one refresh.
        factorisation: The factorisations of one refresh.
        sharing: The messages of inverses in one refresh.
        preconditioning: The products of every step.
        updates: The messages of updates in every step.
        memory: Bytes of factors and inverses.
    """

    step: float
    statistics: float
    reduction: float
    factorisation: float
    sharing: float
    preconditioning: float
    updates: float
    memory: float

    def overhead(self, schedule: Schedule) -> float:
        """The overhead of an average step, as a share of a plain one."""
        factors = (self.statistics + self.reduction) / schedule.factor_every
        inverses = (self.factorisation + self.sharing) / schedule.inverse_every
        return (factors + inverses + self.preconditioning + self.updates) / self.step


def packed_bytes(layer: LayerShape) -> float:
    """Bytes of a layer's factors in messages."""
    return 4.0 * sum(packed_numel(shape) for shape in layer.shapes().values())


def held_bytes(layer: LayerShape) -> float:
    """Bytes of a layer's factors in memory; its inverse takes as many."""
    return 4.0 * sum(math.prod(shape) for shape in layer.shapes().values())


def statistics_flops(network: Network) -> float:
    """Operations of products of rows, and of a back-propagation of seeds, a third of a plain step."""
    rows = [(layer, layer.rows * network.examples) for layer in network.layers if not layer.one_hot]
    return sum(2.0 * count * sum(d * d for d in layer.dense()) for layer, count in rows)


def solve_flops(layer: LayerShape) -> float:
    """Operations of the products that precondition a layer's gradient."""
    return 2.0 * layer.parameters() * sum(layer.dense())


def predict(network: Network, machine: Machine, ranks: int, placement: str | float) -> Cost:
    """The cost of one rank."""
    layers = {layer.name: layer for layer in network.layers}
    grid = Grid(ranks, gradient_workers(placement, ranks))
    seconds = {name: sum(machine.factorise(d) for d in layer.dense()) for name, layer in layers.items()}
    placed = Placement(grid)
    placed.add(seconds)
    owners = placed.owners
    own = _by_rank(owners, seconds, ranks)
    triangles = sum(packed_bytes(layer) for layer in layers.values())
    gradients = 4.0 * network.parameters()
    bandwidth, latency = machine.bandwidth(ranks), machine.latency(ranks)
    ring = (ranks - 1) / ranks
    replicated = grid.workers == ranks

    # A sum for all ranks goes round the ring twice, a sum for the owners once.
    reduction = (2 if replicated else 1) * ring * triangles / bandwidth + latency if ranks > 1 else 0.0
    groups = [0.0] * (ranks // grid.workers)
    solving, holding = list(groups), list(groups)
    for name, owner in owners.items():
        group = grid.group(owner)
        groups[group] += packed_bytes(layers[name])
        solving[group] += solve_flops(layers[name])
        holding[group] += held_bytes(layers[name])
    inside = machine.bandwidth(grid.workers)
    sharing = max(groups) / inside + grid.workers * machine.latency(grid.workers) if grid.workers > 1 else 0.0
    updates = 0.0 if replicated else gradients / bandwidth + latency
    factors = _by_rank(owners, {name: held_bytes(layer) for name, layer in layers.items()}, ranks)
    inverse_bytes = max(holding)
    factor_bytes = sum(held_bytes(layer) for layer in layers.values()) if replicated else max(factors)
    return Cost(
        step=network.step_flops() / machine.step_rate + 2 * ring * gradients / bandwidth,
        statistics=statistics_flops(network) / machine.product_rate + network.step_flops() / 3 / machine.step_rate,
        reduction=reduction,
        factorisation=max(own),
        sharing=sharing,
        preconditioning=max(solving) / machine.product_rate,
        updates=updates,
        memory=factor_bytes + inverse_bytes,
    )


def _by_rank(owners: Mapping[str, int], amounts: Mapping[str, float], ranks: int) -> list[float]:
    loads = [0.0] * ranks
    for name, owner in owners.items():
        loads[owner] += amounts[name]
    return loads
