"""A model's scores on a split: what validation during training and `protoseg evaluate` have in common.

Every image is segmented as `windows` says and compared at its label's own size; sums run over all images and ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from protoseg.config import Evaluation
from protoseg.engine.metrics import BoundaryIoU, CalibrationError, ConfusionMatrix, Overlap, overlap
from protoseg.engine.windows import segment_labels
from protoseg.models.segmenter import Segmenter


@dataclass(frozen=True)
class Scores:
    """Of a whole split.

    Attributes:
        matrix: (C, C) int64, rows the truth, columns the prediction.
        overlap: IoU and accuracies.
        boundary_iou: (C,) float64, or None if it was not asked for.
        calibration_error: expected calibration error with 15 bins, or None.
        images: how many, on this rank.
        seconds: spent in segmenting them on this rank.
        distinctness: of the head's prototypes (`PrototypeHead.distinctness`); empty for parametric heads.
    """

    matrix: Tensor
    overlap: Overlap
    boundary_iou: Tensor | None
    calibration_error: float | None
    images: int
    seconds: float
    distinctness: dict[str, float]

    @property
    def boundary_miou(self) -> float | None:
        """Mean boundary IoU over the classes that have one."""
        return None if self.boundary_iou is None else self.boundary_iou.nanmean().item()


@torch.no_grad()
def score(
    model: Segmenter,
    batches: Iterable[Mapping[str, Any]],
    evaluation: Evaluation,
    *,
    boundary: bool = False,
    calibration: bool = False,
) -> Scores:
    """Segment every image once and add up.

    Args:
        model: on the device to compute on; it is in eval mode meanwhile.
        batches: of one image each: `image` (1, 3, h, w), `label` (1, H, W) at original size, `name`.
        evaluation: whole or slide, scales, flip.
        boundary, calibration: also compute boundary IoU, expected calibration error.

    Raises:
        DataError: a label value that is neither a class nor ignored; names the image.
    """
    head = model.head
    device = model.mean.device
    confusion = ConfusionMatrix(head.num_classes, head.ignore_index).to(device)
    edges = BoundaryIoU(head.num_classes, head.ignore_index).to(device) if boundary else None
    sureness = CalibrationError(head.ignore_index).to(device) if calibration else None
    images, seconds = 0, 0.0
    with evaluating(model):
        for batch in batches:
            label, name = batch["label"][0].to(device), str(batch["name"][0])
            start = _clock(device)
            predicted, confidence = segment_labels(
                model, batch["image"][0], evaluation, (label.shape[-2], label.shape[-1]), confidence=calibration
            )
            seconds += _clock(device) - start
            images += 1
            confusion.update(predicted, label, name)
            if edges is not None:
                edges.update(predicted, label, name)
            if sureness is not None and confidence is not None:
                sureness.update(predicted, label, confidence)
    with warnings.catch_warnings():
        # fewer images than ranks: one that has seen none still takes part in the sums
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
        matrix = confusion.compute().reshape(head.num_classes, head.num_classes)
        boundary_iou = None if edges is None else edges.compute().reshape(-1).cpu()
        calibration_error = None if sureness is None else sureness.compute().item()
    return Scores(
        matrix=matrix.cpu(),
        overlap=overlap(matrix),
        boundary_iou=boundary_iou,
        calibration_error=calibration_error,
        images=images,
        seconds=seconds,
        distinctness=head.distinctness() if hasattr(head, "distinctness") else {},
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()
