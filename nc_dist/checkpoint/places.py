"""Folders here and behind URLs that fsspec opens (s3, gs, file, ..), with what checkpoints need of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from nc_dist.data.manifest import scheme_of
from nc_dist.data.shards.connect import EXTRAS, reason_of
from nc_dist.errors import InputError

TIMEOUT_S = 30
PIECE = 1 << 22  # bytes


class Place:
    """A folder, named as people name it: by a path or by a URL.

    What cannot be had is an OSError, FileNotFoundError where there is nothing; InputError for a URL that nothing here
    opens. A name may have parts, as in `zero/part.pt`.
    """

    def __init__(self, name: str | Path) -> None:
        self.name = str(name).rstrip("/") or "/"
        self.is_remote = bool(scheme_of(self.name))
        self._fs, self._path = _file_system(self.name)

    def __truediv__(self, name: str) -> Place:
        return Place(f"{self.name}/{name}")

    def __str__(self) -> str:
        return self.name

    @property
    def folder_name(self) -> str:
        """The last part; of a link its target's."""
        return self.name.rpartition("/")[2] if self.is_remote else Path(self.name).resolve().name

    def names(self) -> list[str]:
        """Of what lies in it; nothing where there is no such folder."""
        with _as_os_errors(self.name):
            self._fs.invalidate_cache()
            try:
                return [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._path, detail=False)]
            except (FileNotFoundError, NotADirectoryError):
                return []

    def read(self, name: str) -> bytes:
        """A small file, whole."""
        with _as_os_errors(f"{self.name}/{name}"):
            data: bytes = self._fs.cat_file(f"{self._path}/{name}")
            return data

    def fingerprint(self, name: str) -> tuple[int, str]:
        """Bytes and sha256 of a file."""
        digest, size = hashlib.sha256(), 0
        with _as_os_errors(f"{self.name}/{name}"), self._fs.open(f"{self._path}/{name}", "rb") as file:
            while data := file.read(PIECE):
                digest.update(data)
                size += len(data)
        return size, digest.hexdigest()

    def put(self, source: Path, name: str) -> None:
        """Copy a local file into it."""
        with _as_os_errors(f"{self.name}/{name}"):
            self._fs.put_file(str(source), f"{self._path}/{name}")

    def get(self, name: str, target: Path) -> None:
        """Copy a file of it to a local one, folders made."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with _as_os_errors(f"{self.name}/{name}"):
            self._fs.get_file(f"{self._path}/{name}", str(target))

    def remove(self, name: str) -> None:
        """A file or a folder with all that is in it; nothing where there is none."""
        with _as_os_errors(f"{self.name}/{name}"):
            self._fs.invalidate_cache()
            with suppress(FileNotFoundError):
                self._fs.rm(f"{self._path}/{name}", recursive=True)

    def check_writable(self, key: str) -> None:
        """InputError, which names the key it was given by, unless files can be written here and removed again."""
        try:
            with _as_os_errors(self.name):
                self._fs.pipe_file(f"{self._path}/.nc-dist-writes", b"")
                self._fs.rm_file(f"{self._path}/.nc-dist-writes")
        except OSError as error:
            raise InputError(f"{key}={self.name}: cannot be written to ({reason_of(error)})") from None


def _file_system(name: str) -> tuple[Any, str]:
    """fsspec's file system, and the path in it; no listing is kept, as others write too."""
    scheme = scheme_of(name)
    options: dict[str, Any] = {"use_listings_cache": False}
    if EXTRAS.get(scheme) == "s3":
        options["config_kwargs"] = {"connect_timeout": TIMEOUT_S, "read_timeout": TIMEOUT_S}
    elif scheme in ("", "file", "local"):
        options["auto_mkdir"] = True
    try:
        fs, path = fsspec.core.url_to_fs(name, **options)
    except ImportError as error:
        remedy = f"pip install 'nc-dist[{EXTRAS[scheme]}]'" if scheme in EXTRAS else str(error)
        raise InputError(f"{name}: {scheme}:// needs a package that is not installed; {remedy}") from None
    except ValueError as error:
        raise InputError(f"{name}: nothing here opens {scheme}:// ({error})") from None
    return fs, path


@contextmanager
def _as_os_errors(name: str) -> Iterator[None]:
    """Each file system has errors of its own: all of them as OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{name}: {reason_of(error)}") from error
