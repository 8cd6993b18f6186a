"""What a study has found: `results.json`, `results.csv`, `report.md`, `differences.png` and `report.html`.

Everything is read from the cells' own files (`cell.json`, `final/evaluation-*.json`, `metrics.csv`), so a report can be
written at any time, of whatever is done by then. Ratios lie in [0, 1] in the data and are percent in the reports.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from protoseg import __version__
from protoseg.config import Study, UserError
from protoseg.engine.statistics import estimate, less
from protoseg.tasks.demo import ms_per_step
from protoseg.tasks.files import write_json, write_whole
from protoseg.tasks.study_cell import evaluation_file, read_state
from protoseg.tasks.study_pages import METRICS, draw_differences, markdown, page


@dataclass(frozen=True)
class Result:
    """A finished cell.

    Attributes:
        columns: column -> metric -> number; only numbers that exist.
        classes: column -> class -> IoU; NaN for a class that occurs nowhere.
        costs: see `COSTS`; of the first column where a number is of an evaluation.
    """

    variant: str
    seed: int
    columns: dict[str, dict[str, float]]
    classes: dict[str, dict[str, float]]
    costs: dict[str, float]


def check_libraries() -> None:
    """Find out before the work that its report could not be written.

    Raises:
        UserError: a library of the extra `study` is missing.
    """
    missing = [name for name in ("scipy", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"a study's report needs {' and '.join(missing)}; pip install 'protoseg[study]'")


def write(
    folder: Path, plan: Study, variants: dict[str, dict[str, Any]], cells: list[tuple[str, int, Path]]
) -> dict[str, Any]:
    """Write all reports of what is done.

    Args:
        folder: of the study.
        plan: the study.
        variants: name -> dotted settings.
        cells: variant, seed and folder of each.

    Returns:
        `text`, the table for a terminal, and `page`, the path of the HTML page.
    """
    results = [result for cell in cells if (result := read(*cell, plan)) is not None]
    content = {
        "protoseg": __version__,
        "study": asdict(plan),
        "variants": [
            {
                "name": name,
                "settings": settings,
                "seeds": sorted(result.seed for result in results if result.variant == name),
                **summary([result for result in results if result.variant == name]),
            }
            for name, settings in variants.items()
        ],
        "differences": [
            difference(results, name, baseline) for baseline in plan.baselines for name in variants if name != baseline
        ],
        "cells": [status(variant, seed, where, results) for variant, seed, where in cells],
        "made_with": made_with([where for _, _, where in cells]),
    }
    write_json(folder / "results.json", content)
    write_csv(folder / "results.csv", content)
    text = markdown(folder.name, plan, content)
    write_whole(folder / "report.md", lambda fresh: fresh.write_text(text, encoding="utf-8"))
    plot = folder / "differences.png"
    if not draw_differences(plot, plan, content):
        plot.unlink(missing_ok=True)
    html = page(folder, plan, content, plot if plot.is_file() else None)
    where = write_whole(folder / "report.html", lambda fresh: fresh.write_text(html, encoding="utf-8"))
    return {"text": text, "page": where}


def read(variant: str, seed: int, folder: Path, plan: Study) -> Result | None:
    """The numbers of a cell; None where it is not done.

    Raises:
        UserError: a file of the cell is broken.
    """
    state = read_state(folder)
    evaluated = state.get("evaluated", {})
    if not state.get("trained") or any(evaluated.get(column) != what for column, what in plan.evaluate.items()):
        return None
    reports = {column: _load(evaluation_file(folder, column)) for column in plan.evaluate}
    first = next(iter(reports.values()))
    costs = {
        "learnable": first["parameters"]["learnable"],
        "prototypes": first["parameters"]["prototypes"],
        "ms_per_step": ms_per_step(folder),
        "peak_mib": state.get("peak_mib"),
        **{name: (first.get("prototypes") or {}).get(name) for name in ("pairwise_cosine", "used")},
    }
    return Result(
        variant,
        seed,
        {
            column: {name: report[name] for name in METRICS if report.get(name) is not None}
            for column, report in reports.items()
        },
        {
            column: {entry["name"]: _number(entry["iou"]) for entry in report["classes"]}
            for column, report in reports.items()
        },
        {name: float(value) for name, value in costs.items() if value is not None and value == value},
    )


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise UserError(f"{path}: not readable ({fault}); remove it and run the study again") from fault


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def summary(results: list[Result]) -> dict[str, Any]:
    """Means over the seeds of one variant: `columns` (column -> metric), `classes` (column -> class) and `costs`."""
    return {
        "columns": over_seeds([result.columns for result in results]),
        "classes": over_seeds([result.classes for result in results]),
        "costs": over_seeds([{"": result.costs} for result in results]).get("", {}),
    }


def difference(results: list[Result], variant: str, baseline: str) -> dict[str, Any]:
    """`variant` less `baseline`, seed by seed: `columns` (column -> metric) and `classes` (column -> class)."""
    ours = {result.seed: result for result in results if result.variant == variant}
    theirs = {result.seed: result for result in results if result.variant == baseline}
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    return {
        "variant": variant,
        "baseline": baseline,
        "seeds": [one.seed for one, _ in pairs],
        "columns": over_seeds([{c: less(one.columns[c], two.columns[c]) for c in one.columns} for one, two in pairs]),
        "classes": over_seeds([{c: less(one.classes[c], two.classes[c]) for c in one.classes} for one, two in pairs]),
    }


def over_seeds(seeds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Column -> name -> mean and interval; what is not there for every seed is left out."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for column, first in seeds[0].items() if seeds else ():
        numbers = {n: [seed[column][n] for seed in seeds] for n in first if all(n in seed[column] for seed in seeds)}
        found[column] = {name: {**asdict(estimate(values)), "values": values} for name, values in numbers.items()}
    return found


def status(variant: str, seed: int, folder: Path, results: list[Result]) -> dict[str, Any]:
    """How far a cell is, and what it took."""
    state = read_state(folder)
    done = any(result.variant == variant and result.seed == seed for result in results)
    words = ("hash", "device", "train_seconds", "peak_mib", "error")
    return {
        "variant": variant,
        "seed": seed,
        "folder": str(folder),
        "state": "done" if done else state.get("state", "waiting"),
        **{word: state.get(word) for word in words},
    }


def made_with(folders: list[Path]) -> dict[str, list[str]]:
    """What the numbers may depend on beside the settings: commits, devices and versions of torch, each once."""
    found: dict[str, dict[str, None]] = {"commits": {}, "devices": {}, "torch": {}}
    for folder in folders:
        path = folder / "env.json"
        for environment in _load(path) if path.is_file() else ():
            found["commits"][environment["commit"] or "no commit"] = None
            found["torch"][environment["versions"]["torch"]] = None
        if device := read_state(folder).get("device"):
            found["devices"][device] = None
    return {what: list(each) for what, each in found.items()}


def write_csv(path: Path, content: dict[str, Any]) -> None:
    """One row a mean: of a variant (no baseline), or of its paired differences to one."""
    rows = []
    for entry in (*content["variants"], *content["differences"]):
        name, baseline = entry.get("variant", entry.get("name")), entry.get("baseline", "")
        for column, metrics in entry["columns"].items():
            rows += [(name, baseline, column, metric, "", found) for metric, found in metrics.items()]
            rows += [(name, baseline, column, "iou", c, found) for c, found in entry["classes"][column].items()]
        rows += [(name, baseline, "", cost, "", found) for cost, found in entry.get("costs", {}).items()]
    text = io.StringIO()
    writer = csv.writer(text)
    numbers = ("mean", "deviation", "low", "high", "n")
    writer.writerow(["variant", "baseline", "column", "metric", "class", *numbers])
    for *words, found in rows:
        writer.writerow([*words, *(_cell(found.get(number)) for number in numbers)])
    write_whole(path, lambda fresh: fresh.write_text(text.getvalue(), encoding="utf-8"))


def _cell(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.10g}"
