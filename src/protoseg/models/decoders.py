"""Decoders: a pyramid of maps in, one map of features for the head out.

The contract: built from the backbone's `channels` and `strides`, `forward(maps) -> (B, out_channels, h, w)`; where
`least_cells` is there, the last map must be at least so many cells high and wide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from protoseg.method.resizing import bilinear
from protoseg.models.blocks import ConvNormAct, SeparableConv, start_for_relu


def resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` bilinearly at the height and width of `like`."""
    return bilinear(x, (like.shape[-2], like.shape[-1]))


class LightDecoder(nn.Module):
    """A feature pyramid (Lin et al. 2017) of separable convolutions: much accuracy per second on a CPU.

    The coarsest map is pooled over 1, 2 and 4 cells a side for context (Zhao et al. 2017; no batch norm on the pooled
    cells, which a batch of one image could not feed), then goes up, meeting each finer map through a 1x1 convolution.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[float], width: int | None = None):
        super().__init__()
        width = width or 128
        self.laterals = nn.ModuleList(ConvNormAct(c, width, 1) for c in channels)
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), nn.Conv2d(width, width // 4, 1), nn.ReLU(inplace=True))
            for cells in (1, 2, 4)
        )
        self.context = ConvNormAct(width + 3 * (width // 4), width, 1)
        self.blends = nn.ModuleList(SeparableConv(width, width) for _ in channels)
        self.dropout = nn.Dropout2d(0.1)
        self.out_channels = width
        start_for_relu(self)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """maps finest first -> (B, width, h, w) at the finest map's size."""
        laterals = [lateral(m) for lateral, m in zip(self.laterals, maps)]
        top = laterals[-1]
        pooled = [resized(pool(top), top) for pool in self.pools]
        x = self.blends[-1](self.context(torch.cat([top, *pooled], 1)))
        for lateral, blend in zip(laterals[-2::-1], list(self.blends)[-2::-1]):
            x = blend(resized(x, lateral) + lateral)
        return self.dropout(x)


class FCNDecoder(nn.Module):
    """FCN as the paper's framework has it: two 3x3 convolutions on the last map, their result fused with it again."""

    def __init__(self, channels: Sequence[int], strides: Sequence[float], width: int | None = None):
        super().__init__()
        width = width or 512
        self.convs = nn.Sequential(ConvNormAct(channels[-1], width), ConvNormAct(width, width))
        self.fuse = ConvNormAct(channels[-1] + width, width)
        self.dropout = nn.Dropout2d(0.1)
        self.out_channels = width
        start_for_relu(self)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """maps -> (B, width, h, w) at the last map's size."""
        return self.dropout(self.fuse(torch.cat([maps[-1], self.convs(maps[-1])], 1)))


class ConcatDecoder(nn.Module):
    """HRNetV2 (Wang et al. 2020): all maps at the finest size, concatenated, mixed by a 1x1 convolution."""

    def __init__(self, channels: Sequence[int], strides: Sequence[float], width: int | None = None):
        super().__init__()
        width = width or sum(channels)
        self.mix = ConvNormAct(sum(channels), width, 1)
        self.dropout = nn.Dropout2d(0.1)
        self.out_channels = width
        start_for_relu(self)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """maps -> (B, width, h, w) at the finest map's size."""
        return self.dropout(self.mix(torch.cat([resized(m, maps[0]) for m in maps], 1)))


class StackDecoder(nn.Module):
    """All maps at the finest size, side by side, each channel at mean 0 and variance 1. Learns nothing.

    On a backbone that is frozen (`model.freeze_backbone`) the head alone learns: what its features hold, and no more.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[float], width: int | None = None):
        super().__init__()
        self.out_channels = sum(channels)
        if width not in (None, self.out_channels):
            raise ValueError(
                f"it has the {self.out_channels} channels of the backbone; leave model.decoder_channels out"
            )
        self.norms = nn.ModuleList(nn.BatchNorm2d(c, affine=False) for c in channels)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """maps -> (B, sum of channels, h, w) at the finest map's size."""
        return torch.cat([resized(norm(m), maps[0]) for norm, m in zip(self.norms, maps)], 1)


class SegformerDecoder(nn.Module):
    """SegFormer's all-MLP decoder (Xie et al. 2021), transformers' code without its classifier."""

    def __init__(self, channels: Sequence[int], strides: Sequence[float], width: int | None = None):
        super().__init__()
        from transformers import SegformerConfig
        from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

        width = width or 768
        settings = SegformerConfig(
            hidden_sizes=list(channels), num_encoder_blocks=len(channels), decoder_hidden_size=width
        )
        self.body = SegformerDecodeHead(settings)
        self.body.classifier = nn.Identity()
        self.out_channels = width

    def forward(self, maps: list[Tensor]) -> Tensor:
        """maps -> (B, width, h, w) at the finest map's size."""
        return self.body(maps)


class SmpDecoder(nn.Module):
    """A decoder of segmentation_models_pytorch, without that library's encoders, heads or model class.

    Its decoders count maps from stride 1: the image itself and, where the backbone has none, an empty stride-2 map
    are put in front.
    """

    def __init__(self, name: str, channels: Sequence[int], strides: Sequence[float], width: int | None = None):
        super().__init__()
        from segmentation_models_pytorch.base.initialization import initialize_decoder

        self.missing = int(strides[0] != 2)
        # PAN halves the last map three times; FPN's group norm of one channel a group refuses a single cell.
        self.least_cells = {"pan": 8, "fpn": 2}.get(name, 1)
        encoder = [3, *[0] * self.missing, *channels]
        self.body, self.out_channels = _SMP[name](encoder, list(strides), width)
        initialize_decoder(self.body)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """maps -> (B, out_channels, h, w)."""
        B, _, h, w = maps[0].shape
        steps = (4, 2) if self.missing else (2,)
        return self.body([*(maps[0].new_empty((B, 0, h * s, w * s)) for s in steps), *maps])


