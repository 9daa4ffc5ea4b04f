"""Where a pre-training run begins, and whether it may begin there.

1 its own newest sound checkpoint, here or where it uploads to; 2 the newest of the place that `resume` names;
3 weights that the backbone's spec names; 4 scratch.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nc_dist.checkpoint.manifest import checkpoints_in, latest, newest_sound, read_manifest, saved_state, step_of
from nc_dist.checkpoint.places import Place
from nc_dist.checkpoint.retention import Retention, chosen_steps
from nc_dist.checkpoint.upload import fetch, fetch_newest
from nc_dist.config import PretrainRun
from nc_dist.data.order import check_state
from nc_dist.errors import EXPORT_REMEDY, InputError
from nc_dist.identity import differences, spec_hash
from nc_dist.model import without_weights
from nc_dist.run_folder import FRESH
from nc_dist.source_set import SourceSet, logit_classes

CHECKPOINTS = "checkpoints"
BROUGHT = "resumed_from"  # where a checkpoint of another run behind a URL is brought to


def resume_from(run: PretrainRun, data: SourceSet) -> Path | None:
    """The checkpoint to go on from, whole; None: weights or scratch. On one process, before any other looks.

    InputError when there are checkpoints and none is whole: nobody wants weeks of work begun anew silently.
    """
    own = newest_of(run)
    if own is not None:
        check_goes_on(run, data, Place(own))
    if own is not None or run.resume is None:
        return own
    given = newest_sound(given_checkpoints(run.resume))
    if given is None:
        raise InputError(f"resume={run.resume}: none of its checkpoints is whole; name another one")
    check_more(run, data, given)
    if not given.is_remote:
        return Path(given.name)
    try:
        return fetch(given, Path(run.out) / BROUGHT)
    except (OSError, ValueError) as error:
        raise InputError(
            f"resume={run.resume}: {given.folder_name} cannot be brought here ({error}); give the same command again, "
            "or copy it to a disk here and name that folder"
        ) from None


def remove_brought(out: Path) -> None:
    """Remove the copy of another run's checkpoint, once it is loaded everywhere."""
    shutil.rmtree(out / BROUGHT, ignore_errors=True)


def newest_of(run: PretrainRun) -> Path | None:
    """The newest sound checkpoint of the run itself, brought here where only its upload has it; None without any.

    A disk of one node may hold fewer than the upload, as after a restart elsewhere. InputError when all are damaged.
    """
    folder = Path(run.out) / CHECKPOINTS
    here = latest(folder)
    uploads = own_uploads(run, Place(here) if here else None) if run.upload else []
    newest = fetch_newest(uploads, folder, after=step_of(here)) or here
    if newest is None:
        own_newest(folder)  # an error where there are damaged ones here
        if uploads:
            raise InputError(f"{uploads[-1]} and all before it are damaged; give another upload URL to begin anew")
    return newest


def own_newest(folder: Path) -> Path | None:
    """The newest sound checkpoint of a run's own folder, None for a run without any.

    InputError when all are damaged.
    """
    checkpoints = checkpoints_in(folder)
    newest = newest_sound(checkpoints)
    if checkpoints and newest is None:
        raise InputError(
            f"{folder}: none of the {len(checkpoints)} checkpoints is whole; put back the files, or begin anew with "
            "--fresh, which moves the run's folder aside"
        )
    return Path(newest.name) if newest else None


def own_uploads(run: PretrainRun, here: Place | None) -> list[Place]:
    """The run's checkpoints where it uploads to; `here` is what it can go on from without them.

    Where they cannot be read, it does, with a line on the console; InputError without `here`. InputError also when they
    are of another run, or of an attempt before --fresh.
    """
    assert run.upload is not None
    try:
        there = checkpoints_in(run.upload)
        state = read_manifest(there[-1]).get("state", {}) if there else {}
    except (OSError, ValueError) as error:
        if here is not None:
            print(f"upload={run.upload}: cannot be read ({error}): the run goes on from {here}", flush=True)
            return []
        raise InputError(
            f"upload={run.upload}: cannot be read ({error}); give the same command again once it can, or another URL"
        ) from None
    if not there:
        return []
    remedy = "give another URL, or remove what is there"
    if (Path(run.out) / FRESH).exists() and not checkpoints_in(Path(run.out) / CHECKPOINTS):
        raise InputError(f"upload={run.upload}: holds {there[-1].folder_name} of before --fresh; {remedy}")
    if state.get("about", {}).get("run") != _run_hash(run):
        raise InputError(f"upload={run.upload}: holds {there[-1].folder_name} of a run of other settings; {remedy}")
    return there


