"""Classes over ranks: each rank holds the prototypes of some classes and all of them look at the same pixels. What one
pixel needs of all classes (largest score, sum of exponentials, the target's logit) is then reduced over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """This rank's classes among all.

    Attributes:
        first: the first of them. count: how many.
        widest: how many the rank with most of them has; bands and strips follow it, so that all ranks have the same.
        total, largest: sum and maximum over ranks.
    """

    first: int
    count: int
    widest: int
    total: Callable[[Tensor], Tensor]
    largest: Callable[[Tensor], Tensor]

    def local(self, classes: Tensor) -> Tensor:
        """Classes, negative or `ignore_index` for none, as [0, count) on this rank; -1 for none or another rank's."""
        local = classes - self.first
        return torch.where((local >= 0) & (local < self.count), local, -1)

    def log_sum_exp(self, local: Tensor) -> Tensor:
        """(n,) log-sum-exp over this rank's classes -> over all."""
        shift = self.largest(local)
        return self.total((local - shift).exp()).log() + shift

    def argmax(self, scores: Tensor) -> Tensor:
        """(count, n) scores -> (n,) class of the largest over all ranks; ties go to the first, as in `argmax`."""
        index = scores.argmax(0)
        best = scores.gather(0, index[None])[0]
        lowest = torch.iinfo(index.dtype).min
        return -self.largest(torch.where(best == self.largest(best), -(index + self.first), lowest))
