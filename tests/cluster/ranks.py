"""A rank of a real job: it all-reduces until the time is up: `ranks.py MARK SECONDS`."""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
x = torch.ones(50_000)
dist.all_reduce(x)
print(f"rank {rank} of {dist.get_world_size()}: {x[0].item():.0f}", flush=True)
deadline = time.monotonic() + float(sys.argv[2])
is_over = torch.zeros(1)
while not is_over.item():
    dist.all_reduce(x)
    x.fill_(1.0)
    is_over.fill_(float(time.monotonic() > deadline))
    dist.all_reduce(is_over, op=dist.ReduceOp.MAX)
dist.destroy_process_group()
