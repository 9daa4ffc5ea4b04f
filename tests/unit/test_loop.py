"""The loop in one process: a step's gradient is that of the global batch, however it is cut into micro-batches."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from nc_dist.adversary import PGD, AdversarySpec, NoAdversary
from nc_dist.backbones import SmallResNetSpec, from_vit
from nc_dist.data.augment import InputSpec, normalise
from nc_dist.data.mix import Cutmix, MixSpec, Mixup, NoMix
from nc_dist.data.stream import Batch
from nc_dist.engine import TorchSpec
from nc_dist.engine.torch_engine import TorchEngine
from nc_dist.errors import InputError
from nc_dist.heads import MLPHead
from nc_dist.identity import hash_text
from nc_dist.loop import Step, every, train_steps
from nc_dist.losses import CrossEntropy, LossSpec, SupCon
from nc_dist.model import Model, ModelSpec
from nc_dist.objective import Objective
from nc_dist.optim import SGD, Schedule
from nc_dist.outputs import Outputs
from nc_dist.world import World

INPUT = InputSpec(size=8)
MICRO = 6


def model(kind: str = "resnet", classes: int = 3, dropout: float = 0.0) -> Model:
    torch.manual_seed(0)
    spec = ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=2), head=MLPHead(output=4))
    if kind == "resnet":
        return Model(spec, classes)
    net = VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8, dropout=dropout)
    net.heads = nn.Identity()
    return Model(spec, classes, backbone=from_vit(net))


def data(steps: int, micros: int, views: int = 1) -> list[list[Batch]]:
    random = torch.Generator().manual_seed(3)

    def batch() -> Batch:
        images = torch.randint(0, 256, (MICRO * views, 3, 8, 8), dtype=torch.uint8, generator=random)
        return Batch(images, torch.randint(0, 3, (MICRO,), generator=random), torch.arange(MICRO))

    return [[batch() for _ in range(micros)] for _ in range(steps)]


def run(
    trained: Model,
    loss: LossSpec,
    batches: list[list[Batch]],
    steps: int | None = None,
    start: int = 0,
    seed: int = 0,
    mix: MixSpec | None = None,
    momentum: float = 0,
    ema: float | None = None,
    adversary: AdversarySpec | None = None,
    averages: dict[str, Tensor] | None = None,
    **settings: Any,
) -> Iterator[Step]:
    """The steps; `averages` gets the averaged weights at the end."""
    spec = TorchSpec.model_validate({"precision": "fp64", **settings})
    engine = TorchEngine(trained, spec, SGD(momentum=momentum, nesterov=momentum > 0, weight_decay=0), World(), ema)
    schedule = Schedule(kind="constant", warmup=0)
    objective = Objective(loss, INPUT, len(batches[0]), seed, 0.1, schedule, steps or len(batches), mix or NoMix())
    objective = replace(objective, adversary=adversary or NoAdversary())
    yield from train_steps(engine, batches, objective, World(), start)
    if averages is not None:
        with engine.averaged():
            averages |= {name: value.clone() for name, value in trained.state_dict().items()}


def by_hand(trained: Model, loss: LossSpec, micros: list[Batch]) -> float:
    """One step of plain SGD on the loss of the whole batch, forwards by micro-batch; its loss."""
    trained.double().train()
    outputs = [trained(normalise(b.images, INPUT, torch.float64)) for b in micros]
    labels = [b.labels.repeat(loss.views) for b in micros]
    if loss.coupled:
        rows = torch.cat([o.embedding_BE for o in outputs])
        value = loss(Outputs(rows, rows, None), torch.cat(labels))
    else:
        value = torch.stack([loss(o, y) for o, y in zip(outputs, labels, strict=True)]).mean()
    value.backward()
    with torch.no_grad():
        for p in trained.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    return float(value.detach())


def various(untrained: Model, micros: list[Batch]) -> Model:
    """With another classifier, which finds each class somewhere in the batch, so that accuracies can differ."""
    assert untrained.classifier is not None
    nn.init.normal_(untrained.classifier.weight)
    with torch.no_grad():
        logits = torch.cat([copy.deepcopy(untrained).train()(normalise(b.images, INPUT)).logits_BK for b in micros])
        untrained.classifier.bias -= logits.mean(0)
    return untrained


def largest_difference(a: Model, b: Model) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


@pytest.mark.parametrize("micros", [1, 4])
@pytest.mark.parametrize("loss", [CrossEntropy(), SupCon()], ids=lambda loss: loss.kind)
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_step_follows_the_gradient_of_the_global_batch(kind: str, loss: LossSpec, micros: int) -> None:
    ours = model(kind, classes=3 if loss.uses_logits else 0)
    theirs, batches = copy.deepcopy(ours), data(1, micros, loss.views)
    (step,) = run(ours, loss, batches)
    value = by_hand(theirs, loss, batches[0])
    assert (
        largest_difference(ours, theirs)
        < 1e-12
        < largest_difference(ours, model(kind, 3 if loss.uses_logits else 0).double())
    )
    assert step.metrics()["train/loss"] == pytest.approx(value, rel=1e-12)


def test_metrics_are_of_the_whole_step() -> None:
    trained, batches = model(), data(1, 3)
    plain = copy.deepcopy(trained).double().train()
    logits: list[Tensor] = [plain(normalise(b.images, INPUT, torch.float64)).logits_BK for b in batches[0]]
    hits = sum(int((x.argmax(1) == b.labels).sum()) for x, b in zip(logits, batches[0], strict=True))
    (step,) = run(trained, CrossEntropy(), batches)
    metrics = step.metrics()
    assert metrics["train/acc1"] == hits / (3 * MICRO)
    assert metrics["train/lr"] == 0.1 and metrics["train/grad_norm"] > 0
    assert step.number == 1 and step.applied and not step.stop_requested
    assert 0 <= step.data_seconds <= step.seconds


def test_without_a_classifier_there_is_no_accuracy() -> None:
    (step,) = run(model(classes=0), SupCon(), data(1, 2, views=2))
    assert "train/acc1" not in step.metrics()


@pytest.mark.parametrize("mix", [Mixup(alpha=1), Cutmix()], ids=lambda mix: mix.kind)
def test_a_mixed_step_follows_the_soft_targets_cross_entropy_of_each_micro_batchs_own_mixture(mix: MixSpec) -> None:
    ours, batches = various(model(), *data(1, 3)), data(1, 3)
    theirs = copy.deepcopy(ours).double().train()
    (step,) = run(ours, CrossEntropy(), batches, mix=mix)
    losses, hits, unmixed = [], 0.0, 0
    for j, batch in enumerate(batches[0]):
        random = np.random.default_rng(int(hash_text(f"0/0/{j}"), 16))
        images, partner, share = mix.mixed(normalise(batch.images, INPUT, torch.float64), random)
        assert partner is not None and 0 < share < 1
        one_hot = F.one_hot(batch.labels, 3).double()
        target = share * one_hot + (1 - share) * one_hot[partner]
        logits = theirs(images).logits_BK
        losses.append(F.cross_entropy(logits, target))
        hits += float(target[range(MICRO), logits.argmax(1)].sum())
        unmixed += int((logits.argmax(1) == batch.labels).sum())
    value = torch.stack(losses).mean()
    value.backward()
    with torch.no_grad():
        for p in theirs.parameters():
            p -= 0.1 * p.grad  # type: ignore[operator]
    assert largest_difference(ours, theirs) < 1e-12
    assert step.metrics()["train/loss"] == pytest.approx(float(value.detach()), rel=1e-12)
    assert step.metrics()["train/acc1"] == pytest.approx(hits / (3 * MICRO), rel=1e-12) != unmixed / (3 * MICRO)


@pytest.mark.parametrize("mix", [Mixup(alpha=1), Cutmix()], ids=lambda mix: mix.kind)
def test_micro_batches_never_mix(mix: MixSpec) -> None:
    """Each micro-batch has one colour; so has what the model sees of it."""
    trained, batches = model(), data(3, 4)
    for j, batch in enumerate(batch for step in batches for batch in step):
        batch.images[:] = 20 * j
    seen: list[Tensor] = []
    trained.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    list(run(trained, CrossEntropy(), batches, mix=mix))
    assert len(seen) == 12
    for images, batch in zip(seen, (batch for step in batches for batch in step), strict=True):
        torch.testing.assert_close(images, normalise(batch.images, INPUT, torch.float64))


def test_mixtures_depend_on_seed_step_and_micro_batch_and_on_nothing_drawn_before() -> None:
    def seen(state: int, seed: int, start: int = 0) -> list[Tensor]:
        trained, batches, images = model(), data(1, 2), []
        batches[0][1] = batches[0][0]
        trained.register_forward_pre_hook(lambda module, args: images.append(args[0].clone()))
        torch.manual_seed(state)
        np.random.seed(state)
        list(run(trained, CrossEntropy(), batches * (3 - start), seed=seed, steps=3, start=start, mix=Mixup(alpha=1)))
        return images

    whole = seen(1, 0)
    assert all(a.equal(b) for a, b in zip(whole, seen(2, 0), strict=True))
    assert all(a.equal(b) for a, b in zip(whole[2:], seen(2, 0, start=1), strict=True))
    assert len({image.numpy().tobytes() for image in whole + seen(1, 9)}) == 12


def test_an_objective_that_mixes_what_the_loss_cannot_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.mix\.kind='mixup': loss\.kind='supcon'"):
        list(run(model(classes=0), SupCon(), data(1, 1, views=2), mix=Mixup()))


def test_running_statistics_get_one_update_a_step_with_the_mean_over_its_micro_batches() -> None:
    """For a coupled loss as well, whose embeddings take two forwards; the first layer shows it."""
    trained, batches = model(classes=0), data(3, 4, views=2)
    conv = copy.deepcopy(trained.backbone.net.conv1).double()
    norms = [m for m in trained.modules() if isinstance(m, nn.BatchNorm2d)]
    steps = run(trained, SupCon(), batches)
    next(steps)
    with torch.no_grad():
        means = [conv(normalise(b.images, INPUT, torch.float64)).mean((0, 2, 3)) for b in batches[0]]
    torch.testing.assert_close(norms[0].running_mean, 0.1 * torch.stack(means).mean(0))
    assert len(list(steps)) == 2 and {int(m.num_batches_tracked) for m in norms} == {3}


def test_random_layers_draw_from_seed_step_and_micro_batch_alone() -> None:
    """Dropout is the same whatever was drawn before, and in both forwards of a coupled loss; the seed changes it."""
    after = []
    for state, seed in ((1, 0), (2, 0), (1, 9)):
        torch.manual_seed(state)
        trained = model("vit", classes=0, dropout=0.5)
        torch.manual_seed(state)
        list(run(trained, SupCon(), data(2, 3, views=2), seed=seed))
        after.append(trained)
    assert largest_difference(after[0], after[1]) == 0 < largest_difference(after[0], after[2])


def test_dropout_does_not_change_which_gradient_a_coupled_step_follows() -> None:
    """The cached embeddings are those of the second forward: SGD by hand with the same draws gets the same weights."""
    ours = model("vit", classes=0, dropout=0.5)
    theirs, batches = copy.deepcopy(ours).double().train(), data(1, 3, views=2)
    list(run(ours, SupCon(), batches))
    outputs = []
    for j, batch in enumerate(batches[0]):
        torch.manual_seed(int(hash_text(f"0/0/{j}"), 16) % 2**63)
        outputs.append(theirs(normalise(batch.images, INPUT, torch.float64)).embedding_BE)
    rows = torch.cat(outputs)
    SupCon()(Outputs(rows, rows, None), torch.cat([b.labels.repeat(2) for b in batches[0]])).backward()
    with torch.no_grad():
        for p in theirs.parameters():
            p -= 0.1 * p.grad  # type: ignore[operator]
    assert largest_difference(ours, theirs) < 1e-12


def test_the_loop_starts_where_it_is_told_and_counts_over_the_whole_run() -> None:
    trained, batches = model(), data(5, 1)
    steps = run(trained, CrossEntropy(), batches[3:], steps=5, start=3)
    assert [step.number for step in steps] == [4, 5]


def test_a_stop_is_seen_in_the_step_after_which_it_was_asked() -> None:
    asked = iter([False, True, False])
    engine = TorchEngine(model(), TorchSpec(precision="fp64"), SGD(), World())
    objective = Objective(CrossEntropy(), INPUT, 1, 0, 0.1, Schedule(), 3)
    steps = train_steps(engine, data(3, 1), objective, World(), stop=lambda: next(asked))
    assert [step.stop_requested for step in steps] == [False, True, False]


def test_every_depends_on_the_step_alone() -> None:
    assert [step for step in range(1, 10) if every(3, step)] == [3, 6, 9]


@pytest.mark.parametrize(("kind", "loss"), [("resnet", CrossEntropy()), ("resnet", SupCon()), ("vit", SupCon())])
def test_recomputed_blocks_give_the_same_steps_and_running_statistics(kind: str, loss: LossSpec) -> None:
    """With dropout in the transformer: the second forward of a block draws what the first one drew."""
    states, forwards = [], []
    for recompute in (False, True):
        trained = model(kind, classes=3 if loss.uses_logits else 0, dropout=0.5)
        calls: list[int] = []
        block = trained.backbone.net.get_submodule(trained.blocks[1].name)
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        list(run(trained, loss, data(3, 2, loss.views), recompute=recompute))
        states.append(trained.state_dict())
        forwards.append(len(calls))
    assert forwards[1] == forwards[0] + 6, "one more forward for each of 6 backwards"
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-12, atol=1e-14, msg=name)


def nan_where_marked(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A net that gives NaN for images whose first number is that of a white pixel."""
    images = args[0]
    marked = images[:, 0, 0, 0] == 2  # (255 / 255 - 0.5) / 0.25
    return (torch.where(marked[:, None, None, None], torch.nan, images),)


