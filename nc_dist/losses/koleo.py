"""An entropy of the features, by the distance of each to its nearest neighbour: what is spread out cannot collapse."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nc_dist.losses.term import Regulariser
from nc_dist.outputs import Outputs


class KoLeo(Regulariser):
    """Mean over the batch of -log(|h_i - h_n(i)| + epsilon), h the l2-normalised features before the head, n(i) the
    nearest other sample (Kozachenko-Leonenko; Sablayrolles et al. 2019, arXiv 1806.03198).

    A positive weight spreads features out. Copies of a sample, at distance 0, have no gradient and count -log epsilon.
    """

    kind: Literal["koleo"] = "koleo"
    gathered: bool = True  # neighbours in the global batch; false: in the sample's own micro-batch
    epsilon: float = Field(1e-8, gt=0)

    least: ClassVar[int] = 2

    @property
    def coupled(self) -> bool:
        return self.gathered

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        normal = F.normalize(outputs.features_Bd, dim=1)
        with torch.no_grad():
            nearest_B = (normal @ normal.T).fill_diagonal_(-torch.inf).argmax(1)
        distance_B: Tensor = torch.linalg.vector_norm(normal - normal[nearest_B], dim=1)
        return -(distance_B + self.epsilon).log().mean()
