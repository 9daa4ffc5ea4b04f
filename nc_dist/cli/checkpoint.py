"""`nc-dist checkpoint verify|export`: whether checkpoints are whole, and their weights as plain files. It prints.

Heavy imports stay inside the commands, so that --help answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from nc_dist.errors import BAD_INPUT, DONE, FAILED, InputError

checkpoint_app = typer.Typer(no_args_is_help=True, help="Verify checkpoints, and export their weights.")

Where = Annotated[
    str, typer.Argument(help="A run, its checkpoints/, one step_N in it, or a URL of these.", show_default=False)
]


@checkpoint_app.command("verify")
def verify(path: Where) -> None:
    """One line a checkpoint: step, processes, size, and whether every file has the hash that was written.

    Exit code 1 when one is damaged.  Example: nc-dist checkpoint verify runs/x
    """
    from nc_dist.checkpoint.export import checked

    newest, damaged = None, 0
    with _told():
        for each in checked(path):
            typer.echo(
                f"{each.place.folder_name}: {each.world_size or '?'} processes, {each.bytes / 1e6:.6g} MB: "
                + ("whole" if not each.faults else f"DAMAGED, {len(each.faults)} faults")
            )
            for fault in each.faults:
                typer.echo(f"  {fault}")
            damaged += bool(each.faults)
            newest = newest if each.faults else each.place
    typer.echo(f"a run goes on from {newest}" if newest else "nothing whole to go on from; --fresh begins a run anew")
    raise typer.Exit(FAILED if damaged else DONE)


@checkpoint_app.command("export")
def export(
    path: Where,
    to: Annotated[Path, typer.Option(help="The folder to make.", show_default=False)],
    which: Annotated[str, typer.Option(help="last (newest whole one), best (on the hold-out), or step_N.")] = "last",
) -> None:
    """Copy a checkpoint's exported weights, hashes checked: backbone.safetensors, model.safetensors, config.json.

    The averaged weights of a run with ema go to export_ema in the same folder. Damage to other files does not matter.

    Example: nc-dist checkpoint export runs/x --which best --to weights
    """
    from nc_dist.checkpoint.export import export as copy

    with _told():
        place = copy(path, which, to)
    typer.echo(f"{to}: the weights of {place}")


@contextmanager
def _told() -> Iterator[None]:
    """Errors as one message."""
    try:
        yield
    except (InputError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None
