"""A layer that is watched: its module by name, the features in what passes there, the classifier that takes them.

Letters: B samples of a batch, C channels, H x W places, T tokens, D feature dimensions, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nc_dist.nc.second_pass import Classifier

Pooling = Literal["average", "cls", "channels_last"]

INPUT = "input:"
AXES = {(4, "average"): (2, 3), (4, "channels_last"): (1, 2), (3, "average"): (1,)}  # that are averaged over


def submodules(model: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    """The module of each layer, in the model or in the first net inside its wrappers that has all the names."""
    if isinstance(layers, str):
        raise ValueError(f"layers={layers!r}: give a list of names, [{layers!r}]")
    names = {layer: layer.removeprefix(INPUT) for layer in layers}
    known = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    unknown = [name for name in names.values() if name not in known]
    if names and not unknown:
        return {layer: known[name] for layer, name in names.items()}
    inner = getattr(model, "module", getattr(model, "_orig_mod", None))
    if isinstance(inner, nn.Module):
        return submodules(inner, layers)
    near = get_close_matches(unknown[0], known, n=5, cutoff=0) if unknown else list(known)
    raise ValueError(f"layers={layers}: no submodules {unknown}; names near it are {near}")


def as_labels(labels_B: Any) -> Tensor:
    """A tensor of what is one or holds one's numbers: a list, a numpy array. ValueError for anything else."""
    try:
        return torch.as_tensor(labels_B)
    except (TypeError, ValueError, RuntimeError) as why:
        found = f"{type(labels_B).__name__} {labels_B!r:.60}"
        raise ValueError(f"labels {found}: expected integers, one for each sample ({why})") from None


def pooled(layer: str, value: Any, asked: Pooling | None) -> tuple[Tensor, str]:
    """Features (B, D), a copy, for what follows may work in place; and the pooling that made them."""
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else [value]
    z = next((each for each in values if isinstance(each, Tensor) and each.is_floating_point()), torch.empty(()))
    how = asked or "average"
    if z.ndim == 4 and not asked and z.shape[1] == z.shape[2] != z.shape[3]:
        found = f"{layer}: {tuple(z.shape)} looks like (B, H, W, C)"
        raise ValueError(f"{found}: say so with pooling={{{layer!r}: 'channels_last'}}, or 'average' for (B, C, H, W)")
    if z.ndim == 2 and not asked:
        return z.clone(), "none"
    if (z.ndim, how) == (3, "cls"):
        return z[:, 0].clone(), how
    if (z.ndim, how) not in AXES:
        raise ValueError(f"{layer}: features {tuple(z.shape)} of {type(value).__name__} cannot be pooled by {how!r}")
    return z.mean(AXES[z.ndim, how]), how


def classifier_at(layer: str, module: nn.Module, like_KD: Tensor, given: Classifier | None) -> Classifier | str:
    """What acts on features of these class means, on their device; or why nothing is known to."""
    if not layer.startswith(INPUT):
        return f"it takes the features that enter a classifier: watch {INPUT}NAME"
    if given is None:
        classes, dim = like_KD.shape
        if not isinstance(module, nn.Linear) or (module.out_features, module.in_features) != (classes, dim):
            return f"{type(module).__name__}({module.extra_repr()}) is no Linear of {dim} features to {classes} classes"
        # FSDP's DTensor is made whole here; of a weight under ZeRO-3 nothing is left on a rank between forwards.
        given = tuple(getattr(p, "full_tensor", lambda p=p: p)() for p in (module.weight, module.bias))
        if given[0].shape != like_KD.shape:
            return "the weight is partitioned over ranks: gather it, then metrics(classifier=(weight, bias))"
    weight_KD, bias_K = given
    return weight_KD.to(like_KD.device), None if bias_K is None else bias_K.to(like_KD.device)
