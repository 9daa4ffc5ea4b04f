"""One journey as a Ray Train job: a group of workers, each of which runs the journey as it would anywhere else.

A dead worker restarts the group, and the journey goes on from its own newest checkpoint; so does an elastic group when
the cluster has room for more workers, or for fewer. What no repetition can cure ends the group at once.
"""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nc_dist.launch.ray_cluster import check_fits, cluster, gpus_each

import ray.train
import ray.train.torch
import torch
from ray.train import UserCallback
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from nc_dist import user_code
from nc_dist.checkpoint import CHECKPOINTS, SaveFailed, latest, step_of
from nc_dist.checkpoint.manifest import checkpoints_in
from nc_dist.config import Launch, Workers
from nc_dist.errors import Diverged, InputError, Preempted
from nc_dist.launch import lease
from nc_dist.launch.ray_gauges import gauges
from nc_dist.launch.sizes import size_of
from nc_dist.launch.tail import NOTICES, following, note
from nc_dist.launch.worker import JOURNEYS, run_journey, stopping_on_sigterm
from nc_dist.run_folder import STOP, result_of
from nc_dist.spec import Spec, validate
from nc_dist.watchdog import longest, verdict_of
from nc_dist.world import backend, regroup

# What a repetition cannot cure, a full disk included; subclasses first. RuntimeError: repeated often enough.
FINAL: dict[str, type[Exception]] = {
    cls.__name__: cls for cls in (lease.Held, InputError, Diverged, SaveFailed, RuntimeError)
}
# Ray's own values suit large clusters with slow autoscalers; one that is set in the environment stays.
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # until a dead worker is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # of an attempt with as many workers as there were: then fewer
    # While Ray waits for a node that is to go, it reports the same failure every second, and counts what follows apart
    # from other failures: each would be a failure of ours. Without, a node that goes is a worker that dies, once.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


class Final(Exception):
    """An end that no repetition can cure, as it travels from a worker to the driver: (kind, message)."""


def fit(name: str, spec: Spec, sizes: list[int]) -> dict[str, Any]:
    """Run the journey `name` on Ray, in groups of one of `sizes` workers, and return its result.

    Raises Preempted when it was stopped, else one of FINAL with the first failing worker's reason.
    """
    launch, out = spec.launch, Path(spec.out).absolute()  # type: ignore[attr-defined]
    # Ray's start takes over SIGTERM (a stack dump, then abort): our way of stopping is put in place after it.
    with cluster() as resources, stopping_on_sigterm(also=partial(_stop, out)):
        gpus = gpus_each(launch.gpus, resources, "workers")
        check_fits(resources, sizes[0] * launch.cpus, sizes[0] * gpus, "launch.workers")
        try:
            with following(out / NOTICES, print), gauges(out):
                _trainer(name, spec, launch, sizes, gpus).fit()
        except (KeyboardInterrupt, SystemExit):  # Ray Train ends by the latter, with exit code 0, on SIGINT
            if not (out / STOP).exists():
                raise KeyboardInterrupt from None
        except TrainingFailedError as error:
            raise _reason(error, out) from error
    result = result_of(out)
    if result is None:
        raise Preempted(step_of(latest(out / CHECKPOINTS)))
    return result


