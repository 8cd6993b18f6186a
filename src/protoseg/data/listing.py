"""Lists of files, and images joined with their masks: every fault of a split, found before the first pixel is read."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from protoseg.config import DataError
from protoseg.data.images import SUFFIXES


class NoSplit(DataError):
    """The data set has no split of this name."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: where, what, what to do. A warning does not keep the data from being used."""

    file: str
    what: str
    fix: str
    warning: bool = False


@dataclass(frozen=True)
class Entry:
    """A file and the key that joins an image with its mask."""

    key: str
    path: Path


def entries(folder: Path, suffixes: Sequence[str] = SUFFIXES, ending: str = "") -> list[Entry]:
    """Files of one folder by name, not deeper; the key is the stem without `ending`, other stems are left out.

    Raises:
        DataError: the folder is missing or cannot be read.
    """
    try:
        with os.scandir(folder) as found:  # no stat per file: a folder may hold 100,000
            files = (entry.name for entry in found if not entry.is_dir(follow_symlinks=False))
            names = sorted(name for name in files if not name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: {(error.strerror or str(error)).lower()}; check data.root") from None
    kept = []
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in suffixes and stem.endswith(ending):
            kept.append(Entry(stem.removesuffix(ending), folder / name))
    return kept


def join(
    images: Sequence[Entry], masks: Sequence[Entry] | None, wanted: Iterable[str] | None = None
) -> tuple[list[tuple[str, Path, Path | None]], list[Fault]]:
    """Pairs (key, image, mask) in order of their keys, and what keeps the others from being pairs.

    Args:
        images, masks: what was found. No masks at all (`None`): a split without labels.
        wanted: the keys of a list file; `None` takes everything.
    """
    faults: list[Fault] = []
    image_of = _by_key(images, "image", faults)
    mask_of = _by_key(masks or (), "mask", faults)
    keys = sorted(image_of)
    if wanted is not None:
        keys = list(dict.fromkeys(_normal(w) for w in wanted))
        gone = [key for key in keys if key not in image_of]
        faults += [Fault(key, "listed, but there is no image", "add the image or take it off the list") for key in gone]
        keys = [key for key in keys if key in image_of]
    pairs = []
    folded = {key.casefold(): key for key in mask_of}
    for key in keys:
        mask = mask_of.get(key)
        if masks is not None and mask is None:
            near = folded.get(key.casefold())
            fix = f"rename {mask_of[near].name}, it differs in case" if near else "add the mask or remove the image"
            faults.append(Fault(str(image_of[key]), "no mask with this stem", fix))
        else:
            pairs.append((key, image_of[key], mask))
    if wanted is None:
        orphans = [path for key, path in mask_of.items() if key not in image_of]
        faults += [Fault(str(path), "a mask without an image", "add the image or remove it", True) for path in orphans]
    return pairs, faults


def _by_key(found: Sequence[Entry], kind: str, faults: list[Fault]) -> dict[str, Path]:
    known: dict[str, Path] = {}
    for entry in found:
        key = _normal(entry.key)
        if entry.path.is_symlink() and not os.path.exists(entry.path):
            faults.append(Fault(str(entry.path), "a link that leads nowhere", "repair or remove the link"))
        elif key in known:
            faults.append(Fault(str(entry.path), f"duplicate stem, also {known[key].name}", f"keep one {kind} a stem"))
        else:
            known[key] = entry.path
    return known


def _normal(key: str) -> str:
    """One spelling of accented letters: macOS stores them decomposed, most archives do not."""
    return unicodedata.normalize("NFC", key)
