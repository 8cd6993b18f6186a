"""Training samples cut from pictures that lie in one block of memory, a whole batch at a time, on any device.

What is random is drawn on the CPU, sample by sample, as everywhere (`transforms.draw_cut`); one small tensor of numbers
goes to the device and the pixels never leave it. There is no interpolation grid: a crop of a resized picture is
`rows @ picture @ columns`, two products with matrices that hold the triangle filter at its own place and width for
each sample. So shrinking is antialiased exactly as in `transforms`, any scales fit into one batch, and both products
are what an accelerator does best. Values may differ from `transforms` by one or two of 255, because that one rounds
between the two passes; where nothing is resized they are equal. Labels are equal always.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from protoseg.data.transforms import FILL, GREY, Cut

# The numbers of one sample: where its picture begins, (height, width) before and after the resize, the crop's corner,
# flip; brightness, contrast and the nine numbers of the colour matrix. float64 holds all of them exactly enough, so one
# small tensor carries a batch.
PLACE, FIELDS = 8, 19


def numbers(cuts: Sequence[Cut], first: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Tensor:
    """(B, FIELDS) float64 on the CPU: what `cut_batch` must know of each sample.

    Args:
        cuts: of the samples.
        first: the first pixel of each sample's picture in the block.
        sizes: (height, width) of each picture.
    """
    rows = [
        (start, *size, *cut.size, *cut.corner, cut.flip, *cut.colour) for cut, start, size in zip(cuts, first, sizes)
    ]
    given = torch.tensor(rows, dtype=torch.float64)
    _, contrast, saturation, hue = given[:, PLACE:, None, None].unbind(1)  # B 1 1 each
    return torch.cat([given[:, : PLACE + 2], colour_matrices(contrast, saturation, hue).flatten(1)], 1)


def colour_matrices(contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """(B, 1, 1) each -> (B, 3, 3), the linear part of `transforms.recolour`."""
    third, cross = (1 - hue.cos()) / 3, hue.sin() / math.sqrt(3)
    a, b, c = hue.cos() + third, third - cross, third + cross
    turn = torch.cat([a, b, c, c, a, b, b, c, a], 2).view(-1, 3, 3)  # about the grey axis
    grey = torch.tensor(GREY, dtype=hue.dtype).expand(3, 3)
    fade = saturation * torch.eye(3, dtype=hue.dtype) + (1 - saturation) * grey
    return contrast * (turn @ fade)


def window(cuts: Sequence[Cut], sizes: Sequence[tuple[int, int]], crop_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of source pixels in which the crop of any of these samples finds all it needs."""
    return (
        max(_reach(cut.size[0], size[0], crop_size[0]) for cut, size in zip(cuts, sizes)),
        max(_reach(cut.size[1], size[1], crop_size[1]) for cut, size in zip(cuts, sizes)),
    )


def _reach(new: int, old: int, crop: int) -> int:
    step = old / new
    return min(old, math.ceil((min(crop, new) - 1) * step + 2 * max(step, 1.0)) + 2)


