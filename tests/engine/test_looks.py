"""What the looks say must be what the head scores."""

import torch
from torch.testing import assert_close

from protoseg.config import Head, Model
from protoseg.engine.looks import chosen_prototypes, find_looks, similarities
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
