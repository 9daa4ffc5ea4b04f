"""Glyphs: characters of four scripts drawn from the fonts of Debian's packages, split by the fonts' design.

The classes are characters that stay apart when they are scaled to one size: of each group that looks alike then
(C and c, O and 0, A and Greek Alpha, 3 and Cyrillic Ze) at most one is here. `tools/glyph_pairs.py` measures the rest.
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import __version__ as pillow_version
from PIL import features
from rich.console import Console
from rich.progress import track

from nc_dist.data.catalog import drawing
from nc_dist.data.catalog.drawing import SIZE, pictures, standardised
from nc_dist.data.catalog.fonts import PICTURES, Font, font_files, read_fonts
from nc_dist.data.catalog.places import data_root
from nc_dist.data.shards.cache import locked
from nc_dist.data.source import ArraySource
from nc_dist.errors import InputError
from nc_dist.identity import hash_file, hash_text

CLASSES = (
    "ABCDEFGHJKLMNOPQRSTUVWXYZ" "abdeghirt" "2346789"
    "!#$%&()*+/<=>?@\\{}~§¶©±÷£€½™«»†‡ß¿ØÆŒ¤¬√∫≈∞≤≥◊"
    "ΓΔΞΠΣΦΨΩαδεζλμξπσω" "БДЖИЛЦЧЩЪЫЭЮЯЊЂ"
)  # fmt: skip
SPLITS = ("train", "val", "test")
SHARES = {"test": 0.2, "val": 0.1}  # of the designs
SEED = 2212
SAME_DESIGN = 0.95  # mean correlation of two fonts' pictures above which their families are one design
SHARED = 20  # characters that two fonts must share to be compared
VERSION = 1
NAMED = 12  # classes, at most, in a message

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Least:
    """Fewer than these is an InputError: the classes are the same everywhere."""

    designs: int = 100
    samples: int = 100  # of each class, in train


@dataclass(frozen=True, eq=False)
class Glyphs:
    """All pictures, N of them."""

    images: np.ndarray  # (N, SIZE, SIZE) uint8
    labels: np.ndarray  # (N,) int64
    splits: np.ndarray  # (N,) int64, of SPLITS
    counts: dict[str, int]  # of fonts, families and designs, and of what was left out


def open_glyphs(split: str, download: bool = True) -> ArraySource:
    """`train`, `val` or `test` of the fonts in the data root; InputError when there are too few fonts to be had."""
    if split not in SPLITS:
        raise InputError(f"glyphs:{split}: no such split; drawn are {', '.join(SPLITS)}")
    glyphs = read_glyphs(data_root() / "glyphs", download=download)
    chosen = glyphs.splits == SPLITS.index(split)
    return ArraySource(f"glyphs:{split}", class_names(), glyphs.images[chosen], glyphs.labels[chosen])


def class_names() -> list[str]:
    """`U+0041 A` and so on."""
    return [f"U+{ord(character):04X} {character}" for character in CLASSES]


def read_glyphs(root: Path, least: Least = Least(), download: bool = True) -> Glyphs:  # noqa: B008
    """The pictures of the fonts in `root`/fonts, drawn once and kept in `root`; one process draws, others wait for it.

    InputError when there are too few fonts, or too few pictures of a class.
    """
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".lock"):
        files = font_files(root / "fonts", download)
        kept = root / f"glyphs-{_key(files, root)}.npz"
        glyphs = _load(kept) if kept.is_file() else None
        if glyphs is None:
            _load.cache_clear()
            glyphs = draw(files)
            _save(glyphs, kept)
    _check(glyphs, least, root / "fonts")
    return glyphs


def draw(files: Sequence[Path]) -> Glyphs:
    """Read the fonts, draw the classes, leave out duplicates, split by design; says what was counted."""
    fonts, bad = read_fonts(files)
    left_out: Counter[str] = Counter()
    images, labels, owners = [], [], []
    for i, font in enumerate(track(fonts, "Drawing glyphs", console=Console(stderr=True))):
        drawn = pictures(font.path, [c for c in CLASSES if c in font.characters], left_out)
        images += list(drawn.values())
        labels += [CLASSES.index(character) for character in drawn]
        owners += [i] * len(drawn)
    stacked = np.stack(images) if images else np.zeros((0, SIZE, SIZE), np.uint8)
    label, owner = np.asarray(labels, np.int64), np.asarray(owners, np.int64)
    names = design_names(fonts, stacked, label, owner)
    first = _first_of_each(stacked, label)
    counts = {
        "font files": len(files),
        **{f"font files {reason}": count for reason, count in sorted(bad.items())},
        "families": len({font.family for font in fonts}),
        "designs": len(set(names)),
        "glyphs": len(stacked) + sum(left_out.values()),
        **{f"glyphs {reason}": count for reason, count in sorted(left_out.items())},
        "glyphs twice in a class": len(stacked) - len(first),
        "images": len(first),
    }
    log.warning("glyphs: %s", ", ".join(f"{count} {name}" for name, count in counts.items()))
    splits = np.asarray([SPLITS.index(split) for split in split_of(names)], np.int64)
    return Glyphs(stacked[first], label[first], splits[owner[first]], counts)


def design_names(fonts: Sequence[Font], images: np.ndarray, labels: np.ndarray, owners: np.ndarray) -> list[str]:
    """The design of each font: its family, or the first by name of families that look the same.

    Many families are another one under a new name, or with other characters added, and would tie train to test.
    images (N, SIZE, SIZE), labels and owners, the number of the font, (N,).
    """
    coarse = images.reshape(len(images), 8, SIZE // 8, 8, SIZE // 8).mean((2, 4), dtype=np.float32)
    rows = np.zeros((len(fonts), len(CLASSES), 64), np.float32)
    rows[owners, labels] = standardised(coarse)
    has = np.zeros((len(fonts), len(CLASSES)), np.float32)
    has[owners, labels] = 1
    shared, flat = has @ has.T, rows.reshape(len(fonts), -1)
    families = np.asarray([font.family for font in fonts])
    same = (flat @ flat.T > SAME_DESIGN * shared) & (shared >= SHARED)
    names, number = np.unique(families, return_inverse=True)
    linked = np.eye(len(names), dtype=bool)
    linked[tuple(number[end] for end in np.nonzero(same))] = True
    design = np.arange(len(names))
    for _ in names:  # until each has the smallest number that a chain of links leads to
        design = np.where(linked, design, len(names)).min(1)
    return [str(name) for name in names[design[number]]]


def split_of(designs: Sequence[str]) -> list[str]:
    """The split of each font from its design: designs in the order of a hash, so that new ones move few others."""
    order = sorted(set(designs), key=lambda design: hash_text("glyphs", str(SEED), design))
    test, val = (max(1, round(SHARES[split] * len(order))) for split in ("test", "val"))
    of = dict.fromkeys(order, "train") | dict.fromkeys(order[:test], "test")
    of |= dict.fromkeys(order[test : test + val], "val")
    return [of[design] for design in designs]


def _first_of_each(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Positions of pictures that are not there before in their class."""
    first: dict[tuple[int, bytes], int] = {}
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        first.setdefault((label, image.tobytes()), i)
    return np.asarray(list(first.values()), np.int64)


