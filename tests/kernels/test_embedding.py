import pytest
import torch
from torch import nn
from torch.testing import assert_close

from heads import batch, build, seeded
from oracles import reference
from protoseg import kernels
from protoseg.kernels import embedding
from protoseg.method.similarity import embed, unit

pytestmark = pytest.mark.usefixtures("way")
CASES = {"width": ("width", False), "width, LayerNorm": ("width", True), "channel, LayerNorm": ("channel", True)}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}


@pytest.fixture(params=[1, 40, 10_000], ids=["a row a piece", "some rows", "an image"])
def piece(request, monkeypatch):
    monkeypatch.setattr(embedding, "PIECE", request.param)


@pytest.fixture(params=CASES)
def case(request):
    """Norm, and LayerNorm or None."""
    norm, layer_norm = CASES[request.param]
    layer = nn.LayerNorm(5).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5, generator=seeded(1)))
        layer.bias.copy_(torch.randn(5, generator=seeded(2)))
    return norm, layer if layer_norm else None


def plain(features, norm, layer):
    rows = embed(features, norm)
    return rows if layer is None else layer(unit(rows) if norm == "channel" else rows)


def fast(features, norm, layer):
    learned = (None, None, 0.0) if layer is None else (layer.weight, layer.bias, layer.eps)
    return kernels.normed_rows(features, norm, *learned)


def backed(way, features, norm, layer, gradient):
    features = features.clone(memory_format=torch.preserve_format).requires_grad_(True)
    rows = way(features, norm, layer)
    learned = [] if layer is None else [layer.weight, layer.bias]
    return rows, torch.autograd.grad(rows, [features, *learned], gradient)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_gradients_are_those_of_the_plain_lines(layout, case, piece):
    features = torch.randn(2, 5, 4, 6, generator=seeded(3)).double().contiguous(memory_format=LAYOUTS[layout])
    features[0, :, 1, :] = 0  # an image row without length
    gradient = torch.randn(48, 5, generator=seeded(4)).double()
    rows, back = backed(fast, features, *case, gradient)
    true_rows, true_back = backed(plain, features, *case, gradient)
    assert_close(rows, true_rows, rtol=0, atol=1e-14)
    dead, true_dead = back[0][0, :, 1].clone(), true_back[0][0, :, 1].clone()  # lengths are held at 1e-12: enormous
    assert_close(dead, true_dead, rtol=1e-10, atol=0)
    back[0][0, :, 1] = true_back[0][0, :, 1] = 0
    assert_close(back, true_back, rtol=0, atol=1e-12)


def test_rows_are_those_of_a_slow_loop(piece):
    features = torch.randn(2, 3, 4, 6, generator=seeded(3)).double()
    rows = kernels.normed_rows(features, "width", None, None, 0.0).view(2, 4, 6, 3)
    for b in range(2):
        for d in range(3):
            for y in range(4):
                length = sum(float(v) ** 2 for v in features[b, d, y]) ** 0.5
                assert_close(rows[b, y, :, d], features[b, d, y] / length, rtol=0, atol=1e-14)


def test_half_precision_is_normed_in_single_and_answered_in_half(case, piece):
    norm, layer = case
    features = torch.randn(2, 5, 4, 6, generator=seeded(3)).bfloat16()
    layer = None if layer is None else layer.float()
    gradient = torch.randn(48, 5, generator=seeded(4))
    rows, back = backed(fast, features, norm, layer, gradient)
    true_rows, true_back = backed(plain, features, norm, layer, gradient)
    assert rows.dtype == torch.float32
    assert back[0].dtype == torch.bfloat16
    assert_close(rows, true_rows, rtol=0, atol=1e-5)
    assert_close(back[0].float(), true_back[0].float(), rtol=1e-2, atol=1e-2)  # the last bit of bfloat16


def test_only_what_is_asked_for_gets_a_gradient(piece):
    layer = nn.LayerNorm(5).double().requires_grad_(False)
    features = torch.randn(1, 5, 3, 4, generator=seeded(3)).double().requires_grad_(True)
    fast(features, "width", layer).sum().backward()
    assert layer.weight.grad is None
    assert features.grad is not None
    layer.requires_grad_(True)
    fast(features.detach(), "width", layer).sum().backward()
    assert_close(layer.bias.grad, torch.full((5,), 12.0).double())


@pytest.mark.parametrize("preset", ["reference", "reference_fixed"])
def test_the_presets_of_the_release_take_this_way_and_the_default_does_not(preset, monkeypatch):
    taken = []
    true = kernels.normed_rows
    monkeypatch.setattr(kernels, "normed_rows", lambda *a: taken.append(1) or true(*a))
    head = build(6, 3, preset=preset)
    features, _ = batch(6, 3)
    scores = head(features)
    assert taken
    with kernels.plain_only():
        assert_close(head(features), scores, rtol=0, atol=1e-12)
    taken.clear()
    build(6, 3)(features)
    assert not taken


def test_a_row_of_the_head_is_a_unit_vector():
    head = build(6, 3, preset="reference")
    rows = head.embed(batch(6, 3)[0])
    assert_close(rows, reference.unit(rows), rtol=0, atol=1e-14)
