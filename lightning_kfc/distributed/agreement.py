"""Check before the first step that all ranks have the same settings and layers; a mismatch would deadlock later."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import distributed as dist

from lightning_kfc.distributed import process_group as distributed


class RanksDisagreeError(ValueError):
    """The ranks of one training have different settings or models."""


def check_agreement(facts: Mapping[str, str], device: torch.device) -> None:
    """Compare facts over all ranks. Collective: call on every rank.

    Args:
        facts: Values that must be the same on all ranks, by name; the names must agree.
        device: The device of the messages.

    Raises:
        RanksDisagreeError: On every rank, with the differences.
    """
    if distributed.ProcessGroup().size == 1:
        return
    own = torch.tensor([_digest(value) for value in facts.values()], dtype=torch.int64, device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    differing = [name for i, name in enumerate(facts) if len({int(digests[i]) for digests in everyone}) > 1]
    if not differing:
        return
    # Texts are long, and sent only after a mismatch.
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, {name: facts[name] for name in differing})
    lines = []
    for name in differing:
        other = next(rank for rank in range(len(texts)) if texts[rank][name] != texts[0][name])
        first, second = _difference(texts[0][name], texts[other][name])
        lines.append(f"{name}: {first} on rank 0, {second} on rank {other}")
    raise RanksDisagreeError(
        "The ranks have different KFC settings or models, and would wait for each other forever:\n  "
        + "\n  ".join(lines)
        + "\nGive every rank the same settings and the same model."
    )


def facts_of(settings: Any) -> dict[str, str]:
    """The fields of a dataclass as texts, by name."""
    return {field.name: described(getattr(settings, field.name)) for field in fields(settings)}


def described(value: Any) -> str:
    """A value as a text without addresses of objects, so that ranks can compare it."""
    if is_dataclass(value) and not isinstance(value, type):
        parts = (f"{field.name}={described(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__name__}({', '.join(parts)})"
    if value is None or isinstance(value, (str, int, float, bool, tuple, list)):
        return repr(value)
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    return str(name)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def _difference(first: str, second: str, most: int = 120) -> tuple[str, str]:
    """Both texts; long ones are cut around their first difference."""
    if max(len(first), len(second)) <= most:
        return first, second
    same = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    start = max(0, same - most // 2)
    before = "..." if start else ""
    return before + first[start : start + most], before + second[start : start + most]
