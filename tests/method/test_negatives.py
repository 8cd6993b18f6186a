"""Drawn negatives of the contrast: an estimate whose sum is right in expectation, exact when all are drawn."""

from itertools import combinations, pairwise

import pytest
import torch
from torch.testing import assert_close

from heads import batch, build, seeded
from oracles.reference import unit
from protoseg import kernels
from protoseg.kernels import similarity
from protoseg.method.losses import draw_negatives, pixel_prototype_contrast

pytestmark = pytest.mark.usefixtures("way")
C, K, TAU = 3, 2, 0.5


@pytest.fixture
def pixels():
    """(5, 6) cosines and targets, one of them void."""
    x, p = unit(torch.randn(5, 4, generator=seeded(1)).double()), unit(torch.randn(6, 4, generator=seeded(2)).double())
    return x @ p.T, torch.tensor([0, 1, 3, 5, -1])


def estimated_sums(table, target, negatives, siblings):
    """(N,) for each pixel the sum of the softmax, one addition at a time; nan where void."""
    sums = torch.full((len(table),), float("nan"), dtype=torch.float64)
    for i, t in enumerate(target.tolist()):
        if t < 0:
            continue
        own = [j for j in range(C * K) if j // K == t // K and (siblings or j == t)]
        far = [j for j in negatives if j // K != t // K]
        terms = [float((table[i, j] / TAU).exp()) for j in own]
        terms += [C * K / len(negatives) * float((table[i, j] / TAU).exp()) for j in far]
        sums[i] = sum(terms)
    return sums


def loss(table, target, negatives, siblings):
    drawn = None if negatives is None else torch.tensor(negatives)
    return pixel_prototype_contrast(
        table, target, temperature=TAU, siblings=siblings, num_prototypes=K, negatives=drawn
    )


def every_draw(number):
    return list(combinations(range(C * K), number))


@pytest.mark.parametrize("siblings", [True, False])
@pytest.mark.parametrize("number", [1, 2, 4, 6])
def test_the_loss_is_the_logarithm_of_the_estimated_sum(number, siblings, pixels):
    table, target = pixels
    for negatives in every_draw(number):
        sums = estimated_sums(table, target, negatives, siblings)[:4]
        near = table.gather(1, target.clamp(min=0)[:, None])[:4, 0] / TAU
        assert_close(loss(*pixels, negatives, siblings), (sums.log() - near).mean(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("siblings", [True, False])
@pytest.mark.parametrize("number", [1, 3, 5])
def test_over_all_draws_the_estimated_sum_is_the_whole_sum(number, siblings, pixels):
    draws = [estimated_sums(*pixels, negatives, siblings) for negatives in every_draw(number)]
    whole = estimated_sums(*pixels, range(C * K), siblings)
    assert_close(torch.stack(draws).mean(0), whole, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("siblings", [True, False])
def test_the_mean_loss_is_too_small_and_comes_to_the_full_one_as_more_are_drawn(siblings, pixels):
    full = loss(*pixels, None, siblings)
    means = [
        torch.stack([loss(*pixels, negatives, siblings) for negatives in every_draw(number)]).mean()
        for number in range(1, C * K + 1)
    ]
    gaps = [float(full - mean) for mean in means]
    assert all(wide > narrow for wide, narrow in pairwise(gaps))
    assert gaps[0] > 1e-2
    assert gaps[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("siblings", [True, False])
def test_the_bias_is_half_the_relative_variance_of_the_sum(siblings, pixels):
    table, target = (pixels[0] * 0.1)[:1], pixels[1][:1]  # nearly equal terms: the second order is all there is
    draws = torch.stack([estimated_sums(table, target, negatives, siblings) for negatives in every_draw(5)])
    gap = (
        loss(table, target, None, siblings)
        - torch.stack([loss(table, target, negatives, siblings) for negatives in every_draw(5)]).mean()
    )
    told = draws.var(0, unbiased=False) / (2 * draws.mean(0).square())
    assert_close(gap, told.mean(), rtol=0.1, atol=0)


def step(head, features, labels, parts=("total",)):
    torch.manual_seed(11)  # of the draw
    head.zero_grad()
    features = features.clone().requires_grad_(True)
    losses = head.losses(features, labels)
    sum(getattr(losses, part) for part in parts).backward()
    return losses, [features.grad, *(p.grad for p in head.parameters())]


def assert_same(one, two):
    for name in ("total", "ce", "ppc", "ppd"):
        assert_close(getattr(one[0], name), getattr(two[0], name), rtol=0, atol=1e-12)
    assert torch.equal(one[0].assignment, two[0].assignment)
    assert torch.equal(one[0].moving, two[0].moving)
    assert_close(one[1], two[1], rtol=0, atol=1e-12)


@pytest.fixture
def narrow_bands(monkeypatch):
    monkeypatch.setattr(similarity, "FEWEST_COLUMNS", 12)
    monkeypatch.setattr(similarity, "CPU_BAND", 1)


@pytest.mark.parametrize("siblings", [True, False])
@pytest.mark.parametrize("number", [1, 5, 11])
@pytest.mark.parametrize("label_size", [None, (13, 17)], ids=["feature", "label"])
def test_the_one_pass_equals_the_plain_lines(number, siblings, label_size, narrow_bands):
    head = build(6, 3, num_prototypes=4, contrast_negatives=number, contrast_siblings=siblings)
    features, labels = batch(6, 3, size=(2, 5, 6), label_size=label_size)
    fast = step(head, features, labels)
    with kernels.plain_only():
        assert_same(fast, step(head, features, labels))


@pytest.mark.parametrize("parts", [("ppc",), ("total", "ppc"), ("ce",)])
def test_a_gradient_asked_for_by_itself_is_of_the_same_draw(parts, narrow_bands):
    head = build(6, 3, num_prototypes=4, contrast_negatives=3)
    features, labels = batch(6, 3, size=(2, 5, 6), label_size=(10, 12))
    fast = step(head, features, labels, parts)
    with kernels.plain_only():
        assert_close(fast[1][0], step(head, features, labels, parts)[1][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("siblings", [True, False])
def test_with_all_of_them_drawn_the_step_is_the_full_one(plain, siblings, narrow_bands):
    named = {"num_prototypes": 4, "contrast_siblings": siblings}
    drawn, full = build(6, 3, contrast_negatives=12, **named), build(6, 3, **named)
    features, labels = batch(6, 3, size=(2, 5, 6), label_size=(10, 12))
    if plain:
        with kernels.plain_only():
            assert_same(step(drawn, features, labels), step(full, features, labels))
    else:
        assert_same(step(drawn, features, labels), step(full, features, labels))


def test_only_the_contrast_is_drawn():
    drawn, full = build(6, 3, contrast_negatives=1), build(6, 3)
    features, labels = batch(6, 3)
    one, two = drawn.losses(features, labels), full.losses(features, labels)
    assert torch.equal(one.ce, two.ce)
    assert torch.equal(one.ppd, two.ppd)
    assert one.ppc != two.ppc


def test_the_draw_follows_the_generator_and_takes_each_prototype_once_and_equally_often():
    torch.manual_seed(3)
    first = draw_negatives(50, 7, torch.device("cpu"))
    assert len(set(first.tolist())) == 7
    torch.manual_seed(3)
    assert torch.equal(first, draw_negatives(50, 7, torch.device("cpu")))
    often = torch.zeros(50)
    for _ in range(3000):
        often[draw_negatives(50, 7, torch.device("cpu"))] += 1
    assert (often / 3000 - 7 / 50).abs().max() < 0.025  # four standard deviations


@pytest.mark.parametrize(("number", "message"), [(0, "at least 1"), (31, "at most the 3 x 10")])
def test_a_number_that_cannot_be_drawn_is_refused(number, message):
    with pytest.raises(ValueError, match=f"contrast_negatives .*{message}"):
        build(6, 3, contrast_negatives=number)
