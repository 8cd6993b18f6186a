"""Each image has its own place below the output folder, the same one every time."""

import os
from pathlib import Path

import pytest
from PIL import Image

from protoseg.config import UserError
from protoseg.tasks.outputs import plan


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for name in ["a.png", "b.png", "deep/a.png"]:
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def test_equal_names_do_not_collide(photos, tmp_path):
    Image.new("RGB", (8, 8)).save(photos / "a.jpg")
    other = tmp_path / "others"
    other.mkdir()
    Image.new("RGB", (8, 8)).save(other / "b.png")
    for given in (
        [photos],
        [photos / "a.png", photos / "deep" / "a.png", photos / "a.jpg"],
        [photos, other],
        [photos, photos / "a.png", str(photos / "*.png"), str(photos / "**" / "*.jpg")],
    ):
        jobs = plan(given, tmp_path / "out")
        targets = [str(target.labels).casefold() for _, target in jobs]
        assert len(set(targets)) == len(targets)
        sources = {os.path.realpath(source) for source, _ in jobs}
        assert len(sources) == len(jobs)
        assert jobs == plan(given, tmp_path / "out")


@pytest.mark.parametrize("out", ["predictions", "."])
@pytest.mark.parametrize("given", [".", "**/*.png"])
def test_a_second_time_its_own_outputs_are_no_images(photos, monkeypatch, out, given):
    monkeypatch.chdir(photos)
    jobs = plan([given], Path(out))
    assert len(jobs) == 3
    for _, target in jobs:
        for file in (target.labels, target.overlay):
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("P", (8, 8)).save(file)
    assert plan([given], Path(out)) == jobs
    with pytest.raises(UserError, match="all images in this folder are outputs below"):
        plan([Path(out, "labels")], Path(out))


def test_hidden_files_of_a_folder_are_no_images(photos, tmp_path):
    for name in ("._a.png", "deep/._a.png", ".thumbnails/a.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"a resource fork of macOS")
    assert [source.name for source, _ in plan([photos], tmp_path / "out")] == ["a.png", "b.png", "a.png"]
    assert len(plan([photos / "._a.png"], tmp_path / "out")) == 1  # named by itself it is meant


def test_names_stay_inside_the_output_folder(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos / "deep")
    for given in ["../a.png", "../../photos/b.png", "..", "../*.png"]:
        for _, target in plan([given], tmp_path / "out"):
            assert target.labels.resolve().is_relative_to(tmp_path / "out" / "labels")
    (tmp_path / "out" / "labels").mkdir(parents=True)
    (tmp_path / "out" / "labels" / "deep").symlink_to(photos)
    with pytest.raises(UserError, match="outside"):
        plan([photos], tmp_path / "out")
