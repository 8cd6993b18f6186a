"""Eq. (1) and (5) of one sweep over the bands of a batch, in PyTorch: the contract of `similarity_cpu.Cosines`, which
does in C what lies between the two products, and of `gpu.similarity.Cosines`."""

from __future__ import annotations

import torch
from torch import Tensor

from protoseg.kernels import class_errors, contrast, gemm
from protoseg.kernels.class_errors import Band
from protoseg.kernels.shards import Shard


def unit_rows(raw: Tensor, out: Tensor) -> None:
    """(n, D) rows at unit length -> `out`."""
    torch.div(raw, torch.linalg.vector_norm(raw, dim=1, keepdim=True).clamp_min(1e-12), out=out)


class Cosines:
    """What a sweep is told, and where it leaves what it finds of its bands.

    Args:
        embedding: (N, D) contiguous, its unit rows come with `fill`, a band's before its `nearest`.
        prototypes: (C, K, D) unit vectors of the same type.
        classes: (N,) class of a pixel, -1 for void or another rank's. target: (N,) its prototype, needed without
            siblings.
        temperature, siblings: of Eq. (5).
        valid: (N,) which pixels have a class, on this rank or on another.
        shard, negatives, negative_weight: as in `similarity.Batch` and `Settings`.

    Attributes:
        tabled: whether a band's cosines exist as a table.
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
        self.embedding = embedding
        self.num_classes, self.num_prototypes, _ = prototypes.shape
        self.flat = prototypes.flatten(0, 1)
        self.transposed = self.flat.T.contiguous()
        self.classes, self.valid = classes, valid
        self.target = None if siblings else target
        self.temperature = temperature
        self.shard, self.negatives, self.negative_weight = shard, negatives, negative_weight
        self.own = embedding.new_empty(self.num_prototypes, len(embedding))
        self.log_sum = embedding.new_empty(len(embedding))
        self._work = embedding.new_empty(0)

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
        part = slice(start, end)
        table = gemm.similarities(self.flat, self.embedding[part])  # CK n
        best, masses = self._compared(table, part, contrasted=losses and self.negatives is None)
        if losses and self.negatives is not None:
            far, near, total, shift = contrast.drawn_negatives(
                table, self.own[:, part], self.classes[part], self._target(part), self.negatives,
                self.negative_weight, self.temperature, self.shard,
            )  # fmt: skip
            self.log_sum[part] = total.log() + shift
            masses = [far.div_(total), near.div_(total)]
        elif losses and self.shard is not None:
            self.log_sum[part] = self.shard.log_sum_exp(self.log_sum[part])
        return best, [table, best, *masses]

    def errors(self, band: Band, seen: list[Tensor], start: int, end: int) -> None:
        """What the classes got wrong of pixels [start, end), into the band; before `gradient`, which overwrites."""
        class_errors.add(band, seen[0], self.embedding[start:end])

    def push(self, share: Tensor, factor: float) -> None:
        """What the log-sum-exp's gradient is multiplied by: a () tensor and a number; 0 for void pixels."""
        self.share = self.valid * (share * (factor / self.temperature))  # N

    def gradient(self, slope: Tensor, seen: list[Tensor], start: int, end: int, out: Tensor) -> None:
        """The gradient of pixels [start, end) to the unit rows, but for the pull of their own prototypes.

        Args:
            slope: (C, n) gradient to what `nearest` gave. seen: from `nearest`; a table in it is overwritten.
            out: (n, D), filled.
        """
        part, (table, best, *masses) = slice(start, end), seen
        weights = self._weights(table, best, slope, masses, part)
        if self.negatives is not None:
            far, near = (self.share[part] * mass for mass in masses)
            contrast.add_drawn(weights, far, near, self.negatives, self.classes[part])
        gemm.weighted_prototypes(weights, self.flat, self.transposed, out)

    def _compared(self, table: Tensor, part: slice, *, contrasted: bool) -> tuple[Tensor, list[Tensor]]:
        """The nearest of each class; fills `own` and, if `contrasted` with all prototypes, this rank's `log_sum`.

        Returns:
            (C, n), and what `_weights` wants beside it.
        """
        by_class, classes = table.view(self.num_classes, self.num_prototypes, -1), self.classes[part]
        best = by_class.amax(1)
        mine = classes.clamp(min=0).expand(1, self.num_prototypes, -1)
        own = torch.gather(by_class, 0, mine)[0]  # K n
        self.own[:, part] = own
        if not contrasted:
            return best, []
        mass, total, shift = contrast.all_negatives(table, best, own, classes, self._target(part), self.temperature)
        self.log_sum[part] = total.log() + shift
        return best, [mass, shift[None]]

    def _weights(self, table: Tensor, best: Tensor, slope: Tensor, masses: list[Tensor], part: slice) -> Tensor:
        """(C*K, n) weights of the prototypes in the gradient, but for the drawn ones'; overwrites the table."""
        tied = table.view(self.num_classes, self.num_prototypes, -1).eq_(best[:, None])  # the cosines become 0 and 1
        each = (slope / tied.sum(1).clamp_(min=1))[:, None]
        weights = self._whole(table)
        torch.mul(tied, each, out=weights.view(tied.shape))
        if self.negatives is None:
            mass, shift = masses
            weights.addcmul_(mass, self.share[part] * (shift[0] - self.log_sum[part]).exp())
        return weights

    def _whole(self, table: Tensor) -> Tensor:
        """The table, or where it is a part of another, room for one like it, whole in memory as a product wants it: the
        same for all bands, for fresh memory costs page faults."""
        if table.is_contiguous():
            return table
        if self._work.numel() < table.numel():
            self._work = table.new_empty(table.numel())
        return self._work[: table.numel()].view(table.shape)

    def _target(self, part: slice) -> Tensor | None:
        return None if self.target is None else self.target[part]
