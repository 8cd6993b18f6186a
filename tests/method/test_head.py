import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from heads import VOID, batch, build, default_step, seeded
from oracles import default as oracle
from oracles.reference import unit
from protoseg import kernels
from protoseg.method.head import PrototypeHead
from protoseg.method.prototypes import Memory
from protoseg.models.softmax_head import SoftmaxHead

QUICK = settings(max_examples=10, deadline=None, derandomize=True)
BUFFERS = ("prototypes", "weight", "length", "usage", "idle")


def state(head):
    return {name: value.clone() for name, value in head.state_dict().items()}


def same_bits(before, after):
    return all(torch.equal(value, after[name]) for name, value in before.items())


def one_step(head, features, labels, **named):
    """Losses with their gradient to the features, then the update."""
    features = features.detach().clone().requires_grad_(True)
    losses = head.losses(features, labels, **named)
    losses.total.backward()
    head.update(losses)
    return losses, features.grad


# --- against the dense oracle ---------------------------------------------------------------------------------------

VARIANTS = {
    "default": {},
    "linear": {"projection": "linear"},
    "no projection": {"projection": "none", "embed_dim": 6},
    "no siblings": {"contrast_siblings": False},
    "class weights": {"class_weights": [0.5, 2.0, 1.0]},
    "K=1": {"num_prototypes": 1},
    "heavy": {"contrast_weight": 0.7, "distance_weight": 0.4, "contrast_temperature": 0.3, "score_scale": 5.0},
    "sharp": {"kappa": 0.02, "sinkhorn_iterations": 5},
    "align corners": {"align_corners": True},
}


