"""The resize that has one order: the numbers of `F.interpolate` and of its gradient, by other operations."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from protoseg.kernels import resizing
from protoseg.method.resizing import bilinear, bilinear_adjoint
from triton_device import DEVICE

SIZES = [
    ((4, 5), (8, 10)),
    ((4, 5), (9, 13)),
    ((1, 1), (7, 3)),
    ((2, 2), (12, 15)),
    ((12, 15), (5, 4)),
    ((6, 1), (6, 9)),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def both(small, large, layout, dtype, align_corners):
    """(result, gradient) of PyTorch's resize and of ours."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *small, dtype=dtype, device=DEVICE).to(memory_format=layout).requires_grad_()
    gradient = torch.randn(2, 3, *large, dtype=dtype, device=DEVICE).to(memory_format=layout)
    for made in (
        F.interpolate(x, large, mode="bilinear", align_corners=align_corners),
        resizing.bilinear(x, large, align_corners),
    ):
        yield made.detach(), *torch.autograd.grad(made, x, gradient)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("small", "large"), SIZES)
def test_it_is_pytorchs_resize_and_gradient(small, large, layout, align_corners):
    (theirs, their_gradient), (ours, gradient) = both(small, large, layout, torch.float64, align_corners)
    assert torch.equal(ours, theirs)
    assert_close(gradient, their_gradient, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_half_precision_only_the_last_digit_differs(layout):
    """Shares of a resize by two are exact in bf16; the sums are rounded once, or twice."""
    (_, expected), (_, gradient) = both((4, 6), (8, 12), layout, torch.bfloat16, False)
    assert gradient.dtype == torch.bfloat16
    assert_close(gradient, expected, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("small", "large"), [((12, 15), (23, 30)), ((23, 30), (45, 60)), ((3, 4), (12, 8))])
def test_in_half_precision_no_weight_is_lost(small, large, align_corners):
    """Rounded weights no longer sum to what they should, and change every channel alike; here the result is rounded."""
    gradient = torch.ones(1, 2, *large, dtype=torch.bfloat16, device=DEVICE)
    back = resizing.bilinear_adjoint(gradient, small, align_corners)
    exact = resizing.bilinear_adjoint(gradient.double(), small, align_corners)
    assert torch.equal(back, exact.bfloat16())


def test_autocast_around_the_way_back_changes_nothing():
    gradient = torch.randn(2, 3, 8, 10, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = resizing.bilinear_adjoint(gradient, (4, 5), False)
    assert torch.equal(found, resizing.bilinear_adjoint(gradient, (4, 5), False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_lies_in_memory_as_it_came(layout):
    """A copy of the largest maps of a network, each way, is what it would cost otherwise."""
    gradient = torch.randn(2, 3, 8, 10).to(memory_format=layout)
    assert resizing.bilinear_adjoint(gradient, (4, 5), False).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("align_corners", [False, True])
def test_the_adjoint_is_the_way_back_of_the_resize(align_corners):
    x, y = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.randn(2, 3, 11, 7, dtype=torch.float64)
    there = (bilinear(x, (11, 7), align_corners=align_corners) * y).sum()
    back = (x * bilinear_adjoint(y, (5, 6), align_corners=align_corners)).sum()
    assert_close(there, back)


def test_a_compiler_can_look_through_it():
    def step(x):
        return resizing.bilinear(x * 2, (8, 10), False).sin()

    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    assert_close(compiled, step(x))
    assert_close(*(torch.autograd.grad(out.sum(), x) for out in (compiled, step(x))))
