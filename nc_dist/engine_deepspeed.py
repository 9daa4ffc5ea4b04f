"""DeepSpeed behind the engine protocol: the only file that imports it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nc_dist.engine import DeepSpeedSpec, deepspeed_json, evaluating
from nc_dist.errors import InputError
from nc_dist.model import Model
from nc_dist.optim import OptimSpec, parameter_groups
from nc_dist.outputs import Outputs
from nc_dist.world import World

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import logger

TAG = "zero"


class DeepSpeedEngine:
    """ZeRO stage 0-3 with torch's optimisers."""

    def __init__(
        self,
        model: Model,
        spec: DeepSpeedSpec,
        optim: OptimSpec,
        batch: tuple[int, int],
        world: World,
        ema: float | None = None,
    ) -> None:
        logger.setLevel(logging.ERROR)  # its warnings are about settings that we chose
        _join_process_group(world)
        self.world = world
        self.input_dtype = torch.float32
        trained = [p for p in model.to(world.device).parameters() if p.requires_grad]
        optimizer = optim.build(parameter_groups(model, model.block_prefixes, optim))
        config = deepspeed_json(spec, *batch, world.size)
        self._norm: Tensor | None = None
        if spec.zero == 0:
            # DeepSpeed would clip here without telling the norm: we do it in its place, on the reduced gradients.
            config["gradient_clipping"] = 0.0
            optimizer.register_step_pre_hook(lambda *_: self._clip(trained, spec.clip))
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.module: Model = self._engine.module

    def forward(self, x: Tensor, last: bool = True) -> Outputs:
        return self._engine(x)  # type: ignore[no-any-return]

    def eval_forward(self, x: Tensor, gradients: bool = False) -> Outputs:
        with evaluating(self.module, gradients):
            return self._engine(x)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> bool:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._engine.step()
        return bool(self._engine.was_step_applied())

    def average(self) -> None:
        pass

    def _clip(self, trained: list[nn.Parameter], limit: float) -> None:
        self._norm = nn.utils.clip_grad_norm_(trained, limit or float("inf"))

    @property
    def grad_norm(self) -> float:
        norm = self._engine.get_global_grad_norm() if self._norm is None else self._norm
        return float(norm or 0.0)

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        self._engine.save_checkpoint(str(folder), tag=TAG, client_state=client_state, save_latest=False)

    def load(self, folder: Path) -> dict[str, Any]:
        shares = len(list((folder / TAG).glob("*optim_states.pt")))  # one file of each rank in ZeRO 1-3, none in 0
        if shares not in (0, self.world.size):
            raise InputError(
                f"{folder}: saved by {shares} processes with ZeRO, this is a run of {self.world.size}; go on with "
                f"{shares} (launch.workers={shares}), or begin anew with --fresh"
            )
        path, client_state = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise ValueError(f"{folder}: DeepSpeed could not load its checkpoint")
        return client_state  # type: ignore[no-any-return]

    @contextmanager
    def gathered(self) -> Iterator[Model]:
        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            yield self.module

    def averaged(self) -> AbstractContextManager[None]:
        raise NotImplementedError


def _join_process_group(world: World) -> None:
    """Let DeepSpeed adopt the process group; a world of one gets one of its own, or DeepSpeed would ask for MPI."""
    # The shared-memory op speeds up inference only, and takes a compiler and up to two minutes to build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
