"""The rival of Eq. (4) that balances nothing: Lloyd's k-means inside the batch, started at the prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

from protoseg import kernels
from protoseg.method import ranks
from protoseg.method.clustering import Reduction
from protoseg.method.prototypes import assigned_sums
from protoseg.method.similarity import unit


def kmeans_assignment(
    embedding: Tensor,
    prototypes: Tensor,
    own: Tensor,
    classes: Tensor,
    *,
    iterations: int = 3,
    total: Reduction = ranks.total,
) -> Tensor:
    """Spherical k-means of each class's pixels, all classes at once, with the prototypes as first centres.

    A round gives every pixel to its nearest centre and puts every centre in the mean direction of its pixels; a centre
    without a pixel stays. One iteration is `clustering.nearest_assignment`.

    Args:
        embedding: (N, D) unit vectors. prototypes: (C, K, D).
        own: (N, K) cosine of each pixel with the prototypes of its own class.
        classes: (N,) class of a pixel, -1 where it has none.
        iterations: assignments made.
        total: sum over ranks.

    Returns:
        (N,) index in [0, K) within the pixel's own class; void pixels hold a value that means nothing.
    """
    C, K, _ = prototypes.shape
    base = classes.clamp(min=0) * K
    centres = prototypes.to(embedding.dtype).flatten(0, 1)  # CK D
    index = own.argmax(1)
    for _ in range(iterations - 1):
        sums, counts = assigned_sums(embedding, torch.where(classes < 0, -1, base + index), C * K, total)
        centres = torch.where(counts[:, None] > 0, unit(sums), centres)
        index = torch.stack([kernels.row_products(embedding, centres, base + k) for k in range(K)], 1).argmax(1)
    return index
