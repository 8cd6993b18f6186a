"""Tiny images, masks and data set trees for tests, in the encodings of the official releases."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

SHARED = Path(os.environ.get("PROTOSEG_SHARED", Path(__file__).parents[2] / "shared"))
CAMVID = SHARED / "data" / "camvid"


def write_image(path, size=(6, 8), seed=0, **options):
    """A random RGB picture of (height, width)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def write_mask(path, values, dtype=np.uint8, **options):
    """A mask that holds `values`, repeated over 6 x 8 pixels unless they are a matrix."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.asarray(values, dtype=dtype)
    if values.ndim == 1:
        values = np.resize(values, (6, 8))
    Image.fromarray(values).save(path, **options)
    return values


def write_pairs(root, images="images", masks="masks", names=("a", "b", "c"), values=(0, 1), suffix=".png"):
    for seed, name in enumerate(names):
        write_image(root / images / f"{name}{suffix}", seed=seed)
        write_mask(root / masks / f"{name}.png", values)


def write_folder_set(root, extra="", values=(0, 1, 255)):
    """A `folder` set with three pairs in train and two in val; returns its YAML."""
    write_pairs(root / "train", values=values)
    write_pairs(root / "val", names=("d", "e"), values=values)
    text = (
        "train: {images: train/images, masks: train/masks}\n"
        "val: {images: val/images, masks: val/masks}\n"
        "classes: {0: road, 1: car}\n" + extra
    )
    (root / "dataset.yaml").write_text(text)
    return root / "dataset.yaml"
