import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from oracles.reference import unit as slow_unit
from protoseg import PrototypeHead
from protoseg.method import similarity
from protoseg.method.similarity import HUBER_DELTA, measured, unit

QUICK = settings(max_examples=20, deadline=None, derandomize=True)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@QUICK
@given(seed=st.integers(0, 10_000), exponent=st.integers(-6, 6))
def test_unit_forgets_length_and_keeps_direction(seed, exponent):
    x = random(5, 7, seed=seed)
    assert_close(similarity.unit(x * 10.0**exponent), slow_unit(x), rtol=0, atol=1e-12)


def test_unit_of_a_zero_vector_is_zero_and_so_is_its_gradient():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    similarity.unit(x)[:, 0].sum().backward()
    assert torch.equal(similarity.unit(x)[0], torch.zeros(2))
    assert_close(x.grad, torch.tensor([[0.0, 0.0], [0.128, -0.096]]))


def test_what_is_not_a_number_has_a_gradient_that_is_none_either():
    x = torch.full((1, 4), torch.nan, requires_grad=True)
    similarity.unit(x).sum().backward()
    assert x.grad.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_normalised_in_single(dtype):
    # Squares of 300 overflow fp16; the length must be taken in fp32.
    x = (300 * random(3, 64)).to(dtype)
    length = similarity.unit(x).float().norm(dim=-1)
    assert_close(length, torch.ones(3), rtol=0, atol=1e-5)


def test_cosine_similarity_is_one_loop_per_symbol():
    x, p = slow_unit(random(6, 5)), slow_unit(random(3, 2, 5, seed=1))
    table = similarity.cosine_similarity(x, p)
    for i in range(6):
        for c in range(3):
            for k in range(2):
                expected = sum(float(x[i, d] * p[c, k, d]) for d in range(5))
                assert math.isclose(float(table[i, c * 2 + k]), expected, abs_tol=1e-14)


def test_a_class_scores_as_its_nearest_prototype():
    table = random(9, 4 * 3)
    best = similarity.class_similarity(table, 4)
    for i in range(9):
        for c in range(4):
            assert float(best[i, c]) == max(float(table[i, c * 3 + k]) for k in range(3))


def test_exact_ties_share_the_gradient():
    table = torch.tensor([[0.5, 0.5, 0.1, 0.3]], dtype=torch.float64, requires_grad=True)  # 1 class, 4 prototypes
    similarity.class_similarity(table, 1).sum().backward()
    assert_close(table.grad, torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64))


def test_own_similarity_picks_the_pixels_class():
    table, classes = random(6, 3 * 2), torch.tensor([0, 2, 1, -1, 2, 0])
    own = similarity.own_similarity(table, classes, 3)
    for i, c in enumerate(classes.tolist()):
        if c >= 0:
            assert torch.equal(own[i], table[i, 2 * c : 2 * c + 2])
    assert own.isfinite().all()


def test_rows_are_in_the_order_image_row_column():
    features = random(2, 3, 2, 4)
    rows = similarity.embed(features)
    n = 0
    for b in range(2):
        for i in range(2):
            for j in range(4):
                assert torch.equal(rows[n], features[b, :, i, j])
                n += 1


def test_the_width_norm_of_the_release_divides_each_row_of_a_channel():
    features = random(2, 3, 2, 4)
    rows = similarity.embed(features, norm="width").reshape(2, 2, 4, 3)
    for b in range(2):
        for d in range(3):
            for i in range(2):
                row = features[b, d, i]
                assert_close(rows[b, i, :, d], row / math.sqrt(sum(float(v) ** 2 for v in row)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("distance", ["cosine", "euclidean", "huber"])
def test_a_distance_orders_as_the_cosine_and_is_nothing_on_the_prototype(distance):
    cosine = torch.linspace(-1, 1, 201, dtype=torch.float64, requires_grad=True)
    similarity = measured(cosine, distance)
    assert (similarity.diff() > 0).all()
    assert similarity[-1].item() == pytest.approx(1, abs=2e-6)
    (gradient,) = torch.autograd.grad(similarity.sum(), cosine)
    assert gradient.isfinite().all()


def test_the_distances_are_what_they_are_called():
    torch.manual_seed(0)
    x, p = unit(torch.randn(50, 7, dtype=torch.float64)), unit(torch.randn(50, 7, dtype=torch.float64))
    cosine, chord = (x * p).sum(1), (x - p).norm(dim=1)
    torch.testing.assert_close(1 - measured(cosine, "euclidean"), chord, atol=1e-12, rtol=0)
    pseudo_huber = HUBER_DELTA * ((1 + (chord / HUBER_DELTA) ** 2).sqrt() - 1)
    torch.testing.assert_close(1 - measured(cosine, "huber"), pseudo_huber, atol=1e-12, rtol=0)


@pytest.mark.parametrize("distance", ["euclidean", "huber"])
def test_a_head_predicts_with_and_without_gradient_alike_whatever_the_distance(distance):
    torch.manual_seed(0)
    head = PrototypeHead(8, 3, embed_dim=6, num_prototypes=4, distance=distance)
    features, labels = torch.randn(2, 8, 5, 6), torch.randint(0, 3, (2, 10, 12))
    with torch.no_grad():
        fast = head(features)
    torch.testing.assert_close(fast, head(features).detach(), atol=1e-5, rtol=0)
    losses = head.losses(features, labels)
    near = measured(
        (head.embed(features) * head.prototypes.flatten(0, 1)[losses.assignment.flatten()]).sum(1), distance
    )
    torch.testing.assert_close(
        losses.ppd, (1 - near).square().mean(), atol=1e-6, rtol=1e-5
    )  # Eq. (6) with this distance
    losses.total.backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
