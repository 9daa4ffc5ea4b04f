"""The ways in which a journey ends early, and the exit code of each. Used everywhere, imports nothing."""

DONE, FAILED, BAD_INPUT, PREEMPTED, INTERRUPTED, TERMINATED = 0, 1, 2, 75, 130, 143
STATES = {
    DONE: "done",
    FAILED: "failed",
    BAD_INPUT: "bad_input",
    PREEMPTED: "preempted",
    INTERRUPTED: "interrupted",
    TERMINATED: "terminated",
}

# What is left where a checkpoint does not go over to other settings; its path or URL is filled in.
EXPORT_REMEDY = (
    "Its weights can begin a run of their own: nc-dist checkpoint export {} --to FOLDER, then "
    "model.backbone.weights=FOLDER/backbone.safetensors"
)


class InputError(ValueError):
    """What the user gave cannot work: the message names the key or file, the value and the remedy."""


class BadSample(InputError):
    """A sample whose bytes are there and are wrong: training may put another in its place, and counts it."""


class Preempted(Exception):
    """Asked to stop: the same command goes on from `step`, up to which all is saved, or begins anew (0)."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}, saved" if step else "stopped, nothing was to be saved")
        self.step = step


class Diverged(RuntimeError):
    """Training gave up: too many steps had a loss or gradients that are not finite. Repeating it would not help."""


class Terminated(BaseException):
    """SIGTERM where nothing can be saved half-way."""


def exit_code(error: BaseException) -> int:
    """The exit code that says how `error` ended the run."""
    if isinstance(error, InputError):
        return BAD_INPUT
    if isinstance(error, Preempted):
        return PREEMPTED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, Terminated):
        return TERMINATED
    return FAILED
