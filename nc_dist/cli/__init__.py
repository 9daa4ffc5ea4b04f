"""The command line: `nc-dist <journey> RUN.yaml key=value ... [--on here|ray]`. It parses; others do the work.

Heavy imports stay inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from nc_dist import user_code
from nc_dist.cli.checkpoint import checkpoint_app
from nc_dist.cli.nc import nc_app
from nc_dist.cli.shards import shards_app
from nc_dist.errors import BAD_INPUT

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(shards_app, name="shards")
app.add_typer(nc_app, name="nc")
app.add_typer(checkpoint_app, name="checkpoint")

RunFile = Annotated[Path, typer.Argument(help="The run file, YAML.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, as optim.lr=0.1", show_default=False)]
On = Annotated[str, typer.Option(help="auto: the cluster that RAY_ADDRESS names, else here; here; ray.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Check everything, print the plan, start nothing.")]
Name = Annotated[str | None, typer.Option(help="Replaces the last part of `out`.", show_default=False)]
Nodes = Annotated[int | None, typer.Option(min=1, help="With --dry-run: plan for so many nodes.", show_default=False)]
GpusPerNode = Annotated[int | None, typer.Option(min=1, help="With --dry-run: GPUs of a node.", show_default=False)]
GpuName = Annotated[str | None, typer.Option(help="With --dry-run: h200, a100, v100 ...", show_default=False)]
UserCode = Annotated[
    bool, typer.Option("--allow-user-code", help="Import and run the function that a backbone of `kind: own` names.")
]
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
        allow_user_code: UserCode = False,
        nodes: Nodes = None,
        gpus_per_node: GpusPerNode = None,
        gpu: GpuName = None,
    ) -> None:
        if on not in ("auto", "here", "ray"):
            _fail(f"--on {on}: must be auto, here or ray")
        if allow_user_code:
            user_code.allow()
        from nc_dist.launch.start import start
        from nc_dist.plan import Cluster

        other = Cluster(nodes or 1, gpus_per_node, gpu) if nodes or gpus_per_node or gpu else None
        _leave(start(name, file, overrides or [], on, dry_run, name_, fresh, other))  # type: ignore[arg-type]

    app.command(name, help=help)(command)


_journey("pretrain", "Train a source model.  Example: nc-dist pretrain configs/pretrain/digits_ce.yaml epochs=2")
_journey(
    "measure",
    "Neural collapse of a model on a data set.  Example: nc-dist measure configs/measure/digits.yaml",
)
_journey("finetune", "Adapt a source model by one method.  Example: nc-dist finetune configs/finetune/digits.yaml")
_journey("sweep", "Many fine-tuning trials.  Example: nc-dist sweep configs/sweep/digits.yaml --on ray")


@app.command()
def schema(
    journey: Annotated[str, typer.Argument(help="pretrain, finetune, measure or sweep.", show_default=False)],
) -> None:
    """Every key of a run file, its values and defaults, as a JSON Schema: editors complete and check YAML by it."""
    from nc_dist import config

    specs = {"pretrain": "PretrainRun", "finetune": "FinetuneRun", "measure": "MeasureRun", "sweep": "SweepRun"}
    if journey not in specs:
        _fail(f"schema {journey}: must be one of {', '.join(specs)}")
    typer.echo(json.dumps(getattr(config, specs[journey]).model_json_schema(), indent=1))


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
    if folder := multiprocessing.current_process()._config.get("tempdir"):  # type: ignore[attr-defined]
        shutil.rmtree(
            folder, ignore_errors=True
        )  # of the loader workers' forkserver: the end that is skipped does this
    os._exit(code)


def main() -> None:
    """Entry point of `nc-dist`."""
    app()


if __name__ == "__main__":
    main()
