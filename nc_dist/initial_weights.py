"""The weights that a backbone starts from, wherever `model.backbone.weights` says they are. For pre-training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nc_dist.backbones import Backbone, BackboneSpec
from nc_dist.backbones.origin import DEFAULT
from nc_dist.data.shards.cache import Cache, disk_errors, locked
from nc_dist.data.shards.urls import open_stream
from nc_dist.errors import InputError
from nc_dist.identity import hash_text
from nc_dist.model import export_folder
from nc_dist.weights import Match, fit_weights, load_tensors, read_weights, weights_identity

BLOCK = 1 << 20  # bytes
FILE = "weights.json"  # in a run's folder: what it started from


def report(spec: BackboneSpec) -> str | None:
    """What would be loaded of the spec's weights, which are read for it; None without any.

    InputError unless they fit.
    """
    if spec.weights is None:
        return None
    with torch.device(spec.checked_on):
        backbone = spec.build()
    return _said(spec, backbone, fit_weights(backbone.net, _tensors(spec), (), _where(spec)))


def start_from(spec: BackboneSpec, backbone: Backbone, out: Path, leads: bool) -> None:
    """Load the spec's weights, if it names any; the rank that `leads` says what was loaded and notes it in `out`."""
    if spec.weights is None:
        return
    match = load_tensors(backbone.net, _tensors(spec), (), _where(spec))
    if leads:
        said, identity = _said(spec, backbone, match), weights_identity(backbone.net.state_dict())
        (out / FILE).write_text(json.dumps({"from": spec.weights, "report": said, "identity": identity}))
        print(f"weights: {said}", flush=True)


def noted(out: Path) -> dict[str, Any] | None:
    """What the run in this folder started from, maybe before it was resumed: from, report, identity of the weights."""
    return json.loads((out / FILE).read_text()) if (out / FILE).is_file() else None


def _where(spec: BackboneSpec) -> str:
    return f"model.backbone.weights={spec.weights}"


def _said(spec: BackboneSpec, backbone: Backbone, match: Match) -> str:
    classifier = match.prefix + backbone.classifier_name + "."
    left = any(name.startswith(classifier) for name in match.unexpected)
    classifier_left = f"; the classifier {classifier.removesuffix('.')} of the file is not taken" if left else ""
    return f"{spec.weights}: {match.describe()}{classifier_left}"


def _tensors(spec: BackboneSpec) -> dict[str, Tensor]:
    """The tensors that `spec.weights` names, in this order: a URL, a published tag, a folder of ours, a file."""
    weights = spec.weights
    assert weights is not None
    if "://" in weights:
        return read_weights(fetched(weights))
    if weights in (DEFAULT, *(tags := spec.tags())):
        return _published(spec, tags)
    if Path(weights).is_dir():
        return read_weights(export_folder(weights) / "backbone.safetensors")
    if not Path(weights).is_file():
        published = ", ".join([*tags, DEFAULT]) if tags else "no published weights"
        what = "neither a file, nor a run or export folder, nor a URL"
        raise InputError(f"{_where(spec)}: {what}; {spec.name} has {published}")
    return read_weights(weights)


def _published(spec: BackboneSpec, tags: list[str]) -> dict[str, Tensor]:
    assert spec.weights is not None
    if not tags:
        raise InputError(f"{_where(spec)}: {spec.name} has no published weights")
    try:
        return spec.published(spec.weights)
    except Exception as error:  # a download fails in as many ways as there are libraries below it
        raise InputError(
            f"{_where(spec)}: the weights of {spec.name} cannot be downloaded here ({error}). Fetch them where there "
            "is a network and give the file: model.backbone.weights=FILE"
        ) from None


def fetched(url: str) -> Path:
    """The file behind a URL, in the cache folder: downloaded once a machine, other processes wait for it meanwhile."""
    cache = Cache()
    path = cache.folder / "weights" / f"{hash_text(url)}-{url.partition('?')[0].rpartition('/')[2]}"
    with disk_errors(cache, url):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(path.name + ".lock")):
            if path.is_file():
                return path
            partial = path.with_name(path.name + ".partial")
            try:
                with open_stream(url, cache.retry) as stream, partial.open("wb") as file:
                    while data := stream.read(BLOCK):
                        file.write(data)
            except InputError as error:
                raise InputError(
                    f"model.backbone.weights: cannot be downloaded here ({error}). Fetch the file where there is a "
                    "network and give its path"
                ) from None
            partial.rename(path)
    return path
