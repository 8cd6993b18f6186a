"""One numeric matrix out of a MATLAB 5 file: COCO-Stuff 10k ships its masks that way.

Written from the published format ("MAT-File Format", MathWorks): a header of 128 bytes, then elements of (type, size,
data) padded to 8 bytes; compressed elements hold one zlib stream. Only what a label map needs is read: real, dense,
two-dimensional numbers. Nothing in the file is executed.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protoseg.config import DataError

NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MATRIX, COMPRESSED = 14, 15
NUMERIC_CLASSES = range(6, 16)  # double ... uint64; cells, structs, text and sparse matrices are below
COMPLEX = 0x0800
PREFIX = 1024  # bytes of a variable that surely hold its flags, shape and name


def read_matrix(path: Path | str, name: str, max_pixels: int) -> NDArray[np.generic]:
    """The variable `name` as (H, W) integers.

    Raises:
        DataError: not a MATLAB 5 file, no such variable, not a matrix of whole numbers, or too large.
    """
    try:
        blob = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    try:
        matrix = _find(blob, name, max_pixels)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, IndexError, KeyError, struct.error, zlib.error, OverflowError) as error:
        raise DataError(f"{path}: not a readable MATLAB 5 file ({error}); replace the file") from error
    if matrix is None:
        raise DataError(f"{path}: holds no matrix `{name}`")
    if matrix.dtype.kind == "f":
        if not np.array_equal(matrix, np.rint(matrix)):
            raise DataError(f"{path}: `{name}` holds fractions; expected class ids")
        return matrix.astype(np.int64)
    return matrix


def _find(blob: bytes, name: str, max_pixels: int) -> NDArray[np.generic] | None:
    if len(blob) < 136:
        raise ValueError("shorter than its header")
    order = {b"IM": "<", b"MI": ">"}[blob[126:128]]
    at = 128
    while at + 8 <= len(blob):
        kind, body, at = _element(blob, at, order)
        stream = None
        if kind == COMPRESSED:  # a look at the name and the size first: other variables may be of any size
            stream = zlib.decompressobj()
            start = stream.decompress(body, PREFIX)
            kind, body = struct.unpack_from(order + "I", start)[0], start[8:]
        if kind != MATRIX:
            continue
        found, shape, data = _matrix_header(body, order)
        if found != name:
            continue
        if len(shape) != 2 or min(shape) < 1:
            raise DataError(f"`{name}` has shape {shape}; expected a height and a width")
        if shape[0] * shape[1] > max_pixels:
            raise DataError(f"`{name}` has {shape[0]} x {shape[1]} pixels, more than data.max_pixels = {max_pixels}")
        if stream is not None:
            body += stream.decompress(stream.unconsumed_tail, shape[0] * shape[1] * 8 + PREFIX)
        kind, numbers, _ = _element(body, data, order)
        values = np.frombuffer(numbers, dtype=order + NUMBERS[kind])
        return values.reshape(shape, order="F").astype(values.dtype.newbyteorder("="))
    return None


def _element(blob: bytes, at: int, order: str) -> tuple[int, bytes, int]:
    """(type, data, start of the next element); small elements keep up to 4 bytes of data inside the tag."""
    kind, size = struct.unpack_from(order + "II", blob, at)
    if kind >> 16:
        kind, size = kind & 0xFFFF, kind >> 16
        return kind, blob[at + 4 : at + 4 + size], at + 8
    end = at + 8 + size
    if end > len(blob):
        raise ValueError("truncated")
    padded = end if kind == COMPRESSED else at + 8 + -(-size // 8) * 8
    return kind, blob[at + 8 : end], padded


def _matrix_header(body: bytes, order: str) -> tuple[str, tuple[int, ...], int]:
    """Name and shape of a matrix and where its data start; the name is empty for what is not real numbers."""
    _, flags, at = _element(body, 0, order)
    _, dimensions, at = _element(body, at, order)
    _, label, at = _element(body, at, order)
    word = struct.unpack_from(order + "I", flags)[0]
    numeric = word & 0xFF in NUMERIC_CLASSES and not word & COMPLEX
    shape = tuple(np.frombuffer(dimensions, dtype=order + "i4").tolist())
    return label.decode("latin-1") if numeric else "", shape, at
