"""The subject of a measurement: a model, wherever it comes from, as one forward that gives every block's features.

Letters: B batch, S image size, d features, E embedding (what the classifier acts on), K classes.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import ResNet
from torchvision.models.vision_transformer import VisionTransformer

from nc_dist.backbones import Block, TorchvisionSpec
from nc_dist.backbones.torchvision_nets import cut
from nc_dist.data.augment import InputChange, InputSpec
from nc_dist.data.pixels import Decoder
from nc_dist.errors import InputError
from nc_dist.heads import Classifier, LinearClassifier
from nc_dist.model import Model, ModelSpec, check_input, export_folder, exported, load_exported
from nc_dist.subject_hooks import Observe, layout, observer
from nc_dist.weights import load_tensors, match_weights, read_weights, weights_identity
from nc_dist.zoo import Named, from_timm, from_torchvision, nearest

ZOOS = {"torchvision": from_torchvision, "timm": from_timm}
UNCHANGED = InputChange()
FORMS = "a run or export folder, torchvision:NAME, torchvision:NAME/WEIGHTS, timm:NAME or timm:NAME/TAG"
STEP = re.compile(r"\bstep_(\d+)(?:/export)?$")


@dataclass(frozen=True, eq=False)
class Subject:
    """A model in eval mode on the CPU; `module` may be moved, `observe` follows it."""

    module: nn.Module
    blocks: tuple[Block, ...]  # in network order
    observe: Observe  # images (B, 3, S, S), names of blocks -> Outputs and {name: (B, dim)}, in one forward
    classifier: nn.Linear | Classifier | None  # acts on Outputs.embedding_BE; a linear one may have no bias
    input: InputSpec
    dim: int  # d
    embedding_dim: int  # E
    headless: bool  # features and embedding are the same tensor
    identity: str  # of the weights: names, shapes and values
    about: dict[str, Any]  # what it is, for result files
    step: int | None = None  # of a checkpoint
    class_names: tuple[str, ...] | None = None  # of the classifier's classes, where known

    def linear_map(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight (K, E) and bias (K,), if any, of the linear map whose argmax is the classifier's; None without one."""
        if self.classifier is None:
            return None
        if isinstance(self.classifier, Classifier):
            weight, bias = self.classifier.effective()
            return weight.detach().float(), bias.detach().float()
        bias = self.classifier.bias
        return self.classifier.weight.detach().float(), None if bias is None else bias.detach().float()


def open_subject(model: str, weights: str | None = None, input: InputChange = UNCHANGED, seed: int = 0) -> Subject:
    """Open a model for measuring.

    `model` is one of FORMS; `weights` a file for a named net (its tag, if any, then says only what the file is for);
    `input` changes the model's own; `seed` draws the weights of a net that has none. InputError for all that can be
    wrong.
    """
    scheme, colon, name = model.partition(":")
    if Path(model).is_dir():
        if weights is not None:
            raise InputError(f"weights={weights}: {model} has its own; weights go with torchvision: and timm: names")
        return _from_folder(Path(model), input)
    if not colon or scheme not in ZOOS:
        raise InputError(_no_such(model))
    # timm itself writes NAME.TAG
    name, _, tag = (name.replace(".", "/", 1) if scheme == "timm" else name).partition("/")
    named = ZOOS[scheme](name, tag or None, weights is None, input.size, seed)
    about: dict[str, Any] = {"model": model, "weights": weights or named.tag or f"random, seed {seed}"}
    about["made_for"] = {**named.input.model_dump(mode="json"), "interpolation": named.interpolation}
    named = named._replace(input=input.of(named.input))
    if scheme == "torchvision" and isinstance(named.net, ResNet | VisionTransformer):
        subject = _from_own_family(name, named, weights, about)
    else:
        subject = _from_any_net(named, weights, about)
    published = models.get_model_weights(name)[named.tag] if scheme == "torchvision" and named.tag else None
    return _with_class_names(subject, published.meta["categories"] if published else [])


def _with_class_names(subject: Subject, names: Sequence[str]) -> Subject:
    """The subject with these names, if it has a classifier of as many classes."""
    fits = subject.classifier is not None and subject.classifier.out_features == len(names)
    return replace(subject, class_names=tuple(names)) if fits else subject


def _no_such(model: str) -> str:
    if Path(model).is_file():
        return f"model={model}: a file; name the net it is for and give the file as weights: model=torchvision:NAME"
    known = [str(path) for path in Path(model).parent.glob("*") if path.is_dir()]
    known += [f"torchvision:{name}" for name in models.list_models(models)]
    return f"model={model}: no such folder{nearest(model, known)}. Expected {FORMS}"


def _from_folder(folder: Path, change: InputChange) -> Subject:
    found = load_exported(_export(folder))
    model = found.model.eval()
    input = change.of(found.input)
    check_input(model.spec, input)
    about = {"model": str(folder), "weights": str(found.folder)}
    return _with_class_names(_of_model(model, input, about, step_of(folder)), found.config.get("class_names", []))


