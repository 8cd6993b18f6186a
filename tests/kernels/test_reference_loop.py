import pytest
import torch
from torch.testing import assert_close

from heads import batch, build
from oracles.reference_loop import ReferenceHead


@pytest.mark.parametrize("label_size", [None, (16, 24)], ids=["same", "four times"])
def test_the_measured_baseline_computes_what_the_reference_preset_computes(label_size):
    # The draw has its own noise, so only the losses and their gradient are alike.
    head = build(6, 3, num_prototypes=4, preset="reference", projection="none", embed_dim=6)
    loop = ReferenceHead(6, 3, 4).double()
    with torch.no_grad():
        loop.prototypes.copy_(head.prototypes)
        loop.feature_norm.load_state_dict(head.feature_norm.state_dict())
        loop.score_norm.load_state_dict(head.score_norm.state_dict())
    features, labels = batch(6, 3, label_size=label_size)
    one, two = features.clone().requires_grad_(True), features.clone().requires_grad_(True)
    total = head.losses(one, labels).total
    total.backward()
    loss = loop.loss(two, labels)
    loss.backward()
    assert_close(total, loss, rtol=0, atol=1e-6)  # the release holds labels and targets in fp32
    assert_close(one.grad, two.grad, rtol=0, atol=1e-6)
