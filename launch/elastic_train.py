"""Train through failures: torchrun restarts ranks that die, and training resumes from the last checkpoint, residuals included.

torchrun --nproc-per-node=2 --max-restarts=3 launch/elastic_train.py --checkpoints /tmp/elastic --method dgc
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import commopt
from commopt.optim import make_optimizer

FEATURES, CLASSES = 64, 10


def make_model(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 128), nn.Tanh(), nn.Dropout(0.1), nn.Linear(128, CLASSES))


def draw(rank: int, step: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """The batch of a rank and a step, always the same: x (size, 64) f32, and the nearest of ten corners, (size,) i64."""
    corners = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1_000_003 * (rank + 1) + step)
    x = torch.randn(size, FEATURES, generator=generator)
    return x, (x @ corners.T).argmax(dim=1)


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step; all ranks see the same folder, but rank 0 decides, as shared file systems lag."""
    found = sorted(folder.glob("step-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    choice: list[str | None] = [str(found[-1]) if found else None]
    dist.broadcast_object_list(choice, src=0)
    return None if choice[0] is None else Path(choice[0])


def save(folder: Path, run: commopt.Run, schedule: Any) -> None:
    """Write a checkpoint for this step, and only then remove the earlier ones."""
    run.save(folder / f"step-{run.steps}", extra={"schedule": schedule.state_dict()})
    if dist.get_rank() == 0:
        for path in folder.glob("step-*"):
            if path.name != f"step-{run.steps}":
                shutil.rmtree(path, ignore_errors=True)


def main(args: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    rank, model = dist.get_rank(), make_model()
    optimizer = make_optimizer({"name": args.optimizer, "lr": args.lr}, model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / args.steps)
    wrapped = DistributedDataParallel(model)
    run = commopt.attach(wrapped, {"name": args.method, **args.options}, optimizer)

    if (last := newest(args.checkpoints)) is not None:
        schedule.load_state_dict(run.load(last)["schedule"])
    if rank == 0:
        print(f"begins at step {run.steps} of {args.steps}", flush=True)
    loss: Any = None
    for step in run.range(args.steps):
        x, label = draw(rank, step)
        run.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(wrapped(x), label)
        loss.backward()
        run.optimizer.step()
        schedule.step()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            save(args.checkpoints, run, schedule)
    if rank == 0:
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
        print(f"done: loss {loss.item():.4f}, parameters {digest[:16]}", flush=True)
    run.quiet()
    run.close()
    dist.destroy_process_group()


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True, help="a folder that all nodes see")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints; a failure costs no more")
    parser.add_argument("--method", default="onebit_adam", help="a name from docs/methods.md")
    parser.add_argument("--options", type=json.loads, default={}, help='the method\'s, as JSON: {"freeze_step": 20}')
    parser.add_argument("--optimizer", default="adam", help="adam, sgd, ...; a method may stand in for it")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=100)
    return parser.parse_args(words)


if __name__ == "__main__":
    main(arguments())
