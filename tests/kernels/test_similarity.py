import pytest
import torch
from torch.testing import assert_close

from heads import batch, build
from protoseg import kernels
from protoseg.kernels import similarity, similarity_cpu
from protoseg.kernels.class_errors import Band, add

pytestmark = pytest.mark.usefixtures("way")
VARIANTS = {
    "default": {},
    "no siblings": {"contrast_siblings": False},
    "width norm": {"projection_norm": "width"},
    "LayerNorm before": {"feature_norm": "layer_norm"},
    "LayerNorm over classes": {"score_norm": "layer_norm"},
    "fixed scale": {"learn_scale": False},
    "correct only": {"update_from": "correct"},
    "errors": {"update_from": "errors"},
    "errors, no siblings": {"update_from": "errors", "contrast_siblings": False},
    "errors, LayerNorm over classes": {"update_from": "errors", "score_norm": "layer_norm"},
    "nearest": {"assignment": "nearest"},
    "class weights": {"class_weights": [0.5, 2.0, 1.0]},
    "align corners": {"align_corners": True},
    "K=1": {"num_prototypes": 1},
    "sharp contrast": {"contrast_temperature": 0.002},  # e^(-2 / tau) is no number any more
    "sharp contrast, no siblings": {"contrast_temperature": 0.002, "contrast_siblings": False},
    "no contrast": {"contrast_weight": 0.0, "distance_weight": 0.0},
    "reference": {"preset": "reference"},
    "reference_fixed": {"preset": "reference_fixed"},
}
LABEL_SIZES = {"same": (5, 6), "four times": (20, 24), "odd": (13, 17), "smaller": (3, 4), "rows only": (11, 6)}


@pytest.fixture
def narrow_bands(monkeypatch):
    """Bands of two feature rows and strips of a label row or two, so that a tiny image has many of each."""
    monkeypatch.setattr(similarity, "FEWEST_COLUMNS", 12)
    monkeypatch.setattr(similarity, "CPU_BAND", 1)


def run(head, features, labels, parts=("total",), **named):
    """Losses, and the gradients of the sum of `parts` to the features and to everything the head learns."""
    head.zero_grad()
    features = features.clone().requires_grad_(True)
    losses = head.losses(features, labels, **named)
    sum(getattr(losses, part) for part in parts).backward()
    return losses, {"features": features.grad, **{n: p.grad for n, p in head.named_parameters()}}


def both(head, features, labels, **named):
    """The fast way, then the plain one."""
    if head.draws:
        noise = torch.Generator().manual_seed(7)
        rows = features.shape[0] * features.shape[2] * features.shape[3]
        named["gumbel"] = -torch.empty(rows, head.num_prototypes).exponential_(generator=noise).log().double()
    fast = run(head, features, labels, **named)
    with kernels.plain_only():
        return fast, run(head, features, labels, **named)


