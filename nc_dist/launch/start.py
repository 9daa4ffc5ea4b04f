"""From a run file to an exit code: check everything, prepare the folder, pick the launcher, say how it ended."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nc_dist import console, plan, sweep, watchdog
from nc_dist.checkpoint import on_first
from nc_dist.config import SweepRun
from nc_dist.errors import DONE, FAILED, STATES, Diverged, InputError, Preempted, Terminated, exit_code
from nc_dist.launch import lease
from nc_dist.launch.sizes import allowed_sizes
from nc_dist.launch.worker import JOURNEYS, ending_on_sigterm, run_journey, run_trial, stopping_on_sigterm
from nc_dist.run_folder import STATUS, STOP, check_same, prepare, result_of, write_result, write_status, write_whole
from nc_dist.spec import Spec, load
from nc_dist.world import World, joined_world

On = Literal["auto", "here", "ray"]
Where = Literal["here", "ray"]


class Work(NamedTuple):
    """What was asked for: the call that checks it and gives its plan, made by the leader, and the one that does it."""

    plan: Callable[[], dict[str, Any]]
    run: Callable[[], None]


def start(
    journey: str, file: Path, overrides: list[str], on: On, dry_run: bool, name: str | None, fresh: bool,
    planned: plan.Cluster | None = None,
) -> int:  # fmt: skip
    """Run one journey from its file; the exit code says how it ended, status.json says the same.

    `planned` is a cluster that the plan is for, instead of this one. Under torchrun every rank comes here and joins the
    others; rank 0 alone checks, speaks and writes, and all end with what it ends with.
    """
    out: Path | None = None
    try:
        spec = _load(journey, file, overrides, name)
        cluster = _cluster(planned, journey, dry_run)
        folder, where = Path(spec.out), _where(on)  # type: ignore[attr-defined]
        _refuse_working_dir(folder)
        work = _sweep(spec, file, where) if isinstance(spec, SweepRun) else _journey(journey, spec, where, cluster)
        with _joined(spec, where) as world:
            if (code := _led(world, lambda: _begun(journey, spec, work, where, dry_run, fresh))) is not None:
                return code
            out = folder
            work.run()
            _status(out, "done", DONE)
        return DONE
    except (Exception, KeyboardInterrupt, Terminated) as error:
        return _ended(error, out)


def _begun(journey: str, spec: Any, work: Work, where: Where, dry_run: bool, fresh: bool) -> int | None:
    """The leader's part: check everything, and make the folder. The exit code where that is all."""
    folder, is_sweep = Path(spec.out), isinstance(spec, SweepRun)
    if not fresh:
        check_same(spec, folder)
    finished = result_of(folder)
    if not is_sweep and not fresh and not dry_run and finished is not None:
        if changed := JOURNEYS[journey].changed(spec, finished):
            raise InputError(f"{folder}: finished, but {changed}; --fresh runs it anew, --name elsewhere")
        _say(f"{folder} is finished already; --fresh runs it anew")
        return DONE
    checked = work.plan()
    if dry_run:
        _say(f"{journey} -> {folder} ({where})\n{plan.show(checked)}")
        return DONE
    lease.free(folder, lease.owner())
    _status(prepare(spec, fresh), "running", None)
    return None


def _led(world: World, work: Callable[[], int | None]) -> int | None:
    """work() of the leader, on every rank; where it fails, the leader alone says why."""
    try:
        return on_first(world, work)
    except Exception as error:
        if is_leader():
            raise
        return exit_code(error)


def _joined(spec: Any, where: Where) -> AbstractContextManager[World]:
    """Before anything is checked, as a rank that is gone by then would keep the others waiting for the group."""
    is_rank = where == "here" and "RANK" in os.environ
    return joined_world(watchdog.longest(spec.launch.hang_s)) if is_rank else nullcontext(World())