def given_checkpoints(resume: str) -> list[Place]:
    """What `resume` names; InputError when there is no checkpoint."""
    try:
        found = checkpoints_in(resume)
    except OSError as error:
        raise InputError(f"resume={resume}: cannot be read ({error})") from None
    if not found:
        raise InputError(
            f"resume={resume}: no checkpoint there; name a run's folder, its checkpoints/, one step_N in it, or a URL"
        )
    return found


def about(run: PretrainRun, num_classes: int) -> dict[str, Any]:
    """What a checkpoint says of its run; all but `run` must be the same where another run goes on from it."""
    model = without_weights(run.model.model_dump(mode="json")) | {"num_classes": num_classes}
    optim = run.optim.model_dump(mode="json")
    optim.pop("lr")  # set at every step
    engine = run.engine.model_dump(mode="json")
    return {
        "run": _run_hash(run),
        "model": {"identity": spec_hash(model), **model},
        "engine": {key: engine[key] for key in ("kind", "zero", "precision") if key in engine},
        "optim": optim,
    }


def _run_hash(run: PretrainRun) -> str:
    return spec_hash(run.model_dump(mode="json", by_alias=True))


def check_goes_on(run: PretrainRun, data: SourceSet, checkpoint: Place, key: str = "") -> int:
    """The step at which the run goes on from a checkpoint; InputError that says what differs, and where (`key`)."""
    state, where, export = saved_state(checkpoint), f"{key}{checkpoint}", EXPORT_REMEDY.format(checkpoint)
    now, then = about(run, logit_classes(run, data.source.class_names)), state.get("about")
    if then is None:
        raise InputError(f"{where}: does not say which model it is of. {export}")
    ours, theirs = now["model"].pop("identity"), then["model"].pop("identity")
    if ours != theirs:
        raise InputError(
            f"{where}: a checkpoint of another model, of identity {theirs}; this run's is {ours} (there -> here):"
            f"{_lines(then, now, 'model')}\n  Name a checkpoint of this model"
        )
    try:
        step = check_state(data.order, data.identity, state["order"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    for part, remedy in (("engine", export), ("optim", "Its state fits these settings alone")):
        if then[part] != now[part]:
            raise InputError(f"{where}: of other settings (there -> here):{_lines(then, now, part)}\n  {remedy}")
    return step


def _lines(then: Mapping[str, Any], now: Mapping[str, Any], part: str) -> str:
    return "".join(f"\n    {line}" for line in differences(then[part], now[part], part))


def check_given(run: PretrainRun, data: SourceSet) -> str | None:
    """Where the run would begin, for its plan; InputError when it may not, or where it uploads to cannot be written.

    Reads manifests alone: the hashes are checked by the run itself.
    """
    own = checkpoints_in(Path(run.out) / CHECKPOINTS)
    if run.upload:
        Place(run.upload).check_writable("upload")
        own += own_uploads(run, own[-1] if own else None)
    if own or run.resume is None:
        newest = max(own, key=step_of, default=None)  # of the same step the one here
        return f"step {step_of(newest)}, {newest}" if newest else None
    given = given_checkpoints(run.resume)[-1]
    return f"step {check_more(run, data, given)}, {given}"


def check_more(run: PretrainRun, data: SourceSet, given: Place) -> int:
    """The step of another run's checkpoint; InputError unless this run goes on from it, and beyond."""
    step = check_goes_on(run, data, given, "resume=")
    if step >= data.steps:
        raise InputError(f"resume={given}: at step {step}, and this run ends at step {data.steps}; give more epochs")
    return step


def state_of(run: PretrainRun, data: SourceSet, step: int) -> dict[str, Any]:
    """What a checkpoint at `step` says of its run, for `check_goes_on`."""
    return {
        "about": about(run, logit_classes(run, data.source.class_names)),
        "order": data.order.state(step, data.identity),
    }


def retention_of(run: PretrainRun, data: SourceSet) -> Retention:
    """Which of the run's checkpoints stay."""
    return Retention(run.keep, chosen_steps(run.keep_epochs, data.order.steps_per_epoch))