def assert_same(fast, plain, atol=1e-12):
    (losses, gradients), (true, true_gradients) = fast, plain
    for name in ("total", "ce", "ppc", "ppd"):
        assert_close(getattr(losses, name), getattr(true, name), rtol=0, atol=atol)
    assert torch.equal(losses.assignment, true.assignment)
    assert torch.equal(losses.moving, true.moving)
    assert_close(losses.embedding, true.embedding, rtol=0, atol=1e-15)
    assert (losses.errors is None) == (true.errors is None)
    for found, expected in zip(losses.errors or (), true.errors or (), strict=True):
        assert_close(found, expected, rtol=0, atol=atol)
    assert set(gradients) == set(true_gradients)
    for name, gradient in true_gradients.items():
        if gradient is None:  # a number the asked losses do not use
            assert gradients[name] is None or not gradients[name].any(), name
            continue
        assert_close(gradients[name], gradient, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("label_size", LABEL_SIZES.values(), ids=LABEL_SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_pass_in_many_bands_equals_the_plain_lines(variant, label_size, narrow_bands):
    head = build(6, 3, **{"num_prototypes": 4, **VARIANTS[variant]})
    features, labels = batch(6, 3, size=(2, 5, 6), label_size=label_size)
    assert_same(*both(head, features, labels))


@pytest.mark.parametrize("columns", [6, 18, 30, 60, 1000])
def test_the_width_of_a_band_changes_nothing(columns, monkeypatch):
    monkeypatch.setattr(similarity, "FEWEST_COLUMNS", columns)
    monkeypatch.setattr(similarity, "CPU_BAND", 1)
    head = build(6, 3, num_prototypes=4)
    assert_same(*both(head, *batch(6, 3, size=(3, 5, 6), label_size=(19, 21))))


@pytest.mark.parametrize("variant", ["default", "no siblings", "class weights", "errors", "reference"])
@pytest.mark.parametrize("label_size", [(9, 33), (18, 290)], ids=["feature", "label"])
def test_more_pixels_than_a_block_of_the_loops_in_c(variant, label_size):
    head = build(6, 3, **{"num_prototypes": 4, "embed_dim": 72, **VARIANTS[variant]})
    assert_same(*both(head, *batch(6, 3, size=(2, 9, 33), label_size=label_size)))


@pytest.mark.parametrize("siblings", [True, False])
@pytest.mark.parametrize("parts", [("ce",), ("ppc",), ("ppd",), ("ppc", "ppd"), ("total", "ce", "ppd")])
def test_every_loss_has_its_own_gradient(parts, siblings, narrow_bands):
    head = build(6, 3, num_prototypes=4, contrast_siblings=siblings)
    features, labels = batch(6, 3, size=(2, 5, 6), label_size=(10, 12))
    assert_same(*both(head, features, labels, parts=parts))


def test_the_gradient_follows_what_the_total_is_multiplied_by_and_may_be_asked_for_twice(narrow_bands):
    head = build(6, 3, num_prototypes=4)
    features, labels = batch(6, 3, size=(2, 5, 6), label_size=(10, 12))
    once = run(head, features, labels)[1]["features"]
    features = features.requires_grad_(True)
    total = 3 * head.losses(features, labels).total
    for _ in range(2):
        (gradient,) = torch.autograd.grad(total, features, retain_graph=True)
        assert_close(gradient, 3 * once, rtol=0, atol=1e-12)


def test_tied_prototypes_share_the_gradient_as_amax_does(narrow_bands):
    head = build(6, 3, num_prototypes=4, projection="none", contrast_weight=0.0, distance_weight=0.0)
    with torch.no_grad():
        head.prototypes[:, 1:3] = head.prototypes[:, :1]  # three of four are one
    assert_same(*both(head, *batch(6, 3, size=(2, 5, 6), label_size=(10, 12))))


def test_a_scale_learns_where_the_features_do_not(narrow_bands):
    head = build(6, 3, num_prototypes=4, projection="none")
    features, labels = batch(6, 3, size=(2, 5, 6), label_size=(10, 12))
    head.losses(features, labels).total.backward()
    fast = head.log_scale.grad.clone()
    with kernels.plain_only():
        head.zero_grad()
        head.losses(features, labels).total.backward()
    assert_close(fast, head.log_scale.grad, rtol=0, atol=1e-12)


def test_without_gradients_there_is_no_graph():
    head = build(6, 3)
    with torch.no_grad():
        losses = head.losses(*batch(6, 3))
    assert not losses.total.requires_grad
    assert losses.total.isfinite()


@pytest.mark.parametrize("images", [1, 2])  # the rows of one image are a view of it
def test_features_in_any_memory_layout_give_the_same(images):
    head = build(6, 3, num_prototypes=4, projection="none")
    features, labels = batch(6, 3, size=(images, 5, 6))
    one = run(head, features, labels)
    two = run(head, features.contiguous(memory_format=torch.channels_last), labels)
    assert_same(two, one, atol=1e-15)


@pytest.mark.parametrize("shape", [(19, 10, 64, None), (60, 5, 32, (64, 64))], ids=["feature", "label"])
def test_fp32_stays_with_float64_away_from_ties(shape):
    classes, k, d, label_size = shape
    head = build(d, classes, num_prototypes=k, projection="none", assignment="nearest")
    features, labels = batch(d, classes, size=(2, 16, 16), label_size=label_size)
    true = run(head, features, labels)[1]["features"]
    best = (head.embed(features) @ head.prototypes.flatten(0, 1).T).unflatten(1, (classes, k)).topk(2, 2).values
    clear = ((best[..., 0] - best[..., 1]) > 1e-5).all(1).view(2, 1, 16, 16)  # a tie over K may fall either way
    assert clear.double().mean() > 0.5
    found = run(head.float(), features.float(), labels)[1]["features"]
    error = ((found - true) * clear).norm() / (true * clear).norm()
    assert error < 1e-5


def test_the_plain_lines_are_taken_inside_plain_only_and_only_there(monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "one_pass", lambda *a: seen.append(a) or (_ for _ in ()).throw(KeyError("taken")))
    head = build(6, 3)
    with kernels.plain_only():
        head.losses(*batch(6, 3))
    assert not seen
    with pytest.raises(KeyError, match="taken"):
        head.losses(*batch(6, 3))


def test_no_table_of_all_pixels_by_all_prototypes_or_classes_exists(narrow_bands):
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    head = build(4, 40, num_prototypes=4, projection="none")
    features, labels = batch(4, 40, size=(2, 16, 6), label_size=(32, 12))
    with Largest() as fast:
        run(head, features, labels)
    with Largest() as plain, kernels.plain_only():
        run(head, features, labels)
    N = 2 * 16 * 6
    assert plain.size >= N * 40 * 4
    assert fast.size < N * 40


@pytest.mark.parametrize("preset", ["default", "reference"])
@pytest.mark.parametrize("size", [(2, 5, 6), (1, 40, 40)])
def test_scores_without_gradient_are_the_scores(preset, size, narrow_bands):
    head = build(6, 3, num_prototypes=4, preset=preset)
    features, _ = batch(6, 3, size=size)
    with torch.no_grad():
        assert_close(head(features), head(features.requires_grad_(True)).detach(), rtol=0, atol=1e-12)
        fast = head(features)
        with kernels.plain_only():
            assert_close(fast, head(features), rtol=0, atol=1e-12)
    assert head(features).requires_grad


def test_a_functional_transform_takes_the_plain_lines():
    head = build(6, 3, num_prototypes=4)
    features, labels = batch(6, 3)
    gradient = torch.func.grad(lambda x: head.losses(x, labels).total)(features)
    assert_close(gradient, run(head, features, labels)[1]["features"], rtol=0, atol=1e-12)


def test_a_pixel_without_length_gets_the_gradient_of_the_plain_lines():
    head = build(6, 3, num_prototypes=4, projection="none")
    features, labels = batch(6, 3, void=0)
    features[0, :, 1, 2] = 0  # its length is held at 1e-12, so its gradient is enormous
    fast, plain = both(head, features, labels)
    one, two = fast[1]["features"], plain[1]["features"]
    assert_close(one[0, :, 1, 2], two[0, :, 1, 2], rtol=1e-10, atol=0)
    one[0, :, 1, 2] = two[0, :, 1, 2] = 0
    assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 3, 19])
