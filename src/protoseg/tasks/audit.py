"""`protoseg data check` and `protoseg data stats`: know the data before a run, not from a crash in the middle of one.

`check` opens every pair of every split and lists all that is wrong at once, with what to do about it. `stats` counts
pixels, and prints loss weights that can be pasted into a recipe.
"""

from __future__ import annotations

import json as json_module
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from protoseg.config import Data, DataError
from protoseg.data import catalog, dataset
from protoseg.data.catalog import Source
from protoseg.data.images import read_image, read_raw_mask
from protoseg.data.labels import UNKNOWN, LabelSpace, describe_unknown, unknown_values
from protoseg.data.listing import Fault, NoSplit
from protoseg.tasks.files import several

DATA_REFUSED = 3
T = TypeVar("T")


@dataclass
class Report:
    """What a check found: number of pairs by split, and (split, fault) for everything that is wrong."""

    pairs: dict[str, int] = field(default_factory=dict)
    faults: list[tuple[str, Fault]] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Faults that are not warnings."""
        return sum(not fault.warning for _, fault in self.faults)


@dataclass(frozen=True)
class Opened:
    """One pair after both files were decoded."""

    faults: tuple[Fault, ...] = ()
    unknown: dict[str, int] = field(default_factory=dict)
    pixels: NDArray[np.int64] | None = None  # C


@dataclass(frozen=True)
class Counts:
    """What `stats` sums over images.

    Args:
        pixels: (C,) labelled pixels of each class.
        images: (C,) images in which each class occurs.
        area: (C,) labelled pixels of the images in which each class occurs.
        ignored: pixels that carry no label.
        levels: (3, 256) histogram of red, green and blue.
    """

    pixels: NDArray[np.int64]
    images: NDArray[np.int64]
    area: NDArray[np.int64]
    ignored: int
    levels: NDArray[np.int64]

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.pixels + other.pixels,
            self.images + other.images,
            self.area + other.area,
            self.ignored + other.ignored,
            self.levels + other.levels,
        )


def check(data: Data, *, json: bool = False) -> int:
    """Opens every pair of the train, val and test splits and prints all faults in one table.

    Returns:
        0, or 3 (data refused) if there is at least one fault. Warnings do not count.
    """
    report = inspect(data)
    print(_as_json(data, report) if json else _as_table(data, report))
    return DATA_REFUSED if report.count else 0


def stats(data: Data, split: str = "train", *, json: bool = False) -> int:
    """Prints pixels and images per class, loss weights, and mean and standard deviation of the pixels of a split.

    Weights, for `head.class_weights`:
    - `median_frequency`: median(f) / f_c, f_c the share of class c in the images that show it (Eigen & Fergus, 2015;
      SegNet). Classes that never occur get 1.
    - `enet`: 1 / ln(1.02 + p_c), p_c the share of all labelled pixels (Paszke et al., 2016); between 1.4 and 50.5.

    Returns:
        0. Raises `DataError` at the first pair that cannot be read: run `check` for all of them.
    """
    source = catalog.find(data, split)
    counts = count(source, data.workers)
    labels, total = source.labels, int(counts.pixels.sum())
    if total == 0:
        raise DataError(
            f"{data.name}/{split}: no labelled pixel in {several(len(source), 'image')}; check `ignore` and the masks"
        )
    mean, std = pixel_statistics(counts.levels)
    summary = {
        "dataset": data.name,
        "split": split,
        "images": len(source),
        "labelled_pixels": total,
        "ignored_share": counts.ignored / (total + counts.ignored),
        "mean": [round(v, 4) for v in mean],
        "std": [round(v, 4) for v in std],
        "classes": [
            {"id": c, "name": name, "pixels": int(counts.pixels[c]), "share": counts.pixels[c] / total,
             "images": int(counts.images[c])}
            for c, name in enumerate(labels.names)
        ],
        "median_frequency": median_frequency(counts),
        "enet": enet(counts.pixels),
    }  # fmt: skip
    print(json_module.dumps(summary, indent=2) if json else _stats_table(summary))
    return 0


def inspect(data: Data) -> Report:
    """Everything that is wrong with a data set. Opens every file; never raises for a fault in the data."""
    report = Report()
    known: dict[Any, str] = {}
    for split in dict.fromkeys((data.train_split, data.val_split, data.test_split)):
        if not split:  # trained without validation
            continue
        try:
            source, faults = catalog.scan(data, split)
        except DataError as error:
            absent = isinstance(error, NoSplit) and split not in (data.train_split, data.val_split)
            if isinstance(error, NoSplit) and split == data.val_split:
                error = NoSplit(f"{error}, or {catalog.WITHOUT_VALIDATION}")
            if absent:
                report.hints.append(f"no split {split!r}: {error}")
            elif all(fault != _fault("", error) for _, fault in report.faults):  # a bad root is bad for every split
                report.faults.append((split, _fault("", error)))
            continue
        if len(source) and source.images and (source.images, source.masks) in known:
            report.hints.append(f"{split} is the same pairs as {known[source.images, source.masks]}")
            continue
        known[source.images, source.masks] = split
        report.faults += [(split, fault) for fault in faults]
        bare = catalog.unlabelled(source) if split in (data.train_split, data.val_split) else []
        if bare:  # one line: most often the split's `masks` are forgotten
            what = "no mask" + (f", nor for {len(bare) - 1} more" if len(bare) > 1 else "")
            report.faults.append((split, Fault(str(bare[0]), what, "give the split `masks` in the data set file")))
        report.pairs[split] = len(source)
        masks: Counter[str] = Counter()
        area: Counter[str] = Counter()
        pixels = np.zeros(source.labels.num_classes, dtype=np.int64)
        for opened in _each(source, open_pair, data.workers):
            report.faults += [(split, fault) for fault in opened.faults]
            masks.update(opened.unknown.keys())
            area.update(opened.unknown)
            pixels += 0 if opened.pixels is None else opened.pixels
        report.hints += [
            f"{split}: value {v} is unknown in {several(n, 'mask')}, {area[v]} px" for v, n in masks.most_common(20)
        ]
        report.hints += likely_reason(source.labels, pixels, masks)
        missing = [name for name, seen in zip(source.labels.names, pixels) if not seen]
        if missing and pixels.any():
            report.hints.append(
                f"{split}: {several(len(missing), 'class', 'classes')} without a pixel: {', '.join(missing[:20])}"
            )
    trained = {image for (images, _), split in known.items() if split == data.train_split for image in images}
    for (images, _), split in known.items():
        if split != data.train_split:
            report.faults += [
                (split, Fault(str(image), "also trained on", "take it out of one split", True))
                for image in images
                if image in trained
            ]
    return report


def open_pair(source: Source, index: int) -> Opened:
    """Decodes image and mask of one pair and says all that is wrong with them."""
    if source.scenes is not None:
        return Opened(pixels=np.bincount(source.scenes.item(index)[1].ravel(), minlength=source.labels.num_classes))
    faults = []
    image = mask = None
    try:
        image = read_image(source.images[index], source.exif, source.max_pixels).shape[:2]
    except DataError as error:
        faults.append(_fault(str(source.images[index]), error))
    path = source.masks[index]
    if path is None:
        return Opened(tuple(faults))
    try:
        mask = read_raw_mask(path, bool(source.labels.colours), source.exif, source.max_pixels)
    except DataError as error:
        return Opened((*faults, _fault(str(path), error)))
    if image is not None:
        try:
            dataset.check_size(source, index, image, mask.shape[:2])
        except DataError as error:
            faults.append(_fault(str(path), error))
    train = source.labels.train_ids(mask)
    unknown = unknown_values(mask, train) if (train == UNKNOWN).any() else {}
    if unknown:
        expected, _, fix = source.labels.expected(mask.ndim).partition("; ")
        faults.append(Fault(str(path), f"{describe_unknown(unknown)}; {expected}", fix))
    known = train[(train != UNKNOWN) & (train != source.labels.ignore_index)]
    if not known.size and not unknown:
        faults.append(Fault(str(path), "every pixel is ignored", "remove the pair or label it", True))
    return Opened(tuple(faults), unknown, np.bincount(known, minlength=source.labels.num_classes))


def count(source: Source, workers: int = 0) -> Counts:
    """Sums over all images of a source, read at their original size.

    Raises:
        DataError: a pair that cannot be read.
    """
    total = None
    for item in _each(source, _count_one, workers):
        total = item if total is None else total + item
    if total is None:
        raise DataError(f"{source.name}/{source.split}: no pairs to count")
    return total


def median_frequency(counts: Counts) -> list[float]:
    """(C,) weights median(f) / f_c; 1 for classes that never occur."""
    there = counts.pixels > 0
    frequency = counts.pixels[there] / counts.area[there]
    weights = np.ones(len(counts.pixels))
    weights[there] = np.median(frequency) / frequency
    return [round(float(w), 4) for w in weights]


def enet(pixels: NDArray[np.int64]) -> list[float]:
    """(C,) weights 1 / ln(1.02 + p_c)."""
    return [round(float(w), 4) for w in 1 / np.log(1.02 + pixels / pixels.sum())]


def pixel_statistics(levels: NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of red, green and blue in [0, 1] from their (3, 256) histogram."""
    value = np.arange(256) / 255
    share = levels / levels.sum(1, keepdims=True)
    mean = share @ value
    return mean.tolist(), np.sqrt(share @ value**2 - mean**2).tolist()


