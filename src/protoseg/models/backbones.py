"""Backbones: an image in, a list of feature maps out, finest first.

The contract: `channels` and `strides` of the maps, `multiple` that the image's height and width must be divisible by
(the segmenter pads), `mean` and `std` of the pixels the weights were trained with.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from protoseg.config import UserError
from protoseg.method.resizing import bilinear
from protoseg.models.blocks import BasicResidual, ConvNormAct, InvertedResidual, start_for_relu
from protoseg.models.weights import fetch, from_hub, load_backbone_weights, load_segformer_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
STRIDES = (4, 8, 16, 32)
# What libraries raise for a name, a size or a combination they cannot do.
LIBRARY_FAULTS = (AssertionError, AttributeError, IndexError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def refused(what: str, instead: str) -> Iterator[None]:
    """Turn a library's complaint about what the user chose into one line."""
    try:
        yield
    except UserError:
        raise
    except LIBRARY_FAULTS as fault:
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        raise UserError(f"{what}: {reason}; {instead}") from fault


class CannotDilate(UserError):
    """The backbone's last stages cannot keep a finer stride."""


class TimmPyramid(nn.Module):
    """Any timm backbone as a pyramid of feature maps at strides 4, 8, 16, 32 (and 2, if asked for and present).

    A flat transformer with patch p gives four maps of evenly spaced blocks, resized to strides p/4, p/2, p, 2p.
    Maps of odd strides are resized to the nearest of ours. Everything is tried on torch's meta device first, so that
    what cannot work is refused before a download.

    Args:
        name: timm model name.
        pretrained: load timm's weights of that name from the hub.
        weights: a local safetensors file instead; wins over `pretrained`.
        finest: 2 adds the stride-2 map of backbones that have one.
        output_stride: 8 or 16 dilates the last stages instead of striding.
        drop_path: stochastic depth rate; `None` keeps the model's own.
        options: further arguments of the timm model.

    Raises:
        UserError: an unknown name, a backbone with a fixed input size, one that cannot be dilated, weights that do
            not fit, a hub that cannot be reached.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        weights: str = "",
        finest: int = 4,
        output_stride: int = 32,
        drop_path: float | None = None,
        options: dict[str, Any] | None = None,
    ):
        super().__init__()
        import timm  # here: it takes seconds

        if not timm.is_model(name):
            close = ", ".join(difflib.get_close_matches(name, timm.list_models(), 3))
            hint = f"did you mean {close}" if close else "timm.list_models() lists them"
            raise UserError(f"timm has no backbone {name!r}; {hint}")
        options = dict(options or {})
        if drop_path is not None:
            options["drop_path_rate"] = drop_path
        another = "choose another model.backbone"
        with refused(f"backbone {name}", another), torch.device("meta"):
            plain = timm.create_model(name, **options)
        accepted = inspect.signature(type(plain).__init__).parameters
        if "strict_img_size" in accepted:  # Swin otherwise takes 224x224 only
            options["strict_img_size"] = False
        elif "dynamic_img_size" in accepted:  # ViT likewise
            options["dynamic_img_size"] = True
        if name.startswith("hrnet"):  # the four branches themselves, not the widened ones of the classifier
            options |= {"feature_location": "", "out_indices": (1, 2, 3, 4)}
        with refused(f"backbone {name} gives no feature maps", another), torch.device("meta"):
            layout = timm.create_model(name, features_only=True, **options).feature_info
        reduction, index = layout.reduction(), list(layout.out_indices)
        flat = len(reduction) > 1 and len(set(reduction)) == 1
        self.strides: list[float]
        if flat:
            blocks, patch = len(getattr(plain, "blocks", index)), reduction[0]
            chosen = [max(blocks * (i + 1) // 4 - 1, 0) for i in range(4)]
            self.strides = [patch / 4, patch / 2, patch, patch * 2]
        else:
            wanted = (2, *STRIDES) if finest == 2 and 2 in reduction else STRIDES
            chosen = [index[max((i for i, r in enumerate(reduction) if r <= s), default=0)] for s in wanted]
            self.strides = [min(s, output_stride) for s in wanted]
        options["out_indices"] = tuple(sorted(set(chosen)))
        self._order = [options["out_indices"].index(i) for i in chosen]
        trial: Any
        if output_stride != 32:
            trial = self._dilated(name, output_stride, options, flat)
        else:
            with refused(f"backbone {name}", another), torch.device("meta"):
                trial = timm.create_model(name, features_only=True, **options)
        self._channels_last = str(getattr(trial, "output_fmt", "NCHW")).endswith("NHWC")
        given = trial.feature_info.channels()
        self.channels = [given[i] for i in self._order]
        settings = plain.pretrained_cfg
        self.multiple = self._find_multiple(
            trial.eval(), name, 2 * reduction[0] if flat else 32, settings["input_size"]
        )
        std = settings.get("std") or IMAGENET_STD
        self.mean = tuple(settings["mean"]) if any(std) else IMAGENET_MEAN
        self.std = tuple(std) if any(std) else IMAGENET_STD

        if pretrained and not weights:
            if settings.get(
                "hf_hub_id"
            ):  # fetched here: an unreachable hub is told at once, and from the cache none is asked
                file = settings.get("hf_hub_filename") or "model.safetensors"
                options["pretrained_cfg_overlay"] = {"file": fetch(settings["hf_hub_id"], file)}
            with from_hub(f"the ImageNet weights of {name}"), refused(f"backbone {name}", another):
                self.body = timm.create_model(name, pretrained=True, features_only=True, **options)
        else:
            with refused(f"backbone {name}", another):
                self.body = timm.create_model(name, features_only=True, **options)
        if weights:
            load_backbone_weights(self.body, weights, name, classifier=plain.state_dict())

    @staticmethod
    def _dilated(name: str, output_stride: int, options: dict[str, Any], flat: bool) -> Any:
        """The backbone on the meta device with `options["output_stride"]` set, if it can be."""
        import timm

        refusal = CannotDilate(f"backbone {name} cannot be dilated to stride {output_stride}; choose another one")
        options["output_stride"] = output_stride
        try:
            with torch.device("meta"):
                trial = timm.create_model(name, features_only=True, **options)
        except LIBRARY_FAULTS as fault:
            raise refusal from fault
        if flat or max(trial.feature_info.reduction()) > output_stride:  # the option was taken and not heeded
            raise refusal
        return trial

    def _find_multiple(self, trial: nn.Module, name: str, multiple: int, native: Sequence[int]) -> int:
        """The smaller of two padding multiples that the backbone takes; windows may need its own size."""
        fault: Exception | None = None
        for candidate in (multiple, math.lcm(multiple, native[-1])):
            try:
                maps = trial(torch.zeros(1, 3, 3 * candidate, 2 * candidate, device="meta"))
            except LIBRARY_FAULTS as error:
                fault = fault or error
                continue
            shapes = [m.shape[1:3] if self._channels_last else m.shape[2:] for m in maps]
            if all(min(shape) > 0 for shape in shapes):
                return candidate
        reason = str(fault).splitlines()[0] if fault else "empty feature maps"
        raise UserError(f"backbone {name} does not take images of any size ({reason}); choose another model.backbone")

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised images, H and W multiples of `multiple` -> maps of (B, channels[i], H/s, W/s)."""
        maps = self.body(images)
        H, W = images.shape[-2:]
        pyramid = []
        for index, stride in zip(self._order, self.strides):
            features = maps[index].permute(0, 3, 1, 2) if self._channels_last else maps[index]
            pyramid.append(bilinear(features, (int(H / stride), int(W / stride))))
        return pyramid


