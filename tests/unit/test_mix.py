"""Mixtures of a micro-batch: what is in the images, what the labels' share is, and that ranks do not matter."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from processes import run_ranks

from nc_dist.backbones import SmallResNetSpec
from nc_dist.data.augment import InputSpec
from nc_dist.data.mix import Cutmix, MixSpec, Mixture, Mixup, NoMix, box, check_mix
from nc_dist.data.stream import Batch
from nc_dist.engine import TorchSpec
from nc_dist.engine.torch_engine import TorchEngine
from nc_dist.errors import InputError
from nc_dist.heads import MLPHead
from nc_dist.loop import train_steps
from nc_dist.losses import CrossEntropy, SupCon
from nc_dist.model import Model, ModelSpec
from nc_dist.objective import Objective
from nc_dist.optim import SGD, Schedule
from nc_dist.outputs import Outputs
from nc_dist.spec import validate
from nc_dist.world import World

IMAGES = torch.randn(6, 3, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).contiguous(
    memory_format=torch.channels_last
)
each = pytest.mark.parametrize("mix", [Mixup(), Mixup(alpha=5), Cutmix(), Cutmix(alpha=0.3)], ids=repr)


def mixture(mix: MixSpec, seed: int) -> Mixture:
    return mix.mixed(IMAGES, np.random.default_rng(seed))


def test_without_mixing_the_images_and_the_loss_are_untouched_and_nothing_is_drawn() -> None:
    random = np.random.default_rng(0)
    plain = NoMix().mixed(IMAGES, random)
    assert plain.images is IMAGES and plain.partner_B is None and plain.share == 1
    assert random.random() == np.random.default_rng(0).random()
    assert plain.targets(torch.tensor([3, 4]), torch.zeros(2, 5)).tolist() == [3, 4]


@each
def test_a_mixture_repeats_with_its_generator_and_leaves_its_input_alone(mix: MixSpec) -> None:
    before = IMAGES.clone()
    one, again, other = mixture(mix, 1), mixture(mix, 1), mixture(mix, 2)
    assert one.images.equal(again.images) and one.share == again.share
    assert one.share != other.share
    assert IMAGES.equal(before)
    assert one.images.is_contiguous(memory_format=torch.channels_last)


@each
def test_partners_are_a_permutation_of_the_micro_batch(mix: MixSpec) -> None:
    seen = set()
    for seed in range(20):
        partner = mixture(mix, seed).partner_B
        assert partner is not None and sorted(partner.tolist()) == list(range(6))
        seen.add(tuple(partner.tolist()))
    assert len(seen) > 15


def test_mixup_is_the_convex_combination_by_the_share() -> None:
    for seed in range(20):
        images, partner, share = mixture(Mixup(alpha=1), seed)
        torch.testing.assert_close(images, share * IMAGES + (1 - share) * IMAGES[partner], rtol=0, atol=1e-14)


def test_shares_are_beta_distributed() -> None:
    shares = np.array([mixture(Mixup(alpha=2), seed).share for seed in range(1000)])
    assert abs(shares.mean() - 0.5) < 0.03 and abs(shares.var() - 0.05) < 0.01  # of Beta(2, 2): 1/2, 1/20


def test_cutmix_pastes_one_box_of_the_partner_and_the_share_is_the_area_left() -> None:
    shares = []
    for seed in range(200):
        images, partner, share = mixture(Cutmix(), seed)
        own, pasted = (images == IMAGES).all(1), (images == IMAGES[partner]).all(1)
        moved = [i for i in range(6) if int(partner[i]) != i]  # type: ignore[index]
        assert (own | pasted).all()
        assert all(float(own[i].double().mean()) == pytest.approx(share, abs=1e-12) for i in moved)
        inside = ~own[moved[0]]
        assert all(inside.equal(~own[i]) for i in moved)
        rows, columns = inside.any(1).sum(), inside.any(0).sum()
        assert inside.sum() == rows * columns
        shares.append(share)
    assert min(shares) < 0.3 and max(shares) > 0.9


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 100))
def test_a_box_lies_in_the_image_and_is_not_larger_than_its_share(
    height: int, width: int, share: float, seed: int
) -> None:
    top, bottom, left, right = box(height, width, share, np.random.default_rng(seed))
    assert 0 <= top <= bottom <= height and 0 <= left <= right <= width
    assert bottom - top <= height * (1 - share) ** 0.5 + 1 and right - left <= width * (1 - share) ** 0.5 + 1


def test_boxes_are_as_large_as_asked_for_where_the_edge_does_not_cut_them() -> None:
    sizes = {box(100, 200, 0.75, np.random.default_rng(seed)) for seed in range(100)}
    whole = {(bottom - top, right - left) for top, bottom, left, right in sizes if top and left and bottom < 100}
    assert (50, 100) in whole
    assert all(area[0] <= 50 and area[1] <= 100 for area in whole)


@each
def test_the_mixed_loss_is_the_soft_targets_cross_entropy_with_its_gradient(mix: MixSpec) -> None:
    labels = torch.tensor([0, 1, 2, 3, 1, 0])
    for seed in range(10):
        made = mixture(mix, seed)
        logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        one_hot = F.one_hot(labels, 4).double()
        value = CrossEntropy()(Outputs(logits, logits, ours), made.targets(labels, ours))
        expected = F.cross_entropy(theirs, made.share * one_hot + (1 - made.share) * one_hot[made.partner_B])
        value.backward()
        expected.backward()
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mix", [Mixup(), Cutmix()], ids=lambda mix: mix.kind)
def test_a_loss_that_compares_samples_or_views_is_refused_with_the_remedy(mix: MixSpec) -> None:
    check_mix(NoMix(), SupCon())
    check_mix(mix, CrossEntropy())
    with pytest.raises(InputError, match=rf"^data\.mix\.kind='{mix.kind}': loss\.kind='supcon'.*data\.mix\.kind=none"):
        check_mix(mix, SupCon())


def test_two_views_are_refused_whatever_the_loss() -> None:
    class TwoViews(CrossEntropy):
        views = property(lambda self: 2)

    with pytest.raises(InputError, match="data.mix.kind='mixup'"):
        check_mix(Mixup(), TwoViews())


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("cls", [Mixup, Cutmix])
def test_a_strength_that_no_beta_distribution_has_is_refused(cls: type[Mixup], alpha: float) -> None:
    with pytest.raises(InputError, match="alpha"):
        validate(cls, {"alpha": alpha}, "x")


MICROS, B = 4, 6


def seen_and_losses(world: World) -> dict[str, Any]:
    """Two fp64 steps with each mixing: the images that this rank's model saw, the losses, accuracies and weights."""
    found = {}
    for mix in (Mixup(alpha=1), Cutmix()):
        torch.manual_seed(0)
        spec = ModelSpec(backbone=SmallResNetSpec(name="resnet8", width=2), head=MLPHead(output=4))
        engine = TorchEngine(Model(spec, 3), TorchSpec(precision="fp64"), SGD(), world)
        seen: list[torch.Tensor] = []

        def see(module: torch.nn.Module, args: tuple[torch.Tensor], seen: list[torch.Tensor] = seen) -> None:
            if module.training:
                seen.append(args[0].clone())

        engine.module.register_forward_pre_hook(see)
        random = np.random.default_rng(0)
        images, labels = (
            random.integers(0, 256, (2, MICROS, B, 3, 8, 8), dtype=np.uint8),
            random.integers(0, 3, (2, MICROS, B)),
        )
        own = range(world.rank * MICROS // world.size, (world.rank + 1) * MICROS // world.size)
        data = [
            [Batch(torch.from_numpy(images[t, j]), torch.from_numpy(labels[t, j]), torch.arange(B)) for j in own]
            for t in range(2)
        ]
        objective = Objective(CrossEntropy(), InputSpec(size=8), MICROS, 3, 0.1, Schedule(), 2, mix)
        steps = [step.metrics() for step in train_steps(engine, data, objective, world)]
        found[mix.kind] = {
            "seen": torch.stack(seen).unflatten(0, (2, -1)),
            "curve": [value for step in steps for value in step.values()],
            "weights": torch.cat([p.detach().flatten() for p in engine.module.parameters()]),
        }
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_mixtures_and_what_is_learnt_from_them_do_not_know_the_world_size(size: int) -> None:
    alone, ranks = seen_and_losses(World()), run_ranks(seen_and_losses, size)
    for kind, expected in alone.items():
        assert torch.cat([rank[kind]["seen"] for rank in ranks], dim=1).equal(expected["seen"])
        for rank in ranks:
            assert rank[kind]["curve"] == pytest.approx(expected["curve"], rel=1e-9)
            torch.testing.assert_close(rank[kind]["weights"], expected["weights"], rtol=1e-9, atol=1e-11)
