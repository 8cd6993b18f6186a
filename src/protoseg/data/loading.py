"""Batches that are a pure function of (seed, epoch, step), for any number of ranks, and a loader that can continue.

The order is GLOBAL: epoch e shuffles all items once, optimiser step t takes the t-th global batch of that order, and
each micro-batch of each rank is a slice of it. Ranks, accumulation and restarts change who reads an item, never which
items make a step. No `DistributedSampler`: it pads, so that some images count twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from protoseg.config import DataError, UserError
from protoseg.data.dataset import Sample, SegmentationDataset

PATIENCE = 300.0  # seconds without a batch before a loader process counts as hung
Batch = dict[str, Any]


class BatchOrder(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one rank as lists of (epoch, index).

    Args:
        items: number of items.
        batch: items per rank and micro-batch.
        accumulate: micro-batches per optimiser step. The epoch ends where no whole global batch
            (batch * world * accumulate) is left.

    `epoch` and `start` (in micro-batches) say what the next iteration gives.
    """

    def __init__(self, items: int, batch: int, seed: int, rank: int = 0, world: int = 1, accumulate: int = 1) -> None:
        if batch < 1 or accumulate < 1 or not 0 <= rank < world or seed < 0:
            raise UserError(
                f"batch {batch}, accumulate {accumulate}, rank {rank} of {world}, seed {seed}: not possible"
            )
        if items < batch * world * accumulate:
            raise UserError(
                f"{items} training pairs do not fill one global batch of {batch * world * accumulate}; "
                "lower batch_size or add data"
            )
        self.items, self.batch, self.seed, self.rank, self.world = items, batch, seed, rank, world
        self.accumulate = accumulate
        self.epoch, self.start = -1, 0

    def __len__(self) -> int:
        return self.items // (self.batch * self.world * self.accumulate) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, epoch = epoch_order(self.items, self.seed, self.epoch), self.epoch
        for step in range(self.start, len(self)):
            first = (step * self.world + self.rank) * self.batch
            yield [(epoch, int(index)) for index in order[first : first + self.batch]]


def epoch_order(items: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """All items in the order of one epoch; the fourth word keeps it apart from `transforms.generator`."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, 0, 1]))).permutation(items)


class Place:
    """How far batches of an order have been handed out, to be saved with a checkpoint and continued from.

    Lightning alone replays batches after a restart. Here the main process counts the batches it has handed out, and
    `state_dict` is that place in items, so that it means the same on another number of ranks.
    """

    order: BatchOrder
    consumed: int = 0
    _resume: tuple[int, int] | None = None

    def _begin(self) -> BatchOrder:
        """Set the order to what the next iteration gives: the rest of a resumed epoch, or the next one."""
        order = self.order
        order.epoch, order.start = self._resume or (order.epoch + 1, 0)
        self._resume, self.consumed = None, order.start
        return order

    def __len__(self) -> int:
        return len(self.order)

    def state_dict(self) -> dict[str, int]:
        """The place as plain numbers: epoch, items of it that were handed out, and what they depend on."""
        order = self.order
        place = self._resume or (max(order.epoch, 0), self.consumed)
        return {
            "epoch": place[0], "items_done": place[1] * order.batch * order.world, "seed": order.seed,
            "items": order.items,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the last batch that was handed out before `state_dict`.

        Raises:
            UserError: the data or the seed are not those of the checkpoint, or the place is not on a global batch.
        """
        order = self.order
        for name, now in (("items", order.items), ("seed", order.seed)):
            if state[name] != now:
                what = "training pairs" if name == "items" else "seed"
                raise UserError(
                    f"the checkpoint was made with {what} {state[name]}, now {now}; resume with the same data and seed "
                    "or start a new run folder"
                )
        done, rest = divmod(state["items_done"], order.batch * order.world)
        if rest or done % order.accumulate:
            raise UserError(
                f"the checkpoint stands after item {state['items_done']}, which no global batch of "
                f"{order.batch * order.world * order.accumulate} ends at; resume with the same batch_size"
            )
        self._resume = (state["epoch"] + 1, 0) if done >= len(order) else (state["epoch"], done)


def of_processes(workers: int, seed: int) -> dict[str, Any]:
    """What every `DataLoader` of the house is given beside its data and its order."""
    return {
        "num_workers": workers,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": workers > 0,
        "timeout": PATIENCE if workers > 0 else 0,
        "generator": torch.Generator().manual_seed(seed),  # else each epoch draws from the global state
    }


class ResumableLoader(Place, DataLoader[Sample]):
    """A loader whose place is saved with the checkpoint. One iteration is one epoch; epochs do not end."""

    def __init__(self, dataset: SegmentationDataset, order: BatchOrder, workers: int) -> None:
        super().__init__(
            dataset,
            batch_sampler=order,
            collate_fn=collate,
            **of_processes(workers, order.seed),
        )
        self.order = order

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self._begin()  # first of all: Lightning stops at len() and never runs what stands after the loop
        for batch in _plain_errors(super().__iter__()):
            self.consumed += 1
            yield batch


class EvaluationLoader(DataLoader[Sample]):
    """One item a batch, in order."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return _plain_errors(super().__iter__())


def training_loader(
    dataset: SegmentationDataset, *, batch: int, seed: int, rank: int = 0, world: int = 1, workers: int = 0,
    accumulate: int = 1,
) -> ResumableLoader:  # fmt: skip
    """Shuffled batches `{"image": (B, 3, h, w) uint8, "label": (B, h, w) int64, "index": (B,) int64, "name": [str]}`.

    Args:
        batch: items per rank and micro-batch; the global batch is batch * world * accumulate.
        workers: loader processes of this rank.

    Raises:
        UserError: fewer items than one global batch.
    """
    return ResumableLoader(dataset, BatchOrder(len(dataset), batch, seed, rank, world, accumulate), workers)


def evaluation_loader(
    dataset: SegmentationDataset, *, rank: int = 0, world: int = 1, workers: int = 0
) -> DataLoader[Sample]:
    """One image a batch; over all ranks every image exactly once, so ranks may differ in length by one."""
    return EvaluationLoader(
        dataset,
        batch_size=1,
        sampler=range(rank, len(dataset), world),
        collate_fn=collate,
        **of_processes(workers, seed=0),
    )


def collate(samples: list[Sample]) -> Batch:
    """Stacks tensors; indices become (B,) int64 and names a list."""
    return {
        "image": torch.stack([s["image"] for s in samples]),
        "label": torch.stack([s["label"] for s in samples]),
        "index": torch.tensor([s["index"] for s in samples]),
        "name": [s["name"] for s in samples],
    }


def _plain_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """A fault in a file, met in a loader process, without that process's traceback in the message."""
    try:
        yield from batches
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
