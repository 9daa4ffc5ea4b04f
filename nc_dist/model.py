"""The model: backbone, projection head and classifier as one module, with one interface for every family.

`suffix(prefix(x, block), block) == forward(x)` holds for every block; caching, layer-wise measures and the methods that
tune one layer rest on it. Letters: B batch, d features, E embedding (after the head), K classes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nc_dist.backbones import Backbone, BackboneSpec, Block
from nc_dist.data.augment import InputSpec
from nc_dist.errors import InputError
from nc_dist.heads import Classifier, ClassifierSpec, HeadSpec, LinearClassifier, NoHead
from nc_dist.outputs import Outputs, full
from nc_dist.spec import Spec, validate


class ModelSpec(Spec):
    """Backbone, projection head, and the kind of classifier; the loss decides whether there is one."""

    backbone: BackboneSpec
    head: HeadSpec = NoHead()
    classifier: ClassifierSpec = LinearClassifier()


class Model(nn.Module):
    """`num_classes` = 0 makes a model without classifier.

    `skip` names a block whose pooled features are added to the last ones, the shorter zero-padded (SCL fine-tuning,
    arXiv 2212.12206v4); None for all other uses.
    """

    def __init__(self, spec: ModelSpec, num_classes: int, skip: str | None = None, backbone: Backbone | None = None):
        super().__init__()
        self.spec, self.num_classes, self.skip = spec, num_classes, skip
        self.recompute = False  # blocks keep no activations for the backward, which computes them again
        self.backbone = backbone or spec.backbone.build()
        self.dim = self.backbone.dim
        if skip is not None:
            self.dim = max(self.dim, self.backbone.blocks[self.backbone.index(skip)].dim)
        self.head, self.embedding_dim = spec.head.build(self.dim)
        self.classifier: Classifier | None = None
        if num_classes:
            self.classifier = spec.classifier.build(self.embedding_dim, num_classes)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Where the model can be cut, from the input on."""
        return self.backbone.blocks

    @property
    def block_prefixes(self) -> list[str]:
        """Of the blocks' parameter names, from the input on."""
        return [f"backbone.{self.backbone.path(i)}" for i in range(len(self.blocks))]

    @property
    def headless(self) -> bool:
        """Whether features and embedding are the same tensor."""
        return isinstance(self.spec.head, NoHead)

    def forward(self, x: Tensor) -> Outputs:
        """Normalised images (B, 3, S, S) to outputs."""
        return self.observe(x, ())[0]

    def features(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Pooled features (B, dim) of the named blocks, in one forward."""
        return self.observe(x, names)[1]

    def observe(self, x: Tensor, names: Sequence[str]) -> tuple[Outputs, dict[str, Tensor]]:
        """Outputs and the named blocks' pooled features, in one forward."""
        return self._run(0, self.backbone.stem(x), {self.backbone.index(name) for name in names})

    def prefix(self, x: Tensor, block: str) -> Tensor:
        """What enters `block`."""
        z = self.backbone.stem(x)
        for i in range(self.backbone.index(block)):
            z = self.backbone.run(i, z)
        return z

    def suffix(self, z: Tensor, block: str) -> Outputs:
        """The rest of the forward, from what enters `block`."""
        start = self.backbone.index(block)
        assert self.skip is None or start <= self.backbone.index(self.skip), "the skip starts before the cut"
        return self._run(start, z, set())[0]

    def _block(self, i: int, z: Tensor) -> Tensor:
        # Not in eval mode: by the time of the backward, which computes again, the mode may be another one.
        if self.recompute and self.training and torch.is_grad_enabled():
            # No check of shapes: in ZeRO 3 a weight has none when it is saved, as it is let go after its layer.
            return checkpoint(self.backbone.run, i, z, use_reentrant=False, determinism_check="none")  # type: ignore[no-any-return]
        return self.backbone.run(i, z)

    def _run(self, start: int, z: Tensor, wanted: set[int]) -> tuple[Outputs, dict[str, Tensor]]:
        found, skipped = {}, None
        for i in range(start, len(self.blocks)):
            z = self._block(i, z)
            if i in wanted:
                found[self.blocks[i].name] = self.backbone.pool(i, z)
            if self.blocks[i].name == self.skip:
                skipped = self.backbone.pool(i, z)
        features = self.backbone.finish(z)
        if skipped is not None:
            features = add_padded(features, skipped)
        embedding = self.head(features)
        return Outputs(features, embedding, self._logits(embedding)), found

    def _logits(self, embedding: Tensor) -> Tensor | None:
        """In full precision: half of it would round the targets of some losses, and the angles at collapse."""
        if self.classifier is None:
            return None
        with torch.autocast(embedding.device.type, enabled=False):
            return self.classifier(full(embedding))  # type: ignore[no-any-return]


def check_input(spec: ModelSpec, input: InputSpec, num_classes: int = 0, rows: int = 2) -> int:
    """Number of parameters, the classifier's left out; allocates nothing.

    InputError unless backbone, head and (of `num_classes` > 0) classifier can be built, and can be trained on `rows`
    images of the input's size at a time: BatchNorm needs two values of each channel.
    """
    if spec.backbone.checked_on != "meta":
        rows = min(rows, 2)  # what really runs need not run at full size
    with torch.device(spec.backbone.checked_on):
        with _refused_as(
            f"input.size={input.size}: {spec.backbone.name} cannot be built or cannot take {rows} such images"
        ):
            model = Model(spec.model_copy(update={"head": NoHead()}), 0)
            features_Bd = model(torch.zeros(rows, 3, input.size, input.size)).features_Bd
            if features_Bd.shape != (rows, model.dim):
                raise ValueError(f"its features are {tuple(features_Bd.shape)}, not (B, {model.dim})")
        with _refused_as(f"model.head.kind={spec.head.kind}: not for {rows} rows of {model.dim} features"):
            head, dim = spec.head.build(model.dim)
            embedding_BE = head(features_Bd)
        if num_classes:
            with _refused_as(f"model.classifier.kind={spec.classifier.kind}: not for {num_classes} classes"):
                spec.classifier.build(dim, num_classes)(embedding_BE)
    return sum(p.numel() for part in (model, head) for p in part.parameters())


@contextmanager
def _refused_as(what: str) -> Iterator[None]:
    """What torch refuses inside is an InputError that says so; one that says more is left as it is."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"{what} ({error})") from None


def classifier_of(model: Model) -> tuple[Tensor, Tensor] | None:
    """A copy of weight (K, E) and bias (K,) of the linear map whose argmax is the classifier's; None without one."""
    if model.classifier is None:
        return None
    weight_KE, bias_K = model.classifier.effective()
    return weight_KE.detach().float().clone(), bias_K.detach().float().clone()


def add_padded(a: Tensor, b: Tensor) -> Tensor:
    """(B, m) + (B, n), the shorter one padded with zeros at its end."""
    width = max(a.shape[1], b.shape[1])
    return F.pad(a, (0, width - a.shape[1])) + F.pad(b, (0, width - b.shape[1]))


def exported(model: Model) -> dict[str, Tensor]:
    """The state dict under the names of the net's family, so that torchvision's own net loads it with strict=True.

    That holds for a linear classifier. A cosine or ETF one has no bias, and a projection head keeps the prefix `head.`,
    which torchvision has no place for.
    """
    names = exported_names(model)
    return {names[name]: value for name, value in model.state_dict().items()}


def exported_names(model: Model) -> dict[str, str]:
    """The names of the model's state dict, each with the name it is exported under."""
    renames = {"backbone.net.": "", "classifier.": model.backbone.classifier_name + "."}
    names = {name: _renamed(name, renames) for name in model.state_dict()}
    assert len(set(names.values())) == len(names), "two tensors would be exported under one name"
    return names


def _renamed(name: str, renames: Mapping[str, str]) -> str:
    for old, new in renames.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def export(model: Model, folder: Path, input: InputSpec, class_names: Sequence[str], about: Mapping[str, Any]) -> None:
    """Write backbone.safetensors, model.safetensors and config.json; the folder appears whole or not at all."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in exported(model).items()}
    names = exported_names(model)
    backbone = {names[name]: tensors[names[name]] for name in names if name.startswith("backbone.")}
    config = {
        "model": model.spec.model_dump(mode="json"),
        "num_classes": model.num_classes,
        "skip": model.skip,
        "input": input.model_dump(mode="json"),
        "class_names": list(class_names),
        "blocks": [block.__dict__ for block in model.blocks],
        **about,
    }
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    save_file(backbone, partial / "backbone.safetensors")
    save_file(tensors, partial / "model.safetensors")
    for path in partial.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes files that nobody else may read
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    if folder.exists():
        shutil.rmtree(folder)  # an earlier attempt of this same run
    partial.rename(folder)


class Exported(NamedTuple):
    """An exported model as read back, and where it lies."""

    model: Model
    input: InputSpec
    config: dict[str, Any]
    folder: Path


def export_folder(path: str | Path) -> Path:
    """The export in a run folder, or the folder itself when it is one; InputError when there is none."""
    for folder in (Path(path) / "export", Path(path)):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    raise InputError(f"{path}: no exported model (export/config.json and model.safetensors); finish the run first")


def load_exported(path: str | Path) -> Exported:
    """Rebuild an exported model with its weights, all names matched; InputError when they do not fit."""
    folder = export_folder(path)
    try:
        config = json.loads((folder / "config.json").read_text())
        spec = validate(ModelSpec, without_weights(config["model"]), str(folder / "config.json"))
        model = Model(spec, config["num_classes"], config["skip"])
        names = {theirs: ours for ours, theirs in exported_names(model).items()}
        tensors = load_file(folder / "model.safetensors")
        model.load_state_dict({names.get(name, name): value for name, value in tensors.items()})
        input = validate(InputSpec, config["input"], str(folder / "config.json"))
    except (KeyError, json.JSONDecodeError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{folder}: not a model that fits its config.json: {error}") from None
    return Exported(model, input, config, folder)


def without_weights(tree: dict[str, Any]) -> dict[str, Any]:
    """The model's description without the published weights it started from, which need no second download."""
    backbone = {key: value for key, value in tree["backbone"].items() if key != "weights"}
    return {**tree, "backbone": backbone}


def with_new_classifier(source: Model, num_classes: int, skip: str | None = None, seed: int = 0) -> Model:
    """The source's backbone, its head dropped, with a fresh linear classifier, seeded (for transfer)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        spec = source.spec.model_copy(update={"head": NoHead(), "classifier": LinearClassifier()})
        return Model(spec, num_classes, skip, backbone=source.backbone)
