"""`protoseg predict` and `protoseg.load`: a saved model on images without labels.

    OUT/
      legend.json            id, name and colour of every class
      labels/NAME.png        pixel value = class id; 8 bits with a palette, 16 where a byte is too small
      overlays/NAME.png      the image under its labels
      confidence/NAME.npy    float16 probability of the chosen class, if asked for

The label file is written last and says in its header what it was made from, so an interrupted run continues where it
stopped, and a file that somebody else put there is never overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from protoseg.config import Data, DataError, Evaluation, UserError
from protoseg.data.images import MAX_PIXELS, read_image
from protoseg.data.labels import known_classes
from protoseg.data.transforms import resize_image
from protoseg.engine import windows
from protoseg.engine.drawing import default_palette, index_image, overlay
from protoseg.engine.windows import segment_labels
from protoseg.models import saving
from protoseg.models.segmenter import Segmenter
from protoseg.tasks.files import counted, several, write_json, write_whole
from protoseg.tasks.outputs import ORIGIN, file_key, fingerprint, is_done, plan
from protoseg.tasks.saved import choose_device, model_folder, recorded_evaluation

Picture = str | Path | Image.Image | np.ndarray | Tensor
Submission = Literal["", "ade20k", "cityscapes"]
LEVELS = 1000  # steps in which `keep_surest` finds a class's threshold
LARGEST_TABLE = 2**27  # class probabilities of one image held at once (512 MB); larger ones are segmented in windows


@dataclass(frozen=True)
class Prediction:
    """One segmented image.

    Attributes:
        labels: (H, W) class ids, uint8 (int32 for more than 256 classes).
        names, palette: of the C classes.
        image: (H, W, 3) uint8, what was segmented.
        confidence: (H, W) float32 probability of the chosen class, if asked for.
    """

    labels: np.ndarray
    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    image: np.ndarray = field(repr=False)
    confidence: np.ndarray | None = field(default=None, repr=False)

    def overlay(self, opacity: float = 0.55) -> Image.Image:
        """The image under its labels."""
        return overlay(self.image, self.labels, self.palette, opacity=opacity, ignore_index=-1)

    def shares(self) -> dict[str, float]:
        """Class name -> share of the pixels, largest first; absent classes are left out."""
        ids, counts = np.unique(self.labels, return_counts=True)
        found = {self.names[i]: float(count / self.labels.size) for i, count in zip(ids, counts)}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def save(self, path: str | Path) -> Path:
        """Write the labels as an index PNG with palette, whole or not at all.

        Raises:
            UserError: the file cannot be written, or the name does not end in .png (JPEG would change the ids).
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise UserError(f"{path}: labels are saved as .png; other formats change or lose the ids")
        image = index_image(self.labels, self.palette, ignore_index=-1)
        return write_whole(path, lambda fresh: image.save(fresh, "PNG"))


class Predictor:
    """A loaded model that segments images of any size. Made by `load`.

    Args:
        segmenter: the network; moved to `device`, in eval mode.
        meta: of `models.saving`: `names`, `palette`, `base_size`, `max_long_side`.
        evaluation: whole image or windows, scales, flip.
        device: where to compute.
    """

    def __init__(self, segmenter: Segmenter, meta: dict[str, Any], evaluation: Evaluation, device: torch.device):
        self.segmenter = segmenter.eval().to(device)
        self._answering = self.segmenter.for_inference()
        self.names: tuple[str, ...] = tuple(meta["names"])
        self.palette = tuple(meta.get("palette") or default_palette(len(self.names)))
        self.evaluation = evaluation
        self.device = device
        self._sizes = Data(base_size=meta.get("base_size"), max_long_side=meta.get("max_long_side"))

    def predict(
        self, image: Picture, *, confidence: bool = False, exif: bool = False, max_pixels: int = MAX_PIXELS
    ) -> Prediction:
        """Segment one image at its own size.

        Args:
            image: a file; a PIL image; an array (H, W, 3) or (H, W), or a tensor (3, H, W), of uint8 or of
                float in [0, 1].
            confidence: also keep the probability of the chosen class.
            exif: turn a file upright as its EXIF orientation says.
            max_pixels: refuse to decode a larger file.

        Raises:
            DataError: the file cannot be read. UserError: not an image of these kinds.
        """
        pixels = as_pixels(image, exif, max_pixels)
        height, width = pixels.shape[:2]
        small = resize_image(torch.from_numpy(pixels).permute(2, 0, 1), self._sizes)
        evaluation = affordable(self.evaluation, len(self.names), (small.shape[-2], small.shape[-1]))
        kind = torch.uint8 if len(self.names) <= 256 else torch.int32
        labels, sure = segment_labels(
            self._answering, small, evaluation, (height, width), confidence=confidence, dtype=kind
        )
        return Prediction(
            labels=labels.cpu().numpy(),
            names=self.names,
            palette=self.palette,
            image=pixels,
            confidence=None if sure is None else sure.cpu().numpy(),
        )


