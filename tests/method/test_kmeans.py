import itertools

import torch

from protoseg import PrototypeHead
from protoseg.method.clustering import nearest_assignment
from protoseg.method.kmeans import kmeans_assignment
from protoseg.method.similarity import unit


def lloyd(embedding, prototypes, classes, iterations):
    """One class, one pixel, one centre at a time, float64."""
    index = torch.zeros(len(classes), dtype=torch.long)
    for c in range(len(prototypes)):
        pixels = [i for i in range(len(classes)) if classes[i] == c]
        centres = [p.clone() for p in prototypes[c]]
        for turn in range(iterations):
            if turn:
                for k in range(len(centres)):
                    mine = [embedding[i] for i in pixels if index[i] == k]
                    centres[k] = torch.stack(mine).mean(0) / torch.stack(mine).mean(0).norm() if mine else centres[k]
            for i in pixels:
                index[i] = max(range(len(centres)), key=lambda k, i=i: float(embedding[i] @ centres[k]))
    return index


def scene(seed=0, n=60, C=3, K=4, D=6):
    g = torch.Generator().manual_seed(seed)
    embedding = unit(torch.randn(n, D, generator=g, dtype=torch.float64))
    prototypes = unit(torch.randn(C, K, D, generator=g, dtype=torch.float64))
    classes = torch.randint(-1, C, (n,), generator=g)
    own = torch.stack([prototypes[max(c, 0)] @ x for c, x in zip(classes.tolist(), embedding)])
    return embedding, prototypes, own, classes


def test_equals_lloyd_one_pixel_at_a_time():
    for seed in range(5):
        embedding, prototypes, own, classes = scene(seed)
        for iterations in (1, 2, 4):
            ours = kmeans_assignment(embedding, prototypes, own, classes, iterations=iterations)
            theirs = lloyd(embedding, prototypes, classes, iterations)
            assert torch.equal(ours[classes >= 0], theirs[classes >= 0])


def test_one_iteration_is_the_nearest_prototype():
    embedding, prototypes, own, classes = scene()
    assert torch.equal(
        kmeans_assignment(embedding, prototypes, own, classes, iterations=1), nearest_assignment(own, classes, 3)
    )


def test_rounds_never_lower_the_objective():
    embedding, prototypes, own, classes = scene(3, n=200)

    def objective(index):
        total = 0.0
        for c in range(3):
            for k in range(4):
                total += float(embedding[(classes == c) & (index == k)].sum(0).norm())
        return total

    values = [objective(kmeans_assignment(embedding, prototypes, own, classes, iterations=n)) for n in (1, 2, 3, 5, 8)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))
    assert values[-1] > values[0]


def test_the_head_takes_it():
    torch.manual_seed(0)
    head = PrototypeHead(8, 3, embed_dim=6, num_prototypes=4, assignment="kmeans")
    before = head.prototypes.clone()
    losses = head.losses(torch.randn(2, 8, 6, 6), torch.randint(0, 3, (2, 12, 12)))
    losses.total.backward()
    head.update(losses)
    assert losses.assignment.max() < 12
    assert not torch.equal(before, head.prototypes)
