import pytest
import torch
from torch.testing import assert_close

from heads import batch, build, seeded
from protoseg.method.head import PrototypeHead
from protoseg.method.losses import Errors, Losses


@pytest.mark.parametrize("preset", ["default", "reference_fixed"])
def test_a_whole_step_is_one_graph_for_a_compiler(preset, monkeypatch):
    torch._dynamo.reset()
    head, twin = (build(6, 3, num_prototypes=4, preset=preset) for _ in range(2))
    features, labels = batch(6, 3, size=(1, 4, 6), label_size=(8, 12))

    def losses(features, labels):
        found = head.losses(features, labels)
        return found.total, found.assignment, found.embedding, found.moving

    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)
    traced, plain = features.clone().requires_grad_(True), features.clone().requires_grad_(True)
    total, assignment, _, _ = compiled(traced, labels)
    total.backward()
    true = twin.losses(plain, labels)
    true.total.backward()
    assert_close(total, true.total, rtol=0, atol=1e-12)
    assert_close(traced.grad, plain.grad, rtol=0, atol=1e-12)
    assert torch.equal(assignment, true.assignment)


def test_the_head_still_looks_at_labels_outside_a_compiler():
    with pytest.raises(ValueError, match="labels hold"):
        PrototypeHead(6, 3).losses(*batch(6, 9, dtype=torch.float32))


def clustering_and_update(head):
    """What `head.losses` hands to the clustering, and what the clustering hands to `head.update`, in one function."""

    def step(own, classes, embedding, total, errors=None):
        given, moving = head._assign(own, None, classes, None, embedding)
        head.update(Losses(total, total, total, total, given, embedding, moving, {}, errors))
        return given, moving

    return step


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_clustering_and_update_are_one_graph_and_move_what_they_move_without_a_compiler(preset, way):
    torch._dynamo.reset()
    named = {"num_prototypes": 3, "projection": "none", "momentum_rule": "count_aware", "reseed_after": 1}
    named["preset"] = preset
    head, twin = (build(6, 4, **named) for _ in range(2))
    compiled = torch.compile(clustering_and_update(head), backend="aot_eager", fullgraph=True)
    before = head.prototypes.clone()
    for seed in range(3):
        g = seeded(seed)
        own = torch.rand(50, 3, generator=g, dtype=torch.float64) * 2 - 1
        classes = torch.randint(-1, 3, (50,), generator=g)
        embedding = torch.nn.functional.normalize(torch.randn(50, 6, generator=g, dtype=torch.float64))
        total = torch.ones((), dtype=torch.float64)
        given = (own, classes, embedding, total)
        if preset == "default":
            taken = torch.randn(12, 6, generator=g, dtype=torch.float64)
            given += (Errors(taken, torch.rand(50, generator=g, dtype=torch.float64)),)
        found = compiled(*given)
        true = clustering_and_update(twin)(*given)
        assert all(torch.equal(a, b) for a, b in zip(found, true))
        assert_close(dict(head.named_buffers()), dict(twin.named_buffers()), rtol=0, atol=1e-12)
    assert not torch.equal(head.prototypes[:3], before[:3])
    assert torch.equal(head.prototypes[3], before[3])
