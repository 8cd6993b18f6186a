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


@pytest.fixture(params=[4, 64])
def tiles(request, monkeypatch):
    """Tiles that a class needs many of, and tiles that hold many classes."""
    monkeypatch.setattr(segments, "ROWS", request.param)


@pytest.mark.parametrize(
    ("n", "classes", "k", "present"),
    [(70, 3, 10, 2), (40, 2, 1, 2), (5, 6, 17, 6), (0, 3, 4, 3)],
    ids=["a class absent", "K=1", "fewer pixels than prototypes", "nothing"],
)
@pytest.mark.parametrize("kappa", [0.05, 0.004])
def test_the_plan_is_that_of_the_definition(n, classes, k, present, kappa, tiles):
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
def test_assignments_are_those_of_the_definition(small_classes, dtype, tiles):
    own, labels = problem(150, 9, 5, 4, dtype=dtype)
    labels[0] = 8  # a lone pixel
    found = clustering.balanced_assignment(own, labels, 9, small_classes=small_classes)
    with kernels.plain_only():
        true = clustering.balanced_assignment(own, labels, 9, small_classes=small_classes)
    assert torch.equal(found[labels >= 0], true[labels >= 0])


def test_masses_in_fp32_stay_near_float64():
    own, labels = problem(200, 3, 10, void=0.0)
    found = []
    for dtype in (torch.float32, torch.float64):
        rounds = segments.Rounds(own.to(dtype), segments.grouped(labels, 3), 0.05)
        for _ in range(3):
            rounds.again()
        peak, total = rounds.masses()
        found.append((peak.exp() * total).double())
    assert_close(*found, rtol=2e-5, atol=0)


def test_sums_over_ranks_are_those_of_all_pixels(tiles):
    """Two ranks, each with every second pixel; what one sums with the other has been told before."""
    own, labels = problem(90, 4, 5)
    direct = segments.balanced_index(own, labels, 4, 0.05, 3, 5, False, None)
    parts = [slice(0, None, 2), slice(1, None, 2)]
    told = []
    for _ in range(3):  # each turn knows one round more
        said = []
        for part in parts:
            step = iter(range(3))

            def total(table, part=part, step=step, said=said):
                turn = next(step)
                if turn < len(told):
                    return told[turn]
                if turn == len(told):
                    said.append(table)
                return table

            segments.balanced_index(own[part], labels[part], 4, 0.05, 3, 5, False, total)
        told.append(said[0] + said[1])
    for part in parts:
        step = iter(told)
        found = segments.balanced_index(own[part], labels[part], 4, 0.05, 3, 5, False, lambda _, step=step: next(step))
        assert torch.equal(found[labels[part] >= 0], direct[part][labels[part] >= 0])


@pytest.mark.parametrize("count", [5, 40_001])
def test_segments_are_sorted_by_keys_as_narrow_as_their_number_allows(count):
    index = torch.tensor([count - 1, -1, 3, count - 1, 0], device=DEVICE)
    found = segments.grouped(index, count)
    assert found.keys.dtype == (torch.int16 if count == 5 else torch.int32)
    assert found.keys.tolist() == [0, 3, count - 1, count - 1, count]
    assert found.order.tolist() == [4, 2, 0, 3, 1]
    assert found.counts.nonzero().flatten().tolist() == [0, 3, count - 1]
    assert found.starts[-1] == 4


@pytest.mark.parametrize(("n", "d", "count"), [(150, 20, 7), (40, 130, 3), (0, 20, 3), (4, 20, 11)])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_sums_and_numbers_are_those_of_the_definition(n, d, count, layout, tiles):
    g = seeded(n)
    rows = torch.randn(n, d, generator=g, dtype=torch.float64).to(DEVICE)
    rows = rows if layout == "rows" else rows.T.contiguous().T
    index = torch.randint(-1, count, (n,), generator=g).to(DEVICE)
    weights = torch.randn(n, 2, generator=g, dtype=torch.float64).to(DEVICE)[:, 0]
    sums, counts = segments.segment_sums(rows, index, count)
    weighted, _ = segments.segment_sums(rows, index, count, weights)
    with kernels.plain_only():
        true_sums, true_counts = assigned_sums(rows, index, count)
        true_weighted, _ = assigned_sums(rows * weights[:, None], index, count)
    assert_close(sums, true_sums, rtol=0, atol=1e-13)
    assert_close(weighted, true_weighted, rtol=0, atol=1e-13)
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
