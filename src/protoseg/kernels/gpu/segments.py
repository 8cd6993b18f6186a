# mypy: allow-untyped-defs, allow-incomplete-defs
"""Sums over the pixels of each class or prototype: the rounds of Eq. (4) in the log domain, and the sums of Eq. (8).

Pixels are sorted by where they belong, their segment. A program takes a tile of them in that order and sums each
segment's run in its tile; who wants a segment's sum adds up its runs. A tile's runs and a segment's tiles both follow
each other, so the run of segment s in tile t has the place s + t: at most tiles + segments of them, without counting
any. No atomic addition, no value read back, the same bits every time, and a class that holds most of the pixels keeps
all cores at work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoseg.kernels.gpu import launching_on

LOWEST = tl.constexpr(-1e30)  # a finite stand-in for -inf, whose differences are no nan
ROWS = 64  # pixels of a tile
RUNS = tl.constexpr(16)  # of a segment, added up at a time
TILE = 4096  # numbers that a program holds of rows, about
FIRST, RUN, TABLE = 0, 1, 2  # where a round's factors come from: nowhere, the runs of the round before, a table

Reduction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Segments:
    """Pixels by segment.

    Attributes:
        order: (N,) pixels, those of each segment together and in their own order; those of none come last.
        keys: (N,) segment of each of them, `count` for none.
        starts: (count + 1,) where each segment begins in it, and where the last one ends.
    """

    order: Tensor
    keys: Tensor
    starts: Tensor

    @property
    def counts(self) -> Tensor:
        """(count,) pixels of each segment."""
        return self.starts.diff()

    @property
    def count(self) -> int:
        return len(self.starts) - 1


def grouped(index: Tensor, count: int) -> Segments:
    """Segments of the (N,) index in [0, count), -1 for none."""
    narrow = torch.int16 if count < torch.iinfo(torch.int16).max else torch.int32  # a sort looks at 8 bits at a time
    keys = torch.remainder(index, count + 1, out=torch.empty_like(index, dtype=narrow))
    keys, order = torch.sort(keys, stable=True)
    return Segments(order, keys, torch.searchsorted(keys, _edges(count + 1, narrow, index.device)))


@lru_cache(maxsize=16)
def _edges(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0, 1, ... count - 1; made once, for a step costs no launch."""
    return torch.arange(count, dtype=dtype, device=device)


@triton.jit
def _tile(starts, count, R: tl.constexpr):
    """Where this program's tile begins and ends in the order of pixels, and the places between."""
    start = (tl.program_id(0) * R).to(tl.int64)
    end = tl.minimum(start + R, tl.load(starts + count))
    return start, end, start + tl.arange(0, R)


@triton.jit
def _runs(starts, segment, R: tl.constexpr):
    """Places [first, end) of the runs of a segment."""
    start, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    return start // R + segment, tl.where(end > start, (end - 1) // R + segment + 1, start // R + segment)


@triton.jit
def _gathered(peaks, sums, starts, segment, k, K: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr):
    """(WIDE,) largest log mass over a segment's runs, and the sum relative to it."""
    first, end = _runs(starts, segment, R)
    top = tl.full((WIDE,), LOWEST, ACC)
    total = tl.zeros((WIDE,), ACC)
    for i in range(first, end, RUNS):
        run = i + tl.arange(0, RUNS)
        inside = (run < end)[:, None] & (k < K)[None]
        peak = tl.load(peaks + run[:, None] * K + k[None], mask=inside, other=-float("inf"))
        part = tl.load(sums + run[:, None] * K + k[None], mask=inside, other=0.0)
        higher = tl.maximum(top, tl.max(peak, 0))
        total = total * tl.exp(top - higher) + tl.sum(part * tl.exp(peak - higher[None]), 0)
        top = higher
    return top, total


