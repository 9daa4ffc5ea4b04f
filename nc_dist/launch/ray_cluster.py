"""Joins the Ray cluster that RAY_ADDRESS names, or starts a private one on this machine."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


if not os.environ.get("RAY_ADDRESS"):
    # Said explicitly, and before Ray is imported, which is when it looks: 2.60 would write a token into the home
    # directory, and its default is about to change. A cluster that we join has set its own mode.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray

from nc_dist.errors import InputError

LOCAL_OBJECT_STORE = 200_000_000  # bytes; runs pass files, not objects


@contextmanager
def cluster() -> Iterator[dict[str, float]]:
    """A connection to Ray; yields the cluster's resources. Says which cluster it is."""
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(**options)
    else:
        ray.init(address="local", object_store_memory=LOCAL_OBJECT_STORE, **options)
    resources = {name: float(amount) for name, amount in ray.cluster_resources().items()}
    where = f"joined the Ray cluster at {address}" if address else "started a Ray cluster on this machine"
    print(f"{where}: {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs", flush=True)
    try:
        yield resources
    finally:
        ray.shutdown()


def gpus_each(asked: float | None, resources: dict[str, float], who: str) -> float:
    """GPUs of each worker or trial: what is asked for, else 1 where the cluster has any.

    Said where a joined cluster has none: it may be about to grow.
    """
    if asked is not None:
        return asked
    if os.environ.get("RAY_ADDRESS") and not resources.get("GPU"):
        print(f"the cluster has no GPUs: {who} run on CPUs; launch.gpus=1 waits for GPUs", flush=True)
    return float(resources.get("GPU", 0) > 0)


def check_fits(resources: dict[str, float], cpus: float, gpus: float, keys: str) -> None:
    """InputError when a cluster of our own could never hold the request; a joined one may still grow."""
    if os.environ.get("RAY_ADDRESS"):
        return
    has_cpus, has_gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    if cpus > has_cpus or gpus > has_gpus:
        raise InputError(
            f"{keys}: {cpus:g} CPUs and {gpus:g} GPUs are asked for, this machine has {has_cpus:g} and {has_gpus:g}; "
            "ask for less, or set RAY_ADDRESS to a larger cluster"
        )
