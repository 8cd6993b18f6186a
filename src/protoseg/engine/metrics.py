"""What a prediction is worth: sums over a whole split, never averages of averages.

The convention is MMSegmentation's `IoUMetric` (the macro Jaccard index): one int64 confusion matrix over every pixel of
the split at the ORIGINAL label size; a class that is in neither labels nor predictions is NaN and left out of the mean;
a class that is only predicted counts as 0. How many classes a mean is over is always said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from protoseg.config import DataError

DILATION_RATIO = 0.02  # of the image diagonal; Cheng et al., "Boundary IoU", CVPR 2021, section 5.1


@dataclass(frozen=True)
class Overlap:
    """Everything that follows from a confusion matrix. Ratios whose denominator is 0 are NaN.

    Attributes:
        iou: (C,) float64, intersection over union.
        accuracy: (C,) float64, share of a class's labelled pixels that were found (recall).
        miou: mean of `iou` over the classes where it is a number.
        averaged: how many classes that mean is over.
        mean_accuracy: mean of `accuracy` over the classes that have labelled pixels.
        pixel_accuracy: share of labelled pixels that are right.
        frequency_weighted_iou: `iou` weighted with each class's share of labelled pixels.
    """

    iou: Tensor
    accuracy: Tensor
    miou: float
    averaged: int
    mean_accuracy: float
    pixel_accuracy: float
    frequency_weighted_iou: float


def overlap(matrix: Tensor) -> Overlap:
    """Derive IoU and accuracies from a confusion matrix.

    Args:
        matrix: (C, C) int64, rows the truth, columns the prediction.
    """
    counts = matrix.cpu().double()
    hits, truth, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)  # C
    iou = hits / (truth + predicted - hits)  # 0 / 0 is NaN: the class is nowhere
    accuracy = hits / truth
    total = truth.sum()
    present = truth > 0
    return Overlap(
        iou=iou,
        accuracy=accuracy,
        miou=iou.nanmean().item(),
        averaged=int(iou.isfinite().sum()),
        mean_accuracy=accuracy.nanmean().item(),
        pixel_accuracy=(hits.sum() / total).item(),
        frequency_weighted_iou=(truth[present] * iou[present]).sum().div(total).item(),
    )


class ConfusionMatrix(Metric):
    """Counts of (truth, prediction) over a split, as one int64 C×C sum that ranks add up exactly.

    `compute()` gives the (C, C) matrix, `overlap()` what follows from it.
    """

    full_state_update = False
    higher_is_better = True
    matrix: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.add_state("matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor, name: str = "") -> None:
        """Add one image or one batch.

        Args:
            predictions: integers in [0, C), any shape.
            labels: integers of the same shape; `ignore_index` pixels do not count.
            name: what the message calls the image if something is wrong with it.

        Raises:
            DataError: a label is neither a class nor `ignore_index`, or the shapes differ.
        """
        predictions, labels = _checked(predictions, labels, self.num_classes, self.ignore_index, name)
        index = labels.long() * self.num_classes + predictions.long()
        self.matrix += torch.bincount(index, minlength=self.num_classes**2).reshape_as(self.matrix)

    def compute(self) -> Tensor:
        """(C, C) int64, summed over all ranks."""
        return self.matrix

    def overlap(self) -> Overlap:
        """IoU and accuracies of everything seen so far, on all ranks."""
        return overlap(self.compute().reshape(self.num_classes, self.num_classes))  # torchmetrics squeezes 1×1


def _checked(
    predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int, name: str
) -> tuple[Tensor, Tensor]:
    """The labelled pixels of both, flat. An out-of-range value would land in another class's cell: refuse it."""
    image = f"{name}: " if name else ""
    if predictions.shape != labels.shape:
        raise DataError(
            f"{image}the prediction is {tuple(predictions.shape)} but the label is {tuple(labels.shape)}; "
            "metrics are computed at the label's own size"
        )
    keep = labels != ignore_index
    labels, predictions = labels[keep], predictions[keep]
    if labels.numel() and (labels.min() < 0 or labels.max() >= num_classes):
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        values = ", ".join(str(v) for v in wrong.unique()[:8].tolist())
        raise DataError(
            f"{image}{wrong.numel()} labelled pixels have the value {values}, which is neither one of the "
            f"{num_classes} classes (0 to {num_classes - 1}) nor ignored ({ignore_index}); "
            "map or ignore it in the data set's YAML (protoseg data check lists all of them)"
        )
    assert not predictions.numel() or (predictions.min() >= 0 and predictions.max() < num_classes)
    return predictions, labels


