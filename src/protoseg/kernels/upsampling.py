"""Eq. (2) at label resolution: cross-entropy through the bilinear resize and back, a strip of label rows at a time.

The resize is separable: widen every feature row once, then a label row is a mix of two widened rows. A strip of label
rows is one small matrix product with its two-banded matrix, and the adjoint is the product with the transpose. Class
scores lie classes first, pixels last, so a strip of any images is (C, pixels)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Lines:
    """Label rows as mixes of feature rows: the vertical half of a bilinear resize.

    Attributes:
        first, last: for each label row the first and last feature row it takes from; never falling.
        matrix: (label rows, feature rows) weights.
    """

    first: tuple[int, ...]
    last: tuple[int, ...]
    matrix: Tensor

    def ready(self, rows: int) -> int:
        """How many label rows need nothing but the first `rows` feature rows."""
        return sum(1 for last in self.last if last < rows)


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
    y = torch.arange(out, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    source = y * (size - 1) / max(out - 1, 1) if align_corners else ((y + 0.5) * size / out - 0.5).clamp(min=0)
    low = source.floor().clamp(max=size - 1)
    share = (source - low)[:, None].to(dtype)
    low = low.long()[:, None]
    matrix = torch.zeros(out, size, device=device, dtype=dtype).scatter_(1, low, 1 - share)
    return Lines(first, last, matrix.scatter_add_(1, (low + 1).clamp(max=size - 1), share))


def widen(planes: Tensor, width: int, align_corners: bool) -> Tensor:
    """(planes, rows, w) -> (planes, rows, width), bilinear along the rows alone."""
    if planes.shape[2] == width:
        return planes
    return F.interpolate(planes[None], size=(planes.shape[1], width), mode="bilinear", align_corners=align_corners)[0]


def narrow(gradient: Tensor, width: int, align_corners: bool) -> Tensor:
    """The adjoint of `widen`: (planes, rows, W) -> (planes, rows, width)."""
    planes, rows, wide = gradient.shape
    if wide == width:
        return gradient
    return torch.ops.aten.upsample_bilinear2d_backward(
        gradient.contiguous()[None], [rows, wide], [1, planes, rows, width], align_corners, None, None
    )[0]


def cross_entropy_(
    logits: Tensor, labels: Tensor, ignore_index: int, class_weights: Tensor | None, share: Tensor
) -> Tensor:
    """Summed, weighted cross-entropy of (C, n) logits, which are overwritten by `share` times its gradient.

    Args:
        labels: (n,) in [0, C) or `ignore_index`.
        share: () factor of the gradient alone.

    Returns:
        () sum over the labelled pixels.
    """
    valid = labels != ignore_index
    index = torch.where(valid, labels, 0)[None]  # 1 n
    weight = valid.to(logits.dtype)
    if class_weights is not None:
        weight = weight * class_weights[index[0]]
    logits.sub_(logits.amax(0))
    target = logits.gather(0, index)[0]
    mass = logits.exp_().sum(0)
    loss = torch.where(valid, weight * (mass.log() - target), 0).sum()
    weight = weight * share
    logits.mul_(weight / mass)
    logits.scatter_add_(0, index, -weight[None])
    return loss


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
) -> Tensor:
    """Cross-entropy of some label rows; adds `share` times its gradient to `gradient`.

    Args:
        widened: (C*G, feature rows, W) class scores of G images, feature rows from `top` on.
        gradient: the same shape.
        rows: label rows [first, last), all of whose feature rows are in `widened`.
        labels: (G, H, W).
        budget: how many logits may exist at once.

    Returns:
        () sum over the labelled pixels of these rows.
    """
    planes, _, width = widened.shape
    images = labels.shape[0]
    step = max(1, budget // (planes * width))
    loss = widened.new_zeros(())
    for y in range(rows[0], rows[1], step):
        end = min(y + step, rows[1])
        low, high = vertical.first[y] - top, vertical.last[end - 1] - top + 1
        mix = vertical.matrix[y:end, top + low : top + high]
        logits = torch.matmul(mix, widened[:, low:high])  # C*G strip W
        flat = logits.view(planes // images, -1)
        loss = loss + cross_entropy_(flat, labels[:, y:end].reshape(-1), ignore_index, class_weights, share)
        gradient[:, low:high] += torch.matmul(mix.T, logits)
    return loss