class SmpDPT(nn.Module):
    """smp's DPT decoder (Ranftl et al. 2021) on a resized pyramid; class tokens are left out."""

    def __init__(self, channels: Sequence[int], strides: Sequence[float], width: int | None = None):
        super().__init__()
        from segmentation_models_pytorch.base.initialization import initialize_decoder
        from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder

        width = width or 256
        middle = [min(4 * width, width * 2**i) for i in range(len(channels))]
        self.body = DPTDecoder(channels, STEPS[: len(channels)], False, "ignore", middle, width)
        initialize_decoder(self.body)
        self.out_channels = width

    def forward(self, maps: list[Tensor]) -> Tensor:
        """maps -> (B, width, h, w) at twice the finest map's size."""
        return self.body(maps, [None] * len(maps))


STEPS = (4, 8, 16, 32)  # what DPT's resampling starts from; ours is resized already
Smp = Callable[[list[int], list[float], int | None], tuple[nn.Module, int]]


def _unet_widths(width: int | None) -> list[int]:
    return [(width or 16) * 2**i for i in (4, 3, 2, 1, 0)]


def _unet(encoder: list[int], strides: list[float], width: int | None) -> tuple[nn.Module, int]:
    from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder

    return UnetDecoder(encoder, _unet_widths(width)), width or 16


def _unetplusplus(encoder: list[int], strides: list[float], width: int | None) -> tuple[nn.Module, int]:
    from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder

    return UnetPlusPlusDecoder(encoder, _unet_widths(width)), width or 16


def _manet(encoder: list[int], strides: list[float], width: int | None) -> tuple[nn.Module, int]:
    from segmentation_models_pytorch.decoders.manet.decoder import MAnetDecoder

    return MAnetDecoder(encoder, _unet_widths(width)), width or 16


def _linknet(encoder: list[int], strides: list[float], width: int | None) -> tuple[nn.Module, int]:
    from segmentation_models_pytorch.decoders.linknet.decoder import LinknetDecoder

    return LinknetDecoder(encoder, prefinal_channels=width or 32), width or 32


def _fpn(encoder: list[int], strides: list[float], width: int | None) -> tuple[nn.Module, int]:
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder

    return FPNDecoder(encoder, segmentation_channels=width or 128), width or 128


def _upernet(encoder: list[int], strides: list[float], width: int | None) -> tuple[nn.Module, int]:
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    return UPerNetDecoder(encoder, decoder_channels=width or 256), width or 256


def _pan(encoder: list[int], strides: list[float], width: int | None) -> tuple[nn.Module, int]:
    from segmentation_models_pytorch.decoders.pan.decoder import PANDecoder

    return PANDecoder(encoder, encoder_depth=5, decoder_channels=width or 32), width or 32


def _pspnet(encoder: list[int], strides: list[float], width: int | None) -> tuple[nn.Module, int]:
    from segmentation_models_pytorch.decoders.pspnet.decoder import PSPDecoder

    return PSPDecoder(encoder, out_channels=width or 512), width or 512


def _deeplabv3(encoder: list[int], strides: list[float], width: int | None) -> tuple[nn.Module, int]:
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3Decoder

    return DeepLabV3Decoder(encoder[-1], width or 256, (12, 24, 36), False, 0.5), width or 256


def _deeplabv3plus(encoder: list[int], strides: list[float], width: int | None) -> tuple[nn.Module, int]:
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder

    body = DeepLabV3PlusDecoder(encoder, 5, width or 256, (12, 24, 36), 16, True, 0.5)
    return body, width or 256


_SMP: dict[str, Smp] = {
    "fpn": _fpn,
    "upernet": _upernet,
    "unet": _unet,
    "unetplusplus": _unetplusplus,
    "manet": _manet,
    "linknet": _linknet,
    "deeplabv3": _deeplabv3,
    "deeplabv3plus": _deeplabv3plus,
    "pan": _pan,
    "pspnet": _pspnet,
}


@dataclass(frozen=True)
class Needs:
    """What a decoder asks of its backbone: the finest map's stride, and the strides its last map may have."""

    finest: int = 4
    last: tuple[int, ...] = (32,)


OWN: dict[str, Callable[..., nn.Module]] = {
    "light": LightDecoder,
    "fcn": FCNDecoder,
    "concat": ConcatDecoder,
    "stack": StackDecoder,
    "segformer": SegformerDecoder,
    "dpt": SmpDPT,
}
# The first stride that the backbone can do is taken.
NEEDS: dict[str, Needs] = {
    "light": Needs(),
    "fcn": Needs(last=(8,)),
    "concat": Needs(),
    "stack": Needs(),
    "segformer": Needs(),
    "dpt": Needs(),
    "fpn": Needs(),
    "upernet": Needs(),
    "unet": Needs(finest=2),
    "unetplusplus": Needs(finest=2),
    "manet": Needs(finest=2),
    "linknet": Needs(finest=2),
    "deeplabv3": Needs(last=(8, 16)),
    "deeplabv3plus": Needs(last=(16,)),
    "pan": Needs(last=(16, 32)),
    "pspnet": Needs(last=(8, 16)),
}


def build_decoder(name: str, channels: Sequence[int], strides: Sequence[float], width: int | None = None) -> nn.Module:
    """A decoder by name; see the table `NEEDS` for the names."""
    if name in OWN:
        return OWN[name](channels, strides, width)
    return SmpDecoder(name, channels, strides, width)
