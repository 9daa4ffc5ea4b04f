"""Sets that lie in folders of images, in shards, or are rendered."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from nc_dist.data.catalog.places import data_root
from nc_dist.data.manifest import is_url
from nc_dist.data.reading import Reading
from nc_dist.data.shards.source import open_shards
from nc_dist.data.source import Source, open_folder
from nc_dist.errors import InputError
from nc_dist.spec import Spec


class FolderReader(Spec):
    """An ImageFolder for each part, or one that is to be cut (`all`)."""

    kind: Literal["folder"]
    paths: dict[str, str] = Field(min_length=1)  # relative to the data root

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.paths)

    def open(self, part: str, title: str, reading: Reading) -> Source:
        """InputError when there is no such folder or a class in it is empty."""
        path = data_root() / self.paths[part]
        if not path.is_dir():
            raise InputError(f"{title}: {path}: no such folder; put one folder of images a class there")
        return replace(open_folder(path), decoder=reading.decoder or "torchvision")


class ShardsReader(Spec):
    """A folder of shards for each part, or one that is to be cut (`all`)."""

    kind: Literal["shards"]
    locations: dict[str, str] = Field(min_length=1)  # URLs, or folders relative to the data root

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.locations)

    def open(self, part: str, title: str, reading: Reading) -> Source:
        """InputError when there is no manifest."""
        location = self.locations[part]
        where = location if is_url(location) else str(data_root() / location)
        return open_shards(where, reading.shard_cache_gb, reading.decoder or "torchvision")


class GlyphsReader(Spec):
    """Characters rendered from fonts; train, val and test have different font families."""

    kind: Literal["glyphs"]

    @property
    def parts(self) -> tuple[str, ...]:
        return ("train", "val", "test")

    def open(self, part: str, title: str, reading: Reading) -> Source:
        """InputError when there are no fonts to be had."""
        from nc_dist.data.catalog.glyphs import open_glyphs

        return replace(open_glyphs(part, reading.download), decoder=reading.decoder or "torchvision")
