"""`predict` and `load`: labels of any picture, each file once, nothing half-written, nothing of others overwritten."""

import contextlib
import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import protoseg
from protoseg.config import DataError, Evaluation, UserError
from protoseg.data import synthetic
from protoseg.data.images import read_image
from protoseg.data.labels import known_classes
from protoseg.tasks import prediction
from protoseg.tasks.prediction import affordable, load, predict
from saved_models import save_small, small_run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.png", "deep/a.png"]):
        image, _ = synthetic.paint(np.random.default_rng(i), (40, 56))
        Image.fromarray(image).save(folder / name)
    return folder


def read(path):
    with Image.open(path) as image:
        return np.array(image)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_the_same_picture_in_any_form_gives_the_same_labels(model, photos):
    predictor = protoseg.load(model)
    path = photos / "a.png"
    array = read(path)
    expected = predictor.predict(path).labels
    assert expected.shape == (40, 56)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for form in (str(path), Image.open(path), array, tensor, tensor.float() / 255, array.astype(np.float64) / 255):
        assert np.array_equal(predictor.predict(form).labels, expected)
    assert predictor.predict(array[..., 0]).labels.shape == (40, 56)


def test_what_is_no_picture_is_refused_in_words(model):
    predictor = load(model)
    for wrong, words in [
        (torch.zeros(1, 3, 8, 8), r"\(3, H, W\)"),
        (np.zeros((8, 8, 4), dtype=np.uint8), r"\(8, 8, 4\)"),
        (np.full((8, 8, 3), 2.0), "from 2.0"),
        (np.full((8, 8, 3), np.nan), "nan"),
        (np.zeros((8, 8, 3), dtype=np.int64), "int64"),
        (Image.new("I;16", (8, 8)), "I;16"),
        (7, "int"),
    ]:
        with pytest.raises(UserError, match=words):
            predictor.predict(wrong)
    with pytest.raises(DataError, match=r"nothing\.png"):
        predictor.predict("nothing.png")


def test_a_prediction_draws_saves_and_counts_itself(model, photos, tmp_path):
    result = load(model).predict(photos / "a.png", confidence=True)
    assert result.overlay().size == (56, 40)
    assert result.confidence.shape == (40, 56)
    assert 1 / 7 <= result.confidence.min() <= result.confidence.max() <= 1
    assert sum(result.shares().values()) == pytest.approx(1)
    assert np.array_equal(read(result.save(tmp_path / "x.png")), result.labels)
    with pytest.raises(UserError, match=r"\.png"):
        result.save(tmp_path / "x.jpg")


def test_any_size_comes_back_at_its_own_size(model):
    predictor = load(model)
    for size in [(1, 1), (1, 30), (31, 33), (65, 129)]:
        assert predictor.predict(np.zeros((*size, 3), dtype=np.uint8)).labels.shape == size


def test_the_network_sees_the_size_it_was_trained_at_and_the_answer_is_full_size(tmp_path):
    predictor = load(save_small(tmp_path / "m", base_size=16))
    seen = []
    predictor.segmenter.backbone.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[-2:])))
    assert predictor.predict(np.zeros((48, 64, 3), dtype=np.uint8)).labels.shape == (48, 64)
    assert max(seen[0]) < 48


def test_a_run_gives_its_final_model_and_its_way_of_validating(tmp_path):
    evaluation = Evaluation(mode="slide", window=(16, 16), stride=(8, 8))
    assert load(small_run(tmp_path / "run", evaluation=evaluation)).evaluation == evaluation
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nowhere")


def test_a_model_that_left_its_run_still_knows_how_it_was_validated(tmp_path):
    evaluation = Evaluation(mode="slide", window=(16, 24), stride=(8, 8), scales=(1.0, 1.5), flip=True)
    folder = save_small(tmp_path / "m", evaluation=dataclasses.asdict(evaluation))
    assert load(folder).evaluation == evaluation
    strange = save_small(tmp_path / "n", evaluation={"mode": "whole", "magic": 1})
    with pytest.raises(UserError, match="no setting magic"):
        load(strange)


