"""Pictures that say what the numbers say."""

import io

import numpy as np
import pytest
from PIL import Image

from protoseg.engine.drawing import (
    IGNORED,
    colourise,
    default_palette,
    index_image,
    legend,
    overlay,
    panels,
    region_edges,
    shades,
)


def test_the_palette_is_stable_and_its_colours_differ():
    assert default_palette(12) == default_palette(171)[:12]
    colours = np.array(default_palette(30), dtype=int)
    distance = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(30, dtype=int)
    assert distance.min() >= 25
    assert len(set(default_palette(171))) == 171


def reopened(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()))


def test_an_index_image_holds_the_indices_and_shows_the_colours():
    labels = np.array([[0, 1, 2], [20, 254, 255]])
    palette = default_palette(21)
    image = reopened(index_image(labels, palette))
    assert image.mode == "P"
    assert np.array_equal(np.array(image), labels)
    shown = np.array(image.convert("RGB"))
    assert tuple(shown[1, 0]) == palette[20]
    assert tuple(shown[1, 2]) == IGNORED


def test_many_classes_take_sixteen_bits():
    labels = np.array([[0, 256, 846]])
    image = reopened(index_image(labels, default_palette(847)))
    assert np.array_equal(np.array(image), labels)
    with pytest.raises(ValueError, match="16-bit"):
        index_image(np.array([[70_000]]), default_palette(2))


def test_colours_outside_the_palette_are_grey():
    shown = colourise(np.array([[0, 2, 255, -1]]), default_palette(2))
    assert tuple(shown[0, 0]) == default_palette(2)[0]
    assert all(tuple(c) == IGNORED for c in shown[0, 1:])


def test_an_overlay_mixes_and_leaves_ignored_pixels_bare():
    image = np.full((6, 8, 3), 100, dtype=np.uint8)
    labels = np.zeros((6, 8), dtype=int)
    labels[:, 4:] = 255
    mixed = np.array(overlay(image, labels, [(200, 0, 0)], opacity=0.5))
    assert tuple(mixed[0, 0]) == (150, 50, 50)
    assert tuple(mixed[0, 6]) == (100, 100, 100)
    assert mixed[0, 3].min() > 200  # the line between the two
    with pytest.raises(ValueError, match=r"\(6, 8\).*\(5, 8\)"):
        overlay(image, labels[1:], [(200, 0, 0)])


def test_an_overlay_in_strips_is_the_same_overlay(monkeypatch):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 20, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, (50, 20))
    whole = np.array(overlay(image, labels, default_palette(3)))
    monkeypatch.setattr("protoseg.engine.drawing.STRIP_ROWS", 7)
    assert np.array_equal(np.array(overlay(image, labels, default_palette(3))), whole)


def test_relatives_of_a_colour_are_told_apart():
    for colour in default_palette(12):
        assert len(set(shades(colour, 10))) == 10
    assert len(shades((10, 20, 30), 1)) == 1


def test_edges_are_one_pixel_wide():
    labels = np.zeros((4, 4), dtype=int)
    labels[:, 2:] = 1
    assert region_edges(labels).sum() == 4


def test_legends_wrap_and_panels_fit():
    palette = default_palette(11)
    names = [f"class {i}" for i in range(11)]
    narrow, wide = legend(names, palette, 200), legend(names, palette, 1600)
    assert narrow.width == 200
    assert narrow.height > wide.height
    assert any(tuple(colour) == palette[10] for colour in np.array(narrow).reshape(-1, 3))
    pictures = [("a", Image.new("RGB", (30, 20))), ("b", Image.new("L", (40, 10))), ("c", Image.new("RGB", (5, 5)))]
    line, column = panels(pictures), panels(pictures, columns=1)
    assert line.width > 3 * 40
    assert column.height > line.height
