"""`similarity.c`: what lies between and after the two products of a band, on the CPU. Callers ask `takes` first and
have PyTorch lines for where it says no."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from protoseg.kernels import contrast, gemm, native
from protoseg.kernels.class_errors import Band
from protoseg.kernels.shards import Shard


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


class Cosines:
    """One sweep over the bands of a batch; the contract is that of `gpu.similarity.Cosines`.

    Attributes:
        tabled: a band's cosines exist as a table.
        own: (K, N) cosines with the own class, of void pixels with class 0. log_sum: (N,) of Eq. (5).
    """

    tabled = True

    def __init__(
        self,
        embedding: Tensor,
        prototypes: Tensor,
        classes: Tensor,
        target: Tensor | None,
        temperature: float,
        siblings: bool,
        valid: Tensor,
        shard: Shard | None,
        negatives: Tensor | None,
        negative_weight: float,
    ):
        """As in `gpu.similarity.Cosines`, and, as in `similarity.Batch` and `Settings`, the last three.

        Args:
            valid: (N,) which pixels have a class, on this rank or on another.
        """
        self.valid = valid
        self.embedding = embedding
        self.num_classes, self.num_prototypes, _ = prototypes.shape
        self.flat = prototypes.flatten(0, 1)
        self.transposed = self.flat.T.contiguous()
        self.shard = shard
        self.classes = classes
        self.target = None if siblings else target
        self.temperature, self.slope = temperature, 1 / temperature
        self.negatives, self.negative_weight = negatives, negative_weight
        # Cosines lie in [-1, 1]: with 1 for the largest no sum can vanish while e^(-2 / tau) is a number.
        self.one_sweep = math.exp(-2 / temperature) > torch.finfo(embedding.dtype).tiny
        self.own = embedding.new_empty(self.num_prototypes, len(embedding))
        self.log_sum = embedding.new_empty(len(embedding))
        self.work = embedding.new_empty(0)

    def fill(self, raw: Tensor | None, start: int, end: int) -> None:
        """Bring rows [start, end) of `raw` (N, D) to unit length as the embedding; None: they are that already."""
        if raw is not None:
            unit_rows(raw[start:end], self.embedding[start:end])

    def nearest(self, start: int, end: int, *, losses: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Eq. (1) of pixels [start, end): fills `own` and, if `losses`, `log_sum`.

        Returns:
            (C, n) cosine with the nearest prototype of every class, and what `gradient` wants of these pixels: tensors
            with the pixels last, to be cut along them.
        """
        part, drawn = slice(start, end), self.negatives is not None
        table = gemm.similarities(self.flat, self.embedding[part])
        best, classes, target = table.new_empty(self.num_classes, end - start), self.classes[part], self._target(part)
        _call(
            "nearest", table, table, table.stride(0), *self._sizes(table), classes, target, self.slope, best,
            self.own[:, start:], self.own.stride(0), self.log_sum[part] if losses and not drawn else None,
            self.one_sweep,
        )  # fmt: skip
        if losses and self.negatives is not None:
            far, near, total, shift = contrast.drawn_negatives(
                table, self.own[:, part], classes, target, self.negatives, self.negative_weight, self.temperature,
                self.shard,
            )  # fmt: skip
            self.log_sum[part] = total.log() + shift
            return best, [table, best, far.div_(total), near.div_(total)]
        if losses and self.shard is not None:
            self.log_sum[part] = self.shard.log_sum_exp(self.log_sum[part])
        return best, [table, best]

    def errors(self, band: Band, seen: list[Tensor], start: int, end: int) -> None:
        """What the classes got wrong of pixels [start, end), into the band; before `gradient`, which overwrites."""
        table, best, *_ = seen
        _call(
            "errors", table, table, table.stride(0), *self._sizes(table), best, best.stride(0), band.errors,
            band.errors.stride(0), self.classes[start:end], self.embedding[start:], self.embedding.shape[1], band.taken,
            band.lacking,
        )  # fmt: skip

    def push(self, share: Tensor, factor: float) -> None:
        """What the log-sum-exp's gradient is multiplied by: a () tensor and a number; 0 for void pixels."""
        self.share = self.valid * (share * (factor / self.temperature))  # N

    def gradient(self, slope: Tensor, seen: list[Tensor], start: int, end: int, out: Tensor) -> None:
        """The gradient of pixels [start, end) to the unit rows, but for the pull of their own prototypes.

        Args:
            slope: (C, n) gradient to what `nearest` gave. seen: from `nearest`; a table in it is overwritten.
            out: (n, D), filled.
        """
        part, (table, best, *drawn) = slice(start, end), seen
        share = self.share[part]
        weights = table if table.is_contiguous() else self._room(table)
        classes, push = self.classes[part], torch.zeros_like(share) if drawn else share.contiguous()
        _call(
            "weights", table, table, table.stride(0), *self._sizes(table), classes, self._target(part),
            self.slope, best, best.stride(0), slope, slope.stride(0), self.log_sum[part], push, weights,
            weights.stride(0),
        )  # fmt: skip
        if self.negatives is not None:
            far, near = (share * masses for masses in drawn)
            contrast.add_drawn(weights, far, near, self.negatives, classes)
        gemm.weighted_prototypes(weights, self.flat, self.transposed, out)

    def _sizes(self, table: Tensor) -> tuple[int, int, int]:
        return self.num_classes, self.num_prototypes, table.shape[1]

    def _target(self, part: slice) -> Tensor | None:
        return None if self.target is None else self.target[part]

    def _room(self, table: Tensor) -> Tensor:
        """A table like this one, whole in memory, and the same for all bands: fresh memory costs page faults."""
        if self.work.numel() < table.numel():
            self.work = table.new_empty(table.numel())
        return self.work[: table.numel()].view(table.shape)
