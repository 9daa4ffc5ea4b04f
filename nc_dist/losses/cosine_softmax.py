"""Cross-entropy of cosines: lengths of features and class vectors do not matter."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nc_dist.losses.term import Loss
from nc_dist.outputs import Outputs


class CosineSoftmax(Loss):
    """Cross-entropy of cos(h, w_k) / temperature; the logits of a cosine classifier are the cosines, times its scale.

    The default is t-ReX's (Sariyildiz et al. 2023, arXiv 2206.15369); Kornblith et al. 2021 (arXiv 2010.16402) take
    0.05. The classifier's `scale` multiplies: it stays at 1.
    """

    kind: Literal["cosine_softmax"] = "cosine_softmax"
    temperature: float = Field(0.1, gt=0)
    classifier: ClassVar[str | None] = "cosine"

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits / self.temperature, targets)
