"""Published nets by name: torchvision's classification models and timm's, with the input that they were made for.

A tag names published weights. They are downloaded unless the caller brings a file of its own: then the tag says no more
than what input and how many classes that file is for.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torchvision
from torch import nn

from nc_dist.backbones.timm_nets import import_timm
from nc_dist.data.augment import InputSpec
from nc_dist.data.pixels import Interpolation
from nc_dist.errors import InputError

IMAGENET = InputSpec(size=224, crop=0.875, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
AUXILIARY = ("googlenet", "inception_v3")  # have classifiers of inner layers, which evaluation never runs


class Named(NamedTuple):
    """A net in eval mode, the input it is for, and the tag of the weights it has (None: random ones).

    `interpolation` is how its authors resize images; the input has it where it is bilinear or bicubic.
    """

    net: nn.Module
    input: InputSpec
    tag: str | None
    interpolation: str = "bilinear"


def from_torchvision(name: str, tag: str | None, download: bool, size: int | None, seed: int) -> Named:
    """A torchvision classification model; `size` is another input size, for vision transformers."""
    models = torchvision.models
    known = models.list_models(models)
    if name not in known:
        raise InputError(f"torchvision has no model {name!r}{nearest(name, known)}")
    weights, input, options, interpolation = None, IMAGENET, {}, "bilinear"
    if tag is not None:
        tags = models.get_model_weights(name)
        if tag not in tags.__members__:
            raise InputError(
                f"torchvision:{name}/{tag}: its weights are {', '.join([t.name for t in tags])} and DEFAULT"
            )
        weights = tags[tag]
        transforms = weights.transforms()
        input, interpolation = _input_of_torchvision(transforms), transforms.interpolation.value
        options = {"num_classes": len(weights.meta["categories"])}
    if name.startswith("vit_"):
        options["image_size"] = size or input.size
    if name in AUXILIARY and not (weights and download):
        options |= {"aux_logits": False, "init_weights": False, "transform_input": weights is not None}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = models.get_model(name, weights=weights if download else None, **options)
    except OSError as error:
        raise InputError(_no_download(f"torchvision:{name}/{tag}", weights.url, error)) from None  # type: ignore[union-attr]
    except (ValueError, RuntimeError, AssertionError) as error:
        raise InputError(f"torchvision:{name}/{tag}: cannot be made with input.size={size}: {error}") from None
    return Named(net.eval(), input, weights.name if weights else None, interpolation)


def _input_of_torchvision(transforms: Any) -> InputSpec:
    [size], [resize] = transforms.crop_size, transforms.resize_size
    return InputSpec(
        size=size,
        crop=min(size / resize, 1.0),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=_known(transforms.interpolation.value),
    )


def from_timm(name: str, tag: str | None, download: bool, size: int | None, seed: int) -> Named:
    """A timm model; DEFAULT is the tag that timm takes itself. `size` is another input size."""
    timm = import_timm(f"timm:{name}")
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    known = {config.removeprefix(f"{name}."): config for config in timm.models.get_arch_pretrained_cfgs(name)}
    if tag not in (None, "DEFAULT", *known):
        raise InputError(f"timm:{name}/{tag}: its weights are {', '.join(known)} and DEFAULT")
    full = name if tag in (None, "DEFAULT") else f"{name}.{tag}"
    published = timm.models.get_pretrained_cfg(full)
    options = {"img_size": size} if size and published.fixed_input_size else {}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = timm.create_model(full, pretrained=bool(tag) and download, **options).eval()
    except Exception as error:  # a download fails in as many ways as there are libraries below timm
        if tag and download:
            url = f"https://huggingface.co/{published.hf_hub_id}"
            raise InputError(_no_download(f"timm:{name}/{tag}", url, error)) from None
        raise InputError(f"timm:{name}: cannot be made with input.size={size}: {error}") from None
    config = timm.data.resolve_model_data_config(net, use_test_size=True)
    return Named(net, _input_of_timm(name, config), published.tag if tag else None, config["interpolation"])


def _input_of_timm(name: str, config: dict[str, Any]) -> InputSpec:
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise InputError(f"timm:{name}: takes images of {config['input_size']}; only square RGB images are supported")
    return InputSpec(
        size=height,
        crop=min(config["crop_pct"], 1.0),
        mean=config["mean"],
        std=config["std"],
        interpolation=_known(config["interpolation"]),
    )


def _known(interpolation: str) -> Interpolation:
    """What InputSpec has of it; others are rare, and stand in the result beside what was used."""
    return "bicubic" if interpolation == "bicubic" else "bilinear"


def _no_download(name: str, url: str, error: Exception) -> str:
    return (
        f"{name}: the weights cannot be downloaded here ({error}). Fetch them where there is a network, from {url}, "
        f"and give the file: model={name} weights=FILE"
    )


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message: names like this one."""
    near = difflib.get_close_matches(name, known, 3, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else ""
