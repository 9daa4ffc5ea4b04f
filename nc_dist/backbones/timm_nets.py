"""timm's nets by name. Its VisionTransformer, ResNet and ConvNeXt are cut at their blocks, any other net runs whole."""

from __future__ import annotations

import importlib
from typing import Any, Literal

from pydantic import field_validator
from torch import Tensor, nn

from nc_dist.backbones.cut import Backbone, Block, uncut
from nc_dist.backbones.origin import DEFAULT, Origin
from nc_dist.backbones.resnet import residual_blocks
from nc_dist.errors import InputError

OURS = ("num_classes", "pretrained", "features_only", "checkpoint_path")  # are not the user's to say


class TimmSpec(Origin):
    """A net that timm knows by this name; `args` are passed on to it, such as drop_path_rate, img_size, patch_size."""

    kind: Literal["timm"] = "timm"
    name: str
    args: dict[str, Any] = {}

    @field_validator("args")
    @classmethod
    def _theirs(cls, args: dict[str, Any]) -> dict[str, Any]:
        if ours := [key for key in args if key in OURS]:
            raise ValueError(f"{', '.join(ours)} cannot be given here; weights have a key of their own")
        return args

    def build(self) -> Backbone:
        return cut(self._net(self.name, pretrained=False))

    def _net(self, name: str, pretrained: bool) -> nn.Module:
        where = f"model.backbone.name={self.name!r}"
        timm = import_timm(where)
        if not timm.is_model(self.name):
            near = timm.list_models(f"*{self.name.split('_')[0]}*")[:5]
            raise InputError(f"{where}: timm has no such model" + (f"; it has {', '.join(near)}" if near else ""))
        try:
            return timm.create_model(name, pretrained=pretrained, num_classes=0, **self.args)  # type: ignore[no-any-return]
        except Exception as error:  # timm checks nothing: whatever its constructors stumble over
            if pretrained:
                raise
            raise InputError(
                f"{where}: timm cannot build it with args={self.args}: {type(error).__name__}: {error}"
            ) from None

    def tags(self) -> list[str]:
        timm, name = import_timm(f"model.backbone.name={self.name!r}"), self.name.partition(".")[0]
        return [config.removeprefix(f"{name}.") for config in timm.models.get_arch_pretrained_cfgs(name)]

    def published(self, tag: str) -> dict[str, Tensor]:
        name = self.name if tag == DEFAULT else f"{self.name.partition('.')[0]}.{tag}"
        return self._net(name, pretrained=True).state_dict()


def import_timm(where: str) -> Any:
    """timm, which is an extra; `where` begins the message of the InputError when it is missing."""
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise InputError(f"{where}: timm is not installed; pip install 'nc-dist[timm]'") from None


def cut(net: Any) -> Backbone:
    """A timm net made with num_classes=0, which gives features. Classes that inherit from the three are not cut."""
    models = importlib.import_module("timm.models")
    named = net.pretrained_cfg.get("classifier")
    classifier = named if isinstance(named, str) else "head"  # some nets have none, or two
    if type(net) is models.VisionTransformer:
        return _from_vit(net, classifier)
    if type(net) is models.ResNet:
        return _from_resnet(net, classifier)
    if type(net) is models.ConvNeXt:
        return _from_convnext(net, classifier)
    return uncut(net, net.head_hidden_size, classifier)


def _features(net: Any, z: Tensor) -> Tensor:
    return net.forward_head(z, pre_logits=True)  # type: ignore[no-any-return]


def _from_vit(net: Any, classifier: str) -> Backbone:
    def stem(net: Any, x: Tensor) -> Tensor:
        return net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(x))))  # type: ignore[no-any-return]

    def finish(net: Any, z: Tensor) -> Tensor:
        return _features(net, net.norm(z))

    pooling: Literal["average", "cls"] = "cls" if net.has_class_token and net.global_pool == "token" else "average"
    blocks = [Block(f"blocks.{i}", net.embed_dim, pooling) for i in range(len(net.blocks))]
    return Backbone(net, blocks, net.head_hidden_size, classifier, stem, finish, net.num_prefix_tokens)


def _from_resnet(net: Any, classifier: str) -> Backbone:
    def stem(net: Any, x: Tensor) -> Tensor:
        return net.maxpool(net.act1(net.bn1(net.conv1(x))))  # type: ignore[no-any-return]

    dims = {stage["module"]: stage["num_chs"] for stage in net.feature_info}
    blocks = [Block(name, dims[name.partition(".")[0]], "average") for name in residual_blocks(net)]
    return Backbone(net, blocks, net.head_hidden_size, classifier, stem, _features)


def _from_convnext(net: Any, classifier: str) -> Backbone:
    """The blocks are the residual ones, and the downsampling layers between the stages."""

    def finish(net: Any, z: Tensor) -> Tensor:
        return _features(net, net.norm_pre(z))

    blocks = []
    for info, stage in zip(net.feature_info, net.stages, strict=True):
        names = [] if isinstance(stage.downsample, nn.Identity) else [f"{info['module']}.downsample"]
        names += [f"{info['module']}.blocks.{i}" for i in range(len(stage.blocks))]
        blocks += [Block(name, info["num_chs"], "average") for name in names]
    return Backbone(net, blocks, net.head_hidden_size, classifier, lambda net, x: net.stem(x), finish)
