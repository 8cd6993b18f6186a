"""What the classes got wrong in a band of pixels, for prototypes that are moved by it (`method.losses.Errors`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Band(NamedTuple):
    """A band's errors, and where they go.

    Attributes:
        errors: (C, n) of any unit. classes: (n,) own class, -1 for none.
        taken: (C*K, D), added to: the pixels' unit rows, times the errors of other classes, at the nearest prototype of
            each. lacking: (n,), filled: the error of the own class, 0 where there is none.
    """

    errors: Tensor
    classes: Tensor
    taken: Tensor
    lacking: Tensor


def add(band: Band, cosines: Tensor, embedding: Tensor) -> None:
    """A band's errors where no kernel is at hand; of equal cosines the first is the nearest.

    Args:
        cosines: (C*K, n). embedding: (n, D) unit rows.
    """
    errors, classes, taken, lacking = band
    own = classes.clamp(min=0)[None]  # 1 n
    picked = errors.gather(0, own)
    mine = picked * (classes >= 0)
    lacking.copy_(mine[0])
    others = errors.scatter(0, own, picked - mine)
    table = cosines.view(len(errors), -1, len(classes))  # C K n
    weights = torch.zeros_like(table).scatter_(1, table.argmax(1, keepdim=True), others[:, None])
    taken.addmm_(weights.flatten(0, 1), embedding)
