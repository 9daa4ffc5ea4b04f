"""What a set of shards is: files, samples, labels, hashes. Pure Python and numpy, no torch.

Written by `shards.py`, read by `source.py`; `manifest.json` lies beside the tars.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nc_dist.errors import InputError
from nc_dist.identity import hash_text

FILE = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar and its samples, as columns of equal length in the order of the tar."""

    name: str
    bytes: int
    sha256: str
    keys: list[str]
    offsets: list[int]  # of the image's first byte in the tar
    sizes: list[int]  # of the image, in bytes
    crc32: list[int]  # of the image's bytes
    labels: list[int]

    @property
    def samples(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Manifest:
    """All shards of one split of a data set, and the names of its classes."""

    class_names: list[str]
    shards: list[Shard]

    @property
    def labels(self) -> np.ndarray:
        """Label of every sample, (N,) int64, shard after shard."""
        return np.concatenate([np.asarray(shard.labels, dtype=np.int64) for shard in self.shards])

    @property
    def keys(self) -> list[str]:
        return [key for shard in self.shards for key in shard.keys]

    def identity(self) -> str:
        """The data set's identity: shard hashes, labels and class names, whatever the folder is called."""
        labels = (",".join(map(str, shard.labels)) for shard in self.shards)
        return hash_text(*self.class_names, *(shard.sha256 for shard in self.shards), *labels)


def save(manifest: Manifest, folder: Path) -> None:
    """Write manifest.json, whole or not at all."""
    tree = {
        "version": VERSION,
        "identity": manifest.identity(),
        "class_names": manifest.class_names,
        "shards": [{"samples": shard.samples, **asdict(shard)} for shard in manifest.shards],
    }
    partial = folder / (FILE + ".partial")
    partial.write_text(json.dumps(tree))
    partial.rename(folder / FILE)


def load(folder: Path) -> Manifest:
    """Read manifest.json and check it against itself and the sizes of the tars.

    Raises InputError that lists every fault: missing or resized shards, columns of unequal length, doubled keys,
    labels out of range, classes without a sample.
    """
    path = folder / FILE
    try:
        tree = json.loads(path.read_text())
        if tree["version"] != VERSION:
            raise InputError(f"{path}: version {tree['version']}, expected {VERSION}; build the shards again")
        shards = [Shard(**{name: shard[name] for name in Shard.__dataclass_fields__}) for shard in tree["shards"]]
        manifest = Manifest(tree["class_names"], shards)
        faults = [*_shard_faults(manifest, folder), *_label_faults(manifest)]
        if not faults and tree["identity"] != manifest.identity():
            faults = ["its identity is not that of its contents: it was changed by hand"]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no readable manifest ({error!r}); make one with: nc-dist shards build") from None
    if faults:
        raise InputError("\n  ".join([f"{path}: does not match its shards, {len(faults)} faults", *faults[:20]]))
    return manifest


def _shard_faults(manifest: Manifest, folder: Path) -> list[str]:
    faults = []
    for shard in manifest.shards:
        path = folder / shard.name
        columns = (shard.offsets, shard.sizes, shard.crc32, shard.labels)
        if any(len(column) != shard.samples for column in columns):
            faults.append(f"{shard.name}: columns of unequal length")
        if not path.is_file():
            faults.append(f"{shard.name}: missing")
        elif path.stat().st_size != shard.bytes:
            faults.append(f"{shard.name}: {path.stat().st_size} bytes, the manifest says {shard.bytes}")
    keys = manifest.keys
    if len(set(keys)) < len(keys):
        faults.append(f"{len(keys) - len(set(keys))} keys are given twice")
    return faults


def _label_faults(manifest: Manifest) -> list[str]:
    num_classes = len(manifest.class_names)
    faults = [
        f"{shard.name}: sample {key!r} has label {label}, allowed are 0..{num_classes - 1}"
        for shard in manifest.shards
        for key, label in zip(shard.keys, shard.labels, strict=False)
        if not 0 <= label < num_classes
    ]
    present = {label for shard in manifest.shards for label in shard.labels}
    faults += [
        f"class {label} ({name!r}) has no sample"
        for label, name in enumerate(manifest.class_names)
        if label not in present
    ]
    return faults
