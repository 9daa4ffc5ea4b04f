"""Running statistics: one update a step, from the mean over its micro-batches, torch's own where there is one."""

import copy

import pytest
import torch
from torch import Tensor, nn

from nc_dist.batch_norm import RunningStatistics
from nc_dist.errors import InputError

BUFFERS = ("running_mean", "running_var")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(3, momentum=0.3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.7), nn.BatchNorm2d(4)
    ).double()


def micro_batches(n: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(5 + i, 3, 6, 6, generator=random, dtype=torch.float64) + i for i in range(n)]


def step(module: nn.Module, batches: list[Tensor]) -> None:
    running = RunningStatistics(module)
    running.begin()
    for x in batches:
        module(x)
        running.collect()
    running.merge(running.totals() / len(batches))


def test_one_micro_batch_a_step_is_torchs_own_update() -> None:
    ours, theirs = net(), net()
    for x in micro_batches(3):
        step(ours, [x])
        theirs(x)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-13, atol=1e-13)


def test_many_micro_batches_make_one_update_with_the_mean_of_their_statistics() -> None:
    ours, batches = nn.BatchNorm2d(3, momentum=0.3).double(), micro_batches(4)
    nn.init.uniform_(ours.running_mean), nn.init.uniform_(ours.running_var)
    before = {name: getattr(ours, name).clone() for name in BUFFERS}
    step(ours, batches)
    means = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0)  # unbiased, as torch keeps it
    for name, new in zip(BUFFERS, (means, variances), strict=True):
        torch.testing.assert_close(getattr(ours, name), 0.7 * before[name] + 0.3 * new, rtol=1e-13, atol=0)
    assert int(ours.num_batches_tracked) == 1


def test_sums_of_parts_merge_to_what_one_process_gets() -> None:
    """Two ranks with two micro-batches each: only the sum of their totals matters."""
    batches, whole = micro_batches(4), net()
    step(whole, batches)
    ranks = [net(), net()]
    running = [RunningStatistics(rank) for rank in ranks]
    for r, rank in enumerate(ranks):
        running[r].begin()
        for x in batches[2 * r : 2 * r + 2]:
            rank(x)
            running[r].collect()
    total = running[0].totals() + running[1].totals()
    for r, rank in enumerate(ranks):
        running[r].merge(total / 4)
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(rank.state_dict()[name], value, rtol=1e-13, atol=1e-13)


def test_layers_in_eval_mode_and_their_momentum_are_left_alone() -> None:
    module = net()
    module[0].eval()
    before = copy.deepcopy(module[0].state_dict())
    step(module, micro_batches(2))
    assert all(value.equal(before[name]) for name, value in module[0].state_dict().items())
    assert [m.momentum for m in (module[0], module[3])] == [0.3, 0.1]
    assert int(module[3].num_batches_tracked) == 1


def test_a_cumulative_mean_is_refused() -> None:
    with pytest.raises(InputError, match="momentum=None"):
        RunningStatistics(nn.BatchNorm2d(3, momentum=None))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_net_without_batch_norm_has_empty_totals_on_its_own_device(device: str) -> None:
    """They are sent together with the step's other sums, so they must lie where those lie."""
    module = nn.Linear(2, 2, device=device)
    running = RunningStatistics(module)
    running.begin()
    running.collect()
    assert running.totals().shape == (0,) and running.totals().device.type == device
    running.merge(running.totals())