class BoundaryIoU(Metric):
    """Boundary IoU (Cheng et al., CVPR 2021): IoU of the pixels near each mask's own contour, per class.

    A class's boundary region is the part of its mask within d pixels of the mask's contour, d being 2 % of the image
    diagonal (at least 1): the mask less its erosion by a (2d+1)² square, where the image border counts as contour, as
    in the authors' `mask_to_boundary`. Intersections and unions are summed over the split before they are divided.
    Nobody knows where a contour runs below ignored pixels, so those end no mask (they belong to every mask that is
    eroded) and do not count.
    """

    full_state_update = False
    higher_is_better = True
    intersection: Tensor
    union: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255, ratio: float = DILATION_RATIO, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.ratio = ratio
        for state in ("intersection", "union"):
            self.add_state(state, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor, name: str = "") -> None:
        """Add one image.

        Args:
            predictions: (H, W) integers in [0, C).
            labels: (H, W) integers, `ignore_index` allowed.
            name: what the message calls the image if something is wrong with it.

        Raises:
            DataError: as `ConfusionMatrix.update`.
        """
        _checked(predictions, labels, self.num_classes, self.ignore_index, name)
        radius = boundary_width(labels.shape[-2], labels.shape[-1], self.ratio)
        ignored = labels == self.ignore_index
        near_truth = boundaries(labels, ignored, radius)
        near_prediction = boundaries(predictions, ignored, radius)
        both = near_truth & near_prediction & (labels == predictions)
        shared = self._count(labels[both])
        self.intersection += shared
        self.union += self._count(labels[near_truth]) + self._count(predictions[near_prediction]) - shared

    def _count(self, classes: Tensor) -> Tensor:
        return torch.bincount(classes.long(), minlength=self.num_classes)

    def compute(self) -> Tensor:
        """(C,) float64; NaN for a class without any boundary in labels and predictions."""
        return self.intersection.double() / self.union.double()


def boundary_width(height: int, width: int, ratio: float = DILATION_RATIO) -> int:
    """How many pixels a boundary region is wide: `ratio` of the diagonal, at least 1."""
    return max(1, round(ratio * math.hypot(height, width)))


def boundaries(labels: Tensor, ignored: Tensor, radius: int) -> Tensor:
    """The boundary regions of all classes at once.

    A pixel survives the erosion of its own class exactly when its (2·radius+1)² window holds no other class, that is,
    when largest and smallest class in the window are the same. So two window maxima replace C erosions.

    Args:
        labels: (H, W) integer classes, at most 32,000.
        ignored: (H, W) bool, pixels that end no mask.
        radius: pixels.

    Returns:
        (H, W) bool: True where a pixel lies in the boundary region of its own class; False where ignored.
    """
    outside = torch.iinfo(torch.int16)
    both = torch.stack([labels, -labels]).to(torch.int16)  # 2 H W: the maximum of -labels is the minimum of labels
    padded = torch.nn.functional.pad(both.masked_fill(ignored, outside.min), [radius] * 4, value=outside.max)
    extreme = window_maximum(window_maximum(padded, radius, -1), radius, -2)
    inner = (extreme == both).all(0)
    return ~inner & ~ignored


def window_maximum(values: Tensor, radius: int, dim: int) -> Tensor:
    """Maximum over windows of 2·radius+1 along `dim`, valid windows only, in log2(radius) passes (by doubling)."""
    size, width = 2 * radius + 1, 1
    while 2 * width <= size:
        values = torch.maximum(
            values.narrow(dim, 0, values.shape[dim] - width), values.narrow(dim, width, values.shape[dim] - width)
        )
        width *= 2
    rest = size - width  # the window is two overlapping ones of a power of two
    length = values.shape[dim] - rest
    return torch.maximum(values.narrow(dim, 0, length), values.narrow(dim, rest, length))


class CalibrationError(Metric):
    """Expected calibration error (Guo et al., ICML 2017) of the predicted class, over all labelled pixels."""

    full_state_update = False
    higher_is_better = False
    count: Tensor
    confidence: Tensor
    hits: Tensor

    def __init__(self, ignore_index: int = 255, bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index
        self.bins = bins
        self.add_state("count", torch.zeros(bins, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("hits", torch.zeros(bins, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("confidence", torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor, confidence: Tensor) -> None:
        """Add one image: (H, W) classes, labels and the probability of the predicted class."""
        keep = labels != self.ignore_index
        confidence, right = confidence[keep].double(), (predictions == labels)[keep]
        # bins are (a, b], as in the papers: a probability of exactly 1 belongs to the last
        index = (confidence * self.bins).ceil().long().sub(1).clamp(0, self.bins - 1)
        self.count += torch.bincount(index, minlength=self.bins)
        self.hits += torch.bincount(index[right], minlength=self.bins)
        self.confidence += torch.zeros_like(self.confidence).index_add_(0, index, confidence)

    def compute(self) -> Tensor:
        """Scalar float64: mean over pixels of |accuracy - confidence| per bin; NaN before the first labelled pixel."""
        gap = (self.hits.double() - self.confidence).abs().sum()
        return gap / self.count.sum()
