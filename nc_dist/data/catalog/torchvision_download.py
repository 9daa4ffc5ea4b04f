"""The data set objects of torchvision, downloaded where they are missing and can be.

Their constructors read the authors' own formats, and check the hashes of those that are pickles (CIFAR).
"""

from __future__ import annotations

import difflib
import inspect
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torchvision.datasets

from nc_dist.data.catalog.places import data_root
from nc_dist.data.shards.cache import locked
from nc_dist.errors import InputError

Args = dict[str, bool | int | float | str]
UNPICKLE = ("LSUN", "LSUNClass")
SILENCE = 60  # seconds without a byte, after which a download has failed


def construct(name: str, args: Args, title: str, needs: Sequence[str] = (), download: bool = True) -> Any:
    """`torchvision.datasets.name(data root, **args)`, downloaded first where none of `needs` is in the data root
    and `download` allows it.

    InputError, beginning with `title`, when it cannot be had, is incomplete or damaged.
    """
    cls, root = _dataset_class(name, title), data_root()
    reason: Exception
    try:
        return _make(cls, root, args)
    except (RuntimeError, OSError) as error:
        reason = error  # not there, or not all of it
    except Exception as error:  # whatever a wrong argument or a damaged file leads torchvision and scipy to
        raise InputError(f"{title}: torchvision's {name} cannot read it from {root} ({_first_line(error)})") from None
    missing = [need for need in needs if not (root / need).exists()]
    if download and len(missing) == len(needs) and "download" in inspect.signature(cls).parameters:
        try:
            return _downloaded(cls, root, args)
        except Exception as error:  # no network, a server that is gone, an archive with another hash
            reason = error
    what = f"{root} lacks {', '.join(missing)}" if missing else f"torchvision's {name} cannot read it from {root}"
    what += "" if download else ", and data.download=false"
    raise InputError(f"{title}: {what} ({_first_line(reason)}); lay the set out there as torchvision's {name} wants it")


def _make(cls: type, root: Path, args: Mapping[str, Any]) -> Any:
    where = {"root": str(root)} if "root" in inspect.signature(cls).parameters else {}
    return cls(**where, **args)


def _downloaded(cls: type, root: Path, args: Args) -> Any:
    """The data set after its own download, which goes to another folder first: half a set never looks like one."""
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / f".{cls.__name__}.lock"):
        try:
            return _make(cls, root, args)  # another process was faster
        except (RuntimeError, OSError):
            partial = root / f".{cls.__name__}.partial"
        with _time_limit():
            _make(cls, partial, {**args, "download": True})
        _move_into(partial, root)
    return _make(cls, root, args)


@contextmanager
def _time_limit() -> Iterator[None]:
    """torchvision's downloads wait for ever on a server that falls silent."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _move_into(folder: Path, target: Path) -> None:
    """Move what is in `folder` to `target`; folders that are there already are filled up."""
    for path in list(folder.iterdir()):
        if path.is_dir() and (target / path.name).is_dir():
            _move_into(path, target / path.name)
        else:
            path.replace(target / path.name)
    folder.rmdir()


def _dataset_class(name: str, title: str) -> type:
    """A class of torchvision.datasets."""
    cls, known = getattr(torchvision.datasets, name, None), torchvision.datasets.__all__
    if name in UNPICKLE:
        raise InputError(f"{title}: refused, as torchvision's {name} unpickles a file that nothing vouches for")
    if name in known and isinstance(cls, type) and issubclass(cls, torchvision.datasets.VisionDataset):
        return cls
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{title}: torchvision has no data set {name!r}{hint}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