def load(folder: str | Path, *, device: str = "auto", evaluation: Evaluation | None = None) -> Predictor:
    """A saved model, ready to predict.

        predictor = protoseg.load("runs/first")
        predictor.predict("street.jpg").overlay().save("street-overlay.png")

    Args:
        folder: a model folder, or a run folder (its `final`, or else its `best`).
        device: `auto` takes a GPU where there is one.
        evaluation: whole image or windows; default: as the model was validated.

    Raises:
        UserError: no whole model there, no such device, or evaluation settings that cannot be.
    """
    path = model_folder(folder)
    segmenter, meta = saving.load(path)
    evaluation = evaluation or recorded_evaluation(path, meta)
    windows.check(evaluation)
    return Predictor(segmenter, meta, evaluation, choose_device(device))


def affordable(evaluation: Evaluation, num_classes: int, size: tuple[int, int]) -> Evaluation:
    """`evaluation`, or windows at one scale where the table of all probabilities would be huge (`LARGEST_TABLE`)."""
    numbers = num_classes * size[0] * size[1]
    if numbers * sum(scale**2 for scale in evaluation.scales) <= LARGEST_TABLE:
        return evaluation
    return dataclasses.replace(evaluation, mode="slide", scales=(1.0,))


def as_pixels(image: Picture, exif: bool = False, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Any picture as (H, W, 3) uint8.

    Raises:
        DataError: a file that cannot be read. UserError: another kind, shape or range.
    """
    if isinstance(image, str | Path):
        return read_image(image, exif, max_pixels)
    if isinstance(image, Image.Image):
        if image.mode not in ("RGB", "L", "P", "1", "RGBA", "LA", "PA", "CMYK", "YCbCr"):
            raise UserError(f"image mode {image.mode} has no certain way to 8-bit RGB; convert it first")
        return np.array(image.convert("RGB"))
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise UserError(f"a tensor image must be (3, H, W), given {tuple(image.shape)}")
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    if not isinstance(image, np.ndarray):
        raise UserError(f"an image is a path, a PIL image, an array or a tensor; given {type(image).__name__}")
    if image.ndim == 2:
        image = np.stack([image] * 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"an array image must be (H, W, 3) or (H, W), given {image.shape}")
    if image.dtype == np.uint8:
        return np.array(image)
    if not np.issubdtype(image.dtype, np.floating) or not (image.min() >= 0 and image.max() <= 1):
        raise UserError(
            f"image values must be uint8, or float in [0, 1]; given {image.dtype} from {image.min()} to {image.max()}"
        )
    return (image * 255).round().astype(np.uint8)


@dataclass(frozen=True)
class Outcome:
    """What `predict` did: label files written, those that were there already, and (file, reason) of what failed."""

    written: tuple[Path, ...]
    skipped: tuple[Path, ...]
    failed: tuple[tuple[Path, str], ...]

    @property
    def exit_code(self) -> int:
        """3, data refused, if an image failed."""
        return 3 if self.failed else 0


def predict(
    model: str | Path,
    images: Sequence[str | Path],
    out: str | Path = "predictions",
    *,
    overlay: bool = True,
    confidence: bool = False,
    evaluation: Evaluation | None = None,
    void_below: float = 0.0,
    keep_surest: float = 1.0,
    submission_format: Submission = "",
    overwrite: bool = False,
    exif: bool = False,
    max_pixels: int = MAX_PIXELS,
    device: str = "auto",
) -> Outcome:
    """Segment images into a folder. One that fails is named at the end; the others are done all the same.

    Args:
        model: a run or model folder.
        images: files, folders (searched to any depth) and globs.
        out: made if needed.
        overlay: also write the image under its labels.
        confidence: also write the probability of the chosen class, float16.
        evaluation: whole image or windows; default: as the model was validated.
        void_below: pixels whose class is less probable than this are written as void (255, or 65535 where 255 is a
            class), so that sure predictions can be trained on: `data.predicted`.
        keep_surest: share of every class's pixels, over all images, that is kept; the less sure ones are written as
            void. Each class so gets a threshold of its own, and rare classes, seldom sure, stay in the masks
            (class-balanced self-training, Zou et al., ECCV 2018). Below 1, every image is segmented twice.
        submission_format: the ids a benchmark server wants: `ade20k` (id + 1) or `cityscapes` (labelIds).
        overwrite: do again what is there already.
        exif: turn images upright as their EXIF orientation says.
        max_pixels: refuse to decode larger images.
        device: auto, cpu or gpu.

    Raises:
        UserError: no model, nothing that matches, a format that does not fit the classes, a folder that cannot be
            written.
    """
    jobs = plan(images, Path(out))
    predictor = load(model, device=device, evaluation=evaluation)
    encode = submission_encoder(submission_format, predictor.names)
    if not 0 <= void_below <= 1 or not 0 < keep_surest <= 1:
        raise UserError(f"void_below and keep_surest are shares of 1; given {void_below} and {keep_surest}")
    if submission_format and (void_below or keep_surest < 1):
        raise UserError(f"a server wants every pixel: submission_format {submission_format} goes without void")
    levels = np.full(len(predictor.names), void_below)
    if keep_surest < 1:
        sources = [source for source, _ in jobs]
        levels = np.maximum(levels, _levels(predictor, sources, keep_surest, exif, max_pixels))
    made_from = fingerprint(model_folder(model), predictor.evaluation, submission_format, exif, levels.tolist())

    written: list[Path] = []
    skipped: list[Path] = []
    failed: list[tuple[Path, str]] = []
    for source, target in counted(jobs, len(jobs), "predicting"):
        try:
            origin = f"{made_from}-{file_key(source)}"
            if is_done(target, origin, overlay, confidence, overwrite):
                skipped.append(target.labels)
                continue
            result = predictor.predict(
                source, confidence=confidence or bool(levels.any()), exif=exif, max_pixels=max_pixels
            )
        except DataError as fault:
            failed.append((source, str(fault)))
            continue
        if not written:
            write_json(Path(out) / "legend.json", legend(predictor, submission_format, encode))
        if overlay:
            write_whole(target.overlay, partial(result.overlay().save, format="PNG"))
        if confidence and result.confidence is not None:
            write_whole(target.confidence, partial(np.save, arr=result.confidence.astype(np.float16)))
        if submission_format:
            picture = Image.fromarray(encode(result.labels))
        else:
            labels, void = _sure(result, levels)
            picture = index_image(labels, result.palette, ignore_index=void)
        note = PngImagePlugin.PngInfo()
        note.add_text(ORIGIN, origin)
        write_whole(target.labels, partial(picture.save, format="PNG", pnginfo=note))
        written.append(target.labels)
    outcome = Outcome(tuple(written), tuple(skipped), tuple(failed))
    _report(outcome, Path(out))
    return outcome


def _levels(predictor: Predictor, sources: Sequence[Path], share: float, exif: bool, max_pixels: int) -> np.ndarray:
    """(C,) the probability that `share` of the pixels given each class, over all images, reach; 0 for an empty class.

    Counted in steps of a thousandth, so memory does not grow with the images. Unreadable images are left out.
    """
    counts = np.zeros((len(predictor.names), LEVELS), dtype=np.int64)
    for source in counted(sources, len(sources), "looking how sure the model is"):
        with contextlib.suppress(DataError):  # told when its labels are to be written
            result = predictor.predict(source, confidence=True, exif=exif, max_pixels=max_pixels)
            bins = (_confidence(result).astype(np.float64) * LEVELS).astype(np.int64).clip(max=LEVELS - 1)
            cells = result.labels.astype(np.int64) * LEVELS + bins
            counts += np.bincount(cells.ravel(), minlength=counts.size).reshape(counts.shape)
    above = counts[:, ::-1].cumsum(1)[:, ::-1]  # C LEVELS, pixels at least as sure as the bin's lower edge
    reached = above >= share * counts.sum(1, keepdims=True)
    return (reached.sum(1) - 1) / LEVELS * (counts.sum(1) > 0)


def _sure(result: Prediction, levels: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels with void where the model is not sure, and the id of void; -1 where there is none."""
    if not levels.any():
        return result.labels, -1
    void = 255 if len(result.names) <= 255 else 65535
    return np.where(_confidence(result) < levels[result.labels], void, result.labels), void


def _confidence(result: Prediction) -> np.ndarray:
    assert result.confidence is not None  # asked for
    return result.confidence


def _report(outcome: Outcome, out: Path) -> None:
    there = (
        f", {len(outcome.skipped)} {'was' if len(outcome.skipped) == 1 else 'were'} there already"
        if outcome.skipped
        else ""
    )
    print(f"{several(len(outcome.written), 'image')} segmented into {out}{there}")
    if outcome.failed:
        total = len(outcome.written) + len(outcome.skipped) + len(outcome.failed)
        print(f"{len(outcome.failed)} of {several(total, 'image')} failed:", file=sys.stderr)
        for source, reason in outcome.failed:
            print(f"  {reason if str(source) in reason else f'{source}: {reason}'}", file=sys.stderr)


def submission_encoder(kind: Submission, names: tuple[str, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """Class ids -> the uint8 ids a benchmark server wants.

    Raises:
        UserError: the model's classes are not those of the benchmark.
    """
    if not kind:
        return lambda labels: labels
    wanted, _, raw = known_classes(kind)
    if tuple(names) != tuple(wanted):
        raise UserError(
            f"submission_format {kind} needs its {len(wanted)} classes; the model has {len(names)}: "
            f"{', '.join(names[:3])}, ..."
        )
    ids = raw if kind == "cityscapes" else range(1, len(wanted) + 1)
    table = np.array(list(ids), dtype=np.uint8)
    return lambda labels: table[labels]


def legend(predictor: Predictor, kind: Submission, encode: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """What the pixel values of the label files mean."""
    ids = encode(np.arange(len(predictor.names))).tolist()
    return {
        "pixel values": f"ids of the {kind} server" if kind else "class ids",
        "classes": [
            {"id": i, "name": name, "colour": list(colour)}
            for i, name, colour in zip(ids, predictor.names, predictor.palette)
        ],
        "evaluation": dataclasses.asdict(predictor.evaluation),
    }
