"""From an image of any size to class probabilities: whole or in windows, flipped, at several scales.

Validation, test and prediction all come through here. What is averaged is always probabilities, never scores: heads
differ in the scale of their scores. One path leads to the full (C, H, W) table; `segment_labels` gives the same arg-max
without ever storing that table at full size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protoseg.config import Evaluation, UserError
from protoseg.method.resizing import bilinear
from protoseg.models.segmenter import Segmenter

Size = tuple[int, int]
Box = tuple[int, int, int, int]  # top, left, bottom, right; the last two exclusive

STRIP_NUMBERS = 1_000_000  # probabilities worked on at once where a table is gone through in strips: 4 MB


class Network(Protocol):
    """Anything that maps (B, 3, H, W) images to (B, C, H, W) logits, e.g. `models.segmenter.Segmenter`."""

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Answer:
    """The logits of one crop. A `Segmenter`'s are resized when rows are asked for: the whole table is never there.

    Attributes:
        scores: (C, h, w).
        resized: (height, width) they are to be resized to; at least `size`, what is beyond it is cut off.
        size: of the crop.
        align_corners: of the resize.
        mirrored: whether the crop was, left to right.
    """

    scores: Tensor
    resized: Size
    size: Size
    align_corners: bool = False
    mirrored: bool = False

    def rows(self, top: int, bottom: int) -> Tensor:
        """(C, bottom - top, width) logits, float32."""
        rows = _resized_rows(self.scores.float(), self.resized, top, bottom, self.align_corners)[:, :, : self.size[1]]
        return rows.flip(-1) if self.mirrored else rows


def check(evaluation: Evaluation) -> None:
    """Refuse settings no image can be segmented with; to be called before a run, not only after hours of it.

    Raises:
        UserError: a stride that leaves gaps, or no usable scale.
    """
    if not evaluation.scales or min(evaluation.scales) <= 0:
        raise UserError(f"evaluation.scales must be positive numbers, at least one; given {evaluation.scales}")
    gaps = any(not 1 <= stride <= window for stride, window in zip(evaluation.stride, evaluation.window))
    if evaluation.mode == "slide" and gaps:
        raise UserError(
            f"evaluation.stride must lie between 1 and evaluation.window, or pixels are left out; "
            f"given stride {evaluation.stride} and window {evaluation.window} (height, width)"
        )


@torch.no_grad()
def segment(model: Network, image: Tensor, evaluation: Evaluation, size: Size | None = None, batch: int = 1) -> Tensor:
    """Probabilities of every class at every pixel.

    Args:
        model: in eval mode; the image goes to the device of its parameters.
        image: (3, H, W) uint8, or float in [0, 1].
        evaluation: whole or slide, scales, flip.
        size: (height, width) of the answer; the image's own if not given.
        batch: windows per forward pass.

    Returns:
        (C, height, width) float32 on the model's device; sums to 1 over C.

    Raises:
        UserError: a stride that leaves gaps, or no usable scale.
    """
    size = _image_size(image) if size is None else size
    maps = _maps(model, image, evaluation, batch)
    total = _resize(next(maps), size)
    for other in maps:
        total += _resize(other, size)
    return total.div_(len(evaluation.scales))


@torch.no_grad()
def segment_labels(
    model: Network,
    image: Tensor,
    evaluation: Evaluation,
    size: Size | None = None,
    batch: int = 1,
    confidence: bool = False,
    dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor | None]:
    """The most probable class at every pixel: the arg-max of `segment`, in bounded memory.

    A window's probabilities are dropped as soon as no later window overlaps them, so `slide` at one scale holds one
    window and the overlap of two rows of windows: 4000×6000 pixels of 171 classes fit in 2 GiB (the table itself has
    15.3). Where the answer is larger than what the network saw (`base_size`, scales), the maps are enlarged a strip of
    rows at a time. With several scales one map per scale is held. Where the answer is one pass over the whole image and
    nothing is averaged, softmax does not change the arg-max and `Segmenter.labels` gives it without any table.

    Args:
        model, image, evaluation, size, batch: as `segment`.
        confidence: also return the probability of the chosen class.
        dtype: of the labels; a byte instead of eight is 168 MB less at that size.

    Returns:
        labels (height, width) and confidence (height, width) float32 or None, on the model's device.

    Raises:
        UserError: as `segment`.
    """
    size = _image_size(image) if size is None else size
    device = _device(model)
    if isinstance(model, Segmenter) and not confidence and _is_one_pass(image, evaluation, size):
        return model.labels(image[None].to(device), dtype=dtype)[0], None
    labels = torch.empty(size, dtype=dtype, device=device)
    sure = torch.empty(size, dtype=torch.float32, device=device) if confidence else None

    for (top, left, bottom, right), block in _finished_blocks(model, image, evaluation, size, batch):
        best, labels[top:bottom, left:right] = block.max(0)
        if sure is not None:
            sure[top:bottom, left:right] = best
        del block  # while the next one is computed
    return labels, sure


def _is_one_pass(image: Tensor, evaluation: Evaluation, size: Size) -> bool:
    """Whether the network's scores for the whole image are the answer, with nothing to average or resize."""
    check(evaluation)
    rows, columns = _grid(image, evaluation)
    one_window = len(rows[0]) == len(columns[0]) == 1
    return one_window and evaluation.scales == (1.0,) and not evaluation.flip and size == _image_size(image)


