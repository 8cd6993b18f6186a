"""The memory's steps through Triton against the plain lines of `method.prototypes`."""

import pytest
import torch
from torch.testing import assert_close

import memories
from memories import RULES, copied, move, step
from protoseg import kernels
from protoseg.method import clustering
from triton_device import DEVICE, at_hand

segments = pytest.importorskip("protoseg.kernels.gpu.segments", reason="no Triton")
pytestmark = at_hand


def remember(*size, dtype=torch.float64):
    return memories.remember(*size, seed=sum(size), dtype=dtype, device=DEVICE)


def pixels(*given):
    return memories.pixels(*given, device=DEVICE)


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
    exact, rounded = remember(4, 5, 24), remember(4, 5, 24, dtype=torch.float32)
    for s in range(5):
        x, moving = pixels(s, 200, 24, 20)
        step(exact, x, moving)
        step(rounded, x.float(), moving)
    assert_close(tuple(t.double() for t in rounded), tuple(exact), rtol=0, atol=2e-6)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_verdict_that_is_not_finite_changes_no_bit(value):
    memories.a_verdict_that_is_not_finite_changes_no_bit(value, DEVICE)


@pytest.mark.parametrize("rule", RULES)
def test_a_sum_without_a_direction_changes_no_bit(rule):
    memories.a_sum_without_a_direction_changes_no_bit(rule, DEVICE)


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_pixel_spoils_its_own_prototype_only(rule):
    memories.a_broken_pixel_spoils_its_own_prototype_only(rule, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_longest_idle_gives_way_to_the_first_of_the_worst_served(dtype):
    memories.the_longest_idle_gives_way_to_the_first_of_the_worst_served(dtype, DEVICE)


def test_steps_have_the_same_bits_every_time():
    x, moving = pixels(0, 400, 24, 12, torch.float32)
    found = []
    for _ in range(3):
        memory = remember(3, 4, 24, dtype=torch.float32)
        step(memory, x, moving, after=1)
        found.append(memory)
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(later, found[0]))
