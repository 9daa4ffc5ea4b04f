"""How images are read: the keys that all journeys share. None of them chooses which samples are read."""

from __future__ import annotations

from typing import Self

from pydantic import Field

from nc_dist.data.pixels import Decoder
from nc_dist.spec import Spec


class Reading(Spec):
    """What it takes to read a set's images; only `decoder` changes their pixels."""

    workers: int = Field(0, ge=0)  # loader processes of each rank
    decoder: Decoder | None = None  # null: the model's own, else torchvision; fast: simplejpeg and OpenCV, extra `fast`
    bad_samples: int = Field(0, ge=0)  # damaged samples that are tolerated, replaced and listed in bad_samples.jsonl
    shard_cache_gb: float | None = Field(None, gt=0)  # of remote shards on each machine's disk; null: no limit
    download: bool = True  # sets of the catalogue that are missing here; false: they must be there
    log_samples: bool = False  # write the keys of every step to samples/rank_R.jsonl

    def decided(self, of_model: Decoder | None = None) -> Self:
        """The same with a decoder: its own, else that of the model, else torchvision."""
        return self.model_copy(update={"decoder": self.decoder or of_model or "torchvision"})
