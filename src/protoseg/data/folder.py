"""Your own images and masks, described by one small YAML. No code needed.

```yaml
train: {images: images/train, masks: masks/train}            # folders, joined by file stem
val:   {images: images/*.jpg, masks: "masks/{stem}_m.png", list: val.txt}   # globs, templates, a list of stems
test:  {images: [a, b]}                                      # masks may be left out, of train and val not
classes: {0: road, 1: car, 7: tree}                          # id in the mask: name; or a list of names
ignore: [255]                                                # ids that do not count (255 where nothing is said)
label_map: {3: 0, 4: 0, 5: 1}                                # optional and complete: id in the mask -> class id
palette: {0: [128, 64, 128], 1: "#00008e", 255: [[0, 0, 0], [9, 9, 9]]}   # colours; also how RGB masks are read
```

Paths are relative to `data.root`, or to the YAML where no root is given; a list may also lie beside the YAML.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from protoseg.config import DataError
from protoseg.data.images import SUFFIXES
from protoseg.data.labels import LARGEST_ID, RGB, LabelSpace, default_palette
from protoseg.data.listing import Entry, NoSplit, entries

ABOUT_CLASSES = ("classes", "ignore", "label_map", "palette")
ABOUT_SPLITS = {"images", "masks", "list"}
LARGEST_FILE = 1_000_000


def locate(file: str, root: str) -> tuple[Path, Path]:
    """(YAML, folder its paths start from) out of `data.file` and `data.root`, either of which may be empty."""
    if not file and not root:
        raise DataError("no folder given for data set folder; set data.root, data.file or the variable PROTOSEG_FOLDER")
    path = Path(file).expanduser() if file else Path(root).expanduser() / "dataset.yaml"
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; describe the data set there, for example: "
            "{train: {images: images/train, masks: masks/train}, val: {images: images/val, masks: masks/val}, "
            "classes: {0: background, 1: thing}}"
        )
    base = Path(root).expanduser() if root else path.parent
    if not base.is_dir():
        raise DataError(f"{base}: no such folder; check data.root")
    return path, base


def read(file: Path, root: Path, split: str) -> tuple[list[Entry], list[Entry] | None, LabelSpace, list[str] | None]:
    """Images, masks (`None`: unlabelled), label space, and the stems of a list file (`None`: all) of one split.

    Raises:
        DataError: the YAML is malformed or contradicts itself, or a folder it names is missing.
        NoSplit: it does not describe this split.
    """
    described = _load(file)
    space = _labels(described, file)
    part = described.get(split)
    if part is None:
        there = ", ".join(key for key in described if key not in ABOUT_CLASSES)
        raise NoSplit(f"{file}: no split {split!r}; it describes {there or 'none'}; choose one of them or add it")
    if not isinstance(part, dict) or "images" not in part or (extra := set(part) - ABOUT_SPLITS):
        wrong = f"unknown keys {sorted(extra)}" if isinstance(part, dict) and "images" in part else f"given {part!r}"
        raise DataError(f"{file}: split {split!r} needs {{images: ..., masks: ..., list: ...}}; {wrong}")
    wanted = read_list(_list_file(str(part["list"]), root, file)) if part.get("list") else None
    images = _collect(part["images"], root, file)
    masks = None
    if part.get("masks"):
        masks = _collect(part["masks"], root, file, [entry.key for entry in images])
    if wanted is not None:
        known = {entry.key for entry in images}
        # A line may carry more than the stem; a stem may contain spaces. What exists decides.
        wanted = [line if line in known else _stem(line.split()[0]) for line in wanted]
    return images, masks, space, wanted


def _list_file(name: str, root: Path, file: Path) -> Path:
    """A subset kept with the YAML that describes it, or a list of the data set itself."""
    beside = file.parent / name
    return beside if beside.is_file() else root / name


def read_list(path: Path) -> list[str]:
    """The lines of a list file that are not empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of images ({error})") from None
    return [line.strip() for line in lines if line.strip()]


