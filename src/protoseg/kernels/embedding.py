"""What the 2022 code does to the projected features, and back: the norm along the image width (or over channels), then
a LayerNorm over channels. By autograd these are a dozen passes over N x D, and on a CPU each pays fresh memory in
page faults; here a few image rows at a time stay in cache, and only their norms and moments are kept. Where there is a
C compiler and pixels lie whole in memory, `embedding.c` takes an image row at a time instead."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from protoseg.kernels import native
from protoseg.kernels.derivatives import first_only

PIECE = 200_000  # numbers
SHORTEST = 1e-12  # a length is held at it, as in `method.similarity.unit`


def normed_rows(
    features: Tensor, norm: Literal["channel", "width"], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """(B, D, h, w) features of unit length over channels or along the width, LayerNorm over channels -> (N, D).

    Args:
        weight, bias: (D,) of the LayerNorm; None: there is none.
        eps: of the LayerNorm.

    Returns:
        Rows in the order (b h w), in fp32 at least.
    """
    return NormedRows.apply(features, weight, bias, eps, 2 if norm == "width" else 3)


class NormedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, axis: int
    ) -> Tensor:
        B, D, h, w = features.shape
        dtype = torch.promote_types(features.dtype, torch.float32)
        pixels = features.detach().permute(0, 2, 3, 1)  # B h w D
        out = torch.empty(B, h, w, D, dtype=dtype, device=features.device)
        lengths = torch.empty(B, h, 1, D, dtype=dtype, device=out.device) if axis == 2 else out.new_empty(B, h, w, 1)
        moments = out.new_empty(2, B, h, w, 1) if weight is not None else None
        ctx.axis, ctx.in_c = axis, _in_c(pixels, weight, bias)
        ctx.save_for_backward(features, lengths, weight, bias, moments)
        if ctx.in_c:
            _call("normed_rows", pixels, axis, weight, bias, eps, out, lengths, moments)
            return out.view(-1, D)
        for part in _pieces(pixels):
            piece = pixels[part].to(dtype)
            squares = torch.mul(piece, piece, out=out[part])  # `vector_norm` is slow along any but the last axis
            lengths[part] = squares.sum(axis, keepdim=True).sqrt_().clamp_(min=SHORTEST)
            torch.div(piece, lengths[part], out=out[part])
            if moments is not None and weight is not None and bias is not None:
                rows, moments[0][part], moments[1][part] = torch.native_layer_norm(
                    out[part], (D,), weight.to(dtype), bias.to(dtype), eps
                )
                out[part] = rows
        return out.view(-1, D)

    @staticmethod
    @first_only
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, lengths, weight, bias, moments = ctx.saved_tensors
        D = features.shape[1]
        pixels = features.permute(0, 2, 3, 1)
        gradient = gradient.view(*pixels.shape)
        back = torch.empty_like(features)
        back_pixels = back.permute(0, 2, 3, 1)
        wanted = [True, *ctx.needs_input_grad[1:3]]
        if ctx.in_c:
            learned = None if weight is None else lengths.new_empty(2, D)
            gradient = gradient.contiguous()
            _call("normed_rows_backward", pixels, ctx.axis, weight, lengths, moments, gradient, back_pixels, learned)
            of_weight, of_bias = (None, None) if learned is None else learned.unbind()
            made = back, of_weight, of_bias
            return *(g if need else None for g, need in zip(made, ctx.needs_input_grad)), None, None
        to_weight = lengths.new_zeros(D) if wanted[1] else None
        to_bias = lengths.new_zeros(D) if wanted[2] else None
        for part in _pieces(pixels):
            length = lengths[part]
            g, unit = gradient[part], torch.empty_like(gradient[part], memory_format=torch.contiguous_format)
            torch.div(pixels[part].to(unit.dtype), length, out=unit)
            if weight is not None:
                learned = weight.to(unit.dtype), bias.to(unit.dtype)
                g, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
                    g, unit, (D,), moments[0][part], moments[1][part], *learned, wanted
                )
                if to_weight is not None:
                    to_weight += of_weight
                if to_bias is not None:
                    to_bias += of_bias
            radial = (g * unit).sum(ctx.axis, keepdim=True)
            back_pixels[part] = g.addcmul(unit, radial, value=-1).div_(length).masked_fill_(length <= SHORTEST, 0)
        return (
            back if ctx.needs_input_grad[0] else None,
            None if to_weight is None else to_weight.to(weight.dtype),
            None if to_bias is None else to_bias.to(weight.dtype),
            None,
            None,
        )


@cache
def _library() -> ctypes.CDLL | None:
    return native.load(Path(__file__).with_name("embedding.c"))


def _in_c(pixels: Tensor, *learned: Tensor | None) -> bool:
    """Whether C takes (B, h, w, D) pixels with these parameters of a LayerNorm."""
    here = [pixels, *(t for t in learned if t is not None)]
    return native.takes(*here) and all(t.is_contiguous() for t in here) and _library() is not None


def _call(function: str, pixels: Tensor, axis: int, *arguments: Tensor | float | None) -> None:
    B, h, w, D = pixels.shape
    native.call(
        _library(), native.typed(function, pixels), pixels, B * h, w, D, axis == 2, *arguments, torch.get_num_threads()
    )


def _pieces(pixels: Tensor) -> Iterator[tuple[slice, slice]]:
    """(images, rows) of (B, h, w, D): whole rows, for the norm runs along them."""
    B, h, w, D = pixels.shape
    if pixels.device.type != "cpu":
        yield slice(0, B), slice(0, h)
        return
    step = max(1, PIECE // max(w * D, 1))
    for b in range(B):
        for row in range(0, h, step):
            yield slice(b, b + 1), slice(row, min(row + step, h))
