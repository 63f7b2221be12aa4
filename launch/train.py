"""Train a byte-level GPT on real text with any communication method; a page to read and to copy from.

torchrun --nproc-per-node=4 launch/train.py --method onebit_adam --options '{"freeze_step": 24}'
mpirun -n 4 python launch/train.py --method onebit_adam --options '{"freeze_step": 24}'
commopt compare configs/runs/demo.yaml
"""

import argparse
import json
import os
import sysconfig
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from commopt.frameworks import ddp, plain
from commopt.methods import is_outer_method, with_optimizer
from commopt.record.recorder import Recorder
from commopt.run.outer import OuterAttachment

STDLIB, PAGE = Path(sysconfig.get_path("stdlib")), 4096


def read_corpus(path: Path | None) -> tuple[Tensor, Tensor]:
    """Training and validation bytes of a file or a folder; every 20th page of 4 KiB is held out.

    Without a path, what every Python has: the standard library's sources and its language reference.
    """
    files = [path] if path is not None and path.is_file() else sorted((path or STDLIB).rglob("*" if path else "*.py"))
    files = [
        f for f in files if f.is_file() and (path or not {"site-packages", "dist-packages", "test"} & set(f.parts))
    ]
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)) or bytearray(1), dtype=torch.uint8)
    pages = text[: len(text) // (20 * PAGE) * 20 * PAGE].view(-1, 20, PAGE)
    if len(pages) == 0:
        raise SystemExit(f"--corpus {path}: {len(text)} bytes are too few; it takes at least {20 * PAGE}")
    return pages[:, :19].reshape(-1), pages[:, 19].reshape(-1)


def draw(data: Tensor, batch: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`batch` random windows, and the same shifted by one byte. Both (batch, context) i64."""
    starts = torch.randint(len(data) - context, (batch, 1), generator=generator)
    windows = data[starts + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


class Stream:
    """The batches of one rank by step: the same wherever training starts and whatever the method, and none of them twice."""

    def __init__(self, data: Tensor, batch: int, context: int, seed: int) -> None:
        self.data, self.batch, self.context = data, batch, context
        self.generator, self.drawn = torch.Generator().manual_seed(seed), 0

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step; those of steps that were left out are passed over."""
        for _ in range(self.drawn, step):
            draw(self.data, self.batch, self.context, self.generator)
        self.drawn = step + 1
        return draw(self.data, self.batch, self.context, self.generator)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, length, width / heads) each
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.contract(F.gelu(self.expand(self.norm_2(x))))


class GPT(nn.Module):
    def __init__(self, layers: int, heads: int, width: int, context: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        hidden = self.bytes(x) + self.places.weight[: x.shape[1]]
        logits = self.head(self.norm(self.blocks(hidden)))
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    loss = model(*batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def connect(backend: str | None) -> Any:
    """The ranks over MPI where mpirun has started this one; None where they are torch.distributed's, or peers."""
    by_mpirun = "RANK" not in os.environ and not {"PMI_SIZE", "OMPI_COMM_WORLD_SIZE"}.isdisjoint(os.environ)
    if "COMMOPT_PEERS" in os.environ:  # every node was started on its own, and finds the others by itself
        if backend == "mpi":
            raise SystemExit("--backend mpi: commopt launch has started these ranks, and not mpirun; leave it out")
    elif backend == "mpi" or (backend is None and by_mpirun):
        from commopt.groups import MPIGroup

        group = MPIGroup()
        os.environ.update(RANK=str(group.rank), WORLD_SIZE=str(group.size))  # for the recorder
        return group
    else:
        dist.init_process_group(backend or "gloo")
    return None


def main(args: argparse.Namespace) -> None:
    over_mpi = connect(args.backend)
    train, held_out = read_corpus(args.corpus)
    torch.manual_seed(args.seed)  # the same model on every rank
    gpt = GPT(args.layers, args.heads, args.width, args.context)
    method, optimizer = with_optimizer(args.method, gpt, options=args.options, optimizer=args.optimizer)
    falling = args.steps * max(1 - args.decay_from, 1e-9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (args.steps - step) / falling))
    if is_outer := is_outer_method(args.method):
        model: nn.Module = gpt
        attachment: Any = plain.attach(gpt, method, optimizer, over_mpi)
        first = attachment.join(schedule=schedule)  # 0, or where the others are if they train already
        rank, steps = attachment.peers.rank, attachment.range(args.steps)
    elif over_mpi is not None:
        own_optimizer, nbytes = None if optimizer is method else optimizer, int(args.bucket_mb * 2**20)
        model, attachment = gpt, plain.attach(gpt, method, own_optimizer, over_mpi, bucket_bytes=nbytes)
        first, rank, steps = 0, over_mpi.rank, range(args.steps)
    else:
        model = DistributedDataParallel(gpt, bucket_cap_mb=args.bucket_mb)
        overlap = not method.needs_all_buckets  # a global norm needs all gradients first
        attachment = ddp.attach(model, method, None if optimizer is method else optimizer, overlap=overlap)
        first, rank, steps = 0, dist.get_rank(), range(args.steps)

    recorder = Recorder.from_environment()
    parameters = sum(p.numel() for p in gpt.parameters())
    recorder.start(method=args.method, options=args.options, parameters=parameters, steps=args.steps, resumed_at=first)
    stream = Stream(train, args.batch, args.context, args.seed * 1000 + rank)
    is_measuring = False
    for step in steps:
        steady = step >= 3 and method.is_steady  # DDP settles its buckets in the first steps
        if steady and not is_measuring:
            is_measuring = True
            quiet(attachment)
            recorder.counters("begin", attachment.group.traffic.as_dict())
        start, waited = time.perf_counter(), attachment.waited_s
        loss = train_step(model, optimizer, stream.at(step))
        schedule.step()
        seconds, wait_s = time.perf_counter() - start, attachment.waited_s - waited
        tokens = args.batch * args.context
        recorder.step(step=step, loss=loss, seconds=seconds, wait_s=wait_s, tokens=tokens, steady=steady)
        tell(recorder, attachment, step)
    if is_outer:
        attachment.finish()
        tell(recorder, attachment, args.steps)
    if is_measuring:
        quiet(attachment)
        recorder.counters("end", attachment.group.traffic.as_dict())
    if not is_outer:
        method.synchronise(attachment.group)  # for methods that take local steps
        if not attachment.replicas_are_equal():
            recorder.event("replicas have drifted apart")

    with torch.no_grad():  # replicas that are equal take a share of the held-out text each, others the same
        windows = torch.Generator().manual_seed(1 + (0 if is_outer else rank))
        losses = [gpt(*draw(held_out, 16, args.context, windows)).item() for _ in range(args.validation_batches)]
    recorder.validation(step=args.steps, loss=sum(losses) / len(losses), tokens=16 * args.context * len(losses))

    quiet(attachment)
    with attachment.communication_off():  # what the same steps cost without a network
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        batches = [stream.at(args.steps + k) for k in range(20)]
        seconds_alone = []
        for batch in batches:
            start = time.perf_counter()
            train_step(model, optimizer, batch)
            seconds_alone.append(time.perf_counter() - start)
    recorder.compute(seconds_alone[2:])
    recorder.end()
    if is_outer:
        attachment.close()
    else:
        attachment.group.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def quiet(attachment: Any) -> None:
    """Wait until nothing is on its way, so that bytes counted here and on the interface belong together."""
    attachment.wait_until_quiet() if isinstance(attachment, OuterAttachment) else attachment.group.barrier()


def tell(recorder: Recorder, attachment: Any, step: int) -> None:
    """Record what the method had to say since the last step."""
    for _, name in attachment.voided:
        recorder.event("void", step=step, parameter=name)
    attachment.voided.clear()
    if isinstance(attachment, OuterAttachment):
        for report in attachment.reports:
            recorder.round(**asdict(report))
        for kind, fields in attachment.events:
            recorder.event(kind, **fields)
        attachment.reports.clear()
        attachment.events.clear()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="dense", help="a name from docs/methods.md")
    parser.add_argument("--options", type=json.loads, default={}, help="the method's options, as JSON")
    parser.add_argument(
        "--optimizer", type=json.loads, default={"name": "adam", "lr": 2e-3}, help='as JSON: {"name": "sgd", "lr": 0.1}'
    )
    parser.add_argument("--corpus", type=Path, help="a file or a folder of text; default: Python's own sources")
    parser.add_argument("--backend", choices=["gloo", "nccl", "mpi"], help="default: mpi under mpirun, else gloo")
    sizes = {"steps": 100, "batch": 4, "context": 64, "layers": 4, "heads": 4, "width": 128, "seed": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bucket-mb", type=float, default=25, help="DDP exchanges gradients in buckets of this size")
    parser.add_argument(
        "--decay-from", type=float, default=0.5, help="from this share of the steps on, the rate falls to zero"
    )
    parser.add_argument(
        "--validation-batches", type=int, default=16, help="batches of 16 windows that each rank evaluates"
    )
    main(parser.parse_args())
