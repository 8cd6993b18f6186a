"""The data set files of `studies/data` describe real splits; read where the pictures are at hand."""

import os
from pathlib import Path

import pytest

from protoseg.config import Data
from protoseg.data import catalog

FILES = Path(__file__).parent.parent / "studies" / "data"
SHARED = Path(os.environ.get("PROTOSEG_SHARED", Path(__file__).parent.parent.parent / "shared")) / "data"
SIZES = {
    "camvid-heldout": {"train": 266, "val": 101},
    "camvid-trainval": {"train": 468, "val": 101, "test": 233},
    "camvid-eighth": {"train": 46, "rest": 321, "val": 101, "test": 233},
    "camvid-eighth-heldout": {"train": 34, "val": 101},
    "camvid-four": {"train": 367, "val": 101, "test": 233},
    "camvid-four-heldout": {"train": 266, "val": 101},
    "dsb2018": {"train": 463, "val": 100, "test": 101},
    "ccp": {"train": 804, "val": 100, "test": 100},
}


def stems(name, split):
    root = SHARED / name.partition("-")[0]
    if not root.is_dir():
        pytest.skip(f"{root} is not at hand; set PROTOSEG_SHARED")
    return catalog.find(Data(name="folder", file=str(FILES / f"{name}.yaml"), root=str(root)), split).stems


def test_every_file_is_counted():
    assert {path.stem for path in FILES.glob("*.yaml")} == set(SIZES)


@pytest.mark.parametrize(("name", "split"), [(name, split) for name, sizes in SIZES.items() for split in sizes])
def test_the_splits_have_their_sizes(name, split):
    assert len(stems(name, split)) == SIZES[name][split]


@pytest.mark.parametrize("name", ["camvid-heldout", "camvid-eighth-heldout", "camvid-four-heldout"])
def test_the_held_out_drive_is_not_trained_on(name):
    assert not set(stems(name, "train")) & set(stems(name, "val"))
    assert {stem[:6] for stem in stems(name, "val")} == {"0006R0"}


def test_what_is_called_unlabelled_has_no_mask():
    root = SHARED / "camvid"
    if not root.is_dir():
        pytest.skip(f"{root} is not at hand; set PROTOSEG_SHARED")
    data = Data(name="folder", file=str(FILES / "camvid-eighth.yaml"), root=str(root))
    rest = catalog.find(data, "rest")
    assert all(mask is None for mask in rest.masks)
    assert not set(rest.stems) & set(catalog.find(data, "train").stems)
