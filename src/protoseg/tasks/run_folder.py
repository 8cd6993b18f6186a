"""The folder of a run: whose it is, what it records, and whether a run may go on in it.

    runs/NAME/
      config.yaml            the recipe, whole; `protoseg train --config` takes it again
      env.json               versions, machine, global batch, sizes of the data set
      metrics.csv            losses, learning rate, time per step; validation
      tensorboard/           the same for TensorBoard
      checkpoints/last.ckpt  to continue this run, and for nothing else
      best/                  the model folder with the highest validation mIoU
      final/                 the model folder of the last step: what tables of test results use

`best/` is chosen on the validation split, so its mIoU there is optimistic; `final/` is chosen by nobody.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from protoseg.config import DataError, Head, Recipe, UserError
from protoseg.data.catalog import Source
from protoseg.engine.checkpoints import read_checkpoint
from protoseg.models import written_out
from protoseg.tasks.machine import Machine

LAST = Path("checkpoints", "last.ckpt")
LOCK = ".lock"
# What may differ between a run and its continuation. A longer `steps` stretches the schedule from there on,
# `evaluation` changes later validations; the rest changes no number.
FREE = (
    *("steps", "out", "resume", "devices", "nodes", "micro_batch", "accelerator"),
    *("val_every", "checkpoint_every", "checkpoint_minutes", "log_every", "evaluation"),
    *("data.root", "data.file", "data.workers", "data.cache", "data.max_pixels"),
    *("model.pretrained", "model.weights"),
)


class TooSmall(UserError):
    """Batches that the network cannot be trained on; known at the first step only."""


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep a second training out of a run folder. The lock dies with the process, so a killed run leaves none behind.

    Raises:
        UserError: another process trains there, or the folder cannot be written.
    """
    import fcntl  # not on Windows, where torch's data-parallel training is not either

    made = not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / LOCK, "w")  # noqa: SIM115 - held until the end of the run
    except OSError as fault:
        raise UserError(f"{run}: cannot write the run folder ({fault}); choose another with --out") from fault
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            raise UserError(f"{run}: another training is running in this folder; choose another with --out") from fault
        refused = False
        try:
            yield
        except (DataError, TooSmall):
            refused = True
            raise
        finally:
            (run / LOCK).unlink(missing_ok=True)
            # refused before anything was written, or by a picture or a network before anything was learned worth a
            # second look
            if made and (not _holds(run) or (refused and not _begun(run))):
                shutil.rmtree(run, ignore_errors=True)


def _holds(run: Path) -> bool:
    return run.is_dir() and any(path.name != LOCK for path in run.iterdir())


def _begun(run: Path) -> bool:
    return any((run / name).exists() for name in (LAST, "metrics.csv", "best", "final"))


def resume_from(recipe: Recipe, first: bool = True) -> Path | None:
    """The checkpoint to continue from, None for a new run.

    Args:
        recipe: `out` and `resume` of it.
        first: whether this is rank 0; the others come when it has made the folder.

    Raises:
        UserError: the folder holds a run and `resume` does not say to continue it, or there is no such checkpoint.
    """
    run = Path(recipe.out)
    if recipe.resume == "auto":
        return run / LAST if (run / LAST).is_file() else None
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file; choose another run folder with --out")
    if recipe.resume:
        given = Path(recipe.resume)
        if not given.is_file():
            raise UserError(f"{given}: no such checkpoint; --resume takes `auto` or the path of a .ckpt file")
        if run.resolve() in given.resolve().parents or not _holds(run):
            return given
        raise UserError(f"{run} holds another run than {given}; choose a new folder with --out")
    if first and _holds(run):
        raise UserError(f"{run} is not empty; continue it with --resume auto or choose another folder with --out")
    return None


def settings_to_keep(recipe: Recipe, machine: Machine) -> dict[str, Any]:
    """The settings a continued run must share with the one that wrote the checkpoint, as flat plain data."""
    kept = {name: value for name, value in written(recipe).items() if not _free(name)}
    return {**kept, "accumulate": machine.accumulate}


def _free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE)


def written(recipe: Recipe) -> dict[str, Any]:
    """Every setting by its dotted name, the head's with what its preset says."""
    return flat(dataclasses.asdict(dataclasses.replace(recipe, head=written_out(recipe.head))))


def usual(kept: dict[str, Any]) -> dict[str, Any]:
    """What settings that did not exist when `kept` was written are taken to have been."""
    names = {name: kept[f"head.{name}"] for name in ("kind", "preset") if f"head.{name}" in kept}
    return written(Recipe(head=Head(**names)))


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": (1, 2)}} -> {"a.b": [1, 2]}"""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def check_resume(checkpoint: Path, settings: dict[str, Any], steps: int) -> int:
    """The optimiser step a checkpoint continues from.

    Raises:
        UserError: it is not a checkpoint, of other settings, or beyond the end of the run.
    """
    content = read_checkpoint(checkpoint)
    kept: dict[str, Any] = next(
        (state["settings"] for state in content["callbacks"].values() if "settings" in state), {}
    )
    before = usual(kept) | kept
    changed = [
        f"{name} was {before.get(name)!r}, now {value!r}"
        for name, value in sorted(settings.items())
        if before.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{checkpoint} continues only with its own settings: {'; '.join(changed)}. "
            "Put them back or start a new run with --out"
        )
    step = int(content["global_step"])
    if step > steps:
        raise UserError(f"{checkpoint} is at step {step}, beyond steps {steps}; raise steps or start a new run")
    return step


def start_folder(recipe: Recipe, run: Path, machine: Machine, training: Source, validation: Source | None) -> None:
    """Write `config.yaml` and `env.json`; when a run continues, the earlier environments stay in the list."""
    (run / LAST).parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(dataclasses.asdict(recipe)))  # tuples become lists: plain YAML
    header = "# protoseg train --config THIS_FILE --out NEW_FOLDER\n"
    (run / "config.yaml").write_text(header + yaml.safe_dump({**settings, "resume": ""}, sort_keys=False))
    path = run / "env.json"
    earlier = json.loads(path.read_text()) if path.is_file() else []
    path.write_text(json.dumps([*earlier, environment(recipe, machine, training, validation)], indent=2) + "\n")


def environment(recipe: Recipe, machine: Machine, training: Source, validation: Source | None) -> dict[str, Any]:
    """What a number may depend on beside the recipe. No host name, no user name, no paths."""
    libraries = ("protoseg", "torch", "torchvision", "timm", "segmentation-models-pytorch", "lightning", "numpy")
    gpu = torch.cuda.get_device_name() if machine.accelerator == "gpu" else None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in libraries}},
        "platform": platform.platform(),
        "commit": commit(),
        "accelerator": machine.accelerator,
        "device": gpu or platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world": machine.world,
        "global_batch": recipe.batch_size,
        "micro_batch": machine.micro_batch,
        "accumulate": machine.accumulate,
        "train_items": len(training),
        "val_items": len(validation) if validation is not None else 0,
        "classes": training.labels.num_classes,
    }


def version_of(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The git commit of the working directory, with "+changes" if files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
