"""`open_source`: what a user's text names, as a Source; and what is known of it besides its samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import yaml

from nc_dist.data import manifest as manifests
from nc_dist.data.catalog.entry import Entry, Metric, entry, is_described, name_and_split, suggestion
from nc_dist.data.catalog.places import data_root
from nc_dist.data.catalog.splits import checked, open_split
from nc_dist.data.catalog.torchvision_download import construct
from nc_dist.data.catalog.torchvision_sets import as_source
from nc_dist.data.pixels import check_decoder
from nc_dist.data.reading import Reading
from nc_dist.data.shards.source import open_shards
from nc_dist.data.source import Source, open_folder
from nc_dist.errors import InputError

TORCHVISION = "torchvision:"


@dataclass(frozen=True)
class Opened:
    """What a user's text names: its samples, and where they come from."""

    source: Source
    name: str
    split: str | None = None  # of a described set
    described: Entry | None = None
    index_hash: str | None = None  # of the positions that a seed chose; None: the split is as published

    @property
    def metric(self) -> Metric:
        """What the set is judged by; top1 where nothing describes it."""
        return self.described.metric if self.described else "top1"

    def notes(self) -> list[str]:
        """What differs from the published numbers, and classes that have no sample."""
        return list(_notes(self.source, self.described, self.split or ""))

    def about(self) -> dict[str, Any]:
        """What a run stores of it."""
        return {
            "name": self.name,
            "split": self.split,
            "identity": self.source.identity(),
            "samples": len(self.source.labels),
            "classes": len(self.source.class_names),
            "metric": self.metric,
            "index_hash": self.index_hash,
            "notes": self.notes(),
        }


def open_set(text: str, split: str = "train", reading: Reading | None = None) -> Opened:
    """A catalogued set or YAML file, `torchvision:NAME?key=value&..`, a folder or URL of shards, or an ImageFolder.

    `split` is used for a described set that names none itself; `reading` says how images are decoded and shards kept.
    InputError says what was looked for.
    """
    reading = (reading or Reading()).decided()
    check_decoder(reading.decoder)
    name, own_split = name_and_split(text)
    if is_described(name):
        if text == name and Path(name).is_dir() and data_root() != Path.cwd():  # where it would be the set itself
            raise InputError(f"{text!r}: a set of the catalogue, and a folder here; write {name}:{split} or ./{name}")
        described, split = entry(name), own_split or split
        opened = open_split(described, name, split, reading)
        return Opened(opened.source, name, split, described, opened.index_hash)
    return Opened(_open_other(text, reading), text)


def open_source(text: str, split: str = "train", reading: Reading | None = None) -> Source:
    """The samples of what `open_set` opens."""
    return open_set(text, split, reading).source


def _open_other(text: str, reading: Reading) -> Source:
    """What no file describes."""
    if text.partition("?")[0].endswith((".tar", ".tar.gz", ".tgz")):
        raise InputError(f"{text!r}: names tars; make their manifest with: nc-dist shards index {text!r} --out DIR")
    if text.startswith(TORCHVISION):
        return _open_any(text, reading)
    if manifests.is_url(text) or (Path(text) / manifests.FILE).is_file():
        return open_shards(text, reading.shard_cache_gb, reading.decoder or "torchvision")
    if Path(text).is_dir():
        return replace(open_folder(Path(text)), decoder=reading.decoder or "torchvision")
    raise InputError(f"{text!r}: no such folder, and no catalogued set{suggestion(text.partition(':')[0])}")


def _open_any(text: str, reading: Reading) -> Source:
    """A set of torchvision that has no description: `torchvision:GTSRB?split=test`."""
    name, _, query = text.removeprefix(TORCHVISION).partition("?")
    try:
        args = {key: yaml.safe_load(value) for key, value in parse_qsl(query, strict_parsing=bool(query))}
    except (ValueError, yaml.YAMLError):
        raise InputError(f"{text}: after the ? expected are arguments as key=value&key=value") from None
    return checked(as_source(construct(name, args, text, download=reading.download), args, text, reading), text)


def is_available(name: str) -> bool:
    """Whether a set can be had here; it is downloaded for that."""
    try:
        open_source(name)
    except InputError:
        return False
    return True


def _notes(source: Source, described: Entry | None, split: str) -> Iterator[str]:
    """What differs from the published numbers, and classes that have no sample."""
    samples, classes = len(source.labels), len(source.class_names)
    if described and described.samples.get(split, samples) != samples:
        yield f"{samples} samples, published are {described.samples[split]}"
    if described and (described.classes or classes) != classes:
        yield f"{classes} classes, published are {described.classes}"
    if empty := classes - len(np.unique(source.labels)):
        yield f"{empty} of the {classes} classes have no sample"
