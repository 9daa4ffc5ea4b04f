"""The variability of features within their class, which neural collapse takes away."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from nc_dist.losses.term import Regulariser, same_class
from nc_dist.outputs import Outputs


class WithinClass(Regulariser):
    """Mean over samples of |h_i - m_y(i)|^2, h the features before the head, m_k their mean over class k in the global
    batch: the trace of the within-class covariance Sigma_W of neural collapse. A negative weight keeps variability.

    The only sample of its class is its own mean and is left out; train/within_class_left_out counts them. Without
    `normalise` the value has no upper bound, and a negative weight drives it up for ever.
    """

    kind: Literal["within_class"] = "within_class"
    normalise: bool = True  # features to length 1: the value is then at most 1
    soft: ClassVar[bool] = False
    paired: ClassVar[bool] = True

    @property
    def coupled(self) -> bool:
        return True

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        features = F.normalize(outputs.features_Bd, dim=1) if self.normalise else outputs.features_Bd
        same_BB = same_class(self.labels(targets)).to(features.dtype)
        size_B = same_BB.sum(1)
        means_Bd = same_BB @ features / size_B[:, None]  # of each sample's class
        return (features - means_Bd).square().sum() / (size_B > 1).sum().clamp(min=1)
