# mypy: allow-untyped-defs, allow-incomplete-defs
"""Cosines of a band of pixels with all prototypes: what is wanted of them, and the gradient back to the pixels.

A tile is R pixels by T classes at one k: the maximum over K is then an elementwise maximum of K such tiles, whatever K,
and nothing of a class is ever split. Cosines are those of the accumulator, never rounded.

Which prototypes attained a class's maximum is written down as one bit each, since exact ties share the gradient as
`amax` shares it. The backward pass reads the bits and compares nothing, so no cosine need come out the same twice.
With more than 16 prototypes several words are needed; one before the word that first held the final maximum is void."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoseg.kernels.class_errors import Band
from protoseg.kernels.gpu import constant, interpreted, launching_on, rows

BITS = tl.constexpr(16)  # of a word of ties
LOWEST = tl.constexpr(-1e30)  # a finite stand-in for -inf, whose differences are no nan


@triton.jit
def _product(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + a @ b. The interpreter multiplies the bit patterns of bf16; its fp32 holds them exactly."""
    if INTERPRETED:
        return tl.dot(a.to(acc.dtype), b.to(acc.dtype), acc, out_dtype=acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _cosines(
    x, held_x, p, table, stride, row, rows_in, cls, C, k,
    K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
    STORED: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(R, T) cosines of the rows with prototype k of the classes `cls`."""
    place = cls.to(tl.int64) * K + k
    if STORED:
        at = table + place[None] * stride + row[:, None]
        inside = rows_in[:, None] & (cls < C)[None]
        # Once read, the second cache is better left to what is written beside.
        return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")
    else:
        acc = tl.zeros((R, T), ACC)
        d = tl.arange(0, BD)
        if BD >= D:
            part = tl.load(p + place[None] * D + d[:, None], mask=(d < D)[:, None] & (cls < C)[None], other=0.0)
            acc = _product(held_x, part, acc, PRECISION, INTERPRETED)
        else:
            for start in range(0, D, BD):
                at = start + d
                here = tl.load(x + row[:, None] * D + at[None], mask=rows_in[:, None] & (at < D)[None], other=0.0)
                part = tl.load(p + place[None] * D + at[:, None], mask=(at < D)[:, None] & (cls < C)[None], other=0.0)
                acc = _product(here, part, acc, PRECISION, INTERPRETED)
        return acc


@triton.jit
def _kept(x, row, rows_in, D: tl.constexpr, BD: tl.constexpr, STORED: tl.constexpr):
    """The rows themselves where they fit one block, loaded once for all prototypes; else something unused."""
    d = tl.arange(0, BD)
    if STORED or BD < D:
        return d
    else:
        return tl.load(x + row[:, None] * D + d[None], mask=rows_in[:, None] & (d < D)[None], other=0.0)


@triton.jit
def _nearest(
    x, p, table, stride, best, best_stride, ties, ties_stride, own, own_stride, log_sum, classes, target,
    n, C, span, SCALE: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BD: tl.constexpr,
    STORED: tl.constexpr, OWN: tl.constexpr, TIES: tl.constexpr, SUM: tl.constexpr, SIBLINGS: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (i, j): pixels [i*R, i*R + R), classes [j*span, j*span + span)."""
    WORDS: tl.constexpr = (K + BITS - 1) // BITS
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    rows_in = row < n
    held_x = _kept(x, row, rows_in, D, BD, STORED)
    if OWN or SUM:
        own_class = tl.maximum(tl.load(classes + row, mask=rows_in, other=0), 0).to(tl.int32)
    if SUM and not SIBLINGS:
        given = tl.maximum(tl.load(target + row, mask=rows_in, other=0), 0).to(tl.int32)
    if STORED:  # a sum of each place of the tile: nothing in the loop waits for another thread, so loads overlap
        top = tl.full((R, T), LOWEST, ACC)  # of the exponents so far, base 2
        mass = tl.zeros((R, T), ACC)
    else:  # there registers are for the products
        top = tl.full((R,), LOWEST, ACC)
        mass = tl.zeros((R,), ACC)
    first_class = tl.program_id(1) * span
    for c in range(first_class, tl.minimum(first_class + span, C), T):
        cls = c + tl.arange(0, T)
        inside = rows_in[:, None] & (cls < C)[None]
        peak = tl.full((R, T), LOWEST, ACC)
        word_of_peak = tl.zeros((R, T), tl.int32)
        for w in range(WORDS):
            bits = tl.zeros((R, T), tl.int32)
            for b in range(tl.minimum(BITS, K - w * BITS)):
                k = w * BITS + b
                s = _cosines(
                    x, held_x, p, table, stride, row, rows_in, cls, C, k,
                    K, D, R, T, BD, STORED, PRECISION, INTERPRETED, ACC,
                )  # fmt: skip
                if TIES:
                    bit = tl.full((R, T), 1, tl.int32) << b
                    bits = tl.where(s > peak, bit, tl.where(s == peak, bits | bit, bits))
                    if WORDS > 1:
                        word_of_peak = tl.where(s > peak, w, word_of_peak)
                peak = tl.maximum(peak, s)
                if OWN and not STORED:
                    mine = inside & (cls[None] == own_class[:, None])
                    tl.store(own + (tl.zeros((R, T), tl.int64) + k) * own_stride + row[:, None], s, mask=mine)
                if SUM:
                    t = tl.where((cls < C)[None], s * SCALE, -float("inf"))
                    if not SIBLINGS:
                        rival = (cls[None] != own_class[:, None]) | ((cls * K + k)[None] == given[:, None])
                        t = tl.where(rival, t, -float("inf"))
                    if STORED:
                        less = tl.exp2(-tl.abs(t - top))  # of the lower of the two, in units of the higher
                        mass = tl.where(t > top, mass * less + 1.0, mass + less)
                        top = tl.maximum(top, t)
                    else:
                        higher = tl.maximum(top, tl.max(t, 1))
                        mass = mass * tl.exp2(top - higher) + tl.sum(tl.exp2(t - higher[:, None]), 1)
                        top = higher
            if TIES:
                at = ties + (w * C + cls).to(tl.int64)[None] * ties_stride + row[:, None]
                tl.store(at, bits.to(tl.int16), mask=inside)
        tl.store(best + cls.to(tl.int64)[None] * best_stride + row[:, None], peak, mask=inside)
        if TIES and WORDS > 1:
            at = ties + (C * WORDS + cls).to(tl.int64)[None] * ties_stride + row[:, None]
            tl.store(at, word_of_peak.to(tl.int16), mask=inside)
    if OWN and STORED:
        mine = rows_in & (own_class >= first_class) & (own_class < first_class + span)
        for k in range(K):
            s = tl.load(table + (own_class.to(tl.int64) * K + k) * stride + row, mask=mine, other=0.0)
            tl.store(own + (tl.zeros((R,), tl.int64) + k) * own_stride + row, s, mask=mine)
    if SUM:
        if STORED:
            higher = tl.max(top, 1)
            mass = tl.sum(mass * tl.exp2(top - higher[:, None]), 1)
            top = higher
        tl.store(log_sum + tl.program_id(1) * n + row, (top + tl.log2(mass)) * 0.6931471805599453, mask=rows_in)


@triton.jit
def _merged(parts, log_sum, n, splits, R: tl.constexpr, ACC: tl.constexpr):
    """(splits, n) log-sum-exp of some classes each -> (n,) of all; program i: pixels [i*R, i*R + R)."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    rows_in = row < n
    top = tl.full((R,), LOWEST, ACC)
    at = parts + row
    for _ in range(splits):
        top = tl.maximum(top, tl.load(at, mask=rows_in, other=0.0))
        at += n
    mass = tl.zeros((R,), ACC)
    at = parts + row
    for _ in range(splits):  # from the cache
        mass += tl.exp(tl.load(at, mask=rows_in, other=0.0) - top)
        at += n
    tl.store(log_sum + row, top + tl.log(mass), mask=rows_in)


@triton.jit
def _word(ties, stride, line, row, inside):
    """(R, T) words of ties, 0 outside."""
    return tl.load(ties + line.to(tl.int64)[None] * stride + row[:, None], mask=inside, other=0).to(tl.int32) & 0xFFFF


@triton.jit
def _set_bits(word):
    """How many of the lowest 16 bits are set."""
    word = (word & 0x5555) + ((word >> 1) & 0x5555)
    word = (word & 0x3333) + ((word >> 2) & 0x3333)
    word = (word & 0x0F0F) + ((word >> 4) & 0x0F0F)
    return (word & 0xFF) + (word >> 8)


@triton.jit
def _weights(
    x, p, table, stride, slope, slope_stride, ties, ties_stride, log_sum, share, classes, target, out,
    factor, n, C, span, SCALE: tl.constexpr,
    K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, BO: tl.constexpr,
    STORED: tl.constexpr, SIBLINGS: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (i, j, l): pixels [i*R, i*R + R), classes [j*span, j*span + span), channels [l*BO, l*BO + BO) of `out`.

    STORED: the table of cosines is overwritten by each prototype's weight in the gradient; no `out`.
    """
    WORDS: tl.constexpr = (K + BITS - 1) // BITS
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    rows_in = row < n
    held_x = _kept(x, row, rows_in, D, BD, STORED)
    lse = tl.load(log_sum + row, mask=rows_in, other=0.0) * 1.4426950408889634
    own_class = tl.load(classes + row, mask=rows_in, other=-1).to(tl.int32)
    part = tl.where(own_class >= 0, tl.load(share) * tl.load(factor), 0.0)
    if not SIBLINGS:
        own_class = tl.maximum(own_class, 0)
        given = tl.maximum(tl.load(target + row, mask=rows_in, other=0), 0).to(tl.int32)
    if not STORED:
        o = tl.program_id(2) * BO + tl.arange(0, BO)
        acc = tl.zeros((R, BO), ACC)
    first_class = tl.program_id(1) * span
    for c in range(first_class, tl.minimum(first_class + span, C), T):
        cls = c + tl.arange(0, T)
        inside = rows_in[:, None] & (cls < C)[None]
        g = tl.load(slope + cls.to(tl.int64)[None] * slope_stride + row[:, None], mask=inside, other=0.0)
        if WORDS == 1:
            word = _word(ties, ties_stride, cls, row, inside)
            g = g / tl.maximum(_set_bits(word), 1).to(ACC)  # none is set where the cosines are nan
        else:
            since = _word(ties, ties_stride, C * WORDS + cls, row, inside)
            count = tl.zeros((R, T), tl.int32)
            for w in range(WORDS):
                count += _set_bits(_word(ties, ties_stride, w * C + cls, row, inside & (since <= w)))
            g = g / tl.maximum(count, 1).to(ACC)
        for w in range(WORDS):
            if WORDS > 1:
                word = _word(ties, ties_stride, w * C + cls, row, inside & (since <= w))
            for b in range(tl.minimum(BITS, K - w * BITS)):
                k = w * BITS + b
                s = _cosines(
                    x, held_x, p, table, stride, row, rows_in, cls, C, k,
                    K, D, R, T, BD, STORED, PRECISION, INTERPRETED, ACC,
                )  # fmt: skip
                weight = tl.exp2(s * SCALE - lse[:, None]) * part[:, None]
                weight = tl.where((part != 0)[:, None], weight, 0.0)
                if not SIBLINGS:
                    rival = (cls[None] != own_class[:, None]) | ((cls * K + k)[None] == given[:, None])
                    weight = tl.where(rival, weight, 0.0)
                weight = tl.where(inside, weight + tl.where(((word >> b) & 1) == 1, g, 0.0), 0.0)
                place = cls.to(tl.int64) * K + k
                if STORED:
                    tl.store(table + place[None] * stride + row[:, None], weight, mask=inside)
                else:
                    rows_of_p = tl.load(
                        p + place[:, None] * D + o[None], mask=(cls < C)[:, None] & (o < D)[None], other=0.0
                    )
                    acc = _product(weight.to(rows_of_p.dtype), rows_of_p, acc, PRECISION, INTERPRETED)
    if not STORED:
        at = out + (tl.program_id(1).to(tl.int64) * n + row)[:, None] * D + o[None]
        tl.store(at, acc, mask=rows_in[:, None] & (o < D)[None])


@triton.jit
def _nearest_errors(
    errors, errors_stride, ties, ties_stride, classes, lacking, place, row, rows_in, C, first,
    K: tl.constexpr,
):  # fmt: skip
    """(P, R) error of the class of each of P prototypes at each of R pixels that it is the nearest of its class to,
    the first of equal ones; 0 elsewhere and where the class is the pixel's own, whose error goes to `lacking` if
    `first`."""
    WORDS: tl.constexpr = (K + BITS - 1) // BITS
    cls, k = place // K, place % K
    word, bit = k // BITS, k % BITS
    lowest = (tl.full(place.shape, 1, tl.int32) << bit)[:, None]
    inside = (cls < C)[:, None] & rows_in[None]
    wrong = tl.load(errors + cls.to(tl.int64)[:, None] * errors_stride + row[None], mask=inside, other=0.0)
    line = (word * C + cls).to(tl.int64)[:, None] * ties_stride + row[None]
    held = tl.load(ties + line, mask=inside, other=0).to(tl.int32) & 0xFFFF
    nearest = (held & (2 * lowest - 1)) == lowest
    if WORDS > 1:
        line = (C * WORDS + cls).to(tl.int64)[:, None] * ties_stride + row[None]
        nearest = nearest & (tl.load(ties + line, mask=inside, other=-1).to(tl.int32) == word[:, None])
    own = cls[:, None] == tl.load(classes + row, mask=rows_in, other=-1).to(tl.int32)[None]
    at = lacking + tl.zeros(place.shape, tl.int64)[:, None] + row[None]
    tl.store(at, wrong, mask=inside & own & (k == 0)[:, None] & first)
    return tl.where(nearest & (own == 0), wrong, 0.0)


@triton.jit
def _error_weights(
    errors, errors_stride, ties, ties_stride, classes, lacking, out, n, C,
    K: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Program (i, j): pixels [i*R, i*R + R), prototypes [j*P, j*P + P) of the (C*K, n) table `out`."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    place = tl.program_id(1) * P + tl.arange(0, P)
    weights = _nearest_errors(
        errors, errors_stride, ties, ties_stride, classes, lacking, place, row, row < n, C, True, K
    )
    at = out + place.to(tl.int64)[:, None] * n + row[None]
    tl.store(at, weights, mask=(place < C * K)[:, None] & (row < n)[None])


@triton.jit
def _error_sums(
    x, errors, errors_stride, ties, ties_stride, classes, lacking, out, n, C, span,
    K: tl.constexpr, D: tl.constexpr, P: tl.constexpr, R: tl.constexpr, BO: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program (i, j, l): prototypes [i*P, i*P + P), pixels [j*span, j*span + span), channels [l*BO, l*BO + BO)."""
    place = tl.program_id(0) * P + tl.arange(0, P)
    o = tl.program_id(2) * BO + tl.arange(0, BO)
    acc = tl.zeros((P, BO), ACC)
    start = tl.program_id(1) * span
    for i in range(start, tl.minimum(start + span, n), R):
        row = (i + tl.arange(0, R)).to(tl.int64)
        weights = _nearest_errors(
            errors, errors_stride, ties, ties_stride, classes, lacking, place, row, row < n, C, tl.program_id(2) == 0, K
        )
        part = tl.load(x + row[:, None] * D + o[None], mask=(row < n)[:, None] & (o < D)[None], other=0.0)
        acc = _product(weights.to(part.dtype), part, acc, PRECISION, INTERPRETED)
    at = out + (tl.program_id(1) * C * K + place).to(tl.int64)[:, None] * D + o[None]
    tl.store(at, acc, mask=(place < C * K)[:, None] & (o < D)[None])


@dataclass(frozen=True)
class Blocks:
    """Sizes of one program: powers of two, 16 at least, for the sake of `tl.dot`.

    Attributes:
        rows, classes: of a tile of cosines. channels: of a block of D, all of it where it is kept on the chip.
        out: channels of the gradient that one program sums. warps, stages: of Triton.
        programs: so many are wanted at least; where pixels give fewer, their classes are shared out.
    """

    rows: int
    classes: int
    channels: int
    out: int
    warps: int
    stages: int
    programs: int = 264  # two for each of an H200's multiprocessors


def blocks(way: str, num_classes: int, dim: int, *, backward: bool) -> Blocks:
    """Sizes for `way` (see `protoseg.kernels.gpu`).

    With a table, enough programs to keep the memory busy: 12 for each of an H200's multiprocessors, and 512 bytes of a
    line of the table in one piece. Else about the largest that compile for sm_90 without spilling registers, by that
    alone, not by time. The gradient of more than 256 channels is taken 256 at a time, each with its own cosines.
    """
    wide = max(16, triton.next_power_of_2(dim))
    few = max(16, triton.next_power_of_2(num_classes))
    if way == "mm":
        return Blocks(64 if backward else 128, min(16, few), 16, 16, 4, 2, programs=12 * 132)
    if way == "bf16":
        whole, rows, classes = wide <= 256, 128, 64
        if backward:
            rows, classes = (128, 32) if whole else (64, 32)
        return Blocks(rows, min(classes, few), wide if whole else 64, min(wide, 256), 8, 2)
    if way == "tf32":
        whole = wide <= 256
        if backward:
            return Blocks(64, 16 if whole else min(32, few), wide if whole else 64, min(wide, 256), 8, 2)
        return Blocks(64, min(32, few), wide if whole else 32, 16, 4, 2)
    return Blocks(64, 16 if backward else min(32, few), 16, min(wide, 128), 8, 2)


def error_blocks(way: str, dim: int) -> Blocks:
    """Sizes of the sums over pixels, a tile being prototypes (its `classes`) by pixels (its `rows`)."""
    if way == "mm":
        return Blocks(128, 16, 16, 16, 4, 1)
    wide = max(16, triton.next_power_of_2(dim))
    if way == "bf16":
        return Blocks(64, 128, 16, min(wide, 256), 8, 2)
    return Blocks(32, 64, 16, min(wide, 128), 8, 2)


class Cosines:
    """One sweep over the bands of a batch: what the kernels are told, and where they leave what they find.

    Args:
        way: see `protoseg.kernels.gpu`.
        embedding: (N, D) contiguous, its unit rows come with `fill`, a band's before its `nearest`.
        prototypes: (C, K, D) unit vectors of the same type.
        classes: (N,) class of a pixel, -1 for void. target: (N,) its prototype, needed without siblings.
        temperature, siblings: of Eq. (5).

    Attributes:
        tabled: whether a band's cosines exist as a table.
        own: (K, N) cosines with the own class, of void pixels with class 0. log_sum: (N,) of Eq. (5).
    """

    def __init__(
        self,
        way: str,
        embedding: Tensor,
        prototypes: Tensor,
        classes: Tensor,
        target: Tensor | None,
        temperature: float,
        siblings: bool,
    ):
        self.way, self.temperature, self.siblings = way, temperature, siblings
        self.classes, self.target = classes, classes if target is None else target
        self.num_classes, self.num_prototypes, self.dim = prototypes.shape
        self.embedding = embedding
        self.half = torch.empty_like(embedding, dtype=torch.bfloat16) if way == "bf16" else None
        self.rows = embedding if self.half is None else self.half
        self.tabled = way == "mm"
        self.flat = prototypes.flatten(0, 1).to(self.rows.dtype).contiguous()
        self.own = embedding.new_empty(self.num_prototypes, len(embedding))
        self.log_sum = embedding.new_empty(len(embedding))

    def fill(self, raw: Tensor | None, start: int, end: int) -> None:
        """Bring rows [start, end) of `raw` (N, D) to unit length as the embedding; None: they are that already."""
        half = None if self.half is None else self.half[start:end]
        if raw is not None:
            rows.unit(raw[start:end], self.embedding[start:end], half)
        elif half is not None:
            half.copy_(self.embedding[start:end])

    def nearest(self, start: int, end: int, *, losses: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Eq. (1) of pixels [start, end): fills `own` and, if `losses`, `log_sum`.

        Returns:
            (C, n) cosine with the nearest prototype of every class, and what `gradient` wants of these pixels: tensors
            with the pixels last, to be cut along them.
        """
        n, C, K = end - start, self.num_classes, self.num_prototypes
        best = self.own.new_empty(C, n)
        words = -(-K // BITS.value)
        ties = self.classes.new_empty(C * (words + (words > 1)) if losses else 0, n, dtype=torch.int16)
        table = self.flat @ self.rows[start:end].T if self.tabled else best
        if n:
            run_nearest(self, start, end, table, best, ties, own=True, losses=losses)
        return best, [ties, table] if self.tabled else [ties]

    def errors(self, band: Band, seen: list[Tensor], start: int, end: int) -> None:
        """What the classes got wrong of pixels [start, end), into the band; before `gradient`, which overwrites."""
        if end > start:
            add_errors(self, band, seen[0], start, end)

    def push(self, share: Tensor, factor: float) -> None:
        """What the log-sum-exp's gradient is multiplied by: a () tensor and a number; 0 for void pixels."""
        self.share, self.factor = share, factor

    def gradient(self, slope: Tensor, seen: list[Tensor], start: int, end: int, out: Tensor) -> None:
        """The gradient of pixels [start, end) to the unit rows, but for the pull of their own prototypes.

        Args:
            slope: (C, n) gradient to what `nearest` gave. seen: from `nearest`; a table in it is overwritten.
            out: (n, D), filled.
        """
        if end == start:
            return
        run_weights(self, slope, seen, start, end, out)
        if self.tabled:
            torch.mm(seen[1].T, self.flat, out=out)


def best_of_each_class(way: str, embedding: Tensor, prototypes: Tensor) -> Tensor:
    """Eq. (1) alone: (n, D) unit rows, (C, K, D) prototypes -> (C, n) cosine with the nearest of each class.

    A table of n by C*K exists where `way` is `mm`.
    """
    nowhere = embedding.new_empty(0, dtype=torch.int64)
    cosines = Cosines(way, embedding, prototypes, nowhere, None, 1.0, True)
    cosines.fill(None, 0, len(embedding))
    best = embedding.new_empty(cosines.num_classes, len(embedding))
    table = cosines.flat @ cosines.rows.T if cosines.tabled else best
    if len(embedding):
        run_nearest(cosines, 0, len(embedding), table, best, best, own=False, losses=False)
    return best


LOG2E = 1.4426950408889634
ERROR_TABLE = 32_000_000  # weights of errors that may exist at once, where the product is PyTorch's
MERGED = 256  # pixels of a program that merges log-sum-exps


def run_nearest(
    cosines: Cosines, start: int, end: int, table: Tensor, best: Tensor, ties: Tensor, *, own: bool, losses: bool
) -> None:
    """`Cosines.nearest` but for the product that makes the table."""
    n, C = end - start, cosines.num_classes
    b = blocks(cosines.way, C, cosines.dim, backward=False)
    span, splits = _spans(C, b, triton.cdiv(n, b.rows))
    partial = cosines.log_sum[start:end] if splits == 1 or not losses else best.new_empty(splits, n)
    with launching_on(best):
        _nearest[triton.cdiv(n, b.rows), splits](
            cosines.rows[start:], cosines.flat, table, table.stride(0), best, best.stride(0), ties, ties.stride(0),
            cosines.own[:, start:], cosines.own.stride(0), partial, cosines.classes[start:], cosines.target[start:],
            n, C, span, OWN=own, TIES=losses, SUM=losses, **_constants(cosines, b, best.dtype),
        )  # fmt: skip
        if losses and splits > 1:
            kind = _accumulator(best.dtype)
            _merged[(triton.cdiv(n, MERGED),)](partial, cosines.log_sum[start:end], n, splits, R=MERGED, ACC=kind)


def run_weights(cosines: Cosines, slope: Tensor, seen: list[Tensor], start: int, end: int, out: Tensor) -> None:
    """`Cosines.gradient` but for the product with the table."""
    n, C, D = end - start, cosines.num_classes, cosines.dim
    stored = cosines.tabled
    b = blocks(cosines.way, C, D, backward=True)
    strips, parts = triton.cdiv(n, b.rows), 1 if stored else triton.cdiv(D, b.out)
    span, splits = _spans(C, b, strips * parts)
    table = seen[1] if stored else slope
    target = out if stored or splits == 1 else out.new_empty(splits, n, D)
    with launching_on(out):
        _weights[strips, splits, parts](
            cosines.rows[start:], cosines.flat, table, table.stride(0), slope, slope.stride(0),
            seen[0], seen[0].stride(0), cosines.log_sum[start:], cosines.share, cosines.classes[start:],
            cosines.target[start:], target, constant(cosines.factor / cosines.temperature, out.dtype, out.device),
            n, C, span, BO=b.out, **_constants(cosines, b, slope.dtype),
        )  # fmt: skip
    if not stored and splits > 1:
        torch.sum(target, 0, out=out)


def add_errors(cosines: Cosines, band: Band, ties: Tensor, start: int, end: int) -> None:
    """`Cosines.errors`, from the bits that say which prototypes are nearest."""
    n, C, K, D = end - start, cosines.num_classes, cosines.num_prototypes, cosines.dim
    b = error_blocks(cosines.way, D)
    strips, x = triton.cdiv(C * K, b.classes), cosines.rows[start:end]
    if cosines.tabled:
        step = triton.cdiv(ERROR_TABLE, C * K)
        for part in (slice(i, min(i + step, n)) for i in range(0, n, step)):
            weights = x.new_empty(C * K, part.stop - part.start)
            known = _known(band.errors[:, part], ties[:, part], band.classes[part], band.lacking[part])
            with launching_on(x):
                _error_weights[triton.cdiv(weights.shape[1], b.rows), strips](
                    *known, weights, weights.shape[1], C, K=K, P=b.classes, R=b.rows, num_warps=b.warps
                )
            band.taken.addmm_(weights, x[part])
        return
    tiles, parts = triton.cdiv(n, b.rows), triton.cdiv(D, b.out)
    span = triton.cdiv(tiles, min(tiles, triton.cdiv(b.programs, strips * parts)))
    splits = triton.cdiv(tiles, span)
    sums = band.taken.new_empty(splits, C * K, D)
    with launching_on(x):
        _error_sums[strips, splits, parts](
            x, *_known(band.errors, ties, band.classes, band.lacking), sums, n, C, span * b.rows,
            K=K, D=D, P=b.classes, R=b.rows, BO=b.out, PRECISION="tf32" if cosines.way == "tf32" else "ieee",
            INTERPRETED=interpreted(), ACC=_accumulator(sums.dtype), num_warps=b.warps, num_stages=b.stages,
        )  # fmt: skip
    band.taken.add_(sums.sum(0))


def _known(errors: Tensor, ties: Tensor, classes: Tensor, lacking: Tensor) -> tuple[Tensor | int, ...]:
    return errors, errors.stride(0), ties, ties.stride(0), classes, lacking


def _spans(num_classes: int, b: Blocks, programs: int) -> tuple[int, int]:
    """(classes of a program, number of such spans): few pixels are shared out by classes, so that no core idles."""
    tiles = triton.cdiv(num_classes, b.classes)
    span = b.classes * triton.cdiv(tiles, min(tiles, triton.cdiv(b.programs, programs)))
    return span, triton.cdiv(num_classes, span)


def _constants(cosines: Cosines, b: Blocks, dtype: torch.dtype) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "SCALE": LOG2E / cosines.temperature,
        "K": cosines.num_prototypes,
        "D": cosines.dim,
        "R": b.rows,
        "T": b.classes,
        "BD": b.channels,
        "STORED": cosines.tabled,
        "SIBLINGS": cosines.siblings,
        "PRECISION": "tf32" if cosines.way == "tf32" else "ieee",
        "INTERPRETED": interpreted(),
        "ACC": _accumulator(dtype),
        "num_warps": b.warps,
        "num_stages": b.stages,
        "enable_fp_fusion": True,
    }


def _accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32
