"""DeepSpeed behind the engine protocol: the only file that imports it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nc_dist.engine import HALF, DeepSpeedSpec, deepspeed_json, evaluating, zero_state
from nc_dist.engine.ema import Average
from nc_dist.engine.loss_scale import LossScale
from nc_dist.engine.zero_shards import read_shards, save_shard
from nc_dist.errors import EXPORT_REMEDY, InputError
from nc_dist.model import Model
from nc_dist.optim import OptimSpec, parameter_groups
from nc_dist.outputs import Outputs
from nc_dist.world import World

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import logger

COMMON = "engine.pt"  # of all processes: what is not cut in parts, written by rank 0
SHARD = "zero_rank{}.pt"  # each process's own


class DeepSpeedEngine:
    """ZeRO stage 0-3 with torch's optimisers.

    In `bf16` and `fp16` the forward runs under autocast; weights, gradients and what is communicated are fp32, as in
    the torch engine. In `fp16` losses are scaled, by a scale that halves where gradients overflow.
    """

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
        self.spec, self.world, self.input_dtype = spec, world, torch.float32
        self._layout = torch.channels_last if spec.channels_last else torch.contiguous_format
        model.to(world.device)
        model.recompute = spec.recompute
        if half := HALF.get(spec.precision):
            # Inside the model: DeepSpeed's engine switches an outer autocast off.
            model.forward = torch.autocast(world.device.type, half, cache_enabled=False)(model.forward)  # type: ignore[method-assign]
        if spec.compile:
            model.compile()
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._frozen = [p for p in model.parameters() if not p.requires_grad]
        # With offload torch's own loops over main memory, as fast as DeepSpeed's op, which would have to be built.
        fused = world.device.type == "cuda" or spec.offload_optimizer
        optimizer = optim.build(parameter_groups(model, model.block_prefixes, optim), fused)
        count = sum(p.numel() for p in self._trained.values())
        config = deepspeed_json(spec, *batch, world.size, count, world.device.type == "cuda")
        self._norm, self._scale = 0.0, LossScale(spec.precision == "fp16")
        if spec.zero == 0:
            # DeepSpeed would clip here without telling the norm: we do it in its place, on the reduced gradients.
            config["gradient_clipping"] = 0.0
            optimizer.register_step_pre_hook(lambda *_: self._before_step())
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        if spec.zero == 0:  # other stages keep weights in flat tensors, which have no layout
            model.to(memory_format=self._layout)  # type: ignore[call-overload]
        self.module = model
        # Averaged are the weights that the optimiser has, cut as they are, and what every process has whole.
        self._cut = zero_state.masters(self._zero) if spec.zero else []
        whole = model.buffers() if spec.zero else model.state_dict().values()
        averaged = [*self._cut, *(tensor for tensor in whole if tensor.is_floating_point())]
        self._ema = Average(averaged, ema) if ema is not None else None

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimiser, which is torch's own in stage 0."""
        return self._engine.optimizer

    def forward(self, x: Tensor, last: bool = True) -> Outputs:
        return self._engine(x.contiguous(memory_format=self._layout))  # type: ignore[no-any-return]

    def eval_forward(self, x: Tensor, gradients: bool = False) -> Outputs:
        # Not through DeepSpeed's engine, which would take a backward to the input for one of the training. Its hooks,
        # which fetch the weights of stage 3, lie on the module itself.
        with evaluating(self.module, gradients):
            return self.module(x.contiguous(memory_format=self._layout))  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        if self.spec.zero and self._scale.used:
            self._zero.override_loss_scale(self._scale.value)
        elif self._scale.used:
            loss = loss * self._scale.value
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> bool:
        for group in self._zero.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._engine.step()
        if self.spec.zero:
            self._norm = float(self._engine.get_global_grad_norm())
        applied = math.isfinite(self._norm)
        self._scale.update(applied)
        return applied

    def _before_step(self) -> None:
        """Of ZeRO 0, with the reduced gradients: scale back and clip; without them the optimiser does nothing."""
        trained = [p for p in self._trained.values() if p.grad is not None]
        if self._scale.used:
            torch._foreach_div_([p.grad for p in trained if p.grad is not None], self._scale.value)
        self._norm = float(nn.utils.clip_grad_norm_(trained, self.spec.clip or math.inf))
        if not math.isfinite(self._norm):
            for parameter in trained:
                parameter.grad = None

    def average(self) -> None:
        if self._ema:
            self._ema.update()

    @property
    def grad_norm(self) -> float:
        return self._norm

    def save(self, folder: Path, client_state: dict[str, Any]) -> list[Path]:
        kept, cut = (self._ema.kept if self._ema else []), len(self._cut)
        written = []
        with self._gathered(self._frozen):
            state = {
                "zero": self.spec.zero,
                "client": client_state,
                "scale": self._scale.state(),
                "model": self._whole(),
            }
            if self._ema:
                state["ema"] = {"kept": kept[cut:], "steps": self._ema.steps}
            if self.spec.zero == 0:
                state["optimizer"] = self._zero.state_dict()
            if self.world.rank == 0:
                torch.save(state, folder / COMMON)
                written.append(folder / COMMON)
        if self.spec.zero:
            written.append(folder / SHARD.format(self.world.rank))
            save_shard(zero_state.shard(self._zero, self.world.rank, kept[:cut]), written[-1])
        return written

    def load(self, folder: Path) -> dict[str, Any]:
        state = self._common(folder)
        with self._gathered(self._frozen, changed=True):
            for name, own in self._whole().items():
                own.copy_(state["model"][name])
        averages: list[Tensor] | None = []
        if self.spec.zero:
            shards = read_shards(sorted(folder.glob(SHARD.format("*"))))
            if len(shards) != self.world.size and self.world.rank == 0:
                print(f"{folder}: of {len(shards)} processes, cut anew for {self.world.size}", flush=True)
            averages = zero_state.restore(self._zero, self.world.rank, shards)
        else:
            self._zero.load_state_dict(state["optimizer"])
        if self._ema and "ema" in state and averages is not None:
            self._ema.restore([*averages, *state["ema"]["kept"]], state["ema"]["steps"])
        elif self._ema:
            self._ema.restore()
        self._scale.restore(**state["scale"])
        return state["client"]  # type: ignore[no-any-return]

    def _common(self, folder: Path) -> dict[str, Any]:
        """What rank 0 saved; InputError where that was another engine or stage."""
        others = f"or begin anew. {EXPORT_REMEDY.format(folder)}"
        if not (folder / COMMON).is_file():
            raise InputError(f"engine.kind='deepspeed': {folder} is not. Go on with engine.kind=torch, {others}")
        state: dict[str, Any] = torch.load(folder / COMMON, map_location="cpu", weights_only=True)
        if state["zero"] != self.spec.zero:
            raise InputError(
                f"engine.zero={self.spec.zero}: {folder} is of ZeRO stage {state['zero']}, and a run keeps its stage. "
                f"Go on with engine.zero={state['zero']}, {others}"
            )
        return state

    def _whole(self) -> dict[str, Tensor]:
        """What of the model's state every process has whole: in ZeRO 1-3 all but the trained parameters."""
        cut = self._trained if self.spec.zero else {}
        return {name: value for name, value in self.module.state_dict().items() if name not in cut}

    def _gathered(self, parameters: list[nn.Parameter], changed: bool = False) -> AbstractContextManager[Any]:
        """Parameters of stage 3 in one piece; what is `changed` in them stays."""
        if self.spec.zero == 3:  # what an eval forward fetched ahead for a backward that never came
            self._zero.parameter_offload.get_param_coordinator()._clean_inflight_param_registry()
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if changed else None)  # type: ignore[no-any-return]

    @contextmanager
    def gathered(self, part: nn.Module | None = None) -> Iterator[Model]:
        with self._gathered(list((part or self.module).parameters())):
            yield self.module

    @contextmanager
    def averaged(self) -> Iterator[None]:
        assert self._ema is not None
        try:
            with self._ema.swapped():
                self._publish()
                yield
        finally:
            self._publish()

    def _publish(self) -> None:
        """The model has the weights that the optimiser has."""
        if self.spec.zero:
            zero_state.publish(self._zero)


def _join_process_group(world: World) -> None:
    """Let DeepSpeed adopt the process group; a world of one gets one of its own, or DeepSpeed would ask for MPI."""
    # The shared-memory op speeds up inference only, and takes a compiler and up to two minutes to build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
