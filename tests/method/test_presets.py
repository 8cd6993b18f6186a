import inspect
import math

import pytest
import torch
from torch.testing import assert_close

from heads import VOID, batch, build, convolutions, reference_weights, seeded
from oracles import reference
from oracles.default import mean_pairwise_cosine
from protoseg.method.head import PrototypeHead
from protoseg.method.presets import DEFAULT, PAPER, PRESETS, REFERENCE, REFERENCE_FIXED

CITYSCAPES_LIKE = [0.8373, 0.9180, 0.8660, 1.0345, 1.0166]


def gumbel(features, k, seed):
    """-log(Exponential(1)), one row per pixel in the order (image, row, column)."""
    n = features.shape[0] * features.shape[2] * features.shape[3]
    return -torch.empty(n, k, dtype=torch.float64).exponential_(generator=seeded(seed)).log()


def void_is_minus_one(labels):
    return torch.where(labels == VOID, -1, labels)


CASES = {
    "four times finer labels": {"size": (2, 6, 8), "label_size": (24, 32)},
    "labels of an odd size": {"size": (2, 5, 7), "label_size": (17, 25)},
    "labels as large as features": {"size": (1, 8, 8)},
    "one image row": {"size": (2, 1, 16)},
}


EXACT = 1e-10


@pytest.mark.parametrize("preset", ["reference", "reference_fixed"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weights", [None, CITYSCAPES_LIKE], ids=["plain", "class weights"])
def test_the_reference_equals_its_oracle_over_consecutive_steps(preset, case, weights):
    head = build(6, 5, num_prototypes=4, preset=preset, class_weights=weights)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    draws = preset == "reference"
    prototypes = head.prototypes.clone()
    moved = 0
    for s in range(6):
        features, labels = batch(6, 5, seed=s, **CASES[case])
        labels[labels == 4] = VOID if s % 2 else 4  # a class comes and goes
        noise = gumbel(features, 4, s)
        slow = reference.step(
            features,
            void_is_minus_one(labels),
            reference_weights(head),
            prototypes,
            noise if draws else None,
            head.class_weights,
            width_norm=draws,
        )
        features = features.requires_grad_(True)
        assert_close(head(features), slow.scores, rtol=0, atol=EXACT)
        losses = head.losses(features, labels, gumbel=noise)
        optimizer.zero_grad()
        losses.total.backward()
        for name in ("ce", "ppc", "ppd", "total"):
            assert_close(
                getattr(losses, name), getattr(slow, name), rtol=0, atol=EXACT, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert_close(features.grad, slow.gradient, rtol=0, atol=EXACT)
        assert torch.equal(losses.assignment.reshape(-1), slow.index)
        assert torch.equal(losses.moving, torch.where(slow.kept, slow.draw, -1))
        optimizer.step()
        head.update(losses)
        assert_close(head.prototypes, slow.prototypes, rtol=0, atol=EXACT)
        moved += int(slow.kept.sum())
        prototypes = slow.prototypes  # the oracle goes its own way
    assert moved > 0


def test_the_reference_in_single_precision_stays_within_its_rounding():
    torch.manual_seed(0)
    head = PrototypeHead(6, 5, num_prototypes=4, preset="reference")
    features, labels = batch(6, 5, size=(2, 6, 8), label_size=(24, 32))
    noise = gumbel(features, 4, 0)
    weights = build(6, 5, num_prototypes=4, preset="reference")
    weights.load_state_dict(head.state_dict())
    slow = reference.step(features, void_is_minus_one(labels), reference_weights(weights), weights.prototypes, noise)
    single = features.float().requires_grad_(True)
    losses = head.losses(single, labels, gumbel=noise.float())
    losses.total.backward()
    assert_close(losses.total.double(), slow.total, rtol=0, atol=1e-6)
    assert_close(single.grad.double(), slow.gradient, rtol=0, atol=1e-6)
    head.update(losses)
    assert_close(head.prototypes.double(), slow.prototypes, rtol=0, atol=1e-6)


def test_a_class_of_one_pixel_is_an_exact_tie_that_takes_prototype_zero():
    head = build(6, 3, num_prototypes=4, preset="reference")
    features, labels = batch(6, 3, void=0)
    labels[labels == 2] = 0
    labels[1, 2, 3] = 2
    losses = head.losses(features, labels, gumbel=gumbel(features, 4, 0))
    assert losses.assignment[1, 2, 3] == 2 * 4


def test_the_reference_draws_its_own_noise_when_given_none():
    head = build(6, 3, num_prototypes=4, preset="reference")
    features, labels = batch(6, 3, size=(2, 8, 8))
    torch.manual_seed(0)
    first = head.losses(features, labels).moving
    second = head.losses(features, labels).moving
    torch.manual_seed(0)
    assert torch.equal(first, head.losses(features, labels).moving)
    assert not torch.equal(first, second)


def test_the_references_update_and_losses_disagree_on_most_pixels():
    head = build(6, 3, num_prototypes=10, preset="reference", update_from="all")
    features, labels = batch(6, 3, size=(2, 16, 16), void=0)
    losses = head.losses(features, labels, gumbel=gumbel(features, 10, 0))
    share = (losses.moving != losses.assignment.reshape(-1)).double().mean()
    assert share > 0.7


def test_the_width_norm_lets_a_pixel_depend_on_its_row():
    features, _ = batch(6, 3, size=(1, 4, 16))
    released, fixed = build(6, 3, preset="reference"), build(6, 3, preset="reference_fixed")
    crop = features[..., :8]
    assert (released(crop) - released(features)[..., :8]).abs().max() > 1e-3
    assert_close(fixed(crop), fixed(features)[..., :8], rtol=0, atol=1e-12)


def test_a_layer_norm_over_classes_caps_the_probability_and_forgets_the_scale():
    head = PrototypeHead(6, 19, preset="reference").double().requires_grad_(False)
    cosine = torch.full((1, 19 * 10), -1.0, dtype=torch.float64)
    cosine[0, 30:40] = 1
    scores = head.score(cosine)
    assert float(scores.max()) == pytest.approx(math.sqrt(18), abs=1e-3)
    assert float(scores.softmax(1).max()) == pytest.approx(0.83, abs=5e-3)
    two = PrototypeHead(6, 2, preset="reference").double().requires_grad_(False)
    for gap in (0.05, 1.0):  # any gap is answered with +-1
        table = torch.zeros(1, 20, dtype=torch.float64)
        table[0, :10] = gap
        assert_close(two.score(table), torch.tensor([[1.0, -1.0]], dtype=torch.float64), rtol=0, atol=0.02)


def test_reference_fixed_changes_two_things_only():
    changed = {name for name in REFERENCE if REFERENCE[name] != REFERENCE_FIXED[name]}
    assert changed == {"projection_norm", "assignment"}


def test_the_presets_name_the_same_arguments():
    assert len({frozenset(preset) for preset in PRESETS.values()}) == 1


def test_the_default_is_sound():
    assert DEFAULT["assignment"] == "argmax"
    assert DEFAULT["projection_norm"] == "channel"
    assert DEFAULT["score_norm"] == "none"
    assert DEFAULT["across_ranks"] == "exact"


def test_the_default_differs_from_the_paper_in_how_prototypes_move_alone():
    assert {name for name in DEFAULT if DEFAULT[name] != PAPER[name]} == {"update_from", "momentum"}
    assert (PAPER["update_from"], PAPER["momentum"]) == ("all", 0.999)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_nothing_but_named_arguments(preset):
    named, by_preset = (build(6, 3, embed_dim=6, **arguments) for arguments in (PRESETS[preset], {"preset": preset}))
    features, labels = batch(6, 3)
    noise = gumbel(features, 10, 0)
    one, two = (head.losses(features, labels, gumbel=noise) for head in (named, by_preset))
    assert torch.equal(one.total, two.total)
    assert torch.equal(one.moving, two.moving)


def test_every_setting_of_a_preset_is_documented():
    doc = inspect.getdoc(PrototypeHead) or ""
    for name in DEFAULT:
        assert name in doc, f"PrototypeHead does not document {name}"


def test_the_reference_projects_to_as_many_channels_as_it_gets():
    assert [w.shape for w, _ in convolutions(PrototypeHead(7, 3, preset="reference"))] == [(7, 7), (7, 7)]


def test_the_reference_starts_from_a_truncated_normal_on_the_sphere():
    p = PrototypeHead(64, 5, preset="reference").prototypes
    assert_close(p.norm(dim=-1), torch.ones(5, 10), rtol=0, atol=1e-5)
    assert abs(mean_pairwise_cosine(p)) < 0.05
