"""The font files that glyphs are drawn from: Debian's packages, families by name table, characters by map."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fontTools.ttLib import TTFont

from nc_dist.data.catalog.debian import unpack_debian
from nc_dist.errors import InputError

EXTENSIONS = (".ttf", ".otf")
NAMES = (
    "aenigma agave anonymous-pro averia-gwf averia-sans-gwf averia-serif-gwf breip cabin cantarell comfortaa "
    "courier-prime croscore dejavu-core dosis dustin ebgaramond essays1743 f500 fantasque-sans fanwood firacode "
    "freefont-otf freefont-ttf gfs-didot gfs-neohellenic goudybookletter hack inconsolata inter isabella "
    "jetbrains-mono junicode jura lato liberation liberation2 linuxlibertine lmodern mononoki noto-core noto-mono "
    "ocr-a open-sans opendyslexic oxygen play prociono quattrocento radisnoir recommended roboto-unhinted sil-andika "
    "sil-charis sil-gentium texgyre tlwg-purisa tomsontalks tuffy ubuntu-title urw-base35 vollkorn yanone-kaffeesatz"
)
PACKAGES = tuple(f"fonts-{name}" for name in NAMES.split())  # 93 MB to download
# Families that draw pictures, or hide all letters behind the same ornament.
PICTURES = (
    "18 holes brk, 3d let brk, 90 stars brk, bandwidth brk, binary 01s brk, binary brk, binary chr brk, "
    "binary x 01s brk, binary x brk, binary x chr brk, bit blocks ttf brk, bocuma batty brk, circulate brk, d050000l, "
    "dark side brk, db layer 1 brk, db layer 2 brk, db layer 3 brk, db layer 4 brk, encapsulate brk, "
    "entangled layer a brk, entangled layer b brk, faux snow brk, graze brk, head-ding maker brk, hearts brk, "
    "janken brk, kirby no kira kizzu brk, lakeshore brk, line dings brk, linux biolinum keyboard o, "
    "mishmash 4x4i brk, mishmash 4x4o brk, pindown brk, qbicle 1 brk, qbicle 2 brk, qbicle 3 brk, qbicle 4 brk, "
    "skull capz brk, snailets brk, spheroids brk, spheroids x brk, standard symbols ps, symmetry brk, tearful brk, "
    "xmas lights brk"
)
_PICTURES = frozenset(PICTURES.split(", "))

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Font:
    """One font file that can be drawn from."""

    path: Path
    family: str
    characters: frozenset[str]


def font_files(folder: Path, download: bool = True) -> list[Path]:
    """The .ttf and .otf files below a folder, sorted by path; where there is none, Debian's are put into it first,
    if `download` allows it.

    InputError says where to put fonts when none can be had.
    """
    if download and not _files(folder):
        _fetch(folder)
    if files := _files(folder):
        return files
    debian = "Debian's packages of them cannot be had here (with apt-get and dpkg, after `apt-get update`)"
    could = debian if download else "data.download=false"
    raise InputError(f"{folder}: no fonts, and {could}; put a few hundred .ttf and .otf files there")


def read_fonts(files: Sequence[Path]) -> tuple[list[Font], Counter[str]]:
    """The fonts among the files in their order, and how many files were left out for which reason."""
    fonts, left_out = [], Counter[str]()
    for path in files:
        try:
            font = _read(path)
        except Exception:  # damaged tables raise whatever they lead their readers to
            left_out["broken"] += 1
            continue
        if not font.family or not font.characters:
            left_out["without a family name" if not font.family else "without Unicode characters"] += 1
        elif font.family in _PICTURES:
            left_out["of pictures"] += 1
        else:
            fonts.append(font)
    return fonts, left_out


def _read(path: Path) -> Font:
    """The typographic family joins regular and bold, .ttf and .otf, of one design."""
    with TTFont(path, lazy=True) as file:
        family = file["name"].getBestFamilyName() or ""
        return Font(path, " ".join(family.casefold().split()), frozenset(map(chr, file.getBestCmap() or ())))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def _fetch(folder: Path) -> None:
    """Fill the folder with what can be had of Debian's packages, in one step; says which cannot."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fonts.partial.") as partial:
        unpacked = Path(partial) / "fonts"
        if missing := unpack_debian(PACKAGES, unpacked):
            names = " ".join(missing)
            log.warning("%d of %d font packages cannot be had: %s", len(missing), len(PACKAGES), names)
        if not _files(unpacked):
            return
        if folder.exists():
            folder.rename(Path(partial) / "old")  # it has no font in it
        unpacked.rename(folder)
        if missing:
            log.warning("to try again, remove %s", folder)
