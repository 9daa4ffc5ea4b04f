"""What class moments take beside the features: the measured peak of a process that does nothing else, at one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, re, sys
from pathlib import Path
import torch
from nc_dist.nc import ClassMoments
from nc_dist.nc.metrics import nc1

def peak():  # not ru_maxrss, which begins with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
num_classes, before, random = int(sys.argv[1]), peak(), torch.Generator().manual_seed(0)
moments = ClassMoments(num_classes, 2048)
for low in range(0, 2 * num_classes, 256):
    moments.update(torch.randn(256, 2048, generator=random), torch.arange(low, low + 256) % num_classes)
moments = moments.all_reduce(lambda tensor: tensor)
reduced = peak() - before
value = nc1(moments)
print(json.dumps({"reduced": reduced, "with nc1": peak() - before, "process": peak(), "nc1": value}))
"""


def measured(num_classes: int) -> dict[str, float]:
    """MB at the peaks, beyond what the imports took, and of the whole process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.check_output([sys.executable, "-c", CHILD, str(num_classes)], text=True, env=env, timeout=300)
    found = json.loads(output)
    print(found)
    return found  # type: ignore[no-any-return]


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux' /proc"),
]


def test_a_thousand_classes_of_2048_dimensions_take_120_megabytes() -> None:
    found = measured(1000)
    assert 40 < found["reduced"] < 120  # the sums alone are 43


def test_imagenet_21k_takes_one_and_a_half_gigabytes() -> None:
    found = measured(21_841)
    assert 500 < found["with nc1"] < 1500
