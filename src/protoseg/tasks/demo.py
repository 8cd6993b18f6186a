"""`protoseg demo`: from nothing to a trained model and one page with pictures, in two minutes on two cores.

Two networks see the same generated landscapes in the same order, from the same seed, for the same number of steps. One
ends in a learned classifier, one in prototypes; both have the same projection. The page shows what each says about
landscapes neither has seen, and what the prototypes have found.
"""

from __future__ import annotations

import base64
import csv
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protoseg import __version__
from protoseg.config import Data, Evaluation, Head, HeadName, Model, Optim, Recipe, UserError
from protoseg.data import catalog
from protoseg.data.dataset import Sample, SegmentationDataset
from protoseg.engine.drawing import colourise, legend, overlay, panels, shades, stacked
from protoseg.engine.looks import Looks, chosen_prototypes, find_looks, similarities
from protoseg.tasks.evaluation import evaluate, percent
from protoseg.tasks.files import write_whole
from protoseg.tasks.pages import rendered
from protoseg.tasks.prediction import Predictor, load
from protoseg.tasks.training import train

MARK = ".protoseg-demo"  # a folder that holds it is an earlier demo, and may be replaced
HEADS: dict[str, HeadName] = {"softmax": "softmax_projected", "prototypes": "prototype"}
PATCH = 14  # half the side of a patch around a typical place, in pixels
SHOWN = 6  # landscapes on the page


