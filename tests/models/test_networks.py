"""The named networks: what the paper counted, and one training step of each at small size."""

from typing import get_args

import pytest
import torch

from protoseg import config
from protoseg.config import Head, Model, UserError
from protoseg.models import HEADS, NETWORKS, assemble, build, count_parameters, networks

SMALL = {
    "fcn_resnet101": lambda m: networks.fcn_resnet101(
        m, width=16, layers=[1, 1, 1, 1], channels=[4, 8, 8, 16], stem_width=4
    ),
    "hrnetv2_w48": lambda m: networks.hrnetv2_w48(m, name="hrnet_w18_small", width=16),
    "upernet_swin_base": lambda m: networks.upernet_swin_base(
        m, width=16, embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4)
    ),
    "segformer_mit_b4": lambda m: networks.segformer_mit_b4(
        m, widths=(8, 16, 16, 16), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), width=16
    ),
    "mobilenetv2_light": lambda m: networks.mobilenetv2_light(m, name="mobilenetv2_035", width=16),
    # With fewer than 8 channels oneDNN writes past the end of a strided 1x1 convolution's gradient (AVX2, torch 2.14).
    "tiny": lambda m: networks.tiny(m, width=16, widths=(16, 16, 16, 16), depths=(1, 1, 1, 1)),
    "timm": lambda m: networks.any_timm(
        Model(network="timm", backbone="test_resnet", decoder="fpn", decoder_channels=32)
    ),
}


def test_names_are_those_of_the_settings():
    assert list(NETWORKS) == list(get_args(config.NetworkName))
    assert list(HEADS) == list(get_args(config.HeadName))
    assert set(SMALL) == set(NETWORKS)


@pytest.mark.parametrize(
    ("name", "channels", "auxiliary", "millions"),
    [
        ("fcn_resnet101", 512, 0.4, 68.6),  # millions: the paper's and its framework's, 150 classes, linear classifier
        ("hrnetv2_w48", 720, 0.0, 65.9),
        ("upernet_swin_base", 512, 0.4, 121.4),
        ("segformer_mit_b4", 768, 0.0, 64.1),
        ("mobilenetv2_light", 128, 0.0, 2.0),
        ("tiny", 96, 0.0, 0.93),
    ],
)
def test_full_size_has_the_published_size(name, channels, auxiliary, millions):
    with torch.device("meta"):
        segmenter = build(Model(network=name, auxiliary_weight=auxiliary), Head(kind="softmax"), 150)
    assert segmenter.decoder.out_channels == channels
    assert count_parameters(segmenter)["learnable"] / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", SMALL)
def test_one_training_step_reaches_every_parameter_and_moves_the_prototypes(name):
    torch.manual_seed(0)
    model = Model(network=name, auxiliary_weight=0.4, drop_path=None)
    segmenter = assemble(*SMALL[name](model), model, Head(num_prototypes=3, embed_dim=8), 4).train()
    images, labels = torch.rand(2, 3, 50, 70), torch.randint(0, 4, (2, 50, 70))
    before = segmenter.head.prototypes.clone()
    losses = segmenter.losses(images, labels)
    losses.total.backward()
    untouched = [key for key, p in segmenter.named_parameters() if p.requires_grad and p.grad is None]
    assert untouched == []  # so data-parallel training needs no find_unused_parameters
    assert torch.equal(segmenter.head.prototypes, before)
    segmenter.update(losses)
    assert not torch.equal(segmenter.head.prototypes, before)
    segmenter.eval()
    with torch.no_grad():
        for size in [(1, 1), (33, 47)]:
            scores = segmenter(torch.rand(1, 3, *size))
            assert scores.shape == (1, 4, *size)
            assert scores.isfinite().all()


def test_tiny_has_nothing_to_download():
    with pytest.raises(UserError, match=r"tiny has no pretrained weights"):
        build(Model(network="tiny", pretrained=True), Head(), 3)


def test_count_separates_what_learns_from_what_is_stored():
    segmenter = build(Model(network="tiny", auxiliary_weight=0.4), Head(num_prototypes=5, embed_dim=32), 7)
    count = count_parameters(segmenter)
    assert count["prototypes"] == 7 * 5 * 32
    assert count["learnable"] == sum(count[part] for part in ("backbone", "decoder", "head", "auxiliary"))
    assert count["head"] == (96 * 96 + 96) + (96 * 32 + 32) + 1  # nothing that grows with the classes
    for p in segmenter.backbone.parameters():
        p.requires_grad_(False)
    frozen = count_parameters(segmenter)
    assert (frozen["frozen"], frozen["backbone"]) == (count["backbone"], 0)