def is_leader() -> bool:
    """Rank 0 of torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def _load(journey: str, file: Path, overrides: list[str], name: str | None) -> Spec:
    cls: type[Spec] = SweepRun if journey == "sweep" else JOURNEYS[journey].spec
    spec = load(cls, file, overrides)
    if name is None:
        return spec
    if not name or "/" in name:
        raise InputError(f"--name {name!r}: one folder name, it replaces the last part of out")
    return spec.model_copy(update={"out": str(Path(spec.out).parent / name)})  # type: ignore[attr-defined]


def _where(on: On) -> Where:
    """`auto` joins the cluster that RAY_ADDRESS names, as under `ray job submit`; under torchrun it stays here."""
    if on != "auto":
        return on
    return "ray" if os.environ.get("RAY_ADDRESS") and "RANK" not in os.environ else "here"


def _refuse_working_dir(out: Path) -> None:
    """Under `ray job submit` the working directory is a copy on one node, which Ray deletes."""
    if "working_dir_files" in Path.cwd().parts and not out.is_absolute():
        raise InputError(f"out={out}: a Ray job needs an absolute path on storage that all nodes share")


def _cluster(planned: plan.Cluster | None, journey: str, dry_run: bool) -> plan.Cluster | None:
    """What a plan is to be made for; None where none is to be made."""
    if planned is not None and (journey != "pretrain" or not dry_run):
        raise InputError("--nodes, --gpus-per-node and --gpu plan a pretrain for another cluster: with --dry-run only")
    if planned is not None and planned.nodes > 1 and planned.gpus_per_node is None:
        raise InputError(f"--nodes {planned.nodes}: say --gpus-per-node as well")
    return (planned or plan.Cluster()) if journey == "pretrain" and dry_run else None


def _journey(name: str, spec: Any, where: Where, cluster: plan.Cluster | None) -> Work:
    """One run: here, under torchrun, or as a Ray Train job."""
    out = Path(spec.out)
    sizes = [int(os.environ.get("WORLD_SIZE", "1"))]
    if where == "ray":
        sizes = allowed_sizes(spec.launch.workers, JOURNEYS[name].micro(spec))
    if cluster is not None and cluster.world is not None:
        sizes = [cluster.world]

    def checked() -> dict[str, Any]:
        elastic = {"workers on Ray, as many as there are": sizes} if len(sizes) > 1 else {}
        return JOURNEYS[name].check(spec, sizes[-1], *([cluster] if cluster else [])) | elastic

    def run() -> None:
        with console.following(out) if is_leader() else nullcontext():
            if where == "ray":
                from nc_dist.launch.ray_train import fit

                with stopping_on_sigterm(also=(out / STOP).touch):
                    result = fit(name, spec, sizes)
            else:
                with stopping_on_sigterm():
                    result = run_journey(name, spec, hung=partial(_hung, out))
        _say_done(out, result)

    return Work(checked, run)


def _sweep(spec: SweepRun, file: Path, where: Where) -> Work:
    """All trials that have no result yet, here one after another or through Ray Tune; then the table."""
    if "RANK" in os.environ:
        raise InputError("a sweep is started by one process, not by torchrun; use --on ray for many trials at a time")
    out, trials = Path(spec.out), sweep.trials(spec, str(file))

    def run() -> None:
        todo = sweep.unfinished(trials)
        write_whole(out / "sweep.json", json.dumps({"trials": [trial.id for trial in trials]}))
        _say(f"{len(trials)} trials, {len(trials) - len(todo)} of them finished already")
        with console.following_trials([trial.out for trial in todo]):
            if todo and where == "ray":
                from nc_dist.launch import ray_sweep

                with ending_on_sigterm():
                    ray_sweep.run(todo, spec.launch, out)
            else:
                with stopping_on_sigterm():
                    sweep.run_here(todo, spec.launch.retries, run_trial)
        failed = sweep.unfinished(trials)
        if len(failed) < len(trials):
            from nc_dist.report import write_report  # half a second, which no other journey needs

            write_report(out, out)
        if failed:
            named = "\n  ".join(f"{trial.id}: see {trial.out}/status.json" for trial in failed)
            raise RuntimeError(f"{len(failed)} of {len(trials)} trials failed:\n  {named}")
        write_result(out, {"journey": "sweep", "trials": [trial.id for trial in trials]})
        _say(f"all {len(trials)} trials are done; table: {out}/results.csv")

    return Work(lambda: {trial.id: "done" if trial.is_finished() else "to do" for trial in trials}, run)


def _ended(error: BaseException, out: Path | None) -> int:
    """Say what happened, in a form that fits it, and return the exit code."""
    code = exit_code(error)
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, Preempted):
        print(f"{error}; go on with the same command:\n  {_command()}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt | Terminated):
        print(f"{STATES[code]}; the same command goes on from the last checkpoint", file=sys.stderr)
    else:
        traceback.print_exception(error)
        print(f"failed: {error}", file=sys.stderr)
    if out is None or isinstance(error, lease.Held):
        return code  # the folder is not ours
    final = isinstance(error, InputError | Diverged)
    if final or (is_leader() and not (code == FAILED and _another_told(out))):
        write_status(out, STATES[code], code, f"{type(error).__name__}: {error}", _command())
    return code


def _another_told(out: Path) -> bool:
    """Whether another rank said why the group ends: this one failed, or waits, because that one was gone."""
    with suppress(OSError, ValueError):
        status = json.loads((out / STATUS).read_text())
        return bool(status["pid"] != os.getpid() and status["code"] is not None)
    return False


def _hung(out: Path, line: str) -> None:
    """On a rank that ends the group because one hangs."""
    print(line, file=sys.stderr, flush=True)
    if not _another_told(out):
        write_status(out, STATES[FAILED], FAILED, line, _command())


def _command() -> str:
    return " ".join(["nc-dist", *sys.argv[1:]])


def _status(out: Path, state: str, code: int | None) -> None:
    if is_leader():
        write_status(out, state, code)


def _say(text: str) -> None:
    if is_leader():
        print(text, flush=True)


def _say_done(out: Path, result: dict[str, Any]) -> None:
    shown = ("source_accuracy", "accuracy", "heldout_accuracy", "nc1", "nc1_source", "nc1_downstream")
    values = [f"{key} {result[key]:.4g}" for key in shown if isinstance(result.get(key), float)]
    _say(f"done in {console.duration(result['seconds'])}: {', '.join(values)}")
    for line in console.measured_lines(result) if result["journey"] == "measure" else []:
        _say(line)
    _say(f"  results: {out}/result.json   TensorBoard: tensorboard --logdir {out}")
