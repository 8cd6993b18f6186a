"""The metric convention, against a slow oracle and a case worked by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import binary_erosion

from protoseg.config import DataError
from protoseg.engine.metrics import BoundaryIoU, CalibrationError, ConfusionMatrix, boundary_width, window_maximum

IGNORE = 255


def counted(predictions, labels, num_classes):
    """One loop per pixel."""
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    for p, t in zip(predictions.ravel(), labels.ravel()):
        if t != IGNORE:
            matrix[t, p] += 1
    return matrix


def test_absent_classes_are_skipped_and_predicted_ones_count_as_zero():
    # 5 classes: 3 is nowhere, 4 only predicted, two pixels ignored. IoU 0: 2/4, 1: 1/2, 2: 2/3, 4: 0 -> mean 0.4167
    labels = torch.tensor([[0, 0, 0, 1, 2], [2, 255, 255, 0, 1]])
    predictions = torch.tensor([[0, 0, 4, 1, 2], [2, 3, 0, 2, 4]])
    metric = ConfusionMatrix(5)
    metric.update(predictions, labels)
    result = metric.overlap()
    assert result.iou.tolist() == pytest.approx([2 / 4, 1 / 2, 2 / 3, math.nan, 0], nan_ok=True)
    assert result.miou == pytest.approx(0.4167, abs=5e-5)
    assert result.averaged == 4
    assert result.pixel_accuracy == pytest.approx(5 / 8)
    assert result.mean_accuracy == pytest.approx((2 / 4 + 1 / 2 + 1) / 3)  # over classes 0, 1, 2
    assert result.frequency_weighted_iou == pytest.approx((4 * 2 / 4 + 2 * 1 / 2 + 2 * 2 / 3) / 8)


label_maps = st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))


@settings(max_examples=1000, deadline=None)
@given(label_maps)
def test_matrix_equals_the_oracle_exactly(case):
    num_classes, height, width, seed = case
    rng = np.random.default_rng(seed)
    metric, truth = ConfusionMatrix(num_classes), np.zeros((num_classes, num_classes), dtype=np.int64)
    for _ in range(2):
        labels = rng.integers(0, num_classes, (height, width))
        labels[rng.random((height, width)) < 0.2] = IGNORE
        predictions = rng.integers(0, num_classes, (height, width))
        metric.update(torch.from_numpy(predictions), torch.from_numpy(labels))
        truth += counted(predictions, labels, num_classes)
    assert metric.compute().dtype == torch.int64
    assert np.array_equal(metric.compute().numpy().reshape(truth.shape), truth)
    ious = [
        truth[c, c] / union if (union := truth[c].sum() + truth[:, c].sum() - truth[c, c]) else math.nan
        for c in range(num_classes)
    ]
    counts = [iou for iou in ious if not math.isnan(iou)]
    result = metric.overlap()
    assert result.iou.tolist() == pytest.approx(ious, nan_ok=True, rel=1e-12)
    assert result.averaged == len(counts)
    assert result.miou == pytest.approx(sum(counts) / len(counts) if counts else math.nan, nan_ok=True, rel=1e-12)


def test_how_the_split_is_cut_into_updates_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    labels, predictions = (torch.randint(0, 7, (6, 20, 30), generator=generator) for _ in range(2))
    together, alone = ConfusionMatrix(7), ConfusionMatrix(7)
    together.update(predictions, labels)
    for p, t in zip(predictions, labels):
        alone.update(p, t)
    assert torch.equal(together.compute(), alone.compute())


def test_an_all_ignored_split_is_nan_not_zero():
    metric = ConfusionMatrix(3)
    metric.update(torch.zeros(4, 4, dtype=torch.long), torch.full((4, 4), IGNORE))
    assert math.isnan(metric.overlap().miou)
    assert metric.overlap().averaged == 0


@pytest.mark.parametrize("value", [-1, 3, 254, 256, 65535])
def test_labels_out_of_range_are_refused_with_file_value_and_count(value):
    labels = torch.zeros(4, 4, dtype=torch.long)
    labels[0, :2] = value
    for metric in (ConfusionMatrix(3), BoundaryIoU(3)):
        with pytest.raises(DataError, match=rf"street_7.*\b2 labelled pixels.*{value}\b"):
            metric.update(torch.zeros_like(labels), labels, name="street_7")
        ConfusionMatrix(3, ignore_index=value).update(torch.zeros_like(labels), labels)


def test_a_prediction_at_another_size_is_refused():
    with pytest.raises(DataError, match=r"\(2, 2\).*\(4, 4\)"):
        ConfusionMatrix(3).update(torch.zeros(2, 2, dtype=torch.long), torch.zeros(4, 4, dtype=torch.long))


def boundary_region(mask, ignored, radius):
    """`mask_to_boundary` of the authors (one class, zeros outside the image), with ignored pixels inside every mask."""
    square = np.ones((2 * radius + 1, 2 * radius + 1))
    return mask & ~ignored & ~binary_erosion(mask | ignored, square, border_value=0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**32 - 1), st.floats(0.01, 0.2))
def test_boundary_iou_equals_one_erosion_per_class(num_classes, height, width, seed, ratio):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, num_classes, (2, height // 6 + 1, width // 6 + 1))
    labels, predictions = coarse.repeat(6, 1).repeat(6, 2)[:, :height, :width]
    ignored = rng.random((height, width)) < 0.05
    metric = BoundaryIoU(num_classes, ratio=ratio)
    metric.update(torch.from_numpy(predictions.copy()), torch.from_numpy(np.where(ignored, IGNORE, labels)))
    radius = max(1, round(ratio * math.hypot(height, width)))
    for c in range(num_classes):
        truth = boundary_region(labels == c, ignored, radius)
        found = boundary_region(predictions == c, ignored, radius)
        assert metric.intersection[c] == (truth & found).sum()
        assert metric.union[c] == (truth | found).sum()


def test_a_perfect_prediction_has_boundary_iou_one_whatever_lies_below_ignored_pixels():
    labels = torch.zeros(60, 80, dtype=torch.long)
    labels[20:, 30:] = 1
    predictions = labels.clone()
    labels[30:40, 50:60] = IGNORE
    predictions[30:40, 50:60] = 0
    metric = BoundaryIoU(3)
    metric.update(predictions, labels)
    assert metric.compute().tolist() == pytest.approx([1, 1, math.nan], nan_ok=True)


def test_boundary_iou_punishes_a_shift_harder_than_iou():
    labels = torch.zeros(100, 100, dtype=torch.long)
    labels[20:80, 20:80] = 1
    shifted = labels.roll(2, dims=1)
    area, edge = ConfusionMatrix(2), BoundaryIoU(2)
    area.update(shifted, labels)
    edge.update(shifted, labels)
    assert edge.compute()[1] < area.overlap().iou[1] - 0.2


def test_boundary_width_is_two_percent_of_the_diagonal():
    assert boundary_width(360, 480) == 12
    assert boundary_width(8, 8) == 1


@given(hnp.arrays(np.int16, st.tuples(st.integers(9, 20), st.integers(9, 20))), st.integers(1, 4))
def test_window_maximum_is_the_plain_one(values, radius):
    expected = np.lib.stride_tricks.sliding_window_view(values, 2 * radius + 1, axis=1).max(-1)
    assert np.array_equal(window_maximum(torch.from_numpy(values), radius, -1).numpy(), expected)


def test_calibration_error_by_hand():
    metric = CalibrationError(bins=10)
    # bin (0.8, 0.9]: two pixels, confidence 0.85 each, one right; bin (0.9, 1]: two at 1, both right
    confidence = torch.tensor([0.85, 0.85, 1.0, 1.0, 0.3])
    metric.update(torch.tensor([0, 1, 0, 0, 0]), torch.tensor([0, 0, 0, 0, IGNORE]), confidence)
    assert metric.compute().item() == pytest.approx((abs(1 - 1.7) + 0) / 4, abs=1e-6)


def test_states_survive_a_half_precision_module():
    module = torch.nn.ModuleDict({"matrix": ConfusionMatrix(2)}).half()
    module["matrix"].update(torch.zeros(70_000, dtype=torch.long), torch.zeros(70_000, dtype=torch.long))
    assert module["matrix"].compute()[0, 0].item() == 70_000
