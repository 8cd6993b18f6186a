"""The README's picture: paired differences of all studies in the evidence, and what a run's prototypes look like.

    python studies/picture.py docs/evidence.md runs/camvid-heads/default/seed0 CAMVID docs/evidence.png

The upper part is read from the tables of the evidence: the rows of `default` (or K = 10) less the plain and the cosine
softmax. Below, for some classes, the test patches most similar to each prototype, at most one per frame, with the share
of the class's predicted pixels that chose it; those with less than one percent are left out.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from protoseg.config import Data
from protoseg.data import catalog
from protoseg.data.dataset import SegmentationDataset
from protoseg.data.transforms import resize_image
from protoseg.engine.drawing import shades, stacked
from protoseg.engine.looks import find_looks
from protoseg.tasks.prediction import load

SIDE, GAP, LABEL = 128, 8, 120  # of a patch as drawn, between patches, of the class's name
HALF = 28  # of a patch in the picture, in pixels
MOST = 7  # prototypes of a class


RIVALS = {"softmax": "the plain softmax", "cosine": "the cosine softmax"}
ROW = re.compile(
    r"\| \**(?:default|K = 10) less (softmax|cosine)\** \| (\d+) \| \**([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]"
)


def differences(evidence: str) -> dict[str, dict[str, tuple[float, float, float, int]]]:
    """Title of a section -> rival -> mean, low, high and number of pairs of `default` less this rival, as it says."""
    found: dict[str, dict[str, tuple[float, float, float, int]]] = {}
    title = ""
    for line in evidence.splitlines():
        if line.startswith("### "):
            title = line.removeprefix("### ").partition(":")[0].partition(",")[0]
        if row := ROW.match(line):
            rival, pairs, *numbers = row.groups()
            mean, low, high = map(float, numbers)
            found.setdefault(title, {})[rival] = (mean, low, high, int(pairs))
    return found


def drawn(found: dict[str, dict[str, tuple[float, float, float, int]]]) -> Image.Image:
    """A panel for each rival, a line for each study: mean and 95 % interval."""
    figure = Figure(figsize=(9.2, 0.9 + 0.33 * len(found)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(RIVALS), sharey=True)
    names = list(found)[::-1]
    for axis, (rival, words) in zip(axes, RIVALS.items()):
        for y, name in enumerate(names):
            if rival not in found[name]:
                continue
            mean, low, high, pairs = found[name][rival]
            colour = "#1a7f4b" if low > 0 else "#b3412e" if high < 0 else "#777777"
            axis.plot((low, high), (y, y), color=colour, linewidth=2.2, solid_capstyle="round")
            axis.plot(mean, y, "D", color=colour, markersize=6)
            axis.annotate(
                f"{mean:+.1f}  (n {pairs})", (mean, y), (0, 6), textcoords="offset points", ha="center", fontsize=8
            )
        axis.axvline(0, color="#333333", linewidth=0.8)
        axis.set_title(f"prototypes less {words}", fontsize=10)
        axis.set_xlabel("test mIoU, points: mean of the pairs and 95 % interval", fontsize=8)
        axis.set_ylim(-0.6, len(names) - 0.2)
        axis.grid(axis="x", color="#e4e4e4")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(names)), names, fontsize=9)
    kept = io.BytesIO()
    figure.savefig(kept, format="png")
    return Image.open(kept).convert("RGB")


def gallery(run: Path, data: Path, classes: list[str], images: int, patches: int = 2) -> Image.Image:
    """One row a class: its prototypes side by side, each with its most typical patches below one another."""
    predictor = load(run)
    dataset = SegmentationDataset(catalog.find(Data(name="camvid", root=str(data)), "test"))
    step = max(1, len(dataset) // images)
    pictures = [dataset[i]["image"] for i in range(0, len(dataset), step)]
    small = [resize_image(picture, predictor._sizes) for picture in pictures]
    scale = pictures[0].shape[1] / small[0].shape[1]
    looks = find_looks(predictor.segmenter, small, count=patches, margin=round((HALF + 2) / scale))
    K = predictor.segmenter.head.prototypes.shape[1]
    font = ImageFont.load_default(size=15)
    rows = []
    for name in classes:
        c = predictor.names.index(name)
        row = Image.new("RGB", (LABEL + MOST * (SIDE + GAP), patches * (SIDE + 2) + 30), "white")
        draw = ImageDraw.Draw(row)
        draw.text((8, 8), name, fill="black", font=ImageFont.load_default(size=19))
        share = looks.share[c].nan_to_num()
        order = [k for k in share.argsort(descending=True).tolist() if share[k] >= 0.01]
        for place, k in enumerate(order[:MOST]):
            left = LABEL + place * (SIDE + GAP)
            draw.rectangle((left, 0, left + SIDE - 1, 5), fill=shades(predictor.palette[c], K)[k])
            for i, spot in enumerate(looks.places[c][k]):
                y, x = round(spot.row * scale), round(spot.column * scale)
                cut = pictures[spot.image][:, y - HALF : y + HALF, x - HALF : x + HALF].permute(1, 2, 0)
                picture = Image.fromarray(cut.contiguous().numpy())
                row.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, 8 + i * (SIDE + 2)))
            draw.text((left + 2, row.height - 21), f"{100 * float(share[k]):.0f} %", fill="#555", font=font)
        rows.append(row)
    return stacked(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evidence", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", nargs="+", default=["Building", "Tree", "Car"])
    parser.add_argument("--images", type=int, default=40)
    given = parser.parse_args()
    torch.manual_seed(0)
    plot = drawn(differences(given.evidence.read_text(encoding="utf-8")))
    looks = gallery(given.run, given.data, given.classes, given.images)
    plot = plot.resize((looks.width, round(plot.height * looks.width / plot.width)), Image.Resampling.LANCZOS)
    stacked([plot, looks]).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
