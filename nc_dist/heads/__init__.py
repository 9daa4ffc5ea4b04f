"""What stands on top of the backbone, one file each. Pure torch.

Projection heads are trained on the backbone's features and dropped at transfer: `build(dim) -> (module, output size)`.
Classifiers take what the head puts out: `build(dim, num_classes) -> module`, of which `effective()` gives the weight
(K, E) and the bias (K,) of the linear map with the classifier's argmax: NC and probes see all kinds as linear ones.
"""

from typing import Annotated

from pydantic import Field

from nc_dist.heads.cosine_classifier import Cosine, CosineClassifier
from nc_dist.heads.etf import ETFHead
from nc_dist.heads.etf_classifier import ETF, ETFClassifier
from nc_dist.heads.linear import LinearHead
from nc_dist.heads.linear_classifier import Linear, LinearClassifier
from nc_dist.heads.mlp import MLPHead
from nc_dist.heads.none import NoHead
from nc_dist.heads.trex import TRexHead

HeadSpec = Annotated[NoHead | LinearHead | MLPHead | TRexHead | ETFHead, Field(discriminator="kind")]
ClassifierSpec = Annotated[LinearClassifier | ETFClassifier | CosineClassifier, Field(discriminator="kind")]
Classifier = Linear | ETF | Cosine

__all__ = [
    "Classifier",
    "ClassifierSpec",
    "CosineClassifier",
    "ETFClassifier",
    "ETFHead",
    "HeadSpec",
    "Linear",
    "LinearClassifier",
    "LinearHead",
    "MLPHead",
    "NoHead",
    "TRexHead",
]
