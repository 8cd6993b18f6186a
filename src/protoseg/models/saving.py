"""A model as a folder: `model.safetensors` and a readable `config.json`. The folder alone is enough to predict.

Loading is strict and never downloads: every key must be there, of its shape, finite, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from protoseg.config import Head, Model, UserError
from protoseg.models import build, build_head
from protoseg.models.segmenter import Segmenter
from protoseg.models.weights import differences, listed, read_safetensors, refuse_not_finite, reshaped

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = 1
# What a head answers by, beside its tensors.
ANSWERS = ("num_classes", "in_channels", "embed_dim", "distance", "projection_norm", "align_corners", "ignore_index")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


def save(segmenter: Segmenter, folder: str | Path, meta: Mapping[str, Any]) -> Path:
    """Write the model's folder; whoever reads at the same time, or after a crash, finds the old or the new one whole.

    Args:
        segmenter: built by `models.build`; may be on any device.
        folder: made if needed. In an existing folder only the model's own two files are replaced.
        meta: plain data; `names` (C class names) is required, `palette` (C RGB triples), `base_size` and whatever
            prediction needs to know are kept as they are. `ignore_index` is the head's unless given.

    Raises:
        UserError: a segmenter that `build` did not make, or whose head has been exchanged or frozen since, names that
            are not C, weights that are not finite, a folder that cannot be written.
    """
    folder = Path(folder)
    config = _config(segmenter, meta)
    state = {key: value.detach().cpu().contiguous() for key, value in segmenter.state_dict().items()}
    refuse_not_finite(state, "the model cannot be saved, its weights are broken; go back to an earlier checkpoint")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            save_file(state, fresh / WEIGHTS, metadata={"format": "pt"})
            (fresh / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            fresh.chmod(0o777 & ~_umask())
            if folder.is_dir() and any(folder.iterdir()):
                for name in (WEIGHTS, CONFIG):
                    os.replace(fresh / name, folder / name)
            else:
                os.replace(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as fault:
        raise UserError(f"{folder}: the model cannot be written ({fault}); choose another folder") from fault
    return folder


def load(folder: str | Path) -> tuple[Segmenter, dict[str, Any]]:
    """The model of a folder, in eval mode on the CPU, and its meta data (`names` and `palette` as tuples).

    Raises:
        UserError: files missing, damaged, of another format, a pickle in place of safetensors, keys missing (a missing
            `head.prototypes` is named), unexpected or of another shape, values that are not finite.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        found = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES) if folder.is_dir() else []
        if found:
            raise UserError(f"{folder}: {listed(found)} is a pickle, which can run code; only {WEIGHTS} is loaded")
        raise UserError(f"{folder}: no {WEIGHTS} here; give the folder of a saved model, such as runs/NAME/best")
    config = _read_config(folder / CONFIG)
    model = _settings(Model, config["model"], folder / CONFIG)
    head = _settings(Head, config["head"], folder / CONFIG)
    meta = config["meta"]
    names = meta["names"]
    # The saved weights are the whole model: nothing of the backbone is fetched.
    bare = dataclasses.replace(model, pretrained=False, weights="")
    segmenter = build(bare, head, len(names), meta["ignore_index"])
    _load_state(segmenter, folder / WEIGHTS)
    segmenter.settings = (model, head)
    for name in ("mean", "std"):
        getattr(segmenter, name).copy_(torch.tensor(config[name]).view(1, 3, 1, 1))
    return segmenter.eval(), meta


def _config(segmenter: Segmenter, meta: Mapping[str, Any]) -> dict[str, Any]:
    if segmenter.settings is None:
        raise UserError("only a segmenter made by models.build can be saved: its settings are not known")
    model, head = segmenter.settings
    model = dataclasses.replace(model, weights=Path(model.weights).name)  # where it lay is nobody else's business
    names = list(meta.get("names", ()))
    if len(names) != segmenter.head.num_classes:
        raise UserError(f"meta['names'] has {len(names)} class names but the head {segmenter.head.num_classes} classes")
    kept = {"ignore_index": segmenter.head.ignore_index, **meta, "names": names}
    if kept["ignore_index"] != segmenter.head.ignore_index:
        raise UserError(f"meta says ignore_index {kept['ignore_index']} but the head {segmenter.head.ignore_index}")
    _check_head(segmenter.head, head)
    config = {
        "format": FORMAT,
        "library": "protoseg",
        "model": dataclasses.asdict(model),
        "head": dataclasses.asdict(head),
        "mean": segmenter.mean.flatten().tolist(),
        "std": segmenter.std.flatten().tolist(),
        "meta": kept,
    }
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as fault:
        raise UserError(f"meta must be plain data (numbers, text, lists, dicts): {fault}") from fault


