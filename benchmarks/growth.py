"""How time and memory of a training step of the head grow with classes, prototypes per class and pixels.

    python -m benchmarks.growth [--axis C K N] [--rounds 3] [--device cuda] [--json growth.json] [--png growth.png]
    python -m benchmarks.growth --draw growth.json --png growth.png

As in `benchmarks.head`: one thread, process CPU time (wall time on a GPU), contestants interleaved, medians; a step is
losses, gradient to the features and the update of the prototypes, with labels at feature size. "ours, 1,000 drawn" is
`contrast_negatives=1000`, another loss. The peak is what one step adds to the resident size, each in a process of its
own that has stepped four pixels before. The release, whose tables are pixels by prototypes, stops at `--release-gb`: 3,
or three quarters of a GPU's memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.head import VOID, Shape, SoftmaxHead, batch, machine, made, peak_of, same_precision, timed
from oracles.reference_loop import ReferenceHead

DRAWN = 1000
OURS, SAMPLED, RELEASE, SOFTMAX = "ours", "ours, 1,000 drawn", "release", "softmax, 1x1"
COPIES = 7  # tables of pixels by prototypes that the release holds at its peak
RUNGS = {"C": (2, 19, 150, 847, 3000, 10_000), "K": (1, 5, 10, 20), "N": (1024, 4096, 16_384, 65_536)}
TITLES = {"C": "classes C", "K": "prototypes per class K", "N": "pixels N"}


@dataclass(frozen=True)
class Point:
    """One place on a curve. `N` is a square or twice a square."""

    C: int = 150
    K: int = 10
    N: int = 2048
    D: int = 64

    @property
    def shape(self) -> Shape:
        images = 1 if int(self.N**0.5) ** 2 == self.N else 2
        return Shape(self.C, self.D, images=images, side=int((self.N / images) ** 0.5))


def contestant(name: str, point: Point, device: str) -> Callable[[], object]:
    """One step of one contestant, which holds nothing of the others."""
    torch.manual_seed(0)
    shape = point.shape
    features, labels, centres = batch(shape, shape.side, device, point.K)
    features.requires_grad_(True)
    if name in (OURS, SAMPLED):
        drawn = min(DRAWN, point.C * point.K) if name == SAMPLED else None
        head = made(point.D, point.C, device, num_prototypes=point.K, contrast_negatives=drawn)
        head.prototypes.copy_(centres)
        del centres

        def ours() -> None:
            features.grad = None
            losses = head.losses(features, labels)
            losses.total.backward()
            head.update(losses)

        return ours
    if name == RELEASE:
        loss = partial(ReferenceHead(point.D, point.C, point.K).to(device).loss, ignore_index=VOID)
    else:
        loss = SoftmaxHead(point.D, point.C).to(device).loss

    def theirs() -> None:
        features.grad = None
        loss(features, labels).backward()

    return theirs


def measured_peak(name: str, point: Point, device: str) -> float:
    return peak_of(contestant(name, point, device), device)


def names(axis: str, point: Point, release_bytes: float) -> list[str]:
    """Who runs at a point: drawing is for many classes, the release ends where its tables do not fit."""
    table = 4 * point.N * point.C * point.K
    chosen = [OURS, SOFTMAX]
    if axis == "C" and point.C * point.K > DRAWN:
        chosen.append(SAMPLED)
    if COPIES * table <= release_bytes:
        chosen.append(RELEASE)
    return chosen


def peaks(axis: str, points: list[Point], arguments: argparse.Namespace) -> list[dict[str, float]]:
    found = []
    for point in points:
        asked = names(axis, point, arguments.release_gb * 2**30)
        if arguments.device == "cpu":  # forked before anything has run here: importing takes longer than the step
            with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
                found.append({n: pool.apply(measured_peak, (n, point, "cpu")) for n in asked})
        else:
            found.append({n: measured_peak(n, point, arguments.device) for n in asked})
    return found


def times(axis: str, points: list[Point], arguments: argparse.Namespace) -> list[dict[str, float]]:
    found = []
    for point in points:
        asked = names(axis, point, arguments.release_gb * 2**30)
        steps = {n: contestant(n, point, arguments.device) for n in asked}
        seconds = timed(steps, arguments.rounds, arguments.device)
        found.append({n: 1e3 * statistics.median(seconds[n]) for n in asked})
        show(axis, point, found[-1], "ms")
    return found


def show(axis: str, point: Point, at: dict[str, float], unit: str) -> None:
    told = ", ".join(f"{name} {value:.1f} {unit}" for name, value in at.items())
    print(f"{axis}={getattr(point, axis)}: {told}", flush=True)


COLOURS = {OURS: "#0072B2", SAMPLED: "#56B4E9", RELEASE: "#D55E00", SOFTMAX: "#7A7A7A"}
QUANTITIES = {"ms": "time of a step, ms", "peak MB": "memory a step adds, MB"}


def draw(found: dict[str, Any], png: Path) -> None:
    """Two rows, time and memory; a column for each axis; both scales logarithmic, lines named where they end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    columns = len(found["axes"])
    figure, grid = pyplot.subplots(
        len(QUANTITIES), columns, figsize=(4.6 * columns, 7.4), sharey="row", sharex="col", squeeze=False
    )
    figure.suptitle("One training step of the head as it grows", x=0.012, ha="left", fontsize=14, fontweight="bold")
    ends = {}
    for column, (axis, curve) in enumerate(found["axes"].items()):
        left, right = curve["values"][0], curve["values"][-1]
        fixed = ", ".join(f"{name} = {value:,}" for name, value in curve["fixed"].items())
        grid[0][column].set_title(fixed, loc="left", fontsize=10, color="#555555")
        grid[-1][column].set_xlabel(TITLES[axis])
        for plot, (quantity, label) in zip(grid[:, column], QUANTITIES.items()):
            plot.set(xscale="log", yscale="log", xlim=(left * (left / right) ** 0.04, right * (right / left) ** 0.5))
            plot.set_xticks(curve["values"], [short(x) for x in curve["values"]])
            plot.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
            plot.minorticks_off()
            plot.grid(color="#E8E8E8", linewidth=0.8)
            plot.set_axisbelow(True)
            if column == 0:
                plot.set_ylabel(label)
            ends[plot] = {
                name: line(plot, name, curve["values"], curve[quantity])
                for name in COLOURS
                if any(at.get(name, 0) > 0 for at in curve[quantity])
            }
    told = found["machine"]
    where = told["device"] if told["device"] != "cpu" else f"one thread of {told['cpu']}"
    note = f"{where} · torch {told['torch']} · fp32 · labels at feature size · the release ends where it needs "
    note += f"more than {found['release GB']:g} GB · commit {told['commit']}"
    figure.text(0.012, 0.008, note, fontsize=8, color="#777777")
    figure.tight_layout(rect=(0, 0.025, 1, 0.985))
    figure.canvas.draw()
    for plot, points in ends.items():
        name_lines(plot, points)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)


