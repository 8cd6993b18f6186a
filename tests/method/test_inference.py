"""A frozen head answers as the head it was made from."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from heads import build, seeded
from protoseg.method import inference
from protoseg.method.inference import bilinear_labels, freeze, used_prototypes

TIGHT = {"rtol": 1e-11, "atol": 1e-11}
PRESETS = ["default", "reference", "reference_fixed"]
# (in_channels, embed_dim): folding pays or not, the embedding is thinner or wider than what it is made from
WIDTHS = {"mlp": [(6, 6), (4, 16), (16, 4)], "linear": [(6, 6), (4, 16), (16, 4)], "none": [(6, 6)]}
HEADS = [(p, *w, preset) for p in WIDTHS for w in WIDTHS[p] for preset in PRESETS]


def pixels(channels, size=(2, 5, 7), seed=0):
    return torch.randn(size[0], channels, *size[1:], generator=seeded(seed), dtype=torch.float64)


def plain_labels(head, features, size):
    """What `labels` must be, and where two classes are so near that rounding decides."""
    scores = F.interpolate(head(features), size=size, mode="bilinear", align_corners=head.align_corners)
    top = scores.topk(2, dim=1).values
    return scores.argmax(1), top[:, 0] - top[:, 1] > 1e-9


@pytest.mark.parametrize(("projection", "channels", "dim", "preset"), HEADS)
@pytest.mark.parametrize("K", [1, 3])
def test_scores_and_labels_are_those_of_the_head(projection, channels, dim, preset, K):
    head = build(channels, 5, num_prototypes=K, embed_dim=dim, projection=projection, preset=preset)
    frozen, features = freeze(head), pixels(channels)
    for given_as in (features, features.contiguous(memory_format=torch.channels_last)):
        assert_close(frozen(given_as), head(features), **TIGHT)
        for size in [(5, 7), (20, 28), (13, 9), (3, 4), (1, 1), (5, 30)]:
            expected, clear = plain_labels(head, features, size)
            assert clear.float().mean() > 0.95
            assert torch.equal(frozen.labels(given_as, size)[clear], expected[clear]), size
    assert torch.equal(frozen.labels(features), head(features).argmax(1))
