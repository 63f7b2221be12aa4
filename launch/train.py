"""Train a byte-level GPT on real text with any communication method; an example to read and copy.

torchrun --nproc-per-node=4 launch/train.py --method onebit_adam --options '{"freeze_step": 24}'
mpirun -n 4 python launch/train.py --method onebit_adam --options '{"freeze_step": 24}'
commopt compare configs/runs/demo.yaml
"""

import argparse
import json
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import commopt
from commopt.groups import connect
from commopt.optim import make_optimizer

STDLIB, PAGE = Path(sysconfig.get_path("stdlib")), 4096
NOT_READ = ("site-packages", "dist-packages", "test")


def read_corpus(path: Path | None) -> tuple[Tensor, Tensor]:
    """Training and validation bytes of a file or a folder; every 20th page of 4 KiB is held out.

    Without a path, what every Python has: the standard library's sources and its language reference.
    """
    tops = [path] if path else [top for top in STDLIB.iterdir() if top.name not in NOT_READ]
    found = sorted(f for top in tops for f in (top, *top.rglob("*" if path else "*.py")) if f.is_file())
    files = [f for f in found if path or (f.suffix == ".py" and "test" not in f.parts)]
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)) or bytearray(1), dtype=torch.uint8)
    pages = text[: len(text) // (20 * PAGE) * 20 * PAGE].view(-1, 20, PAGE)
    if len(pages) == 0:
        raise SystemExit(f"--corpus {path}: {len(text)} bytes are too few; at least {20 * PAGE} are needed")
    return pages[:, :19].reshape(-1), pages[:, 19].reshape(-1)


def draw(data: Tensor, batch: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`batch` random windows, and the same shifted by one byte. Both (batch, context) i64."""
    starts = torch.randint(len(data) - context, (batch, 1), generator=generator)
    windows = data[starts + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


class Stream:
    """One rank's batches by step, no batch twice: the same for every method, and wherever training starts."""

    def __init__(self, data: Tensor, batch: int, context: int, seed: int) -> None:
        self.data, self.batch, self.context = data, batch, context
        self.generator, self.drawn = torch.Generator().manual_seed(seed), 0

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step; batches of skipped steps are drawn and dropped."""
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
    def __init__(self, layers: int, heads: int, width: int, context: int, embedding_std: float = 0.02) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=embedding_std if p is self.bytes.weight else 0.02)

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


def main(args: argparse.Namespace) -> None:
    group = connect(args.backend)
    train, held_out = read_corpus(args.corpus)
    torch.manual_seed(args.seed)  # the same model on every rank
    gpt = GPT(args.layers, args.heads, args.width, args.context, args.embedding_std)
    optimizer = make_optimizer(args.optimizer, gpt.parameters())
    falling = args.steps * max(1 - args.decay_from, 1e-9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (args.steps - step) / falling))
    method = commopt.build(args.method, **args.options)
    model = commopt.wrap(gpt, method, bucket_cap_mb=args.bucket_mb)
    with commopt.attach(model, method, optimizer, group=group) as run:
        run.join(schedule=schedule)  # at step 0 in a new job, or with ranks that are already training
        stream = Stream(train, args.batch, args.context, args.seed * 1000 + run.rank)
        for step in run.range(args.steps):
            loss = train_step(model, run.optimizer, stream.at(step))
            schedule.step()
            run.log(loss=loss, tokens=args.batch * args.context)
        run.finish()

        # ranks with equal replicas validate on different windows
        windows = torch.Generator().manual_seed(1 + (0 if run.is_replica else run.rank))
        with torch.no_grad():
            losses = [gpt(*draw(held_out, 16, args.context, windows)).item() for _ in range(args.validation_batches)]
        run.log(validation_loss=sum(losses) / len(losses), tokens=16 * args.context * len(losses))
        run.measure_compute(lambda: train_step(model, run.optimizer, stream.at(stream.drawn)))
        run.quiet()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    adam = {"name": "adam", "lr": 2e-3}
    parser.add_argument("--method", default="dense", help="a name from docs/methods.md")
    parser.add_argument("--options", type=json.loads, default={}, help="the method's options, as JSON")
    parser.add_argument("--optimizer", type=json.loads, default=adam, help='as JSON: {"name": "sgd", "lr": 0.1}')
    parser.add_argument("--corpus", type=Path, help="a file or a folder of text; default: Python's own sources")
    parser.add_argument("--backend", choices=["gloo", "nccl", "mpi"], help="default: mpi under mpirun, else gloo")
    sizes = {"steps": 100, "batch": 4, "context": 64, "layers": 4, "heads": 4, "width": 128, "seed": 1}
    for name, default in {**sizes, "validation-batches": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--embedding-std", type=float, default=0.02, help="of bytes; 0.2 learns in fewer steps")
    parser.add_argument("--bucket-mb", type=float, default=25, help="DDP exchanges gradients in buckets of this size")
    parser.add_argument("--decay-from", type=float, default=0.5, help="from this share of the steps on, the rate falls")
    main(parser.parse_args())
