"""NumPy's archives, whole or not, with and without a test."""

import io
import lzma

import numpy as np
import pytest
import torch

from anabranch.data.arrays import read_arrays, read_npz

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 5, 6), dtype=np.uint8)
Y = np.arange(20) % 4


def archive(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_pictures_are_brought_to_mean_0_and_deviation_1(tmp_path):
    found = read_npz(archive(tmp_path / "own.npz", x=PIXELS, y=Y, test_x=PIXELS[:3], test_y=Y[:3]))
    assert (found.name, found.kind, found.classes) == ("own", "image", 4)
    assert found.x.shape == (20, 1, 5, 6)
    torch.testing.assert_close(found.x.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.x.std(), torch.tensor(1.0))
    torch.testing.assert_close(found.test_x, found.x[:3])  # by the same mean and deviation
    plain = torch.from_numpy(PIXELS).float()
    torch.testing.assert_close(found.x[:, 0], (plain - plain.mean()) / plain.std())


def test_channels_come_first_and_each_has_its_own_mean(tmp_path):
    coloured = np.stack([PIXELS, PIXELS // 2, np.full_like(PIXELS, 7)], -1)
    found = read_npz(archive(tmp_path / "own.npz", x=coloured, y=Y))
    assert (found.x.shape, found.test_x.shape) == ((15, 3, 5, 6), (5, 3, 5, 6))
    torch.testing.assert_close(found.x.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    assert bool((found.x[:, 2] == 0).all())  # a channel that shows nothing


def test_tests_and_owners_of_the_data_are_kept(tmp_path):
    is_test = np.arange(20) % 5 == 0
    client = np.arange(20) % 2 * 7  # numbered 0 and 7
    path = archive(tmp_path / "own.npz", x=PIXELS, y=Y, is_test=is_test, client=client, names=np.array(list("abcd")))
    found = read_npz(path)
    assert (len(found.y), len(found.test_y), list(found.names)) == (16, 4, list("abcd"))
    assert found.owners.tolist() == (client[~is_test] // 7).tolist()
    assert found.y.tolist() == Y[~is_test].tolist()


def test_numbers_are_vectors(tmp_path):
    found = read_npz(archive(tmp_path / "own.npz", x=PIXELS.reshape(20, 30).astype(np.float64), y=Y))
    assert (found.kind, found.x.dtype, found.x.shape) == ("vector", torch.float32, (15, 30))
    assert float(read_npz(archive(tmp_path / "b.npz", x=PIXELS.reshape(20, 30), y=Y)).x.max()) <= 1


@pytest.mark.parametrize(
    "arrays",
    [{"x": PIXELS}, {"x": PIXELS, "y": Y[:4]}, {"x": PIXELS.astype(float), "y": Y}, {"x": PIXELS.astype("S3"), "y": Y}],
)
def test_what_is_no_task_is_refused(tmp_path, arrays):
    with pytest.raises(ValueError, match=r"own\.npz"):
        read_npz(archive(tmp_path / "own.npz", **arrays))


def test_xz_is_unpacked_and_damage_is_named(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, y=Y)
    packed = tmp_path / "own.npz.xz"
    packed.write_bytes(lzma.compress(buffer.getvalue()))
    assert read_arrays(packed)["y"].tolist() == Y.tolist()
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"own\.npz\.xz cannot be read"):
        read_arrays(packed)
    broken = tmp_path / "own.npz"
    broken.write_bytes(buffer.getvalue()[:-9])
    with pytest.raises(ValueError, match=r"own\.npz cannot be read"):
        read_arrays(broken)
    with pytest.raises(ValueError, match="there is no file"):
        read_arrays(tmp_path / "other.npz")


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "own.npz", x=np.array([{"a": 1}], dtype=object), y=np.zeros(1))
    with pytest.raises(ValueError, match="cannot be read"):
        read_npz(tmp_path / "own.npz")
