"""The memory of prototypes in tests, and the laws its steps hold to on every way: C's, PyTorch's and Triton's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from heads import seeded
from protoseg.method import clustering
from protoseg.method.prototypes import Memory, move_, note_usage_, reseed_
from protoseg.method.similarity import unit

RULES = ["constant", "bias_corrected", "count_aware"]


def remember(classes, k, d, seed=0, dtype=torch.float64, device="cpu") -> Memory:
    g = seeded(seed)
    vectors = unit(torch.randn(classes, k, d, generator=g, dtype=torch.float64))
    numbers = [torch.rand(classes, k, generator=g, dtype=torch.float64) for _ in range(3)]
    numbers[0] *= torch.rand(classes, k, generator=g) > 0.3  # some weigh nothing yet
    idle = torch.randint(6, (classes, k), generator=g).double()
    return Memory(*(t.to(device, dtype) for t in (vectors, *numbers, idle)))


def pixels(seed, n, d, count, dtype=torch.float64, device="cpu") -> tuple[Tensor, Tensor]:
    """(N, D) unit rows and the (N,) prototypes they move."""
    g = seeded(seed)
    x = unit(torch.randn(n, d, generator=g, dtype=torch.float64)).to(device, dtype)
    return x, torch.randint(-1, count, (n,), generator=g).to(device)


def copied(memory: Memory) -> Memory:
    return Memory(*(t.clone() for t in memory))


def move(memory, x, moving, verdict=0.0, rule="constant", total=clustering.alone) -> Tensor:
    return move_(memory, x, moving, x.new_tensor(verdict), momentum=0.9, rule=rule, count_cap=3.0, total=total)


def step(memory, x, moving, verdict=0.0, rule="constant", total=clustering.alone, after=3) -> Tensor:
    counts = move(memory, x, moving, verdict, rule, total)
    note_usage_(memory, counts, x.new_tensor(verdict))
    reseed_(memory, x, moving, x.new_tensor(verdict), after)
    return counts


def a_verdict_that_is_not_finite_changes_no_bit(value, device="cpu"):
    memory = remember(3, 4, 6, device=device)
    before = copied(memory)
    step(memory, *pixels(0, 50, 6, 12, device=device), verdict=float(value), after=1)
    assert all(torch.equal(a, b) for a, b in zip(memory, before))


def a_broken_pixel_spoils_its_own_prototype_only(rule, device="cpu"):
    x, moving = pixels(0, 50, 6, 12, device=device)
    x[7, 2], moving[7] = float("nan"), 5
    memory = remember(3, 4, 6, device=device)
    before = copied(memory)
    move(memory, x, moving, rule=rule)
    assert all(m.isfinite().all() for m in memory)
    assert torch.equal(memory.prototypes.flatten(0, 1)[5], before.prototypes.flatten(0, 1)[5])
    assert not torch.equal(memory.prototypes.flatten(0, 1)[6], before.prototypes.flatten(0, 1)[6])
    idle = memory.idle.clone()
    reseed_(memory, x, moving, x.new_tensor(0.0), 1)
    assert torch.equal(memory.idle[1], idle[1])  # the worst pixel of its class is not known
    assert not torch.equal(memory.idle[[0, 2]], idle[[0, 2]])


def a_sum_without_a_direction_changes_no_bit(rule, device="cpu"):
    """Neither of pixels that cancel nor of errors that are none, though the start weighs nothing or mu is 0."""
    memory = remember(3, 4, 6, device=device)
    memory.weight[0] = 0
    before = copied(memory)
    x, _ = pixels(0, 12, 6, 12, device=device)
    opposite = torch.arange(12, device=device).repeat(2)  # prototype i is given pixel i and its opposite
    move(memory, torch.cat([x, -x]), opposite, rule=rule)
    assert all(torch.equal(a, b) for a, b in zip(memory, before))
    counts = torch.full((12,), 2.0, dtype=x.dtype, device=device)
    for size in (0.0, 1e-13, 1.0):
        memory = copied(before)
        verdict = x.new_tensor(0.0)
        move_(memory, x, opposite[:12], verdict, momentum=0.0, rule=rule, count_cap=3.0, summed=(size * x, counts))
        assert all(torch.equal(a, b) for a, b in zip(memory, before)) == (size < 1)
        assert_close(memory.prototypes.norm(dim=2), torch.ones_like(memory.weight), rtol=0, atol=1e-12)


def the_longest_idle_gives_way_to_the_first_of_the_worst_served(dtype=torch.float64, device="cpu"):
    memory = remember(2, 3, 4, dtype=dtype, device=device)
    memory.idle.copy_(torch.tensor([[5.0, 9, 9], [2, 0, 1]]))
    x, _ = pixels(0, 6, 4, 6, dtype, device)
    x[4] = x[1] = -memory.prototypes[0, 0]  # a tie
    x[5] = memory.prototypes[1, 0]
    before = copied(memory)
    reseed_(memory, x, torch.tensor([0, 0, 0, -1, 0, 3], device=device), x.new_tensor(0.0), 3)
    assert_close(memory.prototypes[0, 1], x[1])
    assert memory.idle.tolist() == [[5, 0, 9], [2, 0, 1]]  # at most one of a class, none that is not due
    assert memory.weight[0, 1] == memory.length[0, 1] == 1
    assert float(memory.usage[0, 1]) == pytest.approx(1 / 3)
    assert torch.equal(memory.prototypes[1], before.prototypes[1])
