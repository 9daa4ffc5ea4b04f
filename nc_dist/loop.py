"""THE training loop: a generator that yields after each optimiser step. The caller's `for` body is the policy.

Letters: B samples of a micro-batch, V views, M micro-batches of a step over all ranks, W ranks, T terms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from nc_dist.batch_norm import RunningStatistics
from nc_dist.data.augment import normalise
from nc_dist.data.damage import Fault
from nc_dist.data.mix import Mixture
from nc_dist.data.stream import Batch
from nc_dist.engine import Engine
from nc_dist.identity import hash_text
from nc_dist.objective import Objective, view_major
from nc_dist.outputs import Outputs
from nc_dist.world import World

At = Callable[[int, str], object]  # told of the step and phase that begins
NOT_WATCHED: At = lambda step, phase: None  # noqa: E731


@dataclass
class Step:
    """What is known after an optimiser step; `number` counts from 1 over the whole run."""

    number: int
    lr: float
    grad_norm: float
    seconds: float
    data_seconds: float
    applied: bool  # False: loss or gradients were not finite, and nothing moved
    stop_requested: bool  # whether any rank was asked to stop; the same on all of them, as is the next one
    met_damage: bool  # whether any rank met a damaged sample
    batches: list[Batch]  # this rank's micro-batches
    terms: list[str]  # of the objective
    totals: Tensor  # sums over ranks, still on the device: loss, hits, labelled views, then each term, (3 + T,)

    def metrics(self) -> dict[str, float]:
        """Loss and accuracy over the global batch; the first reading waits for the device."""
        loss, hits, labelled, *parts = self._read
        accuracy = {"train/acc1": hits / labelled} if labelled else {}
        terms = {f"train/{name}": part for name, part in zip(self.terms, parts, strict=True)} if parts[1:] else {}
        return {"train/loss": loss, **accuracy, **terms, "train/lr": self.lr, "train/grad_norm": self.grad_norm}

    def faults(self) -> list[Fault]:
        """The damaged samples that this rank met."""
        return [fault for batch in self.batches for fault in batch.faults]

    @cached_property
    def _read(self) -> list[float]:
        return self.totals.tolist()


def every(interval: int, step: int) -> bool:
    """True at every `interval`-th step: depends on the step alone, so all ranks enter what follows together."""
    return step % interval == 0


def train_steps(
    engine: Engine,
    data: Iterable[list[Batch]],
    objective: Objective,
    world: World,
    start: int = 0,
    stop: Callable[[], bool] = lambda: False,
    train_mode: Callable[[nn.Module], object] = nn.Module.train,
    at: At = NOT_WATCHED,
) -> Iterator[Step]:
    """Train on `data`, this rank's micro-batches of steps start, start+1, ..; yields after each step.

    A step's gradient is that of the mean loss over the global batch, at any world size. Running BatchNorm statistics
    get one update a step. Random layers, mixtures and attacks draw from a seed of (seed, step, micro-batch). Where the
    loss or a gradient is not finite on any rank, weights, optimiser and running statistics stay as they were.
    """
    batches, running = iter(data), None
    for number in range(start, objective.steps):
        began = time.perf_counter()
        at(number + 1, "reading")
        micros = next(batches)
        data_seconds = time.perf_counter() - began
        at(number + 1, "gradients")
        train_mode(engine.module)
        running = running or RunningStatistics(engine.module)
        running.begin()
        totals = _step_gradients(engine, micros, objective, world, number, running)
        at(number + 1, "update")
        lr = objective.schedule.lr(objective.peak_lr, number, objective.steps)
        applied = engine.step(lr)  # the only wait for the device in a step
        told = torch.tensor([float(stop()), float(sum(len(batch.faults) for batch in micros))])
        stops, damaged = world.sum_(told).tolist()  # on the CPU, while the device works
        everything, logged = world.sum_(torch.cat([totals, running.totals()])), len(totals)
        running.merge(everything[logged:] / objective.micro_per_step, applied)
        if applied:
            engine.average()
        at(number + 1, "between steps")
        yield Step(
            number=number + 1,
            lr=lr,
            grad_norm=engine.grad_norm,
            seconds=time.perf_counter() - began,
            data_seconds=data_seconds,
            applied=applied,
            stop_requested=stops > 0,
            met_damage=damaged > 0,
            batches=micros,
            terms=objective.names,
            totals=everything[:logged],
        )


@dataclass(frozen=True)
class Input:
    """A micro-batch as the network takes it."""

    mixture: Mixture
    labels: Tensor  # (V*B,)
    key: int  # of all that is random about it

    def targets(self, outputs: Outputs) -> Tensor:
        """What the loss compares the outputs with: labels (V*B,), or (B, K) where images were mixed."""
        return self.mixture.targets(self.labels, outputs.logits_BK)


def _inputs(
    engine: Engine, micros: list[Batch], objective: Objective, world: World, number: int
) -> Callable[[int], Input]:
    """What makes this rank's j-th micro-batch an input: normalised, mixed, attacked.

    One at a time, as they are large; but attacks see the running statistics of the step before, so all come first.
    """
    first = world.rank * len(micros)

    def made(j: int) -> Input:
        batch, key = micros[j], int(hash_text(f"{objective.seed}/{number}/{first + j}"), 16)
        images = normalise(batch.images, objective.input, engine.input_dtype)
        mixture = objective.mix.mixed(images, np.random.default_rng(key))
        return _attacked(engine, Input(mixture, batch.labels.repeat(objective.loss.views), key), objective)

    return made if objective.adversary.kind == "none" else list(map(made, range(len(micros)))).__getitem__


def _attacked(engine: Engine, input: Input, objective: Objective) -> Input:
    """With images at which this micro-batch's loss, regularisers left out, is larger: of the model in eval mode."""
    images = input.mixture.images

    def loss_of(moved: Tensor) -> Tensor:
        outputs = engine.eval_forward(moved, gradients=True).widened()
        return objective.loss(outputs, input.targets(outputs))

    random = torch.Generator(images.device).manual_seed(input.key % 2**63)
    moved = objective.adversary.attacked(images, objective.input, loss_of, random)
    return Input(input.mixture._replace(images=moved), input.labels, input.key)


