"""The demo: the whole journey on a CPU, by the same commands that a user types. Run by `tools/dev.py demo`.

Shards -> two sources under Ray Train with ZeRO-2 -> a sweep of 16 trials -> a report. What is done already is not
done again; a second call only looks and prints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

OUT, SHARDS = Path("runs/demo"), Path("shards/demo")


def nc_dist(*args: object) -> None:
    """One nc-dist command, shown as a user would type it; ends the demo with its exit code when it fails."""
    words = [str(arg) for arg in args]
    print("\n$ nc-dist " + " ".join(words), flush=True)
    code = subprocess.run([sys.executable, "-m", "nc_dist", *words]).returncode
    if code:
        sys.exit(f"the demo stopped: the command above ended with exit code {code}; its message says what to do")


def source_set() -> str:
    """Fashion-MNIST where it can be had, MNIST-5k where not."""
    from nc_dist.data.catalog import is_available

    if is_available("fashion_mnist"):
        return "fashion_mnist"
    print("Fashion-MNIST cannot be had here (no download, no Debian package): MNIST-5k is the source instead")
    return "mnist5k"


def table() -> str:
    """The 16 rows of the ledger, short."""
    rows = [json.loads(line) for line in (OUT / "results.jsonl").read_text().splitlines()]
    names = ("variant", "dataset", "method", "accuracy", "nc1 source", "nc1 downstream", "trained")
    lines = ["{:8} {:8} {:13} {:>8} {:>11} {:>14} {:>9}".format(*names)]
    for row in rows:
        lines.append(
            f"{row['variant']:8} {row['dataset']:8} {row['method']:13} {100 * row['accuracy']:7.1f}% "
            f"{row['nc1_source']:11.3g} {row['nc1_downstream']:14.3g} {row['trainable_percent']:8.2f}%"
        )
    return "\n".join(lines)


def main() -> None:
    began = time.monotonic()
    os.chdir(Path(__file__).resolve().parent.parent)
    if not (SHARDS / "source-test" / "manifest.json").is_file():
        name = source_set()
        nc_dist("shards", "build", f"{name}:train", SHARDS / "source-train", "--per-class", 1200)
        nc_dist("shards", "build", f"{name}:test", SHARDS / "source-test", "--per-class", 200)
    for loss in ("ce", "supcon"):
        nc_dist("pretrain", f"configs/pretrain/demo_{loss}.yaml", "--on", "ray")
    nc_dist("sweep", "configs/sweep/demo.yaml", "--on", "ray")
    nc_dist("report", OUT)
    print(f"\n{table()}\n")
    print(f"report:      {OUT}/report.html (and report.md, results.csv, results.jsonl)")
    print(f"TensorBoard: {Path(sys.executable).parent}/tensorboard --logdir {OUT}")
    print(f"demo done in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
