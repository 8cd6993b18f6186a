# mypy: allow-untyped-defs, allow-incomplete-defs
"""Eq. (2) and its gradient to the class scores, at feature size or through the bilinear resize to the labels' size.

No logit of a label pixel is ever stored: one kernel mixes the scores of its four neighbours and keeps two numbers per
label pixel, the log-sum-exp and what the own class lacks of a probability of 1; the next mixes them again. That one
gathers: a program owns some feature pixels and visits the label pixels which take from them, so nothing is added
atomically and the bits are the same every time. Where scores are cosines times a scale, that is multiplied in passing,
both ways.

A label row takes from feature rows i and i + 1 (the last one twice at the border); those with the same i are a run, for
`low` never falls. Hence the label rows that take from feature row i are two runs, of i - 1 and of i. Columns alike."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoseg.kernels import upsampling
from protoseg.kernels.gpu import launching_on

LOWEST = tl.constexpr(-1e30)  # a finite stand-in for -inf, whose differences are no nan
LOG2E = tl.constexpr(1.4426950408889634)  # scores are brought to base 2, where the exponential is one instruction
LN2 = tl.constexpr(0.6931471805599453)
# Tiles are (classes, pixels), 32 pixels to a warp: a thread holds all the classes of its pixel, and sums by itself.
PIXELS, CLASSES = 64, 16  # at feature size
COLUMNS, DEEP = 128, 8  # label pixels by classes, forward
GATHERED, HELD = 64, 8  # feature pixels by classes, backward: more would hold too many registers


@triton.jit
def _log_sum(top, mass, z):
    """(T, R) more exponents -> the (R,) largest one so far and the sum relative to it, base 2."""
    higher = tl.maximum(top, tl.max(z, 0))
    return higher, mass * tl.exp2(top - higher) + tl.sum(tl.exp2(z - higher[None]), 0)


@triton.jit
def _with_own(top, mass, own):
    """What `_log_sum` has of the other classes, and the (R,) exponent of the own one -> the log-sum-exp of all, base 2,
    and the others' share of it: 1 - P, with digits where P is near 1."""
    higher = tl.maximum(top, own)
    others = mass * tl.exp2(top - higher)
    mass = others + tl.exp2(own - higher)
    return higher + tl.log2(mass), others / mass


@triton.jit
def _weight_of(class_weights, label, labelled, C, WEIGHTED: tl.constexpr, ACC: tl.constexpr):
    """(R,) weight of each pixel in the sum, 0 for void."""
    if WEIGHTED:
        return tl.load(class_weights + label, mask=labelled & (label >= 0) & (label < C), other=0.0)
    else:
        return labelled.to(ACC)


@triton.jit
def _unit(scale, SCALED: tl.constexpr, ACC: tl.constexpr):
    """What brings a stored score to base 2, and to its scale."""
    if SCALED:
        return tl.load(scale).to(ACC) * LOG2E
    else:
        return tl.full((), LOG2E, ACC)


@triton.jit
def _same_size(
    scores, stride, labels, class_weights, scale, share, losses, slopes, n, C, ignore_index,
    R: tl.constexpr, T: tl.constexpr, WEIGHTED: tl.constexpr, SCALED: tl.constexpr, ACC: tl.constexpr,
    PLACE: tl.constexpr,
):  # fmt: skip
    """Program i: loss of pixels [i*R, i*R + R), whose scores are overwritten by the gradient."""
    unit = _unit(scale, SCALED, ACC)
    pixel = tl.program_id(0) * R + tl.arange(0, R)
    inside = pixel < n
    label = tl.load(labels + pixel, mask=inside, other=ignore_index)
    labelled = inside & (label != ignore_index)
    weight = _weight_of(class_weights, label, labelled, C, WEIGHTED, ACC)
    # A label that is no class gives a loss of nan: a kernel can raise no error, and this one is seen.
    known = labelled & (label >= 0) & (label < C)
    own = tl.load(scores + label.to(PLACE) * stride + pixel, mask=known, other=float("nan")) * unit
    top = tl.full((R,), LOWEST, ACC)
    mass = tl.zeros((R,), ACC)
    for c in range(0, C, T):
        cls = c + tl.arange(0, T)
        at = scores + cls.to(PLACE)[:, None] * stride + pixel[None]
        z = tl.load(at, mask=(cls < C)[:, None] & inside[None], other=0.0) * unit
        others = (cls < C)[:, None] & ((cls[:, None] != label[None]) | (known == 0)[None])
        top, mass = _log_sum(top, mass, tl.where(others, z, -float("inf")))
    log_sum, lacking = _with_own(top, mass, tl.where(known, own, -float("inf")))
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(labelled, weight * (log_sum - own) * LN2, 0.0), 0))
    amount = weight * tl.load(share)
    if SCALED:
        amount *= tl.load(scale).to(ACC)
    slope = tl.zeros((R,), ACC)
    tl.debug_barrier()  # every warp has read what the lines below overwrite
    for c in range(0, C, T):
        cls = c + tl.arange(0, T)
        at = scores + cls.to(PLACE)[:, None] * stride + pixel[None]
        held = (cls < C)[:, None] & inside[None]
        value = tl.load(at, mask=held, other=0.0)
        p = tl.exp2(tl.where(held, value * unit - log_sum[None], -float("inf")))
        p = tl.where(cls[:, None] == label[None], -lacking[None], p)
        gradient = tl.where(held & labelled[None], amount[None] * p, 0.0)
        tl.store(at, gradient, mask=held)
        if SCALED:
            slope += tl.sum(gradient * value, 0)
    if SCALED:
        tl.store(slopes + tl.program_id(0), tl.sum(slope, 0))