@pytest.mark.parametrize("label_size", [(4, 6), (16, 24), (9, 13)], ids=["same", "four times", "odd"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_losses_gradient_and_assignment_equal_the_dense_oracle(variant, label_size):
    head = build(6, 3, **{"num_prototypes": 4, "embed_dim": 8, **VARIANTS[variant]})
    features, labels = batch(6, 3, label_size=label_size)
    slow = default_step(head, features, labels)
    assert_close(head(features), slow.scores, rtol=0, atol=1e-12)
    losses, gradient = one_step(head, features, labels)
    for name in ("ce", "ppc", "ppd", "total"):
        assert abs(float(getattr(losses, name).detach() - getattr(slow, name))) < 1e-12, name
    assert_close(gradient, slow.gradient, rtol=0, atol=1e-12)
    assert torch.equal(losses.assignment, slow.assignment)


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("rule", ["constant", "bias_corrected", "count_aware"])
@pytest.mark.parametrize("start", ["random", "data"])
@pytest.mark.parametrize("label_size", [(4, 6), (9, 13)], ids=["same", "odd"])
def test_prototypes_equal_the_oracle_over_several_steps(rule, start, preset, label_size):
    head = build(6, 3, preset=preset, num_prototypes=4, embed_dim=8, momentum=0.9, momentum_rule=rule, start=start)
    weight = float(head.weight[0, 0])
    slow = oracle.Memory(head.prototypes, rule, 0.9, head.count_cap, weight)
    for s in range(5):
        features, labels = batch(6, 3, label_size=label_size, seed=s)
        step = default_step(head, features, labels)
        losses, _ = one_step(head, features, labels)
        assert torch.equal(losses.assignment, step.assignment)
        slow.update(step.embedding, step.assignment, errors=step.errors if preset == "default" else None)
        assert_close(head.prototypes, slow.p, rtol=0, atol=1e-12)


def test_update_from_correct_pixels_only():
    head = build(6, 3, num_prototypes=4, projection="none", momentum=0.5, update_from="correct")
    slow = oracle.Memory(head.prototypes, "constant", 0.5, weight=1.0)
    features, labels = batch(6, 3, size=(2, 8, 8))
    step = default_step(head, features, labels)
    correct = (step.scores.argmax(1) == labels).reshape(-1)
    assert 0 < int(correct.sum()) < correct.numel()
    losses, _ = one_step(head, features, labels)
    slow.update(step.embedding, step.assignment, correct)
    assert_close(head.prototypes, slow.p, rtol=0, atol=1e-12)
    assert torch.equal(losses.assignment, step.assignment)  # the losses still see every labelled pixel


def test_nearest_assignment_is_the_oracles():
    head = build(6, 3, num_prototypes=4, projection="none", assignment="nearest")
    features, labels = batch(6, 3)
    slow = default_step(head, features, labels, nearest=True)
    losses, gradient = one_step(head, features, labels)
    assert torch.equal(losses.assignment, slow.assignment)
    assert_close(gradient, slow.gradient, rtol=0, atol=1e-12)


def test_collapsed_prototypes_are_exact_ties_and_share_the_gradient():
    head = build(6, 3, num_prototypes=4, projection="none", contrast_weight=0.0, distance_weight=0.0)
    with torch.no_grad():
        head.prototypes.copy_(head.prototypes[:, :1].expand(-1, 4, -1))
    features, labels = batch(6, 3, void=0)
    slow = default_step(head, features, labels)
    assert_close(one_step(head, features, labels)[1], slow.gradient, rtol=0, atol=1e-12)


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["default", "reference", "reference_fixed"])
def test_scores_are_one_tensor_in_train_and_eval_and_forward_writes_nothing(preset):
    head = build(6, 3, preset=preset)
    before, features = state(head), batch(6, 3)[0]
    scores = head.train()(features)
    assert isinstance(scores, torch.Tensor)
    assert scores.shape == (2, 3, 4, 6)
    assert torch.equal(scores, head.eval()(features))
    assert same_bits(before, state(head))


@pytest.mark.parametrize("preset", ["default", "reference", "reference_fixed"])
def test_only_update_moves_a_prototype(preset):
    head = build(6, 3, preset=preset)
    features, labels = batch(6, 3)
    before = state(head)
    losses = head.losses(features, labels)
    losses.total.backward()
    torch.optim.SGD(head.parameters(), lr=1.0, weight_decay=0.1).step()
    assert torch.equal(before["prototypes"], head.prototypes)
    head.update(losses)
    assert not torch.equal(before["prototypes"], head.prototypes)


@pytest.mark.parametrize("preset", ["default", "reference"])
def test_prototypes_are_one_buffer_for_life(preset):
    head = build(6, 3, preset=preset, reseed_after=1)
    address = head.prototypes.data_ptr()
    for s in range(4):
        one_step(head, *batch(6, 3, seed=s))
        assert head.prototypes.data_ptr() == address
    assert "prototypes" in dict(head.named_buffers())
    assert "prototypes" in head.state_dict()
    assert not [name for name, _ in head.named_parameters() if "prototype" in name]
    assert not head.prototypes.requires_grad
    assert head.prototypes.shape == (3, 10, head.embed_dim)
    assert_close(head.prototypes.norm(dim=-1), torch.ones(3, 10, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_saved_head_continues_bit_for_bit():
    head, twin = build(6, 3, seed=1), build(6, 3, seed=2)
    one_step(head, *batch(6, 3))
    twin.load_state_dict(head.state_dict())
    for s in range(3):
        one_step(head, *batch(6, 3, seed=s))
        one_step(twin, *batch(6, 3, seed=s))
    assert same_bits(state(head), state(twin))


def test_learned_parameters_do_not_grow_with_the_classes():
    few, many = (sum(p.numel() for p in PrototypeHead(6, c).parameters()) for c in (2, 150))
    assert few == many
    # The release: two 1x1 convolutions, LayerNorm over D, LayerNorm over C.
    released = sum(p.numel() for p in PrototypeHead(720, 19, preset="reference").parameters())
    assert released == 1_039_718


def test_the_losses_and_the_update_share_one_assignment():
    head = build(6, 3)
    losses = head.losses(*batch(6, 3))
    assert torch.equal(losses.assignment.reshape(-1), losses.moving)


def test_parts_are_detached_scalars_by_name():
    losses = build(6, 3).losses(*batch(6, 3))
    for name in ("ce", "ppc", "ppd"):
        assert losses.parts[name].shape == ()
        assert not losses.parts[name].requires_grad
        assert losses.parts[name] == getattr(losses, name)


def test_assignment_names_a_prototype_of_the_pixels_own_class():
    head = build(6, 3, num_prototypes=4)
    features, labels = batch(6, 3, void=0.3)
    assignment = head.losses(features, labels).assignment
    assert assignment.dtype == torch.int64
    assert torch.equal(assignment == -1, labels == VOID)
    valid = assignment >= 0
    assert torch.equal(assignment[valid] // 4, labels[valid])


def test_writing_before_backward_is_refused_not_silent():
    head = build(6, 3)
    losses = head.losses(batch(6, 3)[0].requires_grad_(True), batch(6, 3)[1])
    head.update(losses)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.total.backward()


def test_micro_batches_update_as_one_batch():
    whole, parts = (build(6, 3, sinkhorn_iterations=1, assignment="nearest", momentum=0.5) for _ in range(2))
    features, labels = batch(6, 3, size=(4, 4, 6))
    whole.update(whole.losses(features, labels))
    parts.update([parts.losses(features[:1], labels[:1]), parts.losses(features[1:], labels[1:])])
    assert_close(whole.prototypes, parts.prototypes, rtol=0, atol=1e-14)


# --- laws -----------------------------------------------------------------------------------------------------------


@QUICK
@given(seed=st.integers(0, 10_000))
def test_the_embedding_of_a_pixel_depends_on_that_pixel_alone(seed):
    head, (features, _) = build(6, 3), batch(6, 3, seed=seed)
    scores = head(features)
    assert_close(head(features[:, :, 1:3, 2:5]), scores[:, :, 1:3, 2:5], rtol=0, atol=1e-12)
    assert_close(head(features.flip(3)).flip(3), scores, rtol=0, atol=1e-12)


@QUICK
@given(seed=st.integers(0, 10_000))
def test_the_order_of_pixels_does_not_matter(seed):
    first, second = (build(6, 3, num_prototypes=3, projection="linear") for _ in range(2))
    features, labels = batch(6, 3, seed=seed)
    order = torch.randperm(features[0, 0].numel(), generator=seeded(seed))
    shuffled = features.flatten(2)[..., order].view_as(features)
    one, _ = one_step(first, features, labels)
    two, _ = one_step(second, shuffled, labels.flatten(1)[:, order].view_as(labels))
    assert torch.equal(one.assignment.flatten(1)[:, order].view_as(labels), two.assignment)
    assert_close(one.total, two.total, rtol=0, atol=1e-12)
    assert_close(first.prototypes, second.prototypes, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["constant", "bias_corrected", "count_aware"])
@QUICK
@given(seed=st.integers(0, 10_000), absent=st.integers(0, 3))
def test_an_absent_class_keeps_its_bits(rule, seed, absent):
    head = build(6, 4, num_prototypes=3, momentum_rule=rule, reseed_after=1, seed=seed)
    with torch.no_grad():
        head.idle.fill_(5)  # even a prototype that is due to be re-seeded
    features, labels = batch(6, 4, seed=seed)
    labels[labels == absent] = VOID
    before = state(head)
    one_step(head, features, labels)
    for name in BUFFERS:
        assert torch.equal(before[name][absent], getattr(head, name)[absent]), name


@QUICK
@given(seed=st.integers(0, 10_000))
def test_moved_as_the_paper_says_a_class_never_sees_its_neighbours(seed):
    both, alone = (build(6, 3, preset="paper", num_prototypes=3, seed=1) for _ in range(2))
    features, labels = batch(6, 3, seed=seed)
    other = torch.where((labels == 1)[:, None], features, batch(6, 3, seed=seed + 1)[0])
    one, _ = one_step(both, features, labels)
    two, _ = one_step(alone, other, torch.where(labels == 1, 1, VOID))
    assert torch.equal(one.assignment[labels == 1], two.assignment[labels == 1])
    assert_close(both.prototypes[1], alone.prototypes[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("preset", ["default", "paper", "reference", "reference_fixed"])
def test_an_all_ignored_batch_is_zero_and_moves_nothing(preset):
    head = build(6, 3, preset=preset, class_weights=[1.0, 2.0, 3.0])
    features, labels = batch(6, 3, label_size=(8, 12), void=1.1)
    before = state(head)
    losses, gradient = one_step(head, features, labels)
    assert losses.total == losses.ce == losses.ppc == losses.ppd == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    for p in head.parameters():
        assert p.grad is None or not p.grad.any()
    assert (losses.assignment == -1).all()
    assert same_bits(before, state(head))


@pytest.mark.parametrize("preset", ["default", "reference", "reference_fixed"])
@pytest.mark.parametrize(
    ("classes", "k", "size"), [(2, 10, (2, 4, 4)), (3, 1, (1, 4, 4)), (3, 10, (1, 1, 2)), (1, 4, (1, 3, 3))]
)
def test_small_problems_work(preset, classes, k, size):
    head = build(6, classes, num_prototypes=k, preset=preset)
    for s in range(3):
        losses, gradient = one_step(head, *batch(6, classes, size=size, seed=s))
        assert losses.total.isfinite()
        assert gradient.isfinite().all()
    assert_close(head.prototypes.norm(dim=-1), torch.ones(classes, k, dtype=torch.float64), rtol=0, atol=1e-12)


def test_two_classes_train():
    # A LayerNorm over two classes answers +-1 to any gap; a scale lets the loss fall.
    head = build(6, 2, num_prototypes=3)
    features, labels = batch(6, 2, void=0)
    features[:, 0] += 4.0 * (2 * labels - 1)
    features = features.requires_grad_(True)
    optimizer = torch.optim.Adam([*head.parameters()], lr=0.02)
    values = []
    for _ in range(40):
        losses = head.losses(features, labels)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        head.update(losses)
        values.append(float(losses.ce.detach()))
    assert values[-1] < 0.1 < values[0]


@pytest.mark.parametrize("preset", ["default", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_finite_scores_and_losses(preset, dtype):
    head = PrototypeHead(8, 3, projection="none", preset=preset)
    features, labels = batch(8, 3, dtype=dtype)
    features = (200 * features).requires_grad_(True)  # squares overflow fp16
    assert head(features).isfinite().all()
    losses = head.losses(features, labels)
    losses.total.backward()
    head.update(losses)
    assert losses.total.isfinite()
    assert features.grad.isfinite().all()
    assert head.prototypes.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_reach_the_cosines(dtype):
    torch.manual_seed(0)
    head = PrototypeHead(8, 3, projection="none")
    features, labels = batch(8, 3, dtype=torch.float32)
    plain = head.losses(features, labels)
    with torch.autocast("cpu", dtype=dtype):
        mixed = head.losses(features, labels)
    assert torch.equal(plain.assignment, mixed.assignment)
    assert_close(plain.total, mixed.total)


def test_prototype_255_is_a_target_like_any_other():
    head = build(16, 52, num_prototypes=5, projection="none")  # 51*5 + 0 = 255, the usual void label
    features, labels = batch(16, 52, size=(1, 8, 8), void=0)
    labels[0, :4] = 51
    losses, _ = one_step(head, features, labels)
    mine = losses.assignment == 255
    assert mine.any()
    # Contrast and distance alone: the gradient draws the pixel towards prototype 255.
    only = build(16, 52, num_prototypes=5, projection="none", contrast_weight=1.0, distance_weight=1.0)
    x = features.clone().requires_grad_(True)
    again = only.losses(x, labels)
    (again.ppc + again.ppd).backward()
    pull = -(x.grad.permute(0, 2, 3, 1)[again.assignment == 255] @ only.prototypes[51, 0])
    assert (pull > 0).all()
    before = head.prototypes[51, 0].clone()
    head.update(losses)
    assert not torch.equal(before, head.prototypes[51, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("preset", ["default", "reference"])
def test_a_loss_that_is_not_finite_moves_nothing(value, preset):
    head = build(6, 3, preset=preset, projection="none")
    features, labels = batch(6, 3, void=0)
    features[0, 0, 0, 0] = value
    before = state(head)
    good = head.losses(*batch(6, 3, seed=5))
    losses = head.losses(features, labels)
    assert not losses.total.isfinite()
    head.update(losses)
    assert same_bits(before, state(head))
    head.update([good, losses])  # one broken micro-batch spoils the step
    assert same_bits(before, state(head))


def test_scores_do_not_change_with_the_length_of_a_feature():
    head = build(6, 3, projection="none")
    features, _ = batch(6, 3)
    assert_close(head(features), head(1000 * features), rtol=0, atol=1e-10)


def test_no_radial_gradient_is_lost_to_the_scale():
    # The cross-entropy rewards compactness: the learned scale receives a gradient (a LayerNorm over classes has none).
    head = build(6, 19)
    one_step(head, *batch(6, 19))
    assert abs(float(head.log_scale.grad)) > 1e-3


# --- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 3, 254, 65535])
def test_a_label_out_of_range_is_named(bad):
    head = build(6, 3)
    features, labels = batch(6, 3, label_size=(8, 12))
    labels[1, 2, 3] = bad
    with pytest.raises(ValueError, match=rf"labels hold {bad} .*3 classes"):
        head.losses(features, labels)


def test_another_void_label_is_a_setting():
    head = build(6, 3, ignore_index=-1)
    twin = build(6, 3)
    features, labels = batch(6, 3)
    one, two = head.losses(features, torch.where(labels == VOID, -1, labels)), twin.losses(features, labels)
    assert torch.equal(one.total, two.total)


def test_a_void_label_inside_the_range_is_void():
    head = build(6, 3, ignore_index=1)
    features, labels = batch(6, 3, void=0)
    losses = head.losses(features, labels)
    assert torch.equal(losses.assignment == -1, labels == 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 4, 6), "int64"),
        (torch.zeros(2, 4, 6, dtype=torch.uint8), "int64"),
        (torch.zeros(3, 4, 6, dtype=torch.int64), "B = 2"),
        (torch.zeros(2, 1, 4, 6, dtype=torch.int64), "B, H, W"),
    ],
)
def test_labels_of_another_shape_or_type_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        build(6, 3).losses(batch(6, 3)[0], labels)


def test_features_of_another_shape_are_refused():
    for call in (build(6, 3), lambda tokens: build(6, 3).losses(tokens, torch.zeros(2, 4, 4, dtype=torch.int64))):
        with pytest.raises(ValueError, match=r"\(B, 6, h, w\), given \(2, 16, 6\)"):
            call(torch.zeros(2, 16, 6, dtype=torch.float64))


@pytest.mark.parametrize("given", [4, 8, 256])
def test_another_number_of_channels_is_refused_with_and_without_gradients(given):
    head, labels = build(6, 3, projection="none"), torch.zeros(1, 5, 7, dtype=torch.int64)
    features = torch.zeros(1, given, 5, 7, dtype=torch.float64)
    for call in (lambda: head(features), lambda: head.losses(features, labels)):
        with pytest.raises(ValueError, match=rf"\(B, 6, h, w\), given \(1, {given}, 5, 7\)"):
            call()
        with torch.no_grad(), pytest.raises(ValueError, match="given"):
            call()
    head.projection = torch.nn.Conv2d(6, given, 1).double()
    with torch.no_grad(), pytest.raises(ValueError, match=rf"projection gives {given} channels, the prototypes have 6"):
        head(features.new_zeros(1, 6, 5, 7))


def test_no_image_has_no_scores():
    assert build(6, 3)(torch.zeros(0, 6, 4, 5, dtype=torch.float64)).shape == (0, 3, 4, 5)


def test_wrong_settings_stop():
    with pytest.raises(ValueError, match="preset"):
        PrototypeHead(6, 3, preset="other")
    with pytest.raises(ValueError, match="num_classes"):
        PrototypeHead(6, 0)
    with pytest.raises(ValueError, match="num_prototypes"):
        PrototypeHead(6, 3, num_prototypes=0)
    with pytest.raises(ValueError, match="embed_dim"):
        PrototypeHead(6, 3, projection="none", embed_dim=5)
    with pytest.raises(ValueError, match="embed_dim"):
        PrototypeHead(6, 3, embed_dim=0)
    for weights in ([1.0, 2.0], [1.0, 2.0, -1.0], [1.0, 2.0, math.nan]):
        with pytest.raises(ValueError, match="class_weights"):
            PrototypeHead(6, 3, class_weights=weights)
    with pytest.raises(ValueError, match="distance"):
        PrototypeHead(6, 3, distance=lambda cosine: cosine)  # a function may stand for `assignment` alone
    with pytest.raises(TypeError, match="num_protos"):
        PrototypeHead(6, 3, num_protos=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("ignore_index", 255.0), ("num_prototypes", 2.5), ("kappa", "0.05"), ("kappa", np.ones(2)), ("reseed_after", 1.5)],
)
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(TypeError, match=name):
        PrototypeHead(6, 3, **{name: value})


def test_numbers_of_other_libraries_are_numbers():
    named = {"contrast_temperature": np.float32(0.1), "momentum": torch.tensor(0.5), "score_scale": np.float64(20)}
    counts = {"ignore_index": torch.tensor(1), "num_prototypes": np.int64(2), "contrast_negatives": np.int32(4)}
    head = build(np.int64(6), np.int64(3), projection="none", **named, **counts)
    features, labels = batch(6, 3, void=0)
    losses = head.losses(features, labels)
    losses.total.backward()
    head.update(losses)
    assert torch.equal(losses.assignment == -1, labels == 1)


def test_with_more_than_255_classes_the_void_label_must_be_said():
    assert PrototypeHead(6, 255).ignore_index == 255
    for head in (PrototypeHead, SoftmaxHead):
        with pytest.raises(ValueError, match="255 is one of 256 classes"):
            head(6, 256)
        assert head(6, 256, ignore_index=65535).ignore_index == 65535
        assert head(6, 256, ignore_index=255).ignore_index == 255  # a class that is meant to be void


@pytest.mark.parametrize("value", [0.0, -3.0, math.nan])
def test_a_cap_of_counts_is_positive(value):
    with pytest.raises(ValueError, match="count_cap"):
        PrototypeHead(6, 3, momentum_rule="count_aware", count_cap=value)


# --- whose memory, and in what ---------------------------------------------------------------------------------------

MEMORY = Memory._fields


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_memory_stays_in_fp32_where_the_layers_go_to_half_precision(dtype):
    head = PrototypeHead(6, 3, preset="paper", reseed_after=400)
    before = {name: getattr(head, name).clone() for name in MEMORY}
    assert head.to(dtype) is head
    assert head.projection[0].weight.dtype == dtype
    assert all(torch.equal(getattr(head, name), value) for name, value in before.items())
    assert all(value.dtype == torch.float64 for name, value in head.double().named_buffers() if name in MEMORY)


def test_a_default_of_half_precision_makes_a_head_too():
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        head = PrototypeHead(6, 3)
    finally:
        torch.set_default_dtype(kept)
    assert {getattr(head, name).dtype for name in MEMORY} == {torch.float32}


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("preset", ["default", "reference"])
def test_a_head_made_without_values_gets_them_from_reset_parameters(preset, weights):
    with torch.device("meta"):
        head = PrototypeHead(6, 3, preset=preset, class_weights=weights)
    assert all(value.is_meta for value in [*head.parameters(), *head.buffers()])
    head.to_empty(device="cpu")
    with torch.no_grad():
        for value in [*head.parameters(), *head.buffers()]:
            value.fill_(torch.nan)
    for module in head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = PrototypeHead(6, 3, preset=preset, class_weights=weights)
    assert_close(head.prototypes.norm(dim=-1), torch.ones(3, 10))
    for name, value in fresh.state_dict().items():
        if name != "prototypes" and not name.startswith("projection"):
            assert torch.equal(head.state_dict()[name], value), name
    head.losses(*batch(6, 3, dtype=torch.float32)).total.backward()


def test_update_takes_only_what_its_own_losses_gave():
    head, other = build(6, 3, embed_dim=8), build(6, 3, embed_dim=12)
    losses, before = other.losses(*batch(6, 3)), head.prototypes.clone()
    with pytest.raises(ValueError, match="whose embeddings have 8 channels"):
        head.update(losses)
    with pytest.raises(ValueError, match="which has 3 x 10 prototypes"):
        head.update(build(6, 3, embed_dim=8, num_prototypes=4).losses(*batch(6, 3)))
    for wrong in (losses.total, losses.parts, [losses.total]):
        with pytest.raises(TypeError, match="what `losses` gave"):
            head.update(wrong)
    assert torch.equal(head.prototypes, before)


@pytest.mark.parametrize("update_from", ["all", "correct", "errors"])
def test_the_first_pixels_of_a_prototype_replace_a_start_from_data(update_from):
    head = build(6, 3, projection="none", start="data", update_from=update_from)
    losses = head.losses(*batch(6, 3, void=0))
    head.update(losses)
    for j in losses.moving.unique().tolist():
        if j >= 0:
            mean = unit(losses.embedding[losses.moving == j].sum(0))
            assert_close(head.prototypes.flatten(0, 1)[j], mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("preset", ["default", "reference"])
@pytest.mark.parametrize("projection", ["none", "linear"])
def test_a_second_derivative_is_refused_instead_of_left_out(preset, projection):
    head, (features, labels) = build(6, 3, preset=preset, projection=projection, embed_dim=6), batch(6, 3)
    features.requires_grad_(True)
    total = head.losses(features, labels).total
    (gradient,) = torch.autograd.grad(total, features, create_graph=True)
    with pytest.raises(RuntimeError, match="plain_only"):
        (total + gradient.square().sum()).backward()
    with kernels.plain_only():
        (gradient,) = torch.autograd.grad(head.losses(features, labels).total, features, create_graph=True)
        gradient.square().sum().backward()
    assert features.grad.any()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("assignment", "soft"),
        ("start", "zeros"),
        ("momentum_rule", "other"),
        ("update_from", "some"),
        ("projection_norm", "rows"),
        ("score_norm", "batch"),
        ("feature_norm", "batch"),
        ("across_ranks", "never"),
        ("momentum", 1.5),
        ("kappa", 0.0),
        ("contrast_temperature", 0.0),
        ("score_scale", -1.0),
        ("sinkhorn_iterations", 0),
    ],
)
def test_a_setting_that_means_nothing_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        PrototypeHead(6, 3, **{name: value})


# --- idle prototypes ------------------------------------------------------------------------------------------------


def idle_head(**named):
    """A class whose prototype 1 points away from every pixel; nearest assignment never uses it."""
    named = {"num_prototypes": 2, "projection": "none", "assignment": "nearest", "reseed_after": 3, **named}
    head = build(4, 2, **named)
    with torch.no_grad():
        head.prototypes[:, 0] = torch.tensor([1.0, 0, 0, 0])
        head.prototypes[:, 1] = torch.tensor([-1.0, 0, 0, 0])
        head.usage.copy_(torch.tensor([[1.0, 0], [1.0, 0]]))
    return head


def idle_batch():
    features = torch.zeros(1, 4, 2, 4, dtype=torch.float64)
    features[:, 0] = 1
    features[:, 1] = 0.1 * torch.arange(8).view(2, 4)  # the last pixel of class 0 is served worst
    return features, torch.zeros(1, 2, 4, dtype=torch.int64)


def test_an_idle_prototype_is_set_on_the_pixel_served_worst():
    head, (features, labels) = idle_head(), idle_batch()
    for _ in range(2):
        head.update(head.losses(features, labels))
        assert head.prototypes[0, 1, 0] == -1
    head.update(head.losses(features, labels))
    assert_close(head.prototypes[0, 1], unit(features[0, :, 1, 3]), rtol=0, atol=1e-12)
    assert head.prototypes[1, 1, 0] == -1  # the other class was not seen, so it does not age


@pytest.mark.parametrize("named", [{"reseed_after": None}, {"reseed_after": 1000}])
def test_an_idle_prototype_stays_where_reseeding_is_off_or_not_due(named):
    head, (features, labels) = idle_head(**named), idle_batch()
    for _ in range(10):
        head.update(head.losses(features, labels))
    assert head.prototypes[0, 1, 0] == -1


def test_the_reference_never_reseeds():
    assert build(6, 3, preset="reference").reseed_after is None
    assert build(6, 3, preset="reference_fixed").reseed_after is None


def test_distinctness_tells_collapse_from_health():
    head = idle_head()
    assert head.distinctness() == pytest.approx({"pairwise_cosine": -1.0, "used": 0.5})
    with torch.no_grad():
        head.prototypes[:, 1] = head.prototypes[:, 0]
    assert head.distinctness()["pairwise_cosine"] == pytest.approx(1.0)