@triton.jit
def _factors(
    start, end, at, keys, starts, peaks, sums, factors, k,
    K: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, FROM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(R, WIDE) log of the factors of each pixel's class, of a tile."""
    found = tl.zeros((R, WIDE), ACC)
    run = start
    while run < end:
        segment = tl.load(keys + run).to(tl.int64)
        stop = tl.load(starts + segment + 1)
        if FROM == 1:
            top, total = _gathered(peaks, sums, starts, segment, k, K, WIDE, R, ACC)
            factor = tl.where(total > 0, -top - tl.log(tl.where(total > 0, total, 1.0)), 0.0)
        else:
            factor = tl.load(factors + segment * K + k, mask=k < K, other=0.0)
        mine = (at >= run) & (at < stop)
        found = tl.where(mine[:, None], factor[None], found)
        run = stop
    return found


@triton.jit
def _round(
    own, stride_n, stride_k, order, keys, starts, count, old_peaks, old_sums, factors, peaks, sums,
    SCALE: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, FROM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program t: for each run of tile t the largest log mass of each prototype, and the sum relative to it."""
    start, end, at = _tile(starts, count, R)
    if start < end:
        k = tl.arange(0, WIDE)
        pixel = tl.load(order + at, mask=at < end, other=0)
        inside = (at < end)[:, None] & (k < K)[None]
        log_mass = tl.load(own + pixel[:, None] * stride_n + k[None].to(tl.int64) * stride_k, mask=inside, other=0.0)
        log_mass = log_mass.to(ACC) * SCALE
        if FROM != 0:  # every pixel spends one unit under the factors of the round before
            plan = log_mass + _factors(
                start, end, at, keys, starts, old_peaks, old_sums, factors, k, K, WIDE, R, FROM, ACC
            )
            plan = tl.where((k < K)[None], plan, -float("inf"))
            peak = tl.max(plan, 1)
            log_mass -= (peak + tl.log(tl.sum(tl.exp(plan - peak[:, None]), 1)))[:, None]
        run = start
        while run < end:
            segment = tl.load(keys + run).to(tl.int64)
            stop = tl.load(starts + segment + 1)
            mine = ((at >= run) & (at < stop))[:, None] & inside
            given = tl.where(mine, log_mass, -float("inf"))
            top = tl.maximum(tl.max(given, 0), tl.full((WIDE,), LOWEST, ACC))
            place = (tl.program_id(0) + segment) * K + k
            tl.store(peaks + place, top, mask=k < K)
            tl.store(sums + place, tl.sum(tl.exp(given - top[None]), 0), mask=k < K)
            run = stop


@triton.jit
def _choose(
    own, stride_n, stride_k, order, keys, starts, count, peaks, sums, factors, counts, chosen, n, few,
    SCALE: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
    FROM: tl.constexpr, LONE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program t: the prototype of largest mass of each pixel of tile t, 0 of those without a class."""
    start = (tl.program_id(0) * R).to(tl.int64)
    _, end, at = _tile(starts, count, R)
    k = tl.arange(0, WIDE)
    pixel = tl.load(order + at, mask=at < n, other=0)
    inside = (at < end)[:, None] & (k < K)[None]
    cosine = tl.load(own + pixel[:, None] * stride_n + k[None].to(tl.int64) * stride_k, mask=inside, other=0.0)
    plan = cosine.to(ACC) * SCALE + _factors(
        start, end, at, keys, starts, peaks, sums, factors, k, K, WIDE, R, FROM, ACC
    )
    of_class = tl.zeros((R,), tl.float32)  # pixels
    run = start
    while run < end:
        segment = tl.load(keys + run).to(tl.int64)
        stop = tl.load(starts + segment + 1)
        if FROM == 1:
            pixels = (stop - tl.load(starts + segment)).to(tl.float32)
        else:
            pixels = tl.load(counts + segment).to(tl.float32)
        of_class = tl.where((at >= run) & (at < stop), pixels, of_class)
        run = stop
    plan = tl.where((of_class < few)[:, None], cosine.to(ACC), plan)
    best = tl.argmax(tl.where((k < K)[None], plan, -float("inf")), 1)
    if LONE:
        best = tl.where(of_class == 1, 0, best)
    tl.store(chosen + pixel, tl.where(at < end, best, 0).to(tl.int64), mask=at < n)


@triton.jit
def _class_masses(
    peaks, sums, starts, out_peaks, out_sums, K: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr
):
    """Program c: `_gathered` of class c, as a table."""
    k = tl.arange(0, WIDE)
    segment = tl.program_id(0).to(tl.int64)
    top, total = _gathered(peaks, sums, starts, segment, k, K, WIDE, R, ACC)
    tl.store(out_peaks + segment * K + k, top, mask=k < K)
    tl.store(out_sums + segment * K + k, total, mask=k < K)


@triton.jit
def _row_sums(
    rows, stride_n, stride_d, weights, order, keys, starts, count, out,
    D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (t, j): the sum of each run of tile t, channels [j*BD, j*BD + BD)."""
    start, end, at = _tile(starts, count, R)
    if start < end:
        d = tl.program_id(1) * BD + tl.arange(0, BD)
        pixel = tl.load(order + at, mask=at < end, other=0)
        inside = (at < end)[:, None] & (d < D)[None]
        values = tl.load(rows + pixel[:, None] * stride_n + d[None].to(tl.int64) * stride_d, mask=inside, other=0.0)
        values = values.to(ACC)
        if WEIGHTED:
            values *= tl.load(weights + pixel)[:, None]
        run = start
        while run < end:
            segment = tl.load(keys + run).to(tl.int64)
            stop = tl.load(starts + segment + 1)
            mine = ((at >= run) & (at < stop))[:, None]
            place = (tl.program_id(0) + segment) * D + d
            tl.store(out + place, tl.sum(tl.where(mine, values, 0.0), 0), mask=d < D)
            run = stop


@triton.jit
def _added(runs, starts, segment, d, D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr):
    """(BD,) sum of a segment's runs, channels `d`."""
    first, end = _runs(starts, segment, R)
    acc = tl.zeros((RUNS, BD), ACC)
    for i in range(first, end, RUNS):
        run = i + tl.arange(0, RUNS)
        acc += tl.load(runs + run[:, None] * D + d[None], mask=(run < end)[:, None] & (d < D)[None], other=0.0)
    return tl.sum(acc, 0)


@triton.jit
def _segment_sums(runs, starts, out, counts, D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr):
    """Program (s, j): sum and number of segment s, channels [j*BD, j*BD + BD)."""
    segment = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    tl.store(out + segment * D + d, _added(runs, starts, segment, d, D, BD, R, ACC), mask=d < D)
    number = tl.load(starts + segment + 1) - tl.load(starts + segment)
    tl.store(counts + segment, number.to(counts.dtype.element_ty), mask=tl.program_id(1) == 0)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


class Rounds:
    """The rounds of Eq. (4), each from the factors that the one before has found.

    Args:
        own: (N, K) cosine of each pixel with the prototypes of its own class, of any strides.
        segments: of the C classes.
    """

    def __init__(self, own: Tensor, segments: Segments, kappa: float):
        self.own, self.segments, self.kappa = own, segments, kappa
        self.runs: tuple[Tensor, Tensor] | None = None
        self.factors: Tensor | None = None
        self.tiles = triton.cdiv(len(own), ROWS)

    @property
    def _from(self) -> int:
        return TABLE if self.factors is not None else FIRST if self.runs is None else RUN

    def again(self) -> None:
        """What each pixel gives each prototype, by runs: one unit a pixel, under the factors so far."""
        N, K = self.own.shape
        made = [self.own.new_empty(self.tiles + self.segments.count, K) for _ in range(2)]
        old = self.runs or made
        if N:
            with launching_on(self.own):
                _round[self.tiles,](
                    self.own, *self.own.stride(), self.segments.order, self.segments.keys, self.segments.starts,
                    self.segments.count, *old, self._or(self.factors), *made, 1 / self.kappa,
                    K, _wide(K), ROWS, self._from, accumulator(self.own.dtype), enable_fp_fusion=True,
                )  # fmt: skip
        self.runs = (made[0], made[1])

    def masses(self) -> tuple[Tensor, Tensor]:
        """Of the last round: (C, K) the log of the largest single gift, -inf where there is none, and the sum relative
        to it."""
        K, C = self.own.shape[1], self.segments.count
        peak, total = self.own.new_empty(C, K), self.own.new_empty(C, K)
        assert self.runs is not None
        if C:
            with launching_on(self.own):
                _class_masses[C,](
                    *self.runs, self.segments.starts, peak, total, K, _wide(K), ROWS, accumulator(self.own.dtype),
                    enable_fp_fusion=True,
                )  # fmt: skip
        return torch.where(total > 0, peak, -torch.inf), total

    def choose(self, few: int, lone: bool, counts: Tensor | None = None) -> Tensor:
        """(N,) prototype of largest mass, 0 where void.

        Args:
            counts: (C,) pixels of each class where other ranks have some too. few, lone: see
                `kernels.clustering.balanced_index`.
        """
        N, K = self.own.shape
        chosen = self.segments.order.new_empty(N)
        if N:
            runs = self.runs or (self.own, self.own)
            with launching_on(self.own):
                _choose[self.tiles,](
                    self.own, *self.own.stride(), self.segments.order, self.segments.keys, self.segments.starts,
                    self.segments.count, *runs, self._or(self.factors), self._or(counts), chosen, N, few,
                    1 / self.kappa, K, _wide(K), ROWS, self._from, lone, accumulator(self.own.dtype),
                    enable_fp_fusion=True,
                )  # fmt: skip
        return chosen

    def _or(self, values: Tensor | None) -> Tensor:
        return self.own if values is None else values.contiguous()  # a kernel wants some pointer


def balanced_index(
    own: Tensor,
    classes: Tensor,
    num_classes: int,
    kappa: float,
    iterations: int,
    few: int,
    lone: bool,
    total: Reduction | None,
) -> Tensor:
    """`kernels.clustering.balanced_index`; `total` is None where there is nothing to sum with."""
    segments = grouped(classes, num_classes)
    rounds = Rounds(own, segments, kappa)
    counts = None
    for _ in range(iterations):
        rounds.again()
        if total is None:
            continue
        peak, sums = rounds.masses()
        table = torch.cat([torch.where(sums > 0, peak, 0).exp() * sums, segments.counts[:, None].to(own.dtype)], 1)
        table = total(table)  # C K+1
        rounds.factors = -table[:, :-1].clamp(min=torch.finfo(own.dtype).tiny).log()
        counts = table[:, -1]
    return rounds.choose(few, lone, counts)


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
    rounds = Rounds(own, grouped(index, num_classes + 1), kappa)
    for _ in range(iterations):
        rounds.again()
        peak, sums = rounds.masses()
        highest = largest(peak)
        highest = torch.where(highest.isfinite(), highest, 0)
        sums = total(sums * (peak - highest).exp())
        rounds.factors = torch.where(sums > 0, log_shares - highest - sums.clamp(min=1e-38).log(), 0)
    plan = own / kappa
    if rounds.factors is not None:
        plan = plan + rounds.factors[index]
    return plan.log_softmax(1)


def row_sums(rows: Tensor, segments: Segments, weights: Tensor | None = None) -> Tensor:
    """(places, D) sums of the runs of (N, D) rows of any strides, in fp32 at least; an unused place holds anything.

    Args:
        weights: (N,) what each row is multiplied by, or None.
    """
    N, D = rows.shape
    wide = min(triton.next_power_of_2(max(D, 16)), TILE // ROWS)
    tiles = triton.cdiv(N, ROWS)
    runs = rows.new_empty(tiles + segments.count, D, dtype=torch.promote_types(rows.dtype, torch.float32))
    if N:
        with launching_on(rows):
            _row_sums[tiles, triton.cdiv(D, wide)](
                rows, *rows.stride(), rows if weights is None else weights.contiguous(), segments.order, segments.keys,
                segments.starts, segments.count, runs, D, wide, ROWS, weights is not None, accumulator(rows.dtype),
                enable_fp_fusion=True,
            )  # fmt: skip
    return runs


def segment_sums(rows: Tensor, index: Tensor, count: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`kernels.clustering.segment_sums`, its sums in fp32 at least."""
    D = rows.shape[1]
    segments = grouped(index, count)
    runs = row_sums(rows, segments, weights)
    wide = min(triton.next_power_of_2(max(D, 16)), TILE // RUNS.value)
    sums, counts = runs.new_empty(count, D), rows.new_empty(count)
    if count:
        with launching_on(rows):
            _segment_sums[count, triton.cdiv(D, wide)](
                runs, segments.starts, sums, counts, D, wide, ROWS, accumulator(rows.dtype), enable_fp_fusion=True
            )  # fmt: skip
    return sums, counts


def _wide(K: int) -> int:
    return triton.next_power_of_2(K)
