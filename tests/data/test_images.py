"""Decoding: right ids or a refusal that names the file, for every kind of mask; never half a picture."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from picture_trees import write_image, write_mask
from protoseg.config import DataError
from protoseg.data.images import read_image, read_mask, read_raw_mask
from protoseg.data.labels import LabelSpace

IDS = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=np.uint8)


def grey_png(bits, rows, palette=None):
    """A PNG of 1, 2, 4 or 8 bits a pixel, written by hand: Pillow does not write grey ones below 8."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = b""
    for row in rows:
        text = "".join(format(int(v), f"0{bits}b") for v in row)
        text += "0" * (-len(text) % 8)
        lines += b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    kind = 0 if palette is None else 3
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), bits, kind, 0, 0, 0)
    colours = b"" if palette is None else chunk(b"PLTE", bytes(palette))
    body = colours + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


@pytest.mark.parametrize("palette", [None, [200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9]], ids=["grey", "palette"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_small_pngs_hold_ids_not_brightness(tmp_path, bits, palette):
    ids = IDS % 2 if bits == 1 else IDS
    (tmp_path / "m.png").write_bytes(grey_png(bits, ids, palette))
    np.testing.assert_array_equal(read_raw_mask(tmp_path / "m.png"), ids)


@pytest.mark.parametrize(
    ("name", "dtype"), [("m.png", np.uint16), ("m.tif", np.uint16), ("m.tif", np.int32), ("m.bmp", np.uint8)]
)
def test_wide_integers_keep_their_values(tmp_path, name, dtype):
    wide = IDS.astype(dtype) * (1 if dtype is np.uint8 else 20_000)
    Image.fromarray(wide).save(tmp_path / name)
    np.testing.assert_array_equal(read_raw_mask(tmp_path / name), wide)


def test_palette_masks_are_indices(tmp_path):
    ids = np.array([[0, 1, 2, 3, 20, 255]], dtype=np.uint8)
    mask = Image.fromarray(ids)
    mask.putpalette([v for i in range(256) for v in (i * 7 % 256, i * 5 % 256, i * 3 % 256)])
    mask.save(tmp_path / "m.png")
    assert mask.mode == "P"
    np.testing.assert_array_equal(read_raw_mask(tmp_path / "m.png"), ids)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "F", "CMYK"])
def test_masks_without_certain_ids_are_refused(tmp_path, mode):
    mask = Image.fromarray(IDS).convert("L").convert(mode)
    suffix = ".tif" if mode in ("F", "CMYK") else ".png"
    mask.save(tmp_path / f"m{suffix}")
    with pytest.raises(DataError, match=f"m{suffix}: mask mode"):
        read_raw_mask(tmp_path / f"m{suffix}")


def test_jpeg_masks_are_refused_whatever_they_are_called(tmp_path):
    Image.fromarray(IDS).save(tmp_path / "m.png", format="JPEG")
    with pytest.raises(DataError, match=r"m\.png: a JPEG cannot be a mask"):
        read_raw_mask(tmp_path / "m.png")


def test_reversed_tiffs_are_refused(tmp_path):
    Image.fromarray(IDS).save(tmp_path / "m.tif", tiffinfo={TiffImagePlugin.PHOTOMETRIC_INTERPRETATION: 0})
    with pytest.raises(DataError, match="reverses ids"):
        read_raw_mask(tmp_path / "m.tif")


def test_rgb_masks_need_known_colours(tmp_path):
    colours = np.array([[[9, 8, 7], [1, 2, 3]]], dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "m.png")
    space = LabelSpace(("a", "b"), ((0, 0, 0), (1, 1, 1)), colours=(((1, 2, 3), 0), ((9, 8, 7), 1)))
    assert read_mask(tmp_path / "m.png", space).tolist() == [[1, 0]]
    with pytest.raises(DataError, match=r"m\.png: the mask is RGB but no colours are known"):
        read_mask(tmp_path / "m.png", LabelSpace(("a", "b"), ((0, 0, 0), (1, 1, 1))))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK"])
def test_pictures_of_every_common_mode_become_rgb(tmp_path, mode):
    picture = Image.fromarray(np.full((2, 3, 3), 255, dtype=np.uint8)).convert(mode)
    picture.save(tmp_path / ("p.tif" if mode == "CMYK" else "p.png"))
    pixels = read_image(tmp_path / ("p.tif" if mode == "CMYK" else "p.png"))
    assert pixels.shape == (2, 3, 3)
    assert pixels.dtype == np.uint8
    assert (pixels == 255).all()
    assert pixels.flags.writeable


