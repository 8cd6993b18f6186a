"""The README's picture: paired differences of a study, and what the prototypes of one of its runs look like.

    python studies/picture.py runs/camvid-heads CAMVID docs/evidence.png [--classes Building Tree Car] [--images 40]

The upper part is the study's own plot. Below, for classes of `default/seed0`, the test patches most similar to each
prototype, at most one per frame, with the share of the class's predicted pixels that chose it; those with less than one
percent are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
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
    parser.add_argument("study", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", nargs="+", default=["Building", "Tree", "Car"])
    parser.add_argument("--images", type=int, default=40)
    given = parser.parse_args()
    torch.manual_seed(0)
    looks = gallery(given.study / "default" / "seed0", given.data, given.classes, given.images)
    plot = Image.open(given.study / "differences.png").convert("RGB")
    plot = plot.resize((looks.width, round(plot.height * looks.width / plot.width)), Image.Resampling.LANCZOS)
    stacked([plot, looks]).save(given.out, optimize=True)


if __name__ == "__main__":
    main()
