"""A step is linear in the number of classes: counted, not timed."""

import pytest
import torch

from protoseg.kernels import similarity
from protoseg.method.head import PrototypeHead

K, D, SIDE = 10, 8, 16


class Numbers(torch.utils._python_dispatch.TorchDispatchMode):
    """How many numbers operations read or write, how many exponentials they take, and the largest tensor they make."""

    touched = exponentials = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
        if not func.is_view:
            taken = [t for t in args if isinstance(t, torch.Tensor)]
            self.touched += sum(t.numel() for t in taken + made)
            if func in (torch.ops.aten.exp_.default, torch.ops.aten.exp.default):
                self.exponentials += sum(t.numel() for t in made)
            self.largest = max([self.largest, *(t.numel() for t in made)])
        return out


def counted(classes, drawn=None, up=1):
    torch.manual_seed(0)
    head = PrototypeHead(D, classes, num_prototypes=K, projection="none", contrast_negatives=drawn, ignore_index=-1)
    features = torch.randn(1, D, SIDE, SIDE, requires_grad=True)
    labels = torch.randint(classes, (1, SIDE * up, SIDE * up))
    with Numbers() as numbers:
        losses = head.losses(features, labels)
        losses.total.backward()
        head.update(losses)
    assert features.grad.isfinite().all()
    return numbers


@pytest.mark.parametrize(("drawn", "up"), [(None, 1), (None, 2), (1000, 1)], ids=["feature", "label", "drawn"])
def test_numbers_touched_and_held_grow_no_faster_than_classes(way, drawn, up):
    # From 2,344 classes on a band has the fewest pixels it may have: all three are cut alike.
    few, some, many = (counted(classes, drawn, up) for classes in (2500, 5000, 10_000))
    assert many.touched - some.touched <= 2.02 * (some.touched - few.touched)
    assert many.largest <= 2.02 * some.largest


def test_ten_thousand_classes_hold_bands_of_their_prototypes_and_no_more(way):
    found = counted(10_000)
    assert found.largest <= similarity.FEWEST_COLUMNS * 10_000 * K
    assert found.largest < SIDE * SIDE * 10_000 * K / 3


@pytest.mark.parametrize("way", ["PyTorch"], indirect=True)  # C takes them where nobody counts
def test_drawn_negatives_save_the_exponentials_of_the_others(way):
    pixels, classes, drawn = SIDE * SIDE, 2500, 1000
    cross_entropy = pixels * classes
    slack = 100 * pixels  # the clustering's
    assert counted(classes).exponentials >= cross_entropy + pixels * classes * K
    assert counted(classes, drawn).exponentials <= cross_entropy + pixels * (drawn + K) + slack
