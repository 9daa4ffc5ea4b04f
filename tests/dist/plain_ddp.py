"""A plain DDP script, as anyone would write it, with neural collapse watched while it evaluates.

torchrun --nproc-per-node=2 plain_ddp.py float64 [idle]: with `idle` the last rank has nothing to evaluate.
"""

import json
import os
import sys
from collections import OrderedDict

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from nc_dist import nc

LAYERS, CLASSES, SAMPLES, BATCH = ["layer1", "layer2", "input:fc", "fc"], 5, 203, 30


def make_net() -> nn.Module:
    torch.manual_seed(0)
    layer1 = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    layer2 = nn.Sequential(nn.Conv2d(16, 24, 3, stride=2), nn.ReLU())
    parts = {"layer1": layer1, "layer2": layer2, "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(**parts, fc=nn.Linear(24, CLASSES)))


def make_data() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=random)
    centres = torch.randn(CLASSES, 3, 8, 8, generator=random)
    return centres[labels] + torch.randn(SAMPLES, 3, 8, 8, generator=random), labels


def main(dtype: str, *options: str) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.set_default_dtype(getattr(torch, dtype))
    images, labels = make_data()
    model = DDP(make_net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        rows = torch.arange(step * BATCH + rank, (step + 1) * BATCH, size)  # each rank its share of the batch
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    busy = size - 1 if "idle" in options else size
    mine = torch.arange(rank, SAMPLES, busy) if rank < busy else torch.arange(0)
    with torch.no_grad(), nc.watch(model, LAYERS, CLASSES) as w:
        for rows in mine.split(BATCH) if len(mine) else []:
            model(images[rows])
            w.update(labels[rows])
    metrics = w.metrics()
    if rank == 0:
        print(json.dumps(metrics), flush=True)
    dist.barrier()
    os._exit(0)  # at the interpreter's own end a thread of gloo's that holds a tensor now and then aborts the process


if __name__ == "__main__":
    main(*sys.argv[1:])
