"""What `commopt compare` sees of a training, from a program without torch: a record of some steps of 20 ms each."""

from __future__ import annotations

import argparse
import json
import os
import time

from commopt.record.recorder import Recorder

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int)
args, _ = parser.parse_known_args()
options = json.loads(os.environ["COMMOPT_METHOD"])
recorder = Recorder.from_environment(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
recorder.start(method=options.pop("name"), options=options, parameters=100, steps=args.steps)
for step in range(args.steps):
    time.sleep(0.02)
    recorder.step(step=step, loss=3.0 / (step + 1), seconds=0.02, wait_s=0.01, tokens=8, steady=step > 1)
recorder.validation(step=args.steps, loss=0.5, tokens=64)
recorder.compute([0.01] * 4)
recorder.end()
