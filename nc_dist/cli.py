"""The command line: `nc-dist <journey> RUN.yaml key=value ... [--on here|ray]`. It parses; others do the work.

Heavy imports stay inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nc_dist.cli_nc import nc_app
from nc_dist.errors import BAD_INPUT, DONE, FAILED, InputError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
shards_app = typer.Typer(no_args_is_help=True, help="Build, verify and look into WebDataset shards.")
app.add_typer(shards_app, name="shards")
app.add_typer(nc_app, name="nc")

RunFile = Annotated[Path, typer.Argument(help="The run file, YAML.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, as optim.lr=0.1", show_default=False)]
On = Annotated[str, typer.Option(help="auto: the cluster that RAY_ADDRESS names, else here; here; ray.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Check everything, print the plan, touch nothing.")]
Name = Annotated[str | None, typer.Option(help="Replaces the last part of `out`.", show_default=False)]
Fresh = Annotated[bool, typer.Option("--fresh", help="Move an old output folder aside and begin anew.")]


def _journey(name: str, help: str) -> None:
    """One command for one journey: they all take the same."""

    def command(
        file: RunFile,
        overrides: Overrides = None,
        on: On = "auto",
        dry_run: DryRun = False,
        name_: Annotated[str | None, typer.Option("--name", help="Replaces the last part of `out`.")] = None,
        fresh: Fresh = False,
    ) -> None:
        if on not in ("auto", "here", "ray"):
            _fail(f"--on {on}: must be auto, here or ray")
        from nc_dist.launch.start import start

        _leave(start(name, file, overrides or [], on, dry_run, name_, fresh))  # type: ignore[arg-type]

    app.command(name, help=help)(command)


_journey("pretrain", "Train a source model.  Example: nc-dist pretrain configs/pretrain/digits_ce.yaml epochs=2")
_journey(
    "measure",
    "Neural collapse of a model on a data set.  Example: nc-dist measure configs/measure/digits.yaml",
)
_journey("finetune", "Adapt a source model by one method.  Example: nc-dist finetune configs/finetune/digits.yaml")
_journey("sweep", "Many fine-tuning trials.  Example: nc-dist sweep configs/sweep/digits.yaml --on ray")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder with finished runs, at any depth.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Where to write; default: the folder itself.")] = None,
) -> None:
    """Tables and figures of finished runs: report.html, report.md, results.csv, results.jsonl."""
    from nc_dist.report import write_report

    try:
        written = write_report(folder, out or folder)
    except ValueError as error:
        _fail(str(error))
    typer.echo(json.dumps(written, default=str))


@shards_app.command("build")
def shards_build(
    source: Annotated[str, typer.Argument(help="An ImageFolder, or a catalogued set as digits:train.")],
    out: Annotated[Path, typer.Argument(help="The folder of the shards.")],
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples in a tar.")] = 1000,
    per_class: Annotated[
        int | None, typer.Option(min=1, help="Take this many of each class, seeded; default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the shuffle and of --per-class.")] = 0,
) -> None:
    """Write WebDataset tars and their manifest."""
    from nc_dist.data import shards
    from nc_dist.data.catalog import open_source
    from nc_dist.data.subset import per_class as take

    try:
        opened = open_source(source)
        positions = take(opened.labels, per_class, seed, purpose="build")
        for done, total in shards.build(opened, out, samples_per_shard, seed, positions):
            typer.echo(f"shard {done}/{total}")
    except InputError as error:
        _fail(str(error))
    typer.echo(f"{out}: {len(positions)} samples of {len(opened.class_names)} classes")


@shards_app.command("verify")
def shards_verify(folder: Annotated[Path, typer.Argument(help="The folder of the shards.")]) -> None:
    """Check every shard's hash and every sample's checksum and image; exit code 1 when there is a fault."""
    from nc_dist.data import shards

    faults: list[str] = []
    try:
        for name, found in shards.verify(folder):
            typer.echo(f"{name}: {'ok' if not found else f'{len(found)} faults'}")
            faults += found
    except InputError as error:
        _fail(str(error))
    for fault in faults:
        typer.echo(fault, err=True)
    typer.echo(f"{folder}: {len(faults)} faults")
    raise typer.Exit(FAILED if faults else DONE)


@shards_app.command("order")
def shards_order(
    folder: Annotated[Path, typer.Argument(help="The folder of the shards.")],
    global_batch: Annotated[int, typer.Option(min=1, help="Samples of a step.")],
    micro: Annotated[int, typer.Option(min=1, help="Samples of a micro-batch.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    epoch: Annotated[int, typer.Option(min=0)] = 0,
    lanes: Annotated[int | None, typer.Option(min=1, help="Default: as many as fit.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Shards that are shuffled together.")] = 4,
    world: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 1,
    rank: int = 0,
    steps: Annotated[int | None, typer.Option(min=0, help="Default: the whole epoch.")] = None,
) -> None:
    """Which samples a rank reads at which step: one JSON object a step, {"step": .., "keys": [..]}."""
    from nc_dist.data import manifest
    from nc_dist.data.order import Order, check_world, default_lanes

    try:
        loaded = manifest.load(folder)
        if not 0 <= rank < world:
            raise InputError(f"--rank {rank}: must be in 0..{world - 1}")
        sizes = tuple(shard.samples for shard in loaded.shards)
        order = Order(sizes, seed, global_batch, micro, lanes or default_lanes(global_batch, micro), window)
        check_world(order.micro_per_step, world)
        keys = loaded.keys
        for step in range(order.steps_per_epoch if steps is None else min(steps, order.steps_per_epoch)):
            positions = order.rank_step(epoch, step, rank, world).flatten()
            typer.echo(json.dumps({"step": step, "keys": [keys[position] for position in positions]}))
    except InputError as error:
        _fail(str(error))


def _fail(message: str) -> None:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(BAD_INPUT)


def _leave(code: int) -> None:
    """End the process here.

    After a torch.distributed run the interpreter's own end now and then aborts in a native thread ("terminate called
    without an active exception"), long after the result is committed; leaving at once makes that harmless.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Entry point of `nc-dist`."""
    app()


if __name__ == "__main__":
    main()
