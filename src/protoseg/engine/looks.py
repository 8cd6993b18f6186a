"""Which prototype each pixel chose, and the places in pictures that are most typical of a prototype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from protoseg.models.segmenter import Segmenter


@torch.no_grad()
def similarities(model: Segmenter, image: Tensor) -> Tensor:
    """Cosine of every pixel with every prototype, at image size.

    For looking at pictures of ordinary size: the table of C·K numbers a pixel is held whole.

    Args:
        model: in eval mode, with a prototype head.
        image: (3, H, W) uint8, or float in [0, 1].

    Returns:
        (C, K, H, W) float32 on the model's device.
    """
    H, W = image.shape[-2:]
    head = model.head
    features = model.features(image[None].to(model.mean.device))  # 1 D' h w
    prototypes = head.prototypes.flatten(0, 1).float()  # CK D
    cosine = head.embed(features).float() @ prototypes.T  # hw CK
    table = cosine.T.reshape(1, len(prototypes), *features.shape[-2:])
    padded = (H + -H % model.multiple, W + -W % model.multiple)
    table = F.interpolate(table, padded, mode="bilinear", align_corners=head.align_corners)
    return table[0, :, :H, :W].unflatten(0, head.prototypes.shape[:2])


def chosen_prototypes(similarity: Tensor) -> Tensor:
    """(C, K, H, W) cosines -> (H, W) int64, c·K + k of the most similar prototype: its c is the predicted class."""
    return similarity.flatten(0, 1).argmax(0)


@dataclass(frozen=True)
class Place:
    """A place in one of several pictures.

    Attributes:
        image: its number.
        row, column: of the pixel.
        cosine: similarity of the pixel with its prototype.
    """

    image: int
    row: int
    column: int
    cosine: float


@dataclass(frozen=True)
class Looks:
    """What the prototypes of a model stand for in some pictures.

    Attributes:
        share: (C, K) float64, the share of each prototype in the pixels that chose its class; NaN where none did.
        places: for each class and prototype the most typical places, best first, at most one per picture.
    """

    share: Tensor
    places: list[list[list[Place]]]


def find_looks(model: Segmenter, images: Sequence[Tensor], count: int = 4, margin: int = 0) -> Looks:
    """Go through pictures and note where each prototype is chosen, and where most clearly so.

    Args:
        model: in eval mode, with a prototype head.
        images: (3, H, W) each.
        count: places per prototype.
        margin: pixels from the border within which no place lies, so that a patch around it can be cut.
    """
    C, K = model.head.prototypes.shape[:2]
    counts = torch.zeros(C * K, dtype=torch.float64)
    found: list[list[Place]] = [[] for _ in range(C * K)]
    for number, image in enumerate(images):
        similarity = similarities(model, image)
        chosen = chosen_prototypes(similarity)
        counts += torch.bincount(chosen.flatten(), minlength=C * K).cpu()
        table = similarity.flatten(0, 1)
        for j in chosen.unique().tolist():
            inside = torch.zeros_like(chosen, dtype=torch.bool)
            rows, columns = slice(margin, chosen.shape[0] - margin), slice(margin, chosen.shape[1] - margin)
            inside[rows, columns] = chosen[rows, columns] == j
            if not inside.any():
                continue
            best = table[j].masked_fill(~inside, -2).flatten().argmax().item()
            row, column = divmod(int(best), chosen.shape[1])
            found[j].append(Place(number, row, column, table[j, row, column].item()))
    places = [sorted(at, key=lambda place: -place.cosine)[:count] for at in found]
    share = counts.view(C, K) / counts.view(C, K).sum(1, keepdim=True)
    return Looks(share, [places[c * K : (c + 1) * K] for c in range(C)])
