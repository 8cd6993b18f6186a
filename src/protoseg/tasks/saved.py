"""Finding a saved model, the settings of the run it came from, and where to compute."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml

from protoseg.config import Evaluation, UserError
from protoseg.models import saving


def model_folder(folder: str | Path) -> Path:
    """The model folder itself; of a run folder, `final` if it is there, else `best`.

    Raises:
        UserError: neither.
    """
    folder = Path(folder)
    for candidate in (folder, folder / "final", folder / "best"):
        if (candidate / saving.WEIGHTS).is_file():
            return candidate
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give a run or model folder, such as runs/NAME or runs/NAME/best")
    if (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder}: the run has saved no model yet; wait for a validation or continue it (--resume auto)"
        )
    return folder  # models.saving says what is missing


def recorded(folder: Path) -> dict[str, Any]:
    """The `config.yaml` of the run a model folder lies in, as plain data; empty if it lies in none.

    Raises:
        UserError: the file is not a YAML mapping.
    """
    path = folder.absolute().parent / "config.yaml"
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
        raise UserError(f"{path}: not readable ({str(fault).splitlines()[0]}); repair or remove it") from fault
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected settings, found {type(content).__name__}; repair or remove it")
    return content


def settings_of(kind: type[Any], given: Any, where: str) -> Any:
    """A settings dataclass from plain data; lists become tuples.

    Raises:
        UserError: a key this version does not know.
    """
    known = {f.name for f in dataclasses.fields(kind)}
    if not isinstance(given, dict) or given.keys() - known:
        unknown = ", ".join(sorted(given.keys() - known)) if isinstance(given, dict) else type(given).__name__
        raise UserError(f"{where}: {kind.__name__.lower()} has no setting {unknown}; it was written by another version")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def recorded_evaluation(folder: Path, meta: dict[str, Any]) -> Evaluation:
    """How the model was validated: from its own folder, else from its run, else the default."""
    given = meta.get("evaluation") or recorded(folder).get("evaluation")
    return settings_of(Evaluation, given, str(folder)) if given else Evaluation()


def choose_device(device: str) -> torch.device:
    """`auto`, `cpu`, `gpu`, or a torch device.

    Raises:
        UserError: not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device("cuda" if device == "gpu" else device)
    except RuntimeError:
        raise UserError(f"device {device!r} is unknown; choose auto, cpu or gpu") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU is visible to torch; choose cpu, or check nvidia-smi")
    return found
