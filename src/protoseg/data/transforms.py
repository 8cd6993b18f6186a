"""From an item on disk to what the network sees. Nothing here touches a global random state.

A training sample is a pure function of (seed, epoch, index): workers, ranks and restarts cannot change it. Masks are
resized nearest-exact (pixel centres; the older nearest shifts by half a pixel and costs 1.6 points of IoU on a disc
that is resized from 96 to 72 pixels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from protoseg.config import Data, DataError
from protoseg.data.dataset import Sample, Transform
from protoseg.data.labels import LabelSpace

# What an image is padded with: the mean colour of ImageNet, which is 0 once the model has normalised.
FILL = (124.0, 116.0, 104.0)
TRIES = 10  # crops drawn until none of their classes covers too much
GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601, as in torchvision
PLAIN_COLOUR = (0.0, 1.0, 1.0, 0.0)  # brightness, contrast, saturation and hue that change nothing


@dataclass(frozen=True)
class Cut:
    """What is random about one training sample.

    Args:
        size: (height, width) of the whole picture when it has been resized.
        corner: top and left of the crop in it.
        flip: left for right, of the crop.
        colour: (brightness, contrast, saturation, hue) as `colour_draws` gives them.
    """

    size: tuple[int, int]
    corner: tuple[int, int]
    flip: bool
    colour: tuple[float, float, float, float] = PLAIN_COLOUR


def training(data: Data, labels: LabelSpace, seed: int) -> Transform:
    """Random scale, crop, flip and colour for training: uint8 image and label of `data.crop_size`.

    In order: resize to `base_size` times a uniform factor of `scale_range` (one resampling, not two); crop,
    again while one class covers more than `cat_max_ratio` of the labelled pixels; flip; colour; pad at the right and
    the bottom with the mean colour and `ignore_index`.

    Raises:
        DataError: settings that make no sense, when it is built rather than at the first sample.
    """
    check_training(data)

    def transform(sample: Sample, epoch: int, index: int) -> Sample:
        image, label = sample["image"], sample["label"]
        cut = draw_cut(label, data, labels.ignore_index, seed, epoch, index)
        image, label = apply_cut(image, label, cut, data.crop_size, labels.ignore_index)
        return {**sample, "image": image, "label": label}

    return transform


def check_training(data: Data) -> None:
    """Raises: DataError: settings of the training samples that make no sense."""
    low, high = data.scale_range
    if not 0 < low <= high:
        raise DataError(f"data.scale_range is {data.scale_range}; expected 0 < low <= high")
    if min(data.crop_size) < 1 or not 0 <= data.hflip <= 1 or not 0 < data.cat_max_ratio <= 1:
        raise DataError(
            f"data.crop_size {data.crop_size} must be positive, data.hflip {data.hflip} in [0, 1] and "
            f"data.cat_max_ratio {data.cat_max_ratio} in (0, 1]"
        )
    _check_sizes(data)


def draw_cut(label: Tensor, data: Data, ignore_index: int, seed: int, epoch: int, index: int) -> Cut:
    """The cut of one item in one epoch; `label` (H, W) is looked at for `cat_max_ratio` only."""
    draw = generator(seed, epoch, index)
    height, width = base_size(label.shape[0], label.shape[1], data)
    factor = _uniform(draw, *data.scale_range)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    corner = _place(draw, label, size, data, ignore_index)
    flip = _uniform(draw) < data.hflip
    return Cut(size, corner, flip, colour_draws(draw) if data.photometric else PLAIN_COLOUR)


def apply_cut(
    image: Tensor, label: Tensor, cut: Cut, crop_size: tuple[int, int], ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The crop of (3, H, W) uint8 and (H, W) labels that a cut describes, padded to `crop_size`."""
    label = crop_label(label, cut.size, cut.corner, crop_size)
    rows, columns = (slice(start, start + side) for start, side in zip(cut.corner, crop_size))
    image = _resize(image, cut.size)[:, rows, columns]
    if cut.flip:
        image, label = image.flip(-1), label.flip(-1)
    image = recolour(image, *cut.colour)
    image = pad(image, crop_size, FILL)  # last, so that what is no picture has one colour
    return image, pad(label[None], crop_size, [ignore_index])[0]


def evaluation(data: Data) -> Transform:
    """Resize the image, and only the image, to `base_size`; the label keeps its original size, where metrics live."""
    _check_sizes(data)

    def transform(sample: Sample, epoch: int, index: int) -> Sample:
        return {**sample, "image": resize_image(sample["image"], data)}

    return transform


def resize_image(image: Tensor, data: Data) -> Tensor:
    """An image (3, H, W) at the size `data` asks for before evaluation; the same tensor where that is its own."""
    height, width = image.shape[-2:]
    return _resize(image, base_size(height, width, data))


def base_size(height: int, width: int, data: Data) -> tuple[int, int]:
    """(height, width) after `data.base_size` (short side) and `data.max_long_side`; aspect kept to a pixel."""
    factor = 1.0 if data.base_size is None else data.base_size / min(height, width)
    if data.max_long_side is not None:
        factor = min(factor, data.max_long_side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """A generator that depends on all three and on nothing else; neighbours are unrelated."""
    state = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)  # torch takes signed seeds


