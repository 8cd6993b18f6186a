"""A whole head through the kernels against the plain lines of `method`, on tiny batches."""

import copy

import pytest
import torch
from torch.testing import assert_close

from heads import batch, build
from protoseg import kernels
from protoseg.kernels import gpu, similarity
from triton_device import DEVICE, INTERPRETED, at_hand

cross_entropy = pytest.importorskip("protoseg.kernels.gpu.cross_entropy", reason="no Triton")
gpu_similarity = pytest.importorskip("protoseg.kernels.gpu.similarity", reason="no Triton")
pytestmark = at_hand

VARIANTS = {
    "default": {},
    "no siblings": {"contrast_siblings": False},
    "LayerNorm over classes": {"score_norm": "layer_norm"},
    "correct only": {"update_from": "correct"},
    "errors": {"update_from": "errors"},
    "errors, no siblings": {"update_from": "errors", "contrast_siblings": False},
    "class weights": {"class_weights": [0.5, 2.0, 1.0]},
    "align corners": {"align_corners": True},
    "K=1": {"num_prototypes": 1},
    "no contrast": {"contrast_weight": 0.0, "distance_weight": 0.0},
    "reference": {"preset": "reference"},
}
SAME, ODD = (5, 6), (13, 17)
CASES = [("mm", variant, ODD) for variant in VARIANTS]
CASES += [("mm", "default", SAME), ("mm", "no siblings", SAME)]
if INTERPRETED:  # on a GPU the kernels' own products do not know float64
    CASES += [("ieee", "default", ODD), ("ieee", "no siblings", SAME), ("ieee", "errors", ODD)]


@pytest.fixture(autouse=True)
def narrow_bands(monkeypatch):
    """Bands of two feature rows, so that a tiny image has many and each leaves its last row to the next."""
    monkeypatch.setattr(similarity, "FEWEST_COLUMNS", 12)
    monkeypatch.setattr(similarity, "CPU_BAND", 1)
    monkeypatch.setattr(similarity, "GPU_BAND", 1)


def test_the_kernels_are_what_is_tested_here():
    assert gpu.way(torch.device(DEVICE), torch.float64) == "mm"


def step(head, features, labels, parts=("total",)):
    """Losses, gradients to the features and all that learns, and the head after its update."""
    head = copy.deepcopy(head)
    features = features.to(DEVICE).requires_grad_(True)
    noise = torch.Generator().manual_seed(7)
    rows = features.shape[0] * features.shape[2] * features.shape[3]
    gumbel = -torch.empty(rows, head.num_prototypes).exponential_(generator=noise).log().to(features)
    losses = head.losses(features, labels.to(DEVICE), gumbel=gumbel if head.draws else None)
    sum(getattr(losses, part) for part in parts).backward()
    head.update(losses)
    return losses, {"features": features.grad, **{n: p.grad for n, p in head.named_parameters()}}, head.state_dict()