def _load(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        if len(text) > LARGEST_FILE:
            raise DataError(f"{file}: larger than {LARGEST_FILE} characters; image lists belong in a `list` file")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise DataError(f"{file}: YAML aliases are not allowed")  # nested ones take minutes to expand
        described = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{file}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(described, dict) or not isinstance(described.get("classes"), dict | list):
        raise DataError(f"{file}: needs `classes`, for example {{0: background, 1: thing}}")
    for key, value in described.items():
        is_split = isinstance(key, str) and isinstance(value, dict) and ABOUT_SPLITS & set(value)
        if key not in ABOUT_CLASSES and not is_split:
            splits = "splits such as train: {images: ..., masks: ...}"
            raise DataError(f"{file}: unknown key {key!r}; expected {', '.join(ABOUT_CLASSES)} and {splits}")
    return described


def _labels(described: dict[str, Any], file: Path) -> LabelSpace:
    classes = described["classes"]
    classes = dict(enumerate(classes)) if isinstance(classes, list) else classes
    if not classes or not all(_is_id(key) and isinstance(name, str | int | bool) for key, name in classes.items()):
        raise DataError(f"{file}: `classes` maps ids (0..{LARGEST_ID}) to names; given {classes!r}")
    if read_wrongly := [name for name in classes.values() if isinstance(name, bool)]:
        said = "yes, on or true" if read_wrongly[0] else "no, off or false"
        raise DataError(f'{file}: `classes`: YAML reads a bare {said} as a truth value; put the name in quotes: "no"')
    names = tuple(str(classes[key]) for key in sorted(classes))
    train = {key: i for i, key in enumerate(sorted(classes))}
    ignore_index = 255 if len(classes) <= 255 else LARGEST_ID
    ignore = described.get("ignore", [i for i in (ignore_index,) if i not in classes])
    ignore = [] if ignore is None else [ignore] if isinstance(ignore, int) else ignore  # 0 is an id, not nothing
    if not isinstance(ignore, list) or not all(_is_id(i) for i in ignore):
        raise DataError(f"{file}: `ignore` is a list of ids; given {ignore!r}")
    if both := sorted(set(ignore) & set(classes)):
        raise DataError(f"{file}: {both} are classes and ignored at once; take them out of one of the two")
    ids: dict[int, int] = dict(train)
    if "label_map" in described:
        table = described["label_map"]
        if not isinstance(table, dict) or not all(_is_id(i) for pair in table.items() for i in pair):
            raise DataError(f"{file}: `label_map` maps ids in the mask to class ids, one each; given {table!r}")
        if wrong := {raw: to for raw, to in table.items() if to not in train and to not in ignore}:
            raise DataError(f"{file}: `label_map` points to ids that are no classes: {wrong}; classes: {sorted(train)}")
        ids = {raw: train.get(to, ignore_index) for raw, to in table.items()}
        both = sorted(set(ignore) & {raw for raw, to in ids.items() if to != ignore_index})
        if both and "ignore" in described:
            raise DataError(f"{file}: {both} are in `label_map` and in `ignore`; take them out of one of the two")
    ids = dict.fromkeys(ignore, ignore_index) | ids  # where nothing is said, what `label_map` needs is not ignored
    palette, colours = _colours(described.get("palette"), names, train, {*ignore}, ignore_index, file)
    return LabelSpace(names, palette, ignore_index, tuple(sorted(ids.items())), colours)


def _colours(
    given: Any, names: tuple[str, ...], train: dict[int, int], ignore: set[int], ignore_index: int, file: Path
) -> tuple[tuple[RGB, ...], tuple[tuple[RGB, int], ...]]:
    drawn = list(default_palette(names))
    if given is None:
        return tuple(drawn), ()
    if isinstance(given, list) and len(given) != len(train):
        raise DataError(
            f"{file}: `palette` as a list is one colour a class, in the order of their ids; there are {len(train)} "
            f"classes, given {len(given)}: give as many, or map ids to colours"
        )
    table = dict(zip(sorted(train), given)) if isinstance(given, list) else given
    if not isinstance(table, dict) or (wrong := sorted(set(table) - set(train) - ignore, key=str)):
        problem = f"ids {wrong} are neither classes nor ignored" if isinstance(table, dict) else f"given {given!r}"
        raise DataError(f"{file}: `palette` maps class ids to colours; {problem}")
    owner: dict[RGB, int] = {}
    for key, value in table.items():
        several = value if isinstance(value, list) and value and isinstance(value[0], list | str) else [value]
        colours = [_colour(item, file) for item in several]
        for colour in colours:
            if owner.setdefault(colour, key) != key:
                raise DataError(f"{file}: `palette` gives colour {list(colour)} to ids {owner[colour]} and {key}")
        if key in train:
            drawn[train[key]] = colours[0]
    return tuple(drawn), tuple((colour, train.get(key, ignore_index)) for colour, key in owner.items())


def _colour(value: Any, file: Path) -> RGB:
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return int(value[1:3], 16), int(value[3:5], 16), int(value[5:7], 16)
    if isinstance(value, list) and len(value) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in value):
        return value[0], value[1], value[2]
    raise DataError(f'{file}: a colour is [red, green, blue] of 0..255 or "#rrggbb"; given {value!r}')


def _collect(given: Any, root: Path, file: Path, stems: Sequence[str] | None = None) -> list[Entry]:
    """Files of one place or a list of places: a folder, a glob, a file, or (masks only) a template with {stem}."""
    places = given if isinstance(given, list) else [given]
    found: list[Entry] = []
    for place in places:
        if not isinstance(place, str) or not place:
            raise DataError(f"{file}: a place is a folder, a glob or a list of them; given {place!r}")
        if "{stem}" in place:
            if stems is None:
                raise DataError(f"{file}: {{stem}} stands for the image's stem; it only works in `masks`")
            paths = [(stem, root / place.replace("{stem}", stem)) for stem in stems]
            found += [Entry(stem, path) for stem, path in paths if path.exists()]
        elif (root / place).suffix.lower() in SUFFIXES and (root / place).is_file():
            found.append(Entry(Path(place).stem, root / place))
        elif any(mark in place for mark in "*?[") and not (root / place).is_dir():  # a name may hold these marks too
            found += _matches(place, root, file, "images" if stems is None else "masks")
        else:
            found += entries(root / place)
    if not found and stems is None:
        raise DataError(f"{file}: no images in {given!r} below {root}; known endings are {', '.join(SUFFIXES)}")
    return found


def _matches(pattern: str, root: Path, file: Path, key: str) -> list[Entry]:
    # Path.glob takes no absolute pattern, so an absolute one starts from its anchor.
    start = Path(pattern).anchor
    try:
        paths = sorted((Path(start) if start else root).glob(pattern[len(start) :]))
    except ValueError as error:
        what = str(error).partition(":")[0].lower()
        raise DataError(
            f"{file}: `{key}`: {pattern!r} is no glob ({what}); ** stands alone between slashes, as in images/**/*.png"
        ) from None
    # macOS leaves `._one.png` beside one.png, which is no picture; a folder is read without such files too
    return [Entry(p.stem, p) for p in paths if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]


def _stem(word: str) -> str:
    path = Path(word)
    return path.stem if path.suffix.lower() in SUFFIXES else word


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_ID
