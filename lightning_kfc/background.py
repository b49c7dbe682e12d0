"""Work that is done beside the training: by one thread, and on an accelerator in a stream of its own.

Linear algebra lets go of Python's lock while it runs, so that training goes on meanwhile. On an accelerator the
thread is what waits where a factorisation asks the device for an outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Job(Generic[T]):
    """Work that was begun.

    Args:
        future: What will come of it.
    """

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def result(self) -> T:
        """Wait for what comes of it; what the work raises is raised here."""
        return self._future.result()

    def drop(self) -> None:
        """Nobody will ask for it: it is not begun, if it was not yet."""
        self._future.cancel()


class Background:
    """One thread that does one work after the other; it begins with the first one and ends with :meth:`join`."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, Any] = {}

    def begin(self, work: Callable[[], T], device: torch.device) -> Job[T]:
        """Begin work on tensors that are there, or will be when the device has done what it was given so far.

        Nobody may change them meanwhile. A device without streams (MPS) does one thing at a time whoever asks it.

        Args:
            work: What to do, without gradients; what it reads must be kept until its result is there.
            device: Where it is done.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lightning-kfc")
        module: Any = torch.get_device_module(device)
        if not hasattr(module, "Stream"):
            return Job(self._thread.submit(torch.no_grad()(work)))
        if device not in self._streams:
            self._streams[device] = module.Stream() if device.type == "cpu" else module.Stream(device=device)
        side = self._streams[device]
        side.wait_stream(_current_stream(module, device))

        def beside() -> T:
            with torch.no_grad(), module.stream(side):
                result = work()
            if device.type != "cpu":
                # Once the thread is done, so is the device, and whoever has the result may read it in any stream.
                side.synchronize()
            return result

        return Job(self._thread.submit(beside))

    def join(self) -> None:
        """Wait for all that was begun, and end the thread; results can still be asked for."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=True)


def _current_stream(module: Any, device: torch.device) -> Any:
    return module.current_stream() if device.type == "cpu" else module.current_stream(device)


def used_by_training(tensor: torch.Tensor) -> None:
    """Tell the allocator that the present stream reads a tensor of a side stream, maybe still when Python drops it."""
    if tensor.device.type != "cpu" and hasattr(torch.get_device_module(tensor.device), "Stream"):
        tensor.record_stream(_current_stream(torch.get_device_module(tensor.device), tensor.device))
