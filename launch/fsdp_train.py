"""Train the byte-level GPT of train.py with FSDP2: sharded within a node, averaged between nodes by any gradient method.

torchrun --nproc-per-node=4 launch/fsdp_train.py --shards 2 --method '{"name": "two_way(int8)"}'
torchrun --nproc-per-node=4 launch/fsdp_train.py --shards 4 --method '"two_way(int8)"'      # one replica: compress its reduce-scatter
torchrun --nproc-per-node=4 launch/fsdp_train.py --shards 2 --method null                   # FSDP alone
"""

import argparse
import json
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from train import GPT, Stream, draw, read_corpus

import commopt


def main(args: argparse.Namespace) -> None:
    is_gpu = torch.cuda.is_available() and args.backend == "nccl"
    if is_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(args.backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks % args.shards:
        raise SystemExit(f"--shards {args.shards}: {ranks} processes do not divide into replicas of that many shards")
    device = "cuda" if is_gpu else "cpu"
    if args.shards == ranks:
        mesh = init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device, (ranks // args.shards, args.shards), mesh_dim_names=("replicate", "shard"))

    torch.manual_seed(1)  # the same model on every rank
    model: Any = GPT(args.layers, 4, args.width, args.context).to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.0 if args.no_momentum else 0.9)
    run = None if args.method is None else commopt.attach(model, args.method, optimizer)

    train, held_out = read_corpus(None)
    stream = Stream(train, args.batch, args.context, 1000 + rank)
    start, counted = time.perf_counter(), run.traffic.payload_bytes if run else 0
    for step in range(args.steps):
        x, y = (t.to(device) for t in stream.at(step))
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        if run is None or run.method.may_be_clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if rank == 0 and (step % 10 == 0 or step == args.steps - 1):
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)
    seconds = time.perf_counter() - start

    with torch.no_grad():  # the same windows on every rank: all ranks run a sharded model together
        windows = torch.Generator().manual_seed(1)
        x, y = (t.to(device) for t in draw(held_out, 64, args.context, windows))
        validation = model(x, y).item()
    if run is None:
        sent = "FSDP alone"
    else:
        nbytes = run.traffic.payload_bytes - counted
        equal = "equal" if run.replicas_are_equal() else "APART"
        sent = f"{nbytes / args.steps / 1e6:.3f} MB sent a step by rank 0, replicas {equal}"
    if rank == 0:
        print(f"validation loss {validation:.3f} after {args.steps} steps in {seconds:.1f} s; {sent}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", type=json.loads, default="two_way(int8)", help="name or block as JSON, or null")
    parser.add_argument("--shards", type=int, default=2, help="processes that share one copy of the model")
    parser.add_argument("--backend", default="gloo", choices=["gloo", "nccl"])
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--no-momentum", action="store_true", help="for dgc, which has its own")
    for name, default in {"steps": 40, "batch": 4, "context": 64, "layers": 4, "width": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    main(parser.parse_args())
