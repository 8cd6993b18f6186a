"""The demo from nothing to a page, at a few steps; and what it must not overwrite."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from protoseg.config import UserError
from protoseg.data import catalog
from protoseg.data.dataset import SegmentationDataset
from protoseg.engine.looks import find_looks
from protoseg.tasks.demo import demo, gallery, ms_per_step, prepare, render, side_by_side, telling
from protoseg.tasks.prediction import load
from saved_models import SMALL, save_small


class Page(HTMLParser):
    """Tags, the addresses they fetch from, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.words = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words += data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, demo(folder, steps=3, num_prototypes=3, accelerator="cpu")


def test_the_page_is_one_file_that_fetches_nothing(made):
    page = Page(made[1].read_text(encoding="utf-8"))
    assert page.fetched
    assert all(address.startswith("data:image/png;base64,") for address in page.fetched)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in made[1].read_text(encoding="utf-8")
    assert page.tags.count("img") >= 6 * 5
    for words in ("What they see", "balloon", "mIoU", "3 prototypes per class", "learnable parameters"):
        assert words in page.words


def test_models_reports_and_overlays_lie_beside_it(made):
    folder = made[0]
    for name in ("softmax", "prototypes"):
        assert (folder / name / "final" / "evaluation-test.json").is_file()
        assert ms_per_step(folder / name) > 0
        assert load(folder / name).names[0] == "sky"
    sheets = sorted((folder / "overlays").iterdir())
    assert len(sheets) == 6
    with Image.open(sheets[0]) as sheet:
        assert sheet.width > 5 * 2 * 128


def test_only_an_earlier_demo_is_replaced(made, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no earlier demo"):
        prepare(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    folder = tmp_path / "old"
    (prepare(folder) / "softmax").mkdir()
    (folder / "notes.txt").write_text("kept")
    prepare(folder)
    assert not (folder / "softmax").exists()
    assert (folder / "notes.txt").read_text() == "kept"


def test_names_are_escaped(tmp_path, made):
    bad = "<script>alert(1)</script>"
    predictor = load(save_small(tmp_path / "m"))
    scenes = [SegmentationDataset(catalog.find(SMALL, "test"))[0]]
    classes = gallery(find_looks(predictor.segmenter, [scenes[0]["image"]], margin=14), scenes, predictor)
    classes[0]["name"] = bad
    written = (made[0] / "prototypes" / "final" / "evaluation-test.json").read_text(encoding="utf-8")
    report = json.loads(written) | {"ms_per_step": 1.0}
    page = render({"softmax": report, "prototypes": report}, [{"image": Image.new("RGB", (4, 4))}], classes, 3, 0)
    assert bad not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"\{\{|\{%", page)


def test_the_table_puts_both_side_by_side():
    def report(miou, learnable):
        return {
            "classes": [{"name": "sky", "iou": miou}, {"name": "nowhere", "iou": float("nan")}],
            "miou": miou, "pixel_accuracy": 0.5, "boundary_miou": 0.25, "ms_per_step": 12.4,
            "parameters": {"learnable": learnable, "prototypes": 70},
            "prototypes": {"pairwise_cosine": 0.5, "used": 1.0},
        }  # fmt: skip

    text = side_by_side({"softmax": report(0.5, 1000), "prototypes": report(0.53, 900)})
    assert re.search(r"mIoU +50\.00 +53\.00 +\+3\.00", text)
    assert re.search(r"nowhere +- +-$", text, re.MULTILINE)
    assert re.search(r"learnable parameters +1,000 +900", text)


def test_the_landscapes_shown_are_the_varied_ones():
    scenes = SegmentationDataset(catalog.find(SMALL, "test"))
    scenes = [scenes[i] for i in range(5)]
    variety = [len(scene["label"].unique()) for scene in scenes]
    shown = telling(scenes, 2)
    assert min(variety[i] for i in shown) >= sorted(variety)[-2]
