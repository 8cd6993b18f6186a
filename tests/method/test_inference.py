"""A frozen head answers as the head it was made from."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from heads import build, seeded
from protoseg.kernels import inference as kernel
from protoseg.kernels import screening
from protoseg.method import inference
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


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)),
        (nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)),
        (nn.Conv2d(8, 8, 1), nn.GELU(), nn.Conv2d(8, 8, 1)),
        (nn.Conv2d(8, 8, 1, bias=False),),
        (nn.BatchNorm2d(8),),
    ],
)
def test_a_projection_that_is_not_the_heads_own_is_not_frozen(layers):
    head = build(8, 4, embed_dim=8)
    head.projection = nn.Sequential(*layers).double()
    with pytest.raises(ValueError, match="only projections as PrototypeHead makes them"):
        freeze(head)


def test_features_of_another_shape_and_labels_of_a_small_type_are_refused():
    frozen = freeze(build(8, 300, embed_dim=8, num_prototypes=1, ignore_index=-1))
    for features in (torch.zeros(1, 9, 4, 4), torch.zeros(8, 4, 4)):
        for answer in (frozen, frozen.labels):
            with pytest.raises(ValueError, match=r"\(B, 8, h, w\)"):
                answer(features)
    for answer in (lambda: frozen.labels(pixels(8), dtype=torch.uint8), lambda: short_labels(frozen(pixels(8)))):
        with pytest.raises(ValueError, match="uint8 cannot name 300 classes"):
            answer()
    assert frozen.labels(pixels(8), dtype=torch.int16).dtype == torch.int16
    inference.check_holds(torch.bfloat16, 257)
    for dtype, classes in ((torch.bfloat16, 258), (torch.bool, 3)):
        with pytest.raises(ValueError, match="cannot name"):
            inference.check_holds(dtype, classes)


def short_labels(scores):
    return bilinear_labels(scores, (9, 9), dtype=torch.uint8)


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
    scores = frozen(features)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(frozen.to(dtype)(features), scores)  # how it rounds was said when it was frozen
    assert torch.equal(frozen(features.double()), scores)
    rounded = freeze(head, precision="bf16", calibration=features, agreement=0)
    scores = rounded(features)
    assert torch.equal(rounded.float()(features), scores)


def test_a_projection_with_parametrised_layers_is_frozen_as_it_is():
    head = build(8, 4, embed_dim=8)
    for layer in (head.projection[0], head.projection[2]):
        nn.utils.parametrizations.weight_norm(layer)
    features = pixels(8)
    assert_close(freeze(head)(features), head(features).detach(), rtol=0, atol=1e-10)


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


@pytest.fixture
def screened(monkeypatch):
    """Screening however few the prototypes. Answers how many pixels each call was given and left open."""
    if not screening.lanes():
        pytest.skip("no C compiler, or no 16 bit products on this CPU")
    monkeypatch.setattr(screening, "FEWEST", 1)
    monkeypatch.setattr(screening, "FILLED", 0)
    monkeypatch.setattr(inference, "RESIZED", 1)
    monkeypatch.setattr(inference, "OUTWEIGHED", 0)
    calls, certain_labels = [], screening.certain_labels

    def counted(rows, *args):
        labels = certain_labels(rows, *args)
        calls.append((len(rows), int((labels < 0).sum())))
        return labels

    monkeypatch.setattr(screening, "certain_labels", counted)
    return calls


def unscreened(frozen):
    twin = copy.deepcopy(frozen)
    twin.screen = None
    return twin


def assert_labels_are_those_in_float64(head, frozen, features, size):
    """But where fp32 could not tell."""
    exact = copy.deepcopy(head).double()
    scores = F.interpolate(exact(features.double()), size=size, mode="bilinear", align_corners=head.align_corners)
    top = scores.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-5 * top[:, 0].abs().clamp(min=1)
    assert clear.float().mean() > 0.7
    assert torch.equal(frozen.labels(features, size)[clear], scores.argmax(1)[clear])


@pytest.mark.parametrize(("projection", "channels", "dim", "preset"), HEADS)
@pytest.mark.parametrize("align_corners", [False, True])
def test_screened_labels_are_those_of_the_head(projection, channels, dim, preset, align_corners, screened):
    head = build(channels, 5, num_prototypes=3, embed_dim=dim, projection=projection, preset=preset).float()
    head.align_corners = align_corners
    frozen, features = freeze(head), pixels(channels).float()
    assert (frozen.screen is not None) == (head.score_norm is None)
    for given_as in (features, features.contiguous(memory_format=torch.channels_last)):
        for size in [(5, 7), (20, 28), (13, 9), (3, 4), (5, 30)]:
            assert_labels_are_those_in_float64(head, frozen, given_as, size)
    assert bool(screened) == (head.score_norm is None)


@pytest.mark.parametrize("size", [(24, 20), (96, 80), (31, 47)])
@pytest.mark.parametrize("projection", ["none", "linear", "mlp"])
def test_labels_do_not_show_that_the_codes_left_some_open(projection, size, screened, monkeypatch):
    """Classes in near pairs: codes tell neither the pixels of a pair apart nor many mixes."""
    head = build(16, 12, num_prototypes=2, embed_dim=16, projection=projection).float()
    head.prototypes[1::2] = head.prototypes[::2] + 1e-3 * torch.randn(6, 2, 16, generator=seeded(5))
    frozen, features = freeze(head), pixels(16, (1, 24, 20)).float()
    monkeypatch.setattr(kernel, "MIXED", 2000)  # several strips, and more than one settlement
    labels = frozen.labels(features, size)
    assert sum(open_ for _, open_ in screened) > 0
    different = (labels != unscreened(frozen).labels(features, size)).float().mean()
    assert different < 2e-3  # ties within fp32, which another order of summation decides
    assert_labels_are_those_in_float64(head, frozen, features, size)
    frozen.screen = replace(frozen.screen, spread=0.0, own=0.0)
    worse = (frozen.labels(features, size) != unscreened(frozen).labels(features, size)).float().mean()
    assert worse > 3 * different


def test_features_like_prototypes_are_certain_and_few_rows_are_made(screened, monkeypatch):
    head = build(64, 24, num_prototypes=4, embed_dim=64, projection="none").float()
    choice = torch.randint(24, (1, 4, 4), generator=seeded(0)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    near = head.prototypes[choice, 0] + 0.05 * torch.randn(1, 32, 32, 64, generator=seeded(1))
    frozen, features = freeze(head), near.permute(0, 3, 1, 2)
    made, true_rows = [], type(frozen)._true_rows
    monkeypatch.setattr(type(frozen), "_true_rows", lambda *a: made.append(len(a[2])) or true_rows(*a))
    assert torch.equal(frozen.labels(features), choice)
    assert sum(open_ for _, open_ in screened) < 0.01 * 1024
    assert torch.equal(frozen.labels(features, (128, 128)), unscreened(frozen).labels(features, (128, 128)))
    assert sum(made) < 0.1 * 1024


@pytest.mark.parametrize("size", [(16, 16), (40, 40)])
def test_screening_stops_where_it_leaves_too_much_open(size, screened, monkeypatch):
    monkeypatch.setattr(kernel, "MOST", 32)
    head = build(8, 5, num_prototypes=2, embed_dim=8, projection="none").float()
    head.prototypes[:] = head.prototypes[:1] + 1e-6 * torch.randn(5, 2, 8, generator=seeded(1))
    head.prototypes[0, 0] = -head.prototypes[0, 0]
    frozen, features = freeze(head), pixels(8, (1, 16, 16)).float()
    frozen.labels(features, size)
    assert [given for given, _ in screened] == [32]
    features[0, :, :4] = -head.prototypes[1, 0][:, None, None]  # certain
    screened.clear()
    frozen.labels(features, size)
    shares = [sum(o for _, o in screened[: i + 1]) / (32 * (i + 1)) for i in range(len(screened))]
    assert shares[1] == 0
    assert 2 < len(shares) < 8
    assert [share > 0.25 for share in shares] == [False] * (len(shares) - 1) + [True]


@pytest.mark.parametrize("projection", ["none", "mlp"])
def test_pixels_that_are_no_numbers_are_answered_as_without_screening(projection, screened):
    head = build(8, 9, num_prototypes=2, embed_dim=8, projection=projection).float()
    frozen, features = freeze(head), pixels(8, (1, 12, 12)).float()
    features[0, 3, 2, 2], features[0, :, 5, 5], features[0, 0, 9, 9] = torch.nan, torch.inf, -torch.inf
    for size in [(12, 12), (48, 48)]:
        assert torch.equal(frozen.labels(features, size), unscreened(frozen).labels(features, size))
    assert sum(open_ for _, open_ in screened) >= 3


def test_pruned_heads_are_screened(screened):
    head = idle(build(8, 17, num_prototypes=4, embed_dim=8, projection="none")).float()
    frozen, features = freeze(head, prune=True), pixels(8, (1, 12, 12)).float()
    for size in [(12, 12), (30, 20)]:
        assert torch.equal(frozen.labels(features, size), unscreened(frozen).labels(features, size))
    assert screened


def test_codes_follow_the_prototypes_and_nothing_else_is_screened(screened):
    first, second = (build(8, 9, num_prototypes=2, embed_dim=8, seed=s).float() for s in (0, 1))
    frozen, other, features = freeze(first), freeze(second), pixels(8).float()
    frozen.load_state_dict(other.state_dict())
    assert torch.equal(frozen.labels(features), other.labels(features))
    assert screened
    assert frozen.screen is not None
    screened.clear()
    freeze(first, precision="int8", calibration=features, agreement=0.0).labels(features)
    freeze(build(8, 9, num_prototypes=2, embed_dim=8, distance="euclidean").float()).labels(features)
    freeze(first).double().labels(features.double())
    freeze(first).labels(features[:0])
    assert not screened


def test_few_prototypes_are_not_screened_and_some_not_through_a_resize(screened, monkeypatch):
    frozen, features = freeze(build(8, 9, num_prototypes=2, embed_dim=8).float()), pixels(8).float()
    for name, value in (("RESIZED", 19), ("OUTWEIGHED", 20)):
        with monkeypatch.context() as patch:
            patch.setattr(inference, name, value)
            frozen.labels(features, (20, 20))
        assert not screened
    frozen.labels(features)
    assert screened
    monkeypatch.setattr(screening, "FEWEST", 19)
    assert freeze(build(8, 9, num_prototypes=2, embed_dim=8).float()).screen is None
