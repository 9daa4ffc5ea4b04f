"""What one process holds of weights and optimiser state in ZeRO 1-3: DeepSpeed's optimisers seen as shards.

The only file that reaches into them; `zero` is DeepSpeed's optimiser, of stage 1, 2 or 3. For the DeepSpeed engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nc_dist.engine.zero_shards import AVERAGES, WEIGHTS, Flat, Piece, Shard, cut_anew


def _partitions_weights(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")  # stage 3


def masters(zero: Any) -> list[Tensor]:
    """The fp32 weights that this process updates, flat, padded at the end."""
    return list(
        zero.fp32_partitioned_groups_flat if _partitions_weights(zero) else zero.single_partition_of_fp32_groups
    )


def _groups(zero: Any) -> list[list[Any]]:
    """The parameters of each flat tensor, over all processes."""
    return list(zero.fp16_groups if _partitions_weights(zero) else zero.bit16_groups)  # so called, fp32 here


def members(zero: Any) -> list[list[str]]:
    """The names of the parameters of each flat tensor, over all processes."""
    return [[zero.param_names[p] for p in group] for group in _groups(zero)]


def pieces(zero: Any, rank: int) -> dict[str, Piece]:
    """What parts of which parameters this process's flat tensors hold."""
    found: dict[str, Piece] = {}
    for flat, group in enumerate(_groups(zero)):
        start = 0
        for parameter in group:
            if _partitions_weights(zero):  # each parameter is cut by itself, the last parts padded
                part = parameter.partition_numel()
                offset = min(rank * part, parameter.ds_numel)
                piece = Piece(flat, start, offset, min(part, parameter.ds_numel - offset))
                start += part
            elif parameter._hp_mapping is None:  # all of it is another process's
                continue
            else:  # a group's parameters are cut as one
                here, whole = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
                piece = Piece(flat, here.start, whole.start, whole.numel)
            found[zero.param_names[parameter]] = piece
    return found


def shard(zero: Any, rank: int, averages: Sequence[Tensor] | None) -> Shard:
    """What this process has to save."""
    flats = [{WEIGHTS: weights, **zero.optimizer.state[weights]} for weights in masters(zero)]
    for flat, average in zip(flats, averages or [], strict=bool(averages)):
        flat[AVERAGES] = average
    return Shard(pieces(zero, rank), flats)


@torch.no_grad()
def restore(zero: Any, rank: int, shards: Sequence[Shard]) -> list[Tensor] | None:
    """Weights and optimiser state from the shards of any number of processes; the averages, if there are any."""
    own = masters(zero)
    found = cut_anew(pieces(zero, rank), members(zero), [len(flat) for flat in own], shards)
    averages = [flat.pop(AVERAGES) for flat in found if AVERAGES in flat]
    for weights, flat in zip(own, found, strict=True):
        weights.copy_(flat.pop(WEIGHTS))
        _set_state(zero.optimizer.state[weights], flat, weights, bool(zero.optimizer.defaults.get("fused")))
    publish(zero)
    return averages or None


def _set_state(state: dict[str, Any], saved: Flat, weights: Tensor, fused: bool) -> None:
    """The state of one flat tensor. Tensors that are there keep their place: DeepSpeed has views of them.

    Step counts lie on the CPU, as torch has them, unless updates are `fused`.
    """
    for key, value in saved.items():
        if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
            state[key].copy_(value)
        else:
            near = isinstance(value, Tensor) and (fused or value.shape == weights.shape)
            state[key] = value.to(weights.device) if near else value


def publish(zero: Any) -> None:
    """Let the model have the masters' values, everywhere."""
    if not _partitions_weights(zero):
        zero.update_lp_params()
        return
    zero.checkpoint_event_prologue()  # lets go of what is gathered
    for flat in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(flat)
    zero.checkpoint_event_epilogue()  # gathers the small parameters that stay
