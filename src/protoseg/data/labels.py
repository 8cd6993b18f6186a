"""What the values of a mask mean: raw ids or colours on disk, train ids in the network.

A train id is in [0, C) or `ignore_index`. Anything else that a mask holds is a fault, named with its value and count:
on a GPU a label that is out of range is a device assert without a word about the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protoseg.config import DataError

RGB = tuple[int, int, int]
LARGEST_ID = 65535  # of a 16-bit mask; the lookup table covers all of them
UNKNOWN = -1


@dataclass(frozen=True)
class LabelSpace:
    """Names and colours of C classes, and the way from what a mask holds to their train ids.

    Args:
        names: of the C classes, in the order of their train ids.
        palette: (red, green, blue) of each class for drawing.
        ignore_index: the train id of pixels that carry no label.
        ids: (raw id, train id) for every id a mask may hold. Empty: raw ids are train ids, `ignore_index` included.
        colours: (colour, train id) for every colour an RGB mask may hold. Empty: RGB masks are refused.
    """

    names: tuple[str, ...]
    palette: tuple[RGB, ...]
    ignore_index: int = 255
    ids: tuple[tuple[int, int], ...] = ()
    colours: tuple[tuple[RGB, int], ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @cached_property
    def table(self) -> NDArray[np.int64]:
        """(65536,) train id of every raw id, `UNKNOWN` where there is none."""
        table = np.full(LARGEST_ID + 1, UNKNOWN, dtype=np.int64)
        pairs = self.ids or (*((c, c) for c in range(self.num_classes)), (self.ignore_index, self.ignore_index))
        for raw, train in pairs:
            table[raw] = train
        return table

    @cached_property
    def colour_table(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sorted 24-bit colour codes and the train id of each."""
        rows = sorted((_code(np.array(colour)).item(), train) for colour, train in self.colours)
        codes, trains = zip(*rows)
        return np.array(codes, dtype=np.int64), np.array(trains, dtype=np.int64)

    def train_ids(self, raw: NDArray[np.generic]) -> NDArray[np.int64]:
        """Raw ids (H, W) or colours (H, W, 3) -> (H, W) int64 train ids, `UNKNOWN` where the value is not known."""
        if raw.ndim == 3:
            codes, trains = self.colour_table
            wanted = _code(raw)
            place = np.searchsorted(codes, wanted).clip(max=len(codes) - 1)
            return np.where(codes[place] == wanted, trains[place], UNKNOWN)
        if raw.dtype in (np.uint8, np.uint16):
            return self.table[raw]
        ids = raw.astype(np.int64)
        outside = (ids < 0) | (ids > LARGEST_ID)
        return np.where(outside, UNKNOWN, self.table[ids.clip(0, LARGEST_ID)])

    def encode(self, raw: NDArray[np.generic], file: Path | str) -> NDArray[np.int64]:
        """Raw ids (H, W) or colours (H, W, 3) -> (H, W) int64 train ids.

        Raises:
            DataError: the mask holds values that are neither mapped nor ignored; says which, how often, in which file.
        """
        labels = self.train_ids(raw)
        if (labels == UNKNOWN).any():
            raise DataError(f"{file}: {describe_unknown(unknown_values(raw, labels))}, but {self.expected(raw.ndim)}")
        return labels

    def expected(self, dimensions: int = 2) -> str:
        """What a mask may hold and what to do about the rest, for messages."""
        if dimensions == 3:
            return f"the palette knows {len(self.colours)} colours; add the colour to `palette` of the data set file"
        known = sorted(raw for raw, _ in self.ids) if self.ids else [*range(self.num_classes), self.ignore_index]
        return f"expected are {spans(known)}; add the id to `label_map` or `ignore`, or repair the mask"


def unknown_values(raw: NDArray[np.generic], labels: NDArray[np.int64]) -> dict[str, int]:
    """The values of `raw` that `labels` marks as unknown, most frequent first, with their number of pixels."""
    values, counts = np.unique(raw[labels == UNKNOWN], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {str(values[i].tolist()): int(counts[i]) for i in order}


def describe_unknown(unknown: dict[str, int], at_most: int = 5) -> str:
    """In words: unknown label values 7 (12 px), 9 (1 px), and the number of values left out."""
    shown = ", ".join(f"{value} ({count} px)" for value, count in list(unknown.items())[:at_most])
    rest = f" and {len(unknown) - at_most} more" if len(unknown) > at_most else ""
    return f"unknown label {'value' if len(unknown) == 1 else 'values'} {shown}{rest}"


def spans(ids: list[int]) -> str:
    """Sorted ids in short: "0-10, 255" from [0, 1, ..., 10, 255]."""
    parts: list[list[int]] = []
    for i in sorted(set(ids)):
        if parts and i == parts[-1][1] + 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def voc_colour(index: int) -> RGB:
    """The colour PASCAL VOC gives to an id: its bits, dealt to red, green and blue from the top. 0 is black."""
    channels = [0, 0, 0]
    for bit in range(24):
        channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    return channels[0], channels[1], channels[2]


def default_palette(names: tuple[str, ...]) -> tuple[RGB, ...]:
    """VOC colours for any number of classes; black only for a first class that is called background."""
    first = 0 if names and names[0].lower() == "background" else 1
    return tuple(voc_colour(first + i) for i in range(len(names)))


def known_classes(name: str) -> tuple[tuple[str, ...], tuple[RGB, ...], tuple[int, ...]]:
    """Names, colours and ids on disk of a public data set, from `classes/<name>.json` (its `source` says whose)."""
    text = (resources.files("protoseg.data") / "classes" / f"{name}.json").read_text(encoding="utf-8")
    rows = json.loads(text)["classes"]
    names = tuple(row["name"] for row in rows)
    palette = tuple(tuple(row["colour"]) for row in rows) if "colour" in rows[0] else default_palette(names)
    return names, palette, tuple(row.get("id", i) for i, row in enumerate(rows))


def _code(colours: NDArray[np.generic]) -> NDArray[np.int64]:
    rgb = colours.astype(np.int64)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
