"""Training samples are pure functions of (seed, epoch, index); geometry is exact; colour equals torchvision's."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from protoseg.config import Data, DataError
from protoseg.data import transforms
from protoseg.data.labels import LabelSpace

LABELS = LabelSpace(tuple("abcd"), ((1, 1, 1),) * 4)
PLAIN = Data(crop_size=(32, 48), photometric=False, hflip=0.0, cat_max_ratio=1.0, scale_range=(1.0, 1.0))


def sample(height=40, width=60, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (3, height, width), generator=draw, dtype=torch.uint8),
        "label": torch.randint(0, 4, (height, width), generator=draw, dtype=torch.uint8),
    }


def same(a, b):
    return torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])


def test_a_sample_depends_on_seed_epoch_and_index_and_on_nothing_else():
    data = Data(crop_size=(32, 48))
    once = transforms.training(data, LABELS, 5)(sample(), 2, 7)
    torch.manual_seed(123)
    np.random.seed(9)
    state = torch.get_rng_state()
    assert same(once, transforms.training(data, LABELS, 5)(sample(), 2, 7))
    assert torch.equal(state, torch.get_rng_state())
    for seed, epoch, index in ((6, 2, 7), (5, 3, 7), (5, 2, 8)):
        assert not same(once, transforms.training(data, LABELS, seed)(sample(), epoch, index))


def test_a_sample_leaves_its_source_alone():
    original, given_ = sample(), sample()
    transforms.training(Data(crop_size=(64, 64)), LABELS, 0)(given_, 0, 0)
    assert same(original, given_)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (31, 33), (200, 20), (513, 769)])
def test_every_size_gives_the_crop_size(size):
    out = transforms.training(Data(crop_size=(32, 48)), LABELS, 0)(sample(*size), 0, 0)
    assert out["image"].shape == (3, 32, 48)
    assert out["label"].shape == (32, 48)
    assert out["image"].dtype == torch.uint8


def test_without_randomness_a_crop_is_a_window_of_the_picture():
    given_ = sample()
    out = transforms.training(PLAIN, LABELS, 1)(given_, 0, 0)
    corners = [(y, x) for y in range(9) for x in range(13)
               if torch.equal(given_["label"][y : y + 32, x : x + 48], out["label"])]  # fmt: skip
    assert len(corners) == 1
    (y, x) = corners[0]
    assert torch.equal(given_["image"][:, y : y + 32, x : x + 48], out["image"])


def test_padding_is_mean_colour_and_ignored():
    out = transforms.training(PLAIN, LABELS, 0)(sample(20, 30), 0, 0)
    assert torch.equal(out["label"][:20, :30], sample(20, 30)["label"])
    assert (out["label"][20:] == 255).all()
    assert (out["label"][:, 30:] == 255).all()
    for index in range(8):  # neither colour nor flip touches it
        out = transforms.training(Data(crop_size=(100, 150)), LABELS, 0)(sample(20, 30), 0, index)
        assert out["image"][:, -1, -1].tolist() == [124, 116, 104]


def test_image_and_label_move_together():
    data = replace(PLAIN, hflip=0.5, scale_range=(0.5, 2.0), crop_size=(24, 24))
    yy, xx = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    blocks = ((yy // 10 + xx // 10) % 4).to(torch.uint8)
    given_ = {"image": (blocks * 80).repeat(3, 1, 1), "label": blocks}
    for index in range(20):
        out = transforms.training(data, LABELS, 0)(given_, 0, index)
        known = out["label"] != 255
        off = (out["image"][0].float() / 80 - out["label"].float()).abs()[known]
        assert (off < 0.5).float().mean() > 0.85  # all but the soft edges


def test_flips_happen_about_as_often_as_asked():
    data = replace(PLAIN, crop_size=(40, 60), hflip=0.25)
    transform = transforms.training(data, LABELS, 0)
    flipped = sum(not same(transform(sample(), 0, i), sample()) for i in range(400))
    assert 70 < flipped < 130


def test_scales_are_uniform_over_their_range():
    transform = transforms.training(replace(PLAIN, scale_range=(0.5, 2.5), crop_size=(100, 150)), LABELS, 0)
    rows = np.array([(transform(sample(), 0, i)["label"] != 255).any(1).sum().item() for i in range(400)])
    assert rows.min() < 22
    assert rows.max() > 98
    assert abs((rows < 60).mean() - 0.5) < 0.08  # half of them below factor 1.5
    assert abs((rows < 40).mean() - 0.25) < 0.07


def test_a_crop_is_drawn_again_while_one_class_covers_too_much():
    label = torch.zeros(40, 400, dtype=torch.uint8)
    label[:, 360:] = torch.randint(1, 4, (40, 40), dtype=torch.uint8)
    given_ = {"image": torch.zeros(3, 40, 400, dtype=torch.uint8), "label": label}
    shares = {}
    for ratio in (0.75, 1.0):
        transform = transforms.training(replace(PLAIN, crop_size=(40, 60), cat_max_ratio=ratio), LABELS, 0)
        crops = [transform(given_, 0, i)["label"] for i in range(100)]
        shares[ratio] = sum((c == 0).float().mean().item() <= 0.75 for c in crops)
    assert shares[0.75] > 2 * shares[1.0] > 0


def test_masks_are_resized_nearest_exact():
    for old, new in ((96, 72), (7, 20), (20, 7), (5, 5), (1, 9), (480, 613)):
        label = torch.arange(old)[None].repeat(3, 1).to(torch.int32)
        expected = [math.floor((i + 0.5) * old / new) for i in range(new)]
        assert transforms.resize_label(label, (3, new))[0].tolist() == expected


def test_nearest_exact_keeps_a_disc_better_than_nearest():
    def disc(n):
        y, x = np.mgrid[0:n, 0:n]
        return torch.from_numpy((((y + 0.5) / n - 0.5) ** 2 + ((x + 0.5) / n - 0.5) ** 2 < 0.1).astype(np.uint8))

    def overlap(small):
        return ((small & disc(72)).sum() / (small | disc(72)).sum()).item()

    shifted = F.resize(disc(96)[None], [72, 72], interpolation=InterpolationMode.NEAREST)[0]
    assert overlap(transforms.resize_label(disc(96), (72, 72))) > overlap(shifted) + 0.005


def test_evaluation_resizes_the_image_only():
    data = Data(base_size=20, max_long_side=28)
    out = transforms.evaluation(data)(sample(40, 60), 0, 0)
    assert out["image"].shape == (3, 19, 28)
    assert out["label"].shape == (40, 60)
    assert same(transforms.evaluation(Data())(sample(), 0, 0), sample())


@pytest.mark.parametrize("shape", [(2, 2), (5, 5), (1, 1)])
def test_a_picture_may_shrink_to_one_pixel(shape):
    image = sample(*shape)["image"]
    pixel = transforms.resize_image(image, Data(base_size=1))
    assert_close(pixel[:, 0, 0].double(), image.double().mean((1, 2)), rtol=0, atol=32)  # triangle weights, not equal
    assert pixel.shape == (3, 1, 1)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 1024), st.integers(1, 2048))
def test_base_size_is_the_short_side_unless_the_long_one_is_bounded(height, width, base, bound):
    free = transforms.base_size(height, width, Data(base_size=base))
    assert min(free) == base
    both = transforms.base_size(height, width, Data(base_size=base, max_long_side=bound))
    assert max(both) <= max(bound, 1)
    assert all(a <= b for a, b in zip(both, free))
    assert transforms.base_size(height, width, Data()) == (height, width)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ((0.0, 1.4, 1.0, 0.0), lambda x: F.adjust_contrast(x, 1.4)),
        ((0.0, 0.6, 1.0, 0.0), lambda x: F.adjust_contrast(x, 0.6)),
        ((0.0, 1.0, 1.3, 0.0), lambda x: F.adjust_saturation(x, 1.3)),
        ((0.0, 1.0, 0.5, 0.0), lambda x: F.adjust_saturation(x, 0.5)),
    ],
)
def test_colour_agrees_with_torchvision(ours, theirs):
    image = sample()["image"]
    assert (transforms.recolour(image, *ours).int() - theirs(image).int()).abs().max() <= 1


def test_colour_laws():
    image = sample()["image"]
    assert torch.equal(transforms.recolour(image, 0.0, 1.0, 1.0, 0.0), image)
    assert torch.equal(transforms.recolour(image, 20.0, 1.0, 1.0, 0.0), (image.int() + 20).clamp(max=255).byte())
    grey = image[:1].repeat(3, 1, 1)
    assert (transforms.recolour(grey, 0.0, 1.0, 0.7, 0.5).int() - grey.int()).abs().max() <= 1
    third = transforms.recolour(image, 0.0, 1.0, 1.0, 2 * math.pi / 3)  # a third of a turn swaps the channels
    assert (third.int() - image.roll(1, 0).int()).abs().max() <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"scale_range": (0.0, 1.0)}, {"scale_range": (2.0, 1.0)}, {"crop_size": (0, 4)}, {"hflip": 1.5},
        {"cat_max_ratio": 0.0}, {"base_size": 0}, {"max_long_side": -3},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_when_built(change):
    with pytest.raises(DataError, match=next(iter(change))):
        transforms.training(Data(**change), LABELS, 0)
