"""Train the byte-level GPT of train.py by a DeepSpeed engine, with the communication method that its JSON names.

torchrun --nproc-per-node=2 launch/deepspeed_train.py --config configs/deepspeed/onebit_adam.json --steps 20
torchrun --nproc-per-node=2 launch/deepspeed_train.py --config configs/deepspeed/noloco.json --steps 20
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from train import GPT, Stream, read_corpus

from commopt import Run
from commopt.deepspeed import initialize


def main(args: argparse.Namespace) -> None:
    text, _ = read_corpus(args.corpus)
    torch.manual_seed(1)  # the same model on every rank
    gpt = GPT(args.layers, args.heads, args.width, args.context)
    engine, _, _, _ = initialize(model=gpt, model_parameters=gpt.parameters(), config=str(args.config))
    run: Run | None = getattr(engine, "commopt", None)  # None if the configuration names no method
    rank = dist.get_rank()
    batch = engine.train_micro_batch_size_per_gpu()
    stream = Stream(text, batch, args.context, 1000 + rank)
    if args.load:
        engine.load_checkpoint(args.load)
    steps = range(engine.global_steps, args.steps) if run is None else run.range(args.steps)
    for step in steps:
        for micro_batch in range(accumulated := engine.gradient_accumulation_steps()):
            x, target = (part.to(engine.device) for part in stream.at(step * accumulated + micro_batch))
            loss = engine(x, target)
            engine.backward(loss)
            engine.step()
        if rank == 0 and (step % args.log_every == 0 or step + 1 == args.steps):
            sent = run.traffic.payload_bytes / 1e6 if run is not None else float("nan")
            print(f"step {step}: loss {loss.item():.3f}, {sent:.2f} MB sent", flush=True)
    if args.save:
        engine.save_checkpoint(args.save)  # with what each rank still has to send
    if run is not None:
        run.finish()
        run.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a DeepSpeed configuration, as in configs/deepspeed")
    parser.add_argument("--corpus", type=Path, help="a file or a folder of text; default: Python's own sources")
    parser.add_argument("--save", help="a folder for a checkpoint after the last step")
    parser.add_argument("--load", help="a folder with a checkpoint to resume from")
    sizes = {"steps": 100, "context": 64, "layers": 2, "heads": 4, "width": 64, "log_every": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by DeepSpeed's own launcher
    main(parser.parse_args())
