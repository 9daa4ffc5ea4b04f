"""Bytes that a process sends in a step, by ZeRO stage. Pure arithmetic, no torch.

A, accumulated micro-batches of a process; W processes; n bytes of a tensor that all processes hold together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from nc_dist.plan.memory import Stage, ZeroSettings, partition

Collective = Literal["all_reduce", "all_gather", "reduce_scatter"]


def ring_bytes(collective: Collective, size: int, world: int) -> float:
    """What each of `world` processes in a ring sends for a tensor of `size` bytes, whole.

    All-reduce 2 (W-1)/W n; reduce-scatter and all-gather, its two halves, (W-1)/W n each (Patarasuk and Yuan 2009,
    Bandwidth optimal all-reduce algorithms; the counts of ZeRO's section 7, arXiv 1910.02054, are its limit).
    """
    return (2 if collective == "all_reduce" else 1) * (world - 1) / world * size


def collectives(
    stage: Stage, numels: Sequence[int], world: int, accumulated: int, zero: ZeroSettings, element: int = 4
) -> Mapping[Collective, int]:
    """Bytes that go through each kind of collective in a step, with `numels` trained parameters.

    DDP, ZeRO 0: the gradients are reduced once a step. ZeRO 1: the same, and the updated parts are gathered. ZeRO 2:
    gradients are reduced with every micro-batch, as nobody has room for their sum; DeepSpeed does it by all-reduce
    (`use_multi_rank_bucket_allreduce`), twice what the paper counts. ZeRO 3: they are scattered with every
    micro-batch; parameters are gathered for its forward, and again for its backward where they were let go.
    """
    total = sum(numels)
    if world == 1:
        return {}
    gradients = element * total
    if stage not in (1, 2, 3):
        return {"all_reduce": gradients}
    if stage in (1, 2):
        times = 1 if stage == 1 else accumulated
        padded = world * -(-total // world)
        return {"all_reduce": times * gradients, "all_gather": element * padded}
    small = [n for n in numels if n <= zero.persistence]
    large = [n for n in numels if n > zero.persistence]
    gathered = world * partition(large, world)
    again = max(0, gathered - zero.reuse // 2)  # let go after the forward
    once_a_step = world * partition(small, world)
    return {
        "reduce_scatter": accumulated * element * world * partition(numels, world),
        "all_gather": element * (accumulated * (gathered + again) + once_a_step),
    }


def sent_in_a_step(
    stage: Stage, numels: Sequence[int], world: int, accumulated: int, zero: ZeroSettings, element: int = 4
) -> float:
    """Bytes that one process sends in a step."""
    found = collectives(stage, numels, world, accumulated, zero, element)
    return sum(ring_bytes(kind, size, world) for kind, size in found.items())
