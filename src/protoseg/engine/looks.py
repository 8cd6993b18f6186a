"""Which prototype each pixel chose, how purely prototypes follow known looks, and the most typical places of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protoseg.method.resizing import bilinear
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
    table = bilinear(table, padded, align_corners=head.align_corners)
    return table[0, :, :H, :W].unflatten(0, head.prototypes.shape[:2])


def chosen_prototypes(similarity: Tensor) -> Tensor:
    """(C, K, H, W) cosines -> (H, W) int64, c·K + k of the most similar prototype: its c is the predicted class."""
    return similarity.flatten(0, 1).argmax(0)


def own_prototypes(similarity: Tensor, labels: Tensor, align_corners: bool = False) -> Tensor:
    """The most similar prototype of the class that every pixel really has, whatever the model takes it for.

    Args:
        similarity: (C, K, h, w) cosines, of `similarities`.
        labels: (H, W) int64 train ids, at any size; the cosines go there.
        align_corners: of the resize.

    Returns:
        (H, W) int64, k of the prototype; -1 where the label is no class.
    """
    chosen = torch.full_like(labels, -1)
    for c in labels.unique().tolist():
        if 0 <= c < len(similarity):  # a class at a time: the whole table at label size may be large
            table = bilinear(similarity[c][None], (labels.shape[0], labels.shape[1]), align_corners=align_corners)
            chosen = torch.where(labels == c, table[0].argmax(0), chosen)
    return chosen


def count_looks(chosen: Tensor, labels: Tensor, looks: Tensor, size: tuple[int, int, int]) -> Tensor:
    """How many pixels of each class in each look have each prototype.

    Args:
        chosen: (H, W) int64, prototype within the class; `labels`: (H, W), class; `looks`: (H, W), number of the look.
            A pixel where one of them is out of range does not count.
        size: (C, K, L), L looks.

    Returns:
        (C, K, L) float64.
    """
    C, K, L = size
    known = torch.ones_like(chosen, dtype=torch.bool)
    for of, most in ((labels, C), (chosen, K), (looks, L)):
        known &= (of >= 0) & (of < most)
    place = (labels[known] * K + chosen[known]) * L + looks[known]
    return torch.bincount(place, minlength=C * K * L).view(C, K, L).double()


def purity(part: Tensor) -> tuple[float, float]:
    """How well the prototypes of a class tell its looks apart, every look counted alike.

    The share of the class whose prototype's most frequent look is its own.

    Args:
        part: (K, L), how much of look l has prototype k.

    Returns:
        Purity, and what prototypes that know nothing of looks have: one over the number of looks that occur. NaN
        twice where none occurs.
    """
    there = part[:, part.sum(0) > 0].double()
    looks = there.shape[1]
    if not looks:
        return math.nan, math.nan
    return (there / there.sum(0)).amax(1).sum().item() / looks, 1 / looks


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
