"""`data check` reports every planted fault in one run; `data stats` agrees with a loop over the pixels."""

import json

import numpy as np
import pytest
from PIL import Image

from picture_trees import CAMVID, write_folder_set, write_image, write_mask
from protoseg.config import Data, DataError
from protoseg.tasks import audit


def test_a_sound_set_passes(tmp_path, capsys):
    write_folder_set(tmp_path)
    assert audit.check(Data(name="folder", root=str(tmp_path))) == 0
    out = capsys.readouterr().out
    assert "opened train 3, val 2 pairs; 0 faults, 0 warnings" in out
    assert "no split 'test'" in out


def test_every_fault_is_in_one_report(tmp_path, capsys):
    write_folder_set(tmp_path)
    images, masks = tmp_path / "train" / "images", tmp_path / "train" / "masks"
    for name in ("cut", "small", "strange", "lossy", "ignored", "colour"):
        write_image(images / f"{name}.png")
        write_mask(masks / f"{name}.png", [0, 1])
    write_image(images / "alone.png")
    write_image(images / "cut.jpg")  # a duplicate stem as well
    (images / "cut.png").write_bytes((images / "cut.png").read_bytes()[:60])
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:200])
    write_mask(masks / "small.png", np.zeros((3, 3)))
    write_mask(masks / "strange.png", [0, 7, 9, 9])
    Image.fromarray(np.zeros((6, 8), dtype=np.uint8)).save(masks / "lossy.png", format="JPEG")
    write_mask(masks / "ignored.png", [255])
    Image.fromarray(np.zeros((6, 8, 3), dtype=np.uint8)).save(masks / "colour.png")
    write_mask(tmp_path / "val" / "masks" / "orphan.png", [0])
    assert audit.check(Data(name="folder", root=str(tmp_path)), json=True) == 3
    report = json.loads(capsys.readouterr().out)
    faults = {(f["split"], f["file"].rpartition("/")[2], f["what"][:26], f["warning"]) for f in report["faults"]}
    assert faults == {
        ("train", "alone.png", "no mask with this stem", False),
        ("train", "cut.png", "duplicate stem, also cut.j", False),
        ("train", "cut.jpg", "cannot be decoded (OSError", False),
        ("train", "small.png", "the mask is 3 x 3 but its ", False),
        ("train", "strange.png", "unknown label values 9 (24", False),
        ("train", "lossy.png", "a JPEG cannot be a mask, i", False),
        ("train", "colour.png", "the mask is RGB but no col", False),
        ("train", "ignored.png", "every pixel is ignored", True),
        ("val", "orphan.png", "a mask without an image", True),
    }
    assert report["fault_count"] == 7
    assert all(fault["fix"] for fault in report["faults"])
    assert any("value 7 is unknown in 1 mask, 12 px" in hint for hint in report["hints"])


def test_the_table_names_files_and_fixes(tmp_path, capsys):
    write_folder_set(tmp_path)
    write_mask(tmp_path / "train" / "masks" / "a.png", [0, 7])
    write_image(tmp_path / "val" / "images" / "z.png")
    assert audit.check(Data(name="folder", root=str(tmp_path))) == 3
    out = capsys.readouterr().out
    assert "2 faults, 0 warnings" in out
    assert "train/masks/a.png" in out
    assert "unknown label value 7 (24 px)" in out
    assert "add the mask or remove the image" in out


@pytest.mark.parametrize("split", ["train", "val"])
def test_forgotten_masks_are_one_fault(tmp_path, capsys, split):
    file = write_folder_set(tmp_path, "test: {images: val/images}\n")
    data = Data(name="folder", root=str(tmp_path))
    assert audit.check(data) == 0  # a test split may go without
    file.write_text(file.read_text().replace(f", masks: {split}/masks", ""))
    assert audit.check(data, json=True) == 3
    out = capsys.readouterr().out
    (fault,) = [f for f in json.loads(out[out.index("{") :])["faults"] if not f["warning"]]
    assert fault["split"] == split
    assert fault["what"].startswith("no mask, nor for ")
    assert "`masks`" in fault["fix"]


def test_no_validation_is_no_fault(tmp_path):
    write_folder_set(tmp_path)
    assert audit.check(Data(name="folder", root=str(tmp_path), val_split="")) == 0


@pytest.mark.parametrize("fault", ["root", "yaml", "split"])
def test_a_set_that_cannot_be_listed_is_a_fault_not_a_crash(tmp_path, capsys, fault):
    file = write_folder_set(tmp_path)
    data = Data(name="folder", root=str(tmp_path / "gone" if fault == "root" else tmp_path))
    if fault == "yaml":
        file.write_text("{")
    elif fault == "split":
        data = Data(name="folder", root=str(tmp_path), val_split="nope")
    assert audit.check(data) == 3
    out = capsys.readouterr().out
    assert "FAULT" in out
    assert ('or train without validation: --data.val_split ""' in out) == (fault == "split")


