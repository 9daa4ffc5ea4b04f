"""Checkpoints: saved by all ranks in two phases, verified by hash, kept by rule, copied to a URL, gone on from."""

from nc_dist.checkpoint.beginning import CHECKPOINTS as CHECKPOINTS
from nc_dist.checkpoint.beginning import beginning as beginning
from nc_dist.checkpoint.beginning import own_newest as own_newest
from nc_dist.checkpoint.beginning import retention_of as retention_of
from nc_dist.checkpoint.beginning import state_of as state_of
from nc_dist.checkpoint.manifest import MANIFEST as MANIFEST
from nc_dist.checkpoint.manifest import latest as latest
from nc_dist.checkpoint.manifest import step_of as step_of
from nc_dist.checkpoint.manifest import verify as verify
from nc_dist.checkpoint.retention import Retention as Retention
from nc_dist.checkpoint.saving import SaveFailed as SaveFailed
from nc_dist.checkpoint.saving import save as save
from nc_dist.checkpoint.together import on_first as on_first
from nc_dist.checkpoint.upload import Uploads as Uploads
