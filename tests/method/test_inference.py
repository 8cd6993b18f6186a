"""A frozen head answers as the head it was made from."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from heads import build, seeded
from protoseg.kernels import inference as kernel
from protoseg.method.inference import bilinear_labels, freeze, used_prototypes

TIGHT = {"rtol": 1e-11, "atol": 1e-11}
PRESETS = ["default", "reference", "reference_fixed"]
# (in_channels, embed_dim): folding pays or not, the embedding is thinner or wider than what it is made from
WIDTHS = {"mlp": [(6, 6), (4, 16), (16, 4)], "linear": [(6, 6), (4, 16), (16, 4)], "none": [(6, 6)]}
HEADS = [(p, *w, preset) for p in WIDTHS for w in WIDTHS[p] for preset in PRESETS]


def pixels(channels, size=(2, 5, 7), seed=0):
    """Features whose lengths differ by factors of ten: what forgets them mixes neighbours wrongly. One is zero."""
    g = seeded(seed)
    features = torch.randn(size[0], channels, *size[1:], generator=g, dtype=torch.float64)
    features *= (1.5 * torch.randn(size[0], 1, *size[1:], generator=g, dtype=torch.float64)).exp()
    features[0, :, 0, 0] = 0
    return features


def plain_labels(head, features, size):
    """What `labels` must be, and where two classes are so near that rounding decides."""
    scores = F.interpolate(head(features), size=size, mode="bilinear", align_corners=head.align_corners)
    top = scores.topk(2, dim=1).values
    return scores.argmax(1), top[:, 0] - top[:, 1] > 1e-9


def idle(head, seed=0):
    """Let training have used only some prototypes: of class 0 none, of the others one or more."""
    usage = torch.rand(head.usage.shape, generator=seeded(seed)).to(head.usage.dtype)
    usage[usage < 0.6] = 0
    usage[0] = 0
    head.usage.copy_(usage / usage.sum(1, keepdim=True).clamp(min=1e-9))
    return head


@pytest.mark.parametrize(("projection", "channels", "dim", "preset"), HEADS)
@pytest.mark.parametrize("K", [1, 3])
def test_scores_and_labels_are_those_of_the_head(projection, channels, dim, preset, K):
    head = build(channels, 5, num_prototypes=K, embed_dim=dim, projection=projection, preset=preset)
    frozen, features = freeze(head), pixels(channels)
    for given_as in (features, features.contiguous(memory_format=torch.channels_last)):
        assert_close(frozen(given_as), head(features), **TIGHT)
        for size in [(5, 7), (20, 28), (13, 9), (3, 4), (1, 1), (5, 30)]:
            expected, clear = plain_labels(head, features, size)
            assert clear.float().mean() > 0.7
            assert torch.equal(frozen.labels(given_as, size)[clear], expected[clear]), size
    clear = plain_labels(head, features, (5, 7))[1]
    assert torch.equal(frozen.labels(features)[clear], head(features).argmax(1)[clear])


@pytest.mark.parametrize("distance", ["euclidean", "huber"])
@pytest.mark.parametrize("projection", ["linear", "none"])
def test_other_distances_are_scored_before_the_resize(distance, projection):
    head = build(16, 5, num_prototypes=2, embed_dim=16, projection=projection, distance=distance)
    frozen, features = freeze(head), pixels(16)
    assert_close(frozen(features), head(features), **TIGHT)
    expected, clear = plain_labels(head, features, (13, 9))
    assert torch.equal(frozen.labels(features, (13, 9))[clear], expected[clear])


def test_folding_and_thinning_happen_where_they_save_arithmetic():
    def done(*args, **named):
        frozen = freeze(build(*args, **named))
        return frozen.folded is not None, frozen.thinned

    assert done(16, 5, num_prototypes=2, embed_dim=16, projection="linear") == (True, False)  # few prototypes
    assert done(16, 5, num_prototypes=9, embed_dim=4, projection="linear") == (False, False)  # narrow embedding
    assert done(4, 5, num_prototypes=9, embed_dim=16, projection="mlp")[1]  # wide embedding of few channels
    assert done(6, 5, num_prototypes=2, projection="none") == (False, False)
    for named in ({"score_norm": "layer_norm"}, {"feature_norm": "layer_norm"}, {"projection_norm": "width"}):
        folded, thinned = done(16, 5, num_prototypes=2, embed_dim=32, projection="linear", **named)
        assert not folded
        assert thinned == ("score_norm" in named)


@pytest.mark.parametrize("projection", ["mlp", "linear", "none"])
@pytest.mark.parametrize("precision", ["full", "bf16", "int8"])
def test_pruning_is_the_head_without_its_idle_prototypes(projection, precision):
    head = idle(build(8, 7, num_prototypes=4, embed_dim=8, projection=projection))
    features = pixels(8)
    kept = used_prototypes(head.usage)
    assert len(kept.sum(1).unique()) > 1
    twin = build(8, 7, num_prototypes=4, embed_dim=8, projection=projection)
    for c in range(7):  # a repeated prototype changes no maximum
        twin.prototypes[c] = torch.where(kept[c][:, None], head.prototypes[c], head.prototypes[c][kept[c]][0])
    frozen = freeze(head, prune=True, precision=precision, calibration=features, agreement=0)
    assert frozen.kept == int(kept.sum())
    close = TIGHT if precision == "full" else {"rtol": 0, "atol": 20 * 0.03}
    assert_close(frozen(features), twin(features), **close)
    expected, clear = plain_labels(twin, features, (11, 15))
    if precision == "full":
        assert torch.equal(frozen.labels(features, (11, 15))[clear], expected[clear])


def test_a_class_keeps_its_most_used_prototype():
    usage = torch.tensor([[0.0, 0.001, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.97, 0.03, 0.0]])
    assert used_prototypes(usage).tolist() == [[False, True, False], [True, True, True], [True, False, False]]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("projection", ["linear", "none"])
def test_rounded_precisions_stay_near_the_full_one(precision, preset, projection):
    head = build(32, 6, embed_dim=32, projection=projection, preset=preset).float()
    features = pixels(32, (2, 16, 16)).float()
    frozen = freeze(head, precision=precision, calibration=features, agreement=0.9)
    assert frozen.agreement >= 0.9
    assert frozen(features).dtype == torch.float32
    if head.score_norm is None:
        assert (frozen(features) - head(features)).abs().max() < head.log_scale.exp() * 0.02  # of a cosine
    expected, _ = plain_labels(head, features, (40, 40))
    assert (frozen.labels(features, (40, 40)) == expected).float().mean() > 0.9


def test_a_precision_that_loses_labels_is_refused_with_the_share_it_keeps():
    head = build(16, 4, num_prototypes=1, embed_dim=16, projection="none")
    near = head.prototypes[:1] + 1e-5 * torch.randn(4, 1, 16, generator=seeded(1), dtype=torch.float64)
    head.prototypes.copy_(near / near.norm(dim=-1, keepdim=True))
    features = pixels(16, (2, 8, 8))
    with pytest.raises(ValueError, match=r"int8 keeps \d+\.\d+% of the labels .* less than the 99\.9000%"):
        freeze(head, precision="int8", calibration=features)
    taken = freeze(head, precision="int8", calibration=[features, features], agreement=0.0)
    assert taken.agreement is not None
    assert taken.agreement < 0.999
    assert freeze(head, calibration=features, agreement=1.0).agreement == 1.0


def test_pruning_that_loses_labels_is_refused():
    head = build(8, 4, num_prototypes=4, embed_dim=8, projection="none")
    head.usage.copy_(torch.eye(4)[0].expand(4, 4))
    with pytest.raises(ValueError, match="pruning keeps"):
        freeze(head, prune=True, calibration=pixels(8, (1, 16, 16)))


def test_what_cannot_be_frozen_so_is_refused():
    head = build(8, 4, embed_dim=8)
    with pytest.raises(ValueError, match=r"calibration=segmenter\.features"):
        freeze(head, precision="int8")
    with pytest.raises(ValueError, match="given 'fp8'"):
        freeze(head, precision="fp8")
    head.prototypes = head.prototypes[:2]
    with pytest.raises(ValueError, match="2 of the 4 classes"):
        freeze(head)
    head = build(8, 4, embed_dim=8)
    with pytest.raises(ValueError, match="no pixel"):
        freeze(head, calibration=pixels(8)[:0])


def test_a_machine_without_int8_products_is_told(monkeypatch):
    monkeypatch.setattr(kernel, "int8_reason", lambda device: "not implemented for 'Char'")
    with pytest.raises(ValueError, match=r"int8.* does not work on cpu here \(not implemented for 'Char'\)"):
        freeze(build(8, 4, embed_dim=8), precision="int8", calibration=pixels(8))


def test_training_on_does_not_reach_a_frozen_head():
    head, features = build(6, 4, embed_dim=6), pixels(6)
    frozen = freeze(head)
    before = frozen(features).clone(), frozen.labels(features, (9, 9))
    with torch.no_grad():
        for value in [*head.parameters(), *head.buffers()]:
            value.add_(1)
    assert torch.equal(frozen(features), before[0])
    assert torch.equal(frozen.labels(features, (9, 9)), before[1])
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen(features.requires_grad_()).requires_grad


def test_half_precision_features_and_heads_are_scored_in_fp32():
    head = build(8, 4, embed_dim=8).to(torch.bfloat16)
    frozen = freeze(head)
    features = pixels(8).to(torch.bfloat16)
    assert frozen(features).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(frozen(features), frozen(features.float()))


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from([torch.int64, torch.uint8]),
)
def test_labels_of_a_resize_need_no_resize(size, out, C, align_corners, dtype):
    scores = torch.randn(size[0], C, *size[1:], generator=seeded(0), dtype=torch.float64)
    resized = F.interpolate(scores, size=out, mode="bilinear", align_corners=align_corners)
    labels = bilinear_labels(scores, out, align_corners=align_corners, dtype=dtype)
    assert labels.shape == (size[0], *out)
    assert labels.dtype == dtype
    chosen = resized.gather(1, labels.long()[:, None])[:, 0]
    assert_close(chosen, resized.amax(1), rtol=0, atol=1e-12)


def test_smooth_scores_take_the_short_way_and_get_the_same_labels(monkeypatch):
    """Scores with large areas of one class, in strips and pieces of a few pixels."""
    monkeypatch.setattr(kernel, "MIXED", 60)
    scores = F.interpolate(torch.randn(2, 5, 3, 3, generator=seeded(3), dtype=torch.float64), size=(24, 24))
    mixed = []
    bag = F.embedding_bag
    monkeypatch.setattr(F, "embedding_bag", lambda index, *a, **k: mixed.append(len(index)) or bag(index, *a, **k))
    labels = bilinear_labels(scores, (50, 71))
    assert torch.equal(labels, F.interpolate(scores, size=(50, 71), mode="bilinear").argmax(1))
    assert 0 < sum(mixed) < 0.3 * labels.numel()
    assert max(mixed) <= 60 // 5


class Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, list | tuple) else [out]:
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return out


def test_no_table_of_all_pixels_by_all_prototypes_or_at_label_size():
    head = build(4, 30, num_prototypes=10, embed_dim=4, projection="linear").float()
    frozen, features = freeze(head), pixels(4, (1, 128, 96)).float()
    with Largest() as largest:
        frozen(features)
    assert largest.numbers <= kernel.CPU_BAND  # the table of all cosines has 3,686,400
    with Largest() as largest:
        frozen.labels(features, (512, 384))
    assert largest.numbers <= max(kernel.CPU_BAND, kernel.MIXED)  # the table of all label pixels has 5,898,240
