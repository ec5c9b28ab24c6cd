"""Data as they were published: small ones made here in the same form, and the real ones where they are at hand."""

import csv
import gzip
import io
import lzma

import numpy as np
import pytest
from PIL import Image

from anabranch.data.published import CIFAR10, PEOPLE, read_ag_news, read_banking77, read_cifar10n, read_fashion_mnist


def jpegs(pixels):
    """Buffer and offsets of pictures [M, H, W, 3]."""
    files = []
    for one in pixels:
        buffer = io.BytesIO()
        Image.fromarray(one).save(buffer, "JPEG", quality=95)
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    return np.frombuffer(b"".join(files), dtype=np.uint8), offsets


def small_cifar(folder, labels_of_train=None):
    y = np.arange(30) % 10
    shade = np.repeat(np.arange(30, dtype=np.uint8), 32 * 32 * 3).reshape(30, 32, 32, 3) * 8
    buffer = io.BytesIO()
    arrays = {}
    for part, of in (("train", slice(0, 20)), ("test", slice(20, 30))):
        arrays[f"{part}_buf"], arrays[f"{part}_off"] = jpegs(shade[of])
        arrays[f"{part}_label"] = y[of]
    np.savez(buffer, **arrays)
    (folder / "cifar10_jpeg.npz.xz").write_bytes(lzma.compress(buffer.getvalue()))
    clean = y[:20] if labels_of_train is None else labels_of_train
    people = {key: (y[:20] + i + 1) % 10 for i, key in enumerate(PEOPLE.values())}
    np.savez(folder / "cifar10n_labels.npz", clean_label=clean, **people)


def test_cifar10n_keeps_pictures_and_labels_together(tmp_path):
    small_cifar(tmp_path)
    found = read_cifar10n(tmp_path)
    assert (found.x.shape, found.test_x.shape, found.names) == ((20, 3, 32, 32), (10, 3, 32, 32), CIFAR10)
    assert sorted(found.given) == ["aggre", "random1", "random2", "random3", "worse"]
    means = found.x.mean((1, 2, 3))
    assert bool((means.diff() > 0).all())  # one shade brighter each
    assert ((found.given["aggre"] - found.y) % 10 == 1).all()


def test_labels_of_other_pictures_are_refused(tmp_path):
    small_cifar(tmp_path, labels_of_train=np.zeros(20, dtype=np.int64))
    with pytest.raises(ValueError, match="other pictures"):
        read_cifar10n(tmp_path)


@pytest.mark.slow
def test_cifar10n_as_published(data):
    found = read_cifar10n(data("cifar10n"))
    wrong = {name: round(float((y != found.y).double().mean()), 4) for name, y in found.given.items()}
    assert wrong == {"aggre": 0.0901, "random1": 0.1723, "random2": 0.1812, "random3": 0.1764, "worse": 0.4021}
    assert (len(found.x), len(found.test_x)) == (50_000, 10_000)


def test_fashion_mnist_as_published(data):
    found = read_fashion_mnist(data("fashion-mnist"))
    assert (found.name, found.x.shape, len(found.test_y)) == ("fashion-mnist", (55_981, 1, 28, 28), 14_019)
    assert int(found.owners.max()) == 49
    assert found.names[9] == "ankle boot"


def test_banking77_as_published(data):
    found = read_banking77(data("banking77"))
    assert (len(found.x), len(found.test_x), found.classes) == (10_003, 3_080, 77)
    assert found.names[int(found.y[0])] == "card_arrival"


def test_ag_news_as_published(data):
    found = read_ag_news(data("ag-news"))
    assert (len(found.x), len(found.test_x), list(found.names)) == (
        5_700, 1_900, ["World", "Sports", "Business", "Sci/Tech"],
    )  # fmt: skip


def test_ag_news_with_its_training_file(tmp_path):
    for part, rows in (("train", 6), ("test", 4)):
        with gzip.open(tmp_path / f"{part}.csv.gz", "wt", encoding="utf-8") as file:
            csv.writer(file).writerows([i % 4 + 1, f"title {i}", "text"] for i in range(rows))
    found = read_ag_news(tmp_path)
    assert (len(found.x), len(found.test_x), found.y.tolist()) == (6, 4, [0, 1, 2, 3, 0, 1])


def test_a_folder_without_its_files_is_named(tmp_path):
    for read in (read_banking77, read_ag_news, read_cifar10n, read_fashion_mnist):
        with pytest.raises(ValueError, match=str(tmp_path)):
            read(tmp_path)


def test_an_unknown_category_is_named(tmp_path):
    (tmp_path / "train.csv").write_text("text,category\nhello,greeting\nbye,parting\n")
    (tmp_path / "test.csv").write_text("text,category\nhm,thinking\n")
    with pytest.raises(ValueError, match="thinking"):
        read_banking77(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\nhello,greeting\n")
    with pytest.raises(ValueError, match="columns text and category"):
        read_banking77(tmp_path)
