"""Sums over ranks, and rows from rank to rank; without a process group each function gives back what it got."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_by_itself: ContextVar[bool] = ContextVar("by_itself", default=False)


@contextmanager
def by_itself() -> Iterator[None]:
    """Within it this rank is the whole world: for what it has gathered from all ranks already."""
    token = _by_itself.set(True)
    try:
        yield
    finally:
        _by_itself.reset(token)


def world_size() -> int:
    initialized = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if initialized and not _by_itself.get() else 1


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


def from_first(values: Tensor) -> Tensor:
    """What the first rank holds, on every rank. All must call it, with tensors of one shape."""
    return total(values if rank() == 0 else torch.zeros_like(values))


def offset(count: int, device: torch.device) -> Tensor:
    """How many items the ranks below this one hold: turns a local index into a global one. () int64."""
    if world_size() == 1:
        return torch.zeros((), dtype=torch.int64, device=device)
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = count
    return total(counts)[: rank()].sum()


def together(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """A few whole numbers of every rank, by rank. Reads them back: the host waits for the device."""
    if world_size() == 1:
        return [list(numbers)]
    mine = torch.tensor(numbers, device=device)
    table = mine.new_empty(world_size() * len(numbers))
    dist.all_gather_into_tensor(table, mine)
    return table.view(world_size(), -1).tolist()


def gathered(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all ranks, in the order of ranks; the gradient of a row is summed over ranks.

    Args:
        rows: (counts[rank], ...).
    """
    return rows if world_size() == 1 else _Gathered.apply(rows, list(counts))


def exchanged(columns: Tensor, rows: Sequence[int], counts: Sequence[int]) -> Tensor:
    """From some columns of all rows to all columns of some rows, which a table is split by over ranks.

    Args:
        columns: (sum of rows, counts[rank]).
        rows, counts: how many rows and columns each rank has.

    Returns:
        (rows[rank], sum of counts).
    """
    return columns if world_size() == 1 else _Exchanged.apply(columns, list(rows), list(counts))


def shared(value: Tensor) -> Tensor:
    """A number that was reduced over ranks: what each rank then makes of it adds to the gradient on all of them."""
    return value if world_size() == 1 else _Shared.apply(value)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = _padded(rows, max(counts))
        table = rows.new_empty(len(counts) * len(padded), *rows.shape[1:])
        dist.all_gather_into_tensor(table, padded)
        if min(counts) == max(counts):
            return table
        return torch.cat([part[:n] for part, n in zip(table.split(max(counts)), counts)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        widest, count = max(ctx.counts), ctx.counts[rank()]
        parts = [_padded(part, widest) for part in gradient.split(ctx.counts)]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(mine, torch.cat(parts))
        return mine[:count], None


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: Tensor, rows: list[int], counts: list[int]) -> Tensor:
        ctx.rows, ctx.counts = rows, counts
        own, width = rows[rank()], counts[rank()]
        received = columns.new_empty(own * sum(counts))
        dist.all_to_all_single(received, columns.flatten(), [own * n for n in counts], [n * width for n in rows])
        parts = received.split([own * n for n in counts])
        return torch.cat([part.view(own, n) for part, n in zip(parts, counts)], 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own, width = ctx.rows[rank()], ctx.counts[rank()]
        sent = torch.cat([part.flatten() for part in gradient.split(ctx.counts, 1)])
        columns = gradient.new_empty(sum(ctx.rows) * width)
        dist.all_to_all_single(columns, sent, [n * width for n in ctx.rows], [own * n for n in ctx.counts])
        return columns.view(-1, width), None, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient)


def _padded(rows: Tensor, count: int) -> Tensor:
    """The rows, contiguous, and zeros up to `count`: collectives want the same size on every rank."""
    if len(rows) == count:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
