"""Class moments of features in one pass: counts, class means, within-class scatter. Fed by `measure`.

Pilot shift: the first sample of class k on this rank is its pilot c_k; all sums are over residuals x - c_y.
Nothing of the size of |mu|^2 is ever summed, so fp32 products keep fp32 accuracy however far the classes have
collapsed. The merge is exact for any split of the samples over ranks (Chan, Golub & LeVeque 1983).

Letters: B samples of a batch, K classes, D feature dimensions, P parts to merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SumFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Centred statistics of labelled features, all fp64; an empty class has count, mean and scatter 0."""

    n_K: Tensor  # samples of each class
    means_KD: Tensor  # mu_k
    scatter_DD: Tensor  # S = sum_i (x_i - mu_{y_i})(x_i - mu_{y_i})^T: pooled over classes, not divided
    within_K: Tensor  # t_k = sum_{i in k} |x_i - mu_k|^2, not divided


class ClassMoments:
    """Running sums about one pilot per class, all fp64; `statistics()` gives what the metrics take."""

    def __init__(self, num_classes: int, dim: int, *, device: torch.device | str = "cpu") -> None:
        if num_classes < 1 or dim < 1:
            raise ValueError(f"num_classes={num_classes}, dim={dim}: both must be at least 1")
        self.n_K = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.pilots_KD = torch.zeros(num_classes, dim, dtype=torch.float64, device=device)  # c_k
        self.sums_KD = torch.zeros_like(self.pilots_KD)  # s_k, sum of residuals
        self.squares_K = torch.zeros_like(self.n_K)  # sum of their squared norms
        self.products_DD = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # T, of their outer products

    @torch.no_grad()
    def update(self, feats_BD: Tensor, labels_B: Tensor) -> None:
        """Add a batch: features of any floating type and integer labels 0..K-1, on this object's device.

        Residuals are multiplied in fp32, or in fp64 when the features are; all sums are kept in fp64.
        Raises ValueError, with nothing added, for wrong shapes or types, labels out of range, and features
        that are not finite or too large to multiply.
        """
        self._check(feats_BD, labels_B)
        labels_B, exact_BD = labels_B.long(), feats_BD.double()
        pilots_KD = self._pilots_with(exact_BD, labels_B)
        product_dtype = torch.float64 if feats_BD.dtype == torch.float64 else torch.float32
        factors_BD = (exact_BD - pilots_KD[labels_B]).to(product_dtype)
        # s and t see the residuals as rounded for T, so that the rounding cancels in T - s s^T / n.
        residuals_BD = factors_BD.double()
        squares_B = residuals_BD.square().sum(1)
        if not squares_B.sum() < torch.finfo(product_dtype).max:  # bounds every entry of the product
            raise ValueError(f"features too large: their squares overflow {product_dtype}; rescale them")
        self.pilots_KD = pilots_KD
        with torch.autocast(feats_BD.device.type, enabled=False):
            # TF32, where allowed, costs at most 4e-5 here: residuals are small, whatever the means are.
            self.products_DD += factors_BD.T @ factors_BD
        self.n_K += torch.bincount(labels_B, minlength=len(self.n_K))
        self.sums_KD.index_add_(0, labels_B, residuals_BD)
        self.squares_K.index_add_(0, labels_B, squares_B)

    def statistics(self) -> Statistics:
        """The sums, centred: mu_k = c_k + s_k/n_k, S = T - sum_k s_k s_k^T/n_k, t_k likewise."""
        n_K1 = self.n_K.clamp(min=1)[:, None]
        scaled_KD = self.sums_KD / n_K1.sqrt()
        return Statistics(
            n_K=self.n_K.clone(),
            means_KD=self.pilots_KD + self.sums_KD / n_K1,
            scatter_DD=self.products_DD - scaled_KD.T @ scaled_KD,
            within_K=self.squares_K - scaled_KD.square().sum(1),
        )

    def merge(self, other: ClassMoments) -> ClassMoments:
        """The moments of both sets of samples; neither is changed. Raises ValueError unless K and D agree."""
        ours, theirs = tuple(self.pilots_KD.shape), tuple(other.pilots_KD.shape)
        if ours != theirs:
            raise ValueError(f"cannot merge moments of (K, D) = {ours} with {theirs}: make both of one size")
        return _combined([self, other], lambda tensor: tensor)

    def all_reduce(self, sum_fn: SumFn) -> ClassMoments:
        """The moments over all ranks, equal on each; every rank must call it, also one without samples.

        `sum_fn` returns the sum over ranks of one tensor, in place or not; the identity for one process.
        It is called twice, with fp64 tensors of (K, D+1) and of (D*D + K,).
        """
        return _combined([self], sum_fn)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the sums, by name."""
        return {name: value.clone() for name, value in vars(self).items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> ClassMoments:
        """A copy of what `state_dict` gave, on its device; raises ValueError for other names or shapes."""
        names = sorted(vars(cls(1, 1)))
        if sorted(state) != names:
            raise ValueError(f"class moments with the entries {sorted(state)}: expected {names}")
        num_classes, dim = state["pilots_KD"].shape
        moments = cls(num_classes, dim, device=state["pilots_KD"].device)
        for name, sums in vars(moments).items():
            if (state[name].shape, state[name].dtype) != (sums.shape, sums.dtype):
                found = f"{tuple(state[name].shape)} {state[name].dtype}"
                raise ValueError(f"class moments: {name} is {found}, expected {tuple(sums.shape)} {sums.dtype}")
            sums.copy_(state[name])
        return moments

    def _pilots_with(self, feats_BD: Tensor, labels_B: Tensor) -> Tensor:
        """The pilots, now also of classes that had none: their first samples in this batch. (K, D)."""
        rows_B = torch.arange(len(labels_B), device=labels_B.device)
        first_K = rows_B.new_full(self.n_K.shape, len(rows_B)).scatter_reduce(0, labels_B, rows_B, "amin")
        pilot_rows = rows_B[(first_K[labels_B] == rows_B) & (self.n_K[labels_B] == 0)]
        if not len(pilot_rows):
            return self.pilots_KD
        return self.pilots_KD.index_put((labels_B[pilot_rows],), feats_BD[pilot_rows])

    def _check(self, feats_BD: Tensor, labels_B: Tensor) -> None:
        num_classes, dim = self.pilots_KD.shape
        if feats_BD.ndim != 2 or feats_BD.shape[1] != dim or not feats_BD.is_floating_point():
            found = f"{tuple(feats_BD.shape)} {feats_BD.dtype}"
            raise ValueError(f"features are {found}: expected floating point, (B, {dim})")
        integral = labels_B.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        if labels_B.shape != feats_BD.shape[:1] or not integral:
            found = f"{tuple(labels_B.shape)} {labels_B.dtype}"
            raise ValueError(f"labels are {found}: expected integers, ({len(feats_BD)},), one for each sample")
        outside = labels_B[(labels_B < 0) | (labels_B >= num_classes)]
        if len(outside):
            found = f"label {int(outside[0])} is outside 0..{num_classes - 1}"
            raise ValueError(f"{found}, as are {len(outside)} of {len(labels_B)} labels: check num_classes")
        finite_BD = feats_BD.isfinite()
        if not finite_BD.all():
            values, samples = int((~finite_BD).sum()), int((~finite_BD.all(1)).sum())
            raise ValueError(
                f"{values} feature values are not finite, in {samples} of {len(feats_BD)} samples: "
                "check the weights and inputs for NaN, and half precision for overflow"
            )


def _combined(parts: Sequence[ClassMoments], sum_fn: SumFn) -> ClassMoments:
    """The merge of these parts and those of other ranks: first the means, then the scatter about them.

    S = sum_p S_p + E_p^T E_p, where E_p has rows sqrt(n_pk) (mu_pk - mu_k); t_k likewise (Chan et al. 1983).
    The common means become the pilots.
    """
    local = [part.statistics() for part in parts]
    num_classes, dim = local[0].means_KD.shape
    merged = ClassMoments(num_classes, dim, device=local[0].means_KD.device)

    n_PK1 = torch.stack([part.n_K for part in local])[..., None]
    means_PKD = torch.stack([part.means_KD for part in local])
    totals = sum_fn(torch.cat([n_PK1, n_PK1 * means_PKD], dim=2).sum(0))
    merged.n_K.copy_(totals[:, 0])
    merged.pilots_KD.copy_(totals[:, 1:] / totals[:, :1].clamp(min=1))

    shifts_PKD = n_PK1.sqrt() * (means_PKD - merged.pilots_KD)
    stacked = shifts_PKD.flatten(0, 1)
    scatter_DD = torch.stack([part.scatter_DD for part in local]).sum(0) + stacked.T @ stacked
    within_K = torch.stack([part.within_K for part in local]).sum(0) + shifts_PKD.square().sum((0, 2))
    totals = sum_fn(torch.cat([scatter_DD.flatten(), within_K]))
    merged.products_DD.copy_(totals[: dim * dim].view(dim, dim))
    merged.squares_K.copy_(totals[dim * dim :])
    return merged
