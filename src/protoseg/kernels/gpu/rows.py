# mypy: allow-untyped-defs, allow-incomplete-defs
"""Unit length of the rows of an N x D embedding, and its adjoint together with the targets' pull; Eq. (5) and (6) of
what each pixel was given, and Eq. (7)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoseg.kernels.gpu import constant, launching_on

TILE = 2048  # numbers of a program
PIXELS = 512  # of a program of `_given`
PARTS = 2048  # of a sum that `_totals` takes at once
SHORTEST = tl.constexpr(1e-12)  # length; given a type by `tl.full`, or older versions of Triton take it in fp32


@triton.jit
def _unit(
    raw, out, half, n, stride_n, stride_d, D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr
):
    """Program i brings rows [i*R, i*R + R) to unit length; `half` gets them rounded to bf16."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    d = tl.arange(0, BD)
    inside = (row < n)[:, None] & (d < D)[None]
    values = tl.load(raw + row[:, None] * stride_n + d[None].to(tl.int64) * stride_d, mask=inside, other=0.0)
    length = tl.sqrt(tl.sum(values * values, 1))
    length = tl.maximum(length, tl.full((R,), SHORTEST, length.dtype))
    values = values / length[:, None]
    tl.store(out + row[:, None] * D + d[None], values, mask=inside)
    if HALF:
        tl.store(half + row[:, None] * D + d[None], values.to(tl.bfloat16), mask=inside)


