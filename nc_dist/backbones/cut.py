"""A net cut at its blocks: the one interface that all families have.

A backbone runs as  stem -> blocks, in order -> finish, and never changes the names of the net's parameters.
Letters: B batch, S image size, d features, T tokens, H x W places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

WHOLE = "whole"  # the only block of a net that is not cut: its features are the backbone's

Part = Callable[[Any, Tensor], Tensor]  # (net, what enters) -> what leaves


@dataclass(frozen=True)
class Block:
    """A place where the net can be cut, measured or tuned."""

    name: str  # of the submodule, as in the state dict; or WHOLE
    dim: int  # of its pooled features
    pooling: Literal["average", "cls"]


class Backbone(nn.Module):
    """`net` without its classifier, as a sequence of blocks; `dim` is the size of its features.

    `classifier` is where the net's family keeps its classifier, for exported names. `prefix_tokens` stand before the
    places in a transformer's tokens.
    """

    def __init__(
        self,
        net: nn.Module,
        blocks: list[Block],
        dim: int,
        classifier: str,
        stem: Part,
        finish: Part,
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.net, self.blocks, self.dim = net, tuple(blocks), dim
        self.classifier_name, self.prefix_tokens = classifier, prefix_tokens
        self._stem, self._finish = stem, finish

    def index(self, block: str) -> int:
        """Position of a block by name; ValueError lists the names there are."""
        names = [known.name for known in self.blocks]
        if block not in names:
            raise ValueError(f"block={block!r}: no such block; this backbone has {', '.join(names)}")
        return names.index(block)

    def path(self, i: int) -> str:
        """Where block `i` lies in this module: its parameters' names begin with that."""
        name = self.blocks[i].name
        return "net" if name == WHOLE else f"net.{name}"

    def module(self, i: int) -> nn.Module:
        """What holds the parameters of block `i`."""
        return self.get_submodule(self.path(i))

    def stem(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) to what the first block takes."""
        return self._stem(self.net, x)

    def run(self, i: int, z: Tensor) -> Tensor:
        """Block number `i`."""
        return self.module(i)(z)  # type: ignore[no-any-return]

    def pool(self, i: int, z: Tensor) -> Tensor:
        """Features (B, dim) of block `i` from its activation (B, dim, H, W), (B, T, dim), or (B, dim) of a whole net.

        The average over places, or the class token.
        """
        if self.blocks[i].name == WHOLE:
            return z
        if self.blocks[i].pooling == "cls":
            return z[:, 0]
        return z[:, self.prefix_tokens :].mean(1) if z.ndim == 3 else z.mean(dim=(2, 3))

    def finish(self, z: Tensor) -> Tensor:
        """The last block's activation to features (B, d)."""
        return self._finish(self.net, z)


def uncut(net: nn.Module, dim: int, classifier: str) -> Backbone:
    """A net of which no more is known than that it maps images to features (B, dim): one block, WHOLE."""
    return Backbone(net, [Block(WHOLE, dim, "average")], dim, classifier, _unchanged, _unchanged)


def _unchanged(net: nn.Module, z: Tensor) -> Tensor:
    return z


def width(block: nn.Module) -> int:
    """Channels that leave a block: those of its last convolution or linear layer."""
    layers = [module for module in block.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    last = layers[-1]
    return last.out_channels if isinstance(last, nn.Conv2d) else last.out_features