def _check(glyphs: Glyphs, least: Least, folder: Path) -> None:
    """InputError for too few designs or pictures."""
    if glyphs.counts["designs"] < least.designs:
        raise InputError(
            f"{folder}: fonts of {glyphs.counts['designs']} designs, needed are {least.designs}; put more fonts there, "
            "or remove the folder to have Debian's"
        )
    for i, split in enumerate(SPLITS):
        counts = np.bincount(glyphs.labels[glyphs.splits == i], minlength=len(CLASSES))
        needed = least.samples if split == "train" else 1
        if short := [f"{name} ({n})" for name, n in zip(class_names(), counts, strict=True) if n < needed]:
            named = ", ".join(short[:NAMED]) + (", .." if len(short) > NAMED else "")
            raise InputError(
                f"{folder}: fewer than {needed} pictures in {split} of {len(short)} of the {len(CLASSES)} classes: "
                f"{named}; put more fonts there that have these characters, or remove the folder to have Debian's"
            )


def _key(files: Sequence[Path], root: Path) -> str:
    """What the pictures depend on: font files, this recipe, the programs that draw."""
    recipe = [CLASSES, PICTURES, *map(str, (VERSION, SHARES, SEED, SAME_DESIGN, SHARED))]
    drawn = map(str, (drawing.SIZE, drawing.INK, drawing.EM, drawing.LARGEST, drawing.ALIKE))
    programs = (pillow_version, str(features.version("freetype2")))
    return hash_text(*recipe, *drawn, *programs, *(f"{p.relative_to(root)}:{hash_file(p)}" for p in files))


def _save(glyphs: Glyphs, path: Path) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    counts = np.asarray(json.dumps(glyphs.counts))
    with partial.open("wb") as file:
        np.savez_compressed(file, images=glyphs.images, labels=glyphs.labels, splits=glyphs.splits, counts=counts)
    partial.rename(path)


@lru_cache(maxsize=1)
def _load(path: Path) -> Glyphs | None:
    """None when the file is damaged: it is drawn anew."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            counts = json.loads(str(arrays["counts"]))
            return Glyphs(arrays["images"], arrays["labels"], arrays["splits"], counts)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s: damaged (%s), drawn anew", path, error)
        return None