class SegformerPyramid(nn.Module):
    """Mix Transformer (Xie et al. 2021) by transformers, whose code is Apache-2.0: maps at strides 4, 8, 16, 32.

    Args:
        widths, depths, heads: of the four stages; the defaults are MiT-B4.
        pretrained: load `hub_name`'s ImageNet weights. NVIDIA's are for non-commercial use.
        weights, drop_path: as in `TimmPyramid`; MiT's own drop_path is 0.1.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 8, 27, 3),
        heads: Sequence[int] = (1, 2, 5, 8),
        *,
        pretrained: bool = False,
        weights: str = "",
        drop_path: float | None = None,
        hub_name: str = "nvidia/mit-b4",
    ):
        super().__init__()
        from transformers import SegformerConfig, SegformerModel

        settings = SegformerConfig(
            hidden_sizes=list(widths),
            depths=list(depths),
            num_attention_heads=list(heads),
            drop_path_rate=0.1 if drop_path is None else drop_path,
        )
        self.body = SegformerModel(settings)
        if pretrained and not weights:
            weights = fetch(hub_name)
        if weights:
            self.body = load_segformer_weights(self.body, weights, hub_name)
        self.channels = list(widths)
        self.strides: list[float] = list(STRIDES)
        self.multiple = 32

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps."""
        return list(self.body(images, output_hidden_states=True).hidden_states)


class TinyPyramid(nn.Module):
    """A small CNN to be trained from scratch: about 0.9 M parameters, maps at strides 4, 8, 16, 32.

    Plain 3x3 residual blocks where maps are large (few launches, good use of a CPU), inverted residuals with 5x5
    depthwise kernels where they are small (a wide view for few weights).
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(
        self, widths: Sequence[int] = (32, 64, 112, 160), depths: Sequence[int] = (2, 3, 4, 2), weights: str = ""
    ):
        super().__init__()
        a, b, c, d = widths
        self.stem = ConvNormAct(3, a // 2 + a // 4, stride=2)
        self.stages = nn.ModuleList(
            [
                self._stage(BasicResidual, a // 2 + a // 4, a, depths[0]),
                self._stage(BasicResidual, a, b, depths[1]),
                self._stage(InvertedResidual, b, c, depths[2]),
                self._stage(InvertedResidual, c, d, depths[3]),
            ]
        )
        start_for_relu(self)
        if weights:
            load_backbone_weights(self, weights, "tiny")
        self.channels = list(widths)
        self.strides: list[float] = list(STRIDES)
        self.multiple = 32

    @staticmethod
    def _stage(
        block: type[BasicResidual] | type[InvertedResidual], in_channels: int, out_channels: int, depth: int
    ) -> nn.Sequential:
        rest = (block(out_channels, out_channels) for _ in range(depth - 1))
        return nn.Sequential(block(in_channels, out_channels, stride=2), *rest)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps."""
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
