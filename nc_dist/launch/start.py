"""From a run file to an exit code: check everything, prepare the folder, pick the launcher, say how it ended."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from nc_dist import console, plan, sweep
from nc_dist.config import FinetuneRun, MeasureRun, PretrainRun, SweepRun
from nc_dist.data.order import check_world
from nc_dist.data.source import check_samples
from nc_dist.engine import DeepSpeedSpec, deepspeed_json
from nc_dist.errors import BAD_INPUT, DONE, FAILED, PREEMPTED, TERMINATED, InputError, Preempted, exit_code
from nc_dist.launch.worker import SPECS, run_journey, run_trial, stopping_on_sigterm
from nc_dist.run_folder import STOP, check_same, prepare, result_of, write_status
from nc_dist.spec import Spec, load

On = Literal["auto", "here", "ray"]
STATES = {DONE: "done", FAILED: "failed", BAD_INPUT: "bad_input", PREEMPTED: "preempted", 130: "interrupted"}
STATES[TERMINATED] = "terminated"


def is_leader() -> bool:
    """Rank 0 of torchrun, or the only process: the one that speaks and makes folders."""
    return os.environ.get("RANK", "0") == "0"


def start(journey: str, file: Path, overrides: list[str], on: On, dry_run: bool, name: str | None, fresh: bool) -> int:
    """Run one journey from its file; the exit code says how it ended, status.json says the same."""
    out: Path | None = None
    try:
        spec = _load(SPECS.get(journey, SweepRun), file, overrides, name)
        where = _where(on)
        out_folder = Path(spec.out)  # type: ignore[attr-defined]
        _refuse_working_dir(out_folder)
        if not fresh and is_leader():
            check_same(spec, out_folder)
        trials = sweep.trials(spec, str(file)) if isinstance(spec, SweepRun) else []
        if dry_run:
            print(describe(spec, trials, where))
            return DONE
        if not fresh and (finished := result_of(out_folder)) is not None and not sweep.unfinished(trials):
            _say_finished(out_folder, finished)
            return DONE
        _check_data(spec, trials, where)
        out = prepare(spec, fresh) if is_leader() else out_folder
        _status(out, "running", None)
        if isinstance(spec, SweepRun):
            _run_sweep(spec, trials, where)
        else:
            _run(journey, spec, where)
        _status(out, "done", DONE)
        return DONE
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        return _ended(error, out)


def _load(cls: type[Spec], file: Path, overrides: list[str], name: str | None) -> Spec:
    spec = load(cls, file, overrides)
    if name is None:
        return spec
    if not name or "/" in name:
        raise InputError(f"--name {name!r}: one folder name, it replaces the last part of out")
    return spec.model_copy(update={"out": str(Path(spec.out).parent / name)})  # type: ignore[attr-defined]


def _where(on: On) -> Literal["here", "ray"]:
    """`auto` joins the cluster that RAY_ADDRESS names, as under `ray job submit`; under torchrun it stays here."""
    if on != "auto":
        return on
    return "ray" if os.environ.get("RAY_ADDRESS") and "RANK" not in os.environ else "here"


def _refuse_working_dir(out: Path) -> None:
    """Under `ray job submit` the working directory is a copy on one node, which Ray deletes."""
    if "working_dir_files" in Path.cwd().parts and not out.is_absolute():
        raise InputError(f"out={out}: a Ray job needs an absolute path on storage that all nodes share")


def _check_data(spec: Spec, trials: list[sweep.Trial], where: str) -> None:
    """What can be wrong with data, model and world size, before anything starts."""
    if isinstance(spec, PretrainRun):
        from nc_dist.pretrain import open_source_set

        data = open_source_set(spec)
        check_world(data.order.micro_per_step, _world_size(spec, where))
        if spec.data.test:
            from nc_dist.data.catalog import open_source

            test = open_source(spec.data.test, "test")
            if len(test.class_names) != len(data.source.class_names):
                raise InputError(f"data.test={spec.data.test!r}: its classes are not those of data.train")
        if is_leader():
            check_samples(data.source, data.train)
    elif isinstance(spec, FinetuneRun):
        from nc_dist.finetune import check_target

        target = check_target(spec, _world_size(spec, where))
        if is_leader():
            check_samples(target.train, target.positions)
    elif isinstance(spec, MeasureRun):
        from nc_dist.data.catalog import open_source
        from nc_dist.measure import check_blocks
        from nc_dist.model import load_exported

        check_blocks(load_exported(spec.model).model, spec.blocks)
        source = open_source(spec.data, spec.split)
        if is_leader():
            check_samples(source, range(len(source.labels)))


def _world_size(spec: Any, where: str) -> int:
    return int(spec.launch.workers) if where == "ray" else int(os.environ.get("WORLD_SIZE", "1"))


def describe(spec: Spec, trials: list[sweep.Trial], where: str) -> str:
    """The plan that --dry-run prints; touches nothing."""
    lines = [f"{type(spec).__name__} -> {spec.out} ({where})"]  # type: ignore[attr-defined]
    if isinstance(spec, PretrainRun):
        from nc_dist.pretrain import open_source_set

        data, world = open_source_set(spec), _world_size(spec, where)
        check_world(data.order.micro_per_step, world)
        batch = {"global_batch": spec.batch.global_, "micro": spec.batch.micro}
        numbers = plan.training_plan(
            samples=len(data.train),
            heldout=len(data.heldout),
            lanes=data.order.lanes,
            epochs=spec.epochs,
            world=world,
            **batch,
        )
        lines.append(plan.show(numbers))
        if isinstance(spec.engine, DeepSpeedSpec):
            lines.append(f"  DeepSpeed: {deepspeed_json(spec.engine, spec.batch.global_, spec.batch.micro, world)}")
    else:
        _check_data(spec, trials, where)
    lines += [f"  {'done' if trial.is_finished() else 'to do'}  {trial.id}" for trial in trials]
    return "\n".join(lines)


def _run(journey: str, spec: Any, where: str) -> None:
    out = Path(spec.out)
    watch: AbstractContextManager[None] = console.following(out) if is_leader() else nullcontext()
    if where == "ray":
        from nc_dist.launch.ray_train import fit

        with stopping_on_sigterm(also=(out / STOP).touch), watch:
            result = fit(journey, spec)
    else:
        with stopping_on_sigterm() if journey != "measure" else nullcontext(), watch:
            result = run_journey(journey, spec)
    if is_leader():
        _say_done(out, result)


def _run_sweep(spec: SweepRun, trials: list[sweep.Trial], where: str) -> None:
    from nc_dist.report import write_report

    out, todo = Path(spec.out), sweep.unfinished(trials)
    print(f"{len(trials)} trials, {len(trials) - len(todo)} of them finished already", flush=True)
    with console.following_trials([trial.out for trial in todo]):
        if where == "ray":
            from nc_dist.launch import ray_sweep

            ray_sweep.run(todo, spec.launch, out)
        else:
            sweep.run_here(todo, spec.launch.retries, run_trial)
    failed = sweep.unfinished(trials)
    if len(failed) < len(trials):
        write_report(out, out)
    if failed:
        named = "\n  ".join(f"{trial.id}: see {trial.out}/status.json" for trial in failed)
        raise RuntimeError(f"{len(failed)} of {len(trials)} trials failed:\n  {named}")
    from nc_dist.run_folder import write_result

    write_result(out, {"journey": "sweep", "trials": [trial.id for trial in trials]})
    print(f"all {len(trials)} trials are done; table: {out}/results.csv")


def _ended(error: BaseException, out: Path | None) -> int:
    """Say what happened, in a form that fits it, and return the exit code."""
    code = exit_code(error)
    resume = " ".join(["nc-dist", *sys.argv[1:]])
    if isinstance(error, InputError):
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, Preempted):
        print(f"stopped, all is saved; go on with the same command:\n  {resume}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
    else:
        traceback.print_exception(error)
        print(f"failed: {error}", file=sys.stderr)
    if out is not None:
        _status(out, STATES[code], code, f"{type(error).__name__}: {error}", resume)
    return code


def _status(out: Path, state: str, code: int | None, reason: str = "", resume: str = "") -> None:
    if is_leader():
        write_status(out, state, code, reason, resume)


def _say_finished(out: Path, result: dict[str, Any]) -> None:
    if is_leader():
        print(f"{out} is finished already; --fresh runs it anew")


def _say_done(out: Path, result: dict[str, Any]) -> None:
    shown = (
        "source_accuracy",
        "accuracy",
        "heldout_accuracy",
        "nc1_source",
        "nc1_downstream",
        "trainable_percent",
    )
    values = [f"{key} {result[key]:.4g}" for key in shown if isinstance(result.get(key), float)]
    print(f"done in {console.duration(result['seconds'])}: {', '.join(values)}")
    print(f"  results: {out}/result.json   TensorBoard: tensorboard --logdir {out}", flush=True)
