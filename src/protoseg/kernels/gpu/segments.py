# mypy: allow-untyped-defs, allow-incomplete-defs
"""Sums over the pixels of each class or prototype: the rounds of Eq. (4) in the log domain, and the sums of Eq. (8).

Pixels are sorted by where they belong. Each segment is cut into equal parts, a program sums one part in its order, and
the parts are summed in theirs: no atomic addition, no value read back, the same bits every time, and a class that holds
most of the pixels keeps more than one core at work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoseg.kernels.gpu import launching_on

LOWEST = tl.constexpr(-1e30)  # a finite stand-in for -inf, whose differences are no nan
ROWS = 32  # pixels of a tile
PARTS, GRID = 64, 65_536  # of a segment at most; of all segments about
PART = 512  # pixels of a part at least, were all pixels in one segment

Reduction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Segments:
    """Pixels by segment.

    Attributes:
        order: (N,) pixels, those of each segment together and in their own order; those of none come last.
        starts: (count + 1,) where each segment begins in it, and where the last one ends.
    """

    order: Tensor
    starts: Tensor

    @property
    def counts(self) -> Tensor:
        """(count,) pixels of each segment."""
        return self.starts.diff()


def grouped(index: Tensor, count: int) -> Segments:
    """Segments of the (N,) index in [0, count), negative for none."""
    order = torch.sort(torch.where(index < 0, count, index), stable=True)
    return Segments(order.indices, torch.searchsorted(order.values, torch.arange(count + 1, device=index.device)))


@triton.jit
def _part(starts, segment, part, PARTS: tl.constexpr):
    """Where a part of a segment begins and ends."""
    first = tl.load(starts + segment)
    end = tl.load(starts + segment + 1)
    length = (end - first + PARTS - 1) // PARTS
    return tl.minimum(first + part * length, end), tl.minimum(first + (part + 1) * length, end)


@triton.jit
def _round(
    own, stride_n, stride_k, order, starts, log_factors, peaks, sums, SCALE: tl.constexpr,
    K: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, FIRST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (c, i): for part i of class c the largest log mass of each prototype, and the sum relative to it."""
    start, end = _part(starts, tl.program_id(0), tl.program_id(1), PARTS)
    k = tl.arange(0, WIDE)
    column = k.to(tl.int64) * stride_k
    top = tl.full((WIDE,), LOWEST, ACC)
    total = tl.zeros((WIDE,), ACC)
    if not FIRST:
        factor = tl.load(log_factors + tl.program_id(0) * K + k, mask=k < K, other=-float("inf"))
    for i in range(start, end, R):
        at = i + tl.arange(0, R)
        pixel = tl.load(order + at, mask=at < end, other=0)
        inside = (at < end)[:, None] & (k < K)[None]
        log_mass = tl.load(own + pixel[:, None] * stride_n + column[None], mask=inside, other=0.0) * SCALE
        if not FIRST:  # every pixel spends one unit under the factors of the round before
            plan = log_mass + factor[None]
            peak = tl.max(plan, 1)
            log_mass -= (peak + tl.log(tl.sum(tl.exp(plan - peak[:, None]), 1)))[:, None]
        log_mass = tl.where(inside, log_mass, -float("inf"))
        higher = tl.maximum(top, tl.max(log_mass, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(log_mass - higher[None]), 0)
        top = higher
    at = (tl.program_id(0) * PARTS + tl.program_id(1)) * K + k
    tl.store(peaks + at, top, mask=k < K)
    tl.store(sums + at, total, mask=k < K)


@triton.jit
def _row_sums(
    rows, stride_n, stride_d, order, starts, out,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (p, i, j): the sum of part i of segment p, channels [j*BD, j*BD + BD)."""
    start, end = _part(starts, tl.program_id(0), tl.program_id(1), PARTS)
    d = tl.program_id(2) * BD + tl.arange(0, BD)
    column = d.to(tl.int64) * stride_d
    acc = tl.zeros((R, BD), ACC)
    for i in range(start, end, R):
        at = i + tl.arange(0, R)
        pixel = tl.load(order + at, mask=at < end, other=0)
        inside = (at < end)[:, None] & (d < D)[None]
        acc += tl.load(rows + pixel[:, None] * stride_n + column[None], mask=inside, other=0.0).to(ACC)
    at = (tl.program_id(0) * PARTS + tl.program_id(1)).to(tl.int64) * D + d
    tl.store(out + at, tl.sum(acc, 0), mask=d < D)


def _parts(segments: int, pixels: int) -> int:
    return max(1, min(PARTS, GRID // max(segments, 1), triton.cdiv(pixels, PART)))


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def log_masses(own: Tensor, segments: Segments, log_factors: Tensor | None, kappa: float) -> tuple[Tensor, Tensor]:
    """What each prototype of each class is given by its pixels, each of which spends one unit.

    Args:
        own: (N, K) cosine of each pixel with the prototypes of its own class, of any strides.
        segments: of the C classes.
        log_factors: (C, K) log of the prototypes' factors by which a pixel shares out its unit; None in the first
            round: there a pixel gives every prototype exp(cosine / kappa).

    Returns:
        (C, K) the log of the largest single gift, -inf where there is none, and (C, K) the sum relative to it.
    """
    K, C = own.shape[1], len(segments.starts) - 1
    parts = _parts(C, len(own))
    peaks, sums = own.new_empty(C, parts, K), own.new_empty(C, parts, K)
    factors = own if log_factors is None else log_factors.to(own.dtype).contiguous()
    with launching_on(own):
        _round[C, parts](
            own, own.stride(0), own.stride(1), segments.order, segments.starts, factors, peaks, sums, 1 / kappa,
            K, triton.next_power_of_2(K), ROWS, parts, log_factors is None, _accumulator(own.dtype),
            enable_fp_fusion=True,
        )  # fmt: skip
    peak = peaks.amax(1)
    total = (sums * (peaks - peak[:, None]).exp()).sum(1)
    return torch.where(total > 0, peak, -torch.inf), total


def masses(own: Tensor, segments: Segments, factors: Tensor | None, kappa: float) -> Tensor:
    """(C, K) `log_masses` as plain numbers, for a kappa at which they fit the type."""
    peak, total = log_masses(own, segments, None if factors is None else factors.log(), kappa)
    return torch.where(total > 0, peak, 0).exp() * total


def log_plan(
    own: Tensor,
    classes: Tensor,
    num_classes: int,
    log_shares: Tensor,
    kappa: float,
    iterations: int,
    total: Reduction,
    largest: Reduction,
) -> Tensor:
    """Eq. (4): what `method.clustering.sinkhorn` defines, with its collectives.

    Args:
        own: (N, K); classes: (N,), negative for none. log_shares: (C+1, K), the last row for no class.

    Returns:
        (N, K) log of the plan.
    """
    index = torch.where(classes < 0, num_classes, classes)
    segments = grouped(index, num_classes + 1)
    log_factors: Tensor | None = None
    for _ in range(iterations):
        peak, sums = log_masses(own, segments, log_factors, kappa)
        highest = largest(peak)
        highest = torch.where(highest.isfinite(), highest, 0)
        sums = total(sums * (peak - highest).exp())
        log_factors = torch.where(sums > 0, log_shares - highest - sums.clamp(min=1e-38).log(), 0)
    plan = own / kappa
    if log_factors is not None:
        plan = plan + log_factors[index]
    return plan.log_softmax(1)


def segment_sums(rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(count, D) sum, in fp32 at least, and (count,) number of the (N, D) rows of each index in [0, count)."""
    D = rows.shape[1]
    segments = grouped(index, count)
    parts = _parts(count, len(rows))
    wide = min(128, max(16, triton.next_power_of_2(D)))
    accumulator = torch.promote_types(rows.dtype, torch.float32)
    out = rows.new_empty(count, parts, D, dtype=accumulator)
    if count:
        with launching_on(rows):
            _row_sums[count, parts, triton.cdiv(D, wide)](
                rows, rows.stride(0), rows.stride(1), segments.order, segments.starts, out,
                D, wide, ROWS, parts, _accumulator(rows.dtype), enable_fp_fusion=True,
            )  # fmt: skip
    sums = out[:, 0] if parts == 1 else out.sum(1)
    return sums, segments.counts.to(rows.dtype)
