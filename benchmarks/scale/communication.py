"""Bytes on the wire and time of one refresh's sum over ranks: ``python -m benchmarks.scale.communication``.

Real processes with gloo on this machine sum the factors of a ResNet-50 (or of another network) in float32 in several
ways: one all-reduce for every full matrix, one after the other; the package's packed triangles in one buffer, and in
buckets. The time is that from the statistics to the sums on all ranks, including packing and unpacking. Bytes are those
of a rank's buffers in collectives.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.cost.shapes import NETWORKS
from benchmarks.paths import RESULTS
from benchmarks.scale.processes import free_port
from lightning_kfc.distributed import factor_reduction
from lightning_kfc.distributed.factor_reduction import BUCKET_BYTES, FactorReduction, StatisticsLayout
from lightning_kfc.distributed.process_group import ProcessGroup
from lightning_kfc.factors.statistics import Statistics

WAYS = {
    "naive": "each full factor by itself",
    "full, one buffer": "full factors in one buffer",
    "packed, one buffer": "packed triangles in one buffer",
    "packed, buckets": f"packed triangles in buckets of {BUCKET_BYTES // 2**20} MB (the default)",
}


def statistics_of(network: str) -> dict[str, Statistics]:
    """Symmetric totals of a network's layers, with arbitrary values."""
    found = {}
    for layer in NETWORKS[network].layers:
        totals = {name: torch.rand(shape) for name, shape in layer.shapes().items()}
        symmetric = {name: t + t.mT if t.ndim == 3 else t for name, t in totals.items()}
        found[layer.name] = Statistics({"A": symmetric["A"]}, {"G": symmetric["G"]}, layer.rows)
    return found


def _outlines(statistics: dict[str, Statistics]) -> list[StatisticsLayout]:
    cpu = torch.device("cpu")
    return [
        StatisticsLayout(
            name,
            {key: tuple(t.shape) for key, t in {**s.means, **s.sums}.items()},
            frozenset("A"),
            torch.float32,
            cpu,
        )
        for name, s in statistics.items()
    ]


def naive(statistics: dict[str, Statistics]) -> int:
    """One blocking all-reduce for every full factor."""
    sent = 0
    for entry in statistics.values():
        for total in (*entry.means.values(), *entry.sums.values()):
            own: Tensor = total.clone()
            dist.all_reduce(own)
            sent += own.nbytes
    return sent


def full_in_one(statistics: dict[str, Statistics]) -> int:
    """All full factors in one buffer."""
    totals = [total for entry in statistics.values() for total in (*entry.means.values(), *entry.sums.values())]
    flat = torch.cat([total.reshape(-1) for total in totals])
    dist.all_reduce(flat)
    parts = torch.split(flat, [total.numel() for total in totals])
    _ = [part.reshape(total.shape).clone() for part, total in zip(parts, totals, strict=True)]
    return flat.nbytes


def in_buckets(statistics: dict[str, Statistics]) -> int:
    """The package's reduction."""
    reduction = FactorReduction(ProcessGroup(), _outlines(statistics), statistics)
    reduction.end()
    return reduction.bytes


def in_one_buffer(statistics: dict[str, Statistics]) -> int:
    """The package's reduction, with one bucket of any size."""
    with mock.patch.object(factor_reduction, "BUCKET_BYTES", 2**62):
        return in_buckets(statistics)


def ways() -> dict[str, Callable[[dict[str, Statistics]], int]]:
    """The ways by name."""
    return dict(zip(WAYS, (naive, full_in_one, in_one_buffer, in_buckets), strict=True))


def _rank(rank: int, size: int, port: int, network: str, repeats: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    statistics = statistics_of(network)
    results: dict[str, Any] = {}
    for name, run in ways().items():
        seconds = []
        for repeat in range(repeats + 1):
            dist.barrier()
            started = time.perf_counter()
            sent = run(statistics)
            dist.barrier()
            # The first repeat is a warm-up.
            if repeat:
                seconds.append(time.perf_counter() - started)
        results[name] = {"bytes": sent, "seconds": min(seconds)}
    if rank == 0:
        Path(path).write_text(json.dumps(results))
    dist.destroy_process_group()


def measure(network: str, sizes: Sequence[int], repeats: int, folder: Path) -> dict[str, Any]:
    """Every way with each number of ranks."""
    found = {}
    for size in sizes:
        path = folder / f"communication_{os.getpid()}_{size}.json"
        spawn(_rank, (size, free_port(), network, repeats, str(path)), nprocs=size)
        found[str(size)] = json.loads(path.read_text())
        path.unlink()
    return found


def markdown(network: str, results: dict[str, Any]) -> str:
    """A table: bytes once, seconds for each number of ranks."""
    sizes = list(results)
    heads = " | ".join(f"{size} ranks: seconds | of naive" for size in sizes)
    lines = [
        f"One refresh of {NETWORKS[network].title.split(',')[0]}'s factors over gloo, float32, one thread a rank.",
        "",
        f"| sum over ranks | MB | of naive | {heads} |",
        "|---|---" + "|---" * (1 + 2 * len(sizes)) + "|",
    ]
    base = results[sizes[0]]["naive"]["bytes"]
    for name, title in WAYS.items():
        sent = results[sizes[0]][name]["bytes"]
        cells = [title, f"{sent / 1e6:.1f}", f"{sent / base:.2f}"]
        for size in sizes:
            own, reference = results[size][name]["seconds"], results[size]["naive"]["seconds"]
            cells += [f"{own:.2f}", f"{own / reference:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet50")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    results = measure(options.network, options.ranks, options.repeats, options.results)
    table = markdown(options.network, results)
    print(table)
    (options.results / "communication.md").write_text(table)
    versions = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    text = json.dumps({"network": options.network, "ranks": results, "measured_with": versions}, indent=1)
    (options.results / "communication.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
