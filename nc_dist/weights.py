"""Weights of any origin: read from a file that may nest them, matched to a net whose names may lack a prefix.

Nothing in a file is ever executed: pickles are read by torch's restricted reader only.
"""

from __future__ import annotations

import argparse
import difflib
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nc_dist.errors import InputError
from nc_dist.identity import hash_text

PICKLED = (".pt", ".pth", ".bin", ".tar", ".ckpt")
COUNTER = "num_batches_tracked"  # of BatchNorm: no weight, and old files lack it
PREFERRED = (
    "model",
    "state_dict",
    "model_state_dict",
    "net",
    "module",
    "teacher",
    "student",
)  # of tables of like length
STATE_DICT = "Where it was made, write the state dict alone: torch.save(model.state_dict(), FILE)"
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Match:
    """How the tensors of a file fit a net; names are the net's, `unexpected` ones the file's."""

    prefix: str  # of the net's names in the file
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[str, ...]  # name and both shapes

    def describe(self) -> str:
        """One line for people and result files."""
        total = len(self.matched) + len(self.missing) + len(self.wrong_shape)
        parts = [f"{len(self.matched)} of {total} tensors"]
        parts += [f"prefix {self.prefix!r} stripped"] * bool(self.prefix)
        parts += [f"missing {_some(self.missing)}"] * bool(self.missing)
        parts += [f"other shape {_some(self.wrong_shape)}"] * bool(self.wrong_shape)
        parts += [f"{len(self.unexpected)} of the file not used: {', '.join(self.unused())}"] * bool(self.unexpected)
        return "; ".join(parts)

    def unused(self) -> list[str]:
        """What the file holds besides, each part that nothing is taken of as `module.normalizer (2)`."""
        used = {""} | {part for name in self.matched for part in _prefixes(self.prefix + name)}
        parts = Counter(next((part for part in _prefixes(key) if part not in used), key) for key in self.unexpected)
        return [f"{part.removesuffix('.')} ({count})" for part, count in parts.items()]

    __str__ = describe


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors or torch file, on the CPU, whatever it is nested in.

    Of several tables of tensors, all at least half as long as the longest, the one under the first of PREFERRED is
    taken (raw weights before averaged ones, a teacher before its student), else the longest. InputError without any.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights={path}: no such file")
    if path.suffix not in (".safetensors", *PICKLED):
        raise InputError(f"weights={path}: expected a file that ends in .safetensors, {', '.join(PICKLED)}")
    tree = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    found = list(_tables(tree, ()))
    if not found:
        raise InputError(f"weights={path}: holds no named tensors, only {_contents(tree)}")
    longest = max(len(table) for _, table in found)
    large = [(_preference(keys), -len(table), table) for keys, table in found if 2 * len(table) >= longest]
    return min(large, key=lambda choice: choice[:2])[2]


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"weights={path}: not a safetensors file ({error})") from None


def _read_pickled(path: Path) -> Any:
    try:
        # Command-line arguments lie in many published files; a Namespace runs no code of the file's.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage has as many types as bytes can be wrong
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and foreign:
            what = f"refused: besides tensors it holds {foreign[1]}, and such objects could run code. "
            raise InputError(f"weights={path}: {what}{STATE_DICT}") from None
        # Not the error's own words: torch's advise to read the file unsafely.
        what = f"not a file of tensors that torch can read: damaged or of another format ({type(error).__name__})"
        raise InputError(f"weights={path}: {what}") from None


