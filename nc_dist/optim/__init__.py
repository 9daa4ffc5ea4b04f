"""Optimisers and learning-rate schedules as specs: one file each, one name in the union below."""

from typing import Annotated

from pydantic import Field

from nc_dist.optim.adamw import AdamW
from nc_dist.optim.groups import parameter_groups
from nc_dist.optim.lars import LARS
from nc_dist.optim.schedule import Schedule
from nc_dist.optim.sgd import SGD

OptimSpec = Annotated[SGD | AdamW | LARS, Field(discriminator="kind")]

__all__ = ["LARS", "SGD", "AdamW", "OptimSpec", "Schedule", "parameter_groups"]
