"""The trials of a sweep through Ray Tune: as many at a time as fit, failed ones again, finished ones never."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # our trials write their own event files
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

from nc_dist.launch.ray_cluster import check_fits, cluster, gpus_each

from ray import tune

from nc_dist import user_code
from nc_dist.config import FinetuneRun, TrialPlacement
from nc_dist.launch.worker import run_trial
from nc_dist.spec import validate
from nc_dist.sweep import Trial


def run(todo: Sequence[Trial], launch: TrialPlacement, out: Path) -> None:
    """Run the trials; what became of each lies in its folder."""
    with cluster() as resources:
        gpus = gpus_each(launch.gpus, resources, "trials")
        check_fits(resources, launch.cpus, gpus, "launch.cpus")
        trees = {trial.id: trial.run.model_dump(mode="json", by_alias=True) for trial in todo}
        trainable = tune.with_resources(
            tune.with_parameters(_work, trees=trees, cwd=os.getcwd(), allowed=user_code.is_allowed()),
            {"cpu": launch.cpus, "gpu": gpus},
        )
        tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(list(trees))},
            tune_config=tune.TuneConfig(max_concurrent_trials=launch.concurrent, reuse_actors=True),
            run_config=tune.RunConfig(
                name=f"attempt-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                storage_path=str((out / "ray").absolute()),
                failure_config=tune.FailureConfig(max_failures=launch.retries),
                verbose=0,
            ),
        ).fit()


def _work(config: dict[str, Any], trees: dict[str, Any], cwd: str, allowed: bool) -> None:
    if Path(cwd).is_dir():
        os.chdir(cwd)
    if allowed:
        user_code.allow()
    result = run_trial(validate(FinetuneRun, trees[config["trial"]], config["trial"]))
    tune.report({"accuracy": result["accuracy"]})
