"""A study's results for people: words and tables in Markdown, the plot of the paired differences, the HTML page."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import yaml

from protoseg.config import Study
from protoseg.tasks.evaluation import percent
from protoseg.tasks.files import write_whole
from protoseg.tasks.pages import rendered

METRICS = {  # of an evaluation; name -> what people call it
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "class accuracy",
    "boundary_miou": "boundary IoU",
    "calibration_error": "ECE",
}
LOWER_IS_BETTER = "calibration_error"
COSTS: dict[str, tuple[str, str]] = {  # of a cell; name -> what people call it, format
    "learnable": ("learnable", "{:,.0f}"),
    "prototypes": ("stored", "{:,.0f}"),
    "ms_per_step": ("ms/step", "{:.0f}"),
    "peak_mib": ("peak MiB", "{:,.0f}"),
    "pairwise_cosine": ("pairwise cosine", "{:.3f}"),
    "used": ("in use, %", "{:.1%}"),
}
COLOURS = ("#c2562d", "#3d6b8e", "#7a8b3c", "#8a5a9e")  # of the columns in the plot
INK, SOFT, LINE, CARD = "#1d2430", "#5d6675", "#e4e2dc", "#ffffff"


def markdown(name: str, plan: Study, content: dict[str, Any]) -> str:
    """The study as a Markdown page: means, paired differences, what is not done."""
    lines = [f"# Study {name}", "", *counted_words(content), ""]
    shown = shown_columns(plan)
    heads = ["variant", "seeds", *(title(*each) for each in shown), *(what for what, _ in COSTS.values())]
    lines += [_row(heads), _row(["---"] + ["---:"] * (len(heads) - 1))]
    for variant in content["variants"]:
        row = [variant["name"], str(len(variant["seeds"]))]
        row += [spread(variant["columns"].get(column, {}).get(metric)) for column, metric in shown]
        row += [amount(variant["costs"].get(cost), form) for cost, (_, form) in COSTS.items()]
        lines.append(_row(row))
    lines += ["", "In percent: mean ± standard deviation over seeds."]
    for baseline in plan.baselines:
        heads = ["variant", "n", *(title(*each) for each in shown)]
        lines += ["", f"## Against {baseline}, in points", "", _row(heads), _row(["---"] + ["---:"] * (len(heads) - 1))]
        for entry in content["differences"]:
            if entry["baseline"] == baseline:
                found = [gap(entry["columns"].get(column, {}).get(metric)) for column, metric in shown]
                lines.append(_row([entry["variant"], str(len(entry["seeds"])), *found]))
    if plan.baselines:
        lines += ["", INTERVALS, "", "![paired differences](differences.png)"]
    lines += ["", *notes(content)]
    unfinished = [cell for cell in content["cells"] if cell["state"] != "done"]
    if unfinished:
        lines += ["", "## Not done", ""]
        lines += [
            f"* {cell['variant']}, seed {cell['seed']}: {cell['state']}"
            + (f": {cell['error']}" if cell["error"] else "")
            for cell in unfinished
        ]
    return "\n".join(lines) + "\n"


INTERVALS = (
    "Mean of the differences between runs of the same seed, with its 95 % interval (Student's t, n - 1 degrees of "
    "freedom); a single seed has no interval."
)


def shown_columns(plan: Study) -> list[tuple[str, str]]:
    """The columns of the tables: the first metric on every split, the others on the first."""
    first = next(iter(plan.evaluate))
    most: str = plan.metrics[0]
    return [(column, most) for column in plan.evaluate] + [(first, metric) for metric in plan.metrics[1:]]


def title(column: str, metric: str) -> str:
    return f"{METRICS[metric]}, {column}"


def counted_words(content: dict[str, Any]) -> list[str]:
    done = sum(cell["state"] == "done" for cell in content["cells"])
    return [f"{done} of {len(content['cells'])} runs done."]


def notes(content: dict[str, Any]) -> list[str]:
    """What a reader must know of how the numbers came about."""
    found = [
        "ms/step and peak memory are of the runs as they were, the median of their reports and the most held while "
        "training; runs side by side on one machine slow each other."
    ]
    for what, many in (("commits", "several versions of the code"), ("devices", "several kinds of device")):
        if len(content["made_with"][what]) > 1:
            found.append(f"The runs come from {many}: {', '.join(content['made_with'][what])}.")
    if any("+changes" in commit for commit in content["made_with"]["commits"]):
        found.append("Runs of a commit marked +changes had uncommitted changes in the working folder.")
    return found


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
    return f"{points(found['mean'])} {interval(found)}".rstrip()


def interval(found: dict[str, Any]) -> str:
    """ "[+0.31, +2.09]", in points; empty where there is none."""
    return f"[{points(found['low'])}, {points(found['high'])}]" if found["low"] is not None else ""


def points(value: float, digits: int = 2) -> str:
    """A difference of ratios in points with its sign; never -0."""
    return f"{round(100 * value, digits) + 0.0:+.{digits}f}"


def amount(found: dict[str, Any] | None, form: str) -> str:
    """A mean in its own format."""
    return "-" if found is None or not found["n"] else form.format(found["mean"]).removesuffix("%")


def draw_differences(path: Path, plan: Study, content: dict[str, Any]) -> bool:
    """A forest plot: a panel for each baseline, a line for each variant and column; diamonds are means, dots seeds.

    A panel's axis covers all its dots; an interval that is far longer ends in an arrow.

    Returns:
        Whether there was a difference to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric, columns = plan.metrics[0], list(plan.evaluate)
    entries = [entry for entry in content["differences"] if entry["seeds"]]
    baselines = [baseline for baseline in plan.baselines if any(e["baseline"] == baseline for e in entries)]
    if not entries:
        return False
    compared = {entry["variant"] for entry in entries}
    names = [variant["name"] for variant in content["variants"] if variant["name"] in compared]
    across = min(2, len(baselines))
    down = -(-len(baselines) // across)
    size = (1.4 + 0.085 * max(map(len, names)) + 4.0 * across, 0.5 + down * (0.9 + 0.3 * len(names) * _pitch(columns)))
    figure = Figure(figsize=size, dpi=160, facecolor=CARD, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)  # type: ignore[union-attr,call-arg]
    axes = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    for axis, baseline in zip(axes, baselines):
        _draw_panel(axis, [e for e in entries if e["baseline"] == baseline], baseline, names, columns, metric)
    for axis in axes[len(baselines) :]:
        axis.set_visible(False)
    _explain(figure, columns)
    write_whole(path, lambda fresh: figure.savefig(fresh, format="png"))
    return True


def _pitch(columns: list[str]) -> float:
    """Lines a variant takes: one a column, and a gap to the next variant."""
    return len(columns) + 0.7


def _draw_panel(
    axis: Any, entries: list[dict[str, Any]], baseline: str, names: list[str], columns: list[str], metric: str
) -> None:
    low, high = limits(entries, columns, metric)
    axis.axvline(0, color=INK, linewidth=0.9, zorder=1)
    tops = [index * _pitch(columns) for index in range(len(names))]
    middle = (len(columns) - 1) / 2
    for entry in entries:
        for offset, column in enumerate(columns):
            found = entry["columns"].get(column, {}).get(metric)
            if found is not None and found["mean"] == found["mean"]:
                y = tops[names.index(entry["variant"])] + offset
                _draw_line(axis, y, found, COLOURS[offset % len(COLOURS)], low, high)
    if baseline in names:
        y = tops[names.index(baseline)] + middle
        axis.text(0, y, "baseline", color=SOFT, va="center", ha="center", fontsize=8, backgroundcolor=CARD)
    counts = sorted({len(entry["seeds"]) for entry in entries if entry["seeds"]})
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    axis.set_title(f"against {baseline}", loc="left", fontsize=10, color=INK, fontweight="bold")
    axis.set_xlabel(f"difference in {METRICS[metric]}, points  (n = {seeds})", color=SOFT, fontsize=8.5)
    axis.set_xlim(low, high)
    axis.set_ylim(tops[-1] + len(columns) - 0.2, -0.8)
    axis.set_yticks([top + middle for top in tops], names)
    axis.grid(axis="x", color=LINE, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(colors=SOFT, labelsize=8, length=0)
    axis.tick_params(axis="y", labelcolor=INK, labelsize=9, pad=10)  # room for an arrow
    for side in ("top", "right", "left", "bottom"):
        axis.spines[side].set_visible(False)


def limits(entries: list[dict[str, Any]], columns: list[str], metric: str) -> tuple[float, float]:
    """The ends of an axis in points: around 0, all dots, and the intervals as far as they are not far longer."""
    found = [e["columns"][c][metric] for e in entries for c in columns if metric in e["columns"].get(c, {})]
    dots = [100 * value for each in found for value in each["values"] if value == value] + [0.0]
    room = max(0.5, 0.75 * (max(dots) - min(dots)))
    ends = [100 * each[end] for each in found for end in ("low", "high") if each[end] is not None] + dots
    low, high = max(min(ends), min(dots) - room), min(max(ends), max(dots) + room)
    margin = 0.05 * max(high - low, 0.5)
    return low - margin, high + margin


def _draw_line(axis: Any, y: float, found: dict[str, Any], colour: str, low: float, high: float) -> None:
    values = [100 * value for value in found["values"]]
    if found["low"] is not None:
        ends = [max(100 * found["low"], low), min(100 * found["high"], high)]
        axis.plot(ends, [y, y], color=colour, linewidth=1.8, alpha=0.75, solid_capstyle="butt", zorder=2)
        for end, limit, marker in ((100 * found["low"], low, "<"), (100 * found["high"], high, ">")):
            if (end < low) if marker == "<" else (end > high):
                axis.plot([limit], [y], marker, color=colour, markersize=6, clip_on=False, zorder=2)
            else:
                axis.plot([end, end], [y - 0.2, y + 0.2], color=colour, linewidth=1.4, zorder=2)
    axis.plot([100 * found["mean"]], [y], "D", color=colour, markersize=6, zorder=3)
    below = [y + 0.34] * len(values)  # the axis runs downwards
    axis.plot(values, below, "o", color=CARD, markeredgecolor=colour, markeredgewidth=1, markersize=3.6, zorder=4)


def _explain(figure: Any, columns: list[str]) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=1.8, marker="D", markersize=6, label=column)
        for i, column in enumerate(columns)
    ]
    marks.append(
        Line2D([], [], linestyle="", marker="o", color=CARD, markeredgecolor=SOFT, markersize=3.6, label="one seed")
    )
    marks.append(Line2D([], [], linestyle="", marker="D", color=SOFT, markersize=6, label="mean"))
    marks.append(Line2D([], [], color=SOFT, linewidth=1.8, label="95 % interval"))
    figure.legend(
        handles=marks, loc="outside lower left", ncols=len(marks), frameon=False, fontsize=8, labelcolor=SOFT,
        handletextpad=0.5, columnspacing=1.6,
    )  # fmt: skip


