"""Labels by 16 bit codes against float64: a label they give is the right one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from heads import seeded
from protoseg.kernels import inference as kernel
from protoseg.kernels import screening

pytestmark = pytest.mark.skipif(not screening.lanes(), reason="no C compiler, or no 16 bit products on this CPU")


def table(counts, D, *, near=1.0, biased=False, shared=0.0, seed=0):
    """C classes of so many prototypes, `near` apart and around a vector of this length."""
    g = seeded(seed)
    sizes = torch.tensor(counts)
    order = torch.argsort(sizes, stable=True)
    vectors = near * F.normalize(torch.randn(sum(counts), D, generator=g), dim=1) + shared * torch.ones(D) / D**0.5
    bias = 0.1 * torch.randn(sum(counts), 1, generator=g) + shared if biased else None
    groups, start = [], 0
    for k, classes in zip(*(v.tolist() for v in sizes.unique(return_counts=True))):
        groups.append((order[start : start + classes], classes, k))
        start += classes
    groups = tuple(groups) if len(groups) > 1 else ((None, len(counts), counts[0]),)
    return kernel.Table(vectors, None, None, bias, groups, len(counts))


def true_scores(rows, given):
    """(n, C) in float64, classes in their own order."""
    products = rows.double() @ given.vectors.double().T + (0 if given.bias is None else given.bias.double().T)
    scores, start = torch.empty(len(rows), given.num_classes, dtype=torch.float64), 0
    for ids, classes, k in given.groups:
        part = products[:, start : start + classes * k].view(-1, classes, k).amax(2)
        scores[:, slice(None) if ids is None else ids] = part
        start += classes * k
    return scores


def screened(rows, screen):
    scores = torch.full((len(rows), screen.num_classes), torch.nan)
    error = torch.full((len(rows),), torch.nan)
    return screening.certain_labels(rows, screen, scores, error), scores, error


def wrong(labels, truth):
    return int(((labels >= 0) & (labels != truth)).sum())


def shapes():
    return st.lists(st.integers(1, 4), min_size=1, max_size=37) | st.integers(1, 35).map(lambda C: [3] * C)


@settings(max_examples=150, deadline=None)
@given(
    shapes(), st.integers(1, 70), st.integers(0, 60), st.booleans(), st.sampled_from([1.0, 1e-2, 1e-5]),
    st.sampled_from([0.0, 1.0, 30.0]), st.integers(0, 1000),
)  # fmt: skip
def test_a_certain_label_is_right_and_scores_are_within_their_error(counts, D, n, biased, near, shared, seed):
    given = table(counts, D, near=near, biased=biased, shared=shared, seed=seed)
    rows = torch.randn(n, D, generator=seeded(seed + 1)) * (3 * torch.randn(n, 1, generator=seeded(seed + 2))).exp()
    screen = screening.pack(given)
    if screen is None:  # nothing to tell apart
        assert bool((given.vectors == given.vectors[0]).all())
        return
    labels, scores, error = screened(rows, screen)
    truth = true_scores(rows, given)
    assert wrong(labels, truth.argmax(1)) == 0
    off = scores.double() - truth  # up to what all classes share
    usable = error > 0
    assert bool((off.amax(1) - off.amin(1) <= error)[usable].all())
    assert torch.equal(screening.certain_labels(rows, screen), labels)
    plain = kernel.class_maxima(rows, given).T  # what full precision says, with what it rounds
    assert wrong(labels, plain.argmax(1)) == 0


def test_most_pixels_near_a_prototype_are_certain():
    given = table([10] * 20, 65)
    rows = F.normalize(given.vectors.repeat(3, 1) + 0.1 * torch.randn(600, 65, generator=seeded(1)), dim=1)
    labels = screening.certain_labels(rows, screening.pack(given))
    assert (labels >= 0).float().mean() > 0.95
    assert wrong(labels, true_scores(rows, given).argmax(1)) == 0


@pytest.mark.parametrize("blind", [False, True])
def test_near_ties_are_left_open_and_without_the_margin_would_be_wrong(blind):
    """Pixels as good as between two prototypes of two classes."""
    given = table([1] * 9, 48)
    g = seeded(3)
    apart = given.vectors[0] - given.vectors[1]
    rows = given.vectors[0] + given.vectors[1] + 0.2 * torch.randn(500, 48, generator=g)
    rows -= (rows @ apart)[:, None] * apart / apart.square().sum()
    rows += 1e-5 * torch.randn(500, 1, generator=g) * apart
    screen = screening.pack(given)
    if blind:
        screen = replace(screen, spread=0.0, own=0.0)
    labels, truth = screening.certain_labels(rows, screen), true_scores(rows, given).argmax(1)
    if blind:
        assert wrong(labels, truth) > 20
    else:
        assert (labels < 0).float().mean() > 0.95
        assert wrong(labels, truth) == 0


@pytest.mark.parametrize("trust", [1.0, 0.85])
def test_what_a_pixel_is_rounded_by_is_bounded_tightly(trust):
    """Prototypes p and -p of equal numbers, a pixel whose every number is rounded against p by nearly a half."""
    D = 64
    p = torch.where(torch.rand(D, generator=seeded(0)) < 0.5, -1.0, 1.0)
    given = kernel.Table(torch.stack([p, -p]) / 8, None, None, None, ((None, 2, 1),), 2)
    pixel = screening.LENGTH / 8 * torch.cat([p[:32], -p[32:]])
    pixel[0] -= 15 * p[0]
    pixel[32] -= 15 * p[32]  # its codes lie 30 units nearer to -p
    pixel += 0.49 * p  # and it does not
    screen = screening.pack(given)
    screen = replace(screen, spread=trust * screen.spread)
    label = int(screening.certain_labels(pixel[None], screen))
    assert int(true_scores(pixel[None], given).argmax()) == 0
    assert label == (-1 if trust == 1 else 1)


@pytest.mark.parametrize("biased", [False, True])
def test_what_cannot_be_measured_is_left_open_and_its_neighbours_are_not(biased):
    given = table([3] * 10, 9, biased=biased)
    rows = torch.randn(60, 9, generator=seeded(1))
    alone = screening.certain_labels(rows, screening.pack(given))
    odd = {3: torch.nan, 10: torch.inf, 20: 0.0, 30: 1e-30, 40: 1e30, 50: -torch.inf}
    for i, value in odd.items():
        rows[i] = value
    labels = screening.certain_labels(rows, screening.pack(given))
    others = torch.tensor([i for i in range(60) if i not in odd])
    assert labels[list(odd)].eq(-1).all()
    assert torch.equal(labels[others], alone[others])
    assert alone.ge(0).float().mean() > 0.9


def test_threads_layout_and_number_of_pixels_change_nothing():
    given = table([2, 5, 1] * 6, 21, biased=True)
    rows, screen = torch.randn(21, 400, generator=seeded(1)).T, screening.pack(given)
    expected = screened(rows.contiguous(), screen)
    try:
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        found = screened(rows, screen)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, expected):
        assert torch.equal(a, b)
    for i in (0, 7, 399):
        assert int(screening.certain_labels(rows[i : i + 1], screen)) == int(expected[0][i])
    assert screening.certain_labels(rows[:0], screen).shape == (0,)


@pytest.mark.parametrize("paired", [2048, 10])
def test_the_farthest_pair_is_never_nearer_than_it_is(paired, monkeypatch):
    monkeypatch.setattr(screening, "PAIRED", paired)
    points = torch.randn(600, 5, generator=seeded(0), dtype=torch.float64)
    true = float(torch.cdist(points, points).amax())
    assert true <= screening.farthest_pair(points) <= (1.001 if paired > 10 else 2) * true


def test_few_prototypes_empty_lanes_and_other_types_are_not_screened():
    width = screening.lanes()
    assert screening.pays(table([10] * width, 16))
    assert not screening.pays(table([10] * 2, 16))
    assert not screening.pays(table([40] * 2, 16))
    assert not screening.pays(table([1] * (width - 1) + [60], 16))  # all as deep as the deepest
    given = table([10] * width, 16)
    assert not screening.pays(replace(given, vectors=given.vectors.double()))
    assert not screening.takes(screening.pack(given), torch.zeros(3, 16, dtype=torch.float64))


def test_without_a_compiler_nothing_is_screened(monkeypatch):
    monkeypatch.setattr(screening, "_library", lambda: None)
    monkeypatch.setattr(screening, "lanes", screening.lanes.__wrapped__)
    assert not screening.pays(table([10] * 16, 16))