def marked(batches: list[list[Batch]], step: int, micro: int) -> list[list[Batch]]:
    """The same batches, of which one image is of the marked kind and no other."""
    for batch in (batch for micros in batches for batch in micros):
        batch.images[:, 0, 0, 0].clamp_(max=254)
    batches[step][micro].images[-1, 0, 0, 0] = 255
    return batches


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("loss", [CrossEntropy(), SupCon()], ids=lambda loss: loss.kind)
def test_a_step_whose_loss_is_nan_leaves_no_trace(loss: LossSpec, micros: int) -> None:
    """Weights, momentum, running statistics and averages: training goes on as if the step had not been there."""
    classes, batches = 3 if loss.uses_logits else 0, marked(data(4, micros, loss.views), 1, micros - 1)
    trained, never_saw_it = model(classes=classes), model(classes=classes)
    trained.register_forward_pre_hook(nan_where_marked)
    averages: list[dict[str, Tensor]] = [{}, {}]
    steps = list(run(trained, loss, batches, momentum=0.9, ema=0.5, averages=averages[0]))
    assert [step.applied for step in steps] == [True, False, True, True]
    assert [np.isfinite(step.metrics()["train/loss"]) for step in steps] == [True, False, True, True]
    others = batches[:1] + batches[2:]
    assert all(step.applied for step in run(never_saw_it, loss, others, momentum=0.9, ema=0.5, averages=averages[1]))
    for ours, theirs in ((trained.state_dict(), never_saw_it.state_dict()), averages):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-14, msg=name)


