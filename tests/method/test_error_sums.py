"""`update_from="errors"`: prototypes moved by what their classes still get wrong."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from oracles.default import error_sums as slow_sums
from oracles.reference import unit
from protoseg.kernels import plain_only, similarity
from protoseg.method.head import PrototypeHead
from protoseg.method.losses import label_errors
from protoseg.method.prototypes import assigned_sums, error_sums, errors_by_prototype, momentum_step

C, K, D, SCALE = 3, 4, 6, 5.0


def random_case(seed, n=40, classes=C, k=K):
    g = torch.Generator().manual_seed(seed)
    x = unit(torch.randn(n, D, generator=g, dtype=torch.float64))
    p = unit(torch.randn(classes, k, D, generator=g, dtype=torch.float64))
    given = torch.randint(-1, classes * k, (n,), generator=g)
    return x, p, given


def score(cosines, classes=C):
    return SCALE * cosines.unflatten(1, (classes, -1)).amax(2)


def errors_of(x, labels, p):
    """1[y = c] - P(c) of pixels that are their own labels."""
    return F.one_hot(labels, len(p)) - score(x @ p.flatten(0, 1).T, len(p)).softmax(1)


def sums_of(x, given, p, errors):
    classes = torch.where(given >= 0, given.div(p.shape[1], rounding_mode="floor"), -1)
    return error_sums(x, given, errors_by_prototype(x, x @ p.flatten(0, 1).T, errors, classes))


@pytest.mark.parametrize("seed", range(3))
def test_the_sums_are_those_of_the_loop_over_pixels(seed):
    x, p, given = random_case(seed)
    errors = torch.randn(len(x), C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sums, counts = sums_of(x, given, p, errors)
    slow, number = slow_sums(x, given, p, errors)
    assert_close(sums, slow.flatten(0, 1), rtol=0, atol=1e-13)
    assert torch.equal(counts, number.flatten())


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (20, 28), (17, 30), (3, 4)])
def test_errors_of_labels_go_back_by_the_adjoint_of_the_resize(size, align_corners):
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(2, C, 5, 7, generator=g, dtype=torch.float64)
    labels = torch.randint(0, C, (2, *size), generator=g)
    labels[0, 0] = 255
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    found = label_errors(scores, labels, class_weights=weights, align_corners=align_corners)
    # the resize as a matrix, from what it makes of one bright pixel after the other
    bright = torch.eye(35, dtype=torch.float64).view(35, 1, 5, 7)
    matrix = F.interpolate(bright, size=size, mode="bilinear", align_corners=align_corners).view(35, -1)  # hw HW
    probability = (scores.flatten(2) @ matrix).softmax(1)  # B C HW
    flat = labels.flatten(1)
    right = F.one_hot(torch.where(flat == 255, 0, flat), C).transpose(1, 2)
    wrong = torch.where(flat == 255, 0, weights[flat.clamp(max=C - 1)])[:, None] * (right - probability)
    expected = wrong @ matrix.T * (35 / (size[0] * size[1]))  # B C hw
    assert_close(found, expected.transpose(1, 2).reshape(-1, C), rtol=0, atol=1e-13)


def test_given_their_nearest_prototypes_they_are_the_gradient_of_the_cross_entropy_of_the_labels():
    g = torch.Generator().manual_seed(1)
    x, p, _ = random_case(1, n=35)
    labels = torch.randint(0, C, (1, 20, 28), generator=g)
    p.requires_grad_(True)
    scores = score(x @ p.flatten(0, 1).T).T.view(1, C, 5, 7)
    large = F.interpolate(scores, size=(20, 28), mode="bilinear", align_corners=False)
    (gradient,) = torch.autograd.grad(F.cross_entropy(large, labels, reduction="sum"), p)
    sums, _ = sums_of(x, torch.full((35,), -1), p.detach(), label_errors(scores.detach(), labels))
    assert_close(16 * sums.view_as(p), -gradient / SCALE, rtol=0, atol=1e-12)


def overlapping(seed, n=600):
    """Two unequally spread classes in one narrow cone: their means lie almost alike."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    x = 0.3 * torch.randn(n, D, generator=g, dtype=torch.float64)
    x[:, 0] += 3
    x[:, 1] += torch.where(labels == 0, 0.5, -0.5)
    x[:, 2] += 4 * x[:, 1] * (torch.rand(n, generator=g, dtype=torch.float64) < 0.3)
    return unit(x), labels


