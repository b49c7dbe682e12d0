"""The time of a step relative to another commit: ``python -m benchmarks.cost.against_commit COMMIT``.

The package of the commit is unpacked into a temporary folder. Processes of both versions take turns; each trains a
network by SGD and by KFC with fixed damping and bound, in turns of one step, and reports the CPU time of KFC's steps
relative to SGD's. The result is the ratio of neighbouring processes: its median, and its quartiles as the noise.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import torch

from benchmarks.contest.tasks import TASKS
from benchmarks.paths import ROOT

#: The networks, each with its batch size.
NETWORKS = {"resnet": 128, "autoencoder": 512, "vit": 128}
#: Steps that are not counted: those of the warm-up.
FIRST = 10


def measure(network: str, steps: int) -> float:
    """The CPU time of KFC's counted steps in that of SGD's, with the package that is imported."""
    from lightning_kfc import KFC

    torch.set_num_threads(1)
    task = TASKS[network].at(NETWORKS[network])
    torch.manual_seed(0)
    plain, model = task.make_model(), task.make_model()
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5) for net in (plain, model)]
    kfc = KFC(model, damping=0.1, kl_clip=0.01, factor_every_n_steps=10, inverse_every_n_steps=20)
    taken = [0.0, 0.0]
    for number, (inputs, targets) in zip(range(FIRST + steps), task.batches(0), strict=False):
        for which, (net, optimizer) in enumerate(zip((plain, model), optimizers, strict=True)):
            started = time.process_time()
            optimizer.zero_grad()
            if net is plain:
                task.loss(net(inputs), targets).backward()
            else:
                with kfc.capture():
                    loss = task.loss(net(inputs), targets)
                kfc.update(loss)
                loss.backward()
                kfc.precondition(optimizer=optimizer)
            optimizer.step()
            taken[which] += time.process_time() - started if number >= FIRST else 0.0
    return taken[1] / taken[0]


def run(folder: Path, network: str, steps: int) -> float:
    """:func:`measure` in a process of its own, with the package of a folder."""
    command = [sys.executable, "-P", "-m", "benchmarks.cost.against_commit", "--only", network, "--steps", str(steps)]
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    return float(done.stdout)


def unpack(commit: str, folder: Path) -> None:
    """Write the package of a commit into a folder."""
    archive = subprocess.run(["git", "archive", commit, "lightning_kfc"], check=True, capture_output=True, cwd=ROOT)
    subprocess.run(["tar", "-x", "-C", str(folder)], check=True, input=archive.stdout)


def main() -> None:
    """Compare the networks' steps with a commit's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", nargs="?")
    parser.add_argument("--only", choices=NETWORKS, help="print one measurement of the imported package")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if arguments.only:
        print(measure(arguments.only, arguments.steps))
        return
    if arguments.commit is None:
        parser.error("name the commit to compare with.")
    with tempfile.TemporaryDirectory() as folder:
        unpack(arguments.commit, Path(folder))
        for network in NETWORKS:
            ratios = []
            for number in range(arguments.rounds):
                order = (ROOT, Path(folder)) if number % 2 else (Path(folder), ROOT)
                found = {where: run(where, network, arguments.steps) for where in order}
                ratios.append(found[ROOT] / found[Path(folder)])
            low, _, high = quantiles(ratios, n=4)
            print(f"{network}: {median(ratios):.3f} of {arguments.commit}'s ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
