"""Supervised contrastive loss, the form L_out of Khosla et al. 2020 (arXiv 2004.11362), eq. 2."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nc_dist.losses.term import Loss, same_class
from nc_dist.outputs import Outputs


class SupCon(Loss):
    """Pull together the l2-normalised embeddings of one class, push apart the rest.

    loss = mean over anchors i with positives of  -(1/|P(i)|) sum_{p in P(i)} log softmax_{a != i}(z_i z_a / tau)[p].

    With one view of each image, the only sample of its class in the batch has no positive: it is no anchor, is counted
    (train/supcon_left_out), and is still a negative of the others. With two views there are none.
    """

    kind: Literal["supcon"] = "supcon"
    temperature: float = Field(0.1, gt=0)
    two_views: bool = True
    uses_logits: ClassVar[bool] = False
    soft: ClassVar[bool] = False
    least: ClassVar[int] = 2
    paired: ClassVar[bool] = True

    @property
    def views(self) -> int:
        return 2 if self.two_views else 1

    @property
    def coupled(self) -> bool:
        return True

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        labels_B, normal = self.labels(targets), F.normalize(outputs.embedding_BE, dim=1)
        similarity_BB = normal @ normal.T / self.temperature
        self_BB = torch.eye(len(labels_B), dtype=torch.bool, device=labels_B.device)
        positive_BB = same_class(labels_B) & ~self_BB
        log_prob_BB = similarity_BB - similarity_BB.masked_fill(self_BB, -torch.inf).logsumexp(1, keepdim=True)
        positives_B = positive_BB.sum(1)
        per_anchor_B = -(log_prob_BB * positive_BB).sum(1) / positives_B.clamp(min=1)
        return per_anchor_B.sum() / (positives_B > 0).sum().clamp(min=1)
