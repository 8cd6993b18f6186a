"""One cell of a study in a process of its own: `python -m protoseg.tasks.study_cell FOLDER`.

The folder is an ordinary run folder with one file more, `cell.json`: what the cell is, written by the study before it
starts, and how far it has come, written here.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from protoseg.config import DataError, Recipe, UserError
from protoseg.tasks.evaluation import evaluate
from protoseg.tasks.files import write_json
from protoseg.tasks.saved import settings_of
from protoseg.tasks.training import train

MARK = "cell.json"


def run_cell(folder: Path) -> None:
    """Train, or continue to, then evaluate every column that has not been.

    Raises:
        UserError, DataError, SystemExit: as `train` and `evaluate`; what was reached is in `cell.json`.
    """
    state = read_state(folder)
    recipe = recipe_from(state["recipe"], folder / MARK)
    if not state.get("trained"):
        state = note(folder, state="training")
        start = time.perf_counter()
        try:
            train(replace(recipe, out=str(folder), resume="auto"))
        finally:
            state = note(
                folder,
                peak_mib=max(peak_mib(), state.get("peak_mib", 0.0)),
                train_seconds=state.get("train_seconds", 0.0) + time.perf_counter() - start,
            )
        note(folder, trained=True, device=device_name())
    for column, what in state["columns"].items():
        if state.get("evaluated", {}).get(column) == what and evaluation_file(folder, column).is_file():
            continue
        note(folder, state="evaluating")
        split, prefix = split_of(what)
        evaluate(
            folder / "final",
            data=recipe.data,
            split=split,
            prefix=prefix,
            evaluation=recipe.evaluation,
            out=evaluation_file(folder, column),
            device=recipe.accelerator,
        )
        state = note(folder, evaluated={**state.get("evaluated", {}), column: what})
    note(folder, state="done", error=None)


def evaluation_file(folder: Path, column: str) -> Path:
    return folder / "final" / f"evaluation-{column}.json"


def split_of(what: str) -> tuple[str, str]:
    """ "test/Seq05VD*" -> ("test", "Seq05VD"); "test" -> ("test", "")."""
    split, _, prefix = what.partition("/")
    return split, prefix.removesuffix("*")


def read_state(folder: Path) -> dict[str, Any]:
    """`cell.json`; empty where the cell has not begun.

    Raises:
        UserError: the file is broken.
    """
    path = folder / MARK
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise UserError(f"{path}: not readable ({fault}); remove {folder} to run the cell anew") from fault


def note(folder: Path, **news: Any) -> dict[str, Any]:
    """Add to `cell.json`. Only the process that has claimed the cell may."""
    state = {**read_state(folder), **news}
    write_json(folder / MARK, state)
    return state


def recipe_from(given: dict[str, Any], where: Path) -> Recipe:
    """The recipe from plain data, `dataclasses.asdict` of it."""
    usual = Recipe()
    sections = {field.name: getattr(usual, field.name) for field in fields(Recipe)}
    typed = {
        name: settings_of(type(sections[name]), value, str(where)) if is_dataclass(sections.get(name)) else value
        for name, value in given.items()
    }
    return settings_of(Recipe, typed, str(where))


def peak_mib() -> float:
    """The most memory training has held: of the GPU where there is one, else the process's resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB on Linux


def device_name() -> str:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def main(folder: str) -> None:
    """Run the cell and exit as `protoseg train` does."""
    try:
        run_cell(Path(folder))
    except UserError as error:
        print(f"protoseg: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(3 if isinstance(error, DataError) else 1)


if __name__ == "__main__":
    main(sys.argv[1])
