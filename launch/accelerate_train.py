"""Train launch/train.py's GPT in a loop of Hugging Face Accelerate, with any communication method.

torchrun --nproc-per-node=2 launch/accelerate_train.py --method onebit_adam --options '{"freeze_step": 24}'
torchrun --nproc-per-node=2 launch/accelerate_train.py --method noloco --options '{"every": 10}'
"""

import argparse
import json
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from train import GPT, draw, read_corpus

import commopt


def main(args: argparse.Namespace) -> None:
    is_on_cpu = args.cpu or not torch.cuda.is_available()
    accelerator = Accelerator(cpu=is_on_cpu, gradient_accumulation_steps=args.accumulate)
    set_seed(args.seed)  # the same model on every rank
    text, held_out = read_corpus(None)
    method = commopt.build(args.method, **args.options)
    model: Any = GPT(args.layers, 4, args.width, args.context)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps * accelerator.num_processes)
    model = accelerator.prepare_model(model, evaluation_mode=True)  # without DDP, which noloco and diloco do not use
    model = commopt.wrap(model, method)  # and with DDP for the others
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    run = commopt.attach(model, method, optimizer)  # the one line to add

    run.join()  # for outer methods
    batches = torch.Generator().manual_seed(args.seed * 1000 + accelerator.process_index)
    for step in range(args.steps):
        for _ in range(args.accumulate):
            with accelerator.accumulate(model):
                x, target = draw(text, args.batch, args.context, batches)
                loss = model(x.to(accelerator.device), target.to(accelerator.device))
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        if step % 10 == 9:
            mb = run.traffic.payload_bytes / 1e6
            accelerator.print(f"step {step + 1}: loss {loss.item():.3f}, {mb:.2f} MB sent by rank 0")
    run.finish()
    accelerator.save_state(args.output)  # with what each rank still has to send

    with torch.no_grad():
        x, target = draw(held_out, 64, args.context, torch.Generator().manual_seed(1))
        loss = accelerator.unwrap_model(model)(x.to(accelerator.device), target.to(accelerator.device))
    accelerator.print(f"{args.method}: loss {loss.item():.3f} on held-out text after {args.steps} steps")
    run.close()
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="dense", help="a name from docs/methods.md")
    parser.add_argument("--options", type=json.loads, default={}, help="the method's options, as JSON")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--output", default="out/accelerate", help="the folder of the checkpoint")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    sizes = {"steps": 60, "batch": 8, "accumulate": 1, "context": 64, "layers": 2, "width": 64, "seed": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    main(parser.parse_args())
