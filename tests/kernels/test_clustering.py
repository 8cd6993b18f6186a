import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import memories
from heads import seeded
from memories import RULES, copied, move, pixels, remember, step
from protoseg import kernels
from protoseg.kernels import clustering_cpu
from protoseg.method import clustering, ranks
from protoseg.method.losses import Errors
from protoseg.method.prototypes import assigned_sums, error_sums

# the last are the lines that a GPU takes without Triton, on a CPU
ways = pytest.mark.parametrize("way", ["C", "PyTorch", "PyTorch on a GPU"], indirect=True)
QUICK = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def compiled():
    if not clustering_cpu.available():
        pytest.skip("no C compiler")


def problem(seed: int, n: int, classes: int, k: int, void: float = 0.1):
    g = seeded(seed)
    own = torch.rand(n, k, generator=g, dtype=torch.float64) * 2 - 1
    labels = torch.randint(classes, (n,), generator=g)
    return own, torch.where(torch.rand(n, generator=g) < void, -1, labels)


@ways
@QUICK
@given(seed=st.integers(0, 10_000), n=st.integers(0, 200), classes=st.integers(1, 12), k=st.integers(1, 10))
@pytest.mark.parametrize("kappa", [0.05, 0.3])
def test_scaling_vectors_give_the_plan_of_the_log_domain(way, kappa, seed, n, classes, k):
    own, labels = problem(seed, n, classes, k)
    true = clustering.sinkhorn(own, labels, classes, kappa=kappa, total=clustering.alone).exp()
    plan = kernels.transport_plan(own, labels, classes, kappa, 3, clustering.alone)
    valid = labels >= 0
    assert_close(plan[valid], true[valid], rtol=0, atol=1e-12)


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("present", [3, 40])
def test_assignments_are_those_of_the_log_domain(way, present, dtype):
    own, labels = problem(1, 4000, present, 10)
    own = own.to(dtype)
    fast = clustering.balanced_assignment(own, labels, 50)
    with kernels.plain_only():
        plain = clustering.balanced_assignment(own, labels, 50)
    assert int((fast != plain)[labels >= 0].sum()) <= (0 if dtype == torch.float64 else 2)


@ways
@QUICK
@given(seed=st.integers(0, 10_000), n=st.integers(0, 60), classes=st.integers(1, 40), k=st.integers(1, 12))
@pytest.mark.parametrize("small", ["nearest", "plan"])
def test_assignments_of_small_classes_and_strided_cosines_are_those_of_the_log_domain(way, small, seed, n, classes, k):
    own, labels = problem(seed, n, classes, k)
    best = clustering.sinkhorn(own, labels, classes).exp().topk(min(k, 2), 1).values
    tied = best[:, 0] - best[:, -1] < 1e-9  # two pixels may share two prototypes exactly: either is right
    judged = (labels >= 0) & (~tied | (k == 1) | (small == "nearest"))
    for cosines in (own, own.T.contiguous().T):
        fast = clustering.balanced_assignment(cosines, labels, classes, small_classes=small)
        with kernels.plain_only():
            plain = clustering.balanced_assignment(cosines, labels, classes, small_classes=small)
        assert torch.equal(fast[judged], plain[judged])
        assert ((fast >= 0) & (fast < k)).all()


@ways
def test_a_class_that_does_not_exist_is_refused(way):
    with pytest.raises((IndexError, RuntimeError)):
        clustering.balanced_assignment(torch.rand(4, 3), torch.tensor([0, 1, 2, 9]), 3)


def test_a_kappa_whose_exponents_do_not_fit_is_left_to_the_log_domain():
    assert kernels.transport_plan_applies(torch.float32, 0.05)
    assert not kernels.transport_plan_applies(torch.float32, 0.04)
    assert kernels.transport_plan_applies(torch.float64, 0.02)
    assert not kernels.transport_plan_applies(torch.float16, 0.05)


