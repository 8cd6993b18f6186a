"""Windows split and merge as an inverse pair, and the frugal path gives what the plain one gives."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from protoseg.config import Evaluation, Head, Model, UserError
from protoseg.engine.windows import _swept, segment, segment_labels, window_starts
from protoseg.models import build
from protoseg.models.segmenter import Segmenter


class Local(nn.Module):
    """Logits from each pixel alone, so that windows must give exactly what the whole image gives."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.mix = nn.Conv2d(3, num_classes, 1)
        with torch.no_grad():
            self.mix.weight.copy_(torch.randn(num_classes, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 4)
            self.mix.bias.zero_()

    def forward(self, images):
        return self.mix(images.float() / 255 if images.dtype == torch.uint8 else images)


class Contextual(Local):
    """Logits that depend on the place in the window: overlaps truly average different answers."""

    def forward(self, images):
        logits = super().forward(images)
        return logits + torch.linspace(0, 3, logits.shape[-1]) * torch.linspace(-1, 1, logits.shape[-2])[:, None]


def picture(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


windows = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)).map(
    lambda w: ((w[0], w[1]), (min(w[2], w[0]), min(w[3], w[1])))
)
sizes = st.tuples(st.integers(1, 30), st.integers(1, 30))


@settings(max_examples=200, deadline=None)
@given(sizes, windows)
def test_split_then_merge_is_the_identity(size, window):
    image = picture(*size)
    sliding = Evaluation(mode="slide", window=window[0], stride=window[1])
    merged = segment(Local(), image, sliding)
    assert_close(merged, segment(Local(), image, Evaluation()), atol=1e-5, rtol=0)
    assert_close(merged.sum(0), torch.ones(size), atol=1e-5, rtol=0)


@settings(max_examples=200, deadline=None)
@given(sizes, windows, st.booleans())
def test_labels_in_bounded_memory_are_the_plain_arg_max(size, window, flip):
    image = picture(*size)
    sliding = Evaluation(mode="slide", window=window[0], stride=window[1], flip=flip)
    expected, label = segment(Contextual(), image, sliding).max(0)
    labels, confidence = segment_labels(Contextual(), image, sliding, confidence=True)
    assert_close(confidence, expected, atol=1e-5, rtol=0)
    top = segment(Contextual(), image, sliding).topk(2, dim=0).values
    clear = top[0] - top[1] > 1e-4  # ties may fall either way by rounding
    assert torch.equal(labels[clear], label[clear])


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
def test_windows_cover_every_position_and_stay_inside(side, window, stride):
    stride = min(stride, window)
    starts = window_starts(side, window, stride)
    covered = {i for s in starts for i in range(s, min(s + window, side))}
    assert covered == set(range(side))
    assert starts[-1] + window == side or starts == [0]


def test_the_answer_has_the_size_asked_for():
    for size in [(1, 1), (1, 17), (31, 33), (64, 40)]:
        for evaluation in [Evaluation(), Evaluation(mode="slide", window=(8, 8), stride=(5, 5), scales=(0.5, 1.5))]:
            probabilities = segment(Local(), picture(21, 13), evaluation, size)
            labels, confidence = segment_labels(Local(), picture(21, 13), evaluation, size, confidence=True)
            assert probabilities.shape == (4, *size)
            assert labels.shape == size
            assert_close(confidence, probabilities.max(0).values, atol=1e-5, rtol=0)


def test_strips_of_an_enlarged_map_are_the_whole_enlargement(monkeypatch):
    monkeypatch.setattr("protoseg.engine.windows.STRIP_NUMBERS", 4 * 67 * 5)  # five rows at a time
    image, size = picture(21, 13), (53, 67)
    expected = segment(Local(), image, Evaluation(scales=(0.5, 1.0, 1.75), flip=True), size)
    labels, confidence = segment_labels(
        Local(), image, Evaluation(scales=(0.5, 1.0, 1.75), flip=True), size, confidence=True
    )
    assert_close(confidence, expected.max(0).values, atol=1e-5, rtol=0)
    assert (labels == expected.argmax(0)).float().mean() > 0.999


def test_scales_and_flips_are_averaged_as_probabilities():
    image = picture(16, 24)
    model = Contextual()
    by_hand = (model(image[None]).softmax(1)[0] + model(image.flip(-1)[None]).softmax(1)[0].flip(-1)) / 2
    assert_close(segment(model, image, Evaluation(flip=True)), by_hand)
    single = [segment(model, image, Evaluation(scales=(s,))) for s in (0.5, 1.0, 2.0)]
    assert_close(segment(model, image, Evaluation(scales=(0.5, 1.0, 2.0))), sum(single) / 3)


def test_flipping_the_input_flips_the_answer_when_flip_is_on():
    image = picture(9, 14)
    evaluation = Evaluation(flip=True)
    answer = segment(Contextual(), image, evaluation)
    assert_close(segment(Contextual(), image.flip(-1), evaluation), answer.flip(-1))


