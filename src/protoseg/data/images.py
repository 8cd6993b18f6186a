"""Pictures and masks from disk. One decoder, Pillow, because the others change what a mask says.

OpenCV turns a palette mask into colours, torchvision rescales it, `convert("L")` turns ids into brightness, and half a
JPEG passes `Image.verify()`: the only test of a file is to decode all of it.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from protoseg.config import DataError
from protoseg.data.labels import LabelSpace
from protoseg.data.matfile import read_matrix

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
# Pillow warns from here on and refuses at twice as much: a small file can claim any size.
MAX_PIXELS = 89_478_485
# Pillow stretches grey PNGs of 2 and 4 bits to 0..255: ids 0 1 2 3 come out as 0 85 170 255, and 255 would be ignored
# without a word. The raw mode of the only tile says what was on disk.
STRETCHED = {"L;2": 85, "L;4": 17}
IDS = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")


def read_image(path: Path | str, exif: bool = False, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """A picture as (H, W, 3) uint8 RGB.

    Args:
        exif: turn it upright as its EXIF orientation says.
        max_pixels: refuse to decode more than this (at most 178,956,970, where Pillow itself refuses).

    Raises:
        DataError: missing, truncated, too large, or of a kind with no certain way to 8-bit RGB.
    """
    image = _decode(path, exif, max_pixels)
    if image.mode not in ("RGB", "L", "P", "1", "RGBA", "LA", "PA", "CMYK", "YCbCr"):
        raise DataError(f"{path}: image mode {image.mode} (16 bits or float a channel); convert it to 8-bit RGB first")
    if image.mode == "P":  # a palette may be transparent, and only this way Pillow says nothing about it
        image = image.convert("RGBA")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # a copy: tensors want to own it


def read_mask(
    path: Path | str, labels: LabelSpace, exif: bool = False, max_pixels: int = MAX_PIXELS
) -> NDArray[np.int64]:
    """A mask as (H, W) int64 train ids.

    Raises:
        DataError: as `read_raw_mask`, or for values outside the label space, with value and count.
    """
    return labels.encode(read_raw_mask(path, bool(labels.colours), exif, max_pixels), path)


def read_raw_mask(
    path: Path | str, colours: bool = False, exif: bool = False, max_pixels: int = MAX_PIXELS
) -> NDArray[np.generic]:
    """A mask as it is on disk: ids (H, W), or colours (H, W, 3) uint8 where `colours` are known.

    Reads 1-bit, grey, palette and 16/32-bit integer files, and the variable `S` of a `.mat` file (COCO-Stuff 10k).

    Raises:
        DataError: unreadable, lossy (JPEG), with an alpha channel, floating point, or RGB without known colours.
    """
    if Path(path).suffix.lower() == ".mat":
        return read_matrix(path, "S", max_pixels)
    image = _decode(path, exif, max_pixels)
    if image.info["protoseg_format"] in ("JPEG", "MPO"):
        raise DataError(f"{path}: a JPEG cannot be a mask, its values are approximate; export the masks as PNG")
    if image.mode == "RGB":
        if not colours:
            raise DataError(
                f"{path}: the mask is RGB but no colours are known; list them as `palette` in the data set file, "
                "or export masks whose pixels are class ids"
            )
        return np.asarray(image)
    if image.mode not in IDS:
        raise DataError(
            f"{path}: mask mode {image.mode}; expected one channel of integers ({', '.join(IDS[:5])}) or RGB"
        )
    raw = np.asarray(image)
    rawmode = image.info["protoseg_rawmode"]
    if image.mode == "L" and rawmode in STRETCHED:
        return raw // np.uint8(STRETCHED[rawmode])
    if image.mode in ("1", "L") and rawmode.endswith("I"):
        raise DataError(f"{path}: the TIFF counts from white to black, which reverses ids; export the masks as PNG")
    return raw.astype(np.uint8) if raw.dtype == np.bool_ else raw


def _decode(path: Path | str, exif: bool, max_pixels: int) -> Image.Image:
    """Open, check the size in the header, decode every byte."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is stricter
            warnings.filterwarnings("ignore", module="PIL")  # broken metadata; broken pixels raise
            with Image.open(path, formats=FORMATS) as image:
                height, width = image.height, image.width
                if height * width > max_pixels:
                    raise DataError(
                        f"{path}: {height} x {width} pixels, more than max_pixels = {max_pixels}; "
                        "if you trust the file raise it: --max_pixels of predict, data.max_pixels of all else"
                    )
                tile = image.tile[0] if image.tile else None
                arguments = tile[3] if tile else None
                rawmode = arguments if isinstance(arguments, str) else str((arguments or [""])[0])
                image.load()
                upright = ImageOps.exif_transpose(image) if exif else image
                upright.info["protoseg_format"] = image.format
                upright.info["protoseg_rawmode"] = rawmode
                return upright
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path, or whether it was moved meanwhile") from None
    except IsADirectoryError:
        raise DataError(f"{path}: a folder, not a file") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read it") from None
    except Image.DecompressionBombError:  # no setting of ours raises this limit
        raise DataError(
            f"{path}: more than {2 * MAX_PIXELS} pixels, which are never decoded; cut the picture"
        ) from None
    except Exception as error:  # a decoder fed with broken bytes raises whatever its parser stumbles over
        raise DataError(f"{path}: cannot be decoded ({_first_line(error)}); replace the file") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