class InfiniteSupCon(SupCon):
    """Infinite where a label is 2, though its gradients are finite."""

    def __call__(self, outputs: Outputs, targets: Tensor) -> Tensor:
        return super().__call__(outputs, targets) + (torch.inf if 2 in targets else 0)


@pytest.mark.parametrize("micros", [1, 3])
def test_an_infinite_loss_takes_no_step_though_its_gradients_are_finite(micros: int) -> None:
    trained = model(classes=0)
    (step,) = run(trained, InfiniteSupCon(), data(1, micros, views=2))
    assert not step.applied and step.metrics()["train/loss"] == torch.inf
    assert largest_difference(trained, model(classes=0).double()) == 0


@pytest.mark.parametrize("loss", [CrossEntropy(), SupCon()], ids=lambda loss: loss.kind)
def test_an_adversarial_step_trains_on_what_the_attack_makes_of_each_micro_batch(loss: LossSpec) -> None:
    """The attack sees the model in eval mode, with the running statistics of the step before, at all micro-batches."""
    classes, pgd, batches = 3 if loss.uses_logits else 0, PGD(epsilon=0.7, steps=2), data(2, 2, loss.views)
    ours = model(classes=classes)
    before: list[Model] = []
    expected, seen = [], []

    def attacked(j: int) -> Tensor:
        batch, net = batches[1][j], before[0]
        labels, images = batch.labels.repeat(loss.views), normalise(batch.images, INPUT, torch.float64)
        random = torch.Generator().manual_seed(int(hash_text(f"0/1/{j}"), 16) % 2**63)
        return pgd.attacked(images, INPUT, lambda x: loss(net(x), labels), random)

    steps = run(ours, loss, batches, adversary=pgd)
    next(steps)
    before.append(copy.deepcopy(ours).eval())
    expected = [attacked(j) for j in range(2)]
    ours.register_forward_pre_hook(lambda module, args: seen.append(args[0]) if module.training else None)
    (step,) = steps
    assert step.applied and all(p.grad is None for p in ours.parameters())
    for images, wanted, batch in zip(seen[-2:], expected, batches[1], strict=True):
        torch.testing.assert_close(images, wanted, rtol=0, atol=1e-12)
        assert float((images - normalise(batch.images, INPUT, torch.float64)).abs().max()) > 0.1


def test_an_attack_on_mixed_images_raises_the_loss_of_their_soft_targets() -> None:
    losses = []
    for adversary in (NoAdversary(), PGD(epsilon=1)):
        (step,) = run(model(), CrossEntropy(), data(1, 2), mix=Mixup(alpha=1), adversary=adversary)
        losses.append(step.metrics()["train/loss"])
    assert losses[0] < losses[1]