def assert_same_step(head, features, labels, atol=1e-12, **named):
    head = head.to(DEVICE)
    losses, gradients, memory = step(head, features, labels, **named)
    with kernels.plain_only():
        true, true_gradients, true_memory = step(head, features, labels, **named)
    for name in ("total", "ce", "ppc", "ppd"):
        assert_close(getattr(losses, name), getattr(true, name), rtol=0, atol=atol)
    assert torch.equal(losses.assignment, true.assignment)
    assert torch.equal(losses.moving, true.moving)
    for name, gradient in true_gradients.items():
        if gradient is None:
            assert gradients[name] is None or not gradients[name].any(), name
            continue
        assert_close(gradients[name], gradient, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    for name, held in true_memory.items():
        assert_close(memory[name], held, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("way", "variant", "label_size"), CASES)
def test_a_step_through_the_kernels_equals_the_plain_lines(way, variant, label_size, monkeypatch):
    monkeypatch.setenv(gpu.VARIABLE, way)
    assert gpu.way(torch.device(DEVICE), torch.float64) == way
    head = build(6, 3, **{"num_prototypes": 4, "embed_dim": 20, **VARIANTS[variant]})
    assert_same_step(head, *batch(6, 3, size=(2, 5, 6), label_size=label_size))


@pytest.mark.parametrize(
    ("variant", "images"),
    [("default", 1), ("default", 2), ("LayerNorm over classes", 2), ("errors", 1), ("align corners", 2)],
)
def test_bands_of_whole_images_equal_the_plain_lines(variant, images, monkeypatch):
    """Their cross-entropy at label size is the kernels' as well."""
    calls, run = [], cross_entropy.label_cross_entropy
    monkeypatch.setattr(similarity, "FEWEST_COLUMNS", images * 3 * 4)
    monkeypatch.setattr(cross_entropy, "label_cross_entropy", lambda *given: calls.append(given) or run(*given))
    head = build(6, 3, **{"num_prototypes": 4, "embed_dim": 20, **VARIANTS[variant]})
    assert_same_step(head, *batch(6, 3, size=(2, 3, 4), label_size=(5, 7)))
    assert len(calls) == 2 // images


@pytest.mark.parametrize("label_size", [None, (7, 9)])
@pytest.mark.parametrize("named", [{}, {"contrast_siblings": False}])
def test_drawn_negatives_equal_the_plain_lines(named, label_size):
    """There the products are PyTorch's, and want the cosines that the cross-entropy's kernels could overwrite."""
    head = build(6, 3, num_prototypes=4, embed_dim=20, contrast_negatives=5, **named)

    def same(*given):
        return torch.arange(5, device=DEVICE) * 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("protoseg.method.head.draw_negatives", same)
        assert_same_step(head, *batch(6, 3, size=(2, 5, 6), label_size=label_size))


def test_a_batch_without_images_has_no_losses():
    head = build(6, 3, num_prototypes=4, embed_dim=20).to(DEVICE)
    features, labels = batch(6, 3, size=(1, 3, 4))
    losses = head.losses(features[:0].to(DEVICE), labels[:0].to(DEVICE))
    assert losses.total == 0
    assert len(losses.assignment) == 0


@pytest.mark.parametrize("siblings", [True, False])
@pytest.mark.parametrize("parts", [("ce",), ("ppc", "ppd")])
def test_every_loss_has_its_own_gradient(parts, siblings):
    head = build(6, 3, num_prototypes=4, embed_dim=20, contrast_siblings=siblings)
    assert_same_step(head, *batch(6, 3, size=(1, 5, 6), label_size=(10, 12)), parts=parts)


def test_a_batch_without_a_label_moves_nothing():
    head = build(6, 3, num_prototypes=4, embed_dim=20)
    features, labels = batch(6, 3, size=(1, 3, 4), void=1.1)
    assert_same_step(head, features, labels)
    losses, _, memory = step(head.to(DEVICE), features, labels)
    assert losses.total == 0
    assert torch.equal(memory["prototypes"], head.prototypes)


def test_absent_classes_and_collapsed_prototypes():
    head = build(6, 9, num_prototypes=4, projection="none", embed_dim=6)
    with torch.no_grad():
        head.prototypes[:, 1:3] = head.prototypes[:, :1]
    features, labels = batch(6, 2, size=(1, 5, 6))
    head.contrast_weight = head.distance_weight = 0.0  # which of the equal ones is given is rounding
    head = head.to(DEVICE)
    losses, gradients, _ = step(head, features, labels)
    with kernels.plain_only():
        true, true_gradients, _ = step(head, features, labels)
    assert_close(losses.total, true.total, rtol=0, atol=1e-12)
    assert_close(gradients["features"], true_gradients["features"], rtol=0, atol=1e-12)


def test_scores_without_gradient_are_the_scores():
    head = build(6, 3, num_prototypes=4, embed_dim=20).to(DEVICE)
    features = batch(6, 3, size=(2, 5, 6))[0].to(DEVICE)
    with torch.no_grad():
        fast = head(features)
        with kernels.plain_only():
            assert_close(fast, head(features), rtol=0, atol=1e-12)


@pytest.fixture
def ways(monkeypatch):
    """The ways that were taken, in order."""
    found, usual = [], gpu_similarity.Cosines

    def noted(way, *known):
        found.append(way)
        return usual(way, *known)

    monkeypatch.setattr(gpu_similarity, "Cosines", noted)
    return found


@pytest.mark.parametrize("asked", ["auto", "tf32"])
@pytest.mark.parametrize("projection", ["linear", "none"])
@pytest.mark.parametrize("given", ["autocast", torch.bfloat16, torch.float16, torch.float32])
def test_features_of_half_precision_take_half_precision_products_unless_a_way_is_named(
    given, projection, asked, ways, monkeypatch
):
    monkeypatch.setenv(gpu.VARIABLE, asked)
    head = build(24, 3, num_prototypes=4, projection=projection, embed_dim=24).float().to(DEVICE)
    features, labels = batch(24, 3, size=(1, 4, 4), dtype=torch.float32)
    if given != "autocast":
        head.projection.to(given)
        features = features.to(given)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=given == "autocast"):
        losses, gradients, _ = step(head, features, labels)
        with torch.no_grad():
            scores = head(features.to(DEVICE))
    half = given in (torch.bfloat16, torch.float16) or (given == "autocast" and projection == "linear")
    assert set(ways) == {"bf16" if half and asked == "auto" else "mm" if asked == "auto" else asked}
    assert len(ways) >= 2  # the losses, and the scores alone
    assert losses.total.dtype == scores.dtype == losses.embedding.dtype == torch.float32
    with kernels.plain_only(), torch.autocast(DEVICE, torch.bfloat16, enabled=given == "autocast"):
        true, true_gradients, _ = step(head, features, labels)
    assert_close(losses.total, true.total, rtol=2e-2, atol=0)
    assert gradients["features"].dtype == true_gradients["features"].dtype == features.dtype


