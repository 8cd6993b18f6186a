"""Items of a source as tensors: read, keep in memory if asked, transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from protoseg.config import DataError
from protoseg.data.catalog import Source
from protoseg.data.images import read_image, read_mask
from protoseg.data.labels import LabelSpace

Sample = dict[str, Any]  # image (3, H, W) uint8, label (H, W) integer, index int, name str
Transform = Callable[[Sample, int, int], Sample]


class SegmentationDataset(Dataset[Sample]):
    """Image and label pairs.

    Args:
        source: which pairs (`catalog.find`).
        transform: called as `transform(sample, epoch, index)`; `None` gives items as they are on disk.
        cache: keep decoded items in memory, in each loader process of its own: H * W * 4 bytes an item. `None`: what
            `data.cache` said when the source was found.

    `dataset[index]` or `dataset[(epoch, index)]` gives a dict: `image` (3, H, W) uint8 RGB, `label` (H, W) int64 train
    ids (all `ignore_index` where the source has no mask), `index`, `name`. An item is a pure function of
    (source, transform, epoch, index), so the loader may read ahead, stop, and continue elsewhere.

    Raises:
        DataError: a file that cannot be used, named.
    """

    def __init__(self, source: Source, transform: Transform | None = None, cache: bool | None = None) -> None:
        self.source = source
        self.transform = transform
        self._kept: dict[int, tuple[Tensor, Tensor]] | None = {} if (source.cache if cache is None else cache) else None

    @property
    def labels(self) -> LabelSpace:
        """The label space of the source."""
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")  # also what ends a plain `for` loop
        image, label = self._item(index)
        sample: Sample = {"image": image, "label": label, "index": index, "name": self.source.stems[index]}
        if self.transform is not None:
            sample = self.transform(sample, epoch, index)
        return {**sample, "label": sample["label"].long()}

    def _item(self, index: int) -> tuple[Tensor, Tensor]:
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        image, label = read(self.source, index)
        # One byte a label where it fits: transforms and memory move an eighth.
        small = label.astype(np.uint8 if self.source.labels.ignore_index <= 255 else np.int32)
        # Pixels stay interleaved in memory (a permuted view): torchvision resizes that four times as fast.
        item = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(small)
        if self._kept is not None:
            self._kept[index] = item
        return item


def read(source: Source, index: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Item `index` as image (H, W, 3) uint8 and train ids (H, W) int64.

    Raises:
        DataError: an unreadable file, unknown label values, or image and mask of different sizes.
    """
    if source.scenes is not None:
        return source.scenes.item(index)
    image = read_image(source.images[index], source.exif, source.max_pixels)
    mask = source.masks[index]
    if mask is None:
        return image, np.full(image.shape[:2], source.labels.ignore_index, dtype=np.int64)
    label = read_mask(mask, source.labels, source.exif, source.max_pixels)
    check_size(source, index, image.shape[:2], label.shape)
    return image, label


def check_size(source: Source, index: int, image: tuple[int, ...], mask: tuple[int, ...]) -> None:
    """Raises `DataError` unless image and mask have the same (height, width)."""
    if image != mask:
        turned = " (turned by 90 degrees: see data.exif)" if image == mask[::-1] else ""
        raise DataError(
            f"{source.masks[index]}: the mask is {mask[0]} x {mask[1]} but its image {source.images[index]} is "
            f"{image[0]} x {image[1]}{turned}; both must have the same size"
        )
