"""Which file each image of a prediction becomes, and whether it is there already."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from protoseg.config import DataError, Evaluation, UserError
from protoseg.data.images import SUFFIXES
from protoseg.models import saving

ORIGIN = "protoseg"  # the PNG text chunk that says what a label file was made from


@dataclass(frozen=True)
class Target:
    """Where the files of one image go."""

    labels: Path
    overlay: Path
    confidence: Path

    @classmethod
    def of(cls, out: Path, name: Path) -> Target:
        """For an image called `name`, a relative path without suffix."""
        labels, overlays, confidence = cls.folders(out)
        return cls(labels / f"{name}.png", overlays / f"{name}.png", confidence / f"{name}.npy")

    @staticmethod
    def folders(out: Path) -> tuple[Path, Path, Path]:
        """Where labels, overlays and confidence of all images go."""
        return out / "labels", out / "overlays", out / "confidence"


def plan(images: Sequence[str | Path], out: Path) -> list[tuple[Path, Target]]:
    """Every image once, with the files it will become.

    Names are paths below the folder that was given, or below what files have in common. Where two images would share a
    name (a.jpg, a.png), both keep their suffix in it. What a folder or a glob holds of earlier outputs, in the folders
    of `Target` below `out`, and hidden files are left out.

    Raises:
        UserError: nothing given, nothing found, or a name that leads out of `out`.
    """
    found: dict[Path, Path] = {}  # image -> relative name
    alone: list[Path] = []
    ours = [folder.resolve() for folder in Target.folders(out)]
    for given in images:
        path = Path(given)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if _is_picture(p, p.relative_to(path)))
            if inside and not (inside := _without(ours, inside)):
                raise UserError(f"{path}: all images in this folder are outputs below {out}; choose another --out")
            if not inside:
                raise UserError(f"{path}: no images in this folder; looked for {', '.join(SUFFIXES)}")
            found |= {p: p.relative_to(path) for p in inside}
        elif path.is_file():
            alone.append(path)
        elif glob.has_magic(str(given)):
            matches = [Path(p) for p in sorted(glob.glob(str(given), recursive=True))]
            matches = _without(ours, [p for p in matches if p.is_file() and p.suffix.lower() in SUFFIXES])
            if not matches:
                raise UserError(f"{given}: nothing matches; quote the pattern, and ** reaches into folders")
            alone += matches
        else:
            raise UserError(f"{given}: no such file or folder; check the path")
    if alone:
        common = os.path.commonpath([p.absolute().parent for p in alone])
        found = {p: p.absolute().relative_to(common) for p in alone} | found
    unique: dict[str, tuple[Path, Path]] = {}
    for path, name in found.items():
        unique.setdefault(os.path.realpath(path), (path, name))
    if not unique:
        raise UserError("no images given; name files, folders or a quoted pattern")
    named = [(path, _no_suffix(name)) for path, name in unique.values()]
    count = Counter(str(name).casefold() for _, name in named)
    named = [(path, name.with_name(path.name) if count[str(name).casefold()] > 1 else name) for path, name in named]
    named = _told_apart(named)
    jobs = [(path, Target.of(out, name)) for path, name in named]
    root = out.resolve()
    for path, target in jobs:
        for file in (target.labels, target.overlay, target.confidence):
            if not file.parent.resolve().is_relative_to(root):  # a link inside `out` points elsewhere
                raise UserError(f"{path}: its output {file} would lie outside {out}; choose another --out")
    return jobs


def _is_picture(path: Path, name: Path) -> bool:
    """Whether a folder's file counts: not what is hidden, such as the `._one.png` that macOS leaves beside one.png."""
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in name.parts) and path.is_file()


def _without(folders: Sequence[Path], paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if not any(path.resolve().is_relative_to(folder) for folder in folders)]


def _no_suffix(name: Path) -> Path:
    return name.with_name(name.name[: -len(name.suffix)])


def _told_apart(named: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """Images of two given folders may still share a name: those go below a folder named by a digest of their own."""
    count = Counter(str(name).casefold() for _, name in named)
    return [
        (path, Path(_digest(str(path.absolute().parent))[:8]) / name if count[str(name).casefold()] > 1 else name)
        for path, name in named
    ]


def is_done(target: Target, origin: str, overlay: bool, confidence: bool, overwrite: bool) -> bool:
    """Whether an earlier run has finished this image.

    Raises:
        DataError: the label file is there but of another model, image or origin (and `overwrite` is off), or is not a
            prediction at all: that is never overwritten.
    """
    if not target.labels.exists():
        return False
    try:
        with Image.open(target.labels, formats=["PNG"]) as image:
            there = image.info.get(ORIGIN)
    except (OSError, SyntaxError, ValueError):
        there = None
    if there is None:
        raise DataError(f"{target.labels} exists and is no prediction; move it or choose another --out")
    if overwrite:
        return False
    if there != origin:
        raise DataError(
            f"{target.labels} was made from another image, model or settings; add --overwrite or choose another --out"
        )
    return (not overlay or target.overlay.exists()) and (not confidence or target.confidence.exists())


def fingerprint(folder: Path, evaluation: Evaluation, submission_format: str, exif: bool, levels: list[float]) -> str:
    """A digest of the model's files and of everything that changes labels."""
    digest = hashlib.sha256()
    for name in (saving.WEIGHTS, saving.CONFIG):
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    digest.update(repr((dataclasses.asdict(evaluation), submission_format, exif, levels)).encode())
    return digest.hexdigest()[:16]


def file_key(path: Path) -> str:
    """Which file this is, by place, size and time of change; nothing readable, since it goes into pictures.

    Raises:
        DataError: it is gone.
    """
    try:
        status = path.stat()
    except OSError as fault:
        raise DataError(f"{path}: cannot be read ({fault})") from fault
    return _digest(f"{os.path.realpath(path)}|{status.st_size}|{status.st_mtime_ns}")[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
