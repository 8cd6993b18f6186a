import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from heads import seeded
from protoseg import kernels
from protoseg.method import clustering
from protoseg.method.prototypes import assigned_sums

QUICK = settings(max_examples=25, deadline=None, derandomize=True)


def problem(seed: int, n: int, classes: int, k: int, void: float = 0.1):
    g = seeded(seed)
    own = torch.rand(n, k, generator=g, dtype=torch.float64) * 2 - 1
    labels = torch.randint(classes, (n,), generator=g)
    return own, torch.where(torch.rand(n, generator=g) < void, -1, labels)


@QUICK
@given(seed=st.integers(0, 10_000), n=st.integers(0, 200), classes=st.integers(1, 12), k=st.integers(1, 10))
@pytest.mark.parametrize("kappa", [0.05, 0.3])
def test_scaling_vectors_give_the_plan_of_the_log_domain(kappa, seed, n, classes, k):
    own, labels = problem(seed, n, classes, k)
    true = clustering.sinkhorn(own, labels, classes, kappa=kappa, total=clustering.alone).exp()
    plan = kernels.transport_plan(own, labels, classes, kappa, 3, clustering.alone)
    valid = labels >= 0
    assert_close(plan[valid], true[valid], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("present", [3, 40])
def test_assignments_are_those_of_the_log_domain(present, dtype):
    own, labels = problem(1, 4000, present, 10)
    own = own.to(dtype)
    fast = clustering.balanced_assignment(own, labels, 50)
    with kernels.plain_only():
        plain = clustering.balanced_assignment(own, labels, 50)
    assert int((fast != plain)[labels >= 0].sum()) <= (0 if dtype == torch.float64 else 2)


def test_a_kappa_whose_exponents_do_not_fit_is_left_to_the_log_domain():
    assert kernels.transport_plan_applies(torch.float32, 0.05)
    assert not kernels.transport_plan_applies(torch.float32, 0.04)
    assert kernels.transport_plan_applies(torch.float64, 0.02)
    assert not kernels.transport_plan_applies(torch.float16, 0.05)


@pytest.mark.parametrize("iterations", [3, 50])
@pytest.mark.parametrize("kind", ["alike", "apart", "random signs"])
def test_the_furthest_cosines_and_many_rounds_stay_in_range_in_fp32(kind, iterations):
    own = torch.ones(3000, 10)
    if kind == "apart":  # one prototype everybody loves, one nobody does
        own[:, 1:] = -1
    if kind == "random signs":
        own = own * (2 * torch.randint(2, own.shape, generator=seeded(0)) - 1)
    labels = torch.zeros(3000, dtype=torch.int64)
    assert kernels.transport_plan_applies(torch.float32, 0.048)
    plan = kernels.transport_plan(own, labels, 2, 0.048, iterations, clustering.alone)
    true = clustering.sinkhorn(own.double(), labels, 2, kappa=0.048, iterations=iterations, total=clustering.alone)
    assert_close(plan, true.exp().float(), rtol=0, atol=1e-4)


@QUICK
@given(seed=st.integers(0, 10_000), n=st.integers(1, 100), count=st.integers(1, 20))
def test_sorted_sums_are_the_sums(seed, n, count):
    g = seeded(seed)
    rows = torch.randn(n, 5, generator=g, dtype=torch.float64)
    index = torch.randint(-1, count, (n,), generator=g)
    sums, counts = assigned_sums(rows, index, count)
    with kernels.plain_only():
        true_sums, true_counts = assigned_sums(rows, index, count)
    assert_close(sums, true_sums, rtol=0, atol=1e-13)
    assert torch.equal(counts, true_counts)


def test_sums_of_nothing_are_zero():
    sums, counts = assigned_sums(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 3)
    assert sums.shape == (3, 4)
    assert not sums.any()
    assert not counts.any()


@pytest.mark.parametrize("n", [0, 1, 5000])
def test_row_products_are_inner_products(n):
    rows, table = torch.randn(n, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    index = torch.randint(9, (n,))
    assert_close(kernels.row_products(rows, table, index), (rows * table[index]).sum(1), rtol=0, atol=1e-12)
