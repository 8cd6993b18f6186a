"""Any timm backbone behind one contract; what cannot work is refused in one line."""

import pytest
import torch

from protoseg.config import UserError
from protoseg.models.backbones import CannotDilate, SegformerPyramid, TimmPyramid, TinyPyramid


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "multiple"),
    [
        ("test_resnet", 32),
        ("test_convnext", 32),
        ("test_vit", 32),  # flat
        ("efficientvit_m0", 32),  # strides 16, 32, 64
        ("swin_tiny_patch4_window7_224", 32),  # NHWC, 224 only unless told otherwise
        ("vit_tiny_patch16_224", 32),
        ("eva02_tiny_patch14_224", 28),
        ("maxvit_pico_rw_256", 256),  # windows of its own size
    ],
)
def test_four_maps_of_the_promised_shape(name, multiple):
    with torch.device("meta"):
        backbone = TimmPyramid(name).eval()
    assert backbone.multiple == multiple
    maps = backbone(torch.zeros(2, 3, 3 * multiple, 2 * multiple, device="meta"))
    assert len(maps) == 4
    for m, channels, stride in zip(maps, backbone.channels, backbone.strides):
        assert m.shape == (2, channels, 3 * multiple / stride, 2 * multiple / stride)


def test_a_stride_2_map_is_added_only_where_there_is_one():
    with torch.device("meta"):
        assert TimmPyramid("test_resnet", finest=2).strides == [2, 4, 8, 16, 32]
        assert TimmPyramid("test_convnext", finest=2).strides == [4, 8, 16, 32]


def test_dilation_keeps_the_last_maps_fine():
    with torch.device("meta"):
        backbone = TimmPyramid("resnet18", output_stride=8).eval()
        maps = backbone(torch.zeros(1, 3, 64, 32))
    assert [m.shape[-2:] for m in maps] == [(16, 8), (8, 4), (8, 4), (8, 4)]


@pytest.mark.parametrize("name", ["hrnet_w18_small", "test_vit", "vgg11", "swin_tiny_patch4_window7_224"])
def test_what_cannot_be_dilated_is_refused(name):
    with pytest.raises(CannotDilate, match=f"{name} cannot be dilated to stride 8"), torch.device("meta"):
        TimmPyramid(name, output_stride=8)


@pytest.mark.parametrize("name", ["levit_128s", "beit_base_patch16_224"])
def test_a_fixed_input_size_is_refused(name):
    with pytest.raises(UserError, match=r"does not take images of any size") as error, torch.device("meta"):
        TimmPyramid(name)
    assert one_line(error)


def test_an_unknown_name_suggests_others():
    with pytest.raises(UserError, match=r"did you mean .*resnet50"):
        TimmPyramid("resnett50")
    with pytest.raises(UserError, match=r"timm.list_models\(\) lists them"):
        TimmPyramid("?")
    with pytest.raises(UserError, match=r"no backbone"):
        TimmPyramid("hf-hub:someone/something")


def test_pixel_statistics_are_those_of_the_weights():
    with torch.device("meta"):
        assert TimmPyramid("vit_tiny_patch16_224").mean == (0.5, 0.5, 0.5)
        assert TimmPyramid("resnet18").mean == (0.485, 0.456, 0.406)


def test_own_backbones_keep_the_contract():
    segformer = SegformerPyramid((8, 16, 16, 16), (1, 1, 1, 1), (1, 1, 2, 2))
    for backbone in (segformer, TinyPyramid((8, 8, 16, 16))):
        maps = backbone.eval()(torch.zeros(1, 3, 64, 32))
        assert [m.shape for m in maps] == [(1, c, 64 // s, 32 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32))]
