import pytest
import torch
from torch.testing import assert_close

from heads import batch, build
from protoseg.method.head import PrototypeHead


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
