"""The cost of a large factor, dense and as its diagonal: ``python -m benchmarks.cost.large_layers``.

The reason for the default of ``max_factor_dim``. For factors of several sizes: the memory of a running average and its
inverse, and the time of one statistic and of one refresh by each inverse. Then a vocabulary head with its large factor
as a diagonal: time of a due step over a plain one, and the growth of resident memory. Times are CPU seconds, medians
over repetitions; memory is counted from the tensors and, for the head, read from the kernel (Linux only).
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC
from lightning_kfc.factors.inverses import INVERSES, Inverse
from lightning_kfc.factors.statistics import second_moment_diagonal, second_moment_total

#: The small side of the measured layer, whose cost is negligible.
SMALL = 64
#: ResNet-50's widest factor, the default bound, BERT's vocabulary.
KNOWN = {4_609: "ResNet-50, 3x3 on 512", 10_000: "the default bound", 30_522: "BERT's vocabulary"}


def processor_seconds(work: Callable[[], object], repeats: int) -> float:
    """The median CPU time of a piece of work, after one warm-up run."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return median(times)


def held_bytes(kind: type[Inverse], d: int, *, diagonal: bool) -> int:
    """Bytes of the large factor's running average and inverse, in float32."""
    small = {"G": (1, SMALL, SMALL)}
    large = {"A": (1, d) if diagonal else (1, d, d)}
    numel = d if diagonal else d * d
    return 4 * (numel + kind.numel({**large, **small}) - SMALL**2)


def measure_factor(d: int, rows: int, repeats: int, *, diagonal: bool) -> list[float]:
    """Seconds of a statistic from so many rows, then of a refresh by each inverse."""
    data = torch.randn(rows, 1, 1, d)
    statistic: Callable[[Tensor], Tensor] = second_moment_diagonal if diagonal else second_moment_total
    factors = {"A": statistic(data) / rows, "G": torch.eye(SMALL).unsqueeze(0)}
    return [
        processor_seconds(lambda: statistic(data), repeats),
        processor_seconds(lambda: INVERSES["cholesky"].factorise(factors, 0.01), repeats),
        processor_seconds(lambda: INVERSES["eigh"].factorise(factors, 0.01), repeats),
    ]


def measure_head(words: int, hidden: int, rows: int, repeats: int) -> tuple[float, float]:
    """A vocabulary head under KFC: time of a due step over that of a plain one, and megabytes of memory growth."""
    model = nn.Linear(hidden, words)
    inputs, targets = torch.randn(rows, hidden), torch.randint(words, (rows,))
    kfc = KFC(model, factor_every_n_steps=1, inverse_every_n_steps=1)

    def plain() -> None:
        model.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()

    def due() -> None:
        model.zero_grad()
        with kfc.capture():
            loss = F.cross_entropy(model(inputs), targets)
        kfc.update(loss)
        loss.backward()
        kfc.precondition(lr=0.1)

    plain_seconds = processor_seconds(plain, repeats)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    due_seconds = processor_seconds(due, repeats)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return due_seconds / max(plain_seconds, 1e-9), grown / 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 1024, 2048, 4609])
    parser.add_argument("--rows", type=int, default=2048, help="rows of a statistic")
    parser.add_argument("--words", type=int, default=30_522)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # The head first, since the kernel has the peak of memory only.
    ratio, grown = measure_head(options.words, options.hidden, 128, options.repeats)

    print(f"{'dimensions':>10}  {'memory cholesky':>16}  {'memory eigh':>12}  {'diagonal':>9}")
    for d in sorted({*options.dims, *KNOWN}):
        dense = [held_bytes(INVERSES[name], d, diagonal=False) / 1e9 for name in ("cholesky", "eigh")]
        cheap = held_bytes(INVERSES["cholesky"], d, diagonal=True) / 1e6
        print(f"{d:>10,}  {dense[0]:>13.3f} GB  {dense[1]:>9.3f} GB  {cheap:>6.2f} MB  {KNOWN.get(d, '')}")

    print(f"\n{'dimensions':>10}  {'form':<9}  {'statistic':>10}  {'cholesky':>10}  {'eigh':>10}   processor seconds")
    for d in options.dims:
        for diagonal in (False, True):
            times = measure_factor(d, options.rows, options.repeats, diagonal=diagonal)
            cells = "  ".join(f"{seconds:>10.4f}" for seconds in times)
            print(f"{d:>10,}  {'diagonal' if diagonal else 'dense':<9}  {cells}")

    print(
        f"\nA head of {options.words:,} words on {options.hidden} features, G diagonal: a due step costs {ratio:.2f} "
        f"plain ones, and memory grew by {grown:.0f} MB; a dense G with its inverse would hold "
        f"{held_bytes(INVERSES['cholesky'], options.words, diagonal=False) / 1e9:.1f} GB."
    )


if __name__ == "__main__":
    main()
