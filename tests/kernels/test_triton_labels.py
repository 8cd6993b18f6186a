"""Classes at feature size and the numbers that losses are divided by, against the plain lines of the head."""

import pytest
import torch
from torch.testing import assert_close

from heads import VOID, seeded
from protoseg import kernels
from protoseg.method.head import PrototypeHead
from triton_device import DEVICE, at_hand

pytest.importorskip("protoseg.kernels.gpu.labels", reason="no Triton")
pytestmark = at_hand
SIZES = [((4, 6), (4, 6)), ((4, 6), (16, 24)), ((30, 70), (61, 140)), ((70, 90), (3, 5)), ((1, 1), (100, 90))]


def found(head, labels, size, dtype, plain):
    if not plain:
        assert kernels.labelled_applies(labels, dtype)
        return head._labelled(labels, size, dtype)
    with kernels.plain_only():
        return head._labelled(labels, size, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore", [VOID, 2, -7])
@pytest.mark.parametrize(("size", "label_size"), SIZES)
def test_they_are_those_of_the_plain_lines(size, label_size, ignore, weighted, dtype):
    weights = [0.5, 2.0, 1.0, 0.0, 1.5] if weighted else None
    head = PrototypeHead(4, 5, ignore_index=ignore, class_weights=weights).to(DEVICE)
    g = seeded(sum(label_size))
    labels = torch.randint(5, (2, *label_size), generator=g)
    labels = torch.where(torch.rand(labels.shape, generator=g) < 0.2, ignore, labels).to(DEVICE)
    classes, sums = found(head, labels, size, dtype, plain=False)
    true_classes, true_sums = found(head, labels, size, dtype, plain=True)
    assert torch.equal(classes, true_classes)
    assert sums.dtype == dtype
    assert_close(sums, true_sums, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)


@pytest.mark.parametrize("images", [0, 1])
def test_without_a_label_both_are_zero(images):
    head = PrototypeHead(4, 5).to(DEVICE)
    labels = torch.full((images, 6, 8), VOID, device=DEVICE)
    classes, sums = found(head, labels, (3, 4), torch.float32, plain=False)
    assert (classes == -1).all()
    assert len(classes) == images * 12
    assert not sums.any()


def test_labels_of_any_layout_and_any_number():
    head = PrototypeHead(4, 5).to(DEVICE)
    labels = torch.tensor([[[0, 7, 4], [255, -3, 2]]], device=DEVICE)  # 7 and -3 are no class, and no void either
    classes, sums = found(head, labels.transpose(1, 2), (3, 2), torch.float64, plain=False)
    assert classes.tolist() == [0, -1, -1, -1, 4, 2]
    assert sums.tolist() == [5, 3]
