"""A batch cut by products with matrices is what `transforms` cuts one by one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from protoseg.data import augment
from protoseg.data.transforms import FILL, Cut, apply_cut, recolour

VOID = 255
PLAIN = (0.0, 1.0, 1.0, 0.0)


def pictures(sizes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(0, 256, (3, *size), generator=draw, dtype=torch.uint8),
            torch.randint(0, 5, size, generator=draw, dtype=torch.uint8),
        )
        for size in sizes
    ]


def cut_batch(items, cuts, crop_size, reach=None):
    sizes = [tuple(label.shape) for _, label in items]
    first = [sum(h * w for h, w in sizes[:i]) for i in range(len(sizes))]
    return augment.cut_batch(
        torch.cat([image.permute(1, 2, 0).reshape(-1, 3) for image, _ in items]),
        torch.cat([label.flatten() for _, label in items]),
        augment.numbers(cuts, first, sizes),
        crop_size=crop_size,
        reach=reach or augment.window(cuts, sizes, crop_size),
        ignore_index=VOID,
    )


def one_by_one(items, cuts, crop_size):
    done = [apply_cut(image, label, cut, crop_size, VOID) for (image, label), cut in zip(items, cuts)]
    return torch.stack([image for image, _ in done]), torch.stack([label for _, label in done]).long()


@st.composite
def batches(draw, colour=False):
    """Up to four pictures of any small sizes, each with its own cut, and a crop size."""
    crop_size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    sizes, cuts = [], []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.tuples(st.integers(1, 50), st.integers(1, 50)))
        factor = draw(st.floats(0.3, 3))
        new = tuple(max(1, round(side * factor)) for side in size)
        corner = tuple(draw(st.integers(0, max(0, have - want))) for have, want in zip(new, crop_size))
        change = PLAIN
        if colour:
            ranges = ((-32, 32), (0.5, 1.5), (0.5, 1.5), (-0.6, 0.6))
            change = tuple(draw(st.floats(*ends)) for ends in ranges)
        sizes.append(size)
        cuts.append(Cut(new, corner, draw(st.booleans()), change))
    return sizes, cuts, crop_size


@settings(deadline=None)
@given(batches())
def test_labels_are_equal_and_colours_differ_by_rounding(batch):
    """`transforms` rounds between its two passes and takes weights of 16 bits; one product does neither."""
    sizes, cuts, crop_size = batch
    items = pictures(sizes)
    (image, label), (plain_image, plain_label) = cut_batch(items, cuts, crop_size), one_by_one(items, cuts, crop_size)
    assert torch.equal(label, plain_label)
    assert label.dtype == torch.int64
    assert image.dtype == torch.uint8
    assert_close(image.int(), plain_image.int(), rtol=0, atol=2)


@settings(deadline=None)
@given(batches(colour=True))
def test_recoloured_values_differ_no_more_than_the_colour_stretches_rounding(batch):
    sizes, cuts, crop_size = batch
    items = pictures(sizes)
    image, plain = cut_batch(items, cuts, crop_size)[0], one_by_one(items, cuts, crop_size)[0]
    # contrast and saturation are factors up to 1.5 each, the turn of hue mixes three channels
    assert_close(image.int(), plain.int(), rtol=0, atol=10)


@settings(deadline=None)
@given(batches(colour=True))
def test_without_a_resize_only_the_colours_last_digit_may_differ(batch):
    sizes, cuts, crop_size = batch
    corners = [
        tuple(min(start, max(0, have - want)) for start, have, want in zip(cut.corner, size, crop_size))
        for cut, size in zip(cuts, sizes)
    ]
    cuts = [replace(cut, size=size, corner=corner) for cut, size, corner in zip(cuts, sizes, corners)]
    items = pictures(sizes)
    image, plain = cut_batch(items, cuts, crop_size)[0], one_by_one(items, cuts, crop_size)[0]
    assert_close(image.int(), plain.int(), rtol=0, atol=1)
    cuts = [replace(cut, colour=PLAIN) for cut in cuts]
    assert torch.equal(cut_batch(items, cuts, crop_size)[0], one_by_one(items, cuts, crop_size)[0])


@settings(deadline=None)
@given(batches(colour=True))
def test_a_sample_does_not_see_the_others_of_its_batch(batch):
    sizes, cuts, crop_size = batch
    items = pictures(sizes)
    together = cut_batch(items, cuts, crop_size)
    for i, (item, cut) in enumerate(zip(items, cuts)):
        alone = cut_batch([item], [cut], crop_size)
        assert torch.equal(alone[1][0], together[1][i])
        assert_close(alone[0][0].int(), together[0][i].int(), rtol=0, atol=1)  # sums of another length


@settings(deadline=None)
@given(batches())
def test_the_window_holds_all_a_crop_needs(batch):
    sizes, cuts, crop_size = batch
    items = pictures(sizes)
    whole = (max(h for h, _ in sizes), max(w for _, w in sizes))
    assert_close(cut_batch(items, cuts, crop_size)[0], cut_batch(items, cuts, crop_size, whole)[0], rtol=0, atol=1)


@pytest.mark.parametrize("size", [(20, 31), (80, 96), (40, 48), (7, 100)])
def test_the_filter_is_torchs_antialiased_bilinear_in_float64(size):
    image = pictures([(40, 48)])[0]
    cut = Cut(size, (0, 0), False)
    expected = F.interpolate(image[0][None].double(), size=size, mode="bilinear", antialias=True, align_corners=False)
    found = cut_batch([image], [cut], size)[0]
    assert (found.double() - expected).abs().max() <= 0.501  # rounding, and nothing else


def test_what_is_no_picture_is_filled_at_the_right_and_the_bottom():
    item = pictures([(6, 5)])[0]
    for flip in (False, True):
        image, label = cut_batch([item], [Cut((6, 5), (0, 0), flip, (9.0, 1.2, 0.8, 0.3))], (8, 9))
        outside = torch.ones(8, 9, dtype=torch.bool)
        outside[:6, :5] = False
        assert (label[0][outside] == VOID).all()
        assert image[0][:, outside].unique(dim=1).flatten().tolist() == list(FILL)
        assert torch.equal(label[0, :6, :5], (item[1].flip(-1) if flip else item[1]).long())


def test_labels_come_from_the_picture():
    item = (torch.zeros(3, 9, 9, dtype=torch.uint8), torch.full((9, 9), 3, dtype=torch.uint8))
    item[1][:, 5:] = 4
    _, label = cut_batch([item], [Cut((23, 17), (3, 2), True)], (12, 12))
    assert label.unique().tolist() == [3, 4]


def test_colour_matrices_are_those_of_one_picture():
    image = pictures([(13, 17)])[0][0]
    colour = (7.0, 1.3, 0.7, -0.4)
    numbers = augment.numbers([Cut((13, 17), (0, 0), False, colour)], [0], [(13, 17)])
    seen = torch.ones(1, 13, 17, dtype=torch.bool)
    found = augment.recolour_batch(image[None].float(), seen, numbers[:, augment.PLACE :])[0]
    assert_close(found, recolour(image, *colour).float(), rtol=0, atol=1)


def test_autocast_does_not_reach_the_pixels():
    items = pictures([(30, 30)])
    cuts = [Cut((41, 41), (2, 3), False, (5.0, 1.1, 0.9, 0.2))]
    plain = cut_batch(items, cuts, (32, 32))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cut_batch(items, cuts, (32, 32))[0], plain)