def _count_one(source: Source, index: int) -> Counts:
    image, label = dataset.read(source, index)
    classes = source.labels.num_classes
    known = label[label != source.labels.ignore_index]
    pixels = np.bincount(known, minlength=classes)
    images = (pixels > 0).astype(np.int64)
    levels = np.stack([np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(3)])
    return Counts(pixels, images, images * known.size, label.size - known.size, levels)


def _each(source: Source, work: Callable[[Source, int], T], workers: int) -> Iterator[T]:
    """`work` on every pair, in order. Threads: decoders let go of the interpreter while they work."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for done, result in enumerate(pool.map(lambda index: work(source, index), range(len(source))), 1):
            if sys.stderr.isatty() and (done % 50 == 0 or done == len(source)):
                print(f"\r{source.split}: {done} of {len(source)}", end="", file=sys.stderr, flush=True)
            yield result
    if sys.stderr.isatty():
        print(file=sys.stderr)


def _fault(file: str, error: DataError) -> Fault:
    """A message "file: what; next step" as a row of the table."""
    text = str(error).removeprefix(f"{file}: ") if file else str(error)
    what, _, fix = text.rpartition("; ")
    return Fault(file, what or text, fix if what else "")


def likely_reason(labels: LabelSpace, pixels: NDArray[np.int64], unknown: Iterable[str]) -> list[str]:
    """A line to paste into the data set file for the usual mistakes, or nothing."""
    values = set(unknown)
    classes = labels.num_classes
    if values == {"255"} and classes == 2 and not pixels[1:].any():
        return ["the masks hold 0 and 255: write `label_map: {0: 0, 255: 1}` and `ignore: []` in the data set file"]
    if values == {str(classes)} and not pixels[0]:
        table = ", ".join(f"{c + 1}: {c}" for c in range(classes))
        return [f"ids seem to start at 1: write `label_map: {{{table}}}` in the data set file"]
    return []


def _as_json(data: Data, report: Report) -> str:
    faults = [{"split": split, **asdict(fault)} for split, fault in report.faults]
    result = {"dataset": data.name, "pairs": report.pairs, "faults": faults, "hints": report.hints}
    return json_module.dumps({**result, "fault_count": report.count, "ok": not report.count}, indent=2)


def _as_table(data: Data, report: Report) -> str:
    opened = ", ".join(f"{split} {pairs}" for split, pairs in report.pairs.items()) or "no"
    unit = "pair" if sum(report.pairs.values()) == 1 else "pairs"
    warnings = len(report.faults) - report.count
    lines = [f"{data.name}: opened {opened} {unit}; {several(report.count, 'fault')}, {several(warnings, 'warning')}"]
    rows = [("", "split", "file", "what", "fix")] if report.faults else []
    root = os.path.commonpath([f.file for _, f in report.faults if os.sep in f.file] or [os.sep])
    for split, fault in sorted(report.faults, key=lambda row: row[1].warning):
        file = os.path.relpath(fault.file, os.path.dirname(root)) if os.sep in fault.file else fault.file
        rows.append(("warning" if fault.warning else "FAULT", split, file, fault.what, fault.fix))
    lines += [f"paths below {os.path.dirname(root)}"] if len(root) > 1 else []
    lines += _aligned(rows)
    lines += [f"note: {hint}" for hint in report.hints]
    return "\n".join(lines)


def _stats_table(summary: dict[str, Any]) -> str:
    lines = [
        f"{summary['dataset']}/{summary['split']}: {several(summary['images'], 'image')}, "
        f"{summary['labelled_pixels']} labelled pixels, {summary['ignored_share']:.2%} ignored",
        f"pixels in [0, 1]: mean {summary['mean']}, standard deviation {summary['std']}",
    ]
    rows = [("id", "class", "pixels", "share", "images", "median_frequency", "enet")]
    weights = zip(summary["median_frequency"], summary["enet"])
    for c, (median, log) in zip(summary["classes"], weights):
        rows.append(
            (str(c["id"]), c["name"], str(c["pixels"]), f"{c['share']:.2%}", str(c["images"]), f"{median:.4f}",
             f"{log:.4f}")
        )  # fmt: skip
    lines += _aligned(rows)
    lines += [f"head.class_weights: {summary[kind]}  # {kind}" for kind in ("median_frequency", "enet")]
    return "\n".join(lines)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