@triton.jit
def _mixed(upper, lower, place, down, unit):
    """Between two rows of scores, at the same places: `down` of the way to the lower one, in units of `_unit`."""
    value = tl.load(upper + place)
    return (value + down * (tl.load(lower + place) - value)) * unit


@triton.jit
def _label_log_sums(
    scores, stride, labels, class_weights, scale, low_y, share_y, low_x, share_x, log_sums, lackings, losses,
    C, h, w, H, W, blocks, ignore_index,
    R: tl.constexpr, T: tl.constexpr, WEIGHTED: tl.constexpr, SCALED: tl.constexpr, ACC: tl.constexpr,
    PLACE: tl.constexpr,
):  # fmt: skip
    """Program i: R label pixels of one label row, i = row * blocks + block, rows counted through all images."""
    unit = _unit(scale, SCALED, ACC)
    row = tl.program_id(0) // blocks
    x = (tl.program_id(0) % blocks) * R + tl.arange(0, R)
    inside = x < W
    y = row % H
    i = tl.load(low_y + y)
    down = tl.load(share_y + y)
    image = (row // H).to(tl.int64) * h
    upper = scores + (image + i) * w
    lower = scores + (image + tl.minimum(i + 1, h - 1)) * w
    left = tl.load(low_x + x, mask=inside, other=0)
    right = tl.minimum(left + 1, w - 1)
    along = tl.load(share_x + x, mask=inside, other=0.0)
    at = row.to(tl.int64) * W + x
    label = tl.load(labels + at, mask=inside, other=ignore_index)
    labelled = inside & (label != ignore_index)
    known = labelled & (label >= 0) & (label < C)
    top = tl.full((R,), LOWEST, ACC)
    mass = tl.zeros((R,), ACC)
    for c in range(0, C, T):
        cls = c + tl.arange(0, T)
        place = tl.minimum(cls, C - 1).to(PLACE)[:, None] * stride
        z = _mixed(upper, lower, place + left[None], down, unit)
        z += along[None] * (_mixed(upper, lower, place + right[None], down, unit) - z)
        others = (cls < C)[:, None] & ((cls[:, None] != label[None]) | (known == 0)[None])
        top, mass = _log_sum(top, mass, tl.where(others, z, -float("inf")))
    place = tl.where(known, label, 0).to(PLACE) * stride
    own = _mixed(upper, lower, place + left, down, unit)
    own += along * (_mixed(upper, lower, place + right, down, unit) - own)
    log_sum, lacking = _with_own(top, mass, tl.where(known, own, -float("inf")))
    tl.store(log_sums + at, log_sum, mask=inside)
    tl.store(lackings + at, lacking, mask=inside)
    own = tl.where(known, own, float("nan"))  # as in `_same_size`
    weight = _weight_of(class_weights, label, labelled, C, WEIGHTED, ACC)
    tl.store(losses + tl.program_id(0), tl.sum(tl.where(labelled, weight * (log_sum - own) * LN2, 0.0), 0))


@triton.jit
def _add_column(
    acc, cls, base, slope, x, end, share_x, labels, log_sums, lackings, class_weights, height, C, ignore_index,
    FIRST: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr, last=None,
):  # fmt: skip
    """acc + what the label pixels (y, x), one for each feature column, give back to it.

    Args:
        acc: (T, R). base, slope: (T, R) score at the left of the two feature columns, and from there to the right one.
        x, end: (R,) column of the label pixel; none where it is not below `end`.
        labels, log_sums, lackings: where label row y begins. height: () share of the feature row in label row y.
        FIRST: whether the feature column is the left of the two. last: (R,) whether it is the right one as well.
    """
    inside = x < end
    label = tl.load(labels + x, mask=inside, other=ignore_index).to(tl.int32)
    labelled = inside & (label != ignore_index)
    along = tl.load(share_x + x, mask=inside, other=0.0)
    log_sum = tl.load(log_sums + x, mask=inside, other=float("inf"))
    lacking = tl.load(lackings + x, mask=inside, other=0.0)
    amount = height * along
    if FIRST:
        amount = tl.where(last, height, height - amount)
    amount = amount * _weight_of(class_weights, label, labelled, C, WEIGHTED, ACC)
    p = tl.exp2(base + along[None] * slope - log_sum[None])
    p = tl.where(cls[:, None] == label[None], -lacking[None], p)
    return acc + tl.where(labelled, amount, 0.0)[None] * p


@triton.jit
def _label_gradient(
    scores, stride, labels, class_weights, scale, start_y, share_y, start_x, share_x, log_sums, lackings, share, out,
    out_stride, slopes, C, h, w, H, W, blocks, splits, ignore_index,
    R: tl.constexpr, T: tl.constexpr, WEIGHTED: tl.constexpr, SCALED: tl.constexpr, ACC: tl.constexpr,
    PLACE: tl.constexpr,
):  # fmt: skip
    """Program i: R feature pixels of one feature row by T classes, i = (row * blocks + block) * splits + classes.

    Neighbouring programs take other classes of the same pixels, so that they find labels and log-sum-exps in the cache.
    """
    unit = _unit(scale, SCALED, ACC)
    cls = (tl.program_id(0) % splits) * T + tl.arange(0, T)
    block = tl.program_id(0) // splits
    j = (block % blocks) * R + tl.arange(0, R)
    row = block // blocks
    i = row % h
    image = row // h
    inside = j < w
    # Places are clamped, which costs less than a mask, and what is loaded twice is not stored. It also keeps the
    # compiler from giving a thread several columns side by side: each tap would be exchanged through shared memory.
    place = tl.minimum(cls, C - 1).to(PLACE)[:, None] * stride
    at_left = place + tl.minimum(tl.maximum(j - 1, 0), w - 1)[None]
    column = tl.minimum(j, w - 1)[None]
    at_right = place + tl.minimum(j + 1, w - 1)[None]
    first_x = tl.load(start_x + tl.maximum(j - 1, 0), mask=inside, other=0)  # of label columns between j - 1 and j
    middle_x = tl.load(start_x + j, mask=inside, other=0)  # between j and j + 1
    end_x = tl.load(start_x + j + 1, mask=inside, other=0)
    before, after = tl.max(middle_x - first_x, 0), tl.max(end_x - middle_x, 0)
    middle_y = tl.load(start_y + i)
    acc = tl.zeros((T, R), ACC)
    for y in range(tl.load(start_y + tl.maximum(i - 1, 0)), tl.load(start_y + i + 1)):
        down = tl.load(share_y + y)
        top = tl.where(y < middle_y, i - 1, i)
        height = tl.where(y < middle_y, down, tl.where(i == h - 1, 1.0, 1 - down))
        upper = scores + (image.to(tl.int64) * h + top) * w
        lower = scores + (image.to(tl.int64) * h + tl.minimum(top + 1, h - 1)) * w
        left = _mixed(upper, lower, at_left, down, unit)
        middle = _mixed(upper, lower, place + column, down, unit)
        right = _mixed(upper, lower, at_right, down, unit)
        line = (image.to(tl.int64) * H + y) * W
        for q in range(0, before):
            acc = _add_column(
                acc, cls, left, middle - left, first_x + q, middle_x, share_x, labels + line, log_sums + line,
                lackings + line, class_weights, height, C, ignore_index, False, WEIGHTED, ACC,
            )  # fmt: skip
        for q in range(0, after):
            acc = _add_column(
                acc, cls, middle, right - middle, middle_x + q, end_x, share_x, labels + line, log_sums + line,
                lackings + line, class_weights, height, C, ignore_index, True, WEIGHTED, ACC, j == w - 1,
            )  # fmt: skip
    held = (cls < C)[:, None] & inside[None]
    acc *= tl.load(share)
    if SCALED:
        acc *= tl.load(scale).to(ACC)
        value = tl.load(scores + place + row.to(tl.int64) * w + column)
        tl.store(slopes + tl.program_id(0), tl.sum(tl.sum(tl.where(held, acc * value, 0.0), 0), 0))
    tl.store(out + cls.to(PLACE)[:, None] * out_stride + row.to(tl.int64) * w + column, acc, mask=held)


@lru_cache(maxsize=64)
def _resize(
    size: int, out: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The resize of `size` rows to `out`, exactly that of `upsampling.mixes`; made once, for a step costs no launch.

    Returns:
        (out,) int32 first row of each output, (out,) share of the next one, and (size + 1,) int32 how many outputs have
        a first row before this one: those from `starts[i]` to `starts[i + 1]` have row i.
    """
    low, share = upsampling.mixes(size, out, align_corners, dtype, device)
    starts = torch.searchsorted(low, torch.arange(size + 1, device=device), out_int32=True)
    return low.int(), share[:, 0], starts


def _constants(
    scores: Tensor, class_weights: Tensor | None, scale: Tensor | None, pixels: int, classes: int, width: int
) -> dict[str, object]:
    """What a kernel is compiled for, given (C, n) scores and the largest tile wanted."""
    R = min(pixels, max(16, triton.next_power_of_2(width)))
    return {
        "R": R,
        "T": min(classes, triton.next_power_of_2(len(scores))),
        "WEIGHTED": class_weights is not None,
        "SCALED": scale is not None,
        "ACC": tl.float64 if scores.dtype == torch.float64 else tl.float32,
        "PLACE": tl.int32 if len(scores) * scores.stride(0) < 2**31 else tl.int64,  # half the registers of addresses
        "num_warps": max(1, R // 32),
        "enable_fp_fusion": True,
    }


def cross_entropy_(
    scores: Tensor,
    labels: Tensor,
    ignore_index: int,
    class_weights: Tensor | None,
    share: Tensor,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`upsampling.cross_entropy_` in one launch: (C, n) scores are overwritten by `share` times the gradient.

    Args:
        scores: (C, n) with the pixels side by side in memory.
        labels: (n,) in [0, C) or `ignore_index`; any other makes the loss nan.
        class_weights: (C,) or None. share: () factor of the gradients alone.
        scale: () what `scores` must be multiplied by to be scores. None: nothing.

    Returns:
        Parts of two sums: of the loss over the labelled pixels, and of `share` times its gradient to log `scale`
        (none without a scale).
    """
    C, n = scores.shape
    constants = _constants(scores, class_weights, scale, PIXELS, CLASSES, n)
    programs = triton.cdiv(n, constants["R"])
    losses, slopes = scores.new_empty(programs), scores.new_empty(0 if scale is None else programs)
    if n:
        with launching_on(scores):
            _same_size[(programs,)](
                scores, scores.stride(0), labels.contiguous(), scores if class_weights is None else class_weights,
                scores if scale is None else scale, share, losses, slopes, n, C, ignore_index, **constants,
            )  # fmt: skip
    return losses, slopes


def label_cross_entropy(
    scores: Tensor,
    size: tuple[int, int],
    labels: Tensor,
    align_corners: bool,
    ignore_index: int,
    class_weights: Tensor | None,
    share: Tensor,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of scores resized bilinearly to the labels' size, in two launches.

    Args:
        scores: (C, G*h*w) of G whole images, the pixels side by side in memory. size: (h, w).
        labels: (G, H, W) in [0, C) or `ignore_index`; any other makes the loss nan.
        class_weights, share, scale: as in `cross_entropy_`.

    Returns:
        What `cross_entropy_` returns, and (C, G*h*w) `share` times the gradient.
    """
    C = len(scores)
    (G, H, W), (h, w) = labels.shape, size
    kind = (align_corners, scores.dtype, scores.device)
    low_y, share_y, start_y = _resize(h, H, *kind)
    low_x, share_x, start_x = _resize(w, W, *kind)
    weights = scores if class_weights is None else class_weights
    given = (scores, scores.stride(0), labels.contiguous(), weights, scores if scale is None else scale)
    constants = _constants(scores, class_weights, scale, COLUMNS, DEEP, W)
    blocks = triton.cdiv(W, constants["R"])
    losses = scores.new_empty(G * H * blocks)
    log_sums, lackings = scores.new_empty(labels.shape), scores.new_empty(labels.shape)
    gradient = scores.new_empty(scores.shape)
    with launching_on(scores):
        _label_log_sums[(len(losses),)](
            *given, low_y, share_y, low_x, share_x, log_sums, lackings, losses, C, h, w, H, W, blocks, ignore_index,
            **constants,
        )  # fmt: skip
        constants = _constants(scores, class_weights, scale, GATHERED, HELD, w)
        blocks, splits = triton.cdiv(w, constants["R"]), triton.cdiv(C, constants["T"])
        programs = G * h * blocks * splits
        slopes = scores.new_empty(0 if scale is None else programs)
        _label_gradient[(programs,)](
            *given, start_y, share_y, start_x, share_x, log_sums, lackings, share, gradient,
            gradient.stride(0), slopes, C, h, w, H, W, blocks, splits, ignore_index, **constants,
        )  # fmt: skip
    return losses, slopes, gradient
