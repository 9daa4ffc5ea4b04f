"""`nc-dist shards build|index|verify|order`: WebDataset shards and the order in which runs read them.

Heavy imports stay inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nc_dist.errors import BAD_INPUT, DONE, FAILED, STATES, InputError, Terminated, exit_code

if TYPE_CHECKING:
    from nc_dist.data.shards.mapping import Mapped

shards_app = typer.Typer(no_args_is_help=True, help="Build, index, verify and look into WebDataset shards.")

On = Annotated[
    str, typer.Option(help="here: in this process; ray: tasks on the cluster of RAY_ADDRESS, else on this machine.")
]
LARGEST = 2**63 - 1  # of the integers that seed a shuffle
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}

OPTIONS = {  # of `order`, and how messages call them
    "batch.global=": "--global-batch ",
    "batch.micro=": "--micro ",
    "batch.micro": "--micro",
    "lanes=": "--lanes ",
    "launch.workers": "--world",
    "world size ": "--world ",
    "data.holdout_per_class": "--holdout-per-class",
}


@shards_app.command("build")
def shards_build(
    source: Annotated[
        str, typer.Argument(help="An ImageFolder, a catalogued set as digits:train, or torchvision:NAME.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder of the shards.")],
    on: On = "here",
    samples_per_shard: Annotated[int | None, typer.Option(min=1, help="Samples in a tar; default: 1000.")] = None,
    shard_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Instead: the size of a tar, about, as 256MB.")
    ] = None,
    short_side: Annotated[
        int | None, typer.Option(help="Shrink images whose short side is longer, to so many pixels, as JPEG.")
    ] = None,
    quality: Annotated[int | None, typer.Option(help="Of these JPEGs, 1..100; default: 90.")] = None,
    per_class: Annotated[
        int | None, typer.Option(min=1, help="Take this many of each class, seeded; default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="Of the shuffle and of --per-class.")] = 0,
) -> None:
    """Write WebDataset tars and their manifest; the same command goes on after an interruption.

    Images keep their bytes where the format is jpg, png or webp; others become PNG. The workers of a cluster that
    --on ray joins write to OUT themselves, so it must be on storage that all machines share.

    After an unreadable image is repaired the source is another one: remove OUT, and the build begins anew.
    """
    from nc_dist.console import show_shards
    from nc_dist.data import manifest, shards
    from nc_dist.data.catalog import open_source
    from nc_dist.data.subset import per_class as take

    with _speaking():
        if samples_per_shard is not None and shard_bytes is not None:
            raise InputError("--samples-per-shard and --shard-bytes: give one of them")
        if quality is not None and short_side is None:
            raise InputError(f"--quality {quality}: needs --short-side; without it images keep their bytes")
        size = _bytes(shard_bytes, "--shard-bytes") if shard_bytes is not None else None
        shrink = None if short_side is None else shards.Shrink(short_side, 90 if quality is None else quality)
        mapped = _mapped(on)
        opened = open_source(source)
        positions = take(opened.labels, per_class, seed, purpose="build")
        if size is not None:
            samples_per_shard = shards.samples_per_shard(opened, positions, size, seed, shrink)
            typer.echo(f"--shard-bytes {shard_bytes}: {samples_per_shard} samples a shard")
        steps = shards.build(opened, out, samples_per_shard or 1000, seed, positions, shrink, mapped)
        show_shards(steps, len(positions))
        made = manifest.load(out)
        what = f"{len(made.labels)} samples of {len(made.class_names)} classes in {len(made.shards)} shards"
        typer.echo(f"{out}: {what}, identity {made.identity()}")


@shards_app.command("index")
def shards_index(
    tars: Annotated[
        list[str], typer.Argument(help="Tars: paths, URLs, 'train-{0000..0146}.tar', 'train-*.tar', or a folder.")
    ],
    out: Annotated[Path | None, typer.Option(help="Where the manifest goes; default: the folder of the tars.")] = None,
    target_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="cls, txt or json.NAME; default: what the first sample has.")
    ] = None,
    class_names: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The names of the classes in their order, one a line.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which split of the folder's _info.json; of a new one, its name.")
    ] = None,
    on: On = "here",
) -> None:
    """Make the manifest of tars that somebody else wrote, in one pass; the tars stay as and where they are.

    A sample is one jpg, jpeg, png or webp file and its label beside it. Other files are never opened, and are counted.
    """
    from nc_dist.data import shards

    ignored: Counter[str] = Counter()
    with _speaking():
        listing = shards.listed(tars, split)
        out = listing.folder() if out is None else out
        names = None if class_names is None else shards.read_names(class_names)
        samples = 0
        for done, total, found in shards.index_all(listing, out, names, target_key, split, _mapped(on)):
            typer.echo(f"tar {done}/{total}: {found.shard.name}: {found.shard.samples} samples")
            samples += found.shard.samples
            ignored.update(found.ignored)
        if ignored:
            counts = ", ".join(f"{count} .{extension}" for extension, count in sorted(ignored.items()))
            typer.echo(f"ignored, never opened: {counts}")
        made = shards.open_manifest(str(out))
        key = made.made.get("target_key", "cls")
        what = f"{samples} samples of {len(made.class_names)} classes in {len(listing.tars)} tars, labels from {key}"
        typer.echo(f"{out}: {what}, identity {made.identity()}")


@shards_app.command("verify")
def shards_verify(
    folder: Annotated[str, typer.Argument(help="The folder of the manifest, or its URL.")], on: On = "here"
) -> None:
    """Check every tar, hash, label, checksum and image; lists the faults, exit code 1 when there is one."""
    from nc_dist.data import shards

    faults: list[str] = []
    with _speaking():
        for name, found in shards.verify(folder, _mapped(on)):
            typer.echo(f"{name}: {'ok' if not found else f'{len(found)} faults'}")
            faults += found
    for fault in faults:
        typer.echo(fault, err=True)
    typer.echo(f"{folder}: {len(faults)} faults")
    raise typer.Exit(FAILED if faults else DONE)


@shards_app.command("order")
def shards_order(
    folder: Annotated[str, typer.Argument(help="The folder of the shards, or its URL.")],
    global_batch: Annotated[int, typer.Option(min=1, help="Samples of a step.")],
    micro: Annotated[int, typer.Option(min=1, help="Samples of a micro-batch.")],
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="Of the run.")] = 0,
    epoch: Annotated[int, typer.Option(min=0, max=LARGEST, help="Counted from 0.")] = 0,
    lanes: Annotated[int | None, typer.Option(min=1, help="Default: as many as fit.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Shards that are shuffled together.")] = 4,
    world: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 1,
    rank: Annotated[int, typer.Option(help="Counted from 0.")] = 0,
    steps: Annotated[int | None, typer.Option(min=0, help="The first so many; default: the whole epoch.")] = None,
    holdout_per_class: Annotated[int, typer.Option(min=0, help="Samples of each class that the run holds out.")] = 0,
) -> None:
    """Which samples a rank reads at which step: one JSON object a step, {"step": .., "keys": [..]}.

    Steps count from 0 in the epoch. With a run's seed, batch, lanes, window and hold-out, the keys are the run's.
    """
    from nc_dist.data import shards
    from nc_dist.data.order import Order, check_world, default_lanes
    from nc_dist.data.source import kept_shard_sizes
    from nc_dist.data.subset import split_off

    try:
        loaded = shards.open_manifest(folder)
        if not 0 <= rank < world:
            raise InputError(f"--rank {rank}: must be in 0..{world - 1}")
        with _own_options():
            train, _ = split_off(loaded.labels, holdout_per_class, seed, purpose="data.holdout_per_class")
            lanes = lanes or default_lanes(global_batch, micro)
            order = Order(kept_shard_sizes(loaded.shard_sizes, train), seed, global_batch, micro, lanes, window)
            check_world(order.micro_per_step, world)
        for step in range(order.steps_per_epoch if steps is None else min(steps, order.steps_per_epoch)):
            positions = train[order.rank_step(epoch, step, rank, world).flatten()]
            keys = [loaded.samples.key(position) for position in positions.tolist()]
            typer.echo(json.dumps({"step": step, "keys": keys}))
    except InputError as error:
        _fail(str(error))


@contextmanager
def _own_options() -> Iterator[None]:
    """Errors about the order name the options here, not the keys of a run."""
    try:
        yield
    except InputError as error:
        message = str(error)
        for key, option in OPTIONS.items():
            message = message.replace(key, option)
        raise InputError(message) from None


def _mapped(on: str) -> Mapped:
    """What runs a function over shards: here, or as Ray tasks."""
    if on == "ray":
        from nc_dist.launch.ray_shards import mapped

        return mapped
    if on == "here":
        from nc_dist.data.shards.mapping import in_turn

        return in_turn
    raise InputError(f"--on {on}: must be here or ray")


def _bytes(text: str, option: str) -> int:
    """256MB, 1.5GiB, 5000."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMG]I?|)B?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise InputError(f"{option} {text}: must be a size, as 256MB or 1GiB")
    return size


@contextmanager
def _speaking() -> Iterator[None]:
    """Errors as one message; an interruption says that the same command goes on."""
    try:
        yield
    except InputError as error:
        _fail(str(error))
    except (KeyboardInterrupt, Terminated) as error:
        code = exit_code(error)
        typer.echo(f"{STATES[code]}; the same command goes on, and keeps the shards that are finished", err=True)
        raise typer.Exit(code) from None


def _fail(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(BAD_INPUT)
