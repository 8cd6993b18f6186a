"""`Segmenter`: an image of any size in, class scores of its size out."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.config import Head, Model
from protoseg.method.head import PrototypeHead
from protoseg.method.inference import FrozenHead, bilinear_labels, freeze
from protoseg.method.losses import Losses, segmentation_cross_entropy
from protoseg.method.resizing import bilinear
from protoseg.models.blocks import ConvNormAct, start_for_relu


class AuxiliaryHead(nn.Sequential):
    """FCN on a middle map, for training only: conv3x3, batch norm, ReLU, dropout, linear."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 256):
        mix, classifier = ConvNormAct(in_channels, width), nn.Conv2d(width, num_classes, 1)
        start_for_relu(mix)
        nn.init.normal_(classifier.weight, std=0.01)
        super().__init__(mix, nn.Dropout2d(0.1), classifier)


class Segmenter(nn.Module):
    """Normalise, pad, backbone, decoder, head, resize, crop.

    Args:
        backbone: images (B, 3, H, W) -> list of maps; with `channels`, `strides`, `multiple`.
        decoder: list of maps -> (B, D', h, w).
        head: a `PrototypeHead` or a parametric one.
        mean, std: of RGB pixels in [0, 1].
        auxiliary_weight: of a cross-entropy on the last but one map; 0 builds none.
        freeze_backbone: its parameters learn nothing, and it stays in eval mode (batch statistics, dropout).
        settings: the `Model` and `Head` this was built from; what `models.saving` writes.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        decoder: nn.Module,
        head: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        auxiliary_weight: float = 0.0,
        freeze_backbone: bool = False,
        settings: tuple[Model, Head] | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder
        self.head: Any = head
        self.auxiliary: nn.Module | None = None
        if auxiliary_weight:
            self.auxiliary = AuxiliaryHead(backbone.channels[-2], head.num_classes)  # type: ignore[index,arg-type]
        self.auxiliary_weight = auxiliary_weight
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            backbone.requires_grad_(False)
        self.multiple: int = backbone.multiple  # type: ignore[assignment]
        least = getattr(decoder, "least_cells", 1) * backbone.strides[-1]  # type: ignore[index]
        self.least = self.multiple * math.ceil(least / self.multiple)
        self.settings = settings
        # Not in the state dict: config.json holds them, readable, and a file that changed them silently would be worse.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)  # a training step takes 0.75 to 0.8 of its time on a CPU

    def train(self, mode: bool = True) -> Segmenter:
        """As of any module, but that a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) RGB, uint8 or float in [0, 1], any H and W -> (B, C, H, W) class scores."""
        H, W = images.shape[-2:]
        scores, size = self.coarse(images)
        scores = bilinear(scores, size, align_corners=self.head.align_corners)
        return scores[..., :H, :W]

    def coarse(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """`forward` before the resize: (B, C, h, w) class scores, and the padded (height, width) they go to."""
        padded = self._prepare(images)
        return self.head(self.decoder(self.backbone(padded))), (padded.shape[-2], padded.shape[-1])

    @torch.no_grad()
    def labels(self, images: Tensor, *, dtype: torch.dtype = torch.int64) -> Tensor:
        """(B, 3, H, W) images -> (B, H, W) class of highest score: the arg-max of `forward` away from ties.

        The (B, C, H, W) table of scores at image size is never made: only pixels along the borders of classes are
        resized at all. Takes half of the head's time off at 150 classes, and a frozen head (`method.inference`) more.
        """
        H, W = images.shape[-2:]
        padded = self._prepare(images)
        size = (padded.shape[-2], padded.shape[-1])
        features = self.decoder(self.backbone(padded))
        if isinstance(self.head, FrozenHead):
            labels = self.head.labels(features, size, dtype=dtype)
        else:
            labels = bilinear_labels(self.head(features), size, align_corners=self.head.align_corners, dtype=dtype)
        return labels[..., :H, :W]

    def for_inference(self) -> Segmenter:
        """This network with its prototype head frozen (`method.inference.freeze`, full precision, nothing pruned).

        Scores agree to rounding. Everything but the head is shared: in eval mode, for a network that trains no more.
        """
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        if isinstance(self.head, PrototypeHead):
            twin.head = freeze(self.head)
        return twin

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, D', h, w) what the head sees of the padded images."""
        return self.decoder(self.backbone(self._prepare(images)))

    def losses(self, images: Tensor, labels: Tensor) -> Losses:
        """The head's losses, plus the auxiliary one in `.total` and `.parts["aux"]` where there is one.

        Args:
            images: (B, 3, H, W) as in `forward`.
            labels: (B, H, W) int64 of the same size; padding is labelled `ignore_index`.
        """
        if labels.shape[-2:] != images.shape[-2:]:
            raise ValueError(
                f"labels are {tuple(labels.shape[-2:])} but images {tuple(images.shape[-2:])}; cut both the same way"
            )
        padded = self._prepare(images)
        bottom, right = padded.shape[-2] - labels.shape[-2], padded.shape[-1] - labels.shape[-1]
        labels = F.pad(labels, (0, right, 0, bottom), value=self.head.ignore_index)
        maps = self.backbone(padded)
        losses = self.head.losses(self.decoder(list(maps)), labels)
        if self.auxiliary is None:
            return losses
        aux = segmentation_cross_entropy(
            self.auxiliary(maps[-2]),
            labels,
            ignore_index=self.head.ignore_index,
            class_weights=self.head.class_weights,
        )
        total = losses.total + self.auxiliary_weight * aux
        parts = {**losses.parts, "aux": aux.detach(), "loss": total.detach()}
        return replace(losses, total=total, parts=parts)

    def update(self, losses: Losses | Sequence[Losses]) -> None:
        """Move the prototypes; nothing for a parametric head."""
        self.head.update(losses)

    def _prepare(self, images: Tensor) -> Tensor:
        """Normalise, then pad at the bottom and right with the mean colour, which is 0 by then."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), given {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        elif not images.is_floating_point():
            raise ValueError(f"images must be uint8, or float in [0, 1]; given {images.dtype}")
        images = (images.to(self.mean.dtype) - self.mean) / self.std
        bottom, right = (max(-size % self.multiple, self.least - size) for size in images.shape[-2:])
        return F.pad(images, (0, right, 0, bottom)) if bottom or right else images


def count_parameters(segmenter: Segmenter) -> dict[str, int]:
    """How many numbers learn, and how many are stored without learning.

    Returns:
        `learnable` (all of them) and its parts `backbone`, `decoder`, `head`, `auxiliary`; `frozen` parameters;
        `prototypes` (C*K*D stored numbers, 0 for a parametric head), `other_buffers` (batch-norm statistics, counters).
    """

    def learning(module: nn.Module | None) -> int:
        return 0 if module is None else sum(p.numel() for p in module.parameters() if p.requires_grad)

    head = segmenter.head
    prototypes = head.prototypes.numel() if hasattr(head, "prototypes") else 0
    buffers = sum(b.numel() for b in segmenter.buffers())
    return {
        "learnable": learning(segmenter),
        "backbone": learning(segmenter.backbone),
        "decoder": learning(segmenter.decoder),
        "head": learning(head),
        "auxiliary": learning(segmenter.auxiliary),
        "frozen": sum(p.numel() for p in segmenter.parameters() if not p.requires_grad),
        "prototypes": prototypes,
        "other_buffers": buffers - prototypes,
    }
