"""`protoseg info`: what is installed and found here; `protoseg info FOLDER`: what is in a run or a model."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from protoseg.config import DatasetName, DecoderName, HeadName, NetworkName, Recipe, UserError
from protoseg.models import count_parameters, saving
from protoseg.tasks.run_folder import LAST, flat, version_of

LIBRARIES = (
    "protoseg", "torch", "torchvision", "timm", "segmentation-models-pytorch", "transformers", "lightning",
    "torchmetrics", "jsonargparse", "safetensors", "numpy", "pillow",
)  # fmt: skip


def info(folder: str = "", *, recipes: str = "recipes", as_json: bool = False) -> dict[str, Any]:
    """Print what is known about this installation, or about a run or model folder.

    Args:
        folder: a run folder, a model folder (`best`, `final`), or empty for the installation.
        recipes: where recipes are looked for.
        as_json: print JSON instead of text.

    Returns:
        What was printed, as plain data.

    Raises:
        UserError: the folder is neither a run nor a model.
    """
    if not folder:
        found = installation(Path(recipes))
    elif (Path(folder) / saving.WEIGHTS).is_file():
        found = describe_model(Path(folder))
    else:
        found = describe_run(Path(folder))
    print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else as_text(found))
    return found


def installation(recipes: Path) -> dict[str, Any]:
    """Versions, devices, what can be named in a recipe, data sets found through environment variables, recipes."""
    devices = [
        f"cuda:{i} {torch.cuda.get_device_name(i)}, {torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    return {
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in LIBRARIES}},
        "devices": [f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads", *devices],
        "networks": list(get_args(NetworkName)),
        "decoders": list(get_args(DecoderName)),
        "heads": list(get_args(HeadName)),
        "data sets": {name: _dataset(name) for name in get_args(DatasetName)},
        "recipes": [path.as_posix() for path in sorted(recipes.rglob("*.yaml"))],
    }


def _dataset(name: str) -> str:
    if name == "synthetic":
        return "generated, always there"
    variable = f"PROTOSEG_{name.upper()}"
    root = os.environ.get(variable, "")
    if not root:
        return f"not set: {variable} or --data.root"
    return root if Path(root).expanduser().is_dir() else f"{variable} names {root}, which is not there"


def describe_model(folder: Path) -> dict[str, Any]:
    """What a model folder holds: settings, classes, how many numbers learn and how many are only stored.

    Raises:
        UserError: not a whole model.
    """
    segmenter, meta = saving.load(folder)
    config = json.loads((folder / saving.CONFIG).read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        "model folder": str(folder),
        "model": {name: value for name, value in config["model"].items() if value not in (None, "")},
        "head": {name: value for name, value in config["head"].items() if value is not None},
        "classes": dict(enumerate(meta["names"])),
        **{name: value for name, value in meta.items() if name not in ("names", "palette") and value is not None},
        "parameters": count_parameters(segmenter),
    }
    if hasattr(segmenter.head, "distinctness"):
        found["prototypes"] = segmenter.head.distinctness()
    return found


def describe_run(folder: Path) -> dict[str, Any]:
    """What a run folder holds: recipe, last environment, last metrics, and its best or final model.

    Raises:
        UserError: no run there.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder}: neither a run (config.yaml) nor a model ({saving.WEIGHTS}); give runs/NAME")
    recipe = flat(yaml.safe_load(config.read_text(encoding="utf-8")))
    usual = flat(dataclasses.asdict(Recipe()))
    named = {name: value for name, value in recipe.items() if name not in usual or usual[name] != value}
    found: dict[str, Any] = {"run folder": str(folder), "recipe, where not the default": named}
    environment = folder / "env.json"
    if environment.is_file():
        found["environment"] = json.loads(environment.read_text(encoding="utf-8"))[-1]
    found |= _last_metrics(folder / "metrics.csv")
    found["checkpoint"] = str(folder / LAST) if (folder / LAST).is_file() else "none yet"
    for name in ("best", "final"):
        if (folder / name / saving.WEIGHTS).is_file():
            found[name] = describe_model(folder / name)
    return found


def _last_metrics(path: Path) -> dict[str, Any]:
    """The last row of training and of validation; nothing where a run has written none."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    validations = [row for row in rows if "val/miou" in row]
    training = [row for row in rows if "val/miou" not in row]
    return {name: group[-1] for name, group in (("last training", training), ("last validation", validations)) if group}


def as_text(found: Any, indent: str = "") -> str:
    """Nested plain data as indented lines; short lists on one line."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", as_text(value, indent + "  ")]
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            lines += [f"{indent}{name}:", *(as_text(item, indent + "  ") for item in value)]
        elif isinstance(value, list) and sum(len(str(item)) for item in value) > 90:
            lines += [f"{indent}{name}:", *(f"{indent}  {item}" for item in value)]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            shown = f"{shown:,}" if isinstance(shown, int) and not isinstance(shown, bool) else shown
            shown = f"{shown:.4g}" if isinstance(shown, float) else shown
            lines.append(f"{indent}{name}: {shown}")
    return "\n".join(lines)
