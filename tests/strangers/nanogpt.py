"""A byte-level GPT trained in the style of nanoGPT, under DDP or FSDP2. It knows nothing of commopt."""

import argparse
import math
import os
import sysconfig
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--out_dir", type=Path, default=Path("out"))
parser.add_argument("--eval_interval", type=int, default=200)
parser.add_argument("--log_interval", type=int, default=10)
parser.add_argument("--init_from", choices=["scratch", "resume"], default="scratch")
parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
parser.add_argument("--batch_size", type=int, default=4)
parser.add_argument("--block_size", type=int, default=64)
parser.add_argument("--n_layer", type=int, default=4)
parser.add_argument("--n_head", type=int, default=4)
parser.add_argument("--n_embd", type=int, default=128)
parser.add_argument("--learning_rate", type=float, default=1e-3)
parser.add_argument("--max_iters", type=int, default=5000)
parser.add_argument("--weight_decay", type=float, default=0.1)
parser.add_argument("--grad_clip", type=float, default=1.0)
parser.add_argument("--warmup_iters", type=int, default=20)
parser.add_argument("--backend", default="gloo")
parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
parser.add_argument("--fsdp", action="store_true")
args = parser.parse_args()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(args.n_embd), nn.LayerNorm(args.n_embd)
        self.c_attn, self.c_proj = nn.Linear(args.n_embd, 3 * args.n_embd), nn.Linear(args.n_embd, args.n_embd)
        self.mlp = nn.Sequential(nn.Linear(args.n_embd, 512), nn.GELU(), nn.Linear(512, args.n_embd))

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = (y.view(b, t, args.n_head, -1).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).split(c, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, args.n_embd), nn.Embedding(args.block_size, args.n_embd)
        self.h = nn.ModuleList(Block() for _ in range(args.n_layer))
        self.ln_f, self.lm_head = nn.LayerNorm(args.n_embd), nn.Linear(args.n_embd, 256, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group(args.backend)
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if args.backend == "nccl" else torch.device("cpu")
master_process = rank == 0
torch.manual_seed(1337 + rank)
ctx = torch.amp.autocast(device.type, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext()

sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8).long()
data = {"train": text[: -len(text) // 10], "val": text[-len(text) // 10 :]}


def get_batch(split):
    ix = torch.randint(len(data[split]) - args.block_size - 1, (args.batch_size, 1))
    window = data[split][ix + torch.arange(args.block_size + 1)].to(device)
    return window[:, :-1], window[:, 1:]


model = GPT().to(device)
if args.fsdp:
    shards = int(os.environ["LOCAL_WORLD_SIZE"])
    mesh = init_device_mesh(device.type, (world_size // shards, shards), mesh_dim_names=("replicate", "shard"))
    fully_shard(model, mesh=mesh)
else:
    model = DistributedDataParallel(model)

decay = [p for p in model.parameters() if p.dim() >= 2]
no_decay = [p for p in model.parameters() if p.dim() < 2]
optim_groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(optim_groups, lr=args.learning_rate, betas=(0.9, 0.95))
iter_num = 0
if args.init_from == "resume":
    checkpoint = torch.load(args.out_dir / f"ckpt{rank}.pt")
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    iter_num = checkpoint["iter_num"]


def get_lr(it):
    if it < args.warmup_iters:
        return args.learning_rate * (it + 1) / (args.warmup_iters + 1)
    ratio = min(1.0, (it - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters))
    return args.learning_rate * (0.1 + 0.45 * (1.0 + math.cos(math.pi * ratio)))


@torch.no_grad()
def estimate_loss():
    model.eval()
    losses = torch.stack([model(*get_batch("val")) for _ in range(8)])
    model.train()
    return losses.mean().item()


t0 = time.time()
while iter_num <= args.max_iters:
    for param_group in optimizer.param_groups:
        param_group["lr"] = get_lr(iter_num)
    if iter_num % args.eval_interval == 0 and iter_num:
        val_loss = estimate_loss()
        print(f"step {iter_num}: val loss {val_loss:.4f}, rank {rank}", flush=True)
        checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": iter_num}
        args.out_dir.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, args.out_dir / f"ckpt{rank}.pt")
    for micro_step in range(args.gradient_accumulation_steps):
        is_last = micro_step == args.gradient_accumulation_steps - 1
        if args.fsdp:
            model.set_requires_all_reduce(is_last)
        else:
            model.require_backward_grad_sync = is_last
        with ctx:
            loss = model(*get_batch("train")) / args.gradient_accumulation_steps
        loss.backward()
    if args.grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if iter_num % args.log_interval == 0 and master_process:
        lossf = loss.item() * args.gradient_accumulation_steps
        print(f"iter {iter_num}: loss {lossf:.4f}, {time.time() - t0:.1f} s", flush=True)
    iter_num += 1
dist.destroy_process_group()
