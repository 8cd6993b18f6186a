"""A whole training split in memory, decoded once, and batches cut from it where the network runs.

For sets that fit: CamVid's 367 pairs are 254 MB. The samples are those of the files (`transforms`), in the same order,
of the same place after a restart. On the CPU they are equal to the bit; on a GPU whole batches are cut by
`augment.cut_batch`, labels equal and colours to rounding, and no picture crosses the bus.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from protoseg.config import Data, DataError
from protoseg.data import augment, transforms
from protoseg.data.catalog import Source
from protoseg.data.dataset import read
from protoseg.data.images import FORMATS
from protoseg.data.loading import Batch, BatchOrder, Place, of_processes
from protoseg.data.transforms import Cut

SPARE = 0.5  # share of the free memory that a set may take: the rest is for the network and its batches
AHEAD = 2  # batches that threads work on before they are asked for
Pair = tuple[int, int]  # epoch, index
Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Pictures:
    """P pixels of N pictures of any sizes, one after the other.

    Args:
        images: (P, 3) uint8 RGB, on the device that cuts the samples.
        labels: (P,) train ids, uint8 where they fit, else int32; on the same device.
        host_labels: the same on the CPU, where samples are drawn; the same tensor where that is the device.
        first: of each picture, its first pixel.
        sizes: of each picture, (height, width).
    """

    images: Tensor
    labels: Tensor
    host_labels: Tensor
    first: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]

    def image(self, index: int) -> Tensor:
        """(3, H, W) uint8, a view."""
        return self._cut(self.images, index).permute(2, 0, 1)

    def label(self, index: int) -> Tensor:
        """(H, W), a view, on the CPU."""
        return self._cut(self.host_labels, index)

    def _cut(self, block: Tensor, index: int) -> Tensor:
        height, width = self.sizes[index]
        return block[self.first[index] : self.first[index] + height * width].view(height, width, *block.shape[1:])


def load(source: Source, device: torch.device, workers: int = 0) -> Pictures:
    """Decode all pairs of a source.

    Args:
        workers: threads that decode.

    Raises:
        DataError: a file that cannot be used, named; or a set that does not fit, before anything is decoded.
    """
    narrow = source.labels.ignore_index <= 255 and source.labels.num_classes <= 256
    kind = torch.uint8 if narrow else torch.int32
    pixels = sum(sizes_of(source))
    refuse_too_large(source, pixels, 3 + kind.itemsize, device)
    images, labels = torch.empty(pixels, 3, dtype=torch.uint8), torch.empty(pixels, dtype=kind)
    first, sizes, end = [], [], 0
    for image, label in _ahead(lambda index: read(source, index), range(len(source)), workers, 4 * workers):
        first.append(end)
        sizes.append((label.shape[0], label.shape[1]))
        end += label.size
        images[first[-1] : end] = torch.from_numpy(image.reshape(-1, 3))
        labels[first[-1] : end] = torch.from_numpy(label.reshape(-1))
    assert end == pixels, "a picture changed while it was read"
    return Pictures(images.to(device), labels.to(device), labels, tuple(first), tuple(sizes))


def sizes_of(source: Source) -> Iterator[int]:
    """The number of pixels of each picture, from the headers of the files."""
    for index in range(len(source)):
        if source.scenes is not None:
            yield source.scenes.size[0] * source.scenes.size[1]
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # `read` is stricter, and says more
                with Image.open(source.images[index], formats=FORMATS) as image:
                    yield image.width * image.height
        except Exception:  # whatever a parser stumbles over; `read` names the file and the fault
            yield read(source, index)[1].size


def refuse_too_large(source: Source, pixels: int, each: int, device: torch.device) -> None:
    """Raises: DataError: `pixels` of `each` bytes take more than half of what is free."""
    free = free_memory(device)
    if free is not None and pixels * each > SPARE * free:
        raise DataError(
            f"data.resident: the {len(source)} pairs of {source.name}/{source.split} are {pixels * each / 1e9:.2f} GB "
            f"when decoded, more than half of the {free / 1e9:.2f} GB free on {device}; "
            "set data.resident false, or make the files smaller"
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


class Draws(Dataset[Cut]):
    """What is random about samples of pictures in memory; nothing of it is on a GPU, so loader processes can have it.

    `draws[(epoch, index)]` is one sample's cut; a `DataLoader` asks for a whole batch at once and gets what
    `augment.cut_batch` needs of it: the pairs, their `augment.numbers` and `augment.window`.
    """

    def __init__(self, pictures: Pictures, data: Data, ignore_index: int, seed: int) -> None:
        labels = pictures.host_labels
        self.pictures = replace(pictures, images=labels.new_empty(0, 3), labels=labels)
        self.data = data
        self.ignore_index = ignore_index
        self.seed = seed

    def __getitem__(self, pair: Pair) -> Cut:
        epoch, index = pair
        return transforms.draw_cut(self.pictures.label(index), self.data, self.ignore_index, self.seed, epoch, index)

    def __getitems__(self, pairs: list[Pair]) -> tuple[list[Pair], Tensor, tuple[int, int]]:
        cuts = [self[pair] for pair in pairs]
        sizes = [self.pictures.sizes[index] for _, index in pairs]
        numbers = augment.numbers(cuts, [self.pictures.first[index] for _, index in pairs], sizes)
        return pairs, numbers, augment.window(cuts, sizes, self.data.crop_size)


def draw_loader(draws: Draws, order: BatchOrder, workers: int) -> DataLoader[Cut]:
    """Batches of draws, in order, by so many processes."""
    return DataLoader(draws, batch_sampler=order, collate_fn=_as_it_is, **of_processes(workers, order.seed))


class ResidentLoader(Place):
    """`loading.ResumableLoader` over pictures in memory: the same batches, the same place.

    Batches are `{"image": (B, 3, h, w) uint8, "label": (B, h, w) int64, "index": (B,) int64, "name": [str]}`, tensors
    on the device of the pictures.

    Args:
        pictures: of `load`, for the same source.
        data: how samples are cut.
        order: which items make a batch.
        workers: on the CPU threads, which prepare whole samples ahead; for a GPU processes, which draw what is random
            in them: threads would take the interpreter away from the one that launches the network's kernels.

    Attributes:
        cuts: the loader of the draws, whose processes a GPU has.
    """

    def __init__(self, source: Source, pictures: Pictures, data: Data, order: BatchOrder, workers: int = 0) -> None:
        transforms.check_training(data)
        self.source = source
        self.pictures = pictures
        self.crop_size = data.crop_size
        self.order = order
        self.workers = workers
        self.draws = Draws(pictures, data, source.labels.ignore_index, order.seed)
        self.cuts = draw_loader(self.draws, order, 0 if pictures.images.device.type == "cpu" else workers)

    def __iter__(self) -> Iterator[Batch]:
        order = self._begin()
        on_cpu = self.pictures.images.device.type == "cpu"
        for made in self._cut_one_by_one(order) if on_cpu else self._cut_together():
            self.consumed += 1
            yield made

    def _cut_one_by_one(self, order: BatchOrder) -> Iterator[Batch]:
        """On a CPU a picture that stays in the cache beats a batch that does not."""

        def sample(pair: Pair) -> tuple[Tensor, Tensor]:
            image, label = self.pictures.image(pair[1]), self.pictures.label(pair[1])
            return transforms.apply_cut(image, label, self.draws[pair], self.crop_size, self.draws.ignore_index)

        batches = list(order)
        samples = _ahead(sample, [pair for pairs in batches for pair in pairs], self.workers, AHEAD * order.batch)
        for pairs in batches:
            images, labels = zip(*(next(samples) for _ in pairs))
            yield self._batch(pairs, torch.stack(images), torch.stack(labels).long(), torch.device("cpu"))

    def _cut_together(self) -> Iterator[Batch]:
        device = self.pictures.images.device
        for pairs, numbers, reach in self.cuts:
            image, label = augment.cut_batch(
                self.pictures.images,
                self.pictures.labels,
                to_device(numbers, device),
                crop_size=self.crop_size,
                reach=reach,
                ignore_index=self.draws.ignore_index,
            )
            yield self._batch(pairs, image, label, device)

    def _batch(self, pairs: list[Pair], image: Tensor, label: Tensor, device: torch.device) -> Batch:
        indices = [index for _, index in pairs]
        names = [self.source.stems[index] for index in indices]
        return {"image": image, "label": label, "index": to_device(torch.tensor(indices), device), "name": names}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device, without waiting for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _as_it_is(batch: Made) -> Made:
    """For a loader whose dataset makes batches itself."""
    return batch


def _ahead(function: Callable[[Given], Made], given: Iterable[Given], workers: int, depth: int) -> Iterator[Made]:
    """`map`, in order, with threads that are at most `depth` items ahead."""
    if workers < 1:
        yield from map(function, given)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Made]] = deque()
        try:
            for item in given:
                waiting.append(pool.submit(function, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
