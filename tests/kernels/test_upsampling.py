import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from heads import seeded
from protoseg.kernels import upsampling

pytestmark = pytest.mark.usefixtures("way")
SIZES = [(1, 1), (1, 7), (5, 5), (5, 20), (20, 5), (7, 19), (64, 257)]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "out"), SIZES)
def test_lines_are_pytorchs_bilinear_resize(size, out, align_corners):
    rows = torch.randn(3, size, generator=seeded(0), dtype=torch.float64)
    along = upsampling.lines(size, out, align_corners, torch.float64, torch.device("cpu"))
    # One row, so that only the width is resized.
    true = F.interpolate(rows[None, :, None], size=(1, out), mode="bilinear", align_corners=align_corners)[0, :, 0]
    assert_close(rows @ along.matrix.T, true, rtol=0, atol=1e-13)
    assert_close(upsampling.widen(rows, along), true, rtol=0, atol=1e-13)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "out"), SIZES)
def test_narrow_is_the_adjoint_of_widen(size, out, align_corners):
    g = seeded(1)
    along = upsampling.lines(size, out, align_corners, torch.float64, torch.device("cpu"))
    x = torch.randn(3, size, generator=g, dtype=torch.float64)
    y = torch.randn(3, out, generator=g, dtype=torch.float64)
    assert_close((upsampling.widen(x, along) * y).sum(), (x * upsampling.narrow(y, along)).sum(), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("size", "out"), SIZES)
def test_an_output_is_ready_when_both_its_inputs_are_there(size, out):
    along = upsampling.lines(size, out, False, torch.float64, torch.device("cpu"))
    for inputs in range(size + 1):
        assert along.ready(inputs) == sum(
            not row[inputs:].any() and last < inputs for row, last in zip(along.matrix, along.last)
        )
    assert along.ready(size) == out


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_cross_entropy_overwrites_the_logits_with_its_gradient(weights):
    logits = torch.randn(3, 50, generator=seeded(2), dtype=torch.float64)
    labels = torch.randint(4, (50,), generator=seeded(3))
    labels[labels == 3] = 255
    weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    true = logits.clone().requires_grad_(True)
    loss = F.cross_entropy(true.T, labels, weight=weights, ignore_index=255, reduction="sum")
    (0.3 * loss).backward()
    found = upsampling.cross_entropy_(logits, labels, 255, weights, torch.tensor(0.3, dtype=torch.float64))
    assert_close(found, loss.detach(), rtol=0, atol=1e-12)
    assert_close(logits, true.grad, rtol=0, atol=1e-13)


def test_where_a_probability_is_1_to_the_last_digit_the_own_gradient_still_has_digits():
    logits = torch.randn(5, 50, generator=seeded(2))
    logits[3] += 25
    labels = torch.full((50,), 3)
    true = logits.double().requires_grad_(True)
    F.cross_entropy(true.T, labels, reduction="sum").backward()
    upsampling.cross_entropy_(logits, labels, 255, None, torch.tensor(1.0))
    assert true.grad[3].abs().max() < 2**-24  # 1 - P would be 0 or a rounding error
    assert_close(logits[3].double(), true.grad[3], rtol=1e-4, atol=0)


def test_what_is_taken_off_is_the_same_without_sorting():
    table = torch.randn(5, 40, generator=seeded(4))
    index, values = torch.randint(5, (40,), generator=seeded(5)), torch.rand(40, generator=seeded(6))
    found = []
    for sorts in (False, True):
        found.append(table.clone())
        upsampling.take_off_(found[-1], index, values, sorts=sorts)
    assert torch.equal(*found)
    assert not torch.equal(found[0], table)
