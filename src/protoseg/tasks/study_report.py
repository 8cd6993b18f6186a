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
from protoseg.engine.statistics import estimate, paired
from protoseg.tasks.demo import ms_per_step
from protoseg.tasks.evaluation import percent
from protoseg.tasks.files import write_json, write_whole
from protoseg.tasks.study_cell import evaluation_file, read_state

METRICS = {  # of an evaluation; name -> what people call it
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "class accuracy",
    "boundary_miou": "boundary IoU",
    "calibration_error": "ECE",
}
COSTS = {  # of a cell; name -> (what people call it, format)
    "learnable": ("learnable", "{:,.0f}"),
    "prototypes": ("stored", "{:,.0f}"),
    "ms_per_step": ("ms/step", "{:.0f}"),
    "peak_mib": ("peak MiB", "{:,.0f}"),
    "pairwise_cosine": ("pairwise cosine", "{:.3f}"),
    "used": ("in use", "{:.1%}"),
}


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
    }
    write_json(folder / "results.json", content)
    write_csv(folder / "results.csv", content)
    text = markdown(folder.name, plan, content)
    write_whole(folder / "report.md", lambda fresh: fresh.write_text(text, encoding="utf-8"))
    return {"text": text, "page": folder / "report.md"}


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


def _load(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise UserError(f"{path}: not readable ({fault}); remove it and run the study again") from fault


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def summary(results: list[Result]) -> dict[str, Any]:
    """Means over the seeds of one variant: `columns`, `classes` and `costs`."""
    columns = results[0].columns if results else {}
    return {
        "columns": {
            column: {name: _over([r.columns[column][name] for r in results]) for name in metrics}
            for column, metrics in columns.items()
        },
        "classes": {
            column: {name: _over([r.classes[column][name] for r in results]) for name in results[0].classes[column]}
            for column in columns
        },
        "costs": {
            name: _over([r.costs[name] for r in results if name in r.costs])
            for name in COSTS
            if any(name in r.costs for r in results)
        },
    }


def _over(values: list[float]) -> dict[str, Any]:
    found = estimate(values)
    return {"mean": found.mean, "deviation": found.deviation, "n": found.n, "values": values}


def difference(results: list[Result], variant: str, baseline: str) -> dict[str, Any]:
    """`variant` less `baseline`, seed by seed: per column and metric, per column and class."""
    ours = {result.seed: result for result in results if result.variant == variant}
    theirs = {result.seed: result for result in results if result.variant == baseline}
    both = sorted(ours.keys() & theirs.keys())
    columns = ours[both[0]].columns if both else {}
    return {
        "variant": variant,
        "baseline": baseline,
        "seeds": both,
        "columns": {
            column: {
                name: _gap(
                    {s: ours[s].columns[column][name] for s in both}, {s: theirs[s].columns[column][name] for s in both}
                )
                for name in metrics
            }
            for column, metrics in columns.items()
        },
        "classes": {
            column: {
                name: _gap(
                    {s: ours[s].classes[column][name] for s in both}, {s: theirs[s].classes[column][name] for s in both}
                )
                for name in ours[both[0]].classes[column]
            }
            for column in columns
        },
    }


def _gap(ours: dict[int, float], theirs: dict[int, float]) -> dict[str, Any]:
    gaps = paired(ours, theirs)
    return {**asdict(estimate(list(gaps.values()))), "values": list(gaps.values())}


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


def markdown(name: str, plan: Study, content: dict[str, Any]) -> str:
    """The study as a Markdown page: the table, the paired differences, what is not done."""
    lines = [f"# Study {name}", ""]
    heads = ["variant", "seeds"]
    heads += [f"{METRICS[m]}, {column}" for m in plan.metrics[:1] for column in plan.evaluate]
    first = next(iter(plan.evaluate))
    heads += [METRICS[m] for m in plan.metrics[1:]] + [what for what, _ in COSTS.values()]
    lines += [_row(heads), _row(["---"] * len(heads))]
    for variant in content["variants"]:
        row = [variant["name"], str(len(variant["seeds"]))]
        row += [spread(variant["columns"].get(column, {}).get(plan.metrics[0])) for column in plan.evaluate]
        row += [spread(variant["columns"].get(first, {}).get(metric)) for metric in plan.metrics[1:]]
        row += [amount(variant["costs"].get(cost), form) for cost, (_, form) in COSTS.items()]
        lines.append(_row(row))
    lines += ["", "Mean ± standard deviation over seeds, in percent."]
    for baseline in plan.baselines:
        columns = [(column, metric) for metric in plan.metrics[:1] for column in plan.evaluate]
        columns += [(first, metric) for metric in plan.metrics[1:]]
        lines += ["", f"## Less {baseline}, in points", ""]
        heads = ["variant", "n", *(f"{METRICS[metric]}, {column}" for column, metric in columns)]
        lines += [_row(heads), _row(["---"] * len(heads))]
        for entry in content["differences"]:
            if entry["baseline"] == baseline:
                found = [gap(entry["columns"].get(column, {}).get(metric)) for column, metric in columns]
                lines.append(_row([entry["variant"], str(len(entry["seeds"])), *found]))
    if plan.baselines:
        lines += ["", "Mean paired difference over seeds [its 95 % interval, Student's t]; a single seed has none."]
    open_cells = [cell for cell in content["cells"] if cell["state"] != "done"]
    if open_cells:
        lines += ["", "## Not done", ""]
        lines += [
            f"* {cell['variant']}, seed {cell['seed']}: {cell['state']}"
            + (f": {cell['error']}" if cell["error"] else "")
            for cell in open_cells
        ]
    return "\n".join(lines) + "\n"


def _row(words: list[str]) -> str:
    return "| " + " | ".join(words) + " |"


def spread(found: dict[str, Any] | None) -> str:
    """ "71.23 ± 0.41", in percent; without a deviation where there is one seed."""
    if found is None or not found["n"]:
        return "-"
    more = f" ± {percent(found['deviation'])}" if found["deviation"] is not None else ""
    return percent(found["mean"]) + more


def gap(found: dict[str, Any] | None) -> str:
    """ "+1.20 [+0.31, +2.09]", in points."""
    if found is None or found["mean"] != found["mean"]:
        return "-"
    interval = f" [{100 * found['low']:+.2f}, {100 * found['high']:+.2f}]" if found["low"] is not None else ""
    return f"{100 * found['mean']:+.2f}{interval}"


def amount(found: dict[str, Any] | None, form: str) -> str:
    """A mean in its own format."""
    return "-" if found is None or not found["n"] else form.format(found["mean"])