def test_plain_only_and_off_keep_the_kernels_out(monkeypatch):
    def refuse(*args, **named):
        raise AssertionError("a kernel ran")

    head = build(6, 3, num_prototypes=4, embed_dim=20).to(DEVICE)
    features, labels = batch(6, 3, size=(1, 5, 6))
    for name in ("nearest", "gradient", "fill"):
        monkeypatch.setattr(f"protoseg.kernels.gpu.similarity.Cosines.{name}", refuse)
    with kernels.plain_only():
        step(head, features, labels)
    with pytest.raises(AssertionError, match="a kernel ran"):
        step(head, features, labels)
    monkeypatch.setenv(gpu.VARIABLE, "off")
    step(head, features, labels)


@pytest.mark.parametrize("fused", ["ieee", "tf32", "bf16"])
def test_products_in_the_kernels_stay_near_the_plain_lines(fused, monkeypatch):
    monkeypatch.setenv(gpu.VARIABLE, fused)
    head = build(24, 7, num_prototypes=5, projection="none", embed_dim=24, assignment="nearest").float().to(DEVICE)
    features, labels = batch(24, 7, size=(1, 6, 6), label_size=(12, 12), dtype=torch.float32)
    losses, gradients, _ = step(head, features, labels)
    with kernels.plain_only():
        true, true_gradients, _ = step(head, features, labels)
    rough = {"bf16": 2e-2, "tf32": 5e-3}.get(fused, 1e-5)
    assert_close(losses.total, true.total, rtol=rough, atol=0)
    best = (head.embed(features.to(DEVICE)) @ head.prototypes.flatten(0, 1).T).unflatten(1, (7, 5)).topk(2, 2).values
    clear = ((best[..., 0] - best[..., 1]) > rough / 4).all(1).view(1, 1, 6, 6)  # a tie over K may fall either way
    assert clear.float().mean() > 0.5
    found, wanted = gradients["features"] * clear, true_gradients["features"] * clear
    assert (found - wanted).norm() / wanted.norm() < 2 * rough
