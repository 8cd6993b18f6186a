"""Sums over ranks; without a process group each function gives back what it got."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def total(values: Tensor) -> Tensor:
    """Sum over ranks. Every rank must call it, also one without a labelled pixel."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def largest(values: Tensor) -> Tensor:
    """Maximum over ranks."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def offset(count: int, device: torch.device) -> Tensor:
    """How many items the ranks below this one hold: turns a local index into a global one. () int64."""
    if world_size() == 1:
        return torch.zeros((), dtype=torch.int64, device=device)
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = count
    return total(counts)[: rank()].sum()