def test_sums_of_errors_have_the_same_bits_whatever_the_number_of_threads(classes, dtype):
    """Threads share out the classes; of seven some have none of two or three to take."""
    n, k, dim = 300, 4, 72
    x, p = torch.randn(n, dim, dtype=dtype), torch.randn(classes, k, dim, dtype=dtype)
    if not similarity_cpu.takes(x, p):
        pytest.skip("no C compiler")
    own, errors = torch.randint(-1, classes, (n,)), torch.randn(classes, n, dtype=dtype)
    cosines = similarity_cpu.Cosines(x, p, own, None, 0.1, True, own >= 0, None, None, 1.0)
    _, seen = cosines.nearest(0, n)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            found.append(Band(errors, own, x.new_zeros(classes * k, dim), x.new_zeros(n)))
            cosines.errors(found[-1], seen, 0, n)
    finally:
        torch.set_num_threads(threads)
    plain = Band(errors, own, x.new_zeros(classes * k, dim), x.new_zeros(n))
    add(plain, seen[0], x)
    assert_close(found[0].taken, plain.taken, rtol=0, atol=1e3 * torch.finfo(dtype).eps)
    for other in found:
        assert torch.equal(other.taken, found[0].taken)
        assert torch.equal(other.lacking, plain.lacking)
