"""The attack stays in its ball and in 0..1, raises the loss, and is the one that a plain reference makes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nc_dist.adversary import PGD, NoAdversary, in_ball, projected, steepest
from nc_dist.data.augment import InputSpec

INPUT = InputSpec(size=6, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.1))
MEAN, STD = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (INPUT.mean, INPUT.std))
WEIGHT = torch.randn(4, 3 * 6 * 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NORMS = pytest.mark.parametrize("norm", ["l2", "linf"])


def images(seed: int = 0, n: int = 5) -> Tensor:
    """Pixels of 0..1, many of them at an end."""
    pixels = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((3 * pixels - 1).clamp(0, 1) - MEAN) / STD


def loss(x: Tensor) -> Tensor:
    """Of a small net without weights of its own, mean over images."""
    hidden = torch.tanh(x.flatten(1) @ WEIGHT.T / 10)
    return F.cross_entropy(hidden * 3, torch.arange(len(x)) % 4)


def attacked(spec: PGD, x: Tensor, seed: int = 0) -> Tensor:
    return spec.attacked(x, INPUT, loss, torch.Generator().manual_seed(seed))


def distances(moved: Tensor, x: Tensor, norm: str) -> Tensor:
    """In pixel values, of each image."""
    delta = ((moved - x) * STD).flatten(1)
    return delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)


@settings(deadline=None, max_examples=60)
@given(
    norm=st.sampled_from(["l2", "linf"]),
    epsilon=st.floats(1e-4, 5),
    steps=st.integers(1, 4),
    step_size=st.none() | st.floats(1e-4, 10),
    random_start=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_images_stay_in_the_ball_and_in_0_to_1(seed: int, **keys: Any) -> None:
    x = images(seed)
    moved = attacked(PGD(**keys), x, seed)
    pixels = moved * STD + MEAN
    assert float(pixels.min()) >= -1e-12 and float(pixels.max()) <= 1 + 1e-12
    assert float(distances(moved, x, keys["norm"]).max()) <= keys["epsilon"] * (1 + 1e-9)
    assert not moved.requires_grad


@NORMS
@pytest.mark.parametrize("random_start", [False, True])
def test_the_loss_grows_with_epsilon_and_with_steps_to_more_than_random_moves_give(
    norm: str, random_start: bool
) -> None:
    x, losses = images(), []
    for epsilon, steps in ((0.02, 1), (0.1, 3), (0.1, 10), (0.5, 10)):
        spec = PGD.model_validate({"norm": norm, "epsilon": epsilon, "steps": steps, "random_start": random_start})
        losses.append(float(loss(attacked(spec, x))))
    assert float(loss(x)) < losses[0] < losses[1] <= losses[2] * (1 + 1e-6) < losses[3]
    random = torch.Generator().manual_seed(0)
    at_random = [float(loss(x + in_ball(x, norm, 0.1, random) / STD)) for _ in range(20)]  # type: ignore[arg-type]
    assert max(at_random) < losses[1]


@NORMS
def test_the_attack_is_the_one_written_by_hand(norm: str) -> None:
    """In pixels, image by image, with the gradient of each one's own loss."""
    x, epsilon, size = images(), 0.3, 0.1
    moved = attacked(PGD.model_validate({"norm": norm, "epsilon": epsilon, "steps": 4, "step_size": size}), x, seed=7)
    random = torch.Generator().manual_seed(7)
    if norm == "linf":
        starts = epsilon * (2 * torch.rand(x.shape, generator=random, dtype=torch.float64) - 1)
    else:
        starts = torch.randn(x.shape, generator=random, dtype=torch.float64)
        radii = epsilon * torch.rand(5, generator=random, dtype=torch.float64) ** (1 / 108)
        starts = torch.stack([s / s.norm() * r for s, r in zip(starts, radii, strict=True)])
    for i, (image, start) in enumerate(zip(x * STD + MEAN, starts, strict=True)):
        z = (image + start).clamp(0, 1)
        for _ in range(4):
            z.requires_grad_()
            logits = 3 * torch.tanh((((z - MEAN) / STD).flatten()[None] @ WEIGHT.T) / 10)
            F.cross_entropy(logits, torch.tensor([i % 4])).backward()
            assert z.grad is not None
            z = z.detach() + size * (z.grad.sign() if norm == "linf" else z.grad / z.grad.norm())
            delta = z - image
            if norm == "linf":
                delta = delta.clamp(-epsilon, epsilon)
            elif float(delta.norm()) > epsilon:
                delta = delta / delta.norm() * epsilon
            z = (image + delta).clamp(0, 1)
        torch.testing.assert_close(moved[i] * STD + MEAN, z, rtol=0, atol=1e-12)


def test_the_default_step_size_is_two_thirds_of_epsilon_for_three_steps() -> None:
    x = images()
    by_default, by_hand, other = (attacked(PGD(epsilon=0.6, step_size=size), x) for size in (None, 0.4, 0.41))
    torch.testing.assert_close(by_default, by_hand, rtol=0, atol=1e-12)
    assert float((by_default - other).abs().max()) > 1e-3


def test_the_generator_alone_decides_the_start() -> None:
    x, spec = images(), PGD(epsilon=0.3)
    torch.manual_seed(1)
    first = attacked(spec, x, seed=3)
    torch.manual_seed(2)
    assert first.equal(attacked(spec, x, seed=3)) and not first.equal(attacked(spec, x, seed=4))
    still = spec.model_copy(update={"random_start": False})
    assert attacked(still, x, seed=3).equal(attacked(still, x, seed=4))


@NORMS
def test_random_starts_are_uniform_in_the_ball(norm: str) -> None:
    """A quarter of the volume lies within (1/4)^(1/d) of the radius; directions have no mean."""
    like = torch.zeros(4000, 3, 2, 2, dtype=torch.float64)
    delta = in_ball(like, norm, 2.0, torch.Generator().manual_seed(0)).flatten(1)  # type: ignore[arg-type]
    length = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
    assert float(length.max()) <= 2
    assert float((length < 2 * 0.25 ** (1 / 12)).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert float(delta.mean(0).abs().max()) < 0.1


def test_an_image_without_gradient_stays_and_infinite_moves_come_back_to_the_ball() -> None:
    assert steepest(torch.zeros(2, 3, 2, 2), "l2").abs().max() == 0
    far = torch.full((1, 3, 2, 2), 1e30, dtype=torch.float64)
    assert float(projected(far, "l2", 0.5).norm()) == pytest.approx(0.5)
    tiny = torch.full((1, 3, 2, 2), 1e-300, dtype=torch.float64)
    assert math.isfinite(float(steepest(tiny, "l2").norm()))


def test_without_an_adversary_images_are_left_alone() -> None:
    x = images()
    assert NoAdversary().attacked(x, INPUT, loss, torch.Generator()) is x


@NORMS
def test_gradients_that_a_mean_over_images_would_lose_in_half_precision_still_move_them(norm: str) -> None:
    """1e-6 an image is representable, a 64th of it is not."""
    x = torch.zeros(64, 3, 6, 6)

    def mean_in_half(seen: Tensor) -> Tensor:
        return (seen.half() * 1e-6).float().sum() / len(seen)

    spec = PGD.model_validate({"norm": norm, "epsilon": 0.1, "random_start": False})
    moved = spec.attacked(x, INPUT, mean_in_half, torch.Generator())
    assert float((moved - x).amax((1, 2, 3)).min()) > 0