def short(number: int) -> str:
    return f"{number // 1000}k" if number >= 1000 else str(number)


def line(plot: Any, name: str, values: list[int], measured: list[dict[str, float]]) -> tuple[float, float]:
    """Draw one contestant; returns where it ends. A step that added no page that could be seen is left out."""
    points = [(x, at[name]) for x, at in zip(values, measured) if at.get(name, 0) > 0]
    plot.plot(*zip(*points), color=COLOURS[name], marker="o", markersize=4.5, linewidth=2.6 if name == OURS else 1.6)
    return points[-1]


def name_lines(plot: Any, ends: dict[str, tuple[float, float]]) -> None:
    """Write each name at its line's end: to the right, pushed up where two would meet; above a line that ends early."""
    last = max(x for x, _ in ends.values())
    below = float("-inf")
    for name, end in sorted(ends.items(), key=lambda item: item[1][1]):
        style: dict[str, Any] = {"color": COLOURS[name], "fontsize": 9.5}
        style["fontweight"] = "bold" if name == OURS else "normal"
        x, y = plot.transData.transform(end)
        if end[0] < last:
            x, y = x - 8, y + 6
            style |= {"ha": "right", "va": "bottom"}
        else:
            x, y = x + 9, max(y, below + 17)  # pixels at the figure's own resolution
            below = y
            style |= {"ha": "left", "va": "center"}
        plot.text(*plot.transData.inverted().transform((x, y)), name, **style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="*", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--pixels", type=int, default=2048, help="N of the curves over C and K")
    parser.add_argument("--release-gb", type=float, help="the release is left out where it needs more")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="")
    parser.add_argument("--png", default="")
    parser.add_argument("--draw", default="", help="draw this JSON instead of measuring")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads(Path(arguments.draw).read_text()), Path(arguments.png or "growth.png"))
        return
    torch.set_num_threads(arguments.threads)
    same_precision(arguments.device)
    if arguments.release_gb is None:
        on_gpu = arguments.device != "cpu"
        arguments.release_gb = 0.75 * torch.cuda.mem_get_info(arguments.device)[1] / 2**30 if on_gpu else 3.0
    base = Point(N=arguments.pixels, D=arguments.dim)
    ladders = {axis: [replace(base, **{axis: value}) for value in RUNGS[axis]] for axis in arguments.axis}
    memory = {axis: peaks(axis, points, arguments) for axis, points in ladders.items()}  # before anything has run
    found: dict[str, Any] = {"machine": machine(arguments.device), "release GB": arguments.release_gb, "axes": {}}
    for axis, points in ladders.items():
        found["axes"][axis] = {
            "values": list(RUNGS[axis]),
            "fixed": {name: value for name, value in asdict(base).items() if name != axis},
            "ms": times(axis, points, arguments),
            "peak MB": memory[axis],
        }
        for point, at in zip(points, memory[axis]):
            show(axis, point, at, "MB")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))
    if arguments.png:
        draw(found, Path(arguments.png))


if __name__ == "__main__":
    main()
