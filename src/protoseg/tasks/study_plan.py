"""What a study consists of: variants and cells, the settings that make a cell what it is, the files that keep them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from protoseg.config import Recipe, Study, UserError
from protoseg.tasks import run_folder, training
from protoseg.tasks.files import write_whole
from protoseg.tasks.study_cell import evaluation_file, read_state

Build = Callable[[dict[str, Any]], Recipe]  # dotted settings -> the base recipe with them
OURS = ("out", "seed", "resume")  # set by the study itself
# Say where and how a number is computed, not which: a cell may be continued on another machine. Paths are not compared,
# what lies there is as far as it is known: whether there are weights, and the text of a data set's description.
NEUTRAL = tuple(name for name in run_folder.FREE if name not in ("steps", "micro_batch", "evaluation"))


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    Args:
        variant, seed: which.
        recipe: the whole run; its `out` is the cell's folder.
    """

    variant: str
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"{self.variant}/seed{self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.recipe.out)


def variants_of(plan: Study) -> dict[str, dict[str, Any]]:
    """Name -> dotted settings of every variant, those of the grid named by their values.

    Raises:
        UserError: no variant, two of one name, a name that is no folder name, a baseline that is no variant.
    """
    found = dict(plan.variants)
    for setting, values in plan.grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"grid: {setting} needs a list of values, given {values!r}")
    short = {setting: setting.rpartition(".")[2] for setting in plan.grid}
    if len(set(short.values())) < len(short):
        short = {setting: setting for setting in plan.grid}
    if plan.grid:
        for combination in itertools.product(*plan.grid.values()):
            chosen = dict(zip(plan.grid, combination))
            name = ",".join(f"{short[setting]}={_word(value)}" for setting, value in chosen.items())
            if name in found:
                raise UserError(f"grid: the combination {name} is already a variant; rename or remove one")
            found[name] = chosen
    if not found:
        raise UserError("the study has no variants; give `variants` or a `grid`")
    for name in found:
        if not re.fullmatch(r"[\w+=,-][\w.+=,-]*", name):
            raise UserError(f"variant {name!r} becomes a folder: use letters, digits and . _ + = , - only")
    for name in plan.baselines:
        if name not in found:
            raise UserError(f"baseline {name!r} is no variant; there are {', '.join(found)}")
    return found


def _word(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")


def cells_of(folder: Path, plan: Study, variants: dict[str, dict[str, Any]], build: Build) -> list[Cell]:
    """Every cell, all variants of a seed before the next seed: pairs are complete early.

    Raises:
        UserError: settings that do not exist or do not fit together; names the variant.
    """
    if not plan.seeds or len(set(plan.seeds)) < len(plan.seeds) or min(plan.seeds) < 0:
        raise UserError(f"seeds must be different numbers from 0 on, given {list(plan.seeds)}")
    for column, what in plan.evaluate.items():
        if not re.fullmatch(r"\w[\w.-]*", column) or not re.fullmatch(r"[\w.-]+(/[^*/]+\*)?", what):
            raise UserError(f"evaluate: {column}: {what} is not `COLUMN: SPLIT` or `COLUMN: SPLIT/BEGINNING*`")
    recipes = {}
    for name, settings in variants.items():
        for setting in (*settings, *plan.overrides):
            if setting in OURS:
                raise UserError(f"variant {name}: {setting} is set by the study itself; remove it")
        try:
            recipe = build({**plan.overrides, **settings})
            training.check(recipe)
        except UserError as fault:
            raise type(fault)(f"variant {name}: {fault}") from fault
        if recipe.devices != 1 or recipe.nodes != 1:
            raise UserError(f"variant {name}: a cell runs in one process on one device; set devices and nodes to 1")
        recipes[name] = recipe
    return [
        Cell(name, seed, dataclasses.replace(recipe, seed=seed, out=str(folder / name / f"seed{seed}"), resume=""))
        for seed in plan.seeds
        for name, recipe in recipes.items()
    ]


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What a cell's numbers depend on, flat plain data without paths."""
    kept = {name: value for name, value in run_folder.written(recipe).items() if name not in NEUTRAL}
    described = Path(recipe.data.file)
    text = described.read_bytes() if recipe.data.file and described.is_file() else b""
    return {
        **json.loads(json.dumps(kept)),
        "pretrained weights": recipe.model.pretrained or bool(recipe.model.weights),
        "content of data.file": hashlib.sha256(text).hexdigest()[:12] if text else None,
    }


def fingerprint(settings: dict[str, Any]) -> str:
    """A short hash of the settings that differ from the defaults: new settings of later versions leave it alone."""
    usual = settings_of(Recipe())
    given = {name: value for name, value in sorted(settings.items()) if usual.get(name) != value}
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()[:12]


def check_kept(cell: Cell) -> None:
    """Refuse to mix two experiments in one folder.

    Raises:
        UserError: the cell began with other settings; names them. Or its folder holds a run that is no cell.
    """
    kept = read_state(cell.folder).get("settings")
    if kept is None:
        if (cell.folder / "config.yaml").is_file():
            raise UserError(f"{cell.folder} holds a run that is no part of a study; choose another NAME or remove it")
        return
    before = settings_of(Recipe()) | run_folder.usual(kept) | kept
    changed = [
        f"{name} was {before.get(name)!r}, now {value!r}"
        for name, value in settings_of(cell.recipe).items()
        if before.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{cell.folder} was run with other settings: {'; '.join(changed)}. "
            "Put them back, choose another NAME or another variant's name, or remove that folder"
        )


def keep(folder: Path, plan: Study, build: Build) -> None:
    """Write `recipe.yaml` and a `study.yaml` that refers to it: the folder is enough to go on from."""
    # without the overrides: study.yaml holds those
    recipe = json.loads(json.dumps(dataclasses.asdict(build({}))))
    content = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(plan, recipe="recipe.yaml"))))
    _write_yaml(folder / "recipe.yaml", f"# the recipe of the study {folder.name}\n", recipe)
    _write_yaml(folder / "study.yaml", f"# protoseg study {folder.name}\n", content)


def _write_yaml(path: Path, header: str, content: Any) -> None:
    text = header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_whole(path, lambda fresh: fresh.write_text(text, encoding="utf-8"))


def is_done(cell: Cell, plan: Study) -> bool:
    """Trained, and evaluated as the study asks today."""
    state = read_state(cell.folder)
    evaluated = state.get("evaluated", {})
    return bool(state.get("trained")) and all(
        evaluated.get(column) == what and evaluation_file(cell.folder, column).is_file()
        for column, what in plan.evaluate.items()
    )