@pytest.mark.parametrize(
    ("classes", "values", "advice"),
    [
        ("{0: x, 1: y}", (0, 255), "label_map: {0: 0, 255: 1}"),
        ("[x, y, z]", (1, 2, 3), "label_map: {1: 0, 2: 1, 3: 2}"),
    ],
)
def test_the_usual_mistakes_get_a_line_to_paste(tmp_path, capsys, classes, values, advice):
    file = write_folder_set(tmp_path, values=values)
    text = file.read_text().replace("{0: road, 1: car}", classes)
    file.write_text(text + "ignore: []\n")
    assert audit.check(Data(name="folder", root=str(tmp_path))) == 3
    assert advice in capsys.readouterr().out
    file.write_text(text + "ignore: []\n" + advice + "\n")
    assert audit.check(Data(name="folder", root=str(tmp_path))) == 0


def test_training_on_what_is_tested_is_a_warning(tmp_path, capsys):
    file = write_folder_set(tmp_path)
    file.write_text(file.read_text().replace("val/", "train/") + "test: {images: val/images, masks: val/masks}\n")
    assert audit.check(Data(name="folder", root=str(tmp_path)), json=True) == 0
    assert "val is the same pairs as train" in capsys.readouterr().out
    file.write_text(file.read_text().replace("val: {images: train/images", "val: {images: 'train/images/[ab].png'"))
    audit.check(Data(name="folder", root=str(tmp_path)), json=True)
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert [f["what"] for f in faults if f["what"] == "also trained on"] == ["also trained on"] * 2


def test_stats_agree_with_a_loop(tmp_path, capsys):
    write_folder_set(tmp_path)
    write_mask(tmp_path / "train" / "masks" / "a.png", [0])
    assert audit.stats(Data(name="folder", root=str(tmp_path)), json=True) == 0
    got = json.loads(capsys.readouterr().out)
    # b and c hold 0, 1, 255 in turn over 48 pixels, a holds 48 of class 0
    assert [c["pixels"] for c in got["classes"]] == [80, 32]
    assert [c["images"] for c in got["classes"]] == [3, 2]
    assert got["ignored_share"] == pytest.approx(32 / 144)
    frequency = np.array([80 / 112, 32 / 64])
    assert got["median_frequency"] == pytest.approx((np.median(frequency) / frequency).tolist(), abs=1e-4)
    assert got["enet"] == pytest.approx((1 / np.log(1.02 + np.array([80, 32]) / 112)).tolist(), abs=1e-4)
    folder = tmp_path / "train" / "images"
    pixels = np.concatenate([np.asarray(Image.open(folder / f"{n}.png")).reshape(-1, 3) for n in "abc"]) / 255
    assert got["mean"] == pytest.approx(pixels.mean(0).tolist(), abs=1e-4)
    assert got["std"] == pytest.approx(pixels.std(0).tolist(), abs=1e-4)


def test_stats_print_weights_to_paste(tmp_path, capsys):
    write_folder_set(tmp_path, "label_map: {0: 0, 1: 0, 255: 255}\n")
    assert audit.stats(Data(name="folder", root=str(tmp_path), workers=0)) == 0
    out = capsys.readouterr().out
    assert "head.class_weights: [1.0, 1.0]  # median_frequency" in out  # car never occurs
    assert "road" in out


def test_stats_refuse_unknown_labels(tmp_path):
    write_folder_set(tmp_path)
    write_mask(tmp_path / "train" / "masks" / "b.png", [2])
    with pytest.raises(DataError, match=r"b\.png: unknown label value 2 \(48 px\)"):
        audit.stats(Data(name="folder", root=str(tmp_path)))


def test_synthetic_needs_no_check_and_has_stats(capsys):
    data = Data(length=4, crop_size=(16, 24))
    assert audit.check(data) == 0
    assert audit.stats(data) == 0
    assert "balloon" in capsys.readouterr().out


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"no CamVid at {CAMVID}")
def test_camvid_has_its_published_shares(capsys):
    assert audit.stats(Data(name="camvid", root=str(CAMVID)), json=True) == 0
    got = json.loads(capsys.readouterr().out)
    shares = [round(100 * c["share"] * (1 - got["ignored_share"]), 2) for c in got["classes"]]
    assert shares == [16.85, 23.26, 0.98, 31.66, 4.49, 9.72, 1.17, 1.13, 5.87, 0.64, 0.29]
