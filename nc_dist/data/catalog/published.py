"""A catalogued set as far as a plan looks at it, where the set itself is not at hand: what was published of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from nc_dist.data.catalog.entry import entry, is_described, name_and_split
from nc_dist.data.catalog.opening import Opened, open_set
from nc_dist.data.pixels import Decoder
from nc_dist.data.reading import Reading
from nc_dist.errors import InputError


@dataclass(frozen=True)
class Published:
    """A Source of so many samples, evenly spread over the classes, none of which can be read."""

    title: str
    samples: int
    classes: int
    decoder: Decoder = "torchvision"

    @cached_property
    def class_names(self) -> list[str]:
        return [f"class {label}" for label in range(self.classes)]

    @cached_property
    def labels(self) -> np.ndarray:
        return np.arange(self.samples) % self.classes

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        return (1,) * self.samples

    def identity(self) -> str:
        return f"published {self.title}"

    def name(self, position: int) -> str:
        return f"{self.title}: sample {position}"

    def key(self, position: int) -> str:
        return str(position)

    def raw(self, position: int) -> tuple[str, bytes]:
        raise InputError(f"{self.title}: planned from the catalogue; its images are not here")

    def read(self, position: int) -> Tensor:
        raise InputError(f"{self.title}: planned from the catalogue; its images are not here")


@dataclass(frozen=True)
class NotRead(Opened):
    """A set that could not be opened, as it was published."""

    reason: str = ""

    def notes(self) -> list[str]:
        """What the plan rests on, and why."""
        source = self.source
        counts = f"{len(source.labels):,} samples of {len(source.class_names):,} classes"
        return [f"{counts} from the catalogue, not read ({self.reason})"]


def open_or_published(text: str, split: str, reading: Reading) -> Opened:
    """What `open_set` opens without a download; where it is not here, the numbers of the catalogue: for plans alone."""
    try:
        return open_set(text, split, reading.model_copy(update={"download": False}))
    except InputError as error:
        name, own_split = name_and_split(text)
        if not is_described(name):
            raise InputError(
                f"{error}; without the data a set of the catalogue can be planned, such as imagenet_wds:train"
            ) from None
        described, split = entry(name), own_split or split
        if described.classes is None or split not in described.samples:
            raise
        source = Published(f"{name}:{split}", described.samples[split], described.classes)
        return NotRead(source, name, split, described, reason=str(error))
