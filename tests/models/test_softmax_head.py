"""The parametric baselines keep the contract of the prototype head and its projection."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from protoseg.config import Head, UserError
from protoseg.method.head import PrototypeHead
from protoseg.models import HEADS, build_head
from protoseg.models.softmax_head import CosineHead, SoftmaxHead


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_keeps_the_contract(kind):
    head = build_head(
        Head(kind=kind, embed_dim=6, num_prototypes=2, class_weights=(1.0, 2.0, 0.5)), 8, 3, ignore_index=9
    )
    features, labels = torch.randn(2, 8, 4, 5), torch.randint(0, 3, (2, 13, 17))
    labels[0, :3] = 9
    assert (head.num_classes, head.in_channels, head.ignore_index, head.align_corners) == (3, 8, 9, False)
    for training in (True, False):
        assert head.train(training)(features).shape == (2, 3, 4, 5)
    losses = head.losses(features, labels)
    assert losses.total.requires_grad
    assert all(part.dim() == 0 and not part.requires_grad for part in losses.parts.values())
    assert (losses.assignment is None) == (kind != "prototype")
    head.update([losses, head.losses(features, labels)])
    assert hasattr(head, "prototypes") == (kind == "prototype")


@pytest.mark.parametrize("head", [SoftmaxHead(8, 3), CosineHead(8, 3, embed_dim=4)])
def test_the_loss_is_weighted_cross_entropy_at_label_size(head):
    head.class_weights = torch.tensor([1.0, 3.0, 0.2])
    features, labels = torch.randn(2, 8, 4, 5), torch.randint(0, 3, (2, 13, 17))
    labels[1, 2:5] = 255
    scores = F.interpolate(head(features), size=(13, 17), mode="bilinear")
    losses = head.losses(features, labels)
    assert_close(losses.total, F.cross_entropy(scores, labels, weight=head.class_weights, ignore_index=255))
    assert float(losses.ppc) == float(losses.ppd) == 0


@pytest.mark.parametrize("kind", ["softmax", "softmax_projected", "cosine", "cosine_subcentres"])
def test_nothing_labelled_is_zero_with_zero_gradient(kind):
    head = build_head(Head(kind=kind), 8, 3)
    losses = head.losses(torch.randn(1, 8, 4, 4), torch.full((1, 9, 9), 255))
    losses.total.backward()
    assert float(losses.total.detach()) == 0
    assert all(float(p.grad.abs().max()) == 0 for p in head.parameters())


def test_several_vectors_score_as_prototypes_of_the_same_place_do_and_learn():
    head = CosineHead(8, 3, projection="none", num_vectors=4)
    twin = PrototypeHead(8, 3, projection="none", embed_dim=8, num_prototypes=4)
    twin.prototypes.copy_(head.vectors.detach().view(3, 4, 8))
    features = torch.randn(2, 8, 4, 5)
    assert_close(head(features), twin(features))
    head.losses(features, torch.randint(0, 3, (2, 9, 9))).total.backward()
    assert float(head.vectors.grad.abs().max()) > 0
    with pytest.raises(ValueError, match="num_vectors"):
        CosineHead(8, 3, num_vectors=0)


def test_cosine_scores_are_scaled_cosines():
    head = CosineHead(8, 3, projection="none", score_scale=7.0)
    features = torch.randn(2, 8, 4, 5)
    with torch.no_grad():
        assert_close(head(features), head(100 * features))
        assert_close(head(7 * head.vectors[1].view(1, 8, 1, 1))[0, 1, 0, 0], torch.tensor(7.0))
        head.vectors.mul_(3)
        assert float(head(features).abs().max()) <= 7.0001
    assert sum(p.numel() for p in head.parameters()) == 3 * 8 + 1


@pytest.mark.parametrize("settings", [{}, {"preset": "reference"}, {"embed_dim": 5}, {"projection": "linear"}])
def test_baselines_have_the_projection_of_the_prototype_head(settings):
    def shapes(head):
        return [tuple(p.shape) for p in head.projection.parameters()]

    wanted = shapes(build_head(Head(**settings), 16, 3))
    for kind in ("softmax_projected", "cosine"):
        assert shapes(build_head(Head(kind=kind, **settings), 16, 3)) == wanted


def test_prototype_settings_reach_the_head():
    head = build_head(Head(num_prototypes=4, momentum=0.5, kappa=0.1, preset="reference", start="data"), 16, 3)
    assert isinstance(head, PrototypeHead)
    assert (head.num_prototypes, head.momentum, head.kappa, head.align_corners) == (4, 0.5, 0.1, True)


@pytest.mark.parametrize(
    ("settings", "classes", "message"),
    [
        ({"kind": "softmax_projected", "projection": "none"}, 3, "plain softmax"),
        ({"kind": "softmax", "class_weights": (1.0,)}, 3, "needs 3 numbers, given 1"),
        ({"kind": "prototype", "class_weights": (1.0,)}, 3, "needs 3 numbers, given 1"),
        ({"kind": "cosine", "score_scale": -1.0}, 3, "score_scale must be positive"),
        ({"num_prototypes": 0}, 3, "num_prototypes must be at least 1"),
        ({"kind": "linear"}, 3, "unknown"),
        ({}, 0, "at least one class"),
    ],
)
def test_bad_settings_are_refused(settings, classes, message):
    with pytest.raises(UserError, match=message):
        build_head(Head(**settings), 16, classes)


@pytest.mark.parametrize("kind", ["softmax", "cosine"])
def test_bad_labels_are_refused(kind):
    head = build_head(Head(kind=kind), 8, 3)
    features = torch.randn(1, 8, 2, 2)
    with pytest.raises(ValueError, match=r"labels hold 3 .*3 classes"):
        head.losses(features, torch.full((1, 4, 4), 3))
    with pytest.raises(ValueError, match=r"int64"):
        head.losses(features, torch.zeros(1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"labels must be \(1, H, W\)"):
        head.losses(features, torch.zeros(2, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["softmax", "softmax_projected", "cosine", "cosine_subcentres"])
def test_low_precision_features_give_finite_scores(kind):
    head = build_head(Head(kind=kind), 8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = head(torch.randn(1, 8, 2, 2).bfloat16() * 1000)
        losses = head.losses(torch.randn(1, 8, 2, 2).bfloat16(), torch.zeros(1, 4, 4, dtype=torch.int64))
    assert scores.isfinite().all()
    assert losses.total.dtype == torch.float32
