# mypy: allow-untyped-defs, allow-incomplete-defs
"""The class of every pixel at feature size, and what the means of a step divide by, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from protoseg.kernels.gpu import launching_on

LABELS = 2048  # label pixels of a program
MOST_PIXELS = 4096  # feature pixels of a program


@triton.jit
def _labelled(
    sampled, n, labels, m, class_weights, classes, parts, C, ignore_index,
    R: tl.constexpr, S: tl.constexpr, WEIGHTED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Program i: labels [i*R, i*R + R), and the classes of feature pixels [i*S, i*S + S)."""
    at = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    label = tl.load(labels + at, mask=at < m, other=ignore_index)
    labelled = label != ignore_index
    if WEIGHTED:
        weight = tl.load(class_weights + label, mask=labelled & (label >= 0) & (label < C), other=0.0).to(ACC)
    else:
        weight = labelled.to(ACC)
    tl.store(parts + tl.program_id(0), tl.sum(weight, 0))
    at = tl.program_id(0).to(tl.int64) * S + tl.arange(0, S)
    label = tl.load(sampled + at, mask=at < n, other=-1).to(tl.int64)
    known = (label >= 0) & (label < C) & (label != ignore_index)
    tl.store(classes + at, tl.where(known, label, -1), mask=at < n)
    tl.store(parts + tl.num_programs(0) + tl.program_id(0), tl.sum(known.to(ACC), 0))


def labelled(
    sampled: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    class_weights: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Classes at feature size, and the two sums that losses are divided by.

    Args:
        sampled: (N,) labels at feature size, whole numbers of any type. labels: (B, H, W) at their own size.
        class_weights: (C,) or None.
        dtype: of the sums.

    Returns:
        (N,) int64 class, -1 for none; (2,) sum of the class weights of all labels but `ignore_index` (their number
        without weights), and how many pixels have a class.
    """
    n, m = len(sampled), labels.numel()
    programs = max(1, triton.cdiv(m, LABELS), triton.cdiv(n, MOST_PIXELS))
    pixels = max(16, triton.next_power_of_2(triton.cdiv(n, programs)))
    classes = torch.empty(n, dtype=torch.int64, device=labels.device)
    parts = torch.empty(2, programs, dtype=dtype, device=labels.device)
    kind = tl.float64 if dtype == torch.float64 else tl.float32
    with launching_on(labels):
        _labelled[(programs,)](
            sampled, n, labels.contiguous(), m, parts if class_weights is None else class_weights, classes, parts,
            num_classes, ignore_index, LABELS, pixels, class_weights is not None, kind,
        )  # fmt: skip
    return classes, parts.sum(1)
