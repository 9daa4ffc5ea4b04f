"""Shards of a ZeRO checkpoint, from which any number of processes can go on. Pure torch; for the DeepSpeed engine.

In ZeRO 1-3 each process keeps its part of the trained parameters, of the optimiser's state and of the averages in flat
tensors. A shard is these tensors with a table of what they hold, so that processes cut in another way find their parts
in the shards of others (the idea of universal checkpoints, arXiv 2406.18820). DeepSpeed 0.19's own conversion knows no
optimiser but Adam, and in ZeRO 3 gives all groups the settings of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Flat = dict[str, Any]  # by name of what it is: flat tensors of one length (WEIGHTS, moments), and numbers of all of it
WEIGHTS, AVERAGES = "weights", "averages"


class Piece(NamedTuple):
    """Elements `offset` .. `offset + length` of a flattened parameter lie in flat tensor `flat`, from `start` on."""

    flat: int
    start: int
    offset: int
    length: int


class Shard(NamedTuple):
    """What one process saves: pieces by the parameter's name, and its flat tensors."""

    pieces: Mapping[str, Piece]
    flats: Sequence[Flat]


def save_shard(shard: Shard, path: Path) -> None:
    """Write a shard; tensors may be on any device."""
    pieces = {name: tuple(piece) for name, piece in shard.pieces.items()}
    flats = [{key: v.detach().cpu() if isinstance(v, Tensor) else v for key, v in flat.items()} for flat in shard.flats]
    torch.save({"pieces": pieces, "flats": flats}, path)


def read_shards(paths: Sequence[Path]) -> list[Shard]:
    """Shards whose tensors stay in their files until they are used."""
    saved = [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in paths]
    return [Shard({name: Piece(*p) for name, p in each["pieces"].items()}, each["flats"]) for each in saved]


def cut_anew(
    pieces: Mapping[str, Piece], members: Sequence[Sequence[str]], lengths: Sequence[int], shards: Sequence[Shard]
) -> list[Flat]:
    """Flat tensors of these lengths, filled from all shards of a checkpoint; what is padding is 0.

    `pieces` says where what goes, `members[i]` which parameters the flat tensor i of all processes together holds.
    ValueError where the shards lack a part.
    """
    found = [_empty(_holding(names, shards), length) for names, length in zip(members, lengths, strict=True)]
    for name, own in pieces.items():
        filled = sum(
            _copied(found[own.flat], own, shard, shard.pieces[name]) for shard in shards if name in shard.pieces
        )
        if filled != own.length:
            raise ValueError(f"the checkpoint has {filled} of {own.length} elements of {name}")
    return found


def _holding(names: Sequence[str], shards: Sequence[Shard]) -> Flat:
    """A flat tensor of any shard that holds a part of one of these parameters."""
    for shard in shards:
        for name in names:
            if name in shard.pieces:
                return shard.flats[shard.pieces[name].flat]
    raise ValueError(f"the checkpoint has nothing of {', '.join(names)}")


def _empty(like: Flat, length: int) -> Flat:
    """Zeros for what is flat there; numbers, such as Adam's steps, as they are."""
    return {
        key: torch.zeros(length, dtype=v.dtype) if key in flat_keys(like) else v.clone() if isinstance(v, Tensor) else v
        for key, v in like.items()
    }


def flat_keys(flat: Flat) -> list[str]:
    """What of it has one value for each element."""
    return [key for key, v in flat.items() if isinstance(v, Tensor) and v.shape == flat[WEIGHTS].shape]


def _copied(into: Flat, own: Piece, shard: Shard, theirs: Piece) -> int:
    """Copy what both pieces of a parameter have; how many elements that is."""
    begin, end = max(own.offset, theirs.offset), min(own.offset + own.length, theirs.offset + theirs.length)
    if begin >= end:
        return 0
    source = shard.flats[theirs.flat]
    to, at = own.start + begin - own.offset, theirs.start + begin - theirs.offset
    for key in flat_keys(source):
        into[key][to : to + end - begin] = source[key][at : at + end - begin]
    return end - begin
