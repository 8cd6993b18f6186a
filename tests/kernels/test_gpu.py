"""What only a GPU can show of the kernels. That they agree is for `test_triton_*.py`, which run on a GPU as well."""

import pytest
import torch
from benchmarks.head import replayed
from torch.testing import assert_close

from heads import batch
from protoseg.kernels import gpu
from protoseg.method.head import PrototypeHead
from protoseg.method.resizing import bilinear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
WAYS = ["off", "mm", "ieee", "tf32", "bf16"]


def step(head, features, labels):
    features = features.detach().requires_grad_(True)
    losses = head.losses(features, labels)
    losses.total.backward()
    head.update(losses)
    return features.grad


def problem(classes, k, d, size, label_size=None):
    torch.manual_seed(0)
    head = PrototypeHead(d, classes, num_prototypes=k, embed_dim=d, projection="none").cuda()
    features, labels = batch(d, classes, size=size, label_size=label_size, dtype=torch.float32)
    return head, features.cuda(), labels.cuda()


@pytest.mark.parametrize("way", WAYS)
def test_a_step_never_waits_for_the_device(way, monkeypatch):
    monkeypatch.setenv(gpu.VARIABLE, way)
    head, features, labels = problem(19, 10, 64, (2, 32, 32), (128, 128))
    step(head, features, labels)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(head, features, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", ["off", "mm", "ieee", "bf16"])
def test_a_step_gives_the_same_bits_every_time(way, monkeypatch):
    monkeypatch.setenv(gpu.VARIABLE, way)
    head, features, labels = problem(19, 10, 64, (2, 32, 32))
    before = {name: value.clone() for name, value in head.state_dict().items()}
    found = []
    for _ in range(4):
        head.load_state_dict(before)
        found.append((step(head, features, labels), head.prototypes.clone()))
    for gradient, prototypes in found[1:]:
        assert torch.equal(gradient, found[0][0])
        assert torch.equal(prototypes, found[0][1])


@pytest.mark.parametrize("way", ["tf32", "bf16"])
def test_no_table_of_pixels_by_prototypes_exists(way, monkeypatch):
    monkeypatch.setenv(gpu.VARIABLE, way)
    head, features, labels = problem(150, 20, 64, (4, 128, 128))
    step(head, features, labels)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(head, features, labels)
    table = 4 * 128 * 128 * 150 * 20 * 4
    assert torch.cuda.max_memory_allocated() - held < table / 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_of_another_device_than_the_current_one(monkeypatch):
    head, features, labels = problem(19, 10, 64, (1, 16, 16))
    here = step(head, features, labels)
    head, features, labels = problem(19, 10, 64, (1, 16, 16))
    there = step(head.to("cuda:1"), features.to("cuda:1"), labels.to("cuda:1"))
    assert torch.equal(here.cpu(), there.cpu())


def test_a_resize_among_deterministic_algorithms_has_one_order_and_pytorchs_gradient():
    x = torch.randn(4, 64, 30, 40, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(4, 64, 120, 160, device="cuda").to(memory_format=torch.channels_last)
    free = bilinear(x, (120, 160))
    (expected,) = torch.autograd.grad(free, x, weights)
    torch.use_deterministic_algorithms(True)  # an operation without an order would be an error
    try:
        ordered = bilinear(x, (120, 160))
        gradients = [torch.autograd.grad(ordered, x, weights, retain_graph=True)[0] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(ordered, free)
    assert_close(gradients[0], expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize("label_size", [None, (128, 128)])
def test_a_step_captured_in_a_graph_gives_the_bits_of_the_step(label_size):
    head, features, labels = problem(19, 10, 64, (2, 32, 32), label_size)
    features.requires_grad_(True)
    before = {name: value.clone() for name, value in head.state_dict().items()}

    def once():
        features.grad = None
        losses = head.losses(features, labels)
        losses.total.backward()
        head.update(losses)

    replay = replayed(once)
    captured = features.grad
    head.load_state_dict(before)
    for _ in range(3):
        replay()
    found, prototypes = captured.clone(), head.prototypes.clone()
    head.load_state_dict(before)
    for _ in range(3):
        once()
    assert torch.equal(features.grad, found)
    assert torch.equal(head.prototypes, prototypes)