def _finished_blocks(
    model: Network, image: Tensor, evaluation: Evaluation, size: Size, batch: int
) -> Iterator[tuple[Box, Tensor]]:
    """Blocks (C, h, w) of the answer that no later window touches; together they tile `size` once."""
    if evaluation.mode == "slide" and evaluation.scales == (1.0,) and size == _image_size(image):
        yield from _swept(model, image, evaluation, batch)
        return
    maps = list(_maps(model, image, evaluation, batch))
    rows = max(1, STRIP_NUMBERS // (len(maps[0]) * size[1]))
    for top in range(0, size[0], rows):
        bottom = min(top + rows, size[0])
        strip = _resized_rows(maps[0], size, top, bottom)
        for other in maps[1:]:
            strip = strip + _resized_rows(other, size, top, bottom)
        yield (top, 0, bottom, size[1]), strip / len(maps)


def _maps(model: Network, image: Tensor, evaluation: Evaluation, batch: int) -> Iterator[Tensor]:
    """(C, h, w) probabilities for each scale, at the scaled image's size."""
    check(evaluation)
    height, width = _image_size(image)
    for scale in evaluation.scales:
        scaled = image
        if scale != 1.0:
            target = (max(1, round(height * scale)), max(1, round(width * scale)))
            scaled = _unit(image)[None]
            scaled = F.interpolate(scaled, target, mode="bilinear", antialias=True).clamp_(0, 1)[0]
        yield _averaged(model, scaled, evaluation, batch)


def _averaged(model: Network, image: Tensor, evaluation: Evaluation, batch: int) -> Tensor:
    """At every pixel the mean of the windows that cover it; `whole` is one window."""
    (rows, deep), (columns, long) = _grid(image, evaluation)
    height, width = _image_size(image)
    boxes = [(row, column, row + deep, column + long) for row in rows for column in columns]
    total: Tensor | None = None
    for (top, left, bottom, right), answers in _windows(model, image, boxes, evaluation.flip, batch):
        if total is None:
            total = _table(answers, height, width)
        _add_probabilities(total[:, top:bottom, left:right], answers)
    assert total is not None, "an image has at least one window"
    weight = _coverage(rows, deep, height)[:, None] * _coverage(columns, long, width)
    return total.div_(weight.to(total))


def _swept(model: Network, image: Tensor, evaluation: Evaluation, batch: int) -> Iterator[tuple[Box, Tensor]]:
    """`_averaged`, handed out in blocks while the windows sweep over the image, each as soon as it is finished.

    Windows advance along the short side and then step along the long one, so that `waiting`, the sums that the next row
    of windows still adds to, is as small as it can be. The last row is set back to end at the image's edge and may
    overlap the row before almost whole; the two are therefore summed together (`_groups`).
    """
    height, width = _image_size(image)
    turned = width > height  # then the plane is read transposed: "rows" are the image's columns
    (rows, deep), (columns, long) = _grid(image, evaluation)[:: -1 if turned else 1]
    short, far = sorted((height, width))
    row_weight, column_weight = _coverage(rows, deep, far), _coverage(columns, long, short)
    groups = _groups(rows)
    boxes = [(row, column, row + deep, column + long) for group in groups for column in columns for row in group]
    windows = _windows(model, image, [_turn(box) for box in boxes] if turned else boxes, evaluation.flip, batch)

    waiting: Tensor | None = None  # C, rows shared with the next group, short side
    shared = 0  # how many of those rows the group before has filled
    for group, following in zip(groups, [*groups[1:], [far]]):
        top, bottom, next_top = group[0], group[-1] + deep, following[0]
        ahead: Tensor | None = None  # C, bottom - top, columns that this group's next window also covers
        for column, next_column in zip(columns, [*columns[1:], short]):
            tile: Tensor | None = None  # C, bottom - top, long
            for row in group:
                _, answers = next(windows)
                if tile is None:
                    tile = _table(answers, bottom - top, long)
                part = tile[:, row - top : row - top + deep]
                _add_probabilities(part.transpose(1, 2) if turned else part, answers)
                del answers, part  # the network runs next: hold nothing meanwhile that is done with
            assert tile is not None
            if ahead is not None:
                tile[:, :, : ahead.shape[2]] += ahead
                del ahead
            ahead = tile[:, :, next_column - column :].clone()
            tile = tile[:, :, : next_column - column]
            if waiting is not None and shared:
                tile[:, :shared] += waiting[:, :shared, column:next_column]
            if bottom > next_top:
                if waiting is None:
                    waiting = tile.new_empty(len(tile), bottom - next_top, short)
                waiting[:, : bottom - next_top, column:next_column] = tile[:, next_top - top :]
            weight = row_weight[top:next_top, None] * column_weight[column:next_column]
            block = tile[:, : next_top - top].div_(weight.to(tile))
            box = (top, column, next_top, next_column)
            yield (_turn(box), block.transpose(1, 2)) if turned else (box, block)
            del tile, block
        shared = bottom - next_top


def _groups(starts: list[int]) -> list[list[int]]:
    """Each start alone, but the last two together."""
    return [[start] for start in starts[:-2]] + [starts[-2:]]


def _turn(box: Box) -> Box:
    top, left, bottom, right = box
    return left, top, right, bottom


def _grid(image: Tensor, evaluation: Evaluation) -> tuple[tuple[list[int], int], tuple[list[int], int]]:
    """For rows and for columns: where windows start and how long they are."""
    height, width = _image_size(image)
    if evaluation.mode == "whole":
        return ([0], height), ([0], width)
    check(evaluation)
    axes = []
    for side, window, stride in zip((height, width), evaluation.window, evaluation.stride):
        axes.append((window_starts(side, window, stride), min(window, side)))
    return axes[0], axes[1]


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride`, the last one set back so that it ends at the edge."""
    last = max(side - window, 0)
    return [*range(0, last, stride), last]


def _coverage(starts: list[int], length: int, side: int) -> Tensor:
    """(side,) float32: how many windows cover each position; at least 1."""
    count = torch.zeros(side)
    for start in starts:
        count[start : start + length] += 1
    return count


def _windows(
    model: Network, image: Tensor, boxes: list[Box], flip: bool, batch: int
) -> Iterator[tuple[Box, list[Answer]]]:
    """(box, its answers) for each box, in order; all boxes have one size.

    The answers are one, and with `flip` a second one from the mirrored crop.
    """
    for start in range(0, len(boxes), batch):
        part = boxes[start : start + batch]
        crops = torch.stack([image[:, top:bottom, left:right] for top, left, bottom, right in part]).to(_device(model))
        passes = [_answers(model, crops)]
        if flip:
            passes.append(_answers(model, crops.flip(-1), mirrored=True))
        for box in part:
            yield box, [answers.pop(0) for answers in passes]  # nothing here keeps an answer alive


def _answers(model: Network, crops: Tensor, mirrored: bool = False) -> list[Answer]:
    size = _image_size(crops)
    if isinstance(model, Segmenter):
        scores, resized = model.coarse(crops)
        return [Answer(table, resized, size, model.head.align_corners, mirrored) for table in scores]
    return [Answer(table, size, size, mirrored=mirrored) for table in model(crops)]


def _table(answers: list[Answer], height: int, width: int) -> Tensor:
    scores = answers[0].scores
    return torch.zeros(len(scores), height, width, device=scores.device)


def _add_probabilities(total: Tensor, answers: list[Answer]) -> None:
    """Add the mean of the softmaxes of the answers to (C, h, w) `total`, some rows at a time: no second table."""
    rows = max(1, STRIP_NUMBERS // (len(total) * total.shape[2]))
    for top in range(0, total.shape[1], rows):
        bottom = min(top + rows, total.shape[1])
        for answer in answers:
            strip = answer.rows(top, bottom).softmax(0)
            total[:, top:bottom] += strip if len(answers) == 1 else strip.div_(len(answers))


def _resize(probabilities: Tensor, size: Size) -> Tensor:
    return bilinear(probabilities[None], size)[0]


def _resized_rows(table: Tensor, size: Size, top: int, bottom: int, align_corners: bool = False) -> Tensor:
    """Rows top to bottom of the bilinear resize of a (C, h, w) table to `size`, computed alone."""
    height = table.shape[1]
    if table.shape[-2:] == size:
        return table[:, top:bottom]
    row = torch.arange(top, bottom, dtype=torch.float64)
    position = row * ((height - 1) / max(size[0] - 1, 1)) if align_corners else (row + 0.5) * height / size[0] - 0.5
    position = position.clamp(0, height - 1).to(table.device)
    above = position.floor().long()
    share = (position - above).float()[:, None]
    below = (above + 1).clamp(max=height - 1)
    rows = table[:, above].mul_(1 - share).add_(table[:, below] * share)  # C, bottom - top, w
    return bilinear(rows[None], (bottom - top, size[1]), align_corners=align_corners)[0]


def _unit(image: Tensor) -> Tensor:
    """Float in [0, 1], whatever came in."""
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def _image_size(image: Tensor) -> Size:
    return image.shape[-2], image.shape[-1]


def _device(model: Network) -> torch.device:
    parameter = next(cast(nn.Module, model).parameters(), None) if isinstance(model, nn.Module) else None
    return parameter.device if parameter is not None else torch.device("cpu")
