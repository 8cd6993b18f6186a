"""The bilinear resize that scores and features take everywhere in the house."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg import kernels


def bilinear(x: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """`F.interpolate(x, size, mode="bilinear")` of (B, C, h, w); `x` itself where it has that size.

    On a GPU and among deterministic algorithms its gradient is two matrix products (`kernels.resizing`), not PyTorch's
    sort of all its numbers; the values are the same.

    Args:
        size: (height, width) of the result.
        align_corners: whether the outer pixels' centres, rather than their edges, come to lie on each other.
    """
    if x.shape[-2:] == size:
        return x
    if kernels.bilinear_applies(x):
        return kernels.bilinear(x, size, align_corners)
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def bilinear_adjoint(gradient: Tensor, size: tuple[int, int], *, align_corners: bool = False) -> Tensor:
    """The way back of `bilinear`: the (B, C, H, W) gradient of its result as that of its (B, C, *size) input."""
    if gradient.shape[-2:] == size:
        return gradient
    if kernels.bilinear_applies(gradient):
        return kernels.bilinear_adjoint(gradient, size, align_corners)
    given = (*gradient.shape[:2], *size)
    return torch.ops.aten.upsample_bilinear2d_backward(gradient, gradient.shape[-2:], given, align_corners)
