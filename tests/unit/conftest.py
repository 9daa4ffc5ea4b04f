"""What the unit tests share: one thread, small images on disk, shards of them, a pre-training run as a tree."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nc_dist.data import shards
from nc_dist.data.source import open_folder


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors are slower on many threads; other tests of the same process get their threads back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of 3 classes with 4, 5 and 6 images: jpg, png and bmp of many modes, with difficult names."""
    folder = tmp_path_factory.mktemp("images")
    names = ["a.JPG", "b.jpeg", "c d.png", "e.v2.png", "f.bmp", "grüße.webp"]
    modes = ["RGB", "L", "P", "RGBA", "RGB", "RGB"]
    random = np.random.default_rng(0)
    for label, name in enumerate(["cat", "dog house", "x.y"]):
        (folder / name).mkdir()
        for file, mode in list(zip(names, modes, strict=True))[: 4 + label]:
            pixels = random.integers(0, 256, (12 + label, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / file)
    return folder


@pytest.fixture
def built(image_folder: Path, tmp_path: Path) -> Path:
    """Shards of the ImageFolder, 4 samples in each; a fresh copy, to be damaged at will."""
    out = tmp_path / "built"
    list(shards.build(open_folder(image_folder), out, samples_per_shard=4, seed=1))
    return out


@pytest.fixture
def tree() -> dict[str, Any]:
    """A pre-training run as a YAML file gives it."""
    return {
        "out": "runs/x",
        "data": {"train": "digits:train"},
        "model": {"backbone": {"kind": "small_resnet", "name": "resnet8", "width": 4}, "head": {"kind": "none"}},
        "loss": {"kind": "ce"},
        "optim": {"kind": "sgd", "lr": "1e-3", "momentum": 0.5},
        "epochs": 1,
    }
