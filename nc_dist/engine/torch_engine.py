"""Plain torch behind the engine protocol: DDP when there are several ranks."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from nc_dist.engine import DTYPES, HALF, TorchSpec, evaluating
from nc_dist.engine.ema import Average
from nc_dist.errors import InputError
from nc_dist.model import Model
from nc_dist.optim import OptimSpec, parameter_groups
from nc_dist.outputs import Outputs
from nc_dist.world import World


class TorchEngine:
    """Plain torch. In `bf16` and `fp16` the forward runs under autocast, weights stay fp32; in `fp16` losses are
    scaled, so that small gradients do not vanish, and a step whose gradients overflow is not taken (Micikevicius et
    al. 2018, arXiv 1710.03740).
    """

    def __init__(self, model: Model, spec: TorchSpec, optim: OptimSpec, world: World, ema: float | None = None) -> None:
        self.spec, self.world = spec, world
        self.input_dtype = DTYPES.get(spec.precision, torch.float32)
        self._layout = torch.channels_last if spec.channels_last else torch.contiguous_format
        self.module = model.to(world.device, self.input_dtype)
        self.module.to(memory_format=self._layout)  # type: ignore[call-overload]
        model.recompute = spec.recompute
        if spec.compile:
            model.compile()  # in place: names stay as they are
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optim.build(
            parameter_groups(model, model.block_prefixes, optim), fused=world.device.type == "cuda"
        )
        self.scaler = GradScaler(world.device.type, enabled=spec.precision == "fp16")
        floating = [t for t in model.state_dict().values() if t.is_floating_point()]
        self._ema = Average(floating, ema) if ema is not None else None
        self._call: nn.Module = self.module
        if world.size > 1:
            # Buffers are merged by the loop, by a rule that does not know the world size.
            self._call = DistributedDataParallel(self.module, broadcast_buffers=False, gradient_as_bucket_view=True)
        self._settled = False
        self.grad_norm = 0.0

    def forward(self, x: Tensor, last: bool = True) -> Outputs:
        x = x.contiguous(memory_format=self._layout)
        if isinstance(self._call, DistributedDataParallel):
            if not self._settled:
                self._settle(x)
            self._call.require_backward_grad_sync = last
        with self._autocast():
            return self._call(x)  # type: ignore[no-any-return]

    def _settle(self, x: Tensor) -> None:
        """A backward that is thrown away, before the first one. After it DDP lays out its buckets for good.

        With the layout the order of sums over ranks changes: a resumed run, whose second step is another than that of
        the run that was not stopped, would differ from it in the last bits.
        """
        with evaluating(self.module, gradients=True), self._autocast():
            outputs: Outputs = self._call(x)
            total = torch.stack([part.sum() for part in outputs if part is not None]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        unused = [name for name, p in self.module.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise InputError(
                f"model.backbone: {len(unused)} of its parameters have no part in the outputs, and the processes would "
                f"wait for their gradients: {', '.join(unused[:5])}; freeze them (requires_grad=False)"
            )
        self.optimizer.zero_grad()
        self._settled = True

    def eval_forward(self, x: Tensor, gradients: bool = False) -> Outputs:
        with evaluating(self.module, gradients), self._autocast():
            return self.module(x.contiguous(memory_format=self._layout))  # type: ignore[no-any-return]

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = HALF.get(self.spec.precision)
        return torch.autocast(self.world.device.type, dtype, cache_enabled=False) if dtype else nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> bool:
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        if self.spec.clip:
            nn.utils.clip_grads_with_norm_(self.trained, self.spec.clip, norm)
        self.grad_norm = float(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        applied = math.isfinite(self.grad_norm)
        if applied:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return applied

    def average(self) -> None:
        if self._ema:
            self._ema.update()

    def save(self, folder: Path, client_state: dict[str, Any]) -> list[Path]:
        if self.world.rank != 0:
            return []
        state = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"scaler": self.scaler.state_dict(), "client": client_state}
        if self._ema:
            state["ema"] = self._ema.state()
        torch.save(state, folder / "torch.pt")
        return [folder / "torch.pt"]

    def load(self, folder: Path) -> dict[str, Any]:
        # On the CPU: an optimiser leaves step counts where they are, and would wait for those on a GPU at each update.
        state = torch.load(folder / "torch.pt", map_location="cpu", weights_only=True)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self._ema:
            self._ema.restore(**state.get("ema", {}))
        return state["client"]  # type: ignore[no-any-return]

    def gathered(self, part: nn.Module | None = None) -> AbstractContextManager[Model]:
        return nullcontext(self.module)

    def averaged(self) -> AbstractContextManager[None]:
        assert self._ema is not None
        return self._ema.swapped()
