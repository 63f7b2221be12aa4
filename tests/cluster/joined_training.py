"""Trains under noloco until the machine that was added has met the others in three rounds; prints what it saw.

joined_training.py MARK FOLDER: in which a file appears once all may end.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import commopt

may_end = Path(sys.argv[2]) / "may-end"
torch.manual_seed(0)
model, target = torch.nn.Linear(16, 4), torch.randn(4, 16)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run = commopt.attach(model, commopt.build("noloco", every=5), optimizer)
begun_at, losses, steps = run.join(), list[float](), list[int]()
for step in run.range(100_000):
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1000 * step + run.rank))
    loss = (model(x) - x @ target.T).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    steps.append(step)
    if len(steps) == 20:
        print("has made 20 steps", flush=True)
    if run.rank == 2 and sum(len(report.members) > 1 for report in run.reports) == 3:
        may_end.touch()
    if may_end.exists():
        break
    time.sleep(0.02)
run.finish()
rounds = [[report.round, report.members, report.missed] for report in run.reports]
told = {"begun_at": begun_at, "steps": steps, "losses": losses, "rounds": rounds, "ranks": run.ranks}
print(json.dumps(told), flush=True)
run.close()
