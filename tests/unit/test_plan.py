"""What --dry-run prints is what the run does."""

from nc_dist.data.order import Order
from nc_dist.plan import show, training_plan


def test_the_plan_has_the_steps_and_the_tail_of_the_order() -> None:
    order = Order((50, 51), 0, 32, 8, 16)
    plan = training_plan(samples=101, heldout=9, global_batch=32, micro=8, lanes=16, steps=7, world=2)
    assert plan["steps per epoch"] == order.steps_per_epoch and plan["steps"] == 7
    assert plan["left out per epoch (other samples each time)"] == order.dropped
    assert plan["micro-batches per step"] == order.micro_per_step
    assert plan["accumulated per process"] == 2 and plan["possible numbers of processes"] == [1, 2, 4]


def test_the_plan_is_shown_in_aligned_lines() -> None:
    assert show({"a": 1, "long": 2}) == "  a     1\n  long  2"
