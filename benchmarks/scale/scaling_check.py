"""The scaling model against runs on this machine, of 1, 2 and 4 ranks: ``python -m benchmarks.scale.scaling_check``.

The machine's numbers in the model are measured first: products, factorisations, and gloo's bandwidth and latency. All
ranks measure at once, since here they share cores. Then a network of equal Linear layers makes due steps with each
placement, and the time of a refresh and of a preconditioned gradient is compared with the prediction.
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

import torch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from benchmarks.cost.shapes import LayerShape, Network
from benchmarks.paths import RESULTS
from benchmarks.scale.model import Machine, predict
from benchmarks.scale.processes import free_port
from lightning_kfc import KFC
from lightning_kfc.factors.inverses import CholeskyInverse

WIDTH, DEPTH, EXAMPLES = 768, 6, 128
PLACEMENTS: dict[str, str | float] = {"comm-opt": "comm-opt", "half of the ranks": 0.5, "mem-opt": "mem-opt"}


def network() -> Network:
    """The network of the comparison."""
    layers = [LayerShape(str(i), WIDTH + 1, WIDTH, 1) for i in range(DEPTH)]
    return Network("Linear layers", layers, EXAMPLES)


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """The least time of a piece of work that all ranks begin together, since other work only adds to it."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def calibrated(repeats: int) -> Machine:
    """This machine with this number of ranks."""
    ranks = dist.get_world_size()
    square = torch.randn(WIDTH, WIDTH)
    product = 2 * WIDTH**3 / seconds_of(lambda: square @ square, repeats)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    x, y = torch.randn(EXAMPLES, WIDTH), torch.randint(WIDTH, (EXAMPLES,))
    step = network().step_flops() / seconds_of(lambda: F.cross_entropy(model(x), y).backward(), repeats)
    factor = torch.eye(WIDTH)[None] + 0.01
    pair = {"A": factor, "G": factor}
    inversion = seconds_of(lambda: CholeskyInverse.factorise(pair, 0.01), repeats) / 2
    buffer, tiny = torch.zeros(2**22), torch.zeros(1)
    latency = seconds_of(lambda: dist.all_reduce(tiny), repeats) if ranks > 1 else 0.0
    ring = 2 * (ranks - 1) / ranks * buffer.nbytes
    bandwidth = ring / max(seconds_of(lambda: dist.all_reduce(buffer), repeats) - latency, 1e-9) if ranks > 1 else 1e12
    return Machine(
        "this machine",
        step,
        product,
        lambda d: inversion * (d / WIDTH) ** 3,
        lambda _: bandwidth,
        lambda size: latency if size > 1 else 0.0,
    )


def measured(placement: str | float, repeats: int) -> dict[str, float]:
    """Seconds of a refresh and of a preconditioned gradient, and the largest number of bytes on a rank."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    kfc = KFC(model, factor_every_n_steps=1, inverse_every_n_steps=1, warmup_steps=0, placement=placement)
    x, y = torch.randn(EXAMPLES, WIDTH), torch.randint(WIDTH, (EXAMPLES,))
    refreshes, solves = [], []
    for _ in range(repeats + 2):
        model.zero_grad()
        with kfc.capture():
            started = time.perf_counter()
            loss = F.cross_entropy(model(x), y)
            recorded = time.perf_counter() - started
        dist.barrier()
        started = time.perf_counter()
        kfc.update(loss)
        dist.barrier()
        refreshes.append(time.perf_counter() - started + recorded)
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        dist.barrier()
        started = time.perf_counter()
        kfc.precondition(lr=1e-3)
        dist.barrier()
        solves.append(time.perf_counter() - started)
    held = sum(t.nbytes for layer in kfc.layers.values() for t in layer.factors.values())
    held += sum(layer.inverse.nbytes() for layer in kfc.layers.values() if layer.inverse is not None)
    fullest = torch.tensor([float(held)])
    dist.all_reduce(fullest, dist.ReduceOp.MAX)
    return {"refresh": min(refreshes[2:]), "precondition": min(solves[2:]), "memory": float(fullest)}


def _rank(rank: int, size: int, port: int, repeats: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    machine = calibrated(repeats)
    forward = network().step_flops() / 3 / machine.step_rate
    results: dict[str, Any] = {}
    for name, placement in PLACEMENTS.items():
        cost = predict(network(), machine, size, placement)
        predicted = {
            # Includes the forward, in which A is formed.
            "refresh": forward + cost.statistics + cost.reduction + cost.factorisation + cost.sharing,
            "precondition": cost.preconditioning + cost.updates,
            "memory": cost.memory,
        }
        results[name] = {"predicted": predicted, "measured": measured(placement, repeats)}
    if rank == 0:
        Path(path).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def markdown(found: dict[str, Any]) -> str:
    """Predicted and measured, side by side."""
    lines = [
        f"{DEPTH} Linear layers of width {WIDTH}, {EXAMPLES} examples a rank, gloo, one thread a rank.",
        "",
        "| ranks | placement | refresh, ms: predicted | measured | precondition, ms: predicted | measured "
        "| MB a rank: predicted | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, placements in found.items():
        for name, both in placements.items():
            cells = [size, name]
            for what, unit, digits in (("refresh", 1e3, 0), ("precondition", 1e3, 1), ("memory", 1e-6, 1)):
                cells += [f"{both[kind][what] * unit:.{digits}f}" for kind in ("predicted", "measured")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    found = {}
    for size in options.ranks:
        path = options.results / f"scaling_check_{os.getpid()}_{size}.json"
        spawn(_rank, (size, free_port(), options.repeats, str(path)), nprocs=size)
        found[str(size)] = json.loads(path.read_text())
        path.unlink()
    text = markdown(found)
    print(text)
    (options.results / "scaling_check.md").write_text(text)
    versions = {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    kept = json.dumps({"ranks": found, "measured_with": versions}, indent=1)
    (options.results / "scaling_check.json").write_text(kept + "\n")


if __name__ == "__main__":
    main()
