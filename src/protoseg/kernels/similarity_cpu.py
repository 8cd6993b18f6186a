"""`similarity.c`: what lies between and after the two products of a band, on the CPU. Callers ask `takes` first and
have PyTorch lines for where it says no."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protoseg.kernels import cosines, native
from protoseg.kernels.class_errors import Band


@cache
def _library() -> ctypes.CDLL | None:
    return native.load(Path(__file__).with_name("similarity.c"))


def takes(*tensors: Tensor) -> bool:
    """Whether C takes these floating tensors, each whole in memory."""
    return native.takes(*tensors) and all(t.is_contiguous() for t in tensors) and _library() is not None


def _call(function: str, like: Tensor, *arguments: Tensor | int | float | None) -> None:
    native.call(_library(), native.typed(function, like), *arguments, torch.get_num_threads())


def unit_rows(raw: Tensor, out: Tensor) -> None:
    """(n, D) rows of any strides, at unit length -> `out`."""
    _call("unit_rows", out, raw.contiguous(), *raw.shape, out)


def cross_entropy_(
    logits: Tensor, labels: Tensor, ignore_index: int, class_weights: Tensor | None, share: Tensor
) -> Tensor:
    """`upsampling.cross_entropy_` with all classes on this rank."""
    loss = logits.new_empty(())
    share = share.to(logits.dtype)
    _call("cross_entropy", logits, logits, *logits.shape, labels.contiguous(), ignore_index, class_weights, share, loss)
    return loss


def strip_cross_entropy(
    widened: Tensor,
    gradient: Tensor,
    mix: tuple[Tensor, Tensor],
    rows: tuple[int, int],
    top: int,
    labels: Tensor,
    ignore_index: int,
    class_weights: Tensor | None,
    share: Tensor,
) -> Tensor:
    """`upsampling.strip_cross_entropy`, rows mixed as they are needed: no strip of logits exists.

    Args:
        mix: of each label row the first of the two feature rows it mixes, (H,) int64, and their shares, (H, 2).
    """
    planes, high, width = widened.shape
    images, height, _ = labels.shape
    loss = widened.new_empty(())
    _call(
        "strip_cross_entropy", widened, widened, gradient, planes // images, images, high, width, top, *mix, *rows,
        labels.contiguous(), height, ignore_index, class_weights, share.to(widened.dtype), loss,
    )  # fmt: skip
    return loss


def finish(
    gradient: Tensor,
    embedding: Tensor,
    raw: Tensor,
    prototypes: Tensor,
    target: Tensor,
    near: Tensor,
    contrast_share: Tensor,
    distance_share: Tensor,
) -> None:
    """In place: the pull of each pixel's own prototype joins the (N, D) gradient, which goes back through the length.

    Args:
        embedding, raw: (N, D) with and without unit length. prototypes: (C*K, D). target: (N,) or -1.
        near: (N,) cosine with it. contrast_share: () that of Eq. (5), over tau; distance_share: () that of Eq. (6).
    """
    contrast_share, distance_share = contrast_share.to(raw.dtype), distance_share.to(raw.dtype)
    lengths = torch.linalg.vector_norm(raw, dim=1)
    _call(
        "finish", raw, gradient, embedding, lengths, prototypes, target, near.contiguous(), contrast_share,
        distance_share, *raw.shape,
    )  # fmt: skip


class Cosines(cosines.Cosines):
    """The same with C between the products."""

    def __init__(self, *told: Any):
        super().__init__(*told)
        self._slope = 1 / self.temperature
        # Cosines lie in [-1, 1]: with 1 for the largest no sum can vanish while e^(-2 / tau) is a number.
        self._one_sweep = math.exp(-2 / self.temperature) > torch.finfo(self.embedding.dtype).tiny

    def fill(self, raw: Tensor | None, start: int, end: int) -> None:
        if raw is not None:
            unit_rows(raw[start:end], self.embedding[start:end])

    def errors(self, band: Band, seen: list[Tensor], start: int, end: int) -> None:
        table, best, *_ = seen
        _call(
            "errors", table, table, table.stride(0), *self._sizes(table), best, best.stride(0), band.errors,
            band.errors.stride(0), self.classes[start:end], self.embedding[start:], self.embedding.shape[1], band.taken,
            band.lacking,
        )  # fmt: skip

    def _compared(self, table: Tensor, part: slice, *, contrasted: bool) -> tuple[Tensor, list[Tensor]]:
        best = table.new_empty(self.num_classes, table.shape[1])
        _call(
            "nearest", table, table, table.stride(0), *self._sizes(table), self.classes[part], self._target(part),
            self._slope, best, self.own[:, part.start :], self.own.stride(0),
            self.log_sum[part] if contrasted else None, self._one_sweep,
        )  # fmt: skip
        return best, []

    def _weights(self, table: Tensor, best: Tensor, slope: Tensor, masses: list[Tensor], part: slice) -> Tensor:
        share, weights = self.share[part], self._whole(table)
        _call(
            "weights", table, table, table.stride(0), *self._sizes(table), self.classes[part], self._target(part),
            self._slope, best, best.stride(0), slope, slope.stride(0), self.log_sum[part],
            torch.zeros_like(share) if masses else share.contiguous(), weights, weights.stride(0),
        )  # fmt: skip
        return weights

    def _sizes(self, table: Tensor) -> tuple[int, int, int]:
        return self.num_classes, self.num_prototypes, table.shape[1]
