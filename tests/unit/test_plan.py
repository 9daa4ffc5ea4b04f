"""What --dry-run prints is what the run does: steps, memory by stage, traffic, work, disk."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nc_dist.data.order import Order
from nc_dist.errors import InputError
from nc_dist.plan import Cluster, as_bytes, show, training_plan
from nc_dist.plan.gpus import GPUS, gpu, recognised
from nc_dist.plan.memory import (
    DDP_BUCKETS,
    Stage,
    ZeroSettings,
    checkpoints_kept,
    held_in_zero3,
    partition,
    states,
    zero_settings,
)
from nc_dist.plan.time import gpu_hours, intervals, mfu, steps_with, work
from nc_dist.plan.traffic import collectives, ring_bytes, sent_in_a_step

ADAM, MOMENTUM = 8, 4  # bytes of state a parameter
NUMELS = (1000, 500_000, 3, 70_000)
NO_BUCKETS = ZeroSettings(reduce_bucket=0)


def test_the_plan_has_the_steps_and_the_tail_of_the_order() -> None:
    order = Order((50, 51), 0, 32, 8, 16)
    plan = training_plan(samples=101, heldout=9, global_batch=32, micro=8, lanes=16, steps=7, world=2)
    assert plan["steps per epoch"] == order.steps_per_epoch and plan["steps"] == 7
    assert plan["left out per epoch (other samples each time)"] == order.dropped
    assert plan["micro-batches per step"] == order.micro_per_step
    assert plan["accumulated per process"] == 2 and plan["possible numbers of processes"] == [1, 2, 4]


def test_the_plan_is_shown_in_aligned_lines() -> None:
    assert show({"a": 1, "long": 2}) == "  a     1\n  long  2"


def test_sizes_are_shown_in_powers_of_1000() -> None:
    assert [as_bytes(n) for n in (0, 999, 1000, 2.5e9, 1e15)] == ["0 B", "999 B", "1 kB", "2.5 GB", "1 PB"]


def test_a_cluster_has_a_process_for_each_gpu() -> None:
    assert Cluster(4, 8, "h200").world == 32
    assert Cluster(gpu="h200").world is None


def test_zero_2_is_what_deepspeeds_own_estimator_says_with_fp32_weights_for_bf16_ones() -> None:
    """DeepSpeed counts, with Adam: 2 bytes of bf16 parameters, and of 1/W of them 2 bf16 gradients, 4 fp32 gradients,
    4 fp32 masters, 8 moments. Ours are fp32 throughout: 4 instead of 2 bytes of parameters and of reduced gradients.
    Where it has fp32 gradients beside bf16 ones we have the flat copy of the update.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as theirs

    for world in (1, 8, 64):
        ours = states(2, [64_000_000], ADAM, world, NO_BUCKETS)
        at_update = ours.parameters + ours.gradients + ours.optimizer + ours.update // 2  # of it half are temporaries
        _, on_gpu = theirs(64_000_000, num_gpus_per_node=world, num_nodes=1, cpu_offload=False)
        assert at_update == on_gpu + 2 * 64_000_000 + 2 * 64_000_000 // world


def test_zero_2_with_offload_leaves_on_the_gpu_what_deepspeeds_estimator_leaves() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as theirs

    number = 64_000_000
    ours = states(2, [number], ADAM, 8, ZeroSettings(reduce_bucket=0, offload_optimizer=True))
    on_cpu, on_gpu = theirs(number, num_gpus_per_node=8, num_nodes=1, cpu_offload=True, additional_buffer_factor=1)
    assert ours.peak(0) == on_gpu + 2 * number  # parameters in fp32 for bf16
    # In the memory of the machine theirs counts 16 bytes of masters, gradients and moments, or 4 bytes of each process
    # while the model is built, which is more here; ours has a flat copy of the gradients and the update's besides.
    assert on_cpu == 4 * 8 * number and 8 * ours.on_cpu == (4 + 8 + 8) * number


