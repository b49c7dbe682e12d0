"""Record four small trainings to the last bit, and compare a later version of the package with them.

For changes that must change no number. Run it before and after, on the same machine, with the same number of threads::

    OMP_NUM_THREADS=1 python benchmarks/same_numbers.py record before.pt
    OMP_NUM_THREADS=1 python benchmarks/same_numbers.py compare before.pt

The trainings are in float64 on the CPU, with the callback's ``damping="auto"`` and ``kl_clip="auto"``: a convolutional
net, also with ``inverse="ekfac"``; an autoencoder; a transformer (whose rule becomes "adam"); and the convolutional net
on two ranks, with every inverse on both and with each on one. ``compare`` prints the first difference of each training
and ends with status 1 if there is any.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from lightning_kfc import KFC

STEPS = 25
BATCH = 16
CLASSES = 4
#: The results of a training, by name.
Record = dict[str, Any]


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.classify = nn.Linear(8, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.classify(self.encoder(self.embed(words)).mean(1))


def _conv_net() -> nn.Module:
    first = (nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    second = (nn.Conv2d(6, 8, 3, stride=2, groups=2), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(8 * 9, CLASSES))


def _autoencoder() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 20))


def _images(model: nn.Module, random: torch.Generator) -> Tensor:
    target = torch.randint(CLASSES, (BATCH,), generator=random)
    noise = torch.randn((BATCH, 2, 8, 8), generator=random, dtype=torch.float64)
    return F.cross_entropy(model(noise + 0.5 * target.view(-1, 1, 1, 1)), target)


def _pixels(model: nn.Module, random: torch.Generator) -> Tensor:
    batch = torch.rand((BATCH, 20), generator=random, dtype=torch.float64)
    return F.binary_cross_entropy_with_logits(model(batch), batch)


def _words(model: nn.Module, random: torch.Generator) -> Tensor:
    batch = torch.randint(11, (BATCH, 6), generator=random)
    return F.cross_entropy(model(batch), batch[:, 0] % CLASSES)


def _train(
    make: Callable[[], nn.Module], loss_of: Callable[..., Tensor], lr: float, rank: int, **settings: Any
) -> Record:
    """Losses, final weights, factors, inverses and trust region of one training."""
    torch.manual_seed(0)
    model = make().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    kfc = KFC(model, damping="auto", kl_clip="auto", **settings)
    trained = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    random, losses = torch.Generator().manual_seed(1 + rank), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with kfc.capture():
            loss = loss_of(trained, random)
        kfc.update(loss)
        loss.backward()
        kfc.precondition(optimizer=optimizer)
        optimizer.step()
        kfc.review(optimizer=optimizer)
        losses.append(loss.detach())
    state = kfc.state_dict(factors=False)
    record: dict[str, Any] = {"losses": dict(enumerate(losses)), "weights": model.state_dict()}
    record |= {key: state[key] for key in ("step", "due", "trust_region")}
    for name, layer in kfc.layers.items():
        record[f"factors of {name}"] = layer.factors
        record[f"inverse of {name}"] = layer.inverse.state() if layer.inverse is not None else None
        record[f"moments of {name}"] = layer.moments.state_dict() if layer.moments is not None else None
    return dict(_flat("", record))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts and lists, by their path."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(f"{name}/{key}", inner)
    else:
        yield name, value.cpu().clone() if isinstance(value, Tensor) else value


def _train_as_rank(rank: int, folder: str, settings: dict[str, Any]) -> None:
    """Train as one of two processes with half of the data, and save the record in a folder."""
    _prepare()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(_train(_conv_net, _images, 0.1, rank, **settings), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _train_on_two_ranks(**settings: Any) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_train_as_rank, args=(folder, settings), nprocs=2)
        both = {f"rank {rank}": torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2)}
    return dict(_flat("", both))


TRAININGS: dict[str, Callable[[], Record]] = {
    "conv net": partial(_train, _conv_net, _images, 0.1, 0),
    "conv net, ekfac": partial(_train, _conv_net, _images, 0.1, 0, inverse="ekfac"),
    "autoencoder": partial(_train, _autoencoder, _pixels, 0.3, 0),
    "transformer": partial(_train, _Transformer, _words, 0.1, 0, rule="auto"),
    "two ranks": _train_on_two_ranks,
    "two ranks, mem-opt": partial(_train_on_two_ranks, placement="mem-opt"),
}


def _prepare() -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.filterwarnings("ignore", category=UserWarning)


def difference(before: Record, now: Record) -> str | None:
    """The first entry that differs in any bit, with both values; None without a difference."""
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Tensor) and isinstance(new, Tensor) and old.shape == new.shape:
            if not torch.equal(old, new):
                return f"{name} differs by up to {float((old - new).abs().max()):.3g}"
        elif repr(old) != repr(new):
            return f"{name} was {old!r} and is {new!r}"
    return None


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("path")
    arguments = parser.parse_args()
    _prepare()
    before = torch.load(arguments.path, weights_only=True) if arguments.what == "compare" else {}
    now, failed = {name: run() for name, run in TRAININGS.items()}, False
    if arguments.what == "record":
        torch.save(now, arguments.path)
        return 0
    for name, record in now.items():
        found = difference(before.get(name, {}), record)
        failed |= found is not None
        print(f"{name}: {found or f'the same ({len(record)} entries)'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(_main())
