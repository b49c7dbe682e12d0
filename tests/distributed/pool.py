"""A pool of ranks: real processes in one process group, started once, that run one case after the other.

The processes are forked from a server that has imported what they need, so that only the first one pays for that.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

#: Seconds that a case may take on any rank.
CASE_SECONDS = 120.0
#: Seconds that ranks get to end by themselves, in which their coverage is written.
CLOSING_SECONDS = 30.0


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def context() -> Any:
    """Where the ranks are forked from."""
    server = mp.get_context("forkserver")
    server.set_forkserver_preload(["lightning.pytorch", "torch.distributed.tensor.parallel", "lightning_kfc"])
    return server


def prepare_rank(rank: int, size: int, port: int) -> None:
    """Set the environment of a launcher, so that Trainers start no processes."""
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), NODE_RANK="0"
    )
    # Warnings of the package are errors, as in all tests.
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("error", message="KFC")


def _serve(rank: int, size: int, port: int, calls: Any) -> None:
    import torch.distributed as dist

    prepare_rank(rank, size, port)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=CASE_SECONDS),
    )
    while True:
        try:
            function, arguments = pickle.loads(calls.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        calls.send_bytes(pickle.dumps(answer))


class Ranks:
    """So many ranks that wait for cases.

    Args:
        size: The number of processes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """A function's results on each rank.

        Raises:
            AssertionError: With the traceback of the first rank that failed, or did not end in time. The others may
                then wait for it, so that the pool starts anew.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        results: dict[int, Any] = {}
        end = time.monotonic() + CASE_SECONDS
        while len(results) < self.size and time.monotonic() < end:
            for rank, pipe in enumerate(self._pipes):
                if rank in results or not pipe.poll(0.005):
                    continue
                done, results[rank] = pickle.loads(pipe.recv_bytes())
                if not done:
                    self.close()
                    raise AssertionError(f"rank {rank} of {self.size}:\n{results[rank]}")
        if len(results) < self.size:
            self.close()
            raise AssertionError(f"ranks {sorted(set(range(self.size)) - set(results))} did not end in time")
        return [results[rank] for rank in range(self.size)]

    def _start(self) -> None:
        port, server = free_port(), context()
        for rank in range(self.size):
            ours, theirs = server.Pipe()
            process = server.Process(target=_serve, args=(rank, self.size, port, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        """End the processes; those that wait for another rank are killed."""
        for pipe in self._pipes:
            pipe.close()
        end = time.monotonic() + CLOSING_SECONDS
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
            with suppress(OSError):
                process.kill()
            process.join()
        self._processes, self._pipes = [], []
