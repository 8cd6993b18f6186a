"""Painted scenes: pure functions of (split, index), every class present, and learnable from colour and place."""

import numpy as np
import pytest

from protoseg.config import Data, DataError
from protoseg.data import catalog, synthetic
from protoseg.data.dataset import read


def test_a_scene_is_a_function_of_split_and_index():
    a = synthetic.scenes("train", 8, (48, 64))
    for got, again in zip(a.item(3), synthetic.scenes("train", 99, (48, 64)).item(3)):
        np.testing.assert_array_equal(got, again)
    assert not np.array_equal(a.item(3)[0], a.item(4)[0])
    assert not np.array_equal(a.item(3)[0], synthetic.scenes("val", 8, (48, 64)).item(3)[0])


def test_all_classes_occur_and_none_rules():
    scenes = synthetic.scenes("train", 40, (64, 96))
    pixels = sum(np.bincount(scenes.item(i)[1].ravel(), minlength=7) for i in range(40))
    share = pixels / pixels.sum()
    assert (share > 0.01).all()
    assert share.max() < 0.55


def test_every_class_has_several_looks():
    """Within a class, colours of scenes lie far apart: more than half as far as classes from each other."""
    scenes = synthetic.scenes("train", 40, (48, 64))
    means = {c: [] for c in range(7)}
    for i in range(40):
        image, label = scenes.item(i)
        for c in range(7):
            if (label == c).sum() > 20:
                means[c].append(image[label == c].mean(0))
    within = np.mean([np.std(np.array(m), 0).mean() for m in means.values()])
    between = np.std(np.array([np.mean(m, 0) for m in means.values()]), 0).mean()
    assert within > between


def test_the_source_follows_the_settings():
    data = Data(length=20, crop_size=(32, 40), limit=10)
    assert [len(catalog.find(data, split)) for split in ("train", "val", "test")] == [10, 8, 8]
    image, label = read(catalog.find(data, "val"), 0)
    assert image.shape == (32, 40, 3)
    assert label.shape == (32, 40)
    assert label.dtype == np.int64


def test_impossible_scenes_are_refused():
    with pytest.raises(DataError, match="no split 'x'"):
        catalog.find(Data(), "x")
    with pytest.raises(DataError, match="crop_size"):
        catalog.find(Data(crop_size=(8, 64)), "train")
    with pytest.raises(DataError, match=r"data\.limit is 0"):
        catalog.find(Data(limit=0), "train")


def test_the_looks_are_the_ones_the_scene_was_painted_in():
    """Every pixel has a look of its class, ground and sky one a scene, and a look shows in the colour."""
    scenes = synthetic.scenes("train", 60, (48, 64))
    meadows = {look: [] for look in range(len(synthetic.MEADOWS))}
    seen = set()
    for i in range(60):
        image, label = scenes.item(i)
        looks = scenes.looks(i)
        assert looks.shape == label.shape
        assert looks.dtype == np.int64
        seen |= set(zip(label.ravel().tolist(), looks.ravel().tolist()))
        for c in (synthetic.SKY, synthetic.MOUNTAIN, synthetic.MEADOW, synthetic.LAKE):
            assert len(np.unique(looks[label == c])) <= 1
        sky = int(looks[label == synthetic.SKY][0])
        assert sky == np.random.default_rng([0, i]).integers(len(synthetic.SKIES))  # the generator's first draw
        if (label == synthetic.MEADOW).any():
            light = synthetic.SKIES[sky][2]
            look = int(looks[label == synthetic.MEADOW][0])
            meadows[look].append(image[label == synthetic.MEADOW].mean(0) / light)
    assert seen == {(c, look) for c, names in enumerate(synthetic.LOOKS) for look in range(len(names))}
    for look, colours in meadows.items():
        away = np.abs(np.mean(colours, 0) - np.array(synthetic.MEADOWS)).sum(1)
        assert away.argmin() == look


def test_the_looks_have_the_lengths_of_the_painters_tables():
    tables = ("SKIES", "MOUNTAINS", "MEADOWS", "LAKES", "TREES", "HOUSES", "BALLOONS")
    assert [len(names) for names in synthetic.LOOKS] == [len(getattr(synthetic, table)) for table in tables]
    assert len(synthetic.LABELS.names) == len(synthetic.LOOKS) <= synthetic.STRIDE