def _step_gradients(
    engine: Engine, micros: list[Batch], objective: Objective, world: World, number: int, running: RunningStatistics
) -> Tensor:
    """Backward of all micro-batches; this rank's share of (loss, hits, labelled views, each term), (3 + T,) fp64."""
    input_of = _inputs(engine, micros, objective, world, number)

    def forward(j: int) -> tuple[Outputs, Tensor]:
        input = input_of(j)
        torch.manual_seed(input.key % 2**63)
        outputs = engine.forward(input.mixture.images, last=j == len(micros) - 1).widened()
        return outputs, input.targets(outputs)

    totals = torch.zeros(3 + len(objective.names), dtype=torch.float64, device=world.device)
    # Where the global batch spans micro-batches of one rank, all outputs are needed before any backward.
    cached = objective.coupled and len(micros) > 1
    gradients = _coupled_gradients(forward, len(micros), objective, world, totals) if cached else None
    for j in range(len(micros)):
        outputs, targets = forward(j)
        running.collect()
        value, parts = objective.value(outputs, targets, coupled=False)
        _add(totals, value, parts, 1 / objective.micro_per_step)
        value = value * (world.size / objective.micro_per_step)
        if gradients is not None:
            value = value + sum((o * g).sum() for o, g in zip(_shared(outputs), gradients[j], strict=True))
        elif objective.coupled:
            whole, parts = objective.value(*_gathered(_shared(outputs), targets, 1, objective, world), coupled=True)
            _add(totals, whole, parts, 1 / world.size)
            value = value + whole
        engine.backward(value * _one_or_nan(value))
        if outputs.logits_BK is not None:
            totals[1] += _hits(outputs.logits.detach(), targets)
            totals[2] += len(targets)
    return totals


def _add(totals: Tensor, value: Tensor, parts: Tensor, share: float) -> None:
    totals[0] += value.detach() * share
    totals[3:] += parts * share


def _one_or_nan(value: Tensor) -> Tensor:
    """A factor by which the gradients of a loss that is not finite are not finite either, so that no rank steps."""
    return torch.where(value.detach().isfinite(), 1.0, torch.nan).to(value.dtype)


def _hits(logits_BK: Tensor, targets: Tensor) -> Tensor:
    """How many samples the classifier gets right, as fp64; of a mixed sample, the share of the class it says."""
    said_B = logits_BK.argmax(1)
    if targets.ndim == 2:
        return targets.gather(1, said_B[:, None]).sum(dtype=torch.float64)
    return (said_B == targets).sum(dtype=torch.float64)


def _shared(outputs: Outputs) -> list[Tensor]:
    """What coupled terms may see of the outputs: features and embedding, once where they are the same."""
    same = outputs.features_Bd is outputs.embedding_BE
    return [outputs.features_Bd] if same else [outputs.features_Bd, outputs.embedding_BE]


def _gathered(
    shared: list[Tensor], targets: Tensor, micros: int, objective: Objective, world: World
) -> tuple[Outputs, Tensor]:
    """Outputs and targets of the global batch, view-major, of this rank's `micros` micro-batches one after another."""
    rows = [view_major(world.gather(part), world.size * micros, objective.loss.views) for part in (*shared, targets)]
    return Outputs(rows[0], rows[-2], None), rows[-1]


def _coupled_gradients(
    forward: Callable[[int], tuple[Outputs, Tensor]], micros: int, objective: Objective, world: World, totals: Tensor
) -> list[list[Tensor]]:
    """Gradients of the coupled terms with respect to what each local micro-batch shares (cached embeddings).

    A first forward without gradients gives the outputs; the second one, with the same random numbers, carries these
    gradients on into the weights (Gao et al. 2021, arXiv 2101.06983).
    """
    with torch.no_grad():
        seen = [forward(j) for j in range(micros)]
    targets = torch.cat([targets for _, targets in seen])
    shared = zip(*(_shared(outputs) for outputs, _ in seen), strict=True)
    leaves = [torch.cat(parts).requires_grad_() for parts in shared]
    whole = _gathered(leaves, targets, micros, objective, world)
    value, parts = objective.value(*whole, coupled=True)
    gradients = torch.autograd.grad(value * _one_or_nan(value), leaves, allow_unused=True, materialize_grads=True)
    _add(totals, value, parts, 1 / world.size)
    return [list(each) for each in zip(*(gradient.chunk(micros) for gradient in gradients), strict=True)]