@torch.no_grad()
def cut_batch(
    images: Tensor,
    labels: Tensor,
    samples: Tensor,
    *,
    crop_size: tuple[int, int],
    reach: tuple[int, int],
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Resize, crop, flip, recolour and pad: (B, 3, h, w) uint8 images and (B, h, w) int64 labels of `crop_size`.

    Args:
        images: (P, 3) uint8, the pixels of all pictures one after the other.
        labels: (P,) integer train ids of the same pixels.
        samples: (B, FIELDS) float64 of `numbers`, on the same device.
        crop_size: (height, width).
        reach: of `window`.
        ignore_index: label of what lies outside of the picture; its colour is `transforms.FILL`.
    """
    first, height, width, new_height, new_width, top, left, flip = samples[:, :PLACE].long().unbind(1)  # B each
    rows, seen_rows = _places(top, new_height, crop_size[0])  # B h
    columns, seen_columns = _places(left, new_width, crop_size[1], flip.bool())  # B w
    seen = seen_rows[:, :, None] & seen_columns[:, None]  # B h w

    near_rows = nearest(rows, height, new_height)  # B h
    near_columns = nearest(columns, width, new_width)  # B w
    index = (first[:, None] + near_rows * width[:, None])[:, :, None] + near_columns[:, None]  # B h w
    label = torch.where(seen, labels[index].long(), ignore_index)

    from_row, row_weights = triangle(rows, seen_rows, height, new_height, reach[0])  # B, B h m
    from_column, column_weights = triangle(columns, seen_columns, width, new_width, reach[1])  # B, B w n
    source_rows = (from_row[:, None] + torch.arange(reach[0], device=rows.device)).minimum(height[:, None] - 1)
    source_columns = (from_column[:, None] + torch.arange(reach[1], device=rows.device)).minimum(width[:, None] - 1)
    index = (first[:, None] + source_rows * width[:, None])[:, :, None] + source_columns[:, None]  # B m n
    pixels = images[index].float()  # B m n 3
    with torch.autocast(images.device.type, enabled=False):
        tall = torch.bmm(row_weights, pixels.flatten(2)).unflatten(2, (-1, 3))  # B h n 3
        planes = tall.permute(0, 3, 1, 2).flatten(1, 2)  # B 3h n
        resized = torch.bmm(planes, column_weights.mT).unflatten(1, (3, -1))  # B 3 h w
        mixed = recolour_batch(resized.round_(), seen, samples[:, PLACE:])
    image = mixed.to(torch.uint8)
    for channel, value in enumerate(FILL):  # a tensor of the three would have to be brought to the device
        image[:, channel].masked_fill_(~seen, int(value))
    return image, label


def _places(start: Tensor, end: Tensor, side: int, flip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(B, side) pixels of the resized axis a crop takes, from `start`; and which exist, being before `end`."""
    place = torch.arange(side, device=start.device)
    visible = (end - start).clamp(max=side)[:, None]  # B 1
    places = place.expand(len(start), -1)
    if flip is not None:  # of what is seen: padding stays at the right
        places = torch.where(flip[:, None], visible - 1 - place, place)
    return start[:, None] + places.clamp(min=0), place < visible


def nearest(places: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """(B, n) pixels of a resized axis -> the pixel of the source each is nearest to, floor((i + 0.5) old / new)."""
    source = (2 * places + 1) * old[:, None] // (2 * new[:, None])
    return source.minimum(old[:, None] - 1)  # of places behind the end, which nobody sees


def triangle(places: Tensor, seen: Tensor, old: Tensor, new: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The antialiased bilinear filter along one axis, as Pillow and torch define it, for each sample of a batch.

    Args:
        places: (B, n) int64 pixels of the resized axis.
        seen: (B, n) which of them exist.
        old, new: (B,) length of the axis before and after.
        length: how many source pixels are looked at.

    Returns:
        The first source pixel looked at, (B,) int64, and weights (B, n, length) whose rows sum to 1, or are 0 where
        nothing is seen.
    """
    step = (old / new.double())[:, None]  # B 1, source pixels per target pixel
    width = step.clamp(min=1)  # half of the filter's foot: wider where the picture shrinks
    centre = (places + 0.5) * step  # B n
    nearest_end = torch.where(seen, centre, math.inf).amin(1, keepdim=True)
    first = (nearest_end - width + 0.5).floor().clamp(min=0).minimum(old[:, None].double())  # B 1
    offset = torch.arange(length, device=places.device)
    far = (offset + 0.5 - (centre - first).float()[:, :, None]) / width.float()[:, :, None]  # B n length
    inside = (first + offset < old[:, None])[:, None]  # B 1 length
    weight = (1 - far.abs_()).clamp_(min=0) * (inside & seen[:, :, None])
    return first[:, 0].long(), weight / weight.sum(-1, keepdim=True).clamp_(min=1e-12)


def recolour_batch(planes: Tensor, seen: Tensor, colour: Tensor) -> Tensor:
    """`transforms.recolour` of a batch.

    Args:
        planes: (B, 3, h, w) float32 of whole numbers; what is not seen is 0.
        seen: (B, h, w) which pixels belong to the picture.
        colour: (B, 11) float64: brightness, contrast, and a matrix of `colour_matrices`.

    Returns:
        (B, 3, h, w) float32, whole numbers in [0, 255].
    """
    brightness, contrast, matrix = colour[:, 0], colour[:, 1], colour[:, 2:].reshape(-1, 3, 3)
    sums = planes.sum(-1).double().sum(-1)  # B 3; exact: a row of whole numbers stays below 2^24
    mean_grey = sum(weight * sums[:, i] for i, weight in enumerate(GREY)) / seen.flatten(1).sum(1) + brightness
    offset = contrast * brightness + (1 - contrast) * mean_grey  # B
    mixed = torch.baddbmm(offset[:, None, None].float(), matrix.float(), planes.flatten(2))
    return mixed.round_().clamp_(0, 255).view(planes.shape)
