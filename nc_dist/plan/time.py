"""Arithmetic work of a run and the time that a GPU needs for it, on paper. No torch."""

from __future__ import annotations

from dataclasses import dataclass

# Assumed shares of a GPU's peak that training reaches (MFU), where nothing was measured. NVIDIA's own ResNet-50 trains
# at 2,470 images/s on one A100 in mixed precision (DeepLearningExamples, ConvNets/resnet50v1.5): 3 x 8.18 GFLOP x 2470
# / 312 TFLOP/s = 0.19. timm's table has 393 images/s for ViT-B/16 on an RTX 3090 in mixed precision: 3 x 35.1 GFLOP x
# 393 / 71 TFLOP/s = 0.58; faster GPUs come less close to their peak, so less is assumed.
CONVOLUTION_MFU, ATTENTION_MFU = 0.19, 0.35
BACKWARD = 2  # forwards: one product for the gradient of the input, one for that of the weights


@dataclass(frozen=True)
class Work:
    """FLOPs of a whole run."""

    training: float  # forward and backward, by which MFU is defined (Chowdhery et al., arXiv 2204.02311, appendix B)
    repeated: float  # forwards that are done again, and attacks: they take time, but MFU does not count them
    probes: float  # NC measures while training
    final: float  # the source accuracy at the end

    @property
    def total(self) -> float:
        return self.training + self.repeated + self.probes + self.final


def work(
    *, forward: float, steps: int, batch: int, views: int, recompute: bool, cached: bool, attack_steps: int,
    measures: int, probe_images: int, final_images: int,
) -> Work:  # fmt: skip
    """FLOPs of a run from those of one image's `forward`.

    `cached`: outputs are found once without gradients before they are found with them. Each attack step is a forward
    and a backward to the input alone. A measure is a forward of the probe images.
    """
    images = steps * batch * views
    again = recompute + cached + 2 * attack_steps
    return Work(
        (1 + BACKWARD) * forward * images,
        again * forward * images,
        forward * measures * probe_images,
        forward * final_images,
    )


LIVE_POINTS = 12  # measures of a run when measure_every is not given


def intervals(measure_every: int | None, save_every: int | None, steps: int, steps_per_epoch: int) -> tuple[int, int]:
    """Steps between measures and between checkpoints; by default a twelfth of the run, and at most an epoch."""
    measure = measure_every or max(1, steps // LIVE_POINTS)
    return measure, save_every or min(2 * measure, steps_per_epoch)


def steps_with(every: int, steps: int) -> set[int]:
    """The steps at which something is done that is done at every `every`-th and at the last."""
    return {*range(every, steps + 1, every), steps}


def mfu(images_per_second: float, forward: float, peak: float, processes: int) -> float:
    """Model FLOPs utilisation: three forwards for each image (view) over what all processes' GPUs can do at most."""
    return (1 + BACKWARD) * forward * images_per_second / (peak * processes)


def gpu_hours(flops: float, peak: float, assumed_mfu: float) -> float:
    """Hours of one GPU for so many FLOPs."""
    return flops / (peak * assumed_mfu) / 3600
