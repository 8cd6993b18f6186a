"""Every recipe parses, fits together and builds its network (on the meta device: shapes, no memory)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protoseg.cli import parse, recipe_of
from protoseg.models import build, written_out
from protoseg.tasks.machine import Machine
from protoseg.tasks.training import check

RECIPES = Path(__file__).parents[1] / "recipes"
CLASSES = {"ade20k": 150, "cityscapes": 19, "coco_stuff_10k": 171, "camvid": 11, "synthetic": 7}
CELLS = {
    f"{data}-{network}"
    for data in ("ade20k", "cityscapes", "coco-stuff-10k")
    for network in ("fcn-resnet101", "hrnetv2-w48", "upernet-swin-base", "segformer-mit-b4")
}


def read(path: Path):
    return recipe_of(parse(["train", "--config", str(path)])[1])


@pytest.mark.parametrize(
    "path", sorted([*RECIPES.glob("*.yaml"), *(RECIPES / "paper").glob("*.yaml")]), ids=lambda p: p.stem
)
def test_a_recipe_parses_and_builds(path):
    recipe = read(path)
    check(recipe)
    with torch.device("meta"):
        segmenter = build(replace(recipe.model, pretrained=False, weights=""), recipe.head, CLASSES[recipe.data.name])
    assert segmenter.head.num_classes == CLASSES[recipe.data.name]


@pytest.mark.parametrize("cell", sorted(CELLS))
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_fewer_devices_accumulate_to_the_same_global_batch(cell, devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    recipe = read(RECIPES / "paper" / f"{cell}.yaml")
    machine = Machine.of(recipe)
    assert machine.world * machine.micro_batch * machine.accumulate == recipe.batch_size
    assert machine.world == devices


def test_the_papers_twelve_cells_are_all_there():
    assert {path.stem for path in (RECIPES / "paper").glob("*.yaml")} == CELLS


def test_the_papers_protocol():
    """Optimiser, schedule, crop, batch and test protocol of the published runs."""
    recipes = {cell: read(RECIPES / "paper" / f"{cell}.yaml") for cell in CELLS}
    for cell, recipe in recipes.items():
        small = not cell.startswith("cityscapes")
        assert recipe.batch_size == (16 if small else 8)
        assert recipe.data.crop_size == ((512, 512) if small else (768, 768))
        assert recipe.steps == (80_000 if cell.startswith("coco") else 160_000)
        assert recipe.evaluation.mode == ("whole" if small else "slide")
        assert written_out(recipe.head).momentum == 0.999
        assert written_out(recipe.head).update_from == "all"
        assert recipe.head.num_prototypes == 10
        convolutional = "fcn" in cell or "hrnet" in cell
        assert (recipe.optim.name, recipe.optim.lr) == (("sgd", 0.01) if convolutional else ("adamw", 6e-5))
        assert recipe.optim.warmup_steps == (0 if convolutional else 1500)
        assert recipe.model.pretrained
