"""What GPUs can do at most, by their makers' data sheets: for plans and for the model FLOPs utilisation of a run.

Numbers are dense: NVIDIA's tables give twice as much where 2:4 sparsity can be used, which training does not.
Sources: data sheets of B200 (HGX), H200, H100, A100, L40S, L4, A10, V100, T4; white papers of Ada (appendix A: RTX
4090) and GA102 (RTX 3090, RTX A6000), where half precision is the rate that adds up in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

from nc_dist.errors import InputError


class Gpu(NamedTuple):
    """One kind of GPU: memory in 1e9 bytes, peaks in 1e12 FLOP/s; None where it has no such units."""

    name: str  # as --gpu takes it
    words: tuple[str, ...]  # all of them are in the name by which the driver knows it, in small letters
    memory_gb: float
    half: float  # tensor cores, fp16, and bf16 where there is `tf32`
    tf32: float | None
    fp32: float
    fp64: float

    def peak(self, precision: str, attention: bool = False) -> float:
        """FLOP/s at most in `precision` (fp32, bf16, fp16, fp64) of a convolutional net, or one with `attention`.

        fp32 is TF32 for convolutions, where there is such a unit: unless told otherwise, cuDNN's convolutions use it
        and the matrix products of a transformer do not.
        """
        if precision == "fp64":
            return self.fp64 * 1e12
        if precision == "fp16" or (precision == "bf16" and self.tf32):
            return self.half * 1e12
        return (self.fp32 if attention else self.tf32 or self.fp32) * 1e12


# The first whose words fit is taken: the special ones stand before the general.
GPUS = (
    Gpu("b200", ("b200",), 180, 2250, 1125, 75, 37),
    Gpu("h200", ("h200",), 141, 989.5, 494.7, 67, 34),
    Gpu("h100-nvl", ("h100", "nvl"), 94, 835.5, 417.5, 60, 30),
    Gpu("h100-pcie", ("h100", "pcie"), 80, 756.5, 378, 51, 26),
    Gpu("h100", ("h100",), 80, 989.5, 494.7, 67, 34),
    Gpu("a100-40gb", ("a100", "40gb"), 40, 312, 156, 19.5, 9.7),
    Gpu("a100", ("a100",), 80, 312, 156, 19.5, 9.7),
    Gpu("l40s", ("l40s",), 48, 362, 183, 91.6, 1.4),
    Gpu("l4", ("l4",), 24, 121, 60, 30.3, 0.47),
    Gpu("a10", ("a10",), 24, 125, 62.5, 31.2, 0.98),
    Gpu("a6000", ("rtx a6000",), 48, 154.8, 77.4, 38.7, 0.6),
    Gpu("rtx4090", ("rtx 4090",), 24, 165.2, 82.6, 82.6, 1.3),
    Gpu("rtx3090", ("rtx 3090",), 24, 71, 35.6, 35.6, 0.56),
    Gpu("v100-32gb", ("v100", "32gb"), 32, 125, None, 15.7, 7.8),
    Gpu("v100", ("v100",), 16, 125, None, 15.7, 7.8),
    Gpu("t4", ("t4",), 16, 65, None, 8.1, 0.25),
)
LESS = ("mig", "laptop", "max", "mobile")  # in the name of a part of a GPU, or of a slower one of the same name


def gpu(name: str) -> Gpu:
    """The GPU that is called so here; InputError lists the names there are."""
    for known in GPUS:
        if known.name == name.lower():
            return known
    raise InputError(f"--gpu {name}: unknown; known are {', '.join(known.name for known in GPUS)}")


def recognised(device_name: str) -> Gpu | None:
    """The GPU that the driver calls `device_name`, as in `NVIDIA H100 80GB HBM3`; None for one that is not listed."""
    tokens = device_name.lower().replace("-", " ").split()
    text = f" {' '.join(tokens)} "
    if any(f" {word} " in text for word in LESS):
        return None
    return next((known for known in GPUS if all(f" {word} " in text for word in known.words)), None)
