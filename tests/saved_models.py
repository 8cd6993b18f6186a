"""Small saved models for tests of the verbs."""

import dataclasses
import json
from pathlib import Path

import torch
import yaml

from protoseg.config import Data, Evaluation, Head, Model, Recipe
from protoseg.data import synthetic
from protoseg.models import build, saving

SMALL = Data(name="synthetic", crop_size=(40, 56), length=32, workers=0, limit=5)


def save_small(folder: Path, kind: str = "prototype", names=synthetic.LABELS.names, **meta) -> Path:
    """An untrained `tiny` model in `folder`, with the classes of `synthetic` unless told otherwise."""
    torch.manual_seed(0)
    head = Head(kind=kind, num_prototypes=3, embed_dim=8)
    segmenter = build(Model(network="tiny"), head, len(names))
    palette = [list(c) for c in synthetic.LABELS.palette][: len(names)] if len(names) <= 7 else None
    return saving.save(segmenter, folder, {"names": list(names), "palette": palette, **meta})


def small_run(run: Path, data: Data = SMALL, evaluation: Evaluation | None = None) -> Path:
    """A run folder as `train` leaves it: recipe and final model."""
    save_small(run / "final")
    recipe = Recipe(data=data, evaluation=evaluation or Evaluation(), out=str(run))
    (run / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(recipe)))))
    return run
