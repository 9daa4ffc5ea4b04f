"""Data sets of torchvision as sources, nothing decoded: lists of files stay files, arrays stay arrays."""

from __future__ import annotations

import operator
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchvision.datasets import Caltech101, Caltech256
from torchvision.transforms.functional import to_pil_image

from nc_dist.data.catalog.places import data_root
from nc_dist.data.catalog.torchvision_download import Args, construct
from nc_dist.data.pixels import Decoder, decode
from nc_dist.data.reading import Reading
from nc_dist.data.source import ArraySource, FolderSource, Source, png
from nc_dist.errors import InputError
from nc_dist.identity import hash_text
from nc_dist.spec import Spec

# Where the classes of torchvision keep what they have read.
FILES_AND_LABELS = (("_image_files", "_labels"), ("_images", "_labels"), ("data", "targets"))
PAIRS = ("_samples", "samples", "imgs")


class TorchvisionReader(Spec):
    """A class of torchvision.datasets and what it is called with for each part."""

    kind: Literal["torchvision"]
    name: str
    args: dict[str, Args] = Field(min_length=1)
    needs: list[str] = []  # what must lie in the data root; {part} is the part
    class_names: list[str] | None = None  # where torchvision has none

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.args)

    def open(self, part: str, title: str, reading: Reading) -> Source:
        """Downloaded where it is missing and torchvision can; InputError when it cannot be had, or is damaged."""
        needs = [need.replace("{part}", part) for need in self.needs]
        dataset = construct(self.name, self.args[part], title, needs, reading.download)
        return as_source(dataset, self.args[part], title, reading, self.class_names)


def as_source(
    dataset: Any, args: Args, title: str, reading: Reading, class_names: list[str] | None = None
) -> FolderSource | ArraySource | DatasetSource:
    """A data set object of torchvision, made with `args`, as a source; InputError when its labels are no numbers."""
    decoder = reading.decoder or "torchvision"
    try:
        listed, arrays = _file_list(dataset), _arrays(dataset)
        labels, crc32 = (listed or arrays or (None, None))[1], 0
        if labels is None:
            labels, crc32 = _pass_over(dataset)
    except (TypeError, ValueError, OSError) as error:
        raise InputError(
            f"{title}: not a set of images with one whole number each as label ({type(error).__name__}: {error})"
        ) from None
    names = class_names or _class_names(dataset) or [str(label) for label in range(labels.max(initial=-1) + 1)]
    if listed:
        files = listed[0]
        if not {"split", "train"} & args.keys():  # such a set lists a folder, in whatever order it is stored
            order = np.argsort(files)
            files, labels = [files[i] for i in order], labels[order]
        return FolderSource(data_root(), names, files, labels, decoder)
    if arrays:
        return ArraySource(title, names, arrays[0], labels, decoder)
    return DatasetSource(dataset, title, names, labels, crc32, decoder)


@dataclass(frozen=True, eq=False)
class DatasetSource:
    """Any other data set: each image comes from its own `__getitem__`. Slow, and right."""

    dataset: Any
    title: str
    class_names: list[str]
    labels: np.ndarray
    crc32: int  # of all pixels
    decoder: Decoder

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return (1,) * len(self.labels)

    def identity(self) -> str:
        return hash_text("dataset", *self.class_names, *map(str, self.labels.tolist()), str(self.crc32))

    def key(self, position: int) -> str:
        return f"{position:06d}"

    def name(self, position: int) -> str:
        return f"{self.title}: sample {self.key(position)!r}"

    def raw(self, position: int) -> tuple[str, bytes]:
        try:
            return "png", png(_image(self.dataset[position][0]))
        except OSError as error:
            raise InputError(f"{self.name(position)}: unreadable image ({error}); repair or remove it") from None

    def read(self, position: int) -> Tensor:
        return decode(self.raw(position)[1], self.name(position), self.decoder)


def _class_names(dataset: Any) -> list[str] | None:
    """Names of the classes; where torchvision has several for one class, as ImageNet, all of them."""
    classes = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    return [", ".join(c) if isinstance(c, tuple) else str(c) for c in classes] if classes else None


def _file_list(dataset: Any) -> tuple[list[str], np.ndarray] | None:
    """Paths relative to the data root, and labels (N,), where the data set is a list of files."""
    if isinstance(dataset, Caltech101 | Caltech256):
        return _caltech_files(dataset)
    for name, labels in FILES_AND_LABELS:
        files = getattr(dataset, name, None)
        if isinstance(files, list) and hasattr(dataset, labels) and _are_paths(files):
            return _relative(files), _whole(getattr(dataset, labels))
    for name in PAIRS:
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, list) and pairs and _are_paths([file for file, _ in pairs]):
            return _relative([file for file, _ in pairs]), _whole([label for _, label in pairs])
    return None


def _caltech_files(dataset: Any) -> tuple[list[str], np.ndarray]:
    """Caltech's files have numbers for names: 1, 2, 3, .. in each class."""
    old = isinstance(dataset, Caltech101)
    folder = Path(dataset.root) / ("101_ObjectCategories" if old else "256_ObjectCategories")
    files = [
        folder / dataset.categories[k] / (f"image_{i:04d}.jpg" if old else f"{k + 1:03d}_{i:04d}.jpg")
        for k, i in zip(dataset.y, dataset.index, strict=True)
    ]
    return _relative(files), _whole(dataset.y)


def _are_paths(files: list[Any]) -> bool:
    return bool(files) and all(isinstance(file, str | os.PathLike) for file in files)


def _relative(files: list[Any]) -> list[str]:
    return [str(file).removeprefix(f"{data_root()}{os.sep}") for file in files]


def _arrays(dataset: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Images (N, H, W) or (N, H, W, 3) uint8 and labels (N,), where the data set is held in memory."""
    images = np.asarray(getattr(dataset, "data", ()))
    labels = np.asarray(getattr(dataset, "targets", getattr(dataset, "labels", ())))
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.shape != images.shape[:1]:
        return None
    if images.ndim == 4 and images.shape[1] == 3 != images.shape[3]:
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] != 3:
        return None
    return np.ascontiguousarray(images), _whole(labels)


def _whole(labels: Any) -> np.ndarray:
    """Labels as (N,) int64; TypeError where they are no whole numbers."""
    return np.fromiter(map(operator.index, labels), np.int64)


def _pass_over(dataset: Any) -> tuple[np.ndarray, int]:
    """Labels (N,) and a checksum of all pixels, from one pass over the data set."""
    labels, crc32 = [], 0
    for i in range(len(dataset)):
        image, label = dataset[i]
        labels.append(operator.index(label))
        crc32 = zlib.crc32(_image(image).tobytes(), crc32)
    return np.asarray(labels, np.int64), crc32


def _image(item: Any) -> Image.Image:
    """What the data set gives, as PIL; TypeError or ValueError for what is no image."""
    image: Image.Image = item if isinstance(item, Image.Image) else to_pil_image(item)
    return image
