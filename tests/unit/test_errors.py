"""The exit code that each way to end has."""

import pytest

from nc_dist.errors import InputError, Preempted, exit_code


@pytest.mark.parametrize(
    "error, code",
    [(InputError("x"), 2), (Preempted(3), 75), (KeyboardInterrupt(), 130), (RuntimeError(), 1), (ValueError(), 1)],
)
def test_each_way_to_end_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_a_preempted_run_says_where_it_stopped() -> None:
    assert str(Preempted(3)) == "stopped at step 3, saved"
