"""Eq. (2) at label resolution: cross-entropy through the bilinear resize and back, a strip of label rows at a time.

The resize is separable: widen every feature row once, then a label row is a mix of two widened rows. A strip of label
rows is one small matrix product with its two-banded matrix, and the adjoint is the product with the transpose. Class
scores lie classes first, pixels last, so a strip of any images is (C, pixels)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from protoseg.kernels import similarity_cpu
from protoseg.kernels.shards import Shard

TAPS = 16  # inputs a block of outputs takes from, about: two are needed, a product wants a few more
STRIP = 300_000  # logits that are worth the calls of a strip


@dataclass(frozen=True)
class Lines:
    """Outputs as mixes of inputs along one axis: half of a bilinear resize.

    Attributes:
        first, last: for each output the first and last input it takes from; never falling.
        matrix: (outputs, inputs) weights.
        block: how many outputs are made in one product, so that it is about `TAPS` wide.
        mix: (outputs,) first input and (outputs, 2) shares of it and of the next one, where there is one.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    matrix: Tensor
    block: int
    mix: tuple[Tensor, Tensor]

    def ready(self, inputs: int) -> int:
        """How many outputs need nothing but the first `inputs` inputs."""
        return bisect_left(self.last, inputs)

    def blocks(self, start: int, end: int, step: int) -> Iterator[tuple[slice, slice]]:
        """(outputs, inputs they take from) of outputs [start, end), `step` at a time."""
        for y in range(start, end, step):
            stop = min(y + step, end)
            yield slice(y, stop), slice(self.first[y], self.last[stop - 1] + 1)


