"""Any net observed by forward hooks: where its blocks are, how each is pooled, and what enters its classifier.

The rule of the blocks. A net's own Sequentials and ModuleLists are its trunk when they have members that are built of
other modules: the blocks are these members. A net without such a trunk has as blocks its own parts that are built of
other modules (Inception), or the plain layers in its Sequentials (VGG), whichever are more. Left out are the part that
holds the classifier, and what does not run exactly once or gives no features.

Letters: B batch, H x W places, T tokens, C channels, E embedding (what enters the classifier), K classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nc_dist.backbones import Block
from nc_dist.outputs import Outputs

Observe = Callable[[Tensor, Sequence[str]], tuple[Outputs, dict[str, Tensor]]]
Hook = Callable[[nn.Module, Any, Any], None]


@dataclass(frozen=True)
class Place:
    """A block and how its activation becomes features: the class token, or an average over places."""

    block: Block
    over: tuple[int, ...]  # axes of the places; none where the activation is (B, C) already
    start: int = 0  # class and register tokens before the first place

    def pool(self, z: Tensor) -> Tensor:
        """(B, C) of (B, C, H, W), (B, H, W, C), (B, T, C) or (B, C)."""
        if self.block.pooling == "cls":
            return z[:, 0]
        return z[:, self.start :].mean(1) if z.ndim == 3 else z.mean(self.over) if self.over else z


@dataclass(frozen=True)
class Layout:
    """What one forward of a zero image shows of a net."""

    places: tuple[Place, ...]  # in the order in which they run
    classifier: str | None  # the Linear whose output is the net's
    gives: Literal["logits", "embedding"]  # what the net's output is
    dim: int  # E


@contextmanager
def hooked(net: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Forward hooks on the named modules, for as long as the context lasts."""
    with ExitStack() as stack:
        for name, hook in hooks.items():
            stack.enter_context(net.get_submodule(name).register_forward_hook(hook))
        yield


@torch.no_grad()
def layout(net: nn.Module, size: int) -> Layout:
    """Run a net in eval mode once; errors of the forward are the net's own."""
    shapes: dict[str, torch.Size] = {}
    linear: dict[str, tuple[int, Tensor]] = {}
    runs: Counter[str] = Counter()

    def watch(name: str) -> Hook:
        def hook(module: nn.Module, inputs: Any, out: Any) -> None:
            runs[name] += 1
            if isinstance(out, Tensor):
                shapes[name] = out.shape
                if isinstance(module, nn.Linear):
                    linear[name] = (module.in_features, out)

        return hook

    with hooked(net, {name: watch(name) for name, _ in net.named_modules() if name}):
        output = net(torch.zeros(1, 3, size, size))
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise ValueError("gives no (B, K) logits or (B, E) embedding")
    classifier = next((name for name, (_, out) in linear.items() if out is output), None)
    blocks = set(block_names(net, classifier))
    found = places(net, {name: shape for name, shape in shapes.items() if name in blocks and runs[name] == 1})
    if classifier:
        return Layout(found, classifier, "logits", linear[classifier][0])
    if getattr(net, "num_classes", None) == 0:
        return Layout(found, None, "embedding", output.shape[1])
    if not found:
        raise ValueError("has neither blocks nor a linear classifier, so there are no features to take")
    return Layout(found, None, "logits", found[-1].block.dim)


def block_names(net: nn.Module, classifier: str | None) -> list[str]:
    """Names of the modules that may be blocks, by the rule at the top."""
    head = classifier.split(".")[0] if classifier else None
    parts = {name: child for name, child in net.named_children() if name != head}
    trunks = [
        dict(_members(name, part)) for name, part in parts.items() if isinstance(part, nn.Sequential | nn.ModuleList)
    ]
    built = [name for trunk in trunks if any(map(_is_built, trunk.values())) for name in trunk]
    layers = [name for trunk in trunks for name in trunk]
    others = [
        name for name, part in parts.items() if _is_built(part) and not isinstance(part, nn.Sequential | nn.ModuleList)
    ]
    return built or max(layers, others, key=len)


def _members(name: str, container: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in container.named_children():
        if isinstance(child, nn.ModuleList):  # never runs itself
            yield from _members(f"{name}.{child_name}", child)
        else:
            yield f"{name}.{child_name}", child


def _is_built(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def places(net: nn.Module, shapes: Mapping[str, torch.Size]) -> tuple[Place, ...]:
    """How to pool activations of these shapes, for one square image; shapes of other kinds are left out.

    Of four axes the two that are equal are the places; where three are, the net's other blocks tell which.
    """
    maps = [shape for shape in shapes.values() if len(shape) == 4]
    last = any(h == w != c for _, h, w, c in maps) and not any(h == w != c for _, c, h, w in maps)
    found = []
    for name, shape in shapes.items():
        match len(shape):
            case 4:
                found.append(Place(Block(name, shape[3 if last else 1], "average"), (1, 2) if last else (2, 3)))
            case 3:
                found.append(_of_tokens(net, name, shape))
            case 2:
                found.append(Place(Block(name, shape[1], "average"), ()))
    return tuple(found)


def _of_tokens(net: nn.Module, name: str, shape: torch.Size) -> Place:
    """The class token, if this block has one and the net's own pooling is not an average; else mean over places."""
    if math.isqrt(shape[1]) ** 2 == shape[1]:  # the places of a square image and nothing else
        return Place(Block(name, shape[2], "average"), (1,))
    has_token = any(getattr(net, token, None) is not None for token in ("cls_token", "class_token"))
    if has_token and not str(getattr(net, "global_pool", "token")).startswith("avg"):
        return Place(Block(name, shape[2], "cls"), ())
    return Place(Block(name, shape[2], "average"), (1,), start=getattr(net, "num_prefix_tokens", int(has_token)))


def observer(net: nn.Module, layout: Layout, has_logits: bool) -> Observe:
    """`Model.observe` for any net: outputs and the named blocks' pooled features, in one forward.

    Features and embedding are what enters the classifier; without a Linear one the net's output, or the last block's
    pooled features where that output is logits. Hooks are gone when it returns or raises.
    """
    known = {place.block.name: place for place in layout.places}
    fallback = layout.places[-1].block.name if layout.classifier is None and layout.gives == "logits" else None

    def observe(x: Tensor, names: Sequence[str]) -> tuple[Outputs, dict[str, Tensor]]:
        found: dict[str, Tensor] = {}
        entering: list[Tensor] = []

        def pooled(place: Place) -> Hook:
            def hook(module: nn.Module, inputs: Any, out: Any) -> None:
                found[place.block.name] = place.pool(out)  # now: what follows may work in place

            return hook

        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"block={unknown[0]!r}: no such block; this model has {', '.join(known)}")
        hooks = {name: pooled(known[name]) for name in {*names, *filter(None, [fallback])}}
        if layout.classifier:
            hooks[layout.classifier] = lambda module, inputs, out: entering.append(inputs[0])
        with hooked(net, hooks):
            output: Tensor = net(x)
        embedding = entering[0] if entering else found[fallback] if fallback else output
        logits = output if has_logits and layout.gives == "logits" else None
        return Outputs(embedding, embedding, logits), {name: found[name] for name in known if name in names}

    return observe
