"""Devices, for benchmarks on a CPU and on accelerators."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.contest.report import measured_with


def clock(device: torch.device) -> float:
    """Wall-clock seconds, after the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def device_of(trainer: pl.Trainer) -> torch.device:
    """A trainer's device."""
    return trainer.strategy.root_device


def measured_on(device: torch.device) -> dict[str, Any]:
    """Versions, number of threads and the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {**measured_with(), "threads": torch.get_num_threads(), "device": name}


def quiet_trainer(accelerator: str, **options: Any) -> pl.Trainer:
    """A trainer on one device that prints, logs and saves nothing.

    Args:
        accelerator: Lightning's name of the accelerator; ``"auto"`` uses the CPU if there is none.
        options: Options of the trainer.
    """
    return pl.Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
