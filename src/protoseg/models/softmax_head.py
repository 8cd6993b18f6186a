"""The parametric baselines: the contract of `PrototypeHead` without its memory. Their `update` does nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.method.head import Projection, build_projection
from protoseg.method.losses import Losses, check_labels, segmentation_cross_entropy, void_label, weights_of_classes
from protoseg.method.prototypes import starting_vectors


class SoftmaxHead(nn.Module):
    """A linear classifier of pixels, alone (`projection="none"`) or behind the prototype head's own projection.

    Args:
        in_channels: channels of the features.
        num_classes: C.
        projection: `none`, or `mlp` / `linear` as in `PrototypeHead`, for a baseline of equal capacity.
        embed_dim: D of the projection; default 256 with one, else `in_channels`.
        ignore_index: the void label; 255 unless given, and to be given with more than 255 classes.
        class_weights: C numbers, weights of the cross-entropy.
    """

    align_corners = False
    class_weights: Tensor | None

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        projection: Projection = "none",
        embed_dim: int | None = None,
        ignore_index: int | None = None,
        class_weights: Sequence[float] | None = None,
    ):
        super().__init__()
        if embed_dim is None:
            embed_dim = in_channels if projection == "none" else 256
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.ignore_index = void_label(ignore_index, num_classes)
        self.register_buffer("class_weights", weights_of_classes(class_weights, num_classes))
        self.projection = build_projection(in_channels, embed_dim, projection)
        self._build_classifier()

    def _build_classifier(self) -> None:
        self.classifier = nn.Conv2d(self.embed_dim, self.num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """(B, D', h, w) features -> (B, C, h, w) class scores."""
        return self.classifier(self.projection(features))

    def losses(self, features: Tensor, labels: Tensor) -> Losses:
        """Cross-entropy at label size; (B, H, W) int64 labels of any H, W. `.ppc` and `.ppd` are 0.

        Raises:
            ValueError: labels of the wrong shape or type or, checked on the CPU only, out of range.
        """
        check_labels(labels, len(features), self.num_classes, self.ignore_index)
        ce = segmentation_cross_entropy(
            self(features),
            labels,
            ignore_index=self.ignore_index,
            class_weights=self.class_weights,
            align_corners=self.align_corners,
        )
        return Losses.cross_entropy_only(ce)

    def update(self, losses: Losses | Sequence[Losses]) -> None:
        """Nothing to move: the weights learn by gradient."""


class CosineHead(SoftmaxHead):
    """One learnable unit vector per class, cosine times a learned scale: `PrototypeHead` with K = 1 and gradients.

    With several vectors a class scores as its best, as in `PrototypeHead` (sub-centres, Deng et al., ECCV 2020).

    Args:
        num_vectors: per class; several start as the prototypes do (`start="nested"`).
        score_scale: start of the scale. learn_scale: whether it learns, as one number, by its logarithm.
        (others): as `SoftmaxHead`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        num_vectors: int = 1,
        score_scale: float = 20.0,
        learn_scale: bool = True,
        projection: Projection = "mlp",
        embed_dim: int | None = None,
        ignore_index: int | None = None,
        class_weights: Sequence[float] | None = None,
    ):
        if num_vectors < 1:
            raise ValueError(f"num_vectors must be at least 1, given {num_vectors}")
        self.num_vectors = num_vectors
        super().__init__(
            in_channels,
            num_classes,
            projection=projection,
            embed_dim=embed_dim,
            ignore_index=ignore_index,
            class_weights=class_weights,
        )
        if score_scale <= 0:
            raise ValueError(f"score_scale must be positive, given {score_scale}")
        log_scale = torch.tensor(math.log(score_scale))
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def _build_classifier(self) -> None:
        if self.num_vectors == 1:
            vectors = F.normalize(torch.randn(self.num_classes, self.embed_dim), dim=1)
        else:
            vectors = starting_vectors(self.num_classes, self.num_vectors, self.embed_dim, "nested").flatten(0, 1)
        self.vectors = nn.Parameter(vectors)  # CK D

    def forward(self, features: Tensor) -> Tensor:
        """(B, D', h, w) features -> (B, C, h, w) scaled cosines, in fp32 at least."""
        embedding = self.projection(features)
        with torch.autocast(features.device.type, enabled=False):
            embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
            unit = F.normalize(embedding, dim=1)
            vectors = F.normalize(self.vectors, dim=1).to(unit.dtype)
            cosines = F.conv2d(unit, vectors[:, :, None, None])
            if self.num_vectors > 1:
                cosines = cosines.unflatten(1, (self.num_classes, self.num_vectors)).amax(2)
            return cosines * self.log_scale.exp()