def _export(folder: Path) -> Path:
    if (folder / "manifest.json").is_file() and not (folder / "export").is_dir():
        raise InputError(
            f"{folder}: a checkpoint that holds only what resuming needs, no export/; measure the finished run's own "
            "export, or run again so that its checkpoints hold one"
        )
    return export_folder(folder)


def decoder_of(model: str) -> Decoder | None:
    """What decoded the images that a model of ours was trained on; None for others."""
    for config in (Path(model) / "export/config.json", Path(model) / "config.json"):
        if config.is_file():
            decoder: Decoder | None = json.loads(config.read_text()).get("decoder")
            return decoder
    return None


def step_of(folder: Path) -> int | None:
    """N of step_N, or of step_N/export; links are followed."""
    found = STEP.search(str(folder.resolve()))
    return int(found[1]) if found else None


def _from_own_family(name: str, named: Named, weights: str | None, about: dict[str, Any]) -> Subject:
    """torchvision's ResNets and vision transformers as our own Model, with their classifier."""
    net, is_vit = named.net, isinstance(named.net, VisionTransformer)
    classifier = "heads.head" if is_vit else "fc"
    spec = TorchvisionSpec(name=name, **({"image_size": net.image_size} if is_vit else {}))
    check_input(ModelSpec(backbone=spec), named.input)
    has_classifier = _load(net, classifier, weights, about)
    linear = _linear(net, classifier)
    model = Model(ModelSpec(backbone=spec), 0, backbone=cut(net))
    if has_classifier:
        model.num_classes = linear.out_features
        with torch.device("meta"):  # draws no random numbers
            model.classifier = LinearClassifier().build(linear.in_features, linear.out_features)
        model.classifier.load_state_dict(linear.state_dict(), assign=True)
    return _of_model(model.eval(), named.input, about)


def _of_model(model: Model, input: InputSpec, about: dict[str, Any], step: int | None = None) -> Subject:
    identity, about = weights_identity(exported(model)), about | {"parameters": _count(model)}
    facts = (model.dim, model.embedding_dim, model.headless)
    return Subject(model, model.blocks, model.observe, model.classifier, input, *facts, identity, about, step)


def _from_any_net(named: Named, weights: str | None, about: dict[str, Any]) -> Subject:
    net, input = named.net, named.input
    try:
        seen = layout(net, input.size)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"model={about['model']}, input.size={input.size}: {error}") from None
    has_classifier = _load(net, seen.classifier, weights, about)
    linear = _linear(net, seen.classifier) if seen.classifier and has_classifier else None
    tensors = net.state_dict()
    if not has_classifier:
        tensors = {name: value for name, value in tensors.items() if not name.startswith(f"{seen.classifier}.")}
    about = about | {"parameters": _count(net), "classifier": seen.classifier}
    blocks = tuple(place.block for place in seen.places)
    observe, identity, dims = observer(net, seen, has_classifier), weights_identity(tensors), (seen.dim, seen.dim)
    return Subject(net, blocks, observe, linear, input, *dims, True, identity, about)


def _load(net: nn.Module, classifier: str | None, weights: str | None, about: dict[str, Any]) -> bool:
    """Put a file's weights into a net; False when the file has none for its classifier. Adds the match to `about`."""
    if weights is None:
        return True
    found = read_weights(weights)
    if classifier:
        _fit_classifier(net, classifier, found)
    names = [f"{classifier}."] if classifier else []
    match = load_tensors(net, found, names, f"model={about['model']}, weights={weights}")
    lost = [name for name in (*match.missing, *match.wrong_shape) if name.startswith(tuple(names))]
    about["match"] = match.describe() + ("; no classifier" if lost else "")
    return not lost


def _fit_classifier(net: nn.Module, name: str, found: Mapping[str, Tensor]) -> None:
    """Give the net a classifier of as many classes as the file's."""
    linear = _linear(net, name)
    there = found.get(f"{match_weights(found, net).prefix}{name}.weight")
    if there is not None and there.ndim == 2 and there.shape[1] == linear.in_features:
        net.set_submodule(name, nn.Linear(linear.in_features, len(there), linear.bias is not None))


def _linear(net: nn.Module, name: str) -> nn.Linear:
    linear = net.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def subject_paths(model: str) -> list[str]:
    """The models that a pattern like runs/x/checkpoints/step_* names, by folder and step; any other name is itself.

    InputError when nothing matches or a match holds no exported model. Links to a match are not listed again.
    """
    if not glob.has_magic(model) or model.partition(":")[0] in ZOOS or Path(model).exists():
        return [model]
    folders = [path for path in map(Path, glob.glob(model)) if path.is_dir() and path.suffix != ".partial"]
    folders.sort(key=lambda path: bool(STEP.search(str(path))))
    unique = {path.resolve(): path for path in folders}  # of a link and its target the one that says its step
    if not unique:
        raise InputError(f"model={model}: no folder matches this pattern; looked in {Path.cwd()}")
    for path in unique.values():
        _export(path)
    return [str(path) for path in sorted(unique.values(), key=lambda p: (STEP.sub("", str(p)), step_of(p) or 0))]
