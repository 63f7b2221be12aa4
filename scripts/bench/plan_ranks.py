"""What each rank of plan.py runs: some steps of launch/train.py's model on random bytes, under one method after another.

plan_ranks.py --methods dense,fp16 --layers 5 --width 128 --out measured.json      times steps; rank 0 writes {method: seconds}
plan_ranks.py --layers 5 --width 128                                               under a launcher that chooses the method
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from building import training_program

import commopt
from commopt.groups import Group, connect
from commopt.optim import make_optimizer

CONTEXT, BATCH, HEADS, BUCKET_MB = 64, 4, 4, 1
OPTIONS: dict[str, dict[str, Any]] = {"onebit_adam": {"freeze_step": 2}}
SETTLED, LEAST, MOST, SECONDS = 4, 3, 12, 3.0  # steps before the measured ones, and how many are measured


def prepared(name: str, args: argparse.Namespace, group: Group | None) -> tuple[Any, Any]:
    """A new model in DDP, with its run."""
    torch.manual_seed(1)
    gpt = training_program().GPT(args.layers, HEADS, args.width, CONTEXT)
    method = commopt.build(name, **OPTIONS.get(name, {}))
    model = commopt.wrap(gpt, method, bucket_cap_mb=BUCKET_MB)
    optimizer = make_optimizer({"name": "adamw", "lr": 1e-4}, gpt.parameters())
    return model, commopt.attach(model, method, optimizer, group=group)


def batch(data: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(256, (BATCH, CONTEXT + 1), generator=data)
    return text[:, :-1], text[:, 1:]


def measure(name: str, args: argparse.Namespace, group: Group | None) -> float:
    """The median of some steps, after those in which DDP and the method settle."""
    model, run = prepared(name, args, group)
    step, data = training_program().train_step, torch.Generator().manual_seed(1 + run.rank)
    with run:
        for _ in range(SETTLED):
            step(model, run.optimizer, batch(data))
        seconds: list[float] = []
        while True:
            begun = time.perf_counter()
            step(model, run.optimizer, batch(data))
            seconds.append(time.perf_counter() - begun)
            is_enough = len(seconds) >= MOST or (len(seconds) >= LEAST and sum(seconds) > SECONDS)
            if json.loads(run.group.tell(json.dumps(is_enough))[0]):  # rank 0 decides
                break
        medians = [json.loads(text) for text in run.group.tell(json.dumps(statistics.median(seconds)))]
    return statistics.fmean(medians)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    group = connect("gloo")
    if args.methods is None:
        model, run = prepared("dense", args, group)
        step, data = training_program().train_step, torch.Generator().manual_seed(1 + run.rank)
        for _ in run.range(1000):
            run.log(loss=step(model, run.optimizer, batch(data)))
        return
    found = {name: measure(name, args, group) for name in re.split(r",(?![^(]*\))", args.methods)}
    if int(os.environ["RANK"]) == 0:
        args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    main(parser.parse_args())