def settled(x, labels, sums_of, steps=3000, momentum=0.99):
    p = unit(torch.randn(2, 1, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    weight = torch.full((2, 1), 100.0, dtype=torch.float64)
    for _ in range(steps):
        p, *_ = momentum_step(p, weight, torch.ones_like(weight), *sums_of(x, labels, p), momentum=momentum)
    return p


def loss_of(p, x, labels):
    return float(F.cross_entropy(score(x @ p.flatten(0, 1).T, 2), labels))


def test_they_come_to_rest_at_the_best_softmax_regression_on_unit_vectors_and_means_do_not():
    x, labels = overlapping(0)
    by_errors = settled(x, labels, lambda x, y, p: sums_of(x, y, p, errors_of(x, y, p)))
    by_means = settled(x, labels, lambda x, y, p: assigned_sums(x, y, 2))
    free = torch.randn(2, 1, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64).requires_grad_(True)
    optimizer = torch.optim.LBFGS([free], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(score(x @ F.normalize(free, dim=2).flatten(0, 1).T, 2), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = loss_of(F.normalize(free.detach(), dim=2), x, labels)
    assert loss_of(by_errors, x, labels) == pytest.approx(best, abs=1e-6)
    assert loss_of(by_means, x, labels) > best + 0.05


def head(**named):
    torch.manual_seed(0)
    settings = {"num_prototypes": K, "projection": "none", "embed_dim": D, "update_from": "errors", **named}
    made = PrototypeHead(D, C, **settings).double()
    made.prototypes.copy_(unit(made.prototypes))  # to the last bit of float64, not of float32
    return made


def batch(seed=0, size=(5, 7)):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(2, D, 5, 7, generator=g, dtype=torch.float64)
    labels = torch.randint(0, C, (2, *size), generator=g)
    labels[0, 0] = 255
    return features, labels


@pytest.mark.parametrize("size", [(5, 7), (20, 28), (13, 15)])
@pytest.mark.parametrize("distance", ["cosine", "huber"])
@pytest.mark.parametrize("rule", ["constant", "bias_corrected", "count_aware"])
def test_a_head_moves_by_them(rule, distance, size):
    weighted = {"class_weights": (0.5, 2.0, 1.0)}
    one, plain = (head(momentum=0.7, momentum_rule=rule, distance=distance, **weighted) for _ in range(2))
    before = one.prototypes.clone()
    features, labels = batch(size=size)
    losses = one.losses(features, labels)
    errors = label_errors(one(features), labels, class_weights=one.class_weights)
    sums, counts = slow_sums(losses.embedding, losses.moving, before, errors)
    expected, *_ = momentum_step(
        before, one.weight.clone(), one.length.clone(), sums, counts, momentum=0.7, rule=rule, count_cap=one.count_cap
    )
    one.update(losses)
    assert_close(one.prototypes, expected, rtol=0, atol=1e-12)
    with plain_only():
        plain.update(plain.losses(features, labels))
    assert_close(plain.prototypes, one.prototypes, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{"score_norm": "layer_norm"}, {"contrast_siblings": False}])
def test_the_one_pass_hands_out_the_errors_of_the_definition(settings, monkeypatch):
    monkeypatch.setattr(similarity, "CPU_BAND", 70 * C * K)  # several bands an image
    monkeypatch.setattr(similarity, "FEWEST_COLUMNS", 7)
    features, labels = batch(size=(20, 28))
    one = head(**settings)
    found = one.losses(features, labels)
    with plain_only():
        plain = one.losses(features, labels)
    for of_one, of_plain in zip(found.errors, plain.errors, strict=True):
        assert_close(of_one, of_plain, rtol=0, atol=1e-12)
    assert_close(found.total, plain.total, rtol=0, atol=1e-12)
    assert head(update_from="all").losses(features, labels).errors is None


def test_micro_batches_of_one_step_move_as_one_batch_however_many_labels_each_has():
    whole, parts = head(momentum=0.5, num_prototypes=1), head(momentum=0.5, num_prototypes=1)
    features, labels = batch(size=(20, 28))
    labels[1, :15] = 255
    whole.update(whole.losses(features, labels))
    parts.update([parts.losses(features[i : i + 1], labels[i : i + 1]) for i in range(2)])
    assert_close(parts.prototypes, whole.prototypes, rtol=0, atol=1e-12)


def test_an_absent_class_keeps_its_bits_though_it_attracts_pixels():
    one = head(momentum=0.5)
    features, labels = batch()
    labels[labels == 1] = 0
    before = one.prototypes.clone()
    one.update(one.losses(features, labels))
    assert torch.equal(one.prototypes[1], before[1])
    assert not torch.equal(one.prototypes[0], before[0])


def test_certain_pixels_move_nothing_and_nothing_becomes_nan():
    one = head(momentum=0.5, score_scale=1e6, learn_scale=False)
    before = one.prototypes.clone()
    features = before[:, 0].T.reshape(1, D, 1, C)
    one.update(one.losses(features, torch.arange(C).view(1, 1, C)))
    assert_close(one.prototypes, before, rtol=0, atol=1e-12)


def test_without_a_labelled_pixel_nothing_moves():
    one = head(momentum=0.5)
    before = one.prototypes.clone()
    features, labels = batch()
    one.update(one.losses(features, torch.full_like(labels, 255)))
    assert torch.equal(one.prototypes, before)


@pytest.mark.parametrize("rule", ["constant", "bias_corrected", "count_aware"])
@pytest.mark.parametrize("start", ["nested", "data"])
def test_prototypes_stay_of_unit_length_when_nothing_is_wrong_any_more(rule, start):
    """Two classes that are told apart at once, so that errors fall below what fp32 can hold."""
    torch.manual_seed(0)
    one = PrototypeHead(D, 2, num_prototypes=2, projection="none", momentum_rule=rule, start=start, score_scale=100.0)
    labels = torch.arange(2).repeat(1, 8, 8)
    features = torch.zeros(1, D, 8, 16)
    features[:, 0] = torch.where(labels == 0, 1.0, -1.0)
    for _ in range(300):
        one.update(one.losses(features + 0.1 * torch.randn_like(features), labels))
        assert_close(one.prototypes.norm(dim=2), torch.ones(2, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", [None, [0.7, 1.3, 0.9]])
@pytest.mark.parametrize("scale", [20.0, 60.0])
@pytest.mark.parametrize("plain", [False, True])
def test_prototypes_of_a_class_that_lacks_nothing_stay_with_their_pixels(plain, scale, weights):
    """In fp32 a probability of 1 lacks what was rounded, of either sign: its direction is not a direction to go."""
    torch.manual_seed(0)
    one = PrototypeHead(
        8, C, num_prototypes=3, projection="none", embed_dim=8, class_weights=weights, score_scale=scale,
        learn_scale=False,
    )  # fmt: skip
    centres = one.prototypes.mean(1)
    labels = (torch.arange(8) * C // 8).expand(2, 8, 8)
    features = (centres[labels] + 0.05 * torch.randn(2, 8, 8, 8)).permute(0, 3, 1, 2)

    def nearness():
        return float((one.prototypes * F.normalize(centres, dim=1)[:, None]).sum(2).min())

    before = nearness()
    with plain_only() if plain else nullcontext():
        for _ in range(200):
            one.update(one.losses(features, labels))
    assert nearness() > before - 0.01
