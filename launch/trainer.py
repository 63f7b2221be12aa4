"""Train a tiny GPT-2 with the Hugging Face Trainer and any communication method, on Python's own sources as bytes.

torchrun --nproc-per-node=2 launch/trainer.py --method onebit_adam --options '{"freeze_step": 24}' --steps 60
torchrun --nproc-per-node=2 launch/trainer.py --method two_way --steps 60 --resume
"""

import argparse
import json
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is made here; nothing needs downloading
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from torch.utils.data import Dataset
from train import read_corpus
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import commopt


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of a text, one after the other, as a causal language model takes them."""

    def __init__(self, text: torch.Tensor, context: int) -> None:
        self.windows = text[: len(text) // context * context].view(-1, context)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.windows[index].long()
        return {"input_ids": window, "labels": window}


def main(args: argparse.Namespace) -> None:
    set_seed(args.seed)  # the same model on every rank
    text, held_out = read_corpus(None)
    sizes = {"n_layer": args.layers, "n_head": 2, "n_embd": args.width, "n_positions": args.context}
    tokens: dict[str, Any] = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "loss_type": "ForCausalLM"}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **tokens))
    arguments = TrainingArguments(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr,
        logging_steps=10,
        save_steps=args.save_steps,
        use_cpu=args.cpu or not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Windows(text, args.context),
        eval_dataset=Windows(held_out[: 200 * args.context], args.context),
    )
    run = commopt.attach(trainer, {"name": args.method, **args.options})  # the one line to add
    trainer.train(resume_from_checkpoint=args.resume or None)
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        steps, mb = trainer.state.global_step, run.traffic.payload_bytes / 1e6
        print(f"{args.method}: loss {loss:.3f} on held-out text after {steps} steps, {mb:.2f} MB sent by rank 0")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="dense", help="a name from docs/methods.md")
    parser.add_argument("--options", type=json.loads, default={}, help="the method's options, as JSON")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--output", default="out/trainer", help="the folder of checkpoints")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint there")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    sizes = {"steps": 60, "batch": 8, "accumulate": 1, "context": 64, "layers": 2, "width": 64, "seed": 1}
    for name, default in {**sizes, "save-steps": 500}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    main(parser.parse_args())