def test_zero_3_is_what_deepspeeds_own_estimator_says_with_fp32_weights_for_bf16_ones() -> None:
    """18 bytes of 1/W: 2 bf16 parameters, 4 fp32 gradients, 4 masters, 8 moments (the bf16 gradients of its stage 2 are
    left out); and the largest layer, with 4 bytes: parameters and gradients in bf16. Ours are 4 bytes of parameters, of
    reduced gradients and of their flat copy; and the largest layer's parameters in fp32.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as theirs

    layers, zero = [1_000_000] * 64, ZeroSettings(reduce_bucket=0, persistence=0, live=0, reuse=0, prefetch=0)
    for world in (1, 8, 64):
        ours = states(3, layers, ADAM, world, zero)
        at_update = ours.parameters + ours.gradients + ours.optimizer + ours.update // 2
        _, on_gpu, largest = theirs(sum(layers), 1_000_000, num_gpus_per_node=world, cpu_offload=False)
        assert largest == 4 * 1_000_000
        assert at_update == on_gpu + (2 + 4) * sum(layers) // world


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=20), st.integers(1, 64))
def test_each_stage_takes_no_more_than_the_one_before_it(numels: list[int], world: int) -> None:
    zero = ZeroSettings(reduce_bucket=0, persistence=0, live=0, reuse=0, prefetch=0)
    one, two, three = (states(stage, numels, ADAM, world, zero) for stage in (1, 2, 3))
    assert one.gradients == 4 * sum(numels) and two.gradients == 4 * -(-sum(numels) // world)
    assert two.parameters == one.parameters and two.optimizer == one.optimizer
    padding = 4 * len(numels) * world
    assert three.parameters <= two.parameters + 4 * partition(numels, world)
    assert three.optimizer <= two.optimizer + 3 * padding
    assert partition(numels, world) * world >= sum(numels)


def test_one_process_has_no_masters_in_ddp_and_zero_0_and_has_them_in_the_other_stages() -> None:
    total = sum(NUMELS)
    for stage in (DDP_BUCKETS, 0):
        plain = states(stage, NUMELS, MOMENTUM, 1, ZeroSettings())
        assert (plain.parameters, plain.gradients, plain.optimizer) == (4 * total, 4 * total, 4 * total)
        assert plain.buckets == 0
    assert states(1, NUMELS, MOMENTUM, 1, NO_BUCKETS).optimizer == 8 * total
    assert states(DDP_BUCKETS, NUMELS, MOMENTUM, 2, ZeroSettings()).buckets == 0  # the gradients lie in them
    assert states(0, NUMELS, MOMENTUM, 2, ZeroSettings()).buckets == 4 * total


def test_averages_are_as_large_as_what_they_average() -> None:
    total = sum(NUMELS)
    assert states(0, NUMELS, MOMENTUM, 2, ZeroSettings(), rest=10, ema=True).average == 4 * total + 10
    assert states(2, NUMELS, MOMENTUM, 2, ZeroSettings(), rest=10, ema=True).average == 4 * -(-total // 2) + 10


def test_offload_moves_and_loses_nothing() -> None:
    here = states(3, NUMELS, ADAM, 4, NO_BUCKETS, ema=True)
    moved = states(
        3, NUMELS, ADAM, 4, ZeroSettings(reduce_bucket=0, offload_optimizer=True, offload_parameters=True), ema=True
    )
    share = 4 * partition(NUMELS, 4)
    assert moved.on_cpu == here.optimizer + here.average + here.update + share
    assert moved.parameters == here.parameters - share
    assert moved.optimizer == moved.average == moved.gradients == 0


def test_in_zero_3_small_parameters_stay_and_large_ones_are_there_while_they_are_used() -> None:
    zero = ZeroSettings(persistence=1000, reuse=0, live=0, prefetch=100)
    assert held_in_zero3(NUMELS, zero) == (1003, 500_000)
    assert held_in_zero3(NUMELS, ZeroSettings(persistence=1000, reuse=0, live=50, prefetch=100)) == (1003, 500_050)
    assert held_in_zero3(NUMELS, ZeroSettings()) == (71_003, 500_000)  # DeepSpeed's own settings let go of nothing


def test_the_settings_are_read_from_the_configuration_that_deepspeed_gets() -> None:
    assert zero_settings({"stage": 2}) == ZeroSettings()
    json = {"stage": 3, "reduce_bucket_size": 7, "offload_optimizer": {"device": "cpu"}, "overlap_comm": False}
    json |= {"stage3_max_reuse_distance": 5, "stage3_max_live_parameters": 6, "offload_param": {"device": "none"}}
    assert zero_settings(json) == ZeroSettings(7, False, live=6, reuse=5, offload_optimizer=True)


def test_ring_collectives_send_what_the_papers_say() -> None:
    assert ring_bytes("all_reduce", 800, 4) == 1200 and ring_bytes("all_gather", 800, 4) == 600
    assert ring_bytes("reduce_scatter", 800, 1) == 0


@pytest.mark.parametrize(("stage", "times"), [(DDP_BUCKETS, 2), (0, 2), (1, 3), (2, 3), (3, 3)])
def test_traffic_in_the_limit_of_many_processes_is_that_of_the_zero_paper(stage: Stage, times: int) -> None:
    """arXiv 1910.02054, section 7: 2 Psi for data parallelism and P_os+g, 3 Psi for P_os+g+p. DeepSpeed's stages 1 and
    2 reduce by all-reduce where the paper scatters, so that they send 3 Psi as well."""
    numels, zero = [100_000] * 640, ZeroSettings(persistence=0, reuse=0)
    sent = sent_in_a_step(stage, numels, 10_000, 1, zero) / (4 * sum(numels))
    assert sent == pytest.approx(times, rel=1e-3)


def test_accumulation_costs_traffic_from_stage_2_on() -> None:
    numels, zero = [100_000] * 640, ZeroSettings(persistence=0, reuse=0)
    ratios = [
        sent_in_a_step(stage, numels, 8, 4, zero) / sent_in_a_step(stage, numels, 8, 1, zero)
        for stage in (DDP_BUCKETS, 0, 1, 2, 3)
    ]
    assert ratios == pytest.approx([1, 1, 1, (4 * 2 + 1) / 3, 4])
    assert collectives(3, numels, 1, 4, zero) == {}


def test_what_stays_gathered_is_not_fetched_again() -> None:
    numels = [100_000] * 8
    apart = collectives(3, numels, 2, 1, ZeroSettings(persistence=0, reuse=0))["all_gather"]
    half = collectives(3, numels, 2, 1, ZeroSettings(persistence=0, reuse=800_000))["all_gather"]
    kept = collectives(3, numels, 2, 1, ZeroSettings(persistence=0))["all_gather"]
    assert (apart, half, kept) == (2 * 4 * 800_000, 1.5 * 4 * 800_000, 4 * 800_000)


def test_the_work_of_a_run_is_counted_in_forwards() -> None:
    done = work(
        forward=10, steps=5, batch=8, views=2, recompute=True, cached=True, attack_steps=3, measures=2,
        probe_images=7, final_images=9,
    )  # fmt: skip
    assert done.training == 3 * 10 * 80 and done.repeated == (1 + 1 + 6) * 10 * 80
    assert done.probes == 10 * 14 and done.final == 90
    assert done.total == done.training + done.repeated + done.probes + done.final


def test_hours_and_mfu_are_each_others_inverse() -> None:
    """NVIDIA's ResNet-50 on one A100 in mixed precision: 2,470 images a second, 19 % of the peak."""
    a100, forward = gpu("a100").peak("bf16"), 8.18e9
    reached = mfu(2470, forward, a100, 1)
    assert reached == pytest.approx(0.194, abs=0.001)
    hours = gpu_hours(3 * forward * 90 * 1_281_167, a100, reached)
    assert hours == pytest.approx(90 * 1_281_167 / 2470 / 3600) and 12 < hours < 15  # theirs: about 14 for 90 epochs
    assert mfu(8 * 2470, forward, a100, 8) == pytest.approx(reached)


