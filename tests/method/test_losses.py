import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from oracles import reference
from protoseg.method.losses import (
    pixel_prototype_contrast,
    pixel_prototype_distance,
    segmentation_cross_entropy,
    total_loss,
)

QUICK = settings(max_examples=15, deadline=None, derandomize=True)


def table(n, m, seed=0):
    return torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def targets(n, m, seed=0):
    return torch.randint(-1, m, (n,), generator=torch.Generator().manual_seed(seed))


@QUICK
@given(seed=st.integers(0, 10_000), tau=st.sampled_from([0.05, 0.1, 1.0]), siblings=st.booleans())
def test_contrast_is_one_loop_per_symbol(seed, tau, siblings):
    classes, k, n = 3, 4, 11
    cosine, target = table(n, classes * k, seed), targets(n, classes * k, seed + 1)
    got = pixel_prototype_contrast(cosine, target, temperature=tau, siblings=siblings, num_prototypes=k)
    values = []
    for i, t in enumerate(target.tolist()):
        if t < 0:
            continue
        denominator = sum(
            math.exp(float(cosine[i, j]) / tau)
            for j in range(classes * k)
            if siblings or j == t or j // k != t // k  # without siblings only other classes push away
        )
        values.append(-math.log(math.exp(float(cosine[i, t]) / tau) / denominator))
    assert math.isclose(float(got), sum(values) / max(len(values), 1), rel_tol=1e-10, abs_tol=1e-12)


@QUICK
@given(seed=st.integers(0, 10_000))
def test_distance_is_one_loop_per_symbol(seed):
    cosine, target = table(9, 6, seed), targets(9, 6, seed + 1)
    values = [(1 - float(cosine[i, t])) ** 2 for i, t in enumerate(target.tolist()) if t >= 0]
    assert math.isclose(float(pixel_prototype_distance(cosine, target)), sum(values) / max(len(values), 1))


@pytest.mark.parametrize("size", [(3, 5), (6, 10), (12, 20), (7, 9)])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_cross_entropy_is_taken_at_label_resolution(size, align_corners, weighted):
    scores = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(4, (2, *size), generator=torch.Generator().manual_seed(1))
    labels[:, 0] = 255
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64) if weighted else None
    got = segmentation_cross_entropy(scores, labels, class_weights=weights, align_corners=align_corners)
    fine = reference.upsample(scores, size, align_corners).permute(0, 2, 3, 1).reshape(-1, 4)
    expected = reference.cross_entropy(fine, torch.where(labels == 255, -1, labels).reshape(-1), weights)
    assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [pixel_prototype_contrast, pixel_prototype_distance])
def test_nothing_labelled_is_zero_with_zero_gradient(loss):
    cosine = table(5, 6).requires_grad_(True)
    value = loss(cosine, torch.full((5,), -1))
    value.backward()
    assert value == 0
    assert torch.equal(cosine.grad, torch.zeros_like(cosine))


def test_cross_entropy_of_a_void_batch_is_zero_with_zero_gradient():
    scores = torch.randn(1, 3, 2, 2, requires_grad=True)
    value = segmentation_cross_entropy(scores, torch.full((1, 4, 4), 255), class_weights=torch.ones(3))
    value.backward()
    assert value == 0
    assert torch.equal(scores.grad, torch.zeros_like(scores))


def test_void_pixels_get_no_gradient_and_the_rest_is_untouched_by_them():
    cosine, target = table(8, 6), torch.tensor([0, 5, -1, 3, -1, 2, 1, 4])
    for loss in (pixel_prototype_contrast, pixel_prototype_distance):
        x = cosine.clone().requires_grad_(True)
        value = loss(x, target)
        value.backward()
        assert torch.equal(x.grad[target < 0], torch.zeros(2, 6, dtype=torch.float64))
        assert_close(value, loss(cosine[target >= 0], target[target >= 0]))


def test_every_prototype_id_gets_its_gradient_also_255():
    cosine = torch.zeros(300, 300, dtype=torch.float64, requires_grad=True)
    pixel_prototype_contrast(cosine, torch.arange(300)).backward()
    own = cosine.grad.diagonal()
    assert (own < 0).all()
    assert_close(own, own[0].expand(300))  # 255 is a prototype like any other, not a label that means void


# What a perfect embedding leaves of each loss: own cosine 1, every other prototype orthogonal.
@pytest.mark.parametrize(
    ("total", "tau", "chance", "floor"),
    [(190, 1.0, 5.25, 4.25), (1500, 1.0, 7.31, 6.31), (190, 0.1, 5.25, 0.008), (1500, 0.1, 7.31, 0.065)],
)
def test_floor_of_the_contrast(total, tau, chance, floor):
    perfect = torch.zeros(1, total, dtype=torch.float64)
    target = torch.tensor([7])
    assert float(pixel_prototype_contrast(perfect, target, temperature=tau)) == pytest.approx(math.log(total))
    assert math.log(total) == pytest.approx(chance, abs=0.01)
    perfect[0, 7] = 1
    got = float(pixel_prototype_contrast(perfect, target, temperature=tau))
    assert got == pytest.approx(math.log1p((total - 1) * math.exp(-1 / tau)), abs=1e-12)
    assert got == pytest.approx(floor, abs=0.01)


def test_collapsed_siblings_keep_the_contrast_high_unless_left_out():
    cosine = torch.zeros(1, 190, dtype=torch.float64)
    cosine[0, :10] = 0.99
    cosine[0, 3] = 1.0
    named = {"temperature": 0.1, "num_prototypes": 10}
    assert float(pixel_prototype_contrast(cosine, torch.tensor([3]), **named)) == pytest.approx(2.214, abs=1e-3)
    assert float(pixel_prototype_contrast(cosine, torch.tensor([3]), siblings=False, **named)) < 0.01


@pytest.mark.parametrize(("classes", "floor"), [(19, 1.98), (150, 4.02), (847, 5.74)])
def test_bare_cosines_cannot_learn_the_cross_entropy(classes, floor):
    # The best geometry there is: own cosine 1, the others spread evenly at -1/(C-1).
    cosine = torch.full((1, classes, 1, 1), -1 / (classes - 1), dtype=torch.float64)
    cosine[0, 5] = 1
    label = torch.tensor([[[5]]])
    assert float(segmentation_cross_entropy(cosine, label)) == pytest.approx(floor, abs=5e-3)
    assert float(segmentation_cross_entropy(20 * cosine, label)) < 1e-5


def test_total_is_the_weighted_sum():
    one, two, three = (torch.tensor(float(n)) for n in (1, 20, 300))
    assert float(total_loss(one, two, three, 0.5, 0.01)) == pytest.approx(14)
