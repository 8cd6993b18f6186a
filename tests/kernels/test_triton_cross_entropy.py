"""The cross-entropy's kernels against `F.interpolate` and `F.cross_entropy` in float64, differentiated by autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from heads import VOID, seeded
from triton_device import DEVICE, at_hand

cross_entropy = pytest.importorskip("protoseg.kernels.gpu.cross_entropy", reason="no Triton")
pytestmark = at_hand
SHARE = 0.3
SIZES = {
    "twice": ((4, 5), (8, 10)),
    "four times": ((2, 3), (8, 12)),
    "between": ((5, 6), (13, 17)),
    "smaller": ((13, 17), (5, 6)),
    "one feature pixel": ((1, 1), (3, 4)),
    "one feature row": ((1, 5), (4, 5)),
    "one label": ((4, 5), (1, 1)),
    "rows alone": ((4, 5), (9, 5)),
}
SMALL = [(3, 4), (5, 9)]  # labels of (3, 4) feature pixels


def problem(classes, size, label_size, images=1, void=0.2, dtype=torch.float64):
    """(G, C, h, w) scores, (G, H, W) labels."""
    g = seeded(classes + images)
    scores = 3 * torch.randn(images, classes, *size, generator=g, dtype=torch.float64)
    labels = torch.randint(classes, (images, *label_size), generator=g)
    labels = torch.where(torch.rand(labels.shape, generator=g) < void, VOID, labels)
    return scores.to(DEVICE, dtype), labels.to(DEVICE)


def truth(scores, labels, align_corners=False, weights=None, scale=None):
    """Sum over labels, (G, C, h, w) `SHARE` times its gradient, and the same to the log of the scale, in float64."""
    scores = scores.double().requires_grad_(True)
    log_scale = torch.tensor(0.0 if scale is None else math.log(scale), dtype=torch.float64, device=DEVICE)
    wide = scores * log_scale.requires_grad_(True).exp()
    if scores.shape[2:] != labels.shape[1:]:
        wide = F.interpolate(wide, size=labels.shape[1:], mode="bilinear", align_corners=align_corners)
    weights = None if weights is None else weights.double()
    loss = F.cross_entropy(wide, labels, weight=weights, ignore_index=VOID, reduction="sum")
    (SHARE * loss).backward()
    return loss.detach(), scores.grad, log_scale.grad


def found(scores, labels, align_corners=False, weights=None, scale=None):
    """The same through the kernels."""
    images, classes, h, w = scores.shape
    flat = scores.transpose(0, 1).reshape(classes, -1).clone(memory_format=torch.contiguous_format)
    share = torch.tensor(SHARE, dtype=scores.dtype, device=scores.device)
    if (h, w) == labels.shape[1:]:
        parts = (*cross_entropy.cross_entropy_(flat, labels.reshape(-1), VOID, weights, share, scale), flat)
    else:
        parts = cross_entropy.label_cross_entropy(flat, (h, w), labels, align_corners, VOID, weights, share, scale)
    losses, slopes, gradient = parts
    assert (len(slopes) == 0) == (scale is None)
    return losses.sum(), gradient.view(classes, images, h, w).transpose(0, 1), slopes.sum()


def assert_true(scores, labels, *args, rtol=0.0, atol=1e-12):
    loss, gradient, slope = found(scores, labels, *args)
    true, true_gradient, true_slope = truth(scores, labels, *args)
    assert loss.dtype == gradient.dtype == scores.dtype
    assert_close(loss.double(), true, rtol=rtol, atol=atol)
    assert_close(gradient.double(), true_gradient, rtol=rtol, atol=atol)
    if len(args) > 2:
        assert_close(slope.double(), true_slope, rtol=rtol, atol=10 * atol)  # a sum over all of them


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_any_resize(size, align_corners):
    assert_true(*problem(3, *SIZES[size]), align_corners)


@pytest.mark.parametrize("label_size", [(2, 3), (4, 5)])
@pytest.mark.parametrize("classes", [1, 2, 3, 19, 150])
def test_any_number_of_classes(classes, label_size):
    assert_true(*problem(classes, (2, 3), label_size), atol=1e-11)


@pytest.mark.parametrize("label_size", SMALL)
def test_class_weights_and_several_images(label_size):
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64, device=DEVICE)
    assert_true(*problem(4, (3, 4), label_size, images=3), False, weights)


@pytest.mark.parametrize("scale", [0.7, 20.0])
@pytest.mark.parametrize(
    ("classes", "size", "label_size"), [(5, *SIZES["twice"]), (19, *SIZES["between"]), (9, (4, 5), (4, 5))]
)
def test_a_scale_of_the_scores_and_the_gradient_to_it(classes, size, label_size, scale):
    scores, labels = problem(classes, size, label_size, images=2)
    given = torch.tensor(scale, dtype=torch.float64, device=DEVICE)
    assert_true(scores / scale, labels, False, None, given, atol=1e-11)


@pytest.mark.parametrize(("size", "label_size"), [((3, 70), (3, 70)), ((1, 70), (2, 140)), ((2, 130), (1, 33))])
def test_rows_longer_than_a_program(size, label_size):
    assert_true(*problem(3, size, label_size))


@pytest.mark.parametrize("label_size", SMALL)
def test_fp32_stays_near_float64(label_size):
    weights = torch.linspace(0.5, 1.5, 19, device=DEVICE)
    assert_true(*problem(19, (3, 4), label_size, images=2, dtype=torch.float32), False, weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label_size", SMALL)
def test_where_a_probability_is_1_to_the_last_digit_the_own_gradient_still_has_digits(label_size):
    scores, labels = problem(9, (3, 4), label_size, images=2, void=0.0, dtype=torch.float32)
    labels.fill_(4)
    scores[:, 4] += 25
    (_, gradient, _), (_, true, _) = found(scores, labels), truth(scores, labels)
    assert true[:, 4].abs().median() < 2**-24  # 1 - P would be 0 or a rounding error
    assert_close(gradient[:, 4].double(), true[:, 4], rtol=1e-4, atol=0)


@pytest.mark.parametrize("label_size", SMALL)
def test_without_a_label_there_is_no_loss_and_no_gradient(label_size):
    loss, gradient, _ = found(*problem(3, (3, 4), label_size, void=1.1))
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("label_size", SMALL)
@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_scores_are_no_overflow(label_size, shift):
    scores, labels = problem(3, (3, 4), label_size)
    assert_true(scores + shift, labels, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("label_size", SMALL)
@pytest.mark.parametrize("bad", ["score", "label"])
def test_what_is_no_number_or_no_class_shows_in_the_loss(label_size, bad):
    scores, labels = problem(3, (3, 4), label_size, void=0.0)
    if bad == "score":
        scores[0, :, 2, 3] = torch.nan
    else:
        labels[0, 2, 3] = 7
    loss, gradient, _ = found(scores, labels)
    assert loss.isnan()
    assert gradient[0, :, 0, 0].isfinite().all()  # far from there all is as it was


@pytest.mark.parametrize("label_size", SMALL)
def test_the_same_bits_every_time(label_size):
    scores, labels = problem(9, (3, 4), label_size, images=2, dtype=torch.float32)
    loss, gradient, _ = found(scores, labels)
    again = found(scores, labels)
    assert torch.equal(again[0], loss)
    assert torch.equal(again[1], gradient)


@pytest.mark.parametrize("label_size", [(3, 4), (5, 9)])
def test_a_void_pixel_of_the_only_class_asks_for_nothing(label_size):
    scores, labels = problem(1, (3, 4), label_size, void=0.0)
    flat, share = scores.reshape(1, -1).clone(), torch.tensor(SHARE, dtype=scores.dtype, device=scores.device)
    if label_size == (3, 4):
        losses, _ = cross_entropy.cross_entropy_(flat, labels.reshape(-1), 0, None, share)
        gradient = flat
    else:
        losses, _, gradient = cross_entropy.label_cross_entropy(flat, (3, 4), labels, False, 0, None, share)
    assert losses.sum() == 0
    assert not gradient.any()


def test_labels_of_any_layout():
    scores, labels = problem(3, (2, 2), (4, 4))
    turned = labels.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(found(scores, turned)[1], found(scores, labels)[1])


def test_nothing_at_all():
    scores, labels = problem(3, (0, 4), (0, 4))
    assert found(scores, labels)[0] == 0