@lru_cache(maxsize=64)
def _taps(size: int, out: int, align_corners: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first = []
    for y in range(out):
        if align_corners:
            source = y * (size - 1) / max(out - 1, 1)
        else:
            source = max((y + 0.5) * size / out - 0.5, 0.0)
        first.append(min(math.floor(source), size - 1))
    return tuple(first), tuple(min(low + 1, size - 1) for low in first)


def lines(size: int, out: int, align_corners: bool, dtype: torch.dtype, device: torch.device) -> Lines:
    """The resize of `size` rows to `out` as `F.interpolate` does it. Made on the device: sending it would wait."""
    first, last = _taps(size, out, align_corners)
    low, share = mixes(size, out, align_corners, dtype, device)
    mix = low, torch.cat([1 - share, share], 1)
    return Lines(first, last, matrix(low, share, size), max(1, TAPS * out // size), mix)


def mixes(size: int, out: int, align_corners: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each output of that resize, (out,) int64 the first input it takes from and (out, 1) the share of the next."""
    y = torch.arange(out, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    source = y * (size - 1) / max(out - 1, 1) if align_corners else ((y + 0.5) * size / out - 0.5).clamp(min=0)
    low = source.floor().clamp(max=size - 1)
    return low.long(), (source - low)[:, None].to(dtype)


def matrix(low: Tensor, share: Tensor, size: int) -> Tensor:
    """(out, size) weights of `mixes`."""
    column = torch.arange(size, device=low.device)
    weights = torch.where(column == low[:, None], 1 - share, 0)
    return weights + torch.where(column == (low[:, None] + 1).clamp(max=size - 1), share, 0)


def widen(rows: Tensor, along: Lines) -> Tensor:
    """(rows, w) -> (rows, W): every row resized by itself."""
    if len(along.first) == rows.shape[1]:
        return rows
    wide = rows.new_empty(rows.shape[0], len(along.first))
    for out, taken in along.blocks(0, len(along.first), along.block):
        torch.mm(rows[:, taken], along.matrix[out, taken].T, out=wide[:, out])
    return wide


def narrow(gradient: Tensor, along: Lines) -> Tensor:
    """The adjoint of `widen`: (rows, W) -> (rows, w)."""
    if along.matrix.shape[1] == gradient.shape[1]:
        return gradient
    narrowed = gradient.new_zeros(gradient.shape[0], along.matrix.shape[1])
    for out, taken in along.blocks(0, len(along.first), along.block):
        narrowed[:, taken].addmm_(gradient[:, out], along.matrix[out, taken])
    return narrowed


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    class_weights: Tensor | None,
    share: Tensor,
    shard: Shard | None = None,
) -> Tensor:
    """Summed, weighted cross-entropy of (C, n) logits, which are overwritten by `share` times its gradient.

    Args:
        labels: (n,) in [0, C) or `ignore_index`.
        share: () factor of the gradient alone.
        shard: which classes `logits` holds; `labels` and `class_weights` are then those of all.

    Returns:
        () sum over the labelled pixels.
    """
    if shard is None and similarity_cpu.takes(logits):
        return similarity_cpu.cross_entropy_(logits, labels, ignore_index, class_weights, share)
    valid = labels != ignore_index
    index = torch.where(valid, labels, 0)  # n
    weight = valid.to(logits.dtype)
    if class_weights is not None:
        weight = weight * class_weights[index]
    peak = logits.amax(0)
    here = valid
    if shard is not None:
        peak = shard.largest(peak)
        index = shard.local(index)
        here, index = valid & (index >= 0), index.clamp(min=0)
    logits.sub_(peak)
    target = logits.gather(0, index[None])[0]
    sorts = logits.is_cuda and torch.are_deterministic_algorithms_enabled()
    own = logits.exp_().gather(0, index[None])[0]
    take_off_(logits, index, torch.where(here, own, 0), sorts=sorts)
    rest = logits.sum(0)  # mass of the classes that are not the label
    if shard is not None:  # one message for all
        mine = torch.where(here, torch.stack([own, target]), 0)
        rest, own, target = shard.total(torch.cat([rest[None], mine])).unbind()
    mass = rest + torch.where(valid, own, 0)
    loss = torch.where(valid, weight * (mass.log() - target), 0).sum()
    factor = weight * share / mass
    logits.mul_(factor)
    # Not P - 1, of which rounding leaves nothing, or anything, where P is near 1.
    take_off_(logits, index, torch.where(here, rest * factor, 0), sorts=sorts)
    return loss


def take_off_(table: Tensor, index: Tensor, values: Tensor, *, sorts: bool) -> None:
    """In place: each of the (n,) values off its column of the (C, n) table, in row `index`.

    Args:
        sorts: whether `scatter_add_` would sort all places first, as it does among deterministic algorithms on a GPU,
            though no two are the same; then a comparison in passing costs less.
    """
    if sorts:
        table.sub_(torch.where(torch.arange(len(table), device=table.device)[:, None] == index, values, 0))
    else:
        table.scatter_add_(0, index[None], -values[None])


def strip_cross_entropy(
    widened: Tensor,
    gradient: Tensor,
    vertical: Lines,
    rows: tuple[int, int],
    top: int,
    labels: Tensor,
    ignore_index: int,
    class_weights: Tensor | None,
    share: Tensor,
    budget: int,
    shard: Shard | None = None,
) -> Tensor:
    """Cross-entropy of some label rows; adds `share` times its gradient to `gradient`.

    Args:
        widened: (C*G, feature rows, W) class scores of G images, feature rows from `top` on.
        gradient: the same shape.
        rows: label rows [first, last), all of whose feature rows are in `widened`.
        labels: (G, H, W).
        budget: how many logits may exist at once.
        shard: as in `cross_entropy_`.

    Returns:
        () sum over the labelled pixels of these rows.
    """
    if shard is None and similarity_cpu.takes(widened, gradient, vertical.mix[1]):
        return similarity_cpu.strip_cross_entropy(
            widened, gradient, vertical.mix, rows, top, labels, ignore_index, class_weights, share
        )
    planes, _, width = widened.shape
    images = labels.shape[0]
    enough = STRIP if widened.device.type == "cpu" else budget
    row = width * (planes if shard is None else shard.widest * images)  # logits, on the widest rank
    step = max(1, min(max(vertical.block // 8, enough // row), budget // row))
    loss = widened.new_zeros(())
    for out, taken in vertical.blocks(*rows, step):
        mix = vertical.matrix[out, taken]
        held = slice(taken.start - top, taken.stop - top)
        logits = torch.matmul(mix, widened[:, held])  # C*G strip W
        flat = logits.view(planes // images, -1)
        loss = loss + cross_entropy_(flat, labels[:, out].reshape(-1), ignore_index, class_weights, share, shard)
        gradient[:, held] += torch.matmul(mix.T, logits)
    return loss
