"""One rank of the test of scoring over ranks.

    python scoring_worker.py RANK FOLDER

Three ranks first, then the first two of them, score splits of 1 to 9 images; each takes every world-th image.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from protoseg.config import Evaluation
from protoseg.engine.scoring import Scores, score

LARGEST = 9


class Painter(nn.Module):
    """A segmenter whose class scores are the colours."""

    def __init__(self) -> None:
        super().__init__()
        self.head: Any = nn.Module()
        self.head.num_classes, self.head.ignore_index = 3, 255
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return images.float() / 20


def batches(count: int, rank: int = 0, world: int = 1) -> Iterator[dict[str, Any]]:
    for i in range(rank, count, world):
        draw = torch.Generator().manual_seed(i)
        image = torch.randint(0, 256, (1, 3, 9, 7 + i), generator=draw, dtype=torch.uint8)
        label = torch.randint(0, 3, (1, 9, 7 + i), generator=draw)
        label[0, 0, 0] = 255
        yield {"image": image, "label": label, "name": [str(i)]}


def scores(count: int, rank: int = 0, world: int = 1) -> Scores:
    return score(Painter(), batches(count, rank, world), Evaluation(), boundary=True, calibration=True)  # type: ignore[arg-type]


if __name__ == "__main__":
    warnings.simplefilter("error")
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    for world in (3, 2):
        if rank < world:
            dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
            for count in range(1, LARGEST + 1):
                seen = scores(count, rank, world)
                torch.save(
                    (seen.matrix, seen.boundary_iou, seen.calibration_error), folder / f"{world}-{count}-{rank}.pt"
                )
            dist.destroy_process_group()
