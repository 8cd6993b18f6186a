"""Eq. (1), (2): how near a pixel is to a prototype, and a class's score as that of its best prototype."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Distance = Literal["cosine", "euclidean", "huber"]
HUBER_DELTA = 0.1  # where the Huberised distance turns from square to linear
SHORTEST = 1e-12  # length of a vector with a direction; a shorter one counts as this
NEAREST = 1e-12  # the square root has no gradient at 0: a pixel on its prototype needs none


def unit(vectors: Tensor, dim: int = -1) -> Tensor:
    """Vectors of length 1 along `dim`, in fp32 at least; a zero vector stays zero (eps 1e-12).

    It has no gradient: that of `F.normalize`, a trillion times what comes in, lets one black pixel outweigh all others.
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    direction = vectors / length.clamp(min=SHORTEST)
    if not vectors.requires_grad:
        return direction
    return torch.where(length <= SHORTEST, direction.detach(), direction)


def embed(features: Tensor, norm: Literal["channel", "width"] = "channel") -> Tensor:
    """The embedding x of every pixel, before the unit length of Eq. (1) is taken.

    Args:
        features: (B, D, h, w) projected features.
        norm: `channel` leaves them as they are (the unit length over channels is all that is wanted); `width` divides
            every row of every channel by its norm along the image width, as the 2022 code does by mistake.

    Returns:
        (N, D) rows in the order (b h w), in fp32 at least.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if norm == "width":
        features = unit(features, dim=-1)
    return features.permute(0, 2, 3, 1).flatten(0, 2)  # N D


def cosine_similarity(embedding: Tensor, prototypes: Tensor) -> Tensor:
    """Eq. (1): cosine of every pixel with every prototype; the paper's distance is its negative.

    Args:
        embedding: (N, D) unit vectors.
        prototypes: (C, K, D) unit vectors.

    Returns:
        (N, C*K); column c*K + k belongs to prototype k of class c.
    """
    return embedding @ prototypes.to(embedding.dtype).flatten(0, 1).T


def measured(cosine: Tensor, distance: Distance = "cosine") -> Tensor:
    """Cosines as the similarity 1 - d that a distance d on the unit sphere gives; 1 on the prototype, -1 opposite it.

    `cosine` is d = 1 - cos, the paper's. `euclidean` is the chord, d = |x - p| = sqrt(2 - 2 cos); its square is the
    cosine again. `huber` rounds the chord off near the prototype, d = sqrt(delta^2 + |x - p|^2) - delta. All three
    order prototypes alike: they differ in how much a pixel gains by coming nearer, so in loss and clustering.
    """
    if distance == "cosine":
        return cosine
    square = 2 - 2 * cosine
    if distance == "euclidean":
        return 1 - square.clamp(min=NEAREST).sqrt()
    return 1 + HUBER_DELTA - (square.clamp(min=0) + HUBER_DELTA**2).sqrt()


def class_similarity(similarity: Tensor, num_classes: int) -> Tensor:
    """Eq. (1), (2): a class is as near as its nearest prototype, s_ic = max over k of x_i . p_ck.

    Tied maxima share the gradient equally (`amax`): collapsed prototypes make exact ties real.

    Args:
        similarity: (N, C*K).

    Returns:
        (N, C).
    """
    return similarity.unflatten(1, (num_classes, -1)).amax(2)


def own_similarity(similarity: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Each pixel's cosine with the K prototypes of its own class: what clustering sees, Eq. (3).

    Args:
        similarity: (N, C*K).
        classes: (N,) class of a pixel, -1 where it has none.

    Returns:
        (N, K); rows of pixels without a class hold class 0's values, to be masked by the caller.
    """
    table = similarity.unflatten(1, (num_classes, -1))  # N C K
    index = classes.clamp(min=0)[:, None, None].expand(-1, 1, table.shape[2])
    return table.gather(1, index).squeeze(1)
