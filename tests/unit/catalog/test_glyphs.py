"""Glyphs from the fonts that matplotlib brings: few families, all else as with many."""

import logging
import os
import shutil
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont

from nc_dist.data.catalog import glyphs, open_source
from nc_dist.data.catalog.debian import unpack_debian
from nc_dist.data.catalog.drawing import INK, SIZE, correlations, pictures
from nc_dist.data.catalog.fonts import font_files, read_fonts
from nc_dist.data.catalog.glyphs import CLASSES, Glyphs, Least, class_names, open_glyphs, read_glyphs, split_of
from nc_dist.errors import InputError

TTF = Path(matplotlib.get_data_path()) / "fonts/ttf"
FEW = Least(designs=3, samples=1)


def fonts_in(root: Path, pattern: str) -> Path:
    """A data root whose fonts are matplotlib's of this name."""
    folder = root / "glyphs/fonts"
    folder.mkdir(parents=True)
    for path in TTF.glob(pattern):
        shutil.copy(path, folder / path.name)
    return root / "glyphs"


def renamed(path: Path, to: Path, family: str) -> None:
    """The same font under another family name."""
    with TTFont(path) as font:
        for record in font["name"].names:
            if record.nameID in (1, 16, 21):
                record.string = family
        font.save(to)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DejaVu in four families, two of which look alike under another name, and what breaks or draws nothing of use."""
    root = fonts_in(tmp_path_factory.mktemp("data"), "DejaVu*.ttf")
    folder = root / "fonts"
    renamed(TTF / "DejaVuSerif.ttf", folder / "clone.ttf", "Zapped Serif")
    shutil.copy(TTF / "LastResortHE-Regular.ttf", folder)
    shutil.copy(TTF / "DejaVuSans.ttf", folder / "copy.ttf")
    (folder / "broken.ttf").write_bytes((TTF / "cmr10.ttf").read_bytes()[:300])
    (folder / "empty.otf").touch()
    (folder / "licence.txt").write_text("not a font")
    return root


@pytest.fixture(scope="module")
def drawn(root: Path) -> Glyphs:
    return read_glyphs(root, FEW)


def test_the_classes_are_more_than_a_hundred_different_characters_with_names() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 120
    assert class_names()[0] == "U+0041 A" and class_names()[-1] == "U+0402 Ђ"
    for look_alikes in ("Cc", "Oo0ОΟ", "Ss", "AΑА", "l1I|", "3З", "ΠП", "Zz", "µμ"):
        assert len(set(look_alikes) & set(CLASSES)) <= 1


def test_no_two_classes_are_drawn_nearly_alike_by_text_fonts() -> None:
    """The measure sees the look-alikes that were left out."""
    fonts, _ = read_fonts([TTF / f"DejaVu{name}.ttf" for name in ("Sans", "Serif", "SansMono")])

    def alike(characters: str) -> set[str]:
        of_fonts = [pictures(font.path, list(characters), glyphs.Counter()) for font in fonts]
        found = set()
        for drawn in filter(None, of_fonts):
            close = correlations(np.stack(list(drawn.values()))) > 0.95
            found |= {a + b for (i, a), (j, b) in combinations(enumerate(drawn), 2) if close[i, j]}
        for drawn in of_fonts:
            found |= set(characters) - set(drawn)  # left out, as they are drawn alike
        return found

    assert not alike(CLASSES)
    assert alike("AΑ") and alike("μµ") and alike("OΟ")


def test_every_picture_has_ink_scaled_to_the_square_and_is_alone_in_its_class(drawn: Glyphs) -> None:
    assert drawn.images.shape == (len(drawn.labels), SIZE, SIZE) and drawn.images.dtype == np.uint8
    assert set(drawn.labels) == set(range(len(CLASSES)))
    ink = drawn.images > 0
    heights, widths = (SIZE - side.argmax(1) - side[:, ::-1].argmax(1) for side in (ink.any(2), ink.any(1)))
    assert set(np.maximum(heights, widths)) <= {INK - 1, INK}  # a faint edge may vanish
    assert len({(label, image.tobytes()) for label, image in zip(drawn.labels, drawn.images, strict=True)}) == len(ink)
    for half in (ink[:, : SIZE // 2], ink[:, SIZE // 2 :]):
        assert half.any((1, 2)).all()  # in the middle


def test_a_picture_is_of_its_character(drawn: Glyphs) -> None:
    bar = drawn.images[drawn.labels == CLASSES.index("¬")] > 127  # a bar above, a foot at its right
    assert bar[:, 15:17, :10].mean() < 0.2 and bar[:, :, 24:].mean() > bar[:, :, :8].mean()
    slash = drawn.images[drawn.labels == CLASSES.index("/")] > 127
    assert slash[:, :12, 16:].mean() > 3 * slash[:, :12, :16].mean()


def test_broken_files_and_fonts_without_pictures_of_their_own_are_counted(drawn: Glyphs) -> None:
    assert drawn.counts["font files"] == 19 and drawn.counts["font files broken"] == 2
    assert drawn.counts["glyphs drawn alike in a font"] >= 110  # the last resort draws one box for each script
    assert drawn.counts["glyphs twice in a class"] >= 2 * len(CLASSES) - 20  # the copy and the clone
    left_out = sum(count for name, count in drawn.counts.items() if name.startswith("glyphs "))
    assert drawn.counts["images"] == len(drawn.labels) == drawn.counts["glyphs"] - left_out


def test_the_splits_have_different_designs_also_where_a_clone_has_another_name(root: Path) -> None:
    files = font_files(root / "fonts")
    fonts, left_out = read_fonts(files)
    assert sum(left_out.values()) == 2
    owners, labels, images = [], [], []
    for i, font in enumerate(fonts):
        for character, image in pictures(font.path, list(CLASSES), glyphs.Counter()).items():
            owners.append(i), labels.append(CLASSES.index(character)), images.append(image)
    names = glyphs.design_names(fonts, np.stack(images), np.asarray(labels), np.asarray(owners))
    designs = {font.path.name: name for font, name in zip(fonts, names, strict=True)}
    assert designs["clone.ttf"] == designs["DejaVuSerif.ttf"] == designs["DejaVuSerif-Bold.ttf"] == "dejavu serif"
    assert designs["copy.ttf"] == designs["DejaVuSans-Oblique.ttf"] == "dejavu sans"
    assert designs["DejaVuSansMono.ttf"] == "dejavu sans mono"


def test_a_fifth_of_the_designs_is_test_and_new_ones_move_few_others() -> None:
    designs = [f"design {i}" for i in range(200) for _ in range(1 + i % 3)]
    splits = split_of(designs)
    of = dict(zip(designs, splits, strict=True))
    assert [of[design] for design in designs] == splits
    assert [list(of.values()).count(split) for split in glyphs.SPLITS] == [140, 20, 40]
    more = dict(zip(names := sorted({*designs, "one more"}), split_of(names), strict=True))
    assert sum(more[design] != split for design, split in of.items()) <= 2


def test_the_same_fonts_give_the_same_pictures(root: Path, drawn: Glyphs) -> None:
    again = glyphs.draw(font_files(root / "fonts"))
    assert again.counts == drawn.counts
    assert (again.images == drawn.images).all() and (again.labels == drawn.labels).all()
    assert (again.splits == drawn.splits).all()


def test_drawn_pictures_are_kept_until_the_fonts_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    root = fonts_in(tmp_path, "DejaVuS*.ttf")

    def times_drawn() -> int:
        glyphs._load.cache_clear()
        before = len(caplog.records)
        read_glyphs(root, FEW)
        return sum(record.message.startswith("glyphs: ") for record in caplog.records[before:])

    assert [times_drawn(), times_drawn()] == [1, 0]
    (kept,) = root.glob("*.npz")
    assert not list(root.glob("*partial*"))
    kept.write_bytes(kept.read_bytes()[:1000])
    assert [times_drawn(), times_drawn()] == [1, 0]
    assert any("damaged" in record.message for record in caplog.records)
    shutil.copy(TTF / "DejaVuSerif.ttf", root / "fonts/DejaVuSans.ttf")
    assert [times_drawn(), times_drawn()] == [1, 0]
    assert len(list(root.glob("*.npz"))) == 2


def test_too_few_designs_or_pictures_are_refused_by_number(root: Path) -> None:
    with pytest.raises(InputError, match=r"fonts of \d designs, needed are 100; put more fonts there"):
        read_glyphs(root)
    with pytest.raises(InputError, match=r"fewer than 100 pictures in train of 120 of the 120 classes: U\+0041 A "):
        read_glyphs(root, Least(designs=3))


def test_without_fonts_and_without_apt_the_error_says_where_to_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get there
    monkeypatch.setenv("NC_DIST_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"glyphs/fonts: no fonts, .*put a few hundred \.ttf and \.otf files there"):
        open_glyphs("train")
    assert not list(tmp_path.rglob("*.partial*"))


def test_fonts_are_fetched_when_the_folder_has_none_and_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stand-in for apt-get has a package for two of the names, and one for dpkg copies it."""
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "apt-get").write_text(
        '#!/bin/sh\ncase "$2" in fonts-hack|fonts-lato) touch "$2.deb";; *) exit 100;; esac'
    )
    (commands / "dpkg").write_text(f'#!/bin/sh\ncp {TTF}/DejaVuSans.ttf "$3/$(basename "$2").ttf"')
    for command in commands.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "glyphs/fonts").mkdir(parents=True)
    files = font_files(tmp_path / "glyphs/fonts")
    assert [path.name for path in files] == ["fonts-hack.deb.ttf", "fonts-lato.deb.ttf"]
    assert "60 of 62 font packages cannot be had: fonts-aenigma" in caplog.text
    assert [path.name for path in (tmp_path / "glyphs").iterdir()] == ["fonts"]
    assert unpack_debian(["nothing"], tmp_path / "out") == ["nothing"]


def test_splits_are_opened_by_name_and_others_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, drawn: Glyphs
) -> None:
    monkeypatch.setenv("NC_DIST_DATA", str(root.parent))
    monkeypatch.setattr(glyphs.read_glyphs, "__defaults__", (FEW, True))
    sources = {split: open_source(f"glyphs:{split}") for split in ("train", "val", "fit", "trainval", "test")}
    sizes = {split: len(source.labels) for split, source in sources.items()}
    assert sizes["train"] + sizes["val"] == sizes["trainval"] == len(drawn.labels) - sizes["test"]
    assert sizes["fit"] == sizes["train"] and min(sizes.values()) > 50
    assert sources["test"].class_names == class_names() and sources["test"].read(0).shape == (3, SIZE, SIZE)
    with pytest.raises(InputError, match="glyphs:all: no such split; drawn are train, val, test"):
        open_glyphs("all")
