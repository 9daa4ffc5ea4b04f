"""Checkpoints: saved by all ranks in two phases, verified by hash, kept by rule, copied to a URL, gone on from."""

from nc_dist.checkpoint.manifest import MANIFEST, latest, step_of, verify
from nc_dist.checkpoint.resume import CHECKPOINTS, own_newest, remove_brought, resume_from, retention_of, state_of
from nc_dist.checkpoint.retention import Retention
from nc_dist.checkpoint.saving import SaveFailed, save
from nc_dist.checkpoint.shared_faults import on_first
from nc_dist.checkpoint.upload import Uploads

__all__ = [
    "CHECKPOINTS",
    "MANIFEST",
    "Retention",
    "SaveFailed",
    "Uploads",
    "latest",
    "on_first",
    "own_newest",
    "remove_brought",
    "resume_from",
    "retention_of",
    "save",
    "state_of",
    "step_of",
    "verify",
]
