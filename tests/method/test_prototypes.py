import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from oracles import default as oracle
from oracles.reference import unit
from protoseg.method.prototypes import (
    assigned_sums,
    least_like_their_own,
    momentum_step,
    pairwise_cosine,
    starting_vectors,
    starting_weight,
)

QUICK = settings(max_examples=15, deadline=None, derandomize=True)
RULES = ["constant", "bias_corrected", "count_aware"]


def pixels(n, d, seed):
    return unit(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def memory(classes=3, k=4, d=6, weight=0.0, seed=0):
    p = pixels(classes * k, d, seed).view(classes, k, d)
    return p, torch.full((classes, k), weight, dtype=torch.float64), torch.ones(classes, k, dtype=torch.float64)


def move(state, x, ids, **named):
    sums, counts = assigned_sums(x, ids, state[0].shape[0] * state[0].shape[1])
    return momentum_step(*state, sums, counts, **named)


@pytest.mark.parametrize("rule", ["constant", "bias_corrected", "count_aware"])
@pytest.mark.parametrize("start", ["nested", "random", "data"])
def test_the_memory_moves_as_the_loop_over_prototypes(rule, start):
    mu, cap = 0.9, 7.0
    weight = starting_weight(start, mu, rule, cap)
    state = memory(weight=weight)
    slow = oracle.Memory(state[0], rule, mu, cap, weight)
    for s in range(8):
        x = pixels(40, 6, s + 10)
        ids = torch.randint(-1, 12, (40,), generator=torch.Generator().manual_seed(s))
        ids[ids % 4 == s % 4] = -1  # some prototypes without a pixel in every step
        state = move(state, x, ids, momentum=mu, rule=rule, count_cap=cap)
        slow.update(x, ids)
        assert_close(state[0], slow.p, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_first_hit_replaces_a_start_that_counts_for_nothing(rule):
    state = memory(weight=starting_weight("data", 0.999, rule))
    x = pixels(5, 6, 1)
    moved = move(state, x, torch.tensor([0, 0, 7, 7, 7]), momentum=0.999, rule=rule)[0].flatten(0, 1)
    assert_close(moved[0], unit(x[:2].sum(0)), rtol=0, atol=1e-12)
    assert_close(moved[7], unit(x[2:].sum(0)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@QUICK
@given(seed=st.integers(0, 10_000), start=st.sampled_from(["random", "data", "truncated_normal"]))
def test_a_prototype_without_a_pixel_keeps_its_bits_and_the_rest_stay_unit(rule, seed, start):
    state = memory(weight=starting_weight(start, 0.99, rule), seed=seed)
    ids = torch.randint(-1, 6, (30,), generator=torch.Generator().manual_seed(seed))  # never 6..11
    moved = move(state, pixels(30, 6, seed + 1), ids, momentum=0.99, rule=rule)
    hit = torch.zeros(12, dtype=torch.bool)
    hit[ids[ids >= 0].unique()] = True
    for before, after in zip(state, moved):
        assert torch.equal(before.flatten(0, 1)[~hit], after.flatten(0, 1)[~hit])
    assert not torch.equal(state[0], moved[0])
    assert_close(moved[0].norm(dim=-1), torch.ones(3, 4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_bias_correction_starts_at_one_and_falls_to_the_constant_rule():
    mu = 0.9
    state, twin = memory(1, 1, 3), memory(1, 1, 3, weight=1.0)
    for hit in range(200):
        x = unit(pixels(1, 3, hit + 5) + torch.tensor([2.0, 0, 0]))  # a cluster, so that the start is forgotten
        before = state[0]
        state = move(state, x, torch.tensor([0]), momentum=mu, rule="bias_corrected")
        a = (1 - mu) / (1 - mu ** (hit + 1))
        assert_close(state[0][0, 0], unit((1 - a) * before[0, 0] + a * x[0]), rtol=0, atol=1e-10)
        twin = move(twin, x, torch.tensor([0]), momentum=mu, rule="constant")
    assert_close(state[0], twin[0], rtol=0, atol=1e-6)


def test_count_aware_moves_less_for_five_pixels_than_for_many():
    x = pixels(1, 6, 3)

    def angle(n):
        state = memory(1, 1, weight=5000.0)
        after = move(state, x.expand(n, -1), torch.zeros(n, dtype=torch.int64), momentum=0.99, rule="count_aware")
        return float((state[0] - after[0]).norm())

    assert 0 < angle(5) < 0.1 * angle(500)


def test_the_order_of_pixels_does_not_matter():
    x, ids = pixels(50, 6, 0), torch.randint(-1, 12, (50,), generator=torch.Generator().manual_seed(0))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    first, second = (move(memory(weight=100.0), a, b, momentum=0.9)[0] for a, b in [(x, ids), (x[order], ids[order])])
    assert_close(first, second, rtol=0, atol=1e-14)


def test_a_sum_that_is_not_finite_moves_nothing():
    x = pixels(4, 6, 0)
    x[2, 1] = float("nan")
    state = memory(weight=100.0)
    moved = move(state, x, torch.tensor([0, 1, 1, 2]), momentum=0.9)[0]
    assert torch.equal(moved[0, 1], state[0][0, 1])
    assert moved.isfinite().all()


def test_sums_and_counts_leave_out_void():
    x = pixels(4, 3, 0)
    sums, counts = assigned_sums(x, torch.tensor([1, -1, 1, 0]), 3)
    assert counts.tolist() == [1, 2, 0]
    assert_close(sums, torch.stack([x[3], x[0] + x[2], torch.zeros(3, dtype=torch.float64)]))


@pytest.mark.parametrize("start", ["nested", "random", "data", "truncated_normal"])
@pytest.mark.parametrize(("classes", "k", "d"), [(3, 4, 16), (2, 1, 3), (19, 10, 64), (5, 2, 1)])
def test_a_start_is_unit_vectors_of_the_right_shape(start, classes, k, d):
    vectors = starting_vectors(classes, k, d, start)
    assert vectors.shape == (classes, k, d)
    assert_close(vectors.norm(dim=-1), torch.ones(classes, k), rtol=0, atol=1e-5)


def test_a_random_start_is_orthogonal_where_there_is_room():
    flat = starting_vectors(3, 4, 12, "random").flatten(0, 1)
    assert_close(flat @ flat.T, torch.eye(12), rtol=0, atol=1e-5)


def test_nested_prototypes_stay_near_their_class_and_classes_apart():
    torch.manual_seed(0)
    vectors = starting_vectors(11, 10, 128, "nested").double()
    centre = unit(vectors.mean(1))
    near = (vectors * centre[:, None]).sum(-1)
    assert near.min() > 0.7
    within = pairwise_cosine(vectors)
    assert_close(within, torch.full_like(within, 0.64), atol=0.03, rtol=0)
    between = (centre @ centre.T).fill_diagonal_(0).abs()
    assert between.max() < 0.2
    assert (vectors[0] @ vectors[1].T).abs().max() < 0.64  # every sibling is nearer than any other class
    alone = starting_vectors(11, 1, 128, "nested").flatten(0, 1)
    assert_close(alone @ alone.T, torch.eye(11), atol=1e-5, rtol=0)


def test_pairwise_cosine_is_the_loop_over_pairs():
    p = memory(3, 4, 6)[0]
    assert float(pairwise_cosine(p).mean()) == pytest.approx(oracle.mean_pairwise_cosine(p), abs=1e-12)
    assert_close(pairwise_cosine(p[:, :1].expand(-1, 4, -1)), torch.ones(3, dtype=torch.float64))
    assert pairwise_cosine(p[:, :1]).isnan().all()


def test_the_worst_served_pixel_of_a_class_is_found():
    x, classes = pixels(6, 3, 0), torch.tensor([0, 0, 2, -1, 2, 2])
    best = torch.tensor([0.9, 0.1, 0.5, -1.0, 0.2, 0.2], dtype=torch.float64)
    vectors, found = least_like_their_own(x, best, classes, 3)
    assert found.tolist() == [True, False, True]
    assert torch.equal(vectors[0], x[1])
    assert torch.equal(vectors[2], x[4])  # the first of a tie
    assert not vectors[1].any()
