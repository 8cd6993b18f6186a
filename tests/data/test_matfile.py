"""The MATLAB reader agrees with scipy's writer, and refuses what is broken."""

import numpy as np
import pytest
import scipy.io

from protoseg.config import DataError
from protoseg.data.images import read_raw_mask
from protoseg.data.matfile import read_matrix


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "f8"])
def test_label_maps_come_back(tmp_path, dtype, compressed):
    labels = np.random.default_rng(0).integers(0, 183, (37, 53)).astype(dtype)
    others = {"captions": np.array(["a", "b"], dtype=object), "regionMapStuff": np.zeros((99, 99))}
    scipy.io.savemat(tmp_path / "m.mat", {**others, "S": labels, "names": 3}, do_compression=compressed)
    read = read_raw_mask(tmp_path / "m.mat")
    np.testing.assert_array_equal(read, labels)
    assert read.dtype.kind in "iu"


def test_tiny_maps_live_inside_their_tag(tmp_path):
    scipy.io.savemat(tmp_path / "m.mat", {"S": np.array([[1, 2]], dtype=np.uint8)})
    assert read_matrix(tmp_path / "m.mat", "S", 100).tolist() == [[1, 2]]


def test_broken_and_foreign_files_are_refused(tmp_path):
    scipy.io.savemat(tmp_path / "m.mat", {"S": np.ones((40, 40)) / 2, "T": np.ones((2, 3, 4))}, do_compression=True)
    with pytest.raises(DataError, match="fractions"):
        read_matrix(tmp_path / "m.mat", "S", 10_000)
    with pytest.raises(DataError, match="shape"):
        read_matrix(tmp_path / "m.mat", "T", 10_000)
    with pytest.raises(DataError, match="holds no matrix `X`"):
        read_matrix(tmp_path / "m.mat", "X", 10_000)
    with pytest.raises(DataError, match=r"40 x 40 pixels, more than data\.max_pixels"):
        read_matrix(tmp_path / "m.mat", "S", 1599)
    with pytest.raises(DataError, match="No such file"):
        read_matrix(tmp_path / "gone.mat", "S", 100)
    blob = (tmp_path / "m.mat").read_bytes()
    rng = np.random.default_rng(0)
    messages = []
    for i in range(300):
        broken = bytearray(blob[: rng.integers(0, len(blob))] if i % 2 else blob)
        if broken:
            broken[rng.integers(0, len(broken))] = rng.integers(0, 256)
        (tmp_path / "b.mat").write_bytes(bytes(broken))
        try:
            read_matrix(tmp_path / "b.mat", "S", 10_000)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all(message.startswith(str(tmp_path / "b.mat")) for message in messages)