@pytest.mark.parametrize("iterations", [3, 50])
@pytest.mark.parametrize("kind", ["alike", "apart", "random signs"])
def test_the_furthest_cosines_and_many_rounds_stay_in_range_in_fp32(way, kind, iterations):
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


@ways
@QUICK
@given(seed=st.integers(0, 10_000), n=st.integers(1, 100), count=st.integers(1, 20))
def test_sorted_sums_are_the_sums(way, seed, n, count):
    g = seeded(seed)
    rows = torch.randn(n, 5, generator=g, dtype=torch.float64)
    index = torch.randint(-1, count, (n,), generator=g)
    weights = torch.randn(n, 2, generator=g, dtype=torch.float64)[:, 0]  # strided
    errors = Errors(torch.randn(count, 5, generator=g, dtype=torch.float64), weights)
    sums, counts = assigned_sums(rows, index, count)
    weighted, as_many = error_sums(rows, index, errors)
    with kernels.plain_only():
        true_sums, true_counts = assigned_sums(rows, index, count)
        true_weighted, _ = error_sums(rows, index, errors)
    assert_close(sums, true_sums, rtol=0, atol=1e-13)
    assert_close(weighted, true_weighted, rtol=0, atol=1e-13)
    assert torch.equal(counts, true_counts)
    assert torch.equal(as_many, true_counts)


@ways
def test_sums_of_nothing_are_zero(way):
    sums, counts = assigned_sums(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 3)
    assert sums.shape == (3, 4)
    assert not sums.any()
    assert not counts.any()


@pytest.mark.parametrize("way", ["PyTorch on a GPU"], indirect=True)
def test_a_gpu_sums_large_segments_in_parts_always_in_one_order(way, monkeypatch):
    g = seeded(0)
    rows = torch.randn(3000, 20, generator=g)
    index = torch.where(torch.rand(3000, generator=g) < 0.9, 1, torch.randint(-1, 4, (3000,), generator=g))
    for part in (1, 512, 4000):  # 64 parts, 6, 1
        monkeypatch.setattr("protoseg.kernels.clustering.PART", part)
        sums, counts = kernels.segment_sums(rows, index, 4)
        true = torch.zeros(5, 20, dtype=torch.float64).index_add_(0, torch.where(index < 0, 4, index), rows.double())
        assert_close(sums.double(), true[:4], rtol=0, atol=2e-4)
        assert counts.tolist() == [int((index == c).sum()) for c in range(4)]
        assert all(torch.equal(kernels.segment_sums(rows, index, 4)[0], sums) for _ in range(2))


@pytest.mark.parametrize("n", [0, 1, 5000])
def test_row_products_are_inner_products(n):
    rows, table = torch.randn(n, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    index = torch.randint(9, (n,))
    assert_close(kernels.row_products(rows, table, index), (rows * table[index]).sum(1), rtol=0, atol=1e-12)


# --- the memory's steps in place ------------------------------------------------------------------------------------


def tied(memory, x, moving):
    """Whether rounding decides which pixel of a class is least like its own prototype: lone pixels all are at 1."""
    near = (memory.prototypes.flatten(0, 1)[moving.clamp(min=0)] * x).sum(1)
    classes = torch.where(moving < 0, -1, moving // memory.prototypes.shape[1])
    lowest = [near[classes == c].sort().values[:2] for c in range(len(memory.prototypes))]
    return any(len(two) == 2 and two[1] - two[0] < 1e-9 for two in lowest)


@pytest.mark.parametrize("summed", [clustering.alone, lambda t: t.clone()], ids=["alone", "over ranks"])
@pytest.mark.parametrize("rule", RULES)
@QUICK
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 60),
    size=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 20)),
)
def test_the_memory_steps_are_the_plain_ones(way, rule, summed, seed, n, size):
    fast = remember(*size, seed=seed)
    plain = copied(fast)
    for s in range(3):
        x, moving = pixels(seed + s, n, size[2], size[0] * size[1])
        moved = copied(plain)
        move(moved, x, moving, rule=rule)
        after = 1000 if tied(moved, x, moving) else 3
        counts = step(fast, x, moving, rule=rule, total=summed, after=after)
        with kernels.plain_only():
            true = step(plain, x, moving, rule=rule, total=summed, after=after)
        assert torch.equal(counts, true)
        assert_close(tuple(fast), tuple(plain), rtol=0, atol=1e-12)


