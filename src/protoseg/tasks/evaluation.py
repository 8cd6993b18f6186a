"""`protoseg evaluate`: a saved model on a split, every image once, at the labels' own size."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from protoseg import __version__
from protoseg.config import Data, DataError, Evaluation, UserError
from protoseg.data import catalog, loading, transforms
from protoseg.data.dataset import SegmentationDataset
from protoseg.engine import windows
from protoseg.engine.scoring import Scores, score
from protoseg.models import count_parameters, saving
from protoseg.tasks.files import counted, refuse_unwritable, several, write_json
from protoseg.tasks.saved import choose_device, model_folder, recorded, recorded_evaluation, settings_of


def evaluate(
    model: str | Path,
    *,
    data: Data | None = None,
    split: str = "test",
    prefix: str = "",
    evaluation: Evaluation | None = None,
    out: str | Path = "",
    json: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """Measure a model on a split, print a table, and write everything as JSON.

    Args:
        model: a model folder, or a run folder (its `final`, or else its `best`).
        data: default: the data the model was trained on, from the `config.yaml` of its run.
        split: `train`, `val` or `test`, as `data` names them; or the data set's own name of a split.
        prefix: only images whose names begin so, such as one drive of several; ratios are of these alone.
        evaluation: whole image or windows, scales, flip; default: as the model was validated.
        out: the JSON file; default `evaluation-<split>.json` in the model's folder, with a prefix
            `evaluation-<split>-<prefix>.json`.
        json: print the JSON instead of the table.
        device: auto, cpu or gpu.

    Returns:
        What was written: settings, counts, means, one entry per class, the confusion matrix. Ratios lie in [0, 1]; null
        is a class that occurs nowhere.

    Raises:
        UserError: no model there, no data settings, other classes than the model's, `out` cannot be written.
        DataError: a file of the split that cannot be used.
    """
    folder = model_folder(model)
    segmenter, meta = saving.load(folder)
    data = data or recorded_data(folder)
    evaluation = evaluation or recorded_evaluation(folder, meta)
    windows.check(evaluation)
    source = catalog.find(data, getattr(data, f"{split}_split", split) or split)
    source = beginning_with(source, prefix)
    check_classes(folder, meta["names"], source.labels.names)
    catalog.check_labelled(source, "evaluate a labelled split, or use protoseg predict")
    part = re.sub(r"\W+", "-", prefix)
    report_file = Path(out) if out else folder / f"evaluation-{source.split}{f'-{part}' if part else ''}.json"
    refuse_unwritable(report_file)

    dataset = SegmentationDataset(source, transforms.evaluation(data))
    batches = loading.evaluation_loader(dataset, workers=data.workers)
    where = choose_device(device)
    scores = score(
        segmenter.to(where),
        counted(batches, len(dataset), "evaluating"),
        evaluation,
        boundary=evaluation.boundary,
        calibration=True,
    )
    report = {
        "protoseg": __version__,
        "torch": torch.__version__,
        "model": str(folder),
        "step": meta.get("step"),
        "split": source.split,
        "prefix": prefix,
        "data": dataclasses.asdict(data),
        "evaluation": dataclasses.asdict(evaluation),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "parameters": count_parameters(segmenter),
        **summary(scores, tuple(meta["names"])),
    }
    written = write_json(report_file, report)
    print(written.read_text(encoding="utf-8") if json else f"{table(report)}\nwritten: {written}")
    return report


def recorded_data(folder: Path) -> Data:
    """The data settings of the run a model folder lies in.

    Raises:
        UserError: the folder lies in no run.
    """
    given = recorded(folder).get("data")
    if given is None:
        raise UserError(
            f"{folder} lies in no run folder, so its data set is not known; say --data.name and --data.root"
        )
    return settings_of(Data, given, str(folder.parent / "config.yaml"))


def beginning_with(source: catalog.Source, prefix: str) -> catalog.Source:
    """The items of a split whose names begin with `prefix`; all of them where it is empty.

    Raises:
        DataError: there is none, or the scenes are generated and have no names of their own.
    """
    if not prefix:
        return source
    kept = [i for i, stem in enumerate(source.stems) if stem.startswith(prefix)]
    if not kept or source.scenes is not None:
        names = ", ".join(source.stems[:2])
        raise DataError(f"{source.name}/{source.split}: no image's name begins with {prefix!r}; they are {names}, ...")
    return dataclasses.replace(
        source,
        stems=tuple(source.stems[i] for i in kept),
        images=tuple(source.images[i] for i in kept),
        masks=tuple(source.masks[i] for i in kept),
    )


def check_classes(folder: Path, model: tuple[str, ...], data: tuple[str, ...]) -> None:
    """Refuse a data set with other classes, or the same in another order: all numbers would be wrong.

    Raises:
        UserError: names the first difference.
    """
    if tuple(model) == tuple(data):
        return
    if len(model) != len(data):
        what = f"the model has {len(model)} classes, the data set {len(data)}"
    else:
        first = next(i for i in range(len(model)) if model[i] != data[i])
        what = f"class {first} is {model[first]!r} in the model but {data[first]!r} in the data set"
    raise UserError(f"{folder}: {what}; evaluate on data with the model's classes ({', '.join(model[:5])}, ...)")


def summary(scores: Scores, names: tuple[str, ...]) -> dict[str, Any]:
    """`Scores` as plain data; NaN stays NaN (`files.finite` makes it null)."""
    overlap, truth, predicted = scores.overlap, scores.matrix.sum(1), scores.matrix.sum(0)
    return {
        "images": scores.images,
        "num_classes": len(names),
        "miou": overlap.miou,
        "miou_over_classes": overlap.averaged,
        "pixel_accuracy": overlap.pixel_accuracy,
        "mean_accuracy": overlap.mean_accuracy,
        "frequency_weighted_iou": overlap.frequency_weighted_iou,
        "boundary_miou": scores.boundary_miou,
        "calibration_error": scores.calibration_error,
        "prototypes": scores.distinctness,
        "ms_per_image": 1000 * scores.seconds / max(scores.images, 1),
        "classes": [
            {
                "name": name,
                "iou": overlap.iou[c].item(),
                "accuracy": overlap.accuracy[c].item(),
                "boundary_iou": None if scores.boundary_iou is None else scores.boundary_iou[c].item(),
                "labelled_pixels": int(truth[c]),
                "predicted_pixels": int(predicted[c]),
            }
            for c, name in enumerate(names)
        ],
        "confusion": scores.matrix.tolist(),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text, in percent."""
    width = max(len("class"), *(len(entry["name"]) for entry in report["classes"]))
    pixels = max(sum(entry["labelled_pixels"] for entry in report["classes"]), 1)
    edges = report["boundary_miou"] is not None
    lines = [f"{'class':<{width}}     IoU  accuracy" + ("  boundary" if edges else "") + "  pixels"]
    for entry in report["classes"]:
        columns = [f"{entry['name']:<{width}}", percent(entry["iou"], 7), percent(entry["accuracy"], 9)]
        if edges:
            columns.append(percent(entry["boundary_iou"], 9))
        lines.append(" ".join([*columns, percent(entry["labelled_pixels"] / pixels, 7)]))
    lines.append("")
    lines.append(
        f"mIoU {percent(report['miou'])} over {report['miou_over_classes']} of {report['num_classes']} classes, "
        f"{several(report['images'], 'image')} of {report['split']!r}"
        + (f" that begin with {report['prefix']!r}" if report["prefix"] else "")
    )
    lines.append(
        f"pixel accuracy {percent(report['pixel_accuracy'])}   mean accuracy {percent(report['mean_accuracy'])}   "
        f"frequency-weighted IoU {percent(report['frequency_weighted_iou'])}"
    )
    last = []
    if edges:
        last.append(f"boundary IoU {percent(report['boundary_miou'])}")
    if report["calibration_error"] is not None:
        last.append(f"calibration error {percent(report['calibration_error'])}")
    last.append(f"{report['ms_per_image']:.0f} ms per image ({report['device']})")
    lines.append("   ".join(last))
    if report["prototypes"]:
        lines.append(
            f"prototypes: mean pairwise cosine within a class {report['prototypes']['pairwise_cosine']:.3f} "
            f"(1 is collapse), {percent(report['prototypes']['used'])} of them in use"
        )
    return "\n".join(lines)


def percent(value: float | None, width: int = 0) -> str:
    """A ratio as percent with two decimals; a dash where there is no number."""
    return f"{'-' if value is None or value != value else f'{100 * value:.2f}':>{width}}"