def test_a_folder_becomes_labels_overlays_and_a_legend(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    outcome = predict(model, [photos], out, confidence=True)
    assert outcome.exit_code == 0
    names = ["a", "b", "deep/a"]
    expected = [f"{kind}/{n}.{end}" for kind, end in (("labels", "png"), ("overlays", "png"), ("confidence", "npy"))
                for n in names]  # fmt: skip
    assert files(out) == sorted([*expected, "legend.json"])
    image = Image.open(out / "labels" / "a.png")
    assert image.mode == "P"
    assert np.array_equal(np.array(image), load(model).predict(photos / "a.png").labels)
    legend = json.loads((out / "legend.json").read_text())
    assert legend["classes"][4] == {"id": 4, "name": "tree", "colour": [20, 110, 60]}
    sure = np.load(out / "confidence" / "a.npy")
    assert sure.dtype == np.float16
    assert sure.shape == (40, 56)
    assert "3 images segmented" in capsys.readouterr().out


def test_a_bad_image_is_named_and_the_others_are_done(model, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photo")
    outcome = predict(model, [str(photos)], tmp_path / "out")
    assert outcome.exit_code == 3
    assert len(outcome.written) == 3
    error = capsys.readouterr().err
    assert "1 of 4 images failed" in error
    assert "broken.jpg" in error


def test_the_limit_of_pixels_is_raised_as_its_message_says(model, photos, tmp_path, monkeypatch):
    refused = predict(model, [photos / "a.png"], tmp_path / "out", max_pixels=40 * 56 - 1)
    assert "40 x 56 pixels" in refused.failed[0][1]
    assert "--max_pixels of predict" in refused.failed[0][1]
    limits = []
    monkeypatch.setattr(
        prediction, "read_image", lambda path, exif, limit: limits.append(limit) or read_image(path, exif, limit)
    )
    assert predict(model, [photos / "a.png"], tmp_path / "out", max_pixels=40 * 56, keep_surest=0.5).exit_code == 0
    assert limits == [40 * 56] * 2  # the look at how sure the model is reads pictures too
    with pytest.raises(DataError, match="max_pixels = 9"):
        load(model).predict(photos / "a.png", max_pixels=9)


def test_nothing_is_written_where_no_image_can_be_read(model, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"not a photo")
    assert predict(model, [tmp_path / "broken.jpg"], tmp_path / "out").exit_code == 3
    with pytest.raises(UserError, match=r"evaluation\.scales"):
        predict(model, [tmp_path / "broken.jpg"], tmp_path / "out", evaluation=Evaluation(scales=()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", range(1, 12))
def test_an_interrupted_run_continues_with_each_file_once_and_no_partial_one(
    model, photos, tmp_path, monkeypatch, stop
):
    out, calls = tmp_path / "out", 0
    replace = os.replace

    def failing(source, target):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with contextlib.suppress(KeyboardInterrupt):
        predict(model, [photos], out)
    monkeypatch.setattr(os, "replace", replace)
    assert not any(p.name.startswith(".") for p in out.rglob("*"))  # no temporary files
    for path in out.rglob("*.png"):
        assert read(path).shape[:2] == (40, 56)
    before = {p: p.stat().st_mtime_ns for p in (out / "labels").rglob("*.png")}
    outcome = predict(model, [photos], out)
    assert len(outcome.skipped) == len(before)
    assert len(outcome.written) == 3 - len(before)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    whole = predict(model, [photos], tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")
    for path in whole.written:
        other = out / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes()


def test_other_peoples_files_and_other_models_results_are_never_overwritten(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "labels").mkdir(parents=True)
    Image.new("L", (3, 3)).save(out / "labels" / "a.png")
    mine = (out / "labels" / "a.png").read_bytes()
    for overwrite in (False, True):
        assert predict(model, [photos], out, overwrite=overwrite).exit_code == 3
        assert (out / "labels" / "a.png").read_bytes() == mine
    assert "is no prediction" in capsys.readouterr().err
    (out / "labels" / "a.png").unlink()

    predict(model, [photos], out)
    other = save_small(tmp_path / "other", kind="softmax")
    assert len(predict(other, [photos], out).failed) == 3
    assert "--overwrite" in capsys.readouterr().err
    assert len(predict(other, [photos], out, overwrite=True).written) == 3


def test_a_changed_picture_is_not_taken_for_done(model, photos, tmp_path):
    out = tmp_path / "out"
    predict(model, [photos / "a.png"], out)
    Image.new("RGB", (9, 9)).save(photos / "a.png")
    assert predict(model, [photos / "a.png"], out).exit_code == 3
    predict(model, [photos / "a.png"], out, overwrite=True)
    assert read(out / "labels" / "a.png").shape == (9, 9)


def test_an_overlay_asked_for_later_is_made(model, photos, tmp_path):
    out = tmp_path / "out"
    predict(model, [photos / "a.png"], out, overlay=False)
    assert files(out) == ["labels/a.png", "legend.json"]
    assert len(predict(model, [photos / "a.png"], out).written) == 1
    assert "overlays/a.png" in files(out)


def test_nothing_to_do_is_said(model, tmp_path):
    (tmp_path / "empty").mkdir()
    for given, words in [
        ([], "no images"), (["nowhere.png"], "no such file"), ([str(tmp_path / "*.jpg")], "nothing matches"),
        ([tmp_path / "empty"], "no images"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            predict(model, given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(model, photos, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match=r"legend\.json: cannot be written"):
        predict(model, [photos], tmp_path / "out")


def test_benchmark_servers_get_their_own_ids(tmp_path, photos, model):
    names, _, raw = known_classes("cityscapes")
    street = save_small(tmp_path / "street", names=names)
    predict(street, [photos / "a.png"], tmp_path / "c", submission_format="cityscapes")
    image = Image.open(tmp_path / "c" / "labels" / "a.png")
    assert image.mode == "L"
    assert np.array_equal(np.array(image), np.array(raw)[load(street).predict(photos / "a.png").labels])
    scenes = save_small(tmp_path / "scenes", names=known_classes("ade20k")[0])
    predict(scenes, [photos / "a.png"], tmp_path / "s", submission_format="ade20k")
    ids = read(tmp_path / "s" / "labels" / "a.png")
    assert np.array_equal(ids, load(scenes).predict(photos / "a.png").labels + 1)
    with pytest.raises(UserError, match="19 classes"):
        predict(model, [photos], tmp_path / "no", submission_format="cityscapes")


def test_huge_images_go_in_windows():
    usual = Evaluation(scales=(0.5, 1.0), flip=True)
    assert affordable(usual, 19, (1024, 2048)) == usual
    large = affordable(usual, 171, (4000, 6000))
    assert (large.mode, large.scales, large.flip) == ("slide", (1.0,), True)


def test_a_table_too_large_gives_the_labels_of_windows(model, photos, monkeypatch):
    expected = load(model, evaluation=Evaluation(mode="slide")).predict(photos / "a.png").labels
    monkeypatch.setattr(prediction, "LARGEST_TABLE", 1000)
    assert np.array_equal(load(model).predict(photos / "a.png").labels, expected)


def test_what_the_model_is_not_sure_of_becomes_void(model, photos, tmp_path):
    sure = load(model).predict(photos / "a.png", confidence=True)
    level = float(np.median(sure.confidence))
    predict(model, [photos / "a.png"], tmp_path / "out", void_below=level)
    labels = read(tmp_path / "out" / "labels" / "a.png")
    assert np.array_equal(labels, np.where(sure.confidence < level, 255, sure.labels))
    assert 0 < (labels == 255).mean() < 1
    assert not (tmp_path / "out" / "confidence").exists()
    with pytest.raises(UserError, match=r"are shares of 1; given 1\.5"):
        predict(model, [photos / "a.png"], tmp_path / "other", void_below=1.5)
    with pytest.raises(DataError, match="another image, model or settings"):
        raise DataError(predict(model, [photos / "a.png"], tmp_path / "out", void_below=level / 2).failed[0][1])


def test_every_class_keeps_its_surest_share_over_all_images(model, photos, tmp_path):
    share = 0.4
    files = [photos / "a.png", photos / "b.png"]
    found = [load(model).predict(file, confidence=True) for file in files]
    labels = np.concatenate([result.labels.ravel() for result in found])
    sure = np.concatenate([result.confidence.ravel() for result in found])
    predict(model, files, tmp_path / "out", keep_surest=share)
    kept = np.concatenate([read(tmp_path / "out" / "labels" / file.name).ravel() for file in files])
    assert ((kept == labels) | (kept == 255)).all()
    for c in np.unique(labels):
        mine = labels == c
        level = np.floor(np.quantile(sure[mine], 1 - share, method="lower") * 1000) / 1000
        assert np.array_equal(kept[mine] == c, sure[mine] >= level)
        assert (kept[mine] == c).mean() >= share
    assert len(np.unique(labels)) > 1
    assert 0 < (kept == 255).mean() < 1
    with pytest.raises(UserError, match="are shares of 1"):
        predict(model, files, tmp_path / "other", keep_surest=0.0)
    with pytest.raises(DataError, match="another image, model or settings"):  # the other image changes the thresholds
        raise DataError(predict(model, files[:1], tmp_path / "out", keep_surest=share).failed[0][1])


def test_an_unreadable_image_does_not_keep_the_others_from_their_thresholds(model, photos, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    outcome = predict(model, [photos / "a.png", tmp_path / "broken.png"], tmp_path / "out", keep_surest=0.5)
    assert [file.stem for file in outcome.written] == ["a"]
    assert [file.name for file, _ in outcome.failed] == ["broken.png"]