def demo(
    out: str | Path = "demo", *, steps: int = 300, seed: int = 0, num_prototypes: int = 5, accelerator: str = "auto"
) -> Path:
    """Train both networks, compare them, and write the page.

    Args:
        out: folder; an earlier demo there is replaced, anything else is refused.
        steps: optimiser steps of each network.
        seed: of both trainings.
        num_prototypes: K per class; the landscapes have two to four looks per class.
        accelerator: auto, cpu or gpu.

    Returns:
        The page, `OUT/demo.html`.

    Raises:
        UserError: `out` holds something else.
    """
    folder = prepare(Path(out))
    data = Data(
        name="synthetic", crop_size=(96, 128), scale_range=(0.75, 1.5), length=256, workers=0, val_split="", cache=True
    )
    reports = {}
    for name, kind in HEADS.items():
        print(f"\n{name}: {steps} steps on generated landscapes")
        recipe = Recipe(
            data=data,
            model=Model(network="tiny"),
            head=Head(kind=kind, num_prototypes=num_prototypes, embed_dim=64),
            optim=Optim(lr=1e-2, warmup_steps=min(20, steps // 5)),
            evaluation=Evaluation(boundary=True),
            steps=steps,
            batch_size=8,
            seed=seed,
            out=str(folder / name),
            log_every=max(1, steps // 6),
            checkpoint_every=0,
            accelerator=accelerator,  # type: ignore[arg-type]
        )
        run = train(recipe)
        reports[name] = {**evaluate(run, device=accelerator), "ms_per_step": ms_per_step(run)}

    predictors = {name: load(folder / name, device=accelerator) for name in HEADS}
    unseen = SegmentationDataset(catalog.find(data, "test"))
    scenes = [unseen[i] for i in range(len(unseen))]
    print()
    print(side_by_side(reports))
    rows = [scene_pictures(scenes[i], predictors, num_prototypes) for i in telling(scenes, SHOWN)]
    looks = find_looks(predictors["prototypes"].segmenter, [s["image"] for s in scenes], count=4, margin=PATCH)
    write_overlays(folder / "overlays", rows, predictors["prototypes"])
    page = write_whole(
        folder / "demo.html",
        lambda fresh: fresh.write_text(
            render(reports, rows, gallery(looks, scenes, predictors["prototypes"]), steps, seed), encoding="utf-8"
        ),
    )
    print(f"\npage: {page}\noverlays: {folder / 'overlays'}\nmodels: {', '.join(str(folder / n) for n in HEADS)}")
    return page


def prepare(folder: Path) -> Path:
    """An empty folder, or one an earlier demo left, emptied of what that demo wrote.

    Raises:
        UserError: it holds anything else, or cannot be written.
    """
    if folder.exists() and not (folder / MARK).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something that is no earlier demo; choose another folder with --out")
    write_whole(folder / MARK, lambda fresh: fresh.write_text("a demo of protoseg; the next one replaces it\n"))
    for name in (*HEADS, "overlays"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "demo.html").unlink(missing_ok=True)
    return folder


def ms_per_step(run: Path) -> float:
    """Median over the reports of a run: other work on the machine shows less than in a mean."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        times = [float(row["ms_per_step"]) for row in csv.DictReader(file) if row.get("ms_per_step")]
    return float(np.median(times)) if times else float("nan")


def side_by_side(reports: dict[str, dict[str, Any]]) -> str:
    """The two reports as one table."""
    left, right = reports["softmax"], reports["prototypes"]

    def line(name: str, one: str, other: str, gap: str = "") -> str:
        return f"{name:<22}{one:>10}{other:>12}{gap:>10}".rstrip()

    def ratio(name: str, one: float, other: float) -> str:
        return line(name, percent(one), percent(other), signed(one, other))

    lines = [line("", "softmax", "prototypes", "gain")]
    lines += [ratio(a["name"], a["iou"], b["iou"]) for a, b in zip(left["classes"], right["classes"])]
    lines.append("")
    lines.append(ratio("mIoU", left["miou"], right["miou"]))
    lines.append(ratio("pixel accuracy", left["pixel_accuracy"], right["pixel_accuracy"]))
    lines.append(ratio("boundary IoU", left["boundary_miou"], right["boundary_miou"]))
    lines.append(line("ms per step", f"{left['ms_per_step']:.0f}", f"{right['ms_per_step']:.0f}"))
    parameters = [f"{r['parameters']['learnable']:,}" for r in (left, right)]
    lines.append(line("learnable parameters", *parameters))
    lines.append(line("stored prototypes", "-", f"{right['parameters']['prototypes']:,}"))
    lines.append(line("pairwise cosine", "-", f"{right['prototypes']['pairwise_cosine']:.3f}"))
    lines.append(line("prototypes in use", "-", percent(right["prototypes"]["used"])))
    return "\n".join(lines)


def signed(one: float | None, other: float | None) -> str:
    """`other` less `one` in percentage points, with its sign."""
    if one is None or other is None or one != one or other != other:
        return ""
    return f"{100 * (other - one):+.2f}"


def telling(scenes: list[Sample], count: int) -> list[int]:
    """The landscapes with most classes in them, in their own order."""
    variety = [len(scene["label"].unique()) for scene in scenes]
    return sorted(sorted(range(len(scenes)), key=lambda i: (-variety[i], i))[:count])


def scene_pictures(scene: Sample, predictors: dict[str, Predictor], num_prototypes: int) -> dict[str, Image.Image]:
    """One row of the page: name of the column -> picture."""
    pixels = scene["image"].permute(1, 2, 0).numpy()
    palette = predictors["prototypes"].palette
    found = {name: predictor.predict(pixels) for name, predictor in predictors.items()}
    chosen = chosen_prototypes(similarities(predictors["prototypes"].segmenter, scene["image"]))
    colours = [shade for colour in palette for shade in shades(colour, num_prototypes)]
    return {
        "image": Image.fromarray(pixels),
        "truth": overlay(pixels, scene["label"].numpy(), palette, opacity=0.8),
        "softmax": overlay(pixels, found["softmax"].labels, palette, opacity=0.8),
        "prototypes": overlay(pixels, found["prototypes"].labels, palette, opacity=0.8),
        "chosen prototype": Image.fromarray(colourise(chosen.cpu().numpy(), colours, ignore_index=-1)),
    }


def write_overlays(folder: Path, rows: list[dict[str, Image.Image]], predictor: Predictor) -> None:
    """One PNG a landscape: all pictures side by side at twice their size, and the legend below."""
    for number, row in enumerate(rows):
        large = [(name, picture.resize((2 * picture.width, 2 * picture.height))) for name, picture in row.items()]
        sheet = panels(large)
        sheet = stacked([sheet, legend(predictor.names, predictor.palette, sheet.width)])
        write_whole(folder / f"scene-{number}.png", lambda fresh, sheet=sheet: sheet.save(fresh, "PNG"))  # type: ignore[misc]


def gallery(looks: Looks, scenes: list[Sample], predictor: Predictor) -> list[dict[str, Any]]:
    """For each class its prototypes: colour, share of the class's pixels, patches around the most typical places."""
    classes = []
    for c, (name, colour) in enumerate(zip(predictor.names, predictor.palette)):
        K = len(looks.places[c])
        found = [
            {
                "colour": css(shade),
                "share": looks.share[c, k].item(),
                "patches": [
                    data_uri(patch(scenes[place.image]["image"], place.row, place.column))
                    for place in looks.places[c][k]
                ],
            }
            for k, shade in enumerate(shades(colour, K))
        ]
        classes.append({"name": name, "colour": css(colour), "prototypes": found})
    return classes


def patch(image: Tensor, row: int, column: int) -> Image.Image:
    """The square of side 2·PATCH around a pixel, enlarged."""
    cut = image[:, row - PATCH : row + PATCH, column - PATCH : column + PATCH]
    return Image.fromarray(cut.permute(1, 2, 0).contiguous().numpy()).resize((84, 84), Image.Resampling.BICUBIC)


def css(colour: tuple[int, int, int]) -> str:
    """#rrggbb"""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def data_uri(image: Image.Image) -> str:
    """A picture inside the page."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def render(
    reports: dict[str, dict[str, Any]],
    rows: list[dict[str, Image.Image]],
    classes: list[dict[str, Any]],
    steps: int,
    seed: int,
) -> str:
    """The page as one string: pictures, styles and all inside, nothing fetched from anywhere."""
    return rendered(
        "demo.html.j2",
        softmax=reports["softmax"],
        prototypes=reports["prototypes"],
        signed=signed,
        columns=list(rows[0]),
        rows=[{name: data_uri(enlarged(picture)) for name, picture in row.items()} for row in rows],
        classes=classes,
        steps=steps,
        seed=seed,
        version=__version__,
        torch_version=torch.__version__,
    )


def enlarged(picture: Image.Image) -> Image.Image:
    """Twice the size, for screens with small pixels."""
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.BICUBIC)