def resize_label(label: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-exact resize of (H, W) labels of any integer type: target pixel i takes source floor((i + 0.5) s)."""
    return crop_label(label, size, (0, 0), size)


def crop_label(label: Tensor, size: tuple[int, int], corner: tuple[int, int], crop_size: tuple[int, int]) -> Tensor:
    """The crop of `resize_label(label, size)` that begins at `corner`, without the rest; smaller where it ends."""
    if tuple(label.shape) == size:
        (top, left), (height, width) = corner, crop_size
        return label[top : top + height, left : left + width]
    rows, columns = (
        (2 * np.arange(start, min(start + side, new)) + 1) * old // (2 * new)  # floor((i + 0.5) * old / new), exact
        for old, new, start, side in zip(label.shape, size, corner, crop_size)
    )
    seen = label.numpy()[rows[0] : rows[-1] + 1].take(columns, axis=1)  # four times as fast as index_select
    return torch.from_numpy(seen[rows - rows[0]])


def pad(image: Tensor, size: tuple[int, int], fill: Sequence[float]) -> Tensor:
    """(C, H, W) enlarged to `size` (height, width) with `fill` (one value, or C) at the right and at the bottom."""
    height, width = image.shape[-2:]
    if (height, width) == size:
        return image
    return F.pad(image, [0, 0, size[1] - width, size[0] - height], fill=list(fill))


def colour_draws(draw: torch.Generator) -> tuple[float, float, float, float]:
    """(brightness, contrast, saturation, hue), each left alone with probability 1/2.

    Brightness is added, up to 32 of 255 either way; contrast and saturation are factors in [0.5, 1.5]; hue is an angle
    up to 36 degrees either way. The ranges are those of the SSD recipe (Liu et al., 2016) that the field trains with.
    """
    ranges = ((-32.0, 32.0, 0.0), (0.5, 1.5, 1.0), (0.5, 1.5, 1.0), (-math.pi / 5, math.pi / 5, 0.0))
    draws = torch.rand(8, generator=draw).tolist()
    brightness, contrast, saturation, hue = (
        low + (high - low) * draws[2 * i] if draws[2 * i + 1] < 0.5 else none
        for i, (low, high, none) in enumerate(ranges)
    )
    return brightness, contrast, saturation, hue


def recolour(image: Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """Brightness, contrast, saturation and hue of a uint8 image (3, H, W) as one 3x4 matrix.

    Contrast mixes with the mean grey of the image and saturation with the grey of each pixel, as torchvision's
    functions do; hue turns colours about the grey axis. All four are affine in RGB, so a pixel is touched once (HSV
    costs ten times as much) and clipped once, at the end.
    """
    if (brightness, contrast, saturation, hue) == PLAIN_COLOUR:
        return image
    grey = torch.tensor(GREY)
    planes = image.contiguous().view(3, -1)  # 3 N: planes multiply four times as fast as triples
    mean = planes.sum(1) / planes.shape[1]  # summed in integers, the same for any number of threads
    mean_grey = float(grey @ mean) + brightness
    cos, sin = math.cos(hue), math.sin(hue)
    third, cross = (1 - cos) / 3, sin / math.sqrt(3)
    a, b, c = cos + third, third - cross, third + cross
    turn = torch.tensor([[a, b, c], [c, a, b], [b, c, a]])  # about (1, 1, 1)
    fade = saturation * torch.eye(3) + (1 - saturation) * grey.expand(3, 3)
    matrix = turn @ fade  # both keep greys, so what is added before them passes through
    offset = contrast * brightness + (1 - contrast) * mean_grey
    mixed = torch.addmm(torch.tensor(offset), contrast * matrix, planes.float())
    return mixed.round_().clamp_(0, 255).to(torch.uint8).view(image.shape)


def _place(
    draw: torch.Generator, label: Tensor, size: tuple[int, int], data: Data, ignore_index: int
) -> tuple[int, int]:
    """Top left corner of a crop in which no class covers more than `cat_max_ratio` of the labelled pixels."""
    room = [max(0, have - want) for have, want in zip(size, data.crop_size)]
    for _ in range(TRIES):
        top, left = (int(torch.randint(r + 1, (), generator=draw)) for r in room)
        if data.cat_max_ratio >= 1 or room == [0, 0]:
            break
        counts = crop_label(label, size, (top, left), data.crop_size).flatten().bincount()
        counts[ignore_index : ignore_index + 1] = 0
        if (counts > 0).sum() > 1 and counts.max() <= data.cat_max_ratio * counts.sum():
            break
    return top, left


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[-2:]) == size:
        return image
    if size == (1, 1):  # of planes one after the other PyTorch's AVX2 code cannot make a single pixel
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return F.resize(image, list(size), antialias=True)


def _uniform(draw: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * torch.rand((), generator=draw).item()


def _check_sizes(data: Data) -> None:
    for name, value in (("base_size", data.base_size), ("max_long_side", data.max_long_side)):
        if value is not None and value < 1:
            raise DataError(f"data.{name} is {value}; expected at least 1, or none")
