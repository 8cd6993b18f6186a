"""Label spaces: raw ids and colours to train ids, and what is said about the rest."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protoseg.config import DataError
from protoseg.data.labels import LabelSpace, default_palette, known_classes, spans, voc_colour

SPACE = LabelSpace(("a", "b"), ((1, 1, 1), (2, 2, 2)), ids=((3, 0), (7, 1), (300, 1), (0, 255)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_ids_map_the_same_for_every_integer_type(dtype):
    raw = np.array([[0, 3], [7, 3]], dtype=dtype)
    assert SPACE.encode(raw, "m.png").tolist() == [[255, 0], [1, 0]]
    assert SPACE.encode(raw, "m.png").dtype == np.int64


def test_a_16_bit_id_is_not_its_low_byte():
    assert SPACE.encode(np.array([[300]], dtype=np.uint16), "m.png").tolist() == [[1]]


@pytest.mark.parametrize("value", [-1, 2, 254, 255, 256, 65535, 65536, 10**9])
def test_unknown_values_are_refused_with_file_value_and_count(value):
    raw = np.full((2, 3), value, dtype=np.int64)
    raw[0, 0] = 3
    with pytest.raises(DataError, match=rf"dir/m.png: unknown label value {value} \(5 px\)"):
        SPACE.encode(raw, "dir/m.png")


def test_without_a_table_ids_are_train_ids():
    space = LabelSpace(("a", "b"), ((1, 1, 1), (2, 2, 2)))
    assert space.encode(np.array([[0, 1, 255]], dtype=np.uint8), "m").tolist() == [[0, 1, 255]]
    with pytest.raises(DataError, match="2 "):
        space.encode(np.array([[2]], dtype=np.uint8), "m")


@given(st.integers(0, 2**32 - 1))
def test_colours_agree_with_a_loop(seed):
    colours = (((0, 0, 0), 255), ((255, 0, 0), 0), ((0, 0, 255), 1), ((0, 1, 0), 0))
    space = LabelSpace(("a", "b"), ((1, 1, 1), (2, 2, 2)), colours=colours)
    rng = np.random.default_rng(seed)
    raw = np.array([c for c, _ in colours], dtype=np.uint8)[rng.integers(0, 4, (3, 4))]
    loop = [[dict(colours)[tuple(pixel)] for pixel in row] for row in raw.tolist()]
    assert space.encode(raw, "m").tolist() == loop
    raw[1, 2] = (255, 255, 255)
    with pytest.raises(DataError, match=r"\[255, 255, 255\] \(1 px\)"):
        space.encode(raw, "m")


def test_spans():
    assert spans([0, 1, 2, 5, 7, 8, 255]) == "0-2, 5, 7-8, 255"


def test_voc_colours_are_the_published_ones():
    assert [voc_colour(i) for i in (0, 1, 2, 3, 15, 20)] == [
        (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (192, 128, 128), (0, 64, 128),
    ]  # fmt: skip


def test_a_class_is_black_only_if_it_is_the_background():
    assert (0, 0, 0) not in default_palette(("road", "car"))
    assert default_palette(("background", "car"))[0] == (0, 0, 0)
    many = default_palette(tuple(map(str, range(200))))
    assert len(set(many)) == 200


@pytest.mark.parametrize(
    ("name", "number", "first", "last"),
    [
        ("camvid", 11, "Sky", "Bicyclist"),
        ("cityscapes", 19, "road", "bicycle"),
        ("voc", 21, "background", "tvmonitor"),
        ("ade20k", 150, "wall", "flag"),
        ("coco_stuff", 171, "person", "wood"),
    ],
)
def test_the_class_lists_are_whole(name, number, first, last):
    names, palette, ids = known_classes(name)
    assert (len(names), len(palette), names[0], names[-1]) == (number, number, first, last)
    assert len(set(names)) == number == len(set(ids))
    assert all(0 <= value <= 255 for colour in palette for value in colour)


def test_coco_stuff_leaves_out_the_ids_nobody_annotated():
    ids = known_classes("coco_stuff")[2]
    assert sorted(set(range(1, 183)) - set(ids)) == [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]
