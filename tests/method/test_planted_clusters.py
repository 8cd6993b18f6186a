"""Does the method find sub-classes? Clusters whose truth is known: 10 centres per class, pairwise cosine 0.74."""

import pytest
import torch

from oracles import default as oracle
from protoseg.method.head import PrototypeHead

CLASSES, K, D, COSINE, NOISE = 3, 10, 64, 0.74, 0.5


def learn(steps, seed=0, **named):
    """Prototypes after so many batches of planted pixels, and the last batch with its losses."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    centres = oracle.planted_centres(CLASSES, K, D, COSINE, g)
    head = PrototypeHead(D, CLASSES, num_prototypes=K, projection="none", **named)
    for _ in range(steps):
        planted = oracle.planted_batch(centres, (2, 16, 24), NOISE, g)
        with torch.no_grad():
            losses = head.losses(planted.features, planted.labels)
        head.update(losses)
    return head, planted, losses


def test_the_plant_is_what_it_says():
    planted = oracle.planted_batch(
        oracle.planted_centres(CLASSES, K, D, COSINE, torch.Generator().manual_seed(0)),
        (2, 16, 24),
        NOISE,
        torch.Generator().manual_seed(0),
    )
    assert planted.cosine == pytest.approx(COSINE, abs=1e-9)
    nearest = (planted.features.permute(0, 2, 3, 1).flatten(0, 2).double() @ planted.centres.flatten(0, 1).T).argmax(1)
    assert (nearest == planted.cluster).double().mean() > 0.99  # the truth can be found at all


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_means_find_planted_clusters(seed):
    # Momentum 0.99 instead of 0.999 shows in 900 steps what the paper's shows in 9000.
    head, planted, losses = learn(900, seed, preset="paper", momentum=0.99)
    purity = oracle.purity(losses.assignment, planted.cluster, CLASSES * K)
    cosine = oracle.mean_pairwise_cosine(head.prototypes)
    assert purity >= 0.98
    assert abs(cosine - planted.cosine) < 0.03
    assert head.distinctness()["pairwise_cosine"] == pytest.approx(cosine, abs=1e-4)
    assert head.distinctness()["used"] == 1
    # Every planted centre has a prototype of its own, and no two share one.
    overlap = (head.prototypes.double() @ planted.centres.transpose(1, 2)).amax(2)
    assert overlap.min() > 0.95


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_moved_by_errors_every_planted_cluster_has_a_prototype_as_well(seed):
    """They turn away from the other classes, so they lie nearer to each other than the clusters do."""
    head, planted, losses = learn(900, seed)
    assert oracle.purity(losses.assignment, planted.cluster, CLASSES * K) >= 0.98
    assert planted.cosine < oracle.mean_pairwise_cosine(head.prototypes) < 0.97
    assert head.distinctness()["used"] == 1


def test_the_reference_collapses_to_one_prototype_per_class():
    # Momentum 0.99 instead of 0.999 shows in 500 steps what the release shows in 5000.
    head, planted, losses = learn(500, preset="reference", momentum=0.99)
    assert oracle.mean_pairwise_cosine(head.prototypes) > 0.98
    assert oracle.purity(losses.assignment, planted.cluster, CLASSES * K) < 0.7


def test_arg_max_alone_keeps_the_references_prototypes_apart():
    head, _, _ = learn(500, preset="reference_fixed", momentum=0.99)
    assert oracle.mean_pairwise_cosine(head.prototypes) < 0.85
