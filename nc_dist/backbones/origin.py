"""What every kind of backbone can be told and asked: how it is built, and the weights that it starts from."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator
from torch import Tensor

from nc_dist.backbones.cut import Backbone
from nc_dist.spec import Spec

DEFAULT = "DEFAULT"  # the published weights that the library itself takes


class Origin(Spec):
    """Base of the kinds.

    `weights` is null (random), a published tag (true: the library's own choice), a file, a URL, or a run or export
    folder of ours. `build` leaves them alone: a run that goes on from its own checkpoint has no need of them.
    """

    weights: Annotated[str | None, BeforeValidator(lambda value: DEFAULT if value is True else value)] = None
    checked_on: ClassVar[str] = "meta"  # the device on which the net is built to see whether it can be

    def build(self) -> Backbone:
        """The net with random weights; InputError when it cannot be built."""
        raise NotImplementedError

    def tags(self) -> list[str]:
        """Names of published weights."""
        return []

    def published(self, tag: str) -> dict[str, Tensor]:
        """The state dict of published weights, downloaded unless it was before. Any error means that it cannot be."""
        raise NotImplementedError