def test_16_bit_pictures_are_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 40_000, dtype=np.uint16)).save(tmp_path / "p.png")
    with pytest.raises(DataError, match=r"p\.png: image mode I;16"):
        read_image(tmp_path / "p.png")


def test_a_transparent_palette_says_nothing(tmp_path):
    picture = Image.fromarray(IDS)
    picture.putpalette([i for i in range(256) for _ in range(3)])
    picture.save(tmp_path / "p.png", transparency=b"\x00\x80\xff")
    assert read_image(tmp_path / "p.png")[..., 0].tolist() == IDS.tolist()


def encoded(kind, mask=False):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 4, (24, 32), dtype=np.uint8) if mask else rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue(), pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("percent", range(0, 100, 5))
def test_truncated_files_are_refused_by_name(tmp_path, kind, percent):
    blob, _ = encoded(kind)
    (tmp_path / "half.img").write_bytes(blob[: len(blob) * percent // 100])
    with pytest.raises(DataError, match=r"half\.img: cannot be decoded"):
        read_image(tmp_path / "half.img")
    with pytest.raises(DataError, match=r"half\.img"):
        read_raw_mask(tmp_path / "half.img", colours=True)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP"])
def test_flipped_bytes_raise_our_error_or_nothing(tmp_path, kind):
    blob, _ = encoded(kind, mask=kind in ("PNG", "BMP"))
    rng = np.random.default_rng(0)
    refused = []
    for _ in range(200):
        broken = bytearray(blob)
        for place in rng.integers(0, len(blob), rng.integers(1, 6)):
            broken[place] = rng.integers(0, 256)
        (tmp_path / "f").write_bytes(bytes(broken))
        for read in (read_image, read_raw_mask):
            try:
                read(tmp_path / "f")
            except DataError as error:
                refused.append(str(error))
    assert len(refused) > 10
    assert all(message.startswith(str(tmp_path / "f")) for message in refused)


@pytest.mark.parametrize("size", [(10_000, 9_500), (20_000, 20_000), (65_000, 65_000)])
def test_bombs_are_refused_by_their_header(tmp_path, size):
    blob = grey_png(8, [[0]])
    header = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
    fixed = blob[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + blob[33:]
    (tmp_path / "bomb.png").write_bytes(fixed)
    for read in (read_image, read_raw_mask):
        with pytest.raises(
            DataError, match=r"bomb\.png: .*(raise it: --max_pixels|178956970 pixels.* cut the picture)"
        ):
            read(tmp_path / "bomb.png")


def test_the_pixel_limit_is_an_option(tmp_path):
    write_image(tmp_path / "p.png", (10, 10))
    with pytest.raises(DataError, match=r"10 x 10 pixels, more than max_pixels = 99; .*data\.max_pixels"):
        read_image(tmp_path / "p.png", max_pixels=99)
    assert read_image(tmp_path / "p.png", max_pixels=100).shape == (10, 10, 3)


def test_a_text_bomb_is_refused(tmp_path):
    text = b"Comment\0\0" + zlib.compress(b"a" * 100_000_000)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    blob = grey_png(8, [[0]])
    (tmp_path / "text.png").write_bytes(blob[:33] + chunk + blob[33:])
    with pytest.raises(DataError, match=r"text\.png"):
        read_image(tmp_path / "text.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_image_and_mask_alike(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = write_image(tmp_path / "p.png", (4, 6), exif=exif)
    values = np.arange(24, dtype=np.uint8).reshape(4, 6)
    write_mask(tmp_path / "m.png", values, exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), upright)
    np.testing.assert_array_equal(read_raw_mask(tmp_path / "m.png"), values)
    turned = {
        1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1], 5: values.T,
        6: np.rot90(values, -1), 7: values[::-1, ::-1].T, 8: np.rot90(values),
    }[orientation]  # fmt: skip
    np.testing.assert_array_equal(read_raw_mask(tmp_path / "m.png", exif=True), turned)
    assert read_image(tmp_path / "p.png", exif=True).shape[:2] == turned.shape


def test_missing_files_and_folders_are_one_line(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match="a folder, not a file"):
        read_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match=r"empty\.png: cannot be decoded"):
        read_image(tmp_path / "empty.png")
