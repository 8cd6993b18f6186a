"""The three convolution blocks that our own backbones and decoders are made of."""

from __future__ import annotations

from torch import Tensor, nn


class ConvNormAct(nn.Sequential):
    """Convolution without bias, batch norm, ReLU (or none). (B, in, h, w) -> (B, out, h / stride, w / stride)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
    ):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True) if act else nn.Identity(),
        )


class SeparableConv(nn.Sequential):
    """Depthwise k x k, then 1x1: about k*k times fewer multiplications than the full convolution."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3):
        super().__init__(
            ConvNormAct(in_channels, in_channels, kernel, groups=in_channels, act=False),
            ConvNormAct(in_channels, out_channels, 1),
        )


class InvertedResidual(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018): widen by 1x1, depthwise k x k, narrow by 1x1; added where it fits."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, expand: int = 3, kernel: int = 5):
        super().__init__()
        wide = in_channels * expand
        self.body = nn.Sequential(
            ConvNormAct(in_channels, wide, 1),
            ConvNormAct(wide, wide, kernel, stride=stride, groups=wide),
            ConvNormAct(wide, out_channels, 1, act=False),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class BasicResidual(nn.Module):
    """ResNet's block of two 3x3 convolutions (He et al. 2016): on a CPU faster per weight than a depthwise one."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            ConvNormAct(in_channels, out_channels, stride=stride),
            ConvNormAct(out_channels, out_channels, act=False),
        )
        fits = stride == 1 and in_channels == out_channels
        self.skip = nn.Identity() if fits else ConvNormAct(in_channels, out_channels, 1, stride=stride, act=False)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.skip(x) + self.body(x))


def start_for_relu(module: nn.Module) -> None:
    """He's start (2015) for every convolution of our own modules; torch's default is meant for no activation at all."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif (isinstance(part, InvertedResidual) and part.residual) or isinstance(part, BasicResidual):
            nn.init.zeros_(part.body[-1][1].weight)  # type: ignore[index]  # a block starts as the identity
