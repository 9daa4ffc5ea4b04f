"""Class moments of features in one pass: counts, class means, within-class scatter. Fed by `measure` and `watch`.

Pilot shift: all sums are over residuals x - c_y, where the pilot c_k is a sample of class k, or later its mean.
Nothing of the size of |mu|^2 is ever summed, so fp32 products keep fp32 accuracy however far the classes have
collapsed. Sums about common pilots add up over parts and ranks, exactly for any split of the samples.

Letters: B samples of a batch, K classes, C some of them, D feature dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nc_dist.nc.statistics import Statistics
from nc_dist.nc.symmetric import SymmetricSum

SumFn = Callable[[Tensor], Tensor]

ROWS = 1024  # samples that are worked on at a time: bounds the memory beside the sums
CLASSES = 64  # likewise
FAR = 2.0  # a pilot is moved when |c - mu|^2 exceeds this many times the class's variance; a sample's is 1 on average
LARGEST = {torch.float32: 1e17, torch.float64: 1e70}  # features above it could overflow in their products
SMALLEST = {torch.float32: 1e-15, torch.float64: 1e-70}  # below it, all of a batch, they could underflow
FLOAT_BITS = {  # mantissa bits of a type; the type its powers of two are taken in, and the mask of that type's exponent
    torch.bfloat16: (7, torch.float32, torch.int32, 0x7F800000),
    torch.float16: (10, torch.float32, torch.int32, 0x7F800000),
    torch.float32: (23, torch.float32, torch.int32, 0x7F800000),
    torch.float64: (52, torch.float64, torch.int64, 0x7FF0000000000000),
}


class NotFinite(ValueError):
    """Features hold NaN or Inf; `row` is the first such sample of the batch."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


