# mypy: allow-untyped-defs, allow-incomplete-defs
"""The steps of the prototypes' memory in place, on a GPU: Eq. (8), the log of who serves how many pixels, re-seeding.

What `method.prototypes` defines; arguments are those of `kernels.clustering_cpu`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoseg.kernels.clustering_cpu import RULES
from protoseg.kernels.gpu import launching_on, segments
from protoseg.kernels.gpu.segments import _added, accumulator

SHORTEST = tl.constexpr(1e-12)  # length
NOWHERE, BROKEN = tl.constexpr(torch.iinfo(torch.int64).max), tl.constexpr(torch.iinfo(torch.int64).min)
ROWS, TILE = 64, 4096  # pixels and numbers of a program of `_worst_served`


@triton.jit
def _finite(value):
    return (value == value) & (tl.abs(value) != float("inf"))


@triton.jit
def _unit(values):
    """A vector of length 1; zero stays zero."""
    length = tl.sqrt(tl.sum(values * values, 0))
    return values / tl.maximum(length, tl.full((), SHORTEST, length.dtype))


@triton.jit
def _momentum(
    prototypes, weight, length, runs, starts, counts, verdict,
    MOMENTUM: tl.constexpr, CAP: tl.constexpr, RULE: tl.constexpr,
    D: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr, RUNS_GIVEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program p moves prototype p, towards the sum of its runs or, without RUNS_GIVEN, of row p of `runs`."""
    p = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDE)
    if RUNS_GIVEN:
        count = (tl.load(starts + p + 1) - tl.load(starts + p)).to(ACC)
        tl.store(counts + p, count)
    else:
        count = tl.load(counts + p)
    if (count > 0) & _finite(tl.load(verdict)):
        if RUNS_GIVEN:
            sums = _added(runs, starts, p, d, D, WIDE, R, ACC)
        else:
            sums = tl.load(runs + p * D + d, mask=d < D, other=0.0)
        size = tl.sqrt(tl.sum(sums * sums, 0))
        if _finite(size) & (size >= tl.full((), SHORTEST, ACC)):
            held = tl.load(weight + p)
            old = tl.load(prototypes + p * D + d, mask=d < D, other=0.0)
            one, momentum = tl.full((), 1.0, ACC), tl.full((), MOMENTUM, ACC)
            part = tl.minimum(count, tl.full((), CAP, ACC)) if RULE == 2 else one
            heavier = momentum * held + part
            if RULE == 0:  # a first hit (weight 0) replaces the start, every other moves by 1 - mu
                step = tl.where(held > 0, one - momentum, one)
            else:
                step = part / tl.maximum(heavier, tl.full((), SHORTEST, ACC))
            if RULE == 2:
                moved = (1 - step) * (old * tl.load(length + p)) + step * (sums / count)
            else:
                moved = (1 - step) * old + step * (sums / size)
            reached = tl.sqrt(tl.sum(moved * moved, 0))
            if reached >= tl.full((), SHORTEST, ACC):
                tl.store(prototypes + p * D + d, moved / reached, mask=d < D)
                tl.store(weight + p, heavier)
                if RULE == 2:
                    tl.store(length + p, reached)


