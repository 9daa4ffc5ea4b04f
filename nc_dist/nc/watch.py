"""Neural collapse of any net in anyone's own loop: forward hooks, `update(labels)` after each forward, `metrics()`.

Letters: B samples of a batch, C channels, H x W places, T tokens, D feature dimensions, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nc_dist.nc.halves import HalvedMoments
from nc_dist.nc.metrics import CLASSIFIER_METRICS, Summary, summary
from nc_dist.nc.second_pass import Classifier, SecondPass, combined
from nc_dist.nc.statistics import Statistics
from nc_dist.nc.watched import INPUT, Pooling, as_labels, classifier_at, pooled, submodules

SECOND_PASS = ("ncc_acc1", "nc4", "nc1_per_class", "h_score_shrunk", "vci_shrunk")
NOT_KEPT = "it takes a second look at the features, which cache=False does not keep"


class watch:  # lower case, as contextlib.suppress is: read in `with nc.watch(...)` and nowhere else
    """Watch layers of a net while it runs, in training or evaluation, in one process or many.

        with nc.watch(model, ["layer3", "layer4", "input:fc"], num_classes) as w:
            for x, y in loader:
                model(x)
                w.update(y)
        metrics = w.metrics()

    `NAME` is a submodule's output, `input:NAME` its first input, by its name in the model or in what that wraps (DDP,
    DeepSpeed, torch.compile); of tuples and dicts the first floating tensor. Nothing that is computed changes; the
    hooks are gone when the block is left. Raises ValueError for names that there are not.

    Features keep their type: (B, C, H, W) averaged over places, (B, T, C) over tokens, (B, C) as they are; each summary
    states its `pooling`. `pooling={layer: "cls"}` takes the first token, "channels_last" averages (B, H, W, C).

    With `cache` this rank's features stay in host memory, `cache_bytes` of them, for metrics of the second pass, which
    are None without. Sums are fp64: only `nc1_split_half` depends on which rank has which sample.

    Over many ranks every sample given counts. DistributedSampler repeats samples to fill up the last batch, and these
    count twice: for exact numbers shard without padding. All ranks of `group` must call `metrics()`, not rank 0 alone.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], num_classes: int, group: dist.ProcessGroup | None = None,
        *, cache: bool = True, pooling: Mapping[str, Pooling] | None = None,
    ) -> None:  # fmt: skip
        self._modules, self._asked = submodules(model, layers), dict(pooling or {})
        if self._asked.keys() - self._modules.keys():
            raise ValueError(f"pooling={self._asked} of layers that are not watched: {layers} are")
        self.num_classes, self.group, self.cache = num_classes, group, cache
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))  # where no batch tells
        self._hooks = ExitStack()
        self._found: dict[str, Tensor] = {}  # what the last forward left, until `update` takes it
        self._pooling: dict[str, str] = {}
        self._moments: dict[str, HalvedMoments] = {}
        self._batches: list[tuple[Tensor, dict[str, Tensor]]] = []

    def __enter__(self) -> watch:
        for layer, module in self._modules.items():
            before = partial(module.register_forward_pre_hook, with_kwargs=True)
            register = before if layer.startswith(INPUT) else module.register_forward_hook
            self._hooks.enter_context(register(partial(self._take, layer)))
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._hooks.close()
        left, self._found = self._found, {}
        if left and error is None:
            raise ValueError("no update(labels) after the last forward: its features would be in no metric")

    @torch.inference_mode(False)  # so that what is kept outlives the caller's inference mode
    @torch.no_grad()
    def update(self, labels_B: Tensor | Sequence[int]) -> None:
        """Add what the last forward left, with its integer labels 0..K-1: all layers or, with an error, none.

        `labels_B` is a tensor or what torch makes one of, a list or a numpy array.
        Raises ValueError, naming the layer, without a forward before it and for wrong shapes, types or labels, and
        NotFinite for NaN and Inf. The features are taken in either case: the next forward starts anew.
        """
        found, self._found = self._found, {}
        labels_B = as_labels(labels_B)
        if idle := [layer for layer in self._modules if layer not in found]:
            raise ValueError(f"update(labels) without a forward of {idle} before it")
        moments = {layer: self._moments_of(layer, feats_BD) for layer, feats_BD in found.items()}
        for layer, feats_BD in found.items():
            try:
                moments[layer].first.check(feats_BD, labels_B.to(feats_BD.device))
            except ValueError as why:
                why.args = (f"{layer}: {why}",)
                raise
        if not len(labels_B):
            return
        self._moments = moments
        for layer, feats_BD in found.items():
            moments[layer].update(feats_BD, labels_B.to(feats_BD.device, torch.int64))
        if self.cache:
            kept = {layer: feats_BD.cpu() for layer, feats_BD in found.items()}
            self._batches.append((labels_B.to("cpu", torch.int64, copy=True), kept))

    @property
    def cache_bytes(self) -> int:
        """Host memory that the features and labels kept by this rank take."""
        return sum(t.nbytes for labels_B, kept in self._batches for t in (labels_B, *kept.values()))

    @torch.inference_mode(False)
    @torch.no_grad()
    def metrics(self, classifier: Classifier | None = None) -> dict[str, Summary]:
        """`summary` and second pass of every layer over the ranks of the group, equal on each; all must call it.

        What takes a classifier has a value at `input:NAME` with NAME a Linear of K outputs, whose weights are read now;
        `classifier`, (weight (K, D), bias (K,) or None), stands in for it at the one `input:` layer. Raises ValueError
        for another shape of these, when no rank has seen a sample, and when ranks differ in the features' shape.
        """
        inputs = [layer for layer in self._modules if layer.startswith(INPUT)]
        if classifier is not None and len(inputs) != 1:
            raise ValueError(f"classifier= acts on the one `input:` layer, but there are {len(inputs)}: {inputs}")
        return {layer: self._summary(layer, *facts, classifier) for layer, facts in self._agreed().items()}

    def _summary(self, layer: str, dim: int, pooling: str, given: Classifier | None) -> Summary:
        # Once: the summary and the second pass take the same statistics.
        stats = self._moments_of(layer, torch.empty(0, dim, device=self._device)).all_reduce(self._sum).statistics()
        acting = classifier_at(layer, self._modules[layer], stats.means_KD, given)
        classifier = None if isinstance(acting, str) else acting
        first = summary(stats, *(classifier or (None, None)))
        values = combined(first, self._second_pass(layer, stats, classifier))
        if isinstance(acting, str):
            values["reasons"] |= dict.fromkeys([*CLASSIFIER_METRICS, "nc4"], acting)
        return {**values, "pooling": pooling}

    def _second_pass(self, layer: str, stats: Statistics, classifier: Classifier | None) -> Summary:
        if not self.cache:
            return {**dict.fromkeys(SECOND_PASS), "reasons": dict.fromkeys(SECOND_PASS, NOT_KEPT)}
        looks, device = SecondPass(stats, classifier), stats.n_K.device
        for labels_B, kept in self._batches:
            looks.update(kept[layer].to(device), labels_B.to(device))
        return looks.metrics(self._sum)

    def _moments_of(self, layer: str, feats_BD: Tensor) -> HalvedMoments:
        options = {"dtype": torch.float64, "device": feats_BD.device}
        return self._moments.get(layer) or HalvedMoments(self.num_classes, feats_BD.shape[1], **options)

    def _agreed(self) -> dict[str, tuple[int, str]]:
        """Dimensions and pooling of each layer: ranks without a sample learn them from the others."""
        mine = {layer: (moments.first.dim, self._pooling[layer]) for layer, moments in self._moments.items()}
        ranks = [mine]
        if dist.is_initialized():
            ranks *= dist.get_world_size(self.group)
            dist.all_gather_object(ranks, mine, group=self.group)
        seen = [facts for facts in ranks if facts]
        if not seen:
            raise ValueError("no rank has seen a sample: in the `with` block, run the model and then update(labels)")
        if any(facts != seen[0] for facts in seen):
            raise ValueError(f"ranks differ in the dimensions or pooling of what they watch: {ranks}")
        return seen[0]

    def _sum(self, tensor: Tensor) -> Tensor:
        if dist.is_initialized():
            dist.all_reduce(tensor, group=self.group)
        return tensor

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take(self, layer: str, _: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """The hook of a layer: `last` is the output, or before the forward the keyword arguments."""
        if torch._C._current_graph_task_id() != -1:
            return  # within backward: activation checkpointing runs the forward again
        if layer in self._found:
            raise ValueError(f"{layer} ran again before update(labels): the model, or within it this module, ran twice")
        value = (*args, *last.values()) if layer.startswith(INPUT) else last
        self._found[layer], self._pooling[layer] = pooled(layer, value, self._asked.get(layer))
