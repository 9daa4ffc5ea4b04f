"""All that can be wrong with a pre-training run, found before it starts, and its plan. For the launchers."""

from __future__ import annotations

from typing import Any

import numpy as np

from nc_dist.config import PretrainRun
from nc_dist.data.catalog import open_source
from nc_dist.data.checks import check_samples
from nc_dist.data.mix import check_mix
from nc_dist.data.order import check_world
from nc_dist.engine import DeepSpeedSpec, deepspeed_json
from nc_dist.errors import InputError
from nc_dist.model import check_input
from nc_dist.plan import notes, training_plan
from nc_dist.source_set import open_source_set, shards_to_read


def check(run: PretrainRun, world_size: int) -> dict[str, Any]:
    """The plan of the run; InputError for all that can be wrong with its data, model and world size."""
    for term in (run.loss, *run.regularisers):
        check_mix(run.data.mix, term)
    data = open_source_set(run)
    check_world(data.order.micro_per_step, world_size)
    parameters = check_input(run.model, run.input)
    if run.data.test:
        test = open_source(run.data.test, "test", run.data)
        if test.class_names != data.source.class_names:
            raise InputError(f"data.test={run.data.test!r}: its classes are not those of data.train={run.data.train!r}")
        if test.identity() == data.identity:
            raise InputError(f"data.test={run.data.test!r}: the very samples of data.train; name another split")
        check_samples(test, range(len(test.labels)), run.data.bad_samples)
    seen = check_samples(data.source, np.concatenate([data.train, data.heldout]), run.data.bad_samples)
    plan = training_plan(
        samples=len(data.train),
        heldout=len(data.heldout),
        global_batch=run.batch.global_,
        micro=run.batch.micro,
        lanes=data.order.lanes,
        steps=data.steps,
        world=world_size,
    )
    plan["parameters without classifier"] = parameters
    plan["images read and decoded as a check"] = seen
    plan |= {**shards_to_read(data, world_size), **notes({"train": data.about})}
    if isinstance(run.engine, DeepSpeedSpec):
        plan["DeepSpeed"] = deepspeed_json(run.engine, run.batch.global_, run.batch.micro, world_size)
    return plan