class ClassMoments:
    """Running sums about one pilot per class; `statistics()` gives what the metrics take.

    `dtype` is that of residuals and their products: fp32 is accurate to about 1e-7 of NC1, fp64 to 1e-13 at more than
    twice the cost. Everything is summed in fp64. `blocks` = 1 multiplies whole matrices instead of their upper blocks.
    `rounded_to` is the type the features were computed in, where it is coarser than their own: for `quantum`.
    Takes K D 12 bytes and D^2 8 bytes (fp32), K D 16 and D^2 5 (fp64).
    """

    @torch.inference_mode(False)  # sums outlive the caller's inference mode
    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        blocks: int = 8,
        rounded_to: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_classes < 1 or dim < 1 or blocks < 1 or dtype not in LARGEST:
            found = f"num_classes={num_classes}, dim={dim}, blocks={blocks}, dtype={dtype}"
            raise ValueError(f"{found}: the numbers must be at least 1, dtype float32 or float64")
        self.num_classes, self.dim, self.dtype, self.blocks = num_classes, dim, dtype, blocks
        self.rounded_to = rounded_to
        self.n_K = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.pilots_KD = torch.zeros(num_classes, dim, dtype=dtype, device=device)  # c_k
        self.sums_KD = torch.zeros(num_classes, dim, dtype=torch.float64, device=device)  # s_k, of residuals
        self.squares_K = torch.zeros_like(self.n_K)  # t_k, of their squared norms
        self.products = SymmetricSum(dim, blocks, dtype, device)  # T, of their outer products
        self.quantum_D = torch.zeros(dim, dtype=torch.float64, device=device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, feats_BD: Tensor, labels_B: Tensor) -> None:
        """Add a batch: features of any floating type and integer labels 0..K-1, on this object's device.

        Raises ValueError, with nothing added, for wrong shapes or types, labels out of range, and features that are
        too large to multiply; NotFinite for NaN and Inf.
        """
        self.check(feats_BD, labels_B)
        for feats, labels in zip(torch.split(feats_BD, ROWS), torch.split(labels_B.long(), ROWS), strict=True):
            self._add(feats, labels)

    def statistics(self) -> Statistics:
        """The sums, centred: mu_k = c_k + s_k/n_k, S = T - sum_k s_k s_k^T/n_k, t_k likewise."""
        scatter_DD, within_K = self.products.dense(), self.squares_K.clone()
        means_KD = torch.empty_like(self.sums_KD)
        for part in _parts(self.num_classes):
            scaled_CD = self.sums_KD[part] / self.n_K[part, None].clamp(min=1).sqrt()
            scatter_DD.addmm_(scaled_CD.T, scaled_CD, alpha=-1)
            within_K[part] -= scaled_CD.square().sum(1)
            means_KD[part] = self._means(part)
        return Statistics(self.n_K.clone(), means_KD, scatter_DD, within_K.clamp(min=0), self.quantum_D.clone())

    def merge(self, other: ClassMoments) -> ClassMoments:
        """The moments of both sets of samples; neither is changed. Raises ValueError unless both are of one size."""
        ours, theirs = ((m.num_classes, m.dim, m.blocks, m.dtype) for m in (self, other))
        if ours != theirs:
            raise ValueError(f"cannot merge moments of (K, D, blocks, dtype) = {ours} with {theirs}: make both alike")
        return _merged([self, other], lambda tensor: tensor)

    def all_reduce(self, sum_fn: SumFn) -> ClassMoments:
        """The moments over all ranks, equal on each; every rank must call it, also one without samples.

        `sum_fn` returns the sum over ranks of one fp64 tensor, in place or not; the identity for one process.
        """
        return _merged([self], sum_fn)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the sums, by name: all that `from_state_dict` needs."""
        return {name: tensor.clone() for name, tensor in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        """The sums themselves."""
        state = {name: getattr(self, name) for name in ("n_K", "pilots_KD", "sums_KD", "squares_K", "quantum_D")}
        return {**state, "products": self.products.settle(), "blocks": torch.tensor(self.blocks)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> ClassMoments:
        """A copy of what `state_dict` gave, on its device; raises ValueError for other names, types or shapes."""
        names = sorted(cls(1, 1).state_dict())
        if sorted(state) != names:
            raise ValueError(f"class moments with the entries {sorted(state)}: expected {names}")
        pilots_KD = state["pilots_KD"]
        num_classes, dim = pilots_KD.shape
        moments = cls(num_classes, dim, dtype=pilots_KD.dtype, blocks=int(state["blocks"]), device=pilots_KD.device)
        sums = {**vars(moments), "products": moments.products.total}
        for name in sorted(set(names) - {"blocks"}):
            if (state[name].shape, state[name].dtype) != (sums[name].shape, sums[name].dtype):
                found, expected = (f"{tuple(t.shape)} {t.dtype}" for t in (state[name], sums[name]))
                raise ValueError(f"class moments: {name} is {found}, expected {expected}")
            sums[name].copy_(state[name])
        return moments

    def _add(self, feats_BD: Tensor, labels_B: Tensor) -> None:
        counts_K = torch.bincount(labels_B, minlength=self.num_classes).to(self.n_K)
        self._give_pilots(feats_BD, labels_B, counts_K)
        residuals_BD = (feats_BD - self.pilots_KD.index_select(0, labels_B)).to(self.dtype)
        if self._move_far_pilots(residuals_BD, labels_B, counts_K):
            residuals_BD = (feats_BD - self.pilots_KD.index_select(0, labels_B)).to(self.dtype)
        # s, t and T see the same rounded residuals, so that the rounding cancels in T - s s^T / n.
        self.products.add(residuals_BD)
        self.sums_KD.index_add_(0, labels_B, residuals_BD.double())
        self.squares_K.index_add_(0, labels_B, _squares(residuals_BD))
        self.n_K += counts_K
        self.quantum_D += quantum(feats_BD, self.rounded_to, self.dtype)

    def _give_pilots(self, feats_BD: Tensor, labels_B: Tensor, counts_K: Tensor) -> None:
        """A class that had no sample gets its first one as its pilot."""
        fresh = ((self.n_K == 0) & (counts_K > 0)).nonzero().flatten()
        if len(fresh):
            rows_B = torch.arange(len(labels_B), device=labels_B.device)
            first_K = rows_B.new_full(self.n_K.shape, len(rows_B)).scatter_reduce(0, labels_B, rows_B, "amin")
            self.pilots_KD[fresh] = feats_BD[first_K[fresh]].to(self.dtype)

    def _move_far_pilots(self, residuals_BD: Tensor, labels_B: Tensor, counts_K: Tensor) -> bool:
        """Move pilots that turn out to be outliers to their class's mean, before their residuals are multiplied.

        A class is looked at each time its count reaches a power of two, so all looks together cost a few updates.
        """
        after_K = self.n_K + counts_K
        due_K = after_K.clamp(min=2).log2().floor() > self.n_K.clamp(min=2).log2().floor()
        due = due_K.nonzero().flatten()
        if not len(due):
            return False
        rows = due_K[labels_B].nonzero().flatten()
        place_K = due_K.cumsum(0) - 1
        sums_CD = self.sums_KD[due].index_add(0, place_K[labels_B[rows]], residuals_BD[rows].double())
        squares_C = self.squares_K[due].index_add(0, place_K[labels_B[rows]], _squares(residuals_BD[rows]))
        offsets_CD = sums_CD / after_K[due, None]
        offset_C = offsets_CD.square().sum(1)
        far = (offset_C > FAR * (squares_C / after_K[due] - offset_C)).nonzero().flatten()
        if len(far):
            moved = due[far]
            self._move(moved, (self.pilots_KD[moved] + offsets_CD[far]).to(self.dtype))
        return bool(len(far))

    def _move(self, classes: Tensor | slice, pilots_CD: Tensor) -> None:
        """Take the sums of some classes about other pilots: with m = mu - c, T changes by n (m' m'^T - m m^T)."""
        n_C1 = self.n_K[classes, None]
        old_CD = self.sums_KD[classes] / n_C1.clamp(min=1)
        new_CD = old_CD + (self.pilots_KD[classes].double() - pilots_CD.double())
        self.sums_KD[classes] = n_C1 * new_CD
        self.pilots_KD[classes] = pilots_CD
        old_CD *= n_C1.sqrt()
        new_CD *= n_C1.sqrt()
        self.products.add_difference(new_CD, old_CD)
        self.squares_K[classes] += new_CD.square().sum(1) - old_CD.square().sum(1)

    def _means(self, classes: slice) -> Tensor:
        """(C, D) fp64."""
        return self.pilots_KD[classes] + self.sums_KD[classes] / self.n_K[classes, None].clamp(min=1)

    def _copy(self) -> ClassMoments:
        return ClassMoments.from_state_dict(self._state())

    def check(self, feats_BD: Tensor, labels_B: Tensor) -> None:
        """Raises what `update` would raise."""
        if feats_BD.ndim != 2 or feats_BD.shape[1] != self.dim or feats_BD.dtype not in FLOAT_BITS:
            found = f"{tuple(feats_BD.shape)} {feats_BD.dtype}"
            raise ValueError(f"features are {found}: expected floating point, (B, {self.dim})")
        integral = labels_B.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        if labels_B.shape != feats_BD.shape[:1] or not integral:
            found = f"{tuple(labels_B.shape)} {labels_B.dtype}"
            raise ValueError(f"labels are {found}: expected integers, ({len(feats_BD)},), one for each sample")
        if not len(labels_B):
            return
        low, high = (int(edge) for edge in labels_B.aminmax())
        if low < 0 or high >= self.num_classes:
            outside = labels_B[(labels_B < 0) | (labels_B >= self.num_classes)]
            found = f"label {int(outside[0])} is outside 0..{self.num_classes - 1}"
            raise ValueError(f"{found}, as are {len(outside)} of {len(labels_B)} labels: check num_classes")
        least, most = (float(edge) for edge in feats_BD.aminmax())  # NaN if any is
        peak = max(-least, most)
        if not peak < LARGEST[self.dtype]:
            self._refuse(feats_BD, labels_B)
        if 0 < peak < SMALLEST[self.dtype]:
            raise ValueError(f"features below {SMALLEST[self.dtype]:g} underflow {self.dtype} products: rescale them")

    def _refuse(self, feats_BD: Tensor, labels_B: Tensor) -> None:
        bad_B = ~feats_BD.isfinite().all(1)
        if not bad_B.any():
            raise ValueError(f"features above {LARGEST[self.dtype]:g} overflow {self.dtype} products: rescale them")
        row = int(bad_B.nonzero()[0])
        raise NotFinite(
            f"features are not finite in {int(bad_B.sum())} of {len(bad_B)} samples, first in sample {row} of the "
            f"batch (label {int(labels_B[row])}): check weights and inputs for NaN, and half precision for overflow",
            row,
        )


def quantum(feats_BD: Tensor, rounded_to: torch.dtype | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """sum_i ulp(x_ij)^2 / 12 of each coordinate j, (D,) fp64: the variance that rounding to the features' type adds.

    ulp(x) = 2^(floor(log2 |x|) - m) for m mantissa bits; that power of two is x with its mantissa cleared. `rounded_to`
    is a coarser type than the features' own, where they were computed in it; squares are taken in `dtype`.
    """
    _, wide, bits, exponent = FLOAT_BITS[feats_BD.dtype]
    mantissa = min(FLOAT_BITS[dtype][0] for dtype in (feats_BD.dtype, rounded_to or feats_BD.dtype))
    powers_BD = (feats_BD.to(wide).view(bits) & exponent).view(wide)
    return powers_BD.to(dtype).square().sum(0, dtype=torch.float64) * (4.0**-mantissa / 12)


def _squares(rows_BD: Tensor) -> Tensor:
    """Squared norms of rows, (B,) fp64, accurate to the rows' type."""
    norms_B: Tensor = torch.linalg.vector_norm(rows_BD, dim=1)
    return norms_B.double().square()