@triton.jit
def _usage(
    usage, idle, counts, verdict, C,
    DECAY: tl.constexpr, DEAD: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program i notes classes [i*BC, i*BC + BC)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    k = tl.arange(0, WIDE)
    inside = (c < C)[:, None] & (k < K)[None]
    at = c[:, None] * K + k[None]
    number = tl.load(counts + at, mask=inside, other=0.0)
    pixels = tl.sum(number, 1)
    noted = inside & (tl.where(_finite(tl.load(verdict)), pixels, 0.0) > 0)[:, None]
    decay = tl.full((), DECAY, ACC)
    share = decay * tl.load(usage + at, mask=inside, other=0.0)
    share += (1 - decay) * number / tl.maximum(pixels, 1.0)[:, None]
    waiting = tl.load(idle + at, mask=inside, other=0.0)
    tl.store(usage + at, share, mask=noted)
    tl.store(idle + at, tl.where(share < tl.full((), DEAD, ACC), waiting + 1, 0.0), mask=noted)


@triton.jit
def _longest_idle(idle, c, k, inside, K: tl.constexpr):
    """(R,) how long the longest idle prototype of each class has been so, and the first of these."""
    waited = tl.load(idle + c[:, None] * K + k[None], mask=inside[:, None] & (k < K)[None], other=-1.0)
    return tl.max(waited, 1), tl.argmax(waited, 1)


@triton.jit
def _worst_served(
    embedding, moving, prototypes, idle, worst, n, after,
    K: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program i: of pixels [i*R, i*R + R), for classes with a prototype due, the least cosine with the own one.

    Cosine and pixel are one whole number: the smallest is the least like, of equals the first, whoever comes when. With
    one cosine that is nan the worst of its class is not known.
    """
    pixel = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    given = tl.load(moving + pixel, mask=pixel < n, other=-1)
    served = given >= 0
    c = tl.maximum(given, 0) // K
    waited, _ = _longest_idle(idle, c, tl.arange(0, WIDE), served, K)
    due = served & (waited >= after)
    if tl.max(due.to(tl.int32), 0) > 0:
        cosine = tl.zeros((R,), ACC)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            inside = due[:, None] & (d < D)[None]
            x = tl.load(embedding + pixel[:, None] * D + d[None], mask=inside, other=0.0)
            p = tl.load(prototypes + tl.maximum(given, 0)[:, None] * D + d[None], mask=inside, other=0.0)
            cosine += tl.sum(x * p, 1)
        bits = cosine.to(tl.float32).to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the numbers
        found = tl.where(cosine == cosine, (bits.to(tl.int64) << 32) | pixel, BROKEN)
        tl.atomic_min(worst + c, found, mask=due)


@triton.jit
def _reseed(
    prototypes, weight, length, usage, idle, embedding, worst, verdict, after,
    K: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program c sets the longest idle prototype of class c, if it is due, on the pixel that `_worst_served` found."""
    c = tl.program_id(0).to(tl.int64)
    waited, longest = _longest_idle(
        idle, c + tl.zeros((1,), tl.int64), tl.arange(0, WIDE), tl.full((1,), 1, tl.int32) > 0, K
    )
    found = tl.load(worst + c)
    if (tl.max(waited, 0) >= after) & (found != NOWHERE) & (found != BROKEN) & _finite(tl.load(verdict)):
        p = c * K + tl.max(longest, 0)
        d = tl.arange(0, BD)
        row = tl.load(embedding + (found & 0xFFFFFFFF) * D + d, mask=d < D, other=0.0)
        tl.store(prototypes + p * D + d, _unit(row), mask=d < D)
        tl.store(weight + p, 1.0)
        tl.store(length + p, 1.0)
        tl.store(usage + p, 1.0 / K)
        tl.store(idle + p, 0.0)


def momentum_step_(
    prototypes: Tensor, weight: Tensor, length: Tensor, sums: Tensor, counts: Tensor, verdict: Tensor,
    momentum: float, rule: str, count_cap: float,
) -> None:  # fmt: skip
    """`method.prototypes.momentum_step` in place, nothing where `verdict`, (), is not finite."""
    sums, counts = sums.contiguous(), counts.contiguous()
    _launch_momentum(prototypes, weight, length, sums, counts, counts, verdict, momentum, rule, count_cap, False)


def move_(
    prototypes: Tensor, weight: Tensor, length: Tensor, embedding: Tensor, moving: Tensor, verdict: Tensor,
    momentum: float, rule: str, count_cap: float,
) -> Tensor:  # fmt: skip
    """`momentum_step_` from the (N, D) pixels and the (N,) prototypes they move, without a table of sums.

    Returns:
        (C*K,) pixels of each prototype.
    """
    grouped = segments.grouped(moving, weight.numel())
    runs, starts = segments.row_sums(embedding, grouped), grouped.starts
    counts = torch.empty_like(weight).view(-1)
    _launch_momentum(prototypes, weight, length, runs, starts, counts, verdict, momentum, rule, count_cap, True)
    return counts


def _launch_momentum(
    prototypes: Tensor, weight: Tensor, length: Tensor, runs: Tensor, starts: Tensor, counts: Tensor, verdict: Tensor,
    momentum: float, rule: str, count_cap: float, runs_given: bool,
) -> None:  # fmt: skip
    D = prototypes.shape[2]
    with launching_on(prototypes):
        _momentum[weight.numel(),](
            prototypes, weight, length, runs, starts, counts, verdict, momentum, count_cap, RULES[rule],
            D, triton.next_power_of_2(D), segments.ROWS, runs_given, accumulator(prototypes.dtype),
            enable_fp_fusion=True,
        )  # fmt: skip


def usage_step_(usage: Tensor, idle: Tensor, counts: Tensor, verdict: Tensor, decay: float, dead: float) -> None:
    """`method.prototypes.note_usage_` in place, nothing where `verdict` is not finite."""
    C, K = usage.shape
    wide = triton.next_power_of_2(K)
    block = max(1, 256 // wide)
    with launching_on(usage):
        _usage[triton.cdiv(C, block),](
            usage, idle, counts.contiguous(), verdict, C, decay, dead, K, wide, block, accumulator(usage.dtype),
            enable_fp_fusion=True,
        )  # fmt: skip


def reseed_(
    prototypes: Tensor, weight: Tensor, length: Tensor, usage: Tensor, idle: Tensor, embedding: Tensor, moving: Tensor,
    verdict: Tensor, after: float,
) -> None:  # fmt: skip
    """`method.prototypes.reseed_` of one process; looks at the pixels of classes with a prototype due only. Cosines are
    compared in fp32, and their order is all that pixels are chosen by: the minimum of whole numbers, always the same.
    """
    C, K, D = prototypes.shape
    n, wide = len(moving), triton.next_power_of_2(K)
    worst = moving.new_full((C,), NOWHERE.value)
    channels = min(triton.next_power_of_2(D), TILE // ROWS)
    with launching_on(prototypes):
        if n:
            _worst_served[triton.cdiv(n, ROWS),](
                embedding, moving, prototypes, idle, worst, n, after,
                K, wide, D, channels, ROWS, accumulator(prototypes.dtype), enable_fp_fusion=True,
            )  # fmt: skip
        _reseed[C,](
            prototypes, weight, length, usage, idle, embedding, worst, verdict, after,
            K, wide, D, triton.next_power_of_2(D), enable_fp_fusion=True,
        )  # fmt: skip