@pytest.mark.parametrize("batch", [2, 8])
def test_windows_in_batches_are_the_same_windows(batch):
    image = picture(20, 31)
    evaluation = Evaluation(mode="slide", window=(8, 9), stride=(5, 4))
    assert_close(segment(Contextual(), image, evaluation, batch=batch), segment(Contextual(), image, evaluation))
    one, other = (segment_labels(Contextual(), image, evaluation, batch=b)[0] for b in (1, batch))
    assert torch.equal(one, other)


@pytest.mark.parametrize("stride", [(9, 4), (0, 4), (4, 20)])
def test_a_stride_that_leaves_gaps_is_refused(stride):
    with pytest.raises(UserError, match="stride"):
        segment(Local(), picture(20, 20), Evaluation(mode="slide", window=(8, 8), stride=stride))


def test_scales_must_be_positive():
    for scales in [(), (0.0,), (1.0, -1.0)]:
        with pytest.raises(UserError, match="scales"):
            segment(Local(), picture(8, 8), Evaluation(scales=scales))


@torch.no_grad()
def test_the_table_of_a_huge_image_is_never_whole():
    """At 40 classes the 600×900 table has 21.6 M numbers; what is alive at once must stay far below."""
    largest = 0

    class Watched(Local):
        def forward(self, images):
            nonlocal largest
            largest = max(largest, images.shape[-1] * images.shape[-2])
            return super().forward(images)

    seen = []
    sliding = Evaluation(mode="slide", window=(64, 64), stride=(48, 48))
    for (top, left, bottom, right), block in _swept(Watched(40), picture(600, 900), sliding, 1):
        seen.append((bottom - top) * (right - left))
        assert block.shape == (40, bottom - top, right - left)
    assert sum(seen) == 600 * 900
    assert max(seen) <= 160 * 64
    assert largest == 64 * 64


@torch.no_grad()
def test_one_pass_over_a_network_takes_the_short_way_to_the_same_labels(monkeypatch):
    torch.manual_seed(0)
    model = build(Model(network="tiny"), Head(num_prototypes=2, embed_dim=8), 5).eval()
    image = picture(45, 70)
    taken = []
    labels = Segmenter.labels
    monkeypatch.setattr(Segmenter, "labels", lambda *a, **k: taken.append(1) or labels(*a, **k))
    one_window = Evaluation(mode="slide", window=(64, 96), stride=(32, 48))
    for evaluation, size, confidence, short in [
        (Evaluation(), None, False, True),
        (one_window, None, False, True),
        (Evaluation(), None, True, False),
        (Evaluation(), (90, 140), False, False),  # probabilities are what is resized, not scores
        (Evaluation(flip=True), None, False, False),
        (Evaluation(scales=(1.0, 0.5)), None, False, False),
        (Evaluation(mode="slide", window=(32, 32), stride=(16, 16)), None, False, False),
    ]:
        taken.clear()
        found, sure = segment_labels(model, image, evaluation, size, confidence=confidence, dtype=torch.uint8)
        assert bool(taken) == short, evaluation
        assert (sure is not None) == confidence
        assert found.dtype == torch.uint8
        top = segment(model, image, evaluation, size).topk(2, dim=0)
        clear = top.values[0] - top.values[1] > 1e-5
        assert torch.equal(found[clear].long(), top.indices[0][clear])


@torch.no_grad()
@pytest.mark.parametrize("preset", ["default", "reference"])  # half-pixel and aligned corners
def test_a_network_resized_strip_by_strip_is_the_network(monkeypatch, preset):
    monkeypatch.setattr("protoseg.engine.windows.STRIP_NUMBERS", 5 * 70 * 7)  # seven rows at a time
    torch.manual_seed(0)
    model = build(Model(network="tiny"), Head(preset=preset, num_prototypes=2, embed_dim=None), 5).eval()

    class Plain(nn.Module):
        def forward(self, images):
            return model(images)

    image = picture(45, 70)
    for evaluation in [
        Evaluation(),
        Evaluation(flip=True),
        Evaluation(scales=(1.0, 0.7), flip=True),
        Evaluation(mode="slide", window=(33, 37), stride=(20, 21), flip=True),
    ]:
        expected = segment(Plain(), image, evaluation)
        assert_close(segment(model, image, evaluation), expected, atol=1e-6, rtol=0)
        labels, sure = segment_labels(model, image, evaluation, confidence=True)
        assert_close(sure, expected.amax(0), atol=1e-6, rtol=0)
        assert_close(expected.gather(0, labels[None])[0], expected.amax(0), atol=1e-6, rtol=0)


NIGHTLY = """
import resource, torch
from protoseg.config import Evaluation, Head, Model
from protoseg.engine.windows import segment_labels
from protoseg.models import build

model = build(Model(), Head(), 171).eval()
image = torch.randint(0, 256, (3, 4000, 6000), dtype=torch.uint8)
labels, _ = segment_labels(model, image, Evaluation(mode="slide"), dtype=torch.uint8)
assert labels.shape == (4000, 6000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("PROTOSEG_NIGHTLY"), reason="takes minutes; set PROTOSEG_NIGHTLY=1")
def test_a_huge_image_of_many_classes_fits_in_two_gibibytes():
    run = subprocess.run([sys.executable, "-c", NIGHTLY], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 2
