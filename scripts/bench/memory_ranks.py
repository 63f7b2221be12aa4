"""What each rank of memory.py runs: a few steps of launch/train.py's GPT, and the most memory that the process has had until then."""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from building import fitting, training_program

import commopt
from commopt.groups import connect
from commopt.optim import make_optimizer


def most_bytes() -> int:
    """The most memory that this process has had so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", type=json.loads, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    # if memory runs out before memory.py sees it, the system ends no other program
    Path("/proc/self/oom_score_adj").write_text("1000")
    settings, page, before = args.settings, training_program(), most_bytes()
    group = connect("gloo")
    torch.manual_seed(settings["seed"])
    gpt = page.GPT(settings["layers"], settings["heads"], settings["width"], settings["context"])
    method = commopt.build(settings["method"], **settings["options"])
    optimizer = make_optimizer(fitting(method, settings["optimizer"]), gpt.parameters())
    views = {"gradient_as_bucket_view": True} if settings["bucket_views"] else {}
    model = commopt.wrap(gpt, method, **views)
    most, seconds = [], []
    with commopt.attach(model, method, optimizer, group=group) as run:
        data = torch.Generator().manual_seed(settings["seed"] * 1000 + run.rank)
        for _ in run.range(settings["steps"]):
            most.append(most_bytes() - before)  # the first: of an attached model
            bytes_read = torch.randint(256, (2, settings["batch"], settings["context"]), generator=data)
            begun_s = time.perf_counter()
            run.optimizer.zero_grad()  # before forward, when DDP makes new buckets: gradients would keep the old ones
            page.train_step(model, run.optimizer, (bytes_read[0], bytes_read[1]))
            seconds.append(round(time.perf_counter() - begun_s, 3))
        most.append(most_bytes() - before)
        found = {"parameters": sum(p.numel() for p in gpt.parameters()), "most_bytes": most, "seconds": seconds}
        (args.out / f"rank{run.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
