"""The memory's steps through Triton against the plain lines of `method.prototypes`."""

import pytest
import torch
from torch.testing import assert_close

from heads import seeded
from protoseg import kernels
from protoseg.method import clustering
from protoseg.method.prototypes import Memory, move_, note_usage_, reseed_
from protoseg.method.similarity import unit
from triton_device import DEVICE, at_hand

segments = pytest.importorskip("protoseg.kernels.gpu.segments", reason="no Triton")
pytestmark = at_hand
RULES = ["constant", "bias_corrected", "count_aware"]


def remember(classes, k, d, dtype=torch.float64):
    g = seeded(classes + k + d)
    vectors = unit(torch.randn(classes, k, d, generator=g, dtype=torch.float64))
    numbers = [torch.rand(classes, k, generator=g, dtype=torch.float64) for _ in range(3)]
    numbers[0] *= torch.rand(classes, k, generator=g) > 0.3  # some weigh nothing yet
    idle = torch.randint(6, (classes, k), generator=g).double()
    return Memory(*(t.to(DEVICE, dtype) for t in (vectors, *numbers, idle)))


def pixels(seed, n, d, count, dtype=torch.float64):
    g = seeded(seed)
    x = unit(torch.randn(n, d, generator=g, dtype=torch.float64))
    return x.to(DEVICE, dtype), torch.randint(-1, count, (n,), generator=g).to(DEVICE)


def verdict(x, value=0.0):
    return torch.tensor(value, dtype=x.dtype, device=DEVICE)


def move(memory, x, moving, value=0.0, rule="constant", total=clustering.alone):
    return move_(memory, x, moving, verdict(x, value), momentum=0.9, rule=rule, count_cap=3.0, total=total)


def step(memory, x, moving, value=0.0, rule="constant", total=clustering.alone, after=3):
    counts = move(memory, x, moving, value, rule, total)
    note_usage_(memory, counts, verdict(x, value))
    reseed_(memory, x, moving, verdict(x, value), after)
    return counts


def copied(memory):
    return Memory(*(t.clone() for t in memory))


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("n", "size"), [(150, (5, 4, 20)), (40, (2, 10, 130)), (60, (3, 1, 7)), (0, (3, 4, 6)), (5, (90, 3, 8))]
)
def test_the_memory_steps_are_the_plain_ones(n, size, rule, rows, monkeypatch):
    monkeypatch.setattr(segments, "ROWS", rows)
    fast = remember(*size)
    plain = copied(fast)
    for s in range(3):
        x, moving = pixels(s, n, size[2], size[0] * size[1])
        # Of a class with one pixel for each prototype that weighed nothing all cosines are 1: rounding would decide.
        after = 1000 if n == 5 else 3
        counts = step(fast, x, moving, rule=rule, after=after)
        with kernels.plain_only():
            true = step(plain, x, moving, rule=rule, after=after)
        assert torch.equal(counts, true)
        assert_close(tuple(fast), tuple(plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_sums_given_move_as_the_pixels_themselves(rule, monkeypatch):
    direct, summed = remember(3, 4, 6), remember(3, 4, 6)
    x, moving = pixels(0, 50, 6, 12)
    move(direct, x, moving, rule=rule)
    monkeypatch.setattr("protoseg.method.ranks.world_size", lambda: 2)
    monkeypatch.setattr("protoseg.method.ranks.total", lambda t: t)
    move(summed, x, moving, rule=rule, total=clustering.ranks.total)
    assert_close(tuple(direct), tuple(summed), rtol=0, atol=1e-13)


def test_fp32_stays_near_float64():
    exact, rounded = remember(4, 5, 24), remember(4, 5, 24, torch.float32)
    for s in range(5):
        x, moving = pixels(s, 200, 24, 20)
        step(exact, x, moving)
        step(rounded, x.float(), moving)
    assert_close(tuple(t.double() for t in rounded), tuple(exact), rtol=0, atol=2e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_verdict_that_is_not_finite_changes_no_bit(value):
    memory = remember(3, 4, 6)
    before = copied(memory)
    step(memory, *pixels(0, 50, 6, 12), value=value, after=1)
    assert all(torch.equal(a, b) for a, b in zip(memory, before))


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_pixel_spoils_its_own_prototype_only(rule):
    x, moving = pixels(0, 50, 6, 12)
    x[7, 2], moving[7] = float("nan"), 5
    memory = remember(3, 4, 6)
    before = copied(memory)
    move(memory, x, moving, rule=rule)
    assert all(m.isfinite().all() for m in memory)
    assert torch.equal(memory.prototypes.flatten(0, 1)[5], before.prototypes.flatten(0, 1)[5])
    assert not torch.equal(memory.prototypes.flatten(0, 1)[6], before.prototypes.flatten(0, 1)[6])
    idle = memory.idle.clone()
    reseed_(memory, x, moving, verdict(x), 1)
    assert torch.equal(memory.idle[1], idle[1])  # the worst pixel of its class is not known
    assert not torch.equal(memory.idle[[0, 2]], idle[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_longest_idle_gives_way_to_the_first_of_the_worst_served(dtype):
    memory = remember(2, 3, 4, dtype)
    memory.idle.copy_(torch.tensor([[5.0, 9, 9], [2, 0, 1]]))
    x, _ = pixels(0, 6, 4, 6, dtype)
    x[4] = x[1] = -memory.prototypes[0, 0]  # a tie
    x[5] = memory.prototypes[1, 0]
    before = copied(memory)
    reseed_(memory, x, torch.tensor([0, 0, 0, -1, 0, 3], device=DEVICE), verdict(x), 3)
    assert_close(memory.prototypes[0, 1], x[1])
    assert memory.idle.tolist() == [[5, 0, 9], [2, 0, 1]]  # at most one of a class, none that is not due
    assert memory.weight[0, 1] == memory.length[0, 1] == 1
    assert float(memory.usage[0, 1]) == pytest.approx(1 / 3)
    assert torch.equal(memory.prototypes[1], before.prototypes[1])


def test_steps_have_the_same_bits_every_time():
    x, moving = pixels(0, 400, 24, 12, torch.float32)
    found = []
    for _ in range(3):
        memory = remember(3, 4, 24, torch.float32)
        step(memory, x, moving, after=1)
        found.append(memory)
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(later, found[0]))
