"""Every decoder by name on a small backbone; pairs that cannot work are refused before anything is built."""

from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from protoseg import config
from protoseg.config import Head, Model, UserError
from protoseg.models import assemble, build, networks
from protoseg.models.decoders import NEEDS, build_decoder


def test_names_are_those_of_the_settings():
    assert set(NEEDS) == set(get_args(config.DecoderName))


@pytest.mark.parametrize("name", NEEDS)
def test_each_decoder_trains_and_segments_any_size(name):
    torch.manual_seed(0)
    width = None if name == "stack" else 32
    model = Model(network="timm", backbone="test_resnet", decoder=name, decoder_channels=width)
    backbone, decoder = networks.any_timm(model)
    assert decoder.out_channels == (width or sum(backbone.channels))
    segmenter = assemble(backbone, decoder, model, Head(num_prototypes=2, embed_dim=8), 3)
    losses = segmenter.losses(torch.rand(2, 3, 65, 40), torch.randint(0, 3, (2, 65, 40)))
    losses.total.backward()
    assert [key for key, p in segmenter.named_parameters() if p.requires_grad and p.grad is None] == []
    with torch.no_grad():
        for size in [(1, 1), (1, 40), (65, 31)]:
            assert segmenter.eval()(torch.rand(1, 3, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("name", NEEDS)
def test_the_width_may_be_left_to_the_decoder(name):
    strides = [min(s, NEEDS[name].last[0]) for s in (2, 4, 8, 16, 32) if s >= NEEDS[name].finest]
    with torch.device("meta"):
        decoder = build_decoder(name, [8] * len(strides), strides).eval()
        maps = [torch.zeros(2, 8, 256 // s, 256 // s) for s in strides]
        assert decoder(maps).shape[:2] == (2, decoder.out_channels)


@pytest.mark.parametrize(
    ("backbone", "decoder", "message"),
    [
        (
            "hrnet_w18_small",
            "deeplabv3plus",
            "deeplabv3plus needs a backbone dilated to stride 16, which hrnet_w18_small",
        ),
        ("test_vit", "fcn", "fcn needs a backbone dilated to stride 8, which test_vit cannot be"),
        ("levit_128s", "light", "levit_128s does not take images of any size"),
        ("", "light", "needs model.backbone"),
    ],
)
def test_impossible_pairs_are_refused(backbone, decoder, message):
    with pytest.raises(UserError, match=message) as error:
        build(Model(network="timm", backbone=backbone, decoder=decoder), Head(), 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("named", [{"backbone": "resnet50"}, {"decoder": "fpn"}])
def test_a_backbone_or_decoder_that_the_network_would_not_take_is_refused(named):
    with pytest.raises(UserError, match=r"choose model\.network timm"):
        build(Model(network="tiny", **named), Head(), 3)


def test_a_width_the_decoder_cannot_have_is_refused():
    with pytest.raises(UserError, match=r"fpn does not fit"):  # group norm of 32 groups
        build(Model(network="timm", backbone="test_resnet", decoder="fpn", decoder_channels=33), Head(), 3)


def test_pan_falls_back_to_an_undilated_backbone():
    with torch.device("meta"):
        backbone, _ = networks.any_timm(Model(network="timm", backbone="test_vit", decoder="pan"))
    assert backbone.strides == [4, 8, 16, 32]


def test_light_decoder_takes_a_batch_of_one_in_training():
    decoder = build_decoder("light", [4, 4, 8], [4, 8, 16], 8)
    assert decoder([torch.rand(1, 4, 8, 8), torch.rand(1, 4, 4, 4), torch.rand(1, 8, 2, 2)]).shape == (1, 8, 8, 8)


def test_concat_is_the_plain_concatenation():
    decoder = build_decoder("concat", [3, 5], [4, 8]).eval()
    maps = [torch.rand(1, 3, 4, 6), torch.rand(1, 5, 2, 3)]
    up = torch.nn.functional.interpolate(maps[1], scale_factor=2, mode="bilinear")
    assert_close(decoder(maps), decoder.mix(torch.cat([maps[0], up], 1)))


def test_stack_learns_nothing_and_gives_each_channel_as_much_to_say():
    decoder = build_decoder("stack", [3, 5], [4, 8])
    assert list(decoder.parameters()) == []
    maps = [torch.rand(2, 3, 4, 6), 100 + 9 * torch.rand(2, 5, 2, 3)]
    stacked = decoder(maps)
    fine, coarse = (
        (m - m.mean((0, 2, 3), keepdim=True)) / m.std((0, 2, 3), unbiased=False, keepdim=True) for m in maps
    )
    up = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")
    assert_close(stacked, torch.cat([fine, up], 1), atol=1e-3, rtol=0)
    with pytest.raises(UserError, match=r"leave model\.decoder_channels out"):
        build(Model(network="timm", backbone="test_resnet", decoder="stack", decoder_channels=7), Head(), 3)
