"""What makes two things the same: hashes of specs, weights, manifests. Pure; trial ids and resume checks use these."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

# What a run is does not depend on where it is written, on how many processes share it or how they start, on what they
# keep or log, or on how many damaged samples would be tolerated.
PLACEMENT_KEYS = frozenset(
    {"out", "launch", "workers", "log_every", "shard_cache_gb", "bad_samples", "download", "log_samples"}
    | {"keep", "keep_epochs", "upload", "max_skipped", "profile"}
)


def canonical(tree: Any, drop: frozenset[str] = PLACEMENT_KEYS) -> Any:
    """The tree without placement keys, at any depth."""
    if isinstance(tree, dict):
        return {key: canonical(value, drop) for key, value in tree.items() if key not in drop}
    if isinstance(tree, list):
        return [canonical(value, drop) for value in tree]
    return tree


def spec_hash(tree: Any) -> str:
    """Sixteen hex digits that name a configuration (or any JSON tree), placement left out."""
    return hash_text(json.dumps(canonical(tree), sort_keys=True, separators=(",", ":")))


def hash_text(*parts: str) -> str:
    """Sixteen hex digits of the parts, order kept."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def hash_bytes(data: bytes) -> str:
    """sha256 of bytes, whole, in hex."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file, whole, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line for each key whose value differs between two trees, placement left out."""
    old, new = canonical(old), canonical(new)
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
    lines = []
    for key in sorted(old.keys() | new.keys()):
        name = f"{path}.{key}" if path else key
        if key in old and key in new:
            lines += differences(old[key], new[key], name)
        else:
            lines.append(
                f"{name}: {repr(old[key]) if key in old else 'absent'} -> {repr(new[key]) if key in new else 'absent'}"
            )
    return lines
