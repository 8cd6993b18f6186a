"""The bilinear resize, with a gradient that has one order on a GPU.

PyTorch's own gradient adds atomically there, so among deterministic algorithms `F.interpolate` takes another way: four
gathers forward and, backward, an `index_put_` that sorts every number of the gradient by its place. But the resize is
separable and linear: its adjoint is two matrix products, whose sums have one order by themselves."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protoseg.kernels import upsampling

Size = tuple[int, int]


def bilinear(x: Tensor, size: Size, align_corners: bool) -> Tensor:
    """(B, C, h, w) -> (B, C, *size), what `F.interpolate(x, size, mode="bilinear")` gives where no order is asked."""
    return _Bilinear.apply(x, size, align_corners)


def bilinear_adjoint(gradient: Tensor, size: Size, align_corners: bool) -> Tensor:
    """(B, C, H, W) gradient of a map resized from `size` -> (B, C, *size), in the order of memory it came in.

    Products are fp32 (TF32 where `torch.backends.cuda.matmul` allows it), or half precision where the gradient is and
    the weights lose nothing by it: in a resize by a power of two. Rounded they would not sum to what they should.
    """
    kind = gradient.dtype
    if kind.itemsize < 4 and (align_corners or not all(map(_power_of_two, size, gradient.shape[-2:]))):
        gradient = gradient.float()
    with torch.autocast(gradient.device.type, enabled=False):
        return _products(gradient, size, align_corners).to(kind)


def _power_of_two(small: int, large: int) -> bool:
    times, rest = divmod(large, small)
    return rest == 0 and times & (times - 1) == 0


def _products(gradient: Tensor, size: Size, align_corners: bool) -> Tensor:
    weights = _weights if torch.compiler.is_compiling() else _kept
    down, across = (
        weights(small, large, align_corners, gradient.dtype, gradient.device)
        for small, large in zip(size, gradient.shape[-2:])
    )
    if gradient.is_contiguous(memory_format=torch.channels_last):  # channels stay the rows that both products share
        rows = gradient.permute(0, 2, 3, 1)  # B H W C
        short = (down @ rows.flatten(2)).unflatten(2, rows.shape[2:])  # B h W C
        return (across @ short).permute(0, 3, 1, 2)
    return down @ (gradient @ across.T)


class _Bilinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: Size, align_corners: bool) -> Tensor:
        ctx.size, ctx.align_corners = (x.shape[-2], x.shape[-1]), align_corners
        return torch.ops.aten.upsample_bilinear2d.default(x, size, align_corners)  # gathers: nothing to be ordered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return bilinear_adjoint(gradient, ctx.size, ctx.align_corners), None, None


def _weights(small: int, large: int, align_corners: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(small, large) what each input gives to each output."""
    exact = torch.float32 if dtype.itemsize < 4 else dtype
    with torch.inference_mode(False):  # it is kept, and may meet a gradient that is differentiated in its turn
        low, share = upsampling.mixes(small, large, align_corners, exact, device)
        return upsampling.matrix(low, share, small).T.to(dtype).contiguous()


_kept = lru_cache(maxsize=64)(_weights)  # so that a step costs no launches for them; a compiler makes them in passing