def test_the_sums_of_many_ranks_move_as_the_pixels_themselves(compiled, monkeypatch):
    x, moving = pixels(0, 50, 6, 12)
    direct, summed = remember(3, 4, 6), remember(3, 4, 6)
    move(direct, x, moving)
    monkeypatch.setattr("protoseg.method.ranks.world_size", lambda: 2)
    half = slice(0, 25), slice(25, 50)
    parts = [assigned_sums(x[h], moving[h], 12, clustering.alone) for h in half]
    monkeypatch.setattr("protoseg.method.prototypes.assigned_sums", lambda *_: [a + b for a, b in zip(*parts)])
    move(summed, x[half[0]], moving[half[0]], total=ranks.total)
    assert_close(tuple(direct), tuple(summed), rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_verdict_that_is_not_finite_changes_no_bit(way, value):
    memories.a_verdict_that_is_not_finite_changes_no_bit(value)


@pytest.mark.parametrize("rule", RULES)
def test_a_sum_without_a_direction_changes_no_bit(way, rule):
    memories.a_sum_without_a_direction_changes_no_bit(rule)


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_pixel_spoils_its_own_prototype_only(way, rule):
    memories.a_broken_pixel_spoils_its_own_prototype_only(rule)


def test_the_longest_idle_gives_way_to_the_first_of_the_worst_served(way):
    memories.the_longest_idle_gives_way_to_the_first_of_the_worst_served()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_do_not_depend_on_the_number_of_threads(compiled, dtype):
    own, labels = problem(0, 5000, 3, 7)
    x, moving = pixels(0, 5000, 33, 21, dtype)
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            memory = remember(3, 7, 33, dtype=dtype)
            step(memory, x, moving)
            plan = kernels.transport_plan(own.to(dtype), labels, 3, 0.06, 3, clustering.alone)
            seen.append([*memory, plan, *assigned_sums(x, moving, 21)])
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other))


@pytest.mark.parametrize(
    "tensors",
    [
        (torch.zeros(2, dtype=torch.float16),),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2, device="meta"),),
    ],
    ids=["half", "mixed", "elsewhere"],
)
def test_other_types_and_devices_are_left_to_pytorch(compiled, tensors):
    assert clustering_cpu.takes(torch.zeros(2))
    assert not clustering_cpu.takes(*tensors)


def test_operators_keep_what_they_promise_a_compiler(compiled):
    own, labels = problem(0, 40, 4, 3, void=0)
    x, moving = pixels(0, 40, 5, 12)
    sound = torch.zeros((), dtype=torch.float64)
    ops = torch.ops.protoseg
    ordered, order, starts, table = ops.first_sums(own, labels, 4)
    sums = table[:, :3]
    cases = [
        (ops.first_sums, (own, labels, 4)),
        (ops.next_sums, (ordered, starts, sums)),
        (ops.largest_mass, (ordered, order, starts, sums, table[:, 3], own, 3, False)),
        (ops.segment_sums, (x, moving, 12)),
        (ops.segment_sums, (x, moving, 12, x[:, 0].contiguous())),
        (ops.move_, (*remember(4, 3, 5)[:3], x, moving, sound, 0.9, "constant", 5.0)),
        (
            ops.momentum_step_,
            (*remember(4, 3, 5)[:3], *ops.segment_sums(x, moving, 12), sound, 0.9, "count_aware", 5.0),
        ),
        (ops.usage_step_, (*remember(4, 3, 5)[3:], ops.segment_sums(x, moving, 12)[1], sound, 0.9, 0.1)),
        (ops.reseed_, (*remember(4, 3, 5), x, moving, sound, 1)),
    ]
    for operator, arguments in cases:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
