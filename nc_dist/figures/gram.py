"""The figure of class means: their cosines about the global mean, which are -1/(K-1) where features have collapsed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 200  # classes in a figure; of more, as many at even distances


def shown_classes(num_classes: int) -> list[int]:
    """Which classes are drawn: all of them, or MOST of them at even distances."""
    return [i * num_classes // min(num_classes, MOST) for i in range(min(num_classes, MOST))]


def gram_figure(centred_KD: Tensor) -> Figure:
    """Cosines of the rows, class means minus the global mean, as a matrix of colours from -1 to 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    chosen = shown_classes(len(centred_KD))
    unit = F.normalize(centred_KD[chosen].double(), dim=1)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow((unit @ unit.T).cpu().numpy(), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    figure.colorbar(image, label="cosine")
    number = len(centred_KD)
    which = f"all {number} classes" if len(chosen) == number else f"{len(chosen)} of {number} classes, evenly spaced"
    axes.set_title(f"Class means about the global mean: {which}\nsimplex ETF: {-1 / (number - 1):.3g}", fontsize=9)
    return figure
