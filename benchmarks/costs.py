"""What each head of a study costs: a whole training step and its peak memory, all under the same conditions.

    python -m benchmarks.costs studies/camvid-heads.yaml [--classes 11] [--rounds 5] [--device cuda] [--json out.json]

A study's own report has the same two numbers of each run as it was; runs side by side slow each other, so those compare
nothing. Here a step is features, losses, backward, the update of the prototypes and the optimiser, at the recipe's
network, batch, crop and optimiser, on random weights, random images and labels in tiles. One thread and process CPU
time (wall time on a GPU), variants interleaved in one process, medians; a ratio is the median of the rounds' ratios.
The peak is what a second step adds, in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.head import machine, ratio, record, timed
from benchmarks.step import second_peak
from protoseg.cli import parse, study_plan
from protoseg.config import Recipe
from protoseg.engine.optim import build_optimizer
from protoseg.models import build
from protoseg.models.segmenter import count_parameters
from protoseg.tasks.study_plan import variants_of


def recipes(study: Path) -> dict[str, Recipe]:
    """Variant -> its recipe, without weights to load."""
    plan, made = study_plan(parse(["study", study.stem, "--config", str(study)])[1])
    same = {**plan.overrides, "model.pretrained": False, "model.weights": ""}
    return {name: made({**same, **changed}) for name, changed in variants_of(plan).items()}


def batch(recipe: Recipe, classes: int, device: str) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) uint8 images and (B, H, W) labels: 8 x 8 tiles of all classes."""
    g = torch.Generator().manual_seed(0)
    height, width = recipe.data.crop_size
    images = torch.randint(0, 256, (recipe.batch_size, 3, height, width), generator=g, dtype=torch.uint8)
    tiles = torch.randint(classes, (recipe.batch_size, 1, 8, 8), generator=g)
    labels = F.interpolate(tiles.double(), size=(height, width)).long()[:, 0]
    return images.to(device), labels.to(device)


class Step:
    """One training step of a variant."""

    def __init__(self, recipe: Recipe, classes: int, device: str):
        torch.manual_seed(0)
        self.model = build(recipe.model, recipe.head, classes).to(device).to(memory_format=torch.channels_last).train()
        self.optimizer = build_optimizer(self.model, recipe.optim)
        self.images, self.labels = batch(recipe, classes, device)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        losses = self.model.losses(self.images, self.labels)
        losses.total.backward()
        self.model.update(losses)
        self.optimizer.step()


def own_process(name: str, arguments: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.costs", str(arguments.study), "--peak-of", name]
    command += ["--classes", str(arguments.classes), "--device", arguments.device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Variant -> its numbers; `over the first` compares with the study's first variant."""
    steps = {name: Step(r, arguments.classes, arguments.device) for name, r in recipes(arguments.study).items()}
    counted = {name: count_parameters(step.model) for name, step in steps.items()}
    seconds = timed(dict(steps), arguments.rounds, arguments.device)
    first = next(iter(steps))
    return {
        name: {
            "learnable": counted[name]["learnable"],
            "stored": counted[name]["prototypes"],
            "ms/step": 1e3 * statistics.median(seconds[name]),
            "over the first": ratio(seconds[name], seconds[first]),
            "peak MB": own_process(name, arguments),
        }
        for name in steps
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--classes", type=int, default=11)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default="")
    parser.add_argument("--peak-of", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak_of:
        step = Step(recipes(arguments.study)[arguments.peak_of], arguments.classes, arguments.device)
        print(second_peak(step, step.optimizer, arguments.device))
        return
    found = measure(arguments)
    columns = next(iter(found.values()))
    print(f"| head | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in found.items():
        cells = (f"{value:,.2f}" if column == "over the first" else f"{value:,.0f}" for column, value in row.items())
        print(f"| {name} | {' | '.join(cells)} |")
    record(arguments.json, machine(arguments.device), results=found)


if __name__ == "__main__":
    main()