def _check_head(head: nn.Module, settings: Head) -> None:
    """
    Raises:
        UserError: it is not what the settings make.
    """
    with torch.device("meta"):  # no value is drawn
        fresh = build_head(settings, head.in_channels, head.num_classes, head.ignore_index)  # type: ignore[arg-type]
    if type(head) is not type(fresh):
        raise UserError(
            f"the head is a {type(head).__name__}, but its settings make a {type(fresh).__name__}: the folder could "
            "not be loaded; save the segmenter that models.build made, and freeze or exchange its head afterwards"
        )
    shapes, others = ({name: value.shape for name, value in one.state_dict().items()} for one in (head, fresh))
    wrong = sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
    wrong += [name for name in ANSWERS if getattr(head, name, None) != getattr(fresh, name, None)]
    if wrong:
        raise UserError(
            f"the head differs from its settings in {listed(wrong)}: another model would be loaded; build it anew with "
            "models.assemble"
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not there; a saved model has {CONFIG} beside {WEIGHTS}") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as fault:
        raise UserError(f"{path}: not readable as JSON ({fault}); save the model again") from fault
    again = "save the model again with this version"
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        given = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{path}: expected format {FORMAT}, given {given!r}; {again}")
    for key, kind in {"model": dict, "head": dict, "meta": dict, "mean": list, "std": list}.items():
        if not isinstance(config.get(key), kind):
            raise UserError(f"{path}: {key!r} must be a {kind.__name__}; {again}")
    for key in ("mean", "std"):
        if len(config[key]) != 3 or not all(isinstance(v, int | float) and math.isfinite(v) for v in config[key]):
            raise UserError(f"{path}: {key!r} must be three numbers, given {config[key]}; {again}")
    if not all(config["std"]):
        raise UserError(f"{path}: 'std' must not be 0, given {config['std']}; {again}")
    meta = config["meta"]
    names = meta.get("names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: meta.names must list the class names; {again}")
    if not isinstance(meta.get("ignore_index"), int):
        raise UserError(f"{path}: meta.ignore_index must be a whole number; {again}")
    meta["names"] = tuple(names)
    if meta.get("palette") is not None:
        meta["palette"] = _palette(meta["palette"], len(names), path)
    return config


def _palette(palette: Any, count: int, path: Path) -> tuple[tuple[int, ...], ...]:
    good = isinstance(palette, list) and len(palette) == count
    for colour in palette if good else ():
        good &= isinstance(colour, list) and len(colour) == 3
        good = good and all(isinstance(v, int) and 0 <= v <= 255 for v in colour)
    if not good:
        raise UserError(f"{path}: meta.palette must be {count} colours of three numbers 0..255; save the model again")
    return tuple(tuple(colour) for colour in palette)


def _settings(kind: type[Any], given: dict[str, Any], path: Path) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise UserError(f"{path}: {kind.__name__} has no setting {listed(unknown)}; it was saved by another version")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _load_state(segmenter: Segmenter, path: Path) -> None:
    state = read_safetensors(path)
    wanted = segmenter.state_dict()
    missing, extra = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    fault = differences(list(missing), list(extra), reshaped(state, wanted))
    if fault:
        # By name, wherever it stands in the list: without it the head would classify by random prototypes.
        lost = "head.prototypes is missing; " if "head.prototypes" in missing else ""
        raise UserError(f"{path} does not fit its {CONFIG}: {lost}{fault}; save the model again")
    refuse_not_finite(state, f"{path} is broken; use another checkpoint")
    segmenter.load_state_dict(state, strict=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