def page(folder: Path, plan: Study, content: dict[str, Any], plot: Path | None) -> str:
    """The whole study as one HTML page that fetches nothing."""
    first, metric = next(iter(plan.evaluate)), plan.metrics[0]
    return rendered(
        "study.html.j2",
        name=folder.name,
        folder=str(folder),
        plan=plan,
        content=content,
        first=first,
        metric=metric,
        METRICS=METRICS,
        COSTS=COSTS,
        shown=shown_columns(plan),
        spread=spread,
        gap=gap,
        interval=interval,
        points=points,
        amount=amount,
        heat=heat,
        gains=gains(plan, content),
        best=best(content, first, metric),
        done=sum(cell["state"] == "done" for cell in content["cells"]),
        unfinished=[cell for cell in content["cells"] if cell["state"] != "done"],
        intervals=INTERVALS,
        notes=notes(content),
        settings=yaml.safe_dump(_plain(content["study"]), sort_keys=False, allow_unicode=True),
        recipe=kept_text(folder / "recipe.yaml"),
        plot=None if plot is None else "data:image/png;base64," + base64.b64encode(plot.read_bytes()).decode("ascii"),
    )


def gains(plan: Study, content: dict[str, Any]) -> list[dict[str, Any]]:
    """For each baseline the variant that gains most on it in the first column: what the page's cards show."""
    first, metric = next(iter(plan.evaluate)), plan.metrics[0]
    better = -1 if metric == LOWER_IS_BETTER else 1
    found = []
    for baseline in plan.baselines:
        entries = [
            (entry["variant"], entry["columns"][first][metric])
            for entry in content["differences"]
            if entry["baseline"] == baseline and metric in entry["columns"].get(first, {})
        ]
        if entries:
            variant, most = max(entries, key=lambda entry: better * entry[1]["mean"])
            found.append({"baseline": baseline, "variant": variant, "of": len(entries), "found": most})
    return found


def best(content: dict[str, Any], column: str, metric: str) -> dict[str, Any] | None:
    """The variant with the best mean; None where nothing is done."""
    better = -1 if metric == LOWER_IS_BETTER else 1
    entries = [v for v in content["variants"] if metric in v["columns"].get(column, {})]
    return max(entries, key=lambda v: better * v["columns"][column][metric]["mean"], default=None)


def heat(found: dict[str, Any] | None) -> str:
    """The background of a difference of IoU: stronger the larger it is, full at 10 points."""
    if found is None or found["mean"] != found["mean"]:
        return ""
    strength = min(1.0, abs(found["mean"]) / 0.1)
    hue = "var(--gain)" if found["mean"] > 0 else "var(--loss)"
    return f"background: color-mix(in srgb, {hue} {round(60 * strength)}%, transparent)"


def kept_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _plain(value) for name, value in content.items()}
    return [_plain(value) for value in content] if isinstance(content, list | tuple) else content
