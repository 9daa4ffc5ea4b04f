"""Plain torch behind the engine protocol: DDP when there are several ranks."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nc_dist.ema import Average
from nc_dist.engine import DTYPES, TorchSpec, evaluating
from nc_dist.model import Model
from nc_dist.optim import OptimSpec, parameter_groups
from nc_dist.outputs import Outputs
from nc_dist.world import World


class TorchEngine:
    """Plain torch. In `bf16` the forward runs under autocast, weights stay fp32."""

    def __init__(self, model: Model, spec: TorchSpec, optim: OptimSpec, world: World, ema: float | None = None) -> None:
        self.spec, self.world = spec, world
        self.input_dtype = DTYPES.get(spec.precision, torch.float32)
        self.module = model.to(world.device, self.input_dtype)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optim.build(parameter_groups(model, model.block_prefixes, optim))
        floating = [t for t in model.state_dict().values() if t.is_floating_point()]
        self._ema = Average(floating, ema) if ema is not None else None
        self._call: nn.Module = self.module
        if world.size > 1:
            # Buffers are merged by the loop, by a rule that does not know the world size.
            self._call = DistributedDataParallel(self.module, broadcast_buffers=False)
        self.grad_norm = 0.0

    def forward(self, x: Tensor, last: bool = True) -> Outputs:
        if isinstance(self._call, DistributedDataParallel):
            self._call.require_backward_grad_sync = last
        with self._autocast():
            return self._call(x)  # type: ignore[no-any-return]

    def eval_forward(self, x: Tensor, gradients: bool = False) -> Outputs:
        with evaluating(self.module, gradients), self._autocast():
            return self.module(x)  # type: ignore[no-any-return]

    def _autocast(self) -> AbstractContextManager[Any]:
        bf16 = self.spec.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16) if bf16 else nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> bool:
        limit = self.spec.clip or float("inf")
        self.grad_norm = float(nn.utils.clip_grad_norm_(self.trained, limit))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        applied = math.isfinite(self.grad_norm)
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return applied

    def average(self) -> None:
        if self._ema:
            self._ema.update()

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        if self.world.rank == 0:
            state = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
            if self._ema:
                state["ema"] = {"kept": self._ema.kept, "steps": self._ema.steps}
            torch.save({**state, "client": client_state}, folder / "torch.pt")

    def load(self, folder: Path) -> dict[str, Any]:
        state = torch.load(folder / "torch.pt", map_location=self.world.device, weights_only=True)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._ema:
            self._ema.restore(**state["ema"])
        return state["client"]  # type: ignore[no-any-return]

    def gathered(self) -> AbstractContextManager[Model]:
        return nullcontext(self.module)

    def averaged(self) -> AbstractContextManager[None]:
        assert self._ema is not None
        return self._ema.swapped()