def _tables(tree: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every mapping of names to tensors in nested mappings, with the keys that lead to it."""
    if not isinstance(tree, Mapping):
        return
    table = {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if table:
        yield keys, table
    for key, value in tree.items():
        yield from _tables(value, (*keys, str(key)))


def _preference(keys: tuple[str, ...]) -> int:
    return min((PREFERRED.index(key) for key in keys if key in PREFERRED), default=len(PREFERRED))


def _contents(tree: Any) -> str:
    if not isinstance(tree, Mapping):
        return f"a {type(tree).__name__}"
    return _some([f"{key} ({type(value).__name__})" for key, value in tree.items()]) or "an empty mapping"


def match_weights(found: Mapping[str, Tensor], module: nn.Module) -> Match:
    """Fit names and shapes under that prefix of the file's names which makes most of the net's tensors fit.

    Of equal prefixes the first in the file is taken: MoCo's query encoder before its key encoder.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    fitting = Counter({"": 0})
    for key, value in found.items():
        for prefix in _prefixes(key):
            fitting[prefix] += wanted.get(key.removeprefix(prefix)) == tuple(value.shape)
    prefix = max(fitting, key=lambda prefix: fitting[prefix])
    matched, missing, wrong = [], [], []
    for name, shape in wanted.items():
        there = found.get(prefix + name)
        if there is None:
            missing.append(name)
        elif tuple(there.shape) != shape:
            wrong.append(f"{name} {tuple(there.shape)} for {shape}")
        else:
            matched.append(name)
    unexpected = [key for key in found if not (key.startswith(prefix) and key.removeprefix(prefix) in wanted)]
    missing = [name for name in missing if not name.endswith(COUNTER)]
    return Match(prefix, tuple(matched), tuple(missing), tuple(unexpected), tuple(wrong))


def _prefixes(key: str) -> Iterator[str]:
    """'', 'a.', 'a.b.' of 'a.b.c'."""
    return (key[:cut] for cut in (0, *(i + 1 for i, letter in enumerate(key) if letter == ".")))


def load_weights(module: nn.Module, path: str | Path, optional: Sequence[str] = ()) -> Match:
    """Load a file into a net; InputError when a tensor is missing or of another shape, or the file is of a larger net.

    Names that begin with one of `optional` (a classifier's) may be: they keep their values.
    """
    return load_tensors(module, read_weights(path), optional, f"weights={path}")


def load_tensors(module: nn.Module, found: Mapping[str, Tensor], optional: Sequence[str], where: str) -> Match:
    """`load_weights` of what was read already; `where` begins the message of an InputError."""
    match = fit_weights(module, found, optional, where)
    module.load_state_dict({name: found[match.prefix + name] for name in match.matched}, strict=False)
    return match


def fit_weights(module: nn.Module, found: Mapping[str, Tensor], optional: Sequence[str], where: str) -> Match:
    """The match of `load_tensors`, with its errors, and nothing loaded: the net may be on the meta device."""
    match = match_weights(found, module)
    missing = [name for name in match.missing if not name.startswith(tuple(optional))]
    wrong = [text for text in match.wrong_shape if not text.startswith(tuple(optional))]
    beyond = [name for name in _beyond(match, module) if not name.startswith(tuple(optional))]
    if missing or wrong or beyond:
        lines = [f"{where}: does not fit the model: {len(match.matched)} tensors do"]
        if missing:
            near = [_with_nearest(name, found) for name in missing[:SHOWN]]
            lines.append(f"{len(missing)} are missing: {_some(near + missing[SHOWN:])}")
        if wrong:
            lines.append(f"{len(wrong)} have another shape: {_some(wrong)}")
        if beyond:
            lines.append(f"the file is of a larger net, {len(beyond)} of its tensors have no place: {_some(beyond)}")
        raise InputError("; ".join(lines) + f". The file has {_some(list(found))}")
    return match


def _beyond(match: Match, module: nn.Module) -> list[str]:
    """Unexpected tensors of further members of a container, as layer3.5.conv1.weight where layer3 has two blocks.

    What else is left over in a file, heads and whole other nets, says nothing against the fit.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    found = []
    for name in (key.removeprefix(match.prefix) for key in match.unexpected if key.startswith(match.prefix)):
        parent, member, _ = name.rpartition(".")
        while parent not in modules:
            parent, _, member = parent.rpartition(".")
        # Beside the members of a net that is a container itself, a name that is no number is another net's.
        if isinstance(modules[parent], nn.Sequential | nn.ModuleList) and (parent or member.isdecimal()):
            found.append(name)
    return found


def _with_nearest(name: str, found: Mapping[str, Tensor]) -> str:
    near = difflib.get_close_matches(name, found, 1)
    return f"{name} (nearest: {near[0]})" if near else name


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def weights_identity(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, types and values: the same whichever file the tensors came from."""
    parts = []
    for name, value in sorted(tensors.items()):
        if not name.endswith(COUNTER):
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            parts.append(f"{name} {tuple(value.shape)} {value.dtype} {sha256(data).hexdigest()}")
    return hash_text(*parts)
