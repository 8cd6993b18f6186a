import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from oracles import default as oracle
from oracles import reference
from protoseg.method.clustering import balanced_assignment, class_counts, drawn_assignment, nearest_assignment, sinkhorn

QUICK = settings(max_examples=25, deadline=None, derandomize=True)


def cosines(n, k, seed):
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def random_classes(n, classes, seed, void=True):
    return torch.randint(-1 if void else 0, classes, (n,), generator=torch.Generator().manual_seed(seed))


@st.composite
def problems(draw):
    n, k, classes = draw(st.integers(0, 60)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    seed = draw(st.integers(0, 10_000))
    return cosines(n, k, seed), random_classes(n, classes, seed + 1), classes


@QUICK
@given(problem=problems(), iterations=st.integers(1, 5))
def test_every_pixel_spends_exactly_one_unit(problem, iterations):
    own, classes, num = problem
    plan = sinkhorn(own, classes, num, iterations=iterations).exp()[classes >= 0]
    assert (plan >= 0).all()
    assert_close(plan.sum(1), torch.ones(len(plan), dtype=torch.float64), rtol=0, atol=1e-12)


@QUICK
@given(problem=problems())
def test_at_convergence_every_prototype_holds_its_share_of_the_class(problem):
    own, classes, num = problem
    plan = sinkhorn(own, classes, num, kappa=0.5, iterations=300).exp()
    for c in range(num):
        mine = plan[classes == c]
        share = torch.full((own.shape[1],), len(mine) / own.shape[1], dtype=torch.float64)
        assert_close(mine.sum(0), share, rtol=1e-8, atol=1e-10)


def test_three_rounds_meet_the_shares_only_roughly_yet_better_than_none():
    own = cosines(400, 5, 3) * torch.tensor([0.2, 0.2, 0.2, 0.2, 1.0])
    classes = torch.zeros(400, dtype=torch.int64)
    off = (sinkhorn(own, classes, 1).exp().sum(0) - 80).abs().max()
    without = (torch.softmax(own / 0.05, 1).sum(0) - 80).abs().max()
    assert 1 < off < 0.5 * without


@QUICK
@given(problem=problems(), kappa=st.sampled_from([0.03, 0.05, 0.3]), iterations=st.integers(1, 4))
def test_the_plan_is_the_loop_over_classes(problem, kappa, iterations):
    own, classes, num = problem
    plan = sinkhorn(own, classes, num, kappa=kappa, iterations=iterations)
    expected = oracle.sinkhorn(own, classes, num, kappa, iterations)
    assert_close(plan[classes >= 0].exp(), expected[classes >= 0].exp(), rtol=0, atol=1e-12)


@QUICK
@given(problem=problems())
def test_the_plan_is_the_plain_exponential_form_of_the_release(problem):
    own, classes, num = problem
    plan = sinkhorn(own, classes, num).exp()
    for c in range(num):
        if (classes == c).any():
            assert_close(plan[classes == c], reference.plan_of_one_class(own[classes == c]).T, rtol=0, atol=1e-12)


@QUICK
@given(seed=st.integers(0, 10_000), extremes=st.booleans())
def test_a_class_never_sees_its_neighbours(seed, extremes):
    own, classes = cosines(50, 4, seed), random_classes(50, 3, seed + 1)
    together = sinkhorn(own, classes, 3)
    mine = classes == 1
    alone = sinkhorn(own[mine], torch.zeros(int(mine.sum()), dtype=torch.int64), 1)
    assert_close(together[mine], alone, rtol=0, atol=1e-12)
    others = torch.where(mine[:, None], own, own.new_tensor(-1.0 if extremes else 0.3))
    assert_close(sinkhorn(others, classes, 3)[mine], alone, rtol=0, atol=1e-12)


@QUICK
@given(seed=st.integers(0, 10_000))
def test_the_order_of_pixels_does_not_matter(seed):
    own, classes = cosines(40, 4, seed), random_classes(40, 3, seed + 1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    valid = classes[order] >= 0
    assert_close(sinkhorn(own, classes, 3)[order][valid], sinkhorn(own[order], classes[order], 3)[valid])
    shuffled = balanced_assignment(own[order], classes[order], 3)
    assert torch.equal(balanced_assignment(own, classes, 3)[order][valid], shuffled[valid])


@QUICK
@given(seed=st.integers(0, 10_000))
def test_the_order_of_prototypes_does_not_matter(seed):
    own, classes = cosines(40, 5, seed), random_classes(40, 2, seed + 1, void=False)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    assert_close(sinkhorn(own, classes, 2)[:, order], sinkhorn(own[:, order], classes, 2))


def test_void_pixels_change_nothing():
    own, classes = cosines(30, 4, 0), random_classes(30, 3, 1, void=False)
    more = torch.cat([own, cosines(20, 4, 2)])
    plan = sinkhorn(more, torch.cat([classes, torch.full((20,), -1)]), 3)
    assert_close(plan[:30], sinkhorn(own, classes, 3), rtol=0, atol=1e-13)
    assert plan.isfinite().all()


@pytest.mark.parametrize("kappa", [0.05, 0.02, 0.005])
def test_single_precision_stays_finite_where_plain_exp_overflows(kappa):
    own, classes = cosines(64, 4, 5).float(), random_classes(64, 3, 6)
    own[:8] = torch.tensor([1.0, -1.0, -1.0, -1.0])
    plan = sinkhorn(own, classes, 3, kappa=kappa)
    expected = oracle.sinkhorn(own.double(), classes, 3, kappa, 3)
    valid = classes >= 0
    assert plan.isfinite().all()
    assert_close(plan[valid].exp().double(), expected[valid].exp(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_fewer_pixels_than_prototypes_and_none_at_all(n):
    own, classes = cosines(n, 10, 0), torch.zeros(n, dtype=torch.int64)
    plan = sinkhorn(own, classes, 4)
    assert plan.shape == (n, 10)
    assert_close(plan.exp().sum(1), torch.ones(n, dtype=torch.float64))
    # A class that cannot be shared out takes its nearest prototypes.
    assert torch.equal(balanced_assignment(own, classes, 4), own.argmax(1))


def test_one_pixel_has_a_uniform_plan():
    plan = sinkhorn(cosines(1, 7, 0), torch.zeros(1, dtype=torch.int64), 1).exp()
    assert_close(plan, torch.full((1, 7), 1 / 7, dtype=torch.float64), rtol=0, atol=1e-12)


def test_one_prototype_takes_everything():
    classes = random_classes(20, 3, 0)
    assert not balanced_assignment(cosines(20, 1, 0), classes, 3).any()
    assert_close(sinkhorn(cosines(20, 1, 0), classes, 3)[classes >= 0].exp().sum(), (classes >= 0).double().sum())


def test_a_prototype_switched_off_gets_nothing_and_the_rest_share():
    own, classes = cosines(60, 4, 1), torch.zeros(60, dtype=torch.int64)
    log_shares = torch.tensor([[math.log(0.5), math.log(0.25), math.log(0.25), -math.inf]], dtype=torch.float64)
    plan = sinkhorn(own, classes, 1, kappa=0.5, iterations=300, log_shares=log_shares).exp()
    assert_close(plan.sum(0), torch.tensor([30.0, 15, 15, 0], dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_balance_beats_nearest_where_one_prototype_would_take_all():
    own = cosines(200, 4, 7) * 0.05
    own[:, 2] += 0.5
    classes = torch.zeros(200, dtype=torch.int64)
    assert set(nearest_assignment(own, classes, 1).tolist()) == {2}
    counts = torch.bincount(balanced_assignment(own, classes, 1), minlength=4)
    assert counts.min() > 20


def test_counts_leave_out_void():
    assert class_counts(torch.tensor([0, -1, 2, 2, -1]), 4).tolist() == [1, 0, 2, 0]


def test_the_draw_adds_noise_to_probabilities_not_to_their_logarithm():
    plan = torch.tensor([[0.9, 0.1], [0.9, 0.1]], dtype=torch.float64)
    noise = torch.tensor([[0.0, 0.7], [0.0, 0.9]], dtype=torch.float64)
    # On log-probabilities both would stay at 0: log(0.1) + 0.9 < log(0.9).
    assert drawn_assignment(plan.log(), noise).tolist() == [0, 1]


def test_a_certain_pixel_is_drawn_from_its_prototype_less_than_a_quarter_of_the_time():
    torch.manual_seed(0)
    plan = torch.full((20_000, 10), 1e-30, dtype=torch.float64)
    plan[:, 3] = 1
    share = (drawn_assignment(plan.log()) == 3).double().mean()
    assert abs(float(share) - math.e / (math.e + 9)) < 0.015
