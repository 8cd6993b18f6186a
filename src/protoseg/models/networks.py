"""The named networks: a function from settings to (backbone, decoder).

Keyword arguments below the settings change the size; tests build the same networks small with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from protoseg.config import Model, UserError
from protoseg.models.backbones import CannotDilate, SegformerPyramid, TimmPyramid, TinyPyramid, refused
from protoseg.models.decoders import NEEDS, build_decoder

Network = tuple[nn.Module, nn.Module]


def fcn_resnet101(model: Model, *, name: str = "resnet101c", width: int = 512, **options: Any) -> Network:
    """FCN on ResNet-101, dilated to stride 8 (Long et al. 2015; the 3x3 stem `c` is the one the paper's framework has).

    512 channels at stride 8.
    """
    backbone = _timm(model, name, output_stride=8, options=options)
    return backbone, _decoder("fcn", backbone, model, width)


def hrnetv2_w48(model: Model, *, name: str = "hrnet_w48", width: int | None = None) -> Network:
    """HRNetV2-W48 (Wang et al. 2020): its four branches concatenated, 720 channels at stride 4."""
    backbone = _timm(model, name)
    return backbone, _decoder("concat", backbone, model, width)


def upernet_swin_base(
    model: Model, *, name: str = "swin_base_patch4_window7_224.ms_in1k", width: int = 512, **options: Any
) -> Network:
    """UPerNet on Swin-B, pretrained on ImageNet-1k at 224 (Liu et al. 2021): 512 channels at stride 4."""
    backbone = _timm(model, name, drop_path=0.3 if model.drop_path is None else model.drop_path, options=options)
    return backbone, _decoder("upernet", backbone, model, width)


def segformer_mit_b4(
    model: Model,
    *,
    widths: Sequence[int] = (64, 128, 320, 512),
    depths: Sequence[int] = (3, 8, 27, 3),
    heads: Sequence[int] = (1, 2, 5, 8),
    width: int = 768,
) -> Network:
    """SegFormer on MiT-B4 (Xie et al. 2021): 768 channels at stride 4."""
    backbone = SegformerPyramid(
        widths, depths, heads, pretrained=model.pretrained, weights=model.weights, drop_path=model.drop_path
    )
    return backbone, _decoder("segformer", backbone, model, width)


def mobilenetv2_light(model: Model, *, name: str = "mobilenetv2_100", width: int = 128) -> Network:
    """MobileNetV2 with the light feature pyramid, for two CPU cores: 128 channels at stride 4."""
    backbone = _timm(model, name)
    return backbone, _decoder("light", backbone, model, width)


def tiny(model: Model, *, width: int = 96, **size: Any) -> Network:
    """About a million parameters, to be trained from scratch: 96 channels at stride 4."""
    if model.pretrained and not model.weights:
        raise UserError("the network tiny has no pretrained weights; set model.pretrained=false")
    backbone = TinyPyramid(weights=model.weights, **size)
    return backbone, _decoder("light", backbone, model, width)


def any_timm(model: Model) -> Network:
    """`model.backbone` of timm with `model.decoder`; a pair that cannot work is refused before anything is loaded.

    Raises:
        UserError: no backbone named, or a pair that does not fit together.
    """
    if not model.backbone:
        raise UserError(
            'model.network "timm" needs model.backbone, for example resnet50, convnext_tiny, vit_small_patch16_224'
        )
    if model.decoder not in NEEDS:
        raise UserError(f"model.decoder {model.decoder!r} is unknown; choose one of {', '.join(NEEDS)}")
    needs = NEEDS[model.decoder]
    for stride in needs.last:
        try:
            with torch.device("meta"):
                trial = TimmPyramid(model.backbone, finest=needs.finest, output_stride=stride)
        except CannotDilate:
            continue
        with _pair(model), torch.device("meta"):
            decoder = build_decoder(model.decoder, trial.channels, trial.strides, model.decoder_channels).eval()
            size = 8 * trial.multiple
            features = decoder(trial.eval()(torch.zeros(1, 3, size, size, device="meta")))
            assert features.shape[1] == decoder.out_channels, f"{features.shape[1]} channels come out"
        backbone = _timm(model, model.backbone, finest=needs.finest, output_stride=stride)
        return backbone, _decoder(model.decoder, backbone, model, None)
    raise UserError(
        f"decoder {model.decoder} needs a backbone dilated to stride {' or '.join(map(str, needs.last))}, which "
        f"{model.backbone} cannot be; choose another model.backbone, or model.decoder=light, fpn or upernet"
    )


def _timm(
    model: Model,
    name: str,
    *,
    finest: int = 4,
    output_stride: int = 32,
    drop_path: float | None = None,
    options: dict[str, Any] | None = None,
) -> TimmPyramid:
    return TimmPyramid(
        name,
        pretrained=model.pretrained,
        weights=model.weights,
        finest=finest,
        output_stride=output_stride,
        drop_path=model.drop_path if drop_path is None else drop_path,
        options=options,
    )


def _pair(model: Model) -> Any:
    instead = "choose another model.decoder"
    return refused(f"decoder {model.decoder} does not fit backbone {model.backbone or model.network}", instead)


def _decoder(name: str, backbone: Any, model: Model, width: int | None) -> nn.Module:
    with refused(f"decoder {name} cannot be built for {model.network}", "choose other model settings"):
        return build_decoder(name, backbone.channels, backbone.strides, model.decoder_channels or width)


NETWORKS: dict[str, Callable[[Model], Network]] = {
    "fcn_resnet101": fcn_resnet101,
    "hrnetv2_w48": hrnetv2_w48,
    "upernet_swin_base": upernet_swin_base,
    "segformer_mit_b4": segformer_mit_b4,
    "mobilenetv2_light": mobilenetv2_light,
    "tiny": tiny,
    "timm": any_timm,
}