def _parts(num_classes: int) -> Iterator[slice]:
    return (slice(low, min(low + CLASSES, num_classes)) for low in range(0, num_classes, CLASSES))


@torch.inference_mode(False)
@torch.no_grad()
def _merged(parts: Sequence[ClassMoments], sum_fn: SumFn) -> ClassMoments:
    """The merge of these parts and those of other ranks: all are taken about the common means, where sums add up."""
    first, *others = [part._copy() for part in parts]
    copies = [first, *others]
    n_K = sum_fn(torch.stack([part.n_K for part in copies]).sum(0))
    for rows in _parts(first.num_classes):
        totals_CD = sum(part.n_K[rows, None] * part._means(rows) for part in copies)
        assert isinstance(totals_CD, Tensor)
        pilots_CD = (sum_fn(totals_CD) / n_K[rows, None].clamp(min=1)).to(first.dtype)
        for part in copies:
            part._move(rows, pilots_CD)
    for part in others:
        first.sums_KD += part.sums_KD
        first.squares_K += part.squares_K
        first.products.total += part.products.total
        first.quantum_D += part.quantum_D
    for rows in _parts(first.num_classes):
        first.sums_KD[rows] = sum_fn(first.sums_KD[rows].contiguous())
    first.n_K = n_K
    first.squares_K, first.quantum_D = sum_fn(first.squares_K), sum_fn(first.quantum_D)
    first.products.total = sum_fn(first.products.total)
    return first