@triton.jit
def _finish(
    gradient, unit_rows, raw, prototypes, target, near, contrast, contrast_weight, distance, distance_weight,
    n, stride_n, stride_d, D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program i finishes rows [i*R, i*R + R) of the gradient, in place."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    d = tl.arange(0, BD)
    held = row < n
    inside = held[:, None] & (d < D)[None]
    at = row[:, None] * D + d[None]
    given = tl.load(target + row, mask=held, other=-1)
    cosine = tl.load(near + row, mask=held, other=0.0)
    nearer = tl.load(contrast) * tl.load(contrast_weight)
    nearer += 2 * tl.load(distance) * tl.load(distance_weight) * (1 - cosine)
    pull = tl.where(given >= 0, -nearer, 0.0)
    own = tl.load(prototypes + tl.maximum(given, 0)[:, None] * D + d[None], mask=inside, other=0.0)
    g = tl.load(gradient + at, mask=inside, other=0.0) + own * pull[:, None]
    x = tl.load(unit_rows + at, mask=inside, other=0.0)
    values = tl.load(raw + row[:, None] * stride_n + d[None].to(tl.int64) * stride_d, mask=inside, other=0.0)
    length = tl.sqrt(tl.sum(values * values, 1))
    none = length <= tl.full((R,), SHORTEST, length.dtype)  # a length that is held has no gradient
    g = (g - x * tl.sum(g * x, 1)[:, None]) / tl.where(none, 1.0, length)[:, None]
    tl.store(gradient + at, tl.where(none[:, None], 0.0, g), mask=inside)


@triton.jit
def _given(
    own, stride_n, stride_k, log_sum, target, near, contrast, distance, n, SCALE: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """Program i: of pixels [i*R, i*R + R) the cosine with the prototype that each was given, and both losses."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    given = tl.load(target + row, mask=row < n, other=-1)
    known = given >= 0
    cosine = tl.load(own + row * stride_n + (tl.maximum(given, 0) % K) * stride_k, mask=known, other=0.0)
    tl.store(near + row, cosine, mask=row < n)
    pushed = tl.load(log_sum + row, mask=known, other=0.0)
    tl.store(contrast + tl.program_id(0), tl.sum(tl.where(known, pushed - cosine * SCALE, 0.0), 0))
    tl.store(distance + tl.program_id(0), tl.sum(tl.where(known, (1 - cosine) * (1 - cosine), 0.0), 0))


@triton.jit
def _summed(parts, count, R: tl.constexpr, ACC: tl.constexpr):
    """() sum of some numbers, R at a time."""
    sums = tl.zeros((R,), ACC)
    for start in range(0, count, R):
        place = start + tl.arange(0, R)
        sums += tl.load(parts + place, mask=place < count, other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def _totals(
    label_parts, labels, pixel_parts, pixels, label_share, pixel_share, contrast_weight, distance_weight,
    total, ce, ppc, ppd, R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The only program."""
    entropy = tl.load(label_share) * _summed(label_parts, labels, R, ACC)
    contrast = tl.load(pixel_share) * _summed(pixel_parts, pixels, R, ACC)
    distance = tl.load(pixel_share) * _summed(pixel_parts + pixels, pixels, R, ACC)
    tl.store(ce, entropy)
    tl.store(ppc, contrast)
    tl.store(ppd, distance)
    tl.store(total, entropy + tl.load(contrast_weight) * contrast + tl.load(distance_weight) * distance)


def _shape(dim: int) -> tuple[int, int]:
    """(rows of a program, D rounded up to a power of two)."""
    wide = triton.next_power_of_2(dim)
    return max(1, TILE // wide), wide


def unit(raw: Tensor, out: Tensor, half: Tensor | None = None) -> None:
    """(N, D) rows of any strides -> `out` (N, D), the same of unit length (a zero row stays zero, eps 1e-12).

    Args:
        half: (N, D) bf16, gets the same rounded.
    """
    n, dim = raw.shape
    rows, wide = _shape(dim)
    if n:
        grid = (triton.cdiv(n, rows),)
        with launching_on(raw):
            _unit[grid](
                raw, out, out if half is None else half, n, *raw.stride(), dim, rows, wide, half is not None,
                enable_fp_fusion=True,
            )  # fmt: skip


def finish(
    gradient: Tensor,
    unit_rows: Tensor,
    raw: Tensor,
    prototypes: Tensor,
    target: Tensor,
    near: Tensor,
    contrast: tuple[Tensor, float],
    distance: tuple[Tensor, float],
) -> None:
    """In place: add the pull of each pixel's own prototype, then go back through the unit length.

    Args:
        gradient: (N, D) to the unit rows, contiguous. unit_rows: (N, D) contiguous. raw: (N, D) before unit length.
        prototypes: (C*K, D) contiguous.
        target: (N,) in [0, C*K), or -1 for no pull. near: (N,) cosine with it.
        contrast: factors of the share of Eq. (5) over its temperature, () and a number.
        distance: the same of the share of Eq. (6).
    """
    n, dim = raw.shape
    rows, wide = _shape(dim)
    kind = gradient.dtype, gradient.device
    if n:
        grid = (triton.cdiv(n, rows),)
        with launching_on(raw):
            _finish[grid](
                gradient, unit_rows, raw, prototypes, target, near,
                contrast[0], constant(contrast[1], *kind), distance[0], constant(distance[1], *kind),
                n, *raw.stride(), dim, rows, wide, enable_fp_fusion=True,
            )  # fmt: skip


def given(own: Tensor, log_sum: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cosine of each pixel with the prototype it was given, and the losses that depend on it.

    Args:
        own: (N, K) cosines with the own class, of any strides. log_sum: (N,) of Eq. (5).
        target: (N,) in [0, C*K), or -1 for none.

    Returns:
        (N,) cosines, 0 where nothing was given, and (2, P) parts of the sums over all pixels of Eq. (5) and (6).
    """
    n, K = own.shape
    programs = triton.cdiv(n, PIXELS)
    near, parts = own.new_empty(n), own.new_empty(2, programs)
    if n:
        with launching_on(own):
            _given[programs,](
                own, *own.stride(), log_sum, target, near, parts[0], parts[1], n, 1 / temperature, K, PIXELS,
                enable_fp_fusion=True,
            )  # fmt: skip
    return near, parts


def totals(
    label_parts: Tensor,
    pixel_parts: Tensor,
    label_share: Tensor,
    pixel_share: Tensor,
    contrast_weight: float,
    distance_weight: float,
) -> tuple[Tensor, ...]:
    """Eq. (7) from parts of its sums: total, cross-entropy, contrast and distance, () each.

    Args:
        label_parts: (P,) of the cross-entropy. pixel_parts: (2, Q) contiguous, of `given`.
        label_share, pixel_share: () what makes their sums means.
        contrast_weight, distance_weight: lambda1, lambda2.
    """
    if len(label_parts) > 16 * PARTS:  # too many for one program
        label_parts = label_parts.sum()[None]
    made = tuple(pixel_parts.new_empty(()) for _ in range(4))
    kind = pixel_parts.dtype, pixel_parts.device
    sums = tl.float64 if pixel_parts.dtype == torch.float64 else tl.float32
    with launching_on(pixel_parts):
        _totals[(1,)](
            label_parts, len(label_parts), pixel_parts, pixel_parts.shape[1], label_share, pixel_share,
            *(constant(weight, *kind) for weight in (contrast_weight, distance_weight)), *made,
            PARTS, sums, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return made
