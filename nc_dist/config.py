"""The four runs that a YAML file can describe: composed specs, nothing else.

Every key of a run is here or in the spec that the key names; a run file is complete, at most 60 lines.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from nc_dist.adversary import AdversarySpec, NoAdversary
from nc_dist.data.augment import AugmentSpec, CropFlip, InputChange, InputSpec, NoAugment
from nc_dist.data.mix import MixSpec, NoMix
from nc_dist.data.reading import Reading
from nc_dist.engine import DeepSpeedSpec, EngineSpec, TorchSpec
from nc_dist.losses import LossSpec, RegulariserSpec
from nc_dist.methods import MethodSpec
from nc_dist.model import ModelSpec
from nc_dist.optim import SGD, OptimSpec, Schedule
from nc_dist.spec import Spec

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Workers(Spec):
    """Bounds of an elastic group."""

    min: int = Field(1, ge=1)
    max: int = Field(ge=1)
    look_s: float = Field(600, gt=0)  # between looks at whether the cluster has room for more


class Launch(Spec):
    """How a run is placed on Ray; it never changes what the run computes."""

    workers: Annotated[int, Field(ge=1)] | Workers = 1  # {min, max}: as many as there are, changing with them
    cpus: float = Field(1, gt=0)  # per worker
    gpus: float | None = Field(None, ge=0)  # per worker; null: 1 where the cluster has GPUs
    retries: int = Field(2, ge=0)  # of the whole worker group, without a newer checkpoint in between
    # What takes longer is a hang, which is told and ends the run: each phase of a step; four times that between steps;
    # nothing before the first step.
    hang_s: float = Field(1800, gt=0)


class BatchSpec(Spec):
    """A step: `global` images, in micro-batches of `micro` that belong together whatever the world size."""

    global_: int = Field(128, ge=1, alias="global")
    micro: int = Field(64, ge=1)


class SourceData(Reading):
    """What a source model is trained on: each set is a folder of shards, an ImageFolder or a catalogued name."""

    train: str
    test: str | None = None  # reported at the end, never used to choose
    holdout_per_class: int = Field(20, ge=0)  # cut from train, seeded: held-out NC, and what the link `best` goes by
    augment: AugmentSpec = CropFlip()
    mix: MixSpec = NoMix()
    lanes: int | None = Field(None, ge=1)  # null: as many as fit, see data/order.py
    window: int = Field(4, ge=1)  # shards that are shuffled together


class TargetData(Reading):
    """A downstream set; `shots` is the label budget per class, null for all."""

    train: str
    name: str | None = None  # in tables; null: the catalogued name, or that of the folder, splits left out
    test: str | None = None  # null: the same name's test split
    shots: int | None = Field(None, ge=2)
    subset_seed: Seed = 0  # apart from the run's seed and shared by all methods
    augment: AugmentSpec = NoAugment()
    metric: Literal["top1", "mean_per_class"] | None = None  # null: the one that the catalogued set is judged by


class ProbeSpec(Spec):
    """The fixed, seeded subset that NC is measured on; `per_class` null takes every sample."""

    per_class: int | None = Field(50, ge=1)
    batch: int = Field(256, ge=1)
    source_per_class: int | None = Field(200, ge=1)  # of train, for the source accuracy's linear probe; null: all


class ProfileSpec(Spec):
    """Which steps torch's profiler records, one trace a rank."""

    steps: str | None = Field(None, pattern=r"^\d+:\d+$")  # first:last+1, as in 10:20


class PretrainRun(Spec):
    """One source model."""

    out: str
    seed: Seed = 0
    data: SourceData
    input: InputSpec = InputSpec()
    model: ModelSpec
    loss: LossSpec
    regularisers: tuple[RegulariserSpec, ...] = ()
    adversary: AdversarySpec = NoAdversary()
    optim: OptimSpec = SGD()
    schedule: Schedule = Schedule()
    ema: float | None = Field(None, gt=0, lt=1)  # decay of averaged weights, which are measured and exported besides
    engine: EngineSpec = DeepSpeedSpec()
    batch: BatchSpec = BatchSpec()
    batch_norm: Literal["micro", "sync"] = "micro"  # statistics of each micro-batch, or of all processes' (CUDA)
    epochs: float = Field(gt=0)
    resume: str | None = None  # a checkpoint of another run of this model and data, to go on from
    probe: ProbeSpec = ProbeSpec()
    measure_every: int | None = Field(None, ge=1)  # steps; null: a twelfth of the run
    save_every: int | None = Field(None, ge=1)  # steps; null: an epoch, at most every other measure
    keep: int | None = Field(2, ge=1)  # newest checkpoints, the best one besides; null: all
    keep_epochs: tuple[float, ...] = ()  # whose checkpoints stay too: saved at the end of these epochs
    upload: str | None = None  # a URL that checkpoints are copied to while training goes on, such as s3://bucket/run
    max_skipped: int = Field(10, ge=0)  # steps whose loss or gradients are not finite, before the run gives up
    profile: ProfileSpec = ProfileSpec()
    log_every: int = Field(20, ge=1)  # steps
    variant: str | None = None  # in tables; null: the last part of out. Seeds of one variant are averaged
    launch: Launch = Launch()


class FinetuneRun(Spec):
    """One trial: a source model, a downstream set, a method."""

    out: str
    seed: Seed = 0
    source: str  # a finished pre-training run, or an exported model
    data: TargetData
    method: MethodSpec
    optim: OptimSpec = SGD(lr=0.01)
    schedule: Schedule = Schedule()
    engine: EngineSpec = TorchSpec()
    batch: BatchSpec = BatchSpec(global_=64, micro=64)
    epochs: float = Field(20, gt=0)
    probe: ProbeSpec = ProbeSpec()
    save_every: int | None = Field(None, ge=1)  # steps; null: a sixth of the run
    log_every: int = Field(50, ge=1)
    launch: Launch = Launch()


class MeasureRun(Reading):
    """NC of a model, or of all checkpoints of a run, on a data set."""

    out: str
    seed: Seed = 0
    model: str  # a run, an export, a glob of checkpoints, torchvision:NAME/WEIGHTS or timm:NAME
    weights: str | None = None  # a file with a state dict that is put into it: .safetensors or .pth
    input: InputChange = InputChange()  # what differs from the model's own
    data: str
    split: Literal["train", "test"] = "train"  # of a catalogued set that names none
    per_class: int | None = Field(None, ge=1)  # null: every sample
    batch: int = Field(256, ge=1)
    blocks: list[str] | Literal["all"] = "all"  # besides the features before and after the head
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # of the forward
    reference: str | None = None  # a moments file: NC1 about its class means as well (held-out about train)
    rank_per_class: int = Field(50, ge=0)  # samples a class behind the numerical rank, at most; 0: leave it out
    cache_gb: float = Field(4, ge=0)  # of features a rank may keep for the second pass; else a second forward
    launch: Launch = Launch()


class TrialPlacement(Spec):
    """What one trial takes of the cluster, and how many may run at a time (null: as many as fit)."""

    cpus: float = Field(1, gt=0)
    gpus: float | None = Field(None, ge=0)  # null: 1 where the cluster has GPUs
    concurrent: int | None = Field(None, ge=1)
    retries: int = Field(1, ge=0)


class SweepRun(Spec):
    """Many trials: every combination of the grid's values, put over the base (a fine-tuning run without `out`)."""

    out: str
    base: dict[str, Any]
    grid: dict[str, list[Any]]
    launch: TrialPlacement = TrialPlacement()
