"""What the looks say must be what the head scores."""

import math

import pytest
import torch
from torch.testing import assert_close

from protoseg.config import Head, Model
from protoseg.engine.looks import (
    chosen_prototypes,
    count_looks,
    find_looks,
    own_prototypes,
    purity,
    similarities,
)
from protoseg.models import build


def model(num_classes=3, num_prototypes=4):
    torch.manual_seed(0)
    return build(Model(network="tiny"), Head(num_prototypes=num_prototypes, embed_dim=8), num_classes).eval()


def picture(seed=0, size=(30, 45)):
    return torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_similarities_are_cosines_of_the_head_at_image_size():
    segmenter, image = model(), picture()
    table = similarities(segmenter, image)
    assert table.shape == (3, 4, 30, 45)
    assert table.abs().max() <= 1 + 1e-5
    # a class scores as its best prototype, up to the scale; enlarging before or after the maximum differs a little
    small = torch.nn.functional.interpolate(
        segmenter.head(segmenter.features(image[None])), (32, 64), mode="bilinear", align_corners=False
    )[0, :, :30, :45]
    best = table.amax(1) * segmenter.head.log_scale.exp()
    assert (best.argmax(0) == small.argmax(0)).float().mean() > 0.9


def test_the_chosen_prototype_belongs_to_the_winning_class():
    table = similarities(model(), picture())
    chosen = chosen_prototypes(table)
    assert torch.equal(chosen // 4, table.amax(1).argmax(0))


def test_typical_places_are_the_most_similar_ones_inside_the_margin():
    segmenter = model()
    images = [picture(seed) for seed in range(3)]
    looks = find_looks(segmenter, images, count=2, margin=5)
    sums = looks.share[~looks.share.isnan().any(1)].sum(1)
    assert_close(sums, torch.ones_like(sums))
    tables = [similarities(segmenter, image) for image in images]
    seen = 0
    for c, prototypes in enumerate(looks.places):
        for k, places in enumerate(prototypes):
            assert len(places) <= 2
            assert [p.cosine for p in places] == sorted((p.cosine for p in places), reverse=True)
            assert len({p.image for p in places}) == len(places)
            for place in places:
                seen += 1
                assert 5 <= place.row < 25
                assert 5 <= place.column < 40
                table = tables[place.image]
                assert chosen_prototypes(table)[place.row, place.column] == 4 * c + k
                own = (chosen_prototypes(table) == 4 * c + k)[5:25, 5:40]
                assert place.cosine == table[c, k, 5:25, 5:40][own].max()
    assert seen


def test_a_pixels_own_prototype_is_of_its_true_class_whatever_wins():
    table = similarities(model(), picture())
    labels = torch.randint(0, 3, (30, 45), generator=torch.Generator().manual_seed(1))
    labels[0], labels[1] = 255, -1
    own = own_prototypes(table, labels)
    for row in range(30):
        for column in range(0, 45, 7):
            c = int(labels[row, column])
            expected = table[c, :, row, column].argmax() if 0 <= c < 3 else -1
            assert own[row, column] == expected


def test_own_prototypes_go_to_the_size_of_the_labels():
    table = similarities(model(), picture())
    labels = torch.zeros(60, 90, dtype=torch.int64)
    large = torch.nn.functional.interpolate(table[:1].flatten(0, 1)[None], (60, 90), mode="bilinear")[0]
    assert torch.equal(own_prototypes(table, labels), large.argmax(0))


def test_looks_are_counted_where_all_is_known():
    chosen = torch.tensor([[0, 1, 1], [1, -1, 0]])
    labels = torch.tensor([[0, 1, 1], [255, 0, 1]])
    looks = torch.tensor([[2, 0, 0], [0, 0, 255]])
    counts = count_looks(chosen, labels, looks, (2, 2, 3))
    expected = torch.zeros(2, 2, 3, dtype=torch.float64)
    expected[0, 0, 2], expected[1, 1, 0] = 1, 2
    assert torch.equal(counts, expected)


@pytest.mark.parametrize(
    ("part", "found", "chance"),
    [
        ([[9, 0, 0], [0, 1, 0], [0, 0, 5]], 1.0, 1 / 3),  # each look a prototype of its own
        ([[90, 0], [0, 1], [10, 0]], 1.0, 1 / 2),  # several prototypes a look are as pure
        ([[90, 3], [30, 1]], 1 / 2, 1 / 2),  # prototypes that do not look: each look in the same shares
        ([[99, 50], [1, 50]], 0.745, 1 / 2),  # (0.99 + 0.50) / 2, whatever the 100 pixels of each are worth
        ([[990, 5], [10, 5]], 0.745, 1 / 2),  # the same with a rare look
        ([[4, 0, 0], [0, 4, 0]], 1.0, 1 / 2),  # a look that never occurs is none
        ([[5, 0], [7, 0]], 1.0, 1.0),
    ],
)
def test_purity_by_hand(part, found, chance):
    assert purity(torch.tensor(part)) == pytest.approx((found, chance))


def test_a_class_without_a_pixel_has_no_purity():
    assert all(math.isnan(number) for number in purity(torch.zeros(3, 2)))
