"""A net of the user's own: a function in a module of theirs. It runs only where --allow-user-code says so."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from nc_dist import user_code
from nc_dist.backbones.cut import Backbone, uncut
from nc_dist.backbones.origin import Origin
from nc_dist.errors import InputError

CLASSIFIER = "nc_dist_classifier"  # in exports: no name that a net of somebody else has


class OwnSpec(Origin):
    """`function(**args)` gives an nn.Module that maps images (B, 3, S, S) to features (B, d), or a Backbone."""

    kind: Literal["own"] = "own"
    function: str = Field(pattern=r"^[\w.]+:\w+$")  # "package.module:function", found from the working folder too
    args: dict[str, Any] = {}
    image_size: int = Field(32, ge=1)  # S of the one image that is run to find d
    checked_on: ClassVar[str] = "cpu"  # nobody knows what the function does

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.function

    def build(self) -> Backbone:
        where = f"model.backbone.function={self.function!r}"
        function = user_code.function(self.function, where)
        try:
            net = function(**self.args)
            if isinstance(net, Backbone):
                return net
            if not isinstance(net, nn.Module):
                raise TypeError(f"gives a {type(net).__name__}, not an nn.Module or a Backbone")
            return uncut(net, self._dim(net), CLASSIFIER)
        except InputError:
            raise
        except Exception as error:  # of code that is not ours
            raise InputError(f"{where}, args={self.args}: {type(error).__name__}: {error}") from error

    def _dim(self, net: nn.Module) -> int:
        """d, of a forward that leaves the net and the random numbers as they were."""
        training = {module: module.training for module in net.modules()}
        with torch.random.fork_rng(), torch.no_grad():
            features = net.eval()(torch.zeros(1, 3, self.image_size, self.image_size))
        for module, was in training.items():
            module.training = was
        if not isinstance(features, Tensor) or features.ndim != 2:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"the net must map images to features (B, d), it gives {shape}")
        return features.shape[1]
