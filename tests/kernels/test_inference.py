"""The products of a frozen head against plain sums."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from heads import seeded
from protoseg.kernels import inference as kernel


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def table(precision, vectors, bias=None, groups=None, classes=4, centre=None):
    step = None
    if centre is not None:
        vectors = vectors - centre
    if precision == "int8":
        vectors, step = kernel.quantize(vectors)
    if precision == "bf16":
        vectors = vectors.bfloat16()
    return kernel.Table(vectors, step, centre, bias, groups or ((None, classes, len(vectors) // classes),), classes)


@pytest.mark.parametrize(
    ("precision", "error", "biased"),
    [("full", 1e-12, False), ("full", 1e-12, True), ("bf16", 0.02, 0), ("int8", 0.02, 0)],
)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("n", [1, 37])
def test_class_maxima_of_uneven_groups(precision, error, biased, centred, n):
    vectors, rows = F.normalize(numbers(7, 16), dim=1), numbers(n, 16, seed=1)
    bias = numbers(7, 1, seed=2) if biased else None
    centre = numbers(16, seed=3) / 4 if centred else None
    groups = ((torch.tensor([2, 0]), 2, 1), (torch.tensor([1]), 1, 2), (torch.tensor([3]), 1, 3))
    products = vectors @ rows.T + (0 if bias is None else bias)
    expected = torch.stack([products[1], products[2:4].amax(0), products[0], products[4:].amax(0)])
    found = kernel.class_maxima(rows, table(precision, vectors, bias, groups, centre=centre))
    assert found.dtype == torch.float64
    assert_close(found, expected, rtol=0, atol=error * float(rows.norm(dim=1).max()))


def test_int8_is_exact_on_whole_steps():
    g = seeded(0)
    vectors = torch.randint(-127, 128, (8, 24), generator=g).double()
    rows = torch.randint(-127, 128, (5, 24), generator=g).double()
    vectors[:, 0] = rows[:, 1] = 127  # the largest number of a row is worth 127 steps
    scale, size = numbers(8, 1, seed=1).abs() + 0.1, numbers(5, 1, seed=2).abs() + 0.1
    found = kernel.class_maxima(rows * size, table("int8", vectors * scale))
    expected = ((vectors * scale) @ (rows * size).T).view(4, 2, -1).amax(1)
    assert_close(found, expected, rtol=1e-12, atol=1e-9)


def test_a_row_of_zeros_quantizes_to_zeros():
    integers, unit = kernel.quantize(torch.zeros(2, 3))
    assert integers.eq(0).all()
    assert unit.isfinite().all()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "out"), [(1, 1), (1, 9), (9, 1), (7, 7), (5, 20), (20, 5), (13, 17)])
def test_taps_are_those_of_the_bilinear_resize(size, out, align_corners):
    line = numbers(size)
    low, high, share = kernel.taps(size, out, align_corners, line)
    expected = F.interpolate(line[None, None, :, None], size=(out, 1), mode="bilinear", align_corners=align_corners)
    assert_close(line[low] * (1 - share) + line[high] * share, expected[0, 0, :, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("width", [1, 7, 1000])
def test_bands_are_the_pixels_in_order(layout, width):
    features = numbers(2, 3, 4, 5).to(memory_format=layout)
    expected = features.permute(0, 2, 3, 1).reshape(-1, 3)
    found = torch.full_like(expected, torch.nan)
    for start, rows in kernel.bands(features, width):
        assert len(rows) <= width
        found[start : start + len(rows)] = rows
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_best_class_is_the_first_of_the_largest(dtype):
    rows = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-1.0, -2.0, 0.0]], dtype=dtype)
    assert kernel.best_class(rows).tolist() == [1, 0, 2]
    assert kernel.best_class(rows[:0]).tolist() == []


def test_int8_products_work_on_this_machine():
    assert kernel.int8_reason("cpu") == ""


def test_what_the_vectors_share_is_not_rounded():
    vectors, rows = 0.01 * numbers(8, 32) + numbers(32, seed=1), numbers(64, 32, seed=2)
    expected = (vectors @ rows.T).view(4, 2, -1).amax(1)
    for precision in ("bf16", "int8"):
        plain = kernel.class_maxima(rows, table(precision, vectors)) - expected
        centred = kernel.class_maxima(rows, table(precision, vectors, centre=vectors.mean(0))) - expected
        assert centred.abs().max() < 0.05 * plain.abs().max()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(2, 7, 9), (1, 1, 6), (2, 5, 1)])
def test_the_border_is_what_an_enlargement_mixes(size, align_corners):
    (B, h, w), C = size, 3
    coarse = torch.randint(C, (B, (h + 3) // 4, (w + 3) // 4), generator=seeded(0))
    labels = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :h, :w]
    asked = []

    def weigh(index):
        asked.append(index)
        return torch.ones(len(index))

    kernel.resized_labels(F.one_hot(labels, C).float().view(-1, C), size, (h * 5, w * 5), align_corners, weigh=weigh)
    found = kernel.border(labels).tolist()
    if min(h, w) > 1:
        assert found == torch.cat(asked).unique().tolist()
        assert 0 < len(found) < labels.numel()
    else:
        assert found == []
