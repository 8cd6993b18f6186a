import pytest
import torch
from torch.testing import assert_close

from heads import seeded
from protoseg import kernels
from protoseg.method import clustering
from protoseg.method.prototypes import assigned_sums
from triton_device import DEVICE, at_hand

segments = pytest.importorskip("protoseg.kernels.gpu.segments", reason="no Triton")
pytestmark = at_hand
ALONE = {"total": clustering.alone, "largest": clustering.alone}


def problem(n, classes, k, present=None, void=0.1, dtype=torch.float64):
    """(N, K) cosines, pixels last in memory as the one pass leaves them, and (N,) classes."""
    g = seeded(n + classes + k)
    own = torch.rand(k, n, generator=g, dtype=torch.float64) * 2 - 1
    labels = torch.randint(present or classes, (n,), generator=g)
    labels = torch.where(torch.rand(n, generator=g) < void, -1, labels)
    return own.to(DEVICE, dtype).T, labels.to(DEVICE)


@pytest.fixture(params=[1, 5])
def parts(request, monkeypatch):
    """One part of a segment, and more parts than some segments have pixels."""
    monkeypatch.setattr(segments, "PART", 1)
    monkeypatch.setattr(segments, "PARTS", request.param)


@pytest.mark.parametrize(
    ("n", "classes", "k", "present"),
    [(70, 3, 10, 2), (40, 2, 1, 2), (5, 6, 17, 6), (0, 3, 4, 3)],
    ids=["a class absent", "K=1", "fewer pixels than prototypes", "nothing"],
)
@pytest.mark.parametrize("kappa", [0.05, 0.004])
def test_the_plan_is_that_of_the_definition(n, classes, k, present, kappa, parts):
    own, labels = problem(n, classes, k, present)
    with kernels.plain_only():
        true = clustering.sinkhorn(own, labels, classes, kappa=kappa, **ALONE)
    found = clustering.sinkhorn(own, labels, classes, kappa=kappa, **ALONE)
    assert_close(found[labels >= 0], true[labels >= 0], rtol=0, atol=2e-13 / kappa)


def test_shares_and_a_prototype_switched_off():
    own, labels = problem(60, 3, 4)
    shares = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=own.dtype, device=DEVICE).log().expand(3, 4)
    with kernels.plain_only():
        true = clustering.sinkhorn(own, labels, 3, log_shares=shares, iterations=5, **ALONE)
    found = clustering.sinkhorn(own, labels, 3, log_shares=shares, iterations=5, **ALONE)
    assert_close(found[labels >= 0], true[labels >= 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("small_classes", ["nearest", "plan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_assignments_are_those_of_the_definition(small_classes, dtype, parts):
    own, labels = problem(150, 9, 5, 4, dtype=dtype)
    labels[0] = 8  # a lone pixel
    found = clustering.balanced_assignment(own, labels, 9, small_classes=small_classes)
    with kernels.plain_only():
        true = clustering.balanced_assignment(own, labels, 9, small_classes=small_classes)
    assert torch.equal(found[labels >= 0], true[labels >= 0])


def test_masses_in_fp32_stay_near_float64():
    own, labels = problem(200, 3, 10, void=0.0)
    grouped = segments.grouped(labels, 3)
    factors = torch.rand(3, 10, generator=seeded(0), dtype=torch.float64).to(DEVICE) + 0.1
    for given in (None, factors):
        true = segments.masses(own, grouped, given, 0.05)
        found = segments.masses(own.float(), grouped, None if given is None else given.float(), 0.05)
        assert_close(found.double(), true, rtol=2e-5, atol=0)


@pytest.mark.parametrize(("n", "d", "count"), [(150, 20, 7), (40, 130, 3), (0, 20, 3), (4, 20, 11)])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_sums_and_numbers_are_those_of_the_definition(n, d, count, layout, parts):
    g = seeded(n)
    rows = torch.randn(n, d, generator=g, dtype=torch.float64).to(DEVICE)
    rows = rows if layout == "rows" else rows.T.contiguous().T
    index = torch.randint(-1, count, (n,), generator=g).to(DEVICE)
    sums, counts = segments.segment_sums(rows, index, count)
    with kernels.plain_only():
        true_sums, true_counts = assigned_sums(rows, index, count)
    assert_close(sums, true_sums, rtol=0, atol=1e-13)
    assert torch.equal(counts, true_counts)


def test_sums_have_the_same_bits_every_time():
    rows = torch.randn(400, 20, generator=seeded(0)).to(DEVICE)
    index = torch.randint(-1, 3, (400,), generator=seeded(1)).to(DEVICE)
    once = segments.segment_sums(rows, index, 3)[0]
    assert all(torch.equal(segments.segment_sums(rows, index, 3)[0], once) for _ in range(3))


def test_bf16_rows_are_summed_in_fp32():
    rows = torch.full((600, 16), 1.0, dtype=torch.bfloat16, device=DEVICE)  # 256 + 1 is 256 in bf16
    sums, _ = segments.segment_sums(rows, torch.zeros(600, dtype=torch.int64, device=DEVICE), 1)
    assert sums.dtype == torch.float32
    assert (sums == 600).all()
