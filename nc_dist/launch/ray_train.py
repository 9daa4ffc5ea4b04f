"""One journey as a Ray Train job: a group of workers, each of which runs the journey as it would anywhere else.

A dead worker restarts the group, and the journey goes on from its own newest checkpoint.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from nc_dist.launch.ray_cluster import check_fits, cluster

import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from nc_dist.checkpoint import latest, step_of
from nc_dist.errors import InputError, Preempted
from nc_dist.launch.worker import JOURNEYS, run_journey, stopping_on_sigterm
from nc_dist.run_folder import STOP, result_of
from nc_dist.spec import Spec, validate

COLLECTIVE_TIMEOUT_S = 1800


def fit(name: str, spec: Spec) -> dict[str, Any]:
    """Run the journey `name` on Ray and return its result.

    Raises Preempted when it was stopped, InputError or RuntimeError with the first failing worker's reason.
    """
    launch, out = spec.launch, Path(spec.out).absolute()  # type: ignore[attr-defined]
    # Ray's start takes over SIGTERM (a stack dump, then abort): our way of stopping is put in place after it.
    with cluster() as resources, stopping_on_sigterm(also=(out / STOP).touch):
        gpus = launch.gpus if launch.gpus is not None else float(resources.get("GPU", 0) > 0)
        check_fits(resources, launch.workers * launch.cpus, launch.workers * gpus, "launch.workers")
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "name": name,
                "tree": spec.model_dump(mode="json", by_alias=True),
                "cwd": os.getcwd(),
            },
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
            scaling_config=ray.train.ScalingConfig(
                num_workers=launch.workers,
                use_gpu=bool(gpus),
                resources_per_worker={"CPU": launch.cpus, **({"GPU": gpus} if gpus else {})},
            ),
            run_config=ray.train.RunConfig(
                name=f"attempt-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",  # ours is the state, not Ray's
                storage_path=str(out / "ray"),
                failure_config=ray.train.FailureConfig(max_failures=launch.retries),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _reason(error) from error
    result = result_of(out)
    if result is None:
        raise Preempted(step_of(latest(out / "checkpoints")))
    return result


def _work(config: dict[str, Any]) -> None:
    """On each worker. A stop is no failure: the group ends quietly and the driver sees that there is no result."""
    if Path(config["cwd"]).is_dir():
        os.chdir(config["cwd"])  # relative paths mean the same on driver and workers
    if torch.cuda.is_available():
        device = ray.train.torch.get_device()  # Ray lets the workers of a node see all of its GPUs
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # what DeepSpeed goes by
    spec = validate(JOURNEYS[config["name"]].spec, config["tree"], "run")
    try:
        run_journey(config["name"], spec)
    except Preempted as stopped:
        print(stopped, flush=True)


def _reason(error: TrainingFailedError) -> Exception:
    """The first failing worker's error as ours: user input stays an InputError."""
    failures = list(getattr(error, "worker_failures", {}).items())
    for _, failure in failures:
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, InputError) or type(cause).__name__ == "InputError":
            return InputError(str(cause))
    if failures:
        rank, failure = failures[0]
        return RuntimeError(f"worker {rank} failed: {failure}")
    return RuntimeError(str(error))