def _trainer(name: str, spec: Spec, launch: Launch, sizes: list[int], gpus: float) -> TorchTrainer:
    out = Path(spec.out).absolute()  # type: ignore[attr-defined]
    elastic = (
        {"elastic_resize_monitor_interval_s": launch.workers.look_s} if isinstance(launch.workers, Workers) else {}
    )
    waits = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(longest(launch.hang_s))}  # the watchdog speaks first
    for key, value in (SETTINGS | waits).items():
        os.environ.setdefault(key, value)
    return TorchTrainer(
        _work,
        train_loop_config={
            "name": name,
            "tree": spec.model_dump(mode="json", by_alias=True) | {"out": str(out)},
            "cwd": os.getcwd(),
            "sizes": sizes,
            "owner": lease.owner(),
            "user_code": user_code.is_allowed(),
        },
        torch_config=TorchConfig(backend=backend(bool(gpus)), timeout_s=longest(launch.hang_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(sizes[0], sizes[-1]) if len(sizes) > 1 else sizes[0],
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": launch.cpus, **({"GPU": gpus} if gpus else {})},
            **elastic,
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",  # ours is the state, not Ray's
            storage_path=str(out / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=-1),  # _Failures counts
            callbacks=[_Failures(out, launch.retries)],
        ),
    )


def _work(config: dict[str, Any]) -> None:
    """On each worker. A stop is no failure: the group ends quietly and the driver sees that there is no result."""
    if Path(config["cwd"]).is_dir():
        os.chdir(config["cwd"])  # relative paths mean the same on driver and workers
    if config["user_code"]:
        user_code.allow()
    if torch.cuda.is_available():
        device = ray.train.torch.get_device()  # Ray lets the workers of a node see all of its GPUs
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # what DeepSpeed goes by
    try:
        spec: Any = validate(JOURNEYS[config["name"]].spec, config["tree"], "run")
        out = Path(spec.out)
        if not out.is_dir():
            raise InputError(f"out={out}: not on this node, {socket.gethostname()}; needs storage that all nodes share")
        tell: Callable[[str], object] = partial(note, out)
        if _trains(config["sizes"], spec.launch, tell):
            run_journey(config["name"], spec, config["owner"], tell)
    except Preempted as stopped:
        print(stopped, flush=True)
    except (InputError, Diverged, SaveFailed) as error:
        kind = next(name for name, cls in FINAL.items() if isinstance(error, cls))
        raise Final(kind, str(error)) from error
    except Exception as error:
        error.add_note(traceback.format_exc())  # it travels to the controller, the traceback itself does not
        raise


def _trains(sizes: list[int], launch: Launch, tell: Callable[[str], object]) -> bool:
    """Whether this worker is of those that train: surplus ones, which the batch cannot be shared with, end at once."""
    context = ray.train.get_context()
    started = context.get_world_size()
    size = size_of(started, sizes)
    if context.get_world_rank() == 0 and len(sizes) > 1:
        rest = f", {started - size} idle: {size} is the largest of {sizes} that there are enough for"
        tell(f"{started} workers started, {size} train{rest if started > size else ''}")
    return size == started or regroup(size, broadcast_from_rank_zero, longest(launch.hang_s))


class _Failures(UserCallback):  # type: ignore[misc]
    """In the controller: tells of workers that failed, and counts the failures without a newer checkpoint in between.

    An end that no repetition can cure is raised, and so is one failure too many: Ray ends then.
    """

    def __init__(self, out: Path, retries: int) -> None:
        self.out, self.retries, self.count, self.step = out, retries, 0, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, Final):
                raise error
        newest = max(map(step_of, checkpoints_in(self.out / CHECKPOINTS)), default=0)
        self.count, self.step = (1 if newest > self.step else self.count + 1), max(newest, self.step)
        went_on = self.count <= self.retries
        then = "the group starts again from there" if went_on else "no more retries"
        since = f"since the checkpoint of step {newest}" if newest else "without any checkpoint"
        note(self.out, f"{_said(worker_exceptions)}; failure {self.count} {since}, {self.retries} are retried: {then}")
        if not went_on:
            raise Final(RuntimeError.__name__, _details(worker_exceptions))


def _said(failures: dict[int, Exception]) -> str:
    """One line on the failed worker that the others failed by."""
    rank, error = _cause(failures)
    if hasattr(error, "health_check_failure"):
        return f"worker {rank} died"
    return f"worker {rank} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _details(failures: dict[int, Exception]) -> str:
    """The same, and where it failed."""
    _, error = _cause(failures)
    return "\n".join([_said(failures), *getattr(error, "__notes__", [str(error)])])


def _cause(failures: dict[int, Exception]) -> tuple[int, Exception]:
    """Rank and error of the worker that the others failed by: one that died, else the first."""
    died = {rank: error for rank, error in failures.items() if hasattr(error, "health_check_failure")}
    return next(iter((died or failures).items()))


def _reason(error: TrainingFailedError, out: Path) -> Exception:
    """Why the group failed, as ours: ends that no repetition cures keep their kind, a hang its line."""
    final = getattr(error, "controller_failure", None)
    kind, message = final.args if isinstance(final, Final) else (RuntimeError.__name__, str(error))
    if kind == RuntimeError.__name__ and (line := verdict_of(out)):
        message = line
    return FINAL[kind](message)


def _stop(out: Path) -> None:
    """Ask the workers to stop. Where none is at work nobody would see it, and the driver's waiting ends."""
    (out / STOP).touch()
    if not lease.is_held(out):
        raise KeyboardInterrupt  # the only exception of a signal handler that ends a wait for Ray