def test_measures_and_checkpoints_are_where_the_run_makes_them() -> None:
    assert intervals(None, None, 1200, 50) == (100, 50) and intervals(7, None, 1200, 50) == (7, 14)
    assert intervals(None, 9, 5, 50) == (1, 9)
    assert steps_with(4, 10) == {4, 8, 10} and steps_with(20, 10) == {10}


def test_the_disk_holds_the_newest_the_best_the_chosen_and_the_one_that_is_written() -> None:
    assert checkpoints_kept(range(100), keep=2, kept_steps=[]) == 4
    assert checkpoints_kept(range(100), keep=2, kept_steps=[50, 7, 1000]) == 6
    assert checkpoints_kept(range(3), keep=2, kept_steps=[]) == 3
    assert checkpoints_kept(range(100), keep=None, kept_steps=[]) == 100


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A10", "a10"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10G", None),
        ("cpu", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_its_driver_tells(device: str, name: str | None) -> None:
    found = recognised(device)
    assert (found and found.name) == name


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    assert gpu("H200").memory_gb == 141
    with pytest.raises(InputError, match="--gpu h300: unknown; known are b200, h200"):
        gpu("h300")


def test_peaks_are_dense_and_those_of_the_units_that_a_precision_uses() -> None:
    assert gpu("h100").peak("bf16") == 989.5e12 and gpu("h100").peak("fp32") == 494.7e12
    assert gpu("h100").peak("fp32", attention=True) == 67e12  # torch's matrix products do not use TF32 by default
    assert gpu("h100").peak("bf16", attention=True) == 989.5e12
    assert gpu("v100").peak("fp16") == 125e12
    assert gpu("v100").peak("bf16") == gpu("v100").peak("fp32") == 15.7e12  # it has tensor cores for fp16 only
    for known in GPUS:
        assert known.half >= (known.tf32 or 0) and known.half > known.fp32 > known.fp64
